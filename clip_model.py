"""CLIP from scratch: the tokenizer, the two towers, and the reading of released weights as data.

First come errors and files that are whole or not there: skip them at first. Reading order:
Tokenizer (text -> ids), attend and Block (one pre-norm transformer block), VisionTransformer and
CLIP (the towers; parameter names are those of OpenAI's files), download, then load_clip with what
it reads: archives, state dicts, safetensors, Hugging Face's names. HiVG (hivg.py) walks through the
blocks of these towers itself; nothing here knows of it.

    from clip_model import load_clip, tokenize
    clip = load_clip("ViT-B/16")                                     # fp32, eval mode
    logits = clip(images, tokenize(["a cat", "two dogs"]))           # [B, 2]

Letters: B samples, N image tokens, T text tokens, d width of a tower, D joint width, S image side,
P patch side. This file can be copied into another project as it is; it needs torch, ftfy, regex and
tqdm.
"""

import argparse
import functools
import gzip
import hashlib
import html
import io
import json
import math
import os
import pickle
import re
import sys
import traceback
import urllib.request
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


class HiVGError(Exception):
    """The project's own error: one sentence on what is wrong, with which file, and what to do."""


@contextmanager
def explaining(what, way_out):
    """Whatever goes wrong inside becomes one sentence, "what (reason): way_out.": damaged files
    raise almost anything."""
    try:
        yield
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        reason = " ".join(reason.removeprefix("HiVGError: ").split())[:500]
        raise HiVGError(f"{what} ({reason}): {way_out}.") from error


@contextmanager
def replacing(path):
    """Give a temporary name beside `path`, renamed to `path` if all went well: never a half-written
    file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with explaining(f"{path} cannot be written", "name another place"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def exit_with(job, args):
    """Run job(args); the project's own errors, and Ctrl-C, become one sentence on stderr and exit
    status 1."""
    try:
        job(args)
    except BaseException as error:
        # a loader in its frames would keep its workers, which ignore SIGTERM, and they this process
        chain = error
        while chain:
            traceback.clear_frames(chain.__traceback__)
            chain = chain.__context__
        if isinstance(error, HiVGError):  # a worker sends its traceback too: what counts is its end
            sys.exit("error: " + str(error).rpartition("HiVGError: ")[2].strip())
        if isinstance(error, KeyboardInterrupt):
            sys.exit(f"stopped: {error or 'what was finished is kept'}")
        raise


# ---------------------------------------------------------------------------------------- tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
MOST_CHARACTERS = 10_000  # far more than 77 tokens hold
MAX_MERGES = 49152 - 256 - 2  # CLIP's file holds more than it uses


@functools.cache
def byte_symbols():
    """One printable character for each of the 256 bytes, so that merges can be kept in a text file.

    Printable latin-1 characters stand for themselves; the others are numbered from 256 on: byte 32
    (blank) is "Ġ". The order is the order of ids in the vocabulary, so the printable ones come
    first.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


