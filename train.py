"""Training: a warm-up and the stages of HiLoRA, each from the best epoch of the one before.

    python train.py --dataset shapes             # two CPU cores, nothing to download
    python train.py --dataset refcoco            # data/ has COCO's images and refer's files
    python train.py --dataset refcoco --resume   # continue a run that was stopped, or start it
    torchrun --standalone --nproc_per_node=4 train.py --dataset refcoco

Reading order: PRESETS, learning_rate, train_step (one step: forward, losses, backward, clipping,
optimiser), train_epoch and train (the loops over batches, epochs and stages), building the model,
resuming, the CLIP for shapes, and the command line.

A run writes into --output: best.pt (the best epoch of the latest stage; it stands alone), last.pt
(to resume from), log.jsonl (a line for each epoch), config.json (all settings), and after its last
epoch results_DATASET.json and a contact sheet for each split but train.
"""

import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import clip_model
import data
import evaluate
import hivg
from clip_model import CLIP, CLIPConfig, HiVGError, Tokenizer
from evaluate import barrier, model_inputs, open_split, process_rank, world_size, write_text
from hivg import BRIDGE_TEXT_LAYERS, LOSS_WEIGHTS, HiVG, HiVGConfig, compute_losses, save_checkpoint

# isort: split
# imports of the sections on the CLIP for shapes and the command line
import argparse
import copy
import functools
import os
import re
from dataclasses import asdict

import numpy as np

# ------------------------------------------------------------------------------------------ presets


@dataclass
class Preset:
    """What a run takes that the command line leaves open."""

    epochs: tuple  # of the warm-up and of stages 1, 2, 3; the next two likewise
    learning_rates: tuple  # at their top
    batch_sizes: tuple  # of one process
    without_bridges: int = 0  # epochs before the warm-up, without bridges, at the warm-up's rate
    betas: tuple = (0.9, 0.999)  # of AdamW
    hold: float = 0.0  # share of a stage's steps before the learning rate falls
    hold_without_bridges: float = 0.0  # the same for the epochs without bridges
    parts: int = 1  # an epoch is 1 / parts of the train split; so many go through all of it
    config: HiVGConfig = field(default_factory=HiVGConfig)  # sizes of the model


SHAPES = Preset(  # docs/shapes-notes.md says why
    epochs=(6, 1, 1, 1),
    learning_rates=(2e-3, 6e-4, 5e-4, 4e-4),
    batch_sizes=(64, 64, 64, 64),
    without_bridges=9,
    betas=(0.9, 0.98),
    hold=0.2,
    hold_without_bridges=1.0,
    parts=6,
    config=HiVGConfig(
        bridge_layers=(3,),
        grounding_layers=3,
        heads=8,
        feedforward=192,
        region_width=192,
        dropout=0.0,
        lora_dropout=0.0,
    ),
)
RATES, MIXTURE_RATES = (2.5e-4, 1e-4, 5e-5, 2.5e-5), (2.5e-4, 1e-4, 5e-5, 2e-5)
PRESETS = {  # looked up by data set, then by size of CLIP and data set, then by size
    "base": Preset((60, 20, 20, 20), RATES, (80, 60, 60, 40)),
    "base-flickr30k": Preset((30, 5, 5, 5), RATES, (80, 60, 60, 40)),
    "base-mixture": Preset((60, 20, 20, 20), MIXTURE_RATES, (64, 64, 64, 64)),
    "large": Preset((60, 10, 10, 10), RATES, (32, 32, 32, 32), without_bridges=10),
    "large-referit": Preset((60, 10, 10, 10), RATES, (32, 32, 32, 32), without_bridges=5),
    "large-flickr30k": Preset((30, 5, 5, 5), RATES, (32, 32, 32, 32), without_bridges=10),
    "large-mixture": Preset((30, 10, 10, 10), MIXTURE_RATES, (32, 32, 32, 32), without_bridges=10),
    "shapes": SHAPES,
    "shapes-long": replace(
        SHAPES,
        epochs=(16, 1, 1, 1),
        learning_rates=(1.4e-3, 6e-4, 4e-4, 3e-4),
        batch_sizes=(128, 128, 128, 128),
        without_bridges=20,
        parts=12,
        config=replace(SHAPES.config, grounding_layers=6, feedforward=256, region_width=256),
    ),
}
AUTHORS_GPUS = 7  # the batches of their presets are those of each GPU
WEIGHT_DECAY = 1e-4
MAX_NORM = 1.0  # of the gradient (D5)
RISING_STEPS = 200  # of a stage, in which the learning rate rises (D4)
LOOK_EVERY = 20  # steps between two looks at the losses; for each, the CPU waits for the GPU


def learning_rate(step, steps, top, hold=0.0):
    """The rate of step s = 0 ... S - 1 of a stage, a linear rise and a cosine to 0 (D4):

    top min(1, (s + 1) / w) (1 + cos(pi f)) / 2,   w = min(200, 1 + S / 10)

    f rises from 0 to 1 in the steps hold S ... S: the cosine begins after a share `hold` of them.
    With hold = 1 the rate stays at its top.
    """
    rise = min(1, (step + 1) / min(RISING_STEPS, 1 + steps / 10))
    falling = max(0, step - hold * steps)
    fall = falling / max(1, steps - hold * steps)
    return top * rise * (1 + math.cos(math.pi * fall)) / 2


