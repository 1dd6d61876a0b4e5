"SQuAD: corrupt and unseen files, scores beside the official scorer, windows beside a brute-force reading."

import gzip
import importlib.machinery
import importlib.util
import json
import os
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlkd.core.settings import data_dir
from vlkd.data.squad import (
    evaluate_squad,
    exact_match,
    f1_score,
    hub_squad,
    normalize_answer,
    read_squad,
    squad_scores,
    squad_windows,
    write_squad,
)

fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = "Cork floats. A stone sinks, é\u2028and \U0001f600 a nail."


def made(version="1.1", par=None, art=None, **q):
    q = (
        dict(id="q1", question="What floats?", answers=[dict(text="Cork", answer_start=0)])
        | (dict(is_impossible=False) if version == "2.0" else {})
        | q
    )
    paragraph = dict(context=TEXT, qas=[q]) | (par or {})
    return dict(version=version, data=[dict(title="T", paragraphs=[paragraph]) | (art or {})])


def write(p, o):
    p.write_text(o if isinstance(o, str) else json.dumps(o, indent=1), encoding="utf-8")
    return p


# ---- reading
def test_reads_plain_gz_and_folder(tmp_path):
    p = write(tmp_path / "dev-v1.1.json", made())
    df = read_squad(p)
    assert (
        list(df.columns) == ["id", "context", "question", "answers", "starts", "impossible", "group", "kind"]
        and df.answers[0] == ["Cork"]
        and df.starts[0] == [0]
    )
    g = tmp_path / "gz" / "dev-v1.1.json.gz"
    g.parent.mkdir()
    g.write_bytes(gzip.compress(p.read_bytes()))
    for where in (tmp_path, g.parent, g):
        pd.testing.assert_frame_equal(read_squad(where), df)
    p.write_bytes(b"\xef\xbb\xbf" + p.read_bytes().replace(b"\n", b"\r\n"))
    pd.testing.assert_frame_equal(read_squad(p), df)  # as Windows writes it
    with pytest.raises(FileNotFoundError, match=r"train-v1.1.json"):
        read_squad(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"dev-v2.0.json"):
        read_squad(tmp_path, "dev", "2.0")
    with pytest.raises(FileNotFoundError, match="not a folder"):
        read_squad(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"did you mean '2.0'"):
        read_squad(tmp_path, "dev", "2.00")
    with pytest.raises(ValueError, match="unknown split"):
        read_squad(tmp_path, "test")


@pytest.mark.parametrize(
    "bad,says",
    [
        (
            made(answers=[]),
            r"line 11, data\[0\].paragraphs\[0\].qas\[0\]: 'is_impossible' is false, but there are no",
        ),
        (made(answers=None), r"line 11, .*list under 'answers'"),
        (made(answers="Cork"), "list under 'answers'"),
        (made(answers=["Cork"]), "object with 'text'"),
        (made(answers=[dict(text="Cork")]), "'answer_start' should be a number of characters, got None"),
        (made(answers=[dict(text="Cork", answer_start="0")]), "'answer_start' should be a number"),
        (made(answers=[dict(text="Cork", answer_start=True)]), "'answer_start' should be a number"),
        (
            made(answers=[dict(text="Cork", answer_start=5)]),
            "'Cork' is not at character 5 of its context, where 'floa(t)?' stands",
        ),
        (made(answers=[dict(text="Cork", answer_start=-1)]), "not at character -1"),
        (made(answers=[dict(text="Cork", answer_start=9999)]), "not at character 9999"),
        (made(answers=[dict(text=" ", answer_start=4)]), "answer's text"),
        (made(answers=[dict(text=7, answer_start=4)]), "answer's text"),
        (made(is_impossible=True), "every question of version 1.1 has an answer"),
        (made(is_impossible="no"), "should be true or false, got 'no'"),
        (made(id=3), "text under 'id' should be text, got 3"),
        (made(id=None), r"line 8, data\[0\].paragraphs\[0\].qas\[0\]"),
        (made(question=""), "text under 'question'"),
        (made(question="\ud800"), "half a surrogate pair"),
        (
            made(par=dict(context=None)),
            r"line 5, data\[0\].paragraphs\[0\]: text under 'context' should be text, got None",
        ),
        (made(par=dict(qas=None)), "list under 'qas'"),
        (made(par=dict(qas=["q"])), "object with 'id'"),
        (made(art=dict(paragraphs={})), r"data\[0\]: should be an object with a list under 'paragraphs'"),
        (made(art=dict(title=5)), "'title'"),
        (dict(data=["x"]), r"data\[0\]: should be an object"),
        (dict(data=[]), "no questions"),
        ({}, "list of articles under 'data'"),
        ([1], "list of articles under 'data'"),
        ("", "line 1: not JSON"),
        ('{"data": [', "line 1: not JSON.*cut short"),
        ("[" * 100000, "line 1: not JSON"),
        ("question\tanswer\nWhat?\tCork\n", "line 1: not JSON"),
    ],
)
def test_mistake(bad, says, tmp_path):
    p = write(tmp_path / "dev-v1.1.json", bad)
    with pytest.raises(ValueError, match=says) as e:
        read_squad(tmp_path)
    assert str(p) in str(e.value)


