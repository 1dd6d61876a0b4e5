"Scores of vision-language tasks, clusters without labels, modality importance: loops, limits, golden values."

import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertForMaskedLM, RobertaConfig, RobertaModel
from transformers.models.bert.modeling_bert import BertEncoder

from vlkd.core.device import generator
from vlkd.core.files import rng
from vlkd.core.settings import scale
from vlkd.eval.importance import (
    attention_row,
    attention_strips,
    importance_curves,
    importance_heatmaps,
    recorded_attention,
)
from vlkd.eval.vl import (
    cluster_centres,
    cluster_zero_shot,
    importance_by_instance,
    modality_importance,
    vcr_accuracies,
    vqa_soft_scores,
)
from vlkd.models.bert import bert_config
from vlkd.models.single_stream import Encoded, Layout, run_layers, single_stream_config

# VCR

VALUES = st.sampled_from([-1.0, 0.0, 0.5, 2.0])  # few, so that scores are often equal


@st.composite
def vcr_results(draw):
    n, candidates = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    row = st.lists(VALUES, min_size=candidates, max_size=candidates)
    rows = st.lists(row, min_size=n, max_size=n)
    labels = st.lists(st.integers(0, candidates - 1), min_size=n, max_size=n)
    return draw(rows), draw(rows), draw(labels), draw(labels)


@settings(max_examples=100, deadline=None)
@given(vcr_results())
def test_vcr_accuracies_are_the_loop(results):
    answers, rationales, answer_labels, rationale_labels = results
    counts = [0, 0, 0]
    for a, r, i, j in zip(*results, strict=True):
        right = a.index(max(a)) == i, r.index(max(r)) == j  # the first of equal scores
        counts = [x + y for x, y in zip(counts, (*right, all(right)), strict=True)]
    want = [count / len(answers) for count in counts]
    assert list(vcr_accuracies(*results)) == pytest.approx(want)
    tensors = (torch.tensor(x) for x in (answers, rationales))
    columns = (torch.tensor(x)[:, None] for x in (answer_labels, rationale_labels))
    assert list(vcr_accuracies(*tensors, *columns)) == pytest.approx(want)
    assert vcr_accuracies(*results)[2] <= min(vcr_accuracies(*results)[:2])


def test_vcr_takes_scores_of_a_model():
    scores = torch.randn(6, 4, generator=generator("vcr"), requires_grad=True)
    labels = scores.argmax(1)
    assert vcr_accuracies(scores.bfloat16(), scores, labels, (labels + 1) % 4) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(answer_scores=np.zeros((3, 4))), "3"),
        (dict(answer_scores=np.zeros(2)), "(N, C)"),
        (dict(answer_scores=np.zeros((0, 4))), "(0, 4)"),
        (dict(answer_scores=np.array([[0, 1], [np.nan, 0]])), "row 1"),
        (dict(answer_scores=[["a", "b"], ["c", "d"]]), "numbers"),
        (dict(answer_label=[0, 4]), "0 to 3"),
        (dict(rationale_label=[-1, 0]), "rationale_label"),
        (dict(rationale_label=[0.0, 1.0]), "integer"),
        (dict(rationale_label=[True, False]), "integer"),
        (dict(answer_label=[0]), "(1,)"),
        (dict(answer_label=[[0, 1], [1, 0]]), "(2, 2)"),
    ],
)
def test_vcr_refuses(bad, words):
    good = dict(answer_scores=np.eye(4)[:2], rationale_scores=np.eye(4)[:2])
    good |= dict(answer_label=[0, 1], rationale_label=[0, 1])
    with pytest.raises(ValueError) as error:
        vcr_accuracies(**(good | bad))
    assert words in str(error.value)


# VQA


def test_vqa_takes_the_soft_score_of_the_best_answer():
    logits, targets = rng("logits").normal(size=(30, 7)).round(1), rng("targets").random((30, 7))
    logits[3] = 0
    want = [t[list(z).index(max(z))] for z, t in zip(logits, targets, strict=True)]
    assert vqa_soft_scores(logits, targets).tolist() == want
    assert vqa_soft_scores(torch.tensor(logits), torch.tensor(targets)).tolist() == want
    for bad in ((logits, targets[1:]), (logits, targets + 1), (logits * np.nan, targets), (logits[:0],) * 2):
        with pytest.raises(ValueError):
            vqa_soft_scores(*bad)


