"""clip_model.py: tokenizer and towers against other implementations, and files from outside."""

import copy
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import zipfile
from email.message import Message

import numpy as np
import pytest
import torch
from conftest import close, hugging_face_state, shake, tiny_clip, tiny_model
from PIL import Image
from torch import nn

import clip_model
from clip_model import CLIP, HiVGError, Tokenizer, load_clip, save_clip, tokenize
from hivg import load_checkpoint, save_checkpoint

# ----------------------------------------------------------------------------------------- tokenizer


def test_tokenize_equals_every_golden_row(shared, clip_vocabulary):
    """Ids are those of OpenAI's tokenizer, for awkward texts and over-long ones too."""
    rows = json.loads((shared / "golden/tokens.json").read_text())
    ids = tokenize([row["text"] for row in rows])
    assert ids.dtype == torch.long and ids.shape == (len(rows), 77)
    assert not [row["text"] for row, found in zip(rows, ids.tolist()) if found != row["ids"]]


def test_tokenizer_by_hand(tokenizer):
    """Merges apply in order, words end with </w>; ids: symbols, symbols at a word's end, merges."""
    assert tokenizer.vocab_size == 512 + 7 + 2
    red, one, blue, start, end = 512 + 1, 512 + 3, 512 + 6, 512 + 7, 512 + 8
    assert tokenizer("red  ONE Blue")[0, :6].tolist() == [start, red, one, blue, end, 0]
    # "r" + "e" is the first merge; printable bytes are numbered from "!", so "x" is 120 - 33
    assert tokenizer.encode("rex") == [512, 256 + 120 - 33]
    assert tokenizer.encode("!;") == [0, 256 + ord(";") - 33]
    assert tokenizer("red &amp;amp; one").tolist() == tokenizer("red & one").tolist()


def test_a_closed_vocabulary_knows_its_words():
    """Words that no training text had are told; those of later training texts are added. CLIP's
    vocabulary has parts of words, and tells none."""
    merges = "r e\nre d</w>"
    tokenizer = Tokenizer(io.StringIO(f"# {clip_model.CLOSED_VOCABULARY}the red one\n{merges}"))
    assert tokenizer.unseen_words("The RED one, ed and cup!") == ["ed", "and", "cup"]
    tokenizer.add_words(["a cup", "the cup"])
    again = Tokenizer(io.StringIO(tokenizer.merges_text))
    assert again.unseen_words("a red cup and one") == ["and"] and again.ids == tokenizer.ids
    tokenizer = Tokenizer(io.StringIO(f"#version: 0.2\n{merges}"))
    tokenizer.add_words(["a cup"])
    assert tokenizer.unseen_words("cup") == [] and tokenizer.merges_text[:13] == "#version: 0.2"


def test_a_longer_text_is_cut_and_ends_with_the_end_token(tokenizer):
    """A long text keeps its end token last; a str and a list of str are the same."""
    assert tokenizer("red one blue", 4).tolist() == [[519, 513, 515, 520]]
    assert tokenizer(["red " * 100])[0].tolist() == [519, *[513] * 75, 520]
    assert tokenizer("abcdefghijk" * 10**5)[0, -1] == 520  # a word of a million letters


@pytest.mark.parametrize(
    "text", ["the red one, to the left!", "café ☕ 東京", "it's 3", "", "\ud800"]
)
def test_any_text_can_be_tokenized(tokenizer, text):
    """Any str has one end token, after its ids; decode undoes encode, up to blanks; a tokenizer
    that was pickled does the same."""
    ids = tokenizer.encode(text)
    decoded = tokenizer.decode(ids).replace(" ", "")
    assert decoded == text.replace(" ", "").replace("\ud800", "\ufffd")
    assert tokenizer(text)[0, : len(ids) + 2].tolist() == [519, *ids, 520]
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(text), tokenizer(text))


@pytest.mark.parametrize("content", [b"garbage", b"# header\nno merge is this\n", b"\xff\xfe\xfa"])
def test_a_broken_vocabulary_is_told(tmp_path, content):
    """A file that is no vocabulary is a HiVGError with the file's name."""
    for name in ("broken.txt", "broken.txt.gz"):
        (tmp_path / name).write_bytes(content + b"\nmore words here")
        with pytest.raises(HiVGError, match=name):
            Tokenizer(tmp_path / name)


# -------------------------------------------------------------------------------------------- towers


CLIP_FILES = ("clip_tiny.pt", "clip_tiny_state_dict.pt", "clip_tiny_huggingface.bin")


