"""evaluate.py: boxes, accuracies, attention maps, drawings, curves, and its command lines."""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import close, make_refer, plain_picture, shake_pairs, tiny_clip, tiny_model
from PIL import Image, ImageColor
from test_train import exit_of, refer_dataset, told

import clip_model
import data
import evaluate
from clip_model import HiVGError, Tokenizer, save_clip
from hivg import box_iou, load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, vocabulary):
    """A checkpoint of an untrained model, in stage 2."""
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    save_checkpoint(path, tiny_model(Tokenizer(vocabulary), 2))
    return path


# ------------------------------------------------------------------------------------------ accuracy


def test_accuracy_by_hand(tmp_path):
    """An IoU of exactly 0.5 counts; each bin of lengths holds both of its ends and counts its own."""
    texts = [" ".join(["red"] * words) for words in (1, 5, 6, 7, 8, 10, 11, 40)]
    make_refer(tmp_path, [{"split": "val", "texts": texts}])
    annotations = {"refcoco": data.read_annotations("refcoco", tmp_path)}
    dataset = data.open_split(annotations, "val")
    true = torch.tensor([[10.0, 10.0, 30.0, 30.0]]).repeat(8, 1)
    found = true.clone()
    found[0, 2] = 20  # IoU 0.5
    found[1, 2] = 19.9  # a little less
    found[3, 2] = 24  # 0.7
    found[[4, 5, 6]] = torch.tensor([30.0, 30.0, 40.0, 40.0])  # elsewhere
    result = evaluate.summary(dataset, found, true)
    right = {"1-5": 50.0, "6-7": 100.0, "8-10": 0.0, "11+": 50.0}
    assert result["lengths"] == {n: {"expressions": 2, "acc": acc} for n, acc in right.items()}
    assert [result[name] for name in ("acc", "acc70", "acc90")] == [50.0, 37.5, 25.0]
    assert result["miou"] == pytest.approx(100 * (0.5 + 0.495 + 1 + 0.7 + 1) / 8, abs=0.01)
    assert result["interval"] == [21.52, 78.48]
    header, row = evaluate.format_table([result]).splitlines()
    assert header.split()[-4:] == list(right) and row.split()[:3] == ["val", "8", "50.00"]
    assert list(map(float, row.split()[-4:])) == list(right.values())


def test_the_interval_by_hand():
    """Wilson's interval as other programs print it; it stays within 0 and 100."""
    assert evaluate.wilson_interval(8, 10) == [49.02, 94.33]
    assert evaluate.wilson_interval(0, 5) == [0, 43.45]
    assert min(evaluate.wilson_interval(0, size)[0] for size in range(1, 300)) == 0


def test_boxes_are_clipped_to_the_image(tokenizer, tmp_path):
    """A box that reaches into the padding counts as its part in the image, in the table, in the file
    and for `ground`; bins without expressions are null and "-"."""
    image = plain_picture(60, 20)
    make_refer(tmp_path, [{"split": "val", "bbox": [0, 0, 60, 20], "image": image}])
    model = tiny_model(tokenizer)
    torch.nn.init.zeros_(model.box_head[-1].weight)
    model.box_head[-1].bias.data = torch.tensor([0.0, 0.0, 30.0, 30.0])  # the whole square
    annotations = data.read_annotations("refcoco", tmp_path)
    evaluate.evaluate_splits(model, "refcoco", annotations, tmp_path / "out")
    (row,) = json.loads((tmp_path / "out/results_refcoco.json").read_text())["results"]
    (line,) = map(json.loads, (tmp_path / "out/boxes_refcoco_val.jsonl").read_text().splitlines())
    assert (row["acc"], row["miou"], line["iou"]) == (100, 100, 1)
    assert line["found"] == pytest.approx([0, 0, 60, 20], abs=1e-3)
    assert evaluate.ground(model, image, "red one") == pytest.approx((0, 0, 60, 20), abs=1e-3)
    assert row["lengths"]["6-7"] == {"expressions": 0, "acc": None}
    assert evaluate.format_table([row]).split()[-3:] == ["-"] * 3


