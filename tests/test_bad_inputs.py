"Odd video folders, wrong tables and texts, models that do not fit, full disks, slips on the command line."

import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vlkd.core.files import read_json, rng, write_json
from vlkd.core.records import Run, record
from vlkd.core.settings import scale
from vlkd.data.tasks import read_task

HEADER = "index\tquestion\tsentence\tlabel\n"
LABELS = ("not_entailment", "entailment")
ENTAILS = HEADER + "".join(f"{i}\tdoes number {i} walk ?\tsomeone moves\t{LABELS[i % 2]}\n" for i in range(6))


def vlkd(*args):
    "Exit code of a command, and what it prints to stdout and stderr."
    from vlkd.tools.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(arg) for arg in args])
        except SystemExit as e:
            code = e.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def refused(says, *args):
    "A command ends with exit code 2 and one line that says why."
    done = vlkd(*args)
    assert done.code == 2 and says in done.err, done
    assert done.err.startswith("vlkd: ") and done.err.count("\n") == 1, done.err


def content(folder):
    "Bytes of the files of a folder, by name."
    files = Path(folder).iterdir() if Path(folder).exists() else []
    return {p.name: p.read_bytes() for p in files if not p.name.startswith(".lock")}


def _child(f, size):
    "Run `f()` and end the process; files end at `size` bytes, as on a full disk."
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    signal.alarm(120)  # a fork of a process with threads may wait for a lock that none of its own holds
    if size is not None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    f()


def forked(f, *, size=None, after=None):
    "Exit code of `f()` in a process of its own, 99 where it raises; it is killed `after` seconds."
    child = os.fork()
    if child == 0:
        try:
            _child(f, size)
            os._exit(0)
        except SystemExit as e:
            os._exit(e.code or 0)
        except BaseException:
            os._exit(99)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


unix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


# Videos


class Trailing:
    "An encoder of clips that look back: mean colours of three frames."

    name, dim, frames, rate, size, trailing = "late", 9, 3, 1, 16, True

    def encode(self, clips):
        return np.asarray(clips, np.float32).mean((2, 3)).reshape(len(clips), 9) / 255


def write_video(path, frames=16, side=(32, 48)):
    from vlkd.data.video import write_mp4

    first = rng(ascii(path.name)).integers(0, 100, (1, *side, 3))
    brighter = np.arange(frames)[:, None, None, None] * 100 // frames
    return write_mp4(path, (first + brighter).astype(np.uint8), 8)


