"""Nothing is lost: runs that are killed, stopped or resumed, that diverge, or that fill the disk."""

import functools
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import exit_of, log_of, told, words_of

import data
import hivg
import train
from hivg import load_checkpoint


@pytest.fixture(scope="module")
def augmented(refer_root, clip_file):
    """augmented(output, ...): the words of a run of two stages of three epochs of two steps, with
    augmentation and dropout."""

    def words(output, *more):
        line = words_of(refer_root, clip_file, output, "--model", "groups=1", *more, epochs=3)
        return [word for word in line if word != "--no-augment"]

    return words


@pytest.fixture(scope="module")
def whole(augmented, tmp_path_factory):
    """A run that nothing stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert exit_of(train, *augmented(output)) is None
    return output


def assert_same_run(output, whole):
    """The log, every weight, the optimiser and the results are the same, bit for bit."""
    for name in ("log.jsonl", "results_refcoco.json"):
        assert (output / name).read_text() == (whole / name).read_text()
    for name in ("best.pt", "last.pt"):
        ours, theirs = (torch.load(folder / name) for folder in (output, whole))
        for part in {"model", "optimizer"} & theirs.keys():
            torch.testing.assert_close(ours[part], theirs[part], atol=0, rtol=0)


def interrupt(patch, name, count, stop):
    """Call `stop` when the program is about to call train.NAME for the count-th time, or when half
    of the file NAME is written for the count-th time."""
    calls, is_file = [], name.endswith(".pt")
    place = torch if is_file else train
    real = getattr(place, "save" if is_file else name)

    def call(*given, **more):
        if not is_file or name in str(given[1]):
            calls.append(1)
            if len(calls) == count:
                if is_file:
                    Path(given[1]).write_bytes(b"half")
                stop()
        return real(*given, **more)

    patch.setattr(place, "save" if is_file else name, call)


def killed_run(name, count, words):
    """What a process of its own does: train until it is killed."""
    interrupt(pytest.MonkeyPatch(), name, count, lambda: os.kill(os.getpid(), signal.SIGKILL))
    sys.argv = ["train.py", *words]
    train.main()


@pytest.mark.parametrize(
    "name, count, done",
    [
        ("best.pt", 1, 0),  # before the first checkpoint: --resume starts from nothing
        ("train_step", 2, 1),  # within the first epoch
        ("summary", 4, 3),  # after the last epoch of a stage, before it is chosen
        ("last.pt", 5, 4),  # after best.pt was written, at the entry of the second stage
        ("evaluate_splits", 1, 8),  # when all is trained
    ],
)
def test_a_killed_run_resumes_exactly(monkeypatch, augmented, tmp_path, whole, name, count, done):
    """After SIGKILL at any moment, the same command with --resume ends with the log, weights and
    results of a run that nothing stopped."""
    output = tmp_path / "run"
    words = augmented(output)
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=killed_run, args=(name, count, words))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL and (output / "last.pt").exists() == (done > 0)
    if done:
        assert len(torch.load(output / "last.pt")["log"]) == done
        load_checkpoint(output / "best.pt")
    steps, real = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *given: steps.append(1) or real(*given))
    assert exit_of(train, *words, "--resume") is None
    epochs = max(0, done - 1) if done < 5 else done - 2
    assert len(steps) == 12 - 2 * epochs  # what was done is not done again
    assert_same_run(output, whole)


SCRIPT = """
import os, signal, sys
import train
real, calls = train.train_step, []
def step(*given):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGINT)
    return real(*given)