class Tokenizer:
    """CLIP's byte-level BPE: "A red Cup" -> [49406, 320, 736, 1937, 49407] with CLIP's merges.

    merges_file: path of a merges file (plain or .gz: one header line, then one merge "a b" per
    line), or an open text file. Ids are: 256 symbols, the same 256 at the end of a word, one per
    merge, start token, end token.
    """

    def __init__(self, merges_file):
        with explaining(f"The vocabulary {merges_file} cannot be read", "get it anew"):
            if isinstance(merges_file, io.TextIOBase):
                text = merges_file.read()
            else:
                opener = gzip.open if str(merges_file).endswith(".gz") else open
                with opener(merges_file, "rt", encoding="utf-8") as file:
                    text = file.read(2**24)  # far more than CLIP's has
            lines = text.strip().split("\n")[1 : MAX_MERGES + 1]
            merges = [tuple(line.split()) for line in lines]
            if any(len(merge) != 2 for merge in merges):
                raise ValueError("not every line is two symbols")
        self.merges_text = text  # carried by checkpoints
        self.ranks = {merge: rank for rank, merge in enumerate(merges)}
        symbols = list(byte_symbols().values())
        vocabulary = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in merges]
        self.ids = {symbol: i for i, symbol in enumerate(vocabulary + [START, END])}
        self.symbols = {i: symbol for symbol, i in self.ids.items()}
        self.vocab_size = len(vocabulary) + 2
        self.ids_of = functools.lru_cache(maxsize=2**17)(lambda text: tuple(self.encode(text)))

    def bpe(self, word):
        """The symbols of one word: merge the neighbouring pair of lowest rank until none is left to
        merge."""
        if word in (START, END):
            return (word,)
        parts = (*word[:-1], word[-1] + "</w>")
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: self.ranks.get(pair, math.inf))
            if best not in self.ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                width = 2 if parts[i : i + 2] == best else 1
                merged.append("".join(parts[i : i + width]))
                i += width
            parts = tuple(merged)
        return parts

    def encode(self, text):
        """Ids of a str, without start and end token; of an endless text only the beginning."""
        text = text[:MOST_CHARACTERS]
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        text = " ".join(text.split()).lower()
        symbols, ids = byte_symbols(), []
        for word in regex.findall(WORDS, text, regex.IGNORECASE):
            word = "".join(symbols[byte] for byte in word.encode("utf-8", errors="replace"))
            ids += [self.ids[part] for part in self.bpe(word)]
        return ids

    def decode(self, ids):
        """The text of ids; every word is followed by a blank."""
        bytes_of = {symbol: byte for byte, symbol in byte_symbols().items()}
        text = "".join(self.symbols[int(i)] for i in ids).replace("</w>", " ")
        return bytearray(bytes_of.get(c, 32) for c in text).decode("utf-8", errors="replace")

    def __call__(self, texts, context_length=77):
        """texts: a str or a list of str -> LongTensor [N, context_length], zero after the end.

        A longer text is cut so that the end token stays last.
        """
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(tokens, texts):
            ids = [self.ids[START], *self.ids_of(text)][: context_length - 1] + [self.ids[END]]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


def tokenize(texts, context_length=77):
    """texts: a str or a list of str -> LongTensor [N, context_length], with CLIP's vocabulary."""
    return clip_tokenizer()(texts, context_length)


# ------------------------------------------------------------------------------------------- towers


@dataclass
class CLIPConfig:
    """Sizes of the two towers; heads are width / 64. The defaults are ViT-B/16."""

    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    text_width: int = 512
    text_layers: int = 12
    embed_dim: int = 512
    context_length: int = 77
    vocab_size: int = 49408


LARGE = dict(patch_size=14, vision_width=1024, vision_layers=24, text_width=768, embed_dim=768)
SIZES = {  # of the released ones
    "ViT-B/32": CLIPConfig(patch_size=32),
    "ViT-B/16": CLIPConfig(),
    "ViT-L/14": CLIPConfig(**LARGE),
    "ViT-L/14@336px": CLIPConfig(336, **LARGE),
}


NO_DROPOUT = nn.Dropout(0.0)


def attend(q, k, v, heads, mask=None, causal=False, dropout=NO_DROPOUT):
    """softmax(q k^T / sqrt(d / heads)) v, head by head.

    q [B, Nq, d], k and v [B, Nk, d]; mask: bool, broadcast to [B, heads, Nq, Nk], True = attend;
    dropout: an nn.Dropout, of the softmax. Returns [B, Nq, d].
    """
    # [B, N, d] -> [B, heads, N, d / heads]
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    p = dropout.p if dropout.training else 0.0
    if q.device.type == "cpu" and q.requires_grad and (p or q.dtype is torch.bfloat16):
        # written out: on a CPU the fused kernel's backward is 6 times slower in bf16, and it has
        # none with dropout
        logits = q / math.sqrt(q.shape[-1]) @ k.mT  # [B, heads, Nq, Nk]
        if causal:
            mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            logits = logits.masked_fill_(~mask, -math.inf)
        out = dropout(logits.softmax(dim=-1)) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, p, causal)
    return out.transpose(1, 2).flatten(2)  # [B, Nq, d]


