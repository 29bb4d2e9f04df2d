"""HiVG (ACM MM 2024, arXiv 2404.13400): one image and one expression -> one box.

Reading order: HiVGConfig, boxes (IoU, GIoU), Bridge (MACB), GroundingLayer, HiVG (the whole path in
`forward`), losses, checkpoints. The two towers are in clip_model.py, the adapters in lora.py.

Letters: B samples, S image side and P patch side in pixels, N = (S / P)^2 patches, T text tokens, L
visual layers (numbered from 1), d_v and d_t widths of CLIP's towers, D CLIP's joint width. Boxes
are (cx, cy, w, h) in 0..1 of the padded square unless a name says otherwise. Masks say what is True
in their name: `*_padding` is True where there is padding. "D1", "D2", ... refer to the README's
list of differences from the poster and from its authors' released code.
"""

import io
import math
import re
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import clip_model
import lora
from clip_model import CLIP, HiVGError, QuickGELU, Tokenizer, attend
from lora import Dropout

TEXT_LAYERS = {  # f^i that the bridges read, by data set in the authors' names; else the last
    "unc+": (6, 12),
    "gref": tuple(range(1, 13)),
    "gref_umd": tuple(range(1, 13)),
    "referit": (6, 12),
}
TINY = 1e-16  # smaller areas count as none; its square is still a float32, so gradients stay finite
LOSS_WEIGHTS = {"l1": 2.0, "giou": 2.0, "clc": 1.0, "focal": 20.0, "dice": 2.0}


def usual_layers(depth, is_336):
    """V and C, the poster's for a tower of so many layers; is_336: ViT-L/14@336px."""
    if depth == 24:
        return ((12, 16, 20, 24),) * 2 if is_336 else ((6, 12, 18, 24), (5, 11, 17, 23))
    return (tuple(sorted({1, max(1, round(depth / 3)), max(1, round(2 * depth / 3)), depth})),) * 2


@dataclass
class HiVGConfig:
    """What the model is, apart from CLIP's own sizes. Layers are numbered from 1. Saved in every
    checkpoint.

    None stands for what the poster has with this CLIP: see `filled`.
    """

    image_size: int = None
    mean: tuple = clip_model.MEAN  # CLIP's own (D9)
    std: tuple = clip_model.STD
    visual_layers: tuple = None  # V: their outputs are the multi-level features
    bridge_layers: tuple = None  # C: they hold a bridge
    text_layers: tuple = None  # f^i that the bridges read; (): of the projected text alone, no w
    grounding_layers: int = 6
    heads: int = 8
    feedforward: int = 2048
    region_width: int = 3072  # hidden width of the RTCC head
    dropout: float = 0.1
    adapters: str = "hilora"  # one of ADAPTERS
    targets: tuple = ("attn.in_proj", "attn.out_proj")  # of the pairs: q, k, v and out
    groups: int = 3  # G: HiLoRA's groups of layers, and its stages after the warm-up
    rank: int = 32
    alpha: float = 16
    lora_dropout: float = 0.1
    stage: int = 0  # -1: warm-up without bridges; 0: warm-up, before the first LoRA pair
    authors: bool = False  # masks as in the authors' released checkpoints (D1, D3, D14)

    ADAPTERS = ("hilora", "vanilla", "none")

    def filled(self, clip_config):
        """A copy without None: CLIP's own image size, layers V and C by its depth, its last text
        layer. Layers are in order."""
        V, C = usual_layers(clip_config.vision_layers, clip_config.image_size == 336)
        usual = {"visual_layers": V, "bridge_layers": C, "text_layers": [clip_config.text_layers]}
        chosen = {k: v if getattr(self, k) is None else getattr(self, k) for k, v in usual.items()}
        layers = {name: tuple(sorted(set(numbers))) for name, numbers in chosen.items()}
        return replace(self, image_size=self.image_size or clip_config.image_size, **layers)


# -------------------------------------------------------------------------------------------- boxes