def test_a_split_is_predicted_in_its_order(tokenizer, refer_root):
    """The boxes are the same in batches of any size and from workers, and the true ones are those of
    the annotations, in the image's pixels."""
    model = tiny_model(tokenizer, 1)
    dataset = refer_dataset(model, refer_root, "train")
    found, true, scores = evaluate.predict(model, dataset, batch_size=3)
    close(true, torch.tensor([sample.box for sample in dataset.samples]), 1e-3)
    close(evaluate.predict(model, dataset, workers=1), (found, true, scores), 1e-4)
    for index in (0, 5):
        sample = dataset.samples[index]
        (one,) = evaluate.ground_texts(model, data.load_image(sample.image), sample.text)
        assert one.box == pytest.approx(found[index].tolist(), abs=1e-3)
        assert one.score == pytest.approx(scores[index].item(), abs=1e-4)


# --------------------------------------------------------------------------------- what others import


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype(tokenizer, refer_root, dtype):
    """ground, ground_texts, predict and attention_maps follow it, and give nearly the same."""
    model, image = tiny_model(tokenizer, 1), plain_picture()
    dataset = refer_dataset(model, refer_root, "val")

    def results():
        box = torch.tensor(evaluate.ground(model, image, "red one"))
        maps = evaluate.attention_maps(model, image, "red").values()
        return [box, *evaluate.predict(model, dataset), *(100 * m.float() for m in maps)]

    expected = results()
    model.to(dtype)
    for ours, theirs in zip(results(), expected):
        torch.testing.assert_close(ours, theirs, atol=1.0, rtol=0.05)


def test_a_model_in_training_stays_as_it_was(tokenizer, refer_root):
    """Module by module, whether it ends well or not; the tensors are plain ones, with which one can
    go on to train, and no gradients hang on them."""
    model, image = tiny_model(tokenizer, 1).train(), plain_picture()
    model.clip.eval()  # as many keep what is frozen
    modes = [module.training for module in model.modules()]
    tensors = [
        evaluate.ground_texts(model, image, "red one")[0].region_map,
        *evaluate.predict(model, refer_dataset(model, refer_root, "val")),
        *evaluate.attention_maps(model, image, "a").values(),
    ]
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in tensors)
    sample = data.Sample("absent.jpg", "a", (0, 0, 9, 9))
    with pytest.raises(HiVGError):
        evaluate.predict(model, data.GroundingDataset([sample], "val", 64, tokenizer))
    assert modes == [module.training for module in model.modules()] and torch.is_grad_enabled()


def test_texts_are_one_or_several_or_none(tokenizer):
    """A str is one text, [] is []; a text that says nothing is an error."""
    model, image = tiny_model(tokenizer), plain_picture()
    texts = ["dog", "the red one on the left"]
    (one,), both = (evaluate.ground_texts(model, image, given) for given in ("dog", iter(texts)))
    assert one.box == pytest.approx(both[0].box, abs=1e-3) and len(both) == 2
    assert one.box == evaluate.ground(model, image, "dog") != both[1].box
    assert evaluate.ground_texts(model, image, []) == []
    with pytest.raises(HiVGError, match="empty"):
        evaluate.ground_texts(model, image, ["dog", "&nbsp;"])


def seen_by(model, image, text):
    """(normalised image, tokens, padding) as the model sees them."""
    square, geometry = data.preprocess(image, model.config.image_size)
    batch = {"image": square[None], "inner": torch.tensor([geometry.inner])}
    batch = model.inputs(batch | {"tokens": model.tokenize(text)})
    return batch["image"], batch["tokens"], batch["padding"]


@torch.no_grad()
def test_the_score_is_the_top_of_the_region_map(tokenizer):
    """sigmoid(s_p) by patch, 0 in the padding, and its top."""
    model, picture = tiny_model(tokenizer, 1), plain_picture(60, 20)
    texts = ["red one", "the blue one"]
    for text, found in zip(texts, evaluate.ground_texts(model, picture, texts)):
        expected = model(*seen_by(model, picture, text)).region_logits.sigmoid().view(4, 4)
        expected[[0, 3]] = 0  # 60 x 20: the bars are padding
        close(found.region_map, expected)
        assert found.score == found.region_map.max() and 0 < found.score < 1


