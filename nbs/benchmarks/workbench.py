"A student's training step, ready to be measured, and the contexts that change how it runs."

import contextlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from unittest.mock import patch

import torch
from peer import AblatedObjective, PublicObjective, fill_queues, plain_nst

from vlkd.core.device import device
from vlkd.core.settings import Scale
from vlkd.core.settings import preset as preset_arguments
from vlkd.models import bert
from vlkd.models.bert import BertForMaskedLM, bert_config, quick_dropout
from vlkd.tools.bench import peak_memory
from vlkd.train.terms import CRD_TOKENS
from vlkd.train.text_student import StudentObjective
from vlkd.train.trainer import ALLOCATOR_CACHING

OPTIMIZERS = dict(fused=dict(fused=True), foreach=dict(), loop=dict(foreach=False, fused=False))


def bf16_in_hardware() -> bool:
    "Whether the device multiplies bfloat16 matrices in hardware."
    if device().type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)())


def storage_bytes(tensors) -> int:
    "Bytes of the storages of tensors, each counted once."
    storages = [x.untyped_storage() for x in tensors if torch.is_tensor(x)]
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


class TrainingStep:
    "Calling it makes one step: forward, backward, clipping to norm 1, AdamW."

    def __init__(
        self,
        objective: torch.nn.Module,
        batch: dict,
        teacher=None,  # counted in `held_bytes`
        *,
        optimizer: str = "fused",  # of `OPTIMIZERS`
        bf16: bool = False,
        lr: float = 1e-5,
        context=contextlib.nullcontext,  # made anew for each step
    ):
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer should be {', '.join(OPTIMIZERS)}, not {optimizer!r}")
        self.objective, self.batch, self.teacher = objective, batch, teacher
        self.bf16, self.context = bf16, context
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        choice = OPTIMIZERS[optimizer]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.01, **choice)

    def __call__(self):
        with self.context():
            with torch.autocast(device().type, torch.bfloat16, enabled=self.bf16):
                loss = self.objective(**self.batch)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def held_bytes(self) -> int:
        "What weights, buffers and the optimiser's state take."
        state = [x for values in self.optimizer.state.values() for x in values.values()]
        frozen = [] if self.teacher is None else self.teacher.parameters()
        return storage_bytes([*self.objective.parameters(), *self.objective.buffers(), *frozen, *state])

    def peak_bytes(self) -> int:
        "The most that tensors take during a step, beyond `held_bytes`."
        return peak_memory(self)


def random_batch(s: Scale, batch: int, tokens: int, seed: int = 0) -> dict:
    "Full sentences of random tokens, of which each has as many masked as are expected."
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, s.vocab_size, (batch, tokens), generator=generator)
    where = torch.zeros(batch, tokens, dtype=torch.bool)
    masked = max(1, round(s.mask_prob * (tokens - 2)))
    for row in where:
        row[1 + torch.randperm(tokens - 2, generator=generator)[:masked]] = True
    position = torch.randint(tokens, (batch, CRD_TOKENS), generator=generator)
    out = dict(ids=ids, mask=torch.ones_like(where), masked=ids.masked_fill(where, 4))
    return {k: x.to(device()) for k, x in (out | dict(where=where, position=position)).items()}


