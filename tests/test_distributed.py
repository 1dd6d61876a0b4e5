"One training over several processes has the gradients, the weights and the files of one; what is not finite stops it, and leaves its batch."

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vlkd.core.files import CHECKSUMS, read_json
from vlkd.data.text import ExampleOrder
from vlkd.train import trainer
from vlkd.train.checkpoints import checkpoint_problem
from vlkd.train.trainer import Objective, fit

ROOT = Path(__file__).resolve().parent.parent

# Objectives in double precision, with the gradients of each step. A case is an objective, then options or:
# steps, drop(out), save (every), stop (at the end of that step), again (after it has stopped), eval (every).
DRIVER = """
import json, os, shutil, sys
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


def run(case, stop=0):
    global stop_at
    stop_at = stop
    name, *more = case.split("/")
    options = dict(x.split("=") for x in more)
    given = {x: options.pop(x, 0) for x in ("stop", "again", "drop", "uneven", "eval", "save", "steps", "batch")}
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


for case in cases:
    stop = int(dict(x.split("=") for x in case.split("/")[1:]).get("stop", 0))
    if stop:
        try:
            run(case, stop)
            raise AssertionError("not stopped")
        except Stop:
            pass
    if not stop or "again" in case:
        run(case)
"""

CASES = [
    "mlm",
    "nst",
    "crd",
    "nst+crd",
    "regression",
    "soft_label",
    "voken",
    "nt_xent",
    "hinge",
    "all",
    "info_nce",
    "token_nce",
]
APART = ["mlm", "nst", "regression", "soft_label", "voken"]  # whose loss is a mean