@pytest.mark.parametrize("name", [*CLIP_FILES, "debiased_clip_tiny.pth"])
def test_features_equal_golden(shared, name):
    """OpenAI's archive, the plain state dict, Hugging Face's and the authors' adapted CLIP give
    the golden features and hidden states."""
    clip = load_clip(str(shared / "golden" / name))
    golden = torch.load(shared / "golden/clip_tiny_golden.pt", weights_only=True)
    golden |= {"image_features": golden["encode_image"], "text_features": golden["encode_text"]}
    if name not in CLIP_FILES:  # the same inputs
        golden = torch.load(shared / "golden/debiased_clip_tiny_golden.pt", weights_only=True)
    assert not clip.training and {p.dtype for p in clip.parameters()} == {torch.float32}
    images, tokens = golden["images"], golden["token_ids"]
    with torch.no_grad():
        close(clip.encode_image(images), golden["image_features"], 1e-4)
        close(clip.encode_text(tokens), golden["text_features"], 1e-4)
        close(clip(images, tokens), golden["logits_per_image"], 1e-4)
        states = torch.stack(clip.text_hidden_states(tokens))
        close(states, golden["text_hidden_states"][1:], 1e-4)
        close(clip.visual.embed(images), golden["vision_hidden_states"][0], 1e-4)


@pytest.fixture(scope="module")
def their_clip():
    """transformers' CLIPModel with random weights, biases and layer norms among them."""
    transformers = pytest.importorskip("transformers")
    common = dict(num_hidden_layers=2, hidden_act="quick_gelu", layer_norm_eps=1e-5)
    vision = dict(hidden_size=128, intermediate_size=512, num_attention_heads=2, patch_size=8)
    text = dict(hidden_size=64, intermediate_size=256, num_attention_heads=1, vocab_size=521)
    text |= dict(max_position_embeddings=20, eos_token_id=520, bos_token_id=519, pad_token_id=0)
    vision |= common | {"image_size": 40}
    config = transformers.CLIPConfig(
        vision_config=vision, text_config=text | common, projection_dim=48
    )
    return shake(transformers.CLIPModel(config)).eval()


@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
def test_clip_equals_transformers(tmp_path, their_clip, ending):
    """transformers' CLIPModel, saved in its own names, is read and gives its features and logits."""
    path = tmp_path / f"model{ending}"
    state = {name: tensor.contiguous() for name, tensor in their_clip.state_dict().items()}
    if ending == ".bin":
        torch.save(state, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, path, {"format": "pt"})
    clip = load_clip(path)
    torch.manual_seed(1)
    images, tokens = torch.randn(3, 3, 40, 40), torch.randint(0, 519, (2, 20))
    tokens[0, 5], tokens[1, 19] = 520, 520
    tokens[0, 6:] = 0
    with torch.no_grad():
        out = their_clip(input_ids=tokens, pixel_values=images)
        close(nn.functional.normalize(clip.encode_image(images)), out.image_embeds)
        close(nn.functional.normalize(clip.encode_text(tokens)), out.text_embeds)
        close(clip(images, tokens), out.logits_per_image, 1e-4)


def test_an_adapted_clip_equals_peft(tmp_path, their_clip):
    """CLIP with LoRA by PEFT, in the form of the authors' adapted CLIP, is merged on loading; what
    belongs to bridges is passed over."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets)
    adapted = peft.get_peft_model(copy.deepcopy(their_clip), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    state = {n.replace(".base_layer.", "."): t for n, t in adapted.state_dict().items()}
    bridge = "base_model.model.vision_model.encoder.layers.0.cross_norm.weight"
    torch.save({"model": state | {bridge: torch.ones(128)}}, tmp_path / "clip.pth")
    clip, images = load_clip(tmp_path / "clip.pth"), torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        features = [m.get_image_features(images) for m in (adapted.eval(), their_clip)]
    # newer versions return more than a tensor
    expected, plain = (getattr(found, "pooler_output", found) for found in features)
    close(clip.encode_image(images).detach(), expected)
    assert (plain - expected).abs().max() > 1e-2


@pytest.mark.parametrize("image_size", [48, 80, 112])
def test_positional_embedding_is_resized_bicubically_and_antialiased(image_size):
    """Smaller and larger grids are those of Pillow's bicubic filter, which is antialiased; [CLS]
    and the same size are left alone; a size that patches do not fill is refused."""
    clip, side = tiny_clip(image_size=80, patch_size=16), image_size // 16
    other = CLIP(clip.config)
    before = clip.visual.positional_embedding.data.clone()
    clip.resize_positional_embedding(image_size)
    after = clip.visual.positional_embedding.detach()
    assert torch.equal(after[0], before[0]) and (side != 5 or torch.equal(after, before))
    before, after = before[1:].view(5, 5, 64), after[1:].view(side, side, 64)
    for channel in (0, 7):
        picture = Image.fromarray(before[..., channel].numpy().copy())
        expected = np.array(picture.resize((side, side), Image.BICUBIC))
        close(after[..., channel], torch.from_numpy(expected), 1e-4)
    assert clip.config.image_size == image_size and other.config.image_size == 80
    assert clip.encode_image(torch.randn(1, 3, image_size, image_size)).shape == (1, 64)
    with pytest.raises(HiVGError, match="100"):
        clip.resize_positional_embedding(100)


def test_released_sizes():
    """The released models by name have as many weights as OpenAI's."""
    expected = {"ViT-B/32": 151_277_313, "ViT-B/16": 149_620_737}
    expected |= {"ViT-L/14": 427_616_513, "ViT-L/14@336px": 427_944_193}
    with torch.device("meta"):
        clips = {name: CLIP(config) for name, config in clip_model.CLIP_CONFIGS.items()}
    counts = {name: sum(p.numel() for p in clip.parameters()) for name, clip in clips.items()}
    assert counts == expected and clip_model.CLIP_FILES.keys() == expected.keys()


