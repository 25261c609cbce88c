"""Tokenizers as models use them: one that travels with the model as files, or open_clip's byte pairs, which need none."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import html
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import regex
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE
from torch import Tensor

from mmlg_scale.bounds import MAX_TOKENIZER_BYTES
from mmlg_scale.errors import UserError
from mmlg_scale.reading import one_line, parse_object, shown
from mmlg_scale.towers.config import open_clip_file

# Threads of its own beside those of torch and the loader's workers cost more than they bring. open_clip decides likewise.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

BYTE_PAIRS = "byte pairs"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
"""Names of the files that a tokenizer may consist of; of them, tokenizer.json and tokenizer_config.json travel with a model."""
_SPECIAL_TOKENS = ("pad_token", "unk_token", "bos_token", "eos_token", "cls_token", "sep_token", "mask_token")
_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend", "CLIPTokenizer", "CLIPTokenizerFast")
_PADS = ("[PAD]", "<pad>", "<|pad|>")
_PUBLISHED = "Take the one that the model was published with."


class Tokenizer(Protocol):
    """Captions to token ids, as open_clip pads and truncates them."""

    vocab_size: int
    identity: str
    """Equal for tokenizers that give equal ids: a SHA-256 of what the files say, or BYTE_PAIRS."""
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
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


class FileTokenizer:
    """A Hugging Face tokenizer by its files, computing as open_clip's HFTokenizer does with the files that `self.files` holds.

    Those are tokenizer.json as given, and a tokenizer_config.json that says what counts for ids and nothing else: special tokens and the
    sides of padding and truncation. What else was given has to agree with tokenizer.json.

    Args:
        files: name -> content; tokenizer.json is needed, the rest of TOKENIZER_FILES may come along.
        where: starts the messages.

    Raises:
        UserError: damaged; a file that is not one of TOKENIZER_FILES; no padding token; or a configuration that names code to run or would
            change the ids in a way that is not supported.
    """

    def __init__(self, files: Mapping[str, str], where: str = "tokenizer") -> None:
        check_files(files, where)
        self._fast = _parse(files["tokenizer.json"], f"{where}: tokenizer.json")
        config = _config(files, self._fast, where)
        self.files = {
            "tokenizer.json": files["tokenizer.json"],
            "tokenizer_config.json": json.dumps(config, indent=1, sort_keys=True),
        }
        self._sides = {"padding": config["padding_side"], "truncation": config["truncation_side"]}
        self._fast.no_padding()
        self._fast.no_truncation()
        self._fast.encode_special_tokens = False
        self._fast.add_special_tokens([config[key] for key in _SPECIAL_TOKENS if key in config])  # transformers recognises them in texts
        self._pad: str = config["pad_token"]
        self._pad_id = int(self._fast.get_vocab(with_added_tokens=True)[self._pad])
        self._num_added = self._fast.num_special_tokens_to_add(is_pair=False)
        self.vocab_size = max(self._fast.get_vocab(with_added_tokens=True).values()) + 1
        told = {"tokenizer": json.loads(self._fast.to_str()), "pad": self._pad, "sides": self._sides}
        self.identity = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def __call__(self, texts: Sequence[str], context_length: int) -> Tensor:
        return self._encode(texts, context_length)[0]

    def num_truncated(self, texts: Sequence[str], context_length: int) -> int:
        return self._encode(texts, context_length)[1]

    def _encode(self, texts: Sequence[str], context_length: int) -> tuple[Tensor, int]:
        if context_length <= self._num_added:
            raise UserError(f"a context of {context_length} tokens has no room beside the tokenizer's {self._num_added} own. Use more.")
        self._fast.enable_truncation(context_length, direction=self._sides["truncation"])
        self._fast.enable_padding(length=context_length, pad_id=self._pad_id, pad_token=self._pad, direction=self._sides["padding"])
        with _one_line_of("the tokenizer"):
            encoded = self._fast.encode_batch([clean(text) for text in texts])
        ids = torch.tensor([item.ids for item in encoded], dtype=torch.int64).reshape(len(texts), context_length)
        return ids, sum(bool(item.overflowing) for item in encoded)


def check_files(files: Mapping[str, str], where: str) -> None:
    """Raise UserError for names other than TOKENIZER_FILES, contents that are no text or too long, and where tokenizer.json is missing."""
    for name, content in files.items():
        if name not in TOKENIZER_FILES:
            raise UserError(f"{where}: {shown(name)!r} is not a tokenizer file. Supported: {', '.join(TOKENIZER_FILES)}.")
        if not isinstance(content, str):
            raise UserError(f"{where}: {name} is not text. Take the file that the model was published with.")
        if len(content) > MAX_TOKENIZER_BYTES:
            raise UserError(f"{where}: {name} has {len(content)} characters, at most {MAX_TOKENIZER_BYTES} are supported.")
    if "tokenizer.json" not in files:
        raise UserError(f"{where}: no tokenizer.json. Save the tokenizer as one (transformers' save_pretrained of a fast tokenizer).")


def _parse(text: str, where: str) -> FastTokenizer:
    content = parse_object(text, where, _PUBLISHED)
    model = content.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        raise UserError(f"{where}: model.dropout is {shown(model['dropout'])}: the same text has other ids each time. Set it to null.")
    with _one_line_of(where):
        fast = FastTokenizer.from_str(text)
        fast.encode("a")  # what refers to a token that is not there shows only here
    return fast


@contextlib.contextmanager
def _one_line_of(where: str) -> Iterator[None]:
    """What the tokenizers library makes of a damaged file as a UserError: it raises plain Exception, and panics as a BaseException."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{where} is damaged ({one_line(error)}). {_PUBLISHED}") from error


