"""Recall@k in both directions, with any number of captions per image (CLIP_benchmark's metric names).

Image retrieval: for each caption, whether its image is among the k best images. Text retrieval: for each image, whether any of its
captions is among the k best captions. The rank of a right answer is 1 + the number of candidates with a score at least as high that are
not right themselves: ties count against the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlg_scale.errors import UserError
from mmlg_scale.metric_names import KS


def retrieval_ranks(image_ND: Tensor, text_MD: Tensor, text_to_image_M: Tensor, *, chunk_size: int = 1024) -> tuple[Tensor, Tensor]:
    """Ranks of the best right answer: of its image for each caption [M], and of its best caption for each image [N]."""
    image_ND, text_MD = F.normalize(image_ND.float(), dim=-1), F.normalize(text_MD.float(), dim=-1)
    # Results have a place beforehand: small ones that stay, made among large ones that go, would leave the heap full of holes.
    image_ranks, text_ranks = (torch.empty(len(rows), dtype=torch.long) for rows in (text_MD, image_ND))
    for start in range(0, len(text_MD), chunk_size):
        scores = text_MD[start : start + chunk_size] @ image_ND.T
        own = scores.gather(1, text_to_image_M[start : start + chunk_size, None])
        # The right image is one of those counted; written so that a NaN score counts as the worst rank, not the best.
        image_ranks[start : start + chunk_size] = (~(scores < own)).sum(dim=1)
    for start in range(0, len(image_ND), chunk_size):
        scores = image_ND[start : start + chunk_size] @ text_MD.T
        right = text_to_image_M[None, :] == torch.arange(start, start + scores.shape[0])[:, None]
        best = scores.masked_fill(~right, -torch.inf).max(dim=1, keepdim=True).values
        text_ranks[start : start + chunk_size] = 1 + (~(scores < best) & ~right).sum(dim=1)
    return image_ranks, text_ranks


def recall_at_k(
    image_ND: Tensor, text_MD: Tensor, text_to_image_M: Tensor, *, ks: Sequence[int] = KS, chunk_size: int = 1024
) -> dict[str, float]:
    """`image_retrieval_recall@k`, `text_retrieval_recall@k` and their mean `mean_recall@k` for each k.

    Args:
        image_ND: one row per image; need not be normalised.
        text_MD: one row per caption.
        text_to_image_M: the image of each caption.

    Raises:
        UserError: an image has no caption: its text retrieval is not defined.
    """
    orphans = len(image_ND) - len(torch.unique(text_to_image_M))
    if orphans:
        raise UserError(f"{orphans} images have no caption: text retrieval is not defined for them. Leave them out of the split.")
    image_ranks, text_ranks = retrieval_ranks(image_ND, text_MD, text_to_image_M, chunk_size=chunk_size)
    metrics = {f"image_retrieval_recall@{k}": (image_ranks <= k).double().mean().item() for k in ks}
    metrics |= {f"text_retrieval_recall@{k}": (text_ranks <= k).double().mean().item() for k in ks}
    both = {f"mean_recall@{k}": (metrics[f"image_retrieval_recall@{k}"] + metrics[f"text_retrieval_recall@{k}"]) / 2 for k in ks}
    return metrics | both
