"""CLIP from scratch (Radford et al. 2021): two towers, the tokenizer, and the reading of weights.

    from clip_model import load_clip, tokenize
    clip = load_clip("ViT-B/16")                            # float32, eval mode
    logits = clip(images, tokenize(["a cat", "two dogs"]))  # [B, 2]

Reading order: attention, Block (one pre-norm transformer block), VisionTransformer and CLIP (the
towers; parameters have the names of OpenAI's files), Tokenizer (byte-pair encoding), load_clip with
the names of other formats, the file formats, and last errors, atomic writing and download. hivg.py
walks through the blocks of these towers itself.

Letters: B samples, N patches of an image, T text tokens, K tokens of either kind, d width of a
tower, D joint width, S image side and P patch side in pixels. This file can be copied into another
project as it is (MIT); it needs torch, ftfy, regex and tqdm.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

# isort: split
# imports of the sections below the towers: tokenizer, weights, file formats, errors, download
import functools
import glob
import gzip
import hashlib
import html
import http.client
import io
import json
import os
import pickle
import re
import secrets
import struct
import sys
import time
import unicodedata
import urllib.error
import urllib.request
import zipfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import ftfy
import regex
from tqdm import tqdm

# ------------------------------------------------------------------------------------------- towers


def attention(q, k, v, heads, mask=None, causal=False, dropout=0.0):
    """softmax(q k^T / sqrt(d / heads)) v, head by head (Vaswani et al. 2017, Eq. 1).

    q [B, Nq, d], k and v [B, Nk, d]. mask: bool, broadcast to [B, heads, Nq, Nk], True = attend.
    causal: query i attends to keys 1 ... i. dropout: probability, of the softmax.
    Returns [B, Nq, d].
    """
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, Nq, d / heads]
    k = k.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, Nk, d / heads]
    v = v.unflatten(-1, (heads, -1)).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    return out.transpose(1, 2).flatten(2)  # [B, Nq, d]


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x): CLIP's approximation of GELU."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


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
    """x = x + SelfAttention(LN_1(x));  x = x + MLP(LN_2(x))."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        c_fc, c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=QuickGELU(), c_proj=c_proj))

    def forward(self, x, causal=False):  # [B, K, d] -> [B, K, d]
        x = x + self.attn(self.ln_1(x), causal)
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    """The blocks of a tower; heads are 64 wide."""

    def __init__(self, width, layers):
        super().__init__()
        heads = max(1, width // 64)
        self.resblocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])


class VisionTransformer(nn.Module):
    """CLIP's image tower: patches, [CLS], positions, pre-norm blocks, projection of [CLS]."""

    def __init__(self, config):
        super().__init__()
        width, patch = config.vision_width, config.patch_size
        tokens = 1 + (config.image_size // patch) ** 2
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, config.embed_dim) * width**-0.5)

    def embed(self, images):
        """images [B, 3, S, S] -> tokens before the first block [B, 1 + N, d], [CLS] first."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # [B, N, d]
        cls = self.class_embedding.expand(len(images), 1, -1)  # [B, 1, d]
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
        self.positional_embedding = nn.Parameter(torch.randn(config.context_length, width) * 0.01)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, config.embed_dim) * width**-0.5)
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

    def project_text(self, state):
        """The last block's output [..., d] -> the joint space [..., D]."""
        return self.ln_final(state) @ self.text_projection

    def encode_image(self, images):
        """images [B, 3, S, S], normalised -> image vectors [B, D], not normalised."""
        return self.visual(images)

    def encode_text(self, tokens):
        """tokens [B, T] -> text vectors [B, D] at the end token, not normalised."""
        state = self.text_hidden_states(tokens)[-1]  # [B, T, d]
        end = tokens.argmax(dim=1)  # the end token has the largest id
        return self.project_text(state[torch.arange(len(tokens)), end])

    def forward(self, images, tokens):
        """`similarity` of images [B, 3, S, S] and texts, tokens [M, T]: -> [B, M]."""
        return self.similarity(self.encode_image(images), self.encode_text(tokens))

    def similarity(self, image, text):
        """Cosines times the logit scale: vectors of any length [B, D], [M, D] -> logits [B, M]."""
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
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
        grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
        grid = grid.flatten(2)[0].T  # [new * new, d]
        self.visual.positional_embedding = nn.Parameter(torch.cat([cls, grid]))
        self.config.image_size = image_size


