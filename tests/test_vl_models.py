"Vision-language students: the peers' values (`VLKD_GOLDEN`), padding, order, gradients, weights by name."

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vlkd.data.text import train_tokenizer
from vlkd.losses.pretraining import (
    alignment_loss,
    mask_regions,
    masked_class_loss,
    masked_feature_loss,
    masked_word_loss,
    matching_loss,
    pretraining_batch,
    word_region_distance,
)
from vlkd.losses.targeted import candidate_scores
from vlkd.models.clip_adapters import ClipAdapter, candidate_texts, zero_shot_scores
from vlkd.models.single_stream import Layout, attention_probabilities, padded
from vlkd.models.uniter import (
    UNITER,
    UNITER_NAMES,
    box_shares,
    from_uniter,
    uniter_config,
    uniter_loss,
    uniter_text,
)
from vlkd.models.vl import load, new_student, save_student, student_card
from vlkd.models.vlbert import (
    VLBERT,
    RegionProjection,
    box_waves,
    from_vlbert,
    vlbert_config,
    vlbert_loss,
    vlbert_text,
)
from vlkd.train.adversarial import VILLA, Adversary, adversarial_loss
from vlkd.train.token_budget import token_budget_batches

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40)
SMALL |= dict(max_position_embeddings=24)


def golden(name):
    folder = os.environ.get("VLKD_GOLDEN")
    if not folder:
        pytest.skip("VLKD_GOLDEN is not set")
    return json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))


def fixed(shape, seed, scale=1.0):
    "The deterministic tensor that the golden files' `tensor_doc` states."
    n = math.prod(shape)
    k = torch.arange(n, dtype=torch.float64)
    return (scale * torch.sin(0.7 * k + 1.3 * seed + 0.05 * k * k * ((seed % 3) + 1) / n)).view(tuple(shape))


def rebuilt(weights):
    "The state dict that the golden files' `weights_doc` states."
    state = {}
    for i, (name, shape) in enumerate(sorted(weights["state_dict"].items())):
        g = fixed(shape, weights["seed_base"] + i)
        gain = (len(shape) == 1 and name.endswith(".weight")) or not shape
        state[name] = 0.35 * g if len(shape) > 1 else 1 + 0.25 * g if gain else 0.2 * g
    for names in weights["tied"]:
        for name in names:
            state[name] = state[max(names)]
    return state


def T(values):
    "Nested lists as a tensor: float64, or integers, or booleans."
    x = torch.tensor(values)
    return torch.tensor(values, dtype=torch.float64) if x.is_floating_point() else x


def near(found, wanted, where=None, atol=1e-9):
    found, wanted = found.detach().double(), torch.as_tensor(wanted, dtype=torch.float64)
    if where is not None:
        found, wanted = found[where], wanted[where]
    torch.testing.assert_close(found, wanted, atol=atol, rtol=atol)


# UNITER beside the authors' classes


def text_part(g):
    "The text of a peer's batch, by the lengths that its packing has."
    lengths = text_lengths(g)
    ids = T(g["input_ids"])
    return dict(ids=ids, text_mask=torch.arange(ids.shape[1]) < lengths[:, None])


def text_lengths(g):
    "How many tokens each text has: where the packed sequence begins to name regions."
    index, mask = T(g["gather_index"]), T(g["attn_masks"]).bool()
    return ((index < len(g["input_ids"][0])) & mask).sum(1)


def region_part(g):
    counts = T(g["attn_masks"]).sum(1) - text_lengths(g)
    features = T(g["img_feat"])
    mask = torch.arange(features.shape[1]) < counts[:, None]
    return dict(features=features, boxes=T(g["img_pos_feat"]), region_mask=mask)


def peers_batch(g):
    batch = text_part(g) | region_part(g)
    if "txt_type_ids" in g:
        batch |= dict(types=T(g["txt_type_ids"]))
    return batch


@pytest.fixture(scope="module")
def uniter():
    return golden("uniter")


def load_uniter(g, case, **options):
    return from_uniter(
        rebuilt(case["weights"]), attention_heads=g["config"]["num_attention_heads"], **options
    )


@pytest.mark.parametrize("pack", [False, True])
def test_uniter_backbone(uniter, pack):
    g = uniter["backbone"]
    model, batch = load_uniter(uniter, g), peers_batch(g["inputs"])
    out = model(**batch, every=True, pack=pack)
    mask = T(g["inputs"]["attn_masks"]).bool()
    assert torch.equal(out.layout.mask, mask)
    near(out.embeddings, g["packed_embeddings"], mask)
    for states, wanted in zip(out.every, g["layers"], strict=True):
        near(states, wanted, mask)
    near(model.pooled(out), g["pooled"])
    near(out.layout.split(out.embeddings)[0], g["text_embeddings"], batch["text_mask"])
    near(out.layout.split(out.embeddings)[1], g["image_embeddings"], batch["region_mask"])
    corners = torch.cat([T(boxes)[:, :4] for boxes in g["inputs"]["boxes6"]])
    near(box_shares(corners), batch["boxes"][batch["region_mask"]])
    typed = model(**batch, types=T(g["with_type_ids"]["txt_type_ids"]), pack=pack)
    near(model.pooled(typed), g["with_type_ids"]["pooled"])


@pytest.mark.parametrize("pack", [False, True])
def test_uniter_text_or_picture_alone(uniter, pack):
    g = uniter["backbone"]
    model, batch = load_uniter(uniter, g), peers_batch(g["inputs"])
    mask = T(g["text_only"]["attn_masks"]).bool()
    near(model(batch["ids"], mask, pack=pack).text, g["text_only"]["last"], mask)
    mask = T(g["image_only"]["attn_masks"]).bool()
    seen = dict(features=batch["features"], boxes=batch["boxes"], region_mask=mask)
    near(model(**seen, pack=pack).regions, g["image_only"]["last"], mask)


def test_uniter_vcr(uniter):
    g = uniter["vcr"]
    model, batch = load_uniter(uniter, g), peers_batch(g["batch"])
    scores = model.scores("vcr", model(**batch))
    near(scores, g["logits_2way"])
    near(candidate_scores(scores), g["scores_regrouped"])
    near(uniter_loss("vcr", scores, T(g["batch"]["targets"])[:, 0]), g["loss"])


def test_uniter_vcr_texts(uniter):
    g, ids = uniter["vcr"], uniter["config"]
    special = dict(cls=ids["cls"], sep=ids["sep"])
    qa, qar = g["examples"]["qa"], g["examples"]["qar"]
    given = qar["input_ids_as"][qar["qa_target"]]
    rows = [uniter_text(qa["input_ids"], answer, **special) for answer in qa["input_ids_as"]]
    rows += [uniter_text(qar["input_ids"], given, r, **special) for r in qar["input_ids_rs"]]
    assert padded([row for row, _ in rows])[0].tolist() == g["batch"]["input_ids"]
    assert padded([types for _, types in rows])[0].tolist() == g["batch"]["txt_type_ids"]
    one = [uniter_text(qar["input_ids"], answer, **special) for answer in qar["input_ids_as"]]
    wanted = g["eval_rows_of_qar_example"]
    every = [
        uniter_text(qar["input_ids"], answer, r, **special)
        for answer in qar["input_ids_as"]
        for r in qar["input_ids_rs"]
    ]
    shown = one + every if len(wanted["input_ids"]) > 8 else one + rows[4:]
    assert [row for row, _ in shown] == wanted["input_ids"]
    assert [types for _, types in shown] == wanted["txt_type_ids"]


def test_uniter_vcr_pictures_are_embedded_once(uniter):
    g = uniter["vcr"]
    model, batch = load_uniter(uniter, g), peers_batch(g["batch"])
    once = {name: batch[name][::4] for name in ("features", "boxes", "region_mask")}
    assert torch.equal(once["features"].repeat_interleave(4, 0), batch["features"])
    picture = torch.arange(len(once["features"])).repeat_interleave(4)
    near(model.scores("vcr", model(**batch | once, picture=picture)), g["logits_2way"])


