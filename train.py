"""Training: a warm-up and the stages of HiLoRA, one after the other, each from the best of the one before.

    python train.py --dataset shapes                             # two CPU cores, nothing to download
    python train.py --dataset refcoco --data-root data           # COCO's images, refer's files, CLIP ViT-B/16
    python train.py --dataset refcoco --data-root data --resume  # go on where that run was stopped

Reading order: PRESETS (epochs, rates, batches, sizes), shapes_clip (a small CLIP, where there is none to download), train_epoch
(the loop), run (the account, the stages, the final evaluation), main (the flags).

What a run writes into --output: best.pt (stands alone), last.pt (to resume from), log.jsonl (a line for each epoch), config.json
(what was used), results_DATASET.json and a contact sheet for each split.
"""

import argparse
import json
import math
import os
import re
import time
from argparse import RawDescriptionHelpFormatter as RawText
from dataclasses import asdict
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark import Timer
from tqdm import tqdm

import clip_model
import data
import hivg
from clip_model import CLIP, CLIPConfig, HiVGError, Tokenizer, exit_with, explaining, replacing
from evaluate import at_least, evaluate, evaluate_splits, pick_device
from hivg import LOSS_WEIGHTS, TEXT_LAYERS, HiVG, HiVGConfig, load_model, losses, save_checkpoint


class Preset(NamedTuple):
    """Epochs, top learning rate and batch size of the warm-up and of stages 1 to 3; epochs of a warm-up without bridges before
    them, at the warm-up's rate; AdamW's betas; fields of HiVGConfig to change."""

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
MODEL_FLAGS = (  # options that are fields of HiVGConfig
    *("image_size", "adapters", "groups", "rank", "targets"),
    *("visual_layers", "bridge_layers", "text_layers"),
)
WEIGHT_DECAY = 1e-4
MAX_NORM = 1.0  # of the gradient (D5)
# the rate rises to its top in so many steps of a stage, or in a tenth of it if that is less (D4)
WARMUP_STEPS = 200

SHAPES_CLIP = CLIPConfig(  # images of 80 pixels, patches of 16
    80, 16, vision_width=128, vision_layers=3, text_width=128, text_layers=3, embed_dim=128
)
SHAPES_CLIP_STEPS, SHAPES_CLIP_BATCH, SHAPES_CLIP_RATE = 1000, 64, 1.5e-3


def set_seed(*numbers):
    """Let all that is random from here on follow from these numbers alone, resumed or not."""
    torch.manual_seed(int(np.random.default_rng(numbers).integers(2**62)))


def rate(step, steps, top):
    """Linear warm-up, then cosine to 0: the learning rate of a step (0 .. steps - 1) of a stage."""
    warmup = min(1, (step + 1) / min(WARMUP_STEPS, 1 + steps / 10))
    return top * warmup * (1 + math.cos(math.pi * step / steps)) / 2


def update(optimizer, loss, learning_rate):
    """One optimiser step down the gradient of `loss`, clipped to MAX_NORM."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
    optimizer.step()


def bf16_pays(device):
    """Whether bf16 is faster than fp32 on this device: a CPU is timed on a matrix product, as some only imitate it."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    ones = torch.ones(1024, 1024)
    timer = partial(Timer, "a @ a", num_threads=torch.get_num_threads())
    slow, fast = (timer(globals={"a": a}).timeit(20).median for a in (ones, ones.bfloat16()))
    return slow > 2 * fast  # twice: casting to and fro costs as well


