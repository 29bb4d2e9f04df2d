"""train.py: the plan of a run, its steps, its loops, and what it writes, in miniature."""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import close, make_refer, tiny_clip, tiny_model
from PIL import Image, ImageColor

import clip_model
import data
import evaluate
import hivg
import train
from clip_model import CLIP, HiVGError, load_clip, save_clip
from hivg import HiVGConfig, load_checkpoint


def command(monkeypatch, module, *words):
    """Run a program's main with this command line; gives what it exits with, None if it just ends."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, words)])
    try:
        module.main()
    except SystemExit as stop:
        return stop.code


def exit_of(module, *words):
    """The same, outside of a test as well."""
    with pytest.MonkeyPatch.context() as patch:
        return command(patch, module, *words)


def told(code, *words):
    """A program ended with one sentence, which has these words."""
    assert code.startswith("error: ") and "\n" not in code, code
    assert all(str(word) in code for word in words), code


def words_of(refer_root, clip_file, output, *more, epochs=2):
    """The command line of a miniature run, without augmentation."""
    line = ["--dataset", "refcoco", "--data-root", refer_root, "--clip", clip_file]
    line += ["--output", output, "--epochs", epochs, "--batch-size", 4, "--lr", "3e-3"]
    line += ["--batches", 1, "--no-augment", "--device", "cpu", "--workers", 0]
    return [*map(str, line), *map(str, more)]


def log_of(output):
    """The lines of log.jsonl, which is JSON: NaN is none."""
    text = (output / "log.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def given(monkeypatch, line):
    """The `args` that train.py makes of a command line."""
    seen = []
    monkeypatch.setattr(train, "run_main", lambda run, args: seen.append(args))
    assert exit_of(train, *line.split()) is None
    return seen[0]


# ----------------------------------------------------------------------------------------- the plan

WARM_UP, LARGE_FIRST = (0, 60, 2.5e-4, 80), (-1, 10, 2.5e-4, 32)
LARGE = [(0, 60, 2.5e-4, 32), (1, 10, 1e-4, 32), (2, 10, 5e-5, 32), (3, 10, 2.5e-5, 32)]
PLANS = {  # what the authors' code does: stage, epochs, learning rate, batch
    "refcoco": [WARM_UP, (1, 20, 1e-4, 60), (2, 20, 5e-5, 60), (3, 20, 2.5e-5, 40)],
    "flickr30k": [(0, 30, *WARM_UP[2:])] + [(1, 5, 1e-4, 60), (2, 5, 5e-5, 60), (3, 5, 2.5e-5, 40)],
    "refcoco referit": [(0, 60, 2.5e-4, 64)]
    + [(1, 20, 1e-4, 64), (2, 20, 5e-5, 64), (3, 20, 2e-5, 64)],
    "refcoco+ large": [LARGE_FIRST, *LARGE],
    "referit large": [(-1, 5, 2.5e-4, 32), *LARGE],
    "flickr30k large": [LARGE_FIRST, (0, 30, 2.5e-4, 32)]
    + [(1, 5, 1e-4, 32), (2, 5, 5e-5, 32), (3, 5, 2.5e-5, 32)],
    "refcoco refcoco+ large": [LARGE_FIRST, (0, 30, 2.5e-4, 32)]
    + [(1, 10, 1e-4, 32), (2, 10, 5e-5, 32), (3, 10, 2e-5, 32)],
}
PLANS |= {"refcocog": PLANS["refcoco"], "own": PLANS["refcoco"]}


def plan_of(monkeypatch, line, depth=12, size=100_000, groups=3):
    """The plan for a CLIP of this depth and a train split of this size."""
    clip = argparse.Namespace(config=argparse.Namespace(vision_layers=depth))
    model = argparse.Namespace(clip=clip, config=HiVGConfig(groups=groups))
    return train.make_plan(given(monkeypatch, "--dataset " + line), model, range(size))


@pytest.mark.parametrize("words, rows", PLANS.items())
def test_plans_of_the_authors(monkeypatch, words, rows):
    """Epochs, rates and batches by data set and size of CLIP; seven batches a step, as they had seven
    GPUs; an epoch sees every expression, but for what fills no step."""
    names = words.removesuffix(" large")
    plan = plan_of(monkeypatch, names, 12 if names == words else 24)
    assert [tuple(stage[:4]) for stage in plan] == rows and not any(stage.hold for stage in plan)
    args = given(monkeypatch, "--dataset " + names)
    assert args.batches == (1 if names == "own" else 7)
    assert args.loss == {"l1": 2, "giou": 2, "clc": 1, "focal": 20, "dice": 2}
    assert [s.steps for s in plan] == [100_000 // (args.batches * s.batch_size) for s in plan]


def test_flags_change_the_plan(monkeypatch):
    """One value for all stages or one for each, more groups or fewer, another plan by name, no
    warm-up without bridges after --init; small data make small batches."""
    plan = plan_of(monkeypatch, "refcoco --epochs 7 --lr 1 2 3 4 --batch-size 5 --batches 2")
    assert [s[1:4] for s in plan] == [(7, rate, 5) for rate in (1, 2, 3, 4)]
    assert {s.steps for s in plan} == {10_000}
    assert [s.number for s in plan_of(monkeypatch, "refcoco", groups=1)] == [0, 1]
    assert [s.number for s in plan_of(monkeypatch, "refcoco", groups=5)] == [0, 1, 2, 3, 4, 5]
    plan = plan_of(monkeypatch, "own --preset shapes --init a.pt --epochs 0 0 1 0")
    assert [(s.number, s.hold) for s in plan] == [(2, 1.0)]
    plan = plan_of(monkeypatch, "refcoco --batches 3", size=20)
    assert {(s.batch_size, s.steps) for s in plan} == {(6, 1)}
    for name, batch in (("shapes", 64), ("shapes-long", 128)):
        assert plan_of(monkeypatch, name)[0].steps == train.EPOCH_SIZES[name] // batch
    args = given(
        monkeypatch, "--dataset own --model rank=4 --model alpha=2.5 --loss l1=1 --loss clc=0"
    )
    assert args.model == {"rank": 4, "alpha": 2.5}  # nothing that is given is dropped
    assert (args.loss["l1"], args.loss["clc"], args.loss["giou"]) == (1, 0, 2)
    for line in ("refcoco --lr 1 2 3", "refcoco --epochs 0", "refcoco --batches 100001"):
        with pytest.raises(HiVGError, match="--"):
            plan_of(monkeypatch, line)


@pytest.mark.parametrize("hold", [0, 0.6, 1])
def test_the_learning_rate(hold):
    """It rises to its top in the first steps, stays there for a share `hold` of them, and falls as a
    cosine to almost 0."""
    steps, rising = 10_000, 200
    rates = [train.learning_rate(step, steps, 2.0, hold) for step in range(steps)]
    fall = max(rising, round(hold * steps))
    assert rates[0] == pytest.approx(2 / rising) and rates[rising // 2] == pytest.approx(
        1, abs=0.02
    )
    assert set(rates[rising:fall]) <= {2.0} and 1.99 < rates[rising] <= 2
    assert rates[fall:] == sorted(rates[fall:], reverse=True)
    if hold < 1:
        assert rates[round(steps * (1 + hold) / 2)] == pytest.approx(1, abs=0.01)
        assert 0 <= rates[-1] < 1e-4
    assert train.learning_rate(0, 1, 2.0) > 0  # a stage of one step does something


# ----------------------------------------------------------------------------------------- the step


@pytest.fixture
def batches(tokenizer, refer_root):
    """Two batches of four different expressions."""
    dataset = refer_dataset(tiny_model(tokenizer), refer_root, "train")
    return [data.collate([dataset[i] for i in places]) for places in (range(4), range(4, 8))]


def refer_dataset(model, root, split, **options):
    annotations = {"refcoco": data.read_annotations("refcoco", root)}
    return evaluate.grounding_dataset(model, annotations, split, **options)


def step_args(count=1, **loss):
    return argparse.Namespace(batches=count, loss=hivg.LOSS_WEIGHTS | loss)


def gradients_at_step(model, optimizer):
    """A dict that is filled with the gradients with which the optimiser steps."""
    found = {}

    def keep(*_):
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        found.update({name: p.grad.clone() for name, p in trained})

    optimizer.register_step_pre_hook(keep)
    return found


def test_a_step_follows_the_mean_of_its_batches(monkeypatch, tokenizer, batches):
    """The gradients of two accumulated batches are the mean of the two, and each loss counts with
    its weight."""
    monkeypatch.setattr(train, "MAX_NORM", math.inf)
    model = tiny_model(tokenizer, stage=2).train()
    weights = {"l1": 3.0, "giou": 0.7, "clc": 0.4, "focal": 11.0, "dice": 1.3}
    means = 0
    for batch in batches:
        batch = model.inputs(batch)
        output = model(batch["image"], batch["tokens"], batch["padding"])
        losses = hivg.compute_losses(output, batch, model.clip.logit_scale)
        (sum(weights[name] * losses[name] for name in weights) / 2).backward()
        means = means + torch.stack([losses[name].detach() for name in hivg.LOSS_WEIGHTS]) / 2
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    optimizer, scaler = train.make_optimizer(model)
    found, args = gradients_at_step(model, optimizer), step_args(2, **weights)
    close(train.train_step(model, batches, [0, 1], optimizer, scaler, args), means)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        close(found[name], gradient, 1e-5 * max(1, gradient.abs().max().item()))
    assert all(p.grad is None for p in model.parameters())  # the next step begins at zero
    del args.loss["dice"]  # a loss that nobody gave a weight is no loss that counts for nothing
    with pytest.raises(KeyError, match="dice"):
        train.train_step(model, batches, [0, 1], optimizer, scaler, args)


def test_the_optimiser_and_the_norm(tokenizer, batches):
    """AdamW with a decay of 1e-4 of all that trains in this stage and nothing else; gradients are
    cut to a norm of 1."""
    model = tiny_model(tokenizer, stage=2).train()
    optimizer, scaler = train.make_optimizer(model)
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW) and group["weight_decay"] == 1e-4
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = gradients_at_step(model, optimizer)
    train.train_step(model, batches[:1], [0], optimizer, scaler, step_args(l1=50.0))
    norm = torch.stack([gradient.norm() for gradient in found.values()]).norm().item()
    assert norm == pytest.approx(1, abs=1e-3) and not scaler.is_enabled()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def epoch_of(monkeypatch, epoch=0, rank=0, processes=1, seed=0, number=1):
    """[(number of the step, its batches, its seeds)] of an epoch of four steps of 3 x 2 of 27."""
    monkeypatch.setattr(train, "process_rank", lambda: rank)
    monkeypatch.setattr(train, "world_size", lambda: processes)

    def loader(batches, seed):
        yield from [(seed, *batch) for batch in batches]

    loader.dataset = range(27)
    stage = train.Stage(number, 3, 1e-3, 2, steps=4)
    args = argparse.Namespace(seed=seed, batches=3)
    return [(n, *step) for n, step in train.read_epoch(loader, stage, epoch, args)]


def test_batches_of_an_epoch(monkeypatch):
    """Every expression at most once, in another order in each epoch, stage and run; each batch has a
    dropout of its own; the number of the step goes on through the stage."""
    changes = {}, {"epoch": 1}, {"seed": 1}, {"number": 2}
    runs = [epoch_of(monkeypatch, **change) for change in changes]
    assert runs[0] == epoch_of(monkeypatch) and [n for n, _, _ in runs[1]] == [4, 5, 6, 7]
    indices = [tuple(i for _, batches, _ in run for b in batches for i in b[1:]) for run in runs]
    assert all(len(set(places)) == 24 for places in indices) and len(set(indices)) == 4
    assert len({batches[0][0] for run in runs for _, batches, _ in run}) == 4  # of augmentation
    seeds = [seed for run in runs for _, _, seeds in run for seed in seeds]
    assert len(set(seeds)) == len(seeds) == 4 * 4 * 3


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batches_of_a_step(monkeypatch, processes):
    """Dealt out as they come, each with its seed: together they are those of one process."""
    shares = [epoch_of(monkeypatch, rank=r, processes=processes) for r in range(processes)]
    for number, batches, seeds in epoch_of(monkeypatch):
        for place in range(3):
            step = shares[place % processes][number]
            assert step[1][place // processes] == batches[place]
            assert step[2][place // processes] == seeds[place]
        assert sum(len(share[number][1]) for share in shares) == 3


def loss_curve(tokenizer, batch, dtype, scale=2.0**10, steps=8):
    """(model, weighted losses of some steps on the same batch, GradScaler)."""
    model = tiny_model(tokenizer, stage=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=dtype is torch.float16)
    work = optimizer, scaler, step_args(), dtype
    losses = [train.train_step(model, [batch], [0], *work) for _ in range(steps)]
    return model, torch.stack(losses) @ torch.tensor([*hivg.LOSS_WEIGHTS.values()]), scaler


def test_float16_learns_as_float32_does(tokenizer, batches):
    """Under float16 autocast with a GradScaler the loss falls as it does in float32; gradients that
    overflow change no weight, the scale becomes smaller instead."""
    dtypes = None, torch.float16
    full, half = (loss_curve(tokenizer, batches[0], dtype)[1] for dtype in dtypes)
    assert full[-1] < 0.7 * full[0]
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)
    model, losses, scaler = loss_curve(tokenizer, batches[0], torch.float16, 2.0**40, steps=1)
    assert losses.isfinite() and scaler.get_scale() == 2.0**39
    close(model.state_dict(), tiny_model(tokenizer, stage=1).state_dict(), 0)


# ------------------------------------------------------------------------------------------ the run


@pytest.fixture(scope="module")
def finished(refer_root, clip_file, tmp_path_factory):
    """The folder of a run through all four stages that nothing interrupted."""
    output = tmp_path_factory.mktemp("run") / "run"
    assert exit_of(train, *words_of(refer_root, clip_file, output)) is None
    return output


def test_a_run_writes_all_it_promises(finished, tokenizer, clip_file):
    """Checkpoints that stand alone, the log, results, boxes and contact sheets, and nothing that is
    half-written; CLIP's weights are bit for bit those of its file."""
    names = {"best.pt", "last.pt", "log.jsonl", "results_refcoco.json"}
    for split in ("val", "testA"):
        names |= {f"refcoco_{split}.png", f"boxes_refcoco_{split}.jsonl"}
        picture = np.asarray(Image.open(finished / f"refcoco_{split}.png")).astype(int)
        for name in ("limegreen", evaluate.BOX_COLOURS[0]):
            off = abs(picture - ImageColor.getrgb(name)).max(axis=2)
            assert (off < 40).sum() > 20, (split, name)
    assert set(os.listdir(finished)) == names
    results, log = json.loads((finished / "results_refcoco.json").read_text()), log_of(finished)
    rows = [(row["split"], row["expressions"]) for row in results["results"]]
    assert results["dataset"] == "refcoco" and rows == [("val", 4), ("testA", 2)]
    assert results["results"][0]["acc"] == max(e["acc"] for e in log if e["stage"] == 3)
    for name in ("best.pt", "last.pt"):
        model = load_checkpoint(finished / name)
        assert torch.equal(model.tokenize("red one"), tokenizer("red one"))
        assert [len(b.attn.in_proj.lora_A) for b in model.visual_blocks] == [3, 2, 1]
    now = model.clip.state_dict()
    assert all(torch.equal(now[name], t) for name, t in load_clip(clip_file).state_dict().items())
    content = torch.load(finished / "last.pt")
    assert content["log"] == log and content["args"]["lr"] == [3e-3] and content["optimizer"]


