"""data.py: picture files, the way into the square and back, augmentation, all families of data sets'
files, shapes, and the commands check and download (with clip_model.download, on loopback)."""

import hashlib
import io
import json
import os
import pickle
import random
import struct
import sys
import tarfile
import threading
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen  # before conftest forbids it

import numpy as np
import pytest
import torch
from conftest import Python2Pickler, make_refer, plain_picture
from PIL import Image, ImageDraw

import clip_model
import data
from clip_model import HiVGError, Tokenizer, download
from data import GroundingDataset, letterbox, load_image, prepare, to_pixels, to_square

# ---------------------------------------------------------------------------------------- pictures

ODD = {  # file: size upright, and (share of x, share of y, what its pixel there is about) or None
    "gray_l.jpg": (240, 240),
    "gray_16bit.png": (140, 140),
    "palette_transparent.png": (220, 147),
    "rgba.png": (180, 120),
    "cmyk_adobe.jpg": (320, 208),
    "exif_orientation_6.jpg": (320, 208),
    "exif_orientation_3.jpg": (320, 208),
    "one_pixel.png": (1, 1),
    "wide_2000x8.jpg": (2000, 8),
    "animated.gif": (160, 107),
    "photo.webp": (320, 214),
}
BROKEN = ("truncated.jpg", "empty.jpg", "text.jpg", "broken_crc.png")
BOMBS = ("bomb_30000x30000.png", "bomb_20000x20000_complete.png")


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_work(shared, name):
    """Every kind of picture gives three channels in its upright size, and a finite square."""
    image = load_image(shared / "odd_images" / name)
    assert image.mode == "RGB" and image.size == ODD[name]
    square, padding, geometry = prepare(image, 64)
    assert square.shape == (3, 64, 64) and square.isfinite().all() and not padding.all()
    assert to_pixels(torch.tensor([0.5, 0.5, 1.0, 1.0]), geometry).tolist() == [0, 0, *ODD[name]]


def test_odd_pictures_show_what_the_files_show(shared):
    """Not almost white (16 bit), not negative (CMYK), upright (EXIF), the first frame (GIF)."""

    def pixels(name):
        return np.asarray(load_image(shared / "odd_images" / name)).astype(float)

    gray = pixels("gray_l.jpg")
    assert (gray[..., 0] == gray[..., 1]).all() and (gray[..., 0] == gray[..., 2]).all()
    assert abs(pixels("gray_16bit.png").mean() - 128) < 5
    for name in ("cmyk_adobe.jpg", "exif_orientation_6.jpg", "exif_orientation_3.jpg"):
        red, _, blue = pixels(name)[:20].mean(axis=(0, 1))  # a blue sky at the top
        assert blue > red + 20, name
    assert pixels("animated.gif").mean() > 40  # the last frame is black
    assert pixels("one_pixel.png").tolist() == [[[200, 30, 40]]]


@pytest.mark.parametrize("name", BROKEN + BOMBS)
def test_broken_pictures_are_told(shared, name):
    """A file that is damaged, no picture, or a bomb is one sentence with its name."""
    with pytest.raises(HiVGError, match=name) as caught:
        load_image(shared / "odd_images" / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lifted", [False, True])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, lifted):
    """A header that claims 30000 x 30000 is refused for that, even if Pillow's own limit is off."""
    if lifted:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    header = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 1, 0, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    body = b"IDAT" + zlib.compress(b"")
    chunks += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with pytest.raises(HiVGError, match="bomb.png.*pixels"):
        load_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("1", 1, (255, 255, 255)),
        ("L", 90, (90, 90, 90)),
        ("LA", (90, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("I;16", 257 * 100, (100, 100, 100)),
        ("P", 0, (0, 0, 0)),
    ],
)
def test_modes_become_rgb(tmp_path, mode, colour, expected):
    """Alpha is laid over white, 16-bit grey is scaled, everything else keeps its colour."""
    image = Image.new(mode, (9, 5), colour)
    if mode == "P":
        image.putpalette([0, 0, 0] * 256)
    image.save(tmp_path / "picture.png")
    found = load_image(tmp_path / "picture.png")
    assert found.mode == "RGB" and found.size == (9, 5) and found.getpixel((4, 2)) == expected


def test_missing_and_empty_files_are_told(tmp_path):
    """No such file, an empty one, a folder, text, half a JPEG: one sentence that names it."""
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "text.jpg").write_text("this is no picture at all\n")
    plain_picture(200, 200).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    load_image(tmp_path / "whole.jpg")
    for name in ("absent.jpg", "empty.jpg", "folder.jpg", "text.jpg", "half.jpg"):
        with pytest.raises(HiVGError, match=name) as caught:
            load_image(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_exif_rotation(tmp_path):
    """A user's own photograph is turned upright; a data set's stays as stored, as its boxes are."""
    picture = plain_picture(60, 40, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    row = {"image": picture, "bbox": [0, 0, 20, 20], "save": {"exif": exif, "quality": 95}}
    make_refer(tmp_path, [row])
    dataset = GroundingDataset("refcoco", "train", tmp_path, 60, mean=(0, 0, 0), std=(1, 1, 1))
    upright = load_image(dataset.samples[0].image)
    assert upright.size == (40, 60) and upright.getpixel((35, 5))[1] < 60  # red, at the right
    item = dataset[0]
    assert not item["padding"][10:50].any() and item["padding"][:10].all()
    assert item["image"][1, 12:28, 2:18].max() < 0.3 and item["image"][1, 12:48, 40:].min() > 0.4
    torch.testing.assert_close(item["box"] * 60, torch.tensor([10.0, 20.0, 20.0, 20.0]))


# ---------------------------------------------------------------------------- the square, and back


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (1, 1), (2000, 8), (8, 2000), (7, 5)])
@pytest.mark.parametrize("side", [64, 224])
def test_a_box_comes_back_within_half_a_pixel(size, side):
    """From the photograph's pixels into the padded square and back: within half a pixel, in float32."""
    geometry = letterbox((0, 0, *size), side)
    rng = random.Random(0)
    for _ in range(50):
        x, y = (sorted(rng.uniform(0, length) for _ in "12") for length in size)
        box = torch.tensor([x[0], y[0], x[1], y[1]])
        square = to_square(box.tolist(), geometry)
        assert (square >= 0).all() and (square <= 1).all()
        assert (to_pixels(square, geometry) - box).abs().max() <= 0.5
    assert max(geometry.inner[2:]) == side and min(geometry.inner[2:]) >= 1
    whole = to_square((0, 0, *size), geometry) * side
    left, top, width, height = geometry.inner
    assert whole.tolist() == pytest.approx([left + width / 2, top + height / 2, width, height])
    assert abs(2 * left + width - side) <= 1 and abs(2 * top + height - side) <= 1  # evenly


