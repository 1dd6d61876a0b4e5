"""Files that were valid and then changed anywhere.

Every reader gives what it always gives, or an error that names the file. Never a KeyError, TypeError,
IndexError or AttributeError, never an endless wait."""

import contextlib
import copy
import gzip
import io
import json
import os
import re
import shutil
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_squad import made
from test_tasks import FILE, GOOD
from test_vcr import an_item, lexicon_rows
from test_vl_tasks import a_line, a_question

from vlkd.core.files import CHECKSUMS, read_json, rng, write_json
from vlkd.core.records import Run, record
from vlkd.core.settings import path, preset, scale, scales
from vlkd.data.catalog import cards
from vlkd.data.corpus import open_text
from vlkd.data.howto100m import caption_table, howto_videos, read_captions
from vlkd.data.public import (
    bert_vocab,
    flickr8k_captions,
    flickr8k_features,
    held_out_photos,
    photo_splits,
    squad_articles,
    wikitext_articles,
)
from vlkd.data.squad import read_squad
from vlkd.data.tasks import TASKS, read_task
from vlkd.data.text import load_vocabulary
from vlkd.data.vcr import load_vcr, write_vcr
from vlkd.data.video import Features, read_frames, read_photos, write_mp4
from vlkd.data.vl_tasks import load_daquar, load_esnlive, load_snli_ve, load_vqa, write_vqa
from vlkd.data.wordnet import read_wordnet
from vlkd.eval.claims import read_claims
from vlkd.features.encoders import load_mobilenet
from vlkd.features.extract import find_videos
from vlkd.features.video3d import read_weights
from vlkd.models.bert import language_model, load_model, save_model
from vlkd.reproduce.plan import load_plan, notebook_parameters

ROOT = Path(__file__).resolve().parents[2]
fuzz = settings(
    max_examples=60,
    phases=(Phase.explicit, Phase.generate),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

# Changes

TOKENS = [b"", b"\0", b"\xff", b'"', b"'", b"\n", b"\r\n", b"\t", b",", b"=", b"[", b"]", b"{", b"}", b"[["]
TOKENS += [b"NaN", b"-1", b"0", b"1e999", b"null", b"true", b"9" * 20, b"9" * 5000, b"[" * 3000, b"x"]
TOKENS += [b"\xed\xa0\x80", b"\\ud800", b"\xef\xbb\xbf", "é\u2028".encode()]
ASSIGNED = [b" 3", b" 'a'", b" [1, 'a']", b' ["x"]', b" {a = 1}", b" 1.5", b" true", b" []", b" nan"]
ASSIGNED += [b" 2001-01-01", b" !!python/name:os.system"]
VALUES = [None, True, -1, 0, 1.5, 10**30, float("nan"), float("inf"), "", "x", "é\0"]
VALUES += [[], {}, [[]], [1], ["x"], [None], {"a": []}]


def places(tree, at=()):
    "Paths of all nodes of a JSON tree."
    yield at
    keys = dict(enumerate(tree)) if isinstance(tree, list) else tree
    for key in keys if isinstance(keys, dict) else ():
        yield from places(tree[key], (*at, key))


def changed_tree(tree, draw):
    "A JSON tree with one node changed, removed, doubled or renamed."
    place = draw(st.sampled_from(list(places(tree))))
    tree = copy.deepcopy(tree)
    value = draw(st.sampled_from(VALUES))
    how = draw(st.sampled_from(["value", "value", "gone", "twice", "name"]))
    if not place:
        return value
    *above, key = place
    node = tree
    for step in above:
        node = node[step]
    if how == "value":
        node[key] = value
    elif how == "gone":
        del node[key]
    elif isinstance(node, list):
        node.insert(key, copy.deepcopy(node[key]))
    elif how == "name":
        node[key + "x"] = node.pop(key)
    else:
        node[key] = [node[key]]
    return tree


def with_changed_tree(data: bytes, draw) -> bytes:
    "JSON, or a line of it, with a node changed; ValueError where it is none."
    try:
        tree = changed_tree(json.loads(data), draw)
        return json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except ValueError:
        rows = data.split(b"\n")
        k = draw(st.integers(0, len(rows) - 1))
        rows[k] = json.dumps(changed_tree(json.loads(rows[k]), draw)).encode()
        return b"\n".join(rows)


def with_changed_value(data: bytes, draw) -> bytes:
    "A value after `=` or `:`, or a cell of a table, replaced; ValueError where there is none."
    found = list(re.finditer(rb"(?<=[=:,\t ])[^=:,\t\n]+", data))
    if not found:
        raise ValueError("no values")
    match = draw(st.sampled_from(found))
    return data[: match.start()] + draw(st.sampled_from(TOKENS + ASSIGNED)) + data[match.end() :]


def with_changed_lines(data: bytes, draw) -> bytes:
    rows = data.split(b"\n")
    i, j = draw(st.integers(0, len(rows) - 1)), draw(st.integers(0, len(rows) - 1))
    how = draw(st.sampled_from(["gone", "twice", "moved", "cut"]))
    if how == "cut":
        return b"\n".join(rows[:i])
    row = rows[i] if how == "twice" else rows.pop(i)
    if how != "gone":
        rows.insert(j, row)
    return b"\n".join(rows)


def with_changed_bytes(data: bytes, draw) -> bytes:
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(out)))
        out[at : at + draw(st.integers(0, 8))] = draw(st.sampled_from(TOKENS) | st.binary(max_size=6))
    return bytes(out)


