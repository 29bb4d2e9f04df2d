"""HiVG (ACM MM 2024, arXiv 2404.13400): one image and one expression -> one box.

Reading order: HiVGConfig, Bridge (MACB, section 3.2), GroundingLayer, HiVG (the path from image and
text to the box in `forward`), boxes and losses, checkpoints, and last the checkpoints of HiVG's
authors. The towers are in clip_model.py, the adapters (HiLoRA, section 3.3) in lora.py.

Letters: B samples, S image side and P patch side in pixels, N = (S / P)^2 patches, T text tokens,
K = 2 + N + T tokens of the grounding encoder, d_v and d_t widths of CLIP's towers, D CLIP's joint
width. V and C are sets of image layers, see HiVGConfig; layers are numbered from 1. Boxes are (cx,
cy, w, h) in 0..1 of the padded square unless a name says otherwise. A mask of padding is True where
there is padding. (D1), (D2), ... refer to docs/differences.md: differences from the paper and from its
authors' released code, (R).
"""

import copy
import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora
from clip_model import (
    CLIP,
    MEAN,
    STATE_ERRORS,
    STD,
    HiVGError,
    QuickGELU,
    Tokenizer,
    at,
    atomic_write,
    attention,
    check_weights,
    clip_tokenizer,
    end_of_text,
    hugging_face_to_openai,
    infer_config,
    merge_authors_lora,
    noise,
    read_weights,
    rename_keys,
    user_error,
)


@dataclass
class HiVGConfig:
    """What the model is, apart from CLIP's own sizes. Every checkpoint contains it.

    None stands for the paper's choice for this CLIP: see `with_defaults`.
    """

    image_size: int | None = None  # S
    mean: tuple = MEAN  # of the pixels, in 0..1 (D9)
    std: tuple = STD
    visual_layers: tuple | None = None  # V: their outputs are the multi-level features
    bridge_layers: tuple | None = None  # C: they contain a bridge
    bridge_text: str = "layers"  # bridges read f^i; "projected": the projected text (mixtures)
    text_layers: tuple | None = None  # i, the text layers that bridges read
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
    authors_masks: bool = False  # of the authors' checkpoints: see the function of that name

    def with_defaults(self, clip_config):
        """A copy in which nothing is None: the paper's layers V and C for a CLIP of this depth,
        its last text layer, its image size. Raises ValueError for values that make no model, and
        HiVGError for layers that this CLIP does not have."""
        counts = self.heads, self.groups, self.grounding_layers, self.rank
        if (
            self.adapters not in ("hilora", "vanilla", "none")
            or self.bridge_text not in ("layers", "projected")
            or {type(count) for count in counts} != {int}
            or min(counts) < 1
            or clip_config.embed_dim % self.heads
        ):
            raise ValueError(
                f"{self} is no model: counts are whole numbers from 1 on, heads divide {clip_config.embed_dim}"
            )
        L, text_depth = clip_config.vision_layers, clip_config.text_layers
        V, C = default_layers(L, clip_config.image_size == 336)
        choices = {  # the default, and the number of layers to choose among
            "visual_layers": (V, L),
            "bridge_layers": (C, L),
            "text_layers": ((text_depth,), text_depth),
        }
        layers = {}
        for name, (default, depth) in choices.items():
            given = getattr(self, name)
            layers[name] = default if given is None else tuple(sorted(set(given)))
            is_empty = not layers[name] and name != "bridge_layers"
            if is_empty or set(layers[name]) - set(range(1, depth + 1)):
                raise HiVGError(
                    f"{name} {list(layers[name])}: choose among this CLIP's layers 1 to {depth}."
                )
        if self.image_size is None:
            layers["image_size"] = clip_config.image_size
        return replace(self, **layers)


def default_layers(depth, is_336):
    """V and C for a tower of `depth` layers; is_336: ViT-L/14@336px."""
    if depth == 24:
        layers = (12, 16, 20, 24)
        return (layers, layers) if is_336 else ((6, 12, 18, 24), (5, 11, 17, 23))
    layers = tuple(sorted({1, max(1, round(depth / 3)), round(2 * depth / 3), depth}))
    return layers, layers


