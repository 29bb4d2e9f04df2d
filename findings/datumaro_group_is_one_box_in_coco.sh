#!/bin/sh
# datumaro: boxes of one group become one box in COCO, around them all, with the expression of the first only.
#
# datumaro 1.13.12 (torch 2.13.0).
# CVAT and datumaro let an annotator group objects ("the man" and "the dog that he leads"). Written as COCO
# instances, the two boxes [1 1 5 5] and [20 10 5 5] of a group are one annotation with the box [1 1 24 14], and
# attributes.text of the second box is gone. The exporter says nothing. Without a group, both boxes and both
# expressions are there, and datumaro's own format keeps them in either case.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q torch==2.13.0 datumaro==1.13.12
venv/bin/python - <<'PYTHON' 2>messages || { cat messages; exit 1; }
import json, sys
from pathlib import Path
from PIL import Image as PillowImage
from datumaro.components.annotation import AnnotationType, Bbox, LabelCategories
from datumaro.components.dataset import Dataset
from datumaro.components.dataset_base import DatasetItem
from datumaro.components.media import Image

PillowImage.new("RGB", (40, 20)).save("a.png")

def export(group, form, file):
    boxes = [Bbox(1, 1, 5, 5, label=0, group=group, attributes={"text": "the man"}),
             Bbox(20, 10, 5, 5, label=0, group=group, attributes={"text": "the dog that he leads"})]
    item = DatasetItem("a", subset="train", media=Image.from_file(path="a.png"), annotations=boxes)
    categories = {AnnotationType.label: LabelCategories.from_iterable(["thing"])}
    folder = f"{form}_{group}"
    Dataset.from_iterable([item], categories=categories).export(folder, form)
    content = json.loads(Path(folder, "annotations", file).read_text())
    annotations = content["annotations"] if "annotations" in content else content["items"][0]["annotations"]
    return [(a["bbox"], a["attributes"]["text"]) for a in annotations]

apart = export(0, "coco", "instances_train.json")
grouped = export(3, "coco", "instances_train.json")
own_format = export(3, "datumaro", "train.json")
print("COCO, no group: ", apart)
print("COCO, one group:", grouped)
print("datumaro's own: ", own_format)
both = [([1, 1, 5, 5], "the man"), ([20, 10, 5, 5], "the dog that he leads")]
as_seen = apart == both and own_format == both and grouped == [([1, 1, 24, 14], "the man")]
sys.exit(0 if as_seen else "no longer as described")
PYTHON
if grep -qi "group" messages; then echo "the exporter now says something:"; cat messages; exit 1; fi
echo "messages about the group: none"
