"""What is guaranteed in hostile circumstances: processes killed anywhere, bits that flip, full disks,
folders that cannot be written, code in the place of data."""

import ast
import atexit
import contextlib
import ctypes
import datetime
import io
import json
import os
import pickle
import re
import shutil
import signal
import stat
import struct
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from papermill.translators import PythonTranslator
from PIL import Image
from processes import content, forked, quiet, tree, wait_for
from test_bad_inputs import extract, videos  # noqa: F401  (a fixture)
from test_scale import read_corpus, sentences, some_captions, tokenizer
from test_squad import made
from test_tasks import GOOD
from test_training import Stop, train_line
from toys import end, params, plan, start

from vlkd.core.files import CHECKSUMS, read_json, rng, sha256_file, write_json
from vlkd.core.records import Run, record, run_folder
from vlkd.core.settings import scale
from vlkd.data.catalog import CardLoader
from vlkd.data.corpus import open_text, text_list, tokenize_corpus
from vlkd.data.howto100m import CaptionTable, caption_table
from vlkd.data.public import flickr8k_features
from vlkd.data.squad import read_squad
from vlkd.data.tasks import read_task
from vlkd.data.text import tokenize
from vlkd.data.video import Features
from vlkd.features.encoders import GridPixels, load_mobilenet
from vlkd.features.extract import extract_videos
from vlkd.features.video3d import read_weights
from vlkd.models.bert import load_model
from vlkd.models.video_text import Teacher
from vlkd.retrieval.vokens import StoredVokens, VokenPool, vokenize
from vlkd.tabletop import encoders
from vlkd.tools.cli import main

LIBRARY = Path(__file__).resolve().parent.parent / "vlkd"
KILLS = int(os.environ.get("VLKD_KILLS", 6))  # moments at which each job is killed
TODAY = datetime.date.today().isoformat()  # other moments, bits and cuts every day
TEACHER = scale("smoke", hidden=16, heads=2, layers=1, intermediate=16)


# Jobs: each makes a folder, always gives the same numbers, and goes on where it was interrupted


class States:
    "Token states that depend on the ids alone."

    fingerprint = "states"

    def __call__(self, ids, mask):
        return torch.sin(ids[..., None] * torch.arange(1, 9))


def corpus(out):
    tokenize_corpus(text_list(sentences(200)), tokenizer(), out, max_tokens=16, shard_rows=20)


