"""Torch backend: chunks of rows of the similarities, computed again in the backward pass. O(B D) memory, never B x B.

Inputs of any floating dtype; half precisions are computed in fp32, fp32 and fp64 in themselves. `first` is the column that row 0 belongs
to; `chunk_bytes` is the memory for one chunk of logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 8 * 2**20
"""Memory for one chunk of logits: a batch of up to 1,448 in fp32 is a single chunk."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precisions accumulate in fp32; fp32 and fp64 in themselves."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_per_chunk(num_columns: int, dtype: torch.dtype, chunk_bytes: int) -> int:
    """How many rows of `num_columns` logits fit into the budget; at least one."""
    return max(1, chunk_bytes // (num_columns * torch.finfo(dtype).bits // 8))


def _chunks(x: Tensor, y: Tensor, chunk_bytes: int) -> Iterator[slice]:
    size = rows_per_chunk(y.shape[0], x.dtype, chunk_bytes)
    for start in range(0, x.shape[0], size):
        yield slice(start, min(start + size, x.shape[0]))


def _wide(*tensors: Tensor) -> list[Tensor]:
    dtype = accumulation_dtype(tensors[0].dtype)
    return [tensor.to(dtype) for tensor in tensors]


def own_logits(x_BD: Tensor, y_BD: Tensor, scale: Tensor) -> Tensor:
    """The logits of each row with its own pair, [B]."""
    x, y, s = _wide(x_BD, y_BD, scale)
    return s * (x * y).sum(dim=1)


def softmax_forward(x_BD: Tensor, y_GD: Tensor, scale: Tensor, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    """Of the logits L = scale * X Y^T: log-sum-exps of rows [B] and of columns [G]."""
    x, y, s = _wide(x_BD, y_GD, scale)
    row_lse = x.new_empty(x.shape[0])
    column_lse = x.new_full((y.shape[0],), -torch.inf)
    for rows in _chunks(x, y, chunk_bytes):
        logits = (x[rows] * s) @ y.T
        torch.logsumexp(logits, dim=1, out=row_lse[rows])
        peak = logits.amax(dim=0)
        total = logits.sub_(peak).exp_().sum(dim=0)
        column_lse = torch.logaddexp(column_lse, total.log_().add_(peak))
    return row_lse, column_lse


def softmax_backward(
    x_BD: Tensor, y_GD: Tensor, scale: Tensor, first: int, row_lse_B: Tensor, column_lse_G: Tensor, chunk_bytes: int, dx: Tensor, dy: Tensor
) -> None:
    """Add W Y to dx [B, D] and W^T X to dy [G, D] for W[i, j] = (softmax over row i + softmax over column j) / 2 - [j = first + i]."""
    x, y, s = _wide(x_BD, y_GD, scale)
    for rows in _chunks(x, y, chunk_bytes):
        logits = (x[rows] * s) @ y.T
        weights = (logits - row_lse_B[rows, None]).exp_().add_(logits.sub_(column_lse_G).exp_()).mul_(0.5)
        _subtract_own(weights, first + rows.start)
        dx[rows].addmm_(weights, y)
        dy.addmm_(weights.T, x[rows])


def sigmoid_forward(x_BD: Tensor, y_GD: Tensor, scale: Tensor, bias: Tensor, first: int, chunk_bytes: int) -> Tensor:
    """Of the logits L = scale * X Y^T + bias: the sums over each row of softplus(L), for the own pair [j = first + i] softplus(-L); [B]."""
    x, y, s, b = _wide(x_BD, y_GD, scale, bias)
    total = x.new_empty(x.shape[0])
    for rows in _chunks(x, y, chunk_bytes):
        logits = ((x[rows] * s) @ y.T).add_(b)
        logits.diagonal(first + rows.start)[: logits.shape[0]].neg_()
        total[rows] = F.softplus(logits).sum(dim=1)
    return total


def sigmoid_backward(
    x_BD: Tensor, y_GD: Tensor, scale: Tensor, bias: Tensor, first: int, chunk_bytes: int, dx: Tensor, dy: Tensor
) -> Tensor:
    """Add W Y to dx [B, D] and W^T X to dy [G, D], and return the sum of W, for W[i, j] = sigmoid(L[i, j]) - [j = first + i]."""
    x, y, s, b = _wide(x_BD, y_GD, scale, bias)
    total = x.new_zeros(())
    for rows in _chunks(x, y, chunk_bytes):
        weights = ((x[rows] * s) @ y.T).add_(b)
        # sigmoid(z) - 1 = -sigmoid(-z), which keeps its digits where the pair is certain.
        own = weights.diagonal(first + rows.start)[: weights.shape[0]]
        own.neg_()
        weights.sigmoid_()
        own.neg_()
        total += weights.sum()
        dx[rows].addmm_(weights, y)
        dy.addmm_(weights.T, x[rows])
    return total


def _subtract_own(weights: Tensor, first: int, value: float = 1.0) -> None:
    weights.diagonal(first)[: weights.shape[0]].sub_(value)


class DistillationInputs(NamedTuple):
    """A student's features x [B, D], y [G, D] and multiplier, a teacher's u [B, E], v [G, E] and multiplier, and the log-sum-exps of the
    teacher's rows [B] and columns [G]."""

    x: Tensor
    y: Tensor
    scale: Tensor
    u: Tensor
    v: Tensor
    teacher_scale: Tensor
    u_lse: Tensor
    v_lse: Tensor


def distillation_forward(given: DistillationInputs, chunk_bytes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The student's log-sum-exps of rows [B] and columns [G], and the sums of the student's and of the teacher's logits under the mean of
    the teacher's row and column softmax."""
    x, y, s, *_ = wide = DistillationInputs(*_wide(*given))
    row_lse, column_lse = x.new_empty(x.shape[0]), x.new_full((y.shape[0],), -torch.inf)
    student, teacher = x.new_zeros(()), x.new_zeros(())
    for rows, theirs, targets in _teacher_chunks(wide, chunk_bytes):
        teacher += torch.dot(targets.view(-1), theirs.view(-1))
        logits = torch.mm(x[rows] * s, y.T, out=theirs)
        student += torch.dot(targets.view(-1), logits.view(-1))
        torch.logsumexp(logits, dim=1, out=row_lse[rows])
        peak = logits.amax(dim=0)
        total = logits.sub_(peak).exp_().sum(dim=0)
        column_lse = torch.logaddexp(column_lse, total.log_().add_(peak))
    return row_lse, column_lse, student, teacher


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
    """Add W Y to dx [B, D] and W^T X to dy [G, D] for W = (c + d) * the student's mean softmax - d * the teacher's - c * [j = first + i].

    `weights` are c and d, of the contrastive loss and of the distillation.
    """
    x, y, s, *_ = wide = DistillationInputs(*_wide(*given))
    contrastive, distillation = weights
    for rows, theirs, targets in _teacher_chunks(wide, chunk_bytes):
        logits = torch.mm(x[rows] * s, y.T, out=theirs)
        gradient = targets.mul_(-distillation).add_((logits - row_lse_B[rows, None]).exp_(), alpha=(contrastive + distillation) / 2)
        gradient.add_(logits.sub_(column_lse_G).exp_(), alpha=(contrastive + distillation) / 2)
        _subtract_own(gradient, first + rows.start, contrastive)
        dx[rows].addmm_(gradient, y)
        dy.addmm_(gradient.T, x[rows])


def _teacher_chunks(wide: DistillationInputs, chunk_bytes: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunks of rows, the teacher's logits of them, and the mean of its row and column softmax."""
    for rows in _chunks(wide.x, wide.y, chunk_bytes):
        theirs = (wide.u[rows] * wide.teacher_scale) @ wide.v.T
        targets = (theirs - wide.u_lse[rows, None]).exp_().add_((theirs - wide.v_lse).exp_()).mul_(0.5)
        yield rows, theirs, targets


@torch.no_grad()
def ranks(rows_BD: Tensor, columns_GD: Tensor, logit_scale: Tensor, first: int, chunk_bytes: int) -> Tensor:
    """[B]: 1 + the number of strictly greater logits in each row than that of its own pair, in chunks of rows."""
    rows, columns, s = _wide(rows_BD, columns_GD, logit_scale)
    found = []
    for part in _chunks(rows, columns, chunk_bytes):
        logits = (rows[part] * s) @ columns.T
        own = logits.diagonal(first + part.start)[: logits.shape[0], None]
        found.append(1 + (logits > own).sum(dim=1))
    return torch.cat(found)