CHANGES = [
    *(with_changed_bytes, with_changed_bytes, with_changed_lines),
    *(with_changed_value, with_changed_tree, with_changed_tree),
]


def changed(data: bytes, draw) -> bytes:
    "Bytes with a few changes: of single places, of lines, of values, or of nodes where they are JSON."
    change = draw(st.sampled_from(CHANGES))
    try:
        return change(data, draw)
    except ValueError:
        return with_changed_bytes(data, draw)


# Readers: a folder with valid files, the files to change, and what reads them


def tasks(d):
    name = next(n for n in sorted(TASKS, key=len, reverse=True) if d.name.startswith(n))
    return read_task(name, d, "dev")


def json_lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def task_files() -> dict:
    readers = {}
    for name, data in GOOD.items():
        copies = 2 if name in ("piqa", "tracie") else 1
        readers[name] = ({FILE[name]: data * copies}, tasks)
    texts = dict(startphrase="a", ending0="b", ending1="c", ending2="d", ending3="e")
    swag = [{**texts, "label": i, "fold-ind": str(i), "video-id": "v"} for i in range(3)]
    piqa = [dict(goal="g", sol1="a", sol2="b", label=i, id=str(i)) for i in range(2)]
    groups = b"id\tgroup\tkind\n0\tg\t\n1\tg\tx\n"
    readers["swag-jsonl"] = ({"val.jsonl": json_lines(swag)}, tasks)
    readers["piqa-groups"] = ({"valid.jsonl": json_lines(piqa), "valid-groups.tsv": groups}, tasks)
    return readers


CAPTIONS = {f"v{i}": dict(start=[0.5, 2], end=[2, 4.5], text=["cut the wood", "naïve"]) for i in range(3)}
CAPTION_ROWS = b'start,end,text\n0.5,2,"cut, the wood"\n2,4,more\n'


def captions(d):
    rows = list(read_captions(d / "c.json"))
    list(read_captions(d / "csv"))
    for wrong in ("error", "drop"):
        shutil.rmtree(d / "out", ignore_errors=True)
        try:
            table = caption_table(d / "c.json", d / "out", wrong=wrong, seconds=dict.fromkeys(CAPTIONS, 5.0))
            assert len(table.texts) == len(table.start) and np.isfinite(table.end).all()
        finally:
            shutil.rmtree(d / "out", ignore_errors=True)
    return rows


def listed(d):
    videos = find_videos(d / "list.csv")
    assert all(video.path.is_absolute() for video in videos.values())
    return videos


def plan(d):
    entries = load_plan(d / "plan.toml")
    assert all(isinstance(entry["needs"], list) and entry["file"].is_file() for entry in entries.values())
    return entries


