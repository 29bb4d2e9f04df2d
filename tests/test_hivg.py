"""hivg.py: boxes, losses, stages, batches, padding, checkpoints."""

import copy
import json
import math
import pickle
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    close,
    hugging_face_state,
    shake,
    shake_pairs,
    tiny_batch,
    tiny_clip,
    tiny_model,
)

import hivg
from clip_model import HiVGError
from hivg import HiVG, HiVGConfig, HiVGOutput, load_checkpoint, save_checkpoint

TEXTS = ("red one", "blue !; one", "the big red one on the left", "one", "x!")


@pytest.fixture
def model(tokenizer):
    """HiVG in stage 2, no parameter zero."""
    model = tiny_model(tokenizer, 2)
    shake_pairs(model)
    model.enter_stage(2)
    for bridge in model.bridges.values():
        torch.nn.init.normal_(bridge.w, std=0.5)
    return model


# --------------------------------------------------------------------------------- boxes and losses


def test_iou_and_giou_equal_golden(shared):
    """IoU and GIoU are those of exact arithmetic, and finite where these are undefined."""
    rows = json.loads((shared / "golden/giou_golden.json").read_text())
    a, b = (torch.tensor([row[box] for row in rows]) for box in ("box1", "box2"))
    for name, found in (("iou", hivg.box_iou(a, b)), ("giou", hivg.generalized_box_iou(a, b))):
        defined = torch.tensor([row[name] is not None for row in rows])
        expected = torch.tensor([row[name] or 0.0 for row in rows])
        close(found[defined], expected[defined], 1e-6)
        assert found.isfinite().all() and not defined.all()


def test_iou_and_giou_by_hand():
    """Nested, touching, apart and equal boxes: values that can be checked in the head."""
    a = torch.tensor([[0, 0, 4, 4], [0, 0, 1, 1], [0, 0, 1, 1], [1, 2, 3, 4.0]])
    b = torch.tensor([[0, 0, 2, 2], [1, 0, 2, 1], [3, 0, 4, 1], [1, 2, 3, 4.0]])
    assert hivg.box_iou(a, b).tolist() == [0.25, 0, 0, 1]
    assert hivg.generalized_box_iou(a, b).tolist() == [0.25, 0, -0.5, 1]


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-9])
@pytest.mark.parametrize("other", [[0.5, 0.5, 0, 0], [0.5, 0.5, 1e-9, 1e-9], [0.2, 0.3, 0.1, 0.1]])
def test_gradients_are_finite_for_boxes_without_area(other, size):
    """A predicted box without area, or with hardly any, never gives NaN, as loss or as gradient."""
    box = torch.tensor([[0.5, 0.5, size, size]], requires_grad=True)
    for overlap in (hivg.generalized_box_iou, hivg.box_iou):
        boxes = hivg.cxcywh_to_xyxy(box), hivg.cxcywh_to_xyxy(torch.tensor([other]))
        value = overlap(*boxes).sum()
        assert value.isfinite() and -1 <= value <= 1
        assert torch.autograd.grad(value, box)[0].isfinite().all()


def losses(boxes, true, logits=None, padding=None, vectors=None, **more):
    """compute_losses of given outputs; what is not given does not matter."""
    B = len(boxes)
    logits = torch.zeros(B, 16) if logits is None else logits
    padding = torch.zeros(B, 16, dtype=torch.bool) if padding is None else padding
    vectors = (torch.eye(B), torch.eye(B)) if vectors is None else vectors
    output = HiVGOutput(boxes, logits, padding, *vectors)
    return hivg.compute_losses(output, true, torch.arange(B), torch.tensor(0.0), **more)


def test_box_loss_by_hand():
    """L1 is summed over the coordinates and averaged over the batch; beta makes it smooth."""
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.4, 0.4]])
    true = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.6, 0.3, 0.4, 0.4]])
    # the second pair: intersection 0.3 x 0.2, union 0.26, hull 0.5 x 0.6
    giou = 0.06 / 0.26 - (0.3 - 0.26) / 0.3
    close(losses(boxes, true)["l1"], torch.tensor((0.1 + 0.2) / 2))
    close(losses(boxes, true)["giou"], torch.tensor((1 - giou) / 2))
    close(losses(boxes, true, beta=1.0)["l1"], torch.tensor((0.1**2 / 2 + 0.2**2 / 2) / 2))


