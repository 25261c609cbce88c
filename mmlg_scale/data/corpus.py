"""Data sets as runs use them: `PairSet` is what is on disk, `Corpus` is how one model reads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from mmlg_scale.bounds import MAX_CAPTION
from mmlg_scale.data import SPLITS
from mmlg_scale.data.evaluation import EvalSplit, load_eval_split
from mmlg_scale.data.faults import MAX_BAD_FRACTION, EpochReport, print_report
from mmlg_scale.data.manifest import manifest_digest
from mmlg_scale.data.pipeline import StreamSettings, TrainStream
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.data.remote import CLASSES_FILE, copy_small_files
from mmlg_scale.data.store import CacheSettings, Store, is_remote, local_path
from mmlg_scale.data.sweep import Sweep
from mmlg_scale.data.tokens import offered_tokenizer
from mmlg_scale.errors import UserError
from mmlg_scale.reading import shown
from mmlg_scale.records import read_record
from mmlg_scale.towers import BytePairTokenizer, ModelSpec, Tokenizer, same_tokenizer, told

Classes = dict[str, list[str]]


@dataclass(frozen=True)
class PairSet:
    """A data set on disk, without any model.

    Attributes:
        tokenizer: what the set offers to models trained from scratch; None: nothing.
        classes: {"classnames", "templates"}, where the set has classes.
        store: where the shards are, if not in `root`, which then has copies of the manifests and the other small files.
    """

    root: Path
    tokenizer: Tokenizer | None
    classes: Classes | None
    store: Store | None = None

    @property
    def where(self) -> str:
        """The set, for people."""
        return str(self.root) if self.store is None else self.store.root

    def digest(self) -> str:
        """SHA-256 of the manifests of all splits and of the classes: equal for sets of equal pairs, wherever they are.

        The tokenizer is no part of it, since it belongs to the model.
        """
        found = hashlib.sha256()
        for split in SPLITS:
            file = self.root / split / "manifest.json"
            if file.is_file():
                found.update(f"{split} {manifest_digest(self.root / split)}\n".encode())
        found.update(json.dumps(self.classes, sort_keys=True).encode())
        return found.hexdigest()


class DataKeys(Protocol):
    """The recipe's keys that say where a data set is."""

    path: str | None
    cache_dir: str | None
    cache_bytes: int


def pairs_of(data: DataKeys) -> PairSet:
    """The data set that a recipe names. Raises UserError as `open_pairs`."""
    return open_pairs(data.path, cache_of(data.cache_dir, data.cache_bytes))


def cache_of(folder: str | None, max_bytes: int) -> CacheSettings | None:
    """Where copies of a remote set are kept, if anywhere. Raises UserError for a URL."""
    if folder is not None and "://" in folder:
        raise UserError(f"data.cache_dir {shown(folder)} is a URL. Give a folder on a disk of this node.")
    return None if folder is None else CacheSettings(Path(folder), max_bytes)


def open_pairs(path: Path | str | None, cache: CacheSettings | None = None) -> PairSet:
    """The data set in a folder, or at the URL of a store, of which copies are then kept as `cache` says.

    Raises:
        UserError: `path` is None or contains no data set; its tokenizer or its classes are damaged; the store cannot be had.
    """
    if path is None:
        raise UserError("recipe key data.path is null. Write a data set with mmlg data scenes or mmlg data pack and give --data.path DIR.")
    if is_remote(str(path)):
        root, store = copy_small_files(str(path), cache)
        return PairSet(root, offered_tokenizer(root), load_classes(root / CLASSES_FILE), store)
    root = local_path(str(path))
    if not (root / "dataset.json").is_file():
        raise UserError(f"recipe key data.path: {root} contains no data set. mmlg data scenes or mmlg data pack writes one.")
    return PairSet(root, offered_tokenizer(root), load_classes(root / CLASSES_FILE))


def load_classes(file: Path) -> Classes | None:
    """The classes of a set, None where it has none. Raises UserError where the file is damaged."""
    if not file.is_file():
        return None
    content = read_record(file, "list of classes", "Correct it, or remove it to leave classification out.")
    for key in ("classnames", "templates"):
        listed = content.get(key)
        if not isinstance(listed, list) or not listed or not all(isinstance(text, str) and text.strip() for text in listed):
            raise UserError(f"{file}: {key} is {_short(listed)}. Give a list of texts, none of them empty.")
        longest = max(map(len, listed))
        if longest > MAX_CAPTION:
            raise UserError(f"{file}: {key} has a text of {longest} characters; {MAX_CAPTION} are supported. Shorten it.")
    for template in content["templates"]:
        if "{}" not in template:
            raise UserError(f"{file}: the template {template!r} has no {{}} for the class name. Add it.")
    return {key: content[key] for key in ("classnames", "templates")}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def choose_tokenizer(pairs: PairSet, model: Tokenizer | None, choice: Literal["auto", "model"], *, what: str) -> Tokenizer:
    """The tokenizer that captions of `pairs` go through.

    A model's own, always; one trained from scratch (`model` is None) takes what the set offers, or else byte pairs.

    Args:
        choice: with `model` the set's own is ignored; with `auto` it must be the model's.
        what: the model in words, which start the message.

    Raises:
        UserError: `auto`, and the set has been packed with another tokenizer than the model's.
    """
    offered = pairs.tokenizer if choice == "auto" else None
    if model is None:
        return offered or BytePairTokenizer()
    if offered is not None and not same_tokenizer(offered, model):
        raise UserError(
            f"{what} has {told(model)}, the data set {pairs.where} was packed with {told(offered)}. Set data.tokenizer to model to "
            "tokenise with the model's, or pack the pairs with --tokenizer none."
        )
    return model


@dataclass(frozen=True)
class Corpus:
    """A data set as one model reads it: with its image size, preprocessing, context length and tokenizer."""

    pairs: PairSet
    spec: ModelSpec

    @property
    def classes(self) -> Classes | None:
        """Class names and caption templates, where the set has classes."""
        return self.pairs.classes

    def eval_split(self, split: str, *, max_bad_fraction: float = MAX_BAD_FRACTION) -> EvalSplit:
        """A whole split, decoded as it is read; see `load_eval_split`. Ranks open it together."""
        return load_eval_split(self.pairs.root / split, self.spec, max_bad_fraction=max_bad_fraction, store=self.pairs.store)

    def name_of(self, split: str, index: int) -> str:
        """A sample's shard and key, as far as they can be read. Reads the index: for messages."""
        try:
            place = ShardReader(self.pairs.root / split, self.pairs.store).place(index)
        except (OSError, UserError):
            return str(index)
        return f"{place.shard.name}/{shown(place.key)}"

    def stream(
        self,
        settings: StreamSettings,
        start_step: int = 0,
        *,
        record: Path | None = None,
        on_epoch: Callable[[EpochReport], None] = print_report,
    ) -> TrainStream:
        """One rank's training batches from `start_step` on; see `TrainStream`."""
        folder, store = self.pairs.root / "train", self.pairs.store
        return TrainStream(folder, self.spec, settings, start_step=start_step, record=record, on_epoch=on_epoch, store=store)

    def sweep(self) -> Sweep:
        """The training split once, in its own order."""
        return Sweep(ShardReader(self.pairs.root / "train", self.pairs.store), self.spec)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids at the model's context length, int64 [N, T]."""
        return self.spec.tokenizer(texts, self.spec.context_length)
