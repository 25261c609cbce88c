"""Tokenizers: a small word vocabulary that travels with the models of toy sets, or open_clip's byte pairs."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import ftfy
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import Tensor

from mmlg_scale.errors import UserError

PAD, UNKNOWN, START, END = "[PAD]", "<unk>", "<start_of_text>", "<end_of_text>"


class Tokenizer(Protocol):
    """Captions to token ids, as open_clip pads and truncates them."""

    vocab_size: int
    files: dict[str, str]
    """Name -> content of the files that must travel with a model; empty for open_clip's own."""

    def __call__(self, texts: Sequence[str], context_length: int) -> Tensor:
        """Token ids, int64 [len(texts), context_length]; the end token has the highest id and survives truncation."""
        ...


def clean(text: str) -> str:
    """Broken encodings and curly quotes mended, HTML entities decoded, white space single, as open_clip's wrapper of Hugging Face
    tokenizers does it (`open_clip.tokenizer`, clean="whitespace"): a model must meet the ids that it was trained on.
    """
    if not text.isascii() or "&" in text or not text.isprintable():  # otherwise all this changes nothing, at a hundred times the cost
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


class WordTokenizer:
    """Lower-cased words and punctuation marks, one id each."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files
        self._fast = FastTokenizer.from_str(files["tokenizer.json"])
        self.vocab_size = self._fast.get_vocab_size()

    def __call__(self, texts: Sequence[str], context_length: int) -> Tensor:
        self._fast.enable_truncation(context_length)
        self._fast.enable_padding(length=context_length, pad_id=0, pad_token=PAD)
        encoded = self._fast.encode_batch([clean(text) for text in texts])
        return torch.tensor([item.ids for item in encoded], dtype=torch.int64).reshape(len(texts), context_length)


class BytePairTokenizer:
    """open_clip's tokenizer, which open_clip itself falls back to: nothing travels."""

    def __init__(self) -> None:
        from mmlg_scale.towers import bpe_tokenizer

        self.files: dict[str, str] = {}
        self._tokenizer: Any = bpe_tokenizer()
        self.vocab_size: int = self._tokenizer.vocab_size

    def __call__(self, texts: Sequence[str], context_length: int) -> Tensor:
        return self._tokenizer(list(texts), context_length)


def word_tokenizer_files(captions: Iterable[str]) -> dict[str, str]:
    """The Hugging Face files of a word tokenizer over all words of `captions`.

    The end token gets the highest id because CLIP pools where the highest id stands.
    """
    split = pre_tokenizers.Whitespace()
    words = sorted({word for caption in captions for word, _ in split.pre_tokenize_str(clean(caption).lower())})
    vocabulary = {token: index for index, token in enumerate((PAD, UNKNOWN, START, *words, END))}
    fast = FastTokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = split
    # transformers recognises these where they stand in a text; so must we.
    fast.add_special_tokens([PAD, UNKNOWN, START, END])
    ids = [(START, vocabulary[START]), (END, vocabulary[END])]
    fast.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ids)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "bos_token": START,
        "eos_token": END,
        "model_max_length": 77,
        "padding_side": "right",
        "truncation_side": "right",
    }
    return {"tokenizer.json": fast.to_str(), "tokenizer_config.json": json.dumps(config, indent=1, sort_keys=True)}


def write_tokenizer(root: Path, files: dict[str, str]) -> None:
    """Write tokenizer files to ROOT/tokenizer."""
    folder = root / "tokenizer"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")


def load_tokenizer(root: Path | None) -> Tokenizer:
    """The word tokenizer of a data set, or open_clip's where the set has none (or `root` is None).

    Raises:
        UserError: ROOT/tokenizer is damaged.
    """
    if root is None or not (root / "tokenizer").is_dir():
        return BytePairTokenizer()
    folder = root / "tokenizer"
    try:
        return WordTokenizer({path.name: path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())})
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(f"{folder} holds no readable tokenizer: {error}. Pack the data set again.") from error
