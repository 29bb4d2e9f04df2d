#!/bin/sh
# Label Studio's COCO export of a phone's photograph: the picture's size lies down, its rectangles stand up, and its
# polygons are in a mixture of both.
#
# label-studio-sdk 2.1.2 with Pillow 12.3.0.
# The photograph is stored 400 x 200 and its EXIF turns it, so that the annotator's browser shows it, and measures it,
# as 200 x 400 (original_width 200, original_height 400). One object is outlined twice, by a rectangle and by a
# polygon with the same corners in percent. In one and the same result.json
#     images[0] is 400 x 200 (read from the file, not from the annotation),
#     the rectangle is [20, 40, 60, 160] (percent of 200 x 400),
#     the polygon's box is [40, 20, 120, 80] (percent of 400 x 200).
# The VOC export of the same task says 200 x 400. So neither the picture's size nor a reader that ignores EXIF helps:
# the rectangles only fit the upright picture, the polygons fit neither view.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q label-studio-sdk==2.1.2 pillow==12.3.0
venv/bin/python - <<'PYTHON'
import json, re, sys
from pathlib import Path
from PIL import Image
from label_studio_sdk.converter import Converter

here = Path.cwd()
exif = Image.Exif()
exif[0x0112] = 6  # the viewer turns it by 90 degrees
Image.new("RGB", (400, 200)).save("phone.jpg", exif=exif)
CONFIG = """<View><Image name="image" value="$image"/>
<RectangleLabels name="box" toName="image"><Label value="cup"/></RectangleLabels>
<PolygonLabels name="outline" toName="image"><Label value="cup"/></PolygonLabels></View>"""
common = {"to_name": "image", "original_width": 200, "original_height": 400, "image_rotation": 0}
rectangle = {"x": 10, "y": 10, "width": 30, "height": 40, "rotation": 0, "rectanglelabels": ["cup"]}
polygon = {"points": [[10, 10], [40, 10], [40, 50], [10, 50]], "closed": True, "polygonlabels": ["cup"]}
result = [{**common, "id": "r1", "from_name": "box", "type": "rectanglelabels", "value": rectangle},
          {**common, "id": "r2", "from_name": "outline", "type": "polygonlabels", "value": polygon}]
task = {"id": 1, "data": {"image": str(here / "phone.jpg")}, "annotations": [{"id": 1, "result": result}]}
Path("tasks.json").write_text(json.dumps([task]))
converter = Converter(CONFIG, str(here), download_resources=False)
converter.convert_to_coco("tasks.json", str(here / "coco"), is_dir=False)
coco = json.loads(Path("coco/result.json").read_text())
size = [coco["images"][0][key] for key in ("width", "height")]
boxes = [annotation["bbox"] for annotation in coco["annotations"]]
converter.convert_to_voc("tasks.json", str(here / "voc"), is_dir=False)
voc = [int(re.search(f"<{key}>(\\d+)<", Path("voc/Annotations/phone.xml").read_text())[1]) for key in ("width", "height")]
print("COCO: picture", size, "rectangle", boxes[0], "polygon", boxes[1])
print("VOC:  picture", voc)
as_seen = (size == [400, 200] and boxes == [[20, 40, 60, 160], [40, 20, 120, 80]] and voc == [200, 400])
sys.exit(0 if as_seen else "no longer as described")
PYTHON
