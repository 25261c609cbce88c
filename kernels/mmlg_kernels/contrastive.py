"""The contrastive losses of CLIP and SigLIP on one rank or many, behind one call each."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mmlg_kernels import chunked, exchange, pairs, reference
from mmlg_kernels.dispatch import choose


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
        image_BD, text_BD: features of this rank's B pairs; bf16, fp16, fp32 or (not in Triton) fp64, accumulated in at least fp32.
        logit_scale: the multiplier of the similarities (already exponentiated), one element, with gradient.
        group: None computes on these pairs only. With a process group each rank passes its own pairs, the mean over ranks of the returned
            values is the loss of the global batch, and gradients averaged over ranks are the global batch's.
        normalize: L2-normalise the features first.
        return_ranks: return (loss, image_ranks_B, text_ranks_B) as well: 1 + the number of strictly greater logits than the pair's own
            in the row of each image, and in that of each text. Triton counts them in the loss's own pass; the others in two more.
        backend: auto, triton, chunked (both compute the logits again in the backward pass, never B x B) or reference (materialised).
        chunk_bytes: memory for the logits of one chunk, in the chunked backend.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a scale that is not positive (on the CPU, or with MMLG_DEBUG=1; on a GPU
            the loss is NaN instead); an unknown backend; ranks that pass different shapes.
    """
    pairs.check(image_BD, text_BD, logit_scale)
    name = choose(backend, image_BD)
    if normalize:
        image_BD, text_BD = F.normalize(image_BD, dim=-1), F.normalize(text_BD, dim=-1)
    scale, group_name = logit_scale.reshape(()), exchange.name_group(group)
    if name == "reference":
        exchange.check_shape(image_BD, group_name)
        first = exchange.first_column(image_BD.shape[0], group_name)
        all_image, all_text = (exchange.Gather.apply(x, group_name) if group_name else x for x in (image_BD, text_BD))
        loss = reference.contrastive_terms(image_BD, text_BD, all_image, all_text, scale, first)
    else:
        counts = return_ranks and name == "triton"
        loss, *_, image_ranks, text_ranks = pairs.softmax_loss(image_BD, text_BD, scale, group_name, name, chunk_bytes, counts)
        if counts:
            return loss, image_ranks, text_ranks
    if not return_ranks:
        return loss
    return loss, *_ranks(image_BD.detach(), text_BD.detach(), scale.detach(), group_name, chunk_bytes)


def sigmoid_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    group: Any = None,
    normalize: bool = False,
    backend: str = "auto",
    chunk_bytes: int = chunked.CHUNK_BYTES,
) -> Tensor:
    """SigLIP's loss: -1/B sum_ij log sigmoid(z_ij (s <x_i, y_j> + b)), z = 1 for pairs and -1 else (Zhai et al. 2023, equation 1).

    Args:
        logit_bias: b, one element, with gradient. The rest as in `contrastive_loss`.

    Raises:
        ValueError: as in `contrastive_loss`.
    """
    pairs.check(image_BD, text_BD, logit_scale, logit_bias)
    name = choose(backend, image_BD)
    if normalize:
        image_BD, text_BD = F.normalize(image_BD, dim=-1), F.normalize(text_BD, dim=-1)
    scale, bias, group_name = logit_scale.reshape(()), logit_bias.reshape(()), exchange.name_group(group)
    if name == "reference":
        exchange.check_shape(image_BD, group_name)
        all_text = exchange.Gather.apply(text_BD, group_name) if group_name else text_BD
        return reference.sigmoid_terms(image_BD, all_text, scale, bias, exchange.first_column(image_BD.shape[0], group_name))
    return pairs.sigmoid_loss(image_BD, text_BD, scale, bias, group_name, name, chunk_bytes)[0]


def _ranks(image_BD: Tensor, text_BD: Tensor, scale: Tensor, group_name: str, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    first = exchange.first_column(image_BD.shape[0], group_name)
    all_image, all_text = exchange.gather_rows(image_BD, group_name), exchange.gather_rows(text_BD, group_name)
    return chunked.ranks(image_BD, all_text, scale, first, chunk_bytes), chunked.ranks(text_BD, all_image, scale, first, chunk_bytes)
