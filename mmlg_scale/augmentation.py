"""What is drawn for each training image, by the names of open_clip's `aug_cfg`: a section of the recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmlg_scale.errors import UserError
from mmlg_scale.ranges import ClosedUnitInterval

MAX_JITTER = 100


@dataclass
class Augmentation:
    """open_clip's `aug_cfg`: what data.augment resized_crop draws for each image, anew every epoch. timm's keys are not supported."""

    scale: list[float] = field(default_factory=lambda: [0.9, 1.0])
    """Smallest and largest share of the image's area that a crop takes. Pre-training with many epochs often uses [0.4, 1.0]."""
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Smallest and largest width of a crop divided by its height."""
    color_jitter: list[float] | None = None
    """Strengths of the changes of brightness, contrast, saturation and hue, as torchvision's ColorJitter takes them:
    [0.32, 0.32, 0.32, 0.08]. The first three are factors from 1 - x to 1 + x; hue moves by up to x of the circle, at most 0.5."""
    color_jitter_prob: ClosedUnitInterval = 0.0
    """Share of the images whose colours are changed; above 0 where color_jitter is given. Often 0.8."""
    gray_scale_prob: ClosedUnitInterval = 0.0
    """Share of the images that are made grey. Often 0.2."""

    def check(self, key: str) -> None:
        """Raise UserError where a value is out of range; `key` is where this object is in the recipe."""
        for name, pair, least, most in (("scale", self.scale, 0.0001, 1.0), ("ratio", self.ratio, 0.01, 100.0)):
            fits = len(pair) == 2 and least <= pair[0] <= pair[1] <= most
            _require(fits, f"{key}.{name}", f"is {pair}", f"Use two numbers from {least} to {most}, the smaller one first.")
        jitter = self.color_jitter
        if jitter is not None:
            fits = len(jitter) == 4 and all(0 <= x <= MAX_JITTER for x in jitter) and jitter[3] <= 0.5
            remedy = f"Use four numbers: brightness, contrast, saturation from 0 to {MAX_JITTER}, hue from 0 to 0.5."
            _require(fits, f"{key}.color_jitter", f"is {jitter}", remedy)
        problem = f"is {self.color_jitter_prob}, color_jitter is {'not given' if jitter is None else jitter}"
        both = (jitter is not None) == (self.color_jitter_prob > 0)
        _require(both, f"{key}.color_jitter_prob", problem, "Give both, such as 0.8 and [0.32, 0.32, 0.32, 0.08], or neither.")


def _require(condition: bool, key: str, problem: str, remedy: str) -> None:
    if not condition:
        raise UserError(f"recipe key {key}: {problem}. {remedy}")
