"Examples drawn by rule: records that do not align, sentences of every form, retrieval, heads on disk."

import numpy as np
import pandas as pd
import pytest
import torch

from vlkd.core.files import CHECKSUMS
from vlkd.core.settings import preset, scale
from vlkd.data.text import train_tokenizer
from vlkd.eval.examples import (
    chance_rates,
    clip_answers,
    clip_matches,
    constant_rates,
    cross_fitted_map,
    differing,
    found_clips,
    is_filmed,
    match_level,
    outcome_counts,
    own_and_others,
    question_table,
    rate_table,
    retrieval_records,
    same_event_clips,
    scene,
    sentences_of,
    shared_words,
    shown_answer,
    text_queries,
    training_clip,
    with_texts,
)
from vlkd.eval.retrieval import nearest_clips
from vlkd.eval.stats import check_examples
from vlkd.models.bert import language_model, save_model
from vlkd.tabletop.language import BASE, PAST, base_phrase, past_phrase
from vlkd.tabletop.nouns import CLIP_EVENTS
from vlkd.tabletop.world import World
from vlkd.train.text_student import StudentObjective, load_distillation, save_distillation


def records(run, right, sure=None, group=None, kind="", task="piqa", seed=1):
    n = len(right)
    right = np.asarray(right, bool)
    return pd.DataFrame(
        dict(
            run=run,
            seed=seed,
            task=task,
            id=[f"q{i}" for i in range(n)],
            group=group or [f"g{i}" for i in range(n)],
            kind=kind,
            label=1,
            prediction=right.astype(int),
            right=right,
            sure=right * 0.6 + 0.2 if sure is None else sure,
        )
    )


@pytest.fixture(scope="module")
def world():
    return World(101, captions=400, sentences=3000, takes=1)


def test_counts_are_those_of_a_loop():
    r = np.random.default_rng(0)
    a, b = records("a", r.random(200) < 0.5), records("b", r.random(200) < 0.7)
    kind = r.choice(["x", "y", ""], 200)
    a["kind"] = b["kind"] = kind
    t = outcome_counts(a, b).set_index("kind")
    for k, at in (("all", np.ones(200, bool)), ("x", kind == "x"), ("y", kind == "y")):
        pairs = list(zip(a.right[at], b.right[at], strict=True))
        assert [t.loc[k, c] for c in ("both", "only_a", "only_b", "none")] == [
            pairs.count(p) for p in ((True, True), (True, False), (False, True), (False, False))
        ]
    assert (
        list(t.index) == ["all", "x", "y"]
        and (t[["both", "only_a", "only_b", "none"]].sum(axis=1) == t.n).all()
    )


def test_counts_pair_by_id_and_not_by_order():
    a, b = records("a", [1, 0, 1, 0]), records("b", [1, 1, 0, 0])
    assert outcome_counts(a, b.iloc[::-1]).equals(outcome_counts(a, b))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.assign(label=0, right=d.prediction == 0), "not aligned"),
        (lambda d: d.drop(columns="right"), "column 'right' is missing"),
        (lambda d: pd.concat([d, d]), "occurs a second time"),
        (lambda d: d.assign(id="other"), "second time|not aligned"),
    ],
)
def test_records_that_do_not_fit(change, message):
    a = records("a", [1, 0, 1])
    with pytest.raises(ValueError, match=message):
        differing(a, change(records("b", [0, 1, 1])), 2)


def test_examples_are_the_largest_leads_one_a_group():
    r = np.random.default_rng(1)
    n = 300
    a, b = (
        records("a", r.random(n) < 0.5, r.random(n).round(1), list(r.choice(list("abcde"), n))),
        records("b", r.random(n) < 0.5, r.random(n).round(1)),
    )
    b["group"] = a["group"]
    best = {}
    for x, y in zip(a.to_dict("records"), b.to_dict("records"), strict=True):
        key = (-(y["sure"] - x["sure"]), x["id"])
        if y["right"] and not x["right"] and key < best.get(x["group"], (9, "")):
            best[x["group"]] = key
    want = [i for _, i in sorted(best.values())]
    assert (
        differing(a, b, 9).id.tolist() == want
        and differing(a.sample(frac=1, random_state=2), b, 2).id.tolist() == want[:2]
    )


