"""Files that were valid and then changed anywhere: every reader gives what it always gives, or an error that names the file. Never a KeyError, TypeError, IndexError or AttributeError, never an endless wait."""

import contextlib
import copy
import gzip
import io
import json
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_tasks import GOOD

from vlkd.core.files import CHECKSUMS, read_json, rng, write_json
from vlkd.core.records import Run, record
from vlkd.core.settings import path, preset, scale, scales

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

TOKENS = [
    b"",
    b"\0",
    b"\xff",
    b'"',
    b"'",
    b"\n",
    b"\r\n",
    b"\t",
    b",",
    b"NaN",
    b"-1",
    b"0",
    b"1e999",
    b"[",
    b"]",
    b"{",
    b"}",
    b"null",
    b"true",
    b"=",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"[[",
    b"x",
    b"99999999999999999999",
    b"9" * 5000,
    b"[" * 3000,
    b"\xef\xbb\xbf",
    "é\u2028".encode(),
]
VALUES = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    "",
    "x",
    "é\0",
    [],
    {},
    [[]],
    [1],
    {"a": []},
    float("nan"),
    float("inf"),
    ["x"],
    [None],
]


def places(x, at=()):
    "Paths of all nodes of a JSON tree."
    yield at
    for k in x if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ():
        yield from places(x[k], (*at, k))


def changed_tree(x, draw):
    at, x = draw(st.sampled_from(list(places(x)))), copy.deepcopy(x)
    v, how = draw(st.sampled_from(VALUES)), draw(st.sampled_from(["value", "value", "gone", "twice", "name"]))
    if not at:
        return v
    o = x
    for k in at[:-1]:
        o = o[k]
    k = at[-1]
    if how == "value":
        o[k] = v
    elif how == "gone":
        del o[k]
    elif isinstance(o, list):
        o.insert(k, copy.deepcopy(o[k]))
    elif how == "name":
        o[k + "x"] = o.pop(k)
    else:
        o[k] = [o[k]]
    return x


def changed(b: bytes, draw) -> bytes:
    "Bytes with a few changes: of single places, of lines, of values, or of nodes where they are JSON."
    how = draw(st.sampled_from(["bytes", "bytes", "lines", "value", "tree", "tree"]))
    if how == "tree":
        try:
            return json.dumps(changed_tree(json.loads(b), draw), ensure_ascii=False).encode(
                "utf-8", "surrogatepass"
            )
        except ValueError:
            pass
        rows = b.split(b"\n")
        k = draw(st.integers(0, len(rows) - 1))
        try:
            rows[k] = json.dumps(changed_tree(json.loads(rows[k]), draw)).encode()
            return b"\n".join(rows)
        except ValueError:
            how = "value"
    if how == "value":  # key = value, key: value, a cell of a table
        import re

        found = list(re.finditer(rb"(?<=[=:,\t ])[^=:,\t\n]+", b))
        if found:
            m = draw(st.sampled_from(found))
            return (
                b[: m.start()]
                + draw(
                    st.sampled_from(
                        TOKENS
                        + [
                            b" 3",
                            b" 'a'",
                            b" [1, 'a']",
                            b' ["x"]',
                            b" {a = 1}",
                            b" 1.5",
                            b" true",
                            b" []",
                            b" 2001-01-01",
                            b" !!python/name:os.system",
                            b" nan",
                        ]
                    )
                )
                + b[m.end() :]
            )
    if how == "lines":
        rows = b.split(b"\n")
        i, j = draw(st.integers(0, len(rows) - 1)), draw(st.integers(0, len(rows) - 1))
        what = draw(st.sampled_from(["gone", "twice", "moved", "cut"]))
        if what == "cut":
            return b"\n".join(rows[:i])
        x = rows[i] if what == "twice" else rows.pop(i)
        if what != "gone":
            rows.insert(j, x)
        return b"\n".join(rows)
    x = bytearray(b)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(x)))
        x[at : at + draw(st.integers(0, 8))] = draw(st.sampled_from(TOKENS) | st.binary(max_size=6))
    return bytes(x)


