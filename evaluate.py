"""Evaluation: one image, the accuracy of a data set, attention maps, curves.

    python evaluate.py image runs/shapes/best.pt photo.jpg "man in red" "dog" --attention
    python evaluate.py dataset runs/shapes/best.pt shapes                    # all splits but train
    python evaluate.py dataset runs/refcoco/best.pt refcoco --split testA --data-root data
    python evaluate.py curve runs/hilora/log.jsonl runs/vanilla/log.jsonl --output curve.png

Reading order: ground and ground_texts (one image), predict and summary (a split), attention_maps,
the drawings, and the command line.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import data
from clip_model import (
    HiVGError,
    atomic_write,
    attention,
    clean_text,
    run_main,
    user_error,
    write_text,
)
from data import add_up, process_rank, world_size
from hivg import box_iou, load_checkpoint

# isort: split
# imports of the sections on drawings and command line
import argparse
import os
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

# ------------------------------------------------------------------------------- boxes and accuracy


@torch.no_grad()
def output_of(model, batch):
    """The model's HiVGOutput for a batch of data.py, in eval mode, without gradients; afterwards the
    model is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        batch = model.inputs(batch)
        return model(batch["image"], batch["tokens"], batch["padding"])
    finally:
        for module in training:
            module.training = True


class Grounding(NamedTuple):
    """What `ground_texts` gives for a text."""

    box: tuple  # x1, y1, x2, y2 in the image's pixels
    score: float  # see HiVGOutput.scores
    region_map: torch.Tensor  # [g, g], g patches a side of the square: see HiVGOutput.region_map


def ground(model, image, text):
    """The box of what `text` means in a PIL image: (x1, y1, x2, y2) in its pixels.

    Raises HiVGError if the expression is empty.
    """
    return ground_texts(model, image, text)[0].box


