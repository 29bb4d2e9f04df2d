"""HiVG (ACM MM 2024, arXiv 2404.13400): one image and one expression -> one box.

Reading order: HiVGConfig, Bridge (MACB, section 3.2), GroundingLayer, HiVG (the path from image and
text to the box in `forward`), boxes and losses, checkpoints, and last the checkpoints of HiVG's
authors. The towers are in clip_model.py, the adapters (HiLoRA, section 3.3) in lora.py.

Letters: B samples, S image side and P patch side in pixels, N = (S / P)^2 patches, T text tokens,
K = 2 + N + T tokens of the grounding encoder, d_v and d_t widths of CLIP's towers, D CLIP's joint
width. V and C are sets of image layers, see HiVGConfig; layers are numbered from 1. Boxes are (cx,
cy, w, h) in 0..1 of the padded square unless a name says otherwise. A mask of padding is True where
there is padding. (D1), (D2), ... refer to the README's list of differences from the paper and from
its authors' released code, (R).
"""

import copy
import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import clip_model
import lora
from clip_model import CLIP, HiVGError, QuickGELU, Tokenizer, attention

# isort: split
# imports of the sections on checkpoints
import argparse
import io
import re


@dataclass
class HiVGConfig:
    """What the model is, apart from CLIP's own sizes. Every checkpoint contains it.

    None stands for the paper's choice for this CLIP: see `with_defaults`.
    """

    image_size: int | None = None  # S
    mean: tuple = clip_model.MEAN  # of the pixels, in 0..1 (D9)
    std: tuple = clip_model.STD
    visual_layers: tuple | None = None  # V: their outputs are the multi-level features
    bridge_layers: tuple | None = None  # C: they contain a bridge
    text_layers: tuple | None = None  # the bridges read their f^i; (): the projected text instead
    grounding_layers: int = 6
    heads: int = 8
    feedforward: int = 2048
    region_width: int = 3072  # hidden width of the RTCC head
    dropout: float = 0.1
    adapters: str = "hilora"  # hilora, vanilla (one group) or none
    targets: tuple = ("attn.in_proj", "attn.out_proj")  # adapted Linears of a layer: q, k, v, out
    groups: int = 3  # G: groups of layers, and stages after the warm-up
    rank: int = 32
    alpha: float = 16
    lora_dropout: float = 0.1
    stage: int = 0  # -1: warm-up without bridges; 0: warm-up; j = 1..G: stage j of HiLoRA
    authors: bool = False  # masks as in the authors' checkpoints: see `padding_masks`

    def with_defaults(self, clip_config):
        """A copy in which nothing is None: the paper's layers V and C for a CLIP of this depth,
        its last text layer, its image size."""
        is_336 = clip_config.image_size == 336
        V, C = default_layers(clip_config.vision_layers, is_336)
        filled = replace(self)
        if filled.image_size is None:
            filled.image_size = clip_config.image_size
        if filled.visual_layers is None:
            filled.visual_layers = V
        if filled.bridge_layers is None:
            filled.bridge_layers = C
        filled.visual_layers = tuple(sorted(set(filled.visual_layers)))
        filled.bridge_layers = tuple(sorted(set(filled.bridge_layers)))
        if filled.text_layers is None:
            filled.text_layers = (clip_config.text_layers,)
        return filled


def default_layers(depth, is_336):
    """V and C for a tower of `depth` layers; is_336: ViT-L/14@336px."""
    if depth == 24 and is_336:
        return (12, 16, 20, 24), (12, 16, 20, 24)
    if depth == 24:
        return (6, 12, 18, 24), (5, 11, 17, 23)
    layers = {1, max(1, round(depth / 3)), max(1, round(2 * depth / 3)), depth}
    return tuple(sorted(layers)), tuple(sorted(layers))


BRIDGE_TEXT_LAYERS = {  # text_layers by data set, in our names and in (R)'s; others: the last
    "refcoco+": (6, 12),
    "unc+": (6, 12),
    "referit": (6, 12),
    "refcocog": tuple(range(1, 13)),
    "gref_umd": tuple(range(1, 13)),
    "refcocog-google": tuple(range(1, 13)),
    "gref": tuple(range(1, 13)),
}

# -------------------------------------------------------------------------------------------- parts


