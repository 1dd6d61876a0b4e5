"Objectives of CLIP-TD and ADVL: equations as loops, padding, precision, derivatives, golden values."

import copy
import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from vlkd.core.device import generator
from vlkd.core.settings import scale
from vlkd.data.text import train_tokenizer
from vlkd.losses.adaptive import (
    LOSS_WEIGHT_FORMS,
    LossWeights,
    ReferenceConfidence,
    confidence_weight,
    itm_info_nce,
    match_probability,
    reference_confidence,
)
from vlkd.losses.targeted import (
    candidate_scores,
    confidence_gate,
    confidence_ratio,
    feature_l1,
    random_tokens,
    scores_of_pieces,
    select_tokens,
    states_at_spans,
    take_tokens,
    token_scores,
    visual_relevance,
)
from vlkd.models.bert import language_model, masked_mean
from vlkd.models.single_stream import Encoded, Layout
from vlkd.models.uniter import UNITER, uniter_config
from vlkd.train.terms import Outputs, TermSetup, term_class, term_names
from vlkd.train.vl_terms import ClipImage, ClipText, ClipTokens, VLFeatures

B, L, D, C = 5, 7, 6, 4
LENGTHS = (7, 1, 4, 0, 2)
MASK = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
JUNK = (0.0, 1e30, math.nan, math.inf, -math.inf)


def draw(*shape, name, dtype=torch.float64):
    return torch.randn(*shape, generator=generator("targeted tests", name), dtype=torch.float64).to(dtype)


def close(a, b, atol=1e-12):
    a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (a, b))
    torch.testing.assert_close(a, b, atol=atol, rtol=atol)


def gradients(loss, *of):
    return torch.autograd.grad(loss, of)


# Distances of features

NORMALIZE = pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalised"])


def direction(v):
    length = math.sqrt(sum(x * x for x in v))
    return [x / length for x in v] if length else v


def l1_loop(student, teacher, mask, normalize):
    "Eqs. 3, 4 and 7 of CLIP-TD, Eqs. 1 and 4 of ADVL, number by number."
    distances = []
    for s, t, counts in zip(student.tolist(), teacher.tolist(), mask.tolist(), strict=True):
        total = 0.0
        for a, b, counted in zip(s, t, counts, strict=True):
            if counted:
                a, b = (direction(a), direction(b)) if normalize else (a, b)
                total += sum(abs(x - y) for x, y in zip(a, b, strict=True))
        distances.append(total)
    return distances


@NORMALIZE
def test_feature_l1_is_the_loop(normalize):
    student, teacher = draw(B, L, D, name="s"), draw(B, L, D, name="t")
    student[0, 0], teacher[2, 1] = 0, 0  # vectors without a direction
    want = l1_loop(student, teacher, MASK, normalize)
    close(feature_l1(student, teacher, MASK, normalize=normalize), want)
    close(feature_l1(student, teacher, MASK, normalize=normalize, mean=True), torch.tensor(want) / D, 1e-6)
    every = torch.ones_like(MASK)
    close(feature_l1(student, teacher, normalize=normalize), l1_loop(student, teacher, every, normalize))
    first = feature_l1(student[:, 0], teacher[:, 0], normalize=normalize)
    close(first, l1_loop(student[:, :1], teacher[:, :1], every[:, :1], normalize))


@NORMALIZE
@pytest.mark.parametrize("junk", JUNK)
def test_feature_l1_never_reads_padding(junk, normalize):
    student, teacher = draw(B, L, D, name="s"), draw(B, L, D, name="t")
    want = feature_l1(student, teacher, MASK, normalize=normalize)
    x, y = (z.masked_fill(~MASK[..., None], junk).requires_grad_() for z in (student, teacher))
    found = feature_l1(x, y, MASK, normalize=normalize)
    assert torch.equal(found, want) and found[3] == 0
    for gradient in gradients(found.sum(), x, y):
        assert gradient.isfinite().all() and (gradient[~MASK] == 0).all() and (gradient[MASK] != 0).any()


@NORMALIZE
def test_feature_l1_derivatives(normalize):
    student, teacher = (draw(2, 3, 4, name=n).requires_grad_() for n in "st")
    for check in (gradcheck, gradgradcheck):
        assert check(lambda a, b: feature_l1(a, b, MASK[[0, 2], :3], normalize=normalize), (student, teacher))
    zero = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = gradients(feature_l1(zero, teacher[:1, 0], normalize=normalize).sum(), zero)
    assert gradient.isfinite().all()
    (gradient,) = gradients(feature_l1(zero, zero.detach(), normalize=normalize).sum(), zero)
    assert (gradient == 0).all()


def test_feature_l1_under_torch_func():
    student, teacher = draw(B, D, name="s"), draw(B, D, name="t")

    def loss(x):
        return feature_l1(x, teacher, normalize=True).sum()

    x = student.clone().requires_grad_()
    close(torch.func.grad(loss)(student), *gradients(loss(x), x))
    both = torch.stack([student, teacher])
    close(torch.func.vmap(loss)(both), torch.stack([loss(z) for z in both]))


@pytest.mark.parametrize("student, teacher", [((B, D), (B, D + 1)), ((B, L, D), (B, D)), ((D,), (D,))])
def test_feature_l1_names_shapes_that_do_not_fit(student, teacher):
    with pytest.raises(ValueError) as error:
        feature_l1(torch.zeros(student), torch.zeros(teacher))
    assert str(student) in str(error.value) and str(teacher) in str(error.value)