def test_focal_and_dice_loss_patch_by_patch():
    """Both equal loops over the patches; the target is 1 where the patch's centre lies in the box;
    padding patches don't count, whatever their logits are."""
    torch.manual_seed(0)
    logits = torch.randn(2, 16)
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.3], [0.3, 0.6, 0.2, 0.6]])
    padding = torch.arange(16) < torch.tensor([[0], [8]])
    focal, dice = [], []
    for b in range(2):
        terms, both, total = [], 0.0, 0.0
        cx, cy, w, h = boxes[b].tolist()
        for n in range(0 if b == 0 else 8, 16):
            x, y = (n % 4 + 0.5) / 4, (n // 4 + 0.5) / 4
            inside = abs(x - cx) <= w / 2 and abs(y - cy) <= h / 2
            p = 1 / (1 + math.exp(-logits[b, n]))
            alpha_t, p_t = (0.25, p) if inside else (0.75, 1 - p)
            terms.append(-alpha_t * (1 - p_t) ** 2 * math.log(p_t))
            both, total = both + p * inside, total + p + inside
        focal.append(sum(terms) / len(terms))
        dice.append(1 - (2 * both + 1) / (total + 1))
    for extra in (0.0, 30.0):  # in the padding
        parts = losses(boxes, boxes, logits + extra * padding, padding)
        close(parts["focal"], torch.tensor(sum(focal) / 2))
        close(parts["dice"], torch.tensor(sum(dice) / 2))


def test_contrastive_loss_row_by_row():
    """It equals a loop over rows and columns where samples of the same object are no negatives."""
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(4, 8), dim=-1) for _ in range(2))
    objects, total = torch.tensor([7, 7, 2, 8]), 0.0
    for a, b in ((image, text), (text, image)):
        for i in range(4):
            others = [j for j in range(4) if i == j or objects[i] != objects[j]]
            exponents = {j: math.exp(5 * float(a[i] @ b[j])) for j in others}
            total -= math.log(exponents[i] / sum(exponents.values()))
    close(hivg.contrastive_loss(image, text, torch.tensor(5.0), objects), torch.tensor(total / 8))


# --------------------------------------------------------------------------------------------- parts


def in_torch(attention):
    """A CrossAttention's weights in torch's nn.MultiheadAttention."""
    width = attention.out_proj.in_features
    theirs = torch.nn.MultiheadAttention(width, attention.heads, batch_first=True).eval()
    parts = [getattr(attention, f"{name}_proj") for name in "qkv"]
    theirs.in_proj_weight.data = torch.cat([part.weight for part in parts]).data
    theirs.in_proj_bias.data = torch.cat([part.bias for part in parts]).data
    theirs.out_proj.load_state_dict(attention.out_proj.state_dict())
    return theirs


def test_a_bridge_equals_torch_attention(model):
    """A bridge is x + MLP(attention from the image to [w f + f] W_proj), text padding masked, as
    torch's nn.MultiheadAttention gives it; a fresh bridge changes nothing."""
    bridge = model.bridges["1"]
    torch.manual_seed(0)
    x, features = torch.randn(2, 5, 64), [torch.randn(2, 7, 64) for _ in range(2)]
    padding = torch.arange(7) > torch.tensor([[3], [6]])
    t = bridge.W_proj(torch.cat([(1 + w[:7]) * f for w, f in zip(bridge.w, features)], dim=-1))
    close(bridge.text_context(features), t)
    normed = F.layer_norm(x, [64], bridge.norm.weight, bridge.norm.bias)
    attended = in_torch(bridge.attention)(normed, t, t, padding, need_weights=False)[0]
    close(bridge(x, t, padding), x + bridge.mlp(attended))
    fresh = hivg.Bridge(model.clip.config, 2)
    assert torch.equal(fresh(x, fresh.text_context(features), padding), x)


def test_a_grounding_layer_equals_torch_attention():
    """Pre-norm; positions are added to queries and keys, not to values; padding is masked; the
    first queries alone give the first rows; dropout is off in eval mode."""
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
    close(layer(x, positions, padding, queries=2), y[:, :2])
    layer.train()
    attended = layer.attention(key, key, value, padding)
    assert not torch.equal(attended, layer.attention(key, key, value, padding))


