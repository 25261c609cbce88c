"""Coefficients over relative depth -> layer weights: the weighted sum.

Layer l of L sits at relative depth t = l / (L - 1). For each matrix g of a block and each block k, the coefficient a[g, k](t) is piecewise
linear in t between R knots, so any depth evaluates in closed form:  W[l, g] = sum_k a[g, k](t_l) * B[k, g].
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmlg_scale.learngene.blocks import BlockLayout


def relative_depth(layer: int, num_layers: int) -> float:
    """t = l / (L - 1) for l = 0 ... L - 1; one half where there is one layer only."""
    assert 0 <= layer < num_layers
    return layer / (num_layers - 1) if num_layers > 1 else 0.5


def knot_weights(num_layers: int, num_knots: int) -> Tensor:
    """[L, R] in fp64: the share of each knot at each layer. Rows sum to 1 and have at most two entries that are not zero."""
    weights_LR = torch.zeros(num_layers, num_knots, dtype=torch.float64)
    for layer in range(num_layers):
        position = relative_depth(layer, num_layers) * (num_knots - 1)
        lower = min(int(position), num_knots - 2)
        weights_LR[layer, lower] = 1 - (position - lower)
        weights_LR[layer, lower + 1] = position - lower
    return weights_LR


def interpolate(knots_R: Tensor, num_layers: int) -> Tensor:
    """Values at R knots, [R, ...], interpolated to the layers, [L, ...]."""
    weights_LR = knot_weights(num_layers, knots_R.shape[0]).to(knots_R)
    return torch.tensordot(weights_LR, knots_R, dims=1)


def compose_layers(
    layout: BlockLayout, blocks_KP: Tensor, coefficients_RGK: Tensor, vectors_RV: Tensor, num_layers: int
) -> list[dict[str, Tensor]]:
    """The named tensors of each of `num_layers` layers.

    Args:
        blocks_KP: the flat matrices of K blocks.
        coefficients_RGK: per knot, matrix (in the layout's order) and block.
        vectors_RV: the flat vectors per knot.
    """
    coefficients_LGK = interpolate(coefficients_RGK, num_layers)
    vectors_LV = interpolate(vectors_RV, num_layers)
    layers: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]
    for index, entry in enumerate(layout.matrices):
        flat_Kn = blocks_KP[:, entry.offset : entry.offset + entry.size]
        composed = (coefficients_LGK[:, index] @ flat_Kn).unflatten(-1, entry.shape)
        for layer, tensor in zip(layers, composed.unbind(0), strict=True):
            layer[entry.name] = tensor
    for entry in layout.vectors:
        for layer, tensor in zip(layers, entry.view(vectors_LV).unbind(0), strict=True):
            layer[entry.name] = tensor
    return layers
