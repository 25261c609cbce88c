"""Contrastive distillation: a student's similarities against a teacher's, with the plain contrastive loss; no matrix is stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmlg_kernels import chunked, pairs

KINDS = ("affinity", "kl")
BACKENDS = ("auto", "chunked", "reference")
LogSumExps = tuple[Tensor, Tensor]


def contrastive_distillation_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    scale: Tensor,
    teacher_image_BE: Tensor,
    teacher_text_BE: Tensor,
    teacher_scale: Tensor,
    *,
    contrastive_weight: float,
    distillation_weight: float,
    kind: str = "affinity",
    group: Any = None,
    backend: str = "auto",
    chunk_bytes: int = chunked.CHUNK_BYTES,
    teacher_lse: LogSumExps | None = None,
) -> Tensor:
    """Weighted sum of the contrastive loss and the cross entropy of the teacher's row and column softmax against the student's.

    The second is TinyCLIP's affinity mimicking (Wu et al. 2023, section 3.1), the mean over both directions; `kl` reports it less the
    teacher's entropy, which has the same gradient. The teacher receives none.

    Args:
        image_BD, text_BD, scale: the student's features and multiplier, with gradient; precision and `group` as in `contrastive_loss`.
        teacher_image_BE, teacher_text_BE, teacher_scale: the teacher's, of the same pairs.
        backend: chunked (logits computed again in the backward pass), reference (materialised, one rank), or auto.
        chunk_bytes: memory for one chunk of one of the two matrices.
        teacher_lse: of `teacher_log_sum_exps`, where they are known already.

    Raises:
        ValueError: shapes, dtypes, devices or scales that do not fit; an unknown kind or backend.
    """
    pairs.check(image_BD, text_BD, scale)
    pairs.check(teacher_image_BE, teacher_text_BE, teacher_scale)
    for name, value, valid in (("kind", kind, KINDS), ("backend", backend, BACKENDS)):
        if value not in valid:
            raise ValueError(f"unknown {name} {value!r}; valid: {', '.join(valid)}")
    if teacher_image_BE.shape[0] != image_BD.shape[0]:
        raise ValueError(f"{teacher_image_BE.shape[0]} pairs of the teacher, {image_BD.shape[0]} of the student")
    group_name = pairs.name_group(group, image_BD)
    teacher = (teacher_image_BE.detach(), teacher_text_BE.detach(), teacher_scale.detach().reshape(()))
    weights = (contrastive_weight, distillation_weight)
    if backend == "reference":
        if group_name:
            raise ValueError("backend reference computes on one rank")
        return _reference(image_BD, text_BD, scale.reshape(()), teacher, weights, kind)
    if teacher_lse is None:
        teacher_lse = teacher_log_sum_exps(*teacher, group=group, chunk_bytes=chunk_bytes)
    arguments = (*teacher, *teacher_lse, weights, kind, group_name, chunk_bytes)
    return _Distillation.apply(image_BD, text_BD, scale.reshape(()), *arguments)


@torch.no_grad()
def teacher_log_sum_exps(
    image_BE: Tensor, text_BE: Tensor, scale: Tensor, *, group: Any = None, chunk_bytes: int = chunked.CHUNK_BYTES
) -> LogSumExps:
    """Log-sum-exps of this rank's rows [B] and of all columns [G] of the teacher's logits."""
    name = pairs.name_group(group, image_BE)
    all_text, first = pairs.gather_rows(text_BE, name), pairs.first_column(image_BE.shape[0], name)
    with torch.autocast(image_BE.device.type, enabled=False):
        rows, columns, _ = chunked.softmax_forward(image_BE, all_text, scale.reshape(()), first, chunk_bytes)
    return rows, pairs.combine_lse(columns, name)


class _Distillation(torch.autograd.Function):
    """One rank's share; see `pairs` for how ranks divide the work."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, s: Tensor, u: Tensor, v: Tensor, t: Tensor, u_lse: Tensor, v_lse: Tensor, *options: Any
    ) -> Tensor:
        weights, kind, name, chunk_bytes = options
        first, all_y, all_v = pairs.first_column(x.shape[0], name), pairs.gather_rows(y, name), pairs.gather_rows(v, name)
        with torch.autocast(x.device.type, enabled=False):
            row_lse, column_lse, own = chunked.softmax_forward(x, all_y, s, first, chunk_bytes)
            column_lse = pairs.combine_lse(column_lse, name)
            student, teacher = _expectations(x, all_y, s, u, all_v, t, u_lse, v_lse, chunk_bytes)
        mine = slice(first, first + x.shape[0])
        log_partition = (row_lse + column_lse[mine]).mean() / 2
        distillation = log_partition - student / x.shape[0]
        if kind == "kl":
            distillation = distillation - ((u_lse + v_lse[mine]).mean() / 2 - teacher / x.shape[0])
        ctx.save_for_backward(x, all_y, s, u, all_v, t, u_lse, v_lse, row_lse, column_lse)
        ctx.options = (weights, name, chunk_bytes)
        return torch.where(s > 0, weights[0] * (log_partition - own.mean()) + weights[1] * distillation, torch.nan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, all_y, s, u, all_v, t, u_lse, v_lse, row_lse, column_lse = ctx.saved_tensors
        (contrastive, distillation), name, chunk_bytes = ctx.options
        first = pairs.first_column(x.shape[0], name)
        with torch.autocast(x.device.type, enabled=False):
            wide_x, wide_y = (z.to(row_lse.dtype) for z in (x, all_y))
            dx, dy = torch.empty_like(wide_x), torch.zeros_like(wide_y)
            for rows, logits, _, targets in _tiles(x, all_y, s, u, all_v, t, u_lse, v_lse, chunk_bytes):
                model = ((logits - row_lse[rows, None]).exp_() + (logits - column_lse).exp_()) / 2
                weights = model.mul_(contrastive + distillation).sub_(targets, alpha=distillation)
                weights.diagonal(first + rows.start)[: weights.shape[0]].sub_(contrastive)
                dx[rows] = weights @ wide_y
                dy.addmm_(weights.T, wide_x[rows])
        return *pairs._finish(grad, x, s, dx, pairs.scatter_rows(dy, name)), *([None] * 9)


def _tiles(x: Tensor, y: Tensor, s: Tensor, u: Tensor, v: Tensor, t: Tensor, u_lse: Tensor, v_lse: Tensor, chunk_bytes: int) -> Any:
    """Chunks of rows: (rows, the student's logits, the teacher's, the mean of the teacher's row and column softmax)."""
    dtype = chunked.accumulation_dtype(x.dtype)
    x, y, s, u, v, t, u_lse, v_lse = (z.to(dtype) for z in (x, y, s, u, v, t, u_lse, v_lse))
    size = chunked.rows_per_chunk(y.shape[0], dtype, chunk_bytes)
    for start in range(0, x.shape[0], size):
        rows = slice(start, min(start + size, x.shape[0]))
        theirs = (u[rows] * t) @ v.T
        yield rows, (x[rows] * s) @ y.T, theirs, ((theirs - u_lse[rows, None]).exp_() + (theirs - v_lse).exp_()) / 2


def _expectations(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Sums over this rank's rows of the student's and of the teacher's logits, weighted by the teacher's mean softmax."""
    student = x.new_zeros((), dtype=chunked.accumulation_dtype(x.dtype))
    teacher = student.clone()
    for _, logits, theirs, targets in _tiles(x, *arguments):
        student += (targets * logits).sum()
        teacher += (targets * theirs).sum()
    return student, teacher


def _reference(x: Tensor, y: Tensor, s: Tensor, teacher: tuple[Tensor, Tensor, Tensor], weights: tuple[float, float], kind: str) -> Tensor:
    """The definition, materialised, in the features' precision."""
    logits, theirs = s * (x @ y.T), teacher[2] * (teacher[0] @ teacher[1].T)
    contrastive = distillation = 0.0 * s
    for ours, other in ((logits, theirs), (logits.T, theirs.T)):
        log_p, log_q = ours.log_softmax(dim=1), other.log_softmax(dim=1)
        contrastive = contrastive - log_p.diagonal().mean() / 2
        terms = log_p if kind == "affinity" else log_p - log_q
        distillation = distillation - (log_q.exp() * terms).sum(dim=1).mean() / 2
    return weights[0] * contrastive + weights[1] * distillation
