#!/bin/sh
# Attention to a text that is nothing but padding: torch gives zeros; the exported ONNX model gives the mean of the padding
# if the mask is bool, and NaN if it is a float mask of -inf. The same export agrees to 1e-6 everywhere else.
#
# torch 2.13.0, onnxscript 0.7.2, onnxruntime 1.31.1, on the CPU.
# A batch of pictures where one has no caption: its key mask is False throughout. scaled_dot_product_attention defines
# such a row as 0. The exporter writes the mask as an addition before a softmax: a bool mask becomes the lowest finite
# number, so that all keys weigh the same, and the padding's values are averaged; -inf stays and gives NaN.
# nn.MultiheadAttention with key_padding_mask goes the second way.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q torch==2.13.0 numpy==2.2.6 onnxscript==0.7.2 onnxruntime==1.31.1
venv/bin/python - <<'PYTHON' 2>messages || { cat messages; exit 1; }
import sys
import numpy as np
import onnxruntime
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

class Fusion(nn.Module):
    def forward(self, queries, words, mask):
        return scaled_dot_product_attention(queries, words, words, attn_mask=mask)

class Ready(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, queries, words, padding):
        return self.attention(queries, words, words, key_padding_mask=padding, need_weights=False)[0]

def both(model, *inputs):
    model.eval()
    with torch.no_grad():
        expected = model(*inputs).numpy()
    torch.onnx.export(model, inputs, "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    feed = {node.name: tensor.numpy() for node, tensor in zip(session.get_inputs(), inputs)}
    return expected, session.run(None, feed)[0]

torch.manual_seed(0)
queries, words = torch.randn(2, 1, 3, 8), torch.randn(2, 1, 4, 8)  # [picture, head, tokens, width]
there = torch.tensor([[True, True, False, False], [False] * 4])  # the second picture's text is empty
mask = there[:, None, None]
torch_bool, onnx_bool = both(Fusion(), queries, words, mask)
torch_float, onnx_float = both(Fusion(), queries, words, torch.zeros(mask.shape).masked_fill(~mask, float("-inf")))
torch_mha, onnx_mha = both(Ready(), queries[:, 0], words[:, 0], ~there)
mean = words[1].mean(1, keepdim=True).numpy()

for name, one, two in (("bool mask", torch_bool, onnx_bool), ("float mask", torch_float, onnx_float), ("MultiheadAttention", torch_mha, onnx_mha)):
    print(f"{name}: picture with words: largest difference {abs(one[0] - two[0]).max():.0e};", end=" ")
    print(f"picture without: torch {one[1].flat[0]:.3f}, onnxruntime {two[1].flat[0]:.3f}")
as_seen = (all(abs(a[0] - b[0]).max() < 1e-5 for a, b in ((torch_bool, onnx_bool), (torch_float, onnx_float), (torch_mha, onnx_mha)))
           and not torch_bool[1].any() and not torch_float[1].any() and np.isfinite(torch_mha[1]).all()
           and abs(onnx_bool[1] - mean).max() < 1e-5 and abs(mean).max() > 0.1
           and np.isnan(onnx_float[1]).all() and np.isnan(onnx_mha[1]).all())
sys.exit(0 if as_seen else "no longer as described")
PYTHON
