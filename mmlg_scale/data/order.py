"""Position -> (epoch, sample): the order in which a split is read, with nothing as large as the split.

Positions count through an endless row of epochs, each a permutation of the intact samples. An epoch shuffles the shards, cuts them into
windows of consecutive ones, and shuffles the samples inside each window, so that reading stays near-sequential. A window is permuted by
itself, when its first position is asked for: its random numbers are a function of (seed, epoch, window), and where it begins follows from
how many intact samples the shards before it have.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from mmlg_scale.streams import Stream, generator

SHUFFLE_WINDOW = 16
"""Shards whose samples are mixed."""
KEPT_WINDOWS = 4
"""Permutations that are kept: a batch may touch two windows, loader workers run ahead."""


class _Epoch(NamedTuple):
    """The shards in reading order, where their windows begin [W + 1], and the generator's state behind the draw of the shards."""

    shards: np.ndarray
    starts: np.ndarray
    state: Any


class EpochOrder:
    """The order of a split's intact samples over all epochs.

    Args:
        shard_sizes: samples of each shard, [S].
        damaged: the samples that are left out, sorted and each once, int64 [F].
        window: shards whose samples are mixed.
    """

    def __init__(self, shard_sizes: np.ndarray, damaged: np.ndarray, seed: int, *, window: int = SHUFFLE_WINDOW) -> None:
        self.seed, self.window = seed, window
        self._starts = np.concatenate([[0], np.cumsum(shard_sizes, dtype=np.int64)])
        self._damaged = np.asarray(damaged, np.int64)
        self._edges = np.searchsorted(self._damaged, self._starts)
        self._intact = np.diff(self._starts) - np.diff(self._edges)
        self._ends = np.cumsum(self._intact)
        self._filled = np.flatnonzero(self._intact)
        self.num_intact = int(self._intact.sum())
        self._epochs = OrderedDict[int, _Epoch]()
        self._windows = OrderedDict[tuple[int, int], np.ndarray]()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_epochs": OrderedDict(), "_windows": OrderedDict()}

    def __call__(self, position: int) -> tuple[int, int]:
        """(epoch, sample) at a position."""
        epochs, samples = self.places(position, 1)
        return int(epochs[0]), int(samples[0])

    def places(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and samples at the positions first ... first + count - 1: int64 [count] each."""
        epochs, samples, done = np.empty(count, np.int64), np.empty(count, np.int64), 0
        while done < count:
            epoch, offset = divmod(first + done, self.num_intact)
            starts = self._epoch(epoch).starts
            number = int(np.searchsorted(starts, offset, side="right")) - 1
            inside = offset - int(starts[number])
            part = self._samples(epoch, number)[inside : inside + count - done]
            epochs[done : done + len(part)], samples[done : done + len(part)] = epoch, part
            done += len(part)
        return epochs, samples

    def window_at(self, position: int) -> tuple[int, int]:
        """(epoch, window) that a position is in."""
        epoch, offset = divmod(position, self.num_intact)
        return epoch, int(np.searchsorted(self._epoch(epoch).starts, offset, side="right")) - 1

    def window_shards(self, epoch: int, number: int) -> list[int]:
        """The shards of a window; of a number beyond the epoch's last, those of the next epoch's first."""
        order = self._epoch(epoch)
        if number >= len(order.starts) - 1:
            epoch, number, order = epoch + 1, 0, self._epoch(epoch + 1)
        return [int(shard) for shard in order.shards[number * self.window : (number + 1) * self.window]]

    def intact(self, number: int) -> int:
        """The intact sample that `number` others come before in the split's own order."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return int(self._of_shard(shard)[number - (int(self._ends[shard - 1]) if shard else 0)])

    def _of_shard(self, shard: int) -> np.ndarray:
        """The intact samples of a shard."""
        start = self._starts[shard]
        whole = np.arange(start, self._starts[shard + 1])
        return np.delete(whole, self._damaged[self._edges[shard] : self._edges[shard + 1]] - start)

    def _epoch(self, epoch: int) -> _Epoch:
        found = self._epochs.get(epoch)
        if found is None:
            draws = generator(self.seed, Stream.EPOCH_ORDER, epoch)
            shards = self._filled[draws.permutation(len(self._filled))]
            ends = np.cumsum(self._intact[shards])
            lasts = np.append(np.arange(self.window, len(shards), self.window), len(shards)) - 1
            found = self._epochs[epoch] = _Epoch(shards, np.concatenate([[0], ends[lasts]]), draws.bit_generator.state)
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return found

    def _samples(self, epoch: int, number: int) -> np.ndarray:
        """The samples of a window in reading order."""
        found = self._windows.get((epoch, number))
        if found is None:
            order = self._epoch(epoch)
            shards = order.shards[number * self.window : (number + 1) * self.window]
            # The first window continues the epoch's numbers, so that a split of one window is read as by earlier versions.
            draws = generator(self.seed, Stream.WINDOW_ORDER, epoch, number)
            if number == 0:
                draws = generator(self.seed, Stream.EPOCH_ORDER, epoch)
                draws.bit_generator.state = order.state
            found = self._windows[epoch, number] = draws.permutation(np.concatenate([self._of_shard(int(shard)) for shard in shards]))
            if len(self._windows) > KEPT_WINDOWS:
                self._windows.popitem(last=False)
        self._windows.move_to_end((epoch, number))
        return found
