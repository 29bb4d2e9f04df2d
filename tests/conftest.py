"""What the tests share: where the golden files are, a tiny CLIP, a tiny HiVG, a hand-made RefCOCO.

Golden files and photographs lie in ../shared beside the project. Tests that need them are skipped
where that folder is absent; what they promise is then tested against other implementations.
"""

import gzip
import json
import os
import pickle
import re
import shutil
import struct
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from PIL import Image

import clip_model
from clip_model import CLIP, CLIPConfig, HiVGError, Tokenizer, rename_keys, save_clip
from hivg import HiVG, HiVGConfig

SHARED = Path(__file__).parents[2] / "shared"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # runs are repeated exactly, which a CPU alone promises
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start; tests run side by side,
torch.set_num_threads(1)  # and bit for bit a process that is forked computes with one thread


@pytest.fixture(scope="session")
def shared():
    """The folder of golden files and photographs."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"{SHARED} with the golden files is not there")
    return SHARED


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Every test has an empty CLIP_CACHE of its own, and nothing can be downloaded; what is random is
    the same in whatever order tests run."""
    torch.manual_seed(0)

    def refuse(*args, **kwargs):
        raise URLError("no network in tests")

    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "clip_cache"))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    clip_model.clip_tokenizer.cache_clear()


@pytest.fixture
def clip_vocabulary(shared):
    """CLIP's own vocabulary, where a download would have put it."""
    cache = Path(os.environ["CLIP_CACHE"])
    cache.mkdir()
    name = "bpe_simple_vocab_16e6.txt.gz"
    (cache / name).symlink_to(shared / "golden" / name)
    return cache


def close(found, expected, tolerance=1e-5):
    """Equal to an absolute tolerance; tensors, or tuples of them."""
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def check_refusals(load, folder, files):
    """Each file, {name: (bytes, what torch.save is given or None, reason)}, is refused with one
    sentence that names it and the reason."""
    for name, (content, reason) in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif content is not None:
            torch.save(content, folder / name)
        with pytest.raises(HiVGError, match=f"{name}.*{reason}") as caught:
            load(folder / name)
        assert not re.search("\n|weights_only", str(caught.value))


# ------------------------------------------------------------------------------- a tiny CLIP and HiVG

MERGES = "# version: tests\nr e\nre d</w>\no n\non e</w>\nb l\nbl u\nblu e</w>"


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    """A vocabulary file with a handful of merges."""
    path = tmp_path_factory.mktemp("vocabulary") / "bpe_vocab.txt.gz"
    path.write_bytes(gzip.compress(MERGES.encode()))
    return path


@pytest.fixture(scope="session")
def tokenizer(vocabulary):
    return Tokenizer(vocabulary)


def shake(module, amount=0.05, seed=0):
    """Move every parameter away from its start, so that nothing is hidden by zeros and ones."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=amount)
    return module


def tiny_clip(seed=0, vocab_size=512 + 7 + 2, **sizes):
    """CLIP of width 64 with random weights, eval mode."""
    torch.manual_seed(seed)
    defaults = {"image_size": 64, "vision_width": 64, "vision_layers": 6, "text_width": 64}
    defaults |= {"text_layers": 3, "embed_dim": 64, "vocab_size": vocab_size}
    return shake(CLIP(CLIPConfig(**defaults | sizes)), seed=seed).eval()


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory, vocabulary):
    """A small CLIP's state dict, with its vocabulary beside it."""
    folder = tmp_path_factory.mktemp("clip")
    save_clip(tiny_clip(vision_layers=3, text_layers=1, image_size=32), folder / "clip.pt")
    shutil.copy(vocabulary, folder)
    return folder / "clip.pt"


THEIR_NAMES = (  # patterns of our names, and transformers'
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.", "vision_model."),
    (r"^(?!vis|text_p|logit)", "text_model."),
    (r"(class_emb|token_emb)", r"embeddings.\1"),
    (r"conv1", "embeddings.patch_embedding"),
    (r"positional_embedding", "embeddings.position_embedding.weight"),
    (r"transformer\.resblocks", "encoder.layers"),
    (r"ln_pre", "pre_layrnorm"),
    (r"ln_post", "post_layernorm"),
    (r"ln_final", "final_layer_norm"),
    (r"ln_", "layer_norm"),
    (r"\battn", "self_attn"),
    (r"c_fc", "fc1"),
    (r"c_proj", "fc2"),
)


def hugging_face_state(clip):
    """A CLIP's weights under transformers' names."""
    state = rename_keys(clip.state_dict(), THEIR_NAMES)
    for name in list(state):
        if "in_proj" in name:
            for letter, part in zip("qkv", state.pop(name).chunk(3)):
                state[name.replace("in", letter)] = part.clone()
        elif "projection" in name:
            state[name] = state[name].T.contiguous()
    return state


