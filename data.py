"""Data: images, expressions and boxes on their way into the model; and the shapes data set.

    python data.py download --dataset refcoco --data-root data  # fetch what has a public address
    python data.py check --dataset refcoco --data-root data     # is all of it there and readable?

An image is scaled and padded to the square that the model sees; boxes go with it, there and back:

    image, box x1 y1 x2 y2 in pixels  --letterbox, box_to_square-->  square, box cx cy w h in 0..1
    box x1 y1 x2 y2 in pixels         <--------box_to_pixels-------  box of the model

Reading order: that geometry, augmentation, GroundingDataset and its batches, annotation files,
robust reading of images, the shapes data set (which is generated), check and download. This file
knows no model: of clip_model.py it takes errors, download, PlainUnpickler and merge_pair.

Boxes are x1, y1, x2, y2 in pixels of the image as stored, except where a docstring says cx, cy, w,
h: those are 0..1 of the padded square.
"""

import functools
import math
import random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch.utils.data import DataLoader, Dataset, default_collate

# isort: split
# imports of the sections on annotation files, reading of images, shapes, check and download
import argparse
import gc
import gzip
import io
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from PIL import ExifTags, ImageDraw, PngImagePlugin
from tqdm import tqdm

import clip_model
from clip_model import READING_ERRORS, HiVGError, PlainUnpickler, is_empty, merge_pair, user_error

# ----------------------------------------------------------------------- the image and its square


class Geometry(NamedTuple):
    """Where an image lies in the model's square: `region` of it is drawn into `inner`."""

    region: tuple  # x1, y1, x2, y2 in the image's pixels; for evaluation all of it
    inner: tuple  # left, top, width, height in the square, whole pixels; the rest is padding
    side: int  # S, of the square, in pixels


def letterbox(region, side, long_side=None, shares=(0.5, 0.5)):
    """The Geometry that scales a region to a long side of `long_side` pixels (None: `side`) and
    places it in the square.

    The aspect is kept up to whole pixels; the short side has at least one. shares: how much of the
    padding goes to the left and to the top, one half each for evaluation.
    """
    width, height = region[2] - region[0], region[3] - region[1]
    scale = (long_side or side) / max(width, height)
    inner_width, inner_height = max(1, round(width * scale)), max(1, round(height * scale))
    left = round((side - inner_width) * shares[0])
    top = round((side - inner_height) * shares[1])
    return Geometry(region, (left, top, inner_width, inner_height), side)


def box_to_square(box, geometry):
    """A box x1, y1, x2, y2 in the image's pixels -> tensor [4], cx, cy, w, h, 0..1, of the square.
    The part outside the region is cut off."""
    x1, y1, x2, y2 = geometry.region
    left, top, width, height = geometry.inner
    scale_x, scale_y = width / (x2 - x1), height / (y2 - y1)  # they differ: sizes are rounded
    low_x, high_x = [left + (min(max(x, x1), x2) - x1) * scale_x for x in (box[0], box[2])]
    low_y, high_y = [top + (min(max(y, y1), y2) - y1) * scale_y for y in (box[1], box[3])]
    centre_and_size = (low_x + high_x) / 2, (low_y + high_y) / 2, high_x - low_x, high_y - low_y
    return torch.tensor(centre_and_size) / geometry.side


def box_to_pixels(boxes, geometry):
    """Tensor [..., 4] of cx, cy, w, h, 0..1, of the square -> [..., 4] of x1, y1, x2, y2 in the
    image's own pixels, clipped to the image. The inverse of `box_to_square`."""
    x1, y1, x2, y2 = geometry.region
    left, top, width, height = geometry.inner
    region = boxes.new_tensor((x1, y1))
    scale = boxes.new_tensor(((x2 - x1) / width, (y2 - y1) / height))
    centre, size = (boxes * geometry.side).split(2, dim=-1)
    corners = torch.stack([centre - size / 2, centre + size / 2], dim=-2)  # [..., corner, x or y]
    corners = (corners - boxes.new_tensor((left, top))) * scale + region
    return corners.clamp(region, boxes.new_tensor((x2, y2))).flatten(-2)


def crop_and_resize(image, geometry):
    """The region of a PIL image at the size of `inner`, a PIL image."""
    return image.resize(geometry.inner[2:], Image.BILINEAR, box=geometry.region)


def pad_to_square(image, geometry):
    """A PIL image, RGB, of the size of `inner` -> uint8 [3, S, S], 0 in the padding."""
    left, top, width, height = geometry.inner
    square = np.zeros((geometry.side, geometry.side, 3), np.uint8)
    square[top : top + height, left : left + width] = image
    return torch.from_numpy(square).permute(2, 0, 1).contiguous()


def preprocess(image, image_size):
    """A PIL image as evaluation sees it: uint8 [3, S, S], 0 in the padding; and its Geometry."""
    geometry = letterbox((0, 0, *image.size), image_size)
    return pad_to_square(crop_and_resize(to_rgb(image), geometry), geometry), geometry


def normalise(images, inner, mean, std):
    """The last step before the model, on its device: images uint8 [B, 3, S, S], inner [B, 4] as in
    Geometry -> float32 [B, 3, S, S], (x / 255 - mean) / std and 0 in the padding; padding bool
    [B, S, S], True where a pixel is padding."""
    left, top, width, height = inner[:, :, None].unbind(dim=1)  # [B, 1] each
    pixels = torch.arange(images.shape[-1], device=images.device)
    columns = (left <= pixels) & (pixels < left + width)  # [B, S]
    rows = (top <= pixels) & (pixels < top + height)
    padding = ~(rows[:, :, None] & columns[:, None, :])  # [B, S, S]
    mean, std = channels(tuple(mean), images.device), channels(tuple(std), images.device)
    return ((images / 255 - mean) / std).masked_fill(padding[:, None], 0.0), padding


@functools.cache  # to copy the numbers to a GPU again for every batch would make the CPU wait
def channels(values, device):
    """Three numbers -> tensor [3, 1, 1] on the device."""
    return torch.tensor(values, device=device).view(3, 1, 1)


# ------------------------------------------------------------------------------------- augmentation

PLACE_WORDS = ("left", "right", "top", "bottom", "middle")  # also inside leftmost (and laptop)


def random_geometry(rng, size, box, text, side):
    """A random crop, scale and position for training.

    rng: a random.Random; size: width, height; side: S. The crop has the sizes of the authors' (D16):
    the short side is scaled to 400, 500 or 600, and 384 to 600 pixels a side are cut out. Here it
    is computed in the image's own pixels, so that the image is resized only once. It contains the
    centre of the box. A text with one of PLACE_WORDS gets no crop, which could make it wrong.
    """
    region = (0, 0, *size)
    if rng.random() < 0.5 and not any(word in text.lower() for word in PLACE_WORDS):
        scale = rng.choice((400, 500, 600)) / min(size)
        x1, x2 = random_interval(rng, size[0], box[0], box[2], scale)
        y1, y2 = random_interval(rng, size[1], box[1], box[3], scale)
        region = (x1, y1, x2, y2)
    step = side / 7  # 32 pixels for S = 224: the long side is one of 224, 192, ..., 64, 56
    long_side = max(side - step * rng.randrange(7), side / 4)
    return letterbox(region, side, long_side, (rng.random(), rng.random()))


