"""What a learngene is compared with, behind one call: where a model of a given size gets its first weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmlg_scale import towers
from mmlg_scale.learngene.file import Learngene

INITIALISATIONS = ("mmlg", "scratch", "even", "distil")


def initialise(
    init: str,
    *,
    config: Mapping[str, Any],
    image_layers: int,
    text_layers: int,
    ancestor_state: Mapping[str, Tensor] | None,
    learngene: Learngene | None,
    seed: int,
) -> dict[str, Tensor]:
    """A CLIP state dict of the requested depths.

    Args:
        init: `mmlg` writes it from the learngene; `scratch` and `distil` draw open_clip's random weights (the teacher of `distil` comes in
            training); `even` picks layers of the ancestor at even distances, the first and the last among them, with its stems.
        config: the ancestor's configuration.
    """
    if init == "mmlg":
        assert learngene is not None
        return learngene.descend(image_layers=image_layers, text_layers=text_layers).state
    if init in ("scratch", "distil"):
        return towers.build_clip(towers.with_sizes(config, image_layers=image_layers, text_layers=text_layers), seed=seed).state_dict()
    assert init == "even", init
    assert ancestor_state is not None
    stem, blocks = towers.split_state(ancestor_state)
    picked = {
        "image": [blocks["image"][layer] for layer in even_layers(len(blocks["image"]), image_layers)],
        "text": [blocks["text"][layer] for layer in even_layers(len(blocks["text"]), text_layers)],
    }
    return towers.join_state(stem, picked)


def even_layers(num_ancestor_layers: int, num_layers: int) -> list[int]:
    """`num_layers` layers of the ancestor at even distances (halves round up); one alone is the middle one."""
    if num_layers == 1:
        return [num_ancestor_layers // 2]
    step = (num_ancestor_layers - 1) / (num_layers - 1)
    return [int(index * step + 0.5) for index in range(num_layers)]
