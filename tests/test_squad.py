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
    SQUAD_COLUMNS,
    evaluate_squad,
    exact_match,
    f1_score,
    normalize_answer,
    read_squad,
    squad_scores,
    squad_windows,
    write_squad,
)

fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = "Cork floats. A stone sinks, é\u2028and \U0001f600 a nail."


def made(version="1.1", par=None, art=None, **q):
    q = dict(id="q1", question="What floats?", answers=[dict(text="Cork", answer_start=0)]) | q
    if version == "2.0":
        q = dict(is_impossible=False) | q
    paragraph = dict(context=TEXT, qas=[q]) | (par or {})
    return dict(version=version, data=[dict(title="T", paragraphs=[paragraph]) | (art or {})])


def write(p, o):
    p.write_text(o if isinstance(o, str) else json.dumps(o, indent=1), encoding="utf-8")
    return p


# ---- reading
def test_reads_plain_gz_and_folder(tmp_path):
    p = write(tmp_path / "dev-v1.1.json", made())
    df = read_squad(p)
    assert tuple(df.columns) == SQUAD_COLUMNS and df.answers[0] == ["Cork"] and df.starts[0] == [0]
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


def answer(**change):
    return made(answers=[dict(text="Cork", answer_start=0) | change])


AT = r"data\[0\].paragraphs\[0\]"
MISTAKES = [
    (made(answers=[]), rf"line 11, {AT}.qas\[0\]: 'is_impossible' is false, but there are no"),
    (made(answers=None), r"line 11, .*a list under 'answers', got None"),
    (made(answers="Cork"), "a list under 'answers', got 'Cork'"),
    (made(answers=["Cork"]), "text under 'text'"),
    (made(answers=[dict(text="Cork")]), "'answer_start' should be a number of characters, got None"),
    (answer(answer_start="0"), "'answer_start' should be a number"),
    (answer(answer_start=True), "'answer_start' should be a number"),
    (answer(answer_start=5), "'Cork' is not at character 5 of its context, where 'floa(t)?' stands"),
    (answer(answer_start=-1), "not at character -1"),
    (answer(answer_start=9999), "not at character 9999"),
    (answer(text=" "), "text under 'text', got ' '"),
    (answer(text=7), "text under 'text', got 7"),
    (made(is_impossible=True), "every question of version 1.1 has an answer"),
    (made(is_impossible="no"), "should be true or false, got 'no'"),
    (made(id=3), "text under 'id', got 3"),
    (made(id=None), rf"line 8, {AT}.qas\[0\]"),
    (made(question=""), "text under 'question'"),
    (made(question="\ud800"), "half a surrogate pair"),
    (made(par=dict(context=None)), rf"line 5, {AT}: should be an object with text under 'context', got None"),
    (made(par=dict(qas=None)), "a list under 'qas'"),
    (made(par=dict(qas=["q"])), "text under 'id'"),
    (made(art=dict(paragraphs={})), r"data\[0\]: should be an object with a list under 'paragraphs'"),
    (made(art=dict(title=5)), "'title'"),
    (dict(data=["x"]), r"data\[0\]: should be an object"),
    (dict(data=[]), "no questions"),
    ({}, "a list under 'data'"),
    ([1], "a list under 'data'"),
    ("", "line 1: not JSON"),
    ('{"data": [', "line 1: not JSON.*cut short"),
    ("[" * 100000, "line 1: not JSON"),
    ("question\tanswer\nWhat?\tCork\n", "line 1: not JSON"),
]