def random_interval(rng, length, low, high, scale):
    """One axis of a crop of 384 to 600 scaled pixels: its start and end in 0..length. It contains
    the middle of low..high."""
    crop = rng.randint(384, min(600, round(length * scale))) / scale
    centre = min((low + high) / 2, length)  # the annotated box may lie outside the image
    first = max(0, centre - crop)
    last = max(first, min(length - crop, centre))
    start = rng.uniform(first, last)
    return start, float(min(length, start + crop))


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
    size: tuple | None  # width, height as annotated, if they are
    upright: bool = False  # pixels count in the image as its EXIF turns it, not as it is stored


class GroundingDataset(Dataset):
    """The expressions of one split. Item [i] is a dict:

    image   uint8 [3, S, S], 0 in the padding: `normalise` makes the model's input from it
    inner   int64 [4]: left, top, width, height of the image in the square
    tokens  int64 [77], only if there is a tokenizer
    text    str
    box     float32 [4]: cx, cy, w, h, 0..1, of the padded square
    object  int: a number, the same for all expressions of one object (image and box)

    name: a data set, or a list of several, whose samples follow one another. Of several, training
    expressions are left out if their image is in a val or test split of another of them.
    augment: training's random crop, scale, colours and position. They follow from `set_epoch` and
    the index alone. cache: keep the resized images in memory (small data sets, without augment).
    annotations: {name: what read_annotations gives}, so that the files are read only once.
    `report` says what was left out. Raises HiVGError for missing or damaged files.
    """

    def __init__(
        self,
        name,
        split,
        data_root,
        image_size=224,
        tokenizer=None,
        augment=False,
        cache=False,
        annotations=None,
    ):
        names = [name] if isinstance(name, str) else name
        if annotations is None:
            # training on several data sets needs to know the images of their other splits
            splits = None if split == "train" and len(names) > 1 else (split,)
            annotations = {n: read_annotations(n, data_root, splits) for n in names}
        self.samples, self.report = select_samples(names, split, data_root, annotations)
        self.split, self.image_size, self.tokenizer = split, image_size, tokenizer
        self.augment, self.cache = augment, {} if cache else None
        self.epoch = ()

    def __len__(self):
        return len(self.samples)

    def set_epoch(self, *numbers):
        """The seed of the next epoch's augmentation: any numbers."""
        self.epoch = numbers

    def __getitem__(self, index):
        sample = self.samples[index]
        image, geometry = self.read_image(sample, index)
        item = {
            "image": image,
            "inner": torch.tensor(geometry.inner),
            "text": sample.text,
            "box": box_to_square(sample.box, geometry),
            "object": zlib.crc32(repr((sample.image, sample.box)).encode()),
        }
        if self.tokenizer is not None:
            item["tokens"] = self.tokenizer(sample.text)[0]
        return item

    def read_image(self, sample, index):
        """The sample's image as uint8 [3, S, S], and its Geometry."""
        if self.cache is not None and sample.image in self.cache:
            return self.cache[sample.image]
        with open_image(sample.image) as image:
            if sample.upright:
                with reading(sample.image):
                    image = turn_upright(image)
            if sample.size not in (None, image.size):
                raise HiVGError(f"{size_mismatch(sample, image.size)}: replace it.")
            if self.augment:
                rng = random.Random(f"{self.epoch} {index}")
                box, text = sample.box, sample.text
                geometry = random_geometry(rng, image.size, box, text, self.image_size)
                image = decode_region(sample.image, image, geometry)
                if rng.random() < 0.8:
                    image = jitter(rng, image)
                return pad_to_square(image, geometry), geometry
            with reading(sample.image):
                square, geometry = preprocess(image, self.image_size)
        if self.cache is not None:
            self.cache[sample.image] = square, geometry
        return square, geometry

    def __getitems__(self, indices):
        """The items of a batch, or the HiVGError that one of them raised. DataLoader calls this:
        an error that is raised in a worker would arrive with the worker's traceback as its text."""
        try:
            return [self[index] for index in indices]
        except HiVGError as error:
            return error


def image_size(sample):
    """(width, height) of a sample's image, in the orientation in which its box counts."""
    if sample.size is not None:
        return sample.size
    with open_image(sample.image) as image, reading(sample.image):
        return turn_upright(image).size if sample.upright else image.size


def size_mismatch(sample, size):
    """The words for an image of another size than its annotations are for."""
    what = "{} has {} x {} pixels, but its annotations are for {} x {}"
    return what.format(sample.image, *size, *sample.size)


def collate(items):
    """Items -> batch: the same dict with tensors [B, ...]; texts are a list."""
    if isinstance(items, HiVGError):
        return items
    batch = default_collate(items)
    if "tokens" in batch:
        batch["tokens"] = trim_to_longest(batch["tokens"])
    return batch


def trim_to_longest(tokens):
    """Tokens [B, 77] -> [B, T]: T is the length of the longest text. The end token is a row's
    largest id."""
    longest = int(tokens.argmax(dim=1).max()) + 1
    return tokens[:, :longest]


def read_batches(dataset, batches, workers=0, pin_memory=False):
    """Yield the batches of a dataset. batches: a list of lists of indices; workers: processes that
    read ahead. Raises HiVGError for an image that cannot be read."""
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
    )
    for batch in loader:
        if isinstance(batch, HiVGError):
            raise batch
        yield batch


def epoch_batches(numbers, samples, batch_size, multiple=1):
    """The batches of an epoch: LongTensor [batches, batch_size] of indices, shuffled by a seed that
    follows from `numbers`. There are a multiple of `multiple` batches; the samples left over are
    not used in this epoch."""
    generator = torch.Generator().manual_seed(mix_seed(*numbers))
    order = torch.randperm(samples, generator=generator)
    count = samples // (batch_size * multiple) * multiple
    return order[: count * batch_size].view(count, batch_size)


def mix_seed(*numbers):
    """A seed that follows from whole numbers below 2^32. Other numbers give another seed, but zeros
    at their end do not count."""
    return int(np.random.default_rng(numbers).integers(2**62))


def default_workers(names):
    """Reading processes for this process: the CPUs that it may use, shared by the processes that
    torchrun started on this machine; 8 at most. None for shapes, whose images stay in memory."""
    if are_shapes(names):
        return 0
    cpus = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        cpus = len(os.sched_getaffinity(0))
    return min(8, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class PackedSamples:
    """A list of Samples, pickled into one array. Workers share its memory; a list of Python objects
    would be copied into each of them, since reading an object writes its reference count.
    """

    def __init__(self, samples=()):
        pickled = [pickle.dumps(tuple(sample), protocol=4) for sample in samples]
        self.ends = np.cumsum([len(content) for content in pickled], dtype=np.int64)
        self.content = np.frombuffer(b"".join(pickled), dtype=np.uint8)

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, index):
        index = range(len(self.ends))[index]  # negative ones count from the end
        start = self.ends[index - 1] if index else 0
        return Sample(*pickle.loads(self.content[start : self.ends[index]]))


# ----------------------------------------------------------------------------------- annotation files

