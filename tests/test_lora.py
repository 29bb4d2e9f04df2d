"""lora.py: the formula of pairs, parity with PEFT, what a stage changes and what it must not."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import close, shake_pairs
from torch import nn
from torch.nn.utils import parametrizations, prune

import lora
from clip_model import Attention, Block, attention

TARGETS = {"attn.in_proj": 3, "attn.out_proj": 1}


def plain(depth=6):
    """Layers of float64 in eval mode, without pairs."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(12, heads=4) for _ in range(depth))).double().eval()


def tower(stage=0, depth=6, dropout=0.0):
    """Adapted layers whose pairs of all stages up to `stage` are there and not zero."""
    layers = plain(depth)
    lora.add_lora(layers, TARGETS, 4, 8, dropout)
    for number in range(1, stage + 1):
        lora.enter_stage(layers, number, groups=3)
        shake_pairs(layers)
    return layers


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(4, 5, 12, dtype=torch.float64)


# ---------------------------------------------------------------------------------- formula, parity


@pytest.mark.parametrize("depth, groups", [(12, 3), (24, 3), (7, 3), (3, 3), (12, 1)])
def test_each_layer_has_the_pairs_of_the_formula(depth, groups):
    """A layer has a pair for every stage from g(l) on, for depths not divisible by G too."""
    layers = tower(0, depth)
    for stage in range(groups + 1):
        lora.enter_stage(layers, stage, groups)
        for number, layer in enumerate(layers, start=1):
            # adapted in stage k if l <= k L / G, a real number; every such stage adds one pair
            expected = [k for k in range(1, stage + 1) if number * groups <= k * depth]
            assert [int(key) for key in layer.attn.in_proj.lora_A] == expected, (number, stage)


def test_attention_equals_golden(shared):
    """q, k, v in one matrix are adapted as three: attention, unmerged and merged, gives PEFT's
    stored numbers."""
    golden = torch.load(shared / "golden/lora_peft_golden.pt", weights_only=True)
    rank, alpha, golden = golden["r"], golden["lora_alpha"], golden["mha"]
    layer = Attention(golden["embed_dim"], golden["num_heads"]).eval()
    layer.load_state_dict({name: golden[name.replace(".", "_")] for name in layer.state_dict()})
    lora.add_lora([layer], {"in_proj": 3, "out_proj": 1}, rank, alpha)
    pairs = lora.enter_stage([layer], 1, groups=1)
    x, mask = golden["input"], ~golden["key_padding_mask"][:, None, None, :]  # True = attend

    def output():
        q, k, v = layer.in_proj(x).chunk(3, dim=-1)
        return layer.out_proj(attention(q, k, v, layer.heads, mask))

    close(output(), golden["output_base"])
    for pair, letter, names in zip(pairs, "ABAB", ("qkv", "qkv", ["out"], ["out"])):
        pair.data = torch.stack([golden[f"{name}_lora_{letter}"] for name in names])
    close(output(), golden["output"])
    lora.merge_lora([layer])
    close(output(), golden["output_merged"])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 1e-5)])