def extract(*args, **kw):
    from vlkd.features.encoders import GridPixels
    from vlkd.features.extract import extract_videos

    pytest.importorskip("av", reason="the `video` extra is not installed")
    options = dict(frames=GridPixels(2), clips=Trailing(), workers=1, shard_size=2)
    with contextlib.redirect_stdout(io.StringIO()):
        return extract_videos(*args, **options | kw)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    "A folder of videos, two of which cannot be read, beside their features."
    pytest.importorskip("av", reason="the `video` extra is not installed")
    folder = tmp_path_factory.mktemp("videos") / "v"
    folder.mkdir()
    for i in range(12):
        write_video(folder / f"{i:02}.mp4", 8 + 8 * (i % 3))
    (folder / "03.mp4").write_bytes(b"")
    cut = (folder / "06.mp4").read_bytes()
    (folder / "06.mp4").write_bytes(cut[: len(cut) // 2])
    extract(folder, folder.parent / "features")
    return folder


@unix
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_any_moment_and_resumed(videos, tmp_path, ranks):
    def run(rank):
        return extract(videos, tmp_path / "out", rank=rank, world_size=ranks)

    whole = content(videos.parent / "features")
    begun = time.time()
    extract(videos, tmp_path / "timed")
    took = time.time() - begun
    for moment in rng("kills", ranks).random(4):
        for rank in range(ranks):
            code = forked(lambda rank=rank: run(rank), after=moment * took / ranks)
            assert code in (0, -signal.SIGKILL)
    for rank in range(ranks):
        run(rank)
    assert content(tmp_path / "out") == whole == content(tmp_path / "timed")


@unix
@pytest.mark.parametrize("size", [100, 300, 900])
def test_full_disk_while_extracting(videos, tmp_path, size):
    assert forked(lambda: extract(videos, tmp_path / "out"), size=size) == 99
    left, whole = content(tmp_path / "out"), content(videos.parent / "features")
    assert "manifest.json" not in left and left.items() <= whole.items()
    extract(videos, tmp_path / "out")
    assert content(tmp_path / "out") == whole


def test_names_of_files(tmp_path):
    good = write_video(tmp_path / "a.mp4").read_bytes()
    folder = tmp_path / "v"
    folder.mkdir()
    try:
        for name in ["größe 日本 \"'.mp4", "two\nlines.mp4", "UPPER.MP4", ".hidden.mp4"]:
            (folder / name).write_bytes(good)
        Path(os.fsdecode(os.fsencode(folder) + b"/latin\xe9.mp4")).write_bytes(good)
        Path(os.fsdecode(os.fsencode(folder) + b"/cut\xff.mp4")).write_bytes(good[:90])
        (folder / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    except OSError:
        pytest.skip("this file system refuses such names")
    features = extract(folder, tmp_path / "out")
    assert set(features) == {"größe 日本 \"'", "two\nlines", "UPPER", "latin\\xe9"}
    assert all((features[name] == features["UPPER"]).all() for name in features)
    assert set(features.errors) == {"cut\\xff", "gone"}
    assert "cut\\xff.mp4: not a readable video file" in features.errors["cut\\xff"]
    assert "gone.mp4: no such video file" in features.errors["gone"]
    before = content(tmp_path / "out")
    extract(folder, tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "v" / "locked").mkdir(parents=True)
    write_video(tmp_path / "v" / "a.mp4")
    write_video(tmp_path / "v" / "locked" / "b.mp4")
    scan = os.scandir

    def refuse(folder="."):
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    says = "locked: this folder cannot be read (Permission denied)"
    refused(says, "extract", tmp_path / "v", "--out", tmp_path / "out", "--frames", "grid")
    assert not (tmp_path / "out").exists()


def test_odd_sizes_and_pixel_formats(tmp_path):
    av = pytest.importorskip("av", reason="the `video` extra is not installed")
    for name, side, pixels in (
        ("odd", (33, 47), "yuv444p"),
        ("half", (33, 47), "yuv420p"),
        ("dot", (2, 2), "yuv444p"),
        ("gray", (32, 48), "gray"),
        ("ten", (32, 48), "yuv420p10le"),
    ):
        with av.open(str(tmp_path / f"{name}.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=4)
            stream.height, stream.width = side
            stream.pix_fmt = pixels
            for i in range(6):
                image = np.full((*side, 3), 90 + i, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    features = extract(tmp_path, tmp_path / "out")
    assert len(features) == 5 and not features.errors and not features.manifest["warnings"]
    for name in features:
        assert features[name].shape == (2, 21)
        grey = (features[name][:, :12].astype(float) + 1) * 127.5
        assert np.abs(grey - [[90], [94]]).max() < 3, name


@pytest.mark.parametrize(
    "text, says",
    [
        ("file,start,end\na.mp4,0,1\n", "line 1: the columns should be path,start,end"),
        ("path,start,end\na.mp4,0:01,2\n", "line 2: start should be a number of seconds"),
        ("path,start,end\na.mp4,2,2\n", "line 2: end should be later"),
        ("path;start;end\na.mp4;0;1\n", "line 1: the columns should be"),
        ("path,start,end\na\0.mp4,0,1\n", "line 2: a NUL character"),
        ("path,start,end\na.mp4,0,inf\n", "line 2: end should be a number"),
        ("", "line 1: the columns should be"),
        ('path,start,end\n"a.mp4,0,1\nb.mp4,0,1\n', "line 3: 1 values for 3 columns"),
    ],
)
def test_lists(tmp_path, text, says):
    (tmp_path / "l.csv").write_text(text)
    command = ["extract", tmp_path / "l.csv", "--out", tmp_path / "out", "--frames", "grid"]
    refused(f"l.csv, {says}", *command)
    assert not (tmp_path / "out").exists()


# Tasks


def qnli(tmp_path, data, name="train.tsv"):
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_task("qnli", tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: "\ufeff" + s,
        lambda s: s.replace("\n", "\r\n"),
        lambda s: s[:-1],
        lambda s: ("\ufeff" + s).replace("\n", "\r\n").encode(),
    ],
)
def test_files_of_other_editors_read_the_same(tmp_path, change):
    plain = qnli(tmp_path, ENTAILS)
    (tmp_path / "x").mkdir()
    assert qnli(tmp_path / "x", change(ENTAILS)).equals(plain)


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda s: s.replace("question", "sentence1"),
            "line 1: no column 'question'; expected index, question, sentence, label, found index, sentence1",
        ),
        (lambda s: s.replace("not_entailment", "maybe", 1), "line 2: label 'maybe'"),
        (
            lambda s: s.replace("not_entailment", "1").replace("entailment", "0"),
            "line 2: label '1'; expected entailment or not_entailment",
        ),
        (lambda s: s.replace("\n1\t", "\n0\t"), "line 3: id '0' occurs a second time"),
        (lambda s: s[:-20], "line 7: 3 fields, expected 4"),
        (lambda s: s.split("\n")[0] + "\n", "no rows"),
        (lambda s: "", "line 1: the file is empty"),
        (lambda s: s.replace("walk", "läuft", 1).encode("latin-1"), "line 2: not UTF-8"),
        (lambda s: s.encode("utf-16"), "line 1: not UTF-8"),
        (lambda s: s.replace("\t", " "), "line 1: no column 'index'"),
        (lambda s: s.replace("\n3\t", "\n\n3\t"), "line 5: 1 fields"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, change, says):
    with pytest.raises(ValueError) as e:
        qnli(tmp_path, change(ENTAILS))
    assert str(e.value).startswith(str(tmp_path / "train.tsv")) and says in str(e.value)


@pytest.mark.parametrize(
    "cut, says",
    [
        (0, "line 1: the file is empty"),
        (5, "line 1: the gzip data are broken"),
        (60, "line [0-9]+: the gzip data are broken or cut short"),
        (-9, "line [0-9]+: the gzip data are broken or cut short"),
    ],
)
def test_a_gzip_that_is_cut(tmp_path, cut, says):
    with pytest.raises(ValueError, match=rf"train\.tsv\.gz, {says}"):
        qnli(tmp_path, gzip.compress((ENTAILS * 3).encode())[:cut], "train.tsv.gz")


def test_an_unknown_task():
    with pytest.raises(ValueError, match="unknown task 'qnl'; did you mean 'qnli'"):
        read_task("qnl", "anywhere")


# Captions and texts


@pytest.fixture(scope="module")
def howto(tmp_path_factory):
    "A synthetic fixture in place of HowTo100M, a tokeniser for it and an untrained teacher."
    from vlkd.data.howto100m import write_fixture
    from vlkd.data.public import bert_vocab
    from vlkd.data.text import load_vocabulary
    from vlkd.models.video_text import Teacher

    folder = tmp_path_factory.mktemp("howto")
    write_fixture(folder, 100, dim=16)
    tokenizer = load_vocabulary(bert_vocab(folder), 40)
    Teacher(scale("smoke"), tokenizer, 16, 0).save(folder / "teacher", tokenizer)
    return SimpleNamespace(data=folder / "howto100m", teacher=folder / "teacher", tokenizer=tokenizer)


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("start", -3.0, "negative start"),
        ("end", 0.0, "end not after start"),
        ("start", "soon", "time is not a number"),
        ("end", None, "time is not a number"),
        ("end", float("nan"), "time is not a number"),
        ("end", 1e9, "beyond the video"),
        ("text", "  ", "empty text"),
    ],
)
def test_captions_with_wrong_times(howto, tmp_path, key, value, says):
    from vlkd.data.howto100m import caption_table
    from vlkd.data.video import Features

    captions = json.loads((howto.data / "caption.json").read_text())
    video = next(iter(captions))
    captions[video][key][1] = value
    file = tmp_path / "c.json"
    file.write_text(json.dumps(captions))
    seconds = Features(howto.data / "features").seconds()
    with pytest.raises(ValueError, match=f"c.json, video {video}, caption 1: {says}"):
        caption_table(file, tmp_path / "t", seconds=seconds)
    assert list(tmp_path.iterdir()) == [file]
    table = caption_table(file, tmp_path / "t", seconds=seconds, wrong="drop")
    assert len(table) == 99 and table.dropped == {says: 1}


def voken_command(howto, folder, size=4):
    options = ["--scale", "smoke", "--size", size]
    return ["vokens", howto.teacher, folder / "a.txt", howto.data, folder / "out", *options]


@pytest.mark.parametrize(
    "data, says",
    [
        (b"", "there is no text in it"),
        (" \n\t\n\u00a0\n".encode(), "there is no text in it"),
        (b"\0\0\n\0\n", "there is no text in it"),
        ("café".encode("latin-1"), "line 1: not UTF-8"),
        (bytes(range(128, 256)), "line 1: not UTF-8"),
    ],
)
def test_texts_without_text(howto, tmp_path, data, says):
    text = tmp_path / "a.txt"
    text.write_bytes(data)
    refused(str(text), *voken_command(howto, tmp_path))
    refused(says, *voken_command(howto, tmp_path))
    text.write_text("now there is text")
    assert vlkd(*voken_command(howto, tmp_path)).code == 0  # nothing of the first try is in the way


@pytest.mark.parametrize(
    "data, rows, tokens",
    [
        ("turn the pan .", 1, 6),
        ("pan " * 10_000, 264, 10_000 + 2 * 264),
        ("q" * 20_000, 1, 3),
        ("turn\0the pan\n\0\n", 1, None),
        ("\ufeffturn the pan", 1, 5),
        ("turn\r\nthe pan\r\n", 1, 5),
    ],
)
def test_texts_of_odd_shapes(howto, tmp_path, data, rows, tokens):
    from vlkd.data.corpus import open_text, tokenize_corpus

    text = tmp_path / "a.txt"
    text.write_bytes(data.encode())
    corpus = tokenize_corpus(open_text(text), howto.tokenizer, tmp_path / "c", max_tokens=40)
    assert len(corpus) == rows and corpus.lengths.max() <= 40
    assert tokens is None or corpus.tokens == tokens
    done = vlkd(*voken_command(howto, tmp_path))
    assert done.code == 0 and f"vokens of {rows} rows from 4 clips" in done.out
    refused("holds 4 clips instead of 3", *voken_command(howto, tmp_path, size=3))


# Models

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "a", "girl", "boy", "dropped", "kettle", "broke", "it", "you", "did", "not"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "Folder of a small untrained student, its tokeniser and settings."
    from vlkd.data.text import load_vocabulary
    from vlkd.models.bert import language_model, save_model

    s = scale("smoke", steps=4, save_every=2)
    tokenizer = load_vocabulary(SPECIAL + WORDS, 40)
    folder = tmp_path_factory.mktemp("model") / "m"
    save_model(folder, language_model(s, tokenizer, 0), tokenizer)
    return SimpleNamespace(folder=folder, tokenizer=tokenizer, s=s)


def config(**kw):
    def change(d):
        write_json(d / "config.json", read_json(d / "config.json") | kw)

    return change


def other_words(folder):
    from vlkd.data.text import load_vocabulary

    load_vocabulary([*SPECIAL, "word"], 40).save_pretrained(folder)


def without_tokenizer(folder):
    for file in folder.glob("tok*"):
        file.unlink()


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda d: (d / "config.json").unlink(), "holds no model: config.json is missing"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
        (config(model_type="roberta"), "holds a 'roberta' model"),
        (config(num_hidden_layers=4), "belongs to another architecture"),
        (other_words, "do not belong together"),
        (without_tokenizer, "do not belong together"),
    ],
)
def test_students_that_do_not_fit(model, tmp_path, change, says):
    from vlkd.models.bert import load_model
    from vlkd.train.finetune import classifier

    folder = tmp_path / "m"
    shutil.copytree(model.folder, folder)
    change(folder)
    for load, *args in [(load_model,), (classifier, "sst2", 0), (classifier, "piqa", 0)]:
        with pytest.raises((ValueError, FileNotFoundError)) as e:
            load(folder, *args)
        assert str(folder) in str(e.value) and says in str(e.value)