def test_no_example_is_an_empty_frame():
    a = records("a", [1, 1])
    d = differing(a, records("b", [1, 0]), 3)
    assert len(d) == 0 and len(with_texts(d, pd.DataFrame(dict(id=["q0"], label=[1])))) == 0


def test_texts_must_be_those_of_the_records():
    d = differing(records("a", [0, 0]), records("b", [1, 1]))
    df = pd.DataFrame(dict(id=["q0", "q1"], goal="g", sol1="one", sol2="two", label=1))
    assert question_table(with_texts(d, df), "A", "B").columns.tolist() == [
        "",
        "Context",
        "Hypothesis 1",
        "Hypothesis 2",
        "GT",
        "A",
        "B",
    ]
    with pytest.raises(ValueError, match="no question 'q0'"):
        with_texts(d, df.iloc[1:])
    with pytest.raises(ValueError, match="label is 0 in the data and 1"):
        with_texts(d, df.assign(label=0))


def test_tracie_is_shown_as_the_paper_does():
    d = differing(records("a", [0], task="tracie"), records("b", [1], task="tracie"))
    t = question_table(
        with_texts(d, pd.DataFrame(dict(id=["q0"], story="S .", event="E", label=1))), "A", "B"
    )
    assert (
        t.columns.tolist() == ["", "Context (Premise)", "Hypothesis", "GT", "A", "B"]
        and t.GT[0] == "Ent."
        and t.A[0].startswith("Con.")
    )


@pytest.mark.parametrize("event", BASE)
@pytest.mark.parametrize("k", (0, 1))
def test_every_name_of_an_event_is_found(world, event, k):
    n = world.nouns.noun.iloc[0]
    for named in (n, f"kitchen {n}", f"large {n}"):
        s = scene(world, f"why did the man {base_phrase(event, k, named)} ?")
        assert (s["noun"], s["event"], s["spoken"]) == (n, event, True)
        s = scene(world, f"the man {past_phrase(event, k, named)} again .")
        assert (s["noun"], s["event"]) == (n, event) and s["spoken"] == (
            PAST[event][k] in (BASE[event][k], "gave a push to")
        )  # which holds the captions' word


def test_queries_are_what_they_say(world):
    texts = world.sentences()
    q = text_queries(world, texts, 300, 7)
    assert len(q) > 200 and q.text.is_unique
    for x in q.itertuples():
        assert (
            texts[x.row] == x.text
            and x.noun in x.text.split()
            and x.event in CLIP_EVENTS
            and world.things[x.noun]["filmed"]
            and sum(w in world.things for w in set(x.text.split())) == 1
        )
        assert (
            x.stated == (world.things[x.noun]["split"] == "train")
            and not scene(world, x.text)["states_outcome"]
        )
    assert (
        not is_filmed(world, None, "drop")
        and not is_filmed(world, q.noun[0], "lift")
        and not is_filmed(world, q.noun[0], None)
    )


def test_own_films_are_training_films(world):
    for n in world.splits["test"]:
        i = training_clip(world, n, "dunk")
        if not world.things[n]["filmed"]:
            assert i is None
        else:
            c = world.clips.iloc[i]
            assert (c.noun, c.event, c.held_out) == (n, "dunk", False) and match_level(
                world, i, n, "dunk"
            ) == "exact"


def test_a_film_answers_the_question_about_its_thing(world):
    for q in world.task("piqa", "dev", 200).to_dict("records"):
        c = scene(world, q["goal"])
        i = training_clip(world, c["noun"], c["event"])
        if i is not None:
            assert shown_answer(world, q, i) == q["label"]
        assert shown_answer(world, q, world.clips[world.clips.event != c["event"]].index[0]) == -1


def test_answers_are_records(world):
    df = world.task("piqa", "test", 30)
    check_examples(clip_answers(world, df, [0] * 30, 101))