CELL = dict(cell_type="code", id="b", metadata=dict(tags=["parameters"]), execution_count=None, outputs=[])
CELL["source"] = """\
scale: str = "smoke"
seed: int = 0
seeds: str = ""
out: str = ""
inputs: str = ""
lr: float = 0.1
"""
TITLE = dict(cell_type="markdown", id="a", metadata={}, source=["# t"])
NOTEBOOK = json.dumps(dict(cells=[TITLE, CELL], metadata={}, nbformat=4, nbformat_minor=5)).encode()
PLAN = b"""\
[[run]]
id = "a"
notebook = "a.ipynb"
params = { lr = 0.5 }
at = { micro = { lr = 0.25 } }
minutes = 2
[[run]]
id = "b"
notebook = "a.ipynb"
needs = ["a"]
after = ["a"]
scales = ["smoke", "micro"]
[[table]]
id = "t"
notebook = "a.ipynb"
title = "T"
claim = "c"
needs = ["a", "b"]
main = true
data = ["squad"]
"""


def ini(d):
    with swapped_env(VLKD_SETTINGS=str(d / "settings.ini")):
        scale("micro", "base")
        for name in ("paper", "released", "tuned"):
            preset(name)
        for name in ("runs", "reports", "nbs"):
            path(name)
        return {name: scale(name) for name in scales()}


def flickr(d):
    splits = photo_splits(retrieval=1, root=d)
    held_out_photos(root=d)
    flickr8k_features(splits["train"], d)
    return flickr8k_captions(d)


def articles(d):
    bert_vocab(d)
    return [*squad_articles(d), *wikitext_articles(d)]


def text(d):
    return [line for clean in ("plain", "wikitext") for line in open_text(d / "text", clean=clean)]


def saved(save, *args, **options) -> bytes:
    file = io.BytesIO()
    save(file, *args, **options)
    return file.getvalue()


def mobilenet(d):
    return load_mobilenet(d).encode(np.zeros((1, 224, 224, 3), np.uint8))


SPEC = [
    dict(op="CONV_2D", w="c.w", b="c.b", act=3, pad=0, stride=2, **{"in": [0], "out": [1]}),
    dict(op="MEAN", **{"in": [1], "out": [2]}),
]
CONVOLUTION = {"c.w": np.ones((2, 3, 3, 3), np.float32), "c.b": np.zeros(2, np.float32)}
MOBILENET = saved(np.savez, **CONVOLUTION, spec_json=np.frombuffer(json.dumps(SPEC).encode(), np.uint8))


def weights(d):
    for name in WEIGHTS:
        state, _ = read_weights(d / name)
        assert all(hasattr(value, "shape") for value in state.values())
    return state


WEIGHTS = {
    "w.pt": saved(lambda file: torch.save({"state_dict": {"module.a": torch.ones(3, 2)}}, file)),
    "w.safetensors": save({"a": torch.ones(3, 2)}, {"config": '{"depth": 50}'}),
}


def photo(d):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels, times = read_photos([d / "a.png", d / "b.jpg"], size=8)
    assert pixels.dtype == np.uint8 and pixels.shape == (2, 8, 8, 3) and len(times) == 2
    return pixels


def image(kind) -> bytes:
    pixels = rng(kind).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    return saved(lambda file: Image.fromarray(pixels).save(file, kind))


def video(d):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels, times = read_frames(d / "a.mp4", size=8, max_frames=8)
    assert pixels.dtype == np.uint8 and 1 <= len(pixels) == len(times) <= 8
    return pixels


def a_video(folder):
    write_mp4(folder / "a.mp4", rng("v").integers(0, 255, (6, 16, 16, 3)).astype(np.uint8), 2)


def features(d):
    found = Features(d / "f")
    found.seconds()
    return [np.asarray(found[name]) for name in found]


def record_of(d):
    run = Run(d / "r")
    return run.metrics, run.table("t"), run.examples


def student(d):
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return load_model(d / "m")


def files_in(folder) -> dict:
    found = sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith(".lock"))
    return {str(f.relative_to(folder)): f.read_bytes() for f in found}


def a_student(d):
    tokenizer = load_vocabulary("[PAD] [UNK] [CLS] [SEP] [MASK] the a girl".split(), 40)
    small = scale("smoke", hidden=8, heads=2, layers=1, intermediate=8)
    save_model(d / "m", language_model(small, tokenizer, 0), tokenizer)
    (d / "m" / CHECKSUMS).unlink()  # from elsewhere: without checksums


