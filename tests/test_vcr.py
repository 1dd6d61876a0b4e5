"Keywords, and VCR: its files, its domain shifts, its question types and its low-shot sets."

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkd.data.keywords import SMART_STOP_WORDS, keyword_scores, yake_scores

GOLDEN = os.environ.get("VLKD_GOLDEN")
golden = pytest.mark.skipif(not GOLDEN, reason="VLKD_GOLDEN does not name the folder of the peers' values")


def golden_values(name):
    return json.loads((Path(GOLDEN) / name).read_text(encoding="utf-8"))


# ---- keywords
def keyword_cases():
    return golden_values("yake.json")["cases"] if GOLDEN else []


@golden
def test_keywords_equal_the_published_ones():
    cases = keyword_cases()
    assert cases
    for case in cases:
        words = case["text"].split()
        for ngram in (1, 2, 3):
            ours = yake_scores(words, ngram)
            wanted = dict(case[f"n{ngram}"])
            assert {key: ours[key] for key in wanted} == pytest.approx(wanted, abs=1e-12)
        everything = dict(case["n1_nodedup"])
        if len(everything) < 20:  # theirs stop there
            assert set(yake_scores(words)) == set(everything)


@golden
def test_importance_turns_the_published_scores_round():
    for case in keyword_cases():
        wanted = dict(case["n1_nodedup"])
        words = case["text"].split()
        ours = {w.lower().strip(".,?"): s for w, s in zip(words, keyword_scores(words), strict=True)}
        order = sorted(wanted, key=lambda word: -ours[word])
        assert [wanted[word] for word in order] == sorted(wanted.values())
        assert all(ours[word] == 0 for word in set(ours) - set(wanted)) or len(wanted) >= 20


def test_words_that_are_never_keywords():
    words = ["The", "[person1]", "person4", "3", ",", "don't", "we'll", "it", "''", "looking", "?", "", "—"]
    assert keyword_scores(words) == [0.0] * len(words)
    assert keyword_scores([]) == [] and yake_scores([]) == {}
    assert all(len(word) > 2 for word in SMART_STOP_WORDS)


def test_a_word_is_scored_whatever_is_stuck_to_it():
    plain = keyword_scores("the captain warns nobody near the door".split())
    assert keyword_scores("the captain's warns nobody near the door?".split()) == plain
    assert keyword_scores(["captain’s", "door"])[0] == keyword_scores(["captain", "door"])[0] > 0


def test_plurals_are_one_term_and_names_count():
    scores = yake_scores("a dog chases dogs".split())
    assert scores["dog"] == scores["dogs"]
    named = keyword_scores("we saw Paris and bread".split())
    assert named[2] > named[4] > 0, "a name is worth more than a word"


def test_sentences_end_where_a_new_one_begins():
    "A word of the second sentence comes later, which makes it less important."
    one = keyword_scores("storms frighten sailors , ships sink".split())
    two = keyword_scores("Storms frighten sailors . Ships sink".split())
    assert one[0] == pytest.approx(one[5]) and two[0] > two[5]
    title = yake_scores("Ask Mr . Brown".split())
    assert title == yake_scores("Ask Mr , Brown".split()), "no sentence ends after a title"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text(max_size=8) | st.sampled_from(["dog", "Dog", "the", "."]), max_size=12),
    st.integers(1, 4),
)
def test_fuzz_keywords(words, ngram):
    scores = keyword_scores(words, ngram=ngram)
    assert len(scores) == len(words) and np.isfinite(scores).all()
    assert all(0 <= score <= 1 for score in scores)
    assert scores == keyword_scores(words, ngram=ngram)
    assert all(s == 0 for w, s in zip(words, scores, strict=True) if w.lower() in SMART_STOP_WORDS)


@pytest.mark.parametrize("words", ["a telegram", [1], [None], [["a"]]])
def test_keywords_want_words(words):
    with pytest.raises(ValueError, match="list of texts"):
        keyword_scores(words)
