"Training over several processes: the gradients, weights and files of one; what is not finite stops it."

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import script
from safetensors.torch import load_file
from torch import nn

from vlkd.core.files import CHECKSUMS, read_json
from vlkd.data.text import ExampleOrder
from vlkd.train import trainer
from vlkd.train.trainer import Objective, checkpoint_problem, fit

ROOT = Path(__file__).resolve().parent.parent
ALONE = dict(VLKD_DEVICE="cpu", OMP_NUM_THREADS="1")

# Objectives in double precision, with the gradients of each step. A case is an objective, then options or:
# steps, drop(out), save (every), stop (at the end of that step), again (after it has stopped), eval (every).
DRIVER = """
import json, os, shutil, sys, time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from vlkd.core.device import ranks, seed_everything
from vlkd.core.files import rng
from vlkd.core.settings import scale
from vlkd.data.text import VideoText, tokenize
from vlkd.models.bert import language_model
from vlkd.models.video_text import Teacher
from vlkd.train import text_student, trainer, video_teacher
from vlkd.train.sources import TabletopSource
from vlkd.train.text_student import StudentObjective, text_collator
from vlkd.train.video_teacher import TeacherObjective, video_text_collator

out, cases = Path(sys.argv[1]), sys.argv[2].split()
rank, processes = ranks()
gradients = []


def keep_gradients(self, model):
    named = self.accelerator.unwrap_model(self.model).named_parameters()
    gradients.append(
        {name: trainer.full_tensor(p.grad).numpy().copy() for name, p in named if p.grad is not None}
    )
    return clip(self, model)


def mlm_double(lm, states, ids, where):  # the library's is float32
    logits = lm.cls(states[where])
    return F.cross_entropy(logits, ids[where]) if len(logits) else (states.sum() + logits.sum()) * 0.0


clip, trainer.ObjectiveTrainer._clip_grad_norm = trainer.ObjectiveTrainer._clip_grad_norm, keep_gradients
text_student.mlm_loss = video_teacher.mlm_loss = mlm_double


class Stop(Exception):
    pass


def on_step_end(self, args, state, control, **kw):
    step_end(self, args, state, control, **kw)
    if state.global_step == stop_at:
        raise Stop


step_end, trainer.Progress.on_step_end = trainer.Progress.on_step_end, on_step_end
if rank:  # the others write nothing

    def refuse(*args, **kw):
        raise AssertionError("rank 1 writes")

    trainer.write_checksums = trainer.save_weights = trainer.save_safetensors = trainer.write_json = refuse
    os.replace = shutil.rmtree = torch.save = refuse

base = dict(mask_prob=0.05, batch=8, crd_bank=64, crd_negatives=40)
data = TabletopSource(scale("smoke", dropout=0.0, **base), 101)
tokenizer = data.tokenizer
captions = data.captions[0][:40]
features = rng("films").normal(size=(40, 4, 8))
pairs = VideoText(
    captions, np.arange(40), features, np.ones((40, 4), bool), np.arange(40), np.arange(0)
)


def teacher(name, s):
    contrast = dict(token_nce="info_nce", all="hinge").get(name, name)
    objective = TeacherObjective(
        Teacher(s, tokenizer, 8, 0),
        contrast,
        nce=dict(level="token") if name == "token_nce" else {},
        hinge=dict(negatives="all") if name == "all" else {},
    )
    tokens = tokenize(tokenizer, captions, s.max_tokens)
    collate = video_text_collator(tokens, pairs, np.arange(40), tokenizer, s, 0)
    return objective, collate, 40, dict(lengths=tokens.lengths)


def student(name, s):
    kd = "" if name == "mlm" else name
    objective = StudentObjective(
        language_model(s, tokenizer, 1),
        language_model(s, tokenizer, 2).eval() if kd else None,
        kd,
        s=s,
        pool=torch.randn(9, s.hidden).double(),
    )
    for model in objective.frozen_models():
        model.double()
    return objective, text_collator(data.tokens, tokenizer, s, 0), len(data.tokens), {}


load_best_model = trainer.ObjectiveTrainer._load_best_model


def load_late(self):
    time.sleep(rank)  # the first process must not remove what another one still reads
    load_best_model(self)


trainer.ObjectiveTrainer._load_best_model = load_late


def run(case, stop=0):
    global stop_at
    stop_at = stop
    name, *more = case.split("/")
    options = dict(x.split("=") for x in more)
    settings_of_case = ("stop", "again", "drop", "uneven", "eval", "save", "steps", "batch", "refused")
    given = {name: options.pop(name, 0) for name in settings_of_case}
    settings = dict(
        steps=int(given["steps"] or 3), save_every=int(given["save"]), batch=int(given["batch"] or 8)
    )
    s = scale("smoke", dropout=float(given["drop"]), **base)
    seed_everything(int(given["uneven"]) * rank)
    make = teacher if name in ("info_nce", "token_nce", "hinge", "all") else student
    objective, collate, size, lengths = make(name, s)
    objective.double()
    if given["eval"]:
        settings |= dict(valid=(collate, 16), eval_every=int(given["eval"]))
    gradients.clear()
    seen = []

    def watch(items):
        seen.append([example for example, _ in items])
        return collate(items)

    file = case.replace("/", ",")
    settings |= lengths
    history = trainer.fit(
        objective, watch, size, out / file, lr=1e-2, name=case, options=options, **settings
    )
    state = {f"w.{key}": x.numpy() for key, x in objective.state_dict().items()}
    for step, found in enumerate(gradients):
        state |= {f"g{step}.{key}": x for key, x in found.items()}
    np.savez(out / f"{file}.{rank}.npz", **state)
    (out / f"{file}.{rank}.json").write_text(json.dumps(dict(history=history, seen=seen[1:])))


def try_to_run(case):
    try:
        run(case)
    except (ValueError, RuntimeError) as error:  # also that of a process whose other one is gone
        (out / f"{case.replace('/', ',')}.{rank}.txt").write_text(str(error))


for case in cases:
    stop = int(dict(x.split("=") for x in case.split("/")[1:]).get("stop", 0))
    if stop:
        try:
            run(case, stop)
            raise AssertionError("not stopped")
        except Stop:
            pass
    if "refused" in case:
        try_to_run(case)
    elif not stop or "again" in case:
        run(case)
"""