def test_layers_of_the_multi_level_features_and_bridges():
    """V and C are the paper's for CLIP's depths, and thirds of any other depth; a layer that is
    not there is told."""
    thirds, L336 = (1, 4, 8, 12), (12, 16, 20, 24)
    rows = [(12, 224, thirds, thirds), (24, 224, (6, 12, 18, 24), (5, 11, 17, 23))]
    rows += [(24, 336, L336, L336), (3, 80, (1, 2, 3), (1, 2, 3))]
    clip = tiny_clip()
    for depth, image_size, V, C in rows:
        sizes = replace(clip.config, vision_layers=depth, image_size=image_size)
        config = HiVGConfig().with_defaults(sizes)
        assert (config.visual_layers, config.bridge_layers) == (V, C)
    for field in ("visual_layers", "bridge_layers", "text_layers"):
        with pytest.raises(HiVGError, match="99"):
            HiVG(HiVGConfig(**{field: (1, 99)}), clip)


def test_a_fresh_model_reads_the_layers_of_clip(tokenizer):
    """Before training, the levels are the outputs of CLIP's own image layers V, a bridge reads the
    text layers f^i, vectors are CLIP's, and positions of patches are those of rows and columns."""
    clip = tiny_clip()
    config = HiVGConfig(visual_layers=(2, 6), bridge_layers=(3,), text_layers=(1, 3), heads=4)
    model = HiVG(config, clip, tokenizer).eval()
    images, tokens, _ = tiny_batch(model)
    seen = {}
    for name in ("visual_proj", "bridges.3.W_proj", "grounding_norm"):

        def note(module, inputs, output, name=name):
            seen[name] = (*inputs, output)

        model.get_submodule(name).register_forward_hook(note)
    output = model(images, tokens, for_losses=True)
    states = [clip.visual.embed(images)]
    for block in clip.visual.transformer.resblocks:
        states.append(block(states[-1]))
    close(seen["visual_proj"][0], torch.cat([states[2], states[6]], dim=-1))
    states = clip.text_hidden_states(tokens)
    close(seen["bridges.3.W_proj"][0], torch.cat([states[0], states[2]], dim=-1))
    close(output.image_vectors, F.normalize(clip.encode_image(images), dim=-1))
    close(output.text_vectors, F.normalize(clip.encode_text(tokens), dim=-1))
    z = seen["grounding_norm"][1]  # [REG], [CLS], 16 patches, text
    v, end = model.region_mlp(model.region_norm(z[:, 2:18])), tokens.argmax(dim=1)
    for b, u in enumerate(F.normalize(z[torch.arange(3), 18 + end], dim=-1)):
        close(output.region_logits[b], v[b] @ u)
    grid = model.grounding_positions[2:18].view(4, 4, 64)
    assert grid[..., :32].std(dim=1).max() < 0.1 and grid[..., 32:].std(dim=0).max() < 0.1


# -------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("adapters", ["hilora", "vanilla", "none"])
def test_a_stage_begins_where_the_one_before_ended(tokenizer, adapters):
    """Entering the next stage changes no output, entering an earlier one gives its outputs, and
    merging the pairs changes no box."""
    model = tiny_model(tokenizer, adapters=adapters)
    batch, boxes = tiny_batch(model), [tiny_model(tokenizer)(*tiny_batch(model)).boxes]
    for stage in (1, 2, 3):
        before = vars(model(*batch, for_losses=True))
        model.enter_stage(stage)
        after = vars(model(*batch, for_losses=True))
        for name in before:
            close(after[name], before[name])
        for name, parameter in model.named_parameters():
            if "lora_B" in name and parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)  # as training would
        boxes.append(model(*batch).boxes)
    if adapters == "hilora":  # the pairs do something, so that the comparison can fail
        assert (boxes[3] - boxes[1]).abs().max() > 1e-4
        for stage in (1, 0, 2, 3):
            model.enter_stage(stage)
            close(model(*batch).boxes, boxes[stage])
            close(model.merge()(*batch).boxes, boxes[stage])
    counts = {"hilora": 3 + 3 + 2 + 2 + 1 + 1, "vanilla": 6, "none": 0}  # of pairs in six layers
    assert sum("in_proj.lora_A" in name for name in model.state_dict()) == counts[adapters]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_exactly_what_the_table_says_trains(tokenizer, stage):
    """After three steps the bridges, grounding encoder, heads and newest pairs have changed, of w
    the rows of real tokens; CLIP and the older pairs are bit for bit the same."""
    model = tiny_model(tokenizer, stage)
    images, tokens, padding = tiny_batch(model)
    length = tokens.argmax(dim=1).max() + 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = {name for name in before if not name.startswith("clip.")}
    for layer in range(2 * stage):  # of six: two layers more in each of three stages
        attn = f"clip.visual.transformer.resblocks.{layer}.attn"
        trainable |= {f"{attn}.{m}_proj.lora_{x}.{stage}" for m in ("in", "out") for x in "AB"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.4, 0.6, 0.3, 0.2], [0.5, 0.4, 0.2, 0.4]])
    for _ in range(3):
        output = model(images, tokens, padding, for_losses=True)
        parts = hivg.compute_losses(output, boxes, torch.arange(3), model.clip.logit_scale)
        optimizer.zero_grad()
        sum(weight * parts[name] for name, weight in hivg.LOSS_WEIGHTS.items()).backward()
        optimizer.step()
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # softmax is blind to the bias of its keys
    assert {name for name in trainable ^ changed if not name.endswith("k_proj.bias")} == set()
    for bridge in model.bridges.values():
        rows = bridge.w.ne(0).any(dim=2).any(dim=0)
        assert rows[:length].all() and not rows[length:].any()


