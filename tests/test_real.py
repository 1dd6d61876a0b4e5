"""The real corpora: splits that do not leak, features that are where they belong, and inputs that break."""

import gzip
import json
import re
from collections import Counter

import numpy as np
import pytest
from real_files import write_real_files

from vlkd.core.records import Run
from vlkd.core.settings import data_dir, scale
from vlkd.data.colours import COLOUR_WORDS
from vlkd.data.public import (
    bert_vocab,
    flickr8k_features,
    held_out_photos,
    photo_splits,
    real_pairs,
    real_retrieval,
    real_sentences,
    squad_articles,
)
from vlkd.data.readers import json_document, sentences
from vlkd.data.text import load_vocabulary
from vlkd.reproduce.run import reproduce
from vlkd.train.sources import load_data

ROOT = data_dir(need=False)
real = pytest.mark.skipif(ROOT is None, reason="VLKD_DATA is not set")


@pytest.fixture(scope="module")
def pairs():
    return real_pairs()


@real
def test_held_out_photos_leave_what_the_index_says():
    parts, held = photo_splits(), held_out_photos()
    every = set().union(*parts.values())
    assert sum(map(len, parts.values())) == len(every) == 6845 and not every & held
    assert len(parts["retrieval"]) == 1000
    tables = [ROOT / f"flickr8k/itm_{split}.tsv" for split in ("dev", "test")]
    lines = [line for file in tables for line in file.read_text(encoding="utf-8").splitlines()]
    named = {line.split("\t")[0] for line in lines}
    assert named <= held and not named & every


@real
def test_pairs_and_retrieval_do_not_share_photos_and_limits_nest():
    found, again = (real_pairs(limit=1000) for _ in range(2))
    test = real_retrieval()
    assert not set(found.names) & set(test.names) and len(found.train) == 1000
    assert found.features.dtype == np.float16 and found.features.shape[1:] == (1, 1280)
    assert test.features.shape == (1000, 1, 1280) and len(test.captions) == 5000
    assert np.array_equal(found.train, again.train) and np.array_equal(found.valid, again.valid)
    x = found.features[np.unique(found.clip[found.train])].astype(np.float32)
    assert np.isfinite(x).all() and x.min() >= 0 and x.max() <= 6.01  # means of ReLU6


@real
def test_captions_belong_to_their_photos(pairs):
    "Ridge regression from words to features finds photos; it would not if the two were out of step."
    test = real_retrieval()
    captions = [pairs.captions[i] for i in pairs.train]
    counts = Counter(word for caption in captions for word in set(caption.lower().split()))
    by_count = sorted(counts, key=lambda word: (-counts[word], word))
    at = {word: i for i, word in enumerate(by_count[:600])}

    def bags(captions):
        x = np.zeros((len(captions), len(at) + 1), np.float32)
        x[:, -1] = 1
        for i, caption in enumerate(captions):
            x[i, [at[word] for word in set(caption.lower().split()) if word in at]] = 1
        return x

    x, y = bags(captions), pairs.features[pairs.clip[pairs.train], 0].astype(np.float32)
    weights = np.linalg.solve(x.T @ x + 100 * np.eye(x.shape[1], dtype=np.float32), x.T @ y)
    queries, photos = bags(test.captions) @ weights, test.features[:, 0].astype(np.float32)
    queries -= queries.mean(0)
    queries, photos = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, photos))
    scores = queries @ photos.T
    rank = (scores > scores[np.arange(len(scores)), test.clip][:, None]).sum(1)
    assert (rank < 10).mean() > 0.1, (rank < 10).mean()  # chance: 0.01


@real
def test_published_features_are_dequantised():
    with np.load(ROOT / "flickr8k/mbv2_pool1280_u8.npz") as published:
        name = str(published["files"][7])
        wanted = published["feats_u8"][7] * published["scale"]
    found = flickr8k_features([name])[0]
    assert np.allclose(found, wanted) and found.min() >= 0 and found.max() <= 6.01  # means of ReLU6


