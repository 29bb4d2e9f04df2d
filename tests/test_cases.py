"""What users bring: odd images, texts, data, terminals and machines. A test for each kind.

Kinds that concern CLIP's files are tested in test_clip_model.py, runs that are resumed or diverge in
test_nothing_lost.py, typing errors in the program in test_data.py and test_clip_model.py.
"""

import io
import json
import os
import random
import struct
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_refer, plain_picture, tiny_model
from PIL import Image, ImageColor, PngImagePlugin
from test_data import command, error_of, open_split

import clip_model
import data
import evaluate
from clip_model import HiVGError
from data import load_image
from hivg import save_checkpoint


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    save_checkpoint(tmp_path / "best.pt", tiny_model(tokenizer))
    return tmp_path / "best.pt"


# ------------------------------------------------------------------------------------------- images


def exif_of(orientation, *more):
    """EXIF bytes with an orientation and (tag, type, count, bytes of the value) beside it."""
    entries = [(0x0112, 3, 1, orientation.to_bytes(4, "little")), *more]
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4)


ODD_TAGS = (
    (0x011A, 5, 1, b"\xf0\xff\0\0"),  # a fraction that is not there
    (0x8825, 4, 1, b"\xff\xff\0\0"),  # neither is the GPS
    (0x0110, 99, 1, b"abcd"),  # an unknown type
)


def test_the_orientation_counts_whatever_else_the_exif_says(tmp_path):
    """Orientation 6 beside a malformed tag: upright, in the eyes of every viewer, and quietly. EXIF
    that is garbage turns nothing."""
    picture, paths = plain_picture(60, 40, (0, 0, 20, 20)), []
    for number, odd in enumerate(ODD_TAGS):
        paths.append(str(tmp_path / f"{number}.jpg"))
        picture.save(paths[-1], exif=exif_of(6, odd), quality=95)
        image = load_image(paths[-1])
        assert image.size == (40, 60) and image.getpixel((35, 5))[1] < 60, odd  # red, at the right
    line = [sys.executable, "-c", f"import data; list(map(data.load_image, {paths}))"]
    done = subprocess.run(line, capture_output=True, cwd=Path(data.__file__).parent)
    assert (done.returncode, done.stderr) == (0, b"")
    picture.save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage")
    assert load_image(tmp_path / "a.jpg").size == (60, 40)


def test_shared_images_with_odd_exif(shared):
    for path in sorted((shared / "cases").glob("*.jpg")):
        assert load_image(path).size == Image.open(path).size[::-1], path


def test_formats_that_viewers_show(tmp_path):
    """AVIF, and a PNG with a long compressed text."""
    text = PngImagePlugin.PngInfo()
    text.add_text("description", "red " * 500_000, zip=True)
    for name, more in (("a.avif", {}), ("a.png", {"pnginfo": text})):
        plain_picture().save(tmp_path / name, **more)
        assert load_image(tmp_path / name).getpixel((20, 20))[0] > 220


RAMP = np.linspace(0, 1, 64).repeat(64).reshape(64, 64)  # dark at the top


def is_a_ramp(path):
    grey = np.asarray(load_image(path)).astype(int)[:, 5:]
    assert grey[0].max() < 8 and grey[-1].min() > 247 and abs(grey.mean() - 127.5) < 2
    assert (np.diff(grey[..., 0], axis=0) >= 0).all() and (grey[..., 0] == grey[..., 2]).all()
    return True


DEEP = [("u2", 65535), ("u2", 4095), ("u2", 300), ("i4", 255), ("i4", 10**9)]
DEEP += [("f4", 1), ("f4", 0.01)]


