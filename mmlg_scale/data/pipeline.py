"""Shards -> batches, at an exact position.

The global order is a function of (seed, epoch, position) only: global step s takes positions s * G ... (s + 1) * G - 1 of the endless
concatenation of shuffled epochs, and each rank takes its slice. So a run resumes at the exact sample, at any world size that divides the
batch and with any number of workers, and every rank has the same amount of work.

An epoch is the intact samples of the split: the damaged ones are known before the first step (`faults.py` says why and how). With `record`
that set is written down when a run starts and used again when it resumes, so that a shard that is fixed or breaks in between changes no
batch. A sample that fails only when it is read is replaced by another one, drawn by a function of (seed, epoch, sample): the batch stays
full, no rank needs to hear of it, and the epoch reads the substitute twice.

The shuffle is by blocks: shards are shuffled, then samples inside a window of consecutive shards, so that reading stays near-sequential.
"""

from __future__ import annotations

import functools
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mmlg_scale.data.augment import crop_batch, crop_boxes
from mmlg_scale.data.faults import (
    MAX_BAD_FRACTION,
    Check,
    EpochReport,
    FaultLog,
    changed_faults,
    check_limit,
    fault_list,
    intact_samples,
    known_faults,
    print_report,
    told_truncation,
)
from mmlg_scale.data.reader import DamagedSample, Fault, ShardReader
from mmlg_scale.data.tokens import truncated
from mmlg_scale.data.workers import from_workers, require_shared_memory, worker_options
from mmlg_scale.errors import UserError
from mmlg_scale.ranks import is_first_rank, on_first_rank, several_ranks
from mmlg_scale.streams import Stream, generator
from mmlg_scale.towers import ModelSpec

SHUFFLE_WINDOW = 16
"""Shards whose samples are mixed."""
AUGMENTATIONS = ("none", "crop", "resized_crop")
ATTEMPTS = 100
"""Substitutes that are tried for a sample before reading is given up."""
CACHE_BYTES = 512 * 2**20
"""A split whose decoded images fit into this is decoded once and kept."""
TOKEN_CACHE_BYTES = 64 * 2**20
"""Of token ids, in each loader process; when they are more, they are forgotten and made again."""


