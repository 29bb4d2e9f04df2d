"""hivg.py: boxes, stages, batches, padding, losses, checkpoints."""

import json
import math
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import hugging_face_state, shake, shake_pairs, tiny_batch, tiny_clip, tiny_model

import hivg
from clip_model import HiVGError, save_clip
from hivg import HiVG, HiVGConfig, load_checkpoint, save_checkpoint


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


# --------------------------------------------------------------------------------------------- boxes


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


@pytest.mark.parametrize("other", [[0.5, 0.5, 0, 0], [0.5, 0.5, 1e-9, 1e-9], [0.2, 0.3, 0.1, 0.1]])
def test_gradients_are_finite_for_boxes_without_area(other):
    """A predicted box without area, or with hardly any, never gives NaN, as loss or as gradient."""
    target = torch.tensor([other])
    for size in (0.0, 1e-30, 1e-9):
        box = torch.tensor([[0.5, 0.5, size, size]], requires_grad=True)
        for overlap in (hivg.generalized_box_iou, hivg.box_iou):
            value = overlap(hivg.cxcywh_to_xyxy(box), hivg.cxcywh_to_xyxy(target)).sum()
            assert value.isfinite() and -1 <= value <= 1
            assert torch.autograd.grad(value, box)[0].isfinite().all()


# -------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("adapters", ["hilora", "vanilla", "none"])
def test_a_stage_begins_where_the_one_before_ended(tokenizer, adapters):
    """Entering any stage changes no box, no region logit and no image vector (1e-5)."""
    model, batch = tiny_model(tokenizer, adapters=adapters), tiny_batch(tiny_model(tokenizer))
    boxes = []
    for stage in (1, 2, 3):
        before = model(*batch, for_losses=True)
        model.enter_stage(stage)
        after = model(*batch, for_losses=True)
        for name in ("boxes", "region_logits", "image_vectors", "text_vectors"):
            close(getattr(after, name), getattr(before, name))
        for name, parameter in model.named_parameters():
            if "lora_B" in name and parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)  # as training would
        boxes.append(model(*batch).boxes)
    if adapters == "hilora":  # the pairs do something, so that the comparison can fail
        assert (boxes[2] - boxes[0]).abs().max() > 1e-4


def test_the_pairs_of_a_model(tokenizer):
    """With six layers, layers 1-2 hold 1, 2, 3 pairs after stages 1, 2, 3; 5-6 hold 0, 0, 1; on
    q, k, v and out of the image tower's self-attention, and nowhere else."""
    for stage, held in enumerate(
        ([0] * 6, [1, 1, 0, 0, 0, 0], [2, 2, 1, 1, 0, 0], [3, 3, 2, 2, 1, 1])
    ):
        model = tiny_model(tokenizer, stage)
        blocks = model.clip.visual.transformer.resblocks
        assert [len(block.attn.in_proj.lora_A) for block in blocks] == held
        assert [len(block.attn.out_proj.lora_A) for block in blocks] == held
        pairs = [name for name in model.state_dict() if "lora_A" in name]
        assert len(pairs) == 2 * sum(held)
    shape = blocks[0].attn.in_proj.lora_A["1"].shape
    assert shape == (3, 4, 64)  # q, k and v have matrices of their own


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_exactly_what_the_table_says_trains(tokenizer, stage):
    """After three steps of a stage the bridges, the grounding encoder, the heads and the newest
    pairs have changed, of w the rows of real tokens; CLIP and the older pairs are bit for bit the same."""
    model = tiny_model(tokenizer, stage)
    images, tokens, padding = tiny_batch(model)
    texts = tokens.argmax(dim=1).max() + 1
    assert texts < 70  # rows of w beyond are not used
    for bridge in model.bridges.values():
        assert not bridge.w.any()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(0)
    boxes, objects = torch.rand(3, 4) * 0.2 + 0.4, torch.arange(3)
    for _ in range(3):
        output = model(images, tokens, padding, for_losses=True)
        parts = hivg.losses(output, boxes, objects, model.clip.logit_scale)
        optimizer.zero_grad()
        sum(weight * parts[name] for name, weight in hivg.LOSS_WEIGHTS.items()).backward()
        optimizer.step()
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    newest = {name for name in before if ".lora_" in name and name.endswith(f".{stage}")}
    ours = {name for name in before if not name.startswith("clip.")}
    assert (stage > 0) == bool(newest)
    still = {name for name in ours - changed if not name.endswith("k_proj.bias")}
    assert not still, "should have been trained"
    assert changed <= ours | newest and newest <= changed
    for bridge in model.bridges.values():
        rows = bridge.w.ne(0).any(dim=2).any(dim=0)
        assert rows[:texts].all() and not rows[texts:].any()


