"""Muon for weight matrices, AdamW for everything else, as one torch optimizer that DeepSpeed can shard.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest semi-orthogonal matrix, which it approximates with a Newton-Schulz
iteration. The update is scaled by 0.2 sqrt(max(m, n)) (Liu et al. 2025, "Muon is Scalable for LLM Training", equation 4), so that it has
the size of an AdamW update and the same learning rate and weight decay fit.

torch.optim.Muon takes parameters that are matrices. Ours may be flat: a learngene's [K, P] blocks hold many matrices each, and ZeRO
gives the optimizer one flat shard of a whole group. A group therefore says where its matrices lie.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTUM = 0.95
NUM_ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)
"""Jordan's coefficients: singular values in (0, 1] end between 0.7 and 1.2 after five iterations."""
Place = tuple[int, int, int]
"""A matrix in the concatenation of a group's flattened parameters: (offset, rows, columns)."""


def orthogonalise(matrices: Tensor, num_iterations: int = NUM_ITERATIONS) -> Tensor:
    """About U V^T of each matrix U S V^T in [..., M, N], by Newton-Schulz; bf16 on a GPU."""
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    for _ in range(num_iterations):
        gram = torch.bmm(x, x.mT)
        # Sums inside of the products: a X + (b G + c G G) X in two calls, and no matrices in between.
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.view(shape)
    return (x.mT if tall else x).to(matrices.dtype)


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but Muon for the groups with a non-empty list `matrices` of `Place`, which cover the group's parameters.

    Args:
        groups: torch optimizer groups.
        sharded: ZeRO stage 1 or 2, where a group's parameter is this rank's equal share of the flattened and padded group. Momentum stays
            sharded; updates are gathered, and each rank orthogonalises the matrices that reach into its share. Collective.
        more: AdamW's arguments.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, sharded: bool = False, **more: Any) -> None:
        self.sharded = sharded
        super().__init__([{"matrices": [], **group} for group in groups], **more)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["matrices"]]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["matrices"]:
                self._muon(group)

    def _muon(self, group: dict[str, Any]) -> None:
        parameters: list[Tensor] = group["params"]
        flat = torch.cat([self._direction(parameter).reshape(-1) for parameter in parameters])
        size, first = flat.numel(), 0
        if self.sharded and dist.get_world_size() > 1:
            parts = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, flat)
            flat, first = torch.cat(parts), dist.get_rank() * size
        update = _orthogonal_update(flat, group["matrices"], first, first + size)[first : first + size]
        for parameter, part in zip(parameters, update.split([parameter.numel() for parameter in parameters]), strict=True):
            self._replace(
                parameter, (parameter * (1 - group["lr"] * group["weight_decay"])).add_(part.view_as(parameter), alpha=-group["lr"])
            )

    def _direction(self, parameter: Tensor) -> Tensor:
        """The gradient after Nesterov momentum; zeros where a step does not use the parameter."""
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        state = self.state[parameter]
        if "momentum" not in state:
            state |= {"momentum": torch.zeros_like(parameter), "step": torch.zeros((), device=parameter.device)}
        self._replace(state["step"], state["step"] + 1)
        self._replace(state["momentum"], state["momentum"].lerp(gradient, 1 - MOMENTUM))
        return gradient.lerp(state["momentum"], MOMENTUM)

    def _replace(self, tensor: Tensor, value: Tensor) -> None:
        """Give `tensor` its next value, unless this step is skipped: decided on the device, as by AdamW's kernels, by `found_inf`."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        tensor.copy_(value if found_inf is None else torch.where(found_inf == 0, value, tensor))


def _orthogonal_update(flat: Tensor, places: Sequence[Place], first: int, last: int) -> Tensor:
    """Updates of the matrices that reach into [first, last) of `flat`; matrices of one shape are one batch."""
    update = torch.zeros_like(flat)
    by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
    for offset, rows, columns in places:
        if offset < last and offset + rows * columns > first:
            by_shape[rows, columns].append(offset)
    for (rows, columns), offsets in by_shape.items():
        batch = torch.stack([flat[offset : offset + rows * columns].view(rows, columns) for offset in offsets])
        found = orthogonalise(batch) * (0.2 * max(rows, columns) ** 0.5)
        for offset, matrix in zip(offsets, found, strict=True):
            update[offset : offset + rows * columns] = matrix.reshape(-1)
    return update


def places_of(name: str, shape: Sequence[int], offset: int = 0) -> list[Place]:
    """The matrices in a tensor of weights: queries, keys and values of an `in_proj` apart; a patch embedding is one row per channel."""
    rows, columns = shape[0], 1
    for side in shape[1:]:
        columns *= side
    parts = 3 if "in_proj" in name else 1
    return [(offset + part * (rows // parts) * columns, rows // parts, columns) for part in range(parts)]