@dataclass(frozen=True)
class StreamSettings:
    """What a stream of batches is a function of, and how it is read.

    Attributes:
        global_batch_size: pairs per step over all ranks.
        rank, world_size: the part of each batch that is read here.
        num_workers: processes that decode; 0 decodes here. The batches are the same.
        augment: `none`; `crop` (a random square of 80 to 100 % of the side of the image as the model sees it); `resized_crop` (open_clip's:
            90 to 100 % of the whole image's area at a random aspect ratio).
        check: whether damaged images are found before the first step (`decode`) or when they are read (`structure`).
        max_bad_fraction: fraction of the samples of an epoch above which damage stops the run.
        cache_decoded: keep decoded images where they fit into memory.

    Raises:
        UserError: the batch is not a multiple of the ranks, `augment` is unknown, or `max_bad_fraction` is no fraction.
    """

    global_batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    augment: str = "none"
    check: Check = "decode"
    max_bad_fraction: float = MAX_BAD_FRACTION
    cache_decoded: bool = True

    def __post_init__(self) -> None:
        if self.augment not in AUGMENTATIONS:
            raise UserError(f"augment {self.augment!r} is unknown. Use one of: {', '.join(AUGMENTATIONS)}.")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"data.max_bad_fraction is {self.max_bad_fraction}. Use a fraction from 0 to 1.")
        if self.global_batch_size % self.world_size:
            raise UserError(f"batch_size {self.global_batch_size} is not a multiple of the {self.world_size} ranks. Change either.")


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch."""

    image_uint8_BCHW: Tensor
    text_BT: Tensor
    samples_B2: Tensor
    """Each pair's sample in the split, and which of its captions was drawn."""

    @property
    def indices_B(self) -> Tensor:
        """Only the samples."""
        return self.samples_B2[:, 0]

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader where a GPU is used."""
        return Batch(self.image_uint8_BCHW.pin_memory(), self.text_BT.pin_memory(), self.samples_B2)


def epoch_order(shard_sizes: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """The samples of one epoch in reading order: shards shuffled, then samples inside each window of shards."""
    draws = generator(seed, Stream.EPOCH_ORDER, epoch)
    starts = np.concatenate([[0], np.cumsum(shard_sizes)])
    shards = draws.permutation(len(shard_sizes))
    windows = [shards[i : i + SHUFFLE_WINDOW] for i in range(0, len(shards), SHUFFLE_WINDOW)]
    return np.concatenate([draws.permutation(np.concatenate([np.arange(starts[s], starts[s + 1]) for s in w])) for w in windows])


class _Order:
    """(epoch, sample) of each position of the endless concatenation of epochs over the intact samples of each shard."""

    def __init__(self, shards: Sequence[np.ndarray], seed: int) -> None:
        self.intact = np.concatenate(shards)
        sizes = [len(shard) for shard in shards if len(shard)]
        self._epoch = functools.lru_cache(maxsize=2)(lambda epoch: self.intact[epoch_order(sizes, seed, epoch)])

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, len(self.intact))
        return epoch, int(self._epoch(epoch)[offset])


class _News(NamedTuple):
    """What reading a batch brought to light besides the batch."""

    faults: list[tuple[int, Fault]]
    """(epoch, fault) of what failed."""
    read: dict[int, int]
    """Captions by epoch."""
    cut: dict[int, int]
    """Those of them that are cut to the context length."""


class _Pairs(Dataset[tuple[Batch, _News]]):
    """Batches by their list of (epoch, sample)."""

    def __init__(self, reader: ShardReader, intact: np.ndarray, spec: ModelSpec, settings: StreamSettings) -> None:
        self.reader, self.intact, self.seed, self.augment = reader, intact, settings.seed, settings.augment
        self.tokenizer, self.preprocess = spec.tokenizer, spec.preprocess
        self.image_size, self.context_length = spec.image_size, spec.context_length
        fits = len(reader) * self.image_size * self.image_size * 3 <= CACHE_BYTES
        self._keep = settings.cache_decoded and fits and self.augment != "resized_crop"
        # Made at the first image, so that it is made inside a worker process and does not travel there.
        self._cached: np.ndarray | None = None
        self._known = np.zeros(len(reader), bool)
        self._captions: dict[int, list[str]] = {}
        self._tokens: dict[int, Tensor] = {}
        self._token_bytes = 0
        # (sample, caption) of the captions that are cut.
        self._cut: set[tuple[int, int]] = set()

    def __getitem__(self, places: Sequence[tuple[int, int]]) -> tuple[Batch, _News]:
        if self._token_bytes > TOKEN_CACHE_BYTES:  # starts again: what is kept does not grow with the data set
            self._tokens.clear()
            self._cut.clear()
            self._token_bytes = 0
        met: list[tuple[int, Fault]] = []
        epochs = [epoch for epoch, _ in places]
        indices = [index for _, index in places]
        if self._cached is not None and self._known[indices].all() and all(index in self._tokens for index in indices):
            images = self._cached[indices]
        else:
            read = [self._readable(epoch, index, met) for epoch, index in places]
            indices, images = [index for index, _ in read], np.stack([image for _, image in read])
        if self.augment == "crop":
            images = crop_batch(images, crop_boxes(self.seed, np.array(epochs), np.array(indices), self.image_size))
        else:
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        self._tokenize(indices)
        texts, captions = zip(*(self._text(epoch, index) for epoch, index in zip(epochs, indices, strict=True)), strict=True)
        cut = [epoch for epoch, *place in zip(epochs, indices, captions, strict=True) if tuple(place) in self._cut] if self._cut else []
        news = _News(met, dict(Counter(epochs)), dict(Counter(cut)))
        return Batch(torch.from_numpy(images), torch.stack(texts), torch.tensor([indices, captions]).T), news

    def _readable(self, epoch: int, wanted: int, met: list[tuple[int, Fault]]) -> tuple[int, np.ndarray]:
        """The sample, or the first of its substitutes that can be read, with its image."""
        index = wanted
        for attempt in range(ATTEMPTS):
            try:
                if index not in self._tokens and index not in self._captions:
                    self._captions[index] = self.reader.about(index)["captions"]
                return index, self._image(epoch, index)
            except DamagedSample as damage:
                met.append((epoch, damage.fault(index)))
                draws = generator(self.seed, Stream.SUBSTITUTE, epoch, wanted, attempt)
                index = int(self.intact[draws.integers(len(self.intact))])
        last = met[-1][1]
        raise UserError(f"{ATTEMPTS} samples in a row cannot be read, the last being {last}. Check the storage.")

    def _image(self, epoch: int, index: int) -> np.ndarray:
        """uint8 [H, W, 3], before `crop`, which takes a batch at once."""
        if self.augment == "resized_crop":
            draws = generator(self.seed, Stream.CROP, epoch, index)
            return self.reader.crop(index, self.image_size, draws, preprocess=self.preprocess)
        if not self._keep:
            return self._drafted(index)
        if self._cached is None:
            self._cached = np.empty((len(self.reader), self.image_size, self.image_size, 3), np.uint8)
        if not self._known[index]:
            self._cached[index] = self._drafted(index)
            self._known[index] = True
        return self._cached[index]

    def _drafted(self, index: int) -> np.ndarray:
        return self.reader.image(index, self.image_size, preprocess=self.preprocess, draft=True)

    def _tokenize(self, indices: Sequence[int]) -> None:
        """Tokenise the captions of samples that are met for the first time, all in one call: a call each costs five times as much."""
        captions, self._captions = self._captions, {}
        new = [index for index in dict.fromkeys(indices) if index not in self._tokens]
        if not new:
            return
        texts = [text for index in new for text in captions[index]]
        tokens = self.tokenizer(texts, self.context_length)
        cut = truncated(self.tokenizer, texts, tokens)
        if cut:
            places = [(index, caption) for index in new for caption in range(len(captions[index]))]
            self._cut.update(places[row] for row in cut)
        for index, part in zip(new, tokens.split([len(captions[index]) for index in new]), strict=True):
            self._tokens[index] = part
        self._token_bytes += tokens.nbytes

    def _text(self, epoch: int, index: int) -> tuple[Tensor, int]:
        """The tokens of one of the sample's captions, and which."""
        tokens = self._tokens[index]
        if len(tokens) == 1:
            return tokens[0], 0
        # A hash of (seed, epoch, index) instead of a generator: this runs for every sample of every batch.
        mixed = (self.seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB) & (2**64 - 1)
        mixed = ((mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93) & (2**64 - 1)
        chosen = (mixed >> 33) % len(tokens)
        return tokens[chosen], chosen


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
    """The endless stream of one rank's batches from `start_step` on. Where ranks run as one process group, all make it together.

    Args:
        folder: a split.
        spec: the model that reads it: size and preprocessing of images, tokenizer and context length of captions.
        record: folder of the run: keeps the set of damaged samples over a resume, and the list of faults.
        on_epoch: told at the end of each epoch what was skipped and cut; by default the console is, where something was.

    Raises:
        UserError: fewer samples are intact than a batch has, more than the limit are damaged, `check` is unknown, or there is too little
            shared memory for the workers; while reading, more than the limit turn out damaged, or a worker fails.
    """

    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        settings: StreamSettings,
        *,
        start_step: int = 0,
        record: Path | None = None,
        on_epoch: Callable[[EpochReport], None] = print_report,
    ) -> None:
        rank, world_size, batch_size = settings.rank, settings.world_size, settings.global_batch_size
        reader, shared = ShardReader(folder), several_ranks() and dist.get_world_size() == world_size
        share, image = batch_size // world_size, 3 * spec.image_size**2
        need = functools.partial(require_shared_memory, settings.num_workers, [share * image, share * 8 * spec.context_length, share * 16])
        on_first_rank(need) if shared else need()
        known = known_faults(
            folder,
            reader,
            check=settings.check,
            max_bad_fraction=settings.max_bad_fraction,
            record=record,
            rank=rank,
            threads=max(1, settings.num_workers),
            shared=shared,
        )
        order = _Order(intact_samples(reader, known), settings.seed)
        self.num_intact = len(order.intact)
        if self.num_intact < batch_size:
            raise UserError(f"{folder} has {self.num_intact} samples, batch_size is {batch_size}. Use a smaller batch, or more data.")
        self._start, self._batch_size = start_step, batch_size
        self._log = FaultLog(
            known,
            len(reader),
            share=1 / world_size,
            max_bad_fraction=settings.max_bad_fraction,
            file=fault_list(record, rank),
            context_length=spec.context_length,
            on_epoch=on_epoch if rank == 0 else _only_new(on_epoch, known),
            what=str(folder),
        )
        self._loader: DataLoader[tuple[Batch, _News]] = DataLoader(
            _Pairs(reader, order.intact, spec, settings),
            batch_size=None,
            sampler=_Steps(order, batch_size, rank, world_size, start_step),
            pin_memory=torch.cuda.is_available(),
            # Its draw for the workers, on which nothing here depends, does not touch the global state.
            generator=torch.Generator().manual_seed(settings.seed),
            **worker_options(settings.num_workers),
        )

    def __iter__(self) -> Iterator[Batch]:
        step = self._start
        for batch, news in from_workers(self._loader):
            for epoch in sorted({epoch for epoch, _ in news.faults}):
                self._log.add(epoch, step, [fault for of, fault in news.faults if of == epoch])
            self._log.add_captions(news.read, news.cut)
            epoch, position = divmod(step * self._batch_size, self.num_intact)
            if position + self._batch_size >= self.num_intact:
                self._log.end_epoch(epoch)
            yield batch
            step += 1