# ---------------------------------------------------------------------------------------- tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_PATTERN = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # fillers, which are shown as nothing
MAX_CHARACTERS = 10_000  # of a text; 77 tokens hold far less
MAX_MERGES = 49152 - 256 - 2  # CLIP's file holds more than CLIP uses
CLOSED_VOCABULARY = "closed vocabulary: "  # in a header: the words follow


def bytes_to_unicode():
    """A printable character for each of the 256 bytes, so that merges can be kept in a text file.

    Printable latin-1 characters stand for themselves; the others are numbered from 256 on: byte 32
    (blank) is "Ġ". The order is that of the ids in the vocabulary: printable bytes come first.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols.update({byte: chr(256 + number) for number, byte in enumerate(others)})
    return symbols


class Tokenizer:
    """CLIP's byte-level BPE: "A red Cup" -> [49406, 320, 736, 1937, 49407] with CLIP's merges.

    merges_file: path of a merges file (plain or .gz: a header line, then one merge "a b" per line),
    or an open text file. A header with CLOSED_VOCABULARY lists all words of the training texts. The
    ids are: 256 symbols, the same 256 at the end of a word, one for each
    merge, the start token, the end token. Raises HiVGError if a path cannot be read, ValueError for
    an open file with a line that is not two symbols.
    """

    def __init__(self, merges_file):
        if isinstance(merges_file, io.TextIOBase):
            self.merges_text = merges_file.read()  # checkpoints contain it
            merges = parse_merges(self.merges_text)
        else:
            with user_error(f"The vocabulary {merges_file} cannot be read", "download it again"):
                opener = gzip.open if str(merges_file).endswith(".gz") else open
                with opener(merges_file, "rt", encoding="utf-8") as file:
                    self.merges_text = file.read()
                merges = parse_merges(self.merges_text)
        header = self.merges_text.partition("\n")[0]
        _, _, listed = header.partition(CLOSED_VOCABULARY)
        self.closed_words = set(listed.split())  # none in CLIP's own vocabulary
        self.ranks = {merge: rank for rank, merge in enumerate(merges)}
        self.byte_symbols = bytes_to_unicode()
        symbols = list(self.byte_symbols.values())
        vocabulary = symbols + [symbol + "</w>" for symbol in symbols]
        vocabulary += [first + second for first, second in merges] + [START, END]
        self.ids = {symbol: number for number, symbol in enumerate(vocabulary)}
        self.symbols = vocabulary
        self.vocab_size = len(vocabulary)
        self.cache = {START: [self.ids[START]], END: [self.ids[END]]}  # word -> its ids

    def bpe(self, word):
        """The symbols of one word. The neighbouring pair of lowest rank is merged first, until no
        pair has a rank: "cups" -> "c u p s</w>" -> "cu p s</w>" -> "cup s</w>" -> "cups</w>"."""
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:]))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, math.inf))
            if best not in self.ranks:
                break
            parts = merge_pair(parts, best)
        return parts

    def encode(self, text):
        """The ids of a text without start and end token. Only 10,000 characters are read."""
        ids = []
        for word in WORD_PATTERN.findall(clean_text(text)):
            if word not in self.cache:
                symbols = [self.byte_symbols[byte] for byte in word.encode("utf-8", "replace")]
                self.cache[word] = [self.ids[part] for part in self.bpe("".join(symbols))]
            ids += self.cache[word]
        return ids

    def unseen_words(self, text):
        """The words of a text that a closed vocabulary does not list, each once: they did not occur
        in training. [] with CLIP's vocabulary."""
        if not self.closed_words:
            return []
        words = dict.fromkeys(WORD_PATTERN.findall(clean_text(text)))
        return [word for word in words if word.isalnum() and word not in self.closed_words]

    def add_words(self, texts):
        """Add the words of more training texts to the header of a closed vocabulary."""
        if not self.closed_words:
            return
        new = {word for text in texts for word in self.unseen_words(text)}
        header, line_end, merges = self.merges_text.partition("\n")
        self.closed_words |= new
        self.merges_text = " ".join([header, *sorted(new)]) + line_end + merges

    def decode(self, ids):
        """The text of ids; every word is followed by a blank."""
        byte_of = {symbol: byte for byte, symbol in self.byte_symbols.items()}
        text = "".join(self.symbols[int(number)] for number in ids).replace("</w>", " ")
        return bytes(byte_of.get(symbol, 32) for symbol in text).decode("utf-8", "replace")

    def __call__(self, texts, context_length=77):
        """A str or a list of str -> LongTensor [N, context_length], zero after the end token.

        A longer text is cut so that the end token stays last.
        """
        if isinstance(texts, str):
            texts = [texts]
        rows = []
        for text in texts:
            ids = [self.ids[START], *self.encode(text)]
            ids = ids[: context_length - 1] + [self.ids[END]]
            rows.append(ids + [0] * (context_length - len(ids)))
        return torch.tensor(rows, dtype=torch.long).view(len(texts), context_length)