class CrossAttention(nn.Module):
    """Multi-head attention with a matrix and a bias each for q, k, v and out."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, query, key, value, key_padding):
        """query [B, Nq, d], key and value [B, Nk, d], key_padding [B, Nk] -> [B, Nq, d]."""
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        mask = ~key_padding[:, None, None, :]  # [B, 1, 1, Nk], True = attend
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(attention(q, k, v, self.heads, mask, dropout=dropout))


def make_mlp(width, hidden, activation, dropout=0.0):
    up, down = nn.Linear(width, hidden), nn.Linear(hidden, width)
    return nn.Sequential(up, activation, nn.Dropout(dropout), down)


class Bridge(nn.Module):
    """MACB, the multi-layer adaptive cross-modal bridge (Eq. 1-3): the text enters a visual layer
    between self-attention and MLP.

        t = concat_i [ w^i * f^i + f^i ] W_proj + b        over the text layers i in use
        x = x + BridgeMLP(CrossAttention(LN_b(x), t))      queries: image; keys and values: text

    w^i [77, d_t] weighs positions and channels of f^i; it is the same for all samples. If there are
    no text layers, t comes ready-made and the bridge has no w and no W_proj (mixtures of data
    sets).
    """

    def __init__(self, clip_config, text_layer_count):
        super().__init__()
        width, text_width = clip_config.vision_width, clip_config.text_width
        if text_layer_count:
            sizes = text_layer_count, clip_config.context_length, text_width
            self.w = nn.Parameter(torch.zeros(sizes))
            self.W_proj = nn.Linear(text_layer_count * text_width, width)
        self.norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, max(1, width // 64))
        self.mlp = make_mlp(width, 4 * width, QuickGELU())
        nn.init.zeros_(self.mlp[-1].weight)  # a new bridge changes nothing (D8)
        nn.init.zeros_(self.mlp[-1].bias)

    def text_context(self, features):
        """t [B, T, d_v] from the f^i, a list of [B, T, d_t]."""
        T = features[0].shape[1]
        weighted = [w_i[:T] * f_i + f_i for w_i, f_i in zip(self.w, features)]
        return self.W_proj(torch.cat(weighted, dim=-1))

    def forward(self, x, t, bridge_padding):
        """x [B, 1 + N, d_v], t [B, T, d_v], bridge_padding [B, T] -> [B, 1 + N, d_v] (D3)."""
        return x + self.mlp(self.attention(self.norm(x), t, t, bridge_padding))


class GroundingLayer(nn.Module):
    """A pre-norm transformer layer; positions are added to queries and keys, not to values.

    x = x + Attention(LN(x) + positions, LN(x) + positions, LN(x));  x = x + MLP(LN(x))
    """

    def __init__(self, width, heads, feedforward, dropout):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CrossAttention(width, heads, dropout)
        self.mlp = make_mlp(width, feedforward, nn.ReLU(), dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, positions, padding, queries=None):
        """x [B, K, D], positions [K, D], padding [B, K] -> [B, queries, D]: the first `queries`
        tokens, or all if None."""
        value = self.norm_1(x)
        key = value + positions
        x = x[:, :queries] + self.dropout(self.attention(key[:, :queries], key, value, padding))
        x = x + self.dropout(self.mlp(self.norm_2(x)))
        return x


# -------------------------------------------------------------------------------------------- model


@dataclass
class HiVGOutput:
    """What HiVG returns. Only `boxes` is set unless for_losses=True."""

    boxes: torch.Tensor  # [B, 4] cx, cy, w, h in 0..1 of the padded square
    region_logits: torch.Tensor | None = None  # [B, N], s_p = u . v_p (L_RTCC)
    patch_padding: torch.Tensor | None = None  # [B, N] bool
    # of [CLS], which has seen the sample's own text in the bridges: [B, D], normalised (L_CLC)
    image_vectors: torch.Tensor | None = None
    text_vectors: torch.Tensor | None = None  # [B, D], normalised

    def region_map(self):
        """[B, N]: for every patch the probability that it belongs to what is meant, sigmoid(s_p) of
        L_RTCC; 0 in the padding. Like `scores` it needs an output made with for_losses."""
        return self.region_logits.sigmoid().masked_fill(self.patch_padding, 0)

    def scores(self):
        """[B], 0..1: how sure it is that what is meant is in the image, the largest value of
        region_map. It follows from image and text, not from the box; without L_RTCC in training it
        says nothing."""
        return self.region_map().amax(dim=1)


@dataclass
class TextFeatures:
    """What the model takes from CLIP's text tower."""

    features: list  # the f^i of the layers in text_layers, [B, T, d_t] each
    joint: torch.Tensor  # all tokens in CLIP's joint space, [B, T, D]
    end: torch.Tensor  # [B], the position of the end token


