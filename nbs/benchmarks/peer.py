"""What the training core is measured against: the public formulation, and plain forms of the objectives.

Each form computes the value of one in `vlkd.losses` at another cost. The public formulation is written
from a description of what the official code does in a step: float32, a Python loop over sentences and
one over positions, products of all pairs of neurons over all tokens held at once, the masked-language
head on every position, the teacher's head computed and dropped, the teacher's states through numpy.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vlkd.core.device import no_autocast
from vlkd.core.settings import Scale
from vlkd.losses.base import promoted, unit
from vlkd.losses.crd import CRD
from vlkd.losses.kd import nst
from vlkd.models.bert import DistillationHead, hidden_states, mlm_loss

# ---- the public formulation


def public_nst(
    student: torch.Tensor,  # (B, L, Ds)
    teacher: torch.Tensor,  # (B, L, Dt)
) -> torch.Tensor:  # ()
    "The neuron-selectivity term: a loop over sentences, all pairs of neurons broadcast over tokens."

    def kernel_mean(a, b):  # (L, Da), (L, Db)
        return (a.T[:, None] * b.T[None]).sum(-1).pow(2).mean()

    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    out = 0
    for s, t in zip(student, teacher, strict=True):
        s, t = F.normalize(s, dim=0), F.normalize(t, dim=0)
        out = out + kernel_mean(s, s) - 2 * kernel_mean(s, t)
    return out / student.shape[1]


def public_nt_xent(
    student: torch.Tensor,  # (B, L, D)
    teacher: torch.Tensor,  # (B, L, D)
    temperature: float = 1.0,
) -> torch.Tensor:  # ()
    "NT-Xent position by position; the mask of partners is filled in by Python, the mean divided by 2B again."
    B, L = student.shape[:2]
    out = 0
    for i in range(L):
        z = torch.cat([student[:, i], teacher[:, i]])
        similarity = F.cosine_similarity(z[:, None], z[None], dim=-1) / temperature
        negative = torch.ones(2 * B, 2 * B, dtype=torch.bool)
        for k in range(B):
            negative[k, k] = negative[B + k, B + k] = False
            negative[k, B + k] = negative[B + k, k] = False
        partners = torch.cat([torch.diag(similarity, B), torch.diag(similarity, -B)])[:, None]
        others = similarity[negative.to(z.device)].reshape(2 * B, -1)
        first = torch.zeros(2 * B, dtype=torch.long, device=z.device)
        out = out + F.cross_entropy(torch.cat([partners, others], 1), first) / (2 * B)
    return out / L


class PublicHead(nn.Sequential):
    "Linear, GELU, LayerNorm, Linear; its output has unit length."

    def __init__(self, width: int, out: int):
        super().__init__(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, out))

    def forward(self, x):
        return F.normalize(super().forward(x), dim=-1)


class PublicObjective(nn.Module):
    "MLM + NST + NT-Xent as the official code computes them in a step. The teacher is no part of the module."

    def __init__(self, lm, teacher_lm):
        super().__init__()
        student_width, teacher_width = lm.config.hidden_size, teacher_lm.config.hidden_size
        self.lm = lm
        teacher_head = PublicHead(teacher_width, teacher_width).to(next(teacher_lm.parameters()))
        self._teacher = [teacher_lm, teacher_head]
        self.heads = nn.ModuleDict({k: PublicHead(student_width, teacher_width) for k in ("nst", "nt_xent")})

    @torch.no_grad()
    def teach(self, masked, mask) -> torch.Tensor:  # (B, L, Dt)
        "The teacher's states; its two heads are computed and dropped, and the states go through numpy."
        lm, head = self._teacher
        lm.eval()
        states = lm.bert(input_ids=masked, attention_mask=mask).last_hidden_state
        lm.cls(states)
        head(states)
        return torch.from_numpy(states.cpu().numpy()).to(masked.device)

    def forward(self, ids, mask, masked, where, position=None):
        states = self.lm.bert(input_ids=masked, attention_mask=mask).last_hidden_state
        taught = self.teach(masked, mask)
        targets = ids.masked_fill(~where, -100)
        terms = dict(
            mlm=F.cross_entropy(self.lm.cls(states).flatten(0, 1), targets.flatten()),
            nst=public_nst(self.heads["nst"](states), taught),
            nt_xent=public_nt_xent(self.heads["nt_xent"](states), taught),
        )
        loss = sum(terms.values())
        self.logged = [x.item() for x in (loss, *terms.values())]  # at every step, each a wait for a GPU
        return dict(loss=loss, **terms)


# ---- plain forms: vectorised over the batch, without a rearrangement of the mathematics


def _nst_by(products, distances):
    "`nst` by two functions of neurons (B, Da, L) and (B, Db, L), whose values are (B, Da, Db)."

    def form(
        student: torch.Tensor,  # (B, L, Ds)
        teacher: torch.Tensor,  # (B, L, Dt)
        mask: torch.Tensor | None = None,  # (B, L)
        *,
        kernel: str = "gaussian",
        sigma: float = 1.0,
        normalize: str | None = "neuron",
        teacher_term: bool = True,
    ) -> torch.Tensor:  # ()
        def neurons(x):
            x = x if mask is None else x * mask[..., None]
            if normalize == "token+neuron":
                x = F.normalize(x, dim=-1)
            return (F.normalize(x, dim=1) if normalize else x).transpose(1, 2)

        def pair_mean(a, b):
            if kernel == "poly":
                return products(a, b).square().mean((1, 2))
            return torch.exp(-distances(a, b) / (2 * sigma**2)).mean((1, 2))

        s, t = neurons(student), neurons(teacher)
        loss = pair_mean(s, s) - 2 * pair_mean(s, t)
        return (loss + pair_mean(t, t) if teacher_term else loss).mean()

    return form


# kernels of a whole batch at once
plain_nst = _nst_by(lambda a, b: a @ b.transpose(1, 2), lambda a, b: torch.cdist(a, b).square())
# all pairs of neurons broadcast over tokens, (B, Ds, Dt, L)
broadcast_nst = _nst_by(
    lambda a, b: (a[:, :, None] * b[:, None]).sum(-1),
    lambda a, b: (a[:, :, None] - b[:, None]).square().sum(-1),
)


def loop_nst(
    student: torch.Tensor,  # (B, L, Ds)
    teacher: torch.Tensor,  # (B, L, Dt)
    **kernel,  # as `broadcast_nst`
) -> torch.Tensor:  # ()
    "`broadcast_nst`, one sentence at a time."
    sentences = zip(student, teacher, strict=True)
    return torch.stack([broadcast_nst(s[None], t[None], **kernel) for s, t in sentences]).mean()


def plain_crd(
    crd: CRD,  # whose queue is full
    student: torch.Tensor,  # (N, Ds)
    teacher: torch.Tensor,  # (N, Dt)
    index: torch.Tensor | None = None,  # (N, K) negatives of each sample; None: drawn
) -> torch.Tensor:  # ()
    "CRD with negatives of its own for each sample, gathered to (N, K, F). The features are stored."
    s, t = crd.features(student, teacher)
    K, M = crd.negatives, crd.bank_size
    if int(crd.seen) < M:
        raise ValueError(f"plain_crd needs a full queue: {int(crd.seen)} of {M} places are filled")
    if index is None:
        index = torch.randint(M, (len(s), K), device=s.device)
    c = K / M
    loss = 0
    for x, memory in ((s, crd.memory_v2), (t, crd.memory_v1)):
        gathered = memory[index].to(x.dtype)
        negative = torch.exp(torch.einsum("bd,bkd->bk", x, gathered) / crd.temperature)
        positive = torch.exp((s * t).sum(-1) / crd.temperature)
        chance = torch.log(positive / (positive + c)) + torch.log(c / (negative + c)).sum(1)
        loss = loss - chance.mean()
    if crd.training:
        _store(crd, s, t)
    return loss


@torch.no_grad()
def _store(crd: CRD, student, teacher):  # (N, F) each
    "Replace the oldest places of the queue."
    places = (crd.seen + torch.arange(len(student), device=student.device)) % crd.bank_size
    crd.memory_v1[places], crd.memory_v2[places] = student, teacher
    crd.seen += len(student)


@torch.no_grad()
def fill_queues(objective: nn.Module) -> nn.Module:
    "Fill the queues of all CRD terms with random directions, as they are after `bank_size` samples."
    for crd in (m for m in objective.modules() if isinstance(m, CRD)):
        generator = torch.Generator().manual_seed(0)
        for memory in (crd.memory_v1, crd.memory_v2):
            memory.copy_(unit(torch.randn(memory.shape, generator=generator)))
        crd.seen.fill_(crd.bank_size)
    return objective


# ---- the student's step without single training options

TRAINING_OPTIONS = dict(
    mlm="MLM head on masked positions only",
    nst="NST by matrix products",
    crd="CRD's negatives shared by the batch",
    head="teacher without its head",
    numpy="teacher's states stay tensors",
)


class AblatedObjective(nn.Module):
    """MLM + NST + CRD, the objective of `train.text_student`, without some of `TRAINING_OPTIONS`.

    Its value is the same for every choice; only the cost differs. CRD draws the negatives of each sample
    unless `share_draw`, with which values can be compared. The teacher runs within `teacher_context`.
    """

    def __init__(
        self,
        lm,
        teacher_lm,
        *,
        s: Scale,
        preset: dict,
        without=(),  # keys of `TRAINING_OPTIONS`
        nst_form=loop_nst,  # what takes the place of NST by matrix products
        share_draw: bool = False,
        teacher_context=torch.no_grad,
    ):
        super().__init__()
        unknown = set(without) - set(TRAINING_OPTIONS)
        if unknown:
            known = ", ".join(TRAINING_OPTIONS)
            raise ValueError(f"no training option {sorted(unknown)[0]!r}; there are {known}")
        student_width, teacher_width = lm.config.hidden_size, teacher_lm.config.hidden_size
        self.lm, self._teacher, self.preset = lm, [teacher_lm], preset
        self.without, self.nst_form = set(without), nst_form
        self.share_draw, self.teacher_context = share_draw, teacher_context
        self.heads = nn.ModuleDict(
            {k: DistillationHead(student_width, s.head_hidden, teacher_width) for k in ("nst", "crd")}
        )
        self.crd = CRD(
            teacher_width,
            teacher_width,
            s.crd_dim,
            negatives=s.crd_negatives,
            bank_size=s.crd_bank,
            **preset["crd"],
        )

    def teach(self, masked, mask) -> torch.Tensor:  # (B, L, Dt)
        "The frozen teacher's states."
        teacher = self._teacher[0].eval()
        with self.teacher_context():
            states = hidden_states(teacher, masked, mask)
            if "head" in self.without:
                teacher.cls(states)
        if "numpy" in self.without:
            states = torch.from_numpy(promoted(states)[0].cpu().numpy()).to(states.device)
        return states

    def mlm(self, states, ids, where):
        if "mlm" not in self.without:
            return mlm_loss(self.lm, states, ids, where)
        logits = self.lm.cls(states).flatten(0, 1).float()
        return F.cross_entropy(logits, ids.masked_fill(~where, -100).flatten())

    def nst(self, student, teacher, mask):
        if "nst" not in self.without:
            return nst(student, teacher, mask, **self.preset["nst"])
        with no_autocast(student):
            return self.nst_form(*promoted(student, teacher), **self.preset["nst"])

    def crd_term(self, student, teacher):
        if "crd" not in self.without:
            return self.crd(student, teacher)
        index = None
        if self.share_draw:
            drawn = torch.randint(self.crd.bank_size, (self.crd.negatives,), generator=self.crd.generator)
            index = drawn.to(student.device).expand(len(student), -1)
        with no_autocast(student):
            return plain_crd(self.crd, *promoted(student, teacher), index)

    def forward(self, ids, mask, masked, where, position):
        states = hidden_states(self.lm, masked, mask)
        taught = self.teach(masked, mask)
        rows = torch.arange(len(states), device=states.device)[:, None]
        keys = self.heads["crd"](states[rows, position]).flatten(0, 1)
        terms = dict(
            mlm=self.mlm(states, ids, where),
            nst=self.nst(self.heads["nst"](states), taught, mask),
            crd=self.crd_term(keys, taught[rows, position].flatten(0, 1)),
        )
        return dict(loss=sum(terms.values()), **terms)
