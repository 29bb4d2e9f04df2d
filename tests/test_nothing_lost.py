"""Nothing is lost: runs that are killed, stopped or meet a loss that is not finite, pictures that cannot be read, full disks."""

import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_refer
from test_train import command, log_of, words_of

import clip_model
import data
import train
from hivg import load_checkpoint

# A program that trains, and is hit by a signal when it is about to call a function for the n-th time
SCRIPT = """
import os, signal, sys, time
import torch, train
name, count, signals, every, *sys.argv[1:] = sys.argv[1:]
train.bf16_pays = lambda device: False
train.SAVE_EVERY = float(every)
place = {"save": torch, "evaluate": train.evaluate}.get(name, train)
real, calls = getattr(place, name), []
def call(*given, **more):
    calls.append(1)
    if len(calls) == int(count):
        if name == "save":  # half of a checkpoint is there
            given[1].write_bytes(b"half")
        for number in signals.split(","):
            os.kill(os.getpid(), int(number))
    return real(*given, **more)
setattr(place, name, call)
train.main()
"""


def hit(folder, name, count, signals, words, every=0):
    """Run train.py until it is about to call a function for the count-th time, and send it signals. (exit status, stderr)."""
    (folder / "script.py").write_text(SCRIPT)
    signals = ",".join(str(int(number)) for number in signals)
    line = [sys.executable, folder / "script.py", name, count, signals, every, *words]
    environment = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    done = subprocess.run(
        list(map(str, line)), capture_output=True, text=True, env=environment, timeout=60
    )
    return done.returncode, done.stderr


@pytest.fixture(scope="module", autouse=True)
def full_precision():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "bf16_pays", lambda device: False)
        yield


@pytest.fixture(scope="module")
def whole(refer_root, clip_file, tmp_path_factory):
    """A run that nothing stopped, augmented, with dropout."""
    output = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, train, *augmented(refer_root, clip_file, output)) is None
    return output


def augmented(refer_root, clip_file, output):
    """Six epochs of four steps, over two stages."""
    words = words_of(refer_root, clip_file, output, "--workers", 0, "--groups", 1)
    words.remove("--no-augment")
    words[words.index("--batch-size") + 1] = 2
    words[words.index("--epochs") + 1] = 3
    return words


def same_run(output, whole):
    """The log, times aside, and every weight are the same, bit for bit."""
    assert log_of(output) == log_of(whole)
    for name in ("best.pt", "last.pt"):
        ours, theirs = (load_checkpoint(folder / name).state_dict() for folder in (output, whole))
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items()), name