@dataclass
class PaddingMasks:
    """bool, True = padding. `bridge` differs from `text` in the authors' checkpoints alone."""

    text: torch.Tensor  # [B, T], for the grounding encoder
    bridge: torch.Tensor  # [B, T], for the bridges
    patch: torch.Tensor  # [B, N]


class HiVG(nn.Module):
    """The whole model, built around a copy of `clip`, in stage config.stage.

    tokenizer: the one that `clip` was trained with; None: CLIP's own.
    """

    def __init__(self, config, clip, tokenizer=None):
        super().__init__()
        config = config.with_defaults(clip.config)
        V, C, L = config.visual_layers, config.bridge_layers, clip.config.vision_layers
        check_layers("visual", V + C, L)
        check_layers("text", config.text_layers, clip.config.text_layers)
        self.config, self.tokenizer = config, tokenizer
        self.clip = copy.deepcopy(clip)  # its positions are resized and its Linears adapted
        self.clip.resize_positional_embedding(config.image_size)
        sizes = self.clip.config
        d_v, D = sizes.vision_width, sizes.embed_dim
        self.grid = config.image_size // sizes.patch_size  # patches a side
        N = self.grid**2
        text_layer_count = len(config.text_layers)

        if config.adapters != "none":
            # q, k, v are three row blocks of one matrix; only the image tower is adapted (D6)
            targets = {name: 3 if name.endswith("in_proj") else 1 for name in config.targets}
            settings = config.rank, config.alpha, config.lora_dropout
            lora.add_lora(self.visual_blocks, targets, *settings)
        self.bridges = nn.ModuleDict()
        for layer in C:
            self.bridges[str(layer)] = Bridge(sizes, text_layer_count)
        self.mixed_proj = None  # makes t from the projected text, one for all bridges
        if C and text_layer_count == 0:
            self.mixed_proj = nn.Linear(D, d_v)

        self.visual_proj = nn.Linear(len(V) * d_v, D)  # (D10)
        self.text_proj = nn.Linear(D, D)
        self.reg_token = nn.Parameter(torch.randn(D) * 0.02)
        self.grounding_positions = nn.Parameter(torch.randn(2 + N + sizes.context_length, D) * 0.02)
        self.grounding_positions.data[2 : 2 + N] += sincos_grid(self.grid, D)  # (D11)
        self.grounding_layers = nn.ModuleList()
        for _ in range(config.grounding_layers):
            layer = GroundingLayer(D, config.heads, config.feedforward, config.dropout)
            self.grounding_layers.append(layer)
        for parameter in self.grounding_layers.parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
        self.grounding_norm = nn.LayerNorm(D)
        self.box_head = nn.Sequential(
            nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 4)
        )
        self.region_norm = nn.LayerNorm(D)
        self.region_mlp = make_mlp(D, config.region_width, QuickGELU())

        self.checkpointing = False  # see maybe_checkpoint
        self.enter_stage(config.stage)

    def forward(self, images, tokens, padding=None, for_losses=False):
        """The box of every expression.

        images: [B, 3, S, S], normalised, 0 in the padding. tokens: [B, T]. padding: [B, S, S] bool,
        True where a pixel is padding; None: nowhere.
        Returns an HiVGOutput; for_losses: with all that `compute_losses` needs.
        """
        tokens, masks = self.padding_masks(tokens, padding)
        text = self.text_features(tokens)
        levels, x = self.image_features(images, text, masks.bridge)  # [B, 1 + N, |V| d_v], ...
        z = self.grounding_encoder(levels, text, masks, only_reg=not for_losses)  # [B, K, D]
        boxes = self.box_head(z[:, 0]).float().sigmoid()  # [B, 4], from [REG]
        if not for_losses:
            return HiVGOutput(boxes)
        return HiVGOutput(
            boxes,
            region_logits=self.region_logits(z, text.end),
            patch_padding=masks.patch,
            image_vectors=F.normalize(self.clip.visual.project(x).float(), dim=-1),
            text_vectors=F.normalize(at_end(text.joint, text.end).float(), dim=-1),
        )

    @torch.no_grad()  # the text tower is frozen and does not see the image
    def text_features(self, tokens):
        """tokens [B, T] -> TextFeatures."""
        states = self.clip.text_hidden_states(tokens)  # f^1, f^2, ...
        return TextFeatures(
            features=[states[layer - 1] for layer in self.config.text_layers],
            joint=self.clip.project_text(states[-1]),
            end=tokens.argmax(dim=1),  # the end token has the largest id
        )

    def image_features(self, images, text, bridge_padding):
        """CLIP's image tower with LoRA inside its self-attention and bridges to the text.

        images [B, 3, S, S] -> the outputs of the layers of V, concatenated, [B, 1 + N, |V| d_v],
        and that of the last layer, [B, 1 + N, d_v].
        """
        t = self.mixed_proj(text.joint) if self.mixed_proj is not None else None  # [B, T, d_v]
        x = self.clip.visual.embed(images)  # [B, 1 + N, d_v]
        levels = []
        for number, block in enumerate(self.visual_blocks, start=1):
            bridge = None
            if str(number) in self.bridges and self.config.stage >= 0:
                bridge = self.bridges[str(number)]
            inputs = x, block, bridge, text.features, t, bridge_padding
            x = self.maybe_checkpoint(bridged_block, *inputs)
            if number in self.config.visual_layers:
                levels.append(x)
        return torch.cat(levels, dim=-1), x

    def grounding_encoder(self, levels, text, masks, only_reg):
        """The grounding encoder over [REG], [CLS], patches and text tokens.

        levels [B, 1 + N, |V| d_v] -> [B, K, D]; only_reg: [B, 1, D], [REG] alone.
        """
        visual = self.visual_proj(levels)  # [B, 1 + N, D]
        reg = self.reg_token.expand(len(visual), 1, -1)  # [B, 1, D]
        # cat takes the widest dtype, that of reg: z, the residual stream, is float32 under autocast
        z = torch.cat([reg, visual, self.text_proj(text.joint)], dim=1)  # [B, K, D]
        positions = self.grounding_positions[: z.shape[1]]
        never = masks.patch.new_zeros(len(z), 2)  # [REG] and [CLS] are no padding
        padding = torch.cat([never, masks.patch, masks.text], dim=1)  # [B, K]
        for layer in self.grounding_layers[:-1]:
            z = self.maybe_checkpoint(layer, z, positions, padding)
        queries = 1 if only_reg else None
        z = self.maybe_checkpoint(self.grounding_layers[-1], z, positions, padding, queries)
        return self.grounding_norm(z)

    def region_logits(self, z, end):
        """s_p = u . v_p for every patch p (L_RTCC): z [B, K, D], end [B] -> [B, N].

        u is the output at the end of the text, normalised; v_p an MLP of the output at the patch.
        """
        N = self.grid**2
        u = F.normalize(at_end(z[:, 2 + N :], end).float(), dim=-1)  # [B, D]
        v = self.region_mlp(self.region_norm(z[:, 2 : 2 + N])).float()  # [B, N, D]
        return (v * u[:, None]).sum(dim=-1)

    def enter_stage(self, stage):
        """Make a warm-up (-1: without bridges; 0) or stage j of HiLoRA the current one: add its
        pairs and set what trains.

        CLIP's weights never train; of the pairs only the newest do; bridges, projections, grounding
        encoder and heads always train, the bridges from stage 0 on. A new pair and a new bridge
        change no output. Entering an earlier stage gives the outputs of that stage.
        """
        self.config.stage = stage
        self.requires_grad_(True)
        self.clip.requires_grad_(False)
        if stage < 0:
            self.bridges.requires_grad_(False)
            if self.mixed_proj is not None:
                self.mixed_proj.requires_grad_(False)
        if self.config.adapters == "hilora":
            lora.enter_stage(self.visual_blocks, stage, self.config.groups)
        elif self.config.adapters == "vanilla":  # one group; its only pair trains from stage 1 on
            lora.enter_stage(self.visual_blocks, min(stage, 1), groups=1)

    def merge(self):
        """Add all LoRA pairs into the matrices, for inference. Returns the model."""
        lora.merge_lora(self.visual_blocks)
        return self

    def tokenize(self, texts):
        """A str or a list of str -> LongTensor [N, 77], with the model's own vocabulary."""
        if self.tokenizer is None:
            self.tokenizer = clip_model.clip_tokenizer()
        return self.tokenizer(texts, self.clip.config.context_length)

    @property
    def visual_blocks(self):
        """The layers 1 ... L of the image tower."""
        return self.clip.visual.transformer.resblocks

    def maybe_checkpoint(self, layer, *inputs):
        """layer(*inputs). If `checkpointing` is True, only the inputs are kept for the backward
        pass, which runs the layer again: less memory, more time."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def padding_masks(self, tokens, padding):
        """(tokens, PaddingMasks) of a batch. padding: [B, S, S] bool or None.

        Text padding is what comes after the end token (D1). A patch is padding if all of it is
        (D14). The authors' checkpoints were trained with other masks: in the grounding encoder
        every id 0 is padding, which hides "!" as well; bridges attend to all 77 positions, padding
        included (D3); the image's mask is resized to the patches and rounded.
        """
        authors, g = self.config.authors, self.grid
        if authors:
            missing = self.clip.config.context_length - tokens.shape[1]
            tokens = F.pad(tokens, (0, missing))  # [B, 77]
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        text = positions > tokens.argmax(dim=1, keepdim=True)  # [B, T]
        bridge = text
        if authors:
            text, bridge = tokens == 0, torch.zeros_like(text)
        if padding is None:
            patch = text.new_zeros(len(tokens), g * g)  # [B, N]
        elif authors:
            shares = padding[:, None].float()  # [B, 1, S, S]
            shares = F.interpolate(shares, (g, g), mode="bilinear", antialias=True)
            patch = shares.round().bool().flatten(1)
        else:
            P = padding.shape[-1] // g
            patch = padding.view(-1, g, P, g, P).all(dim=4).all(dim=2).flatten(1)
        return tokens, PaddingMasks(text, bridge, patch)


def bridged_block(x, block, bridge, features, t, bridge_padding):
    """A block of CLIP's image tower with a bridge between self-attention and MLP, or None.

    x [B, 1 + N, d_v] -> [B, 1 + N, d_v]. features: the f^i, from which the bridge makes t, or [] if
    t [B, T, d_v] is given. bridge_padding [B, T].
    """
    x = x + block.attn(block.ln_1(x))  # LoRA inside
    if bridge is not None:
        if features:
            t = bridge.text_context(features)
        x = bridge(x, t, bridge_padding)
    x = x + block.mlp(block.ln_2(x))
    return x


def at_end(x, end):
    """x [B, T, D] -> [B, D] at the positions `end` [B]."""
    return x[torch.arange(len(x), device=x.device), end]


def sincos_grid(side, width):
    """Sines and cosines of row and column, the start of the positions of side x side patches:
    [side^2, width]."""
    frequencies = 10 ** (-torch.arange(width // 4) / (width / 4)) * math.pi  # [width / 4]
    angles = torch.linspace(0, 1, side)[:, None] * frequencies  # [side, width / 4]
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    rows = waves[:, None].expand(-1, side, -1)  # [side, side, width / 2]
    columns = waves[None].expand(side, -1, -1)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # [side^2, width - width % 4]
    return F.pad(grid, (0, width - grid.shape[1]))


def check_layers(kind, layers, depth):
    """Raise HiVGError if one of the layers is not among 1 ... depth."""
    absent = sorted(set(layers) - set(range(1, depth + 1)))
    if absent:
        raise HiVGError(f"This CLIP has no {kind} layers {absent}: choose among 1 to {depth}.")


# --------------------------------------------------------------------------------- boxes and losses

LOSS_WEIGHTS = {"l1": 2.0, "giou": 2.0, "clc": 1.0, "focal": 20.0, "dice": 2.0}
MIN_AREA = 1e-16  # a floor of divisors; its square, by which gradients are divided, is a float32


def cxcywh_to_xyxy(boxes):
    """(cx, cy, w, h) -> (x1, y1, x2, y2), [..., 4]."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def box_area(boxes):
    """x1, y1, x2, y2 [N, 4] -> [N]; 0 where x2 < x1 or y2 < y1."""
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)  # [N, 2]
    return size[:, 0] * size[:, 1]


