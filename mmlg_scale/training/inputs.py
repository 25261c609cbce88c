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
    """Some images of a batch, each with k captions.

    Attributes:
        image: [B, 3, H, W], normalised.
        text: token ids [B k, T], those of an image one after the other; T is the context length, or that of the longest caption.
        patches: [B, P'] positions of the patches that stay (patch dropout); None: all stay.
        samples: [B, 1 + k], each image's place in the training split and its captions', by which cached features are found; on the CPU.
        lengths: int64 [B k], each caption's tokens up to its end token; on the CPU.
        packed: whether captions are packed; they need their lengths.
        places: int64 [B], each image's place in the order, or in the pool, by which a pool's outputs are found; on the CPU.
    """

    image: Tensor
    text: Tensor
    patches: Tensor | None = None
    samples: Tensor | None = None
    lengths: Tensor | None = None
    packed: bool = False
    places: Tensor | None = None

    @functools.cached_property
    def packing(self) -> towers.Packing | None:
        """Where the captions' tokens lie when they are packed."""
        if not self.packed:
            return None
        assert self.lengths is not None
        return towers.Packing.of(self.lengths, self.text.shape[1], self.text.device)

    def __len__(self) -> int:
        return len(self.image)

    @property
    def captions_per_image(self) -> int:
        """k."""
        return len(self.text) // len(self)

    def to(self, device: torch.device) -> Inputs:
        """On `device`; copies from pinned memory do not wait."""
        image, text, patches = (
            None if tensor is None else tensor.to(device, non_blocking=True) for tensor in (self.image, self.text, self.patches)
        )
        assert image is not None
        assert text is not None
        return replace(self, image=image, text=text, patches=patches)

    def split(self, size: int) -> list[Inputs]:
        """Consecutive parts of `size` images, the last one smaller where it does not divide."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self), size)]

    def rows(self, rows: slice | Tensor) -> Inputs:
        """Some of the images, with their captions."""
        captions = self.captions_per_image

        def of_image(tensor: Tensor) -> Tensor:
            return tensor[rows]

        def of_text(tensor: Tensor) -> Tensor:
            return tensor[rows] if captions == 1 else tensor.unflatten(0, (len(self), captions))[rows].flatten(0, 1)

        return Inputs(
            of_image(self.image),
            of_text(self.text),
            patches=None if self.patches is None else of_image(self.patches),
            samples=None if self.samples is None else of_image(self.samples),
            lengths=None if self.lengths is None else of_text(self.lengths),
            packed=self.packed,
            places=None if self.places is None else of_image(self.places),
        )


def text_length(batch: Batch, text: TextMode) -> int | tuple[int, ...]:
    """Tokens of every caption that are computed, or of each where they are packed: known on the host, so that no device is waited for."""
    if text == "packed":
        return tuple(towers.lengths_of(batch.text_NT).tolist())
    return towers.cut_length(batch.text_NT) if text == "cut" else batch.text_NT.shape[1]


def inputs_of(batch: Batch, preprocess: Callable[[Tensor], Tensor], device: torch.device, *, text: TextMode) -> Inputs:
    """A rank's batch on its device: images preprocessed, captions cut to one length, or packed, where `text` says so (`runtime.text`)."""
    length = batch.text_NT.shape[1] if text == "full" else towers.cut_length(batch.text_NT)
    known = {"samples": batch.samples_BS, "lengths": towers.lengths_of(batch.text_NT), "places": batch.places_B}
    inputs = Inputs(batch.image_uint8_BCHW, batch.text_NT, packed=text == "packed", **known).to(device)
    # Cut on the device: a part of a pinned tensor would be copied before it is moved.
    return replace(inputs, image=preprocess(inputs.image), text=inputs.text[:, :length])