class Workbench:
    "A student's and a teacher's model of a scale, shared by all variants of a step, and a batch for them."

    def __init__(
        self,
        s: Scale,
        batch: int = 0,  # 0: the scale's
        tokens: int = 0,  # 0: the scale's
        preset: str = "paper",
        seed: int = 0,
    ):
        torch.manual_seed(seed)
        self.s, self.preset = s, preset_arguments(preset)
        self.shape = (batch or s.batch, tokens or s.max_tokens)
        self.lm, self.teacher = self._model(), self._model()
        self.teacher.requires_grad_(False).eval()
        self.batch = random_batch(s, *self.shape, seed)

    def _model(self):
        lm = BertForMaskedLM(bert_config(self.s, self.s.vocab_size))
        return (quick_dropout(lm) if self.s.dropout else lm).to(device())

    @property
    def tokens(self) -> int:
        "Tokens of the batch."
        return self.shape[0] * self.shape[1]

    @property
    def masked(self) -> int:
        "Masked tokens of a sentence."
        return int(self.batch["where"][0].sum())

    def _ready(self, objective):
        fill_queues(objective)
        return objective.to(device()).train()

    def ours(self, kd: str = "nst+crd", preset: str = "") -> StudentObjective:
        "The objective of `train.text_student`, with a full queue."
        torch.manual_seed(1)
        args = preset_arguments(preset) if preset else self.preset
        teacher = self.teacher if kd else None
        return self._ready(StudentObjective(self.lm, teacher, kd, s=self.s, args=args))

    def ablated(self, *without, **kw) -> AblatedObjective:
        "Ours without some training options."
        torch.manual_seed(1)
        objective = AblatedObjective(
            self.lm, self.teacher, s=self.s, preset=self.preset, without=without, **kw
        )
        return self._ready(objective)

    def plain(self) -> AblatedObjective:
        "Vectorised losses without a rearrangement of the mathematics, every training option out."
        return self.ablated("mlm", "nst", "crd", nst_form=plain_nst)

    def public(self) -> PublicObjective:
        torch.manual_seed(1)
        return self._ready(PublicObjective(self.lm, self.teacher))

    def step(self, objective, **kw) -> TrainingStep:
        "A step of an objective on the batch; `kw` as `TrainingStep`."
        return TrainingStep(objective, self.batch, self.teacher, **kw)


# ---- contexts


def torch_dropout():
    "Within it, dropout is torch's own."
    return patch.object(bert, "QUICK_DROPOUT", [False])


@contextlib.contextmanager
def dropout_rate(lm, rate: float):
    "Within it, all dropout of a model is at `rate`."
    with contextlib.ExitStack() as stack:
        for module in lm.modules():
            if isinstance(module, torch.nn.Dropout):
                stack.enter_context(patch.object(module, "p", rate))
        yield


@contextlib.contextmanager
def attention(models, kind: str):
    "Within it, the attention of models is of another implementation."
    before = models[0].config._attn_implementation
    try:
        for model in models:
            model.set_attn_implementation(kind)
        yield
    finally:
        for model in models:
            model.set_attn_implementation(before)


class Compiled:
    "A context in which the layers of models, or their encoders, are compiled, each by itself."

    def __init__(self, models, kind: str = "BertLayer", **options):  # options of torch.compile
        self.modules = [m for model in models for m in model.modules() if type(m).__name__ == kind]
        self.options, self.compiled = options, []

    @contextlib.contextmanager
    def __call__(self):
        torch.compiler.cudagraph_mark_step_begin()
        if not self.compiled:
            for module in self.modules:
                module.compile(**self.options)
                self.compiled.append(module._compiled_call_impl)
        try:
            for module, compiled in zip(self.modules, self.compiled, strict=True):
                module._compiled_call_impl = compiled
            yield
        finally:
            for module in self.modules:
                module._compiled_call_impl = None


# ---- a step in a process with other environment variables

_step = None  # of the process that serves steps


def _make_step(settings: dict, shape: tuple, preset: str, bf16: bool, threads: int):
    global _step
    torch.set_num_threads(threads)
    bench = Workbench(Scale(**settings), *shape, preset)
    _step = bench.step(bench.ours(), bf16=bf16)


def _ask_step(method: str):
    result = getattr(_step, method)()
    return float(result)


class StepInProcess:
    "A step of our objective in a process of its own, whose allocator caches; used as a `TrainingStep`."

    def __init__(self, s: Scale, shape: tuple, preset: str, *, bf16: bool = False):
        spawn = multiprocessing.get_context("spawn")
        arguments = (dict(s), shape, preset, bf16, torch.get_num_threads())
        self.pool = ProcessPoolExecutor(1, spawn, _make_step, arguments)
        with patch.dict(os.environ, ALLOCATOR_CACHING):
            self.held_bytes()  # starts the process

    def _ask(self, method: str) -> float:
        return self.pool.submit(_ask_step, method).result()

    def __call__(self):
        return self._ask("__call__")

    def held_bytes(self) -> float:
        return self._ask("held_bytes")

    def peak_bytes(self) -> float:
        return self._ask("peak_bytes")

    def close(self):
        self.pool.shutdown()
