"""The graph runner on torch-free toy notebooks: what runs, what does not, and what a crash leaves."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vlkd.reproduce.keys as K
import vlkd.reproduce.run as R
from vlkd.core.files import read_json
from vlkd.core.records import Run, run_folder
from vlkd.core.settings import path, settings_file

params = 'scale: str = "smoke" # section\nseed: int = 0 # world\nseeds: str = "" # worlds\nout: str = "" # folder\ninputs: str = "" # runs read\n'
start = "import json, os, time\nfrom pathlib import Path\no = Path(out)\ndef say(x):\n    with open(os.environ['TOY_LOG'], 'a') as f: f.write(x + '\\n')\n"
end = "(o/'result.json').write_text(json.dumps(dict(metrics=dict(score=score), files={}, headline=f'score {score}')))"
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


class Toy:
    "A plan with its notebooks in a folder of its own."

    def __init__(self, d: Path):
        self.d, self.plan, self.log = d, d / "experiments" / "plan.toml", d / "log"
        for n in ("teacher", "other"):
            self.nb(n, params, start, f"say(f'{n}@{{seed}}'); score = seed", end)
        self.nb(
            "student",
            params + "lr: float = 0.1 # step",
            start,
            "say(f'student@{seed}')\nscore = lr + sum(json.loads((Path(d)/'result.json').read_text())['metrics']['score'] for d in json.loads(inputs).values())",
            end,
        )
        self.nb("t1", params, start, "say('t1@' + seeds); score = len(json.loads(inputs))", end)
        self.write(plan)

    def nb(self, name, parameters, *code, prose="Says nothing."):
        def cell(i, kind, s, **meta):
            return dict(
                cell_type=kind,
                id=f"c{i}",
                metadata=meta,
                source=s,
                **(dict(outputs=[], execution_count=None) if kind == "code" else {}),
            )

        cells = [
            cell(0, "markdown", f"# {name}\n\n> {prose}"),
            cell(1, "code", parameters, tags=["parameters"]),
            *(cell(i + 2, "code", c) for i, c in enumerate(code)),
        ]
        f = self.plan.parent / f"{name}.ipynb"
        f.parent.mkdir(exist_ok=True)
        f.write_text(
            json.dumps(
                dict(
                    cells=cells,
                    metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")),
                    nbformat=4,
                    nbformat_minor=5,
                )
            )
        )

    def edit(self, name, old, new):
        f = self.plan.parent / f"{name}.ipynb"
        s = f.read_text()
        assert old in s
        f.write_text(s.replace(old, new))

    def write(self, text):
        self.plan.write_text(text)

    def run(self, ids=None, **kw):
        return R.reproduce(ids, scale="smoke", plan=self.plan, **kw)

    def why(self, **kw):
        return self.run(dry_run=True, **kw)["would_run"]

    def ran(self) -> list[str]:
        "Names of what has run since the last call."
        out = self.log.read_text().split() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return sorted(out)

    def runner(self, *ids, jobs=2) -> subprocess.Popen:
        "A runner in a process of its own."
        code = f"import sys, vlkd.reproduce.run as R; sys.exit(bool(R.reproduce({list(ids)!r}, scale='smoke', jobs={jobs}, plan={str(self.plan)!r})['failed']))"
        return subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


@pytest.fixture
def toy(tmp_path, monkeypatch):
    for k, v in dict(VLKD_RUNS="runs", VLKD_REPORTS="reports", VLKD_NBS=".", TOY_LOG="log").items():
        monkeypatch.setenv(k, str(tmp_path / v))
    monkeypatch.setenv("VLKD_CARDS", str(path("cards")))
    monkeypatch.setenv("VLKD_NURSERY", "0")  # loading torch would be most of a toy's time
    monkeypatch.setenv("VLKD_SETTINGS", str(shutil.copy(settings_file(), tmp_path)))
    return Toy(tmp_path)


plain = """
import contextlib, io, json, sys
job = json.loads(sys.stdin.read()); nb = json.load(open(job["notebook"])); g = {}
for c in nb["cells"]:
    if c["cell_type"] == "code": exec(c["source"], g)
    if "parameters" in c["metadata"].get("tags", []): g.update(job["parameters"])
