"""One pre-LN transformer block as a pure function of tensors, by which plain CLIPs and the auxiliary model compute their layers.

The tensors have the names that they have in open_clip's ResidualAttentionBlock, whose state dicts stay the interface:

    hidden = hidden + attention(layer_norm(hidden));  hidden = hidden + mlp(layer_norm(hidden))

A text tower's block is causal by itself, without a mask as a tensor: a dense mask would keep attention from its fast kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlg_scale.towers.attention import is_short, short_attention
from mmlg_scale.towers.compiled import compiled_block
from mmlg_scale.towers.config import head_dim, width
from mmlg_scale.towers.packing import Packing, attention, attention_of_ends

Block = Callable[..., Tensor]
"""(hidden [B, T, d], rows=None, packing=None) -> hidden [B, T, d]; with `rows` [B, 1], only those rows' results: [B, 1, d].

With a `packing` (text only) hidden states are [N, d], and the rows that may be asked for are its `ends_B`: [B, d]."""
NAMES = (
    "ln_1.weight",
    "ln_1.bias",
    "attn.in_proj_weight",
    "attn.in_proj_bias",
    "attn.out_proj.weight",
    "attn.out_proj.bias",
    "ln_2.weight",
    "ln_2.bias",
    "mlp.c_fc.weight",
    "mlp.c_fc.bias",
    "mlp.c_proj.weight",
    "mlp.c_proj.bias",
)
"""A block's tensors, in the order in which they are used."""
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")


@dataclass(frozen=True)
class BlockForm:
    """What a block computes besides its tensors.

    Attributes:
        num_heads: attention heads, which divide the width.
        causal: a token attends to itself and those before it (text), or to all (image).
        activation: of the MLP, one of ACTIVATIONS.
        eps: of the layer norms.
    """

    num_heads: int
    causal: bool
    activation: str = "gelu"
    eps: float = 1e-5

    @classmethod
    def of(cls, config: Mapping[str, Any], tower: str) -> BlockForm:
        """The form of the blocks of the "image" or "text" tower of an open_clip configuration."""
        fields = config["vision_cfg" if tower == "image" else "text_cfg"]
        tanh = (fields.get("act_kwargs") or {}).get("approximate") == "tanh"
        return cls(
            num_heads=width(config, tower) // head_dim(config, tower),
            causal=tower == "text",
            activation="quick_gelu" if config.get("quick_gelu", False) else "gelu_tanh" if tanh else "gelu",
            eps=float((fields.get("norm_kwargs") or {}).get("eps", 1e-5)),
        )


def run_block(
    hidden_BTd: Tensor,
    tensors: Mapping[str, Tensor],
    form: BlockForm,
    rows_B1: Tensor | None = None,
    packing: Packing | None = None,
    *,
    compiled: bool = False,
) -> Tensor:
    """One block on hidden states [B, T, d], or packed ones [N, d]; differentiable in all of them. See `Block`.

    Args:
        tensors: by open_clip's names, see NAMES; in_proj has queries, keys and values one after the other.
        rows_B1: int64, a position of each sequence: only its result is computed, [B, 1, d]. A tower's last block needs no more where the
            tower is pooled at one position, since what the other positions give is used nowhere.
        compiled: by torch.compile; the same to rounding.
    """
    ordered = [tensors[name] for name in NAMES]
    if compiled and packing is None:  # a packing is a loop over its lengths on a CPU: another graph for each batch
        return compiled_block(_compute, hidden_BTd, form, rows_B1)(hidden_BTd, rows_B1, *ordered)
    return _compute(hidden_BTd, form, rows_B1, packing, *ordered)


def _compute(
    hidden: Tensor,
    form: BlockForm,
    rows_B1: Tensor | None,
    packing: Packing | None,
    ln_1_weight: Tensor,
    ln_1_bias: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    ln_2_weight: Tensor,
    ln_2_bias: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
) -> Tensor:
    normed = _layer_norm(hidden, ln_1_weight, ln_1_bias, form.eps)
    if rows_B1 is None:
        attended = _attention(_linear(normed, in_weight, in_bias), form, packing)
    else:
        attended = _attention_of_rows(normed, in_weight, in_bias, rows_B1, form, packing)
        hidden = take_rows(hidden, rows_B1)
    hidden = hidden + _linear(attended, out_weight, out_bias)
    inner = _linear(_layer_norm(hidden, ln_2_weight, ln_2_bias, form.eps), fc_weight, fc_bias)
    return hidden + _linear(_activate(inner, form.activation), proj_weight, proj_bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """On a CPU a product with a bias writes it to every row first. A compiled block adds it where it next reads the product."""
    if torch.compiler.is_compiling() and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight) + bias
    return F.linear(x, weight, bias)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """In fp32 under autocast, given back in the dtype of `x`, as open_clip's LayerNorm does."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(x.dtype)


def _attention(qkv_BT3d: Tensor, form: BlockForm, packing: Packing | None) -> Tensor:
    if packing is None and is_short(qkv_BT3d):
        return short_attention(qkv_BT3d, form.num_heads, form.causal)
    # In three parts before heads are told apart: the backward pass then writes one gradient, without a copy to reorder it.
    query, key, value = (part.unflatten(-1, (form.num_heads, -1)) for part in qkv_BT3d.chunk(3, dim=-1))
    if packing is not None:
        assert form.causal, "packed sequences are captions"
        return attention(query, key, value, packing)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=form.causal).transpose(1, 2).flatten(2)


def _attention_of_rows(
    normed_BTd: Tensor, weight: Tensor, bias: Tensor, rows_B1: Tensor, form: BlockForm, packing: Packing | None
) -> Tensor:
    """Attention of one query of each sequence, over all tokens or, in a causal block, over those up to it."""
    width = normed_BTd.shape[-1]
    split = [width, 2 * width]
    (query_weight, pair_weight), (query_bias, pair_bias) = weight.split(split), bias.split(split)
    query = F.linear(take_rows(normed_BTd, rows_B1), query_weight, query_bias).unflatten(-1, (form.num_heads, -1))
    pair = F.linear(normed_BTd, pair_weight, pair_bias)
    key, value = (part.unflatten(-1, (form.num_heads, -1)) for part in pair.chunk(2, dim=-1))
    if packing is not None:
        return attention_of_ends(query, key, value, packing)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    seen = None
    if form.causal:
        seen = (torch.arange(normed_BTd.shape[1], device=rows_B1.device) <= rows_B1)[:, None, None]
    return F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=seen).transpose(1, 2).flatten(2)


def take_rows(x_BTd: Tensor, rows_BR: Tensor) -> Tensor:
    """Of each sequence the rows at its positions: [B, R, d]; of packed ones [N, d] the rows [B] themselves."""
    if x_BTd.ndim == 2:
        return x_BTd.index_select(0, rows_BR)
    return x_BTd.gather(1, rows_BR[..., None].expand(-1, -1, x_BTd.shape[-1]))


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