def test_a_box_is_clipped_to_the_photograph():
    """A predicted box that reaches into the padding comes back inside the photograph."""
    geometry = letterbox((0, 0, 640, 480), 224)
    boxes = to_pixels(torch.tensor([[0.5, 0.5, 2.0, 2.0], [0.5, 0.0, 0.1, 0.1]]), geometry)
    assert boxes[0].tolist() == [0, 0, 640, 480]
    assert boxes[1, 1] == boxes[1, 3] == 0


def test_padding_is_zero_after_normalisation():
    """Padding is marked and holds zeros; pixels are normalised with the mean and deviation given."""
    square, padding, geometry = prepare(Image.new("RGB", (40, 20), (51, 102, 204)), 40)
    assert padding[:10].all() and padding[30:].all() and not padding[10:30].any()
    assert geometry.inner == (0, 10, 40, 20)
    assert (square[:, padding] == 0).all()
    for channel, (value, mean, std) in enumerate(zip((0.2, 0.4, 0.8), data.MEAN, data.STD)):
        assert square[channel, 20, 20].item() == pytest.approx((value - mean) / std, abs=1e-5)


# ------------------------------------------------------------------------------------ augmentation


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """Green boxes on grey in pictures of several shapes, as a data set; (dataset, number of rows)."""
    rows = []
    for width, height, box in (
        (640, 480, (400, 100, 560, 300)),
        (333, 500, (5, 300, 100, 480)),
        (700, 200, (300, 20, 380, 180)),
        (120, 150, (10, 10, 70, 100)),
    ):
        image = plain_picture(width, height, box, (0, 255, 0))
        bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        rows.append({"image": image, "bbox": bbox, "texts": ["the green thing", "left one"]})
        rows[-1]["save"] = {"quality": 95, "subsampling": 0}
    root = make_refer(tmp_path_factory.mktemp("painted"), rows)
    return lambda **more: GroundingDataset("refcoco", "train", root, 112, augment=True, **more)


def test_an_augmented_box_covers_the_object(painted):
    """However the picture is cropped, scaled and placed, the box in the square is where the object
    is drawn, its centre is kept, and nothing of the object is outside of it."""
    dataset = painted(mean=(0, 0, 0), std=(1, 1, 1))
    sizes = set()
    for epoch in range(12):
        dataset.set_epoch(0, 0, epoch)
        for index, item in enumerate(map(dataset.__getitem__, range(len(dataset)))):
            green = item["image"][1] - item["image"][0] > 0.2  # jitter leaves it greener than grey
            cx, cy, w, h = (item["box"] * 112).tolist()
            rows, columns = torch.where(green)
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            expected = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
            assert np.abs(np.array(found) - np.array(expected)).max() < 2, (epoch, index)
            assert green[int(cy), int(cx)] and not item["padding"][int(cy), int(cx)]
            assert not (green & item["padding"]).any()
            assert (item["image"][:, item["padding"]] == 0).all()
            sizes.add(round(w))
    assert len(sizes) > 10


def test_a_crop_keeps_the_centre_and_spares_words_of_place():
    """A crop lies in the picture and keeps the box's centre; with "left" in the text there is none."""
    crops = 0
    for seed in range(200):
        rng = random.Random(seed)
        size, box = (640, 300), (500.0, 10.0, 638.0, 120.0)
        geometry = data.random_geometry(rng, size, box, "the dog", 224)
        x1, y1, x2, y2 = geometry.region
        assert 0 <= x1 <= 569 <= x2 <= 640 and 0 <= y1 <= 65 <= y2 <= 300
        left, top, width, height = geometry.inner
        assert 0 <= left <= 224 - width and 0 <= top <= 224 - height
        assert 56 <= max(width, height) <= 224
        crops += geometry.region != (0, 0, *size)
        rng = random.Random(seed)
        geometry = data.random_geometry(rng, size, box, "the leftmost dog", 224)
        assert geometry.region == (0, 0, *size)
    assert 60 < crops < 140


def test_augmentation_follows_from_seed_stage_epoch_and_index(painted):
    """The same four numbers give the same picture, in any order of reading; other numbers another."""

    def item(seed, stage, epoch, index, before=()):
        dataset = painted()
        dataset.set_epoch(seed, stage, epoch)
        for other in before:
            dataset[other]
        return dataset[index]["image"]

    first = item(0, 1, 2, 3)
    assert torch.equal(first, item(0, 1, 2, 3, before=(5, 0, 3)))
    for numbers in ((1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 2)):
        assert not torch.equal(first, item(*numbers)), numbers


# --------------------------------------------------------------------------------- RefCOCO's files


def test_photographs(shared):
    """The real photographs: 36, 12, 8 and 8 expressions, every box inside its picture, as counted."""
    for split, count in {"train": 36, "val": 12, "testA": 8, "testB": 8}.items():
        dataset = GroundingDataset("refcoco", split, shared / "photos", 64)
        assert len(dataset) == count and not dataset.report
        for sample, item in zip(dataset.samples, map(dataset.__getitem__, range(count))):
            x1, y1, x2, y2 = sample.box
            assert 0 <= x1 < x2 <= sample.size[0] and 0 <= y1 < y2 <= sample.size[1]
            assert item["text"] == item["text"].lower() and item["image"].shape == (3, 64, 64)
            assert item["image"].std() > 0.3
    assert data.available_splits("refcoco", shared / "photos") == ["train", "val", "testA", "testB"]


@pytest.fixture(scope="module")
def refer(tmp_path_factory):
    """Two splits with everything that happens in such files."""
    grey = plain_picture().convert("L")
    rows = [
        {"texts": ["The RED Café", " ", "thing "], "image": grey},  # 0
        {"texts": ["out"], "bbox": [-5.5, 10, 20, 100], "image": plain_picture().convert("CMYK")},
        {"bbox": [10, 10, 0, 5], "ref_id": 77},
        {"bbox": [70, 10, 20, 20], "ref_id": 78},  # beside its picture
        {"texts": ["in val"], "split": "val", "bbox": [0.25, 1.5, 10.5, 20.25]},
        {"texts": [""]},
        {"texts": ["other"], "split": "test"},
    ]
    return make_refer(tmp_path_factory.mktemp("data"), rows)


def test_refer_files_of_python_2(refer):
    """Byte strings in latin-1, fractions of pixels, lower case; the file is found by instances.json."""
    train = GroundingDataset("refcoco", "train", refer, 64)
    assert [s.text for s in train.samples] == ["the red café", "thing", "out"]
    assert train.samples[0].image.endswith("train2014/COCO_train2014_000000000001.jpg")
    assert train.samples[0].box == (10, 10, 30, 30) and train.samples[0].size == (60, 40)
    val = GroundingDataset("refcoco", "val", refer, 64)
    assert [s.box for s in val.samples] == [(0.25, 1.5, 10.75, 21.75)]
    assert [item["object"].tolist() for item in train] == [0, 0, 1]
    assert all(item["image"].shape == (3, 64, 64) for item in train)  # grey and CMYK too


