"""Plain definitions of the same mathematics, in any precision up to fp64: what the other backends are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_terms(
    image_BD: Tensor, text_BD: Tensor, all_image_GD: Tensor, all_text_GD: Tensor, logit_scale: Tensor, first: int
) -> Tensor:
    """CLIP's symmetric cross entropy of this rank's rows against all columns (Radford et al. 2021, figure 3), materialised.

    Args:
        image_BD, text_BD: this rank's features.
        all_image_GD, all_text_GD: the features of all ranks.
        first: where this rank's rows begin among all.
    """
    targets_B = torch.arange(first, first + image_BD.shape[0], device=image_BD.device)
    image_logits_BG = logit_scale * (image_BD @ all_text_GD.T)
    text_logits_BG = logit_scale * (text_BD @ all_image_GD.T)
    return (F.cross_entropy(image_logits_BG, targets_B) + F.cross_entropy(text_logits_BG, targets_B)) / 2


def ranks(rows_BD: Tensor, columns_GD: Tensor, logit_scale: Tensor, first: int) -> Tensor:
    """[B]: 1 + the number of strictly greater logits in each row than the logit of its own pair."""
    logits_BG = logit_scale * (rows_BD @ columns_GD.T)
    own_B1 = logits_BG.gather(1, torch.arange(first, first + rows_BD.shape[0], device=rows_BD.device)[:, None])
    return 1 + (logits_BG > own_B1).sum(dim=1)


def sigmoid_terms(image_BD: Tensor, all_text_GD: Tensor, logit_scale: Tensor, logit_bias: Tensor, first: int) -> Tensor:
    """SigLIP's loss of this rank's rows against all columns (Zhai et al. 2023, equation 1), materialised; divided by this rank's B."""
    logits_BG = logit_scale * (image_BD @ all_text_GD.T) + logit_bias
    signs_BG = -torch.ones_like(logits_BG)
    signs_BG.diagonal(first)[: logits_BG.shape[0]].fill_(1.0)
    return -F.logsigmoid(signs_BG * logits_BG).sum() / logits_BG.shape[0]
