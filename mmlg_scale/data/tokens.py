"""The tokenizer that a data set offers to models trained from scratch on it: a vocabulary of its words, files of another, or byte pairs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors

from mmlg_scale.errors import UserError
from mmlg_scale.towers import BytePairTokenizer, FileTokenizer, Tokenizer, clean

PAD, UNKNOWN, START, END = "[PAD]", "<unk>", "<start_of_text>", "<end_of_text>"


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


def load_tokenizer(root: Path) -> Tokenizer | None:
    """TEMP"""
    folder = root / "tokenizer"
    if not folder.is_dir():
        content = json.loads((root / "dataset.json").read_text())
        return BytePairTokenizer() if content["args"].get("tokenizer") == "bpe" else None
    return FileTokenizer({path.name: path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())})
