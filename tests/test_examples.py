"Examples drawn by rule: records that do not align, sentences of every form, retrieval, heads on disk."

import numpy as np
import pandas as pd
import pytest
import torch
from simulated import records as simulated

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


@pytest.fixture(scope="module")
def world():
    return World(101, captions=400, sentences=3000, takes=1)


def records(run, right, sure=None, **more):
    "Of one world; right answers are surer unless it is said how sure they are."
    right = np.asarray(right, bool)
    return simulated(run, right, sure=right * 0.6 + 0.2 if sure is None else sure, **more)


def test_counts_are_those_of_a_loop():
    draw = np.random.default_rng(0)
    kind = draw.choice(["x", "y", ""], 200)
    one, other = (records(run, draw.random(200) < p, kind=kind) for run, p in dict(a=0.5, b=0.7).items())
    table = outcome_counts(one, other).set_index("kind")
    columns = dict(both=(1, 1), only_a=(1, 0), only_b=(0, 1), none=(0, 0))
    for name, at in (("all", kind == kind), ("x", kind == "x"), ("y", kind == "y")):
        pairs = list(zip(one.right[at], other.right[at], strict=True))
        assert {c: table.loc[name, c] for c in columns} == {c: pairs.count(p) for c, p in columns.items()}
    assert list(table.index) == ["all", "x", "y"] and (table[[*columns]].sum(axis=1) == table.n).all()


def test_counts_pair_by_id_and_not_by_order():
    one, other = records("a", [1, 0, 1, 0]), records("b", [1, 1, 0, 0])
    assert outcome_counts(one, other.iloc[::-1]).equals(outcome_counts(one, other))


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
    with pytest.raises(ValueError, match=message):
        differing(records("a", [1, 0, 1]), change(records("b", [0, 1, 1])), 2)


def test_examples_are_the_largest_leads_one_a_group():
    draw, n = np.random.default_rng(1), 300
    group = draw.choice(list("abcde"), n)
    one, other = (records(run, draw.random(n) < 0.5, draw.random(n).round(1), group=group) for run in "ab")
    best = {}
    for x, y in zip(one.to_dict("records"), other.to_dict("records"), strict=True):
        key = (-(y["sure"] - x["sure"]), x["id"])
        if y["right"] and not x["right"] and key < best.get(x["group"], (9, "")):
            best[x["group"]] = key
    wanted = [example for _, example in sorted(best.values())]
    assert differing(one, other, 9).id.tolist() == wanted
    assert differing(one.sample(frac=1, random_state=2), other, 2).id.tolist() == wanted[:2]


def test_no_example_is_an_empty_frame():
    none = differing(records("a", [1, 1]), records("b", [1, 0]), 3)
    assert len(none) == 0 and len(with_texts(none, pd.DataFrame(dict(id=["piqa0"], label=[1])))) == 0


def test_texts_must_be_those_of_the_records():
    found = differing(records("a", [0, 0]), records("b", [1, 1]))
    texts = pd.DataFrame(dict(id=["piqa0", "piqa1"], goal="g", sol1="one", sol2="two", label=[0, 1]))
    columns = ["", "Context", "Hypothesis 1", "Hypothesis 2", "GT", "A", "B"]
    assert question_table(with_texts(found, texts), "A", "B").columns.tolist() == columns
    with pytest.raises(ValueError, match="no question 'piqa0'"):
        with_texts(found, texts.iloc[1:])
    with pytest.raises(ValueError, match=r"label is (0|1) in the data and (0|1)"):
        with_texts(found, texts.assign(label=1 - texts.label))