def cxcywh_to_xyxy(boxes):
    """(cx, cy, w, h) -> (x1, y1, x2, y2), [..., 4]."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def _area(low, high):
    return (high - low).clamp(min=0).prod(dim=-1)


def _overlap_and_union(a, b):
    overlap = _area(torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:]))
    return overlap, _area(a[:, :2], a[:, 2:]) + _area(b[:, :2], b[:, 2:]) - overlap


def box_iou(a, b):
    """Intersection over union, pair by pair: a, b [N, 4] as x1, y1, x2, y2 -> [N]; 0 where both
    have no area."""
    overlap, union = _overlap_and_union(a, b)
    return overlap / union.clamp(min=TINY)


def generalized_box_iou(a, b):
    """GIoU = IoU - (hull - union) / hull (Rezatofighi et al. 2019), pair by pair: a, b [N, 4] as
    x1, y1, x2, y2 -> [N].

    In -1..1 and finite for boxes without area: their IoU counts 0, and a hull without area counts
    as all filled.
    """
    overlap, union = _overlap_and_union(a, b)
    hull = _area(torch.minimum(a[:, :2], b[:, :2]), torch.maximum(a[:, 2:], b[:, 2:]))
    return overlap / union.clamp(min=TINY) - (hull - union) / hull.clamp(min=TINY)


# -------------------------------------------------------------------------------------------- parts


class CrossAttention(nn.Module):
    """Multi-head attention with a matrix and a bias each for q, k, v and out."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, Dropout(dropout)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(width, width))

    def forward(self, query, key, value, key_padding):
        """query [B, Nq, d], key and value [B, Nk, d], key_padding [B, Nk] bool, True = ignore.
        Returns [B, Nq, d]."""
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        mask = ~key_padding[:, None, None, :]  # [B, 1, 1, Nk], True = attend
        return self.out_proj(attend(q, k, v, self.heads, mask, dropout=self.dropout))


def mlp(width, hidden, activation, dropout=0.0):
    up, down = nn.Linear(width, hidden), nn.Linear(hidden, width)
    return nn.Sequential(up, activation, Dropout(dropout), down)


