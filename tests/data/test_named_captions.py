"""Captions that are drawn by name: how often each is, what is done about those that are lacking, and hostile ones."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmlg_scale.data import captions, mixture
from mmlg_scale.data.captions import CaptionRule, drawn_caption, drawn_captions
from mmlg_scale.data.corpus import Corpus, pairs_of
from mmlg_scale.data.mixture import JoinedReader
from mmlg_scale.data.pipeline import Batch
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.errors import UserError
from mmlg_scale.recipe import Data
from tests.data.sets import SIZES, assert_same, batches, mixture_of, write_set
from tests.data.specs import spec_for

RULE = {"synthetic": 0.75, "alt": 0.25}


def test_names_are_drawn_by_their_weights_independently_of_order_and_place() -> None:
    rule = CaptionRule.of({"b": 3.0, "a": 1.0, "c": 4.0})
    assert rule == CaptionRule.of({"c": 8.0, "a": 2.0, "b": 6.0})
    assert rule is not None
    assert rule.names == ("a", "b", "c")
    for seed in (0, 7, 2**62):
        drawn = np.array([drawn_captions(seed, epoch, sample, (1, 2, 1), rule, 1)[0] for epoch in range(40) for sample in range(500)])
        found = np.bincount(drawn, minlength=4) / len(drawn)
        assert found == pytest.approx([1 / 8, 3 / 16, 3 / 16, 1 / 2], abs=0.012)  # four standard errors
        by_epoch = drawn.reshape(40, 500)
        pairs = Counter(zip((by_epoch[:-1] == 3).ravel().tolist(), (by_epoch[1:] == 3).ravel().tolist(), strict=True))
        assert all(count / (39 * 500) == pytest.approx(1 / 4, abs=0.015) for count in pairs.values())  # epochs are independent
        neighbours = Counter(zip((by_epoch[:, :-1] == 3).ravel().tolist(), (by_epoch[:, 1:] == 3).ravel().tolist(), strict=True))
        assert all(count / (40 * 499) == pytest.approx(1 / 4, abs=0.015) for count in neighbours.values())
    lacking = [drawn_captions(0, 0, sample, (1, 0, 1), rule, 1)[0] for sample in range(4000)]
    assert np.bincount(lacking) / 4000 == pytest.approx([1 / 5, 4 / 5], abs=0.03)  # the others in their own proportions
    assert {drawn_captions(0, 0, sample, (0, 1, 0), rule, 1)[0] for sample in range(50)} == {0}


@pytest.mark.parametrize("names", [None, {"a": 1.0, "b": 3.0}])
def test_several_captions_of_a_sample_are_different_ones(names: dict[str, float] | None) -> None:
    """The first is what one alone would be; any subset is as likely as by drawing without replacement; what is used up comes again."""
    rule = CaptionRule.of(names)
    parts = (1, 3) if rule is not None else (4,)
    drawn = [drawn_captions(7, epoch, sample, parts, rule, 3) for epoch in range(10) for sample in range(2000)]
    assert all(len(set(found)) == 3 and set(found) <= set(range(4)) for found in drawn)
    assert [found[:1] for found in drawn] == [drawn_captions(7, *of, parts, rule, 1) for of in np.ndindex(10, 2000)]
    pairs = Counter((first, second) for first, second, _ in drawn)
    if rule is None:
        assert [found[0] for found in drawn] == [drawn_caption(7, *of, 4) for of in np.ndindex(10, 2000)]
        expected = {(first, second): 1 / 12 for first in range(4) for second in range(4) if first != second}
    else:  # caption 0 is the only one of its name: once it is read, the other name is drawn
        expected = {(0, second): 1 / 4 * 1 / 3 for second in (1, 2, 3)} | {(first, 0): 3 / 4 * 1 / 3 * 1 / 4 for first in (1, 2, 3)}
        expected |= {(first, second): 3 / 4 * 1 / 3 * 3 / 4 * 1 / 2 for first in (1, 2, 3) for second in (1, 2, 3) if first != second}
    assert set(pairs) == set(expected)
    for pair, share in expected.items():
        assert pairs[pair] / len(drawn) == pytest.approx(share, abs=0.009)  # four standard errors
    for found in (drawn_captions(7, 0, sample, parts, rule, 10) for sample in range(50)):
        assert [sorted(found[start : start + 4]) for start in (0, 4)] == [[0, 1, 2, 3]] * 2
        assert len(set(found[8:])) == 2


def texts_read(data: Data, root: Path, found: list[Batch]) -> list[str]:
    """Each caption in words, by its number among those of its sample; its ids are those of the words."""
    reader, tokenizer = JoinedReader.of(pairs_of(data).training()), spec_for(root / "small").tokenizer
    rows = [row for batch in found for row in batch.samples_BS.tolist()]
    words = [reader.texts(sample).captions[caption] for sample, *drawn in rows for caption in drawn]
    assert torch.equal(torch.cat([batch.text_NT for batch in found]), tokenizer(words, 16))
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


@pytest.mark.parametrize("kept_bytes", [captions.TOKEN_CACHE_BYTES, 2000])
def test_several_captions_an_image_follow_the_rule(
    kept_bytes: int, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of the three that most samples have; the only one of the others twice, which is counted."""
    monkeypatch.setattr(captions, "TOKEN_CACHE_BYTES", kept_bytes)
    data = Data(path=str(root / "large"), captions=RULE)
    found = batches(data, root, 13, captions_per_image=2)  # an epoch of 147, and some more
    words = texts_read(data, root, found)
    samples = [sample for batch in found for sample in batch.indices_B.tolist()]
    pairs = list(zip(samples, words[::2], words[1::2], strict=True))
    assert all((first == second) == (sample % 3 == 0) for sample, first, second in pairs)
    assert {text.partition(" ")[0] for sample, *texts in pairs if sample % 3 for text in texts} == {"alternative", "made", "once"}
    lacking = len(range(3, 150, 3))
    said = capsys.readouterr().out
    assert f"epoch 0: of 147 samples, there are no captions named 'synthetic' in {lacking}" in said
    assert f"epoch 0: {lacking} of 294 captions were read twice in a batch" in said


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
        samples, chosen = batch.samples_BS.T
        assert torch.equal(batch.text_NT, text_MT[torch.tensor(starts)[samples] + chosen])
