"""Towers' layers out of a learngene's tensors, at any depth and width. Extraction and writing descendants both come here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmlg_kernels import Slice, Target, TransferPlan, block_transfer, transfer_layer
from torch import Tensor

from mmlg_scale.learngene.blocks import BlockLayout, narrow
from mmlg_scale.learngene.mixing import fixed_sum, fixed_weights, interpolate
from mmlg_scale.learngene.structure import Structure

Get = Callable[[str], Tensor]
Sizes = Mapping[str, tuple[int, int | None]]
"""Per tower the number of layers, and the residual width (None: the ancestor's)."""
Layer = dict[str, Tensor]


def compose_layers(structure: Structure, get: Get, sizes: Sizes, *, dtype: torch.dtype | None = None) -> dict[str, list[Layer]]:
    """The named tensors of each layer of each tower; differentiable.

    Blocks are narrowed before they are summed. All matrices of both towers are one `block_transfer`.

    Args:
        get: gives the learngene's tensors by name.
        dtype: of the matrices; None: the blocks'.
    """
    if structure.basis != "knots":
        matrices = {tower: _fixed_matrices(structure, get, tower, *size) for tower, size in sizes.items()}
        vectors = {tower: _fixed_vectors(structure, get, tower, *size) for tower, size in sizes.items()}
    else:
        composer = _Composer(structure, get, sizes)
        flat = block_transfer(composer.plan, composer.sources, composer.coefficients, out_dtype=dtype)
        matrices = {tower: composer.plan.views(i, flat[i]) for i, tower in enumerate(sizes)}
        vectors = composer.vectors
    return {tower: [m | v for m, v in zip(matrices[tower], vectors[tower], strict=True)] for tower in sizes}


def compose_lazily(
    structure: Structure, get: Get, sizes: Sizes, *, dtype: torch.dtype | None = None
) -> dict[str, list[Callable[[], Layer]]]:
    """As `compose_layers`, but each layer's matrices are summed when its function is called.

    For activation-checkpointed layers: one layer's weights are in memory at a time, and their gradients too. Basis `knots` only.
    """
    composer = _Composer(structure, get, sizes)

    def make(index: int, coefficients_GK: Tensor, vectors: Layer) -> Layer:
        return transfer_layer(composer.plan, index, composer.sources, coefficients_GK, out_dtype=dtype) | vectors

    return {
        tower: [
            functools.partial(make, index, a_GK, vectors)
            for a_GK, vectors in zip(composer.coefficients[index].unbind(0), composer.vectors[tower], strict=True)
        ]
        for index, tower in enumerate(sizes)
    }


def narrow_state(shapes: Mapping[str, tuple[int, ...]], get: Get) -> dict[str, Tensor]:
    """A model's tensors at other widths: leading residual channels, heads and MLP rows.

    Args:
        shapes: of the narrower model.
        get: gives the full tensors by the same names.
    """
    return {name: narrow(name, get(name), shape) for name, shape in shapes.items()}


class _Composer:
    """What block transfer takes, a plan, the blocks, and the coefficients [L, G, K] of each tower; and the layers' vectors."""

    def __init__(self, structure: Structure, get: Get, sizes: Sizes) -> None:
        counts = [num_layers for num_layers, _ in sizes.values()]
        knots = [get(f"{kind}_{tower}") for kind in ("coefficients", "vectors") for tower in sizes]
        rows = interpolate(knots, counts * 2)
        self.coefficients = rows[: len(sizes)]
        self.vectors = {t: _vectors(structure, t, sizes[t][1], v) for t, v in zip(sizes, rows[len(sizes) :], strict=True)}
        names = ["multimodal", *(f"unimodal_{tower}" for tower in sizes), *(f"mapped_{t}" for t in sizes if structure.mapped(t))]
        if all(structure.mapped(tower) for tower in sizes):
            names.remove("multimodal")
        self.sources = [_mapped_blocks(structure, get, n.removeprefix("mapped_")) if n.startswith("mapped_") else get(n) for n in names]
        self.plan = _plan(structure, tuple(names), tuple((tower, *size) for tower, size in sizes.items()), self.sources[0].device)


@functools.lru_cache(maxsize=256)
def _plan(structure: Structure, names: tuple[str, ...], sizes: tuple[tuple[str, int, int | None], ...], device: Any) -> TransferPlan:
    shapes, layouts = [], []
    for name in names:
        tower = structure.wide if name == "multimodal" else name.rsplit("_", 1)[1]
        layouts.append(structure.layout(tower))
        shapes.append((structure.num_unimodal if name.startswith("unimodal") else structure.num_multimodal, layouts[-1].matrix_size))
    targets = []
    for tower, num_layers, width in sizes:
        part = structure.layout(tower, width)
        shared = f"mapped_{tower}" if structure.mapped(tower) else "multimodal"
        places = tuple(names.index(name) for name in (shared, f"unimodal_{tower}"))
        slices = tuple(_slices(layouts[place], part) for place in places)
        targets.append(Target(num_layers, tuple(e.name for e in part.matrices), tuple(e.shape for e in part.matrices), places, slices))
    return TransferPlan(shapes, targets, device)


def _slices(full: BlockLayout, part: BlockLayout) -> tuple[Slice, ...]:
    """Where the matrices of a block of `part` lie in one of `full`; see `narrow`."""
    return tuple(
        Slice.leading(whole.offset, whole.shape, some.shape, groups=3 if "in_proj_" in some.name else 1)  # type: ignore[arg-type]
        for whole, some in zip(full.matrices, part.matrices, strict=True)
    )


def _fixed_vectors(structure: Structure, get: Get, tower: str, num_layers: int, width: int | None) -> list[Layer]:
    weights = fixed_weights(structure.basis, num_layers, structure.num_blocks, structure.convention)
    return _vectors(structure, tower, width, fixed_sum(weights, get(f"vectors_{tower}")))


def _vectors(structure: Structure, tower: str, width: int | None, vectors_LV: Tensor) -> list[Layer]:
    """LayerNorms and biases of each layer, by name."""
    entries = structure.layout(tower).vectors
    if width is None or entries == structure.layout(tower, width).vectors:
        parts = iter(vectors_LV.reshape(-1).split([entry.size for entry in entries] * len(vectors_LV)))  # one gradient, written once
        return [{entry.name: next(parts) for entry in entries} for _ in vectors_LV]
    layers: list[Layer] = [{} for _ in vectors_LV]
    for full, entry in zip(entries, structure.layout(tower, width).vectors, strict=True):
        values_L = narrow(entry.name, full.view(vectors_LV), entry.shape)
        for layer, tensor in zip(layers, values_L.unbind(0), strict=True):
            layer[entry.name] = tensor
    return layers


def _fixed_matrices(structure: Structure, get: Get, tower: str, num_layers: int, width: int | None) -> list[Layer]:
    """The bases `linear` and `step`: term by term, so that the result is rounded as their papers' formulas are."""
    weights = fixed_weights(structure.basis, num_layers, structure.num_blocks, structure.convention)
    own, shared = structure.layout(tower), structure.layout(tower if structure.mapped(tower) else structure.wide)
    multimodal = _mapped_blocks(structure, get, tower) if structure.mapped(tower) else get("multimodal")
    unimodal = get(f"unimodal_{tower}")
    layers: list[Layer] = [{} for _ in range(num_layers)]
    for index, entry in enumerate(structure.layout(tower, width).matrices):
        blocks = [
            narrow(entry.name, layout.matrices[index].view(source), entry.shape)
            for layout, source in ((shared, multimodal), (own, unimodal))
        ]
        composed_L = fixed_sum(weights, torch.cat(blocks))
        for layer, tensor in zip(layers, composed_L.unbind(0), strict=True):
            layer[entry.name] = tensor
    return layers


def _mapped_blocks(structure: Structure, get: Get, tower: str) -> Tensor:
    """[K_M, P]: the multimodal blocks at the tower's width, E_out M E_in^T for each matrix, flat.

    The maps are from the shared to the tower's residual channels and head channels.
    """
    residual, heads = get(f"residual_map_{tower}"), get(f"head_map_{tower}")
    multimodal, parts = get("multimodal"), []
    for wide, own in zip(structure.layout(structure.wide).matrices, structure.layout(tower).matrices, strict=True):
        matrix_K = _mapped(wide.name, wide.view(multimodal), residual, heads)
        parts.append(narrow(own.name, matrix_K, own.shape).flatten(1))
    return torch.cat(parts, dim=1)


def _mapped(name: str, wide_K: Tensor, residual: Tensor, heads: Tensor) -> Tensor:
    if name == "attn.in_proj_weight":
        return (heads @ wide_K.unflatten(1, (3, -1)) @ residual.T).flatten(1, 2)
    if name == "attn.out_proj.weight":
        return residual @ wide_K @ heads.T
    if name == "mlp.c_fc.weight":
        return wide_K @ residual.T
    assert name == "mlp.c_proj.weight", name
    return residual @ wide_K