# Clusters on a line


def least_cost(values, k):
    "The least sum of squares of all partitions of sorted values into k intervals."
    values, best = sorted(values), math.inf
    for cut in itertools.combinations(range(1, len(values)), k - 1):
        parts = np.split(np.array(values), cut)
        best = min(best, sum(((part - part.mean()) ** 2).sum() for part in parts))
    return best


SMALL = st.lists(st.integers(-6, 6).map(float), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(SMALL, st.integers(1, 5))
def test_clusters_are_the_best_of_all_partitions(values, k):
    if len(set(values)) < k:
        with pytest.raises(ValueError, match=f"{k} clusters"):
            cluster_zero_shot(values, k)
        return
    centres = cluster_centres(values, k)
    clusters = cluster_zero_shot(values, k)
    assert sorted(set(clusters.tolist())) == list(range(k)) and (np.diff(centres) < 0).all()
    for c in range(k):  # each centre is the mean of its own
        own = [x for x, cluster in zip(values, clusters, strict=True) if cluster == c]
        assert sum(own) / len(own) == pytest.approx(centres[c])
    cost = sum((x - centres[c]) ** 2 for x, c in zip(values, clusters, strict=True))
    assert cost == pytest.approx(least_cost(values, k), abs=1e-9)


def test_clusters_of_many_equal_those_of_a_library():
    from sklearn.cluster import KMeans

    values = np.concatenate([rng("many", k).normal(0.1 * k, 0.04, size=700) for k in range(3)])
    library = KMeans(3, n_init=10, random_state=0, tol=0).fit(values[:, None])
    centres = cluster_centres(values)
    cost = ((values - centres[cluster_zero_shot(values)]) ** 2).sum()
    assert cost <= library.inertia_ * (1 + 1e-9)
    np.testing.assert_allclose(centres[::-1], np.sort(library.cluster_centers_[:, 0]), atol=2e-3)


def test_clusters_do_not_depend_on_order_or_scale():
    values = rng("order").normal(size=200)
    clusters, order = cluster_zero_shot(values), rng("permutation").permutation(200)
    assert (cluster_zero_shot(values[order]) == clusters[order]).all()
    assert (cluster_zero_shot(1e6 + 1e-3 * values) == clusters).all()
    assert (cluster_zero_shot(torch.tensor(values)) == clusters).all()


def test_clusters_are_named_from_the_highest():
    similarities = [0.31, 0.1, 0.2, 0.11, 0.3]
    assert cluster_zero_shot(similarities).tolist() == [0, 2, 1, 2, 0]
    named = cluster_zero_shot(similarities, names=("entailment", "neutral", "contradiction"))
    assert named.tolist() == ["entailment", "contradiction", "neutral", "contradiction", "entailment"]
    anchors = cluster_centres(similarities)
    assert cluster_zero_shot([0.5, -1.0], centres=anchors).tolist() == [0, 2]
    assert cluster_zero_shot([1.0], 2, centres=[2.0, 0.0]).tolist() == [1]  # half way: the lower
    assert cluster_zero_shot([], centres=anchors).tolist() == []


@pytest.mark.parametrize(
    "values, options",
    [
        ([], {}),
        ([1.0, 2.0, math.nan], {}),
        ([1.0, 2.0, math.inf], {}),
        ([[1.0, 2.0, 3.0]], {}),
        ([1.0, 2.0, 3.0], dict(k=0)),
        ([1.0, 2.0, 3.0], dict(k=2.5)),
        ([1.0, 2.0, 3.0], dict(names=("no", "yes"))),
        ([1.0, 2.0], dict(centres=[1.0, 2.0, 3.0])),
        ([1.0, 2.0], dict(centres=[2.0, 1.0])),
        ([1.0, math.nan], dict(centres=[3.0, 2.0, 1.0])),
    ],
)
def test_clusters_refuse(values, options):
    with pytest.raises(ValueError):
        cluster_zero_shot(values, **options)


# Modality importance

LAYERS, B, HEADS, T = 3, 4, 2, 7
TEXT = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0], [1] * 7]).bool()
VISION = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 0], [0, 0, 1, 1, 1, 0, 0], [0] * 7]).bool()
SPECIALS = torch.tensor(
    [[1, 0, 1, 0, 0, 0, 1], [1, 0, 0, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0], [1] + [0] * 6]
).bool()
ATTENTION = torch.from_numpy(rng("attention").dirichlet(np.ones(T), size=(LAYERS, B, HEADS, T)))