json.dump(nb, open(job["output"], "w"))
"""


@pytest.fixture
def quick(toy, monkeypatch):
    "The toy plan with a worker that executes cells in plain Python: for what does not depend on kernels."
    monkeypatch.setattr(R, "_worker_command", [sys.executable, "-c", plain])
    return toy


def wait_for(f, seconds=40):
    end = time.time() + seconds
    while time.time() < end:
        if f():
            return
        time.sleep(0.1)
    raise AssertionError(f"nothing came in {seconds} s")


def gone(tree):
    return not any(q.is_running() and q.status() != "zombie" for q in tree)


def test_once_then_fresh_and_only_what_an_edit_reaches(quick):
    toy = quick
    assert len(toy.why(seeds=2)) == 7 and set(toy.why(seeds=2).values()) == {"never run"}
    r = toy.run(seeds=2)
    assert r["failed"] == {} and toy.ran() == sorted(
        ["teacher@1", "teacher@2", "student@1", "student@2", "other@1", "other@2", "t1@1,2"]
    )
    assert (
        Run(run_folder("student", "smoke", 2)).metrics["score"] == 2.5
        and Run(run_folder("t1", "smoke", "1-2")).metrics["score"] == 6
    )
    receipt = read_json(run_folder("student", "smoke", 2) / "run.json")
    assert receipt["params"] == dict(lr=0.5, scale="smoke", seed=2, seeds="2") and receipt["needs"] == {
        "teacher@2": read_json(run_folder("teacher", "smoke", 2) / "run.json")["key"]
    }
    assert receipt["seconds"] > 0 and "notebook.ipynb" in receipt["files"] and receipt["versions"]["python"]
    assert list((toy.d / "runs/smoke/.partial").iterdir()) == []

    assert toy.run(seeds=2)["done"] == [] and toy.ran() == []
    toy.edit("teacher", "Says nothing.", "Says more.")
    toy.edit("student", "# step", "# the step size")
    toy.edit("other", "score = seed", "score  =  seed # one")
    assert toy.why(seeds=2) == {}
    toy.edit("other", "score  =  seed", "score = seed + 1")
    assert toy.why(seeds=2) == {
        "other@1": "code of other.ipynb changed",
        "other@2": "code of other.ipynb changed",
        "t1@1-2": "needs other@1, other@2, which changed",
    }
    assert toy.run(seeds=2)["failed"] == {} and toy.ran() == sorted(["other@1", "other@2", "t1@1,2"])
    assert toy.why(seeds=1) == {
        "t1@1": "never run"
    }  # another set of worlds, another table; its runs are shared

    toy.edit("other", "seed + 1", "seed + 2")
    before = Run(run_folder("other", "smoke", 1)).metrics["score"]
    shutil.rmtree(run_folder("teacher", "smoke", 1))
    assert toy.why(seeds=2)["teacher@1"] == "never run" and "student@1" not in toy.why(seeds=2)
    (run_folder("student", "smoke", 2) / "result.json").write_text("{}")
    assert toy.why(seeds=2)["student@2"] == "result.json is missing or was changed" and before == 2


def test_after_orders_and_is_no_part_of_the_key(quick):
    toy = quick
    wait = plan.replace(
        'id = "other"\nnotebook = "other.ipynb"',
        'id = "other"\nnotebook = "other.ipynb"\nafter = ["teacher"]',
    )
    assert wait != plan
    toy.nb("teacher", params, start, "time.sleep(.7); say(f'teacher@{seed}'); score = seed", end)
    toy.write(wait)
    assert toy.run(["teacher", "other"])["failed"] == {} and toy.log.read_text().split() == [
        "teacher@1",
        "other@1",
    ]
    toy.write(plan)
    assert toy.why(ids=["teacher", "other"]) == {}
    toy.edit("other", "score = seed", "score = seed + 1")
    toy.write(wait)
    toy.ran()
    assert toy.run(["other"])["done"] == ["other@1"]  # what is not asked for is not waited for
    for bad, says in (
        (wait.replace('after = ["teacher"]', 'after = ["teachr"]'), "teachr"),
        (wait.replace('id = "teacher"\n', 'id = "teacher"\nafter = ["other"]\n'), "circle"),
    ):
        toy.write(bad)
        with pytest.raises(ValueError, match=says):
            toy.run()


def test_dry_run_says_which_part_changed(quick, monkeypatch, tmp_path):
    toy = quick
    lib = tmp_path / "lib" / "vlkd"
    shutil.copytree(K.library_folder(), lib, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(K, "library_folder", lambda: lib)
    toy.edit("t1", "import json", "import vlkd.plots as plots, json")
    toy.edit("other", "import json", "from vlkd.core.files import read_json\\nimport json")
    assert toy.run()["failed"] == {}

    def changed(f, old, new):
        s = f.read_text()
        assert old in s
        f.write_text(s.replace(old, new))
        w = toy.why()
        f.write_text(s)
        return w

    assert changed(lib / "plots.py", "palette = [", "palette = ['#123456', ") == {
        "t1@1": "module vlkd.plots changed"
    }
    assert changed(lib / "plots.py", '"""Figures and tables', '"""Tables and figures') == {}
    assert changed(lib / "core.py", "h = hashlib.sha256()", "h = hashlib.sha512()") == {
        "other@1": "module vlkd.core.files changed",
        "t1@1": "needs other@1, which changed",
    }
    assert changed(lib / "__init__.py", "__version__", "_ = 1; __version__") == {}
    w = changed(toy.plan, "lr = 0.5", "lr = 0.25")
    assert w == {"student@1": "parameter lr changed", "t1@1": "needs student@1, which changed"}
    w = changed(settings_file(), "vokens = 50\n", "vokens = 51\n")
    assert w["teacher@1"] == "scale settings changed: vokens" and len(w) == 4
    w = changed(settings_file(), "nst.sigma = 1.0", "nst.sigma = 2.0")
    assert w["teacher@1"] == "presets changed"
    assert toy.why() == {}


def test_failure_stops_only_what_needs_it(toy, capfd):
    toy.edit("student", "score = lr", "assert lr < .1, 'much too large'\\nscore = lr")
    r = toy.run()
    assert (
        sorted(r["done"]) == ["other@1", "teacher@1"]
        and list(r["failed"]) == ["student@1"]
        and r["skipped"] == {"t1@1": "needs student@1"}
    )
    m = re.fullmatch(
        r"student.ipynb, cell 4: AssertionError: much too large; executed notebook: (.*)",
        r["failed"]["student@1"],
    )
    assert Path(m[1]).is_file() and "AssertionError" in Path(m[1]).read_text()
    assert not run_folder("student", "smoke", 1).exists() and "student@1 FAILED" in capfd.readouterr().out
    toy.ran()
    toy.edit("student", "assert lr < .1, 'much too large'\\n", "")
    assert toy.run()["failed"] == {} and toy.ran() == ["student@1", "t1@1"]
    assert (
        list((toy.d / "runs/smoke/.partial").iterdir()) == []
    )  # the failed attempt, of another key, is gone


def test_dead_kernel_and_missing_record_are_failures(toy):
    toy.edit("teacher", "score = seed", "os.kill(os.getpid(), 9)")
    toy.edit("other", end.replace('"', '\\"'), "pass")
    r = toy.run(["teacher", "other"])
    assert sorted(r["failed"]) == ["other@1", "teacher@1"]
    assert (
        "cell 4: DeadKernelError" in r["failed"]["teacher@1"] and "no result.json" in r["failed"]["other@1"]
    )


slow = """p = o/'checkpoint'; n = int(p.read_text()) if p.exists() else 0; first = n; say(f'starts at {n}'.replace(' ', '_'))
while n < 60:
    n += 1; time.sleep(.15); p.write_text(str(n)); (o/'progress.json').write_text(json.dumps(dict(step=n, steps=60, what='toy')))
