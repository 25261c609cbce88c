"""Named streams of random numbers. Every random choice is a function of (seed, stream, position), and no two streams share one.

numpy's SeedSequence pads keys of fewer than four words with zeros, so that (seed, a) and (seed, a, 0) are the same key; longer keys it
hashes, which keeps them apart as well as any hash does. So the one hazard is a key that is another one followed by zeros, and every key but
an epoch order's ends in a number that is not zero: its stream's.
"""

from __future__ import annotations

from enum import IntEnum, unique

import numpy as np


@unique
class Stream(IntEnum):
    """What a stream is drawn for. The numbers are part of every recipe's results: never renumber, add at the end."""

    EPOCH_ORDER = 0
    """(epoch): the order of samples."""
    PATCHES = 1
    """(step): which patches stay; see `training.stages.draw_patches`."""
    CROP = 2
    """(epoch, sample): the box of a random resized crop."""
    SUBSTITUTE = 3
    """(epoch, sample, attempt): what is read in place of a sample that cannot be."""
    SIZES = 4
    """(step, student): the sizes that extraction trains."""
    WINDOW_ORDER = 5
    """(epoch, window): the order of samples in a window of shards; see `data.order`."""
    COLOUR = 6
    """(epoch, sample): the change of an image's colours."""
    SOURCE = 7
    """(source): the seed of the order of a mixture's source; see `data.mixture`."""
    POOL = 8
    """(pass): the order in which a pool of samples is walked through again; see `data.pool`."""


def key(seed: int, stream: Stream, *position: int) -> list[int]:
    """The entropy of one place of a stream.

    Epoch orders keep the key (seed, epoch) that they always had, so that data sets are read in the order of earlier versions.
    """
    if stream is Stream.EPOCH_ORDER:
        (epoch,) = position
        return [seed, epoch]
    return [seed, *position, 0x6D6D6C67, int(stream)]  # the constant keeps positions of different lengths apart


def generator(seed: int, stream: Stream, *position: int) -> np.random.Generator:
    """A generator for one place of a stream."""
    return np.random.default_rng(key(seed, stream, *position))
