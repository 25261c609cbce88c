"""CLIP's contrastive loss on one rank or many, behind one call."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmlg_kernels import chunked, reference
from mmlg_kernels.dispatch import choose

_checked: set[tuple[Any, ...]] = set()


def contrastive_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    *,
    group: Any = None,
    normalize: bool = False,
    return_ranks: bool = False,
    backend: str = "auto",
    chunk_bytes: int = chunked.CHUNK_BYTES,
) -> Any:
    """The symmetric cross entropy of image-text similarities, where pair i belongs together (Radford et al. 2021, figure 3).

    Args:
        image_BD, text_BD: features of this rank's B pairs; bf16, fp16, fp32 or fp64, accumulated in at least fp32.
        logit_scale: the multiplier of the similarities (already exponentiated), one element, with gradient.
        group: None computes on these pairs alone. With a process group each rank passes its own pairs, the mean over ranks of the returned
            values is the loss of the global batch, and gradients averaged over ranks are the global batch's.
        normalize: L2-normalise the features first.
        return_ranks: return (loss, image_ranks_B, text_ranks_B) as well: 1 + the number of strictly greater logits than the pair's own
            in the row of each image, and in that of each text.
        backend: auto, chunked (recomputes in the backward pass, never B x B) or reference (materialised).
        chunk_bytes: memory for the logits of one chunk.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a scale that is not positive (checked on the CPU, where it costs nothing);
            an unknown backend; ranks that pass different shapes.
    """
    _check(image_BD, text_BD, logit_scale)
    name = choose(backend, image_BD)
    if normalize:
        image_BD, text_BD = F.normalize(image_BD, dim=-1), F.normalize(text_BD, dim=-1)
    scale, first = logit_scale.reshape(()), 0
    all_image, all_text = image_BD, text_BD
    several = group is not None and dist.get_world_size(group) > 1
    if several:
        _check_even(image_BD, group)
        all_image, all_text = _Gather.apply(image_BD, group), _Gather.apply(text_BD, group)
        first = dist.get_rank(group) * image_BD.shape[0]
    if name == "reference":
        loss = reference.contrastive_terms(image_BD, text_BD, all_image, all_text, scale, first)
    elif several:
        image_loss = chunked.RowCrossEntropy.apply(image_BD, all_text, scale, first, chunk_bytes)
        loss = (image_loss + chunked.RowCrossEntropy.apply(text_BD, all_image, scale, first, chunk_bytes)) / 2
    else:
        loss = chunked.SymmetricCrossEntropy.apply(image_BD, text_BD, scale, chunk_bytes)
    if not return_ranks:
        return loss
    return loss, chunked.ranks(image_BD, all_text, scale, first, chunk_bytes), chunked.ranks(text_BD, all_image, scale, first, chunk_bytes)


class _Gather(torch.autograd.Function):
    """All ranks' rows, [W * B, D]; backward: this rank's rows of the gradients' sum over ranks."""

    @staticmethod
    def forward(ctx: Any, local_BD: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.count = group, local_BD.shape[0]
        parts = [torch.empty_like(local_BD, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, local_BD.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad_GD: Tensor) -> tuple[Tensor, None]:
        total = grad_GD.contiguous()
        dist.all_reduce(total, group=ctx.group)
        first = dist.get_rank(ctx.group) * ctx.count
        return total[first : first + ctx.count], None


def _check(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor) -> None:
    if image_BD.ndim != 2 or image_BD.shape != text_BD.shape or image_BD.shape[0] == 0:
        raise ValueError(
            f"image and text features must share a shape [B, D] with B > 0, got {tuple(image_BD.shape)} and {tuple(text_BD.shape)}"
        )
    if image_BD.dtype != text_BD.dtype or not image_BD.is_floating_point():
        raise ValueError(f"image and text features must share a floating dtype, got {image_BD.dtype} and {text_BD.dtype}")
    if image_BD.device != text_BD.device or logit_scale.device != image_BD.device:
        raise ValueError(f"all tensors must share a device, got {image_BD.device}, {text_BD.device} and {logit_scale.device}")
    if logit_scale.numel() != 1:
        raise ValueError(f"logit_scale must have one element, got shape {tuple(logit_scale.shape)}")
    if logit_scale.device.type == "cpu" and logit_scale.item() <= 0:
        raise ValueError(f"logit_scale is the multiplier, already exponentiated, and must be positive, got {logit_scale.item()}")


def _check_even(local_BD: Tensor, group: Any) -> None:
    """Compare the ranks' shapes, once per shape and group: uneven ones would hang or corrupt the gather."""
    key = (id(group), tuple(local_BD.shape))
    if key in _checked:
        return
    shapes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(shapes, tuple(local_BD.shape), group=group)
    if len(set(shapes)) > 1:
        said = ", ".join(f"rank {rank}: {list(shape)}" for rank, shape in enumerate(shapes))
        raise ValueError(f"every rank must pass features of one shape, got {said}")
    _checked.add(key)
