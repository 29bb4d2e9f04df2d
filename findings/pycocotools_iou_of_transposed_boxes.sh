#!/bin/sh
# pycocotools.mask.iou reads boxes in the order of memory: for an array that was put together by columns, the
# overlap of a box with itself is 0, without a word.
#
# pycocotools 2.0.11 with numpy 2.2.6; faster-coco-eval 1.8.0 beside it does the same right.
# np.stack([x, y, w, h]).T and boxes[:, [0, 1, 2, 3]] are equal to the boxes but lie column by column in memory. iou takes
# their bytes row by row. (The order of numbers by which boxes are most often made: x, y, w and h each computed for
# all of them.) np.ascontiguousarray(boxes) is the cure.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.2.6 pycocotools==2.0.11 faster-coco-eval==1.8.0
venv/bin/python - <<'PYTHON'
import sys
import numpy as np
from pycocotools import mask
from faster_coco_eval import mask as faster_mask

boxes = np.array([[0, 0, 10, 10], [50, 50, 4, 4], [20, 20, 6, 6]], float)  # x y w h, none overlaps another
columns = np.stack([boxes[:, 0], boxes[:, 1], boxes[:, 2], boxes[:, 3]]).T
picked = boxes[:, [0, 1, 2, 3]]
assert (columns == boxes).all() and (picked == boxes).all()

def with_itself(iou, array):
    return iou(array, array, [0, 0, 0]).diagonal().tolist()

seen = {name: (with_itself(mask.iou, array), with_itself(faster_mask.iou, array))
        for name, array in (("boxes", boxes), ("columns", columns), ("picked", picked))}
for name, (plain, faster) in seen.items():
    print(f"{name:8} each box with itself: pycocotools {plain}  faster-coco-eval {faster}")
one = [1.0, 1.0, 1.0]
as_seen = (seen["boxes"] == (one, one) and all(seen[n][1] == one for n in seen)
           and seen["columns"][0] == seen["picked"][0] == [0.0, 1.0, 1.0])
sys.exit(0 if as_seen else "no longer as described")
PYTHON
