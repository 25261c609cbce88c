"""Where each number of a model's layers comes from in the flat blocks: the static part of block transfer, built once per size."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_BLOCKS, MAX_SOURCES = 8, 4
"""Of a plan that the Triton kernel runs in one launch."""
_plans: weakref.WeakValueDictionary[int, TransferPlan] = weakref.WeakValueDictionary()
_keys = itertools.count()


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

    @property
    def contiguous(self) -> bool:
        """Whether the numbers read follow one another."""
        rows_meet = self.rows == 1 or self.row_stride == self.columns
        return rows_meet and (self.groups == 1 or self.group_stride == self.rows * self.columns)

    @property
    def overlaps(self) -> bool:
        """Whether rows or rectangles may share numbers, to which gradients would have to be added twice."""
        rectangle = (self.rows - 1) * self.row_stride + self.columns
        return (self.rows > 1 and self.row_stride < self.columns) or (self.groups > 1 and self.group_stride < rectangle)

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

    Attributes:
        key: a number under which `find_plan` gives the plan, since torch's custom operators take tensors and numbers only.
        mixes: (K_A, K_B), blocks that every layer takes from its first and its second source; None where targets differ in it, what they
            mix is more than the Triton kernel can, or tensors of a layer may read the same numbers, to which its programs would add
            gradients at the same time.

    Raises:
        ValueError: slices that do not have their tensor's size, pass the end of their source, or read one of its numbers twice themselves.
    """

    def __init__(
        self, source_shapes: Sequence[tuple[int, int]], targets: Sequence[Target], device: torch.device | str | None = None
    ) -> None:
        self.source_shapes = tuple((int(k), int(p)) for k, p in source_shapes)
        self.targets = tuple(targets)
        self.device = torch.device(device or "cpu")
        self._check()
        self.key = next(_keys)
        _plans[self.key] = self
        self.kept: dict[str, Any] = {}  # what backends make of it
        self.mixes = self._mixes()
        self.out_size = sum(target.num_layers * sum(target.sizes) for target in self.targets)
        # Every matrix of a ViT block is a multiple of width^2: in pieces of the common divisor all T tensors are one batched product.
        self.pieces = tuple(math.gcd(*target.sizes) for target in self.targets)
        self.piece_tensors = tuple(
            torch.repeat_interleave(torch.arange(len(t.sizes)), torch.tensor(t.sizes) // piece).to(device)
            for t, piece in zip(self.targets, self.pieces, strict=True)
        )

    @functools.cached_property
    def indices(self) -> tuple[tuple[Tensor | None, ...], ...]:
        """[target][source]: the places read, or None where they are the whole source in order."""
        return tuple(
            tuple(_index(slices, self.source_shapes[source][1], self.device) for source, slices in zip(t.sources, t.slices, strict=True))
            for t in self.targets
        )

    @functools.cached_property
    def layer_plans(self) -> tuple[TransferPlan, ...]:
        """For each target the plan of a single layer of it, with only that target's sources."""
        plans = []
        for target in self.targets:
            alone = dataclasses.replace(target, num_layers=1, sources=tuple(range(len(target.sources))))
            plans.append(TransferPlan([self.source_shapes[source] for source in target.sources], [alone], self.device))
        return tuple(plans)

    def num_blocks(self, target: Target) -> int:
        """K: blocks that a layer of the target mixes."""
        return sum(self.source_shapes[source][0] for source in target.sources)

    def views(self, target_index: int, layers_LP: Tensor) -> list[dict[str, Tensor]]:
        """The flat layers of a target as named tensors, a mapping per layer; no copies."""
        target = self.targets[target_index]
        # All of them by one split, whose backward pass writes every gradient once, to its place.
        parts = iter(layers_LP.reshape(-1).split([*target.sizes] * len(layers_LP)))
        named = list(zip(target.names, target.shapes, strict=True))
        return [{name: next(parts).view(shape) for name, shape in named} for _ in range(len(layers_LP))]

    def used(self, target: Target) -> list[int]:
        """Places in the target's sources of those that have blocks."""
        return [i for i, source in enumerate(target.sources) if self.source_shapes[source][0]]

    def _mixes(self) -> tuple[int, int] | None:
        counts = {tuple(self.source_shapes[target.sources[i]][0] for i in self.used(target)) for target in self.targets}
        pair = counts.pop()
        if counts or len(self.source_shapes) > MAX_SOURCES or not 0 < len(pair) <= 2 or sum(pair) > MAX_BLOCKS:
            return None
        for target in self.targets:
            used = self.used(target)
            if len({target.sources[i] for i in used}) < len(used) or any(_meet(target.slices[i]) for i in used):
                return None
            for pieces in zip(*(target.slices[i] for i in used), strict=True):
                same_shape = len({(piece.groups, piece.rows, piece.columns) for piece in pieces}) == 1
                if not same_shape and not all(piece.contiguous for piece in pieces):
                    return None
        return pair[0], sum(pair[1:])

    def _check(self) -> None:
        for target in self.targets:
            if len(target.sources) != len(target.slices) or not target.sources:
                raise ValueError(f"{len(target.sources)} sources, {len(target.slices)} lists of slices")
            for source, slices in zip(target.sources, target.slices, strict=True):
                if tuple(piece.size for piece in slices) != target.sizes:
                    raise ValueError(f"source {source}: slices of {[p.size for p in slices]} numbers for tensors of {list(target.sizes)}")
                if any(piece.offset < 0 or piece.end > self.source_shapes[source][1] for piece in slices):
                    raise ValueError(f"source {source}: a slice passes its {self.source_shapes[source][1]} numbers")
                if any(piece.overlaps for piece in slices):
                    raise ValueError(f"source {source}: a slice reads a number twice")


def _meet(slices: Sequence[Slice]) -> bool:
    """Whether the ranges of two slices of a source overlap."""
    ranges = sorted((piece.offset, piece.end) for piece in slices)
    return any(start < end for (_, end), (start, _) in itertools.pairwise(ranges))


@functools.lru_cache(maxsize=64)
def _index(slices: tuple[Slice, ...], size: int, device: torch.device) -> Tensor | None:
    """The places read in a source of `size` numbers. Kept, since plans that differ only in depth share it."""
    index = torch.cat([piece.index() for piece in slices])
    if len(index) == size and torch.equal(index, torch.arange(size)):
        return None
    # Half the memory, where 32 bits suffice.
    return index.to(device=device, dtype=torch.int32 if size < 2**31 else torch.int64)


def find_plan(key: int) -> TransferPlan:
    """The plan of that key, which must be alive."""
    return _plans[key]