@pytest.mark.parametrize("task", ["vqa", "ve"])
def test_uniter_answers(uniter, task):
    g = uniter[task]
    model = load_uniter(uniter, g, task=task)
    scores = model.scores(task, model(**peers_batch(uniter["backbone"]["inputs"])))
    near(scores, g["logits"])
    targets = T(g["targets"])
    near(F.binary_cross_entropy_with_logits(scores, targets, reduction="none"), g["loss_elements"])
    near(uniter_loss(task, scores, targets), g["loss_as_trained"])


def test_uniter_pretraining(uniter):
    g, inputs = uniter["pretraining"], uniter["backbone"]["inputs"]
    model, batch = load_uniter(uniter, g), peers_batch(inputs)
    labels = T(g["mlm"]["txt_labels"])
    scores = model.scores("mlm", model(**batch | dict(ids=T(g["mlm"]["input_ids"]))), labels != -1)
    near(scores, g["mlm"]["scores"])
    near(F.cross_entropy(scores, labels[labels != -1]), g["mlm"]["loss"])
    masked = T(g["mrfr"]["img_masks"])
    out = model(**batch, region_masked=masked)
    wanted = torch.zeros_like(out.layout.mask).index_put(out.layout.regions, masked[batch["region_mask"]])
    assert torch.equal(wanted, T(g["mrfr"]["img_mask_tgt"]))
    near(model.scores("mrfr", out, masked), g["mrfr"]["prediction"])
    near(F.mse_loss(model.scores("mrfr", out, masked), T(g["mrfr"]["feat_targets"])), g["mrfr"]["loss"])
    near(model.scores("mrc", out, masked), g["mrc"]["logits"])
    scores = model.scores("itm", model(**batch))
    near(scores, g["itm"]["logits"])
    near(uniter_loss("itm", scores, T(g["itm"]["targets"])), g["itm"]["loss"])


def test_uniter_second_stage(uniter):
    g, batch = uniter["second_stage_vcr"], peers_batch(uniter["vcr"]["batch"])
    model = load_uniter(uniter, g)
    labels = T(g["txt_labels"])
    scores = model.scores("mlm", model(**batch | dict(ids=T(g["input_ids"]))), labels != -1)
    near(F.cross_entropy(scores, labels[labels != -1], reduction="none"), g["mlm_loss_elements"])


def test_uniter_retrieval(uniter):
    g, batch = uniter["retrieval"], peers_batch(uniter["backbone"]["inputs"])
    model = load_uniter(uniter, g)
    near(model.scores("rank", model(**batch)), g["scores"])


# UNITER by itself


def small_uniter(**settings):
    heads = dict(vqa=7, ve=None, vcr=None, itm=None, rank=None, mlm=None, mrfr=None, mrc=None)
    config = uniter_config(**SMALL | dict(feature_dim=12, region_classes=5, type_vocab_size=4) | settings)
    return UNITER(config, heads, seed=1).double().eval()


def small_batch(seed=0, boxes=7):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([6, 2, 4, 5])[:, None]
    return dict(
        ids=torch.randint(1, 40, (4, 6), generator=g),
        text_mask=mask,
        types=torch.randint(0, 2, (4, 6), generator=g),
        features=torch.randn(4, 5, 12, generator=g).double(),
        boxes=torch.rand(4, 5, boxes, generator=g).double(),
        region_mask=torch.arange(5) < torch.tensor([1, 5, 2, 4])[:, None],
    )


def widened(batch, text=3, regions=2):
    "The same batch, padded further with what must never be read."
    wide = {}
    for name, x in batch.items():
        more = text if name in ("ids", "text_mask", "types", "tags") else regions
        filler = False if x.dtype == torch.bool else torch.nan if x.is_floating_point() else 1
        wide[name] = F.pad(x, (0, 0) * (x.dim() - 2) + (0, more), value=filler)
    return wide


@pytest.mark.parametrize("pack", [False, True])
def test_padding_and_order_change_nothing(pack):
    model, batch = small_uniter(), small_batch()
    out = model(**batch, pack=False)
    wide = model(**widened(batch), pack=pack)
    near(wide.states, out.states)
    near(wide.text[:, :6], out.text)
    order = torch.tensor([2, 0, 3, 1])
    other = model(**{name: x[order] for name, x in batch.items()}, pack=pack)
    near(model.scores("vqa", other), model.scores("vqa", out)[order])
    for i in range(4):
        alone = model(**{name: x[i : i + 1] for name, x in batch.items()}, pack=pack)
        near(model.scores("vqa", alone)[0], model.scores("vqa", out)[i])


def test_what_counts_is_read():
    model, batch = small_uniter(), small_batch()
    before = model.pooled(model(**batch))
    for name, x in batch.items():
        if name.endswith("mask"):
            continue
        changed = x.clone()
        changed[0, 0] = x[0, 0] + 1 if x.is_floating_point() else (x[0, 0] + 1) % 2
        after = model.pooled(model(**batch | {name: changed}))
        assert (after[0] - before[0]).abs().max() > 1e-6, name
        near(after[1:], before[1:])


@pytest.mark.parametrize("pack", [False, True])
def test_gradient_reaches_all_parameters(pack):
    model, batch = small_uniter(), small_batch()
    hidden = torch.zeros(4, 5, dtype=torch.bool)
    hidden[1, 2] = True
    batch["types"][0, 0], batch["types"][0, 1] = 2, 3
    out = model(**batch, region_masked=hidden, pack=pack)
    losses = [model.scores(name, out).square().sum() for name in ("vqa", "ve", "vcr", "itm", "rank")]
    losses += [model.scores("mlm", out, batch["text_mask"]).square().sum()]
    losses += [model.scores(name, out, batch["region_mask"]).square().sum() for name in ("mrfr", "mrc")]
    sum(losses).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert without == []


def test_packed_gradients_are_the_same():
    grads = []
    for pack in (False, True):
        model, batch = small_uniter(), small_batch()
        model.scores("vqa", model(**batch, pack=pack)).pow(3).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, g in grads[0].items():
        near(grads[1][name], g, atol=1e-8)


def test_attention_is_that_of_the_layers():
    model, batch = small_uniter(), small_batch()
    out = model(**batch, pack=False)
    for every in out.attention(None):
        near(every.sum(-1), torch.ones(every.shape[:3]))
        assert not every.permute(0, 3, 1, 2)[~out.layout.mask].any()
    layer = model.encoder.layer[0]
    probabilities = out.attention(None)[0]
    heads = layer.attention.self.value(out.embeddings).unflatten(-1, (2, 8)).transpose(1, 2)
    mixed = (probabilities @ heads).transpose(1, 2).flatten(2)
    own = layer.attention.self(out.embeddings, out.layout.mask[:, None, None])[0]
    near(mixed, own.detach(), out.layout.mask)
    row = attention_probabilities(model.encoder, out.embeddings, out.layout.mask, query=2)
    near(row[1], out.attention(None)[1][:, :, 2])


def test_bfloat16_and_float32():
    model, batch = small_uniter().float(), small_batch()
    exact = model.pooled(model(**batch))
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.pooled(model(**batch))
    assert exact.dtype == torch.float32 and (exact - rough.float()).abs().max() < 0.1


def test_pooling_with_the_picture():
    model, batch = small_uniter(pooling="cls_image"), small_batch()
    out = model(**batch)
    near(model.pooled(out), model.pooler(out.states).detach() * out.regions[:, 0].detach())
    batch["region_mask"][2] = False
    with pytest.raises(ValueError, match="no region 0"):
        model.pooled(model(**batch))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(features=torch.zeros(4, 5, 11)), r"features \(P, R, 12\).*features \(4, 5, 11\)"),
        (dict(features=torch.zeros(4, 4, 12)), r"features \(4, 4, 12\)"),
        (dict(features=torch.zeros(3, 5, 12)), r"features \(3, 5, 12\)"),
        (dict(boxes=torch.zeros(4, 5, 4)), r"boxes \(4, 5, 4\)"),
        (dict(boxes=None), "regions should be"),
        (dict(region_mask=None), "inputs should be"),
        (dict(text_mask=None), "inputs should be"),
        (dict(text_mask=torch.ones(4, 6)), "boolean"),
        (dict(types=torch.zeros(4, 5)), r"types \(4, 5\)"),
        (dict(picture=torch.tensor([0, 1, 2, 4])), "one of 4 pictures"),
        (dict(picture=torch.tensor([0, 1])), r"picture \(2,\)"),
        (dict(text_mask=torch.zeros(4, 6).bool(), region_mask=torch.zeros(4, 5).bool()), "sample 0"),
        (dict(ids=None, text_mask=None, features=None, region_mask=None), "inputs should be"),
    ],
)
def test_inputs_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        small_uniter()(**small_batch() | change)


