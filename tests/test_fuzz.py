"""Whatever is in a user's files: it works, or ends in the project's own error; never in a traceback or a box that is none.

The mutations are the same in every run; HYPOTHESIS_MORE=20 python -m pytest tests/test_fuzz.py tries twenty times as many others.
"""

import copy
import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from conftest import make_refer, plain_picture, shake_pairs, tiny_model
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import evaluate
import hivg
from clip_model import HiVGError, Tokenizer

MORE = int(os.environ.get("HYPOTHESIS_MORE", 0))


def many(examples):
    return settings(
        max_examples=examples * (MORE or 1),
        derandomize=not MORE,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


edits = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6)), min_size=1, max_size=4)


def edited(content, changes, end):
    """Bytes with some of them overwritten, at shares of their length, and cut off at another share if that is below 1."""
    content = bytearray(content)
    for place, new in changes:
        start = int(place * (len(content) - 1))
        content[start : start + len(new)] = new
    return bytes(content[: int(end * len(content))] if end < 1 else content)


ends = st.one_of(st.just(1.0), st.just(1.0), st.floats(0, 1))
values = st.one_of(
    *(
        st.none(),
        st.booleans(),
        st.integers(-3, 70),
        st.sampled_from((10**9, -(10**30), "", "red")),
    ),
    *(st.floats(), st.text(max_size=4), st.lists(st.integers(-1, 50), max_size=5)),
    *(
        st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
        st.just((1e308, 1e308, 2.0, -1.0)),
    ),
)
changes = st.lists(st.tuples(st.integers(0, 10**6), st.one_of(values, st.just(...))), max_size=3)


def places(tree, path=()):
    """The paths of all nodes in nested lists and dicts."""
    items = ()
    if isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    elif isinstance(tree, dict):
        items = tree.items()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(tree, new):
    """The tree with some nodes replaced, or taken out where ... stands for the value."""
    tree = copy.deepcopy(tree)
    for number, value in new:
        found = list(places(tree))
        if not found:
            return tree
        *path, key = found[number % len(found)]
        node = tree
        for step in path:
            node = node[step]
        if isinstance(node, tuple):
            continue
        if value is ...:
            del node[key]
        else:
            node[key] = copy.deepcopy(value)
    return tree


def reads(name, root, augment=False):
    """All items of train can be had and are boxes in their pictures, or there is an error of our own."""
    try:
        dataset = data.GroundingDataset(name, "train", root, 32, augment=augment)
        items = [dataset[index] for index in range(len(dataset))]
    except HiVGError as error:
        assert str(error)
        return
    finally:
        data.parsed.cache_clear()
    for item in items:
        cx, cy, w, h = item["box"].tolist()
        assert w >= 0 and h >= 0 and -1e-6 <= cx - w / 2 and cx + w / 2 <= 1 + 1e-6
        assert -1e-6 <= cy - h / 2 and cy + h / 2 <= 1 + 1e-6
        assert item["image"].isfinite().all() and item["text"].strip()


@pytest.fixture(scope="module")
def refer(tmp_path_factory):
    """A RefCOCO of three pictures, as its root and its two files' contents."""
    rows = [{}, {"texts": ["the blue one", "left"], "bbox": [0, 0, 60, 40]}, {"split": "val"}]
    root = make_refer(tmp_path_factory.mktemp("fuzz"), rows)
    refs = pickle.loads((root / "refcoco/refs(unc).p").read_bytes(), encoding="latin-1")
    return root, refs, json.loads((root / "refcoco/instances.json").read_text())


@pytest.mark.parametrize("file", ["refs", "instances"])
def test_annotations_of_any_content(refer, file):
    """refer's files with any of their values replaced, or taken out."""
    root, refs, instances = refer

    @many(150)
    @given(changes, st.booleans())
    def fuzz(new, augment):
        mine = changed(refs, new) if file == "refs" else refs
        (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(mine, protocol=2))
        theirs = changed(instances, new) if file == "instances" else instances
        (root / "refcoco/instances.json").write_text(json.dumps(theirs))
        reads("refcoco", root, augment)

    fuzz()


@pytest.mark.parametrize("file", ["refs(unc).p", "instances.json"])
def test_annotations_of_any_bytes(tmp_path, file):
    """The same files with bytes overwritten, or cut off."""
    make_refer(tmp_path, [{}, {"texts": ["the blue one", "left"]}])
    content = (tmp_path / "refcoco" / file).read_bytes()

    @many(150)
    @given(edits, ends)
    def fuzz(new, end):
        (tmp_path / "refcoco" / file).write_bytes(edited(content, new, end))
        reads("refcoco", tmp_path)

    fuzz()


NAME = "COCO_train2014_000000000001.jpg"


def index_bytes(entries, kind):
    """An index list as a plain pickle, in torch's old format, and in its zip."""
    if kind == "pickle":
        return pickle.dumps(entries, protocol=2)
    torch.save(entries, file := io.BytesIO(), _use_new_zipfile_serialization=kind == "zip")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["pickle", "old", "zip"])
