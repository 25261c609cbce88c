"""Block transfer: layers' weights as sums of blocks, W[l, g] = sum_k a[l, g, k] B[k, g] for every layer l and tensor g."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmlg_kernels.dispatch import choose
from mmlg_kernels.transfer_plan import Slice, Target, TransferPlan, find_plan


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
        backend: triton (one launch), chunked (a few batched products), reference (fp64, term by term), or auto.

    Raises:
        ValueError: shapes that are not the plan's; an unknown backend; a plan that the Triton kernel cannot run.
    """
    _check(plan, sources, coefficients)
    name = choose(backend, sources[0])
    if backend == "triton" and plan.mixes is None:
        told = "mixes at most 8 blocks out of two of at most four sources, equally many in every target, and reads a number once a layer"
        raise ValueError(f"the Triton kernel {told}")
    if name == "triton" and plan.mixes is not None:
        out = _transfer(list(sources), list(coefficients), plan.key, out_dtype or sources[0].dtype)
        sizes = [target.num_layers * sum(target.sizes) for target in plan.targets]
        return [part.view(t.num_layers, -1) for part, t in zip(out.split(sizes), plan.targets, strict=True)]
    compose = _reference if name == "reference" else _chunked
    # Autocast would round the blocks before they are summed.
    with torch.autocast(sources[0].device.type, enabled=False):
        layers = [compose(plan, i, sources, a) for i, a in enumerate(coefficients)]
    return [layers_LP.to(out_dtype or sources[0].dtype) for layers_LP in layers]


def transfer_layer(
    plan: TransferPlan,
    target_index: int,
    sources: Sequence[Tensor],
    coefficients_TK: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """The named tensors of one layer, to be composed inside an activation-checkpointed layer so that only one is in memory at a time."""
    alone = plan.layer_plans[target_index]
    mine = [sources[source] for source in plan.targets[target_index].sources]
    layers = block_transfer(alone, mine, [coefficients_TK.unsqueeze(0)], out_dtype=out_dtype, backend=backend)
    return alone.views(0, layers[0])[0]


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


def _chunked(plan: TransferPlan, target_index: int, sources: Sequence[Tensor], coefficients_LTK: Tensor) -> Tensor:
    target, reads = plan.targets[target_index], []
    for i in plan.used(target):
        blocks_KP, index = sources[target.sources[i]], plan.indices[target_index][i]
        reads.append(blocks_KP if index is None else _Read.apply(blocks_KP, index, target.slices[i]))
    return _Mix.apply(coefficients_LTK, plan.piece_tensors[target_index], *reads)


class _Read(torch.autograd.Function):
    """What the tensors of a layer read in each block, in order; backward by strided additions, much faster than index_add_ on a CPU."""

    @staticmethod
    def forward(ctx: Any, blocks_KP: Tensor, index: Tensor, slices: tuple[Slice, ...]) -> Tensor:
        ctx.shape, ctx.slices = blocks_KP.shape, slices
        return blocks_KP.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, grad_KQ: Tensor) -> tuple[Tensor, None, None]:
        total_KP = grad_KQ.new_zeros(ctx.shape)
        for piece, grad in zip(ctx.slices, grad_KQ.split([piece.size for piece in ctx.slices], dim=1), strict=True):
            shape, strides = (piece.groups, piece.rows, piece.columns), (piece.group_stride, piece.row_stride, 1)
            place = total_KP.as_strided((len(grad), *shape), (total_KP.stride(0), *strides), piece.offset)
            place.add_(grad.unflatten(1, shape))
        return total_KP, None, None


