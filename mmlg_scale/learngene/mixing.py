"""Coefficients over relative depth -> layer weights: the weighted sum.

Layer l of L sits at relative depth t = l / (L - 1), and its weights are a sum over blocks, W[l, g] = sum_k a[g, k](t_l) * B[k, g] for each
matrix g of a block. The basis says what a is:

knots   learned values at R knots, piecewise linear between them; any depth evaluates in closed form (ours).
linear  fixed, {1, t}: W[l] = A + t B (TLEG, "Transformer as Linear Expansion of Learngene", Xia et al. 2024). Convention `inclusive`
        is t = l / (L - 1); `paper` is that paper's l / L.
step    fixed, stage-wise sharing: layer l is block floor(l K / L) (SWS, "Exploring Learngene via Stage-wise Weight Sharing for
        Initializing Variable-sized Models", Xia et al. 2024).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

BASES = ("knots", "linear", "step")
CONVENTIONS = ("inclusive", "paper")


def relative_depth(layer: int, num_layers: int, convention: str = "inclusive") -> float:
    """t = l / (L - 1) for l = 0 ... L - 1, one half where there is one layer only; under the convention `paper`, l / L."""
    assert 0 <= layer < num_layers
    if convention == "paper":
        return layer / num_layers
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


def fixed_weights(basis: str, num_layers: int, num_blocks: int, convention: str = "inclusive") -> list[list[float]]:
    """The coefficients [L][K] of the bases `linear` (K = 2) and `step`."""
    if basis == "linear":
        assert num_blocks == 2
        return [[1.0, relative_depth(layer, num_layers, convention)] for layer in range(num_layers)]
    assert basis == "step", basis
    stages = [layer * num_blocks // num_layers for layer in range(num_layers)]
    return [[float(block == stage) for block in range(num_blocks)] for stage in stages]


def interpolate(knots: Sequence[Tensor], num_layers: Sequence[int]) -> list[Tensor]:
    """Values at R knots, [R, ...] each, interpolated to as many layers as is said of each, [L, ...]; by one product for all."""
    num_knots, counts = knots[0].shape[0], tuple(dict.fromkeys(num_layers))
    rows = _kept_weights(counts, num_knots, knots[0].dtype, knots[0].device) @ torch.cat([x.flatten(1) for x in knots], dim=1)
    at_count = dict(zip(counts, rows.split(counts), strict=True))
    columns = {count: part.split([x[0].numel() for x in knots], dim=1) for count, part in at_count.items()}
    return [columns[count][i].unflatten(1, x.shape[1:]) for i, (x, count) in enumerate(zip(knots, num_layers, strict=True))]


@functools.lru_cache(maxsize=256)
def _kept_weights(counts: tuple[int, ...], num_knots: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[sum of counts, R]"""
    # Made outside of inference mode, in which a tensor could never again serve training.
    with torch.inference_mode(False):
        return torch.cat([knot_weights(count, num_knots) for count in counts]).to(device=device, dtype=dtype)


def fixed_sum(weights_LK: list[list[float]], values_K: Tensor) -> Tensor:
    """Values [K, ...] summed by fixed coefficients to [L, ...]: term by term, so that A + t B is rounded as the formula is."""
    layers = []
    for weights_K in weights_LK:
        terms = [values_K[k] if weight == 1.0 else weight * values_K[k] for k, weight in enumerate(weights_K) if weight]
        layers.append(sum(terms[1:], start=terms[0]))
    return torch.stack(layers)


def legendre(degree: int, x: float) -> float:
    """Legendre polynomial by Bonnet's recursion."""
    values = [1.0, x]
    for n in range(1, degree):
        values.append(((2 * n + 1) * x * values[n] - n * values[n - 1]) / (n + 1))
    return values[degree]
