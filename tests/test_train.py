"""train.py and evaluate.py from end to end, in miniature, on a hand-made RefCOCO and a few shapes."""

import argparse
import io
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_refer, plain_picture, tiny_clip, tiny_model
from PIL import Image

import clip_model
import data
import evaluate
import train
from clip_model import CLIP, CLIPConfig, Tokenizer, load_clip, save_clip
from hivg import HiVG, HiVGConfig, box_iou, load_checkpoint, save_checkpoint


def command(monkeypatch, module, *words):
    """Run a program's main with this command line; gives what it exits with, None if it just ends."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, words)])
    try:
        module.main()
    except SystemExit as stop:
        return stop.code


def words_of(refer_root, clip_file, output, *more):
    """The command line of a miniature run; two epochs in each stage, workers and augmentation off."""
    line = ["--dataset", "refcoco", "--data-root", refer_root, "--clip", clip_file]
    line += ["--output", output, "--epochs", 2, "--batch-size", 4, "--lr", "3e-3"]
    return [*line, "--accumulate", 1, "--no-augment", "--device", "cpu", *more]


def log_of(output):
    """The lines of log.jsonl, without the seconds."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def finished(refer_root, clip_file, tmp_path_factory):
    """The folder of a run through all four stages that nothing interrupted."""
    output = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, train, *words_of(refer_root, clip_file, output)) is None
    return output


def test_a_run_writes_all_it_promises(finished, tokenizer):
    """Checkpoints that can be read, log, settings, results that name data set, split, number and
    checkpoint, and contact sheets that open; nothing half-written is left."""
    names = set(os.listdir(finished))
    sheets = {"refcoco_val.png", "refcoco_testA.png"}
    assert names == sheets | {
        *("best.pt", "last.pt", "log.jsonl", "config.json", "results_refcoco.json")
    }
    for name in sheets:
        picture = np.asarray(Image.open(finished / name).convert("RGB")).astype(int)
        for colour in (evaluate.TRUE_COLOUR, evaluate.FOUND_COLOUR):
            assert (abs(picture - colour).max(axis=2) < 40).sum() > 20, (name, colour)
    results = json.loads((finished / "results_refcoco.json").read_text())
    assert results["dataset"] == "refcoco" and results["checkpoint"].endswith("best.pt")
    assert [(r["split"], r["expressions"]) for r in results["results"]] == [
        ("val", 4),
        ("testA", 2),
    ]
    assert json.loads((finished / "config.json").read_text())["settings"]["epochs"] == [2] * 4
    for name in ("best.pt", "last.pt"):
        model = load_checkpoint(finished / name)
        assert torch.equal(model.tokenize("red one"), tokenizer("red one"))
        assert [len(b.attn.in_proj.lora_A) for b in model.clip.visual.transformer.resblocks] == [
            *(3, 2, 1)
        ]
    best = max(line["acc"] for line in log_of(finished) if line["stage"] == 3)
    assert results["results"][0]["acc"] == best


def test_each_stage_begins_from_the_best_of_the_one_before(finished):
    """The log has an entry state, epoch -1, for each stage but the first: what the best epoch before
    it had."""
    log = log_of(finished)
    epochs = [(line["stage"], line["epoch"]) for line in log]
    assert epochs == [(0, 0), (0, 1)] + [(s, e) for s in (1, 2, 3) for e in (-1, 0, 1)]
    for stage in (1, 2, 3):
        before = [line for line in log if line["stage"] == stage - 1]
        top = max(line["acc"] for line in before)
        best = [line for line in before if line["acc"] == top][-1]  # of equals the later one
        entry = next(line for line in log if line["stage"] == stage)
        assert (entry["acc"], entry["miou"]) == (best["acc"], best["miou"])
    trained = [line for line in log if line["epoch"] >= 0]
    assert all(math.isfinite(v) and v > 0 for line in trained for v in line["losses"].values())
    assert len({line["miou"] for line in log}) > 3  # the runs do change the model


def first_epoch_of(monkeypatch, checkpoint, root, output, *more):
    """The log of --init CHECKPOINT, one epoch of the warm-up and one of stage 1."""
    line = ["--dataset", "refcoco", "--data-root", root, "--init", checkpoint, "--output", output]
    line += ["--epochs", 1, 1, 0, 0, "--batch-size", 4, "--lr", "1e-3", "--accumulate", 1]
    line += ["--no-augment", "--device", "cpu", *more]
    assert command(monkeypatch, train, *line) is None
    return log_of(output)