MEANS = ["mlm", "soft_label+regression+voken+nst"]  # whose losses are means over tokens or sentences
CASES = [*MEANS, "nst+crd+nt_xent", "hinge", "all", "info_nce", "token_nce"]
COMPLETE = "nst+crd/steps=6"
STOPPED = "nst+crd/steps=6/save=2/stop=5"
DROPOUT = "nst+crd/steps=6/drop=.1"
RESUMED = "nst+crd/steps=6/drop=.1/save=2/stop=5/again=1"
BEST = ("info_nce/steps=6/eval=2", "hinge/steps=6/eval=2")
SHARDED = {  # case -> the same without sharding
    "nst+crd/steps=6/save=2/stop=5/again=1/fsdp=true": COMPLETE,
    "mlm/accumulate=2/fsdp=true": "mlm",
    "info_nce/steps=6/eval=2/fsdp=true": BEST[0],
}


REFUSED = {  # processes, case -> why; the last one leaves its other process alone, and ends them both
    (1, "mlm/fsdp=true/refused=1"): "fsdp shards a model over several processes",
    (2, "mlm/batch=7/refused=1"): "a batch of 7 cannot be divided equally among 2 processes with "
    "1 micro-batches each; make it a multiple of 2, such as 6 or 8",
    (2, "nst+crd/uneven=1/refused=1"): "the process of rank 1 starts with other weights than that of rank 0",
}


def launch(folder, cases):
    "Run the driver in this process's copy, which is alone; what it printed."
    ended = script(DRIVER, folder, " ".join(cases), **ALONE)
    assert ended.returncode == 0, ended.stdout[-4000:]
    return ended.stdout


def launch_two(folder, cases):
    "Run the driver in two processes of torchrun, which meet at this address; what they printed."
    torchrun = "-m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc_per_node=2 --no-python"
    command = [sys.executable, *torchrun.split(), sys.executable, "-c", DRIVER, str(folder), " ".join(cases)]
    environment = os.environ | ALONE | dict(PYTHONPATH=str(ROOT))
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    micro_batches = [f"{case}/accumulate=4" for case in MEANS]
    refused = [case for n, case in REFUSED if n == 1]
    launch(folder, [*CASES, *micro_batches, COMPLETE, *BEST, *refused])
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    accumulated = [f"{case}/accumulate=2" for case in MEANS]
    refused = [case for n, case in REFUSED if n == 2]
    cases = [*CASES, *accumulated, STOPPED, DROPOUT, RESUMED, *BEST, *SHARDED, *refused]
    (folder / "printed").write_text(launch_two(folder, cases))
    return folder


def stem(case):  # of its files
    return case.replace("/", ",")


def weights(folder, case, rank=0):
    "Final weights and the gradients of all steps that a process has kept."
    with np.load(folder / f"{stem(case)}.{rank}.npz") as file:
        return dict(file)


def report(folder, case, rank=0):
    return json.loads((folder / f"{stem(case)}.{rank}.json").read_text())


