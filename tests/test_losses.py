"Objectives and retrieval: shapes, padding, precision, derivatives, and the peers' values (`VLKD_GOLDEN`)."

import copy
import json
import math
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.autograd import gradcheck, gradgradcheck

from vlkd.core.device import generator, seed_everything
from vlkd.core.settings import preset
from vlkd.eval.retrieval import own_ranks, recall_metrics
from vlkd.losses.contrastive import cyclic_negatives, info_nce, token_hinge
from vlkd.losses.crd import CRD
from vlkd.losses.kd import (
    chunked_soft_label,
    nst,
    nt_xent,
    objective,
    regression,
    released_scale,
    soft_label,
    voken,
)
from vlkd.retrieval.nearest import nearest, vokens

B, L, D = 5, 7, 6
LENGTHS = torch.tensor([7, 1, 4, 5, 2])
MASK = torch.arange(L) < LENGTHS[:, None]
NEGATIVES = torch.tensor([1, 2, 3, 4, 0])


def data(*shape, name, dtype=torch.float64):
    return torch.randn(*shape, generator=generator("losses", name), dtype=torch.float64).to(dtype)


def close(a, b, atol=1e-10):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, atol=atol, rtol=atol)


def random_hinge(text, video, mask=None):
    return token_hinge(text, video, mask, generator=torch.Generator().manual_seed(3))


TEXT = {
    f"hinge {negatives} {sides}": partial(token_hinge, negatives=negatives, sides=sides, margin=0.5)
    for negatives in ("all", "hardest", "paired")
    for sides in ("both", "video", "text")
}
TEXT |= {
    "hinge given": partial(token_hinge, negatives=NEGATIVES),
    "hinge random": random_hinge,
    "nce sentence": info_nce,
    "nce token": partial(info_nce, level="token"),
}
KD = {
    "soft_label": soft_label,
    "regression": regression,
    "nt_xent": nt_xent,
    "nst": nst,
    "nst raw": partial(nst, normalize=None),
    "nst poly": partial(nst, kernel="poly"),
    "nst released": partial(nst, **preset("released")["nst"]),
}
ALL = TEXT | KD
PUBLIC = [token_hinge, info_nce, soft_label, regression, nst, nt_xent]
each = pytest.mark.parametrize("name", ALL)


def inputs(name, dtype=torch.float64):
    "States, and what they are compared with: videos or a teacher's states."
    other = data(B, D, name="v") if name in TEXT else data(B, L, D, name="t")
    return data(B, L, D, name="s").to(dtype), other.to(dtype)


def gradients(loss, *of):
    return torch.autograd.grad(loss, of)


# What all objectives have in common


@each
def test_padding_is_never_read(name):
    (states, other), seen = inputs(name), []
    for junk in (0.0, 1e30, float("nan"), float("inf"), -float("inf")):
        x = states.masked_fill(~MASK[..., None], junk).requires_grad_()
        y = other.masked_fill(~MASK[..., None], junk) if other.dim() == 3 else other.clone()
        loss = ALL[name](x, y.requires_grad_(), MASK)
        of_x, of_y = gradients(loss, x, y)
        seen.append(torch.cat([loss[None], of_x.flatten(), of_y.flatten()]))
        assert loss.isfinite() and (of_x[~MASK] == 0).all() and of_x[MASK].abs().sum() > 0
        assert other.dim() == 2 or (of_y[~MASK] == 0).all()
    assert all(torch.equal(values, seen[0]) for values in seen)


@each
def test_longer_padding_and_no_mask(name):
    def pad(x):
        return torch.cat([x, 9 * torch.ones_like(x[:, :3])], 1) if x.dim() == 3 else x

    loss, (states, other) = ALL[name], inputs(name)
    mask = torch.cat([MASK, torch.zeros(B, 3, dtype=torch.bool)], 1)
    close(loss(pad(states), pad(other), mask), loss(states, other, MASK))
    close(loss(states, other, None), loss(states, other, torch.ones(B, L, dtype=torch.bool)))


