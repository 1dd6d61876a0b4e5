"Keywords, and VCR: its files, its domain shifts, its question types and its low-shot sets."

import copy
import functools
import gzip
import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlkd.data.keywords import SMART_STOP_WORDS, keyword_scores, yake_scores
from vlkd.data.vcr import (
    QUESTION_TYPES,
    explicit_mitigated,
    implicit_split,
    load_vcr,
    low_shot,
    mitigated_set,
    overlap_statistics,
    question_type,
    shortcut_mitigated,
    spoken,
    write_vcr,
)
from vlkd.data.wordnet import WordNet, all_base_forms, base_forms, inflected, read_wordnet, reworded

GOLDEN = os.environ.get("VLKD_GOLDEN")
golden = pytest.mark.skipif(not GOLDEN, reason="VLKD_GOLDEN does not name the folder of the peers' values")


fuzz = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


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


# ---- files of VCR
def an_item(id="val-0", **change):
    "A question in VCR's official keys, as `load_vcr` gives it."
    item = dict(
        movie="1001_X",
        objects=["person", "person", "chair"],
        img_fn="a/1.jpg",
        metadata_fn="a/1.json",
        question=["Why", "is", [0], "near", [2], "?"],
        answer_choices=[[[0], "sits", "."], ["He", "sleeps", "."], [[1], "left", "."], ["No", "one", "."]],
        answer_label=0,
        rationale_choices=[["It", "is", "late", k, "."] for k in "abcd"],
        rationale_label=3,
        annot_id=id,
        boxes=[[0.0, 1.0, 9.5, 20.0, 0.9], [10.0, 1.0, 19.0, 20.0, 0.8], [3.0, 9.0, 8.0, 20.0, 0.7]],
        width=20,
        height=21,
    )
    item |= change
    return item | dict(type=question_type(item["question"]))


def official(folder, change=None, picture=None, split="val"):
    "Official files with one question; `change` and `picture`: other keys of its line and of its metadata."
    write_vcr([an_item()], folder, split)
    if change is not None:
        row = json.loads((folder / f"{split}.jsonl").read_text()) | change
        row = {key: value for key, value in row.items() if value is not KeyError}
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    if picture is not None:
        file = folder / "vcr1images/a/1.json"
        held = json.loads(file.read_text()) | picture
        file.write_text(json.dumps({key: value for key, value in held.items() if value is not KeyError}))
    return folder


def test_what_is_written_is_read(tmp_path):
    items = [an_item(), an_item("val-1", metadata_fn="b.json", width=99), an_item("val-2", extra={"a": [1]})]
    file = write_vcr(items, tmp_path, "val")
    assert load_vcr(tmp_path, "val") == items
    first = json.loads(file.read_text().split("\n")[0])
    assert not {"boxes", "width", "height", "type"} & set(first), "these are no keys of the official lines"
    picture = json.loads((tmp_path / "vcr1images/a/1.json").read_text())
    assert set(picture) == {"names", "boxes", "segms", "width", "height"}


def test_test_split_has_no_labels(tmp_path):
    items = [an_item(answer_label=None, rationale_label=None)]
    assert "label" not in write_vcr(items, tmp_path, "test").read_text()
    assert load_vcr(tmp_path, "test") == items
    with pytest.raises(ValueError, match="item 0: 'answer_label' should be 0, 1, 2 or 3, got None"):
        write_vcr(items, tmp_path / "x", "train")
    assert not (tmp_path / "x").exists()


