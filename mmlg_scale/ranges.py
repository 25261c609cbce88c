"""Number types with a range, checked by the parser in recipes and on the command line alike."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

from mmlg_scale.bounds import (
    MAX_BATCH,
    MAX_BLOCKS,
    MAX_CAPTIONS_PER_IMAGE,
    MAX_IMAGE_SIZE,
    MAX_KNOTS,
    MAX_LAYERS,
    MAX_PROCESSES,
    MAX_SCENES,
    MAX_STEPS,
    MAX_STUDENTS,
    MAX_WIDTH,
    MAX_WORKERS,
)

_BOUNDED = {
    "Layers": (1, MAX_LAYERS),
    "Width": (1, MAX_WIDTH),
    "Blocks": (0, MAX_BLOCKS),
    "Knots": (2, MAX_KNOTS),
    "Rank": (1, MAX_WIDTH),
    "Students": (1, MAX_STUDENTS),
    "CaptionCount": (1, MAX_CAPTIONS_PER_IMAGE),
    "Steps": (0, MAX_STEPS),
    "BatchSize": (2, MAX_BATCH),
    "Parts": (1, MAX_BATCH),
    "SceneCount": (1, MAX_SCENES),
    "Workers": (0, MAX_WORKERS),
    "Threads": (1, MAX_WORKERS),
    "Processes": (1, MAX_PROCESSES),
    "ImageSize": (16, MAX_IMAGE_SIZE),
}
"""Whole numbers from the first to the second: see `bounds`."""

if TYPE_CHECKING:
    Layers: TypeAlias = int
    Width: TypeAlias = int
    Blocks: TypeAlias = int
    Knots: TypeAlias = int
    Rank: TypeAlias = int
    Students: TypeAlias = int
    CaptionCount: TypeAlias = int
    Steps: TypeAlias = int
    BatchSize: TypeAlias = int
    Parts: TypeAlias = int
    SceneCount: TypeAlias = int
    Workers: TypeAlias = int
    Threads: TypeAlias = int
    Processes: TypeAlias = int
    ImageSize: TypeAlias = int
    PositiveInt: TypeAlias = int
    NonNegativeInt: TypeAlias = int
    PositiveFloat: TypeAlias = float
    NonNegativeFloat: TypeAlias = float
    ClosedUnitInterval: TypeAlias = float
    UnitInterval: TypeAlias = float
    Fraction: TypeAlias = float
else:
    from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt, restricted_number_type

    # The library's own PositiveFloat and NonNegativeFloat allow inf.
    PositiveFloat = restricted_number_type("PositiveFinite", float, [(">", 0), ("<", math.inf)], docstring="float above 0")
    NonNegativeFloat = restricted_number_type("NonNegativeFinite", float, [(">=", 0), ("<", math.inf)], docstring="float from 0")

    def _bounded(name: str) -> type:
        least, most = _BOUNDED[name]
        same = next(other for other, bounds in _BOUNDED.items() if bounds == (least, most))
        if same != name:
            return globals()[same]  # jsonargparse has one type for one range
        return restricted_number_type(name, int, [(">=", least), ("<=", most)], docstring=f"int from {least} to {most}")

    for _name in _BOUNDED:
        globals()[_name] = _bounded(_name)
    UnitInterval = restricted_number_type("UnitInterval", float, [(">=", 0), ("<", 1)], docstring="float from 0 to below 1")
    Fraction = restricted_number_type("Fraction", float, [(">", 0), ("<=", 1)], docstring="float above 0, at most 1")

IN_WORDS = {
    **{name: f"a whole number from {least} to {most:,}" for name, (least, most) in _BOUNDED.items()},
    "PositiveInt": "a whole number of 1 or more",
    "NonNegativeInt": "a whole number of 0 or more",
    "PositiveFinite": "a number above 0",
    "NonNegativeFinite": "a number of 0 or more",
    "ClosedUnitInterval": "a number from 0 to 1",
    "UnitInterval": "a number from 0 to below 1",
    "Fraction": "a number above 0 and at most 1",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "dict": "a mapping of keys",
    "list": "a list, [first, second, ...]",
}
"""Each type as an error message names it."""

__all__ = [
    "IN_WORDS",
    "BatchSize",
    "Blocks",
    "CaptionCount",
    "ClosedUnitInterval",
    "Fraction",
    "ImageSize",
    "Knots",
    "Layers",
    "NonNegativeFloat",
    "NonNegativeInt",
    "Parts",
    "PositiveFloat",
    "PositiveInt",
    "Processes",
    "Rank",
    "SceneCount",
    "Steps",
    "Students",
    "Threads",
    "UnitInterval",
    "Width",
    "Workers",
]
