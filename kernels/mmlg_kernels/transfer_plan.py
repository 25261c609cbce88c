"""Where each number of a model's layers comes from in the flat blocks: the static part of block transfer, built once per size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """The part of a flat block [P] that a tensor reads: a rectangle, repeated at a fixed distance.

    Attributes:
        offset: where the first number lies.
        groups: how many rectangles (3 for queries, keys and values, else 1).
        group_stride: numbers from one rectangle to the next.
        rows, columns: of one rectangle.
        row_stride: numbers from one row to the next.
    """

    offset: int
    groups: int
    group_stride: int
    rows: int
    columns: int
    row_stride: int

    @classmethod
    def leading(cls, offset: int, full: tuple[int, int], part: tuple[int, int], groups: int = 1) -> Slice:
        """The leading rows of each of `groups` equal groups of rows, and the leading columns, of a matrix `full` that lies at `offset`.

        Raises:
            ValueError: `part` is no such part of `full`.
        """
        if any(n > most for n, most in zip(part, full, strict=True)) or full[0] % groups or part[0] % groups:
            raise ValueError(f"{list(part)} is no leading part of {list(full)} in {groups} groups of rows")
        return cls(offset, groups, full[0] // groups * full[1], part[0] // groups, part[1], full[1])

    @property
    def size(self) -> int:
        """Count of numbers."""
        return self.groups * self.rows * self.columns

    @property
    def end(self) -> int:
        """One past the last number read."""
        return self.offset + (self.groups - 1) * self.group_stride + (self.rows - 1) * self.row_stride + self.columns

    def index(self) -> Tensor:
        """[size], int64: the places of the numbers read, in the tensor's order."""
        groups, rows, columns = (torch.arange(n) for n in (self.groups, self.rows, self.columns))
        grid = groups[:, None, None] * self.group_stride + rows[:, None] * self.row_stride + columns
        return self.offset + grid.flatten()


@dataclass(frozen=True)
class Target:
    """The layers of one tower.

    Attributes:
        num_layers: L.
        names, shapes: of the T tensors of a layer, in the order in which they lie in its flat vector [P].
        sources: which source tensors the layer mixes, in the order of its coefficients.
        slices: [source][tensor], what each tensor reads in each of those sources.
    """

    num_layers: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sources: tuple[int, ...]
    slices: tuple[tuple[Slice, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Counts of numbers of the T tensors."""
        return tuple(math.prod(shape) for shape in self.shapes)


class TransferPlan:
    """Static facts for `block_transfer`: built once per size and device.

    Args:
        source_shapes: [K, P] of each source; the blocks that towers share and those of their own stay separate tensors, since putting
            them together would copy them.
        targets: one per tower.
        device: of the index tensors.

    Raises:
        ValueError: slices that do not have their tensor's size or pass the end of their source.
    """

    def __init__(
        self, source_shapes: Sequence[tuple[int, int]], targets: Sequence[Target], device: torch.device | str | None = None
    ) -> None:
        self.source_shapes = tuple((int(k), int(p)) for k, p in source_shapes)
        self.targets = tuple(targets)
        self._check()
        # Every matrix of a ViT block is a multiple of width^2: in pieces of the common divisor all T tensors are one batched product.
        self.pieces = tuple(math.gcd(*target.sizes) for target in self.targets)
        self.piece_tensors = tuple(
            torch.repeat_interleave(torch.arange(len(t.sizes)), torch.tensor(t.sizes) // piece).to(device)
            for t, piece in zip(self.targets, self.pieces, strict=True)
        )
        self.indices = tuple(tuple(self._index(t, i, device) for i in range(len(t.sources))) for t in self.targets)

    def num_blocks(self, target: Target) -> int:
        """K: blocks that a layer of the target mixes."""
        return sum(self.source_shapes[source][0] for source in target.sources)

    def views(self, target_index: int, layers_LP: Tensor) -> list[dict[str, Tensor]]:
        """The flat layers of a target as named tensors, a mapping per layer; no copies."""
        target = self.targets[target_index]
        layers: list[dict[str, Tensor]] = [{} for _ in range(layers_LP.shape[0])]
        for name, shape, values_L in zip(target.names, target.shapes, layers_LP.split(target.sizes, dim=1), strict=True):
            for layer, tensor in zip(layers, values_L.unbind(0), strict=True):
                layer[name] = tensor.view(shape)
        return layers

    def _index(self, target: Target, part: int, device: torch.device | str | None) -> Tensor | None:
        """The places read in a source, or None where they are the whole source in order."""
        index = torch.cat([piece.index() for piece in target.slices[part]])
        size = self.source_shapes[target.sources[part]][1]
        if len(index) == size and torch.equal(index, torch.arange(size)):
            return None
        # Half the memory, where 32 bits suffice.
        return index.to(device=device, dtype=torch.int32 if size < 2**31 else torch.int64)

    def _check(self) -> None:
        for target in self.targets:
            if len(target.sources) != len(target.slices) or not target.sources:
                raise ValueError(f"{len(target.sources)} sources, {len(target.slices)} lists of slices")
            for source, slices in zip(target.sources, target.slices, strict=True):
                if tuple(piece.size for piece in slices) != target.sizes:
                    raise ValueError(f"source {source}: slices of {[p.size for p in slices]} numbers for tensors of {list(target.sizes)}")
                if any(piece.offset < 0 or piece.end > self.source_shapes[source][1] for piece in slices):
                    raise ValueError(f"source {source}: a slice passes its {self.source_shapes[source][1]} numbers")
