"""Block transfer: layers' weights as sums of blocks, W[l, g] = sum_k a[l, g, k] B[k, g] for every layer l and tensor g."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmlg_kernels.transfer_plan import Slice, Target, TransferPlan

BACKENDS = ("auto", "chunked", "reference")


def block_transfer(
    plan: TransferPlan,
    sources: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    *,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """The flat layers [L, P] of each of the plan's targets; differentiable by sources and coefficients.

    Args:
        plan: gives named views of the result by `plan.views`.
        sources: [K, P] each, of the plan's shapes; several, since shared blocks and a tower's own are separate parameters.
        coefficients: [L, T, K] per target, K over the target's sources in their order.
        out_dtype: of the layers; None: the sources'. Sums are made in the sources' dtype, and gradients have it.
        backend: chunked (a few batched products), reference (fp64, term by term), or auto.

    Raises:
        ValueError: shapes that are not the plan's; an unknown backend.
    """
    _check(plan, sources, coefficients, backend)
    compose = _reference if backend == "reference" else _chunked
    # Autocast would round the blocks before they are summed.
    with torch.autocast(sources[0].device.type, enabled=False):
        layers = [compose(plan, i, sources, a, plan.targets[i].num_layers) for i, a in enumerate(coefficients)]
    return [layers_LP.to(out_dtype or sources[0].dtype) for layers_LP in layers]


def transfer_layer(
    plan: TransferPlan,
    target_index: int,
    sources: Sequence[Tensor],
    coefficients_TK: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The named tensors of one layer, to be composed inside an activation-checkpointed layer so that only one is in memory at a time."""
    with torch.autocast(sources[0].device.type, enabled=False):
        layers_LP = _chunked(plan, target_index, sources, coefficients_TK.unsqueeze(0), 1)
    return plan.views(target_index, layers_LP.to(out_dtype or sources[0].dtype))[0]


def transfer_blocks(blocks: Sequence[Mapping[str, Tensor]], coefficients_LTK: Tensor, *, backend: str = "auto") -> list[dict[str, Tensor]]:
    """The L layers out of K blocks given by name; copies the blocks into one flat tensor.

    Args:
        blocks: K mappings with the same names and shapes.
        coefficients_LTK: [L, T, K], T in the order of the names.

    Raises:
        ValueError: blocks that differ in names or shapes, or coefficients of other sizes.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in blocks[0].items()}
    if any({name: tuple(tensor.shape) for name, tensor in block.items()} != shapes for block in blocks):
        raise ValueError("blocks differ in their names or shapes")
    flat_KP = torch.stack([torch.cat([block[name].flatten() for name in shapes]) for block in blocks])
    slices, offset = [], 0
    for tensor in blocks[0].values():
        slices.append(Slice(offset, 1, 0, 1, tensor.numel(), 0))
        offset += tensor.numel()
    target = Target(coefficients_LTK.shape[0], tuple(shapes), tuple(shapes.values()), (0,), (tuple(slices),))
    plan = TransferPlan([tuple(flat_KP.shape)], [target], flat_KP.device)  # type: ignore[list-item]
    return plan.views(0, block_transfer(plan, [flat_KP], [coefficients_LTK], backend=backend)[0])


def _chunked(plan: TransferPlan, target_index: int, sources: Sequence[Tensor], coefficients_LTK: Tensor, num_layers: int) -> Tensor:
    """One batched product per source over pieces of equal size, [N, L, K] @ [N, K, C], and one copy into the layers' order."""
    target, piece = plan.targets[target_index], plan.pieces[target_index]
    pieces_NLK = coefficients_LTK.transpose(0, 1).index_select(0, plan.piece_tensors[target_index])
    total_NLC, first = None, 0
    for source, index in zip(target.sources, plan.indices[target_index], strict=True):
        blocks_KP = sources[source]
        if not (count := blocks_KP.shape[0]):
            continue
        read_KP = blocks_KP if index is None else blocks_KP.index_select(1, index)
        blocks_NKC = read_KP.unflatten(1, (-1, piece)).transpose(0, 1)
        part_NLK = pieces_NLK[..., first : first + count]
        total_NLC = torch.bmm(part_NLK, blocks_NKC) if total_NLC is None else torch.baddbmm(total_NLC, part_NLK, blocks_NKC)
        first += count
    assert total_NLC is not None
    return total_NLC.transpose(0, 1).reshape(num_layers, -1)


def _reference(plan: TransferPlan, target_index: int, sources: Sequence[Tensor], coefficients_LTK: Tensor, num_layers: int) -> Tensor:
    """The definition in fp64, term by term."""
    target, layers = plan.targets[target_index], []
    for layer in range(num_layers):
        tensors = []
        for g, size in enumerate(target.sizes):
            total, k = sources[0].new_zeros(size, dtype=torch.float64), 0
            for source, slices in zip(target.sources, target.slices, strict=True):
                for block_P in sources[source].double().unbind(0):
                    s = slices[g]
                    strides, shape = (s.group_stride, s.row_stride, 1), (s.groups, s.rows, s.columns)
                    read = block_P.contiguous().as_strided(shape, strides, block_P.contiguous().storage_offset() + s.offset)
                    total, k = total + coefficients_LTK[layer, g, k].double() * read.reshape(-1), k + 1
            tensors.append(total)
        layers.append(torch.cat(tensors))
    return torch.stack(layers)


def _check(plan: TransferPlan, sources: Sequence[Tensor], coefficients: Sequence[Tensor], backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; valid: {', '.join(BACKENDS)}")
    if tuple(tuple(s.shape) for s in sources) != plan.source_shapes:
        raise ValueError(f"sources {[list(s.shape) for s in sources]}; the plan is for {[list(s) for s in plan.source_shapes]}")
    expected = [(t.num_layers, len(t.names), plan.num_blocks(t)) for t in plan.targets]
    if [tuple(a.shape) for a in coefficients] != expected:
        raise ValueError(f"coefficients {[list(a.shape) for a in coefficients]}; the plan is for {[list(e) for e in expected]}")
