"""lora.py: the formula of pairs, parity with PEFT, what a stage changes and what it must not."""

import ast
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import close
from torch import nn

import lora
from clip_model import attention

TARGETS = {"qkv": 3, "out": 1}


class Layer(nn.Module):
    """Attention with q, k, v in one matrix, without CLIP: lora.py must not need to know it."""

    def __init__(self, width=12, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return x + self.out(attention(q, k, v, self.heads, mask))


def tower(depth=6, **settings):
    """Adapted layers of float64, pairs still to come."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(Layer() for _ in range(depth))).double()
    lora.add_lora(layers, TARGETS, **{"rank": 4, "alpha": 8, "dropout": 0.0} | settings)
    return layers.eval()


def shake_newest(layers):
    """Newest B matrices that are not zero, as training would leave them."""
    for name, parameter in layers.named_parameters():
        if "lora_B" in name and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)


def tower_in_stage(stage, **settings):
    """A tower whose pairs of all stages up to `stage` are there and not zero."""
    layers = tower(**settings)
    for number in range(1, stage + 1):
        lora.enter_stage(layers, number, groups=3)
        shake_newest(layers)
    return layers


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(4, 5, 12, dtype=torch.float64)


# ------------------------------------------------------------------------------------------- formula


@pytest.mark.parametrize("depth, groups", [(12, 3), (24, 3), (7, 3), (10, 3), (3, 3), (12, 1)])
def test_each_layer_has_the_pairs_of_the_formula(depth, groups):
    """A layer has a pair for every stage from g(l) on, for depths not divisible by G too."""
    layers = tower(depth, rank=1)
    for stage in range(groups + 1):
        lora.enter_stage(layers, stage, groups)
        for number, layer in enumerate(layers, start=1):
            # adapted in stage k if l <= k L / G, a real number; every such stage adds one pair
            expected = [k for k in range(1, stage + 1) if number <= Fraction(k * depth, groups)]
            assert [int(key) for key in layer.qkv.lora_A] == expected, (number, stage)
            assert list(lora.pair_indices(number, depth, groups, stage)) == expected


# -------------------------------------------------------------------------------------------- parity


def test_attention_equals_golden(shared):
    """q, k, v in one matrix are adapted as three: attention, unmerged and merged, gives PEFT's
    stored numbers."""
    golden = torch.load(shared / "golden/lora_peft_golden.pt", weights_only=True)
    rank, alpha, golden = golden["r"], golden["lora_alpha"], golden["mha"]
    layer = Layer(golden["embed_dim"], golden["num_heads"])
    for linear, name in ((layer.qkv, "in_proj"), (layer.out, "out_proj")):
        linear.weight.data, linear.bias.data = golden[f"{name}_weight"], golden[f"{name}_bias"]
    lora.add_lora([layer], TARGETS, rank, alpha)
    lora.enter_stage([layer.eval()], 1, groups=1)
    x, mask = golden["input"], ~golden["key_padding_mask"][:, None, None, :]  # True = attend
    close(layer(x, mask) - x, golden["output_base"])
    for module, names in ((layer.qkv, ("q", "k", "v")), (layer.out, ("out",))):
        for letter, pairs in (("A", module.lora_A), ("B", module.lora_B)):
            pairs["1"].data = torch.stack([golden[f"{name}_lora_{letter}"] for name in names])
    close(layer(x, mask) - x, golden["output"])
    lora.merge_lora([layer])
    close(layer(x, mask) - x, golden["output_merged"])


def test_pairs_equal_peft(x):
    """The same matrices in PEFT's LoRA give the same outputs; a fused matrix as its row blocks do."""
    peft = pytest.importorskip("peft")
    layer = tower_in_stage(1)[0]
    for name, blocks in TARGETS.items():
        ours, parts = getattr(layer, name), []
        for block in range(blocks):
            rows = slice(block * 12, (block + 1) * 12)
            theirs = nn.Sequential(nn.Linear(12, 12).double())
            theirs[0].weight.data, theirs[0].bias.data = ours.weight[rows], ours.bias[rows]
            config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
            theirs = peft.get_peft_model(theirs, config).eval()
            adapter = theirs.base_model.model[0].double()
            adapter.lora_A["default"].weight.data = ours.lora_A["1"][block].data
            adapter.lora_B["default"].weight.data = ours.lora_B["1"][block].data
            parts.append(theirs(x))
        close(ours(x), torch.cat(parts, dim=-1))


# -------------------------------------------------------------------------------------------- stages


def test_a_stage_begins_where_the_one_before_ended(x):
    """Entering the next stage changes no output: the new B, and it alone, is zero; no A is."""
    layers = tower()
    plain = layers(x)
    for stage in (1, 2, 3):
        before = layers(x)
        lora.enter_stage(layers, stage, groups=3)
        close(layers(x), before)
        for name, parameter in layers.named_parameters():
            if "lora_B" in name:
                assert (parameter == 0).all() == name.endswith(f".{stage}"), name
            if "lora_A" in name:  # Kaiming uniform with a = sqrt(5): up to 1 / sqrt(12)
                assert 0.25 < parameter.abs().max() <= 12**-0.5, name
        shake_newest(layers)
        assert (layers(x) - before).abs().max() > 0.1
    assert (layers(x) - plain).abs().max() > 0.1


def test_an_earlier_stage_gives_its_outputs(x):
    """Entering an earlier stage gives that stage's outputs, merged as unmerged; later pairs stay
    stored and come back; W_0 and the pairs stay bit for bit as they are."""
    layers = tower()
    outputs = [layers(x)]
    for stage in (1, 2, 3):
        lora.enter_stage(layers, stage, groups=3)
        shake_newest(layers)
        outputs.append(layers(x))
    state = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    for stage in (1, 3, 0, 2, 3):
        lora.merge_lora(layers)
        lora.enter_stage(layers, stage, groups=3)
        close(layers(x), outputs[stage], 1e-6)
        unmerged = layers(x)
        lora.merge_lora(layers)
        close(layers(x), outputs[stage])
        lora.unmerge_lora(layers)
        assert torch.equal(layers(x), unmerged)
    assert layers.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in layers.state_dict().items())


