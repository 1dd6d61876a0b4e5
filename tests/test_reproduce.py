"The graph runner on notebooks that train nothing: what runs, what does not, what a crash leaves."

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from processes import gone, holder, tree, vlkd, wait_for
from toys import end, endless, params, plan, start, training

from vlkd.core.files import read_json
from vlkd.core.records import Run, run_folder
from vlkd.core.settings import settings_file
from vlkd.reproduce import keys
from vlkd.reproduce.keys import graph
from vlkd.reproduce.plan import load_plan
from vlkd.reproduce.run import last_words, longest_chains


def score(name, seed=1):
    return Run(run_folder(name, "smoke", seed)).metrics["score"]


def changed(toy, file, old, new) -> dict:
    "Why runs would be repeated if a file were changed."
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    reasons = toy.why()
    file.write_text(text)
    return reasons


# What runs, and why


def test_everything_runs_once(quick):
    toy = quick
    assert len(toy.why(seeds=2)) == 7 and set(toy.why(seeds=2).values()) == {"never run"}
    assert toy.run(seeds=2)["failed"] == {}
    runs = ["teacher@1", "teacher@2", "student@1", "student@2", "other@1", "other@2", "t1@1,2"]
    assert toy.ran() == sorted(runs)
    assert score("student", 2) == 2.5 and score("t1", "1-2") == 6
    receipt = read_json(run_folder("student", "smoke", 2) / "run.json")
    assert receipt["params"] == dict(lr=0.5, scale="smoke", seed=2, seeds="2")
    assert receipt["needs"] == {"teacher@2": read_json(run_folder("teacher", "smoke", 2) / "run.json")["key"]}
    assert receipt["seconds"] > 0 and "notebook.ipynb" in receipt["files"] and receipt["versions"]["python"]
    assert list((toy.d / "runs/smoke/.partial").iterdir()) == []
    assert toy.run(seeds=2)["done"] == [] and toy.ran() == []


def test_only_what_an_edit_reaches_runs_again(quick):
    toy = quick
    toy.run(seeds=2)
    toy.ran()
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
    assert toy.why(seeds=1) == {"t1@1": "never run"}  # another set of worlds, another table; runs are shared
    shutil.rmtree(run_folder("teacher", "smoke", 1))
    reasons = toy.why(seeds=2)
    assert reasons["teacher@1"] == "never run" and "student@1" not in reasons
    (run_folder("student", "smoke", 2) / "result.json").write_text("{}")
    assert toy.why(seeds=2)["student@2"] == "result.json is missing or was changed"


def test_after_orders_and_is_no_part_of_the_key(quick):
    toy = quick
    other = 'id = "other"\nnotebook = "other.ipynb"'
    wait = plan.replace(other, f'{other}\nafter = ["teacher"]')
    toy.nb("teacher", params, start, "time.sleep(.7); say(f'teacher@{seed}'); score = seed", end)
    toy.write(wait)
    assert toy.run(["teacher", "other"])["failed"] == {}
    assert toy.log.read_text().split() == ["teacher@1", "other@1"]
    toy.write(plan)
    assert toy.why(ids=["teacher", "other"]) == {}
    toy.edit("other", "score = seed", "score = seed + 1")
    toy.write(wait)
    assert toy.run(["other"])["done"] == ["other@1"]  # what is not asked for is not waited for
    for bad, message in (
        (wait.replace('after = ["teacher"]', 'after = ["teachr"]'), "teachr"),
        (wait.replace('id = "teacher"\n', 'id = "teacher"\nafter = ["other"]\n'), "circle"),
    ):
        toy.write(bad)
        with pytest.raises(ValueError, match=message):
            toy.run()