@pytest.mark.parametrize("dtype, top", DEEP)
def test_no_deep_image_comes_out_black(tmp_path, dtype, top):
    """12 bits in 16, small numbers in 32 bits, floats: a grey ramp is seen as one, also beside a
    single hot pixel or "no data" far below."""
    path = tmp_path / ("a.png" if dtype == "u2" else "a.tiff")
    odd = {"u2": 65535, "i4": -(2**31), "f4": -3.4e38}[dtype]
    for with_odd in (False, True):
        picture = (RAMP * top).astype(dtype)
        if with_odd:
            picture[0, 0] = odd
        Image.fromarray(picture).save(path)
        assert is_a_ramp(path)


@pytest.mark.parametrize("channels, kind", [(1, 0), (3, 2), (2, 4), (4, 6)])
def test_no_deep_png_comes_out_black(tmp_path, channels, kind):
    """12 bits in 16-bit PNGs: grey, RGB, and both with alpha."""
    values = (4095 * RAMP)[..., None].repeat(channels, axis=2).astype(">u2")
    if kind >= 4:
        values[..., -1] = 65535
    raw = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(kind, content):
        crc = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + crc

    header = (64).to_bytes(4, "big") * 2 + bytes([16, kind, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw))
    (tmp_path / "a.png").write_bytes(png + chunk(b"IEND", b""))
    assert is_a_ramp(tmp_path / "a.png")


# -------------------------------------------------------------------------------- programs and texts


def test_two_programs_make_the_shapes_at_once(tmp_path, monkeypatch):
    """Who comes second uses what is there; nothing else is left."""

    def generate(folder, scenes):
        for place, name in ((folder, "mine"), (tmp_path / "shapes", "theirs")):
            place.mkdir()
            (place / name).touch()

    monkeypatch.setattr(data, "generate_shapes", generate)
    data.make_shapes(tmp_path)
    assert os.listdir(tmp_path) == ["shapes"] and os.listdir(tmp_path / "shapes") == ["theirs"]


def test_a_terminal_without_the_characters(monkeypatch, checkpoint, tmp_path):
    """The box is printed and drawn; what cannot be printed is a question mark."""
    name = tmp_path / "a.jpg"
    if sys.platform == "linux":  # a lone byte of latin-1
        name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    plain_picture().save(name)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed := io.BytesIO(), "cp1252"))
    line = ["image", checkpoint, name, "红色的杯子", "--output", tmp_path / "o.png"]
    assert command(monkeypatch, *line, program=evaluate) is None
    sys.stdout.flush()
    assert b"?????: " in printed.getvalue() and Image.open(tmp_path / "o.png").size[0] >= 60


TEXTS = {"The RED caf\u00c3\u0089": "the red café"}  # UTF-8 that was read as latin-1
TEXTS |= {word.encode().decode("latin-1"): word.lower() for word in ("déjà", "voilà", "Å")}


@pytest.mark.parametrize("text", TEXTS)
def test_texts_reach_the_tokenizer_as_they_are_written(tmp_path, tokenizer, text):
    """Its ftfy mends them, unless somebody lowered them before, or stripped a blank that is the
    second byte of à."""
    make_refer(tmp_path, [{"texts": [f" {text}\n"]}])
    dataset = open_split(tmp_path, tokenizer=tokenizer)
    assert dataset.samples[0].text == text
    assert torch.equal(dataset[0]["tokens"], tokenizer(TEXTS[text])[0])


NOTHING = ("", " \t\n", "&nbsp;", "\ufeff", "&amp;nbsp; ")


def test_texts_that_say_nothing(tokenizer, tmp_path):
    """They have no box, and a data set leaves them out; "..." is something."""
    model, picture = tiny_model(tokenizer), plain_picture()
    assert len(evaluate.ground(model, picture, "...")) == 4
    for text in NOTHING:
        assert "is empty" in error_of(evaluate.ground, model, picture, text)
    texts = ["a", *NOTHING, "..."]
    write_own(tmp_path, [(1, 2, 3, 4)] * len(texts), texts=texts)
    dataset = open_split(tmp_path, "train", "own")
    assert [sample.text for sample in dataset.samples] == ["a", "..."]
    assert f"own, train: {len(NOTHING)} empty expressions left out" in dataset.report