@pytest.mark.parametrize("text_layers, more", [((1, 3), set()), ((), {"mixed_proj"})])
def test_the_warm_up_without_bridges(tokenizer, text_layers, more):
    """In stage -1 the bridges do nothing and are not trained, all else outside CLIP is; they enter
    in stage 0 without changing a box."""
    model = HiVG(HiVGConfig(text_layers=text_layers, stage=-1), tiny_clip(), tokenizer).eval()
    batch, frozen = tiny_batch(model), []
    before = model(*batch).boxes
    for stage in (-1, 0):
        model.enter_stage(stage)
        names = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
        frozen.append(names)
        close(model(*batch).boxes, before)
    assert frozen == [{"clip", "bridges"} | more, {"clip"}]
    shake(model.bridges, 0.2)
    assert (model(*batch).boxes - before).abs().max() > 1e-4
    model.enter_stage(-1)
    close(model(*batch).boxes, before, 0)


def test_the_given_clip_is_copied(tokenizer):
    """HiVG leaves the CLIP that it is given bit for bit as it is; a second HiVG fits around it."""
    clip, fresh = tiny_clip(), tiny_clip()
    config = HiVGConfig(image_size=96, rank=4, stage=2, text_layers=(1, 3))
    for _ in range(2):
        torch.manual_seed(0)
        model = shake(HiVG(config, clip, tokenizer), 0.1).eval().merge()
        assert clip.config == fresh.config and clip.state_dict().keys() == fresh.state_dict().keys()
        for a, b in zip(clip.parameters(), fresh.parameters()):
            assert torch.equal(a, b) and a.requires_grad
    assert model(torch.zeros(1, 3, 96, 96), tokenizer("red")).boxes.shape == (1, 4)
    assert config == HiVGConfig(image_size=96, rank=4, stage=2, text_layers=(1, 3))


def test_a_copied_model_gives_the_same_boxes(model):
    """A model with its tokenizer can be deep-copied and pickled, in training and merged."""
    batch = tiny_batch(model)
    for original in (model, copy.deepcopy(model).merge()):
        boxes = original(*batch).boxes
        for again in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
            assert torch.equal(again(*batch).boxes, boxes)
            assert torch.equal(again.tokenize("red one"), model.tokenize("red one"))


# ------------------------------------------------------------------------------- batches and padding


def test_a_prediction_does_not_depend_on_its_batch(model):
    """Alone, in a batch, in another order, with all queries in the last layer or [REG] alone: the
    same boxes and region logits for each sample."""
    images, tokens, padding = tiny_batch(model, TEXTS)
    together = model(images, tokens, padding, for_losses=True)
    assert together.boxes.std(dim=0).max() > 1e-3
    assert (0 < together.boxes).all() and (together.boxes < 1).all()
    for i in range(len(TEXTS)):
        alone = model(images[i : i + 1], tokens[i : i + 1], padding[i : i + 1], for_losses=True)
        close(alone.boxes[0], together.boxes[i])
        close(alone.region_logits[0], together.region_logits[i])
    order = torch.tensor([3, 0, 4, 2, 1])
    short = model(images[order], tokens[order], padding[order])
    close(short.boxes, together.boxes[order])
    assert short.region_logits is None


