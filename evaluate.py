"""Evaluation: Acc@0.5 and mean IoU per split, one expression on one photograph, and contact sheets.

    python evaluate.py runs/shapes/best.pt --dataset shapes                          # all splits but train
    python evaluate.py runs/refcoco/best.pt --dataset refcoco --split testA --data-root data
    python evaluate.py runs/refcoco/best.pt --image photo.jpg --text "man in the red jacket" --output found.jpg

Reading order: ground (one photograph), predict and evaluate (a split), contact_sheet, main.
"""

import argparse
import json
import math
import sys
import textwrap
from argparse import RawDescriptionHelpFormatter as RawText
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
from clip_model import HiVGError, explaining, replacing
from hivg import box_iou, cxcywh_to_xyxy, load_checkpoint


@torch.inference_mode()
def ground(model, image, text):
    """The box of what `text` means in a PIL image: (x1, y1, x2, y2) in its pixels.

    Raises HiVGError if the expression is empty.
    """
    if not text.strip():
        raise HiVGError("The expression is empty: say in words which object is meant.")
    config, device = model.eval().config, next(model.parameters()).device
    square, padding, geometry = data.prepare(image, config.image_size, config.mean, config.std)
    tokens = model.tokenize(text.lower())
    box = model(square[None].to(device), tokens.to(device), padding[None].to(device)).boxes[0]
    return tuple(data.to_pixels(box.cpu(), geometry).tolist())


@torch.inference_mode()
def predict(model, dataset, batch_size=64, workers=0):
    """Boxes of a whole data set, in its order: (predicted, true), each [len(dataset), 4] as cx, cy, w, h."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    loader = data.batches(dataset, batch_size, workers)
    found, true = [], []
    for batch in tqdm(loader, desc="  evaluating", leave=False):
        tokens = data.cut_to_longest(model.tokenize(batch["text"]))
        inputs = (each.to(device) for each in (batch["image"], tokens, batch["padding"]))
        found.append(model(*inputs).boxes.cpu())
        true.append(batch["box"])
    model.train(was_training)
    return torch.cat(found), torch.cat(true)


def ious(found, true):
    """IoU of predicted boxes, clipped to the square, with the true ones: [N, 4], [N, 4] -> [N]."""
    return box_iou(cxcywh_to_xyxy(found).clamp(0, 1), cxcywh_to_xyxy(true))


def evaluate(model, dataset, workers=0):
    """{"split", "expressions", "acc", "miou"} of a split; acc is Acc@0.5, both in percent."""
    iou = ious(*predict(model, dataset, workers=workers))
    return {
        "split": dataset.split,
        "expressions": len(dataset),
        "acc": round(100 * (iou >= 0.5).float().mean().item(), 2),
        "miou": round(100 * iou.mean().item(), 2),
    }


def table(rows):
    """The rows of `evaluate` as lines of text."""
    lines = [f"{'split':8} {'expressions':>11} {'Acc@0.5':>8} {'mean IoU':>8}"]
    for row in rows:
        lines += ["{split:8} {expressions:11,} {acc:7.2f}% {miou:7.2f}%".format(**row)]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- pictures

TRUE_COLOUR, FOUND_COLOUR = (30, 160, 60), (220, 40, 30)


def draw_box(image, box, colour):
    """Draw (x1, y1, x2, y2) in place."""
    width = max(1, round(max(image.size) / 120))
    ImageDraw.Draw(image).rectangle([round(v) for v in box], outline=colour, width=width)


def contact_sheet(model, dataset, path, count=24, columns=6, side=240):
    """Write a picture of `count` predictions, evenly over the split, as the poster's Fig. 7.

    Green is the true box, red the one found; below each their IoU and the expression.
    """
    count = min(count, len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    found, true = predict(model, torch.utils.data.Subset(dataset, chosen))
    overlap = ious(found, true)
    font = ImageFont.load_default(14)
    height = side + 44
    sheet = Image.new("RGB", (columns * (side + 8), math.ceil(count / columns) * height), "white")
    for place, index in enumerate(chosen):
        sample = dataset.samples[index]
        picture = data.load_image(sample.image, upright=False)
        geometry = data.letterbox((0, 0, *picture.size), model.config.image_size)
        found_box = data.to_pixels(found[place], geometry).tolist()
        for box, colour in ((sample.box, TRUE_COLOUR), (found_box, FOUND_COLOUR)):
            draw_box(picture, box, colour)
        x, y = place % columns * (side + 8), place // columns * height
        left, top, *size = data.letterbox((0, 0, *picture.size), side).inner
        sheet.paste(picture.resize(size), (x + 4 + left, y + 4 + top))
        lines = textwrap.wrap(f"{overlap[place]:.2f}  {sample.text}", 34)[:2]
        ImageDraw.Draw(sheet).multiline_text((x + 4, y + side + 6), "\n".join(lines), "black", font)
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG")


def evaluate_splits(model, checkpoint, name, splits, data_root, output, workers=0):
    """Evaluate splits of a data set; print the table, write results_NAME.json and a contact sheet into `output`."""
    rows, config = [], model.config
    picture = dict(image_size=config.image_size, mean=config.mean, std=config.std)
    for dataset in [data.GroundingDataset(name, s, data_root, **picture) for s in splits]:
        for note in dataset.report:
            print(f"{dataset.split}: {note}")
        rows.append(evaluate(model, dataset, workers))
        contact_sheet(model, dataset, output / f"{name}_{dataset.split}.png")
    print(table(rows))
    content = {"checkpoint": str(checkpoint), "dataset": name, "results": rows}
    with replacing(output / f"results_{name}.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
    print(f"{output}: results_{name}.json, {name}_SPLIT.png")


# --------------------------------------------------------------------------------------------- command line


def pick_device(name=None):
    """The device asked for, or the best there is: cuda, mps, cpu."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    found = next((kind for kind, is_there in there.items() if is_there), "cpu")
    with explaining(f"There is no device {name} here", "leave --device out"):
        return torch.empty(0, device=name or found).device


