"Scale paper: what the plan runs there, a dry run without any data, and every run on a synthetic fixture."

import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from vlkd.core.files import read_json
from vlkd.core.records import Run
from vlkd.core.settings import scale
from vlkd.reproduce.keys import graph
from vlkd.reproduce.plan import load_plan, plan_files, plan_nodes, run_parameters
from vlkd.tools.cost import Assumed, plan_cost
from vlkd.tools.preflight import preflight
from vlkd.train.text_student import corpus_tokens

TABLES = {"m1", "m2", "m3", "m4", "m5", "m6", "m7", "a1", "a2-a6", "a-fig1"}


@pytest.fixture(scope="module")
def runs():
    return run_parameters(plan_nodes(["all"], "paper"))


def trains(params) -> bool:
    return bool({"contrast", "kd"} & set(params))


def test_the_tables_exist_at_paper():
    plan = load_plan()
    assert all("paper" in plan[table].get("scales", ["paper"]) for table in TABLES)


def test_every_run_is_as_printed(runs):
    for name, params in runs:
        if trains(params) and params.get("kd") != "":
            assert params["preset"] == "paper", name
        if "contrast" in params:
            assert params["contrast"] in ("hinge", "none"), name
            assert params["weight"] == 1, name
            assert params["margin"] < 0, name
        elif params["kd"]:
            assert set(params["weights"].values()) <= {1}, name


def test_no_two_runs_are_the_same(runs):
    shown = [
        str(sorted((key, value) for key, value in params.items() if key not in ("name", "minutes")))
        for _, params in runs
    ]
    assert len(set(shown)) == len(shown)


def test_objectives_and_features_of_the_paper(runs):
    objectives = {name for _, params in runs for name in params.get("kd", "").split("+")}
    assert {"soft_label", "regression", "voken", "nst", "crd"} <= objectives
    assert {params["features"] for _, params in runs} == {"video", "clip", "image"}


def test_what_differs_at_paper_leaves_other_keys_alone(tmp_path):
    plan = plan_files()[0]
    experiments = shutil.copytree(plan.parents[1], tmp_path / "experiments")
    copy = experiments / plan.parent.name / plan.name
    text = copy.read_text()
    assert "\nat = " in text
    copy.write_text(re.sub(r"(?m)^at = .*\n", "", text))
    keys = [{name: node.key for name, node in graph(["m5"], "smoke", 1, p).items()} for p in (None, copy)]
    assert keys[0] == keys[1]


def reproduce(*arguments, runs):
    "`vlkd reproduce` at scale paper without a folder of data sets."
    env = {k: v for k, v in os.environ.items() if k != "VLKD_DATA"} | dict(VLKD_RUNS=str(runs))
    command = [sys.executable, "-c", "from vlkd.tools.cli import main; main()", "reproduce", *arguments]
    return subprocess.run([*command, "--scale", "paper"], capture_output=True, text=True, env=env)


def test_dry_run_without_any_data(tmp_path):
    done = reproduce("m1", "m4", "--dry-run", runs=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in (
        "two-stage@1: would run: never run",
        "howto100m is missing",
        "wikipedia_en is missing",
        "howto100m lacks features-clip/",
        "swag is missing",
        "squad2: no train data",
        "GPU_hours",
        "12L/768H",
        "assumed 30% of its peak",
        "in all, 12 runs",
        "shared by all runs",
    ):
        assert text in done.stdout, text
    assert done.stdout.count("howto100m is missing") == 1
    assert not list(tmp_path.rglob("*.json"))


def test_a_run_without_data_names_the_variable(tmp_path):
    done = reproduce("m4", runs=tmp_path)
    assert done.returncode == 2
    assert "VLKD_DATA" in done.stderr


def test_costs_follow_the_plan(runs):
    costs = plan_cost(runs).set_index("run")
    assert set(costs.index) == {name for name, params in runs if trains(params)}
    assert (costs.EFLOPs > 0).all()
    assert (costs.batch == 256).all()
    hours = Assumed().hours(1e18 * costs.EFLOPs["base-nst-crd"])
    assert costs.GPU_hours["base-nst-crd"] == pytest.approx(hours)
    large = sum(params.get("size") == "base" for _, params in runs)
    assert (costs.model == "12L/768H").sum() == large
    cheap_first = ["student-none", "student-text", "student-nst-nohead", "student-nst"]
    assert costs.EFLOPs[[*cheap_first, "student-nst-crd"]].is_monotonic_increasing
    assert costs.EFLOPs["teacher-image"] < costs.EFLOPs["teacher"]
    assert costs.steps["video-pt"] == 0
    assert costs.steps["student-text"] == scale("paper").steps


def test_preflight_of_runs_of_every_kind(tmp_path):
    "All kinds of features, the larger model, vokens on disk, captions as text, a start from a teacher."
    ids = ["student-nst-image", "base-nst-crd-clip", "student-voken", "student-asr", "two-stage"]
    short = dict(vokens=6, max_tokens=64, ft_tokens=64, max_frames=64)
    assert preflight(tmp_path, ids, samples=200, steps=2, **short) == 0
    for name in ids:
        run = Run(tmp_path / f"runs/paper/{name}@1")
        assert all(math.isfinite(value) for value in run.metrics.values()), name
        assert run.metrics["steps"] == 2
    manifest = read_json(tmp_path / "runs/paper/student-voken@1/vokens/vokens.json")
    assert manifest["pool_size"] == 6


def test_captions_and_text_are_not_joined_in_memory():
    data = SimpleNamespace(caption_table=object(), s=scale("paper"))
    with pytest.raises(ValueError, match="should be text or captions"):
        corpus_tokens(data, "text+captions")
