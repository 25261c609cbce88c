"""Data sets as runs use them: `PairSet` is what is on disk, `Corpus` is how one model reads it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

from torch import Tensor

from mmlg_scale.data import SPLITS
from mmlg_scale.data.captions import CaptionRule
from mmlg_scale.data.classes import CLASSES_FILE, Classes, load_classes
from mmlg_scale.data.evaluation import EvalSplit, load_eval_split
from mmlg_scale.data.faults import MAX_BAD_FRACTION, EpochReport, print_report
from mmlg_scale.data.manifest import manifest_digest
from mmlg_scale.data.mixture import JoinedReader, Source, shares_of
from mmlg_scale.data.pipeline import StreamSettings, TrainStream
from mmlg_scale.data.remote import copy_small_files, told_key
from mmlg_scale.data.store import RECIPE_KEYS, CacheKeys, CacheSettings, Store, is_remote, local_path
from mmlg_scale.data.sweep import Sweep
from mmlg_scale.data.tokens import offered_tokenizer
from mmlg_scale.errors import UserError
from mmlg_scale.reading import shown
from mmlg_scale.towers import BytePairTokenizer, ModelSpec, Tokenizer, same_tokenizer, told


@dataclass(frozen=True)
class Part:
    """A data set whose training split is read; `share`, `rule` and `name` as in `mixture.Source`."""

    pairs: PairSet
    share: int = 1
    rule: CaptionRule | None = None
    name: str = ""


@dataclass(frozen=True)
class PairSet:
    """A data set on disk, without any model.

    Attributes:
        tokenizer: what the set offers to models trained from scratch; None: nothing.
        classes: {"classnames", "templates"}, where the set has classes.
        store: where the shards are, if not in `root`, which then has copies of the manifests and the other small files.
        parts: what is trained on, where that is a mixture, or not simply this set: evaluation reads this one all the same.
    """

    root: Path
    tokenizer: Tokenizer | None
    classes: Classes | None
    store: Store | None = None
    parts: tuple[Part, ...] = ()

    @property
    def where(self) -> str:
        """The set, for people."""
        return str(self.root) if self.store is None else self.store.root

    def training(self) -> list[Source]:
        """The splits that are trained on."""
        parts = self.parts or (Part(self),)
        return [Source(part.pairs.root / "train", part.pairs.store, part.share, part.rule, part.name) for part in parts]

    def digest(self) -> str:
        """SHA-256 of the manifests of all splits and of the classes: equal for sets of equal pairs, wherever they are.

        Of a mixture, of those of all sources in their order. The tokenizer is no part of it, since it belongs to the model, nor are
        weights and captions, which are the recipe's.
        """
        own, parts = self._own_digest(), [part.pairs._own_digest() for part in self.parts]
        return own if parts in ([], [own]) else hashlib.sha256("\n".join([own, *parts]).encode()).hexdigest()

    def _own_digest(self) -> str:
        found = hashlib.sha256()
        for split in SPLITS:
            file = self.root / split / "manifest.json"
            if file.is_file():
                found.update(f"{split} {manifest_digest(self.root / split)}\n".encode())
        found.update(json.dumps(self.classes, sort_keys=True).encode())
        return found.hexdigest()


class SourceKeys(Protocol):
    """The recipe's keys of one source."""

    @property
    def path(self) -> str:
        """Folder or URL."""

    @property
    def weight(self) -> float:
        """Relative share."""

    @property
    def captions(self) -> Mapping[str, float] | None:
        """Names of captions, and how often each is read."""


class DataKeys(Protocol):
    """The recipe's keys that say where data sets are, and how they are read."""

    path: str | None
    cache_dir: str | None
    cache_bytes: int
    tokenizer: Literal["auto", "model"]

    @property
    def sources(self) -> Sequence[SourceKeys] | None:
        """Of a mixture."""

    @property
    def captions(self) -> Mapping[str, float] | None:
        """Of the one set."""

    @property
    def evaluate_on(self) -> str | None:
        """The set whose validation and test splits are read, if another one."""


def pairs_of(data: DataKeys) -> PairSet:
    """What a recipe trains and evaluates on.

    Raises:
        UserError: as `open_pairs`; of a mixture also: a set is named twice, the sets were packed with several tokenizers; as `shares_of`.
    """
    cache = cache_of(data.cache_dir, data.cache_bytes)
    if data.sources is None:
        pairs = open_pairs(data.path, cache)
        parts: tuple[Part, ...] = (Part(pairs, rule=CaptionRule.of(data.captions)),)
    else:
        parts = _mixed(data.sources, cache)
        if data.tokenizer == "auto":
            _require_one_tokenizer(parts)
        pairs = parts[0].pairs
    if data.evaluate_on is not None:
        pairs = replace(open_pairs(data.evaluate_on, cache, key="data.evaluate_on"), tokenizer=pairs.tokenizer)
    elif len(parts) == 1 and parts[0].rule is None:
        return pairs
    return replace(pairs, parts=parts)