class ScaledSiLU(torch.autograd.Function):
    """silu(1.702 x) / 1.702, whose gradient is that of silu at 1.702 x: the factors cancel."""

    @staticmethod
    def forward(context, x):
        y = 1.702 * x
        context.save_for_backward(y)
        return F.silu(y).div_(1.702)

    @staticmethod
    def backward(context, gradient):
        return torch.ops.aten.silu_backward(gradient, *context.saved_tensors)


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), written with torch's fused silu(y) = y sigmoid(y)."""

    def forward(self, x):
        return ScaledSiLU.apply(x)


class Attention(nn.Module):
    """Self-attention with q, k, v in one matrix [3d, d], as CLIP stores them."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, mask=None, causal=False):  # [B, N, d] -> [B, N, d]
        q, k, v = self.in_proj(x).chunk(3, dim=-1)
        return self.out_proj(attend(q, k, v, self.heads, mask, causal))


class Block(nn.Module):
    """x = x + SelfAttention(LN1(x));  x = x + MLP(LN2(x))."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=up, gelu=QuickGELU(), c_proj=down))

    def forward(self, x, causal=False):
        x = x + self.attn(self.ln_1(x), causal=causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, max(1, width // 64)) for _ in range(layers))


class VisionTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, patch = config.vision_width, config.patch_size
        tokens = 1 + (config.image_size // patch) ** 2
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, config.embed_dim) * width**-0.5)

    def embed(self, images):
        """images [B, 3, S, S] -> tokens before the first block [B, 1 + N, d], [CLS] first."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # [B, N, d]
        cls = self.class_embedding.to(patches.dtype).expand(len(images), 1, -1)  # [B, 1, d]
        return self.ln_pre(torch.cat([cls, patches], dim=1) + self.positional_embedding)

    def forward(self, images):
        x = self.embed(images)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj  # [B, D]


class CLIP(nn.Module):
    """Both towers. Names of parameters are those of OpenAI's state dicts (in_proj.weight there:
    in_proj_weight)."""

    def __init__(self, config):
        super().__init__()
        self.config = replace(config)  # a copy: `resize` changes it
        self.visual = VisionTransformer(config)
        width = config.text_width
        self.transformer = Transformer(width, config.text_layers)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(config.context_length, width) * 0.01)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, config.embed_dim) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def text_states(self, tokens):
        """tokens [B, T] -> the outputs of all text blocks, a list of [B, T, d_t], before the final
        LayerNorm.

        Causal, so what comes after the end token changes nothing before it: T may be cut to the
        longest text.
        """
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        states = []
        for block in self.transformer.resblocks:
            x = block(x, causal=True)
            states.append(x)
        return states

    def project_text(self, state):
        """The last block's output [B, T, d_t] -> all tokens in the joint space [B, T, D]."""
        return self.ln_final(state) @ self.text_projection

    def encode_image(self, images):
        """images [B, 3, S, S], normalised -> image vectors [B, D], not normalised."""
        return self.visual(images)

    def encode_text(self, tokens):
        """tokens [B, T] -> text vectors [B, D] at the end (the largest id), not normalised."""
        state = self.text_states(tokens)[-1]
        return self.project_text(state[torch.arange(len(tokens)), tokens.argmax(dim=1)])

    def forward(self, images, tokens):
        """Cosines times CLIP's logit scale: images [B, 3, S, S], tokens [N, T] -> [B, N]."""
        image = F.normalize(self.encode_image(images), dim=-1)
        text = F.normalize(self.encode_text(tokens), dim=-1)
        return self.logit_scale.exp() * image @ text.T

    def resize(self, image_size):
        """Fit the grid of positions to images of another side (bicubic, antialiased), in place."""
        if image_size == self.config.image_size:
            return
        patch = self.config.patch_size
        if image_size % patch:
            raise HiVGError(f"Image size {image_size}: take a multiple of the patch side, {patch}.")
        old, new = self.config.image_size // patch, image_size // patch
        cls, grid = self.visual.positional_embedding.data.split([1, old * old])
        grid = grid.T.reshape(1, -1, old, old)  # [1, d, old, old]
        grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
        grid = grid.flatten(2)[0].T  # [new * new, d]
        self.visual.positional_embedding = nn.Parameter(torch.cat([cls, grid]))
        self.config.image_size = image_size