def test_what_a_long_text_loses_is_told(monkeypatch, checkpoint, tmp_path, capsys):
    """77 tokens are read; the words behind them are printed."""
    plain_picture().save(tmp_path / "a.png")
    words, cut = "red " * 90 + "blue one", f"were cut: {'red ' * 15}blue one)"
    for text, notes in ((words, 1), (words[:300], 0)):
        line = ["image", checkpoint, tmp_path / "a.png", text, "--output", tmp_path / "o.png"]
        assert command(monkeypatch, *line, program=evaluate) is None
        printed = capsys.readouterr().out
        assert printed.count("77 tokens") == printed.count(cut) == notes


# ----------------------------------------------------------------------------------------- own data


def write_own(root, boxes, split="train", texts=None, size=(640, 480)):
    """One's own split, of expressions of one image of this size. Returns its lines."""
    Image.new("RGB", size, "grey").save(root / "0.jpg")
    entries = zip(boxes, texts or ["it"] * len(boxes))
    entries = [{"image": "0.jpg", "text": text, "box": list(box)} for box, text in entries]
    lines = list(map(json.dumps, entries))
    (root / f"{split}.jsonl").write_text("\n".join(lines))
    return lines


def check(monkeypatch, root):
    return command(monkeypatch, "check", "--dataset", "own", "--data-root", root)


UNITS = {"percent": 100, "thousandths": 1000, "x, y, width, height": None, "pixels": 1}
SIZES = [(640, 480), (1952, 1232), (1400, 1050), (240, 320)]


