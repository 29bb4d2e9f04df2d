#!/bin/sh
# datumaro: the size of an EXIF-turned photograph depends on whether its pixels were looked at before anybody asked for
# it, and so does the COCO file that is exported.
#
# datumaro 1.13.12 (torch 2.13.0, Pillow 12.3.0, opencv-python-headless 4.14.0.94).
# The photograph is stored 40 wide and 20 high, and turned by EXIF. Asked first, Image.size is that of the upright picture,
# (40, 20) as height and width. The pixels come as they are stored, (20, 40, 3), and if they are decoded before the size is
# asked for, the size is (20, 40) too. So the export of one data set says width 20, height 40, or width 40, height 20
# after any step that opened the pictures (a statistic, a transform, a viewer). The boxes are the same numbers both times.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q torch==2.13.0 datumaro==1.13.12 pillow==12.3.0 opencv-python-headless==4.14.0.94
venv/bin/python - <<'PYTHON'
import json, sys
from pathlib import Path
from PIL import Image as PillowImage
from datumaro.components.annotation import AnnotationType, Bbox, LabelCategories
from datumaro.components.dataset import Dataset
from datumaro.components.dataset_base import DatasetItem
from datumaro.components.media import Image

exif = PillowImage.Exif()
exif[0x0112] = 6
PillowImage.new("RGB", (40, 20)).save("phone.jpg", exif=exif)

def export(look_first):
    media = Image.from_file(path="phone.jpg")
    pixels = media.data.shape if look_first else None
    item = DatasetItem("phone", subset="train", media=media, annotations=[Bbox(1, 2, 10, 5, label=0)])
    categories = {AnnotationType.label: LabelCategories.from_iterable(["cup"])}
    folder = f"coco_{look_first}"
    Dataset.from_iterable([item], categories=categories).export(folder, "coco", save_media=True)
    image = json.loads(Path(folder, "annotations/instances_train.json").read_text())["images"][0]
    return pixels, tuple(media.size), (image["width"], image["height"])

untouched, looked_at = export(False), export(True)
for name, (pixels, size, coco) in (("untouched", untouched), ("looked at", looked_at)):
    print(f"{name}: pixels {pixels}, size {size}; COCO width, height {coco}")
as_seen = untouched == (None, (40, 20), (20, 40)) and looked_at == ((20, 40, 3), (20, 40), (40, 20))
sys.exit(0 if as_seen else "no longer as described")
PYTHON
