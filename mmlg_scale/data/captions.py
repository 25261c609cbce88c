"""Captions -> token ids, a batch at a time: one caption of each sample or several, drawn by (seed, epoch, sample).

The ids of all captions of a sample are kept until they take TOKEN_CACHE_BYTES: of a small set every epoch asks for them again. All others
are tokenised with their batch, and nothing grows with the data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmlg_scale.data.tokens import truncated
from mmlg_scale.towers import Tokenizer

TOKEN_CACHE_BYTES = 16 * 2**20
"""Of token ids and what Python adds to them, in each loader process."""
_OVERHEAD = 400
"""Bytes that a kept sample takes besides its ids: a tensor, a number, a place in a dictionary."""
_NAMES = 0x94D049BB133111EB
"""Keeps the draw of a name apart from that of a caption under it."""
_FURTHER = 0xD1342543DE82EF95
"""Keeps the draws of a sample's second, third, ... caption apart from that of the first."""


def drawn_caption(seed: int, epoch: int, sample: int, num_captions: int) -> int:
    """Which of a sample's captions an epoch reads."""
    if num_captions == 1:
        return 0
    return (_mixed(seed, epoch, sample) >> 33) % num_captions


def drawn_captions(seed: int, epoch: int, sample: int, parts: Sequence[int], rule: CaptionRule | None, count: int) -> list[int]:
    """Which `count` of a sample's captions an epoch reads: different ones, as long as there are any that were not drawn yet.

    Args:
        parts: how many captions each name of `rule` has; without a rule one number, of all captions.
    """
    chosen: list[int] = []
    left: list[list[int]] = []
    starts = [sum(parts[:name]) for name in range(len(parts))]
    for number in range(count):
        if not any(left):
            left = [list(range(start, start + size)) for start, size in zip(starts, parts, strict=True)]
        own = seed ^ (number * _FURTHER & (2**64 - 1))
        sizes = [len(captions) for captions in left]
        name = rule.draw_name(own, epoch, sample, sizes) if rule is not None else 0
        chosen.append(left[name].pop(drawn_caption(own, epoch, sample, sizes[name])))
    return chosen


