"""The real corpora: splits that do not leak, features that are where they belong, and inputs that break."""

import gzip
import json

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


@real
def test_held_out_photos_leave_what_the_index_says():
    parts = photo_splits()
    held = held_out_photos()
    sets = [set(p) for p in parts.values()]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 6845 and not set.union(*sets) & held
    assert len(parts["retrieval"]) == 1000
    tables = {
        l.split("\t")[0]
        for s in ("dev", "test")
        for l in (ROOT / f"flickr8k/itm_{s}.tsv").read_text(encoding="utf-8").splitlines()
    }
    assert tables <= held and not tables & set.union(*sets)
    assert len(photo_splits(held_out=())["train"]) > len(parts["train"])


@real
def test_pairs_and_retrieval_do_not_share_photos_and_limits_nest():
    v, t = real_pairs(sources=["flickr8k"], limit=1000), real_retrieval()
    assert not set(v.names) & set(t.names) and len(v.train) == 1000 and v.features.dtype == np.float16
    assert (
        v.features.shape[1:] == (1, 1280) and t.features.shape == (1000, 1, 1280) and len(t.captions) == 5000
    )
    w = real_pairs(sources=["flickr8k"], limit=1000)
    assert np.array_equal(v.train, w.train) and np.array_equal(v.valid, w.valid)
    x = v.features[np.unique(v.clip[v.train])].astype(np.float32)
    assert np.isfinite(x).all() and abs(x.mean()) < 0.1 and 0.7 < x.std() < 1.5


@real
def test_captions_belong_to_their_photos():
    "Ridge regression from words to features finds photos; it would not if the two were out of step."
    v, t = real_pairs(sources=["flickr8k"]), real_retrieval()
    words = {}
    for i in v.train:
        for w in set(v.captions[i].lower().split()):
            words[w] = words.get(w, 0) + 1
    at = {w: i for i, w in enumerate(sorted(words, key=lambda w: (-words[w], w))[:600])}

    def bags(captions):
        x = np.zeros((len(captions), len(at) + 1), np.float32)
        x[:, -1] = 1
        for i, c in enumerate(captions):
            x[i, [at[w] for w in set(c.lower().split()) if w in at]] = 1
        return x

    x, y = bags([v.captions[i] for i in v.train]), v.features[v.clip[v.train], 0].astype(np.float32)
    w = np.linalg.solve(x.T @ x + 100 * np.eye(x.shape[1], dtype=np.float32), x.T @ y)
    q, f = bags(t.captions) @ w, t.features[:, 0].astype(np.float32)
    q -= q.mean(0)
    s = (q / np.linalg.norm(q, axis=1, keepdims=True)) @ (f / np.linalg.norm(f, axis=1, keepdims=True)).T
    rank = (s > s[np.arange(len(s)), t.clip][:, None]).sum(1)
    assert (rank < 10).mean() > 0.1, (rank < 10).mean()  # chance: 0.01


@real
def test_published_features_are_dequantised():
    with np.load(ROOT / "flickr8k/mbv2_pool1280_u8.npz") as z:
        n = z["files"][7]
        want = z["feats_u8"][7] * z["scale"]
    got = flickr8k_features([str(n)])[0]
    assert np.allclose(got, want) and got.min() >= 0 and got.max() <= 6.01  # means of ReLU6


@real
def test_exercises_and_clips_have_files_and_captions():
    e, m = exercise_clips(), msvd_clips()
    assert len(e) == 868 and len(m) == 18
    assert all(p.is_file() for ps, _ in e.values() for p in ps) and all(p.is_file() for p, _ in m.values())
    assert all(c for _, c in e.values()) and all(27 <= len(c) <= 55 for _, c in m.values())


@real
def test_sentences_are_clean_and_disjoint():
    train, valid = real_sentences(limit=2000)
    assert (
        len(train) == 2000
        and len(valid) > 500
        and not {s.casefold() for s in train} & {s.casefold() for s in valid}
    )
    assert not any("<unk>" in s or s.startswith("=") or len(s.split()) < 4 for s in train + valid)
    other, same = real_sentences(1, limit=2000)
    assert same == valid and train != other
    dev = {
        c.casefold()
        for a in json_document(ROOT / "squad/dev-v1.1.json.gz")["data"]
        for p in a["paragraphs"]
        for c in sentences(" ".join(p["context"].split()))
    }
    assert not {s.casefold() for s in train} & dev


