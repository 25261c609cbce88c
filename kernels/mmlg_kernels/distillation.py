"""Contrastive distillation: a student's similarities against a teacher's, with the plain contrastive loss; no matrix is stored."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmlg_kernels import chunked, exchange, pairs
from mmlg_kernels.dispatch import choose

KINDS = ("affinity", "kl")
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
        backend: triton, chunked (both compute the logits again in the backward pass), reference (materialised, one rank), or auto.
        chunk_bytes: memory for one chunk of one of the two matrices.
        teacher_lse: of `teacher_log_sum_exps`, where they are known already.

    Raises:
        ValueError: shapes, dtypes, devices or scales that do not fit; an unknown kind or backend.
    """
    pairs.check(image_BD, text_BD, scale)
    pairs.check(teacher_image_BE, teacher_text_BE, teacher_scale)
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; valid: {', '.join(KINDS)}")
    name = choose(backend, image_BD)
    if teacher_image_BE.shape[0] != image_BD.shape[0]:
        raise ValueError(f"{teacher_image_BE.shape[0]} pairs of the teacher, {image_BD.shape[0]} of the student")
    group_name = exchange.name_group(group)
    teacher = (teacher_image_BE.detach(), teacher_text_BE.detach(), teacher_scale.detach().reshape(()))
    weights = (contrastive_weight, distillation_weight)
    if name == "reference":
        if group_name:
            raise ValueError("backend reference computes on one rank")
        return _reference(image_BD, text_BD, scale.reshape(()), teacher, weights, kind)
    if teacher_lse is None:
        teacher_lse = teacher_log_sum_exps(*teacher, group=group, backend=name, chunk_bytes=chunk_bytes)
    features = [image_BD, text_BD, scale.reshape(()), *teacher, *teacher_lse]
    return distillation_loss(features, *weights, kind, group_name, name, chunk_bytes)[0]


@torch.no_grad()
def teacher_log_sum_exps(
    image_BE: Tensor,
    text_BE: Tensor,
    scale: Tensor,
    *,
    group: Any = None,
    backend: str = "auto",
    chunk_bytes: int = chunked.CHUNK_BYTES,
) -> LogSumExps:
    """Log-sum-exps of this rank's rows [B] and of all columns [G] of the teacher's logits."""
    name = exchange.name_group(group)
    found = pairs.softmax_loss(image_BE, text_BE, scale.reshape(()), name, choose(backend, image_BE), chunk_bytes, False)
    return found[1], found[2]


@torch.library.custom_op("mmlg_kernels::distillation_loss", mutates_args=())
def distillation_loss(
    features: Sequence[Tensor], contrastive: float, distillation: float, kind: str, group_name: str, backend: str, chunk_bytes: int
) -> list[Tensor]:
    """This rank's loss; and for the backward pass its rows' and all columns' log-sum-exps, and all ranks' columns of both models."""
    given, module = chunked.DistillationInputs(*features), _backend(backend)
    exchange.check_shape(given.x, group_name)
    x, columns = given.x, exchange.Gathering((given.y, given.v), group_name)
    mine = slice(first := exchange.first_column(x.shape[0], group_name), first + x.shape[0])
    with torch.autocast(x.device.type, enabled=False):
        own = pairs.backend_of(backend).own_logits(x, given.y, given.scale)
        row_lse, column_lse = own.new_full(own.shape, -torch.inf), own.new_empty(given.v_lse.shape)
        student, teacher = own.new_zeros(()), own.new_zeros(())
        for part, (y, v) in columns.parts():
            found = module.distillation_forward(given._replace(y=y, v=v, v_lse=given.v_lse[part.where]), chunk_bytes)
            row_lse, column_lse[part.where] = torch.logaddexp(row_lse, found[0]), found[1]
            student, teacher = student + found[2], teacher + found[3]
        column_lse = exchange.combine_lse(column_lse, group_name)
    log_partition = (row_lse + column_lse[mine]).mean() / 2
    divergence = log_partition - student / x.shape[0]
    if kind == "kl":
        divergence = divergence - ((given.u_lse + given.v_lse[mine]).mean() / 2 - teacher / x.shape[0])
    loss = contrastive * (log_partition - own.mean()) + distillation * divergence
    return [torch.where(given.scale > 0, loss, torch.nan), row_lse, column_lse, *(columns.whole() if group_name else ())]


@torch.library.custom_op("mmlg_kernels::distillation_loss_backward", mutates_args=())
def distillation_loss_backward(
    grad: Tensor, saved: Sequence[Tensor], contrastive: float, distillation: float, group_name: str, backend: str, chunk_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the student's features and multiplier."""
    *features, row_lse, column_lse = saved
    given = chunked.DistillationInputs(*features)
    module, weights = _backend(backend), (contrastive, distillation)

    def add(part: exchange.Part, dx: Tensor, dy: Tensor) -> None:
        some = given._replace(y=given.y[part.where], v=given.v[part.where], v_lse=given.v_lse[part.where])
        module.distillation_backward(some, part.first, row_lse, column_lse[part.where], weights, chunk_bytes, dx, dy)

    with torch.autocast(given.x.device.type, enabled=False):
        dx, dy = exchange.backward(given.x, row_lse.dtype, group_name, add)
    return pairs.finish(grad, given.x, given.scale, dx, dy)


def _backend(name: str) -> Any:
    return importlib.import_module("mmlg_kernels.tiled_distillation") if name == "triton" else chunked


@distillation_loss.register_fake
def _(
    features: Sequence[Tensor], contrastive: float, distillation: float, kind: str, group_name: str, backend: str, chunk_bytes: int
) -> list[Tensor]:
    given = chunked.DistillationInputs(*features)
    wide, count = chunked.accumulation_dtype(given.x.dtype), given.v_lse.shape[0]
    columns = [z.new_empty(count, z.shape[1]) for z in (given.y, given.v)] if group_name else []
    return [given.x.new_empty(shape, dtype=wide) for shape in ((), (given.x.shape[0],), (count,))] + columns


@distillation_loss_backward.register_fake
def _(
    grad: Tensor, saved: Sequence[Tensor], contrastive: float, distillation: float, group_name: str, backend: str, chunk_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    x = saved[0]
    return x.new_empty(x.shape), x.new_empty(x.shape), torch.empty_like(saved[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    features, contrastive, distillation, _, *where = inputs
    _, row_lse, column_lse, *columns = output
    given = chunked.DistillationInputs(*features)
    if columns:
        given = given._replace(y=columns[0], v=columns[1])
    ctx.options = (contrastive, distillation, *where)
    ctx.save_for_backward(*given, row_lse, column_lse)


def _gradient(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    dx, dy, dscale = distillation_loss_backward(grads[0], list(ctx.saved_tensors), *ctx.options)
    return [dx, dy, dscale, *[None] * 5], *[None] * 6


distillation_loss.register_autograd(_gradient, setup_context=_save)


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