def test_a_prediction_does_not_depend_on_text_padding(model):
    """Cut to the longest text, or with other ids after the end token: the same outputs."""
    images, tokens, padding = tiny_batch(model, TEXTS)
    whole = vars(model(images, tokens, padding, for_losses=True))
    longest = int(tokens.argmax(dim=1).max()) + 1
    other = tokens.clone()
    other[torch.arange(77) > tokens.argmax(dim=1, keepdim=True)] = 99
    for changed in (tokens[:, :longest], tokens[:, : longest + 3], other):
        for name, value in vars(model(images, changed, padding, for_losses=True)).items():
            close(value, whole[name])


def keys_masked(model, module, *inputs):
    """The key padding of a model's attention module in a forward pass, as a list for each sample."""
    masks = []
    hook = module.register_forward_pre_hook(lambda module, inputs: masks.append(inputs[3]))
    model(*inputs)
    hook.remove()
    return masks[0].tolist()


def test_an_exclamation_mark_counts(model):
    """Id 0 is "!", not padding: within a text it is attended to, as every other token is."""
    images, tokens, _ = tiny_batch(model, ["blue !; one"])
    end = int(tokens.argmax())
    assert 0 in tokens[0, :end]
    expected = [position > end for position in range(77)]
    grounding, bridge = model.grounding_layers[0].attention, model.bridges["1"].attention
    assert keys_masked(model, grounding, images, tokens)[0][18:] == expected
    assert keys_masked(model, bridge, images, tokens)[0] == expected


def test_padding_patches_are_no_keys(model):
    """Patches wholly in the image's padding are masked in the grounding encoder, half-padded ones
    are not; no padding at all is the same as None."""
    images, tokens, _ = tiny_batch(model, ["red one"])
    padding = torch.zeros(1, 64, 64, dtype=torch.bool)
    close(model(images, tokens, padding).boxes, model(images, tokens).boxes, 0)
    padding[0, 40:] = True  # of four rows of patches, the last wholly and the third by half
    expected = [False] * 12 + [True] * 4
    output = model(images, tokens, padding, for_losses=True)
    assert output.patch_padding[0].tolist() == expected
    masked = keys_masked(model, model.grounding_layers[0].attention, images, tokens, padding)[0]
    assert masked[:18] == [False] * 2 + expected
    assert (output.boxes - model(images, tokens).boxes).abs().max() > 1e-6


# --------------------------------------------------------------------------- autocast, checkpointing


@pytest.mark.parametrize("for_losses", [False, True])
def test_the_residual_streams_stay_float32_under_autocast(model, for_losses):
    """Under autocast matrices are multiplied in bf16, but what the layers of the towers and of the
    grounding encoder add to is float32, and so is what `norm` takes and gives."""
    dtypes, multiplied = set(), set()

    def note(module, inputs, output):
        dtypes.update({inputs[0].dtype, output.dtype})

    streams = [*model.grounding_layers, model.grounding_norm]
    streams += [block.ln_1 for block in (*model.visual_blocks, *model.clip.transformer.resblocks)]
    streams += [bridge for bridge in model.bridges.values()]
    for module in streams:
        module.register_forward_hook(note)
    up = model.grounding_layers[0].mlp[0]
    up.register_forward_hook(lambda module, inputs, output: multiplied.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*tiny_batch(model), for_losses=for_losses)
    assert dtypes == {torch.float32} and multiplied == {torch.bfloat16}
    values = [value for value in vars(output).values() if value is not None]
    assert {value.dtype for value in values} <= {torch.float32, torch.bool}
    close(output.boxes, model(*tiny_batch(model)).boxes, 0.02)


@pytest.mark.parametrize("way", ["checkpointing", pytest.param("compile", marks=pytest.mark.slow)])
def test_checkpointing_and_compiling_change_no_gradient(tokenizer, way):
    """Layers that are computed again in the backward pass, with the dropout of the first time, give
    the same gradients; so does a compiled model, without dropout."""
    dropout = 0.2 if way == "checkpointing" else 0.0
    model, calls = tiny_model(tokenizer, 2, dropout=dropout, lora_dropout=dropout).train(), []
    images, tokens, padding = tiny_batch(model)
    first = model.grounding_layers[0]
    first.register_forward_pre_hook(lambda *given: calls.append(model.checkpointing))
    gradients = []
    for again in (False, True):
        if again and way == "compile":
            model.compile()
        model.checkpointing = again and way == "checkpointing"
        model.zero_grad()
        torch.manual_seed(3)
        output = model(images, tokens, padding, for_losses=True)
        (output.boxes.sum() + output.region_logits.square().mean()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.compiler.reset()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)
    assert way == "compile" or calls == [False, True, True]  # once more in the backward pass