def test_tracie_is_shown_as_the_paper_does():
    found = differing(records("a", [1, 0], task="tracie"), records("b", [1, 1], task="tracie"))
    texts = pd.DataFrame(dict(id=["tracie1"], story="S .", event="E", label=1))
    table = question_table(with_texts(found, texts), "A", "B")
    assert table.columns.tolist() == ["", "Context (Premise)", "Hypothesis", "GT", "A", "B"]
    assert table.GT[0] == "Ent." and table.A[0].startswith("Con.")


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
    queries = text_queries(world, texts, 300, 7)
    assert len(queries) > 200 and queries.text.is_unique
    for x in queries.itertuples():
        thing, words = world.things[x.noun], set(x.text.split())
        assert texts[x.row] == x.text and x.noun in words and x.event in CLIP_EVENTS and thing["filmed"]
        assert sum(word in world.things for word in words) == 1
        assert x.stated == (thing["split"] == "train") and not scene(world, x.text)["states_outcome"]
    noun = queries.noun[0]
    assert not any(is_filmed(world, *x) for x in ((None, "drop"), (noun, "lift"), (noun, None)))


def test_own_films_are_training_films(world):
    for noun in world.splits["test"]:
        i = training_clip(world, noun, "dunk")
        if not world.things[noun]["filmed"]:
            assert i is None
        else:
            clip = world.clips.iloc[i]
            assert (clip.noun, clip.event, clip.held_out) == (noun, "dunk", False)
            assert match_level(world, i, noun, "dunk") == "exact"


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
    for question in world.task("tracie", "test", 40).to_dict("records"):
        found = sentences_of("tracie", question)
        assert len(found) == 3 and "".join(found).replace(" ", "") == question["story"].replace(" ", "")
    story = 'Dr. Tim saw Ann. "Hello!" She left. 3 days passed.'
    assert sentences_of("tracie", dict(story=story))[-1] == "3 days passed."


def test_nearest_among_the_allowed_is_that_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    texts, videos = (torch.randn(n, 5, generator=generator) for n in (20, 30))
    allowed, clips = np.random.default_rng(0).random((20, 30)) < 0.4, np.arange(100, 130)
    cosines = (torch.nn.functional.normalize(texts) @ torch.nn.functional.normalize(videos).T).numpy()
    found = nearest_clips(dict(a=(texts, videos)), clips, 2, allowed)
    for i in range(20):
        wanted = sorted(np.flatnonzero(allowed[i]), key=lambda j: -cosines[i, j])[:2]
        assert found[found["query"] == i]["clip"].tolist() == [100 + j for j in wanted]
    free, all_allowed = (nearest_clips(dict(a=(texts, videos)), clips, 2, x) for x in (None, allowed | True))
    assert free["clip"].tolist() == all_allowed["clip"].tolist()


def test_peers_are_others_in_the_event(world):
    pool = np.flatnonzero(world.clips.held_out)
    q = text_queries(world, world.sentences(), 50)
    p = same_event_clips(world, q, pool)
    c = world.clips.iloc[pool]
    for i, x in enumerate(q.itertuples()):
        assert (p[i] == ((c.event == x.event) & (c.noun != x.noun)).to_numpy()).all()


def test_chance_is_what_random_clips_reach(world):
    queries = text_queries(world, world.sentences(), 200)
    pool = np.flatnonzero(world.clips.held_out)
    draw = np.random.default_rng(0)
    luck, always = chance_rates(world, queries, pool), constant_rates(world, queries)

    def rates(clips):
        return clip_matches(world, clips, queries.noun, queries.event).mean() * 100

    means = pd.DataFrame([rates(draw.choice(pool, len(queries))) for _ in range(60)]).mean()
    assert all(abs(means[name] - luck[name]) < 1 for name in ("noun", "event", "outcome"))
    best = max(rates([clip] * len(queries)).outcome for clip in pool[:400])
    assert best == pytest.approx(always["outcome"]) and luck["peer"] <= always["peer"]


def test_rates_of_a_hub_are_those_of_other_sentences():
    right = np.random.default_rng(0).random((40, 12)) < 0.3
    rows = [dict(query=i, rank=rank, clip=clip) for i in range(40) for rank, clip in ((1, 3), (2, 7), (3, 1))]
    top = pd.DataFrame(rows).assign(model="m", space="raw")
    rates = own_and_others(top, np.arange(12), right).iloc[0]
    assert rates.own == pytest.approx(100 * right[:, [1, 3, 7]].mean()) == pytest.approx(rates.others)
    with pytest.raises(ValueError, match="no x, raw"):
        found_clips(top, np.arange(12), "x", "raw", 40)


