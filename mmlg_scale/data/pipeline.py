"""Shards -> batches, at an exact position.

The global order is a function of (seed, epoch, position) only: global step s takes positions s * G ... (s + 1) * G - 1 of the endless
concatenation of shuffled epochs, and each rank takes its slice. So a run resumes at the exact sample, at any world size that divides the
batch and with any number of workers, and every rank has the same amount of work.

An epoch is the intact samples of the split: the damaged ones are known before the first step (`faults.py` says why and how). With `record`
that set is written down when a run starts and used again when it resumes, so that a shard that is fixed or breaks in between changes no
batch. A sample that fails only when it is read is replaced by another one, drawn by a function of (seed, epoch, sample): the batch stays
full, no rank needs to hear of it, and the epoch reads the substitute twice.

Several splits are read as one by a pattern (`mixture.py`): each keeps its own order, epochs, damage and limit. What is drawn for a sample
goes by its number among the samples of all sources.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from mmlg_scale.data.captions import CaptionTokens, Texts
from mmlg_scale.data.faults import MAX_BAD_FRACTION, EpochReport, FaultLog, fault_list, known_faults, print_report
from mmlg_scale.data.manifest import Shards
from mmlg_scale.data.mixture import JoinedReader, MixedOrder, Pattern, Source, require_names, require_samples, source_seed
from mmlg_scale.data.order import SHUFFLE_WINDOW, EpochOrder
from mmlg_scale.data.pool import Pool
from mmlg_scale.data.reader import DamagedSample, Fault
from mmlg_scale.data.scan import Check, Findings, num_threads
from mmlg_scale.data.store import RemoteFile
from mmlg_scale.data.workers import from_workers, require_shared_memory, worker_options
from mmlg_scale.errors import UserError
from mmlg_scale.ranks import on_first_rank, several_ranks
from mmlg_scale.streams import Stream, generator
from mmlg_scale.towers import ModelSpec

AUGMENTATIONS = ("none", "crop", "resized_crop")
ATTEMPTS = 100
"""Substitutes that are tried for a sample before reading is given up."""
CACHE_BYTES = 512 * 2**20
"""A split whose decoded images fit into this is decoded once and kept; of a mixture all splits together."""
Epoch = tuple[int, int]
"""(source, epoch)."""


@dataclass(frozen=True)
class StreamSettings:
    """What a stream of batches is a function of, and how it is read.

    Attributes:
        global_batch_size: samples per step over all ranks.
        rank, world_size: the part of each batch that is read here.
        num_workers: processes that decode; 0 decodes here. The batches are the same.
        augment: `none`; `crop` (a random square of 80 to 100 % of the side of the image as the model sees it); `resized_crop` (open_clip's:
            90 to 100 % of the whole image's area at a random aspect ratio, or what `aug_cfg` says).
        aug_cfg: what `resized_crop` draws.
        check: whether damaged images are found before the first step (`decode`) or when they are read (`structure`); `auto`: by the size of
            the split.
        max_bad_fraction: fraction of the samples of an epoch above which damage stops the run.
        cache_decoded: keep decoded images where they fit into memory.
        pool: samples that are walked through again and again, in a new order each time, in place of epochs; a multiple of the batch.
        captions_per_image: captions that are read of each sample in a batch.

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
    pool: int | None = None
    captions_per_image: int = 1

    def __post_init__(self) -> None:
        if self.augment not in AUGMENTATIONS:
            raise UserError(f"augment {self.augment!r} is unknown. Use one of: {', '.join(AUGMENTATIONS)}.")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"data.max_bad_fraction is {self.max_bad_fraction}. Use a fraction from 0 to 1.")
        if self.global_batch_size % self.world_size:
            raise UserError(f"batch_size {self.global_batch_size} is not a multiple of the {self.world_size} ranks. Change either.")


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch: B images with k captions each."""

    image_uint8_BCHW: Tensor
    text_NT: Tensor
    """Token ids, N = B k: those of an image one after the other."""
    samples_BS: Tensor
    """[B, 1 + k], each image's sample, by its number among those of all sources, and which of its captions were drawn."""
    places_B: Tensor | None = None
    """Each image's place in the order, or in the pool; always given by a stream."""

    def __len__(self) -> int:
        return len(self.image_uint8_BCHW)

    @property
    def captions_per_image(self) -> int:
        """k."""
        return len(self.text_NT) // len(self)

    @property
    def indices_B(self) -> Tensor:
        """Only the samples."""
        return self.samples_BS[:, 0]

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader where a GPU is used."""
        return Batch(self.image_uint8_BCHW.pin_memory(), self.text_NT.pin_memory(), self.samples_BS, self.places_B)


class _News(NamedTuple):
    """What reading a batch brought to light besides the batch."""

    faults: list[tuple[Epoch, Fault]]
    """What failed."""
    read: dict[Epoch, int]
    """Samples."""
    cut: dict[Epoch, int]
    """Their captions that are cut to the context length."""
    repeated: dict[Epoch, int]
    """Their captions that the batch has already, because the sample has too few."""
    lacking: dict[Epoch, dict[str, int]]
    """Those of them that do not have a name that their rule draws, by name."""


class _Pairs(Dataset[tuple[Batch, _News]]):
    """Batches by their places, int64 [B, 3]: epoch, sample and place in the order."""

    def __init__(self, reader: JoinedReader, order: MixedOrder, spec: ModelSpec, settings: StreamSettings) -> None:
        self.reader, self.order, self.seed, self.augment = reader, order, settings.seed, settings.augment
        self.aug_cfg = settings.aug_cfg
        self.preprocess, self.image_size = spec.preprocess, spec.image_size
        fits = len(reader) * self.image_size * self.image_size * 3 <= CACHE_BYTES
        self._keep = settings.cache_decoded and fits and self.augment != "resized_crop"
        # Made at the first image, so that it is made inside a worker process and does not travel there.
        self._cached: np.ndarray | None = None
        self._known: np.ndarray | None = None
        self._captions = CaptionTokens(spec.tokenizer, spec.context_length, settings.seed, settings.captions_per_image)

    def __getitem__(self, places_B3: np.ndarray) -> tuple[Batch, _News]:
        met: list[tuple[Epoch, Fault]] = []
        epochs, wanted = places_B3[:, 0].tolist(), places_B3[:, 1].tolist()
        if self._cached is not None and self._known is not None and self._known[wanted].all() and self._captions.has(wanted):
            indices, images, texts = wanted, self._cached[wanted], {}
        else:
            texts = dict[int, Texts]()
            read = [self._readable(epoch, index, texts, met) for epoch, index in zip(epochs, wanted, strict=True)]
            indices, images = [index for index, _ in read], np.stack([image for _, image in read])
        if self.augment == "crop":
            images = crop_batch(images, crop_boxes(self.seed, np.array(epochs), np.array(indices), self.image_size))
        else:
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        sources, rules = [self.reader.source(index) for index in indices], self.reader.rules
        drawn = self._captions.draw(epochs, indices, texts, [rules[source] for source in sources] if any(rules) else None)
        of, lacking = list(zip(sources, epochs, strict=True)), dict[Epoch, Counter[str]]()
        for row, parts in drawn.parts.items():
            rule = rules[sources[row]]
            assert rule is not None
            lacking.setdefault(of[row], Counter()).update(name for name, count in zip(rule.names, parts, strict=True) if not count)
        # No Counter: torch's loader copies mappings by `update`, which would add.
        news = _News(
            met, dict(Counter(of)), _sums(of, drawn.cut), _sums(of, drawn.repeated), {key: dict(found) for key, found in lacking.items()}
        )
        samples_BS = torch.tensor([[index, *captions] for index, captions in zip(indices, drawn.captions, strict=True)])
        return Batch(torch.from_numpy(images), drawn.ids_NT, samples_BS, torch.from_numpy(places_B3[:, 2].copy())), news

    def _readable(self, epoch: int, wanted: int, texts: dict[int, Texts], met: list[tuple[Epoch, Fault]]) -> tuple[int, np.ndarray]:
        """The sample, or the first of its substitutes that can be read, with its image; captions that are needed go to `texts`."""
        index, source = wanted, self.reader.source(wanted)
        for attempt in range(ATTEMPTS):
            try:
                if index not in texts and not self._captions.has([index]):
                    texts[index] = self.reader.texts(index)
                return index, self._image(epoch, index)
            except DamagedSample as damage:
                met.append(((source, epoch), damage.fault))
                index = self.order.substitute(source, generator(self.seed, Stream.SUBSTITUTE, epoch, wanted, attempt))
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


def _sums(keys: Iterable[Epoch], counts: Iterable[int]) -> dict[Epoch, int]:
    """The counts of each key together, where they are not 0."""
    found = dict[Epoch, int]()
    for key, count in zip(keys, counts, strict=True):
        if count:
            found[key] = found.get(key, 0) + count
    return found


class _Steps(Sampler[np.ndarray]):
    """This rank's places for each step from `start` on, without end: int64 [B, 3], epoch, sample and place in the order (or the pool).

    Where shards are remote, those of a window and of the next one are fetched in the background when the window is reached. Of a pool, that
    is done in the first pass; later ones read what is still cached, and fetch the rest when it is read.
    """

    def __init__(self, order: MixedOrder, settings: StreamSettings, start: int, splits: Sequence[Shards]) -> None:
        self.order, self.batch_size, self.start, self.splits = order, settings.global_batch_size, start, splits
        self.pool = None if settings.pool is None else Pool(order, settings.pool, settings.seed)
        self.share = settings.global_batch_size // settings.world_size
        self.offset = settings.rank * self.share
        self._remote = [source for source, shards in enumerate(splits) if shards.store is not None]
        self._windows = dict[int, tuple[int, int]]()

    def __iter__(self) -> Iterator[np.ndarray]:
        step = self.start
        self._windows.clear()
        while True:
            first = step * self.batch_size + self.offset
            if self._remote and (self.pool is None or first < self.pool.size):
                self._fetch(self.order.pattern.counts(first).tolist())
            if self.pool is not None:
                yield self.pool.rows(first, self.share)
            else:
                yield np.stack([*self.order.places(first, self.share), np.arange(first, first + self.share)], axis=1)
            step += 1

    def _fetch(self, counts: list[int]) -> None:
        """Fetch the windows of sources that have come to another one. What no source's present window needs may be removed."""
        windows = {source: self.order.orders[source].window_at(counts[source]) for source in self._remote}
        reached = [source for source in self._remote if windows[source] != self._windows.get(source)]
        self._windows = windows
        for source in reached:
            store, others = self.splits[source].store, [other for other in self._remote if other != source]
            assert store is not None
            here, ahead = self._files(source), self._files(source, 1)
            store.prefetch(
                [*here, *ahead], keep=[*here, *(_anywhere(self.splits[other], file) for other in others for file in self._files(other))]
            )

    def _files(self, source: int, more: int = 0) -> list[RemoteFile]:
        shards, (epoch, number) = self.splits[source], self._windows[source]
        chosen = self.order.orders[source].window_shards(epoch, number + more)
        return [file for shard in chosen for file in (shards.index_file(shard), shards.file(shard))]


