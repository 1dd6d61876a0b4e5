"""The real corpora: splits that do not leak, features that are where they belong, and inputs that break."""

import gzip
import json
import re
from collections import Counter

import numpy as np
import pytest

from vlkd.core.settings import data_dir, path
from vlkd.data.public import (
    bert_vocab,
    exercise_clips,
    flickr8k_features,
    held_out_photos,
    msvd_clips,
    photo_splits,
    real_pairs,
    real_retrieval,
    real_sentences,
    squad_articles,
)
from vlkd.data.readers import json_document, sentences
from vlkd.data.text import load_vocabulary

ROOT = data_dir(need=False)
real = pytest.mark.skipif(ROOT is None, reason="VLKD_DATA is not set")


@pytest.fixture(scope="module")
def pairs():
    return real_pairs(sources=["flickr8k"])


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
    found, again = (real_pairs(sources=["flickr8k"], limit=1000) for _ in range(2))
    test = real_retrieval()
    assert not set(found.names) & set(test.names) and len(found.train) == 1000
    assert found.features.dtype == np.float16 and found.features.shape[1:] == (1, 1280)
    assert test.features.shape == (1000, 1, 1280) and len(test.captions) == 5000
    assert np.array_equal(found.train, again.train) and np.array_equal(found.valid, again.valid)
    x = found.features[np.unique(found.clip[found.train])].astype(np.float32)
    assert np.isfinite(x).all() and abs(x.mean()) < 0.1 and 0.7 < x.std() < 1.5


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
def test_exercises_and_clips_have_files_and_captions():
    exercises, clips = exercise_clips(), msvd_clips()
    assert len(exercises) == 868 and len(clips) == 18
    assert all(captions and all(p.is_file() for p in photos) for photos, captions in exercises.values())
    assert all(file.is_file() and 27 <= len(captions) <= 55 for file, captions in clips.values())


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


@real
def test_cached_features_of_all_sources(capsys):
    cache = path("cache") / "real"
    if not (cache / "encoded-msvd/manifest.json").is_file():
        pytest.skip("no features of small copies in the cache: run real_pairs(extract=extract_videos) once")
    v = real_pairs(max_frames=6)
    n = {s: [i for i, k in enumerate(v.names) if k.startswith(s)] for s in ("flickr8k", "exercises", "msvd")}
    assert [len(n[s]) for s in n] == [5845, 868, 18]
    assert (
        set(v.mask[n["flickr8k"]].sum(1)) == {1}
        and set(v.mask[n["exercises"]].sum(1)) == {2}
        and v.mask[n["msvd"]].sum(1).min() >= 4
    )
    assert (
        (v.features[~v.mask] == 0).all()
        and (np.abs(v.features[v.mask]).max(1) > 0).all()
        and np.isfinite(v.features).all()
    )
    assert len(np.concatenate([v.train, v.valid])) == len(v.captions)


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
        return real_pairs(tmp_path / "cache", sources=["flickr8k"], retrieval=1, root=tmp_path)

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
