"""The sets of a mixture, and the captions that are drawn of a sample: sections of the recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmlg_scale.bounds import MAX_NAMES, MAX_SOURCES
from mmlg_scale.errors import require_key as _require
from mmlg_scale.ranges import PositiveFloat
from mmlg_scale.reading import shown

LEAST_CAPTION = 1e-6
"""Of the largest weight of a sample's captions."""


@dataclass
class Source:
    """One data set of a mixture."""

    path: str = ""
    """A folder, or a URL, as data.path."""
    weight: PositiveFloat = 1.0
    """Share of the training samples that come from it, relative to the other sources' weights. Each source has epochs of its own: a small
    one with a large weight is read more often."""
    captions: dict[str, PositiveFloat] | None = None
    """As data.captions, for this source."""


def check_sources(sources: Sequence[Source], path: str | None, captions: Mapping[str, float] | None) -> None:
    """Raise UserError where a mixture cannot be one, or goes with neither `data.path` nor `data.captions`."""
    key, count = "data.sources", len(sources)
    _require(path is None, key, f"is given, and data.path is {path}", "Give one of them: the path can be one of the sources.")
    _require(captions is None, "data.captions", f"is given beside {key}", "Give captions with each source that has them.")
    _require(count > 0, key, "is an empty list", "List data sets, or give data.path.")
    _require(count <= MAX_SOURCES, key, f"has {count:,} data sets", f"At most {MAX_SOURCES} are supported: pack some together.")
    for index, source in enumerate(sources):
        own = f"{key}[{index}]"
        _require(bool(source.path), f"{own}.path", "is missing", "Give the folder or the URL of a data set.")
        _require(0 < source.weight < math.inf, f"{own}.weight", f"is {source.weight}", "Use a positive number, or leave the source out.")
        check_captions(source.captions, f"{own}.captions")


def check_captions(captions: Mapping[str, float] | None, key: str) -> None:
    """Raise UserError where the weights of a sample's captions are none; `key` is where they are in the recipe."""
    if captions is None:
        return
    remedy = "Name keys of the samples' JSON with weights, {alt: 0.5, synthetic: 0.5}, or leave it out."
    _require(0 < len(captions) <= MAX_NAMES, key, f"has {len(captions)} names; 1 to {MAX_NAMES} are supported", remedy)
    for name, weight in captions.items():
        _require(0 < weight < math.inf, key, f"the weight of {shown(name)!r} is {weight}", "Use a positive number, or leave the name out.")
    least = max(captions.values()) * LEAST_CAPTION
    small = next((name for name, weight in captions.items() if weight < least), None)
    _require(small is None, key, f"{shown(small)!r} would be drawn less than once in {1 / LEAST_CAPTION:,.0f} times", "Leave it out.")
