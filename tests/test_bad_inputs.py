"Odd video folders, wrong captions and texts, models that do not fit, full disks, slips on the command line."

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import command, content, forked, quiet, refused

from vlkd.core.files import read_json, rng, write_json
from vlkd.core.settings import scale
from vlkd.data.corpus import open_text, tokenize_corpus
from vlkd.data.howto100m import caption_table, write_fixture
from vlkd.data.public import bert_vocab
from vlkd.data.text import load_vocabulary, tokenize
from vlkd.data.video import Features, write_mp4
from vlkd.features.encoders import GridPixels
from vlkd.features.extract import extract_videos
from vlkd.models.bert import language_model, load_model, save_model
from vlkd.models.video_text import Teacher
from vlkd.train.finetune import classifier, finetune_all
from vlkd.train.text_student import train_student
from vlkd.train.trainer import last_checkpoint

# Videos


class Trailing:
    "An encoder of clips that look back: mean colours of three frames."

    name, dim, frames, rate, size, trailing = "late", 9, 3, 1, 16, True

    def encode(self, clips):
        return np.asarray(clips, np.float32).mean((2, 3)).reshape(len(clips), 9) / 255


def write_video(path, frames=16, side=(32, 48)):
    first = rng(ascii(path.name)).integers(0, 100, (1, *side, 3))
    brighter = np.arange(frames)[:, None, None, None] * 100 // frames
    return write_mp4(path, (first + brighter).astype(np.uint8), 8)


def extract(*args, **kw):
    pytest.importorskip("av", reason="the `video` extra is not installed")
    options = dict(frames=GridPixels(2), clips=Trailing(), workers=1, shard_size=2)
    return quiet(lambda: extract_videos(*args, **options | kw))[0]


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
        ("file,start,end\na.mp4,0,1\n", "line 1: no column 'path'"),
        ("path,start,end\na.mp4,0:01,2\n", "line 2: start should be a number of seconds"),
        ("path,start,end\na.mp4,2,2\n", "line 2: end should be later"),
        ("path;start;end\na.mp4;0;1\n", "line 1: no column 'path'"),
        ("path,start,end\na\0.mp4,0,1\n", "line 2: a NUL character"),
        ("path,start,end\na.mp4,0,inf\n", "line 2: end should be a number"),
        ("", "line 1: the file is empty"),
        ('path,start,end\n"a.mp4,0,1\nb.mp4,0,1\n', "line 2: unexpected end of data"),
    ],
)
def test_lists(tmp_path, text, says):
    (tmp_path / "l.csv").write_text(text)
    command = ["extract", tmp_path / "l.csv", "--out", tmp_path / "out", "--frames", "grid"]
    refused(f"l.csv, {says}", *command)
    assert not (tmp_path / "out").exists()


# Captions and texts


@pytest.fixture(scope="module")
def howto(tmp_path_factory):
    "A synthetic fixture in place of HowTo100M, a tokeniser for it and an untrained teacher."

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
    assert command(*voken_command(howto, tmp_path)).returncode == 0  # nothing of the first try is in the way


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
    text = tmp_path / "a.txt"
    text.write_bytes(data.encode())
    corpus = tokenize_corpus(open_text(text), howto.tokenizer, tmp_path / "c", max_tokens=40)
    assert len(corpus) == rows and corpus.lengths.max() <= 40
    assert tokens is None or corpus.tokens == tokens
    done = command(*voken_command(howto, tmp_path))
    assert done.returncode == 0 and f"vokens of {rows} rows from 4 clips" in done.stdout
    refused("holds 4 clips instead of 3", *voken_command(howto, tmp_path, size=3))


# Models

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "a", "girl", "boy", "dropped", "kettle", "broke", "it", "you", "did", "not"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "Folder of a small untrained student, its tokeniser and settings."

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
    folder = tmp_path / "m"
    shutil.copytree(model.folder, folder)
    change(folder)
    for load, *args in [(load_model,), (classifier, "sst2", 0), (classifier, "piqa", 0)]:
        with pytest.raises((ValueError, FileNotFoundError)) as e:
            load(folder, *args)
        assert str(folder) in str(e.value) and says in str(e.value)


def test_an_unknown_task_to_fine_tune_on(model):
    with pytest.raises(ValueError, match="unknown task 'sst3'; did you mean 'sst2'"):
        finetune_all(model.folder, SimpleNamespace(tasks=("sst2",), s=model.s), "nowhere", tasks=["sst3"])


# Full disks


def test_full_disk_while_saving_a_checkpoint(model, tmp_path):
    sentences = ["the girl dropped the kettle", "it broke", "you did not"] * 8
    tokens = tokenize(model.tokenizer, sentences, 40)
    data = SimpleNamespace(s=model.s, tokenizer=model.tokenizer, sentences=sentences, tokens=tokens)

    def run(out):
        trained, printed = quiet(lambda: train_student(data, out, steps=4)[0])
        return trained.lm.state_dict(), printed

    expected, _ = run(tmp_path / "whole")
    for size in (2_000, 250_000, 400_000):
        out = tmp_path / str(size)
        assert forked(lambda out=out: run(out), size=size) == 99
        assert last_checkpoint(out / "checkpoints") is None, "what there is of it is taken for one"
        weights, printed = run(out)
        assert "resumes" not in printed
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


# The command line


EXTRACT = [
    ("gird", "did you mean 'grid'"),
    ("resnet125", "did you mean 'resnet152'"),
    ("none", "nothing to extract"),
    ("grid=W", "grid has no weights"),
    ("grid --fps 0", "fps should be more than 0"),
    ("grid --fps inf", "fps should be more than 0 and finite"),
    ("grid --fps 1e-9", "fps should be more than 0"),
    ("grid --rank 2 --world-size 2", "rank should be from 0"),
    ("grid --clips resnext152 --weights W", "looked for resnext3d_152"),
    ("grid --clips resnext3d=V/a.mp4", "a.mp4: not a readable weights file"),
    ("resnet152 --weights W", "no weights here; looked for resnet152"),
    ("tabletop-2d=W", "no folder encoders here"),
    ("timm:foo=F", "foo"),
    ("open_clip:foo=F", "foo"),
    ("resnet152=F", ""),
]


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
        (["extract", "V", "--out", "F", "--frames", "grid"], "F: this is a file"),
        (["extract", "nowhere", "--out", "O"], "nowhere: no such folder or csv"),
        *((["extract", "V", "--out", "O", "--frames", *options.split()], says) for options, says in EXTRACT),
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
    done = command()
    assert done.returncode == 2 and "vokens" in done.stdout and not done.stderr.strip()


def test_control_characters_do_not_reach_the_terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "v"
    folder.mkdir()
    (folder / "red\x1b[31m.mp4").write_bytes(b"no video")
    done = command("extract", folder, "--out", "out", "--frames", "grid", "--workers", "1")
    assert done.returncode == 1 and "\\x1b[31m" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