def test_mistakes_of_files(tmp_path):
    o = made()
    o["data"][0]["paragraphs"][0]["qas"].append(dict(o["data"][0]["paragraphs"][0]["qas"][0]))
    p = write(tmp_path / "dev-v1.1.json", o)
    with pytest.raises(
        ValueError, match=r"line 21, data\[0\].paragraphs\[0\].qas\[1\]: id 'q1' occurs a second time"
    ):
        read_squad(p)
    p.write_bytes(json.dumps(made(question="Où?"), ensure_ascii=False, indent=1).encode("latin-1", "replace"))
    with pytest.raises(ValueError, match=r"dev-v1.1.json, line \d+: not UTF-8"):
        read_squad(p)
    whole = json.dumps(made(), indent=1)
    p.unlink()
    for cut in range(0, len(whole) - 1, 7):
        with pytest.raises(ValueError, match=r"cut.json, line \d+: not JSON"):
            read_squad(write(tmp_path / "cut.json", whole[:cut]))
    g = tmp_path / "dev-v1.1.json.gz"
    g.write_bytes(gzip.compress(whole.encode())[:-9])
    with pytest.raises(ValueError, match=r"gz, line .*broken or cut short"):
        read_squad(tmp_path)
    for v, says in (("1.1", "every question of version 1.1"), ("2.0", None)):
        q = write(
            tmp_path / "two.json",
            made(
                "2.0", answers=[], is_impossible=True, plausible_answers=[dict(text="Cork", answer_start=0)]
            ),
        )
        if says:
            with pytest.raises(ValueError, match=says):
                read_squad(q, version=v)
        else:
            assert read_squad(q, version=v).impossible.tolist() == [True]
    with pytest.raises(ValueError, match="'is_impossible' is true, but there are answers"):
        read_squad(write(tmp_path / "both.json", made("2.0", is_impossible=True)), version="2.0")


@fuzz
@given(st.data())
def test_fuzz_bytes(tmp_path, data):
    "Bytes changed, cut or inserted anywhere: a frame or a ValueError that names the file, nothing else."
    b = bytearray(json.dumps(made("2.0", kind="k"), indent=1).encode())
    at = data.draw(st.integers(0, len(b)))
    b[at : at + data.draw(st.integers(0, 6))] = data.draw(st.binary(max_size=6))
    (tmp_path / "f.json").write_bytes(bytes(b))
    try:
        df = read_squad(tmp_path / "f.json", version="2.0")
    except ValueError as e:
        assert "f.json" in str(e)
    else:
        assert all(
            c[k : k + len(a)] == a
            for c, ts, ks in zip(df.context, df.answers, df.starts, strict=False)
            for a, k in zip(ts, ks, strict=False)
        )