def test_what_is_wrong_in_a_data_set_is_reported(refer):
    """Boxes that stick out are clipped, ones without area are left out and named by ref_id, empty
    expressions are counted and left out."""
    train = GroundingDataset("refcoco", "train", refer, 64)
    assert train.samples[2].box == (0, 10, 14.5, 40)
    report = "\n".join(train.report)
    assert "2 empty" in report and "1 boxes clipped" in report
    assert all(f"1 box without area left out, ref_id {number}" in report for number in (77, 78))
    assert not GroundingDataset("refcoco", "val", refer, 64).report


def test_splits_are_whole_words(tmp_path):
    """A split is not found inside another one's name, and what is not there is told, with what is."""
    make_refer(tmp_path, [{"split": "testA", "texts": ["a"]}, {"split": "train", "texts": ["b"]}])
    assert data.available_splits("refcoco", tmp_path) == ["train", "testA"]
    assert [s.text for s in GroundingDataset("refcoco", "testA", tmp_path, 64).samples] == ["a"]
    for split in ("testB", "test", "tra", "Val", ""):
        with pytest.raises(HiVGError, match="train val testA testB"):
            GroundingDataset("refcoco", split, tmp_path, 64)
    with pytest.raises(HiVGError, match="'coco'.*refcoco, refcoco\\+, refcocog"):
        GroundingDataset("coco", "train", tmp_path, 64)


def test_missing_files_are_told(tmp_path, refer):
    """Which file is missing, where it was looked for, and where to get it: one sentence."""

    def message(name="refcoco", root=tmp_path):
        with pytest.raises(HiVGError) as caught:
            GroundingDataset(name, "train", root, 64)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    text = message(root=tmp_path / "absent")
    assert str(tmp_path / "absent") in text and "refcoco/refs(unc).p" in text
    assert "data.py download" in text
    assert "refs(umd).p" in message("refcocog", refer)
    assert "refs(google).p" in message("refcocog-google", refer)
    make_refer(tmp_path, [{"image": None}])
    text = message()
    assert "train2014" in text and "000000000001.jpg" in text and "cocodataset.org" in text
    (tmp_path / "refcoco/instances.json").write_text("{")
    assert "instances.json" in message()
    (tmp_path / "refcoco/instances.json").write_text('{"images": [], "annotations": []}')
    assert "refs(unc).p, entry 1, cannot be used" in message()
    (tmp_path / "refcoco/instances.json").unlink()
    assert "instances.json" in message()


def test_a_picture_of_another_size_is_told(tmp_path):
    """A picture that is not the annotated one (resized, rotated) is told by name, not used."""
    make_refer(tmp_path, [{"size": (40, 60)}])
    dataset = GroundingDataset("refcoco", "train", tmp_path, 64)
    with pytest.raises(HiVGError, match="000000000001.jpg .* has 60 x 40.*40 x 60"):
        dataset[0]


@pytest.mark.parametrize("place", data.PICTURES["coco"])
def test_pictures_are_found_in_all_usual_places(tmp_path, place):
    """Pictures may lie in any of the folders people have them in, COCO 2017's names too."""
    make_refer(tmp_path, [{}])
    name = "COCO_train2014_000000000001.jpg"
    target = tmp_path / place.format(name=name, number="000000000001.jpg")
    target.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "images/mscoco/images/train2014" / name).rename(target)
    assert GroundingDataset("refcoco", "train", tmp_path, 64).samples[0].image == str(target)


class Malicious:
    """Makes a folder if it is ever unpickled with code allowed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    """Refs that hold anything but plain data are refused by name, and nothing in them is run."""
    make_refer(tmp_path, [{}])
    content = [{"ref_id": 1, "split": "train", "sentences": Malicious(tmp_path / "ran")}]
    (tmp_path / "refcoco/refs(unc).p").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(HiVGError, match=r"refs\(unc\).p.*mkdir"):
        GroundingDataset("refcoco", "train", tmp_path, 64)
    assert not (tmp_path / "ran").exists()


def with_split(value):
    """A pickle of [{"split": value}], the value in pickle's own operations."""
    return b"\x80\x02](}(X\x05\x00\x00\x00split" + value + b"ue."


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps(3)),
        with_split(b")" + b"\x85" * 10**6),  # tuples in one another, deeper than hashing bears
        with_split(b")" + b"2\x86" * 60),  # of pairs of pairs: 2^60 empty tuples to hash
        b"\x80\x05\x96" + struct.pack("<Q", 4 << 30) + b"abc.",  # claims to hold 4 GB
    ],
)
def test_a_broken_pickle_is_told(tmp_path, content):
    """Refs that are no list of dicts are one sentence with the file's name, at once."""
    make_refer(tmp_path, [{}])
    (tmp_path / "refcoco/refs(unc).p").write_bytes(content)
    with pytest.raises(HiVGError, match=r"refs\(unc\).p"):
        GroundingDataset("refcoco", "train", tmp_path, 64)


def test_batches(refer, tokenizer):
    """A batch has the items in order; tokens are cut to the longest text, rounded up."""
    train = GroundingDataset("refcoco", "train", refer, 64)
    (batch,) = data.batches(train, [[2, 0]], workers=1)
    assert batch["text"] == ["out", "the red café"]
    assert batch["image"].shape == (2, 3, 64, 64) and batch["padding"].dtype == torch.bool
    whole = tokenizer(batch["text"])
    tokens = data.cut_to_longest(whole)
    length = tokens.shape[1]
    assert length % 4 == 0 and 0 <= length - (whole != 0).sum(dim=1).max() < 4
    assert torch.equal(tokens, whole[:, :length])
    assert batch["object"].tolist() == [1, 0]


def test_cached_pictures_are_the_same(refer):
    """Keeping pictures in memory changes nothing, on the first reading and on later ones."""
    plain, kept = (GroundingDataset("refcoco", "train", refer, 64, cache=c) for c in (False, True))
    for _ in range(2):
        for a, b in zip(plain, kept):
            assert torch.equal(a["image"], b["image"]) and torch.equal(a["box"], b["box"])


# -------------------------------------------------------------------- all data sets, all families

XYXY, XYWH = (10.25, 10.0, 30.5, 30.0), (10.25, 10.0, 20.25, 20.0)
FILES = {
    "coco": "COCO_train2014_000000000001.jpg",
    "referit": "38942.jpg",
    "flickr": "1000092795.jpg",
    "own": "mine/cup.jpg",
}


def put_picture(root, kind, file=None, place=0):
    """A picture of 60 x 40 pixels, by default with XYXY's object, in one of its kind's places."""
    file = file or FILES[kind]
    path = root / data.PICTURES[kind][place].format(name=file, number=file[-16:])
    path.parent.mkdir(parents=True, exist_ok=True)
    plain_picture().save(path)
    return str(path)