def test_other_ways_in_which_files_lie(tmp_path):
    official(tmp_path)
    file = tmp_path / "val.jsonl"
    items = load_vcr(tmp_path, "val")
    raw = file.read_bytes()
    file.write_bytes(b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n"))
    assert load_vcr(tmp_path, "val") == items
    file.unlink()
    (tmp_path / "vcr1annots").mkdir()
    (tmp_path / "vcr1annots/val.jsonl.gz").write_bytes(gzip.compress(raw))
    assert load_vcr(tmp_path, "val") == items
    (tmp_path / "vcr1images/a/1.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.json: this file is missing"):
        load_vcr(tmp_path, "val")
    (item,) = load_vcr(tmp_path, "val", boxes=False)
    assert "boxes" not in item and item["question"] == items[0]["question"]
    with pytest.raises(ValueError, match="unknown split of VCR 'dev'"):
        load_vcr(tmp_path, "dev")


FOUR = [["a"]] * 4


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(annot_id=3), "no text under 'annot_id'"),
        (dict(img_fn=KeyError), "no text under 'img_fn'"),
        (dict(metadata_fn="../a.json"), "'metadata_fn' should be a path below the folder of pictures"),
        (dict(metadata_fn="/etc/passwd"), "'metadata_fn' should be a path below"),
        (dict(objects=None), "'objects' should be a list of names, got None"),
        (dict(objects=["person", 3]), "'objects' should be a list of names"),
        (dict(objects=["person", "person"]), r"tag \[2\] should hold numbers of the 2 objects"),
        (dict(question=KeyError), "'question' should be a list of words and tags, got None"),
        (dict(question=[]), "'question' should be a list of words and tags"),
        (dict(question="Why ?"), "'question' should be a list of words and tags, got 'Why"),
        (dict(question=["Why", [3]]), r"'question': tag \[3\] should hold numbers of the 3 objects"),
        (dict(question=["Why", [-1]]), r"tag \[-1\] should hold"),
        (dict(question=["Why", []]), r"tag \[\] should hold"),
        (dict(question=["Why", [True]]), r"tag \[True\] should hold"),
        (dict(question=["Why", [0.0]]), r"tag \[0.0\] should hold"),
        (dict(question=["Why", 0]), "a word should be text, got 0"),
        (dict(question=["Why", None]), "a word should be text, got None"),
        (dict(question=["\ud800"]), "half a surrogate pair"),
        (dict(answer_choices=FOUR[:3]), "'answer_choices' should be a list of four texts"),
        (dict(answer_choices=[["a"], ["b"], [], ["d"]]), r"'answer_choices'\[2\] should be a list of words"),
        (dict(rationale_choices=KeyError), "'rationale_choices' should be a list of four texts, got None"),
        (dict(answer_label=4), "'answer_label' should be 0, 1, 2 or 3, got 4"),
        (dict(answer_label=True), "'answer_label' should be 0, 1, 2 or 3, got True"),
        (dict(answer_label="0"), "'answer_label' should be 0, 1, 2 or 3"),
        (dict(rationale_label=KeyError), "'rationale_label' should be 0, 1, 2 or 3, got None"),
    ],
)
def test_wrong_lines_are_named(tmp_path, change, says):
    official(tmp_path, change)
    with pytest.raises(ValueError, match=rf"val\.jsonl, line 1: .*{says}"):
        load_vcr(tmp_path, "val")


NAN = float("nan")
BOX = [0.0, 1.0, 9.5, 20.0, 0.9]


@pytest.mark.parametrize(
    "picture, says",
    [
        (dict(width=0), "'width' should be a number of pixels, got 0"),
        (dict(height=KeyError), "'height' should be a number of pixels, got None"),
        (dict(height=20.5), "'height' should be a number of pixels"),
        (dict(names=["person"] * 3), "'names' should be the objects"),
        (dict(boxes=None), "'boxes' should be a list of 3 boxes"),
        (dict(boxes=[BOX] * 2), "'boxes' should be a list of 3 boxes"),
        (dict(boxes=[BOX, BOX, BOX[:3]]), r"'boxes'\[2\] should be x1, y1, x2, y2"),
        (dict(boxes=[[*BOX[:4], NAN], BOX, BOX]), r"'boxes'\[0\] should be"),
        (dict(boxes=[[9.0, 0.0, 1.0, 2.0, 0.1], BOX, BOX]), r"'boxes'\[0\] should be"),
        (dict(boxes=[[10**400, 0, 10**401, 0, 1], BOX, BOX]), r"'boxes'\[0\] should be"),
        (dict(boxes=[["0", 0, 1, 0, 1], BOX, BOX]), r"'boxes'\[0\] should be"),
    ],
)
def test_wrong_metadata_are_named(tmp_path, picture, says):
    official(tmp_path, picture=picture)
    with pytest.raises(ValueError, match=rf"1\.json, line 1: {says}"):
        load_vcr(tmp_path, "val")


