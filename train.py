"""Training: a warm-up and the stages of HiLoRA, each from the best of the one before.

    python train.py --dataset shapes             # two CPU cores, nothing to download
    python train.py --dataset refcoco            # data/ has COCO's pictures and refer's files
    python train.py --dataset refcoco --resume   # go on where that run was stopped
    torchrun --standalone --nproc_per_node=4 train.py --dataset refcoco
    python train.py --benchmark                  # how fast it is here

Reading order: PRESETS (epochs, rates, batches, sizes), shapes_clip (a small CLIP, where there is
none to download), train_step, train_epoch, train_stage, train_and_evaluate (the whole job), main
(the flags).

What a run writes into --output: best.pt (stands alone), last.pt (to resume from), log.jsonl (a line
for each epoch), config.json (what was used), results_DATASET.json and a contact sheet for each
split.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter as RawText
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import islice, zip_longest
from operator import add, mul
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.benchmark import Timer
from tqdm import tqdm

import clip_model
import data
import evaluate
import hivg
from clip_model import CLIP, CLIPConfig, HiVGError, Tokenizer, exit_with, explaining
from evaluate import at_least, first_process_first, inputs_of, joined, processes, rank, write_text
from hivg import LOSS_WEIGHTS, TEXT_LAYERS, HiVG, HiVGConfig, load_model, losses, save_checkpoint


class Preset(NamedTuple):
    """Epochs, top learning rate and batch size of the warm-up and of stages 1 to 3; epochs of a
    warm-up without bridges before them, at the warm-up's rate; AdamW's betas; fields of HiVGConfig
    to change."""

    epochs: tuple
    rates: tuple
    batches: tuple
    without_bridges: int = 0
    betas: tuple = (0.9, 0.999)
    model: dict = {}


SMALL = dict(bridge_layers=(2, 3), grounding_layers=3, heads=4, feedforward=256, region_width=256)
SHAPES = Preset(
    epochs=(3, 1, 1, 1),
    rates=(8e-4, 4.5e-4, 3.5e-4, 3e-4),
    batches=(64,) * 4,
    betas=(0.9, 0.98),
    model=SMALL | dict(dropout=0.0, lora_dropout=0.0),
)
RATES, MIXED_RATES = (2.5e-4, 1e-4, 5e-5, 2.5e-5), (2.5e-4, 1e-4, 5e-5, 2e-5)
PRESETS = {  # by size of CLIP and data set, else by size alone (D15)
    "base": Preset((60, 20, 20, 20), RATES, (80, 60, 60, 40)),
    "base-flickr30k": Preset((30, 5, 5, 5), RATES, (80, 60, 60, 40)),
    "base-mixture": Preset((60, 20, 20, 20), MIXED_RATES, (64,) * 4),
    "large": Preset((60, 10, 10, 10), RATES, (32,) * 4, 10),
    "large-referit": Preset((60, 10, 10, 10), RATES, (32,) * 4, 5),
    "large-flickr30k": Preset((30, 5, 5, 5), RATES, (32,) * 4, 10),
    "large-mixture": Preset((30, 10, 10, 10), MIXED_RATES, (32,) * 4, 10),
    "shapes": SHAPES,
    "shapes-long": SHAPES._replace(epochs=(9, 3, 3, 3)),
}
VOCABULARIES = ("bpe_vocab.txt.gz", "bpe_simple_vocab_16e6.txt.gz")  # looked for beside a CLIP
PARTS = {  # of the model, by the names of their parameters: the first that matches
    "LoRA pairs": r"\.lora_",
    "CLIP": r"^clip\.",
    "bridges": r"^(bridges|mixed_proj)\.",
    "heads": r"^(box_head|region)",
    "grounding encoder": "",
}
WEIGHT_DECAY = 1e-4
MAX_NORM = 1.0  # of the gradient (D5)
# the rate rises to its top in so many steps of a stage, or in a tenth of it if that is less (D4)
WARMUP_STEPS = 200
READ_EVERY = 20  # steps: to look at the losses, the CPU has to wait for the GPU
SAVE_EVERY = 600  # seconds within an epoch

SHAPES_CLIP = CLIPConfig(  # images of 80 pixels, patches of 16
    80, 16, vision_width=128, vision_layers=3, text_width=128, text_layers=3, embed_dim=128
)
SHAPES_CLIP_STEPS, SHAPES_CLIP_BATCH, SHAPES_CLIP_RATE = 1000, 64, 1.5e-3


def rate(step, steps, top):
    """The learning rate of step s = 0 .. S - 1 of a stage, a linear rise and a cosine to 0 (D4):
    top min(1, (s + 1) / w) (1 + cos(pi s / S)) / 2, w = min(200, 1 + S / 10)."""
    rise = min(1, (step + 1) / min(WARMUP_STEPS, 1 + steps / 10))
    return top * rise * (1 + math.cos(math.pi * step / steps)) / 2


def update(optimizer, learning_rate, loss):
    """One optimiser step with the gradients there are, clipped to MAX_NORM; then they are cleared.

    If the loss or a gradient is not finite, nothing changes. Returns whether it is, a bool tensor:
    nothing waits for a GPU.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
    finite = torch.isfinite(loss + norm)
    optimizer.found_inf = (~finite).float()  # a fused optimiser does nothing where this is 1
    optimizer.step()
    optimizer.zero_grad()
    return finite


