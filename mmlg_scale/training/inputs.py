"""What a step computes on: one object from the loader to the towers, cut and moved as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """Some pairs of a batch.

    Attributes:
        image: [B, 3, H, W], normalised.
        text: token ids [B, T].
        patches: [B, P'] positions of the patches that stay (patch dropout); None: all stay.
        samples: [B, 2], each pair's place in the training split, (sample, caption), by which cached features are found.
    """

    image: Tensor
    text: Tensor
    patches: Tensor | None = None
    samples: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def to(self, device: torch.device) -> Inputs:
        """On `device`; copies from pinned memory do not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, size: int) -> list[Inputs]:
        """Consecutive parts of `size` pairs, the last one smaller where it does not divide."""
        return [self._rows(slice(start, start + size)) for start in range(0, len(self), size)]

    def _rows(self, rows: slice) -> Inputs:
        return self._map(lambda tensor: tensor[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        patches, samples = (None if tensor is None else change(tensor) for tensor in (self.patches, self.samples))
        return Inputs(change(self.image), change(self.text), patches, samples)