def _only_new(on_epoch: Callable[[EpochReport], None], known: Sequence[Fault]) -> Callable[[EpochReport], None]:
    """Reports of ranks but the first: what all know is the first's to tell."""
    shared = Counter(fault.cause for fault in known)

    def report(found: EpochReport) -> None:
        own = dict(Counter(found.skipped) - shared)
        on_epoch(replace(found, skipped=own))

    return report


@dataclass(frozen=True)
class EvalSplit:
    """A whole split, decoded and tokenised.

    Attributes:
        images_uint8_NCHW: all images.
        texts_MT: all captions of all images.
        text_to_image_M: the image of each caption.
        labels_N: class of each image, where the set has classes.
        captions: all captions as texts.
        skipped: the damaged samples, which are left out.
        num_truncated: captions that are cut to the context length.
    """

    images_uint8_NCHW: Tensor
    texts_MT: Tensor
    text_to_image_M: Tensor
    labels_N: Tensor | None
    captions: list[str]
    skipped: list[Fault] = field(default_factory=list)
    num_truncated: int = 0

    def image_png(self, index: int) -> bytes:
        """Image `index` as a PNG file."""
        buffer = io.BytesIO()
        Image.fromarray(self.images_uint8_NCHW[index].permute(1, 2, 0).numpy()).save(buffer, "PNG")
        return buffer.getvalue()


