"""A data set without a model (`PairSet`), and as one model reads it (`Corpus`): by the model's tokenizer and preprocessing."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from mmlg_scale.data.faults import MAX_BAD_FRACTION
from mmlg_scale.data.manifest import SPLITS
from mmlg_scale.data.pipeline import EvalSplit, StreamSettings, TrainStream, load_eval_split
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.data.sweep import Sweep
from mmlg_scale.data.tokens import load_tokenizer
from mmlg_scale.errors import UserError
from mmlg_scale.towers import BytePairTokenizer, ModelSpec, Tokenizer, same_tokenizer, told


@dataclass(frozen=True)
class PairSet:
    """Image-text pairs on disk.

    Attributes:
        tokenizer: what the set offers to models trained from scratch on it; None: it has none.
        classes: {"classnames", "templates"}, where the set has classes.
    """

    root: Path
    tokenizer: Tokenizer | None
    classes: dict[str, list[str]] | None

    def digest(self) -> str:
        """SHA-256 over the manifests of all splits, and the classes. A tokenizer belongs to a model, and is not in it."""
        found = hashlib.sha256()
        for split in SPLITS:
            file = self.root / split / "manifest.json"
            if file.is_file():
                found.update(f"{split} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
        found.update(json.dumps(self.classes, sort_keys=True).encode())
        return found.hexdigest()


def open_pairs(path: str | Path | None) -> PairSet:
    """The data set at a recipe's data.path.

    Raises:
        UserError: no path, no data set there, or damaged classes or tokenizer.
    """
    if path is None:
        raise UserError("recipe key data.path is null. Write a data set with mmlg data scenes or mmlg data pack and give --data.path DIR.")
    root = Path(path)
    if not (root / "dataset.json").is_file():
        raise UserError(f"{root} holds no data set. mmlg data scenes or mmlg data pack writes one; give its folder.")
    return PairSet(root, load_tokenizer(root), _classes(root / "classes.json"))


def _classes(file: Path) -> dict[str, list[str]] | None:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = {key: content[key] for key in ("classnames", "templates")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}). It holds classnames and templates; pack the data set again.") from error
    for key, value in found.items():
        if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
            raise UserError(f"{file}: {key} is not a list of texts. Correct it, or pack the data set again.")
    if not all("{}" in template for template in found["templates"]):
        raise UserError(f"{file}: a template has no {{}} for the class name. Correct it.")
    return found


def choose_tokenizer(pairs: PairSet, model: Tokenizer | None, choice: Literal["auto", "model"], *, what: str) -> Tokenizer:
    """The tokenizer with which a model reads a data set, `choice` being the recipe's data.tokenizer.

    Args:
        model: the model's own; None for a model trained from scratch.
        what: the model, for the message.

    Raises:
        UserError: the model and the data set have different ones, and the recipe does not say that the model's is meant.
    """
    if model is None:
        return pairs.tokenizer if pairs.tokenizer is not None and choice == "auto" else BytePairTokenizer()
    if choice == "auto" and pairs.tokenizer is not None and not same_tokenizer(pairs.tokenizer, model):
        raise UserError(
            f"{what} has the tokenizer {told(model)}, the data set {pairs.root} has {told(pairs.tokenizer)}. Set --data.tokenizer model to "
            "use the model's, or pack the pairs with --tokenizer none."
        )
    return model


@dataclass(frozen=True)
class Corpus:
    """A data set as a model of this spec reads it."""

    pairs: PairSet
    spec: ModelSpec

    def eval_split(self, split: str, *, max_bad_fraction: float = MAX_BAD_FRACTION) -> EvalSplit:
        """A whole split, decoded and tokenised."""
        return load_eval_split(self.pairs.root / split, self.spec, max_bad_fraction=max_bad_fraction)

    def stream(self, settings: StreamSettings, start_step: int = 0, *, record: Path | None = None) -> TrainStream:
        """Training batches from `start_step` on; what is skipped is listed in the folder `record`."""
        return TrainStream(self.pairs.root / "train", self.spec, settings, start_step=start_step, record=record)

    def sweep(self) -> Sweep:
        """The training split once, in its order."""
        return Sweep(ShardReader(self.pairs.root / "train"), self.spec)

    @property
    def classes(self) -> dict[str, Any] | None:
        """Class names and caption templates, where the set has classes."""
        return self.pairs.classes

    def tokenize(self, texts: list[str]) -> Tensor:
        """Token ids [n, T] at the model's context length."""
        return self.spec.tokenizer(texts, self.spec.context_length)
