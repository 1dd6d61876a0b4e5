"Corpora and captions of any size: shards, files cut anywhere, what is held out."

import gzip
import json
from functools import cache

import numpy as np
import pytest
import torch

from vlkd.core.files import rng
from vlkd.core.settings import scale
from vlkd.data.corpus import CorpusTokens, open_text, pack, text_list, tokenize_corpus
from vlkd.data.howto100m import caption_table, hold_out, howto_pairs, json_entries
from vlkd.data.text import train_tokenizer
from vlkd.data.video import Features
from vlkd.train.text_student import text_collator

WORDS = "copper iron gold salt ice is soft hard and melts rusts never often".split()


@cache
def tokenizer():
    return train_tokenizer([" ".join(WORDS)], 80)


def sentences(n, seed=0):
    numbers = rng("test-scale", seed)
    return [" ".join(numbers.choice(WORDS, numbers.integers(1, 30))) for _ in range(n)]


def read_corpus(out):
    "All numbers of a tokenised corpus."
    tokens = CorpusTokens(out, tokenizer())
    ids, mask = tokens[np.arange(len(tokens))]
    return dict(ids=ids.numpy(), mask=mask.numpy(), lengths=np.asarray(tokens.lengths))


def test_training_sees_the_same_batches_from_disk_and_from_memory(tmp_path):
    texts = sentences(300)
    packed = pack(texts, tokenizer(), 32)
    stored = tokenize_corpus(text_list(texts), tokenizer(), tmp_path, max_tokens=32, shard_rows=17)
    drawn = rng("items").permutation(len(packed))[:40]
    for items in ([(0, 0), (len(packed) - 1, 3)], [(int(i), 1) for i in drawn]):
        one, other = (
            text_collator(tokens, tokenizer(), scale("smoke"), 5)(items) for tokens in (packed, stored)
        )
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("rows, length", [(200, 3), (7, 9), (1000, 128)])
def test_rows_are_the_text_whatever_the_shards_and_batches(tmp_path, rows, length):
    texts = sentences(120, 1)
    wanted = [i for text in texts for i in tokenizer()(text, add_special_tokens=False)["input_ids"]]
    tokens = tokenize_corpus(text_list(texts), tokenizer(), tmp_path, max_tokens=length, shard_rows=rows)
    ids, mask = tokens[np.arange(len(tokens))]
    found = [i for row, n in zip(ids.tolist(), mask.sum(1).tolist(), strict=True) for i in row[1 : n - 1]]
    assert found == wanted and (tokens.lengths[:-1] == length).all()
    assert (ids[:, 0] == tokenizer().cls_token_id).all()


def some_captions(n):
    numbers, odd = rng("captions"), 'naïve "salt" {x}: [1, 2]'
    return {
        f"v{i}": dict(start=[0.0, 2.5], end=[2.0, 4.25], text=[" ".join(numbers.choice(WORDS, 4)), odd])
        for i in range(n)
    }


@pytest.mark.parametrize("pack_file", [bytes, gzip.compress])
def test_captions_cut_anywhere_are_an_error(tmp_path, pack_file):
    file = tmp_path / ("c.json.gz" if pack_file is gzip.compress else "c.json")
    whole = pack_file(json.dumps(some_captions(6), ensure_ascii=False).encode())
    file.write_bytes(whole)
    assert dict(json_entries(file, 5)) == some_captions(6)
    for cut in rng("cut").integers(0, len(whole) - 1, 60):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"c\.json"):
            list(json_entries(file, 13))


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": [1]}', "the lists start, end and text"),
        ('{"a": {"start": [1], "end": [2], "text": []}}', "1 starts, 1 ends and 0 texts"),
        ('{"a": {"start": ["x"], "end": [2], "text": ["t"]}}', "time is not a number"),
        ("{}", "no caption is left"),
        (
            '{"a": {"start": [0], "end": [1], "text": ["x"]}, "a": {"start": [], "end": [], "text": []}}',
            "twice",
        ),
    ],
)
def test_captions_of_another_shape_are_an_error(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        caption_table(tmp_path / "c.json", tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_hold_out_is_by_video_and_exact(tmp_path):
    numbers = {f"v{i}": range(i % 7 + 1) for i in range(80)}
    captions = {
        video: dict(start=[*k], end=[x + 1 for x in k], text=["t"] * len(k)) for video, k in numbers.items()
    }
    (tmp_path / "c.json").write_text(json.dumps(captions))
    table = caption_table(tmp_path / "c.json", tmp_path / "t")
    for seed in range(5):
        for n in (1, 10, 57, 200):
            train, valid = hold_out(table, n, seed)
            assert len(valid) == n and len(train) + n > len(table) - 7
            assert not set(table.video[train]) & set(table.video[valid])
    assert not np.array_equal(hold_out(table, 57, 0)[1], hold_out(table, 57, 1)[1])


def test_a_clip_at_the_end_of_its_video_has_a_frame(tmp_path):
    "Times may run a little over the end; no clip is empty, none reaches into the next video's rows."
    (tmp_path / "f").mkdir()
    for name, value in dict(a=97, b=98).items():
        np.save(tmp_path / f"f/{name}.npy", np.full((3, 1), value, np.float32))
    found = Features(tmp_path / "f")
    times = dict(start=[0, 2.999, 0.5], end=[0.001, 3.9, 4], text=["x"] * 3)
    (tmp_path / "c.json").write_text(json.dumps(dict(a=times, b=times)))
    table = caption_table(tmp_path / "c.json", tmp_path / "t", seconds=found.seconds())
    pairs = howto_pairs(table, found, held_out=1)
    assert pairs.mask[np.arange(6)].sum(1).tolist() == [1, 1, 3] * 2
    for i in range(6):
        assert set(pairs.features[i][pairs.mask[i]].ravel()) == {97 if i < 3 else 98}


def test_wikitext_keeps_its_words(data):
    "Nothing but headings and tokenisation is lost from real text."
    file = data / "wikitext/wikitext-2.test.raw.gz"
    with gzip.open(file, "rt", encoding="utf-8") as text:
        lines = [line.strip() for line in text]
    raw = [line for line in lines if line and not (line.startswith("= ") and line.endswith(" ="))]
    read = list(open_text(file, clean="wikitext"))

    def letters(text):
        return "".join(character for character in text if character.isalnum())

    for line, clean in zip(raw[::20], read[::20], strict=True):
        assert letters(line) == letters(clean) and "@-@" not in clean and " ," not in clean