def ground_texts(model, image, texts):
    """A str or several texts in one PIL image, in one batch: a list with a Grounding for each.

    Raises HiVGError if an expression is empty.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        return []
    for text in texts:
        if not clean_text(text):
            raise HiVGError(f"The expression {text!r} is empty: say which object is meant.")
    square, geometry = data.preprocess(data.to_rgb(image), model.config.image_size)
    item = {"image": square, "inner": torch.tensor(geometry.inner)}
    batch = data.collate([item | {"tokens": tokens} for tokens in model.tokenize(texts)])
    output = output_of(model, batch)
    boxes = map(tuple, data.box_to_pixels(output.boxes.cpu(), geometry).tolist())
    maps = output.region_map().unflatten(1, (model.grid, -1)).cpu()  # [len(texts), g, g]
    return list(map(Grounding, boxes, output.scores().tolist(), maps))


def predict(model, dataset, batch_size=64, workers=0, loader=None):
    """The boxes of a whole dataset in its order: (found, true, scores), [len(dataset), 4] twice, as
    x1, y1, x2, y2 in the image's pixels, found ones clipped to the image, and [len(dataset)].

    loader: a BatchLoader of the dataset, if there is one. Of several processes each predicts its
    share, every sample once, and all get the whole.
    """
    loader = loader or data.BatchLoader(dataset, workers)
    share = list(range(process_rank(), len(dataset), world_size()))
    batches = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    rows = torch.zeros(len(dataset), 9)  # found box, true box, score
    reader = data.progress(loader(batches), "  evaluating", len(batches), leave=False)
    for indices, batch in zip(batches, reader):
        output = output_of(model, batch)
        geometry = data.Geometry(batch["crop"], batch["inner"], dataset.image_size)
        found = data.box_to_pixels(output.boxes.cpu(), geometry)
        true = data.box_to_pixels(batch["box"], geometry)
        rows[indices] = torch.cat([found, true, output.scores().cpu()[:, None]], dim=1)
    add_up(rows)  # a row is zero in all processes but one
    return rows[:, :4], rows[:, 4:8], rows[:, 8]


LENGTHS = ("1-5", "6-7", "8-10", "11+")  # words of an expression (paper, Fig. 6 c)


def summary(dataset, found, true):
    """Accuracy of a split whose boxes `predict` gives:

    {"split", "expressions", "acc", "interval", "acc70", "acc90", "miou", "lengths"}: acc is Acc@0.5,
    the share of expressions with an IoU of 0.5 or more, interval its 95 % confidence interval,
    acc70 and acc90 the shares for 0.7 and 0.9, miou the mean IoU, all in percent. lengths is
    {"1-5": {"expressions", "acc"}, ...}, the same by number of words.
    """
    iou = box_iou(found, true)
    words = torch.tensor([len(sample.text.split()) for sample in dataset.samples])
    bins = torch.bucketize(words, torch.tensor((6, 8, 11)), right=True)
    lengths = {}
    for number, name in enumerate(LENGTHS):
        iou_of_length = iou[bins == number]
        lengths[name] = {"expressions": len(iou_of_length), "acc": accuracy(iou_of_length, 0.5)}
    return {
        "split": dataset.split,
        "expressions": len(iou),
        "acc": accuracy(iou, 0.5),
        "interval": wilson_interval((iou >= 0.5).sum().item(), len(iou)),
        "acc70": accuracy(iou, 0.7),
        "acc90": accuracy(iou, 0.9),
        "miou": round(100 * iou.mean().item(), 2),
        "lengths": lengths,
    }


def accuracy(iou, threshold):
    """Acc@threshold of IoUs [n], in percent; None without any."""
    return round(100 * (iou >= threshold).float().mean().item(), 2) if len(iou) else None


def wilson_interval(right, n):
    """[low, high] in percent: the 95 % confidence interval of a share p = right / n (Wilson 1927),

        (p + a / 2 +- sqrt(a p (1 - p) + a^2 / 4)) / (1 + a),   a = 1.96^2 / n

    as if the expressions were independent; those of one image are not quite.
    """
    p, a = right / n, 1.96**2 / n
    half = math.sqrt(a * p * (1 - p) + a**2 / 4)
    return [round(100 * max(0, p + a / 2 + side) / (1 + a), 2) for side in (-half, half)]


def format_table(rows):
    """The rows of `summary` as lines of text; behind accuracies and mean IoU stands Acc@0.5 by number
    of words."""
    lines = [
        "split expressions Acc@0.5 95 % interval    0.7    0.9 mean IoU    1-5    6-7   8-10    11+"
    ]
    for row in rows:
        cells = "{split:5} {expressions:11} {acc:7.2f} {interval[0]:6.2f}-{interval[1]:6.2f} {acc70:6.2f} {acc90:6.2f} {miou:8.2f}"
        by_length = [
            f"{length['acc']:6.2f}" if length["expressions"] else "     -"
            for length in row["lengths"].values()
        ]
        lines.append(" ".join([cells.format(**row), *by_length]))
    return "\n".join(lines)


def evaluate_splits(model, name, contents, output, splits=None, **options):
    """Evaluate splits of a data set (None: all but train): print the table and write into the folder
    `output` results_NAME.json (results_NAME_SPLIT.json if splits are given), and for each split a
    contact sheet and the boxes, boxes_NAME_SPLIT.jsonl.

    contents: {split: data.Split}, what data.read_annotations gives; options: of `predict`.
    """
    rows = []
    chosen = splits or [split for split in contents if split != "train"]
    # all are opened at once: what is missing is told before the first is evaluated
    for dataset in [grounding_dataset(model, {name: contents}, split) for split in chosen]:
        found, true, scores = predict(model, dataset, **options)
        rows.append(summary(dataset, found, true))
        if process_rank() == 0:
            for line in dataset.report:
                print(line)
            contact_sheet(dataset, found, true, output / f"{name}_{dataset.split}.png")
            lines = box_lines(dataset, found, true, scores)
            write_text(output / f"boxes_{name}_{dataset.split}.jsonl", "".join(lines))
    if process_rank() == 0:
        path = output / f"{'_'.join(['results', name, *(splits or ())])}.json"
        print(f"{name}:\n{format_table(rows)}\nwritten to {path}")
        write_text(path, json.dumps({"dataset": name, "results": rows}, indent=2) + "\n")


def grounding_dataset(model, annotations, split, **options):
    """The GroundingDataset of a split for this model: see data.open_split."""
    model.tokenize("")  # reads CLIP's vocabulary, if the model has none of its own
    tokenizer = partial(model.tokenizer, context_length=model.clip.config.context_length)
    return data.open_split(
        annotations, split, image_size=model.config.image_size, tokenizer=tokenizer, **options
    )


def box_lines(dataset, found, true, scores):
    """A JSON line for each expression of a split: image, text, the true and the found box, x1, y1,
    x2, y2 in the image's pixels, their IoU, and the score."""
    columns = {"true": true, "found": found, "iou": box_iou(found, true), "score": scores}
    values = [column.double().round(decimals=4).tolist() for column in columns.values()]
    for sample, *row in zip(dataset.samples, *values):
        line = {"split": dataset.split, "image": sample.image, "text": sample.text}
        yield json.dumps(line | dict(zip(columns, row))) + "\n"


