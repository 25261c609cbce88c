"""A start from the ancestor: its layers relabelled so that they resemble each other, and blocks and coefficients fitted to them.

A layer computes the same whatever the order of its MLP units and heads, and whatever orthogonal basis a head's queries and keys (or values
and outputs) share. Two layers can only be summed with sense where these agree, so each layer is brought into the order and bases in which
it is nearest to the mean of all (matching of units: Ainsworth et al. 2023, "Git Re-Basin", here between layers of one model). Blocks
and coefficients then follow by alternating least squares. The residual stream is untouched, and so are the stems.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmlg_scale import towers
from mmlg_scale.learngene.blocks import narrow
from mmlg_scale.learngene.mixing import fixed_weights, legendre
from mmlg_scale.learngene.structure import TOWERS, Structure

Layer = dict[str, Tensor]
NUM_ROUNDS, NUM_ITERATIONS = 4, 30
RIDGE = 1e-2
"""Of the mean squared column, where coefficients are not determined: see `_Fit`."""
MAX_THREADS = 8
"""Layers aligned at the same time; each takes the memory of a few square matrices as wide as the MLP."""
PATIENCE = 5.0
"""Seconds after which the user is told."""


def inherit(structure: Structure, ancestor_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The learngene's tensors outside its stems, fitted to the ancestor's layers, by the learngene's names. Deterministic.

    Where the towers' widths differ, each is aligned for itself, and the narrower one is fitted by the leading part of the multimodal blocks
    (learned maps start as that slice). What takes longer than some seconds says on stderr how far it is.
    """
    started = time.monotonic()
    layers = {tower: [_copy(layer) for layer in blocks] for tower, blocks in towers.split_state(ancestor_state)[1].items()}
    heads = {tower: towers.width(structure.config, tower) // towers.head_dim(structure.config, tower) for tower in TOWERS}
    for tower in TOWERS:
        align(layers[tower], heads[tower], f"the {tower} tower's layers", started)
    if structure.num_multimodal and structure.layout("image") == structure.layout("text") and heads["image"] == heads["text"]:
        align([*layers["image"], *layers["text"]], heads["image"], "the layers of both towers", started)
    found = {name: tensor.float() for name, tensor in fit(structure, layers).items()}
    _tell("fitted the blocks to the ancestor's layers", started)
    return found


def _tell(what: str, started: float) -> None:
    seconds = time.monotonic() - started
    if seconds > PATIENCE:
        print(f"{what}, {seconds:.0f} s", file=sys.stderr, flush=True)


def fit(structure: Structure, layers: Mapping[str, Sequence[Layer]]) -> dict[str, Tensor]:
    """Blocks, coefficients and vectors in fp64 for aligned layers in fp64."""
    return _fit_knots(structure, layers) if structure.basis == "knots" else _fit_fixed(structure, layers)


def _copy(layer: Mapping[str, Tensor]) -> Layer:
    return {name: tensor.detach().cpu().double() for name, tensor in layer.items()}


def align(layers: Sequence[Layer], num_heads: int, what: str = "the layers", started: float | None = None) -> None:
    """Relabel each layer in place to be nearest to the mean of all: first to the middle one, then to the mean, four times in all.

    Once no MLP unit has changed its place, the mean of the MLPs does not change either, and they are left as they are.
    """
    started = time.monotonic() if started is None else started
    middle = len(layers) // 2
    reference, settled = layers[middle], False
    with ThreadPoolExecutor(min(MAX_THREADS, len(layers), os.cpu_count() or 1)) as pool:  # torch and scipy let other threads run
        for index in range(NUM_ROUNDS):
            if not settled:
                unmoved = list(pool.map(functools.partial(_align_mlp, reference=reference), layers))
                settled = all(unmoved) and index > 0  # the first reference is no mean
            turn = functools.partial(_align_heads, reference=reference, num_heads=num_heads)
            # Turning the middle layer to itself rounds it: others must not read it at the same time.
            for part in (layers[:middle], layers[middle : middle + 1], layers[middle + 1 :]) if index == 0 else (layers,):
                list(pool.map(turn, part))
            reference = {name: torch.stack([layer[name] for layer in layers]).mean(0) for name in layers[0]}
            _tell(f"aligning {what} of the ancestor, round {index + 1} of {NUM_ROUNDS}", started)


def _matched(similarity: Tensor) -> Tensor:
    """For each row the column that belongs to it, so that the sum of similarities is largest (the Hungarian method)."""
    from scipy.optimize import linear_sum_assignment  # half a second, which only this start needs

    return torch.from_numpy(np.asarray(linear_sum_assignment(similarity.numpy(), maximize=True)[1]))


def _align_mlp(layer: Layer, reference: Layer) -> bool:
    """Whether every unit already had its place."""
    into, out = "mlp.c_fc.weight", "mlp.c_proj.weight"
    # fp32 is enough to find the order, in half the time.
    similarity = reference[into].float() @ layer[into].float().T + reference[out].float().T @ layer[out].float()
    order = _matched(similarity)
    layer[into], layer["mlp.c_fc.bias"], layer[out] = layer[into][order], layer["mlp.c_fc.bias"][order], layer[out][:, order]
    return bool(torch.equal(order, torch.arange(len(order))))


@dataclass
class _Heads:
    """Attention by heads: q, k, v [H, d/H, d], o [H, d, d/H], and biases [H, d/H]."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor
    k_bias: Tensor
    v_bias: Tensor

    @classmethod
    def of(cls, layer: Layer, num_heads: int) -> _Heads:
        q, k, v = layer["attn.in_proj_weight"].unflatten(0, (3, num_heads, -1)).unbind(0)
        biases = layer["attn.in_proj_bias"].unflatten(0, (3, num_heads, -1)).unbind(0)
        return cls(q, k, v, layer["attn.out_proj.weight"].unflatten(1, (num_heads, -1)).transpose(0, 1), *biases)

    def store(self, layer: Layer) -> None:
        layer["attn.in_proj_weight"] = torch.stack([self.q, self.k, self.v]).flatten(0, 2)
        layer["attn.in_proj_bias"] = torch.stack([self.q_bias, self.k_bias, self.v_bias]).flatten()
        layer["attn.out_proj.weight"] = self.o.transpose(0, 1).flatten(1)


def _align_heads(layer: Layer, reference: Layer, num_heads: int) -> None:
    """Heads in the order in which their q^T k and o v resemble the reference's, then each turned towards its partner (Procrustes)."""
    own, other = _Heads.of(layer, num_heads), _Heads.of(reference, num_heads)
    order = _matched(_cosines(other.q, other.k, own.q, own.k) + _cosines(other.o.mT, other.v, own.o.mT, own.v))
    q, k, v, o, q_bias, k_bias, v_bias = (x[order] for x in vars(own).values())
    turn = _rotation(torch.cat([q, k], -1), torch.cat([other.q, other.k], -1))
    spin = _rotation(torch.cat([v, o.mT], -1), torch.cat([other.v, other.o.mT], -1))
    biases = (turn @ q_bias[..., None], turn @ k_bias[..., None], spin @ v_bias[..., None])
    _Heads(turn @ q, turn @ k, spin @ v, o @ spin.mT, *(bias[..., 0] for bias in biases)).store(layer)


def _cosines(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Cosines [H, H] between the products a_i^T b_i and c_j^T d_j, [d, d] each, without forming them: their inner product is that
    of (a_i c_j^T) and (b_i d_j^T), matrices of a head's size. In fp32, since they only order heads."""
    a, b, c, d = (x.float() for x in (a, b, c, d))
    products = (torch.einsum("ixd,jyd->ijxy", a, c) * torch.einsum("ixd,jyd->ijxy", b, d)).sum((-2, -1))
    norms = [((x @ x.mT) * (y @ y.mT)).sum((-2, -1)).clamp_min(1e-30).sqrt() for x, y in ((a, b), (c, d))]
    return products / (norms[0][:, None] * norms[1])


def _rotation(given: Tensor, wanted: Tensor) -> Tensor:
    """The orthogonal matrices A [H, n, n] for which A given is nearest to wanted (rows: [H, n, m])."""
    left, _, right = torch.linalg.svd(wanted @ given.mT)
    return left @ right


def _flat(structure: Structure, layers: Mapping[str, Sequence[Layer]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Per tower the layers' matrices [L, P] and vectors [L, V]."""
    found = {}
    for tower in TOWERS:
        parts = [structure.layout(tower).flatten(layer) for layer in layers[tower]]
        found[tower] = (torch.stack([matrices for matrices, _ in parts]), torch.stack([vectors for _, vectors in parts]))
    return found


def _fit_fixed(structure: Structure, layers: Mapping[str, Sequence[Layer]]) -> dict[str, Tensor]:
    """The bases `linear` and `step`: blocks and vectors by least squares, a tower for itself; shared blocks take the towers' mean."""
    tensors: dict[str, Tensor] = {}
    shared = []
    for tower, (matrices_LP, vectors_LV) in _flat(structure, layers).items():
        rows = fixed_weights(structure.basis, len(matrices_LP), structure.num_blocks, structure.convention)
        inverse_KL = torch.linalg.pinv(torch.tensor(rows, dtype=torch.float64))
        blocks_KP = inverse_KL @ matrices_LP
        tensors[f"vectors_{tower}"] = inverse_KL @ vectors_LV
        tensors[f"unimodal_{tower}"] = blocks_KP[structure.num_multimodal :]
        shared.append((tower, blocks_KP[: structure.num_multimodal]))
    same = structure.layout("image") == structure.layout("text")
    tensors["multimodal"] = torch.stack([blocks for _, blocks in shared]).mean(0) if same else dict(shared)[structure.wide]
    return tensors


def _at_knots(values_L: Tensor, num_knots: int) -> Tensor:
    """Values at layers [L, ...] interpolated to knots [R, ...] over the same relative depths."""
    positions = torch.linspace(0, len(values_L) - 1, num_knots, dtype=torch.float64)
    lower = positions.long().clamp(max=max(0, len(values_L) - 2))
    upper = (lower + 1).clamp(max=len(values_L) - 1)
    share = (positions - lower).reshape(-1, *[1] * (values_L.ndim - 1))
    return (1 - share) * values_L[lower] + share * values_L[upper]


def _fit_knots(structure: Structure, layers: Mapping[str, Sequence[Layer]]) -> dict[str, Tensor]:
    """Learned coefficients: blocks of both towers together, matrix by matrix; the coefficients of each layer are read off at the knots."""
    flat = _flat(structure, layers)
    wide, num_knots = structure.wide, structure.num_knots
    narrower = next(tower for tower in TOWERS if tower != wide)
    tensors = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in structure.block_shapes().items() if "_map_" not in name}
    for tower in TOWERS:
        tensors[f"vectors_{tower}"] = _at_knots(flat[tower][1], num_knots)
    depths = {tower: len(layers[tower]) for tower in TOWERS}
    for index, (entry, own) in enumerate(zip(structure.layout(wide).matrices, structure.layout(narrower).matrices, strict=True)):
        values = {wide: entry.view(flat[wide][0]).flatten(1), narrower: own.view(flat[narrower][0]).flatten(1)}
        places = narrow(entry.name, torch.arange(entry.size).view(entry.shape), own.shape).flatten()
        fitted = _Fit(structure, wide, narrower, depths, values, places)
        fitted.solve()
        blocks = fitted.blocks()
        entry.view(tensors["multimodal"]).copy_(blocks["multimodal"].view(-1, *entry.shape))
        for tower, its in ((wide, entry), (narrower, own)):
            its.view(tensors[f"unimodal_{tower}"]).copy_(blocks[tower].view(-1, *its.shape))
            tensors[f"coefficients_{tower}"][:, index] = _at_knots(fitted.coefficients(tower), num_knots)
    return tensors


class _Fit:
    """One matrix of a block: layers [L, p] of both towers as coefficients times blocks, by alternating least squares.

    The numbers of the wider tower that the narrower one has too (`places`) are fitted to both towers' layers, the rest to the wider's.
    Only Gram matrices of the layers enter the iteration, so that its cost does not grow with the model's width.

    Beside blocks of one tower, the coefficients of shared blocks beyond the first are not determined: any combination of the towers' own
    may be added to them, and be taken off again by the towers' own blocks. Least squares then ends in large terms that cancel (with four
    blocks of each kind 150 where 1 is usual, with eight shared ones 10^5), and training out of them diverges. A ridge (Hoerl & Kennard
    1970) takes the smallest coefficients and blocks, at the same distance from the layers.
    """

    def __init__(
        self, structure: Structure, wide: str, narrower: str, depths: Mapping[str, int], values: Mapping[str, Tensor], places: Tensor
    ) -> None:
        num_m, num_u = structure.num_multimodal, structure.num_unimodal
        self.num_m, self.num_u, self.wide, self.narrower = num_m, num_u, wide, narrower
        self.ridge = RIDGE if num_m > 1 and num_u else 0.0
        self.rows = {wide: slice(0, depths[wide]), narrower: slice(depths[wide], depths[wide] + depths[narrower])}
        self.columns = {
            tower: [*range(num_m), *range(num_m + place * num_u, num_m + (place + 1) * num_u)]
            for place, tower in enumerate((wide, narrower))
        }
        rest = torch.ones(values[wide].shape[1], dtype=torch.bool)
        rest[places] = False
        self.places, self.rest, self.values = places, rest, values
        both = torch.cat([values[wide][:, places], values[narrower]])
        alone = values[wide][:, rest]
        # Each region: the layers that it is in, the blocks that it is made of, and its numbers.
        self.regions = [(slice(None), list(range(num_m + 2 * num_u)), both)]
        if alone.shape[1]:
            self.regions.append((self.rows[wide], self.columns[wide], alone))
        self.grams = [values @ values.T for _, _, values in self.regions]
        self.weights = self._centred()

    def _centred(self) -> Tensor:
        """The start: Legendre polynomials of depth, as for random blocks."""
        weights = torch.zeros(sum(r.stop - r.start for r in self.rows.values()), self.num_m + 2 * self.num_u, dtype=torch.float64)
        for tower, rows in self.rows.items():
            for row in range(rows.start, rows.stop):
                x = 2 * (row - rows.start) / max(1, rows.stop - rows.start - 1) - 1
                for place, column in enumerate(self.columns[tower]):
                    degree = place if place < self.num_m else place - self.num_m + (1 if self.num_m else 0)
                    weights[row, column] = legendre(degree, x)
        return weights

    def _inverse(self, region: int) -> Tensor:
        rows, columns, _ = self.regions[region]
        weights = self.weights[rows][:, columns]
        return self._gram_inverse(weights.T @ weights) @ weights.T if self.ridge else torch.linalg.pinv(weights)

    def _gram_inverse(self, gram: Tensor) -> Tensor:
        if not self.ridge:
            return torch.linalg.pinv(gram, hermitian=True)
        return torch.linalg.inv(gram + self.ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype))

    def solve(self) -> None:
        """Alternate; then scale each block to the layers' mean norm, so that coefficients are near 1."""
        size = self.weights.shape[1]
        for _ in range(NUM_ITERATIONS):
            of_blocks, with_layers = [], []
            for region, (rows, columns, _) in enumerate(self.regions):
                inverse, gram = self._inverse(region), self.grams[region]
                of_blocks.append(torch.zeros(size, size, dtype=torch.float64))
                of_blocks[-1][np.ix_(columns, columns)] = inverse @ gram @ inverse.T
                with_layers.append(torch.zeros_like(self.weights))
                with_layers[-1][rows] = with_layers[-1][rows].index_copy(1, torch.tensor(columns), gram @ inverse.T)
            for tower, rows in self.rows.items():
                # The narrower tower's layers have no part in the second region.
                count = len(self.regions) if tower == self.wide else 1
                columns = self.columns[tower]
                left = sum(of_blocks[:count])[np.ix_(columns, columns)]  # type: ignore[index]
                right = sum(with_layers[:count])[rows][:, columns]  # type: ignore[index]
                self.weights[rows] = self.weights[rows].index_copy(1, torch.tensor(columns), right @ self._gram_inverse(left))
        norm = torch.cat([values.norm(dim=1) for values in self.values.values()]).mean()
        blocks = self.blocks()
        scales = torch.cat([blocks[name].norm(dim=1) for name in ("multimodal", self.wide, self.narrower)]) / norm
        self.weights *= torch.where(scales > 0, scales, 1.0)

    def blocks(self) -> dict[str, Tensor]:
        """The least-squares blocks for the present coefficients: multimodal [K_M, p], and per tower [K_U, p]."""
        num_m, num_u = self.num_m, self.num_u
        inner = self._inverse(0) @ self.regions[0][2]
        found = {"multimodal": torch.zeros(num_m, len(self.rest), dtype=torch.float64)}
        found[self.wide] = torch.zeros(num_u, len(self.rest), dtype=torch.float64)
        found["multimodal"][:, self.places] = inner[:num_m]
        found[self.wide][:, self.places] = inner[num_m : num_m + num_u]
        found[self.narrower] = inner[num_m + num_u :]
        if len(self.regions) > 1:
            outer = self._inverse(1) @ self.regions[1][2]
            found["multimodal"][:, self.rest] = outer[:num_m]
            found[self.wide][:, self.rest] = outer[num_m:]
        return found

    def coefficients(self, tower: str) -> Tensor:
        """[L, K_M + K_U]."""
        return self.weights[self.rows[tower]][:, self.columns[tower]]
