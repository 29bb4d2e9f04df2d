"""CLIP from scratch (Radford et al. 2021): two towers, the tokenizer, and the reading of weights.

    from clip_model import load_clip, tokenize
    clip = load_clip("ViT-B/16")                            # float32, eval mode
    logits = clip(images, tokenize(["a cat", "two dogs"]))  # [B, 2]

Reading order: attention, Block (one pre-norm transformer block), VisionTransformer and CLIP (the
towers; parameters have the names of OpenAI's files), Tokenizer (byte-pair encoding), load_clip with
the names of other formats, the file formats, and last errors, atomic writing and the cache.

Letters: B samples, N patches of an image, T text tokens, K tokens of either kind, d width of a
tower, D joint width, S image side and P patch side in pixels. This file can be copied into another
project as it is (MIT); it needs torch, ftfy and regex.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

# isort: split
# imports of the sections below the towers: tokenizer, weights, file formats, errors, cache
import argparse
import functools
import gzip
import html
import io
import itertools
import json
import os
import pickle
import re
import secrets
import socket
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import ftfy
import regex

# ------------------------------------------------------------------------------------------- towers


def attention(q, k, v, heads, mask=None, causal=False, dropout=0.0):
    """softmax(q k^T / sqrt(d / heads)) v, head by head (Vaswani et al. 2017, Eq. 1).

    q [B, Nq, d], k and v [B, Nk, d]. mask: bool, broadcast to [B, heads, Nq, Nk], True = attend.
    causal: query i attends to keys 1 ... i. dropout: probability, of the softmax.
    Returns [B, Nq, d].
    """
    # q [B, heads, Nq, d / heads], k and v [B, heads, Nk, d / heads]
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    return out.transpose(1, 2).flatten(2)  # [B, Nq, d]


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), CLIP's approximation of GELU, as silu(1.702 x) / 1.702: fewer kernels."""

    def forward(self, x):
        return F.silu(1.702 * x) / 1.702


