"""Triton backend of contrastive distillation: each tile holds the student's and the teacher's similarities of the same pairs.

Forward: one pass gives the student's log-sum-exps of rows and columns, and the sums of both models' logits under the teacher's softmax.
Backward: as in `tiled`, a kernel writes the gradient by the student's logits, of both losses together, for as many rows as a workspace
holds, and two matrix products turn it into the feature gradients. The same inputs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmlg_kernels.chunked import DistillationInputs
from mmlg_kernels.tiled import _forward_shape, _logits, _options, _waves, gradient_factor
from mmlg_kernels.tiles import Tile, tile_for


@triton.jit
def _targets(theirs, row_lse, column_lse):
    """The mean of the teacher's softmax over the row and over the column."""
    return (tl.exp(theirs - row_lse[:, None]) + tl.exp(theirs - column_lse[None, :])) * 0.5


@triton.jit
def distillation_forward_kernel(
    x_ptr,
    y_ptr,
    u_ptr,
    v_ptr,
    scale_ptr,
    teacher_scale_ptr,
    u_lse_ptr,
    v_lse_ptr,
    row_part_ptr,
    column_part_ptr,
    student_part_ptr,
    teacher_part_ptr,
    num_rows,
    num_columns,
    width,
    teacher_width,
    tiles_per_split,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (i, s): rows of block i against the columns of split s.

    Writes the student's log-sum-exps, to row_part [S, B] and column_part [B / BM, G], and the rows' sums of the student's and of the
    teacher's logits, each weighted by the teacher's softmax, to student_part and teacher_part [S, B].
    """
    block, split = tl.program_id(0), tl.program_id(1)
    rows = block * BM + tl.arange(0, BM)
    scale, teacher_scale = tl.load(scale_ptr).to(tl.float32), tl.load(teacher_scale_ptr).to(tl.float32)
    u_lse = tl.load(u_lse_ptr + rows, mask=rows < num_rows, other=0.0)
    row_max = tl.full((BM,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((BM,), dtype=tl.float32)
    student_sum = tl.zeros((BM,), dtype=tl.float32)
    teacher_sum = tl.zeros((BM,), dtype=tl.float32)
    for index in range(tiles_per_split):
        column = (split * tiles_per_split + index) * BN
        columns = column + tl.arange(0, BN)
        inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        v_lse = tl.load(v_lse_ptr + columns, mask=columns < num_columns, other=0.0)
        theirs = _logits(u_ptr, v_ptr, block * BM, column, num_rows, num_columns, teacher_width, BM, BN, BD, PRECISION) * teacher_scale
        targets = tl.where(inside, _targets(theirs, u_lse, v_lse), 0.0)
        teacher_sum += tl.sum(targets * theirs, axis=1)
        logits = _logits(x_ptr, y_ptr, block * BM, column, num_rows, num_columns, width, BM, BN, BD, PRECISION) * scale
        student_sum += tl.sum(targets * logits, axis=1)
        logits = tl.where(inside, logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        # A row without any valid column yet: subtracting minus infinity from itself would give NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp(row_max - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        row_max = new_max
        column_max = tl.max(logits, axis=0)
        column_shift = tl.where(column_max == float("-inf"), 0.0, column_max)
        column_sum = tl.sum(tl.exp(logits - column_shift[None, :]), axis=0)
        column_offsets = block.to(tl.int64) * num_columns + columns
        tl.store(column_part_ptr + column_offsets, column_shift + tl.log(column_sum), mask=columns < num_columns)
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    at = split.to(tl.int64) * num_rows + rows
    tl.store(row_part_ptr + at, shift + tl.log(row_sum), mask=rows < num_rows)
    tl.store(student_part_ptr + at, student_sum, mask=rows < num_rows)
    tl.store(teacher_part_ptr + at, teacher_sum, mask=rows < num_rows)


@triton.jit
def distillation_gradient_kernel(
    x_ptr,
    y_ptr,
    u_ptr,
    v_ptr,
    scale_ptr,
    teacher_scale_ptr,
    u_lse_ptr,
    v_lse_ptr,
    row_lse_ptr,
    column_lse_ptr,
    out_ptr,
    num_rows,
    num_columns,
    width,
    teacher_width,
    first,
    contrastive,
    distillation,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of (c + d) * the student's mean softmax - d * the teacher's - c * [own pair], written to out [B, G].

    The weights c and d have `gradient_factor` in them."""
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
    scale, teacher_scale = tl.load(scale_ptr).to(tl.float32), tl.load(teacher_scale_ptr).to(tl.float32)
    theirs = _logits(u_ptr, v_ptr, row, column, num_rows, num_columns, teacher_width, BM, BN, BD, PRECISION) * teacher_scale
    u_lse = tl.load(u_lse_ptr + rows, mask=rows < num_rows, other=0.0)
    v_lse = tl.load(v_lse_ptr + columns, mask=columns < num_columns, other=0.0)
    weights = _targets(theirs, u_lse, v_lse) * -distillation
    logits = _logits(x_ptr, y_ptr, row, column, num_rows, num_columns, width, BM, BN, BD, PRECISION) * scale
    row_lse = tl.load(row_lse_ptr + rows, mask=rows < num_rows, other=0.0)
    column_lse = tl.load(column_lse_ptr + columns, mask=columns < num_columns, other=0.0)
    weights += _targets(logits, row_lse, column_lse) * (contrastive + distillation)
    # Subtracted in fp32, before the cast: a perfect match leaves what p - 1 leaves.
    weights -= tl.where(rows[:, None] + first == columns[None, :], contrastive, 0.0)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :], weights.to(out_ptr.dtype.element_ty), mask=inside)


