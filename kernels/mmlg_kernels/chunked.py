"""The contrastive loss in chunks of rows, recomputed in the backward pass: O(B D) memory, never B x B.

A chunk of rows i of the logits L = s * I T^T gives the rows' log-sum-exps at once and adds to the columns' running ones. The backward
pass recomputes each chunk and feeds both feature gradients from it:

    dLoss/dL[i, j] = (softmax_row[i, j] + softmax_column[i, j]) / 2 - [i = j],   divided by the batch size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 32 * 2**20
"""Memory for one chunk of logits: a batch of up to 2,896 in fp32 is a single chunk."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precisions accumulate in fp32; fp32 and fp64 in themselves."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_per_chunk(num_columns: int, dtype: torch.dtype, chunk_bytes: int) -> int:
    """How many rows of `num_columns` logits fit into the budget; at least one."""
    return max(1, chunk_bytes // (num_columns * torch.finfo(dtype).bits // 8))


class SymmetricCrossEntropy(torch.autograd.Function):
    """Half the sum of row and column cross entropies of s * X Y^T, mean over the pairs (i, i); X and Y [N, D] are the whole batch."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, y_ND: Tensor, scale: Tensor, chunk_bytes: int) -> Tensor:
        dtype = accumulation_dtype(x_ND.dtype)
        x, y, s = x_ND.to(dtype), y_ND.to(dtype), scale.to(dtype)
        count = x.shape[0]
        size = rows_per_chunk(count, dtype, chunk_bytes)
        row_lse = x.new_empty(count)
        column_lse = x.new_full((count,), -torch.inf)
        for start in range(0, count, size):
            logits = (x[start : start + size] * s) @ y.T
            torch.logsumexp(logits, dim=1, out=row_lse[start : start + size])
            column_lse = torch.logaddexp(column_lse, torch.logsumexp(logits, dim=0))
        own = s * (x * y).sum(dim=1)
        ctx.save_for_backward(x_ND, y_ND, scale, row_lse, column_lse)
        ctx.size = size
        return ((row_lse + column_lse) / 2 - own).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_ND, y_ND, scale, row_lse, column_lse = ctx.saved_tensors
        dtype = row_lse.dtype
        x, y, s = x_ND.to(dtype), y_ND.to(dtype), scale.to(dtype)
        count = x.shape[0]
        dx, dy = torch.empty_like(x), torch.zeros_like(y)
        for start in range(0, count, ctx.size):
            rows = slice(start, start + ctx.size)
            logits = (x[rows] * s) @ y.T
            weights = (logits - row_lse[rows, None]).exp_().add_(logits.sub_(column_lse).exp_()).mul_(0.5)
            weights.diagonal(start).sub_(1.0)
            dx[rows] = weights @ y
            dy += weights.T @ x[rows]
        factor = grad.to(dtype) / count
        # s * dLoss/ds = sum_i <x_i, dLoss/dx_i>: the scale's gradient needs no pass of its own.
        dscale = ((x * dx).sum() * factor).reshape(scale.shape)
        dx.mul_(factor * s)
        dy.mul_(factor * s)
        return dx.to(x_ND.dtype), dy.to(y_ND.dtype), dscale.to(scale.dtype), None


class RowCrossEntropy(torch.autograd.Function):
    """Cross entropy of the rows of s * X Y^T, mean over rows, where row i belongs to column first + i: one rank's half of the loss."""

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, y_GD: Tensor, scale: Tensor, first: int, chunk_bytes: int) -> Tensor:
        dtype = accumulation_dtype(x_BD.dtype)
        x, y, s = x_BD.to(dtype), y_GD.to(dtype), scale.to(dtype)
        size = rows_per_chunk(y.shape[0], dtype, chunk_bytes)
        row_lse = torch.cat([torch.logsumexp((part * s) @ y.T, dim=1) for part in x.split(size)])
        ctx.save_for_backward(x_BD, y_GD, scale, row_lse)
        ctx.size, ctx.first = size, first
        return (row_lse - s * (x * y[first : first + x.shape[0]]).sum(dim=1)).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x_BD, y_GD, scale, row_lse = ctx.saved_tensors
        dtype = row_lse.dtype
        x, y, s = x_BD.to(dtype), y_GD.to(dtype), scale.to(dtype)
        dx, dy = torch.empty_like(x), torch.zeros_like(y)
        for start in range(0, x.shape[0], ctx.size):
            rows = slice(start, start + ctx.size)
            weights = ((x[rows] * s) @ y.T).sub_(row_lse[rows, None]).exp_()
            weights.diagonal(ctx.first + start)[: weights.shape[0]].sub_(1.0)
            dx[rows] = weights @ y
            dy += weights.T @ x[rows]
        factor = grad.to(dtype) / x.shape[0]
        dscale = ((x * dx).sum() * factor).reshape(scale.shape)
        dx.mul_(factor * s)
        dy.mul_(factor * s)
        return dx.to(x_BD.dtype), dy.to(y_GD.dtype), dscale.to(scale.dtype), None, None


@torch.no_grad()
def ranks(rows_BD: Tensor, columns_GD: Tensor, logit_scale: Tensor, first: int, chunk_bytes: int) -> Tensor:
    """[B]: 1 + the number of strictly greater logits in each row than that of its own pair, in chunks of rows."""
    dtype = accumulation_dtype(rows_BD.dtype)
    rows, columns, s = rows_BD.to(dtype), columns_GD.to(dtype), logit_scale.to(dtype)
    size = rows_per_chunk(columns.shape[0], dtype, chunk_bytes)
    found = []
    for start in range(0, rows.shape[0], size):
        logits = (rows[start : start + size] * s) @ columns.T
        own = logits.diagonal(first + start)[: logits.shape[0], None]
        found.append(1 + (logits > own).sum(dim=1))
    return torch.cat(found)
