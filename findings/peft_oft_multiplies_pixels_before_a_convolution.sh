#!/usr/bin/env bash
# PEFT's OFT on a convolution multiplies every pixel by the number of windows over it: a new adapter, which ought to
# change nothing, already makes another model, and merging it brings the untouched one back.
#
# peft 0.21.2 with torch 2.13.0.
# OFT turns the input of a layer by an orthogonal matrix that begins as the identity. For a Conv2d with a kernel of more
# than 1 x 1, PEFT cuts the input into windows (at stride 1, whatever the layer's own stride), turns each, and puts the
# picture together again as the sum of all the windows that overlap at a pixel, without a division by their number.
# A white picture of 224 x 224 gives 1 in each patch of a ViT's patch embedding (16 x 16 at stride 16, here the mean of the
# patch). With a new OFT adapter it gives 256 in the middle and 72.25 in the corner; a 3 x 3 convolution gives 9. A 1 x 1
# convolution, a Linear, BOFT and LoRA give what they gave before. merge_and_unload turns the weights alone, and the
# output is 1 again: the merged model is not the one that was trained. No step says anything.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q torch==2.13.0 numpy==2.2.6 transformers==5.20.2 peft==0.21.2
venv/bin/python - <<'PYTHON' 2>messages || { cat messages; exit 1; }
import sys
import warnings
import torch
from torch import nn
from peft import BOFTConfig, LoraConfig, OFTConfig, get_peft_model

class Embedding(nn.Module):
    """Patches of a picture; each number that comes out is the mean of its patch."""

    def __init__(self, kernel, stride, padding):
        super().__init__()
        self.projection = nn.Conv2d(4, 8, kernel, stride, padding, bias=False)
        nn.init.constant_(self.projection.weight, 1 / (4 * kernel * kernel))

    def forward(self, picture):
        return self.projection(picture)

def run(name, config, kernel, stride, padding):
    """The middle of a white picture without an adapter, with a new one, and after merging that; the corner with the new one."""
    white = torch.ones(1, 4, 224, 224)
    model = Embedding(kernel, stride, padding).eval()
    with torch.no_grad():
        before = model(white)
        adapted = get_peft_model(model, config).eval()
        new = adapted(white)
        merged = adapted.merge_and_unload()(white)
    middle = before.shape[-1] // 2
    row = [round(output[0, 0, middle, middle].item(), 2) for output in (before, new, merged)]
    corner = round(new[0, 0, 0, 0].item(), 2)
    print(f"{name:27} middle: no adapter {row[0]}, new adapter {row[1]}, merged {row[2]}; corner with new adapter {corner}")
    return row + [corner]

def oft():
    return OFTConfig(r=0, oft_block_size=4, target_modules=["projection"])

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")  # a word about it would show
    patches = run("OFT, 16 x 16 at stride 16", oft(), 16, 16, 0)
    three = run("OFT, 3 x 3", oft(), 3, 1, 0)
    one = run("OFT, 1 x 1", oft(), 1, 1, 0)
    linear, rows = nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(5, 8)
    with torch.no_grad():
        before = linear(rows)
        config = OFTConfig(r=0, oft_block_size=4, target_modules=["0"])
        change = (get_peft_model(linear, config).eval()(rows) - before).abs().max().item()
print(f"OFT, Linear                 largest change by a new adapter: {change:.0e}")
print("warnings:", len(caught))
boft = run("BOFT, 16 x 16 at stride 16", BOFTConfig(boft_block_size=4, target_modules=["projection"]), 16, 16, 0)
lora = run("LoRA, 16 x 16 at stride 16", LoraConfig(r=2, target_modules=["projection"]), 16, 16, 0)
close = lambda row, expected: all(abs(a - b) < 0.01 for a, b in zip(row, expected))
as_seen = (close(patches, [1, 256, 1, 72.25]) and close(three, [1, 9, 1, 4]) and close(one, [1, 1, 1, 1])
           and close(boft, [1, 1, 1, 1]) and close(lora, [1, 1, 1, 1]) and change < 1e-5 and not caught)
sys.exit(0 if as_seen else "no longer as described")
PYTHON