@pytest.mark.parametrize(
    "broken, says",
    [
        (b"", "no rows"),
        (b"[]\n", "line 1: expected an object"),
        (b"{\n", "line 1: not JSON"),
        (b"\xff\n", "line 1: not UTF-8"),
        (b'{"annot_id": "\xe9"}\n', "line 1: not UTF-8"),
        (b"[" * 99999, "line 1: not JSON"),
    ],
)
def test_broken_files_are_named(tmp_path, broken, says):
    official(tmp_path)
    (tmp_path / "val.jsonl").write_bytes(broken)
    with pytest.raises(ValueError, match=rf"val\.jsonl.*{says}"):
        load_vcr(tmp_path, "val")
    (tmp_path / "val.jsonl").unlink()
    official(tmp_path)
    (tmp_path / "vcr1images/a/1.json").write_bytes(broken or b"{")
    with pytest.raises(ValueError, match=r"1\.json, line 1: "):
        load_vcr(tmp_path, "val")


def test_questions_twice_and_cut_short(tmp_path):
    official(tmp_path)
    file = tmp_path / "val.jsonl"
    line = file.read_bytes()
    file.write_bytes(line + line)
    with pytest.raises(ValueError, match=r"line 2: annot_id 'val-0' occurs a second time, as in line 1"):
        load_vcr(tmp_path, "val")
    for cut in range(1, len(line) - 1, 37):
        file.write_bytes(line[:cut])
        with pytest.raises(ValueError, match="line 1: not JSON"):
            load_vcr(tmp_path, "val")


@pytest.mark.parametrize(
    "items, says",
    [
        ([], "no questions to write"),
        ([an_item(), an_item()], "item 1: annot_id 'val-0' occurs a second time"),
        ([an_item(), an_item("v", width=9)], "item 1: objects or boxes of 'a/1.json' differ"),
        ([an_item(boxes=None)], "item 0: 'boxes' should be a list of 3 boxes, got None"),
        ([an_item(metadata_fn="../x")], "item 0: 'metadata_fn' should be a path below"),
    ],
)
def test_nothing_wrong_is_written(tmp_path, items, says):
    with pytest.raises(ValueError, match=says):
        write_vcr(items, tmp_path, "val")
    assert list(tmp_path.iterdir()) == []


WORD = st.text(min_size=1, max_size=5) | st.lists(st.integers(0, 2), min_size=1, max_size=3)
TOKENS = st.lists(WORD, min_size=1, max_size=5)


@fuzz
@given(st.lists(st.tuples(TOKENS, TOKENS, st.integers(0, 3)), min_size=1, max_size=3))
def test_fuzz_round_trip(tmp_path, rows):
    items = [
        an_item(f"v{i}", question=q, answer_choices=[a, q, a, q], answer_label=label)
        for i, (q, a, label) in enumerate(rows)
    ]
    try:
        write_vcr(items, tmp_path, "train")
    except ValueError as e:
        assert "surrogate" in str(e)
        return
    assert load_vcr(tmp_path, "train") == items