def test_parameters_that_train_are_those_of_the_table(tokenizer):
    """requires_grad says the same: all but CLIP, and of CLIP the newest pairs alone."""
    for stage in range(4):
        for name, parameter in tiny_model(tokenizer, stage).named_parameters():
            newest = ".lora_" in name and name.endswith(f".{stage}")
            assert parameter.requires_grad == (newest or not name.startswith("clip.")), name


def test_merged_equals_unmerged(tokenizer):
    """Merging the pairs of all stages changes no box (1e-5), and leaves no branch."""
    model = tiny_model(tokenizer, 3)
    shake_pairs(model)
    model.enter_stage(3)
    batch = tiny_batch(model)
    before = model(*batch).boxes
    close(model.merge()(*batch).boxes, before)
    assert not any(getattr(module, "live", None) for module in model.modules())
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.zero_()
    model.enter_stage(3)
    assert (model(*batch).boxes - before).abs().max() > 1e-4  # the pairs did something


# ------------------------------------------------------------------------------- batches and padding

TEXTS = ("red one", "blue !; one", "the big red one on the left", "one", "x!")


def test_a_prediction_does_not_depend_on_its_batch(tokenizer):
    """Alone, in a batch, in another order: the same boxes and region logits for each sample (1e-5)."""
    model = tiny_model(tokenizer, 2)
    images, tokens, padding = tiny_batch(model, TEXTS)
    together = model(images, tokens, padding, for_losses=True)
    assert together.boxes.std(dim=0).max() > 1e-3
    for i in range(len(TEXTS)):
        alone = model(images[i : i + 1], tokens[i : i + 1], padding[i : i + 1], for_losses=True)
        close(alone.boxes[0], together.boxes[i])
        close(alone.region_logits[0], together.region_logits[i])
    order = torch.tensor([3, 0, 4, 2, 1])
    close(model(images[order], tokens[order], padding[order]).boxes, together.boxes[order])


def test_a_prediction_does_not_depend_on_text_padding(tokenizer):
    """Cut to the longest text, or with other ids after the end token: the same outputs (1e-5)."""
    model = tiny_model(tokenizer, 2)
    images, tokens, padding = tiny_batch(model, TEXTS)
    whole = model(images, tokens, padding, for_losses=True)
    longest = int(tokens.argmax(dim=1).max()) + 1
    other, positions = tokens.clone(), torch.arange(77)
    other[positions > tokens.argmax(dim=1, keepdim=True)] = 99
    for changed in (tokens[:, :longest], tokens[:, : longest + 3], other):
        found = model(images, changed, padding, for_losses=True)
        close(found.boxes, whole.boxes)
        close(found.region_logits, whole.region_logits)
        close(found.text_vectors, whole.text_vectors)


def test_an_exclamation_mark_counts(tokenizer):
    """Id 0 is "!", not padding: within a text it is attended to, as every other token is."""
    model = tiny_model(tokenizer)
    images, tokens, padding = tiny_batch(model, ["blue !; one"])
    assert 0 in tokens[0, : tokens.argmax()]
    keys = []
    attention = model.layers[0].attention
    attention.register_forward_pre_hook(lambda module, args: keys.append(args[3]))
    model(images, tokens, padding)
    assert keys[0][0, 2 + 16 :].tolist() == [i > int(tokens.argmax()) for i in range(77)]