def tiny_model(tokenizer, stage=0, seed=0, **settings):
    """HiVG around the tiny CLIP in the given stage, eval mode: no parameter is zero, but for the B
    matrices of the newest pairs and the adaptive weights w of a fresh model."""
    sizes = {"image_size": 64, "grounding_layers": 2, "heads": 4, "feedforward": 64, "rank": 4}
    sizes |= {"region_width": 64, "dropout": 0.0, "lora_dropout": 0.0}
    config = HiVGConfig(**{"text_layers": (1, 3)} | sizes | settings)
    torch.manual_seed(seed)
    model = HiVG(config, tiny_clip(seed), tokenizer)
    for bridge in model.bridges.values():
        shake(bridge.mlp, 0.1, seed)
    for later in range(1, stage + 1):
        shake_pairs(model)
        model.enter_stage(later)
    return model.eval()


def shake_pairs(model):
    """Give the newest LoRA pairs B matrices that are not zero, as training would."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)


def tiny_batch(model, texts=("red one", "blue !; one", "the big red one on the left"), seed=0):
    """Images, tokens and padding: the first has none, the others bars at top and bottom or sides."""
    torch.manual_seed(seed)
    images = torch.randn(len(texts), 3, 64, 64)
    padding = torch.zeros(len(texts), 64, 64, dtype=torch.bool)
    padding[1::3, :20], padding[1::3, 44:] = True, True
    padding[2::3, :, :17] = True
    return images.masked_fill(padding[:, None], 0), model.tokenize(list(texts)), padding


# -------------------------------------------------------------------------- a hand-made refer folder


class Python2Pickler(pickle._Pickler):
    """Writes str as Python 2 wrote its byte strings, in latin-1, by protocol 0, 1 or 2; RefCOCO's
    refs were made that way."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_str(self, text):
        content = text.encode("latin-1")
        if self.bin:
            self.write(b"T" + struct.pack("<I", len(content)) + content)
        else:
            self.write(b"S" + repr(content)[1:].encode("ascii") + b"\n")
        self.memoize(text)

    dispatch[str] = save_str


def make_refer(root, rows, folder="refcoco", split_by="unc"):
    """A data set in refer's layout. rows: dicts with any of split, texts, bbox, image (PIL, or None
    for a missing file), ref_id, size (what the annotations claim), save (options for the JPEG)."""
    (root / folder).mkdir(parents=True)
    pictures = root / "images/mscoco/images/train2014"
    pictures.mkdir(parents=True, exist_ok=True)
    refs, images, annotations, sent_id = [], [], [], 0
    for number, row in enumerate(rows, start=1):
        image, name = row.get("image", plain_picture()), f"COCO_train2014_{number:012d}.jpg"
        width, height = row.get("size") or (image.size if image else (60, 40))
        if image:
            image.save(pictures / name, **row.get("save", {}))
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        bbox = row.get("bbox", [10.0, 10.0, 20.0, 20.0])
        annotations.append({"id": 100 + number, "image_id": number, "bbox": bbox})
        ref = {"ref_id": row.get("ref_id", 1000 + number), "ann_id": 100 + number}
        ref |= {"image_id": number, "category_id": 1, "split": row.get("split", "train")}
        ref["file_name"] = name.replace(".jpg", f"_{100 + number}.jpg")  # as there: no such file
        ref["sentences"] = []
        for text in row.get("texts", ["red one"]):
            sent_id += 1
            words = {"sent_id": sent_id, "sent": text, "raw": text, "tokens": text.split()}
            ref["sentences"].append(words)
        refs.append(ref)
    with open(root / folder / f"refs({split_by}).p", "wb") as file:
        Python2Pickler(file, protocol=2).dump(refs)
    content = {"images": images, "annotations": annotations}
    (root / folder / "instances.json").write_text(json.dumps(content))
    return root


def plain_picture(width=60, height=40, box=(10, 10, 30, 30), colour="red"):
    """A coloured box on grey."""
    image = Image.new("RGB", (width, height), (128, 128, 128))
    image.paste(colour, box)
    return image


@pytest.fixture(scope="session")
def refer_root(tmp_path_factory):
    """A RefCOCO of 14 tiny pictures with one box each: 8 for train, 4 for val, 2 for testA."""
    rows = []
    for i in range(14):
        x, y, side = 5 + 7 * (i % 3), 3 + 4 * (i % 4), 14 + 2 * (i % 5)
        colour = ("red", "blue")[i % 2]
        picture = plain_picture(60, 40, (x, y, x + side, y + side), colour)
        split = "train" if i < 8 else "val" if i < 12 else "testA"
        row = {"bbox": [float(x), float(y), float(side), float(side)], "image": picture}
        rows.append(row | {"split": split, "texts": [f"{colour} one"]})
    return make_refer(tmp_path_factory.mktemp("refer"), rows)
