"""Data: images, expressions and boxes on their way into the model; and the shapes data set.

    python data.py download --dataset refcoco --data-root data  # fetch what has a public address
    python data.py check --dataset refcoco --data-root data     # is all of it there and readable?

An image is scaled and padded to the square that the model sees; boxes go with it, there and back:

    image, box x1 y1 x2 y2 in pixels  --letterbox, box_to_square-->  square, box cx cy w h in 0..1
    box x1 y1 x2 y2 in pixels         <--------box_to_pixels-------  box of the model

Reading order: that geometry, augmentation, GroundingDataset and its batches, annotation files,
robust reading of images, the shapes data set (which is generated), device, processes and command
line, check and download. This file knows no model: of clip_model.py it takes errors, the
readers of files and a few functions on texts.

Boxes are x1, y1, x2, y2 in pixels of the image as stored (one's own: as viewers show it), except
where a docstring says cx, cy, w, h: those are 0..1 of the padded square. Letters: S side of the
square in pixels, B samples, n scenes or boxes.
"""

import math
import random
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageEnhance
from torch.utils.data import DataLoader, Dataset, default_collate

# isort: split
# imports of the sections on annotation files, reading of images, shapes, check and download
import argparse
import functools
import gzip
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import tempfile
import unicodedata
import urllib.request
import warnings
import zlib
from collections import Counter
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote

from PIL import ImageDraw, PngImagePlugin
from tqdm import tqdm

from clip_model import (
    HiVGError,
    PlainUnpickler,
    clean_text,
    end_of_text,
    merge_pair,
    read_weights,
    run_main,
    split_words,
    user_error,
)

# ----------------------------------------------------------------------- the image and its square


class Geometry(NamedTuple):
    """Where an image lies in the model's square: `crop` of it is drawn into `inner`. Of a batch,
    both are tensors [B, 4]."""

    crop: tuple  # x1, y1, x2, y2 in the image's pixels; for evaluation all of it
    inner: tuple  # left, top, width, height in the square, whole pixels; the rest is padding
    side: int  # S, of the square, in pixels


def letterbox(crop, side, long_side=None, padding_shares=(0.5, 0.5)):
    """The Geometry that scales a crop to a long side of `long_side` pixels (None: `side`) and
    places it in the square.

    The aspect is kept up to whole pixels; the short side has at least one. padding_shares: how much
    of the padding goes to the left and to the top, one half each for evaluation.
    """
    width, height = crop[2] - crop[0], crop[3] - crop[1]
    scale = (long_side or side) / max(width, height)
    inner = [max(1, round(length * scale)) for length in (width, height)]
    place = [round((side - length) * share) for length, share in zip(inner, padding_shares)]
    return Geometry(crop, (*place, *inner), side)


def box_to_square(box, geometry):
    """A box x1, y1, x2, y2 in the image's pixels -> tensor [4], cx, cy, w, h, 0..1, of the square.
    The part outside the crop is cut off."""
    parts = torch.tensor([geometry.crop, geometry.inner, box], dtype=torch.float64)
    (start, end), (place, size), corners = parts.view(3, 2, 2)  # [2] each, x and y; corners [2, 2]
    # the scales of x and y, size / (end - start), differ: lengths are rounded
    low, high = (corners.clamp(start, end) - start) / (end - start) * size + place
    return torch.cat([(low + high) / 2, high - low]).float() / geometry.side


def box_to_pixels(boxes, geometry):
    """Tensor [..., 4] of cx, cy, w, h, 0..1, of the square -> [..., 4] of x1, y1, x2, y2 in the
    image's own pixels, clipped to the image. The inverse of `box_to_square`."""
    parts = (geometry.crop, geometry.inner, boxes * geometry.side)
    (start, end), (place, size), (centre, box_size) = (
        torch.as_tensor(part).to(boxes).split(2, dim=-1)
        for part in parts  # [..., 2] each
    )
    corners = [
        ((corner - place) / size * (end - start) + start).clamp(start, end)
        for corner in (centre - box_size / 2, centre + box_size / 2)
    ]
    return torch.cat(corners, dim=-1)


def to_square(image, geometry):
    """The crop of an RGB PIL image at the size of `inner`: uint8 [3, S, S], 0 in the padding."""
    left, top, width, height = geometry.inner
    square = np.zeros((geometry.side, geometry.side, 3), np.uint8)
    image = image.resize((width, height), Image.BILINEAR, box=geometry.crop)
    square[top : top + height, left : left + width] = image
    return torch.from_numpy(square).permute(2, 0, 1).contiguous()


def whole(image, side):
    """The Geometry of a whole PIL image in the middle of the square."""
    return letterbox((0, 0, *image.size), side)


def preprocess(image, image_size):
    """An RGB PIL image as evaluation sees it: uint8 [3, S, S], 0 in the padding; and its
    Geometry."""
    geometry = whole(image, image_size)
    return to_square(image, geometry), geometry


# ------------------------------------------------------------------------------------- augmentation

PLACE_WORDS = ("left", "right", "top", "bottom", "middle")  # inside words, too: leftmost, laptop


def random_geometry(rng, size, box, text, side):
    """A random crop, scale and position for training.

    rng: a random.Random; size: width, height; side: S. The crop has the sizes of the authors' (D16):
    the short side is scaled to 400, 500 or 600, and 384 to 600 pixels a side are cut out. Here it
    is computed in the image's own pixels, so that the image is resized only once. It contains the
    centre of the box. A text with one of PLACE_WORDS gets no crop, which could make it wrong.
    """
    crop = (0, 0, *size)
    if rng.random() < 0.5 and not any(word in text.lower() for word in PLACE_WORDS):
        scale = rng.choice((400, 500, 600)) / min(size)
        x1, x2 = random_interval(rng, size[0], box[0], box[2], scale)
        y1, y2 = random_interval(rng, size[1], box[1], box[3], scale)
        crop = (x1, y1, x2, y2)
    step = side / 7  # 32 pixels for S = 224: the long side is one of 224, 192, ..., 64, 56
    long_side = max(side - step * rng.randrange(7), side / 4)
    return letterbox(crop, side, long_side, (rng.random(), rng.random()))


def random_interval(rng, length, low, high, scale):
    """One axis of a crop of 384 to 600 scaled pixels: its start and end in 0..length. It contains
    the middle of low..high."""
    crop = rng.randint(384, min(600, round(length * scale))) / scale
    centre = min((low + high) / 2, length)  # the annotated box may lie outside the image
    first = max(0, centre - crop)
    last = max(first, min(length - crop, centre))
    start = rng.uniform(first, last)
    return start, min(length, start + crop)


