"""What both losses share: checks, and custom operators around a backend's forward and backward, in the parts that `exchange` brings.

A rank returns the mean over its own pairs, so the mean over ranks is the loss of the global batch; its gradients are those of the global
batch times W, which an engine's averaging over ranks divides out.

The operators are registered with torch.library, so that torch.compile sees one node and no graph break.
"""

from __future__ import annotations

import importlib
import os
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mmlg_kernels import exchange
from mmlg_kernels.chunked import accumulation_dtype


def check(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None) -> None:
    """Raise ValueError for shapes, dtypes, devices or a scale that do not fit."""
    if image_BD.ndim != 2 or image_BD.shape != text_BD.shape or image_BD.shape[0] == 0:
        raise ValueError(
            f"image and text features must share a shape [B, D] with B > 0, got {tuple(image_BD.shape)} and {tuple(text_BD.shape)}"
        )
    if image_BD.dtype != text_BD.dtype or not image_BD.is_floating_point():
        raise ValueError(f"image and text features must share a floating dtype, got {image_BD.dtype} and {text_BD.dtype}")
    for name, tensor in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if tensor is None:
            continue
        if image_BD.device != text_BD.device or tensor.device != image_BD.device:
            raise ValueError(f"all tensors must share a device, got {image_BD.device}, {text_BD.device} and {tensor.device}")
        if tensor.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {tuple(tensor.shape)}")
    # On a GPU the check would wait for the device; there a scale that is not positive gives a NaN loss instead.
    costs_nothing = logit_scale.device.type == "cpu" and not torch.compiler.is_compiling()
    if (costs_nothing or os.environ.get("MMLG_DEBUG") == "1") and logit_scale.item() <= 0:
        raise ValueError(f"logit_scale is the multiplier, already exponentiated, and must be positive, got {logit_scale.item()}")


def backend_of(name: str) -> ModuleType:
    """The module of a backend that stores no similarities; Triton is imported where it is needed."""
    return importlib.import_module("mmlg_kernels.tiled" if name == "triton" else "mmlg_kernels.chunked")


def _own_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Inside a region of autocast, products of fp32 features would be rounded to its dtype."""
    return torch.autocast(x.device.type, enabled=False)


def _nan_unless_positive(loss: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale > 0, loss, torch.nan)


@torch.library.custom_op("mmlg_kernels::softmax_loss", mutates_args=())
def softmax_loss(
    x: Tensor, y: Tensor, scale: Tensor, group_name: str, backend: str, chunk_bytes: int, count_ranks: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """This rank's symmetric cross entropy; for the backward pass log-sum-exps of rows and columns, and all ranks' columns; and the ranks
    of each row's and each column's own pair, if they are asked for, which only triton counts on the way."""
    exchange.check_shape(x, group_name)
    module, texts, count = backend_of(backend), exchange.Gathering((y,), group_name), x.shape[0]
    mine = slice(first := exchange.first_column(count, group_name), first + count)
    with _own_precision(x):
        own = module.own_logits(x, y, scale)
        all_own = exchange.gather_rows(own, group_name) if count_ranks else own
        row_lse, column_lse = own.new_full((count,), -torch.inf), own.new_empty(count * exchange.world_size(group_name))
        row_above, column_above = (torch.zeros_like(lse if count_ranks else lse[:0], dtype=torch.int64) for lse in (row_lse, column_lse))
        for part, (columns,) in texts.parts():
            if count_ranks:
                found = module.ranked_softmax_forward(x, columns, scale, part.first, own, all_own[part.where])
                row_above += found[2]
                column_above[part.where] = found[3]
            else:
                found = module.softmax_forward(x, columns, scale, chunk_bytes)
            row_lse = torch.logaddexp(row_lse, found[0])
            column_lse[part.where] = found[1]
    column_lse = exchange.combine_lse(column_lse, group_name)
    loss = _nan_unless_positive(((row_lse + column_lse[mine]) / 2 - own).mean(), scale)
    columns = texts.whole()[0] if group_name else y.new_empty(0)
    if count_ranks:
        column_above = exchange.sum_columns(column_above, count, group_name)
    return loss, row_lse, column_lse, columns, 1 + row_above, 1 + column_above


@torch.library.custom_op("mmlg_kernels::softmax_loss_backward", mutates_args=())
def softmax_loss_backward(
    grad: Tensor, x: Tensor, columns: Tensor, scale: Tensor, row_lse: Tensor, column_lse: Tensor, group_name: str, backend: str, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, y and scale."""
    module = backend_of(backend)

    def add(part: exchange.Part, dx: Tensor, dy: Tensor) -> None:
        module.softmax_backward(x, columns[part.where], scale, part.first, row_lse, column_lse[part.where], chunk, dx, dy)

    with _own_precision(x):
        dx, dy = exchange.backward(x, row_lse.dtype, group_name, add)
    return finish(grad, x, scale, dx, dy)