def test_sentences_of_real_and_of_tabletop_stories(world):
    for q in world.task("tracie", "test", 40).to_dict("records"):
        assert (
            "".join(sentences_of("tracie", q)).replace(" ", "") == q["story"].replace(" ", "")
            and len(sentences_of("tracie", q)) == 3
        )
    assert (
        sentences_of("tracie", dict(story='Dr. Tim saw Ann. "Hello!" She left. 3 days passed.'))[-1]
        == "3 days passed."
    )


def test_nearest_among_the_allowed_is_that_of_a_loop():
    g = torch.Generator().manual_seed(0)
    q, v = torch.randn(20, 5, generator=g), torch.randn(30, 5, generator=g)
    allowed = np.random.default_rng(0).random((20, 30)) < 0.4
    clips = np.arange(100, 130)
    t = nearest_clips(dict(a=(q, v)), clips, 2, allowed)
    cos = (torch.nn.functional.normalize(q) @ torch.nn.functional.normalize(v).T).numpy()
    for i in range(20):
        want = sorted(np.flatnonzero(allowed[i]), key=lambda j: -cos[i, j])[:2]
        assert t[t["query"] == i]["clip"].tolist() == [100 + j for j in want]
    assert (
        nearest_clips(dict(a=(q, v)), clips, 2)["clip"].tolist()
        == nearest_clips(dict(a=(q, v)), clips, 2, np.ones((20, 30), bool))["clip"].tolist()
    )


def test_peers_are_others_in_the_event(world):
    pool = np.flatnonzero(world.clips.held_out)
    q = text_queries(world, world.sentences(), 50)
    p = same_event_clips(world, q, pool)
    c = world.clips.iloc[pool]
    for i, x in enumerate(q.itertuples()):
        assert (p[i] == ((c.event == x.event) & (c.noun != x.noun)).to_numpy()).all()


def test_chance_is_what_random_clips_reach(world):
    q = text_queries(world, world.sentences(), 200)
    pool = np.flatnonzero(world.clips.held_out)
    g = np.random.default_rng(0)
    luck, always = chance_rates(world, q, pool), constant_rates(world, q)
    draws = []
    for _ in range(60):
        at = g.choice(pool, len(q))
        draws.append(clip_matches(world, at, q.noun, q.event).mean() * 100)
    m = pd.DataFrame(draws).mean()
    for k in ("noun", "event", "outcome"):
        assert abs(m[k] - luck[k]) < 1
    best = max(clip_matches(world, [i] * len(q), q.noun, q.event).outcome.mean() * 100 for i in pool[:400])
    assert abs(best - always["outcome"]) < 1e-9 and luck["peer"] <= always["peer"]


def test_rates_of_a_hub_are_those_of_other_sentences():
    r = np.random.default_rng(0)
    right = r.random((40, 12)) < 0.3
    top = pd.DataFrame(
        [
            dict(model="m", space="raw", query=i, rank=k + 1, clip=c)
            for i in range(40)
            for k, c in enumerate((3, 7, 1))
        ]
    )
    o = own_and_others(top, np.arange(12), right).iloc[0]
    assert abs(o.own - 100 * right[:, [1, 3, 7]].mean()) < 1e-9 and abs(o.own - o.others) < 1e-9
    with pytest.raises(ValueError, match="no x, raw"):
        found_clips(top, np.arange(12), "x", "raw", 40)


def test_shared_words_are_rare_and_long():
    m = shared_words(["the DOG ran", "a cat", ""], ["one Dog", "doge doge", "dogs run", "xcat"], 1.1)
    assert m.shape == (3, 4) and not m.any()  # three letters are too few
    assert shared_words(["Running water"], ["some water", "water, water", "dry land"], 0.5).tolist() == [
        [False] * 3
    ] and shared_words(["Running water"], ["some water", "no", "dry land"], 0.5).tolist() == [
        [True, False, False]
    ]


def test_a_crossed_map_does_not_know_its_things():
    "States that hold only a noun's name: a plain map finds its teacher state, a crossed one does not."
    g = torch.Generator().manual_seed(0)
    names = [f"n{i}" for i in range(12)]
    place = torch.randn(12, 6, generator=g)
    who = torch.arange(240) % 12
    x = torch.eye(12)[who]
    y = place[who]
    plain = cross_fitted_map(x, [f"m{i}" for i in who], x, y, [set()] * 240)
    other = cross_fitted_map(x, [names[i] for i in who], x, y, [{names[i]} for i in who])
    assert (plain - y).norm() < 0.2 * (other - y).norm()


