"""What the model is fed: pictures, expressions and boxes; and a small world to learn from.

    python data.py download --dataset refcoco --data-root data  # what can be had
    python data.py check --dataset refcoco --data-root data     # is all of it there and readable?

Read it in this order: `load_image` (any picture file as RGB), `Geometry` with `to_square` and
`to_pixels` (where a photograph lies in the model's square, there and back), `random_geometry` and
`jitter` (training's augmentation), `DATASETS` with the readers of the files they come in
(`FAMILIES`) and `read_split` (what becomes of an entry), `GroundingDataset` and `batches`; then the
shapes data set, which is generated: tables of kinds, colours and words, `expression` (one sentence,
proven true of exactly one shape), `make_scene` and `generate_shapes`; and last the two commands,
`check` and `get`, which is download. It knows no model: of clip_model.py it has errors, files and
the statistics of CLIP's pixels.

Boxes are x1, y1, x2, y2 in pixels of the picture as stored, except where a docstring says cx, cy,
w, h: those are shares, 0 to 1, of the padded square.
"""

import argparse
import functools
import gzip
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import tarfile
import tempfile
import zipfile
from collections import Counter
from contextlib import contextmanager
from operator import gt
from pathlib import Path
from stat import S_ISLNK
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clip_model import (
    MEAN,
    STD,
    HiVGError,
    PlainUnpickler,
    download,
    exit_with,
    explaining,
    read_weights,
)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no EPS, which is a program
MOST_PIXELS = 178_956_970  # Pillow's own limit; checked here too, as a program may have lifted it
# of a Pool whose workers leave Ctrl-C to the process that waits for them
QUIET = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))

# ----------------------------------------------------------------------------------------- pictures


def to_rgb(image):
    """A PIL image of any mode as RGB: alpha laid over white, 16-bit grey scaled to 8 bits."""
    if image.mode.startswith("I"):  # I;16 or, from some formats, I: convert("RGB") would clip it
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def opened(path, way_out="replace it, or name another"):
    """A picture file as a PIL image that is not decoded yet.

    Raises HiVGError for a file that is missing, empty, no picture, or too large; and, where it is
    decoded inside, broken.
    """
    with explaining(f"{path} cannot be read as a picture", way_out):
        if not os.path.getsize(path):
            raise ValueError("the file is empty")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:  # the header's claim, nothing decoded yet
                raise ValueError(f"more than {MOST_PIXELS:,} pixels")
            yield image


def load_image(path, upright=True):
    """A picture file as a PIL image, RGB; of an animation, the first frame.

    upright: turn it as its EXIF rotation says. Right for a user's own photograph; the data sets'
    boxes count in the pixels as stored, so their loader passes False.
    Raises HiVGError for a file that is missing, empty, broken, no picture, or too large.
    """
    with opened(path) as image:
        return to_rgb(ImageOps.exif_transpose(image) if upright else image)


# --------------------------------------------------------------------- the photograph in its square


class Geometry(NamedTuple):
    """Where a photograph lies in the model's square: `region` of it is drawn into `inner`."""

    region: tuple  # x1, y1, x2, y2 in the photograph's pixels; for evaluation all of it
    inner: tuple  # left, top, width, height in the square, whole pixels; the rest is padding
    side: int  # of the square, pixels


def letterbox(region, side, long_side=None, shares=(0.5, 0.5)):
    """Scale a region so that its long side has `long_side` pixels, and place it in the square.

    The aspect is kept up to whole pixels, the short side is at least one. `shares` says which part
    of the padding goes to the left and to the top: one half each, for evaluation.
    """
    width, height = region[2] - region[0], region[3] - region[1]
    scale = (long_side or side) / max(width, height)
    inner = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (round((side - size) * share) for size, share in zip(inner, shares))
    return Geometry(region, (left, top, *inner), side)


def to_square(box, geometry):
    """A box x1, y1, x2, y2 in the photograph's pixels -> tensor [4], cx, cy, w, h, 0..1, of the
    square. What sticks out of the region shown is cut off."""
    (x1, y1, x2, y2), (left, top, width, height), side = geometry
    scale_x, scale_y = width / (x2 - x1), height / (y2 - y1)  # they differ: sizes are rounded
    ax, bx = (left + (min(max(x, x1), x2) - x1) * scale_x for x in (box[0], box[2]))
    ay, by = (top + (min(max(y, y1), y2) - y1) * scale_y for y in (box[1], box[3]))
    return torch.tensor(((ax + bx) / 2, (ay + by) / 2, bx - ax, by - ay)) / side


def to_pixels(boxes, geometry):
    """Tensor [..., 4] of cx, cy, w, h, 0..1, of the square -> [..., 4] of x1, y1, x2, y2 in the
    photograph's own pixels, clipped to the photograph. The inverse of `to_square`."""
    (x1, y1, x2, y2), (left, top, width, height), side = geometry
    centre, half = boxes[..., :2] * side, boxes[..., 2:] * side / 2
    corners = torch.stack((centre - half, centre + half), -2)  # [..., corner, x or y]
    scale = boxes.new_tensor(((x2 - x1) / width, (y2 - y1) / height))
    points = (corners - boxes.new_tensor((left, top))) * scale + boxes.new_tensor((x1, y1))
    points = points.clamp(boxes.new_tensor((x1, y1)), boxes.new_tensor((x2, y2)))
    return points.flatten(-2)  # [..., 4]


def cut(image, geometry):
    """The region of a PIL image, resized to `inner`, as PIL image."""
    return image.resize(geometry.inner[2:], Image.BILINEAR, box=geometry.region)


def cut_reduced(image, geometry):
    """The same of a PIL image that is not decoded yet, about as sharp: a JPEG is decoded at a half,
    a quarter or an eighth of its size, as far as that is no less than the region needs. For
    training, where speed counts."""
    (x1, _, x2, _), size = geometry.region, image.size
    least = [math.ceil(side * geometry.inner[2] / (x2 - x1)) for side in size]
    draft = image.draft(None, least)  # mode and box of the reduced picture; None if it is no JPEG
    scale = draft[1][2] / size[0] if draft else 1
    region = tuple(value * scale for value in geometry.region)
    return cut(to_rgb(image), geometry._replace(region=region))


