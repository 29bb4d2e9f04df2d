"""What users bring: odd images, texts, data, terminals and machines. A test for each kind.

Flags of a resumed run are tested in test_nothing_lost.py, parallel downloads in test_data.py.
"""

import json
import os
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import hugging_face_state, make_refer, plain_picture, tiny_clip, tiny_model
from PIL import Image, PngImagePlugin
from test_data import error_of, open_split
from test_train import command

import clip_model
import data
import evaluate
import train
from clip_model import HiVGError, load_clip
from data import load_image
from hivg import save_checkpoint

ROOT = Path(data.__file__).parent


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    save_checkpoint(tmp_path / "best.pt", tiny_model(tokenizer))
    return tmp_path / "best.pt"


def run(*words, **environment):
    """A program in a process of its own, with these variables."""
    line = [sys.executable, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(line, capture_output=True, env=environment, timeout=120)


# ------------------------------------------------------------------------------------------- images


def exif_of(orientation, *more):
    """EXIF bytes with an orientation and (tag, type, count, bytes of the value) beside it."""
    entries = [(0x0112, 3, 1, orientation.to_bytes(2, "little") + b"\0\0"), *more]
    body = b"".join(
        tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + count.to_bytes(4, "little") + value
        for tag, kind, count, value in sorted(entries)
    )
    header = b"II*\0\x08\0\0\0" + len(entries).to_bytes(2, "little")
    return b"Exif\0\0" + header + body + b"\0\0\0\0"


ODD_TAGS = {
    "a fraction over zero": (0x011A, 5, 1, b"\xf0\xff\0\0"),
    "GPS that is not there": (0x8825, 4, 1, b"\xff\xff\0\0"),
    "text without an end": (0x010F, 2, 2**31, b"\x10\0\0\0"),
    "an unknown type": (0x0110, 99, 1, b"abcd"),
}


@pytest.mark.parametrize("odd", ODD_TAGS)
def test_the_orientation_counts_whatever_else_the_exif_says(tmp_path, odd):
    """Orientation 6 beside a malformed tag: upright, in the eyes of every viewer, and quietly."""
    exif = exif_of(6, ODD_TAGS[odd])
    plain_picture(60, 40, (0, 0, 20, 20)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = load_image(tmp_path / "a.jpg")
    assert image.size == (40, 60) and image.getpixel((35, 5))[1] < 60  # red, at the right
    program = f"import data; data.load_image({str(tmp_path / 'a.jpg')!r})"
    done = run("-c", program, PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and not done.stderr


def test_exif_that_is_garbage_turns_nothing(tmp_path):
    plain_picture(60, 40).save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage")
    assert load_image(tmp_path / "a.jpg").size == (60, 40)


def test_shared_images_with_odd_exif(shared):
    for path in sorted((shared / "cases").glob("*.jpg")):
        assert load_image(path).size == Image.open(path).size[::-1], path


def test_formats_that_viewers_show(tmp_path):
    """AVIF, and a PNG with a long compressed text."""
    picture = plain_picture()
    picture.save(tmp_path / "a.avif")
    text = PngImagePlugin.PngInfo()
    text.add_text("description", "red " * 500_000, zip=True)
    picture.save(tmp_path / "a.png", pnginfo=text)
    for name in ("a.avif", "a.png"):
        assert load_image(tmp_path / name).getpixel((20, 20))[0] > 220


@pytest.mark.parametrize(
    "dtype, top", [("u2", 4095), ("u2", 1023), ("u2", 300), ("i4", 255), ("i4", 40), ("f4", 1)]
    + [("f4", 0.01), ("f4", 2.5), ("i4", 10**9)]
)  # fmt: skip
def test_no_image_comes_out_black(tmp_path, dtype, top):
    """12 bits in 16, small numbers in 32 bits, floats: a grey ramp is seen as one."""
    ramp = np.linspace(0, top, 64).repeat(64).reshape(64, 64).astype(dtype)
    name = "a.png" if dtype == "u2" else "a.tiff"
    Image.fromarray(ramp).save(tmp_path / name)
    grey = np.asarray(load_image(tmp_path / name)).astype(int)
    assert grey[0].max() < 8 and grey[-1].min() >= 60
    assert (np.diff(grey[:, 0, 0]) >= 0).all() and (grey[..., 0] == grey[..., 2]).all()


def test_deep_colours_and_single_hot_pixels(tmp_path):
    """12 bits in a 16-bit RGB PNG; one pixel far above all others; "no data" far below."""
    ramp = np.linspace(0, 4095, 64).repeat(64).reshape(64, 64)
    rows = np.repeat(ramp.astype(">u2")[..., None], 3, axis=2)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind, content):
        crc = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + crc

    size = (64).to_bytes(4, "big") * 2
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x10\x02\0\0\0")
    (tmp_path / "a.png").write_bytes(png + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))
    for name, odd, kind in (("b.tiff", 65535, "i4"), ("c.tiff", -3.4e38, "f4")):
        picture = ramp.astype(kind)
        picture[0, 0] = odd
        Image.fromarray(picture).save(tmp_path / name)
    for name in ("a.png", "b.tiff", "c.tiff"):
        grey = np.asarray(load_image(tmp_path / name)).astype(int)
        assert grey[-1, 5:].min() > 200 and grey[0, 5:].max() < 20, name


# -------------------------------------------------------------------------------- programs and texts


def test_two_programs_make_the_shapes_at_once(tmp_path, monkeypatch):
    """Who comes second uses what is there; nothing else is left."""
    few = {split: info._replace(scenes=30) for split, info in data.SHAPES_SPLITS.items()}
    monkeypatch.setattr(data, "SHAPES_SPLITS", few)
    threads = [threading.Thread(target=data.make_shapes, args=[tmp_path]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.listdir(tmp_path) == ["shapes"] and len(open_split(tmp_path, "val", "shapes")) > 100


def test_a_terminal_without_the_characters(checkpoint, tmp_path):
    """The box is printed and drawn; what cannot be printed is a question mark."""
    plain_picture().save(tmp_path / "a.jpg")
    names = [tmp_path / "a.jpg"]
    if sys.platform == "linux":  # a lone byte of latin-1
        names.append(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))
        plain_picture().save(names[1])
    for name in names:
        line = [checkpoint, "--image", name, "--text", "红色的杯子", "--output", tmp_path / "o.png"]
        done = run(ROOT / "evaluate.py", *line, PYTHONIOENCODING="cp1252")
        assert done.returncode == 0 and b"?????: " in done.stdout, done.stderr
        (tmp_path / "o.png").unlink()


def test_texts_reach_the_tokenizer_as_they_are_written(tmp_path, tokenizer):
    """UTF-8 that was read as latin-1 is mended there, which works only if nobody lowered it."""
    make_refer(tmp_path, [{"texts": ["The RED caf\u00c3\u0089"]}])  # É
    dataset = open_split(tmp_path, tokenizer=tokenizer)
    assert dataset.samples[0].text == "The RED caf\u00c3\u0089"
    tokens = dataset[0]["tokens"]
    assert tokenizer.decode(tokens[1 : tokens.argmax()]).strip() == "the red café"


@pytest.mark.parametrize("text", ["déjà", "voilà", "Å"])
def test_half_a_letter_is_no_white_space(tmp_path, tokenizer, text):
    """The second byte of à, read as latin-1, is a blank; it is not stripped."""
    make_refer(tmp_path, [{"texts": [text.encode().decode("latin-1")]}])
    tokens = open_split(tmp_path, tokenizer=tokenizer)[0]["tokens"]
    assert tokenizer.decode(tokens[1 : tokens.argmax()]).strip() == text.lower()


def test_words_of_place_in_capitals_prevent_a_crop():
    rng = data.random.Random(0)
    for text in ("LEFT man", "the one on the Right"):
        for _ in range(50):
            geometry = data.random_geometry(rng, (640, 480), (1, 1, 9, 9), text, 224)
            assert geometry.region == (0, 0, 640, 480)


NOTHING = ("&nbsp;", "\ufeff", "\u200b", "&#8203; \t", "&amp;nbsp;", "\u00ad", "\u2800", "\ufe0f")
NOTHING += ("<|endoftext|>",)


@pytest.mark.parametrize("text", NOTHING)
def test_a_text_that_says_nothing(tokenizer, tmp_path, text):
    """It has no box, and a data set leaves it out; "..." is something."""
    model, picture = tiny_model(tokenizer), plain_picture()
    assert "is empty" in error_of(evaluate.ground, model, picture, text)
    assert len(evaluate.ground(model, picture, "...")) == 4
    make_refer(tmp_path, [{"texts": ["a", text.encode().decode("latin-1"), "..."]}])
    dataset = open_split(tmp_path)
    assert [s.text for s in dataset.samples] == ["a", "..."]
    assert dataset.report == ["1 empty expressions left out"]


# ----------------------------------------------------------------------------------------- own data


def write_own(root, boxes, size=(640, 480), **save):
    """One's own train split: an image of this size for each box."""
    lines = []
    for number, box in enumerate(boxes):
        Image.new("RGB", size, "grey").save(root / f"{number}.jpg", **save)
        lines.append(json.dumps({"image": f"{number}.jpg", "text": "it", "box": box}))
    (root / "train.jsonl").write_text("\n".join(lines))
    return lines


def test_boxes_in_another_convention_are_told(tmp_path, monkeypatch):
    """Shares, x y w h, thousandths: reading, `check` and a run say what it looks like. Of boxes in
    pixels a few may be odd."""
    rng = np.random.default_rng(0)
    low = rng.uniform((40, 40), (300, 250), (40, 2))
    high = low + rng.uniform(60, 200, (40, 2))
    right = np.concatenate([low, high], axis=1)
    conventions = {
        "shares": right / [640, 480, 640, 480],
        "x, y, width, height": np.concatenate([low, high - low], axis=1),
        "thousandths": np.concatenate([low + [300, 250], high + [350, 300]], axis=1),
    }
    for convention, boxes in conventions.items():
        write_own(tmp_path, boxes.tolist())
        text = error_of(open_split, tmp_path, name="own")
        assert "train.jsonl" in text and convention in text
    monkeypatch.setattr(sys, "argv", f"data.py check --dataset own --data-root {tmp_path}".split())
    with pytest.raises(SystemExit) as stop:
        data.main()
    assert "thousandths" in stop.value.code
    right[:5] += 10_000
    write_own(tmp_path, right.tolist())
    assert len(open_split(tmp_path, name="own")) == 40


def test_own_files_as_people_write_them(tmp_path):
    """Blank lines between the lines, Windows line ends, one JSON array: the same samples."""
    lines = write_own(tmp_path, [[10, 20, 90, 100]] * 3)
    expected = list(open_split(tmp_path, name="own").samples)
    for content in ("\n\n".join(lines) + "\n\n", "\r\n".join(lines), f"[{', '.join(lines)}]\n"):
        (tmp_path / "train.jsonl").write_text(content)
        assert list(open_split(tmp_path, name="own").samples) == expected


@pytest.mark.parametrize("augment", [False, True])
def test_own_boxes_count_in_the_upright_image(tmp_path, augment):
    """The box lies on the same pixels as in a copy of the image that is stored upright."""
    upright = plain_picture(400, 600, (40, 60, 160, 330))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    items = []
    for name in ("lying.png", "upright.png"):
        line = {"image": name, "text": "red one", "box": [40, 60, 160, 330]}
        (tmp_path / "train.jsonl").write_text(json.dumps(line))
        dataset = open_split(tmp_path, name="own", augment=augment)
        dataset.set_epoch(3)
        items.append(dataset[0])
    lying, stored_upright = items
    for name in ("image", "inner", "box"):
        assert torch.equal(lying[name], stored_upright[name]), name


# --------------------------------------------------------------------------------- memory, processes

MEMORY = {
    "unable to allocate shared memory(shm) for file </torch_1>: No space left (28)": "--shm-size",
    "DataLoader worker (pid 9) is killed by signal: Bus error. It is possible that dataloader's "
    "workers are out of shared memory.": "--workers 0",
    "DataLoader worker (pid(s) 9) exited unexpectedly": "--workers",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes": "--batch-size",
    "CUDA out of memory. Tried to allocate 2.00 GiB.": "--checkpointing",
}


@pytest.mark.parametrize("message, advice", MEMORY.items())
def test_too_little_memory_is_one_sentence(message, advice):
    def job():
        raise (torch.OutOfMemoryError if "CUDA" in message else RuntimeError)(message)

    with pytest.raises(SystemExit) as stop:
        clip_model.run_main(job)
    assert stop.value.code.startswith("error: ") and advice in stop.value.code


def test_a_fault_of_the_program_keeps_its_traceback():
    def job():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0: shapes do not fit")

    with pytest.raises(RuntimeError):
        clip_model.run_main(job)


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29411"}
STARTS = {
    "srun": ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, "cpu", "4 processes"),
    "a cluster's pods": ({"WORLD_SIZE": "4", "RANK": "1"}, "cpu", "4 processes"),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "2"}, "cpu", "start one torchrun"),
    "no such host": (TORCHRUN | {"MASTER_ADDR": "no.such.host.invalid"}, "cpu", "MASTER_ADDR"),
    "a GPU by number": (TORCHRUN, "cuda:0", "no --device cuda:0"),
}


