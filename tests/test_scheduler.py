"""Runs on a Dask cluster: the same records, also when a worker is killed; what is refused, and what is left when the runner goes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("distributed", reason="needs Dask: the extra `cluster`")
import psutil
from test_reproduce import Toy, end, gone, params, start, toy, vlkd, wait_for

import vlkd.reproduce.keys as K
import vlkd.reproduce.run as R
from vlkd.core.files import read_json
from vlkd.core.records import run_folder
from vlkd.reproduce.keys import library_code
from vlkd.reproduce.scheduler import Cluster

ROOT = Path(__file__).resolve().parent.parent
# A training whose result depends on each step and not on where it was interrupted; it says where it starts.
training = """p = o/'checkpoint'; n, x = json.loads(p.read_text()) if p.exists() else (0, 1.0); say(f'{o.name[:9]}:{n}')
while n < 40:
    n += 1; x = x*1.01 + seed; time.sleep(.1); q = o/'checkpoint.new'; q.write_text(json.dumps((n, x))); q.replace(p); (o/'progress.json').write_text(json.dumps(dict(step=n, steps=40)))
p.unlink(); score = x"""


def tree(ps):
    return [q for p in ps for q in [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)]]


class Dask:
    "A scheduler and workers in processes of their own, as the pages tell to start them."

    def __init__(self, d: Path):
        self.d, self.procs = d, []

    def run(self, *a, **env):
        p = subprocess.Popen(
            [sys.executable, "-m", "dask", *map(str, a)],
            stdout=open(self.d / f"dask{len(self.procs)}.log", "w"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT": "3", **env},
            cwd=self.d,
            start_new_session=True,
        )
        self.procs.append(p)
        return p

    def scheduler(self):
        f = self.d / "scheduler.json"
        self.boss = self.run(
            "scheduler", "--scheduler-file", f, "--host", "127.0.0.1", "--port", "0", "--no-dashboard"
        )
        wait_for(f.is_file, 60)
        self.file = str(f)
        self.address = read_json(f)["address"]
        return self

    def worker(self, *more, **env):
        return self.run(
            "worker",
            self.address,
            "--nthreads",
            "1",
            "--resources",
            "vlkd=1",
            "--no-dashboard",
            "--local-directory",
            self.d / "scratch",
            *more,
            **env,
        )

    def close(self):
        for p in self.procs:
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)
                p.wait()


@pytest.fixture
def dask(tmp_path):
    d = Dask(tmp_path)
    try:
        yield d.scheduler()
    finally:
        d.close()


def records(toy):
    "What a graph has left, but for times and the executed notebooks, which hold some."
    out = {}
    for f in sorted((toy.d / "runs/smoke").glob("*/run.json")):
        r = read_json(f)
        files = r.pop("files")
        files["notebook.ipynb"] = 0
        [r.pop(k) for k in ("seconds", "started")]
        out[f.parent.name] = (r, files, (f.parent / "result.json").read_bytes())
    return out


def test_a_killed_worker_and_the_same_records(toy, dask, capfd):
    for n in ("teacher", "other"):
        toy.nb(n, params, start, training, end)
    assert toy.run(jobs=2)["failed"] == {}
    alone = records(toy)
    assert len(alone) == 4
    shutil.rmtree(toy.d / "runs")
    toy.ran()
    workers = [dask.worker(), dask.worker()]
    killed = []

    def kill():
        part = lambda: next((toy.d / "runs/smoke/.partial").glob("teacher@1-*"), None)
        wait_for(
            lambda: (
                (p := part())
                and (p / "checkpoint").exists()
                and json.loads((p / "checkpoint").read_text())[0] >= 8
            ),
            90,
        )
        pid = read_json(part() / "attempt.json")["pid"]
        killed.append(psutil.Process(pid))
        killed.extend(killed[0].children(recursive=True))
        killed[0].kill()

    t = threading.Thread(target=kill)
    t.start()
    r = toy.run(cluster=Cluster(dask.file))
    t.join()
    out = capfd.readouterr().out
    assert r["failed"] == {} and sorted(r["done"]) == ["other@1", "student@1", "t1@1", "teacher@1"], out
    log = toy.ran()
    first = [int(x.split(":")[1]) for x in log if x.startswith("teacher@1")]
    assert len(first) == 2 and first[0] == 0 and first[1] >= 8, log  # it went on from its checkpoint
    assert len(killed) > 2 and gone(killed) and "teacher@1: its worker on" in out
    assert (
        records(toy) == alone
        and list((toy.d / "runs/smoke/.partial").iterdir()) == []
        and not list((toy.d / "runs/smoke/.cluster").iterdir())
    )
    assert toy.why() == {}


# A worker's own process for a notebook that executes cells in plain Python: for what does not depend on kernels.
plain = """
import json, sys, threading
from vlkd.reproduce.run import _watch
job = json.loads(sys.stdin.read()); nb = json.load(open(job["notebook"])); g = {}
threading.Thread(target=_watch, args=(job["parent"],), daemon=True).start()
for c in nb["cells"]:
    if c["cell_type"] == "code": exec(c["source"], g)
    if "parameters" in c["metadata"].get("tags", []): g.update(job["parameters"])