# --------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "adapters, trained, stage",
    [("hilora", 0, -1), ("hilora", 3, 3), ("hilora", 3, 1), ("vanilla", 2, 2), ("none", 1, 1)],
)
def test_a_checkpoint_gives_the_same_boxes(tokenizer, tmp_path, adapters, trained, stage):
    """Saved with several pairs, in the last stage or an earlier one, and read back: merged, in eval
    mode, the same boxes; it needs no vocabulary and no CLIP file, and knows how images are to be
    prepared."""
    model = tiny_model(tokenizer, trained, adapters=adapters, mean=(0.1, 0.2, 0.3))
    shake_pairs(model)
    model.enter_stage(stage)
    batch = tiny_batch(model)
    save_checkpoint(tmp_path / "best.pt", model, progress={"stage": stage})
    again = load_checkpoint(str(tmp_path / "best.pt"))
    close(again(*batch).boxes, model(*batch).boxes)
    assert not again.training and again.config == model.config
    assert torch.equal(again.tokenize("the red one"), tokenizer("the red one"))
    again, content = hivg.read_checkpoint(tmp_path / "best.pt")  # to go on training
    assert content["progress"] == {"stage": stage}
    for state in (content["model"], again.state_dict()):
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    trainable = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_checkpoint_that_is_none_is_told(tokenizer, tmp_path):
    """Another file, weights that are missing, left over or of another shape, another version's: one
    sentence that names the file, and the weight."""
    save_checkpoint(tmp_path / "best.pt", tiny_model(tokenizer))
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    state, config = content["model"], content["config"]
    lost = "grounding_norm.bias"
    lacking = {name: tensor for name, tensor in state.items() if name != lost}
    files = {
        "list.pt": ([1, 2], ""),
        "clip.pt": (tiny_clip().state_dict(), ""),
        "lacking.pt": (content | {"model": lacking}, lost),
        "extra.pt": (content | {"model": state | {"surprise": torch.zeros(1)}}, "surprise"),
        "shape.pt": (content | {"model": state | {lost: torch.zeros(3)}}, lost),
        "fields.pt": (content | {"config": config | {"surprise": 1}}, "surprise"),
        "vocabulary.pt": (content | {"vocabulary": 3}, ""),
        "format.pt": (content | {"format": "hivg-1"}, "hivg-1"),
        "absent.pt": (None, ""),
    }
    for name, (content, reason) in files.items():
        if content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(HiVGError, match=f"{name}.*{reason}") as caught:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [NameError, TypeError])
def test_errors_of_the_program_come_out(model, tmp_path, monkeypatch, error):
    """An error in the code of the model is no error of a file: it keeps its type."""

    def fail(*args, **kwargs):
        raise error("a slip in the code")

    save_checkpoint(tmp_path / "best.pt", model)
    monkeypatch.setattr(hivg.Bridge, "text_context", fail)
    with pytest.raises(error, match="a slip"):
        load_checkpoint(tmp_path / "best.pt")(*tiny_batch(model))
    monkeypatch.setattr(hivg.Bridge, "__init__", fail)
    with pytest.raises(error, match="a slip"):
        load_checkpoint(tmp_path / "best.pt")


# -------------------------------------------------------------------- the authors' released checkpoints


