"""hivg.py: boxes, losses, stages, batches, padding, checkpoints."""

import copy
import functools
import inspect
import json
import math
import pickle
import re
from argparse import Namespace
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    check_refusals,
    close,
    hugging_face_state,
    shake,
    shake_pairs,
    tiny_batch,
    tiny_clip,
    tiny_model,
)

import clip_model
import hivg
from clip_model import HiVGError, load_clip, rename_keys
from hivg import HiVG, HiVGConfig, HiVGOutput, load_checkpoint, save_checkpoint

OVERLAPS = [("iou", hivg.box_iou), ("giou", hivg.generalized_box_iou)]
TEXTS = ("red one", "blue !; one", "the big red one on the left", "one", "x!")


@pytest.fixture
def model(tokenizer):
    """HiVG in stage 2, no parameter zero."""
    model = tiny_model(tokenizer, 2)
    shake_pairs(model)
    for bridge in model.bridges.values():
        torch.nn.init.normal_(bridge.w, std=0.5)
    return model


def watch(model, *names):
    """A list that gets (inputs, output) of these modules, in the order of their calls."""
    seen = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *given: seen.append(given[1:]))
    return seen


# --------------------------------------------------------------------------------- boxes and losses


@pytest.mark.parametrize("name, overlap", OVERLAPS)
def test_iou_and_giou_equal_golden(shared, name, overlap):
    """IoU and GIoU are those of exact arithmetic, and finite where these are undefined."""
    rows = json.loads((shared / "golden/giou_golden.json").read_text())
    found = overlap(*(torch.tensor([row[box] for row in rows]) for box in ("box1", "box2")))
    expected = torch.tensor([math.nan if row[name] is None else row[name] for row in rows])
    assert found.isfinite().all()
    assert not ((found - expected).abs() > 1e-6).any()  # NaN is not


def test_iou_and_giou_by_hand():
    """Nested, touching, apart and equal boxes: values that can be checked in the head."""
    a = torch.tensor([[0, 0, 4, 4], [0, 0, 1, 1], [0, 0, 1, 1], [1, 2, 3, 4.0]])
    b = torch.tensor([[0, 0, 2, 2], [1, 0, 2, 1], [3, 0, 4, 1], [1, 2, 3, 4.0]])
    assert hivg.box_iou(a, b).tolist() == [0.25, 0, 0, 1]
    assert hivg.generalized_box_iou(a, b).tolist() == [0.25, 0, -0.5, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8, torch.int16])
def test_boxes_of_any_dtype_and_shape(dtype):
    """Areas that the dtype cannot hold are right; boxes are the last axis, the others broadcast."""
    a = torch.tensor([[[0, 0, 250, 250], [2, 3, 9, 8]], [[0, 0, 240, 250], [5, 5, 5, 5]]])  # 2 x 2
    for b in (a.flip(0), a[0, 0], a[:, :1]):
        pairs = [boxes.reshape(4, 4).double() for boxes in torch.broadcast_tensors(a, b)]
        for _, overlap in OVERLAPS:
            close(overlap(a.to(dtype), b.to(dtype)), overlap(*pairs).view(2, 2).float())
    centre = torch.tensor([[[10, 20, 4, 6]]], dtype=dtype)
    assert hivg.cxcywh_to_xyxy(centre).tolist() == [[[8, 17, 12, 23]]]


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-9])
@pytest.mark.parametrize("other", [[0.5, 0.5, 0, 0], [0.5, 0.5, 1e-9, 1e-9], [0.2, 0.3, 0.1, 0.1]])
def test_gradients_are_finite_for_boxes_without_area(other, size):
    """A predicted box without area, or with hardly any, never gives NaN, as loss or as gradient."""
    box = torch.tensor([[0.5, 0.5, size, size]], requires_grad=True)
    for _, overlap in OVERLAPS:
        boxes = hivg.cxcywh_to_xyxy(box), hivg.cxcywh_to_xyxy(torch.tensor([other]))
        value = overlap(*boxes).sum()
        assert -1 <= value <= 1
        assert torch.autograd.grad(value, box)[0].isfinite().all()


ZEROS, NOWHERE = torch.zeros(16), torch.zeros(16, dtype=torch.bool)


def losses(boxes, true, logits=ZEROS, padding=NOWHERE, function=hivg.compute_losses):
    """compute_losses of given outputs; what is not given does not matter."""
    B = len(boxes)
    logits, padding = logits.expand(B, 16), padding.expand(B, 16)
    output = HiVGOutput(boxes, logits, padding, torch.eye(B), torch.eye(B))
    return function(output, {"box": true, "object": torch.arange(B)}, torch.tensor(0.0))