def test_feature_l1_refuses_other_masks():
    states = torch.zeros(B, L, D)
    for mask, words in ((MASK[:-1], "(4, 7)"), (MASK[:, 1:], "(5, 6)"), (MASK.float(), "boolean")):
        with pytest.raises(ValueError) as error:
            feature_l1(states, states, mask)
        assert words in str(error.value)


# Scores and selection of tokens


def scores_loop(visual, keyword, mask):
    "Eq. 5 of one text."
    counted = [i for i, counts in enumerate(mask) if counts]
    norms = [sum(abs(x[i]) for i in counted) for x in (visual, keyword)]
    parts = zip((visual, keyword), norms, strict=True)
    shares = [[x[i] / norm if norm else 0.0 for i in counted] for x, norm in parts]
    return dict(zip(counted, map(sum, zip(*shares, strict=True)), strict=True))


NUMBERS = st.sampled_from([-1.0, -0.25, 0.0, 0.25, 0.5, 2.0])  # few values, so that many are equal


@st.composite
def texts(draw_from):
    n = draw_from(st.integers(1, 8))
    row = st.lists(NUMBERS, min_size=n, max_size=n)
    mask = st.lists(st.booleans(), min_size=n, max_size=n)
    return draw_from(row), draw_from(row), draw_from(mask), draw_from(st.integers(1, 10))


@settings(max_examples=200, deadline=None)
@given(texts())
def test_selection_is_the_loop(text):
    visual, keyword, mask, m = text
    want = scores_loop(visual, keyword, mask)
    rows = (torch.tensor([x], dtype=torch.float64) for x in (visual, keyword))
    scores = token_scores(*rows, torch.tensor([mask]))
    assert scores.shape == (1, len(mask))
    for i, score in enumerate(scores[0].tolist()):
        assert score == (pytest.approx(want[i], abs=1e-14) if i in want else -math.inf)
    index, valid = select_tokens(scores, m)
    assert index.shape == valid.shape == (1, m) and (index[~valid] == 0).all()
    best = sorted(want, key=lambda i: (-scores[0, i].item(), i))[:m]
    assert index[valid].tolist() == best
    assert valid[0].tolist() == [k < len(best) for k in range(m)]


@pytest.mark.parametrize("junk", JUNK)
def test_token_scores_never_read_padding(junk):
    visual, keyword = draw(B, L, name="v"), draw(B, L, name="k")
    want = token_scores(visual, keyword, MASK)
    x, y = (z.masked_fill(~MASK, junk).requires_grad_() for z in (visual, keyword))
    found = token_scores(x, y, MASK)
    assert torch.equal(found, want)
    for gradient in gradients(found[MASK].square().sum(), x, y):
        assert gradient.isfinite().all() and (gradient[~MASK] == 0).all()


def test_selection_of_many_ties_is_stable():
    for n in (5, 300, 5000):  # sorts of large rows take another path
        scores = torch.zeros(2, n)
        scores[0, n - 2] = 1
        index, valid = select_tokens(scores, 4)
        assert index.tolist() == [[n - 2, 0, 1, 2], [0, 1, 2, 3]] and valid.all()


def test_no_tokens_and_no_texts():
    nothing = torch.zeros(0, L)
    assert token_scores(nothing, nothing).shape == (0, L)
    assert [x.shape for x in select_tokens(nothing, 3)] == [(0, 3)] * 2
    empty = token_scores(torch.zeros(2, 0), torch.zeros(2, 0))
    index, valid = select_tokens(empty, 3)
    assert index.tolist() == [[0] * 3] * 2 and not valid.any()
    assert feature_l1(torch.zeros(0, D), torch.zeros(0, D)).shape == (0,)
    assert feature_l1(torch.zeros(2, 0, D), torch.zeros(2, 0, D)).tolist() == [0, 0]
    assert confidence_gate(torch.zeros(0, C), torch.zeros(0, C)).shape == (0,)
    assert confidence_weight(torch.zeros(0, C), 0.7).shape == (0,)
    assert itm_info_nce(*torch.zeros(3, 0)).item() == 0
    assert candidate_scores(torch.zeros(0, 2)).shape == (0, 4)


def test_selection_refuses_what_it_cannot_order():
    for m in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="from 1 on"):
            select_tokens(torch.zeros(1, 3), m)
    with pytest.raises(ValueError, match=r"row \[1\].*\(2, 3\)"):
        select_tokens(torch.tensor([[0.0, 1, 2], [0, math.nan, 1]]), 1)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        token_scores(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="boolean"):
        token_scores(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3))


def test_visual_relevance_is_the_cosine():
    image, tokens = draw(B, D, name="i"), draw(B, L, D, name="t")
    tokens[1, 2] = 0
    want = torch.cosine_similarity(image[:, None], tokens, dim=-1)
    close(visual_relevance(image, tokens), want)
    assert visual_relevance(image, tokens)[1, 2] == 0
    with pytest.raises(ValueError, match=r"image \(5, 6\), tokens \(4, 7, 6\)"):
        visual_relevance(image, tokens[1:])


def test_taken_tokens():
    states = draw(B, L, D, name="s")
    index, valid = select_tokens(draw(B, L, name="scores").masked_fill(~MASK, -math.inf), 3)
    taken = take_tokens(states, index)
    for b in range(B):
        for k in range(3):
            assert torch.equal(taken[b, k], states[b, index[b, k]])
    assert valid.sum(1).tolist() == [min(n, 3) for n in LENGTHS]
    with pytest.raises(ValueError, match=r"\(5, 7, 6\).*\(4, 3\)"):
        take_tokens(states, index[1:])