def _config(files: Mapping[str, str], fast: FastTokenizer, where: str) -> dict[str, Any]:
    """tokenizer_config.json as it is kept: defaults filled in, special_tokens_map.json merged, all that does not count left out."""
    given: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if name in files:
            given |= {key: value for key, value in parse_object(files[name], f"{where}: {name}", _PUBLISHED).items() if value is not None}
    for key in ("auto_map", "trust_remote_code", "split_special_tokens"):
        if given.get(key):
            raise UserError(f"{where}: tokenizer_config.json has {key}, which is not supported. Save it as a PreTrainedTokenizerFast.")
    if given.get("tokenizer_class", _CLASSES[0]) not in _CLASSES:
        raise UserError(
            f"{where}: tokenizer_class {shown(given['tokenizer_class'])} is not supported. Save it as a PreTrainedTokenizerFast."
        )
    config: dict[str, Any] = {"tokenizer_class": _CLASSES[0], "model_max_length": given.get("model_max_length", 77)}
    if type(config["model_max_length"]) is not int or not 1 <= config["model_max_length"] <= 100_000:
        config["model_max_length"] = 77  # transformers writes 10^30 for none; ids do not depend on it
    padding, truncation = fast.padding or {}, fast.truncation or {}
    for key, default in (("padding_side", padding.get("direction")), ("truncation_side", truncation.get("direction"))):
        config[key] = given.get(key, default or "right")
        if config[key] not in ("left", "right"):
            raise UserError(f"{where}: tokenizer_config.json has {key} {shown(config[key])!r}. Use left or right.")
    given.setdefault("pad_token", padding.get("pad_token") or next((pad for pad in _PADS if fast.token_to_id(pad) is not None), None))
    for key in _SPECIAL_TOKENS:
        token = given.get(key)
        if token is not None:
            config[key] = _known_token(token, fast, f"{where}: {key}")
    if "pad_token" not in config:
        raise UserError(f"{where}: names no padding token. Set pad_token in tokenizer_config.json.")
    _check_added(given, files, fast, where)
    return config


def _known_token(token: Any, fast: FastTokenizer, where: str) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or fast.token_to_id(content) is None:
        raise UserError(f"{where} {shown(content)!r} is not in tokenizer.json, so that it would get an id that the model does not know.")
    return content


def _check_added(given: Mapping[str, Any], files: Mapping[str, str], fast: FastTokenizer, where: str) -> None:
    """Tokens that transformers would add or move on loading must be in tokenizer.json as they are."""
    special = {token.content for token in fast.get_added_tokens_decoder().values()}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = given.get(key) or []
        for token in listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else [listed]:
            if _known_token(token, fast, f"{where}: {key}") not in special:
                raise UserError(f"{where}: {key} has {shown(token)!r}, which tokenizer.json does not list as an added token. Add it there.")
    numbered = given.get("added_tokens_decoder") or {}
    by_token = parse_object(files["added_tokens.json"], f"{where}: added_tokens.json", _PUBLISHED) if "added_tokens.json" in files else {}
    pairs = [(number, token) for number, token in numbered.items()] if isinstance(numbered, dict) else [("?", None)]
    for number, token in [*pairs, *((number, token) for token, number in by_token.items())]:
        content = _known_token(token, fast, f"{where}: added token")
        if str(fast.token_to_id(content)) != str(number):
            raise UserError(f"{where}: added token {shown(content)!r} has another id than {shown(number)} in tokenizer.json. {_PUBLISHED}")