class Bridge(nn.Module):
    """MACB, the multi-layer adaptive cross-modal bridge, between self-attention and MLP of a visual
    layer (poster, Eq. 1-3).

    t = concat_i [w^i * f^i + f^i] W_proj + b;   x = x + BridgeMLP(CrossAttention(LN_b(x), t))

    text_layers: how many f^i there are. With none, t is made elsewhere: no w, no W_proj.
    """

    def __init__(self, clip_config, text_layers):
        super().__init__()
        width, text_width = clip_config.vision_width, clip_config.text_width
        if text_layers:
            self.w = nn.Parameter(torch.zeros(text_layers, clip_config.context_length, text_width))
            self.W_proj = nn.Linear(text_layers * text_width, width)
        self.norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, max(1, width // 64))
        self.mlp = mlp(width, 4 * width, QuickGELU())
        nn.init.zeros_(self.mlp[-1].weight)  # a fresh bridge changes nothing (D8)
        nn.init.zeros_(self.mlp[-1].bias)

    def read(self, features):
        """t, the text for this bridge: features, a list of f^i [B, T, d_t] -> [B, T, d_v]."""
        w = self.w[:, : features[0].shape[1]]  # the adaptive weights of these T positions
        return self.W_proj(torch.cat([w_i * f_i + f_i for w_i, f_i in zip(w, features)], dim=-1))

    def forward(self, x, t, text_padding):
        """x [B, 1 + N, d_v], t [B, T, d_v], text_padding [B, T] -> [B, 1 + N, d_v] (D3)."""
        return x + self.mlp(self.attention(self.norm(x), t, t, text_padding))


class GroundingLayer(nn.Module):
    """A pre-norm transformer layer; positions are added to queries and keys, not to values."""

    def __init__(self, width, heads, feedforward, dropout):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CrossAttention(width, heads, dropout)
        self.mlp = mlp(width, feedforward, nn.ReLU(), dropout=dropout)
        self.dropout = Dropout(dropout)

    def forward(self, x, positions, padding, queries=None):
        """x [B, K, D], positions [K, D], padding [B, K] -> [B, queries, D]: the first `queries`
        tokens, or all."""
        value = self.norm_1(x)
        key = value + positions
        x = x[:, :queries] + self.dropout(self.attention(key[:, :queries], key, value, padding))
        return x + self.dropout(self.mlp(self.norm_2(x)))


def grid_positions(side, width):
    """Sines and cosines of row and column: a start for the positions of side x side patches,
    [side^2, width]."""
    frequencies = 10 ** (-torch.arange(width // 4) / (width / 4)) * math.pi  # [width / 4]
    angles = torch.linspace(0, 1, side)[:, None] * frequencies  # [side, width / 4]
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # [side^2, about width]
    return F.pad(grid, (0, width - grid.shape[1]))


@dataclass
class Grounding:
    """What HiVG returns. All but `boxes` is there only if it was asked for by for_losses=True."""

    boxes: torch.Tensor  # [B, 4] cx, cy, w, h in 0..1 of the padded square
    region_logits: torch.Tensor = None  # [B, N], s_p = u . v_p
    patch_padding: torch.Tensor = None  # [B, N] bool
    image_vectors: torch.Tensor = None  # [B, D], normalised
    text_vectors: torch.Tensor = None  # [B, D], normalised


class HiVG(nn.Module):
    """The whole model (README, The idea). `clip` becomes a part of it and is frozen; stage
    config.stage is entered."""

    def __init__(self, config, clip, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer = config.filled(clip.config), tokenizer
        # layers are computed again in the backward pass: slower, less memory
        self.checkpointing = False
        config = self.config
        clip.resize(config.image_size)
        sizes, depth = clip.config, clip.config.vision_layers
        chosen = (*config.visual_layers, *config.bridge_layers), config.text_layers
        for layers, there in zip(chosen, (depth, sizes.text_layers)):
            if absent := set(layers) - set(range(1, there + 1)):
                raise HiVGError(f"This CLIP has no layers {absent}: choose among 1 to {there}.")
        d_v, D = sizes.vision_width, sizes.embed_dim
        self.grid = config.image_size // sizes.patch_size  # patches a side
        self.clip = clip
        n = len(config.text_layers)
        self.bridges = nn.ModuleDict({str(i): Bridge(sizes, n) for i in config.bridge_layers})
        mixed = self.bridges and not n  # text that is projected for all bridges at once
        self.mixed_proj = nn.Linear(D, d_v) if mixed else None
        self.visual_proj = nn.Linear(len(config.visual_layers) * d_v, D)  # (D10)
        self.text_proj = nn.Linear(D, D)
        self.reg_token = nn.Parameter(torch.randn(D) * 0.02)
        N = self.grid**2
        self.positions = nn.Parameter(torch.randn(2 + N + sizes.context_length, D) * 0.02)
        self.positions.data[2 : 2 + N] += grid_positions(self.grid, D)  # (D11)
        each = D, config.heads, config.feedforward, config.dropout
        self.layers = nn.ModuleList(GroundingLayer(*each) for _ in range(config.grounding_layers))
        for matrix in [p for p in self.layers.parameters() if p.dim() == 2]:
            nn.init.xavier_uniform_(matrix)
        self.norm = nn.LayerNorm(D)
        hidden = [nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU()]
        self.box_head = nn.Sequential(*hidden, nn.Linear(D, 4))
        self.region_norm = nn.LayerNorm(D)
        self.region_mlp = mlp(D, config.region_width, QuickGELU())
        if config.adapters != "none":
            blocks = clip.visual.transformer.resblocks  # (D6)
            # q, k, v are three row blocks of one matrix
            targets = {name: 3 if name.endswith("in_proj") else 1 for name in config.targets}
            with clip_model.explaining("LoRA fits nowhere", "choose other --targets"):
                lora.attach(blocks, targets, config.rank, config.alpha, config.lora_dropout)
        self.enter_stage(config.stage)

    def enter_stage(self, stage):
        """Warm-up (-1: without bridges; 0) or stage j of HiLoRA: adds its pairs and sets what
        trains (README, HiLoRA).

        Fresh bridges and fresh pairs change no output.
        """
        self.config.stage = stage
        self.requires_grad_(True)
        self.clip.requires_grad_(False)
        for part in filter(None, (self.bridges, self.mixed_proj)):
            part.requires_grad_(stage >= 0)
        groups = {"none": 0, "vanilla": 1, "hilora": self.config.groups}[self.config.adapters]
        if groups:  # vanilla is HiLoRA of one group: its only pair is trained from stage 1 on
            lora.enter_stage(self.clip.visual.transformer.resblocks, min(stage, groups), groups)

    def merge(self):
        """Fold all LoRA pairs into the matrices, for inference."""
        lora.merge(self.clip.visual.transformer.resblocks)
        return self

    def tokenize(self, texts):
        """A str or a list of str -> LongTensor [N, 77], with the vocabulary that the model was
        trained with."""
        self.tokenizer = self.tokenizer or clip_model.clip_tokenizer()
        return self.tokenizer(texts, self.clip.config.context_length)

    def forward(self, images, tokens, padding=None, for_losses=False):
        """images [B, 3, S, S] normalised, tokens [B, T], padding [B, S, S] bool, True = padding
        (None: there is none).

        Returns a Grounding; `for_losses` asks for more than the boxes.
        """
        clip, config = self.clip, self.config
        if config.authors:  # their bridges see the padding, so all of it has to be there
            tokens = F.pad(tokens, (0, clip.config.context_length - tokens.shape[1]))
        B, T = tokens.shape
        ends = tokens.argmax(dim=1)  # the end token has the largest id
        places = torch.arange(T, device=tokens.device)
        text_padding = places > ends[:, None]  # [B, T]; by position, since id 0 is "!" (D1)
        bridge_padding = text_padding
        if config.authors:
            text_padding, bridge_padding = tokens == 0, torch.zeros_like(text_padding)
        patch_padding = self.pad_patches(padding, images)  # [B, N]

        # the text tower is frozen and reads no image
        with torch.no_grad():
            states = clip.text_states(tokens)  # f^1 ... f^12, [B, T, d_t] each
            text = clip.project_text(states[-1])  # [B, T, D]
        features = [states[i - 1] for i in config.text_layers]
        bridges = self.bridges if config.stage >= 0 else {}
        mixed = self.mixed_proj(text) if self.mixed_proj else None  # [B, T, d_v]

        # the image tower, with LoRA in its self-attention and bridges to the text
        x = clip.visual.embed(images)  # [B, 1 + N, d_v]
        levels = []
        for number, block in enumerate(clip.visual.transformer.resblocks, start=1):
            bridge = bridges[str(number)] if str(number) in bridges else None
            x = self.run(self.visual_layer, x, block, bridge, features, mixed, bridge_padding)
            if number in config.visual_layers:
                levels.append(x)
        visual = self.visual_proj(torch.cat(levels, dim=-1))  # [B, 1 + N, D]

        # the grounding encoder over [REG], [CLS], patches, text
        reg = self.reg_token.to(visual.dtype).expand(B, 1, -1)
        z = torch.cat([reg, visual, self.text_proj(text)], dim=1)  # [B, 2 + N + T, D]
        positions = self.positions[: z.shape[1]]
        unpadded = patch_padding.new_zeros(B, 2)  # [REG] and [CLS]
        key_padding = torch.cat([unpadded, patch_padding, text_padding], dim=1)  # [B, 2 + N + T]
        for layer in self.layers[:-1]:
            z = self.run(layer, z, positions, key_padding)
        z = self.norm(self.layers[-1](z, positions, key_padding, queries=None if for_losses else 1))
        boxes = self.box_head(z[:, 0]).float().sigmoid()  # [B, 4]
        if not for_losses:
            return Grounding(boxes)

        N, rows = self.grid**2, torch.arange(B, device=tokens.device)
        u = F.normalize(z[rows, 2 + N + ends].float(), dim=-1)  # [B, D], the output at EOS
        v = self.region_mlp(self.region_norm(z[:, 2 : 2 + N])).float()  # [B, N, D]
        image_vectors = clip.visual.ln_post(x[:, 0]) @ clip.visual.proj  # [B, D]
        return Grounding(
            boxes,
            region_logits=(v * u[:, None]).sum(dim=-1),
            patch_padding=patch_padding,
            image_vectors=F.normalize(image_vectors.float(), dim=-1),
            text_vectors=F.normalize(text[rows, ends].float(), dim=-1),
        )

    def visual_layer(self, x, block, bridge, features, mixed, padding):
        """One layer of CLIP's image tower with the bridge that it may hold: x [B, 1 + N, d_v],
        features a list of f^i [B, T, d_t], mixed [B, T, d_v] where there are none, padding [B, T]
        -> [B, 1 + N, d_v]."""
        x = x + block.attn(block.ln_1(x))
        if bridge:
            x = bridge(x, bridge.read(features) if features else mixed, padding)
        return x + block.mlp(block.ln_2(x))

    def run(self, layer, *inputs):
        """layer(*inputs), which keeps nothing for the backward pass but its inputs if
        `checkpointing` is on."""
        again = self.checkpointing and torch.is_grad_enabled()
        return checkpoint(layer, *inputs, use_reentrant=False) if again else layer(*inputs)

    def pad_patches(self, padding, images):
        """padding [B, S, S] -> [B, N]: True for patches that lie wholly in the padding (D14)."""
        B, g = len(images), self.grid
        if padding is None:
            return torch.zeros(B, g * g, dtype=torch.bool, device=images.device)
        if self.config.authors:
            shares = padding[:, None].float()
            shares = F.interpolate(shares, (g, g), mode="bilinear", antialias=True)
            return shares.flatten(1).round().bool()
        return padding.view(B, g, -1, g, images.shape[-1] // g).amin(dim=(2, 4)).flatten(1)


# ------------------------------------------------------------------------------------------- losses


def sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2.0):
    """-a_t (1 - p_t)^gamma log p_t (Lin et al. 2017), element by element."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p = logits.sigmoid()
    p_t = p * targets + (1 - p) * (1 - targets)
    a_t = alpha * targets + (1 - alpha) * (1 - targets)
    return a_t * (1 - p_t) ** gamma * cross_entropy


def contrastive_loss(image, text, scale, objects):
    """L_CLC: CLIP's symmetric cross-entropy; samples of one object are no negatives to each other.

    image, text [B, D] normalised; scale: CLIP's logit scale; objects [B]: a number for each object.
    Returns a scalar.
    """
    logits = scale * image @ text.T  # [B, B]
    same = objects[:, None] == objects[None]  # [B, B]
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, -torch.inf)
    targets = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def region_targets(boxes, side):
    """boxes [B, 4] -> [B, side^2] of 0 and 1: 1 where the centre of the patch lies in the box."""
    centres = (torch.arange(side, device=boxes.device) + 0.5) / side
    x1, y1, x2, y2 = cxcywh_to_xyxy(boxes)[:, :, None].unbind(1)  # [B, 1] each
    columns, rows = (x1 <= centres) & (centres < x2), (y1 <= centres) & (centres < y2)  # [B, side]
    return (rows[:, :, None] & columns[:, None]).flatten(1).float()


def losses(output, boxes, objects, logit_scale, beta=0.0):
    """The poster's losses (README, Losses), means over the batch, not yet weighted (LOSS_WEIGHTS).

    output: a Grounding made for_losses; boxes [B, 4] true boxes; objects [B]: their numbers;
    logit_scale: CLIP's, as stored. beta 0: smooth-L1 is plain L1 (D2). There is no mask loss (D7).
    Returns a dict of scalars.
    """
    giou = generalized_box_iou(cxcywh_to_xyxy(output.boxes), cxcywh_to_xyxy(boxes))
    targets = region_targets(boxes, math.isqrt(output.region_logits.shape[1]))  # [B, N]
    real = (~output.patch_padding).float()  # [B, N]
    focal = sigmoid_focal_loss(output.region_logits, targets) * real
    p, t = output.region_logits.sigmoid() * real, targets * real
    dice = 1 - (2 * (p * t).sum(dim=1) + 1) / (p.sum(dim=1) + t.sum(dim=1) + 1)
    vectors = output.image_vectors, output.text_vectors
    return {
        "l1": F.smooth_l1_loss(output.boxes, boxes, beta=beta, reduction="none").sum(dim=1).mean(),
        "giou": (1 - giou).mean(),
        "clc": contrastive_loss(*vectors, logit_scale.exp(), objects),
        "focal": (focal.sum(dim=1) / real.sum(dim=1)).mean(),
        "dice": dice.mean(),
    }


# -------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path, model, **more):
    """Write a checkpoint that stands alone: sizes, weights, pairs and the vocabulary; `more` is
    plain data beside it."""
    content = {
        "format": "hivg-1",
        "config": asdict(model.config),
        "model": model.state_dict(),
        "vocabulary": (model.tokenizer or clip_model.clip_tokenizer()).merges_text,
        **more,
    }
    with clip_model.replacing(path) as temporary:
        torch.save(content, temporary)


AUTHORS_NAMES = (  # of the parameters in the authors' checkpoints, as patterns, and ours
    # they count layers from 0
    (r"^clip\.visual\..*\.(\d+)\.cross_", lambda found: f"bridges.{int(found[1]) + 1}."),
    (r"^(bridges\.\d+)\.gate\b", r"\1.W_proj"),
    (r"^(bridges\.\d+)\.adaptive_weights\b", r"\1.w"),
    (r"^vl_transformer\.encoder\.", ""),
    (r"^(bridges|layers)(\.\d+)\.(self_)?attn\b", r"\1\2.attention"),
    (r"^(layers\.\d+)\.norm([12])\b", r"\1.norm_\2"),
    (r"^bbox_embed\.layers\.(\d)\b", lambda found: f"box_head.{2 * int(found[1])}"),
    (r"^visu_token_", "region_"),
    (r"(linear|mlp\.fc)1\b", "mlp.0"),
    (r"(linear|mlp\.fc)2\b", "mlp.3"),
    (r"^reg_token\.weight", "reg_token"),
    (r"^vl_pos_embed\.weight", "positions"),
    (r"^condition_text_proj\b", "mixed_proj"),
)
AUTHORS_UNUSED = r"ml_text_feat_perceiver|reg_pos_embed|condition_text_pos_embed|seg_conv\d"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def from_authors(weights, settings):
    """HiVG from a checkpoint of the authors' released code, of any stage, all its LoRA folded.

    weights: its state dict, settings: its args as a dict; sizes follow from the shapes. Names that
    fit nowhere are an error.
    """
    if not settings["normalize_before"]:
        raise ValueError("its grounding encoder normalises after each part, ours before")
    towers = {n.removeprefix("clip."): t for n, t in weights.items() if n.startswith("clip.")}
    towers = clip_model.from_hugging_face(towers)
    clip_config = clip_model.config_from(towers)
    state = {n: t.float() for n, t in weights.items() if not n.startswith("clip.")}
    state |= {f"clip.{name}": t for name, t in towers.items()}
    state = clip_model.renamed(state, AUTHORS_NAMES)
    layers = sorted({int(name.split(".")[1]) for name in state if name.startswith("bridges.")})
    text_layers = TEXT_LAYERS.get(settings["dataset"], (clip_config.text_layers,))
    text_layers = () if settings["mixup_pretrain"] else text_layers
    adaptive = settings["enable_adaptive_weights"] and text_layers
    used = {"mixed_proj": layers and not text_layers, r"bridges\.\d+\.w\.": adaptive}
    used |= {r"bridges\.\d+\.W_proj": text_layers, AUTHORS_UNUSED: False}
    unused = "|".join(pattern for pattern in used if not used[pattern])
    state = {n: t for n, t in state.items() if not re.match(unused, n)}

    # two maps with nothing between them are one
    W, b = (state.pop(f"visu_proj.{part}") for part in ("weight", "bias"))
    state["visual_proj.weight"] = W @ state.pop("ml_visual_projection.weight")
    state["visual_proj.bias"] = W @ state.pop("ml_visual_projection.bias") + b
    state["reg_token"] = state["reg_token"][0]
    for name in [name for name in state if ".in_proj_" in name]:
        for part, rows in zip("qkv", state.pop(name).chunk(3)):
            state[name.replace("in_proj_", f"{part}_proj.")] = rows
    for layer in layers if text_layers else ():
        w = torch.zeros(len(text_layers), clip_config.context_length, clip_config.text_width)
        names = [f"bridges.{layer}.w.{i}.weight" for i in range(len(w))] if adaptive else ()
        state[f"bridges.{layer}.w"] = torch.stack([state.pop(n) for n in names]) if names else w
    config = HiVGConfig(
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        visual_layers=usual_layers(clip_config.vision_layers, "336" in settings["model"])[0],
        bridge_layers=tuple(layers),
        text_layers=text_layers,
        grounding_layers=settings["vl_enc_layers"],
        heads=settings["vl_nheads"],
        feedforward=len(state["layers.0.mlp.0.weight"]),
        region_width=len(state["region_mlp.0.weight"]),
        adapters="none",
        authors=True,
    )
    return assembled(config, clip_config, state).requires_grad_(False)


def assembled(config, clip_config, state, tokenizer=None):
    """HiVG of these sizes with the weights of a state dict. Sizes that it does not have take
    neither memory nor time."""
    if max(config.grounding_layers, config.groups, config.stage) > len(state):
        raise ValueError("it claims more layers or stages than it has weights")
    with torch.device("meta"):
        model = HiVG(config, CLIP(clip_config), tokenizer)
    model.load_state_dict(state, assign=True)
    model.enter_stage(config.stage)  # folds the frozen pairs that were just read
    return model


@torch.inference_mode()
def try_out(model):
    """Raises almost anything if a model that was read cannot ground: then its config claims what
    its weights are not."""
    config, last = model.config, model.clip.config.vocab_size - 1
    mean, std = torch.tensor((config.mean, config.std)).view(2, 3, 1, 1)
    images = (torch.zeros(1, 3, config.image_size, config.image_size) - mean) / std
    if not model.eval()(images, torch.tensor([[last - 1, last]])).boxes.isfinite().all():
        raise ValueError("it finds no numbers for a box")


def load_model(path):
    """(HiVG in the stage it was saved in, the checkpoint's whole content), from train.py's files or
    the authors'.

    Raises HiVGError, naming the file, if it is none of these.
    """
    way_out = "name a best.pt or last.pt of train.py, or a checkpoint of HiVG's authors"
    with clip_model.explaining(f"{path} is no checkpoint of HiVG", way_out):
        content = clip_model.read_weights(path)
        clip_model.refuse_expanded(content.get("model", {}))
        if "vl_pos_embed.weight" in content.get("model", {}):
            model = from_authors(content["model"], vars(content["args"]))
        elif content["format"] == "hivg-1":
            state, tokenizer = content["model"], Tokenizer(io.StringIO(content["vocabulary"]))
            clip = {n.removeprefix("clip."): t for n, t in state.items() if n.startswith("clip.")}
            sizes = clip_model.config_from(clip)
            model = assembled(HiVGConfig(**content["config"]), sizes, state, tokenizer)
            if tokenizer.vocab_size != sizes.vocab_size:
                raise ValueError("its vocabulary is not that of its CLIP")
        else:
            raise ValueError(f"its format is {content['format']}")
        try_out(model)
        return model, content


def load_checkpoint(path, device="cpu"):
    """HiVG from the project's own best.pt or last.pt, or from a checkpoint of the authors' released
    code: eval mode, LoRA merged, ready to ground.

    Raises HiVGError, naming the file, if it is missing, damaged or something else.
    """
    return load_model(path)[0].to(device).merge().eval()
