"SQuAD: corrupt and unseen files, scores beside the official scorer, windows beside a brute-force reading."

import gzip
import json
import os
import random
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM

from vlkd.core.settings import data_dir
from vlkd.data.public import bert_vocab
from vlkd.data.squad import (
    evaluate_squad,
    exact_match,
    f1_score,
    normalize_answer,
    read_squad,
    squad_scores,
    squad_windows,
    write_squad,
)
from vlkd.data.text import load_vocabulary, train_tokenizer
from vlkd.train.squad import SquadRecipe, decode_spans, finetune_squad, span_classifier

fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = "Cork floats. A stone sinks, é\u2028and \U0001f600 a nail."


def made(version="1.1", par=None, art=None, **change):
    "SQuAD's layout with one question; `par`, `art`, `change`: other keys of its paragraph, article, itself."
    question = dict(id="q1", question="What floats?", answers=[dict(text="Cork", answer_start=0)])
    question |= (dict(is_impossible=False) if version == "2.0" else {}) | change
    paragraph = dict(context=TEXT, qas=[question]) | (par or {})
    return dict(version=version, data=[dict(title="T", paragraphs=[paragraph]) | (art or {})])


def answer(**change):
    return made(answers=[dict(text="Cork", answer_start=0) | change])


def write(file, content):
    text = content if isinstance(content, str) else json.dumps(content, indent=1)
    file.write_text(text, encoding="utf-8")
    return file


# ---- reading
def test_reads_plain_gz_and_folder(tmp_path):
    plain = write(tmp_path / "dev-v1.1.json", made())
    df = read_squad(plain)
    assert list(df.columns) == "id context question answers starts impossible group kind".split()
    assert df.answers[0] == ["Cork"] and df.starts[0] == [0]
    packed = tmp_path / "gz" / "dev-v1.1.json.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for where in (tmp_path, packed.parent, packed):
        pd.testing.assert_frame_equal(read_squad(where), df)
    plain.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n"))
    pd.testing.assert_frame_equal(read_squad(plain), df)  # as Windows writes it


@pytest.mark.parametrize(
    "args, error, message",
    [
        (("", "train"), FileNotFoundError, r"train-v1.1.json"),
        (("", "dev", "2.0"), FileNotFoundError, r"dev-v2.0.json"),
        (("nothing",), FileNotFoundError, "not a folder"),
        (("", "dev", "2.00"), ValueError, r"did you mean '2.0'"),
        (("", "test"), ValueError, "unknown split"),
    ],
)
def test_what_is_not_there(tmp_path, args, error, message):
    write(tmp_path / "dev-v1.1.json", made())
    with pytest.raises(error, match=message):
        read_squad(tmp_path / args[0], *args[1:])


FIRST = r"data\[0\].paragraphs\[0\]"


@pytest.mark.parametrize(
    "bad, says",
    [
        (made(answers=[]), rf"line 11, {FIRST}.qas\[0\]: 'is_impossible' is false, but there are no"),
        (made(answers=None), r"line 11, .*list under 'answers'"),
        (made(answers="Cork"), "list under 'answers'"),
        (made(answers=["Cork"]), "text under 'text'"),
        (answer(answer_start=None), "'answer_start' should be a number of characters, got None"),
        (answer(answer_start="0"), "'answer_start' should be a number"),
        (answer(answer_start=True), "'answer_start' should be a number"),
        (answer(answer_start=5), "'Cork' is not at character 5 of its context, where 'floa(t)?' stands"),
        (answer(answer_start=-1), "not at character -1"),
        (answer(answer_start=9999), "not at character 9999"),
        (answer(text=" ", answer_start=4), "text under 'text', got"),
        (answer(text=7, answer_start=4), "text under 'text', got"),
        (made(is_impossible=True), "every question of version 1.1 has an answer"),
        (made(is_impossible="no"), "should be true or false, got 'no'"),
        (made(id=3), "text under 'id', got 3"),
        (made(id=None), rf"line 8, {FIRST}.qas\[0\]"),
        (made(question=""), "text under 'question'"),
        (made(question="\ud800"), "half a surrogate pair"),
        (
            made(par=dict(context=None)),
            rf"line 5, {FIRST}: should be an object with text under 'context', got None",
        ),
        (made(par=dict(qas=None)), "list under 'qas'"),
        (made(par=dict(qas=["q"])), "text under 'id'"),
        (made(art=dict(paragraphs={})), r"data\[0\]: should be an object with a list under 'paragraphs'"),
        (made(art=dict(title=5)), "'title'"),
        (
            made(par=dict(qas=made()["data"][0]["paragraphs"][0]["qas"] * 2)),
            rf"line \d+, {FIRST}.qas\[1\]: id 'q1' occurs a second time",
        ),
        (dict(data=["x"]), r"data\[0\]: should be an object"),
        (dict(data=[]), "no questions"),
        ({}, "a list under 'data'"),
        ([1], "a list under 'data'"),
        ("", "line 1: not JSON"),
        ('{"data": [', "line 1: not JSON.*cut short"),
        ("[" * 100000, "line 1: not JSON"),
        ("question\tanswer\nWhat?\tCork\n", "line 1: not JSON"),
    ],
)
def test_mistake(bad, says, tmp_path):
    file = write(tmp_path / "dev-v1.1.json", bad)
    with pytest.raises(ValueError, match=says) as e:
        read_squad(tmp_path)
    assert str(file) in str(e.value)