# ----------------------------------------------------------------------- attention maps and drawings


@torch.no_grad()
def attention_maps(model, image, text):
    """Where the model looks in a PIL image for `text` (paper, Fig. 2): {"[CLS], layer 4": map, ...,
    "[REG], grounding layer 6": map}.

    Maps are of [CLS] in the visual layers V and of [REG] in the last grounding layer. Each is a
    float tensor [g, g], g patches a side of the padded square: the share of the token's attention
    that goes to each patch, mean over heads.
    """
    last, kept = model.grounding_layers[-1].attention, {}
    towers = {layer: model.visual_blocks[layer - 1].attn for layer in model.config.visual_layers}

    def keep(module, inputs, output):
        kept[module] = inputs, output

    modules = last, *(attn.in_proj for attn in towers.values())
    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        ground(model, image, text)
    finally:
        for hook in hooks:
            hook.remove()
    maps = {}
    for layer, attn in towers.items():
        q, k, _ = kept[attn.in_proj][1].chunk(3, dim=-1)  # [1, 1 + N, d_v] each
        maps[f"[CLS], layer {layer}"] = first_query_attention(q, k, attn.heads)[1:]
    query, key, _, padding = kept[last][0]  # [1, K, D], [1, K, D], ..., [1, K]
    weights = first_query_attention(last.q_proj(query), last.k_proj(key), last.heads, ~padding)
    maps[f"[REG], grounding layer {len(model.grounding_layers)}"] = weights[2 : 2 + model.grid**2]
    return {name: weights.view(model.grid, -1).cpu() for name, weights in maps.items()}


def first_query_attention(q, k, heads, mask=None):
    """softmax(q k^T / sqrt(d / heads)) of the first query, mean over heads: q [1, Nq, d], k
    [1, Nk, d], mask as `attention` takes it -> [Nk], sum 1."""
    # a sum of unit vectors is a row of the weights; every head has all of them: [1, Nk, heads * Nk]
    values = torch.eye(k.shape[1]).to(k).repeat(1, 1, heads)
    weights = attention(q[:, :1], k, values, heads, mask)  # [1, 1, heads * Nk]
    return weights.float().view(heads, -1).mean(dim=0)


# of found boxes: of one text the first
BOX_COLOURS = ("crimson", "royalblue", "seagreen", "orchid", "darkorange", "teal")