score = first"""


@pytest.mark.parametrize("victims", ["runner", "runner and worker"])
def test_kill_and_resume(toy, victims):
    toy.nb("teacher", params, start, slow, end)
    p = toy.runner("teacher")
    part = lambda: [d for d in (toy.d / "runs/smoke/.partial").glob("teacher@1-*")]
    wait_for(
        lambda: (
            part()
            and (part()[0] / "checkpoint").exists()
            and int((part()[0] / "checkpoint").read_text() or 0) >= 5
        )
    )
    import psutil

    tree = psutil.Process(p.pid).children(recursive=True)
    for q in (
        [psutil.Process(p.pid), *psutil.Process(p.pid).children()]
        if "worker" in victims
        else [psutil.Process(p.pid)]
    ):
        q.kill()
    p.wait()
    wait_for(lambda: gone(tree), 10)  # nothing is left behind that writes
    assert not run_folder("teacher", "smoke", 1).exists()
    assert toy.why(ids=["teacher"]) == {"teacher@1": "was interrupted, goes on"}
    assert toy.run(["teacher"])["done"] == ["teacher@1"]
    log = toy.ran()
    assert (
        len(log) == 2
        and log[0] == "starts_at_0"
        and Run(run_folder("teacher", "smoke", 1)).metrics["score"] >= 5
    )
    assert part() == []


def test_sigterm_stops_workers(toy):
    toy.nb("teacher", params, start, slow, end)
    p = toy.runner("teacher")
    wait_for(lambda: list((toy.d / "runs/smoke/.partial").glob("*/checkpoint")))
    import psutil

    tree = psutil.Process(p.pid).children(recursive=True)
    p.send_signal(signal.SIGTERM)
    p.communicate(timeout=20)
    assert p.returncode != 0
    wait_for(lambda: gone(tree), 3)


def is_nursery(q):
    import psutil

    try:
        return "_nursery" in " ".join(q.cmdline())
    except psutil.Error:
        return False  # it has ended, or is about to


def nursery(toy, monkeypatch, name="teacher"):
    "A runner whose workers are forked, at the moment when `name` has begun to write."
    monkeypatch.setenv("VLKD_NURSERY", "1")
    toy.nb(name, params, start, slow, end)
    p = toy.runner("t1")
    import psutil

    wait_for(lambda: list((toy.d / "runs/smoke/.partial").glob(f"{name}*/checkpoint")), 90)
    return p, psutil.Process(p.pid).children(recursive=True)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_forked_workers_end_with_the_runner(toy, monkeypatch):
    p, tree = nursery(toy, monkeypatch)
    assert any(map(is_nursery, tree)) and len(tree) >= 3
    p.kill()
    p.communicate(timeout=20)
    wait_for(lambda: gone(tree), 2.5)  # the notebook alone would go on for longer
    assert not run_folder("teacher", "smoke", 1).exists()
    toy.nb("teacher", params, start, "say(f'teacher@{seed}'); score = seed", end)
    toy.ran()
    r = toy.run()
    assert r["failed"] == {} and set(toy.ran()) >= {"teacher@1", "student@1", "t1@1"}


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_without_its_nursery_a_runner_fails_what_ran_and_starts_interpreters(toy, monkeypatch):
    p, tree = nursery(toy, monkeypatch, "other")
    next(filter(is_nursery, tree)).kill()
    out = p.communicate(timeout=120)[0]
    assert "other@1 FAILED" in out and p.returncode == 1
    wait_for(lambda: gone(tree), 10)


def test_two_runners_compute_each_run_once(toy):
    toy.edit("teacher", "score = seed", "time.sleep(1); score = seed")
    ps = [toy.runner("t1"), toy.runner("t1")]
    outs = [p.communicate(timeout=120)[0] for p in ps]
    assert [p.returncode for p in ps] == [0, 0], outs
    assert toy.ran() == ["other@1", "student@1", "t1@1", "teacher@1"] and any(
        "another process" in o for o in outs
    )


def test_a_complete_partial_folder_is_only_renamed(quick):
    toy = quick
    toy.run(["other"])
    toy.ran()
    n = R.graph(["other"], "smoke", 1, toy.plan)["other@1"]
    os.rename(n.folder, n.partial)  # as if killed just before the renaming
    assert toy.run(["other"])["done"] == ["other@1"] and toy.ran() == [] and n.folder.is_dir()


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("lr = 0.5", "lrr = 0.5", "student.ipynb has no parameter 'lrr'; did you mean 'lr'"),
        ("lr = 0.5", "lr = '1'", "should be float"),
        ("lr = 0.5", "seed = 1", "runner passes seed"),
        ('needs = ["teacher"]', 'needs = ["tacher"]', "did you mean 'teacher'"),
        ('needs = ["teacher"]', 'needs = ["student"]', "circle: student -> student"),
        ('needs = ["teacher"]', 'needs = ["t1"]', "only tables may need tables"),
        ('id = "other"', 'id = "teacher"', "two entries have the id teacher"),
        ('"other.ipynb"', '"another.ipynb"', "no notebook another.ipynb"),
        ("main = true", "man = true", "did you mean 'main'"),
        ("main = true", "main = 1", "wrong type"),
        ('title = "Scores"', "", "title is missing"),
        ("[[run]]", "[[runs]]", "[[run]] and [[table]]"),
        ('id = "other"', 'id = "a@b"', "letters, digits"),
        ("main = true", 'main = true\nscales = ["mcro"]', "did you mean 'micro'"),
        ("main = true", "main = ", "not valid TOML"),
    ],
)
def test_a_wrong_plan_is_refused_before_anything_starts(toy, old, new, says):
    assert old in plan
    toy.write(plan.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(says)) as e:
        toy.run()
    assert str(toy.plan) in str(e.value) and toy.ran() == [] and not (toy.d / "runs").exists()


@pytest.mark.parametrize(
    "cell, says",
    [
        ("seed = 1", "should read"),
        ("seed: int = 'a'", "is no int"),
        ("seed: int = 1 + 1j", "is no int"),
        ("seed: int = max(1, 2)", "should be a literal"),
        ("seed: Path = 1", "type should be"),
        ("seed: int = (", "does not parse"),
        ("lr: float = 1.", "declares no parameter out"),
        ('out: str = ""\nseed: str = ""', "declare seed as int"),
    ],
)
def test_a_wrong_parameters_cell_is_refused(toy, cell, says):
    toy.nb("other", cell)
    with pytest.raises(ValueError, match=re.escape(says)) as e:
        toy.run()
    assert "other.ipynb" in str(e.value)
    toy.plan.with_name("other.ipynb").write_text("{}")
    with pytest.raises(ValueError, match="not a notebook"):
        toy.run()


def test_scales_and_ids(toy):
    toy.write(plan.replace('id = "other"', 'id = "other"\nscales = ["micro"]'))
    assert "other@1" not in R.graph(scale="smoke", plan=toy.plan) and "other@1" in R.graph(
        scale="micro", plan=toy.plan
    )
    with pytest.raises(ValueError, match="does not exist at scale smoke"):
        R.graph(["other"], scale="smoke", plan=toy.plan)
    with pytest.raises(ValueError, match="did you mean 'micro'"):
        R.graph(scale="micor", plan=toy.plan)
    with pytest.raises(ValueError, match="write a number of worlds"):
        R.graph(scale="micro", seeds="x", plan=toy.plan)
    toy.write(plan.replace('id = "teacher"', 'id = "teacher"\nscales = ["micro"]'))
    with pytest.raises(ValueError, match="student needs teacher, which does not exist at scale smoke"):
        R.graph(scale="smoke", plan=toy.plan)


def test_data_names_and_sizes_are_part_of_the_key(toy, tmp_path, monkeypatch):
    d = tmp_path / "data"
    (d / "a").mkdir(parents=True)
    (d / "b").mkdir()
    (d / "a" / "x").write_text("1")
    (d / "b" / "y").write_text("1")
    monkeypatch.setenv("VLKD_DATA", str(d))
    toy.write(plan.replace('id = "other"', 'id = "other"\ndata = ["b"]'))

    def keys():
        K.data_key.cache_clear()
        return {n: x.key for n, x in R.graph(scale="real", plan=toy.plan).items()}

    k = keys()
    assert k == keys()
    (d / "a" / "x").write_text("22")
    assert {n for n in k if keys()[n] != k[n]} == {"teacher@1", "student@1", "t1@1"}
    monkeypatch.delenv("VLKD_DATA")
    with pytest.raises(FileNotFoundError, match="VLKD_DATA"):
        R.graph(scale="real", plan=toy.plan)
    assert R.graph(scale="smoke", plan=toy.plan)


def vlkd(*args, **kw):
    return subprocess.run(
        [sys.executable, "-c", "from vlkd.tools.cli import main; main()", *args],
        capture_output=True,
        text=True,
        **kw,
    )


def test_command_line(toy):
    r = vlkd("reproduce", "--scale", "smoke")
    assert r.returncode == 0 and "index.html" in r.stdout, r.stdout + r.stderr
    began = time.time()
    r = vlkd("reproduce", "--scale", "smoke")
    assert r.returncode == 0 and "all fresh" in r.stdout and time.time() - began < 5
    r = vlkd("reproduce", "t1", "student", "--scale", "smoke", "--dry-run", "--seeds", "1,2")
    assert (
        r.returncode == 0 and "student@2: would run: never run" in r.stdout and "student@1: fresh" in r.stdout
    )
    for args, says in [
        (("reproduce", "t3"), "unknown run or table 't3'"),
        (("reproduce", "--scale", "smok"), "did you mean 'smoke'"),
        (("reproduce", "--jobs", "0", "--scale", "smoke"), "jobs should be"),
        (("reproduce", "--sead", "1"), "--sead"),
        (("report", "--scale", "micro", "--publish"), "nothing to publish"),
    ]:
        r = vlkd(*args)
        assert (
            r.returncode == 2
            and says in r.stderr
            and len(r.stderr.strip().splitlines()) == 1
            and "Traceback" not in r.stderr
        ), (args, r)
    assert vlkd("report", "--scale", "smoke", "--publish").returncode == 0 and vlkd(
        "report", "--check"
    ).stdout.endswith("records: smoke\n")
    r = vlkd("data", "status")
    assert r.returncode == 0 and "tabletop" in r.stdout
    toy.edit("other", "score = seed", "1/0")
    r = vlkd("reproduce", "--scale", "smoke")
    assert r.returncode == 1 and "other.ipynb, cell 4: ZeroDivisionError" in r.stdout


def test_nothing_heavy_is_imported():
    code = "import sys, vlkd.tools.cli, vlkd.reproduce.run; print([m for m in ('torch', 'papermill', 'nbformat', 'nbconvert', 'pandas', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_order_and_remaining_time(toy):
    g = R.graph(scale="smoke", seeds=1, plan=toy.plan)
    s = dict(zip(g, (5.0, 10.0, 2.0, 1.0)))
    assert list(g) == ["teacher@1", "student@1", "other@1", "t1@1"]
    assert R._chains(g, s) == {"teacher@1": 16.0, "student@1": 11.0, "other@1": 3.0, "t1@1": 1.0}
    assert R._chains(g, {k: s[k] for k in ("student@1", "t1@1")}) == {"student@1": 11.0, "t1@1": 1.0}