@fuzz
@given(
    st.lists(
        st.tuples(
            st.text(min_size=1, max_size=30),
            st.text(max_size=12),
            st.integers(0, 29),
            st.integers(1, 9),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_fuzz_round_trip(tmp_path, rows):
    out = []
    for i, (c, q, k, n, none) in enumerate(rows):
        a = c[k : k + n]
        out.append(
            dict(
                id=f"q{i}",
                context=c,
                question=q,
                answers=[] if none else [a],
                starts=[] if none else [k],
                impossible=none,
                group=f"g{i // 2}",
                kind="x" * (i % 2),
            )
        )
    df = pd.DataFrame(out)
    try:
        p = write_squad(df, tmp_path / "r.json", "2.0")
    except ValueError:
        return
    pd.testing.assert_frame_equal(read_squad(p, version="2.0"), df)


def test_hub_squad(tmp_path):
    datasets = pytest.importorskip("datasets")

    def save(**change):
        datasets.Dataset.from_list(
            [
                dict(
                    id="q1",
                    title="T",
                    context=TEXT,
                    question="What floats?",
                    answers=dict(text=["Cork"], answer_start=[0]),
                )
                | change
            ]
        ).to_parquet(tmp_path / "d" / "validation.parquet")

    save()
    df = hub_squad("dev", "1.1", str(tmp_path / "d"), cache_dir=str(tmp_path / "a"))
    assert df.answers[0] == ["Cork"] and df.group[0] == "T"
    pd.testing.assert_frame_equal(df, read_squad(write(tmp_path / "dev-v1.1.json", made())))
    save(answers=dict(text=["Cork"], answer_start=[3]))
    with pytest.raises(ValueError, match="row 0: the answer 'Cork' is not at character 3"):
        hub_squad("dev", "1.1", str(tmp_path / "d"), cache_dir=str(tmp_path / "b"))


# ---- scores
GOLDEN = os.environ.get("VLKD_GOLDEN")


@pytest.mark.skipif(
    not GOLDEN,
    reason="VLKD_GOLDEN does not name the folder of the peers' values; the notebook holds a part of them",
)
def test_golden():
    for c in json.loads((Path(GOLDEN) / "squad.json").read_text())["cases"]:
        assert (
            exact_match(c["pred"], c["gold"]) == c["em"]
            and abs(f1_score(c["pred"], c["gold"]) - c["f1"]) < 1e-12
        )
        assert normalize_answer(c["gold"]) == c["norm_gold"] and normalize_answer(c["pred"]) == c["norm_pred"]


real = pytest.mark.skipif(not os.environ.get("VLKD_DATA"), reason="VLKD_DATA is not set")


@pytest.fixture(scope="module")
def official():
    "The official scorer, which lies beside the data."
    f = data_dir() / "squad" / "official_evaluate-v2.0.py.txt"
    if not f.is_file():
        pytest.skip("no official scorer under VLKD_DATA")
    spec = importlib.util.spec_from_loader(
        "official", importlib.machinery.SourceFileLoader("official", str(f))
    )
    m = importlib.util.module_from_spec(spec)
    exec(compile(f.read_text(), str(f), "exec"), m.__dict__)
    return m


def guesses(df, seed, ties=False):
    "Predictions as models make them (right, longer, shorter, other spans, nothing), and no-answer chances."
    r = random.Random(seed)
    said, sure = {}, {}
    for q in df.itertuples():
        how, c = r.random(), q.context
        a = r.choice(q.answers) if q.answers else ""
        k = r.choice(q.starts) if q.starts else r.randrange(len(c))
        said[q.id] = (
            a
            if how < 0.3
            else c[max(0, k - r.randrange(9)) : k + r.randrange(1, 40)]
            if how < 0.7
            else ""
            if how < 0.8
            else r.choice(["the", "A", "an a", ".", a.upper() + "!", c[k : k + 3]])
        )
        sure[q.id] = (
            round(r.random(), 1)
            if ties
            else min(max(0.5 + 0.3 * q.impossible + 0.5 * (r.random() - 0.5), 0), 1)
        )
    return said, sure


@real
@pytest.mark.parametrize("version,rows,none", [("1.1", 10570, 0), ("2.0", 11873, 5945)])
def test_real_dev_equals_official(official, version, rows, none):
    d = data_dir() / "squad"
    df = read_squad(d, "dev", version)
    assert len(df) == rows and df.impossible.sum() == none
    raw = json.loads(gzip.decompress((d / f"dev-v{version}.json.gz").read_bytes()))["data"]
    has = official.make_qid_to_has_ans(raw)
    for ties in (False, True):
        said, sure = guesses(df, 1, ties)
        ex, f1 = official.get_raw_scores(raw, said)
        ours = squad_scores(df, said)
        assert ours.exact.tolist() == [ex[i] for i in df.id] and np.allclose(
            ours.f1, [f1[i] for i in df.id], atol=1e-12, rtol=0
        )
        for t in (1.0, 0.5, 0.0):
            want = {}
            e, f = (official.apply_no_ans_threshold(x, sure, has, t) for x in (ex, f1))
            want |= official.make_eval_dict(e, f)
            for name, keep in (("HasAns", True), ("NoAns", False)):
                if ids := [k for k, v in has.items() if v == keep]:
                    official.merge_eval(want, official.make_eval_dict(e, f, ids), name)
            official.find_all_best_thresh(want, said, ex, f1, sure, has)
            got = evaluate_squad(df, said, sure, t)
            assert set(got) == set(want) and all(abs(got[k] - want[k]) < 1e-9 for k in want), (got, want)


@real
def test_real_normalisation(official):
    "Every text of the real development sets normalises as the official scorer has it."
    for v in ("1.1", "2.0"):
        df = read_squad(data_dir() / "squad", "dev", v)
        for s in {*df.question, *df.context, *(a for x in df.answers for a in x)}:
            assert normalize_answer(s) == official.normalize_answer(s)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=25), st.text(max_size=25))
def test_scores_promise(a, b):
    assert (
        f1_score(a, b) == f1_score(b, a)
        and exact_match(a, b) == exact_match(b, a)
        and exact_match(a, a) == 1 == f1_score(a, a)
    )
    assert exact_match(a, b) <= f1_score(a, b) <= 1 and normalize_answer(
        normalize_answer(a)
    ) == normalize_answer(a)


def test_best_threshold_is_best():
    "Without equal probabilities, no threshold does better than the one found."
    df = pd.DataFrame([dict(id=str(i), answers=["x"] if i % 3 else []) for i in range(60)])
    r = np.random.default_rng(0)
    said = {i: r.choice(["x", "y", ""]) for i in df.id}
    sure = dict(zip(df.id, r.permutation(60) / 60, strict=False))
    e = evaluate_squad(df, said, sure)

    def at(t):
        return 100 * squad_scores(df, said, sure, t).exact.mean()

    assert (
        abs(at(e["best_exact_thresh"]) - e["best_exact"]) < 1e-9
        and max(at(t) for t in (-1, *sure.values())) <= e["best_exact"] + 1e-9
    )
    with pytest.raises(ValueError, match="59 predictions for 60 questions"):
        squad_scores(df, ["x"] * 59)
    with pytest.raises(ValueError, match="no no-answer probability"):
        evaluate_squad(df, said, {})


# ---- windows
@pytest.fixture(scope="module")
def tok():
    from vlkd.data.text import train_tokenizer

    return train_tokenizer(["abcdefghijklmnopqrstuvwxyz0123456789 .,?'é"] * 2, 120, 512)


def question(context, answer, q="who ?"):
    return pd.DataFrame(
        [
            dict(
                id="q",
                context=context,
                question=q,
                answers=[answer] if answer else [],
                starts=[context.index(answer)] if answer else [],
                impossible=not answer,
                group="",
                kind="",
            )
        ]
    )


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 60), st.integers(6, 40), st.integers(1, 50), st.integers(0, 59), st.integers(1, 6))
def test_windows_against_brute_force(tok, n, size, stride, start, length):
    words = [f"w{i}" for i in range(n)]
    context = " ".join(words)
    start %= n
    answer = " ".join(words[start : start + length])
    df = question(context, None)
    df = df.assign(
        answers=[[answer]], starts=[[len(" ".join(words[:start])) + bool(start)]], impossible=[False]
    )
    q = tok("who ?", add_special_tokens=False)["input_ids"]
    if size - len(q) - 3 < 1:
        with pytest.raises(ValueError, match="leaves no room"):
            squad_windows(tok, df, size, stride)
        return
    w = squad_windows(tok, df, size, stride)
    room = size - len(q) - 3
    e = tok(context, add_special_tokens=False, return_offsets_mapping=True)
    T = len(e["input_ids"])
    owner = np.full(T, -1)
    for t in range(T):  # where is each token seen best?
        score = [
            min(t - f, f + m - 1 - t) + 0.01 * m if f <= t < f + m else -1
            for f, m in zip(w.first, w.n, strict=False)
        ]
        owner[t] = int(np.argmax(score))
        assert max(score) >= 0
    for k in range(len(w)):
        assert (
            np.array_equal(np.flatnonzero(owner == k), np.arange(w.lo[k], w.hi[k]))
            and w.n[k] <= room
            and w.first[k] == k * min(stride, room)
        )
        ids, mask, types = w.batch([k])
        assert (
            ids[0].tolist()
            == [
                tok.cls_token_id,
                *q,
                tok.sep_token_id,
                *e["input_ids"][w.first[k] : w.first[k] + w.n[k]],
                tok.sep_token_id,
            ]
            and mask.all()
            and len(ids[0]) <= size
        )
        assert types[0].tolist() == [0] * (len(q) + 2) + [1] * (int(w.n[k]) + 1)
        a, b = w.labels[k]
        c = w.characters(k)
        if a:
            assert context[c[a - w.offset(k)][0] : c[b - w.offset(k)][1]] == answer
        else:
            assert not (
                w.first[k] <= next(t for t, o in enumerate(e["offset_mapping"]) if o[0] == df.starts[0][0])
                and df.starts[0][0] + len(answer) <= c[-1][1]
            )