def write_index(path, entries, how="zip"):
    """An index file: torch's zip, its older format, a pickle, and the latter two as of Python 2."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if how in ("zip", "old"):
        torch.save(entries, path, _use_new_zipfile_serialization=how == "zip")
        return
    parts = [torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True}, entries, []]
    with open(path, "wb") as file:
        for part in parts if how == "old python 2" else [entries]:
            (pickle.Pickler if how == "pickle" else Python2Pickler)(file, protocol=2).dump(part)


def write_mdetr(path, file, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": 7, "original_id": 1, "file_name": file, "caption": text}]
    images[0] |= {"height": 40, "width": 60, "dataset_name": "refcoco"}
    notes = [{"id": 9, "image_id": 7, "bbox": list(XYWH), "category_id": 1, "iscrowd": 0}]
    path.write_text(json.dumps({"images": images, "annotations": notes, "categories": []}))


def write_family(root, name, family, split="train", text=" The RED Café "):
    """One expression of a data set in the format of a family of files, with its picture."""
    source = data.DATASETS[name]
    file, path = FILES[source.pictures], root / source.files[family].format(split)
    put_picture(root, source.pictures)
    if family == "refer":
        row = {"bbox": list(XYWH), "texts": [text], "split": split}
        make_refer(root, [row], path.parent.name, path.name[5:-3])
    elif family == "index":
        size = {"height": 40, "width": 60}
        entry = {
            "flickr": (file, list(XYXY), text),
            "referit": (file, [60, 40], list(XYXY), text, "38942_1.mat"),
        }.get(source.pictures, (file, size, list(XYWH), text, [("r1", ["red"])]))
        write_index(path, [entry], "old python 2")
    elif family == "mdetr":
        write_mdetr(path, file, text)
    else:
        path.write_text(json.dumps({"image": file, "text": text, "box": XYXY}) + "\n")


CASES = [(n, f) for n, source in data.DATASETS.items() for f in source.files if n != "shapes"]


@pytest.mark.parametrize("name, family", CASES)
def test_every_data_set_in_every_family(tmp_path, name, family):
    """Each row of the table, from small files in the real format: the same sample comes of all."""
    splits = ["train"] if family == "refer" else data.DATASETS[name].splits.split()[:2]
    for split in splits:
        write_family(tmp_path, name, family, split)
    dataset = GroundingDataset(name, "train", tmp_path, 60, mean=(0, 0, 0), std=(1, 1, 1))
    (sample,), kind = dataset.samples, data.DATASETS[name].pictures
    size = (60, 40) if kind == "coco" else None
    assert sample == (put_picture(tmp_path, kind), "the red café", XYXY, size)
    assert not dataset.report and dataset.split == "train"
    (item,) = dataset
    assert item["object"].shape == () and item["object"].dtype == torch.int64
    assert (item["image"][0, 22:38, 12:28] > 0.8).all()  # red, below 10 pixels of padding
    expected = torch.tensor([20.375, 30.0, 20.25, 20.0])
    torch.testing.assert_close(item["box"] * 60, expected)
    assert data.available_splits(name, tmp_path) == splits


@pytest.mark.parametrize("how", ["zip", "old", "pickle", "python 2", "old python 2"])
def test_index_files_of_all_sorts(tmp_path, how):
    """Boxes as lists, tuples, tensors, sizes as whatever; only a dict says which is the width."""
    file, box = FILES["coco"], list(XYWH)
    sizes = {"width": 60, "height": 40}, (60, 40), [40, 60], "1.pth", None
    entries = [(file, size, box, f"Café {i}", "1.pth") for i, size in enumerate(sizes)]
    entries.append((file, (40, 60), tuple(box), "long " * 60, "1.pth", "and more"))
    if how in ("zip", "old"):
        entries.append((file, None, torch.tensor(box), "of a tensor", None))
    put_picture(tmp_path, "coco")
    write_index(tmp_path / "unc/unc_val.pth", entries, how)
    dataset = GroundingDataset("refcoco", "val", tmp_path, 64)
    assert [s.size for s in dataset.samples] == [(60, 40)] + [None] * (len(entries) - 1)
    assert {s.box for s in dataset.samples} == {XYXY}
    assert [s.text for s in dataset.samples][:2] == ["café 0", "café 1"]
    assert {item["object"].item() for item in dataset} == {0}


def test_mixup_names_the_sort_of_its_pictures(tmp_path):
    """'flickr' and 'referit' in place of a size say where a picture lies; all boxes are x y w h."""
    box, sizes = list(XYWH), ({"height": 40, "width": 60}, "flickr", "referit")
    rows = [(FILES[k], size, box, k) for k, size in zip(("coco", "flickr", "referit"), sizes)]
    paths = [put_picture(tmp_path, kind, place=1) for kind in ("coco", "flickr", "referit")]
    write_index(tmp_path / "data/mixup/mixup_train.pth", rows)
    dataset = GroundingDataset("mixup", "train", tmp_path, 64)
    assert [s.image for s in dataset.samples] == paths
    assert {s.box for s in dataset.samples} == {XYXY}
    assert [s.size for s in dataset.samples] == [(60, 40), None, None]


def test_index_entries_are_checked(tmp_path):
    """A mark that is no data set of mixup's opens no other folder; an expression has to be text."""
    put_picture(tmp_path, "coco")
    write_index(tmp_path / "unc/unc_train.pth", [("/etc/" + FILES["coco"], "own", XYWH, "red")])
    (sample,) = GroundingDataset("refcoco", "train", tmp_path, 64).samples
    assert sample.image.startswith(str(tmp_path))
    write_index(tmp_path / "unc/unc_val.pth", [(FILES["coco"], None, XYWH, b"red")])
    with pytest.raises(HiVGError, match="unc_val.pth, entry 1"):
        GroundingDataset("refcoco", "val", tmp_path, 64)


def test_families_are_looked_for_in_order(tmp_path):
    """Index files count before MDETR's, refer's before both; all may lie one folder below."""
    put_picture(tmp_path, "coco")
    for path, family in (
        ("mdetr_annotations/finetune_refcoco_train.json", "mdetr"),
        ("splits/unc/unc_train.pth", "index"),
        ("finetune_refcoco_testA.json", "mdetr"),
        ("annotations/refcoco/refs(unc).p", "refer"),
    ):
        if family == "mdetr":
            write_mdetr(tmp_path / path, FILES["coco"], family)
        elif family == "index":
            write_index(tmp_path / path, [(FILES["coco"], None, XYWH, family, None)])
        else:
            make_refer(tmp_path / "annotations", [{"texts": [family]}])
        split = "testA" if "testA" in path else "train"
        (sample,) = GroundingDataset("refcoco", split, tmp_path, 64).samples
        assert sample.text == family
    # refer's file has no testA, so it hides no other file's
    assert data.available_splits("refcoco", tmp_path) == ["train", "testA"]