# Readers: a folder with valid files, the files to change, and what reads them


def tasks(d):
    from vlkd.data.tasks import TASKS, read_task

    name = next(n for n in sorted(TASKS, key=len, reverse=True) if d.name.startswith(n))
    return read_task(name, d, "dev")


def task_files():
    from test_tasks import FILE

    for n, b in GOOD.items():
        yield n, {FILE[n]: b * (2 if n in ("piqa", "tracie") else 1)}, tasks
    rows = [
        {
            **dict(zip(("startphrase", "ending0", "ending1", "ending2", "ending3"), "abcde")),
            "label": i,
            "fold-ind": str(i),
            "video-id": "v",
        }
        for i in range(3)
    ]
    yield "swag-jsonl", {"val.jsonl": "".join(json.dumps(r) + "\n" for r in rows).encode()}, tasks
    yield (
        "piqa-groups",
        {
            "valid.jsonl": b"".join(
                json.dumps(dict(goal="g", sol1="a", sol2="b", label=i, id=str(i))).encode() + b"\n"
                for i in range(2)
            ),
            "valid-groups.tsv": b"id\tgroup\tkind\n0\tg\t\n1\tg\tx\n",
        },
        tasks,
    )


def squad_file():
    from test_squad import made

    return json.dumps(made("2.0", kind="k"), indent=1).encode()


def squad(d):
    from vlkd.data.squad import read_squad

    return read_squad(d, "dev", "2.0")


CAPTIONS = {f"v{i}": dict(start=[0.5, 2], end=[2, 4.5], text=["cut the wood", "naïve"]) for i in range(3)}


def captions(d):
    from vlkd.data.howto100m import caption_table, read_captions

    rows = list(read_captions(d / "c.json"))
    list(read_captions(d / "csv"))
    for wrong in ("error", "drop"):
        shutil.rmtree(d / "out", ignore_errors=True)
        try:
            t = caption_table(d / "c.json", d / "out", wrong=wrong, seconds=dict(v0=5.0, v1=5.0, v2=5.0))
            assert len(t.texts) == len(t.start) and np.isfinite(t.end).all()
        finally:
            shutil.rmtree(d / "out", ignore_errors=True)
    return rows


def howto(d):
    from vlkd.data.howto100m import howto_videos

    return howto_videos(d / "h.csv")


def listed(d):
    from vlkd.features.extract import find_videos

    v = find_videos(d / "list.csv")
    assert all(x.path.is_absolute() for x in v.values())
    return v


def card(d):
    from vlkd.data.catalog import cards

    return cards(d)


def plan(d):
    from vlkd.reproduce.plan import load_plan

    p = load_plan(d / "plan.toml")
    assert all(isinstance(e["needs"], list) and e["file"].is_file() for e in p.values())
    return p


NOTEBOOK = json.dumps(
    dict(
        cells=[
            dict(cell_type="markdown", id="a", metadata={}, source=["# t"]),
            dict(
                cell_type="code",
                id="b",
                metadata=dict(tags=["parameters"]),
                execution_count=None,
                outputs=[],
                source='scale: str = "smoke"\nseed: int = 0\nseeds: str = ""\nout: str = ""\ninputs: str = ""\nlr: float = 0.1\n',
            ),
        ],
        metadata={},
        nbformat=4,
        nbformat_minor=5,
    )
).encode()
PLAN = b'[[run]]\nid = "a"\nnotebook = "a.ipynb"\nparams = { lr = 0.5 }\nat = { micro = { lr = 0.25 } }\nminutes = 2\n[[run]]\nid = "b"\nnotebook = "a.ipynb"\nneeds = ["a"]\nafter = ["a"]\nscales = ["smoke", "micro"]\n[[table]]\nid = "t"\nnotebook = "a.ipynb"\ntitle = "T"\nclaim = "c"\nneeds = ["a", "b"]\nmain = true\ndata = ["squad"]\n'


