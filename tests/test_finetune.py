"Fine-tuning on every task through one function: one frame of records, clear errors, all data read first."

import numpy as np
import pandas as pd
import pytest

from vlkd.core.records import Run, record
from vlkd.core.settings import scale
from vlkd.data.public import ESNLI_VE
from vlkd.data.scores import category_scores
from vlkd.data.squad import evaluate_squad
from vlkd.data.tasks import CATEGORIES
from vlkd.eval.stats import check_examples, paired_difference
from vlkd.models.bert import language_model, save_model
from vlkd.train import finetune
from vlkd.train.finetune import answers, classifier, finetune_all
from vlkd.train.sources import PublicSource, load_data

EVERY = ["sst2", "qnli", "qqp", "mnli", "piqa", "tracie", "squad1", "squad2", "swag"]


@pytest.fixture(scope="module")
def data():
    return load_data(scale("smoke"), 101)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    "An untrained student."
    lm = language_model(data.s, data.tokenizer, 0)
    return save_model(tmp_path_factory.mktemp("student") / "student", lm, data.tokenizer)


@pytest.fixture(scope="module")
def records(data, folder, tmp_path_factory):
    return finetune_all(folder, data, tmp_path_factory.mktemp("every"), seed=3, run="text", tasks=EVERY)


def of_task(records, task):
    return records[records.task == task].reset_index(drop=True)


def test_one_frame(records, tmp_path):
    check_examples(records)
    expected = [*EVERY[:4], "diagnostics", *EVERY[4:]]
    assert list(records.task.unique()) == expected
    assert (records.task.value_counts() == 100).all()
    assert records.right.dtype == bool and records.label.dtype.kind == records.prediction.dtype.kind == "i"
    record(tmp_path, {}, examples=records)
    read = Run(tmp_path).examples
    check_examples(read)
    pd.testing.assert_frame_equal(read, records, check_dtype=False)
    assert read.task.nunique() == 10
    assert paired_difference(read, read.assign(run="again"))["diff"] == 0
    spans = records.task.isin(["squad1", "squad2"])
    assert records[spans].sure.isna().all() and records[~spans].said.isna().all()
    assert records.sure[~spans].between(0, 1).all()


@pytest.mark.parametrize("task", ["squad1", "squad2"])
def test_span_records(data, records, task):
    rows, questions = of_task(records, task), data.task(task, "test")
    no_answer = rows.no_answer.tolist() if task == "squad2" else None
    scores = evaluate_squad(questions, rows.span.tolist(), no_answer, 0.5)
    assert rows.id.tolist() == questions.id.tolist()
    assert rows.answer.tolist() == [texts[0] if len(texts) else "" for texts in questions.answers]
    assert scores["exact"] == pytest.approx(100 * rows.right.mean())
    assert scores["f1"] == pytest.approx(100 * rows.f1.mean())
    assert scores.get("best_exact", scores["exact"]) == pytest.approx(100 * rows.best_exact.mean())
    if task == "squad2":
        assert (rows.said[rows.no_answer > 0.5] == "").all()


def test_diagnostics_are_answered_by_mnli_alone(data, folder, records, monkeypatch, tmp_path):
    rows, questions = of_task(records, "diagnostics"), data.task("diagnostics", "test")
    assert rows.category.tolist() == questions.category.tolist() and set(rows.category) == set(CATEGORIES)
    assert category_scores(rows, rows.prediction).accuracy["all"] == 100 * rows.right.mean()
    assert records.category[records.task != "diagnostics"].isna().all()
    trained, fit = [], finetune.fit

    def noted_fit(*args, **settings):
        trained.append(settings["name"])
        return fit(*args, **settings)

    monkeypatch.setattr(finetune, "fit", noted_fit)
    only = finetune_all(folder, data, tmp_path, seed=3, run="text", tasks=["diagnostics"])
    assert trained == ["text mnli"]
    pd.testing.assert_frame_equal(only, rows[only.columns], check_dtype=False)  # without mnli's own rows


def test_without_names_the_tasks_of_the_data_are_run(data, folder, tmp_path):
    assert set(finetune_all(folder, data, tmp_path, seed=3, run="text").task) == set(data.tasks)


def test_two_classes_of_three(data, folder):
    objective, questions = classifier(folder, "mnli", 0), data.task("diagnostics", "test")
    two = questions.assign(label=(questions.label != 0).astype(int))
    a, b = (
        answers(objective, data.tokenizer, task, test, data.s)
        for task, test in (("diagnostics", questions), ("axb", two))
    )
    entailed = questions.label == 0
    assert (b.prediction == (a.prediction != 0)).all() and set(b.label) == {0, 1}
    assert np.allclose(b.sure[entailed], a.sure[entailed])


@pytest.mark.parametrize(
    "tasks, error, message",
    [
        (["sst2", "swga"], ValueError, "unknown task 'swga'; did you mean 'swag'"),
        (["squad"], ValueError, "did you mean 'squad[12]'"),
        ([], ValueError, "no tasks"),
        (["sst2", "axb"], FileNotFoundError, "Tabletop has no questions of 'axb'"),
        (["sst2", "swag"], FileNotFoundError, "no train.csv"),
    ],
)
def test_mistakes(data, folder, monkeypatch, tmp_path, tasks, error, message):
    "Nothing is trained before all data are there."

    class Lacking(type(data)):
        def task(self, task, split="test"):
            if (task, split) == ("swag", "train"):
                raise FileNotFoundError("no train.csv")
            return super().task(task, split)

    def no_fit(*args, **settings):
        pytest.fail("trained before all data were there")

    monkeypatch.setattr(finetune, "fit", no_fit)
    with pytest.raises(error, match=message):
        finetune_all(folder, Lacking(data.s, 101), tmp_path, tasks=tasks)


def test_what_tabletop_gives(data):
    for task in [*EVERY, "diagnostics"]:
        pd.testing.assert_frame_equal(data.task(task, "dev"), data.world.task(task, "dev", 60))
        assert len(data.task(task, "train")) == 200
    micro = load_data(scale("micro"), 101)
    sizes = dict(swag=12000, piqa=4000, squad1=12000)
    assert {task: len(micro.task(task, "train")) for task in sizes} == sizes
    assert len(micro.task("squad2", "test")) == 1600
    with pytest.raises(ValueError, match="train, dev or test"):
        data.task("swag", "deb")


@pytest.fixture
def public():
    from vlkd.core.settings import data_dir

    if data_dir(need=False) is None:
        pytest.skip("VLKD_DATA is not set")
    return PublicSource(scale("real"), 1)


def test_what_real_folders_give(public):
    sizes = {ESNLI_VE: 14186, "qnli": 5463, "sst2": 872, "axb": 1104}
    assert {task: len(public.task(task, "test")) for task in sizes} == sizes
    assert len(public.task("qnli", "train")) == 20_000
    with pytest.raises(ValueError, match="unknown task 'mnil'; did you mean"):
        public.task("mnil", "test")
    assert public.tasks == (ESNLI_VE, "qnli", "sst2")


@pytest.mark.parametrize(
    "task, split, message",
    [
        ("squad2", "train", "train-v2.0.json"),
        ("mnli", "train", "no train data for 'mnli'.*glue_mnli is not a folder"),
        ("qqp", "test", "no dev data for 'qqp'.*glue_qqp is not a folder"),
    ],
)
def test_missing_files_are_named(public, task, split, message):
    with pytest.raises(FileNotFoundError, match=message):
        public.task(task, split)
