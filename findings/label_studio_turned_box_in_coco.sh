#!/bin/sh
# Label Studio's COCO export gives a wrong box for a turned rectangle, unless the picture is square.
#
# label-studio-sdk 2.1.2 (the converter that Label Studio 1.23 uses).
# A rectangle of 160 x 40 pixels at (400, 340) in a picture of 640 x 480, turned by 30 degrees about its upper left
# corner, reaches from (380, 340) to (538.56, 454.64). The YOLO-OBB export of the same task has exactly these four
# corners. The COCO export turns the percentages of width and height as if they were pixels: it says
# [373.33, 340, 165.23, 94.64], which ends 20 pixels above the true lower edge and begins 7 too far left. On a square picture
# both agree.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q label-studio-sdk==2.1.2
venv/bin/python - <<'PYTHON'
import json, sys
from pathlib import Path
from PIL import Image
from label_studio_sdk.converter import Converter

CONFIG = '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="knife"/></RectangleLabels></View>'

def boxes(width, height):
    """The box of COCO and the envelope of YOLO-OBB's corners, both x1 y1 x2 y2 in pixels."""
    folder = Path(f"{width}x{height}").resolve()
    folder.mkdir()
    Image.new("RGB", (width, height)).save(folder / "a.png")
    value = {"x": 100 * 400 / width, "y": 100 * 340 / height, "width": 100 * 160 / width, "height": 100 * 40 / height,
             "rotation": 30, "rectanglelabels": ["knife"]}
    result = {"id": "r1", "from_name": "label", "to_name": "image", "type": "rectanglelabels", "value": value,
              "original_width": width, "original_height": height, "image_rotation": 0}
    task = {"id": 1, "data": {"image": str(folder / "a.png")}, "annotations": [{"id": 1, "result": [result]}]}
    (folder / "tasks.json").write_text(json.dumps([task]))
    converter = Converter(CONFIG, str(folder), download_resources=False)
    converter.convert_to_coco(str(folder / "tasks.json"), str(folder / "coco"), is_dir=False)
    x, y, w, h = json.loads((folder / "coco/result.json").read_text())["annotations"][0]["bbox"]
    converter.convert_to_yolo(str(folder / "tasks.json"), str(folder / "obb"), is_dir=False, is_obb=True)
    numbers = [float(v) for v in (folder / "obb/labels/a.txt").read_text().split()[1:]]
    xs, ys = [v * width for v in numbers[::2]], [v * height for v in numbers[1::2]]
    return [round(v, 2) for v in (x, y, x + w, y + h)], [round(v, 2) for v in (min(xs), min(ys), max(xs), max(ys))]

coco, obb = boxes(640, 480)
square_coco, square_obb = boxes(640, 640)
print("640 x 480: COCO", coco, " YOLO-OBB", obb)
print("640 x 640: COCO", square_coco, " YOLO-OBB", square_obb)
as_seen = (coco == [373.33, 340.0, 538.56, 434.64] and obb == [380.0, 340.0, 538.56, 454.64]
           and square_coco == square_obb == [380.0, 340.0, 538.56, 454.64])
sys.exit(0 if as_seen else "no longer as described")
PYTHON