def test_every_stage_begins_at_epoch_minus_1(finished):
    """The first as well; what is evaluated there has no losses."""
    log = log_of(finished)
    assert [(e["stage"], e["epoch"]) for e in log] == [(s, e) for s in range(4) for e in (-1, 0, 1)]

    for line in log:
        losses = line.get("losses", {})
        assert set(losses) == set(hivg.LOSS_WEIGHTS if line["epoch"] >= 0 else ())
        assert all(math.isfinite(value) and value > 0 for value in losses.values())
    assert len({line["miou"] for line in log}) > 3  # the runs do change the model


def test_a_stage_starts_from_the_best_epoch(monkeypatch, refer_root, clip_file, tmp_path):
    """Not from the last one, and of equals from the later; so does a run that is resumed between the
    best epoch and a worse one."""
    accuracies = [10, 50, 50, 30, 40, 20, 20, 20]  # stage 0, epochs -1 to 2; stage 1
    seen, real, summary = [], train.predict, train.summary

    def predict(model, *more, **options):
        assert model.config.stage == (len(seen) > 3)
        seen.append(model.box_head[-1].bias.detach().clone())
        return real(model, *more, **options)

    def chosen(*given):
        if len(seen) == 4 and not stopped:
            stopped.append(seen.pop())
            raise KeyboardInterrupt
        return summary(*given) | {"acc": float(accuracies[len(seen) - 1])}

    stopped = []
    monkeypatch.setattr(train, "predict", predict)
    monkeypatch.setattr(train, "summary", chosen)
    words = words_of(refer_root, clip_file, tmp_path, "--model", "groups=1", epochs=3)
    assert "stopped" in exit_of(train, *words)
    assert exit_of(train, *words, "--resume") is None
    assert len(seen) == 8 and torch.equal(seen[3], stopped[0])
    assert torch.equal(seen[4], seen[2]) and not torch.equal(seen[2], seen[1])
    assert torch.equal(load_checkpoint(tmp_path / "best.pt").box_head[-1].bias, seen[4])


