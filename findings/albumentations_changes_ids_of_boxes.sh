#!/bin/sh
# albumentations passes whole numbers that stand beside boxes through float32: two annotation ids become the same.
#
# albumentations 2.0.8 with numpy 2.2.6.
# label_fields is where one puts what belongs to a box, an annotation's id for instance, to look up its expression after
# a crop. A list of ints comes back as floats, and above 2**24 = 16,777,216 as other ones: 900000000001 and
# 900000000002 (COCO's crowds have ids of twelve digits) both as 899999989760.0, even through NoOp. The same ids
# as str come back unchanged. Boxes are rounded to float32 as well, but only in the seventh digit.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.2.6 albumentations==2.0.8
NO_ALBUMENTATIONS_UPDATE=1 venv/bin/python - <<'PYTHON'
import sys
import warnings
import numpy as np
import albumentations as A

warnings.simplefilter("error")  # a word about it would show
image = np.zeros((100, 200, 3), np.uint8)
boxes = [[10, 10, 60, 50], [100, 20, 150, 80]]

def after(ids):
    """The ids beside the boxes after a transform that does nothing."""
    settings = A.BboxParams(format="pascal_voc", label_fields=["ids"])
    return list(A.Compose([A.NoOp()], bbox_params=settings)(image=image, bboxes=boxes, ids=ids)["ids"])

seen = {}
for name, ids in (("small", [7, 8]), ("over 2**24", [16777217, 16777219]), ("twelve digits", [900000000001, 900000000002]),
                  ("as str", ["900000000001", "900000000002"])):
    seen[name] = after(ids)
    print(f"{name}: {ids} -> {[v if isinstance(v, str) else float(v) for v in seen[name]]}")
as_seen = (seen["small"] == [7, 8] and isinstance(seen["small"][0], float) and seen["over 2**24"] == [16777216, 16777220]
           and seen["twelve digits"] == [899999989760.0] * 2 and seen["as str"] == ["900000000001", "900000000002"])
sys.exit(0 if as_seen else "no longer as described")
PYTHON
