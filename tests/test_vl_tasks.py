"SNLI-VE, VQA, e-SNLI-VE and DAQUAR: files, answers and scores, low-shot sets, shifted words, statements."

import csv
import gzip
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlkd.data.vl_tasks import (
    FALLBACK,
    SNLI_VE_LABELS,
    SOFT_SCORES,
    VQA_ANNOTATORS,
    VQA_SPLITS,
    VQA_TYPES,
    answer_set,
    load_daquar,
    load_esnlive,
    load_snli_ve,
    load_vqa,
    low_shot_images,
    low_shot_pairs,
    low_shot_questions,
    shifted_snli_ve,
    shifted_vqa,
    soft_score,
    statement,
    ten_answers,
    vcr_statement,
    vqa_type,
    write_snli_ve,
    write_vqa,
)

GOLDEN = os.environ.get("VLKD_GOLDEN")
golden = pytest.mark.skipif(not GOLDEN, reason="VLKD_GOLDEN does not name the folder of the peers' values")
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def golden_values(name):
    return json.loads((Path(GOLDEN) / name).read_text(encoding="utf-8"))


# ---- SNLI-VE
def a_line(**change):
    row = dict(Flickr30K_ID="7", gold_label="neutral", pairID="7.jpg#0r1n", sentence1="A cat.")
    row |= dict(sentence2="A cat waits.", annotator_labels=["neutral"], captionID="7.jpg#0")
    return {key: value for key, value in (row | change).items() if value is not KeyError}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_snli_ve_in_official_form(tmp_path):
    file = tmp_path / "snli_ve_train.jsonl"
    file.write_text(lines(a_line(), a_line(pairID="7.jpg#0r1e", gold_label="entailment", sentence2="A pet.")))
    items = load_snli_ve(tmp_path, "train")
    assert [item["label"] for item in items] == [1, 0] and SNLI_VE_LABELS[2] == "contradiction"
    assert items[0]["image"] == "7.jpg" and items[0]["premise"] == "A cat."
    assert (items[1]["id"], items[1]["hypothesis"]) == ("7.jpg#0r1e", "A pet.")
    assert items[0]["annotator_labels"] == ["neutral"], "official keys stay"
    packed = tmp_path / "gz" / "snli_ve_train.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n")))
    assert load_snli_ve(packed.parent, "train") == items
    assert load_snli_ve(write_snli_ve(items, tmp_path / "copy", "dev").parent, "dev") == items


@pytest.mark.parametrize("key", ["Flickr30kID", "Flikr30kID"])
def test_other_spellings_of_the_photo(tmp_path, key):
    row = a_line(Flickr30K_ID=KeyError) | {key: "7.jpg"}
    (tmp_path / "snli_ve_test.jsonl").write_text(lines(row))
    items = load_snli_ve(tmp_path, "test")
    assert items[0]["image"] == "7.jpg"
    assert load_snli_ve(write_snli_ve(items, tmp_path / "copy", "test").parent, "test") == items


@pytest.mark.parametrize(
    "row, says",
    [
        (a_line(pairID=KeyError), "'pairID' should be text, got None"),
        (a_line(pairID=7), "'pairID' should be text, got 7"),
        (a_line(Flickr30K_ID=KeyError), "'Flickr30K_ID' should be text"),
        (a_line(Flickr30K_ID=7), "'Flickr30K_ID' should be text, got 7"),
        (a_line(sentence2=" "), "'sentence2' is empty"),
        (a_line(sentence2=["A"]), "'sentence2' should be text"),
        (a_line(sentence2="\ud800"), "half a surrogate pair"),
        (a_line(sentence1=None), "'sentence1' should be text, got None"),
        (a_line(gold_label="-"), "label '-'; expected entailment or neutral or contradiction"),
        (a_line(gold_label=KeyError), "label None; expected entailment"),
        (a_line(gold_label=[]), r"label \[\]; expected"),
        (a_line(gold_label=1), "label 1; expected"),
        ([1], "expected an object"),
    ],
)
def test_wrong_pairs_are_named(tmp_path, row, says):
    good = a_line(pairID="other")
    (tmp_path / "snli_ve_dev.jsonl").write_text(lines(good, row))
    with pytest.raises(ValueError, match=rf"snli_ve_dev\.jsonl, line 2: .*{says}"):
        load_snli_ve(tmp_path, "dev")


