"""clip_model.py: tokenizer and towers against other implementations, and files from outside."""

import copy
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import socket
import zipfile
from contextlib import nullcontext
from email.message import Message
from http.client import BadStatusLine
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from benchmark import CLIP_CONFIGS
from conftest import check_refusals, close, hugging_face_state, shake, tiny_clip, tiny_model
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
    assert tokenizer.vocab_size == 521  # 512 symbols, 7 merges, start and end
    assert tokenizer("red  ONE Blue")[0, :6].tolist() == [519, 513, 515, 518, 520, 0]
    # "r" + "e" is the first merge; printable bytes are numbered from "!", which is 33: x is 120
    assert tokenizer.encode("rex") == [512, 256 + 87]
    assert tokenizer.encode("!;") == [0, 256 + 26]
    assert Tokenizer(tokenizer.merges_text).ids == tokenizer.ids  # as checkpoints contain it
    assert Tokenizer("#\na b\nb c</w>").bpe("abc") == ["ab", "c</w>"]  # the first merge goes first
    assert Tokenizer("#\nb c</w>\na b").bpe("abc") == ["a", "bc</w>"]


@pytest.mark.parametrize(
    "text, words",
    [
        (" The boy's 12\tCUPS!?", ["the", "boy", "'s", "1", "2", "cups", "!?"]),
        ("a&amp;amp;b<|endoftext|>", ["a", "&", "b", "<|endoftext|>"]),
        ("CAF\u00c3\u0089", ["café"]),  # UTF-8 that was read as latin-1
        ("&nbsp; \ufeff", []),
    ],
)
def test_words_of_a_text(text, words):
    """Encodings and entities are mended, then lower case, then CLIP's pattern."""
    assert clip_model.split_words(text) == words


def test_unseen_words(tokenizer):
    """Words that a small vocabulary has in parts are told, once each; CLIP's tells none."""
    text = "The RED one, ed the x and !;"
    assert tokenizer.unseen_words(text) == ["the", "ed", "and"]
    large = copy.copy(tokenizer)
    large.vocab_size = 49408
    assert large.unseen_words(text) == []


def test_a_longer_text_is_cut_and_ends_with_the_end_token(tokenizer):
    """A long text keeps its end token last; a str and a list of str are the same."""
    assert tokenizer("red one blue", 4).tolist() == [[519, 513, 515, 520]]
    assert tokenizer(["red " * 100])[0].tolist() == [519, *[513] * 75, 520]
    assert tokenizer("abcdefghijk" * 10**5)[0, -1] == 520  # a word of a million letters


@pytest.mark.parametrize("text", ["the red one, to the left!", "café ☕ 東京", "", "\ud800"])
def test_any_text_can_be_tokenized(tokenizer, text):
    """Any str has one end token, after its ids."""
    ids = tokenizer.encode(text)
    assert tokenizer(text)[0, : len(ids) + 2].tolist() == [519, *ids, 520]


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
    stem = "clip_tiny" if name in CLIP_FILES else "debiased_clip_tiny"
    golden = torch.load(shared / f"golden/{stem}_golden.pt", weights_only=True)
    images, tokens = golden["images"], golden["token_ids"]
    with torch.no_grad():
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
    text |= common | dict(max_position_embeddings=20, eos_token_id=520)
    vision |= common | dict(image_size=40)
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=48)
    return shake(transformers.CLIPModel(config)).eval()


@pytest.mark.parametrize("form", ["a folder", "training.pt"])
def test_clip_equals_transformers(tmp_path, their_clip, form):
    """transformers' CLIPModel in its own names, as it and as training programs save it, is read and
    gives its logits."""
    if form == "a folder":
        their_clip.save_pretrained(tmp_path / form)
    else:
        state = {f"module.{name}": tensor for name, tensor in their_clip.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state}, tmp_path / form)
    clip = load_clip(str(tmp_path / form))
    torch.manual_seed(1)
    images, tokens = torch.randn(3, 3, 40, 40), torch.randint(0, 519, (2, 20))
    tokens[0, 5], tokens[1, 19] = 520, 520
    tokens[0, 6:] = 0
    with torch.no_grad():
        expected = their_clip(input_ids=tokens, pixel_values=images).logits_per_image
        close(clip(images, tokens), expected, 1e-4)


