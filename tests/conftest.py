"""What the tests share: where the golden files are, a tiny CLIP, a tiny HiVG, a hand-made RefCOCO.

Golden files and photographs lie in ../shared beside the project. Tests that need them are skipped
where that folder is absent; what they promise is then tested against other implementations.
"""

import gzip
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image

import clip_model
from clip_model import CLIP, CLIPConfig, Tokenizer, save_clip
from hivg import HiVG, HiVGConfig

SHARED = Path(__file__).parents[2] / "shared"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # runs are repeated exactly, which a CPU alone promises
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="session")
def shared():
    """The folder of golden files and photographs."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"{SHARED} with the golden files is not there")
    return SHARED


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Every test has an empty CLIP_CACHE of its own, and nothing can be downloaded."""

    def refuse(*args, **kwargs):
        raise clip_model.urllib.error.URLError("no network in tests")

    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "clip_cache"))
    monkeypatch.setattr(clip_model.urllib.request, "urlopen", refuse)
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


def hugging_face_state(clip):
    """A CLIP's weights under transformers' names."""
    state = {"logit_scale": clip.logit_scale}
    state["visual_projection.weight"] = clip.visual.proj.T
    state["text_projection.weight"] = clip.text_projection.T
    vision, text = "vision_model.", "text_model."
    state[vision + "embeddings.class_embedding"] = clip.visual.class_embedding
    state[vision + "embeddings.patch_embedding.weight"] = clip.visual.conv1.weight
    state[vision + "embeddings.position_embedding.weight"] = clip.visual.positional_embedding
    state[text + "embeddings.token_embedding.weight"] = clip.token_embedding.weight
    state[text + "embeddings.position_embedding.weight"] = clip.positional_embedding
    modules = {
        vision + "pre_layrnorm": clip.visual.ln_pre,
        vision + "post_layernorm": clip.visual.ln_post,
        text + "final_layer_norm": clip.ln_final,
    }
    for tower, blocks in ((vision, clip.visual.transformer), (text, clip.transformer)):
        for i, block in enumerate(blocks.resblocks):
            prefix = f"{tower}encoder.layers.{i}."
            names = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", "self_attn.out_proj")
            parts = (block.ln_1, block.ln_2, block.mlp.c_fc, block.mlp.c_proj, block.attn.out_proj)
            modules |= {prefix + name: part for name, part in zip(names, parts)}
            for kind in ("weight", "bias"):
                for name, part in zip("qkv", getattr(block.attn.in_proj, kind).chunk(3)):
                    state[f"{prefix}self_attn.{name}_proj.{kind}"] = part
    for name, module in modules.items():
        state[name + ".weight"], state[name + ".bias"] = module.weight, module.bias
    return state


def tiny_model(tokenizer, stage=0, seed=0, **settings):
    """HiVG around the tiny CLIP in the given stage, eval mode: no parameter is zero, but for the B
    matrices of the newest pairs and the adaptive weights w of a fresh model."""
    sizes = {"image_size": 64, "grounding_layers": 2, "heads": 4, "feedforward": 64, "rank": 4}
    sizes |= {"region_width": 64, "dropout": 0.0, "lora_dropout": 0.0}
    config = HiVGConfig(**{"text_layers": (1, 3)} | sizes | settings)
    model = HiVG(config, tiny_clip(seed), tokenizer)
    for bridge in model.bridges.values():
        shake(bridge.mlp, 0.1, seed)
    for later in range(1, stage + 1):
        shake_pairs(model)
        model.enter_stage(later)
    return model.eval()


def shake_pairs(model):
    """Give all LoRA pairs B matrices that are not zero, as training would."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)


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