def importance_loop(mask, query, per_token):
    "The definition; with `per_token` instances without a counted token are left out."
    table = []
    for layer in range(LAYERS):
        table.append([])
        for head in range(HEADS):
            values = []
            for b in range(B):
                total = sum(ATTENTION[layer, b, head, query, i].item() for i in range(T) if mask[b, i])
                counted = int(mask[b].sum())
                if not per_token:
                    values.append(total)
                elif counted:
                    values.append(total / counted)
            table[-1].append(sum(values) / len(values) if values else math.nan)
    return torch.tensor(table, dtype=torch.float64)


VIEWS = [(None, True), (SPECIALS, True), (SPECIALS, False)]


@pytest.mark.parametrize("query", [0, 5])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("specials, are_text", VIEWS)
def test_importance_is_the_loop(query, per_token, specials, are_text):
    options = dict(query=query, specials=specials, specials_are_text=are_text, per_token=per_token)
    found = modality_importance(ATTENTION, TEXT, VISION, **options)
    text, vision = TEXT, VISION
    if specials is not None:
        text, vision = (TEXT | SPECIALS) if are_text else TEXT & ~SPECIALS, VISION & ~SPECIALS
    for name, mask in dict(text=text, vision=vision).items():
        want = importance_loop(mask, query, per_token)
        torch.testing.assert_close(found[name], want, atol=1e-12, rtol=0, equal_nan=True)
    assert list(found) == ["text", "vision"]


def test_importance_takes_layers_in_several_forms():
    want = modality_importance(ATTENTION, TEXT, VISION)
    forms = [
        list(ATTENTION),
        tuple(x.numpy() for x in ATTENTION),
        ATTENTION[:, :, :, 0],
        ATTENTION[:, :, :, :1],
    ]
    for form in forms:
        found = modality_importance(form, TEXT, VISION)
        assert all(torch.equal(found[name], want[name]) for name in want)
    half = modality_importance(ATTENTION.bfloat16(), TEXT, VISION)
    assert half["text"].dtype == torch.float32 and half["text"].shape == (LAYERS, HEADS)
    torch.testing.assert_close(half["text"].double(), want["text"], atol=0.01, rtol=0)


def test_importance_of_parts_is_that_of_the_whole():
    whole = importance_by_instance(ATTENTION, TEXT, VISION, per_token=True)
    parts = [
        importance_by_instance(ATTENTION[:, rows], TEXT[rows], VISION[rows], per_token=True)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    joined = torch.cat([part["vision"] for part in parts], -1)
    torch.testing.assert_close(joined, whole["vision"], equal_nan=True, atol=0, rtol=0)
    mean = modality_importance(ATTENTION, TEXT, VISION, per_token=True)["vision"]
    torch.testing.assert_close(joined.nanmean(-1), mean)
    nothing = modality_importance(ATTENTION[:, 3:], TEXT[3:], VISION[3:], per_token=True)
    assert nothing["vision"].isnan().all() and nothing["text"].isfinite().all()


@pytest.mark.parametrize("junk", [0.0, 9.0, -1.0, math.nan, math.inf])
def test_importance_never_reads_padding(junk):
    padding = ~(TEXT | VISION)
    attention = ATTENTION.masked_fill(padding[None, :, None, None], junk)
    attention[:, :, :, 1:] = math.nan  # other queries
    found, want = (modality_importance(x, TEXT, VISION) for x in (attention, ATTENTION))
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (([], TEXT, VISION), "at least one layer"),
        ((ATTENTION[:, :0], TEXT[:0], VISION[:0]), "one instance"),
        ((ATTENTION[..., :5], TEXT, VISION), "(B, heads, T, T)"),
        (([ATTENTION[0], ATTENTION[1, :, :1]], TEXT, VISION), "(4, 1, 7)"),
        ((ATTENTION, TEXT[1:], VISION), "(3, 7)"),
        ((ATTENTION, TEXT, VISION[:, 1:]), "(4, 6)"),
        ((ATTENTION, TEXT, VISION.float()), "boolean"),
        ((ATTENTION, TEXT, TEXT), "token 0 of instance 0"),
        ((ATTENTION - 1, TEXT, VISION), "give probabilities"),
        ((ATTENTION[0, 0], TEXT, VISION), "attention"),
    ],
)
def test_importance_refuses(arguments, words):
    with pytest.raises(ValueError) as error:
        modality_importance(*arguments)
    assert words in str(error.value)