train.train_step = step
train.main()
"""


def test_ctrl_c_and_the_log_of_a_cluster(augmented, tmp_path, whole, capfd):
    """In a process of its own, with workers: Ctrl-C ends it at once, with one sentence and status 1;
    what was finished is kept. Where stderr is no terminal, next to nothing is written there."""
    output = tmp_path / "run"
    words = augmented(output, "--workers", 1)
    environment = {"PYTHONPATH": str(Path(train.__file__).parent)}
    line = [sys.executable, "-c", SCRIPT, *words]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | environment)
    said = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 1 and said[-1].startswith("stopped by Ctrl-C") and len(said) < 3
    assert "--resume" in said[-1] and len(log_of(output)) == 2
    assert exit_of(train, *words, "--resume") is None
    printed = capfd.readouterr()
    written = [part for part in re.split("[\r\n]", printed.err) if part.strip()]
    assert len(written) < 30 and all(
        "%|" in bar for bar in written
    )  # a bar a minute, if it is slow
    assert printed.out.count("val Acc@0.5") == 6  # a line for each epoch that was left
    assert_same_run(output, whole)


@pytest.fixture(scope="module")
def second_epoch(augmented, tmp_path_factory):
    """The folder of a run that was stopped in its second epoch."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "train_step", 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        code = exit_of(train, *augmented(output))
    assert code.startswith("stopped by Ctrl-C")
    return output


@pytest.fixture
def stopped(second_epoch, augmented, tmp_path):
    """A copy of that folder, and the words that go on there."""
    output = shutil.copytree(second_epoch, tmp_path / "run")
    return output, augmented(output, "--resume")


def test_flags_that_do_not_change_the_result_take_effect(monkeypatch, stopped, tmp_path, whole):
    """A resumed run takes workers, data root, output, checkpointing and compilation from the new
    command, and ends as the one that nothing stopped."""
    _, words = stopped
    elsewhere = shutil.copytree(words[words.index("--data-root") + 1], tmp_path / "elsewhere")
    seen, real = [], train.train_step

    def train_step(model, *more):
        compiled = model.bridged_block is not hivg.bridged_block
        seen.append((model.checkpointing, more[4].workers, compiled))
        return real(model, *more)

    monkeypatch.setattr(train, "train_step", train_step)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    more = "--data-root", elsewhere, "--workers", 1, "--checkpointing", "--compile"
    assert exit_of(train, *words, *more) is None
    torch.compiler.reset()
    assert seen == [(True, 1, True)] * 10
    assert torch.load(tmp_path / "run/last.pt")["args"]["data_root"] == str(elsewhere)
    for ours, theirs in zip(log_of(tmp_path / "run"), log_of(whole), strict=True):
        assert ours["miou"] == pytest.approx(theirs["miou"], abs=0.1)


def test_a_run_goes_on_another_kind_of_device(monkeypatch, stopped):
    """What began in float32 can be resumed where float16 is computed, and ends there or here."""
    output, words = stopped
    with monkeypatch.context() as patch:
        patch.setattr(train, "autocast_dtype", lambda device: torch.float16)
        interrupt(patch, "train_step", 4, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert exit_of(train, *words).startswith("stopped by Ctrl-C")
    assert len(log_of(output)) == 3 and torch.load(output / "last.pt")["scaler"]
    assert exit_of(train, *words) is None and len(log_of(output)) == 8


@pytest.mark.parametrize(
    "flags",
    ["--lr 1e-5", "--epochs 7", "--batch-size 2", "--batches 2", "--seed 1", "--loss clc=0"]
    + ["--model groups=1 rank=4", "--no-augment", "--dataset refcoco refcoco+", "--select testA"]
    + ["--preset large", "--clip other.pt"],
)
def test_other_flags_that_differ_are_an_error(monkeypatch, stopped, flags):
    """A flag that would change the result of a resumed run is refused by name, at the start."""
    output, words = stopped
    before = (output / "last.pt").read_bytes()
    if "--dataset" in flags:  # both have files
        monkeypatch.setattr(data, "read_annotations", lambda name, root: {})
    more = flags.split()
    told(exit_of(train, *words, *more), more[0])
    assert (output / "last.pt").read_bytes() == before


@pytest.mark.parametrize("kind", ["best.pt", "last.pt", "train", "val"])
def test_what_changed_beside_a_stopped_run_is_told_at_the_start(monkeypatch, stopped, kind):
    """A checkpoint that is gone or damaged, lines that went: with the numbers then and now."""
    output, words = stopped
    real = data.read_annotations

    def changed(name, root):
        splits = real(name, root)
        if kind in splits:
            fewer = data.PackedSamples([*splits[kind].samples][1:])
            splits[kind] = splits[kind]._replace(samples=fewer)
        return splits

    monkeypatch.setattr(data, "read_annotations", changed)
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("it began to train"))
    if kind == "best.pt":
        (output / "best.pt").unlink()
    if kind == "last.pt":
        (output / "last.pt").write_bytes(b"garbage")
    told(exit_of(train, *words), *{"train": (7, 8), "val": (3, 4)}.get(kind, [kind]))