def test_flickr_without_index_files_names_them(tmp_path):
    """Flickr30k Entities' own files are not read: the error says so, and what is."""
    (tmp_path / "flickr30k/Annotations").mkdir(parents=True)
    for ask in (data.available_splits, lambda *at: GroundingDataset(at[0], "train", at[1])):
        with pytest.raises(HiVGError, match="flickr/flickr_train.pth.*XML"):
            ask("flickr30k", tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        '{"image": "cup.jpg", "text": "the cup"',
        "",
        "[1, 2]",
        '{"image": "cup.jpg", "text": "the cup"}',
        '{"image": "cup.jpg", "text": "the cup", "box": [1, 2, 3]}',
        '{"image": "cup.jpg", "text": "the cup", "box": [1, 2, 3, null]}',
        '{"image": "cup.jpg", "text": 5, "box": [1, 2, 3, 4]}',
        '{"image": "../cup.jpg", "text": "the cup", "box": [1, 2, 3, 4]}',
        '{"image": "/cup.jpg", "text": "the cup", "box": [1, 2, 3, 4]}',
    ],
)
def test_a_broken_line_of_own_data_is_told(tmp_path, line):
    """Its file and number are named, and what a line has to look like; no picture outside is read."""
    plain_picture().save(tmp_path / "cup.jpg")
    (tmp_path / "data").mkdir()
    plain_picture().save(tmp_path / "data/cup.jpg")
    good = '{"image": "cup.jpg", "text": "the cup", "box": [1, 2, 3, 4]}'
    (tmp_path / "data/train.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(HiVGError, match="train.jsonl, line 2, .*the red cup") as caught:
        GroundingDataset("own", "train", tmp_path / "data", 64)
    assert "\n" not in str(caught.value)


def test_boxes_outside_of_a_picture_of_unknown_size(tmp_path):
    """What reaches outside is cut off when the picture is there; what lies outside breaks nothing."""
    plain_picture().save(tmp_path / "cup.jpg")
    boxes = [-5, 10, 30, 60], [100, 100, 120, 120], [10, 10, 10, 30], [float("nan"), 0, 9, 9]
    rows = [{"image": "cup.jpg", "text": f"cup {i}", "box": box} for i, box in enumerate(boxes)]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = GroundingDataset("own", "val", tmp_path, 60)
    torch.testing.assert_close(dataset[0]["box"] * 60, torch.tensor([15.0, 35.0, 30.0, 30.0]))
    report = "; ".join(dataset.report)
    assert "clipped" in report and "left out, line 3" in report and "left out, line 4" in report
    dataset = GroundingDataset("own", "val", tmp_path, 60, augment=True)
    for epoch in range(20):
        dataset.set_epoch(0, 0, epoch)
        assert all(item["box"].isfinite().all() for item in dataset)


def test_several_data_sets_at_once(tmp_path):
    """One after the other; what of train has its picture in val or test of another set is left out
    and counted by set, though not what is in its own; objects are numbered over all of them."""
    names = [f"COCO_train2014_{number:012d}.jpg" for number in range(6)]
    for name in names:
        put_picture(tmp_path, "coco", name)

    def write(path, pictures):
        rows = [(names[number], None, list(XYWH), f"{path} {number}", None) for number in pictures]
        write_index(tmp_path / path, rows)

    for path, *pictures in (
        ("unc/unc_train.pth", 0, 1, 1, 2, 4),
        ("unc/unc_val.pth", 4, 5),  # 4 is in its own train as well
        ("unc/unc_testA.pth", 3),
        ("gref_umd/gref_umd_train.pth", 0, 3, 5),
        ("gref_umd/gref_umd_val.pth", 1),
        ("gref_umd/gref_umd_test.pth", 2),
    ):
        write(path, pictures)
    both = GroundingDataset(["refcoco", "refcocog"], "train", tmp_path, 64)
    texts = [sample.text for sample in both.samples]
    assert texts == [f"unc/unc_train.pth {n}" for n in (0, 4)] + ["gref_umd/gref_umd_train.pth 0"]
    assert [item["object"].item() for item in both] == [0, 1, 0]
    absent, refcoco, refcocog = both.report
    assert absent.startswith("refcoco testB is not there")
    assert refcoco.startswith("refcoco: 3 expr") and refcocog.startswith("refcocog: 2 expr")
    alone = GroundingDataset("refcoco", "train", tmp_path, 64)
    assert len(alone) == 5 and not alone.report
    assert len(GroundingDataset(("refcoco", "refcocog"), "val", tmp_path, 64)) == 3
    assert len(GroundingDataset(["refcocog", "refcoco"], "testA", tmp_path, 64)) == 1
    for names in (["refcoco", "refcoco+"], ["refcoco", "referit"]):
        for split in ("train", "val"):
            with pytest.raises(HiVGError, match=f"no expressions of {names[1].replace('+', '.')}"):
                GroundingDataset(names, split, tmp_path, 64)
    with pytest.raises(HiVGError, match="no data set 'x'"):
        GroundingDataset(["refcoco", "x"], "train", tmp_path, 64)


def test_a_malicious_index_file_is_refused_and_not_run(tmp_path):
    """In each format: nothing in it is run, and nobody is advised to load it unsafely."""
    for number, how in enumerate(["zip", "old", "pickle"]):
        path = tmp_path / f"{number}/unc/unc_train.pth"
        write_index(path, [("a.jpg", Malicious(tmp_path / "ran"), [1, 2, 3, 4], "a", None)], how)
        with pytest.raises(HiVGError, match="unc_train.pth cannot be read") as caught:
            GroundingDataset("refcoco", "train", tmp_path / str(number), 64)
        assert "weights_only" not in str(caught.value) and not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------ the shapes data set


def plain_words(text):
    """The text in the words of the tables: synonyms replaced, articles dropped."""
    ways = {way: word or "any" for word, many in data.WORDS.items() for way in many.split("|")}
    for way in sorted(ways, key=len, reverse=True):  # "round thing" before "thing"
        text = f" {text} ".replace(f" {way} ", f" {ways[way]} ").strip()
    return text.split()


@pytest.mark.parametrize("split", ["val", "testA", "testB", "train"])
def test_scenes_are_as_described(split):
    """A scene is the same each time; it has few kinds and colours, all inside the picture, and no
    shape is hidden by more than a quarter."""
    for number in range(12):
        shapes, texts, captions, jpeg = data.make_scene((split, number))
        assert data.make_scene((split, number))[:3] == (shapes, texts, captions)
        assert bool(captions) == (split == "train")
        assert (1 if split == "train" else 3) <= len(shapes) <= 5
        assert len({s.kind for s in shapes}) <= 2 and len({s.colour for s in shapes}) <= 3
        drawn, whole = Image.new("L", (2 * data.SIDE,) * 2, 255), []
        for i, (_, _, kind, (x1, y1, x2, y2), *_) in enumerate(shapes):
            assert 0 <= x1 < x2 <= 2 * data.SIDE and 0 <= y1 < y2 <= 2 * data.SIDE
            corners = [
                (x1 + x * (x2 - x1) / 100, y1 + y * (y2 - y1) / 100) for x, y in data.KINDS[kind]
            ]
            alone = Image.new("L", drawn.size, 255)
            for canvas in (drawn, alone):
                ImageDraw.Draw(canvas).polygon(corners, i)
            whole.append((np.asarray(alone) == i).sum())
        for i, area in enumerate(whole):
            assert (np.asarray(drawn) == i).sum() >= 0.74 * area
        assert set(texts.values()) <= set(range(len(shapes)))


def test_attribute_expressions_are_true_of_exactly_one_shape():
    """ "the small red circle" is true of the shape it is written for and of no other, checked word by word."""
    checked = 0
    for number in range(60):
        shapes, texts, *_ = data.make_scene(("val", number))
        for text, target in texts.items():
            words = [word for word in plain_words(text) if word != "the"]
            if all(word in (*data.SIZES, *data.COLOURS, *data.KINDS, "any") for word in words):
                told = [w for w in words if w != "any"]
                true_of = [i for i, s in enumerate(shapes) if set(told) <= set(s[:3])]
                assert true_of == [target], text
                checked += 1
    assert checked > 60


def test_place_and_relation_expressions_are_true_of_exactly_one_shape():
    """Superlatives of place and "left of the ..." hold for their shape and for no other that the
    words before them are true of, recomputed from the boxes alone."""
    checked, needed = {"leftmost": 0, "highest": 0, "left of": 0, "below": 0}, 0
    directions = {  # how far, from a box's centre
        "leftmost": lambda x, y: -x,
        "highest": lambda x, y: -y,
        "left of": lambda x, y: -x,
        "below": lambda x, y: y,
    }
    for number in range(120):
        rng = random.Random(number)
        shapes = data.arrange(rng, rng.choice((3, 4, 5)))
        centres = [((s.box[0] + s.box[2]) / 2, (s.box[1] + s.box[3]) / 2) for s in shapes]
        for category in ("place", "relation") * 200:
            found = data.expression(rng, shapes, category)
            if found is None:
                continue
            text, target = found
            for phrase, degree in directions.items():
                if phrase not in text or "to the left of" in text:
                    continue
                before, _, after = text.partition(phrase)
                who, whom = (before, after) if category == "relation" else (before + after, "")
                said = set(plain_words(who.strip())) - {"the", "any"}
                able = [i for i, s in enumerate(shapes) if said <= set(s[:3])]
                assert target in able, text
                values = {i: degree(*centres[i]) for i in able}
                if category == "relation":
                    named = set(plain_words(whom.strip())) - {"the", "any"}
                    others = [i for i, s in enumerate(shapes) if named <= set(s[:3])]
                    assert len(others) == 1, text
                    origin = degree(*centres[others[0]])
                    values.pop(others[0], None)
                    assert values[target] > origin, text
                assert values[target] == max(values.values()), text
                checked[phrase] += 1
                needed += len(able) > 1
    assert min(checked.values()) >= 10, checked
    assert needed > sum(checked.values()) / 2  # mostly the other words would not be enough


@pytest.fixture
def small_shapes(monkeypatch):
    """A data set of a few scenes in place of the thousands."""
    counts = {"val": 12, "testA": 6, "testB": 6, "train": 24}
    small = {split: (counts[split], *more) for split, (_, *more) in data.SPLITS.items()}
    monkeypatch.setattr(data, "SPLITS", small)


def test_shapes_are_read_as_refcoco_is(small_shapes, tmp_path):
    """Generated on first use in RefCOCO's layout; no scene in two splits; boxes lie on their shapes;
    every word is one token of its vocabulary; the next use reads the same files."""
    sets = {s: GroundingDataset("shapes", s, tmp_path, 80) for s in data.SPLITS}
    folder = tmp_path / "shapes"
    assert sorted(os.listdir(tmp_path)) == ["shapes"]
    stamp = (folder / "refs(unc).p").stat().st_mtime_ns
    scenes = {split: {s.image for s in dataset.samples} for split, dataset in sets.items()}
    assert all(scenes.values()) and len(set.union(*scenes.values())) == sum(
        map(len, scenes.values())
    )
    tokenizer = Tokenizer(folder / "bpe_vocab.txt.gz")
    for split, dataset in sets.items():
        assert not dataset.report
        for sample in dataset.samples:
            assert len(tokenizer.encode(sample.text)) == len(sample.text.split()), sample.text
        relations = [any(w in s.text for w in RELATION_WORDS) for s in dataset.samples]
        assert {"testA": not any(relations), "testB": all(relations)}.get(split, any(relations))
    captions = json.loads((folder / "captions.json").read_text())
    assert {os.path.basename(s.image) for s in sets["train"].samples} <= captions.keys()
    assert GroundingDataset("shapes", "val", tmp_path, 80).samples == sets["val"].samples
    assert (folder / "refs(unc).p").stat().st_mtime_ns == stamp
    first = sets["val"].samples[0]
    pixels = np.asarray(load_image(first.image)).astype(float)
    x1, y1, x2, y2 = map(round, first.box)
    inside = pixels[y1:y2, x1:x2].std(axis=(0, 1)).max()
    assert inside > 20  # something is drawn there


RELATION_WORDS = (
    *("left of", "right of", "above", "over", "below", "under", "beneath"),
    *("closest", "nearest", "next to", "farthest", "furthest away"),
)


def test_half_finished_shapes_are_not_used(small_shapes, tmp_path, monkeypatch):
    """Stopped while the data set is written, nothing of it is taken for whole: the next run makes it."""

    def stop(words):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "learn_merges", stop)
        with pytest.raises(KeyboardInterrupt):
            GroundingDataset("shapes", "val", tmp_path, 80)
    assert not (tmp_path / "shapes").exists()
    assert len(GroundingDataset("shapes", "val", tmp_path, 80)) > 20
    assert sorted(os.listdir(tmp_path)) == ["shapes"]


