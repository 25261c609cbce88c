"""Attention over short sequences in a block that is compiled for a CPU.

torch's fused kernel never stores the attention weights, which a CPU's cache holds at these lengths; what remains of it are products of a
few rows each. Batched products take less, and the compiler joins what is around them. Without it the copies in between cost what they gain.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHORT = 64
"""Tokens, up to which this is used; the weights [B, h, T, T] are then little beside what else a block keeps for its backward pass."""


def is_short(packed_BT3d: Tensor) -> bool:
    """Whether attention of these queries, keys and values goes by `short_attention`."""
    on_cpu = packed_BT3d.device.type == "cpu" and packed_BT3d.dtype == torch.float32
    return torch.compiler.is_compiling() and on_cpu and packed_BT3d.shape[1] <= SHORT


def short_attention(packed_BT3d: Tensor, num_heads: int, causal: bool) -> Tensor:
    """softmax(Q K^T / sqrt(c)) V of heads of width c: queries, keys and values side by side in [B, T, 3 d] -> [B, T, d]."""
    query, key, value = packed_BT3d.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2).contiguous().unbind(0)
    scores = torch.bmm(query * key.shape[-1] ** -0.5, key.transpose(1, 2))
    if causal:
        later = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return torch.bmm(scores.softmax(dim=-1), value).unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(2)