@each
def test_only_padding_costs_nothing(name):
    states, other = inputs(name)
    states.requires_grad_()
    loss = ALL[name](states, other, MASK & False)
    assert loss.item() == 0 and (not loss.requires_grad or (gradients(loss, states)[0] == 0).all())
    mask = MASK.clone()
    mask[2] = False
    (gradient,) = gradients(ALL[name](states, other, mask), states)
    assert gradient.isfinite().all() and (gradient[2] == 0).all()


@each
def test_precision(name):
    loss = ALL[name]
    want = loss(*inputs(name), MASK)
    assert want.dtype == torch.float64 and want.shape == ()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        states, other = inputs(name, dtype)
        value = loss(states, other, MASK)
        assert value.dtype == torch.float32
        close(value, want, atol=tolerance)
        # the arithmetic is float32: only the inputs were rounded
        close(value, loss(states.double(), other.double(), MASK), atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            states.requires_grad_()
            again = loss(states, other, MASK)
            assert torch.equal(again, value)
            again.backward()
            assert states.grad.isfinite().all()


@each
def test_teacher_states_of_inference_mode(name):
    states, other = inputs(name)
    with torch.inference_mode():
        frozen = other.clone()
    loss = ALL[name](states.requires_grad_(), frozen, None)
    loss.backward()
    close(loss, ALL[name](states, other, None))


@pytest.mark.parametrize(
    "name", [n for n in ALL if n not in ("hinge given", "hinge random") and "paired" not in n]
)  # there the order chooses the negatives
def test_order_of_the_batch_does_not_matter(name):
    states, other = inputs(name)
    order = torch.tensor([3, 0, 4, 1, 2])
    close(ALL[name](states[order], other[order], MASK[order]), ALL[name](states, other, MASK))


@each
@pytest.mark.parametrize("check, length", [(gradcheck, 3), (gradgradcheck, 2)])
def test_derivatives(name, check, length):
    states, other = inputs(name)
    other = other[:, :length] if other.dim() == 3 else other
    leaves = [x.clone().requires_grad_() for x in (states[:, :length], other)]
    assert check(lambda x, y: ALL[name](x, y, MASK[:, :length]), leaves, fast_mode=True)


@pytest.mark.parametrize("name", [n for n in KD if n.startswith("nst")])
def test_nst_under_torch_func(name):
    states, teacher = inputs(name)
    loss = partial(KD[name], teacher=teacher, mask=MASK)
    direction = data(B, L, D, name="direction")
    x = states.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (product,) = gradients((gradient * direction).sum(), x)
    close(torch.func.grad(loss)(states), gradient.detach())
    close(torch.func.jvp(loss, (states,), (direction,))[1], (gradient * direction).sum().detach())
    close(torch.func.jvp(torch.func.grad(loss), (states,), (direction,))[1], product)
    both = torch.stack([states, states + direction])
    close(torch.func.vmap(loss)(both), torch.stack([loss(x) for x in both]))


@pytest.mark.parametrize("name", [*ALL, "voken"])
def test_compiles_as_one_graph(name):
    torch.compiler.reset()
    if name == "hinge random":
        torch.compile(token_hinge, backend="eager", fullgraph=True)(*inputs(name))
        return  # a compiled graph has no generators and draws other numbers
    labels = torch.arange(B * L).view(B, L) % D
    loss, other = (voken, labels) if name == "voken" else (ALL[name], inputs(name)[1])
    states = data(B, L, D, name="s").requires_grad_()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    for mask in (MASK, None):
        got, want = compiled(states, other, mask), loss(states, other, mask)
        close(got, want)
        close(*gradients(got, states), *gradients(want, states))


def test_chunked_soft_label_compiles():
    x, weight = data(4, 3, name="x").requires_grad_(), data(5, 3, name="w")
    compiled = torch.compile(chunked_soft_label, backend="eager", fullgraph=True)
    arguments = (x, weight, None, data(4, 2, name="y"), data(5, 2, name="v"))
    close(compiled(*arguments), chunked_soft_label(*arguments))


@pytest.mark.parametrize("f", PUBLIC, ids=lambda f: f.__name__)
def test_shapes_that_do_not_fit_are_named(f):
    of_text = f in (token_hinge, info_nce)
    states = torch.zeros(B, L, D)
    other = torch.zeros(B, D) if of_text else torch.zeros(B, L, D)
    wrong = [other[:-1], other[:, None] if of_text else other[:, :-1]]
    if f is not nst:
        wrong.append(other[..., :-1])
    for x in wrong:
        with pytest.raises(ValueError) as error:
            f(states, x)
        assert str(tuple(states.shape)) in str(error.value) and str(tuple(x.shape)) in str(error.value)
    for mask in (MASK[:-1], MASK[:, :-1], MASK[0]):
        with pytest.raises(ValueError) as error:
            f(states, other, mask)
        assert str(tuple(mask.shape)) in str(error.value)
    for mask in (MASK.long(), MASK.float()):
        with pytest.raises(ValueError, match="boolean"):
            f(states, other, mask)


BAD_OPTIONS = [
    (token_hinge, dict(sides="left")),
    (token_hinge, dict(reduction="avg")),
    (token_hinge, dict(negatives="easy")),
    (token_hinge, dict(negatives=torch.tensor([0, 1, 2, 3, 4]))),
    (token_hinge, dict(negatives=torch.tensor([1, 2, 3, 4, 5]))),
    (token_hinge, dict(negatives=NEGATIVES[:4])),
    (token_hinge, dict(negatives=NEGATIVES.float())),
    (info_nce, dict(temperature=0.0)),
    (nst, dict(kernel="linear")),
    (nst, dict(sigma=0)),
    (soft_label, dict(temperature=-1.0)),
    (nt_xent, dict(temperature=0)),
]


@pytest.mark.parametrize("f, options", BAD_OPTIONS)
def test_options_that_do_not_exist_are_refused(f, options):
    states = torch.zeros(B, L, D)
    with pytest.raises(ValueError):
        f(states, states[:, 0] if f in (token_hinge, info_nce) else states, **options)


def test_objectives_that_do_not_exist_are_refused():
    for arguments in (("nst", "draft"), ("hinge",), ("crd", "released")):
        with pytest.raises(ValueError):
            objective(*arguments)
    assert objective("nst", preset="released").__name__ == "scaled"


@pytest.mark.parametrize("n", ["random", "all", "hardest", "paired"])
def test_one_sentence_has_no_negatives(n):
    with pytest.raises(ValueError, match="at least 2"):
        token_hinge(torch.zeros(1, L, D), torch.zeros(1, D), negatives=n)


@each
def test_an_empty_batch_costs_nothing_or_has_no_negatives(name):
    states, other = (x[:0] for x in inputs(name))
    if name in TEXT or name == "nt_xent":
        with pytest.raises(ValueError, match="at least 2"):
            ALL[name](states, other)
        return
    states.requires_grad_()
    loss = ALL[name](states, other)
    loss.backward()
    assert loss.item() == 0 and states.grad.shape == states.shape


# One objective at a time


def test_cyclic_negatives():
    for n in (2, 3, 8):
        for i in range(50):
            negatives = cyclic_negatives(torch.randperm(n, generator=generator("p", n, i)))
            assert sorted(negatives.tolist()) == list(range(n)) and (negatives != torch.arange(n)).all()
    assert cyclic_negatives(torch.tensor([2, 0, 1])).tolist() == [1, 2, 0]


def test_random_hinge_is_on_average_the_mean_over_others():
    states, video = inputs("hinge random")
    g = generator("mc")
    drawn = torch.stack([token_hinge(states, video, MASK, generator=g) for _ in range(1500)])
    every = token_hinge(states, video, MASK, negatives="all")
    close(drawn.mean(), every, atol=0.02)
    assert token_hinge(states, video, MASK, negatives="hardest") >= every


def test_odd_batch_of_the_official_code():
    states, video = inputs("hinge given")
    i = torch.tensor([0, 1, 2, 3, 4, 4])
    options = preset("released")["token_hinge"]
    pairs = {**options, "negatives": torch.tensor([3, 4, 5, 0, 1, 2])}
    close(token_hinge(states, video, MASK, **options), token_hinge(states[i], video[i], MASK[i], **pairs))
    assert token_hinge(states, video, MASK, **options, reduction="none").shape == (B,)


@pytest.mark.parametrize("kernel", ["gaussian", "poly"])
def test_nst_widths_and_token_count(kernel):
    distance = partial(nst, kernel=kernel)
    student, teacher = data(B, L, D, name="a"), data(B, L, 11, name="b")
    assert distance(student, teacher, MASK) > 0
    # the same neurons twice are the same distribution
    close(distance(student, torch.cat([student, student], -1), MASK), 0.0)
    one = [distance(student[b : b + 1, :n], teacher[b : b + 1, :n]) for b, n in enumerate(LENGTHS)]
    close(distance(student, teacher, MASK), torch.stack(one).mean())


def test_voken_labels():
    logits, labels = data(B, L, D, name="x"), torch.arange(B * L).view(B, L) % D
    close(voken(logits, labels, MASK), F.cross_entropy(logits[MASK], labels[MASK]))
    nowhere = torch.full_like(labels, -100)
    close(voken(logits, labels.where(MASK, -100).to(torch.int16)), voken(logits, labels, MASK))
    assert voken(logits.bfloat16(), labels).dtype == torch.float32 and voken(logits, nowhere).item() == 0
    junk = logits.masked_fill(~MASK[..., None], float("nan")).requires_grad_()
    loss = voken(junk, labels.masked_fill(~MASK, 10**6), MASK)
    close(loss, voken(logits, labels, MASK))
    assert (gradients(loss, junk)[0][~MASK] == 0).all()
    for bad in (labels[:, 1:], labels[0], labels.float(), labels + 1, labels - 1):
        with pytest.raises(ValueError):
            voken(logits, bad)


# CRD


def make_crd(bank="queue", **options):
    seed_everything(5)
    return CRD(D, 9, **{**dict(feature_dim=4, negatives=6, bank=bank, bank_size=10), **options}).double()


def batch(k, n=4):
    return data(n, D, name=("s", k)), data(n, 9, name=("t", k)), (torch.arange(n) * 2 + k) % 10


banks = pytest.mark.parametrize("bank", ["queue", "full"])


@banks
def test_crd_gradcheck(bank):
    crd = make_crd(bank, temperature=0.5)
    crd(*batch(0))
    crd.eval()
    *states, index = batch(1)

    def loss(student, teacher, weight):
        return torch.func.functional_call(crd, {"f1.weight": weight}, (student, teacher, index))

    leaves = [x.detach().clone().requires_grad_() for x in (*states, crd.f1.weight)]
    assert gradcheck(loss, leaves)


@banks
def test_crd_trains_both_maps_and_evaluation_changes_nothing(bank):
    crd = make_crd(bank)
    for k in range(3):
        loss = crd(*batch(k))
    loss.backward()
    assert loss.item() > 0 and all(p.grad.abs().sum() > 0 for p in crd.parameters())
    crd.eval()
    before = copy.deepcopy(crd.state_dict())
    assert torch.equal(crd(*batch(9)), crd(*batch(9)))
    assert all(torch.equal(value, before[name]) for name, value in crd.state_dict().items())
    crd.train()
    crd(*batch(9))
    assert not torch.equal(crd.memory_v1, before["memory_v1"])


@banks
def test_crd_resumes_exactly(bank, tmp_path):
    crd = make_crd(bank)
    for k in range(4):
        crd(*batch(k))
    save_file(crd.state_dict(), tmp_path / "c.safetensors")
    wanted = [crd(*batch(k)).item() for k in range(4, 8)]
    seed_everything(99)
    other = CRD(D, 9, feature_dim=4, negatives=6, bank=bank, bank_size=10).double()
    other.load_state_dict(load_file(tmp_path / "c.safetensors"))
    assert [other(*batch(k)).item() for k in range(4, 8)] == wanted


@banks
@pytest.mark.parametrize("row", [slice(None), slice(1, 2)], ids=["every row", "one row"])
@pytest.mark.parametrize("of", ["student", "teacher"])
def test_rows_that_are_not_finite_do_not_reach_the_memory(bank, row, of):
    crd = make_crd(bank)
    student, teacher, index = batch(0)
    (student if of == "student" else teacher)[row] = float("nan")
    crd(student, teacher, index)
    assert all(value.isfinite().all() for value in crd.buffers())
    assert int(crd.seen) == (0 if row == slice(None) else 3)
    for k in range(1, 40):
        assert crd(*batch(k)).isfinite(), k


@banks
def test_compiled_crd_equals_itself(bank):
    crd = make_crd(bank)
    compiled = torch.compile(copy.deepcopy(crd), backend="eager")
    for k in range(4):
        close(compiled(*batch(k)), crd(*batch(k)))


def test_finite_rows_of_a_broken_batch_are_stored_as_if_they_were_alone():
    crd, alone = make_crd("full"), make_crd("full")
    student, teacher, index = batch(0)
    alone(student[:3], teacher[:3], index[:3])
    student[3] = float("inf")
    crd(student, teacher, index)
    close(crd.memory_v1, alone.memory_v1)
    close(crd.log_z, alone.log_z)


def test_queue_keeps_the_last_pairs():
    crd, pairs = make_crd(), []
    for k in range(5):
        student, teacher, _ = batch(k)
        pairs += list(zip(*(x.detach() for x in crd.features(student, teacher)), strict=True))
        crd(student, teacher)
    assert {tuple(x.tolist()) for x in crd.memory_v2} == {tuple(t.tolist()) for _, t in pairs[-10:]}
    for s, t in pairs[-10:]:  # a pair stays a pair
        i = (crd.memory_v1 == s).all(1).nonzero().item()
        assert torch.equal(crd.memory_v2[i], t)
    student, teacher, _ = batch(77, 23)
    crd(student, teacher)
    features = crd.features(student, teacher)[0].detach()
    assert {tuple(x.tolist()) for x in crd.memory_v1} == {tuple(x.tolist()) for x in features[-10:]}


def test_full_bank_updates_with_momentum_only_what_it_saw():
    crd = make_crd("full", momentum=0.25)
    old = crd.memory_v2.clone()
    student, teacher, index = batch(0)
    crd(student, teacher, index)
    features = crd.features(teacher=teacher)[1]
    close(crd.memory_v2[index].detach(), F.normalize(0.25 * old[index] + 0.75 * features, dim=-1).detach())
    rest = [k for k in range(10) if k not in index.tolist()]
    assert torch.equal(crd.memory_v2[rest], old[rest])
    log_z = crd.log_z.clone()
    crd(student, teacher.new_zeros(4, 9), index)
    assert torch.equal(crd.log_z, log_z)


@banks
def test_crd_precision(bank):
    student, teacher, index = batch(0)
    for dtype in (torch.bfloat16, torch.float16):
        crd = make_crd(bank).to(dtype)
        for _ in range(3):
            loss = crd(student.to(dtype), teacher.to(dtype), index)
            assert loss.dtype == torch.float32 and loss.isfinite()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in crd.parameters())
    crd = make_crd(bank).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert crd(student.float(), teacher.float(), index).dtype == torch.float32