# ------------------------------------------------------------------------------------------- check


def command(monkeypatch, *words):
    """Run python data.py with these words; gives what it exits with, None if it just ends."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, words)])
    try:
        data.main()
    except SystemExit as stop:
        return stop.code


def test_check_counts_what_is_there_and_what_is_not(tmp_path, monkeypatch, capsys):
    """A table by split; exit status 1 and the first names where something is missing."""
    half = io.BytesIO()
    plain_picture(200, 200).save(half, "JPEG")
    rows = [
        {"texts": ["a", "b", " "]},
        {"image": None},
        {"size": (40, 60), "texts": ["of another size"]},
        {"texts": ["truncated"]},
        {"bbox": [50, 30, 20, 20]},  # clipped
        {"bbox": [5, 5, 0, 0], "texts": ["flat"]},
        {"split": "val"},
        {"split": "testA"},
    ]
    make_refer(tmp_path, rows)
    folder = tmp_path / "images/mscoco/images/train2014"
    (folder / "COCO_train2014_000000000004.jpg").write_bytes(half.getvalue()[:-900])
    source = data.DATASETS["refcoco"]._replace(counts=(9, 1, 1, 5))
    monkeypatch.setitem(data.DATASETS, "refcoco", source)
    error = command(monkeypatch, "check", "--dataset", "refcoco", "--data-root", tmp_path)
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table == [
        [
            "split",
            "expressions",
            "published",
            "missing",
            "images",
            "unreadable",
            "images",
            "odd",
            "boxes",
        ],
        ["train", "8", "9", "1", "2", "2"],
        ["val", "1", "1", "0", "0", "0"],
        ["testA", "1", "1", "0", "0", "0"],
        ["testB", "0", "5", "0", "0", "0"],
    ]
    for what in ("train has 8 expr", "missing in train: ", "unreadable in train: ", "testB has 0"):
        assert what in error
    names = [f"COCO_train2014_{number:012d}.jpg" for number in range(1, 9)]
    assert [name in error for name in names] == [False, True, True, True] + [False] * 4
    assert "val" not in error and "\n" not in error


def test_check_of_own_data(tmp_path, monkeypatch, capsys):
    """No published numbers; a box outside of its picture is odd, not missing; shapes are whole."""
    plain_picture().save(tmp_path / "cup.jpg")
    boxes = [1, 2, 30, 20], [50, 30, 70, 50], [-5, 2, 9, 9]
    rows = [{"image": "cup.jpg", "text": "a cup", "box": box} for box in boxes]
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert command(monkeypatch, "check", "--dataset", "own", "--data-root", tmp_path) is None
    assert capsys.readouterr().out.splitlines()[1:] == [f"val{3:17}{'-':>11}{0:16}{0:19}{2:11}"]
    (tmp_path / "cup.jpg").unlink()
    error = command(monkeypatch, "check", "--dataset", "own", "--data-root", tmp_path)
    assert "missing in val" in error and "cup.jpg" in error
    for name in ("refcoco", "flickr30k", "coco"):
        error = command(monkeypatch, "check", "--dataset", name, "--data-root", tmp_path)
        assert isinstance(error, str) and name in error and "\n" not in error


# ---------------------------------------------------------------------------------------- download


class Server(BaseHTTPRequestHandler):
    """Serves FILES by path: content, and how it misbehaves. Keeps (path, Range) of what was asked."""

    files, asked = {}, []
    protocol_version = "HTTP/1.0"

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.asked.append((self.path, wanted))
        content, manner = self.files.get(self.path, (b"", "absent"))
        if manner == "absent":
            return self.send_error(404)
        ranged = wanted and manner != "no ranges"
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if ranged else 0
        if start >= len(content):
            return self.send_error(416)
        total = len(content) + {"claims more": 100, "claims less": -100}.get(manner, 0)
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Type", "text/html" if manner == "page" else "application/zip")
        self.send_header("Content-Length", str(total - start))
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
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
    """The address of a server on loopback, for which alone the network is open again."""
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


@pytest.mark.parametrize("manner", ["well", "breaks off", "no ranges"])
def test_a_download_goes_on_where_it_broke_off(server, tmp_path, manner):
    """By ranges; from the start where the server knows none. Nothing but the whole file is left."""
    Server.files["/file.bin"] = CONTENT, manner
    path = tmp_path / "new/file.bin"
    download(server + "/file.bin", path, hashlib.sha256(CONTENT).hexdigest())
    assert path.read_bytes() == CONTENT and os.listdir(path.parent) == ["file.bin"]
    third = len(CONTENT) // 3
    starts = {"breaks off": [0, third, 2 * third, 3 * third], "no ranges": [0, len(CONTENT) // 2]}
    asked = [int((wanted or "bytes=0-")[6:-1]) for _, wanted in Server.asked]
    assert asked == starts.get(manner, [0])


def test_what_was_fetched_is_kept_for_the_next_call(server, tmp_path):
    """A server that gives no more: one sentence, with the rest asked for by the next call. A web page
    in its place changes nothing; a part longer than the file is thrown away."""
    url, path, part = server + "/file.bin", tmp_path / "file.bin", tmp_path / "file.bin.part"
    for manner in ("stops", "page"):
        Server.files["/file.bin"] = CONTENT, manner
        with pytest.raises(HiVGError, match="file.bin.*run it again") as caught:
            download(url, path)
        assert "\n" not in str(caught.value)
        assert part.read_bytes() == CONTENT[: len(CONTENT) // 2] and not path.exists()
    Server.files["/file.bin"], Server.asked[:] = (CONTENT, "well"), []
    download(url, path)
    assert path.read_bytes() == CONTENT and not part.exists()
    assert Server.asked == [("/file.bin", f"bytes={len(CONTENT) // 2}-")]
    path.unlink()
    part.write_bytes(CONTENT + b"more")
    download(url, path)
    assert path.read_bytes() == CONTENT


def test_a_server_that_lies_is_not_believed(server, tmp_path):
    """More claimed than there is, a wrong sha256, no such file: an error, and never a file."""
    Server.files["/file.bin"] = CONTENT, "claims more"
    with pytest.raises(HiVGError, match="file.bin"):
        download(server + "/file.bin", tmp_path / "file.bin")
    Server.files["/file.bin"] = CONTENT, "claims less"
    with pytest.raises(HiVGError, match="sha256"):
        download(server + "/file.bin", tmp_path / "file.bin", hashlib.sha256(CONTENT).hexdigest())
    with pytest.raises(HiVGError, match="absent.bin.*404"):
        download(server + "/absent.bin", tmp_path / "absent.bin")
    assert not os.listdir(tmp_path)


def zipped(files):
    """A zip archive of {name: bytes}."""
    with zipfile.ZipFile(archive := io.BytesIO(), "w") as target:
        for name, content in files.items():
            target.writestr(name, content)
    return archive.getvalue()


def put_on_server(root):
    """RefCOCO's annotations and pictures as archives, as their servers have them."""
    source = root / "source"
    rows = [{"split": split} for split in ("train", "val", "testA", "testB")]
    make_refer(source, rows)
    for url, folder in (
        ("/20220413011718/refcoco.zip", "refcoco"),
        ("/train2014.zip", "images/mscoco/images/train2014"),
    ):
        files = [source / folder, *(source / folder).iterdir()]
        inside = {str(path.relative_to(files[0].parent)): path for path in files[1:]}
        content = {name: path.read_bytes() for name, path in inside.items()}
        Server.files[url] = zipped({f"{files[0].name}/": b"", **content}), "breaks off"
    return source