START, END = "<start_of_text>", "<end_of_text>"
_NUM_MERGES = 49_152 - 256 - 2
_VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
_REMEMBERED_WORDS = 2**16
_LONGEST_REMEMBERED = 64


class BytePairTokenizer:
    """open_clip's tokenizer, which open_clip itself falls back to: nothing travels. The same ids, seven times as fast.

    A text is split as open_clip splits it. The pieces are remembered with their ids, since captions repeat their words; the byte pairs of a
    new one are merged by the tokenizers library.
    """

    identity = BYTE_PAIRS

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.vocabulary, self.merges, self._model = _byte_pairs()
        self.vocab_size = len(self.vocabulary)
        self._pieces = regex.compile(rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE)
        self._start, self._end = self.vocabulary[START], self.vocabulary[END]
        self._known: dict[str, tuple[int, ...]] = {}
        self._forget()

    def __reduce__(self) -> tuple[type[BytePairTokenizer], tuple[()]]:
        """Loader workers get none of what they can make themselves."""
        return BytePairTokenizer, ()

    def __call__(self, texts: Sequence[str], context_length: int) -> Tensor:
        ids_NT = np.zeros((len(texts), context_length), np.int64)
        for row_T, text in zip(ids_NT, texts, strict=True):
            ids = self._encode(text)[:context_length]
            ids[-1] = self._end  # also of a text that was cut
            row_T[: len(ids)] = ids
        return torch.from_numpy(ids_NT)

    def num_truncated(self, texts: Sequence[str], context_length: int) -> int:
        return sum(len(self._encode(text)) > context_length for text in texts)

    def _encode(self, text: str) -> list[int]:
        """All ids of a text, start and end token included."""
        ids, known = [self._start], self._known
        for piece in self._pieces.findall(clean(text).lower()):
            ids.extend(known.get(piece) or self._merge(piece))
        ids.append(self._end)
        return ids

    def _merge(self, piece: str) -> tuple[int, ...]:
        """The ids of a piece that is not known."""
        if len(self._known) >= _REMEMBERED_WORDS:
            self._forget()
        letters = _letters()
        found = tuple(token.id for token in self._model.tokenize("".join([letters[byte] for byte in piece.encode()])))
        if len(piece) <= _LONGEST_REMEMBERED:
            self._known[piece] = found
        return found

    def _forget(self) -> None:
        """All but the special tokens, which are recognised in texts, as by open_clip."""
        self._known = {START: (self._start,), END: (self._end,)}


@functools.cache
def _letters() -> tuple[str, ...]:
    """The printable character that stands for each byte in the vocabulary: itself in Latin-1, or else one from U+0100 on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in plain else next(others)) for byte in range(256))


@functools.cache
def _byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]], BPE]:
    """The vocabulary, in the order in which CLIP's tokens are counted, the merges of the file that open_clip has, and what merges."""
    with gzip.open(open_clip_file(_VOCABULARY_FILE), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : _NUM_MERGES + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    letters = sorted(_letters(), key=lambda letter: (ord(letter) >= 0x100, letter))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(first + second for first, second in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return vocabulary, merges, BPE(vocabulary, merges, end_of_word_suffix="</w>", cache_capacity=0)


def tokenizer_from_files(files: Mapping[str, str], where: str = "tokenizer") -> Tokenizer:
    """The tokenizer that these files describe; open_clip's byte pairs where there are none. Raises as `FileTokenizer`."""
    return FileTokenizer(files, where) if files else BytePairTokenizer()


def same_tokenizer(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether both give the same ids."""
    return one.identity == other.identity


def told(tokenizer: Tokenizer) -> str:
    """A tokenizer in words, for messages."""
    if tokenizer.identity == BYTE_PAIRS:
        return "open_clip's byte pairs"
    return f"{tokenizer.vocab_size} tokens of its own (sha256 {tokenizer.identity[:8]})"