COCO_HELP = (
    "python data.py download --dataset NAME fetches what is missing (from web.archive.org and "
    "images.cocodataset.org); delete a damaged file first"
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
    "pixels of the upright image, and the images there"
)
SHAPES_HELP = "python train.py --dataset {} generates it; delete a damaged folder first"


class DatasetInfo(NamedTuple):
    """Where the files of a data set are and what is in them."""

    splits: tuple
    published: tuple  # numbers of expressions, in the order of the splits; () where there are none
    images: str  # a key of IMAGE_PLACES
    help: str  # where to get it
    files: dict  # {family: path below the data root, where {} is the split}; the first counts
    web_archive: int = 0  # time stamp of the web archive's copy of refer's files


SHAPES_SETS = ("shapes", "shapes-long")  # generated; they differ in train alone
REFCOCO_SPLITS = ("train", "val", "testA", "testB")
# fmt: off
DATASETS = {
    "refcoco": DatasetInfo(
        REFCOCO_SPLITS, (120_624, 10_834, 5_657, 5_095), "coco", COCO_HELP,
        {"refer": "refcoco/refs(unc).p", "index": "unc/unc_{}.pth",
         "mdetr": "finetune_refcoco_{}.json"}, web_archive=20220413011718),
    "refcoco+": DatasetInfo(
        REFCOCO_SPLITS, (120_191, 10_758, 5_726, 4_889), "coco", COCO_HELP,
        {"refer": "refcoco+/refs(unc).p", "index": "unc+/unc+_{}.pth",
         "mdetr": "finetune_refcoco+_{}.json"}, web_archive=20220413011656),
    "refcocog": DatasetInfo(
        ("train", "val", "test"), (80_512, 4_896, 9_602), "coco", COCO_HELP,
        {"refer": "refcocog/refs(umd).p", "index": "gref_umd/gref_umd_{}.pth",
         "mdetr": "finetune_refcocog_{}.json"}, web_archive=20220413012904),
    "refcocog-google": DatasetInfo(
        ("train", "val"), (85_474, 9_536), "coco", COCO_HELP,
        {"refer": "refcocog/refs(google).p", "index": "gref/gref_{}.pth"},
        web_archive=20220413012904),
    "referit": DatasetInfo(
        ("train", "val", "test"), (54_127, 5_842, 60_103), "referit", REFERIT_HELP,
        {"index": "referit/referit_{}.pth"}),
    "flickr30k": DatasetInfo(
        ("train", "val", "test"), (427_193, 14_433, 14_481), "flickr", FLICKR_HELP,
        {"index": "flickr/flickr_{}.pth"}),
    "own": DatasetInfo((*REFCOCO_SPLITS, "test"), (), "own", OWN_HELP, {"own": "{}.jsonl"}),
    "shapes": DatasetInfo(
        (*REFCOCO_SPLITS, "test"), (), "shapes", SHAPES_HELP.format("shapes"),
        {"refer": "shapes/refs(unc).p"}),
    "shapes-long": DatasetInfo(
        (*REFCOCO_SPLITS, "test"), (), "shapes-long", SHAPES_HELP.format("shapes-long"),
        {"refer": "shapes-long/refs(unc).p"}),
}
# fmt: on
IMAGE_PLACES = {  # where an image may be below the data root
    "coco": (
        "images/mscoco/images/train2014/{name}",
        "other/images/mscoco/images/train2014/{name}",
        "train2014/{name}",
        "images/train2014/{name}",
        "train2017/{number}",  # COCO 2017 has the same images, named by their number alone
    ),
    "referit": ("referit/images/{name}", "other/images/referit/images/{name}", "referit/{name}"),
    "flickr": (
        "Flickr30k/flickr30k-images/{name}",
        "Flickr30k/flickr30k_images/{name}",
        "flickr30k/flickr30k-images/{name}",
        "flickr30k-images/{name}",
    ),
    "own": ("{path}",),
    "shapes": ("shapes/images/{name}",),
    "shapes-long": ("shapes-long/images/{name}",),
}


class Entry(NamedTuple):
    """One object with its expressions, as the files have it."""

    image: str  # file name
    size: tuple | None  # width, height
    box: tuple  # x1, y1, x2, y2
    texts: list
    title: str | None = None  # its name in reports


# The families of files. Each function yields (split, the split's records); a record becomes an
# Entry by the function beside it. `paths` is {split: path}.


def read_refer(paths):
    """lichengunc/refer: refs(...).p, a pickle of Python 2 or 3, and instances.json beside it, in
    COCO's layout. One pair of files has all splits."""
    path = Path(next(iter(paths.values())))
    with open(path, "rb") as file:
        refs = PlainUnpickler(file, encoding="latin-1").load()
    with open(path.with_name("instances.json"), encoding="utf-8") as file:
        instances = json.load(file, object_hook=without_polygons)
    boxes = {annotation["id"]: annotation["bbox"] for annotation in instances["annotations"]}
    images = {image["id"]: image for image in instances["images"]}
    for split in paths:
        yield split, ((r, images, boxes) for r in refs if r.get("split") == split)


def without_polygons(value):
    """An object of a JSON file without its segmentation, most of the file, which nobody needs."""
    value.pop("segmentation", None)
    return value


def refer_entry(record):
    ref, images, boxes = record
    image = images[ref["image_id"]]  # ref["file_name"] is not an image's name
    return Entry(
        image=image["file_name"],
        size=(int(image["width"]), int(image["height"])),
        box=xywh_to_xyxy(boxes[ref["ann_id"]]),
        texts=[sentence["sent"] for sentence in ref["sentences"]],
        title=f"ref_id {ref['ref_id']}",
    )


def read_index(paths):
    """TransVG, CLIP-VG, HiVG: a list of tuples, written by torch.save or as a plain pickle."""
    for split, path in paths.items():
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                yield split, PlainUnpickler(io.BytesIO(archive.read(name))).load()
        else:
            with open(path, "rb") as file:
                records = PlainUnpickler(file, encoding="latin-1").load()
                if records == torch.serialization.MAGIC_NUMBER:  # torch's older format
                    PlainUnpickler(file).load()  # its version
                    PlainUnpickler(file).load()  # the machine
                    records = PlainUnpickler(file, encoding="latin-1").load()
            yield split, records


def index_entry(record, box_is_xywh):
    if len(record) == 3:  # Flickr30k
        image, box, text = record
        size = None
    else:
        image, size, box, text = record[:4]
    if isinstance(size, dict):
        size = (int(size["width"]), int(size["height"]))
    else:
        size = None  # of a pair nobody knows which is the width
    return Entry(image, size, xywh_to_xyxy(box) if box_is_xywh else box, [text])


def read_mdetr(paths):
    """MDETR: COCO's layout with an image and an annotation for each expression."""
    for split, path in paths.items():
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_hook=without_polygons)
        boxes = {
            annotation["image_id"]: annotation["bbox"] for annotation in content["annotations"]
        }
        yield split, ((image, boxes) for image in content["images"])


def mdetr_entry(record):
    image, boxes = record
    size = (int(image["width"]), int(image["height"]))
    return Entry(image["file_name"], size, xywh_to_xyxy(boxes[image["id"]]), [image["caption"]])


def read_own(paths):
    """One's own data: a JSON object on each line, or one array of objects."""
    for split, path in paths.items():
        text = Path(path).read_text(encoding="utf-8-sig").strip()
        if text.startswith("["):
            yield split, json.loads(text)
        else:
            yield split, text.split("\n")