# ----------------------------------------------------------------------------- weights from outside

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of pixels
CLIP_URL = "https://openaipublic.azureedge.net/clip/models/"
RELEASED = {  # name: address; the long number is the file's sha256
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
}
VOCABULARY_URL = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def fetch_rest(url, part, size):
    """One try of `download`: append to `part`, which has `size` bytes, what it lacks. Raises almost
    anything."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={size}-"} if size else {})
    try:
        reply = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.headers.get("Content-Range") == f"bytes */{size}":
            return  # `part` has the whole file
        if error.code == 416:  # it has more than that
            part.unlink()
        raise
    with reply:
        if (reply.headers.get("Content-Type") or "").startswith("text/html"):
            raise ValueError("it gives a web page")
        rest = re.match(r"bytes (\d+)-\d*/(\d*)", reply.headers.get("Content-Range") or "")
        if rest and int(rest[1]) != size:
            raise ValueError("it gives another part than was asked for")
        total = int((rest[2] if rest else reply.headers.get("Content-Length")) or 0)
        known = dict(total=total or None, initial=size if rest else 0, unit="B", unit_scale=True)
        with open(part, "ab" if rest else "wb") as file, tqdm(desc=part.stem, **known) as bar:
            while chunk := reply.read(1 << 16):
                bar.update(file.write(chunk))
    if total and part.stat().st_size != total:
        raise ValueError(f"it broke off after {part.stat().st_size:,} of {total:,} bytes")


def download(url, path, sha256=None):
    """Fetch a file to `path`, with a bar. What a broken connection leaves is kept as path.part: the
    next try, or call, asks for the rest. It tries again as long as that brings anything.

    Raises HiVGError where the file cannot be had whole, or its sha256 is not the right one.
    """
    path, had = Path(path), -1
    part = path.with_name(f"{path.name}.part")
    missing = f"{path} is not there and {url} cannot be reached"
    way_out = "run it again, to go on where it broke off, or put the file there by hand"
    while True:
        size = part.stat().st_size if part.exists() else 0
        try:
            with explaining(missing, way_out):
                path.parent.mkdir(parents=True, exist_ok=True)
                fetch_rest(url, part, size)
            break
        except HiVGError:
            if size <= had:
                raise
            had = size
    if sha256 and hashlib.sha256(part.read_bytes()).hexdigest() != sha256:
        part.unlink()
        raise HiVGError(f"{url} gave a file of a wrong sha256, thrown away: try again.")
    part.replace(path)


def cached(url, sha256):
    """Path of a file of `url` in $CLIP_CACHE (default ~/.cache/clip), downloaded if missing.

    Raises HiVGError without network, or where the file's sha256 is not the right one.
    """
    folder = Path(os.environ.get("CLIP_CACHE") or Path.home() / ".cache" / "clip")
    path = folder / url.rsplit("/", 1)[1]
    if not path.is_file():
        download(url, path, sha256)
    elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise HiVGError(f"{path} has a wrong sha256, it is damaged: delete it and run again.")
    return path


@functools.cache
def clip_tokenizer():
    """The tokenizer with CLIP's own vocabulary, from $CLIP_CACHE or downloaded."""
    return Tokenizer(cached(VOCABULARY_URL, VOCABULARY_SHA256))


