#!/bin/sh
# supervision reads Qwen2.5-VL's and Qwen3-VL's boxes from a list only: one object's answer as a single JSON object, or
# a box without a label, is no detection at all, without a word.
#
# supervision 0.31.2.
# Asked for the one object that an expression means, a model may well answer {"bbox_2d": [...], "label": "..."} without the
# brackets of a list, or with a box alone, [{"bbox_2d": [...]}]. from_vlm gives an empty Detections for both, although it
# mends lists that are cut off and finds a list within prose (its documentation speaks of lists). To an evaluation that
# looks like "nothing found".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q supervision==0.31.2
venv/bin/python - <<'PYTHON'
import json, sys, warnings
import supervision as sv

warnings.simplefilter("error")  # a warning would show

answer = {"bbox_2d": [100, 200, 300, 400], "label": "the red cup"}
forms = {"list": json.dumps([answer]), "fenced list": f"```json\n{json.dumps([answer])}\n```",
         "list in prose": f"The cup is here: {json.dumps([answer])}.", "list cut off": json.dumps([answer, answer])[:-20],
         "one object": json.dumps(answer), "fenced object": f"```json\n{json.dumps(answer)}\n```",
         "without label": json.dumps([{"bbox_2d": answer["bbox_2d"]}])}

def boxes(kind, text):
    sizes = {"resolution_wh": (1000, 1000)}
    if kind == "QWEN_2_5_VL":
        sizes["input_wh"] = (1000, 1000)
    return sv.Detections.from_vlm(sv.VLM[kind], text, **sizes).xyxy.tolist()

found = {}
for kind in ("QWEN_2_5_VL", "QWEN_3_VL"):
    for name, text in forms.items():
        found[kind, name] = len(boxes(kind, text))
        print(f"{kind:12} {name:14} boxes: {found[kind, name]}")
lost = {"one object", "fenced object", "without label"}
as_seen = all(count == (0 if name in lost else 1) for (kind, name), count in found.items())
sys.exit(0 if as_seen else "no longer as described")
PYTHON