def own_entry(record):
    if isinstance(record, str):
        if not record.strip():
            return None
        record = json.loads(record)
    path = record["image"]
    if os.path.isabs(path) or ".." in path.split("/"):
        raise ValueError(f"{path} is not below the data root")
    return Entry(path, None, record["box"], [record["text"]])


FAMILIES = {
    "refer": (read_refer, refer_entry),
    "index": (read_index, index_entry),
    "mdetr": (read_mdetr, mdetr_entry),
    "own": (read_own, own_entry),
}


def xywh_to_xyxy(box):
    """x, y, width, height -> x1, y1, x2, y2."""
    x, y, width, height = map(float, box)
    return x, y, x + width, y + height


def dataset_info(name):
    if name not in DATASETS:
        raise HiVGError(f"There is no data set {name!r}: choose one of {', '.join(DATASETS)}.")
    return DATASETS[name]


def find_files(name, data_root):
    """(family, {split: path}) of a data set, from the first family whose files are in the data root
    or (but for own data) one folder below; (None, {}) if there are none."""
    info = dataset_info(name)
    for family, pattern in info.files.items():
        paths = {}
        for split in info.splits:
            places = [pattern.format(split)]
            if family != "own":
                places.append("*/" + places[0])
            for place in places:
                for path in sorted(Path(data_root).glob(place)):
                    paths.setdefault(split, str(path))
        if paths:
            return family, paths
    return None, {}


def check_files(name, data_root):
    """What find_files gives. Raises HiVGError if there are no annotation files of a data set."""
    family, paths = find_files(name, data_root)
    if family is None:
        raise no_expressions_error(name, "train", data_root)
    return family, paths


EMPTY_NOTE, CLIPPED_NOTE = "empty expressions left out", "boxes clipped to their image"


class Split(NamedTuple):
    """What the files have of one split."""

    samples: PackedSamples  # of Sample
    expressions: int  # in the files, before any was left out
    notes: Counter  # what was left out or changed, and how often
    missing: list  # paths of images that are not there


def read_annotations(name, data_root, splits=None):
    """{split: Split} of a data set: the splits that its files have, or those of `splits` that they
    have. Every file is read once.

    Raises HiVGError for unknown names, and for files that are missing or damaged.
    """
    info = dataset_info(name)
    family, paths = check_files(name, data_root)
    if splits is not None:
        paths = {split: path for split, path in paths.items() if split in splits}
    result = {}
    if not paths:
        return result
    read, to_entry = FAMILIES[family]
    if family == "index":  # their boxes are x, y, width, height for COCO's images alone
        to_entry = functools.partial(index_entry, box_is_xywh=info.images == "coco")
    listing = functools.cache(list_folder)
    collecting = gc.isenabled()
    gc.disable()  # it would look through millions of new objects again and again
    try:
        for path in dict.fromkeys(paths.values()):
            in_this_file = {split: path for split in paths if paths[split] == path}
            where = f"{path} or instances.json beside it" if family == "refer" else path
            with user_error(f"{where} cannot be read", info.help):
                for split, records in read(in_this_file):
                    split_data = read_split(records, to_entry, path, info, data_root, listing)
                    if split_data.expressions:
                        result[split] = split_data
    finally:
        if collecting:
            gc.enable()
    return result


def read_split(records, to_entry, path, info, data_root, listing):
    """A Split from the records of one split."""
    samples, missing, notes = [], set(), Counter()
    own = info.images == "own"
    boxes = []  # (path of the image, if it is there, and its box) of one's own data
    expressions = number = 0
    try:
        for number, record in enumerate(records, start=1):
            entry = to_entry(record)
            if entry is None:  # a blank line
                continue
            # bytes are an error; other white space may be half of a letter, which ftfy mends
            texts = [str.strip(text, " \t\r\n") for text in entry.texts]
            expressions += len(texts)
            x1, y1, x2, y2 = map(float, entry.box)  # fractions are kept (D12)
            width, height = entry.size or (math.inf, math.inf)
            image, is_there = find_image(entry.image, info.images, data_root, listing)
            if own:
                boxes.append((image if is_there else None, (x1, y1, x2, y2)))
            box = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
            if not math.isfinite(x1 + y1 + x2 + y2) or box[0] >= box[2] or box[1] >= box[3]:
                notes[f"box without area left out, {entry.title or f'entry {number}'}"] += 1
                continue
            notes[CLIPPED_NOTE] += box != (x1, y1, x2, y2)
            if not is_there:
                missing.add(image)
            for text in texts:
                if is_empty(text):
                    notes[EMPTY_NOTE] += 1
                else:
                    samples.append(Sample(image, text, box, entry.size, upright=own))
    except READING_ERRORS as error:
        what = f"{path}, entry {number}, cannot be used ({type(error).__name__}: {error})"
        raise HiVGError(f"{what}: {info.help}.") from error
    if boxes:
        check_convention(path, boxes)
    return Split(PackedSamples(samples), expressions, notes, sorted(missing))


def check_convention(path, boxes):
    """Raise HiVGError if many boxes of one's own data cannot be x1, y1, x2, y2 in pixels.

    boxes: (path of the image or None, box). Of 50 of them, evenly chosen, the images are opened,
    to see whether the boxes stick out of them.
    """
    chosen = boxes[:: math.ceil(len(boxes) / 50)]
    tiny = odd = 0
    for image_path, (x1, y1, x2, y2) in chosen:
        width = height = math.inf
        if image_path is not None:
            with suppress(HiVGError), open_image(image_path) as image, reading(image_path):
                width, height = turn_upright(image).size
        tiny += max(x1, y1, x2, y2) <= 1
        # a little outside is a matter of rounding
        odd += x2 <= x1 or y2 <= y1 or x2 > 1.02 * width + 2 or y2 > 1.02 * height + 2
    what = f"The boxes of {path} are not x1, y1, x2, y2 in pixels"
    if tiny > len(chosen) / 2:
        raise HiVGError(
            f"{what}: {tiny} of {len(chosen)} lie below one pixel. Are they shares of the image? "
            "Multiply them by its width and height."
        )
    if odd > max(2, len(chosen) / 4):
        raise HiVGError(
            f"{what}: {odd} of {len(chosen)} have no area or stick out of their images. Are they x, "
            "y, width, height, or centre, width, height, or thousandths of the image? Convert them."
        )


def find_image(file, kind, data_root, listing):
    """(path, whether it is there) of an image: the first of its places where it is, else the first.

    listing: folder -> names in it. One look at a folder of 80,000 images is far quicker than a look
    at each of them, above all on a network's file system.
    """
    name = os.path.basename(file)
    fields = {"name": name, "number": name[-16:], "path": os.path.normpath(file)}
    first = None
    for place in IMAGE_PLACES[kind]:
        path = os.path.join(data_root, place.format(**fields))
        folder, name = os.path.split(path)
        if name in listing(folder):
            return path, True
        first = first or path
    return first, False


def list_folder(folder):
    """The names in a folder; none if there is no such folder."""
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


