"""What both losses share: checks, ranks that exchange one tower, and custom operators around a backend's forward and backward.

Across ranks each holds B rows of images against all G = W B columns of texts. The texts travel once; row sums are complete on their rank,
column sums are combined over ranks; in the backward pass the gradient of all texts is summed over ranks, and each takes its own rows.
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
import torch.distributed as dist
from torch import Tensor

_checked: set[tuple[Any, ...]] = set()
_groups: dict[str, Any] = {}


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


def name_group(group: Any, local_BD: Tensor) -> str:
    """A name under which the operators find `group`; empty for no group or a group of one. Checks once that ranks pass one shape.

    Raises:
        ValueError: the ranks pass different shapes; names them.
    """
    if group is None or dist.get_world_size(group) == 1:
        return ""
    name = str(id(group))
    _groups[name] = group
    key = (name, tuple(local_BD.shape))
    if key not in _checked:
        shapes: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(shapes, tuple(local_BD.shape), group=group)
        if len(set(shapes)) > 1:
            said = ", ".join(f"rank {rank}: {list(shape)}" for rank, shape in enumerate(shapes))
            raise ValueError(f"every rank must pass features of one shape, got {said}")
        _checked.add(key)
    return name


class Gather(torch.autograd.Function):
    """All ranks' rows, [W * B, D]; backward: this rank's rows of the gradients' sum over ranks. For the materialised reference."""

    @staticmethod
    def forward(ctx: Any, local_BD: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return gather_rows(local_BD, group_name)

    @staticmethod
    def backward(ctx: Any, grad_GD: Tensor) -> tuple[Tensor, None]:
        return scatter_rows(grad_GD, ctx.group_name), None


def first_column(num_rows: int, group_name: str) -> int:
    """Where this rank's rows begin among all."""
    return dist.get_rank(_groups[group_name]) * num_rows if group_name else 0


def gather_rows(local: Tensor, group_name: str) -> Tensor:
    """All ranks' rows one after the other, without gradient."""
    if not group_name:
        return local
    group = _groups[group_name]
    parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts)


def scatter_rows(total_GD: Tensor, group_name: str) -> Tensor:
    """This rank's rows of the sum over ranks."""
    if not group_name:
        return total_GD
    group = _groups[group_name]
    count = total_GD.shape[0] // dist.get_world_size(group)
    if dist.get_backend(group) == "nccl":
        own = torch.empty_like(total_GD[:count])
        dist.reduce_scatter_tensor(own, total_GD.contiguous(), group=group)
        return own
    total = total_GD.contiguous()  # gloo has no reduce-scatter for every dtype
    dist.all_reduce(total, group=group)
    return total[first_column(count, group_name) :][:count].clone()


def combine_lse(partial_G: Tensor, group_name: str) -> Tensor:
    """log-sum-exp over ranks of each rank's log-sum-exps."""
    if not group_name:
        return partial_G
    return torch.logsumexp(gather_rows(partial_G[None], group_name), dim=0)


def _backend(name: str) -> ModuleType:
    return importlib.import_module("mmlg_kernels.tiled" if name == "triton" else "mmlg_kernels.chunked")


def _own_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Inside a region of autocast, products of fp32 features would be rounded to its dtype."""
    return torch.autocast(x.device.type, enabled=False)


def _nan_unless_positive(loss: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale > 0, loss, torch.nan)


@torch.library.custom_op("mmlg_kernels::softmax_loss", mutates_args=())
def softmax_loss(
    x: Tensor, y: Tensor, scale: Tensor, group_name: str, backend: str, chunk_bytes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's symmetric cross entropy; and for the backward pass log-sum-exps of rows and columns, and all ranks' columns."""
    first, columns = first_column(x.shape[0], group_name), gather_rows(y, group_name)
    with _own_precision(x):
        row_lse, column_lse, own = _backend(backend).softmax_forward(x, columns, scale, first, chunk_bytes)
    column_lse = combine_lse(column_lse, group_name)
    loss = ((row_lse + column_lse[first : first + x.shape[0]]) / 2 - own).mean()
    return _nan_unless_positive(loss, scale), row_lse, column_lse, columns if group_name else y.new_empty(0)