STORAGES = {f"{name}Storage" for name in ("Half", "Float", "Double", "BFloat16", "Long", "Int")}


class PlainUnpickler(pickle._Unpickler):
    """Reads numbers, strings, lists, dicts; refuses every class and function, so runs nothing.

    Python's own, not the faster one in C: that makes room for whatever a file claims. Tuples come
    as lists: as keys of a dict they could be nested deeper than hashing bears.
    """

    def gather(count):  # the job of an operation that makes one list of `count` objects
        def load(self):
            self.stack[-count:] = [self.stack[-count:]]

        return load

    dispatch = dict(pickle._Unpickler.dispatch)
    dispatch |= {pickle.TUPLE1[0]: gather(1), pickle.TUPLE2[0]: gather(2)}
    dispatch |= {pickle.TUPLE3[0]: gather(3), pickle.TUPLE[0]: pickle._Unpickler.load_list}
    dispatch |= {pickle.EMPTY_TUPLE[0]: pickle._Unpickler.load_empty_list}
    for code in (pickle.BYTEARRAY8, pickle.FROZENSET, pickle.EMPTY_SET):
        del dispatch[code[0]]

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data")


class ArchiveUnpickler(PlainUnpickler):
    """Reads data.pkl of a TorchScript archive. Its modules become plain holders of attributes; no
    code is run."""

    class Holder:
        def __setstate__(self, state):
            self.__dict__.update(state)

    def __init__(self, file, archive, prefix):
        super().__init__(file)
        self.archive, self.prefix = archive, prefix

    def find_class(self, module, name):
        if module.startswith("__torch__"):
            return self.Holder
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda flat, offset, size, stride, *_: flat.as_strided(size, stride, offset)
        if module == "torch" and name in STORAGES:
            return getattr(torch, name.removesuffix("Storage").lower())
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return super().find_class(module, name)

    def persistent_load(self, reference):
        _, dtype, key, _, numel = reference
        size = numel * dtype.itemsize
        if self.archive.getinfo(f"{self.prefix}data/{key}").file_size != size:
            raise ValueError(f"its tensor {key} has not the size that it claims")
        content = bytearray(self.archive.read(f"{self.prefix}data/{key}"))
        return torch.frombuffer(content, dtype=dtype)


def read_archive(path):
    """The state dict in a TorchScript archive, in the archive's own names and dtypes."""
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        prefix = name.removesuffix("data.pkl")
        root = ArchiveUnpickler(io.BytesIO(archive.read(name)), archive, prefix).load()

    def tensors(holder, prefix=""):
        attributes, holder.__dict__ = vars(holder), {}  # each holder is visited once
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor):
                yield prefix + name, value
            elif isinstance(value, ArchiveUnpickler.Holder):
                yield from tensors(value, f"{prefix}{name}.")

    return dict(tensors(root))


def read_safetensors(path):
    """A .safetensors file: the length of a JSON header, the header, and the tensors' bytes."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.path.getsize(path):
            raise ValueError("its header claims to be longer than the file")
        header = json.loads(file.read(length))
        content = bytearray(file.read())
    header.pop("__metadata__", None)
    offsets = [entry["data_offsets"] for entry in header.values()]
    if sum(end - start for start, end in offsets) > len(content):
        raise ValueError("its tensors claim more than the file holds")
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
    dtypes |= {"BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}
    state = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        flat = torch.frombuffer(content[start:end], dtype=dtypes[entry["dtype"]])
        state[name] = flat.reshape(entry["shape"])
    return state


def read_weights(path):
    """What torch.load reads from `path` (plain data and tensors only), a TorchScript archive's
    state dict, or that of a .safetensors file.

    Raises almost anything for a damaged or hostile file: to be called within `explaining`.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
        if scripted:
            return read_archive(path)
    if str(path).endswith(".safetensors"):
        return read_safetensors(path)
    try:  # a Namespace holds the settings of the authors' checkpoints: attributes, no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own words advise to load it unsafely
        raise ValueError("damaged, or it holds more than tensors and plain data") from None