def jitter(rng, image):
    """Brightness, contrast and saturation of a PIL image times 0.6 to 1.4, in random order."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for enhancer in rng.sample(enhancers, 3):
        image = enhancer(image).enhance(rng.uniform(0.6, 1.4))
    return image


# -------------------------------------------------------------------------------- dataset and batches


class Sample(NamedTuple):
    """One expression and the object that it means."""

    image: str  # path
    text: str
    box: tuple  # x1, y1, x2, y2 in pixels, inside the image where its size is known
    size: tuple | None = None  # width, height as annotated, if they are
    upright: bool = False  # pixels count in the image as its EXIF turns it, not as it is stored


@dataclass
class GroundingDataset(Dataset):
    """The expressions of one split. Item [i] is a dict:

    image   uint8 [3, S, S], 0 in the padding
    crop  float32 [4]: x1, y1, x2, y2, the part of the image that is seen, in its pixels
    inner   int64 [4]: left, top, width, height of that part in the square
    tokens  int64 [77], only if there is a tokenizer
    text    str
    box     float32 [4]: cx, cy, w, h, 0..1, of the padded square
    object  int: a number, the same for all expressions of one object (image and box)

    samples: a sequence of Samples, see `open_split`. augment: training's random crop, scale,
    colours and position. cache: keep all resized images in memory (small data sets, without
    augment), not just the last. Raises HiVGError for an image that cannot be read.
    """

    samples: list  # or PackedSamples
    split: str
    image_size: int = 224
    tokenizer: object = None
    augment: bool = False
    cache: bool = False
    report: list = ()
    images: dict = field(default_factory=dict)  # those in memory

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        """index: a number, or (number, seed): what is random follows from both."""
        number, seed = index if isinstance(index, tuple) else (index, 0)
        sample = self.samples[number]
        if self.augment:
            rng = random.Random(f"{seed} {number}")
            image, geometry = read_image(sample, self.image_size, rng)
        else:  # an image is read once for expressions that follow one another
            if sample.image not in self.images:
                if not self.cache:
                    self.images.clear()
                self.images[sample.image] = read_image(sample, self.image_size)
            image, geometry = self.images[sample.image]
        item = {
            "image": image,
            "crop": torch.tensor(geometry.crop, dtype=torch.float32),
            "inner": torch.tensor(geometry.inner),
            "text": sample.text,
            "box": box_to_square(sample.box, geometry),
            "object": zlib.crc32(repr((sample.image, sample.box)).encode()),
        }
        if self.tokenizer:
            item["tokens"] = self.tokenizer(sample.text)[0]
        return item


def read_image(sample, image_size, rng=None):
    """The image of a Sample, uint8 [3, S, S], and its Geometry; rng: augmented, with this
    random.Random."""
    image = open_sample(sample)
    if rng is None:
        return preprocess(to_rgb(image, sample.image), image_size)
    geometry = random_geometry(rng, image.size, sample.box, sample.text, image_size)
    reduced = reduce_while_decoding(image, geometry)
    image = to_rgb(image, sample.image)
    if rng.random() < 0.8:
        image = jitter(rng, image)
    return to_square(image, reduced), geometry


def open_sample(sample):
    """The image of a Sample, see `open_image`. Raises HiVGError, too, if its size is not the
    annotated one."""
    image = open_image(sample.image, sample.upright)
    if sample.size not in (None, image.size):
        sizes = "has {} x {} pixels, but its annotations are for {} x {}"
        raise HiVGError(f"{sample.image} {sizes.format(*image.size, *sample.size)}: replace it.")
    return image


def collate(items):
    """Items -> batch: the same dict with tensors [B, ...]; texts are a list, tokens are trimmed to
    the longest."""
    batch = default_collate(items)
    if "tokens" in batch:
        batch["tokens"] = trim_to_longest(batch["tokens"])
    return batch


def trim_to_longest(tokens):
    """Tokens [B, 77] -> [B, T]: T is the length of the longest text."""
    return tokens[:, : end_of_text(tokens).max() + 1]


class BatchLoader:
    """Reads batches with `workers` processes, which live on from one epoch to the next.

    loader(batches, seed) yields the batches, given as lists of indices; seed: of what is random in
    them. Raises HiVGError for an image that cannot be read.
    """

    def __init__(self, dataset, workers=0):
        self.dataset, self.batches = dataset, []
        self.loader = DataLoader(
            dataset,
            batch_sampler=self.batches,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )

    def __call__(self, batches, seed=0):
        self.batches[:] = [[(index, seed) for index in indices] for indices in batches]
        yield from self.loader


def mix_seed(*numbers):
    """A seed that follows from whole numbers below 2^32. Other numbers give another seed; among the
    first four, zeros at the end do not count."""
    return int(np.random.default_rng(numbers).integers(2**62))


class PackedSamples:
    """A list of Samples, pickled into one string of bytes. Workers share its memory; a list of Python objects
    would be copied into each of them, since reading an object writes its reference count.
    """

    def __init__(self, samples=()):
        pickled = [pickle.dumps(tuple(sample), protocol=4) for sample in samples]
        self.ends = np.cumsum([0, *map(len, pickled)])
        self.content = b"".join(pickled)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        index = range(len(self))[index]  # negative ones count from the end
        start, end = self.ends[index : index + 2]
        return Sample(*pickle.loads(self.content[start:end]))


# ----------------------------------------------------------------------------------- annotation files

COCO_HELP = (
    "python data.py download --dataset NAME fetches what is missing (from web.archive.org and "
    "images.cocodataset.org; zenodo.org/record/4729015 has MDETR's files); delete a damaged file first"
)
INDEX_HELP = "the index lists that github.com/linhuixiao/HiVG links to"
REFERIT_HELP = (
    "ask for the images of SAIAPR TC-12 at www.imageclef.org/SIAPRdata and put them into "
    f"referit/images; take {INDEX_HELP}, referit/referit_train.pth and so on: tuples of file, "
    "size, box x1 y1 x2 y2, phrase"
)
FLICKR_HELP = (
    "ask for the images with the form at shannon.cs.illinois.edu/DenotationGraph and put them into "
    f"Flickr30k/flickr30k-images; take {INDEX_HELP}, flickr/flickr_train.pth and so on: tuples of "
    "file, box x1 y1 x2 y2, phrase; Flickr30k Entities' own XML and sentence files are not read"
)
OWN_HELP = (
    "write train.jsonl, val.jsonl and so on into the data root, with lines like "
    '{"image": "path/below/it.jpg", "text": "the red cup", "box": [x1, y1, x2, y2]}, boxes in '
    "pixels of the upright image, and the images there; or put there, as train.json and so on, "
    "Label Studio's export JSON (not JSON_MIN), or datumaro's or CVAT's COCO with an attribute text"
)
SHAPES_HELP = "python train.py --dataset NAME generates it; delete a damaged folder first"


class DatasetInfo(NamedTuple):
    """Where the files of a data set are and what is in them."""

    splits: tuple
    published: tuple  # numbers of expressions, in the order of the splits; () where there are none
    folders: tuple  # where its images may be below the data root
    help: str  # where to get it
    files: dict  # {family: path below the data root, where {} is the split}; the first counts
    web_archive: int = 0  # time stamp of the web archive's copy of refer's files


REFCOCO_SPLITS = ("train", "val", "testA", "testB")
COCO = (
    "images/mscoco/images/train2014",
    "other/images/mscoco/images/train2014",
    "train2014",
    "images/train2014",
    "train2017",  # of COCO 2017, the same images named by their number alone
)
REFERIT = ("referit/images", "other/images/referit/images", "referit")
FLICKR = ("Flickr30k/flickr30k-images", "Flickr30k/flickr30k_images", "flickr30k-images")
# fmt: off
DATASETS = {
    "refcoco": DatasetInfo(
        REFCOCO_SPLITS, (120_624, 10_834, 5_657, 5_095), COCO, COCO_HELP,
        {"refer": "refcoco/refs(unc).p", "index": "unc/unc_{}.pth",
         "mdetr": "finetune_refcoco_{}.json"}, web_archive=20220413011718),
    "refcoco+": DatasetInfo(
        REFCOCO_SPLITS, (120_191, 10_758, 5_726, 4_889), COCO, COCO_HELP,
        {"refer": "refcoco+/refs(unc).p", "index": "unc+/unc+_{}.pth",
         "mdetr": "finetune_refcoco+_{}.json"}, web_archive=20220413011656),
    "refcocog": DatasetInfo(
        ("train", "val", "test"), (80_512, 4_896, 9_602), COCO, COCO_HELP,
        {"refer": "refcocog/refs(umd).p", "index": "gref_umd/gref_umd_{}.pth",
         "mdetr": "finetune_refcocog_{}.json"}, web_archive=20220413012904),
    "refcocog-google": DatasetInfo(
        ("train", "val"), (85_474, 9_536), COCO, COCO_HELP,
        {"refer": "refcocog/refs(google).p", "index": "gref/gref_{}.pth"},
        web_archive=20220413012904),
    "referit": DatasetInfo(
        ("train", "val", "test"), (54_127, 5_842, 60_103), REFERIT, REFERIT_HELP,
        {"index of corners": "referit/referit_{}.pth"}),
    "flickr30k": DatasetInfo(
        ("train", "val", "test"), (427_193, 14_433, 14_481), FLICKR, FLICKR_HELP,
        {"index of corners": "flickr/flickr_{}.pth"}),
    "own": DatasetInfo(
        (*REFCOCO_SPLITS, "test"), (), ("",), OWN_HELP, {"own": "{}.jsonl", "exports": "{}.json"}),
    "shapes": DatasetInfo(
        (*REFCOCO_SPLITS, "test"), (), ("shapes",), SHAPES_HELP, {"own": "shapes/{}.jsonl"}),
    "shapes-long": DatasetInfo(
        (*REFCOCO_SPLITS, "test"), (), ("shapes-long",), SHAPES_HELP,
        {"own": "shapes-long/{}.jsonl"}),
}
# fmt: on

# The families of files. Each function takes the path of a file that a user has or downloads, and
# yields (split, image's file name, its size or None, box x1 y1 x2 y2, texts), one object each. split
# is None if the file is of one split.


def read_refer(path):
    """lichengunc/refer: refs(...).p, a pickle of Python 2 or 3 of all splits, and instances.json
    beside it, in COCO's layout."""
    refs, instances = parse(path, read_pickle), read_json(Path(path).with_name("instances.json"))
    images, annotations = by_key("id", instances["images"]), by_key("id", instances["annotations"])
    for ref in refs:
        texts = [sentence["sent"] for sentence in ref["sentences"]]
        # ref["file_name"] is not an image's name
        image, annotation = images[ref["image_id"]], annotations[ref["ann_id"]]
        yield ref["split"], *coco_object(image, annotation), texts