@pytest.mark.parametrize("name", ["base", "large"])
def test_the_authors_checkpoints_equal_golden(shared, name):
    """Outputs and losses are the released code's: one sample at a time and as a batch, however much
    padding the tokens come with."""
    model = load_checkpoint(shared / f"golden/official_{name}_checkpoint.pth")
    golden = torch.load(shared / f"golden/official_{name}_golden.pt", weights_only=True)
    images, tokens, masks = golden["images"], golden["token_ids"], golden["masks"].bool()
    assert model.config.mean == (0.485, 0.456, 0.406) and not model.training
    encoded = []
    model.grounding_norm.register_forward_hook(lambda *given: encoded.append(given[2]))
    with torch.no_grad():
        output = model(images, tokens, masks, for_losses=True)
        for i, boxes in enumerate(golden["pred_boxes"]):
            close(model(images[[i]], tokens[[i], :40], masks[[i]]).boxes[0], boxes, 1e-4)
    close(output.boxes, golden["pred_boxes"], 1e-4)
    close(output.region_logits, golden["visu_token_similarity"], 1e-4)
    close(encoded[0], golden["encoder_output"], 1e-4)
    close(output.image_vectors, F.normalize(golden["img_cls_embed"], dim=-1), 1e-4)
    close(output.text_vectors, F.normalize(golden["text_eos_embed"], dim=-1), 1e-4)

    weights, boxes = hivg.LOSS_WEIGHTS, golden["target_boxes"]
    parts = hivg.compute_losses(output, boxes, torch.arange(5), model.clip.logit_scale)
    step = images.shape[-1] // 4  # their target of a patch is that of its first pixel
    targets = golden["obj_masks"][:, 0, ::step, ::step].flatten(1).float()
    parts["focal"] = hivg.sigmoid_focal_loss(output.region_logits, targets).mean()
    parts["dice"] = hivg.dice_loss(output.region_logits.sigmoid(), targets).mean()
    theirs = {"l1": "bbox", "giou": "giou", "clc": "contrastive"}
    theirs |= {"focal": "algin_focal", "dice": "align_dice"}
    for name, their_name in theirs.items():
        close(weights[name] * parts[name], golden["losses"][f"loss_{their_name}"], 1e-4)


