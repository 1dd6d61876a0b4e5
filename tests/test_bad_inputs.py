"""What strangers bring along: odd video folders, wrong tables and texts, models that do not fit, full disks, slips on the command line."""

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

ENTAILS = "index\tquestion\tsentence\tlabel\n" + "".join(
    f"{i}\tdoes number {i} walk ?\tsomeone moves\t{'entailment' if i % 2 else 'not_entailment'}\n"
    for i in range(6)
)


def vlkd(*a):
    "Exit code of a command, and what it says."
    from vlkd.tools.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as o, contextlib.redirect_stderr(io.StringIO()) as e:
        try:
            main([str(x) for x in a])
        except SystemExit as x:
            return SimpleNamespace(code=x.code, said=e.getvalue(), out=o.getvalue())


def content(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if not p.name.startswith(".lock")}


def forked(f, *, size=None, after=None):
    "Exit code of `f()` in a process of its own, whose files end at `size` bytes as on a full disk; it is killed `after` seconds, and fails where it has not ended in two minutes."
    if (pid := os.fork()) == 0:
        try:
            with open(os.devnull, "w") as n:
                os.dup2(n.fileno(), 1)
                os.dup2(n.fileno(), 2)
            signal.alarm(
                120
            )  # a fork of a process with threads may wait for a lock that none of its own holds
            if size is not None:
                import resource

                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            f()
            os._exit(0)
        except SystemExit as e:
            os._exit(e.code or 0)
        except BaseException:
            os._exit(99)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


unix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


# Videos


class Late:
    "An encoder of clips that look back: mean colours of three frames."

    name, dim, frames, rate, size, trailing = "late", 9, 3, 1, 16, True

    def encode(self, clips):
        return np.asarray(clips, np.float32).mean((2, 3)).reshape(len(clips), 9) / 255


def film(path, n=16, side=(32, 48)):
    from vlkd.data.video import write_mp4

    x = rng(ascii(path.name)).integers(0, 100, (1, *side, 3)) + np.arange(n)[:, None, None, None] * 100 // n
    return write_mp4(path, x.astype(np.uint8), 8)