def bf16_pays(device):
    """Whether bf16 is faster than fp32 on this device: a CPU is timed on a matrix product, as some
    only imitate it."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    ones = torch.ones(1024, 1024)
    timer = partial(Timer, "a @ a", num_threads=torch.get_num_threads())
    slow, fast = (timer(globals={"a": a}).timeit(20).median for a in (ones, ones.bfloat16()))
    return slow > 2 * fast  # twice: casting to and fro costs as well


def see_patches(visual, images):
    """Start an image tower with a patch embedding that keeps what patches show, and keep it: images
    [n, 3, S, S].

    Its rows are the patches' principal components, each scaled to variance 1, so that edges count
    as much as colour: a patch embedding learned in so few steps sees colours and hardly any kinds.
    Positions start as sines and cosines.
    """
    width, _, patch, _ = visual.conv1.weight.shape
    patches = F.unfold(images, patch, stride=patch).transpose(1, 2).flatten(0, 1)  # [n N, 3 P^2]
    variances, components = torch.linalg.eigh(torch.cov(patches.T))  # ascending; [3 P^2, 3 P^2]
    rows = (components / variances.sqrt()).T[-width:]  # [d_v, 3 P^2]
    visual.conv1.weight = nn.Parameter(rows.reshape(visual.conv1.weight.shape), False)
    positions = hivg.grid_positions(images.shape[-1] // patch, width) - rows @ patches.mean(dim=0)
    visual.positional_embedding.data[1:] += positions


def shapes_clip(folder, seed, device, context):
    """Path of a small CLIP for the shapes data set in `folder`, trained now if it is not there yet.

    Contrastive, as CLIP was: whole train scenes against captions of what is in them, no boxes. It
    therefore knows scenes better than regions, the gap in granularity that the poster starts from
    (Fig. 1).
    """
    path = folder / f"clip_{seed}.pt"
    if path.exists():
        return path
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = Tokenizer(folder / "bpe_vocab.txt.gz")
    captions = json.loads((folder / "captions.json").read_text())
    names = np.array(list(captions))

    load = cache(data.load_image)  # a scene comes up about three times

    def read(files):  # names of pictures -> [n, 3, S, S]
        scenes = (load(folder / "images" / file) for file in files)
        return torch.stack([data.prepare(s, SHAPES_CLIP.image_size)[0] for s in scenes])

    clip = CLIP(replace(SHAPES_CLIP, vocab_size=tokenizer.vocab_size))
    see_patches(clip.visual, read(names[:1500]))
    clip.to(device).train()
    trained = [p for p in clip.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    bar = tqdm(range(SHAPES_CLIP_STEPS), "training CLIP on scenes and captions")
    for step in bar:
        batch = rng.choice(names, SHAPES_CLIP_BATCH, replace=False)
        texts = [str(rng.choice(captions[name])) for name in batch]
        tokens = data.cut_to_longest(tokenizer(texts))
        with context():
            logits = clip(read(batch).to(device), tokens.to(device)).float()  # [batch, batch]
        target = torch.arange(len(batch), device=device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()
        update(optimizer, rate(step, SHAPES_CLIP_STEPS, SHAPES_CLIP_RATE), loss.detach())
        if step % 20 == 0:
            right = (logits.argmax(dim=1) == target).float().mean()
            bar.set_postfix(loss=f"{loss.item():.2f}", right=f"{right:.2f}")
    if not math.isfinite(loss.item()):
        raise HiVGError(f"The training of CLIP came to nothing: a loss of {loss.item()}.")
    clip_model.save_clip(clip, path)
    return path


def tokenizer_for(clip_path, vocab_size):
    """The tokenizer of a CLIP: the vocabulary that lies beside its file, else CLIP's own."""
    beside = [Path(clip_path).with_name(name) for name in VOCABULARIES]
    found = next((path for path in beside if path.is_file()), None)
    tokenizer = Tokenizer(found) if found else clip_model.clip_tokenizer()
    if tokenizer.vocab_size != vocab_size:
        what = f"{clip_path} is not for the vocabulary of {found or 'CLIP'}"
        raise HiVGError(f"{what}: put its own beside it as {beside[0].name}.")
    return tokenizer


