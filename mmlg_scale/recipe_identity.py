"""What of a recipe's part tells one run from another."""

from __future__ import annotations

import dataclasses
from typing import Any

LATER = {"later": True}
"""Metadata of a field that came later: at its default, which changes nothing, it is no part of a run's identity, so that runs from before
it are recognised."""


def identity_of(value: Any) -> Any:
    """A part of the recipe as nested dictionaries, without LATER fields at their defaults."""
    if isinstance(value, list):
        return [identity_of(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    found = {item: getattr(value, item.name) for item in dataclasses.fields(value)}
    return {item.name: identity_of(given) for item, given in found.items() if not (item.metadata.get("later") and given == _default(item))}


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
