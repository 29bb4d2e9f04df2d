"""lora.py: the formula of pairs, parity with PEFT, what a stage changes and what it must not."""

import ast
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import nn

import lora
from clip_model import Attention

TARGETS = {"qkv": 3, "out": 1}


class Layer(nn.Module):
    """A fused matrix of three row blocks and a plain one: lora.py must not need to know CLIP."""

    def __init__(self, width=12):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        return x + self.out(self.qkv(x).tanh())


def tower(depth=6, **settings):
    """Adapted layers, pairs still to come."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(Layer() for _ in range(depth)))
    lora.attach(layers, TARGETS, **{"rank": 4, "alpha": 8, "dropout": 0.0} | settings)
    return layers.eval()


def shake(layers):
    """Newest B matrices that are not zero, as training would leave them."""
    for name, parameter in layers.named_parameters():
        if "lora_B" in name and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)


def pair_keys(layer):
    return [int(key) for key in layer.qkv.lora_A]


# ------------------------------------------------------------------------------------------- formula


@pytest.mark.parametrize(
    "depth, groups", [(12, 3), (24, 3), (7, 3), (10, 3), (3, 3), (12, 1), (10, 4)]
)
def test_number_of_pairs(depth, groups):
    """Each layer holds, in each stage, the pairs of the formula, for depths not divisible by G too."""
    layers = tower(depth, rank=1)
    for stage in range(groups + 1):
        lora.enter_stage(layers, stage, groups)
        for number, layer in enumerate(layers, start=1):
            # adapted in stage k if l <= k L / G, a real number; every such stage adds one pair
            expected = [k for k in range(1, stage + 1) if number <= Fraction(k * depth, groups)]
            assert pair_keys(layer) == expected, (number, stage)
            assert list(lora.pairs_held(number, depth, groups, stage)) == expected


def test_number_of_pairs_of_the_poster():
    """With L = 12: layers 1-4 hold 1, 2, 3 pairs; layers 5-8 hold 0, 1, 2; layers 9-12 hold 0, 0, 1."""
    held = [[len(lora.pairs_held(n, 12, 3, stage)) for stage in (1, 2, 3)] for n in range(1, 13)]
    assert held == [[1, 2, 3]] * 4 + [[0, 1, 2]] * 4 + [[0, 0, 1]] * 4


# -------------------------------------------------------------------------------------------- parity


def set_pair(module, a_rows, b_rows):
    """Put given matrices, one A and one B per row block, into pair 1."""
    module.add_pair("1")
    module.lora_A["1"].data.copy_(torch.stack(a_rows))
    module.lora_B["1"].data.copy_(torch.stack(b_rows))
    module.fold(live=["1"])


def test_linear_equals_golden(shared):
    """One adapted Linear, running and merged, gives PEFT's stored numbers."""
    golden = torch.load(shared / "golden/lora_peft_golden.pt", weights_only=True)
    rank, alpha, golden = golden["r"], golden["lora_alpha"], golden["linear"]
    layer = nn.Sequential(nn.Linear(48, 40))
    layer[0].weight.data, layer[0].bias.data = golden["weight"], golden["bias"]
    lora.attach([layer], {"0": 1}, rank, alpha)
    layer.eval()
    torch.testing.assert_close(layer(golden["input"]), golden["output_base"], atol=1e-5, rtol=0)
    set_pair(layer[0], [golden["lora_A"]], [golden["lora_B"]])
    torch.testing.assert_close(layer(golden["input"]), golden["output"], atol=1e-5, rtol=0)
    lora.merge([layer])
    torch.testing.assert_close(layer[0].folded, golden["merged_weight"], atol=1e-5, rtol=0)
    torch.testing.assert_close(layer(golden["input"]), golden["output_merged"], atol=1e-5, rtol=0)


def test_fused_attention_equals_golden(shared):
    """q, k, v in one matrix are adapted as three: the attention gives PEFT's stored numbers."""
    golden = torch.load(shared / "golden/lora_peft_golden.pt", weights_only=True)
    rank, alpha, golden = golden["r"], golden["lora_alpha"], golden["mha"]
    attention = Attention(golden["embed_dim"], golden["num_heads"])
    for name in ("in_proj", "out_proj"):
        linear = getattr(attention, name)
        linear.weight.data, linear.bias.data = golden[f"{name}_weight"], golden[f"{name}_bias"]
    lora.attach([attention], {"in_proj": 3, "out_proj": 1}, rank, alpha)
    attention.eval()
    mask = ~golden["key_padding_mask"][:, None, None, :]  # True = attend

    def close(output, expected):
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)

    close(attention(golden["input"], mask), golden["output_base"])
    set_pair(attention.in_proj, *([golden[f"{x}_lora_{m}"] for x in ("q", "k", "v")] for m in "AB"))
    set_pair(attention.out_proj, [golden["out_lora_A"]], [golden["out_lora_B"]])
    close(attention(golden["input"], mask), golden["output"])
    lora.merge([attention])
    close(attention.in_proj.folded, golden["merged_in_proj_weight"])
    close(attention.out_proj.folded, golden["merged_out_proj_weight"])
    close(attention(golden["input"], mask), golden["output_merged"])