def load_eval_split(folder: Path, spec: ModelSpec, *, max_bad_fraction: float = MAX_BAD_FRACTION) -> EvalSplit:
    """Read a whole split into memory as the model `spec` sees it.

    Damaged samples are left out and named on the console, metrics are then over the others; captions that are cut are counted there.

    Raises:
        UserError: more than `max_bad_fraction` of the samples are damaged; with the first of them.
    """
    reader = ShardReader(folder)
    read, faults = dict[int, tuple[np.ndarray, dict[str, Any]]](), list[Fault]()
    for index in range(len(reader)):
        try:
            reader.check_headers(index)
            reader.check_text(index)
            found = reader.about(index)
            read[index] = reader.image(index, spec.image_size, preprocess=spec.preprocess), found
        except DamagedSample as damage:
            faults.append(damage.fault(index))
    reader.close()
    faults += changed_faults(reader, faults)
    check_limit(faults, len(reader), max_bad_fraction, None, str(folder))
    for fault in faults:
        read.pop(fault.index, None)
    images, about = [image for image, _ in read.values()], [found for _, found in read.values()]
    if not images:
        raise UserError(f"{folder}: no sample can be read. mmlg data check says why.")
    captions = [text for item in about for text in item["captions"]]
    owners = [position for position, item in enumerate(about) for _ in item["captions"]]
    labels = [item["label"] for item in about]
    texts_MT = spec.tokenizer(captions, spec.context_length)
    num_truncated = len(truncated(spec.tokenizer, captions, texts_MT))
    if is_first_rank():
        for fault in faults:
            print(f"left out of the evaluation: {fault}", flush=True)
        if num_truncated:
            print(f"{folder}: {told_truncation(num_truncated, len(captions), spec.context_length)}", flush=True)
    return EvalSplit(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        texts_MT,
        torch.tensor(owners),
        None if any(label is None for label in labels) else torch.tensor(labels),
        captions,
        faults,
        num_truncated,
    )