@pytest.mark.parametrize(
    "name, count, step",
    [
        ("train_step", 7, 2),  # in the middle of the second epoch
        ("evaluate", 5, 0),  # between the stages
        ("save", 9, None),  # while a checkpoint is written
    ],
)
def test_a_killed_run_resumes_exactly(
    monkeypatch, refer_root, clip_file, tmp_path, whole, name, count, step
):
    """After SIGKILL, --resume goes on from the last checkpoint to the same log and weights as a run that nothing stopped."""
    output = tmp_path / "run"
    words = augmented(refer_root, clip_file, output)
    code, _ = hit(tmp_path, name, count, [signal.SIGKILL], words)
    assert code == -signal.SIGKILL and not (output / "results_refcoco.json").exists()
    progress = torch.load(output / "last.pt", weights_only=True)["progress"]
    assert step in (None, progress["step"])
    line = ["--dataset", "refcoco", "--output", output, "--resume", "--device", "cpu"]
    assert command(monkeypatch, train, *line) is None
    same_run(output, whole)
    assert sorted(os.listdir(output)) == sorted(os.listdir(whole))  # no half checkpoint is left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint(monkeypatch, refer_root, clip_file, tmp_path, whole, number):
    """Ctrl-C and SIGTERM let the step come to its end, write a checkpoint within the epoch and stop with one sentence."""
    output = tmp_path / "run"
    words = augmented(refer_root, clip_file, output)
    words[words.index("--workers") + 1] = 2 if number == signal.SIGTERM else 0
    code, said = hit(tmp_path, "train_step", 6, [number], words, every=math.inf)
    assert (
        code == 1
        and "Traceback" not in said
        and said.strip().endswith("--resume goes on from here")
    )
    progress = torch.load(output / "last.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 2)
    line = ["--dataset", "refcoco", "--output", output, "--resume", "--device", "cpu"]
    assert command(monkeypatch, train, *line) is None
    same_run(output, whole)


def test_a_second_signal_ends_at_once(refer_root, clip_file, tmp_path):
    """Who asks twice does not want to wait: the last checkpoint is the one before."""
    words = augmented(refer_root, clip_file, tmp_path / "run")
    signals = [signal.SIGTERM, signal.SIGTERM]
    code, said = hit(tmp_path, "train_step", 6, signals, words, every=math.inf)
    assert code == -signal.SIGTERM
    progress = torch.load(tmp_path / "run/last.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 0)


@pytest.mark.parametrize("workers, accumulate", [(2, 1), (0, 2)])
def test_workers_do_not_matter(
    monkeypatch, refer_root, clip_file, tmp_path, whole, workers, accumulate
):
    """The number of workers changes nothing; nor the pictures that accumulation sees, though it makes other steps."""
    output = tmp_path / "run"
    words = augmented(refer_root, clip_file, output)
    words[words.index("--workers") + 1] = workers
    words += ["--accumulate", accumulate]
    seen, real = [], train.train_step

    def step(model, batches, *more):
        seen.append([text for batch in batches for text in batch["text"]])
        return real(model, batches, *more)

    monkeypatch.setattr(train, "train_step", step)
    assert command(monkeypatch, train, *words) is None
    dataset, expected = data.GroundingDataset("refcoco", "train", refer_root, 32), []
    for stage in (1, 2):
        for epoch in range(3):
            order = data.shuffled((0, stage, epoch), 8, 2).flatten().view(-1, 2 * accumulate)
            expected += [[dataset.samples[i].text for i in row] for row in order.tolist()]
    assert seen == expected
    if accumulate == 1:
        same_run(output, whole)


# ------------------------------------------------------------------------------ a loss that is not finite


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(
    monkeypatch, refer_root, clip_file, tmp_path, what
):
    """Weights and moments stay as they were; the run stops, names stage, epoch, step and samples, and keeps its checkpoint."""
    output, states, real = tmp_path / "run", [], train.update
    words = augmented(refer_root, clip_file, output)

    def update(optimizer, learning_rate, loss):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        steps.append(1)
        if len(steps) == 7:
            if what == "loss":
                loss = loss * math.nan
            else:
                parameters[0].grad.flatten()[0] = math.inf
            before = [p.detach().clone() for p in parameters]
            moments = [optimizer.state[p]["exp_avg"].clone() for p in parameters]
            finite = real(optimizer, learning_rate, loss)
            states.append(all(map(torch.equal, before, parameters)))
            now = [optimizer.state[p]["exp_avg"] for p in parameters]
            states.append(all(map(torch.equal, moments, now)))
            return finite
        return real(optimizer, learning_rate, loss)

    steps = []
    monkeypatch.setattr(train, "update", update)
    code = command(monkeypatch, train, *words)
    assert states == [True, True]
    assert "not finite in stage 0, epoch 1, step 2" in code and "\n" not in code
    dataset = data.GroundingDataset("refcoco", "train", refer_root, 32)
    for number in data.shuffled((0, 1, 1), 8, 2)[2, 0].tolist():
        assert Path(dataset.samples[number].image).name in code
    progress = torch.load(output / "last.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 0)


# ------------------------------------------------------------------------------ pictures that cannot be read


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_pictures_are_named_or_skipped(monkeypatch, clip_file, tmp_path, capsys, workers):
    """A picture that breaks in the middle of an epoch ends the run with its name; with --skip-bad-images it goes on, counts it,
    and leaves it out of accuracy."""
    make_refer(tmp_path, [{}, {}, {}, {"split": "val"}, {"split": "val"}])
    for number in (2, 5):
        (broken,) = tmp_path.rglob(f"*00000{number}.jpg")
        broken.write_bytes(broken.read_bytes()[:300])
    words = words_of(tmp_path, clip_file, tmp_path / "run", "--workers", workers, "--groups", 1)
    words.remove("--no-augment")
    words[words.index("--epochs") + 1] = 1
    code = command(monkeypatch, train, *words)
    assert code.startswith("error: ") and ".jpg cannot be read" in code and "\n" not in code
    shutil.rmtree(tmp_path / "run")
    assert command(monkeypatch, train, *words, "--skip-bad-images") is None
    log = log_of(tmp_path / "run")
    assert {line["train_skipped"] for line in log if line["epoch"] >= 0} == {1}
    assert {(line["skipped"], line["expressions"]) for line in log} == {(1, 1)}
    printed = capsys.readouterr().out
    assert "val: 1 skipped" in printed and "after epoch 0 (1 skipped)" in printed


def test_a_split_of_bad_pictures_is_an_error(clip_file, tmp_path):
    """With nothing left to take instead, skipping ends."""
    make_refer(tmp_path, [{}, {}])
    for broken in tmp_path.rglob("*.jpg"):
        broken.write_text("no picture")
    dataset = data.GroundingDataset("refcoco", "train", tmp_path, 64, skip_bad=True)
    with pytest.raises(clip_model.HiVGError, match="cannot be read"):
        dataset[0]


# ---------------------------------------------------------------------------------------------- full disks


def test_no_room_is_told_before_training(monkeypatch, refer_root, clip_file, tmp_path):
    """A disk without room for the checkpoints is told at the start."""
    full = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    words = words_of(refer_root, clip_file, tmp_path / "run")
    code = command(monkeypatch, train, *words)
    assert code.startswith("error: ") and "no room" in code and "GB" in code
    assert not (tmp_path / "run/last.pt").exists()


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(
    monkeypatch, refer_root, clip_file, tmp_path
):
    """Writing fails with one sentence, and the last good checkpoint is still there to resume from."""
    saves, real = [], torch.save

    def save(content, path):
        saves.append(path)
        real(content, path)
        if len(saves) == 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    words = words_of(refer_root, clip_file, tmp_path / "run")
    code = command(monkeypatch, train, *words)
    assert "No space left on device" in code and "\n" not in code
    progress = torch.load(tmp_path / "run/last.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"]) == (0, 2)  # before its evaluation
    assert not list((tmp_path / "run").glob(".*"))