def assert_same(a, b, only=""):
    names = [name for name in a if name.startswith(only)]
    assert names == [name for name in b if name.startswith(only)] and len(names) > 9
    if not only:
        assert sum(name.startswith("g2.") for name in names) > 5, "the third step has no gradients"
    for name in names:
        if name.endswith("_extra_state"):
            assert np.array_equal(a[name], b[name]), name
        else:
            largest = max(abs(a[name]).max(), 1e-3)
            difference = abs(a[name] - b[name]).max()
            assert difference <= 1e-9 * largest, (name, difference, largest)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradients_of_one(alone, together, case):
    for rank in (0, 1):
        assert_same(weights(alone, case), weights(together, case, rank))
    one, two = (report(folder, case)["history"] for folder in (alone, together))
    assert len(one) == 3
    for entry, other in zip(one, two, strict=True):
        assert entry == pytest.approx(other, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("case", MEANS)
def test_micro_batches_have_the_gradient_of_the_batch(alone, together, case):
    assert_same(weights(alone, case), weights(alone, f"{case}/accumulate=4"))
    assert_same(weights(alone, case), weights(together, f"{case}/accumulate=2", rank=1))


@pytest.mark.parametrize("case", ["mlm", "hinge"])
def test_processes_divide_the_draws_in_order(alone, together, case):
    seen = report(alone, case)["seen"]
    first, second = (report(together, case, rank)["seen"] for rank in (0, 1))
    assert seen == [a + b for a, b in zip(first, second, strict=True)] and len(seen) == 3


@pytest.mark.parametrize("case", BEST)
def test_validation_chooses_the_same_weights(alone, together, case):
    one, two = (
        [
            (entry["step"], entry["eval_loss"])
            for entry in report(folder, case)["history"]
            if "eval_loss" in entry
        ]
        for folder in (alone, together)
    )
    assert len(one) == 3 and np.allclose(one, two, rtol=1e-6)
    assert_same(weights(alone, case), weights(together, case, rank=1))


@pytest.mark.parametrize("case", SHARDED)
def test_sharded_weights_train_alike(alone, together, case):
    only = ""
    if "again" in case:
        assert f"{case}: resumes from checkpoint-4" in (together / "printed").read_text()
        only = "w."
    assert_same(weights(alone, SHARDED[case]), weights(together, case, rank=1), only)


def test_one_process_writes_and_another_number_goes_on(alone, together, tmp_path):
    """What rank 1 may not write, it refuses in the driver. Two processes stop after step 5; one goes on from
    step 4, and ends where one alone would have."""
    run = together / stem(STOPPED)
    folders = sorted((run / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["checkpoint-2", "checkpoint-4"]
    assert not any(checkpoint_problem(folder) for folder in folders)
    assert {file.name for file in folders[1].iterdir()} == {
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
        "loss_sums.safetensors",
        CHECKSUMS,
    }
    shutil.copytree(run, tmp_path / stem(COMPLETE))
    assert f"{COMPLETE}: resumes from checkpoint-4" in launch(tmp_path, [COMPLETE])
    assert_same(weights(alone, COMPLETE), weights(tmp_path, COMPLETE), only="w.")
    assert report(tmp_path, COMPLETE)["seen"] == report(alone, COMPLETE)["seen"][4:]


def test_dropout_goes_on_as_it_was(together):
    assert f"{RESUMED}: resumes from checkpoint-4" in (together / "printed").read_text()
    whole = weights(together, DROPOUT)
    names = [name for name in whole if name.startswith("w.")]
    assert len(names) > 9
    for rank in (0, 1):
        resumed = weights(together, RESUMED, rank)
        assert all(np.array_equal(whole[name], resumed[name]) for name in names)


@pytest.mark.parametrize("processes, case", REFUSED)
def test_what_cannot_be_divided_is_refused(alone, together, processes, case):
    folder = alone if processes == 1 else together
    said = (folder / f"{stem(case)}.{processes - 1}.txt").read_text()
    assert REFUSED[processes, case] in said


class Bad(Objective):
    "A line whose loss, or only its gradient, is no number at the batch that holds example 5."

    def __init__(self, kind, coupled=()):
        super().__init__()
        self.weight, self.kind, self.coupled = nn.Parameter(torch.ones(1)), kind, coupled

    def forward(self, x):
        loss = (self.weight * x - 3 * x).square().mean()
        if (x == 5).any():
            if self.kind == "loss":
                loss = loss * float("inf")
            if self.kind == "gradient":
                loss = loss + torch.sqrt(self.weight * 0).sum()
        return dict(loss=loss, line=loss)


def line_batch(items):
    return dict(x=torch.tensor([[float(example)] for example, _ in items]))


def train_line(out, kind="", coupled=(), **changes):
    settings = dict(steps=10, batch=4, lr=1e-3, name="line")
    return fit(Bad(kind, coupled), line_batch, 40, out, **settings | changes)


def finite_checkpoints(folder):
    files = (folder / "checkpoints").rglob("model.safetensors")
    return all(torch.isfinite(load_file(file)["weight"]).all() for file in files)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_not_finite_stops_and_leaves_its_batch(tmp_path, monkeypatch, kind, at_once):
    "The CPU looks `at_once`; a GPU only before something is logged or saved, and makes the batch again."
    monkeypatch.setattr(trainer.FiniteGuard, "at_once", at_once)
    draws = ExampleOrder(40, 40, 0)
    step = next(k for k in range(40) if draws[k][0] == 5) // 4 + 1
    message = rf"line: the {kind} is not a finite number at step {step}; .*nonfinite\.safetensors"
    with pytest.raises(FloatingPointError, match=message):
        train_line(tmp_path, kind, save_every=1 if at_once else 10, options=dict(accumulate=2))
    left = read_json(tmp_path / "nonfinite.json")
    first = 4 * (step - 1)
    examples = [[list(draws[k]) for k in (first + i, first + i + 1)] for i in (0, 2)]
    assert (left["what"], left["step"], left["examples"]) == (kind, step, examples)
    batch = load_file(tmp_path / "nonfinite.safetensors")
    for k, items in enumerate(examples):
        assert batch[f"{k}.x"].flatten().tolist() == [example for example, _ in items]
    assert finite_checkpoints(tmp_path)


def test_what_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.FiniteGuard, "at_once", False)
    with pytest.raises(FloatingPointError):
        train_line(tmp_path, "loss", save_every=1, steps=200)
    assert finite_checkpoints(tmp_path)


def test_options_are_checked(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="accumulate = 2 would change crd, which compare"):
        train_line(tmp_path, coupled=("crd",), options=dict(accumulate=2))
    with pytest.raises(ValueError, match="divided equally among 1 processes with 3 micro-batches"):
        train_line(tmp_path, options=dict(accumulate=3))
    with pytest.raises(ValueError, match="a batch of 0 cannot be divided"):
        train_line(tmp_path, batch=0)
    for name, value in dict(PRECISION="fp8", COMPILE="maybe", ACCUMULATE="0", WORKERS="-1").items():
        monkeypatch.setenv(f"VLKD_{name}", value)
        with pytest.raises(ValueError, match=f"VLKD_{name}"):
            train_line(tmp_path)
        monkeypatch.delenv(f"VLKD_{name}")


def test_workers_make_the_same_batches(tmp_path):
    alone, workers = (
        [entry["loss"] for entry in train_line(tmp_path, options=dict(workers=n))] for n in (0, 2)
    )
    assert alone == workers


@pytest.fixture
def compiled_losses(tmp_path):
    "A function that trains with options, and gives the losses and the number of compiled graphs."
    from torch._dynamo.utils import counters

    from vlkd.core.settings import scale
    from vlkd.models.bert import language_model
    from vlkd.train.sources import TabletopSource
    from vlkd.train.text_student import StudentObjective, text_collator

    s = scale("smoke", dropout=0.0, batch=8, crd_bank=64, crd_negatives=40)
    data = TabletopSource(s, 101)

    def train(**options):
        lm, teacher = (language_model(s, data.tokenizer, seed) for seed in (1, 2))
        torch.manual_seed(0)  # heads
        objective = StudentObjective(lm, teacher.eval(), "nst+crd", s=s)
        collate = text_collator(data.tokens, data.tokenizer, s, 0)
        counters.clear()
        torch.compiler.reset()
        settings = dict(steps=4, batch=8, lr=1e-3, options=options)
        history = fit(objective, collate, len(data.tokens), tmp_path / str(options), **settings)
        names = ("loss", "mlm", "nst", "crd", "grad_norm")
        return [[entry[name] for name in names] for entry in history], counters["stats"]["unique_graphs"]

    return train


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_has_the_same_losses(compiled_losses):
    "Sentences of several lengths, of a batch and of the teacher; `graphs` makes CUDA graphs on a GPU only."
    losses, graphs = compiled_losses()
    assert len(losses) == 4 and graphs == 0
    for option in ("compile", "graphs"):
        compiled, graphs = compiled_losses(**{option: True})
        assert np.allclose(compiled, losses, rtol=1e-4) and graphs >= 2
    with pytest.raises(ValueError, match="graphs and compile cannot be had together"):
        compiled_losses(graphs=True, compile=True)
