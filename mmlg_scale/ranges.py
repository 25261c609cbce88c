"""Number types with a range, checked by the parser in recipes and on the command line alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    AtLeastTwo: TypeAlias = int
    PositiveInt: TypeAlias = int
    NonNegativeInt: TypeAlias = int
    PositiveFloat: TypeAlias = float
    NonNegativeFloat: TypeAlias = float
    ClosedUnitInterval: TypeAlias = float
    UnitInterval: TypeAlias = float
    Fraction: TypeAlias = float
else:
    from jsonargparse.typing import (
        ClosedUnitInterval,
        NonNegativeFloat,
        NonNegativeInt,
        PositiveFloat,
        PositiveInt,
        restricted_number_type,
    )

    AtLeastTwo = restricted_number_type("AtLeastTwo", int, (">=", 2), docstring="int of 2 or more")
    UnitInterval = restricted_number_type("UnitInterval", float, [(">=", 0), ("<", 1)], docstring="float from 0 to below 1")
    Fraction = restricted_number_type("Fraction", float, [(">", 0), ("<=", 1)], docstring="float above 0, at most 1")

__all__ = [
    "AtLeastTwo",
    "ClosedUnitInterval",
    "Fraction",
    "NonNegativeFloat",
    "NonNegativeInt",
    "PositiveFloat",
    "PositiveInt",
    "UnitInterval",
]
