"""Evaluation: accuracy per split and by length of expression, one photograph, speed and cost,
pictures of all that.

    python evaluate.py runs/shapes/best.pt --dataset shapes  # all splits but train
    python evaluate.py runs/refcoco/best.pt --dataset refcoco --split testA --data-root data
    python evaluate.py runs/refcoco/best.pt --image photo.jpg --text "man in red"
    python evaluate.py runs/refcoco/best.pt --image photo.jpg --text "man" "dog" --attention
    python evaluate.py runs/refcoco/best.pt --benchmark --batch-size 32
    python evaluate.py --curve runs/hilora/log.jsonl runs/vanilla/log.jsonl --output curve.png

First come the device and the processes: skip them at first. Reading order: ground (one photograph),
predict and summary (a split), attention_maps (where the model looked), benchmark, the pictures
(sheet, contact_sheet, overlay, curve), evaluate_splits, run and main.
"""

import argparse
import ctypes
import functools
import io
import json
import os
import re
import sys
import tempfile
import textwrap
from argparse import RawDescriptionHelpFormatter as RawText
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from clip_model import CLIP, SIZES, HiVGError, Tokenizer, attend, exit_with, explaining, replacing
from hivg import HiVG, HiVGConfig, box_iou, cxcywh_to_xyxy, load_model

LENGTHS = ("1-5", "6-7", "8-10", "11+")  # words of an expression (poster, Fig. 6 c)

# ----------------------------------------------------------------------------- device and processes


def pick_device(name=None):
    """The device asked for, or the best there is: cuda, mps, cpu. Float32 products on a GPU are
    made in TF32."""
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with explaining(f"There is no device {name} here", "leave --device out"):
        device = torch.empty(0, device=name or best).device
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    return device


