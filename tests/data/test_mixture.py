"""Mixtures: shares that hold after every sample, and one stream whatever ranks, workers and starts there are."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from mmlg_scale.data import mixture
from mmlg_scale.data.corpus import Corpus, open_pairs, pairs_of
from mmlg_scale.data.faults import EpochReport
from mmlg_scale.data.mixture import MixedOrder, Pattern, shares_of, source_seed
from mmlg_scale.data.order import EpochOrder
from mmlg_scale.data.pipeline import Batch, StreamSettings
from mmlg_scale.errors import UserError
from mmlg_scale.recipe import Data
from mmlg_scale.sources import Source
from tests.data.damage import KINDS
from tests.data.server import Server
from tests.data.sets import BATCH, DAMAGED, SIZES, WEIGHTS, assert_same, batches, keys, mixture_of, write_set
from tests.data.specs import spec_for

# The pattern.


@pytest.mark.parametrize(
    "weights",
    [
        [1.0],
        [1.0, 1.0],
        [0.7, 0.2, 0.1],
        [1.0, 2.0, 3.0, 5.0, 7.0, 11.0, 13.0],
        [0.34, 0.33, 0.33],
        [0.999, 0.0005, 0.0005],
        [12_423_374.0, 3_318_333.0, 14_999.0],
        [math.pi, math.e, math.sqrt(2.0), 0.01],
        [1e300, 1e300, 2e300],
        [1.0 + 0.001 * index**2 for index in range(40)],
        [1.0] * 256,
    ],
    ids=lambda weights: f"{len(weights)}-{weights[0]:.6g}",
)
def test_shares_hold_to_one_sample_after_every_position(weights: list[float]) -> None:
    """Counted one by one over two periods, in whole numbers; and each source's samples are numbered without a gap."""
    shares = shares_of(weights, "data.sources")
    pattern = Pattern(shares)
    period, total = pattern.period, sum(Fraction(repr(weight)) for weight in weights)
    assert period <= mixture.MAX_PERIOD
    sources, numbers = pattern.places(0, 2 * period + 3)
    positions = np.arange(1, 2 * period + 4)
    for source, weight in enumerate(weights):
        share = Fraction(int(pattern.shares[source]), period)
        assert abs(share - Fraction(repr(weight)) / total) < Fraction(1, mixture.MAX_PERIOD)
        here = sources == source
        deviations = np.abs(np.cumsum(here) * period - int(pattern.shares[source]) * positions)  # of share times positions, times period
        assert deviations.max() < period
        assert np.array_equal(numbers[here], np.arange(here.sum()))


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [3.0, 1.0], [1.0, 2.0, 4.0], [2.5, 0.25, 0.05]])
def test_shares_of_a_few_decimals_are_exact(weights: list[float]) -> None:
    exact = [Fraction(repr(weight)) for weight in weights]
    pattern = Pattern(shares_of(weights, "data.sources"))
    assert [Fraction(int(share), pattern.period) for share in pattern.shares] == [weight / sum(exact) for weight in exact]


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.125, 0.075], [12_423_374.0, 3_318_333.0, 113_287.0, 52_001.0]])
@pytest.mark.parametrize("position", [0, 1, 17, 200_000, 10**6 * 4096 + 5, 4 * 10**15 + 7])
def test_any_position_is_found_without_those_before_it(position: int, weights: list[float]) -> None:
    pattern = Pattern(shares_of(weights, "data.sources"))
    period = pattern.period
    once = pattern.places(0, 3 * period)
    periods, inside = divmod(position, period)
    sources, numbers = pattern.places(position, period)
    assert np.array_equal(sources, once[0][inside : inside + period])
    assert np.array_equal(numbers, once[1][inside : inside + period] + periods * pattern.shares[sources])
    counts = pattern.counts(position)
    assert counts.sum() == position
    for source, count in enumerate(counts.tolist()):
        assert abs(count * period - int(pattern.shares[source]) * position) < period
        assert count in numbers[sources == source]  # the first of what comes next
    assert sum(array.nbytes for array in pattern._table) <= 6 * period + 8 * (period // 4096 + 1) * 4


def test_no_run_of_positions_takes_more_than_is_allowed_for() -> None:
    for weights in ([0.7, 0.2, 0.1], [1.0, 2.0, 3.0, 5.0, 7.0]):
        pattern = Pattern(shares_of(weights, "data.sources"))
        before = np.stack([pattern.counts(position) for position in range(3 * pattern.period)])
        for count in (1, 2, 7, pattern.period, pattern.period + 3):
            assert ((before[count:] - before[:-count]).max(axis=0) <= pattern.most(count)).all()


def test_the_part_of_a_source_that_is_a_ranks() -> None:
    """Two sources in turn, one row each: a rank may have the whole of one source."""
    pattern = Pattern([1, 1])
    assert [pattern.fractions(2, rank, 1) for rank in range(2)] == [[1.0, 0.5], [0.5, 1.0]] or [
        pattern.fractions(2, rank, 1) for rank in range(2)
    ] == [[0.5, 1.0], [1.0, 0.5]]
    assert Pattern([1]).fractions(12, 3, 3) == [0.25]
    assert Pattern([2, 1]).fractions(8, 4, 4) == pytest.approx([0.5, 0.5], abs=1e-3)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([0.0, 1.0], r"data.sources\[0\].weight: is 0.0. Use a positive number"),
        ([1.0, -2.0], r"data.sources\[1\].weight: is -2.0"),
        ([1.0, math.nan], r"data.sources\[1\].weight: is nan"),
        ([math.inf], r"data.sources\[0\].weight: is inf"),
        ([1.0, 1e300], r"data.sources\[0\].weight: 1 is less than a 262,144th of all weights together. Raise it"),
        ([1e-300, 1.0], r"data.sources\[0\].weight: 1e-300 is less than a 262,144th"),
        ([1.0, 5e-324], r"data.sources\[1\].weight: 4.94066e-324 is less"),
        ([1e6, 1.0, 1.0], r"data.sources\[1\].weight: 1 is less"),
    ],
)
def test_weights_that_cannot_be_followed_are_refused(weights: list[float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        shares_of(weights, "data.sources")


# The order.


def test_each_source_goes_through_its_own_epochs_also_far_on() -> None:
    sizes, shares = [7, 30, 11], [2, 5, 3]
    orders = [EpochOrder(np.array([size]), np.array([2]), source_seed(9, source)) for source, size in enumerate(sizes)]
    starts = np.cumsum([0, *sizes])
    order = MixedOrder(orders, starts, Pattern(shares))
    epochs, samples = order.places(0, 4000)
    sources = np.searchsorted(starts, samples, side="right") - 1
    for source, size in enumerate(sizes):
        own, of = samples[sources == source] - starts[source], epochs[sources == source]
        whole = len(own) // (size - 1) * (size - 1)
        for epoch, row in enumerate(own[:whole].reshape(-1, size - 1)):
            assert sorted(row.tolist()) == sorted(set(range(size)) - {2})
            assert (of[epoch * (size - 1) : (epoch + 1) * (size - 1)] == epoch).all()
    for first in (1, 333, 3999):
        assert np.array_equal(order.places(first, 1)[1], samples[first : first + 1])
    far = 10**6 * 4096 + 3
    epochs, samples = order.places(far, 10)  # as quickly: its parts are asked for nothing else
    assert [epoch for epoch in epochs.tolist() if epoch < far * 0.2 / 29] == []
    assert len(orders[1]._epochs) <= 2
    assert (order.epochs(far) == Pattern(shares).counts(far) // [6, 29, 10]).all()


def test_sources_of_one_form_have_different_orders_and_the_first_has_its_own() -> None:
    seeds = [source_seed(5, source) for source in range(50)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 50
    assert source_seed(6, 1) != seeds[1]
    orders = [EpochOrder(np.array([40]), np.zeros(0, np.int64), seed).places(0, 40)[1].tolist() for seed in seeds[:3]]
    assert orders[0] != orders[1] != orders[2]


# The stream.


def test_a_mixture_of_one_is_the_set(root: Path) -> None:
    alone = batches(Data(path=str(root / "large")), root, 14)
    assert_same(batches(mixture_of(root, "large"), root, 14), alone)
    assert pairs_of(mixture_of(root, "large")).digest() == open_pairs(root / "large").digest()


def require_whole_epochs(read: list[str]) -> dict[str, int]:
    """Keys in the order of reading: of each source, whole epochs of its intact samples and the beginning of one more; epochs by source."""
    counts = {}
    for name, size in SIZES.items():
        intact = {f"{name}-{index:05d}" for index in range(size)} - {f"{name}-{index:05d}" for index in DAMAGED[name]}
        own = [key for key in read if key.startswith(name)]
        counts[name] = len(own) // len(intact)
        for epoch in range(counts[name] + 1):
            part = own[epoch * len(intact) : (epoch + 1) * len(intact)]
            assert len(set(part)) == len(part)  # none is repeated
            assert set(part) == intact if len(part) == len(intact) else set(part) < intact  # none is lost
    return counts


@pytest.mark.parametrize("num_workers", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_one_stream_for_all_ranks_workers_and_starts(num_workers: int, root: Path) -> None:
    """1, 2 and 4 ranks, stopped and resumed in the middle of windows: the same samples, images and captions."""
    data = mixture_of(root)
    whole = batches(data, root, 50)
    counts = require_whole_epochs([key for batch in keys(data, whole) for key in batch])
    assert counts == {"small": 600 * 2 // 10 // 21, "middle": 600 * 3 // 10 // 44, "large": 600 * 5 // 10 // 147}
    for world_size in (1, 2, 4):
        # Step 9 is in the second of the large set's three windows, and in the first epochs of the others' middle.
        for start, stop in ((0, 9), (9, 20)):
            parts = [
                batches(data, root, stop - start, start_step=start, rank=rank, world_size=world_size, num_workers=num_workers)
                for rank in range(world_size)
            ]
            joined = [
                Batch(*(torch.cat([getattr(part[step], name) for part in parts]) for name in vars(parts[0][step])))
                for step in range(stop - start)
            ]
            assert_same(joined, whole[start:stop])


def test_it_is_resumed_at_a_far_step_as_at_the_first(root: Path) -> None:
    data = mixture_of(root)
    one = batches(data, root, 3, start_step=10**6)
    assert_same(one[1:], batches(data, root, 2, start_step=10**6 + 1, cache_decoded=False))
    counts = Counter(key.partition("-")[0] for batch in keys(data, one) for key in batch)
    assert all(abs(counts[name] - 3 * BATCH * weight) <= 1 for name, weight in WEIGHTS.items())


@pytest.mark.parametrize("augment", ["crop", "resized_crop"])
def test_augmentations_follow_a_sample_wherever_it_is_read(augment: str, root: Path) -> None:
    data = mixture_of(root)
    whole = batches(data, root, 8, augment=augment)
    assert_same(batches(data, root, 3, start_step=5, augment=augment, cache_decoded=False), whole[5:])


def test_epochs_of_each_source_are_told_and_noted(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports: list[EpochReport] = []
    settings = StreamSettings(global_batch_size=BATCH, seed=5, max_bad_fraction=0.1, check="decode")
    corpus = Corpus(pairs_of(mixture_of(root)), spec_for(root / "small"))
    stream = corpus.stream(settings, record=tmp_path, on_epoch=reports.append)
    list(islice(stream, 50))
    ended = Counter(report.source for report in reports)
    assert ended == {"small": 120 // 21, "middle": 180 // 44, "large": 300 // 147}
    assert [report.epoch for report in reports if report.source == "middle"] == list(range(180 // 44))
    assert {report.source: (report.num_intact, report.skipped) for report in reports} == {
        "small": (21, {}),
        "middle": (44, {"undecodable image": 2}),
        "large": (147, {"undecodable image": 3}),
    }
    assert stream.figures(50) == {"epochs/small": 120 / 21, "epochs/middle": 180 / 44, "epochs/large": 300 / 147}
    assert stream.figures(0) == {"epochs/small": 0.0, "epochs/middle": 0.0, "epochs/large": 0.0}
    assert corpus.name_of(21).endswith("middle/train/shard-000000.tar/middle-00000")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"data-faults-source{source}-rank0.jsonl" for source in (1, 2)),
        *(f"data-skipped-source{source}.json" for source in range(3)),
    ]
    assert len((tmp_path / "data-faults-source2-rank0.jsonl").read_text().splitlines()) == 3
    list(islice(corpus.stream(settings), 50))
    assert "middle, epoch 0: 2 samples skipped (undecodable image 2)" in capsys.readouterr().out


def test_the_limit_on_damage_is_each_sources_own(root: Path) -> None:
    """Of the middle set 4.3 % are damaged, of all samples 2.3 %."""
    with pytest.raises(UserError, match=r"middle/train: 2 damaged samples .* are more than data.max_bad_fraction 0.03"):
        batches(mixture_of(root), root, 1, max_bad_fraction=0.03)


def test_damage_that_comes_later_is_met_within_its_source(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "copy")
    data = mixture_of(tmp_path / "copy")
    whole = batches(data, root, 6, record=tmp_path / "run")
    KINDS["image cut"][0](tmp_path / "copy" / "small" / "train", 2, 1)
    again = batches(data, root, 6, record=tmp_path / "run", cache_decoded=False)
    changed = [
        (one, other)
        for left, right in zip(keys(data, whole), keys(data, again), strict=True)
        for one, other in zip(left, right, strict=True)
    ]
    replaced = {one: other for one, other in changed if one != other}
    assert set(replaced) == {"small-00009"}
    assert replaced["small-00009"].startswith("small-")


def test_too_small_a_source_for_its_weight_is_refused(root: Path) -> None:
    data = Data(sources=[Source(str(root / "small"), 9.0), Source(str(root / "large"), 1.0)])
    with pytest.raises(
        UserError, match=r"small/train has 21 samples, batch_size is 40, 37 of them of this source. Use a smaller batch, a smal"
    ):
        batches(data, root, 1, global_batch_size=40)


def test_a_remote_source_is_read_as_a_local_one(tmp_path: Path) -> None:
    root = tmp_path
    for name, size in SIZES.items():
        write_set(root / name, size)
    server = Server(root / "large")
    try:
        data = mixture_of(root)
        local = batches(data, root, 20, check="structure")
        assert data.sources is not None
        data.sources[2].path, data.cache_dir, data.cache_bytes = server.url, str(tmp_path / "cache"), 10**9
        assert_same(batches(data, root, 20, check="structure"), local)
        data.cache_bytes = 20_000
        with pytest.raises(UserError, match=r"data\.cache_bytes is 20,000; 16 shards of http://.*/train, whose samples are mixed, take"):
            batches(data, root, 1, check="structure")
        data.cache_dir = None
        with pytest.raises(UserError, match=r"recipe key data.sources\[2\].path: http://.* is remote. Give a folder"):
            pairs_of(data)
    finally:
        server.close()
