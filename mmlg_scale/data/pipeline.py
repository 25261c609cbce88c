"""Shards -> batches, at an exact position.

The global order is a function of (seed, epoch, position) alone: global step s takes positions s * G ... (s + 1) * G - 1 of the endless
concatenation of shuffled epochs, and each rank takes its slice. So a run resumes at the exact sample, at any world size that divides the
batch and with any number of workers, and every rank has the same amount of work.

The shuffle is by blocks: shards are shuffled, then samples inside a window of consecutive shards, so that reading stays near-sequential.
"""

from __future__ import annotations

import functools
import io
import json
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mmlg_scale.data.manifest import Location, locations
from mmlg_scale.data.tokens import Tokenizer
from mmlg_scale.errors import UserError

SHUFFLE_WINDOW = 16
"""Shards whose samples are mixed."""
AUGMENTATIONS = ("none", "crop")
CACHE_BYTES = 512 * 2**20
"""A split whose decoded images fit into this is decoded once and kept."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch."""

    image_uint8_BCHW: Tensor
    text_BT: Tensor
    indices_B: Tensor

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader where a GPU is used."""
        return Batch(self.image_uint8_BCHW.pin_memory(), self.text_BT.pin_memory(), self.indices_B.pin_memory())


class ShardReader:
    """Random access to a split by seek: (image bytes, captions, label) of sample i."""

    def __init__(self, folder: Path) -> None:
        self.places, self.shard_sizes = locations(folder)
        self._shards: dict[Path, mmap.mmap] = {}

    def __len__(self) -> int:
        return len(self.places)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shards": {}}  # mappings do not travel to worker processes

    def _read(self, place: Location, part: tuple[int, int]) -> bytes:
        shard = self._shards.get(place.shard)
        if shard is None:
            with open(place.shard, "rb") as file:
                shard = self._shards[place.shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return shard[part[0] : part[0] + part[1]]

    def image_bytes(self, index: int) -> bytes:
        """The encoded image as packed."""
        return self._read(self.places[index], self.places[index].image)

    def image(self, index: int, image_size: int) -> np.ndarray:
        """The image as the towers see it: uint8 [H, W, 3].

        Raises:
            UserError: the image cannot be decoded (a cut JPEG passes the check that packing makes).
        """
        try:
            return decode(self.image_bytes(index), image_size)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            place = self.places[index]
            raise UserError(
                f"{place.shard} sample {place.key}: its image cannot be decoded ({error}). Replace it and pack again."
            ) from error

    def about(self, index: int) -> dict[str, Any]:
        """{"captions": [...], "label": int | None}."""
        return json.loads(self._read(self.places[index], self.places[index].json))


def decode(payload: bytes, image_size: int) -> np.ndarray:
    """RGB, shorter side to `image_size` (bicubic), centre crop, as open_clip's evaluation transform: uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(payload)) as opened:
        image = opened.convert("RGB")
    if image.size != (image_size, image_size):
        # Truncation here and rounding there are torchvision's, whose transforms open_clip uses.
        width, height = (int(image_size * side / min(image.size)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - image_size) / 2), round((height - image_size) / 2)
        image = image.crop((left, top, left + image_size, top + image_size))
    return np.asarray(image)


def epoch_order(shard_sizes: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """The samples of one epoch in reading order: shards shuffled, then samples inside each window of shards."""
    generator = np.random.default_rng([seed, epoch])
    starts = np.concatenate([[0], np.cumsum(shard_sizes)])
    shards = generator.permutation(len(shard_sizes))
    windows = [shards[i : i + SHUFFLE_WINDOW] for i in range(0, len(shards), SHUFFLE_WINDOW)]
    return np.concatenate([generator.permutation(np.concatenate([np.arange(starts[s], starts[s + 1]) for s in w])) for w in windows])


class _Order:
    """(epoch, sample) of each position of the endless concatenation of epochs."""

    def __init__(self, shard_sizes: Sequence[int], seed: int) -> None:
        self._size = sum(shard_sizes)
        self._epoch = functools.lru_cache(maxsize=2)(lambda epoch: epoch_order(shard_sizes, seed, epoch))

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self._size)
        return epoch, int(self._epoch(epoch)[offset])