def test_index_lists_of_any_content_and_bytes(tmp_path, kind):
    """The authors' lists, whose entries are tuples without names."""
    make_refer(tmp_path, [{}], folder="elsewhere")
    (tmp_path / "unc").mkdir()
    whole = [[NAME, {"height": 40, "width": 60}, [10, 10, 20, 20], "red one", []]] * 2

    @many(150)
    @given(changes, st.one_of(st.just([]), edits), ends)
    def fuzz(new, bytes_, end):
        content = index_bytes(changed(whole, new), kind)
        (tmp_path / "unc/unc_train.pth").write_bytes(edited(content, bytes_, end))
        reads("refcoco", tmp_path)

    fuzz()


def test_own_and_mdetrs_files_of_any_content(tmp_path):
    """Lines of one's own, and MDETR's JSON."""
    make_refer(tmp_path, [{}], folder="elsewhere")
    plain_picture().save(tmp_path / "a.jpg")
    line = {"image": "a.jpg", "text": "red one", "box": [10, 10, 30, 30]}
    picture = {"id": 1, "file_name": NAME, "width": 60, "height": 40, "caption": "red"}
    mdetr = {"images": [picture], "annotations": [{"image_id": 1, "bbox": [10, 10, 20, 20]}]}

    @many(200)
    @given(changes, st.one_of(st.just([]), edits), ends)
    def fuzz(new, bytes_, end):
        for name, file, content in (
            ("own", "train.jsonl", changed(line, new)),
            ("refcoco", "finetune_refcoco_train.json", changed(mdetr, new)),
        ):
            content = edited(json.dumps(content).encode(), bytes_, end)
            (tmp_path / file).write_bytes(content)
            reads(name, tmp_path)

    fuzz()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_pictures_of_any_bytes(tmp_path, kind):
    """A picture file with bytes overwritten, or cut off, is an RGB picture or an error that names it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    plain_picture(90, 70).save(file := io.BytesIO(), kind, exif=exif)
    path = tmp_path / "picture.jpg"

    @many(150)
    @given(edits, ends, st.booleans())
    def fuzz(new, end, upright):
        path.write_bytes(edited(file.getvalue(), new, end))
        try:
            image = data.load_image(path, upright)
        except HiVGError as error:
            assert "picture.jpg" in str(error)
            return
        assert image.mode == "RGB"
        square, padding, _ = data.prepare(image, 32)
        assert square.isfinite().all() and not padding.all()

    fuzz()


@pytest.fixture(scope="module")
def model(vocabulary):
    model = tiny_model(Tokenizer(vocabulary), 2, grounding_layers=1)
    shake_pairs(model)
    return model


def grounds(path):
    """A checkpoint is refused by name, or finds a box inside the picture."""
    try:
        model = hivg.load_checkpoint(path)
    except HiVGError as error:
        assert Path(path).name in str(error)
        return False
    x1, y1, x2, y2 = evaluate.ground(model, plain_picture(), "red one")
    assert 0 <= x1 <= x2 <= 60 and 0 <= y1 <= y2 <= 40
    return True


def test_checkpoints_of_any_content(model, tmp_path):
    """Any value of a checkpoint replaced: sizes that do not fit, layers that are not there, names of nothing."""
    path = tmp_path / "best.pt"
    hivg.save_checkpoint(path, model)
    content = torch.load(path, weights_only=True)
    assert grounds(path)
    config = content["config"]

    @many(120)
    @given(changes, st.integers(0, 10**6), st.sampled_from(("config", "config", "model", "top")))
    def fuzz(new, number, where):
        mine = dict(content)
        if where == "config":
            mine["config"] = changed(config, new)
        elif where == "top":
            mine = {**mine, **changed({k: v for k, v in mine.items() if k != "model"}, new)}
        else:
            name = sorted(content["model"])[number % len(content["model"])]
            others = {n: t for n, t in content["model"].items() if n != name}
            tensor = content["model"][name]
            wrong = (tensor[..., None], tensor.flatten()[:-1], tensor.long(), 3, None, "red")
            mine["model"] = others | ({name: wrong[number % 6]} if number % 7 else {})
        torch.save(mine, path)
        grounds(path)

    fuzz()


def test_checkpoints_of_any_bytes(model, tmp_path):
    """Bytes overwritten or cut off: torch's zip notices, or the name of a tensor is another."""
    path = tmp_path / "best.pt"
    hivg.save_checkpoint(path, model)
    content = path.read_bytes()

    @many(60)
    @given(edits, ends)
    def fuzz(new, end):
        path.write_bytes(edited(content, new, end))
        try:
            hivg.load_checkpoint(path)
        except HiVGError as error:
            assert "best.pt" in str(error)

    fuzz()


@many(300)
@given(st.text(alphabet=st.characters(codec=None, exclude_categories=()), max_size=60))
def test_expressions_of_any_text(text):
    """Every str, lone surrogates among them, becomes tokens that end with the end token; as in CLIP, one that has the end token's
    name in it ends there."""
    assume("<|" not in text)
    tokenizer = Tokenizer(io.StringIO("# none"))
    (tokens,) = tokenizer(text)
    end = int(tokens.argmax())
    assert tokens.shape == (77,) and tokens[end] == tokenizer.vocab_size - 1
    assert not tokens[end + 1 :].any() and tokens[0] == tokenizer.vocab_size - 2


def test_an_expression_of_any_length():
    """A word of a million letters comes to an end, too."""
    words = "".join(chr(97 + n * n % 23) for n in range(10**6))
    assert Tokenizer(io.StringIO("# none\na b\nb e\nab e"))(words).argmax() == 76