def test_rates_and_modes_of_a_run(monkeypatch, refer_root, clip_file, tmp_path):
    """Every step has the rate of its place in the stage, trains in training mode with the weights of
    --loss, and is one of the whole run's bar; the next stage has a fresh optimiser. The annotations
    are read once."""
    steps, bars, readings = [], [], []
    step, bar, read = train.train_step, data.progress, data.read_refer

    def train_step(model, batches, seeds, optimizer, scaler, args, dtype):
        assert all(module.training for module in model.modules()) and args.loss["clc"] == 0.5
        rate = optimizer.param_groups[0]["lr"]
        steps.append((model.config.stage, rate, len(optimizer.state) > 0))
        return step(model, batches, seeds, optimizer, scaler, args, dtype)

    monkeypatch.setattr(train, "train_step", train_step)
    monkeypatch.setattr(data, "progress", lambda *a, **o: bars.append(bar(*a, **o)) or bars[-1])
    monkeypatch.setitem(data.FAMILIES, "refer", lambda path: readings.append(1) or read(path))
    monkeypatch.setitem(train.PLANS, "base", [(0, 2, 1e-3, 2, 0.5), (1, 1, 1e-3, 4)])
    words = words_of(refer_root, clip_file, tmp_path, "--loss", "clc=0.5")
    del words[words.index("--epochs") : words.index("--batches")]
    assert exit_of(train, *words) is None
    rates = [(0, train.learning_rate(i, 8, 1e-3, 0.5), i > 0) for i in range(8)]
    assert steps == rates + [(1, train.learning_rate(i, 2, 1e-3), i > 0) for i in range(2)]
    assert (bars[0].total, bars[0].n) == (10, 10) and len(readings) == 1