@torch.library.custom_op("mmlg_kernels::sigmoid_loss", mutates_args=())
def sigmoid_loss(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, group_name: str, backend: str, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    """This rank's sigmoid loss; and for the backward pass all ranks' columns."""
    exchange.check_shape(x, group_name)
    module, texts = backend_of(backend), exchange.Gathering((y,), group_name)
    with _own_precision(x):
        parts = [module.sigmoid_forward(x, columns, scale, bias, part.first, chunk_bytes) for part, (columns,) in texts.parts()]
        total = torch.stack(parts).sum(dim=0)
    return _nan_unless_positive(total.mean(), scale), texts.whole()[0] if group_name else y.new_empty(0)


@torch.library.custom_op("mmlg_kernels::sigmoid_loss_backward", mutates_args=())
def sigmoid_loss_backward(
    grad: Tensor, x: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, group_name: str, backend: str, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by x, y, scale and bias."""
    module, dbias = backend_of(backend), scale.new_zeros((), dtype=accumulation_dtype(x.dtype))

    def add(part: exchange.Part, dx: Tensor, dy: Tensor) -> None:
        dbias.add_(module.sigmoid_backward(x, columns[part.where], scale, bias, part.first, chunk, dx, dy))

    with _own_precision(x):
        dx, dy = exchange.backward(x, dbias.dtype, group_name, add)
    dbias *= grad.to(dbias.dtype) / x.shape[0]
    return *finish(grad, x, scale, dx, dy), dbias.to(bias.dtype).reshape(bias.shape)


def finish(grad: Tensor, x: Tensor, scale: Tensor, dx: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W Y and W^T X -> gradients, in place. The scale's needs no pass of its own: s dLoss/ds = sum_i <x_i, dLoss/dx_i>."""
    factor = grad.to(dx.dtype) / x.shape[0]
    # In parts: all products at once would be a third array of this size. On a GPU launches cost more than that.
    rows = len(x) if x.is_cuda else 1024
    products = torch.stack([(part.to(dx.dtype) * dpart).sum() for part, dpart in zip(x.split(rows), dx.split(rows), strict=True)])
    dscale = (products.sum() * factor).to(scale.dtype).reshape(scale.shape)
    each = factor * scale.to(dx.dtype)
    return dx.mul_(each).to(x.dtype), dy.mul_(each).to(x.dtype), dscale


@softmax_loss.register_fake
def _(
    x: Tensor, y: Tensor, scale: Tensor, group_name: str, backend: str, chunk_bytes: int, count_ranks: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide, rows = accumulation_dtype(x.dtype), x.shape[0]
    count = rows * exchange.world_size(group_name)
    ranks = [x.new_empty(rows if count_ranks else 0, dtype=torch.int64) for _ in range(2)]
    columns = y.new_empty((count, y.shape[1]) if group_name else 0)
    return x.new_empty((), dtype=wide), x.new_empty(rows, dtype=wide), x.new_empty(count, dtype=wide), columns, ranks[0], ranks[1]


@softmax_loss_backward.register_fake
def _(
    grad: Tensor, x: Tensor, columns: Tensor, scale: Tensor, row_lse: Tensor, column_lse: Tensor, group_name: str, backend: str, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), torch.empty_like(scale)


@sigmoid_loss.register_fake
def _(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, group_name: str, backend: str, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    columns = y.new_empty((x.shape[0] * exchange.world_size(group_name), y.shape[1]) if group_name else 0)
    return x.new_empty((), dtype=accumulation_dtype(x.dtype)), columns


@sigmoid_loss_backward.register_fake
def _(
    grad: Tensor, x: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, group_name: str, backend: str, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), torch.empty_like(scale), torch.empty_like(bias)


def _save_softmax(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, scale, *ctx.options, _ = inputs
    _, row_lse, column_lse, columns, *_ = output
    ctx.save_for_backward(x, columns if ctx.options[0] else y, scale, row_lse, column_lse)


def _softmax_gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return *softmax_loss_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


def _save_sigmoid(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, scale, bias, *ctx.options = inputs
    ctx.save_for_backward(x, output[1] if ctx.options[0] else y, scale, bias)


def _sigmoid_gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return *sigmoid_loss_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


softmax_loss.register_autograd(_softmax_gradient, setup_context=_save_softmax)
sigmoid_loss.register_autograd(_sigmoid_gradient, setup_context=_save_sigmoid)