def test_random_tokens_are_a_control_of_equal_number():
    wanted = select_tokens(torch.zeros(B, L).masked_fill(~MASK, -math.inf), 3)[1]
    seen = set()
    for k in range(40):
        index, valid = random_tokens(MASK, 3, generator("random", k))
        assert torch.equal(valid, wanted) and MASK.gather(1, index)[valid].all()
        assert all(len(set(i[v].tolist())) == v.sum() for i, v in zip(index, valid, strict=True))
        seen.add(tuple(index[0].tolist()))
    assert len(seen) > 20
    again = [random_tokens(MASK, 3, generator("random", 0))[0] for _ in range(2)]
    assert torch.equal(*again)


# Words, pieces and characters


def test_scores_of_pieces_are_the_loop():
    scores, words = draw(3, 4, name="words"), torch.randint(-1, 4, (3, 9), generator=generator("words"))
    for share in ("copy", "divide"):
        found, mask = scores_of_pieces(scores, words, share=share)
        for b in range(3):
            for i, word in enumerate(words[b].tolist()):
                pieces = (words[b] == word).sum().item() if share == "divide" else 1
                want = scores[b, word].item() / pieces if word >= 0 else 0.0
                assert found[b, i].item() == pytest.approx(want, abs=1e-14) and mask[b, i] == (word >= 0)
    found, mask = scores_of_pieces(torch.zeros(2, 0), torch.full((2, 3), -1))
    assert not mask.any() and not found.any()
    for bad in (words + 2, words - 1, words.float(), words[1:]):
        with pytest.raises(ValueError, match="scores_of_pieces"):
            scores_of_pieces(scores, bad)


@st.composite
def cuttings(draw_from):
    "Two ways to cut a text of n characters into pieces, as spans."
    n = draw_from(st.integers(1, 12))
    both = []
    for _ in range(2):
        ends = sorted(draw_from(st.sets(st.integers(1, n - 1)))) if n > 1 else []
        both.append(list(zip([0, *ends], [*ends, n], strict=True)))
    return both


@settings(max_examples=100, deadline=None)
@given(cuttings())
def test_states_at_spans_are_means_over_characters(both):
    theirs, ours = both
    states = draw(1, len(theirs) + 1, 3, name=("spans", len(theirs)))
    states[0, -1] = math.nan  # a token without characters
    spans = torch.tensor([[*theirs, (0, 0)]])
    found, valid = states_at_spans(states, spans, torch.tensor([[*ours, (0, 0)]]))
    owner = [k for k, (first, last) in enumerate(theirs) for _ in range(first, last)]
    for i, (first, last) in enumerate(ours):
        close(found[0, i], torch.stack([states[0, owner[c]] for c in range(first, last)]).mean(0))
    assert valid[0].tolist() == [True] * len(ours) + [False] and (found[0, -1] == 0).all()


def test_states_at_spans_name_their_shapes():
    states, spans = torch.zeros(2, 3, D), torch.zeros(2, 3, 2, dtype=torch.long)
    for arguments in ((states[0], spans, spans), (states, spans[:, 1:], spans), (states, spans, spans[1:])):
        with pytest.raises(ValueError, match="states_at_spans"):
            states_at_spans(*arguments)


# The gate


def softmax(row):
    powers = [math.exp(x - max(row)) for x in row]
    return [p / sum(powers) for p in powers]


LOGITS = st.lists(st.sampled_from([-3.0, 0.0, 0.5, 1.0, 4.0]), min_size=3, max_size=3)


@settings(max_examples=200, deadline=None)
@given(LOGITS, LOGITS, st.sampled_from([0.5, 1.0, 1.3, 2.0]))
def test_gate_is_the_loop(clip, student, temperature):
    ratio = temperature * max(softmax(clip)) / max(softmax(student))
    rows = [torch.tensor([x], dtype=torch.float64) for x in (clip, student)]
    close(confidence_ratio(*rows, temperature), [ratio])
    weight = confidence_gate(*rows, temperature=temperature, weight=0.5)
    if abs(ratio - 1) > 1e-12:
        assert weight.tolist() == [0.5 if ratio > 1 else 0.0]
    assert confidence_gate(rows[0], rows[0]).tolist() == [0.0]  # a ratio of exactly 1
    assert confidence_gate(rows[0], rows[0].flip(1)).tolist() == [0.0]


def test_gate_is_a_constant():
    clip, student = (draw(B, C, name=n).requires_grad_() for n in ("clip", "student"))
    assert not confidence_gate(clip, student).requires_grad
    assert confidence_gate(clip, student, temperature=100.0).tolist() == [0.05] * B
    (gradient,) = gradients(confidence_ratio(clip, student).sum(), student)
    assert gradient.abs().sum() > 0


def test_gate_leaves_classes_out():
    clip, student = draw(B, C, name="clip"), draw(B, C, name="student")
    missing = torch.arange(C) == 2
    fewer = [x.masked_fill(missing, -math.inf) for x in (clip, student)]
    close(confidence_ratio(*fewer), confidence_ratio(clip[:, ~missing], student[:, ~missing]))


def test_gate_errors():
    with pytest.raises(ValueError, match=r"\(5, 4\).*\(5, 3\)"):
        confidence_gate(torch.zeros(B, C), torch.zeros(B, 3))
    for options in (dict(temperature=0.0), dict(temperature=-1), dict(weight=-0.1), dict(weight=math.nan)):
        with pytest.raises(ValueError):
            confidence_gate(torch.zeros(B, C), torch.zeros(B, C), **options)


