"""Tokenizers as models use them: one that travels with the model as files, or open_clip's byte pairs, which need none."""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import ftfy
import torch
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

from mmlg_scale.towers.library import open_clip

BYTE_PAIRS = "byte pairs"


class Tokenizer(Protocol):
    """Captions to token ids, as open_clip pads and truncates them."""

    vocab_size: int
    identity: str
    """Equal for tokenizers that give equal ids: a SHA-256 of the files, or BYTE_PAIRS."""
    files: dict[str, str]
    """Name -> content of the files that must travel with a model; empty for open_clip's own."""

    def __call__(self, texts: Sequence[str], context_length: int) -> Tensor:
        """Token ids, int64 [len(texts), context_length]; the end token has the highest id and survives truncation."""
        ...

    def num_truncated(self, texts: Sequence[str], context_length: int) -> int:
        """How many of the texts are cut to fit the context length."""
        ...


def clean(text: str) -> str:
    """Broken encodings and curly quotes repaired, HTML entities decoded, white space single, as open_clip's wrapper of Hugging Face
    tokenizers does it (`open_clip.tokenizer`, clean="whitespace"): a model must meet the ids that it was trained on.
    """
    if not text.isascii() or "&" in text or not text.isprintable():  # otherwise all this changes nothing, at a hundred times the cost
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


class FileTokenizer:
    """A Hugging Face tokenizer by its files (tokenizer.json, tokenizer_config.json), computing as open_clip's HFTokenizer does."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self.files = dict(files)
        self._fast = FastTokenizer.from_str(files["tokenizer.json"])
        config = json.loads(files.get("tokenizer_config.json", "{}"))
        pad = config.get("pad_token") or "[PAD]"
        self._pad = pad["content"] if isinstance(pad, dict) else pad
        self._pad_id = self._fast.token_to_id(self._pad) or 0
        self.vocab_size = self._fast.get_vocab_size()
        self.identity = hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()

    def __call__(self, texts: Sequence[str], context_length: int) -> Tensor:
        return self._encode(texts, context_length)[0]

    def num_truncated(self, texts: Sequence[str], context_length: int) -> int:
        return self._encode(texts, context_length)[1]

    def _encode(self, texts: Sequence[str], context_length: int) -> tuple[Tensor, int]:
        self._fast.enable_truncation(context_length)
        self._fast.enable_padding(length=context_length, pad_id=self._pad_id, pad_token=self._pad)
        encoded = self._fast.encode_batch([clean(text) for text in texts])
        ids = torch.tensor([item.ids for item in encoded], dtype=torch.int64).reshape(len(texts), context_length)
        return ids, sum(bool(item.overflowing) for item in encoded)


class BytePairTokenizer:
    """open_clip's tokenizer, which open_clip itself falls back to: nothing travels."""

    identity = BYTE_PAIRS

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self._tokenizer: Any = open_clip.SimpleTokenizer()
        self.vocab_size: int = self._tokenizer.vocab_size

    def __call__(self, texts: Sequence[str], context_length: int) -> Tensor:
        return self._tokenizer(list(texts), context_length)

    def num_truncated(self, texts: Sequence[str], context_length: int) -> int:
        # A text whose end token stands last may have been cut, or just fit: only those are looked at again.
        full = (self(texts, context_length)[:, -1] == self._tokenizer.eot_token_id).tolist()
        return sum(len(self._tokenizer.encode(text)) + 2 > context_length for text, is_full in zip(texts, full, strict=True) if is_full)


def tokenizer_from_files(files: Mapping[str, str]) -> Tokenizer:
    """The tokenizer that these files describe; open_clip's byte pairs where there are none."""
    return FileTokenizer(files) if files else BytePairTokenizer()


def same_tokenizer(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether both give the same ids."""
    return one.identity == other.identity


def told(tokenizer: Tokenizer) -> str:
    """A tokenizer in words, for messages."""
    if tokenizer.identity == BYTE_PAIRS:
        return "open_clip's byte pairs"
    return f"{tokenizer.vocab_size} tokens of its own (sha256 {tokenizer.identity[:8]})"
