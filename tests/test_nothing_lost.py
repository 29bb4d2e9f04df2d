"""Nothing is lost: runs that are killed, stopped or resumed; losses that are not finite; float16."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from test_train import command, log_of, words_of

import data
import evaluate
import train
from clip_model import Tokenizer
from hivg import load_checkpoint

# A program that trains and gets a signal when it is about to call a function for the n-th time. At
# "save" the file is half written.
SCRIPT = """
import os, sys
import torch, train
name, count, number, *sys.argv[1:] = sys.argv[1:]
place = {"save": torch, "summary": train.evaluate}.get(name, train)
real, calls = getattr(place, name), []
def call(*given, **more):
    calls.append(1)
    if len(calls) == int(count):
        if name == "save":
            given[1].write_bytes(b"half")
        os.kill(os.getpid(), int(number))
    return real(*given, **more)
setattr(place, name, call)
train.main()
"""


def run_and_signal(folder, name, count, number, words):
    """Run train.py and send it a signal at the count-th call of a function: (status, stderr)."""
    (folder / "script.py").write_text(SCRIPT)
    line = [sys.executable, folder / "script.py", name, count, int(number), *words]
    environment = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    done = subprocess.run(
        list(map(str, line)), capture_output=True, text=True, env=environment, timeout=60
    )
    return done.returncode, done.stderr


def augmented(refer_root, clip_file, output, *more):
    """A run of six epochs of four steps, over two stages, with augmentation and dropout."""
    words = words_of(refer_root, clip_file, output, "--workers", 0, "--groups", 1, *more)
    words.remove("--no-augment")
    words[words.index("--batch-size") + 1] = 2
    words[words.index("--epochs") + 1] = 3
    return words


@pytest.fixture(scope="module")
def whole(refer_root, clip_file, tmp_path_factory):
    """A run that nothing stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, train, *augmented(refer_root, clip_file, output)) is None
    return output


def assert_same_run(output, whole):
    """The log, times aside, and every weight are the same, bit for bit."""
    assert log_of(output) == log_of(whole)
    for name in ("best.pt", "last.pt"):
        ours, theirs = (load_checkpoint(folder / name).state_dict() for folder in (output, whole))
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items()), name


@pytest.mark.parametrize(
    "name, count, done",
    [
        ("train_step", 2, 0),  # before the first checkpoint
        ("train_step", 7, 1),  # within the second epoch
        ("summary", 4, 3),  # at the entry of the second stage
        ("save", 3, 1),  # while best.pt is written
        ("save", 4, 1),  # while last.pt is written, after best.pt
        ("save", 8, 3),  # the same, at the entry of the second stage
    ],
)
def test_a_killed_run_resumes_exactly(
    monkeypatch, refer_root, clip_file, tmp_path, whole, name, count, done
):
    """After SIGKILL at any moment, the same command with --resume ends with the log and weights of
    a run that nothing stopped."""
    output = tmp_path / "run"
    words = augmented(refer_root, clip_file, output)
    code, _ = run_and_signal(tmp_path, name, count, signal.SIGKILL, words)
    assert code == -signal.SIGKILL and (output / "last.pt").exists() == (done > 0)
    if done:
        assert len(torch.load(output / "last.pt", weights_only=True)["log"]) == done
        load_checkpoint(output / "best.pt")
    assert command(monkeypatch, train, *words, "--resume") is None
    assert_same_run(output, whole)


def test_ctrl_c_ends_at_once_with_one_sentence(monkeypatch, refer_root, clip_file, tmp_path, whole):
    """Ctrl-C within an epoch ends the run; what was finished is kept, and --resume goes on."""
    output = tmp_path / "run"
    words = augmented(refer_root, clip_file, output, "--workers", 2)
    code, said = run_and_signal(tmp_path, "train_step", 6, signal.SIGINT, words)
    said = said.strip().split("\r")[-1].strip().splitlines()[-1]
    assert code == 1 and said.startswith("stopped by Ctrl-C") and "--resume" in said
    assert len(log_of(output)) == 1
    assert command(monkeypatch, train, *words, "--resume") is None
    assert_same_run(output, whole)


