"""data.py: images, geometry, augmentation, batches, annotations, shapes, check and download.

What users' own files, names and units are like is tested in test_cases.py.
"""

import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen  # before conftest forbids it

import numpy as np
import pytest
import torch
from conftest import Python2Pickler, close, make_refer, plain_picture
from PIL import Image, ImageOps

import data
from clip_model import HiVGError, Tokenizer, run_main
from data import box_to_pixels, box_to_square, letterbox, load_image

TRAIN2014 = "images/mscoco/images/train2014"
COCO_NAME = "COCO_train2014_{:012d}.jpg"


def open_split(root, split="train", *names, side=64, **more):
    """A split of one or several data sets below a root; without names of refcoco."""
    annotations = {name: data.read_annotations(name, root) for name in names or ["refcoco"]}
    return data.open_split(annotations, split, image_size=side, **more)


def error_of(function, *args, **more):
    """The text of the HiVGError that a call raises, which is one line."""
    with pytest.raises(HiVGError) as caught:
        function(*args, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def command(monkeypatch, *words, program=data):
    """Run a program with these words. Returns what it exits with, None if it just ends."""
    monkeypatch.setattr(sys, "argv", [program.__file__, *map(str, words)])
    try:
        program.main()
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
        pixels[name] = np.asarray(image).astype(float)
        assert data.preprocess(image, 64)[0].any()
    assert abs(pixels["gray_16bit.png"].mean() - 128) < 5
    for name in ("cmyk_adobe.jpg", "exif_orientation_6.jpg", "exif_orientation_3.jpg"):
        red, _, blue = pixels[name][:20].mean(axis=(0, 1))
        assert blue > red + 20, name  # the sky is blue and at the top
    assert pixels["animated.gif"].mean() > 40  # the last frame is black


WHITE = (255, 255, 255)
MODES = [  # mode, colour, options of the file, what it is in RGB, over white
    ("1", 1, {}, WHITE),
    ("L", 90, {}, (90, 90, 90)),
    ("LA", (9, 0), {}, WHITE),
    ("P", 0, {}, (7, 8, 9)),
    ("P", 0, {"transparency": 0}, WHITE),
    ("RGBA", (9, 60, 9, 51), {}, (206, 216, 206)),
    ("CMYK", (0, 255, 255, 0), {}, (255, 0, 0)),
]


@pytest.mark.parametrize("mode, colour, options, expected", MODES)
def test_every_mode_becomes_rgb(tmp_path, mode, colour, options, expected):
    """Alpha is laid over white; a palette's transparent colour is white."""
    image, path = Image.new(mode, (9, 5), colour), tmp_path / "image.tiff"
    if mode == "P":
        image.putpalette([7, 8, 9])
        path = tmp_path / "image.png"
    image.save(path, **options)
    found = load_image(path)
    assert (found.mode, found.size, found.getpixel((4, 2))) == ("RGB", (9, 5), expected)


def test_unreadable_images_are_one_sentence(tmp_path):
    """A file that is missing, empty, a folder, text, half a JPEG, a PNG with a wrong byte, or claims
    30000 x 30000 pixels is named."""
    noise = Image.frombytes("RGB", (50, 50), random.Random(0).randbytes(7500))
    noise.save(jpeg := io.BytesIO(), "JPEG")
    noise.save(png := io.BytesIO(), "PNG")
    files = {
        "empty.jpg": b"",
        "text.jpg": b"this is not an image",
        "half.jpg": jpeg.getvalue()[:2000],
        "flipped.png": png.getvalue()[:20] + b"!" + png.getvalue()[21:],
        "bomb.ppm": b"P6 30000 30000 255\n" + bytes(99),
    }
    (tmp_path / "folder.jpg").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in ("absent.jpg", "folder.jpg", *files):
        assert name in error_of(load_image, tmp_path / name)
    assert "pixels" in error_of(load_image, tmp_path / "bomb.ppm")  # nothing of it is decoded


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_exif_orientation(tmp_path, kind, orientation):
    """A user's photograph is turned upright, as Pillow's own exif_transpose does."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{kind}"
    plain_picture(60, 40, (0, 0, 20, 12)).save(path, exif=exif, quality=90)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(load_image(path), expected)


def test_a_published_image_stays_as_it_is_stored(tmp_path):
    """Its boxes count so, whatever its EXIF says."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = plain_picture(60, 40, (0, 0, 20, 20))
    row = {"image": image, "bbox": [0, 0, 20, 20], "save": {"exif": exif, "quality": 95}}
    item = open_split(make_refer(tmp_path, [row]), side=60)[0]
    assert item["image"][1, 12:28, 2:18].max() < 70 and item["image"][1, 12:48, 40:].min() > 100
    close(item["box"] * 60, torch.tensor([10.0, 20, 20, 20]), 1e-4)


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
    """The long side fills the square, padding is even, the short side has a pixel at least."""
    geometry = letterbox((0, 0, *size), 224)
    assert geometry == ((0, 0, *size), INNER[size], 224)
    left, top, width, height = geometry.inner
    whole = torch.tensor([left + width / 2, top + height / 2, width, height])
    close(box_to_square((0, 0, *size), geometry) * 224, whole, 1e-3)


def test_scaling_is_an_average():
    """Stripes of single pixels become grey; leaving pixels out would keep them, or one of the two."""
    stripes = Image.fromarray(np.tile(np.uint8([[0], [255]]), (160, 320))).convert("RGB")
    square, _ = data.preprocess(stripes, 64)
    assert abs(square.float()[:, 2:-2] - 127.5).max() < 15


def test_boxes_are_cut_at_the_region():
    """A predicted box comes back inside the image; an annotated one is cut at the crop. Both follow
    the crop's place and scale, for one box and for a batch with a Geometry for each."""
    whole = letterbox((0, 0, 640, 480), 224)
    crop = letterbox((100, 60, 420, 220), 224, 128, (1, 0.25))
    assert crop.inner == (96, 40, 128, 64)
    square = box_to_square((20, 100, 180, 140), crop)
    close(square * 224, torch.tensor([112.0, 64, 32, 16]), 1e-4)
    boxes = torch.stack([torch.tensor([0.5, 0.5, 2, 2]), square])
    expected = torch.tensor([[0.0, 0, 640, 480], [100, 100, 180, 140]])
    region, inner = map(torch.tensor, zip(whole[:2], crop[:2]))
    close(box_to_pixels(boxes, data.Geometry(region, inner, 224)), expected, 1e-3)
    close(box_to_pixels(square, crop), expected[1], 1e-3)


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
    drawn and its centre is seen; `inner` is where there is image, the rest is black; and the box
    comes back to where it was annotated, or to the crop's edge."""
    dataset, looks = open_split(painted, side=112, augment=augment), set()
    for seed, index in itertools.product(range(10 if augment else 1), range(len(dataset))):
        item = dataset[index, seed]
        image, (left, top, width, height) = item["image"].int(), item["inner"].tolist()
        green = image[1] - image[0] > 51  # jitter leaves it greener than grey
        rows, columns = torch.where(green)
        found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        centre, size = (item["box"] * 112).split(2)
        close(found.float(), torch.cat([centre - size / 2, centre + size / 2]), 2)
        column, row = centre.int()
        assert green[row, column]
        seen = torch.zeros(112, 112, dtype=torch.bool)
        seen[top : top + height, left : left + width] = True
        assert torch.equal(image.any(dim=0), seen)
        geometry = data.Geometry(item["crop"], item["inner"], 112)
        annotated = torch.tensor(dataset.samples[index].box).view(2, 2)
        annotated = annotated.clamp(*item["crop"].view(2, 2)).flatten()
        close(box_to_pixels(item["box"], geometry), annotated, 1e-2)
        looks.add((width, image[0][~green & seen].median().item()))
    sizes, greys = map(set, zip(*looks))
    assert not augment or min(len(sizes), len(greys)) >= 7  # sizes and colours differ


def test_crops_keep_the_centre_and_spare_words_of_place():
    """About half are crops, of 384 to 600 pixels a side where the short side has 400 to 600; they
    contain the box's centre. An expression with a word of place has none, in capitals neither. The
    long side in the square is S, 6/7 S, ... or S/4, and its place is random."""
    size, box, crops, long_sides, lefts = (640, 300), (500.0, 10.0, 638.0, 120.0), [], set(), set()
    for seed in range(300):
        region, inner, _ = data.random_geometry(random.Random(seed), size, box, "the dog", 224)
        x1, y1, x2, y2 = region
        assert 0 <= x1 <= 569 <= x2 <= 640 and 0 <= y1 <= 65 <= y2 <= 300
        if region != (0, 0, *size):
            crops.append((x1, x2 - x1))
            assert 191.9 <= x2 - x1 <= 450.1 and 191.9 <= y2 - y1
        left, top, width, height = inner
        assert 0 <= left <= 224 - width and 0 <= top <= 224 - height
        long_sides.add(max(width, height))
        lefts.add(left)
        text = ("Leftmost one", "the RIGHT", "top", "bottom", "middle")[seed % 5]
        uncropped = data.random_geometry(random.Random(seed), size, box, text, 224)
        assert uncropped.crop == (0, 0, *size)
    assert 100 < len(crops) < 200 and long_sides == {224, 192, 160, 128, 96, 64, 56}
    assert min(len(lefts), len(set(crops))) > 50


def test_augmentation_follows_from_the_seed_and_the_index(painted):
    """The same seed and index give the same item, after any others; others give another."""
    dataset = open_split(painted, augment=True)
    first = dataset[3, (0, 1, 2)]["image"]
    for other in ((5, 7), (0, 0), (3, (0, 1, 3)), (3, (0, 2, 2)), (3, (1, 1, 2)), (2, (0, 1, 2))):
        assert not torch.equal(first, dataset[other]["image"]), other
    assert torch.equal(first, open_split(painted, augment=True)[3, (0, 1, 2)]["image"])


def test_large_photographs_are_decoded_at_a_fraction(tmp_path):
    """Never below what the square needs; the region follows. A PNG has no such fractions."""
    picture = plain_picture(1600, 1200)
    for width, kind, fraction in (
        (100, "jpg", 8),
        (110, "jpg", 4),
        (800, "jpg", 1),
        (100, "png", 1),
    ):
        picture.save(tmp_path / f"a.{kind}")
        image = data.open_image(tmp_path / f"a.{kind}", upright=False)
        geometry = letterbox((200, 100, 1000, 700), 800, width)
        reduced = data.reduce_while_decoding(image, geometry)
        assert image.size == (1600 / fraction, 1200 / fraction)
        assert reduced.crop == tuple(value / fraction for value in geometry.crop)
        assert reduced.inner == geometry.inner


# ------------------------------------------------------------------------------------------ batches


@contextlib.contextmanager
def start_method(name):
    """Processes are started so meanwhile; None: as usual."""
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method(name or usual, force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(usual, force=True)


def test_batches(refer_root, tokenizer):
    """A batch has the items in the order asked for: bytes, a quarter of what floats would take, and
    the tokens that the tokenizer gives, cut to the longest text. Images that are kept are the same."""
    dataset = open_split(refer_root, tokenizer=tokenizer)
    plain, kept = (open_split(refer_root, cache=cache) for cache in (False, True))
    (batch,) = data.BatchLoader(dataset)([[5, 0, 2]])
    assert batch["text"] == ["blue one", "red one", "red one"]
    assert batch["image"].shape == (3, 3, 64, 64) and batch["image"].dtype == torch.uint8
    assert torch.equal(batch["tokens"], tokenizer(batch["text"])[:, :4])
    for row, index in enumerate((5, 0, 2)):
        for key in ("image", "crop", "inner", "box", "object"):
            for other in (plain, kept, kept):
                assert torch.equal(batch[key][row], torch.as_tensor(other[index][key]))
    assert "tokens" not in plain[0] and len(kept.images) == 3 and len(plain.images) == 1


@pytest.mark.parametrize("method", [None, "forkserver"])
def test_workers_read_what_one_process_reads(painted, method):
    """However they are started (by forkserver in Python 3.14), and whether or not the epoch before
    was read to its end; they live on and keep no stale seed."""
    dataset, epochs = open_split(painted, augment=True), []
    others = set(multiprocessing.active_children())
    with start_method(method):
        for workers in (0, 2 if method is None else 1):
            loader = data.BatchLoader(dataset, workers)
            next(loader([[7], [6], [5]], seed=3))
            started = set(multiprocessing.active_children()) - others
            read = [list(loader([[1, 3], [2, 0], [4, 5]], seed)) for seed in (0, 1, 0)]
            epochs.append([torch.stack([b["image"] for b in batches]) for batches in read])
            assert set(multiprocessing.active_children()) - others == started
            assert len(started) == workers
    alone, by_workers = epochs
    assert all(map(torch.equal, alone, by_workers)) and torch.equal(alone[0], alone[2])
    assert not torch.equal(alone[0], alone[1])
    assert torch.equal(alone[1][1, 0], dataset[2, 1]["image"])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_the_reading_by_its_name(tmp_path, workers):
    """Also in a worker it names the file, and the program ends with one sentence, without the
    worker's traceback; torch's own DataLoader names the file, too."""
    make_refer(tmp_path, [{}, {}])
    path = tmp_path / TRAIN2014 / COCO_NAME.format(2)
    path.write_bytes(path.read_bytes()[:400])
    dataset = open_split(tmp_path)
    plain = iter(torch.utils.data.DataLoader(dataset, sampler=[1], num_workers=workers))
    assert f"{path} cannot be read" in error_of(next, plain)
    loader = data.BatchLoader(dataset, workers)
    with pytest.raises(SystemExit) as ending:
        run_main(lambda: list(loader([[0], [0, 1]])))
    assert str(ending.value).startswith(f"error: {path} cannot be read")
    for iterator in (plain, loader.loader._iterator) if workers else ():
        iterator._shutdown_workers()  # else torch waits for 5 seconds


def test_default_workers(monkeypatch):
    """As many as this process may use CPUs, shared by the processes of the machine, 8 at most."""
    for cpus, processes, expected in ((16, 1, 8), (3, 1, 3), (16, 4, 4), (2, 4, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cpus=cpus: range(cpus))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert data.default_workers() == expected


def test_packed_samples():
    """It is indexed and iterated over as a list is."""
    samples = [data.Sample(f"{i}.jpg", "é" * i, (i, 0.5, 2.0, 3.0), (i, 1)) for i in range(5)]
    packed = data.PackedSamples(samples)
    assert list(packed) == samples and len(packed) == 5 and list(data.PackedSamples()) == []
    assert packed[-1] == samples[-1] and packed[torch.tensor(2)] == samples[2]
    with pytest.raises(IndexError):
        packed[-6]


def test_a_bar_is_for_terminals(capsys):
    """Elsewhere it is a line a minute at most: none of a short job."""
    assert list(data.progress(range(999), "reading")) == list(range(999))
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------ annotation families

XYXY, XYWH = (10.25, 10.0, 30.5, 30.0), (10.25, 10.0, 20.25, 20.0)
FILES = {"referit": "38942.jpg", "flickr30k": "1000092795.jpg", "own": "mine/cup.jpg"}


def put_image(root, name, file=None):
    """Write an image with XYXY's object into the first folder of a data set. Returns its path."""
    file = file or FILES.get(name, COCO_NAME.format(1))
    path = root / data.DATASETS[name].folders[0] / file
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
    pickler = Python2Pickler if "python 2" in how else pickle.Pickler
    with open(path, "wb") as file:
        for part in parts if how.startswith("legacy") else [content]:
            pickler(file, protocol=0 if "protocol 0" in how else 2).dump(part)


def write_family(root, name, family, how, split="train", text=" The RED Café "):
    """Two expressions of one object in the format of a family of files, with its image."""
    path = root / data.DATASETS[name].files[family].format(split)
    file = Path(put_image(root, name)).name
    size, texts = {"height": 40, "width": 60}, (text, "it's")
    if family == "refer":
        row = {"bbox": list(XYWH), "texts": texts, "split": split}
        make_refer(root, [row], path.parent.name, path.name[5:-3])
        write_pickle(path, pickle.loads(path.read_bytes(), encoding="latin-1"), how)
    elif family == "mdetr":
        path.parent.mkdir(parents=True, exist_ok=True)
        images = [{"id": 7 + i, "file_name": file, **size, "caption": texts[i]} for i in range(2)]
        boxes = [{"id": 99 - i, "image_id": 7 + i, "bbox": XYWH} for i in range(2)]
        path.write_text(json.dumps({"images": images, "annotations": boxes}))
    elif family == "own":
        lines = [json.dumps({"image": FILES["own"], "text": t, "box": XYXY}) for t in texts]
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        middle = {"referit": ([60, 40], XYXY), "flickr30k": (XYXY,)}.get(name, (size, XYWH))
        more = () if name == "flickr30k" else ([("r1", ["red"])],)
        write_pickle(path, [(file, *middle, text, *more) for text in texts], how)


HOW = {  # ways in which the files of a family are written
    "refer": ("python 2, protocol 0", "python 2, protocol 2", "python 3"),
    "index": ("zip", "legacy", "pickle", "python 2, protocol 2", "legacy, python 2"),
}
CASES = [("refcoco", family, how) for family in HOW for how in HOW[family][1:]]
CASES += [
    (name, family, HOW.get(family, ["zip"])[0])
    for name, info in data.DATASETS.items()
    if name not in data.TRAIN_SCENES
    for family in info.files
    if family != "exports"  # see test_cases.py
]


@pytest.mark.parametrize("name, family, how", CASES)
def test_every_data_set_in_every_family(tmp_path, name, family, how):
    """From files in the real formats come the same samples: text as it is written, a box of corners
    with its fractions, the path of the image, and its size where it is certain."""
    splits = ["train"] if family == "refer" else list(data.DATASETS[name].splits[:2])
    for split in splits:
        write_family(tmp_path, name, family, how, split)
    dataset, image = open_split(tmp_path, "train", name, side=60), put_image(tmp_path, name)
    size, upright = None if name in FILES else (60, 40), family == "own"
    expected = [(image, text, XYXY, size, upright) for text in ("The RED Café", "it's")]
    assert list(dataset.samples) == expected and dataset.report == [f"{name}, train: 2 expressions"]
    assert list(data.read_annotations(name, tmp_path)) == splits
    assert dataset[0]["object"] == dataset[1]["object"]
    close(dataset[0]["box"] * 60, torch.tensor([20.375, 30, 20.25, 20]), 1e-4)


def test_places_of_files(tmp_path):
    """refer's files count before index lists, these before MDETR's; all may lie one folder below.
    Images may lie in the authors' folders or others that are usual, with COCO 2017's names too."""
    image = Path(put_image(tmp_path, "refcoco"))
    for family in ("mdetr", "index", "refer"):
        write_family(tmp_path / family, "refcoco", family, "pickle", text=family)
        assert open_split(tmp_path).samples[0].text == family
    folders = ("other/images/mscoco/images/train2014", "train2014", "images/train2014")
    for place in [f"{folder}/{image.name}" for folder in folders] + ["train2017/000000000001.jpg"]:
        (tmp_path / place).parent.mkdir(parents=True)
        image = image.rename(tmp_path / place)
        assert open_split(tmp_path).samples[0].image == str(image)


def test_what_was_left_out_or_changed_is_reported(tmp_path):
    """Boxes that stick out are clipped, those without area and empty expressions are left out, and
    the report counts them. A box in an image of unknown size is cut when the image is read."""
    rows = [
        {"texts": ["a", " ", ""]},
        {"texts": ["out"], "bbox": [-5.5, 10, 20, 100]},
        {"bbox": [10, 10, 0, 5]},
        {"bbox": [70, 10, 20, 20]},
        {"split": "val"},
    ]
    train = open_split(make_refer(tmp_path, rows))
    found = [sample[1:3] for sample in train.samples]
    assert found == [("a", (10, 10, 30, 30)), ("out", (0, 10, 14.5, 40))]
    lines = ["6 expressions", "2 empty expressions left out", "1 boxes clipped to their image"]
    lines += ["2 boxes without area left out"]
    assert set(train.report) == {f"refcoco, train: {line}" for line in lines}
    assert open_split(tmp_path, "val").report == ["refcoco, val: 1 expressions"]
    boxes = "-5, 10, 30, 60", "99, 99, 120, 120", "10, 10, 10, 30", "NaN, 0, 9, 9"
    line = f'{{"image": "{TRAIN2014}/{COCO_NAME.format(1)}", "text": "it", "box": [%s]}}\n'
    lines = [line % box for box in (*boxes, "10, 10, 30, Infinity")]
    (tmp_path / "val.jsonl").write_text("".join(lines))
    own = open_split(tmp_path, "val", "own", side=60)
    close(own[0]["box"] * 60, torch.tensor([15.0, 35, 30, 30]), 1e-4)
    assert own[0]["object"] != own[1]["object"]  # the image is the same
    lines = {"1 boxes clipped to their image", "3 boxes without area left out"}
    assert {f"own, val: {line}" for line in lines} < set(own.report)


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
    and counted, though not those on images of its own tests; such an image may be missing. A val or
    test split that one set alone has is that one's."""
    for path, numbers in MIXTURE.items():
        files = [COCO_NAME.format(number) for number in numbers]
        entries = [(file, None, XYWH, f"{path[:3]} {file[-5]}", None) for file in files]
        write_pickle(tmp_path / path, entries, "zip")
        for file in files:
            put_image(tmp_path, "refcoco", file)
    names = "refcoco", "refcocog"
    both = open_split(tmp_path, "train", *names)
    assert [sample.text for sample in both.samples] == ["unc 0", "unc 4", "gre 0"]
    left_out = "left out, since another set tests on their images"
    assert {f"refcoco, train: 3 {left_out}", f"refcocog, train: 2 {left_out}"} < set(both.report)
    assert "refcoco testB is not there, so its images are not left out" in both.report
    assert len(open_split(tmp_path)) == 5
    assert [len(open_split(tmp_path, split, *names)) for split in ("val", "testA")] == [3, 1]
    (tmp_path / TRAIN2014 / COCO_NAME.format(2)).unlink()  # in refcoco's train, refcocog's test
    assert len(open_split(tmp_path, "train", *names)) == 3
    assert COCO_NAME.format(2) in error_of(open_split, tmp_path)
    (tmp_path / "gref_umd/gref_umd_train.pth").unlink()
    assert "refcocog has no expressions of 'train'" in error_of(
        open_split, tmp_path, "train", *names
    )


# -------------------------------------------------------------------------------- wrong annotations


@pytest.mark.parametrize("name", data.DATASETS)
def test_missing_files_are_one_sentence(tmp_path, name):
    """It says what is missing, where it was looked for and where to get it."""
    text = error_of(data.read_annotations, name, tmp_path / "absent")
    assert text.startswith(f"{tmp_path}/absent has no expressions of {name}, looked for ")
    for part in (*data.DATASETS[name].files.values(), data.DATASETS[name].help):
        assert part.replace("{}", "train") in text


def test_a_split_or_an_image_that_is_not_there(tmp_path):
    """The splits that there are, and the missing image, are named."""
    make_refer(tmp_path, [{"split": "testA", "texts": ["a"]}, {"image": None}])
    assert [sample.text for sample in open_split(tmp_path, "testA").samples] == ["a"]
    for split in ("tra", "Val", "", "testB"):
        text = error_of(open_split, tmp_path, split)
        assert repr(split) in text and "train, testA" in text
    text = error_of(open_split, tmp_path)
    assert f"{TRAIN2014}/{COCO_NAME.format(2)}" in text and "cocodataset.org" in text
    make_refer(tmp_path / "none", [{"texts": [" "]}, {"bbox": [1, 1, 0, 9]}])
    assert "no usable expressions of 'train'" in error_of(open_split, tmp_path / "none")


def test_annotations_that_do_not_fit_are_one_sentence(tmp_path):
    """It names the file and the way out: an image that is not the annotated one, instances.json
    that does not fit to refs(...).p, a broken entry of own data (with its number)."""
    make_refer(tmp_path, [{"size": (40, 60)}])
    text = error_of(open_split(tmp_path).__getitem__, 0)
    assert COCO_NAME.format(1) in text and "60 x 40" in text and "40 x 60" in text
    instances = tmp_path / "refcoco/instances.json"
    for content in ("{", "[]", '{"images": []}', '{"images": [], "annotations": []}', None):
        instances.unlink() if content is None else instances.write_text(content)
        text = error_of(open_split, tmp_path)
        assert str(tmp_path / "refcoco") in text and ("data.py download" in text or "anew" in text)


GOOD = '{"image": "cup.jpg", "text": "the cup", "box": [1, 2, 3, 4]}'
BROKEN = {"}": "", "[1, 2, 3, 4]": "[1, 2, 3]", "4]": "null]", '"the cup"': "5", GOOD: "[1, 2]"}
BROKEN |= {'"cup.jpg"': "7", '"box"': '"bbox"', "3, 4": "1e999, NaN, 7"}


@pytest.mark.parametrize("old", BROKEN)
def test_a_broken_entry_is_named(tmp_path, old):
    """By its file and number, also behind another file."""
    (tmp_path / "train.jsonl").write_text(GOOD)
    lines = [GOOD, GOOD.replace(old, BROKEN[old]), GOOD]
    (tmp_path / "val.jsonl").write_text("\n".join(lines))
    text = error_of(data.read_annotations, "own", tmp_path)
    assert text.startswith(f"{tmp_path / 'val.jsonl'}, entry 2, ") and "the red cup" in text


@pytest.mark.parametrize("error", [NameError("boxs"), AttributeError("'list' has no 'itmes'")])
def test_a_slip_in_a_reader_keeps_its_type(tmp_path, monkeypatch, error):
    """It isn't told as a damaged file, neither of a reader nor of what takes its entries."""
    (tmp_path / "train.jsonl").write_text(GOOD)

    def slip(*args, **more):
        raise error

    for place, mapping in (("own", data.FAMILIES), ("add_samples", vars(data))):
        with monkeypatch.context() as patch:
            patch.setitem(mapping, place, slip)
            with pytest.raises(type(error)):
                data.read_annotations("own", tmp_path)


MKDIR = "cos\nmkdir\n(S'{}'\ntR."  # a pickle that makes a folder if code is allowed


def zipped(files):
    """A zip archive of {name: bytes}."""
    with zipfile.ZipFile(archive := io.BytesIO(), "w") as target:
        for name, content in files.items():
            target.writestr(name, content)
    return archive.getvalue()


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
    assert f"{path} cannot be read" in text
    assert not (tmp_path / "ran").exists()
    assert "weights_only" not in text
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
    entry = (COCO_NAME.format(1), {"height": 40, "width": 60}, [10, 10, 20, 20], "red one", [])
    write_pickle(tmp_path / "unc+/unc+_train.pth", [entry] * 2, "zip")
    line = '{"image": "b.png", "text": "red one", "box": [10, 10, 30, 30]}\n'
    (tmp_path / "own/train.jsonl").write_text(2 * line)
    names = {"unc+": ("refcoco+", tmp_path), "own": ("own", tmp_path / "own")}
    name, root = names.get(file.split("/")[0], ("refcoco", tmp_path))
    content, rng, told = (tmp_path / file).read_bytes(), random.Random(file), 0
    for number in range(80):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(content))
            damaged[start : start + 4] = rng.randbytes(4)
        if number % 3 == 0:
            del damaged[start:]
        (tmp_path / file).write_bytes(damaged)
        options = {"side": 32, "tokenizer": tokenizer, "augment": number % 2}
        try:
            items = list(open_split(root, "train", name, **options))
        except HiVGError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error)
            told += 1
            continue
        for item in items:
            place, size = item["box"].split(2)
            corners = torch.stack([place - size / 2, place + size / 2, size])
            assert -1e-6 <= corners.min() and corners.max() <= 1 + 1e-6 and item["text"].strip()
    assert told > 8


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


def prove(text, target, shapes):
    """Assert that an expression is true of its shape and of no other, with a margin of 0.12 of the
    side, or 0.1 before the next one. Returns the template that it used and whether the attributes
    alone would not be enough."""
    meaning, template, said = understand(text)
    meant, *others = [[s for s in shapes if words <= set(s[:3])] for words in said]
    (other,) = others[0] if others else [None]
    rivals = [shape for shape in meant if shape not in (target, other)]
    assert target in meant and target != other
    if meaning == "any":
        assert said[0] and not rivals, text
        return template, False
    x, y = position(target, other)
    value = degree(meaning, x, y)
    most = max((degree(meaning, *position(rival, other)) for rival in rivals), default=-9)
    if "most" in meaning:
        assert rivals and value - most > 0.1 - 1e-9, text
    else:
        if other:  # "left of" is not said of what lies rather above
            value -= 0.6 * abs(y if meaning in ("left", "right") else x)
        assert value > 0.12 - 1e-9 and most <= 1e-9, text
    return template, len(rivals) > 0


def test_expressions_are_true_of_exactly_one_shape():
    """Read by this file's own grammar; captions are true; all wordings occur."""
    used = []
    for number in range(200):
        rng = random.Random(number)
        shapes = data.random_shapes(rng, 1 + number % 5)
        assert len({s.kind for s in shapes}) <= 2 and len({s.colour for s in shapes}) <= 3
        for sort in data.SORTS["train"] * 30:
            if expression := data.try_expression(rng, shapes, sort):
                used.append(prove(*expression, shapes))
        for part in re.split(" and |, ", data.random_caption(rng, shapes)):
            meaning, _, (said,) = understand(part)
            able = [position(shape) for shape in shapes if said <= set(shape[:3])]
            assert any(meaning == "any" or degree(meaning, *at) > 0.12 - 1e-9 for at in able), part
    assert {t for t, _ in used} == {t for ts in MEANINGS.values() for t in ts.split("|")}
    assert np.mean([needed for template, needed in used if template != "{}"]) > 0.3


def test_shapes_are_seen_where_they_are_annotated():
    """In the image, in their colour, and hidden by a twelfth of the box at most; in all sizes, kinds
    and colours; noise on a light background."""
    looks = set()
    for number in range(150):
        rng = random.Random(number)
        shapes = data.random_shapes(rng, 1 + number % 5)
        drawn = np.asarray(data.render(rng, shapes)).astype(int)
        for place, shape in enumerate(shapes, start=1):
            low, high = np.reshape(shape.box, (2, 2))
            assert low.min() >= 0 and high.max() <= 2 * data.SIDE
            hidden = 0
            for other in shapes[place:]:
                start, end = np.reshape(other.box, (2, 2))
                hidden += (np.minimum(high, end) - np.maximum(low, start)).clip(0).prod()
            assert hidden <= (high - low).prod() / 12
            assert 0.23 * 2 * data.SIDE < (high - low).min() < 0.65 * 2 * data.SIDE
            looks.update(shape[:3])
        x, y = (low + high) // 4  # of the last, which nothing hides
        assert np.abs(drawn[y, x] - data.COLOURS[shape.colour]).max() < 45, shape
        if len(shapes) == 1:
            rows, columns = np.where(drawn.min(axis=2) < 170)
            found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            assert found == pytest.approx(np.array(shape.box) / 2, abs=1)
            light = drawn[drawn.min(axis=2) > 170]
            assert np.median(light) > 180 and light.std(axis=0).min() > 2
    assert looks == {*data.SIZES, *data.COLOURS, *data.KINDS} and len(looks) == 2 + 7 + 6


FEW = {"val": 16, "testA": 8, "testB": 8, "test": 8}


def make_scene_again(folder, split, number, make_scene=data.make_scene):
    """The first five scenes of train are val's, under names of their own."""
    if split != "train" or number >= 5:
        return make_scene(folder, split, number)
    (folder / "again/images").mkdir(parents=True, exist_ok=True)
    image, *rest = make_scene(folder / "again", "val", number)
    (folder / "again" / image).rename(folder / image.replace("val", "train"))
    return image.replace("val", "train"), *rest


def test_shapes_on_disk(tmp_path, monkeypatch):
    """As one's own data: no scene in two splits, each word one symbol of the vocabulary. The folder
    is whole or not there and made once. Reading makes nothing. It is the same however processes are
    started; spawn is macOS's and Windows' way."""
    monkeypatch.setattr(data, "SCENES", FEW)
    monkeypatch.setitem(data.TRAIN_SCENES, "shapes", 24)
    monkeypatch.setattr(data, "make_scene", make_scene_again)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "train_bpe", raise_keyboard_interrupt)
        data.make_shapes(tmp_path)
    assert "generates it" in error_of(open_split, tmp_path, "train", "shapes")
    assert os.listdir(tmp_path) == []
    data.make_shapes(tmp_path)
    folder = tmp_path / "shapes"
    with monkeypatch.context() as patch:
        patch.setattr(data, "generate_shapes", raise_keyboard_interrupt)
        data.make_shapes(tmp_path)  # it is there
    tokenizer, seen = Tokenizer(folder / "bpe_vocab.txt.gz"), []
    captions = json.loads((folder / "captions.json").read_text())
    words = " ".join(itertools.chain(*captions.values()))
    for split, sorts in data.SORTS.items():
        dataset = open_split(tmp_path, split, "shapes", side=80)
        seen += {sample.image.removeprefix(f"{folder}{os.sep}") for sample in dataset.samples}
        for sample in dataset.samples:
            words += f" {sample.text}"
            relates = len(understand(sample.text)[2]) == 2
            assert {"testA": not relates, "testB": relates}.get(split, True)
        assert len(dataset) > len(sorts) * 0.7 * (FEW | {"train": 19})[split]
    assert len(seen) == len(set(seen)) == sum(FEW.values()) + 24 - 5
    assert set(seen) == {f"images/{name}" for name in os.listdir(folder / "images")}
    assert set(captions) == {name for name in seen if "train" in name}
    for word in set(re.findall(r"\w+|,", words)):
        assert len(tokenizer.encode(word)) == 1, word
    assert command(monkeypatch, "check", "--dataset", "shapes", "--data-root", tmp_path) is None
    with start_method("spawn"):
        data.make_shapes(tmp_path / "again")
    for path in folder.glob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / "shapes" / path.name).read_bytes()


