"Model cards at every scale, and trackers that hear a training without changing it."

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from vlkd.core.settings import scale, scales
from vlkd.data.catalog import cards
from vlkd.models.card import model_card, save_card
from vlkd.train.trainer import Objective, fit, trackers


@pytest.mark.parametrize("name", scales())
def test_card_of_every_scale(name, tmp_path):
    accuracy = dict(piqa=50.04, squad1=12.5)
    card = model_card("x@3", "A student.", scale(name), 3, dict(objectives="MLM + nst | crd"), accuracy)
    read = ModelCard.load(save_card(tmp_path, card))
    assert set(read.data.datasets) <= set(cards()) and read.data.datasets
    assert [(r.metric_type, r.metric_value) for r in read.data.eval_results] == [
        ("accuracy", 50.0),
        ("exact_match", 12.5),
    ]
    is_free = all(cards()[id].redistributable for id in read.data.datasets)
    assert (read.data.license == "apache-2.0") == is_free
    assert ("world 3" in read.text) == (scale(name).data_kind == "tabletop")
    rows = [line for line in read.text.splitlines() if line.startswith("| objectives")]
    assert rows == ["| objectives | MLM + nst \\| crd |"], "a bar in a setting ends its cell"


def test_card_without_accuracies_has_no_results(tmp_path):
    card = model_card("teacher@1", "A teacher.", scale("smoke"), 1, {})
    assert "## Results" not in card.text and not card.data.eval_results


class Line(Objective):
    "Fit y = 3x with dropout, so that a tracker which draws numbers would be noticed."

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.line, self.drop = torch.nn.Linear(4, 1), torch.nn.Dropout(0.5)

    def forward(self, x):
        error = (self.line(self.drop(x)) - 3 * x).square().mean()
        return dict(loss=error, error=error)


class Ear(TrainerCallback):
    heard, logging_dir = [], None

    def __init__(self):
        self.is_open = True

    @property
    def _wandb(self):
        return self

    def finish(self):
        self.is_open = False
        self.heard.append("finish")

    def on_log(self, args, state, control, logs, **kw):
        self.heard.append((args.run_name, state.global_step, logs.get("error")))


def train(out, **options):
    torch.manual_seed(1)
    line, x = Line(), torch.linspace(-1, 1, 8)[:, None].repeat(1, 4)
    fit(line, lambda items: dict(x=x[[e for e, _ in items]]), 8, out, steps=20, batch=4, lr=0.1, **options)
    return line.line.weight.detach()


def test_trackers_hear_each_loss_and_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", Ear)
    Ear.heard.clear()
    silent = train(tmp_path / "silent", name="line")
    assert Ear.heard == []
    monkeypatch.setenv("VLKD_REPORT_TO", "wandb")
    for seed in (1, 2):
        heard = train(tmp_path / str(seed), name="line", seed=seed)
    assert Ear.heard.count("finish") == 2, "the next training would go on in the same run"
    names = [entry[0] for entry in Ear.heard if entry != "finish"]
    assert set(names) == {"line@1", "line@2"}
    assert any(entry[2] is not None for entry in Ear.heard if entry != "finish")
    monkeypatch.setenv("VLKD_REPORT_TO", "none")
    assert torch.equal(train(tmp_path / "again", name="line", seed=2), heard)
    assert not torch.equal(silent, heard)


def test_tensorboard_writes_beside_the_training(tmp_path, monkeypatch):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Ear)
    (callback,) = trackers("tensorboard", tmp_path / "logs")
    assert callback.logging_dir == str(tmp_path / "logs")


@pytest.mark.parametrize("name, package", [("tensorboard", "vlkd[logs]"), ("trackio", "trackio")])
def test_missing_package_is_named_before_anything_is_trained(name, package, tmp_path, monkeypatch):
    def absent():
        raise RuntimeError("not here")

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, name, absent)
    with pytest.raises(ModuleNotFoundError, match=rf"report_to = {name}.*pip install '?{package[:4]}"):
        train(tmp_path / "out", options=dict(report_to=name))
    assert not (tmp_path / "out").exists()


def test_known_trackers_are_those_of_the_extra():
    assert trackers("none", "logs") == trackers("", "logs") == []
    with pytest.raises(ValueError, match="unknown tracker 'mlflow'"):
        trackers("mlflow", "logs")