def select_samples(names, split, data_root, annotations):
    """(PackedSamples of the samples of one split of several data sets, report of what was left out).

    Several data sets: training samples whose image is in a val or test split of another set are
    left out, and a data set without this split is skipped if others have it. Raises HiVGError if
    nothing is left or an image is missing.
    """
    selected, report = [], []
    for name in names:
        others = [other for other in names if other != name]
        split_data = annotations[name].get(split)
        if split_data is None:
            if split == "train" or len(names) == 1:
                raise no_expressions_error(name, split, data_root, annotations[name])
            continue
        samples, notes = split_data.samples, Counter(split_data.notes)
        if split == "train" and others:
            held_out = held_out_images(others, annotations)
            kept = [sample for sample in samples if sample.image not in held_out]
            note = "expressions left out, since another set tests on their images"
            notes[note] = len(samples) - len(kept)
            samples = kept
        prefix = f"{name}: " if others else ""
        report += [f"{prefix}{count:,} {note}" for note, count in notes.items() if count]
        missing = set(split_data.missing) & {sample.image for sample in samples}
        if missing:
            what = f"{len(missing)} images of {name} are missing, {min(missing)} among them"
            where = "the places that were looked at: IMAGE_PLACES in data.py"
            raise HiVGError(f"{what} ({where}): {DATASETS[name].help}.")
        if not len(samples):
            raise no_expressions_error(name, split, data_root, annotations[name], report)
        selected.append(samples)
    if split == "train" and len(names) > 1:
        for name in names:
            for other in DATASETS[name].splits:
                if other not in annotations[name]:
                    report.append(f"{name} {other} is not there, so its images are not left out")
    if not selected:
        raise no_expressions_error(names[0], split, data_root, annotations[names[0]])
    if len(selected) == 1:
        return selected[0], report
    return PackedSamples(itertools.chain(*selected)), report


def held_out_images(names, annotations):
    """The images of all val and test splits of these data sets."""
    images = set()
    for name in names:
        for split, split_data in annotations[name].items():
            if split != "train":
                images.update(sample.image for sample in split_data.samples)
    return images


def no_expressions_error(name, split, data_root, available=(), report=()):
    """The HiVGError that says what was looked for, where, and where to get it. available: splits
    that are there."""
    info = DATASETS[name]
    what = f"{data_root} has no expressions of {name}, split {split!r}"
    if split not in info.splits:
        return HiVGError(f"{what}: choose one of {', '.join(info.splits)}.")
    files = " or ".join(info.files.values()).replace("{}", split)
    where = "there" if name == "own" else "there and one folder below"
    details = [f"looked for {files}, {where}", *report]
    if available:
        details.append(f"it has {', '.join(available)}")
    return HiVGError(f"{what} ({'; '.join(details)}): {info.help}.")


# ----------------------------------------------------------------------------------- reading images

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")  # not EPS, a program
TURNS = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_INTEGERS = {3: "H", 4: "L"}  # EXIF's types of 16 and 32 bits, as struct names them
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # of text in a PNG
warnings.filterwarnings("ignore", module="PIL")  # on oddities of files that it can read
IMAGE_ERRORS = (*READING_ERRORS, SyntaxError, struct.error, Image.DecompressionBombError)


def load_image(path, upright=True):
    """An image file as a PIL image, RGB; of an animation, the first frame.

    upright: turn it as its EXIF orientation says. That is right for a user's own photographs; the
    boxes of published data sets count in pixels as stored, so their images are read without it.
    Raises HiVGError for a file that is missing, empty, damaged, not an image, or too large.
    """
    with open_image(path) as image, reading(path):
        return to_rgb(turn_upright(image) if upright else image)


def reading(path):
    """The context in which an image file is read: its errors become HiVGErrors."""
    return user_error(f"{path} cannot be read as an image", "replace it", IMAGE_ERRORS)


def open_image(path):
    """A PIL image, which is not decoded yet."""
    with reading(path):
        image = Image.open(path, formats=FORMATS)
        image.info["16 bits"] = ";16" in str(image.tile)  # of RGB, PIL keeps the upper 8
        return image