def boxes_in(unit, size):
    """40 boxes in a unit."""
    rng = np.random.default_rng(0)
    low, extent = rng.uniform(0.02, 0.75, (40, 2)), rng.uniform(0.1, 0.24, (40, 2))
    if unit == "x, y, width, height":
        return np.concatenate([low, extent], axis=1) * (size * 2)
    return np.concatenate([low, low + extent], axis=1) * (
        size * 2 if unit == "pixels" else UNITS[unit]
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("unit", UNITS)
def test_boxes_in_another_unit_are_told(tmp_path, monkeypatch, unit, size):
    """By `check`, whatever the size of the images. Of boxes in pixels a few may be odd."""
    boxes = boxes_in(unit, size)
    if unit == "pixels":
        boxes[:2] += 10_000
    write_own(tmp_path, boxes.tolist(), size=size)
    error = check(monkeypatch, tmp_path)
    assert error is None if unit == "pixels" else unit in error


def test_a_box_within_a_pixel_is_told_at_once(tmp_path):
    write_own(tmp_path, [[10, 20, 90, 100], [0.1, 0.2, 0.9, 0.95]])
    text = error_of(data.read_annotations, "own", tmp_path)
    assert "train.jsonl, entry 2" in text and "shares" in text


def test_corners_in_any_order(tmp_path):
    """As labelme writes them: sorted when read, and counted."""
    boxes = [(10, 20, 90, 100), (90, 100, 10, 20), (10, 100, 90, 20), (90, 20, 10, 100)]
    write_own(tmp_path, boxes)
    dataset = open_split(tmp_path, "train", "own")
    assert {sample.box for sample in dataset.samples} == {boxes[0]}
    assert "3 boxes with corners in another order" in dataset.report[1]


def test_data_that_contradict_themselves(tmp_path, monkeypatch, capsys):
    """Three boxes for one expression of one image, and lines of val that are train's: `check` counts
    both."""
    one, other, third = [10, 20, 90, 400], [30, 20, 400, 300], [40, 20, 400, 300]
    write_own(tmp_path, [one, one, one, other, third, one], texts="aabccc")
    write_own(tmp_path, [one, one], "val", texts="bd")
    check(monkeypatch, tmp_path)
    train_line, val_line = capsys.readouterr().out.splitlines()[:2]
    assert "; 2 expressions with another box" in train_line and "another split" not in train_line
    assert "; 1 expressions of another split" in val_line and "another box" not in val_line


CAFE = unicodedata.normalize("NFC", "café.jpg"), unicodedata.normalize("NFD", "café.jpg")
NAMES = [  # a file below the data root, and how annotations name it
    ("photos/a.jpg", "photos\\a.jpg"),
    ("photos/a.jpg", "Photos/a.JPG"),
    ("photos/a.jpg", "a.jpg"),
    ("../outside.jpg", "{root}/../outside.jpg"),
    (CAFE[0], CAFE[1]),
    (CAFE[1], CAFE[0]),
    ("photos/000000000007.jpg", "COCO_train2014_000000000007.jpg"),
    ("photos/a.jpg", "1a2b3c4d-a.jpg"),
]


@pytest.mark.parametrize("file, name", NAMES)
def test_names_of_images(tmp_path, file, name):
    """Windows' separators, other case, a name alone, absolute paths, either Unicode form, the names
    of COCO 2017, and of files that Label Studio keeps."""
    root = tmp_path / "root"
    (root / "photos").mkdir(parents=True)
    plain_picture().save(root / file)
    line = {"image": name.format(root=root), "text": "it", "box": [1, 2, 9, 9]}
    (root / "train.jsonl").write_text(json.dumps(line))
    dataset = open_split(root, "train", "own")
    assert os.path.samefile(dataset.samples[0].image, root / file) and dataset[0]["image"].any()


def test_a_name_that_two_files_have_is_not_guessed(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        plain_picture().save(tmp_path / folder / "cup.jpg")
    (tmp_path / "train.jsonl").write_text('{"image": "cup.jpg", "text": "it", "box": [1, 2, 9, 9]}')
    assert "cup.jpg" in error_of(open_split, tmp_path, "train", "own")


def test_own_files_as_people_write_them(tmp_path):
    """Blank lines between the lines, Windows line ends, a byte order mark, one JSON array."""
    lines = write_own(tmp_path, [[10, 20, 90, 100]] * 3)
    expected = list(open_split(tmp_path, "train", "own").samples)
    contents = ["\n\n".join(lines) + "\n\n", "\r\n".join(lines), "\ufeff" + "\n".join(lines)]
    for content in (*contents, "[\n" + ",\n".join(lines) + "\n]"):
        (tmp_path / "train.jsonl").write_bytes(content.encode())
        assert list(open_split(tmp_path, "train", "own").samples) == expected
    assert len(expected) == 3 and expected[0].upright


# Written by label-studio 1.23.2 (its server's export JSON; here without keys that nobody reads)
LABEL_STUDIO = r"""[{"id":1,"annotations":[{"id":1,"completed_by":1,"result":[
{"original_width":640,"original_height":480,"image_rotation":0,"id":"cupRed0001","to_name":"image",
"origin":"manual","from_name":"label","type":"rectanglelabels",
"value":{"x":10,"y":10,"width":20,"height":40,"rotation":0,"rectanglelabels":["cup","fragile"]}},
{"original_width":640,"original_height":480,"image_rotation":0,"id":"cupRed0001","to_name":"image",
"origin":"manual","from_name":"text","type":"textarea",
"value":{"x":10,"y":10,"width":20,"height":40,"rotation":0,"text":["the red cup","cup on the left"]}},
{"original_width":640,"original_height":480,"image_rotation":0,"id":"knife00003","to_name":"image",
"origin":"manual","from_name":"text","type":"textarea","value":{"x":62.5,"y":70.833333,"width":25,
"height":8.333333,"rotation":30,"text":["the knife lying askew"]}}],
"was_cancelled":false,"ground_truth":false}],"file_upload":"d05d982b-kitchen.jpg","drafts":[],
"predictions":[],"data":{"image":"\/data\/upload\/3\/d05d982b-kitchen.jpg"}},
{"id":6,"annotations":[{"id":7,"completed_by":1,"result":[
{"original_width":120,"original_height":90,"image_rotation":0,"id":"skip01","to_name":"image",
"origin":"manual","from_name":"text","type":"textarea",
"value":{"x":10,"y":10,"width":50,"height":80,"rotation":0,"text":["skipped"]}}],
"was_cancelled":true,"ground_truth":false}],"file_upload":"293614a0-skipped.png","drafts":[],
"predictions":[],"data":{"image":"\/data\/upload\/4\/293614a0-skipped.png"}}]"""
# Written by datumaro 1.13.12 (format "coco")
DATUMARO = """{"licenses":[{"name":"","id":0,"url":""}],"info":{"contributor":"","date_created":"",
"description":"","url":"","version":"","year":""},"categories":[
{"id":1,"name":"knife","supercategory":""},{"id":2,"name":"cup","supercategory":""}],"images":[
{"id":1,"width":640,"height":480,"file_name":"kitchen.jpg","license":0,"flickr_url":"",
"coco_url":"","date_captured":0}],"annotations":[
{"id":1,"image_id":1,"category_id":2,"segmentation":[],"area":24576.0,
"bbox":[64.0,48.0,128.0,192.0],"iscrowd":0,"attributes":{"text":"the red cup"}},
{"id":2,"image_id":1,"category_id":2,"segmentation":[],"area":24576.0,
"bbox":[320.0,120.0,128.0,192.0],"iscrowd":0,"attributes":{"text":"the blue cup","occluded":true}},
{"id":3,"image_id":1,"category_id":1,"segmentation":[],"area":18177.3204427734,
"bbox":[380.0,340.0,158.56,114.64],"iscrowd":0}]}"""
RED, BLUE, KNIFE = (64, 48, 192, 240), (320, 120, 448, 312), (380, 340, 538.56, 454.64)
OF_LABEL_STUDIO = [("the red cup", RED), ("cup on the left", RED), ("the knife lying askew", KNIFE)]
OF_DATUMARO = [("the red cup", RED), ("the blue cup", BLUE)]
WHOLE = '"result":[{"type":"textarea","value":{"text":["of the whole image"]}},'
EXPORTED = [  # a file, what may stand in it instead, and what is in it
    (LABEL_STUDIO, "", "", OF_LABEL_STUDIO),
    (LABEL_STUDIO, r"\/upload\/3\/d05d982b-", r"\/local-files\/?d=my%20own\/", OF_LABEL_STUDIO),
    (LABEL_STUDIO, '"result":[', WHOLE, OF_LABEL_STUDIO),
    (LABEL_STUDIO, '["the knife lying askew"]', '"the knife lying askew"', OF_LABEL_STUDIO),
    (DATUMARO, "", "", OF_DATUMARO),
    (DATUMARO, '"the blue cup"', '["it", "blue"]', [OF_DATUMARO[0], ("it", BLUE), ("blue", BLUE)]),
    (DATUMARO, '"the red cup"', "[]", OF_DATUMARO[1:]),
]


@pytest.mark.parametrize("content, old, new, expected", EXPORTED)
def test_exports_of_labelling_tools(tmp_path, content, old, new, expected):
    """Each text of a rectangle, in pixels, turned as it is drawn; nothing of what was cancelled or
    has no text."""
    plain_picture().save(tmp_path / "kitchen.jpg")
    (tmp_path / "train.json").write_text(content.replace(old, new))
    samples = open_split(tmp_path, "train", "own").samples
    assert [sample.text for sample in samples] == [text for text, _ in expected]
    for sample, (_, box) in zip(samples, expected):
        assert sample == (str(tmp_path / "kitchen.jpg"), sample.text, sample.box, None, True)
        assert sample.box == pytest.approx(box, abs=0.01)


WRONG = ("5", "[1]", '[{"data": [1]}]', '{"images": [], "annotations": [[1]]}', '{"images": 1}')
WRONG += ('[{"data": {"a": "b"}, "annotations": [{"result": [{"type": "textarea"}]}]}]',)
WRONG += ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"attributes": []}]}',)