def test_windows_refuse(tok):
    df = question("a b c", "b")
    with pytest.raises(ValueError, match="advance by one"):
        squad_windows(tok, df, 20, 0)
    with pytest.raises(ValueError, match="no tokens"):
        squad_windows(tok, df.assign(context="\u200b", answers=[[]], starts=[[]]), 20)
    assert len(squad_windows(tok, question("a b c", "b", "y " * 40), 30, 8, max_question=5).questions[0]) == 5


def test_accents_keep_characters(tok):
    c = "Le café d'Été."
    df = question(c, "café")
    w = squad_windows(tok, df, 40)
    a, b = w.labels[0]
    o = w.characters(0)
    assert a > 0 and c[o[a - w.offset(0)][0] : o[b - w.offset(0)][1]] == "café"


@real
def test_real_windows():
    from vlkd.data.public import bert_vocab
    from vlkd.data.text import load_vocabulary

    df = read_squad(data_dir() / "squad", "dev", "1.1").iloc[::40]
    tk = load_vocabulary(bert_vocab(), 512)
    w = squad_windows(tk, df, 128, 64)
    assert len(w) > len(df)
    found = pd.Series(False, index=range(len(df)))
    good = 0
    for k in np.flatnonzero(w.labels[:, 0]):
        q = w.question[k]
        a, b = w.labels[k] - w.offset(k)
        c = w.characters(k)
        text = df.context.iloc[q][c[a][0] : c[b][1]]
        found[q] = True
        good += normalize_answer(text) == normalize_answer(df.answers.iloc[q][0])
    assert found.mean() > 0.95 and good / (w.labels[:, 0] > 0).sum() > 0.97