def test_files_that_are_cut_or_of_another_encoding(tmp_path):
    file, whole = tmp_path / "dev-v1.1.json", json.dumps(made(), indent=1)
    for cut in range(0, len(whole) - 1, 7):
        with pytest.raises(ValueError, match=r"dev-v1.1.json, line \d+: not JSON"):
            read_squad(write(file, whole[:cut]))
    accents = json.dumps(made(question="Où?"), ensure_ascii=False, indent=1)
    file.write_bytes(accents.encode("latin-1", "replace"))
    with pytest.raises(ValueError, match=r"dev-v1.1.json, line \d+: not UTF-8"):
        read_squad(file)
    file.unlink()
    (tmp_path / "dev-v1.1.json.gz").write_bytes(gzip.compress(whole.encode())[:-9])
    with pytest.raises(ValueError, match=r"gz, line .*broken or cut short"):
        read_squad(tmp_path)


def test_questions_without_an_answer(tmp_path):
    plausible = [dict(text="Cork", answer_start=0)]
    none = made("2.0", answers=[], is_impossible=True, plausible_answers=plausible)
    file = write(tmp_path / "two.json", none)
    assert read_squad(file, version="2.0").impossible.tolist() == [True]
    with pytest.raises(ValueError, match="every question of version"):
        read_squad(file, version="1.1")
    write(file, made("2.0", is_impossible=True))
    with pytest.raises(ValueError, match="'is_impossible' is true, but there are answers"):
        read_squad(file, version="2.0")


ROW = st.tuples(
    st.text(min_size=1, max_size=30),
    st.text(max_size=12),
    st.integers(0, 29),
    st.integers(1, 9),
    st.booleans(),
)


@fuzz
@given(st.lists(ROW, min_size=1, max_size=4))
def test_fuzz_round_trip(tmp_path, rows):
    frames = []
    for i, (context, asked, start, length, none) in enumerate(rows):
        answers = [] if none else [context[start : start + length]]
        row = dict(id=f"q{i}", context=context, question=asked, answers=answers, starts=[start] * (not none))
        frames.append(row | dict(impossible=none, group=f"g{i // 2}", kind="x" * (i % 2)))
    df = pd.DataFrame(frames)
    try:
        file = write_squad(df, tmp_path / "r.json", "2.0")
    except ValueError:
        return
    pd.testing.assert_frame_equal(read_squad(file, version="2.0"), df)


# ---- scores
GOLDEN = os.environ.get("VLKD_GOLDEN")


@pytest.mark.skipif(not GOLDEN, reason="VLKD_GOLDEN does not name the folder of the peers' values")
def test_golden():
    for case in json.loads((Path(GOLDEN) / "squad.json").read_text())["cases"]:
        said, gold = case["pred"], case["gold"]
        assert exact_match(said, gold) == case["em"] and abs(f1_score(said, gold) - case["f1"]) < 1e-12
        assert [normalize_answer(text) for text in (gold, said)] == [case["norm_gold"], case["norm_pred"]]