def test_a_run_starts_from_a_checkpoint(monkeypatch, finished, refer_root, tmp_path):
    """--init: the first evaluation is that of the checkpoint; its pairs have become part of the
    matrices, and fresh ones are trained. Resuming such a run needs no more flags than any other."""
    output = tmp_path / "run"
    log = first_epoch_of(monkeypatch, finished / "best.pt", refer_root, output, "--rank", 3)
    model = load_checkpoint(finished / "best.pt")
    val = evaluate.open_split(model, "refcoco", "val", refer_root)
    expected = evaluate.summary(val, *evaluate.predict(model, val))
    assert (log[0]["stage"], log[0]["epoch"]) == (0, -1)
    assert {name: log[0][name] for name in expected} == expected
    assert [(line["stage"], line["epoch"]) for line in log[1:]] == [(0, 0), (1, -1), (1, 0)]
    assert log[1]["miou"] != log[0]["miou"]

    started, before = load_checkpoint(output / "last.pt"), model.visual_blocks[0].attn.in_proj
    in_proj = started.visual_blocks[0].attn.in_proj
    assert list(in_proj.lora_A) == ["1"] and in_proj.lora_A["1"].shape[1] == 3
    assert in_proj.lora_B["1"].any()
    assert torch.equal(in_proj.weight, before.folded) and not torch.equal(
        before.weight, before.folded
    )
    line = ["--dataset", "refcoco", "--output", output, "--resume", "--device", "cpu"]
    assert command(monkeypatch, train, *line, "--data-root", refer_root) is None


def test_a_closed_vocabulary_learns_the_words_of_a_run(monkeypatch, finished, refer_root, tmp_path):
    """A model that knows "red" alone has seen "one" after training with it."""
    model = load_checkpoint(finished / "best.pt")
    _, _, merges = model.tokenizer.merges_text.partition("\n")
    header = f"# {clip_model.CLOSED_VOCABULARY}red"
    model.tokenizer = Tokenizer(io.StringIO(f"{header}\n{merges}"))
    save_checkpoint(tmp_path / "closed.pt", model)
    assert load_checkpoint(tmp_path / "closed.pt").tokenizer.unseen_words("red one") == ["one"]
    first_epoch_of(monkeypatch, tmp_path / "closed.pt", refer_root, tmp_path / "run")
    trained = load_checkpoint(tmp_path / "run/best.pt")
    assert trained.tokenizer.unseen_words("red one cup") == ["cup"]


@pytest.mark.parametrize("name", ["base", "large"])
def test_a_run_starts_from_the_authors_files(
    monkeypatch, shared, refer_root, tmp_path, clip_vocabulary, name
):
    """The same for both golden files: masks, mean and sizes are those of the file."""
    path = shared / f"golden/official_{name}_checkpoint.pth"
    log = first_epoch_of(monkeypatch, path, refer_root, tmp_path / "run")
    model = load_checkpoint(path)
    val = evaluate.open_split(model, "refcoco", "val", refer_root)
    assert log[0]["miou"] == evaluate.summary(val, *evaluate.predict(model, val))["miou"]
    started = load_checkpoint(tmp_path / "run/best.pt").config
    for field in ("authors", "mean", "image_size", "visual_layers", "bridge_layers", "text_layers"):
        assert getattr(started, field) == getattr(model.config, field)
    assert log[1]["miou"] != log[0]["miou"]


@pytest.mark.parametrize(
    "flags, named",
    [("--clip x.pt", "--clip"), ("--image-size 96", "--image-size"), ("--no-bridges", "--bridge")]
    + [("--visual-layers 1", "--visual-layers"), ("--init absent.pt", "absent.pt")],
)
def test_what_contradicts_the_checkpoint_is_named(
    monkeypatch, finished, refer_root, tmp_path, flags, named
):
    line = ["--dataset", "refcoco", "--data-root", refer_root, "--init", finished / "best.pt"]
    line += ["--output", tmp_path / "run", "--device", "cpu", *flags.split()]
    code = command(monkeypatch, train, *line)
    assert code.startswith("error: ") and named in code and "\n" not in code


def test_training_leaves_clip_as_it_was(finished, clip_file):
    """After all four stages CLIP's stored weights are bit for bit those of its file."""
    stored, trained = load_clip(clip_file).state_dict(), load_checkpoint(finished / "best.pt")
    now = trained.clip.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in stored.items())
    assert any(now[name].any() for name in now if "lora_B" in name)


def test_a_second_run_into_the_same_folder_is_refused(monkeypatch, refer_root, clip_file, finished):
    """An earlier run is never overwritten by mistake; a resumed run that is done stays as it is."""
    before = log_of(finished)
    code = command(monkeypatch, train, *words_of(refer_root, clip_file, finished))
    assert code.startswith("error:") and "--resume" in code and "\n" not in code
    line = ["--dataset", "refcoco", "--output", finished, "--resume", "--device", "cpu"]
    assert command(monkeypatch, train, *line) is None
    assert log_of(finished) == before


def test_an_epoch_may_be_a_part_of_the_split(monkeypatch, refer_root, clip_file, tmp_path):
    """With parts=2, epochs 0 and 1 go through all 8 expressions, each once; so do epochs 2 and 3, in
    another order."""
    halves = replace(train.PRESETS["base"], parts=2)
    monkeypatch.setitem(train.PRESETS, "base", halves)
    read, real = [], data.read_batches

    def read_batches(dataset, batches, *more, **options):
        if dataset.split == "train":
            read.append([index for batch in batches for index in batch])
        return real(dataset, batches, *more, **options)

    monkeypatch.setattr(data, "read_batches", read_batches)
    words = words_of(refer_root, clip_file, tmp_path / "run", "--workers", 0)
    place = words.index("--epochs") + 1
    words[place : place + 1] = [4, 0, 0, 0]
    words[words.index("--batch-size") + 1] = 2
    assert command(monkeypatch, train, *words) is None
    assert [len(part) for part in read] == [4] * 4
    assert sorted(read[0] + read[1]) == sorted(read[2] + read[3]) == list(range(8))
    assert read[0] + read[1] != read[2] + read[3]


