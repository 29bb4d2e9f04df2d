"""Training: a warm-up and the three stages of HiLoRA, one after the other, each from the best of the one before.

    python train.py --dataset shapes                             # two CPU cores, nothing to download
    python train.py --dataset refcoco --data-root data           # COCO's images, refer's files, CLIP ViT-B/16
    python train.py --dataset refcoco --data-root data --resume  # go on where that run was stopped

Reading order: PRESETS (epochs, rates, batches, sizes), shapes_clip (a small CLIP, where there is none to download), train_epoch
(the loop), run (the account, the stages, the final evaluation), main (the flags).

What a run writes into --output: best.pt (stands alone), last.pt (to resume from), log.jsonl (a line for each epoch), config.json
(what was used), results.json and a contact sheet.
"""

import argparse
import json
import math
import os
import time
from argparse import RawDescriptionHelpFormatter as RawText
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from tqdm import tqdm

from clip_model import (
    CLIP,
    CLIPConfig,
    HiVGError,
    Tokenizer,
    clip_tokenizer,
    load_clip,
    replacing,
    save_clip,
)
from data import DATASETS, GroundingDataset, available_splits, collate, load_image, prepare
from evaluate import evaluate, evaluate_splits, exit_with, pick_device
from hivg import (
    LOSS_WEIGHTS,
    HiVG,
    HiVGConfig,
    load_checkpoint,
    load_model,
    losses,
    save_checkpoint,
)


class Preset(NamedTuple):
    """Epochs, top learning rate and batch size of the warm-up and of stages 1 to 3; fields of HiVGConfig to change."""

    epochs: tuple
    rates: tuple
    batches: tuple
    model: dict = {}


SHAPES = dict(
    grounding_layers=4, heads=4, feedforward=512, region_width=512, dropout=0.0, lora_dropout=0.0
)
PRESETS = {
    "base": Preset((60, 20, 20, 20), (2.5e-4, 1e-4, 5e-5, 2.5e-5), (80, 60, 60, 40)),
    "shapes": Preset((4, 1, 1, 1), (1.5e-3, 7e-4, 7e-4, 7e-4), (96,) * 4, SHAPES),
    "shapes-long": Preset((30, 10, 10, 10), (1e-3, 5e-4, 5e-4, 5e-4), (96,) * 4, SHAPES),
}
TEXT_LAYERS = {  # the f^i that the bridges read; the last one for the data sets not named
    "refcoco+": (6, 12),
    "refcocog": tuple(range(1, 13)),
    "refcocog-google": tuple(range(1, 13)),
}
WEIGHT_DECAY = 1e-4
MAX_NORM = 1.0  # of the gradient (D5)
WARMUP_STEPS = 200  # of a stage, in which the rate rises to its top (D4)

SHAPES_CLIP = CLIPConfig(
    image_size=80,
    patch_size=16,
    vision_width=128,
    vision_layers=3,
    text_width=128,
    text_layers=3,
    embed_dim=128,
)
SHAPES_CLIP_STEPS, SHAPES_CLIP_BATCH, SHAPES_CLIP_RATE = 250, 256, 2e-3