def draw_box(image, box, colour, label=""):
    """Draw (x1, y1, x2, y2) into a PIL image, with a label above it."""
    draw, side = ImageDraw.Draw(image), max(image.size)
    draw.rectangle(box, outline=colour, width=max(1, side // 120))
    if label:
        font = font_for(label, max(14, side // 50))
        _, _, width, height = draw.textbbox((0, 0), label, font)
        place = max(0, min(box[0], image.width - width)), max(0, box[1] - height)
        draw.rectangle(draw.textbbox(place, label, font), fill=colour)
        draw.text(place, label, "white", font)


def font_for(text, size):
    """PIL's own font, or the first of the system's in FONTS that has all characters of a text; None if
    there is none."""
    fonts = [ImageFont.load_default(size)]
    for name in FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:  # it is not there
            pass
    for font in fonts:
        missing = bytes(font.getmask("\uffff"))  # what is drawn for a character that a font lacks
        if all(bytes(font.getmask(character)) != missing for character in text):
            return font
    return None


FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "arial.ttf", "msyh.ttc")


def draw_groundings(image, groundings, texts):
    """A drawing of what `ground_texts` gives for a PIL image: boxes, each in a colour of its own,
    with text and score. An image of fewer than 480 pixels a side is enlarged."""
    scale = math.ceil(480 / max(image.size))
    drawing = ImageOps.scale(image, scale)
    for number, (grounding, text) in enumerate(zip(groundings, texts), start=1):
        label = textwrap.shorten(text, 60)
        if font_for(label, 14) is None:
            print(f"(no font here has all characters of {text!r}: in the drawing it is {number})")
            label = number
        box = [scale * value for value in grounding.box]
        colour = BOX_COLOURS[(number - 1) % len(BOX_COLOURS)]
        draw_box(drawing, box, colour, f"{label}  {grounding.score:.2f}")
    return drawing


def save_image(image, path):
    """Write a PIL image in the format of the path's extension. Raises HiVGError for an extension
    that is not an image's."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise HiVGError(f"{path} has no image extension: name it .png or .jpg.")
    with atomic_write(path) as temporary:
        image.save(temporary, kind)
    print(f"drawn into {path}")


def image_grid(panels, columns, side=240):
    """One PIL image of many. panels: a list of (PIL image, caption); each gets `side` pixels."""
    width, height = side + 8, side + 44
    grid = Image.new("RGB", (columns * width, math.ceil(len(panels) / columns) * height), "white")
    draw = ImageDraw.Draw(grid)
    for place, (image, caption) in enumerate(panels):
        x, y = 4 + place % columns * width, 4 + place // columns * height
        left, top, *size = data.whole(image, side).inner
        grid.paste(image.resize(size), (x + left, y + top))
        font, caption = font_for(caption, 14), textwrap.fill(caption, side // 7, max_lines=2)
        draw.text((x, y + side + 2), caption, "black", font)
    return grid


def contact_sheet(dataset, found, true, path):
    """Draw up to 24 predictions, evenly over the split, as the paper's Fig. 7: the true box green,
    the found one red, below them their IoU and the expression."""
    panels, iou = [], box_iou(found, true)
    for index in range(0, len(dataset), math.ceil(len(dataset) / 24)):
        sample = dataset.samples[index]
        image = data.load_image(sample.image, sample.upright)
        draw_box(image, true[index].tolist(), "limegreen")
        draw_box(image, found[index].tolist(), BOX_COLOURS[0])
        panels.append((image, f"{iou[index]:.2f}  {sample.text}"))
    save_image(image_grid(panels, columns=6), path)


def attention_overlay(image, weights, side, brightest=None):
    """A PIL image, grey, under the colours of a map: weights [g, g] over its padded square of `side`
    pixels. brightest: the weight with the brightest colour, None for the largest there is."""
    left, top, width, height = data.whole(image, side).inner
    patch = side // len(weights)
    heat = np.kron(weights, np.ones((patch, patch)))[top : top + height, left : left + width]
    heat = Image.fromarray((255 * heat / (brightest or heat.max())).astype(np.uint8))
    heat = heat.reduce(patch).resize((width, height), Image.BILINEAR)  # smooth
    heat = ImageOps.colorize(heat, black="navy", mid="crimson", white="gold")
    grey = ImageOps.grayscale(image.resize((width, height))).convert("RGB")
    return Image.blend(grey, heat, 0.6)


def attention_sheet(model, image, texts, groundings):
    """One PIL image with a row of panels for each text: the box, the region map (yellow is 1) and
    the maps of attention (yellow is the largest weight)."""
    S, panels = model.config.image_size, []
    for text, grounding in zip(texts, groundings):
        with_box = image.copy()
        draw_box(with_box, grounding.box, BOX_COLOURS[0])
        panels.append((with_box, f"score {grounding.score:.2f}: {text}"))
        panels.append((attention_overlay(image, grounding.region_map, S, 1), "region map"))
        for name, weights in attention_maps(model, image, text).items():
            panels.append((attention_overlay(image, weights, S), name))
    return image_grid(panels, columns=len(panels) // len(texts))


# ------------------------------------------------------------------------------------- command line


def run_image(args):
    """Find texts in an image file, print boxes and scores and draw them, all into one image."""
    output = Path(args.output or f"{Path(args.image).stem}_found.png")
    image = data.load_image(args.image)
    if output.exists() and output.samefile(args.image):
        raise HiVGError(f"{output} would overwrite {args.image}: name another --output.")
    model = load_checkpoint(args.checkpoint, data.setup_device(args.device))
    groundings = ground_texts(model, image, args.text)
    for text, grounding in zip(args.text, groundings):
        box = "{:.1f} {:.1f} {:.1f} {:.1f}".format(*grounding.box)
        print(f"score {grounding.score:.2f}  {args.image}: {text}: {box}")
        if unseen := model.tokenizer.unseen_words(text):
            print(f"(this model was trained without the words: {', '.join(unseen)})")
        if unread := model.tokenizer.unread_words(text):
            print(f"(CLIP reads 77 tokens; these words were cut: {' '.join(unread)})")
    if len(args.text) > 1 and not any(" " in text for text in args.text):
        print(f"(these are {len(args.text)} expressions; quotes keep the words of one together)")
    if args.attention:
        drawing = attention_sheet(model, image, args.text, groundings)
    else:
        drawing = draw_groundings(image, groundings, args.text)
    save_image(drawing, output)


def run_dataset(args):
    """Evaluate splits of data sets."""
    annotations = {name: data.read_annotations(name, args.data_root) for name in args.names}
    model = load_checkpoint(args.checkpoint, data.setup_device(args.device))
    output = Path(args.output or Path(args.checkpoint).parent)
    for name, splits in annotations.items():
        evaluate_splits(
            model,
            name,
            splits,
            output,
            args.split,
            batch_size=args.batch_size,
            workers=args.workers,
        )


def run_curve(args):
    """Draw Acc@0.5 over the epochs of runs, from their log.jsonl (paper, Fig. 6 d)."""
    with user_error("Curves are drawn with matplotlib", "pip install matplotlib", (ImportError,)):
        from matplotlib.figure import Figure
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for log in args.logs:
        with user_error(f"{log} is not a log of train.py", "name a run's log.jsonl"):
            lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
            epochs = np.cumsum([line["epoch"] >= 0 for line in lines])
            accuracies = [line["acc"] for line in lines]
            axes.plot(epochs, accuracies, ".-", label=Path(log).absolute().parent.name)
            axes.set(xlabel="epochs", ylabel=f"Acc@0.5 on {lines[-1]['split']}, %")
    axes.legend()
    with user_error(f"{args.output} cannot be written", "name a .png", (OSError, ValueError)):
        figure.savefig(args.output)
    print(f"drawn into {args.output}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    path = os.path.expanduser

    add = add_command(commands, "image", run_image, "find texts in an image")
    add("checkpoint", "of train.py or HiVG's authors", type=path)
    add("image", type=path)
    add("text", "one or several expressions, each in quotes", nargs="+")
    add("--attention", "draw where the model looked", action="store_true")
    add("--output", "the drawing (default: IMAGE_found.png)", type=path)
    add("--device", "cuda, mps or cpu (default: the best there is)")

    add = add_command(commands, "dataset", run_dataset, "evaluate data sets")
    add("checkpoint", "of train.py or HiVG's authors", type=path)
    add("names", nargs="+", choices=data.DATASETS)
    add("--split", "default: all but train", nargs="+")
    add("--data-root", "folder of the data sets (default: data)", type=path, default="data")
    add("--output", "folder of the results (default: the checkpoint's)", type=path)
    add("--batch-size", type=data.number_from(1), default=64)
    add("--workers", "reading processes", type=data.number_from(0), default=data.default_workers())
    add("--device", "cuda, mps or cpu (default: the best there is)")

    add = add_command(commands, "curve", run_curve, "draw the accuracy over the epochs of runs")
    add("logs", "log.jsonl of a run", nargs="+", type=path)
    add("--output", type=path, default="curve.png")
    args = parser.parse_args()
    run_main(args.run, args)


def add_command(commands, name, run, text):
    """A subcommand of a parser; returns its `data.adder`."""
    command = commands.add_parser(name, help=text)
    command.set_defaults(run=run)
    return data.adder(command)


if __name__ == "__main__":
    main()