@functools.lru_cache(maxsize=2**17)  # training reads the same texts in every epoch
def clean_text(text):
    """Encodings and HTML entities mended, one blank between words, lower case."""
    text = ftfy.fix_text(text[:MAX_CHARACTERS])
    text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


def is_empty(text):
    """Whether a text says nothing: it has no letter, number, mark of punctuation or symbol."""
    if re.fullmatch(r"[\w ,.'-]*[a-zA-Z0-9][\w ,.'-]*", text, re.ASCII):
        return False  # as most texts: there is nothing to clean, which takes long
    text = clean_text(text).replace(START, "").replace(END, "")
    return all(unicodedata.category(c)[0] not in "LNPS" or c in BLANK_LETTERS for c in text)


def merge_pair(parts, pair):
    """The symbols `parts` of a word with every neighbouring `pair` joined."""
    merged = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def parse_merges(text):
    """The merges of a merges file, a list of (symbol, symbol). Raises ValueError for others."""
    merges = [tuple(line.split()) for line in text.strip().split("\n")[1 : MAX_MERGES + 1]]
    if any(len(merge) != 2 for merge in merges):
        raise ValueError("a line of the vocabulary is not two symbols")
    return merges


@functools.cache
def clip_tokenizer():
    """The tokenizer with CLIP's own vocabulary, from $CLIP_CACHE or downloaded."""
    return Tokenizer(download_to_cache(VOCABULARY_URL, VOCABULARY_SHA256))


def tokenize(texts, context_length=77):
    """A str or a list of str -> LongTensor [N, context_length], with CLIP's vocabulary."""
    return clip_tokenizer()(texts, context_length)


# ------------------------------------------------------------------------------------------ weights

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of pixels

LARGE = dict(patch_size=14, vision_width=1024, vision_layers=24, text_width=768, embed_dim=768)
CLIP_CONFIGS = {  # the released vision transformers
    "ViT-B/32": CLIPConfig(patch_size=32),
    "ViT-B/16": CLIPConfig(),
    "ViT-L/14": CLIPConfig(**LARGE),
    "ViT-L/14@336px": CLIPConfig(image_size=336, **LARGE),
}
CLIP_URL = "https://openaipublic.azureedge.net/clip/models/"
CLIP_FILES = {  # below CLIP_URL; the long number is the file's sha256
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
}
VOCABULARY_URL = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # scalars in OpenAI's archives


