"""Training: a warm-up and the stages of HiLoRA, each from the best epoch of the one before.

    python train.py --dataset shapes             # two CPU cores, nothing to download
    python train.py --dataset refcoco            # data/ has COCO's images and refer's files
    python train.py --dataset refcoco --resume   # continue a run that was stopped, or start it
    torchrun --standalone --nproc_per_node=4 train.py --dataset refcoco

Reading order: PLANS, learning_rate, train_step (one step: forward, losses, backward, clipping,
optimiser), train (the loops over stages, epochs and steps), building the model, the CLIP for
shapes, and the command line. All settings are the command line's `args`; last.pt keeps them.

A run writes into --output: best.pt (the best epoch of the latest stage; it stands alone), last.pt
(to resume from), log.jsonl (a line for each epoch), and after its last epoch, for each split but
train, accuracies in results_DATASET.json, the boxes and a contact sheet.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

import data
from clip_model import HiVGError, write_text
from data import add_up, process_rank, world_size
from evaluate import predict, summary
from hivg import LOSS_WEIGHTS, compute_losses, read_checkpoint, save_checkpoint

# isort: split
# imports of the sections on building the model, the CLIP for shapes and the command line
import argparse
import copy
import functools
import os
from collections import Counter
from dataclasses import replace

import numpy as np

from clip_model import (
    CLIP,
    MEAN,
    STD,
    CLIPConfig,
    Tokenizer,
    clip_tokenizer,
    load_clip,
    run_main,
    save_clip,
    user_error,
)
from data import adder, barrier, default_workers, number_from
from evaluate import evaluate_splits, grounding_dataset
from hivg import (
    BRIDGE_TEXT_LAYERS,
    HiVG,
    HiVGConfig,
    load_checkpoint,
    sincos_grid,
    symmetric_cross_entropy,
    with_fresh_pairs,
)

# -------------------------------------------------------------------------------------------- plans


class Stage(NamedTuple):
    """One stage of a run."""

    number: int  # -1: warm-up without bridges, 0: warm-up, 1 ... G: HiLoRA's
    epochs: int
    lr: float  # at its top
    batch_size: int  # of one forward pass; a step has --batches of them
    hold: float = 0.0  # share of the steps before the learning rate falls
    steps: int = 0  # of an epoch: follows from the data, see make_plan


# fmt: off
PLANS = {  # rows: stage, epochs, top rate, batch size, hold; looked up by data set, then by size
    # of CLIP and data set, then by size
    "base": [
        (0, 60, 2.5e-4, 80), (1, 20, 1e-4, 60), (2, 20, 5e-5, 60), (3, 20, 2.5e-5, 40)],
    "base-flickr30k": [
        (0, 30, 2.5e-4, 80), (1, 5, 1e-4, 60), (2, 5, 5e-5, 60), (3, 5, 2.5e-5, 40)],
    "base-mixture": [
        (0, 60, 2.5e-4, 64), (1, 20, 1e-4, 64), (2, 20, 5e-5, 64), (3, 20, 2e-5, 64)],
    "large": [
        (-1, 10, 2.5e-4, 32), (0, 60, 2.5e-4, 32), (1, 10, 1e-4, 32),
        (2, 10, 5e-5, 32), (3, 10, 2.5e-5, 32)],
    "large-referit": [
        (-1, 5, 2.5e-4, 32), (0, 60, 2.5e-4, 32), (1, 10, 1e-4, 32),
        (2, 10, 5e-5, 32), (3, 10, 2.5e-5, 32)],
    "large-flickr30k": [
        (-1, 10, 2.5e-4, 32), (0, 30, 2.5e-4, 32), (1, 5, 1e-4, 32),
        (2, 5, 5e-5, 32), (3, 5, 2.5e-5, 32)],
    "large-mixture": [
        (-1, 10, 2.5e-4, 32), (0, 30, 2.5e-4, 32), (1, 10, 1e-4, 32),
        (2, 10, 5e-5, 32), (3, 10, 2e-5, 32)],
    "shapes": [  # docs/shapes-notes.md says why
        (-1, 7, 2e-3, 64, 1.0), (0, 1, 2e-3, 64, 1.0), (1, 1, 1.6e-3, 64, 1.0),
        (2, 1, 1.3e-3, 64, 1.0), (3, 4, 1e-3, 64)],
    "shapes-long": [
        (-1, 20, 1.4e-3, 128, 1.0), (0, 16, 1.4e-3, 128, 0.2), (1, 1, 6e-4, 128, 0.2),
        (2, 1, 4e-4, 128, 0.2), (3, 1, 3e-4, 128, 0.2)],
}
# fmt: on
EPOCH_SIZES = {"shapes": 11_800, "shapes-long": 45_300}  # others: all expressions
SHAPES_MODEL = dict(  # its HiVGConfig
    bridge_layers=(3,),
    grounding_layers=4,
    feedforward=192,
    region_width=192,
    dropout=0.0,
    lora_dropout=0.0,
)
AUTHORS_BATCHES = 7  # of a step: they trained on seven GPUs, with the plan's batch on each
WEIGHT_DECAY = 1e-4
MAX_NORM = 1.0  # of the gradient (D5)
LOOK_EVERY = 20  # steps between two looks at the losses; for each, the CPU waits for the GPU


def learning_rate(step, steps, top, hold=0.0):
    """The rate of step s = 0 ... S - 1 of a stage, a linear rise and a cosine to 0 (D4):

    top min(1, (s + 1) / w) (1 + cos(pi f)) / 2,   w = min(200, 1 + S / 10)

    f rises from 0 to 1 in the steps hold S ... S: the cosine begins after a share `hold` of them.
    With hold = 1 the rate stays at its top.
    """
    rise = min(1, (step + 1) / min(200, 1 + steps / 10))
    fall = max(0, step - hold * steps) / max(1, steps - hold * steps)
    return top * rise * (1 + math.cos(math.pi * fall)) / 2


# ----------------------------------------------------------------------------------------- training


def train_step(model, batches, seeds, optimizer, scaler, args, dtype=None):
    """One step along the mean gradient of args.batches batches, of which `batches` are this
    process's.

    model: HiVG, or DistributedDataParallel around it. batches: dicts as data.py gives them; seeds:
    of the dropout of each. scaler: a GradScaler, enabled for float16 only. args.batches: batches of a
    step, over all processes; args.loss: {loss: its weight}. dtype: of autocast, None for float32.
    Returns this process's share of the mean losses, [losses], on the device: nothing here waits for
    a GPU.
    """
    bare_model = getattr(model, "module", model)  # inside DistributedDataParallel
    mean_losses = 0
    for number, (batch, seed) in enumerate(zip(batches, seeds), start=1):
        torch.manual_seed(seed)
        batch = bare_model.inputs(batch)
        # DistributedDataParallel averages gradients over the processes in the last backward pass
        model.require_backward_grad_sync = number == len(batches)
        with torch.autocast(bare_model.mean.device.type, dtype, enabled=dtype is not None):
            output = model(batch["image"], batch["tokens"], batch["padding"])
        losses = compute_losses(output, batch, bare_model.clip.logit_scale)
        loss = sum(args.loss[name] * losses[name] for name in losses)
        scaler.scale(loss * world_size() / args.batches).backward()
        mean_losses += torch.stack([losses[name] for name in LOSS_WEIGHTS]).detach() / args.batches
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(bare_model.parameters(), MAX_NORM)
    scaler.step(optimizer)  # float16: makes no step if a gradient is not finite
    scaler.update()
    optimizer.zero_grad()
    return mean_losses


def train(model, train_set, val_set, plan, args, last):
    """The loops over stages, epochs and steps. Writes best.pt, last.pt and log.jsonl into
    args.output. Returns the model of the best epoch of the last stage.

    last: what last.pt holds of a run to be resumed, besides the model; {} for a new run. A resumed
    run ends as one that nobody stopped, since all that is random follows from (seed, stage, epoch,
    batch), and all else is in last.pt (bit for bit on a CPU).
    """
    output, device = Path(args.output), model.mean.device
    dtype, log = autocast_dtype(device), last.get("log", [])
    bar = data.progress(  # of all steps of the run: it shows when the run ends
        total=sum(stage.epochs * stage.steps for stage in plan), initial=last.get("steps", 0)
    )
    train_loader, val_loader = (data.BatchLoader(s, args.workers) for s in (train_set, val_set))
    for stage in plan:
        if log and log[-1]["stage"] > stage.number:
            continue  # done before the run was resumed
        past = [line for line in log if line["stage"] == stage.number]
        # of new pairs; 1 + number, since seeds begin at 0 and stages at -1
        torch.manual_seed(data.mix_seed(args.seed, 1 + stage.number))
        model.enter_stage(stage.number)
        model.checkpointing = args.checkpointing
        if args.compile:
            model.compile_blocks()
        print(parameter_table(model))
        optimizer, scaler = make_optimizer(model)
        if past:
            optimizer.load_state_dict(last["optimizer"])
            if last["scaler"]:  # empty on other devices
                scaler.load_state_dict(last["scaler"])
        parallel = model
        if world_size() > 1:
            parallel = DistributedDataParallel(model, broadcast_buffers=False)

        # epoch -1 is what the stage starts from; of a resumed one len(past) are done
        for epoch in range(len(past) - 1, stage.epochs):
            line, losses = {"stage": stage.number, "epoch": epoch}, []
            if epoch >= 0:
                parallel.train()
                for step, (batches, seeds) in read_epoch(train_loader, stage, epoch, args):
                    optimizer.param_groups[0]["lr"] = learning_rate(
                        step, stage.epochs * stage.steps, stage.lr, stage.hold
                    )
                    losses.append(
                        train_step(parallel, batches, seeds, optimizer, scaler, args, dtype)
                    )
                    bar.update()
                    if len(losses) % LOOK_EVERY == 0:
                        bar.set_postfix(finite_means(losses[-LOOK_EVERY:], line), refresh=False)
                line["losses"] = finite_means(losses, line)
            with torch.compiler.set_stance("force_eager"):  # compiled is what trains
                found, true, scores = predict(model, val_set, stage.batch_size, loader=val_loader)
            check_finite(torch.cat([found.sum(dim=1), scores]), line)
            line |= summary(val_set, found, true)
            bar.clear()
            print(
                f"stage {stage.number}, epoch {epoch}: {val_set.split} "
                f"Acc@0.5 {line['acc']:.2f} %, mean IoU {line['miou']:.2f} %",
                flush=True,
            )
            is_best = all(line["acc"] >= old["acc"] for old in past)  # of equals: the later
            past.append(line)
            log.append(line)
            if process_rank() == 0:  # last.pt comes last: a run killed before repeats the epoch
                if is_best:
                    save_checkpoint(output / "best.pt", model)
                write_text(output / "log.jsonl", "".join(json.dumps(old) + "\n" for old in log))
                save_checkpoint(
                    output / "last.pt",
                    model,
                    args=vars(args),
                    log=log,
                    sizes=[len(train_set), len(val_set)],
                    steps=bar.n,
                    optimizer=optimizer.state_dict(),
                    scaler=scaler.state_dict(),
                )
        barrier()
        model, _ = read_checkpoint(output / "best.pt")  # the next stage starts from it (D13)
        model.to(device)
    bar.close()
    return model


def make_optimizer(model):
    """AdamW, which leaves alone what has no gradient in this stage, and a GradScaler, which acts in
    float16 alone."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
    device = model.mean.device
    enabled = autocast_dtype(device) is torch.float16
    return optimizer, torch.amp.GradScaler(device.type, enabled=enabled)