def account(model):
    """The parameters by what they belong to, trained and in all, as lines of text."""
    counts = {group: [0, 0] for group in (*PARTS, "together")}
    for name, parameter in model.named_parameters():
        part = next(part for part, pattern in PARTS.items() if re.search(pattern, name))
        for group in (part, "together"):
            counts[group][0] += parameter.numel() * parameter.requires_grad
            counts[group][1] += parameter.numel()
    lines = [f"{group:18} {trained:12,} {total:12,}" for group, (trained, total) in counts.items()]
    return "\n".join([f"{'parameters':18} {'trained':>12} {'total':>12}", *lines])


class Progress(NamedTuple):
    """Where a run stands; kept in last.pt, so that --resume goes on from there."""

    stage: int = 0  # -1: the warm-up without bridges
    epoch: int = -1  # the one to do next; -1: look at what the stage begins with, train nothing
    best: float = -1.0  # best Acc@0.5 of the stage so far
    log: tuple = ()  # lines of log.jsonl
    step: int = 0  # of the epoch, the one to do next
    sums: tuple = (0.0,) * len(LOSS_WEIGHTS)  # of the losses over the epoch's steps so far
    skipped: int = 0  # samples of the epoch whose pictures could not be read


def from_all(x):
    """x [B, ...] of all processes, one after the other; gradients flow into this one's own."""
    if processes() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(processes())]
    dist.all_gather(parts, x.detach())
    parts[rank()] = x
    return torch.cat(parts)


