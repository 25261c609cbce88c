"""A tower's layers out of a learngene's tensors, at any depth and width. Extraction and writing descendants both come here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mmlg_scale.learngene.blocks import Entry, narrow
from mmlg_scale.learngene.mixing import fixed_sum, fixed_weights, interpolate
from mmlg_scale.learngene.structure import Structure

Get = Callable[[str], Tensor]


def compose_layers(structure: Structure, get: Get, tower: str, num_layers: int, width: int | None = None) -> list[dict[str, Tensor]]:
    """The named tensors of each of `num_layers` layers of a tower; differentiable.

    Args:
        get: gives the learngene's tensors by name.
        width: the tower's residual width; None: the ancestor's. Blocks are narrowed before they are summed.
    """
    target, own, shared = structure.layout(tower, width), structure.layout(tower), structure.layout(structure.wide)
    multimodal, unimodal, vectors = get("multimodal"), get(f"unimodal_{tower}"), get(f"vectors_{tower}")
    maps = (get(f"residual_map_{tower}"), get(f"head_map_{tower}")) if structure.mapped(tower) else None
    layers: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]

    def put(entry: Entry, values_L: Tensor) -> None:
        for layer, tensor in zip(layers, values_L.unbind(0), strict=True):
            layer[entry.name] = tensor

    fixed = None
    if structure.basis == "knots":
        coefficients_LGK = interpolate(get(f"coefficients_{tower}"), num_layers)
        vectors_LV = interpolate(vectors, num_layers)
    else:
        fixed = fixed_weights(structure.basis, num_layers, structure.num_blocks, structure.convention)
        vectors_LV = fixed_sum(fixed, vectors)
    for index, entry in enumerate(target.matrices):
        parts = []
        if structure.num_multimodal:
            wide = shared.matrices[index].view(multimodal)
            parts.append(narrow(entry.name, _mapped(entry.name, wide, maps) if maps else wide, entry.shape))
        if structure.num_unimodal:
            parts.append(narrow(entry.name, own.matrices[index].view(unimodal), entry.shape))
        blocks_Kn = torch.cat([part.flatten(1) for part in parts])
        composed_Ln = coefficients_LGK[:, index] @ blocks_Kn if fixed is None else fixed_sum(fixed, blocks_Kn)
        put(entry, composed_Ln.unflatten(-1, entry.shape))
    for index, entry in enumerate(target.vectors):
        put(entry, narrow(entry.name, own.vectors[index].view(vectors_LV), entry.shape))
    return layers


def narrow_state(shapes: Mapping[str, tuple[int, ...]], get: Get) -> dict[str, Tensor]:
    """A model's tensors at other widths: leading residual channels, heads and MLP rows.

    Args:
        shapes: of the narrower model.
        get: gives the full tensors by the same names.
    """
    return {name: narrow(name, get(name), shape) for name, shape in shapes.items()}


def _mapped(name: str, wide_K: Tensor, maps: tuple[Tensor, Tensor]) -> Tensor:
    """E_out M E_in^T for one matrix of K blocks; `maps` are from the shared to the tower's residual channels and head channels."""
    residual, heads = maps
    if name == "attn.in_proj_weight":
        return (heads @ wide_K.unflatten(1, (3, -1)) @ residual.T).flatten(1, 2)
    if name == "attn.out_proj.weight":
        return residual @ wide_K @ heads.T
    if name == "mlp.c_fc.weight":
        return wide_K @ residual.T
    assert name == "mlp.c_proj.weight", name
    return residual @ wide_K
