"Corpora and captions of any size: processes that are killed, full disks, files cut anywhere."

import gzip
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from vlkd.core.files import read_json, rng
from vlkd.core.settings import scale
from vlkd.data.corpus import open_text, pack, text_files, text_list, tokenize_corpus
from vlkd.data.howto100m import caption_table, hold_out, howto_pairs, json_entries
from vlkd.data.text import train_tokenizer
from vlkd.data.video import Features

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


@pytest.fixture(scope="module")
def tok():
    return train_tokenizer([" ".join(WORDS)], 80)


def sentences(n, seed=0):
    r = rng("test-scale", seed)
    return [" ".join(r.choice(WORDS, r.integers(1, 30))) for _ in range(n)]


def test_training_sees_the_same_batches_from_disk_and_from_memory(tok, tmp_path):
    from vlkd.train.text_student import text_collator

    s = scale("smoke")
    texts = sentences(300)
    a, b = (
        pack(texts, tok, 32),
        tokenize_corpus(text_list(texts), tok, tmp_path, max_tokens=32, shard_rows=17),
    )
    for items in ([(0, 0), (len(a) - 1, 3)], [(int(i), 1) for i in rng("items").permutation(len(a))[:40]]):
        x, y = (text_collator(t, tok, s, 5)(items) for t in (a, b))
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_rows_are_the_text_whatever_the_shards_and_batches(tok, tmp_path):
    texts = sentences(120, 1)
    flat = [t for x in texts for t in tok(x, add_special_tokens=False)["input_ids"]]
    for n, (rows, length) in enumerate([(200, 3), (7, 9), (1000, 128)]):
        t = tokenize_corpus(text_list(texts), tok, tmp_path / str(n), max_tokens=length, shard_rows=rows)
        ids, m = t[np.arange(len(t))]
        got = [x for i, k in zip(ids.tolist(), m.sum(1).tolist(), strict=True) for x in i[1 : k - 1]]
        assert got == flat and (t.lengths[:-1] == length).all() and (ids[:, 0] == tok.cls_token_id).all()


def test_a_full_disk_leaves_nothing_half_written(tok, tmp_path, monkeypatch):
    texts, save, n = sentences(200), np.save, iter(range(100))

    def full(f, x):
        if next(n) == 5:
            f.write(b"half")
            raise OSError(28, "No space left on device")
        save(f, x)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space"):
        tokenize_corpus(text_list(texts), tok, tmp_path / "a", max_tokens=16, shard_rows=40)
    monkeypatch.setattr(np, "save", save)
    names = {s for x in read_json(tmp_path / "a/corpus.json")["shards"] for s in x["sha256"]}
    assert not list((tmp_path / "a").glob(".*.npy*")) and names
    a, b = (tokenize_corpus(text_list(texts), tok, tmp_path / k, max_tokens=16, shard_rows=40) for k in "ab")
    assert a.fingerprint == b.fingerprint