# ---- fine-tuning
def test_decoding_over_windows(tok):
    "The best span over all windows equals the best over all pairs of tokens in all windows."
    from vlkd.train.squad import SquadRecipe, decode_spans

    g = np.random.default_rng(0)
    df = pd.concat(
        [question(" ".join(f"w{i}" for i in range(n)), "w0").assign(id=f"q{n}") for n in (1, 5, 13)],
        ignore_index=True,
    )
    w = squad_windows(tok, df, 24, 5)
    r = SquadRecipe(n_best=999, max_answer=4)
    x = [g.normal(size=(n, 2)) for n in w.lengths]
    p = decode_spans(df, w, x, r)
    none, best = {}, {}
    for k, q in enumerate(w.question):
        none[q] = min(none.get(q, 9e9), x[k][0].sum())
        for i in range(w.lo[k] - w.first[k], w.hi[k] - w.first[k]):
            for j in range(i, min(i + 4, w.n[k])):
                best[q] = max(
                    best.get(q, (-9e9,)),
                    (
                        x[k][w.offset(k) + i, 0] + x[k][w.offset(k) + j, 1],
                        int(w.characters(k)[i][0]),
                        int(w.characters(k)[j][1]),
                    ),
                )
    assert len(w) > 3
    for q, (s, a, b) in best.items():
        assert (
            p.span[q] == df.context[q][a:b]
            and p.begin[q] == a
            and abs(p.no_answer[q] - 1 / (1 + np.exp(s - none[q]))) < 1e-12
        )