def test_texts_longer_than_the_positions():
    ids = torch.ones(1, 25, dtype=torch.long)
    with pytest.raises(ValueError, match="25 tokens; the model has 24"):
        small_uniter()(ids, ids > 0)


@pytest.mark.parametrize("name", ["large", "huge"])
def test_sizes(name):
    if name == "huge":
        with pytest.raises(ValueError, match="base, large"):
            uniter_config(name)
        return
    assert (uniter_config(name).hidden_size, uniter_config(name).num_hidden_layers) == (1024, 24)
    assert (uniter_config().hidden_size, uniter_config().vocab_size) == (768, 28996)


UNITER_CHECKPOINT = {  # a small one with the names of the authors' pre-training checkpoint
    "uniter.embeddings.word_embeddings.weight": (40, 128),
    "uniter.embeddings.position_embeddings.weight": (24, 128),
    "uniter.embeddings.token_type_embeddings.weight": (2, 128),
    "uniter.embeddings.LayerNorm.weight": (128,),
    "uniter.embeddings.LayerNorm.bias": (128,),
    "uniter.img_embeddings.img_linear.weight": (128, 12),
    "uniter.img_embeddings.img_linear.bias": (128,),
    "uniter.img_embeddings.img_layer_norm.weight": (128,),
    "uniter.img_embeddings.img_layer_norm.bias": (128,),
    "uniter.img_embeddings.pos_layer_norm.weight": (128,),
    "uniter.img_embeddings.pos_layer_norm.bias": (128,),
    "uniter.img_embeddings.pos_linear.weight": (128, 7),
    "uniter.img_embeddings.pos_linear.bias": (128,),
    "uniter.img_embeddings.mask_embedding.weight": (2, 12),
    "uniter.img_embeddings.LayerNorm.weight": (128,),
    "uniter.img_embeddings.LayerNorm.bias": (128,),
    "uniter.pooler.dense.weight": (128, 128),
    "uniter.pooler.dense.bias": (128,),
    "cls.predictions.bias": (40,),
    "cls.predictions.transform.dense.weight": (128, 128),
    "cls.predictions.transform.dense.bias": (128,),
    "cls.predictions.transform.LayerNorm.weight": (128,),
    "cls.predictions.transform.LayerNorm.bias": (128,),
    "feat_regress.bias": (12,),
    "feat_regress.net.0.weight": (128, 128),
    "feat_regress.net.0.bias": (128,),
    "feat_regress.net.2.weight": (128,),
    "feat_regress.net.2.bias": (128,),
    "region_classifier.net.0.weight": (128, 128),
    "region_classifier.net.0.bias": (128,),
    "region_classifier.net.2.weight": (128,),
    "region_classifier.net.2.bias": (128,),
    "region_classifier.net.3.weight": (9, 128),
    "region_classifier.net.3.bias": (9,),
    "itm_output.weight": (2, 128),
    "itm_output.bias": (2,),
}
LAYER = {
    "attention.self.query": (128, 128),
    "attention.self.key": (128, 128),
    "attention.self.value": (128, 128),
    "attention.output.dense": (128, 128),
    "intermediate.dense": (64, 128),
    "output.dense": (128, 64),
}


def layer_names(prefix, layers):
    "Names and shapes of BERT's layers."
    shapes = {}
    for i in range(layers):
        for part, shape in LAYER.items():
            shapes[f"{prefix}{i}.{part}.weight"] = shape
            shapes[f"{prefix}{i}.{part}.bias"] = shape[:1]
        for part in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{prefix}{i}.{part}.weight"] = shapes[f"{prefix}{i}.{part}.bias"] = (128,)
    return shapes


def drawn(shapes):
    return {name: fixed(shape, i, 0.3).float() for i, (name, shape) in enumerate(sorted(shapes.items()))}


def uniter_checkpoint():
    state = drawn(UNITER_CHECKPOINT | layer_names("uniter.encoder.layer.", 3))
    state["cls.predictions.decoder.weight"] = state["uniter.embeddings.word_embeddings.weight"]
    state["feat_regress.weight"] = state["uniter.img_embeddings.img_linear.weight"]
    return state


def test_from_uniter_reads_a_checkpoint():
    state = uniter_checkpoint()
    model = from_uniter(state)
    c = model.config
    sizes = (c.vocab_size, c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.intermediate_size)
    assert sizes == (40, 128, 3, 2, 64) and (c.feature_dim, c.region_classes) == (12, 9)
    assert sorted(model.heads) == ["itm", "mlm", "mrc", "mrfr"] and not model.training
    found = sum(p.numel() for p in model.parameters())
    tied = ("cls.predictions.decoder.weight", "feat_regress.weight")
    assert found == sum(x.numel() for name, x in state.items() if name not in tied)
    assert torch.equal(model.heads["mrc"][1].bias, state["region_classifier.net.3.bias"])
    assert torch.equal(model.region_embeddings.box.weight, state["uniter.img_embeddings.pos_linear.weight"])
    half = from_uniter({name: x.half() for name, x in state.items()})
    assert half.pooler.dense.weight.dtype == torch.float32
    wrapped = dict(model_state={f"module.{name}": x for name, x in state.items()})
    assert torch.equal(from_uniter(wrapped).pooler.dense.weight, model.pooler.dense.weight)
    old = {}
    for name, x in state.items():
        if "LayerNorm" in name:
            name = name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
        old[name] = x
    assert torch.equal(from_uniter(old).embeddings.LayerNorm.weight, model.embeddings.LayerNorm.weight)


def without(state, *names):
    return {name: x for name, x in state.items() if name not in names}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s | {"uniter.embeddings.word": s["itm_output.bias"]}, r"missing|no place"),
        (lambda s: s | {"nlvr2_output.weight": s["itm_output.bias"]}, "1 unknown names, nlvr2_output.weight"),
        (lambda s: without(s, "uniter.pooler.dense.bias"), "1 weights are missing, pooler.dense.bias"),
        (lambda s: without(s, "itm_output.bias"), "missing, heads.itm.bias"),
        (
            lambda s: without(s, "uniter.embeddings.word_embeddings.weight"),
            "word_embeddings.weight is missing",
        ),
        (lambda s: {k: v for k, v in s.items() if ".layer.1." not in k}, "without a gap"),
        (lambda s: {k: v for k, v in s.items() if ".layer." not in k}, "without a gap"),
        (lambda s: s | {"uniter.pooler.dense.weight": torch.zeros(3, 128)}, r"shape \(3, 128\)"),
        (lambda s: s | {"itm_output.bias": [0.0, 0.0]}, "'itm_output.bias' is list"),
        (lambda s: s | {"feat_regress.weight": s["feat_regress.weight"] + 1}, "differ"),
        (lambda s: {}, "none"),
        (lambda s: None, "none"),
    ],
)
def test_from_uniter_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        from_uniter(change(uniter_checkpoint()))


def test_extended_for_vcr():
    model = from_uniter(uniter_checkpoint())
    words, types = model.embeddings.word_embeddings.weight, model.embeddings.token_type_embeddings.weight
    model.extend_types(4).extend_words(81, seed=3).add_head("vcr")
    new = model.embeddings.token_type_embeddings.weight
    assert torch.equal(new[:2], types) and torch.equal(new[2], types[0]) and torch.equal(new[3], types[0])
    assert torch.equal(model.embeddings.word_embeddings.weight[:40], words)
    assert len(model.embeddings.word_embeddings.weight) == 121 == model.config.vocab_size
    ids = torch.tensor([[1, 120]])
    scores = model.scores("mlm", model(ids, ids > 0, types=torch.tensor([[0, 3]])), ids > 0)
    assert scores.shape == (2, 121)


