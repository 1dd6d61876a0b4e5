"What every question about the embedded world guarantees, in other worlds than the notebook's."

from collections import Counter

import pandas as pd
import pytest

from vlkd.data.squad import read_squad, write_squad
from vlkd.data.tasks import canonical, read_task, write_task
from vlkd.tabletop.language import OUTCOME_PHRASES
from vlkd.tabletop.nouns import EVENTS
from vlkd.tabletop.questions import QUESTIONS
from vlkd.tabletop.world import World

FROM_VIDEO = ["video-only", "never filmed"]
OUTCOME = {p: (event, o) for event, v in EVENTS.items() for o in v for p in OUTCOME_PHRASES[o]}


@pytest.fixture(scope="module", params=[1, 103])
def worlds(request):
    "A world and its counterfactual."
    return World(request.param), World(request.param, counterfactual=True)


@pytest.mark.parametrize("name", QUESTIONS)
def test_promises(worlds, name):
    world = worlds[0]
    nouns, ids = world.nouns, set()
    for split, n in dict(train=150, dev=60, test=150).items():
        here, there = (w.task(name, split, n) for w in worlds)
        pd.testing.assert_frame_equal(here, World(world.seed).task(name, split, n))  # the same again
        answer = [column for column in here if column in ("label", "answers", "starts")]
        text = here.drop(columns=answer)
        pd.testing.assert_frame_equal(text, there.drop(columns=answer))
        same = (here[answer].astype(str) == there[answer].astype(str)).all(axis=1)
        assert (same | here.kind.isin(FROM_VIDEO)).all()
        assert split != "train" or same.all()  # the counterfactual keeps training nouns
        assert len(here) == n and not set(here.id) & ids
        assert not text.drop(columns="id").astype(str).duplicated().any()
        ids |= set(here.id)
        assert set(here.group) <= set(nouns[nouns.split == split].noun)
        assert set(here.kind) <= {"language", "stated", "static", *FROM_VIDEO[: 1 + (split == "test")]}
        filmed = here.group.map(nouns.filmed).astype(bool)
        assert filmed[here.kind == "video-only"].all() and not filmed[here.kind == "never filmed"].any()
        columns = text.drop(columns=["id", "group", "kind"]).select_dtypes(exclude=["number", "bool"])
        words = {word for cell in columns.astype(str).to_numpy().ravel() for word in cell.split()}
        assert not words & set(nouns[nouns.split != split].noun), "a text names a noun of another split"


def test_formats(worlds, tmp_path):
    world = worlds[0]
    frames = {name: world.task(name, "dev", 60) for name in ("squad1", "squad2", "swag", "diagnostics")}
    for name, version in dict(squad1="1.1", squad2="2.0").items():
        file = write_squad(frames[name], tmp_path / f"dev-v{version}.json", version)
        pd.testing.assert_frame_equal(read_squad(file, version=version), frames[name])
    for name in ("swag", "diagnostics"):
        write_task(name, frames[name], tmp_path, "dev")
        pd.testing.assert_frame_equal(read_task(name, tmp_path, "dev"), canonical(name, frames[name]))
    assert frames["squad2"].impossible.mean() > 0.1 and not frames["squad1"].impossible.any()
    with pytest.raises(ValueError, match="train, dev or test"):
        world.task("swag", "deb")
    with pytest.raises(ValueError, match="unknown task 'swga'; did you mean 'swag'"):
        world.task("swga")


def test_two_outcomes_of_the_event_are_among_the_endings(worlds):
    "And two of one other event, so that the answer is not the odd one out."
    questions = worlds[0].task("swag", "test", 200)
    for x in questions[questions.kind.isin(FROM_VIDEO)].itertuples():
        ends = [OUTCOME.get(x[i]) for i in range(3, 7)]
        event, outcome = ends[x.label]
        assert sorted(Counter(e for e, _ in ends).values()) == [2, 2] and len(set(ends)) == 4
        assert outcome == worlds[0].nouns.at[x.group, event]