def test_a_second_run_into_the_same_folder_is_refused(refer_root, clip_file, finished, tmp_path):
    """No earlier run is overwritten by mistake, nor the checkpoint that a run starts from; a resumed
    run that is done stays as it is."""
    words = words_of(refer_root, clip_file, finished)
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    told(exit_of(train, *words), "--resume")
    (tmp_path / "best.pt").write_bytes(before["best.pt"])
    line = ["--dataset", "refcoco", "--data-root", refer_root, "--init", tmp_path / "best.pt"]
    told(exit_of(train, *line, "--output", f"{tmp_path}/x/.."), "best.pt is there already")
    assert os.listdir(tmp_path) == ["best.pt"]
    assert exit_of(train, *words, "--resume") is None
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


# ---------------------------------------------------------------------------------------- the model


def init_words(checkpoint, root, output, *more):
    """--init CHECKPOINT: one epoch of stage 1."""
    words = words_of(root, "", output, "--epochs", 0, 1, 0, 0, *more)
    at = words.index("--clip")
    return [*words[:at], "--init", str(checkpoint), *words[at + 2 :]]


def val_summary(model, root):
    val = refer_dataset(model, root, "val")
    return evaluate.summary(val, *evaluate.predict(model, val)[:2])


def test_a_run_starts_from_a_checkpoint(finished, refer_root, tmp_path):
    """--init: the first evaluation is that of the checkpoint; its pairs have become part of the
    matrices, and fresh ones, of another rank, are trained."""
    words = init_words(finished / "best.pt", refer_root, tmp_path, "--model", "rank=3")
    assert exit_of(train, *words, "--epochs", 1, 1, 0, 0) is None
    model, log = load_checkpoint(finished / "best.pt"), log_of(tmp_path)
    expected = val_summary(model, refer_root)
    assert {name: log[0][name] for name in expected} == expected
    assert [(e["stage"], e["epoch"]) for e in log] == [(0, -1), (0, 0), (1, -1), (1, 0)]
    assert log[1]["miou"] != log[0]["miou"]
    before, in_proj = (
        m.visual_blocks[0].attn.in_proj for m in (model, load_checkpoint(tmp_path / "last.pt"))
    )
    assert list(in_proj.lora_A) == ["1"] and in_proj.lora_A["1"].shape[1] == 3
    assert in_proj.lora_B["1"].any() and not torch.equal(before.weight, before.folded)
    close(in_proj.weight, before.folded, 1e-6)