def read_mdetr(path):
    """MDETR: COCO's layout with an image and an annotation for each expression."""
    content = read_json(path)
    annotations = by_key("image_id", content["annotations"])
    for image in content["images"]:
        yield None, *coco_object(image, annotations[image["id"]]), [image["caption"]]


def by_key(key, entries):
    return {entry[key]: entry for entry in entries}


def coco_object(image, annotation):
    """File name, size and box of an object in COCO's layout."""
    size = image["width"], image["height"]
    return image["file_name"], size, xywh_to_xyxy(annotation["bbox"])


def xywh_to_xyxy(box):
    """x, y, width, height -> x1, y1, x2, y2."""
    x, y, width, height = map(float, box)
    return x, y, x + width, y + height


def read_index(path, to_corners=tuple):
    """TransVG, CLIP-VG, HiVG: a list of tuples, written by torch.save or as a plain pickle.
    to_corners: function of their boxes."""
    for record in parse(path, read_pickle):
        image, *size, box, text = record if len(record) == 3 else record[:4]  # 3: Flickr30k
        has_names = size and isinstance(size[0], dict)  # of a pair, which is the width?
        size = (size[0]["width"], size[0]["height"]) if has_names else None
        yield None, image, size, to_corners(box), [text]


def read_own(path):
    """One's own data: a JSON object on each line, or one array of objects."""
    text = parse(path, lambda file: file.read().decode("utf-8-sig").strip())
    lines = filter(str.strip, text.split("\n"))
    for record in json.loads(text) if text.startswith("[") else map(json.loads, lines):
        yield None, record["image"], None, record["box"], [record["text"]]


def read_exports(path):
    """What labelling tools write that keeps a text with its box: Label Studio's JSON, and COCO's
    layout with an attribute "text" (datumaro, CVAT). A text may be a str, several are a list."""
    content = read_json(path)
    read = read_coco_texts if isinstance(content, dict) else read_label_studio
    for file, box, texts in read(content):
        yield None, file, None, box, [texts] if isinstance(texts, str) else texts


def read_coco_texts(content):
    """(image's file name, box, texts) of the annotations in COCO's layout."""
    images = by_key("id", content["images"])
    for annotation in content["annotations"]:
        file, box = images[annotation["image_id"]]["file_name"], xywh_to_xyxy(annotation["bbox"])
        yield file, box, dict(annotation.get("attributes") or {}).get("text") or []


def read_label_studio(tasks):
    """(image's file name, box, texts) of the text areas that belong to a rectangle."""
    for task in tasks:
        # of an address like /data/upload/3/1a2b3c4d-kitchen.jpg or ...?d=folder/kitchen.jpg
        urls = map(str, dict(task["data"]).values())
        extensions = tuple(Image.registered_extensions())
        names = [re.split("[/=]", unquote(u))[-1] for u in urls if u.lower().endswith(extensions)]
        for annotation in task["annotations"]:
            for result in annotation["result"]:
                of_rectangle = result["type"] == "textarea" and "width" in result["value"]
                if of_rectangle and not annotation.get("was_cancelled"):
                    yield names[0], label_studio_box(result), result["value"]["text"]