def rate(step, steps, top):
    """Linear warm-up, then cosine to 0: the learning rate of a step (0 .. steps - 1) of a stage."""
    return top * min(1, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2


def update(optimizer, loss, learning_rate):
    """One optimiser step down the gradient of `loss`, clipped to MAX_NORM."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], MAX_NORM
    )
    optimizer.step()


def choose_precision(device):
    """("bf16" or "fp32", a function that gives the context for a forward pass), whichever is faster here.

    A CPU is timed on a matrix product in both: some have units for bf16, others only imitate it.
    """
    if device.type == "cpu":
        seconds = []
        for dtype in (torch.float32, torch.bfloat16):
            a, b = torch.ones(2048, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
            a @ b
            start = time.perf_counter()
            for _ in range(20):
                a @ b
            seconds.append(time.perf_counter() - start)
        bf16 = seconds[0] > 2 * seconds[1]
        # on CPUs the fused kernel's backward is 5 to 8 times slower in bf16 than two plain products
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    else:
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()

    def context():
        stack = ExitStack()
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=bf16))
        if device.type == "cpu" and bf16:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        return stack

    return ("bf16" if bf16 else "fp32"), context


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
    scenes = [
        prepare(load_image(folder / "images" / name), SHAPES_CLIP.image_size)[0].half()
        for name in tqdm(captions, "reading scenes")
    ]
    tokens = [tokenizer(texts) for texts in captions.values()]  # [captions of the scene, 77] each
    SHAPES_CLIP.vocab_size = tokenizer.vocab_size
    clip = CLIP(SHAPES_CLIP).to(device).train()
    optimizer = torch.optim.AdamW(clip.parameters(), weight_decay=0.05, betas=(0.9, 0.98))
    bar = tqdm(range(SHAPES_CLIP_STEPS), "training CLIP on scenes and captions")
    for step in bar:
        batch = rng.choice(len(scenes), SHAPES_CLIP_BATCH, replace=False)
        images = torch.stack([scenes[i] for i in batch]).float()
        texts = torch.stack([tokens[i][rng.integers(len(tokens[i]))] for i in batch])
        texts = texts[
            :, : -(-int(texts.argmax(dim=1).max() + 1) // 4) * 4
        ]  # cut to the longest, rounded up
        with context():
            logits = clip(images.to(device), texts.to(device)).float()  # [batch, batch]
        target = torch.arange(len(batch), device=device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        update(optimizer, loss, rate(step, SHAPES_CLIP_STEPS, SHAPES_CLIP_RATE))
        if step % 20 == 0:
            bar.set_postfix(
                loss=f"{loss.item():.2f}",
                right=f"{(logits.argmax(1) == target).float().mean():.2f}",
            )
    save_clip(clip, path)
    return path


def tokenizer_for(clip_path, vocab_size):
    """The tokenizer of a CLIP: the vocabulary that lies beside its file, else CLIP's own."""
    beside = [
        Path(clip_path).with_name(name)
        for name in ("bpe_vocab.txt.gz", "bpe_simple_vocab_16e6.txt.gz")
    ]
    found = next((path for path in beside if path.is_file()), None)
    tokenizer = Tokenizer(found) if found else clip_tokenizer()
    if tokenizer.vocab_size != vocab_size:
        raise HiVGError(
            f"{clip_path} was trained with {vocab_size} tokens, the vocabulary {found or 'of CLIP'} has "
            f"{tokenizer.vocab_size}: put the right one beside it as {beside[0].name}."
        )
    return tokenizer


def parameter_groups(model):
    """{what they belong to: [parameters]}, every parameter once."""
    prefixes = {
        "bridges": "bridges",
        "box_head": "heads",
        "region_norm": "heads",
        "region_mlp": "heads",
    }
    groups = {"CLIP": [], "LoRA pairs": [], "bridges": [], "grounding encoder": [], "heads": []}
    for name, parameter in model.named_parameters():
        first = name.split(".")[0]
        inside = "LoRA pairs" if ".lora_" in name else "CLIP"
        groups[inside if first == "clip" else prefixes.get(first, "grounding encoder")].append(
            parameter
        )
    return groups


def account(model):
    """The parameters by group, trained and in all, as lines of text."""
    lines = [f"{'parameters':18} {'trained':>12} {'total':>12}"]
    for group, parameters in {
        **parameter_groups(model),
        "together": list(model.parameters()),
    }.items():
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        lines.append(f"{group:18} {trained:12,} {sum(p.numel() for p in parameters):12,}")
    return "\n".join(lines)


def train_epoch(model, loader, optimizer, rates, context, title):
    """One pass over the loader; rates: a learning rate for each of its steps. Returns the mean of each loss."""
    device = next(model.parameters()).device
    model.train()
    total = dict.fromkeys(LOSS_WEIGHTS, 0.0)
    bar = tqdm(loader, title, leave=False)
    for step, (batch, learning_rate) in enumerate(zip(bar, rates), start=1):
        batch = {
            name: value.to(device)
            for name, value in batch.items()
            if isinstance(value, torch.Tensor)
        }
        with context():
            output = model(batch["images"], batch["tokens"], batch["padding"], for_losses=True)
        parts = losses(output, batch["boxes"], batch["objects"], model.clip.logit_scale)
        loss = sum(weight * parts[name] for name, weight in LOSS_WEIGHTS.items())
        if not math.isfinite(loss.item()):
            raise HiVGError(
                f"The loss is {loss.item()} in {title}, step {step}: go on with --resume and a lower --lr."
            )
        update(optimizer, loss, learning_rate)
        total = {name: total[name] + parts[name].item() for name in total}
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}")
    return {name: round(value / len(loader), 4) for name, value in total.items()}