@pytest.fixture(scope="module")
def official():
    "The official scorer, which lies beside the data."
    folder = data_dir(need=False)
    file = folder and folder / "squad" / "official_evaluate-v2.0.py.txt"
    if not file or not file.is_file():
        pytest.skip("no official scorer under VLKD_DATA")
    module = types.ModuleType("official")
    exec(compile(file.read_text(), str(file), "exec"), module.__dict__)
    return module


def guesses(df, seed, ties=False):
    "Predictions as models make them (right, longer, shorter, other spans, nothing), and no-answer chances."
    draw = random.Random(seed)
    said, sure = {}, {}
    for row in df.itertuples():
        how, context = draw.random(), row.context
        answer = draw.choice(row.answers) if row.answers else ""
        start = draw.choice(row.starts) if row.starts else draw.randrange(len(context))
        span = context[max(0, start - draw.randrange(9)) : start + draw.randrange(1, 40)]
        odd = draw.choice(["the", "A", "an a", ".", answer.upper() + "!", context[start : start + 3]])
        said[row.id] = answer if how < 0.3 else span if how < 0.7 else "" if how < 0.8 else odd
        none = draw.random()
        sure[row.id] = round(none, 1) if ties else min(max(0.25 + 0.3 * row.impossible + 0.5 * none, 0), 1)
    return said, sure


@pytest.mark.parametrize("version, rows, none", [("1.1", 10570, 0), ("2.0", 11873, 5945)])
def test_real_dev_equals_official(official, data, version, rows, none):
    df = read_squad(data / "squad", "dev", version)
    assert len(df) == rows and df.impossible.sum() == none
    raw = json.loads(gzip.decompress((data / f"squad/dev-v{version}.json.gz").read_bytes()))["data"]
    answered = official.make_qid_to_has_ans(raw)
    for ties in (False, True):
        said, sure = guesses(df, 1, ties)
        exact, f1 = official.get_raw_scores(raw, said)
        ours = squad_scores(df, said)
        assert ours.exact.tolist() == [exact[i] for i in df.id]
        assert np.allclose(ours.f1, [f1[i] for i in df.id], atol=1e-12, rtol=0)
        for threshold in (1.0, 0.5, 0.0):
            scores = [official.apply_no_ans_threshold(x, sure, answered, threshold) for x in (exact, f1)]
            wanted = official.make_eval_dict(*scores)
            for name, keep in (("HasAns", True), ("NoAns", False)):
                if ids := [i for i, has in answered.items() if has == keep]:
                    official.merge_eval(wanted, official.make_eval_dict(*scores, ids), name)
            official.find_all_best_thresh(wanted, said, exact, f1, sure, answered)
            assert evaluate_squad(df, said, sure, threshold) == pytest.approx(dict(wanted), abs=1e-9)


def test_real_normalisation(official, data):
    "Texts of the real development sets normalise as the official scorer has it."
    for version in ("1.1", "2.0"):
        df = read_squad(data / "squad", "dev", version)
        for text in {*df.question, *df.context[::10], *(a for answers in df.answers for a in answers)}:
            assert normalize_answer(text) == official.normalize_answer(text)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=25), st.text(max_size=25))
def test_scores_promise(one, other):
    assert exact_match(one, other) == exact_match(other, one) <= f1_score(one, other) <= 1
    assert f1_score(one, other) == f1_score(other, one)
    assert exact_match(one, one) == 1 == f1_score(one, one)
    assert normalize_answer(normalize_answer(one)) == normalize_answer(one)


def test_best_threshold_is_best():
    "Without equal probabilities, no threshold does better than the one found."
    df = pd.DataFrame([dict(id=str(i), answers=["x"] if i % 3 else []) for i in range(60)])
    draw = np.random.default_rng(0)
    said = {i: draw.choice(["x", "y", ""]) for i in df.id}
    sure = dict(zip(df.id, draw.permutation(60) / 60, strict=True))
    scores = evaluate_squad(df, said, sure)

    def at(threshold):
        return 100 * squad_scores(df, said, sure, threshold).exact.mean()

    best = scores["best_exact"]
    assert at(scores["best_exact_thresh"]) == pytest.approx(best)
    assert max(at(threshold) for threshold in (-1, *sure.values())) <= best + 1e-9
    with pytest.raises(ValueError, match="59 predictions for 60 questions"):
        squad_scores(df, ["x"] * 59)
    with pytest.raises(ValueError, match="no no-answer probability"):
        evaluate_squad(df, said, {})


