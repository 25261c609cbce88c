"""The tokenizer that a data set offers to models trained from scratch on it: a vocabulary of its words, files of another, or byte pairs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import Tensor

from mmlg_scale.bounds import MAX_TOKENIZER_BYTES
from mmlg_scale.errors import UserError
from mmlg_scale.files import writing
from mmlg_scale.reading import read_json, read_text
from mmlg_scale.records import read_record
from mmlg_scale.towers import BytePairTokenizer, FileTokenizer, Tokenizer, clean

PAD, UNKNOWN, START, END = "[PAD]", "<unk>", "<start_of_text>", "<end_of_text>"
MAX_IDS = 49_408
"""Of a word vocabulary, special tokens included: as many as CLIP's byte pairs have."""
WORDS_LIMIT = MAX_IDS - 4
FILES = ("tokenizer.json", "tokenizer_config.json")
NONE, WORDS, BPE = "none", "words", "bpe"


def word_tokenizer_files(captions: Iterable[str], limit: int = WORDS_LIMIT) -> dict[str, str]:
    """The Hugging Face files of a word tokenizer over the words of `captions`.

    Of more than `limit` distinct words the most frequent are taken, and the console is told what the others are. The end token gets the
    highest id because CLIP pools where the highest id is.
    """
    split = pre_tokenizers.Whitespace()
    counts = Counter(word for caption in captions for word, _ in split.pre_tokenize_str(clean(caption).lower()))
    words = sorted(counts)
    if len(words) > limit:
        words = sorted(sorted(words, key=lambda word: (-counts[word], word))[:limit])
        lost = 1 - sum(counts[word] for word in words) / counts.total()
        print(
            f"vocabulary: of {len(counts)} distinct words the {limit} most frequent are kept; the other {len(counts) - limit}, "
            f"{lost:.2%} of all words in the captions, become {UNKNOWN}",
            flush=True,
        )
    vocabulary = {token: index for index, token in enumerate((PAD, UNKNOWN, START, *words, END))}
    fast = FastTokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = split
    # transformers recognises these wherever a text has them; so must we.
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


@dataclass(frozen=True)
class Offer:
    """The tokenizer that a data set is to have, as --tokenizer says it.

    Attributes:
        name: none, words, bpe, or the identity of files; what dataset.json records.
        files: those files.
    """

    name: str
    files: Mapping[str, str] = field(default_factory=dict)

    def write(self, root: Path, captions: Callable[[], Iterable[str]]) -> None:
        """Write ROOT/tokenizer where the offer has files; `captions` gives the words."""
        files = word_tokenizer_files(captions()) if self.name == WORDS else self.files
        if files:
            write_tokenizer(root, files)


def read_offer(choice: str) -> Offer:
    """What `choice` means: none, words, bpe, or the path of a tokenizer.json or of a folder with one, such as a model's.

    An open_clip model folder that names no tokenizer has byte pairs.

    Raises:
        UserError: none of these, or no readable tokenizer there.
    """
    if choice in (NONE, WORDS, BPE):
        return Offer(choice)
    path = Path(choice)
    if not path.exists():
        raise UserError(f"--tokenizer {choice} is unknown: no such path. Use {NONE}, {WORDS}, {BPE}, a model folder or a tokenizer.json.")
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.name != FILES[0]:
        raise UserError(f"--tokenizer {path} is not a tokenizer.json. Give one, or the folder of a model.")
    config = folder / "open_clip_config.json"
    if path.is_dir() and config.is_file() and not _names_a_tokenizer(config):
        return Offer(BPE)
    if not (folder / FILES[0]).is_file():
        raise UserError(f"--tokenizer {path} has no {FILES[0]} and no open_clip model with byte pairs. Use {BPE} for byte pairs.")
    tokenizer = _from_folder(folder, "Give another --tokenizer.")
    return Offer(tokenizer.identity, tokenizer.files)