def test_padding_patches_are_no_keys(tokenizer):
    """Patches wholly in the image's padding are masked in the grounding encoder, half-padded ones
    are not; and no padding at all is the same as None."""
    model = tiny_model(tokenizer)
    images, tokens, _ = tiny_batch(model, ["red one"])
    padding = torch.zeros(1, 64, 64, dtype=torch.bool)
    close(model(images, tokens, padding).boxes, model(images, tokens).boxes, 0)
    padding[0, 40:] = True  # of four rows of patches, the last wholly and the third by half
    expected = [False] * 12 + [True] * 4
    assert model(images, tokens, padding, for_losses=True).patch_padding[0].tolist() == expected
    before = model(images, tokens, padding).boxes
    assert (before - model(images, tokens).boxes).abs().max() > 1e-6
    features = {}

    def replace_padding(module, args, output):  # what these patches hold must not matter
        features["there"] = True
        return torch.cat([output[:, :13], output[:, 13:] + 5], dim=1)

    hook = model.visual_proj.register_forward_hook(replace_padding)
    close(model(images, tokens, padding).boxes, before)
    assert (model(images, tokens).boxes - before).abs().max() > 1e-5 and features
    hook.remove()


def test_the_short_way_of_inference_gives_the_same_boxes(tokenizer):
    """One query in the last layer gives the boxes that all queries give (1e-5)."""
    model = tiny_model(tokenizer, 1)
    batch = tiny_batch(model)
    short = model(*batch)
    close(short.boxes, model(*batch, for_losses=True).boxes)
    assert short.region_logits is None and (0 < short.boxes).all() and (short.boxes < 1).all()


def in_torch(attention):
    """A CrossAttention's weights in torch's nn.MultiheadAttention."""
    width = attention.out_proj.in_features
    theirs = torch.nn.MultiheadAttention(width, attention.heads, batch_first=True).eval()
    parts = [getattr(attention, f"{name}_proj") for name in "qkv"]
    theirs.in_proj_weight.data = torch.cat([part.weight for part in parts]).data
    theirs.in_proj_bias.data = torch.cat([part.bias for part in parts]).data
    theirs.out_proj.load_state_dict(attention.out_proj.state_dict())
    return theirs


def test_a_bridge_equals_torch_attention(tokenizer):
    """A bridge is x + MLP(attention from the image to (w f + f) W_proj), text padding masked: torch's
    own nn.MultiheadAttention gives the same; and a fresh bridge changes nothing."""
    bridge = tiny_model(tokenizer).bridges["1"]
    torch.nn.init.normal_(bridge.w)
    torch.manual_seed(0)
    x, features = torch.randn(2, 5, 64), [torch.randn(2, 7, 64) for _ in range(len(bridge.w))]
    padding = torch.arange(7) > torch.tensor([[3], [6]])
    text = torch.cat([(1 + w[:7]) * f for w, f in zip(bridge.w, features)], dim=-1)
    t = bridge.W_proj(text)
    close(bridge.read(features), t)
    normed = F.layer_norm(x, [64], bridge.norm.weight, bridge.norm.bias)
    attended = in_torch(bridge.attention)(normed, t, t, padding, need_weights=False)[0]
    close(bridge(x, t, padding), x + bridge.mlp(attended))
    fresh = hivg.Bridge(tiny_clip().config, 2)
    assert len(features) == 2 and torch.equal(fresh(x, fresh.read(features), padding), x)


def test_a_grounding_layer_equals_torch_attention():
    """Pre-norm; positions are added to queries and keys, not to values; padding is masked; the first
    queries alone give the first rows."""
    layer = shake(hivg.GroundingLayer(32, 4, 48, 0.0)).eval()
    torch.manual_seed(0)
    x, positions = torch.randn(2, 9, 32), torch.randn(9, 32)
    padding = torch.arange(9) > torch.tensor([[4], [8]])
    value = layer.norm_1(x)
    place = value + positions
    y = x + in_torch(layer.attention)(place, place, value, padding, need_weights=False)[0]
    first, _, _, last = layer.mlp
    y = y + last(first(layer.norm_2(y)).relu())
    close(layer(x, positions, padding), y)
    close(layer(x, positions, padding, queries=2), y[:, :2])