def test_resume_starts_a_run_that_is_not_there(monkeypatch, refer_root, clip_file, tmp_path, whole):
    """--resume without a last.pt starts from nothing: one command serves a job that is requeued."""
    words = augmented(refer_root, clip_file, tmp_path / "run", "--resume")
    assert command(monkeypatch, train, *words) is None
    assert_same_run(tmp_path / "run", whole)


@pytest.fixture
def stopped(monkeypatch, refer_root, clip_file, tmp_path):
    """The folder of a run that was stopped in its second epoch, and its words."""
    output = tmp_path / "run"
    words = augmented(refer_root, clip_file, output)
    calls, real = [], train.train_epoch

    def stop(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", stop)
        assert command(patch, train, *words).startswith("stopped by Ctrl-C")
    return output, words


def test_flags_that_do_not_change_the_result_take_effect(monkeypatch, stopped, tmp_path, whole):
    """A resumed run takes workers, device, data root, output, checkpointing from the new command."""
    output, words = stopped
    moved, elsewhere = output.rename(tmp_path / "moved"), tmp_path / "elsewhere"
    root = words[words.index("--data-root") + 1]
    shutil.copytree(root, elsewhere)
    seen, real = [], train.train_epoch

    def train_epoch(model, *more):
        settings = more[-3]
        seen.append((model.checkpointing, settings.workers))
        return real(model, *more)

    monkeypatch.setattr(train, "train_epoch", train_epoch)
    line = ["--dataset", "refcoco", "--resume", "--output", moved, "--data-root", elsewhere]
    assert command(monkeypatch, train, *line, "--workers", 1, "--checkpointing") is None
    assert seen == [(True, 1)] * 5
    settings = json.loads((moved / "config.json").read_text())["settings"]
    assert settings["data_root"] == str(elsewhere) and settings["output"] == str(moved)
    assert log_of(moved)[:2] == log_of(whole)[:2]
    assert len(log_of(moved)) == len(log_of(whole))


def test_a_run_goes_on_another_kind_of_device(monkeypatch, stopped):
    """What began in float32 can be resumed where float16 is computed, and ends."""
    output, words = stopped
    monkeypatch.setattr(train, "autocast_dtype", lambda device: torch.float16)
    assert command(monkeypatch, train, *words, "--resume") is None
    assert len(log_of(output)) == 7 and torch.load(output / "last.pt")["scaler"]


@pytest.mark.parametrize(
    "flags",
    [
        "--lr 1e-5",
        "--epochs 7",
        "--batch-size 4",
        "--seed 1",
        "--rank 4",
        "--no-augment",
        "--loss clc=0",
        "--accumulate 2",
        "--adapters none",
        "--no-bridges",
        "--dataset refcoco refcoco+",
    ],
)
def test_other_flags_that_differ_are_an_error(monkeypatch, stopped, flags):
    """A flag that would change the result of a resumed run is refused by name; the same is not."""
    output, words = stopped
    before = (output / "last.pt").read_bytes()
    if "--dataset" in flags:  # both have files
        root = Path(words[words.index("--data-root") + 1])
        monkeypatch.setattr(data, "check_files", lambda *given: root)
    code = command(monkeypatch, train, *words, "--resume", *flags.split())
    flag = {"--no-bridges": "--bridge-layers"}.get(flags, flags.split()[0])
    assert code.startswith("error: ") and flag in code and "\n" not in code, code
    assert (output / "last.pt").read_bytes() == before


def test_annotations_are_parsed_once_in_a_run(monkeypatch, refer_root, clip_file, tmp_path):
    """Training, choosing, the account and the last evaluation share one reading of the files."""
    read, real = [], data.read_refer
    monkeypatch.setitem(
        data.FAMILIES, "refer", (lambda *a: read.append(a) or real(*a), data.refer_entry)
    )
    assert command(monkeypatch, train, *augmented(refer_root, clip_file, tmp_path / "run")) is None
    assert len(read) == 1


# ---------------------------------------------------------------------- losses that are not finite


def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch, refer_root, clip_file, tmp_path):
    """It says stage, epoch, step, the losses and the samples; last.pt is of the last good epoch."""
    output, real, calls = tmp_path / "run", train.compute_losses, []
    words = augmented(refer_root, clip_file, output)

    def compute_losses(*given):
        calls.append(1)
        losses = real(*given)
        if len(calls) == 7:
            losses["giou"] = losses["giou"] * math.nan
        return losses

    monkeypatch.setattr(train, "compute_losses", compute_losses)
    code = command(monkeypatch, train, *words)
    assert "stage 0, epoch 1, step 2" in code and "giou nan" in code and "\n" not in code
    assert "l1 nan" not in code
    dataset = data.GroundingDataset("refcoco", "train", refer_root, 32)
    for index in data.epoch_batches((0, 1, 1), 8, 2)[2].tolist():
        assert Path(dataset.samples[index].image).name in code
    assert len(torch.load(output / "last.pt", weights_only=True)["log"]) == 1