@pytest.mark.parametrize("content", WRONG)
def test_exports_of_something_else(tmp_path, content):
    """One sentence that names the file, whatever JSON it is."""
    (tmp_path / "train.json").write_text(content)
    assert "train.json" in error_of(open_split, tmp_path, "train", "own")


@pytest.mark.parametrize("augment", [False, True])
def test_own_boxes_count_in_the_upright_image(tmp_path, augment):
    """The box lies on the same pixels as in a copy of the image that is stored upright."""
    upright, exif = plain_picture(400, 600, (40, 60, 160, 330)), Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    line = '{"image": "%s.png", "text": "red one", "box": [40, 60, 160, 330]}'
    (tmp_path / "train.jsonl").write_text("\n".join([line % "lying", line % "upright"]))
    samples = open_split(tmp_path, "train", "own", augment=augment)
    lying, stored_upright = (
        data.read_image(s, 64, random.Random(3) if augment else None) for s in samples.samples
    )
    assert torch.equal(lying[0], stored_upright[0]) and lying[1] == stored_upright[1]
    assert lying[0].any()


# --------------------------------------------------------------------------------- memory, processes

MEMORY = {
    "unable to allocate shared memory(shm) for file </torch_1>: No space left (28)": "--shm-size",
    "DataLoader worker (pid 9) is killed by signal: Bus error. It is possible that dataloader's "
    "workers are out of shared memory.": "--workers 0",
    "DataLoader worker (pid(s) 9) exited unexpectedly": "--workers",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes": "--batch-size",
    "CUDA out of memory. Tried to allocate 2.00 GiB.": "--batch-size",
}


