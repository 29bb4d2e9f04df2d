"""N processes do what one does that accumulates N batches: gradients, steps, evaluation, runs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_model
from test_train import command, log_of, words_of
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
import train
from clip_model import Tokenizer

ROOT = Path(train.__file__).parent


def five_steps(vocabulary, root, accumulate):
    """(gradients of the first step, parameters after five, losses, boxes of val) of a tiny model in
    stage 2, with dropout; a step is two batches of two."""
    model = tiny_model(Tokenizer(vocabulary), stage=2, dropout=0.1, lora_dropout=0.1).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), 1e-3, eps=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    dataset = evaluate.open_split(model, "refcoco", "train", root)
    parallel, gradients, losses = model, {}, []
    if train.world_size() > 1:
        parallel = DistributedDataParallel(model, forward_sync_buffers=False)

    def remember(optimizer, args, kwargs):
        if not gradients:
            gradients.update({name: p.grad.clone() for name, p in trained.items()})

    optimizer.register_step_pre_hook(remember)
    for step in range(5):
        batches = data.epoch_batches((0, step), len(dataset), 2, 2)[:2]
        numbers = range(train.process_rank(), 2, train.world_size())
        reader = data.read_batches(dataset, batches[numbers].tolist())
        given = list(reader), list(numbers), optimizer, scaler, train.LOSS_WEIGHTS
        assert len(given[0]) == accumulate
        losses.append(train.mean_over_processes(train.train_step(parallel, *given)))
    val = evaluate.open_split(model, "refcoco", "val", root)
    rows = [*val.samples] * 2 + [val.samples[0]]  # nine, which two processes cannot share evenly
    val.samples = data.PackedSamples(rows)
    return gradients, trained, torch.stack(losses), evaluate.predict(model, val, batch_size=2)


def one_of_two(number, folder, *work):
    """What each of two processes does."""
    torch.set_num_threads(1)  # two processes with two threads each get into each other's way
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=number, world_size=2)
    torch.save(five_steps(*work), f"{folder}/{number}.pt")
    dist.destroy_process_group()


def test_two_processes_make_the_steps_of_one(vocabulary, refer_root, tmp_path):
    """Gradients of the first step, parameters after five, losses and a split's boxes are those of
    one process that accumulates two batches, with dropout and L_CLC."""
    work = vocabulary, refer_root
    torch.multiprocessing.spawn(one_of_two, (tmp_path, *work, 1), nprocs=2)
    gradients, parameters, losses, boxes = five_steps(*work, 2)
    for number in range(2):
        theirs = torch.load(tmp_path / f"{number}.pt")
        for name, gradient in gradients.items():
            torch.testing.assert_close(theirs[0][name], gradient, atol=1e-6, rtol=1e-6, msg=name)
        for name, parameter in parameters.items():
            torch.testing.assert_close(theirs[1][name], parameter, atol=1e-5, rtol=0, msg=name)
        torch.testing.assert_close(theirs[2], losses, atol=1e-5, rtol=0)
        torch.testing.assert_close(theirs[3], boxes, atol=1e-5, rtol=0)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())


SCRIPT = """
import os, signal, sys
import train
steps, real = [], train.train_step
def step(*given):
    steps.append(1)
    if len(steps) == 5 and os.environ["LOCAL_RANK"] == os.environ.get("DIES"):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given)
train.train_step = step
train.main()
"""


def torchrun(folder, words, **environment):
    """train.py in two processes: (exit status, what they print). DIES names one that is killed in
    its fifth step."""
    (folder / "script.py").write_text(SCRIPT)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*line, folder / "script.py", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        env=os.environ | more | environment,
    )
    return done.returncode, done.stdout


def short_words(refer_root, clip_file, output, accumulate):
    """Two stages of two epochs; a step is two batches of two."""
    words = words_of(refer_root, clip_file, output, "--groups", 1, "--workers", 0)
    words[words.index("--batch-size") + 1] = 2
    words[words.index("--accumulate") + 1] = accumulate
    return words


@pytest.fixture(scope="module")
def one(refer_root, clip_file, tmp_path_factory):
    """The folder of a run of one process that accumulates two batches."""
    output = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, train, *short_words(refer_root, clip_file, output, 2)) is None
    return output


def assert_same_log(output, one):
    for ours, theirs in zip(log_of(output), log_of(one), strict=True):
        assert ours.pop("losses", {}) == pytest.approx(theirs.pop("losses", {}), abs=2e-3)
        assert ours.pop("miou") == pytest.approx(theirs.pop("miou"), abs=0.1)
        assert ours == theirs


def test_a_run_of_two_processes(refer_root, clip_file, tmp_path, one):
    """torchrun train.py: the log is that of one process with --accumulate 2, dropout included; what
    is printed is printed once, and the first process alone writes."""
    code, printed = torchrun(tmp_path, short_words(refer_root, clip_file, tmp_path / "run", 1))
    assert code == 0, printed
    assert printed.count("stage 1 after epoch 1") == 1
    assert sorted(os.listdir(tmp_path / "run")) == sorted(os.listdir(one))
    assert_same_log(tmp_path / "run", one)


def test_a_process_that_dies_ends_the_run(
    monkeypatch, refer_root, clip_file, tmp_path, one, capsys
):
    """The other process does not wait for it for ever; --resume, here with one process that
    accumulates, ends as the run that nothing stopped."""
    words = short_words(refer_root, clip_file, tmp_path / "run", 1)
    code, printed = torchrun(tmp_path, words, DIES="1")
    assert code != 0 and str(-signal.SIGKILL) in printed, printed
    assert 0 < len(log_of(tmp_path / "run")) < len(log_of(one))
    line = ["--dataset", "refcoco", "--output", tmp_path / "run", "--resume"]
    assert command(monkeypatch, train, *line, "--accumulate", 3).startswith("error: ")
    assert command(monkeypatch, train, *line) is None
    assert "batches of a step: 2 in each of 1 process" in capsys.readouterr().out
    assert_same_log(tmp_path / "run", one)