@cache
def photos():
    "Lists of photos, in a folder that is there for all tests."
    folder = Path(tempfile.mkdtemp(prefix="vlkd-photos-"))
    atexit.register(shutil.rmtree, folder)
    files = [folder / f"{i}.png" for i in range(6)]
    for file in files:
        Image.fromarray(rng(file.name).integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(file)
    return {f"v{i}": files[: 3 + i % 4] for i in range(12)}


def features(out):
    extract_videos(photos(), out, GridPixels(2), workers=1, shard_size=3)


def read_features(out):
    found = Features(out)
    return {name: found[name].copy() for name in found}


def captions(out):
    source = out / "source.json"
    if not source.is_file():
        write_json(source, some_captions(20))
    caption_table(source, out / "table")


def read_captions(out):
    table = CaptionTable(out / "table")
    names = ("video", "start", "end", "texts", "videos")
    return {name: np.array(list(getattr(table, name))) for name in names}


def pool():
    numbers = rng("pool")
    clips = dict(task="t", video=[f"v{i}" for i in range(9)], start=0.0, end=numbers.random(9))
    return VokenPool(pd.DataFrame(clips), numbers.normal(size=(9, 8)).astype(np.float32))


def vokens(out):
    pool().save(out / "pool")
    tokens = tokenize(tokenizer(), sentences(60))
    vokenize(tokens, States(), pool(), tokenizer(), out / "vokens", batch=8, shard_rows=16)


def read_vokens(out):
    saved = VokenPool.load(out / "pool")
    stored = StoredVokens(out / "vokens", tokenize(tokenizer(), sentences(60)), tokenizer(), saved)
    rows = stored[np.arange(len(stored))].numpy()
    numbers = dict(pool=saved.vectors, end=saved.clips.end.to_numpy(), size=np.array(stored.size))
    return dict(rows=rows, counts=stored.counts()) | numbers


def teacher(out):
    Teacher(TEACHER, tokenizer(), 4, 0).save(out, tokenizer())


def read_teacher(out):
    model, reader = Teacher.load(out, TEACHER)
    ids = np.array(reader(sentences(5), padding=True)["input_ids"])
    return dict(ids=ids) | {name: value.numpy() for name, value in model.state_dict().items()}


def run(out):
    numbers = rng("record")
    metrics, frame = dict(x=float(numbers.random())), pd.DataFrame(dict(a=numbers.random(40)))
    record(out, metrics, tables=dict(t=frame), examples=frame, headline="h")
    files = {str(f.relative_to(out)): f for f in data_files(out) if f.name != "run.json"}
    found = {name: (file.stat().st_size, sha256_file(file)) for name, file in files.items()}
    write_json(out / "run.json", dict(key="k", files=found))


def read_run(out):
    read = Run(out)
    return dict(x=np.array(read.metrics["x"]), a=read.table("t").a.to_numpy(), b=read.examples.a.to_numpy())


def training(out):
    weight, history = train_line(out)
    return dict(weight=weight.numpy(), loss=np.array([x["loss"] for x in history if "loss" in x]))


JOBS = dict(
    corpus=(corpus, read_corpus),
    features=(features, read_features),
    captions=(captions, read_captions),
    vokens=(vokens, read_vokens),
    teacher=(teacher, read_teacher),
    record=(run, read_run),
)
ALL = dict(training=(training, None)) | JOBS
every_job = pytest.mark.parametrize("name", JOBS)


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def data_files(folder):
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and f.stat().st_size)
    return [f for f in files if not f.name.startswith(".lock")]


def make(name, out):
    job, read = ALL[name]
    numbers, _ = quiet(job, out)
    return quiet(read, out)[0] if read else numbers


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Job -> its folder, its numbers, and the seconds and file operations that it takes; each made once."
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            numbers, begun = make(name, folder / "whole"), time.monotonic()
            events = changes(ALL[name][0], folder)
            seconds = time.monotonic() - begun
            made[name] = SimpleNamespace(
                folder=folder / "whole", numbers=numbers, seconds=seconds, events=events
            )
        return made[name]

    return get


def is_whole_or_says_so(name, out, numbers):
    "What is there can be read as it should be, or an error names the folder."
    try:
        found, _ = quiet(JOBS[name][1], out)
    except (ValueError, OSError) as error:
        assert str(out) in str(error), error
    else:
        assert same(found, numbers)


# SIGKILL