@banks
def test_crd_names_shapes_that_do_not_fit(bank):
    student, teacher, index = batch(0)
    for s, t in ((student[:3], teacher), (student, teacher[:, :5]), (student[None], teacher)):
        with pytest.raises(ValueError) as error:
            make_crd(bank)(s, t, index)
        assert str(tuple(s.shape)) in str(error.value) and str(tuple(t.shape)) in str(error.value)


def test_crd_errors():
    student, teacher, index = batch(0)
    for bad in (None, index[:2], index.double(), index + 9, index - 5):
        with pytest.raises(ValueError, match="index"):
            make_crd("full")(student, teacher, bad)
    for name, bad in dict(bank="ring", bank_size=1, negatives=0, temperature=0, momentum=2).items():
        with pytest.raises(ValueError):
            make_crd(**{name: bad})
    crd = make_crd()
    with pytest.raises(ValueError, match="queue is empty"):
        crd(student[:1], teacher[:1])
    crd(student, teacher)
    assert crd(student[:1], teacher[:1]).isfinite()


# Retrieval


@pytest.mark.parametrize("k,tile", [(1, 4), (1, 1000), (4, 3), (4, 16), (25, 7)])
def test_nearest_is_brute_force(k, tile):
    queries, keys = data(13, 5, name="q"), data(25, 5, name="c")
    want = (F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T).topk(k, 1)
    scores, indices = nearest(queries, keys, k, tile=tile)
    assert torch.equal(indices, want.indices)
    close(scores, want.values)