def test_box_loss_by_hand():
    """L1 is summed over the coordinates and averaged over the batch, as 1 - GIoU is."""
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.4, 0.4]])
    true = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.6, 0.3, 0.4, 0.4]])
    # the second pair: intersection 0.3 x 0.2, union 0.26, hull 0.5 x 0.6
    giou = 0.06 / 0.26 - (0.3 - 0.26) / 0.3
    found = losses(boxes, true)
    close(found["l1"], torch.tensor((0.1 + 0.2) / 2))
    close(found["giou"], torch.tensor((1 - giou) / 2))
    assert found.keys() == hivg.LOSS_WEIGHTS.keys()


def test_focal_and_dice_loss_by_hand():
    """The target is 1 where the patch's centre lies in the box; padding patches don't count,
    whatever their logits are; nor do they in scores."""
    torch.manual_seed(0)
    logits, focal, dice = torch.randn(2, 16), [], []
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.3], [0.3, 0.6, 0.2, 0.6]])
    padding = torch.arange(16) < torch.tensor([[0], [8]])
    for b, first, inside in ((0, 0, [5, 6, 9, 10]), (1, 8, [9, 13])):
        t = torch.zeros(16).index_fill(0, torch.tensor(inside), 1)[first:]
        p = logits[b, first:].sigmoid()
        p_t, alpha_t = t * p + (1 - t) * (1 - p), 0.25 * t + 0.75 * (1 - t)
        focal.append((-alpha_t * (1 - p_t) ** 2 * p_t.log()).mean())
        dice.append(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    for extra in (0.0, 30.0):  # in the padding
        parts = losses(boxes, boxes, logits + extra * padding, padding)
        close(parts["focal"], sum(focal) / 2)
        close(parts["dice"], sum(dice) / 2)
    output = HiVGOutput(boxes, logits + 30 * padding, padding, None, None)
    close(output.scores(), (logits.sigmoid() * ~padding).amax(dim=1))


def test_contrastive_loss_row_by_row():
    """It equals a loop over rows and columns where samples of the same object are no negatives."""
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(4, 8), dim=-1) for _ in range(2))
    objects, total = torch.tensor([7, 7, 2, 8]), 0.0
    for logits in (5 * image @ text.T, 5 * text @ image.T):
        for i, row in enumerate(logits):
            others = (objects != objects[i]) | (torch.arange(4) == i)
            total += row[others].logsumexp(dim=0) - row[i]
    close(hivg.contrastive_loss(image, text, torch.tensor(5.0), objects), total / 8)


def copied(module, names, **known):
    """What the source of these names gives where only torch is known."""
    space = {"torch": torch, "F": F, "nn": torch.nn, "math": math}
    space |= {"MIN_AREA": hivg.MIN_AREA, **known}
    for name in names:
        exec(inspect.getsource(getattr(module, name)), space)
    return space


OVERLAP = ("box_area", "iou_union_hull", "box_iou", "generalized_box_iou")
LOSSES = ("cxcywh_to_xyxy", "patch_targets", "sigmoid_focal_loss", "dice_loss", "contrastive_loss")
LOSSES += ("symmetric_cross_entropy", "inside")


def test_copied_parts_need_nothing_else(model):
    """The names that the README gives for copying, boxes, losses and the bridge, run alone."""
    parts, boxes = copied(hivg, OVERLAP), torch.rand(2, 3, 4)
    for _, overlap in OVERLAPS:
        close(parts[overlap.__name__](*boxes), overlap(*boxes))
    parts = copied(hivg, (*OVERLAP, *LOSSES, "compute_losses"))
    close(losses(*boxes, function=parts["compute_losses"]), losses(*boxes))
    parts = copied(clip_model, ("attention", "QuickGELU"))
    parts = copied(hivg, ("make_mlp", "MultiHeadAttention", "Bridge"), **parts)
    bridge = parts["Bridge"](model.clip.config, 2)
    bridge.load_state_dict(model.bridges["1"].state_dict())
    x, features = torch.randn(2, 5, 64), torch.randn(2, 2, 7, 64)
    inputs = x, bridge.text_context(features), torch.arange(7).expand(2, 7) > 4
    close(bridge(*inputs), model.bridges["1"](*inputs))


# --------------------------------------------------------------------------------------------- parts