def _names_a_tokenizer(config: Path) -> bool:
    content = read_json(config, "model configuration", "Give another model folder as --tokenizer.")
    try:
        return bool(content["model_cfg"]["text_cfg"].get("hf_tokenizer_name"))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--tokenizer: {config} has no model_cfg with a text_cfg. Give another model folder.") from error


def write_tokenizer(root: Path, files: Mapping[str, str]) -> None:
    """Write tokenizer files to ROOT/tokenizer."""
    folder = root / "tokenizer"
    folder.mkdir()
    for name, content in files.items():
        with writing(folder / name):
            (folder / name).write_text(content, encoding="utf-8")


def remove_tokenizer(root: Path) -> None:
    """Remove ROOT/tokenizer, which `write_tokenizer` made, before another is written."""
    shutil.rmtree(root / "tokenizer", ignore_errors=True)


def offered_tokenizer(root: Path) -> Tokenizer | None:
    """The tokenizer that the data set at ROOT offers: that in ROOT/tokenizer, byte pairs where dataset.json records them, or none.

    Raises:
        UserError: ROOT/tokenizer is damaged.
    """
    folder = root / "tokenizer"
    if not folder.is_dir():
        return BytePairTokenizer() if recorded_offer(root) == BPE else None
    files = _read_files(folder, "Pack the data set again.")
    recorded = described(root).get("tokenizer")
    for name, wanted in recorded.items() if isinstance(recorded, dict) else ():
        if name not in files or hashlib.sha256(files[name].encode()).hexdigest() != wanted:
            raise UserError(
                f"{folder / str(name)} is not the file that the data set was packed with (SHA-256). Copy it again, or pack the set again."
            )
    return _tokenizer(files, folder, "Pack the data set again.")


def load_tokenizer(root: Path) -> Tokenizer:
    """The tokenizer of a model that is trained from scratch on the data set at ROOT: what the set offers, or else open_clip's byte pairs.

    Raises:
        UserError: as `offered_tokenizer`.
    """
    return offered_tokenizer(root) or BytePairTokenizer()


def recorded_offer(root: Path) -> str | None:
    """The name of the offer that ROOT/dataset.json records, where it records one."""
    try:
        return str(described(root)["args"]["tokenizer"])
    except (KeyError, TypeError):
        return None


def described(root: Path) -> dict[str, Any]:
    """What ROOT/dataset.json says; {} where there is none."""
    file = root / "dataset.json"
    return read_record(file, "description of a data set", "Pack or index the data set again.") if file.is_file() else {}


def _from_folder(folder: Path, remedy: str) -> FileTokenizer:
    return _tokenizer(_read_files(folder, remedy), folder, remedy)


def _read_files(folder: Path, remedy: str) -> dict[str, str]:
    present = [name for name in FILES if os.path.lexists(folder / name)]
    return {name: read_text(folder / name, "tokenizer file", remedy, MAX_TOKENIZER_BYTES) for name in present}


def _tokenizer(files: Mapping[str, str], folder: Path, remedy: str) -> FileTokenizer:
    try:
        return FileTokenizer(files)
    except UserError as error:
        raise UserError(f"{folder} has no readable tokenizer: {str(error).rstrip('.')}. {remedy}") from error


def truncated(tokenizer: Tokenizer, texts: Sequence[str], ids_NT: Tensor) -> list[int]:
    """Which of the texts were cut to fit the context length T when `ids_NT` was made of them.

    Only texts that fill their row are looked at again: those that do not end as an empty one does, in padding.
    """
    context_length = ids_NT.shape[1]
    last_N, padding = ids_NT[:, -1], tokenizer([""], context_length)[0, -1]
    # Where padding is the end token, as in some Hugging Face tokenizers, every row is looked at.
    full = ((last_N != padding) | (last_N == ids_NT.max(dim=1).values)).nonzero().flatten().tolist()
    total = tokenizer.num_truncated([texts[row] for row in full], context_length) if full else 0
    if total in (0, len(full)):
        return full if total else []
    return [row for row in full if tokenizer.num_truncated([texts[row]], context_length)]