def a_record(d):
    table, examples = pd.DataFrame(dict(a=[1, 2])), pd.DataFrame(dict(b=[1.0]))
    record(d / "r", dict(x=1.0), tables=dict(t=table), examples=examples)


@contextlib.contextmanager
def swapped_env(**kw):
    old = {k: os.environ.get(k) for k in kw}
    os.environ.update(kw)
    try:
        yield
    finally:
        for name in kw:
            del os.environ[name]
        os.environ.update({name: value for name, value in old.items() if value is not None})


def packed(text: str) -> bytes:
    return gzip.compress(text.encode(), mtime=0)


PHOTOS = [f"{i}.jpg" for i in range(9)]
PHOTO_FEATURES = dict(
    feats_u8=np.ones((9, 4), np.uint8), scale=np.ones(4, np.float32), files=np.array(PHOTOS)
)
FLICKR = {
    "flickr8k/captions.jsonl": json_lines(dict(image=name, captions=["a man ."]) for name in PHOTOS),
    "flickr8k/mbv2_pool1280_u8.npz": saved(np.savez, **PHOTO_FEATURES),
    **{f"flickr8k/itm_{s}.tsv": b"1.jpg\ta man .\tmatch\n" for s in ("dev", "test")},
    **{f"flickr8k/esnlive_{s}_flickr8k.jsonl": b'{"image": "2.jpg"}\n' for s in ("dev", "test")},
}
ARTICLE = dict(title="T", paragraphs=[dict(context="Cork floats on water.")])
ARTICLES = {
    "squad/train-v1.1.json.gz": packed(json.dumps(dict(data=[ARTICLE]))),
    "wikitext/wikitext-2.train.raw": b" = T = \n \n Cork floats . \n",
    "tokenizer_vocabs/bert-base-uncased-vocab.txt.gz": packed("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n"),
}
TEXT = "Cork floats.\n\n = T = \nnaïve @-@ text\n".encode()


def vcr_files(folder):
    write_vcr([an_item(), an_item("val-1", metadata_fn="b.json")], folder, "val")


def vcr(d):
    items = load_vcr(d, "val")
    assert all(len(item["boxes"]) == len(item["objects"]) for item in items)
    assert all(len(item["answer_choices"]) == 4 > item["answer_label"] >= 0 for item in items)
    return items


def vqa_files(folder):
    write_vqa([a_question(), a_question(2)], folder, "val")


def vqa(d):
    items = load_vqa(d, "val")
    assert all(len(item["answers"]) == 10 for item in items)
    return items


def snli_ve(d):
    items = load_snli_ve(d, "dev")
    assert all(item["label"] in (0, 1, 2) and item["hypothesis"].strip() for item in items)
    return items


EXPLAINED = dict(image="7.jpg", pair_id="7#0", hypothesis="A cat.", label="neutral", explanation="So.")
ESNLI_ROWS = (
    b',pairID,Flickr30kID,hypothesis,gold_label,explanation\n0,7#0,7.jpg,"A cat, a dog.",neutral,So.\n'
)
DAQUAR_ROWS = b'question,answer,image_id\nwhat is it,lamp,image1\nwhat is on it,"cup, jar",image2\n'


def some_claims() -> bytes:
    "The defaults and the first claims of the ledger."
    data = (ROOT / "nbs/experiments/vidlankd/claims.toml").read_bytes()
    _, head, rest = data.partition(b"[defaults]\n")
    return (head + rest)[:3000].rpartition(b"[[table.m5.claim]]")[0]


def a_checked_file(folder):
    write_json(folder / "a.json", dict(a=[1, 2.5], b={"c": "x"}), checksum=True)