def launch(n, *args, script=DRIVER, env=None, check=True):
    "Run a script in `n` processes of torchrun, which meet at this address whatever the machine is called; one process is started as usual."
    cmd = (
        [sys.executable, "-c", script]
        if n == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--local-addr=127.0.0.1",
            f"--nproc_per_node={n}",
            "--no-python",
            sys.executable,
            "-c",
            script,
        ]
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLKD_") or k in ("VLKD_CACHE",)}
    r = subprocess.run(
        [*cmd, *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        env={**clean, "PYTHONPATH": str(ROOT), "VLKD_DEVICE": "cpu", "OMP_NUM_THREADS": "1", **(env or {})},
    )
    if check:
        assert r.returncode == 0, (r.stdout + r.stderr)[-4000:]
    return r


WHOLE, ONCE, DROP, AGAIN = (
    "nst+crd/steps=6",
    "nst+crd/steps=6/save=2/stop=5",
    "nst+crd/steps=6/drop=.1",
    "nst+crd/steps=6/drop=.1/save=2/stop=5/again=1",
)
BEST, SHARDED = (
    ("info_nce/steps=6/eval=2", "hinge/steps=6/eval=2"),
    (
        "nst+crd/steps=6/save=2/stop=5/again=1/fsdp=true",
        "mlm/accumulate=2/fsdp=true",
        "info_nce/steps=6/eval=2/fsdp=true",
    ),
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    d = tmp_path_factory.mktemp("alone")
    launch(1, d, " ".join([*CASES, WHOLE, *BEST]))
    return d


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    d = tmp_path_factory.mktemp("together")
    r = launch(
        2, d, " ".join([*CASES, *(f"{c}/accumulate=2" for c in APART), ONCE, DROP, AGAIN, *BEST, *SHARDED])
    )
    (d / "said").write_text(r.stdout)
    return d


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory):
    d = tmp_path_factory.mktemp("parts")
    launch(1, d, " ".join(f"{c}/accumulate=4" for c in APART))
    return d


def name(case):  # of its files
    return case.replace("/", ",")


def same(a, b, tol=1e-9, only=""):
    with np.load(a) as x, np.load(b) as y:
        keys = [k for k in x if k.startswith(only)]
        assert (
            keys == [k for k in y if k.startswith(only)]
            and len(keys) > 9
            and (only or sum(k.startswith("g2.") for k in x) > 5)
        )
        for k in keys:
            if k.endswith("_extra_state"):
                assert np.array_equal(x[k], y[k]), k
                continue
            scale = max(abs(x[k]).max(), 1e-3)
            assert np.allclose(x[k], y[k], rtol=0, atol=tol * scale), (k, abs(x[k] - y[k]).max(), scale)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradients_of_one(alone, together, case):
    for rank in (0, 1):
        same(alone / f"{case}.0.npz", together / f"{case}.{rank}.npz")
    a, b = (json.loads((d / f"{case}.0.json").read_text())["history"] for d in (alone, together))
    assert len(a) == 3
    for x, y in zip(a, b):
        assert x.keys() == y.keys() and all(np.isclose(x[k], y[k], rtol=1e-5, atol=1e-7) for k in x), (x, y)


@pytest.mark.parametrize("case", APART)
def test_parts_of_a_batch_have_its_gradient(alone, together, in_parts, case):
    same(alone / f"{case}.0.npz", in_parts / f"{case},accumulate=4.0.npz")
    same(alone / f"{case}.0.npz", together / f"{case},accumulate=2.1.npz")


def test_processes_share_the_draws_in_order(alone, together):
    for case in ("mlm", "hinge"):
        a, *parts = [
            json.loads(f.read_text())["seen"]
            for f in (alone / f"{case}.0.json", together / f"{case}.0.json", together / f"{case}.1.json")
        ]
        assert a == [x + y for x, y in zip(*parts)] and len(a) == 3


def test_validation_chooses_the_same_weights(alone, together):
    for case in BEST:
        a, b = (json.loads((d / f"{name(case)}.0.json").read_text())["history"] for d in (alone, together))
        a, b = ([(h["step"], h["eval_loss"]) for h in x if "eval_loss" in h] for x in (a, b))
        assert len(a) == 3 and np.allclose(a, b, rtol=1e-6)
        same(alone / f"{name(case)}.0.npz", together / f"{name(case)}.1.npz")


@pytest.mark.parametrize("case, as_one", list(zip(SHARDED, (WHOLE, "mlm", BEST[0]))))
def test_sharded_weights_train_alike(alone, together, case, as_one):
    if "again" in case:
        assert f"{case}: resumes from checkpoint-4" in (together / "said").read_text()
    same(alone / f"{name(as_one)}.0.npz", together / f"{name(case)}.1.npz", only="w." * ("again" in case))


def test_one_process_writes_and_another_number_goes_on(alone, together, tmp_path):
    "What rank 1 may not write, it refuses in the script. Two processes stop after step 5; one goes on from step 4, and ends where one alone would have."
    run = together / name(ONCE)
    c = sorted((run / "checkpoints").iterdir())
    assert [p.name for p in c] == ["checkpoint-2", "checkpoint-4"] and not any(
        checkpoint_problem(p) for p in c
    )
    assert {p.name for p in c[1].iterdir()} == {
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
        "loss_sums.safetensors",
        CHECKSUMS,
    }
    shutil.copytree(run, tmp_path / name(WHOLE), dirs_exist_ok=True)
    said = launch(1, tmp_path, WHOLE).stdout
    assert f"{WHOLE}: resumes from checkpoint-4" in said
    same(alone / f"{name(WHOLE)}.0.npz", tmp_path / f"{name(WHOLE)}.0.npz", only="w.")
    assert (
        json.loads((tmp_path / f"{name(WHOLE)}.0.json").read_text())["seen"]
        == json.loads((alone / f"{name(WHOLE)}.0.json").read_text())["seen"][4:]
    )


def test_dropout_goes_on_as_it_was(together):
    assert f"{AGAIN}: resumes from checkpoint-4" in (together / "said").read_text()
    with (
        np.load(together / f"{name(DROP)}.0.npz") as a,
        np.load(together / f"{name(AGAIN)}.0.npz") as b,
        np.load(together / f"{name(AGAIN)}.1.npz") as c,
    ):
        keys = [k for k in a if k.startswith("w.")]
        assert len(keys) > 9 and all(np.array_equal(a[k], b[k]) and np.array_equal(a[k], c[k]) for k in keys)


def test_what_cannot_be_shared_is_refused(tmp_path):
    r = launch(2, tmp_path, "mlm/batch=7", check=False)
    assert (
        r.returncode
        and "mlm/batch=7: a batch of 7 cannot be divided equally among 2 processes with 1 micro-batches each; make it a multiple of 2, such as 6 or 8"
        in r.stderr
    )
    r = launch(1, tmp_path, "mlm/fsdp=true", check=False)
    assert (
        r.returncode
        and "mlm/fsdp=true: fsdp shards a model over several processes: start them with torchrun" in r.stderr
    )
    r = launch(2, tmp_path, "nst+crd/uneven=1", check=False)
    assert r.returncode and "the process of rank 1 starts with other weights than that of rank 0" in r.stderr


class Bad(Objective):
    "A line whose loss, or only its gradient, is no number at the batch that holds example 5."

    def __init__(self, what, coupled=()):
        super().__init__()
        self.w, self.what, self.coupled = nn.Parameter(torch.ones(1)), what, coupled

    def forward(self, x):
        loss = (self.w * x - 3 * x).square().mean()
        if self.what and (x == 5).any():
            loss = loss * float("inf") if self.what == "loss" else loss + torch.sqrt(self.w * 0).sum()
        return dict(loss=loss, line=loss)


def line(out, what, **kw):
    return fit(
        Bad(what, kw.pop("coupled", ())),
        lambda items: dict(x=torch.tensor([[float(i)] for i, _ in items])),
        40,
        out,
        **dict(steps=10, batch=4, lr=1e-3, name="line") | kw,
    )


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_not_finite_stops_and_leaves_its_batch(tmp_path, monkeypatch, what, at_once):
    "`at_once` is what the CPU does; a GPU looks only before something is logged or saved, and makes the batch again."
    monkeypatch.setattr(trainer.FiniteGuard, "at_once", at_once)
    draws = ExampleOrder(40, 40, 0)
    k = next(k for k in range(40) if draws[k][0] == 5)
    step = k // 4 + 1
    with pytest.raises(
        FloatingPointError,
        match=rf"line: the {what} is not a finite number at step {step}; its batch is saved in .*nonfinite\.safetensors",
    ):
        line(tmp_path, what, save_every=1 if at_once else 10, options=dict(accumulate=2))
    said = read_json(tmp_path / "nonfinite.json")
    assert (
        said["what"] == what
        and said["step"] == step
        and said["examples"] == [[list(draws[(step - 1) * 4 + 2 * i + j]) for j in (0, 1)] for i in (0, 1)]
    )
    kept = load_file(tmp_path / "nonfinite.safetensors")
    assert [kept[f"{i}.x"].flatten().tolist() for i in (0, 1)] == [
        [e for e, _ in part] for part in said["examples"]
    ]
    assert all(
        torch.isfinite(load_file(f)["w"]).all() for f in (tmp_path / "checkpoints").rglob("model.safetensors")
    )


def test_what_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.FiniteGuard, "at_once", False)
    with pytest.raises(FloatingPointError):
        line(tmp_path, "loss", save_every=1, steps=200)
    assert all(
        torch.isfinite(load_file(f)["w"]).all() for f in (tmp_path / "checkpoints").rglob("model.safetensors")
    )