def test_a_dry_run_names_the_part_that_changed(quick, monkeypatch, tmp_path):
    toy = quick
    library = tmp_path / "lib" / "vlkd"
    shutil.copytree(keys.library_folder(), library, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(keys, "library_folder", lambda: library)
    toy.edit("t1", "import json", "import vlkd.plots as plots, json")
    toy.edit("other", "import json", "from vlkd.core.files import read_json\\nimport json")
    assert toy.run()["failed"] == {}
    plots, files = library / "plots.py", library / "core" / "files.py"
    assert changed(toy, plots, "\nimport ", "\nimport os\nimport ")["t1@1"] == "module vlkd.plots changed"
    assert changed(toy, plots, '"""Figures', '"""Other figures') == {}
    reasons = changed(toy, files, "def fingerprint", "def other():\n    pass\n\n\ndef fingerprint")
    assert reasons["other@1"] == "module vlkd.core.files changed" and len(reasons) == 2
    assert changed(toy, library / "__init__.py", "__version__", "_ = 1; __version__") == {}
    reasons = changed(toy, toy.plan, "lr = 0.5", "lr = 0.25")
    assert reasons == {"student@1": "parameter lr changed", "t1@1": "needs student@1, which changed"}
    reasons = changed(toy, settings_file(), "vokens = 50\n", "vokens = 51\n")
    assert reasons["teacher@1"] == "scale settings changed: vokens" and len(reasons) == 4
    reasons = changed(toy, settings_file(), "nst.sigma = 1.0", "nst.sigma = 2.0")
    assert reasons["teacher@1"] == "presets changed"
    assert toy.why() == {}


# What fails


def test_a_run_that_says_nothing_has_failed():
    "Success is what a run says, {}; silence is none, even where its pipe is closed."
    reader, writer = multiprocessing.Pipe(duplex=False)
    writer.send({})
    assert last_words(reader) == {}
    writer.close()
    assert last_words(reader) is None


def test_failure_stops_only_what_needs_it(toy, capfd):
    toy.edit("student", "score = lr", "assert lr < .1, 'much too large'\\nscore = lr")
    outcome = toy.run()
    assert sorted(outcome["done"]) == ["other@1", "teacher@1"]
    assert list(outcome["failed"]) == ["student@1"] and outcome["skipped"] == {"t1@1": "needs student@1"}
    says = r"student.ipynb, cell 4: AssertionError: much too large; executed notebook: (.*)"
    executed = re.fullmatch(says, outcome["failed"]["student@1"])[1]
    with open(executed) as file:
        assert "AssertionError" in file.read()
    assert "student@1 FAILED" in capfd.readouterr().out and not run_folder("student", "smoke", 1).exists()
    assert toy.why() == {"student@1": "failed before", "t1@1": "never run"}
    toy.ran()
    toy.edit("student", "assert lr < .1, 'much too large'\\n", "")
    assert toy.run()["failed"] == {} and toy.ran() == ["student@1", "t1@1"]
    assert list((toy.d / "runs/smoke/.partial").iterdir()) == []  # the attempt of another key is gone


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("score = seed", "os.kill(os.getpid(), 9)", "teacher.ipynb, cell 4: DeadKernelError"),
        (
            "score = seed",
            "raise OSError(28, 'No space left', str(o))",
            "cell 4: OSError: [Errno 28] No space left",
        ),
        ("score = seed", "open(o/'clips.csv')", "cell 4: FileNotFoundError: [Errno 2] No such file"),
        (end.replace('"', '\\"'), "pass", "no result.json"),
    ],
)
@pytest.mark.parametrize("mode", ["toy", "forked"])
def test_the_text_of_a_failure_is_the_error(request, mode, old, new, message):
    toy = request.getfixturevalue(mode)
    toy.edit("teacher", old, new)
    assert message in toy.run(["teacher", "other"], jobs=1)["failed"]["teacher@1"]


# Kills