def loss_curve(vocabulary, refer_root, dtype, steps=12):
    """(losses of some steps on the same batch, the scales of the GradScaler) in float32 or float16."""
    model = tiny_model(Tokenizer(vocabulary), stage=1).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 3e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype is torch.float16)
    dataset = evaluate.open_split(model, "refcoco", "train", refer_root)
    batch = data.collate(dataset.__getitems__(range(4)))
    losses = []
    for _ in range(steps):
        step = [batch], [0], optimizer, scaler, train.LOSS_WEIGHTS, dtype
        losses.append(train.train_step(model, *step))
    weights = torch.tensor(list(train.LOSS_WEIGHTS.values()))
    return torch.stack(losses) @ weights


def test_float16_learns_as_float32_does(vocabulary, refer_root):
    """Under float16 autocast with a GradScaler the loss falls as it does in float32."""
    full, half = (loss_curve(vocabulary, refer_root, dtype) for dtype in (None, torch.float16))
    assert full[-1] < 0.7 * full[0]
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)


def test_an_overflow_skips_the_step(vocabulary, refer_root):
    """Gradients that overflow in float16 change no weight; the scale becomes smaller instead."""
    model = tiny_model(Tokenizer(vocabulary), stage=1).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 3e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    dataset = evaluate.open_split(model, "refcoco", "train", refer_root)
    batch = data.collate(dataset.__getitems__(range(4)))
    before = [p.detach().clone() for p in trained]
    step = [batch], [0], optimizer, scaler, train.LOSS_WEIGHTS, torch.float16
    assert train.train_step(model, *step).isfinite().all()
    assert all(map(torch.equal, before, trained)) and scaler.get_scale() == 2.0**39


@pytest.mark.parametrize("error", [OSError, RuntimeError])  # torch.save raises the latter
def test_a_disk_that_fills_up_keeps_the_last_checkpoint(
    monkeypatch, refer_root, clip_file, tmp_path, error
):
    """Writing fails with one sentence, and the last good checkpoint is still there."""
    saves, real = [], torch.save

    def save(content, path):
        saves.append(path)
        real(content, path)
        if len(saves) == 4:
            raise error("No space left on device")

    monkeypatch.setattr(torch, "save", save)
    code = command(monkeypatch, train, *augmented(refer_root, clip_file, tmp_path / "run"))
    assert "No space left on device" in code and "\n" not in code
    assert len(torch.load(tmp_path / "run/last.pt", weights_only=True)["log"]) == 1
    assert not list((tmp_path / "run").glob(".*"))
