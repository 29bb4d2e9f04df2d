"""clip_model.py: tokenizer and towers against other implementations, and files from outside."""

import copy
import hashlib
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from conftest import shake, tiny_clip
from PIL import Image

import clip_model
from clip_model import HiVGError, Tokenizer, load_clip, save_clip, tokenize

# ----------------------------------------------------------------------------------------- tokenizer


def test_tokenize_equals_every_golden_row(shared, clip_vocabulary):
    """Ids are those of OpenAI's tokenizer, for awkward texts and over-long ones too."""
    rows = json.loads((shared / "golden/tokens.json").read_text())
    ids = tokenize([row["text"] for row in rows])
    assert ids.dtype == torch.long and ids.shape == (len(rows), 77)
    wrong = [row["text"] for row, found in zip(rows, ids.tolist()) if found != row["ids"]]
    assert not wrong


def test_tokenizer_by_hand(tokenizer):
    """Merges apply in order, words end with </w>, ids are symbols, symbols at a word's end, merges."""
    start, end = 512 + 7, 512 + 8
    assert tokenizer.vocab_size == 521
    red, one, blue = 512 + 1, 512 + 3, 512 + 6
    assert tokenizer("red  ONE Blue")[0, :6].tolist() == [start, red, one, blue, end, 0]
    # "r" + "e" is the first merge; printable bytes are numbered from "!", so "x" is 120 - 33
    assert tokenizer.encode("rex") == [512, 256 + 120 - 33]
    assert tokenizer.encode("!;") == [0, 256 + ord(";") - 33]
    assert tokenizer("red &amp;amp; one").tolist() == tokenizer("red & one").tolist()


@pytest.mark.parametrize(
    "text", ["the red one, second from left!", "café ☕ 東京", "it's 3 o'clock"]
)
def test_decode_undoes_encode(tokenizer, text):
    """decode(encode(text)) is the text, any script of it, up to blanks."""
    assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text.replace(" ", "")


def test_a_longer_text_is_cut_and_ends_with_the_end_token(tokenizer):
    """A long text keeps its end token last; a str and a list of str are the same."""
    ids = tokenizer("red " * 100)
    assert ids.shape == (1, 77) and ids[0, -1] == 520 and (ids[0, 1:-1] == 513).all()
    assert torch.equal(tokenizer(["red " * 100]), ids)
    assert tokenizer("red one blue", 4).tolist() == [[519, 513, 515, 520]]