json.dump(nb, open(job["output"], "w"))
"""


@pytest.fixture
def quick(toy):
    (toy.d / "plain.py").write_text(
        f"import sys, vlkd.reproduce.run as R\nR._worker_command = [sys.executable, '-c', {plain!r}]\n"
    )
    toy.preload = ("--preload", str(toy.d / "plain.py"))
    return toy


def refused(toy, dask, says, error=ValueError, **kw):
    with pytest.raises(error, match=says) as e:
        toy.run(["other"], cluster=Cluster(dask.address, **kw))
    assert (
        toy.ran() == []
        and not list((toy.d / "runs/smoke/.cluster").glob("*"))
        and not run_folder("other", "smoke", 1).exists()
    )
    return str(e.value)


def test_a_worker_with_other_code_is_refused(toy, dask, tmp_path):
    lib = tmp_path / "lib" / "vlkd"
    shutil.copytree(K.library_folder(), lib, ignore=shutil.ignore_patterns("__pycache__"))
    f = lib / "plots.py"
    s = f.read_text()
    assert "palette = [" in s
    f.write_text(s.replace("palette = [", "palette = ['#123456', "))
    assert library_code(lib) != library_code()
    dask.worker(PYTHONPATH=str(lib.parent))
    said = refused(
        toy, dask, r"worker tcp://\S+ on \S+ has another vlkd: vlkd.plots differs from the client's"
    )
    f.write_text("# a comment\n" + s)
    assert library_code(lib) == library_code() and toy.run(["other"], cluster=Cluster(dask.address))[
        "done"
    ] == ["other@1"], said  # comments are no other code


def test_a_worker_without_slot_is_refused(toy, dask):
    dask.run("worker", dask.address, "--nthreads", "1", "--no-dashboard")
    assert "--resources vlkd=1" in refused(toy, dask, "offers no slot")


def test_a_runs_folder_that_is_not_shared_is_refused(toy, dask):
    runs = toy.d / "runs"
    runs.mkdir()
    if (
        not shutil.which("unshare")
        or subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(runs)], capture_output=True
        ).returncode
    ):
        pytest.skip("no mount namespaces here, so all processes share all folders")
    p = subprocess.Popen(
        [
            "unshare",
            "-rm",
            "sh",
            "-c",
            f"mount -t tmpfs none '{runs}' && exec '{sys.executable}' -m dask worker {dask.address} --nthreads 1 --resources vlkd=1 --no-dashboard",
        ],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    dask.procs.append(p)
    said = refused(toy, dask, r"worker tcp://\S+ on \S+ does not see what this machine writes")
    assert str(runs / "smoke") in said and "shared" in said


def test_no_workers_and_no_scheduler(toy, dask):
    assert "--resources vlkd=1" in refused(toy, dask, "has no workers after 1 s", ConnectionError, patience=1)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        free = s.getsockname()[1]
    deaf = socket.socket()
    deaf.bind(("127.0.0.1", 0))
    deaf.listen()  # takes connections and says nothing
    for where, says in [
        (f"tcp://127.0.0.1:{free}", "no scheduler answers at tcp://127.0.0.1"),
        ("tcp://nowhere.invalid:8786", "no scheduler answers"),
        ("localhost", "local:N"),
        ("local:0", "local:N"),
        ("tcp://localhost", "a host and a port"),
        (f"tcp://127.0.0.1:{deaf.getsockname()[1]}", "is no Dask scheduler"),
    ]:
        with pytest.raises((ValueError, OSError), match=says):
            toy.run(["other"], cluster=Cluster(where))
    deaf.close()
    r = vlkd("reproduce", "other", "--scale", "smoke", "--scheduler", f"tcp://127.0.0.1:{free}", timeout=60)
    assert (
        r.returncode == 2 and len(r.stderr.strip().splitlines()) == 1 and "no scheduler answers" in r.stderr
    ), r
    assert (
        vlkd(
            "reproduce", "other", "--scale", "smoke", "--dry-run", "--scheduler", f"tcp://127.0.0.1:{free}"
        ).returncode
        == 0
    )  # needs none
    r = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.modules['distributed'] = None; from vlkd.tools.cli import main; main()",
            "reproduce",
            "other",
            "--scale",
            "smoke",
            "--scheduler",
            "local:1",
        ],
        capture_output=True,
        text=True,
    )
    assert r.returncode == 2 and "vlkd[cluster]" in r.stderr and len(r.stderr.strip().splitlines()) == 1, r
    assert toy.ran() == []


def test_workers_that_come_later(quick, dask, tmp_path, capfd):
    toy = quick
    toy.nb(
        "teacher",
        params,
        start,
        "while not (Path(o).parents[2]/'go').exists(): (o/'checkpoint').touch(); time.sleep(.1)\nscore = 1",
        end,
    )
    c = Cluster(dask.address)
    seen = []
    lib = tmp_path / "lib" / "vlkd"
    shutil.copytree(K.library_folder(), lib, ignore=shutil.ignore_patterns("__pycache__"))
    (lib / "plots.py").write_text("x = 1\n")
    dask.worker(*toy.preload)

    def more():
        try:
            wait_for(lambda: list((toy.d / "runs/smoke/.partial").glob("teacher@1-*/checkpoint")), 90)
            assert not run_folder("other", "smoke", 1).exists()
            dask.worker(PYTHONPATH=str(lib.parent))
            dask.worker(*toy.preload)
            wait_for(lambda: c.refused and run_folder("other", "smoke", 1).exists(), 90)
            seen.append(c.slots)
        finally:
            (toy.d / "runs/go").touch()

    t = threading.Thread(target=more)
    t.start()
    r = toy.run(["teacher", "other"], cluster=c)
    t.join()
    out = capfd.readouterr().out
    assert (
        r["failed"] == {}
        and r["done"] == ["other@1", "teacher@1"]
        and seen == [2]
        and len(re.findall("not used: worker .* has another vlkd: vlkd.plots differs", out)) == 1
    ), out  # one slot at first, and teacher had it


@pytest.mark.parametrize("how", ["ctrl-c", "kill"])
def test_the_runner_goes_and_nothing_is_left(toy, how):
    toy.nb("teacher", params, start, training.replace("40", "600"), end)
    p = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from vlkd.tools.cli import main; main()",
            "reproduce",
            "teacher",
            "--scale",
            "smoke",
            "--scheduler",
            "local:2",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    part = lambda: next((toy.d / "runs/smoke/.partial").glob("teacher@1-*"), None)
    wait_for(lambda: p.poll() is not None or (part() and (part() / "checkpoint").exists()), 120)
    left = tree([p])
    assert len(left) >= 5 and p.poll() is None, p.communicate()[0]
    os.killpg(p.pid, signal.SIGINT) if how == "ctrl-c" else p.kill()
    out = p.communicate(timeout=60)[0]
    wait_for(lambda: gone(left), 1 if how == "ctrl-c" else 15)
    if how == "ctrl-c":
        assert p.returncode == 130 and "Traceback" not in out and "Error" not in out, out
    n = json.loads((part() / "checkpoint").read_text())[0]
    assert toy.why(ids=["teacher"]) == {"teacher@1": "was interrupted, goes on"}
    time.sleep(0.5)
    assert json.loads((part() / "checkpoint").read_text())[0] == n


def test_the_end_of_a_local_cluster_spares_other_processes(toy):
    other = subprocess.Popen(["sleep", "300"])  # of a notebook's user, say
    try:
        assert toy.run(["other"], cluster=Cluster("local:1"))["done"] == ["other@1"] and other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_runner_that_is_killed_leaves_its_remote_runs_to_nobody(quick, dask):
    toy = quick
    toy.nb("teacher", params, start, training.replace("40", "600"), end)
    w = dask.worker(*toy.preload)
    p = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from vlkd.tools.cli import main; main()",
            "reproduce",
            "teacher",
            "--scale",
            "smoke",
            "--scheduler",
            dask.file,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    part = lambda: next((toy.d / "runs/smoke/.partial").glob("teacher@1-*"), None)
    wait_for(lambda: part() and (part() / "checkpoint").exists(), 90)
    run = psutil.Process(read_json(part() / "attempt.json")["pid"]).children()
    assert len(run) == 1 and R._held(toy.d / "runs/smoke/.locks/teacher@1.run")
    p.kill()
    p.wait()
    n = R.graph(["teacher"], "smoke", 1, toy.plan)["teacher@1"]
    lock = R._Job.acquire(n)
    assert lock is None or gone(run)  # while it writes nobody else may
    if lock is not None:
        os.close(lock)
    wait_for(lambda: gone(run), 15)
    assert w.poll() is None and not R._held(toy.d / "runs/smoke/.locks/teacher@1.run")
    os.close(R._Job.acquire(n))


def test_a_scheduler_that_goes_ends_the_run_and_the_trainings(quick, dask):
    toy = quick
    toy.nb("teacher", params, start, training.replace("40", "600"), end)
    dask.worker(*toy.preload)
    left = []

    def stop():
        wait_for(lambda: list((toy.d / "runs/smoke/.partial").glob("teacher@1-*/checkpoint")), 90)
        a = next((toy.d / "runs/smoke/.partial").glob("teacher@1-*/attempt.json"))
        left.extend(psutil.Process(read_json(a)["pid"]).children())
        dask.boss.kill()

    t = threading.Thread(target=stop)
    t.start()
    with pytest.raises(ConnectionError, match="does not answer any more.*the same command goes on"):
        toy.run(["teacher"], cluster=Cluster(dask.address))
    t.join()
    assert left
    wait_for(lambda: gone(left), 30)


def test_a_failure_is_named(toy, dask):
    toy.edit("student", "score = lr", "assert lr < .1, 'much too large'\\nscore = lr")
    dask.worker()
    r = toy.run(["student"], cluster=Cluster(dask.address))
    assert (
        r["done"] == ["teacher@1"]
        and "student.ipynb, cell 4: AssertionError: much too large" in r["failed"]["student@1"]
    )


def dask_command(words):
    "A usage error where an option is none of `dask scheduler` or `dask worker`."
    from distributed.cli import dask_scheduler, dask_worker

    c = dict(scheduler=dask_scheduler.main, worker=dask_worker.main)[words[0]]
    c.make_context(words[0], list(words[1:]))


def vlkd_command(words):
    from typer.main import get_command

    from vlkd.tools.cli import app

    c = get_command(app)
    while words and hasattr(c, "commands"):
        assert words[0] in c.commands, words
        c = c.commands[words[0]]
        words = words[1:]
    c.make_context(c.name, list(words))


def python_command(words):
    from vlkd.train.distributed import parser

    assert words[:2] == ["-m", "vlkd.train.distributed"]
    parser().parse_args(words[2:])


def torchrun_command(words):
    from torch.distributed.run import parse_args

    a = parse_args(words)
    assert a.module
    python_command(["-m", a.training_script, *a.training_script_args])


def check(words):
    dict(dask=dask_command, vlkd=vlkd_command, python=python_command, torchrun=torchrun_command)[
        Path(words[0]).name
    ](words[1:])


def test_kubernetes_recipe():
    import yaml

    docs = list(yaml.safe_load_all((ROOT / "recipes/kubernetes.yaml").read_text()))
    kinds = [d["kind"] for d in docs]
    assert sorted(kinds) == ["Deployment", "Deployment", "Job", "PersistentVolumeClaim", "Service"]
    pods = {
        d["metadata"]["name"]: d["spec"]["template"]["spec"]
        for d in docs
        if d["kind"] in ("Deployment", "Job")
    }
    service = docs[kinds.index("Service")]
    claims = {d["metadata"]["name"] for d in docs if d["kind"] == "PersistentVolumeClaim"}
    for p in pods.values():
        (c,) = p["containers"]
        check(c["command"])
        volumes = {v["name"]: v for v in p.get("volumes", [])}
        assert all(m["name"] in volumes for m in c.get("volumeMounts", [])) and all(
            v["persistentVolumeClaim"]["claimName"] in claims
            for v in volumes.values()
            if "persistentVolumeClaim" in v
        )
    address = f"tcp://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    (worker,), (runner,), (boss,) = (
        pods[k]["containers"] for k in ("vlkd-worker", "vlkd-reproduce", "vlkd-scheduler")
    )
    assert (
        address in worker["command"]
        and address in runner["command"]
        and "8786" in boss["command"]
        and "vlkd=1" in worker["command"]
        and worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    )
    mount = lambda c: next(m["mountPath"] for m in c["volumeMounts"] if m["name"] == "vlkd")
    assert mount(worker) == mount(runner) and all(e["value"].startswith(mount(runner)) for e in runner["env"])
    labels = {
        d["metadata"]["name"]: (
            d["spec"]["selector"]["matchLabels"],
            d["spec"]["template"]["metadata"]["labels"],
        )
        for d in docs
        if d["kind"] == "Deployment"
    }
    assert (
        all(a == b for a, b in labels.values()) and service["spec"]["selector"] == labels["vlkd-scheduler"][1]
    )
    with pytest.raises(Exception, match="(?i)no such option"):
        check(["vlkd", "reproduce", "--schedular", "x"])
    with pytest.raises(Exception, match="(?i)no such option|unexpected extra argument"):
        check(["dask", "worker", "--slots", "1"])


def test_commands_of_the_page():
    import shlex

    text = "\n".join(
        "".join(c["source"])
        for c in json.loads((ROOT / "nbs/scale.ipynb").read_text())["cells"]
        if c["cell_type"] == "markdown"
    )
    said = [
        l.split("#")[0].strip()
        for b in re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M)
        for l in b.replace("\\\n", "").splitlines()
    ] + [l for l in re.findall(r"`((?:vlkd|dask) [^`]+)`", text)]
    assert len(said) > 6
    for l in said:
        words = [w for w in shlex.split(l) if not re.match(r"[A-Z_]+=", w)]
        if words[:2] not in (["dask", "scheduler"],) or len(words) > 2:
            check(words)
    assert {f.name for f in (ROOT / "recipes").iterdir()} == set(re.findall(r"recipes/([\w.]+)\]", text))


def test_slurm_recipe(toy, tmp_path):
    "The script itself, where `srun` starts two tasks on this machine."
    f = ROOT / "recipes" / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(f)]).returncode == 0
    for l in f.read_text().splitlines():
        if m := re.search(r'"\$bin/(dask|vlkd)" (.*)', l):
            check(
                [m[1], *(w for w in m[2].replace('"$@"', "all").replace('"$file"', "x").split() if w != "&")]
            )
    b = tmp_path / "bin"
    b.mkdir()
    for name, text in dict(
        dask=f'#!/bin/sh\nexec "{sys.executable}" -m dask "$@"\n',
        vlkd=f'#!/bin/sh\nexec "{sys.executable}" -c "from vlkd.tools.cli import main; main()" "$@"\n',
        srun='#!/bin/sh\nshift\n"$@" & "$@" & wait\n',
    ).items():
        (b / name).write_text(text)
        (b / name).chmod(0o755)
    p = subprocess.Popen(
        ["bash", str(f), "other", "--scale", "smoke", "--seeds", "2"],
        env=os.environ
        | dict(
            PATH=f"{b}:{os.environ['PATH']}",
            VLKD_BIN=str(b),
            SLURM_SUBMIT_DIR=str(tmp_path),
            SLURM_JOB_ID="7",
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    left = []
    try:
        wait_for(lambda: run_folder("other", "smoke", 2).exists() or p.poll() is not None, 240)
        left = tree([p]) if p.poll() is None else []
        out = p.communicate(timeout=90)[0]
    finally:
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)
    assert p.returncode == 0 and toy.ran() == ["other@1", "other@2"] and "2 done" in out, out
    wait_for(lambda: gone(left), 20)
    assert not list((toy.d / "runs").glob("scheduler-*"))


def test_other_code_than_the_key_says(toy):
    import vlkd.reproduce.scheduler as S

    n = R.graph(["other"], "smoke", 1, toy.plan)["other@1"]
    job = dict(notebook=str(n.entry["file"]), code=n.parts["code"], modules=n.parts["modules"])
    assert S._other_code(job, 0) == ""
    toy.edit("other", "score = seed", "score  =  seed # one")
    assert S._other_code(job, 0) == ""
    toy.edit("other", "score  =  seed", "score = seed + 1")
    assert S._other_code(job, 0).startswith("another ") and "other.ipynb" in S._other_code(job, 0)
    assert (
        S._other_code(job | dict(modules={"vlkd.core.files": "x"}), 0).startswith("another ")
        and S._other_code(job | dict(notebook="gone.ipynb"), 0) == "no gone.ipynb"
    )