# ----------------------------------------------------------------------------------------- training


def train_step(model, batches, seeds, optimizer, scaler, weights, dtype=None):
    """One step along the mean gradient of some batches (accumulation) and of all processes.

    model: HiVG, or DistributedDataParallel around it. batches: dicts as data.py gives them; seeds:
    of the dropout of each. scaler: a GradScaler, enabled for float16 only. weights: of the losses.
    dtype: of autocast, None for float32.
    Returns the mean losses, [len(weights)], on the device: nothing here waits for a GPU.
    """
    bare_model = getattr(model, "module", model)  # HiVG itself
    means = 0
    for number, (batch, seed) in enumerate(zip(batches, seeds), start=1):
        torch.manual_seed(seed)
        images, tokens, padding = model_inputs(bare_model, batch)  # [B, 3, S, S], [B, T], [B, S, S]
        boxes = batch["box"].to(images.device, non_blocking=True)  # [B, 4]
        objects = batch["object"].to(images.device, non_blocking=True)  # [B]
        # gradients are averaged over the processes in the last backward pass
        synchronise = number == len(batches) or model is bare_model
        with nullcontext() if synchronise else model.no_sync():
            with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
                output = model(images, tokens, padding, for_losses=True)
            losses = compute_losses(output, boxes, objects, bare_model.clip.logit_scale)
            loss = sum(weights[name] * losses[name] for name in weights) / len(batches)
            scaler.scale(loss).backward()
        means = means + torch.stack([losses[name].detach() for name in weights]) / len(batches)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    scaler.step(optimizer)  # float16: makes no step if a gradient is not finite
    scaler.update()
    optimizer.zero_grad()
    return means


