"""Evaluation: one image, the accuracy of a data set, attention maps, speed and size.

    python evaluate.py runs/shapes/best.pt --image photo.jpg --text "man in red"
    python evaluate.py runs/shapes/best.pt --image photo.jpg --text "man" "dog" --attention
    python evaluate.py runs/shapes/best.pt --dataset shapes            # all splits but train
    python evaluate.py runs/refcoco/best.pt --dataset refcoco --split testA --data-root data
    python evaluate.py runs/refcoco/best.pt --benchmark --batch-size 32
    python evaluate.py --curve runs/hilora/log.jsonl runs/vanilla/log.jsonl --output curve.png

Reading order: ground and ground_texts (one image), predict and summary (a split), attention_maps,
the drawings, benchmark, device and processes (train.py uses these, too), and the command line.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import is_tensor
from tqdm import tqdm

import clip_model
import data
from clip_model import CLIP, CLIP_CONFIGS, HiVGError, Tokenizer, user_error
from hivg import HiVG, HiVGConfig, box_iou, cxcywh_to_xyxy, read_checkpoint

# isort: split
# imports of the sections on drawings, benchmark, devices, command line
import argparse
import functools
import io
import itertools
import os
import socket
import sys
import tempfile
import textwrap
import weakref
from datetime import timedelta

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

# ------------------------------------------------------------------------------- boxes and accuracy


def ground(model, image, text):
    """The box of what `text` means in a PIL image: (x1, y1, x2, y2) in its pixels.

    Raises HiVGError if the expression is empty.
    """
    output, geometry = forward_texts(model, image, [text])
    return tuple(data.box_to_pixels(output.boxes[0].cpu(), geometry).tolist())


class Grounding(NamedTuple):
    """What `ground_texts` gives for a text."""

    box: tuple  # x1, y1, x2, y2 in the image's pixels
    score: float  # see HiVGOutput.scores
    region_map: torch.Tensor  # [g, g], g patches a side of the square: see HiVGOutput.region_map


def ground_texts(model, image, texts):
    """Several texts in one PIL image, in one batch: a list with a Grounding for each.

    Raises HiVGError if an expression is empty.
    """
    output, geometry = forward_texts(model, image, texts, for_losses=True)
    boxes = data.box_to_pixels(output.boxes.cpu(), geometry)
    maps = output.region_map().unflatten(1, (model.grid, model.grid)).cpu()  # [len(texts), g, g]
    groundings = []
    for box, score, region_map in zip(boxes, output.scores(), maps):
        groundings.append(Grounding(tuple(box.tolist()), score.item(), region_map))
    return groundings


@torch.inference_mode()
def forward_texts(model, image, texts, for_losses=False):
    """(HiVGOutput, Geometry) for texts about one PIL image."""
    for text in texts:
        if clip_model.is_empty(text):
            what = f"The expression {text!r} is empty"
            raise HiVGError(f"{what}: say in words which object is meant.")
    square, geometry = data.preprocess(image, model.config.image_size)  # uint8 [3, S, S]
    batch = {
        "image": square.expand(len(texts), -1, -1, -1),
        "inner": torch.tensor([geometry.inner] * len(texts)),
        "tokens": model.tokenize(texts),
    }
    return model.eval()(*model_inputs(model, batch), for_losses=for_losses), geometry


def model_inputs(model, batch):
    """A batch of data.py as HiVG takes it, on its device: images float32 [B, 3, S, S], tokens
    [B, T], padding bool [B, S, S]."""
    device = next(model.parameters()).device
    images = batch["image"].to(device, non_blocking=True)
    inner = batch["inner"].to(device, non_blocking=True)
    tokens = batch["tokens"].to(device, non_blocking=True)
    images, padding = data.normalise(images, inner, model.config.mean, model.config.std)
    return images, tokens, padding


def open_split(model, names, split, data_root, **options):
    """The GroundingDataset of a split (or of several data sets) for this model."""
    size = model.config.image_size
    model.tokenize("")  # reads CLIP's vocabulary, if the model has none of its own
    length = model.clip.config.context_length
    tokenizer = functools.partial(model.tokenizer, context_length=length)
    return data.GroundingDataset(names, split, data_root, size, tokenizer, **options)


@torch.inference_mode()
def predict(model, dataset, batch_size=64, workers=0, bf16=False, with_scores=False):
    """The boxes of a whole dataset in its order: (predicted, true), [len(dataset), 4] each, as cx,
    cy, w, h of the square; with_scores: (predicted, true, scores), scores [len(dataset)], which
    takes longer.

    Of several processes each predicts its share, every sample once, and all get the whole.
    """
    was_training = model.training
    model.eval()
    share = list(range(process_rank(), len(dataset), world_size()))
    batches = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    rows = torch.zeros(len(dataset), 9)  # predicted box, true box, score
    on_gpu = next(model.parameters()).is_cuda
    reader = data.read_batches(dataset, batches, workers, pin_memory=on_gpu)
    bar = tqdm(reader, "  evaluating", len(batches), leave=False, disable=process_rank() > 0)
    for indices, batch in zip(batches, bar):
        images, tokens, padding = model_inputs(model, batch)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            output = model(images, tokens, padding, for_losses=with_scores)
        rows[indices, :4] = output.boxes.cpu()
        rows[indices, 4:8] = batch["box"]
        if with_scores:
            rows[indices, 8] = output.scores().cpu()
    model.train(was_training)
    if world_size() > 1:
        dist.all_reduce(rows)  # a row is zero in all processes but one
    predicted, true, scores = rows[:, :4], rows[:, 4:8], rows[:, 8]
    if with_scores:
        return predicted, true, scores
    return predicted, true


def clipped_iou(predicted, true):
    """IoU of predicted boxes, clipped to the square, with the true ones: [N, 4], [N, 4] -> [N]."""
    return box_iou(cxcywh_to_xyxy(predicted).clamp(0, 1), cxcywh_to_xyxy(true))


LENGTHS = ("1-5", "6-7", "8-10", "11+")  # words of an expression (paper, Fig. 6 c)


def summary(dataset, predicted, true):
    """Accuracy of a split whose boxes `predict` gives:

    {"split", "expressions", "acc", "interval", "acc70", "acc90", "miou", "lengths"}; acc is Acc@0.5,
    the share of expressions with an IoU of 0.5 or more, interval its 95 % confidence interval,
    acc70 and acc90 the shares for 0.7 and 0.9, miou the mean IoU, all in percent. lengths is
    {"1-5": {"expressions", "acc"}, ...}, the same by number of words.
    """
    iou = clipped_iou(predicted, true)
    words = torch.tensor([len(sample.text.split()) for sample in dataset.samples])
    bins = torch.bucketize(words, torch.tensor((6, 8, 11)), right=True)
    lengths = {name: accuracy(iou[bins == number]) for number, name in enumerate(LENGTHS)}
    return {
        "split": dataset.split,
        **accuracy(iou),
        "interval": wilson_interval((iou >= 0.5).sum().item(), len(iou)),
        "acc70": accuracy(iou, 0.7)["acc"],
        "acc90": accuracy(iou, 0.9)["acc"],
        "miou": round(100 * iou.mean().item(), 2),
        "lengths": lengths,
    }


def accuracy(iou, threshold=0.5):
    """{"expressions", "acc"} of IoUs [N]: their number and Acc@threshold in percent; None without
    any."""
    acc = None
    if len(iou):
        acc = round(100 * (iou >= threshold).float().mean().item(), 2)
    return {"expressions": len(iou), "acc": acc}


def wilson_interval(right, n, z=1.96):
    """[low, high] in percent: the 95 % confidence interval of a share p = right / n (Wilson 1927),

        (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    as if the expressions were independent; those of one image are not quite.
    """
    p = right / n
    middle = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return [round(100 * value / (1 + z**2 / n), 2) for value in (middle - half, middle + half)]


def format_table(rows):
    """The rows of `summary` as lines of text: accuracies and mean IoU by split, then Acc@0.5 by
    number of words."""
    header = ("split", "expressions", "Acc@0.5", "95 % interval", "Acc@0.7", "Acc@0.9", "mean IoU")
    lines = ["{:8} {:>11} {:>8} {:>15} {:>8} {:>8} {:>8}".format(*header)]
    for row in rows:
        interval = "{:.2f}-{:.2f}%".format(*row["interval"])
        cells = "{split:8} {expressions:11,} {acc:7.2f}%".format(**row), f"{interval:>15}"
        lines.append(" ".join([*cells, "{acc70:7.2f}% {acc90:7.2f}% {miou:7.2f}%".format(**row)]))
    lines += ["", "words    " + " ".join(f"{name:>16}" for name in LENGTHS)]
    for row in rows:
        cells = []
        for length in row["lengths"].values():
            cell = "{acc:.2f}% of {expressions:,}" if length["expressions"] else "-"
            cells.append(f"{cell.format(**length):>16}")
        lines.append(f"{row['split']:8} " + " ".join(cells))
    return "\n".join(lines)


def evaluate_splits(
    model,
    checkpoint,
    name,
    splits,
    data_root,
    output,
    workers=0,
    bf16=False,
    annotations=None,
    with_scores=False,
):
    """Evaluate splits of a data set (None: all but train): print the table and write, into `output`,
    a contact sheet for each split and results_NAME.json, or results_NAME_SPLIT.json for the splits
    that were asked for. annotations: {name: what data.read_annotations gives}, if they are read.

    with_scores: as for `predict`. Returns a tuple for each split: the GroundingDataset, and after it
    what `predict` gives.
    """
    if annotations is None:
        annotations = {name: data.read_annotations(name, data_root, splits)}
    check_writable(output)
    results = "_".join(["results", name, *(splits or ())])
    if splits is None:
        splits = [split for split in annotations[name] if split != "train"]
    if not splits:
        raise data.no_expressions_error(name, "val", data_root, available=annotations[name])
    datasets = [open_split(model, name, s, data_root, annotations=annotations) for s in splits]
    rows, evaluated = [], []
    for dataset in datasets:
        predictions = predict(model, dataset, workers=workers, bf16=bf16, with_scores=with_scores)
        predicted, true = predictions[:2]
        rows.append(summary(dataset, predicted, true))
        evaluated.append((dataset, *predictions))
        if process_rank() == 0:
            for note in dataset.report:
                print(f"{dataset.split}: {note}")
            contact_sheet(dataset, predicted, true, output / f"{name}_{dataset.split}.png")
    if process_rank() == 0:
        print(f"{name}:\n{format_table(rows)}")
        content = {"checkpoint": str(checkpoint), "dataset": name, "results": rows}
        write_text(output / f"{results}.json", json.dumps(content, indent=2) + "\n")
        print(f"written to {output}: {results}.json")
    return evaluated


def box_lines(name, dataset, predicted, true, scores):
    """A JSON line for each expression of a split of a data set: image, text, the true and the found
    box, x1, y1, x2, y2 in the image's pixels, their IoU, and the score."""
    lines = []
    iou = clipped_iou(predicted, true)
    columns = predicted, true, iou.tolist(), scores.tolist()
    for sample, predicted_box, true_box, sample_iou, score in zip(dataset.samples, *columns):
        geometry = data.letterbox((0, 0, *data.image_size(sample)), dataset.image_size)
        line = {"dataset": name, "split": dataset.split, "image": sample.image, "text": sample.text}
        for key, square_box in (("true", true_box), ("found", predicted_box)):
            corners = data.box_to_pixels(square_box, geometry).tolist()
            line[key] = [round(value, 2) for value in corners]
        line |= {"iou": round(sample_iou, 4), "score": round(score, 4)}
        lines.append(json.dumps(line) + "\n")
    return lines


# ----------------------------------------------------------------------- attention maps and drawings


@torch.inference_mode()
def attention_maps(model, image, text):
    """Where the model looks in a PIL image for `text` (paper, Fig. 2): {"[CLS], layer 4": map, ...,
    "[REG], grounding layer 6": map}.

    Maps are of [CLS] in the visual layers V (in all, if there are no more than 4) and of [REG] in
    the last grounding layer. Each is a float tensor [g, g], g patches a side of the padded square:
    the share of the token's attention that goes to each patch, mean over heads.
    """
    blocks, last = model.visual_blocks, model.grounding_layers[-1].attention
    layers = range(1, len(blocks) + 1) if len(blocks) <= 4 else model.config.visual_layers
    inputs = {}

    def remember(module, arguments):
        inputs[module] = arguments

    modules = [last] + [blocks[layer - 1].attn for layer in layers]
    hooks = [module.register_forward_pre_hook(remember) for module in modules]
    ground(model, image, text)
    for hook in hooks:
        hook.remove()
    maps = {}
    for layer in layers:
        module = blocks[layer - 1].attn
        q, k, _ = module.in_proj(inputs[module][0]).chunk(3, dim=-1)  # [1, 1 + N, d_v] each
        maps[f"[CLS], layer {layer}"] = first_query_attention(q, k, module.heads)[1:]
    query, key, _, padding = inputs[last]  # [1, 1, D], [1, 2 + N + T, D], ..., [1, 2 + N + T]
    weights = first_query_attention(last.q_proj(query), last.k_proj(key), last.heads, padding)
    maps[f"[REG], grounding layer {len(model.grounding_layers)}"] = weights[2 : 2 + model.grid**2]
    return {name: weights.view(model.grid, model.grid).cpu() for name, weights in maps.items()}


def first_query_attention(q, k, heads, padding=None):
    """softmax(q k^T / sqrt(d / heads)) of the first query, mean over heads: q [1, Nq, d], k
    [1, Nk, d], padding [1, Nk] bool -> [Nk], sum 1."""
    q = q[0, :1].unflatten(-1, (heads, -1)).transpose(0, 1)  # [heads, 1, d / heads]
    k = k[0].unflatten(-1, (heads, -1)).transpose(0, 1)  # [heads, Nk, d / heads]
    logits = q @ k.mT / math.sqrt(q.shape[-1])  # [heads, 1, Nk]
    if padding is not None:
        logits = logits.masked_fill(padding, -math.inf)
    return logits.softmax(dim=-1).mean(dim=0)[0]


TRUE_COLOUR, FOUND_COLOUR = (30, 160, 60), (220, 40, 30)
# of several texts: the first, then others
COLOURS = (FOUND_COLOUR, (30, 90, 220), (20, 140, 60), (190, 60, 190), (210, 120, 0), (0, 140, 150))


def draw_box(image, box, colour):
    """Draw (x1, y1, x2, y2) into a PIL image."""
    width = max(1, round(max(image.size) / 120))
    ImageDraw.Draw(image).rectangle([round(v) for v in box], outline=colour, width=width)


def draw_groundings(image, groundings, texts, side=480):
    """A drawing of what `ground_texts` gives for a PIL image: boxes, each in a colour of its own,
    with text and score. An image of fewer than `side` pixels is enlarged."""
    scale = math.ceil(side / max(image.size))
    drawing = image.resize((scale * image.width, scale * image.height), Image.BICUBIC)
    font = ImageFont.load_default(max(14, max(drawing.size) // 50))
    boxes = [[scale * value for value in grounding.box] for grounding in groundings]
    colours = list(itertools.islice(itertools.cycle(COLOURS), len(boxes)))
    for box, colour in zip(boxes, colours):
        draw_box(drawing, box, colour)
    labels = []  # where they lie: x1, y1, x2, y2
    for box, colour, text, grounding in zip(boxes, colours, texts, groundings):
        label = " ".join(text.split())
        if len(label) > 60:
            label = label[:57] + "..."
        label += f"  {grounding.score:.2f}"
        draw = ImageDraw.Draw(drawing)
        _, _, width, height = draw.textbbox((3, 1), label, font)
        place = label_place(box, width + 3, height + 3, drawing.size, labels)
        labels.append(place)
        draw.rectangle(place, fill=colour)
        draw.text((place[0] + 3, place[1] + 1), label, "white", font)
    return drawing


def label_place(box, width, height, size, labels):
    """Where the label of a box goes, x1, y1, x2, y2 in an image of this size: above the box, or, if
    another label lies there, below that or farther above."""
    x = max(0, min(box[0], size[0] - width))
    first, step = box[1] - height, height + 1
    downwards = np.arange(first, size[1] - height, step)
    upwards = np.arange(first, 0, -step)
    for y in (*downwards, *upwards):
        place = (x, y, x + width, y + height)
        if y >= 0 and not any(data.overlap(place, other) for other in labels):
            return place
    return x, 0, x + width, height  # there is no room left


def save_image(image, path):
    """Write a PIL image in the format of the path's extension. Raises HiVGError for an extension
    that is not an image's."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise HiVGError(f"{path} has no image extension: name it .png or .jpg.")
    with clip_model.atomic_write(path) as temporary:
        image.save(temporary, kind)
    print(f"drawn into {path}")


def image_grid(panels, columns, side=240):
    """One PIL image of many. panels: a list of (PIL image, caption); each gets `side` pixels."""
    font = ImageFont.load_default(14)
    width, height = side + 8, side + 44
    rows = math.ceil(len(panels) / columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for place, (image, caption) in enumerate(panels):
        x, y = place % columns * width, place // columns * height
        left, top, *size = data.letterbox((0, 0, *image.size), side).inner
        grid.paste(image.resize(size), (x + 4 + left, y + 4 + top))
        lines = "\n".join(textwrap.wrap(caption, 34)[:2])
        ImageDraw.Draw(grid).multiline_text((x + 4, y + side + 6), lines, "black", font)
    return grid


def contact_sheet(dataset, predicted, true, path, count=24):
    """Draw `count` predictions, evenly over the split, as the paper's Fig. 7: the true box green,
    the predicted one red, below them their IoU and the expression."""
    panels, iou = [], clipped_iou(predicted, true)
    places = torch.linspace(0, len(dataset) - 1, min(count, len(dataset)))
    for index in places.long().tolist():
        sample = dataset.samples[index]
        image = data.load_image(sample.image, sample.upright)
        geometry = data.letterbox((0, 0, *image.size), dataset.image_size)
        for boxes, colour in ((true, TRUE_COLOUR), (predicted, FOUND_COLOUR)):
            draw_box(image, data.box_to_pixels(boxes[index], geometry).tolist(), colour)
        panels.append((image, f"{iou[index]:.2f}  {sample.text}"))
    save_image(image_grid(panels, columns=6), path)


NO_ATTENTION, HALF, FULL_ATTENTION = (20, 30, 120), (220, 50, 40), (255, 235, 90)


def attention_overlay(image, weights, side, brightest=None):
    """A PIL image, grey, under the colours of a map: weights [g, g] over its padded square of `side`
    pixels. brightest: the weight with the brightest colour, None for the largest there is."""
    geometry = data.letterbox((0, 0, *image.size), side)
    left, top, width, height = geometry.inner
    patch = side // len(weights)
    heat = np.kron(weights, np.ones((patch, patch)))[top : top + height, left : left + width]
    if brightest is None:
        brightest = heat.max()
    heat = Image.fromarray((255 * heat / brightest).astype(np.uint8))
    heat = heat.reduce(patch).resize((width, height), Image.BILINEAR)  # smooth
    heat = ImageOps.colorize(heat, NO_ATTENTION, FULL_ATTENTION, HALF)
    grey = ImageOps.grayscale(data.crop_and_resize(image, geometry)).convert("RGB")
    return Image.blend(grey, heat, 0.6)


def attention_sheet(model, image, texts, groundings):
    """One PIL image with a row of panels for each text: the box, the region map (yellow is 1) and
    the maps of attention (yellow is the largest weight)."""
    S, panels = model.config.image_size, []
    for text, grounding in zip(texts, groundings):
        with_box = image.copy()
        draw_box(with_box, grounding.box, FOUND_COLOUR)
        panels.append((with_box, f"score {grounding.score:.2f}: {text}"))
        regions = attention_overlay(image, grounding.region_map, S, brightest=1)
        panels.append((regions, "region map"))
        for name, weights in attention_maps(model, image, text).items():
            panels.append((attention_overlay(image, weights, S), name))
    return image_grid(panels, columns=len(panels) // len(texts))


def ground_and_draw(model, image_path, texts, attention, output):
    """Find texts in an image file, print boxes and scores and draw them, all into one image;
    attention: as an attention_sheet."""
    output = output or Path(image_path).stem + ("_attention.png" if attention else "_found.png")
    check_no_input(output, image_path)
    image = data.load_image(image_path)
    groundings = ground_texts(model, image, texts)
    for text, grounding in zip(texts, groundings):
        box = " ".join(f"{value:.1f}" for value in grounding.box)
        print(f"score {grounding.score:.2f}  {image_path}: {text}: {box}")
        unseen = model.tokenizer.unseen_words(text)
        if unseen:
            print(f"(this model was trained without the words: {', '.join(unseen)})")
    if len(texts) > 1 and not any(" " in text for text in texts):
        print(f"(these are {len(texts)} expressions; quotes keep the words of one together)")
    if attention:
        drawing = attention_sheet(model, image, texts, groundings)
    else:
        drawing = draw_groundings(image, groundings, texts)
    save_image(drawing, output)


def plot_curve(logs):
    """Acc@0.5 over the epochs of runs, from their log.jsonl, as a PIL image (paper, Fig. 6 d).

    A line for each run, with the name of its folder; a dotted line where a stage begins. Raises
    HiVGError without matplotlib.
    """
    hint = "pip install matplotlib"
    with user_error("Curves are drawn with matplotlib", hint, (ImportError,)):
        from matplotlib import pyplot
    pyplot.switch_backend("agg")  # no window
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    starts = set()  # (epochs before it, stage)
    for log in logs:
        with user_error(f"{log} is not a log of train.py", "name a run's log.jsonl"):
            lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
            epochs = np.cumsum([line["epoch"] >= 0 for line in lines])
            accuracies = [line["acc"] for line in lines]
            split = lines[-1]["split"]
            starts |= {(n - 1, x["stage"]) for n, x in zip(epochs, lines) if x["epoch"] == 0}
        name = Path(log).absolute().parent.name.replace("$", r"\$")  # "$" begins a formula
        axes.plot(epochs, accuracies, ".-", label=name)
        axes.set(xlabel="epochs", ylabel=f"Acc@0.5 on {split}, %")
    for epochs, stage in starts:
        title = {-1: "warm-up without bridges", 0: "warm-up"}.get(stage, f"stage {stage}")
        axes.axvline(epochs, color="grey", linestyle=":")
        axes.text(epochs, 1.02, title, rotation=30, transform=axes.get_xaxis_transform())
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


# ---------------------------------------------------------------------------------------- benchmark

MIN_SECONDS = 2.0  # of measuring, for each time


def benchmark(model, name, batch_size, bf16):
    """Print the size and speed of a model (paper, Fig. 6 a and b)."""
    device = next(model.parameters()).device
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{total:,} parameters, {trained:,} of them trained in stage {model.config.stage}")
    dtype = torch.bfloat16 if bf16 else torch.float32
    peak = matrix_peak(device, dtype)
    print(f"{name} on {device}, {dtype}")
    print_benchmark(inference_rows(model, batch_size, bf16, peak), peak)


@torch.inference_mode()
def inference_rows(model, batch_size, bf16, peak):
    """Rows of the benchmark: the boxes of one image and of a batch. Images come from the CPU and
    boxes go back. The model is merged and frozen here."""
    model.merge().eval().requires_grad_(False)
    device, rows = next(model.parameters()).device, []
    for count in sorted({1, batch_size}):
        batch = synthetic_batch(model, count)

        def job(batch=batch):
            images, tokens, padding = model_inputs(model, batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                return model(images, tokens, padding).boxes.cpu()

        rows.append(benchmark_row("inference", job, count, device, peak))
    return rows


def benchmark_row(name, job, images, device, peak):
    """Time, operations (2 for a multiply-add) and memory of a job that handles so many images, as a
    row of `print_benchmark`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = median_seconds(job)
    memory = peak_memory(device)
    # Counted after timing, and without compilation: Dynamo never compiles what it first meets under
    # the counter. Attention is written out, since fused kernels are not counted on every device.
    eager = torch.compiler.set_stance("force_eager")
    with eager, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        job()
    flops = counter.get_total_flops()
    mfu = 100 * flops / seconds / peak
    return name, images, 1e3 * seconds, images / seconds, flops / images / 1e9, mfu, memory / 2**20


def print_benchmark(rows, peak):
    """Print the rows of `benchmark_row` as a table."""
    print(f"a matrix product here: {peak / 1e9:,.0f} GFLOP/s, which is 100 % MFU")
    header = ("", "batch", "ms", "images/s", "GFLOPs/image", "MFU %", "MiB")
    print("{:24} {:>6} {:>9} {:>9} {:>13} {:>6} {:>8}".format(*header))
    for row in rows:
        print("{:24} {:6} {:9.1f} {:9,.1f} {:13.2f} {:6.1f} {:8,.0f}".format(*row))


def median_seconds(job):
    """The median time of a job, after it has warmed up."""
    timer = Timer("job()", globals={"job": job}, num_threads=torch.get_num_threads())
    once = timer.blocked_autorange(min_run_time=0).median
    return timer.blocked_autorange(min_run_time=max(MIN_SECONDS, 10 * once)).median


def matrix_peak(device, dtype):
    """FLOP/s of a large matrix product, which stands for the peak of this machine."""
    side = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / median_seconds(lambda: matrix @ matrix)


def peak_memory(device):
    """Bytes: the most that tensors took on a CUDA device, else the most that the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    from resource import RUSAGE_SELF, getrusage  # Windows does not have it

    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class PeakMemory(TorchDispatchMode):
    """A context that counts the bytes of the tensors that are made in it. `peak`: the most that
    there were at one time. Workspaces inside of kernels are not seen."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if is_tensor(value) and id(value.untyped_storage()) not in given:
                self.count(value.untyped_storage())
        return result

    def count(self, storage):
        if id(storage) not in self.alive:
            size = storage.nbytes()
            self.alive.add(id(storage))
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.freed, id(storage), size)

    def freed(self, number, size):
        self.alive.remove(number)
        self.bytes -= size


def random_model(name):
    """HiVG in stage 3 around a CLIP of size `name`, a key of CLIP_CONFIGS, with random weights and
    a vocabulary of single letters."""
    letters = Tokenizer(io.StringIO("# no merges"))
    return HiVG(HiVGConfig(stage=3), CLIP(CLIP_CONFIGS[name]), letters)


def synthetic_batch(model, count):
    """A made-up batch as data.py gives it: expressions of 15 words, a third of the square padding."""
    S = model.config.image_size
    tokens = model.tokenize(["a b c d e f g h i j k l m n o"] * count)
    return {
        "image": torch.randint(256, (count, 3, S, S), dtype=torch.uint8),
        "inner": torch.tensor([[0, S // 6, S, S - S // 3]] * count),
        "tokens": data.trim_to_longest(tokens),
        "box": torch.tensor([[0.5, 0.5, 0.3, 0.4]] * count),
        "object": torch.arange(count),
    }


# ----------------------------------------------------------------------------- device and processes


PROCESS_COUNTS = (  # variables of srun, of several mpiruns, and of torch
    *("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
    "WORLD_SIZE",
)


def setup_device(name=None):
    """The device of this process: the one asked for, or the best there is (cuda, mps, cpu).

    The processes that torchrun started are joined; each has a GPU of its own, if there are any, and
    all but the first print nothing. Raises HiVGError if there is no such device.
    """
    if name is None:
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    distributed = "LOCAL_RANK" in os.environ
    counts = [os.environ.get(variable, "") for variable in PROCESS_COUNTS]
    count = max([int(value) for value in counts if value.isdigit()], default=1)
    if count > 1 and not distributed:
        what = f"{count} processes were started that do not know of one another"
        raise HiVGError(f"{what}: start one torchrun on each machine, and let it start them.")
    if distributed and name.startswith("cuda"):
        if name != "cuda":
            raise HiVGError(f"torchrun gives each process a GPU of its own: no --device {name}.")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    errors = (RuntimeError, AssertionError)  # the latter if torch was built without CUDA
    hint = "start fewer processes" if distributed else "leave --device out"
    with user_error(f"There is no device {name} here", hint, errors):
        device = torch.empty(0, device=name).device
    # Products of float32 matrices on a GPU use TF32, 10 bits of mantissa: L_CLC's logits, up to
    # 100, come out up to 0.05 off.
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    if distributed:
        join_processes(device)
        if process_rank() > 0:
            sys.stdout = open(os.devnull, "w")
    return device


def join_processes(device):
    """Join the processes that torchrun started. Raises HiVGError if they do not find one another."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    hint = (
        "look at MASTER_ADDR, MASTER_PORT, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; on one "
        "machine use --standalone"
    )
    errors = (RuntimeError, ValueError, OSError)
    with user_error("The processes cannot reach one another", hint, errors):
        if "MASTER_ADDR" in os.environ:  # torch would try for hours
            socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
        # later the first process may prepare data for a while, and the others wait for it
        timeout = timedelta(hours=2)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
        store.set_timeout(timeout)


def process_rank():
    """Number of this process, 0 if it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait here for the other processes, on the CPU: a GPU's library would not wait for hours."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))


# ------------------------------------------------------------------------------------- command line


def write_text(path, text):
    """Write a text file atomically."""
    with clip_model.atomic_write(path) as temporary:
        temporary.write_text(text)


def check_writable(folder):
    """Make a folder if need be. Raises HiVGError if nothing can be written to it."""
    with user_error(f"{folder} cannot be written to", "name another place", (OSError,)):
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def check_no_input(output, path):
    """Raise HiVGError if `output` is the file `path`, which is read."""
    if Path(output).exists() and Path(path).exists() and Path(output).samefile(path):
        raise HiVGError(f"{output} would overwrite {path}: name another --output.")


def number_from(low, kind=int):
    """argparse's type of a number that is at least `low`."""

    def number(text):
        value = kind(text)
        if not low <= value < 2**63:
            raise argparse.ArgumentTypeError(f"{text} must be >= {low}")
        return value

    return number


def run(args):
    if args.curve:
        save_image(plot_curve(args.curve), args.output or "curve.png")
        return
    device = setup_device(args.device)
    for dataset in args.dataset or ():  # before anything is read
        data.check_files(dataset, args.data_root)
    if args.save_boxes:
        check_writable(Path(args.save_boxes).parent)
        if Path(args.save_boxes).exists():
            raise HiVGError(f"{args.save_boxes} is there already: name another file.")
    name = str(args.checkpoint)
    if args.benchmark and name in CLIP_CONFIGS:
        model = random_model(name)
    else:
        model, _ = read_checkpoint(name)
    model.to(device)
    if args.benchmark:
        benchmark(model, name, args.batch_size, args.bf16)
        return
    model.merge().eval()
    if args.dataset is not None:
        evaluate_data_sets(model, args)
    elif process_rank() == 0:
        ground_and_draw(model, args.image, args.text, args.attention, args.output)


def evaluate_data_sets(model, args):
    """Evaluate the splits that were asked for, of one data set after the other. What is missing is
    told before the first begins."""
    annotations = {}
    for name in args.dataset:
        annotations[name] = data.read_annotations(name, args.data_root, args.split)
        for split in args.split or ():
            if split not in annotations[name]:
                there = annotations[name]
                raise data.no_expressions_error(name, split, args.data_root, there)
    output = Path(args.output or args.checkpoint.parent)
    lines = []
    for name in annotations:
        workers = data.default_workers([name]) if args.workers is None else args.workers
        evaluated = evaluate_splits(
            model,
            args.checkpoint,
            name,
            args.split,
            args.data_root,
            output,
            workers=workers,
            bf16=args.bf16,
            annotations=annotations,
            with_scores=bool(args.save_boxes),
        )
        if args.save_boxes and process_rank() == 0:
            for dataset, predicted, true, scores in evaluated:
                lines += box_lines(name, dataset, predicted, true, scores)
    if args.save_boxes and process_rank() == 0:
        write_text(args.save_boxes, "".join(lines))
        print(f"boxes written to {args.save_boxes}")


FLAG_MODES = {  # where a flag has a meaning
    "text": ["image"],
    "attention": ["image"],
    "split": ["dataset"],
    "save_boxes": ["dataset"],
    "data_root": ["dataset"],
    "workers": ["dataset"],
    "batch_size": ["benchmark"],
    "bf16": ["dataset", "benchmark"],
    "output": ["image", "dataset", "curve"],
    "device": ["image", "dataset", "benchmark"],
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    one_of = parser.add_mutually_exclusive_group(required=True).add_argument
    expanded = os.path.expanduser
    add(
        "checkpoint",
        nargs="?",
        type=lambda text: Path(expanded(text)),
        help="of train.py or HiVG's authors; of --benchmark also a CLIP's name",
    )
    one_of("--image", type=expanded, help="find something in this image")
    add("--text", nargs="+", help="what to find there, one or several expressions in quotes")
    add(
        "--attention",
        action="store_const",
        const=True,
        help="draw where the model looked, a row for each text",
    )
    known = ", ".join(data.DATASETS)
    one_of("--dataset", nargs="+", help=f"or evaluate these data sets, of {known}")
    add("--split", nargs="+", help="these splits of them (default: all but train)")
    add("--save-boxes", type=expanded, metavar="FILE", help="write a JSON line for each expression")
    add("--data-root", type=expanded, help="folder of the data sets (default: data)")
    add(
        "--workers",
        type=number_from(0),
        help="processes that read images (default: one a CPU, 8 at most)",
    )
    one_of("--benchmark", action="store_true", help="or measure speed, size and cost")
    add("--batch-size", type=number_from(1), help="of --benchmark (default: 32)")
    add(
        "--bf16",
        action="store_const",
        const=True,
        help="of --dataset and --benchmark: bf16 autocast",
    )
    one_of(
        "--curve",
        nargs="+",
        type=expanded,
        metavar="LOG",
        help="or draw the curves of runs' log.jsonl",
    )
    add("--output", type=expanded, help="the image to draw, or the folder of a data set's results")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    args = parser.parse_intermixed_args()
    if bool(args.checkpoint) == bool(args.curve):
        parser.error("give a CHECKPOINT (before --dataset or --text), but none for --curve")
    if args.image and not args.text:
        parser.error("--image needs --text")
    for flag, modes in FLAG_MODES.items():
        if getattr(args, flag) is not None and not any(getattr(args, mode) for mode in modes):
            names = " and ".join(f"--{mode}" for mode in modes)
            parser.error(f"--{flag.replace('_', '-')} is for {names}")
    args.data_root = args.data_root or "data"
    args.batch_size = args.batch_size or 32
    args.bf16 = bool(args.bf16)
    clip_model.run_main(run, args)


if __name__ == "__main__":
    main()