def test_download_brings_all_once(server, tmp_path, monkeypatch, capsys):
    """Annotations and pictures come to where the loader looks; a second call asks for nothing, and
    a third only for what has gone missing."""
    put_on_server(tmp_path)
    root = tmp_path / "data"
    words = "download", "--dataset", "refcoco", "--data-root", root
    assert command(monkeypatch, *words) is None
    assert sorted(os.listdir(root)) == ["images", "refcoco"]
    for split in ("train", "val", "testA", "testB"):
        assert len(list(GroundingDataset("refcoco", split, root, 64))) == 1
    Server.asked.clear()
    assert command(monkeypatch, *words) is None and not Server.asked
    pictures = root / "images/mscoco/images/train2014"
    (pictures / "COCO_train2014_000000000002.jpg").unlink()
    assert command(monkeypatch, *words) is None
    assert {path for path, _ in Server.asked} == {"/train2014.zip"} and len(
        os.listdir(pictures)
    ) == 4


def test_annotations_come_from_zenodo_where_the_archive_has_none(server, tmp_path, monkeypatch):
    """MDETR's files, of all that its tar holds, to a folder below the data root; refcocog-google,
    which it has not, is an error."""
    source = put_on_server(tmp_path)
    Server.files.pop("/20220413011718/refcoco.zip")
    names = [f"{s}_{t}" for s in ("refcoco", "gqa") for t in ("train", "val", "testA", "testB")]
    for name in names:
        file = "COCO_train2014_000000000001.jpg"
        write_mdetr(source / f"OpenSource/finetune_{name}.json", file, name)
    with tarfile.open(fileobj=(archive := io.BytesIO()), mode="w:gz") as target:
        target.add(source / "OpenSource", "OpenSource")
    Server.files["/mdetr_annotations.tar.gz"] = archive.getvalue(), "well"
    root = tmp_path / "data"
    assert command(monkeypatch, "download", "--dataset", "refcoco", "--data-root", root) is None
    assert sorted(os.listdir(root)) == ["images", "mdetr_annotations"]
    assert len(os.listdir(root / "mdetr_annotations")) == 4
    (sample,) = GroundingDataset("refcoco", "testB", root, 64).samples
    assert sample.text == "refcoco_testb" and sample.box == XYXY
    name = "refcocog-google"
    error = command(monkeypatch, "download", "--dataset", name, "--data-root", root)
    assert "refcocog.zip" in error and "404" in error


