"""Triton backend: tiles of similarities in registers, forward and backward, for the CLIP and the SigLIP loss.

Forward: one pass over the tiles gives the log-sum-exps of rows and of columns (each program's share of them, combined in a fixed order),
and, asked for, how many logits of each are above its own pair's.
Backward: for as many rows as a workspace holds, a kernel computes the tiles again and writes the loss's gradient by the logits, in the
features' own precision; two ordinary matrix products turn it into both feature gradients. No atomics: the same inputs give the same bits.

Works under TRITON_INTERPRET=1 on CPU tensors in fp32 and fp16 (the interpreter's bf16 dot is wrong).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmlg_kernels.tiles import Tile, tile_for

WORKSPACE_BYTES = 128 * 2**20
"""Memory for the gradient by the logits of as many rows as it holds."""
SPLITS = 8
"""Programs that share the columns of one block of rows in the forward pass, so that small batches fill the chip."""


def precision_of(dtype: torch.dtype) -> str:
    """How fp32 products are computed: in tf32 only where torch allows it."""
    if dtype != torch.float32:
        return "ieee"
    # Since torch 2.9 the precision has a name of its own; reading the older switch fails once a user has set that.
    name = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    allowed = torch.backends.cuda.matmul.allow_tf32 if name is None else name == "tf32"
    return "tf32" if allowed else "ieee"


def gradient_factor(dtype: torch.dtype, largest: float = 1.0) -> float:
    """What gradients by the logits, of at most `largest`, are multiplied by where they are stored in a dtype; a power of two.

    A softmax over many columns, or a sigmoid of a bias like SigLIP's, is far below fp16's smallest normal number, 6e-5, and would keep
    a digit or none. bf16 and fp32 have fp32's exponents.
    """
    return 2.0 ** math.floor(math.log2(32768.0 / max(largest, 1e-30))) if dtype == torch.float16 else 1.0


@triton.jit
def _logits(
    x_ptr,
    y_ptr,
    row,
    column,
    num_rows,
    num_columns,
    width,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The products of BM rows from `row` on with BN columns from `column` on, accumulated in fp32."""
    # 64 bits for where a tile begins, since rows * width passes 2^31 from two million rows of 1,024 on; 32 bits, which need half the
    # registers, inside it.
    x_tile, y_tile = x_ptr + row.to(tl.int64) * width, y_ptr + column.to(tl.int64) * width
    down, right, along = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    x_offsets = down[:, None] * width + along[None, :]
    y_offsets = right[None, :] * width + along[:, None]
    x_valid, y_valid = (down < num_rows - row)[:, None], (right < num_columns - column)[None, :]
    products = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, width, BD):
        inside = along < width - start
        x = tl.load(x_tile + x_offsets, mask=x_valid & inside[None, :], other=0.0)
        y = tl.load(y_tile + y_offsets, mask=y_valid & inside[:, None], other=0.0)
        products = tl.dot(x, y, products, input_precision=PRECISION)
        x_tile += BD
        y_tile += BD
    return products


@triton.jit
def _softplus(z):
    """log(1 + e^z) without overflow, to fp32's precision; NaN stays NaN, which a plain maximum would drop."""
    # u is at most one. Below 1/8 log(1 + u) loses u's last digits, and from 6e-8 on all of them: there log1p's series (Abramowitz & Stegun
    # 1964, 4.1.24), whose first term left out is u^8 / 8.
    u = tl.exp(-tl.abs(z))
    series = u * (1 - u * (1 / 2 - u * (1 / 3 - u * (1 / 4 - u * (1 / 5 - u * (1 / 6 - u * (1 / 7)))))))
    return tl.where(z > 0, z, 0.0) + tl.where(u < 0.125, series, tl.log(1.0 + u))