def intersection_and_union(a, b):
    """Areas, pair by pair: a, b [N, 4] -> [N], [N]."""
    top_left = torch.maximum(a[:, :2], b[:, :2])
    bottom_right = torch.minimum(a[:, 2:], b[:, 2:])
    intersection = box_area(torch.cat([top_left, bottom_right], dim=1))
    return intersection, box_area(a) + box_area(b) - intersection


def box_iou(a, b):
    """Intersection over union, pair by pair: a, b [N, 4] as x1, y1, x2, y2 -> [N]; 0 where both
    have no area."""
    intersection, union = intersection_and_union(a, b)
    return intersection / union.clamp(min=MIN_AREA)


def generalized_box_iou(a, b):
    """GIoU = IoU - (hull - union) / hull (Rezatofighi et al. 2019), pair by pair: a, b [N, 4] as
    x1, y1, x2, y2 -> [N], -1 ... 1. hull: the smallest box around both.

    Finite for boxes without area: their IoU counts as 0, and a hull without area as filled.
    """
    intersection, union = intersection_and_union(a, b)
    top_left = torch.minimum(a[:, :2], b[:, :2])
    bottom_right = torch.maximum(a[:, 2:], b[:, 2:])
    hull = box_area(torch.cat([top_left, bottom_right], dim=1))
    iou = intersection / union.clamp(min=MIN_AREA)
    return iou - (hull - union) / hull.clamp(min=MIN_AREA)