def summed(*numbers):
    """The sums of some numbers over all processes, which wait for one another here."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    if processes() > 1:
        dist.all_reduce(sums)
    return sums.tolist()


def train_step(parallel, batches, optimizer, learning_rate, weights, context):
    """One step down the mean gradient over some batches, one after the other (accumulation), and
    over all processes.

    parallel: HiVG, or DistributedDataParallel around it. batches: dicts as data.py gives them.
    weights: of the losses. Returns the losses' means, [len(weights)], NaN where one or the gradient
    is not finite: then the step has changed nothing. They are on the device still: nothing here
    waits for a GPU.
    """
    model, means = getattr(parallel, "module", parallel), 0
    for number, batch in enumerate(batches, start=1):
        # DistributedDataParallel takes the mean over processes in the last backward pass alone
        early = parallel is not model and number < len(batches)
        images, tokens, padding = inputs_of(model, batch)
        boxes, objects = (batch[n].to(images.device, non_blocking=True) for n in ("box", "object"))
        with parallel.no_sync() if early else nullcontext():
            with context():
                output = parallel(images, tokens, padding, for_losses=True)
            # L_CLC compares the samples of all processes
            output.image_vectors = from_all(output.image_vectors)
            output.text_vectors = from_all(output.text_vectors)
            parts = losses(output, boxes, from_all(objects), model.clip.logit_scale)
            # each has its own part only of L_CLC's gradient: their sum is needed, not their mean
            scale = {"clc": processes()}
            loss = sum(weights[n] * scale.get(n, 1) * parts[n] for n in weights) / len(batches)
            loss.backward()
        means = means + torch.stack([parts[n] for n in weights]).detach() / len(batches)
    if processes() > 1:
        dist.all_reduce(means)
        means = means / processes()
    finite = update(optimizer, learning_rate, means.sum())
    return means.where(finite, math.nan)


def train_epoch(model, loader, order, optimizer, rates, progress, args, context, save):
    """The rest of an epoch, from progress.step on.

    order: the batches, see data.shuffled; loader: reads those of this process; rates: a learning
    rate for each step of the epoch; save(progress) writes a checkpoint. Returns the progress, which
    has the sums of the losses.
    """
    stage, epoch, each = progress.stage, progress.epoch, args.accumulate
    loader.batch_sampler[:] = order[progress.step * each :, rank()].tolist()
    fetched, unread, saved = iter(loader), [], time.time()
    title, steps = f"stage {stage}, epoch {epoch}", range(progress.step, len(rates))
    bar = tqdm(steps, title, len(rates), initial=progress.step, leave=False, disable=rank() > 0)
    for step in bar:
        torch.manual_seed(data.seed_from(args.seed, 1 + stage, epoch, step, rank()))  # of dropout
        batches = list(islice(fetched, each))
        unread.append(train_step(model, batches, optimizer, rates[step], args.losses, context))
        bad = sum(int((~batch["read"]).sum()) for batch in batches)
        stopping, bad = summed(bool(STOP), bad)
        progress = progress._replace(skipped=progress.skipped + int(bad))
        due = stopping or step + 1 == len(rates) or time.time() > saved + SAVE_EVERY
        if due or step % READ_EVERY == 0:
            for past, values in enumerate(torch.stack(unread).tolist(), progress.step):
                if not all(map(math.isfinite, values)):
                    numbers = order[past * each :][:each].flatten().tolist()
                    raise not_finite(f"{title}, step {past}", loader.dataset, numbers)
                sums = tuple(map(add, progress.sums, values))
                progress = progress._replace(step=past + 1, sums=sums)
            unread = []
            bar.set_postfix(loss=f"{sum(map(mul, args.losses.values(), values)):.2f}")
        if due:
            save(progress)
            saved = time.time()
        if stopping:
            raise KeyboardInterrupt(RESUME)
    return progress


def not_finite(where, dataset, numbers):
    """The error that says in which step the loss or its gradient was not finite, and for which
    samples."""
    samples = [dataset.samples[number] for number in numbers]
    names = ", ".join(f"{Path(s.image).name} {s.text!r}" for s in samples)
    what = f"The loss or its gradient is not finite in {where}, which has changed nothing"
    return HiVGError(f"{what}: try a lower --lr, or look at its samples, {names}.")


STOP = []  # when signals came
RESUME = "the same command with --resume goes on from here"


@contextmanager
def gentle_signals():
    """Inside, the first Ctrl-C or SIGTERM is noted in STOP, so that the step can come to its end
    and a checkpoint be written; a second one ends the process at once."""

    def ask(number, frame):
        # what a terminal has sent to all processes, torchrun sends them once more
        if STOP and (processes() == 1 or time.time() > STOP[0] + 1):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        STOP.append(time.time())
        print("stopping after this step; once more: at once", file=sys.stderr, flush=True)

    usual = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        STOP.clear()
        for number, handler in usual.items():
            signal.signal(number, handler)


def start(args, device, context):
    """A new model on the device: CLIP read (or, for shapes, trained) and HiVG built around it. What
    `args` leave open is filled in, from the preset for this CLIP and these data sets."""
    clip_path = args.clip or "ViT-B/16"
    if args.dataset == ["shapes"] and not args.clip:
        clip_path = shapes_clip(Path(args.data_root) / "shapes", args.seed, device, context)
    clip = clip_model.load_clip(str(clip_path))
    tokenizer = tokenizer_for(clip_path, clip.config.vocab_size)
    torch.manual_seed(args.seed)
    kind = "mixture" if len(args.dataset) > 1 or args.dataset == ["mixup"] else args.dataset[0]
    size = "large" if clip.config.vision_layers == 24 else "base"
    usual = next(n for n in (kind, f"{size}-{kind}", size) if n in PRESETS)
    args.preset = args.preset or usual
    preset = PRESETS[args.preset]
    if args.without_bridges is None:
        args.without_bridges = preset.without_bridges
    # one value is for all stages; G may be more or less than the preset's 3
    presets = {"epochs": preset.epochs, "lr": preset.rates, "batch_size": preset.batches}
    for name, values in presets.items():
        values = getattr(args, name) or values
        setattr(args, name, [*values, *values[-1:] * args.groups][: 1 + args.groups])
    authors_name = data.DATASETS[args.dataset[0]].files.get("index", "").split("/")[0]
    counted = () if kind == "mixture" else TEXT_LAYERS.get(authors_name, (12,))  # as if of twelve
    text_layers = tuple(math.ceil(i * clip.config.text_layers / 12) for i in counted)
    fields = {f: v for f, v in vars(args).items() if hasattr(HiVGConfig, f)}
    chosen = {field: value for field, value in fields.items() if value is not None}
    config = HiVGConfig(**{"text_layers": text_layers} | preset.model | chosen)
    return HiVG(config, clip, tokenizer).to(device)


def run(args):
    """Train or measure, alone or as one of several processes."""
    with joined(args.device) as device:
        (benchmark if args.benchmark else train_and_evaluate)(args, device)


def has_room(output, model):
    """Raises HiVGError if a folder's disk has no room for the checkpoints of a model."""
    # best.pt, last.pt and the next one, these two with AdamW's two moments of what is trained
    copies = ((p, 7 if p.requires_grad else 3) for p in model.parameters())
    needed = sum(count * p.numel() * p.element_size() for p, count in copies)
    if shutil.disk_usage(output).free < needed:
        what = f"{output} has no room for checkpoints, which take up to {needed / 1e9:.1f} GB"
        raise HiVGError(f"{what}: free some, or name another --output.")