def keep_freed_memory():
    """Linux's malloc gives large blocks back to the system as they are freed, and every step pays
    for fresh pages, on a CPU up to a fifth of its time: let it keep them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option, value in ((-1, 2**31 - 1), (-4, 0), (-8, 1)) if mallopt else ():
        mallopt(option, value)  # M_TRIM_THRESHOLD; M_MMAP_MAX; M_ARENA_MAX: one for all threads


def write_text(path, text):
    """Write a text file; until it is whole the old one stays."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def writable(folder):
    """Make a folder if need be. Raises HiVGError if nothing can be written to it."""
    with explaining(f"{folder} cannot be written to", "name another --output"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def rank():
    """Number of this process, 0 if it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    """How many work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined(name=None):
    """Gives the device to work on, see `pick_device`. The processes that torchrun started are
    joined: each has a GPU of its own, if there are any, and all but the first print nothing.

    If another of them fails, that is a HiVGError.
    """
    keep_freed_memory()
    number = os.environ.get("LOCAL_RANK")  # of torchrun
    if number and (name or "cuda") == "cuda" and torch.cuda.is_available():
        name = f"cuda:{number}"
    device = pick_device(name)
    if not number:
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    if rank():
        sys.stdout = open(os.devnull, "w")
    try:
        yield device
    except RuntimeError as error:
        if not re.search("gloo|nccl", str(error), re.IGNORECASE):
            raise
        what = f"Process {rank()} of {processes()} has lost another one ({str(error)[:200]})"
        raise HiVGError(f"{what}: see what that one says, and go on with --resume.") from error
    dist.destroy_process_group()


@contextmanager
def first_process_first():
    """What is inside is done by the first process; then the others find what it has made."""
    if rank():
        dist.all_reduce(torch.zeros(1))
    yield
    if processes() > 1 and rank() == 0:
        dist.all_reduce(torch.zeros(1))


# ------------------------------------------------------------------------------- boxes and accuracy


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


def inputs_of(model, batch):
    """A batch of data.py as HiVG takes it, on its device: images, tokens, padding."""
    device = next(model.parameters()).device
    tokens = data.cut_to_longest(model.tokenize(batch["text"]))
    inputs = batch["image"], tokens, batch["padding"]
    return tuple(each.to(device, non_blocking=True) for each in inputs)


@torch.inference_mode()
def predict(model, dataset, batch_size=64, workers=0):
    """Boxes of a whole data set, in its order: (predicted, true, read); the first two
    [len(dataset), 4] as cx, cy, w, h, read [len(dataset)] bool, False where the picture could not
    be read and another stands in its place.

    Of several processes each predicts its share, every sample once, and all get the whole.
    """
    was_training = model.training
    model.eval()
    share = list(range(rank(), len(dataset), processes()))
    lists = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    rows = torch.zeros(len(dataset), 9)
    loader = data.batches(dataset, lists, workers, next(model.parameters()).is_cuda)
    for indices, batch in zip(lists, tqdm(loader, "  evaluating", leave=False, disable=rank() > 0)):
        found = model(*inputs_of(model, batch)).boxes.cpu()
        rows[indices] = torch.cat([found, batch["box"], batch["read"][:, None]], dim=1)
    model.train(was_training)
    if processes() > 1:
        dist.all_reduce(rows)  # the sum: all but one have zeros in a row
    return rows[:, :4], rows[:, 4:8], rows[:, 8].bool()


def ious(found, true):
    """IoU of predicted boxes, clipped to the square, with the true ones: [N, 4], [N, 4] -> [N]."""
    return box_iou(cxcywh_to_xyxy(found).clamp(0, 1), cxcywh_to_xyxy(true))


def score(iou):
    """{"expressions", "acc"} of IoUs [N]: their number, and Acc@0.5 in percent, None where there
    are none."""
    acc = round(100 * (iou >= 0.5).float().mean().item(), 2) if len(iou) else None
    return {"expressions": len(iou), "acc": acc}


def evaluate(model, dataset, workers=0):
    """The `summary` of a split."""
    return summary(dataset, *predict(model, dataset, workers=workers))


def summary(dataset, found, true, read):
    """{"split", "expressions", "acc", "miou", "lengths"} of a split and its boxes as `predict`
    gives them; acc is Acc@0.5, both in percent. What could not be read counts nowhere but as
    "skipped", which is there if that happened.

    lengths is {"1-5": {"expressions", "acc"}, ...}, the same by number of words.
    """
    iou, skipped = ious(found, true)[read], len(read) - int(read.sum())
    words = torch.tensor([len(sample.text.split()) for sample in dataset.samples])[read]
    bins = torch.bucketize(words, torch.tensor((6, 8, 11)), right=True)
    return {
        "split": dataset.split,
        **score(iou),
        "miou": round(100 * iou.mean().item(), 2),
        "lengths": {name: score(iou[bins == number]) for number, name in enumerate(LENGTHS)},
        **({"skipped": skipped} if skipped else {}),
    }


def table(rows):
    """The rows of `summary` as lines of text: all expressions of each split, then Acc@0.5 by
    number of words."""
    splits = [f"{'split':8} {'expressions':>11} {'Acc@0.5':>8} {'mean IoU':>8}"]
    by_words = [" ".join(["\nwords   ", *(f"{name:>16}" for name in LENGTHS)])]
    for row in rows:
        splits += ["{split:8} {expressions:11,} {acc:7.2f}% {miou:7.2f}%".format(**row)]
        cell, bins = "{acc:.2f}% of {expressions:,}", row["lengths"].values()
        cells = [cell.format(**each) if each["expressions"] else "-" for each in bins]
        by_words += [" ".join([f"{row['split']:8}", *(f"{cell:>16}" for cell in cells)])]
    return "\n".join(splits + by_words)


# --------------------------------------------------------------------------------- inside the model


def first_attends(q, k, heads, mask=None):
    """How much the first query attends to each key, mean over heads: what `attend` gives back of
    one-hot values.

    q [1, Nq, d], k [1, Nk, d], mask as in `attend` -> [Nk], sum 1.
    """
    one_hot = torch.eye(k.shape[1], device=k.device).repeat(1, heads)[None]  # [1, Nk, heads Nk]
    return attend(q[:, :1], k, one_hot, heads, mask).unflatten(-1, (heads, -1))[0, 0].mean(dim=0)


@torch.inference_mode()
def attention_maps(model, image, text):
    """Where the model looks in a PIL image for `text` (poster, Fig. 2): {"[CLS], layer 4": map,
    ..., "[REG], ...": map}.

    Maps are of [CLS] in the visual layers V (in all, if there are no more than 4) and of [REG] in
    the last grounding layer. Each is a float tensor [g, g], g patches a side of the padded square:
    the share of the token's attention that goes to each patch, mean over heads. What goes to other
    tokens is left out, so its sum is at most 1.
    """
    blocks, last = model.clip.visual.transformer.resblocks, model.layers[-1].attention
    layers = range(1, len(blocks) + 1) if len(blocks) <= 4 else model.config.visual_layers
    # called as hook(module, inputs) before each module: inputs[module] is what it was called with
    inputs, maps = {}, {}
    with torch.nn.modules.module.register_module_forward_pre_hook(inputs.__setitem__):
        ground(model, image, text)
    for layer in layers:
        attention = blocks[layer - 1].attn
        q, k, _ = attention.in_proj(*inputs[attention]).chunk(3, dim=-1)  # [1, 1 + N, d_v]
        maps[f"[CLS], layer {layer}"] = first_attends(q, k, attention.heads)[1:]
    query, key, _, padding = inputs[last]  # [1, 1, D], [1, 2 + N + T, D], ..., [1, 2 + N + T]
    row = first_attends(last.q_proj(query), last.k_proj(key), last.heads, ~padding[:, None, None])
    maps[f"[REG], grounding layer {len(model.layers)}"] = row[2 : 2 + model.grid**2]
    return {name: weights.view(model.grid, -1).cpu() for name, weights in maps.items()}


# ---------------------------------------------------------------------------------------- benchmark

SECONDS = 2.0  # of measuring, at least, for each time


def seconds(job):
    """The median time that a job takes, warm."""
    timer = Timer("job()", globals={"job": job}, num_threads=torch.get_num_threads())
    once = timer.blocked_autorange(min_run_time=0).median
    return timer.blocked_autorange(min_run_time=max(SECONDS, 10 * once)).median


def matrix_peak(device, dtype):
    """FLOP/s of a large matrix product, which nothing on this machine goes beyond."""
    side = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / seconds(lambda: matrix @ matrix)


def measured(what, job, images, device, peak):
    """A row of the benchmark's table: times, operations (2 a multiply-add) and memory of a job that
    does so many images."""
    # attention written out: fused kernels are not counted on every device
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        job()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    time, flops = seconds(job), counter.get_total_flops()
    speed, share = images / time, 100 * flops / time / peak
    return what, images, 1e3 * time, speed, flops / images / 1e9, share, peak_memory(device) / 2**20


def print_benchmark(rows, peak):
    """The rows of `measured` as a table."""
    print(f"a matrix product here: {peak / 1e9:,.0f} GFLOP/s, which is 100 % MFU")
    header = ("", "batch", "ms", "images/s", "GFLOPs/image", "MFU %", "MiB")
    print("{:24} {:>6} {:>9} {:>9} {:>13} {:>6} {:>8}".format(*header))
    for row in rows:
        print("{:24} {:6} {:9.1f} {:9,.1f} {:13.2f} {:6.1f} {:8,.0f}".format(*row))


def random_model(name):
    """HiVG of CLIP's size `name`, a key of SIZES, in stage 3, with random weights and the letters
    as vocabulary."""
    return HiVG(HiVGConfig(stage=3), CLIP(SIZES[name]), Tokenizer(io.StringIO("# no merges")))


def synthetic(model, count):
    """A batch of made-up items, as data.py gives them: expressions of 15 words, a third of the
    squares padding."""
    S = model.config.image_size
    padding = torch.zeros(count, S, S, dtype=torch.bool)
    padding[:, S * 5 // 6 :] = padding[:, : S // 6] = True
    images, boxes = torch.randn(count, 3, S, S), torch.tensor([[0.5, 0.5, 0.3, 0.4]] * count)
    batch = {"image": images, "padding": padding, "text": ["a b c d e f g h i j k l m n o"] * count}
    return batch | {"box": boxes, "object": torch.arange(count)}


@torch.inference_mode()
def inference_rows(model, batch_size, peak):
    """Rows of the benchmark: boxes of one image (poster, Fig. 6 a) and of a batch; images come from
    the CPU, boxes go back. The model is merged and frozen here."""
    # frozen: the counter of FLOPs stumbles over slices of parameters that are trained
    model.merge().eval().requires_grad_(False)
    device, rows = next(model.parameters()).device, []
    for count in dict.fromkeys((1, batch_size)):
        batch = synthetic(model, count)
        job = functools.partial(lambda batch: model(*inputs_of(model, batch)).boxes.cpu(), batch)
        rows.append(measured("inference", job, count, device, peak))
    return rows


def peak_memory(device):
    """Bytes: the most that tensors took on a CUDA device, else the most that the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    from resource import RUSAGE_SELF, getrusage  # not on Windows

    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ----------------------------------------------------------------------------------------- pictures

TRUE_COLOUR, FOUND_COLOUR = (30, 160, 60), (220, 40, 30)


def draw_box(image, box, colour):
    """Draw (x1, y1, x2, y2) in place."""
    width = max(1, round(max(image.size) / 120))
    ImageDraw.Draw(image).rectangle([round(v) for v in box], outline=colour, width=width)


def save(picture, path):
    """Write a PIL image in the format that the path's ending names. Raises HiVGError for an ending
    of no picture."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise HiVGError(f"{path} has no ending of a picture: name it .png or .jpg.")
    with replacing(path) as temporary:
        picture.save(temporary, kind)
    print(f"drawn into {path}")


def sheet(panels, columns, side=240):
    """One PIL image of many, in rows of `columns`: panels, a list of (PIL image, caption); each
    gets `side` pixels."""
    font = ImageFont.load_default(14)
    width, height, rows = side + 8, side + 44, -(-len(panels) // columns)
    drawn = Image.new("RGB", (columns * width, rows * height), "white")
    for place, (picture, caption) in enumerate(panels):
        x, y = place % columns * width, place // columns * height
        left, top, *size = data.letterbox((0, 0, *picture.size), side).inner
        drawn.paste(picture.resize(size), (x + 4 + left, y + 4 + top))
        lines = textwrap.wrap(caption, 34)[:2]
        ImageDraw.Draw(drawn).multiline_text((x + 4, y + side + 6), "\n".join(lines), "black", font)
    return drawn


def contact_sheet(dataset, found, true, read, path, count=24):
    """Write a picture of `count` predictions, evenly over the split, as the poster's Fig. 7: boxes
    as `predict` gives them.

    Green is the true box, red the one found; below each their IoU and the expression.
    """
    there, panels, overlaps = read.nonzero().flatten(), [], ious(found, true)
    for index in there[torch.linspace(0, len(there) - 1, min(count, len(there))).long()].tolist():
        sample = dataset.samples[index]
        picture = data.load_image(sample.image, upright=False)
        geometry = data.letterbox((0, 0, *picture.size), dataset.image_size)
        for boxes, colour in ((true, TRUE_COLOUR), (found, FOUND_COLOUR)):
            draw_box(picture, data.to_pixels(boxes[index], geometry).tolist(), colour)
        panels.append((picture, f"{overlaps[index]:.2f}  {sample.text}"))
    save(sheet(panels, columns=6), path)


NONE, HALF, MOST = (20, 30, 120), (220, 50, 40), (255, 235, 90)  # colours of attention


def overlay(image, weights, side):
    """A PIL image, grey, under the colours of attention: weights [g, g] over its padded square of
    `side` pixels."""
    geometry = data.letterbox((0, 0, *image.size), side)
    left, top, width, height = geometry.inner
    patch = side // len(weights)
    heat = np.kron(weights, np.ones((patch, patch)))[top : top + height, left : left + width]
    heat = Image.fromarray((255 * heat / heat.max()).astype(np.uint8))
    heat = heat.reduce(patch).resize((width, height), Image.BILINEAR)  # smooth
    picture = ImageOps.grayscale(data.cut(image, geometry)).convert("RGB")
    return Image.blend(picture, ImageOps.colorize(heat, NONE, MOST, HALF), 0.6)


def curve(logs):
    """Acc@0.5 over the epochs of runs, from their log.jsonl, as PIL image (poster, Fig. 6 d): a
    line for each run, with the name of its folder.

    Where a stage begins is a dotted line; what it begins with, epoch -1, stands there too. Raises
    HiVGError without matplotlib.
    """
    with explaining("Curves are drawn with matplotlib", "pip install matplotlib"):
        from matplotlib import pyplot
    pyplot.switch_backend("agg")  # no window
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    starts = set()  # (epochs before it, stage)
    names = {log: Path(log).absolute().parent.name.replace("$", r"\$") for log in logs}
    for log in logs:
        with explaining(f"{log} is no log of train.py", "name a run's log.jsonl"):
            lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
            done = np.cumsum([e["epoch"] >= 0 for e in lines])
            axes.plot(done, [e["acc"] for e in lines], ".-", label=names[log])
            axes.set(xlabel="epochs", ylabel=f"Acc@0.5 on {lines[-1]['split']}, %")
            starts |= {(d - 1, e["stage"]) for d, e in zip(done, lines) if e["epoch"] == 0}
    for epochs, stage in starts:
        title = {-1: "warm-up without bridges", 0: "warm-up"}.get(stage, f"stage {stage}")
        axes.axvline(epochs, color="grey", linestyle=":")
        axes.text(epochs, 1.02, title, rotation=30, transform=axes.get_xaxis_transform())
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def evaluate_splits(model, checkpoint, name, splits, data_root, output, workers=0, skip_bad=False):
    """Evaluate splits of a data set, by default all but train; print the table, write a contact
    sheet for each split and results_NAME.json, or results_NAME_SPLIT.json for splits that were
    asked for, into `output`. skip_bad: leave out pictures that cannot be read."""
    rows, config, results = [], model.config, "_".join(["results", name, *(splits or ())])
    with first_process_first():
        there = data.available_splits(name, data_root)
        writable(output)
    splits = splits or [split for split in there if split != "train"]
    if not splits:
        raise data.nothing_of(name, "val", data_root)
    picture = dict(image_size=config.image_size, mean=config.mean, std=config.std)
    read = functools.partial(data.GroundingDataset, name, data_root=data_root, skip_bad=skip_bad)
    for dataset in [read(split=split, **picture) for split in splits]:
        boxes = predict(model, dataset, workers=workers)
        rows.append(summary(dataset, *boxes))
        if rank():
            continue
        for note in dataset.report:
            print(f"{dataset.split}: {note}")
        if "skipped" in rows[-1]:
            print("{split}: {skipped:,} skipped: no readable picture".format(**rows[-1]))
        contact_sheet(dataset, *boxes, output / f"{name}_{dataset.split}.png")
    if rank():
        return
    print(table(rows))
    content = {"checkpoint": str(checkpoint), "dataset": name, "results": rows}
    write_text(output / f"{results}.json", json.dumps(content, indent=2) + "\n")
    print(f"written to {output}: {results}.json")


# ------------------------------------------------------------------------------------- command line


def at_least(low, kind=int):
    """argparse's type of a number from `low` on."""

    def number(text):
        value = kind(text)
        if not low <= value < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is no number from {low} on")
        return value

    return number


def run(args):
    if args.curve:
        return save(curve(args.curve), args.output or "curve.png")
    with (
        joined(args.device) as device,
        torch.autocast(device.type, torch.bfloat16, enabled=args.bf16),
    ):
        name = str(args.checkpoint)
        made_up = args.benchmark and name in SIZES
        model = random_model(name) if made_up else load_model(name)[0]
        model.to(device)
        if args.benchmark:
            benchmark(model, name, args.batch_size, args.bf16)
        elif args.dataset is not None:
            where = args.split, args.data_root, Path(args.output or args.checkpoint.parent)
            how = args.workers, args.skip_bad_images
            evaluate_splits(model.merge(), name, args.dataset, *where, *how)
        else:
            show(model.merge(), args)


def benchmark(model, name, batch_size, bf16):
    """Print size and speed of a model, a checkpoint's or of random weights."""
    device = next(model.parameters()).device
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    counts = sum(n for n, trained in parameters if trained), sum(n for n, _ in parameters)
    print("parameters trained in stage {}: {:,} of {:,}".format(model.config.stage, *counts))
    dtype = torch.bfloat16 if bf16 else torch.float32
    peak = matrix_peak(device, dtype)
    print(f"{name} on {device}, {dtype}; ", end="")
    print_benchmark(inference_rows(model, batch_size, peak), peak)


def show(model, args):
    """Find each text in a photograph and draw it; with --attention also where the model looked."""
    image, panels = data.load_image(args.image), []
    for text in args.text:
        box, found = ground(model, image, text), image.copy()
        print(f"{args.image}: {text}: " + " ".join(f"{value:.1f}" for value in box))
        draw_box(found, box, FOUND_COLOUR)
        panels.append((found, text))
        if args.attention:
            for name, weights in attention_maps(model, image, text).items():
                panels.append((overlay(image, weights, model.config.image_size), name))
    picture = sheet(panels, columns=len(panels) // len(args.text)) if args.attention else found
    if rank() == 0:
        save(picture, args.output or Path(args.image).stem + "_found.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawText)
    add = parser.add_argument
    one_of = parser.add_mutually_exclusive_group(required=True).add_argument
    add("checkpoint", nargs="?", type=Path, help="of train.py or HiVG's authors, or a CLIP's name")
    one_of("--dataset", help=f"evaluate this data set, one of {', '.join(data.DATASETS)}")
    add("--split", nargs="+", help="these splits of it (default: all but train)")
    add("--data-root", default="data", help="folder of the data sets (default: data)")
    one_of("--image", help="or find something in this photograph")
    add("--text", nargs="+", help="what to find there; with --attention one text or more")
    add("--attention", action="store_true", help="draw where the model looked, a row for each text")
    one_of("--benchmark", action="store_true", help="or measure speed, size and cost")
    add("--batch-size", type=at_least(1), default=32, help="of --benchmark (default: 32)")
    add("--bf16", action="store_true", help="faster on many GPUs; boxes differ a little")
    add("--skip-bad-images", action="store_true", help="leave out what cannot be read")
    one_of("--curve", nargs="+", metavar="LOG", help="or draw the curves of runs' log.jsonl")
    add("--output", help="the picture to draw, or the folder of a data set's results")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--workers", type=at_least(0), default=0, help="processes that read photographs")
    args = parser.parse_intermixed_args()
    rules = {
        "give a CHECKPOINT, but none for --curve": bool(args.checkpoint) != bool(args.curve),
        "--image and --text belong together": bool(args.image) == bool(args.text),
        "--attention is for --image": bool(args.image) or not args.attention,
        "without --attention give one --text": args.attention or len(args.text or ()) <= 1,
        "--split is for --dataset": bool(args.dataset) or not args.split,
    }
    for broken in [rule for rule, holds in rules.items() if not holds]:
        parser.error(broken)
    exit_with(run, args)


if __name__ == "__main__":
    main()
