"Objectives and retrieval: what every one of them promises (shapes, padding, precision), and the peers' values where `VLKD_GOLDEN` names their folder."

import copy
import io
import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vlkd.core.device import generator, seed_everything
from vlkd.core.settings import preset
from vlkd.losses.contrastive import derangement, info_nce, token_hinge
from vlkd.losses.kd import CRD, nst, nt_xent, objective, regression, released_scale, soft_label, voken
from vlkd.retrieval.nearest import nearest, rank_of, recall_at, vokens

B, L, D = 5, 7, 6
LENGTHS = torch.tensor([7, 1, 4, 5, 2])
MASK = torch.arange(L) < LENGTHS[:, None]
NEG = torch.tensor([1, 2, 3, 4, 0])


def data(*shape, name, dtype=torch.float64):
    return torch.randn(*shape, generator=generator("losses", name), dtype=torch.float64).to(dtype)


def close(a, b, atol=1e-10):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), atol=atol, rtol=atol
    )


TEXT = {
    f"hinge {n} {s}": (lambda t, v, m, n=n, s=s: token_hinge(t, v, m, negatives=n, sides=s, margin=0.5))
    for n in ("all", "hardest", "paired")
    for s in ("both", "video", "text")
}
TEXT |= {
    "hinge given": lambda t, v, m: token_hinge(t, v, m, negatives=NEG),
    "hinge random": lambda t, v, m: token_hinge(t, v, m, generator=torch.Generator().manual_seed(3)),
    "nce sentence": lambda t, v, m: info_nce(t, v, m),
    "nce token": lambda t, v, m: info_nce(t, v, m, level="token"),
}
KD = {
    "soft_label": soft_label,
    "regression": regression,
    "nt_xent": nt_xent,
    "nst": nst,
    "nst raw": lambda s, t, m: nst(s, t, m, normalize=None),
    "nst poly": lambda s, t, m: nst(s, t, m, kernel="poly"),
    "nst released": lambda s, t, m: nst(s, t, m, **preset("released")["nst"]),
}
PUBLIC = [token_hinge, info_nce, soft_label, regression, nst, nt_xent]


def inputs(name, dtype=torch.float64):  # states, and what they are compared with
    return data(B, L, D, name="s").to(dtype), (
        data(B, D, name="v") if name in TEXT else data(B, L, D, name="t")
    ).to(dtype)


ALL = TEXT | KD
each = pytest.mark.parametrize("name", ALL)


@each
def test_padding_is_never_read(name):
    f, (s, t), seen = ALL[name], inputs(name), []
    for n, junk in enumerate((0.0, 1e30, float("nan"), float("inf"), -float("inf"))):
        x = s.masked_fill(~MASK[..., None], junk).requires_grad_()
        y = (t.masked_fill(~MASK[..., None], junk) if t.dim() == 3 else t.clone()).requires_grad_()
        l = f(x, y, MASK)
        gx, gy = torch.autograd.grad(l, (x, y))
        seen.append((l, gx, gy))
        assert l.isfinite() and (gx[~MASK] == 0).all() and (t.dim() == 2 or (gy[~MASK] == 0).all())
        assert gx[MASK].abs().sum() > 0
        assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[-1]))


@each
def test_longer_padding_and_no_mask(name):
    f, (s, t) = ALL[name], inputs(name)
    pad = lambda x: torch.cat([x, 9 * torch.ones_like(x[:, :3])], 1) if x.dim() == 3 else x
    close(f(pad(s), pad(t), torch.cat([MASK, torch.zeros(B, 3, dtype=torch.bool)], 1)), f(s, t, MASK))
    close(f(s, t, None), f(s, t, torch.ones(B, L, dtype=torch.bool)))


@each
def test_only_padding_costs_nothing(name):
    f, (s, t) = ALL[name], inputs(name)
    s.requires_grad_()
    l = f(s, t, MASK & False)
    assert l.item() == 0
    assert (torch.autograd.grad(l, s)[0] == 0).all() if l.requires_grad else True
    gone = MASK.clone()
    gone[2] = False
    x = s.detach().requires_grad_()
    (g,) = torch.autograd.grad(f(x, t, gone), x)
    assert g.isfinite().all() and (g[2] == 0).all()