# ---- windows
@pytest.fixture(scope="module")
def tok():
    return train_tokenizer(["abcdefghijklmnopqrstuvwxyz0123456789 .,?'é"] * 2, 120, 512)


def question(context, answer, q="who ?"):
    there = [answer] if answer else []
    row = dict(id="q", context=context, question=q, answers=there, starts=[context.index(x) for x in there])
    return pd.DataFrame([row | dict(impossible=not answer, group="", kind="")])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 60), st.integers(6, 40), st.integers(1, 50), st.integers(0, 59), st.integers(1, 6))
def test_windows_against_brute_force(tok, n, size, stride, start, length):
    words = [f"w{i}" for i in range(n)]
    context, start = " ".join(words), start % n
    answer, begins = " ".join(words[start : start + length]), len(" ".join(words[:start])) + bool(start)
    df = question(context, None).assign(answers=[[answer]], starts=[[begins]], impossible=[False])
    asked = tok("who ?", add_special_tokens=False)["input_ids"]
    room = size - len(asked) - 3
    if room < 1:
        with pytest.raises(ValueError, match="leaves no room"):
            squad_windows(tok, df, size, stride)
        return
    windows = squad_windows(tok, df, size, stride)
    encoded = tok(context, add_special_tokens=False, return_offsets_mapping=True)
    owner = [seen_best(token, windows) for token in range(len(encoded["input_ids"]))]
    answer_token = next(t for t, at in enumerate(encoded["offset_mapping"]) if at[0] == begins)
    for k in range(len(windows)):
        first, n_tokens = windows.first[k], windows.n[k]
        assert np.flatnonzero(np.equal(owner, k)).tolist() == [*range(windows.lo[k], windows.hi[k])]
        assert n_tokens <= room and first == k * min(stride, room)
        ids, mask, types = windows.batch([k])
        text = encoded["input_ids"][first : first + n_tokens]
        wanted = [tok.cls_token_id, *asked, tok.sep_token_id, *text, tok.sep_token_id]
        assert ids[0].tolist() == wanted and mask.all() and len(wanted) <= size
        assert types[0].tolist() == [0] * (len(asked) + 2) + [1] * (int(n_tokens) + 1)
        characters, (begin, end) = windows.characters(k), windows.labels[k]
        if begin:
            begin, end = (x - windows.offset(k) for x in (begin, end))
            assert context[characters[begin][0] : characters[end][1]] == answer
        else:
            assert not (first <= answer_token and begins + len(answer) <= characters[-1][1])


def seen_best(token, windows):
    "The window that shows most tokens on both sides of one; a longer one among equals."
    scores = [
        min(token - first, first + n - 1 - token) + 0.01 * n if first <= token < first + n else -1
        for first, n in zip(windows.first, windows.n, strict=True)
    ]
    assert max(scores) >= 0
    return int(np.argmax(scores))


def test_windows_refuse(tok):
    df = question("a b c", "b")
    with pytest.raises(ValueError, match="advance by one"):
        squad_windows(tok, df, 20, 0)
    with pytest.raises(ValueError, match="no tokens"):
        squad_windows(tok, df.assign(context="\u200b", answers=[[]], starts=[[]]), 20)
    assert len(squad_windows(tok, question("a b c", "b", "y " * 40), 30, 8, max_question=5).questions[0]) == 5


def span(windows, k):
    "The text of the answer that a window's labels name."
    begin, end = windows.labels[k] - windows.offset(k)
    characters = windows.characters(k)
    return slice(characters[begin][0], characters[end][1])


def test_accents_keep_characters(tok):
    context = "Le café d'Été."
    windows = squad_windows(tok, question(context, "café"), 40)
    assert windows.labels[0][0] > 0 and context[span(windows, 0)] == "café"