@triton.jit
def softmax_forward_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    row_part_ptr,
    column_part_ptr,
    num_rows,
    num_columns,
    width,
    tiles_per_split,
    first,
    own_row_ptr,
    own_column_ptr,
    row_above_ptr,
    column_above_ptr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Program (i, s): rows of block i against the columns of split s.

    Writes their log-sum-exps to row_part [S, B], and those of each column over the block's rows to column_part [B / BM, G]. With RANKS
    also how many logits are above the own pair's of their row, own_row [B], to row_above [S, B], and of their column, own_column [G], to
    column_above [B / BM, G].
    """
    block, split = tl.program_id(0), tl.program_id(1)
    rows = block * BM + tl.arange(0, BM)
    scale = tl.load(scale_ptr).to(tl.float32)
    row_max = tl.full((BM,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((BM,), dtype=tl.float32)
    if RANKS:
        own_row = tl.load(own_row_ptr + rows, mask=rows < num_rows, other=0.0)
        row_above = tl.zeros((BM,), dtype=tl.int32)
    for index in range(tiles_per_split):
        column = (split * tiles_per_split + index) * BN
        columns = column + tl.arange(0, BN)
        logits = _logits(x_ptr, y_ptr, block * BM, column, num_rows, num_columns, width, BM, BN, BD, PRECISION) * scale
        logits = tl.where((rows < num_rows)[:, None] & (columns < num_columns)[None, :], logits, float("-inf"))
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
        if RANKS:
            # Logits outside are minus infinity here, above nothing. A pair is never above itself, however a compiler rounds.
            other = rows[:, None] + first != columns[None, :]
            own_column = tl.load(own_column_ptr + columns, mask=columns < num_columns, other=0.0)
            row_above += tl.sum((other & (logits > own_row[:, None])).to(tl.int32), axis=1)
            column_above = tl.sum((other & (logits > own_column[None, :])).to(tl.int32), axis=0)
            tl.store(column_above_ptr + column_offsets, column_above, mask=columns < num_columns)
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    tl.store(row_part_ptr + split.to(tl.int64) * num_rows + rows, shift + tl.log(row_sum), mask=rows < num_rows)
    if RANKS:
        tl.store(row_above_ptr + split.to(tl.int64) * num_rows + rows, row_above, mask=rows < num_rows)


@triton.jit
def softmax_gradient_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    row_lse_ptr,
    column_lse_ptr,
    out_ptr,
    num_rows,
    num_columns,
    width,
    first,
    factor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of factor * ((softmax over the row + softmax over the column) / 2 - [own pair]), written to out [B, G]."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    scale = tl.load(scale_ptr).to(tl.float32)
    logits = (
        _logits(x_ptr, y_ptr, tl.program_id(0) * BM, tl.program_id(1) * BN, num_rows, num_columns, width, BM, BN, BD, PRECISION) * scale
    )
    row_lse = tl.load(row_lse_ptr + rows, mask=rows < num_rows, other=0.0)
    column_lse = tl.load(column_lse_ptr + columns, mask=columns < num_columns, other=0.0)
    weights = (tl.exp(logits - row_lse[:, None]) + tl.exp(logits - column_lse[None, :])) * 0.5
    # Subtracted in fp32, before the cast: a perfect match leaves what p - 1 leaves.
    weights = (weights - tl.where(rows[:, None] + first == columns[None, :], 1.0, 0.0)) * factor
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :], weights.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sigmoid_forward_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    bias_ptr,
    row_part_ptr,
    num_rows,
    num_columns,
    width,
    tiles_per_split,
    first,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (i, s): sums over the columns of split s of softplus(logit), for the own pair softplus(-logit), to row_part [S, B]."""
    block, split = tl.program_id(0), tl.program_id(1)
    rows = block * BM + tl.arange(0, BM)
    scale, bias = tl.load(scale_ptr).to(tl.float32), tl.load(bias_ptr).to(tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    for index in range(tiles_per_split):
        column = (split * tiles_per_split + index) * BN
        columns = column + tl.arange(0, BN)
        logits = _logits(x_ptr, y_ptr, block * BM, column, num_rows, num_columns, width, BM, BN, BD, PRECISION) * scale + bias
        # Subtracting the own logit from a sum with its softplus would leave rounding alone where the pair is certain.
        logits = tl.where(rows[:, None] + first == columns[None, :], -logits, logits)
        total += tl.sum(tl.where((columns < num_columns)[None, :], _softplus(logits), 0.0), axis=1)
    tl.store(row_part_ptr + split.to(tl.int64) * num_rows + rows, total, mask=rows < num_rows)


@triton.jit
def sigmoid_gradient_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    row_part_ptr,
    num_rows,
    num_columns,
    width,
    first,
    factor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of W = sigmoid(logits) - [own pair]: factor * W to out [B, G], its sums over columns, in fp32, to row_part [G / BN, B]."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    scale, bias = tl.load(scale_ptr).to(tl.float32), tl.load(bias_ptr).to(tl.float32)
    logits = (
        _logits(x_ptr, y_ptr, tl.program_id(0) * BM, tl.program_id(1) * BN, num_rows, num_columns, width, BM, BN, BD, PRECISION) * scale
        + bias
    )
    own = rows[:, None] + first == columns[None, :]
    # sigmoid(z) - 1 = -sigmoid(-z), which keeps its digits where the pair is certain.
    weights = tl.sigmoid(tl.where(own, -logits, logits))
    weights = tl.where(own, -weights, weights)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    weights = tl.where(inside, weights, 0.0)
    tl.store(row_part_ptr + tl.program_id(1).to(tl.int64) * num_rows + rows, tl.sum(weights, axis=1), mask=rows < num_rows)
    weights = (weights * factor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :], weights, mask=inside)