# name -> (files, or what writes them into a folder; what reads them)
READERS = dict(
    json=({"a.json": b'{"a": [1, 2.5, null], "b": {"c": "x"}}'}, lambda d: read_json(d / "a.json")),
    checked=(a_checked_file, lambda d: read_json(d / "a.json")),
    squad=(
        {"dev-v2.0.json": json.dumps(made("2.0", kind="k"), indent=1).encode()},
        lambda d: read_squad(d, "dev", "2.0"),
    ),
    captions=({"c.json": json.dumps(CAPTIONS).encode(), "csv/v0.csv": CAPTION_ROWS}, captions),
    howto=(
        {"h.csv": b'video_id,category_1,rank,task_id\nv0,"Home, garden",1,7\nv1,Home,2,8\n'},
        lambda d: howto_videos(d / "h.csv"),
    ),
    videos=({"list.csv": b'path,start,end,id\na.mp4,1,3,x\nb.mp4,,,\n"c d.mp4",0.5,,y\n'}, listed),
    card=({"squad.md": (ROOT / "data_cards/squad.md").read_bytes()}, cards),
    plan=({"plan.toml": PLAN, "a.ipynb": NOTEBOOK}, plan),
    notebook=({"a.ipynb": NOTEBOOK}, lambda d: notebook_parameters(d / "a.ipynb")),
    claims=({"claims.toml": some_claims()}, lambda d: read_claims(d / "claims.toml")),
    settings=({"settings.ini": (ROOT / "settings.ini").read_bytes()}, ini),
    flickr=(FLICKR, flickr),
    articles=(ARTICLES, articles),
    vcr=(vcr_files, vcr),
    vqa=(vqa_files, vqa),
    snli_ve=({"snli_ve_dev.jsonl": json_lines([a_line(), a_line(pairID="b")])}, snli_ve),
    esnlive_photos=(
        {"esnlive_dev_flickr8k.jsonl": json_lines([EXPLAINED, EXPLAINED | dict(pair_id="b")])},
        lambda d: load_esnlive(d, "dev"),
    ),
    esnlive=({"test.csv": ESNLI_ROWS}, lambda d: load_esnlive(d, "test")),
    daquar=({"official_test.csv": DAQUAR_ROWS}, lambda d: load_daquar(d, "test")),
    wordnet=(
        dict(zip(("entries.jsonl", "synsets.jsonl"), map(json_lines, lexicon_rows()), strict=True)),
        read_wordnet,
    ),
    text=({"text/a.txt": TEXT, "text/b.txt.gz": packed("More text.\n")}, text),
    mobilenet=({"mobilenet_v2_imagenet_fp16.npz": MOBILENET}, mobilenet),
    weights=(WEIGHTS, weights),
    photo=({"a.png": image("PNG"), "b.jpg": image("JPEG")}, photo),
    video=(a_video, video),
    features=(
        {f"f/{name}.npy": saved(np.save, np.ones((n, 4), np.float16)) for name, n in dict(a=3, b=2).items()},
        features,
    ),
    record=(a_record, record_of),
    student=(a_student, student),
    **task_files(),
)
QUICK = dict(student=15, weights=30, video=30, mobilenet=20)  # slow readers get fewer examples


def schema(x):
    "What must not change: types, columns."
    return list(x.columns) if isinstance(x, pd.DataFrame) else type(x)


def write(folder: Path, files: dict) -> None:
    for name, data in files.items():
        f = folder / name
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_bytes(data)


@contextlib.contextmanager
def at_most(seconds: int):
    "TimeoutError where the block takes longer."

    def late(*_):
        raise TimeoutError("it never ends")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", READERS)
def test_changed_files(name, tmp_path):
    if name == "video":
        pytest.importorskip("av", reason="the `video` extra is not installed")
    files, read = READERS[name]
    if callable(files):
        (tmp_path / "made").mkdir()
        files(tmp_path / "made")
        files = files_in(tmp_path / "made")
    folder = tmp_path / name
    write(folder, files)
    wanted = schema(read(folder))  # they are valid before the change
    names = {n for k in files for n in (Path(k).name, str((folder / k).parent))}

    @settings(fuzz, max_examples=QUICK.get(name, 60))
    @given(st.data())
    def change_and_read(data):
        victim = data.draw(st.sampled_from(sorted(files)))
        write(folder, {**files, victim: changed(files[victim], data.draw)})
        try:
            with at_most(20):
                got = read(folder)
        except (ValueError, FileNotFoundError) as e:
            assert any(n in str(e) for n in names), f"{victim} is not named: {e!r}"
        else:
            assert name in ("json", "checked") or schema(got) == wanted

    change_and_read()
