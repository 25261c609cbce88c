"""The procedural image-text set: two named objects in a spatial relation, sometimes a third, on a noisy textured background.

A scene is (A, relation, B) with A left of or above B; each object has a size, a colour and a shape. Splits share no scene, and within
val and within test every scene differs, so that retrieval has one right answer. Training draws scenes with replacement; every image has its
own positions, texture and noise.

A scene's class is its main object's colour and shape ("red circle"): of two sizes the large object, otherwise A. So zero-shot accuracy has
a ceiling below 1: where both objects are of one size, nothing in a class name tells which of them is meant.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmlg_scale.data.manifest import Progress
from mmlg_scale.data.publish import Sample, new_dataset, write_split
from mmlg_scale.data.tokens import word_tokenizer_files, write_tokenizer
from mmlg_scale.errors import UserError
from mmlg_scale.records import write_record
from mmlg_scale.towers import FileTokenizer

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 45, 45),
    "green": (50, 190, 70),
    "blue": (55, 90, 235),
    "yellow": (240, 215, 50),
    "purple": (160, 60, 200),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "cyan": (60, 210, 220),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = {"small": (4.0, ("small", "little")), "large": (6.5, ("large", "big"))}
RELATIONS = {
    "left": (("left of", "to the left of"), ("right of", "to the right of")),
    "above": (("above", "over"), ("below", "under")),
}
TEMPLATES = ("a {a} {r} a {b}", "{a} {r} {b}", "there is a {a} {r} a {b}", "the {a} is {r} the {b}")
CLASS_TEMPLATES = ("a {}", "there is a {}")
"""Of words that captions have, so that the vocabulary knows them."""
MAX_WORDS = 14
"""With start and end token a caption fits a context of 16."""
TRAIN_CAPTIONS = 3
"""Of each training image."""


@dataclass(frozen=True)
class Thing:
    """An object by the indices of its attributes."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """A is left of or above B, as `relation` (left, above) says."""

    a: Thing
    relation: str
    b: Thing


def all_scenes() -> list[Scene]:
    """Every scene of two objects that differ."""
    things = [Thing(size, colour, shape) for size in SIZES for colour in COLOURS for shape in SHAPES]
    return [Scene(a, relation, b) for a in things for b in things if a != b for relation in RELATIONS]


def classnames() -> list[str]:
    """The classes of zero-shot classification, in the order of their labels."""
    return [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def label(scene: Scene) -> int:
    """Index into `classnames()` of the scene's main object."""
    main = scene.b if (scene.a.size, scene.b.size) == ("small", "large") else scene.a
    return classnames().index(f"{main.colour} {main.shape}")


def captions(scene: Scene, count: int, generator: np.random.Generator) -> list[str]:
    """`count` captions of a scene that differ, from either object's point of view."""
    found: list[str] = []
    while len(found) < count:
        forward = bool(generator.integers(2))
        words = RELATIONS[scene.relation][0 if forward else 1]
        first, second = (scene.a, scene.b) if forward else (scene.b, scene.a)
        template = TEMPLATES[generator.integers(len(TEMPLATES))]
        text = template.format(a=_phrase(first, generator), b=_phrase(second, generator), r=words[generator.integers(len(words))])
        if text not in found:
            found.append(text)
    assert all(len(text.split()) <= MAX_WORDS for text in found)
    return found


def _phrase(thing: Thing, generator: np.random.Generator) -> str:
    synonyms = SIZES[thing.size][1]
    return f"{synonyms[generator.integers(len(synonyms))]} {thing.colour} {thing.shape}"


