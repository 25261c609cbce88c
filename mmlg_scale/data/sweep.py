"""Every sample of one split or several once, in their order, with all captions that a training stream may read."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmlg_scale.data.mixture import JoinedReader
from mmlg_scale.data.reader import DamagedSample
from mmlg_scale.towers import ModelSpec


class Samples(NamedTuple):
    """Some consecutive samples. A damaged one is a black image with no caption, and not `whole`."""

    image_uint8_NCHW: Tensor
    text_MT: Tensor
    """All captions of all of them."""
    num_captions_N: Tensor
    whole_N: Tensor


class Sweep(Dataset[Samples]):
    """Splits in items of `item_size` samples, as a training stream without augmentation reads them."""

    def __init__(self, reader: JoinedReader, spec: ModelSpec, item_size: int = 256) -> None:
        self.reader, self.tokenizer, self.preprocess = reader, spec.tokenizer, spec.preprocess
        self.image_size, self.context_length, self.item_size = spec.image_size, spec.context_length, item_size

    def __len__(self) -> int:
        return (len(self.reader) + self.item_size - 1) // self.item_size

    def __getitem__(self, item: int) -> Samples:
        first = item * self.item_size
        images, captions, counts, whole = [], list[str](), [], []
        for index in range(first, min(first + self.item_size, len(self.reader))):
            try:
                image = self.reader.image(index, self.image_size, preprocess=self.preprocess, draft=True)
                texts = self.reader.texts(index).captions
            except DamagedSample:
                image, texts = np.zeros((self.image_size, self.image_size, 3), np.uint8), []
            images.append(image)
            captions.extend(texts)
            counts.append(len(texts))
            whole.append(bool(texts))
        text_MT = self.tokenizer(captions, self.context_length) if captions else torch.zeros(0, self.context_length, dtype=torch.long)
        return Samples(
            torch.from_numpy(np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))),
            text_MT,
            torch.tensor(counts),
            torch.tensor(whole),
        )
