"What every question about the embedded world guarantees, in other worlds than the notebook's."

import pandas as pd
import pytest

from vlkd.data.squad import read_squad, write_squad
from vlkd.data.tasks import canonical, read_task, write_task
from vlkd.tabletop.language import OUTCOME_PHRASES
from vlkd.tabletop.nouns import EVENTS
from vlkd.tabletop.questions import QUESTIONS
from vlkd.tabletop.world import World

N = dict(train=150, dev=60, test=150)
OUTCOME = {p: (e, o) for e, v in EVENTS.items() for o in v for p in OUTCOME_PHRASES[o]}


@pytest.fixture(scope="module", params=[1, 103])
def worlds(request):
    return World(request.param), World(request.param, counterfactual=True)


@pytest.mark.parametrize("name", QUESTIONS)
def test_promises(worlds, name):
    a, b = worlds
    nouns = a.nouns
    ids = set()
    for split, n in N.items():
        x, y = a.task(name, split, n), b.task(name, split, n)
        pd.testing.assert_frame_equal(x, World(a.seed).task(name, split, n))  # the same again
        answer = [c for c in x if c in ("label", "answers", "starts")]
        text = x.drop(columns=answer)
        pd.testing.assert_frame_equal(text, y.drop(columns=answer))
        same = (x[answer].astype(str) == y[answer].astype(str)).all(axis=1)
        assert same[~x.kind.isin(["video-only", "never filmed"])].all()
        if split == "train":
            assert same.all()  # the counterfactual keeps training nouns
        assert (
            len(x) == n and not set(x.id) & ids and not text.drop(columns="id").astype(str).duplicated().any()
        )
        ids |= set(x.id)
        assert (
            set(x.group) <= set(nouns[nouns.split == split].noun)
            and (split == "test" or "never filmed" not in set(x.kind))
            and set(x.kind) <= {"language", "stated", "static", "video-only", "never filmed"}
        )
        assert ((x.kind == "video-only") <= x.group.map(nouns.filmed)).all() and (
            (x.kind == "never filmed") <= ~x.group.map(nouns.filmed).astype(bool)
        ).all()
        words = {
            w
            for s in text.drop(columns=["id", "group", "kind"])
            .select_dtypes(exclude=["number", "bool"])
            .astype(str)
            .to_numpy()
            .ravel()
            for w in s.split()
        }
        assert not words & set(
            nouns[nouns.split != split].noun
        )  # no text of one split names a noun of another


def test_formats(worlds, tmp_path):
    w = worlds[0]
    for name, v in dict(squad1="1.1", squad2="2.0").items():
        df = w.task(name, "dev", 60)
        pd.testing.assert_frame_equal(
            read_squad(write_squad(df, tmp_path / f"dev-v{v}.json", v), version=v), df
        )
    for name in ("swag", "diagnostics"):
        df = w.task(name, "dev", 60)
        write_task(name, df, tmp_path, "dev")
        pd.testing.assert_frame_equal(read_task(name, tmp_path, "dev"), canonical(name, df))
    assert (
        w.task("squad2", "dev", 60).impossible.mean() > 0.1
        and not w.task("squad1", "dev", 60).impossible.any()
    )
    with pytest.raises(ValueError, match="train, dev or test"):
        w.task("swag", "deb")
    with pytest.raises(ValueError, match="unknown task 'swga'; did you mean 'swag'"):
        w.task("swga")


def test_every_outcome_of_the_event_is_among_the_endings(worlds):
    "So that the answer cannot be found by leaving out what the event cannot have."
    for x in worlds[0].task("swag", "test", 200).itertuples():
        if x.kind not in ("video-only", "never filmed"):
            continue
        ends = [OUTCOME.get(x[i]) for i in range(3, 7)]
        e = ends[x.label][0]
        assert {o for k, o in filter(None, ends) if k == e} == set(EVENTS[e]) and ends[x.label][1] == worlds[
            0
        ].nouns.at[x.group, e]
