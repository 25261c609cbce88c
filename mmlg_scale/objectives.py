"""Losses over tower outputs: contrastive, and the terms that compare a student with the frozen ancestor.

All of them take the dictionaries that the towers' forward passes return: ``image_features`` [B, D] and ``text_features`` [B k, D] (not
normalised), ``image_hidden`` / ``text_hidden`` (lists of [B, T, d] and [B k, T, d]), ``logit_scale`` (the multiplier) and, for SigLIP,
``logit_bias``. Each image has k captions, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmlg_kernels import contrastive_distillation_loss, contrastive_loss, sigmoid_loss
from torch import Tensor

from mmlg_scale.recipe import DistillationLoss

Outputs = Mapping[str, Any]


def contrastive(outputs: Outputs) -> Tensor:
    """CLIP's symmetric cross entropy over the global batch (Radford et al. 2021, figure 3), or SigLIP's loss for outputs with a logit bias.

    Under several ranks the mean of the returned values over ranks is the global batch's loss, and gradients are right after the
    engine has averaged them over ranks.

    Of k captions an image, the mean of k such losses, each between the images and one caption of each (in the manner of
    LaCLIP-MT, Fan et al. 2023).
    """
    found = [_contrastive(part) for part in _one_caption_each(outputs)]
    return found[0] if len(found) == 1 else torch.stack(found).mean()


def _one_caption_each(outputs: Outputs) -> list[Outputs]:
    """What the contrastive losses need of the outputs, with the first, the second, ... caption of each image."""
    captions = len(outputs["text_features"]) // len(outputs["image_features"])
    if captions == 1:
        return [outputs]
    return [{**outputs, "text_features": outputs["text_features"][number::captions]} for number in range(captions)]


def _contrastive(outputs: Outputs) -> Tensor:
    features = _unit(outputs, _kernel_dtype(outputs))
    if "logit_bias" in outputs:
        return sigmoid_loss(*features, outputs["logit_bias"].float(), group=_group())
    return contrastive_loss(*features, group=_group())


def contrastive_with_affinity(student: Outputs, teacher: Outputs, weights: DistillationLoss) -> Tensor:
    """The contrastive loss and TinyCLIP's affinity mimicking, weighted, out of one pass over the similarities; see `contrastive`.

    SigLIP's loss, which is no softmax, takes a pass of its own.
    """
    parts = zip(_one_caption_each(student), _one_caption_each(teacher), strict=True)
    found = [_with_affinity(*part, weights) for part in parts]
    return found[0] if len(found) == 1 else torch.stack(found).mean()


def _with_affinity(student: Outputs, teacher: Outputs, weights: DistillationLoss) -> Tensor:
    own_pass, dtype = "logit_bias" in student, _kernel_dtype(student)
    loss = contrastive_distillation_loss(
        *_unit(student, dtype),
        *_unit(teacher, dtype),
        contrastive_weight=0.0 if own_pass else weights.contrastive,
        distillation_weight=weights.affinity,
        group=_group(),
    )
    return loss + weights.contrastive * _contrastive(student) if own_pass else loss


def _kernel_dtype(outputs: Outputs) -> torch.dtype:
    """What the loss kernels get: bf16 where a GPU computed the features in it, for its tensor cores; fp32 elsewhere."""
    features = outputs["image_features"]
    return torch.bfloat16 if features.is_cuda and features.dtype == torch.bfloat16 else torch.float32


def _unit(outputs: Outputs, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Features, normalised in fp32 and then of `dtype`, and the multiplier, in fp32; above 0 even where its logarithm rounds to 0."""
    image, text = (F.normalize(outputs[f"{tower}_features"].float(), dim=-1).to(dtype) for tower in ("image", "text"))
    return image, text, outputs["logit_scale"].float().clamp_min(torch.finfo(torch.float32).tiny)


def _group() -> Any:
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None


def feature_distance(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Mean over the batch of 1 - cosine between student's and teacher's features."""
    return 1 - F.cosine_similarity(student_BD.float(), teacher_BD.float(), dim=-1).mean()


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], valid_BT: Tensor | None = None) -> Tensor:
    """Sum over the compared depths of the mean squared error of hidden states [B, T, d], divided by the teacher's variance there.

    `valid_BT` (bool) leaves tokens out: text padding has no signal. Means and variances are the global batch's, because ranks hold
    different numbers of valid tokens: the mean over ranks of the returned values is what one process with the whole batch computes.
    """
    pairs = [(s.float(), t.float()) for s, t in zip(student, teacher, strict=True)]
    # Tokens are weighted by 0 or 1: to index by them would have the host wait for their number.
    weight_BT = None if valid_BT is None else valid_BT.float()
    moments_R3 = torch.stack([_moments(t, weight_BT) for _, t in pairs])
    world_size = 1
    if dist.is_initialized() and dist.get_world_size() > 1:
        world_size = dist.get_world_size()
        dist.all_reduce(moments_R3)
    count, first, second = moments_R3.unbind(1)
    variance_R = second / count - (first / count) ** 2
    scale_R = (world_size / (count * variance_R)).float()
    errors = [_over_tokens((s - t).square().sum(dim=-1), weight_BT).sum() for s, t in pairs]
    return (scale_R * torch.stack(errors)).sum()


def _over_tokens(values_BT: Tensor, weight_BT: Tensor | None) -> Tensor:
    return values_BT if weight_BT is None else values_BT * weight_BT


def _moments(hidden_BTd: Tensor, weight_BT: Tensor | None) -> Tensor:
    """Count, sum and sum of squares of the weighted tokens' numbers [3]; over tokens in fp64, since the variance is their difference."""
    rows = [hidden_BTd.sum(dim=-1), hidden_BTd.square().sum(dim=-1)]
    first, second = (_over_tokens(row_BT, weight_BT).sum(dtype=torch.float64) for row_BT in rows)
    count = torch.full_like(first, hidden_BTd.numel()) if weight_BT is None else weight_BT.sum(dtype=torch.float64) * hidden_BTd.shape[-1]
    return torch.stack([count, first, second])


def distillation(student: Outputs, teacher: Outputs, text_NT: Tensor, weights: DistillationLoss) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the terms in `weights`, and each term by name.

    Args:
        student, teacher: outputs of the towers on the same batch; hidden states are needed only where their weight is not 0.
        text_NT: token ids, N = B k; every token up to and including the end token (the highest id) counts as valid.
    """
    terms: dict[str, Tensor] = {}
    if weights.affinity:
        # One number for both: to tell them apart would cost a second pass.
        loss = terms["contrastive_with_affinity"] = contrastive_with_affinity(student, teacher, weights)
    else:
        terms["contrastive"] = contrastive(student)
        loss = weights.contrastive * terms["contrastive"]
    if weights.feature:
        terms["feature"] = feature_distance(student["image_features"], teacher["image_features"]) + feature_distance(
            student["text_features"], teacher["text_features"]
        )
        loss = loss + weights.feature * terms["feature"]
    if weights.hidden:
        positions = torch.arange(text_NT.shape[1], device=text_NT.device)
        valid_NT = positions <= text_NT.argmax(dim=-1, keepdim=True)
        terms["hidden"] = hidden_distance(student["image_hidden"], teacher["image_hidden"]) + hidden_distance(
            student["text_hidden"], teacher["text_hidden"], valid_NT
        )
        loss = loss + weights.hidden * terms["hidden"]
    return loss, terms