def load_clip(name_or_path):
    """CLIP by name (a key of CLIP_CONFIGS, downloaded into $CLIP_CACHE) or from a file: float32,
    eval mode.

    Reads OpenAI's TorchScript archives, state dicts in OpenAI's or Hugging Face's names (.pt, .bin,
    .safetensors), and the CLIP that HiVG's authors adapted, whose LoRA pairs are merged. All sizes
    follow from the shapes. The activation is QuickGELU and heads have 64 channels, as in OpenAI's
    weights; shapes do not tell, but a config.json beside the file does (Hugging Face). Raises
    HiVGError for anything else.
    """
    path = name_or_path
    if name_or_path in CLIP_FILES:
        file = CLIP_FILES[name_or_path]
        path = download_to_cache(CLIP_URL + file, sha256=file.split("/")[0])
    hint = f"name a file of one, or one of {', '.join(CLIP_FILES)}"
    with user_error(f"{path} is not a CLIP ViT checkpoint", hint):
        state = read_weights(path)
        if "model" in state:  # the authors' adapted CLIP; its bridges, if any, are left out
            state = merge_authors_lora(state["model"])
            state = {name: tensor for name, tensor in state.items() if ".cross_" not in name}
        if any(".lora_" in name for name in state):
            raise ValueError("it has LoRA pairs, whose alpha it does not tell: merge them first")
        if any(name.startswith("vision_model.") for name in state):
            state = hugging_face_to_openai(state)
        state = {name: tensor for name, tensor in state.items() if name not in NOT_WEIGHTS}
        state = {name.replace("in_proj_", "in_proj."): t.float() for name, t in state.items()}
        config = infer_config(state)
        beside = Path(path).with_name("config.json")
        if beside.is_file():
            check_family(json.loads(beside.read_text(encoding="utf-8")), config)
    with torch.device("meta"):  # no memory, no random numbers: the file has all weights
        clip = CLIP(config)
    with user_error(f"{path} is not a CLIP ViT checkpoint", hint):
        clip.load_state_dict(state, assign=True)
    return clip.eval()


def save_clip(clip, path):
    """Write a state dict in OpenAI's names, which load_clip reads."""
    state = {name.replace("in_proj.", "in_proj_"): t for name, t in clip.state_dict().items()}
    with atomic_write(path) as temporary:
        torch.save(state, temporary)


def infer_config(state):
    """CLIPConfig from the shapes of a state dict in OpenAI's names."""
    vision_blocks = [n for n in state if re.match(r"visual\.transformer.*\.ln_1\.weight", n)]
    text_blocks = [n for n in state if re.match(r"transformer.*\.ln_1\.weight", n)]
    vision_width, _, patch_size, _ = state["visual.conv1.weight"].shape
    context_length, text_width = state["positional_embedding"].shape
    patches = len(state["visual.positional_embedding"]) - 1
    return CLIPConfig(
        image_size=patch_size * math.isqrt(patches),
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=len(vision_blocks),
        text_width=text_width,
        text_layers=len(text_blocks),
        embed_dim=state["text_projection"].shape[1],
        context_length=context_length,
        vocab_size=len(state["token_embedding.weight"]),
    )


def check_family(described, config):
    """Raise ValueError if Hugging Face's config.json, if it is one, describes another network than
    `CLIP`."""
    widths = {"vision_config": config.vision_width, "text_config": config.text_width}
    for tower, width in widths.items():
        # older files have their values in vision_config_dict
        values = (described.get(tower) or {}) | (described.get(f"{tower}_dict") or {})
        expected = {
            "hidden_act": "quick_gelu",
            "num_attention_heads": max(1, width // 64),
            "layer_norm_eps": 1e-5,
        }
        for name, value in expected.items():
            found = values.get(name, value)
            if found != value:
                raise ValueError(f"its config.json has {name} {found} in {tower}, not {value}")


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
)


def hugging_face_to_openai(state):
    """A CLIP's state dict in Hugging Face's names -> float32, in this file's names."""
    state = {name: t.float() for name, t in state.items() if not name.endswith("position_ids")}
    state = rename_keys(state, HUGGING_FACE_NAMES)
    for name in list(state):
        if ".attn.q_proj." in name:  # q, k, v: three matrices there, one here
            q = state.pop(name)
            k = state.pop(name.replace("q_proj", "k_proj"))
            v = state.pop(name.replace("q_proj", "v_proj"))
            state[name.replace("q_proj", "in_proj")] = torch.cat([q, k, v])
    for name in ("visual.proj", "text_projection"):  # OpenAI multiplies from the other side
        state[name] = state[name].T
    return state


def merge_authors_lora(state):
    """A CLIP of HiVG's authors -> Hugging Face's names: PEFT's prefixes are removed and its pairs
    merged, W = W_0 + (alpha / r) B A with their alpha = 16."""
    merged = {}
    for name, tensor in state.items():
        merged[re.sub(r"^(base_model\.model\.)+", "", name)] = tensor.float()
    for name in list(merged):
        if ".lora_A." in name:
            A = merged.pop(name)  # [r, in]
            B = merged.pop(name.replace("lora_A", "lora_B"))  # [out, r]
            weight = name.split(".lora_A.")[0] + ".weight"
            merged[weight] = merged[weight] + 16 / len(A) * B @ A
    return merged