@real
def test_sentences_are_clean_and_disjoint():
    train, valid = real_sentences(limit=2000)
    assert len(train) == 2000 and len(valid) > 500
    assert not any("<unk>" in s or s.startswith("=") or len(s.split()) < 4 for s in train + valid)
    other, same = real_sentences(1, limit=2000)
    assert same == valid and train != other
    articles = json_document(ROOT / "squad/dev-v1.1.json.gz")["data"]
    contexts = (" ".join(p["context"].split()) for article in articles for p in article["paragraphs"])
    dev = {sentence.casefold() for context in contexts for sentence in sentences(context)}
    assert not {s.casefold() for s in train} & (dev | {s.casefold() for s in valid})


@real
def test_bert_vocabulary_is_the_published_one():
    words = bert_vocab()
    tok = load_vocabulary(words, 32)
    assert len(words) == 30522 and words.index("[PAD]") == 0
    assert words[100:104] == ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tok("Hello, world!")["input_ids"] == [101, 7592, 1010, 2088, 999, 102]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    return write_real_files(tmp_path_factory.mktemp("real"))


@pytest.fixture
def source(made_up, monkeypatch, tmp_path):
    "Made-up files as a source."
    monkeypatch.setenv("VLKD_DATA", str(made_up))
    monkeypatch.setenv("VLKD_CACHE", str(tmp_path))
    return load_data(scale("real-smoke"), 1)


def says_colour(noun, text):
    words = set(re.findall("[a-z]+", text.lower()))
    return {noun, f"{noun}s"} & words and {*COLOUR_WORDS, "grey"} & words


def check_deleted(source):
    "Nothing that is read tells the colour of a deleted noun, and something did."
    nouns = source.colours
    deleted = nouns.noun[nouns.kind == "video-only"]
    pairs = source.pairs
    read = [*source.sentences, *pairs.captions]
    before = [*source.texts[0], *real_pairs(retrieval=source.s.clip_pool, root=source.root).captions]
    assert len(deleted) and (nouns.kind == "stated").any()
    told = [any(says_colour(noun, text) for text in before) for noun in deleted]
    assert np.mean(told) > 0.9  # captions of Flickr30k alone tell some
    for noun in deleted:
        assert not any(says_colour(noun, text) for text in read), noun
    assert set(nouns.noun) <= set(source.vocabulary)
    assert not set(pairs.names) & set(source.photos.names)
    tested = {f"flickr8k/{name}" for name in held_out_photos(source.root)}
    assert not tested & {*pairs.names, *source.photos.names}


def test_colours_of_deleted_nouns_are_told_nowhere(source):
    check_deleted(source)
    colours = dict(zip(source.colours.noun, source.colours.colour, strict=True))
    assert colours["boat"] == "red" and colours["kite"] == "blue"


@real
def test_colours_of_the_real_files(monkeypatch, tmp_path):
    monkeypatch.setenv("VLKD_CACHE", str(tmp_path))
    source = load_data(scale("real", vocab_size=1000), 1)
    check_deleted(source)
    assert source.colours.kind.eq("video-only").sum() > 100
    colours = dict(zip(source.colours.noun, source.colours.colour, strict=True))
    assert colours["grass"] == "green" and colours["snow"] == "white"