def test_shared_words_are_rare_and_long():
    short = shared_words(["the DOG ran", "a cat", ""], ["one Dog", "doge doge", "dogs run", "xcat"], 1.1)
    assert short.shape == (3, 4) and not short.any()  # three letters are too few

    def water(*texts):
        return shared_words(["Running water"], ["some water", *texts], 0.5).tolist()

    assert water("water, water", "dry land") == [[False] * 3]
    assert water("no", "dry land") == [[True, False, False]]


def test_a_crossed_map_does_not_know_its_things():
    "States that hold only a noun's name: a plain map finds its teacher state, a crossed one does not."
    place, who = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(240) % 12
    x, y = torch.eye(12)[who], place[who]
    plain = cross_fitted_map(x, [f"m{i}" for i in who], x, y, [set()] * 240)
    other = cross_fitted_map(x, [f"n{i}" for i in who], x, y, [{f"n{i}"} for i in who])
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
    matches = dict(noun=[1, 0, 0, 0], event=[1, 1, 1, 0], outcome=[1, 0, 0, 0])
    found = (
        pd.DataFrame(matches).astype(bool).assign(model="m", space="s", query=[0, 0, 1, 1], rank=[1, 2, 1, 2])
    )
    rates = rate_table(found, ks=(1, 2)).iloc[0]
    wanted = {"queries": 2, "noun@1": 50, "noun@2": 25, "event@1": 100, "event@2": 75, "outcome@2": 25}
    assert {name: rates[name] for name in wanted} == wanted


@pytest.fixture(scope="module")
def small(world):
    s = scale("smoke")
    tok = train_tokenizer(world.sentences()[:300], s.vocab_size)
    return s, tok, language_model(s, tok, 1)


@pytest.mark.parametrize(
    "kd", ["nst", "crd", "nst+crd without head", "voken", "soft_label", "regression+nt_xent"]
)
def test_heads_come_back(tmp_path, small, kd):
    s, tok, teacher = small
    kd, head = kd.split()[0], "without" not in kd
    given = dict(s=s, args=preset("tuned"), pool=torch.zeros(7, s.hidden), head=head)
    objective = StudentObjective(language_model(s, tok, 2), teacher, kd, **given)
    save_model(tmp_path, objective.lm, tok)
    save_distillation(objective, tmp_path)
    loaded, tokenizer = load_distillation(tmp_path, teacher, s)
    before, after = objective.state_dict(), loaded.state_dict()
    assert loaded.kd == objective.kd and tokenizer.get_vocab() == tok.get_vocab() and not loaded.training
    for name in before:
        if not name.startswith("terms.crd.loss.") or name.startswith("terms.crd.loss.f"):
            assert torch.equal(before[name], after[name]), name


def test_heads_that_do_not_fit(tmp_path, small):
    from safetensors.torch import load_file, save_file

    s, tok, teacher = small
    o = StudentObjective(language_model(s, tok, 2), teacher, "nst", s=s, args=preset("tuned"))
    save_model(tmp_path, o.lm, tok)
    f = save_distillation(o, tmp_path)
    state = {k: v.clone() for k, v in load_file(f).items()}
    f.write_bytes(f.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"distillation.safetensors was changed"):
        load_distillation(tmp_path, teacher, s)
    (tmp_path / CHECKSUMS).unlink()
    save_file(state, f)  # a folder from elsewhere, without checksums
    with pytest.raises(ValueError, match="no 'kd' or no 'head' in its metadata"):
        load_distillation(tmp_path, teacher, s)
    save_file(dict(list(state.items())[1:]), f, metadata=dict(kd="nst", head="1"))
    with pytest.raises(ValueError, match="is missing in the file"):
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