def read_epoch(loader, stage, epoch, args):
    """Yield, for each step of an epoch, its number in the stage, the batches of this process and the
    seeds of their dropout. The batches of a step are dealt out to the processes as they come."""
    epoch_seed = args.seed, 1 + stage.number, epoch
    torch.manual_seed(data.mix_seed(*epoch_seed))
    sizes = stage.steps, args.batches, stage.batch_size  # what fills no step is not used now
    # numbers of samples, [steps, batches, batch_size]
    batches = torch.randperm(len(loader.dataset))[: math.prod(sizes)].view(sizes)
    mine = range(process_rank(), args.batches, world_size())
    reader = loader(batches[:, mine].flatten(0, 1).tolist(), seed=epoch_seed)
    for step in range(stage.steps):
        seeds = [data.mix_seed(*epoch_seed, step, number) for number in mine]
        yield epoch * stage.steps + step, ([next(reader) for _ in mine], seeds)


def finite_means(losses, line):
    """{loss: its mean over steps and processes}, without steps that were skipped (float16). losses:
    what `train_step` gave for each."""
    losses = torch.stack(losses)  # [steps, losses]
    add_up(losses)
    losses = losses[check_finite(losses.sum(dim=1), line)]
    return {name: round(mean, 4) for name, mean in zip(LOSS_WEIGHTS, losses.mean(dim=0).tolist())}