def test_snli_ve_files_that_are_broken(tmp_path):
    file = tmp_path / "snli_ve_dev.jsonl"
    file.write_text(lines(a_line(), a_line()))
    with pytest.raises(ValueError, match=r"line 2: id '7.jpg#0r1n' occurs a second time, as in line 1"):
        load_snli_ve(tmp_path, "dev")
    whole = lines(a_line()).encode()
    for cut in range(1, len(whole) - 1, 11):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="line 1: not JSON"):
            load_snli_ve(tmp_path, "dev")
    file.write_bytes(whole.replace(b"cat", b"c\xe1t"))
    with pytest.raises(ValueError, match="line 1: not UTF-8"):
        load_snli_ve(tmp_path, "dev")
    with pytest.raises(FileNotFoundError, match=r"none of snli_ve_train\.jsonl"):
        load_snli_ve(tmp_path, "train")
    with pytest.raises(ValueError, match="unknown split of SNLI-VE 'val'"):
        load_snli_ve(tmp_path, "val")


PAIR = dict(id="a", image="7.jpg", premise="", hypothesis="A cat.", label=0)


@pytest.mark.parametrize(
    "items, says",
    [
        ([], "no rows to write"),
        ([PAIR, PAIR], "id 'a' occurs a second time"),
        ([PAIR | dict(label=3)], "item 0: 'label' should be 0, 1 or 2, got 3"),
        ([PAIR | dict(label=True)], "'label' should be 0, 1 or 2"),
        ([PAIR | dict(label=1.0)], "'label' should be 0, 1 or 2"),
        ([PAIR | dict(hypothesis="")], "item 0: 'hypothesis' is empty"),
        ([PAIR | dict(premise=3)], "'sentence1' should be text"),
        ([{"id": "a"}], "'label' should be"),
    ],
)
def test_no_wrong_pairs_are_written(tmp_path, items, says):
    with pytest.raises(ValueError, match=says):
        write_snli_ve(items, tmp_path, "dev")
    assert list(tmp_path.iterdir()) == []


WORDS = st.text(min_size=1, max_size=9)


@fuzz
@given(
    st.lists(st.tuples(WORDS, WORDS, WORDS, st.text(max_size=5), st.integers(0, 2)), min_size=1, max_size=4)
)
def test_fuzz_pairs_round_trip(tmp_path, rows):
    keys = ("id", "image", "hypothesis", "premise", "label")
    items = [dict(zip(keys, row, strict=True)) for row in rows]
    items = [item | dict(image=item["image"] + ".jpg") for item in items]
    try:
        write_snli_ve(items, tmp_path, "train")
    except ValueError as e:
        assert re.search("surrogate|empty|second time", str(e))
        return
    back = load_snli_ve(tmp_path, "train")
    assert [{key: item[key] for key in keys} for item in back] == items


# ---- e-SNLI-VE
def test_esnlive_both_ways(tmp_path):
    pair = dict(
        image="7_x.jpg", pair_id="7.jpg#0r1n", hypothesis="A cat.", label="neutral", explanation="Why not."
    )
    (tmp_path / "esnlive_dev_flickr8k.jsonl").write_text(lines(pair))
    item = dict(id="7.jpg#0r1n", image="7_x.jpg", premise="", hypothesis="A cat.", label=1)
    item |= dict(gold_label="neutral", explanation="Why not.")
    assert load_esnlive(tmp_path, "dev") == [item]
    head = ",pairID,Flickr30kID,hypothesis,gold_label,explanation\n"
    (tmp_path / "test.csv").write_text(head + '0,7.jpg#0r1n,7_x.jpg,A cat.,neutral,"Why not."\n')
    assert load_esnlive(tmp_path, "test") == [item]
    (tmp_path / "test.csv").write_text(head + "0,7.jpg#0r1n,7_x.jpg,A cat.,maybe,\n")
    with pytest.raises(ValueError, match=r"test\.csv, line 2: label 'maybe'; expected"):
        load_esnlive(tmp_path, "test")
    (tmp_path / "esnlive_dev_flickr8k.jsonl").write_text(lines(pair, pair))
    with pytest.raises(ValueError, match=r"flickr8k\.jsonl, line 2: id .* second time"):
        load_esnlive(tmp_path, "dev")
    (tmp_path / "esnlive_dev_flickr8k.jsonl").write_text(lines(pair | dict(explanation=None)))
    with pytest.raises(ValueError, match="line 1: 'explanation' should be text, got None"):
        load_esnlive(tmp_path, "dev")
    with pytest.raises(ValueError, match="unknown split of e-SNLI-VE 'train'"):
        load_esnlive(tmp_path, "train")


