#!/usr/bin/env bash
# The mean of a word's parts by scatter_reduce becomes the last part alone in the exported ONNX model, and the exporter
# does not mention it.
#
# torch 2.13.0 (torch.onnx.export with dynamo), onnxscript 0.7.2, onnxruntime 1.31.1, on the CPU.
# A tokenizer cuts words into parts, and scatter_reduce(..., reduce="mean") makes one vector of each word's parts (token
# merging in vision transformers uses the same call). ONNX's ScatterElements can add, multiply and take the larger or
# the smaller, but has no mean. The exporter writes reduction "none" instead, by which each part overwrites the one
# before. Parts 1 | 2, 3, 4 | 5, 6 give 1, 3, 5.5 in torch and 1, 4, 6 in onnxruntime; with include_self=True the zeros that
# should count are not there either. Words of one part are right, so a short test passes. "sum", "amax" and "prod"
# agree, and index_reduce with "mean" is refused by the same exporter. To divide a "sum" by a "sum" of ones is the cure.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q torch==2.13.0 numpy==2.2.6 onnxscript==0.7.2 onnxruntime==1.31.1
venv/bin/python - <<'PYTHON' 2>messages || { cat messages; exit 1; }
import sys
import onnx
import onnxruntime
import torch
from torch import nn

class Words(nn.Module):
    """One vector for each of three words, of the vectors of its parts."""

    def __init__(self, reduce, include_self):
        super().__init__()
        self.reduce, self.include_self = reduce, include_self

    def forward(self, parts, word):
        index = word[..., None].expand(-1, -1, parts.shape[-1])
        return parts.new_zeros(parts.shape[0], 3, parts.shape[-1]).scatter_reduce(
            1, index, parts, self.reduce, include_self=self.include_self)

class Divided(nn.Module):
    def forward(self, parts, word):
        index = word[..., None].expand(-1, -1, parts.shape[-1])
        none = parts.new_zeros(parts.shape[0], 3, parts.shape[-1])
        return none.scatter_reduce(1, index, parts, "sum") / none.scatter_reduce(1, index, torch.ones_like(parts), "sum")

class IndexReduce(nn.Module):
    def forward(self, parts, word):
        return parts.new_zeros(1, 3, parts.shape[-1]).index_reduce(1, word[0], parts, "mean", include_self=False)

def both(model, *inputs):
    model.eval()
    expected = model(*inputs)
    torch.onnx.export(model, inputs, "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    feed = {node.name: tensor.numpy() for node, tensor in zip(session.get_inputs(), inputs)}
    kinds = {node.op_type: [a.s.decode() for a in node.attribute if a.name == "reduction"] for node in onnx.load("model.onnx").graph.node}
    short = lambda values: [round(v, 2) for v in values.flatten().tolist()]
    return short(expected), short(session.run(None, feed)[0]), kinds.get("ScatterElements", [])

parts = torch.arange(1.0, 7.0)[None, :, None]  # [sentence, part, width]
several, single = torch.tensor([[0, 1, 1, 1, 2, 2]]), torch.tensor([[0, 1, 2]])
seen = {"mean": both(Words("mean", False), parts, several), "mean with the zeros": both(Words("mean", True), parts, several),
        "mean, one part each": both(Words("mean", False), parts[:, :3], single), "sum": both(Words("sum", False), parts, several),
        "amax": both(Words("amax", False), parts, several), "prod": both(Words("prod", False), parts, several),
        "sum divided by count": both(Divided(), parts, several)}
for name, (in_torch, in_onnx, kind) in seen.items():
    print(f"{name:21} torch {in_torch}  onnxruntime {in_onnx}  reduction {kind}")
try:
    both(IndexReduce(), parts, several)
    refused = False
except torch.onnx.OnnxExporterError:
    refused = True
print("index_reduce with mean is refused:", refused)
as_seen = (seen["mean"] == ([1.0, 3.0, 5.5], [1.0, 4.0, 6.0], ["none"])
           and seen["mean with the zeros"] == ([0.5, 2.25, 3.67], [1.0, 4.0, 6.0], ["none"])
           and all(seen[n][0] == seen[n][1] for n in seen if n not in ("mean", "mean with the zeros")) and refused)
sys.exit(0 if as_seen else "no longer as described")
PYTHON
if grep -v "index_reduce" messages | grep -qiE "scatter|reduc"; then echo "the exporter now says something:"; cat messages; exit 1; fi
echo "messages about the mean: none"