def rename_keys(state, patterns):
    """The entries of `state` under new names: each (pattern, replacement) is applied in turn."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


# ------------------------------------------------------------------------------------- file formats


def read_weights(path, safe_classes=()):
    """The content of a file of weights: a TorchScript archive's state dict, that of a .safetensors
    file, or what torch.load reads. No code in the file is run; of classes only `safe_classes` are
    admitted. Raises one of READING_ERRORS for a damaged file: call it within `user_error`."""
    if str(path).endswith(".safetensors"):
        return read_safetensors(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return read_torchscript_archive(path)
    try:
        with torch.serialization.safe_globals(list(safe_classes)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's message suggests weights_only=False, which runs code
        reason = "it is damaged, or holds more than tensors and plain data"
        raise ValueError(reason) from None


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists, tuples and dicts; refuses classes and functions, so that no
    code is run."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data")


class ScriptModule:
    """A module of a TorchScript archive, as a plain holder of its attributes."""

    def __setstate__(self, attributes):
        self.__dict__.update(attributes)


def rebuild_tensor(storage, offset, size, stride, requires_grad, hooks):
    return storage.as_strided(size, stride, offset)


class ArchiveUnpickler(PlainUnpickler):
    """Reads data.pkl of a TorchScript archive: tensors, and modules as ScriptModules."""

    DTYPES = {
        "HalfStorage": torch.float16,
        "FloatStorage": torch.float32,
        "LongStorage": torch.int64,
        "IntStorage": torch.int32,
    }

    def __init__(self, file, read_storage):
        super().__init__(file)
        self.read_storage = read_storage  # key -> bytes

    def find_class(self, module, name):
        if module.startswith("__torch__"):
            return ScriptModule
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in self.DTYPES:
            return self.DTYPES[name]
        return super().find_class(module, name)

    def persistent_load(self, reference):
        _, dtype, key, _, _ = reference
        return torch.frombuffer(bytearray(self.read_storage(key)), dtype=dtype)


def read_torchscript_archive(path):
    """The state dict in a TorchScript archive, in the archive's own names and dtypes."""
    with zipfile.ZipFile(path) as archive:
        data_pkl = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = data_pkl.removesuffix("data.pkl") + "data/"
        file = io.BytesIO(archive.read(data_pkl))
        root = ArchiveUnpickler(file, lambda key: archive.read(folder + key)).load()
    state = {}

    def collect(module, prefix):
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                state[prefix + name] = value
            elif isinstance(value, ScriptModule):
                collect(value, f"{prefix}{name}.")

    collect(root, "")
    return state


def read_safetensors(path):
    """A .safetensors file: the length of a JSON header, the header, and the tensors' bytes."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    dtypes |= {"F64": torch.float64, "I64": torch.int64, "I32": torch.int32}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        content = bytearray(file.read())
    header.pop("__metadata__", None)
    state = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        flat = torch.frombuffer(content[start:end], dtype=dtypes[entry["dtype"]])
        state[name] = flat.reshape(entry["shape"])
    return state


# ------------------------------------------------------------------ errors, atomic writes, download


class HiVGError(Exception):
    """An error that the user can mend: one sentence on what is wrong, with which file, and the way
    out. `run_main` prints it, on one line, without a traceback."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))


# fmt: off
READING_ERRORS = (  # what the readers of damaged or missing files raise
    OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, RuntimeError,
    ArithmeticError, AssertionError, MemoryError, StopIteration, pickle.UnpicklingError,
    struct.error, zipfile.BadZipFile, zlib.error, http.client.HTTPException,
)
# fmt: on


@contextmanager
def user_error(what, hint, errors=READING_ERRORS):
    """Turn an error of reading or writing a file into a HiVGError "what (reason): hint.".

    Only for code that reads or writes files: an error of the program must keep its traceback.
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
    temporary = own_name(path.with_name(f".{path.name}"))
    errors = (OSError, RuntimeError)  # torch.save raises RuntimeError if the disk is full
    with user_error(f"{path} cannot be written", "free some room or name another place", errors):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def own_name(path):
    """A name beside `path` that no other process has."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