def check_finite(values, line):
    """Which of the values [n] are finite. Raises HiVGError if most of them are not."""
    finite = values.isfinite()
    if finite.float().mean() < 0.5:
        raise HiVGError(
            f"Losses or boxes are not finite in stage {line['stage']}, epoch {line['epoch']}; "
            "last.pt is of the epoch before: try a lower --lr and a new --output."
        )
    return finite


def autocast_dtype(device):
    """What a GPU computes in: bf16, or float16 if it has no bf16. None, float32, on others."""
    if device.type != "cuda":
        return None
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


# ------------------------------------------------------------------------------- building the model


def make_plan(args, model, train_set):
    """The stages of a run, [Stage, ...]: the plan for this CLIP and data, with the flags' values and
    the steps of an epoch. Batches are smaller where there is too little data for one step."""
    kind = "mixture" if len(args.dataset) > 1 else args.dataset[0]
    size = "large" if model.clip.config.vision_layers == 24 else "base"
    name = next(name for name in (args.preset, kind, f"{size}-{kind}", size) if name in PLANS)
    first, groups = 0 if args.init else -1, model.config.groups
    plan = [Stage(*row) for row in PLANS[name] if first <= row[0] <= groups]
    plan += [plan[-1]._replace(number=number) for number in range(4, groups + 1)]  # rows end with 3
    for flag in ("epochs", "lr", "batch_size"):
        if values := getattr(args, flag):
            if len(values) not in (1, len(plan)):
                raise HiVGError(
                    f"--{flag.replace('_', '-')}: give one value, or {len(plan)}, one for each "
                    f"stage, {plan[0].number} to {groups}."
                )
            plan = [
                stage._replace(**{flag: value}) for stage, value in zip(plan, values * len(plan))
            ]
    count = min(len(train_set), EPOCH_SIZES.get(kind, len(train_set))) // args.batches
    plan = [s._replace(batch_size=min(s.batch_size, count)) for s in plan if s.epochs]
    if not plan or not count:
        raise HiVGError(
            f"There is nothing to train: {len(train_set)} expressions, --batches {args.batches}, --epochs {args.epochs}; change these."
        )
    return [stage._replace(steps=count // stage.batch_size) for stage in plan]


def build_model(args, device):
    """HiVG of a new run: with fresh pairs, the model of --init, or one around CLIP, whose vocabulary
    is bpe_vocab.txt.gz beside its file, else CLIP's own."""
    errors = (ValueError, TypeError, RuntimeError, ArithmeticError) if args.model else ()
    not_fitting = user_error(f"--model {args.model} does not fit", "give other values", errors)
    if args.init:
        first = load_checkpoint(args.init)
        torch.manual_seed(args.seed)
        with not_fitting:
            return with_fresh_pairs(first, **args.model)
    name, path = args.dataset[0], args.clip or "ViT-B/16"
    is_shapes = name in data.TRAIN_SCENES
    if is_shapes and not args.clip:
        path = Path(args.data_root, name, f"clip_{args.seed}.pt")
        if not path.exists():
            train_shapes_clip(path, args.seed, device)
    clip = load_clip(path)
    beside = Path(path).with_name("bpe_vocab.txt.gz")
    tokenizer = Tokenizer(beside) if beside.is_file() else clip_tokenizer()
    if tokenizer.vocab_size != clip.config.vocab_size:
        raise HiVGError(f"{path} is of another vocabulary: put its own beside it, {beside}.")
    of_twelve = BRIDGE_TEXT_LAYERS.get(name, (12,))
    config = HiVGConfig(
        text_layers=tuple(math.ceil(i * clip.config.text_layers / 12) for i in of_twelve),
        bridge_text="layers" if len(args.dataset) == 1 else "projected",
        **(SHAPES_MODEL if is_shapes else {}),
    )
    torch.manual_seed(args.seed)
    with not_fitting:
        return HiVG(replace(config, **args.model), clip, tokenizer)


# -------------------------------------------------------------------------------- the CLIP for shapes

# image and patch, width and layers of the image tower and of the text tower, joint width
SHAPES_CLIP = CLIPConfig(80, 16, 96, 3, 96, 3, 96)
SHAPES_CLIP_STEPS, SHAPES_CLIP_BATCH, SHAPES_CLIP_RATE = 1000, 64, 1.5e-3


def train_shapes_clip(path, seed, device):
    """Train a small CLIP on a shapes data set, whose folder is that of `path`, and write it there.

    Contrastive, as CLIP was: whole train scenes against captions of what is in them, no boxes. That
    is the gap between scenes and regions that the paper starts from (Fig. 1).
    """
    folder = path.parent
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = Tokenizer(folder / "bpe_vocab.txt.gz")
    captions = data.read_json(folder / "captions.json")  # {image: captions}
    names = np.array(list(captions))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))

    @functools.cache  # a scene comes up more than once
    def read_scene(name):  # -> uint8 [3, S, S]
        return data.preprocess(data.load_image(folder / name), SHAPES_CLIP.image_size)[0]

    def read_scenes(names):  # -> float32 [n, 3, S, S]
        squares = torch.stack([read_scene(name) for name in names])
        return ((squares / 255 - mean) / std).to(device)

    clip = CLIP(replace(SHAPES_CLIP, vocab_size=tokenizer.vocab_size)).to(device)
    # the text tower's blocks stay random, and keep words apart; trained, they forget many of them
    clip.transformer.requires_grad_(False)
    init_patches_by_pca(clip.visual, read_scenes(names[:1500]))
    optimizer = torch.optim.AdamW(
        clip.parameters(), weight_decay=0.05, betas=(0.9, 0.98), fused=True
    )
    for step in data.progress(range(SHAPES_CLIP_STEPS), "training CLIP on scenes and captions"):
        batch = rng.choice(names, SHAPES_CLIP_BATCH, replace=False)
        tokens = data.trim_to_longest(
            tokenizer([str(rng.choice(captions[name])) for name in batch])
        )
        logits = clip(read_scenes(batch), tokens.to(device))  # [batch, batch]
        symmetric_cross_entropy(logits).backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), MAX_NORM)
        optimizer.param_groups[0]["lr"] = learning_rate(step, SHAPES_CLIP_STEPS, SHAPES_CLIP_RATE)
        optimizer.step()
        optimizer.zero_grad()
    save_clip(clip, path)