def test_layout_of_masks_with_holes():
    text = torch.tensor([[True, False, True], [False, True, False]])
    regions = torch.tensor([[False, True], [True, True]])
    layout = Layout(text, regions)
    assert layout.mask.tolist() == [[True] * 3, [True] * 3]
    assert layout.positions.tolist() == [0, 1, 0]
    assert [x.tolist() for x in layout.regions] == [[0, 1, 1], [2, 1, 2]]


# VL-BERT beside the authors' classes


@pytest.fixture(scope="module")
def vlbert():
    return golden("vlbert")


def load_vlbert(g, case, config, **options):
    heads = config["num_attention_heads"]
    special = [g["ids"]["cls"], g["ids"]["sep"]]
    return from_vlbert(rebuilt(case["weights"]), attention_heads=heads, special_ids=special, **options)


def read_both_sides(model, g, **options):
    "Give a model the two sides of tokens and objects that the authors' backbone takes."
    text, objects = T(g["text_mask"]).bool(), T(g["object_mask"]).bool()
    both, size = T(g["object_vl_embeddings"])[objects], model.config.visual_size
    words = model.word_embeddings(T(g["text_input_ids"])[text])
    pointed = T(g["text_visual_embeddings"])[text]
    given = (words, pointed, text, both[:, :size], both[:, size:], objects)
    return model.read(*given, types=T(g["text_token_type_ids"]), **options)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("case", ["backbone", "backbone_visual_size_12_no_ln"])
def test_vlbert_backbone(vlbert, case, pack):
    g = vlbert[case]
    model = load_vlbert(vlbert, g, g["config"])
    out = read_both_sides(model, g["inputs"], every=True, pack=pack)
    mask = T(g["attention_mask"]).bool()
    assert torch.equal(out.layout.mask, mask)
    assert torch.equal(VLBERT.positions(out.layout)[mask], T(g["position_ids"])[mask])
    types = VLBERT.types(out.layout, T(g["inputs"]["text_token_type_ids"]))
    assert torch.equal(types[mask], T(g["token_type_ids"])[mask])
    text, objects = out.packed_masks()
    assert text.int().tolist() == g["packed_text_mask"] and objects.int().tolist() == g["packed_object_mask"]
    near(out.embeddings, g["embeddings"], mask)
    near(out.states, g["last"] if "last" in g else g["layers"][-1], mask)
    near(model.pooled(out), g["pooled"])
    for states, wanted in zip(out.every, g.get("layers", [g.get("last")] * 2), strict=True):
        if "layers" in g:
            near(states, wanted, mask)
    if "cls_attention" in g:
        for seen, wanted in zip(out.attention(), g["cls_attention"], strict=True):
            near(seen, wanted)
        near(out.text, g["last_text"], out.layout.text_mask)
        near(out.regions, g["last_objects"], out.layout.region_mask)


def test_vlbert_pretraining_heads(vlbert):
    g = vlbert["pretraining_heads"]
    model = load_vlbert(vlbert, g, g["config"])
    out = read_both_sides(model, g["inputs"])
    near(out.embeddings, g["embeddings"], T(g["attention_mask"]).bool())
    near(model.scores("itm", out), g["relationship_logits"])
    near(model.scores("mlm", out, out.layout.text_mask), g["mlm_logits_where_text"])
    near(model.scores("mrc", out, out.layout.region_mask), g["mvrc_logits_where_object"])


ORDERS = dict(ANSWER_FIRST="answer_first", QA_ONE_SENT="one_sentence")


def vlbert_questions(g, settings, ids):
    "Rows of four candidates a question, as the authors' dataset gives them."
    order = next((o for name, o in ORDERS.items() if settings.get(name)), "question_first")
    rows = []
    for question, answers in zip(g["question"], g["answer_choices"], strict=True):
        q = [token for token in question if token[0] > 0]
        for answer in answers:
            a = [token for token in answer if token[0] > 0]
            tags = dict(question_tags=[t[1] for t in q], answer_tags=[t[1] for t in a])
            rows.append(
                vlbert_text(
                    [t[0] for t in q], [t[0] for t in a], cls=ids["cls"], sep=ids["sep"], order=order, **tags
                )
            )
    return [padded([row[i] for row in rows]) for i in range(3)]


def vlbert_pictures(g):
    boxes = T(g["boxes"])
    mask = boxes[..., 3] > -0.5
    return dict(features=T(g["regions"])[:, : mask.shape[1]], region_mask=mask, classes=boxes[..., 5].long())


@pytest.mark.parametrize("case", ["shipped", *range(7)])
def test_vlbert_vcr(vlbert, case):
    g = vlbert["vcr"]
    if case != "shipped" and case >= len(g["variants"]):
        pytest.skip("these golden values have fewer variants")
    one = g["shipped"] if case == "shipped" else g["variants"][case]
    settings = g["config"] | one["settings"]
    model = load_vlbert(vlbert, one, g["config"]["VLBERT"])
    (ids, mask), (types, _), (tags, _) = vlbert_questions(g["inputs"], settings, vlbert["ids"])
    if settings["NO_GROUNDING"]:
        tags = tags * 0
    pictures = vlbert_pictures(g["inputs"])
    choices = len(g["inputs"]["answer_choices"][0])
    picture = torch.arange(len(pictures["features"])).repeat_interleave(choices)
    out = model(ids, mask, **pictures, types=types, tags=tags, picture=picture)
    scores = candidate_scores(model.scores("vcr", out), choices)
    near(scores, one["label_logits"])
    options = dict(positive_weight=settings["CLASSIFIER_SIGMOID_LOSS_POSITIVE_WEIGHT"])
    options |= dict(softmax=not settings["CLASSIFIER_SIGMOID"])
    loss = vlbert_loss("vcr", scores, T(g["inputs"]["answer_label"]), **options)
    near(loss, one["ans_loss"])
    if settings["ENABLE_CNN_REG_LOSS"]:
        regions = out.layout.region_mask
        logits = model.scores("region_class", out, regions)
        of_objects = F.cross_entropy(logits, pictures["classes"][picture][regions])
        near(of_objects, one["cnn_regularization_loss"])
        loss = loss + of_objects
    near(loss, one["loss"])


def test_vlbert_vcr_texts(vlbert):
    g = vlbert["vcr"]
    (ids, mask), (types, _), (tags, _) = vlbert_questions(g["inputs"], {}, vlbert["ids"])
    wanted = {name: T(x).flatten(0, 1) for name, x in g["prepared"].items()}
    assert torch.equal(ids, wanted["input_ids"]) and torch.equal(mask, wanted["input_mask"].bool())
    assert torch.equal(types, wanted["input_type_ids"]) and torch.equal(tags, wanted["text_tags"])


def test_vlbert_vqa(vlbert):
    g, ids = vlbert["vqa"], vlbert["ids"]
    model = load_vlbert(vlbert, g, vlbert["backbone"]["config"])
    questions = [[token for token in row if token > 0] for row in g["inputs"]["question"]]
    rows = [vlbert_text(q, [ids["mask"]], cls=ids["cls"], sep=ids["sep"]) for q in questions]
    (words, mask), (types, _) = (padded([row[i] for row in rows]) for i in range(2))
    assert words.tolist() == g["input_ids"] and types.tolist() == g["token_type_ids"]
    boxes = T(g["inputs"]["boxes"])
    region_mask = boxes[..., 0] > -1.5
    out = model(words, mask, T(g["inputs"]["regions"]), region_mask=region_mask, types=types)
    where = words == ids["mask"]
    assert where.int().argmax(1).tolist() == g["mask_position"]
    scores = model.scores("vqa", out, where)
    near(scores, g["label_logits"])
    near(vlbert_loss("vqa", scores, T(g["inputs"]["label"])), g["loss"])