class _Pairs(Dataset[Batch]):
    """Batches by their list of (epoch, sample)."""

    def __init__(
        self, reader: ShardReader, tokenizer: Tokenizer, image_size: int, context_length: int, seed: int, augment: str, cache: bool
    ) -> None:
        self.reader, self.tokenizer, self.seed, self.augment = reader, tokenizer, seed, augment
        self.image_size, self.context_length = image_size, context_length
        self._keep = cache and len(reader) * image_size * image_size * 3 <= CACHE_BYTES
        # Made at the first image, so that it is made inside a worker process and does not travel there.
        self._cached: np.ndarray | None = None
        self._known = np.zeros(len(reader), bool)
        self._tokens: list[Tensor | None] = [None] * len(reader)

    def __getitem__(self, places: Sequence[tuple[int, int]]) -> Batch:
        self._tokenize([index for _, index in places])
        images = np.stack([self._image(epoch, index) for epoch, index in places])
        texts = torch.stack([self._text(epoch, index) for epoch, index in places])
        indices = torch.tensor([index for _, index in places])
        return Batch(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), texts, indices)

    def _image(self, epoch: int, index: int) -> np.ndarray:
        if not self._keep:
            image = self.reader.image(index, self.image_size)
        else:
            if self._cached is None:
                self._cached = np.empty((len(self.reader), self.image_size, self.image_size, 3), np.uint8)
            if not self._known[index]:
                self._cached[index] = self.reader.image(index, self.image_size)
                self._known[index] = True
            image = self._cached[index]
        return image if self.augment == "none" else self._crop(image, epoch, index)

    def _crop(self, image: np.ndarray, epoch: int, index: int) -> np.ndarray:
        """A random square of 80 to 100 % of the side, resized back."""
        generator = np.random.default_rng([self.seed, epoch, index, 1])
        side = round(self.image_size * generator.uniform(0.8, 1.0))
        left, top = generator.integers(0, self.image_size - side + 1, size=2)
        box = (int(left), int(top), int(left) + side, int(top) + side)
        return np.asarray(Image.fromarray(image).resize((self.image_size, self.image_size), Image.Resampling.BICUBIC, box=box))

    def _tokenize(self, indices: Sequence[int]) -> None:
        """Tokenise the captions of samples that are met for the first time, all in one call: a call each costs five times as much."""
        new = [index for index in indices if self._tokens[index] is None]
        captions = [self.reader.about(index)["captions"] for index in new]
        if not new:
            return
        tokens = self.tokenizer([text for texts in captions for text in texts], self.context_length)
        for index, part in zip(new, tokens.split([len(texts) for texts in captions]), strict=True):
            self._tokens[index] = part

    def _text(self, epoch: int, index: int) -> Tensor:
        tokens = self._tokens[index]
        assert tokens is not None
        if len(tokens) == 1:
            return tokens[0]
        # A hash of (seed, epoch, index) instead of a generator: this runs for every sample of every batch.
        mixed = (self.seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB) & (2**64 - 1)
        mixed = ((mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93) & (2**64 - 1)
        return tokens[(mixed >> 33) % len(tokens)]


class _Steps(Sampler[list[tuple[int, int]]]):
    """This rank's list of (epoch, sample) for each step from `start` on, without end."""

    def __init__(self, order: _Order, batch_size: int, rank: int, world_size: int, start: int) -> None:
        self.order, self.batch_size, self.start = order, batch_size, start
        self.share = batch_size // world_size
        self.offset = rank * self.share

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start
        while True:
            first = step * self.batch_size + self.offset
            yield [self.order(position) for position in range(first, first + self.share)]
            step += 1


class TrainStream:
    """The endless stream of one rank's batches from `start_step` on.

    Args:
        folder: a split.
        global_batch_size: pairs per step over all ranks.
        num_workers: processes that decode; 0 decodes here. The batches are the same.
        augment: `none`, or `crop` (a random square of 80 to 100 % of the side).
        cache_decoded: keep decoded images where they fit into memory.

    Raises:
        UserError: the batch is not a multiple of the ranks, the split is smaller than a batch, or `augment` is unknown.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        context_length: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int,
        num_workers: int = 0,
        augment: str = "none",
        start_step: int = 0,
        cache_decoded: bool = True,
    ) -> None:
        if augment not in AUGMENTATIONS:
            raise UserError(f"augment {augment!r} is unknown. Use one of: {', '.join(AUGMENTATIONS)}.")
        reader = ShardReader(folder)
        if global_batch_size % world_size:
            raise UserError(f"batch_size {global_batch_size} is not a multiple of the {world_size} ranks. Change either.")
        if len(reader) < global_batch_size:
            raise UserError(f"{folder} holds {len(reader)} samples, batch_size is {global_batch_size}. Use a smaller batch, or more data.")
        steps = _Steps(_Order(reader.shard_sizes, seed), global_batch_size, rank, world_size, start_step)
        pairs = _Pairs(reader, tokenizer, image_size, context_length, seed, augment, cache_decoded)
        self._loader: DataLoader[Batch] = DataLoader(
            pairs,
            batch_size=None,
            sampler=steps,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(
                seed
            ),  # its draw for the workers, of which nothing here depends, leaves the global state alone
            multiprocessing_context="spawn" if num_workers else None,  # the engine has started threads, which a fork would break
        )

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)


@dataclass(frozen=True)
class EvalSplit:
    """A whole split, decoded and tokenised.

    Attributes:
        images_uint8_NCHW: all images.
        texts_MT: all captions of all images.
        text_to_image_M: the image of each caption.
        labels_N: class of each image, where the set has classes.
    """

    images_uint8_NCHW: Tensor
    texts_MT: Tensor
    text_to_image_M: Tensor
    labels_N: Tensor | None
    captions: list[str]

    def image_png(self, index: int) -> bytes:
        """Image `index` as a PNG file."""
        buffer = io.BytesIO()
        Image.fromarray(self.images_uint8_NCHW[index].permute(1, 2, 0).numpy()).save(buffer, "PNG")
        return buffer.getvalue()


def load_eval_split(folder: Path, tokenizer: Tokenizer, image_size: int, context_length: int) -> EvalSplit:
    """Read a whole split into memory."""
    reader = ShardReader(folder)
    images = np.stack([reader.image(index, image_size) for index in range(len(reader))])
    about = [reader.about(index) for index in range(len(reader))]
    captions = [text for item in about for text in item["captions"]]
    owners = [index for index, item in enumerate(about) for _ in item["captions"]]
    labels = [item["label"] for item in about]
    return EvalSplit(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        tokenizer(captions, context_length),
        torch.tensor(owners),
        None if any(label is None for label in labels) else torch.tensor(labels),
        captions,
    )
