"""Shards -> batches, at an exact position.

The global order is a function of (seed, epoch, position) only: global step s takes positions s * G ... (s + 1) * G - 1 of the endless
concatenation of shuffled epochs, and each rank takes its slice. So a run resumes at the exact sample, at any world size that divides the
batch and with any number of workers, and every rank has the same amount of work.

An epoch is the intact samples of the split: the damaged ones are known before the first step (`faults.py` says why and how). With `record`
that set is written down when a run starts and used again when it resumes, so that a shard that is fixed or breaks in between changes no
batch. A sample that fails only when it is read is replaced by another one, drawn by a function of (seed, epoch, sample): the batch stays
full, no rank needs to hear of it, and the epoch reads the substitute twice.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mmlg_scale.augmentation import Augmentation
from mmlg_scale.data.augment import crop_batch, crop_boxes, draw_colours, recolour
from mmlg_scale.data.captions import CaptionTokens
from mmlg_scale.data.faults import MAX_BAD_FRACTION, EpochReport, FaultLog, fault_list, known_faults, print_report
from mmlg_scale.data.manifest import Shards
from mmlg_scale.data.order import SHUFFLE_WINDOW, EpochOrder
from mmlg_scale.data.reader import DamagedSample, Fault, ShardReader
from mmlg_scale.data.scan import Check, Findings, num_threads
from mmlg_scale.data.store import RemoteFile, Store
from mmlg_scale.data.workers import from_workers, require_shared_memory, worker_options
from mmlg_scale.errors import UserError
from mmlg_scale.ranks import on_first_rank, several_ranks
from mmlg_scale.streams import Stream, generator
from mmlg_scale.towers import ModelSpec

AUGMENTATIONS = ("none", "crop", "resized_crop")
ATTEMPTS = 100
"""Substitutes that are tried for a sample before reading is given up."""
CACHE_BYTES = 512 * 2**20
"""A split whose decoded images fit into this is decoded once and kept."""


@dataclass(frozen=True)
class StreamSettings:
    """What a stream of batches is a function of, and how it is read.

    Attributes:
        global_batch_size: pairs per step over all ranks.
        rank, world_size: the part of each batch that is read here.
        num_workers: processes that decode; 0 decodes here. The batches are the same.
        augment: `none`; `crop` (a random square of 80 to 100 % of the side of the image as the model sees it); `resized_crop` (open_clip's:
            90 to 100 % of the whole image's area at a random aspect ratio, or what `aug_cfg` says).
        aug_cfg: what `resized_crop` draws.
        check: whether damaged images are found before the first step (`decode`) or when they are read (`structure`); `auto`: by the size of
            the split.
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
    aug_cfg: Augmentation = field(default_factory=Augmentation)
    check: Check = "auto"
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


class _News(NamedTuple):
    """What reading a batch brought to light besides the batch."""

    faults: list[tuple[int, Fault]]
    """(epoch, fault) of what failed."""
    read: dict[int, int]
    """Captions by epoch."""
    cut: dict[int, int]
    """Those of them that are cut to the context length."""


class _Pairs(Dataset[tuple[Batch, _News]]):
    """Batches by their places, int64 [B, 2]: epoch and sample."""

    def __init__(self, reader: ShardReader, order: EpochOrder, spec: ModelSpec, settings: StreamSettings) -> None:
        self.reader, self.order, self.seed, self.augment = reader, order, settings.seed, settings.augment
        self.aug_cfg = settings.aug_cfg
        self.preprocess, self.image_size = spec.preprocess, spec.image_size
        fits = len(reader) * self.image_size * self.image_size * 3 <= CACHE_BYTES
        self._keep = settings.cache_decoded and fits and self.augment != "resized_crop"
        # Made at the first image, so that it is made inside a worker process and does not travel there.
        self._cached: np.ndarray | None = None
        self._known: np.ndarray | None = None
        self._captions = CaptionTokens(spec.tokenizer, spec.context_length, settings.seed)

    def __getitem__(self, places_B2: np.ndarray) -> tuple[Batch, _News]:
        met: list[tuple[int, Fault]] = []
        epochs, wanted = places_B2[:, 0].tolist(), places_B2[:, 1].tolist()
        if self._cached is not None and self._known is not None and self._known[wanted].all() and self._captions.has(wanted):
            indices, images, texts = wanted, self._cached[wanted], {}
        else:
            texts = dict[int, list[str]]()
            read = [self._readable(epoch, index, texts, met) for epoch, index in zip(epochs, wanted, strict=True)]
            indices, images = [index for index, _ in read], np.stack([image for _, image in read])
        if self.augment == "crop":
            images = crop_batch(images, crop_boxes(self.seed, np.array(epochs), np.array(indices), self.image_size))
        else:
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        text_BT, chosen, cut = self._captions.draw(epochs, indices, texts)
        news = _News(met, dict(Counter(epochs)), dict(Counter(epochs[row] for row in cut)))
        return Batch(torch.from_numpy(images), text_BT, torch.tensor([indices, chosen]).T), news

    def _readable(self, epoch: int, wanted: int, texts: dict[int, list[str]], met: list[tuple[int, Fault]]) -> tuple[int, np.ndarray]:
        """The sample, or the first of its substitutes that can be read, with its image; captions that are needed go to `texts`."""
        index = wanted
        for attempt in range(ATTEMPTS):
            try:
                if index not in texts and not self._captions.has([index]):
                    texts[index] = self.reader.about(index)["captions"]
                return index, self._image(epoch, index)
            except DamagedSample as damage:
                met.append((epoch, damage.fault))
                draws = generator(self.seed, Stream.SUBSTITUTE, epoch, wanted, attempt)
                index = self.order.intact(int(draws.integers(self.order.num_intact)))
        last = met[-1][1]
        raise UserError(f"{ATTEMPTS} samples in a row cannot be read, the last being {last}. Check the storage.")

    def _image(self, epoch: int, index: int) -> np.ndarray:
        """uint8 [H, W, 3], before `crop`, which takes a batch at once."""
        if self.augment == "resized_crop":
            draws, (scale, ratio) = generator(self.seed, Stream.CROP, epoch, index), (self.aug_cfg.scale, self.aug_cfg.ratio)
            image = self.reader.crop(index, self.image_size, draws, preprocess=self.preprocess, scale=scale, ratio=ratio)
            return recolour(image, draw_colours(self.aug_cfg, self.seed, epoch, index))
        if not self._keep:
            return self._drafted(index)
        if self._cached is None or self._known is None:
            self._known = np.zeros(len(self.reader), bool)
            self._cached = np.empty((len(self.reader), self.image_size, self.image_size, 3), np.uint8)
        if not self._known[index]:
            self._cached[index] = self._drafted(index)
            self._known[index] = True
        return self._cached[index]

    def _drafted(self, index: int) -> np.ndarray:
        return self.reader.image(index, self.image_size, preprocess=self.preprocess, draft=True)


class _Steps(Sampler[np.ndarray]):
    """This rank's places for each step from `start` on, without end: int64 [B, 2], epoch and sample.

    Where `shards` are remote, those of a window and of the next one are fetched in the background when the window is reached.
    """

    def __init__(self, order: EpochOrder, batch_size: int, rank: int, world_size: int, start: int, shards: Shards) -> None:
        self.order, self.batch_size, self.start, self.shards = order, batch_size, start, shards
        self.share = batch_size // world_size
        self.offset = rank * self.share

    def __iter__(self) -> Iterator[np.ndarray]:
        step, fetched = self.start, None
        while True:
            window = self.order.window_at(step * self.batch_size + self.offset) if self.shards.store is not None else None
            if window != fetched and window is not None:
                self._fetch(*window)
                fetched = window
            yield np.stack(self.order.places(step * self.batch_size + self.offset, self.share), axis=1)
            step += 1

    def _fetch(self, epoch: int, number: int) -> None:
        assert self.shards.store is not None
        here, ahead = (self._files(self.order.window_shards(epoch, number + more)) for more in (0, 1))
        self.shards.store.prefetch([*here, *ahead], keep=here)

    def _files(self, shards: list[int]) -> list[RemoteFile]:
        return [file for shard in shards for file in (self.shards.index_file(shard), self.shards.file(shard))]


def require_cache(shards: Shards, num_mixed: int = SHUFFLE_WINDOW) -> None:
    """Raise UserError where a cache has no room for shards that are mixed: each would be fetched again for nearly every sample."""
    if shards.store is None or shards.store.cache is None:
        return
    indexes_S = np.array([shards.index_file(shard).size for shard in range(len(shards))])
    most = int(np.sort(shards.num_bytes + indexes_S)[-num_mixed:].sum())
    if shards.store.cache.max_bytes < most:
        raise UserError(
            f"data.cache_bytes is {shards.store.cache.max_bytes:,}; {min(num_mixed, len(shards))} shards of {shards.where}, whose samples "
            f"are mixed, take {most:,}. Allow twice as much, so that the next ones are fetched ahead."
        )


class TrainStream:
    """The endless stream of one rank's batches from `start_step` on. Where ranks run as one process group, all make it together.

    Args:
        folder: a split.
        store: where its shards are, if not in `folder`.
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
        store: Store | None = None,
    ) -> None:
        rank, world_size, batch_size = settings.rank, settings.world_size, settings.global_batch_size
        reader, shared = ShardReader(folder, store), several_ranks() and dist.get_world_size() == world_size
        share, image = batch_size // world_size, 3 * spec.image_size**2
        need = functools.partial(require_shared_memory, settings.num_workers, [share * image, share * 8 * spec.context_length, share * 16])
        on_first_rank(need) if shared else need()
        require_cache(reader.shards)
        known = known_faults(
            folder,
            reader,
            check=settings.check,
            max_bad_fraction=settings.max_bad_fraction,
            record=record,
            rank=rank,
            threads=num_threads(),
            shared=shared,
        )
        order = EpochOrder(reader.shards.samples, known.positions(), settings.seed)
        self.num_intact = order.num_intact
        if self.num_intact < batch_size:
            raise UserError(
                f"{reader.shards.where} has {self.num_intact} samples, batch_size is {batch_size}. Use a smaller batch, or more data."
            )
        self._start, self._batch_size = start_step, batch_size
        self._log = FaultLog(
            known,
            len(reader),
            share=1 / world_size,
            max_bad_fraction=settings.max_bad_fraction,
            file=fault_list(record, rank),
            context_length=spec.context_length,
            on_epoch=on_epoch if rank == 0 else _only_new(on_epoch, known),
            what=reader.shards.where,
        )
        self._loader: DataLoader[tuple[Batch, _News]] = DataLoader(
            _Pairs(reader, order, spec, settings),
            batch_size=None,
            sampler=_Steps(order, batch_size, rank, world_size, start_step, reader.shards),
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


def _only_new(on_epoch: Callable[[EpochReport], None], known: Findings) -> Callable[[EpochReport], None]:
    """Reports of ranks but the first: what all know is the first's to tell."""
    shared = known.counts

    def report(found: EpochReport) -> None:
        own = dict(Counter(found.skipped) - shared)
        on_epoch(replace(found, skipped=own))

    return report