# ---- types and low-shot sets
@pytest.mark.parametrize(
    "question, kind",
    [
        ("Why is [0] angry ?", "explanation"),
        ("How come he is here ?", "explanation"),
        ("What would [0] do if it rained ?", "hypothetical"),
        ("Could [0] be a doctor ?", "hypothetical"),
        ("What happened before this ?", "temporal"),
        ("What is [0] going to do next ?", "temporal"),
        ("How is [0] feeling ?", "mental"),
        ("What is [0] thinking about ?", "mental"),
        ("What is the relationship of [0] and [1] ?", "role"),
        ("What is [0] 's occupation ?", "role"),
        ("Where are [0] and [1] ?", "scene"),
        ("What is [0] doing ?", "activity"),
        ("What is [0] looking at ?", "activity"),
        ("", "activity"),
    ],
)
def test_question_types(question, kind):
    assert question_type(question) == kind
    words = [[0] if word.startswith("[") else word for word in question.split()]
    assert question_type(words) == kind
    assert kind in QUESTION_TYPES and len(QUESTION_TYPES) == 7


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(0, 5), st.randoms(use_true_random=False))
def test_low_shot_sets(n, seed, random):
    pool = [dict(annot_id=f"t{k}", type=QUESTION_TYPES[k % 7]) for k in range(70)]
    chosen = low_shot(pool, n, seed)
    assert set(Counter(item["type"] for item in chosen).values()) == {n}
    assert [item for item in pool if item in chosen] == chosen, "in their order"
    assert all(item in low_shot(pool, n + 2, seed) for item in chosen), "smaller sets lie in larger ones"
    mixed = random.sample(pool, len(pool))
    ids = {item["annot_id"] for item in chosen}
    assert {item["annot_id"] for item in low_shot(mixed, n, seed)} == ids
    other = [item for item in pool if item["type"] != "role"]
    assert [item for item in chosen if item["type"] != "role"] == low_shot(other, n, seed), (
        "types are independent"
    )


def test_low_shot_seeds_differ():
    pool = [dict(annot_id=f"t{k}", type="role") for k in range(200)]
    sets = [tuple(item["annot_id"] for item in low_shot(pool, 20, seed)) for seed in range(4)]
    assert len(set(sets)) == 4
    assert len(low_shot(pool, 200, 0, group="")) == 200
    with pytest.raises(ValueError, match="201 of each type are asked for"):
        low_shot(pool, 201, 0)
    with pytest.raises(ValueError, match="item 0 has no 'kind'; its keys are annot_id, type"):
        low_shot(pool, 2, 0, group="kind")


# ---- shortcuts in pronouns
@golden
def test_shortcut_mitigated_equals_the_published_rules():
    cases = golden_values("vcr_sm.json")["cases"]
    assert cases
    for case in cases:
        item = {key: case[key] for key in ("objects", "question", "choices", "label")}
        before = copy.deepcopy(item)
        ours = shortcut_mitigated(item)
        assert item == before, "what is given stays as it is"
        assert (ours["kind"], ours["eligible"]) == (case["kind"], case["eligible"])
        assert ours["choices"] == ours["new_choices"] == case["new_choices"]
        assert ours["n_modified"] == case["n_modified"]


def sm(question, *choices, label=0, objects="person person person chair"):
    def tokens(text):
        return [json.loads(word) if word[0] == "[" else word for word in text.split()]

    item = dict(objects=objects.split(), question=tokens(question), label=label)
    return shortcut_mitigated(item | dict(choices=[*map(tokens, choices)]))


def test_the_pronoun_of_a_right_answer():
    def first(question, choice):
        return sm(question, choice, "no", "no", "no")["choices"][0]

    assert first("Why is [0] sad ?", "[0] lost his hat")[0] == "He"
    assert first("Why is [0] sad ?", "[0] lost her hat")[0] == "She"
    assert first("Why is [0] in her car ?", "[0] is late")[0] == "She", "the question decides"
    assert first("Why is [0] here ?", "I think [0] is late")[2] == "he", "he where nothing decides"
    assert first("Why is [0] here ?", "She is late") == ["She", "is", "late"], "a pronoun stays"