def test_options_are_checked(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="accumulate = 2 would change crd, which compare"):
        line(tmp_path, "", coupled=("crd",), options=dict(accumulate=2))
    with pytest.raises(
        ValueError, match="a batch of 4 cannot be divided equally among 1 processes with 3 micro-batches"
    ):
        line(tmp_path, "", options=dict(accumulate=3))
    for k, v in dict(PRECISION="fp8", COMPILE="maybe", ACCUMULATE="0", WORKERS="-1").items():
        monkeypatch.setenv(f"VLKD_{k}", v)
        with pytest.raises(ValueError, match=f"VLKD_{k}"):
            line(tmp_path, "")
        monkeypatch.delenv(f"VLKD_{k}")


def test_workers_make_the_same_batches(tmp_path):
    x = lambda **kw: torch.tensor(
        [
            h["loss"]
            for h in fit(
                Bad(""),
                lambda items: dict(x=torch.tensor([[float(i)] for i, _ in items])),
                40,
                tmp_path,
                steps=10,
                batch=4,
                lr=1e-3,
                **kw,
            )
        ]
    )
    assert torch.equal(x(), x(options=dict(workers=2)))


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_has_the_same_losses(tmp_path):
    "Sentences of several lengths, of a batch and of the teacher; `graphs` makes CUDA graphs on a GPU only."
    from torch._dynamo.utils import counters

    from vlkd.core.settings import scale
    from vlkd.models.bert import language_model
    from vlkd.train.sources import TabletopSource
    from vlkd.train.text_student import StudentObjective, text_collator

    s = scale("smoke", dropout=0.0, batch=8, crd_bank=64, crd_negatives=40)
    d = TabletopSource(s, 101)
    seen = {}

    def losses(**options):
        o = StudentObjective(
            language_model(s, d.tokenizer, 1), language_model(s, d.tokenizer, 2).eval(), "nst+crd", s=s
        )
        counters.clear()
        torch.compiler.reset()
        h = fit(
            o,
            text_collator(d.tokens, d.tokenizer, s, 0),
            len(d.tokens.lengths),
            tmp_path / str(options),
            steps=4,
            batch=8,
            lr=1e-3,
            options=options,
        )
        seen[str(options)] = counters["stats"]["unique_graphs"]
        return [[x[k] for k in ("loss", "mlm", "nst", "crd", "grad_norm")] for x in h]

    want = losses()
    assert len(want) == 4 and seen["{}"] == 0
    for lever in ("compile", "graphs"):
        assert np.allclose(losses(**{lever: True}), want, rtol=1e-4) and seen[str({lever: True})] >= 2, seen
    with pytest.raises(ValueError, match="graphs and compile cannot be had together"):
        losses(graphs=True, compile=True)