@pytest.mark.parametrize("message, advice", MEMORY.items())
def test_too_little_memory_is_one_sentence(message, advice):
    def job():
        raise (torch.OutOfMemoryError if "CUDA" in message else RuntimeError)(message)

    with pytest.raises(SystemExit) as stop:
        clip_model.run_main(job)
    assert stop.value.code.startswith("error: ") and advice in stop.value.code


def test_advice_on_memory_fits_the_program(monkeypatch, checkpoint, tmp_path):
    """Evaluation too has a batch size of its own, and its processes."""
    write_own(tmp_path, [[10, 20, 90, 100]] * 5, split="val")
    sizes, forward = [], evaluate.data.trim_to_longest
    monkeypatch.setattr(
        data, "trim_to_longest", lambda tokens: sizes.append(len(tokens)) or forward(tokens)
    )
    line = ["dataset", checkpoint, "own", "--data-root", tmp_path, "--batch-size", 2]
    line += ["--workers", 0]
    assert command(monkeypatch, *line, program=evaluate) is None and sizes == [2, 2, 1]


def test_a_fault_of_the_program_keeps_its_traceback():
    def job():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0: shapes do not fit")

    with pytest.raises(RuntimeError):
        clip_model.run_main(job)


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29411"}
ALONE = TORCHRUN | {"WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
STARTS = {
    "srun": ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, "cpu", "4 processes"),
    "a job of srun": ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_NAME": "run"}, "cpu", "4 processes"),
    "a cluster's pods": ({"WORLD_SIZE": "4", "RANK": "1"}, "cpu", "4 processes"),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "2"}, "cpu", "start one torchrun"),
    "no such host": (TORCHRUN | {"MASTER_ADDR": "no.such.host.invalid"}, "cpu", "MASTER_ADDR"),
    "no such interface": (ALONE | {"GLOO_SOCKET_IFNAME": "nosuch0"}, "cpu", "GLOO_SOCKET_IFNAME"),
    "a GPU by number": (TORCHRUN, "cuda:0", "no --device cuda:0"),
    "no such device": ({}, "tpu9", "tpu9"),
}
INTERACTIVE = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_NAME": "bash"}


@pytest.mark.parametrize("start", STARTS)
def test_processes_that_do_not_find_one_another(monkeypatch, start):
    variables, device, says = STARTS[start]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert says in error_of(data.setup_device, device) and data.world_size() == 1