def render(scene: Scene, image_size: int, generator: np.random.Generator) -> Image.Image:
    """Draw a scene; lengths are in units of a 32-pixel image."""
    unit = 32.0 / image_size
    axis = (np.arange(image_size) + 0.5) * unit
    y, x = np.meshgrid(axis, axis, indexing="ij")
    canvas = _background(x, y, generator)
    along = np.array([generator.uniform(7.5, 9.5), generator.uniform(22.5, 24.5)])
    across = generator.uniform(10, 22) + generator.uniform(-3, 3, size=2)
    xs, ys = (along, across) if scene.relation == "left" else (across, along)
    if generator.random() < 0.3:  # a third, unnamed object in a free corner
        corner = np.array([generator.choice([3.5, 28.5]), generator.choice([3.5, 28.5])])
        if min(np.hypot(xs[i] - corner[0], ys[i] - corner[1]) for i in range(2)) > 10.5:
            third = Thing("small", list(COLOURS)[generator.integers(len(COLOURS))], SHAPES[generator.integers(len(SHAPES))])
            _paint(canvas, x - corner[0], y - corner[1], third, 2.5)
    for index, thing in enumerate((scene.a, scene.b)):
        radius = SIZES[thing.size][0] * generator.uniform(0.92, 1.08)
        _paint(canvas, x - xs[index], y - ys[index], thing, radius)
    canvas += generator.normal(0, 7, size=canvas.shape)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def _background(x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    base = generator.uniform(40, 110, size=3)
    angle, frequency, phase = generator.uniform(0, np.pi), generator.uniform(0.2, 0.9), generator.uniform(0, 2 * np.pi)
    wave = np.sin(frequency * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    return base + generator.uniform(4, 16) * wave[..., None]


def _paint(canvas: np.ndarray, dx: np.ndarray, dy: np.ndarray, thing: Thing, radius: float) -> None:
    """Blend the object in, its edge softened over one unit."""
    distance = {
        "circle": lambda: np.hypot(dx, dy) - radius,
        "ring": lambda: np.abs(np.hypot(dx, dy) - 0.75 * radius) - 0.28 * radius,
        "square": lambda: np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * radius,
        # Point up: image rows grow downwards.
        "triangle": lambda: np.maximum(np.abs(dx) * 0.87 - dy * 0.5, dy) - 0.55 * radius,
        "cross": lambda: np.minimum(
            np.maximum(np.abs(dx) - radius, np.abs(dy) - 0.3 * radius), np.maximum(np.abs(dy) - radius, np.abs(dx) - 0.3 * radius)
        ),
    }[thing.shape]()
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    canvas *= 1 - cover
    canvas += cover * np.array(COLOURS[thing.colour], dtype=float)


def write_scenes(
    out: Path,
    *,
    num_train: int = 20000,
    num_val: int = 500,
    num_test: int = 1000,
    image_size: int = 32,
    seed: int = 0,
    samples_per_shard: int = 2000,
    progress: Progress = lambda items: items,
) -> None:
    """Write the set to `out` (see manifest.py). Training images carry three captions, the others two.

    Raises:
        UserError: `out` holds something else, or more val and test images are asked for than there are scenes to spare.
    """
    args = {"num_train": num_train, "num_val": num_val, "num_test": num_test, "image_size": image_size, "seed": seed}
    scenes = all_scenes()
    if min(num_train, num_val, num_test) < 1 or image_size < 16:
        raise UserError(f"scenes: counts must be positive and image_size at least 16, got {args}.")
    if num_val + num_test > len(scenes) // 2:
        raise UserError(f"scenes: num_val + num_test is {num_val + num_test}, more than half of the {len(scenes)} scenes. Ask for fewer.")
    order = np.random.default_rng(seed).permutation(len(scenes))
    chosen = {
        "val": order[:num_val],
        "test": order[num_val : num_val + num_test],
        "train": np.random.default_rng([seed, 1]).choice(order[num_val + num_test :], size=num_train),
    }
    with new_dataset(out, "scenes", {**args, "samples_per_shard": samples_per_shard}) as root:
        if root is None:
            return
        for number, (split, indices) in enumerate(chosen.items()):
            picked = (scenes[index] for index in progress(indices.tolist()))
            samples = _samples(picked, TRAIN_CAPTIONS if split == "train" else 2, image_size, [seed, 2, number])
            write_split(root, split, samples, samples_per_shard=samples_per_shard)
        write_tokenizer(root, word_tokenizer_files(_every_word()))
        write_record(root / "classes.json", {"classnames": classnames(), "templates": list(CLASS_TEMPLATES)})


def _samples(scenes: Iterator[Scene], num_captions: int, image_size: int, seed: list[int]) -> Iterator[Sample]:
    for position, scene in enumerate(scenes):
        generator = np.random.default_rng([*seed, position])
        buffer = io.BytesIO()
        render(scene, image_size, generator).save(buffer, "PNG")
        yield Sample(f"{position:08d}", buffer.getvalue(), "png", captions(scene, num_captions, generator), label(scene))


def scenes_tokenizer() -> FileTokenizer:
    """The word tokenizer that the set offers: of every word that a caption can hold."""
    return FileTokenizer(word_tokenizer_files(_every_word()))


def _every_word() -> list[str]:
    words: list[Any] = [*TEMPLATES, *COLOURS, *SHAPES, *(w for _, names in SIZES.values() for w in names)]
    words += [word for pair in RELATIONS.values() for names in pair for word in names]
    return [text.replace("{a}", "").replace("{b}", "").replace("{r}", "") for text in words]