def test_a_run_starts_from_the_authors_files(shared, refer_root, tmp_path, clip_vocabulary):
    """The same for a checkpoint of theirs: masks, mean and sizes are those of the file."""
    path = shared / "golden/official_base_checkpoint.pth"
    assert exit_of(train, *init_words(path, refer_root, tmp_path)) is None
    model, log = load_checkpoint(path), log_of(tmp_path)
    assert log[0]["miou"] == val_summary(model, refer_root)["miou"] != log[1]["miou"]
    started = load_checkpoint(tmp_path / "best.pt").config
    names = "authors_masks", "mean", "image_size", "visual_layers", "bridge_layers", "text_layers"
    assert all(getattr(started, field) == getattr(model.config, field) for field in names)


FIELDS = {  # another value for every field of HiVGConfig but `stage`
    "image_size": 64, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "visual_layers": [1, 3],
    "bridge_layers": [], "bridge_text": "projected", "text_layers": [1], "grounding_layers": 2,
    "heads": 4, "feedforward": 32, "region_width": 32, "dropout": 0.0, "adapters": "vanilla",
    "targets": ["attn.out_proj", "mlp.c_fc"], "groups": 2, "rank": 4, "alpha": 8,
    "lora_dropout": 0.0, "authors_masks": True,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["hilora", "vanilla", "none"])