# ---- VQA
Q, A = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"


def a_question(id=1, **change):
    item = dict(question_id=id, image_id=7, question="Is it red?", answers=ten_answers(["yes"] * 9 + ["no"]))
    return item | dict(multiple_choice_answer="yes", question_type="is it", answer_type="yes/no") | change


@pytest.mark.parametrize("split", VQA_SPLITS)
def test_vqa_is_written_and_read(tmp_path, split):
    items = [a_question(), a_question(2, image_id="room", question="What?")]
    if split.startswith("test"):
        items = [{key: item[key] for key in ("question_id", "image_id", "question")} for item in items]
    files = write_vqa(items, tmp_path, split)
    assert len(files) == (1 if split.startswith("test") else 2)
    assert all(VQA_SPLITS[split] in file.name for file in files)
    assert load_vqa(tmp_path, split) == load_vqa(tmp_path, VQA_SPLITS[split]) == items
    for file in files:
        packed = gzip.compress(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
        file.with_name(file.name + ".gz").write_bytes(packed)
        file.unlink()
    assert load_vqa(tmp_path, split) == items


def vqa_files(folder, questions=(), annotations=()):
    "Valid files of two questions; a pair (keys, value) changes one place of a file, KeyError removes it."
    files = write_vqa([a_question(), a_question(2)], folder, "val")
    for file, change in zip(files, (questions, annotations), strict=True):
        tree = json.loads(file.read_text())
        if change:
            *above, last = change[0]
            node = tree
            for key in above:
                node = node[key]
            if change[1] is KeyError:
                del node[last]
            else:
                node[last] = change[1]
        file.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    "at, value, says",
    [
        (
            ("questions",),
            KeyError,
            rf"{Q}, line 1: should be an object with a list under 'questions', got None",
        ),
        (("questions",), [], r"a list under 'questions', got \[\]"),
        (("questions", 1), "x", rf"{Q}, questions\[1\]: should be an object, got 'x'"),
        (("questions", 1, "question_id"), 1, r"questions\[1\]: question_id 1 occurs a second time"),
        (("questions", 1, "question_id"), True, "'question_id' should be a number or a name, got True"),
        (("questions", 1, "question_id"), 1.5, "'question_id' should be a number or a name"),
        (("questions", 1, "question_id"), KeyError, "'question_id' should be a number or a name, got None"),
        (("questions", 0, "image_id"), None, "'image_id' should be a number or a name, got None"),
        (("questions", 0, "image_id"), 8, rf"{A}: question_id 1 is about image 7, in {Q} 8"),
        (("questions", 0, "question"), 3, r"questions\[0\]: 'question' should be text, got 3"),
        (("questions", 0, "question"), "", r"questions\[0\]: 'question' is empty"),
        (("questions", 0), KeyError, rf"{A}: question_id 1 is no question of {Q}"),
    ],
)
def test_wrong_questions_are_named(tmp_path, at, value, says):
    vqa_files(tmp_path, questions=(at, value))
    with pytest.raises(ValueError, match=says):
        load_vqa(tmp_path, "val")


@pytest.mark.parametrize(
    "at, value, says",
    [
        (("annotations",), {}, rf"{A}, line 1: should be an object with a list under 'annotations'"),
        (("annotations", 1), KeyError, rf"{A}: no annotation of question_id 2 of {Q}"),
        (("annotations", 1, "question_id"), 1, r"annotations\[1\]: question_id 1 occurs a second time"),
        (("annotations", 0, "answers"), [], "'answers' should be a list of 10 answers"),
        (("annotations", 0, "answers", 9), KeyError, r"annotations\[0\]: 'answers' should be a list of 10"),
        (("annotations", 0, "answers", 3), "yes", r"'answers'\[3\]: 'answer' should be text, got None"),
        (("annotations", 0, "answers", 3, "answer"), 5, r"'answers'\[3\]: 'answer' should be text, got 5"),
        (("annotations", 0, "answers", 3, "answer"), float("nan"), "'answer' should be text, got nan"),
        (("annotations", 0, "multiple_choice_answer"), 2, "'multiple_choice_answer' should be text"),
        (("annotations", 0, "question_type"), None, "'question_type' should be text, got None"),
    ],
)
def test_wrong_annotations_are_named(tmp_path, at, value, says):
    vqa_files(tmp_path, annotations=(at, value))
    with pytest.raises(ValueError, match=says):
        load_vqa(tmp_path, "val")