def test_candidates_are_regrouped():
    rows = draw(12, 2, name="rows")
    own, odds = candidate_scores(rows), candidate_scores(rows, score="log_odds")
    for b in range(3):
        for k in range(4):
            no, yes = rows[4 * b + k].tolist()
            assert own[b, k] == yes and odds[b, k].item() == pytest.approx(yes - no)
    for single in (rows[:, 1], rows[:, 1:]):
        for score in ("logit1", "log_odds"):
            close(candidate_scores(single, score=score), own)
    assert candidate_scores(rows, 3).shape == (4, 3)
    for bad in (rows[:11], draw(4, 3, name="x"), draw(2, 4, 2, name="x")):
        with pytest.raises(ValueError, match=str(tuple(bad.shape)).replace("(", r"\(").replace(")", r"\)")):
            candidate_scores(bad)
    with pytest.raises(ValueError, match="logit0"):
        candidate_scores(rows, score="logit0")


# ADVL: weights of instances


@settings(max_examples=200, deadline=None)
@given(LOGITS, st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]), st.sampled_from([0.5, 1.0, 2.5]))
def test_confidence_weight_is_the_loop(logits, average, temperature):
    ratio = max(average, 0.5) / max(softmax(logits))
    want = 1 / (1 + math.exp(1 - ratio)) / temperature
    row = torch.tensor([logits], dtype=torch.float64)
    close(confidence_weight(row, average, temperature), [want])
    tensors = torch.tensor(average, dtype=torch.float64), torch.tensor(temperature, dtype=torch.float64)
    close(confidence_weight(row, *tensors), [want])


def test_confidence_weight_derivatives():
    logits, T = (
        draw(B, C, name="z").requires_grad_(),
        torch.tensor(2.5, dtype=torch.float64, requires_grad=True),
    )
    for check in (gradcheck, gradgradcheck):
        assert check(lambda z, T: confidence_weight(z, 0.8, T), (logits, T))
    assert not confidence_weight(logits.detach(), 0.8).requires_grad


def test_confidence_weight_errors():
    logits = torch.zeros(B, C)
    for average in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="average_confidence"):
            confidence_weight(logits, average)
    for arguments in (dict(temperature=0.0), dict(floor=2.0)):
        with pytest.raises(ValueError):
            confidence_weight(logits, 0.7, **arguments)
    with pytest.raises(ValueError, match=r"\(4,\)"):
        confidence_weight(logits[0], 0.7)


def test_reference_confidence_is_counted_in_any_parts(tmp_path):
    logits, labels = draw(30, C, name="z"), torch.arange(30) % C
    right = [i for i in range(30) if max(range(C), key=lambda k: logits[i, k]) == labels[i]]
    want = sum(max(softmax(logits[i].tolist())) for i in right) / len(right)
    close(reference_confidence(logits, labels), want)
    running, other = ReferenceConfidence(), ReferenceConfidence()
    running.add(logits[:11], labels[:11])
    assert running.value.item() == 0
    save_file(running.state_dict(), tmp_path / "r.safetensors")  # in the middle of a validation
    other.load_state_dict(load_file(tmp_path / "r.safetensors"))
    for reference in (running, other):
        reference.add(logits[11:], labels[11:])
        close(reference.refresh(), want)
        close(reference.value, want)
    assert running.value.item() == other.value.item()
    running.add(logits[:11], labels[:11])  # the next epoch forgets the last
    close(running.refresh(), reference_confidence(logits[:11], labels[:11]))
    assert reference_confidence(logits.bfloat16(), labels).dtype == torch.float32
    assert reference_confidence(logits[:0], labels[:0]).item() == 0
    for bad in (labels[1:], labels.float(), labels[:, None]):
        with pytest.raises(ValueError, match="labels"):
            running.add(logits, bad)


# ADVL: learned weights


FORMS = pytest.mark.parametrize("form", LOSS_WEIGHT_FORMS)


@FORMS
def test_loss_weights_begin_where_they_should(form):
    weights = LossWeights(form, E=0.7, F=1.6, T=2.5, dtype=torch.float64)
    close(torch.stack([weights.E, weights.F, weights.T]), [0.7, 1.6, 2.5])
    assert LossWeights(form).E.dtype == torch.float32 and len(list(weights.parameters())) == 1


@FORMS
def test_loss_weights_are_the_equation(form):
    weights = LossWeights(form, E=0.7, F=1.6, T=2.5, dtype=torch.float64)
    logits = draw(B, C, name="z")
    v, t, more = (draw(B, name=n).abs() for n in ("v", "t", "more"))
    w = confidence_weight(logits, 0.8, weights.T)
    want = sum(w[b] * (0.7 * v[b] + 1.6 * (t[b] + more[b])) for b in range(B)) / B
    penalty = -math.log(0.7 / 2.5) - math.log(1.6 / 2.5) if form == "uncertainty" else 0.0
    close(weights(w, v, t, more), want + penalty)
    close(weights(w, v, t), sum(w[b] * (0.7 * v[b] + 1.6 * t[b]) for b in range(B)) / B + penalty)
    (gradient,) = gradients(weights(w, v, t, more), weights.raw)
    assert gradient.isfinite().all() and (gradient != 0).all()
    assert weights(w[:0], v[:0], t[:0]).isfinite()
    for bad in ((w, v[1:], t), (w, v, t, more[1:]), (w[:, None], v, t), (w[:, None], v[:, None], t[:, None])):
        with pytest.raises(ValueError, match="LossWeights"):
            weights(*bad)


def descend(form, steps=300):
    weights = LossWeights(form, dtype=torch.float64)
    adam = torch.optim.Adam(weights.parameters(), lr=0.05)
    one = torch.ones(1, dtype=torch.float64)
    for _ in range(steps):
        adam.zero_grad()
        weights(one / weights.T, 2 * one, 4 * one).backward()
        adam.step()
    return [x.item() for x in (weights.E, weights.F, weights.T)]