class Evil:
    "An object whose pickle makes a file when it is loaded."

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pickle_in_the_place_of_weights_is_never_run(model, tmp_path, name):
    import torch

    from vlkd.models.bert import load_model

    folder, evil = tmp_path / "m", Evil(tmp_path / "ran")
    shutil.copytree(model.folder, folder)
    (folder / "model.safetensors").unlink()
    if name.endswith(".bin"):
        torch.save({"bert.x": evil}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(evil))
    with pytest.raises((OSError, ValueError, pickle.UnpicklingError, RuntimeError)):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_task_to_fine_tune_on(model):
    from vlkd.train.finetune import finetune_all

    with pytest.raises(ValueError, match="unknown task 'sst3'; did you mean 'sst2'"):
        finetune_all(model.folder, SimpleNamespace(tasks=("sst2",), s=model.s), "nowhere", tasks=["sst3"])


# Full disks


@unix
@pytest.mark.parametrize("size", [2_000, 250_000, 400_000])
def test_full_disk_while_saving_a_checkpoint(model, tmp_path, size):
    import torch

    from vlkd.data.text import tokenize
    from vlkd.train.text_student import train_student
    from vlkd.train.trainer import last_checkpoint

    sentences = ["the girl dropped the kettle", "it broke", "you did not"] * 8
    tokens = tokenize(model.tokenizer, sentences, 40)
    data = SimpleNamespace(s=model.s, tokenizer=model.tokenizer, sentences=sentences, tokens=tokens)

    def run(out):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            lm = train_student(data, out, steps=4)[0].lm
        return lm.state_dict(), printed.getvalue()

    expected, _ = run(tmp_path / "whole")
    assert forked(lambda: run(tmp_path / "out"), size=size) == 99
    assert (
        last_checkpoint(tmp_path / "out" / "checkpoints") is None
    )  # what there is of it is not taken for one
    weights, printed = run(tmp_path / "out")
    assert "resumes" not in printed
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@unix
def test_full_disk_while_writing_a_record(tmp_path):
    import pandas as pd

    frame = pd.DataFrame(dict(a=range(3000), b="x" * 20))

    def write(out):
        record(out, dict(x=1.0), tables=dict(t=frame), examples=frame)

    write(tmp_path / "whole")
    files = ("tables/t.csv", "examples.parquet", "result.json")
    table, examples, result = ((tmp_path / "whole" / file).stat().st_size for file in files)
    for size in (table // 2, result - 1, min(table, examples) - 1):
        out = tmp_path / str(size)
        assert forked(lambda out=out: write(out), size=size) == 99
        assert list(out.rglob(".*")) == []
        with pytest.raises(FileNotFoundError, match="did not finish"):
            Run(out)
        write(out)
        assert len(Run(out).examples) == 3000


@unix
def test_full_disk_while_saving_a_model(model, tmp_path):
    from vlkd.models.bert import load_model, save_model

    lm, tokenizer = load_model(model.folder)
    weights = (model.folder / "model.safetensors").stat().st_size
    for size in (100, 5_000, weights - 1):
        out = tmp_path / str(size)
        assert forked(lambda out=out: save_model(out, lm, tokenizer), size=size) == 99
        with pytest.raises((OSError, ValueError)):
            load_model(out)


# The command line


@pytest.mark.parametrize(
    "args, says",
    [
        (["reproduce", "m55"], "unknown run or table 'm55'; did you mean 'm5'"),
        (["reproduce", "m5", "--scale", "mikro"], "did you mean 'micro'"),
        (["reproduce", "m5", "--seeds", "a"], "seeds 'a': write a number of worlds (3), a list"),
        (["reproduce", "m5", "--seeds", "99"], "for the single world 99 write"),
        (["reproduce", "m5", "--seeds", "1,1"], "each once"),
        (["reproduce", "m5", "--jobs", "0"], "jobs should be at least 1"),
        (["reproduce", "--sede", "1"], "No such option: --sede"),
        (["report", "--scale", "foo"], "unknown scale 'foo'"),
        (["report", "--seeds", "x"], "seeds 'x'"),
        (["reprdouce"], "No such command"),
        (["extract", "V"], "Missing option '--out'"),
        (["extract", "V", "--out", "O", "--frames", "gird"], "did you mean 'grid'"),
        (["extract", "V", "--out", "O", "--frames", "grid=W"], "grid has no weights"),
        (
            ["extract", "V", "--out", "O", "--frames", "grid", "--fps", "inf"],
            "fps should be more than 0 and finite",
        ),
        (["extract", "V", "--out", "O", "--frames", "grid", "--fps", "1e-9"], "fps should be more than 0"),
        (
            ["extract", "V", "--out", "O", "--frames", "grid", "--rank", "2", "--world-size", "2"],
            "rank should be from 0",
        ),
        (["extract", "V", "--out", "F", "--frames", "grid"], "F: this is a file"),
        (["extract", "V", "--out", "O", "--frames", "tabletop-resnet=W"], "no folder encoders here"),
        (["extract", "V", "--out", "O", "--frames", "timm:foo=F"], "foo"),
        (["extract", "V", "--out", "O", "--frames", "open_clip:foo=F"], "foo"),
        (["extract", "V", "--out", "O", "--frames", "resnet152=F"], ""),
        (["extract", "nowhere", "--out", "O"], "nowhere: no such folder or csv"),
        (["cost", "--gpu", "T5"], "unknown GPU 'T5'"),
        (["cost", "--utilisation", "7"], "utilisation should be a share"),
        (["preflight", "--steps", "-3"], "steps should be at least 1"),
        (["preflight", "--samples", "3"], "at least 50 samples"),
        (["vokens", "T"], "Missing argument"),
        (["vokens", "W", "F", "V", "O"], "config.json is missing"),
    ],
)
def test_slips_on_the_command_line(tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "V").mkdir()
    (tmp_path / "V" / "a.mp4").write_bytes(b"no video")
    (tmp_path / "F").write_text("a file")
    (tmp_path / "W").mkdir()
    for name in ("runs", "reports"):
        monkeypatch.setenv(f"VLKD_{name.upper()}", str(tmp_path / name))
    refused(says, *args)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["F", "V", "W"]


def test_no_command_shows_the_help():
    done = vlkd()
    assert done.code == 2 and "vokens" in done.out and not done.err.strip()


def test_control_characters_do_not_reach_the_terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "v"
    folder.mkdir()
    (folder / "red\x1b[31m.mp4").write_bytes(b"no video")
    done = vlkd("extract", folder, "--out", "out", "--frames", "grid", "--workers", "1")
    assert done.code == 1 and "\\x1b[31m" in done.err
    assert "\x1b" not in done.out + done.err