def test_an_adapted_clip_equals_peft(tmp_path, their_clip):
    """CLIP with LoRA by PEFT, in the form of the authors' adapted CLIP, is merged on loading; what
    belongs to bridges is passed over."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(their_clip), config).eval()
    state = {n.replace(".base_layer.", "."): t for n, t in adapted.state_dict().items()}
    bridge = "base_model.model.vision_model.encoder.layers.0.cross_norm.weight"
    torch.save({"model": state | {bridge: torch.ones(128)}}, tmp_path / "clip.pth")
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        expected = adapted.get_image_features(images)
        # newer versions return more than a tensor
        expected = getattr(expected, "pooler_output", expected)
        close(load_clip(tmp_path / "clip.pth").encode_image(images), expected)


@pytest.mark.parametrize("image_size", [48, 80, 112])
def test_positional_embedding_is_resized_bicubically_and_antialiased(image_size):
    """Smaller and larger grids are those of Pillow's bicubic filter, which is antialiased; [CLS]
    and the same size are left alone; a size that patches do not fill is refused."""
    clip, side = tiny_clip(image_size=80), image_size // 16
    before = clip.visual.positional_embedding.data.clone()
    clip.resize_positional_embedding(image_size)
    after = clip.visual.positional_embedding.detach()
    assert torch.equal(after[0], before[0]) and (side != 5 or torch.equal(after, before))
    for channel in (0, 7):
        picture = Image.fromarray(before[1:, channel].view(5, 5).numpy().copy())
        expected = np.array(picture.resize((side, side), Image.BICUBIC))
        close(after[1:, channel].view(side, side), torch.from_numpy(expected), 1e-4)
    with pytest.raises(HiVGError, match="100"):
        clip.resize_positional_embedding(100)


def test_released_sizes():
    """The released models by name have as many weights as OpenAI's."""
    counts = {"ViT-B/32": 151_277_313, "ViT-B/16": 149_620_737}
    counts |= {"ViT-L/14": 427_616_513, "ViT-L/14@336px": 427_944_193}
    assert clip_model.CLIP_FILES.keys() == counts.keys()
    for name, count in counts.items():
        with torch.device("meta"):
            clip = CLIP(CLIP_CONFIGS[name])
        assert sum(p.numel() for p in clip.parameters()) == count


# ------------------------------------------------------------------------------- files from outside


def small_clip():
    return tiny_clip(vision_layers=1, text_layers=1, image_size=32)


def openai_state(clip):
    return {name.replace("in_proj.", "in_proj_"): t for name, t in clip.state_dict().items()}


def holder(module):
    """A module's weights and children in half precision, without what it computes."""
    root = nn.Module()
    for name, child in module.named_children():
        root.add_module(name, holder(child))
    for name, tensor in module.named_parameters(recurse=False):
        # matrices are stored column by column
        tensor = tensor.detach().half()
        root.register_buffer(name, tensor.T.contiguous().T if tensor.dim() == 2 else tensor)
    return root


def save_torchscript(clip, path):
    """A real TorchScript archive, as OpenAI's are."""
    root = holder(clip)
    root.register_buffer("input_resolution", torch.tensor(32))
    torch.jit.save(torch.jit.script(root), path)


def test_what_save_clip_writes_is_read_bit_for_bit(tmp_path):
    """load_clip gives the same weights, every size inferred."""
    clip = tiny_clip(vision_layers=2, text_layers=1, embed_dim=32, context_length=30, patch_size=8)
    save_clip(clip, tmp_path / "clip.pt")
    again = load_clip(tmp_path / "clip.pt")
    assert again.config == clip.config and not again.training
    close(again.state_dict(), clip.state_dict(), 0)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_load_clip_reads_torchscript_in_half_precision(tmp_path):
    """A real TorchScript archive of half-precision weights is read as data, in float32."""
    clip = small_clip()
    save_torchscript(clip, tmp_path / "archive.pt")
    state = {name: tensor.half().float() for name, tensor in clip.state_dict().items()}
    close(load_clip(tmp_path / "archive.pt").state_dict(), state, 0)


