"""data.py: images, geometry, augmentation, batches, annotations, shapes, check and download."""

import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import sys
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen  # before conftest forbids it

import numpy as np
import pytest
import torch
from conftest import Python2Pickler, make_refer, plain_picture
from PIL import Image

import clip_model
import data
from clip_model import HiVGError, Tokenizer, download
from data import GroundingDataset, box_to_pixels, box_to_square, letterbox, load_image, normalise

TRAIN2014 = "images/mscoco/images/train2014"
COCO_NAME = "COCO_train2014_{:012d}.jpg"


def open_split(root, split="train", name="refcoco", side=64, **more):
    return GroundingDataset(name, split, root, side, **more)


def error_of(function, *args, **more):
    """The text of the HiVGError that a call raises, which is one line."""
    with pytest.raises(HiVGError) as caught:
        function(*args, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def zipped(files):
    """A zip archive of {name: bytes}."""
    with zipfile.ZipFile(archive := io.BytesIO(), "w") as target:
        for name, content in files.items():
            target.writestr(name, content)
    return archive.getvalue()


def command(monkeypatch, *words):
    """Run python data.py with these words. Returns what it exits with, None if it just ends."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, words)])
    try:
        data.main()
    except SystemExit as stop:
        return stop.code


def raise_keyboard_interrupt(*args, **more):
    raise KeyboardInterrupt


# -------------------------------------------------------------------------------------- image files


def test_odd_images_are_read_as_their_table_says(shared):
    """Each odd file gives an RGB image, upright and of its size, or an error that names it."""
    table = (shared / "odd_images/README.md").read_text()
    rows = re.findall(r"^\| (\S+\.\S+) \|.*\| (.*) \| (work|clear)", table, re.MULTILINE)
    assert len(rows) == 17
    pixels = {}
    for name, size, expected in rows:
        if expected == "clear":
            assert name in error_of(load_image, shared / "odd_images" / name)
            continue
        image = load_image(shared / "odd_images" / name)
        width, height = map(int, re.findall(r"\d+", size)[-2:])  # "stored ..., upright 320 x 208"
        assert (image.mode, image.size) == ("RGB", (width, height)), name
        square, geometry = data.preprocess(image, 64)
        assert square.shape == (3, 64, 64) and square.dtype == torch.uint8 and square.any()
        assert min(geometry.inner[2:]) >= 1 and geometry.region == (0, 0, width, height)
        pixels[name] = np.asarray(image).astype(float)
    assert (pixels["gray_l.jpg"] == pixels["gray_l.jpg"][..., :1]).all()
    assert abs(pixels["gray_16bit.png"].mean() - 128) < 5
    for name in ("cmyk_adobe.jpg", "exif_orientation_6.jpg", "exif_orientation_3.jpg"):
        red, _, blue = pixels[name][:20].mean(axis=(0, 1))
        assert blue > red + 20, name  # the sky is blue and at the top
    assert pixels["animated.gif"].mean() > 40  # the last frame is black
    assert pixels["one_pixel.png"].tolist() == [[[200, 30, 40]]]


def test_every_mode_becomes_rgb(tmp_path):
    """Alpha is laid over white. Images of 16 or 32 bits or floats become neither black nor white:
    their range ends at 1, 255, 4095 or 65535, also where the image does not reach it."""
    values = {"1": (1, 255), "L": (90, 90), "LA": ((9, 0), 255), "RGBA": ((9, 9, 9, 255), 9)}
    for mode, (colour, expected) in values.items():
        Image.new(mode, (9, 5), colour).save(tmp_path / "image.png")
        image = load_image(tmp_path / "image.png")
        assert (image.mode, image.getpixel((4, 2))) == ("RGB", (expected,) * 3), mode
    for dtype, white in (("f4", 1), ("u2", 255), ("u2", 4095), ("u2", 65535), ("i4", 65535)):
        for share in (0.6, 1.0):
            values = np.linspace(0, white * share, 256).reshape(16, 16).astype(dtype)
            Image.fromarray(values).save(tmp_path / "image.tiff")
            found = np.asarray(load_image(tmp_path / "image.tiff"))[..., 1].flatten()
            assert np.abs(found - np.linspace(0, 255 * share, 256)).max() <= 1.01, (dtype, white)


def test_unreadable_images_are_one_sentence(tmp_path):
    """A file that is missing, empty, a folder, text, half a JPEG, or claims 30000 x 30000 pixels is
    named."""
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "text.jpg").write_text("this is not an image\n")
    (tmp_path / "bomb.ppm").write_bytes(b"P6 30000 30000 255\n" + bytes(99))
    plain_picture(200, 200).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: len(content) * 2 // 3])
    for name in ("absent.jpg", "empty.jpg", "folder.jpg", "text.jpg", "half.jpg", "bomb.ppm"):
        assert name in error_of(load_image, tmp_path / name)
    assert "pixels" in error_of(load_image, tmp_path / "bomb.ppm")  # nothing of it is decoded


def test_exif_rotation(tmp_path):
    """A user's photograph is turned upright; a data set's image stays as its boxes count."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image = plain_picture(60, 40, (0, 0, 20, 20))
    row = {"image": image, "bbox": [0, 0, 20, 20], "save": {"exif": exif, "quality": 95}}
    dataset = open_split(make_refer(tmp_path, [row]), side=60)
    upright = load_image(dataset.samples[0].image)
    assert upright.size == (40, 60) and upright.getpixel((35, 5))[1] < 60  # red, at the right
    item = dataset[0]
    assert item["inner"].tolist() == [0, 10, 60, 40]
    assert item["image"][1, 12:28, 2:18].max() < 70 and item["image"][1, 12:48, 40:].min() > 100
    assert (item["box"] * 60).tolist() == pytest.approx([10, 20, 20, 20], abs=1e-4)


# ----------------------------------------------------------------------------- the square, and back

INNER = {  # size of an image: left, top, width, height in a square of 224
    (640, 480): (0, 28, 224, 168),
    (333, 500): (38, 0, 149, 224),
    (2000, 8): (0, 112, 224, 1),
    (8, 5000): (112, 0, 1, 224),
    (1, 1): (0, 0, 224, 224),
}


@pytest.mark.parametrize("size", INNER)
def test_an_image_in_its_square(size):
    """The long side fills the square, padding is even, the short side has a pixel at least; a box
    comes back from the square as it was."""
    geometry = letterbox((0, 0, *size), 224)
    left, top, width, height = geometry.inner
    assert geometry == ((0, 0, *size), INNER[size], 224)
    whole = box_to_square((0, 0, *size), geometry) * 224
    assert whole.tolist() == pytest.approx([left + width / 2, top + height / 2, width, height])
    rng = random.Random(0)
    for _ in range(50):
        (x1, x2), (y1, y2) = (sorted(rng.uniform(0, length) for _ in "12") for length in size)
        square = box_to_square((x1, y1, x2, y2), geometry)
        assert square.dtype == torch.float32 and (square >= 0).all() and (square <= 1).all()
        assert box_to_pixels(square, geometry).tolist() == pytest.approx([x1, y1, x2, y2], abs=2e-3)


def test_boxes_are_cut_at_the_region():
    """A predicted box comes back inside the image; an annotated one is cut at the crop. Both follow
    the crop's place and scale."""
    boxes = torch.tensor([[[0.5, 0.5, 2.0, 2.0]], [[0.5, 0.0, 0.1, 0.1]]])
    found = box_to_pixels(boxes, letterbox((0, 0, 640, 480), 224))
    assert found[0].tolist() == [[0, 0, 640, 480]] and found[1, 0, 1] == found[1, 0, 3] == 0
    crop = letterbox((100, 60, 420, 220), 224, long_side=128, shares=(1, 0.25))
    assert crop.inner == (96, 40, 128, 64)
    square = box_to_square((20, 100, 180, 140), crop)
    assert (square * 224).tolist() == pytest.approx([96 + 16, 40 + 24, 32, 16], abs=1e-4)
    assert box_to_pixels(square, crop).tolist() == pytest.approx([100, 100, 180, 140], abs=1e-3)


def test_normalise():
    """The model's input is (x / 255 - mean) / std of an image, 0 and marked in its padding."""
    mean, std = torch.tensor([0.1, 0.5, 0.7]), torch.tensor([0.2, 0.3, 0.4])
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    inner = torch.tensor([[0, 2, 8, 3], [5, 0, 2, 8], [0, 0, 8, 8]])
    found, padding = normalise(images, inner, mean.tolist(), std.tolist())
    for image, (left, top, width, height), result, mask in zip(images, inner, found, padding):
        marked = torch.ones(8, 8, dtype=torch.bool)
        marked[top : top + height, left : left + width] = False
        expected = (image / 255 - mean[:, None, None]) / std[:, None, None] * ~marked
        torch.testing.assert_close(result, expected)
        assert torch.equal(mask, marked)


# ------------------------------------------------------------------------------------- augmentation

GREEN_BOXES = {  # size of an image: box
    (640, 480): (400, 100, 560, 300),
    (333, 500): (5, 300, 100, 480),
    (1400, 400): (600, 40, 760, 360),
    (120, 150): (10, 10, 70, 100),
}


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """A data set of green boxes on grey, with two expressions each."""
    rows = []
    for size, (x1, y1, x2, y2) in GREEN_BOXES.items():
        image = plain_picture(*size, (x1, y1, x2, y2), (0, 255, 0))
        row = {"image": image, "bbox": [x1, y1, x2 - x1, y2 - y1], "texts": ["it", "left one"]}
        rows.append(row | {"save": {"quality": 95, "subsampling": 0}})
    return make_refer(tmp_path_factory.mktemp("painted"), rows)


@pytest.mark.parametrize("augment", [False, True])
def test_a_box_covers_its_object(painted, augment):
    """However an image is cropped, scaled and placed, the box in the square is where the object is
    drawn and its centre is seen; `inner` is where there is image, the rest is black."""
    dataset, widths, greys = open_split(painted, side=112, augment=augment), set(), set()
    for epoch in range(12 if augment else 1):
        dataset.set_epoch(0, 0, epoch)
        for index in range(len(dataset)):
            item = dataset[index]
            image = item["image"].int()
            green = image[1] - image[0] > 51  # jitter leaves it greener than grey
            rows, columns = torch.where(green)
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            cx, cy, w, h = (item["box"] * 112).tolist()
            expected = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
            assert np.abs(np.array(found) - np.array(expected)).max() < 2, (epoch, index)
            assert green[int(cy), int(cx)]
            _, padding = normalise(item["image"][None], item["inner"][None], (0, 0, 0), (1, 1, 1))
            assert torch.equal(image.any(dim=0), ~padding[0])
            widths.add(round(w))
            greys.add(image[0][~green & ~padding[0]].median().item())
    assert not augment or min(len(widths), len(greys)) > 10  # sizes and colours differ


def test_crops_keep_the_centre_and_spare_words_of_place():
    """About half are crops, of 384 to 600 pixels a side where the short side has 400 to 600; they
    contain the box's centre. An expression with a word of place has none. The long side in the
    square is S, 6/7 S, ... or S/4, and its place is random."""
    size, box, crops, long_sides, lefts = (640, 300), (500.0, 10.0, 638.0, 120.0), 0, set(), set()
    for seed in range(300):
        region, inner, _ = data.random_geometry(random.Random(seed), size, box, "the dog", 224)
        x1, y1, x2, y2 = region
        assert 0 <= x1 <= 569 <= x2 <= 640 and 0 <= y1 <= 65 <= y2 <= 300
        if region != (0, 0, *size):
            crops += 1
            assert 191.9 <= x2 - x1 <= 450.1 and 191.9 <= y2 - y1
        left, top, width, height = inner
        assert 0 <= left <= 224 - width and 0 <= top <= 224 - height
        long_sides.add(max(width, height))
        lefts.add(left)
        for word in ("leftmost", "right", "top", "bottom", "middle"):
            text = f"the {word} dog"
            uncropped = data.random_geometry(random.Random(seed), size, box, text, 224)
            assert uncropped.region == (0, 0, *size)
    assert 100 < crops < 200 and long_sides == {224, 192, 160, 128, 96, 64, 56} and len(lefts) > 50


def test_augmentation_follows_from_the_numbers_and_the_index(painted):
    """The same numbers of set_epoch and the same index give the same item, in any process and after
    any others; other numbers give another."""

    def image(*numbers, index, before=()):
        dataset = open_split(painted, augment=True)
        dataset.set_epoch(*numbers)
        for other in before:
            dataset[other]
        return dataset[index]["image"]

    first = image(0, 1, 2, index=3)
    assert torch.equal(first, image(0, 1, 2, index=3, before=(5, 0, 3)))
    for numbers, index in (((1, 1, 2), 3), ((0, 2, 2), 3), ((0, 1, 3), 3), ((0, 1, 2), 2)):
        assert not torch.equal(first, image(*numbers, index=index)), (numbers, index)
    dataset = open_split(painted, augment=True)
    dataset.set_epoch(0, 1, 2)
    for workers in (0, 2):
        batches = list(data.read_batches(dataset, torch.tensor([[1, 3], [2, 0]]), workers))
        assert torch.equal(batches[0]["image"][1], first)
        assert torch.equal(batches[1]["image"][0], image(0, 1, 2, index=2))


# ------------------------------------------------------------------------------------------ batches


def test_batches(refer_root, tokenizer):
    """A batch has the items in the order asked for: bytes, a quarter of what floats would take, and
    the tokens that the tokenizer gives, cut to the longest text."""
    dataset = open_split(refer_root, tokenizer=tokenizer)
    plain, kept = (open_split(refer_root, cache=cache) for cache in (False, True))
    for workers in (0, 1):
        (batch,) = data.read_batches(dataset, [[5, 0, 2]], workers)
        assert batch["text"] == ["blue one", "red one", "red one"]
        assert batch["image"].nbytes == 3 * 3 * 64 * 64 and batch["image"].dtype == torch.uint8
        assert batch["inner"].dtype == batch["tokens"].dtype == torch.int64
        assert torch.equal(batch["tokens"], tokenizer(batch["text"])[:, :4])
        for row, index in enumerate((5, 0, 2)):
            for key in ("image", "inner", "box", "object"):
                expected = torch.as_tensor(plain[index][key])
                assert torch.equal(batch[key][row], expected)
                for _ in range(2):
                    assert torch.equal(torch.as_tensor(kept[index][key]), expected)
    assert "tokens" not in plain[0]
    for text in ("", "one two", "one two three", "one " * 200):
        whole = tokenizer([text, "red"])
        length = max(int((row != 0).sum()) for row in whole)
        assert torch.equal(data.trim_to_longest(whole), whole[:, :length])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_the_reading_by_its_name(tmp_path, workers):
    """Also in a worker it is one sentence with the file, without the worker's traceback."""
    make_refer(tmp_path, [{}, {}])
    path = tmp_path / TRAIN2014 / COCO_NAME.format(2)
    path.write_bytes(path.read_bytes()[:400])
    batches = data.read_batches(open_split(tmp_path), [[0], [0, 1]], workers)
    assert next(batches)["text"] == ["red one"]
    text = error_of(next, batches)
    assert text.startswith(f"{path} cannot be read") and "Traceback" not in text


def test_epoch_batches():
    """Each sample is in at most one batch, the number of batches is a multiple of the last
    argument, and the order follows from the numbers alone."""
    batches = data.epoch_batches((0, 1, 2), 103, 10, 4)
    assert batches.shape == (8, 10) and len(set(batches.flatten().tolist())) == 80
    assert set(batches.flatten().tolist()) <= set(range(103))
    assert torch.equal(batches, data.epoch_batches((0, 1, 2), 103, 10, 4))
    assert len(data.epoch_batches((0,), 103, 10)) == 10
    for numbers in ((0, 1, 3), (0, 2, 2), (1, 1, 2)):
        assert not torch.equal(batches, data.epoch_batches(numbers, 103, 10, 4))


def test_default_workers(monkeypatch):
    """As many as this process may use CPUs, shared by the processes of the machine, 8 at most."""
    for cpus, processes, expected in ((16, 1, 8), (3, 1, 3), (16, 4, 4), (2, 4, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cpus=cpus: range(cpus))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert data.default_workers(["refcoco"]) == expected


def test_packed_samples():
    """It is indexed and iterated over as a list is."""
    samples = [data.Sample(f"{i}.jpg", "é" * i, (i, 0.5, 2.0, 3.0), (i, 1)) for i in range(5)]
    packed = data.PackedSamples(samples)
    assert list(packed) == samples and len(packed) == 5 and list(data.PackedSamples()) == []
    for index in (0, 4, -1, -5, torch.tensor(2)):
        assert packed[index] == samples[index]
    for index in (5, -6):
        with pytest.raises(IndexError):
            packed[index]


# ------------------------------------------------------------------------------ annotation families

XYXY, XYWH = (10.25, 10.0, 30.5, 30.0), (10.25, 10.0, 20.25, 20.0)
FILES = {"coco": COCO_NAME.format(1), "referit": "38942.jpg", "flickr": "1000092795.jpg"}
FILES["own"] = "mine/cup.jpg"


class Protocol0Pickler(Python2Pickler):
    """Writes str as Python 2 does in protocol 0: S'Caf\\xe9'."""

    dispatch = dict(Python2Pickler.dispatch)

    def save_str(self, text):
        self.write(b"S" + repr(text.encode("latin-1"))[1:].encode() + b"\n")
        self.memoize(text)

    dispatch[str] = save_str


def put_image(root, kind, file=None):
    """Write an image with XYXY's object into the first place of its kind. Returns its path."""
    file = file or FILES[kind]
    path = root / data.IMAGE_PLACES[kind][0].format(name=file, path=file)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain_picture().save(path)
    return str(path)


def write_pickle(path, content, how):
    """how: torch's zip, its legacy format, or a pickle of protocol 0 or 2; from Python 2 or 3."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if how in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
        return
    parts = [torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True}, content, []]
    pickler = {"0": Protocol0Pickler, "2": Python2Pickler}.get(how[-1], pickle.Pickler)
    with open(path, "wb") as file:
        for part in parts if how.startswith("legacy") else [content]:
            pickler(file, protocol=0 if how[-1] == "0" else 2).dump(part)


def write_family(root, name, family, how, split="train", text=" The RED Café "):
    """Two expressions of one object in the format of a family of files, with its image."""
    info = data.DATASETS[name]
    file, path = FILES[info.images], root / info.files[family].format(split)
    put_image(root, info.images)
    size, texts = {"height": 40, "width": 60}, (text, "it's")
    if family == "refer":
        row = {"bbox": list(XYWH), "texts": texts, "split": split}
        make_refer(root, [row], path.parent.name, path.name[5:-3])
        refs = pickle.loads(path.read_bytes(), encoding="latin-1")
        refs[0]["sentences"][0]["raw"] = "As typed."
        write_pickle(path, refs, how)
    elif family == "index":
        if info.images == "coco":
            entries = [(file, size, list(XYWH), text, [("r1", ["red"])]) for text in texts]
        elif info.images == "referit":
            entries = [(file, [60, 40], XYXY, text, "38942_1.mat") for text in texts]
        else:
            entries = [(file, list(XYXY), text) for text in texts]
        write_pickle(path, entries, how)
    elif family == "mdetr":
        path.parent.mkdir(parents=True, exist_ok=True)
        images = [{"id": 7 + i, "file_name": file, **size, "caption": texts[i]} for i in range(2)]
        boxes = [{"id": 99 - i, "image_id": 7 + i, "bbox": XYWH} for i in range(2)]
        path.write_text(json.dumps({"images": images, "annotations": boxes}))
    else:
        lines = [json.dumps({"image": file, "text": text, "box": XYXY}) for text in texts]
        path.write_text("\n".join(lines), encoding="utf-8")


HOW = {  # ways in which the files of a family are written
    "refer": ("python 2, protocol 0", "python 2, protocol 2", "python 3"),
    "index": ("zip", "legacy", "pickle", "python 2, protocol 2", "legacy, python 2"),
    "mdetr": ("json",),
    "own": ("json",),
}
CASES = [(n, f, h) for n, info in data.DATASETS.items() for f in info.files for h in HOW[f]]


@pytest.mark.parametrize(
    "name, family, how", [case for case in CASES if case[0] not in data.SHAPES_SETS]
)
def test_every_data_set_in_every_family(tmp_path, name, family, how):
    """From files in the real formats come the same samples: text as it is written, a box of corners
    with its fractions, the path of the image, and its size where it is certain."""
    splits = ["train"] if family == "refer" else list(data.DATASETS[name].splits[:2])
    for split in splits:
        write_family(tmp_path, name, family, how, split)
    dataset, kind = open_split(tmp_path, name=name, side=60), data.DATASETS[name].images
    image, size = put_image(tmp_path, kind), (60, 40) if kind == "coco" else None
    upright = family == "own"
    expected = [(image, text, XYXY, size, upright) for text in ("The RED Café", "it's")]
    assert list(dataset.samples) == expected and not dataset.report
    assert list(data.read_annotations(name, tmp_path)) == splits
    first, second = dataset
    assert first["object"] == second["object"]
    assert (first["image"][0, 22:38, 12:28] > 204).all()  # red, below 10 pixels of padding
    assert (first["box"] * 60).tolist() == pytest.approx([20.375, 30, 20.25, 20], abs=1e-4)


def test_places_of_files(tmp_path):
    """refer's files count before index lists, these before MDETR's; all may lie one folder below.
    Images may lie in the authors' folders or others that are usual, with COCO 2017's names too."""
    image = Path(put_image(tmp_path, "coco"))
    for family in ("mdetr", "index", "refer"):
        write_family(tmp_path / family, "refcoco", family, HOW[family][0], text=family)
        assert open_split(tmp_path).samples[0].text == family
    folders = ("other/images/mscoco/images/train2014", "train2014", "images/train2014")
    for place in [f"{folder}/{image.name}" for folder in folders] + ["train2017/000000000001.jpg"]:
        (tmp_path / place).parent.mkdir(parents=True)
        image = image.rename(tmp_path / place)
        assert open_split(tmp_path).samples[0].image == str(image)


def test_published_photographs(shared):
    """The real photographs in RefCOCO's layout: 36, 12, 8 and 8 expressions, boxes inside."""
    annotations = {"refcoco": data.read_annotations("refcoco", shared / "photos")}
    for split, count in {"train": 36, "val": 12, "testA": 8, "testB": 8}.items():
        dataset = open_split(shared / "photos", split, annotations=annotations)
        assert len(dataset) == count and not dataset.report
        for index, sample in enumerate(dataset.samples):
            x1, y1, x2, y2 = sample.box
            assert 0 <= x1 < x2 <= sample.size[0] and 0 <= y1 < y2 <= sample.size[1]
            item = dataset[index]
            assert item["text"] == sample.text and item["image"].float().std() > 30


def test_annotations_are_read_once_for_all_splits(tmp_path, monkeypatch):
    """What read_annotations gives serves every split; its files are parsed once."""
    make_refer(tmp_path, [{"split": split} for split in data.REFCOCO_SPLITS])
    parsed, load = [], json.load
    monkeypatch.setattr(json, "load", lambda file, **more: parsed.append(1) or load(file, **more))
    annotations = {"refcoco": data.read_annotations("refcoco", tmp_path)}
    for number, split in enumerate(data.REFCOCO_SPLITS, start=1):
        (sample,) = open_split(tmp_path, split, annotations=annotations).samples
        assert sample.image.endswith(COCO_NAME.format(number))
    assert parsed == [1]


def test_what_was_left_out_or_changed_is_reported(tmp_path):
    """Boxes that stick out are clipped, those without area and empty expressions are left out, and
    the report counts them. A box in an image of unknown size is cut when the image is read."""
    rows = [
        {"texts": ["a", " ", ""]},
        {"texts": ["out"], "bbox": [-5.5, 10, 20, 100]},
        {"bbox": [10, 10, 0, 5], "ref_id": 77},
        {"bbox": [70, 10, 20, 20], "ref_id": 78},
        {"split": "val", "bbox": [0, 0, 60, 40]},
    ]
    train = open_split(make_refer(tmp_path, rows))
    found = [(sample.text, sample.box) for sample in train.samples]
    assert found == [("a", (10, 10, 30, 30)), ("out", (0, 10, 14.5, 40))]
    no_area = "1 box without area left out, ref_id"
    lines = {f"{no_area} 77", f"{no_area} 78", "2 empty expressions left out"}
    assert set(train.report) == lines | {"1 boxes clipped to their image"}
    assert not open_split(tmp_path, "val").report
    boxes = [-5, 10, 30, 60], [99, 99, 120, 120], [10, 10, 10, 30], [float("nan"), 0, 9, 9]
    boxes += ([10, 10, 30, 30],) * 12  # most are as they should be
    lines = [{"image": f"{TRAIN2014}/{FILES['coco']}", "text": "it", "box": box} for box in boxes]
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, lines)))
    own = open_split(tmp_path, "val", "own", 60)
    assert (own[0]["box"] * 60).tolist() == pytest.approx([15, 35, 30, 30], abs=1e-4)
    assert own[0]["object"] != own[1]["object"]  # the image is the same
    report = "; ".join(own.report)
    assert "clipped" in report and "left out, entry 3" in report and "left out, entry 4" in report
    own = open_split(tmp_path, "val", "own", 60, augment=True)
    assert all(own[index]["box"].isfinite().all() for index in (0, 1))


