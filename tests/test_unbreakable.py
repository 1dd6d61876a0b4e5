"""What is guaranteed in hostile circumstances: processes killed anywhere, bits that flip, full disks,
folders that cannot be written, code in the place of data."""

import ast
import atexit
import contextlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import stat
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from test_bad_inputs import Evil, content, extract, forked, unix, videos, vlkd  # noqa: F401  (a fixture)
from toys import end, params, plan, start, tree, wait_for

from vlkd.core.files import CHECKSUMS, read_json, rng, sha256_file, write_json
from vlkd.core.records import Run, record, run_folder
from vlkd.core.settings import path, scale, settings_file

LIBRARY = Path(__file__).resolve().parent.parent / "vlkd"
KILLS = int(os.environ.get("VLKD_KILLS", 20))  # moments at which each job is killed
WORDS = [
    "copper",
    "iron",
    "gold",
    "salt",
    "ice",
    "is",
    "soft",
    "hard",
    "and",
    "melts",
    "rusts",
    "never",
    "often",
]


# Jobs: each makes a folder, always gives the same numbers, and goes on where it was interrupted


class States:
    "Token states that depend on the ids alone."

    fingerprint = "states"

    def __call__(self, ids, mask):
        import torch

        return torch.sin(ids[..., None] * torch.arange(1, 9))


def texts(n=200):
    r = rng("unbreakable")
    return [" ".join(r.choice(WORDS, r.integers(3, 12))) for _ in range(n)]


def tokenizer():
    from vlkd.data.text import train_tokenizer

    return train_tokenizer([" ".join(WORDS)], 80)


def corpus(out):
    from vlkd.data.corpus import text_list, tokenize_corpus

    t = tokenize_corpus(text_list(texts()), tokenizer(), out, max_tokens=16, shard_rows=20)
    return read_corpus(out, t)


def read_corpus(out, t=None):
    from vlkd.data.corpus import CorpusTokens

    t = t or CorpusTokens(out, tokenizer())
    x, m = t[np.arange(len(t))]
    return dict(x=x.numpy(), m=m.numpy(), n=np.asarray(t.lengths))


def features(out):
    extract(photos(), out, clips=None, shard_size=3)
    return read_features(out)


