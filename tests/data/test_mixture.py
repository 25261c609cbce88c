"""Mixtures: shares that hold after every sample, and one stream whatever ranks, workers and starts there are."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmlg_scale import records
from mmlg_scale.data import captions, mixture
from mmlg_scale.data.captions import CaptionRule
from mmlg_scale.data.corpus import Corpus, open_pairs, pairs_of
from mmlg_scale.data.faults import EpochReport
from mmlg_scale.data.mixture import JoinedReader, MixedOrder, Pattern, shares_of, source_seed
from mmlg_scale.data.order import EpochOrder
from mmlg_scale.data.pipeline import Batch, StreamSettings
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.errors import UserError
from mmlg_scale.recipe import Data, Recipe, Source
from mmlg_scale.recipe_file import load_recipe
from tests.data.damage import KINDS
from tests.data.server import Server
from tests.data.sets import write_set
from tests.data.specs import spec_for

SIZES = {"small": 21, "middle": 46, "large": 150}
WEIGHTS = {"small": 0.2, "middle": 0.3, "large": 0.5}
DAMAGED = {"small": [], "middle": [9, 10], "large": [0, 77, 149]}
BATCH = 12
DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def about(index: int) -> dict[str, Any]:
    """`alt` in every sample, `synthetic` (two) in two of three."""
    found: dict[str, Any] = {"alt": f"alternative {index}", "rest": 3}
    return found | ({"synthetic": [f"made up {index}", f"once more {index}"]} if index % 3 else {"synthetic": "  "})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sets of 6, 12 and 38 shards (so the last has three windows), the last two with damaged samples."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, size in SIZES.items():
        write_set(folder / name, size, about=about)
        for index in DAMAGED[name]:
            KINDS["image cut"][0](folder / name / "train", index // 4, index % 4)
    return folder


def mixture_of(root: Path, *names: str, **fields: Any) -> Data:
    chosen = [Source(str(root / name), weight) for name, weight in WEIGHTS.items() if not names or name in names]
    return Data(sources=chosen, **fields)


def batches(data: Data, root: Path, count: int, *, start_step: int = 0, record: Path | None = None, **options: Any) -> list[Batch]:
    settings = StreamSettings(**{"global_batch_size": BATCH, "seed": 5, "max_bad_fraction": 0.1, "check": "decode", **options})
    return list(islice(Corpus(pairs_of(data), spec_for(root / "small")).stream(settings, start_step, record=record), count))


def keys(data: Data, found: list[Batch]) -> list[list[str]]:
    """The keys of each batch's samples, from the tars."""
    reader = JoinedReader.of(pairs_of(data).training())

    def key(sample: int) -> str:
        source = reader.source(sample)
        return reader.readers[source].key(sample - int(reader.starts[source]))

    return [[key(sample) for sample in batch.indices_B.tolist()] for batch in found]


def assert_same(found: list[Batch], wanted: list[Batch]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.samples_B2, other.samples_B2)
        assert torch.equal(one.image_uint8_BCHW, other.image_uint8_BCHW)
        assert torch.equal(one.text_BT, other.text_BT)


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


@pytest.mark.parametrize("position", [0, 1, 17, 10**6 * 4096 + 5, 4 * 10**15 + 7])
def test_any_position_is_found_without_those_before_it(position: int) -> None:
    weights = [0.5, 0.3, 0.125, 0.075]
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
    assert all(array.shape == (period,) for array in pattern._table)


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


# Named captions.

RULE = {"synthetic": 0.75, "alt": 0.25}