def claims(d):
    from vlkd.eval.claims import read_claims

    return read_claims(d / "claims.toml")


def ini(d):
    with swapped_env(VLKD_SETTINGS=str(d / "settings.ini")):
        out = {n: scale(n) for n in scales()}
        [scale("micro", "base")]
        [preset(p) for p in ("paper", "released", "micro")]
        [path(p) for p in ("runs", "reports", "nbs")]
        return out


def flickr(d):
    from vlkd.data.public import flickr8k_captions, flickr8k_features, held_out_photos, photo_splits

    s = photo_splits(retrieval=1, root=d)
    held_out_photos(root=d)
    flickr8k_features(s["train"], d)
    return flickr8k_captions(d)


def exercises(d):
    from vlkd.data.public import exercise_clips

    return exercise_clips(d)


def msvd(d):
    from vlkd.data.public import msvd_clips

    return msvd_clips(d)


def articles(d):
    from vlkd.data.public import bert_vocab, squad_articles, wikitext_articles

    bert_vocab(d)
    return [*squad_articles(d), *wikitext_articles(d)]


def text(d):
    from vlkd.data.corpus import open_text

    return [x for c in ("plain", "wikitext") for x in open_text(d / "text", clean=c)]


def npz(**kw):
    o = io.BytesIO()
    np.savez(o, **kw)
    return o.getvalue()


def npy(x):
    o = io.BytesIO()
    np.save(o, x)
    return o.getvalue()


def mobilenet(d):
    from vlkd.features.encoders import load_mobilenet

    return load_mobilenet(d).encode(np.zeros((1, 224, 224, 3), np.uint8))


SPEC = [
    dict(op="CONV_2D", w="c.w", b="c.b", act=3, pad=0, stride=2, **{"in": [0], "out": [1]}),
    dict(op="MEAN", **{"in": [1], "out": [2]}),
]
MOBILENET = npz(
    **{"c.w": np.ones((2, 3, 3, 3), np.float32), "c.b": np.zeros(2, np.float32)},
    spec_json=np.frombuffer(json.dumps(SPEC).encode(), np.uint8),
)


def weights(d):
    from vlkd.features.video3d import read_weights

    for f in ("w.pt", "w.safetensors"):
        s, _ = read_weights(d / f)
        assert all(hasattr(v, "shape") for v in s.values())
    return s


def weight_files():
    import torch
    from safetensors.torch import save

    o = io.BytesIO()
    torch.save({"state_dict": {"module.a": torch.ones(3, 2)}}, o)
    return {"w.pt": o.getvalue(), "w.safetensors": save({"a": torch.ones(3, 2)}, {"config": '{"depth": 50}'})}


def photo(d):
    from vlkd.data.video import read_photos

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x, t = read_photos([d / "a.png", d / "b.jpg"], size=8)
    assert x.dtype == np.uint8 and x.shape == (2, 8, 8, 3) and len(t) == 2
    return x


def photo_files():
    from PIL import Image

    out = {}
    for n in ("a.png", "b.jpg"):
        o = io.BytesIO()
        Image.fromarray(rng(n).integers(0, 255, (8, 8, 3)).astype(np.uint8)).save(
            o, "PNG" if n == "a.png" else "JPEG"
        )
        out[n] = o.getvalue()
    return out


def video(d):
    from vlkd.data.video import read_frames

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x, t = read_frames(d / "a.mp4", size=8, max_frames=8)
    assert x.dtype == np.uint8 and 1 <= len(x) == len(t) <= 8
    return x


def video_file(d):
    from vlkd.data.video import write_mp4

    return write_mp4(d / "v.mp4", rng("v").integers(0, 255, (6, 16, 16, 3)).astype(np.uint8), 2).read_bytes()