BRIDGE_TEXT_LAYERS = {  # text_layers by data set, in our names and in (R)'s; others: the last
    **dict.fromkeys(("refcoco+", "unc+", "referit"), (6, 12)),
    **dict.fromkeys(("refcocog", "gref_umd", "refcocog-google", "gref"), tuple(range(1, 13))),
}

# -------------------------------------------------------------------------------------------- parts


class MultiHeadAttention(nn.Module):
    """Attention, to oneself or to others, with a matrix and a bias each for q, k, v and out."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(self, query, key, value, key_padding):
        """query [B, Nq, d], key and value [B, Nk, d], key_padding [B, Nk] -> [B, Nq, d]."""
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        mask = ~key_padding[:, None, None, :]  # [B, 1, 1, Nk], True = attend
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(attention(q, k, v, self.heads, mask, dropout=dropout))


def make_mlp(width, hidden, activation, dropout=0.0):
    return nn.Sequential(
        nn.Linear(width, hidden), activation, nn.Dropout(dropout), nn.Linear(hidden, width)
    )


class Bridge(nn.Module):
    """MACB, the multi-layer adaptive cross-modal bridge (Eq. 1-3): the text enters a visual layer
    between self-attention and MLP.

        t = concat_i [ w^i * f^i + f^i ] W_proj + b        over the text layers i in use
        x = x + BridgeMLP(CrossAttention(LN_b(x), t))      queries: image; keys and values: text

    LN_b is `norm`, BridgeMLP `mlp`, b the bias of W_proj; t [B, T, d_v] is the text context.
    w^i [77, d_t] weighs positions and channels of f^i; it is the same for all samples. In a mixture
    of data sets t is the projected text, one for all bridges: text_layer_count is 0 then, and the
    bridge has no w and no W_proj.
    """

    def __init__(self, clip_config, text_layer_count):
        super().__init__()
        width, text_width = clip_config.vision_width, clip_config.text_width
        if text_layer_count:
            self.w = nn.Parameter(
                torch.zeros(text_layer_count, clip_config.context_length, text_width)
            )
            self.W_proj = nn.Linear(text_layer_count * text_width, width)
        self.norm = nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, max(1, width // 64))
        self.mlp = make_mlp(width, 4 * width, QuickGELU())
        for parameter in self.mlp[-1].parameters():
            nn.init.zeros_(parameter)  # a new bridge changes nothing (D8)

    def text_context(self, features):
        """t [B, T, d_v] from the f^i, a list of [B, T, d_t]."""
        T = features[0].shape[1]
        weighted = [w_i[:T] * f_i + f_i for w_i, f_i in zip(self.w, features)]
        return self.W_proj(torch.cat(weighted, dim=-1))

    def forward(self, x, t, text_padding):
        """x [B, 1 + N, d_v], t [B, T, d_v], text_padding [B, T] -> [B, 1 + N, d_v] (D3)."""
        return x + self.mlp(self.attention(self.norm(x), t, t, text_padding))


def bridged_block(x, block, bridge, t, text_padding):
    """A block of CLIP's image tower; `bridge` (None: there is none) stands between its two lines.

    x [B, 1 + N, d_v], t [B, T, d_v], text_padding [B, T] -> [B, 1 + N, d_v].
    """
    x = x + block.attn(block.ln_1(x))  # LoRA inside
    if bridge is not None:
        x = bridge(x, t, text_padding)
    x = x + block.mlp(block.ln_2(x))
    return x


class GroundingLayer(nn.Module):
    """A pre-norm transformer layer; positions are added to queries and keys, not to values.

    x = x + Attention(LN(x) + positions, LN(x) + positions, LN(x));  x = x + MLP(LN(x))
    """

    def __init__(self, width, heads, feedforward, dropout):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, heads, dropout)
        self.mlp = make_mlp(width, feedforward, nn.ReLU(), dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, positions, padding):
        """x [B, K, D], positions [K, D], padding [B, K] -> [B, K, D]."""
        value = self.norm_1(x)
        key = value + positions
        x = x + self.dropout(self.attention(key, key, value, padding))
        x = x + self.dropout(self.mlp(self.norm_2(x)))
        return x


# -------------------------------------------------------------------------------------------- model


@dataclass
class HiVGOutput:
    """What HiVG returns."""

    boxes: torch.Tensor  # [B, 4] cx, cy, w, h in 0..1 of the padded square
    region_logits: torch.Tensor  # [B, N], s_p = u . v_p (L_RTCC)
    patch_padding: torch.Tensor  # [B, N] bool
    # [CLS] after the bridges, projected: it has attended to this sample's text (L_CLC)
    image_vectors: torch.Tensor  # [B, D], normalised
    text_vectors: torch.Tensor  # [B, D], normalised

    def region_map(self):
        """[B, N]: for every patch the probability that it belongs to what is meant, sigmoid(s_p) of
        L_RTCC; 0 in the padding."""
        return self.region_logits.sigmoid().masked_fill(self.patch_padding, 0)

    def scores(self):
        """[B], 0..1: how sure the model is that the object is in the image, the largest value of
        region_map. It follows from image and text, not from the box; without L_RTCC in training it
        says nothing."""
        return self.region_map().amax(dim=1)


torch.export.register_dataclass(HiVGOutput)  # so that the model can be exported


class HiVG(nn.Module):
    """The whole model, built around a copy of `clip`, in stage config.stage.

    tokenizer: the one that `clip` was trained with; None: CLIP's own.
    """

    def __init__(self, config, clip, tokenizer=None):
        super().__init__()
        config = config.with_defaults(clip.config)
        self.config, self.tokenizer = config, tokenizer
        self.clip = copy.deepcopy(clip)  # its positions are resized and its Linears adapted
        self.clip.resize_positional_embedding(config.image_size)
        sizes = self.clip.config
        d_v, D = sizes.vision_width, sizes.embed_dim
        self.grid = config.image_size // sizes.patch_size  # patches a side
        N = self.grid**2
        for name in ("mean", "std"):
            values = torch.tensor(getattr(config, name), device="cpu").view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

        if config.adapters != "none":
            # q, k, v are three row blocks of one matrix; only the image tower is adapted (D6)
            targets = {name: 3 if name.endswith("in_proj") else 1 for name in config.targets}
            lora.add_lora(
                self.visual_blocks, targets, config.rank, config.alpha, config.lora_dropout
            )
        mixed = config.bridge_text == "projected"  # then all bridges have the same t
        text_layer_count = 0 if mixed else len(config.text_layers)
        self.bridges = nn.ModuleDict(
            {str(layer): Bridge(sizes, text_layer_count) for layer in config.bridge_layers}
        )
        if mixed:
            self.mixture_proj = nn.Linear(D, d_v)  # makes t from the projected text

        self.visual_proj = nn.Linear(len(config.visual_layers) * d_v, D)  # (D10)
        self.text_proj = nn.Linear(D, D)
        self.reg_token = noise(0.02, D)
        self.grounding_positions = noise(0.02, 2 + N + sizes.context_length, D)
        self.grounding_positions.data[2 : 2 + N] += sincos_grid(self.grid, D)  # (D11)
        self.grounding_layers = nn.ModuleList(
            GroundingLayer(D, config.heads, config.feedforward, config.dropout)
            for _ in range(config.grounding_layers)
        )
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
        self.bridged_block = bridged_block  # or that compiled, see compile_blocks
        self.enter_stage(config.stage)

    def forward(self, images, tokens, padding=None):
        """The box of every expression.

        images: [B, 3, S, S], normalised, 0 in the padding. tokens: [B, T]. padding: [B, S, S] bool,
        True where a pixel is padding; None: nowhere.
        Returns an HiVGOutput.
        """
        if self.config.authors_masks:  # their bridges attend to all 77 positions
            tokens = F.pad(tokens, (0, self.clip.config.context_length - tokens.shape[1]))
        text_padding, bridge_padding, patch_padding = self.padding_masks(tokens, padding)
        features, projected = self.text_features(tokens)
        # the layers of V, [B, 1 + N, |V| d_v]; the last layer, [B, 1 + N, d_v]
        visual_levels, x = self.image_features(images, features, projected, bridge_padding)
        z_padding = torch.cat([patch_padding, text_padding], dim=1)
        z_padding = F.pad(z_padding, (2, 0))  # [B, K]; [REG] and [CLS], in front, are no padding
        z = self.grounding_encoder(visual_levels, projected, z_padding)  # [B, K, D]
        end = end_of_text(tokens)
        return HiVGOutput(
            boxes=self.box_head(z[:, 0]).float().sigmoid(),  # from [REG]
            region_logits=self.region_logits(z, end),
            patch_padding=patch_padding,
            image_vectors=F.normalize(self.clip.visual.project(x).float()),
            text_vectors=F.normalize(at(projected, end).float()),
        )

    @torch.no_grad()  # the text tower is frozen and does not see the image
    def text_features(self, tokens):
        """tokens [B, T] -> the f^i of the layers in text_layers, a list of [B, T, d_t], and all
        tokens in CLIP's joint space, [B, T, D]."""
        states = self.clip.text_hidden_states(tokens)  # f^1, f^2, ...
        features = [states[layer - 1] for layer in self.config.text_layers]
        return features, self.clip.project_text(states[-1])

    def image_features(self, images, features, projected, bridge_padding):
        """CLIP's image tower with LoRA inside its self-attention and bridges to the text.

        images [B, 3, S, S]; features, projected: as from `text_features`; bridge_padding [B, T] ->
        the outputs of the layers of V, concatenated, [B, 1 + N, |V| d_v], and that of the last
        layer, [B, 1 + N, d_v].
        """
        mixed = self.config.bridge_text == "projected"
        same_t = self.mixture_proj(projected) if mixed else None
        x = self.clip.visual.embed(images)  # [B, 1 + N, d_v]
        visual_levels = []
        for number, block in enumerate(self.visual_blocks, start=1):
            bridge = t = None
            if self.config.stage >= 0 and number in self.config.bridge_layers:
                bridge = self.bridges[str(number)]
                t = same_t if mixed else bridge.text_context(features)  # [B, T, d_v]
            x = self.maybe_checkpoint(self.bridged_block, x, block, bridge, t, bridge_padding)
            if number in self.config.visual_layers:
                visual_levels.append(x)
        return torch.cat(visual_levels, dim=-1), x

    def grounding_encoder(self, visual_levels, projected, z_padding):
        """The grounding encoder over [REG], [CLS], patches and text tokens.

        visual_levels [B, 1 + N, |V| d_v], projected [B, T, D], z_padding [B, K] -> [B, K, D].
        """
        visual = self.visual_proj(visual_levels)  # [B, 1 + N, D]
        reg = self.reg_token.expand(visual.shape[0], 1, -1)  # [B, 1, D]
        # cat takes the widest dtype, that of reg: z, the residual stream, is float32 under autocast
        z = torch.cat([reg, visual, self.text_proj(projected)], dim=1)  # [B, K, D]
        positions = self.grounding_positions[: z.shape[1]]
        for layer in self.grounding_layers:
            z = self.maybe_checkpoint(layer, z, positions, z_padding)
        return self.grounding_norm(z)

    def region_logits(self, z, end):
        """s_p = u . v_p for every patch p (L_RTCC): z [B, K, D], end [B] -> [B, N].

        u is the output at the end of the text, normalised; v_p an MLP of the output at the patch.
        """
        N = self.grid**2
        u = F.normalize(at(z[:, 2 + N :], end).float())  # [B, D]
        v = self.region_mlp(self.region_norm(z[:, 2 : 2 + N])).float()  # [B, N, D]
        return (v * u[:, None]).sum(dim=-1)

    def enter_stage(self, stage):
        """Enter stage -1 (warm-up without bridges), 0 (warm-up) or j = 1 ... G: add its pairs and
        set what trains:

                                                   stage -1   stage 0   stage j
            CLIP's weights, logit scale               no         no        no
            pairs of HiLoRA                          none       none      k = j; older ones: no
            bridges                                   no         yes       yes
            projections, grounding encoder, heads     yes        yes       yes   (mixture_proj: as bridges)

        Vanilla LoRA has one pair in every layer, which trains in all stages j. A new pair and a new
        bridge change no output. Entering an earlier stage gives the outputs of that stage.
        """
        self.config.stage = stage
        frozen = ("clip.", "bridges.", "mixture_proj.") if stage < 0 else "clip."
        for name, parameter in self.named_parameters():  # pairs lie below clip.: see the next lines
            parameter.requires_grad_(not name.startswith(frozen))
        if self.config.adapters == "vanilla":
            lora.enter_stage(self.visual_blocks, min(stage, 1), groups=1)
        else:  # hilora; none: there are no LoRALinears to enter a stage
            lora.enter_stage(self.visual_blocks, stage, self.config.groups)

    def inputs(self, batch):
        """A batch of data.py on the model's device, as `forward` and `compute_losses` take it.

        "image" uint8 [B, 3, S, S] becomes (x / 255 - mean) / std, 0 in the padding; "padding" bool
        [B, S, S], True where a pixel is padding, comes from "inner" [B, 4].
        """
        device = self.mean.device
        batch = {
            name: value.to(device, non_blocking=True)
            for name, value in batch.items()
            if isinstance(value, torch.Tensor)
        }
        place, size = batch["inner"].split(2, dim=1)  # [B, 2] each
        pixels = torch.arange(self.config.image_size, device=device)  # [S]
        padding = ~inside(torch.cat([place, place + size], dim=1), pixels)  # [B, S, S]
        image = (batch["image"] / 255 - self.mean) / self.std
        image = image.masked_fill(padding[:, None], 0).to(self.mean.dtype)
        return batch | {"image": image, "padding": padding}

    def merge(self):
        """Add all LoRA pairs into the matrices, for inference. Returns the model."""
        lora.merge_lora(self.visual_blocks)
        return self

    def tokenize(self, texts):
        """A str or a list of str -> LongTensor [M, 77], with the model's own vocabulary."""
        self.tokenizer = self.tokenizer or clip_tokenizer()
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

    def compile_blocks(self):
        """Let torch.compile make the blocks of this stage faster: each kind of them is compiled when
        it is first met, once for all layers, and once more, for any length of text, when the second
        length is met. Kinds are text blocks, grounding layers, and image blocks with a bridge or
        none, with pairs of this stage or none; in a warm-up blocks whose input needs no
        gradient are one, too. The names of parameters stay."""
        torch._dynamo.config.cache_size_limit = 64  # kinds of a function, over all stages; else 8
        for linear in lora.lora_modules(self).values():
            if linear.folded is None:  # a LoRALinear without older pairs is no kind of its own
                linear.folded = linear.weight.detach()
        if any(p.requires_grad for p in self.visual_blocks[0].parameters()):  # a pair of this stage
            # The first block's input asks for a gradient, which nobody needs: so it is of the same
            # kind as the others.
            self.clip.visual.ln_pre.register_forward_hook(
                lambda module, inputs, x: x.requires_grad_()
            )
        self.bridged_block = torch.compile(bridged_block)
        for block in (*self.clip.transformer.resblocks, *self.grounding_layers):
            block.compile()

    def padding_masks(self, tokens, padding):
        """Three masks: of text tokens for the grounding encoder, [B, T] bool, of text tokens for the
        bridges (it differs in the authors' checkpoints alone), and of patches, [B, N]. padding:
        [B, S, S] bool, or None.

        Text padding is what comes after the end token (D1). A patch is padding if all of it is
        (D14).
        """
        S, g = self.config.image_size, self.grid
        if padding is None:
            padding = tokens.new_zeros(tokens.shape[0], S, S, dtype=torch.bool)
        if self.config.authors_masks:
            return authors_masks(tokens, padding, g)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        text = positions > end_of_text(tokens)[:, None]  # [B, T]
        patch = padding.view(-1, g, S // g, g, S // g).all(dim=(2, 4)).flatten(1)  # [B, N]
        return text, text, patch


def sincos_grid(side, width):
    """Sines and cosines of row and column, the start of the positions of side x side patches:
    [side^2, width]."""
    frequencies = 10 ** (-torch.arange(width // 4) / (width / 4)) * math.pi  # [width / 4]
    angles = torch.linspace(0, 1, side)[:, None] * frequencies  # [side, width / 4]
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    # row by row, and column by column: [side^2, width - width % 4]
    grid = torch.cat([waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)], dim=1)
    return F.pad(grid, (0, width % 4))


# --------------------------------------------------------------------------------- boxes and losses

LOSS_WEIGHTS = {"l1": 2.0, "giou": 2.0, "clc": 1.0, "focal": 20.0, "dice": 2.0}
# Smallest divisor. Gradients divide by its square, which float32 can still hold.
MIN_AREA = 1e-16


def cxcywh_to_xyxy(boxes):
    """(cx, cy, w, h) -> (x1, y1, x2, y2), [..., 4]."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def box_area(top_left, bottom_right):
    """Corners [..., 2] -> [...]; 0 where x2 < x1 or y2 < y1."""
    width, height = (bottom_right - top_left).clamp(min=0).unbind(dim=-1)
    return width * height


def iou_union_hull(a, b):
    """IoU, and the areas of the union and of the hull, the smallest box around both, pair by pair:
    a, b [..., 4] as x1, y1, x2, y2, of any dtype -> [...] each, in float32 at least."""
    (a1, a2), (b1, b2) = (  # corners [..., 2]: top left, bottom right
        boxes.to(torch.promote_types(boxes.dtype, torch.float32)).split(2, dim=-1)
        for boxes in (a, b)
    )
    intersection = box_area(torch.maximum(a1, b1), torch.minimum(a2, b2))
    union = box_area(a1, a2) + box_area(b1, b2) - intersection
    hull = box_area(torch.minimum(a1, b1), torch.maximum(a2, b2))
    return intersection / union.clamp(min=MIN_AREA), union, hull


def box_iou(a, b):
    """Intersection over union, pair by pair: a, b [..., 4] as x1, y1, x2, y2 -> [...]; 0 where both
    have no area."""
    return iou_union_hull(a, b)[0]


def generalized_box_iou(a, b):
    """GIoU = IoU - (hull - union) / hull (Rezatofighi et al. 2019), pair by pair: a, b [..., 4] as
    x1, y1, x2, y2 -> [...], -1 ... 1. hull: the smallest box around both.

    Finite for boxes without area: their IoU counts as 0, and a hull without area as filled.
    """
    iou, union, hull = iou_union_hull(a, b)
    return iou - (hull - union) / hull.clamp(min=MIN_AREA)


def compute_losses(output, batch, logit_scale):
    """The paper's losses, means over the batch, not weighted yet (LOSS_WEIGHTS), as a dict:

        L_BOX  = l1 + giou       |b - b*|, summed over coordinates (D2);  1 - GIoU(b, b*)
        L_CLC  = clc             contrastive_loss of image vectors and text vectors
        L_RTCC = focal + dice    of the region logits against the patches inside the box

    output: an HiVGOutput; batch: with the true boxes, "box" [B, 4], and a number for each object,
    "object" [B], see contrastive_loss; logit_scale: CLIP's parameter. There is no mask loss (D7).
    """
    boxes = batch["box"]
    giou = generalized_box_iou(cxcywh_to_xyxy(output.boxes), cxcywh_to_xyxy(boxes))  # [B]
    targets = patch_targets(boxes, math.isqrt(output.region_logits.shape[1]))  # [B, N]
    real = (~output.patch_padding).float()  # [B, N], 0 for padding patches
    focal = sigmoid_focal_loss(output.region_logits, targets) * real  # [B, N]
    return {
        "l1": (output.boxes - boxes).abs().sum(dim=1).mean(),
        "giou": (1 - giou).mean(),
        "clc": contrastive_loss(
            output.image_vectors, output.text_vectors, logit_scale.exp(), batch["object"]
        ),
        "focal": (focal.sum(dim=1) / real.sum(dim=1).clamp(min=1)).mean(),
        "dice": dice_loss(output.region_map(), targets * real).mean(),
    }


def patch_targets(boxes, side):
    """boxes [B, 4] -> [B, side^2]: 1 where the centre of a patch lies in the box, else 0."""
    centres = (torch.arange(side, device=boxes.device) + 0.5) / side  # [side]
    return inside(cxcywh_to_xyxy(boxes), centres).flatten(1).float()


def inside(boxes, places):
    """[B, n, n] bool, rows and columns: whether a point of a grid, with the coordinates `places` [n]
    in both directions, lies in a box; boxes [B, 4] as x1, y1, x2, y2."""
    x1, y1, x2, y2 = boxes[:, :, None].unbind(dim=1)  # [B, 1] each
    columns = (x1 <= places) & (places < x2)  # [B, n]
    rows = (y1 <= places) & (places < y2)
    return rows[:, :, None] & columns[:, None, :]


def sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2.0):
    """-alpha_t (1 - p_t)^gamma log p_t (Lin et al. 2017), element by element; targets are 0 or 1.

    p_t is the probability of the target: p = sigmoid(logit) where it is 1, 1 - p where it is 0.
    """
    log_p_t = -F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    alpha_t = alpha * targets + (1 - alpha) * (1 - targets)
    return -alpha_t * (1 - log_p_t.exp()) ** gamma * log_p_t


def dice_loss(p, targets):
    """1 - (2 sum p t + 1) / (sum p + sum t + 1) (Milletari et al. 2016): [B, N], [B, N] -> [B]."""
    intersection = (p * targets).sum(dim=1)
    return 1 - (2 * intersection + 1) / (p.sum(dim=1) + targets.sum(dim=1) + 1)


def contrastive_loss(image, text, scale, objects):
    """CLIP's symmetric cross-entropy of image against text vectors, within one forward pass (D15).

    image, text [B, D], normalised; scale: a factor of the cosines. Expressions of the same object,
    by `objects` [B], mean the same thing and are no negatives of each other. Returns a scalar.
    """
    logits = scale * image @ text.T  # [B, B]
    same = objects[:, None] == objects  # [B, B]
    same.fill_diagonal_(False)
    return symmetric_cross_entropy(logits.masked_fill(same, -torch.inf))


def symmetric_cross_entropy(logits):
    """Mean cross-entropy of rows and of columns of logits [B, B]: i is the right class of row and
    column i, as CLIP was trained."""
    targets = torch.arange(logits.shape[0], device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


# -------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path, model, **more):
    """Write a checkpoint that stands alone: config, weights, pairs and vocabulary; `more` is plain
    data beside it."""
    content = {
        "config": asdict(model.config),
        "model": model.state_dict(),
        "vocabulary": (model.tokenizer or clip_tokenizer()).merges_text,
        **more,
    }
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path, device="cpu"):
    """HiVG from a best.pt or last.pt of train.py or from a checkpoint of HiVG's authors: eval mode,
    LoRA merged, ready for inference.

    Raises HiVGError, naming the file, if it is missing, damaged or something else.
    """
    model, _ = read_checkpoint(path)
    return model.to(device).merge().eval()


def with_fresh_pairs(model, **changes):
    """A copy, in stage 0, of a model, for a new training: its pairs are part of the matrices. changes:
    fields of HiVGConfig that fit its weights (adapters, rank, dropout and the like)."""
    config = replace(model.config, **changes, stage=0)
    fresh = HiVG(config, CLIP(model.clip.config), model.tokenizer)
    fresh.load_state_dict(lora.merged_state_dict(model))
    return fresh


def read_checkpoint(path):
    """(HiVG in the stage in which it was saved, the rest of the file's content).

    Raises HiVGError as `load_checkpoint`.
    """
    what = f"{path} is not an HiVG checkpoint"
    hint = "name a best.pt or last.pt of this version's train.py, or a file of HiVG's authors"
    with user_error(what, hint):
        content = read_weights(path)
        state = content.pop("model")
        check_weights(state)
        of_authors = "vl_pos_embed.weight" in state
        if of_authors:
            args, tokenizer = vars(content["args"]), None
        elif "\n" not in content["vocabulary"]:  # Tokenizer would open a file of that name
            raise ValueError("it has no vocabulary")
        else:
            config, tokenizer = HiVGConfig(**content["config"]), Tokenizer(content["vocabulary"])
    with user_error(what, hint, (*STATE_ERRORS, HiVGError)):
        if of_authors:
            state, config = convert_authors(state, args)
        clip_state = {n.removeprefix("clip."): t for n, t in state.items() if n.startswith("clip.")}
        # the file may hold pairs of later stages than the one in which it was saved
        stages = [int(name.rsplit(".", 1)[1]) for name in state if ".lora_A." in name]
        with torch.device("meta"):  # no memory, no random numbers: the file has all weights
            model = HiVG(config, CLIP(infer_config(clip_state)), tokenizer)
            model.enter_stage(max([config.stage, *stages]))
        model.load_state_dict(state, assign=True)
    model.enter_stage(config.stage)
    return model, content


# ------------------------------------------------------------- the checkpoints of HiVG's authors (R)

AUTHORS_NAMES = (  # patterns of (R)'s names, and ours
    # layers are counted from 0 there
    (
        r"^clip\.visual\.transformer\.resblocks\.(\d+)\.cross_",
        lambda m: f"bridges.{int(m[1]) + 1}.",
    ),
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
    (r"^condition_text_proj\b", "mixture_proj"),
    # not in use
    (r"^(ml_text_feat_perceiver|reg_pos_embed|condition_text_pos_embed|seg_conv\d).*", ""),
)


def convert_authors(weights, args):
    """A checkpoint of (R), of any stage -> (state dict in our names, HiVGConfig).

    weights: its state dict, which is emptied; args: its settings; sizes follow from the shapes. All
    LoRA pairs are merged. What is left over or missing is found by the strict load_state_dict.
    """
    clip_state = {
        name.removeprefix("clip."): weights.pop(name)
        for name in list(weights)
        if name.startswith("clip.")
    }
    clip_state = hugging_face_to_openai(merge_authors_lora(clip_state))
    state = {f"clip.{name}": tensor for name, tensor in clip_state.items()}
    state |= {name: tensor.float() for name, tensor in weights.items()}
    mixed = args["mixup_pretrain"]  # the weights of the other bridge_text are there, but not in use
    unused = r"^bridges\.\d+\.(w|W_proj)\b.*" if mixed else r"^mixture_proj.*"
    state = rename_keys(state, (*AUTHORS_NAMES, (unused, "")))
    clip_config = infer_config(clip_state)
    bridge_layers = {int(name.split(".")[1]) for name in state if name.startswith("bridges.")}
    text_layers = BRIDGE_TEXT_LAYERS.get(args["dataset"], (clip_config.text_layers,))

    # two linear maps with nothing between them become one
    W, b = state.pop("visu_proj.weight"), state.pop("visu_proj.bias")
    state["visual_proj.weight"] = W @ state.pop("ml_visual_projection.weight")
    state["visual_proj.bias"] = W @ state.pop("ml_visual_projection.bias") + b
    state["reg_token"] = state["reg_token"][0]
    for name in list(state):
        if ".in_proj_" in name:  # of nn.MultiheadAttention
            for letter, part in zip("qkv", state.pop(name).chunk(3)):
                state[name.replace("in_proj_", f"{letter}_proj.")] = part
    for layer in () if mixed else bridge_layers:
        w = [state.pop(f"bridges.{layer}.w.{i}.weight", None) for i in range(len(text_layers))]
        if not args["enable_adaptive_weights"]:
            w = [torch.zeros(clip_config.context_length, clip_config.text_width)] * len(text_layers)
        state[f"bridges.{layer}.w"] = torch.stack(w)
    config = HiVGConfig(
        mean=(0.485, 0.456, 0.406),  # ImageNet's
        std=(0.229, 0.224, 0.225),
        visual_layers=default_layers(clip_config.vision_layers, "336" in args["model"])[0],
        bridge_layers=bridge_layers,
        bridge_text="projected" if mixed else "layers",
        text_layers=text_layers,
        grounding_layers=args["vl_enc_layers"],
        heads=args["vl_nheads"],
        feedforward=state["grounding_layers.0.mlp.0.weight"].shape[0],
        region_width=state["region_mlp.0.weight"].shape[0],
        authors_masks=True,
    )
    return state, config


def authors_masks(tokens, padding, grid):
    """The `padding_masks` that (R) trained with: in the grounding encoder every id 0 is padding,
    which hides "!" as well; bridges attend to all 77 positions, padding included (D3); the image's
    mask [B, S, S] is resized to the patches and rounded."""
    shares = padding[:, None].float()  # [B, 1, S, S]
    shares = F.interpolate(shares, (grid, grid), mode="bilinear", antialias=True)
    never = torch.zeros_like(tokens, dtype=torch.bool)
    return tokens == 0, never, shares.round().bool().flatten(1)
