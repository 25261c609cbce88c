"""What a step computes on: one object from the loader to the towers, cut and moved as one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmlg_scale import towers
from mmlg_scale.data.pipeline import Batch
from mmlg_scale.runtime import TextMode


@dataclass(frozen=True)
class Inputs:
    """Some pairs of a batch.

    Attributes:
        image: [B, 3, H, W], normalised.
        text: token ids [B, T]; T is the context length, or that of the longest caption.
        lengths: int64 [B], each caption's tokens up to its end token, where captions are packed; on the CPU.
        patches: [B, P'] positions of the patches that stay (patch dropout); None: all stay.
        samples: [B, 2], each pair's place in the training split, (sample, caption), by which cached features are found; on the CPU.
        places: int64 [B], each pair's place in the order, or in the pool, by which a pool's outputs are found; on the CPU.
    """

    image: Tensor
    text: Tensor
    patches: Tensor | None = None
    samples: Tensor | None = None
    lengths: Tensor | None = None
    places: Tensor | None = None

    @functools.cached_property
    def packing(self) -> towers.Packing | None:
        """Where the captions' tokens lie when they are packed."""
        return None if self.lengths is None else towers.Packing.of(self.lengths, self.text.shape[1], self.text.device)

    def __len__(self) -> int:
        return len(self.text)

    def to(self, device: torch.device) -> Inputs:
        """On `device`; copies from pinned memory do not wait."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, samples=self.samples, lengths=self.lengths, places=self.places)

    def split(self, size: int) -> list[Inputs]:
        """Consecutive parts of `size` pairs, the last one smaller where it does not divide."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self), size)]

    def rows(self, rows: slice | Tensor) -> Inputs:
        """Some of the pairs."""
        return self._map(lambda tensor: tensor[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        rest = (self.patches, self.samples, self.lengths, self.places)
        return Inputs(change(self.image), change(self.text), *(None if tensor is None else change(tensor) for tensor in rest))


def text_length(batch: Batch, text: TextMode) -> int | tuple[int, ...]:
    """Tokens of every caption that are computed, or of each where they are packed: known on the host, so that no device is waited for."""
    if text == "packed":
        return tuple(towers.lengths_of(batch.text_BT).tolist())
    return towers.cut_length(batch.text_BT) if text == "cut" else batch.text_BT.shape[1]


def inputs_of(batch: Batch, preprocess: Callable[[Tensor], Tensor], device: torch.device, *, text: TextMode) -> Inputs:
    """A rank's batch on its device: images preprocessed, captions cut to one length, or packed, where `text` says so (`runtime.text`)."""
    length = batch.text_BT.shape[1] if text == "full" else towers.cut_length(batch.text_BT)
    lengths = towers.lengths_of(batch.text_BT) if text == "packed" else None
    inputs = Inputs(batch.image_uint8_BCHW, batch.text_BT, samples=batch.samples_B2, lengths=lengths, places=batch.places_B).to(device)
    # Cut on the device: a part of a pinned tensor would be copied before it is moved.
    return replace(inputs, image=preprocess(inputs.image), text=inputs.text[:, :length])