@pytest.mark.parametrize(
    "content", [b"\x1f\x8bgarbage", b"# header\nno merge is this\n", b"\xff\xfe\xfa"]
)
def test_a_broken_vocabulary_is_told(tmp_path, content):
    """A file that is no vocabulary is the project's own error with the file's name."""
    for name in ("broken.txt", "broken.txt.gz"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(HiVGError, match=name):
            Tokenizer(tmp_path / name)


# -------------------------------------------------------------------------------------------- towers


CLIP_FILES = ("clip_tiny.pt", "clip_tiny_state_dict.pt", "clip_tiny_huggingface.bin")


@pytest.mark.parametrize("name", CLIP_FILES)
def test_features_equal_golden(shared, name):
    """OpenAI's archive, the plain state dict and Hugging Face's give OpenAI's own features."""
    clip = load_clip(str(shared / "golden" / name))
    golden = torch.load(shared / "golden/clip_tiny_golden.pt", weights_only=True)
    assert not clip.training and {p.dtype for p in clip.parameters()} == {torch.float32}

    def close(found, expected):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

    images, tokens = golden["images"], golden["token_ids"]
    with torch.no_grad():
        close(clip.encode_image(images), golden["encode_image"])
        close(clip.encode_text(tokens), golden["encode_text"])
        close(clip(images, tokens), golden["logits_per_image"])
        close(torch.stack(clip.text_states(tokens)), golden["text_hidden_states"][1:])


def test_the_adapted_clip_equals_golden(shared):
    """The authors' adapted CLIP, its LoRA of both towers folded, gives the golden features."""
    clip = load_clip(shared / "golden/debiased_clip_tiny.pth")
    names = ("clip_tiny_golden.pt", "debiased_clip_tiny_golden.pt")
    inputs, golden = (torch.load(shared / "golden" / n, weights_only=True) for n in names)
    with torch.no_grad():
        found = clip.encode_image(inputs["images"]), clip.encode_text(inputs["token_ids"])
    expected = golden["image_features"], golden["text_features"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def their_clip():
    """transformers' CLIPModel with random weights, biases and layer norms among them."""
    transformers = pytest.importorskip("transformers")
    common = dict(num_hidden_layers=2, hidden_act="quick_gelu", layer_norm_eps=1e-5)
    vision = dict(hidden_size=128, intermediate_size=512, num_attention_heads=2, patch_size=8)
    text = dict(hidden_size=64, intermediate_size=256, num_attention_heads=1, vocab_size=521)
    text |= dict(max_position_embeddings=20, eos_token_id=520, bos_token_id=519, pad_token_id=0)
    config = transformers.CLIPConfig(
        vision_config=vision | common | {"image_size": 40},
        text_config=text | common,
        projection_dim=48,
    )
    return shake(transformers.CLIPModel(config)).eval()


@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
def test_clip_equals_transformers(tmp_path, their_clip, ending):
    """transformers' CLIPModel, saved in its own names, is read and gives its features and logits."""
    path = tmp_path / f"model{ending}"
    state = their_clip.state_dict()
    if ending == ".bin":
        torch.save(state, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(
            {name: t.contiguous() for name, t in state.items()}, path, {"format": "pt"}
        )
    clip = load_clip(path)
    torch.manual_seed(1)
    images, tokens = torch.randn(3, 3, 40, 40), torch.randint(0, 519, (2, 20))
    tokens[0, 5], tokens[1, 19] = 520, 520
    tokens[0, 6:] = 0
    with torch.no_grad():
        out = their_clip(input_ids=tokens, pixel_values=images)
        image, text = clip.encode_image(images), clip.encode_text(tokens)
        logits = clip(images, tokens)
    image, text = (x / x.norm(dim=-1, keepdim=True) for x in (image, text))
    torch.testing.assert_close(image, out.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text, out.text_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, out.logits_per_image, atol=1e-4, rtol=0)


def test_an_adapted_clip_equals_peft(tmp_path, their_clip):
    """CLIP with LoRA by PEFT, in the form of the authors' adapted CLIP: folded on loading; what
    belongs to bridges is passed over."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets)
    adapted = peft.get_peft_model(copy.deepcopy(their_clip), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    state = {n.replace(".base_layer.", "."): t for n, t in adapted.state_dict().items()}
    bridge = "base_model.model.vision_model.encoder.layers.0.cross_norm.weight"
    torch.save({"model": state | {bridge: torch.ones(128)}}, tmp_path / "clip.pth")
    clip, images = load_clip(tmp_path / "clip.pth"), torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        found, expected = clip.encode_image(images), adapted.eval().get_image_features(images)
        expected = getattr(expected, "pooler_output", expected)  # as newer versions return it
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        plain = their_clip.get_image_features(images)
        assert (getattr(plain, "pooler_output", plain) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    "content",
    [
        (10**15).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (70).to_bytes(8, "little")
        + b'{"vision_model.x":{"dtype":"F32","shape":[4],"data_offsets":[0,999]}}  ',
    ],
)
def test_a_safetensors_file_that_lies_is_told(tmp_path, content):
    """A header longer than the file, of another kind, or with tensors that are not there."""
    (tmp_path / "clip.safetensors").write_bytes(content)
    with pytest.raises(HiVGError, match="clip.safetensors"):
        load_clip(tmp_path / "clip.safetensors")


def test_attention_equals_torch():
    """Attention with CLIP's fused matrix, masked, equals torch's nn.MultiheadAttention."""
    ours = shake(clip_model.Attention(48, 4)).eval()
    theirs = torch.nn.MultiheadAttention(48, 4, batch_first=True).eval()
    state = {name.replace("in_proj.", "in_proj_"): p for name, p in ours.state_dict().items()}
    theirs.load_state_dict(state)
    x, padding = torch.randn(3, 9, 48), torch.zeros(3, 9, dtype=torch.bool)
    padding[1, 5:], padding[2, 2:4] = True, True
    expected = theirs(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    torch.testing.assert_close(ours(x, ~padding[:, None, None, :]), expected, atol=1e-5, rtol=0)
    causal = torch.ones(9, 9).triu(1).bool()
    expected = theirs(x, x, x, attn_mask=causal, need_weights=False)[0]
    torch.testing.assert_close(ours(x, causal=True), expected, atol=1e-5, rtol=0)


def test_text_states_do_not_depend_on_padding(tokenizer):
    """Text is causal: cutting the padding off, or other ids after the end token, change nothing."""
    clip, tokens = tiny_clip(), tokenizer(["red one", "the blue one"])
    length = int(tokens.argmax(dim=1).max()) + 1
    other = tokens.clone()
    other[:, length:] = 7
    for changed in (tokens[:, :length], other):
        torch.testing.assert_close(clip.encode_text(changed), clip.encode_text(tokens))


def test_positional_embedding_resize():
    """Another image size: a constant grid stays constant, a slope stays one, [CLS] and the same
    size are left alone, and a size that patches do not fill is refused."""
    clip = tiny_clip(image_size=64, patch_size=16)
    before = clip.visual.positional_embedding.data.clone()
    clip.resize(64)
    assert torch.equal(clip.visual.positional_embedding, before)
    grid = torch.full((4, 4, 64), 3.0)
    grid[..., 0] = torch.arange(4.0)  # grows from left to right
    grid[..., 1] = torch.arange(4.0)[:, None]  # and from top to bottom
    clip.visual.positional_embedding.data[1:] = grid.flatten(0, 1)
    clip.resize(112)
    after = clip.visual.positional_embedding
    assert clip.config.image_size == 112 and after.shape == (50, 64)
    assert torch.equal(after[0], before[0])
    after = after[1:].view(7, 7, 64)
    torch.testing.assert_close(after[..., 2:], torch.full((7, 7, 62), 3.0), atol=1e-4, rtol=0)
    assert (after[:, 1:, 0] > after[:, :-1, 0]).all() and (after[1:, :, 1] > after[:-1, :, 1]).all()
    torch.testing.assert_close(after[..., 0], after[:1, :, 0].expand(7, 7), atol=1e-4, rtol=0)
    assert clip.encode_image(torch.randn(1, 3, 112, 112)).shape == (1, 64)
    with pytest.raises(HiVGError, match="100"):
        clip.resize(100)


@pytest.mark.parametrize("image_size", [48, 112])
def test_positional_embedding_resize_is_bicubic_and_antialiased(image_size):
    """Smaller and larger grids are those of Pillow's bicubic filter, which is antialiased."""
    clip = tiny_clip(image_size=80, patch_size=16)
    before = clip.visual.positional_embedding.data[1:].view(5, 5, 64)
    clip.resize(image_size)
    side = image_size // 16
    after = clip.visual.positional_embedding[1:].view(side, side, 64)
    for channel in (0, 7):
        picture = Image.fromarray(before[..., channel].numpy().copy())
        expected = np.array(picture.resize((side, side), Image.BICUBIC))
        torch.testing.assert_close(
            after[..., channel].detach(), torch.from_numpy(expected), atol=1e-4, rtol=0
        )


# ------------------------------------------------------------------------------- files from outside


def test_save_clip_and_load_clip(tmp_path):
    """What save_clip writes is in OpenAI's names and is read back bit for bit, every size inferred."""
    clip = tiny_clip(vision_layers=2, text_layers=1, embed_dim=32, context_length=30, patch_size=8)
    save_clip(clip, tmp_path / "clip.pt")
    names = torch.load(tmp_path / "clip.pt", weights_only=True).keys()
    assert "visual.transformer.resblocks.1.attn.in_proj_weight" in names
    again = load_clip(tmp_path / "clip.pt")
    assert again.config == clip.config and not again.training
    assert all(torch.equal(a, b) for a, b in zip(clip.parameters(), again.parameters()))
    assert os.listdir(tmp_path) == ["clip.pt"]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_load_clip_reads_torchscript_in_half_precision(tmp_path):
    """A real TorchScript archive of half-precision weights is read as data, in fp32."""
    clip = tiny_clip(vision_layers=1, text_layers=1)

    def holder(state):
        """A module that holds weights under their dotted names, as OpenAI's do, and a method."""
        module = torch.nn.Module()
        for name, tensor in state.items():
            *path, last = name.replace("in_proj.", "in_proj_").split(".")
            at = module
            for part in path:
                if not hasattr(at, part):
                    at.add_module(part, torch.nn.Module())
                at = getattr(at, part)
            at.register_buffer(last, tensor)
        return module

    state = {n: p.half() if "weight" in n else p for n, p in clip.state_dict().items()}
    module = holder(state | {"input_resolution": torch.tensor(64)})
    torch.jit.save(torch.jit.script(module), tmp_path / "archive.pt")
    again = load_clip(tmp_path / "archive.pt").state_dict()
    assert again.keys() == clip.state_dict().keys()
    for name, tensor in state.items():
        assert torch.equal(again[name], tensor.float()), name


class Malicious:
    """Writes a file if it is ever unpickled with code allowed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["archive", "state dict", "bare pickle"])
def test_a_malicious_file_is_refused_and_not_run(tmp_path, kind):
    """Code in an archive, a checkpoint or a bare pickle is refused with the file's name, not run."""
    path, ran = tmp_path / "clip.pt", tmp_path / "ran"
    content = {"visual.proj": Malicious(ran)}
    if kind == "state dict":
        torch.save(content, path)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("clip/data.pkl", pickle.dumps(content, protocol=2))
            archive.writestr("clip/constants.pkl", b"\x80\x02).")
    with pytest.raises(HiVGError, match="clip.pt"):
        load_clip(path)
    assert not ran.exists()


def test_other_files_are_told_by_name(tmp_path):
    """A missing, empty or other file, and a state dict that lacks or mixes weights, is one sentence."""
    state = {n.replace("in_proj.", "in_proj_"): p for n, p in tiny_clip().state_dict().items()}
    lacking = {n: p for n, p in state.items() if n != "visual.transformer.resblocks.2.ln_1.bias"}
    mixed = state | {"visual.proj": torch.zeros(3, 64)}
    files = {
        "text.pt": b"not weights\n",
        "empty.pt": b"",
        "list.pt": [1, 2],
        "tensor.pt": torch.zeros(3),
        "resnet.pt": {"conv1.weight": torch.zeros(3, 3)},
        "numbers.pt": {"visual.conv1.weight": 3},
        "lacking.pt": lacking,
        "mixed.pt": mixed,
    }
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
    torch.save(state, tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:50_000])
    load_clip(tmp_path / "whole.pt")
    for name in [*files, "half.pt", "absent.pt"]:
        with pytest.raises(HiVGError, match=name) as caught:
            load_clip(tmp_path / name)
        assert "\n" not in str(caught.value), name


def serve(monkeypatch, content):
    """Let urlopen give these bytes."""
    reply = io.BytesIO(content)
    reply.headers = {"Content-Length": str(len(content))}
    monkeypatch.setattr(clip_model.urllib.request, "urlopen", lambda *a, **k: reply)


def test_no_network_is_told(tmp_path):
    """A model that is not in the cache, and no network: one sentence, and no file is left behind."""
    with pytest.raises(HiVGError, match="ViT-B-16.pt.*cannot be reached"):
        load_clip("ViT-B/16")
    with pytest.raises(HiVGError, match="bpe_simple_vocab"):
        tokenize("red one")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_download_is_kept_only_if_its_sha256_is_right(tmp_path, monkeypatch):
    """Wrong bytes leave nothing behind; the right ones are kept, and are not asked for again."""
    content, url = b"the file" * 1000, "https://example.org/models/file.bin"
    sha256 = hashlib.sha256(content).hexdigest()
    serve(monkeypatch, content[:-1])
    with pytest.raises(HiVGError, match="sha256"):
        clip_model.cached(url, sha256)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    serve(monkeypatch, content)
    path = clip_model.cached(url, sha256)
    assert path.read_bytes() == content and path.parent == tmp_path / "clip_cache"
    monkeypatch.setattr(clip_model.urllib.request, "urlopen", None)
    assert clip_model.cached(url, sha256) == path
    path.write_bytes(b"damaged")
    with pytest.raises(HiVGError, match="file.bin.*delete it"):
        clip_model.cached(url, sha256)


def test_replacing_leaves_no_half_written_file(tmp_path):
    """Stopped while writing, the old file is still whole and nothing else is left."""
    path = tmp_path / "last.pt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), clip_model.replacing(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["last.pt"]