def test_vokens_are_the_nearest_to_each_token():
    states, pool = data(B, L, D, name="s"), data(9, D, name="pool")
    found = vokens(states.masked_fill(~MASK[..., None], float("nan")), MASK, pool, tile=4)
    assert (found[~MASK] == -100).all()
    assert torch.equal(found[MASK], nearest(states[MASK], pool)[1][:, 0])


# The peers' values

GOLDEN = os.environ.get("VLKD_GOLDEN")
golden = pytest.mark.skipif(not GOLDEN, reason="VLKD_GOLDEN does not name the folder of the peers' values")


def peer(name):
    return json.loads((Path(GOLDEN) / f"{name}.json").read_text())


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


@golden
def test_golden_hinge():
    g = peer("hinge_vidlankd")
    text, video, mask = tensor(g["lang"]).requires_grad_(), tensor(g["visn"]), tensor(g["mask"]).bool()
    options = preset("released")["token_hinge"]
    loss = token_hinge(text, video, mask, **options)
    close(loss, g["paired_margin1"])
    close(token_hinge(text, video, mask, **{**options, "margin": 0.5}), g["paired_margin05"])
    close(token_hinge(text[:3], video[:3], mask[:3], **options), g["paired_odd_batch3_margin1"])
    # the official code normalises upstream of this gradient: take out what is along the (unit) states
    states, gradient = text.detach(), tensor(g["grad_lang"])
    gradient = gradient - (gradient * states).sum(-1, keepdim=True) * states
    close(*gradients(loss, text), gradient.masked_fill(~mask[..., None], 0))