def resumed(last, args):
    """(settings, model, progress, state of the optimizer) of a run, from its last.pt. What the
    settings in it lack is taken from `args`."""
    model, content = load_model(last)
    with explaining(f"{last} is nothing to resume from", "name the --output of a run"):
        now = {"resume": True, "output": str(last.parent)}
        args = argparse.Namespace(**vars(args) | content["settings"] | now)
        found = args, model, Progress(**content["progress"]), content["optimizer"]
        before = args.processes
        if args.preset not in PRESETS:
            raise ValueError(f"there is no preset {args.preset}")
    if before != processes():
        raise HiVGError(f"{last} is of a run of {before} processes: start as many.")
    return found


def introduce(args, model, train_set, read, splits, device):
    """Print a short account of what is going to happen. splits: {data set: those that are there};
    read: of data set and split."""
    names, precision = ", ".join(args.dataset), "bf16" if args.bf16 else "fp32"
    print(f"{names} from {args.data_root} into {args.output}, on {device} in {precision}")
    for name in args.dataset:
        source = data.DATASETS[name]
        for split, published in zip_longest(source.splits.split(), source.counts):
            there = read(name, split) if split in splits[name] else None
            words = [f"{len(there):,} expressions", *there.report] if there else ["not there"]
            words += [f"published: {published:,}"] if published else []
            print(f"  {name} {split:6} {'; '.join(words)}")
    if len(args.dataset) > 1:
        print(f"  together {len(train_set):,} to train on; {'; '.join(train_set.report)}")
    print(f"adapters {model.config.adapters}; losses {args.losses}")
    print(f"epochs {args.without_bridges} without bridges, then by stage {args.epochs}; ", end="")
    print(f"rates {args.lr}, batches {args.batch_size}", end="")
    print(f" on each of {processes()} processes, {args.accumulate} for a step")
    print(account(model), flush=True)