def extract(*a, **kw):
    from vlkd.features.encoders import GridPixels
    from vlkd.features.extract import extract_videos

    pytest.importorskip("av", reason="the `video` extra is not installed")
    with contextlib.redirect_stdout(io.StringIO()):
        return extract_videos(*a, **(dict(frames=GridPixels(2), clips=Late(), workers=1, shard_size=2) | kw))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    "A folder of films, two of which cannot be read, and its features."
    pytest.importorskip("av", reason="the `video` extra is not installed")
    v = tmp_path_factory.mktemp("films") / "v"
    v.mkdir()
    for i in range(12):
        film(v / f"{i:02}.mp4", 8 + 8 * (i % 3))
    (v / "03.mp4").write_bytes(b"")
    b = (v / "06.mp4").read_bytes()
    (v / "06.mp4").write_bytes(b[: len(b) // 2])
    extract(v, v.parent / "whole")
    return v


@unix
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_any_moment_and_resumed(films, tmp_path, ranks):
    whole = content(films.parent / "whole")
    begun = time.time()
    extract(films, tmp_path / "timed")
    took = time.time() - begun
    run = lambda r: extract(films, tmp_path / "out", rank=r, world_size=ranks)
    for part in rng("kills", ranks).random(4):
        for r in range(ranks):
            assert forked(lambda: run(r), after=part * took / ranks) in (0, -signal.SIGKILL)
    for r in range(ranks):
        run(r)
    assert content(tmp_path / "out") == whole and content(tmp_path / "timed") == whole


@unix
@pytest.mark.parametrize("size", [100, 300, 900])
def test_full_disk_while_extracting(films, tmp_path, size):
    assert forked(lambda: extract(films, tmp_path / "out"), size=size) == 99
    left = content(tmp_path / "out") if (tmp_path / "out").exists() else {}
    whole = content(films.parent / "whole")
    assert (
        "manifest.json" not in left
        and all(v == whole[k] for k, v in left.items())
        and not any(k.startswith(".") for k in left)
    )
    extract(films, tmp_path / "out")
    assert content(tmp_path / "out") == whole


def test_names_of_files(tmp_path):
    good = film(tmp_path / "a.mp4").read_bytes()
    v = tmp_path / "v"
    v.mkdir()
    names = ["größe 日本 \"'.mp4", "two\nlines.mp4", "UPPER.MP4", ".hidden.mp4"]
    try:
        for n in names:
            (v / n).write_bytes(good)
        Path(os.fsdecode(os.fsencode(v) + b"/latin\xe9.mp4")).write_bytes(good)
        bad = Path(os.fsdecode(os.fsencode(v) + b"/cut\xff.mp4"))
        bad.write_bytes(good[:90])
        (v / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    except OSError:
        pytest.skip("this file system refuses such names")
    feats = extract(v, tmp_path / "out")
    assert set(feats) == {"größe 日本 \"'", "two\nlines", "UPPER", "latin\\xe9"} and all(
        (feats[k] == feats["UPPER"]).all() for k in feats
    )
    assert (
        set(feats.errors) == {"cut\\xff", "gone"}
        and "cut\\xff.mp4: not a readable video file" in feats.errors["cut\\xff"]
        and "gone.mp4: no such video file" in feats.errors["gone"]
    )
    before = content(tmp_path / "out")
    extract(v, tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    film(tmp_path / "v" / "a.mp4")
    (tmp_path / "v" / "locked").mkdir()
    film(tmp_path / "v" / "locked" / "b.mp4")
    scan = os.scandir

    def refuse(p="."):
        if Path(p).name == "locked":
            raise PermissionError(13, "Permission denied", str(p))
        return scan(p)

    monkeypatch.setattr(os, "scandir", refuse)
    r = vlkd("extract", tmp_path / "v", "--out", tmp_path / "out", "--frames", "grid")
    assert (
        r.code == 2
        and "locked: this folder cannot be read (Permission denied)" in r.said
        and not (tmp_path / "out").exists()
    )


def test_odd_sizes_and_pixel_formats(tmp_path):
    av = pytest.importorskip("av", reason="the `video` extra is not installed")
    for name, side, pix in (
        ("odd", (33, 47), "yuv444p"),
        ("half", (33, 47), "yuv420p"),
        ("dot", (2, 2), "yuv444p"),
        ("gray", (32, 48), "gray"),
        ("ten", (32, 48), "yuv420p10le"),
    ):
        with av.open(str(tmp_path / f"{name}.mkv"), "w") as c:
            s = c.add_stream("ffv1", rate=4)
            s.height, s.width = side
            s.pix_fmt = pix
            for i in range(6):
                c.mux(
                    s.encode(
                        av.VideoFrame.from_ndarray(np.full((*side, 3), 90 + i, np.uint8), format="rgb24")
                    )
                )
            c.mux(s.encode())
    feats = extract(tmp_path, tmp_path / "out")
    assert len(feats) == 5 and not feats.errors and not feats.manifest["warnings"]
    for k in feats:
        assert (
            feats[k].shape == (2, 21)
            and np.abs((feats[k][:, :12].astype(float) + 1) * 127.5 - [[90], [94]]).max() < 3
        ), k


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
    r = vlkd("extract", tmp_path / "l.csv", "--out", tmp_path / "out", "--frames", "grid")
    assert (
        r.code == 2
        and f"l.csv, {says}" in r.said
        and r.said.count("\n") == 1
        and not (tmp_path / "out").exists()
    )


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


@pytest.mark.parametrize("cut", [0, 5, 60, -9])
def test_a_gzip_that_is_cut(tmp_path, cut):
    with pytest.raises(
        ValueError,
        match="train.tsv.gz, line 1: the (file is empty|gzip data are broken)"
        if cut < 60 and cut >= 0
        else "train.tsv.gz, line [0-9]+: the gzip data are broken or cut short",
    ):
        qnli(tmp_path, gzip.compress((ENTAILS * 3).encode())[:cut], "train.tsv.gz")


def test_an_unknown_task():
    with pytest.raises(ValueError, match="unknown task 'qnl'; did you mean 'qnli'"):
        read_task("qnl", "anywhere")


# Captions and texts


@pytest.fixture(scope="module")
def howto(tmp_path_factory):
    "A stand-in for HowTo100M, a tokeniser for it and an untrained teacher."
    from vlkd.data.howto100m import write_howto_fixture
    from vlkd.data.public import bert_vocab
    from vlkd.data.text import load_vocabulary
    from vlkd.models.video_text import Teacher

    d = tmp_path_factory.mktemp("howto")
    write_howto_fixture(d, 100, dim=16)
    tok = load_vocabulary(bert_vocab(d), 40)
    Teacher(scale("smoke"), tok, 16, 0).save(d / "teacher", tok)
    return SimpleNamespace(root=d, here=d / "howto100m", teacher=d / "teacher", tok=tok)


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

    c = json.loads((howto.here / "caption.json").read_text())
    v = next(iter(c))
    c[v][key][1] = value
    (tmp_path / "c.json").write_text(json.dumps(c))
    seconds = Features(howto.here / "features").seconds()
    with pytest.raises(ValueError, match=f"c.json, video {v}, caption 1: {says}"):
        caption_table(tmp_path / "c.json", tmp_path / "t", seconds=seconds)
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]
    t = caption_table(tmp_path / "c.json", tmp_path / "t", seconds=seconds, wrong="drop")
    assert len(t) == 99 and t.dropped == {says: 1}


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
    (tmp_path / "a.txt").write_bytes(data)
    r = vlkd(
        "vokens",
        howto.teacher,
        tmp_path / "a.txt",
        howto.here,
        tmp_path / "out",
        "--scale",
        "smoke",
        "--size",
        4,
    )
    assert r.code == 2 and f"{tmp_path / 'a.txt'}" in r.said and says in r.said and r.said.count("\n") == 1
    (tmp_path / "a.txt").write_text("now there is text")
    assert (
        vlkd(
            "vokens",
            howto.teacher,
            tmp_path / "a.txt",
            howto.here,
            tmp_path / "out",
            "--scale",
            "smoke",
            "--size",
            4,
        ).code
        == 0
    )  # nothing of the first try is in the way


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

    (tmp_path / "a.txt").write_bytes(data.encode())
    c = tokenize_corpus(open_text(tmp_path / "a.txt"), howto.tok, tmp_path / "c", max_tokens=40)
    assert len(c) == rows and c.lengths.max() <= 40 and (tokens is None or c.tokens == tokens)
    r = vlkd(
        "vokens",
        howto.teacher,
        tmp_path / "a.txt",
        howto.here,
        tmp_path / "out",
        "--scale",
        "smoke",
        "--size",
        4,
    )
    assert r.code == 0 and f"vokens of {rows} rows from 4 clips" in r.out
    r = vlkd(
        "vokens",
        howto.teacher,
        tmp_path / "a.txt",
        howto.here,
        tmp_path / "out",
        "--scale",
        "smoke",
        "--size",
        3,
    )
    assert r.code == 2 and "holds 4 clips instead of 3" in r.said


# Models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "Folder of a small untrained student, its tokeniser and settings."
    from vlkd.data.text import load_vocabulary
    from vlkd.models.bert import language_model, save_model

    s = scale("smoke", steps=4, save_every=2)
    tok = load_vocabulary(
        [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            "the",
            "a",
            "girl",
            "boy",
            "dropped",
            "kettle",
            "broke",
            "it",
            "you",
            "did",
            "not",
        ],
        40,
    )
    return SimpleNamespace(
        folder=save_model(tmp_path_factory.mktemp("model") / "m", language_model(s, tok, 0), tok),
        tok=tok,
        s=s,
    )


def config(**kw):
    def change(d):
        write_json(d / "config.json", read_json(d / "config.json") | kw)

    return change


def other_words(d):
    from vlkd.data.text import load_vocabulary

    load_vocabulary(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word"], 40).save_pretrained(d)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda d: (d / "config.json").unlink(), "holds no model: config.json is missing"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
        (config(model_type="roberta"), "holds a 'roberta' model"),
        (config(num_hidden_layers=4), "belongs to another architecture"),
        (other_words, "do not belong together"),
        (lambda d: [p.unlink() for p in d.glob("tok*")], "do not belong together"),
    ],
)
def test_students_that_do_not_fit(model, tmp_path, change, says):
    from vlkd.models.bert import load_model
    from vlkd.train.finetune import classifier

    shutil.copytree(model.folder, tmp_path / "m")
    change(tmp_path / "m")
    for f in (
        lambda: load_model(tmp_path / "m"),
        lambda: classifier(tmp_path / "m", "sst2", 0),
        lambda: classifier(tmp_path / "m", "piqa", 0),
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as e:
            f()
        assert str(tmp_path / "m") in str(e.value) and says in str(e.value)


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_a_pickle_in_the_place_of_weights_is_never_run(model, tmp_path):
    import torch

    from vlkd.models.bert import load_model

    for n, (name, write) in enumerate(
        (
            ("model.safetensors", lambda p: p.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))),
            ("pytorch_model.bin", lambda p: torch.save({"bert.x": Evil(tmp_path / "ran")}, p)),
        )
    ):
        d = tmp_path / f"{n}"
        shutil.copytree(model.folder, d)
        (d / "model.safetensors").unlink()
        write(d / name)
        with pytest.raises(Exception):
            load_model(d)
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
    from vlkd.train.checkpoints import last_checkpoint
    from vlkd.train.text_student import train_student

    d = SimpleNamespace(
        s=model.s,
        tokenizer=model.tok,
        sentences=["the girl dropped the kettle", "it broke", "you did not"] * 8,
    )
    d.tokens = tokenize(d.tokenizer, d.sentences, 40)

    def run(out):
        with contextlib.redirect_stdout(io.StringIO()) as o:
            lm = train_student(d, out, steps=4)[0].lm
        return lm.state_dict(), o.getvalue()

    want, _ = run(tmp_path / "whole")
    assert forked(lambda: run(tmp_path / "out"), size=size) == 99
    assert (
        last_checkpoint(tmp_path / "out" / "checkpoints") is None
    )  # the first did not fit: what is there of it is not taken for one
    got, said = run(tmp_path / "out")
    assert "resumes" not in said and all(torch.equal(got[k], want[k]) for k in want)


@unix
def test_full_disk_while_writing_a_record(tmp_path):
    import pandas as pd

    df = pd.DataFrame(dict(a=range(3000), b="x" * 20))
    write = lambda out: record(out, dict(x=1.0), tables=dict(t=df), examples=df)
    write(tmp_path / "whole")
    sizes = [
        (tmp_path / "whole" / k).stat().st_size for k in ("tables/t.csv", "examples.parquet", "result.json")
    ]
    for n, size in enumerate((sizes[0] // 2, sizes[2] - 1, min(sizes[:2]) - 1)):
        assert forked(lambda: write(tmp_path / f"{n}"), size=size) == 99 and not [
            p for p in (tmp_path / f"{n}").rglob(".*")
        ]
        with pytest.raises(FileNotFoundError, match="did not finish"):
            Run(tmp_path / f"{n}")
        write(tmp_path / f"{n}")
        assert len(Run(tmp_path / f"{n}").examples) == 3000


@unix
def test_full_disk_while_saving_a_model(model, tmp_path):
    from vlkd.models.bert import load_model, save_model

    lm, tok = load_model(model.folder)
    big = (model.folder / "model.safetensors").stat().st_size
    for n, size in enumerate((100, 5_000, big - 1)):
        assert forked(lambda: save_model(tmp_path / f"{n}", lm, tok), size=size) == 99
        with pytest.raises((OSError, ValueError)):
            load_model(tmp_path / f"{n}")


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
    (tmp_path / "V" / "a.mp4").write_bytes(b"no film")
    (tmp_path / "F").write_text("a file")
    (tmp_path / "W").mkdir()
    for k in ("runs", "reports"):
        monkeypatch.setenv(f"VLKD_{k.upper()}", str(tmp_path / k))
    r = vlkd(*args)
    assert r.code == 2 and says in r.said and r.said.startswith("vlkd: ") and r.said.count("\n") == 1, r.said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["F", "V", "W"]


def test_no_command_shows_the_help():
    r = vlkd()
    assert r.code == 2 and "vokens" in r.out and not r.said.strip()
