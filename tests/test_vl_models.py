"Vision-language students: the peers' values (`VLKD_GOLDEN`), padding, order, gradients, weights by name."

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vlkd.losses.targeted import candidate_scores
from vlkd.models.single_stream import Layout, attention_probabilities, padded
from vlkd.models.uniter import UNITER, box_shares, from_uniter, uniter_config, uniter_loss, uniter_text

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
    return (scale * torch.sin(0.7 * k + 1.3 * seed + 0.05 * k * k * ((seed % 3) + 1) / n)).view(*shape)


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
    picture = torch.arange(2).repeat_interleave(4)
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
    near(row[1][:, :, 0], out.attention(None)[1][:, :, 2])


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