def test_which_questions_a_rule_applies_to():
    assert sm("Why is [0] near [0] ?", "a", "b", "c", "d")["kind"] == "singular"
    assert sm("Why is [0] near [1] ?", "a", "b", "c", "d")["kind"] == ""
    assert sm("Why is [0] on [3] ?", "a", "b", "c", "d")["kind"] == "singular", "a chair is no person"
    assert sm("Why are [0,3] here ?", "a", "b", "c", "d")["kind"] == "singular"
    assert sm("Why are [0,1] here ?", "a", "b", "c", "d")["kind"] == "plural"
    assert sm("Why are [0,1] near [3] ?", "a", "b", "c", "d")["kind"] == ""
    none = sm("Why ?", "[0] x", "He", "b", "c")
    assert not none["eligible"] and none["n_modified"] == 0 and none["choices"][0] == [[0], "x"]


def test_a_mitigated_item_is_an_item():
    once = sm("Why is [0] sad ?", "[0] fell", "He fell", "[1] fell", "It fell")
    assert once["choices"] == [["He", "fell"], [[0], "fell"], [[0], "fell"], ["It", "fell"]]
    assert shortcut_mitigated(once)["choices"][1:] == once["choices"][1:]


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(label=4), "label 4 is none of the 4 choices"),
        (dict(label=None), "label None is none of"),
        (dict(question=[[9]]), r"'question': tag \[9\]"),
        (dict(choices=[["a"], ["b"], [["x"]], ["d"]]), r"'choices': tag \['x'\]"),
    ],
)
def test_mitigation_wants_a_whole_item(change, says):
    item = dict(objects=["person"], question=["a"], choices=[["a"], ["b"], ["c"], ["d"]], label=0) | change
    for mitigate in (shortcut_mitigated, functools.partial(explicit_mitigated, wordnet=small_wordnet())):
        with pytest.raises(ValueError, match=says):
            mitigate(item)
    with pytest.raises(ValueError, match="objects, label missing"):
        shortcut_mitigated(dict(question=["a"], choices=FOUR))


def test_sets_keep_what_is_eligible():
    plain = an_item("val-1", question=["Why", "?"])
    kept = mitigated_set([an_item(), plain], shortcut_mitigated)
    assert [item["annot_id"] for item in kept] == ["val-0"]
    assert kept[0]["answer_choices"][:3] == [["He", "sits", "."], [[0], "sleeps", "."], [[0], "left", "."]]
    assert kept[0]["rationale_choices"] == plain["rationale_choices"]


# ---- WordNet, and shortcuts in words
LEXICON = """
dog-n dog > canine-n
canine-n canine;canid > animal-n
animal-n animal > organism-n
organism-n organism > entity-n
entity-n entity
gun-n gun > weapon-n
weapon-n weapon;arm > animal-n
day-n day > organism-n
change-v change
stop-v stop > change-v
hold-v hold;grasp
man-n man;adult_male
men-n men;work_force
apple-n apple;orchard_fruit
hat-n hat;umbrella
run-v run;race
write-v write;pen
sad-a sad;unhappy
open-v open;unlock
sit_down-v sit_down;squat
sit-v sit
near-a near;close
"""
FORMS = dict(man=["men"], run=["ran", "running"], write=["writing", "written", "wrote"], sit=["sat"])


def lexicon_rows():
    synsets, senses = [], {}
    for line in LEXICON.strip().split("\n"):
        head, _, above = line.partition(" > ")
        id, _, members = head.partition(" ")
        members = members.replace("_", " ").split(";")
        synsets.append(dict(id=id, members=members, hypernym=[above] if above else []))
        for member in members:
            senses.setdefault((member, id[-1]), []).append(id)
    entries = [dict(lemma=w, pos=p, synsets=ids, forms=FORMS.get(w, [])) for (w, p), ids in senses.items()]
    return entries, synsets