def mapped(d):
    from vlkd.data.video import Features

    m = Features(d / "f")
    m.seconds()
    return [np.asarray(m[k]) for k in m]


def record_of(d):
    r = Run(d / "r")
    return r.metrics, r.table("t"), r.examples


def student(d):
    from vlkd.models.bert import load_model

    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return load_model(d / "m")


def notebook(d):
    from vlkd.reproduce.plan import notebook_parameters

    return notebook_parameters(d / "a.ipynb")


def json_file(d):
    return read_json(d / "a.json")


def made_files(make, d):
    make(d)
    return {
        str(f.relative_to(d)): f.read_bytes()
        for f in sorted(d.rglob("*"))
        if f.is_file() and not f.name.startswith(".lock")
    }


def a_student(d, sums=False):
    from vlkd.data.text import load_vocabulary
    from vlkd.models.bert import language_model, save_model

    tok = load_vocabulary(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "girl"], 40)
    save_model(
        d / "m", language_model(scale("smoke", hidden=8, heads=2, layers=1, intermediate=8), tok, 0), tok
    )
    (d / "m" / CHECKSUMS).unlink()  # from elsewhere: without checksums


def a_record(d):
    record(
        d / "r",
        dict(x=1.0),
        tables=dict(t=pd.DataFrame(dict(a=[1, 2]))),
        examples=pd.DataFrame(dict(b=[1.0])),
    )


@contextlib.contextmanager
def swapped_env(**kw):
    old = {k: os.environ.get(k) for k in kw}
    os.environ.update(kw)
    try:
        yield
    finally:
        for k, v in old.items():
            os.environ.pop(k) if v is None else os.environ.__setitem__(k, v)


FLICKR = {
    "flickr8k/captions.jsonl": "".join(
        json.dumps(dict(image=f"{i}.jpg", captions=["a man ."])) + "\n" for i in range(9)
    ).encode(),
    "flickr8k/mbv2_pool1280_u8.npz": npz(
        feats_u8=np.ones((9, 4), np.uint8),
        scale=np.ones(4, np.float32),
        files=np.array([f"{i}.jpg" for i in range(9)]),
    ),
    **{f"flickr8k/itm_{s}.tsv": b"1.jpg\ta man .\tmatch\n" for s in ("dev", "test")},
    **{f"flickr8k/esnlive_{s}_flickr8k.jsonl": b'{"image": "2.jpg"}\n' for s in ("dev", "test")},
}
ARTICLES = {
    "squad/train-v1.1.json.gz": gzip.compress(
        json.dumps(dict(data=[dict(title="T", paragraphs=[dict(context="Cork floats on water.")])])).encode(),
        mtime=0,
    ),
    "wikitext/wikitext-2.train.raw": b" = T = \n \n Cork floats . \n",
    "tokenizer_vocabs/bert-base-uncased-vocab.txt.gz": gzip.compress(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]).encode() + b"\n", mtime=0
    ),
}