def label_studio_box(result):
    """x1, y1, x2, y2 in pixels around a rectangle of Label Studio: percent of the image's sides,
    turned by degrees about its upper left corner, clockwise as one sees it."""
    value, percent = (
        result["value"],
        np.array([result["original_width"], result["original_height"]]) / 100,
    )
    place, size = percent * [value["x"], value["y"]], percent * [value["width"], value["height"]]
    angle = math.radians(value.get("rotation", 0))
    cos, sin = math.cos(angle), math.sin(angle)
    corners = place + np.array([(0, 0), (1, 0), (0, 1), (1, 1)]) * size @ [(cos, sin), (-sin, cos)]
    return (*corners.min(axis=0), *corners.max(axis=0))


FAMILIES = {
    "refer": read_refer,
    "index": functools.partial(read_index, to_corners=xywh_to_xyxy),
    "index of corners": read_index,
    "mdetr": read_mdetr,
    "own": read_own,
    "exports": read_exports,
}


def parse(path, read):
    """read(open binary file) of an annotation file; its errors become HiVGErrors."""
    with user_error(f"{path} cannot be read", "get it anew"), open(path, "rb") as file:
        return read(file)


def read_json(path):
    """The content of a JSON file, without segmentations, most of the file, which nobody needs."""
    return parse(path, lambda file: json.load(file, object_hook=without_polygons))


def without_polygons(value):
    value.pop("segmentation", None)
    return value


def read_pickle(file):
    """The plain data in an open pickle or file of torch.save."""
    if file.peek(2)[:2] == b"PK":
        return read_weights(file.name)
    content = PlainUnpickler(file, encoding="latin-1").load()
    if content == torch.serialization.MAGIC_NUMBER:  # torch's older format
        for _ in ("version", "machine", "content"):
            content = PlainUnpickler(file, encoding="latin-1").load()
    return content


def find_files(name, data_root):
    """(family, {split: path}) of a data set, from the first family whose files are in the data root
    or (but for own data) one folder below. Raises HiVGError if there are none."""
    info = DATASETS[name]
    for family, pattern in info.files.items():
        paths = {}
        for place in [pattern] if "own" in info.files else [pattern, f"*/{pattern}"]:
            for split in info.splits:
                for path in sorted(Path(data_root).glob(place.format(split))):
                    paths.setdefault(split, str(path))
        if paths:
            return family, paths
    files = " or ".join(info.files.values()).replace("{}", "train")
    raise HiVGError(
        f"{data_root} has no expressions of {name}, looked for {files} there"
        f"{'' if 'own' in info.files else ' and one folder below'}: {info.help}."
    )


class Split(NamedTuple):
    """What the files have of one split."""

    samples: PackedSamples  # of Sample
    notes: Counter  # "expressions" in the files; what was left out or changed, and how often
    missing: set  # paths of images that are not there, although a sample needs them


def read_annotations(name, data_root):
    """{split: Split} of a data set: the splits that its files have. Every file is read once.

    Raises HiVGError for files that are missing or damaged.
    """
    family, paths = find_files(name, data_root)
    info = DATASETS[name]
    find_image = image_finder([os.path.join(data_root, folder) for folder in info.folders])
    splits = {split: Split([], Counter(), set()) for split in paths}
    for path, only_split in {path: split for split, path in paths.items()}.items():
        number = 1
        try:
            for split, file, *rest in FAMILIES[family](path):
                content = splits.get(split or only_split)
                if content:
                    add_samples(content, *find_image(file), *rest, own="own" in info.files)
                number += 1
        except ENTRY_ERRORS as error:
            raise HiVGError(
                f"{path}, entry {number}, cannot be used ({type(error).__name__}: {error}): "
                f"{info.help}."
            ) from error
    return {
        split: Split(PackedSamples(samples), notes, missing)
        for split, (samples, notes, missing) in splits.items()
        if notes["expressions"]
    }


# of entries that do not fit
ENTRY_ERRORS = (LookupError, TypeError, ValueError, OverflowError, RecursionError)


def add_samples(content, image, exists, size, box, texts, own):
    """Add the Samples of one object to the content of a Split; what is left out or changed is noted."""
    notes = content.notes
    notes["expressions"] += len(texts)
    x1, y1, x2, y2 = map(float, box)  # fractions are kept (D12)
    if own and max(x1, y1, x2, y2) <= 1:
        raise ValueError(f"the box {box} lies in one pixel; multiply shares by width and height")
    if own and (x2 < x1 or y2 < y1):  # people draw from any corner
        notes["boxes with corners in another order, or as x, y, width, height: sorted"] += 1
        (x1, x2), (y1, y2) = sorted((x1, x2)), sorted((y1, y2))
    width, height = map(float, size or (math.inf, math.inf))
    clipped = max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height)
    if not (clipped[0] < clipped[2] < math.inf and clipped[1] < clipped[3] < math.inf):
        notes["boxes without area left out"] += 1
        return
    notes["boxes clipped to their image"] += clipped != (x1, y1, x2, y2)
    for text in texts:
        # bytes are an error; other white space may be half of a letter, which ftfy mends
        text = str.strip(text, " \t\r\n")
        if not clean_text(text):
            notes["empty expressions left out"] += 1
            continue
        content.samples.append(Sample(image, text, clipped, size, upright=own))
        if not exists:
            content.missing.add(image)


def image_finder(folders):
    """A function: image file as annotations name it -> (path, whether it exists).

    All names below the folders are listed once: that is far quicker than a look at each of 80,000
    images, above all on a network's file system. Names are compared as they are, then without regard
    to case and Unicode's forms; a name alone is enough if only one file has it.
    """
    paths, alone = {}, {}  # alone: names without a folder, None if several files have it

    def folded(file):
        return unicodedata.normalize("NFC", os.path.normpath(file).replace("\\", "/")).casefold()

    for folder in folders:
        for place, _, names in os.walk(folder):
            for name in names:
                path = os.path.join(place, name)
                relative = path.removeprefix(folder).lstrip(os.sep)
                paths.setdefault(relative, path)
                paths.setdefault(folded(relative), path)
                alone[name] = None if name in alone else path

    def find_image(file):
        # COCO 2017 has the images of train2014 by their number alone; Label Studio puts eight
        # hexadecimal digits before the name of a file
        shorter = re.sub("^(COCO_train2014_|[0-9a-f]{8}-)", "", file)
        path = paths.get(file) or paths.get(folded(file)) or alone.get(file) or alone.get(shorter)
        if path:
            return path, True
        path = os.path.join(folders[0], file)  # of an absolute one: itself
        return path, os.path.isfile(path)

    return find_image


