"""Random streams: no two places of any share a key, and the order of epochs is that of earlier versions."""

from __future__ import annotations

from itertools import product

import numpy as np

from mmlg_scale.streams import Stream, generator, key

POSITIONS = {
    Stream.EPOCH_ORDER: 1,
    Stream.PATCHES: 1,
    Stream.CROP: 2,
    Stream.SUBSTITUTE: 3,
    Stream.SIZES: 2,
    Stream.WINDOW_ORDER: 2,
    Stream.COLOUR: 2,
    Stream.SOURCE: 1,
    Stream.POOL: 1,
}


def test_all_places_of_all_streams_are_apart() -> None:
    """By what SeedSequence makes of the keys, which is all that the numbers depend on."""
    assert set(POSITIONS) == set(Stream)
    seen: dict[tuple[int, ...], list[int]] = {}
    for stream, parts in POSITIONS.items():
        for seed, *position in product(range(3), *[(*range(7), 2**31)] * parts):
            entropy = key(seed, stream, *position)
            state = tuple(np.random.SeedSequence(entropy).generate_state(4).tolist())
            assert state not in seen, (seen[state], entropy)
            seen[state] = entropy
    assert len(seen) == 3 * (8 + 8 + 64 + 512 + 64 + 64 + 64 + 8 + 8)


def test_why_keys_end_in_a_number() -> None:
    """What the keys guard against: short ones are padded with zeros; long ones are kept apart."""
    state = {name: np.random.SeedSequence(entropy).generate_state(4).tolist() for name, entropy in {"a": [5, 1], "b": [5, 1, 0]}.items()}
    assert state["a"] == state["b"]
    long = [np.random.SeedSequence([5, 1, 2, 3, 4, *tail]).generate_state(4).tolist() for tail in ([], [0], [0, 0], [1])]
    assert len({tuple(row) for row in long}) == 4


def test_epoch_orders_are_those_of_earlier_versions() -> None:
    assert key(3, Stream.EPOCH_ORDER, 4) == [3, 4]
    assert np.array_equal(generator(3, Stream.EPOCH_ORDER, 4).permutation(9), np.random.default_rng([3, 4]).permutation(9))
