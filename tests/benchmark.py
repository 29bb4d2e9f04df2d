"""How fast HiVG is: a table of times, operations and memory, and ratios against `transformers`.

    python tests/benchmark.py                        # ViT-B/16, batches of 8, float32 on a CPU
    python tests/benchmark.py --clip ViT-L/14 --batch-size 32 --checkpointing --compile
    python tests/benchmark.py --ratios               # against CLIP's bare image encoder and PIL, CPU
    python tests/benchmark.py --memory               # what a training step takes, counted on a CPU

The table has a training step of stage 3, inference, and reading; after it stand the hours that
RefCOCO's schedule would take if all its steps ran at that speed. MFU is the share of what a large
matrix product reaches on the same device. Ratios are of medians, the two sides measured in turn.
Weights and images are random.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import data  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
from clip_model import CLIP, CLIP_CONFIGS  # noqa: E402
from hivg import HiVG, HiVGConfig  # noqa: E402


def training_step(model, batch, dtype=None):
    """A function that makes one training step of the model on the batch."""
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-6, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def step():
        weights = train.LOSS_WEIGHTS
        train.train_step(model.train(), [batch], [0], optimizer, scaler, weights, dtype)

    return step


def reading_dataset(folder, **options):
    """A data set of 256 expressions on one JPEG of 640 x 480."""
    coarse = np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype="u1")
    Image.fromarray(coarse).resize((640, 480)).save(Path(folder, "a.jpg"), quality=90)
    line = json.dumps({"image": "a.jpg", "text": "a red cup", "box": [200, 100, 400, 300]})
    Path(folder, "train.jsonl").write_text(f"{line}\n" * 256)
    return data.GroundingDataset("own", "train", folder, augment=True, **options)


def print_table(args):
    """Training step, inference and reading."""
    device = evaluate.setup_device(args.device)
    dtype = train.autocast_dtype(device)
    model = evaluate.random_model(args.clip).to(device)
    model.checkpointing = args.checkpointing
    if args.compile:
        model.compile()
    peak = evaluate.matrix_peak(device, dtype or torch.float32)
    size, batch = args.batch_size, evaluate.synthetic_batch(model, args.batch_size)
    step = training_step(model, batch, dtype)
    rows = [evaluate.benchmark_row("training step, stage 3", step, size, device, peak)]
    rows += evaluate.inference_rows(model, size, dtype is torch.bfloat16, peak)
    with tempfile.TemporaryDirectory() as folder:
        image_size = model.config.image_size
        dataset = reading_dataset(folder, image_size=image_size, tokenizer=model.tokenizer)
        batches = torch.arange(256).view(-1, 32).tolist()
        for workers in sorted({0, data.default_workers(["refcoco"])}):
            name = f"reading, {workers} workers" if workers else "reading, one core"

            def read(workers=workers):
                return list(data.read_batches(dataset, batches, workers, device.type == "cuda"))

            rows.append(evaluate.benchmark_row(name, read, 256, device, peak))
    print(f"{args.clip} on {device}, {dtype or torch.float32}")
    evaluate.print_benchmark(rows, peak)
    steps = sum(train.PRESETS["base"].epochs) * data.DATASETS["refcoco"].published[0]
    hours = steps / rows[0][3] / 3600
    print(f"if all steps ran at this speed, RefCOCO's schedule would take {hours:,.1f} hours")


def print_ratios(rounds):
    """Times against transformers' bare CLIP ViT-B/16 image encoder and against PIL."""
    import transformers

    encoder = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            patch_size=16,
        )
    ).eval()
    model = evaluate.random_model("ViT-B/16").merge().eval()
    batch = evaluate.synthetic_batch(model, 8)
    images, _, _ = evaluate.model_inputs(model, batch)

    @torch.inference_mode()
    def bare_encoder():
        encoder(images)

    @torch.inference_mode()
    def inference():
        model(*evaluate.model_inputs(model, batch))

    steps = {"bare encoder, forward": bare_encoder}
    for name, adapters, stages in (
        ("training step, stage 3", "hilora", (1, 2, 3)),
        ("training step, vanilla LoRA", "vanilla", (1,)),
        ("training step, stage 1", "hilora", (1,)),
    ):
        trained = HiVG(HiVGConfig(adapters=adapters), CLIP(CLIP_CONFIGS["ViT-B/16"]))
        trained.tokenizer = model.tokenizer
        for stage in stages:
            trained.enter_stage(stage)
        steps[name] = training_step(trained, batch)
    print_medians({"bare encoder, forward": bare_encoder, "inference": inference}, rounds)
    print_medians(steps, rounds)
    with tempfile.TemporaryDirectory() as folder:
        dataset, index = reading_dataset(folder), iter(range(10**9))
        jobs = {
            "PIL: open, convert, resize": lambda: (
                Image.open(Path(folder, "a.jpg")).convert("RGB").resize((224, 224))
            ),
            "a training sample": lambda: dataset[next(index) % 256],
        }
        print_medians(jobs, 100 * rounds)


def print_memory(name):
    """What a training step of stage 3 takes, as `train.step_bytes` counts it, for batches of any
    size."""
    print(f"{'':16} {'dtype':14} {'fixed GiB':>10} {'MiB a sample':>13}")
    for checkpointing in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            model = evaluate.random_model(name)
            model.checkpointing = checkpointing
            fixed, sample = train.step_bytes(model, 16, dtype)
            option = "--checkpointing" if checkpointing else ""
            sizes = f"{fixed / 2**30:10.2f} {sample / 2**20:13.1f}"
            print(f"{option:16} {dtype!s:14} {sizes}", flush=True)


def print_medians(jobs, rounds):
    """Print the median time of each job and its ratio to the first. All jobs take turns; the first
    two rounds do not count."""
    times = {name: [] for name in jobs}
    for _ in range(rounds + 2):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[2:]) for name, values in times.items()}
    first = next(iter(medians.values()))
    for name, seconds in medians.items():
        print(f"{name:28} {1e3 * seconds:10.2f} ms {seconds / first:8.3f} of the first")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--clip", choices=CLIP_CONFIGS, default="ViT-B/16", help="size (default: ViT-B/16)")
    add("--batch-size", type=evaluate.number_from(1), default=8)
    add("--checkpointing", action="store_true")
    add("--compile", action="store_true")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--ratios", action="store_true", help="instead of the table: ratios, on a CPU")
    add("--memory", action="store_true", help="instead of the table: GiB of a step, counted")
    add("--rounds", type=evaluate.number_from(1), default=10, help="of --ratios (default: 10)")
    args = parser.parse_args()
    if args.memory:
        print_memory(args.clip)
    elif args.ratios:
        print_ratios(args.rounds)
    else:
        print_table(args)
