"""Several processes do what one does: gradients, evaluation, whole runs, and the end of one of them."""

import os
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
WEIGHTS = {"l1": 2.0, "giou": 2.0, "clc": 1.0, "focal": 20.0, "dice": 2.0}


def five_steps(vocabulary, root, size, accumulate, weights):
    """(gradients of the first step, parameters after five, losses, boxes of val) of a tiny model in stage 2."""
    model = tiny_model(Tokenizer(vocabulary), stage=2).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), 1e-3, eps=1e-3, fused=True)
    dataset = data.GroundingDataset("refcoco", "train", root, 64)
    order = data.shuffled((0, 1, 2), len(dataset), size, train.processes())
    loader = data.batches(dataset, order[:, train.rank()].tolist())
    gradients, losses = {}, []

    def update(*given, real=train.update):
        gradients.setdefault(0, {name: p.grad.clone() for name, p in trained.items()})
        return real(*given)

    together = model
    if train.processes() > 1:
        together = DistributedDataParallel(model, forward_sync_buffers=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "update", update)
        for _ in range(5):
            batches = [batch for batch, _ in zip(loader, range(accumulate))]
            how = optimizer, 1e-3, weights, torch.enable_grad  # in the place of autocast
            losses.append(train.train_step(together, batches, *how))
    val = data.GroundingDataset("refcoco", "val", root, 64)
    val.samples = val.samples * 2 + val.samples[:1]  # nine, which two processes cannot share evenly
    val.objects = val.objects * 2 + val.objects[:1]
    boxes = evaluate.predict(model, val, batch_size=2)
    return gradients[0], trained, torch.stack(losses), boxes


def one_of_two(number, folder, *work):
    """What each of two processes does."""
    torch.set_num_threads(1)  # two processes with two threads each get into each other's way
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=number, world_size=2)
    torch.save(five_steps(*work), f"{folder}/{number}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_make_the_steps_of_one(vocabulary, refer_root, tmp_path, accumulate):
    """Gradients of the first step, parameters after five, losses and a split's boxes are those of one process with the same
    batch, L_CLC among them; with accumulation as well."""
    work = vocabulary, refer_root
    shared = tmp_path, *work, 4 // accumulate, accumulate, WEIGHTS
    torch.multiprocessing.spawn(one_of_two, shared, nprocs=2)
    one = five_steps(*work, 8 // accumulate, accumulate, WEIGHTS)
    for number in range(2):
        gradients, parameters, losses, boxes = torch.load(tmp_path / f"{number}.pt")
        for name, gradient in one[0].items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-6)
        for name, parameter in one[1].items():
            torch.testing.assert_close(parameters[name], parameter, atol=1e-5, rtol=0, msg=name)
        torch.testing.assert_close(losses, one[2], atol=1e-5, rtol=0)
        for ours, theirs in zip(boxes, one[3]):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert any(gradient.abs().max() > 1e-3 for gradient in one[0].values())


def test_accumulation_is_one_larger_batch(vocabulary, refer_root):
    """Without L_CLC, which is over each batch, two batches for a step are one of twice the size."""
    weights = WEIGHTS | {"clc": 0.0}
    one, two = (five_steps(vocabulary, refer_root, 8 // n, n, weights) for n in (1, 2))
    for name, gradient in one[0].items():
        torch.testing.assert_close(two[0][name], gradient, atol=1e-6, rtol=1e-6, msg=name)


SCRIPT = """
import os, signal, sys
import train
train.PRESETS["base"] = train.PRESETS["base"]._replace(model=dict(dropout=0.0, lora_dropout=0.0))
train.bf16_pays = lambda device: False
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
    """train.py in two processes: (exit status, what they print). In DIES one may be named that is killed in its fifth step."""
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


@pytest.fixture(scope="module")
def two(refer_root, clip_file, tmp_path_factory):
    """A run of two processes that nothing stopped: (its folder, what it prints, its words)."""
    folder = tmp_path_factory.mktemp("two")
    words = words_of(refer_root, clip_file, folder / "run")
    words[words.index("--batch-size") + 1] = 2
    code, printed = torchrun(folder, words)
    assert code == 0, printed
    return folder / "run", printed, words


def test_a_run_of_two_processes(monkeypatch, refer_root, clip_file, tmp_path, two):
    """torchrun train.py: the log is that of one process with the same batches, what is printed is
    printed once, and the first process alone writes."""
    output, printed, _ = two
    preset = train.PRESETS["base"]._replace(model=dict(dropout=0.0, lora_dropout=0.0))
    monkeypatch.setattr(train, "bf16_pays", lambda device: False)
    monkeypatch.setitem(train.PRESETS, "base", preset)
    assert command(monkeypatch, train, *words_of(refer_root, clip_file, tmp_path)) is None
    assert printed.count("stage 3 after epoch 1") == 1
    assert sorted(os.listdir(output)) == sorted(os.listdir(tmp_path))
    for ours, theirs in zip(log_of(output), log_of(tmp_path), strict=True):
        assert ours.pop("losses", {}) == pytest.approx(theirs.pop("losses", {}), abs=2e-2)
        assert ours.pop("miou") == pytest.approx(theirs.pop("miou"), abs=0.5)
        assert ours == theirs


def test_a_process_that_dies_ends_the_run(tmp_path, two):
    """The other one does not wait for it for ever, and says that it is gone; --resume, with two
    processes again, ends as the run that nothing stopped."""
    whole, _, words = two
    words = [tmp_path / "run" if word == whole else word for word in words]
    code, printed = torchrun(tmp_path, words, DIES="1")
    assert code != 0 and "has lost another one" in printed, printed
    assert len(log_of(tmp_path / "run")) < len(log_of(whole))
    code, printed = torchrun(tmp_path, [*words, "--resume"])
    assert code == 0, printed
    assert log_of(tmp_path / "run") == log_of(whole)
