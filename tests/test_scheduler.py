"""Runs on a Dask cluster: the same records, also when a worker is killed; what is refused, and what is left when the runner goes."""
import json, os, re, shutil, signal, socket, subprocess, sys, threading, time
from pathlib import Path

import pytest

pytest.importorskip("distributed", reason="needs Dask: the extra `cluster`")
import psutil

import vlkd.reproduce as R
from test_reproduce import Toy, end, gone, params, start, toy, vlkd, wait_for # noqa: F401
from vlkd.core import read_json, run_folder
from vlkd.scheduler import Cluster, library_code

ROOT = Path(__file__).resolve().parent.parent
# A training whose result depends on each step and not on where it was interrupted; it says where it starts.
training = """p = o/'checkpoint'; n, x = json.loads(p.read_text()) if p.exists() else (0, 1.0); say(f'{o.name[:9]}:{n}')
while n < 40:
    n += 1; x = x*1.01 + seed; time.sleep(.1); q = o/'checkpoint.new'; q.write_text(json.dumps((n, x))); q.replace(p); (o/'progress.json').write_text(json.dumps(dict(step=n, steps=40)))
p.unlink(); score = x"""


def tree(ps): return [q for p in ps for q in [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)]]


class Dask:
    "A scheduler and workers in processes of their own, as the pages tell to start them."
    def __init__(self, d:Path): self.d, self.procs = d, []
    def run(self, *a, **env):
        p = subprocess.Popen([sys.executable, "-m", "dask", *map(str, a)], stdout=open(self.d/f"dask{len(self.procs)}.log", "w"), stderr=subprocess.STDOUT, env={**os.environ, "DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT": "3", **env}, cwd=self.d, start_new_session=True)
        self.procs.append(p); return p
    def scheduler(self):
        f = self.d/"scheduler.json"; self.boss = self.run("scheduler", "--scheduler-file", f, "--host", "127.0.0.1", "--port", "0", "--no-dashboard"); wait_for(f.is_file, 60); self.file = str(f); self.address = read_json(f)["address"]; return self
    def worker(self, *more, **env): return self.run("worker", self.address, "--nthreads", "1", "--resources", "vlkd=1", "--no-dashboard", "--local-directory", self.d/"scratch", *more, **env)
    def close(self):
        for p in self.procs:
            if p.poll() is None: os.killpg(p.pid, signal.SIGKILL); p.wait()


@pytest.fixture
def dask(tmp_path):
    d = Dask(tmp_path)
    try: yield d.scheduler()
    finally: d.close()


def records(toy):
    "What a graph has left, but for times and the executed notebooks, which hold some."
    out = {}
    for f in sorted((toy.d/"runs/smoke").glob("*/run.json")):
        r = read_json(f); files = r.pop("files"); files["notebook.ipynb"] = 0; [r.pop(k) for k in ("seconds", "started")]
        out[f.parent.name] = (r, files, (f.parent/"result.json").read_bytes())
    return out


def test_a_killed_worker_and_the_same_records(toy, dask, capfd):
    for n in ("teacher", "other"): toy.nb(n, params, start, training, end)
    assert toy.run(jobs=2)["failed"] == {}; alone = records(toy); assert len(alone) == 4
    shutil.rmtree(toy.d/"runs"); toy.ran(); workers = [dask.worker(), dask.worker()]; killed = []
    def kill():
        part = lambda: next((toy.d/"runs/smoke/.partial").glob("teacher@1-*"), None)
        wait_for(lambda: (p := part()) and (p/"checkpoint").exists() and json.loads((p/"checkpoint").read_text())[0] >= 8, 90)
        pid = read_json(part()/"attempt.json")["pid"]; killed.append(psutil.Process(pid)); killed.extend(killed[0].children(recursive=True)); killed[0].kill()
    t = threading.Thread(target=kill); t.start(); r = toy.run(cluster=Cluster(dask.file)); t.join(); out = capfd.readouterr().out
    assert r["failed"] == {} and sorted(r["done"]) == ["other@1", "student@1", "t1@1", "teacher@1"], out
    log = toy.ran(); first = [int(x.split(":")[1]) for x in log if x.startswith("teacher@1")]; assert len(first) == 2 and first[0] == 0 and first[1] >= 8, log # it went on from its checkpoint
    assert len(killed) > 2 and gone(killed) and "teacher@1: its worker on" in out
    assert records(toy) == alone and list((toy.d/"runs/smoke/.partial").iterdir()) == [] and not list((toy.d/"runs/smoke/.cluster").iterdir())
    assert toy.why() == {}