def test_folders_that_do_not_fit(tok, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    from vlkd.train.squad import SquadRecipe, finetune_squad, span_classifier

    small = dict(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=32,
    )
    df = question("a b c", "b")

    def save(name, **kw):
        BertForMaskedLM(BertConfig(**(small | dict(vocab_size=len(tok)) | kw))).save_pretrained(
            tmp_path / name
        )
        tok.save_pretrained(tmp_path / name)
        return tmp_path / name

    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        span_classifier(tmp_path / "none", 0)
    m = save("fits")
    r = SquadRecipe(steps=1, batch=2)
    out = finetune_squad(m, df, df, tmp_path / "out", r)
    assert (
        out.said[0] in "a b c"
        and len(out) == 1
        and (out.label == 1).all()
        and (out.right == out.said.isin(["b", "a b"])).all()  # the official score drops articles
    )
    again = finetune_squad(m, df, df, tmp_path / "out2", r)
    pd.testing.assert_frame_equal(out, again)  # the head is drawn from the seed
    with pytest.raises(ValueError, match="which has 32 positions; set max_tokens"):
        finetune_squad(m, df, df, tmp_path / "out", SquadRecipe(max_tokens=64))
    with pytest.raises(ValueError, match=r"vocabulary entries.*do not belong together"):
        finetune_squad(save("vocabulary", vocab_size=len(tok) + 3), df, df, tmp_path / "out", r)
    c = json.loads((m / "config.json").read_text())
    (m / "config.json").write_text(json.dumps(c | dict(num_hidden_layers=2)))
    with pytest.raises(ValueError, match=r"lacks 16 weights.*another architecture"):
        span_classifier(m, 0)
    (m / "config.json").write_text(json.dumps(c | dict(model_type="gpt2")))
    with pytest.raises(ValueError, match="holds a 'gpt2' model"):
        span_classifier(m, 0)
    with pytest.raises(ValueError, match="squad1 or squad2"):
        finetune_squad(m, df, df, tmp_path / "out", r, task="squad")