def _anywhere(shards: Shards, file: RemoteFile) -> RemoteFile:
    """A file of one remote set as that of any other."""
    assert shards.store is not None
    return file._replace(name=shards.store.url(file.name))


def require_cache(splits: Sequence[Shards], num_mixed: int = SHUFFLE_WINDOW) -> None:
    """Raise UserError where a cache has no room for shards that are mixed: each would be fetched again for nearly every sample."""
    remote = [shards for shards in splits if shards.store is not None and shards.store.cache is not None]
    most, caches = 0, [shards.store.cache for shards in remote if shards.store is not None and shards.store.cache is not None]
    for shards in remote:
        indexes_S = np.array([shards.index_file(shard).size for shard in range(len(shards))])
        most += int(np.sort(shards.num_bytes + indexes_S)[-num_mixed:].sum())
    if remote and caches[0].max_bytes < most:
        count = sum(min(num_mixed, len(shards)) for shards in remote)
        raise UserError(
            f"data.cache_bytes is {caches[0].max_bytes:,}; {count} shards of {', '.join(shards.where for shards in remote)}, whose samples "
            f"are mixed, take {most:,}. Allow twice as much, so that the next ones are fetched ahead."
        )


class TrainStream:
    """The endless stream of one rank's batches from `start_step` on. Where ranks run as one process group, all make it together.

    Args:
        sources: the splits that are read; a folder is one split.
        spec: the model that reads it: size and preprocessing of images, tokenizer and context length of captions.
        record: folder of the run: keeps the set of damaged samples over a resume, and the list of faults.
        on_epoch: told at the end of each source's epoch what was skipped and cut; by default the console is, where something was.

    Raises:
        UserError: fewer samples are intact than a batch takes of a source, more than the limit are damaged, `check` is unknown, captions
            have none of the names that are asked for, or there is too little shared memory for the workers; while reading, more than the
            limit turn out damaged, or a worker fails.
    """

    def __init__(
        self,
        sources: Path | Sequence[Source],
        spec: ModelSpec,
        settings: StreamSettings,
        *,
        start_step: int = 0,
        record: Path | None = None,
        on_epoch: Callable[[EpochReport], None] = print_report,
    ) -> None:
        rank, world_size, batch_size = settings.rank, settings.world_size, settings.global_batch_size
        self.sources = (Source(sources),) if isinstance(sources, Path) else tuple(sources)
        reader, shared = JoinedReader.of(self.sources), several_ranks() and dist.get_world_size() == world_size
        share, image, captions = batch_size // world_size, 3 * spec.image_size**2, settings.captions_per_image
        need = functools.partial(
            require_shared_memory,
            settings.num_workers,
            [share * image, share * captions * 8 * spec.context_length, share * 8 * (1 + captions)],
        )
        on_first_rank(need) if shared else need()
        splits = [own.shards for own in reader.readers]
        require_cache(splits)
        findings = [self._faults(source, reader, settings, record, shared) for source in range(len(self.sources))]
        orders = [
            EpochOrder(own.shards.samples, found.positions(), source_seed(settings.seed, source))
            for source, (own, found) in enumerate(zip(reader.readers, findings, strict=True))
        ]
        self._order = MixedOrder(orders, reader.starts, Pattern([source.share for source in self.sources]))
        self._start, self._batch_size, self._pool = start_step, batch_size, settings.pool
        self._met: list[set[int]] = [set() for _ in self.sources]
        require_samples([split.where for split in splits], self._order.num_intact.tolist(), self._order.pattern, batch_size, settings.pool)
        look = functools.partial(require_names, reader, self._order, self._seen(start_step))
        on_first_rank(look) if shared else look()
        fractions = self._order.pattern.fractions(batch_size, share * rank, share)
        self._logs = [
            FaultLog(
                known,
                len(reader.readers[source]),
                share=fractions[source],
                max_bad_fraction=settings.max_bad_fraction,
                file=fault_list(record, rank, self._label(source)),
                context_length=spec.context_length,
                on_epoch=on_epoch if rank == 0 else _only_new(on_epoch, known),
                what=splits[source].where,
                source=self.sources[source].name,
                captions_per_image=captions,
            )
            for source, known in enumerate(findings)
        ]
        self._loader: DataLoader[tuple[Batch, _News]] = DataLoader(
            _Pairs(reader, self._order, spec, settings),
            batch_size=None,
            sampler=_Steps(self._order, settings, start_step, splits),
            pin_memory=torch.cuda.is_available(),
            # Its draw for the workers, on which nothing here depends, does not touch the global state.
            generator=torch.Generator().manual_seed(settings.seed),
            **worker_options(settings.num_workers),
        )

    def _label(self, source: int) -> str:
        """What tells the files of several sources in a run's folder apart."""
        return f"-source{source}" if len(self.sources) > 1 else ""

    def _faults(self, source: int, reader: JoinedReader, settings: StreamSettings, record: Path | None, shared: bool) -> Findings:
        return known_faults(
            self.sources[source].folder,
            reader.readers[source],
            check=settings.check,
            max_bad_fraction=settings.max_bad_fraction,
            record=record,
            rank=settings.rank,
            threads=num_threads(),
            shared=shared,
            label=self._label(source),
        )

    def _seen(self, step: int) -> int:
        """Positions of the order that are read in the first `step` steps."""
        position = step * self._batch_size
        return position if self._pool is None else min(position, self._pool)

    def figures(self, step: int) -> dict[str, float]:
        """How many epochs of each source have been read after `step` steps: `epochs`, or `epochs/NAME` of several sources.

        Of a pool, how often it has been walked through: `pool_passes`.
        """
        if self._pool is not None:
            return {"pool_passes": step * self._batch_size / self._pool}
        counts = self._order.pattern.counts(step * self._batch_size) / self._order.num_intact
        return {
            f"epochs/{source.name}" if source.name else "epochs": float(count) for source, count in zip(self.sources, counts, strict=True)
        }

    def __iter__(self) -> Iterator[Batch]:
        step = self._start
        for batch, news in from_workers(self._loader):
            # torch's loader makes lists of tuples that are not keys.
            for source, epoch in sorted({(*of,) for of, _ in news.faults}):
                self._note_faults(source, epoch, step, [fault for of, fault in news.faults if (*of,) == (source, epoch)])
            if self._seen(step + 1) > self._seen(step):
                self._note_captions(step, news)
            yield batch
            step += 1

    def _note_faults(self, source: int, epoch: int, step: int, faults: list[Fault]) -> None:
        if self._pool is not None:  # each pass meets them again
            faults = [fault for fault in faults if fault.index not in self._met[source]]
            self._met[source].update(fault.index for fault in faults)
        self._logs[source].add(epoch, step, faults)

    def _note_captions(self, step: int, news: _News) -> None:
        for (source, epoch), count in news.read.items():
            of = (source, epoch)
            self._logs[source].add_captions(epoch, count, news.cut.get(of, 0), news.repeated.get(of, 0), news.lacking.get(of, {}))
        before, whole = self._order.epochs(self._seen(step)), self._order.epochs(self._seen(step + 1))
        for source in np.flatnonzero(whole > before).tolist():
            for epoch in range(before[source], whole[source]):
                self._logs[source].end_epoch(epoch)


def _only_new(on_epoch: Callable[[EpochReport], None], known: Findings) -> Callable[[EpochReport], None]:
    """Reports of ranks but the first: what all know is the first's to tell."""
    shared = known.counts

    def report(found: EpochReport) -> None:
        own = dict(Counter(found.skipped) - shared)
        on_epoch(replace(found, skipped=own))

    return report
