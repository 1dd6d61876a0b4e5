"Scale paper: what the plan runs there, what a dry run says without any data, and every run through its code on a small stand-in."

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlkd.core.settings import scale
from vlkd.reproduce.keys import graph
from vlkd.reproduce.plan import load_plan, plan_runs

TABLES = ["m1", "m2", "m3", "m4", "m5", "m6", "m7", "a1", "a2-a6", "a-fig1"]


@pytest.fixture(scope="module")
def runs():
    return plan_runs(scale="paper")


def test_every_run_is_as_printed(runs):
    plan = load_plan()
    assert set(TABLES) <= {
        i for i, e in plan.items() if e["kind"] == "table" and "paper" in e.get("scales", ["paper"])
    }
    for i, p in runs:
        if "contrast" in p:
            assert (
                p["contrast"] in ("hinge", "none")
                and p["preset"] == "paper"
                and p["weight"] == 1
                and p["margin"] < 0
            ), i
        elif p["kd"]:
            assert p["preset"] == "paper" and set(p["weights"].values()) <= {1, 1.0}, i
    said = [str(sorted((k, v) for k, v in p.items() if k not in ("name", "minutes"))) for _, p in runs]
    assert len(set(said)) == len(said), "two runs of scale paper are the same run"
    assert {k for _, p in runs for k in p.get("kd", "").split("+")} >= {
        "soft_label",
        "regression",
        "voken",
        "nst",
        "crd",
    } and {p["features"] for _, p in runs} == {"video", "clip", "image"}


def test_what_differs_at_paper_leaves_other_keys_alone(tmp_path):
    import re
    import shutil

    nbs = Path(next(iter(load_plan().values()))["file"]).parent
    shutil.copytree(nbs, tmp_path / "e")
    f = tmp_path / "e/plan.toml"
    text = f.read_text()
    f.write_text(re.sub(r"(?m)^at = .*\n", "", text))
    assert "\nat = " in text
    with_at, without = ({n: x.key for n, x in graph(["m5"], "smoke", 1, p).items()} for p in (None, f))
    assert with_at == without


def test_dry_run_without_any_data(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "VLKD_DATA"} | dict(VLKD_RUNS=str(tmp_path))
    r = subprocess.run(
        [
            sys.executable,
            "-c",
            "from vlkd.tools.cli import main; main()",
            "reproduce",
            "m1",
            "m4",
            "--scale",
            "paper",
            "--dry-run",
        ],
        capture_output=True,
        text=True,
        env=env,
    )
    assert r.returncode == 0, r.stderr
    for s in (
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
        assert s in r.stdout, s
    assert r.stdout.count("howto100m is missing") == 1 and not list(tmp_path.rglob("*.json"))
    r = subprocess.run(
        [
            sys.executable,
            "-c",
            "from vlkd.tools.cli import main; main()",
            "reproduce",
            "m4",
            "--scale",
            "paper",
        ],
        capture_output=True,
        text=True,
        env=env,
    )
    assert r.returncode == 2 and "VLKD_DATA" in r.stderr


def test_costs_follow_the_plan(runs):
    from vlkd.tools.cost import gpu_hours, plan_cost

    df = plan_cost(runs).set_index("run")
    assert (
        set(df.index) == {i for i, p in runs if {"contrast", "kd"} & set(p)}
        and (df.EFLOPs > 0).all()
        and (df.batch == 256).all()
    )
    assert df.GPU_hours["base-nst-crd"] == pytest.approx(gpu_hours(1e18 * df.EFLOPs["base-nst-crd"])) and (
        df.model == "12L/768H"
    ).sum() == sum(p["size"] == "base" for _, p in runs)
    assert (
        df.EFLOPs["student-none"]
        < df.EFLOPs["student-text"]
        < df.EFLOPs["student-nst-nohead"]
        < df.EFLOPs["student-nst-micro"]
        < df.EFLOPs["student-nst-crd-micro"]
        and df.EFLOPs["teacher-image"] < df.EFLOPs["teacher-micro"]
    )
    assert df.steps["video-pt"] == 0 and df.steps["student-text"] == scale("paper").steps


def test_preflight_of_every_run(runs, tmp_path):
    from vlkd.tools.preflight import preflight

    got = preflight(
        tmp_path / "r", samples=200, steps=2, runs=runs, vokens=6, max_tokens=64, ft_tokens=64, max_frames=64
    )
    assert list(got) == [i for i, p in runs if {"contrast", "kd"} & set(p)]
    for i, p in runs:
        r = got[i]
        assert all(math.isfinite(v) for v in r.values()) and ("loss" in r) == (p["steps"] != 0), i
        if "voken" in p.get("kd", ""):
            assert 0 < r["clips used"] <= 6
    assert not (tmp_path / "r/runs/student-nst-micro/checkpoints").exists()


def test_captions_and_text_are_not_joined_in_memory(tmp_path):
    from vlkd.tools.preflight import preflight

    with pytest.raises(ValueError, match="should be text or captions"):
        preflight(tmp_path, samples=60, steps=1, runs=[("s", dict(kd="", corpus="text+captions"))])