def test_loss_weights_as_printed_have_no_minimum_and_other_forms_are_bounded():
    E, F, _ = descend("free")
    assert E < 0 and F < 0
    E, F, T = descend("softplus")
    assert 0 < E < 0.2 and 0 < F < 0.2 and T > 1
    E, F, T = descend("softmax")
    assert abs(E + F - 2) < 1e-6 and E > F >= 0.2 and 1 < T <= 2
    E, F, T = descend("uncertainty")
    close([2 * E / T, 4 * F / T], [1, 1], atol=0.01)


@FORMS
def test_loss_weights_resume_exactly(form):
    weights, other = LossWeights(form, E=0.5), LossWeights(form, E=0.5)
    adams = [torch.optim.Adam(x.parameters(), lr=0.1) for x in (weights, other)]
    v, t = draw(B, name="v").float().abs(), draw(B, name="t").float().abs()

    def step(weights, adam):
        adam.zero_grad()
        weights(1 / weights.T * torch.ones(B), v, t).backward()
        adam.step()

    step(weights, adams[0])
    other.load_state_dict(copy.deepcopy(weights.state_dict()))
    adams[1].load_state_dict(copy.deepcopy(adams[0].state_dict()))
    for pair in zip((weights, other), adams, strict=True):
        step(*pair)
    assert torch.equal(weights.raw, other.raw)


def test_loss_weights_errors():
    with pytest.raises(ValueError, match="not 'exp'"):
        LossWeights("exp")
    for arguments in (dict(E=0.0), dict(F=-1.0), dict(T=0.0)):
        with pytest.raises(ValueError, match="positive"):
            LossWeights("softplus", **arguments)
        assert LossWeights("free", **arguments).raw.isfinite().all()
    for arguments in (dict(E=0.1, F=1.9), dict(floor=0.5), dict(floor=-0.1)):
        with pytest.raises(ValueError, match="floor"):
            LossWeights("softmax", **arguments)


# ADVL: matching


def test_itm_is_the_loop():
    p = torch.rand(3, B, generator=generator("itm"), dtype=torch.float64)
    for tau in (0.07, 1.0, 3.0):
        each = []
        for right, *wrong in p.T.tolist():
            powers = [math.exp(x / tau) for x in (right, *wrong)]
            each.append(-math.log(powers[0] / sum(powers)))
        close(itm_info_nce(*p, temperature=tau), sum(each) / B)
    assert math.log(1 + 2 / math.e) <= itm_info_nce(*p).item() <= math.log(1 + 2 * math.e)
    leaves = [x.clone().requires_grad_() for x in p]
    for check in (gradcheck, gradgradcheck):
        assert check(itm_info_nce, leaves)
    for bad in ((p[0], p[1, 1:], p[2]), (p, p, p), (p[0, 0], p[1, 0], p[2, 0])):
        with pytest.raises(ValueError, match="itm_info_nce"):
            itm_info_nce(*bad)
    with pytest.raises(ValueError, match="positive"):
        itm_info_nce(*p, temperature=0)


def test_match_probability():
    logits = draw(3, B, 2, name="two")
    close(match_probability(logits), torch.sigmoid(logits[..., 1] - logits[..., 0]))
    for bad in (torch.zeros(B, 3), torch.zeros(())):
        with pytest.raises(ValueError, match="match_probability"):
            match_probability(bad)


# Terms

S = scale("smoke")
WIDTHS = TermSetup(S, student=D, teacher=9)


def features_of_pictures(teacher_width=9):
    "A student's packed states of texts and regions, and CLIP's features of the same."
    lengths = torch.tensor([7, 1, 4, 2, 2])
    regions = torch.arange(3) < torch.tensor([3, 1, 2, 2, 3])[:, None]
    layout = Layout(torch.arange(L) < lengths[:, None], regions)
    x = layout.join(
        draw(int(lengths.sum()), D, name="words", dtype=torch.float32),
        draw(int(regions.sum()), D, name="regions", dtype=torch.float32),
    )
    clip = [
        draw(*shape, teacher_width, name=("clip", shape), dtype=torch.float32) for shape in ((B,), (B, L))
    ]
    return Encoded([x.requires_grad_()], layout, x, None), VLFeatures(clip[0], clip[0].flip(0), clip[1])


def test_terms_read_what_a_single_stream_model_gives():
    student, clip = features_of_pictures()
    x = student.states
    mask = student.layout.text_mask
    scores = draw(B, L, name="scores", dtype=torch.float32).masked_fill(~mask, -math.inf)
    weight = torch.tensor([1.0, 0.0, 0.5, 1.0, 2.0])
    batch = dict(token_scores=scores, instance_weight=weight)
    torch.manual_seed(0)
    terms = {
        n: term_class(n)(WIDTHS) for n in term_names("vlkd.train.vl_terms:clip_image+clip_text+clip_tokens")
    }
    found = {name: term(student, clip, batch) for name, term in terms.items()}
    words = mask.sum(1).tolist()
    want = dict.fromkeys(found, 0.0)
    for b in range(B):
        best = sorted(range(words[b]), key=lambda i: -scores[b, i])[:2]
        pairs = [("clip_image", x[b, words[b]], clip.image[b]), ("clip_text", x[b, 0], clip.first[b])]
        pairs += [("clip_tokens", x[b, i], clip.text[b, i]) for i in best]
        for name, ours, theirs in pairs:
            mapped = terms[name].head.weight @ ours + terms[name].head.bias
            want[name] += weight[b] * sum((mapped - theirs).abs()) / B
    for name in found:
        close(found[name], want[name], atol=1e-5)
        assert terms[name].weight == 0.05 and terms[name].count(batch) is None
    (gradient,) = gradients(sum(found.values()), x)
    assert (gradient[1] == 0).all() and all(gradient[b].abs().sum() > 0 for b in (0, 2, 3, 4))