# ------------------------------------------------------------------------------- files from outside


def small_clip():
    return tiny_clip(vision_layers=1, text_layers=1, image_size=32)


def openai_state(clip):
    return {name.replace("in_proj.", "in_proj_"): p for name, p in clip.state_dict().items()}


def save_torchscript(clip, path):
    """A real TorchScript archive of half-precision weights, as OpenAI's are."""
    root = nn.Module()
    root.register_buffer("input_resolution", torch.tensor(32))
    for name, tensor in openai_state(clip).items():
        *modules, last = name.split(".")
        at = root
        for module in modules:
            if not hasattr(at, module):
                at.add_module(module, nn.Module())
            at = getattr(at, module)
        if tensor.dim() == 2:  # stored column by column
            tensor = tensor.T.contiguous().T
        at.register_buffer(last, tensor.half() if "weight" in name else tensor)
    torch.jit.save(torch.jit.script(root), path)


def test_what_save_clip_writes_is_read_bit_for_bit(tmp_path):
    """save_clip writes OpenAI's names; load_clip gives the same weights, every size inferred."""
    clip = tiny_clip(vision_layers=2, text_layers=1, embed_dim=32, context_length=30, patch_size=8)
    save_clip(clip, tmp_path / "clip.pt")
    names = torch.load(tmp_path / "clip.pt", weights_only=True).keys()
    assert "visual.transformer.resblocks.1.attn.in_proj_weight" in names
    again = load_clip(tmp_path / "clip.pt")
    assert again.config == clip.config and not again.training
    assert all(torch.equal(a, b) for a, b in zip(clip.parameters(), again.parameters()))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_load_clip_reads_torchscript_in_half_precision(tmp_path):
    """A real TorchScript archive of half-precision weights is read as data, in float32."""
    clip = small_clip()
    save_torchscript(clip, tmp_path / "archive.pt")
    again = load_clip(tmp_path / "archive.pt").state_dict()
    assert again.keys() == clip.state_dict().keys()
    assert {tensor.dtype for tensor in again.values()} == {torch.float32}
    for name, tensor in clip.state_dict().items():
        assert torch.equal(again[name], tensor.half().float() if "weight" in name else tensor), name


class Malicious:
    """Writes a file if it is ever unpickled with code allowed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("load", [load_clip, load_checkpoint])
@pytest.mark.parametrize("kind", ["archive", "state dict", "bare pickle"])
def test_a_malicious_file_is_refused_and_not_run(tmp_path, kind, load):
    """Code in an archive, a checkpoint or a bare pickle is refused with the file's name, not run."""
    path, content = tmp_path / "clip.pt", {"visual.proj": Malicious(tmp_path / "ran")}
    if kind == "state dict":
        torch.save(content, path)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("clip/data.pkl", pickle.dumps(content, protocol=2))
            archive.writestr("clip/constants.pkl", b"\x80\x02).")
    with pytest.raises(HiVGError, match="clip.pt") as caught:
        load(path)
    assert not (tmp_path / "ran").exists() and "weights_only" not in str(caught.value)