def softmax_by_hand(q, k, heads, padding=None):
    """Attention of the first query: q [Nq, d], k [Nk, d], padding [Nk] bool -> [Nk], mean over heads."""
    q, k = (x.unflatten(-1, (heads, -1)) for x in (q, k))  # [N, heads, d / heads]
    logits = torch.einsum("hc,khc->hk", q[0], k) / math.sqrt(k.shape[-1])
    if padding is not None:
        logits[:, padding] = -math.inf
    return logits.softmax(dim=1).mean(dim=0)


@torch.no_grad()
def test_attention_maps_by_hand(tokenizer):
    """[CLS] in the first layer and [REG] in the last, on a picture with bars of padding: as by hand."""
    model, picture, seen = tiny_model(tokenizer, 1), plain_picture(60, 20), []
    shake_pairs(model)
    layer = model.grounding_layers[-1]
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    maps = evaluate.attention_maps(model, picture, "red one")
    hook.remove()
    last = "[REG], grounding layer 2"
    assert list(maps) == [*(f"[CLS], layer {i}" for i in (1, 2, 4, 6)), last]
    assert all(weights.shape == (4, 4) and 0 < weights.sum() <= 1 for weights in maps.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    block = model.visual_blocks[0]
    x = block.ln_1(model.clip.visual.embed(seen_by(model, picture, "red one")[0]))[0]
    q, k, _ = block.attn.in_proj(x).chunk(3, dim=-1)
    close(maps["[CLS], layer 1"], softmax_by_hand(q, k, block.attn.heads)[1:].view(4, 4))
    z, positions, padding = seen[0]
    key = layer.norm_1(z[0]) + positions
    projected = layer.attention.q_proj(key), layer.attention.k_proj(key)
    weights = softmax_by_hand(*projected, layer.attention.heads, padding[0])
    close(maps[last], weights[2:18].view(4, 4))
    assert not maps[last][[0, 3]].any() and maps[last][1:3].all()  # 60 x 20: the bars are padding


# ------------------------------------------------------------------------------------------ drawings


def test_overlay_cuts_the_padding_away():
    """Colours lie where the patches lie in the photograph; what the padding gets colours nothing."""
    weights = torch.zeros(4, 4)
    weights[0], weights[1, 3], weights[2, 0] = 1.0, 0.2, 0.1
    drawn = evaluate.attention_overlay(Image.new("RGB", (80, 40), "black"), weights, 64)
    assert drawn.size == (64, 32)
    none, half, most = (
        [0.6 * channel for channel in ImageColor.getrgb(name)]
        for name in ("navy", "crimson", "gold")
    )
    for place, colour in {(60, 2): most, (2, 28): half, (40, 28): none}.items():
        assert drawn.getpixel(place) == pytest.approx(colour, abs=2), place
    drawn = evaluate.attention_overlay(Image.new("RGB", (80, 40)), weights, 64, brightest=0.4)
    assert drawn.getpixel((60, 2)) == pytest.approx(half, abs=2)


@pytest.mark.parametrize("size", [(1, 1), (3000, 4), (4, 3000)])
def test_extreme_shapes(tokenizer, tmp_path, size):
    """A single pixel and very long strips are evaluated and drawn like any other picture."""
    model, image = tiny_model(tokenizer), Image.new("RGB", size)
    make_refer(tmp_path, [{"image": image, "bbox": [0, 0, *size], "split": "val"}])
    annotations = data.read_annotations("refcoco", tmp_path)
    evaluate.evaluate_splits(model, "refcoco", annotations, tmp_path, ["val"])
    assert (tmp_path / "results_refcoco_val.json").exists()
    groundings = evaluate.ground_texts(model, image, "red one")
    sheet = evaluate.attention_sheet(model, image, ["red one"], groundings)
    assert sheet.size == (7 * 248, 284)


def test_one_picture_on_the_command_line(checkpoint, tmp_path, capsys):
    """A box inside the picture, in its upright pixels, is printed and drawn; with --attention a row
    of panels for each text: the box, the region map, four layers of V, [REG]."""
    exif = Image.Exif()
    exif[0x0112] = 6
    plain_picture(60, 100).save(tmp_path / "photo.jpg", exif=exif)
    line = ["image", checkpoint, tmp_path / "photo.jpg", "Red ONE"]
    assert exit_of(evaluate, *line, "--output", tmp_path / "found.png") is None
    printed = capsys.readouterr().out.splitlines()[0].rsplit(": ", 1)[1]
    x1, y1, x2, y2 = box = [*map(float, printed.split())]
    assert 0 <= x1 < x2 <= 100 and 0 <= y1 < y2 <= 60
    image = data.load_image(tmp_path / "photo.jpg")
    expected = evaluate.ground(load_checkpoint(checkpoint), image, "red one")
    assert box == pytest.approx(expected, abs=0.06)
    drawn = np.asarray(Image.open(tmp_path / "found.png"))
    assert drawn.shape == (300, 500, 3)  # small images are enlarged
    assert (drawn == ImageColor.getrgb(evaluate.BOX_COLOURS[0])).all(axis=2).sum() > 200
    line += ["blue one", "--attention", "--output", tmp_path / "maps.png"]
    assert exit_of(evaluate, *line) is None
    sheet = Image.open(tmp_path / "maps.png")
    assert sheet.size == (7 * 248, 2 * 284)
    for x in range(0, 7 * 248, 248):
        for y in (0, 284):
            assert len(sheet.crop((x, y, x + 248, y + 248)).getcolors(10_000)) > 3, (x, y)


# ------------------------------------------------------------------------------------------- curves


def test_curve(monkeypatch, tmp_path):
    """A line for each run, named by its folder; epoch -1 stands where the stage before ended."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn, real = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *a: drawn.append(self) or real(self, *a))
    lines = [
        {"stage": stage, "epoch": epoch, "split": "val", "acc": 30 + 20 * stage + 5 * epoch}
        for stage in (0, 1)
        for epoch in (-1, 0, 1)
    ]
    for name in ("hilora", "vanilla"):
        clip_model.write_text(tmp_path / name / "log.jsonl", "\n".join(map(json.dumps, lines)))
    line = ["curve", *sorted(tmp_path.glob("*/log.jsonl")), "--output", tmp_path / "curve.png"]
    assert exit_of(evaluate, *line) is None and Image.open(tmp_path / "curve.png")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    points = [[0, 25], [1, 30], [2, 35], [2, 45], [3, 50], [4, 55]]
    assert lines == {"hilora": points, "vanilla": points} and "val" in axes.get_ylabel()


@pytest.mark.parametrize(
    "content", [None, "", "no json", "[1, 2]", '{"stage": 0}', "no matplotlib"]
)
def test_curve_of_no_log(monkeypatch, tmp_path, content):
    """A file that is missing, empty or no log is told by name; so is matplotlib if it is missing."""
    pytest.importorskip("matplotlib")
    log, says = tmp_path / "log.jsonl", tmp_path / "log.jsonl"
    if content == "no matplotlib":
        says = "pip install matplotlib"
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    elif content is not None:
        log.write_text(content)
    told(exit_of(evaluate, "curve", log, "--output", tmp_path / "curve.png"), says)
    assert not (tmp_path / "curve.png").exists()


# ------------------------------------------------------------------------------------ the command line


def test_data_sets_on_the_command_line(checkpoint, refer_root, tmp_path, capsys):
    """Two data sets: for each a table, results, and a JSON line for each expression, from whose boxes
    the accuracies follow."""
    names = "refcoco", "refcoco+"
    for name in names:
        (tmp_path / name).symlink_to(refer_root / "refcoco")
    (tmp_path / "images").symlink_to(refer_root / "images")
    line = ["dataset", checkpoint, *names, "--data-root", tmp_path, "--workers", 0, "--output"]
    assert exit_of(evaluate, *line, tmp_path / "out") is None
    assert capsys.readouterr().out.count("95 % interval") == 2
    for name in names:
        for row in json.loads((tmp_path / f"out/results_{name}.json").read_text())["results"]:
            text = (tmp_path / f"out/boxes_{name}_{row['split']}.jsonl").read_text()
            lines = [json.loads(line) for line in text.splitlines()]
            assert len(lines) == row["expressions"] == {"val": 4, "testA": 2}[row["split"]]
            assert all(Path(r["image"]).is_file() and r["text"].endswith(" one") for r in lines)
            assert all(0 < r["score"] < 1 and r["split"] == row["split"] for r in lines)
            true, found = (torch.tensor([r[key] for r in lines]) for key in ("true", "found"))
            iou = box_iou(found, true)
            assert iou.tolist() == pytest.approx([r["iou"] for r in lines], abs=1e-3)
            for key, threshold in (("acc", 0.5), ("acc70", 0.7), ("acc90", 0.9)):
                share = (iou >= threshold).float().mean().item()
                assert row[key] == pytest.approx(100 * share, abs=0.01)
    more = "--split", "testA", "--batch-size", 1
    assert exit_of(evaluate, *line, tmp_path / "one", *more) is None
    files = "results_{}_testA.json", "boxes_{}_testA.jsonl", "{}_testA.png"
    assert set(os.listdir(tmp_path / "one")) == {f.format(name) for f in files for name in names}


@pytest.mark.parametrize("more", [("--split", "val", "testX"), ()])
def test_what_is_missing_is_told_before_the_first_split(checkpoint, tmp_path, more):
    """A split that is not there, or an image of the last one: nothing has been evaluated yet."""
    make_refer(tmp_path, [{"split": "val"}, {"split": "testB", "image": None}])
    line = ["dataset", checkpoint, "refcoco", "--data-root", tmp_path, "--output", tmp_path / "out"]
    told(exit_of(evaluate, *line, "--workers", 0, *more), "testX" if more else "000002.jpg")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, says",
    [
        ({1: "absent.pt"}, "absent.pt"),
        ({1: "text.jpg"}, "text.jpg"),
        ({1: "clip.pt"}, "clip.pt"),
        ({2: "absent.jpg"}, "absent.jpg"),
        ({2: "half.jpg"}, "half.jpg"),
        ({3: "  \t"}, "empty"),
        ({5: "found.txt"}, "found.txt"),
        ({5: "photo.jpg/found.png"}, "found.png"),
        ({5: "link.jpg"}, "would overwrite"),
    ],
)
def test_bad_input_of_evaluate_is_one_sentence(monkeypatch, tmp_path, checkpoint, change, says):
    """Whatever is wrong is said in one sentence that names it; the user's photograph stays."""
    monkeypatch.chdir(tmp_path)
    plain_picture(100, 100).save("photo.jpg")
    Path("link.jpg").symlink_to("photo.jpg")
    content = Path("photo.jpg").read_bytes()
    Path("half.jpg").write_bytes(content[:900])
    Path("text.jpg").write_text("no picture and no checkpoint")
    save_clip(tiny_clip(), "clip.pt")
    line = ["image", checkpoint, "photo.jpg", "red one", "--output", "found.png"]
    for place, word in change.items():
        line[place] = word
    told(exit_of(evaluate, *line), says)
    assert not Path("found.png").exists() and Path("photo.jpg").read_bytes() == content


@pytest.mark.parametrize(
    "line",
    ["", "best.pt", "image best.pt a.jpg", "image best.pt a.jpg x --split val", "dataset best.pt"]
    + ["dataset best.pt cocoa", "dataset best.pt refcoco --batch-size 0", "curve"],
)
def test_what_makes_no_sense_is_refused(line):
    """argparse says so, with its own exit status 2, before anything is read."""
    assert exit_of(evaluate, *line.split()) == 2