@golden
def test_golden_hinge_of_eq_3():
    g = peer("hinge_paper_eq3")
    text, video, mask = tensor(g["lang"]), tensor(g["visn"]), tensor(g["mask"]).bool()
    negatives = torch.tensor(g["negatives"])
    close(token_hinge(text, video, mask, negatives=negatives, reduction="none"), g["per_sample"])


@golden
def test_golden_soft_label():
    g = peer("kd_softlabel")
    for temperature, want in g["soft_ce"].items():
        close(soft_label(tensor(g["y_s"]), tensor(g["y_t"]), temperature=float(temperature)), want)


@golden
def test_golden_nst():
    g = peer("nst_paper_eq7")
    for b in range(4):
        s, t = tensor(g["s"])[b : b + 1], tensor(g["t"])[b : b + 1]
        close(nst(s, t, normalize=None), g["mmd2_per_sample"][b])
        close(nst(s, t), g["mmd2_neuron_normalised"][b])
    g = peer("nst_vidlankd")
    s, t = tensor(g["s"]).requires_grad_(), tensor(g["t"])
    close(objective("nst", "released")(s, t), g["loss_as_trained"])
    for b in range(4):
        close(nst(s[b : b + 1], t[b : b + 1], kernel="poly"), g["full_mmd_poly_per_sample"][b])
    loss = nst(s, t, kernel="poly", teacher_term=False) * released_scale("nst", 4, s.shape[1])
    close(*gradients(loss, s), g["grad_s_as_trained"])