def turn_upright(image):
    """A PIL image as its EXIF orientation says; itself if there is nothing to turn."""
    if image.format != "JPEG":
        image.load()  # EXIF may come after the pixels
    exif = image.info.get("exif", b"")
    if "Raw profile type exif" in image.info:  # ImageMagick's: a name, a length, hexadecimal digits
        with suppress(ValueError):
            exif = bytes.fromhex("".join(image.info["Raw profile type exif"].split()[2:]))
    orientation = exif_orientation(exif)
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def exif_orientation(exif):
    """The orientation, 1 ... 8, in EXIF bytes; None if there is none. No other tag is read: whatever
    is wrong with them (PIL gives up at some), every viewer shows the image upright."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}L", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, place)
            if tag == ExifTags.Base.Orientation and kind in EXIF_INTEGERS:
                (value,) = struct.unpack_from(f"{order}{EXIF_INTEGERS[kind]}", exif, place + 8)
                return value
    except struct.error:  # it ends early
        return None


def to_rgb(image):
    """A PIL image of any mode as RGB: alpha is laid over white, numbers of 16 or 32 bits and floats
    are scaled to 8 bits by the smallest usual range that holds 99.9 % of them, or by the largest of
    these if that is far below."""
    if image.mode[0] in "IF":  # I;16, I or F: convert("RGB") would clip them
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
        values = np.where(abs(values) < 1e30, values, 0)  # such numbers stand for "no data"
        values = values - min(0, values.min())
        top = np.quantile(values, 0.999) or values.max() or 1
        white = next((white for white in (1, 255, 4095, 65535) if top <= white), top)
        if top < white / 4:
            white = top
        image = Image.fromarray((255 * values / white).clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()
    has_16_bits = image.info.get("16 bits")
    image = image if image.mode == "RGB" else image.convert("RGB")
    if has_16_bits:
        top = max(high for _, high in image.getextrema())
        if 0 < top < 64:  # values of 12 bits or fewer
            image = image.point(lambda value: 255 * value / top)
    return image


def decode_region(path, image, geometry):
    """`crop_and_resize` of a PIL image that is not decoded yet, for training, where speed counts: a
    JPEG is decoded at a half, a quarter or an eighth of its size, if the region needs no more."""
    x1, _, x2, _ = geometry.region
    scale = geometry.inner[2] / (x2 - x1)
    width, height = image.size
    with reading(path):
        draft = image.draft(None, (math.ceil(width * scale), math.ceil(height * scale)))
        reduction = draft[1][2] / width if draft else 1  # draft: (mode, box of the reduced image)
        region = tuple(value * reduction for value in geometry.region)
        return crop_and_resize(to_rgb(image), geometry._replace(region=region))


# ------------------------------------------------------------------------------- the shapes data set

# A small world in RefCOCO's own files: scenes of drawn shapes with expressions that mean one of
# them, so that the whole method can be trained with nothing downloaded. For example
#
#     scene        a big red circle on the left, a small blue square and a big red square right of it
#     expressions  "the red circle"  "right most red thing"  "large one left of the small box"
#     caption      "a big red circle on the left and a blue square"    (to train CLIP on)
#
# Every expression is proven to be true of exactly one shape; places and relations by a clear margin,
# see `holds`.

SIDE = 80  # pixels of an image; it is drawn at twice that and reduced
MIN_DEGREE, MIN_LEAD = 0.12, 0.10  # margins of an expression, in shares of the side: see `holds`
ALL_SORTS = ("relation", "place", "attributes")


class ShapesSplit(NamedTuple):
    scenes: int
    shapes: tuple  # how many a scene may have
    expressions: int  # that are sought for a scene
    sorts: tuple  # of expressions, in turn


SHAPES_SPLITS = {  # train is last: of scenes that look alike only those of the first split are kept
    "val": ShapesSplit(240, (3, 4, 5), 6, ALL_SORTS),
    "testA": ShapesSplit(120, (3, 4, 5), 6, ("attributes", "place")),
    "testB": ShapesSplit(150, (3, 4, 5), 6, ("relation",)),
    "test": ShapesSplit(730, (3, 4, 5), 6, ALL_SORTS),  # as val, large enough to tell runs apart
    "train": ShapesSplit(26_000, (1, 2, 3, 3, 4, 4, 5, 5), 3, ALL_SORTS),
}
LONG_TRAIN = SHAPES_SPLITS["train"]._replace(scenes=100_000, expressions=6)  # of shapes-long
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


class Wording(NamedTuple):
    """A place or a relation: its templates, and how true it is of a shape at x, y.

    x points right and y down, in shares of the side; of a place they count from the middle of the
    image, of a relation from the other shape.
    """

    templates: str
    degree: Callable  # (x, y) -> float
    superlative: bool = False  # true of the one with the highest degree


def one_sided(along, across):
    """How far something lies to one side, less 0.6 of its offset across. If it lies on that side at
    all, 0.01 at least: then `holds` takes the words for neither true nor false of it."""
    return along if along <= 0 else max(0.01, along - 0.6 * abs(across))


PLACES = (
    Wording("left most {}|leftmost {}|{} furthest to the left", lambda x, y: -x, True),
    Wording("right most {}|rightmost {}|{} furthest to the right", lambda x, y: x, True),
    Wording("top most {}|highest {}|uppermost {}", lambda x, y: -y, True),
    Wording("bottom most {}|lowest {}|{} furthest down", lambda x, y: y, True),
    Wording("left {}|{} on the left|{} on left side", lambda x, y: -x),
    Wording("right {}|{} on the right|{} on right side", lambda x, y: x),
    Wording("top {}|upper {}|{} at the top", lambda x, y: -y),
    Wording("bottom {}|lower {}|{} at the bottom", lambda x, y: y),
    Wording("top left {}|{} in the top left corner|{} upper left", lambda x, y: min(-x, -y)),
    Wording("top right {}|{} in the top right corner|{} upper right", lambda x, y: min(x, -y)),
    Wording("bottom left {}|{} in the bottom left corner|{} lower left", lambda x, y: min(-x, y)),
    Wording("bottom right {}|{} in the bottom right corner|{} lower right", lambda x, y: min(x, y)),
    Wording("middle {}|center {}|{} in the middle", lambda x, y: 0.25 - max(abs(x), abs(y))),
)
RELATIONS = (
    Wording("{} left of {}|{} to the left of {}", lambda x, y: one_sided(-x, y)),
    Wording("{} right of {}|{} to the right of {}", lambda x, y: one_sided(x, y)),
    Wording("{} above {}|{} over {}", lambda x, y: one_sided(-y, x)),
    Wording("{} below {}|{} under {}|{} beneath {}", lambda x, y: one_sided(y, x)),
    Wording(
        "{} closest to {}|{} nearest to {}|{} next to {}", lambda x, y: -math.hypot(x, y), True
    ),
    Wording("{} farthest from {}|{} furthest away from {}", lambda x, y: math.hypot(x, y), True),
)


class Shape(NamedTuple):
    """One shape of a scene. A description is a tuple of the first three, None for what is unsaid."""

    size: str
    colour: str
    kind: str
    box: tuple  # x1, y1, x2, y2 in half pixels, whole numbers: the same on every machine
    x: float  # of the box's centre, from the middle of the image, in shares of the side
    y: float


def overlap(a, b):
    """The area that two boxes share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0


def random_shapes(rng, count):
    """`count` shapes, in drawing order, of few kinds and colours. None is hidden by more than a
    quarter: all but the star fill half of their box, so an eighth of the box may be covered."""
    kinds = rng.sample(list(KINDS), 2)
    colours = rng.sample(list(COLOURS), rng.choice((2, 3)))
    shapes, hidable = [], []  # hidable: the area of each shape that may still be covered
    tries = 0
    while len(shapes) < count:
        if tries % (15 * count) == 0:  # this scene does not work out: begin again
            shapes, hidable = [], []
        tries += 1
        size = rng.choice(("small", "big", "big"))
        side = 2 * SIDE * rng.uniform(*SIZES[size])
        width, height = round(side * rng.uniform(0.92, 1.08)), round(side * rng.uniform(0.92, 1.08))
        x, y = rng.randint(2, 2 * SIDE - 2 - width), rng.randint(2, 2 * SIDE - 2 - height)
        box = (x, y, x + width, y + height)
        covered = [overlap(box, shape.box) for shape in shapes]
        if all(area <= most for area, most in zip(covered, hidable)):
            colour, kind = rng.choice(colours), rng.choice(kinds)
            hidable = [most - area for area, most in zip(covered, hidable)]
            hidable.append(width * height / (12 if kind == "star" else 8))
            centre_x, centre_y = (2 * x + width) / 4 / SIDE - 0.5, (2 * y + height) / 4 / SIDE - 0.5
            shapes.append(Shape(size, colour, kind, box, centre_x, centre_y))
    return shapes


def random_description(rng, shape):
    """What to say of a shape: (size, colour, kind), None for what is left out."""
    size = shape.size if rng.random() < 0.4 else None
    colour = shape.colour if rng.random() < 0.6 else None
    kind = shape.kind if rng.random() < 0.75 else None
    return size, colour, kind


def matching(shapes, description):
    """The shapes of which a description is true."""
    size, colour, kind = description
    return [
        shape
        for shape in shapes
        if size in (None, shape.size)
        and colour in (None, shape.colour)
        and kind in (None, shape.kind)
    ]


def random_phrase(rng, description):
    """A description in words: "little red disc", "red one"."""
    size, colour, kind = description
    words = [word for word in (size, colour) if word] + [kind]
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
    """One try at an expression: (text, index of the shape that it means, its description), or None
    if it is not proven to mean that one alone. As people do, it may say more than is needed."""
    target = rng.choice(shapes)
    said = random_description(rng, target)
    rivals = [shape for shape in matching(shapes, said) if shape is not target]
    descriptions = [said]
    if sort == "attributes":
        templates = "{}"
        proven = any(said) and not rivals
    elif sort == "place":
        templates, degree, superlative = rng.choice(PLACES)
        proven = holds(lambda s: degree(s.x, s.y), superlative, target, rivals)
    else:
        templates, degree, superlative = rng.choice(RELATIONS)
        other = rng.choice(shapes)
        said_of_other = random_description(rng, other)
        if other is target or matching(shapes, said_of_other) != [other]:
            return None  # it must be clear by itself which other shape is meant
        descriptions.append(said_of_other)
        rivals = [shape for shape in rivals if shape is not other]
        proven = holds(lambda s: degree(s.x - other.x, s.y - other.y), superlative, target, rivals)
    if not proven:
        return None
    phrases = [random_phrase(rng, description) for description in descriptions]
    phrases[1:] = ["the " + phrase for phrase in phrases[1:]]
    article = rng.choice(("", "", "the "))
    text = article + rng.choice(templates.split("|")).format(*phrases)
    return text, shapes.index(target), said