@functools.cache
def small_wordnet():
    entries, synsets = lexicon_rows()
    return WordNet(
        {(row["lemma"], row["pos"]): row["synsets"] for row in entries},
        {row["id"]: row["members"] for row in synsets},
        {row["id"]: row["hypernym"] for row in synsets},
        {(row["lemma"], row["pos"]): row["forms"] for row in entries},
    )


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def lexicon_files(folder, entries=None, synsets=None):
    given = lexicon_rows()
    (folder / "entries.jsonl").write_text(json_lines(entries or given[0]))
    (folder / "synsets.jsonl").write_text(json_lines(synsets or given[1]))
    return folder


def test_a_folder_is_read_as_it_is_now(tmp_path):
    read = read_wordnet(lexicon_files(tmp_path))
    assert read.senses == small_wordnet().senses and read.members == small_wordnet().members
    assert read_wordnet(tmp_path) is read
    lexicon_files(tmp_path, [dict(lemma="dog", pos="n", synsets=["dog-n"])])
    os.utime(tmp_path / "entries.jsonl", ns=(1, 1))
    assert list(read_wordnet(tmp_path).senses) == [("dog", "n")]


@pytest.mark.parametrize(
    "entries, synsets, says",
    [
        (
            [dict(lemma="a", pos="n", synsets=["x"])],
            None,
            r"entries\.jsonl, line 1: 'a' names the synset 'x'",
        ),
        ([dict(lemma="a", pos="n")], None, r"entries\.jsonl, line 1: no list of texts under 'synsets'"),
        ([dict(lemma=1, pos="n", synsets=[])], None, r"entries\.jsonl, line 1: no text under 'lemma'"),
        (
            [dict(lemma="dog", pos="n", synsets=["dog-n"], forms="dogs")],
            None,
            r"line 1: 'forms' should be a list of texts, got 'dogs'",
        ),
        (None, [dict(id="a", members=["a"])] * 2, r"synsets\.jsonl, line 2: id 'a' occurs a second time"),
        (None, [dict(id="a", members=[])], r"synsets\.jsonl, line 1: synset 'a' has no members"),
        (None, [dict(id="a", members=["a"], hypernym=["b"])], r"line 1: hypernym 'b' is no synset"),
        (None, [dict(id="a", members=["a"], hypernym="b")], r"line 1: 'hypernym' should be a list of texts"),
    ],
)
def test_wrong_wordnets_are_named(tmp_path, entries, synsets, says):
    with pytest.raises(ValueError, match=says):
        read_wordnet(lexicon_files(tmp_path, entries, synsets))


@pytest.mark.parametrize(
    "word, pos, bases",
    [
        ("dogs", "n", ["dog"]),
        ("men", "n", ["man", "men"]),
        ("running", "v", ["run"]),
        ("opened", "v", ["open"]),
        ("Wrote", "v", ["write"]),
        ("sat", "v", ["sit"]),
        ("sadder", "a", []),
        ("zzz", "n", []),
    ],
)
def test_base_forms(word, pos, bases):
    assert base_forms(word, pos, small_wordnet()) == bases


@pytest.mark.parametrize(
    "lemma, pos, form, made",
    [
        ("box", "n", "s", "boxes"),
        ("city", "n", "s", "cities"),
        ("boy", "n", "s", "boys"),
        ("man", "n", "s", "men"),
        ("adult male", "n", "s", "adult males"),
        ("sit down", "v", "ed", "sat down"),
        ("watch", "v", "s", "watches"),
        ("go", "v", "s", "goes"),
        ("grab", "v", "ing", "grabbing"),
        ("race", "v", "ing", "racing"),
        ("see", "v", "ing", "seeing"),
        ("tie", "v", "ing", "tying"),
        ("cry", "v", "ed", "cried"),
        ("open", "v", "ed", "opened"),
        ("write", "v", "ed", None),
        ("sad", "a", "?", None),
        ("sad", "a", "", "sad"),
    ],
)
def test_inflected_forms(lemma, pos, form, made):
    assert inflected(lemma, pos, form, small_wordnet()) == made