# ------------------------------------------------------------------------------- check and download


def test_check(tmp_path, monkeypatch, capsys):
    """What each split has, a line for each missing or unreadable image with its reason, and an error
    if there is any, or fewer expressions than published."""
    rows = [
        {"texts": ["a", "b" * 3 + " c" * 75, " "]},
        {"image": None},
        {"size": (40, 60)},
        {"texts": ["half"]},
        {"bbox": [50, 30, 20, 20]},
        {"bbox": [5, 5, 0, 0]},
        {"split": "testA"},
    ]
    make_refer(tmp_path, rows)
    names = [str(tmp_path / TRAIN2014 / COCO_NAME.format(number)) for number in (2, 3, 4)]
    Path(names[2]).write_bytes(Path(names[2]).read_bytes()[:-200])
    info = data.DATASETS["refcoco"]._replace(published=(9, 0, 1, 5))
    monkeypatch.setitem(data.DATASETS, "refcoco", info)
    error = command(monkeypatch, "check", "--dataset", "refcoco", "--data-root", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train; 8 expressions; ") and lines[2] == "testA; 1 expressions"
    for note in ("empty expressions", "boxes without area", "boxes clipped", "expressions of more"):
        assert f"; 1 {note}" in lines[0]
    reasons = ("No such file", "for 40 x 60", "truncated")
    for line, name, reason in zip(lines[4:], names, reasons):
        assert line.startswith(name) and reason in line
    assert lines[7:] == ["train has 8 expressions of 9", "testB has 0 expressions of 5"]
    assert "5 problems" in error and names[0] in error and "\n" not in error


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
        content = content[start:] if ranged else content
        self.send_response(200 if not ranged else 206 if content else 416)
        if manner != "no length":
            length = len(content) + 100 * (manner == "claims more")
            self.send_header("Content-Length", str(length))
        self.end_headers()
        stops = manner == "stops" or manner == "no ranges" and len(self.asked) == 1
        self.wfile.write(content[: 100_000 if stops else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """The address of a server on loopback, for which alone the network is open."""
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(Server, "files", {})
    monkeypatch.setattr(Server, "asked", [])
    address = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setattr(data, "UNC", address + "/{}/{}.zip")
    monkeypatch.setattr(data, "TRAIN2014", address + "/train2014.zip")
    yield address
    running.shutdown()
    running.server_close()


CONTENT = random.Random(0).randbytes(200_000)


@pytest.mark.parametrize("manner", ["stops", "no ranges"])
def test_a_download_goes_on_where_it_broke_off(server, tmp_path, manner):
    """By ranges, or from the start where the server knows none. What broke off is one sentence and
    a part; only the whole file is left."""
    Server.files["/a.bin"] = CONTENT, manner
    url, path, part = server + "/a.bin", tmp_path / "a.bin", tmp_path / "a.bin.part"
    assert f"{url} cannot" in (text := error_of(data.download, url, path))
    assert "100,000 of 200,000" in text and part.read_bytes() == CONTENT[:100_000]
    if manner == "stops":
        Server.files["/a.bin"] = CONTENT, "well"
    data.download(url, path)
    assert path.read_bytes() == CONTENT and os.listdir(tmp_path) == ["a.bin"]
    assert Server.asked == [("/a.bin", 0), ("/a.bin", 100_000)]


def test_a_server_that_lies_is_not_believed(server, tmp_path):
    """More claimed than there is, no such file, a part as long as the file: an error that says what
    to do, and never a file. Without a length it is believed."""
    url, path, part = server + "/a.bin", tmp_path / "a.bin", tmp_path / "a.bin.part"
    for manner, says in (("claims more", "200,000 of 200,100"), ("well", "416"), ("absent", "404")):
        Server.files = {"/a.bin": (CONTENT, manner)} if manner != "absent" else {}
        text = error_of(data.download, url, path)
        assert says in text and str(part) in text and not path.exists()
    part.unlink()
    Server.files = {"/a.bin": (CONTENT, "no length")}
    data.download(url, path)
    assert path.read_bytes() == CONTENT


def test_download_brings_all_once(server, tmp_path, monkeypatch, capsys):
    """Annotations and images come to where the loader looks. A second call fetches nothing, a third
    what has gone missing; an archive that Ctrl-C kept from being unpacked is not fetched again, and
    damaged annotations are."""
    source, root = tmp_path / "source", tmp_path / "data"
    make_refer(source, [{"split": split} for split in data.REFCOCO_SPLITS])
    refs, train2014 = "/20220413011718/refcoco.zip", "/train2014.zip"
    for url, folder in ((refs, "refcoco"), (train2014, TRAIN2014)):
        files = {f"{folder}/{path.name}": path.read_bytes() for path in (source / folder).iterdir()}
        Server.files[url] = zipped(files), "well"

    def download(*expected):
        Server.asked.clear()
        error = command(monkeypatch, "download", "--dataset", "refcoco", "--data-root", root)
        assert [path for path, _ in Server.asked] == list(expected)
        return error

    with monkeypatch.context() as patch:
        patch.setattr(data.shutil, "unpack_archive", raise_keyboard_interrupt)
        assert "Ctrl-C" in download(refs) and os.listdir(root) == ["refcoco.zip"]
    assert download(train2014) is None
    assert sorted(os.listdir(root)) == ["images", "refcoco"]
    assert [len(list(open_split(root, split))) for split in data.REFCOCO_SPLITS] == [1, 1, 1, 1]
    assert download() is None
    (root / TRAIN2014 / COCO_NAME.format(2)).unlink()
    assert download(train2014) is None and len(os.listdir(root / TRAIN2014)) == 4
    (root / "refcoco/instances.json").write_text("{")
    assert download(refs) is None and len(open_split(root)) == 1


EVIL = {"refcoco/good.json": b"{}", "refcoco/../../../evil.json": b"{}"}
BAD = {  # what is served as an archive
    "outside.zip": zipped(EVIL),
    "absolute.zip": zipped({str(Path.cwd() / "evil.json"): b"{}"}),
    "page.zip": b"<html><body>This service is no more.</body></html>" * 100,
    "half.zip": zipped({"refcoco/good.json": CONTENT})[:5000] + bytes(1000),
    "flipped.zip": zipped({"refcoco/good.json": CONTENT}).replace(CONTENT[9:99], bytes(90)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_archive_leaves_nothing(server, tmp_path, name):
    """Names that lead outside, a web page, damage: nothing is written outside of the folder,
    what is damaged is told with what to do, and nothing of it comes into the folder."""
    Server.files[f"/{name}"] = BAD[name], "well"
    folder = tmp_path / "a/b/refcoco"
    if name in ("outside.zip", "absolute.zip"):
        data.download_and_unpack(f"{server}/{name}", folder)
        assert [path.name for path in folder.rglob("*")] in ([], ["good.json"])
    else:
        text = error_of(data.download_and_unpack, f"{server}/{name}", folder)
        assert f"delete {folder.with_name(name)}" in text and os.listdir(folder.parent) == [name]
    assert not Path("evil.json").exists() and not list(tmp_path.rglob("evil.json"))


@pytest.mark.parametrize("name", ["referit", "flickr30k", "own", "shapes"])
def test_what_cannot_be_downloaded_says_what_to_do(server, tmp_path, monkeypatch, name):
    """One sentence: whom to ask, what the files look like. Nothing is asked for."""
    error = command(monkeypatch, "download", "--dataset", name, "--data-root", tmp_path)
    assert data.DATASETS[name].help in error and "\n" not in error and not Server.asked