def as_bytes(image):
    """PIL image, RGB -> uint8 tensor [3, h, w]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [h, w, 3] -> [3, h, w]


@functools.cache
def channels(shares):
    """Three numbers in shares of 255 -> tensor [3, 1, 1]."""
    return torch.tensor(shares).mul(255).view(3, 1, 1)


def in_square(pixels, geometry, mean, std):
    """uint8 tensor [3, h, w] -> the square that the model sees: float32 [3, S, S], normalised, 0 in
    the padding; and bool [S, S], True where it is padding."""
    left, top, width, height = geometry.inner
    rows, columns = slice(top, top + height), slice(left, left + width)
    square = torch.zeros(3, geometry.side, geometry.side)
    padding = torch.ones(geometry.side, geometry.side, dtype=torch.bool)
    mean, std = channels(tuple(mean)), channels(tuple(std))  # [3, 1, 1] each
    square[:, rows, columns].copy_(pixels).sub_(mean).div_(std)
    padding[rows, columns] = False
    return square, padding


def prepare(image, image_size, mean=MEAN, std=STD):
    """A PIL image as evaluation sees it: float32 [3, S, S], padding bool [S, S], Geometry."""
    geometry = letterbox((0, 0, *image.size), image_size)
    return *in_square(as_bytes(cut(to_rgb(image), geometry)), geometry, mean, std), geometry


# ------------------------------------------------------------------------------------- augmentation

PLACE_WORDS = ("left", "right", "top", "bottom", "middle")  # also in leftmost (and in laptop)


def random_geometry(rng, size, box, text, side):
    """A random crop, scale and position for training (rng: a random.Random; size: w, h).

    The crop is that of 384 to 600 pixels a side from a photograph whose short side was made 400,
    500 or 600: expressed in the photograph's own pixels, so that it is resized once. It keeps the
    centre of the box, and is left out where a crop could make the expression wrong.
    """
    region = (0, 0, *size)
    if rng.random() < 0.5 and not any(word in text for word in PLACE_WORDS):
        scale = rng.choice((400, 500, 600)) / min(size)
        starts, ends = [], []
        for length, low, high in zip(size, box[:2], box[2:]):
            crop = rng.randint(384, min(600, round(length * scale))) / scale
            centre = min((low + high) / 2, length)  # of an unchecked box, it may lie outside
            first = max(0, centre - crop)
            start = rng.uniform(first, max(first, min(length - crop, centre)))
            starts.append(start)
            ends.append(float(min(length, start + crop)))
        region = (*starts, *ends)
    step = side / 7  # 32 pixels for S = 224, where the long side becomes 224, 192, ..., 64, 56
    long_side = max(side - step * rng.randrange(7), side / 4)
    return letterbox(region, side, long_side, (rng.random(), rng.random()))


def jitter(rng, image):
    """Brightness, contrast and saturation of a PIL image times 0.6 to 1.4, in random order."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for enhancer in rng.sample(enhancers, 3):
        image = enhancer(image).enhance(rng.uniform(0.6, 1.4))
    return image


# ----------------------------------------------------------------------------- the data sets' files

COCO = (
    "python data.py download --dataset NAME fetches what is not there (from web.archive.org and "
    "images.cocodataset.org); remove a damaged file first"
)
LISTS = "the index lists that github.com/linhuixiao/HiVG links to"
REFERIT = (
    "ask for the pictures of SAIAPR TC-12 at www.imageclef.org/SIAPRdata and put them into "
    f"referit/images; take {LISTS}, referit/referit_train.pth and so on: tuples of file, size, box "
    "x1 y1 x2 y2, phrase"
)
FLICKR = (
    "ask for the pictures with the form at shannon.cs.illinois.edu/DenotationGraph and put them "
    f"into Flickr30k/flickr30k-images; take {LISTS}, flickr/flickr_train.pth and so on: tuples of file, "
    "box x1 y1 x2 y2, phrase; Flickr30k Entities' own XML and sentence files are not read"
)
MIXUP = (
    f"take {LISTS}, mixup/mixup_train.pth and so on: tuples of file, size, box x y w h, phrase; "
    "the pictures are those of refcoco, referit and flickr30k"
)
OWN = (
    "write train.jsonl, val.jsonl and so on into the data root, with lines like "
    '{"image": "path/below/it.jpg", "text": "the red cup", "box": [x1, y1, x2, y2]}'
)
SHAPES = "remove the folder shapes there, and the next run generates it anew"
FOUR = "train val testA testB"


class Source(NamedTuple):
    """A data set: what it consists of, and how its files are named, as far as it comes in them."""

    splits: str
    counts: tuple  # published numbers of expressions, in the order of the splits, if there are any
    pictures: str  # their kind, a key of PICTURES
    origin: str  # where to get it
    files: dict  # {family: path below the data root, where {} is the split}; the first counts
    stamp: int = 0  # of the web archive's copy of refer's files


# fmt: off
DATASETS = {
    "refcoco": Source(FOUR, (120_624, 10_834, 5_657, 5_095), "coco", COCO,
                      {"refer": "refcoco/refs(unc).p", "index": "unc/unc_{}.pth",
                       "mdetr": "finetune_refcoco_{}.json"}, 20220413011718),
    "refcoco+": Source(FOUR, (120_191, 10_758, 5_726, 4_889), "coco", COCO,
                       {"refer": "refcoco+/refs(unc).p", "index": "unc+/unc+_{}.pth",
                        "mdetr": "finetune_refcoco+_{}.json"}, 20220413011656),
    "refcocog": Source("train val test", (80_512, 4_896, 9_602), "coco", COCO,
                       {"refer": "refcocog/refs(umd).p", "index": "gref_umd/gref_umd_{}.pth",
                        "mdetr": "finetune_refcocog_{}.json"}, 20220413012904),
    "refcocog-google": Source("train val", (85_474, 9_536), "coco", COCO,
                              {"refer": "refcocog/refs(google).p", "index": "gref/gref_{}.pth"},
                              20220413012904),
    "referit": Source("train val test", (54_127, 5_842, 60_103), "referit", REFERIT,
                      {"index": "referit/referit_{}.pth"}),
    "flickr30k": Source("train val test", (427_193, 14_433, 14_481), "flickr", FLICKR,
                        {"index": "flickr/flickr_{}.pth"}),
    "mixup": Source(f"{FOUR} test", (), "coco", MIXUP, {"index": "mixup/mixup_{}.pth"}),
    "own": Source(f"{FOUR} test", (), "own", OWN, {"own": "{}.jsonl"}),
    "shapes": Source(FOUR, (), "shapes", SHAPES, {"refer": "shapes/refs(unc).p"}),
}
# fmt: on
PICTURES = {  # where a picture may lie below the data root
    "coco": (
        "images/mscoco/images/train2014/{name}",
        "other/images/mscoco/images/train2014/{name}",
        "train2014/{name}",
        "images/train2014/{name}",
        "train2017/{number}",  # COCO 2017 has the same pictures, named by their number alone
    ),
    "referit": ("referit/images/{name}", "other/images/referit/images/{name}", "referit/{name}"),
    "flickr": (
        "Flickr30k/flickr30k-images/{name}",
        "Flickr30k/flickr30k_images/{name}",
        "flickr30k/flickr30k-images/{name}",
        "flickr30k-images/{name}",
    ),
    "own": ("{name}",),
    "shapes": ("shapes/images/{name}",),
}


