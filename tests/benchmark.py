"""How fast HiVG is: a table of times, operations and memory, and ratios against `transformers`.

    python tests/benchmark.py                        # ViT-B/16, batches of 8, float32 on a CPU
    python tests/benchmark.py runs/refcoco/best.pt --bf16
    python tests/benchmark.py ViT-L/14 --batch-size 32 --checkpointing --compile
    python tests/benchmark.py --ratios               # against CLIP's bare image encoder and PIL, CPU
    python tests/benchmark.py --launches             # operations launched in a training step
    python tests/benchmark.py --launches --compile   # the same, and with compiled blocks (minutes)

The table has a training step of stage 3, inference, and reading; after it stand the hours that
RefCOCO's schedule would take if all its steps ran at that speed. MFU is the share of what a large
matrix product reaches on the same device. Ratios are of medians, the two sides measured in turn.
Images are random, and so are weights unless a checkpoint is named.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

import data  # noqa: E402
import train  # noqa: E402
from clip_model import CLIP, CLIPConfig, Tokenizer  # noqa: E402
from data import adder, number_from  # noqa: E402
from hivg import LOSS_WEIGHTS, HiVG, HiVGConfig, read_checkpoint  # noqa: E402

MIN_SECONDS = 2.0  # of measuring, for each time

LARGE = dict(patch_size=14, vision_width=1024, vision_layers=24, text_width=768, embed_dim=768)
CLIP_CONFIGS = {  # the released vision transformers
    "ViT-B/32": CLIPConfig(patch_size=32),
    "ViT-B/16": CLIPConfig(),
    "ViT-L/14": CLIPConfig(**LARGE),
    "ViT-L/14@336px": CLIPConfig(image_size=336, **LARGE),
}


def random_model(name, config=HiVGConfig(stage=3), **sizes):  # noqa: B008
    """HiVG around a CLIP of size `name`, a key of CLIP_CONFIGS, with random weights and a vocabulary
    of single letters."""
    clip = CLIP(replace(CLIP_CONFIGS[name], **sizes))
    return HiVG(config, clip, Tokenizer("# no merges\n"))


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


def training_step(model, batch, dtype=None):
    """A function that makes one training step of the model on the batch."""
    optimizer, scaler = train.make_optimizer(model)
    optimizer.param_groups[0]["lr"] = 1e-6
    args = argparse.Namespace(batches=1, loss=LOSS_WEIGHTS)
    return lambda: train.train_step(model.train(), [batch], [0], optimizer, scaler, args, dtype)


def inference(model, batch, dtype=None):
    """A function that finds the boxes of a batch, which comes from the CPU; boxes go back."""

    @torch.no_grad()
    def job():
        device_batch = model.inputs(batch)
        with torch.autocast(model.mean.device.type, dtype, enabled=dtype is not None):
            output = model(*(device_batch[name] for name in ("image", "tokens", "padding")))
        return output.boxes.cpu()

    return job


def reading_dataset(folder, **options):
    """A data set of 256 expressions on one JPEG of 640 x 480."""
    coarse = np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype="u1")
    Image.fromarray(coarse).resize((640, 480)).save(Path(folder, "a.jpg"), quality=90)
    line = json.dumps({"image": "a.jpg", "text": "a red cup", "box": [200, 100, 400, 300]})
    Path(folder, "train.jsonl").write_text(f"{line}\n" * 256)
    annotations = {"own": data.read_annotations("own", folder)}
    return data.open_split(annotations, "train", augment=True, **options)


# --------------------------------------------------------------------------------------- the table


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


def table_row(name, job, images, device, peak):
    """A line of the table: time, operations (2 for a multiply-add) and GPU memory of a job that handles
    so many images; and images a second."""
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = median_seconds(job)
    memory = torch.cuda.max_memory_allocated(device) / 2**20 if is_gpu else math.nan
    # Counted after timing, and without compilation: Dynamo never compiles what it first meets under
    # the counter. Attention is written out, since fused kernels are not counted on every device.
    eager = torch.compiler.set_stance("force_eager")
    with eager, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        job()
    flops = counter.get_total_flops()
    values = 1e3 * seconds, images / seconds, flops / images / 1e9, 100 * flops / seconds / peak
    cells = "{:9.1f} {:9,.1f} {:13.2f} {:6.1f} {:8,.0f}".format(*values, memory)
    return f"{name:24} {images:6} {cells}", images / seconds


def print_table(args):
    """Training step, inference and reading."""
    device = data.setup_device(args.device)
    dtype = torch.bfloat16 if args.bf16 else train.autocast_dtype(device)
    model = (
        random_model(args.model) if args.model in CLIP_CONFIGS else read_checkpoint(args.model)[0]
    )
    model.to(device).checkpointing = args.checkpointing
    if args.compile:
        model.compile_blocks()
    size, peak = args.batch_size, matrix_peak(device, dtype or torch.float32)
    step = training_step(model, synthetic_batch(model, size), dtype)
    rows = [table_row(f"training step, stage {model.config.stage}", step, size, device, peak)]
    model.merge().eval().requires_grad_(False)
    for count in sorted({1, size}):
        job = inference(model, synthetic_batch(model, count), dtype)
        rows.append(table_row("inference", job, count, device, peak))
    with tempfile.TemporaryDirectory() as folder:
        dataset = reading_dataset(
            folder, image_size=model.config.image_size, tokenizer=model.tokenizer
        )
        batches = torch.arange(256).view(-1, 32).tolist()
        for workers in sorted({0, data.default_workers()}):
            loader = data.BatchLoader(dataset, workers)
            name = f"reading, {workers} workers" if workers else "reading, one core"
            job = lambda loader=loader: list(loader(batches))  # noqa: E731
            rows.append(table_row(name, job, 256, device, peak))
    print(f"{args.model} on {device}, {dtype or torch.float32}")
    print(f"a matrix product here: {peak / 1e9:,.0f} GFLOP/s, which is 100 % MFU")
    print("                          batch        ms  images/s  GFLOPs/image  MFU %      MiB")
    print(*(line for line, _ in rows), sep="\n")
    samples = sum(row[1] for row in train.PLANS["base"]) * data.DATASETS["refcoco"].published[0]
    hours = samples / rows[0][1] / 3600
    print(f"if all steps ran at this speed, RefCOCO's schedule would take {hours:,.1f} hours")


# ------------------------------------------------------------------------------------------- ratios


def print_ratios(rounds=10):
    """Times against transformers' bare CLIP ViT-B/16 image encoder and against PIL."""
    import transformers

    encoder = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(patch_size=16)  # of ViT-B, but for the patches of ViT-B/32
    ).eval()
    model = random_model("ViT-B/16").merge().eval()
    batch = synthetic_batch(model, 8)
    images = model.inputs(batch)["image"]

    @torch.no_grad()
    def bare_encoder():
        encoder(images)

    bare = {"bare encoder, forward": bare_encoder}
    print_medians(bare | {"inference": inference(model, batch)}, rounds)
    steps = {
        "training step, stage 3": {"stage": 3},
        "training step, vanilla LoRA": {"stage": 1, "adapters": "vanilla"},
        "training step, stage 1": {"stage": 1},
    }
    for name, values in steps.items():
        bare[name] = training_step(random_model("ViT-B/16", HiVGConfig(**values)), batch)
    print_medians(bare, rounds)
    with tempfile.TemporaryDirectory() as folder:
        dataset, index = reading_dataset(folder), iter(range(10**9))
        jobs = {
            "PIL: open, convert, resize": lambda: (
                Image.open(Path(folder, "a.jpg")).convert("RGB").resize((224, 224))
            ),
            "a training sample": lambda: dataset[next(index) % 256],
        }
        print_medians(jobs, 100 * rounds)


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