def join_qkv(state, where=""):
    """A state dict with q, k, v in one matrix, as torch names it."""
    for name in list(state):
        if re.match(f"{where}q_proj", name):
            rows = [state.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
            state[name.replace("q_proj.", "in_proj_")] = torch.cat(rows)
    return state


def in_torch(attention):
    """A MultiHeadAttention's weights in torch's nn.MultiheadAttention."""
    width = attention.out_proj.in_features
    theirs = torch.nn.MultiheadAttention(width, attention.heads, batch_first=True).eval()
    theirs.load_state_dict(join_qkv(attention.state_dict()))
    return theirs


def test_a_bridge_equals_torch_attention(model):
    """A bridge is x + MLP(attention from the image to [w f + f] W_proj), text padding masked, as
    torch's nn.MultiheadAttention gives it."""
    bridge = model.bridges["1"]
    torch.manual_seed(0)
    x, features = torch.randn(2, 5, 64), [torch.randn(2, 7, 64) for _ in range(2)]
    padding = torch.arange(7) > torch.tensor([[3], [6]])
    t = bridge.W_proj(torch.cat([(1 + w[:7]) * f for w, f in zip(bridge.w, features)], dim=-1))
    close(bridge.text_context(features), t)
    normed = F.layer_norm(x, [64], bridge.norm.weight, bridge.norm.bias)
    attended = in_torch(bridge.attention)(normed, t, t, padding, need_weights=False)[0]
    close(bridge(x, t, padding), x + bridge.mlp(attended))
    block = model.visual_blocks[0]
    y = bridge(x + block.attn(block.ln_1(x)), t, padding)  # between self-attention and MLP
    close(hivg.bridged_block(x, block, bridge, t, padding), y + block.mlp(block.ln_2(y)))


def test_a_grounding_layer_equals_torch_attention():
    """Pre-norm; positions are added to queries and keys, not to values; padding is masked; dropout
    is off in eval mode."""
    layer = shake(hivg.GroundingLayer(32, 4, 48, 0.5)).eval()
    torch.manual_seed(0)
    x, positions = torch.randn(2, 9, 32), torch.randn(9, 32)
    padding = torch.arange(9) > torch.tensor([[4], [8]])
    value = layer.norm_1(x)
    key = value + positions
    y = x + in_torch(layer.attention)(key, key, value, padding, need_weights=False)[0]
    first, _, _, last = layer.mlp
    y = y + last(first(layer.norm_2(y)).relu())
    close(layer(x, positions, padding), y)
    layer.train()
    attended = layer.attention(key, key, value, padding)
    assert not torch.equal(attended, layer.attention(key, key, value, padding))


def test_layers_of_the_multi_level_features_and_bridges():
    """V and C are the paper's for CLIP's depths, and thirds of any other depth; a layer that is
    not there is told, and an empty list of layers that are needed."""
    thirds, L336 = (1, 4, 8, 12), (12, 16, 20, 24)
    rows = [(12, 224, thirds, thirds), (24, 224, (6, 12, 18, 24), (5, 11, 17, 23))]
    rows += [(24, 336, L336, L336), (3, 80, (1, 2, 3), (1, 2, 3))]
    clip = tiny_clip()
    for depth, image_size, V, C in rows:
        sizes = replace(clip.config, vision_layers=depth, image_size=image_size)
        config = HiVGConfig().with_defaults(sizes)
        assert (config.visual_layers, config.bridge_layers) == (V, C)
    for field in ("visual_layers", "bridge_layers", "text_layers"):
        with pytest.raises(HiVGError, match="99.*layers 1 to"):
            HiVG(HiVGConfig(**{field: (1, 99)}), clip)
    for field in ("visual_layers", "text_layers"):  # of bridges there may be none
        with pytest.raises(HiVGError, match="choose among"):
            HiVG(HiVGConfig(**{field: ()}), clip)


def test_a_fresh_model_reads_the_layers_of_clip(tokenizer):
    """Before training, the levels are the outputs of CLIP's own image layers V, a bridge reads the
    text layers f^i, vectors are CLIP's, and positions of patches are those of rows and columns."""
    clip = tiny_clip()
    config = HiVGConfig(visual_layers=(6, 2, 2), bridge_layers=(3,), text_layers=(1, 3), heads=4)
    model = HiVG(config, clip, tokenizer).eval()
    images, tokens, _ = tiny_batch(model)
    seen = watch(model, "bridges.3.W_proj", "visual_proj", "grounding_norm")
    output = model(images, tokens)
    ((context,), _), ((levels,), _), (_, z) = seen
    states = [clip.visual.embed(images)]
    for block in clip.visual.transformer.resblocks:
        states.append(block(states[-1]))
    close(levels, torch.cat([states[2], states[6]], dim=-1))
    states = clip.text_hidden_states(tokens)
    close(context, torch.cat([states[0], states[2]], dim=-1))
    close(output.image_vectors, F.normalize(clip.encode_image(images), dim=-1))
    close(output.text_vectors, F.normalize(clip.encode_text(tokens), dim=-1))
    close(output.boxes, model.box_head(z[:, 0]).sigmoid())  # [REG], [CLS], 16 patches, text
    v, end = model.region_mlp(model.region_norm(z[:, 2:18])), tokens.argmax(dim=1)
    u = F.normalize(z[torch.arange(3), 18 + end], dim=-1)
    close(output.region_logits, (v @ u[:, :, None])[:, :, 0])
    grid = model.grounding_positions[2:18].view(4, 4, 64)
    assert grid[..., :32].std(dim=1).max() < 0.1 and grid[..., 32:].std(dim=0).max() < 0.1


# -------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("adapters, pairs", [("hilora", 12), ("vanilla", 6), ("none", 0)])
def test_a_stage_begins_where_the_one_before_ended(tokenizer, adapters, pairs):
    """Entering the next stage changes no output, entering an earlier one gives its outputs, and
    merging the pairs changes no box."""
    model = tiny_model(tokenizer, adapters=adapters)
    batch = tiny_batch(model)
    boxes = []
    for stage in (0, 1, 2, 3):
        before = vars(model(*batch))
        model.enter_stage(stage)
        close(vars(model(*batch)), before)
        shake_pairs(model)
        boxes.append(model(*batch).boxes)
    if adapters == "hilora":  # the pairs do something, so that the comparison can fail
        assert (boxes[3] - boxes[1]).abs().max() > 1e-4
        for stage in (1, 0, 2, 3):
            model.enter_stage(stage)
            close(model(*batch).boxes, boxes[stage])
            close(model.merge()(*batch).boxes, boxes[stage])
    assert sum("in_proj.lora_A" in name for name in model.state_dict()) == pairs


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_exactly_what_the_table_says_trains(tokenizer, stage):
    """After three steps the bridges, grounding encoder, heads and newest pairs have changed, of w
    the rows of real tokens; CLIP and the older pairs are bit for bit the same."""
    model = tiny_model(tokenizer, stage).train()
    images, tokens, padding = tiny_batch(model)
    length = tokens.argmax(dim=1).max() + 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pairs = {name for name in before if ".lora_" in name and name.endswith(f".{stage}")}
    assert len(pairs) == 4 * (2 * stage)  # two of six layers more in each of three stages
    trainable = {name for name in before if not name.startswith("clip.")} | pairs
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = {"box": torch.rand(3, 4), "object": torch.arange(3)}
    for _ in range(3):
        parts = hivg.compute_losses(model(images, tokens, padding), batch, model.clip.logit_scale)
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        if not name.endswith("k_proj.bias"):  # softmax is blind to the bias of its keys
            assert torch.equal(value, before[name]) == (name not in trainable), name
    for bridge in model.bridges.values():
        rows = bridge.w.ne(0).any(dim=2).any(dim=0)
        assert rows[:length].all() and not rows[length:].any()


@pytest.mark.parametrize("text, more", [("layers", set()), ("projected", {"mixture_proj"})])
def test_the_warm_up_without_bridges(tokenizer, text, more):
    """In stage -1 no bridge is called or trained, all else outside CLIP is trained. In stage 0 those
    of a mixture read one t, the projected text through mixture_proj, without w and W_proj."""
    model = tiny_model(tokenizer, bridge_text=text)
    batch, seen = tiny_batch(model), watch(model, *(f"bridges.{layer}" for layer in (1, 2, 4, 6)))
    for stage, frozen, calls in ((-1, {"clip", "bridges"} | more, 0), (0, {"clip"}, 4)):
        model.enter_stage(stage)
        assert frozen == {
            n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad
        }
        model(*batch)
        assert len(seen) == calls
    if more:
        joint = model.clip.project_text(model.clip.text_hidden_states(batch[1])[-1])
        close([inputs[1] for inputs, _ in seen], [model.mixture_proj(joint)] * 4)
        assert not hasattr(model.bridges["1"], "w")


def test_the_given_clip_is_copied(tokenizer):
    """HiVG leaves the CLIP that it is given bit for bit as it is; a second HiVG fits around it."""
    clip, fresh = tiny_clip(), tiny_clip()
    config = HiVGConfig(image_size=96, rank=4, stage=2, text_layers=(1, 3))
    given = replace(config)
    for _ in range(2):
        model = shake(HiVG(config, clip, tokenizer), 0.1).eval().merge()
        assert clip.config == fresh.config and config == given
        close(clip.state_dict(), fresh.state_dict(), 0)
        assert all(parameter.requires_grad for parameter in clip.parameters())
    assert model(torch.zeros(1, 3, 96, 96), tokenizer("red")).boxes.shape == (1, 4)


# ------------------------------------------------------------------------------- batches and padding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("merged", [False, True])
def test_inputs_of_a_batch(model, dtype, merged):
    """Pixels are normalised, 0 in the padding, which is what lies outside of `inner`; a model of
    any dtype takes them and gives its boxes."""
    torch.manual_seed(0)
    pixels, tokens = torch.randint(256, (2, 3, 64, 64)).byte(), model.tokenize(TEXTS[:2])
    batch = {"image": pixels, "inner": torch.tensor([[0, 0, 64, 64], [5, 20, 50, 30]])}
    padding = torch.ones(2, 64, 64, dtype=torch.bool)
    padding[0] = padding[1, 20:50, 5:55] = False
    mean, std = torch.tensor([clip_model.MEAN, clip_model.STD])[:, :, None, None]
    images = ((pixels / 255 - mean) / std).masked_fill(padding[:, None], 0)
    expected = model(images, tokens, padding).boxes
    if merged:
        model.merge()
    found = model.to(dtype).inputs(batch | {"tokens": tokens, "text": TEXTS})
    tolerance = 0.02 if dtype.itemsize == 2 else 1e-5
    close(found["image"], images.to(dtype), tolerance)
    assert torch.equal(found["padding"], padding)
    boxes = model(found["image"], found["tokens"], padding).boxes
    close(boxes, expected, tolerance)  # in float32


@pytest.mark.filterwarnings("ignore:.*jit.trace", "ignore::torch.jit.TracerWarning")
def test_an_exported_model_takes_batches_and_texts_of_any_size(tokenizer):
    """torch.export with a dynamic batch and text length gives a program with the same outputs, for
    other sizes than those of the example; so does torch.jit.trace."""
    sizes = dict(grounding_layers=1, heads=4, rank=4, groups=1, stage=1)
    clip = tiny_clip(vision_layers=1, text_layers=1, image_size=32)
    model = shake(HiVG(HiVGConfig(**sizes), clip, tokenizer)).eval().requires_grad_(False)
    whole = torch.randn(5, 3, 32, 32), tokenizer(list(TEXTS)), torch.rand(5, 32, 32) > 0.1
    example = tuple(tensor[:3] for tensor in whole)
    free = torch.export.Dim.AUTO  # with a size that it fixes, a call below fails
    sizes = ({0: free}, {0: free, 1: free}, {0: free})
    exported = torch.export.export(model, example, dynamic_shapes=sizes).module()
    traced = torch.jit.trace(lambda *inputs: model(*inputs).boxes, example)
    for count, length in ((5, 77), (1, 20)):
        images, tokens, padding = (tensor[:count] for tensor in whole)
        inputs = images, tokens[:, :length], padding
        expected = model(*inputs)
        close(vars(exported(*inputs)), vars(expected))
        close(traced(*inputs), expected.boxes)


def test_a_prediction_does_not_depend_on_batch_and_text_padding(model):
    """Alone, in another order, cut to the longest text or with other ids after the end token: the
    same outputs for each sample."""
    images, tokens, padding = tiny_batch(model, TEXTS)
    whole = vars(model(images, tokens, padding))
    assert whole["boxes"].std(dim=0).max() > 1e-3
    for order in ([0], [4], [3, 0, 4, 2, 1]):
        part = vars(model(images[order], tokens[order], padding[order]))
        close(part, {name: value[order] for name, value in whole.items()})
    ends = tokens.argmax(dim=1, keepdim=True)
    other = tokens.masked_fill(torch.arange(77) > ends, 99)
    for changed in (tokens[:, : ends.max() + 1], tokens[:, : ends.max() + 4], other):
        close(vars(model(images, changed, padding)), whole)


def keys_masked(model, *inputs):
    """The key padding of a bridge and of the grounding encoder, a list each, for one sample."""
    seen = watch(model, "bridges.1.attention", "grounding_layers.0.attention")
    model(*inputs)
    return [given[3][0].tolist() for given, _ in seen]


def test_padding_is_no_key_and_an_exclamation_mark_is_one(model):
    """What comes after the end token is masked, but not "!", whose id is 0; patches wholly in the
    image's padding are, half-padded ones are not; no padding at all is the same as None."""
    images, tokens, _ = tiny_batch(model, ["blue !; one"])
    end = int(tokens.argmax())
    assert 0 in tokens[0, :end]
    padding, plain = torch.zeros(1, 64, 64, dtype=torch.bool), model(images, tokens).boxes
    close(model(images, tokens, padding).boxes, plain, 0)
    padding[0, 40:] = True  # of four rows of patches, the last wholly and the third by half
    patches, text = [False] * 12 + [True] * 4, [position > end for position in range(77)]
    output = model(images, tokens, padding)
    assert output.patch_padding[0].tolist() == patches
    assert (output.boxes - plain).abs().max() > 1e-6
    masks = keys_masked(model, images, tokens, padding)
    assert masks == [text, [False] * 2 + patches + text]


# --------------------------------------------------------------------------- autocast, checkpointing


def test_the_residual_streams_stay_float32_under_autocast(model):
    """Under autocast matrices are multiplied in bf16, but what the layers of the towers and of the
    grounding encoder add to is float32, and so is what `norm` takes and gives."""
    pattern = r".*\.ln_1|bridges\.\d|grounding_(layers\.\d|norm)"
    streams = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    seen, multiplied = watch(model, *streams), watch(model, "grounding_layers.0.mlp.0")
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*tiny_batch(model))
    dtypes = {tensor.dtype for inputs, output in seen for tensor in (inputs[0], output)}
    assert dtypes == {torch.float32} and multiplied[0][1].dtype == torch.bfloat16
    assert {value.dtype for value in vars(output).values()} == {torch.float32, torch.bool}
    close(output.boxes, model(*tiny_batch(model)).boxes, 0.02)


