"""What a data set holds, in a few lines: what `mmlg data pack`, `index` and `scenes` end with.

Of large splits an even sample is read; counts of captions are then estimates, and marked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mmlg_scale.data import SPLITS
from mmlg_scale.data.captions import CaptionRule
from mmlg_scale.data.images import open_image
from mmlg_scale.data.mixture import texts_of
from mmlg_scale.data.reader import DamagedSample, ShardReader
from mmlg_scale.data.store import Store
from mmlg_scale.data.tokens import UNKNOWN, offered_tokenizer
from mmlg_scale.towers import BytePairTokenizer, Tokenizer, told

MAX_SAMPLES, MAX_IMAGES = 50_000, 2_000
"""Samples whose captions, and images whose sizes, are looked at in each split."""
CONTEXT_LENGTH = 77
"""CLIP's."""
LONGEST = 512
"""Captions are measured up to this many tokens."""


@dataclass(frozen=True)
class SplitSummary:
    """What a split holds; `captions` are those of the samples that were read."""

    num_samples: int
    num_bytes: int
    num_read: int
    captions: list[str]
    image_sizes: list[tuple[int, int]]

    @property
    def is_whole(self) -> bool:
        """Whether every sample was read."""
        return self.num_read == self.num_samples

    @property
    def num_captions(self) -> int:
        """Captions of the split: exact where it was read whole."""
        return round(len(self.captions) * self.num_samples / max(1, self.num_read))


def summarise_split(
    folder: Path,
    store: Store | None = None,
    *,
    max_samples: int = MAX_SAMPLES,
    max_images: int = MAX_IMAGES,
    first_shard: bool = False,
    rule: CaptionRule | None = None,
) -> SplitSummary:
    """Read a split; damaged samples are passed over. Of a remote one, which is in `store`, `first_shard` can do.

    Captions are those that `rule` may read, or the ordinary ones.

    Raises:
        UserError: no manifest, or a damaged one.
    """
    reader = ShardReader(folder, store)
    wanted = range(min(max_samples, int(reader.shards.samples[0]))) if first_shard else _spread(len(reader), max_samples)
    captions, sizes = list[str](), list[tuple[int, int]]()
    for index in wanted:
        try:
            captions += texts_of(reader, index, rule).captions
        except DamagedSample:
            continue  # mmlg data check lists them
    for index in _spread(len(reader), max_images):
        try:
            with open_image(reader.image_bytes(index)) as image:
                sizes.append(image.size)
        except (DamagedSample, OSError, ValueError, SyntaxError):
            continue
    reader.close()
    num_bytes = int(reader.shards.num_bytes.sum())
    return SplitSummary(len(reader), num_bytes, len(wanted), captions, sizes)


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` positions, evenly apart."""
    return list(range(count)) if count <= wanted else [position * count // wanted for position in range(wanted)]


def num_pairs(folder: Path, store: Store | None = None, *, first_shard: bool = False, rule: CaptionRule | None = None) -> tuple[int, int]:
    """Images and captions of a split; captions are estimated where the split is large, or only its first shard is read."""
    found = summarise_split(folder, store, max_images=0, first_shard=first_shard, rule=rule)
    return found.num_samples, found.num_captions


def caption_lengths(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Tokens of each text, start and end tokens included, at most LONGEST: int [N]."""
    empty = tokenizer([""], LONGEST)[0]
    padded_right = bool(empty[-1] == empty[-2])
    pad = empty[-1 if padded_right else 0]
    found = []
    for start in range(0, len(texts), 4096):
        ids_NT = tokenizer(list(texts[start : start + 4096]), LONGEST)
        is_text_NT = ids_NT != pad
        # Padding is what follows the last other token: within a text its id can be a character's (byte pairs: "!").
        ends_N = (is_text_NT.flip(1) if padded_right else is_text_NT).int().argmax(dim=1)
        found.append(LONGEST - ends_N + int(pad == ids_NT.max()))  # where the end token pads, one of them is the text's
    return torch.cat(found).clamp(max=LONGEST).numpy() if found else np.zeros(0, int)


def print_summary(root: Path, *, brief: bool = False) -> None:
    """Print what the data set at `root` holds; `brief`: only the counts."""
    found = {split: summarise_split(root / split) for split in SPLITS if (root / split / "manifest.json").is_file()}
    lines = [f"{root}:"]
    for split, part in found.items():
        about = "" if part.is_whole else "about "
        lines.append(f"  {split:6}{part.num_samples:>9,} images  {about}{part.num_captions:,} captions  {_in_bytes(part.num_bytes)}")
    tokenizer = offered_tokenizer(root)
    if not brief:
        lines += [*_of_images(found), *_of_captions(tokenizer or BytePairTokenizer(), found)]
    print("\n".join([*lines, f"  vocabulary: {_vocabulary(tokenizer, found)}"]))


def _in_bytes(count: int) -> str:
    unit, size = next((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= size or unit == "kB")
    return f"{count / size:,.1f} {unit}"


def _range(least: int, most: int) -> str:
    return f"{most}" if least == most else f"{least} to {most}"


def _of_images(found: dict[str, SplitSummary]) -> list[str]:
    sizes = np.array([size for part in found.values() for size in part.image_sizes])
    if not len(sizes):
        return []
    (least_w, least_h), (most_w, most_h) = sizes.min(axis=0), sizes.max(axis=0)
    if (least_w, least_h) == (most_w, most_h):
        return [f"  images: {most_w} × {most_h} pixels"]
    width, height = np.median(sizes, axis=0).astype(int)
    return [f"  images: {_range(least_w, most_w)} pixels wide and {_range(least_h, most_h)} high, median {width} × {height}"]


def _of_captions(tokenizer: Tokenizer, found: dict[str, SplitSummary]) -> list[str]:
    texts = [text for part in found.values() for text in part.captions]
    if not texts:
        return []
    lengths = caption_lengths(tokenizer, texts)
    median, most = (int(np.percentile(lengths, part, method="lower")) for part in (50, 99))
    longest = f"{LONGEST} or more" if lengths.max() == LONGEST else str(lengths.max())
    cut = tokenizer.num_truncated(texts, CONTEXT_LENGTH)
    cuts = f"{cut:,} of {len(texts):,} exceed" if cut else "none exceeds"
    return [
        f"  captions: median {median} tokens, 99 % up to {most}, longest {longest}; {cuts} CLIP's context length of {CONTEXT_LENGTH} tokens"
    ]


def _vocabulary(tokenizer: Tokenizer | None, found: dict[str, SplitSummary]) -> str:
    if tokenizer is None:
        return "none offered; models trained from scratch on this set use open_clip's byte pairs (49,408 ids)"
    unknown = _unknown_id(tokenizer)
    if unknown is None:
        return told(tokenizer)
    others = [part for split, part in found.items() if split != "train"]
    texts = [text for part in others for text in part.captions]
    left_out = sum(int((tokenizer(texts[start : start + 4096], LONGEST) == unknown).sum()) for start in range(0, len(texts), 4096))
    which = "the val and test captions" if all(part.is_whole for part in others) else "the val and test captions that were read"
    words = f"{left_out:,} words of {which} are not in it" if left_out else f"it has every word of {which}"
    return f"{tokenizer.vocab_size:,} ids, from the words of the training captions; {words}"


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id of words that are not in a word vocabulary; None for other tokenizers."""
    model = json.loads(tokenizer.files["tokenizer.json"])["model"] if tokenizer.files else {}
    return model["vocab"].get(UNKNOWN) if model.get("type") == "WordLevel" else None