def open_split(annotations, split, **options):
    """The GroundingDataset of a split of one or several data sets, {name: read_annotations(name)};
    options: its other parameters. `report` says what was left out.

    Of several data sets, training expressions are left out if their image is in a val or test split
    of another, and a data set without a val or test split is skipped if others have it. Raises
    HiVGError if nothing is left or an image is missing.
    """
    selected, report = [], []
    for name, splits in annotations.items():
        if split not in splits:
            report.append(
                f"{name} has no expressions of {split!r}, only of {', '.join(splits) or 'none'}"
            )
            continue
        content = splits[split]
        others = [a for other, a in annotations.items() if other != name and split == "train"]
        held_out = {
            sample.image
            for splits_of_other in others
            for held, tested in splits_of_other.items()
            if held != "train"
            for sample in tested.samples
        }
        report += [
            f"{name} {absent} is not there, so its images are not left out"
            for absent in DATASETS[name].splits
            if others and absent not in splits
        ]
        if missing := content.missing - held_out:
            raise HiVGError(
                f"{len(missing)} images of {name} are missing, {min(missing)} among them: "
                f"{DATASETS[name].help}."
            )
        samples, notes = content.samples, dict(content.notes)
        if held_out:
            samples = [sample for sample in samples if sample.image not in held_out]
        notes["left out, since another set tests on their images"] = len(content.samples) - len(
            samples
        )
        report += [f"{name}, {split}: {count:,} {note}" for note, count in notes.items() if count]
        selected.append(samples)
    samples = selected[0] if len(selected) == 1 else PackedSamples(itertools.chain(*selected))
    if not len(samples) or split == "train" and len(selected) < len(annotations):
        raise HiVGError(
            f"There are no usable expressions of {split!r}: {'; '.join(report)}: {DATASETS[name].help}."
        )
    return GroundingDataset(samples, split, report=report, **options)


# ----------------------------------------------------------------------------------- reading images

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")  # not EPS, a program
TURNS = {  # EXIF orientation, tag 0x0112 -> what makes the image upright
    2: Image.FLIP_LEFT_RIGHT,
    3: Image.ROTATE_180,
    4: Image.FLIP_TOP_BOTTOM,
    5: Image.TRANSPOSE,
    6: Image.ROTATE_270,
    7: Image.TRANSVERSE,
    8: Image.ROTATE_90,
}
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # of text in a PNG
warnings.filterwarnings("ignore", module="PIL")  # on oddities of files that it can read


def load_image(path, upright=True):
    """An image file as a PIL image, RGB; of an animation, the first frame.

    upright: turn it as its EXIF orientation says. That is right for a user's own photographs; the
    boxes of published data sets count in pixels as stored, so their images are read without it.
    Raises HiVGError for a file that is missing, empty, damaged, not an image, or too large.
    """
    return to_rgb(open_image(path, upright), path)


def reading(path):
    """The context in which an image file is read: its errors become HiVGErrors."""
    return user_error(f"{path} cannot be read as an image", "replace it")


def open_image(path, upright):
    """A PIL image, which is not decoded yet if nothing has to be turned upright."""
    with reading(path):
        image = Image.open(path, formats=FORMATS)
        image.info["16 bits"] = ";16" in str(image.tile)  # of RGB, PIL keeps the upper 8
        if not upright:
            return image
        # ImageOps.exif_transpose would write the EXIF back, which fails at malformed tags that are
        # read well
        try:
            orientation = image.getexif().get(0x0112)
        except Exception:  # EXIF that is garbage turns nothing
            return image
        return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def to_rgb(image, path="the image"):
    """A PIL image of any mode as RGB: alpha is laid over white; numbers of 16 or 32 bits and floats
    are stretched, so that 0.1 % of them end up at 0 and at 255."""
    with reading(path):
        is_deep = image.info.get("16 bits")
        if image.mode[0] in "IF":  # I;16, I or F: convert("RGB") would clip them
            values = np.nan_to_num(np.array(image, float), posinf=0, neginf=0)
            values = np.interp(values, np.quantile(values, (0.001, 0.999)), (0, 255))
            image = Image.fromarray(values.astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if is_deep:  # values of 12 bits or fewer would be dark
            top = max(1, np.max(image.getextrema()))
            image = image.point(lambda value: 255 * value / top)
        return image


def reduce_while_decoding(image, geometry):
    """For speed: a JPEG that is not decoded yet will be decoded at a half, a quarter or an eighth of
    its size, if the crop needs no more. Returns the Geometry in the reduced image."""
    x1, _, x2, _ = geometry.crop
    scale = geometry.inner[2] / (x2 - x1)
    width, height = image.size
    draft = image.draft(None, (math.ceil(width * scale), math.ceil(height * scale)))
    reduction = draft[1][2] / width if draft else 1  # draft: (mode, box of the reduced image)
    return geometry._replace(crop=tuple(value * reduction for value in geometry.crop))


# ------------------------------------------------------------------------------- the shapes data set

# A small world in the format of one's own data: scenes of drawn shapes with expressions that mean one
# of them, so that the whole method can be trained with nothing downloaded. For example
#
#     scene        a big red circle on the left, a small blue square and a big red square right of it
#     expressions  "the red circle"  "right most red thing"  "large one left of the small box"
#     caption      "a big red circle on the left and a blue square"    (to train CLIP on)
#
# Every expression is proven to be true of exactly one shape; places and relations by a clear margin,
# see `holds`.

SIDE = 80  # pixels of an image; it is drawn at twice that and reduced
MIN_DEGREE, MIN_LEAD = 0.12, 0.10  # margins of an expression, in shares of the side: see `holds`
SORTS = {  # of a scene's expressions. Of scenes that look alike those of the first split are kept
    "val": 2 * ("relation", "place", "attributes"),
    "testA": 3 * ("attributes", "place"),
    "testB": 6 * ("relation",),
    "test": 2 * ("relation", "place", "attributes"),  # as val, large enough to tell runs apart
    "train": ("relation", "place", "attributes"),
}
SCENES = {"val": 240, "testA": 120, "testB": 150, "test": 730}
TRAIN_SCENES = {"shapes": 26_000, "shapes-long": 100_000}
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
SYNONYMS = {  # the common word is listed twice, so that it is drawn more often
    None: "one|thing|shape|object", "small": "small|small|little|tiny", "big": "big|big|large",
    "circle": "circle|circle|disc|round thing",
    "square": "square|square|box", "diamond": "diamond|diamond|rhombus",
    "cross": "cross|cross|plus sign",
}
# fmt: on


def one_sided(along, across):
    """How far something lies to one side, less 0.6 of its offset across. At least 0.01 if it lies on
    that side: too little to be called true, too much to be called false (see `holds`)."""
    return along if along <= 0 else max(0.01, along - 0.6 * abs(across))


# Places and relations: templates; how true they are of a shape at x, y; whether they are superlatives,
# true of the one with the highest degree. x points right and y down, in shares of the side; of a
# place they count from the middle of the image, of a relation from the other shape.
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
    ("{} left of {}|{} to the left of {}", lambda x, y: one_sided(-x, y), False),
    ("{} right of {}|{} to the right of {}", lambda x, y: one_sided(x, y), False),
    ("{} above {}|{} over {}", lambda x, y: one_sided(-y, x), False),
    ("{} below {}|{} under {}|{} beneath {}", lambda x, y: one_sided(y, x), False),
    ("{} closest to {}|{} nearest to {}|{} next to {}", lambda x, y: -math.hypot(x, y), True),
    ("{} farthest from {}|{} furthest away from {}", math.hypot, True),
)