def test_real_windows(data):
    df = read_squad(data / "squad", "dev", "1.1").iloc[::40]
    windows = squad_windows(load_vocabulary(bert_vocab(), 512), df, 128, 64)
    assert len(windows) > len(df)
    answered = np.flatnonzero(windows.labels[:, 0])
    asked = windows.question[answered]
    assert len(set(asked)) / len(df) > 0.95
    said = [df.context.iloc[q][span(windows, k)] for q, k in zip(asked, answered, strict=True)]
    wanted = [df.answers.iloc[q][0] for q in asked]
    good = [normalize_answer(a) == normalize_answer(b) for a, b in zip(said, wanted, strict=True)]
    assert np.mean(good) > 0.97


# ---- fine-tuning
def test_decoding_over_windows(tok):
    "The best span over all windows equals the best over all pairs of tokens in all windows."
    draw = np.random.default_rng(0)
    asked = [question(" ".join(f"w{i}" for i in range(n)), "w0").assign(id=f"q{n}") for n in (1, 5, 13)]
    df = pd.concat(asked, ignore_index=True)
    windows = squad_windows(tok, df, 24, 5)
    logits = [draw.normal(size=(n, 2)) for n in windows.lengths]
    said = decode_spans(df, windows, logits, SquadRecipe(n_best=999, max_answer=4))
    none, best = {}, {}
    for k, q in enumerate(windows.question):
        none[q] = min(none.get(q, 9e9), logits[k][0].sum())
        scores, characters = logits[k][windows.offset(k) :], windows.characters(k)
        for i in range(windows.lo[k] - windows.first[k], windows.hi[k] - windows.first[k]):
            for j in range(i, min(i + 4, windows.n[k])):
                pair = (scores[i, 0] + scores[j, 1], int(characters[i][0]), int(characters[j][1]))
                best[q] = max(best.get(q, pair), pair)
    assert len(windows) > 3
    for q, (score, begin, end) in best.items():
        assert said.span[q] == df.context[q][begin:end] and said.begin[q] == begin
        assert said.no_answer[q] == pytest.approx(1 / (1 + np.exp(score - none[q])), abs=1e-12)


@pytest.fixture
def folder(tok, tmp_path):
    "A small student whose tokeniser is that of the windows; other numbers of its configuration."
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    config = sizes | dict(max_position_embeddings=32, vocab_size=len(tok))

    def save(**change):
        BertForMaskedLM(BertConfig(**config | change)).save_pretrained(tmp_path / "model")
        tok.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def test_fine_tuning_is_repeatable(folder, tmp_path):
    df, recipe = question("a b c", "b"), SquadRecipe(steps=1, batch=2)
    out = finetune_squad(folder(), df, df, tmp_path / "out", recipe)
    assert out.said[0] in "a b c" and len(out) == 1 and (out.label == 1).all()
    assert (out.right == out.said.isin(["b", "a b"])).all()  # the official score drops articles
    again = finetune_squad(tmp_path / "model", df, df, tmp_path / "out2", recipe)
    pd.testing.assert_frame_equal(out, again)  # the head is drawn from the seed


def test_folders_that_do_not_fit(folder, tok, tmp_path):
    df, model = question("a b c", "b"), folder()

    def tune(**options):
        recipe = dict(steps=1, batch=2) | options
        return finetune_squad(model, df, df, tmp_path / "out", SquadRecipe(**recipe))

    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        span_classifier(tmp_path / "none", 0)
    with pytest.raises(ValueError, match="which has 32 positions; set max_tokens"):
        tune(max_tokens=64)
    with pytest.raises(ValueError, match="squad1 or squad2"):
        finetune_squad(model, df, df, tmp_path / "out", SquadRecipe(steps=1), task="squad")
    config = json.loads((model / "config.json").read_text())
    for change, message in (
        (dict(num_hidden_layers=2), r"lacks 16 weights.*another architecture"),
        (dict(model_type="gpt2"), "holds a 'gpt2' model"),
    ):
        (model / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            span_classifier(model, 0)
    folder(vocab_size=len(tok) + 3)
    with pytest.raises(ValueError, match=r"vocabulary entries.*do not belong together"):
        tune()