def test_vqa_files_that_are_broken(tmp_path):
    vqa_files(tmp_path)
    for name in (Q, A):
        whole = (tmp_path / name).read_bytes()
        for cut in range(0, len(whole) - 1, 53):
            (tmp_path / name).write_bytes(whole[:cut])
            with pytest.raises(ValueError, match=rf"{name}, line \d+: not JSON"):
                load_vqa(tmp_path, "val")
        (tmp_path / name).write_bytes(whole.replace(b"yes", b"y\xe9s").replace(b"red", b"r\xe9d"))
        with pytest.raises(ValueError, match=rf"{name}, line 1: not UTF-8"):
            load_vqa(tmp_path, "val")
        (tmp_path / name).write_text("[]")
        with pytest.raises(ValueError, match=rf"{name}, line 1: should be an object"):
            load_vqa(tmp_path, "val")
        (tmp_path / name).write_bytes(whole)
    (tmp_path / A).unlink()
    with pytest.raises(FileNotFoundError, match=A):
        load_vqa(tmp_path, "val")
    with pytest.raises(ValueError, match="unknown split of VQA 'dev'"):
        load_vqa(tmp_path, "dev")


@pytest.mark.parametrize(
    "items, says",
    [
        ([], "should be an object with a list under 'questions'"),
        ([a_question(), a_question()], "question_id 1 occurs a second time"),
        ([a_question(answers=["yes"] * 10)], "'answer' should be text, got None"),
        ([a_question(answers=None)], "'answers' should be a list of 10 answers"),
        ([a_question(question="")], "'question' is empty"),
        ([a_question(extra=float("nan"))], "JSON compliant"),
    ],
)
def test_no_wrong_questions_are_written(tmp_path, items, says):
    with pytest.raises(ValueError, match=says):
        write_vqa(items, tmp_path, "val")
    assert list(tmp_path.iterdir()) == []


@fuzz
@given(
    st.lists(
        st.tuples(WORDS, st.integers() | WORDS, st.lists(st.text(max_size=3), min_size=10, max_size=10)),
        min_size=1,
        max_size=3,
    )
)
def test_fuzz_questions_round_trip(tmp_path, rows):
    items = [
        a_question(k, question=question, image_id=image, answers=ten_answers(answers))
        for k, (question, image, answers) in enumerate(rows)
    ]
    try:
        write_vqa(items, tmp_path, "train")
    except ValueError as e:
        assert re.search("surrogate|empty|should be a number or a name", str(e))
        return
    assert load_vqa(tmp_path, "train") == items


