"""A pool of samples: the first ones of an order, walked through again and again."""

from __future__ import annotations

import functools

import numpy as np

from mmlg_scale.data.mixture import MixedOrder
from mmlg_scale.streams import Stream, generator


class Pool:
    """The first `size` samples of an order, in that order and then in a new one in every pass.

    A sample comes with the epoch that it has in the order, on which all that is drawn for it depends: it is the same pair in every pass.

    Args:
        size: a multiple of the batch, so that no batch has a sample twice.
    """

    def __init__(self, order: MixedOrder, size: int, seed: int) -> None:
        self.order, self.size, self.seed = order, size, seed
        self._turn, self._shuffled = 0, np.empty(0, np.int64)

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """Epoch, sample and place of every position of the first pass: int64 [size, 3]."""
        return np.stack([*self.order.places(0, self.size), np.arange(self.size)], axis=1)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Epoch, sample and place in the pool at the positions first ... first + count - 1 of one batch: int64 [count, 3]."""
        turn, inside = divmod(first, self.size)
        if turn and turn != self._turn:
            self._turn, self._shuffled = turn, generator(self.seed, Stream.POOL, turn).permutation(self.size)
        return self._table[self._shuffled[inside : inside + count] if turn else slice(inside, inside + count)]
