"""Captions -> token ids, a batch at a time: one caption of each sample, drawn by (seed, epoch, sample).

The ids of all captions of a sample are kept until they take TOKEN_CACHE_BYTES: of a small set every epoch asks for them again. All others
are tokenised with their batch, and nothing grows with the data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmlg_scale.data.tokens import truncated
from mmlg_scale.towers import Tokenizer

TOKEN_CACHE_BYTES = 16 * 2**20
"""Of token ids and what Python adds to them, in each loader process."""
_OVERHEAD = 400
"""Bytes that a kept sample takes besides its ids: a tensor, a number, a place in a dictionary."""


def drawn_caption(seed: int, epoch: int, sample: int, num_captions: int) -> int:
    """Which of a sample's captions an epoch reads."""
    if num_captions == 1:
        return 0
    # A hash of (seed, epoch, sample) instead of a generator: this runs for every sample of every batch.
    mixed = (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + sample * 0x94D049BB133111EB) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93) & (2**64 - 1)
    return (mixed >> 33) % num_captions


class CaptionTokens:
    """Token ids of drawn captions."""

    def __init__(self, tokenizer: Tokenizer, context_length: int, seed: int) -> None:
        self.tokenizer, self.context_length, self.seed = tokenizer, context_length, seed
        self._kept: dict[int, Tensor] = {}
        # (sample, caption) of the kept captions that are cut.
        self._cut: set[tuple[int, int]] = set()
        self._bytes, self._keeps = 0, True

    def has(self, samples: Sequence[int]) -> bool:
        """Whether the ids of all captions of all these samples are kept."""
        return all(sample in self._kept for sample in samples)

    def draw(
        self, epochs: Sequence[int], samples: Sequence[int], texts: Mapping[int, Sequence[str]]
    ) -> tuple[Tensor, list[int], list[int]]:
        """Ids of a caption of each sample [B, T], which one it is, and the rows that are cut to the context length.

        Args:
            texts: all captions of the samples whose ids are not kept.
        """
        if self._keeps:
            self._keep(texts)
        kept = [self._kept.get(sample) for sample in samples]
        counts = [len(texts[sample]) if ids is None else len(ids) for sample, ids in zip(samples, kept, strict=True)]
        chosen = [drawn_caption(self.seed, *of) for of in zip(epochs, samples, counts, strict=True)]
        cut = [row for row, place in enumerate(zip(samples, chosen, strict=True)) if place in self._cut] if self._cut else []
        rows = [row for row, ids in enumerate(kept) if ids is None]
        new_NT = torch.zeros(0, self.context_length, dtype=torch.long)
        if rows:  # one call for all: a call each costs five times as much
            words = [texts[samples[row]][chosen[row]] for row in rows]
            new_NT = self.tokenizer(words, self.context_length)
            cut = sorted([*cut, *(rows[position] for position in truncated(self.tokenizer, words, new_NT))])
        new = iter(new_NT)
        found = [next(new) if ids is None else ids[caption] for ids, caption in zip(kept, chosen, strict=True)]
        return torch.stack(found), chosen, cut

    def _keep(self, texts: Mapping[int, Sequence[str]]) -> None:
        """Tokenise all captions of samples that are met for the first time; stop keeping where that takes too much."""
        new = [sample for sample in texts if sample not in self._kept]
        if not new:
            return
        words = [text for sample in new for text in texts[sample]]
        self._bytes += len(words) * self.context_length * 8 + len(new) * _OVERHEAD
        if self._bytes > TOKEN_CACHE_BYTES:
            self._keeps = False
            return
        ids = self.tokenizer(words, self.context_length)
        places = [(sample, caption) for sample in new for caption in range(len(texts[sample]))]
        self._cut.update(places[row] for row in truncated(self.tokenizer, words, ids))
        for sample, part in zip(new, ids.split([len(texts[sample]) for sample in new]), strict=True):
            self._kept[sample] = part
