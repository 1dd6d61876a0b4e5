"""Made-up photos, captions and texts in the layout of the public data, for tests of scale real."""

import gzip
import json
from itertools import product
from pathlib import Path

import numpy as np

COLOURS = ("red", "blue", "green", "white")
NOUNS = (
    "boat",
    "kite",
    "car",
    "ball",
    "cup",
    "bag",
    "hat",
    "sofa",
    "barn",
    "tent",
    "bench",
    "sled",
    "tree",
    "wall",
)
PLACES = ("a lake", "a street", "the grass", "a beach", "a field")
PHOTOS = 140


def _write(file: Path, text: str):
    file.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    file.write_bytes(gzip.compress(data, mtime=0) if file.suffix == ".gz" else data)


def _json_lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _table(rows, mark: str = "\t") -> str:
    return "".join(mark.join(row) + "\n" for row in rows)


def _captions(i: int) -> list[str]:
    noun, colour, place = (
        NOUNS[i % len(NOUNS)],
        COLOURS[i % len(NOUNS) % len(COLOURS)],
        PLACES[i % len(PLACES)],
    )
    return [
        f"a {colour} {noun} on {place} .",
        f"a {noun} near {place} .",
        f"there is a {colour} {noun} .",
        f"a man looks at the {noun} .",
        f"a person in a {COLOURS[i % 3]} shirt by {place} .",
    ]


def _photos(root: Path):
    names = [f"{i:04}_x.jpg" for i in range(PHOTOS)]
    rows = [dict(image=name, captions=_captions(i)) for i, name in enumerate(names)]
    folder = root / "flickr8k"
    _write(folder / "captions.jsonl", _json_lines(rows))
    levels = np.random.default_rng(0).integers(0, 40, (PHOTOS, 1280), np.uint8)
    for i in range(PHOTOS):
        levels[i, [i % len(NOUNS), 20 + i % len(NOUNS) % len(COLOURS)]] = 250
    np.savez(
        folder / "mbv2_pool1280_u8.npz", feats_u8=levels, scale=np.full(1280, 0.01), files=np.array(names)
    )
    for split, i in dict(dev=0, test=1).items():
        _write(folder / f"itm_{split}.tsv", f"{names[i]}\ta man .\tmatch\n")
        _write(folder / f"esnlive_{split}_flickr8k.jsonl", _json_lines([dict(image=names[i + 2])]))


def _entailment(root: Path):
    labels = ("entailment", "neutral", "contradiction")
    for split, first in dict(dev=1000, test=2000).items():
        rows = [["", "pairID", "Flickr30kID", "hypothesis", "gold_label", "explanation"]]
        for i in range(first, first + 24):
            pair = f"{i}.jpg#{i % 5}r1e"
            rows.append([str(i), pair, f"{i}.jpg", f"there is a {NOUNS[i % 9]}", labels[i % 3], "so it is"])
        _write(root / f"esnlive/{split}.csv.gz", _table(rows, ","))
    for name, first in {"train": 1000, "val": 1500, "test_2016": 2000}.items():
        rows = [dict(image=f"{i}.jpg", captions=_captions(i)) for i in range(first, first + 24)]
        _write(root / f"flickr30k_captions/{name}.jsonl.gz", _json_lines(rows))


def _wordnet(root: Path):
    folder = root / "open_english_wordnet"
    _write(folder / "synsets.jsonl.gz", _json_lines([dict(id="a", lexfile="noun.artifact")]))
    entries = [dict(lemma=noun, pos="n", synsets=["a"]) for noun in NOUNS]
    _write(folder / "entries.jsonl.gz", _json_lines(entries))


def _article(i: int) -> dict:
    noun, colour = NOUNS[i % len(NOUNS)], COLOURS[i % 4]
    text = f"The {noun} of town {i} was built in 1{i:03}. It is made of wood and {colour} stone. "
    text += f"People of town {i} like the {noun} very much. The {noun} is {colour} and old."
    question = dict(
        id=f"q{i}",
        question=f"When was the {noun} built?",
        answers=[dict(text=f"1{i:03}", answer_start=text.index(f"1{i:03}"))],
    )
    return dict(title=f"Town {i}", paragraphs=[dict(context=text, qas=[question])])


def _texts(root: Path):
    _write(
        root / "squad/train-v1.1.json.gz",
        json.dumps(dict(version="1.1", data=[_article(i) for i in range(120)])),
    )
    _write(
        root / "wikitext/wikitext-2.train.tokens.gz",
        " \n = Lobster = \n \n The lobster lives in the sea . \n",
    )
    pairs = list(product(("the film is", "a story that is"), ("good", "bad", "great", "dull"), "ab"))
    rows = [[f"{text} {word} {end}", str(int(word in ("good", "great")))] for text, word, end in pairs]
    for split in ("train", "dev"):
        _write(root / f"glue_sst2/{split}.tsv.gz", _table([["sentence", "label"], *rows]))
    rows = [
        [str(i), f"Who built it {i}?", f"It was built by {i}.", ("entailment", "not_entailment")[i % 2]]
        for i in range(16)
    ]
    _write(root / "glue_qnli/dev.tsv.gz", _table([["index", "question", "sentence", "label"], *rows]))


def write_real_files(root) -> Path:  # the folder
    "Write a folder that scale real-smoke can read."
    root = Path(root)
    for part in (_photos, _entailment, _wordnet, _texts):
        part(root)
    return root