def in_authors_names(model, stage, settings):
    """What the released code would save of `model`: its weights under the authors' names, each
    matrix that has LoRA there split in a matrix and a pair, and leftovers that nothing uses."""
    clip, state = hugging_face_state(model.clip), {}
    for number, bridge in model.bridges.items():
        prefix = f"vision_model.encoder.layers.{int(number) - 1}.cross_"
        parts = {"norm": bridge.norm, "mlp.fc1": bridge.mlp[0], "mlp.fc2": bridge.mlp[3]}
        parts |= {f"attn.{name}": linear for name, linear in bridge.attention.named_children()}
        parts["gate"] = getattr(bridge, "W_proj", torch.nn.Linear(64, 64))
        for part, module in parts.items():
            clip |= {f"{prefix}{part}.{n}": t for n, t in module.state_dict().items()}
        adaptive = settings["enable_adaptive_weights"] and hasattr(bridge, "w")
        for i, w in enumerate(bridge.w if adaptive else torch.ones(1, 3)):  # or not in use
            clip[f"{prefix}adaptive_weights.{i}.weight"] = w
    for name in [name for name in clip if "_proj.weight" in name and "attn" in name]:
        A, B = torch.randn(8, clip[name].shape[1]), torch.randn(len(clip[name]), 8) * 0.1
        clip[name] = clip[name] - 16 / 8 * B @ A
        for letter, matrix in zip("AB", (A, B)):
            clip[name.replace("weight", f"lora_{letter}.default.weight")] = matrix
    clip["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    state = {"clip." + "base_model.model." * (stage + 1) + n: t for n, t in clip.items()}
    D = model.config.region_width
    first = torch.randn(D, D) + 3 * torch.eye(D)  # visual_proj is two maps there
    state["visu_proj.weight"], state["visu_proj.bias"] = first, torch.ones(D)
    inverse = torch.linalg.inv(first)
    state["ml_visual_projection.weight"] = inverse @ model.visual_proj.weight
    state["ml_visual_projection.bias"] = inverse @ (model.visual_proj.bias - 1)
    mixed = model.mixed_proj or torch.nn.Linear(64, 64)
    modules = {"text_proj": model.text_proj, "condition_text_proj": mixed}
    modules["visu_token_norm"] = model.region_norm
    modules["vl_transformer.encoder.norm"] = model.grounding_norm
    modules |= {f"visu_token_mlp.fc{i}": model.region_mlp[3 * i - 3] for i in (1, 2)}
    modules |= {f"bbox_embed.layers.{i}": model.box_head[2 * i] for i in range(3)}
    for i, layer in enumerate(model.grounding_layers):
        prefix = f"vl_transformer.encoder.layers.{i}."
        modules |= {prefix + "norm1": layer.norm_1, prefix + "norm2": layer.norm_2}
        modules |= {prefix + "linear1": layer.mlp[0], prefix + "linear2": layer.mlp[3]}
        modules[prefix + "self_attn.out_proj"] = layer.attention.out_proj
        for kind in ("weight", "bias"):
            rows = [getattr(getattr(layer.attention, f"{k}_proj"), kind) for k in "qkv"]
            state[f"{prefix}self_attn.in_proj_{kind}"] = torch.cat(rows)
    for name, module in modules.items():
        state |= {f"{name}.{n}": t for n, t in module.state_dict().items()}
    state["reg_token.weight"] = model.reg_token[None]
    state["vl_pos_embed.weight"] = model.grounding_positions
    for name in ("ml_text_feat_perceiver.bias", "reg_pos_embed.weight", "seg_conv2.weight"):
        state[name] = torch.zeros(3)
    args = dict(model="ViT-B/16", vl_nheads=4, vl_enc_layers=2, normalize_before=True, imsize=64)
    return {"model": state, "epoch": -1, "args": Namespace(**args, **settings)}


@pytest.mark.parametrize(
    "stage, dataset, mixed, adaptive, changes",
    [
        (0, "unc", False, True, {"text_layers": (12,)}),
        (1, "unc+", False, True, {"text_layers": (6, 12)}),
        (3, "gref_umd", False, False, {"text_layers": tuple(range(1, 13))}),
        (2, "mixup", True, True, {"text_layers": ()}),
        (0, "referit", False, True, {"text_layers": (6, 12), "bridge_layers": ()}),
        (2, "unc", False, True, {"text_layers": (12,), "vision_layers": 24}),
    ],
)
def test_checkpoints_in_the_authors_names(
    tmp_path, tokenizer, stage, dataset, mixed, adaptive, changes
):
    """Any stage, any data set, mixed or not, with or without bridges and w, both depths: the boxes
    of the model whose weights were written, found by rule from names, shapes and args."""
    depth = changes.pop("vision_layers", 6)
    clip = tiny_clip(vision_layers=depth, text_layers=12)
    sizes = dict(grounding_layers=2, heads=4, feedforward=64, region_width=64, adapters="none")
    torch.manual_seed(1)
    model = shake(HiVG(HiVGConfig(**sizes, **changes, authors=True), clip, tokenizer)).eval()
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
    before, after = model(*batch, for_losses=True), again(*batch, for_losses=True)
    close(after.boxes, before.boxes, 1e-4)
    close(after.region_logits, before.region_logits, 1e-3)
    content["model"]["surprise.weight"] = torch.zeros(1)
    torch.save(content, path)
    with pytest.raises(HiVGError, match="best_checkpoint.pth.*surprise.weight"):
        load_checkpoint(path)


def test_the_authors_masks(tokenizer):
    """As the released code: id 0 is no key, text padding is one for the bridges, a patch counts as
    padding where the mask, resized to the grid and rounded, says so."""
    model = tiny_model(tokenizer, authors=True)
    images, tokens, _ = tiny_batch(model, ["blue !; one"])
    padding = torch.zeros(1, 64, 64, dtype=torch.bool)
    padding[0, 38:] = True  # the third row of patches, 32 to 47, mostly
    inputs = images, tokens[:, :20], padding
    expected = [False] * 2 + [False] * 8 + [True] * 8 + (tokens[0] == 0).tolist()
    assert keys_masked(model, model.grounding_layers[0].attention, *inputs)[0] == expected
    assert keys_masked(model, model.bridges["1"].attention, *inputs)[0] == [False] * 77


def test_a_model_in_an_earlier_stage_is_saved_with_its_later_pairs(tokenizer, tmp_path):
    """It is read in that stage, and its later pairs are still there."""
    model, batch = tiny_model(tokenizer, 3), tiny_batch(tiny_model(tokenizer))
    shake_pairs(model)
    model.enter_stage(3)
    last = model(*batch).boxes
    model.enter_stage(1)
    first = model(*batch).boxes
    save_checkpoint(tmp_path / "model.pt", model)
    again, _ = hivg.read_checkpoint(tmp_path / "model.pt")
    close(again.eval()(*batch).boxes, first)
    again.enter_stage(3)
    close(again(*batch).boxes, last)
    assert (first - last).abs().max() > 1e-4
