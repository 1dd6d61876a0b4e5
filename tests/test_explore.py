"The explorer: its page runs without widgets, its box and lists work, and wrong input is answered in words."

import json
import re
import sys
import types
from pathlib import Path

import pandas as pd
import pytest

from vlkd.core.files import CHECKSUMS, read_json, write_json
from vlkd.tools import explore as ex

NB = Path(__file__).resolve().parent.parent / "nbs" / "explorer.ipynb"


@pytest.fixture(scope="module")
def x():
    return ex.small_explorer(12)


@pytest.fixture
def copies(x, tmp_path):
    "Copies of the small runs, to be broken, and the JSON that names them."
    import shutil

    for k, r in x.runs.items():
        shutil.copytree(r.folder, tmp_path / f"{k}@{x.seed}")
    return tmp_path, lambda: json.dumps({p.name: str(p) for p in sorted(tmp_path.glob("*@*"))})


def test_page_exports_nothing_and_calls_what_there_is():
    code = [
        "".join(c["source"])
        for c in json.loads(NB.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "code"
    ]
    assert not any(re.search(r"^#\| *(export|default_exp)", c, re.M) for c in code)
    called = {n for c in code for n in re.findall(r"(?<![.\w])([a-z_]+)\(", c)} - {"list", "dict"}
    assert called >= {"open_explorer", "sentence_pages", "show", "panel"} and called <= set(ex.__all__)


def test_all_pages_of_a_sentence(x):
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    noun = x.world.splits["test"][0]
    pages = ex.sentence_pages(x, f"let us drop the {noun}", k=3)
    assert plt.get_fignums() == []  # nothing stays open to be shown twice
    for k in (
        "The nearest clips",
        "What they attend to",
        "What they predict",
        "The nearest nouns",
        "What they know of it",
    ):
        assert isinstance(pages[k], Figure)
    for v in pages.values():
        assert isinstance(v, (Figure, pd.DataFrame, str)) and (
            not isinstance(v, Figure) or len(ex.figure_png(v)) > 1000
        )


def test_a_train_noun_has_no_questions(x):
    noun = x.world.splits["train"][0]
    assert (
        ex.sentence_pages(x, f"drop the {noun}")["Test questions about it"]
        == f"No test question is about the {noun}, which is a train noun."
    )


@pytest.mark.parametrize("s", ["", "  ", "...", "\n\t"])
@pytest.mark.parametrize(
    "f",
    [
        ex.sentence_pages,
        ex.find_clips,
        ex.attention_figure,
        ex.word_counts,
        ex.unknown_words_note,
        ex.predict_masked,
    ],
)
def test_empty_sentence(x, f, s):
    with pytest.raises(ValueError, match="the sentence is empty"):
        f(x, s)


def test_no_text():
    with pytest.raises(ValueError, match="a sentence is text, got NoneType"):
        ex.clean_sentence(None)


def test_unread_words_are_named(x):
    assert ex.unknown_words_note(x, ex.example_sentence(x)) == ""
    t = ex.unknown_words_note(x, "the zyzzyva ate 17 {noun} \\ öre")
    assert all(f"“{w}”" in t for w in ("zyzzyva", "17", "öre")) and "No model has ever read" in t
    assert "has 93 tokens" in ex.unknown_words_note(
        x, "drop " * 91
    ) and f"first {x.s.max_tokens} " in ex.unknown_words_note(x, "drop " * 91)


@pytest.mark.parametrize(
    "s",
    [
        "the zyzzyva",
        "{noun} {0} }{",
        "drop " * 300,
        "[MASK] [MASK]",
        "%s ' \" \\b(",
        "水 и ñ 🎈",
        "kettle",
        "a",
    ],
)
def test_odd_sentences_are_shown(x, s):
    pages = ex.sentence_pages(x, s)
    assert "The nearest clips" in pages and "What they attend to" in pages


def test_unknown_names(x):
    for f in (
        lambda: x.model("student-tex"),
        lambda: ex.find_clips(x, "drop it", ["student-tex"]),
        lambda: ex.sentence_pages(x, "drop it", "student-tex"),
        lambda: ex.recorded_answers(x, "student-tex", "student-text"),
    ):
        with pytest.raises(
            ValueError, match=r"unknown run .*'student-tex'; did you mean 'student-text'.*teacher-micro"
        ):
            f()
    with pytest.raises(ValueError, match="unknown noun 'ketle'; did you mean 'kettle'"):
        ex.noun_attributes(x, "ketle")
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
    folder, inputs = copies
    f = folder / f"student-text@{x.seed}" / "student" / "tokenizer.json"
    t = read_json(f)
    v = t["model"]["vocab"]
    a, b = list(v)[-2:]
    v[a], v[b] = v[b], v[a]
    write_json(f, t)
    (f.parent / CHECKSUMS).unlink()
    with pytest.raises(ValueError, match="student-text reads with another tokeniser"):
        ex.Explorer("smoke", x.seed, inputs(), s=x.s).model("student-text")


def test_answers_of_other_questions_are_refused(x, copies):
    from vlkd.core.records import record

    folder, inputs = copies
    run = x.runs["student-text"]
    e = run.examples
    e["label"] = 1 - e["label"].clip(upper=1)
    record(folder / f"student-text@{x.seed}", metrics={}, examples=e)
    with pytest.raises(ValueError, match=r"the label is . in the data"):
        ex.recorded_answers(
            ex.Explorer("smoke", x.seed, inputs(), s=x.s), "student-text", "student-nst-crd-micro"
        )


def test_broken_model_is_named(x, copies):
    folder, inputs = copies
    (folder / f"student-text@{x.seed}" / "student" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"student holds no model: config.json is missing"):
        ex.Explorer("smoke", x.seed, inputs(), s=x.s).model("student-text")


def test_counterfactual_models_are_apart(x, copies):
    folder, inputs = copies
    for p in folder.glob("*@*/run.json"):
        r = read_json(p)
        write_json(p, r | dict(params=dict(r["params"], counterfactual=True)))
    with pytest.raises(FileNotFoundError, match="no finished teacher"):
        ex.Explorer("smoke", x.seed, inputs(), s=x.s)
    y = ex.Explorer("smoke", x.seed, inputs(), s=x.s, counterfactual=True)
    assert y.world.counterfactual and not x.world.counterfactual


def test_a_teacher_alone_is_enough(x, copies):
    import shutil

    folder, inputs = copies
    for p in folder.glob("student-*"):
        shutil.rmtree(p)
    y = ex.Explorer("smoke", x.seed, inputs(), s=x.s)
    assert y.default_models == ["teacher-micro"] and "The nearest clips" in ex.sentence_pages(y, "drop it")


def test_probes_never_see_the_noun_they_are_asked_for(x):
    "A train noun whose states are unlike all others would be known if it were among those fitted on."
    noun = x.world.splits["train"][0]
    name = "student-text"
    ex.noun_attributes(x, noun, [name])
    key = ("states", name, "let us drop the {noun}")
    keep = x._cache[key]
    try:
        h = keep.copy()
        h.loc[noun] = h.drop(noun).mean()
        h["own"] = (h.index == noun) * 50.0
        x._cache[key] = h
        for k in [k for k in x._cache if k[0] == "probe"]:
            del x._cache[k]
        x.world.nouns.loc[noun]
        p = ex.noun_attributes(x, noun, [name]).query("attribute == 'drop'")
        assert p.probability.max() < 0.6
    finally:
        x._cache[key] = keep
        for k in [k for k in x._cache if k[0] == "probe"]:
            del x._cache[k]


def test_two_of_a_noun_in_one_sentence(x):
    a, b = x.world.splits["train"][:2]
    s = f"put the {a} on the {b}"
    assert ex.noun_in(x, s) == a
    near = ex.nearest_nouns(x, a, ["student-text"], ex.template_of(s, a), k=200)
    assert b not in set(near.noun) and a not in set(near.noun)


class Widget:
    def __init__(self, *children, **kw):
        self.children, self.kw, self.value = children, kw, kw.get("value")


def test_panel_without_widgets(x, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert ex.panel(x) is None and "edit the sentence of the next cell" in capsys.readouterr().out


def test_panel_with_widgets(x, monkeypatch, capsys):
    w = types.ModuleType("ipywidgets")
    made = {}
    for n in ("Text", "Dropdown", "Layout", "HBox", "VBox"):
        setattr(w, n, type(n, (Widget,), {}))

    def interactive_output(f, controls):
        made.update(f=f, controls=controls)
        return Widget()

    w.interactive_output = interactive_output
    monkeypatch.setitem(sys.modules, "ipywidgets", w)
    seen = []
    monkeypatch.setattr(ex, "show", seen.append)
    box = ex.panel(x)
    c = made["controls"]
    assert (
        list(c) == ["sentence", "a", "b"]
        and box is not None
        and c["sentence"].value == ex.example_sentence(x)
    )
    assert c["a"].kw["options"] == x.students and [c["a"].value, c["b"].value] == x.default_models[1:]
    made["f"](**{k: v.value for k, v in c.items()})
    assert "The nearest clips" in seen[0]
    made["f"]("drop it", "student-text", "student-text")
    assert len(seen) == 2
    made["f"](" ", *x.default_models[1:])
    assert len(seen) == 2 and "the sentence is empty" in capsys.readouterr().out


def test_real_runs(data, monkeypatch):
    "Photos stand in the place of film strips, and what needs a world says so."
    from vlkd.core.settings import path

    if not (path("runs") / "real").is_dir():
        pytest.skip("no finished runs of scale real")
    y = ex.open_explorer("real")
    s = "a man in a hat sits on a bench"
    found = ex.find_clips(y, s, k=2)
    assert {ex.clip_frames(y, c).shape[1:] for c in found["clip"]} == {(96, 96, 3)} and not set(
        found["clip"]
    ) & set(y.data.pairs.clip[y.data.pairs.train])
    with pytest.raises(ValueError, match="only Tabletop knows"):
        ex.noun_attributes(y, "hat")
    assert isinstance(ex.sentence_pages(y, s)["What they know of it"], str)
    monkeypatch.setattr(y.data, "root", Path("nowhere"))
    assert ex.clip_frames(y, int(found["clip"].iloc[0])) is None and ex.clips_figure(y, found) is not None