def compute_losses(output, boxes, objects, logit_scale, beta=0.0):
    """The paper's losses, means over the batch, not weighted yet (LOSS_WEIGHTS), as a dict:

        L_BOX  = l1 + giou       smooth-L1(b, b*), summed over coordinates (D2);  1 - GIoU(b, b*)
        L_CLC  = clc             contrastive_loss of image vectors and text vectors
        L_RTCC = focal + dice    of the region logits against the patches inside the box

    output: an HiVGOutput made with for_losses; boxes: true boxes [B, 4]; objects [B]: a number for
    each object, see contrastive_loss; logit_scale: CLIP's parameter. There is no mask loss (D7).
    """
    l1 = F.smooth_l1_loss(output.boxes, boxes, beta=beta, reduction="none").sum(dim=1)  # [B]
    giou = generalized_box_iou(cxcywh_to_xyxy(output.boxes), cxcywh_to_xyxy(boxes))  # [B]
    targets = patch_targets(boxes, math.isqrt(output.region_logits.shape[1]))  # [B, N]
    real = (~output.patch_padding).float()  # [B, N], 0 for padding patches
    focal = sigmoid_focal_loss(output.region_logits, targets) * real  # [B, N]
    return {
        "l1": l1.mean(),
        "giou": (1 - giou).mean(),
        "clc": contrastive_loss(
            output.image_vectors, output.text_vectors, logit_scale.exp(), objects
        ),
        "focal": (focal.sum(dim=1) / real.sum(dim=1)).mean(),
        "dice": dice_loss(output.region_map(), targets * real).mean(),
    }