@pytest.mark.parametrize("mode", ["toy", "forked"])
@pytest.mark.parametrize("victim", ["runner", "run"])
def test_kill_and_resume(request, mode, victim):
    toy = request.getfixturevalue(mode)
    toy.nb("teacher", params, start, training, end)
    process = toy.runner("t1", jobs=1)
    wait_for(lambda: toy.has_steps("teacher@1", 5))
    below = tree(process)[1:]
    (process if victim == "runner" else holder(toy, "teacher@1")).kill()
    out = process.communicate(timeout=120)[0]
    assert victim == "runner" or "teacher@1 FAILED: teacher.ipynb: its process ended with code -9" in out
    wait_for(lambda: gone(below), 10)  # nothing is left behind that writes
    steps = toy.has_steps("teacher@1", 5)
    assert steps and not run_folder("teacher", "smoke", 1).exists()
    assert list(toy.why(ids=["teacher"])) == ["teacher@1"]
    assert toy.run(["teacher"])["done"] == ["teacher@1"]
    first, again = (int(line.split(":")[1]) for line in sorted(toy.log.read_text().split()) if ":" in line)
    assert min(first, again) == 0 and max(first, again) >= 5 and toy.partial("teacher@1") is None


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_runner_stops_its_runs(toy, how):
    toy.nb("teacher", params, start, endless, end)
    process = toy.runner("teacher")
    wait_for(lambda: toy.has_steps("teacher@1"))
    below = tree(process)[1:]
    process.send_signal(how)
    process.communicate(timeout=30)
    assert process.returncode != 0 and below
    wait_for(lambda: gone(below), 3)


def test_a_fork_server_that_is_killed_is_started_again(forked):
    toy = forked
    toy.nb("teacher", params, start, training, end)
    process = toy.runner("t1", jobs=1)
    wait_for(lambda: toy.has_steps("teacher@1", 3))
    next(p for p in tree(process) if "multiprocessing.forkserver" in " ".join(p.cmdline())).kill()
    out = process.communicate(timeout=120)[0]
    assert "teacher@1 FAILED" in out and "other@1 done" in out, out


def test_a_forked_kernel_has_what_the_fork_server_has_imported(forked):
    forked.edit("teacher", "score = seed", "import sys; score = int('papermill' in sys.modules)")
    assert forked.run(["teacher", "other"], jobs=1)["failed"] == {} and score("teacher") == 1


def test_a_forked_kernel_ends_with_its_run_before_it_has_a_command():
    code = "import time; from vlkd.reproduce.run import fork_kernel; print(fork_kernel().pid, flush=True); "
    process = subprocess.Popen([sys.executable, "-c", code + "time.sleep(60)"], stdout=subprocess.PIPE)
    kernel = psutil.Process(int(process.stdout.readline()))
    assert kernel.ppid() == process.pid
    process.kill()
    process.communicate()
    wait_for(lambda: gone([kernel]), 5)


def test_two_runners_compute_each_run_once(toy):
    toy.edit("teacher", "score = seed", "time.sleep(1); score = seed")
    runners = [toy.runner("t1"), toy.runner("t1")]
    outs = [runner.communicate(timeout=180)[0] for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0], outs
    assert toy.ran() == ["other@1", "student@1", "t1@1", "teacher@1"]
    assert any("another process" in out for out in outs)


def test_a_complete_partial_folder_is_only_renamed(quick):
    toy = quick
    toy.run(["other"])
    toy.ran()
    node = graph(["other"], "smoke", 1, toy.plan)["other@1"]
    os.rename(node.folder, node.partial)  # as if killed just before the renaming
    assert toy.run(["other"])["done"] == ["other@1"] and toy.ran() == [] and node.folder.is_dir()


def test_nothing_listens_to_other_machines(forked):
    "A whole process tree, with fork server, runs and kernels."
    toy = forked
    toy.nb("teacher", params, start, endless, end)
    process = toy.runner("t1", jobs=1)
    try:
        wait_for(lambda: toy.has_steps("teacher@1"))
        sockets = [c for p in tree(process) for c in p.net_connections("inet") if c.status == "LISTEN"]
        assert sockets and {c.laddr.ip for c in sockets} <= {"127.0.0.1", "::1"}
    finally:
        process.terminate()
        process.communicate(timeout=30)