class _Mix(torch.autograd.Function):
    """One multiply-add per block into the layers where they lie; backward by batched products, without any tensor of L x K x P.

    In pieces of one size C, each of a single tensor, a layer [P] is [N, C], and the coefficients of all pieces broadcast over it.
    """

    @staticmethod
    def forward(ctx: Any, coefficients_LTK: Tensor, piece_tensors_N: Tensor, *reads: Tensor) -> Tensor:
        ctx.save_for_backward(coefficients_LTK, piece_tensors_N, *reads)
        num_pieces, total_LNC = len(piece_tensors_N), torch.empty(0)
        pieces_KLN1 = coefficients_LTK[:, piece_tensors_N].permute(2, 0, 1).unsqueeze(3)
        for k, block_P in enumerate(block_P for read_KP in reads for block_P in read_KP.unbind(0)):
            block_NC = block_P.unflatten(0, (num_pieces, -1))
            total_LNC = pieces_KLN1[k] * block_NC if k == 0 else total_LNC.addcmul_(pieces_KLN1[k], block_NC)
        return total_LNC.flatten(1)

    @staticmethod
    def backward(ctx: Any, grad_LP: Tensor) -> tuple[Tensor | None, ...]:
        coefficients_LTK, piece_tensors_N, *reads = ctx.saved_tensors
        grad_NLC = grad_LP.unflatten(1, (len(piece_tensors_N), -1)).transpose(0, 1)
        pieces_NKL = coefficients_LTK[:, piece_tensors_N].permute(1, 2, 0)
        read_grads: list[Tensor | None] = []
        coefficient_grads, first = [], 0
        for read_KP in reads:
            blocks_NCK = read_KP.unflatten(1, (len(piece_tensors_N), -1)).permute(1, 2, 0)
            mine_NKL = pieces_NKL[:, first : first + len(read_KP)]
            read_grads.append(torch.bmm(mine_NKL, grad_NLC).transpose(0, 1).flatten(1))
            coefficient_grads.append(torch.bmm(grad_NLC, blocks_NCK))
            first += len(read_KP)
        pieces_LNK = torch.cat(coefficient_grads, dim=2).transpose(0, 1)
        return torch.zeros_like(coefficients_LTK).index_add_(1, piece_tensors_N, pieces_LNK), None, *read_grads


def _reference(plan: TransferPlan, target_index: int, sources: Sequence[Tensor], coefficients_LTK: Tensor) -> Tensor:
    """The definition in fp64, term by term."""
    target, layers = plan.targets[target_index], []
    for layer in range(target.num_layers):
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


@torch.library.custom_op("mmlg_kernels::block_transfer", mutates_args=())
def _transfer(sources: Sequence[Tensor], coefficients: Sequence[Tensor], plan: int, dtype: torch.dtype) -> Tensor:
    """All targets' layers, flat, one after the other."""
    from mmlg_kernels import transfer_tiles

    flat = torch.cat([a.reshape(-1) for a in coefficients]).float()
    return transfer_tiles.forward(find_plan(plan), sources, flat, dtype)


@torch.library.custom_op("mmlg_kernels::block_transfer_backward", mutates_args=())
def _transfer_backward(grad: Tensor, sources: Sequence[Tensor], coefficients: Sequence[Tensor], plan: int) -> list[Tensor]:
    """Gradients by the sources and the coefficients."""
    from mmlg_kernels import transfer_tiles

    flat = torch.cat([a.reshape(-1) for a in coefficients]).float()
    grads, coefficient_grads = transfer_tiles.backward(find_plan(plan), sources, flat, grad)
    parts = coefficient_grads.split([a.numel() for a in coefficients])
    whole = [*grads, *(part.view_as(a).clone() for part, a in zip(parts, coefficients, strict=True))]
    return [found.to(given.dtype) for found, given in zip(whole, (*sources, *coefficients), strict=True)]


@_transfer.register_fake
def _(sources: Sequence[Tensor], coefficients: Sequence[Tensor], plan: int, dtype: torch.dtype) -> Tensor:
    return sources[0].new_empty(find_plan(plan).out_size, dtype=dtype)


@_transfer_backward.register_fake
def _(grad: Tensor, sources: Sequence[Tensor], coefficients: Sequence[Tensor], plan: int) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (*sources, *coefficients)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sources, coefficients, ctx.plan, _ = inputs
    ctx.kept = find_plan(ctx.plan)  # alive until its gradients are computed
    ctx.num_sources = len(sources)
    ctx.save_for_backward(*sources, *coefficients)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    sources, coefficients = saved[: ctx.num_sources], saved[ctx.num_sources :]
    grads = _transfer_backward(grad, sources, coefficients, ctx.plan)
    return grads[: ctx.num_sources], grads[ctx.num_sources :], None, None


_transfer.register_autograd(_gradient, setup_context=_save)


def _check(plan: TransferPlan, sources: Sequence[Tensor], coefficients: Sequence[Tensor]) -> None:
    if tuple(tuple(s.shape) for s in sources) != plan.source_shapes:
        raise ValueError(f"sources {[list(s.shape) for s in sources]}; the plan is for {[list(s) for s in plan.source_shapes]}")
    expected = [(t.num_layers, len(t.names), plan.num_blocks(t)) for t in plan.targets]
    if [tuple(a.shape) for a in coefficients] != expected:
        raise ValueError(f"coefficients {[list(a.shape) for a in coefficients]}; the plan is for {[list(e) for e in expected]}")