class Malicious:
    """Writes a file if it is ever unpickled with code allowed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("load", [load_clip, load_checkpoint])
def test_a_malicious_file_is_refused_and_not_run(tmp_path, load):
    """Code in an archive, a state dict or a bare pickle is refused with the file's name, not run."""
    content = {"visual.proj": Malicious(tmp_path / "ran")}
    pickled = pickle.dumps(content, protocol=2)
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("clip/data.pkl", pickled)
        archive.writestr("clip/constants.pkl", b"\x80\x02).")
    files = {"archive.pt": file.getvalue(), "pickle.pt": pickled, "state.pt": content}
    check_refusals(load, tmp_path, {name: (content, "") for name, content in files.items()})
    assert not (tmp_path / "ran").exists()


def test_other_files_are_told_by_name(tmp_path):
    """A missing, empty or other file, weights that are missing or left over, and
    LoRA pairs whose alpha is unknown: one sentence that names the file, and the reason."""
    state = openai_state(small_clip())
    pair = "vision_model.encoder.layers.0.self_attn.q_proj.lora_A.default.weight"
    theirs = hugging_face_state(small_clip()) | {pair: torch.zeros(4, 64)}
    lost = "transformer.resblocks.0.ln_1.bias"
    files = {  # name: (content, reason)
        "list.safetensors": ((2).to_bytes(8, "little") + b"[]", ""),
        "text.pt": (b"not weights\n", "damaged"),
        "short.pt": (b"\x80\x02X", ""),
        "list.pt": ([1, 2], ""),
        "tensor.pt": (torch.zeros(3), ""),
        "numbers.pt": ({"visual.conv1.weight": 3}, "more than weights"),
        "lacking.pt": ({name: tensor for name, tensor in state.items() if name != lost}, lost),
        "extra.pt": (state | {"surprise.weight": torch.zeros(1)}, "surprise.weight"),
        "lora.pt": (theirs, "lora_A"),
        "peft.pt": ({f"base_model.model.{name}": t for name, t in theirs.items()}, "lora_A"),
        "model.safetensors.index.json": (b"{}", "several files"),
        "absent.pt": (None, "No such file"),
    }
    check_refusals(load_clip, tmp_path, files)
    with pytest.raises(HiVGError, match="several files"):  # the only one that a folder may hold
        load_clip(tmp_path)


