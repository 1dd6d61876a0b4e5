"A small graph of notebooks that train nothing, for tests of the runner."

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import plain
import pytest

from vlkd.core.settings import path, settings_file
from vlkd.reproduce import run as runs

params = """scale: str = "smoke" # section
seed: int = 0 # world
seeds: str = "" # worlds
out: str = "" # folder
inputs: str = "" # runs read
"""
start = """import json, os, time
from pathlib import Path
o = Path(out)
def say(x):
    with open(os.environ['TOY_LOG'], 'a') as f: f.write(x + '\\n')
"""
end = "(o/'result.json').write_text(json.dumps(dict(metrics=dict(score=score), files={}, headline='done')))"
add_up = """records = [json.loads((Path(d)/'result.json').read_text()) for d in json.loads(inputs).values()]
score = lr + sum(r['metrics']['score'] for r in records)"""
plan = """
[[run]]
id = "teacher"
notebook = "teacher.ipynb"
[[run]]
id = "student"
notebook = "student.ipynb"
params = { lr = 0.5 }
needs = ["teacher"]
[[run]]
id = "other"
notebook = "other.ipynb"
[[table]]
id = "t1"
notebook = "t1.ipynb"
title = "Scores"
paper = "Toy, Table 1"
claim = "Scores add up."
needs = ["teacher", "student", "other"]
main = true
"""
# a training whose result depends on each step and not on where it was interrupted
training = """p = o/'checkpoint'
n, x = json.loads(p.read_text()) if p.exists() else (0, 1.0)
say(f'{o.name.split("-")[0]}:{n}')
while n < 60:
    n += 1; x = x*1.01 + seed; time.sleep(.1)
    q = o/'checkpoint.new'; q.write_text(json.dumps((n, x))); q.replace(p)
    (o/'progress.json').write_text(json.dumps(dict(step=n, steps=60)))
p.unlink(); score = x"""
endless = training.replace("60", "6000")


def cell(i: int, source: str, kind="code", **metadata) -> dict:
    "A cell of a notebook."
    outputs = dict(outputs=[], execution_count=None) if kind == "code" else {}
    return dict(cell_type=kind, id=f"c{i}", metadata=metadata, source=source, **outputs)


class Toy:
    "A plan with its notebooks in a folder of its own."

    def __init__(self, folder: Path):
        self.d, self.plan, self.log = folder, folder / "experiments" / "toy" / "plan.toml", folder / "log"
        self.setup = ""  # code that a runner in a process of its own begins with
        for name in ("teacher", "other"):
            self.nb(name, params, start, f"say(f'{name}@{{seed}}'); score = seed", end)
        self.nb(
            "student", params + "lr: float = 0.1 # step", start, f"say(f'student@{{seed}}')\n{add_up}", end
        )
        self.nb("t1", params, start, "say('t1@' + seeds); score = len(json.loads(inputs))", end)
        self.write(plan)

    def nb(self, name: str, parameters: str, *code: str, prose="Says nothing."):
        "Write a notebook."
        cells = [
            cell(0, f"# {name}\n\n> {prose}", kind="markdown"),
            cell(1, parameters, tags=["parameters"]),
            *(cell(i + 2, source) for i, source in enumerate(code)),
        ]
        kernel = dict(name="python3", display_name="python3", language="python")
        notebook = dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
        file = self.plan.parent / f"{name}.ipynb"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(notebook))

    def edit(self, name: str, old: str, new: str):
        "Change the text of a notebook."
        file = self.plan.parent / f"{name}.ipynb"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    def write(self, text: str):
        "Write the plan."
        self.plan.write_text(text)

    def run(self, ids=None, **options) -> dict:
        return runs.reproduce(ids, scale="smoke", plan=self.plan, **options)

    def why(self, **options) -> dict:
        return self.run(dry_run=True, **options)["would_run"]

    def ran(self) -> list[str]:
        "Names of what has run since the last call."
        names = self.log.read_text().split() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return sorted(names)

    def runner(self, *ids, jobs=2, **environment) -> subprocess.Popen:
        "A runner in a process of its own."
        call = f"reproduce({list(ids)!r}, scale='smoke', jobs={jobs}, plan={str(self.plan)!r})"
        code = (
            f"import sys\nfrom vlkd.reproduce import run\n{self.setup}\nsys.exit(bool(run.{call}['failed']))"
        )
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | environment,
        )

    def partial(self, name: str) -> Path | None:
        "The folder of a run that is being computed."
        return next((self.d / "runs/smoke/.partial").glob(f"{name}-*"), None)

    def has_steps(self, name: str, steps=1) -> bool:
        "Whether a training has got so far."
        file = (self.partial(name) or self.d) / "checkpoint"
        return file.exists() and json.loads(file.read_text())[0] >= steps


@pytest.fixture
def toy(tmp_path, monkeypatch):
    for name, value in dict(VLKD_RUNS="runs", VLKD_REPORTS="reports", VLKD_NBS=".", TOY_LOG="log").items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setenv("VLKD_FORK", "0")  # loading torch would be most of a toy's time
    monkeypatch.setenv("VLKD_CARDS", str(path("cards")))
    monkeypatch.setenv("VLKD_SETTINGS", str(shutil.copy(settings_file(), tmp_path)))
    return Toy(tmp_path)


use_plain = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import plain
from vlkd.reproduce import run
run.execute = plain.execute
"""


@pytest.fixture
def quick(toy, monkeypatch):
    "The toy graph with cells executed in plain Python: for what does not depend on kernels."
    monkeypatch.setattr(runs, "execute", plain.execute)
    toy.setup = use_plain
    return toy


@pytest.fixture
def forked(toy, monkeypatch):
    "The toy graph with runs that are forked, from a process that has imported little."
    monkeypatch.setenv("VLKD_FORK", "1")
    monkeypatch.setattr(runs, "preloaded", ["papermill"])
    toy.setup = "run.preloaded = ['papermill']"
    return toy
