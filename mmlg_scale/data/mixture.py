"""Several data sets read as one: which source each sample comes from, and the sources' samples under common numbers.

Positions of a stream go to sources in a fixed pattern that follows from the weights alone, and a source's positions go through its own
endless row of epochs (`order.py`). Both are arithmetic on a table of one period, so that any position costs the same and nothing is kept.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from mmlg_scale.data.captions import CaptionRule, Texts
from mmlg_scale.data.order import EpochOrder
from mmlg_scale.data.reader import DamagedSample, ShardReader
from mmlg_scale.data.store import Store
from mmlg_scale.errors import UserError
from mmlg_scale.reading import shown
from mmlg_scale.streams import Stream, generator

MAX_PERIOD = 2**18
"""Positions after which a pattern repeats at the latest: 1.5 MB, and a third of a second when a stream is made."""
PROBED = 256
"""Samples in which each name of a caption rule is looked for before the first step."""
_FEW = 64
_GRID = 4096
OPEN_FILES = 512
"""Shards that the readers of all sources keep open together: many systems give a process 1,024 files."""


@dataclass(frozen=True)
class Source:
    """A split that a stream reads.

    Attributes:
        folder: the split; of a remote set, the copy of its manifest.
        store: where its shards are, if not in `folder`.
        share: its part of all positions, relative to the other sources'.
        rule: which captions are read; None: the ordinary ones.
        name: for people and figures; "" where there is one source only.
    """

    folder: Path
    store: Store | None = None
    share: int = 1
    rule: CaptionRule | None = None
    name: str = ""


def shares_of(weights: Sequence[float], key: str) -> list[int]:
    """Weights as whole numbers in the same proportions, whose sum is the pattern's period.

    Weights count as the decimal numbers that they are printed as. Where that would make a period of more than MAX_PERIOD, shares are
    rounded to multiples of 1 / MAX_PERIOD by the largest remainders.

    Args:
        key: of the list in the recipe, which starts messages.

    Raises:
        UserError: a weight is not a positive, finite number, or less than a MAX_PERIOD-th of all together.
    """
    for index, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"recipe key {key}[{index}].weight: is {weight}. Use a positive number, or leave the source out.")
    exact = [Fraction(repr(weight)) for weight in weights]
    total = sum(exact)
    parts = [weight / total for weight in exact]
    period = math.lcm(*(part.denominator for part in parts))
    if period <= MAX_PERIOD:
        return [int(part * period) for part in parts]
    shares = [int(part * MAX_PERIOD) for part in parts]
    for index, share in enumerate(shares):
        if not share:
            raise UserError(
                f"recipe key {key}[{index}].weight: {weights[index]:g} is less than a {MAX_PERIOD:,}th of all weights together. Raise it, "
                "or leave the source out."
            )
    by_remainder = sorted(range(len(parts)), key=lambda index: shares[index] - parts[index] * MAX_PERIOD)
    for index in by_remainder[: MAX_PERIOD - sum(shares)]:
        shares[index] += 1
    return shares


class Pattern:
    """The source of every position: of the first t, source i has floor(p t) or ceil(p t), p being its share of all.

    Sample j of a source is due in the positions from floor(j / p) to before ceil((j + 1) / p); a proportionate schedule, which keeps all
    of these, exists for any shares (Baruah, Cohen, Plaxton & Varvel 1996), and for jobs of one position each the earliest deadline first
    is one. It repeats after `period` positions, in which every source has a whole number of samples: a table of one period is all.

    Args:
        shares: positions of each source in a period.
    """

    def __init__(self, shares: Sequence[int]) -> None:
        divisor = math.gcd(*shares)
        self.shares = np.array([share // divisor for share in shares], np.int64)
        self.period = int(self.shares.sum())
        assert (self.shares > 0).all()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_table"}  # made again where it is needed

    @functools.cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source of each position of a period, how many of the source come before it in the period, [period] each, and how many of each
        source come before every _GRID-th position."""
        sources, num_sources = _schedule(self.shares), len(self.shares)
        order = np.argsort(sources, kind="stable")
        before = np.empty(self.period, np.int32)
        before[order] = np.arange(self.period) - np.repeat(np.cumsum(self.shares) - self.shares, self.shares)
        cells = np.arange(self.period) // _GRID * num_sources + sources
        counts = np.bincount(cells, minlength=(self.period // _GRID + 1) * num_sources).reshape(-1, num_sources)
        return sources, before, np.cumsum(counts, axis=0) - counts

    def places(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each position first ... first + count - 1, and the number of the source's own position: int64 [count] each."""
        sources, before, _ = self._table
        periods, inside = np.divmod(np.arange(first, first + count), self.period)
        found = sources[inside].astype(np.int64)
        return found, periods * self.shares[found] + before[inside]

    def counts(self, position: int) -> np.ndarray:
        """Samples of each source before a position: int64 [n]."""
        periods, inside = divmod(position, self.period)
        sources, _, counts = self._table
        cell = inside // _GRID
        return periods * self.shares + counts[cell] + np.bincount(sources[cell * _GRID : inside], minlength=len(self.shares))

    def fractions(self, batch_size: int, first: int, count: int) -> list[float]:
        """The part of each source's samples that lies in the rows first ... first + count - 1 of batches: of whole batches from the start.

        Ranks need not have equal parts of a source: where the pattern's period divides the batch, each has the same rows of every batch.
        A source that these rows hardly meet counts as if its samples were spread evenly.
        """
        steps = max(1, MAX_PERIOD // batch_size)
        sources = self.places(0, steps * batch_size)[0].reshape(steps, batch_size)
        own, every = (np.bincount(part.ravel(), minlength=len(self.shares)) for part in (sources[:, first : first + count], sources))
        return np.where(own < _FEW, count / batch_size, own / np.maximum(every, 1)).tolist()

    def most(self, count: int) -> list[int]:
        """An upper bound of each source's samples in any `count` positions in a row."""
        if len(self.shares) == 1:
            return [count]
        return [min(count, -(-int(share) * count // self.period) + 1) for share in self.shares]


def require_samples(
    wheres: Sequence[str], counts: Sequence[int], pattern: Pattern, batch_size: int, pool: int | None = None, key: str = ""
) -> None:
    """Raise UserError where a batch or a pool would have a sample twice.

    Args:
        wheres, counts: each source, for people, and its samples.
        key: of the training in the recipe, which starts messages.
    """
    several, start = len(wheres) > 1, f"recipe key {key}: " if key else ""
    for where, count, most in zip(wheres, counts, pattern.most(batch_size), strict=True):
        if count < most:
            told, less = (f", {most} of them of this source", ", a smaller weight") if several else ("", "")
            raise UserError(
                f"{start}{where} has {count} samples, batch_size is {batch_size}{told}. Use a smaller batch{less}, or more data."
            )
    for where, count, most in zip(wheres, counts, [] if pool is None else pattern.counts(pool).tolist(), strict=pool is not None):
        if count < most:
            told = f"takes {most:,} of this source" if several else "needs as many different ones"
            raise UserError(f"{start}{where} has {count:,} samples, a teacher_pool of {pool:,} {told}. Use a smaller pool.")


def _schedule(shares_n: np.ndarray) -> np.ndarray:
    """The earliest deadline first: int16 [period]; of equal deadlines the first source's."""
    num_sources, period = len(shares_n), int(shares_n.sum())
    sources = np.repeat(np.arange(num_sources), shares_n)
    numbers = np.arange(period) - np.repeat(np.cumsum(shares_n) - shares_n, shares_n)
    of = shares_n[sources]
    releases = numbers * period // of
    order = np.argsort(releases, kind="stable")
    deadlines = -(-(numbers + 1) * period // of)
    jobs, starts = (deadlines * num_sources + sources)[order].tolist(), np.searchsorted(releases[order], np.arange(period + 1)).tolist()
    waiting, found = list[int](), np.empty(period, np.int16)
    for position in range(period):
        for job in jobs[starts[position] : starts[position + 1]]:
            heapq.heappush(waiting, job)
        found[position] = heapq.heappop(waiting) % num_sources
    return found


def source_seed(seed: int, source: int) -> int:
    """The seed of a source's order: the first one's is the stream's, so that a mixture of one is read as the set alone."""
    return seed if source == 0 else int(generator(seed, Stream.SOURCE, source).integers(2**63))


class MixedOrder:
    """Position -> (epoch, sample) over several sources; samples are numbered through all of them, as in `JoinedReader`.

    Args:
        orders: of each source.
        starts: int64 [n + 1], the number of each source's first sample.
    """

    def __init__(self, orders: Sequence[EpochOrder], starts: np.ndarray, pattern: Pattern) -> None:
        self.orders, self.starts, self.pattern = list(orders), starts, pattern
        self.num_intact = np.array([order.num_intact for order in orders])

    def places(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and samples at the positions first ... first + count - 1: int64 [count] each."""
        sources, numbers = self.pattern.places(first, count)
        epochs, samples = np.empty(count, np.int64), np.empty(count, np.int64)
        for source in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == source)  # a source's numbers follow each other
            epochs[rows], own = self.orders[source].places(int(numbers[rows[0]]), len(rows))
            samples[rows] = own + self.starts[source]
        return epochs, samples

    def substitute(self, source: int, draws: np.random.Generator) -> int:
        """A random intact sample of a source."""
        order = self.orders[source]
        return int(self.starts[source]) + order.intact(int(draws.integers(order.num_intact)))

    def epochs(self, position: int) -> np.ndarray:
        """Whole epochs of each source before a position: int64 [n]."""
        return self.pattern.counts(position) // self.num_intact


class JoinedReader:
    """The samples of several splits under common numbers: those of a source follow those of the one before.

    Raises:
        UserError: as `ShardReader`.
    """

    def __init__(self, readers: Sequence[ShardReader], rules: Sequence[CaptionRule | None] = ()) -> None:
        self.readers, self.rules = list(readers), list(rules) or [None] * len(readers)
        self.starts = np.concatenate([[0], np.cumsum([len(reader) for reader in readers])])
        self._ends = self.starts[1:].tolist()
        for reader in self.readers:
            reader.limit_open(max(1, OPEN_FILES // len(self.readers)))

    @classmethod
    def of(cls, sources: Sequence[Source]) -> JoinedReader:
        """A reader of these sources."""
        return cls([ShardReader(source.folder, source.store) for source in sources], [source.rule for source in sources])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def source(self, sample: int) -> int:
        """The source that a sample is of."""
        return int(np.searchsorted(self.starts, sample, side="right")) - 1 if len(self.readers) > 1 else 0

    def _at(self, sample: int) -> tuple[ShardReader, int]:
        source = self.source(sample)
        return self.readers[source], sample - int(self.starts[source])

    def image(self, sample: int, *args: Any, **options: Any) -> np.ndarray:
        """As `ShardReader.image`."""
        reader, index = self._at(sample)
        return reader.image(index, *args, **options)

    def crop(self, sample: int, *args: Any, **options: Any) -> np.ndarray:
        """As `ShardReader.crop`."""
        reader, index = self._at(sample)
        return reader.crop(index, *args, **options)

    def texts(self, sample: int) -> Texts:
        """All captions that may be read of a sample. Raises DamagedSample."""
        source = self.source(sample)
        return texts_of(self.readers[source], sample - int(self.starts[source]), self.rules[source])


def require_names(reader: JoinedReader, order: MixedOrder, position: int) -> None:
    """Look for the names of each rule in the first samples of one shard that is read soon; say which are not there.

    Raises:
        UserError: none of these samples has any of them.
    """
    counts = order.pattern.counts(position).tolist()
    for source, rule in enumerate(reader.rules):
        if rule is None:
            continue
        own, of = reader.readers[source].clone(), order.orders[source]
        shard = of.window_shards(*of.window_at(counts[source]))[0]
        first, found = int(own.shards.starts[shard]), list[tuple[int, ...]]()
        for index in range(first, min(first + PROBED, int(own.shards.starts[shard + 1]))):
            with contextlib.suppress(DamagedSample):
                found.append(texts_of(own, index, rule).parts)
        own.close()
        lacking = [name for place, name in enumerate(rule.names) if not any(parts[place] for parts in found)]
        if not found or not lacking:
            continue
        told = f"{', '.join(repr(shown(name)) for name in lacking)} in the first {len(found)} samples of {own.shards.told(shard)}"
        if len(lacking) == len(rule.names):
            key = "data.captions" if len(reader.rules) == 1 else f"data.sources[{source}].captions"
            raise UserError(
                f"recipe key {key}: there are no captions named {told}. Correct the names; or index the set again where an earlier version "
                "did, which left out what it did not need of a JSON."
            )
        print(f"there are no captions named {told}", flush=True)


def texts_of(reader: ShardReader, index: int, rule: CaptionRule | None) -> Texts:
    """The captions of a split's sample that `rule` may read; the ordinary ones where there is no rule. Raises DamagedSample."""
    if rule is None:
        return Texts(reader.about(index)["captions"])
    about = reader.about(index, rule.names)
    return rule.texts(about["captions"], about["named"])