def gradients(model, batch):
    """{name: gradient} of the parameters that train, of some function of all outputs."""
    model.zero_grad()
    torch.manual_seed(3)
    output = model(*batch)
    (output.boxes.sum() + output.region_logits.square().mean()).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_changes_no_gradient(tokenizer):
    """Layers that are computed again in the backward pass, with the dropout of the first time, give
    the same gradients."""
    model = tiny_model(tokenizer, 2, dropout=0.2, lora_dropout=0.2).train()
    batch, calls = tiny_batch(model), watch(model, "grounding_layers.0.norm_1")
    first = gradients(model, batch)
    model.checkpointing = True
    torch.testing.assert_close(gradients(model, batch), first, atol=1e-5, rtol=1e-4)
    assert len(calls) == 3  # once more in the backward pass


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_each_kind_of_block_is_compiled_once(tokenizer, monkeypatch, backend):
    """Image blocks with a bridge and without, text blocks and grounding layers: each once for all
    layers and numbers of older pairs, and all but that without a bridge again when the length of
    the texts is seen to vary. Another stage compiles image blocks alone, whose pairs have another
    name. Gradients stay, with recomputation as well, and so do names."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    counts, statistics = [], torch._dynamo.utils.counters["stats"]
    statistics.clear()
    model = tiny_model(tokenizer, 3).train()
    names = list(model.state_dict())
    for stage in (3, 2):
        model = copy.deepcopy(model)  # train.py, too, goes on with another model
        model.enter_stage(stage)
        shake_pairs(model)
        images, tokens, padding = tiny_batch(model)
        batches = [(images, tokens[:, :length], padding) for length in (12, 7, 15, 9, 11)]
        model.compile_blocks()
        for batch in batches:
            with torch.compiler.set_stance("force_eager"):
                expected = gradients(model, batch)
            torch.testing.assert_close(gradients(model, batch), expected, atol=1e-5, rtol=1e-4)
            counts.append(statistics["unique_graphs"])
    model.checkpointing = True
    torch.testing.assert_close(gradients(model, batch), expected, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()
    assert counts == [4, 7, 7, 7, 7] + 5 * [11] and list(model.state_dict()) == names


# --------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "adapters, trained, stage",
    [("hilora", 0, -1), ("hilora", 3, 3), ("hilora", 3, 1), ("vanilla", 2, 2), ("none", 1, 1)],
)
def test_a_checkpoint_gives_the_same_boxes(tokenizer, tmp_path, adapters, trained, stage):
    """Saved with several pairs, in the last stage or an earlier one, and read back: merged, in eval
    mode, the same boxes; it needs no vocabulary and no CLIP file, and knows how images are to be
    prepared. Read to go on training it is what it was, pairs of later stages included. Both can be
    copied and pickled."""
    model = tiny_model(tokenizer, trained, adapters=adapters, mean=(0.1, 0.2, 0.3))
    shake_pairs(model)
    batch, path = tiny_batch(model), tmp_path / "best.pt"
    last = model(*batch).boxes
    model.enter_stage(stage)
    save_checkpoint(path, model, progress={"stage": stage})
    again = pickle.loads(pickle.dumps(load_checkpoint(str(path))))
    close(again(*batch).boxes, model(*batch).boxes)
    assert not again.training and again.config == model.config
    assert not any(module.newest for module in hivg.lora.lora_modules(again).values())
    close((again.mean, again.tokenize("the red")), (model.mean, tokenizer("the red")), 0)
    again, more = copy.deepcopy(hivg.read_checkpoint(path))
    assert more["progress"] == {"stage": stage}
    close(again.state_dict(), model.state_dict(), 0)
    ours, theirs = ([p.requires_grad for p in m.parameters()] for m in (model, again))
    assert ours == theirs
    again.eval().enter_stage(trained)
    close(again(*batch).boxes, last)


def test_fresh_pairs_start_from_the_merged_model(model):
    """A copy for a new training gives the same boxes and has no pairs; settings can change."""
    fresh = hivg.with_fresh_pairs(model, adapters="vanilla", rank=2).eval()
    batch = tiny_batch(model)
    close(fresh(*batch).boxes, model(*batch).boxes)
    assert not any("lora" in name for name in fresh.state_dict())
    fresh.enter_stage(1)
    assert fresh.visual_blocks[0].attn.in_proj.lora_A["1"].shape[1] == 2


def test_a_checkpoint_that_is_none_is_told(tokenizer, vocabulary, tmp_path):
    """Another file, weights that are missing or left over, another version's: one
    sentence that names the file, and the weight."""
    save_checkpoint(tmp_path / "best.pt", tiny_model(tokenizer, grounding_layers=1))
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    state, config = content["model"], content["config"]
    lost = "grounding_norm.bias"
    lacking = {name: tensor for name, tensor in state.items() if name != lost}
    files = {
        "clip.pt": (tiny_clip().state_dict(), ""),
        "lacking.pt": (content | {"model": lacking}, lost),
        "extra.pt": (content | {"model": state | {"surprise": torch.zeros(1)}}, "surprise"),
        "fields.pt": (content | {"config": config | {"surprise": 1}}, "surprise"),
        "vocabulary.pt": (content | {"vocabulary": 3}, ""),
        "path.pt": (content | {"vocabulary": str(vocabulary)}, ""),  # nothing else is opened
        "targets.pt": (content | {"config": config | {"targets": ("attn.qkv",)}}, "attn.qkv"),
        "layers.pt": (content | {"config": config | {"bridge_layers": (99,)}}, "99"),
        "numbers.pt": (content | {"model": state | {lost: 3}}, "more than weights"),
        "absent.pt": (None, ""),
    }
    check_refusals(load_checkpoint, tmp_path, files)


class Slip(TypeError, AttributeError):
    """What a typing error in the program raises."""


@pytest.mark.parametrize(
    "place",
    [
        "clip_model.hugging_face_to_openai",
        "clip_model.infer_config",
        "hivg.convert_authors",
        "hivg.Bridge.__init__",
        "hivg.Bridge.text_context",
    ],
)
def test_a_slip_in_the_program_keeps_its_type(model, tmp_path, monkeypatch, place):
    """An error in the code of the model or of what converts a file is no error of the file."""
    torch.save(hugging_face_state(tiny_clip()), tmp_path / "clip.bin")
    save_checkpoint(tmp_path / "best.pt", model)
    theirs = {"model": {"vl_pos_embed.weight": torch.zeros(1)}, "args": Namespace()}
    torch.save(theirs, tmp_path / "theirs.pth")
    monkeypatch.setattr(place, Mock(side_effect=Slip))
    with pytest.raises(Slip):  # in the first that comes to the place
        load_clip(tmp_path / "clip.bin")
        load_checkpoint(tmp_path / "best.pt")(*tiny_batch(model))
        load_checkpoint(tmp_path / "theirs.pth")


# -------------------------------------------------------------------- the authors' released checkpoints


@pytest.mark.parametrize("name", ["base", "large"])
def test_the_authors_checkpoints_equal_golden(shared, name):
    """Outputs and losses are the released code's: one sample at a time and as a batch, however much
    padding the tokens come with."""
    model = load_checkpoint(shared / f"golden/official_{name}_checkpoint.pth")
    golden = torch.load(shared / f"golden/official_{name}_golden.pt", weights_only=True)
    images, tokens, masks = golden["images"], golden["token_ids"], golden["masks"].bool()
    assert model.config.mean == (0.485, 0.456, 0.406) and not model.training
    encoded = watch(model, "grounding_norm")
    with torch.no_grad():
        output = model(images, tokens, masks)
        for i, boxes in enumerate(golden["pred_boxes"]):
            close(model(images[[i]], tokens[[i], :40], masks[[i]]).boxes[0], boxes, 1e-4)
    close(output.boxes, golden["pred_boxes"], 1e-4)
    close(output.region_logits, golden["visu_token_similarity"], 1e-4)
    close(encoded[0][1], golden["encoder_output"], 1e-4)
    close(output.image_vectors, F.normalize(golden["img_cls_embed"], dim=-1), 1e-4)
    close(output.text_vectors, F.normalize(golden["text_eos_embed"], dim=-1), 1e-4)

    batch = {"box": golden["target_boxes"], "object": torch.arange(5)}
    parts = hivg.compute_losses(output, batch, model.clip.logit_scale)
    for name, their_name in (("l1", "bbox"), ("giou", "giou"), ("clc", "contrastive")):
        loss = hivg.LOSS_WEIGHTS[name] * parts[name]
        close(loss, golden["losses"][f"loss_{their_name}"], 1e-4)


AUTHORS = (  # patterns of our names, and those of the released code
    (r"^clip\..*", ""),
    (r"W_proj", "gate"),
    (r"\.w(\.\d)", r".adaptive_weights\1"),
    (r"^bridges\.(\d+)\.", lambda m: f"layers.{int(m[1]) - 1}.cross_"),
    (r"^layers", "clip.vision_model.encoder.layers"),
    (r"cross_attention", "cross_attn"),
    (r"^region_(mlp|norm)", r"visu_token_\1"),
    (r"^box_head.(\d)", lambda m: f"bbox_embed.layers.{int(m[1]) // 2}"),
    (r"^grounding_positions", "vl_pos_embed.weight"),
    (r"^grounding_", "vl_transformer.encoder."),
    (r"(encoder\.layers.*)attention\.", r"\1self_attn."),
    (r"norm_", "norm"),
    (r"(vl_tr.*)mlp\.0", r"\1linear1"),
    (r"(vl_tr.*)mlp\.3", r"\1linear2"),
    (r"mlp\.0", "mlp.fc1"),
    (r"mlp\.3", "mlp.fc2"),
    (r"^mixture_proj", "condition_text_proj"),
    (r"^reg_token", "reg_token.weight"),
)


def in_authors_names(model, stage, settings):
    """What the released code would save of `model`: its weights under the authors' names, each
    matrix that has LoRA there split in a matrix and a pair, and leftovers that nothing uses."""
    state = join_qkv(model.state_dict(), "grounding.*")
    for number in model.bridges:
        w = state.pop(f"bridges.{number}.w", torch.ones(1, 3))
        if not settings["enable_adaptive_weights"]:
            w = torch.ones(len(w), 3)
        state |= {f"bridges.{number}.w.{i}.weight": w_i for i, w_i in enumerate(w)}
        state.setdefault(f"bridges.{number}.W_proj.bias", torch.zeros(3))
    state.setdefault("mixture_proj.weight", torch.zeros(3))
    state["reg_token"] = state["reg_token"][None]
    W, b = (state.pop(f"visual_proj.{kind}") for kind in ("weight", "bias"))
    first = torch.eye(len(W)).roll(1, 0)  # it is two maps there
    state["visu_proj.weight"], state["visu_proj.bias"] = first, torch.ones(len(W))
    state["ml_visual_projection.weight"] = first.T @ W
    state["ml_visual_projection.bias"] = first.T @ (b - 1)
    for name in ("ml_text_feat_perceiver.bias", "reg_pos_embed.weight", "seg_conv2.weight"):
        state[name] = torch.zeros(3)

    state = rename_keys(state, AUTHORS)
    state |= {f"clip.{name}": t for name, t in hugging_face_state(model.clip).items()}
    state["clip.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    for name in [name for name in state if re.match(r"clip.*attn.*_proj\.weight", name)]:
        A, B = torch.randn(8, state[name].shape[1]), torch.randn(len(state[name]), 8) * 0.1
        state[name] = state[name] - 16 / 8 * B @ A
        for letter, matrix in zip("AB", (A, B)):
            state[name.replace("weight", f"lora_{letter}.default.weight")] = matrix
    state = rename_keys(state, [(r"^clip\.", "clip." + "base_model.model." * (stage + 1))])
    args = dict(model="ViT-B/16", vl_nheads=4, vl_enc_layers=2, normalize_before=True)
    return {"model": state, "args": Namespace(**args, **settings)}


@pytest.mark.parametrize(
    "stage, dataset, mixed, adaptive, depth, fields",
    [
        (0, "unc", False, True, 24, {"text_layers": (12,)}),
        (1, "unc+", False, True, 6, {"text_layers": (6, 12)}),
        (3, "gref_umd", False, False, 6, {"text_layers": tuple(range(1, 13))}),
        (2, "mixup", True, True, 6, {"bridge_text": "projected"}),
        (0, "referit", False, True, 6, {"text_layers": (6, 12), "bridge_layers": ()}),
    ],
)
def test_checkpoints_in_the_authors_names(
    tmp_path, tokenizer, stage, dataset, mixed, adaptive, depth, fields
):
    """Any stage, any data set, mixed or not, with or without bridges and w, both depths: the boxes
    of the model whose weights were written, found by rule from names, shapes and args."""
    clip = tiny_clip(vision_layers=depth, text_layers=12)
    sizes = dict(grounding_layers=2, heads=4, feedforward=64, region_width=64, adapters="none")
    model = shake(HiVG(HiVGConfig(**sizes, **fields, authors_masks=True), clip, tokenizer)).eval()
    for bridge in model.bridges.values():
        shake(bridge.mlp, 0.1)
        if not adaptive:
            bridge.w.data.zero_()
    settings = dict(dataset=dataset, mixup_pretrain=mixed, enable_adaptive_weights=adaptive)
    content, path = in_authors_names(model, stage, settings), tmp_path / "best_checkpoint.pth"
    torch.save(content, path)
    again, batch = load_checkpoint(path), tiny_batch(model)
    assert again.config.visual_layers == ((6, 12, 18, 24) if depth == 24 else (1, 2, 4, 6))
    assert again.config.mean == (0.485, 0.456, 0.406)
    before, after = model(*batch), again(*batch)
    close(after.boxes, before.boxes, 1e-4)
    close(after.region_logits, before.region_logits, 1e-3)
    if mixed:
        content["model"]["surprise.weight"] = torch.zeros(1)
        check_refusals(load_checkpoint, tmp_path, {path.name: (content, "surprise.weight")})


def test_the_authors_masks(tokenizer):
    """As the released code: id 0 is no key, text padding is one for the bridges, a patch counts as
    padding where the mask, resized to the grid and rounded, says so."""
    model = tiny_model(tokenizer, authors_masks=True)
    images, tokens, _ = tiny_batch(model, ["blue !; one"])
    padding = torch.zeros(1, 64, 64, dtype=torch.bool)
    padding[0, 38:] = True  # the third row of patches, 32 to 47, mostly
    patches = [False] * 8 + [True] * 8
    masks = keys_masked(model, images, tokens[:, :20], padding)
    assert masks == [[False] * 77, [False] * 2 + patches + (tokens[0] == 0).tolist()]