def test_terms_train_a_student():
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = uniter_config(**sizes, vocab_size=30, feature_dim=5, max_position_embeddings=16)
    student = UNITER(config, seed=1).eval()
    text, regions = torch.arange(4) < torch.tensor([[4], [2], [3]]), torch.ones(3, 2, dtype=torch.bool)
    ids = torch.randint(5, 30, text.shape, generator=generator("ids"))
    seen = draw(3, 2, 5, name="features").float(), torch.rand(3, 2, 7, generator=generator("boxes"))
    _, clip = features_of_pictures()
    clip = VLFeatures(clip.image[:3], clip.first[:3], clip.text[:3, :4])
    weight = torch.tensor([1.0, 1.0, 0.0])
    batch = dict(token_scores=torch.zeros(3, 4).masked_fill(~text, -math.inf), instance_weight=weight)
    torch.manual_seed(0)
    names = ("clip_image", "clip_text", "clip_tokens")
    terms = nn.ModuleDict({n: term_class(n)(TermSetup(S, student=16, teacher=9)) for n in names})
    adam = torch.optim.Adam([*student.parameters(), *terms.parameters()], lr=5e-3)
    each = []
    for _ in range(60):
        encoded = student(ids, text, *seen, regions)
        loss = sum(term.weight * term(encoded, clip, batch) for term in terms.values())
        each.append(sum(term.distances(encoded, clip, batch).detach() for term in terms.values()))
        adam.zero_grad()
        loss.backward()
        adam.step()
    first, last = each[0], each[-1]
    assert (last[:2] < 0.4 * first[:2]).all() and last[2] > 0.5 * first[2]


def test_terms_of_one_width_learn_no_map():
    student, clip = features_of_pictures(D)
    setup = TermSetup(S, student=D, teacher=D)
    for term, ours, theirs in ((ClipImage, student.image, clip.image), (ClipText, student.first, clip.first)):
        for args in ({}, dict(normalize=True), dict(mean=True)):
            built = term(setup, **args)
            assert not list(built.parameters())
            close(built(student, clip, {}), feature_l1(ours, theirs, **args).mean(), atol=1e-6)
            close(built.distances(student, clip, {}), feature_l1(ours, theirs, **args), atol=1e-6)
    assert (
        ClipImage(setup)(VLFeatures(draw(0, D, name="x")), VLFeatures(draw(0, D, name="y")), {}).item() == 0
    )


def test_token_terms_take_fewer_where_a_text_is_short():
    student, clip = features_of_pictures(D)
    setup = TermSetup(S, student=D, teacher=D)
    mask = student.layout.text_mask
    batch = dict(token_scores=torch.zeros(B, L).masked_fill(~mask, -math.inf))
    several = ClipTokens(setup, m=3).distances(student, clip, batch)
    means = ClipTokens(setup, m=3, reduce="mean").distances(student, clip, batch)
    close(several, feature_l1(student.text[:, :3], clip.text[:, :3], mask[:, :3]), atol=1e-6)
    close(means, several / mask[:, :3].sum(1), atol=1e-6)
    nothing = ClipTokens(setup, reduce="mean").distances(
        student, clip, dict(token_scores=torch.full((B, L), -math.inf))
    )
    assert (nothing == 0).all()


def test_terms_refuse_students_without_pictures():
    tokenizer = train_tokenizer(["a kettle", "it broke"], 40)
    batch = dict(ids=torch.ones(B, 3, dtype=torch.long), mask=torch.ones(B, 3, dtype=torch.bool))
    text_student = Outputs(language_model(S, tokenizer, 0), batch | dict(masked=batch["ids"]))
    _, clip = features_of_pictures()
    for term in (ClipImage, ClipText):
        with pytest.raises(ValueError, match="of the student, which Outputs does not have"):
            term(WIDTHS)(text_student, clip, batch)
    with pytest.raises(ValueError, match="token_scores"):
        ClipTokens(WIDTHS)(text_student, clip, batch)
    with pytest.raises(ValueError, match="one width"):
        ClipText(TermSetup(S, student=D, teacher=9, head=False))
    with pytest.raises(ValueError, match="sum or mean"):
        ClipTokens(WIDTHS, reduce="max")


# Precision