def test_killed_while_tokenizing(tok, tmp_path):
    "A process that is killed outright leaves a folder that another finishes, with the same bytes."
    texts = sentences(12_000, 2)
    (tmp_path / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    tok.save_pretrained(tmp_path / "tok")
    code = f"""
from transformers import AutoTokenizer
from vlkd.data.corpus import *
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "tok")!r})
texts = text_files({str(tmp_path / "text.txt")!r})
tokenize_corpus(texts, tokenizer, {str(tmp_path / "a")!r}, max_tokens=32, shard_rows=50)"""
    p = subprocess.Popen([sys.executable, "-c", code])
    f = tmp_path / "a/corpus.json"
    end = time.monotonic() + 300
    while (
        p.poll() is None and not (f.is_file() and len(read_json(f)["shards"]) > 3) and time.monotonic() < end
    ):
        time.sleep(0.01)
    p.send_signal(signal.SIGKILL)
    p.wait()
    m = read_json(f)
    assert len(m["shards"]) > 3 and not m["finished"], "the process was killed too late to test anything"
    a, b = (
        tokenize_corpus(text_files(tmp_path / "text.txt"), tok, tmp_path / k, max_tokens=32, shard_rows=50)
        for k in "ab"
    )
    assert a.fingerprint == b.fingerprint and len(a) == len(b)


def captions(n=6):
    r = rng("captions")
    return {
        f"v{i}": dict(
            start=[0.0, 2.5], end=[2.0, 4.0], text=[" ".join(r.choice(WORDS, 4)), 'naïve "salt" {x}: [1, 2]']
        )
        for i in range(n)
    }


@pytest.mark.parametrize("gz", [False, True])
def test_captions_cut_anywhere_are_an_error(tmp_path, gz):
    b = json.dumps(captions(), ensure_ascii=False).encode()
    f = tmp_path / ("c.json.gz" if gz else "c.json")
    whole = gzip.compress(b) if gz else b
    f.write_bytes(whole)
    assert dict(json_entries(f, 5)) == captions()
    for k in rng("cut", gz).integers(0, len(whole) - 1, 60):
        f.write_bytes(whole[:k])
        with pytest.raises(ValueError, match=r"c\.json"):
            list(json_entries(f, 13))


def test_captions_of_another_shape_are_an_error(tmp_path):
    f = tmp_path / "c.json"
    for bad, why in (
        ({"a": [1]}, "the lists start, end and text"),
        ({"a": dict(start=[1], end=[2], text=[])}, "1 starts, 1 ends and 0 texts"),
        ({"a": dict(start=["x"], end=[2], text=["t"])}, "time is not a number"),
        ({}, "no caption is left"),
    ):
        f.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=why):
            caption_table(f, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    f.write_text(
        '{"a": {"start": [0], "end": [1], "text": ["x"]}, "a": {"start": [0], "end": [1], "text": ["y"]}}'
    )
    with pytest.raises(ValueError, match="occurs twice"):
        caption_table(f, tmp_path / "t")


def test_hold_out_is_by_video_and_exact(tmp_path):
    c = {
        f"v{i}": dict(
            start=list(range(i % 7 + 1)), end=[x + 1 for x in range(i % 7 + 1)], text=["t"] * (i % 7 + 1)
        )
        for i in range(80)
    }
    (tmp_path / "c.json").write_text(json.dumps(c))
    t = caption_table(tmp_path / "c.json", tmp_path / "t")
    for seed in range(5):
        for n in (1, 10, 57, 200):
            train, valid = hold_out(t, n, seed)
            assert (
                len(valid) == n
                and not set(t.video[train]) & set(t.video[valid])
                and len(train) + n > len(t) - 7
            )
    assert not np.array_equal(hold_out(t, 57, 0)[1], hold_out(t, 57, 1)[1])


def test_a_clip_at_the_end_of_its_video_has_a_frame(tmp_path):
    "Times may run a little over the end; no clip is empty, none reaches into the next video's rows."
    (tmp_path / "f").mkdir()
    for video in "ab":
        np.save(tmp_path / f"f/{video}.npy", np.full((3, 1), ord(video), np.float32))
    m = Features(tmp_path / "f")
    (tmp_path / "c.json").write_text(
        json.dumps({v: dict(start=[0, 2.999, 0.5], end=[0.001, 3.9, 4], text=["x"] * 3) for v in "ab"})
    )
    t = caption_table(tmp_path / "c.json", tmp_path / "t", seconds=m.seconds())
    p = howto_pairs(t, m, held_out=1)
    assert p.mask[np.arange(6)].sum(1).tolist() == [1, 1, 3] * 2
    for i in range(6):
        assert set(p.features[i][p.mask[i]].ravel()) == {ord("a") if i < 3 else ord("b")}


def test_wikitext_keeps_its_words(data):
    "Nothing but headings and tokenisation is lost from real text."
    file = data / "wikitext/wikitext-2.test.raw.gz"
    with gzip.open(file, "rt", encoding="utf-8") as text:
        lines = [line.strip() for line in text]
    raw = [line for line in lines if line and not (line.startswith("= ") and line.endswith(" ="))]
    got = list(open_text(file, clean="wikitext"))

    def letters(text):
        return "".join(character for character in text if character.isalnum())

    for a, b in zip(raw[::20], got[::20], strict=True):
        assert letters(a) == letters(b) and "@-@" not in b and " ," not in b