def crash(job, below, *, event=None, after=None, count=None):
    """Exit code of `job()` in a process that is killed at its `event`-th change of a file below a folder, or
    after some seconds; `count`: the file that gets the number of such changes."""
    changing = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate")
    changed = 0

    def watch(what, arguments):
        nonlocal changed
        file = arguments[0] if arguments else None
        writes = what in changing or (what == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and isinstance(file, (str, os.PathLike)) and os.fspath(file).startswith(str(below)):
            if changed == event:
                os.kill(os.getpid(), signal.SIGKILL)
            changed += 1

    def watched():
        sys.addaudithook(watch)
        job()
        total = changed
        if count is not None:
            Path(count).write_text(str(total))

    return forked(watched, after=after)


def changes(job, folder) -> int:
    "The number of changes of files that a job makes."
    assert crash(lambda: job(folder / "counted"), folder, count=folder / "events") == 0
    return int((folder / "events").read_text())


@pytest.mark.parametrize("name", ALL)
def test_killed_at_random_moments(name, whole, tmp_path):
    expected, job = whole(name), ALL[name][0]
    numbers = rng("moments", name, KILLS, TODAY)
    died = 0
    for i in range(KILLS // 2):  # twice killed in the same folder: at a change of a file, and at any time
        out = tmp_path / str(i)
        event, after = int(numbers.integers(expected.events)), float(numbers.random() * expected.seconds)
        for moment in (dict(event=event), dict(after=after)):
            code = crash(partial(job, out), tmp_path, **moment)
            assert code in (0, -signal.SIGKILL), (moment, code)
            died += code != 0
            if name in JOBS:
                is_whole_or_says_so(name, out, expected.numbers)
        assert same(make(name, out), expected.numbers), (event, after)
    assert died >= KILLS // 2, "the kills came too late to test anything"


@pytest.mark.parametrize("ranks", [1, 2])
def test_extraction_killed_at_random_moments(videos, tmp_path, ranks):  # noqa: F811
    "Of videos, with files that cannot be read among them, on one machine or several."

    def go(rank=0):
        return extract(videos, tmp_path / "out", rank=rank, world_size=ranks)

    wanted, numbers = content(videos.parent / "features"), rng("extraction", ranks, TODAY)
    events = changes(partial(extract, videos), tmp_path)
    for _ in range(max(1, KILLS // 4)):
        for rank in [*range(ranks)] * 2:
            event = int(numbers.integers(events // 2 // ranks))
            assert crash(partial(go, rank), tmp_path, event=event) in (0, -signal.SIGKILL)
        for rank in range(ranks):
            go(rank)
        assert content(tmp_path / "out") == wanted
        shutil.rmtree(tmp_path / "out")


# `vlkd reproduce`

CHAIN = """import hashlib, time
from vlkd.core.files import write_json
p = o/'chain.json'; s = json.loads(p.read_text()) if p.exists() else dict(n=0, h='')
while s['n'] < 10:
    h = hashlib.sha256(f"{s['h']} {seed} {s['n']}".encode()).hexdigest()
    s = dict(n=s['n']+1, h=h)
    write_json(p, s)
    time.sleep(.01)
score = int(s['h'][:6], 16)"""


def results(toy):
    "Bytes of what each run has recorded, but for times and the executed notebooks, which hold some."
    folders = sorted((toy.d / "runs/smoke").glob("*@*"))
    return {
        folder.name: {
            name: data
            for name, data in content(folder).items()
            if name not in ("run.json", "notebook.ipynb") and name[0] != "."
        }
        for folder in folders
    }


def test_reproduce_killed_at_random_moments(quick):
    "The runner is killed, with or without its runs, and started again: the records are as if nobody had."
    toy, numbers, died = quick, rng("reproduce", TODAY), 0
    toy.nb("teacher", params, start, CHAIN, end)
    assert quiet(toy.run)[0]["failed"] == {}
    wanted = results(toy)
    assert set(wanted) == {"teacher@1", "student@1", "other@1", "t1@1"}
    shutil.rmtree(toy.d / "runs")
    begun = time.monotonic()
    toy.runner("t1").communicate()
    took = time.monotonic() - begun
    for _ in range(KILLS // 2):
        shutil.rmtree(toy.d / "runs")
        for with_its_runs in (False, True):
            runner = toy.runner("t1")
            time.sleep(0.7 * float(numbers.random()) * took)  # what the last ones finished is not done again
            with contextlib.suppress(psutil.Error):
                for process in tree(runner) if with_its_runs else [runner]:
                    process.kill()
            runner.communicate()
            died += runner.returncode != 0
            found = results(toy)  # a run that has its place is whole
            assert found == {name: wanted[name] for name in found}
        assert quiet(toy.run)[0]["failed"] == {} and results(toy) == wanted and toy.why() == {}
        assert not list((toy.d / "runs/smoke/.partial").iterdir())
    assert died >= KILLS // 2


def test_reproduce_on_a_full_disk(quick):
    toy = quick
    quiet(toy.run)
    wanted = results(toy)
    small = (run_folder("t1", "smoke", 1) / "run.json").stat().st_size // 2
    shutil.rmtree(toy.d / "runs")
    toy.setup += f"\nimport resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({small}, {small}))"
    runner = toy.runner("t1")
    out = runner.communicate(timeout=120)[0]
    assert runner.returncode and "File too large" in out and not results(toy)
    assert quiet(toy.run)[0]["failed"] == {} and results(toy) == wanted


# Bits that flip, files that are cut, empty or in disorder


def flip(data: bytes, numbers) -> bytes:
    changed = bytearray(data)
    changed[numbers.integers(len(changed))] ^= 1 << int(numbers.integers(8))
    return bytes(changed)


CHANGES = dict(
    flip=flip,
    cut=lambda data, numbers: data[: int(numbers.integers(len(data)))],
    empty=lambda data, numbers: b"",
    swapped=lambda data, numbers: data[len(data) // 2 :] + data[: len(data) // 2],
)
every_change = pytest.mark.parametrize("how", CHANGES)


def changed_copies(folder, copy, how, times=1):
    "Every file of a folder in turn: a copy of the folder in which it was changed, and its name there."
    numbers = rng("damage", how, TODAY)
    files = data_files(folder)
    assert files
    for file in files * times:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        changed = copy / file.relative_to(folder)
        changed.write_bytes(CHANGES[how](file.read_bytes(), numbers))
        yield file, changed


@every_change
@every_job
def test_a_changed_file_is_named_or_does_not_matter(name, how, whole, tmp_path):
    "Every file of a finished folder in turn: reading gives the same numbers, or an error that names a file."
    expected, named = whole(name), 0
    for file, _ in changed_copies(expected.folder, tmp_path / "d", how, 4 if how == "flip" else 1):
        try:
            found, _ = quiet(JOBS[name][1], tmp_path / "d")
        except (ValueError, OSError) as error:
            names = (file.name, file.with_suffix(".npy").name, file.stem)
            assert any(name in str(error) for name in names), (file, error)
            named += 1
        else:
            assert same(found, expected.numbers), f"{file}: other numbers, and not a word"
    assert named, "nothing was ever noticed"


@pytest.mark.parametrize(
    "name, ending", [("corpus", ".npy"), ("features", ".safetensors"), ("vokens", ".npy")]
)
def test_changed_shards_are_made_again(name, ending, whole, tmp_path):
    expected, shards = whole(name), 0
    for file, changed in changed_copies(expected.folder, tmp_path / "d", "flip"):
        if file.suffix == ending and file.name != "vectors.npy":
            shards += 1
            _, said = quiet(JOBS[name][0], tmp_path / "d")
            assert file.name in said and changed.read_bytes() == file.read_bytes()
    assert shards >= 3


def test_changed_shards_of_videos_are_made_again(videos, tmp_path):  # noqa: F811
    folder = videos.parent / "features"
    for file, _ in changed_copies(folder, tmp_path / "out", "flip"):
        if file.name == "plan.json":
            with pytest.raises(ValueError, match=r"plan\.json"):
                extract(videos, tmp_path / "out")
        else:
            extract(videos, tmp_path / "out")
            assert content(tmp_path / "out") == content(folder), file


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_a_changed_checkpoint_is_left_out(how, tmp_path, whole):
    "Every file of the newest checkpoint: it is left out by name, and the training ends as it would."
    with pytest.raises(Stop):
        quiet(lambda: train_line(tmp_path / "stopped", stop=27))
    out, last = tmp_path / "again", "checkpoints/checkpoint-20"
    for _, changed in changed_copies(tmp_path / "stopped", out, how):
        if changed.parent == out / last:
            (weight, _), said = quiet(train_line, out)
            assert np.array_equal(weight.numpy(), whole("training").numbers["weight"])
            assert "checkpoint-20 is left out: " in said and "resumes from checkpoint-10" in said, said


@every_change
def test_a_changed_cache_file_is_made_again(how, tmp_path, monkeypatch):
    "Read-outs of Tabletop's encoder: made again, with the same numbers."
    made = []

    def fit():
        numbers = rng("read-outs")
        made.append(1)
        arrays = {name: numbers.normal(size=(3, 4)).astype(np.float32) for name in ("w2", "b2", "w3", "b3")}
        return arrays | dict(columns=np.array(list("abc")))

    def load():
        encoder, said = quiet(encoders.load_tabletop_encoder, tmp_path)
        return encoder.read_outs, said

    monkeypatch.setattr(encoders, "fit_read_outs", fit)
    wanted, _ = load()
    load()
    assert len(made) == 1
    files = data_files(tmp_path)
    assert len(files) == 2
    for times, file in enumerate(files, 2):
        file.write_bytes(CHANGES[how](file.read_bytes(), rng("cache", how, TODAY)))
        found, said = load()
        assert same(found, wanted) and len(made) == times and "is damaged: it is made again" in said


def test_a_run_that_was_changed_is_not_read(whole, tmp_path):
    folder = shutil.copytree(whole("record").folder, tmp_path / "r")
    write_json(folder / "result.json", read_json(folder / "result.json") | dict(metrics=dict(x=0.99)))
    with pytest.raises(ValueError, match=r"result\.json was changed after it was recorded"):
        Run(folder)
    (folder / "run.json").unlink()
    assert Run(folder).metrics["x"] == 0.99  # a notebook run by hand has no receipt


def test_checksum_inside_a_file(tmp_path):
    file = write_json(tmp_path / "a.json", {"b": (1, 2.5), 3: None}, checksum=True)
    assert read_json(file) == {"b": [1, 2.5], "3": None}
    text = file.read_text()
    for old, new in (("2.5", "2.0"), ('"b"', '"c"'), ("null", "true")):
        assert old in text
        file.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=r"a\.json was changed after"):
            read_json(file)


# Full disks


@every_job
def test_full_disk(name, whole, tmp_path):
    expected, job = whole(name), JOBS[name][0]
    sizes = sorted({file.stat().st_size for file in data_files(expected.folder)})
    between = int(rng("disk", name, TODAY).integers(sizes[0], sizes[-1]))
    for number, size in enumerate((sizes[0] - 1, between, sizes[-1] - 1)):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        assert forked(partial(job, out), size=size) == 99
        left = [f for f in out.parent.rglob(".*") if f.is_file() and not f.name.startswith(".lock")]
        assert left == [], "half a file is left behind"
        is_whole_or_says_so(name, out, expected.numbers)
        assert same(make(name, out), expected.numbers)


# Folders that may not be read or written


def without_rights(function, **options):
    "Exit code of a function in a process that gives up root's right to pass over modes of files."

    def bound():
        none = struct.pack("=Ii", 0x20080522, 0), bytes(24)  # no capabilities at all
        if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).capset(*none):
            os._exit(77)
        function()

    code = forked(bound, **options)
    if code == 77:
        pytest.skip("this process may not give up its rights, and nothing is forbidden to root")
    return code


@contextlib.contextmanager
def modes(folder, of_folders=0o555, of_files=0o444):
    "A tree with other modes for a while."
    before = {p: stat.S_IMODE(p.lstat().st_mode) for p in [folder, *folder.rglob("*")]}
    for path in reversed(list(before)):
        path.chmod(of_folders if path.is_dir() else of_files)
    try:
        yield
    finally:
        for path, mode in before.items():
            path.chmod(mode)


linux = pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")


@linux
def test_modes_bind_here(tmp_path):
    "The tests below would say nothing if the child could write all the same."
    with modes(tmp_path):
        assert without_rights(lambda: (tmp_path / "a").write_text("x")) == 99


@linux
def test_a_data_folder_that_can_only_be_read(videos, whole, tmp_path):  # noqa: F811
    "Data sets are read, and features of videos extracted, without a byte written beside them."
    data = tmp_path / "data"
    (data / "qnli").mkdir(parents=True)
    (data / "qnli" / "dev.tsv").write_bytes(GOOD["qnli"])
    write_json(data / "dev-v1.1.json", made())
    (data / "text.txt").write_text("\n".join(sentences(200)))
    shutil.copytree(videos, data / "v")
    jobs = ("features", "teacher", "captions")
    for name in jobs:
        shutil.copytree(whole(name).folder, data / name)

    def use():
        assert len(read_task("qnli", data / "qnli", "dev")) and len(read_squad(data))
        assert len(tokenize_corpus(open_text(data / "text.txt"), tokenizer(), tmp_path / "corpus"))
        extract(data / "v", tmp_path / "out")
        assert all(same(JOBS[name][1](data / name), whole(name).numbers) for name in jobs)

    before = sorted(data.rglob("*"))
    with modes(data):
        assert without_rights(use) == 0
    assert sorted(data.rglob("*")) == before
    for name, shard in content(videos.parent / "features").items():
        assert not name.endswith(".safetensors") or content(tmp_path / "out")[name] == shard


@linux
def test_a_runs_folder_that_cannot_be_written(quick, tmp_path):
    toy, said = quick, tmp_path / "said"
    (toy.d / "runs").mkdir()
    with modes(toy.d / "runs"):
        assert without_rights(lambda: main(["reproduce", "--scale", "smoke"]), output=said) == 2
    *_, error = said.read_text().splitlines()
    assert error.startswith("vlkd: ") and "Permission denied" in error and str(toy.d / "runs") in error
    assert quiet(toy.run)[0]["failed"] == {}


@linux
@every_job
def test_files_that_may_not_be_read(name, whole, tmp_path):
    "The error names the file; nothing is taken for missing and made anew over it."
    out, said = tmp_path / "out", tmp_path / "said"
    shutil.copytree(whole(name).folder, out)
    with modes(out, 0o555, 0o000):
        assert without_rights(lambda: JOBS[name][1](out), output=said) == 99
    assert str(out) in said.read_text().splitlines()[-1]
    before, after = (
        [file.read_bytes() for file in data_files(folder)] for folder in (whole(name).folder, out)
    )
    assert after == before


@linux
@every_job
def test_an_output_folder_that_cannot_be_written(name, tmp_path):
    out, said = tmp_path / "out", tmp_path / "said"
    out.mkdir()
    with modes(out):
        assert without_rights(lambda: JOBS[name][0](out / "x"), output=said) == 99
    assert re.search("(PermissionError|OSError|SafetensorError): ", said.read_text())
    assert list(out.iterdir()) == []


# Two at once


def test_a_second_runner_takes_over_from_one_that_is_killed(quick):
    "The first of two runners is killed with its runs; the second ends the graph, and computes each run once."
    toy = quick
    for name in ("teacher", "other"):
        toy.edit(name, "score = seed", "time.sleep(.6); score = seed")
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
    ran = toy.ran()
    assert set(ran) == {"other@1", "student@1", "t1@1", "teacher@1"}
    assert ran.count("t1@1") == ran.count("student@1") == 1


# Code in the place of data

BAD_CALLS = dict(
    pickle="load loads Unpickler",
    marshal="load loads",
    shelve="open",
    dill="load loads",
    joblib="load",
    os="system popen",
    pd="read_pickle",
    pandas="read_pickle",
    tarfile="*",
    shutil="unpack_archive",
    imp="*",
    runpy="*",
    code="*",
)
BAD_METHODS = ("extractall", "extract_all", "unpack_archive", "read_pickle")
BAD_OPTIONS = ("allow_pickle", "shell", "trust_remote_code")


def is_risk(call: ast.Call) -> bool:
    "Whether a call may run or unpack what a file holds."
    name = ast.unparse(call.func)
    module, _, method = name.rpartition(".")
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    bad = BAD_CALLS.get(module, "")
    loads_yaml = module == "yaml" and method in ("load", "full_load", "unsafe_load")
    return (
        bad == "*"
        or method in bad.split()
        or method in BAD_METHODS
        or name in ("eval", "exec", "compile", "__import__")
        or any(options.get(option, "False") != "False" for option in BAD_OPTIONS)
        or (name.endswith("torch.load") and options.get("weights_only") != "True")
        or (loads_yaml and [ast.unparse(x) for x in call.args[1:2]] != ["CardLoader"])
    )


def risks(source) -> list[str]:
    nodes = ast.walk(ast.parse(source))
    return [ast.unparse(node) for node in nodes if isinstance(node, ast.Call) and is_risk(node)]


RISKS = """torch.load(f)
torch.load(f, weights_only=False)
np.load(f, allow_pickle=True)
pickle.load(f)
eval(s)
tarfile.open(f)
zipfile.ZipFile(f).extractall(d)
shutil.unpack_archive(f)
yaml.load(s)
subprocess.run(s, shell=True)
os.system(s)
m.from_pretrained(d, trust_remote_code=True)
pd.read_pickle(f)"""


def test_nothing_in_the_library_runs_or_unpacks_what_a_file_holds():
    "No pickle, no archive is unpacked (so that no member can lead out of its folder), no text is executed."
    found = {file: risks(file.read_text(encoding="utf-8")) for file in LIBRARY.rglob("*.py")}
    assert {str(file): calls for file, calls in found.items() if calls} == {}
    for line in RISKS.splitlines():
        assert risks(line), line
    assert issubclass(CardLoader, yaml.SafeLoader)


class Evil:
    "An object whose pickle makes a file when it is loaded."

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def saved(save, *args, **options) -> bytes:
    file = io.BytesIO()
    save(file, *args, **options)
    return file.getvalue()


NPZ_NAMES = "w2 b2 w3 b3 columns feats_u8 scale files spec_json".split()
EVIL_FILES = dict(
    pickle=pickle.dumps,
    torch=lambda evil: saved(lambda file: torch.save({"a": evil}, file)),
    npy=lambda evil: saved(np.save, np.array([evil], object), allow_pickle=True),
    npz=lambda evil: saved(np.savez, **dict.fromkeys(NPZ_NAMES, np.array([evil], object))),
)


@pytest.mark.parametrize("kind", EVIL_FILES)
def test_a_pickle_in_the_place_of_data_is_refused(kind, whole, tmp_path):
    "Wherever arrays, weights or tables are read: an error, and the pickle has not run."
    mark = tmp_path / "ran"
    data = EVIL_FILES[kind](Evil(mark))
    readers = {}
    for name, (_, read) in JOBS.items():
        for file in data_files(whole(name).folder):
            if file.suffix in (".npy", ".safetensors", ".parquet", ".bin", ".csv"):
                folder = shutil.copytree(whole(name).folder, tmp_path / f"{name}-{file.name}")
                readers[folder / file.relative_to(whole(name).folder)] = partial(read, folder)
    model = shutil.copytree(whole("teacher").folder / "lm", tmp_path / "model")
    bin_model = shutil.copytree(model, tmp_path / "bin-model")
    for folder in (model, bin_model):  # from elsewhere
        (folder / CHECKSUMS).unlink()
    (bin_model / "model.safetensors").unlink()
    for name, read in (
        ("features/a.npy", lambda: Features(tmp_path / "features")),
        ("flickr8k/mbv2_pool1280_u8.npz", lambda: flickr8k_features(["a"], tmp_path)),
        ("mobilenet_v2_imagenet_fp16.npz", lambda: load_mobilenet(tmp_path)),
        ("w.safetensors", lambda: read_weights(tmp_path / "w.safetensors")),
        ("w.pt", lambda: read_weights(tmp_path / "w.pt")),
        ("model/model.safetensors", lambda: load_model(model)),
        ("bin-model/pytorch_model.bin", lambda: load_model(bin_model)),
    ):
        readers[tmp_path / name] = read
    assert len(readers) > 17
    for file, read in readers.items():
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
        with pytest.raises((ValueError, OSError)):
            quiet(read)
        assert not mark.exists(), file


def test_code_that_comes_with_a_model_is_not_run(whole, tmp_path):
    folder = shutil.copytree(whole("teacher").folder / "lm", tmp_path / "m")
    (folder / CHECKSUMS).unlink()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass M: pass\n")
    maps = dict(AutoModelForMaskedLM="evil.M", AutoConfig="evil.M", AutoTokenizer=["evil.M", "evil.M"])
    for name in ("config.json", "tokenizer_config.json"):
        write_json(folder / name, read_json(folder / name) | dict(auto_map=maps))
    with contextlib.suppress(ValueError):
        load_model(folder)
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
MAPS = [dict(zip("abc", STRINGS[:3], strict=True)), {STRINGS[1]: 1}]
VALUES = [*STRINGS, *MAPS, STRINGS, 1.5, -3, True, None, [1, "x"]]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_parameters_are_literals(value):
    "What papermill writes into a notebook's cell is read back as the very value, whatever it looks like."
    (line,) = ast.parse(PythonTranslator.codify(dict(x=value))).body
    assert isinstance(line, ast.Assign) and ast.literal_eval(line.value) == value


def test_code_in_a_parameter_is_not_run(toy):
    "Through the runner, papermill and a kernel: the notebook gets the text, and nothing else happens."
    note = "(o/'note.json').write_text(json.dumps(note)); score = 1"
    toy.nb("student", params + 'note: str = ""', start + note, end)
    text = "\n".join(STRINGS).replace("RAN", str(toy.d / "RAN"))
    toy.write(plan.replace("params = { lr = 0.5 }\n", f"params = {{ note = {json.dumps(text)} }}\n"))
    assert quiet(toy.run, ["student"])[0]["failed"] == {}
    assert json.loads((run_folder("student", "smoke", 1) / "note.json").read_text()) == text
    assert not list(toy.d.rglob("RAN"))


NO_NAMES = [
    "__import__('os')",
    "lr; x",
    "lr = 1\nimport os",
    "a.b",
    "1a",
    "",
    "class",
    "lr ",
    "é\u0301 x",
    "lr#",
]


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_are_no_parameters_are_refused(quick, name):
    toy = quick
    toy.write(plan.replace("params = { lr = 0.5 }", f"params = {{ {json.dumps(name)} = 0.5 }}"))
    with pytest.raises(ValueError, match="student") as e:
        toy.run()
    assert str(toy.plan) in str(e.value) and toy.ran() == []


CODE = """x: int = __import__('os').system('touch RAN')
x: str = open('RAN', 'w').name
x: __import__('os').system('touch RAN') = 1
x: int = [open('RAN', 'w') for _ in 'a']
import os; os.system('touch RAN')
x: int = (lambda: 1)()
x: str = f'{open("RAN", "w")}'
(x): int = 1; open('RAN', 'w')
o.x: int = 1
o['x']: int = 1"""


@pytest.mark.parametrize("cell", CODE.splitlines())
def test_code_in_a_parameters_cell_is_not_run_by_the_runner(quick, cell, tmp_path, monkeypatch):
    "Which parameters a notebook has is found by reading, not by running it."
    monkeypatch.chdir(tmp_path)
    toy = quick
    toy.nb("student", params + cell, start, end)
    with pytest.raises(ValueError, match=r"student\.ipynb"):
        toy.run()
    assert not (tmp_path / "RAN").exists() and toy.ran() == []