def train_epoch(model, train_set, stage, epoch, optimizer, scaler, settings, dtype, pace):
    """One epoch: the loop over the batches. Returns {loss: its mean over the epoch}.

    All that is random follows from (seed, stage, epoch, number of the batch): N processes make the
    steps of one that accumulates N batches.
    """
    numbers = (settings.seed, 1 + stage, epoch)
    train_set.set_epoch(*numbers)
    per_step = settings.accumulate * world_size()  # batches of a step
    batch_size = stage_value(settings.batch_size, stage)
    preset = PRESETS[settings.preset]
    hold, parts = preset.hold, preset.parts
    if stage < 0:
        hold = preset.hold_without_bridges
    batch_size = min(batch_size, len(train_set) // (per_step * parts))  # tiny data get one step
    order = settings.seed, 1 + stage, epoch // parts
    batches = data.epoch_batches(order, len(train_set), batch_size, per_step * parts)
    batches = batches.chunk(parts)[epoch % parts]  # [steps * per_step, batch_size]
    own = range(process_rank(), len(batches), world_size())  # numbers of this process's batches
    on_gpu = next(model.parameters()).is_cuda
    reader = data.read_batches(train_set, batches[own].tolist(), settings.workers, on_gpu)
    steps = len(batches) // per_step
    epochs, top = stage_epochs(settings)[stage], stage_value(settings.lr, stage)
    title = f"stage {stage}, epoch {epoch}"
    unchecked = []  # losses of the steps since the last look
    sums = np.zeros(len(settings.loss))
    bar = tqdm(range(steps), title, leave=False, disable=process_rank() > 0)
    for step in bar:
        for param_group in optimizer.param_groups:  # all have the same rate
            param_group["lr"] = learning_rate(epoch * steps + step, epochs * steps, top, hold)
        step_batches, seeds = [], []
        for number in own[step * settings.accumulate : (step + 1) * settings.accumulate]:
            step_batches.append(next(reader))
            seeds.append(data.mix_seed(*numbers, number))
        losses = train_step(model, step_batches, seeds, optimizer, scaler, settings.loss, dtype)
        unchecked.append(losses)
        if (step + 1) % LOOK_EVERY == 0 or step + 1 == steps:
            rows = mean_over_processes(torch.stack(unchecked))
            values = rows.cpu().double().numpy()  # [steps since the last look, losses]
            for earlier, row in enumerate(values, start=step + 1 - len(values)):
                if not np.isfinite(row).all():
                    indices = batches[earlier * per_step : (earlier + 1) * per_step].flatten()
                    where = f"{title}, step {earlier}"
                    raise not_finite_error(where, settings.loss, row, train_set, indices)
            sums += values.sum(axis=0)
            unchecked = []
            pace.add(trained=len(values) * per_step * batch_size)
            loss = values[-1] @ list(settings.loss.values())
            bar.set_postfix(loss=f"{loss:.2f}", run_ends_in=pace)
    return {name: round(total / steps, 4) for name, total in zip(settings.loss, sums.tolist())}


def train(model, train_set, val_set, settings, device, log, optimizer_state, scaler_state, pace):
    """All stages: the loops over stages and epochs. Writes best.pt, last.pt and log.jsonl into
    settings.output. Returns the model of the best epoch of the last stage.

    log: the lines of the epochs that are done, [] for a new run. A resumed run continues after them
    with the states of its optimiser and scaler; it ends as a run that nobody stopped, since all
    that is random follows from (seed, stage, epoch, batch), and all else is in last.pt (on a CPU;
    times in the log aside). pace: the run's Pace, which tells how long it still takes.
    """
    output = Path(settings.output)
    dtype = autocast_dtype(device)
    first_stage = min(stage_epochs(settings))
    if device.type == "cpu":
        # In spite of its name this is for CPUs as well. With few tokens and small heads, as on
        # shapes, their fused attention takes twice as long as plain products (with AVX2).
        torch.backends.cuda.enable_flash_sdp(False)
    for stage, epochs in stage_epochs(settings).items():
        if log and log[-1]["stage"] > stage:
            continue  # done before the run was resumed
        torch.manual_seed(data.mix_seed(settings.seed, 1 + stage))  # of new pairs
        model.enter_stage(stage)
        model.checkpointing = settings.checkpointing
        if settings.compile:
            torch.compiler.reset()  # Dynamo gives up after 8 recompilations: count anew
            model.compile()
        trained = [p for p in model.parameters() if p.requires_grad]
        betas = PRESETS[settings.preset].betas
        optimizer = torch.optim.AdamW(trained, betas=betas, weight_decay=WEIGHT_DECAY, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        if optimizer_state is not None:
            optimizer.load_state_dict(optimizer_state)
            optimizer_state = None
        if scaler_state:  # {} if the run did not use float16 so far
            scaler.load_state_dict(scaler_state)
            scaler_state = None
        parallel = model
        if world_size() > 1:
            parallel = DistributedDataParallel(model, forward_sync_buffers=False)

        # epoch -1 is what a stage starts from: best.pt falls back to it if the stage only makes it
        # worse. Before the first stage there is nothing to see, unless it starts from --init.
        start = 0 if stage == first_stage and settings.init is None else -1
        if log and log[-1]["stage"] == stage:
            start = log[-1]["epoch"] + 1
        for epoch in range(start, epochs):
            began = time.time()
            line = {"stage": stage, "epoch": epoch}
            if epoch >= 0:
                parallel.train()
                line["losses"] = train_epoch(
                    parallel, train_set, stage, epoch, optimizer, scaler, settings, dtype, pace
                )
            predicted, true = evaluate.predict(model, val_set, workers=settings.workers)
            pace.add(evaluated=len(val_set))
            line |= evaluate.summary(val_set, predicted, true)
            line["seconds"] = round(time.time() - began, 1)
            best_acc = max([past["acc"] for past in log if past["stage"] == stage], default=-1)
            log.append(line)
            when = f"after epoch {epoch}" if epoch >= 0 else "begins"
            result = f"{val_set.split} Acc@0.5 {line['acc']:.2f} %"
            print(f"stage {stage} {when}: {result}; the run ends in {pace}", flush=True)
            if process_rank() == 0:
                # last.pt is written last: a run that is killed before that repeats the epoch
                if line["acc"] >= best_acc:  # ties go to the later epoch
                    save_checkpoint(output / "best.pt", model)
                write_text(output / "log.jsonl", "".join(json.dumps(past) + "\n" for past in log))
                stored = {"settings": vars(settings), "log": log}
                stored |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
                save_checkpoint(output / "last.pt", model, **stored)
        barrier()
        model, _ = hivg.read_checkpoint(output / "best.pt")  # the next stage starts from it (D13)
        model.to(device)
    return model


def autocast_dtype(device):
    """What a GPU computes in: bf16, or float16 if it has no bf16. None, float32, on others."""
    if device.type != "cuda":
        return None
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def stage_epochs(settings):
    """{stage: its epochs}, in order, without the stages that have none. -1 is the warm-up without
    bridges, 0 the warm-up, 1 ... G are HiLoRA's stages."""
    counts = {-1: settings.without_bridges, **dict(enumerate(settings.epochs))}
    return {stage: count for stage, count in counts.items() if count > 0}


def stage_value(values, stage):
    """The value of a stage in a list for the warm-up and stages 1 ... G. A warm-up without bridges
    has those of the warm-up."""
    return values[max(0, stage)]


def mean_over_processes(tensor):
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor / world_size()


def not_finite_error(where, weights, losses, train_set, indices):
    """The HiVGError that says in which step a loss was not finite, and for which samples."""
    parts = ", ".join(f"{name} {value:.4g}" for name, value in zip(weights, losses))
    samples = [train_set.samples[index] for index in indices.tolist()]
    names = ", ".join(f"{Path(sample.image).name} {sample.text!r}" for sample in samples)
    what = f"A loss is not finite in {where} ({parts})"
    hint = "try a lower --lr with a new --output, or look at the samples of this step"
    return HiVGError(f"{what}; last.pt is of the last good epoch: {hint}, {names}.")


class Pace:
    """How long a run still takes, from the time that its steps took so far.

    Work is counted in trained expressions. The evaluation of one counts a third: it has no backward
    pass. log: the lines of epochs that are done; the sizes are numbers of expressions, `at_end` those
    that the final evaluation has.
    """

    def __init__(self, settings, log, train_size, val_size, at_end):
        epochs, train_size = stage_epochs(settings), train_size / PRESETS[settings.preset].parts
        trained = sum(epochs.values()) - sum(line["epoch"] >= 0 for line in log)
        # the first stage has no epoch -1, unless it starts from --init
        evaluated = sum(epochs.values()) + len(epochs) - (settings.init is None) - len(log)
        self.left = trained * train_size + (evaluated * val_size + at_end) / 3
        self.done, self.began = 0, None

    def add(self, trained=0, evaluated=0):
        """Count work as done. The first call starts the clock: the first steps are slower."""
        work = trained + evaluated / 3
        self.left -= work
        if self.began is None:
            self.began = time.monotonic()
        else:
            self.done += work

    def __str__(self):
        if not self.done:
            return "?"
        seconds = self.left * (time.monotonic() - self.began) / self.done
        return f"{math.ceil(seconds / 60)} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ------------------------------------------------------------------------------- building the model


# a setting comes from the command line, else from the preset, else from here
DEFAULTS = {
    "data_root": "data",
    "clip": "ViT-B/16",
    "init": None,
    "image_size": None,
    "augment": True,
    "loss": {},
    "select": "val",
    "adapters": "hilora",
    "groups": 3,
    "rank": 32,
    "targets": ("attn.in_proj", "attn.out_proj"),
    "visual_layers": None,
    "checkpointing": False,
    "compile": False,
    "seed": 0,
    "device": None,
    "workers": None,
}
SIZE_FLAGS = ("image_size", "visual_layers", "bridge_layers", "text_layers")  # --init has its own
PER_STAGE = ("epochs", "lr", "batch_size")  # one value for the warm-up and one for each stage


def build_model(given, device):
    """(settings, HiVG) of a new run: CLIP is read (or, for shapes, trained), or the model of --init;
    what the command line leaves open is taken from the preset for this CLIP and these data sets."""
    data_root, clip_path, seed = ((DEFAULTS | given)[n] for n in ("data_root", "clip", "seed"))
    if process_rank() > 0:
        barrier()  # the first process generates, trains and downloads what is missing
    for name in data.SHAPES_SETS:
        if name in given["dataset"]:
            print(
                "ahead: scenes and a small CLIP, where they are not there yet, then the model",
                flush=True,
            )
            data.make_shapes(data_root, name)
    if data.are_shapes(given["dataset"]) and not {"clip", "init"} & set(given):
        (name,) = given["dataset"]
        clip_path = Path(data_root, name, f"clip_{seed}.pt")
        if not clip_path.exists():
            splits = data.shapes_splits(name)  # a tenth of the expressions is sought in vain
            sizes = {s: 0.9 * info.scenes * info.expressions for s, info in splits.items()}
            train_size, val_size = sizes.pop("train"), sizes["val"]
            clip_config = SHAPES_CLIP if name == "shapes" else LONG_CLIP
            settings = complete_settings(given, clip_config)
            pace = Pace(settings, [], train_size, val_size, at_end=sum(sizes.values()))
            train_shapes_clip(clip_path, clip_config, seed, device, pace)
    if "init" in given:
        first = hivg.load_checkpoint(given["init"])
        clip = first.clip
    else:
        clip = clip_model.load_clip(str(clip_path))
        tokenizer = find_tokenizer(clip_path, clip.config.vocab_size)
    if process_rank() == 0:
        barrier()  # now the others find it

    settings = complete_settings(given, clip.config)
    settings.clip = None if "init" in given else str(clip_path)
    sizes = {name: getattr(settings, name) for name in SIZE_FLAGS}
    pairs = {name: getattr(settings, name) for name in ("adapters", "targets", "groups", "rank")}
    torch.manual_seed(settings.seed)
    try:
        if "init" in given:
            model = hivg.with_fresh_pairs(first, **pairs)
        else:
            config = replace(PRESETS[settings.preset].config, **sizes, **pairs)
            model = HiVG(config, clip, tokenizer)
    except ValueError as error:  # of lora.add_lora: a target that matches nothing
        raise HiVGError(f"--targets: {error}.") from error
    for name in SIZE_FLAGS:
        value = getattr(model.config, name)
        if "init" in given and given.get(name, value) != value:
            what = f"{flag_of(name)} does not fit {given['init']}, which has {value}"
            raise HiVGError(f"{what}: leave it out.")
        setattr(settings, name, value)
    model.enter_stage(min(stage_epochs(settings)))
    return settings, model.to(device)


def complete_settings(given, clip_config):
    """The settings of a new run, as a Namespace: what was given on the command line; for the rest
    the preset, and DEFAULTS."""
    names = given["dataset"]
    kind = "mixture" if len(names) > 1 else names[0]
    size = "large" if clip_config.vision_layers == 24 else "base"
    candidates = [kind, f"{size}-{kind}", size]
    preset_name = given.get("preset") or next(name for name in candidates if name in PRESETS)
    preset = PRESETS[preset_name]
    text_layers = ()  # a mixture's bridges get the projected text
    if kind != "mixture":
        of_twelve = BRIDGE_TEXT_LAYERS.get(kind, (12,))
        text_layers = tuple(math.ceil(i * clip_config.text_layers / 12) for i in of_twelve)
    of_the_paper = not set(names) & {"own", *data.SHAPES_SETS}
    from_preset = {
        "preset": preset_name,
        "epochs": preset.epochs,
        "lr": preset.learning_rates,
        "batch_size": preset.batch_sizes,
        "without_bridges": 0 if "init" in given else preset.without_bridges,
        "bridge_layers": preset.config.bridge_layers,
        "text_layers": text_layers,
        "accumulate": max(1, round(AUTHORS_GPUS / world_size())) if of_the_paper else 1,
    }
    settings = argparse.Namespace(**DEFAULTS | from_preset | given)
    settings.processes = world_size()
    settings.loss = LOSS_WEIGHTS | settings.loss
    for flag in PER_STAGE:
        setattr(settings, flag, per_stage(getattr(settings, flag), settings.groups))
    if data.are_shapes(names):
        settings.augment = False  # there are plenty; they are kept in memory
    if not stage_epochs(settings):
        raise HiVGError("--epochs 0 leaves nothing to train: give a stage at least one epoch.")
    return settings


def flag_of(name):
    """The flag of a setting, as it is written on the command line."""
    return "--no-augment" if name == "augment" else "--" + name.replace("_", "-")


def per_stage(values, groups):
    """One value for all stages, or a list of them, as a list for the warm-up and stages 1 ... G."""
    if len(values) == 1:
        return [*values] * (1 + groups)
    return [*values, *[values[-1]] * groups][: 1 + groups]  # G may differ from the preset's 3


VOCABULARIES = ("bpe_vocab.txt.gz", "bpe_simple_vocab_16e6.txt.gz")


def find_tokenizer(clip_path, vocab_size):
    """The tokenizer of a CLIP: with the vocabulary beside its file, else with CLIP's own. Raises
    HiVGError if the vocabulary has another size than the CLIP's."""
    beside = [Path(clip_path).with_name(name) for name in VOCABULARIES]
    beside = [path for path in beside if path.is_file()]
    tokenizer = Tokenizer(beside[0]) if beside else clip_model.clip_tokenizer()
    if tokenizer.vocab_size != vocab_size:
        what = f"{clip_path} is not for the vocabulary {beside[0] if beside else 'of CLIP'}"
        raise HiVGError(f"{what}: put its own beside it as {VOCABULARIES[0]}.")
    return tokenizer


# ----------------------------------------------------------------------------------------- resuming

# flags that may differ when a run is resumed; they do not change its result, rounding aside
FREE_FLAGS = ("resume", "workers", "device", "data_root", "output", "checkpointing", "compile")


def resume_settings(given, stored, last):
    """The settings of a resumed run: those stored in last.pt, with the FREE_FLAGS of this command.

    Raises HiVGError if another flag differs from the stored run.
    """
    stored = DEFAULTS | stored  # which may be older than a setting
    for name, value in given.items():
        if name in FREE_FLAGS or name == "accumulate":
            continue
        if name in PER_STAGE:
            value = per_stage(value, stored["groups"])
        if name == "loss":
            value = stored["loss"] | value
        if value != stored[name]:
            what = f"{flag_of(name)} does not fit the run in {last}, which has {stored[name]}"
            raise HiVGError(f"{what}: leave it out, or start anew with another --output.")
    free = {name: given[name] for name in FREE_FLAGS if name in given}
    settings = argparse.Namespace(**stored | free)
    batches = stored["accumulate"] * stored["processes"]  # of a step
    settings.accumulate = given.get("accumulate", max(1, batches // world_size()))
    settings.processes = world_size()
    if settings.accumulate * world_size() != batches:
        what = f"{last} is of a run with {batches} batches a step"
        hint = f"make processes times --accumulate {batches}"
        raise HiVGError(f"{what}, not {settings.accumulate * world_size()}: {hint}.")
    return settings


# -------------------------------------------------------------------------------- the CLIP for shapes

SHAPES_CLIP = CLIPConfig(
    image_size=80,
    patch_size=16,
    vision_width=96,
    vision_layers=3,
    text_width=96,
    text_layers=3,
    embed_dim=96,
)
LONG_CLIP = replace(SHAPES_CLIP, vision_width=128, text_width=128, embed_dim=128)  # shapes-long
SHAPES_CLIP_STEPS, SHAPES_CLIP_BATCH, SHAPES_CLIP_RATE = 1000, 64, 1.5e-3
CLIP_WORK = 0.85  # time of a scene and its caption here, in trained expressions (see Pace)


def train_shapes_clip(path, config, seed, device, pace):
    """Train a small CLIP on a shapes data set, whose folder is that of `path`, and write it there.

    Contrastive, as CLIP was: whole train scenes against captions of what is in them, no boxes. That
    is the gap between scenes and regions that the paper starts from (Fig. 1).
    """
    folder = path.parent
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = Tokenizer(folder / "bpe_vocab.txt.gz")
    captions = json.loads((folder / "captions.json").read_text())
    names = np.array(list(captions))
    S = config.image_size

    @functools.cache  # a scene comes up more than once
    def read_scene(name):
        square, _ = data.preprocess(data.load_image(folder / "images" / name), S)
        return square  # uint8 [3, S, S]

    def read_scenes(names):  # -> float32 [n, 3, S, S]
        squares = torch.stack([read_scene(name) for name in names]).to(device)
        inner = torch.tensor([[0, 0, S, S]], device=device)  # no padding
        return data.normalise(squares, inner, clip_model.MEAN, clip_model.STD)[0]

    clip = CLIP(replace(config, vocab_size=tokenizer.vocab_size)).to(device)
    init_patches_by_pca(clip.visual, read_scenes(names[:1500]))
    trained = [p for p in clip.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    targets = torch.arange(SHAPES_CLIP_BATCH, device=device)
    pace.left += SHAPES_CLIP_STEPS * SHAPES_CLIP_BATCH * CLIP_WORK
    bar = tqdm(range(SHAPES_CLIP_STEPS), "training CLIP on scenes and captions")
    for step in bar:
        batch = rng.choice(names, SHAPES_CLIP_BATCH, replace=False)
        tokens = tokenizer([str(rng.choice(captions[name])) for name in batch])
        # The shorter half of the captions is read apart from the longer one, to pad it less.
        order = tokens.argmax(dim=1).argsort()  # by the place of the end token
        texts = []
        for half in tokens[order].chunk(2):
            texts.append(clip.encode_text(data.trim_to_longest(half).to(device)))
        images = read_scenes(batch[order.numpy()])
        logits = clip.similarity(clip.encode_image(images), torch.cat(texts))  # [batch, batch]
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.param_groups[0]["lr"] = learning_rate(step, SHAPES_CLIP_STEPS, SHAPES_CLIP_RATE)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % LOOK_EVERY == 0:
            right = (logits.argmax(dim=1) == targets).float().mean()
            pace.add(trained=LOOK_EVERY * SHAPES_CLIP_BATCH * CLIP_WORK)
            bar.set_postfix(loss=f"{loss.item():.2f}", right=f"{right:.2f}", run_ends_in=pace)
    clip_model.save_clip(clip, path)


def init_patches_by_pca(visual, images):
    """Set the patch embedding of an image tower to the principal components of the patches in
    `images` [n, 3, S, S], each scaled to variance 1, and freeze it.

    So edges count as much as colour; a patch embedding that is learned in so few steps sees colours
    and hardly any kinds. Sines and cosines of the place are added to the positions, and what an
    average patch gives is taken off them.
    """
    width, _, patch, _ = visual.conv1.weight.shape
    patches = F.unfold(images, patch, stride=patch).transpose(1, 2).flatten(0, 1)  # [n N, 3 P^2]
    variances, components = torch.linalg.eigh(torch.cov(patches.T))  # ascending; [3 P^2, 3 P^2]
    rows = (components / variances.sqrt()).T[-width:]  # [d_v, 3 P^2]
    visual.conv1.weight = nn.Parameter(rows.reshape(visual.conv1.weight.shape), requires_grad=False)
    grid = hivg.sincos_grid(images.shape[-1] // patch, width).to(images.device)
    visual.positional_embedding.data[1:] += grid - rows @ patches.mean(dim=0)


# ------------------------------------------------------------------------------------- command line


def run(given):
    """A whole run: checks, model, data, training, evaluation. given: the flags that were given."""
    output = Path(given["output"])
    last = output / "last.pt"
    resumed = last.exists() and "resume" in given
    if not resumed:
        check_request(given, last)
    device = evaluate.setup_device(given.get("device"))
    if process_rank() == 0:
        evaluate.check_writable(output)
    barrier()
    if resumed:
        model, content = hivg.read_checkpoint(last)
        model.to(device)
        settings = resume_settings(given, content["settings"], last)
        log = content["log"]
        optimizer_state, scaler_state = content["optimizer"], content["scaler"]
        print(f"resumed after stage {log[-1]['stage']}, epoch {log[-1]['epoch']}")
    else:
        settings, model = build_model(given, device)
        log, optimizer_state, scaler_state = [], None, None
        if "resume" in given:
            print(f"there is no {last} to resume from: a new run")
    names, data_root = settings.dataset, settings.data_root
    if settings.workers is None:
        settings.workers = data.default_workers(names)

    annotations = {name: data.read_annotations(name, data_root) for name in names}
    options = {"annotations": annotations, "cache": data.are_shapes(names)}
    train_set = open_split(model, names, "train", data_root, augment=settings.augment, **options)
    val_set = open_split(model, names, settings.select, data_root, **options)
    model.tokenizer.add_words(sample.text for sample in train_set.samples)
    if len(train_set) < settings.accumulate * world_size() * PRESETS[settings.preset].parts:
        what = f"{len(train_set)} expressions are fewer than the batches of a step"
        raise HiVGError(f"{what}: give a smaller --accumulate, or start fewer processes.")
    print_summary(settings, model, train_set, annotations, device)
    if device.type == "cuda":
        print_memory(settings, model, device)
    if process_rank() == 0:
        used = {"settings": vars(settings), "model": asdict(model.config)}
        write_text(output / "config.json", json.dumps(used, indent=2))
    splits = [annotations[name][s] for name in names for s in annotations[name] if s != "train"]
    at_end = sum(len(split.samples) for split in splits)
    pace = Pace(settings, log, len(train_set), len(val_set), at_end)
    states = optimizer_state, scaler_state
    model = train(model, train_set, val_set, settings, device, log, *states, pace).merge().eval()
    for name in names:
        evaluate.evaluate_splits(
            model,
            output / "best.pt",
            name,
            None,
            data_root,
            output,
            workers=settings.workers,
            annotations=annotations,
        )


def check_request(given, last):
    """Raise HiVGError for what would fail later in a new run, before anything slow begins: an
    unknown data set, files that are missing, an output folder with an earlier run."""
    if last.exists():
        raise HiVGError(f"{last} is of an earlier run: give --resume, or another --output.")
    for name in given["dataset"]:
        data.dataset_info(name)
        if name not in data.SHAPES_SETS:
            data.check_files(name, given.get("data_root", DEFAULTS["data_root"]))
    if "init" in given:
        if "clip" in given:
            raise HiVGError(f"{given['init']} has a CLIP of its own: leave --clip out.")
        if not Path(given["init"]).is_file():
            raise HiVGError(f"There is no {given['init']} to start from: name a checkpoint.")
        evaluate.check_no_input(last.with_name("best.pt"), given["init"])
        return
    clip_path = given.get("clip", DEFAULTS["clip"])
    if clip_path not in clip_model.CLIP_FILES and not Path(clip_path).is_file():
        known = ", ".join(clip_model.CLIP_FILES)
        raise HiVGError(f"There is no CLIP {clip_path}: name a file, or one of {known}.")


PARAMETER_GROUPS = {  # by the names of parameters: the first pattern that matches
    "LoRA pairs": r"\.lora_",
    "CLIP": r"^clip\.",
    "bridges": r"^(bridges|mixed_proj)\.",
    "heads": r"^(box_head|region)",
    "grounding encoder": "",  # and the projections before it
}


def parameter_table(model):
    """The parameters by group, trained and in all, as lines of text."""
    counts = {group: [0, 0] for group in (*PARAMETER_GROUPS, "together")}
    for name, parameter in model.named_parameters():
        matching = [group for group, p in PARAMETER_GROUPS.items() if re.search(p, name)]
        for group in (matching[0], "together"):
            if parameter.requires_grad:
                counts[group][0] += parameter.numel()
            counts[group][1] += parameter.numel()
    title = f"stage {model.config.stage}"
    lines = [f"{title:18} {'trained':>12} {'parameters':>12}"]
    lines += [f"{group:18} {trained:12,} {total:12,}" for group, (trained, total) in counts.items()]
    return "\n".join(lines)


def print_summary(settings, model, train_set, annotations, device):
    """Print what the run is going to do."""
    names = ", ".join(settings.dataset)
    dtype = autocast_dtype(device) or torch.float32
    print(f"{names} from {settings.data_root} into {settings.output}, on {device} in {dtype}")
    for name in settings.dataset:
        info = data.DATASETS[name]
        published = dict(zip(info.splits, info.published))
        for split in info.splits:
            split_data = annotations[name].get(split)
            words = [f"{len(split_data.samples):,} expressions" if split_data else "not there"]
            if split in published:
                words.append(f"published: {published[split]:,}")
            print(f"  {name} {split:6} {'; '.join(words)}")
    notes = "".join(f"; {note}" for note in train_set.report)
    print(f"  trained on: {len(train_set):,} expressions{notes}")
    parts = PRESETS[settings.preset].parts
    if parts > 1:
        print(f"  an epoch goes through 1/{parts} of them")
    first = f"CLIP {settings.clip}" if settings.init is None else f"starts from {settings.init}"
    print(f"{first}, images of {settings.image_size} pixels, seed {settings.seed}")
    print(f"adapters {settings.adapters}; weights of the losses {settings.loss}")
    for stage, epochs in stage_epochs(settings).items():
        top, size = stage_value(settings.lr, stage), stage_value(settings.batch_size, stage)
        print(f"  stage {stage:2}: epochs {epochs}, top learning rate {top:g}, batches of {size}")
    print(f"  (stage -1: warm-up without bridges, 0: warm-up, 1 to {settings.groups}: HiLoRA's)")
    print(f"batches of a step: {settings.accumulate} in each of {world_size()} process(es)")
    print(parameter_table(model), flush=True)


def step_bytes(model, batch_size, dtype):
    """(bytes of any step, bytes for each sample of its batch) that training takes on the model's
    device, counted on two batches, the larger of 16 at most: weights, AdamW's moments, and at their
    peak the gradients and all that the forward pass keeps for the backward pass."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0, fused=True)  # changes nothing
    scaler = torch.amp.GradScaler(enabled=False)
    few = min(8, max(1, batch_size // 2))
    peaks = []
    for size in (few, few, 2 * few):  # the first step makes the moments
        batch = evaluate.synthetic_batch(model, size)
        with evaluate.PeakMemory() as memory:
            train_step(model.train(), [batch], [0], optimizer, scaler, LOSS_WEIGHTS, dtype)
        peaks.append(memory.peak)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    moments = 2 * sum(p.nbytes for p in trained)
    of_a_sample = (peaks[2] - peaks[1]) / few
    return weights + moments + peaks[1] - few * of_a_sample, of_a_sample


def print_memory(settings, model, device):
    """Print what the largest step of a run will take, beside what the GPU has."""
    model = copy.deepcopy(model)
    model.checkpointing = settings.checkpointing
    needs = []
    for stage in stage_epochs(settings):
        model.enter_stage(stage)
        batch_size = stage_value(settings.batch_size, stage)
        fixed, of_a_sample = step_bytes(model, batch_size, autocast_dtype(device))
        needs.append((fixed + batch_size * of_a_sample, stage, batch_size))
    del model
    torch.cuda.empty_cache()
    need, stage, batch_size = max(needs)
    _, total = torch.cuda.mem_get_info(device)
    what = f"a step of stage {stage}, of {batch_size} expressions, takes about"
    print(f"{what} {need / 2**30:.1f} GiB (counted); this GPU has {total / 2**30:.1f} GiB")
    if need > 0.9 * total:
        print(
            "that hardly fits: try --checkpointing, or a smaller --batch-size and more --accumulate"
        )


def loss_weight(text):
    """argparse's type of NAME=WEIGHT, one of the losses."""
    name, _, weight = text.partition("=")
    if name not in LOSS_WEIGHTS:
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(LOSS_WEIGHTS)}")
    return name, evaluate.number_from(0, float)(weight)


def main():
    # flags that are not given are absent: the preset and DEFAULTS, or the stored run, fill them in
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    count, positive = evaluate.number_from(0), evaluate.number_from(1)
    real = evaluate.number_from(0, float)
    # data and weights
    add("--dataset", nargs="+", required=True, help=f"one or several of {', '.join(data.DATASETS)}")
    add("--data-root", type=os.path.expanduser, help="folder of the data sets (default: data)")
    add(
        "--clip",
        type=os.path.expanduser,
        help="CLIP's name or file (default: ViT-B/16; shapes: one that is trained first)",
    )
    add(
        "--init",
        type=os.path.expanduser,
        help="start from a checkpoint of train.py or HiVG's authors instead of CLIP",
    )
    add("--image-size", type=positive, help="side of the square in pixels (default: CLIP's)")
    add("--no-augment", dest="augment", action="store_false", help="images as they are")
    # what is trained, and how long: one value for all stages, or one for each
    add(
        "--preset", choices=PRESETS, help="what fills in the next flags (default: by CLIP and data)"
    )
    add("--epochs", type=count, nargs="+", help="of the warm-up and stages 1 to G; 0: leave it out")
    add("--lr", type=real, nargs="+", help="top learning rates")
    add("--batch-size", type=positive, nargs="+", help="expressions in a batch, of one process")
    add(
        "--accumulate",
        type=positive,
        help="batches for each step (default: 7 / processes; own, shapes: 1)",
    )
    add("--without-bridges", type=count, help="epochs without bridges, before the warm-up")
    add("--loss", type=loss_weight, nargs="+", metavar="NAME=WEIGHT", help=", ".join(LOSS_WEIGHTS))
    add("--select", help="split that chooses the best epoch (default: val)")
    # the model: ablations
    add("--adapters", choices=("hilora", "vanilla", "none"), help="of the image tower")
    add("--groups", type=positive, help="G of HiLoRA, and the number of stages (default: 3)")
    add("--rank", type=positive, help="of LoRA (default: 32)")
    add("--targets", nargs="+", help="of LoRA: attn.in_proj attn.out_proj (default) and the like")
    add("--visual-layers", type=positive, nargs="+", help="V, the multi-level features")
    add("--bridge-layers", type=positive, nargs="+", help="C, the layers with a bridge")
    add("--no-bridges", dest="bridge_layers", action="store_const", const=())
    add("--text-layers", type=positive, nargs="+", help="f^i that the bridges read")
    # memory and speed
    add("--checkpointing", action="store_true", help="less memory, longer steps: layers run twice")
    add("--compile", action="store_true", help="let torch.compile make the steps faster")
    # the run
    add(
        "--output",
        type=os.path.expanduser,
        help="folder of checkpoints and log (default: runs/DATASET)",
    )
    add("--resume", action="store_true", help="continue from OUTPUT/last.pt, if it is there")
    add("--seed", type=count, help="of all that is random (default: 0)")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--workers", type=count, help="processes that read images (default: one a CPU, 8 at most)")
    given = vars(parser.parse_args())
    given["dataset"] = list(dict.fromkeys(given["dataset"]))
    given.setdefault("output", f"runs/{'_'.join(given['dataset'])}")
    if "loss" in given:
        given["loss"] = dict(given["loss"])
    for name in ("visual_layers", "bridge_layers", "text_layers"):
        if name in given:
            given[name] = tuple(sorted(set(given[name])))
    if "targets" in given:
        given["targets"] = tuple(given["targets"])
    for name in PER_STAGE:
        stages = 1 + given.get("groups", DEFAULTS["groups"])
        if len(given.get(name, [0])) not in (1, stages):
            parser.error(f"--{name.replace('_', '-')} takes one value or {stages}")
    hint = "the same command with --resume goes on after the last finished epoch, or anew"
    clip_model.run_main(run, given, after_ctrl_c=hint)


if __name__ == "__main__":
    main()
