"The explorer: its page runs without widgets, its box and lists work, and wrong input is answered in words."

import json
import re
import shutil
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from vlkd.core.files import CHECKSUMS, read_json, write_json
from vlkd.core.records import record
from vlkd.core.settings import path
from vlkd.tools import explore as ex

NB = Path(__file__).resolve().parent.parent / "nbs" / "explorer.ipynb"


@pytest.fixture(scope="module")
def x():
    return ex.small_explorer()


@pytest.fixture
def copies(x, tmp_path):
    "Copies of the small runs, to be broken, and what opens them."
    for name in x.default_models:
        shutil.copytree(x.models[name].run.folder, tmp_path / f"{name}@{x.seed}")

    def opened():
        return ex.Explorer("smoke", x.seed, json.dumps({p.name: str(p) for p in tmp_path.glob("*@*")}))

    return tmp_path, opened


def test_page_exports_nothing_and_calls_what_there_is():
    cells = json.loads(NB.read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    assert not any(re.search(r"^#\| *(export|default_exp)", c, re.M) for c in code)
    called = {n for c in code for n in re.findall(r"(?<![.\w])(\w+)\(", c)} - {"list", "dict"}
    assert called >= {"open_explorer", "sentence_pages", "show", "panel"} and called <= set(ex.__all__)


def test_all_pages_of_a_sentence(x):
    noun = x.world.splits["test"][0]
    pages = ex.sentence_pages(x, f"let us drop the {noun}")
    assert plt.get_fignums() == []  # nothing stays open to be shown twice
    assert all(isinstance(pages[title], plt.Figure) for title in list(ex.VIEWS)[1:6])
    for page in pages.values():
        assert isinstance(page, (plt.Figure, pd.DataFrame, str))
        assert not isinstance(page, plt.Figure) or len(ex.figure_png(page)) > 1000


def test_a_train_noun_has_no_questions(x):
    noun = x.world.splits["train"][0]
    page = ex.sentence_pages(x, f"drop the {noun}")["Test questions about it"]
    assert page == f"No test question is about the {noun}, which is a train noun."


@pytest.mark.parametrize("sentence", ["", "  ", "...", "\n\t"])
def test_empty_sentence(x, sentence):
    with pytest.raises(ValueError, match="the sentence is empty"):
        ex.Question(x, sentence)


def test_no_text():
    with pytest.raises(ValueError, match="a sentence is text, got NoneType"):
        ex.clean_sentence(None)


def test_unread_words_are_named(x):
    assert ex.unknown_words(ex.Question(x, ex.example_sentence(x))) == ""
    note = ex.unknown_words(ex.Question(x, "the zyzzyva ate 17 {noun} \\ öre"))
    assert all(f"“{w}”" in note for w in ("zyzzyva", "17", "öre")) and "No model has ever read" in note
    note = ex.unknown_words(ex.Question(x, "drop " * 91))
    assert "has 93 tokens" in note and f"first {x.s.max_tokens} " in note


ODD = (
    "the zyzzyva",
    "{noun} {0} }{",
    "drop " * 300,
    "[MASK] [MASK]",
    "%s ' \" \\b(",
    "水 и ñ 🎈",
    "kettle",
    "a",
)


@pytest.mark.parametrize("sentence", [*ODD, "drop " * 300 + "[MASK]"])
def test_odd_sentences_are_shown(x, sentence):
    assert list(ex.VIEWS)[1:4] == [t for t in ex.sentence_pages(x, sentence) if t in list(ex.VIEWS)[1:4]]


def test_unknown_names(x):
    for f in (
        lambda: x.model("student-tex"),
        lambda: ex.Question(x, "drop it", ["student-tex"]),
        lambda: ex.sentence_pages(x, "drop it", "student-tex"),
        lambda: ex.recorded_answers(x, "student-tex", "student-text"),
    ):
        with pytest.raises(
            ValueError, match=r"unknown run .*'student-tex'; did you mean 'student-text'.*teacher"
        ):
            f()
    with pytest.raises(ValueError, match="unknown scale 'mcro'; did you mean 'micro'"):
        ex.open_explorer("mcro")


def test_seed_in_the_name_is_understood(x):
    assert x.model(f"student-text@{x.seed}") is x.model("student-text")


def test_no_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("VLKD_RUNS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="vlkd reproduce m5 --scale micro"):
        ex.Explorer("micro", 1)
    with pytest.raises(FileNotFoundError, match="seed 7"):
        ex.open_explorer(seed=7)


def test_runs_of_other_data_are_refused(x, copies):
    folder, opened = copies
    f = folder / f"student-text@{x.seed}" / "student" / "tokenizer.json"
    tokenizer = read_json(f)
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    write_json(f, tokenizer)
    (f.parent / CHECKSUMS).unlink()
    with pytest.raises(ValueError, match="student-text reads with another tokeniser"):
        opened().model("student-text")


def test_answers_of_other_questions_are_refused(x, copies):
    folder, opened = copies
    examples = x.models["student-text"].run.examples
    examples["label"] = 1 - examples["label"].clip(upper=1)
    (folder / f"student-text@{x.seed}" / "run.json").unlink()
    record(folder / f"student-text@{x.seed}", metrics={}, examples=examples)
    with pytest.raises(ValueError, match=r"the label is . in the data"):
        ex.recorded_answers(opened(), "student-text", "student-nst-crd")


def test_broken_model_is_named(x, copies):
    folder, opened = copies
    (folder / f"student-text@{x.seed}" / "student" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"student holds no model: config.json is missing"):
        opened().model("student-text")


def test_counterfactual_models_are_apart(copies):
    folder, opened = copies
    for p in folder.glob("*@*/run.json"):
        receipt = read_json(p)
        write_json(p, receipt | dict(params=dict(receipt["params"], counterfactual=True)))
    with pytest.raises(FileNotFoundError, match="no finished teacher"):
        opened()


def test_a_teacher_alone_is_enough(copies):
    folder, opened = copies
    for p in folder.glob("student-*"):
        shutil.rmtree(p)
    alone = opened()
    assert alone.default_models == ["teacher"]
    assert "The nearest clips" in ex.sentence_pages(alone, "drop it")


def test_probes_never_see_the_noun_they_are_asked_for(x, monkeypatch):
    "A train noun whose states are unlike all others would be known if it were among those fitted on."
    question = ex.Question(x, f"drop the {x.world.splits['train'][0]}", ["student-text"])
    ex.noun_attributes(question)
    key = ("_noun_states", "student-text", "let us drop the {noun}")
    states = x.kept[key].copy()
    states.loc[question.noun] = states.drop(question.noun).mean()
    states["own"] = (states.index == question.noun) * 50.0
    monkeypatch.setattr(x, "kept", {k: v for k, v in x.kept.items() if k[0] != "_noun_probe"} | {key: states})
    assert ex.noun_attributes(question).query("attribute == 'drop'").probability.max() < 0.6


def test_two_of_a_noun_in_one_sentence(x):
    a, b = x.world.splits["train"][:2]
    question = ex.Question(x, f"put the {a} on the {b}", ["student-text"])
    assert question.noun == a
    near = ex.nearest_nouns(question, k=200)
    assert b not in set(near.noun) and a not in set(near.noun)


def test_panel_without_widgets(x, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert ex.panel(x) is None and "edit the sentence of the next cell" in capsys.readouterr().out


def test_panel_with_widgets(x):
    pytest.importorskip("ipywidgets")
    panel = ex.Panel(x)
    assert panel.box.value == ex.example_sentence(x) and panel.note.value == ""
    assert list(panel.first.options) == x.students
    assert [panel.first.value, panel.second.value] == x.default_models[1:]
    assert [len(tab.children) for tab in panel.tabs.children] == [1] + [0] * (len(panel.titles) - 1)
    clips = panel.tabs.children[0].children[0]
    panel.tabs.selected_index = 2
    assert len(panel.tabs.children[2].children) == 1 and panel.sign.value == ""
    panel.tabs.selected_index = 0
    assert panel.tabs.children[0].children[0] is clips  # drawn once
    panel.box.value = " "
    assert "the sentence is empty" in panel.note.value and not panel.tabs.children[0].children
    panel.box.value = "the zyzzyva"
    assert "No model has ever read" in panel.note.value and panel.tabs.children[0].children


def test_each_thing_of_a_sentence_can_be_looked_at(x):
    pytest.importorskip("ipywidgets")
    a, b = x.world.splits["train"][:2]
    panel = ex.Panel(x, f"put the {a} on the {b}")
    assert list(panel.thing.options) == [a, b] and panel.question.noun == a
    panel.thing.value = b
    assert panel.question.noun == b and panel.thing.value == b
    with pytest.raises(ValueError, match="names no kite"):
        ex.Question(x, f"put the {a} on the {b}", noun="kite")


@pytest.mark.parametrize(
    "form", ["so you drop the {} " + "very " * 300, "very " * 300 + "the {}", "the {} " * 80]
)
def test_a_sentence_that_is_too_long_is_cut(x, form):
    pages = ex.sentence_pages(x, form.replace("{}", x.world.splits["test"][0]))
    assert "is not read" in pages["Note"] and "The nearest clips" in pages


@pytest.mark.filterwarnings("error:Glyph")
def test_characters_outside_the_font_are_boxes(x):
    for page in ex.sentence_pages(x, "水 и ñ 🎈").values():
        if isinstance(page, plt.Figure):
            ex.figure_png(page)


def test_real_runs(data, monkeypatch):
    "Photos stand in the place of film strips, and what needs a world says so."
    if not (path("runs") / "real").is_dir():
        pytest.skip("no finished runs of scale real")
    real = ex.open_explorer("real")
    sentence = "a man in a hat sits on a bench"
    question = ex.Question(real, sentence)
    clips = set(ex.find_clips(question, k=2)["clip"])
    assert {ex.clip_frames(real, clip).shape[1:] for clip in clips} == {(96, 96, 3)}
    assert not clips & set(real.data.pairs.clip[real.data.pairs.train])
    assert isinstance(ex.sentence_pages(real, sentence)["What they know of it"], str)
    monkeypatch.setattr(real.data, "root", Path("nowhere"))
    assert ex.clip_frames(real, clips.pop()) is None and ex.clips_figure(question) is not None