def init_patches_by_pca(visual, images):
    """Set the patch embedding of an image tower to the principal components of the patches in
    `images` [n, 3, S, S], each scaled to variance 1, and freeze it.

    So edges count as much as colour; a patch embedding that is learned in so few steps sees colours
    and hardly any kinds. Sines and cosines of the place are added to the positions, and what an
    average patch gives is taken off them.
    """
    weight = visual.conv1.weight.requires_grad_(False)
    width, _, patch, _ = weight.shape
    patches = torch.nn.functional.unfold(images, patch, stride=patch)  # [n, 3 P^2, N]
    patches = patches.transpose(1, 2).flatten(0, 1)  # [n N, 3 P^2]
    variances, components = torch.linalg.eigh(torch.cov(patches.T))  # ascending; [3 P^2, 3 P^2]
    rows = (components / variances.sqrt()).T[-width:]  # [d_v, 3 P^2]
    weight.copy_(rows.view_as(weight))
    grid = sincos_grid(images.shape[-1] // patch, width).to(images.device)
    visual.positional_embedding.data[1:] += grid - rows @ patches.mean(dim=0)


# ------------------------------------------------------------------------------------- command line

# flags that may differ when a run is resumed; they do not change its result, but for rounding and,
# compiled or on another device, dropout's random numbers
FREE_FLAGS = ("resume", "workers", "device", "data_root", "output", "checkpointing", "compile")


def run(args):
    """A whole run: model, data, training, and the evaluation of all splits but train."""
    device, name = data.setup_device(args.device), args.dataset[0]
    output = Path(os.path.normpath(args.output))  # of x/.., although there is no x
    is_shapes = name in data.TRAIN_SCENES
    last_path, last = output / "last.pt", {}
    if (output / "best.pt").exists() and not args.resume:
        raise HiVGError(f"{output}/best.pt is there already: give --resume, or another --output.")
    if args.batches < world_size():
        raise HiVGError(
            f"--batches {args.batches}: give one at least for each of {world_size()} processes."
        )
    if process_rank() > 0:
        barrier()  # the first process generates, trains and downloads what is missing
    if is_shapes:
        data.make_shapes(args.data_root, name)
        args.workers, args.no_augment = 0, True  # there are plenty, and they stay in memory
    annotations = {name: data.read_annotations(name, args.data_root) for name in args.dataset}
    if last_path.exists():
        model, last = read_checkpoint(last_path)
        check_resumable(args, last, last_path)
    else:
        model = build_model(args, device)
    if process_rank() == 0:
        barrier()  # now the others find it
    model.to(device)
    train_set = grounding_dataset(
        model, annotations, "train", augment=not args.no_augment, cache=is_shapes
    )
    val_set = grounding_dataset(model, annotations, args.select, cache=is_shapes)
    sizes = [len(train_set), len(val_set)]
    if last and last["sizes"] != sizes:
        raise HiVGError(
            f"train and {args.select} have {sizes} expressions, {last_path} is of {last['sizes']}: "
            "restore the files, or start a new --output."
        )
    plan = make_plan(args, model, train_set)
    print_summary(args, plan, model, train_set)
    model = train(model, train_set, val_set, plan, args, last).merge()
    for name, splits in annotations.items():
        evaluate_splits(model, name, splits, output, workers=args.workers)


def check_resumable(args, last, last_path):
    """Raise HiVGError unless this command is that of the run in last.pt, FREE_FLAGS aside."""
    for name, value in last["args"].items():
        if name not in FREE_FLAGS and getattr(args, name, None) != value:
            raise HiVGError(
                f"{last_path} is of a run with --{name.replace('_', '-')} {value}: give the same, or a new --output."
            )
    if not last_path.with_name("best.pt").is_file():
        raise HiVGError(
            f"best.pt is missing beside {last_path}: put it back, or start a new --output."
        )


def parameter_table(model):
    """The parameters by part of the model, trained and in all, as lines of text."""
    trained, total = Counter(), Counter()
    for name, parameter in model.named_parameters():
        for part in ("together", "LoRA pairs" if ".lora_" in name else name.split(".")[0]):
            trained[part] += parameter.requires_grad * parameter.numel()
            total[part] += parameter.numel()
    lines = [f"{f'stage {model.config.stage}':20} {'trained':>12} {'parameters':>12}"]
    lines += [f"{part:20} {trained[part]:12,} {total[part]:12,}" for part in total]
    return "\n".join(lines)


def print_summary(args, plan, model, train_set):
    """Print what the run is going to do; on a GPU, what the largest step of each stage takes."""
    device = model.mean.device
    size = f"{len(train_set):,} expressions to train on, {world_size()} process(es), {device}"
    print(args, model.config, *train_set.report, *plan, size, sep="\n")
    if device.type == "cuda":  # steps that are thrown away: out of memory comes now
        trial = copy.deepcopy(model).train()
        trial.checkpointing = args.checkpointing
        for stage in plan:
            trial.enter_stage(stage.number)
            batch = data.default_collate([train_set[0]] * stage.batch_size)  # texts of 77 tokens
            train_step(trial, [batch], [0], *make_optimizer(trial), args, autocast_dtype(device))
        print(f"a step takes {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most")


def number_or_word(text):
    """What --model gives a field: a number, a list in JSON, or a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def named(names, kind):
    """argparse's type of NAME=VALUE: one of the names, and a value with a type of its own."""

    def pair(text):
        name, _, value = text.partition("=")
        if name not in names:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(names)}")
        return name, kind(value)

    return pair


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, path = adder(parser), os.path.expanduser
    add_start = adder(parser.add_mutually_exclusive_group())
    count, positive, real = number_from(0), number_from(1), number_from(0, float)
    model_fields = [name for name in vars(HiVGConfig()) if name != "stage"]
    # data and weights
    add("--dataset", "one or several", nargs="+", required=True, choices=data.DATASETS)
    add("--data-root", "folder of the data sets (default: data)", type=path, default="data")
    add_start("--clip", "name or file (default: ViT-B/16; shapes: trained first)", type=path)
    add_start("--init", "start from train.py's or the authors' checkpoint instead", type=path)
    add("--no-augment", "images as they are", action="store_true")
    # what is trained, and how long: one value for all stages, or one for each
    add("--preset", "the plan of stages (default: by CLIP and data)", choices=PLANS)
    add("--epochs", "of each stage; 0: leave it out", type=count, nargs="+")
    add("--lr", "top learning rates", type=real, nargs="+")
    add("--batch-size", "expressions of one forward pass", type=positive, nargs="+")
    add(
        "--batches",
        f"of a step, over all processes (default: {AUTHORS_BATCHES}; own, shapes: 1)",
        type=positive,
    )
    several = {"nargs": "+", "action": "extend", "default": []}
    losses, parts = named(LOSS_WEIGHTS, real), named(model_fields, number_or_word)
    add("--loss", f"NAME=WEIGHT: {', '.join(LOSS_WEIGHTS)}", type=losses, **several)
    add("--model", f"NAME=VALUE: {', '.join(model_fields)}", type=parts, **several)
    add("--select", "split that chooses the best epoch (default: val)", default="val")
    # memory and speed
    add("--checkpointing", "less memory, longer steps: layers run twice", action="store_true")
    add("--compile", "let torch.compile make the steps faster", action="store_true")
    # the run
    add("--output", "folder of checkpoints and log (default: runs/DATASET)", type=path)
    add("--resume", "continue from OUTPUT/last.pt, if it is there", action="store_true")
    add("--seed", "of all that is random (default: 0)", type=count, default=0)
    add("--device", "cuda, mps or cpu (default: the best there is)")
    add(
        "--workers",
        "processes that read images (default: one a CPU, 8 at most)",
        type=count,
        default=default_workers(),
    )
    args = parser.parse_args()
    args.dataset = list(dict.fromkeys(args.dataset))
    args.output = args.output or f"runs/{'_'.join(args.dataset)}"
    args.loss, args.model = LOSS_WEIGHTS | dict(args.loss), dict(args.model)
    from_few = {"own", *data.TRAIN_SCENES} & set(args.dataset)
    args.batches = args.batches or (1 if from_few else AUTHORS_BATCHES)
    run_main(run, args)


if __name__ == "__main__":
    main()