def refuse_expanded(state):
    """Raises ValueError if a tensor of a state dict claims more elements than its file holds."""
    for name, tensor in state.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"its {name} claims more than the file holds")


def renamed(state, table):
    """The entries of `state`, renamed by every (pattern, replacement) of the table in turn."""
    return {
        functools.reduce(lambda n, row: re.sub(*row, n), table, name): state[name] for name in state
    }


HUGGING_FACE = (  # its names, as patterns, and OpenAI's
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


def from_hugging_face(state, alpha=16):
    """A state dict in Hugging Face's names -> the same in OpenAI's, as parameters of CLIP.

    PEFT's prefixes are cut off and its LoRA pairs folded into their matrices: W + (alpha / r) B A.
    """
    state = {re.sub(r"^(base_model\.model\.)+", "", name): t.float() for name, t in state.items()}
    for name in [name for name in state if ".lora_A." in name]:
        A, B = state.pop(name), state.pop(name.replace("lora_A", "lora_B"))
        name = re.sub(r"lora_A\..*", "weight", name)
        state[name] = state[name] + alpha / len(A) * B @ A
    state = {name: t for name, t in state.items() if "position_ids" not in name}
    state = renamed(state, HUGGING_FACE)
    for name in [name for name in state if ".attn.q_proj." in name]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        state[name.replace("q_proj", "in_proj")] = torch.cat(parts)
    return state | {name: state[name].T for name in ("visual.proj", "text_projection")}


def config_from(state):
    """CLIPConfig from the shapes of a state dict in OpenAI's names."""

    def layers(prefix):
        return len([name for name in state if re.fullmatch(prefix + r"\d+\.ln_1\.weight", name)])

    width, _, patch, _ = state["visual.conv1.weight"].shape
    context, text_width = state["positional_embedding"].shape
    return CLIPConfig(
        image_size=patch * math.isqrt(len(state["visual.positional_embedding"]) - 1),
        patch_size=patch,
        vision_width=width,
        vision_layers=layers(r"visual\.transformer\.resblocks\."),
        text_width=text_width,
        text_layers=layers(r"transformer\.resblocks\."),
        embed_dim=state["text_projection"].shape[1],
        context_length=context,
        vocab_size=len(state["token_embedding.weight"]),
    )


NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # of OpenAI's archives


def load_clip(name_or_path):
    """CLIP by name (downloaded into $CLIP_CACHE) or from a file: fp32, eval mode.

    Reads OpenAI's TorchScript archives, state dicts in their names or Hugging Face's (.bin,
    .safetensors), and the CLIP that HiVG's authors adapted, whose LoRA is folded; sizes follow from
    the shapes. Raises HiVGError for anything else.
    """
    path = name_or_path
    if name_or_path in RELEASED:
        address = RELEASED[name_or_path]
        path = cached(CLIP_URL + address, sha256=address.split("/")[0])
    with explaining(f"{path} is no CLIP (ViT)", f"name a file of one, or {', '.join(RELEASED)}"):
        state = read_weights(path)
        state = state.get("model", state)  # the authors' adapted CLIP
        state = {name: t for name, t in state.items() if name not in NOT_WEIGHTS}
        refuse_expanded(state)
        if any("vision_model." in name for name in state):
            state = from_hugging_face({n: t for n, t in state.items() if ".cross_" not in n})
        state = {name.replace("in_proj_", "in_proj."): t.float() for name, t in state.items()}
        with torch.device("meta"):
            clip = CLIP(config_from(state))
        clip.load_state_dict(state, assign=True)
    return clip.eval()


def save_clip(clip, path):
    """Write a state dict in OpenAI's names, which load_clip reads back."""
    state = {name.replace("in_proj.", "in_proj_"): t for name, t in clip.state_dict().items()}
    with replacing(path) as temporary:
        torch.save(state, temporary)