class Shape(NamedTuple):
    """One shape of a scene. A description is a list of the first three, None for what is unsaid."""

    size: str
    colour: str
    kind: str
    box: tuple  # x1, y1, x2, y2 in half pixels, whole numbers: the same on every machine
    x: float  # of the box's centre, from the middle of the image, in shares of the side
    y: float


def overlap(a, b):
    """The area that two boxes share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


def random_shapes(rng, count):
    """`count` shapes, in drawing order, of few kinds and colours. The others cover a twelfth of a box
    at most, which is less than a quarter of any shape."""
    kinds = rng.sample(list(KINDS), 2)
    colours = rng.sample(list(COLOURS), rng.choice((2, 3)))
    while True:
        shapes = []
        for _ in range(15 * count):  # then the scene does not work out: begin again
            size = rng.choice(("small", "big", "big"))
            side = 2 * SIDE * rng.uniform(*SIZES[size])
            width, height = (round(side * rng.uniform(0.92, 1.08)) for _ in "xy")
            x, y = (rng.randint(2, 2 * SIDE - 2 - length) for length in (width, height))
            # the new one first, which mostly decides
            boxes = [(x, y, x + width, y + height), *(shape.box for shape in shapes)]
            # with its own, the overlaps of a box
            if all(12 * sum(overlap(a, b) for b in boxes) <= 13 * overlap(a, a) for a in boxes):
                xy = (2 * x + width) / 4 / SIDE - 0.5, (2 * y + height) / 4 / SIDE - 0.5
                shapes.append(Shape(size, rng.choice(colours), rng.choice(kinds), boxes[0], *xy))
            if len(shapes) == count:
                return shapes


def random_description(rng, shape):
    """What to say of a shape: [size, colour, kind], None for what is left out."""
    shares = (0.4, 0.6, 0.75)  # how often each is said
    return [word if rng.random() < share else None for word, share in zip(shape[:3], shares)]


def matching(shapes, said):
    """The shapes of which a description is true."""
    return [s for s in shapes if all(a in (None, b) for a, b in zip(said, s[:3]))]


def random_phrase(rng, said):
    """A description in words: "little red disc", "red one"."""
    words = [*filter(None, said[:2]), said[2]]
    return " ".join(rng.choice(SYNONYMS.get(word, word).split("|")) for word in words)


def holds(degree, superlative, target, others):
    """Whether something is true of the target alone, with a clear margin.

    degree: function of a Shape. A superlative needs a lead of MIN_LEAD over the next shape; other
    words a degree of MIN_DEGREE, with 0 at most for all others.
    """
    degrees = [degree(other) for other in others]
    if superlative:
        return bool(others) and degree(target) - max(degrees) >= MIN_LEAD
    return degree(target) >= MIN_DEGREE and all(value <= 0 for value in degrees)


def try_expression(rng, shapes, sort):
    """One try at an expression: (text, the shape that it means), or None if it is not proven to mean
    that one alone. As people do, it may say more than is needed."""
    target = rng.choice(shapes)
    said = random_description(rng, target)
    rivals = [shape for shape in matching(shapes, said) if shape is not target]
    phrases = [random_phrase(rng, said)]
    if sort == "attributes":
        templates, proven = "{}", any(said) and not rivals
    elif sort == "place":
        templates, degree, superlative = rng.choice(PLACES)
        proven = holds(lambda s: degree(s.x, s.y), superlative, target, rivals)
    else:
        templates, degree, superlative = rng.choice(RELATIONS)
        other = rng.choice(shapes)
        said_of_other = random_description(rng, other)
        phrases.append("the " + random_phrase(rng, said_of_other))
        rivals = [shape for shape in rivals if shape is not other]
        # it must be clear by itself which other shape is meant
        is_clear = other is not target and matching(shapes, said_of_other) == [other]
        proven = is_clear and holds(
            lambda s: degree(s.x - other.x, s.y - other.y), superlative, target, rivals
        )
    if not proven:
        return None
    article = rng.choice(("", "", "the "))
    return article + rng.choice(templates.split("|")).format(*phrases), target


def random_caption(rng, shapes):
    """What is in a scene: two or three of the shapes, or all, mostly with their places."""
    parts = []
    for shape in rng.sample(shapes, min(rng.choice((2, 3, 5)), len(shapes))):
        phrase = random_phrase(rng, (rng.choice((shape.size, None)), shape.colour, shape.kind))
        # of the places without superlatives those that are true of it: "{} on the left"
        true = [t for t, degree, _ in PLACES[4:] if degree(shape.x, shape.y) >= MIN_DEGREE]
        places = [t for templates in true for t in templates.split("|") if t.startswith("{}")]
        template = rng.choice(places) if places and rng.random() < 0.75 else "{}"
        article = "an " if phrase[0] in "aeiou" else "a "
        parts.append(template.format(article + phrase))
    return rng.choice((" and ", ", ")).join(parts)


def render(rng, shapes):
    """The scene as a PIL image: shapes with thin dark outlines on a light background, and noise."""
    light = tuple(rng.randint(195, 230) for _ in "rgb")
    image = Image.new("RGB", (2 * SIDE, 2 * SIDE), light)
    draw = ImageDraw.Draw(image)
    for shape in shapes:
        start, end = np.reshape(shape.box, (2, 2))
        points = start + np.array(KINDS[shape.kind]) * ((end - start - 1) / 100)
        fill = tuple(round(max(0, c - rng.uniform(0, 28))) for c in COLOURS[shape.colour])
        outline = tuple(value // 3 for value in fill)
        draw.polygon(points.ravel().tolist(), fill, outline, width=2)
    noise = np.frombuffer(rng.randbytes(3 * SIDE**2), np.uint8).reshape(SIDE, SIDE, 3) / 16 - 8
    return Image.fromarray((np.asarray(image.reduce(2)) + noise).clip(0, 255).astype(np.uint8))


def make_scene(folder, split, number):
    """Write the image of a scene into folder/images. Returns its name, a coarse look of the scene,
    the lines of its expressions, as in a file of one's own data, and captions."""
    rng = random.Random(f"{split} {number}")
    counts = (1, 2, 3, 3, 4, 4, 5, 5) if split == "train" else (3, 4, 5)
    shapes = random_shapes(rng, rng.choice(counts))
    image, lines = f"images/{split}_{number:06d}.jpg", {}
    for sort in SORTS[split]:
        for _ in range(100):
            expression = try_expression(rng, shapes, sort)
            if expression and expression[0] not in lines:
                text, shape = expression
                box = [value / 2 for value in shape.box]  # half pixels -> pixels
                lines[text] = {"image": image, "text": text, "box": box}
                break
    captions = [random_caption(rng, shapes) for _ in range(4)]
    render(rng, shapes).save(folder / image, quality=90)
    look = frozenset((*s[:3], round(8 * s.x), round(8 * s.y)) for s in shapes)
    return image, look, list(lines.values()), captions