MIXTURE = {  # index list: numbers of images
    "unc/unc_train.pth": (0, 1, 1, 2, 4),
    "unc/unc_val.pth": (4, 5),
    "unc/unc_testA.pth": (3,),
    "gref_umd/gref_umd_train.pth": (0, 3, 5),
    "gref_umd/gref_umd_val.pth": (1,),
    "gref_umd/gref_umd_test.pth": (2,),
}


def test_several_data_sets_at_once(tmp_path):
    """One follows the other. Training expressions on images that another set tests on are left out
    and counted, though not those on images of its own tests; what cannot be left out is told."""
    for path, numbers in MIXTURE.items():
        files = [COCO_NAME.format(number) for number in numbers]
        entries = [(file, None, XYWH, f"{path[:3]} {file[-5]}", None) for file in files]
        write_pickle(tmp_path / path, entries, "zip")
        for file in files:
            put_image(tmp_path, "coco", file)
    names = ["refcoco", "refcocog"]
    annotations = {name: data.read_annotations(name, tmp_path) for name in names}
    for given in (None, annotations):
        both = open_split(tmp_path, name=names, annotations=given)
        assert [sample.text for sample in both.samples] == ["unc 0", "unc 4", "gre 0"]
        refcoco, refcocog, absent = both.report
        assert refcoco.startswith("refcoco: 3 expr") and refcocog.startswith("refcocog: 2 expr")
        assert absent.startswith("refcoco testB is not there")
    objects = [item["object"] for item in both]
    assert objects[0] == objects[2] != objects[1]
    assert len(open_split(tmp_path)) == 5 and not open_split(tmp_path).report
    assert [len(open_split(tmp_path, split, names)) for split in ("val", "testA")] == [3, 1]
    text = error_of(open_split, tmp_path, name=["refcoco", "referit"])
    assert "no expressions of referit" in text