READERS = dict(
    json=(lambda d: {"a.json": json.dumps(dict(a=[1, 2.5, None], b=dict(c="x"))).encode()}, json_file),
    sealed=(
        lambda d: made_files(
            lambda d: write_json(d / "a.json", dict(a=[1, 2.5], b={"c": "x"}), checksum=True), d
        ),
        json_file,
    ),
    squad=(lambda d: {"dev-v2.0.json": squad_file()}, squad),
    captions=(
        lambda d: {
            "c.json": json.dumps(CAPTIONS).encode(),
            "csv/v0.csv": b'start,end,text\n0.5,2,"cut, the wood"\n2,4,more\n',
        },
        captions,
    ),
    howto=(
        lambda d: {"h.csv": b'video_id,category_1,rank,task_id\nv0,"Home, garden",1,7\nv1,Home,2,8\n'},
        howto,
    ),
    videos=(lambda d: {"list.csv": b'path,start,end,id\na.mp4,1,3,x\nb.mp4,,,\n"c d.mp4",0.5,,y\n'}, listed),
    card=(lambda d: {"squad.md": (ROOT / "data_cards/squad.md").read_bytes()}, card),
    plan=(lambda d: {"plan.toml": PLAN, "a.ipynb": NOTEBOOK}, plan),
    notebook=(lambda d: {"a.ipynb": NOTEBOOK}, notebook),
    claims=(
        lambda d: {
            "claims.toml": b"".join(
                (ROOT / "nbs/experiments/vidlankd/claims.toml").read_bytes().partition(b"[defaults]\n")[1:]
            )[:3000].rpartition(b"[[table.m5.claim]]")[0]
        },
        claims,
    ),
    settings=(lambda d: {"settings.ini": (ROOT / "settings.ini").read_bytes()}, ini),
    flickr=(lambda d: FLICKR, flickr),
    exercises=(
        lambda d: {
            "free_exercise_db/exercises.jsonl": b'{"id": "a", "instructions": ["Lift it up high. Put it down again."], "images": ["a/0.jpg", "a/1.jpg"]}\n'
            * 1
            + b'{"id": "b", "instructions": [], "images": []}\n'
        },
        exercises,
    ),
    msvd=(
        lambda d: {
            "msvd_clips/index.jsonl": b'{"clip": "a", "captions": ["a man runs"]}\n{"clip": "b", "captions": ["x y"]}\n'
        },
        msvd,
    ),
    articles=(lambda d: ARTICLES, articles),
    text=(
        lambda d: {
            "text/a.txt": "Cork floats.\n\n = T = \nnaïve @-@ text\n".encode(),
            "text/b.txt.gz": gzip.compress(b"More text.\n", mtime=0),
        },
        text,
    ),
    mobilenet=(lambda d: {"mobilenet_v2_imagenet_fp16.npz": MOBILENET}, mobilenet),
    weights=(lambda d: weight_files(), weights),
    photo=(lambda d: photo_files(), photo),
    video=(lambda d: {"a.mp4": video_file(d)}, video),
    mapped=(
        lambda d: {"f/a.npy": npy(np.ones((3, 4), np.float16)), "f/b.npy": npy(np.zeros((2, 4), np.float16))},
        mapped,
    ),
    record=(lambda d: made_files(a_record, d), record_of),
    student=(lambda d: made_files(a_student, d), student),
    **{n: ((lambda b: lambda d: b)(b), f) for n, b, f in task_files()},
)
QUICK = dict(student=15, weights=30, video=30, mobilenet=20)  # slow readers get fewer examples


def schema(x):
    "What must not change: types, columns."
    return list(x.columns) if isinstance(x, pd.DataFrame) else type(x)


@pytest.mark.parametrize("name", READERS)
def test_changed_files(name, tmp_path):
    files, read = READERS[name]
    (tmp_path / "made").mkdir()
    files = files(tmp_path / "made")
    d = tmp_path / name
    fine = 0

    def lay(**change):
        for n, b in files.items():
            f = d / n
            f.parent.mkdir(parents=True, exist_ok=True)
            f.write_bytes(b)

    if name == "video":
        pytest.importorskip("av", reason="the `video` extra is not installed")
    lay()
    want = schema(read(d))  # they are valid before the change

    def late(*a):
        raise TimeoutError("it never ends")

    @settings(fuzz, max_examples=QUICK.get(name, 60))
    @given(st.data())
    def go(data):
        n = data.draw(st.sampled_from(sorted(files)))
        b = changed(files[n], data.draw)
        lay()
        (d / n).write_bytes(b)
        old = signal.signal(signal.SIGALRM, late)
        signal.alarm(20)
        try:
            got = read(d)
        except (ValueError, FileNotFoundError) as e:
            assert any(
                x in str(e) for x in (*(Path(k).name for k in files), *(str((d / k).parent) for k in files))
            ), f"{n} is not named: {e!r}"
        else:
            assert name in ("json", "sealed") or schema(got) == want
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, old)

    go()