@pytest.mark.parametrize(
    "depth, size, levels, bridges",
    [
        (12, 224, (1, 4, 8, 12), (1, 4, 8, 12)),
        (24, 224, (6, 12, 18, 24), (5, 11, 17, 23)),
        (24, 336, (12, 16, 20, 24), (12, 16, 20, 24)),
        (3, 80, (1, 2, 3), (1, 2, 3)),
        (6, 80, (1, 2, 4, 6), (1, 2, 4, 6)),
    ],
)
def test_layers_of_the_multi_level_features_and_bridges(depth, size, levels, bridges):
    """V and C are the table's for CLIP's depths, and thirds of any other depth."""
    sizes = replace(tiny_clip(vision_layers=1).config, vision_layers=depth, image_size=size)
    config = HiVGConfig().filled(sizes)
    assert (config.visual_layers, config.bridge_layers) == (levels, bridges)


# -------------------------------------------------------------------------------------------- losses


def test_focal_and_dice_loss_patch_by_patch():
    """Both equal plain loops over the patches; the target is 1 where the patch's centre lies in the
    box; padding patches don't count, whatever their logits are."""
    torch.manual_seed(0)
    logits = torch.randn(2, 16)
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.3], [0.3, 0.6, 0.2, 0.6]])
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[1, :8] = True
    vectors = F.normalize(torch.randn(2, 8), dim=-1)
    focal, dice = [], []
    for b in range(2):
        terms, both, total = [], 0.0, 0.0
        cx, cy, w, h = boxes[b].tolist()
        for n in range(16):
            if padding[b, n]:
                continue
            x, y = (n % 4 + 0.5) / 4, (n // 4 + 0.5) / 4
            inside = abs(x - cx) <= w / 2 and abs(y - cy) <= h / 2
            p = 1 / (1 + math.exp(-logits[b, n]))
            terms.append(
                -0.25 * (1 - p) ** 2 * math.log(p) if inside else -0.75 * p**2 * math.log(1 - p)
            )
            both, total = both + p * inside, total + p + inside
        focal.append(sum(terms) / len(terms))
        dice.append(1 - (2 * both + 1) / (total + 1))
    for extra in (0.0, 30.0):  # in the padding
        shifted = logits + extra * padding
        output = hivg.Grounding(boxes, shifted, padding, vectors, vectors)
        parts = hivg.losses(output, boxes, torch.arange(2), torch.tensor(0.0))
        close(parts["focal"], torch.tensor(sum(focal) / 2))
        close(parts["dice"], torch.tensor(sum(dice) / 2))


def test_box_loss_by_hand():
    """L1 is summed over the coordinates and averaged over the batch; beta makes it smooth."""
    found = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.4, 0.4]])
    true = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.6, 0.3, 0.4, 0.4]])
    output = hivg.Grounding(found, torch.zeros(2, 4), torch.zeros(2, 4).bool())
    output.image_vectors = output.text_vectors = torch.eye(2)
    parts = hivg.losses(output, true, torch.arange(2), torch.tensor(0.0))
    close(parts["l1"], torch.tensor((0.1 + 0.2) / 2))
    # the second pair: overlap 0.3 x 0.2, union 0.26, hull 0.5 x 0.6
    giou = 0.06 / 0.26 - (0.3 - 0.26) / 0.3
    close(parts["giou"], torch.tensor((1 - giou) / 2))
    smooth = hivg.losses(output, true, torch.arange(2), torch.tensor(0.0), beta=1.0)
    close(smooth["l1"], torch.tensor((0.1**2 / 2 + 0.2**2 / 2) / 2))


def test_contrastive_loss_row_by_row():
    """It equals a loop over rows and columns in which samples of the same object are no negatives."""
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(4, 8), dim=-1) for _ in range(2))
    objects = torch.tensor([7, 7, 2, 8])
    total = 0.0
    for a, b in ((image, text), (text, image)):
        for i in range(4):
            exponents = {
                j: math.exp(5 * float(a[i] @ b[j]))
                for j in range(4)
                if i == j or objects[i] != objects[j]
            }
            assert len(exponents) == (3 if i < 2 else 4)
            total -= math.log(exponents[i] / sum(exponents.values()))
    close(hivg.contrastive_loss(image, text, torch.tensor(5.0), objects), torch.tensor(total / 8))