class Sample(NamedTuple):
    """One expression and the object it is true of."""

    image: str  # the picture's path
    text: str  # lower case
    box: tuple  # x1, y1, x2, y2 in pixels as stored, inside the picture where its size is known
    size: tuple  # width, height that the annotations say; None where they don't


def unpickle(file):
    """The plain data in an open pickle of Python 3, or 2, whose strings are bytes in latin-1."""
    return PlainUnpickler(file, encoding="latin-1").load()


def refs_by_split(file):
    """An open refs(...).p -> {split: list of refs, which are dicts}."""
    splits = {}
    for ref in unpickle(file):
        splits.setdefault(ref["split"], []).append(ref)
    return splits


def index_list(file):
    """The list in an open index file: a pickle, torch's older format, or torch's zip."""
    try:
        content = unpickle(file)
        if content == torch.serialization.MAGIC_NUMBER:  # then: version, machine, the list
            *_, content = (unpickle(file) for _ in range(3))
        return content
    except pickle.UnpicklingError:  # a zip, or there are tensors in it
        return read_weights(file.name)


def corners(box):
    """x, y, width, height -> x1, y1, x2, y2."""
    x, y, w, h = map(float, box)
    return x, y, x + w, y + h


def size_of(picture):
    return int(picture["width"]), int(picture["height"])


# Readers of the families give a split's entries in turn: (its name for reports or None, kind of
# picture, picture's file, its size or None, box as x1 y1 x2 y2, list of expressions).


def refer_entries(split, kind, refs, instances):
    boxes = {note["id"]: note["bbox"] for note in instances["annotations"]}
    pictures = {picture["id"]: picture for picture in instances["images"]}
    for ref in refs.get(split, ()):
        picture, box = pictures[ref["image_id"]], corners(boxes[ref["ann_id"]])
        texts = [sentence["sent"] for sentence in ref["sentences"]]
        file, size = picture["file_name"], size_of(picture)  # ref["file_name"] is no picture's
        yield f"ref_id {ref['ref_id']}", kind, file, size, box, texts


def index_entries(split, kind, entries):
    for entry in entries:
        file, *size, box, text = entry[:4]  # Flickr's have no size
        size = size[0] if size else None
        of = size if size in ("coco", "referit", "flickr") else kind  # mixup's mark
        size = size_of(size) if isinstance(size, dict) else None  # a pair may be w, h or h, w
        yield None, of, file, size, corners(box) if kind == "coco" else box, [text]


def mdetr_entries(split, kind, content):
    boxes = {note["image_id"]: note["bbox"] for note in content["annotations"]}
    for picture in content["images"]:
        file, size, box = picture["file_name"], size_of(picture), corners(boxes[picture["id"]])
        yield None, kind, file, size, box, [picture["caption"]]


def own_entries(split, kind, lines):
    for entry in map(json.loads, lines):
        if os.path.isabs(entry["image"]) or ".." in entry["image"].split("/"):
            raise ValueError(f"{entry['image']} is not below the data root")
        yield None, kind, entry["image"], None, entry["box"], [entry["text"]]


FAMILIES = {
    "refer": (refs_by_split, refer_entries),
    "index": (index_list, index_entries),
    "mdetr": (json.load, mdetr_entries),
    "own": (lambda file: file.read().rstrip().splitlines(), own_entries),
}


@functools.lru_cache(maxsize=2)  # refer's two files, which all splits are read from
def parsed(path, read, changed):
    with open(path, "rb") as file:
        return read(file)


def read_file(path, read, origin):
    """read(open file). Any failure is a HiVGError: what the matter is and where to get it."""
    with explaining(f"{path} cannot be read", origin):
        return parsed(path, read, os.stat(path).st_mtime_ns)


def split_files(name, data_root):
    """{split: (family, path)} of a data set, as far as they are there, in the data root or (but for
    own data) one folder below. The shapes data set is generated if it is not there."""
    if name not in DATASETS:
        raise HiVGError(f"There is no data set {name!r}: choose one of {', '.join(DATASETS)}.")
    source, found, folder = DATASETS[name], {}, os.path.join(data_root, "shapes")
    if name == "shapes" and not os.path.exists(folder):
        with explaining(f"{folder} cannot be made", "name another --data-root"):
            generate_shapes(folder)
    for split, family in itertools.product(source.splits.split(), source.files):
        path = source.files[family].format(split)
        for place in (path,) if family == "own" else (path, f"*/{path}"):
            for file in map(str, sorted(Path(data_root).glob(place))):
                # refer's one file may lack a split that another family's files have
                if family != "refer" or split in read_file(file, refs_by_split, source.origin):
                    found.setdefault(split, (family, file))
    return found