class Progress(NamedTuple):
    """Where a run stands; kept in last.pt, so that --resume goes on from there."""

    stage: int = 0
    epoch: int = -1  # the one to do next; -1: look at what the stage begins with, train nothing
    best: float = -1.0  # best Acc@0.5 of the stage so far
    log: tuple = ()  # lines of log.jsonl


def start(args, device, context):
    """A new model on the device: CLIP read (or, for shapes, trained) and HiVG built around it."""
    clip_path = args.clip
    if args.dataset == "shapes" and not clip_path:
        clip_path = shapes_clip(Path(args.data_root) / "shapes", args.seed, device, context)
    clip = load_clip(str(clip_path or "ViT-B/16"))
    tokenizer = tokenizer_for(clip_path or "ViT-B/16", clip.config.vocab_size)
    torch.manual_seed(args.seed)
    config = HiVGConfig.for_clip(
        clip.config,
        TEXT_LAYERS.get(args.dataset, (12,)),
        image_size=args.image_size or clip.config.image_size,
        adapters=args.adapters,
        **PRESETS[args.preset].model,
    )
    return HiVG(config, clip, tokenizer).to(device)


def run(args):
    """The whole job: data, model, the four stages, the evaluation of the best."""
    output, device = Path(args.output), pick_device(args.device)
    last, best = output / "last.pt", output / "best.pt"
    if args.resume:
        model, content = load_model(last)
        args = argparse.Namespace(
            **{**content["settings"], "output": args.output, "device": args.device}
        )
        progress, optimizer_state = Progress(**content["progress"]), content["optimizer"]
    elif last.exists():
        raise HiVGError(
            f"{last} is there from an earlier run: go on with --resume, or name another --output."
        )
    splits = available_splits(args.dataset, args.data_root)
    precision, context = choose_precision(device)
    if not args.resume:
        model, progress, optimizer_state = start(args, device, context), Progress(), None
    model.to(device)
    config = model.config

    def dataset(split, augment=False):
        return GroundingDataset(
            args.dataset,
            split,
            args.data_root,
            config.image_size,
            augment,
            config.mean,
            config.std,
            cache=not args.augment,
            seed=args.seed,
        )

    train_set, val_set = dataset("train", args.augment), dataset(args.select)

    # a short account of what is going to happen
    print(
        f"{args.dataset} from {args.data_root}, into {output}; {device}, {precision}; adapters: {args.adapters}"
    )
    for split in DATASETS[args.dataset].splits.split():
        print(
            f"  {split:6}",
            f"{len(dataset(split)):,} expressions"
            if split in splits
            else "not in these files: passed over",
        )
    for note in train_set.report:
        print(f"  train: {note}")
    print(
        f"stage    epochs {args.epochs}, rates {args.lr}, batches {args.batch_size}; losses {LOSS_WEIGHTS}"
    )
    print(account(model), flush=True)
    with replacing(output / "config.json") as temporary:
        temporary.write_text(
            json.dumps({"settings": vars(args), "model": asdict(config)}, indent=2)
        )

    while progress.stage < len(args.epochs):
        stage = progress.stage
        epochs, top, batch_size = args.epochs[stage], args.lr[stage], args.batch_size[stage]
        model.enter_stage(stage)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=top, weight_decay=WEIGHT_DECAY, fused=device.type != "mps"
        )
        if optimizer_state:
            optimizer.load_state_dict(optimizer_state)
        for epoch in range(progress.epoch, epochs):
            began, line = time.time(), {"stage": stage, "epoch": epoch}
            if epoch >= 0:
                # all randomness of an epoch follows from these three numbers
                seed = int(np.random.default_rng([args.seed, stage, epoch]).integers(2**62))
                torch.manual_seed(seed)
                train_set.set_epoch(stage, epoch)
                loader = DataLoader(
                    train_set,
                    batch_size,
                    shuffle=True,
                    drop_last=len(train_set) > batch_size,
                    num_workers=args.workers,
                    collate_fn=partial(collate, tokenize=model.tokenize),
                    generator=torch.Generator().manual_seed(seed),
                )
                steps = range(epoch * len(loader), (epoch + 1) * len(loader))
                rates = [rate(step, epochs * len(loader), top) for step in steps]
                line["losses"] = train_epoch(
                    model, loader, optimizer, rates, context, f"stage {stage}, epoch {epoch}"
                )
            line["seconds"] = round(time.time() - began, 1)
            line |= evaluate(model, val_set, args.workers)
            progress = Progress(
                stage, epoch + 1, max(progress.best, line["acc"]), (*progress.log, line)
            )
            if line["acc"] == progress.best:  # of equals the later one
                save_checkpoint(best, model)
            save_checkpoint(
                last,
                model,
                progress=progress._asdict(),
                optimizer=optimizer.state_dict(),
                settings=vars(args),
            )
            with replacing(output / "log.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(entry) + "\n" for entry in progress.log))
            what = "begins with" if epoch < 0 else f"epoch {epoch}"
            print(
                f"stage {stage} {what}: {args.select} Acc@0.5 {line['acc']:.2f} %, {line['seconds']:.0f} s",
                flush=True,
            )
        model, optimizer_state = load_model(best)[0].to(device), None
        progress = Progress(stage + 1, log=progress.log)

    evaluate_splits(
        load_checkpoint(best, device),
        best,
        args.dataset,
        [s for s in splits if s != "train"] or splits,
        args.data_root,
        output,
        args.workers,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawText)
    add = parser.add_argument
    # data and weights
    add("--dataset", required=True, help="shapes, refcoco, refcoco+, refcocog, refcocog-google")
    add("--data-root", default="data", help="folder of the data sets (default: data)")
    add(
        "--clip", help="CLIP's name or file (default: ViT-B/16; shapes: a small one, trained first)"
    )
    add("--image-size", type=int, help="side of the padded square in pixels (default: CLIP's own)")
    add("--no-augment", action="store_true", help="photographs as they are, kept in memory")
    # what is trained, and how long: one value for all stages, or one for each of the four
    add("--preset", choices=PRESETS, help="defaults of the following (default: by data set)")
    add("--adapters", default="hilora", choices=HiVGConfig.ADAPTERS, help="of the image tower")
    add("--epochs", type=int, nargs="+", help="of the warm-up and stages 1 to 3; 0: none")
    add("--lr", type=float, nargs="+", help="top learning rates")
    add("--batch-size", type=int, nargs="+", help="expressions in a batch")
    add("--select", default="val", help="split that chooses the best epoch (default: val)")
    # the run
    add("--output", help="folder of checkpoints and log (default: runs/DATASET)")
    add("--resume", action="store_true", help="go on from OUTPUT/last.pt, with its settings")
    add("--seed", type=int, default=0, help="of all that is random (default: 0)")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--workers", type=int, help="processes that read photographs (default: 8 at most)")
    args = parser.parse_args()
    shapes = args.dataset == "shapes"
    args.preset = args.preset or ("shapes" if shapes else "base")
    args.augment = not (shapes or args.no_augment)  # shapes are kept in memory: there are plenty
    args.output = args.output or f"runs/{args.dataset}"
    args.workers = (
        (min(8, os.cpu_count()) if args.augment else 0) if args.workers is None else args.workers
    )
    preset = PRESETS[args.preset]
    for name, default in (
        ("epochs", preset.epochs),
        ("lr", preset.rates),
        ("batch_size", preset.batches),
    ):
        values = getattr(args, name) or list(default)
        if len(values) not in (1, 4):
            parser.error(f"--{name.replace('_', '-')} takes one value or four, not {len(values)}")
        setattr(args, name, values * (4 // len(values)))
    exit_with(run, args)


if __name__ == "__main__":
    main()