def train_stage(model, loader, val_set, args, progress, optimizer_state, context):
    """Stage progress.stage from progress.epoch on. Writes best.pt, last.pt and the log into the
    run's folder; returns the progress.

    loader: of data.batches; optimizer_state: where a run is resumed, else None.
    """
    output, train_set, stage = Path(args.output), loader.dataset, progress.stage
    number = max(0, stage)  # a warm-up without bridges has the warm-up's rate and batches
    epochs = args.epochs[stage] if stage >= 0 else args.without_bridges
    most = len(train_set) // (processes() * args.accumulate)
    if not most:
        what = f"{len(train_set)} expressions are too few for {processes()} processes"
        raise HiVGError(f"{what} with --accumulate {args.accumulate}: take fewer.")
    size, top = min(args.batch_size[number], most), args.lr[number]
    torch.manual_seed(data.seed_from(args.seed, 1 + stage))  # of new pairs
    model.enter_stage(stage)
    model.checkpointing = args.checkpointing
    if args.compile:
        torch.compiler.reset()  # it stops compiling what has changed too often
        model.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    settings = dict(betas=PRESETS[args.preset].betas, weight_decay=WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(trained, top, fused=True, **settings)
    if optimizer_state:
        with explaining(f"The optimizer in {output / 'last.pt'} is another one's", "start anew"):
            optimizer.load_state_dict(optimizer_state)
    parallel = model
    if processes() > 1:
        parallel = DistributedDataParallel(model, forward_sync_buffers=False)

    def save(progress):
        if rank() == 0:
            state = dict(progress=progress._asdict(), optimizer=optimizer.state_dict())
            save_checkpoint(output / "last.pt", model, settings=vars(args), **state)

    for epoch in range(progress.epoch, epochs):
        began, line = time.time(), {"stage": stage, "epoch": epoch}
        if epoch >= 0:
            numbers = args.seed, 1 + stage, epoch
            train_set.set_epoch(*numbers)
            order = data.shuffled(numbers, len(train_set), size, processes())
            steps = len(order) // args.accumulate
            places = range(epoch * steps, (epoch + 1) * steps)
            rates = [rate(place, epochs * steps, top) for place in places]
            progress = train_epoch(
                parallel.train(), loader, order, optimizer, rates, progress, args, context, save
            )
            means = (round(total / steps, 4) for total in progress.sums)
            line["losses"] = dict(zip(args.losses, means))
            line |= {"train_skipped": progress.skipped} if progress.skipped else {}
        try:
            line |= evaluate.evaluate(model, val_set, args.workers)
        except RuntimeError:
            if STOP:  # a signal that has ended its workers, too
                raise KeyboardInterrupt(RESUME) from None
            raise
        line["seconds"] = round(time.time() - began, 1)
        acc, best_yet = line["acc"], max(progress.best, line["acc"])
        progress = Progress(stage, epoch + 1, best_yet, (*progress.log, line))
        if rank() == 0:
            if acc == best_yet:  # of equals the later one
                save_checkpoint(output / "best.pt", model)
            lines = (json.dumps(entry) + "\n" for entry in progress.log)
            write_text(output / "log.jsonl", "".join(lines))
        save(progress)
        what = f"after epoch {epoch}" if epoch >= 0 else "begins"
        what += f" ({line['train_skipped']} skipped)" if "train_skipped" in line else ""
        print(f"stage {stage} {what}: {args.select} Acc@0.5 {acc:.2f} %", flush=True)
        if any(summed(bool(STOP))):
            raise KeyboardInterrupt(RESUME)
    return progress


def train_and_evaluate(args, device):
    """The whole job: data, model, the warm-up and the stages, the evaluation of the best."""
    output, optimizer_state = Path(args.output), None
    last, best = output / "last.pt", output / "best.pt"
    if args.resume and not last.exists():
        raise HiVGError(f"There is no {last} to resume from: start without --resume.")
    if args.resume:
        args, model, progress, optimizer_state = resumed(last, args)
    elif last.exists():
        raise HiVGError(f"{last} is of an earlier run: give --resume, or another --output.")
    else:
        args.processes = processes()
        args.bf16 = not any(summed(not bf16_pays(device)))
    context = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)
    with first_process_first():
        splits = {name: data.available_splits(name, args.data_root) for name in args.dataset}
        if rank() == 0:
            evaluate.writable(output)
            for half in output.glob(".*.part"):  # of an earlier run
                half.unlink()
        if not any(args.select in there for there in splits.values()):
            raise data.nothing_of(args.dataset[0], args.select, args.data_root)
        if not args.resume:
            model = start(args, device, context)
            progress = Progress(stage=-1 if args.without_bridges else 0)
    model.to(device).enter_stage(progress.stage)
    config = model.config
    picture = dict(image_size=config.image_size, mean=config.mean, std=config.std)
    read = partial(data.GroundingDataset, data_root=args.data_root, **picture)
    read_quickly = partial(read, cache=not args.augment, skip_bad=args.skip_bad_images)
    train_set = read_quickly(args.dataset, "train", augment=args.augment)
    val_set = read_quickly(args.dataset, args.select)
    introduce(args, model, train_set, read, splits, device)
    if not args.resume:
        has_room(output, model)
    if rank() == 0:
        used = {"settings": vars(args), "model": asdict(config)}
        write_text(output / "config.json", json.dumps(used, indent=2))

    signals = signal.SIGINT, signal.SIGTERM
    loader = data.batches(train_set, [], args.workers, device.type == "cuda", signals)
    with gentle_signals():
        while progress.stage < len(args.epochs):
            progress = train_stage(model, loader, val_set, args, progress, optimizer_state, context)
            model, optimizer_state = load_model(best)[0].to(device), None  # (D13)
            progress = Progress(progress.stage + 1, log=progress.log)

    model = load_model(best)[0].to(device).merge()
    for name in args.dataset:
        evaluate.evaluate_splits(
            model, best, name, None, args.data_root, output, args.workers, args.skip_bad_images
        )