@pytest.mark.parametrize("bad, says", MISTAKES)
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
    plausible = [dict(text="Cork", answer_start=0)]
    q = write(tmp_path / "two.json", made("2.0", answers=[], is_impossible=True, plausible_answers=plausible))
    with pytest.raises(ValueError, match=r"every question of version 1\.1"):
        read_squad(q, version="1.1")
    assert read_squad(q, version="2.0").impossible.tolist() == [True]
    with pytest.raises(ValueError, match="'is_impossible' is true, but there are answers"):
        read_squad(write(tmp_path / "both.json", made("2.0", is_impossible=True)), version="2.0")


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
        answers = dict(answers=[], starts=[]) if none else dict(answers=[c[k : k + n]], starts=[k])
        more = dict(impossible=none, group=f"g{i // 2}", kind="x" * (i % 2))
        out.append(dict(id=f"q{i}", context=c, question=q) | answers | more)
    df = pd.DataFrame(out)
    try:
        p = write_squad(df, tmp_path / "r.json", "2.0")
    except ValueError:
        return
    pd.testing.assert_frame_equal(read_squad(p, version="2.0"), df)


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
        if 0.3 <= how < 0.7:
            a = c[max(0, k - r.randrange(9)) : k + r.randrange(1, 40)]
        elif how >= 0.7:
            a = "" if how < 0.8 else r.choice(["the", "A", "an a", ".", a.upper() + "!", c[k : k + 3]])
        chance = r.random()
        said[q.id] = a
        sure[q.id] = round(chance, 1) if ties else min(max(0.25 + 0.3 * q.impossible + 0.5 * chance, 0), 1)
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
    assert f1_score(a, b) == f1_score(b, a) and exact_match(a, b) == exact_match(b, a)
    assert exact_match(a, a) == 1 == f1_score(a, a) and exact_match(a, b) <= f1_score(a, b) <= 1
    assert normalize_answer(normalize_answer(a)) == normalize_answer(a)


def test_best_threshold_is_best():
    "Without equal probabilities, no threshold does better than the one found."
    df = pd.DataFrame([dict(id=str(i), answers=["x"] if i % 3 else []) for i in range(60)])
    r = np.random.default_rng(0)
    said = {i: r.choice(["x", "y", ""]) for i in df.id}
    sure = dict(zip(df.id, r.permutation(60) / 60, strict=False))
    e = evaluate_squad(df, said, sure)

    def at(t):
        return 100 * squad_scores(df, said, sure, t).exact.mean()

    assert abs(at(e["best_exact_thresh"]) - e["best_exact"]) < 1e-9
    assert max(at(t) for t in (-1, *sure.values())) <= e["best_exact"] + 1e-9
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
    found = dict(answers=[answer], starts=[context.index(answer)]) if answer else dict(answers=[], starts=[])
    row = dict(id="q", context=context, question=q, impossible=not answer, group="", kind="")
    return pd.DataFrame([row | found])


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
        assert np.array_equal(np.flatnonzero(owner == k), np.arange(w.lo[k], w.hi[k]))
        assert w.n[k] <= room and w.first[k] == k * min(stride, room)
        ids, mask, types = w.batch([k])
        shown = e["input_ids"][w.first[k] : w.first[k] + w.n[k]]
        assert ids[0].tolist() == [tok.cls_token_id, *q, tok.sep_token_id, *shown, tok.sep_token_id]
        assert mask.all() and len(ids[0]) <= size
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
                score = x[k][w.offset(k) + i, 0] + x[k][w.offset(k) + j, 1]
                span = int(w.characters(k)[i][0]), int(w.characters(k)[j][1])
                best[q] = max(best.get(q, (-9e9,)), (score, *span))
    assert len(w) > 3
    for q, (s, a, b) in best.items():
        assert p.span[q] == df.context[q][a:b] and p.begin[q] == a
        assert abs(p.no_answer[q] - 1 / (1 + np.exp(s - none[q]))) < 1e-12


def test_folders_that_do_not_fit(tok, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    from vlkd.train.squad import SquadRecipe, finetune_squad, span_classifier

    small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    small |= dict(max_position_embeddings=32, vocab_size=len(tok))
    df = question("a b c", "b")

    def save(name, **kw):
        BertForMaskedLM(BertConfig(**(small | kw))).save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
        return tmp_path / name

    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        span_classifier(tmp_path / "none", 0)
    m = save("fits")
    r = SquadRecipe(steps=1, batch=2)
    out = finetune_squad(m, df, df, tmp_path / "out", r)
    assert out.said[0] in "a b c" and len(out) == 1 and (out.label == 1).all()
    assert (out.right == out.said.isin(["b", "a b"])).all()  # the official score drops articles
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