def nothing_of(name, split, data_root, report=()):
    """The error that says what was looked for, where, and where to get it."""
    source = DATASETS[name]
    files = " or ".join(source.files.values()).replace("{}", split)
    what = f"{data_root} has no expressions of {name}, split {split!r} (of {source.splits})"
    where = "there" if name == "own" else "there and one folder below"
    found, way_out = "; ".join(report) or f"looked for {files}, {where}", source.origin
    if split_files(name, data_root):
        found += f"; it has {', '.join(available_splits(name, data_root))}"
    if split not in source.splits.split():
        way_out = "choose one of its splits"
    return HiVGError(f"{what}; {found}: {way_out}.")


def available_splits(name, data_root):
    """The splits of a data set that its files really hold, in the table's order."""
    files = split_files(name, data_root)
    if not files:
        raise nothing_of(name, "train", data_root)
    return list(files)


def find_picture(data_root, kind, file):
    """The path of a picture: the first of its places where it is, or else the first."""
    name = os.path.normpath(file) if kind == "own" else os.path.basename(file)
    fields = {"name": name, "number": name[-16:]}
    places = [os.path.join(data_root, place.format(**fields)) for place in PICTURES[kind]]
    return next(filter(os.path.isfile, places), places[0])


EMPTY, CLIPPED = "empty expressions left out", "boxes clipped to their picture"


def read_split(name, split, data_root):
    """What the files hold of one split: a list of Sample, whose pictures need not be there; how
    many expressions there were before any was left out; and a Counter of what was left out or
    changed. All of it is empty where there is no file.

    Raises HiVGError with one sentence for unknown names and for files that are broken.
    """
    samples, found, notes = [], 0, Counter()
    family, path = split_files(name, data_root).get(split, (None, None))
    if family is None:
        return samples, found, notes
    source, (read, entries_of) = DATASETS[name], FAMILIES[family]
    contents = [read_file(path, read, source.origin)]
    if family == "refer":
        beside = os.path.join(os.path.dirname(path), "instances.json")
        contents.append(read_file(beside, json.load, source.origin))
    entries = entries_of(split, source.pictures, *contents)
    find = functools.cache(functools.partial(find_picture, data_root))
    for number in itertools.count(1):
        place = f"{'line' if family == 'own' else 'entry'} {number}"
        with explaining(f"{path}, {place}, cannot be used", source.origin):
            entry = next(entries, None)
            if entry is None:
                return samples, found, notes
            title, kind, file, size, box, texts = entry
            x1, y1, x2, y2 = map(float, box)  # fractions are kept (D12)
            width, height = size or (math.inf, math.inf)
            box = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
            texts, image = [str.strip(text).lower() for text in texts], find(kind, file)
            found += len(texts)
            if not math.isfinite(x1 + y1 + x2 + y2) or box[0] >= box[2] or box[1] >= box[3]:
                notes[f"box without area left out, {title or place}"] += 1
                continue
            notes[EMPTY] += texts.count("")
            notes[CLIPPED] += box != (x1, y1, x2, y2)
            samples += [Sample(image, text, box, size) for text in texts if text]


def missing_pictures(samples):
    """The paths of their pictures that are not there."""
    return sorted(itertools.filterfalse(os.path.isfile, {sample.image for sample in samples}))


def read_samples(names, split, data_root):
    """The samples of one split of several data sets, one after the other, and a report: sentences
    on what was left out. Of train that is also what another of the sets has in its val or tests.

    Several sets need not have a test split all of them. Raises HiVGError where nothing is left, or
    a picture is missing.
    """
    readings = {name: read_split(name, split, data_root) for name in names}
    tested, samples, report = {}, [], []  # tested: the pictures of each set's other splits
    for name in names if split == "train" and len(names) > 1 else ():
        _, *others = DATASETS[name].splits.split()
        held = {other: read_split(name, other, data_root)[0] for other in others}
        tested[name] = {sample.image for samples in held.values() for sample in samples}
        absent = [other for other, samples in held.items() if not samples]
        report += [f"{name} {other} is not there to be kept out of training" for other in absent]
    for name, (own, _, notes) in readings.items():
        elsewhere = set().union(*(tested[other] for other in tested if other != name))
        kept = [sample for sample in own if sample.image not in elsewhere]
        if missing := missing_pictures(kept):
            what = f"{len(missing)} pictures of {name} are missing, {missing[0]} among them"
            where = "data.py: PICTURES has all the places looked at"
            raise HiVGError(f"{what} ({where}): {DATASETS[name].origin}.")
        notes["expressions left out, as another set tests on their pictures"] = len(own) - len(kept)
        of = f"{name}: " if len(names) > 1 else ""
        report += [f"{of}{number:,} {note}" for note, number in notes.items() if number]
        if not kept and (split == "train" or not split_files(name, data_root)):
            raise nothing_of(name, split, data_root, report)
        samples += kept
    if not samples:
        raise nothing_of(names[0], split, data_root, report)
    return samples, report


# ------------------------------------------------------------------------------ samples and batches