def test_names_are_drawn_by_their_weights_independently_of_order_and_place() -> None:
    rule = CaptionRule.of({"b": 3.0, "a": 1.0, "c": 4.0})
    assert rule == CaptionRule.of({"c": 8.0, "a": 2.0, "b": 6.0})
    assert rule is not None
    assert rule.names == ("a", "b", "c")
    for seed in (0, 7, 2**62):
        drawn = np.array([rule.draw(seed, epoch, sample, (1, 2, 1)) for epoch in range(40) for sample in range(500)])
        found = np.bincount(drawn, minlength=4) / len(drawn)
        assert found == pytest.approx([1 / 8, 3 / 16, 3 / 16, 1 / 2], abs=0.012)  # four standard errors
        by_epoch = drawn.reshape(40, 500)
        pairs = Counter(zip((by_epoch[:-1] == 3).ravel().tolist(), (by_epoch[1:] == 3).ravel().tolist(), strict=True))
        assert all(count / (39 * 500) == pytest.approx(1 / 4, abs=0.015) for count in pairs.values())  # epochs are independent
        neighbours = Counter(zip((by_epoch[:, :-1] == 3).ravel().tolist(), (by_epoch[:, 1:] == 3).ravel().tolist(), strict=True))
        assert all(count / (40 * 499) == pytest.approx(1 / 4, abs=0.015) for count in neighbours.values())
    lacking = [rule.draw(0, 0, sample, (1, 0, 1)) for sample in range(4000)]
    assert np.bincount(lacking) / 4000 == pytest.approx([1 / 5, 4 / 5], abs=0.03)  # the others in their own proportions
    assert {rule.draw(0, 0, sample, (0, 1, 0)) for sample in range(50)} == {0}


def texts_read(data: Data, root: Path, found: list[Batch]) -> list[str]:
    """Each caption in words, by its number among those of its sample; its ids are those of the words."""
    reader, tokenizer = JoinedReader.of(pairs_of(data).training()), spec_for(root / "small").tokenizer
    words = [reader.texts(sample).captions[caption] for batch in found for sample, caption in batch.samples_B2.tolist()]
    assert torch.equal(torch.cat([batch.text_BT for batch in found]), tokenizer(words, 16))
    return words


