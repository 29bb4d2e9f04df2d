"""How fast HiVG is against `transformers`' bare CLIP ViT-B/16 image encoder, and against itself: ratios of medians, the sides
measured in turn on the machine it runs on.

    python tests/yardstick.py [rounds]
"""

import itertools
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import data  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
from clip_model import CLIP, SIZES  # noqa: E402
from hivg import HiVG, HiVGConfig  # noqa: E402

BATCH = 8


def medians(jobs, rounds):
    """{name: the median of its times in seconds}; all jobs take turns, the first two rounds do not count."""
    times = {name: [] for name in jobs}
    for _ in range(rounds + 2):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[2:]) for name, each in times.items()}


def training_step(adapters, stage):
    """A training step in fp32 of HiVG with these adapters, after entering their stages up to this one."""
    model = HiVG(HiVGConfig(adapters=adapters), CLIP(SIZES["ViT-B/16"]), letters)
    for each in range(1, stage + 1):
        model.enter_stage(each)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-6, fused=True)
    how = optimizer, 1e-6, train.LOSS_WEIGHTS, torch.enable_grad  # in the place of autocast
    return partial(train.train_step, model.train(), [evaluate.synthetic(model, BATCH)], *how)


def plain(path):
    Image.open(path).convert("RGB").resize((224, 224))


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    evaluate.keep_freed_memory()  # as train.py and evaluate.py do
    config = transformers.CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        patch_size=16,
    )
    bare = transformers.CLIPVisionModel(config).eval()
    model = evaluate.random_model("ViT-B/16")
    letters, batch = model.tokenizer, evaluate.synthetic(model, BATCH)
    model.merge().eval()
    images = batch["image"]
    inference = {
        "bare image encoder": torch.inference_mode()(lambda: bare(images)),
        "inference": torch.inference_mode()(lambda: model(*evaluate.inputs_of(model, batch))),
    }
    steps = {
        "bare image encoder": inference["bare image encoder"],
        "stage 3": training_step("hilora", 3),
        "one pair in each layer": training_step("vanilla", 1),
        "stage 1": training_step("hilora", 1),
    }
    folder = tempfile.TemporaryDirectory()
    picture = Path(folder.name, "a.jpg")
    coarse = np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype="u1")
    Image.fromarray(coarse).resize((640, 480)).save(picture, quality=90)
    line = json.dumps({"image": "a.jpg", "text": "a", "box": [200, 100, 400, 300]})
    Path(folder.name, "train.jsonl").write_text(f"{line}\n" * 1000)
    samples = data.GroundingDataset("own", "train", folder.name, augment=True)
    index = iter(itertools.cycle(range(1000)))
    reading = {"PIL alone": partial(plain, picture), "sample": lambda: samples[next(index)]}
    for what, jobs, times in (
        ("inference", inference, rounds),
        ("training", steps, rounds),
        ("reading", reading, 100 * rounds),
    ):
        found = medians(jobs, times)
        first = next(iter(found.values()))
        for name, time_ in found.items():
            print(f"{what:10} {name:24} {1e3 * time_:10.2f} ms {time_ / first:8.3f} of the first")
