"Notebooks of table pages run on simulated records, and show what a page should show, in its order."

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vlkd.core.records import Run, record
from vlkd.eval.page import count_verdicts, is_provisional, primary_claims, verdict_chip
from vlkd.reproduce.plan import load_plan

PAGES = ("controls", "printed", "hinge")
KINDS = {
    "piqa": ("video-only", "static", "stated", "never filmed"),
    "zero_shot": ("video-only", "stated"),
    "probe": ("video-only", "never filmed"),
    "tracie": ("video-only", "language"),
    "diagnostics": ("language", "video-only"),
}
TASKS = ("sst2", "qnli", "qqp", "mnli", "squad1", "squad2", "swag", *KINDS)
CATEGORIES = ("lexical semantics", "logic", "knowledge", "predicate-argument structure")


def questions(run, world):
    "Some questions of each task, with answers of which about two thirds are right."
    rows = []
    for task in TASKS:
        kinds = KINDS.get(task, ("language",))
        rows += [(task, f"q{i}", f"n{i % 6}", kinds[i % len(kinds)], CATEGORIES[i % 4]) for i in range(24)]
    df = pd.DataFrame(rows, columns=["task", "id", "group", "kind", "category"])
    draw = np.random.default_rng(len(run) + world)
    df = df.assign(run=run, seed=world, label=1, prediction=(draw.random(len(df)) < 0.66).astype(int))
    return df.assign(right=df.prediction == 1)


def finish(folder, run, world):
    names = dict(dynamic=("break", "float"), static=("roll",))
    probe = [
        dict(type=t, attribute=a, kind="filmed", accuracy=0.6, majority=0.4) for t in names for a in names[t]
    ]
    recall = pd.DataFrame([{"R@1": 2.0, "R@10": 20.0, "median_rank": 9.0, "pool": 60}])
    history = [dict(step=s, mlm=5.0 - s, contrast=1.0, eval_loss=5.0 - s) for s in (1, 2)]
    examples = None if run.startswith("teacher") else questions(run, world)
    tables = dict(probe=pd.DataFrame(probe), retrieval=recall)
    record(folder, {}, tables=tables, examples=examples, history=history)


def run_page(id, folder, worlds=(1, 2), without=()):
    "Run a page's notebook on simulated records; what it showed as Markdown, and its record."
    from IPython.core.displaypub import CapturingDisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell

    entry, inputs = load_plan()[id], {}
    for run in [*entry["needs"], "rule"]:
        for world in worlds:
            name = f"{run}@{world}"
            if run not in without:
                finish(folder / name, run, world)
                inputs[name] = str(folder / name)
    given = dict(
        scale="smoke", seeds=",".join(map(str, worlds)), inputs=json.dumps(inputs), out=str(folder / "out")
    )
    shell = InteractiveShell.instance()
    kept, shell.display_pub = shell.display_pub, CapturingDisplayPublisher()
    try:
        scope = {}
        for cell in json.loads(Path(entry["file"]).read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), scope)
            if "parameters" in cell["metadata"].get("tags", []):
                scope |= given
        shown = shell.display_pub.outputs
    finally:
        shell.display_pub = kept
    texts = [o["data"].get("text/markdown") or f"![{o['metadata'].get('alt')}]" for o in shown]
    return "\n\n".join(texts), Run(folder / "out").result


@pytest.mark.parametrize("id", PAGES)
def test_a_page_runs_and_reads_in_order(id, tmp_path):
    page, result = run_page(id, tmp_path)
    parts = ["**Answer.**", "![", "<summary>Settings</summary>"]
    if id not in ("printed", "hinge"):
        parts[1:2] = [
            "beside ours" if id != "controls" else "## Gains",
            "![",
            "## Claims",
            "## Kinds of questions",
        ]
        assert page.index("content-free rule") < page.index(
            "| text only |" if id != "m2" else "| formal text |"
        )
    places = [page.index(part) for part in parts]
    assert places == sorted(places)
    assert page.count("<details>") == page.count("</details>") > 0
    assert "![None]" not in page and set(result["captions"]) == {
        Path(f).stem for f in result["files"] if f.startswith("figures/")
    }
    assert "too few for a verdict" in page or id == "hinge"
    assert "micro default" not in page and "micro" not in result["headline"]


CLAIM = dict(id="c", text="x", verdict="holds", primary=True, diff=2.0, low=1.0, high=3.0, n_worlds=5)


def test_provisional_verdicts_are_grey_and_not_counted():
    one = CLAIM | dict(n_worlds=1)
    assert is_provisional(one) and not is_provisional(CLAIM)
    assert (verdict_chip(one), verdict_chip(CLAIM)) == ("provisional: holds", "✓ holds")
    assert count_verdicts([one, one, CLAIM]) == "1 holds, 2 provisional"
    assert "count as none" in primary_claims([one]) and "count as none" not in primary_claims([CLAIM])
    assert primary_claims([CLAIM] * 8).count("✓ holds") == 6
