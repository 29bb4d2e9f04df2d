#!/usr/bin/env bash
# interpolate(..., antialias=True, align_corners=True) of torch does not align the corners: everything moves to one side, and
# the mirrored picture gives another result. The exported ONNX model does align them, so the two differ.
#
# torch 2.13.0, onnxscript 0.7.2, onnxruntime 1.31.1, on the CPU.
# With align_corners=True the documentation promises that the values at the corner pixels are kept. A ramp 0, 1 ... 8 made
# 17 wide is 0, 0.5, 1 ... 8. With antialias=True, which has nothing to smooth when a picture grows, it is 0, 0.25, 0.75,
# 1.25 ... 7.75: off by a quarter of a pixel, everywhere in the same direction. A ramp of 17 made 9 wide is 0.71, 2.5,
# 4.5 ... 14.5, 15.75 instead of 0, 2, 4 ... 16: off by half a pixel. The step is that of aligned corners, the start that
# of align_corners=False, so the option is not ignored either. "bicubic" does the same. A position embedding or a heat
# map resized in this way treats left and right differently. onnxruntime computes the exported model with aligned corners, the
# same from both sides. With only one of the two options, both agree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q torch==2.13.0 numpy==2.2.6 onnxscript==0.7.2 onnxruntime==1.31.1
venv/bin/python - <<'PYTHON' 2>messages || { cat messages; exit 1; }
import sys
import warnings
import numpy as np
import onnxruntime
import torch
from torch import nn
from torch.nn.functional import interpolate

class Resize(nn.Module):
    def __init__(self, width, mode, antialias, align_corners):
        super().__init__()
        self.width = width
        self.settings = dict(mode=mode, antialias=antialias, align_corners=align_corners)

    def forward(self, picture):
        return interpolate(picture, size=(1, self.width), **self.settings)

def both(old, new, mode, antialias, align_corners):
    """The ramp 0 ... old-1 at its new width, by torch, by torch on the mirrored ramp (mirrored back), by onnxruntime."""
    model = Resize(new, mode, antialias, align_corners).eval()
    ramp = torch.arange(old, dtype=torch.float32)[None, None, None]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        there, mirrored = model(ramp), model(ramp.flip(-1)).flip(-1)
    torch.onnx.export(model, (ramp,), "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    onnx, = session.run(None, {session.get_inputs()[0].name: ramp.numpy()})
    return there.flatten().numpy(), mirrored.flatten().numpy(), onnx.flatten(), len(caught)

as_seen = True
for mode in ("bilinear", "bicubic"):
    for old, new in ((9, 17), (17, 9)):
        for antialias, align_corners in ((False, True), (True, False), (True, True)):
            there, mirrored, onnx, said = both(old, new, mode, antialias, align_corners)
            inner = slice(5, -5) if new > old else slice(3, -3)
            aligned = np.linspace(0, old - 1, new)
            off = (there - aligned)[inner].mean()
            turned, exported = abs(there - mirrored).max(), abs(there - onnx).max()
            # A ramp turned round is old - 1 minus the ramp; compare what is the same if left and right are treated alike.
            uneven = abs(there + there[::-1] - (old - 1)).max()
            print(f"{mode:8} {old:2} -> {new:2} antialias={antialias!s:5} align_corners={align_corners!s:5} "
                  f"{there[0]:5.2f} {there[1]:5.2f} {there[2]:5.2f} ... {there[-2]:5.2f} {there[-1]:5.2f}  mirrored differs by {turned:.2f}, ONNX by {exported:.2f}")
            as_seen &= said == 0
            if antialias and align_corners:
                expected = -0.25 if new > old else 0.5  # in pixels of the old picture
                as_seen &= bool(abs(off - expected) < 0.01 and turned > 0.4 and uneven > 0.4 and exported > 0.2
                                and abs(onnx - aligned)[inner].max() < 0.01 and abs(onnx + onnx[::-1] - (old - 1)).max() < 1e-4)
            else:
                as_seen &= bool(turned < 1e-4 and uneven < 1e-4 and exported < 1e-4)
sys.exit(0 if as_seen else "no longer as described")
PYTHON