@pytest.mark.parametrize("kept_bytes", [captions.TOKEN_CACHE_BYTES, 2000])
def test_captions_have_the_names_that_are_asked_for(
    kept_bytes: int, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By (seed, epoch, sample), whether ids are kept or not; what is lacking is counted, by epoch and name."""
    monkeypatch.setattr(captions, "TOKEN_CACHE_BYTES", kept_bytes)
    data = Data(path=str(root / "large"), captions=RULE)
    found = batches(data, root, 49)  # 588 samples, four epochs
    words = texts_read(data, root, found)
    named = [(batch_sample, text) for batch_sample, text in zip([s for b in found for s in b.indices_B.tolist()], words, strict=True)]
    lacking = [text for sample, text in named if sample % 3 == 0]
    assert all(text.startswith("alternative") for text in lacking)
    having = Counter(text.partition(" ")[0] for sample, text in named if sample % 3)
    assert set(having) == {"alternative", "made", "once"}
    assert having["alternative"] / having.total() == pytest.approx(0.25, abs=0.09)  # four standard errors of 392
    assert having["made"] / (having["made"] + having["once"]) == pytest.approx(0.5, abs=0.12)
    assert_same(batches(data, root, 3, start_step=20), found[20:23])
    # Of 147 intact samples 0, 3, ..., 147 lack it, but for 0 which is damaged.
    assert f"epoch 3: of 147 samples, there are no captions named 'synthetic' in {len(range(3, 150, 3))}; their others were read" in (
        capsys.readouterr().out
    )


def test_each_source_follows_its_own_rule_and_texts_are_a_name_too(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = mixture_of(root)
    assert data.sources is not None
    data.sources[0].captions, data.sources[1].captions = {"txt": 1.0, "alt": 1.0}, {"synthetic": 1.0}
    found = batches(data, root, 50)
    words, sources = texts_read(data, root, found), [sample for batch in found for sample in batch.indices_B.tolist()]
    small = Counter(text.partition(" ")[0] for text, sample in zip(words, sources, strict=True) if sample < 21)
    assert set(small) == {"small", "alternative"}
    assert small["small"] / small.total() == pytest.approx(0.5, abs=0.19)
    for text, sample in zip(words, sources, strict=True):
        # One in three of the middle set has nothing of that name, and gives its ordinary caption.
        named = "middle" if (sample - 21) % 3 == 0 else ("made", "once")
        assert sample < 21 or text.startswith(named if sample < 67 else "large")
    said = capsys.readouterr().out
    lacking = len(set(range(0, 46, 3)) - {9})
    assert f"middle, epoch 0: of 44 samples, there are no captions named 'synthetic' in {lacking}; their others were read" in said
    assert "small, epoch" not in said


def test_names_that_are_nowhere_are_told_at_the_start(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batches(Data(path=str(root / "large"), captions={"alt": 1.0, "synthetik": 1.0}), root, 1)
    assert re.search(r"there are no captions named 'synthetik' in the first [34] samples of .*large/train/shard-0", capsys.readouterr().out)
    data = mixture_of(root)
    assert data.sources is not None
    data.sources[1].captions = {"alternative": 1.0, "image": 2.0}
    with pytest.raises(
        UserError, match=r"recipe key data.sources\[1\].captions: there are no captions named 'alternative', 'image' in the fi"
    ):
        batches(data, root, 1)
    data.sources[1].captions = None
    batches(data, root, 1)
    assert "no captions named" not in capsys.readouterr().out


def test_hostile_captions_are_no_captions_or_damage(tmp_path: Path) -> None:
    given: list[Any] = [3, None, [], ["", " "], [None, {"a": 1}], {"b": "c"}, True, ["good", 4, "better"], "x" * 5001]
    write_set(tmp_path / "odd", len(given), about=lambda index: {"alt": given[index], "txt": "no"})
    reader, rule = ShardReader(tmp_path / "odd" / "train"), CaptionRule.of({"alt": 1.0, "txt": 1.0})
    found = [mixture.texts_of(reader, index, rule) for index in range(8)]
    assert [texts.parts for texts in found] == [(0, 1)] * 7 + [(2, 1)]
    assert list(found[7].captions) == ["good", "better", "odd number 7"]
    with pytest.raises(UserError, match="caption too long"):
        mixture.texts_of(reader, 8, rule)


def test_features_are_of_all_captions_that_may_be_read(root: Path) -> None:
    """A sweep numbers samples and captions as batches do."""
    data = mixture_of(root)
    assert data.sources is not None
    data.sources[2].captions = RULE
    sweep = Corpus(pairs_of(data), spec_for(root / "small")).sweep()
    assert sum(len(sweep[item].whole_N) for item in range(len(sweep))) == sum(SIZES.values())
    texts, starts = [], [0]
    for item in range(len(sweep)):
        texts.append(sweep[item].text_MT)
        starts += (starts[-1] + sweep[item].num_captions_N.cumsum(0)).tolist()
    text_MT = torch.cat(texts)
    for batch in batches(data, root, 30):
        samples, chosen = batch.samples_B2.T
        assert torch.equal(batch.text_BT, text_MT[torch.tensor(starts)[samples] + chosen])


# Recipes.


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (Data(path="a", sources=[Source("b")]), "data.sources: is given, and data.path is a. Give one of them"),
        (Data(sources=[]), "data.sources: is an empty list. List data sets"),
        (Data(sources=[Source("a"), Source()]), r"data.sources\[1\].path: is missing"),
        (Data(sources=[Source("a", math.inf)]), r"data.sources\[0\].weight: is inf"),
        (Data(sources=[Source("a", math.nan)]), r"data.sources\[0\].weight: is nan"),
        (Data(sources=[Source("a", -1.0)]), r"data.sources\[0\].weight: is -1.0"),
        (Data(sources=[Source(str(index)) for index in range(1000)]), "data.sources: has 1,000 data sets. At most 256 are supported"),
        (Data(sources=[Source("a")], captions={"b": 1.0}), "data.captions: is given beside data.sources. Give captions with each source"),
        (Data(path="a", captions={}), "data.captions: has 0 names; 1 to 64 are supported"),
        (Data(path="a", captions={"a": 1.0, "b": math.inf}), "data.captions: the weight of 'b' is inf"),
        (Data(path="a", captions={"a": 1.0, "b": 1e-9}), "data.captions: 'b' would be drawn less than once in 1,000,000 times"),
        (Data(sources=[Source("a", captions={"b": 0.0})]), r"data.sources\[0\].captions: the weight of 'b' is 0"),
        (Data(evaluate_on="a"), "data.evaluate_on: is given, data.path is null"),
    ],
)
def test_fields_that_do_not_go_together(data: Data, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        Recipe(data=data).check()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ("[{path: a, weight: 0}]", "weight"),
        ("[{path: a, weight: -1}]", "weight"),
        ("[{path: a, weight: .nan}]", "weight"),
        ("[{path: a, weight: [1]}]", "weight"),
        ("[{path: a, wieght: 1}]", r"data.sources\[0\].wieght. Nearest valid key: data.sources\[0\].weight"),
        ("[a, b]", "Give a mapping of keys"),
        ("{path: a}", "sources"),
        ("[{path: a, captions: {alt: 0}}]", "captions"),
        ("[{path: a, captions: [alt]}]", "captions"),
    ],
)
def test_recipes_with_invalid_sources_are_refused_in_one_line(sources: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"data:\n  sources: {sources}\n")
    with pytest.raises(UserError, match=said) as raised:
        load_recipe(str(tmp_path / "recipe.yaml"))
    assert "\n" not in str(raised.value)


def test_a_set_is_named_once_whatever_it_is_called(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root / "small")
    for other in (root / "small", root / "large" / ".." / "small", tmp_path / "link", f"file://{root / 'small'}"):
        data = Data(sources=[Source(str(root / "small")), Source(str(root / "large")), Source(str(other))])
        with pytest.raises(
            UserError, match=r"data.sources\[2\].path: .* is that of data.sources\[0\] too. Give it once, with a larger weight"
        ):
            pairs_of(data)
    data = Data(sources=[Source(str(root / "small")), Source(str(tmp_path / "nothing"))])
    with pytest.raises(UserError, match=rf"recipe key data.sources\[1\].path: {tmp_path / 'nothing'} contains no data set"):
        pairs_of(data)
    copy = Path(shutil.copytree(root / "small", tmp_path / "copy" / "small"))
    assert [part.name for part in pairs_of(Data(sources=[Source(str(root / "small")), Source(str(copy))])).parts] == ["0-small", "1-small"]


def test_a_source_without_a_training_split_is_refused(root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(root / "small", tmp_path / "small"))
    manifest = json.loads((copy / "train" / "manifest.json").read_text())
    shutil.rmtree(copy / "train")
    data = Data(sources=[Source(str(root / "large")), Source(str(copy))])
    with pytest.raises(UserError, match=f"no data in {copy / 'train'}: the folder is missing"):
        batches(data, root, 1)
    (copy / "train").mkdir()
    manifest = {key: value for key, value in manifest.items() if key != records.KEY}
    records.write_record(copy / "train" / "manifest.json", {**manifest, "num_samples": 0, "shards": []})
    with pytest.raises(UserError, match=f"{copy / 'train' / 'manifest.json'} is empty"):
        batches(data, root, 1)


def test_sources_need_one_tokenizer(root: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "words", 8, tokenizer="words")
    write_set(tmp_path / "others", 9, tokenizer="words")
    write_set(tmp_path / "pairs", 8, tokenizer="bpe")
    for first, second in (("small", "words"), ("words", "small"), ("words", "others"), ("pairs", "words")):
        paths = [str((root if name == "small" else tmp_path) / name) for name in (first, second)]
        data = Data(sources=[Source(path) for path in paths])
        with pytest.raises(
            UserError, match=f"data.sources need one tokenizer: {paths[0]} was packed for .*, {paths[1]} for .* Set data.tok"
        ):
            pairs_of(data)
        data.tokenizer = "model"
        assert len(pairs_of(data).parts) == 2
    data = Data(sources=[Source(str(root / "small")), Source(str(tmp_path / "pairs"))])
    assert len(pairs_of(data).parts) == 2  # byte pairs, whether they are offered or not


def test_the_identity_of_a_run_has_sets_weights_and_captions(root: Path, tmp_path: Path) -> None:
    def identity(data: Data, role: str = "ancestor") -> str:
        return json.dumps([Recipe(data=data).used_by(role), pairs_of(data).digest()], sort_keys=True)

    plain, data = Data(path=str(root / "small")), mixture_of(root)
    assert Recipe(data=plain).used_by("ancestor")["data"] == {"augment": "none", "check": "auto"}  # as before there were mixtures
    moved = Path(shutil.copytree(root, tmp_path / "elsewhere"))
    assert identity(mixture_of(moved)) == identity(data)
    seen = {identity(data), identity(plain), identity(Data(path=str(root / "small"), captions=RULE))}
    for change in ("weight", "captions", "order", "less", "evaluate_on", "content"):
        other = mixture_of(moved)
        assert other.sources is not None
        if change == "weight":
            other.sources[1].weight = 0.31
        elif change == "captions":
            other.sources[1].captions = {"alt": 1.0}
        elif change == "order":
            other.sources.reverse()
        elif change == "less":
            del other.sources[1]
        elif change == "evaluate_on":
            other.evaluate_on = str(root / "large")
        else:
            shutil.rmtree(moved / "large")
            write_set(moved / "large", 149, about=about)
        seen.add(identity(other))
    assert len(seen) == 3 + 6
    # Features are of all captions that may be read, however often they are; and so is what they are kept under.
    rules: list[dict[str, float] | None] = [None, {"alt": 1.0, "synthetic": 1.0}, {"synthetic": 5.0, "alt": 1.0}, {"alt": 1.0}]
    features = [json.dumps(Recipe(data=Data(path="a", captions=rule)).used_by("features")) for rule in rules]
    assert features[1] == features[2]
    assert len(set(features)) == 3
    assert features[0] == json.dumps({"engine": {"precision": "fp32"}})


def test_evaluation_reads_the_first_source_or_the_set_that_is_named(root: Path) -> None:
    spec = spec_for(root / "small")
    for data, name in ((mixture_of(root), "small"), (mixture_of(root, evaluate_on=str(root / "large")), "large")):
        split = Corpus(pairs_of(data), spec).eval_split("val")
        assert list(split.captions) == [f"{name} number {index}" for index in range(4)]
        assert [source.name for source in pairs_of(data).training()] == list(SIZES)
    alone = pairs_of(Data(path=str(root / "small"), evaluate_on=str(root / "large")))
    assert alone.root == root / "large"
    assert [source.folder for source in alone.training()] == [root / "small" / "train"]


def test_the_documents_example_is_a_recipe(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = [block for block in DOCS.read_text(encoding="utf-8").split("```yaml\n")[1:] if "sources:" in block]
    (tmp_path / "recipe.yaml").write_text(example.partition("```")[0])
    settings, _ = load_recipe(str(tmp_path / "recipe.yaml"))
    assert settings.data.sources is not None
    for source in settings.data.sources:
        shutil.copytree(root / "middle", tmp_path / source.path)
    monkeypatch.chdir(tmp_path)
    found = batches(settings.data, root, 5)
    assert len({name.partition("-")[0] for batch in keys(settings.data, found) for name in batch}) == 1
    assert len(settings.data.sources) >= 2
