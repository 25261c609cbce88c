"""The sizes that a learngene's training draws: drawn each step, evaluated, and remembered in the learngene."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from mmlg_scale import recipe, towers
from mmlg_scale.accounting import TextLength, over_lengths, training_flops
from mmlg_scale.errors import UserError
from mmlg_scale.learngene.embedding import product_flops
from mmlg_scale.streams import Stream, generator

TOWERS = ("image", "text")
COUNTED_STEPS = 20_000
"""Steps whose sizes a forecast draws; each takes a third of a millisecond."""


def tap_layers(depths: Sequence[float], num_layers: int) -> tuple[int, ...]:
    """The layer nearest to each relative depth, counted from 1 (halves round up, and layer 0 is never compared)."""
    return tuple(max(1, int(depth * num_layers + 0.5)) for depth in depths)


def pooled_towers(config: Mapping[str, Any], depths: Sequence[float]) -> tuple[str, ...]:
    """The towers whose last hidden state is not among those compared at `depths`, see `accounting.forward_flops`."""
    counts = {tower: towers.num_layers(config, tower) for tower in TOWERS}
    return tuple(tower for tower, count in counts.items() if count not in tap_layers(depths, count))


def compared_depths(loss: recipe.DistillationLoss | None) -> Sequence[float]:
    """The relative depths at which hidden states are compared."""
    return loss.hidden_depths if loss is not None and loss.hidden else ()


class SizeDraw:
    """Draws the sizes of the students of every step, from the seed and the step number only.

    Args:
        config: the ancestor's open_clip configuration.

    Raises:
        UserError: a tower has fewer layers than the smallest depth.
    """

    def __init__(self, settings: recipe.Elastic, config: Mapping[str, Any], seed: int) -> None:
        self.settings, self.config, self.seed = settings, config, seed
        self.max_layers = most_layers(settings, config)
        self._depths_compared = compared_depths(getattr(settings, "loss", None))
        self._flops = functools.cache(
            lambda length, captions, *sizes: self._student_flops(towers.with_sizes(config, **dict(sizes)), length, captions)
        )

    def sizes(self, step: int) -> list[dict[str, int]]:
        """The sizes of the students at `step`: the same on every rank, and after every resume."""
        return [self._size(step, index) for index in range(self.settings.students_per_step)]

    def _size(self, step: int, index: int) -> dict[str, int]:
        """One depth for both towers, scaled down for the one that has fewer layers to draw from, and a width for each."""
        widths = self.settings.width_shares
        least, most = self.settings.min_layers, self._most(step)
        if self.settings.sampling == "sandwich" and index < 2:
            return self._even(most, max(widths)) if index == 0 else self._even(least, min(widths))
        draw = generator(self.seed, Stream.SIZES, step, index)
        layers = self._depths(int(draw.integers(least, most, endpoint=True)))
        shares = draw.choice(widths, size=2)
        return layers | {f"{tower}_width": self._width(tower, share) for tower, share in zip(TOWERS, shares, strict=True)}

    def _most(self, step: int) -> int:
        """The greatest depth that `step` draws from: while it grows, each depth is the greatest for equally many steps."""
        least, most = self.settings.min_layers, max(self.max_layers.values())
        growing = self.settings.growth * self.settings.training.steps
        return most if step >= growing else least + int((most - least + 1) * step / growing)

    def _even(self, layers: int, share: float) -> dict[str, int]:
        """Both towers at the same depth, as `_depths` has it, and the same share of their widths."""
        return self._depths(layers) | {f"{tower}_width": self._width(tower, share) for tower in TOWERS}

    def _depths(self, layers: int) -> dict[str, int]:
        """Both towers' depths where the deeper one has `layers`: equally far between the least and each tower's most."""
        least, most = self.settings.min_layers, max(self.max_layers.values())
        share = (layers - least) / max(1, most - least)
        return {f"{tower}_layers": least + int(share * (own - least) + 0.5) for tower, own in self.max_layers.items()}

    def _width(self, tower: str, share: float) -> int:
        """The residual width with this fraction of the tower's heads, rounded to whole ones."""
        head = towers.head_dim(self.config, tower)
        heads = towers.width(self.config, tower) // head
        return head * max(1, int(share * heads + 0.5))

    def flops(self, step: int, text_length: TextLength = None, captions: int = 1) -> int:
        """FLOPs per image of the students' forward and backward passes at `step`, on captions of that many tokens (None: all)."""
        whole = towers.context_length(self.config)

        def flops(size: Mapping[str, int]) -> int:
            return over_lengths(lambda length: self._flops(whole if length is None else length, captions, *size.items()), text_length)

        return sum(flops(size) for size in self.sizes(step))

    def total_flops(self, steps: int, captions: int = 1) -> int:
        """FLOPs per image of `steps` steps on whole captions: exact up to COUNTED_STEPS, from as many steps evenly apart beyond."""
        if steps <= COUNTED_STEPS:
            return sum(self.flops(step, None, captions) for step in range(steps))
        counted = sum(self.flops(position * steps // COUNTED_STEPS, None, captions) for position in range(COUNTED_STEPS))
        return counted * steps // COUNTED_STEPS

    def _student_flops(self, config: Mapping[str, Any], length: int, captions: int) -> int:
        embedding = 3 * captions * product_flops(length, self.settings.embedding_rank, towers.width(config, "text"))
        pooled = pooled_towers(config, self._depths_compared)
        return training_flops(config, text_length=length, captions=captions, pooled=pooled) + embedding

    def evaluated(self) -> dict[str, dict[str, int]]:
        """The sizes to evaluate, by name: the least, middle and greatest depth, and the least width where several are drawn."""
        least, most = self.settings.min_layers, max(self.max_layers.values())
        sizes = [self._depths(layers) for layers in sorted({least, (least + most) // 2, most})]
        narrowest = min(self.settings.width_shares)
        if narrowest < 1:
            sizes.append(self._even(most, narrowest))
        return {recipe.Size(**size).name: size for size in sizes}  # type: ignore[arg-type]

    def trained_range(self) -> dict[str, dict[str, list[int]]]:
        """The depths and widths that steps draw from: per tower [least, most]."""
        narrowest, widest = min(self.settings.width_shares), max(self.settings.width_shares)
        return {
            tower: {
                "layers": [self.settings.min_layers, self.max_layers[tower]],
                "width": [self._width(tower, narrowest), self._width(tower, widest)],
            }
            for tower in TOWERS
        }


def most_layers(settings: recipe.Elastic, config: Mapping[str, Any]) -> dict[str, int]:
    """The largest depth of each tower that is drawn. Raises UserError where it is below the least."""
    found = {tower: settings.max_layers or towers.num_layers(config, tower) for tower in TOWERS}
    for tower, most in found.items():
        if most < settings.min_layers:
            raise UserError(f"recipe key extraction.min_layers: is {settings.min_layers}, the {tower} tower has {most}. Use fewer.")
    return found
