"""What a learngene consists of: the names and shapes of its tensors, and the sizes of model that it can write."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from mmlg_scale import towers
from mmlg_scale.bounds import MAX_BLOCKS, MAX_KNOTS
from mmlg_scale.errors import UserError
from mmlg_scale.learngene.blocks import BlockLayout
from mmlg_scale.learngene.embedding import factorised_shapes
from mmlg_scale.learngene.mixing import BASES, CONVENTIONS

TOWERS = ("image", "text")
WIDTH_MAPS = ("slice", "learned")
STEM = "stem."


@dataclass(frozen=True, eq=False)
class Structure:
    """The settings that fix a learngene's tensors.

    The multimodal blocks have the width of the wider tower. A narrower one takes their leading heads, residual channels and MLP rows
    (`slice`: both towers need the same head dimension), or E_out M E_in^T with learned maps between the widths (`learned`: LiGO, Wang et
    al. 2023; the MLP's hidden units, which any order serves as well, are sliced all the same).

    Attributes:
        config: the ancestor's open_clip configuration.
        basis: how coefficients depend on depth, see `mixing`.
        convention: of the linear basis, see `mixing`.
        width_map: how multimodal blocks reach the narrower tower.
        embedding_rank: of the token embedding's two factors (`embedding`); None: it is stored whole.

    Raises:
        UserError: settings that do not go together; names the recipe key.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = (
        "num_multimodal",
        "num_unimodal",
        "num_knots",
        "basis",
        "convention",
        "width_map",
        "embedding_rank",
    )
    """The fields that a recipe's extraction section has too."""

    config: dict[str, Any]
    num_multimodal: int = 1
    num_unimodal: int = 1
    num_knots: int = 8
    basis: str = "knots"
    convention: str = "inclusive"
    width_map: str = "slice"
    embedding_rank: int | None = None

    def __post_init__(self) -> None:
        for key, value, valid in (
            ("basis", self.basis, BASES),
            ("convention", self.convention, CONVENTIONS),
            ("width_map", self.width_map, WIDTH_MAPS),
        ):
            if value not in valid:
                raise UserError(f"recipe key extraction.{key}: {value!r} is unknown. Use one of: {', '.join(valid)}.")
        for key, least, most in (("num_multimodal", 0, MAX_BLOCKS), ("num_unimodal", 0, MAX_BLOCKS), ("num_knots", 2, MAX_KNOTS)):
            value = getattr(self, key)
            if type(value) is not int or not least <= value <= most:
                raise UserError(f"recipe key extraction.{key}: {value!r} is not a whole number from {least} to {most}.")
        if self.num_blocks < 1:
            raise UserError("recipe key extraction: has no blocks. Set num_unimodal to 1.")
        if self.basis == "linear" and self.num_blocks != 2:
            raise UserError(f"recipe key extraction.basis: linear mixes two blocks per tower, the recipe has {self.num_blocks}.")
        if self.num_multimodal and self.width_map == "slice":
            heads = [towers.head_dim(self.config, tower) for tower in TOWERS]
            if heads[0] != heads[1]:
                raise UserError(
                    "recipe key extraction.width_map: slice needs one head dimension, "
                    f"the image tower has {heads[0]}, the text tower {heads[1]}. Use learned."
                )
        if self.embedding_rank is not None:
            self._check_rank()
        self._check_fit()

    def _check_rank(self) -> None:
        most = min(towers.vocab_size(self.config), towers.width(self.config, "text"))
        if type(self.embedding_rank) is not int or not 1 <= self.embedding_rank <= most:
            raise UserError(
                f"recipe key extraction.embedding_rank: {self.embedding_rank!r} is not a whole number from 1 to {most}, "
                "the lesser of the vocabulary and the text tower's width. Use null to store the embedding whole."
            )

    def _check_fit(self) -> None:
        for tower in TOWERS:
            for own, wide in zip(self.layout(tower).matrices, self.layout(self.wide).matrices, strict=True):
                if any(n > most for n, most in zip(own.shape, wide.shape, strict=True)):
                    raise UserError(
                        f"recipe key model: {own.name} of the {tower} tower, {list(own.shape)}, does not fit into the wider tower's "
                        f"{list(wide.shape)}. Use towers whose MLP ratios agree."
                    )

    @property
    def num_blocks(self) -> int:
        """K: blocks that a layer mixes."""
        return self.num_multimodal + self.num_unimodal

    @property
    def num_rows(self) -> int:
        """Rows of the basis: knots, or one per block where the coefficients are fixed."""
        return self.num_knots if self.basis == "knots" else self.num_blocks

    @functools.cached_property
    def wide(self) -> str:
        """The wider tower, whose shapes the multimodal blocks have."""
        return max(TOWERS, key=lambda tower: self.layout(tower).matrix_size)

    def layout(self, tower: str, width: int | None = None) -> BlockLayout:
        """The block layout of a tower, at its own or a smaller residual width. Raises UserError for a width that does not fit."""
        return self._layouts(tower, width or towers.width(self.config, tower))

    @functools.cached_property
    def _layouts(self) -> Any:
        return functools.cache(lambda tower, width: BlockLayout.of(towers.block_template(self.sized(**{f"{tower}_width": width}), tower)))

    def sized(self, **sizes: int | None) -> dict[str, Any]:
        """The ancestor's configuration at other sizes, see `towers.with_sizes`."""
        return towers.with_sizes(self.config, **sizes)

    def mapped(self, tower: str) -> bool:
        """Whether the multimodal blocks reach this tower by learned maps."""
        return bool(self.num_multimodal) and self.width_map == "learned" and self.layout(tower) != self.layout(self.wide)

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor but the stems: blocks, coefficients, vectors and maps."""
        shapes: dict[str, tuple[int, ...]] = {"multimodal": (self.num_multimodal, self.layout(self.wide).matrix_size)}
        for tower in TOWERS:
            layout = self.layout(tower)
            shapes[f"unimodal_{tower}"] = (self.num_unimodal, layout.matrix_size)
            if self.basis == "knots":
                shapes[f"coefficients_{tower}"] = (self.num_knots, len(layout.matrices), self.num_blocks)
            shapes[f"vectors_{tower}"] = (self.num_rows, layout.vector_size)
            if self.mapped(tower):
                own, wide = towers.width(self.config, tower), towers.width(self.config, self.wide)
                shapes[f"residual_map_{tower}"] = shapes[f"head_map_{tower}"] = (own, wide)
        return shapes

    @functools.cached_property
    def stem_shapes(self) -> dict[str, tuple[int, ...]]:
        """The stems' tensors by open_clip's names, with the embedding's factors in its place."""
        return factorised_shapes(stem_shapes(self.config), self.embedding_rank)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a learngene: `block_shapes`, and the stems under `stem.`."""
        return self.block_shapes() | {STEM + name: shape for name, shape in self.stem_shapes.items()}

    def to_header(self) -> dict[str, Any]:
        """The settings as JSON, without the configuration; a rank of None is left out, as in files from before there was one."""
        return {key: value for key, value in asdict(self).items() if key != "config" and value is not None}


def stem_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a CLIP's tensors outside its blocks."""
    stem, _ = towers.split_state(towers.build_meta(config).state_dict())
    return {name: tuple(tensor.shape) for name, tensor in stem.items()}
