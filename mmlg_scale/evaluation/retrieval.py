"""Recall@k in both directions, with any number of captions per image (CLIP_benchmark's metric names).

Image retrieval: for each caption, whether its image is among the k best images. Text retrieval: for each image, whether any of its
captions is among the k best captions. The rank of a right answer is 1 + the number of candidates with a score at least as high that are
not right themselves: ties count against the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmlg_scale.errors import UserError
from mmlg_scale.metric_names import KS
from mmlg_scale.ranks import several_ranks

SCORES = 2**26
"""Of a chunk of rows with all candidates: a few tensors of 256 MB are made of them."""


def retrieval_ranks(
    image_ND: Tensor, text_MD: Tensor, text_to_image_M: Tensor, *, chunk_size: int = 1024, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Ranks of the best right answer: of its image for each caption [M], and of its best caption for each image [N].

    Under several ranks, of which all have all features, each ranks every world-size-th chunk of rows; all get all results.

    Args:
        chunk_size: rows at a time, fewer where there are many candidates.
        device: on which ranks exchange; None: the features'.
    """
    image_ND, text_MD = F.normalize(image_ND.float(), dim=-1), F.normalize(text_MD.float(), dim=-1)
    # Results have a place beforehand: small ones that stay, made among large ones that go, would leave the heap full of holes.
    image_ranks, text_ranks = (torch.zeros(len(rows), dtype=torch.long) for rows in (text_MD, image_ND))
    for rows in _own_chunks(len(text_MD), chunk_size, len(image_ND)):
        scores = text_MD[rows] @ image_ND.T
        own = scores.gather(1, text_to_image_M[rows, None])
        # The right image is one of those counted; written so that a NaN score counts as the worst rank, not the best.
        image_ranks[rows] = (~(scores < own)).sum(dim=1)
    for rows in _own_chunks(len(image_ND), chunk_size, len(text_MD)):
        scores = image_ND[rows] @ text_MD.T
        right = text_to_image_M[None, :] == torch.arange(rows.start, rows.start + len(scores))[:, None]
        best = scores.masked_fill(~right, -torch.inf).max(dim=1, keepdim=True).values
        text_ranks[rows] = 1 + (~(scores < best) & ~right).sum(dim=1)
    if several_ranks():
        image_ranks, text_ranks = (_sum_over_ranks(own, device or image_ND.device) for own in (image_ranks, text_ranks))
    return image_ranks, text_ranks


def _own_chunks(num_rows: int, chunk_size: int, num_candidates: int) -> Iterator[slice]:
    """The chunks of rows that fall to this rank, of at most `SCORES` scores each."""
    chunk_size = min(chunk_size, max(1, SCORES // max(1, num_candidates)))
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if several_ranks() else (0, 1)
    return (slice(start, start + chunk_size) for start in range(rank * chunk_size, num_rows, world_size * chunk_size))


def _sum_over_ranks(own: Tensor, device: torch.device) -> Tensor:
    """Ranks of rows, which are 0 in those of other ranks' chunks."""
    whole = own.to(device)
    dist.all_reduce(whole)
    return whole.to(own.device)


def recall_at_k(
    image_ND: Tensor,
    text_MD: Tensor,
    text_to_image_M: Tensor,
    *,
    ks: Sequence[int] = KS,
    chunk_size: int = 1024,
    device: torch.device | None = None,
) -> dict[str, float]:
    """`image_retrieval_recall@k`, `text_retrieval_recall@k` and their mean `mean_recall@k` for each k.

    Args:
        image_ND: one row per image; need not be normalised.
        text_MD: one row per caption.
        text_to_image_M: the image of each caption.
        chunk_size, device: as for `retrieval_ranks`.

    Raises:
        UserError: an image has no caption: its text retrieval is not defined.
    """
    orphans = len(image_ND) - len(torch.unique(text_to_image_M))
    if orphans:
        raise UserError(f"{orphans} images have no caption: text retrieval is not defined for them. Leave them out of the split.")
    image_ranks, text_ranks = retrieval_ranks(image_ND, text_MD, text_to_image_M, chunk_size=chunk_size, device=device)
    metrics = {f"image_retrieval_recall@{k}": (image_ranks <= k).double().mean().item() for k in ks}
    metrics |= {f"text_retrieval_recall@{k}": (text_ranks <= k).double().mean().item() for k in ks}
    both = {f"mean_recall@{k}": (metrics[f"image_retrieval_recall@{k}"] + metrics[f"text_retrieval_recall@{k}"]) / 2 for k in ks}
    return metrics | both