FUNCTIONS = {
    "feature_l1": (feature_l1, [(B, L, D), (B, L, D)]),
    "feature_l1 normalised": (lambda s, t: feature_l1(s, t, normalize=True), [(B, L, D), (B, L, D)]),
    "visual_relevance": (visual_relevance, [(B, D), (B, L, D)]),
    "token_scores": (token_scores, [(B, L), (B, L)]),
    "confidence_ratio": (confidence_ratio, [(B, C), (B, C)]),
    "candidate_scores": (lambda z: candidate_scores(z, 5, score="log_odds"), [(B, 2)]),
    "confidence_weight": (lambda z: confidence_weight(z, 0.8), [(B, C)]),
    "itm_info_nce": (itm_info_nce, [(B,), (B,), (B,)]),
    "match_probability": (match_probability, [(B, 2)]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_precision(name):
    function, shapes = FUNCTIONS[name]
    given_ = [draw(*shape, name=(name, k)) for k, shape in enumerate(shapes)]
    want = function(*given_)
    assert want.dtype == torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = [x.to(dtype).requires_grad_() for x in given_]
        found = function(*rounded)
        assert found.dtype == torch.float32
        close(found, function(*(x.detach().double() for x in rounded)), atol=1e-4)  # inputs are rounded alone
        with torch.autocast("cpu", torch.bfloat16):
            again = function(*rounded)
            assert torch.equal(again, found)
            again.sum().backward()
        assert all(x.grad.isfinite().all() for x in rounded)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_as_one_graph(name):
    torch.compiler.reset()
    function, shapes = FUNCTIONS[name]
    given_ = [draw(*shape, name=(name, k)) for k, shape in enumerate(shapes)]
    close(torch.compile(function, backend="eager", fullgraph=True)(*given_), function(*given_))


def test_selection_compiles_as_one_graph():
    torch.compiler.reset()
    scores = token_scores(draw(B, L, name="v"), draw(B, L, name="k"), MASK)
    compiled = torch.compile(lambda x: select_tokens(x, 3), backend="eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(scores), select_tokens(scores, 3), strict=True))


def test_teacher_states_of_inference_mode():
    student, teacher = draw(B, D, name="s").requires_grad_(), draw(B, D, name="t")
    with torch.inference_mode():
        frozen = teacher.clone()
    loss = feature_l1(student, frozen, normalize=True).sum()
    loss.backward()
    close(loss, feature_l1(student, teacher, normalize=True).sum())


# Golden values

GOLDEN = os.environ.get("VLKD_GOLDEN")
golden = pytest.mark.skipif(not GOLDEN, reason="VLKD_GOLDEN does not name the folder of golden values")


def peer(name):
    return json.loads((Path(GOLDEN) / f"{name}.json").read_text())


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


@golden
def test_golden_naive():
    g = peer("clip_td_equations")["naive"]
    total = g["L_task"]
    for key, student, teacher in (
        ("L_dv", "student_image", "clip_image_cls"),
        ("L_dt", "student_text_cls", "clip_text_eos"),
    ):
        s, t = tensor(g[student]).requires_grad_(), tensor(g[teacher])
        each = feature_l1(s, t)
        close(each, g[f"{key}_per_sample"])
        close(each.mean(), g[key])
        close(*gradients(each.mean(), s), tensor(g[f"grad_{student}_of_{key}"]))
        close(feature_l1(s, t, mean=True).mean(), g["elementwise_mean_not_the_norm"][key])
        total = total + g["w"] * each.mean()
    close(total, g["L_final"])


@golden
def test_golden_token_selection():
    for case in peer("clip_td_equations")["token_selection"]["cases"]:
        mask = torch.tensor([case["mask"]]).bool()
        visual = visual_relevance(tensor([case["image"]]), tensor([case["tokens"]]))
        close(visual[mask], tensor([case["s_vr"]])[mask])
        scores = token_scores(visual, tensor([case["s_si"]]), mask)
        close(scores[mask], tensor([case["score"]])[mask])
        assert (scores[~mask] == -math.inf).all()
        index, valid = select_tokens(scores, case["m"])
        assert index[valid].tolist() == case["selected"], case["name"]


def golden_tokens(g, normalize):
    student, teacher = tensor(g["student_tokens"]).requires_grad_(), tensor(g["teacher_tokens"])
    scores = tensor(g["score"]).masked_fill(~torch.tensor(g["mask"]).bool(), -math.inf)
    index, valid = select_tokens(scores, g["m"])
    assert [i[v].tolist() for i, v in zip(index, valid, strict=True)] == g["selected"]
    taken = take_tokens(student, index), take_tokens(teacher, index)
    each = feature_l1(*taken, valid, normalize=normalize)
    single = feature_l1(*(x.flatten(0, 1) for x in taken), normalize=normalize).view(valid.shape)
    for b, values in enumerate(g["per_token"]):
        close(single[b][valid[b]], values)
    close(each, g["L_dt_prime_per_sample"])
    close(each.mean(), g["L_dt_prime"])
    close(each.sum() / valid.sum(), g["mean_over_selected_tokens_not_the_sum"])
    close(*gradients(each.mean(), student), tensor(g["grad_student_tokens"]))
    return each.detach()


@golden
def test_golden_selected_tokens_and_total():
    g = peer("clip_td_equations")
    tokens = golden_tokens(g["selected_tokens"], normalize=False)
    naive = g["naive"]
    distances = tensor(naive["L_dv_per_sample"]) + tensor(naive["L_dt_per_sample"]) + tokens
    final = naive["L_task"] + naive["w"] * distances.mean()
    close(final, g["selected_tokens"]["L_final_with_naive"])
    case = g["confidence_weight"]["cases"][2]
    logits = (tensor(g["confidence_weight"][f"logits_{who}"]) for who in ("clip", "student"))
    gate = confidence_gate(*logits, temperature=case["T"], weight=case["w"])[: len(distances)]
    close(gate, g["total"]["weight"])
    close(g["total"]["L_task"] + (gate * distances).mean(), g["total"]["L_final"])


@golden
def test_golden_gate():
    g = peer("clip_td_equations")["confidence_weight"]
    clip, student = tensor(g["logits_clip"]), tensor(g["logits_student"])
    close(clip.softmax(-1).amax(-1), g["confidence_clip"])
    cases = [(case, clip, student) for case in g["cases"]]
    masked = g["with_class_mask"]
    missing = ~torch.tensor(masked["class_mask"]).bool()
    cases.append((masked, *(x.masked_fill(missing, -math.inf) for x in (clip, student))))
    for case, a, b in cases:
        close(confidence_ratio(a, b, case["T"]), case["ratio"])
        close(confidence_gate(a, b, temperature=case["T"], weight=case["w"]), case["weight"])


@golden
def test_golden_candidates():
    g = peer("clip_td_equations")["vcr_candidates_as_classes"]
    rows = tensor(g["rows_2way"])
    for score in ("logit1", "log_odds"):
        found = candidate_scores(rows, len(g[score][0]), score=score).softmax(-1)
        close(found, tensor(g[score]))
        close(found.amax(-1), g[f"confidence_{score}"])
    logits = tensor(g["vlbert_logits"])
    found = candidate_scores(logits.flatten(), logits.shape[1]).softmax(-1)
    close(found, tensor(g["vlbert_softmax"]))
    close(found.amax(-1), g["confidence_vlbert"])


@golden
def test_golden_advl_distances():
    g = peer("advl_equations")
    text = g["text"]
    student, teacher = tensor(text["student"]).requires_grad_(), tensor(text["teacher"])
    each = feature_l1(student, teacher, normalize=True)
    close(each, text["L_dt_per_sample"])
    close(each.mean(), text["L_dt"])
    close(*gradients(each.mean(), student), tensor(text["grad_student"]))
    for name in ("scaled_copy", "zero_vector"):
        case = text[name]
        close(feature_l1(tensor(case["student"]), teacher, normalize=True), case["L_dt_per_sample"])
    g = g["vision"]
    tokens = tensor(g["student_tokens"]).requires_grad_()
    means = [
        masked_mean(x, torch.tensor(g[f"{who}_mask"]).bool())
        for who, x in (("student", tokens), ("teacher", tensor(g["teacher_tokens"])))
    ]
    close(means[0], tensor(g["student_mean"]))
    each = feature_l1(*means, normalize=True)
    close(each, g["L_dv_per_sample"])
    close(each.mean(), g["L_dv"])
    close(*gradients(each.mean(), tokens), tensor(g["grad_student_tokens"]))


@golden
def test_golden_advl_weights():
    g = peer("advl_equations")["confidence_weight"]
    close(tensor(g["logits"]).softmax(-1).amax(-1), g["C"])
    for case in g["cases"]:
        logits, T = tensor(g["logits"]).requires_grad_(), tensor(case["T"]).requires_grad_()
        weight = confidence_weight(logits, case["C_avg"], T)
        close(weight, case["weight"])
        rows = logits.detach().split(1)
        of_T = [gradients(confidence_weight(row, case["C_avg"], T), T)[0] for row in rows]
        close(torch.stack(of_T), case["dw_dT"])
        (of_logits,) = gradients(weight.sum(), logits)
        close(of_logits, tensor(case["dw_dlogits_if_not_detached"]))
    g = peer("advl_equations")["reference_confidence"]
    close(reference_confidence(tensor(g["logits"]), torch.tensor(g["labels"])), g["C_avg"])
    wrong = (tensor(g["logits"]).argmax(-1) + 1) % len(g["logits"][0])
    close(reference_confidence(tensor(g["logits"]), wrong), g["C_avg_if_none_is_correct"])


@golden
def test_golden_advl_total():
    g = peer("advl_equations")
    tokens = golden_tokens(g["selected_tokens"], normalize=True)
    total = g["total"]
    weights = LossWeights("free", E=total["E"], F=total["F"], T=total["T"], dtype=torch.float64)
    vision, text = tensor(g["vision"]["L_dv_per_sample"]), tensor(g["text"]["L_dt_per_sample"])
    logits = tensor(g["confidence_weight"]["logits"])[: len(vision)]
    weight = confidence_weight(logits, g["confidence_weight"]["cases"][3]["C_avg"], weights.T)
    close(weight, total["weight"])
    close(weights(weight, vision, text), total["L_d_eq3"])
    loss = weights(weight, vision, text, tokens)
    close(loss, total["L_d_eq5"])
    close(total["L_task"] + loss, total["L_final"])
    close(*gradients(loss, weights.raw), [total[f"dL_d{name}"] for name in "EFT"])
    stage = g["itm"]["stage_1_total"]
    close(itm_info_nce(*tensor(g["itm"]["triples"]).T) + loss, stage["L_final"])


@golden
def test_golden_itm():
    g = peer("advl_equations")["itm"]
    probabilities = tensor(g["probabilities"])
    close(tensor(g["pair_logits"]).sigmoid(), probabilities)
    i = torch.arange(len(probabilities))
    j, k = torch.tensor(g["swapped_text"]), torch.tensor(g["swapped_image"])
    triples = torch.stack([probabilities[i, i], probabilities[i, j], probabilities[k, i]], 1)
    close(triples, tensor(g["triples"]))
    for case in g["cases"]:
        p = tensor(g["triples"]).requires_grad_()
        loss = itm_info_nce(*p.T, temperature=case["tau"])
        close(loss, case["loss"])
        each = [itm_info_nce(*row[:, None], temperature=case["tau"]) for row in p]
        close(torch.stack(each), case["per_sample"])
        close(*gradients(loss, p), tensor(case["grad_probabilities"]))
    two = g["from_2way_logits"]
    found = match_probability(tensor(two["logits"]))
    close(found, tensor(two["probabilities"]))
    close(torch.stack([itm_info_nce(*row[:, None]) for row in found]), two["per_sample"])
    for row, want in zip(tensor(g["extremes"]["triples"]), g["extremes"]["per_sample"], strict=True):
        close(itm_info_nce(*row[:, None]), want)