class GroundingDataset(Dataset):
    """The expressions of one split. Item [i] is a dict:

    image    float32 [3, S, S], normalised, 0 in the padding
    padding  bool [S, S], True where a pixel is padding
    text     str
    box      float32 [4]: cx, cy, w, h, 0..1, of the padded square
    object   int64: a number, the same for all expressions of one object (picture and box)
    read     bool: False where another sample stands in, as this picture cannot be read (skip_bad)

    name: a data set, or a list of them, whose samples follow one another. What of a train split has
    its picture in another set's val or tests is then left out.

    augment: training's random crop, scale, colours and position, else evaluation's letterbox. What
    is drawn for an item follows from the numbers of `set_epoch` and the index alone, not from the
    worker or from what was read before. cache keeps the resized pictures in memory (without augment
    only): for small data sets. skip_bad: instead of a sample whose picture cannot be read, take the
    next one. `report` says what was left out of the files.
    """

    def __init__(
        self,
        name,
        split,
        data_root,
        image_size=224,
        augment=False,
        cache=False,
        skip_bad=False,
        mean=MEAN,
        std=STD,
    ):
        self.split, names = split, [name] if isinstance(name, str) else name
        self.samples, self.report = read_samples(names, split, data_root)
        numbers = {}
        self.objects = [numbers.setdefault((s.image, s.box), len(numbers)) for s in self.samples]
        self.image_size, self.augment, self.mean, self.std = image_size, augment, mean, std
        self.cache = {} if cache and not augment else None  # path -> uint8 [3, h, w], Geometry
        self.skip_bad = skip_bad
        self.numbers = torch.zeros(3, dtype=torch.long).share_memory_()  # workers see changes

    def __len__(self):
        return len(self.samples)

    def set_epoch(self, seed, stage, epoch):
        """Before each epoch and its first item: what its augmentation follows from."""
        self.numbers.copy_(torch.tensor((seed, stage, epoch)))

    def read(self, sample, index):
        """The sample's picture, cut and resized, uint8 [3, h, w]; and its Geometry."""
        if self.cache is not None and sample.image in self.cache:
            return self.cache[sample.image]
        with opened(sample.image, "replace it, or give --skip-bad-images") as image:
            if sample.size not in (None, image.size):
                what = "it has {} x {} pixels, its annotations are for {} x {}"
                raise ValueError(what.format(*image.size, *sample.size))
            if self.augment:
                rng = random.Random(f"{self.numbers.tolist()} {index}")
                like = sample.box, sample.text, self.image_size
                geometry = random_geometry(rng, image.size, *like)
                image = cut_reduced(image, geometry)
                return as_bytes(jitter(rng, image) if rng.random() < 0.8 else image), geometry
            geometry = letterbox((0, 0, *image.size), self.image_size)
            pixels = as_bytes(cut(to_rgb(image), geometry))
        if self.cache is not None:
            self.cache[sample.image] = pixels, geometry
        return pixels, geometry

    def __getitem__(self, index):
        asked = index = range(len(self.samples))[index]
        while True:
            sample = self.samples[index]
            try:
                pixels, geometry = self.read(sample, index)
                break
            except HiVGError:
                index = (index + 1) % len(self.samples)
                if not self.skip_bad or index == asked:  # or there is none that can be read
                    raise
        image, padding = in_square(pixels, geometry, self.mean, self.std)
        box, number = to_square(sample.box, geometry), torch.tensor(self.objects[index])
        item = {"image": image, "padding": padding, "text": sample.text}
        return {**item, "box": box, "object": number, "read": index == asked}


def ignore(signals, worker):
    """A loader's worker is not ended by these: they may reach all processes, and are for the one
    that waits for it."""
    for number in signals:
        signal.signal(number, signal.SIG_IGN)


def batches(dataset, lists, workers=0, pin_memory=False, ignored=(signal.SIGINT,)):
    """A DataLoader of batches, dicts as the items are: tensors [B, ...] and a list of str.

    `lists` has the indices of each batch, and may be changed between two passes, while the workers
    stay; they ignore the signals of `ignored`.
    """
    init = functools.partial(ignore, ignored)
    how = dict(num_workers=workers, worker_init_fn=init, persistent_workers=workers > 0)
    return DataLoader(dataset, batch_sampler=lists, pin_memory=pin_memory, **how)


def seed_from(*numbers):
    """A seed that follows from whole numbers; for as many others, below 2^32, it is another."""
    return int(np.random.default_rng(numbers).integers(2**62))