def test_importance_refuses_queries_and_specials_that_do_not_fit():
    for query in (-1, T):
        with pytest.raises(ValueError, match="query"):
            modality_importance(ATTENTION, TEXT, VISION, query=query)
    with pytest.raises(ValueError, match="specials"):
        modality_importance(ATTENTION, TEXT, VISION, specials=SPECIALS[1:])


# Rows of attention, recorded

IDS = torch.randint(5, 40, (3, 8), generator=generator("ids"))
MASK = torch.arange(8) < torch.tensor([8, 3, 1])[:, None]


def spread(model):
    "Weights that are large enough for attention to differ from even."
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, 0.2)
    return model.eval()


@pytest.mark.parametrize("query", [0, 2])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_recorded_rows_are_those_of_attention_written_out(kind, query):
    if kind == "bert":
        model = spread(BertForMaskedLM(bert_config(scale("smoke", layers=2), 40))).bert
    else:
        sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=8)
        model = spread(RobertaModel(RobertaConfig(vocab_size=40, **sizes)))
    with recorded_attention(model, MASK, query) as rows, torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = model(input_ids=IDS, attention_mask=MASK, output_attentions=True).attentions
    assert len(rows) == len(layers) == 2
    for row, layer in zip(rows, layers, strict=True):
        torch.testing.assert_close(row, layer[:, :, query], atol=1e-5, rtol=0)
        assert row.std() > 0.01 and (row[2, :, 0] == 1).all() and (row[1, :, 3:] == 0).all()


def test_recording_ends_and_changes_nothing():
    model = spread(BertForMaskedLM(bert_config(scale("smoke", layers=2), 40)))
    with torch.no_grad():
        want = model(input_ids=IDS, attention_mask=MASK).logits
        with recorded_attention(model, MASK) as rows:
            assert torch.equal(model(input_ids=IDS, attention_mask=MASK).logits, want)
        with torch.autocast("cpu", torch.bfloat16), recorded_attention(model, MASK) as half:
            model(input_ids=IDS, attention_mask=MASK)
        with pytest.raises(ValueError, match="pack=False"), recorded_attention(model, MASK[:2]):
            model(input_ids=IDS, attention_mask=MASK)
        model(input_ids=IDS, attention_mask=MASK)
    assert len(rows) == 2 and half[0].dtype == torch.float32
    torch.testing.assert_close(half[0], rows[0], atol=0.05, rtol=0)
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_importance_of_a_single_stream_model():
    sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
    encoder = spread(BertEncoder(single_stream_config(**sizes)))
    layout = Layout(torch.arange(5) < torch.tensor([[5], [2]]), torch.arange(4) < torch.tensor([[1], [4]]))
    words, regions = (torch.randn(n, 16, generator=generator("packed", n)) for n in (7, 5))
    x = layout.join(words, regions)
    with recorded_attention(encoder, layout.mask) as rows:
        states = run_layers(encoder, x, layout.mask, pack=False)
    own = Encoded(states, layout, x, encoder).attention()
    text, vision = Encoded(states, layout, x, encoder).packed_masks()
    found, want = (modality_importance(attention, text, vision) for attention in (rows, own))
    for name in want:
        torch.testing.assert_close(found[name], want[name], atol=1e-5, rtol=0)
    torch.testing.assert_close(want["text"] + want["vision"], torch.ones(3, 2), atol=1e-5, rtol=0)
    assert want["text"].std() > 0.01


