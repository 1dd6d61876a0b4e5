"Runs on a Dask cluster: the same records, also when a worker is killed; what is refused, and what is left."

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from processes import gone, holder, tree, vlkd, wait_for
from toys import end, endless, params, start, training, use_plain

from vlkd.core.files import read_json
from vlkd.core.records import run_folder
from vlkd.reproduce.cluster import Cluster
from vlkd.reproduce.keys import graph, library_code, library_folder
from vlkd.reproduce.run import acquire, is_locked, other_code

ROOT = Path(__file__).resolve().parent.parent


def is_whole(file) -> bool:
    "Whether Dask has written its file to the end: it is there before."
    try:
        return "address" in read_json(file)
    except (OSError, ValueError):
        return False


class Dask:
    "A scheduler and workers in processes of their own, as the pages tell to start them."

    def __init__(self, folder: Path):
        self.d, self.processes = folder, []

    def start(self, *args, **environment) -> subprocess.Popen:
        command = [sys.executable, "-m", "dask", *map(str, args), "--dashboard-address", "127.0.0.1:0"]
        with open(self.d / f"dask{len(self.processes)}.log", "w") as log:
            process = subprocess.Popen(
                [*command, "--no-dashboard"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                cwd=self.d,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def scheduler(self):
        file = self.d / "scheduler.json"
        args = ("--scheduler-file", file, "--host", "127.0.0.1", "--port", "0")
        self.boss = self.start("scheduler", *args)
        wait_for(lambda: is_whole(file))
        self.file = str(file)
        self.address = read_json(file)["address"]
        return self

    def worker(self, *more, slots=True, **environment) -> subprocess.Popen:
        args = ("--nthreads", "1", "--local-directory", self.d / "scratch", "--host", "127.0.0.1", *more)
        resources = ("--resources", "vlkd=1") if slots else ()
        return self.start("worker", self.address, *args, *resources, **environment)

    def close(self):
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def dask(tmp_path):
    cluster = Dask(tmp_path)
    try:
        yield cluster.scheduler()
    finally:
        cluster.close()


@pytest.fixture
def preload(tmp_path) -> tuple:
    "Options of a worker whose runs execute cells in plain Python: for what does not depend on kernels."
    file = tmp_path / "use_plain.py"
    file.write_text(use_plain)
    return ("--preload", file)


@pytest.fixture
def other_library(tmp_path) -> Path:
    "A library in which a module differs."
    library = tmp_path / "lib" / "vlkd"
    shutil.copytree(library_folder(), library, ignore=shutil.ignore_patterns("__pycache__"))
    with open(library / "plots.py", "a") as file:
        file.write("another = 1\n")
    return library


def records(toy) -> dict:
    "What a graph has left, but for times and the executed notebooks, which hold some."
    found = {}
    for file in sorted((toy.d / "runs/smoke").glob("*/run.json")):
        receipt = read_json(file)
        receipt["files"]["notebook.ipynb"] = receipt["seconds"] = receipt["started"] = 0
        found[file.parent.name] = (receipt, (file.parent / "result.json").read_bytes())
    return found


def test_a_killed_worker_and_the_same_records(toy, dask, capfd):
    for name in ("teacher", "other"):
        toy.nb(name, params, start, training, end)
    assert toy.run(jobs=2)["failed"] == {}
    alone = records(toy)
    shutil.rmtree(toy.d / "runs")
    toy.ran()
    dask.worker()
    dask.worker()
    killed = []

    def kill():
        wait_for(lambda: toy.has_steps("teacher@1", 8), 90)
        worker = holder(toy, "teacher@1").parent()
        killed.extend(tree(worker))
        worker.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    outcome = toy.run(cluster=Cluster(dask.file))
    thread.join()
    out = capfd.readouterr().out
    assert outcome["failed"] == {} and len(outcome["done"]) == len(alone) == 4, out
    first, again = sorted(int(x.split(":")[1]) for x in toy.ran() if x.startswith("teacher@1"))
    assert first == 0 and again >= 8  # it went on from its checkpoint
    assert len(killed) > 2 and gone(killed) and "teacher@1: its worker on" in out
    assert records(toy) == alone and toy.why() == {}
    left = [*(toy.d / "runs/smoke/.partial").iterdir(), *(toy.d / "runs/smoke/.cluster").iterdir()]
    assert left == []


# Who is refused


def refused(toy, dask, message, error=ValueError, **options):
    with pytest.raises(error, match=message) as e:
        toy.run(["other"], cluster=Cluster(dask.address, **options))
    assert toy.ran() == [] and not list((toy.d / "runs/smoke/.cluster").glob("*"))
    return str(e.value)


def test_a_worker_with_other_code_is_refused(toy, dask, other_library):
    assert library_code(other_library) != library_code()
    dask.worker(PYTHONPATH=str(other_library.parent))
    refused(toy, dask, r"worker tcp://\S+ on \S+ has another vlkd: vlkd.plots differs from the client's")
    text = (library_folder() / "plots.py").read_text()
    (other_library / "plots.py").write_text("# a comment\n" + text)
    assert library_code(other_library) == library_code()
    assert toy.run(["other"], cluster=Cluster(dask.address))["done"] == ["other@1"]


def test_a_worker_without_slot_is_refused(toy, dask):
    dask.worker(slots=False)
    assert "--resources vlkd=1" in refused(toy, dask, "offers no slot")


def test_a_runs_folder_that_is_not_shared_is_refused(toy, dask):
    runs = toy.d / "runs"
    runs.mkdir()
    mount = f"mount -t tmpfs none {shlex.quote(str(runs))}"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "sh", "-c", mount]).returncode:
        pytest.skip("no mount namespaces here, so all processes share all folders")
    worker = f"{sys.executable} -m dask worker {dask.address} --nthreads 1 --resources vlkd=1"
    process = subprocess.Popen(
        ["unshare", "-rm", "sh", "-c", f"{mount} && exec {worker} --dashboard-address 127.0.0.1:0"],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    dask.processes.append(process)
    text = refused(toy, dask, r"worker tcp://\S+ on \S+ does not see what this machine writes")
    assert str(runs / "smoke") in text and "shared" in text


def test_no_workers(toy, dask):
    text = refused(toy, dask, "has no workers after 1 s", ConnectionError, patience=1)
    assert "--resources vlkd=1" in text


def test_no_scheduler(toy):
    with socket.socket() as free, socket.socket() as deaf:
        free.bind(("127.0.0.1", 0))
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()  # takes connections and is silent
        nobody = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        for where, message in [
            (nobody, "no scheduler answers at tcp://127.0.0.1"),
            ("tcp://nowhere.invalid:8786", "no scheduler answers"),
            ("localhost", "no such file"),
            ("local:4", "--jobs N"),
            ("tcp://localhost", "a host and a port"),
            (f"tcp://127.0.0.1:{deaf.getsockname()[1]}", "no scheduler answers"),
        ]:
            with pytest.raises((ValueError, OSError), match=message):
                toy.run(["other"], cluster=Cluster(where))
        command = ("reproduce", "other", "--scale", "smoke", "--scheduler", nobody)
        failed = vlkd(*command, timeout=60)
        assert failed.returncode == 2 and "no scheduler answers" in failed.stderr
        assert len(failed.stderr.strip().splitlines()) == 1
        assert vlkd(*command, "--dry-run").returncode == 0  # needs none
    assert toy.ran() == []


def test_workers_that_come_later(quick, dask, preload, other_library, capfd):
    toy = quick
    go = toy.d / "runs" / "go"
    wait = "while not (Path(o).parents[2]/'go').exists(): (o/'begun').touch(); time.sleep(.1)\nscore = 1"
    toy.nb("teacher", params, start, wait, end)
    cluster = Cluster(dask.address)
    slots = []
    dask.worker(*preload)

    def more():
        try:
            wait_for(lambda: (toy.partial("teacher@1") or toy.d).joinpath("begun").exists(), 90)
            assert not run_folder("other", "smoke", 1).exists()  # one slot, and teacher has it
            dask.worker(PYTHONPATH=str(other_library.parent))
            dask.worker(*preload)
            wait_for(lambda: cluster.refused and run_folder("other", "smoke", 1).exists(), 90)
            slots.append(cluster.slots)
        finally:
            go.touch()

    thread = threading.Thread(target=more)
    thread.start()
    outcome = toy.run(["teacher", "other"], cluster=cluster)
    thread.join()
    out = capfd.readouterr().out
    assert outcome["failed"] == {} and slots == [2], out
    assert sorted(outcome["done"]) == ["other@1", "teacher@1"]  # which of them ends first is open
    assert len(re.findall("not used: worker .* has another vlkd: vlkd.plots differs", out)) == 1


def test_other_code_than_the_key_has(toy):
    node = graph(["other"], "smoke", 1, toy.plan)["other@1"]
    assert other_code(node, 0) == ""
    toy.edit("other", "score = seed", "score  =  seed # one")
    assert other_code(node, 0) == ""
    toy.edit("other", "score  =  seed", "score = seed + 1")
    assert re.fullmatch("another .*other.ipynb", other_code(node, 0))
    toy.edit("other", "score = seed + 1", "score = seed")
    node.parts["modules"] = {"vlkd.core.files": "x"}
    assert other_code(node, 0) == "another vlkd.core.files"
    node.entry["file"] = Path("gone.ipynb")
    assert other_code(node, 0) == "no gone.ipynb"


# Ends


def reproduce_on(dask) -> subprocess.Popen:
    command = ["reproduce", "teacher", "--scale", "smoke", "--scheduler", dask.file]
    return subprocess.Popen(
        [sys.executable, "-c", "from vlkd.tools.cli import main; main()", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_runner_goes_and_its_runs_end(quick, dask, preload, how):
    toy = quick
    toy.nb("teacher", params, start, endless, end)
    worker = dask.worker(*preload)
    runner = reproduce_on(dask)
    wait_for(lambda: toy.has_steps("teacher@1"), 90)
    run = holder(toy, "teacher@1")
    runner.send_signal(how)
    out = runner.communicate(timeout=60)[0]
    lock = toy.d / "runs/smoke/.locks/teacher@1"
    taken = acquire(lock)
    assert taken is None or gone([run])  # while it writes nobody else may
    if taken is not None:
        os.close(taken)
    wait_for(lambda: gone([run]) and not is_locked(lock), 15)
    assert worker.poll() is None
    assert toy.why(ids=["teacher"]) == {"teacher@1": "was interrupted, goes on"}
    if how == signal.SIGINT:
        assert runner.returncode == 130 and "Traceback" not in out and "Error" not in out, out


def test_a_scheduler_that_goes_ends_the_run_and_the_trainings(quick, dask, preload):
    toy = quick
    toy.nb("teacher", params, start, endless, end)
    dask.worker(*preload)
    left = []

    def stop():
        wait_for(lambda: toy.has_steps("teacher@1"), 90)
        left.append(holder(toy, "teacher@1"))
        dask.boss.kill()

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(ConnectionError, match=r"does not answer any more.*the same command goes on"):
        toy.run(["teacher"], cluster=Cluster(dask.address))
    thread.join()
    assert left
    wait_for(lambda: gone(left), 40)


def test_a_failure_is_named(toy, dask):
    toy.edit("student", "score = lr", "assert lr < .1, 'much too large'\\nscore = lr")
    dask.worker()
    outcome = toy.run(["student"], cluster=Cluster(dask.address))
    assert outcome["done"] == ["teacher@1"]
    assert "student.ipynb, cell 4: AssertionError: much too large" in outcome["failed"]["student@1"]


# Commands of the pages and recipes


def check(words: list):
    "A usage error where an option of a command does not exist."
    import typer
    from distributed.cli import dask_scheduler, dask_worker
    from torch.distributed.run import parse_args
    from typer.main import get_command

    from vlkd.tools.cli import app
    from vlkd.train.distributed import train

    name, rest = Path(words[0]).name, words[1:]
    if name == "torchrun":
        parsed = parse_args(rest)
        name, rest = "python", ["-m", parsed.training_script, *parsed.training_script_args]
    if name == "python":
        assert rest[:2] == ["-m", "vlkd.train.distributed"]
        command = typer.Typer()
        command.command()(train)
        get_command(command).make_context("train", rest[2:])
    elif name == "dask":
        command = dict(scheduler=dask_scheduler.main, worker=dask_worker.main)[rest[0]]
        command.make_context(rest[0], rest[1:])
    elif name == "vlkd":
        command = get_command(app)
        while rest and hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(command.name, rest)
    else:
        assert name in ("openssl", "export"), words


def test_the_check_finds_wrong_options():
    for words in (["vlkd", "reproduce", "--schedular", "x"], ["dask", "worker", "--slots", "1"]):
        with pytest.raises(Exception, match=r"(?i)no such option|unexpected extra argument"):
            check(words)


def test_commands_of_the_page():
    cells = json.loads((ROOT / "nbs/scale.ipynb").read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [
        line.split("#")[0].strip() for block in blocks for line in block.replace("\\\n", "").splitlines()
    ]
    lines += [line for line in re.findall(r"`((?:vlkd|dask) [^`]+)`", text) if line != "dask scheduler"]
    assert len(lines) > 6
    for line in lines:
        words = shlex.split(line)
        check(words[1:] if re.match(r"[A-Z_]+=", words[0]) else words)
    assert {file.name for file in (ROOT / "recipes").iterdir()} == set(
        re.findall(r"recipes/([\w.]+)\]", text)
    )


@pytest.fixture(scope="module")
def kubernetes() -> dict:
    documents = list(yaml.safe_load_all((ROOT / "recipes/kubernetes.yaml").read_text()))
    return {(d["kind"], d["metadata"]["name"]): d for d in documents}


def test_kubernetes_recipe(kubernetes):
    pods = {
        name: d["spec"]["template"] for (kind, name), d in kubernetes.items() if kind in ("Deployment", "Job")
    }
    claims = {name for kind, name in kubernetes if kind == "PersistentVolumeClaim"}
    policy = kubernetes["NetworkPolicy", "vlkd"]["spec"]["podSelector"]["matchLabels"]
    for pod in pods.values():
        assert policy.items() <= pod["metadata"]["labels"].items()
        (container,) = pod["spec"]["containers"]
        check(container["command"])
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert all(mount["name"] in volumes for mount in container["volumeMounts"])
        claimed = [v["persistentVolumeClaim"] for v in volumes.values() if "persistentVolumeClaim" in v]
        assert all(claim["claimName"] in claims for claim in claimed)
    port = kubernetes["Service", "vlkd-scheduler"]["spec"]["ports"][0]["port"]
    commands = {name: pod["spec"]["containers"][0]["command"] for name, pod in pods.items()}
    address = f"tls://vlkd-scheduler:{port}"
    assert address in commands["vlkd-worker"] and address in commands["vlkd-reproduce"]
    assert str(port) in commands["vlkd-scheduler"] and "vlkd=1" in commands["vlkd-worker"]


def test_kubernetes_recipe_is_encrypted(kubernetes):
    settings = kubernetes["ConfigMap", "vlkd-dask"]["data"]
    code = "from distributed import Security; s = Security(); print(s.require_encryption, s.tls_ca_file, "
    code += "[s.get_tls_config_for_role(r).keys() for r in ('client', 'worker', 'scheduler')])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True
    )
    assert done.stdout.startswith("True /tls/cert.pem"), done.stderr
    for (kind, _), document in kubernetes.items():
        if kind in ("Deployment", "Job"):
            (container,) = document["spec"]["template"]["spec"]["containers"]
            assert container["envFrom"] == [dict(configMapRef=dict(name="vlkd-dask"))]
            assert "tls" in {mount["name"] for mount in container["volumeMounts"]}
            assert kind == "Job" or "--dashboard-address 127.0.0.1:0" in " ".join(container["command"])


SCRIPTS = dict(
    dask='exec "{python}" -m dask "$@"',
    vlkd='exec "{python}" -c "from vlkd.tools.cli import main; main()" "$@"',
    srun='shift\n"$@" & "$@" & wait',
)


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_slurm_recipe(toy, tmp_path):
    "The script itself, where `srun` starts two tasks on this machine."
    for line in (ROOT / "recipes/slurm.sh").read_text().splitlines():
        if found := re.search(r'"\$bin/(dask|vlkd)" (.*)', line):
            words = found[2].replace('"$@"', "all").replace('"$file"', "x").split()
            check([found[1], *(word for word in words if word != "&")])
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, script in SCRIPTS.items():
        (bin / name).write_text("#!/bin/sh\n" + script.format(python=sys.executable) + "\n")
        (bin / name).chmod(0o755)
    here = dict(VLKD_BIN=str(bin), SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="7")
    process = subprocess.Popen(
        ["bash", str(ROOT / "recipes/slurm.sh"), "other", "--scale", "smoke", "--seeds", "2"],
        env=os.environ | here | dict(PATH=f"{bin}:{os.environ['PATH']}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        private = toy.d / "runs/cluster-7"
        wait_for(lambda: is_whole(private / "scheduler.json") or process.poll() is not None, 60)
        assert read_json(private / "scheduler.json")["address"].startswith("tls://")
        assert private.stat().st_mode & 0o777 == 0o700
        left = tree(process)
        stranger = vlkd(
            "reproduce", "teacher", "--scale", "smoke", "--scheduler", str(private / "scheduler.json")
        )
        assert stranger.returncode == 2 and toy.ran() == []  # without the certificate
        out = process.communicate(timeout=240)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0 and toy.ran() == ["other@1", "other@2"] and "2 done" in out, out
    wait_for(lambda: gone(left), 20)
    assert not private.exists()