def benchmark(args, device):
    """Print what a step of stage 3, inference and reading take, on made-up input and with random
    weights."""
    if processes() > 1:
        raise HiVGError("--benchmark is for one process: leave torchrun out.")
    bf16 = bf16_pays(device)
    dtype = torch.bfloat16 if bf16 else torch.float32
    context = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    name, size = args.clip or "ViT-B/16", args.batch_size[0] if args.batch_size else 8
    if name not in clip_model.SIZES:
        raise HiVGError(f"{name} is no size of CLIP: choose one of {', '.join(clip_model.SIZES)}.")
    model = evaluate.random_model(name).to(device)
    model.checkpointing = args.checkpointing
    if args.compile:
        model.compile()
    peak, rows = evaluate.matrix_peak(device, dtype), []
    batch = evaluate.synthetic(model, size)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-6, fused=True)
    step = partial(train_step, model.train(), [batch], optimizer, 1e-6, LOSS_WEIGHTS, context)
    rows.append(evaluate.measured("training step, stage 3", step, size, device, peak))
    with context():
        rows += evaluate.inference_rows(model, size, peak)
    with tempfile.TemporaryDirectory() as folder:
        coarse = np.random.default_rng(0).integers(256, size=(24, 32, 3), dtype="u1")
        Image.fromarray(coarse).resize((640, 480)).save(Path(folder, "a.jpg"), quality=90)
        line = json.dumps({"image": "a.jpg", "text": "a", "box": [200, 100, 400, 300]})
        Path(folder, "train.jsonl").write_text(f"{line}\n" * 256)
        read = partial(data.GroundingDataset, "own", "train", folder, model.config.image_size)
        for workers in (0, min(8, os.cpu_count())):
            lists = torch.arange(256).view(-1, 32).tolist()
            loader = data.batches(read(augment=True), lists, workers, device.type == "cuda")
            what = f"reading, {workers} workers" if workers else "reading, one core"
            rows.append(evaluate.measured(what, partial(list, loader), 256, device, peak))
    print(f"{name} on {device}, {dtype}; ", end="")
    evaluate.print_benchmark(rows, peak)
    hours = sum(PRESETS["base"].epochs) * data.DATASETS["refcoco"].counts[0] / rows[0][3] / 3600
    print(f"at this speed the steps of RefCOCO's whole schedule take {hours:,.1f} hours")