@triton.jit
def own_logits_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    out_ptr,
    num_rows,
    width,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The logits of rows of x with the same rows of y, to out [B]: the tiles on the diagonal, so that they round as all others do."""
    row = tl.program_id(0) * BM
    rows = row + tl.arange(0, BM)
    own = tl.zeros((BM,), dtype=tl.float32)
    for index in range((BM + BN - 1) // BN):
        column = row + index * BN
        logits = _logits(x_ptr, y_ptr, row, column, num_rows, num_rows, width, BM, BN, BD, PRECISION)
        own += tl.sum(tl.where(rows[:, None] == (column + tl.arange(0, BN))[None, :], logits, 0.0), axis=1)
    tl.store(out_ptr + rows, own * tl.load(scale_ptr).to(tl.float32), mask=rows < num_rows)


def own_logits(x_BD: Tensor, y_BD: Tensor, scale: Tensor) -> Tensor:
    """See `chunked.own_logits`. Apart from the forward passes, where it would cost registers in every tile."""
    x, y, tile = x_BD.contiguous(), y_BD.contiguous(), tile_for("softmax_forward_ranks", x_BD.dtype)
    out = x.new_empty(x.shape[0], dtype=torch.float32)
    with torch.cuda.device_of(x):
        own_logits_kernel[(triton.cdiv(x.shape[0], tile.rows),)](x, y, scale, out, *x.shape, **_options(tile, x.dtype))
    return out


def _forward_shape(num_rows: int, num_columns: int, tile: Tile) -> tuple[int, int, int]:
    """(blocks of rows, splits of the columns, tiles per split)."""
    num_tiles = triton.cdiv(num_columns, tile.columns)
    tiles_per_split = triton.cdiv(num_tiles, min(SPLITS, num_tiles))
    return triton.cdiv(num_rows, tile.rows), triton.cdiv(num_tiles, tiles_per_split), tiles_per_split


def softmax_forward(x_BD: Tensor, y_GD: Tensor, scale: Tensor, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    """See `chunked.softmax_forward`."""
    row_lse, column_lse, *_ = _softmax_forward(x_BD, y_GD, scale, None)
    return row_lse, column_lse


def ranked_softmax_forward(
    x_BD: Tensor, y_GD: Tensor, scale: Tensor, first: int, own_row_B: Tensor, own_column_G: Tensor
) -> tuple[Tensor, ...]:
    """`softmax_forward`, and how many logits of each row [B] and column [G] are above its own pair's logit, as `own_logits` gives it."""
    return _softmax_forward(x_BD, y_GD, scale, (first, own_row_B, own_column_G))


def _softmax_forward(x_BD: Tensor, y_GD: Tensor, scale: Tensor, ranks: tuple[int, Tensor, Tensor] | None) -> tuple[Tensor, ...]:
    x, y = x_BD.contiguous(), y_GD.contiguous()
    (num_rows, width), num_columns = x.shape, y.shape[0]
    tile = tile_for("softmax_forward" if ranks is None else "softmax_forward_ranks", x.dtype)
    blocks, splits, tiles_per_split = _forward_shape(num_rows, num_columns, tile)
    row_part = x.new_empty(splits, num_rows, dtype=torch.float32)
    column_part = x.new_empty(blocks, num_columns, dtype=torch.float32)
    above = () if ranks is None else (torch.empty_like(row_part, dtype=torch.int32), torch.empty_like(column_part, dtype=torch.int32))
    with torch.cuda.device_of(x):
        softmax_forward_kernel[(blocks, splits)](
            x, y, scale, row_part, column_part, num_rows, num_columns, width, tiles_per_split,
            *((0, None, None, None, None) if ranks is None else (*ranks, *above)), **_options(tile, x.dtype), RANKS=ranks is not None,
        )  # fmt: skip
    return torch.logsumexp(row_part, dim=0), torch.logsumexp(column_part, dim=0), *(part.sum(dim=0) for part in above)