def make_shapes(data_root, name="shapes"):
    """Generate a shapes data set, a folder below the data root, if it is not there.

    In it are SPLIT.jsonl and images/, as one's own data; captions.json, {image: captions} of the
    train scenes; and bpe_vocab.txt.gz, a vocabulary in the format of CLIP's. The folder is complete
    or not there: it is made under another name and renamed at the end.
    """
    folder = Path(data_root, name)
    if folder.exists():
        return
    with user_error(f"{folder} cannot be written", "name another --data-root", (OSError,)):
        os.makedirs(folder.parent, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".generating", dir=data_root) as unfinished:
            generate_shapes(Path(unfinished, name), SCENES | {"train": TRAIN_SCENES[name]})
            if not folder.exists():  # else another process was faster
                Path(unfinished, name).replace(folder)


def generate_shapes(folder, scenes):
    """Write a shapes data set into a folder. scenes: {split: how many}."""
    (folder / "images").mkdir(parents=True)
    split_of, captions, texts = {}, {}, []  # split_of: look of a scene -> its split
    with worker_pool() as pool:
        for split, count in scenes.items():
            lines, make = [], functools.partial(make_scene, folder, split)
            for image, look, scene_lines, scene_captions in progress(
                pool.imap(make, range(count), chunksize=50), f"generating shapes, {split}", count
            ):
                if split_of.setdefault(look, split) != split:
                    (folder / image).unlink()  # much the same scene is in another split
                    continue
                lines += scene_lines
                if split == "train":
                    captions[image] = scene_captions
            texts += [line["text"] for line in lines]
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    texts += itertools.chain(*captions.values())
    words = sorted(set(" ".join(texts).replace(",", "").split()))
    merges = "\n".join(["# shapes", *train_bpe(words)])
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "bpe_vocab.txt.gz").write_bytes(gzip.compress(merges.encode(), mtime=0))


def train_bpe(words):
    """Byte-pair encoding (Sennrich et al. 2016): the commonest pair of neighbouring symbols becomes
    one symbol, again and again, until every word is one. Returns the lines of a merges file."""
    merges = []
    words = [[*word[:-1], word[-1] + "</w>"] for word in words]  # ["r", "e", "d</w>"]
    while pairs := Counter(pair for word in words for pair in zip(word, word[1:])):
        best = max(sorted(pairs), key=pairs.get)
        merges.append(" ".join(best))
        words = [merge_pair(word, best) for word in words]
    return merges


# ------------------------------------------------------ device, processes, progress and command line


def setup_device(name=None):
    """The device of this process: the one asked for, or the best there is (cuda, mps, cpu).

    The processes that torchrun started are joined; each has a GPU of its own, if there are any, and
    all but the first print nothing. Raises HiVGError if there is no such device, or if the processes
    do not find one another.
    """
    if name is None:
        has_one = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if has_one else "cpu"
    distributed = "LOCAL_RANK" in os.environ
    started = [os.environ[name] for name in PROCESS_COUNTS if os.environ.get(name, "") > "1"]
    if distributed:
        if ":" in name:
            raise HiVGError(f"torchrun gives each process a GPU of its own: no --device {name}.")
        if name == "cuda":
            name = f"cuda:{os.environ['LOCAL_RANK']}"
    # what is typed into an interactive shell runs once
    elif started and os.environ.get("SLURM_JOB_NAME") not in ("bash", "sh", "interactive"):
        raise HiVGError(
            f"{started[0]} processes were started that do not know of one another: start one "
            "torchrun on each machine, and let it start them."
        )
    with user_error(f"There is no device {name} here", "name another, or start fewer processes"):
        device = torch.empty(0, device=name).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Products of float32 matrices use TF32, 10 bits of mantissa: L_CLC's logits, up to 100, come
        # out up to 0.05 off.
        torch.set_float32_matmul_precision("high")
    if distributed:
        with user_error(
            "The processes cannot reach one another",
            "see MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME; on one machine: --standalone",
        ):
            socket.getaddrinfo(os.environ["MASTER_ADDR"], None)  # torch would try for hours
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            # the first process may prepare data for a while, and the others wait for it
            dist.init_process_group(backend, timeout=timedelta(hours=2))
        if process_rank() > 0:
            sys.stdout = open(os.devnull, "w")
    return device


PROCESS_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE")


def process_rank():
    """Number of this process, 0 if it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def add_up(tensor):
    """Add to a tensor, in place, those of the other processes."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def barrier():
    """Wait here for the other processes, on the CPU: a GPU's library would not wait for hours."""
    add_up(torch.zeros(1))


def default_workers():
    """Reading processes for this process: the CPUs that it may use, shared by the processes that
    torchrun started on this machine; 8 at most."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def worker_pool():
    """As many processes as there are CPUs; they leave Ctrl-C to their parent."""
    return multiprocessing.Pool(None, signal.signal, (signal.SIGINT, signal.SIG_IGN))


def progress(*args, **options):
    """A tqdm bar; where stderr is no terminal, a line a minute at most. Of several processes the
    first alone has one."""
    seconds = 0.1 if sys.stderr.isatty() else 60
    return tqdm(*args, mininterval=seconds, delay=seconds, disable=process_rank() > 0, **options)


def adder(parser):
    """add(name, help, **options), which adds an argument to a parser."""

    def add(name, text=None, **options):
        parser.add_argument(name, help=text, **options)

    return add


def number_from(low, kind=int):
    """argparse's type of a number that is at least `low`."""

    def number(text):
        value = kind(text)
        if not low <= value < 2**63:
            raise argparse.ArgumentTypeError(f"{text} must be >= {low}")
        return value

    return number


