"""Attention over short sequences on a CPU, where torch's fused kernel loses to plain products.

The fused kernel saves a GPU's memory traffic by never storing the attention weights. At the lengths of small models they fit a CPU's cache,
and what remains of that kernel are products of a few rows each: stored weights and batched products take half of its time.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

SHORT = 64
"""Tokens, up to which this is faster; the weights [B, h, T, T] are then little beside what else a block keeps for its backward pass."""


def is_short(packed_BT3d: Tensor) -> bool:
    """Whether attention of these queries, keys and values goes by `short_attention`."""
    return packed_BT3d.device.type == "cpu" and packed_BT3d.dtype == torch.float32 and packed_BT3d.shape[1] <= SHORT


def short_attention(packed_BT3d: Tensor, num_heads: int, causal: bool) -> Tensor:
    """softmax(Q K^T / sqrt(c)) V of heads of width c: queries, keys and values side by side in [B, T, 3 d] -> [B, T, d]."""
    if torch.compiler.is_compiling():  # which fuses what is between the products, forwards and backwards
        query, key, value = _by_head(packed_BT3d, num_heads).unbind(0)
        scores = torch.bmm(query * key.shape[-1] ** -0.5, key.transpose(1, 2))
        if causal:
            scores = scores.masked_fill(_hidden(scores.shape[1]), float("-inf"))
        return _by_token(torch.bmm(scores.softmax(dim=-1), value), num_heads)
    out: Tensor = _ShortAttention.apply(packed_BT3d, num_heads, causal)
    return out


class _ShortAttention(torch.autograd.Function):
    """Few operators: one copy sorts queries, keys and values by heads, and one their gradients back by tokens."""

    @staticmethod
    def forward(ctx: Any, packed_BT3d: Tensor, num_heads: int, causal: bool) -> Tensor:
        parts_3NTc = _by_head(packed_BT3d, num_heads)
        query, key, value = parts_3NTc.unbind(0)
        scale = key.shape[-1] ** -0.5
        if causal:
            mask = _mask(key.shape[1], key.dtype)
            scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scale)
        else:
            scores = torch.baddbmm(query.new_empty(()), query, key.transpose(1, 2), beta=0, alpha=scale)
        weights_NTT = scores.softmax(dim=-1)
        ctx.save_for_backward(parts_3NTc, weights_NTT)
        ctx.num_heads = num_heads
        return _by_token(torch.bmm(weights_NTT, value), num_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        parts_3NTc, weights_NTT = ctx.saved_tensors
        query, key, value = parts_3NTc.unbind(0)
        scale, num_heads = key.shape[-1] ** -0.5, ctx.num_heads
        (grad_NTc,) = _by_head(grads[0], num_heads, 1).unbind(0)
        found = torch.empty_like(parts_3NTc)
        torch.bmm(weights_NTT.transpose(1, 2), grad_NTc, out=found[2])
        scores = torch._softmax_backward_data(torch.bmm(grad_NTc, value.transpose(1, 2)), weights_NTT, -1, weights_NTT.dtype)
        torch.baddbmm(found[0], scores, key, beta=0, alpha=scale, out=found[0])
        torch.baddbmm(found[1], scores.transpose(1, 2), query, beta=0, alpha=scale, out=found[1])
        return _by_token(found.flatten(0, 1), num_heads, 3), None, None


def _by_head(x_BTd: Tensor, num_heads: int, parts: int = 3) -> Tensor:
    """[B, T, parts d] -> [parts, B h, T, c]"""
    return x_BTd.unflatten(-1, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2).contiguous()


def _by_token(x_NTc: Tensor, num_heads: int, parts: int = 1) -> Tensor:
    """[parts B h, T, c] -> [B, T, parts d]"""
    return x_NTc.unflatten(0, (parts, -1, num_heads)).permute(1, 3, 0, 2, 4).flatten(2)


def _hidden(length: int) -> Tensor:
    """[T, T]: which tokens come later."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


@functools.lru_cache(maxsize=64)
def _mask(length: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(length, length, dtype=dtype).masked_fill_(_hidden(length), float("-inf"))