@cache
def photos():
    "Lists of photos; what `extract` takes."
    from PIL import Image

    folder = Path(tempfile.mkdtemp(prefix="vlkd-photos-"))
    atexit.register(shutil.rmtree, folder)
    files = [folder / f"{i}.png" for i in range(6)]
    for file in files:
        Image.fromarray(rng(file.name).integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(file)
    return {f"v{i}": files[: 3 + i % 4] for i in range(12)}


def read_features(out):
    from vlkd.data.video import Features

    f = Features(out)
    return {k: f[k].copy() for k in f}


def captions(out):
    from vlkd.data.howto100m import caption_table

    src = out.parent / "captions.json"
    r = rng("captions")
    if not src.is_file():
        write_json(
            src,
            {
                f"v{i}": dict(
                    start=[0, 2.5], end=[2, 4.25], text=[" ".join(r.choice(WORDS, 4)), "naïve text"]
                )
                for i in range(20)
            },
        )
    caption_table(src, out)
    return read_captions(out)


def read_captions(out):
    from vlkd.data.howto100m import CaptionTable

    t = CaptionTable(out)
    return dict(
        video=np.array(t.video),
        start=np.array(t.start),
        end=np.array(t.end),
        texts=np.array(list(t.texts)),
        videos=np.array(t.videos),
    )


def pool():
    from vlkd.retrieval.vokens import VokenPool

    r = rng("pool")
    n = 9
    return VokenPool(
        pd.DataFrame(dict(task="t", video=[f"v{i}" for i in range(n)], start=0.0, end=r.random(n))),
        r.normal(size=(n, 8)).astype(np.float32),
    )


def vokens(out):
    from vlkd.data.text import tokenize
    from vlkd.retrieval.vokens import vokenize

    pool().save(out / "pool")
    tok = tokenizer()
    vokenize(tokenize(tok, texts(60)), States(), pool(), tok, out / "vokens", batch=8, shard_rows=16)
    return read_vokens(out)


def read_vokens(out):
    from vlkd.data.text import tokenize
    from vlkd.retrieval.vokens import StoredVokens, VokenPool

    tok = tokenizer()
    p = VokenPool.load(out / "pool")
    v = StoredVokens(out / "vokens", tokenize(tok, texts(60)), tok, p)
    return dict(
        v=v[np.arange(len(v))].numpy(),
        pool=p.vectors,
        end=p.clips.end.to_numpy(),
        size=np.array(v.size),
        counts=v.counts(),
    )


def teacher(out):
    from vlkd.models.video_text import Teacher

    s = scale("smoke", hidden=16, heads=2, layers=1, intermediate=16)
    tok = tokenizer()
    t = Teacher(s, tok, 4, 0)
    t.save(out, tok)
    return read_teacher(out)


def read_teacher(out):
    from vlkd.models.video_text import Teacher

    t, tok = Teacher.load(out, scale("smoke", hidden=16, heads=2, layers=1, intermediate=16))
    return {k: v.numpy() for k, v in t.state_dict().items()} | dict(
        ids=np.array(tok(texts(5), padding=True)["input_ids"])
    )


def run(out):
    r = rng("record")
    record(
        out,
        dict(x=float(r.random())),
        tables=dict(t=pd.DataFrame(dict(a=r.random(40)))),
        examples=pd.DataFrame(dict(b=r.random(40))),
        headline="h",
    )
    files = {
        str(f.relative_to(out)): (f.stat().st_size, sha256_file(f))
        for f in sorted(out.rglob("*"))
        if f.is_file() and f.name != "run.json"
    }
    write_json(out / "run.json", dict(key="k", files=files))
    return read_run(out)


def read_run(out):
    r = Run(out)
    return dict(x=np.array(r.metrics["x"]), a=r.table("t").a.to_numpy(), b=r.examples.b.to_numpy())


def training(out):
    from test_training import train_line

    w, h = train_line(out)
    w = w.numpy()
    return dict(w=w, loss=np.array([x["loss"] for x in h if "loss" in x]))


JOBS = dict(
    training=(training, None),
    corpus=(corpus, read_corpus),
    features=(features, read_features),
    captions=(captions, read_captions),
    vokens=(vokens, read_vokens),
    teacher=(teacher, read_teacher),
    record=(run, read_run),
)


def quiet(f, *a):
    with contextlib.redirect_stdout(io.StringIO()) as o:
        x = f(*a)
    return x, o.getvalue()


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Job -> its folder, its numbers, and the seconds and file operations that it takes; each made once."
    made = {}

    def get(name):
        if name not in made:
            d = tmp_path_factory.mktemp(name) / "whole"
            x, _ = quiet(JOBS[name][0], d)
            e = d.parent / "events"
            began = time.monotonic()
            assert crash(lambda: JOBS[name][0](d.parent / "counted"), d.parent, count=e) == 0
            made[name] = SimpleNamespace(
                folder=d, numbers=x, seconds=time.monotonic() - began, events=int(e.read_text())
            )
        return made[name]

    return get


# SIGKILL


def crash(f, below, *, event=None, after=None, count=None):
    """Exit code of `f()` in a process that is killed at its `event`-th change of a file below a folder, or
    after some seconds; `count`: the file that gets the number of such changes."""

    def watched():
        n, top = [0], str(below)

        def hook(what, args):
            if what == "open":
                where, w = (
                    args[0],
                    (isinstance(args[1], str) and set(args[1]) & set("wax+"))
                    or args[2] & (os.O_WRONLY | os.O_RDWR),
                )
            else:
                where, w = (
                    args[0] if args else None,
                    what in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"),
                )
            if w and isinstance(where, (str, os.PathLike)) and os.fspath(where).startswith(top):
                if n[0] == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                n[0] += 1

        sys.addaudithook(hook)
        f()
        m = n[0]
        if count is not None:
            Path(count).write_text(str(m))

    return forked(watched, after=after)


@unix
@pytest.mark.parametrize("name", JOBS)
def test_killed_at_random_moments(name, whole, tmp_path):
    w, (job, look) = whole(name), JOBS[name]
    r = rng("moments", name, KILLS)
    died = 0
    for i in range(KILLS // 2):  # twice killed in the same folder: at a change of a file, and at any time
        out = tmp_path / f"{i}"
        moments = [dict(event=int(r.integers(w.events))), dict(after=float(r.random() * w.seconds))]
        for m in moments:
            if name == "captions" and not (tmp_path / "captions.json").is_file():
                shutil.copy(w.folder.parent / "captions.json", tmp_path)
            code = crash(partial(job, out), tmp_path, **m)
            assert code in (0, -signal.SIGKILL), (name, m, code)
            died += code != 0
            if look:  # what is there is whole, or says that it is not
                try:
                    x, _ = quiet(look, out)
                except (ValueError, OSError) as e:
                    assert str(out) in str(e), (m, e)
                else:
                    assert same(x, w.numbers), m
        x, _ = quiet(job, out)
        assert same(x, w.numbers), moments
    assert died >= KILLS // 2, "the kills came too late to test anything"


@unix
def test_extraction_killed_at_random_moments(videos, tmp_path, kills=KILLS):  # noqa: F811  (a fixture)
    "Of videos, with files that cannot be read among them."
    want = content(videos.parent / "features")
    e = tmp_path / "events"
    assert crash(lambda: extract(videos, tmp_path / "counted"), tmp_path, count=e) == 0
    n, r, out = int(e.read_text()), rng("extraction", kills), tmp_path / "out"
    for k in range(kills):
        assert crash(lambda: extract(videos, out), tmp_path, event=int(r.integers(n // 2))) in (
            0,
            -signal.SIGKILL,
        )
        if k % 4 == 3:
            extract(videos, out)
            assert content(out) == want
            shutil.rmtree(out)


# `vlkd reproduce`

chain = """import hashlib, time
from vlkd.core.files import write_json
p = o/'chain.json'; s = json.loads(p.read_text()) if p.exists() else dict(n=0, h='')
while s['n'] < 10:
    h = hashlib.sha256(f"{s['h']} {seed} {s['n']}".encode()).hexdigest()
    s = dict(n=s['n']+1, h=h)
    write_json(p, s)
    time.sleep(.01)
score = int(s['h'][:6], 16)"""


def results(toy):
    return {
        p.name: {
            f.name: f.read_bytes()
            for f in p.iterdir()
            if f.name not in ("run.json", "notebook.ipynb") and f.name[0] != "."
        }
        for p in sorted((toy.d / "runs/smoke").glob("*@*"))
    }


@unix
def test_reproduce_killed_at_random_moments(quick, kills=KILLS):
    "The runner is killed, with or without its runs, and started again: the records are as if nobody had."
    import psutil

    toy = quick
    toy.nb("teacher", params, start, chain, end)
    assert quiet(toy.run)[0]["failed"] == {}
    want, r = results(toy), rng("reproduce", kills)
    died = 0
    assert set(want) == {"teacher@1", "student@1", "other@1", "t1@1"}
    shutil.rmtree(toy.d / "runs")
    began = time.monotonic()
    toy.runner("t1").communicate()
    took = time.monotonic() - began
    shutil.rmtree(toy.d / "runs")
    for k in range(kills):
        process = toy.runner("t1")
        time.sleep(0.7 * float(r.random()) * took)  # what the last ones finished makes the next one shorter
        with contextlib.suppress(psutil.Error):
            tree = psutil.Process(process.pid).children(recursive=True) if k % 2 else []
            process.kill()
            for q in tree:
                q.kill()
        process.communicate()
        died += process.returncode != 0
        for n, x in results(toy).items():
            assert x == want[n], n  # a run that has its place is whole
        if k % 4 == 3:
            assert quiet(toy.run)[0]["failed"] == {} and results(toy) == want and toy.why() == {}
            assert not list((toy.d / "runs/smoke/.partial").iterdir())
            shutil.rmtree(toy.d / "runs")
    assert died >= kills / 2


@unix
def test_reproduce_on_a_full_disk(quick):
    toy = quick
    quiet(toy.run)
    want = results(toy)
    small = (run_folder("t1", "smoke", 1) / "run.json").stat().st_size // 2
    shutil.rmtree(toy.d / "runs")
    toy.setup += f"\nimport resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({small}, {small}))"
    process = toy.runner("t1")
    out = process.communicate(timeout=120)[0]
    assert process.returncode and "File too large" in out and not results(toy)
    assert quiet(toy.run)[0]["failed"] == {} and results(toy) == want


# Bits that flip, files that are cut, empty or in disorder


def flip(b: bytes, r) -> bytes:
    x = bytearray(b)
    x[r.integers(len(x))] ^= 1 << int(r.integers(8))
    return bytes(x)


CHANGES = dict(
    flip=flip,
    cut=lambda b, r: b[: int(r.integers(len(b)))],
    empty=lambda b, r: b"",
    swapped=lambda b, r: b[len(b) // 2 :] + b[: len(b) // 2],
)


def data_files(folder):
    return [
        f
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.stat().st_size and not f.name.startswith(".lock")
    ]


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", [k for k in JOBS if JOBS[k][1]])
def test_a_changed_file_is_named_or_does_not_matter(name, how, whole, tmp_path):
    "Every file of a finished folder in turn: reading gives the same numbers, or an error that names a file."
    w = whole(name)
    r = rng("damage", name, how)
    named = set()
    files = data_files(w.folder)
    assert files
    for f in files:
        rel = f.relative_to(w.folder)
        out = tmp_path / "d"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(w.folder, out)
        b = f.read_bytes()
        for _ in range(4 if how == "flip" else 1):
            (out / rel).write_bytes(CHANGES[how](b, r))
            try:
                x, _ = quiet(JOBS[name][1], out)
            except (ValueError, OSError) as e:
                assert any(q.name in str(e) for q in (f, f.with_suffix(".npy"), f.with_suffix(""))), (rel, e)
                named.add(rel)
            else:
                assert same(x, w.numbers), f"{rel}: other numbers, and not a word"
    assert named, "nothing was ever noticed"


@pytest.mark.parametrize(
    "name, rebuilt", [("corpus", ".npy"), ("features", ".safetensors"), ("vokens", ".npy")]
)
def test_changed_shards_are_made_again(name, rebuilt, whole, tmp_path):
    w = whole(name)
    r = rng("rebuilt", name)
    files = [f for f in data_files(w.folder) if f.suffix == rebuilt and f.name != "vectors.npy"]
    assert len(files) >= 3
    for f in files:
        out = tmp_path / f.stem
        shutil.copytree(w.folder, out)
        (out / f.relative_to(w.folder)).write_bytes(flip(f.read_bytes(), r))
        x, output = quiet(JOBS[name][0], out)
        assert (
            same(x, w.numbers)
            and f.name in output
            and (out / f.relative_to(w.folder)).read_bytes() == f.read_bytes()
        )


def test_changed_shards_of_videos_are_made_again(videos, tmp_path):  # noqa: F811  (a fixture)
    want = content(videos.parent / "features")
    r = rng("videos")
    for n, b in want.items():
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(videos.parent / "features", tmp_path / "out")
        (tmp_path / "out" / n).write_bytes(flip(b, r))
        try:
            extract(videos, tmp_path / "out")
        except ValueError as e:
            assert n == "plan.json" and n in str(e)
        else:
            assert n != "plan.json" and content(tmp_path / "out") == want, n


@pytest.mark.parametrize("how", CHANGES)
def test_a_changed_checkpoint_is_left_out(how, tmp_path, whole):
    "Every file of the newest checkpoint: it is left out by name, and the training ends as it would."
    from test_training import Stop, train_line

    want = whole("training").numbers
    r = rng("checkpoint", how)
    with pytest.raises(Stop):
        quiet(lambda: train_line(tmp_path / "stopped", stop=27))
    for f in data_files(tmp_path / "stopped" / "checkpoints" / "checkpoint-20"):
        out = tmp_path / f.name
        shutil.copytree(tmp_path / "stopped", out)
        g = out / "checkpoints" / "checkpoint-20" / f.name
        g.write_bytes(CHANGES[how](f.read_bytes(), r))
        (w, _), output = quiet(train_line, out)
        assert (
            np.array_equal(w.numpy(), want["w"])
            and "checkpoint-20 is left out: " in output
            and "resumes from checkpoint-10" in output
        ), (f.name, output)


@pytest.mark.parametrize("how", CHANGES)
def test_a_changed_cache_file_is_made_again(how, tmp_path, monkeypatch):
    "Read-outs of Tabletop's encoder: made again, with the same numbers."
    from vlkd.tabletop import encoders as t

    def fit():
        r = rng("read-outs")
        made.append(1)
        arrays = {name: r.normal(size=(3, 4)).astype(np.float32) for name in ("w2", "b2", "w3", "b3")}
        return arrays | dict(columns=np.array(list("abc")))

    monkeypatch.setattr(t, "fit_read_outs", fit)
    r, made = rng("cache", how), []
    want = t.load_tabletop_encoder(tmp_path).read_outs
    t.load_tabletop_encoder(tmp_path)
    assert len(made) == 1
    files = data_files(tmp_path)
    assert len(files) == 2
    for n, f in enumerate(files, 2):
        f.write_bytes(CHANGES[how](f.read_bytes(), r))
        e, output = quiet(t.load_tabletop_encoder, tmp_path)
        assert same(e.read_outs, want) and len(made) == n and "is damaged: it is made again" in output


def test_a_run_that_was_changed_is_not_read(whole, tmp_path):
    shutil.copytree(whole("record").folder, tmp_path / "r")
    f = tmp_path / "r" / "result.json"
    write_json(f, read_json(f) | dict(metrics=dict(x=0.99)))
    with pytest.raises(ValueError, match=r"result\.json was changed after it was recorded"):
        Run(tmp_path / "r")
    (tmp_path / "r" / "run.json").unlink()
    assert Run(tmp_path / "r").metrics["x"] == 0.99  # a notebook run by hand has no receipt


def test_checksum_inside_a_file(tmp_path):
    f = write_json(tmp_path / "a.json", {"b": (1, 2.5), 3: None}, checksum=True)
    assert read_json(f) == {"b": [1, 2.5], "3": None}
    for a, b in (("2.5", "2.0"), ('"b"', '"c"'), ("null", "true")):
        s = f.read_text()
        assert a in s
        (tmp_path / "c.json").write_text(s.replace(a, b))
        with pytest.raises(ValueError, match=r"c\.json was changed after"):
            read_json(tmp_path / "c.json")


# Full disks


@unix
@pytest.mark.parametrize("name", [k for k in JOBS if k != "training"])
def test_full_disk(name, whole, tmp_path):
    w, (job, look) = whole(name), JOBS[name]
    sizes = sorted({f.stat().st_size for f in data_files(w.folder)})
    r = rng("disk", name)
    for n, size in enumerate((sizes[0] - 1, int(r.integers(sizes[0], sizes[-1])), sizes[-1] - 1)):
        out = tmp_path / f"{n}" / "out"
        out.parent.mkdir()
        [shutil.copy(f, out.parent) for f in w.folder.parent.glob("captions.json")]
        assert forked(partial(job, out), size=size) == 99
        assert [f for f in out.parent.rglob(".*") if f.is_file() and not f.name.startswith(".lock")] == [], (
            "half a file is left behind"
        )
        try:
            x, _ = quiet(look, out)
        except (ValueError, OSError) as e:
            assert str(out) in str(e), e
        else:
            assert same(x, w.numbers)
        x, _ = quiet(job, out)
        assert same(x, w.numbers)


# Folders that may not be read or written


def without_rights(f):
    "Exit code of `f()` in a process that gives up root's right to pass over modes of files."

    def bound():
        if os.geteuid() == 0:
            import ctypes
            import struct

            if ctypes.CDLL(None, use_errno=True).capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)):
                os._exit(77)  # no capabilities at all
        f()

    code = forked(bound)
    if code == 77:
        pytest.skip("this process may not give up its rights, and nothing is forbidden to root")
    return code


@contextlib.contextmanager
def modes(folder, d=0o555, f=0o444):
    "A tree with other modes for a while."
    was = {p: stat.S_IMODE(p.lstat().st_mode) for p in [folder, *folder.rglob("*")]}
    for p in reversed(list(was)):
        p.chmod(d if p.is_dir() else f)
    try:
        yield
    finally:
        for p, m in was.items():
            p.chmod(m)


linux = pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")


@linux
def test_modes_bind_here(tmp_path):
    "The tests below would say nothing if the child could write all the same."
    with modes(tmp_path):
        assert without_rights(lambda: (tmp_path / "a").write_text("x")) == 99


@linux
def test_a_data_folder_that_can_only_be_read(videos, whole, tmp_path):  # noqa: F811  (a fixture)
    "Data sets are read, and features of videos extracted, without a byte written beside them."
    from test_squad import made
    from test_tasks import GOOD

    d = tmp_path / "data"
    (d / "qnli").mkdir(parents=True)
    (d / "qnli" / "dev.tsv").write_bytes(GOOD["qnli"])
    write_json(d / "dev-v1.1.json", made())
    (d / "text.txt").write_text("\n".join(texts()))
    shutil.copytree(videos, d / "v")
    shutil.copytree(whole("features").folder, d / "features")
    shutil.copytree(whole("teacher").folder, d / "teacher")
    shutil.copytree(whole("captions").folder, d / "captions")

    def use():
        from vlkd.data.corpus import open_text, tokenize_corpus
        from vlkd.data.squad import read_squad
        from vlkd.data.tasks import read_task

        assert (
            len(read_task("qnli", d / "qnli", "dev"))
            and len(read_squad(d))
            and len(tokenize_corpus(open_text(d / "text.txt"), tokenizer(), tmp_path / "corpus"))
        )
        extract(d / "v", tmp_path / "out")
        assert (
            same(read_features(d / "features"), whole("features").numbers)
            and same(read_teacher(d / "teacher"), whole("teacher").numbers)
            and same(read_captions(d / "captions"), whole("captions").numbers)
        )

    before = sorted(p for p in d.rglob("*"))
    with modes(d):
        assert without_rights(use) == 0

    def shards(p):
        return {k: v for k, v in content(p).items() if k.endswith(".safetensors")}

    assert shards(tmp_path / "out") == shards(videos.parent / "features") and sorted(d.rglob("*")) == before


def output_of(f, out):  # what a command says to standard error goes into a file
    def go():
        r = f()
        Path(out).write_text(json.dumps([r.code, r.err]))
        os._exit(0)

    return go


@linux
def test_a_runs_folder_that_cannot_be_written(quick, tmp_path):
    toy = quick
    (toy.d / "runs").mkdir()
    out = tmp_path / "output"
    toy.nb("t1", params, start, "score = 1", end)
    os.makedirs(path("nbs") / "experiments", exist_ok=True)
    shutil.copy(settings_file(), tmp_path / "s.ini")
    with modes(toy.d / "runs"):
        assert without_rights(output_of(lambda: vlkd("reproduce", "--scale", "smoke"), out)) == 0
    code, output = json.loads(out.read_text())
    assert (
        code == 2
        and output.startswith("vlkd: ")
        and "Permission denied" in output
        and str(toy.d / "runs") in output
        and output.count("\n") == 1
    ), output
    assert quiet(toy.run)[0]["failed"] == {}


@linux
@pytest.mark.parametrize("name", [k for k in JOBS if JOBS[k][1]])
def test_files_that_may_not_be_read(name, whole, tmp_path):
    "The error names the file; nothing is taken for missing and made anew over it."
    w, (_, look) = whole(name), JOBS[name]
    shutil.copytree(w.folder, tmp_path / "out")
    output = tmp_path / "output"
    [shutil.copy(f, tmp_path) for f in w.folder.parent.glob("captions.json")]

    def use():
        try:
            look(tmp_path / "out")
        except (OSError, ValueError) as e:
            output.write_text(str(e))
            os._exit(3)

    with modes(tmp_path / "out", 0o555, 0o000):
        assert without_rights(use) == 3
    assert str(tmp_path / "out") in output.read_text() and [
        f.read_bytes() for f in data_files(tmp_path / "out")
    ] == [f.read_bytes() for f in data_files(w.folder)]


@linux
@pytest.mark.parametrize("name", [k for k in JOBS if k != "training"])
def test_an_output_folder_that_cannot_be_written(name, whole, tmp_path):
    (tmp_path / "out").mkdir()
    output = tmp_path / "output"
    [shutil.copy(f, tmp_path) for f in whole(name).folder.parent.glob("captions.json")]

    def use():
        try:
            JOBS[name][0](tmp_path / "out" / "x")
        except Exception as e:
            output.write_text(f"{type(e).__name__}: {e}")
            os._exit(3)

    with modes(tmp_path / "out"):
        assert without_rights(use) == 3
    assert re.match("(PermissionError|OSError|SafetensorError): ", output.read_text()) and not list(
        (tmp_path / "out").iterdir()
    )


# Two at once


def test_a_second_runner_takes_over_from_one_that_is_killed(quick):
    "The first of two runners is killed with its runs; the second ends the graph, and computes each run once."
    import psutil

    toy = quick
    toy.edit("teacher", "score = seed", "time.sleep(.6); score = seed")
    toy.edit("other", "score = seed", "time.sleep(.6); score = seed")

    first = toy.runner("t1")
    wait_for(lambda: toy.partial("teacher@1"))
    second = toy.runner("t1")
    time.sleep(0.4)
    for process in tree(first):
        with contextlib.suppress(psutil.Error):
            process.kill()
    first.communicate()
    second.communicate(timeout=120)
    assert second.returncode == 0 and toy.why() == {} and len(results(toy)) == 4
    assert (
        sorted(set(log := toy.ran())) == ["other@1", "student@1", "t1@1", "teacher@1"]
        and log.count("t1@1") == log.count("student@1") == 1
    )


# Code in the place of data

BAD_CALLS = {
    "pickle": "load loads Unpickler",
    "marshal": "load loads",
    "shelve": "open",
    "dill": "load loads",
    "joblib": "load",
    "os": "system popen",
    "pd": "read_pickle",
    "pandas": "read_pickle",
    "tarfile": "*",
    "shutil": "unpack_archive",
    "imp": "*",
    "runpy": "*",
    "code": "*",
}


def calls(source):
    "(name called, node) of all calls in a source."
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, ast.Call):
            yield ast.unparse(n.func), n


def risks(source) -> list[str]:
    "Calls that run or unpack what a file holds."
    out = []
    for name, n in calls(source):
        top, _, last = name.rpartition(".")
        kw = {k.arg: ast.unparse(k.value) for k in n.keywords}
        if (
            last in BAD_CALLS.get(top, "").split()
            or BAD_CALLS.get(top) == "*"
            or name in ("eval", "exec", "compile", "__import__")
            or last in ("extractall", "extract_all", "unpack_archive", "read_pickle")
        ):
            out.append(name)
        if name.endswith("torch.load") and kw.get("weights_only") != "True":
            out.append(f"{name} without weights_only=True")
        if top in ("np", "numpy") and last == "load" and kw.get("allow_pickle", "False") != "False":
            out.append(f"{name} with allow_pickle")
        if (
            top == "yaml"
            and last in ("load", "full_load", "unsafe_load")
            and (len(n.args) < 2 or ast.unparse(n.args[1]) != "CardLoader")
        ):
            out.append(f"{name} without the safe loader")
        if kw.get("shell", "False") != "False":
            out.append(f"{name} through a shell")
        if kw.get("trust_remote_code", "False") != "False":
            out.append(f"{name} trusts code")
    return out


def test_nothing_in_the_library_runs_or_unpacks_what_a_file_holds():
    "No pickle, no archive is unpacked (so that no member can lead out of its folder), no text is executed."
    found = {
        f"{f.relative_to(LIBRARY)}": r
        for f in sorted(LIBRARY.rglob("*.py"))
        if (r := risks(f.read_text(encoding="utf-8")))
    }
    assert found == {}
    for bad in (
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "pickle.load(f)",
        "eval(s)",
        "tarfile.open(f)",
        "zipfile.ZipFile(f).extractall(d)",
        "shutil.unpack_archive(f)",
        "yaml.load(s)",
        "subprocess.run(s, shell=True)",
        "os.system(s)",
        "m.from_pretrained(d, trust_remote_code=True)",
        "pd.read_pickle(f)",
    ):
        assert risks(bad), bad
    import yaml

    from vlkd.data.catalog import CardLoader

    assert issubclass(CardLoader, yaml.SafeLoader)


def evil_files(mark):
    import torch

    o = io.BytesIO()
    torch.save({"a": Evil(mark)}, o)
    n = io.BytesIO()
    np.save(n, np.array([Evil(mark)], object), allow_pickle=True)
    z = io.BytesIO()
    np.savez(
        z,
        **{
            k: np.array([Evil(mark)], object)
            for k in ("w2", "b2", "w3", "b3", "columns", "feats_u8", "scale", "files", "spec_json")
        },
    )
    return dict(pickle=pickle.dumps(Evil(mark)), torch=o.getvalue(), npy=n.getvalue(), npz=z.getvalue())


@pytest.mark.parametrize("kind", ["pickle", "torch", "npy", "npz"])
def test_a_pickle_in_the_place_of_data_is_refused(kind, whole, tmp_path, monkeypatch):
    "Wherever arrays, weights or tables are read: an error, and the pickle has not run."
    from vlkd.data.public import flickr8k_features
    from vlkd.data.video import Features
    from vlkd.features.encoders import load_mobilenet
    from vlkd.features.video3d import read_weights

    mark = tmp_path / "ran"
    b = evil_files(mark)[kind]
    readers = {}
    for name in [k for k in JOBS if JOBS[k][1]]:
        for f in data_files(whole(name).folder):
            if f.suffix in (".npy", ".safetensors", ".parquet", ".bin", ".csv"):
                d = tmp_path / f"{name}-{f.name}"
                shutil.copytree(whole(name).folder, d)
                (d / f.relative_to(whole(name).folder)).write_bytes(b)
                readers[d.name] = lambda name=name, d=d: JOBS[name][1](d)
    for n, f in (
        ("features/a.npy", lambda p: Features(p.parent)),
        ("flickr8k/mbv2_pool1280_u8.npz", lambda p: flickr8k_features(["a"], tmp_path)),
        ("mobilenet_v2_imagenet_fp16.npz", lambda p: load_mobilenet(tmp_path)),
        ("w.safetensors", read_weights),
        ("w.pt", read_weights),
    ):
        p = tmp_path / n
        p.parent.mkdir(exist_ok=True)
        p.write_bytes(b)
        readers[n] = lambda f=f, p=p: f(p)
    assert len(readers) > 15
    for n, f in readers.items():
        with pytest.raises((ValueError, OSError)):
            quiet(f)
        assert not mark.exists(), n
    (tmp_path / "plain").mkdir()
    shutil.copytree(whole("teacher").folder / "lm", d := tmp_path / "plain" / "lm")
    (d / CHECKSUMS).unlink()
    (d / "model.safetensors").write_bytes(b)  # a folder from elsewhere
    from vlkd.models.bert import load_model

    with pytest.raises(ValueError):
        load_model(d)
    (d / "model.safetensors").rename(d / "pytorch_model.bin")
    with pytest.raises(ValueError):
        load_model(d)
    assert not mark.exists()


def test_code_that_comes_with_a_model_is_not_run(whole, tmp_path):
    from vlkd.models.bert import load_model

    d = tmp_path / "m"
    shutil.copytree(whole("teacher").folder / "lm", d)
    (d / CHECKSUMS).unlink()
    (d / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass M: pass\n")
    for n, maps in (
        (
            "config.json",
            dict(AutoModelForMaskedLM="evil.M", AutoConfig="evil.M", AutoTokenizer=["evil.M", None]),
        ),
        ("tokenizer_config.json", dict(AutoTokenizer=["evil.M", "evil.M"])),
    ):
        write_json(d / n, read_json(d / n) | dict(auto_map=maps))
    with contextlib.suppress(ValueError):
        load_model(d)
    assert not (tmp_path / "ran").exists()


# Parameters of notebooks

STRINGS = [
    "__import__('os').system('touch RAN')",
    "'); __import__('os').system('touch RAN') #",
    '"""\n__import__("os").system("touch RAN")\n"""',
    "\\'\nimport os; os.system('touch RAN')\n",
    "{{ __import__('os') }}",
    "%%bash\ntouch RAN",
    "!touch RAN",
    "\\",
    "a\nb\r\tc\0é\u2028\"'",
    "f'{1/0}'",
    "$(touch RAN)",
]


def test_parameters_are_literals():
    "What papermill writes into a notebook's cell is read back as the very value, whatever it looks like."
    from papermill.translators import PythonTranslator

    for v in [
        *STRINGS,
        STRINGS,
        dict(zip("abc", STRINGS, strict=False)),
        {STRINGS[1]: 1},
        1.5,
        -3,
        True,
        None,
        [1, "x"],
    ]:
        body = ast.parse(PythonTranslator.codify(dict(x=v))).body
        assert len(body) == 1 and isinstance(body[0], ast.Assign) and ast.literal_eval(body[0].value) == v


def test_code_in_a_parameter_is_not_run(toy):
    "Through the runner, papermill and a kernel: the notebook gets the text, and nothing else happens."
    toy.nb(
        "student",
        params + 'note: str = ""',
        start + "(o/'note.json').write_text(json.dumps(note)); score = 1",
        end,
    )
    s = "\n".join(STRINGS).replace("RAN", str(toy.d / "RAN"))
    toy.write(plan.replace("params = { lr = 0.5 }\n", f"params = {{ note = {json.dumps(s)} }}\n"))
    r, _ = quiet(toy.run, ["student"])
    assert r["failed"] == {}
    assert (
        json.loads((run_folder("student", "smoke", 1) / "note.json").read_text()) == s
        and not (toy.d / "RAN").exists()
        and not list(toy.plan.parent.glob("RAN"))
    )


@pytest.mark.parametrize(
    "name",
    ["__import__('os')", "lr; x", "lr = 1\nimport os", "a.b", "1a", "", "class", "lr ", "é\u0301 x", "lr#"],
)
def test_names_that_are_no_parameters_are_refused(quick, name):
    toy = quick
    toy.write(plan.replace("params = { lr = 0.5 }", f"params = {{ {json.dumps(name)} = 0.5 }}"))
    with pytest.raises(ValueError, match="student") as e:
        toy.run()
    assert str(toy.plan) in str(e.value) and toy.ran() == []


@pytest.mark.parametrize(
    "cell",
    [
        "x: int = __import__('os').system('touch RAN')",
        "x: str = open('RAN', 'w').name",
        "x: __import__('os').system('touch RAN') = 1",
        "x: int = [open('RAN', 'w') for _ in 'a']",
        "import os\nos.system('touch RAN')",
        "x: int = (lambda: 1)()",
        'x: str = f\'{open("RAN", "w")}\'',
        "(x): int = 1; open('RAN', 'w')",
        "o.x: int = 1",
        "o['x']: int = 1",
    ],
)
def test_code_in_a_parameters_cell_is_not_run_by_the_runner(quick, cell, tmp_path, monkeypatch):
    "Which parameters a notebook has is found by reading, not by running it."
    monkeypatch.chdir(tmp_path)
    toy = quick
    toy.nb("student", params + cell, start, end)
    with pytest.raises(ValueError, match=r"student\.ipynb"):
        toy.run()
    assert not (tmp_path / "RAN").exists() and toy.ran() == []