@pytest.mark.parametrize("start", STARTS)
def test_processes_that_do_not_find_one_another(monkeypatch, start):
    variables, device, says = STARTS[start]
    monkeypatch.setenv("PMI_SIZE", "")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert says in error_of(evaluate.setup_device, device)


def test_no_such_network_interface():
    """One sentence for each process, no traceback of ours."""
    program = "import clip_model, evaluate; clip_model.run_main(evaluate.setup_device, 'cpu')"
    variables = TORCHRUN | {"WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    done = run("-c", program, PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME="nosuch0", **variables)
    said = done.stderr.decode()
    assert done.returncode == 1 and "GLOO_SOCKET_IFNAME" in said and "Traceback" not in said


# ------------------------------------------------------------------------------------ files and flags


@pytest.mark.parametrize(
    "tower, more",
    [("vision_config", {"hidden_act": "gelu"}), ("text_config", {"num_attention_heads": 4})]
    + [("vision_config", {"layer_norm_eps": 1e-6}), ("text_config", {"hidden_act": "gelu"})],
)
def test_a_clip_of_another_family_is_refused(tmp_path, tower, more):
    """What shapes do not tell, config.json beside Hugging Face's file does."""
    torch.save(hugging_face_state(tiny_clip()), tmp_path / "pytorch_model.bin")
    good = {"hidden_act": "quick_gelu", "num_attention_heads": 1, "layer_norm_eps": 1e-5}
    config = {"vision_config": good, "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_clip(tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config | {tower: good | more}))
    text = error_of(load_clip, tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin" in text and f"{next(iter(more))} {next(iter(more.values()))}" in text


def test_a_users_own_files_are_not_overwritten(monkeypatch, checkpoint, tmp_path):
    """--output as --image, also by another name; --save-boxes as any file; best.pt as --init."""
    monkeypatch.chdir(tmp_path)
    plain_picture().save("a.png")
    Path("link.png").symlink_to("a.png")
    write_own(tmp_path, [[10, 20, 90, 100]])
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for output in ("a.png", "link.png", tmp_path / "a.png"):
        line = [checkpoint, "--image", "a.png", "--text", "red", "--output", output]
        assert "would overwrite" in command(monkeypatch, evaluate, *line)
    for written in ("train.jsonl", "best.pt", "0.jpg", "."):
        line = [checkpoint, "--dataset", "own", "--data-root", ".", "--split", "train"]
        assert "is there already" in command(monkeypatch, evaluate, *line, "--save-boxes", written)
    line = ["--dataset", "own", "--data-root", ".", "--init", "best.pt", "--output", "."]
    assert "would overwrite" in command(monkeypatch, train, *line)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path, capsys):
    """In --data-root=~/data, where the shell does not expand it, and in CLIP_CACHE."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "data").mkdir()
    write_own(tmp_path / "data", [[10, 20, 90, 100]])
    line = "data.py check --dataset own --data-root=~/data".split()
    monkeypatch.setattr(sys, "argv", line)
    data.main()
    assert "train" in capsys.readouterr().out
    monkeypatch.setenv("CLIP_CACHE", "~/cache")
    with pytest.raises(HiVGError, match=str(tmp_path / "cache")):
        load_clip("ViT-B/16")


def test_every_text_has_its_box(monkeypatch, checkpoint, tmp_path, capsys):
    """Several texts: a line for each, and all boxes in one image, each in its own colour."""
    plain_picture(500, 400).save(tmp_path / "a.png")
    texts = ["red one", "the blue one", "one"]
    line = [checkpoint, "--image", tmp_path / "a.png", "--output", tmp_path / "o.png", "--text"]
    assert command(monkeypatch, evaluate, *line, *texts) is None
    printed = capsys.readouterr().out.splitlines()
    assert [row.split(": ")[1] for row in printed[:3]] == texts and len(printed) == 4
    assert all(0 <= float(row.split()[1]) <= 1 for row in printed[:3])  # score 0.93 ...
    drawn = np.asarray(Image.open(tmp_path / "o.png"))
    assert drawn.shape == (400, 500, 3)
    for colour in evaluate.COLOURS[:3]:
        assert (drawn == colour).all(axis=2).sum() > 100
    assert command(monkeypatch, evaluate, *line, "man", "in", "red") is None
    assert "quotes" in capsys.readouterr().out