def patch_targets(boxes, side):
    """boxes [B, 4] -> [B, side^2]: 1 where the centre of a patch lies in the box, else 0."""
    centres = (torch.arange(side, device=boxes.device) + 0.5) / side  # [side]
    x1, y1, x2, y2 = cxcywh_to_xyxy(boxes).unbind(dim=1)  # [B] each
    columns = (x1[:, None] <= centres) & (centres < x2[:, None])  # [B, side]
    rows = (y1[:, None] <= centres) & (centres < y2[:, None])
    return (rows[:, :, None] & columns[:, None, :]).flatten(1).float()


def sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2.0):
    """-alpha_t (1 - p_t)^gamma log p_t (Lin et al. 2017), element by element."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p = logits.sigmoid()
    p_t = p * targets + (1 - p) * (1 - targets)
    alpha_t = alpha * targets + (1 - alpha) * (1 - targets)
    return alpha_t * (1 - p_t) ** gamma * cross_entropy


def dice_loss(p, targets):
    """1 - (2 sum p t + 1) / (sum p + sum t + 1) (Milletari et al. 2016): [B, N], [B, N] -> [B]."""
    intersection = (p * targets).sum(dim=1)
    return 1 - (2 * intersection + 1) / (p.sum(dim=1) + targets.sum(dim=1) + 1)


def contrastive_loss(image, text, scale, objects):
    """CLIP's symmetric cross-entropy of image against text vectors, within one forward pass (D15).

    image, text [B, D], normalised; scale: a factor of the cosines. Samples of the same object, by
    `objects` [B], are no negatives of each other. Returns a scalar.
    """
    logits = scale * image @ text.T  # [B, B]
    same = objects[:, None] == objects[None, :]  # [B, B]
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, -torch.inf)
    targets = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


# -------------------------------------------------------------------------------------- checkpoints

FORMAT = "hivg-2"


def save_checkpoint(path, model, **more):
    """Write a checkpoint that stands alone: config, weights, pairs and vocabulary; `more` is plain
    data beside it."""
    tokenizer = model.tokenizer or clip_model.clip_tokenizer()
    content = {
        "format": FORMAT,
        "config": asdict(model.config),
        "model": model.state_dict(),
        "vocabulary": tokenizer.merges_text,
        **more,
    }
    with clip_model.atomic_write(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path, device="cpu"):
    """HiVG from a best.pt or last.pt of train.py or from a checkpoint of HiVG's authors: eval mode,
    LoRA merged, ready for inference.

    Raises HiVGError, naming the file, if it is missing, damaged or something else.
    """
    model, _ = read_checkpoint(path)
    return model.to(device).merge().eval()


def with_fresh_pairs(model, **changes):
    """A copy of a model in stage 0, for a new training: its pairs are part of the matrices. changes:
    fields of HiVGConfig that describe the new pairs (adapters, targets, groups, rank)."""
    config = replace(model.config, stage=0, **changes)
    fresh = HiVG(config, CLIP(model.clip.config), model.tokenizer)
    fresh.load_state_dict(lora.merged_state_dict(model))
    return fresh


def read_checkpoint(path):
    """(HiVG in the stage in which it was saved, the whole content of the file).

    Raises HiVGError as `load_checkpoint`.
    """
    what = f"{path} is not an HiVG checkpoint"
    hint = "name a best.pt or last.pt of this version's train.py, or a file of HiVG's authors"
    with clip_model.user_error(what, hint):
        content = clip_model.read_weights(path, safe_classes=[argparse.Namespace])
        if "vl_pos_embed.weight" in content.get("model", {}):
            state, config, clip_config = convert_authors(content["model"], content["args"])
            tokenizer = None
        elif content.get("format") == FORMAT:
            state = content["model"]
            clip_state = {n.removeprefix("clip."): t for n, t in state.items() if n[:5] == "clip."}
            clip_config = clip_model.infer_config(clip_state)
            config = HiVGConfig(**content["config"])
            tokenizer = Tokenizer(io.StringIO(content["vocabulary"]))
        else:
            raise ValueError(f"its format is {content.get('format')}, not {FORMAT}")
    # a model that has entered an earlier stage was saved with all pairs that it has
    stages = [int(name.rsplit(".", 1)[1]) for name in state if ".lora_A." in name]
    with torch.device("meta"):  # no memory, no random numbers: the file has all weights
        model = HiVG(config, CLIP(clip_config), tokenizer)
        model.enter_stage(max([config.stage, *stages]))
    with clip_model.user_error(what, hint):
        model.load_state_dict(state, assign=True)
    model.enter_stage(config.stage)  # sets what trains, and folds the pairs that were read
    return model, content


# ------------------------------------------------------------- the checkpoints of HiVG's authors (R)

AUTHORS_NAMES = (  # patterns of (R)'s names, and ours
    (r"^clip\.visual\.transformer\.resblocks\.(\d+)\.cross_", r"bridges.\1."),
    (r"^(bridges\.\d+)\.gate\b", r"\1.W_proj"),
    (r"^(bridges\.\d+)\.adaptive_weights\b", r"\1.w"),
    (r"^vl_transformer\.encoder\.", "grounding_"),
    (r"^(bridges|grounding_layers)(\.\d+)\.(self_)?attn\b", r"\1\2.attention"),
    (r"^(grounding_layers\.\d+)\.norm([12])\b", r"\1.norm_\2"),
    (r"^bbox_embed\.layers\.0\b", "box_head.0"),
    (r"^bbox_embed\.layers\.1\b", "box_head.2"),
    (r"^bbox_embed\.layers\.2\b", "box_head.4"),
    (r"^visu_token_", "region_"),
    (r"(linear|mlp\.fc)1\b", "mlp.0"),
    (r"(linear|mlp\.fc)2\b", "mlp.3"),
    (r"^reg_token\.weight", "reg_token"),
    (r"^vl_pos_embed\.weight", "grounding_positions"),
    (r"^condition_text_proj\b", "mixed_proj"),
)
AUTHORS_UNUSED = r"ml_text_feat_perceiver|reg_pos_embed|condition_text_pos_embed|seg_conv\d"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def convert_authors(weights, args):
    """A checkpoint of (R), of any stage -> (state dict in our names, HiVGConfig, CLIPConfig).

    weights: its state dict; args: its Namespace of settings; sizes follow from the shapes. All LoRA
    pairs are merged. What is left over or missing is found by the strict load_state_dict.
    """
    if not args.normalize_before:
        raise ValueError("its grounding encoder is post-norm, ours is pre-norm")
    clip_state = {n.removeprefix("clip."): t for n, t in weights.items() if n.startswith("clip.")}
    clip_state = clip_model.merge_authors_lora(clip_state)
    clip_state = clip_model.hugging_face_to_openai(clip_state)
    clip_config = clip_model.infer_config(clip_state)
    state = {f"clip.{name}": tensor for name, tensor in clip_state.items()}
    state.update({n: t.float() for n, t in weights.items() if not n.startswith("clip.")})
    state = clip_model.rename_keys(state, AUTHORS_NAMES)
    state = {count_from_1(name): tensor for name, tensor in state.items()}
    bridge_layers = sorted({int(n.split(".")[1]) for n in state if n.startswith("bridges.")})

    text_layers = BRIDGE_TEXT_LAYERS.get(args.dataset, (clip_config.text_layers,))
    if args.mixup_pretrain:  # bridges get the projected text
        text_layers = ()
    adaptive = text_layers and args.enable_adaptive_weights
    unused = [AUTHORS_UNUSED]
    if text_layers or not bridge_layers:
        unused.append("mixed_proj")
    if not text_layers:
        unused.append(r"bridges\.\d+\.W_proj")
    if not adaptive:
        unused.append(r"bridges\.\d+\.w\.")
    state = {n: t for n, t in state.items() if not re.match("|".join(unused), n)}

    # two linear maps with nothing between them become one
    W, b = state.pop("visu_proj.weight"), state.pop("visu_proj.bias")
    state["visual_proj.weight"] = W @ state.pop("ml_visual_projection.weight")
    state["visual_proj.bias"] = W @ state.pop("ml_visual_projection.bias") + b
    state["reg_token"] = state["reg_token"][0]
    for name in list(state):
        if ".in_proj_" in name:  # of nn.MultiheadAttention
            q, k, v = state.pop(name).chunk(3)
            state[name.replace("in_proj_", "q_proj.")] = q
            state[name.replace("in_proj_", "k_proj.")] = k
            state[name.replace("in_proj_", "v_proj.")] = v
    for layer in bridge_layers:
        if adaptive:
            w = [state.pop(f"bridges.{layer}.w.{i}.weight") for i in range(len(text_layers))]
            state[f"bridges.{layer}.w"] = torch.stack(w)
        elif text_layers:
            sizes = len(text_layers), clip_config.context_length, clip_config.text_width
            state[f"bridges.{layer}.w"] = torch.zeros(sizes)
    visual_layers, _ = default_layers(clip_config.vision_layers, is_336="336" in args.model)
    config = HiVGConfig(
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        visual_layers=visual_layers,
        bridge_layers=tuple(bridge_layers),
        text_layers=text_layers,
        grounding_layers=args.vl_enc_layers,
        heads=args.vl_nheads,
        feedforward=len(state["grounding_layers.0.mlp.0.weight"]),
        region_width=len(state["region_mlp.0.weight"]),
        adapters="none",
        authors=True,
    )
    return state, config, clip_config


def count_from_1(name):
    """bridges.0.norm.weight -> bridges.1.norm.weight: (R) counts the layers from 0."""
    if not name.startswith("bridges."):
        return name
    _, layer, rest = name.split(".", 2)
    return f"bridges.{int(layer) + 1}.{rest}"