def test_every_part_can_be_changed(refer_root, clip_file, tmp_path, kind):
    """--model gives every field of HiVGConfig another value, and a run with them goes through its
    stages, augmented; the ablations, too."""
    assert FIELDS.keys() == {field.name for field in fields(HiVGConfig)} - {"stage"}
    values = {"adapters": kind, "bridge_layers": [2], "rank": 4, "groups": 2}
    values = FIELDS if kind == "vanilla" else values
    flags = [f"{n}={v if isinstance(v, str) else json.dumps(v)}" for n, v in values.items()]
    words = words_of(refer_root, clip_file, tmp_path, "--model", *flags, epochs=1)
    if kind != "vanilla":
        words.remove("--no-augment")
    assert exit_of(train, *words) is None
    model = load_checkpoint(tmp_path / "best.pt")
    for name, value in values.items():
        found = getattr(model.config, name)
        assert (list(found) if isinstance(value, list) else found) == value
    assert set(model.bridges) == {str(layer) for layer in values["bridge_layers"]}
    assert [line["stage"] for line in log_of(tmp_path)] == [0, 0, 1, 1, 2, 2]
    state = model.state_dict()
    held = [len([n for n in state if f"resblocks.{i}.attn.out_proj.lora_A" in n]) for i in range(3)]
    assert held == {"hilora": [2, 1, 1], "vanilla": [1, 1, 1], "none": [0, 0, 0]}[kind]
    assert any("mlp.c_fc.lora_A" in name for name in state) == (kind == "vanilla")


def test_bridges_read_the_text_layers_of_the_data_set(monkeypatch, tmp_path, vocabulary):
    """As the authors chose them; in a mixture the projected text."""
    save_clip(tiny_clip(text_layers=12, vision_layers=1, image_size=32), tmp_path / "clip.pt")
    shutil.copy(vocabulary, tmp_path)
    every = tuple(range(1, 13))
    of = {"refcoco": (12,), "refcoco+": (6, 12), "refcocog": every, "refcocog-google": every}
    of |= {"referit": (6, 12), "flickr30k": (12,), "refcoco+ referit": None}
    for words, layers in of.items():
        args = given(monkeypatch, f"--dataset {words} --clip {tmp_path}/clip.pt")
        config = train.build_model(args, None).config
        assert config.bridge_text == ("layers" if layers else "projected")
        assert config.text_layers == layers or not layers, words


