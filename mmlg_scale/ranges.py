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

IN_WORDS = {
    "AtLeastTwo": "a whole number of 2 or more",
    "PositiveInt": "a whole number of 1 or more",
    "NonNegativeInt": "a whole number of 0 or more",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number of 0 or more",
    "ClosedUnitInterval": "a number from 0 to 1",
    "UnitInterval": "a number from 0 to below 1",
    "Fraction": "a number above 0 and at most 1",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "dict": "a mapping of keys",
}
"""Each type as an error message names it."""

__all__ = [
    "IN_WORDS",
    "AtLeastTwo",
    "ClosedUnitInterval",
    "Fraction",
    "NonNegativeFloat",
    "NonNegativeInt",
    "PositiveFloat",
    "PositiveInt",
    "UnitInterval",
]