# ----------------------------------------------------------------------------------------- launches


ONE_KERNEL = ("aten::_foreach", "aten::_fused", "aten::_scaled_dot_product_flash")  # on a GPU
NO_KERNEL = {  # views, allocations, and what looks at tensors alone
    f"aten::{name}"
    for name in "alias as_strided view view_as reshape _reshape_alias _unsafe_view expand expand_as "
    "permute transpose t numpy_T mT select slice narrow squeeze unsqueeze flatten unflatten chunk "
    "split split_with_sizes unbind detach resolve_conj to _to_copy contiguous linear matmul dropout "
    "empty empty_like empty_strided new_empty new_empty_strided resize_ item _local_scalar_dense "
    "is_nonzero promote_types result_type _nnpack_available".split()
}


def launches(event):
    """Operations in an event of the profiler: a GPU launches a kernel for nearly each, a cast included.
    A kernel that torch.compile generates, "graph_0_cpp_fused_...", is one."""
    if event.name.startswith(ONE_KERNEL):
        return 1
    inside = sum(map(launches, event.cpu_children))
    is_kernel = event.name.startswith(("aten::", "graph_")) and event.name not in NO_KERNEL
    return inside or int(is_kernel)


def print_launches(name, compiled):
    """Operations of a training step of stage 3 on a CPU. They do not depend on the widths: those
    here are small."""
    torch._inductor.config.cpp.enable_kernel_profile = True  # names generated kernels
    model = random_model(name, vision_width=128, text_width=64, embed_dim=64, vocab_size=514)
    for way in ("eager", "compiled") if compiled else ("eager",):
        if way == "compiled":
            model.compile_blocks()
        for dtype in (torch.bfloat16, None):
            step = training_step(model, synthetic_batch(model, 2), dtype)
            step()  # the first step makes the optimiser's state
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
                step()
            count = sum(launches(event) for event in record.events() if event.cpu_parent is None)
            print(f"{name}, {way}, {dtype or torch.float32}: {count:,} operations in a step")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = adder(parser)
    add("model", "a checkpoint, or a CLIP's name for its size", nargs="?", default="ViT-B/16")
    add("--batch-size", type=number_from(1), default=8)
    add("--bf16", "compute in bf16 (default: as train.py does)", action="store_true")
    add("--checkpointing", action="store_true")
    add("--compile", action="store_true")
    add("--device", "cuda, mps or cpu (default: the best there is)")
    add("--ratios", "instead of the table: ratios, on a CPU", action="store_true")
    add("--launches", "instead of the table: operations of a step", action="store_true")

    args = parser.parse_args()
    if args.launches:
        print_launches(args.model, args.compile)
    elif args.ratios:
        print_ratios()
    else:
        print_table(args)
