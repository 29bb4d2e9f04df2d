"""LoRA and HiLoRA (Hu et al. 2022; the poster's section on hierarchical low-rank adaptation).

    LoRA:    h = W_0 x + b + (alpha / r) B A x          A random, B zero at the start
    HiLoRA:  h = W_0 x + b + sum_{k = g(l)}^{j} (alpha / r) B_k A_k x

in stage j, for the layers l <= j L / G of L, numbered from 1, in G groups; g(l) = ceil(l G / L): a
layer gets its first pair in stage g(l) and one more in every later stage. Only the newest pair, k =
j, is trained. Vanilla LoRA is HiLoRA with one group and one stage.

    attach(layers, {"attn.in_proj": 3, "attn.out_proj": 1})  # q, k, v are 3 blocks of one matrix
    for stage in (1, 2, 3):
        enter_stage(layers, stage, groups=3)                 # new pairs; older ones are folded
        train(...)
    merge(layers)                                            # for inference

Reading order: pairs_held (the formula), LoRALinear (one adapted matrix; Dropout is for speed), then
the functions over a tower of layers. This file knows no CLIP, needs torch alone and can be copied
into another project as it is.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def pairs_held(layer, layers, groups, stage):
    """Numbers k of the pairs that layer `layer` (from 1) of `layers` holds in `stage`: g(l) ... j,
    maybe none."""
    first = -(-layer * groups // layers)  # g(l) = ceil(l G / L), in whole numbers
    return range(first, stage + 1)


class Dropout(nn.Dropout):
    """nn.Dropout, faster on a CPU, where one random number for each element costs more than the
    matrix products around it: here four are cut from each draw of 64 bits."""

    def forward(self, x):
        if not (self.training and self.p) or x.device.type != "cpu":
            return super().forward(x)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        draws = draws.view(torch.int16)[: x.numel()].view(x.shape)  # -2^15 ... 2^15 - 1
        kept = torch.ge(draws, round(self.p * 2**16) - 2**15, out=torch.empty_like(x))  # 0 or 1
        return x * kept.div_(1 - self.p)


class LoRALinear(nn.Module):
    """A frozen nn.Linear with low-rank pairs beside it. weight and bias keep their names and are
    never written.

    blocks: the matrix is that many row blocks of equal height (3 for a fused q, k, v), each with
    pairs of its own. Pair k is lora_A[k] [blocks, r, in] and lora_B[k] [blocks, out / blocks, r].
    Pairs in `live` run as a low-rank branch with dropout on its input; the others are folded:
    `folded` = W_0 + sum of them, a copy that is not saved.
    """

    def __init__(self, linear, blocks, rank, alpha, dropout):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        if len(self.weight) % blocks:
            raise ValueError(f"{len(self.weight)} rows cannot be cut into {blocks} equal blocks")
        self.requires_grad_(False)
        self.blocks, self.rank, self.scale = blocks, rank, alpha / rank
        self.dropout = Dropout(dropout)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.live = []
        self.register_buffer("folded", None, persistent=False)

    def add_pair(self, key):
        """A Kaiming uniform (a = sqrt 5), B zero: the output stays what it was."""
        rows, columns = self.weight.shape
        bound = 1 / math.sqrt(columns)  # Kaiming uniform with a = sqrt(5)
        a = self.weight.new_empty(self.blocks, self.rank, columns).uniform_(-bound, bound)
        b = a.new_zeros(self.blocks, rows // self.blocks, self.rank)
        self.lora_A[key], self.lora_B[key] = nn.Parameter(a), nn.Parameter(b)

    @torch.no_grad()
    def fold(self, live):
        """Let the pairs `live` run as branches and fold all others into a copy of the matrix."""
        self.live = [key for key in self.lora_A if key in live]
        deltas = [self.delta(key) for key in self.lora_A if key not in live]
        self.folded = self.weight + sum(deltas) if deltas else None

    def delta(self, key):
        """(alpha / r) B_k A_k as one matrix [out, in]."""
        return self.scale * (self.lora_B[key] @ self.lora_A[key]).flatten(0, 1)

    def forward(self, x):  # [..., in] -> [..., out]
        h = F.linear(x, self.weight if self.folded is None else self.folded, self.bias)
        for key in self.live:
            a = self.lora_A[key].flatten(0, 1)  # [blocks r, in]
            b = torch.block_diag(*self.lora_B[key])  # [out, blocks r], zero between the blocks
            low = F.linear(self.dropout(x), a)  # [..., blocks r]
            # h + scale b low in one go: no other tensor as large as h
            low, rows = low.flatten(0, -2), h.flatten(0, -2)
            h = torch.addmm(rows, low, b.T, alpha=self.scale).view(h.shape)
        return h


def attach(layers, targets, rank=32, alpha=16, dropout=0.1):
    """Replace the targets in every layer by LoRALinears without pairs: outputs stay what they were.

    layers: nn.Modules, shallow to deep. targets: {name of an nn.Linear in a layer: number of its
    row blocks}. Raises ValueError if a name matches no nn.Linear.
    """
    for layer in layers:
        modules = dict(layer.named_modules())
        for name, blocks in targets.items():
            if not isinstance(modules.get(name), nn.Linear):
                linears = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
                raise ValueError(f"{name!r} is no Linear of the layer; it has {', '.join(linears)}")
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, LoRALinear(modules[name], blocks, rank, alpha, dropout))


def adapted(layer):
    """The LoRALinears of a layer."""
    return [module for module in layer.modules() if isinstance(module, LoRALinear)]


def enter_stage(layers, stage, groups):
    """Make stage j = `stage` of HiLoRA the current one and return its trainable parameters, those
    of pairs k = j.

    Missing pairs are added with B zero, so entering a stage changes no output; older pairs are
    frozen and folded. Layers deeper than j L / G get none. Stage 0 has no pairs.
    """
    trainable = []
    for number, layer in enumerate(layers, start=1):
        keys = [str(k) for k in pairs_held(number, len(layers), groups, stage)]
        for module in adapted(layer):
            for key in keys:
                if key not in module.lora_A:
                    module.add_pair(key)
            module.requires_grad_(False)
            module.fold(live=keys[-1:])
            trainable += [pair[key] for key in keys[-1:] for pair in (module.lora_A, module.lora_B)]
    for parameter in trainable:
        parameter.requires_grad_(True)
    return trainable


def merge(layers):
    """Fold every pair into the matrices, W = W_0 + sum of all pairs: no branch is left. Pairs are
    kept."""
    for layer in layers:
        for module in adapted(layer):
            module.fold(live=())


def unmerge(layers):
    """Undo merge exactly, as W_0 was never written: the newest pairs are branches again."""
    for layer in layers:
        for module in adapted(layer):
            module.fold(live=list(module.lora_A)[-1:])


def lora_state_dict(module):
    """The pairs alone: every lora_A and lora_B below `module`, by their names in its state dict."""
    return {name: t for name, t in module.state_dict().items() if ".lora_" in name}