# -------------------------------------------------------------------------------- wrong annotations


def test_missing_files_are_one_sentence(tmp_path):
    """It says what is missing, where it was looked for and where to get it; for a data set or split
    that does not exist, what there is to choose from."""
    absent = tmp_path / "absent"
    for name, info in data.DATASETS.items():
        text = error_of(open_split, absent, name=name)
        files = [file.format("train") for file in info.files.values()]
        assert all(part in text for part in (str(absent), " or ".join(files), info.help))
        assert files[0] in error_of(data.check_files, name, absent)
    assert "Entities' own XML" in error_of(open_split, absent, name="flickr30k")
    assert "refcoco, refcoco+, refcocog" in error_of(open_split, absent, name="coco")
    make_refer(tmp_path, [{"split": "testA", "texts": ["a"]}, {"image": None}])
    assert [sample.text for sample in open_split(tmp_path, "testA").samples] == ["a"]
    for split in ("test", "tra", "Val", ""):
        assert "train, val, testA, testB" in error_of(open_split, tmp_path, split)
    assert "'testB'" in error_of(open_split, tmp_path, "testB")
    text = error_of(open_split, tmp_path)
    assert f"{TRAIN2014}/{COCO_NAME.format(2)}" in text and "cocodataset.org" in text


def test_annotations_that_do_not_fit_are_one_sentence(tmp_path):
    """It names the file and the way out: an image that is not the annotated one, instances.json
    that does not fit to refs(...).p, a broken line of own data (with its number)."""
    make_refer(tmp_path, [{"size": (40, 60)}])
    text = error_of(open_split(tmp_path).__getitem__, 0)
    assert COCO_NAME.format(1) in text and "60 x 40" in text and "40 x 60" in text
    instances = tmp_path / "refcoco/instances.json"
    for content in ("{", "[]", '{"images": []}', '{"images": [], "annotations": []}', None):
        instances.unlink() if content is None else instances.write_text(content)
        text = error_of(open_split, tmp_path)
        assert "refs(unc).p" in text and "data.py download" in text
    good = '{"image": "cup.jpg", "text": "the cup", "box": [1, 2, 3, 4]}'
    bad = {"}": "", "[1, 2, 3, 4]": "[1, 2, 3]", "4]": "null]", '"the cup"': "5", good: "[1, 2]"}
    for old, new in [*bad.items(), ("cup.jpg", "../cup.jpg"), ("cup.jpg", "/cup.jpg")]:
        lines = [good, good.replace(old, new), good]
        (tmp_path / "train.jsonl").write_text("\n".join(lines))
        text = error_of(open_split, tmp_path, name="own")
        assert "train.jsonl, entry 2, " in text and "the red cup" in text