def test_equals_peft():
    """The same matrices in PEFT's LoRA give the same outputs; a fused matrix as its row blocks do."""
    peft = pytest.importorskip("peft")
    layers = tower(1)
    lora.enter_stage(layers, 1, 1)
    shake(layers)
    for name, blocks in TARGETS.items():
        ours = getattr(layers[0], name)
        x, parts = torch.randn(5, ours.weight.shape[1]), []
        for block in range(blocks):
            rows = slice(block * 12, (block + 1) * 12)
            theirs = nn.Sequential(nn.Linear(ours.weight.shape[1], 12))
            theirs[0].weight.data, theirs[0].bias.data = ours.weight[rows], ours.bias[rows]
            theirs = peft.get_peft_model(
                theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
            ).eval()
            adapter = theirs.base_model.model[0]
            adapter.lora_A["default"].weight.data = ours.lora_A["1"][block].data
            adapter.lora_B["default"].weight.data = ours.lora_B["1"][block].data
            parts.append(theirs(x))
        torch.testing.assert_close(ours(x), torch.cat(parts, dim=-1), atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------- stages


def test_entering_a_stage_changes_no_output():
    """A stage starts from the outputs that the one before ended with: the new B, and it alone, is 0."""
    layers, x = tower(), torch.randn(4, 12)
    plain = layers(x)
    for stage in (1, 2, 3):
        before = layers(x)
        lora.enter_stage(layers, stage, groups=3)
        torch.testing.assert_close(layers(x), before, atol=1e-5, rtol=0)
        for name, parameter in layers.named_parameters():
            if "lora_B" in name:
                assert (parameter == 0).all() == name.endswith(f".{stage}"), name
            if "lora_A" in name:
                assert parameter.std() > 0.05, name
        shake(layers)
    assert (layers(x) - plain).abs().max() > 0.1


@pytest.mark.parametrize("stage", [1, 3])
def test_a_stage_trains_its_newest_pairs_alone(stage):
    """After three steps exactly the pairs k = j have changed; W_0 and b are bit for bit the same."""
    layers, x = tower(dropout=0.1).train(), torch.randn(8, 12)
    for earlier in range(1, stage):
        lora.enter_stage(layers, earlier, groups=3)
        shake(layers)
    trainable = lora.enter_stage(layers, stage, groups=3)
    before = {name: p.clone() for name, p in layers.named_parameters()}
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-2)
    assert {id(p) for p in trainable} == {id(p) for p in layers.parameters() if p.requires_grad}
    for _ in range(3):
        optimizer.zero_grad()
        layers(x).square().mean().backward()
        optimizer.step()
    changed = {name for name, p in layers.named_parameters() if not torch.equal(p, before[name])}
    newest = {name for name in before if "lora_" in name and name.endswith(f".{stage}")}
    assert changed == newest and len(newest) == 4 * (2 * stage)


def test_merged_equals_unmerged():
    """Merging all pairs changes no output, and undoing it gives exactly the old ones; W_0 stays."""
    layers, x = tower(), torch.randn(4, 12)
    weights = {name: p.clone() for name, p in layers.named_parameters()}
    for stage in (1, 2, 3):
        lora.enter_stage(layers, stage, groups=3)
        shake(layers)
    before = layers(x)
    lora.merge(layers)
    torch.testing.assert_close(layers(x), before, atol=1e-5, rtol=0)
    for layer in layers:  # a merged matrix is W_0 + sum of all pairs, by hand
        qkv, rows = layer.qkv, []
        for block, weight in enumerate(qkv.weight.chunk(3)):
            pairs = [(qkv.lora_B[k][block], qkv.lora_A[k][block]) for k in qkv.lora_A]
            rows.append(weight + sum(8 / 4 * b @ a for b, a in pairs))
        plain = nn.functional.linear(x, torch.cat(rows), qkv.bias)
        torch.testing.assert_close(qkv(x), plain, atol=1e-5, rtol=0)
    lora.unmerge(layers)
    assert torch.equal(layers(x), before)
    assert all(torch.equal(dict(layers.named_parameters())[n], w) for n, w in weights.items())


def test_lora_state_dict_holds_exactly_the_pairs():
    """lora_state_dict gives every pair and nothing else, and restores them in another tower."""
    layers, other, x = tower(), tower(), torch.randn(4, 12)
    for stage in (1, 2):
        lora.enter_stage(layers, stage, groups=3)
        shake(layers)
    pairs = lora.lora_state_dict(layers)
    held = 2 + 2 + 1 + 1  # pairs in layers 1 to 6, in each of two matrices, A and B each
    assert len(pairs) == 2 * 2 * held and not any(".weight" in name for name in pairs)
    lora.enter_stage(other, 2, groups=3)
    assert not other.load_state_dict(pairs, strict=False).unexpected_keys
    lora.enter_stage(other, 2, groups=3)  # folds the older pairs that were just read
    torch.testing.assert_close(other(x), layers(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["attn.in_proj", "", "qk"])
def test_a_target_that_matches_nothing_is_an_error(name):
    """A misspelt target is told, with the names that there are, instead of adapting nothing."""
    with pytest.raises(ValueError, match="qkv, out"):
        lora.attach([Layer()], {name: 1})


def test_lora_is_one_file_that_depends_on_torch_alone():
    """lora.py can be copied into another project: it imports nothing but torch and the standard library."""
    tree = ast.parse(Path(lora.__file__).read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {getattr(n, "module", None) or a.name for n in imports for a in n.names}
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"torch"}