def distillation_forward(given: DistillationInputs, chunk_bytes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `chunked.distillation_forward`."""
    x, y, u, v = (features.contiguous() for features in (given.x, given.y, given.u, given.v))
    (num_rows, width), num_columns, tile = x.shape, y.shape[0], tile_for("distillation_forward", x.dtype)
    blocks, splits, tiles_per_split = _forward_shape(num_rows, num_columns, tile)
    row_part, student_part, teacher_part = (x.new_empty(splits, num_rows, dtype=torch.float32) for _ in range(3))
    column_part = x.new_empty(blocks, num_columns, dtype=torch.float32)
    with torch.cuda.device_of(x):
        distillation_forward_kernel[(blocks, splits)](
            x, y, u, v, given.scale, given.teacher_scale, given.u_lse, given.v_lse, row_part, column_part, student_part, teacher_part,
            num_rows, num_columns, width, u.shape[1], tiles_per_split, **_options(tile, x.dtype),
        )  # fmt: skip
    return torch.logsumexp(row_part, dim=0), torch.logsumexp(column_part, dim=0), student_part.sum(), teacher_part.sum()


def distillation_backward(
    given: DistillationInputs,
    first: int,
    row_lse_B: Tensor,
    column_lse_G: Tensor,
    weights: tuple[float, float],
    chunk_bytes: int,
    dx: Tensor,
    dy: Tensor,
) -> None:
    """See `chunked.distillation_backward`."""
    x, y, u, v = (features.contiguous() for features in (given.x, given.y, given.u, given.v))
    factor = gradient_factor(x.dtype, abs(weights[0]) + abs(weights[1]))
    contrastive, distillation = (weight * factor for weight in weights)

    def gradient(part: Tensor, start: int, out: Tensor, tile: Tile) -> None:
        grid = (triton.cdiv(part.shape[0], tile.rows), triton.cdiv(y.shape[0], tile.columns))
        mine = slice(start, start + part.shape[0])
        distillation_gradient_kernel[grid](
            part, y, u[mine], v, given.scale, given.teacher_scale, given.u_lse[mine], given.v_lse, row_lse_B[mine], column_lse_G, out,
            part.shape[0], y.shape[0], y.shape[1], u.shape[1], first + start, contrastive, distillation,
            **_options(tile, x.dtype),
        )  # fmt: skip

    _waves(x, y, gradient, tile_for("distillation_gradient", x.dtype), factor, dx, dy)