# --------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "adapters, stage", [("hilora", 0), ("hilora", 3), ("vanilla", 2), ("none", 1)]
)
def test_a_checkpoint_gives_the_same_boxes(tokenizer, tmp_path, adapters, stage):
    """Saved with several pairs and read back: merged, in eval mode, the same boxes; it needs no
    vocabulary and no CLIP file, and knows how pictures are to be prepared."""
    model = tiny_model(tokenizer, stage, adapters=adapters, mean=(0.1, 0.2, 0.3))
    shake_pairs(model)
    model.enter_stage(stage)
    batch = tiny_batch(model)
    save_checkpoint(tmp_path / "best.pt", model, progress={"stage": stage})
    again = load_checkpoint(str(tmp_path / "best.pt"))
    close(again(*batch).boxes, model(*batch).boxes)
    assert not again.training and not any(getattr(m, "live", None) for m in again.modules())
    assert again.config.image_size == 64 and tuple(again.config.mean) == (0.1, 0.2, 0.3)
    assert torch.equal(again.tokenize("the red one"), tokenizer("the red one"))
    pairs = [name for name in model.state_dict() if ".lora_" in name]
    assert all(torch.equal(again.state_dict()[n], model.state_dict()[n]) for n in pairs)


def test_a_checkpoint_that_is_none_is_told(tokenizer, tmp_path):
    """Garbage, half a file, another torch file, a changed one, a missing one: one sentence, with its name."""
    save_checkpoint(tmp_path / "whole.pt", tiny_model(tokenizer))
    content = torch.load(tmp_path / "whole.pt", weights_only=True)
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:100_000])
    (tmp_path / "text.pt").write_text("no checkpoint")
    save_clip(tiny_clip(), tmp_path / "clip.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    lacking = {n: v for n, v in content["model"].items() if n != "norm.bias"}
    for name, changed in {
        "lacking": {"model": lacking},
        "depth": {"config": content["config"] | {"grounding_layers": 10**9}},
        "stages": {"config": content["config"] | {"stage": 10**9, "groups": 10**9}},
        "fields": {"config": content["config"] | {"surprise": 1}},
        "layers": {"config": content["config"] | {"bridge_layers": (1, 99)}},
        "text layers": {"config": content["config"] | {"text_layers": (99,)}},
        "giant": {"config": content["config"] | {"feedforward": 10**12}},
        "vocabulary": {"vocabulary": 3},
        "adapters": {"config": content["config"] | {"adapters": "other"}},
    }.items():
        torch.save(content | changed, tmp_path / f"{name}.pt")
    load_checkpoint(tmp_path / "whole.pt")
    for path in [*tmp_path.iterdir(), tmp_path / "absent.pt"]:
        if path.name != "whole.pt":
            with pytest.raises(HiVGError) as caught:
                load_checkpoint(path)
            assert path.name in str(caught.value), path
            assert "\n" not in str(caught.value)


def test_text_is_read_by_the_frozen_tower_alone(tokenizer):
    """No gradient reaches the text tower, and a wrong layer number is told."""
    model = tiny_model(tokenizer)
    model.clip.requires_grad_(True)
    model(*tiny_batch(model), for_losses=True).boxes.sum().backward()
    assert all(p.grad is None for p in model.clip.transformer.parameters())
    with pytest.raises(HiVGError, match="99"):
        HiVG(replace(model.config, bridge_layers=(1, 99)), tiny_clip(), tokenizer)


# -------------------------------------------------------------------- the authors' released checkpoints


@pytest.mark.parametrize("name", ["base", "large"])
def test_the_authors_checkpoints_equal_golden(shared, name):
    """Boxes, region logits and the grounding encoder's padding are the released code's, one at a
    time and as a batch, and however much padding the tokens come with."""
    model = load_checkpoint(shared / f"golden/official_{name}_checkpoint.pth")
    golden = torch.load(shared / f"golden/official_{name}_golden.pt", weights_only=True)
    golden = golden.get("inputs", golden) | golden.get("outputs", golden)
    images, tokens, masks = golden["images"], golden["token_ids"], golden["masks"].bool()
    with torch.no_grad():
        together = model(images, tokens, masks, for_losses=True)
        alone = [
            model(i[None], t[None, :40], m[None]).boxes for i, t, m in zip(images, tokens, masks)
        ]
    close(together.boxes, golden["pred_boxes"], 1e-4)
    close(torch.cat(alone), golden["pred_boxes"], 1e-4)
    close(together.region_logits, golden["visu_token_similarity"], 1e-4)
    assert model.config.mean == (0.485, 0.456, 0.406) and not model.training


def in_authors_names(model, stage, settings):
    """What the released code would save of `model`: its weights under the authors' names, each
    matrix that has LoRA there split in a matrix and a pair, and leftovers that nothing uses."""
    clip, state = hugging_face_state(model.clip), {}
    for number, bridge in model.bridges.items():
        prefix = f"vision_model.encoder.layers.{int(number) - 1}.cross_"
        parts = {"norm": bridge.norm, "mlp.fc1": bridge.mlp[0], "mlp.fc2": bridge.mlp[3]}
        parts |= {
            f"attn.{k}_proj": getattr(bridge.attention, f"{k}_proj") for k in ("q", "k", "v", "out")
        }
        parts["gate"] = getattr(bridge, "W_proj", torch.nn.Linear(64, 64))
        for part, module in parts.items():
            clip |= {f"{prefix}{part}.{n}": t for n, t in module.state_dict().items()}
        ones = torch.ones(1, 77, 64)  # in the file, and not in use
        for i, w in enumerate(
            bridge.w if settings["enable_adaptive_weights"] and hasattr(bridge, "w") else ones
        ):
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
    modules |= {"visu_token_norm": model.region_norm, "vl_transformer.encoder.norm": model.norm}
    modules |= {f"visu_token_mlp.fc{i}": model.region_mlp[3 * i - 3] for i in (1, 2)}
    modules |= {f"bbox_embed.layers.{i}": model.box_head[2 * i] for i in range(3)}
    for i, layer in enumerate(model.layers):
        prefix = f"vl_transformer.encoder.layers.{i}."
        modules |= {prefix + "norm1": layer.norm_1, prefix + "norm2": layer.norm_2}
        modules |= {prefix + "linear1": layer.mlp[0], prefix + "linear2": layer.mlp[3]}
        modules[prefix + "self_attn.out_proj"] = layer.attention.out_proj
        for kind in ("weight", "bias"):
            rows = [getattr(getattr(layer.attention, f"{k}_proj"), kind) for k in "qkv"]
            state[f"{prefix}self_attn.in_proj_{kind}"] = torch.cat(rows)
    for name, module in modules.items():
        state |= {f"{name}.{n}": t for n, t in module.state_dict().items()}
    state |= {"reg_token.weight": model.reg_token[None], "vl_pos_embed.weight": model.positions}
    for name in ("ml_text_feat_perceiver.bias", "reg_pos_embed.weight", "seg_conv2.weight"):
        state[name] = torch.zeros(3)
    args = dict(model="ViT-B/16", vl_nheads=4, vl_enc_layers=2, normalize_before=True, imsize=64)
    args = Namespace(**args, **settings)
    content = {"model": state, "optimizer": {}, "lr_scheduler": {}, "epoch": -1, "val_accu": 0.5}
    return {k: v for k, v in content.items()} | {"args": args}


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
    config = HiVGConfig(**sizes, **changes, authors=True)
    torch.manual_seed(1)
    model = shake(HiVG(config, clip, tokenizer)).eval()
    for bridge in model.bridges.values():
        shake(bridge.mlp, 0.1)
        if not adaptive:
            bridge.w.data.zero_()
    settings = dict(dataset=dataset, mixup_pretrain=mixed, enable_adaptive_weights=adaptive)
    content = in_authors_names(model, stage, settings)
    torch.save(content, tmp_path / "best_checkpoint.pth")
    again, batch = load_checkpoint(tmp_path / "best_checkpoint.pth"), tiny_batch(model)
    assert again.config.visual_layers == ((6, 12, 18, 24) if depth == 24 else (1, 2, 4, 6))
    before, after = model(*batch, for_losses=True), again(*batch, for_losses=True)
    close(after.boxes, before.boxes, 1e-4)
    close(after.region_logits, before.region_logits, 1e-3)
    content["model"]["surprise.weight"] = torch.zeros(1)
    torch.save(content, tmp_path / "best_checkpoint.pth")
    with pytest.raises(HiVGError, match="best_checkpoint.pth.*surprise.weight"):
        load_checkpoint(tmp_path / "best_checkpoint.pth")


def test_the_authors_masks(tokenizer):
    """As the released code: id 0 is no key, text padding is one for the bridges, a patch counts as
    padding where the mask, resized to the grid and rounded, says so."""
    model = tiny_model(tokenizer, authors=True)
    images, tokens, _ = tiny_batch(model, ["blue !; one"])
    padding = torch.zeros(1, 64, 64, dtype=torch.bool)
    padding[0, 38:] = True  # the third row of patches, 32 to 47, mostly
    keys = []
    for attention in (model.layers[0].attention, model.bridges["1"].attention):
        attention.register_forward_pre_hook(lambda module, args: keys.append(args[3][0].tolist()))
    model(images, tokens[:, :20], padding)
    assert keys[1] == [False] * 2 + [False] * 8 + [True] * 8 + (tokens[0] == 0).tolist()
    assert keys[0] == [False] * 77


def test_the_warm_up_without_bridges(tokenizer):
    """In stage -1 the bridges do nothing and are not trained, all else outside CLIP is; they enter
    in stage 0 without changing a box."""
    model = tiny_model(tokenizer)
    without, batch = (
        HiVG(replace(model.config, stage=-1), tiny_clip(), tokenizer).eval(),
        tiny_batch(model),
    )
    before = without(*batch).boxes
    frozen = {n.split(".")[0] for n, p in without.named_parameters() if not p.requires_grad}
    assert frozen == {"clip", "bridges"}
    without.enter_stage(0)
    assert all(p.requires_grad for p in without.bridges.parameters())
    close(without(*batch).boxes, before)
    without.bridges.load_state_dict(model.bridges.state_dict())
    after = without(*batch).boxes
    assert (after - before).abs().max() > 1e-6
    without.enter_stage(-1)
    close(without(*batch).boxes, before, 0)


def test_checkpointing_changes_no_gradient(tokenizer):
    """Layers that are computed again in the backward pass, with the dropout of the first time, give the same gradients."""
    model = tiny_model(tokenizer, 2, dropout=0.2, lora_dropout=0.2).train()
    images, tokens, padding = tiny_batch(model)
    gradients, calls = [], []
    model.layers[0].register_forward_pre_hook(lambda *given: calls.append(model.checkpointing))
    for model.checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        output = model(images, tokens, padding, for_losses=True)
        (output.boxes.sum() + output.region_logits.square().mean()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert calls == [False, True, True]  # once more in the backward pass
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_a_checkpoint_claims_no_more_than_it_holds(tokenizer, tmp_path):
    """A tensor whose elements all lie in one place makes no room for what it claims."""
    path = tmp_path / "best.pt"
    save_checkpoint(path, tiny_model(tokenizer))
    content = torch.load(path, weights_only=True)
    content["model"]["positions"] = content["model"]["positions"][:1].expand(10**12, -1)
    torch.save(content, path)
    with pytest.raises(HiVGError, match="best.pt.*positions claims more"):
        load_checkpoint(path)


@pytest.mark.slow
def test_compiling_changes_no_gradient(tokenizer):
    """With torch.compile boxes and gradients stay what they are, in training as in evaluation."""
    model = tiny_model(tokenizer, 2)
    images, tokens, padding = tiny_batch(model)
    found = []
    for compiled in (False, True):
        if compiled:
            model.compile()
        model.eval()
        boxes = model(images, tokens, padding).boxes.detach()
        model.train().zero_grad()
        output = model(images, tokens, padding, for_losses=True)
        (output.boxes.sum() + output.region_logits.square().mean()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"boxes": boxes} | gradients)
    torch.compiler.reset()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-4, msg=name)