def linked(kind):
    """A zip or tar that holds a symbolic link."""
    archive = io.BytesIO()
    if kind == "zip":
        entry = zipfile.ZipInfo("refcoco/link")
        entry.external_attr = 0o120777 << 16
        with zipfile.ZipFile(archive, "w") as target:
            target.writestr(entry, "/etc/passwd")
    else:
        entry = tarfile.TarInfo("refcoco/link")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        with tarfile.open(fileobj=archive, mode="w") as target:
            target.addfile(entry)
    return archive.getvalue()


BAD = {  # what is served as an archive
    "../": zipped({"refcoco/good.json": b"{}", "refcoco/../../../evil.json": b"{}"}),
    "absolute": zipped({"/evil.json": b"{}"}),
    "link": linked("zip"),
    "link in a tar": linked("tar"),
    "page": b"<html><body>This service is no more.</body></html>" * 100,
    "damaged": zipped({"refcoco/good.json": CONTENT})[:5000] + bytes(1000),
}


@pytest.mark.parametrize("which", BAD)
def test_a_bad_archive_leaves_nothing(server, tmp_path, which):
    """Names that lead outside, links, a web page, half an archive: refused, told, thrown away."""
    Server.files["/bad.zip"] = BAD[which], "well"
    root = tmp_path / "a/b"
    with pytest.raises(HiVGError, match="bad.zip cannot be unpacked") as caught:
        data.fetch(server + "/bad.zip", root, "refcoco")
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()] and not os.listdir(root)
    assert not os.path.exists("/evil.json")


def test_an_archive_that_was_not_unpacked_is_not_fetched_again(server, tmp_path, monkeypatch):
    """Stopped while it unpacks: no file is half there, the archive is kept, and used the next time."""
    put_on_server(tmp_path)
    root = tmp_path / "data"

    def stop(source, target):
        target.write(source.read(10))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data.shutil, "copyfileobj", stop)
        words = "download", "--dataset", "refcoco", "--data-root", root
        assert "stopped" in command(monkeypatch, *words)
    assert os.listdir(root) == ["refcoco.zip"]
    Server.asked.clear()
    assert command(monkeypatch, *words) is None
    assert {path for path, _ in Server.asked} == {"/train2014.zip"}
    assert sorted(os.listdir(root)) == ["images", "refcoco"]


@pytest.mark.parametrize("name", ["referit", "flickr30k", "mixup", "own", "coco"])
def test_what_cannot_be_downloaded_says_where_to_ask(server, tmp_path, monkeypatch, name):
    """One sentence: whom to ask, what the files must look like; nothing is asked for."""
    error = command(monkeypatch, "download", "--dataset", name, "--data-root", tmp_path)
    words = {"own": "train.jsonl", "coco": "choose one of", "flickr30k": "form"}
    assert words.get(name, "index lists") in error and "\n" not in error and not Server.asked


def test_shapes_are_downloaded_by_drawing_them(small_shapes, tmp_path, monkeypatch, capsys):
    """download makes them, and check finds them whole."""
    for job in ("download", "check"):
        assert command(monkeypatch, job, "--dataset", "shapes", "--data-root", tmp_path) is None
    table = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[0] for line in table] == ["train", "val", "testA", "testB"]
    assert all(line.split()[2:] == ["-", "0", "0", "0"] for line in table)


def test_a_reduced_jpeg_shows_the_same(tmp_path):
    """Decoded at a fraction of its size or whole, a region of a JPEG comes out alike and in place; other formats as ever."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(256, size=(12, 16, 3), dtype="u1"))
    coarse.resize((643, 481)).save(tmp_path / "a.jpg", quality=95)
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    for region, long_side in (((0, 0, 643, 481), 56), ((100.5, 60, 420, 400.25), 128)):
        geometry = letterbox(region, 224, long_side)
        whole = data.cut(load_image(tmp_path / "a.jpg"), geometry)
        for name, most in (("a.jpg", 2.0), ("a.png", 0.0)):
            with data.opened(tmp_path / name) as image:
                found = data.cut_reduced(image, geometry)
                assert (image.width < 643) == (name == "a.jpg")
            difference = np.abs(np.asarray(found, float) - np.asarray(whole, float))
            assert found.size == whole.size and difference.mean() <= most