# ---------------------------------------------------------------------- losses that are not finite


def spoil(monkeypatch, steps):
    """Let the losses of the steps with these numbers, from 1, be infinite. Gives the calls."""
    calls, real = [], train.compute_losses

    def compute_losses(*given):
        calls.append(1)
        losses = real(*given)
        if len(calls) in steps:
            losses["giou"] = losses["giou"] * math.inf
        return losses

    monkeypatch.setattr(train, "compute_losses", compute_losses)
    return calls


def test_one_overflow_of_float16_goes_on(monkeypatch, augmented, tmp_path):
    """The scaler makes no step then, and the loss counts in no mean."""
    monkeypatch.setattr(train, "autocast_dtype", lambda device: torch.float16)
    calls = spoil(monkeypatch, [3])
    words = augmented(tmp_path, "--epochs", 2, 0)
    assert exit_of(train, *words) is None and len(calls) == 4
    values = [value for line in log_of(tmp_path)[1:] for value in line["losses"].values()]
    assert len(values) == 10 and all(map(math.isfinite, values))
    assert torch.load(tmp_path / "last.pt")["scaler"]["scale"] < 2.0**16


def test_overflow_again_and_again_stops(monkeypatch, augmented, tmp_path):
    """At the next look at the losses, within the epoch."""
    monkeypatch.setattr(train, "autocast_dtype", lambda device: torch.float16)
    monkeypatch.setattr(train, "LOOK_EVERY", 3)
    calls = spoil(monkeypatch, range(100))
    words = augmented(tmp_path, "--batch-size", 1)
    told(exit_of(train, *words), "not finite in stage 0, epoch 0")
    assert len(calls) == 3 and len(log_of(tmp_path)) == 1


@pytest.mark.parametrize("kind", ["rate", "last step"])
def test_a_run_that_diverges_saves_nothing(monkeypatch, augmented, tmp_path, kind):
    """A rate of 1e15, or one loss in the last step of an epoch: stopped before the weights are saved;
    last.pt and best.pt are of the epoch before, whose model is fine."""
    words = augmented(tmp_path)
    if kind == "rate":
        words += ["--lr", "1e15", "--batch-size", 8]
    else:
        spoil(monkeypatch, [2])
    told(exit_of(train, *words), "not finite in stage 0, epoch 0", "--lr")
    assert len(log_of(tmp_path)) == len(torch.load(tmp_path / "last.pt")["log"]) == 1
    for name in ("best.pt", "last.pt"):
        tensors = load_checkpoint(tmp_path / name).state_dict().values()
        assert all(t.abs().max() < 100 for t in tensors)  # NaN neither


@pytest.mark.parametrize("error", [OSError, RuntimeError])  # torch.save raises the latter
def test_a_disk_that_fills_up_keeps_the_last_checkpoint(monkeypatch, augmented, tmp_path, error):
    """Writing fails with one sentence, and the last good checkpoint is still there."""

    def stop():
        raise error("No space left on device")

    interrupt(monkeypatch, "last.pt", 2, stop)
    told(exit_of(train, *augmented(tmp_path / "run")), "No space left on device")
    assert len(torch.load(tmp_path / "run/last.pt")["log"]) == 1
    assert not list((tmp_path / "run").glob(".*"))