@pytest.mark.parametrize("variables", [{}, INTERACTIVE, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_one_process_runs(monkeypatch, variables):
    """Also in an interactive shell of SLURM."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert data.setup_device("cpu") == torch.device("cpu") and data.setup_device().type == "cpu"


# ------------------------------------------------------------------------------------ files and flags


def test_a_users_own_files_are_not_overwritten(monkeypatch, checkpoint, tmp_path):
    """--output with a name that is no image's, or a folder, or a file where a folder should be."""
    monkeypatch.chdir(tmp_path)
    write_own(tmp_path, [[10, 20, 90, 100]])
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    for output in ("train.jsonl", "best.pt", "."):
        line = ["image", checkpoint, "0.jpg", "red", "--output", output]
        assert "error: " in command(monkeypatch, *line, program=evaluate)
    line = ["dataset", checkpoint, "own", "--data-root", ".", "--split", "train", "--workers", 0]
    assert "0.jpg" in command(monkeypatch, *line, "--output", "0.jpg", program=evaluate)
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*.*")}


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path, capsys):
    """In --data-root=~/data, where the shell does not expand it, in a file's name and CLIP_CACHE."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "data").mkdir()
    write_own(tmp_path / "data", [[10, 20, 590, 400]])
    assert command(monkeypatch, "check", "--dataset", "own", "--data-root=~/data") is None
    assert "train; 1 expressions" in capsys.readouterr().out
    text = command(monkeypatch, "image", "~/best.pt", "~/data/0.jpg", "red", program=evaluate)
    assert f"{tmp_path}/best.pt" in text
    monkeypatch.setenv("CLIP_CACHE", "~/cache")
    with pytest.raises(HiVGError, match=str(tmp_path / "cache")):
        clip_model.load_clip("ViT-B/16")


def test_every_text_has_its_box(monkeypatch, checkpoint, tmp_path, capsys):
    """Several texts: a line for each, and all boxes in one image, each in its own colour. Words that
    the model never saw are named, and words that the shell has split are worth a hint."""
    plain_picture(500, 400).save(tmp_path / "a.png")
    texts = ["red one", "the blue one", "one"]
    line = ["image", checkpoint, tmp_path / "a.png", *texts, "--output", tmp_path / "o.png"]
    assert command(monkeypatch, *line, program=evaluate) is None
    printed = capsys.readouterr().out.splitlines()
    assert printed.pop(2) == "(this model was trained without the words: the)"
    assert [row.split(": ")[1] for row in printed[:3]] == texts and len(printed) == 4
    drawn = np.asarray(Image.open(tmp_path / "o.png"))
    for colour in evaluate.BOX_COLOURS[:3]:
        assert (drawn == ImageColor.getrgb(colour)).all(axis=2).sum() > 100
    line[3:6] = "man", "in", "red"
    assert command(monkeypatch, *line, program=evaluate) is None
    assert "these are 3 expressions; quotes" in capsys.readouterr().out


@pytest.mark.parametrize("has_font", [False, True])
def test_words_that_the_font_lacks(monkeypatch, capsys, has_font):
    """A font that has them, or the text's number, with a line that tells it; never empty boxes."""
    if not has_font:
        monkeypatch.setattr(evaluate, "FONTS", ("no such font.ttf",))
    texts, drawn = ["a cup", "чашка"], []
    monkeypatch.setattr(evaluate, "draw_box", lambda image, box, colour, label: drawn.append(label))
    grounding = evaluate.Grounding((1, 2, 30, 30), 0.5, None)
    evaluate.draw_groundings(plain_picture(), [grounding] * 2, texts)
    if not has_font or evaluate.font_for(texts[1], 14) is None:
        assert drawn == ["a cup  0.50", "2  0.50"] and texts[1] in capsys.readouterr().out
    else:
        assert drawn == [f"{text}  0.50" for text in texts] and not capsys.readouterr().out
