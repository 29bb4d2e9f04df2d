"""evaluate.py's measures and pictures: accuracy by length, speed and cost, attention maps, training curves.

How it evaluates a split and grounds on the command line is tested with train.py, in test_train.py.
"""

import json
import math
import sys

import pytest
import torch
from conftest import make_refer, plain_picture, shake_pairs, tiny_model
from PIL import Image
from test_train import command

import data
import evaluate
from hivg import load_checkpoint, read_checkpoint, save_checkpoint


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    """A checkpoint of an untrained model, in stage 2."""
    save_checkpoint(tmp_path / "best.pt", tiny_model(tokenizer, 2))
    return tmp_path / "best.pt"


# ------------------------------------------------------------------------------------- accuracy by length


def with_lengths(root, lengths):
    """The val split of a data set whose expressions have these numbers of words."""
    texts = [" ".join(["red"] * words) for words in lengths]
    make_refer(root, [{"split": "val", "texts": texts}])
    return data.GroundingDataset("refcoco", "val", root, 64)


def test_accuracy_by_length(tmp_path):
    """Each bin holds both of its ends, and counts its own expressions right and wrong."""
    dataset = with_lengths(tmp_path, (1, 5, 6, 7, 8, 10, 11, 40))
    true = torch.stack([item["box"] for item in dataset])
    found = true.clone()
    found[[1, 4, 5, 6]] = torch.tensor([0.0, 0.0, 0.1, 0.1])  # elsewhere
    result = evaluate.summary(dataset, found, true)
    right = {"1-5": 50.0, "6-7": 100.0, "8-10": 0.0, "11+": 50.0}
    assert result["lengths"] == {n: {"expressions": 2, "acc": acc} for n, acc in right.items()}
    assert result["acc"] == 50.0
    *_, names, row = evaluate.format_table([result]).splitlines()
    assert names.split() == ["words", *right]
    assert row.split() == ["val", *"50.00% of 2 100.00% of 2 0.00% of 2 50.00% of 2".split()]


def test_bins_without_expressions(tokenizer, tmp_path, capsys):
    """They are null in results_NAME.json and - in the table that is printed."""
    with_lengths(tmp_path, (2, 9))
    evaluate.evaluate_splits(tiny_model(tokenizer), "best.pt", "refcoco", None, tmp_path, tmp_path)
    (row,) = json.loads((tmp_path / "results_refcoco.json").read_text())["results"]
    assert row["lengths"]["6-7"] == row["lengths"]["11+"] == {"expressions": 0, "acc": None}
    assert [row["lengths"][name]["expressions"] for name in ("1-5", "8-10")] == [1, 1]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "% of 1" in line]
    assert line.split()[4::4] == ["-", "-"]


# ------------------------------------------------------------------------------------------ speed and cost


def flops_by_hand(T, N=16, P=16, d=64, F=64):
    """2 for each multiply-add of the tiny model, whose widths are all d, for T tokens."""

    def attention(queries, keys):  # q and out; k and v; q k^T and its product with v
        return 4 * queries * d**2 + 4 * keys * d**2 + 4 * queries * keys * d

    def block(tokens):  # with an MLP d -> 4 d -> d
        return attention(tokens, tokens) + 16 * tokens * d**2

    text = 3 * block(T) + 2 * T * d**2  # and text_projection
    bridge = 2 * T * 2 * d * d + attention(1 + N, T) + 16 * (1 + N) * d**2  # reads two f^i
    image = 2 * N * 3 * P**2 * d + 6 * block(1 + N) + 4 * bridge
    K = 2 + N + T
    encoder = attention(K, K) + 4 * K * d * F + attention(1, K) + 4 * d * F  # last layer: [REG]
    inputs = 2 * (1 + N) * 4 * d * d + 2 * T * d**2  # multi-level features, text_proj
    return text + image + inputs + encoder + 4 * d**2 + 2 * d * 4  # and the box head