# Wrong plans


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("lr = 0.5", "lrr = 0.5", "student.ipynb has no parameter 'lrr'; did you mean 'lr'"),
        ("lr = 0.5", "lr = '1'", "should be float"),
        ("lr = 0.5", "seed = 1", "runner passes seed"),
        ('needs = ["teacher"]', 'needs = ["tacher"]', "did you mean 'teacher'"),
        ('needs = ["teacher"]', 'needs = ["student"]', "circle: student -> student"),
        ('needs = ["teacher"]', 'needs = ["t1"]', "only tables may need tables"),
        ('needs = ["teacher"]', 'data = ["../../etc"]', "inside the data folder"),
        ('needs = ["teacher"]', 'data = ["/etc"]', "inside the data folder"),
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
def test_a_wrong_plan_is_refused_before_anything_starts(toy, old, new, message):
    assert old in plan
    toy.write(plan.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        toy.run()
    assert str(toy.plan) in str(e.value) and toy.ran() == [] and not (toy.d / "runs").exists()


@pytest.mark.parametrize(
    "cell, message",
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
def test_a_wrong_parameters_cell_is_refused(toy, cell, message):
    toy.nb("other", cell)
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        toy.run()
    assert "other.ipynb" in str(e.value)
    toy.plan.with_name("other.ipynb").write_text("{}")
    with pytest.raises(ValueError, match="not a notebook"):
        toy.run()


def test_scales_and_ids(toy):
    toy.write(plan.replace('id = "other"', 'id = "other"\nscales = ["micro"]'))
    assert "other@1" not in graph(scale="smoke", plan=toy.plan)
    assert "other@1" in graph(scale="micro", plan=toy.plan)
    for ids, options, message in [
        (["other"], dict(scale="smoke"), "does not exist at scale smoke"),
        (None, dict(scale="micor"), "did you mean 'micro'"),
        (None, dict(scale="micro", seeds="x"), "write a number of worlds"),
    ]:
        with pytest.raises(ValueError, match=message):
            graph(ids, plan=toy.plan, **options)
    toy.write(plan.replace('id = "teacher"', 'id = "teacher"\nscales = ["micro"]'))
    with pytest.raises(ValueError, match="student needs teacher, which does not exist at scale smoke"):
        graph(scale="smoke", plan=toy.plan)


def test_data_names_and_sizes_are_part_of_the_key(toy, tmp_path, monkeypatch):
    for name in ("a/x", "b/y"):
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_text("1")
    monkeypatch.setenv("VLKD_DATA", str(tmp_path / "data"))
    toy.write(plan.replace('id = "other"', 'id = "other"\ndata = ["b"]'))

    def real_keys():
        keys.data_key.cache_clear()
        return {name: node.key for name, node in graph(scale="real", plan=toy.plan).items()}

    before = real_keys()
    assert before == real_keys()
    (tmp_path / "data" / "a" / "x").write_text("22")
    after = real_keys()
    assert {name for name in before if after[name] != before[name]} == {"teacher@1", "student@1", "t1@1"}
    monkeypatch.delenv("VLKD_DATA")
    with pytest.raises(FileNotFoundError, match="VLKD_DATA"):
        graph(scale="real", plan=toy.plan)
    assert graph(scale="smoke", plan=toy.plan)


# The command


def test_command_line(toy):
    done = vlkd("reproduce", "--scale", "smoke", "--jobs", "8")
    assert done.returncode == 0 and "index.html" in done.stdout, done.stdout + done.stderr
    assert "4 to do, 8 at a time" in done.stdout
    cores = len(os.sched_getaffinity(0))
    assert cores >= 8 or f"8 at a time share {cores} core" in done.stdout
    began = time.time()
    again = vlkd("reproduce", "--scale", "smoke")
    assert again.returncode == 0 and "all fresh" in again.stdout and time.time() - began < 5
    dry = vlkd("reproduce", "t1", "student", "--scale", "smoke", "--dry-run", "--seeds", "1,2")
    assert "student@2: would run: never run" in dry.stdout and "student@1: fresh" in dry.stdout
    assert dry.returncode == 0
    toy.edit("other", "score = seed", "1/0")
    failed = vlkd("reproduce", "--scale", "smoke")
    assert failed.returncode == 1 and "other.ipynb, cell 4: ZeroDivisionError" in failed.stdout


@pytest.mark.parametrize(
    "args, message",
    [
        (("reproduce", "t3"), "unknown run or table 't3'"),
        (("reproduce", "--scale", "smok"), "did you mean 'smoke'"),
        (("reproduce", "--jobs", "0", "--scale", "smoke"), "jobs should be"),
        (("reproduce", "--sead", "1"), "--sead"),
        (("report", "--scale", "micro", "--publish"), "nothing to publish"),
    ],
)
def test_a_wrong_command_is_one_line(toy, args, message):
    wrong = vlkd(*args)
    assert wrong.returncode == 2 and message in wrong.stderr and "Traceback" not in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1


def test_nothing_heavy_is_imported():
    heavy = ("torch", "papermill", "nbformat", "nbconvert", "pandas", "matplotlib", "distributed", "rich")
    code = "import sys, vlkd.tools.cli, vlkd.reproduce.run; "
    code += f"print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert set(re.findall(r"'(\w+)'", done.stdout)) <= {"rich"}  # typer's


def test_order(toy):
    nodes = graph(scale="smoke", seeds=1, plan=toy.plan)
    seconds = dict(zip(nodes, (5.0, 10.0, 2.0, 1.0), strict=True))
    assert list(nodes) == ["teacher@1", "student@1", "other@1", "t1@1"]
    assert list(longest_chains(nodes, seconds).values())[::-1] == [16.0, 11.0, 3.0, 1.0]
    some = {name: seconds[name] for name in ("student@1", "t1@1")}
    assert longest_chains(nodes, some) == {"student@1": 11.0, "t1@1": 1.0}


# The plan of the experiments


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("[family.members]", "[family.member]", "has members"),
        ("lr = 0.25", "lrr = 0.25", "no parameter 'lrr'; did you mean 'lr'"),
        ("lr = 0.25", 'teacher = "x"', "no parameter 'teacher'"),
        ('scales = "small"', 'scales = "smal"', "unknown list of scales 'smal'; did you mean 'small'"),
        ('small = ["smoke"]', 'small = ["smok"]', "did you mean 'smoke'"),
        ('notebook = "student.ipynb"', "", "notebook is missing"),
        ("s1 =", "teacher =", "two entries have the id teacher"),
    ],
)
def test_a_wrong_family_is_refused(toy, old, new, message):
    family = """
[scales]
small = ["smoke"]
[[family]]
notebook = "student.ipynb"
scales = "small"
params = { lr = 0.5 }
[family.members]
s1 = { title = "one" }
s2 = { lr = 0.25 }
"""
    toy.write(family + plan)
    entries = load_plan(toy.plan)
    assert entries["s1"]["params"] == dict(lr=0.5) and entries["s2"]["params"] == dict(lr=0.25)
    assert old in family
    toy.write(family.replace(old, new) + plan)
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        load_plan(toy.plan)
    assert str(toy.plan) in str(e.value)


def test_needs_and_names_follow_from_parameters(toy):
    toy.nb("student", params + 'teacher: str = ""\nname: str = ""', "pass")
    toy.write(plan.replace('lr = 0.5 }\nneeds = ["teacher"]', 'teacher = "teacher" }'))
    student = load_plan(toy.plan)["student"]
    assert student["needs"] == ["teacher"] and student["params"] == dict(teacher="teacher", name="student")