@pytest.mark.parametrize("stage", [1, 3])
def test_a_stage_trains_its_newest_pairs_alone(x, stage):
    """After three steps exactly the pairs k = j have changed; W_0 and b are bit for bit the same."""
    layers = tower_in_stage(stage - 1, dropout=0.1).train()
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


def test_dropout_is_on_the_newest_pair_in_training_alone(x):
    """Dropout thins the input of the branch that trains: not in eval mode, not of older pairs."""
    layers = tower_in_stage(2, dropout=0.5)
    without = tower_in_stage(2, dropout=0.0)
    without.load_state_dict(layers.state_dict())
    lora.enter_stage(without, 2, groups=3)
    assert torch.equal(layers(x), without(x))
    layers.train()
    assert (layers(x) - without(x)).abs().max() > 0.1
    lora.enter_stage(layers, 3, groups=3)  # its new pairs are still zero
    close(layers(x), without(x))


def test_the_merged_state_dict_is_that_of_plain_layers(x):
    """merged_state_dict loads into layers without LoRA, which then give the same outputs."""
    layers, plain = tower_in_stage(2), nn.Sequential(*(Layer() for _ in range(6))).double()
    plain.load_state_dict(lora.merged_state_dict(layers))
    close(plain(x), layers(x))


def test_lora_state_dict_holds_exactly_the_pairs(x):
    """lora_state_dict gives every pair and nothing else, and restores them in another tower."""
    layers, other = tower_in_stage(2), tower()
    pairs = lora.lora_state_dict(layers)
    count = 2 + 2 + 1 + 1  # pairs in layers 1 to 6, in each of two matrices, A and B each
    assert len(pairs) == 2 * 2 * count and not any(".weight" in name for name in pairs)
    lora.enter_stage(other, 2, groups=3)
    assert not other.load_state_dict(pairs, strict=False).unexpected_keys
    lora.enter_stage(other, 2, groups=3)  # folds the older pairs that were just read
    close(other(x), layers(x), 1e-6)


@pytest.mark.parametrize("targets", [{"attn.in_proj": 3}, {"": 1}, {"qk": 1}])
def test_a_target_that_matches_nothing_is_an_error(targets):
    """A misspelt target is told, with the names that there are, instead of adapting nothing."""
    with pytest.raises(ValueError, match="qkv.*out"):
        lora.add_lora([Layer()], targets)


def test_lora_is_one_file_that_depends_on_torch_alone():
    """lora.py can be copied into another project: of other packages it imports only torch."""
    tree = ast.parse(Path(lora.__file__).read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {getattr(n, "module", None) or a.name for n in imports for a in n.names}
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"torch"}