def test_benchmark(tokenizer, monkeypatch):
    """The table has FLOPs as counted by hand, and what the times say."""
    monkeypatch.setattr(evaluate, "MIN_SECONDS", 0.01)
    tokens, model = [], tiny_model(tokenizer, 2)
    shake_pairs(model)
    model.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[1]))
    rows = evaluate.inference_rows(model, 3, bf16=False, peak=1e9)
    assert {(len(t), t.shape[1]) for t in tokens} == {(n, tokens[0].shape[1]) for n in (1, 3)}
    assert [row[1] for row in rows] == [1, 3]
    for _, images, milliseconds, speed, gflops, share, memory in rows:
        assert gflops * 1e9 == pytest.approx(flops_by_hand(tokens[0].shape[1]))
        assert speed == pytest.approx(1000 * images / milliseconds)
        assert share == pytest.approx(100 * gflops * speed)  # of 1 GFLOP/s
        assert 20 < memory < 100_000  # the process has loaded torch


def test_the_benchmark_times_compiled_code(tokenizer, monkeypatch):
    """A compiled model is compiled when it is timed; operations are counted all the same."""
    monkeypatch.setattr(evaluate, "MIN_SECONDS", 0.01)
    calls = []

    def backend(graph, inputs):
        def run(*given):
            calls.append(torch.utils._python_dispatch._get_current_dispatch_mode())
            return graph.forward(*given)

        return run

    model = tiny_model(tokenizer, 2)
    model.compile(backend=backend)
    *_, (_, _, _, _, gflops, _, _) = evaluate.inference_rows(model, 3, bf16=False, peak=1e9)
    assert len(calls) > 10 and set(calls) == {None}  # never under the counter
    assert gflops > 0.01


def test_benchmark_on_the_command_line(monkeypatch, checkpoint, capsys):
    """--benchmark says what is trained and in all, and prints a line for each kind of use."""
    monkeypatch.setattr(evaluate, "MIN_SECONDS", 0.01)
    line = [checkpoint, "--benchmark", "--batch-size", 2, "--device", "cpu"]
    assert command(monkeypatch, evaluate, *line) is None
    model, _ = read_checkpoint(checkpoint)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    first, second, _, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{total:,} parameters, {trained:,} of") and 0 < trained < total
    assert f"{checkpoint} on cpu" in second
    assert [line.split()[1] for line in lines[1:]] == ["1", "2"]


# -------------------------------------------------------------------------------------------- attention maps


def softmax_by_hand(q, k, heads, padding=None):
    """Attention of the first query: q [Nq, d], k [Nk, d], padding [Nk] bool -> [Nk], mean over heads."""
    each = q.shape[-1] // heads
    rows = []
    for head in range(heads):
        columns = slice(head * each, (head + 1) * each)
        logits = k[:, columns] @ q[0, columns] / math.sqrt(each)
        if padding is not None:
            logits[padding] = -math.inf
        rows.append(logits.softmax(dim=0))
    return sum(rows) / heads


@torch.inference_mode()
def test_the_score_is_the_top_of_the_region_map(tokenizer):
    """ground_texts gives the box of `ground`, sigmoid(s_p) by patch, 0 in the padding, and its top."""
    model, picture = tiny_model(tokenizer, 1), plain_picture(60, 20)
    texts = ["red one", "the blue one"]
    square, geometry = data.preprocess(picture, 64)
    inner = torch.tensor([geometry.inner])
    images, padding = data.normalise(square[None], inner, model.config.mean, model.config.std)
    for text, found in zip(texts, evaluate.ground_texts(model, picture, texts)):
        assert found.box == pytest.approx(evaluate.ground(model, picture, text), abs=1e-3)
        logits = model(images, model.tokenize(text), padding, for_losses=True).region_logits
        expected = logits.sigmoid().view(4, 4)
        expected[[0, 3]] = 0  # 60 x 20: the bars are padding
        torch.testing.assert_close(found.region_map, expected, atol=1e-5, rtol=0)
        assert found.score == found.region_map.max() and 0 < found.score < 1