def exit_with(job, args):
    """Run job(args); the project's own errors become one sentence on stderr and exit status 1."""
    try:
        job(args)
    except HiVGError as error:
        # a worker sends its traceback too: what counts is its end
        sentence = str(error).rpartition("HiVGError: ")[2].strip()
        sys.exit(f"error: {sentence}")
    except KeyboardInterrupt:
        sys.exit("stopped: what was finished is kept")


def run(args):
    checkpoint = Path(args.checkpoint)
    model = load_checkpoint(checkpoint, pick_device(args.device))
    if args.dataset:
        there = data.available_splits(args.dataset, args.data_root)
        splits = args.split or [split for split in there if split != "train"]
        output = Path(args.output or checkpoint.parent)
        settings = args.dataset, splits, args.data_root, output, args.workers
        evaluate_splits(model, checkpoint, *settings)
        return
    path = Path(args.output or Path(args.image).stem + "_found.png")
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise HiVGError(f"{path} has no ending of a picture: name it .png or .jpg.")
    image = data.load_image(args.image)
    box = ground(model, image, args.text)
    print(f"{args.image}: {args.text}: " + " ".join(f"{value:.1f}" for value in box))
    draw_box(image, box, FOUND_COLOUR)
    with replacing(path) as temporary:
        image.save(temporary, kind)
    print(f"drawn into {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawText)
    add = parser.add_argument
    add("checkpoint", help="best.pt or last.pt of train.py")
    add("--dataset", help="evaluate this data set")
    add("--split", nargs="+", help="these splits of it (default: all but train)")
    add("--data-root", default="data", help="folder of the data sets (default: data)")
    add("--image", help="or find something in this photograph")
    add("--text", help="what to find there")
    add("--output", help="the picture to draw, or the folder of a data set's results")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--workers", type=int, default=0, help="processes that read photographs")
    args = parser.parse_args()
    if bool(args.dataset) == bool(args.image) or bool(args.image) != bool(args.text is not None):
        parser.error("give either --dataset, or --image and --text")
    exit_with(run, args)


if __name__ == "__main__":
    main()