@pytest.mark.parametrize(
    "question, answer, wanted",
    [
        ("Why a gun ?", "He has a gun .", "He has a weapon ."),
        ("Why an apple ?", "An apple fell .", "An orchard fruit fell ."),
        ("Whose hat ?", "It is a hat .", "It is an umbrella ."),
        ("What do men hold ?", "Two men hold dogs .", "Two adult males grasp dogs ."),
        ("Why run ?", "[0] is running", "[0] is racing"),
        ("Why did he run ?", "[0] ran", "[0] raced"),
        ("Why hold it ?", "Holding it helps", "Grasping it helps"),
        ("Are they sitting down ?", "[0] sits down", "[0] squats"),
        ("Who is sad ?", "[0] is sad", "[0] is unhappy"),
        ("Is he near ?", "He is near", "He is near"),
        ("Who can write ?", "She can write", "She can pen"),
        ("Who pens ?", "She wrote", "She wrote"),
        ("Who can pen it ?", "She penned it", "She penned it"),
        ("Why a dog ?", "The cat ran", "The cat ran"),
        ("Why a day ?", "A day", "A day"),  # what it is a kind of is too general
        ("Why stop ?", "They stop", "They stop"),
        ("Why is the dog 's dog a dog ?", "dogs", "canines"),
    ],
)
def test_rewording(question, answer, wanted):
    def tokens(text):
        return [[0] if word == "[0]" else word for word in text.split()]

    new, replaced = reworded(tokens(answer), tokens(question), small_wordnet())
    assert new == tokens(wanted)
    assert bool(replaced) == (answer != wanted)


def test_explicit_mitigation_touches_the_right_answer_alone(tmp_path):
    choices = [["A", "dog", "ran"], ["A", "dog", "sat"], ["no", "dog"], ["dogs"]]
    item = dict(objects=["person"], question=["Why", "did", "the", "dog", "run"], choices=choices, label=0)
    before = copy.deepcopy(item)
    done = explicit_mitigated(item, small_wordnet())
    assert item == before
    assert done["choices"] == done["new_choices"] == [["A", "canine", "raced"], *choices[1:]]
    assert done["replaced"] == [("dog", "canine"), ("ran", "raced")]
    assert explicit_mitigated(item, lexicon_files(tmp_path)) == done, "the folder of a WordNet is as good"
    assert explicit_mitigated(item, str(tmp_path)) == done


TEXT = st.sampled_from(
    "a an the dog dogs men man ran running wrote sad open sit down hat . ? A Dog to".split()
)


@fuzz
@given(st.lists(TEXT | st.just([0]), min_size=1, max_size=9), st.lists(TEXT, max_size=9))
def test_fuzz_rewording(answer, question):
    wordnet = small_wordnet()
    new, replaced = reworded(answer, question, wordnet)
    assert all(token in new for token in answer if token == [0] or token in ".?")
    avoid = set().union(*(all_base_forms(word, wordnet) for word in question))
    for _, said in replaced:
        assert not any(all_base_forms(word, wordnet) & avoid for word in said.split())
    for before, after in itertools.pairwise(new):
        if before in ("a", "A") and after not in answer:
            assert after[0] not in "aeiou"