def _mixed(sources: Sequence[SourceKeys], cache: CacheSettings | None) -> tuple[Part, ...]:
    shares = shares_of([source.weight for source in sources], "data.sources")
    places = [source.path.rstrip("/") if is_remote(source.path) else str(local_path(source.path).resolve()) for source in sources]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise UserError(
                f"recipe key data.sources[{index}].path: {sources[index].path} is that of data.sources[{places.index(place)}] too. "
                "Give it once, with a larger weight; several captions of a sample go under captions."
            )
    opened = [open_pairs(source.path, cache, key=f"data.sources[{index}].path") for index, source in enumerate(sources)]
    rules = [CaptionRule.of(source.captions) for source in sources]
    names = [re.sub(r"[^\w.-]", "_", PurePosixPath(place).name)[:40] for place in places]
    if len(sources) == 1:
        names = [""]
    elif len(set(names)) < len(names):
        names = [f"{index}-{name}" for index, name in enumerate(names)]
    return tuple(Part(*of) for of in zip(opened, shares, rules, names, strict=True))


def _require_one_tokenizer(parts: Sequence[Part]) -> None:
    """Raise UserError where models trained from scratch on some sources would have another tokenizer than on others."""
    first, *others = [part.pairs.tokenizer or BytePairTokenizer() for part in parts]
    for part, tokenizer in zip(parts[1:], others, strict=True):
        if not same_tokenizer(first, tokenizer):
            raise UserError(
                f"data.sources need one tokenizer: {parts[0].pairs.where} was packed for {told(first)}, {part.pairs.where} for "
                f"{told(tokenizer)}. Set data.tokenizer to model to tokenise all with the model's (byte pairs where it is trained from "
                "scratch), or pack them with the same --tokenizer."
            )


def cache_of(folder: str | None, max_bytes: int, keys: CacheKeys = RECIPE_KEYS) -> CacheSettings | None:
    """Where copies of a remote set are kept, if anywhere. Raises UserError for a URL."""
    if folder is not None and "://" in folder:
        raise UserError(f"{keys.folder} {shown(folder)} is a URL. Give a folder on a disk of this node.")
    return None if folder is None else CacheSettings(Path(folder), max_bytes, keys=keys)


def open_pairs(path: Path | str | None, cache: CacheSettings | None = None, *, key: str = "data.path") -> PairSet:
    """The data set in a folder, or at the URL of a store, of which copies are then kept as `cache` says; `key` is the recipe's, or
    a command's option.

    Raises:
        UserError: `path` is None or contains no data set; its tokenizer or its classes are damaged; the store is unavailable.
    """
    if path is None:
        raise UserError(
            "recipe key data.path is null, and there are no data.sources. Write a data set with mmlg data scenes or mmlg data pack and "
            "give --data.path DIR."
        )
    if is_remote(str(path)):
        root, store = copy_small_files(str(path), cache, key=key)
        return PairSet(root, offered_tokenizer(root), load_classes(root / CLASSES_FILE), store)
    root = local_path(str(path))
    if not (root / "dataset.json").is_file():
        raise UserError(f"{told_key(key)}: {root} contains no data set. mmlg data scenes or mmlg data pack writes one.")
    return PairSet(root, offered_tokenizer(root), load_classes(root / CLASSES_FILE))


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
        where = pairs.parts[0].pairs.where if pairs.parts else pairs.where
        raise UserError(
            f"{what} has {told(model)}, the data set {where} was packed with {told(offered)}. Set data.tokenizer to model to "
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
        num_classes = None if self.classes is None else len(self.classes["classnames"])
        return load_eval_split(
            self.pairs.root / split, self.spec, max_bad_fraction=max_bad_fraction, store=self.pairs.store, num_classes=num_classes
        )

    def name_of(self, index: int) -> str:
        """A training sample's shard and key, as far as they can be read. Reads the index: for messages."""
        try:
            reader = JoinedReader.of(self.pairs.training())
            source = reader.source(index)
            place = reader.readers[source].place(index - int(reader.starts[source]))
        except (OSError, UserError):
            return str(index)
        return f"{place.shard if len(reader.readers) > 1 else place.shard.name}/{shown(place.key)}"

    def stream(
        self,
        settings: StreamSettings,
        start_step: int = 0,
        *,
        record: Path | None = None,
        on_epoch: Callable[[EpochReport], None] = print_report,
    ) -> TrainStream:
        """One rank's training batches from `start_step` on; see `TrainStream`."""
        return TrainStream(self.pairs.training(), self.spec, settings, start_step=start_step, record=record, on_epoch=on_epoch)

    def sweep(self) -> Sweep:
        """The training split once, in its own order; of a mixture those of all sources, one after the other."""
        return Sweep(JoinedReader.of(self.pairs.training()), self.spec)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids at the model's context length, int64 [N, T]."""
        return self.spec.tokenizer(texts, self.spec.context_length)
