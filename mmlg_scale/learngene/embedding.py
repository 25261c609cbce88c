"""The token embedding as a product of two smaller matrices (Lan et al. 2020, "ALBERT"): `tokens` [V, r] times `channels` [r, d].

With its large vocabulary the embedding is a CLIP learngene's largest tensor. Training looks up rows of `tokens` and multiplies only those;
a descendant gets the product, so that it is a plain open_clip model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

WHOLE = "token_embedding.weight"
TOKENS, CHANNELS = "token_embedding.tokens", "token_embedding.channels"


class FactorisedEmbedding(nn.Module):
    """In place of a text tower's nn.Embedding(V, d).

    Parameters:
        tokens: [V, r].
        channels: [r, d]; a narrower tower has the leading columns.
    """

    def __init__(self, vocabulary: int, rank: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(vocabulary, rank))
        self.channels = nn.Parameter(torch.empty(rank, width))

    def forward(self, text: Tensor) -> Tensor:
        """Token ids [B, T] -> [B, T, d]."""
        return nn.functional.embedding(text, self.tokens) @ self.channels


def factorise(weight_Vd: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product ([V, r], [r, d]) to an embedding, by its singular value decomposition in fp64.

    The singular values go to `tokens`, whose numbers so have the size of the embedding's. The rows of `channels` are orthonormal: a change
    of a row of `tokens` moves that token's embedding by the same length.
    """
    left, values, right = torch.linalg.svd(weight_Vd.detach().double(), full_matrices=False)
    return (left * values)[:, :rank].to(weight_Vd.dtype), right[:rank].to(weight_Vd.dtype)


def factorise_stem(stem: Mapping[str, Tensor], rank: int | None) -> dict[str, Tensor]:
    """A stem's tensors by open_clip's names, with the factors in place of the whole embedding; unchanged where the rank is None."""
    found = dict(stem)
    if rank is not None:
        found[TOKENS], found[CHANNELS] = factorise(found.pop(WHOLE), rank)
    return found


def factorised_shapes(shapes: Mapping[str, tuple[int, ...]], rank: int | None) -> dict[str, tuple[int, ...]]:
    """As `factorise_stem`, for names and shapes."""
    found = dict(shapes)
    if rank is not None:
        vocabulary, width = found.pop(WHOLE)
        found |= {TOKENS: (vocabulary, rank), CHANNELS: (rank, width)}
    return found


def multiplied_out(get: Callable[[str], Tensor], rank: int | None) -> Callable[[str], Tensor]:
    """`get`, which gives a stem's tensors by name, but with the whole embedding where `get` has factors."""
    if rank is None:
        return get
    return lambda name: get(TOKENS) @ get(CHANNELS) if name == WHOLE else get(name)


def product_flops(length: int, rank: int | None, width: int) -> int:
    """FLOPs of multiplying out the embeddings of a caption of `length` tokens; a look-up is not counted."""
    return 2 * length * rank * width if rank is not None else 0