@pytest.mark.parametrize("adapters", ["vanilla", "none"])
def test_other_adapters_run_too(monkeypatch, refer_root, clip_file, tmp_path, adapters):
    """The controls, vanilla LoRA and none, go through the same four stages, augmented."""
    words = words_of(refer_root, clip_file, tmp_path / "run", "--adapters", adapters)
    words.remove("--no-augment")
    words[words.index("--epochs") + 1] = 1
    assert command(monkeypatch, train, *words, "--workers", 0) is None
    blocks = load_checkpoint(tmp_path / "run/best.pt").clip.visual.transformer.resblocks
    held = [len(getattr(block.attn.in_proj, "lora_A", ())) for block in blocks]
    assert held == ([1, 1, 1] if adapters == "vanilla" else [0, 0, 0])


@pytest.mark.parametrize(
    "flags, fields",
    [
        ("--no-bridges --loss clc=0 l1=5", {"bridge_layers": ()}),
        ("--bridge-layers 2 --visual-layers 1 3", {"bridge_layers": (2,), "visual_layers": (1, 3)}),
        (
            "--groups 2 --rank 4 --targets attn.out_proj mlp.c_fc",
            {"groups": 2, "rank": 4, "stage": 2},
        ),
        ("--without-bridges 1 --text-layers 1", {"text_layers": (1,), "stage": 3}),
    ],
)
def test_every_part_can_be_changed(monkeypatch, refer_root, clip_file, tmp_path, flags, fields):
    """Bridges, losses, groups, rank, targets, layers: the flags reach the model and config.json, and
    a run with them goes through its stages and is evaluated."""
    words = words_of(refer_root, clip_file, tmp_path / "run", *flags.split())
    words[words.index("--epochs") + 1] = 1
    assert command(monkeypatch, train, *words) is None
    model = load_checkpoint(tmp_path / "run/best.pt")
    assert {name: getattr(model.config, name) for name in fields} == fields
    assert set(model.bridges) == {str(layer) for layer in model.config.bridge_layers}
    settings = json.loads((tmp_path / "run/config.json").read_text())["settings"]
    assert (settings["loss"]["clc"], settings["loss"]["l1"]) == (
        (0, 5) if "l1=5" in flags else (1, 2)
    )
    log, first = log_of(tmp_path / "run"), -1 if "--without-bridges" in flags else 0
    last = model.config.groups
    assert [e["stage"] for e in log] == [first] + [
        s for s in range(first + 1, last + 1) for _ in "ab"
    ]
    adapted = {
        n.rpartition(".lora_A")[0].split(".", 5)[-1] for n in model.state_dict() if "lora_A" in n
    }
    assert adapted == set(model.config.targets)


@pytest.mark.parametrize(
    "flags",
    [
        "--loss cls=1",
        "--loss clc",
        "--loss clc=nan",
        "--lr -1",
        "--targets attn.nothing",
        "--groups 0",
    ],
)
def test_a_part_that_is_not_there_is_told(monkeypatch, refer_root, clip_file, tmp_path, flags):
    """An unknown loss, a target that matches nothing, no groups: refused before anything is trained."""
    code = command(
        monkeypatch, train, *words_of(refer_root, clip_file, tmp_path / "run", *flags.split())
    )
    assert code == 2 or ("attn.nothing" in code and "\n" not in code)
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize(
    "line, preset, accumulate",
    [
        ("--dataset refcocog", "base", 7),
        ("--dataset flickr30k", "base-flickr30k", 7),
        ("--dataset refcoco referit", "base-mixture", 7),
        ("--dataset referit --clip large.pt", "large-referit", 7),
        ("--dataset refcoco+ --clip large.pt", "large", 7),
        ("--dataset refcoco refcoco+ --clip large.pt", "large-mixture", 7),
        ("--dataset refcoco refcoco", "base", 7),
        ("--dataset own", "base", 1),
        ("--dataset shapes --clip small.pt", "shapes", 1),
        ("--dataset shapes-long --clip small.pt", "shapes-long", 1),
    ],
)
def test_presets_by_data_set_and_model(monkeypatch, line, preset, accumulate):
    """Epochs, rates and batches follow from the data set and CLIP's depth, accumulation from the
    authors' seven GPUs; flags go before them."""
    seen = []
    monkeypatch.setattr(clip_model, "run_main", lambda run, given, **more: seen.append(given))
    command(monkeypatch, train, *line.split())
    flags = "--epochs", 7, "--groups", 2, "--without-bridges", 1, "--accumulate", 2
    command(monkeypatch, train, *line.split(), *flags)
    config = CLIPConfig(vision_layers=24 if "large" in line else 12)
    usual, changed = (train.complete_settings(given, config) for given in seen)
    expected = train.PRESETS[preset]
    assert usual.preset == preset and usual.epochs == list(expected.epochs)
    assert (usual.lr, usual.batch_size) == (
        list(expected.learning_rates),
        list(expected.batch_sizes),
    )
    assert usual.without_bridges == expected.without_bridges and usual.accumulate == accumulate
    assert (changed.epochs, changed.without_bridges, changed.accumulate) == ([7, 7, 7], 1, 2)
    assert changed.lr == list(expected.learning_rates[:3])
    assert (usual.text_layers == ()) == ("mixture" in preset)
    monkeypatch.setattr(train, "world_size", lambda: 3)
    assert train.complete_settings(seen[0], config).accumulate == (2 if accumulate == 7 else 1)