def test_vlbert_boxes(vlbert):
    g = vlbert["coordinate_embeddings"]
    boxes = T(g["boxes"])
    near(box_waves(boxes[:, :4], boxes[:, 4:], g["dim"]), g["embedding"])


def test_vlbert_region_projection(vlbert):
    g = vlbert["region_projection"]
    state = rebuilt(g["weights"])
    weight, bias = state["obj_downsample.1.weight"], state["obj_downsample.1.bias"]
    project = RegionProjection(weight.shape[1] - 2048, len(weight)).double().eval()
    project.linear.load_state_dict(dict(weight=weight, bias=bias))
    mask, boxes = T(g["box_mask"]).bool(), T(g["boxes"])
    numbers = [int(n) for n in g["features"].partition("(")[2].partition("seed")[0].split(",")[:3]]
    seed = int(g["features"].rpartition("=")[2].rstrip(")"))
    features = fixed(numbers, seed)
    size = T(g["im_info"])[:, None, :2].expand(-1, boxes.shape[1], -1)
    out = torch.zeros(*mask.shape, len(weight)).double()
    out[mask] = project(features[mask], boxes[mask], size[mask])
    near(out, g["obj_reps"], atol=1e-8)


# VL-BERT by itself

VL_SMALL = SMALL | dict(
    feature_dim=12, coordinate_dim=4, region_classes=5, visual_scale=0.7, classifier_hidden=10
)
VL_HEADS = ("vcr", "ve", "itm", "mlm", "mrc", "vqa", "region_class")


def small_vlbert(**settings):
    config = vlbert_config(**VL_SMALL | settings)
    return VLBERT(config, VL_HEADS, seed=1).double().eval()


def vl_batch(seed=0):
    batch = small_batch(seed, boxes=4)
    batch["boxes"] = batch["boxes"].sort(-1).values
    batch["tags"] = torch.zeros_like(batch["ids"])
    batch["tags"][1, 0], batch["tags"][3, 2] = 4, 1
    batch["classes"] = torch.arange(20).view(4, 5)
    return batch


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{}, dict(object_words="class"), dict(object_words="text"), dict(visual_size=9), dict(visual_norm=False)],
    ids=str,
)
def test_vlbert_padding_and_order(settings, pack):
    model, batch = small_vlbert(**settings), vl_batch()
    out = model(**batch, pack=False)
    wide = model(**widened(batch), pack=pack)
    near(wide.states, out.states)
    order = torch.tensor([2, 0, 3, 1])
    other = model(**{name: x[order] for name, x in batch.items()}, pack=pack)
    near(model.scores("ve", other), model.scores("ve", out)[order])
    for i in range(4):
        alone = model(**{name: x[i : i + 1] for name, x in batch.items()}, pack=pack)
        near(model.scores("ve", alone)[0], model.scores("ve", out)[i])


def test_vlbert_gradient_reaches_all_parameters():
    model, batch = (
        small_vlbert(
            object_words="class", parts=["projection", "pooler", "mask_visual", "mask_word", "no_picture"]
        ),
        vl_batch(),
    )
    hidden = torch.zeros(4, 5, dtype=torch.bool)
    hidden[1, 2] = True
    batch["classes"] = torch.zeros_like(batch["classes"])
    out = model(**batch, region_masked=hidden)
    losses = [model.scores(name, out).square().sum() for name in ("vcr", "ve", "itm")]
    first = torch.zeros_like(batch["text_mask"])
    first[:, 0] = True
    for name in ("mlm", "vqa", "mrc", "region_class"):
        where = batch["region_mask"] if name in ("mrc", "region_class") else first
        losses.append(model.scores(name, out, where).square().sum())
    losses.append(model.scores("ve", model(batch["ids"], batch["text_mask"])).square().sum())
    sum(losses).backward()
    blank = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert blank == []


def test_vlbert_starts_without_the_picture():
    model, batch = small_vlbert(visual_scale=0.0), vl_batch()
    before = model(**batch).text
    near(model(**batch | dict(features=batch["features"] + 1)).text, before)


def test_vlbert_tags():
    model, batch = small_vlbert(), vl_batch()
    before = model(**batch).states
    negative = torch.where(batch["tags"] == 0, -1, batch["tags"])
    near(model(**batch | dict(tags=negative)).states, before)  # as the authors' code clamps it
    assert (model(**batch | dict(tags=batch["tags"] * 0)).states - before).abs().max() > 1e-3
    for tag in (1, 5, 99):
        with pytest.raises(ValueError, match="tags should name"):
            model(**batch | dict(tags=torch.full_like(batch["tags"], tag)))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(features=torch.zeros(4, 5, 11)), r"features \(P, R, 12\).*features \(4, 5, 11\)"),
        (dict(boxes=torch.zeros(4, 5, 7)), r"boxes .*\(\d+, 7\)"),
        (dict(boxes=None), "boxes"),
        (dict(size=torch.ones(4, 3)), r"size \(4, 3\)"),
        (dict(tags=torch.zeros(4, 5)), r"tags \(4, 5\)"),
        (dict(classes=torch.zeros(3, 5)), r"classes \(3, 5\)"),
        (
            dict(ids=torch.ones(4, 30).long(), text_mask=torch.ones(4, 30).bool(), types=None, tags=None),
            "32 positions",
        ),
    ],
)
def test_vlbert_inputs_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        small_vlbert()(**vl_batch() | change)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(size="small"), "base, large"),
        (dict(parts=["pool"]), "unknown part 'pool'"),
        (dict(object_words="two"), "one, class, text"),
        (dict(classifier="3fc"), "1fc, 2fc"),
        (dict(type_vocab_size=2), "at least 3"),
    ],
)
def test_vlbert_settings_that_do_not_exist(settings, message):
    with pytest.raises(ValueError, match=message):
        vlbert_config(**settings)


VLBERT_CHECKPOINT = {  # a small one with the names of the authors' end-to-end pre-training checkpoint
    "module.vlbert.word_embeddings.weight": (40, 128),
    "module.vlbert.end_embedding.weight": (1, 128),
    "module.vlbert.position_embeddings.weight": (24, 128),
    "module.vlbert.token_type_embeddings.weight": (3, 128),
    "module.vlbert.embedding_LayerNorm.weight": (128,),
    "module.vlbert.embedding_LayerNorm.bias": (128,),
    "module.vlbert.visual_ln_text.weight": (128,),
    "module.vlbert.visual_ln_text.bias": (128,),
    "module.vlbert.visual_ln_object.weight": (128,),
    "module.vlbert.visual_ln_object.bias": (128,),
    "module.vlbert.mlm_head.predictions.bias": (40,),
    "module.vlbert.mlm_head.predictions.transform.dense.weight": (128, 128),
    "module.vlbert.mlm_head.predictions.transform.dense.bias": (128,),
    "module.vlbert.mlm_head.predictions.transform.LayerNorm.weight": (128,),
    "module.vlbert.mlm_head.predictions.transform.LayerNorm.bias": (128,),
    "module.vlbert.mvrc_head.transform.dense.weight": (128, 128),
    "module.vlbert.mvrc_head.transform.dense.bias": (128,),
    "module.vlbert.mvrc_head.region_cls_pred.weight": (9, 128),
    "module.vlbert.mvrc_head.region_cls_pred.bias": (9,),
    "module.object_linguistic_embeddings.weight": (1, 128),
    "module.object_mask_word_embedding.weight": (1, 128),
    "module.object_mask_visual_embedding.weight": (1, 20),
    "module.aux_text_visual_embedding.weight": (1, 128),
    "module.image_feature_extractor.obj_downsample.1.weight": (128, 2048 + 20),
    "module.image_feature_extractor.obj_downsample.1.bias": (128,),
    "module.image_feature_extractor.backbone.conv1.weight": (4, 3, 7, 7),
    "module.image_feature_extractor.roi_head_feature_extractor.0.bn1.num_batches_tracked": (),
    "module.image_feature_extractor.head.0.0.conv1.weight": (4, 4, 1, 1),
}


def vlbert_checkpoint():
    state = drawn(VLBERT_CHECKPOINT | layer_names("module.vlbert.encoder.layer.", 2))
    words = "module.vlbert.word_embeddings.weight"
    return state | {"module.vlbert.mlm_head.predictions.decoder.weight": state[words]}