def softmax_backward(
    x_BD: Tensor, y_GD: Tensor, scale: Tensor, first: int, row_lse_B: Tensor, column_lse_G: Tensor, chunk_bytes: int, dx: Tensor, dy: Tensor
) -> None:
    """See `chunked.softmax_backward`."""
    y, factor = y_GD.contiguous(), gradient_factor(y_GD.dtype)

    def gradient(x: Tensor, start: int, weights: Tensor, tile: Tile) -> None:
        grid = (triton.cdiv(x.shape[0], tile.rows), triton.cdiv(y.shape[0], tile.columns))
        own_lse = row_lse_B[start : start + x.shape[0]]
        softmax_gradient_kernel[grid](
            x, y, scale, own_lse, column_lse_G, weights, x.shape[0], y.shape[0], y.shape[1], first + start, factor,
            **_options(tile, x.dtype),
        )  # fmt: skip

    _waves(x_BD.contiguous(), y, gradient, tile_for("softmax_gradient", y.dtype), factor, dx, dy)


def sigmoid_forward(x_BD: Tensor, y_GD: Tensor, scale: Tensor, bias: Tensor, first: int, chunk_bytes: int) -> Tensor:
    """See `chunked.sigmoid_forward`."""
    x, y = x_BD.contiguous(), y_GD.contiguous()
    (num_rows, width), num_columns, tile = x.shape, y.shape[0], tile_for("sigmoid_forward", x.dtype)
    blocks, splits, tiles_per_split = _forward_shape(num_rows, num_columns, tile)
    row_part = x.new_empty(splits, num_rows, dtype=torch.float32)
    with torch.cuda.device_of(x):
        sigmoid_forward_kernel[(blocks, splits)](
            x, y, scale, bias, row_part, num_rows, num_columns, width, tiles_per_split, first, **_options(tile, x.dtype)
        )
    return row_part.sum(dim=0)


def sigmoid_backward(
    x_BD: Tensor, y_GD: Tensor, scale: Tensor, bias: Tensor, first: int, chunk_bytes: int, dx: Tensor, dy: Tensor
) -> Tensor:
    """See `chunked.sigmoid_backward`."""
    y, factor = y_GD.contiguous(), gradient_factor(y_GD.dtype)
    sums: list[Tensor] = []

    def gradient(x: Tensor, start: int, weights: Tensor, tile: Tile) -> None:
        grid = (triton.cdiv(x.shape[0], tile.rows), triton.cdiv(y.shape[0], tile.columns))
        row_part = x.new_empty(grid[1], x.shape[0], dtype=torch.float32)
        sums.append(row_part)
        sigmoid_gradient_kernel[grid](
            x, y, scale, bias, weights, row_part, x.shape[0], y.shape[0], y.shape[1], first + start, factor, **_options(tile, x.dtype)
        )

    _waves(x_BD.contiguous(), y, gradient, tile_for("sigmoid_gradient", y.dtype), factor, dx, dy)
    return torch.stack([part.sum() for part in sums]).sum()


def _options(tile: Tile, dtype: torch.dtype) -> dict[str, object]:
    return {
        "BM": tile.rows,
        "BN": tile.columns,
        "BD": tile.depth,
        "PRECISION": precision_of(dtype),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _waves(
    x: Tensor,
    y: Tensor,
    gradient: Callable[[Tensor, int, Tensor, Tile], None],
    tile: Tile,
    factor: float,
    dx_BD: Tensor,
    dy_GD: Tensor,
) -> None:
    """Rows in waves that fit the workspace: factor * W by `gradient`, then dx += W y and dy += W^T x in fp32, waves in a fixed order."""
    rows = max(1, WORKSPACE_BYTES // (y.shape[0] * x.element_size()))
    rows = min(x.shape[0], max(tile.rows, rows // tile.rows * tile.rows))
    workspace = x.new_empty(rows, y.shape[0])
    for start in range(0, x.shape[0], rows):
        part = x[start : start + rows]
        weights = workspace[: part.shape[0]]
        with torch.cuda.device_of(x):
            gradient(part, start, weights, tile)
        dx_BD[start : start + rows].add_(_product(weights, y), alpha=1 / factor)
        dy_GD.add_(_product(weights.T, part), alpha=1 / factor)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an fp32 result; half precisions are accumulated in fp32 and not rounded back."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