def _mixed(seed: int, epoch: int, sample: int) -> int:
    # A hash of (seed, epoch, sample) instead of a generator: this runs for every sample of every batch.
    mixed = (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + sample * 0x94D049BB133111EB) & (2**64 - 1)
    return ((mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93) & (2**64 - 1)


class Texts(NamedTuple):
    """All captions that may be read of a sample.

    Attributes:
        parts: how many of them each name of a `CaptionRule` has, one after the other; () where no rule is followed, and all 0 where the
            sample has none of its names, so that these are the ordinary captions.
    """

    captions: Sequence[str]
    parts: tuple[int, ...] = ()


@dataclass(frozen=True)
class CaptionRule:
    """Named captions of a sample's JSON, and how often each name is read: drawn anew for each sample in every epoch.

    Where a sample does not have a name, the others are drawn, in their own proportions; one without any gives its ordinary captions.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    """Positive, the largest being 1."""

    @classmethod
    def of(cls, weights: Mapping[str, float] | None) -> CaptionRule | None:
        """The rule that a recipe states; in whatever order it does."""
        if weights is None:
            return None
        names, most = tuple(sorted(weights)), max(weights.values())
        return cls(names, tuple(weights[name] / most for name in names))

    def texts(self, ordinary: Sequence[str], named: Sequence[Sequence[str]]) -> Texts:
        """What may be read of a sample, by its ordinary captions and those of each name."""
        found = [text for texts in named for text in texts]
        return Texts(found or ordinary, tuple(map(len, named)))

    def draw_name(self, seed: int, epoch: int, sample: int, parts: Sequence[int]) -> int:
        """Which name's caption is read, by its place, given how many each name has, not all being 0."""
        there = [place for place, count in enumerate(parts) if count]
        total = sum(self.weights[place] for place in there)
        mixed = _mixed(seed ^ _NAMES, epoch, sample)
        left = ((mixed ^ (mixed >> 29)) >> 11) * 2.0**-53 * total
        for place in there:
            left -= self.weights[place]
            if left < 0:
                return place
        return there[-1]


class Drawn(NamedTuple):
    """The captions that are read of B samples, k of each.

    Attributes:
        ids_NT: token ids, N = B k, those of a sample one after the other.
        captions: which of each sample's captions they are, [B] lists of k.
        cut: of each sample, how many are cut to the context length.
        repeated: of each sample, how many it has read already, having fewer than k.
        parts: of samples that do not have a name of their rule: row -> how many captions each name has.
    """

    ids_NT: Tensor
    captions: list[list[int]]
    cut: list[int]
    repeated: list[int]
    parts: dict[int, tuple[int, ...]]


class CaptionTokens:
    """Token ids of drawn captions, `per_image` of each sample."""

    def __init__(self, tokenizer: Tokenizer, context_length: int, seed: int, per_image: int = 1) -> None:
        self.tokenizer, self.context_length, self.seed, self.per_image = tokenizer, context_length, seed, per_image
        self._kept: dict[int, Tensor] = {}
        self._parts: dict[int, tuple[int, ...]] = {}
        # (sample, caption) of the kept captions that are cut.
        self._cut: set[tuple[int, int]] = set()
        self._bytes, self._keeps = 0, True

    def has(self, samples: Sequence[int]) -> bool:
        """Whether the ids of all captions of all these samples are kept."""
        return all(sample in self._kept for sample in samples)

    def draw(
        self,
        epochs: Sequence[int],
        samples: Sequence[int],
        texts: Mapping[int, Texts],
        rules: Sequence[CaptionRule | None] | None = None,
    ) -> Drawn:
        """The captions of B samples.

        Args:
            texts: all captions of the samples whose ids are not kept.
            rules: of each sample, where any has one.
        """
        if self._keeps:
            self._keep(texts)
        kept = [self._kept.get(sample) for sample in samples]
        counts = [len(texts[sample].captions) if ids is None else len(ids) for sample, ids in zip(samples, kept, strict=True)]
        chosen, lacking = list[list[int]](), dict[int, tuple[int, ...]]()
        for row, (epoch, sample, count) in enumerate(zip(epochs, samples, counts, strict=True)):
            rule: CaptionRule | None = rules[row] if rules is not None else None
            parts: tuple[int, ...] = (count,)
            if rule is not None:
                named = texts[sample].parts if kept[row] is None else self._parts[sample]
                if not all(named):
                    lacking[row] = named
                rule, parts = (rule, named) if any(named) else (None, parts)
            chosen.append(self._chosen(epoch, sample, parts, rule))
        cut = [
            sum((sample, place) in self._cut for place in places) if self._cut else 0
            for sample, places in zip(samples, chosen, strict=True)
        ]
        new = [(row, place) for row, ids in enumerate(kept) if ids is None for place in chosen[row]]
        new_MT = torch.zeros(0, self.context_length, dtype=torch.long)
        if new:  # one call for all: a call each costs five times as much
            words = [texts[samples[row]].captions[place] for row, place in new]
            new_MT = self.tokenizer(words, self.context_length)
            for number in truncated(self.tokenizer, words, new_MT):
                cut[new[number][0]] += 1
        rest = iter(new_MT)
        found = [next(rest) if ids is None else ids[place] for ids, places in zip(kept, chosen, strict=True) for place in places]
        repeated = [self.per_image - len(set(places)) for places in chosen]
        return Drawn(torch.stack(found), chosen, cut, repeated, lacking)

    def _chosen(self, epoch: int, sample: int, parts: Sequence[int], rule: CaptionRule | None) -> list[int]:
        if self.per_image == 1 and rule is None:  # most often: this runs for every sample of every batch
            return [drawn_caption(self.seed, epoch, sample, parts[0])]
        return drawn_captions(self.seed, epoch, sample, parts, rule, self.per_image)

    def _keep(self, texts: Mapping[int, Texts]) -> None:
        """Tokenise all captions of samples that are met for the first time; stop keeping where that takes too much."""
        new = [sample for sample in texts if sample not in self._kept]
        if not new:
            return
        words = [text for sample in new for text in texts[sample].captions]
        self._bytes += len(words) * self.context_length * 8 + len(new) * _OVERHEAD
        if self._bytes > TOKEN_CACHE_BYTES:
            self._keeps = False
            return
        ids = self.tokenizer(words, self.context_length)
        counts = [len(texts[sample].captions) for sample in new]
        places = [(sample, caption) for sample, count in zip(new, counts, strict=True) for caption in range(count)]
        self._cut.update(places[row] for row in truncated(self.tokenizer, words, ids))
        for sample, part in zip(new, ids.split(counts), strict=True):
            self._kept[sample] = part
            if texts[sample].parts:
                self._parts[sample] = texts[sample].parts