def test_from_vlbert_reads_a_checkpoint():
    state = vlbert_checkpoint()
    model = from_vlbert(dict(state_dict=state, optimizer={}))
    c = model.config
    assert (c.vocab_size, c.hidden_size, c.num_hidden_layers, c.num_attention_heads) == (40, 128, 2, 2)
    assert (c.feature_dim, c.visual_size, c.region_classes, c.object_words) == (20, 128, 9, "one")
    assert sorted(model.heads) == ["mlm", "mrc"]
    assert sorted(c.parts) == ["mask_visual", "mask_word", "no_picture", "projection"]
    not_ours = ("backbone", "roi_head", ".head.", "decoder")
    wanted = sum(x.numel() for name, x in state.items() if not any(part in name for part in not_ours))
    assert sum(p.numel() for p in model.parameters()) == wanted
    batch = vl_batch()
    batch |= dict(features=torch.randn(4, 5, 20))
    model.add_part("pooler").add_head("vcr")
    assert model.scores("vcr", model(**batch)).shape == (4, 1)
    fine_tuned = {}
    for name, x in state.items():
        if ".mlm_head." not in name and ".mvrc_head." not in name:
            fine_tuned[name.replace("module.vlbert.", "module.vlbert._module.")] = x
    fine_tuned |= {
        f"module.final_mlp.1.{part}": torch.zeros(shape)
        for part, shape in (("weight", (1, 128)), ("bias", (1,)))
    }
    assert list(from_vlbert(fine_tuned).heads) == ["vcr"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s | {"module.extra.weight": torch.zeros(1)}, "1 unknown names, extra.weight"),
        (lambda s: s | {"image_feature_extractor.object_embed.weight": torch.zeros(81, 128)}, "object_embed"),
        (lambda s: without(s, "module.vlbert.end_embedding.weight"), "missing, end_embedding.weight"),
        (lambda s: without(s, "module.vlbert.visual_ln_text.bias"), "missing, text_visual.norm.bias"),
        (
            lambda s: without(s, "module.vlbert.mvrc_head.region_cls_pred.weight"),
            "missing, heads.mrc.1.weight",
        ),
        (lambda s: without(s, "module.vlbert.word_embeddings.weight"), "word_embeddings.weight is missing"),
        (lambda s: s | {"module.vlbert.end_embedding.weight": torch.zeros(2, 128)}, r"shape \(2, 128\)"),
        (lambda s: s | {"module.vlbert.mlm_head.predictions.decoder.weight": torch.zeros(40, 128)}, "differ"),
        (lambda s: 7, "none"),
    ],
)
def test_from_vlbert_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        from_vlbert(change(vlbert_checkpoint()))


# Students as folders


@pytest.fixture(scope="module")
def words():
    return train_tokenizer(["what is left of the red kettle ?", "the girl dropped it ."] * 3, 60, 24)


def both_students(words):
    small = SMALL | dict(feature_dim=12, vocab_size=len(words), region_classes=5)
    uniter = new_student(
        "uniter", dict(vqa=7, vcr=None, itm=None, mlm=None, mrfr=None, mrc=None), seed=3, **small
    )
    small |= dict(coordinate_dim=4, classifier="2fc", classifier_hidden=10, object_words="class")
    vlbert = new_student(
        "vlbert", dict(vcr=None, ve=None, vqa=9, mlm=None, mrc=None, region_class=None), **small
    )
    return dict(uniter=uniter.eval(), vlbert=vlbert.eval())


@pytest.fixture(params=["uniter", "vlbert"])
def student(request, words):
    return both_students(words)[request.param]


def test_saved_and_loaded_is_the_same(student, words, tmp_path):
    save_student(tmp_path / "a", student, words)
    back, tokenizer = load(tmp_path / "a")
    assert tokenizer.get_vocab() == words.get_vocab() and not back.training
    state = student.state_dict()
    assert back.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in back.state_dict().items())
    batch = small_batch(boxes=7 if isinstance(student, UNITER) else 4)
    batch |= dict(ids=batch["ids"] % len(words), types=None)
    assert torch.equal(back(**batch).states, student(**batch).states)
    save_student(tmp_path / "b", back, tokenizer)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_float64_stays_float64(student, words, tmp_path):
    back, _ = load(save_student(tmp_path, student.double(), words))
    assert back.encoder.layer[0].output.dense.weight.dtype == torch.float64


def change_config(folder, **change):
    file = folder / "config.json"
    about = json.loads(file.read_text())
    for name, value in change.items():
        about.pop(name) if value is None else about.update({name: value})
    file.write_text(json.dumps(about))


