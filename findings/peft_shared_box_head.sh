#!/bin/sh
# PEFT adapts a box head that several decoder layers share in the first of them only, and merging then changes it in
# all of them: the merged model is another one than the model that was trained.
#
# peft 0.21.2 with torch 2.13.0.
# Detectors of DETR's family often hold one and the same head under several names, ModuleList([head] * layers). LoRA on
# "bbox_embed.0", "bbox_embed.1", "bbox_embed.2" replaces the first name; the others go on calling the bare Linear, without
# any message, so two of three boxes do not change. merge_and_unload adds the pair into that very Linear, and
# the boxes of all three layers change: the outputs before and after merging differ by as much as the adapter does.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q torch==2.13.0 transformers==5.20.2 peft==0.21.2
venv/bin/python - <<'PYTHON'
import sys
import warnings
import torch
from torch import nn
from peft import LoraConfig, get_peft_model

class Decoder(nn.Module):
    """Three layers; after each, the same head gives a box."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.bbox_embed = nn.ModuleList([nn.Linear(8, 4)] * 3)

    def forward(self, x):
        boxes = []
        for layer, head in zip(self.layers, self.bbox_embed):
            x = layer(x).relu()
            boxes.append(head(x))
        return torch.stack(boxes)  # [layer, sample, 4]

torch.manual_seed(0)
x, model = torch.randn(5, 8), Decoder()
with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    before = model(x)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["bbox_embed.0", "bbox_embed.1", "bbox_embed.2"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.normal_()  # as after training
    during = adapted(x)
    after = adapted.merge_and_unload()(x)
change = (during - before).abs().amax((1, 2))
merging = (after - during).abs().amax((1, 2))
print("change of the boxes of layer 1, 2, 3 by the adapter:", [round(v, 4) for v in change.tolist()])
print("change of the boxes of layer 1, 2, 3 by merging it: ", [round(v, 4) for v in merging.tolist()])
print("warnings:", len(caught))
as_seen = (change > 0.1).tolist() == [True, False, False] and (merging > 0.1).tolist() == [False, True, True] and not caught
sys.exit(0 if as_seen else "no longer as described")
PYTHON
