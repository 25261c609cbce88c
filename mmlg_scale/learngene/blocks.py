"""What one transformer block is as named tensors, and its flat layout.

The matrices of a block (queries-keys-values, attention output, both MLP matrices) lie in one flat vector of P numbers, and its vectors
(LayerNorm weights and biases, linear biases) in another of V. ZeRO, checkpoints, the file format and block transfer all rest on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def narrow(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The leading part of a tensor [..., *full] that a tower of smaller width takes: [..., *shape].

    Leading residual channels, leading MLP rows, and the leading heads of each of queries, keys and values, which lie one after the other in
    `in_proj`. Only so is the result a plain open_clip block.
    """
    lead = tensor.ndim - len(shape)
    if tuple(tensor.shape[lead:]) == shape:
        return tensor
    for axis, count in enumerate(shape[1:], start=lead + 1):
        tensor = tensor.narrow(axis, 0, count)
    if "in_proj_" not in name:
        return tensor.narrow(lead, 0, shape[0])
    return tensor.unflatten(lead, (3, -1)).narrow(lead + 1, 0, shape[0] // 3).flatten(lead, lead + 1)


@dataclass(frozen=True)
class Entry:
    """Where a named tensor lies in its flat vector."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Count of numbers."""
        return math.prod(self.shape)

    def view(self, flat: Tensor) -> Tensor:
        """The tensor inside `flat` [..., P], with the leading dimensions kept; no copy."""
        return flat[..., self.offset : self.offset + self.size].unflatten(-1, self.shape)


def _entries(tensors: Mapping[str, tuple[int, ...]]) -> tuple[Entry, ...]:
    entries, offset = [], 0
    for name, shape in tensors.items():
        entries.append(Entry(name, shape, offset))
        offset += math.prod(shape)
    return tuple(entries)


@dataclass(frozen=True)
class BlockLayout:
    """Names, shapes and offsets of a block's tensors."""

    matrices: tuple[Entry, ...]
    vectors: tuple[Entry, ...]

    @classmethod
    def of(cls, block: nn.Module) -> BlockLayout:
        """The layout of a block by its named parameters (which may lie on the meta device)."""
        shapes = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
        return cls(
            matrices=_entries({name: shape for name, shape in shapes.items() if len(shape) >= 2}),
            vectors=_entries({name: shape for name, shape in shapes.items() if len(shape) < 2}),
        )

    @property
    def matrix_size(self) -> int:
        """P: numbers in the flat vector of matrices."""
        return sum(entry.size for entry in self.matrices)

    @property
    def vector_size(self) -> int:
        """V: numbers in the flat vector of vectors."""
        return sum(entry.size for entry in self.vectors)

    def flatten(self, block: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A block's named tensors as flat vectors ([P], [V]); copies."""
        return (
            torch.cat([block[entry.name].reshape(-1) for entry in self.matrices]),
            torch.cat([block[entry.name].reshape(-1) for entry in self.vectors]),
        )

    def views(self, matrices_P: Tensor, vectors_V: Tensor) -> dict[str, Tensor]:
        """Flat vectors as a block's named tensors; no copies."""
        return {entry.name: entry.view(matrices_P) for entry in self.matrices} | {
            entry.name: entry.view(vectors_V) for entry in self.vectors
        }

    def to_header(self) -> dict[str, Any]:
        """The layout as JSON: {"matrices": [[name, shape], ...], "vectors": [...]}."""
        return {key: [[e.name, list(e.shape)] for e in getattr(self, key)] for key in ("matrices", "vectors")}
