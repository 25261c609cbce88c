"""What a step computes on: one object from the loader to the towers, cut and moved as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmlg_scale import towers
from mmlg_scale.data.pipeline import Batch


@dataclass(frozen=True)
class Inputs:
    """Some pairs of a batch.

    Attributes:
        image: [B, 3, H, W], normalised.
        text: token ids [B, T]; T is the context length, or that of the longest caption.
        patches: [B, P'] positions of the patches that stay (patch dropout); None: all stay.
        samples: [B, 2], each pair's place in the training split, (sample, caption), by which cached features are found; on the CPU.
    """

    image: Tensor
    text: Tensor
    patches: Tensor | None = None
    samples: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def to(self, device: torch.device) -> Inputs:
        """On `device`; copies from pinned memory do not wait."""
        return replace(self._map(lambda tensor: tensor.to(device, non_blocking=True)), samples=self.samples)

    def split(self, size: int) -> list[Inputs]:
        """Consecutive parts of `size` pairs, the last one smaller where it does not divide."""
        return [self._rows(slice(start, start + size)) for start in range(0, len(self), size)]

    def _rows(self, rows: slice) -> Inputs:
        return self._map(lambda tensor: tensor[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        patches, samples = (None if tensor is None else change(tensor) for tensor in (self.patches, self.samples))
        return Inputs(change(self.image), change(self.text), patches, samples)


def text_length(batch: Batch, *, cut: bool) -> int:
    """Tokens of each caption that are computed, see `towers.cut_length`: known on the host, so that the device is not waited for."""
    return towers.cut_length(batch.text_BT) if cut else batch.text_BT.shape[1]


def inputs_of(batch: Batch, preprocess: Callable[[Tensor], Tensor], device: torch.device, *, cut: bool) -> Inputs:
    """A rank's batch on its device: images preprocessed, captions cut where `cut` says so, all of them to one length."""
    length = text_length(batch, cut=cut)
    inputs = Inputs(batch.image_uint8_BCHW, batch.text_BT, samples=batch.samples_B2).to(device)
    # Cut on the device: a part of a pinned tensor would be copied before it is moved.
    return replace(inputs, image=preprocess(inputs.image), text=inputs.text[:, :length])