@golden
def test_golden_nst_of_feature_maps():
    same, pooled = peer("nst_repdistiller")["cases"]
    s, t = (tensor(same[k]).flatten(2).transpose(1, 2) for k in ("f_s_values", "f_t_values"))
    loss = nst(s.requires_grad_(), t, kernel="poly")
    close(loss, same["loss"])
    want = tensor(same["grad_f_s"])
    close(gradients(loss, s)[0].transpose(1, 2).reshape(want.shape), want)
    s = F.adaptive_avg_pool2d(tensor(pooled["f_s_values"]), 3).flatten(2).transpose(1, 2)
    t = tensor(pooled["f_t_values"]).flatten(2).transpose(1, 2)
    close(nst(s, t, kernel="poly"), pooled["loss"])


@golden
def test_golden_nt_xent():
    g = peer("contrastive_item_vidlankd")
    s, t = tensor(g["s"]).requires_grad_(), tensor(g["t"])
    loss = objective("nt_xent", "released")(s, t)
    close(loss, g["loss_as_trained"])
    close(*gradients(loss, s), g["grad_s"])
    first = nt_xent(s[:, :1], t[:, :1], temperature=0.5) * released_scale("nt_xent", 4, 1)
    close(first, g["default_temperature_0_5_pos0"])


def fixed(*shape, seed, scale=1.0):
    "The deterministic tensor that the golden values were made from."
    n = math.prod(shape)
    k = torch.arange(n, dtype=torch.float64)
    return (scale * torch.sin(0.7 * k + 1.3 * seed + 0.05 * k * k * ((seed % 3) + 1) / n)).view(*shape)