def shuffled(numbers, samples, size, parts=1):
    """The batches of an epoch, LongTensor [batches, parts, size] of indices, in an order that
    follows from `numbers`.

    A batch of `size` for each of the parts (processes): together they see what one would see in
    larger batches. What is left over at the end waits for another epoch.
    """
    generator = torch.Generator().manual_seed(seed_from(*numbers))
    order = torch.randperm(samples, generator=generator)
    return order[: samples // (size * parts) * size * parts].view(-1, parts, size)


def cut_to_longest(tokens, multiple=4):
    """Tokens [B, 77] -> [B, T]: T is the length of the longest text, rounded up to a multiple (few
    different lengths: CPU kernels are built anew for each). The end token is a row's largest id."""
    longest = int(tokens.argmax(dim=1).max()) + 1
    return tokens[:, : math.ceil(longest / multiple) * multiple]


# ------------------------------------------------------------------------------ the shapes data set

SIDE = 80  # pixels of a picture; it is drawn at twice that and reduced
CLEAR, GAP = 0.12, 0.10  # margins of an expression, in shares of the side: see `holds`
EVERYTHING = ("relation", "place", "attributes")
SPLITS = {  # scenes, numbers of shapes in one, expressions sought in one, their categories in turn
    "val": (240, (3, 4, 5), 6, EVERYTHING),
    "testA": (120, (3, 4, 5), 6, ("attributes", "place")),
    "testB": (150, (3, 4, 5), 6, ("relation",)),
    "train": (26_000, (1, 2, 3, 3, 4, 4, 5, 5), 3, EVERYTHING),
}
# fmt: off
TURN = [math.tau * step / 40 for step in range(40)]
KINDS = {  # polygons in a box of 100 x 100, y downwards
    "circle": [(50 + 50 * math.cos(t), 50 + 50 * math.sin(t)) for t in TURN],
    "square": [(0, 0), (100, 0), (100, 100), (0, 100)],
    "triangle": [(50, 0), (100, 100), (0, 100)],
    "diamond": [(50, 0), (100, 50), (50, 100), (0, 50)],
    "star": [(50, 0), (63, 36), (100, 38), (71, 62), (81, 100), (50, 78), (19, 100), (29, 62),
             (0, 38), (37, 36)],
    "cross": [(33, 0), (67, 0), (67, 33), (100, 33), (100, 67), (67, 67), (67, 100), (33, 100),
              (33, 67), (0, 67), (0, 33), (33, 33)],
}
COLOURS = {
    "red": (214, 38, 38), "orange": (248, 142, 22), "yellow": (250, 222, 42),
    "green": (48, 158, 62), "blue": (42, 92, 216), "pink": (250, 152, 196), "black": (38, 38, 42),
}
SIZES = {"small": (0.26, 0.36), "big": (0.43, 0.60)}  # of the side
WORDS = {  # how people call it, the usual way twice; every other word stands for itself
    None: "one|thing|shape|object", "small": "small|small|little|tiny", "big": "big|big|large",
    "circle": "circle|circle|disc|round thing",
    "square": "square|square|box", "diamond": "diamond|diamond|rhombus",
    "cross": "cross|cross|plus sign",
}


def beside(along, across):
    """How far something lies to one side: clearly so only where it is not as far to another."""
    return along if along <= 0 else max(0.01, along - 0.6 * abs(across))


# Templates; how much it is so for a shape at x, y (right and down, in shares of the side, from the
# picture's centre, for relations from the other shape's); and whether that is a superlative.
PLACES = (
    ("left most {}|leftmost {}|{} furthest to the left", lambda x, y: -x, True),
    ("right most {}|rightmost {}|{} furthest to the right", lambda x, y: x, True),
    ("top most {}|highest {}|uppermost {}", lambda x, y: -y, True),
    ("bottom most {}|lowest {}|{} furthest down", lambda x, y: y, True),
    ("left {}|{} on the left|{} on left side", lambda x, y: -x, False),
    ("right {}|{} on the right|{} on right side", lambda x, y: x, False),
    ("top {}|upper {}|{} at the top", lambda x, y: -y, False),
    ("bottom {}|lower {}|{} at the bottom", lambda x, y: y, False),
    ("top left {}|{} in the top left corner|{} upper left", lambda x, y: min(-x, -y), False),
    ("top right {}|{} in the top right corner|{} upper right", lambda x, y: min(x, -y), False),
    ("bottom left {}|{} in the bottom left corner|{} lower left", lambda x, y: min(-x, y), False),
    ("bottom right {}|{} in the bottom right corner|{} lower right", lambda x, y: min(x, y), False),
    ("middle {}|center {}|{} in the middle", lambda x, y: 0.25 - max(abs(x), abs(y)), False),
)
RELATIONS = (
    ("{} left of {}|{} to the left of {}", lambda x, y: beside(-x, y), False),
    ("{} right of {}|{} to the right of {}", lambda x, y: beside(x, y), False),
    ("{} above {}|{} over {}", lambda x, y: beside(-y, x), False),
    ("{} below {}|{} under {}|{} beneath {}", lambda x, y: beside(y, x), False),
    ("{} closest to {}|{} nearest to {}|{} next to {}", lambda x, y: -math.hypot(x, y), True),
    ("{} farthest from {}|{} furthest away from {}", lambda x, y: math.hypot(x, y), True),
)
# fmt: on


class Shape(NamedTuple):
    """One shape of a scene; its first three fields are what a description may say of it."""

    size: str
    colour: str
    kind: str
    box: tuple  # x1, y1, x2, y2 in half pixels, whole numbers: the same on every machine
    x: float  # of the box's centre, from the picture's, in shares of the side
    y: float


def overlap(a, b):
    """The area that two boxes share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0


def arrange(rng, count):
    """`count` shapes, in drawing order, of few kinds and colours, none hidden by over a quarter.

    All but the star fill half of their box, so an eighth of it may lie under later shapes' boxes.
    """
    kinds, colours = rng.sample(list(KINDS), 2), rng.sample(list(COLOURS), rng.choice((2, 3)))
    shapes, room, tries = [], [], 0  # room: the area of each shape that may still be hidden
    while len(shapes) < count:
        if tries % (15 * count) == 0:  # a scene that does not come out is begun again
            shapes, room = [], []
        tries += 1
        size = rng.choice(("small", "big", "big"))
        colour, kind = rng.choice(colours), rng.choice(kinds)
        side = 2 * SIDE * rng.uniform(*SIZES[size])
        w, h = round(side * rng.uniform(0.92, 1.08)), round(side * rng.uniform(0.92, 1.08))
        x, y = rng.randint(2, 2 * SIDE - 2 - w), rng.randint(2, 2 * SIDE - 2 - h)
        box = (x, y, x + w, y + h)
        if all(overlap(box, shape.box) <= area for shape, area in zip(shapes, room)):
            room = [area - overlap(box, shape.box) for shape, area in zip(shapes, room)]
            room.append(w * h / (12 if kind == "star" else 8))
            centre = ((2 * x + w) / 4 / SIDE - 0.5, (2 * y + h) / 4 / SIDE - 0.5)
            shapes.append(Shape(size, colour, kind, box, *centre))
    return shapes


def describe(rng, shape):
    """What to say of a shape: size, colour, kind; None for what stays unsaid."""
    return tuple(word if rng.random() < p else None for p, word in zip((0.4, 0.6, 0.75), shape))


def matching(shapes, description):
    """The shapes of which a description is true."""
    return [s for s in shapes if all(said in (None, is_) for said, is_ in zip(description, s))]


def phrase(rng, description):
    """A description in words: "little red disc", "red one"."""
    words = [word for word in description[:2] if word] + [description[2]]
    return " ".join(rng.choice(WORDS.get(word, word).split("|")) for word in words)


def holds(degree, superlative, target, others):
    """Whether something is true of the target and of no other, with a clear margin: CLEAR between
    yes and no, or a lead of GAP over the next one. degree: function of a Shape."""
    if superlative:
        return bool(others) and degree(target) - max(map(degree, others)) >= GAP
    return degree(target) >= CLEAR and all(degree(other) <= 0 for other in others)


def expression(rng, shapes, category):
    """One try at an expression: (text, number of the shape it is true of), or None where it is not
    proven to be true of that one alone. As people do, it may say more than one needs."""
    target = rng.choice(shapes)
    said, ways, names = describe(rng, target), "{}", ()
    rivals = [shape for shape in matching(shapes, said) if shape is not target]
    if category == "attributes":
        proven = any(said) and not rivals
    elif category == "place":
        ways, degree, superlative = rng.choice(PLACES)
        proven = holds(lambda s: degree(s.x, s.y), superlative, target, rivals)
    else:
        ways, degree, superlative = rng.choice(RELATIONS)
        other = rng.choice(shapes)
        names = (describe(rng, other),)  # has to say by itself which one is meant
        if other is target or matching(shapes, names[0]) != [other]:
            return None
        rivals = [shape for shape in rivals if shape is not other]
        proven = holds(lambda s: degree(s.x - other.x, s.y - other.y), superlative, target, rivals)
    if not proven:
        return None
    words = [phrase(rng, said), *("the " + phrase(rng, name) for name in names)]
    text = rng.choice(("", "", "the ")) + rng.choice(ways.split("|")).format(*words)
    return text, shapes.index(target)


def caption(rng, shapes):
    """What is in a scene: two or three of the shapes, or all, mostly with where they are."""
    parts = []
    for shape in rng.sample(shapes, min(rng.choice((2, 3, 5)), len(shapes))):
        name = phrase(rng, (rng.choice((shape.size, None)), shape.colour, shape.kind))
        true = [ways for ways, degree, most in PLACES[4:] if degree(shape.x, shape.y) >= CLEAR]
        where = [way for ways in true for way in ways.split("|") if way.startswith("{}")]
        way = rng.choice(where) if where and rng.random() < 0.75 else "{}"
        parts.append(way.format(("an " if name[0] in "aeiou" else "a ") + name))
    return rng.choice((" and ", ", ")).join(parts)


def draw(rng, shapes):
    """The scene as JPEG bytes: shapes with thin dark outlines on a light, shaded background."""
    slope = np.linspace(-1, 1, 2 * SIDE)
    shade = rng.uniform(-14, 14) * slope[:, None] + rng.uniform(-14, 14) * slope  # [2 S, 2 S]
    light = shade[..., None] + [rng.uniform(200, 226) for _ in "rgb"]  # [2 S, 2 S, 3]
    image = Image.fromarray(light.astype(np.uint8))
    for shape in shapes:
        x1, y1, x2, y2 = shape.box
        scale_x, scale_y = (x2 - x1 - 1) / 100, (y2 - y1 - 1) / 100
        points = [(x1 + x * scale_x, y1 + y * scale_y) for x, y in KINDS[shape.kind]]
        fill = tuple(round(max(0, c - rng.uniform(0, 28))) for c in COLOURS[shape.colour])
        ImageDraw.Draw(image).polygon(points, fill, tuple(value // 3 for value in fill), 2)
    noise = np.frombuffer(rng.randbytes(3 * SIDE**2), np.uint8).reshape(SIDE, SIDE, 3) / 16 - 8
    pixels = (np.asarray(image.reduce(2)) + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=90)
    return file.getvalue()


def make_scene(job):
    """(split, number) -> shapes, {text: number of the shape}, captions, JPEG bytes."""
    rng = random.Random("{} {}".format(*job))
    _, counts, wanted, categories = SPLITS[job[0]]
    shapes, texts = arrange(rng, rng.choice(counts)), {}
    for category in itertools.islice(itertools.cycle(categories), wanted):
        tries = (expression(rng, shapes, category) for _ in range(100))
        found = (pair for pair in tries if pair and pair[0] not in texts)
        texts.update(itertools.islice(found, 1))
    captions = [caption(rng, shapes) for _ in range(4)] if job[0] == "train" else []
    return shapes, texts, captions, draw(rng, shapes)


def learn_merges(words):
    """Byte-pair encoding: the commonest pair of neighbouring pieces becomes one, until each word is
    one. Returns the lines of a merges file."""
    merges, words = [], [" " + "  ".join(word) + "</w> " for word in words]  # " r  e  d</w> "
    while pairs := Counter(pair for word in words for pair in itertools.pairwise(word.split())):
        first, second = max(sorted(pairs), key=pairs.get)
        merges.append(f"{first} {second}")
        words = [word.replace(f" {first}  {second} ", f" {first}{second} ") for word in words]
    return merges


def annotate(texts, shapes, picture, split, annotations, refs):
    """Add a scene's shapes and expressions to the annotations and refs, as RefCOCO has them: a box
    for each shape, a ref for each that is spoken of."""
    for number, shape in enumerate(shapes):
        ids = {"image_id": picture["id"], "category_id": list(KINDS).index(shape.kind) + 1}
        x1, y1, x2, y2 = (value / 2 for value in shape.box)  # half pixels -> pixels
        note = {"id": len(annotations) + 1, **ids, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        note["segmentation"] = [[x1, y1, x2, y1, x2, y2, x1, y2]]
        annotations.append({**note, "area": (x2 - x1) * (y2 - y1), "iscrowd": 0})
        own = [text for text, of in texts.items() if of == number]
        if own:
            ref = {"ref_id": len(refs) + 1, "ann_id": note["id"], **ids, "split": split}
            ref["file_name"] = picture["file_name"].replace(".jpg", f"_{note['id']}.jpg")
            ref["sent_ids"] = [10 * note["id"] + place for place in range(len(own))]
            texts_of = ({"sent": text, "raw": text, "tokens": text.split()} for text in own)
            ref["sentences"] = [{"sent_id": i, **t} for i, t in zip(ref["sent_ids"], texts_of)]
            refs.append(ref)


def generate_shapes(folder):
    """Write the shapes data set into a folder that is not there yet: instances.json, refs(unc).p
    and images/ in RefCOCO's layout; captions.json, {file name: captions} of the train scenes; and
    bpe_vocab.txt.gz, a vocabulary in the format of CLIP's. A folder is complete or not there: it is
    made under another name and renamed at the end.
    """
    half = Path(f"{Path(folder)}.unfinished")
    shutil.rmtree(half, ignore_errors=True)
    (half / "images").mkdir(parents=True)
    pictures, annotations, refs, captions, words, split_of = [], [], [], {}, set(), {}
    jobs = [(split, number) for split in SPLITS for number in range(SPLITS[split][0])]
    with multiprocessing.Pool(**QUIET) as pool:
        scenes = pool.imap(make_scene, jobs, chunksize=50)
        for (split, _), scene in zip(tqdm(jobs, "making shapes", unit="scene"), scenes):
            shapes, texts, told, jpeg = scene
            look = frozenset((*s[:3], round(8 * s.x), round(8 * s.y)) for s in shapes)
            if split_of.setdefault(look, split) != split:
                continue  # much the same scene is in another split already
            picture = {"id": len(pictures) + 1, "width": SIDE, "height": SIDE}
            picture["file_name"] = name = f"shapes_{picture['id']:06d}.jpg"
            pictures.append(picture)
            (half / "images" / name).write_bytes(jpeg)
            if told:
                captions[name] = told
            words.update(" ".join([*texts, *told]).replace(",", "").split())
            annotate(texts, shapes, picture, split, annotations, refs)
    categories = [{"id": number, "name": kind} for number, kind in enumerate(KINDS, 1)]
    instances = {"images": pictures, "annotations": annotations, "categories": categories}
    merges = ["# version: shapes", *learn_merges(sorted(words))]
    (half / "instances.json").write_text(json.dumps(instances))
    (half / "captions.json").write_text(json.dumps(captions))
    (half / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    (half / "bpe_vocab.txt.gz").write_bytes(gzip.compress("\n".join(merges).encode(), mtime=0))
    half.replace(folder)


# ------------------------------------------------------------------------------- check and download

UNC = "https://web.archive.org/web/{}/https://bvisionweb1.cs.unc.edu/licheng/referit/data/{}.zip"
ZENODO = "https://zenodo.org/record/4729015/files/mdetr_annotations.tar.gz"
TRAIN2014 = "http://images.cocodataset.org/zips/train2014.zip"


def picture_size(path):
    """(width, height) of a picture, read to its end; None if it cannot be."""
    try:
        return load_image(path, upright=False).size
    except HiVGError:
        return None


def check(name, data_root):
    """Print a table of what is there of a data set; every picture is opened, once.

    Raises HiVGError if a split, expressions or pictures are missing, or pictures unreadable.
    """
    there, source, problems = available_splits(name, data_root), DATASETS[name], []
    published = dict(zip(source.splits.split(), source.counts)) or dict.fromkeys(there, 0)
    splits = {split: read_split(name, split, data_root) for split in published}
    paths = sorted({sample.image for samples, *_ in splits.values() for sample in samples})
    with multiprocessing.Pool(**QUIET) as pool:
        sizes = pool.imap(picture_size, paths, chunksize=8)
        sizes = dict(zip(paths, tqdm(sizes, "opening pictures", len(paths), unit="picture")))
    print("split    expressions  published  missing images  unreadable images  odd boxes")
    for split, (samples, found, notes) in splits.items():
        missing = missing_pictures(samples)
        fitting = [s for s in samples if sizes[s.image] and s.size in (None, sizes[s.image])]
        unreadable = {s.image for s in samples} - {s.image for s in fitting} - {*missing}
        outside = {(s.image, s.box) for s in fitting if any(map(gt, s.box[2:], sizes[s.image]))}
        odd = notes.total() - notes[EMPTY] + len(outside)
        print(f"{split:8} {found:11} {published[split] or '-':>10}", end="")
        print(f"{len(missing):16} {len(unreadable):18} {odd:10}")
        if found < max(published[split], 1):
            problems.append(f"{split} has {found:,} expressions")
        for what, pictures in {"missing": missing, "unreadable": sorted(unreadable)}.items():
            if pictures:
                problems.append(f"{what} in {split}: {', '.join(pictures[:3])}")
    if problems:
        raise HiVGError(f"{name} is not whole, {'; '.join(problems)}: {source.origin}.")


def fetch(url, data_root, folder, prefix=""):
    """Download a zip or tar archive, move its files whose names begin with `prefix` into a folder
    below the data root, without the folders that they lie in there, and remove the archive.

    A file is whole when it gets there. Raises HiVGError; what is no archive, is damaged or would
    reach outside is removed as well.
    """
    path, folder = Path(data_root, url.rsplit("/", 1)[1]), Path(data_root, folder)
    if not path.exists():  # it is there if the last run was stopped while it unpacked
        download(url, path)
    try:
        with (
            explaining(f"{path} cannot be unpacked", "run it again: a bad one is fetched anew"),
            tempfile.TemporaryDirectory(prefix=".unpacking", dir=data_root) as half,
            (zipfile.ZipFile if zipfile.is_zipfile(path) else tarfile.open)(path) as archive,
        ):
            if isinstance(archive, zipfile.ZipFile):
                read, entries = archive.open, (e for e in archive.infolist() if not e.is_dir())
                files = ((e, e.filename, S_ISLNK(e.external_attr >> 16)) for e in entries)
            else:
                read, entries = archive.extractfile, (e for e in archive if not e.isdir())
                files = ((e, e.name, not e.isfile()) for e in entries)
            for entry, name, is_link in tqdm(files, "unpacking", unit="file"):
                if is_link or os.path.isabs(name) or ".." in name.split("/"):
                    raise ValueError(f"{name} would reach outside")
                name = os.path.basename(name)
                if name.startswith(prefix):
                    with read(entry) as source, open(Path(half, name), "wb") as target:
                        shutil.copyfileobj(source, target)
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(Path(half).iterdir()):  # refs, which are looked for, at the end
                file.replace(folder / file.name)
    except HiVGError as error:
        if getattr(error.__cause__, "errno", None) is None:  # it is not for want of room or rights
            path.unlink()
        raise
    path.unlink()


def get(name, data_root):
    """Fetch what is not there of a data set; one that can't be had so is a HiVGError that says
    where to ask for it."""
    files, source = split_files(name, data_root), DATASETS[name]
    if "refer" not in source.files:
        raise HiVGError(f"{name} cannot be downloaded: {source.origin}.")
    refer = [Path(path) for family, path in files.values() if family == "refer"]
    whole = all(path.with_name("instances.json").is_file() for path in refer)
    if len(files) < len(source.splits.split()) or not whole:
        folder = os.path.dirname(source.files["refer"])
        try:
            fetch(UNC.format(source.stamp, folder), data_root, folder)
        except HiVGError as error:
            if "mdetr" not in source.files:
                raise
            print(f"{error} Now from {ZENODO}:")
            fetch(ZENODO, data_root, "mdetr_annotations", "finetune_refcoco")
    splits = available_splits(name, data_root) if source.pictures == "coco" else ()
    if missing_pictures(s for split in splits for s in read_split(name, split, data_root)[0]):
        fetch(TRAIN2014, data_root, "images/mscoco/images/train2014")
    print(f"{name} is in {data_root}: python data.py check looks at every picture")


def main():
    jobs = {"check": check, "download": get}
    parser = argparse.ArgumentParser(description="Look at a data set, or fetch it.")
    add = parser.add_argument
    add("job", choices=jobs)
    add("--dataset", required=True, help=", ".join(DATASETS))
    add("--data-root", default="data", help="folder of the data sets (default: data)")
    args = parser.parse_args()
    exit_with(lambda args: jobs[args.job](args.dataset, args.data_root), args)


if __name__ == "__main__":
    main()
