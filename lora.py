"""LoRA (Hu et al. 2022) and HiLoRA, hierarchical LoRA (HiVG, section 3.3).

    LoRA:    h = W_0 x + b + (alpha / r) B A x
    HiLoRA:  h = W_0 x + b + sum_{k = g(l)}^{j} (alpha / r) B_k A_k x      in stage j, layer l

LoRA freezes a matrix W_0 [out, in] and trains a low-rank correction: A [r, in] is random and B
[out, r] is zero at the start, so training starts from the outputs of W_0. HiLoRA divides L layers,
numbered from 1, into G groups, shallow to deep. Layer l belongs to group g(l) = ceil(l G / L). It
gets its first pair (A, B) in stage g(l) and one more in every later stage; only the newest pair,
k = j, is trained. Vanilla LoRA is HiLoRA with one group and one stage.

    model.requires_grad_(False)                                 # add_lora freezes its targets alone
    add_lora(layers, {"attn.in_proj": 3, "attn.out_proj": 1})   # q, k, v: 3 row blocks of one matrix
    for stage in (1, 2, 3):
        parameters = enter_stage(layers, stage, groups=3)       # the pairs that this stage trains
        optimizer = torch.optim.AdamW(parameters)               # made anew, as pairs are added, and
        parallel = DistributedDataParallel(model)               # so is what wraps the model (FSDP, too)
        train(parallel, optimizer)
    merge_lora(layers)                                          # inference at the cost of W_0 alone

A host that reads a Linear's `.weight` and never calls the Linear gets nothing from its pairs, and
nothing here can see that: look, after the first backward pass, for a pair whose .grad is None.

This file needs torch alone and knows no CLIP. It can be copied into another project as it is (MIT).
"""

import torch
import torch.nn.functional as F
from torch import nn