BAD_PARTS = {
    "--loss cls=1": "cls", "--loss clc": "--loss", "--loss clc=nan": "--loss", "--loss clc=-1": "--loss",
    "--model ranks=4": "ranks", "--model stage=2": "stage", "--model rank": "rank",
    "--model rank=0": "rank", "--model groups=0": "groups", "--model heads=7": "heads",
    "--model image_size=50": "50", "--model adapters=vanila": "adapters",
    "--model bridge_text=layer": "bridge_text", "--model dropout=much": "dropout",
    '--model targets=["attn.nothing"]': "attn.nothing", "--model visual_layers=[9]": "[9]",
    "--model mean=[1]": "mean", "--lr -1": "--lr", "--lr nan": "--lr", "--epochs -1": "--epochs",
    "--seed -1": "--seed", "--batch-size 0": "--batch-size", "--batches 0": "--batches",
    "--workers -1": "--workers", "--init a.pt": "--clip", "--preset none": "--preset",
    "--dataset cocoa": "cocoa", "--data-root absent": "refcoco/refs(unc).p",
    "--select testC": "train, val, testA", "--clip absent.pt": "absent.pt", "--clip garbage": "garbage",
    "--clip other.pt": "bpe_vocab.txt.gz", "--clip ViT-B/16": "cannot be fetched",
    "--device warp": "warp", "--output garbage": "garbage",
}  # fmt: skip


@pytest.mark.parametrize("flags, named", BAD_PARTS.items())
def test_bad_input_of_train_is_one_sentence(
    monkeypatch, refer_root, clip_file, vocabulary, tmp_path, capsys, flags, named
):
    """An unknown loss, a value that is none, a file that is missing, damaged or does not fit: what is
    wrong is said by name before anything is trained or written."""
    monkeypatch.chdir(tmp_path)
    Path("garbage").write_text("garbage")
    save_clip(tiny_clip(vocab_size=600, vision_layers=1), "other.pt")
    shutil.copy(vocabulary, tmp_path)
    code = exit_of(train, *words_of(refer_root, clip_file, "run", *flags.split()))
    if code == 2:
        assert named in capsys.readouterr().err
    else:
        told(code, named)
    assert not Path("run").exists()


@pytest.mark.parametrize("stage", [-1, 0, 2])
def test_the_table_counts_every_parameter_once(tokenizer, stage):
    """The parts add up to the whole model; of CLIP nothing is trained, of the pairs those of the
    stage, of the bridges nothing in a warm-up without them."""
    model, rows = tiny_model(tokenizer, max(stage, 0)), {}
    model.enter_stage(stage)
    for line in train.parameter_table(model).replace(",", "").splitlines()[1:]:
        name, *numbers = line.rsplit(maxsplit=2)
        rows[name] = [*map(int, numbers)]
    together = rows.pop("together")
    assert together == [sum(column) for column in zip(*rows.values())]
    parameters = dict(model.named_parameters())
    assert together[1] == sum(p.numel() for p in parameters.values())
    newest = sum(p.numel() for name, p in parameters.items() if name.endswith(f".{stage}"))
    assert rows.get("LoRA pairs", [0])[0] == newest and (newest > 0) == (stage > 0)
    assert rows["clip"] == [0, sum(p.numel() for p in tiny_clip().parameters())]
    assert (rows["bridges"][0] > 0) == (stage >= 0)


# --------------------------------------------------------------------------------- shapes and photos


def make_shapes_small(monkeypatch):
    """Few scenes, and a CLIP that is hardly trained."""
    monkeypatch.setattr(data, "SCENES", {"val": 8, "testA": 4, "testB": 4, "test": 4})
    monkeypatch.setattr(data, "TRAIN_SCENES", {"shapes": 16, "shapes-long": 16})
    monkeypatch.setattr(train, "SHAPES_CLIP_STEPS", 2)
    monkeypatch.setattr(train, "SHAPES_CLIP_BATCH", 8)