def test_training_equals_peft(dtype, tolerance):
    """Pairs on a fused matrix give the outputs of PEFT's on its row blocks, and steps of 1e-5 move
    them as PEFT's: with a host in bfloat16, too, whose own numbers such steps would not change."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    parts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3)).to(dtype)
    layer = nn.ModuleDict({"qkv": nn.Linear(12, 36)}).to(dtype)
    for kind, parameter in layer["qkv"].named_parameters():
        parameter.data = torch.cat([getattr(part, kind) for part in parts]).data
    lora.add_lora([layer], {"qkv": 3}, rank=4, alpha=8, dropout=0.0)
    ours = lora.enter_stage([layer], 1, groups=1)
    peft.get_peft_model(parts, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "1", "2"]))
    theirs = [parameter for parameter in parts.parameters() if parameter.requires_grad]
    pairs = list(zip([p.data[block] for block in range(3) for p in ours], theirs))
    for our, their in pairs:  # A, B, A, B, A, B
        our.normal_(std=0.2)
        their.data = our.to(their.dtype, copy=True)
    start, x = ours[0].detach().clone(), torch.randn(7, 5, 12, dtype=dtype)
    direction = torch.randn(36, dtype=dtype)
    optimizer = torch.optim.AdamW([*ours, *theirs], lr=1e-5)
    for _ in range(4):
        optimizer.zero_grad()
        outputs = layer["qkv"](x), torch.cat([part(x) for part in parts], dim=-1)
        close(*outputs, tolerance)
        (sum(outputs) @ direction).sum().backward()
        optimizer.step()
    for our, their in pairs:
        close(our, their.data.to(our.dtype), 1e-6)
    assert ((ours[0] - start).abs() > 1e-5).all()


# -------------------------------------------------------------------------------------------- stages


def test_a_stage_begins_where_the_one_before_ended(x):
    """Entering the next stage changes no output: the new B, and it alone, is zero; no A is. Entering
    an earlier one gives its outputs, merged as unmerged, and changes neither W_0 nor any pair."""
    layers = tower()
    outputs = [layers(x)]
    for stage in (1, 2, 3):
        lora.enter_stage(layers, stage, groups=3)
        close(layers(x), outputs[-1])
        for name, parameter in layers.named_parameters():
            if "lora_B" in name:
                assert (parameter == 0).all() == name.endswith(f".{stage}"), name
            if "lora_A" in name:  # Kaiming uniform with a = sqrt(5): up to 1 / sqrt(12)
                assert 0.25 < parameter.abs().max() <= 12**-0.5, name
        shake_pairs(layers)
        outputs.append(layers(x))
        assert (outputs[-1] - outputs[-2]).abs().max() > 0.1
    state = copy.deepcopy(layers.state_dict())
    for stage in (1, 3, 0, 2, 3):
        lora.merge_lora(layers)
        lora.enter_stage(layers, stage, groups=3)
        unmerged = layers(x)
        close(unmerged, outputs[stage], 1e-12)
        lora.merge_lora(layers)
        close(layers(x), unmerged, 1e-12)
        lora.unmerge_lora(layers)
        assert torch.equal(layers(x), unmerged)
    close(layers.state_dict(), state, 0)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_stage_trains_its_newest_pairs_alone(x, stage):
    """Exactly the pairs k = j have gradients, also if they were merged in between."""
    layers = tower(stage - 1)
    trainable = lora.enter_stage(layers, stage, groups=3)
    lora.merge_lora(layers)
    assert not any(p.requires_grad for p in layers[0].attn.parameters())
    lora.unmerge_lora(layers)
    layers(x).sum().backward()
    attention = {name: p for name, p in layers.named_parameters() if "attn" in name}
    newest = {p for name, p in attention.items() if re.search(rf"lora_.\.{stage}$", name)}
    found = {p for p in attention.values() if p.grad is not None}
    assert found == newest == set(trainable) and len(newest) == 4 * (2 * stage)


def test_dropout_is_on_the_newest_pair_in_training_alone(x):
    """Dropout thins the input of the branch that trains: not in eval mode, not of older pairs."""
    layers, without = tower(2, dropout=0.5), tower(2)
    assert torch.equal(layers(x), without(x))
    layers.train()
    assert (layers(x) - without(x)).abs().max() > 0.1
    lora.enter_stage(layers, 3, groups=3)  # its new pairs are still zero
    close(layers(x), without(x))


def test_an_adapted_linear_stands_for_the_plain_one():
    """It has the sizes that it had and, in training or not, the mode of its host."""
    layers = plain().train()
    lora.add_lora(layers, TARGETS)
    assert all(module.training for module in layers.modules())
    assert not any(module.training for module in tower(3).modules())
    linear = layers[0].attn.in_proj
    assert (linear.in_features, linear.out_features) == (12, 36)


# --------------------------------------------------------------------------------------- state dicts


@pytest.mark.parametrize("merged, options", [(False, {}), (True, {}), (False, {"assign": True})])
def test_loading_a_state_dict_folds_anew(x, merged, options):
    """The outputs are those of the weights that were loaded, in stage 3 and while merged."""
    layers, other = tower(3), tower(3)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    lora.merge_lora(other, merged)
    other.load_state_dict(layers.state_dict(), **options)
    close(other(x), layers(x), 1e-12)


def test_state_dicts_without_pairs_and_of_pairs(x):
    """The merged state dict can be copied and is that of plain layers with the same outputs, the
    pairs alone restore another tower: both hold a layer under all of its names, and what the host
    itself calls lora_ is none of the pairs."""

    def host(layers):
        root = nn.ModuleDict({"layers": layers, "again": layers})
        root.register_buffer("lora_of_the_host", torch.ones(1))
        return root

    layers, others = tower(2), (plain(), tower())
    pairs = lora.lora_state_dict(host(layers))
    # in layers 1 to 6 under two names, in two matrices each, A and B
    assert len(pairs) == (2 + 2 + 1 + 1) * 2 * 2 * 2
    lora.enter_stage(others[1], 2, groups=3)
    assert not host(others[1]).load_state_dict(pairs, strict=False).unexpected_keys
    host(others[0]).load_state_dict(copy.deepcopy(lora.merged_state_dict(host(layers))))
    for other in others:
        close(other(x), layers(x), 1e-12)


def test_merging_under_autocast_rounds_nothing():
    """Matrices are merged and folded in their own precision."""
    layers = tower(3).float()
    state = lora.merged_state_dict(layers)
    with torch.autocast("cpu", torch.bfloat16):
        lora.merge_lora(layers)
    assert torch.equal(layers[0].attn.in_proj.folded, state["0.attn.in_proj.weight"])


def test_a_wrapper_may_compute_in_another_dtype(x):
    """FSDP's mixed precision casts parameters for the time of the forward pass, but no buffers."""
    layers = tower(3).float()
    expected = layers(x.float())
    for parameter in layers.parameters():
        parameter.data = parameter.data.bfloat16()
    close(layers(x.bfloat16()).float(), expected, 0.2)  # of values up to 9


