"""Generated pairs for benchmarks: images that cost a loader what photographs do, captions of ordinary words of a given number.

Nothing can be learnt from them. `scenes` writes the set that can.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mmlg_scale.data.manifest import Progress
from mmlg_scale.data.publish import Sample, new_dataset, write_split
from mmlg_scale.errors import UserError

_LISTED = """
a the of in on with and near under behind two three old young small large red green blue white black wooden stone man woman
child dog cat horse bird car bus train boat house street bridge river lake mountain beach field forest garden table chair window
door lamp book cup plate bread apple flower tree grass cloud sky sun snow rain night morning standing sitting walking running
holding looking playing open empty crowded quiet bright dark wet dry tall long
"""
WORDS = _LISTED.split()
QUALITY = 85
"""Of the JPEGs: the files then have about 0.2 bytes a pixel."""


def write_pairs(
    out: Path,
    *,
    num_train: int,
    num_val: int = 16,
    num_test: int = 16,
    image_size: int = 256,
    words: tuple[int, int] = (5, 25),
    captions: int = 1,
    seed: int = 0,
    samples_per_shard: int = 500,
    progress: Progress = lambda items: items,
) -> None:
    """Write the set to `out` (see manifest.py): JPEGs, and for each as many captions of at least `words[0]` and at most `words[1]` words.

    Raises:
        UserError: `out` holds something else, or a count is not positive.
    """
    if min(num_train, num_val, num_test, captions, words[0]) < 1 or words[1] < words[0] or image_size < 16:
        raise UserError("generated pairs: counts must be positive, image_size at least 16, and the words a range.")
    args = {"num_train": num_train, "num_val": num_val, "num_test": num_test, "image_size": image_size, "words": list(words), "seed": seed}
    args |= {"captions": captions} if captions > 1 else {}  # which came later: sets of one caption are still recognised
    with new_dataset(out, "generated pairs", {**args, "samples_per_shard": samples_per_shard}) as root:
        if root is None:
            return
        for number, (split, count) in enumerate((("train", num_train), ("val", num_val), ("test", num_test))):
            samples = (sample(position, [seed, number], image_size, words, captions) for position in progress(range(count)))
            write_split(root, split, samples, samples_per_shard=samples_per_shard)


def sample(position: int, seed: list[int], image_size: int, words: tuple[int, int], captions: int = 1) -> Sample:
    """One image with its captions, by its position and the seed alone."""
    generator = np.random.default_rng([*seed, position])
    buffer = io.BytesIO()
    Image.fromarray(_picture(image_size, generator)).save(buffer, "JPEG", quality=QUALITY)
    counts = (int(generator.integers(words[0], words[1], endpoint=True)) for _ in range(captions))
    return Sample(f"{position:08d}", buffer.getvalue(), "jpg", [" ".join(generator.choice(WORDS, size=count)) for count in counts])


def _picture(side: int, generator: np.random.Generator) -> np.ndarray:
    """Random colours at several scales, the finer the weaker, as the spectrum of photographs falls off: uint8 [side, side, 3]."""
    whole = np.zeros((side, side, 3), dtype=np.float32)
    for cells, strength in _octaves(side):
        grid = Image.fromarray(generator.integers(0, 256, size=(cells, cells, 3), dtype=np.uint8))
        whole += strength * (np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32) - 128)
    return np.clip(whole + 128, 0, 255).astype(np.uint8)


def _octaves(side: int) -> Iterator[tuple[int, float]]:
    cells, strength = 4, 0.6
    while cells <= side:
        yield cells, strength
        cells, strength = 2 * cells, 0.55 * strength
