"""Losses over tower outputs: contrastive, and the terms that compare a student with the frozen ancestor.

All of them take the dictionaries that the towers' forward passes return: ``image_features`` / ``text_features`` [B, D] (not
normalised), ``image_hidden`` / ``text_hidden`` (lists of [B, T, d]) and ``logit_scale`` (the multiplier).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmlg_kernels import contrastive_loss
from torch import Tensor

from mmlg_scale.recipe import DistillationLoss

Outputs = Mapping[str, Any]


def contrastive(outputs: Outputs) -> Tensor:
    """CLIP's symmetric cross entropy over the global batch (Radford et al. 2021, figure 3).

    Under several ranks the mean of the returned values over ranks is the global batch's loss, and gradients are right after the
    engine has averaged them over ranks.
    """
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    return contrastive_loss(
        outputs["image_features"].float(),
        outputs["text_features"].float(),
        outputs["logit_scale"].float(),
        group=group,
        normalize=True,
    )


def feature_distance(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Mean over the batch of 1 - cosine between student's and teacher's features."""
    return 1 - F.cosine_similarity(student_BD.float(), teacher_BD.float(), dim=-1).mean()


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], valid_BT: Tensor | None = None) -> Tensor:
    """Sum over the compared depths of the mean squared error of hidden states [B, T, d], divided by the teacher's variance there.

    `valid_BT` (bool) leaves tokens out: text padding carries no signal.
    """
    total = torch.zeros((), device=student[0].device)
    for student_BTd, teacher_BTd in zip(student, teacher, strict=True):
        s, t = student_BTd.float(), teacher_BTd.float()
        if valid_BT is not None:
            s, t = s[valid_BT], t[valid_BT]
        total = total + F.mse_loss(s, t) / t.var(correction=0)
    return total


def distillation(student: Outputs, teacher: Outputs, text_BT: Tensor, weights: DistillationLoss) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the terms in `weights`, and each term by name.

    Args:
        student, teacher: outputs of the towers on the same batch; hidden states are needed only where their weight is not 0.
        text_BT: token ids; every token up to and including the end token (the highest id) counts as valid.
    """
    terms: dict[str, Tensor] = {"contrastive": contrastive(student)}
    loss = weights.contrastive * terms["contrastive"]
    if weights.feature:
        terms["feature"] = feature_distance(student["image_features"], teacher["image_features"]) + feature_distance(
            student["text_features"], teacher["text_features"]
        )
        loss = loss + weights.feature * terms["feature"]
    if weights.hidden:
        positions = torch.arange(text_BT.shape[1], device=text_BT.device)
        valid_BT = positions <= text_BT.argmax(dim=-1, keepdim=True)
        terms["hidden"] = hidden_distance(student["image_hidden"], teacher["image_hidden"]) + hidden_distance(
            student["text_hidden"], teacher["text_hidden"], valid_BT
        )
        loss = loss + weights.hidden * terms["hidden"]
    return loss, terms
