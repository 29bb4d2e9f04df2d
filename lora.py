"""LoRA (Hu et al. 2022) and HiLoRA, hierarchical LoRA (HiVG, section 3.3).

    LoRA:    h = W_0 x + b + (alpha / r) B A x
    HiLoRA:  h = W_0 x + b + sum_{k = g(l)}^{j} (alpha / r) B_k A_k x      in stage j, layer l

LoRA freezes a matrix W_0 [out, in] and trains a low-rank correction: A [r, in] is random and B
[out, r] is zero at the start, so training starts from the outputs of W_0. HiLoRA divides L layers,
numbered from 1, into G groups, shallow to deep. Layer l belongs to group g(l) = ceil(l G / L). It
gets its first pair (A, B) in stage g(l) and one more in every later stage; only the newest pair,
k = j, is trained. Vanilla LoRA is HiLoRA with one group and one stage.

    add_lora(layers, {"attn.in_proj": 3, "attn.out_proj": 1})  # q, k, v: 3 row blocks of one matrix
    for stage in (1, 2, 3):
        parameters = enter_stage(layers, stage, groups=3)       # the pairs that this stage trains
        train(parameters)
    merge_lora(layers)                                          # inference at the cost of W_0 alone

This file needs torch alone and knows no CLIP. It can be copied into another project as it is (MIT).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class LoRALinear(nn.Module):
    """A frozen nn.Linear with low-rank pairs beside it: h = W_0 x + b + sum_k (alpha / r) B_k A_k x.

    `weight` (W_0) and `bias` keep their names in the state dict and are never written.
    blocks: W_0 consists of that many row blocks of equal height (3 for a fused q, k, v); each has
    pairs of its own. Pair k is lora_A[str(k)] [blocks, r, in] and lora_B[str(k)] [blocks, out /
    blocks, r].

    The newest pair in use runs as a branch of its own, with dropout on its input. The older, frozen
    pairs are added into `folded`, a copy of W_0 that the state dict does not contain: they cost no
    time. `merge_lora` adds the newest pair as well.
    """

    def __init__(self, linear, blocks, rank, alpha, dropout):
        super().__init__()
        out_features = len(linear.weight)
        if out_features % blocks:
            raise ValueError(f"{out_features} rows cannot be cut into {blocks} equal blocks")
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        self.blocks, self.rank, self.scale = blocks, rank, alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.pairs = []  # keys of the pairs in use, oldest first
        self.branch = None  # key of the pair that runs as a branch
        self.register_buffer("folded", None, persistent=False)

    def forward(self, x):  # [..., in] -> [..., out]
        weight = self.weight if self.folded is None else self.folded
        h = F.linear(x, weight, self.bias)  # W_0 x + b, with the folded pairs
        if self.branch is not None:
            A, B = self.lora_A[self.branch], self.lora_B[self.branch]
            # b: block; r: rank; i, o: columns and rows of a block
            low = torch.einsum("...i,bri->...br", self.dropout(x), A)  # A x: [..., blocks, r]
            delta = torch.einsum("...br,bor->...bo", low, B)  # B A x: [..., blocks, out / blocks]
            h = h + self.scale * delta.flatten(-2)
        return h

    def add_pair(self, key):
        """Add a pair that changes no output: A is Kaiming uniform with a = sqrt(5), B is zero."""
        out_features, in_features = self.weight.shape
        bound = 1 / math.sqrt(in_features)
        A = self.weight.new_empty(self.blocks, self.rank, in_features).uniform_(-bound, bound)
        B = self.weight.new_zeros(self.blocks, out_features // self.blocks, self.rank)
        self.lora_A[key], self.lora_B[key] = nn.Parameter(A), nn.Parameter(B)

    @torch.no_grad()
    def fold(self, merge=False):
        """Add the older pairs in use (merge: all of them) into a copy of W_0."""
        folded_pairs = self.pairs if merge else self.pairs[:-1]
        self.branch = self.pairs[-1] if self.pairs and not merge else None
        self.folded = None
        if folded_pairs:
            self.folded = self.weight + sum(self.delta_weight(key) for key in folded_pairs)

    def delta_weight(self, key):
        """(alpha / r) B_k A_k as one matrix [out, in]."""
        return self.scale * (self.lora_B[key] @ self.lora_A[key]).flatten(0, 1)


def pair_indices(layer, depth, groups, stage):
    """The pairs k = g(l) ... j that layer l of L = depth uses in stage j; g(l) = ceil(l G / L).

    A pair has the number of the stage that adds it. With 12 layers and 3 groups, layers 1-4 use
    pairs 1, 2, 3 in stage 3, layers 5-8 use 2, 3, and layers 9-12 use 3; in stage 1 only layers 1-4
    use a pair.
    """
    first_stage = -(-layer * groups // depth)  # ceil(l G / L) in whole numbers
    return range(first_stage, stage + 1)


def add_lora(layers, targets, rank=32, alpha=16, dropout=0.1):
    """Replace the target Linears of every layer by LoRALinears without pairs; no output changes.

    layers: a list of nn.Modules, shallow to deep. targets: {name of an nn.Linear inside a layer:
    number of its row blocks}. Only the targets are frozen; freezing the rest is up to the caller.
    Raises ValueError if a name is not that of an nn.Linear.
    """
    for layer in layers:
        modules = dict(layer.named_modules())
        for name, blocks in targets.items():
            if not isinstance(modules.get(name), nn.Linear):
                linears = [n for n, module in modules.items() if isinstance(module, nn.Linear)]
                raise ValueError(f"{name!r} is not a Linear of the layer; it has {linears}")
            parent, _, child = name.rpartition(".")
            adapted = LoRALinear(modules[name], blocks, rank, alpha, dropout)
            setattr(modules[parent], child, adapted)


def enter_stage(layers, stage, groups):
    """Make stage j = `stage` the current one and return its trainable parameters, pairs k = j.

    Pairs that do not exist yet are added with B = 0, so that entering the next stage changes no
    output (folding rounds). Pairs of later stages stay stored, but are not in use: entering an earlier stage gives
    the outputs of that stage. In stage 0 no layer uses a pair.
    """
    trainable = []
    for number, layer in enumerate(layers, start=1):
        pairs = [str(k) for k in pair_indices(number, len(layers), groups, stage)]
        for module in lora_modules(layer):
            for key in pairs:
                if key not in module.lora_A:
                    module.add_pair(key)
            module.pairs = pairs
            module.fold()
            module.requires_grad_(False)
            if pairs:
                trainable += [module.lora_A[pairs[-1]], module.lora_B[pairs[-1]]]
    for parameter in trainable:
        parameter.requires_grad_(True)
    return trainable


def merge_lora(layers):
    """Add all pairs in use into the matrices, W = W_0 + sum_k (alpha / r) B_k A_k, for inference."""
    for layer in layers:
        for module in lora_modules(layer):
            module.fold(merge=True)


def unmerge_lora(layers):
    """Undo `merge_lora` exactly: W_0 was never written, and all pairs are still there."""
    for layer in layers:
        for module in lora_modules(layer):
            module.fold()


def lora_modules(layer):
    """The LoRALinears of a layer."""
    return [module for module in layer.modules() if isinstance(module, LoRALinear)]


def merged_state_dict(module):
    """The state dict that `module` would have without LoRA: W = W_0 + sum_k (alpha / r) B_k A_k for
    the pairs in use, and no pairs."""
    state = {name: tensor for name, tensor in module.state_dict().items() if "lora_" not in name}
    for name, child in module.named_modules():
        if isinstance(child, LoRALinear):
            pairs = sum(child.delta_weight(key) for key in child.pairs)
            state[f"{name}.weight"] = child.weight.detach() + pairs
    return state


def lora_state_dict(module):
    """The pairs alone: every lora_A and lora_B below `module`, by their names in its state dict.

    To load them: add_lora, enter_stage, load_state_dict(pairs, strict=False), and enter_stage once
    more, which folds the pairs that were read.
    """
    return {name: tensor for name, tensor in module.state_dict().items() if "lora_" in name}