@pytest.mark.parametrize(
    "name, described, wrong",
    [
        ("config.json", {"vision_config": {"hidden_act": "gelu"}}, "hidden_act gelu"),
        ("config.json", {"text_config": {"hidden_act": "gelu"}}, "hidden_act gelu in text"),
        ("config.json", {"text_config_dict": {"num_attention_heads": 4}}, "num_attention_heads 4"),
        ("config.json", {"vision_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps 1e-06"),
        (
            "config.json",
            {"vision_config": {"num_attention_heads": 1, "hidden_act": "quick_gelu"}},
            None,
        ),
        ("config.json", {"model_type": "another program's"}, None),
        ("open_clip_config.json", {"model_cfg": {"embed_dim": 64}}, "no quick_gelu"),
        ("open_clip_config.json", {"model_cfg": {"embed_dim": 64, "quick_gelu": True}}, None),
        (
            "open_clip_config.json",
            {"quick_gelu": 1, "vision_cfg": {"head_width": 80}},
            "head_width 80",
        ),
        ("open_clip_config.json", {"quick_gelu": 1, "text_cfg": {"heads": 8}}, "heads"),
    ],
)
def test_a_config_beside_the_file_is_believed(tmp_path, name, described, wrong):
    """What shapes do not tell, the files of transformers and open_clip do: a CLIP of another family
    is refused."""
    save_clip(small_clip(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / name).write_text(json.dumps(described))
    message = f"pytorch_model.bin.*{name} has {wrong}"
    with pytest.raises(HiVGError, match=message) if wrong else nullcontext():
        load_clip(tmp_path)
    (tmp_path / name).write_text("[1]")
    with pytest.raises(HiVGError, match="pytorch_model.bin"):
        load_clip(tmp_path)


@pytest.mark.parametrize("tower, heads", [("vision", 1), ("text", 2)])
def test_heads_of_the_other_tower_do_not_fit(tmp_path, tower, heads):
    """Widths 128 and 64 have two heads and one."""
    save_clip(tiny_clip(vision_layers=1, text_layers=1, vision_width=128), tmp_path / "model.bin")
    described = {f"{tower}_config": {"num_attention_heads": heads}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(HiVGError, match=f"num_attention_heads {heads} in {tower}"):
        load_clip(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["best.pt", "archive.pt", "clip.safetensors", "vocab.txt.gz"])
def test_a_damaged_file_is_one_sentence(tmp_path, tokenizer, name):
    """Cut or with other bytes, most of them near its ends, where headers lie, a file loads or is a
    HiVGError of one line that names it."""
    path, load = tmp_path / name, load_clip
    if name == "best.pt":
        save_checkpoint(path, tiny_model(tokenizer, 1, grounding_layers=1))
        load = load_checkpoint
    elif name == "archive.pt":
        save_torchscript(small_clip(), path)
    elif name == "clip.safetensors":
        save_file = pytest.importorskip("safetensors.torch").save_file
        save_file(hugging_face_state(small_clip()), path)
    else:
        path.write_bytes(gzip.compress(tokenizer.merges_text.encode()))
        load = Tokenizer
    load(path)
    content, rng, refused = path.read_bytes(), random.Random(0), 0
    for number in range(30):
        changed, end = bytearray(content), min(1000, len(content))
        for _ in range(3):
            changed[rng.randrange(-end, end)] = rng.randrange(256)
        path.write_bytes(changed[: rng.randrange(len(content))] if number % 2 else changed)
        try:
            load(path)
        except HiVGError as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error)
    assert refused >= 15


# ------------------------------------------------------------------------ errors, writing, download


class Reply(io.BytesIO):
    """What urlopen returns."""

    def info(self):
        return Message()


def test_clip_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    """A CLIP by name is downloaded and kept if its sha256 is right, also if another program fetches
    it at the same time; no network, a download that breaks off and a damaged copy are told."""
    torch.save(openai_state(small_clip()), file := io.BytesIO())
    content, calls = file.getvalue(), []
    name = f"{hashlib.sha256(content).hexdigest()}/ViT-B-16.pt"
    monkeypatch.setitem(clip_model.CLIP_FILES, "ViT-B/16", name)
    path = tmp_path / "clip_cache/ViT-B-16.pt"

    def load(message=None):
        with pytest.raises(HiVGError, match=message) if message else nullcontext():
            close(load_clip("ViT-B/16").state_dict(), small_clip().state_dict(), 0)

    def urlopen(request):
        assert socket.getdefaulttimeout() == 30
        calls.append(request.full_url)
        if len(calls) == 1:
            load()  # another program
        return Reply(content)

    load("ViT-B-16.pt.*cannot be fetched.*no network")
    with pytest.raises(HiVGError, match="bpe_simple_vocab"):
        tokenize("red one")
    monkeypatch.setattr("torch.hub.urlopen", Mock(side_effect=BadStatusLine("a proxy's")))
    load("cannot be fetched")
    monkeypatch.setattr("torch.hub.urlopen", lambda request: Reply(content[:-9]))
    load("ViT-B-16.pt.*cannot be fetched.*hash")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    monkeypatch.setattr("torch.hub.urlopen", urlopen)
    for _ in range(2):
        load()
    assert calls == [clip_model.CLIP_URL + name] * 2 and socket.getdefaulttimeout() is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [path]
    path.write_bytes(b"damaged")
    load("ViT-B-16.pt is not a CLIP.*damaged")


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