MEMORY_ERRORS = {  # words of torch's RuntimeErrors -> what its user can do
    "shared memory": "The processes that read images have too little shared memory: start the "
    "container with --shm-size=4g, or give --workers 0.",
    "DataLoader worker (pid": "A process that reads images was killed, mostly for lack of memory: give "
    "fewer --workers, or start the container with --shm-size=4g.",
    "can't allocate memory": "The machine has too little memory: give a smaller --batch-size.",
    "out of memory": "The GPU has too little memory: give a smaller --batch-size with a larger "
    "--accumulate, or --checkpointing.",
}


def run_main(job, *args, after_ctrl_c="files that were finished are kept"):
    """Run job(*args); HiVGError, Ctrl-C and lack of memory end the program with one sentence and
    exit status 1. Characters that the terminal does not have are printed as "?"."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="replace")
    try:
        job(*args)
    except HiVGError as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        for words, advice in MEMORY_ERRORS.items():
            if words in str(error):
                sys.exit(f"error: {advice}")
        raise
    except KeyboardInterrupt:
        sys.exit(f"stopped by Ctrl-C: {after_ctrl_c}")


def download_to_cache(url, sha256):
    """Path of the file of `url` in $CLIP_CACHE (default ~/.cache/clip), downloaded if missing.

    Raises HiVGError without network, or if the file's sha256 is not the right one.
    """
    folder = Path(os.path.expanduser(os.environ.get("CLIP_CACHE") or "~/.cache/clip"))
    path = folder / url.rsplit("/", 1)[1]
    if not path.is_file():
        download(url, path, sha256)
    elif file_sha256(path) != sha256:
        raise HiVGError(f"{path} is damaged, its sha256 is wrong: delete it and run again.")
    return path


def download(url, path, sha256=None):
    """Fetch `url` to `path`, with a progress bar. A download that breaks off is kept as path.*.part
    and continued, now as long as that brings more bytes, and by the next call. Several processes
    may fetch the same file: each does so under a name of its own.

    Raises HiVGError if the file cannot be had whole, or if its sha256 is not the right one.
    """
    path = Path(path)
    what = f"{path} is missing and {url} cannot be fetched"
    hint = "run it again to continue the download, or put the file there by hand"
    with user_error(what, hint):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = claim_part(path)
        complete = False
        try:
            while not complete:
                size_before = part_size(part)
                try:
                    download_remaining(url, part)
                    complete = True
                except (OSError, http.client.HTTPException):
                    if part_size(part) <= size_before:
                        raise
        finally:
            if part.exists() and not complete:
                os.utime(part, (0, 0))  # the next call need not wait until it looks abandoned
        if sha256:
            os.utime(part)
            if file_sha256(part) != sha256:
                part.unlink()
                what = f"{url} gave a file with a wrong sha256, which was deleted"
                raise HiVGError(f"{what}: run it again.")
        part.replace(path)


ABANDONED = 60  # seconds without a new byte; a download that is under way gives up after 30


def claim_part(path):
    """A name of this process's own for a download. An abandoned download of `path` gets this name
    and will be continued; of several processes that try, one succeeds in renaming it."""
    own = own_name(path)
    for part in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        with suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > ABANDONED:
                os.utime(part)  # first: nobody else takes it for abandoned any more
                return part.rename(own)
    return own


def download_remaining(url, part):
    """Append to the file `part` the bytes of `url` that it lacks."""
    size = part_size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={size}-"} if size else {})
    try:
        reply = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing lies behind the bytes that are here
            if error.headers.get("Content-Range") == f"bytes */{size}":
                return
            part.unlink()
        raise
    with reply:
        if reply.headers.get_content_type() == "text/html":
            raise ValueError("it gives a web page")
        if reply.status != 206:  # not a part, but the whole file
            size = 0
        length = reply.headers.get("Content-Length")
        total = size + int(length) if length else None
        bar = tqdm(desc=part.stem, total=total, initial=size, unit="B", unit_scale=True)
        with open(part, "ab" if size else "wb") as file, bar:
            while chunk := reply.read(2**16):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and part_size(part) != total:
        raise OSError(f"it broke off after {part_size(part):,} of {total:,} bytes")


def part_size(part):
    """Bytes of a file, 0 if there is none."""
    return part.stat().st_size if part.exists() else 0


def file_sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