@golden
def test_golden_crd():
    temperature = torch.tensor(0.07).item()
    crd = CRD(6, 8, feature_dim=4, negatives=5, bank="full", bank_size=10, temperature=temperature).double()
    with torch.no_grad():
        crd.f1.weight.copy_(fixed(4, 6, seed=1))
        crd.f1.bias.copy_(fixed(4, seed=2, scale=0.1))
        crd.f2.weight.copy_(fixed(4, 8, seed=3))
        crd.f2.bias.copy_(fixed(4, seed=4, scale=0.1))
        crd.memory_v1.copy_(fixed(10, 4, seed=5, scale=0.75**0.5))
        crd.memory_v2.copy_(fixed(10, 4, seed=6, scale=0.75**0.5))
    for step in peer("crd_repdistiller")["steps"]:
        s, t = tensor(step["f_s"]).requires_grad_(), tensor(step["f_t"])
        features = crd.features(s, t)
        close(features[0], step["embed_s"])
        close(features[1], step["embed_t"])
        negatives = torch.tensor(step["contrast_idx"])[:, 1:]
        loss = crd(s, t, torch.tensor(step["idx"]), negatives_index=negatives)
        close(loss, step["loss"][0] if isinstance(step["loss"], list) else step["loss"])
        close(*gradients(loss, s), step["grad_f_s"])
        close(crd.log_z.exp(), step["params_K_T_Zv1_Zv2_mom"][2:4])
        close(crd.memory_v1, step["memory_v1_after"])
        close(crd.memory_v2, step["memory_v2_after"])


@golden
def test_golden_retrieval():
    g = peer("open_clip_losses")
    text, image, temperature = tensor(g["text"])[:, None], tensor(g["image"]), 1 / g["logit_scale"]
    for level in ("sentence", "token"):
        close(info_nce(text, image, level=level, temperature=temperature), g["clip_loss"])
    g = peer("video_text_losses")
    R1, R5, R10, median = g["retrieval_metrics"].values()
    found = recall_metrics(own_ranks(tensor(g["sim"])))
    assert list(found.values()) == pytest.approx([100 * R1, 100 * R5, 100 * R10, median])
    g = peer("voken_retrieval")
    scores, indices = nearest(tensor(g["queries"]), tensor(g["keys"]), 3)
    assert indices.tolist() == g["top3"]
    close(scores, g["top3_score"], atol=1e-6)