def see_patches(visual, images):
    """Start an image tower with a patch embedding that keeps what patches show, and keep it: images [n, 3, S, S].

    Its rows are the patches' principal components, each scaled to variance 1, so that edges count as much as colour: a patch
    embedding learned in so few steps sees colours and hardly any kinds. Positions start as sines and cosines.
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

    Contrastive, as CLIP was: whole train scenes against captions of what is in them, no boxes. It therefore knows scenes better
    than regions, the gap in granularity that the poster starts from (Fig. 1).
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

    SHAPES_CLIP.vocab_size = tokenizer.vocab_size
    clip = CLIP(SHAPES_CLIP)
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
        update(optimizer, loss, rate(step, SHAPES_CLIP_STEPS, SHAPES_CLIP_RATE))
        if step % 20 == 0:
            right = (logits.argmax(dim=1) == target).float().mean()
            bar.set_postfix(loss=f"{loss.item():.2f}", right=f"{right:.2f}")
    clip_model.save_clip(clip, path)
    return path


def tokenizer_for(clip_path, vocab_size):
    """The tokenizer of a CLIP: the vocabulary that lies beside its file, else CLIP's own."""
    beside = [Path(clip_path).with_name(name) for name in VOCABULARIES]
    found = next((path for path in beside if path.is_file()), None)
    tokenizer = Tokenizer(found) if found else clip_model.clip_tokenizer()
    if tokenizer.vocab_size != vocab_size:
        wrong = (
            f"{found or 'the vocabulary of CLIP'} has {tokenizer.vocab_size} tokens, {clip_path}"
        )
        raise HiVGError(f"{wrong} {vocab_size}: put its own beside it as {beside[0].name}.")
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


def train_epoch(model, loader, optimizer, rates, weights, context, title):
    """One pass over the loader; rates: a learning rate for each of its steps; weights of the losses. Returns each loss's mean."""
    device = next(model.parameters()).device
    model.train()
    total = dict.fromkeys(weights, 0.0)
    bar = tqdm(loader, title, leave=False)
    names = ("image", "padding", "box", "object")
    for step, (batch, learning_rate) in enumerate(zip(bar, rates, strict=True)):
        images, padding, boxes, objects = (batch[name].to(device) for name in names)
        tokens = data.cut_to_longest(model.tokenize(batch["text"])).to(device)
        with context():
            output = model(images, tokens, padding, for_losses=True)
        parts = losses(output, boxes, objects, model.clip.logit_scale)
        loss = sum(weight * parts[name] for name, weight in weights.items())
        if not math.isfinite(loss.item()):
            raise HiVGError(f"The loss is {loss.item()} in {title}, step {step}: try a lower --lr.")
        update(optimizer, loss, learning_rate)
        total = {name: total[name] + parts[name].item() for name in total}
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}")
    return {name: round(value / len(loader), 4) for name, value in total.items()}


class Progress(NamedTuple):
    """Where a run stands; kept in last.pt, so that --resume goes on from there."""

    stage: int = 0  # -1: the warm-up without bridges
    epoch: int = -1  # the one to do next; -1: look at what the stage begins with, train nothing
    best: float = -1.0  # best Acc@0.5 of the stage so far
    log: tuple = ()  # lines of log.jsonl


def start(args, device, context):
    """A new model on the device: CLIP read (or, for shapes, trained) and HiVG built around it. What `args` leave open is
    filled in, from the preset for this CLIP and these data sets."""
    clip_path = args.clip or "ViT-B/16"
    if args.dataset == ["shapes"] and not args.clip:
        clip_path = shapes_clip(Path(args.data_root) / "shapes", args.seed, device, context)
    clip = clip_model.load_clip(str(clip_path))
    tokenizer = tokenizer_for(clip_path, clip.config.vocab_size)
    torch.manual_seed(args.seed)
    kind = "mixture" if len(args.dataset) > 1 or args.dataset == ["mixup"] else args.dataset[0]
    size = "large" if clip.config.vision_layers == 24 else "base"
    usual = next(n for n in (kind, f"{size}-{kind}", size) if n in PRESETS)
    preset = PRESETS[args.preset or usual]
    args.preset = args.preset or usual
    if args.without_bridges is None:
        args.without_bridges = preset.without_bridges
    stages = 1 + (args.groups or HiVGConfig.groups)
    usual = {"epochs": preset.epochs, "lr": preset.rates, "batch_size": preset.batches}
    for name, values in usual.items():
        usual_values = [*values, *values[-1:] * stages][:stages]  # G may be another
        setattr(args, name, getattr(args, name) or usual_values)
    counted = TEXT_LAYERS.get(data.DATASETS[args.dataset[0]].index, (12,))  # as if of twelve
    counted = () if kind == "mixture" else counted
    text_layers = tuple(sorted({math.ceil(i * clip.config.text_layers / 12) for i in counted}))
    chosen = {flag: getattr(args, flag) for flag in MODEL_FLAGS if getattr(args, flag) is not None}
    config = HiVGConfig(**{"text_layers": text_layers} | preset.model | chosen)
    return HiVG(config, clip, tokenizer).to(device)