def test_other_files_are_told_by_name(tmp_path):
    """A missing, empty or other file, weights that are missing, left over or of another shape, and
    LoRA pairs whose alpha is unknown: one sentence that names the file, and the weight."""
    state = openai_state(small_clip())
    theirs = {name: tensor.detach() for name, tensor in hugging_face_state(small_clip()).items()}
    for letter, shape in (("A", (4, 64)), ("B", (64, 4))):
        name = f"vision_model.encoder.layers.0.self_attn.q_proj.lora_{letter}.default.weight"
        theirs[name] = torch.zeros(shape)
    lost = "transformer.resblocks.0.ln_1.bias"
    files = {
        "list.safetensors": (2).to_bytes(8, "little") + b"[]",
        "text.pt": b"not weights\n",
        "short.pt": b"\x80\x02X",
        "list.pt": [1, 2],
        "tensor.pt": torch.zeros(3),
        "numbers.pt": {"visual.conv1.weight": 3},
        "lacking.pt": {name: tensor for name, tensor in state.items() if name != lost},
        "extra.pt": state | {"surprise.weight": torch.zeros(1)},
        "shape.pt": state | {"visual.proj": torch.zeros(3, 64)},
        "lora.pt": theirs,
        "peft.pt": {f"base_model.model.{name}": tensor for name, tensor in theirs.items()},
        "absent.pt": None,
    }
    weights = {"lacking.pt": lost, "extra.pt": "surprise.weight", "shape.pt": "visual.proj"}
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(HiVGError, match=f"{name}.*{weights.get(name, '')}") as caught:
            load_clip(tmp_path / name)
        assert "\n" not in str(caught.value)


def damaged(content, count=20):
    """Cuts of a file and copies with bytes overwritten, two of three near its ends, where headers
    lie; the same in every run."""
    rng, end = random.Random(0), min(2000, len(content))
    for _ in range(count):
        yield content[: rng.randrange(len(content))]
        changed = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            places = rng.randrange(len(content)), rng.randrange(end), -1 - rng.randrange(end)
            changed[rng.choice(places)] = rng.randrange(256)
        yield bytes(changed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["best.pt", "archive.pt", "clip.safetensors", "vocab.txt.gz"])
def test_a_damaged_file_is_one_sentence(tmp_path, tokenizer, name):
    """Cut or with other bytes, a file loads or is a HiVGError of one line that names it."""
    path, load = tmp_path / name, load_clip
    if name == "best.pt":
        save_checkpoint(path, tiny_model(tokenizer, 1, grounding_layers=1))
        load = load_checkpoint
    elif name == "archive.pt":
        save_torchscript(small_clip(), path)
    elif name == "clip.safetensors":
        state = {name: t.contiguous() for name, t in hugging_face_state(small_clip()).items()}
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        path.write_bytes(gzip.compress(tokenizer.merges_text.encode()))
        load = Tokenizer
    load(path)
    refused = 0
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        try:
            load(path)
        except HiVGError as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error)
    assert refused >= 20


# ------------------------------------------------------------------------ errors, writing, download


def serve(monkeypatch, content):
    """Let urlopen give these bytes, but break off half-way if it is asked for all of them. Returns
    the list of ranges that will have been asked for."""
    ranges = []

    def urlopen(request, timeout):
        asked = request.get_header("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        reply = io.BytesIO(content[start : len(content) if asked else len(content) // 2])
        reply.status, reply.headers = 206 if asked else 200, Message()
        reply.headers["Content-Length"] = str(len(content) - start)
        reply.headers["Content-Type"] = "application/octet-stream"
        ranges.append(asked)
        return reply

    monkeypatch.setattr(clip_model.urllib.request, "urlopen", urlopen)
    return ranges


def test_clip_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    """A CLIP by name is downloaded, in two parts if the first breaks off, and kept if its sha256 is
    right; it is not asked for again; a damaged copy, and no network, are told."""
    clip = small_clip()
    torch.save(openai_state(clip), file := io.BytesIO())
    content = file.getvalue()
    name = f"{hashlib.sha256(content).hexdigest()}/ViT-B-16.pt"
    monkeypatch.setitem(clip_model.CLIP_FILES, "ViT-B/16", name)
    with pytest.raises(HiVGError, match="ViT-B-16.pt.*cannot be fetched.*no network"):
        load_clip("ViT-B/16")
    with pytest.raises(HiVGError, match="bpe_simple_vocab"):
        tokenize("red one")
    serve(monkeypatch, content[:-1] + b"?")
    with pytest.raises(HiVGError, match="sha256"):
        load_clip("ViT-B/16")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    ranges = serve(monkeypatch, content)
    for _ in range(2):
        again = load_clip("ViT-B/16")
        assert all(torch.equal(a, b) for a, b in zip(clip.parameters(), again.parameters()))
    assert ranges == [None, f"bytes={len(content) // 2}-"]
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert path == tmp_path / "clip_cache/ViT-B-16.pt"
    path.write_bytes(b"damaged")
    with pytest.raises(HiVGError, match="ViT-B-16.pt.*delete it"):
        load_clip("ViT-B/16")


def test_atomic_write_leaves_no_half_written_file(tmp_path):
    """Stopped while writing, the old file is still whole and nothing else is left; a place that
    cannot be written is told."""
    path = tmp_path / "last.pt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), clip_model.atomic_write(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["last.pt"]
    with pytest.raises(HiVGError, match="last.pt/clip.pt cannot be written"):
        save_clip(small_clip(), path / "clip.pt")