BROKEN = {
    "another family": (lambda d: change_config(d, family="lxmert"), "family should be one of"),
    "no family": (lambda d: change_config(d, family=None), "family should be one of"),
    "another width": (lambda d: change_config(d, hidden_size=32), "hidden_size 32, the weights 16"),
    "a huge width": (lambda d: change_config(d, hidden_size=10**9), "hidden_size 1000000000"),
    "a word as width": (lambda d: change_config(d, hidden_size="wide"), "hidden_size 'wide'"),
    "other heads of attention": (lambda d: change_config(d, num_attention_heads=3), "cannot be loaded"),
    "more layers": (lambda d: change_config(d, num_hidden_layers=4), "num_hidden_layers 4"),
    "no heads": (lambda d: change_config(d, heads=None), "heads should map"),
    "odd heads": (lambda d: change_config(d, heads=dict(vqa=-1)), "heads should map"),
    "another head": (lambda d: change_config(d, heads=dict(eyes=None)), "unknown head 'eyes'"),
    "fewer heads": (lambda d: change_config(d, heads={}), "have no place"),
    "odd pooling": (lambda d: change_config(d, pooling="max"), "pooling 'max'"),
    "a list": (lambda d: (d / "config.json").write_text("[]"), "family should be one of"),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "no text": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json"),
    "cut weights": (lambda d: (d / "model.safetensors").write_bytes(b"12345678"), "cannot be loaded"),
    "no weights": (lambda d: save_file({}, d / "model.safetensors"), "missing"),
    "no tokeniser": (lambda d: (d / "tokenizer.json").write_text("{}"), "cannot be loaded"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("checksums", [False, True])
def test_broken_folders(student, words, tmp_path, name, checksums):
    change, message = BROKEN[name]
    save_student(tmp_path, student, words)
    change(tmp_path)
    if not checksums:
        (tmp_path / "checksums.json").unlink()
    with pytest.raises(
        ValueError, match="checksum|by |family|heads should|config.json" if checksums else message
    ):
        load(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_missing_files(student, words, tmp_path, file):
    save_student(tmp_path, student, words)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        load(tmp_path)


def test_tokeniser_of_another_student(student, words, tmp_path):
    more = train_tokenizer([f"word{i} {chr(97 + i % 26)}{i}" for i in range(300)], 300, 24)
    save_student(tmp_path, student, more)
    with pytest.raises(ValueError, match="do not belong together"):
        load(tmp_path)


def test_card_says_what_it_is(student, words, tmp_path):
    about = "A student."
    card = student_card(
        "s@1", about, student, data=["tabletop"], settings={"a|b": "c"}, results=dict(vqa=50.04)
    )
    save_student(tmp_path, student, words, card)
    text = (tmp_path / "README.md").read_text()
    assert "a|b" in text and "50.0" in text and type(student).__name__ in text
    load(tmp_path)
    with pytest.raises(ValueError, match="no data card"):
        student_card("s@1", about, student, data=["tabletop", "nothing"])


# VILLA beside the authors' training loops


@pytest.fixture(scope="module")
def villa():
    return golden("villa_step")


def adversary_of(settings):
    kinds = settings["adv_modality"]
    return Adversary(
        modalities=tuple(kind for kind in kinds if kind != "alter"),
        text_rate=settings["adv_lr_txt"],
        image_rate=settings["adv_lr_img"],
        steps=settings["adv_steps"],
        norm=settings["norm_type"],
        max_norm=settings["adv_max_norm"],
        kl_weight=settings["adv_kl_weight"],
        alternate="alter" in kinds,
    )


def villa_names(model):
    "Our names of the authors' parameters."
    table = UNITER_NAMES | {"vqa_output.": "heads.ve." if "ve" in model.heads else "heads.vqa."}

    def ours(name):
        old = max((o for o, new in table.items() if new and name.startswith(o)), key=len)
        return table[old] + name[len(old) :]

    return ours


@pytest.mark.parametrize("case", range(12))
def test_villa_step(villa, case):
    if case >= len(villa["cases"]):
        pytest.skip("these golden values have fewer cases")
    g = villa["cases"][case]
    task = g["task"]
    heads = villa["config"]["num_attention_heads"]
    options = {} if task == "vcr" else dict(task=task)
    model = from_uniter(rebuilt(g["weights"]), attention_heads=heads, **options)
    batch = peers_batch(g.get("inputs") or villa["cases"][0]["inputs"])
    targets = T(g["targets"])
    targets = targets[:, 0] if task == "vcr" else targets

    def forward(text_shift, region_shift):
        return model.scores(task, model(**batch, text_shift=text_shift, region_shift=region_shift))

    def task_loss(scores):
        return uniter_loss(task, scores, targets)

    near(forward(None, None), g["clean_scores"])
    text_shape = (*batch["ids"].shape, villa["config"]["hidden_size"])
    over = "mean" if task == "vcr" else "sum"
    given = (forward, task_loss, text_shape, batch["features"].shape, adversary_of(g["settings"]))
    loss, steps = adversarial_loss(*given, over=over, last_gradient=True)
    loss.backward()
    for step, wanted in zip(steps, g["steps"], strict=True):
        assert step.loss == pytest.approx(wanted["loss"], rel=1e-9)
        parts = ["_1", "_2"] if "kl_loss_1" in wanted else [""]
        name = "ce_loss" if "ce_loss" in wanted else "bce_loss"
        for i, part in enumerate(parts):
            assert step.task[i] == pytest.approx(wanted[name + part], rel=1e-9)
            assert step.divergence[i] == pytest.approx(wanted[f"kl_loss{part}"], rel=1e-7, abs=1e-12)
        for kind, key in (("text", "txt"), ("image", "img")):
            if f"{key}_delta" in wanted:
                near(step.shifts[kind], wanted[f"{key}_delta"])
                near(step.gradients[kind], wanted[f"{key}_delta_grad"])
    ours, parameters = villa_names(model), dict(model.named_parameters())
    for name, wanted in g["parameter_grads"].items():
        near(parameters[ours(name)].grad, wanted)
    norm = torch.stack([p.grad.norm() for p in parameters.values() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(g["parameter_grad_norm"], rel=1e-8)


def test_villa_shipped_settings(villa):
    shipped = {}
    for name, settings in villa["shipped_settings"].items():
        shipped[name.rpartition("-")[0]] = adversary_of(settings)
    assert {name: VILLA[name] for name in shipped} == {
        name: replace(adversary, modalities=VILLA[name].modalities) for name, adversary in shipped.items()
    }
    assert all(set(VILLA[name].modalities) == set(a.modalities) for name, a in shipped.items())


@pytest.mark.parametrize("family", ["uniter", "vlbert"])
def test_adversary_of_both_students(words, family):
    student = both_students(words)[family].double()
    batch = small_batch(boxes=7 if family == "uniter" else 4)
    batch |= dict(ids=batch["ids"] % len(words), types=None)
    where = F.one_hot(torch.zeros(4, dtype=torch.long), 6).bool() if family == "vlbert" else None

    def forward(text_shift, region_shift):
        out = student(**batch, text_shift=text_shift, region_shift=region_shift)
        return student.scores("vqa", out, where)

    torch.manual_seed(0)
    target = torch.randn(4, 7 if family == "uniter" else 9).double().softmax(1)

    def task_loss(scores):
        return F.binary_cross_entropy_with_logits(scores, target)

    adversary = Adversary(text_rate=0.002, image_rate=0.002, steps=4, kl_weight=0.0)
    shapes = ((4, 6, 16), (4, 5, 12))
    loss, steps = adversarial_loss(forward, task_loss, *shapes, adversary)
    costs = [step.task[0] for step in steps]
    assert costs == sorted(costs) and costs[-1] > costs[0]
    last = steps[-1].shifts
    assert not last["text"][~batch["text_mask"]].any() and not last["image"][~batch["region_mask"]].any()
    loss.backward()
    assert student.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0
    one, _ = adversarial_loss(forward, task_loss, *shapes, replace(adversary, steps=1))
    near(one, task_loss(forward(None, None)).item())  # one pass is not moved


@pytest.mark.parametrize(
    "settings",
    [dict(steps=0), dict(text_rate=-1.0), dict(max_norm=-1), dict(kl_weight=-1), dict(modalities=())],
)
def test_adversaries_that_make_no_sense(settings):
    with pytest.raises(ValueError):
        Adversary(**settings)


# Pre-training: the authors' losses, masks and pairs


def test_uniter_pretraining_losses(uniter):
    g = uniter["pretraining"]
    model, batch = load_uniter(uniter, g), peers_batch(uniter["backbone"]["inputs"])
    labels = T(g["mlm"]["txt_labels"])
    where = labels != -1
    out = model(**batch | dict(ids=T(g["mlm"]["input_ids"])))
    near(masked_word_loss(model, out, labels.clamp(min=0), where), g["mlm"]["loss"])
    hidden = T(g["mrfr"]["img_masks"])
    out = model(**batch, region_masked=hidden)
    near(masked_feature_loss(model, out, batch["features"], hidden), g["mrfr"]["loss"])
    labels = torch.zeros(*hidden.shape, model.config.region_classes).double()
    for row, known in zip(labels, g["mrc"]["soft_labels"], strict=True):
        row[: len(known)] = T(known)
    near(masked_class_loss(model, out, labels, hidden), g["mrc"]["kl_loss"])
    near(masked_class_loss(model, out, labels, hidden, form="hard"), g["mrc"]["hard_loss"])
    near(matching_loss(model, model(**batch), T(g["itm"]["targets"]).bool()), g["itm"]["loss"])


def test_uniter_word_region_alignment(uniter):
    g = uniter["word_region_alignment"]
    there = [~T(g[name]) for name in ("txt_pad", "img_pad")]
    near(word_region_distance(T(g["txt"]), T(g["img"]), *there), g["distance"])


def test_word_region_distance_ignores_padding_and_batch():
    torch.manual_seed(0)
    text, regions = torch.randn(3, 5, 8).double(), torch.randn(3, 4, 8).double()
    words = torch.arange(5) < torch.tensor([[5], [2], [3]])
    boxes = torch.arange(4) < torch.tensor([[2], [4], [1]])
    wanted = word_region_distance(text, regions, words, boxes)
    text[~words], regions[~boxes] = torch.nan, torch.inf
    near(word_region_distance(text, regions, words, boxes), wanted)
    near(word_region_distance(text.flip(0), regions.flip(0), words.flip(0), boxes.flip(0)), wanted.flip(0))
    boxes[1] = False
    assert word_region_distance(text, regions, words, boxes)[1] == 0
    text = text.nan_to_num().requires_grad_()
    word_region_distance(text, regions, words, boxes).sum().backward()
    assert torch.isfinite(text.grad).all() and not text.grad[~words].any() and text.grad[0].any()


def pretraining_data(words, n=40):
    g = torch.Generator().manual_seed(5)
    lengths = torch.randint(3, 9, (n, 1), generator=g)
    mask = torch.arange(8) < lengths
    boxes = torch.arange(6) < torch.randint(1, 7, (n, 1), generator=g)
    ids = torch.randint(5, len(words), (n, 8), generator=g).masked_fill(~mask, 0)
    data = dict(ids=ids, text_mask=mask, features=torch.randn(n, 6, 12, generator=g), region_mask=boxes)
    return data | dict(boxes=torch.rand(n, 6, 7, generator=g), soft_labels=torch.rand(n, 6, 5, generator=g))


def test_pretraining_batches_do_not_depend_on_the_batch(words):
    data = pretraining_data(words)
    options = dict(seed=3, epoch=7)
    whole = pretraining_batch(data, np.arange(40), words, **options)
    part = pretraining_batch(data, np.array([31, 4, 17]), words, **options)
    for name in ("ids", "where", "features", "region_masked", "matched", "soft_labels"):
        assert torch.equal(part[name], whole[name][[31, 4, 17]]), name
    for name, x in part["inputs"].items():
        assert torch.equal(x, whole["inputs"][name][[31, 4, 17]]), name
    other = pretraining_batch(data, np.arange(40), words, seed=3, epoch=8)
    for name in ("where", "region_masked", "matched"):
        assert not torch.equal(other[name], whole[name])


def test_masks_tell_nothing_of_the_match(words):
    data = pretraining_data(words, 200)
    words_masked, regions_masked = {True: [], False: []}, {True: [], False: []}
    for epoch in range(30):
        b = pretraining_batch(data, np.arange(200), words, seed=1, epoch=epoch)
        for matched in (True, False):
            rows = b["matched"] == matched
            words_masked[matched].append(
                b["where"][rows].float().sum() / b["inputs"]["text_mask"][rows].sum()
            )
            regions_masked[matched].append(
                b["region_masked"][rows].sum() / b["inputs"]["region_mask"][rows].sum()
            )
        assert (
            not b["counted"]["words"][~b["matched"]].any()
            and not b["counted"]["regions"][~b["matched"]].any()
        )
        assert torch.equal(b["counted"]["words"][b["matched"]], b["where"][b["matched"]])
    for shares in (words_masked, regions_masked):
        yes, no = (torch.stack(shares[matched]).mean().item() for matched in (True, False))
        assert yes == pytest.approx(no, rel=0.08)


def test_pretraining_batch_shows_no_masked_region(words):
    data = pretraining_data(words)
    b = pretraining_batch(data, np.arange(40), words, seed=0)
    student = new_student(
        "uniter", ("mrfr",), seed=0, **SMALL | dict(vocab_size=len(words), feature_dim=12)
    ).eval()
    other = dict(
        b["inputs"], features=b["inputs"]["features"].masked_fill(b["region_masked"][..., None], 9.0)
    )
    assert torch.equal(student(**other).states, student(**b["inputs"]).states)
    assert not (b["region_masked"] & ~b["inputs"]["region_mask"]).any() and b["region_masked"].any(1).all()


@pytest.mark.parametrize("family", ["uniter", "vlbert"])
def test_pretraining_of_both_students(words, family):
    data = pretraining_data(words)
    if family == "vlbert":
        data["boxes"] = data["boxes"][..., :4]
    small = SMALL | dict(vocab_size=len(words), feature_dim=12, region_classes=5)
    small |= dict(coordinate_dim=4, visual_scale=0.5) if family == "vlbert" else {}
    student = new_student(family, ("mlm", "mrc", "itm"), seed=0, **small)
    b = pretraining_batch(data, np.arange(40), words, seed=0)
    out = student(**b["inputs"])
    losses = [masked_word_loss(student, out, b["ids"], b["counted"]["words"])]
    losses += [masked_class_loss(student, out, b["soft_labels"], b["counted"]["regions"])]
    losses += [matching_loss(student, out, b["matched"])]
    there = (b["inputs"]["text_mask"], b["inputs"]["region_mask"])
    losses += [alignment_loss(word_region_distance(out.text, out.regions, *there), b["matched"])]
    sum(losses).backward()
    assert all(loss.isfinite() for loss in losses)
    assert student.heads["itm"].weight.grad.any() and student.encoder.layer[0].output.dense.weight.grad.any()
    nothing = {masked_word_loss: ("ids", "where"), masked_class_loss: ("soft_labels", "region_masked")}
    for loss, (targets, where) in nothing.items():
        zero = loss(student, student(**b["inputs"]), b[targets], b[where] & False)
        zero.backward()
        assert zero.item() == 0


def test_mask_regions_keeps_the_picture():
    there = torch.arange(7) < torch.randint(1, 8, (500, 1))
    hidden = mask_regions(there, seed=0, epoch=0, example=np.arange(500))
    assert hidden.any(1).all() and not (hidden & ~there).any()
    alone = there.sum(1) == 1
    assert hidden[alone, 0].all() and not hidden[~alone, 0].any()
    free = mask_regions(there, seed=0, epoch=0, example=np.arange(500), keep=0)
    assert free[~alone, 0].any()


# Adapters on CLIP

ROWS = [
    ("mlp", 1, "concat"),
    ("mlp", 1, "cosine"),
    ("mlp", 3, "concat"),
    ("mlp", 3, "cosine"),
    ("attention", 1, "concat"),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("outputs", [1, 3])
def test_adapters(row, outputs):
    adapter = ClipAdapter(8, *row, outputs=outputs, attention_heads=2, seed=4).double().eval()
    again = ClipAdapter(8, *row, outputs=outputs, attention_heads=2, seed=4).double()
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))
    torch.manual_seed(0)
    image, text = torch.randn(6, 8).double(), torch.randn(6, 8).double()
    out = adapter(image, text)
    assert out.shape == (6, outputs)
    near(adapter(image.flip(0), text.flip(0)), out.detach().flip(0))
    near(adapter(3 * image, 0.5 * text), out.detach())
    out.square().sum().backward()
    blank = [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert blank == []
    if outputs == 1:
        near(
            adapter.candidates(image[:3], text.view(3, 2, 8)),
            adapter(image[:3].repeat_interleave(2, 0), text).view(3, 2).detach(),
        )
    else:
        with pytest.raises(ValueError, match="one output"):
            adapter.candidates(image[:3], text.view(3, 2, 8))


def test_attention_adapter_ignores_padding():
    adapter = ClipAdapter(8, "attention", attention_heads=2).double().eval()
    torch.manual_seed(0)
    image, text = torch.randn(2, 3, 8).double(), torch.randn(2, 5, 8).double()
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    wanted = adapter(image, text, mask).detach()
    text[1, 2:] = torch.nan
    near(adapter(image, text, mask), wanted)
    near(adapter(image[1:], text[1:, :2]), wanted[1:])
    with pytest.raises(ValueError, match="text_mask"):
        adapter(image, text, mask[:, :4])


def test_zero_shot_is_a_cosine():
    torch.manual_seed(0)
    image, texts = torch.randn(3, 8), torch.randn(3, 4, 8)
    wanted = F.cosine_similarity(image[:, None], texts, dim=-1)
    near(zero_shot_scores(image, texts, scale=1.0), wanted, atol=1e-6)
    with pytest.raises(ValueError, match="IQA, IA"):
        candidate_texts("q", ["a"], "QA")


# Batches by a budget of tokens


def test_token_budget_of_uniter(uniter):
    g = uniter["token_bucket_sampler"]
    for case in g["cases"]:
        options = dict(multiple=case["size_multiple"], drop_last=case["droplast"], longest="bucket")
        batches = token_budget_batches(g["lens"], case["budget"], **options)
        found = [sorted((g["lens"][i] for i in batch), reverse=True) for batch in batches]
        assert sorted(found) == sorted(sorted(batch, reverse=True) for batch in case["batches"])


@pytest.mark.parametrize("longest", ["batch", "bucket"])
def test_token_budget_is_kept(longest):
    lengths = np.random.default_rng(0).integers(1, 60, 501)
    batches = token_budget_batches(lengths, 500, multiple=4, bucket=100, longest=longest, seed=1)
    assert sorted(np.concatenate(batches)) == list(range(501))
    assert all(lengths[batch].max() * len(batch) <= 500 for batch in batches)


@pytest.mark.parametrize(
    "lengths, budget", [([], 9), ([[1]], 9), ([1.5], 9), ([0], 9), ([2], 9), ([10**6], 10**6)], ids=str
)
def test_token_budgets_that_do_not_fit(lengths, budget):
    with pytest.raises(ValueError, match=r"lengths should be|budget"):
        token_budget_batches(lengths, budget)