class Attention(nn.Module):
    """Self-attention with q, k, v in one matrix [3d, d], as CLIP stores them."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal=False):  # [B, K, d] -> [B, K, d]
        q, k, v = self.in_proj(x).chunk(3, dim=-1)
        return self.out_proj(attention(q, k, v, self.heads, causal=causal))


class Block(nn.Module):
    """x = x + SelfAttention(LN_1(x));  x = x + MLP(LN_2(x)).

    hivg.py does not call an image block as a whole: there a bridge may stand between the two lines
    (`bridged_block`).
    """

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=QuickGELU(),
                c_proj=nn.Linear(4 * width, width),
            )
        )

    def forward(self, x, causal=False):  # [B, K, d] -> [B, K, d]
        x = x + self.attn(self.ln_1(x), causal)
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    """Holds the blocks of a tower, whose heads are 64 wide (one head if it is narrower than 128); the
    towers loop over them."""

    def __init__(self, width, layers):
        super().__init__()
        heads = max(1, width // 64)
        self.resblocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])


def noise(std, *sizes):
    """A Parameter of normal noise."""
    return nn.Parameter(torch.randn(sizes) * std)


class VisionTransformer(nn.Module):
    """CLIP's image tower: patches, [CLS], positions, pre-norm blocks, projection of [CLS]."""

    def __init__(self, config):
        super().__init__()
        width, patch = config.vision_width, config.patch_size
        tokens, scale = 1 + (config.image_size // patch) ** 2, width**-0.5
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = noise(scale, width)
        self.positional_embedding = noise(scale, tokens, width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = noise(scale, width, config.embed_dim)

    def embed(self, images):
        """images [B, 3, S, S] -> tokens before the first block [B, 1 + N, d], [CLS] first."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # [B, N, d]
        cls = self.class_embedding.expand(images.shape[0], 1, -1)  # [B, 1, d]
        return self.ln_pre(torch.cat([cls, patches], dim=1) + self.positional_embedding)

    def project(self, x):
        """The last block's output [B, 1 + N, d] -> image vectors [B, D], from [CLS]."""
        return self.ln_post(x[:, 0]) @ self.proj

    def forward(self, images):  # [B, 3, S, S] -> [B, D]
        x = self.embed(images)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.project(x)


@dataclass
class CLIPConfig:
    """Sizes of the two towers. The defaults are those of ViT-B/16."""

    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    text_width: int = 512
    text_layers: int = 12
    embed_dim: int = 512
    context_length: int = 77
    vocab_size: int = 49408


class CLIP(nn.Module):
    """Both towers. Parameters have the names of OpenAI's state dicts, with one difference:
    `attn.in_proj.weight` is `attn.in_proj_weight` there."""

    def __init__(self, config):
        super().__init__()
        self.config = replace(config)  # a copy: resize_positional_embedding changes it
        self.visual = VisionTransformer(config)
        width = config.text_width
        self.transformer = Transformer(width, config.text_layers)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = noise(0.01, config.context_length, width)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = noise(width**-0.5, width, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def text_hidden_states(self, tokens):
        """tokens [B, T] -> f^1, f^2, ...: the output of every text block, a list of [B, T, d].

        The tower is causal: what stands after the end token changes nothing before it, so T may be
        the length of the longest text.
        """
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        states = []
        for block in self.transformer.resblocks:
            x = block(x, causal=True)
            states.append(x)
        return states

    def project_text(self, hidden):
        """The last block's output [..., d] -> the joint space [..., D]."""
        return self.ln_final(hidden) @ self.text_projection

    def encode_image(self, images):
        """images [B, 3, S, S], normalised -> image vectors [B, D], not normalised."""
        return self.visual(images)

    def encode_text(self, tokens):
        """tokens [B, T] -> text vectors [B, D] at the end token, not normalised."""
        hidden = self.text_hidden_states(tokens)[-1]  # [B, T, d]
        return self.project_text(at(hidden, end_of_text(tokens)))

    def forward(self, images, tokens):
        """Cosines times the logit scale: images [B, 3, S, S] and texts, tokens [M, T] -> [B, M]."""
        image = F.normalize(self.encode_image(images))  # [B, D], by rows
        text = F.normalize(self.encode_text(tokens))  # [M, D]
        return self.logit_scale.exp() * image @ text.T

    def resize_positional_embedding(self, image_size):
        """Fit the image tower to another image side, in place (bicubic, antialiased).

        Raises HiVGError if the side is not a multiple of the patch side.
        """
        patch = self.config.patch_size
        if image_size % patch:
            raise HiVGError(f"Image size {image_size}: choose a multiple of the patches' {patch}.")
        if image_size == self.config.image_size:
            return
        old, new = self.config.image_size // patch, image_size // patch
        cls, grid = self.visual.positional_embedding.data.split([1, old * old])
        grid = grid.T.reshape(1, -1, old, old)  # [1, d, old, old]
        grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True)
        grid = grid.flatten(2)[0].T  # [new * new, d]
        self.visual.positional_embedding = nn.Parameter(torch.cat([cls, grid]))
        self.config.image_size = image_size


def end_of_text(tokens):
    """[B, T] -> [B]: the position of the end token, which has the largest id."""
    return tokens.argmax(dim=1)


def at(x, positions):
    """x [B, T, d] -> [B, d] at the positions [B]."""
    return x[torch.arange(x.shape[0], device=x.device), positions]


# ---------------------------------------------------------------------------------------- tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_PATTERN = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
MAX_MERGES = 49152 - 256 - 2  # CLIP's file holds more than CLIP uses


def bytes_to_unicode():
    """A printable character for each of the 256 bytes, so that merges can be kept in a text file.

    Printable latin-1 characters stand for themselves; the others are numbered from 256 on: byte 32
    (blank) is "Ġ". The order is that of the ids in the vocabulary: printable bytes come first.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    codes = [*printable, *range(256, 324)]  # there are 68 others
    return dict(zip(printable + others, map(chr, codes)))


class Tokenizer:
    """CLIP's byte-level BPE: "A red Cup" -> [49406, 320, 736, 1937, 49407] with CLIP's merges.

    merges_file: path of a merges file (plain or .gz: a header line, then one merge "a b" per line),
    or its text. The ids are: 256 symbols, the same 256 at the end of a word, one for each merge, the
    start token, the end token. Raises HiVGError for what cannot be read.
    """

    def __init__(self, merges_file):
        self.merges_text = str(merges_file)  # checkpoints contain it
        with user_error(f"{self.merges_text[:200]} is no vocabulary", "download it again"):
            if "\n" not in self.merges_text:  # a path
                opener = gzip.open if self.merges_text.endswith(".gz") else open
                with opener(merges_file, "rt", encoding="utf-8") as file:
                    self.merges_text = file.read()
            lines = self.merges_text.strip().split("\n")[1 : MAX_MERGES + 1]
            merges = [(first, second) for first, second in map(str.split, lines)]
        self.ranks = {merge: rank for rank, merge in enumerate(merges)}
        self.byte_symbols = bytes_to_unicode()
        symbols = list(self.byte_symbols.values())
        symbols += [symbol + "</w>" for symbol in symbols]
        symbols += ["".join(merge) for merge in merges] + [START, END]
        self.ids = {symbol: number for number, symbol in enumerate(symbols)}
        self.vocab_size = len(symbols)
        self.cache = {START: [self.ids[START]], END: [self.ids[END]]}  # word -> its ids

    def bpe(self, word):
        """The symbols of one word, a str or a list of characters. The neighbouring pair of lowest
        rank is merged first, until no pair has a rank: "cups" -> "c u p s</w>" -> "cu p s</w>" ->
        "cup s</w>" -> "cups</w>"."""
        parts = [*word[:-1], word[-1] + "</w>"]
        while pairs := [pair for pair in zip(parts, parts[1:]) if pair in self.ranks]:
            parts = merge_pair(parts, min(pairs, key=self.ranks.get))
        return parts

    def encode_word(self, word):
        """The ids of one word."""
        if word not in self.cache:
            symbols = [self.byte_symbols[byte] for byte in word.encode("utf-8", "replace")]
            self.cache[word] = [self.ids[part] for part in self.bpe(symbols)]
        return self.cache[word]

    def encode(self, text):
        """The ids of a text without start and end token. Only 10,000 characters are read."""
        return [number for word in split_words(text) for number in self.encode_word(word)]

    def unread_words(self, text):
        """The words of a text that do not fit into 77 tokens, start and end among them, any more."""
        words = split_words(text)
        ends = itertools.accumulate(len(self.encode_word(word)) for word in words)
        return [word for word, end in zip(words, ends) if end > 75]

    def unseen_words(self, text):
        """The words of a text, each once, that are no single symbol of a small vocabulary, which
        has one for every word of its training texts. [] with CLIP's vocabulary."""
        if self.vocab_size > MAX_MERGES:
            return []
        words = dict.fromkeys(split_words(text))
        return [word for word in words if word.isalnum() and len(self.encode_word(word)) > 1]

    def __call__(self, texts, context_length=77):
        """A str or a list of str -> LongTensor [M, context_length], zero after the end token.

        A longer text is cut so that the end token stays last.
        """
        if isinstance(texts, str):
            texts = [texts]
        tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(tokens, texts):
            ids = [self.ids[START], *self.encode(text)][: context_length - 1] + [self.ids[END]]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


@functools.lru_cache(maxsize=2**17)  # training reads the same texts in every epoch
def clean_text(text):
    """Encodings and HTML entities mended, one blank between words, lower case. 77 tokens hold far
    less than 10,000 characters."""
    text = text[:10_000]
    if "&" in text or not (text.isascii() and text.isprintable()):  # else: nothing to mend
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def split_words(text):
    """ "The boy's cup" -> ["the", "boy", "'s", "cup"]."""
    return WORD_PATTERN.findall(clean_text(text))


def merge_pair(parts, pair):
    """The symbols `parts` of a word with every neighbouring `pair` joined."""
    merged = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


@functools.cache
def clip_tokenizer():
    """The tokenizer with CLIP's own vocabulary, from $CLIP_CACHE or downloaded."""
    return Tokenizer(download_to_cache(VOCABULARY_URL, VOCABULARY_SHA256))


def tokenize(texts, context_length=77):
    """A str or a list of str -> LongTensor [M, context_length], with CLIP's vocabulary."""
    return clip_tokenizer()(texts, context_length)


# ------------------------------------------------------------------------------------------ weights

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of pixels

CLIP_URL = "https://openaipublic.azureedge.net/clip/models/"
CLIP_FILES = {  # below CLIP_URL; the long number is the file's sha256
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
}
VOCABULARY_URL = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def load_clip(name_or_path):
    """CLIP by name (a key of CLIP_FILES, downloaded into $CLIP_CACHE) or from a file: float32,
    eval mode.

    Reads OpenAI's TorchScript archives, state dicts in OpenAI's or Hugging Face's names (.pt, .bin,
    .safetensors, the folder of a `save_pretrained`, the "state_dict" of a training program), and
    the CLIP that HiVG's authors adapted, whose LoRA pairs are merged. All sizes follow from the
    shapes. The activation is QuickGELU and heads have 64 channels, as in OpenAI's weights; shapes
    do not tell, but a config.json or open_clip_config.json beside the file does. Raises HiVGError
    for anything else.
    """
    path = Path(name_or_path)
    if file := CLIP_FILES.get(name_or_path):
        path = download_to_cache(CLIP_URL + file, sha256=file.split("/")[0])
    elif path.is_dir():  # what save_pretrained of transformers and of open_clip write
        names = "*model.safetensors", "*model.bin", "*.index.json"
        path = next((file for name in names for file in path.glob(name)), path)
    not_clip = f"{path} is not a CLIP ViT checkpoint"
    hint = f"name a file of one, or one of {', '.join(CLIP_FILES)}"
    with user_error(not_clip, hint):
        if path.name.endswith(".index.json"):
            raise ValueError("its weights lie in several files: save it anew in one")
        state = read_weights(path)
        of_authors = "model" in state
        state = state.get("model") or state.get("state_dict") or state
        check_weights(state)
    with user_error(not_clip, hint, STATE_ERRORS):
        state = rename_keys(state, PROGRAMS_NAMES)
        if of_authors:
            state = merge_authors_lora(state)
        if "visual.conv1.weight" not in state:  # then names are Hugging Face's
            state = hugging_face_to_openai(state)
        state = {name.replace("in_proj_", "in_proj."): t.float() for name, t in state.items()}
        with torch.device("meta"):  # no memory, no random numbers: the file has all weights
            clip = CLIP(infer_config(state))
        clip.load_state_dict(state, assign=True)
    with user_error(not_clip, hint):  # the configs beside the file may be damaged, too
        check_family(path.parent, clip.config)
    return clip.eval()


PROGRAMS_NAMES = (  # what goes: prefixes of DDP, torch.compile and PEFT, and what are no weights
    (r"^(module\.|_orig_mod\.|base_model\.model\.)+", ""),
    (r"^(.*\.cross_.*|input_resolution|context_length|vocab_size)$", ""),
)


def save_clip(clip, path):
    """Write a state dict, which load_clip reads."""
    with atomic_write(path) as temporary:
        torch.save(clip.state_dict(), temporary)


def infer_config(state):
    """CLIPConfig from the shapes of a state dict in OpenAI's names."""
    # one "visual" or "transformer" for each block of the image or text tower
    towers = [name.split(".")[0] for name in state if name.endswith(".ln_1.weight")]
    vision_width, _, patch_size, _ = state["visual.conv1.weight"].shape
    context_length, text_width = state["positional_embedding"].shape
    return CLIPConfig(
        image_size=patch_size * math.isqrt(state["visual.positional_embedding"].shape[0] - 1),
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=towers.count("visual"),
        text_width=text_width,
        text_layers=towers.count("transformer"),
        embed_dim=state["text_projection"].shape[1],
        context_length=context_length,
        vocab_size=state["token_embedding.weight"].shape[0],
    )


def check_family(folder, config):
    """Raise ValueError if a config.json (Hugging Face) or open_clip_config.json in the folder of a
    CLIP describes another network than `CLIP`."""
    for path in filter(Path.is_file, (folder / "config.json", folder / "open_clip_config.json")):
        described = json.loads(path.read_text(encoding="utf-8"))
        described = described.get("model_cfg", described)
        if path.name == "open_clip_config.json" and not described.get("quick_gelu"):
            raise ValueError(f"{path} has no quick_gelu: its activation is another one")
        for tower, width in (("vision", config.vision_width), ("text", config.text_width)):
            values = {}
            for ending in ("config", "config_dict", "cfg"):  # old and new Hugging Face, open_clip
                values |= described.get(f"{tower}_{ending}") or {}
            heads = max(1, width // 64)
            expected = {  # the last two are open_clip's
                "hidden_act": "quick_gelu",
                "layer_norm_eps": 1e-5,
                "num_attention_heads": heads,
                "heads": heads,
                "head_width": 64,
            }
            for name, value in expected.items():
                found = values.get(name, value)
                if found != value:
                    raise ValueError(f"{path} has {name} {found} in {tower}, not {value}")


HUGGING_FACE_NAMES = (  # patterns of its names, and OpenAI's
    (r"\bposition_embedding\.weight", "positional_embedding"),
    (r"\bpatch_embedding\b", "conv1"),
    (r"^vision_model\.(embeddings\.)?", "visual."),
    (r"^text_model\.(embeddings\.)?", ""),
    (r"^visual_projection\.weight", "visual.proj"),
    (r"^text_projection\.weight", "text_projection"),
    (r"\bencoder\.layers\b", "transformer.resblocks"),
    (r"\bpre_layrnorm\b", "ln_pre"),
    (r"\bpost_layernorm\b", "ln_post"),
    (r"\bfinal_layer_norm\b", "ln_final"),
    (r"\blayer_norm([12])\b", r"ln_\1"),
    (r"\bself_attn\b", "attn"),
    (r"\bmlp\.fc1\b", "mlp.c_fc"),
    (r"\bmlp\.fc2\b", "mlp.c_proj"),
    (r".*position_ids", ""),
)


def hugging_face_to_openai(state):
    """A CLIP's state dict in Hugging Face's names -> float32, in this file's names."""
    state = rename_keys(state, HUGGING_FACE_NAMES)
    for name in list(state):
        if ".attn.q_proj." in name:  # q, k, v: three matrices there, one here
            qkv = [state.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
            state[name.replace("q_proj", "in_proj")] = torch.cat(qkv)
    for name in ("visual.proj", "text_projection"):  # OpenAI multiplies from the other side
        state[name] = state[name].T
    return state


def merge_authors_lora(state):
    """A CLIP of HiVG's authors -> Hugging Face's names: PEFT's prefixes are removed and its pairs
    merged, W = W_0 + (alpha / r) B A with their alpha = 16."""
    merged = rename_keys(state, PROGRAMS_NAMES[:1])
    for name in list(merged):
        if ".lora_A." in name:
            A = merged.pop(name).float()  # [r, in]
            B = merged.pop(name.replace("lora_A", "lora_B")).float()  # [out, r]
            weight = name.split(".lora_A.")[0] + ".weight"
            merged[weight] = merged[weight].float().addmm_(B, A, alpha=16 / A.shape[0])
    return merged


def rename_keys(state, patterns):
    """The entries of `state` under new names: each (pattern, replacement) of re.sub is applied in
    turn; what then has no name goes. `state` is emptied: large weights are in memory once."""
    renamed = {}
    for old_name in list(state):
        name = old_name
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        renamed[name] = state.pop(old_name)
    renamed.pop("", None)
    return renamed


# ------------------------------------------------------------------------------------- file formats


def read_weights(path):
    """The content of a file of weights: a TorchScript archive's state dict, that of a .safetensors
    file, or what torch.load reads. No code in the file is run; of classes only Namespace is
    admitted, in which programs keep their flags. A damaged file may raise any Exception: call it
    within `user_error`."""
    if str(path).endswith(".safetensors"):
        return read_safetensors(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/constants.pkl"):
                    return read_torchscript(archive, name.removesuffix("constants.pkl"))
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's message suggests weights_only=False, which runs code
        raise ValueError("it is damaged, or holds more than tensors and plain data") from None


def check_weights(state):
    """Raise ValueError if a state dict holds anything else than tensors."""
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError("it holds more than weights")


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists, tuples and dicts; refuses classes and functions, so that no
    code is run, but for those that `admitted` has another one for."""

    admitted = {}  # "module.name": what stands in for it

    def find_class(self, module, name):
        full_name = f"{module}.{name}"
        if full_name in self.admitted:
            return self.admitted[full_name]
        raise pickle.UnpicklingError(f"it asks for {full_name}, which is not plain data")


class ScriptModule:
    """A module of a TorchScript archive, as a plain holder of its attributes, which pickle sets."""


def rebuild_tensor(storage, offset, size, stride, requires_grad, hooks):
    return storage.as_strided(size, stride, offset)


class ArchiveUnpickler(PlainUnpickler):
    """Reads data.pkl of a TorchScript archive: tensors, and modules as ScriptModules."""

    admitted = {
        "torch._utils._rebuild_tensor_v2": rebuild_tensor,
        "collections.OrderedDict": OrderedDict,
        "torch.HalfStorage": torch.float16,
        "torch.FloatStorage": torch.float32,
        "torch.LongStorage": torch.int64,
        "torch.IntStorage": torch.int32,
    }

    def find_class(self, module, name):
        return ScriptModule if module.startswith("__torch__") else super().find_class(module, name)

    def persistent_load(self, reference):
        dtype, key = reference[1:3]
        return torch.frombuffer(bytearray(self.read_storage(key)), dtype=dtype)


def read_torchscript(archive, folder):
    """The state dict in a TorchScript archive, an open ZipFile whose content lies below `folder`, in
    its own names and dtypes."""
    unpickler = ArchiveUnpickler(io.BytesIO(archive.read(f"{folder}data.pkl")))
    unpickler.read_storage = lambda key: archive.read(f"{folder}data/{key}")
    state, modules = {}, [("", unpickler.load())]
    while modules:
        prefix, module = modules.pop()
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                state[prefix + name] = value
            elif isinstance(value, ScriptModule):
                modules.append((f"{prefix}{name}.", value))
    return state


def read_safetensors(path):
    """A .safetensors file: the length of a JSON header, the header, and the tensors' bytes."""
    dtypes = {
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
    }
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        content = bytearray(file.read())
    header.pop("__metadata__", None)
    state = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        flat = torch.frombuffer(content[start:end], dtype=dtypes[entry["dtype"]])
        state[name] = flat.reshape(entry["shape"])
    return state


# -------------------------------------------------------------------- errors, atomic writes, cache


class HiVGError(Exception):
    """An error that the user can mend: one sentence on what is wrong, with which file, and the way
    out. `run_main` prints it, on one line, without a traceback."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))


STATE_ERRORS = (LookupError, ValueError, RuntimeError, ArithmeticError)  # weights that do not fit


@contextmanager
def user_error(what, hint, errors=Exception):
    """Turn an error of opening, parsing or writing a file into a HiVGError "what (reason): hint.".

    Readers of damaged files raise errors of all kinds, of their own, too (struct.error, BadZipFile).
    What a file holds is converted outside: an error of the program must keep its traceback.
    """
    try:
        yield
    except errors as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise HiVGError(f"{what} ({reason[:500]}): {hint}.") from error


@contextmanager
def atomic_write(path):
    """Yield a temporary path and rename it to `path` on success: nobody sees half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with user_error(
        f"{path} cannot be written",
        "free some room or name another place",
        (OSError, RuntimeError),  # torch.save raises RuntimeError if the disk is full
    ):
        os.makedirs(path.parent, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


MEMORY_ERRORS = {  # words of torch's RuntimeErrors -> what its user can do
    "shared memory": "The processes that read images have too little shared memory: start the "
    "container with --shm-size=4g, or give --workers 0.",
    "DataLoader worker (pid": "A process that reads images was killed, mostly for lack of memory: give "
    "fewer --workers, or start the container with --shm-size=4g.",
    "can't allocate memory": "The machine has too little memory: give a smaller --batch-size.",
    "Connection closed by peer": "Another process has stopped; its error stands above.",
    "out of memory": "The GPU has too little memory: give a smaller --batch-size; train.py also has "
    "--checkpointing.",
}


def run_main(job, *args):
    """Run job(*args); HiVGError, Ctrl-C and lack of memory end the program with one sentence and
    exit status 1. Characters that the terminal does not have are printed as "?"."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="replace")
    try:
        job(*args)
    except HiVGError as error:
        # of a process that reads images: behind that one's traceback
        sys.exit(f"error: {str(error).rsplit('HiVGError: ')[-1]}")
    except RuntimeError as error:
        for words, advice in MEMORY_ERRORS.items():
            if words in str(error):
                sys.exit(f"error: {advice}")
        raise
    except KeyboardInterrupt:
        sys.exit("stopped by Ctrl-C: give the same command again, to train.py with --resume")


def download_to_cache(url, sha256):
    """Path of the file of `url` in $CLIP_CACHE (default ~/.cache/clip), downloaded if missing.

    Raises HiVGError without network, or if the file's sha256 is not the right one.
    """
    folder = Path(os.environ.get("CLIP_CACHE") or "~/.cache/clip").expanduser()
    path = folder / url.rsplit("/", 1)[1]
    if not path.is_file():
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # seconds without a byte
        try:
            with user_error(
                f"{path} is missing and {url} cannot be fetched", "put it there by hand"
            ):
                os.makedirs(folder, exist_ok=True)
                # under a name of its own, which is renamed if the sha256 is right
                torch.hub.download_url_to_file(url, path, sha256, progress=sys.stderr.isatty())
        finally:
            socket.setdefaulttimeout(patience)
    return path