def test_a_stage_of_no_epochs_is_left_out(monkeypatch, refer_root, clip_file, tmp_path):
    """--epochs 0 for a stage: it isn't entered, nor evaluated; none at all is an error."""
    words = words_of(refer_root, clip_file, tmp_path / "run")
    place = words.index("--epochs") + 1
    words[place : place + 1] = [1, 0, 1, 0]
    assert command(monkeypatch, train, *words) is None
    log = log_of(tmp_path / "run")
    assert [(line["stage"], line["epoch"]) for line in log] == [(0, 0), (2, -1), (2, 0)]
    words[place : place + 4] = [0]
    assert "nothing to train" in command(monkeypatch, train, *words, "--output", tmp_path / "none")


LARGE = dict(patch_size=14, vision_width=1024, vision_layers=24, text_width=768, embed_dim=768)
FULL_SIZES = {
    "ViT-B/32": dict(patch_size=32),
    "ViT-B/16": dict(),
    "ViT-L/14": LARGE,
    "ViT-L/14@336px": LARGE | dict(image_size=336),
}
SLOW = [pytest.param(n, marks=[pytest.mark.slow] * ("L" in n)) for n in FULL_SIZES]


@pytest.mark.parametrize("name", SLOW)
def test_full_sizes(name):
    """Every CLIP of the table, full size, random weights: one step of stage 1 reaches all that trains,
    and the merged model gives boxes."""
    clip = CLIP(CLIPConfig(**FULL_SIZES[name]))
    model = HiVG(HiVGConfig(stage=1), clip).train()
    side, depth = clip.config.image_size, clip.config.vision_layers
    images, tokens = torch.randn(2, 3, side, side), torch.randint(1, 49000, (2, 8))
    tokens[:, -1] = 49407
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.3, 0.6, 0.2, 0.2]])
    output = model(images, tokens, None, for_losses=True)
    losses = train.compute_losses(output, boxes, torch.arange(2), clip.logit_scale)
    trained = [p for p in model.parameters() if p.requires_grad]
    sum(weight * losses[name] for name, weight in train.LOSS_WEIGHTS.items()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    pairs = [len(block.attn.in_proj.lora_A) for block in model.visual_blocks]
    assert pairs == [1] * (depth // 3) + [0] * (depth * 2 // 3)
    with torch.inference_mode():
        found = model.eval().merge()(images, tokens).boxes
    assert found.shape == (2, 4) and ((0 < found) & (found < 1)).all()


def test_the_learning_rate(monkeypatch):
    """It rises to its top in the first steps, then falls as a cosine to almost 0, never below."""
    steps = 50 * train.RISING_STEPS
    rates = [train.learning_rate(step, steps, 2.0) for step in range(steps)]
    top = max(range(steps), key=rates.__getitem__)
    assert top <= train.RISING_STEPS and 1.9 < rates[top] <= 2.0
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[0] < 0.1
    assert rates[top:] == sorted(rates[top:], reverse=True) and 0 <= rates[-1] < 1e-4
    assert rates[steps // 2] == pytest.approx(1.0, abs=0.01)


def test_a_rate_that_is_held():
    """With hold=0.6 it stays at its top for 60 % of the steps, then falls to almost 0; with hold=1
    it never falls."""
    steps = 10 * train.RISING_STEPS
    rates = [train.learning_rate(step, steps, 2.0, hold=0.6) for step in range(steps)]
    assert set(rates[train.RISING_STEPS : steps * 6 // 10]) == {2.0}
    assert rates[steps * 6 // 10 :] == sorted(rates[steps * 6 // 10 :], reverse=True)
    assert rates[steps * 8 // 10] == pytest.approx(1.0, abs=0.01) and 0 <= rates[-1] < 1e-4
    rates = [train.learning_rate(step, steps, 2.0, hold=1.0) for step in range(steps)]
    assert set(rates[train.RISING_STEPS :]) == {2.0}


def test_the_minutes_that_remain(monkeypatch):
    """They follow from the work that is left, evaluations included, and the pace so far; a resumed
    run does not count what is done. Before the first steps there is nothing to say."""
    settings = argparse.Namespace(preset="base", without_bridges=0, epochs=(2, 1, 0, 0), init=None)
    clock = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    pace = train.Pace(settings, [], train_size=6000, val_size=600, at_end=1200)
    pace.add(trained=1200)  # slow, as first steps are
    assert str(pace) == "?"
    clock[0] = 60
    pace.add(trained=1200)  # 20 a second; 16,800 of 18,000 + (4 x 600 + 1200) / 3 are left
    assert str(pace) == "14 min"
    clock[0] = 90
    pace.add(evaluated=600)  # 200 in 30 seconds: the pace falls to 1400 in 90
    assert str(pace) == "18 min"
    done = [{"stage": 0, "epoch": 0}, {"stage": 0, "epoch": 1}]
    resumed = train.Pace(settings, done, train_size=6000, val_size=600, at_end=1200)
    assert resumed.left == 6000 + (2 * 600 + 1200) / 3


def test_memory_of_a_step(tokenizer):
    """What is counted on batches of 2 and 4 is what a larger batch takes; the peak of tensors that
    come and go is counted by hand."""
    layer, x = torch.nn.Linear(1000, 1000), torch.zeros(1, 1000)
    with evaluate.PeakMemory() as memory:
        layer(x)  # its weights were there before
    assert memory.peak == 4000
    with evaluate.PeakMemory() as memory:
        a = torch.zeros(1000)
        b = a + 1  # 8000 bytes
        a = b.view(10, 100)  # the first is gone, and no new ones came
        c = torch.zeros(500)  # 6000
        del a, b, c
    assert (memory.peak, memory.bytes) == (8000, 0)

    model = tiny_model(tokenizer, 3)
    fixed, of_a_sample = train.step_bytes(model, 4, None)  # counted on 2 and 4
    many = fixed + 16 * of_a_sample
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    scaler = torch.amp.GradScaler(enabled=False)
    for _ in range(2):
        with evaluate.PeakMemory() as memory:
            batch = evaluate.synthetic_batch(model, 16)
            train.train_step(model, [batch], [0], optimizer, scaler, train.LOSS_WEIGHTS)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    total = memory.peak + weights + 2 * sum(p.nbytes for p in trained)
    assert many == pytest.approx(total, rel=0.05)
    model.checkpointing = True
    assert train.step_bytes(model, 16, None)[1] < of_a_sample / 2


@pytest.mark.parametrize("stage", [0, 2])
def test_the_account_counts_every_parameter_once(tokenizer, stage):
    """The groups of the account add up to the whole model; of CLIP nothing is trained, of the pairs
    those of the stage."""
    model = tiny_model(tokenizer, stage)
    rows = {}
    for line in train.parameter_table(model).splitlines()[1:]:
        *name, trained, total = line.split()
        rows[" ".join(name)] = [int(number.replace(",", "")) for number in (trained, total)]
    together = rows.pop("together")
    assert together == [sum(column) for column in zip(*rows.values())]
    parameters = dict(model.named_parameters())
    assert together[1] == sum(p.numel() for p in parameters.values())
    pairs = {name: p.numel() for name, p in parameters.items() if ".lora_" in name}
    newest = sum(n for name, n in pairs.items() if name.endswith(f".{stage}"))
    assert rows["LoRA pairs"] == [newest, sum(pairs.values())]
    assert rows["CLIP"] == [0, sum(p.numel() for p in tiny_clip().parameters())]


def make_shapes_small(monkeypatch):
    """Few scenes, and a CLIP that is hardly trained."""
    sizes = {"val": 8, "testA": 4, "testB": 4, "test": 4, "train": 16}
    small = {s: info._replace(scenes=sizes[s]) for s, info in data.SHAPES_SPLITS.items()}
    monkeypatch.setattr(data, "SHAPES_SPLITS", small)
    monkeypatch.setattr(data, "LONG_TRAIN", data.LONG_TRAIN._replace(scenes=16))
    monkeypatch.setattr(train, "SHAPES_CLIP_STEPS", 2)
    monkeypatch.setattr(train, "SHAPES_CLIP_BATCH", 8)


@pytest.mark.parametrize("name", ["shapes", "shapes-long"])
def test_shapes_from_nothing(monkeypatch, tmp_path, capsys, name):
    """--dataset shapes needs no files: data, CLIP and model are made, and the first two used again.
    The model knows which words it has never seen."""
    make_shapes_small(monkeypatch)
    line = ["--dataset", name, "--data-root", tmp_path / "data", "--epochs", 1]
    line += ["--batch-size", 32, "--device", "cpu", "--output"]
    assert command(monkeypatch, train, *line, tmp_path / "a") is None
    names = (f"{name}/instances.json", f"{name}/clip_0.pt")
    stamps = [(tmp_path / "data" / file).stat().st_mtime_ns for file in names]
    with monkeypatch.context() as patch:

        def stop(*given):
            raise KeyboardInterrupt

        patch.setattr(train, "train_epoch", stop)
        assert "stopped" in command(patch, train, *line, tmp_path / "b")
    assert stamps == [(tmp_path / "data" / file).stat().st_mtime_ns for file in names]
    results = json.loads((tmp_path / f"a/results_{name}.json").read_text())
    assert {row["split"] for row in results["results"]} == {"val", "testA", "testB", "test"}
    shutil.rmtree(tmp_path / "data")
    model = load_checkpoint(tmp_path / "a/best.pt")  # stands alone
    assert model.clip.config.vision_width == {"shapes": 96, "shapes-long": 128}[name]
    picture = Image.new("RGB", (100, 50))
    x1, y1, x2, y2 = evaluate.ground(model, picture, "the small red circle")
    assert 0 <= x1 <= x2 <= 100 and 0 <= y1 <= y2 <= 50
    picture.save(tmp_path / "a.png")
    line = [tmp_path / "a/best.pt", "--image", tmp_path / "a.png", "--text", "the purple circle"]
    assert command(monkeypatch, evaluate, *line, "--output", tmp_path / "found.png") is None
    assert "trained without the words: purple)" in capsys.readouterr().out


@pytest.mark.slow
def test_the_tour_runs(monkeypatch, tmp_path, capsys):
    """docs/tour.ipynb, opened in docs/ after the first run, cell by cell; its outputs are stored."""
    make_shapes_small(monkeypatch)
    line = ["--dataset", "shapes", "--data-root", tmp_path / "data", "--epochs", 1]
    line += ["--batch-size", 32, "--device", "cpu", "--output", tmp_path / "runs/shapes"]
    assert command(monkeypatch, train, *line) is None
    tour = json.loads((Path(train.__file__).parent / "docs/tour.ipynb").read_text())
    cells = [cell for cell in tour["cells"] if cell["cell_type"] == "code"]
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    names = {}
    try:
        for cell in cells:
            exec("".join(cell["source"]), names)
    finally:
        torch.set_grad_enabled(True)
    printed = capsys.readouterr().out
    assert "layer 1:  pair 1 frozen, pair 2 trains\n" in printed and "['purple']" in printed
    assert all(cell["outputs"] for cell in cells[1:])  # the first only goes to the folder above


def test_photographs_run(monkeypatch, shared, tmp_path, clip_vocabulary):
    """The real photographs with the golden CLIP: every stage, and all four splits in the table."""
    line = ["--dataset", "refcoco", "--data-root", shared / "photos", "--epochs", 1, 0, 1, 0]
    line += ["--clip", shared / "golden/clip_tiny.pt", "--output", tmp_path, "--no-augment"]
    assert (
        command(monkeypatch, train, *line, "--batch-size", 18, "--accumulate", 1, "--device", "cpu")
        is None
    )
    results = json.loads((tmp_path / "results_refcoco.json").read_text())["results"]
    found = {row["split"]: row["expressions"] for row in results}
    assert found == {"val": 12, "testA": 8, "testB": 8}


# ---------------------------------------------------------------------------------------- evaluation


def test_one_picture_on_the_command_line(monkeypatch, finished, tmp_path, capsys):
    """--image and --text print a box inside the picture, in its upright pixels, and draw it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 100), "white").save(tmp_path / "photo.jpg", exif=exif)
    line = [finished / "best.pt", "--image", tmp_path / "photo.jpg", "--text", "Red ONE"]
    assert command(monkeypatch, evaluate, *line, "--output", tmp_path / "found.png") is None
    first = capsys.readouterr().out.splitlines()[0]
    x1, y1, x2, y2 = map(float, first.rsplit(": ", 1)[1].split())
    assert 0 <= x1 < x2 <= 100 and 0 <= y1 < y2 <= 60
    drawn = np.asarray(Image.open(tmp_path / "found.png"))
    assert drawn.shape == (300, 500, 3)  # small images are enlarged
    assert (drawn == evaluate.FOUND_COLOUR).all(axis=2).sum() > 200
    model = load_checkpoint(finished / "best.pt")
    box = evaluate.ground(model, Image.new("RGB", (100, 60), "white"), "red one")
    assert box == pytest.approx((x1, y1, x2, y2), abs=0.5)


@pytest.mark.parametrize("size", [(1, 1), (3000, 4), (4, 3000)])
def test_pictures_of_extreme_shape(tokenizer, tmp_path, size):
    """A single pixel and very long strips can be evaluated and drawn like any other picture."""
    row = {"image": Image.new("RGB", size), "bbox": [0, 0, *size], "split": "val"}
    make_refer(tmp_path, [row])
    model = tiny_model(tokenizer)
    evaluate.evaluate_splits(model, "best.pt", "refcoco", ["val"], tmp_path, tmp_path / "out")
    results = json.loads((tmp_path / "out/results_refcoco_val.json").read_text())["results"]
    assert math.isfinite(results[0]["miou"])
    assert Image.open(tmp_path / "out/refcoco_val.png").size[0] > 240


def test_accuracy_by_hand(tokenizer, refer_root):
    """Acc@0.5 and mean IoU are the plain means over the split, predicted boxes clipped to the
    square."""
    dataset = evaluate.open_split(tiny_model(tokenizer), "refcoco", "val", refer_root)
    true = torch.stack([item["box"] for item in dataset])
    predicted = true.clone()
    predicted[0, 0] += predicted[0, 2] / 2  # IoU 1/3
    predicted[1, 2] /= 2.1  # IoU below 1/2
    predicted[2] = torch.tensor([0.0, 0.0, 0.1, 0.1])  # elsewhere
    result = evaluate.summary(dataset, predicted, true)
    assert result["acc"] == 25.0
    assert result["miou"] == pytest.approx(100 * (1 / 3 + 1 / 2.1 + 0 + 1) / 4, abs=0.01)
    assert result["expressions"] == 4 and result["split"] == "val"
    sticking_out = torch.tensor([[0.0, 0.5, 1.0, 1.0]])
    inside = torch.tensor([[0.25, 0.5, 0.5, 1.0]])
    assert evaluate.clipped_iou(sticking_out, inside).item() == pytest.approx(1.0)


@pytest.mark.parametrize("right, n, low, high", [(8, 10, 49.02, 94.33), (0, 5, 0, 43.45)])
def test_the_interval_by_hand(right, n, low, high):
    """Wilson's interval as other programs print it; it stays within 0 and 100."""
    assert evaluate.wilson_interval(right, n) == pytest.approx([low, high], abs=0.01)
    assert evaluate.wilson_interval(n - right, n) == pytest.approx(
        [100 - high, 100 - low], abs=0.01
    )


def test_boxes_are_saved_for_others_to_compare(monkeypatch, finished, refer_root, tmp_path, capsys):
    """--save-boxes of two data sets: a JSON line for each expression, from whose boxes the accuracies
    of the table follow."""
    shutil.copytree(refer_root, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "refcoco", tmp_path / "refcoco+")
    line = [finished / "best.pt", "--dataset", "refcoco", "refcoco+", "--data-root", tmp_path]
    line += ["--output", tmp_path / "out", "--save-boxes", tmp_path / "out/boxes.jsonl"]
    assert command(monkeypatch, evaluate, *line) is None
    lines = [json.loads(row) for row in (tmp_path / "out/boxes.jsonl").read_text().splitlines()]
    assert [row["dataset"] for row in lines] == ["refcoco"] * 6 + ["refcoco+"] * 6
    assert [row["split"] for row in lines[:6]] == ["val"] * 4 + ["testA"] * 2
    assert all(Path(row["image"]).is_file() and row["text"].endswith(" one") for row in lines)
    true, found = (torch.tensor([row[name] for row in lines]) for name in ("true", "found"))
    model = load_checkpoint(finished / "best.pt")
    for row in lines[:2]:
        (again,) = evaluate.ground_texts(model, data.load_image(row["image"]), [row["text"]])
        assert row["score"] == pytest.approx(again.score, abs=1e-3)
    iou = box_iou(found, true)
    assert iou.tolist() == pytest.approx([row["iou"] for row in lines], abs=2e-3)
    for name in ("refcoco", "refcoco+"):
        results = json.loads((tmp_path / f"out/results_{name}.json").read_text())["results"]
        for key, threshold in (("acc", 0.5), ("acc70", 0.7), ("acc90", 0.9)):
            share = 100 * (iou[:4] >= threshold).float().mean().item()
            assert results[0][key] == pytest.approx(share, abs=0.01)
        low, high = results[0]["interval"]
        assert 0 <= low <= results[0]["acc"] <= high <= 100
    assert capsys.readouterr().out.count("95 % interval") == 2


def test_predictions_do_not_depend_on_the_batch_size(tokenizer, refer_root):
    """A split's boxes are the same in batches of any size and from workers; training goes on."""
    model = tiny_model(tokenizer, 1).train()
    dataset = evaluate.open_split(model, "refcoco", "train", refer_root)
    predicted, true = evaluate.predict(model, dataset, batch_size=3)
    assert model.training and predicted.shape == true.shape == (8, 4)
    again, _ = evaluate.predict(model, dataset, workers=1)
    torch.testing.assert_close(again, predicted, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------- bad input


def bad_input_of_train(kind, refer_root, clip_file, folder):
    line = {"--dataset": "refcoco", "--data-root": refer_root, "--clip": clip_file}
    line |= {"--output": folder / "run", "--device": "cpu", "--workers": "0"}
    (folder / "garbage").write_text("garbage")
    line |= {
        "no data root": {"--data-root": folder / "absent"},
        "unknown data set": {"--dataset": "cocoa"},
        "unknown split": {"--select": "testC"},
        "split that is not there": {"--select": "testB"},
        "no CLIP": {"--clip": folder / "absent.pt"},
        "garbage CLIP": {"--clip": folder / "garbage"},
        "no network": {"--clip": "ViT-B/16"},
        "image size": {"--image-size": "50"},
        "device": {"--device": "warp"},
        "output is a file": {"--output": folder / "garbage"},
    }[kind]
    return [str(word) for pair in line.items() for word in pair if word is not None]


@pytest.mark.parametrize(
    "kind, says",
    [
        ("no data root", "refcoco/refs(unc).p"),
        ("unknown data set", "refcoco, refcoco+, refcocog"),
        ("unknown split", "train, val, testA, testB"),
        ("split that is not there", "train, val, testA"),
        ("no CLIP", "absent.pt"),
        ("garbage CLIP", "garbage"),
        ("no network", "cannot be fetched"),
        ("image size", "50"),
        ("device", "warp"),
        ("output is a file", "garbage"),
    ],
)
def test_bad_input_of_train_is_one_sentence(
    monkeypatch, refer_root, clip_file, tmp_path, kind, says
):
    """Whatever is wrong on train.py's command line is said in one sentence that names it; exit 1."""
    line = bad_input_of_train(kind, refer_root, clip_file, tmp_path)
    code = command(monkeypatch, train, *line)
    assert isinstance(code, str) and code.startswith("error: ")  # sys.exit: to stderr, status 1
    assert says in code and "\n" not in code


def test_an_unreadable_image_ends_the_run_with_its_name(monkeypatch, clip_file, tmp_path):
    """One sentence names the image that a worker cannot read, without the worker's traceback."""
    make_refer(tmp_path, [{}, {}, {"split": "val"}])
    (broken,) = tmp_path.rglob("*000002.jpg")
    broken.write_bytes(broken.read_bytes()[:300])
    line = words_of(tmp_path, clip_file, tmp_path / "run", "--workers", 1)
    line.remove("--no-augment")
    code = command(monkeypatch, train, *line)
    assert code.startswith(f"error: {broken} cannot be read") and "\n" not in code


@pytest.mark.parametrize("option", ["--seed", "--epochs", "--batch-size", "--workers"])
def test_numbers_below_zero_are_refused(monkeypatch, refer_root, clip_file, tmp_path, option):
    """argparse says so, with its own exit status 2, before anything is read or written."""
    line = words_of(refer_root, clip_file, tmp_path / "run", option, "-1")
    assert command(monkeypatch, train, *line) == 2 and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, vocabulary):
    """A checkpoint of an untrained model."""
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    save_checkpoint(path, tiny_model(Tokenizer(vocabulary)))
    return path


@pytest.mark.parametrize(
    "change, says",
    [
        ({0: "absent.pt"}, "absent.pt"),
        ({0: "text.jpg"}, "text.jpg"),
        ({0: "clip.pt"}, "clip.pt"),
        ({2: "absent.jpg"}, "absent.jpg"),
        ({2: "text.jpg"}, "text.jpg"),
        ({2: "half.jpg"}, "half.jpg"),
        ({4: ""}, "empty"),
        ({4: "  \t"}, "empty"),
        ({6: "found.txt"}, "found.txt"),
        ({6: "photo.jpg/found.png"}, "found.png"),
    ],
)
def test_bad_input_of_evaluate_is_one_sentence(monkeypatch, tmp_path, checkpoint, change, says):
    """Whatever is wrong on evaluate.py's command line is said in one sentence that names it; exit 1."""
    monkeypatch.chdir(tmp_path)
    plain_picture(100, 100).save("photo.jpg")
    Path("half.jpg").write_bytes(Path("photo.jpg").read_bytes()[:900])
    Path("text.jpg").write_text("no picture and no checkpoint")
    save_clip(tiny_clip(), "clip.pt")
    line = [checkpoint, "--image", "photo.jpg", "--text", "red one", "--output", "found.png"]
    for place, word in change.items():
        line[place] = word
    code = command(monkeypatch, evaluate, *line)
    assert isinstance(code, str) and code.startswith("error: ")
    assert says in code and "\n" not in code and not Path("found.png").exists()


@pytest.mark.parametrize("name", ["truncated.jpg", "broken_crc.png", "bomb_30000x30000.png"])
def test_odd_pictures_on_the_command_line(monkeypatch, shared, tmp_path, checkpoint, name):
    """An unreadable picture of the shared ones is refused by name, with no picture drawn."""
    line = [checkpoint, "--image", shared / "odd_images" / name, "--text", "red one"]
    code = command(monkeypatch, evaluate, *line, "--output", tmp_path / "found.png")
    assert code.startswith("error: ") and name in code and not os.listdir(tmp_path)


def test_exit_status_and_stderr(tmp_path, checkpoint):
    """A process of its own: one line on stderr, nothing on stdout, no traceback, exit status 1."""
    root = Path(train.__file__).parent
    line = [
        sys.executable,
        root / "evaluate.py",
        checkpoint,
        "--image",
        "absent.jpg",
        "--text",
        "x",
    ]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "absent.jpg" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_split_without_usable_expressions_is_told(monkeypatch, tmp_path, checkpoint):
    """If all expressions of a split are empty or all its boxes flat, that is one sentence."""
    rows = [{"texts": ["  "]}, {"bbox": [1, 1, 0, 0]}]
    make_refer(tmp_path, [{**row, "split": split} for split in ("train", "val") for row in rows])
    line = [checkpoint, "--dataset", "refcoco", "--data-root", tmp_path, "--output", tmp_path]
    code = command(monkeypatch, evaluate, *line)
    assert isinstance(code, str) and code.startswith("error: ") and "val" in code


def test_a_vocabulary_of_another_size_is_told(monkeypatch, refer_root, tmp_path, vocabulary):
    """CLIP's file with a vocabulary beside it that is not its own: one sentence names both."""
    save_clip(tiny_clip(vocab_size=600, vision_layers=1), tmp_path / "other.pt")
    shutil.copy(vocabulary, tmp_path)
    line = words_of(refer_root, tmp_path / "other.pt", tmp_path / "run")
    code = command(monkeypatch, train, *line)
    assert "other.pt" in code and "bpe_vocab.txt.gz" in code and "\n" not in code