def test_shapes_from_nothing(monkeypatch, tmp_path, capsys):
    """--dataset shapes needs no files: data, CLIP and model are made, and the first two used again.
    The model stands alone and knows which words it has never seen."""
    make_shapes_small(monkeypatch)
    root = tmp_path / "data"
    line = ["--dataset", "shapes", "--data-root", root, "--epochs", 1]
    line += ["--batch-size", 32, "--device", "cpu", "--output"]
    assert exit_of(train, *line, tmp_path / "a") is None
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    clip = load_clip(root / "shapes/clip_0.pt")
    torch.manual_seed(0)
    start = CLIP(clip.config).state_dict()
    moved = {name for name, weight in clip.state_dict().items() if not weight.equal(start[name])}
    assert {"token_embedding.weight", "visual.proj"} < moved  # the text blocks stay random
    assert not any(name.startswith("transformer.") for name in moved)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert "stopped" in exit_of(train, *line, tmp_path / "b")
    assert stamps == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    results = json.loads((tmp_path / "a/results_shapes.json").read_text())["results"]
    assert [row["split"] for row in results] == ["val", "testA", "testB", "test"]
    stages = [line["stage"] for line in log_of(tmp_path / "a")]
    assert stages == [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3]
    shutil.rmtree(root)
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    line = ["image", tmp_path / "a/best.pt", tmp_path / "a.png", "the purple circle"]
    assert exit_of(evaluate, *line, "--output", tmp_path / "found.png") is None
    assert "trained without the words: purple)" in capsys.readouterr().out


@pytest.mark.slow
def test_the_tour_runs(monkeypatch, tmp_path, capsys):
    """docs/tour.ipynb, opened in docs/ after its own commands, cut short, cell by cell; its outputs
    are stored."""
    make_shapes_small(monkeypatch)
    tour = json.loads((Path(train.__file__).parent / "docs/tour.ipynb").read_text())
    lines = "".join(tour["cells"][0]["source"]).replace("\\\n", "").splitlines()
    commands = [shlex.split(line)[2:] for line in lines if line.startswith("    python train.py")]
    monkeypatch.chdir(tmp_path)
    for words in commands:
        words += ["--epochs", 1, "--batch-size", 32, "--device", "cpu"]  # in the place of its own
        assert command(monkeypatch, train, *words) is None
    runs = {path.parent.name: load_checkpoint(path) for path in Path("runs").glob("*/best.pt")}
    counts = {name: len(model.bridges) for name, model in runs.items()}
    assert counts == {"shapes": 1, "bridges": 3, "no-bridges": 0}
    cells = [cell for cell in tour["cells"] if cell["cell_type"] == "code"]
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    capsys.readouterr()
    names = {}
    try:
        for cell in cells:
            exec("".join(cell["source"]), names)
    finally:
        torch.set_grad_enabled(True)
    printed = capsys.readouterr().out
    assert "layer 1:  pair 1 frozen, pair 2 trains\n" in printed and "['purple']" in printed
    moved = dict(re.findall(r"pair (\d) of layer 1 has moved by ([0-9.]+)", printed))
    assert float(moved["1"]) == 0 < float(moved["2"])
    assert all(f" %  {name}\n" in printed for name in ("with bridges", "trained without bridges"))
    assert all(cell["outputs"] for cell in cells[1:])  # the first only goes to the folder above


# ----------------------------------------------------------------------------------------- bad input


def test_an_unreadable_image_ends_the_run_with_its_name(monkeypatch, clip_file, tmp_path):
    """One sentence names the image that a worker cannot read, without the worker's traceback; one of
    val is found before the first step."""
    make_refer(tmp_path, [{}, {}, {"split": "val"}])
    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("it began to train"))
    for number, workers in (("2", 1), ("3", 0)):
        (broken,) = tmp_path.rglob(f"*00000{number}.jpg")
        whole = broken.read_bytes()
        broken.write_bytes(whole[:300])
        line = words_of(tmp_path, clip_file, tmp_path / f"run{number}", "--workers", workers)
        told(exit_of(train, *line, "--batch-size", 2), broken, "cannot be read")
        broken.write_bytes(whole)
    assert not (tmp_path / "run3").exists()


def test_help_and_advice_fit_the_programs(capsys):
    """Help lists losses and fields of the model, data sets and plans; the flags that the advice on
    memory names are flags: of both programs, or of train.py where it says so."""
    helps = []
    for module, line in ((train, ["--help"]), (evaluate, ["dataset", "--help"])):
        assert exit_of(module, *line) == 0
        helps.append(capsys.readouterr().out)
    names = *hivg.LOSS_WEIGHTS, *FIELDS, *data.DATASETS, *train.PLANS
    assert [name for name in names if name not in helps[0]] == []
    for advice in clip_model.MEMORY_ERRORS.values():
        common, _, of_train = advice.replace("--shm-size", "").partition("train.py")
        for flag in re.findall(r"--[a-z-]+", common):
            assert flag in helps[0] and flag in helps[1]
        assert all(flag in helps[0] for flag in re.findall(r"--[a-z-]+", of_train))