def random_caption(rng, shapes):
    """What is in a scene: two or three of the shapes, or all, mostly with their places."""
    parts = []
    for shape in rng.sample(shapes, min(rng.choice((2, 3, 5)), len(shapes))):
        phrase = random_phrase(rng, (rng.choice((shape.size, None)), shape.colour, shape.kind))
        places = []  # templates of what is true of it: "{} on the left"
        for place in PLACES[4:]:  # without superlatives
            if place.degree(shape.x, shape.y) >= MIN_DEGREE:
                places += [t for t in place.templates.split("|") if t.startswith("{}")]
        template = "{}"
        if places and rng.random() < 0.75:
            template = rng.choice(places)
        article = "an " if phrase[0] in "aeiou" else "a "
        parts.append(template.format(article + phrase))
    return rng.choice((" and ", ", ")).join(parts)


def render_jpeg(rng, shapes):
    """The scene as JPEG bytes: shapes with thin dark outlines on a light, shaded background."""
    slope = np.linspace(-1, 1, SIDE)
    shade = rng.uniform(-14, 14) * slope[:, None] + rng.uniform(-14, 14) * slope  # [S, S]
    light = shade[..., None] + [rng.uniform(200, 226) for _ in "rgb"]  # [S, S, 3]
    image = Image.fromarray(light.astype(np.uint8)).resize((2 * SIDE, 2 * SIDE))
    draw = ImageDraw.Draw(image)
    for shape in shapes:
        x1, y1, x2, y2 = shape.box
        scale_x, scale_y = (x2 - x1 - 1) / 100, (y2 - y1 - 1) / 100
        points = [(x1 + x * scale_x, y1 + y * scale_y) for x, y in KINDS[shape.kind]]
        fill = tuple(round(max(0, c - rng.uniform(0, 28))) for c in COLOURS[shape.colour])
        outline = tuple(value // 3 for value in fill)
        draw.polygon(points, fill, outline, width=2)
    noise = np.frombuffer(rng.randbytes(3 * SIDE**2), np.uint8).reshape(SIDE, SIDE, 3) / 16 - 8
    pixels = (np.asarray(image.reduce(2)) + noise).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_scene(job):
    """(split, number, ShapesSplit) -> shapes, {text: index of its shape}, captions, JPEG bytes."""
    split, number, wanted = job
    rng = random.Random(f"{split} {number}")
    shapes = random_shapes(rng, rng.choice(wanted.shapes))
    texts = {}
    for turn in range(wanted.expressions):
        sort = wanted.sorts[turn % len(wanted.sorts)]
        for _ in range(100):
            expression = try_expression(rng, shapes, sort)
            if expression and expression[0] not in texts:
                text, index, _ = expression
                texts[text] = index
                break
    captions = []
    if split == "train":
        captions = [random_caption(rng, shapes) for _ in range(4)]
    return shapes, texts, captions, render_jpeg(rng, shapes)


def generate_shapes(folder, splits):
    """Write a shapes data set, {split: ShapesSplit}, into a folder that does not exist yet, in
    RefCOCO's layout: instances.json, refs(unc).p and images/; besides captions.json, {file name:
    captions} of the train scenes, and bpe_vocab.txt.gz, a closed vocabulary in the format of CLIP's.
    """
    (folder / "images").mkdir(parents=True)
    images, annotations, refs, captions, words = [], [], [], {}, set()
    split_of = {}  # a coarse look of a scene -> its split
    jobs = [(s, number, wanted) for s, wanted in splits.items() for number in range(wanted.scenes)]
    with multiprocessing.Pool(initializer=ignore_ctrl_c) as pool:
        scenes = pool.imap(make_scene, jobs, chunksize=50)
        bar = tqdm(jobs, "generating shapes", unit="scene")
        for (split, _, _), (shapes, texts, scene_captions, jpeg) in zip(bar, scenes):
            look = frozenset(
                (*shape[:3], round(8 * shape.x), round(8 * shape.y)) for shape in shapes
            )
            if split_of.setdefault(look, split) != split:
                continue  # much the same scene is in another split
            image_id = len(images) + 1
            name = f"shapes_{image_id:06d}.jpg"
            images.append({"id": image_id, "file_name": name, "width": SIDE, "height": SIDE})
            (folder / "images" / name).write_bytes(jpeg)
            if scene_captions:
                captions[name] = scene_captions
            words.update(" ".join([*texts, *scene_captions]).replace(",", "").split())
            add_annotations(shapes, texts, images[-1], split, annotations, refs)
    categories = [{"id": number, "name": kind} for number, kind in enumerate(KINDS, start=1)]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    header = f"# shapes, {clip_model.CLOSED_VOCABULARY}{' '.join(sorted(words))}"
    merges = "\n".join([header, *train_bpe(sorted(words))])
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    (folder / "bpe_vocab.txt.gz").write_bytes(gzip.compress(merges.encode(), mtime=0))


def add_annotations(shapes, texts, image, split, annotations, refs):
    """Add a scene to the annotations and refs, as RefCOCO has them: an annotation for each shape,
    a ref for each shape that has expressions."""
    for index, shape in enumerate(shapes):
        ids = {"image_id": image["id"], "category_id": list(KINDS).index(shape.kind) + 1}
        x1, y1, x2, y2 = (value / 2 for value in shape.box)  # half pixels -> pixels
        annotation = {
            "id": len(annotations) + 1,
            **ids,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": 0,
        }
        annotations.append(annotation)
        sentences = []
        for text, meant in texts.items():
            if meant == index:
                sent_id = 10 * annotation["id"] + len(sentences)
                sentence = {"sent_id": sent_id, "sent": text, "raw": text, "tokens": text.split()}
                sentences.append(sentence)
        if sentences:
            ref = {"ref_id": len(refs) + 1, "ann_id": annotation["id"], **ids, "split": split}
            ref["file_name"] = image["file_name"].replace(".jpg", f"_{annotation['id']}.jpg")
            ref["sent_ids"] = [sentence["sent_id"] for sentence in sentences]
            ref["sentences"] = sentences
            refs.append(ref)


def train_bpe(words):
    """Byte-pair encoding (Sennrich et al. 2016): the commonest pair of neighbouring symbols becomes
    one symbol, again and again, until every word is one. Returns the lines of a merges file."""
    merges = []
    words = [[*word[:-1], word[-1] + "</w>"] for word in words]  # ["r", "e", "d</w>"]
    while True:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not pairs:
            return merges
        best = max(sorted(pairs), key=pairs.get)
        merges.append(" ".join(best))
        words = [merge_pair(word, best) for word in words]


def ignore_ctrl_c():
    """For the workers of a Pool: their parent handles Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def are_shapes(names):
    """Whether there is one data set alone, one of shapes."""
    return len(names) == 1 and names[0] in SHAPES_SETS


def shapes_splits(name):
    """{split: ShapesSplit} of a shapes data set."""
    return SHAPES_SPLITS if name == "shapes" else SHAPES_SPLITS | {"train": LONG_TRAIN}


def make_shapes(data_root, name="shapes"):
    """Generate a shapes data set below the data root if it is not there. Returns its folder.

    The folder is complete or not there: it is made under another name and renamed at the end.
    """
    folder = Path(data_root, name)
    if not folder.exists():
        with user_error(f"{folder} cannot be written", "name another --data-root", (OSError,)):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".generating", dir=data_root) as unfinished:
                generate_shapes(Path(unfinished, name), shapes_splits(name))
                try:
                    Path(unfinished, name).replace(folder)
                except OSError:
                    if not folder.exists():  # else another process was faster
                        raise
    return folder


# ------------------------------------------------------------------------------- check and download

UNC = "https://web.archive.org/web/{}/https://bvisionweb1.cs.unc.edu/licheng/referit/data/{}.zip"
ZENODO = "https://zenodo.org/record/4729015/files/mdetr_annotations.tar.gz"
TRAIN2014 = "http://images.cocodataset.org/zips/train2014.zip"


def check_dataset(name, data_root):
    """Print what is there of a data set, and every image that cannot be read; each is opened once.

    Raises HiVGError if a split, expressions or images are missing, or images are unreadable.
    """
    info = dataset_info(name)
    annotations = read_annotations(name, data_root)
    paths = {sample.image for split in annotations.values() for sample in split.samples}
    for split in annotations.values():
        paths -= set(split.missing)
    paths = sorted(paths)
    with multiprocessing.Pool(initializer=ignore_ctrl_c) as pool:
        read = functools.partial(readable_size, upright=name == "own")
        bar = tqdm(pool.imap(read, paths, 8), "opening images", len(paths), unit="image")
        sizes = dict(zip(paths, bar))

    print("split    expressions  published  missing images  unreadable images  odd boxes")
    problems, unreadable_reasons = [], {}
    published = dict(zip(info.splits, info.published)) or dict.fromkeys(annotations, 0)
    for split in published:
        split_data = annotations.get(split, Split(PackedSamples(), 0, Counter(), []))
        unreadable, odd_boxes = set(), set()
        for sample in split_data.samples:
            size = sizes.get(sample.image)  # None: missing
            if isinstance(size, str):
                unreadable.add(sample.image)
                unreadable_reasons[sample.image] = size
            elif size and sample.size not in (None, size):
                unreadable.add(sample.image)
                unreadable_reasons[sample.image] = size_mismatch(sample, size)
            elif size and (sample.box[2] > size[0] or sample.box[3] > size[1]):
                odd_boxes.add((sample.image, sample.box))
        odd = len(odd_boxes) + split_data.notes.total() - split_data.notes[EMPTY_NOTE]
        print(
            f"{split:8} {split_data.expressions:11} {published[split] or '-':>10} "
            f"{len(split_data.missing):15} {len(unreadable):18} {odd:10}"
        )
        if split_data.expressions < max(published[split], 1):
            problems.append(f"{split} has {split_data.expressions:,} expressions")
        if split_data.missing:
            problems.append(f"{split} lacks images, {split_data.missing[0]} among them")
        if unreadable:
            problems.append(f"{split} has {len(unreadable)} unreadable images")
    for reason in unreadable_reasons.values():
        print(reason)
    if problems:
        raise HiVGError(f"{name} is not complete, {'; '.join(problems)}: {info.help}.")


def readable_size(path, upright):
    """(width, height) of an image, which is decoded to its end; a str, the reason, if it can't be."""
    try:
        return load_image(path, upright).size
    except HiVGError as error:
        return str(error)


def download_dataset(name, data_root):
    """Fetch what is missing of a data set. Raises HiVGError, which says where to ask, for one that
    has no public address."""
    info = dataset_info(name)
    if "refer" not in info.files or name in SHAPES_SETS:
        raise HiVGError(f"{name} cannot be downloaded: {info.help}.")
    family, paths = find_files(name, data_root)
    refer_is_half = family == "refer" and not all(
        Path(path).with_name("instances.json").is_file() for path in paths.values()
    )
    if len(paths) < len(info.splits) or refer_is_half:
        folder = os.path.dirname(info.files["refer"])
        try:
            download_and_unpack(UNC.format(info.web_archive, folder), data_root, folder)
        except HiVGError as error:
            if "mdetr" not in info.files:
                raise
            print(f"{error} Now from {ZENODO}:")
            download_and_unpack(ZENODO, data_root, "mdetr_annotations", "finetune_refcoco")
    annotations = read_annotations(name, data_root)
    if any(split.missing for split in annotations.values()):
        download_and_unpack(TRAIN2014, data_root, "images/mscoco/images/train2014")
    print(f"{name} is in {data_root}: python data.py check looks at every image")


def download_and_unpack(url, data_root, folder, prefix=""):
    """Download a zip or tar archive, move its files whose names begin with `prefix` into a folder
    below the data root, flattened, and delete the archive.

    A file is whole when it gets there. Raises HiVGError; a damaged archive is deleted as well.
    """
    archive, folder = Path(data_root, url.rsplit("/", 1)[1]), Path(data_root, folder)
    if not archive.exists():  # it is there if an earlier run was stopped while it unpacked
        clip_model.download(url, archive)
    damage = (zipfile.BadZipFile, tarfile.TarError, shutil.ReadError, gzip.BadGzipFile)
    damage += (zlib.error, EOFError)
    hint = "free some room or name another --data-root, and run it again"
    print(f"unpacking {archive}", flush=True)
    with (
        user_error(f"{archive} cannot be unpacked", hint, (OSError,)),
        tempfile.TemporaryDirectory(prefix=".unpacking", dir=data_root) as unpacked,
    ):
        try:
            if zipfile.is_zipfile(archive):
                shutil.unpack_archive(archive, unpacked, "zip")
            else:
                with gzip.open(archive) as content:  # its checksum is at its end, where tar stops
                    while content.read(2**20):
                        pass
                shutil.unpack_archive(archive, unpacked, "gztar", filter="data")
        except damage as error:
            archive.unlink(missing_ok=True)
            what = f"{archive} from {url} was damaged ({error}) and is deleted"
            raise HiVGError(f"{what}: run it again.") from error
        folder.mkdir(parents=True, exist_ok=True)
        # in this order refs(...).p, by which a data set is found, comes after instances.json
        for file in sorted(Path(unpacked).rglob(prefix + "*"), key=lambda file: file.name):
            if file.is_file():
                file.replace(folder / file.name)
        archive.unlink(missing_ok=True)


def main():
    commands = {"check": check_dataset, "download": download_dataset}
    parser = argparse.ArgumentParser(description="Check a data set, or fetch it.")
    parser.add_argument("command", choices=commands)
    parser.add_argument("--dataset", required=True, help=", ".join(DATASETS))
    parser.add_argument(
        "--data-root",
        type=os.path.expanduser,
        default="data",
        help="folder of the data (default: data)",
    )
    args = parser.parse_args()
    clip_model.run_main(commands[args.command], args.dataset, args.data_root)


if __name__ == "__main__":
    main()
