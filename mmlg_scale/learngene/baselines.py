"""What a learngene is compared with, behind one call: where a model of a given size gets its first weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmlg_scale import towers
from mmlg_scale.learngene.compose import narrow_state
from mmlg_scale.learngene.file import Learngene
from mmlg_scale.learngene.structure import TOWERS

FROM_LEARNGENE = ("mmlg", "direct", "tleg", "sws")
FROM_ANCESTOR = ("even",)
INITIALISATIONS = (*FROM_LEARNGENE, "scratch", *FROM_ANCESTOR, "distil")


def initialise(
    init: str,
    *,
    config: Mapping[str, Any],
    sizes: Mapping[str, int | None],
    ancestor_state: Mapping[str, Tensor] | None,
    learngene: Learngene | None,
    seed: int,
) -> dict[str, Tensor]:
    """A CLIP state dict of the requested sizes, or (from a learngene, where `sizes` name only one tower) that tower's part of one.

    Args:
        init: `mmlg`, `direct`, `tleg` and `sws` write it from a learngene of that kind; `scratch` and `distil` draw open_clip's random
            weights (the teacher of `distil` comes in training); `even` picks layers of the ancestor at even distances, the
            first and the last among them, with its stems, and takes the leading channels and heads where the size is narrower.
        config: the ancestor's configuration.
        sizes: image_layers, text_layers, image_width, text_width; a width left out is the ancestor's.
    """
    if init in FROM_LEARNGENE:
        assert learngene is not None
        present = tuple(tower for tower in TOWERS if f"{tower}_layers" in sizes)
        modality = "both" if present == TOWERS else present[0]
        return learngene.descend(**sizes, modality=modality).state
    own = towers.with_sizes(config, **sizes)
    if init in ("scratch", "distil"):
        return towers.build_clip(own, seed=seed).state_dict()
    assert init == "even", init
    assert ancestor_state is not None
    stem, blocks = towers.split_state(ancestor_state)
    picked = {tower: [found[layer] for layer in even_layers(len(found), towers.num_layers(own, tower))] for tower, found in blocks.items()}
    full = towers.join_state(stem, picked)
    shapes = {name: tuple(tensor.shape) for name, tensor in towers.build_meta(own).state_dict().items()}
    return {name: tensor.clone() for name, tensor in narrow_state(shapes, full.__getitem__).items()}


def even_layers(num_ancestor_layers: int, num_layers: int) -> list[int]:
    """`num_layers` layers of the ancestor at even distances (halves round up); a single one is the middle one."""
    if num_layers == 1:
        return [num_ancestor_layers // 2]
    step = (num_ancestor_layers - 1) / (num_layers - 1)
    return [int(index * step + 0.5) for index in range(num_layers)]