@torch.library.custom_op("mmlg_kernels::softmax_loss_backward", mutates_args=())
def softmax_loss_backward(
    grad: Tensor, x: Tensor, columns: Tensor, scale: Tensor, row_lse: Tensor, column_lse: Tensor, group_name: str, backend: str, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, y and scale."""
    first = first_column(x.shape[0], group_name)
    with _own_precision(x):
        dx, dy = _backend(backend).softmax_backward(x, columns, scale, first, row_lse, column_lse, chunk)
    return finish(grad, x, scale, dx, scatter_rows(dy, group_name))


@torch.library.custom_op("mmlg_kernels::sigmoid_loss", mutates_args=())
def sigmoid_loss(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, group_name: str, backend: str, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    """This rank's sigmoid loss; and for the backward pass all ranks' columns."""
    first, columns = first_column(x.shape[0], group_name), gather_rows(y, group_name)
    with _own_precision(x):
        total, own = _backend(backend).sigmoid_forward(x, columns, scale, bias, first, chunk_bytes)
    return _nan_unless_positive((total - own).mean(), scale), columns if group_name else y.new_empty(0)


@torch.library.custom_op("mmlg_kernels::sigmoid_loss_backward", mutates_args=())
def sigmoid_loss_backward(
    grad: Tensor, x: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, group_name: str, backend: str, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by x, y, scale and bias."""
    first = first_column(x.shape[0], group_name)
    with _own_precision(x):
        dx, dy, total = _backend(backend).sigmoid_backward(x, columns, scale, bias, first, chunk)
    dbias = (total * grad.to(total.dtype) / x.shape[0]).to(bias.dtype).reshape(bias.shape)
    return *finish(grad, x, scale, dx, scatter_rows(dy, group_name)), dbias


def finish(grad: Tensor, x: Tensor, scale: Tensor, dx: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W Y and W^T X -> gradients. The scale's needs no pass of its own: s dLoss/ds = sum_i <x_i, dLoss/dx_i>."""
    factor = grad.to(dx.dtype) / x.shape[0]
    dscale = ((x.to(dx.dtype) * dx).sum() * factor).to(scale.dtype).reshape(scale.shape)
    each = factor * scale.to(dx.dtype)
    return (dx * each).to(x.dtype), (dy * each).to(x.dtype), dscale


@softmax_loss.register_fake
def _(x: Tensor, y: Tensor, scale: Tensor, group_name: str, backend: str, chunk_bytes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    count = x.shape[0] * (dist.get_world_size(_groups[group_name]) if group_name else 1)
    columns = y.new_empty((count, y.shape[1]) if group_name else 0)
    return x.new_empty((), dtype=wide), x.new_empty(x.shape[0], dtype=wide), x.new_empty(count, dtype=wide), columns


@softmax_loss_backward.register_fake
def _(
    grad: Tensor, x: Tensor, columns: Tensor, scale: Tensor, row_lse: Tensor, column_lse: Tensor, group_name: str, backend: str, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), torch.empty_like(scale)


@sigmoid_loss.register_fake
def _(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, group_name: str, backend: str, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    count = x.shape[0] * (dist.get_world_size(_groups[group_name]) if group_name else 1)
    return x.new_empty((), dtype=wide), y.new_empty((count, y.shape[1]) if group_name else 0)


@sigmoid_loss_backward.register_fake
def _(
    grad: Tensor, x: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, group_name: str, backend: str, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), torch.empty_like(scale), torch.empty_like(bias)


def _save_softmax(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, scale, *ctx.options = inputs
    _, row_lse, column_lse, columns = output
    ctx.save_for_backward(x, columns if ctx.options[0] else y, scale, row_lse, column_lse)


def _softmax_gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return *softmax_loss_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


def _save_sigmoid(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, scale, bias, *ctx.options = inputs
    ctx.save_for_backward(x, output[1] if ctx.options[0] else y, scale, bias)


def _sigmoid_gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return *sigmoid_loss_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


softmax_loss.register_autograd(_softmax_gradient, setup_context=_save_softmax)
sigmoid_loss.register_autograd(_sigmoid_gradient, setup_context=_save_sigmoid)