def test_overlap_statistics_by_hand():
    one = an_item(
        question=["Why", "does", [0], "run", "?"],
        answer_choices=[[[0], "ran", "."], ["run"], ["chairs"], ["a", "chair"]],
    )
    two = an_item("v", question=["Why", "?"], answer_choices=[["x"], ["y"], ["z"], [[2]]], answer_label=1)
    table = overlap_statistics([one, two])
    wrong, right = table.to_dict("records")
    assert (right["category"], right["IM"], right["question_tokens"], right["question_more"]) == (
        "correct",
        "N",
        0.5,
        50,
    )
    assert wrong["question_tokens"] == pytest.approx((1 / 3 + 0) / 2) and wrong["question_more"] == 0
    assert wrong["image_tokens"] == pytest.approx((1 / 3 + 1 / 3) / 2) and wrong["image_more"] == 50
    with_bases = overlap_statistics([one, two], wordnet=small_wordnet()).iloc[1]
    assert with_bases.question_tokens == 1.0, "ran is run"
    split = overlap_statistics([one, two], language=[0])
    assert list(split.IM) == ["N", "N", "Y", "Y"] and split.question_tokens[3] == 0
    pd.testing.assert_frame_equal(split[:2], table)
    assert overlap_statistics([one], language=[0]).iloc[2:, 2:].isna().all(axis=None)


def test_implicit_split():
    p = np.array([[0.9, 0.1], [0.89, 0.11], [0.05, 0.95], [0.05, 0.95]])
    biased, rest = implicit_split(p, [0, 0, 0, 1])
    assert biased.tolist() == [0, 3] and rest.tolist() == [1, 2]
    assert implicit_split(p, [0, 0, 0, 1], gamma=0.89)[0].tolist() == [0, 1, 3]
    assert [part.tolist() for part in implicit_split(np.zeros((0, 4)), np.zeros(0, int))] == [[], []]
    for bad, labels, says in (
        (p, [0, 0, 0], r"got \(4, 2\) and \(3,\)"),
        (p[0], [0], r"should be \(N, C\)"),
        (p, [0, 0, 0, 2], "numbers of the 2 choices"),
        (p, [0.0] * 4, "numbers of the 2 choices"),
        (p * 2, [0] * 4, "between 0 and 1"),
        (p * np.nan, [0] * 4, "between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=says):
            implicit_split(bad, labels)


def test_tags_are_spoken():
    assert spoken([[0, 2], "sit", "on", [1]], ["person", "chair", "person"]) == (
        "person1 and person3 sit on chair2".split()
    )


# ---- real data
@pytest.fixture(scope="module")
def real_wordnet():
    from vlkd.core.settings import data_dir

    folder = data_dir(need=False)
    if not folder or not (folder / "open_english_wordnet").is_dir():
        pytest.skip("no Open English WordNet under VLKD_DATA")
    return read_wordnet(folder / "open_english_wordnet")


def test_real_base_forms(real_wordnet):
    assert real_wordnet.synonyms("car", "n")[0] == "auto"
    for word, pos, base in (
        *(("children", "n", "child"), ("geese", "n", "goose"), ("ran", "v", "run"), ("sitting", "v", "sit")),
        *(
            ("stopped", "v", "stop"),
            ("carries", "v", "carry"),
            ("watches", "v", "watch"),
            ("better", "a", "good"),
        ),
    ):
        assert base in base_forms(word, pos, real_wordnet)


def test_real_rewording_lowers_overlap(real_wordnet, data):
    "Captions of one photo, one as question and one as answer, share fewer words afterwards."
    file = data / "flickr8k/captions.jsonl"
    if not file.is_file():
        pytest.skip("no captions of photos under VLKD_DATA")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:200] if line]
    before = after = 0
    for row in rows:
        question, answer = (re.findall(r"\w+", text.lower()) for text in row["captions"][:2])
        new, replaced = reworded(answer, question, real_wordnet)
        avoid = set().union(*(all_base_forms(word, real_wordnet) for word in question))
        for words, sign in ((answer, 1), (new, 0)):
            shared = sum(bool(all_base_forms(word, real_wordnet) & avoid) for word in words)
            before, after = (before + shared, after) if sign else (before, after + shared)
        for _, said in replaced:
            assert not any(all_base_forms(word, real_wordnet) & avoid for word in said.split())
    assert after < 0.75 * before
