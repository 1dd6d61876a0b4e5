"Fine-tuning on every task through one function: one frame of records, clear errors, and nothing trained before all data are there."

import numpy as np
import pandas as pd
import pytest

from vlkd.core.records import Run, record
from vlkd.core.settings import scale
from vlkd.data.scores import category_scores
from vlkd.data.squad import evaluate_squad
from vlkd.data.tasks import CATEGORIES
from vlkd.eval.stats import accuracy_table, check_examples, paired_difference
from vlkd.models.bert import language_model, save_model
from vlkd.train import finetune as language
from vlkd.train.finetune import answers, classifier, finetune_all
from vlkd.train.sources import PublicSource, load_data
from vlkd.train.squad import squad_summary

EVERY = ["sst2", "qnli", "qqp", "mnli", "piqa", "tracie", "squad1", "squad2", "swag"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    data = load_data(scale("smoke"), 101)
    d = tmp_path_factory.mktemp("small")
    return data, save_model(d / "m", language_model(data.s, data.tokenizer, 0), data.tokenizer), d


@pytest.fixture(scope="module")
def every(small):
    data, m, d = small
    return finetune_all(m, data, d / "out", seed=3, run="text", tasks=EVERY)


def test_one_frame(small, every, tmp_path):
    data, m, d = small
    check_examples(every)
    counts = every.task.value_counts(sort=False).to_dict()
    assert counts == dict.fromkeys(
        ["sst2", "qnli", "qqp", "mnli", "diagnostics", "piqa", "tracie", "squad1", "squad2", "swag"], 100
    ) and list(counts) == list(every.task.unique())
    assert every.right.dtype == bool and every.label.dtype.kind == every.prediction.dtype.kind == "i"
    record(tmp_path, {}, examples=every)
    back = Run(tmp_path).examples
    check_examples(back)
    pd.testing.assert_frame_equal(back, every, check_dtype=False)
    assert len(accuracy_table(back)) == 10 and paired_difference(back, back.assign(run="again"))["diff"] == 0
    spans = every.task.isin(["squad1", "squad2"])
    assert (
        every[spans].sure.isna().all()
        and every[~spans].said.isna().all()
        and every.sure[~spans].between(0, 1).all()
    )


def test_span_records(small, every):
    data = small[0]
    for t in ("squad1", "squad2"):
        r, q = every[every.task == t].reset_index(drop=True), data.task(t, "test")
        e = squad_summary(q, r)
        assert r.id.tolist() == q.id.tolist() and r.answer.tolist() == [
            a[0] if len(a) else "" for a in q.answers
        ]
        assert np.isclose(
            [e["exact"], e["f1"]], [100 * r.right.mean(), 100 * r.f1.mean()]
        ).all() and np.isclose(e.get("best_exact", e["exact"]), 100 * r.best_exact.mean())
        assert e == evaluate_squad(
            q, r.span.tolist(), None if t == "squad1" else r.no_answer.tolist(), 1.0 if t == "squad1" else 0.5
        )
        assert (r.said[r.no_answer > 0.5] == "").all() or t == "squad1"


def test_diagnostics_are_answered_by_mnli_alone(small, every, monkeypatch):
    data, m, d = small
    x = every[every.task == "diagnostics"].reset_index(drop=True)
    q = data.task("diagnostics", "test")
    assert x.category.tolist() == q.category.tolist() and set(x.category) == set(CATEGORIES)
    assert (
        category_scores(x, x.prediction).accuracy["all"] == 100 * x.right.mean()
        and every.category[every.task != "diagnostics"].isna().all()
    )
    trained = []
    fit = language.fit
    monkeypatch.setattr(language, "fit", lambda o, *a, **k: (trained.append(k["name"]), fit(o, *a, **k))[1])
    only = finetune_all(m, data, d / "only", seed=3, run="text", tasks=["diagnostics"])
    assert trained == ["text mnli"]
    pd.testing.assert_frame_equal(only, x[only.columns], check_dtype=False)  # without mnli's own rows
    assert set(finetune_all(m, data, d / "default", seed=3, run="text").task) == set(
        data.tasks
    )  # nothing more than before where nothing is asked for


def test_two_classes_of_three(small):
    data, m, d = small
    o = classifier(m, "mnli", 0)
    q = data.task("diagnostics", "test")
    two = q.assign(label=(q.label != 0).astype(int))
    a, b = (answers(o, data.tokenizer, t, x, data.s) for t, x in (("diagnostics", q), ("axb", two)))
    assert (
        (b.prediction == (a.prediction != 0)).all()
        and np.allclose(b.sure[q.label == 0], a.sure[q.label == 0])
        and set(b.label) == {0, 1}
    )


def test_mistakes(small, monkeypatch, tmp_path):
    data, m, d = small
    monkeypatch.setattr(language, "fit", lambda *a, **k: pytest.fail("trained before all data were there"))
    for tasks, error, says in (
        (["sst2", "swga"], ValueError, "unknown task 'swga'; did you mean 'swag'"),
        (["squad"], ValueError, "did you mean 'squad[12]'"),
        ([], ValueError, "no tasks"),
        (["sst2", "axb"], FileNotFoundError, "Tabletop has no questions of 'axb'"),
    ):
        with pytest.raises(error, match=says):
            finetune_all(m, data, tmp_path, tasks=tasks)

    class Lacking(type(data)):
        def task(self, name, split):
            if (name, split) == ("swag", "train"):
                raise FileNotFoundError("no train.csv")
            return super().task(name, split)

    with pytest.raises(FileNotFoundError, match="no train.csv"):
        finetune_all(m, Lacking(data.s, 101), tmp_path, tasks=["sst2", "swag"])


def test_what_tabletop_gives(small):
    data = small[0]
    w = data.world
    for t in EVERY + ["diagnostics"]:
        pd.testing.assert_frame_equal(data.task(t, "dev"), w.task(t, "dev", 60))
        assert len(data.task(t, "train")) == 200
    big = load_data(scale("micro"), 101)
    assert [len(big.task(t, "train")) for t in ("swag", "squad1")] == [4000, 8000] and len(
        big.task("squad2", "test")
    ) == 800
    with pytest.raises(ValueError, match="train, dev or test"):
        data.task("swag", "deb")


def test_what_real_folders_give(data):
    d = PublicSource(scale("real"), 1)
    for t, n in dict(mnli=1000, mnli_mm=1000, swag=11, axb=1104).items():
        assert len(d.task(t, "test")) == n
    for t, split, says in (
        ("swag", "train", "train.csv"),
        ("squad2", "train", "train-v2.0.json"),
        ("mnli", "train", "no train data for 'mnli'.*train.tsv"),
        ("qqp", "test", "no dev data for 'qqp'.*glue_qqp is not a folder"),
    ):
        with pytest.raises(FileNotFoundError, match=says):
            d.task(t, split)
    with pytest.raises(ValueError, match="unknown task 'mnil'; did you mean"):
        d.task("mnil", "test")
    assert d.tasks == ("sst2", "qnli", "piqa", "tracie")