# ---- DAQUAR
def test_daquar_as_vqa(tmp_path):
    file = tmp_path / "official_train.csv"
    file.write_text('question,answer,image_id\nwhat is it,lamp,image1\nwhat are they,"cup, jar",image2\n')
    items = load_daquar(tmp_path, "train")
    assert [item["question_id"] for item in items] == ["train-2", "train-3"]
    assert items[1]["multiple_choice_answer"] == "cup, jar" and soft_score(items[1]["answers"]) == {
        "cup, jar": 1.0
    }
    assert items[0]["image_id"] == "image1" and len(items[0]["answers"]) == VQA_ANNOTATORS
    assert load_vqa(write_vqa(items, tmp_path, "train")[0].parent, "train") == items
    for text, says in (
        ("question,answer\na,b\n", r"official_train\.csv, line 1: no column 'image_id'"),
        ("question,answer,image_id\na,,i\n", "line 2: 'answer' is empty"),
        ("question,answer,image_id\na,b\n", "line 2: 2 fields, expected 3"),
        ('question,answer,image_id\na,"b,c\n', "quotation mark"),
        ("question,answer,image_id\n", "no rows"),
        ("", "the file is empty"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=says):
            load_daquar(tmp_path, "train")
    with pytest.raises(ValueError, match="unknown split of DAQUAR 'dev'"):
        load_daquar(tmp_path, "dev")


# ---- answers and scores
def test_answers_are_counted_by_question():
    asked = [a_question(k) for k in range(3)]
    asked += [a_question(9, answers=ten_answers(["two"] * 6 + ["red"] * 4), multiple_choice_answer="two")]
    asked += [a_question(8, answers=ten_answers(["red"] * 6 + ["two"] * 4), multiple_choice_answer="red")]
    assert answer_set(asked) == ["yes", "red", "two", "no"]
    assert answer_set(asked, 2) == ["yes", "red"], "red and two tie: the alphabet"
    assert answer_set([[text["answer"] for text in item["answers"]] for item in asked]) == answer_set(asked)
    assert answer_set(asked[::-1]) == answer_set(asked) and answer_set([]) == []
    assert answer_set(dict(annotations=asked)) == answer_set(asked)
    for bad in (
        [dict(answers="yes")],
        [dict()],
        [[1]],
        ["yes"],
        {"x": []},
        [dict(answers=[dict(answer=None)])],
    ):
        with pytest.raises(ValueError, match="answers should be a list of texts"):
            answer_set(bad)


def test_the_set_has_as_many_as_asked():
    many = [[f"a{k}"] * 10 for k in range(4000)]
    assert len(answer_set(many)) == 3129 == len(set(answer_set(many)))


@golden
def test_soft_scores_equal_the_golden_values():
    values = golden_values("vqa_accuracy.json")
    for row in values["table"]:
        answers = ["a"] * row["matches"] + ["b"] * (VQA_ANNOTATORS - row["matches"])
        for method in SOFT_SCORES:
            assert soft_score(answers, method).get("a", 0.0) == pytest.approx(row[method], abs=1e-12)
    assert values["soft_targets"] and values["cases"]
    for case in values["soft_targets"]:
        for method in SOFT_SCORES:
            assert soft_score(case["answers"], method) == pytest.approx(case[method], abs=1e-12)
            assert soft_score(ten_answers(case["answers"]), method) == soft_score(case["answers"], method)
    for case in values["cases"]:
        for method in SOFT_SCORES:
            ours = soft_score(case["answers"], method).get(case["prediction"], 0.0)
            assert ours == pytest.approx(case[method], abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=14))
def test_leave_one_out_by_hand(answers):
    rest = [answers[:k] + answers[k + 1 :] for k in range(len(answers))]
    for text, score in soft_score(answers).items():
        by_hand = sum(min(others.count(text) / 3, 1) for others in rest) / len(answers)
        assert score == pytest.approx(by_hand, abs=1e-12)


def test_soft_score_says_what_is_wrong():
    with pytest.raises(ValueError, match="unknown soft score 'mean'"):
        soft_score(["a"] * 10, "mean")
    for bad in ("yes", None, [None], [dict(text="yes")]):
        with pytest.raises(ValueError, match="list of texts"):
            soft_score(bad)
    assert soft_score([]) == {}
    with pytest.raises(ValueError, match="9 answers; there should be 10"):
        ten_answers(["a"] * 9)


# ---- low-shot sets
def test_low_shot_pairs_and_questions():
    pairs = [dict(id=f"p{k}", image=f"{k // 5}.jpg", label=k % 3) for k in range(150)]
    few = low_shot_pairs(pairs, 10, 1)
    assert Counter(item["label"] for item in few) == {0: 10, 1: 10, 2: 10}
    assert all(item in low_shot_pairs(pairs, 20, 1) for item in few) and few != low_shot_pairs(pairs, 10, 2)
    asked = [dict(question_id=k) for k in range(50)]
    assert len(low_shot_questions(asked, 20, 3)) == 20
    with pytest.raises(ValueError, match="51 of each set are asked for"):
        low_shot_questions(asked, 51, 3)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 9), st.integers(1, 4), st.randoms(use_true_random=False))