@torch.inference_mode()
def test_attention_maps_by_hand(tokenizer):
    """[CLS] in the first layer and [REG] in the last, on a picture with bars of padding: as by hand."""
    model = tiny_model(tokenizer, 1)
    picture = plain_picture(60, 20)
    seen = []
    hook = model.grounding_layers[-1].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs)
    )
    maps = evaluate.attention_maps(model, picture, "red one")
    hook.remove()
    last = "[REG], grounding layer 2"
    assert list(maps) == [*(f"[CLS], layer {i}" for i in (1, 2, 4, 6)), last]
    assert all(weights.shape == (4, 4) and 0 < weights.sum() <= 1 for weights in maps.values())

    block = model.clip.visual.transformer.resblocks[0]
    square, geometry = data.preprocess(picture, 64)
    inner = torch.tensor([geometry.inner])
    images, _ = data.normalise(square[None], inner, model.config.mean, model.config.std)
    x = block.ln_1(model.clip.visual.embed(images))[0]
    q, k, _ = block.attn.in_proj(x).chunk(3, dim=-1)
    weights = softmax_by_hand(q, k, block.attn.heads)
    torch.testing.assert_close(maps["[CLS], layer 1"], weights[1:].view(4, 4))

    (z, positions, padding, _), layer = seen[0], model.grounding_layers[-1]
    key = layer.norm_1(z[0]) + positions
    projected = layer.attention.q_proj(key), layer.attention.k_proj(key)
    weights = softmax_by_hand(*projected, layer.attention.heads, padding[0])
    assert weights.sum().item() == pytest.approx(1)
    torch.testing.assert_close(maps[last], weights[2:18].view(4, 4))
    assert not maps[last][[0, 3]].any() and maps[last][1:3].all()  # 60 x 20: the bars are padding


def test_overlay_cuts_the_padding_away():
    """Colours lie where the patches lie in the photograph; what the padding gets colours nothing."""
    weights = torch.zeros(4, 4)
    weights[0], weights[1, 3], weights[2, 0] = 1.0, 0.2, 0.1
    drawn = evaluate.attention_overlay(Image.new("RGB", (80, 40), "black"), weights, 64)
    assert drawn.size == (64, 32)
    none, half, most = (
        [0.6 * channel for channel in colour]
        for colour in (evaluate.NO_ATTENTION, evaluate.HALF, evaluate.FULL_ATTENTION)
    )
    for place, colour in {(60, 2): most, (2, 28): half, (40, 28): none}.items():
        assert drawn.getpixel(place) == pytest.approx(colour, abs=2), place
    drawn = evaluate.attention_overlay(Image.new("RGB", (80, 40)), weights, 64, brightest=0.4)
    assert drawn.getpixel((60, 2)) == pytest.approx(half, abs=2)


def test_attention_on_the_command_line(monkeypatch, checkpoint, tmp_path, capsys):
    """--attention draws a row of panels for each text: the box, the region map, four layers of V,
    [REG]."""
    plain_picture(90, 40).save(tmp_path / "photo.png")
    line = [checkpoint, "--image", tmp_path / "photo.png", "--text", "red one", "blue one"]
    out = tmp_path / "maps.png"
    assert command(monkeypatch, evaluate, *line, "--attention", "--output", out) is None
    sheet = Image.open(out)
    assert sheet.size == (7 * 248, 2 * 284)
    for row in range(2):
        for column in range(7):
            panel = sheet.crop((column * 248, row * 284, column * 248 + 248, row * 284 + 248))
            assert len(panel.getcolors(10_000)) > 3, (row, column)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in printed[:2]] == ["red one", "blue one"]
    model = load_checkpoint(checkpoint)
    box = evaluate.ground(model, data.load_image(tmp_path / "photo.png"), "blue one")
    assert list(map(float, printed[1].split(": ")[2].split())) == pytest.approx(box, abs=0.06)


