"""N processes make the steps of one: gradients, steps, evaluation, runs."""

import argparse
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_model
from test_train import exit_of, log_of, refer_dataset, told, words_of
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
import hivg
import train

ROOT = Path(train.__file__).parent


def four_steps(tokenizer, root):
    """(parameters after four steps of plain descent, losses, boxes of val) of a tiny model in stage
    2, with dropout; a step is three batches of two."""
    model = tiny_model(tokenizer, stage=2, dropout=0.1, lora_dropout=0.1).train()
    optimizer, losses, parallel = torch.optim.SGD(model.parameters()), [], model
    if train.world_size() > 1:
        parallel = DistributedDataParallel(model, broadcast_buffers=False)
    loader = data.BatchLoader(refer_dataset(model, root, "train"))
    scaler = train.make_optimizer(model)[1]
    args = argparse.Namespace(seed=0, batches=3, loss=hivg.LOSS_WEIGHTS)
    for epoch in range(4):
        stage = train.Stage(2, 4, 1e-3, 2, steps=1)
        for _, (batches, seeds) in train.read_epoch(loader, stage, epoch, args):
            losses.append(train.train_step(parallel, batches, seeds, optimizer, scaler, args))
    val = refer_dataset(model, root, "val")
    rows = [*val.samples] * 2 + [val.samples[0]]  # nine, which two processes cannot share evenly
    val.samples = data.PackedSamples(rows)
    means = train.finite_means(losses, {"stage": 2, "epoch": 0})
    return model.state_dict(), means, evaluate.predict(model, val, batch_size=2)


def one_of_two(number, folder, *work):
    """What each of two processes does."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=number, world_size=2)
    torch.save(four_steps(*work), f"{folder}/{number}.pt")
    dist.destroy_process_group()


def test_two_processes_make_the_steps_of_one(monkeypatch, tokenizer, refer_root, tmp_path):
    """Three batches a step, two for one process and one for the other: parameters after four steps,
    losses and a split's boxes are those of one process, dropout included."""
    monkeypatch.setattr(train, "MAX_NORM", math.inf)  # which would hide a wrong factor
    work = tokenizer, refer_root
    torch.multiprocessing.start_processes(
        one_of_two, (tmp_path, *work), nprocs=2, start_method="fork"
    )
    parameters, losses, boxes = four_steps(*work)
    start = tiny_model(tokenizer, stage=2).state_dict()
    assert max((start[name] - tensor).abs().max() for name, tensor in parameters.items()) > 1e-3
    for number in range(2):
        theirs = torch.load(tmp_path / f"{number}.pt")
        torch.testing.assert_close(theirs[0], parameters, atol=1e-5, rtol=0)
        assert theirs[1] == pytest.approx(losses, abs=2e-4)
        torch.testing.assert_close(theirs[2], boxes, atol=1e-3, rtol=0)  # pixels


def test_fewer_batches_than_processes_is_one_sentence(monkeypatch, refer_root, clip_file, tmp_path):
    """A process without a batch would wait for ever."""
    monkeypatch.setattr(train, "world_size", lambda: 3)
    words = words_of(refer_root, clip_file, tmp_path / "run", "--batches", 2)
    told(exit_of(train, *words), "--batches 2", "3 processes")
    assert not (tmp_path / "run").exists()


SCRIPT = """
import os, signal
import train
steps, real = [], train.train_step
def step(*given):
    steps.append(1)
    if len(steps) == 4 and os.environ["LOCAL_RANK"] == os.environ.get("DIES"):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given)
train.train_step = step
train.main()
"""


def torchrun(folder, words, **environment):
    """train.py in two processes: (exit status, what they print). DIES names one that is killed in
    its fourth step."""
    (folder / "script.py").write_text(SCRIPT)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*line, folder / "script.py", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        env=os.environ | more | environment,
    )
    return done.returncode, done.stdout


def short_words(refer_root, clip_file, output):
    """Two stages of two epochs of two steps; a step is three batches of one."""
    more = "--model", "groups=1", "--batches", 3, "--batch-size", 1
    return words_of(refer_root, clip_file, output, *more)


@pytest.fixture(scope="module")
def one(refer_root, clip_file, tmp_path_factory):
    """The folder of a run of one process."""
    output = tmp_path_factory.mktemp("one") / "run"
    assert exit_of(train, *short_words(refer_root, clip_file, output)) is None
    return output


def assert_same_log(output, one):
    for ours, theirs in zip(log_of(output), log_of(one), strict=True):
        assert ours.pop("losses", {}) == pytest.approx(theirs.pop("losses", {}), abs=2e-3)
        assert ours.pop("miou") == pytest.approx(theirs.pop("miou"), abs=0.1)
        assert ours == theirs


def test_a_run_of_two_processes(refer_root, clip_file, tmp_path, one):
    """torchrun train.py: the log is that of one process, what is printed is printed once, and the
    first process alone writes. If a process dies the run ends, and goes on with any number."""
    words, output = short_words(refer_root, clip_file, tmp_path / "run"), tmp_path / "run"
    code, printed = torchrun(tmp_path, words, DIES="1")
    assert code != 0 and str(-signal.SIGKILL) in printed, printed
    assert 0 < len(log_of(output)) < len(log_of(one))
    other = shutil.copytree(output, tmp_path / "other")
    assert exit_of(train, *words, "--resume", "--output", other) is None
    code, printed = torchrun(tmp_path, [*words, "--resume"])
    assert code == 0, printed
    assert printed.count("stage 1, epoch 1: val") == printed.count("written to") == 1
    assert sorted(os.listdir(output)) == sorted(os.listdir(one))
    assert_same_log(output, one)
    assert_same_log(other, one)