# ------------------------------------------------------------------------------- check and download

UNC = "https://web.archive.org/web/{}/https://bvisionweb1.cs.unc.edu/licheng/referit/data/{}.zip"
TRAIN2014 = "http://images.cocodataset.org/zips/train2014.zip"


def check_dataset(name, data_root):
    """Print what is there of a data set, and what is wrong with it; every image is opened once.

    Raises HiVGError if expressions or images are missing, images are unreadable, or one's own boxes
    look as if they were in another unit.
    """
    annotations, info = read_annotations(name, data_root), DATASETS[name]
    samples = [sample for content in annotations.values() for sample in content.samples]
    first = {sample.image: sample for sample in samples}
    with worker_pool() as pool:
        found = pool.imap(size_or_reason, first.values(), chunksize=8)
        sizes = dict(zip(first, progress(found, "opening images", len(first))))
    problems = [size for size in sizes.values() if isinstance(size, str)]
    sized = [(s.box, sizes[s.image]) for s in samples if isinstance(sizes[s.image], tuple)]
    if "own" in info.files and len(sized) >= 10:
        problems += wrong_units(*map(np.array, zip(*sized)))
    seen = {}  # (image, text): where it was seen first
    at_least_one = dict.fromkeys(annotations or ["train"], 1)
    published = dict(zip(info.splits, info.published)) or at_least_one
    for split, expected in published.items():
        samples, notes, _ = annotations.get(split, Split((), Counter(), ()))
        for sample in samples:
            first_split, box = seen.setdefault((sample.image, sample.text), (split, sample.box))
            notes["expressions with another box elsewhere"] += box != sample.box
            notes["expressions of another split, too"] += split != first_split
            notes["expressions of more words than CLIP reads"] += len(split_words(sample.text)) > 75
        print(split, *(f"{count:,} {note}" for note, count in notes.items() if count), sep="; ")
        if notes["expressions"] < expected:
            problems.append(f"{split} has {notes['expressions']:,} expressions of {expected:,}")
    print(*problems or ["nothing is wrong"], sep="\n")
    if problems:
        raise HiVGError(f"{name} has {len(problems)} problems, {problems[0]}: {info.help}.")


def size_or_reason(sample):
    """(width, height) of a sample's image, which is decoded to its end; a sentence if it cannot be
    used."""
    try:
        return to_rgb(open_sample(sample), sample.image).size
    except HiVGError as error:
        return str(error)


def wrong_units(boxes, sizes):
    """Sentences on one's own boxes [n, 4] that cannot be pixels of their images, whose sizes are
    [n, 2]."""
    limits = 1.02 * sizes + 2  # a little outside is a matter of rounding
    outside, top = (boxes[:, 2:] > limits).any(axis=1).sum(), boxes.max()
    for unit, name in ((100, "percent"), (1000, "thousandths")):
        larger = np.median(sizes, axis=0).max() > 1.2 * unit  # boxes end where images do not
        if top <= unit and (larger or outside and top > 0.8 * unit):
            return [f"the boxes look like {name} of the image, not pixels"]
    if (boxes[:, :2] + boxes[:, 2:] <= limits).all():  # else all centres lie in one quarter
        return ["the boxes look like x, y, width, height, not x1, y1, x2, y2"]
    beyond = (boxes[:, :2] >= sizes).any(axis=1).sum()
    if beyond > max(2, len(boxes) / 10) or outside > max(2, len(boxes) / 4):
        return [
            f"{outside} of {len(boxes)} boxes stick out of their images: are they x1, y1, x2, y2?"
        ]
    return []


def download_dataset(name, data_root):
    """Fetch what is missing of a data set. Raises HiVGError, which says where to ask, for one that
    has no public address."""
    info = DATASETS[name]
    if not info.web_archive:
        raise HiVGError(f"{name} cannot be downloaded: {info.help}.")
    try:
        annotations = read_annotations(name, data_root)
    except HiVGError:
        folder = os.path.dirname(info.files["refer"])
        download_and_unpack(UNC.format(info.web_archive, folder), Path(data_root, folder))
        annotations = read_annotations(name, data_root)
    if any(content.missing for content in annotations.values()):
        download_and_unpack(TRAIN2014, Path(data_root, COCO[0]))
    print(f"{name} is in {data_root}: python data.py check looks at every image")


def download_and_unpack(url, folder):
    """Download a zip archive and move its files into a folder, flattened. A file is whole when it
    gets there."""
    os.makedirs(folder.parent, exist_ok=True)
    archive = folder.with_name(url.rsplit("/", 1)[1])
    if not archive.exists():  # it is there if an earlier run was stopped while it unpacked
        download(url, archive)
    hint = f"free some room, or delete {archive}, and run it again"
    print(f"unpacking {archive}", flush=True)
    with (
        user_error(f"{archive} cannot be unpacked", hint),
        tempfile.TemporaryDirectory(prefix=".unpacking", dir=folder.parent) as unpacked,
    ):
        shutil.unpack_archive(archive, unpacked)
        folder.mkdir(exist_ok=True)
        # in this order refs(...).p, by which a data set is found, comes after instances.json
        for file in sorted(Path(unpacked).rglob("*"), key=lambda file: file.name):
            if file.is_file():
                file.replace(folder / file.name)
        archive.unlink()


def download(url, path):
    """Fetch `url` to `path`, with a progress bar. What broke off is kept as path.part, and the next
    call goes on from there. Raises HiVGError if the file cannot be had whole."""
    part = Path(f"{path}.part")
    hint = f"run it again to go on (without {part}: to begin anew), or put the file there by hand"
    with user_error(f"{url} cannot be fetched", hint):
        size = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={size}-"} if size else {})
        with urllib.request.urlopen(request, timeout=30) as reply:
            if reply.status != 206:  # not a part, but the whole file
                size = 0
            length = reply.headers["Content-Length"]
            total = size + int(length) if length else None
            bar = progress(desc=path.name, total=total, initial=size, unit="B", unit_scale=True)
            with open(part, "ab" if size else "wb") as file, bar:
                while chunk := reply.read(2**16):
                    bar.update(file.write(chunk))
        if total and part.stat().st_size != total:
            raise OSError(f"it broke off after {part.stat().st_size:,} of {total:,} bytes")
        part.replace(path)


def main():
    commands = {"check": check_dataset, "download": download_dataset}
    parser = argparse.ArgumentParser(description="Check a data set, or fetch it.")
    add = adder(parser)
    add("command", choices=commands)
    add("--dataset", "its name", required=True, choices=DATASETS)
    add("--data-root", "folder (default: data)", type=os.path.expanduser, default="data")
    args = parser.parse_args()
    run_main(commands[args.command], args.dataset, args.data_root)


if __name__ == "__main__":
    main()