@pytest.mark.parametrize("size", [(1, 1), (3000, 4), (4, 3000)])
def test_attention_of_extreme_shapes(tokenizer, size):
    """A single pixel and very long strips have maps and a picture, too."""
    model, picture = tiny_model(tokenizer), Image.new("RGB", size)
    maps = evaluate.attention_maps(model, picture, "red one")
    panels = [(evaluate.attention_overlay(picture, maps[name], 64), name) for name in maps]
    assert evaluate.image_grid(panels, columns=5).size == (5 * 248, 284)


# ---------------------------------------------------------------------------------------------------- curves


@pytest.fixture
def logs(tmp_path):
    """Two runs' log.jsonl: a warm-up and stage 1; the second begins with a warm-up without bridges."""
    for name, first in (("hilora", 0), ("vanilla", -1)):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "log.jsonl", "w") as file:
            for stage in range(first, 2):
                for epoch in (-1, 0, 1):
                    entry = {"stage": stage, "epoch": epoch, "split": "val"}
                    file.write(json.dumps(entry | {"acc": 30 + 20 * stage + 5 * epoch}) + "\n")
    return [tmp_path / name / "log.jsonl" for name in ("hilora", "vanilla")]


def test_curve(monkeypatch, logs, tmp_path):
    """A line for each run, named by its folder; entries of epoch -1 stand where the stage before ended."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    line = ["--curve", *logs, "--output", tmp_path / "curve.png"]
    assert command(monkeypatch, evaluate, *line) is None
    assert Image.open(tmp_path / "curve.png").size == (960, 540)
    axes = pyplot.gcf().axes[0]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn["hilora"] == [[0, 25], [1, 30], [2, 35], [2, 45], [3, 50], [4, 55]]
    assert len(drawn["vanilla"]) == 9
    marks = {(text.get_position()[0], text.get_text()) for text in axes.texts}
    assert marks == {
        *((0, "warm-up"), (2, "stage 1")),
        *((0, "warm-up without bridges"), (2, "warm-up"), (4, "stage 1")),
    }


def test_curve_without_matplotlib(monkeypatch, logs, tmp_path):
    """It is asked for by name."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = ["--curve", *logs, "--output", tmp_path / "curve.png"]
    code = command(monkeypatch, evaluate, *line)
    assert code.startswith("error: ") and "pip install matplotlib" in code and "\n" not in code
    assert not (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("content", [None, "", "no json", "[1, 2]", '{"stage": 0}'])
def test_curve_of_no_log(monkeypatch, tmp_path, content):
    """A file that is missing, empty or no log is told by name."""
    pytest.importorskip("matplotlib")
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    code = command(monkeypatch, evaluate, "--curve", tmp_path / "log.jsonl")
    assert code.startswith(f"error: {tmp_path / 'log.jsonl'}") and "\n" not in code


# ----------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "line",
    [
        "",
        "best.pt",
        "--benchmark",
        "--dataset refcoco",
        "best.pt --curve log.jsonl",
        "best.pt --benchmark --dataset refcoco",
        "best.pt --image a.jpg",
        "best.pt --image a.jpg --text red --dataset refcoco",
        "best.pt --dataset refcoco --text red",
        "best.pt --image a.jpg --text red --save-boxes boxes.jsonl",
        "best.pt --benchmark --attention",
        "best.pt --image a.jpg --text red --bf16",
        "best.pt --dataset refcoco --batch-size 3",
        "best.pt --benchmark --output a.png",
        "--curve log.jsonl --device cpu",
        "best.pt --benchmark --batch-size 0",
        "best.pt --benchmark --batch-size many",
    ],
)
def test_what_makes_no_sense_is_refused(monkeypatch, line):
    """argparse says so, with its own exit status 2, before anything is read."""
    assert command(monkeypatch, evaluate, *line.split()) == 2


def test_the_checkpoint_may_come_last(monkeypatch, checkpoint, refer_root, tmp_path):
    """Options first, then the checkpoint: the same."""
    line = ["--dataset", "refcoco", "--data-root", refer_root, "--output", tmp_path / "out"]
    assert command(monkeypatch, evaluate, *line, checkpoint) is None
    assert (tmp_path / "out/results_refcoco.json").exists()