@real
def test_bert_vocabulary_is_the_published_one():
    v = bert_vocab()
    tok = load_vocabulary(v, 32)
    assert len(v) == 30522 and v[100:104] == ["[UNK]", "[CLS]", "[SEP]", "[MASK]"] and v.index("[PAD]") == 0
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


def flickr(root, gz=False):
    "The smallest flickr8k folder that `photo_splits` reads."
    d = root / "flickr8k"
    d.mkdir(parents=True)
    (d / "captions.jsonl").write_text(
        "".join(json.dumps(dict(image=f"{i}.jpg", captions=["a man ."])) + "\n" for i in range(9)),
        encoding="utf-8",
    )
    for s in ("dev", "test"):
        (d / f"itm_{s}.tsv").write_text("1.jpg\ta man .\tmatch\n")
        (d / f"esnlive_{s}_flickr8k.jsonl").write_text('{"image": "2.jpg"}\n')
    np.savez(
        d / "mbv2_pool1280_u8.npz",
        feats_u8=np.ones((9, 4), np.uint8),
        scale=np.ones(4, np.float32),
        files=np.array([f"{i}.jpg" for i in range(9)]),
    )
    return d


@pytest.mark.parametrize(
    "name,content,message",
    [
        (
            "captions.jsonl",
            b'{"image": "1.jpg", "captions": []}\n{"image"',
            "captions.jsonl, line 2: not JSON",
        ),
        (
            "captions.jsonl",
            b'{"image": "1.jpg"}\n',
            "captions.jsonl, line 1: no list of texts under 'captions'",
        ),
        ("captions.jsonl", b"[1]\n", "captions.jsonl, line 1: expected an object"),
        ("captions.jsonl", b"", "captions.jsonl: no rows"),
        (
            "captions.jsonl",
            b'{"image": "1.jpg", "captions": ["\xff"]}\n',
            "captions.jsonl, line 1: not UTF-8",
        ),
        (
            "itm_dev.tsv",
            b"1.jpg\ta man\tmatch\n1.jpg\ta man\n",
            "itm_dev.tsv, line 2: 2 fields, expected 3",
        ),
        ("itm_test.tsv", None, "itm_test.tsv: this file is missing"),
        ("esnlive_dev_flickr8k.jsonl", b"{}\n", "esnlive_dev_flickr8k.jsonl, line 1: no text under 'image'"),
        ("mbv2_pool1280_u8.npz", b"PK\x03\x04 not a zip", "mbv2_pool1280_u8.npz: not an npz file"),
        ("mbv2_pool1280_u8.npz", None, "mbv2_pool1280_u8.npz: this file is missing"),
    ],
)
def test_broken_inputs_are_named(tmp_path, name, content, message):
    d = flickr(tmp_path)
    assert (
        len(real_pairs(tmp_path / "cache", sources=["flickr8k"], retrieval=1, root=tmp_path).names) == 6
    )  # it works before the damage
    (d / name).unlink()
    if content is not None:
        (d / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        real_pairs(tmp_path / "cache", sources=["flickr8k"], retrieval=1, root=tmp_path)
    assert message in str(e.value)


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda b: b[: len(b) // 2], "broken or cut short"),
        (lambda b: b[:-8] + bytes(8), "broken or cut short"),
        (lambda b: b"", "not SQuAD's layout|not JSON"),
    ],
)
def test_broken_gzip_is_named(tmp_path, damage, message):
    import re

    text = json.dumps(
        dict(
            data=[
                dict(title=str(i), paragraphs=[dict(context=f"Sentence number {i} is here.")])
                for i in range(300)
            ]
        ),
        indent=0,
    )
    (tmp_path / "squad").mkdir()
    f = tmp_path / "squad/train-v1.1.json.gz"
    f.write_bytes(damage(gzip.compress(text.encode(), mtime=0)))
    with pytest.raises(ValueError) as e:
        list(squad_articles(tmp_path))
    assert "train-v1.1.json.gz" in str(e.value) and re.search(message, str(e.value))
