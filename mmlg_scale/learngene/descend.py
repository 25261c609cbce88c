"""Learngene + requested size -> a plain CLIP state dict: closed form, no data, no training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlg_scale import towers
from mmlg_scale.errors import UserError
from mmlg_scale.learngene.compose import compose_layers, narrow_state
from mmlg_scale.learngene.embedding import multiplied_out
from mmlg_scale.learngene.structure import STEM, TOWERS, Structure, stem_shapes

MODALITIES = ("both", "image", "text")


@dataclass(frozen=True)
class Descendant:
    """A model written from a learngene.

    Attributes:
        state: open_clip CLIP state dict; of a single tower, that tower's part of it.
        spec: the learngene's, at the requested sizes.
    """

    state: dict[str, Tensor]
    spec: towers.ModelSpec
    modality: str

    @property
    def config(self) -> dict[str, Any]:
        """open_clip configuration with the requested sizes."""
        return self.spec.config

    def export(self, out: str | Path, *, overwrite: bool = False) -> None:
        """Write an open_clip model folder, or a single tower's folder. Raises UserError where OUT holds something else."""
        model = towers.Bundle(self.spec, self.state)
        if self.modality == "both":
            towers.export(model, Path(out), overwrite=overwrite)
        else:
            towers.export_tower(model, self.modality, Path(out), overwrite=overwrite)


@torch.no_grad()
def compose_descendant(
    structure: Structure,
    tensors: Mapping[str, Tensor],
    spec: towers.ModelSpec,
    *,
    layers: Mapping[str, int | None],
    widths: Mapping[str, int | None],
    modality: str,
) -> Descendant:
    """See `Learngene.descend`; `layers` and `widths` per tower."""
    if modality not in MODALITIES:
        raise UserError(f"modality {modality!r} is unknown. Use one of: {', '.join(MODALITIES)}.")
    wanted = [tower for tower in TOWERS if modality in ("both", tower)]
    for tower in wanted:
        if layers[tower] is None:
            raise UserError(f"{tower} layers is missing. Give the depth of the {tower} tower.")
    sizes = {f"{tower}_{kind}": of[tower] for tower in wanted for kind, of in (("layers", layers), ("width", widths))}
    spec = spec.sized(**sizes)
    config = spec.config
    towers.require_memory(config)
    depths_and_widths = {tower: (towers.num_layers(config, tower), towers.width(config, tower)) for tower in wanted}
    blocks: dict[str, list[dict[str, Tensor]]] = {"image": [], "text": []}
    blocks |= compose_layers(structure, tensors.__getitem__, depths_and_widths)
    shapes = stem_shapes(config)
    if modality != "both":
        shapes = {name: shape for name, shape in shapes.items() if name.startswith("visual.") == (modality == "image")}
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("logit_")}
    stem = narrow_state(shapes, multiplied_out(lambda name: tensors[STEM + name], structure.embedding_rank))
    # Layers are fresh tensors; stems are copied, so that whoever changes a descendant in place does not change the learngene.
    stem = {name: tensor.clone() for name, tensor in stem.items()}
    return Descendant(towers.join_state(stem, blocks), spec, modality)