class LoRALinear(nn.Module):
    """A frozen nn.Linear with low-rank pairs beside it: h = W_0 x + b + sum_k (alpha / r) B_k A_k x.

    `weight` (W_0) and `bias` keep their names in the state dict and are never written.
    blocks: W_0 consists of that many row blocks of equal height (3 for a fused q, k, v); each has
    pairs of its own. Pair k is lora_A[str(k)] [blocks, r, in] and lora_B[str(k)] [blocks, out /
    blocks, r], in float32 where W_0 has half precision: small steps would be rounded away there.

    The newest pair in use runs as a branch of its own, with dropout on its input. The older, frozen
    pairs are added into `folded`, a copy of W_0 that the state dict does not contain: they cost no
    time, but the memory of another W_0. `merge_lora` adds the newest pair as well. Loading a state
    dict folds anew.
    """

    def __init__(self, linear, blocks, rank, alpha, dropout):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        self.blocks, self.rank, self.scale = blocks, rank, alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.pairs = []  # keys of the pairs in use, oldest first
        self.newest = None  # the last of them, unless it is folded, too
        self.register_buffer("folded", None, persistent=False)
        self.register_load_state_dict_post_hook(LoRALinear.fold)

    def forward(self, x):  # [..., in] -> [..., out]
        weight = self.weight
        if self.folded is not None:  # FSDP's mixed precision casts parameters, but no buffers
            weight = self.folded.to(weight.dtype)
        h = F.linear(x, weight, self.bias)  # W_0 x + b, with the folded pairs
        if self.newest:
            A, B = self.lora_A[self.newest], self.lora_B[self.newest]
            low = F.linear(self.dropout(x).to(A.dtype), A.flatten(0, 1))  # A x: [..., blocks * r]
            low = low.unflatten(-1, A.shape[:2])  # [..., blocks, r]
            # b: block; o: rows of a block; r: rank
            delta = torch.einsum("...br,bor->...bo", low, B)  # B A x: [..., blocks, out / blocks]
            h = h.add(delta.flatten(-2), alpha=self.scale).to(h.dtype)
        return h

    def add_pair(self, key):
        """Add a pair that changes no output: A is Kaiming uniform with a = sqrt(5), B is zero."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        rows, bound = self.out_features // self.blocks, self.in_features**-0.5
        A = self.weight.new_empty(self.blocks, self.rank, self.in_features, dtype=dtype)
        self.lora_A[key] = A.uniform_(-bound, bound)  # becomes a Parameter in the ParameterDict
        self.lora_B[key] = self.weight.new_zeros(self.blocks, rows, self.rank, dtype=dtype)

    def use(self, pairs, merged=False):
        """Let the pairs with these keys act, and the newest of them train if it is not merged."""
        self.pairs = pairs
        self.newest = pairs[-1] if pairs and not merged else None
        self.requires_grad_(False)
        if self.newest:
            self.lora_A[self.newest].requires_grad_()
            self.lora_B[self.newest].requires_grad_()
        self.fold()

    def fold(self, *_):
        """Add the pairs in use that do not run as a branch into a copy of W_0. load_state_dict calls
        it, too, when it has written the weights."""
        pairs = [key for key in self.pairs if key != self.newest]
        self.folded = self.weight_with(pairs) if pairs else None

    @torch.no_grad()
    def weight_with(self, pairs):
        """W_0 + sum_k (alpha / r) B_k A_k over the keys `pairs`, [out, in]."""
        W = self.weight.clone().unflatten(0, (self.blocks, -1))  # [blocks, out / blocks, in]
        for key in pairs:
            A, B = self.lora_A[key], self.lora_B[key]
            # in place: autocast would run baddbmm, but not baddbmm_, in half precision
            W = W.to(A.dtype).baddbmm_(B, A, alpha=self.scale)
        return W.flatten(0, 1).to(self.weight.dtype)


def add_lora(layers, targets, rank=32, alpha=16, dropout=0.1):
    """Replace the target Linears of every layer by LoRALinears without pairs; no output changes.

    layers: a list of nn.Modules, shallow to deep. targets: {name of an nn.Linear inside a layer:
    number of its row blocks}. Only the targets are frozen; freezing the rest is up to the caller.
    Raises ValueError, before anything is changed, for a target that LoRALinear cannot stand for.
    """
    for layer in layers:
        for name, blocks in targets.items():
            if reason := why_not(layer, name, blocks):
                linears = [n for n, module in layer.named_modules() if type(module) is nn.Linear]
                raise ValueError(f"{name!r} cannot be adapted: {reason}; Linears: {linears}")
    linears = {layer.get_submodule(name) for layer in layers for name in targets}
    if len(linears) < len(layers) * len(targets):
        raise ValueError("a Linear is the target of two layers or names, pairs belong to one")
    for layer in layers:
        for name, blocks in targets.items():
            linear = layer.get_submodule(name)
            adapted = LoRALinear(linear, blocks, rank, alpha, dropout).train(linear.training)
            layer.set_submodule(name, adapted)


def why_not(layer, name, blocks):
    """Why a LoRALinear cannot stand for the module `name` of a layer; None if it can."""
    modules = dict(layer.named_modules(remove_duplicate=False))
    module = modules.get(name)
    if module is None:
        return "there is no such module"
    if type(module) is not nn.Linear:  # a subclass may do more than W x + b
        return f"it is a {type(module).__name__}, not a plain nn.Linear"
    if module is layer:
        return "it is the layer itself, put the layer into another module"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed (weight_norm, spectral_norm, pruning)"
    if not module.weight.is_floating_point():
        return "its weight is quantised"
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_hooks
    if any(hooks) or module._backward_pre_hooks or "forward" in vars(module):
        return "it has hooks, which would be lost"
    if isinstance(modules[name.rpartition(".")[0]], nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer reads weights without calling their Linear"
    if module.out_features % blocks:
        return f"{module.out_features} rows cannot be cut into {blocks} equal blocks"


def enter_stage(layers, stage, groups):
    """Make stage j = `stage` the current one and return its trainable parameters, pairs k = j.

    Layer l of L uses the pairs k = g(l) ... j, each with the number of the stage that adds it. With
    12 layers and 3 groups, layers 1-4 use pairs 1, 2, 3 in stage 3, layers 5-8 use 2, 3, and layers
    9-12 use 3; in stage 1 only layers 1-4 use a pair, in stage 0 none does.

    Pairs that do not exist yet are added with B = 0, so that entering the next stage changes no
    output, up to rounding. Pairs of later stages stay stored, but are not in use: entering an
    earlier stage gives the outputs of that stage.
    """
    trainable = []
    for number, layer in enumerate(layers, start=1):
        first_stage = -(-number * groups // len(layers))  # g(l) = ceil(l G / L) in whole numbers
        pairs = [str(k) for k in range(first_stage, stage + 1)]
        for module in lora_modules(layer).values():
            for key in pairs:
                if key not in module.lora_A:
                    module.add_pair(key)
            module.use(pairs)
            trainable += [p for p in module.parameters() if p.requires_grad]
    return trainable


def merge_lora(layers, merged=True):
    """Add all pairs in use into the matrices, W = W_0 + sum_k (alpha / r) B_k A_k, for inference.
    The newest pairs do not train while they are merged."""
    for layer in layers:
        for module in lora_modules(layer).values():
            module.use(module.pairs, merged)


def unmerge_lora(layers):
    """Undo `merge_lora` exactly: W_0 was never written, and all pairs are still there."""
    merge_lora(layers, merged=False)


def lora_modules(module):
    """The LoRALinears below a module, by the prefix of their names in its state dict."""
    return {
        f"{name}." if name else "": child
        for name, child in module.named_modules(remove_duplicate=False)
        if isinstance(child, LoRALinear)
    }


def merged_state_dict(module):
    """The state dict that `module` would have without LoRA: W = W_0 + sum_k (alpha / r) B_k A_k for
    the pairs in use, and no pairs."""
    state = module.state_dict()
    for name in lora_state_dict(module):
        del state[name]
    for prefix, child in lora_modules(module).items():
        state[f"{prefix}weight"] = child.weight_with(child.pairs)
    return state


def lora_state_dict(module):
    """The pairs alone: every lora_A and lora_B below `module`, by their names in its state dict.

    To load them: add_lora, enter_stage, load_state_dict(pairs, strict=False).
    """
    return {
        prefix + name: tensor
        for prefix, child in lora_modules(module).items()
        for name, tensor in child.state_dict().items()
        if name.startswith("lora_")
    }
