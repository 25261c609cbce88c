"""Position -> (epoch, sample), by brute force: every epoch a permutation of the intact samples, the same from wherever one starts."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlg_scale.data.order import SHUFFLE_WINDOW, EpochOrder


def order_of_earlier_versions(shard_sizes: list[int], damaged: list[int], seed: int, epoch: int) -> np.ndarray:
    """What the first version did: one generator an epoch, one array of the whole split."""
    whole = np.setdiff1d(np.arange(sum(shard_sizes)), damaged)
    edges = np.cumsum(shard_sizes)
    shards = [part for part in np.split(whole, np.searchsorted(whole, edges[:-1])) if len(part)]
    draws = np.random.default_rng([seed, epoch])
    order = draws.permutation(len(shards))
    windows = [order[i : i + 16] for i in range(0, len(order), 16)]
    return np.concatenate([draws.permutation(np.concatenate([shards[s] for s in window])) for window in windows])


@st.composite
def splits(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(any))
    samples = st.integers(0, sum(sizes) - 1)
    damaged = draw(st.sets(samples, max_size=min(20, sum(sizes) - 1)))
    return sizes, sorted(damaged), draw(st.integers(1, 20))


@settings(max_examples=150, deadline=None)
@given(split=splits(), seed=st.integers(0, 2**40))
def test_every_epoch_is_a_permutation_of_the_intact_samples(split: tuple[list[int], list[int], int], seed: int) -> None:
    sizes, damaged, window = split
    order = EpochOrder(np.array(sizes), np.array(damaged, np.int64), seed, window=window)
    intact = np.setdiff1d(np.arange(sum(sizes)), damaged)
    assert order.num_intact == len(intact)
    epochs, samples = order.places(0, 3 * len(intact) + 1)
    for epoch in range(3):
        part = slice(epoch * len(intact), (epoch + 1) * len(intact))
        assert (epochs[part] == epoch).all()
        assert np.array_equal(np.sort(samples[part]), intact)
        # Samples of one window follow each other: those of the shards in it, and of no other.
        shards = np.searchsorted(np.cumsum(sizes), samples[part], side="right")
        seen = list(dict.fromkeys(shards.tolist()))
        last = {shard: int(np.flatnonzero(shards == shard)[-1]) for shard in seen}
        first = {shard: int(np.flatnonzero(shards == shard)[0]) for shard in seen}
        filled = len(seen)
        ranked = sorted(seen, key=lambda shard: last[shard])
        for number in range(window, filled, window):
            assert max(last[shard] for shard in ranked[:number]) < min(first[shard] for shard in ranked[number:])
    assert [order.intact(number) for number in range(len(intact))] == intact.tolist()


@settings(max_examples=60, deadline=None)
@given(split=splits(), seed=st.integers(0, 100), data=st.data())
def test_places_are_the_same_from_wherever_one_starts(split: tuple[list[int], list[int], int], seed: int, data: st.DataObject) -> None:
    sizes, damaged, window = split
    order = EpochOrder(np.array(sizes), np.array(damaged, np.int64), seed, window=window)
    total = 4 * order.num_intact
    epochs, samples = order.places(0, total)
    fresh = pickle.loads(pickle.dumps(order))
    for _ in range(4):
        first = data.draw(st.integers(0, total - 1))
        count = data.draw(st.integers(1, total - first))
        for one in (order, fresh):
            found = one.places(first, count)
            assert np.array_equal(found[0], epochs[first : first + count])
            assert np.array_equal(found[1], samples[first : first + count])
        assert fresh(first) == (epochs[first], samples[first])


@settings(max_examples=60, deadline=None)
@given(split=splits(), seed=st.integers(0, 2**32))
def test_a_split_of_one_window_is_read_as_by_earlier_versions(split: tuple[list[int], list[int], int], seed: int) -> None:
    sizes, damaged, _ = split
    sizes = sizes[:SHUFFLE_WINDOW]
    damaged = [sample for sample in damaged if sample < sum(sizes)]
    if len(damaged) == sum(sizes):
        return
    order = EpochOrder(np.array(sizes), np.array(damaged, np.int64), seed)
    for epoch in range(3):
        _, samples = order.places(epoch * order.num_intact, order.num_intact)
        assert np.array_equal(samples, order_of_earlier_versions(sizes, damaged, seed, epoch))


def test_the_shuffle_stays_inside_a_window_and_windows_differ() -> None:
    order = EpochOrder(np.full(40, 10), np.zeros(0, np.int64), seed=0)
    samples = order.places(0, 400)[1]
    first = {index // 10 for index in samples[:160].tolist()}
    assert len(first) == 16  # one window: sixteen whole shards, nothing of the others
    assert not np.array_equal(samples[:160], np.sort(samples[:160]))
    ranks = [np.argsort(np.argsort(samples[start : start + 160])).tolist() for start in (0, 160)]
    assert ranks[0] != ranks[1]  # each window is drawn for itself
    assert samples.tolist() != order.places(400, 400)[1].tolist()


@pytest.mark.parametrize("samples_per_shard", [3, 10_000])
def test_nothing_is_as_large_as_the_split(samples_per_shard: int) -> None:
    """What is kept after reading here and there in a hundred epochs is a few windows, and travels without them."""
    num_shards = 1_000
    order = EpochOrder(np.full(num_shards, samples_per_shard), np.zeros(0, np.int64), seed=1)
    for epoch in range(100):
        order.places(epoch * order.num_intact + epoch * samples_per_shard, 5)
    assert len(order._windows) <= 4
    assert max(len(window) for window in order._windows.values()) <= SHUFFLE_WINDOW * samples_per_shard
    assert len(pickle.dumps(order)) < 100 * num_shards