def test_low_shot_images(n, seed, per_image, random):
    items = [dict(id=k, image=f"{k // 4}.jpg", label=(k * 7 + k // 4) % 3) for k in range(120)]

    def chosen(items):
        return low_shot_images(items, n, seed, groups=[i["label"] for i in items], per_image=per_image)

    few = chosen(items)
    shown = Counter(item["image"] for item in few)
    assert len(shown) == 3 * n, "an image counts for one group"
    assert set(shown.values()) == {min(per_image, 4)}
    assert all(sum(item["label"] == label for item in few) >= n for label in range(3)) or per_image > 1
    mixed = random.sample(items, len(items))
    assert {item["id"] for item in chosen(mixed)} == {item["id"] for item in few}
    with pytest.raises(ValueError, match="11 images of 2 are asked for, there are only"):
        low_shot_images(items, 11, seed, groups=[i["label"] for i in items])


@pytest.mark.parametrize(
    "question, kind",
    [
        ("How many dogs?", "how many"),
        ("What color is it?", "what color"),
        ("what colour is it", "what color"),
        ("What kind of dog is it?", "what kind"),
        ("What is it?", "what is"),
        ("What's that?", "what is"),
        ("What animal is it?", "what"),
        ("Where is it?", "where"),
        ("Is it red?", "yes or no"),
        ("Who is it?", "other"),
        ("Island?", "other"),
        ("", "other"),
    ],
)
def test_vqa_types(question, kind):
    assert vqa_type(question) == kind and kind in VQA_TYPES and len(VQA_TYPES) == 8


# ---- shifted words
@pytest.mark.parametrize(
    "text, wanted",
    [
        ("A man and a boy.", "A male and a male."),
        ("Women, girls and BOYS", "Females, females and MALES"),
        ("The woman's dog; the men's dog; the boys' dog", "The female's dog; the males' dog; the males' dog"),
        ("People wait. Some people's bags.", "Persons wait. Some persons' bags."),
        ("A fireman mans a man-made, humanman snowman.", "A fireman mans a man-made, humanman snowman."),
        ("A girlfriend and a cowboy", "A girlfriend and a cowboy"),
        ("man", "male"),
        ("", ""),
    ],
)
def test_shifted_hypotheses(text, wanted):
    assert shifted_snli_ve(text) == wanted
    assert shifted_snli_ve(wanted) == wanted, "nothing is left to replace"


@pytest.mark.parametrize(
    "question, wanted",
    [
        ("How many men are in the boat?", "What is the number of persons in the boat?"),
        ("How many dogs are there?", "What is the number of dogs there?"),
        ("how many dogs are there ?", "what is the number of dogs there ?"),
        ("How many dogs?", "What is the number of dogs?"),
        ("How many cars can you see?", "What is the number of cars that you can see?"),
        ("How many of the women have hats?", "What is the number of the persons that have hats?"),
        ("How many kites are the people flying?", "What is the number of kites that the people are flying?"),
        ("What is the man doing?", "What is the action of the person?"),
        ("What were the women doing at noon?", "What was the action of the persons at noon?"),
        ("What is he doing?", "What is the action of the person?"),
        ("What is this?", "What is this?"),
        ("Who is running?", "Which person is running?"),
        ("Who are the women?", "Which persons are the persons?"),
        ("Who's there?", "Which person is there?"),
        ("Whose hat is it?", "Whose hat is it?"),
        ("What color is the cat?", "Which color is the cat?"),
        ("what colour is it", "which colour is it"),
        ("Is he a MAN?", "Is the person a PERSON?"),
        ("He?", "The person?"),
        ("Where is she?", "Where is the person?"),
        ("Is the woman's hat red?", "Is the person's hat red?"),
        ("Is the postman here?", "Is the postman here?"),
        ("?", "?"),
        ("", ""),
    ],
)
def test_shifted_questions(question, wanted):
    assert shifted_vqa(question) == wanted


@settings(deadline=None)
@given(
    st.lists(st.sampled_from("how many what is are the man men he doing who color of there ? have".split()))
)
def test_fuzz_shifted_questions(words):
    question = " ".join(words)
    shifted = shifted_vqa(question)
    assert not re.search(r"\b(man|men|he)\b", shifted)
    assert shifted.count("?") == question.count("?")
    assert shifted_snli_ve(question).count("male") == question.split().count("man") + question.split().count(
        "men"
    )


# ---- statements
@golden
def test_statements_equal_the_golden_ones():
    values = golden_values("advl_statements.json")
    assert values["cases"]
    for case in (*values["cases"], *values.get("literal_quirks", ())):
        assert statement(case["question"], case["answer"]) == (case["statement"], case["template"])
    for question in values["no_rule"]["questions"]:
        assert statement(question, "because of it .")[1] == FALLBACK


@pytest.mark.parametrize(
    "question, answer, wanted",
    [
        (
            "what will happen next",
            "rain",
            ("rain", "1f"),
        ),  # without a question mark: the figure's rule would fail
        ("what might happen if it rains ?", "we go .", ("if it rains we go .", "1b")),
        ("whose are the hats ?", "ours", ("ours are the hats", "2a")),
        ("why are they here ?", "it rains .", ("they are here because it rains .", "3a")),
        ("will he run ?", "no , he rests .", ("he will not run , he rests .", "6a")),
        ("is ?", "yes .", ("? is .", "6a")),
        ("why ?", "so .", ("why so .", FALLBACK)),
        ("is", "so .", ("is so .", FALLBACK)),
        ("What is it ?", "it .", ("What is it it .", FALLBACK)),
    ],
)
def test_statements(question, answer, wanted):
    assert statement(question, answer) == wanted


TOKEN = st.sampled_from(
    "what will happen next if after whose is are why how feel where does no yes who ? it".split()
)


@settings(max_examples=400, deadline=None)
@given(st.lists(TOKEN, min_size=1, max_size=7), st.lists(TOKEN, min_size=1, max_size=4))
def test_fuzz_statements(question, answer):
    text, template = statement(" ".join(question), " ".join(answer))
    assert text and re.fullmatch(rf"[1-8][a-f]|{FALLBACK}", template)
    said, kept = text.split(), answer[template == "6a" :]
    place = 0 if template == "2a" else len(said) - len(kept)
    assert said[place : place + len(kept)] == kept


def test_statements_need_words():
    for question, answer in (("", "a"), ("what ?", " "), (None, "a"), ("what ?", ["a"])):
        with pytest.raises(ValueError, match="should be a text with words"):
            statement(question, answer)


def test_vcr_statements_spell_tags():
    item = dict(objects=["person", "dog"], question=["Why", "is", [0], "near", [1], "?"])
    item |= dict(answer_choices=[["x"], ["He", "likes", [1], "."], ["y"], ["z"]], answer_label=1)
    assert vcr_statement(item) == ("person1 is near dog2 because he likes dog2 .", "3a")


# ---- real data
def needs(folder, *names):
    if not all((folder / name).is_file() for name in names):
        pytest.skip(f"{', '.join(names)} not under VLKD_DATA")
    return folder


def test_real_esnlive(data):
    folder = needs(data / "flickr8k", "esnlive_dev_flickr8k.jsonl", "esnlive_test_flickr8k.jsonl")
    dev, test = (load_esnlive(folder, split) for split in ("dev", "test"))
    assert (len(dev), len(test)) == (3217, 4155)
    assert not {item["image"] for item in dev} & {item["image"] for item in test}
    assert all(item["explanation"].strip() for item in dev)
    for item in (*dev, *test):
        shifted = shifted_snli_ve(item["hypothesis"])
        assert not re.search(r"(?<![\w-])(wo)?m[ae]n(?![\w-])", shifted, re.I)
        assert len(shifted.split()) == len(item["hypothesis"].split())
    few = low_shot_images(dev, 40, 1, groups=[item["label"] for item in dev])
    assert len({item["image"] for item in few}) == 120 and len(few) == 600


def test_real_esnlive_tables_hold_the_pairs_of_the_photos(data):
    needs(data / "esnlive", "dev.csv.gz")
    needs(data / "flickr8k", "esnlive_dev_flickr8k.jsonl")
    whole = {item["id"]: item for item in load_esnlive(data / "esnlive", "dev")}
    assert len(whole) == 14339
    for item in load_esnlive(data / "flickr8k", "dev"):
        same = ("hypothesis", "label", "explanation")
        assert {key: whole[item["id"]][key] for key in same} == {key: item[key] for key in same}


def test_real_daquar(data, tmp_path):
    folder = needs(data / "daquar", "official_train.csv", "official_test.csv", "answer_space.txt")
    train, test = (load_daquar(folder, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (6795, 5673)
    assert not {item["image_id"] for item in train} & {item["image_id"] for item in test}
    words = set((folder / "answer_space.txt").read_text().split("\n"))
    said = {word for item in (*train, *test) for word in item["multiple_choice_answer"].split(", ")}
    assert said == words - {""}
    with open(folder / "official_train.csv", encoding="utf-8") as f:
        counted = Counter(row["answer"] for row in csv.DictReader(f))
    assert Counter(item["multiple_choice_answer"] for item in train) == counted
    assert {counted[a] for a in answer_set(train, 3)} == {n for _, n in counted.most_common(3)}
    write_vqa(train[:50], tmp_path, "train")
    assert load_vqa(tmp_path, "train") == train[:50]
    for item in test:
        assert not re.match(r"(how many|what colou?r|who) ", shifted_vqa(item["question"]))