MKDIR = "cos\nmkdir\n(S'{}'\ntR."  # a pickle that makes a folder if code is allowed


@pytest.mark.parametrize("how", ["refer", "zip", "legacy", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, how):
    """It is named, nothing in it is run, and nobody is told to trust it."""
    evil, path = MKDIR.format(tmp_path / "ran").encode(), tmp_path / "unc/unc_train.pth"
    path.parent.mkdir()
    if how == "refer":
        path = make_refer(tmp_path, [{}]) / "refcoco/refs(unc).p"
    legacy = b"".join(map(pickle.dumps, (torch.serialization.MAGIC_NUMBER, 1001, {}))) + evil
    path.write_bytes({"zip": zipped({"unc/data.pkl": evil}), "legacy": legacy}.get(how, evil))
    text = error_of(open_split, tmp_path)
    assert str(path) in text and "cannot be read" in text
    assert "mkdir" in text and "weights_only" not in text
    assert not (tmp_path / "ran").exists()
    pickle.loads(evil)
    assert (tmp_path / "ran").exists()  # where code is allowed it does run


@pytest.fixture
def little_memory():
    """What a damaged file claims, 1 GB and more, is refused at once."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


DAMAGED = ["refcoco/refs(unc).p", "refcoco/instances.json", f"{TRAIN2014}/{COCO_NAME.format(1)}"]
DAMAGED += ["unc+/unc+_train.pth", "own/train.jsonl", "own/b.png"]


@pytest.mark.filterwarnings("ignore")  # Pillow's, of the sizes that headers claim
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by Linux's means")
@pytest.mark.parametrize("file", DAMAGED)
def test_damaged_files_are_read_or_told(tmp_path, tokenizer, little_memory, file):
    """Whatever the bytes of a user's file, its items can be had, with boxes inside the square, or
    there is a HiVGError of one line."""
    make_refer(tmp_path, [{}, {"texts": ["the blue one", "left"]}])
    (tmp_path / "own").mkdir()
    plain_picture().save(tmp_path / "own/b.png")
    entry = (FILES["coco"], {"height": 40, "width": 60}, [10, 10, 20, 20], "red one", [])
    write_pickle(tmp_path / "unc+/unc+_train.pth", [entry] * 2, "zip")
    line = json.dumps({"image": "b.png", "text": "red one", "box": [10, 10, 30, 30]})
    (tmp_path / "own/train.jsonl").write_text(f"{line}\n{line}\n")
    names = {"unc+": ("refcoco+", tmp_path), "own": ("own", tmp_path / "own")}
    name, root = names.get(file.split("/")[0], ("refcoco", tmp_path))
    content, rng, told = (tmp_path / file).read_bytes(), random.Random(file), 0
    for number in range(200):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            start, length = rng.randrange(len(content)), rng.randint(1, 6)
            damaged[start : start + length] = rng.randbytes(length)
        if number % 3 == 0:
            del damaged[rng.randrange(len(content)) :]
        (tmp_path / file).write_bytes(damaged)
        more = {"tokenizer": tokenizer, "augment": number % 2 == 0}
        try:
            items = list(open_split(root, name=name, side=32, **more))
        except HiVGError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error)
            told += 1
            continue
        for item in items:
            cx, cy, w, h = item["box"].tolist()
            assert min(w, h) >= 0 and min(cx - w / 2, cy - h / 2) >= -1e-6
            assert max(cx + w / 2, cy + h / 2) <= 1 + 1e-6 and item["text"].strip()
    assert told > 20


# ------------------------------------------------------------------------------ the shapes data set

ATTRIBUTES = "small big red orange yellow green blue pink black".split()
ATTRIBUTES += "circle square triangle diamond star cross".split()
SYNONYMS = {"round thing": "circle", "plus sign": "cross", "little": "small", "tiny": "small"}
SYNONYMS |= {"large": "big", "disc": "circle", "box": "square", "rhombus": "diamond"}
MEANINGS = {  # the words for each
    "any": "{}",
    "most left": "left most {}|leftmost {}|{} furthest to the left",
    "most right": "right most {}|rightmost {}|{} furthest to the right",
    "most top": "top most {}|highest {}|uppermost {}",
    "most bottom": "bottom most {}|lowest {}|{} furthest down",
    "left": "left {}|{} on the left|{} on left side|{} left of {}|{} to the left of {}",
    "right": "right {}|{} on the right|{} on right side|{} right of {}|{} to the right of {}",
    "top": "top {}|upper {}|{} at the top|{} above {}|{} over {}",
    "bottom": "bottom {}|lower {}|{} at the bottom|{} below {}|{} under {}|{} beneath {}",
    "top left": "top left {}|{} in the top left corner|{} upper left",
    "top right": "top right {}|{} in the top right corner|{} upper right",
    "bottom left": "bottom left {}|{} in the bottom left corner|{} lower left",
    "bottom right": "bottom right {}|{} in the bottom right corner|{} lower right",
    "middle": "middle {}|center {}|{} in the middle",
    "most near": "{} closest to {}|{} nearest to {}|{} next to {}",
    "most far": "{} farthest from {}|{} furthest away from {}",
}


def understand(text):
    """(meaning, template, [the attributes of each shape spoken of]): the one reading of a text."""
    for phrase, word in SYNONYMS.items():
        text = re.sub(rf"\b{phrase}\b", word, text)
    readings = []
    for meaning, templates in MEANINGS.items():
        for template in templates.split("|"):
            pattern = "(?:the |an? )?" + template.replace("{}", "(?:the )?(.+)")
            found = re.fullmatch(pattern, text)
            said = [set(part.split()) for part in found.groups()] if found else [{"nothing"}]
            said = [words - {"one", "thing", "shape", "object"} for words in said]
            if all(words <= set(ATTRIBUTES) for words in said):
                readings.append((meaning, template, said))
    (reading,) = readings
    return reading


def degree(meaning, x, y):
    """How far it is true of a shape at x (to the right) and y (down), in shares of the side."""
    if meaning == "middle":
        return 0.25 - max(abs(x), abs(y))
    if meaning in ("most near", "most far"):
        return math.hypot(x, y) * (1 if meaning == "most far" else -1)
    along = {"left": -x, "right": x, "top": -y, "bottom": y}
    return min(along[word] for word in meaning.split() if word in along)


def position(shape, other=None):
    """x, y of a shape's centre from the middle of the image, or from that of another shape."""
    x1, y1, x2, y2 = np.array(shape.box) / (2 * data.SIDE)  # boxes count in half pixels
    x, y = position(other) if other else (0, 0)
    return (x1 + x2 - 1) / 2 - x, (y1 + y2 - 1) / 2 - y


def test_expressions_are_true_of_exactly_one_shape():
    """Read by this file's own grammar, each is true of its shape and of no other, with a margin of
    0.12 of the side, or 0.1 before the next one. All wordings occur. Captions are true."""
    used, needed = set(), []
    jobs = [(*item, n) for item in data.SHAPES_SPLITS.items() for n in range(150)]
    for split, wanted, number in jobs:
        shapes, texts, captions, _ = data.make_scene((split, number, wanted))
        for text, index in texts.items():
            meaning, template, said = understand(text)
            used.add(template)
            target, other = shapes[index], None
            rivals = [shape for shape in shapes if said[0] <= set(shape[:3])]
            rivals.remove(target)
            if len(said) == 2:
                (other,) = [shape for shape in shapes if said[1] <= set(shape[:3])]
                assert other != target, text
                rivals = [shape for shape in rivals if shape != other]
            if meaning == "any":
                assert not rivals, text
                continue
            needed.append(len(rivals) > 0)
            x, y = position(target, other)
            value = degree(meaning, x, y)
            most = max((degree(meaning, *position(rival, other)) for rival in rivals), default=-9)
            if "most" in meaning:
                assert rivals and value - most > 0.1 - 1e-9, text
                continue
            if other:  # "left of" is not said of what lies rather above
                value -= 0.6 * abs(y if meaning in ("left", "right") else x)
            assert value > 0.12 - 1e-9 and most <= 1e-9, text
        assert bool(captions) == (split == "train")
        for part in [part for text in captions for part in re.split(" and |, ", text)]:
            meaning, _, (said,) = understand(part)
            able = [position(shape) for shape in shapes if said <= set(shape[:3])]
            assert any(meaning == "any" or degree(meaning, *at) > 0.12 - 1e-9 for at in able), part
    assert used == {t for templates in MEANINGS.values() for t in templates.split("|")}
    assert np.mean(needed) > 0.5  # mostly the attributes alone would not be enough


make_scene = data.make_scene


def make_scene_again(job):
    """The first five scenes of train are val's."""
    split, number, wanted = job
    if split == "train" and number < 5:
        return make_scene(("val", number, data.SHAPES_SPLITS["val"]))
    return make_scene(job)


def test_shapes_on_disk(tmp_path, monkeypatch):
    """In RefCOCO's layout: no scene in two splits, boxes on their shapes, no relations in testA and
    only those in testB, each word one token of the vocabulary. The folder is whole or not there,
    made once, and each time with the same annotations. Reading makes nothing."""
    for split, wanted in list(data.SHAPES_SPLITS.items()):
        monkeypatch.setitem(data.SHAPES_SPLITS, split, wanted._replace(scenes=24))
    monkeypatch.setattr(data, "make_scene", make_scene_again)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "train_bpe", raise_keyboard_interrupt)
        data.make_shapes(tmp_path)
    assert "shapes/refs(unc).p" in error_of(open_split, tmp_path, name="shapes")
    folder, again = data.make_shapes(tmp_path), data.make_shapes(tmp_path / "again")
    changed = (folder / "refs(unc).p").stat().st_mtime_ns
    assert data.make_shapes(tmp_path) == folder == tmp_path / "shapes"
    assert (
        not list(tmp_path.glob(".generating*"))
        and (folder / "refs(unc).p").stat().st_mtime_ns == changed
    )
    for name in ("refs(unc).p", "instances.json", "captions.json", "bpe_vocab.txt.gz"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    tokenizer, images, is_coloured = Tokenizer(folder / "bpe_vocab.txt.gz"), {}, []
    for split in data.SHAPES_SPLITS:
        dataset = open_split(tmp_path, split, "shapes", 80)
        images[split] = {os.path.basename(sample.image) for sample in dataset.samples}
        for sample, item in zip(dataset.samples, dataset):
            assert len(tokenizer.encode(sample.text)) == len(sample.text.split()), sample.text
            said = understand(sample.text)[2]
            assert (split, len(said)) not in (("testA", 2), ("testB", 1))
            for colour in said[0] & data.COLOURS.keys():
                x, y = (item["box"][:2] * 80).int().tolist()
                difference = item["image"][:, y, x] - torch.tensor(data.COLOURS[colour])
                is_coloured.append(difference.abs().max() < 50)
    assert len(set.union(*images.values())) == sum(map(len, images.values())) <= 5 * 24 - 5
    assert np.mean(is_coloured) > 0.9  # some centres are hidden
    assert images["train"] <= json.loads((folder / "captions.json").read_text()).keys()
    assert command(monkeypatch, "check", "--dataset", "shapes", "--data-root", tmp_path) is None


# ------------------------------------------------------------------------------- check and download


def test_check(tmp_path, monkeypatch, capsys):
    """A table by split, a line for each unreadable image with its reason, and an error if anything
    is missing. A box outside of its image is odd, which is no error."""
    rows = [
        {"texts": ["a", "b", " "]},
        {"image": None},
        {"size": (40, 60)},
        {"texts": ["half"]},
        {"bbox": [50, 30, 20, 20]},
        {"bbox": [5, 5, 0, 0]},
        {"split": "val"},
        {"split": "testA"},
    ]
    make_refer(tmp_path, rows)
    names = [str(tmp_path / TRAIN2014 / COCO_NAME.format(number)) for number in range(1, 9)]
    Path(names[3]).write_bytes(Path(names[3]).read_bytes()[:-200])
    info = data.DATASETS["refcoco"]._replace(published=(9, 1, 1, 5))
    monkeypatch.setitem(data.DATASETS, "refcoco", info)
    error = command(monkeypatch, "check", "--dataset", "refcoco", "--data-root", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    columns = "split expressions published missing images unreadable images odd boxes"
    assert lines[0].split() == columns.split()
    table = ["train 8 9 1 2 2", "val 1 1 0 0 0", "testA 1 1 0 0 0", "testB 0 5 0 0 0"]
    assert [line.split() for line in lines[1:5]] == [line.split() for line in table]
    assert len(lines) == 7 and sorted(line.split()[0] for line in lines[5:]) == names[2:4]
    assert any("truncated" in line for line in lines) and any("40 x 60" in line for line in lines)
    problems = ("train has 8 expr", names[1], "train has 2 unreadable images", "testB has 0 expr")
    assert all(what in error for what in problems) and "val has" not in error and "\n" not in error
    boxes = [1, 2, 30, 20], [50, 30, 70, 50], [-5, 2, 9, 9]
    rows = [{"image": "cup.jpg", "text": "a cup", "box": box} for box in boxes]
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain_picture().save(tmp_path / "cup.jpg")
    assert command(monkeypatch, "check", "--dataset", "own", "--data-root", tmp_path) is None
    assert capsys.readouterr().out.splitlines()[1].split() == "val 3 - 0 0 2".split()


class Server(BaseHTTPRequestHandler):
    """Serves `files`, {path: (content, manner)}. `asked` has (path, first byte) of each request."""

    files, asked = {}, []

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.asked.append((self.path, start))
        if self.path not in self.files:
            return self.send_error(404)
        content, manner = self.files[self.path]
        ranged = "Range" in self.headers and manner != "no ranges"
        start, total = start if ranged else 0, len(content)
        total += {"claims more": 100, "claims less": -100}.get(manner, 0)
        self.send_response(200 if not ranged else 206 if start < len(content) else 416)
        self.send_header("Content-Type", "text/html" if manner == "page" else "application/zip")
        if start >= len(content):
            self.send_header("Content-Range", f"bytes */{total}")
        self.send_header("Content-Length", str(max(0, total - start)))
        self.end_headers()
        end = len(content)
        if manner == "breaks off":
            end = start + len(content) // 3
        elif manner == "stops" or manner == "no ranges" and len(self.asked) == 1:
            end = max(start, len(content) // 2)
        self.wfile.write(content[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """The address of a server on loopback, for which alone the network is open."""
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(clip_model.urllib.request, "urlopen", urlopen)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(Server, "files", {})
    monkeypatch.setattr(Server, "asked", [])
    address = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setattr(data, "UNC", address + "/{}/{}.zip")
    monkeypatch.setattr(data, "ZENODO", address + "/mdetr_annotations.tar.gz")
    monkeypatch.setattr(data, "TRAIN2014", address + "/train2014.zip")
    yield address
    running.shutdown()
    running.server_close()


CONTENT = random.Random(0).randbytes(200_000)
SHA256, THIRD, HALF = hashlib.sha256(CONTENT).hexdigest(), len(CONTENT) // 3, len(CONTENT) // 2
STARTS = {"well": [0], "breaks off": [0, THIRD, 2 * THIRD, 3 * THIRD], "no ranges": [0, HALF]}


@pytest.mark.parametrize("manner, starts", STARTS.items())
def test_a_download_goes_on_where_it_broke_off(server, tmp_path, manner, starts):
    """By ranges, or from the start where the server knows none. Only the whole file is left."""
    Server.files["/file.bin"] = CONTENT, manner
    path = tmp_path / "new/file.bin"
    download(server + "/file.bin", path, SHA256)
    assert path.read_bytes() == CONTENT and os.listdir(path.parent) == ["file.bin"]
    assert [start for _, start in Server.asked] == starts


def test_what_was_fetched_is_kept_for_the_next_call(server, tmp_path):
    """A server that gives no more, or a web page, is one sentence, and the next call asks for the
    rest; a part that is longer than the file is thrown away."""
    url, path = server + "/file.bin", tmp_path / "file.bin"
    for manner in ("stops", "page"):
        Server.files["/file.bin"] = CONTENT, manner
        assert "file.bin" in error_of(download, url, path)
        (part,) = tmp_path.glob("file.bin.*.part")
        assert part.read_bytes() == CONTENT[:HALF] and not path.exists()
    Server.files["/file.bin"] = CONTENT, "well"
    download(url, path)
    assert Server.asked[-1] == ("/file.bin", HALF) and path.read_bytes() == CONTENT
    part.write_bytes(CONTENT + b"more")
    os.utime(part, (0, 0))
    error_of(download, url, path)
    download(url, path)
    assert path.read_bytes() == CONTENT and os.listdir(tmp_path) == ["file.bin"]


def test_several_processes_may_fetch_one_file(server, tmp_path):
    """Each writes under a name of its own: all end with the whole file, and nothing else is left. A
    part to which nobody writes any more is continued by one of them alone."""
    Server.files["/file.bin"] = CONTENT, "well"
    url, path, part = server + "/file.bin", tmp_path / "file.bin", tmp_path / "file.bin.00.part"
    part.write_bytes(CONTENT[:HALF])
    os.utime(part, (0, 0))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: download(url, path, SHA256), range(4)))
    assert path.read_bytes() == CONTENT and os.listdir(tmp_path) == ["file.bin"]
    assert sorted(start for _, start in Server.asked) == [0, 0, 0, HALF]


def test_a_server_that_lies_is_not_believed(server, tmp_path):
    """More claimed than there is, a wrong sha256, no such file: an error, and never a file."""
    for manner, what in (("claims more", "file.bin"), ("claims less", "sha256"), ("absent", "404")):
        Server.files = {"/file.bin": (CONTENT, manner)} if manner != "absent" else {}
        assert what in error_of(download, server + "/file.bin", tmp_path / "file.bin", SHA256)
        assert not os.listdir(tmp_path)


def tar_gz(files):
    """A tar.gz archive of {name: bytes, or where a link leads}."""
    with tarfile.open(fileobj=(archive := io.BytesIO()), mode="w:gz") as target:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            if isinstance(content, str):
                entry.type, entry.linkname, content = tarfile.SYMTYPE, content, b""
            entry.size = len(content)
            target.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def test_download_brings_all_once(server, tmp_path, monkeypatch, capsys):
    """Annotations (from Zenodo where the web archive has none) and images come to where the loader
    looks. A second call fetches nothing, a third what has gone missing; an archive that Ctrl-C kept
    from being unpacked is not fetched again."""
    source, root = tmp_path / "source", tmp_path / "data"
    words = "download", "--dataset", "refcoco", "--data-root", root
    make_refer(source, [{"split": split} for split in data.REFCOCO_SPLITS])
    for url, folder in (("/20220413011718/refcoco.zip", "refcoco"), ("/train2014.zip", TRAIN2014)):
        files = {f"{folder}/{path.name}": path.read_bytes() for path in (source / folder).iterdir()}
        Server.files[url] = zipped(files), "breaks off"

    with monkeypatch.context() as patch:
        patch.setattr(data.shutil, "unpack_archive", raise_keyboard_interrupt)
        assert "Ctrl-C" in command(monkeypatch, *words) and os.listdir(root) == ["refcoco.zip"]
    Server.asked.clear()
    assert command(monkeypatch, *words) is None
    assert sorted(os.listdir(root)) == ["images", "refcoco"]
    assert {path for path, _ in Server.asked} == {"/train2014.zip"}
    assert [len(list(open_split(root, split))) for split in data.REFCOCO_SPLITS] == [1, 1, 1, 1]
    Server.asked.clear()
    assert command(monkeypatch, *words) is None and not Server.asked
    (root / TRAIN2014 / COCO_NAME.format(2)).unlink()
    assert command(monkeypatch, *words) is None and len(os.listdir(root / TRAIN2014)) == 4
    assert {path for path, _ in Server.asked} == {"/train2014.zip"}

    del Server.files["/20220413011718/refcoco.zip"]
    for split in data.REFCOCO_SPLITS:
        write_family(source, "refcoco", "mdetr", "json", split)
    files = {f"OpenSource/{path.name}": path.read_bytes() for path in source.glob("*.json")}
    files["OpenSource/finetune_gqa_train.json"] = b"{}"
    Server.files["/mdetr_annotations.tar.gz"] = tar_gz(files), "well"
    (root / "refcoco/refs(unc).p").unlink()
    assert command(monkeypatch, *words) is None
    assert len(os.listdir(root / "mdetr_annotations")) == 4 and len(open_split(root, "testB")) == 2


EVIL = {"refcoco/good.json": b"{}", "refcoco/../../../evil.json": b"{}"}
BAD = {  # what is served as an archive
    "outside": zipped(EVIL),
    "outside.gz": tar_gz(EVIL),
    "absolute": zipped({str(Path.cwd() / "evil.json"): b"{}"}),
    "link": tar_gz({"refcoco/link": "/etc/passwd"}),
    "page": b"<html><body>This service is no more.</body></html>" * 100,
    "half": zipped({"refcoco/good.json": CONTENT})[:5000] + bytes(1000),
    "half.gz": tar_gz({"refcoco/good.json": CONTENT})[:5000],
    "flipped": zipped({"refcoco/good.json": CONTENT}).replace(CONTENT[9:99], bytes(90)),
}


@pytest.mark.parametrize("which", BAD)
def test_a_bad_archive_leaves_nothing(server, tmp_path, which):
    """Names that lead outside, links, a web page, damage: nothing is written outside of the folder,
    and what is damaged is told and deleted."""
    Server.files["/bad.zip"] = BAD[which], "well"
    root = tmp_path / "a/b"
    if which in ("outside", "absolute"):
        data.download_and_unpack(server + "/bad.zip", root, "refcoco")
    else:
        text = error_of(data.download_and_unpack, server + "/bad.zip", root, "refcoco")
        assert "bad.zip" in text and "deleted" in text and not os.listdir(root)
    files = [path for path in tmp_path.rglob("*") if not path.is_dir() or path.is_symlink()]
    assert files in ([], [root / "refcoco/good.json"]) and not Path("evil.json").exists()


def test_what_cannot_be_downloaded_says_what_to_do(server, tmp_path, monkeypatch):
    """One sentence: whom to ask, what the files look like. Nothing is asked for."""
    words = {"referit": "index lists", "flickr30k": "form", "own": "train.jsonl"}
    words |= {"shapes": "generates it", "coco": "choose one of"}
    for name, hint in words.items():
        error = command(monkeypatch, "download", "--dataset", name, "--data-root", tmp_path)
        assert hint in error and "\n" not in error and not Server.asked


def test_a_damaged_tar_is_not_unpacked(tmp_path, monkeypatch):
    """One flipped byte anywhere in a .tar.gz is found by its checksum; the archive is deleted."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        entry = tarfile.TarInfo("finetune_refcoco_val.json")
        entry.size = 3000
        archive.addfile(entry, io.BytesIO(random.Random(0).randbytes(3000)))
    whole = content.getvalue()
    for place in range(100, len(whole), 300):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (tmp_path / "a.tar.gz").write_bytes(damaged)
        with pytest.raises(data.HiVGError, match="a.tar.gz"):
            data.download_and_unpack("http://localhost/a.tar.gz", tmp_path, "out")
        assert not (tmp_path / "a.tar.gz").exists() and not (tmp_path / "out").exists()