@each
def test_precision(name):
    f = ALL[name]
    want = f(*inputs(name), MASK)
    assert want.dtype == torch.float64 and want.shape == ()
    for d, tol in ((torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        s, t = inputs(name, d)
        l = f(s, t, MASK)
        assert l.dtype == torch.float32
        close(l.double(), want, atol=tol)
        exact = f(s.double(), t.double(), MASK)
        close(l.double(), exact, atol=1e-4)  # the arithmetic is float32: only the inputs were rounded
        with torch.autocast("cpu", torch.bfloat16):
            s.requires_grad_()
            a = f(s, t, MASK)
            assert torch.equal(a, l)
            a.backward()
            assert s.grad.isfinite().all()


@each
def test_teacher_states_of_inference_mode(name):
    f, (s, t) = ALL[name], inputs(name)
    with torch.inference_mode():
        u = t.clone()
    s.requires_grad_()
    l = f(s, u, None)
    l.backward()
    close(l, f(s, t, None))


@pytest.mark.parametrize(
    "name", [n for n in ALL if n not in ("hinge given", "hinge random") and "paired" not in n]
)  # there the order chooses the negatives
def test_order_of_the_batch_does_not_matter(name):
    f, (s, t) = ALL[name], inputs(name)
    p = torch.tensor([3, 0, 4, 1, 2])
    close(f(s[p], t[p], MASK[p]), f(s, t, MASK))


@each
def test_gradcheck(name):
    f, (s, t) = ALL[name], inputs(name)
    s, t, m = (
        s[:, :3].clone().requires_grad_(),
        (t[:, :3] if t.dim() == 3 else t).clone().requires_grad_(),
        MASK[:, :3],
    )
    assert torch.autograd.gradcheck(lambda a, b: f(a, b, m), (s, t), fast_mode=True)


@pytest.mark.parametrize("f", PUBLIC, ids=lambda f: f.__name__)
def test_shapes_that_do_not_fit_are_named(f):
    s = torch.zeros(B, L, D)
    t = torch.zeros(B, D) if f in (token_hinge, info_nce) else torch.zeros(B, L, D)
    wrong = (
        [t[:-1]] + ([t[..., :-1]] if f is not nst else []) + ([t[:, :-1]] if t.dim() == 3 else [t[:, None]])
    )
    for w in wrong:
        with pytest.raises(ValueError) as e:
            f(s, w)
        assert str(tuple(s.shape)) in str(e.value) and str(tuple(w.shape)) in str(e.value)
    for m in (MASK[:-1], MASK[:, :-1], MASK[0]):
        with pytest.raises(ValueError) as e:
            f(s, t, m)
        assert str(tuple(m.shape)) in str(e.value)
    for m in (MASK.long(), MASK.float()):
        with pytest.raises(ValueError, match="boolean"):
            f(s, t, m)


def test_options_that_do_not_exist_are_refused():
    s, v = torch.zeros(B, L, D), torch.zeros(B, D)
    for f in (
        lambda: token_hinge(s, v, sides="left"),
        lambda: token_hinge(s, v, reduction="avg"),
        lambda: token_hinge(s, v, negatives="easy"),
        lambda: token_hinge(s, v, negatives=torch.tensor([0, 1, 2, 3, 4])),
        lambda: token_hinge(s, v, negatives=torch.tensor([1, 2, 3, 4, 5])),
        lambda: token_hinge(s, v, negatives=NEG[:4]),
        lambda: token_hinge(s, v, negatives=NEG.float()),
        lambda: info_nce(s, v, temperature=0.0),
        lambda: nst(s, s, kernel="linear"),
        lambda: nst(s, s, sigma=0),
        lambda: soft_label(s, s, temperature=-1.0),
        lambda: nt_xent(s, s, temperature=0),
        lambda: objective("nst", "draft"),
        lambda: objective("hinge"),
    ):
        with pytest.raises(ValueError):
            f()


@pytest.mark.parametrize("n", ["random", "all", "hardest", "paired"])
def test_one_sentence_has_no_negatives(n):
    with pytest.raises(ValueError, match="at least 2"):
        token_hinge(torch.zeros(1, L, D), torch.zeros(1, D), negatives=n)
    with pytest.raises(ValueError, match="at least 2"):
        derangement(1)


def test_derangements():
    for n in (2, 3, 8):
        for i in range(50):
            p = derangement(n, generator("p", n, i))
            assert sorted(p.tolist()) == list(range(n)) and (p != torch.arange(n)).all()
    assert torch.equal(derangement(8, generator("a")), derangement(8, generator("a")))


def test_random_hinge_is_on_average_the_mean_over_others():
    s, v = inputs("hinge random")
    g = generator("mc")
    close(
        torch.stack([token_hinge(s, v, MASK, generator=g) for _ in range(1500)]).mean(),
        token_hinge(s, v, MASK, negatives="all"),
        atol=0.02,
    )
    assert token_hinge(s, v, MASK, negatives="hardest") >= token_hinge(s, v, MASK, negatives="all")


def test_odd_batch_of_the_public_code():
    s, v = inputs("hinge given")
    e = torch.tensor([0, 1, 2, 3, 4, 4])
    kw = preset("released")["token_hinge"]
    close(
        token_hinge(s, v, MASK, **kw),
        token_hinge(s[e], v[e], MASK[e], **{**kw, "negatives": torch.tensor([3, 4, 5, 0, 1, 2])}),
    )
    assert token_hinge(s, v, MASK, **kw, reduction="none").shape == (B,)


def test_nst_widths_and_token_count():
    s, t = data(B, L, D, name="a"), data(B, L, 11, name="b")
    for kw in ({}, dict(kernel="poly")):
        assert nst(s, t, MASK, **kw) > 0
        close(
            nst(s, torch.cat([s, s], -1), MASK, **kw), 0.0
        )  # the same neurons twice are the same distribution
        one = [nst(s[b : b + 1, :n], t[b : b + 1, :n], **kw) for b, n in enumerate(LENGTHS)]
        close(nst(s, t, MASK, **kw), torch.stack(one).mean())


def test_voken_labels():
    x, y = data(B, L, D, name="x"), torch.arange(B * L).view(B, L) % D
    close(voken(x, y, MASK), F.cross_entropy(x[MASK], y[MASK]))
    close(voken(x, y.masked_fill(~MASK, -100).to(torch.int16)), voken(x, y, MASK))
    assert (
        voken(x.bfloat16(), y).dtype == torch.float32
        and voken(x, y.masked_fill(MASK | ~MASK, -100)).item() == 0
    )
    junk = x.masked_fill(~MASK[..., None], float("nan")).requires_grad_()
    l = voken(junk, y.masked_fill(~MASK, 10**6), MASK)
    (g,) = torch.autograd.grad(l, junk)
    close(l, voken(x, y, MASK))
    assert (g[~MASK] == 0).all()
    for bad in (y[:, 1:], y[0], y.float(), y + 1, y - 1):
        with pytest.raises(ValueError):
            voken(x, bad)


# CRD


def crd(bank="queue", **kw):
    seed_everything(5)
    return CRD(D, 9, **{**dict(feature_dim=4, negatives=6, bank=bank, bank_size=10), **kw}).double()


def batch(k, n=4):
    return data(n, D, name=("s", k)), data(n, 9, name=("t", k)), (torch.arange(n) * 2 + k) % 10


@pytest.mark.parametrize("bank", ["queue", "full"])
def test_crd_trains_both_maps_and_evaluation_changes_nothing(bank):
    c = crd(bank)
    for k in range(3):
        l = c(*batch(k))
    l.backward()
    assert l.item() > 0 and all(p.grad.abs().sum() > 0 for p in c.parameters())
    c.eval()
    before = copy.deepcopy(c.state_dict())
    assert torch.equal(c(*batch(9)), c(*batch(9)))
    assert all(torch.equal(v, before[k]) for k, v in c.state_dict().items())
    c.train()
    c(*batch(9))
    assert not torch.equal(c.memory_v1, before["memory_v1"])


@pytest.mark.parametrize("bank", ["queue", "full"])
def test_crd_resumes_exactly(bank):
    a = crd(bank)
    [a(*batch(k)) for k in range(4)]
    f = io.BytesIO()
    torch.save(a.state_dict(), f)
    f.seek(0)
    want = [a(*batch(k)).item() for k in range(4, 8)]
    seed_everything(99)
    b = CRD(D, 9, feature_dim=4, negatives=6, bank=bank, bank_size=10).double()
    b.load_state_dict(torch.load(f, weights_only=True))
    assert [b(*batch(k)).item() for k in range(4, 8)] == want


def test_crd_state_fits_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    a = crd()
    a(*batch(0))
    save_file(a.state_dict(), tmp_path / "c.safetensors")
    b = crd()
    b.load_state_dict(load_file(tmp_path / "c.safetensors"))
    assert a(*batch(1)).item() == b(*batch(1)).item()


def test_queue_keeps_the_last_pairs():
    c = crd()
    rows = []
    for k in range(5):
        s, t, _ = batch(k)
        rows += list(zip(*(x.detach() for x in c.features(s, t))))
        c(s, t)
    assert {tuple(r.tolist()) for r in c.memory_v2} == {tuple(t.tolist()) for _, t in rows[-10:]}
    for s, t in rows[-10:]:  # a pair stays a pair
        i = (c.memory_v1 == s).all(1).nonzero().item()
        assert torch.equal(c.memory_v2[i], t)
    s, t, _ = batch(77, 23)
    c(s, t)
    f = c.features(s, t)[0].detach()
    assert {tuple(r.tolist()) for r in c.memory_v1} == {tuple(r.tolist()) for r in f[-10:]}


def test_full_bank_updates_with_momentum_only_what_it_saw():
    c = crd("full", momentum=0.25)
    old = c.memory_v2.clone()
    s, t, i = batch(0)
    c(s, t, i)
    t = c.features(teacher=t)[1]
    close(c.memory_v2[i].detach(), F.normalize(0.25 * old[i] + 0.75 * t, dim=-1).detach())
    rest = [k for k in range(10) if k not in i.tolist()]
    assert torch.equal(c.memory_v2[rest], old[rest])
    z = c.log_z.clone()
    c(s, t.new_zeros(4, 9), i)
    assert torch.equal(c.log_z, z)


def test_crd_precision_and_errors():
    for bank in ("queue", "full"):
        for d in (torch.bfloat16, torch.float16):
            c = crd(bank).to(d)
            s, t, i = batch(0)
            for _ in range(3):
                l = c(s.to(d), t.to(d), i)
                assert l.dtype == torch.float32 and l.isfinite()
            l.backward()
            assert all(p.grad.isfinite().all() for p in c.parameters())
        c = crd(bank).float()
        s, t, i = batch(0)
        with torch.autocast("cpu", torch.bfloat16):
            assert c(s.float(), t.float(), i).dtype == torch.float32
        for a, b in ((s[:3], t), (s, t[:, :5]), (s[None], t), (s[:, :2], t)):
            with pytest.raises(ValueError) as e:
                crd(bank)(a, b, i)
            assert str(tuple(a.shape)) in str(e.value) and str(tuple(b.shape)) in str(e.value)
    for bad in (None, i[:2], i.double(), i + 9, i - 5):
        with pytest.raises(ValueError, match="index"):
            crd("full")(s, t, bad)
    for kw in (
        dict(bank="ring"),
        dict(bank_size=1),
        dict(negatives=0),
        dict(temperature=0),
        dict(momentum=2),
    ):
        with pytest.raises(ValueError):
            crd(**kw)
    c = crd()
    with pytest.raises(ValueError, match="queue is empty"):
        c(s[:1], t[:1])
    c(s, t)
    assert c(s[:1], t[:1]).isfinite()


# Retrieval


@pytest.mark.parametrize("k,tile", [(1, 4), (1, 1000), (4, 3), (4, 16), (25, 7)])
def test_nearest_is_brute_force(k, tile):
    q, c = data(13, 5, name="q"), data(25, 5, name="c")
    want = F.normalize(q, dim=-1) @ F.normalize(c, dim=-1).T
    s, i = nearest(q, c, k, tile=tile)
    v = want.topk(k, 1)
    assert torch.equal(i, v.indices)
    close(s, v.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lowest_index(dtype):
    c = torch.eye(4, dtype=dtype).repeat_interleave(3, 0)[torch.randperm(12, generator=generator("ties"))]
    for tile in (1, 2, 5, 64):
        _, i = nearest(torch.eye(4, dtype=dtype), c, 3, tile=tile)
        assert i.tolist() == [(c[:, j] == 1).nonzero().flatten().tolist() for j in range(4)]


def test_vokens_and_recall():
    s, pool = data(B, L, D, name="s"), data(9, D, name="pool")
    v = vokens(s.masked_fill(~MASK[..., None], float("nan")), MASK, pool, tile=4)
    assert (v[~MASK] == -100).all() and torch.equal(v[MASK], nearest(s[MASK], pool)[1][:, 0])
    sim = data(30, 30, name="sim")
    r = torch.tensor([sorted(row.tolist(), reverse=True).index(row[i]) + 1 for i, row in enumerate(sim)])
    assert torch.equal(rank_of(sim), r.double()) and recall_at(sim) == recall_at(r)
    assert recall_at(torch.zeros(8, 8), ks=(1, 4)) == dict(R1=1 / 8, R4=0.5, MR=4.5)


# The peers' values

GOLDEN = os.environ.get("VLKD_GOLDEN")
golden = pytest.mark.skipif(
    not GOLDEN,
    reason="VLKD_GOLDEN does not name the folder of the peers' values; the notebooks hold a part of them",
)


def peer(name):
    return json.loads((Path(GOLDEN) / f"{name}.json").read_text())


def T(x):
    return torch.tensor(x, dtype=torch.float64)


@golden
def test_golden_hinge():
    g = peer("hinge_vidlankd")
    t, v, m = T(g["lang"]).requires_grad_(), T(g["visn"]), T(g["mask"]).bool()
    kw = preset("released")["token_hinge"]
    l = token_hinge(t, v, m, **kw)
    close(l, g["paired_margin1"])
    close(token_hinge(t, v, m, **{**kw, "margin": 0.5}), g["paired_margin05"])
    close(token_hinge(t[:3], v[:3], m[:3], **kw), g["paired_odd_batch3_margin1"])
    # the public code normalises upstream of this gradient: take out what is along the (unit) states
    u, gr = t.detach(), T(g["grad_lang"])
    gr = (gr - (gr * u).sum(-1, keepdim=True) * u).masked_fill(~m[..., None], 0)
    close(torch.autograd.grad(l, t)[0], gr)
    g = peer("hinge_paper_eq3")
    close(
        token_hinge(
            T(g["lang"]),
            T(g["visn"]),
            T(g["mask"]).bool(),
            negatives=torch.tensor(g["negatives"]),
            reduction="none",
        ),
        g["per_sample"],
    )


@golden
def test_golden_kd():
    g = peer("kd_softlabel")
    [close(soft_label(T(g["y_s"]), T(g["y_t"]), temperature=float(k)), v) for k, v in g["soft_ce"].items()]
    g = peer("nst_paper_eq7")
    for b in range(4):
        s, t = T(g["s"])[b : b + 1], T(g["t"])[b : b + 1]
        close(nst(s, t, normalize=None), g["mmd2_per_sample"][b])
        close(nst(s, t), g["mmd2_neuron_normalised"][b])
    g = peer("nst_vidlankd")
    s, t = T(g["s"]).requires_grad_(), T(g["t"])
    close(objective("nst", "released")(s, t), g["loss_as_trained"])
    for b in range(4):
        close(nst(s[b : b + 1], t[b : b + 1], kernel="poly"), g["full_mmd_poly_per_sample"][b])
    l = nst(s, t, kernel="poly", teacher_term=False) * released_scale("nst", 4, s.shape[1])
    close(torch.autograd.grad(l, s)[0], g["grad_s_as_trained"])
    g = peer("contrastive_item_vidlankd")
    s, t = T(g["s"]).requires_grad_(), T(g["t"])
    l = objective("nt_xent", "released")(s, t)
    close(l, g["loss_as_trained"])
    close(torch.autograd.grad(l, s)[0], g["grad_s"])
    close(
        nt_xent(s[:, :1], t[:, :1], temperature=0.5) * released_scale("nt_xent", 4, 1),
        g["default_temperature_0_5_pos0"],
    )
    c = peer("nst_repdistiller")["cases"]
    s, t = (T(x).flatten(2).transpose(1, 2) for x in (c[0]["f_s_values"], c[0]["f_t_values"]))
    s.requires_grad_()
    l = nst(s, t, kernel="poly")
    close(l, c[0]["loss"])
    close(torch.autograd.grad(l, s)[0].transpose(1, 2).reshape(T(c[0]["grad_f_s"]).shape), c[0]["grad_f_s"])
    s, t = (
        F.adaptive_avg_pool2d(T(c[1]["f_s_values"]), 3).flatten(2).transpose(1, 2),
        T(c[1]["f_t_values"]).flatten(2).transpose(1, 2),
    )
    close(nst(s, t, kernel="poly"), c[1]["loss"])


def fixed(*shape, seed, scale=1.0):
    n = math.prod(shape)
    k = torch.arange(n, dtype=torch.float64)
    return (scale * torch.sin(0.7 * k + 1.3 * seed + 0.05 * k * k * ((seed % 3) + 1) / n)).view(*shape)


@golden
def test_golden_crd():
    g = peer("crd_repdistiller")
    c = CRD(
        6, 8, feature_dim=4, negatives=5, bank="full", bank_size=10, temperature=torch.tensor(0.07).item()
    ).double()
    with torch.no_grad():
        for p, x in (
            (c.f1.weight, fixed(4, 6, seed=1)),
            (c.f1.bias, fixed(4, seed=2, scale=0.1)),
            (c.f2.weight, fixed(4, 8, seed=3)),
            (c.f2.bias, fixed(4, seed=4, scale=0.1)),
            (c.memory_v1, fixed(10, 4, seed=5, scale=0.75**0.5)),
            (c.memory_v2, fixed(10, 4, seed=6, scale=0.75**0.5)),
        ):
            p.copy_(x)
    for x in g["steps"]:
        s = T(x["f_s"]).requires_grad_()
        es, et = c.features(s, T(x["f_t"]))
        close(es, x["embed_s"])
        close(et, x["embed_t"])
        l = c(s, T(x["f_t"]), torch.tensor(x["idx"]), negatives_index=torch.tensor(x["contrast_idx"])[:, 1:])
        close(l, x["loss"][0] if isinstance(x["loss"], list) else x["loss"])
        close(torch.autograd.grad(l, s)[0], x["grad_f_s"])
        close(c.log_z.exp(), x["params_K_T_Zv1_Zv2_mom"][2:4])
        close(c.memory_v1, x["memory_v1_after"])
        close(c.memory_v2, x["memory_v2_after"])


@golden
def test_golden_retrieval():
    g = peer("open_clip_losses")
    for level in ("sentence", "token"):
        close(
            info_nce(T(g["text"])[:, None], T(g["image"]), level=level, temperature=1 / g["logit_scale"]),
            g["clip_loss"],
        )
    g = peer("video_text_losses")
    assert recall_at(T(g["sim"])) == g["retrieval_metrics"]
    g = peer("voken_retrieval")
    s, i = nearest(T(g["queries"]), T(g["keys"]), 3)
    assert i.tolist() == g["top3"]
    close(s, g["top3_score"], atol=1e-6)
