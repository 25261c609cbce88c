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
from mmlg_scale.learngene.blocks import BlockLayout
from mmlg_scale.learngene.mixing import compose_layers

MODALITIES = ("both", "image", "text")


@dataclass(frozen=True)
class Descendant:
    """A model written from a learngene.

    Attributes:
        state: open_clip CLIP state dict; of a single tower, that tower's part of it.
        config: open_clip configuration with the requested depths.
    """

    state: dict[str, Tensor]
    config: dict[str, Any]
    modality: str
    tokenizer_files: dict[str, str]

    def export(self, out: str | Path, *, overwrite: bool = False) -> None:
        """Write an open_clip model folder, or a single tower's folder. Raises UserError where OUT holds something else."""
        out = Path(out)
        if self.modality == "both":
            towers.export(self.state, self.config, out, tokenizer_files=self.tokenizer_files, overwrite=overwrite)
        else:
            files = self.tokenizer_files
            towers.export_tower(self.state, self.config, self.modality, out, tokenizer_files=files, overwrite=overwrite)


@torch.no_grad()
def compose_descendant(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    layout: BlockLayout,
    *,
    image_layers: int | None,
    text_layers: int | None,
    modality: str,
    tokenizer_files: Mapping[str, str],
) -> Descendant:
    """See `Learngene.descend`; `tensors` are named as AuxiliaryCLIP's parameters."""
    if modality not in MODALITIES:
        raise UserError(f"modality {modality!r} is unknown. Use one of: {', '.join(MODALITIES)}.")
    depths = {"image": image_layers, "text": text_layers}
    wanted = [tower for tower in ("image", "text") if modality in ("both", tower)]
    for tower in wanted:
        depth = depths[tower]
        if depth is None or depth < 1:
            raise UserError(f"{tower} layers: {depth} is no depth. Use 1 or more.")
    blocks: dict[str, list[dict[str, Tensor]]] = {"image": [], "text": []}
    for tower in wanted:
        blocks_KP = torch.cat([tensors["multimodal"], tensors[f"unimodal_{tower}"]])
        num_layers = depths[tower]
        assert num_layers is not None
        blocks[tower] = compose_layers(layout, blocks_KP, tensors[f"coefficients_{tower}"], tensors[f"vectors_{tower}"], num_layers)
    stem = {name.removeprefix("stem."): tensor for name, tensor in tensors.items() if name.startswith("stem.")}
    if modality != "both":
        stem = {name: tensor for name, tensor in stem.items() if name.startswith("visual.") == (modality == "image")}
        stem.pop("logit_scale", None)
    state = {name: tensor.clone() for name, tensor in towers.join_state(stem, blocks).items()}
    own = towers.with_sizes(config, image_layers=image_layers, text_layers=text_layers)
    return Descendant(state, own, modality, dict(tokenizer_files))