# ------------------------------------------------------------------------------------------- targets


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def quantise(module):
    module.weight = nn.Parameter(torch.ones(12, 12, dtype=torch.int8), requires_grad=False)


def adapt(module):
    lora.add_lora([layer := nn.ModuleDict({"part": module})], {"part": 1})
    return layer["part"]


UNSUITABLE = [  # what a Linear is made, the target below it, what the message says
    (lambda linear: Doubled(12, 12), "", "Doubled"),
    (lambda linear: nn.Conv1d(12, 12, 1), "", "Conv1d"),
    (nn.utils.weight_norm, "", "computed"),
    (parametrizations.weight_norm, "", "Parametrized"),
    (nn.utils.spectral_norm, "", "computed"),
    (parametrizations.spectral_norm, "", "Parametrized"),
    (lambda linear: prune.l1_unstructured(linear, "weight", 0.5), "", "computed"),
    (quantise, "", "quantised"),
    (lambda linear: nn.MultiheadAttention(12, 3), ".out_proj", "NonDynamically"),
    (lambda linear: nn.TransformerEncoderLayer(12, 3, 12), ".linear1", "EncoderLayer"),
    (lambda linear: linear.register_forward_hook(print), "", "hooks"),
    (lambda linear: linear.register_forward_pre_hook(print), "", "hooks"),
    (lambda linear: linear.register_full_backward_hook(print), "", "hooks"),
    (adapt, "", "LoRALinear"),
    (lambda linear: nn.Linear(12, 13), "", "13 rows"),
    (lambda linear: linear, ".q_proj", "no such module.*'good', 'part'"),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm", "ignore:.*spectral_norm")
@pytest.mark.parametrize("change, name, says", UNSUITABLE)
def test_an_unsuitable_target_is_refused_before_anything_is_changed(change, name, says):
    """What a LoRALinear cannot stand for is named, with the reason, and no layer is adapted."""
    part = nn.Linear(12, 12)
    changed = change(part)
    if isinstance(changed, nn.Module):
        part = changed
    layers = [nn.ModuleDict({"good": nn.Linear(12, 12), "part": part}) for _ in range(2)]
    if not name:  # refused in the second layer alone
        layers[0]["part"] = nn.Linear(12, 12)
    with pytest.raises(ValueError, match=f"'part{name}' cannot be adapted: .*{says}"):
        lora.add_lora(layers, {"good": 1, f"part{name}": 1 + ("rows" in says)})
    assert type(layers[0]["good"]) is nn.Linear and layers[0]["good"].weight.requires_grad


def test_a_layer_that_is_the_target_is_refused():
    """A Linear in the list of layers has no parent in which it could be replaced."""
    with pytest.raises(ValueError, match="the layer itself"):
        lora.add_lora([nn.Linear(12, 12)], {"": 1})


def test_lora_is_one_file_that_depends_on_torch_alone():
    """lora.py can be copied into another project: of other packages it imports only torch."""
    source = Path(lora.__file__).read_text()
    names = re.findall(r"^\s*(?:from|import) (\w+)", source, re.M)
    assert {*names} - sys.stdlib_module_names == {"torch"}
