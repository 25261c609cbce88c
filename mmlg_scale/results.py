"""result.json and family.json as objects: the one place that knows their keys. Imports nothing heavy.

`from_json` raises UserError, one line with the JSON path of what is missing or wrong. Keys that it does not know are ignored. What is
derived (charges, ratios) is not read but computed again by `accounting.summarise`, so that it can never disagree with the curves.
Points of a curve stay dictionaries: {"step", "samples", "flops", "seconds", metric: value...}, FLOPs and seconds summed from the start.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from mmlg_scale.errors import UserError

FORMAT_VERSION = 1
"""Of family.json."""
Init = Literal["mmlg", "direct", "scratch", "distil", "even", "tleg", "sws"]
INITS: tuple[Init, ...] = get_args(Init)
Point = dict[str, float]
POINT_KEYS = ("step", "samples", "flops", "seconds")
MOST = 10**30
"""Of a number in a file: more than anything that is counted, FLOPs included, and few enough digits to divide by."""
MOST_SAMPLES = 10**12
"""Of a split."""
OMIT_NONE = {"omit_none": True}
"""Metadata of a field that was not always written: where it is None, its key is left out of the JSON."""

DERIVED = {"derived": True}
"""Metadata of a field that `accounting.summarise` fills: in JSON its keys are those of its owner."""


class _Wrong(Exception):
    """What is wrong, beginning with its JSON path."""


def read_typed(kind: Any, value: Any, path: str) -> Any:
    """`value` (as json.loads gives it) as `kind`: dataclasses, Optional, list, dict, Literal, str, bool, int, float (finite), Any.

    An integer is a float too and stays an integer, so that the JSON written again is the same.

    Raises:
        _Wrong: naming the path.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, path)
    if origin in (Union, types.UnionType):  # of one type and None
        return None if value is None else read_typed(next(a for a in arguments if a is not types.NoneType), value, path)
    if origin is list and isinstance(value, list):
        return [read_typed(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: read_typed(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if origin is Literal:
        if value not in arguments:
            raise _Wrong(f"{path}: {value!r} is not one of {', '.join(map(str, arguments))}")
    elif kind is not Any:
        _check_plain(origin or kind, value, path)
    return value


def _check_plain(kind: Any, value: Any, path: str) -> None:
    words = {str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "an object"}
    allowed: dict[Any, tuple[type, ...]] = {str: (str,), bool: (bool,), int: (int,), float: (int, float)}
    if not isinstance(value, allowed.get(kind, ())) or (isinstance(value, bool) and kind is not bool):
        raise _Wrong(f"{path} is not {words[kind]}")
    if isinstance(value, int) and abs(value) > MOST:
        raise _Wrong(f"{path} is larger than {MOST:.0e}")
    if kind is float and not math.isfinite(cast(float, value)):
        raise _Wrong(f"{path} is not a finite number")


def _read_dataclass(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise _Wrong(f"{path or 'the file'} is not an object")
    hints, found = get_type_hints(kind), {}
    for item in dataclasses.fields(kind):
        inner = f"{path}.{item.name}" if path else item.name
        if item.metadata.get("derived"):
            continue
        if item.name in value:
            found[item.name] = read_typed(hints[item.name], value[item.name], inner)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise _Wrong(f"{inner} is missing")
    return kind(**found)


def _from_json(kind: Any, value: Any, where: str) -> Any:
    try:
        found = read_typed(kind, value, "")
        found.check()
    except _Wrong as error:
        remedy = "Remove it and start the command that wrote it again: complete steps are kept."
        raise UserError(f"{where} is damaged: {error}. {remedy}") from error
    return found


def to_plain(value: Any) -> Any:
    """A dataclass as JSON takes it; derived parts are flattened into their owner, and are left out where they are None."""
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    plain: dict[str, Any] = {}
    for item in dataclasses.fields(value):
        inner = getattr(value, item.name)
        if item.metadata.get("derived"):
            plain |= to_plain(inner) if inner is not None else {}
        elif inner is not None or not item.metadata.get("omit_none"):
            plain[item.name] = to_plain(inner)
    return plain


def _check_curve(curve: list[Point], path: str, metric: str | None = None) -> None:
    """Every point has all of POINT_KEYS, and the metric where one is named."""
    for index, point in enumerate(curve):
        for key in (*POINT_KEYS, *([metric] if metric is not None else [])):
            if key not in point:
                raise _Wrong(f"{path}[{index}].{key} is missing")


@dataclass(frozen=True)
class Cost:
    """What was spent once, beside a run."""

    flops: float
    seconds: float


@dataclass(frozen=True)
class RunResult:
    """result.json of a training run; metrics are of the test split, the curve of the validation split."""

    role: str
    seed: int
    steps: int
    flops: float
    """Of the model's own training, all ranks together."""
    teacher_flops: float
    seconds: float
    metrics: dict[str, float]
    curve: list[Point]
    stopped_early: bool = False
    kept_features: Cost | None = None
    """What the ancestor's cached features cost, where the run read them."""
    metrics_at_0: dict[str, float] | None = None
    params: int | None = field(default=None, metadata=OMIT_NONE)
    image_layers: int | None = None
    """Null for a single text tower; text_layers for an image tower."""
    text_layers: int | None = None
    image_width: int | None = field(default=None, metadata=OMIT_NONE)
    text_width: int | None = field(default=None, metadata=OMIT_NONE)
    bytes: int | None = field(default=None, metadata=OMIT_NONE)
    """Of learngene.safetensors; this and stem_params belong only to a learngene."""
    block_params: int | None = field(default=None, metadata=OMIT_NONE)
    stem_params: int | None = field(default=None, metadata=OMIT_NONE)
    method: str | None = field(default=None, metadata=OMIT_NONE)
    init: Init | None = field(default=None, metadata=OMIT_NONE)
    size: dict[str, Any] | None = field(default=None, metadata=OMIT_NONE)
    target: Any = field(default=None, metadata=OMIT_NONE)
    """What the run stops at, as its identity holds it."""
    sha256: str | None = field(default=None, metadata=OMIT_NONE)
    """Of learngene.safetensors."""

    def check(self) -> None:
        """Raise where the fields do not fit together."""
        _check_curve(self.curve, "curve")

    def to_json(self) -> dict[str, Any]:
        """As result.json holds it."""
        return to_plain(self)

    @classmethod
    def from_json(cls, value: Any, where: str) -> RunResult:
        """Read; raises UserError naming `where` and the JSON path."""
        return _from_json(cls, value, where)


@dataclass(frozen=True)
class SplitSize:
    """The candidates of an evaluation split."""

    images: int
    captions: int
    classes: int | None = field(default=None, metadata=OMIT_NONE)


@dataclass(frozen=True)
class AncestorEntry:
    """The ancestor of a family; flops and seconds are None where its training is not known (weights from elsewhere)."""

    params: int
    flops: float | None
    seconds: float | None
    metrics: dict[str, float]
    image_layers: int | None = field(default=None, metadata=OMIT_NONE)
    text_layers: int | None = field(default=None, metadata=OMIT_NONE)
    curve: list[Point] | None = field(default=None, metadata=OMIT_NONE)
    num_bytes: int | None = field(default=None, metadata=OMIT_NONE)
    block_params: int | None = field(default=None, metadata=OMIT_NONE)
    """Of both towers; None in older files."""

    def check(self) -> None:
        """Raise where the fields do not fit together."""
        _check_curve(self.curve or [], "curve")

    def to_json(self) -> dict[str, Any]:
        """As family.json holds it."""
        return to_plain(self)

    @classmethod
    def from_json(cls, value: Any, where: str) -> AncestorEntry:
        """Read; raises UserError naming `where` and the JSON path."""
        return _from_json(cls, value, where)


@dataclass(frozen=True)
class LearngeneEntry:
    """A learngene and what its extraction cost: ours, or that of another method."""

    params: int
    bytes: int
    block_params: int
    stem_params: int
    flops: float
    teacher_flops: float
    seconds: float
    metrics: dict[str, float] | None = field(default=None, metadata=OMIT_NONE)
    curve: list[Point] | None = field(default=None, metadata=OMIT_NONE)

    @property
    def all_flops(self) -> float:
        """The teacher's included."""
        return self.flops + self.teacher_flops

    def check(self) -> None:
        """Raise where the fields do not fit together."""
        _check_curve(self.curve or [], "curve")

    def to_json(self) -> dict[str, Any]:
        """As family.json holds it."""
        return to_plain(self)

    @classmethod
    def from_json(cls, value: Any, where: str) -> LearngeneEntry:
        """Read; raises UserError naming `where` and the JSON path."""
        return _from_json(cls, value, where)


@dataclass(frozen=True)
class Charge:
    """What a descendant is charged; all None for a size without a scratch entry."""

    target: float | None
    reached: bool | None
    flops_to_target: float | None
    seconds_to_target: float | None


@dataclass(frozen=True)
class DescendantEntry:
    """One descendant (or baseline) of one size and seed."""

    name: str
    image_layers: int | None
    text_layers: int | None
    image_width: int | None
    text_width: int | None
    params: int
    init: Init
    seed: int
    modality: Literal["both", "image", "text"]
    metrics_at_0: dict[str, float] | None
    metrics_final: dict[str, float]
    curve: list[Point]
    in_sum: bool | None = field(default=None, metadata=OMIT_NONE)
    """None (older files): it counts."""
    metric: str | None = field(default=None, metadata=OMIT_NONE)
    """Where it is not the family's."""
    steps: int | None = field(default=None, metadata=OMIT_NONE)
    flops: float | None = field(default=None, metadata=OMIT_NONE)
    """Of the whole training, the teacher's included."""
    seconds: float | None = field(default=None, metadata=OMIT_NONE)
    charge: Charge | None = field(default=None, metadata=DERIVED)

    def check(self, metric: str | None = None, path: str = "") -> None:
        """Raise where the fields do not fit together, or `metric` is not there."""
        prefix = f"{path}." if path else ""
        if not self.curve:
            raise _Wrong(f"{prefix}curve has no points")
        _check_curve(self.curve, f"{prefix}curve", self.metric or metric)
        at_0 = {"metrics_at_0": self.metrics_at_0} if self.metrics_at_0 else {}
        for key, metrics in {"metrics_final": self.metrics_final, **at_0}.items():
            if metric is not None and metric not in metrics:
                raise _Wrong(f"{prefix}{key}.{metric} is missing")

    def to_json(self) -> dict[str, Any]:
        """As family.json holds it."""
        return to_plain(self)

    @classmethod
    def from_json(cls, value: Any, where: str) -> DescendantEntry:
        """Read; raises UserError naming `where` and the JSON path."""
        return _from_json(cls, value, where)


@dataclass(frozen=True)
class Totals:
    """What one way of making the whole family costs, ships and yields, over the sizes in the sum."""

    num_sizes: int
    num_reached: int
    """Sizes of which every seed reaches the target."""
    flops_once: float
    flops: float
    """Charges of all sizes and what is spent once."""
    flops_with_ancestor: float | None
    """None where the ancestor is needed and its cost is unknown."""
    seconds: float
    params_shipped: int | float
    """What must be stored to have every size at its target: what untrained sizes are written from, and each size that is trained."""
    mean_metric_at_0: float | None
    mean_metric_final: float


@dataclass(frozen=True)
class Summary:
    """What `accounting.summarise` derives; a ratio is None where it is not defined, and `notes` says why."""

    num_sizes_in_sum: int
    totals_by_init: dict[str, Totals | None]
    cost_ratio: float | None
    cost_ratio_by_baseline: dict[str, float | None]
    cost_ratio_with_ancestor: float | None
    cost_ratio_with_ancestor_by_baseline: dict[str, float | None]
    cost_ratio_seconds: float | None
    break_even_descendants: int | None
    mean_quality_at_0_over_scratch: float | None
    storage_ratio_ancestor: float
    storage_ratio_family: float | None
    storage_share_blocks: float
    storage_share_stems: float
    storage_ratio_blocks: float | None
    """The learngene's blocks, of the ancestor's. None where these are not known."""
    storage_ratio_stems: float | None
    notes: list[str]


@dataclass(frozen=True)
class FamilyResult:
    """family.json."""

    metric: str
    ancestor: AncestorEntry
    kept_features: Cost | None = field(default=None, kw_only=True)
    splits: dict[str, SplitSize] | None = field(default=None, kw_only=True, metadata=OMIT_NONE)
    """val and test."""
    learngene: LearngeneEntry
    rival_learngenes: dict[str, LearngeneEntry] = field(default_factory=dict, kw_only=True)
    descendants: list[DescendantEntry]
    environment: dict[str, Any]
    recipe: dict[str, Any]
    summary: Summary | None = field(default=None, metadata=DERIVED)

    def check(self) -> None:
        """Raise where the fields do not fit together."""
        if self.metric not in self.ancestor.metrics:
            raise _Wrong(f"ancestor.metrics.{self.metric} is missing")
        if self.ancestor.params < 1:
            raise _Wrong("ancestor.params is not a number of parameters")
        for name, split in (self.splits or {}).items():
            if not (1 <= split.images <= MOST_SAMPLES and 0 <= split.captions <= MOST_SAMPLES):
                raise _Wrong(f"splits.{name} has {split.images} images and {split.captions} captions")
        for index, entry in enumerate(self.descendants):
            entry.check(self.metric, f"descendants[{index}]")
            if entry.init in ("direct", "tleg", "sws") and entry.init not in self.rival_learngenes:
                raise _Wrong(f"rival_learngenes.{entry.init} is missing, and descendants[{index}] is written from it")

    def to_json(self) -> dict[str, Any]:
        """As family.json holds it: what is derived is beside the rest, not below it."""
        return {"format_version": FORMAT_VERSION, **to_plain(self)}

    @classmethod
    def from_json(cls, value: Any, where: str) -> FamilyResult:
        """Read; raises UserError naming `where` and the JSON path, or the version where it is not FORMAT_VERSION."""
        version = value.get("format_version", FORMAT_VERSION) if isinstance(value, dict) else FORMAT_VERSION
        if version != FORMAT_VERSION:
            raise UserError(f"{where}: format_version {version!r} is not supported, {FORMAT_VERSION} is. Use the version that wrote it.")
        return _from_json(cls, value, where)