def run(args):
    """The whole job: data, model, the warm-up and the stages, the evaluation of the best."""
    output, device = Path(args.output), pick_device(args.device)
    last, best = output / "last.pt", output / "best.pt"
    if args.resume:
        model, content = load_model(last)
        with explaining(f"{last} is nothing to resume from", "name the --output of a run"):
            args = argparse.Namespace(**content["settings"] | {"resume": True})
            progress, optimizer_state = Progress(**content["progress"]), content["optimizer"]
    elif last.exists():
        raise HiVGError(f"{last} is of an earlier run: give --resume, or another --output.")
    splits = {name: data.available_splits(name, args.data_root) for name in args.dataset}
    args.bf16 = args.bf16 if args.resume else bf16_pays(device)
    context = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)
    if not args.resume:
        model, optimizer_state = start(args, device, context), None
        progress = Progress(stage=-1 if args.without_bridges else 0)
    model.to(device).enter_stage(progress.stage)
    config, preset = model.config, PRESETS[args.preset]
    picture = dict(image_size=config.image_size, mean=config.mean, std=config.std)
    read = partial(data.GroundingDataset, data_root=args.data_root, **picture)
    train_set = read(args.dataset, "train", augment=args.augment, cache=not args.augment)
    val_set = read(args.dataset, args.select, cache=not args.augment)

    # a short account of what is going to happen
    precision = "bf16" if args.bf16 else "fp32"
    names = ", ".join(args.dataset)
    print(f"{names} from {args.data_root} into {output}, on {device} in {precision}")
    for name in args.dataset:
        source = data.DATASETS[name]
        for split, published in zip_longest(source.splits.split(), source.counts):
            there = read(name, split) if split in splits[name] else None
            words = [f"{len(there):,} expressions", *there.report] if there else ["not there"]
            words += [f"published: {published:,}"] if published else []
            print(f"  {name} {split:6} {'; '.join(words)}")
    if len(args.dataset) > 1:
        print(f"  together {len(train_set):,} to train on; {'; '.join(train_set.report)}")
    print(f"adapters {config.adapters}; losses {args.losses}")
    print(f"epochs {args.without_bridges} without bridges, then by stage {args.epochs}; ", end="")
    print(f"rates {args.lr}, batches {args.batch_size}")
    print(account(model), flush=True)
    with replacing(output / "config.json") as temporary:
        used = {"settings": vars(args), "model": asdict(config)}
        temporary.write_text(json.dumps(used, indent=2))

    while progress.stage < len(args.epochs):
        stage, warmup = progress.stage, max(0, progress.stage)
        epochs = args.epochs[stage] if stage >= 0 else args.without_bridges
        top, batch_size = args.lr[warmup], args.batch_size[warmup]
        set_seed(args.seed, 1 + stage)
        model.enter_stage(stage)
        trained = [p for p in model.parameters() if p.requires_grad]
        settings = dict(betas=preset.betas, weight_decay=WEIGHT_DECAY, fused=True)
        optimizer = torch.optim.AdamW(trained, top, **settings)
        if optimizer_state:
            optimizer.load_state_dict(optimizer_state)
        for epoch in range(progress.epoch, epochs):
            began, line = time.time(), {"stage": stage, "epoch": epoch}
            if epoch >= 0:
                set_seed(args.seed, 1 + stage, epoch)
                train_set.set_epoch(args.seed, 1 + stage, epoch)
                loader = data.batches(train_set, batch_size, args.workers, train=True)
                steps = range(epoch * len(loader), (epoch + 1) * len(loader))
                rates = [rate(step, epochs * len(loader), top) for step in steps]
                title = f"stage {stage}, epoch {epoch}"
                line["losses"] = train_epoch(
                    model, loader, optimizer, rates, args.losses, context, title
                )
            line |= evaluate(model, val_set, args.workers)
            line["seconds"] = round(time.time() - began, 1)
            best_yet = max(progress.best, line["acc"])
            progress = Progress(stage, epoch + 1, best_yet, (*progress.log, line))
            if line["acc"] == best_yet:  # of equals the later one
                save_checkpoint(best, model)
            resume = dict(progress=progress._asdict(), optimizer=optimizer.state_dict())
            save_checkpoint(last, model, settings=vars(args), **resume)
            with replacing(output / "log.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(entry) + "\n" for entry in progress.log))
            what = f"after epoch {epoch}" if epoch >= 0 else "begins"
            print(f"stage {stage} {what}: {args.select} Acc@0.5 {line['acc']:.2f} %", flush=True)
        model, optimizer_state = load_model(best)[0].to(device), None  # (D13)
        progress = Progress(stage + 1, log=progress.log)

    model = load_model(best)[0].to(device).merge()
    for name in args.dataset:
        evaluate_splits(model, best, name, None, args.data_root, output, args.workers)


def loss_weight(text):
    """argparse's type of NAME=WEIGHT, one of the losses."""
    name, _, weight = text.partition("=")
    if name not in LOSS_WEIGHTS:
        raise ValueError
    return name, at_least(0, float)(weight)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawText)
    add = parser.add_argument
    # data and weights
    add("--dataset", required=True, nargs="+", help=f"one or several of {', '.join(data.DATASETS)}")
    add("--data-root", default="data", help="folder of the data sets (default: data)")
    add("--clip", help="CLIP's name or file (default: ViT-B/16; shapes: one trained first)")
    add("--image-size", type=at_least(1), help="side of the square in pixels (default: CLIP's)")
    add("--no-augment", action="store_true", help="photographs as they are, kept in memory")
    # what is trained, and how long: one value for all stages, or one for each
    add("--preset", choices=PRESETS, help="defaults of the following (default: by CLIP and data)")
    add("--epochs", type=at_least(0), nargs="+", help="of the warm-up and stages 1 to G; 0: none")
    add("--lr", type=at_least(0, float), nargs="+", help="top learning rates")
    add("--batch-size", type=at_least(1), nargs="+", help="expressions in a batch")
    add("--without-bridges", type=at_least(0), help="epochs of a warm-up without bridges, before")
    add("--loss", type=loss_weight, nargs="+", metavar="NAME=WEIGHT", help=", ".join(LOSS_WEIGHTS))
    add("--select", default="val", help="split that chooses the best epoch (default: val)")
    # the model: ablations
    add("--adapters", choices=HiVGConfig.ADAPTERS, help="of the image tower (default: hilora)")
    add("--groups", type=at_least(1), help="G of HiLoRA, and the number of stages (default: 3)")
    add("--rank", type=at_least(1), help="of LoRA (default: 32)")
    add("--targets", nargs="+", help="of LoRA: attn.in_proj attn.out_proj (default) and the like")
    add("--visual-layers", type=at_least(1), nargs="+", help="V, the multi-level features")
    add("--bridge-layers", type=at_least(1), nargs="+", help="C, the layers with a bridge")
    add("--no-bridges", dest="bridge_layers", action="store_const", const=())
    add("--text-layers", type=at_least(1), nargs="+", help="f^i that the bridges read")
    # the run
    add("--output", help="folder of checkpoints and log (default: runs/DATASET)")
    add("--resume", action="store_true", help="go on from OUTPUT/last.pt, with its settings")
    add("--seed", type=at_least(0), default=0, help="of all that is random (default: 0)")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--workers", type=at_least(0), help="processes that read photographs (default: 8 at most)")
    args = parser.parse_args()
    args.dataset = list(dict.fromkeys(args.dataset))
    shapes = args.dataset == ["shapes"]
    args.augment = not (shapes or args.no_augment)  # shapes are kept in memory: there are plenty
    args.output = args.output or f"runs/{'_'.join(args.dataset)}"
    if args.workers is None:
        args.workers = min(8, os.cpu_count()) if args.augment else 0
    args.losses = LOSS_WEIGHTS | dict(args.loss or ())
    stages = 1 + (args.groups or HiVGConfig.groups)
    for name in ("epochs", "lr", "batch_size"):
        values = getattr(args, name) or ()
        if len(values) not in (0, 1, stages):
            what = f"--{name.replace('_', '-')} takes one value or {stages}, not {len(values)}"
            parser.error(what)
        setattr(args, name, [*values] * (stages if len(values) == 1 else 1))
    exit_with(run, args)


if __name__ == "__main__":
    main()