def test_attention_row_refuses():
    attention = (
        BertForMaskedLM(bert_config(scale("smoke", layers=1), 40)).bert.encoder.layer[0].attention.self
    )
    states = torch.zeros(3, 8, attention.query.in_features)
    for mask, query in ((MASK[:2], 0), (MASK.long(), 0), (MASK, 8), (MASK, -1), (MASK & False, 0)):
        with pytest.raises(ValueError, match="attention_row"):
            attention_row(attention, states, mask, query)
    with (
        pytest.raises(ValueError, match="Linear has no self-attention"),
        recorded_attention(nn.Linear(1, 1), MASK),
    ):
        pass


# Pictures


def test_pictures_show_the_numbers():
    from matplotlib import pyplot as plt

    before = modality_importance(ATTENTION, TEXT, VISION)
    after = {name: 1 - value for name, value in before.items()}
    pair = dict(before=before, after=after)
    lines = {line.get_label(): line.get_ydata() for line in importance_curves(pair).get_lines()}
    assert list(lines) == ["before: text", "before: vision", "after: text", "after: vision"]
    np.testing.assert_allclose(lines["after: vision"], after["vision"].mean(1))
    figure = importance_heatmaps(pair)
    shown = {ax.get_title(): ax.images[0] for ax in figure.axes if ax.get_title()}
    np.testing.assert_allclose(shown["before: text"].get_array(), before["text"])
    np.testing.assert_allclose(shown["after: vision"].get_array(), after["vision"])
    assert len({image.get_clim() for image in shown.values()}) == 1
    plt.close("all")


def test_strips_show_attention_to_words():
    from matplotlib import pyplot as plt

    rows = dict(before=[0.1, 0.9], after=torch.tensor([0.6, 0.4]))
    ax = attention_strips(["a", "kettle"], rows, torch.tensor([1]).tolist())
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.1, 0.9], [0.6, 0.4]])
    assert [t.get_fontweight() for t in ax.get_xticklabels()] == ["normal", "bold"]
    plt.close("all")
    for arguments in ((["a"], rows), (["a", "kettle"], {}), (["a", "kettle"], rows, [2])):
        with pytest.raises(ValueError, match="words"):
            attention_strips(*arguments)


@pytest.mark.parametrize("draw", [importance_curves, importance_heatmaps])
@pytest.mark.parametrize(
    "bad",
    [{}, dict(a={}), dict(a=dict(text=np.ones((2, 2)))), dict(a=dict(text=np.ones(2), vision=np.ones(2)))],
)
def test_pictures_refuse(draw, bad):
    with pytest.raises(ValueError, match="importance"):
        draw(bad)


# Golden values

GOLDEN = os.environ.get("VLKD_GOLDEN")
golden = pytest.mark.skipif(not GOLDEN, reason="VLKD_GOLDEN does not name the folder of golden values")


def peer(name):
    return json.loads((Path(GOLDEN) / f"{name}.json").read_text())


@golden
def test_golden_metrics():
    g = peer("vl_metrics")
    scores, targets = np.array(g["vqa_scores"]), np.array(g["vqa_soft_labels"])
    found = vqa_soft_scores(g["vqa_logits"], targets)
    np.testing.assert_allclose(found, scores.sum(1))
    assert found.sum() == pytest.approx(g["vqa_sum"])
    found = vcr_accuracies(g["vcr_out_qa"], g["vcr_out_qar"], g["labels_qa"], g["labels_qar"])
    counts = np.array(g["vcr_counts_qa_qar_joint"])
    np.testing.assert_allclose(np.array(found) * len(g["labels_qa"]), counts, atol=1e-9)


@golden
def test_golden_importance():
    g = peer("modality_importance")
    attention = torch.tensor(g["attn_values"], dtype=torch.float64)
    text, vision = (torch.tensor(g[name]).bool() for name in ("text_mask", "image_mask"))
    found = modality_importance(attention, text, vision)
    first = torch.zeros_like(text)
    first[:, 0] = True
    without = modality_importance(attention, text, vision, specials=first, specials_are_text=False)
    for name, values in (
        ("mi_text_layer_head", found["text"]),
        ("mi_image_layer_head", found["vision"]),
        ("mi_text_layer", found["text"].mean(1)),
        ("mi_image_layer", found["vision"].mean(1)),
        ("mi_text_without_cls_self", without["text"]),
    ):
        torch.testing.assert_close(values, torch.tensor(g[name], dtype=torch.float64), atol=1e-12, rtol=0)