def loss_weight(text):
    """argparse's type of NAME=WEIGHT, one of the losses."""
    name, _, weight = text.partition("=")
    if name not in LOSS_WEIGHTS:
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(LOSS_WEIGHTS)}")
    return name, at_least(0, float)(weight)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawText)
    add = parser.add_argument
    # data and weights
    one_of = parser.add_mutually_exclusive_group(required=True).add_argument
    one_of("--dataset", nargs="+", help=f"one or several of {', '.join(data.DATASETS)}")
    one_of("--benchmark", action="store_true", help="or measure speed, of --clip's size, by itself")
    add("--data-root", default="data", help="folder of the data sets (default: data)")
    add("--clip", help="CLIP's name or file (default: ViT-B/16; shapes: one trained first)")
    add("--image-size", type=at_least(1), help="side of the square in pixels (default: CLIP's)")
    add("--no-augment", action="store_true", help="photographs as they are, kept in memory")
    add("--skip-bad-images", action="store_true", help="go on without those that cannot be read")
    # what is trained, and how long: one value for all stages, or one for each
    add("--preset", choices=PRESETS, help="defaults of the following (default: by CLIP and data)")
    add("--epochs", type=at_least(0), nargs="+", help="of the warm-up and stages 1 to G; 0: none")
    add("--lr", type=at_least(0, float), nargs="+", help="top learning rates")
    add("--batch-size", type=at_least(1), nargs="+", help="expressions in a batch, of one process")
    add("--accumulate", type=at_least(1), default=1, help="batches for each step (default: 1)")
    add("--without-bridges", type=at_least(0), help="epochs of a warm-up without bridges, before")
    add("--loss", type=loss_weight, nargs="+", metavar="NAME=WEIGHT", help=", ".join(LOSS_WEIGHTS))
    add("--select", default="val", help="split that chooses the best epoch (default: val)")
    # the model: ablations
    add("--adapters", choices=HiVGConfig.ADAPTERS, help="of the image tower (default: hilora)")
    add(
        "--groups",
        type=at_least(1),
        default=3,
        help="G of HiLoRA, and the number of stages (default: 3)",
    )
    add("--rank", type=at_least(1), help="of LoRA (default: 32)")
    add("--targets", nargs="+", help="of LoRA: attn.in_proj attn.out_proj (default) and the like")
    add("--visual-layers", type=at_least(1), nargs="+", help="V, the multi-level features")
    add("--bridge-layers", type=at_least(1), nargs="+", help="C, the layers with a bridge")
    add("--no-bridges", dest="bridge_layers", action="store_const", const=())
    add("--text-layers", type=at_least(1), nargs="+", help="f^i that the bridges read")
    # memory and speed
    add("--checkpointing", action="store_true", help="less memory, longer steps: layers run twice")
    add("--compile", action="store_true", help="let torch.compile make the steps faster")
    # the run
    add("--output", help="folder of checkpoints and log (default: runs/DATASET)")
    add("--resume", action="store_true", help="go on from OUTPUT/last.pt, with its settings")
    add("--seed", type=at_least(0), default=0, help="of all that is random (default: 0)")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--workers", type=at_least(0), help="processes that read photographs (default: 8 at most)")
    args = parser.parse_args()
    args.dataset = list(dict.fromkeys(args.dataset or ()))
    shapes = args.dataset == ["shapes"]
    args.augment = not (shapes or args.no_augment)  # shapes are kept in memory: there are plenty
    args.output = args.output or f"runs/{'_'.join(args.dataset)}"
    if args.workers is None:
        args.workers = min(8, os.cpu_count()) if args.augment else 0
    args.losses = LOSS_WEIGHTS | dict(args.loss or ())
    for name in ("epochs", "lr", "batch_size"):
        if len(getattr(args, name) or ()) not in (0, 1, 1 + args.groups):
            parser.error(f"--{name.replace('_', '-')} takes one value or {1 + args.groups}")
    exit_with(run, args)


if __name__ == "__main__":
    main()