def test_a_source_without_photos_names_the_file(made_up, monkeypatch, tmp_path):
    monkeypatch.setenv("VLKD_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"train-v1\.1\.json"):
        _ = load_data(scale("real-smoke"), 1).sentences


def test_the_page_of_real_data_from_made_up_files(made_up, monkeypatch, tmp_path):
    "Teacher, students, endpoints and page run from end to end."
    for name, folder in dict(DATA=made_up, CACHE=tmp_path / "cache", RUNS=tmp_path / "runs").items():
        monkeypatch.setenv(f"VLKD_{name}", str(folder))
    monkeypatch.setenv("VLKD_REPORTS", str(tmp_path / "reports"))
    result = reproduce(["real"], scale="real-smoke", seeds="1,", jobs=2)
    assert not result["failed"] and not result["skipped"]
    run = Run(tmp_path / "runs/real-smoke/real@1")
    assert run.result["private"] is False
    rows = {"real-text", "real-best", "real-regression", "real-teacher"}
    assert rows <= set(run.table("accuracy").run)
    best = Run(tmp_path / "runs/real-smoke/real-best@1").examples
    tasks = {"esnli_ve", "qnli", "sst2", "retrieval-photo", "colour-word", "colour-probe"}
    assert set(best.task) == tasks and set(best.run) == {"real-best"}
    assert set(best.kind[best.task == "colour-probe"]) == {"video-only", "stated"}


def flickr(root):
    "The smallest flickr8k folder that `photo_splits` reads."
    names, folder = [f"{i}.jpg" for i in range(9)], root / "flickr8k"
    folder.mkdir(parents=True)
    lines = [json.dumps(dict(image=name, captions=["a man ."])) + "\n" for name in names]
    (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    for split in ("dev", "test"):
        (folder / f"itm_{split}.tsv").write_text("1.jpg\ta man .\tmatch\n")
        (folder / f"esnlive_{split}_flickr8k.jsonl").write_text('{"image": "2.jpg"}\n')
    arrays = dict(feats_u8=np.ones((9, 4), np.uint8), scale=np.ones(4, np.float32), files=np.array(names))
    np.savez(folder / "mbv2_pool1280_u8.npz", **arrays)
    return folder


BROKEN = [
    ("captions.jsonl", b'{"image": "1.jpg", "captions": []}\n{"image"', ", line 2: not JSON"),
    ("captions.jsonl", b'{"image": "1.jpg"}\n', ", line 1: no list of texts under 'captions'"),
    ("captions.jsonl", b"[1]\n", ", line 1: expected an object"),
    ("captions.jsonl", b"", ": no rows"),
    ("captions.jsonl", b'{"image": "1.jpg", "captions": ["\xff"]}\n', ", line 1: not UTF-8"),
    ("itm_dev.tsv", b"1.jpg\ta man\tmatch\n1.jpg\ta man\n", ", line 2: 2 fields, expected 3"),
    ("itm_test.tsv", None, ": this file is missing"),
    ("esnlive_dev_flickr8k.jsonl", b"{}\n", ", line 1: no text under 'image'"),
    ("mbv2_pool1280_u8.npz", b"PK\x03\x04 not a zip", ": not an npz file"),
    ("mbv2_pool1280_u8.npz", None, ": this file is missing"),
]


@pytest.mark.parametrize("name, content, message", BROKEN)
def test_broken_inputs_are_named(tmp_path, name, content, message):
    folder = flickr(tmp_path)

    def read():
        return real_pairs(retrieval=1, root=tmp_path)

    assert len(read().names) == 6  # it works before the damage
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(name + message)):
        read()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[: len(data) // 2], "broken or cut short"),
        (lambda data: data[:-8] + bytes(8), "broken or cut short"),
        (lambda data: b"", "not SQuAD's layout|not JSON"),
    ],
)
def test_broken_gzip_is_named(tmp_path, damage, message):
    contexts = [[dict(context=f"Sentence number {i} is here.")] for i in range(300)]
    text = json.dumps(dict(data=[dict(title="T", paragraphs=paragraphs) for paragraphs in contexts]))
    (tmp_path / "squad").mkdir()
    packed = gzip.compress(text.encode(), mtime=0)
    (tmp_path / "squad/train-v1.1.json.gz").write_bytes(damage(packed))
    with pytest.raises(ValueError, match=rf"train-v1\.1\.json\.gz.*({message})"):
        list(squad_articles(tmp_path))