def test_records_of_retrieval_can_be_compared(world):
    q = text_queries(world, world.sentences(), 25)
    f = clip_matches(world, [0] * 25, q.noun, q.event)
    r = retrieval_records("t.raw", 101, q, f, f)
    check_examples(r)
    assert set(r.kind) <= {"stated", "video-only"} and len(r) == 100
    with pytest.raises(ValueError, match="24 first clips for 25"):
        retrieval_records("t.raw", 101, q, f.iloc[1:], f)


def test_rate_table_counts_the_first_k():
    t = pd.DataFrame(
        dict(
            model="m",
            space="s",
            query=[0, 0, 1, 1],
            rank=[1, 2, 1, 2],
            noun=[True, False, False, False],
            event=[True, True, True, False],
            outcome=[True, False, False, False],
        )
    )
    r = rate_table(t, ks=(1, 2)).iloc[0]
    assert (r["queries"], r["noun@1"], r["noun@2"], r["event@1"], r["event@2"], r["outcome@2"]) == (
        2,
        50,
        25,
        100,
        75,
        25,
    )


@pytest.fixture(scope="module")
def small(world):
    s = scale("smoke")
    tok = train_tokenizer(world.sentences()[:300], s.vocab_size)
    return s, tok, language_model(s, tok, 1)


@pytest.mark.parametrize(
    "kd, head",
    [
        ("nst", True),
        ("crd", True),
        ("nst+crd", False),
        ("voken", True),
        ("soft_label", True),
        ("regression+nt_xent", True),
    ],
)
def test_heads_come_back(tmp_path, small, kd, head):
    s, tok, teacher = small
    o = StudentObjective(
        language_model(s, tok, 2),
        teacher,
        kd,
        s=s,
        args=preset("micro"),
        pool=torch.zeros(7, s.hidden),
        head=head,
    )
    save_model(tmp_path, o.lm, tok)
    save_distillation(o, tmp_path)
    p, t = load_distillation(tmp_path, teacher, s)
    a, b = o.state_dict(), p.state_dict()
    assert p.kd == o.kd and t.get_vocab() == tok.get_vocab() and not p.training
    for k in a:
        if not k.startswith("terms.crd.loss.") or k.startswith("terms.crd.loss.f"):
            assert torch.equal(a[k], b[k]), k


def test_heads_that_do_not_fit(tmp_path, small):
    from safetensors.torch import load_file, save_file

    s, tok, teacher = small
    o = StudentObjective(language_model(s, tok, 2), teacher, "nst", s=s, args=preset("micro"))
    save_model(tmp_path, o.lm, tok)
    f = save_distillation(o, tmp_path)
    state = {k: v.clone() for k, v in load_file(f).items()}
    f.write_bytes(f.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"distillation.safetensors was changed"):
        load_distillation(tmp_path, teacher, s)
    (tmp_path / CHECKSUMS).unlink()
    save_file(state, f)  # a folder from elsewhere, without checksums
    with pytest.raises(ValueError, match="no 'kd' in its metadata"):
        load_distillation(tmp_path, teacher, s)
    save_file(dict(list(state.items())[1:]), f, metadata=dict(kd="nst", head="1"))
    with pytest.raises(ValueError, match="missing or not expected"):
        load_distillation(tmp_path, teacher, s)
    save_file(state, f, metadata=dict(kd="nst", head="1"))
    with pytest.raises(ValueError, match="does not fit"):
        load_distillation(tmp_path, language_model(scale("smoke", hidden=32), tok, 1), s)
    f.write_bytes(f.read_bytes()[:100])
    with pytest.raises(ValueError, match="cut off or no safetensors"):
        load_distillation(tmp_path, teacher, s)
    f.unlink()
    assert load_distillation(tmp_path, teacher, s)[0].kd == ()
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        load_distillation(tmp_path / "none", teacher, s)
