"""How a model wants its images: geometry (resize, crop) and normalisation, as open_clip's preprocess_cfg says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmlg_scale.errors import UserError
from mmlg_scale.towers.library import open_clip

RESIZE_MODES = ("shortest", "longest", "squash")
INTERPOLATIONS = ("bicubic", "bilinear", "random")


@dataclass(frozen=True)
class Preprocess:
    """uint8 images [B, 3, H, W] -> normalised float images on the same device; the rest is obeyed where images are decoded.

    Attributes:
        mean, std: per channel, of values from 0 to 1.
        interpolation: of the resize; open_clip takes bicubic for `random` outside training.
        resize_mode: `shortest` (shorter side, then centre crop), `longest` (longer side, then padding), `squash` (both sides).
        fill_color: grey level of the padding.
    """

    mean: tuple[float, ...] = open_clip.OPENAI_DATASET_MEAN
    std: tuple[float, ...] = open_clip.OPENAI_DATASET_STD
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0

    def __call__(self, image_uint8_BCHW: Tensor) -> Tensor:
        scale = torch.tensor(self.std, device=image_uint8_BCHW.device).view(3, 1, 1) * 255
        shift = torch.tensor(self.mean, device=image_uint8_BCHW.device).view(3, 1, 1) * 255
        return (image_uint8_BCHW.float() - shift) / scale

    def to_config(self) -> dict[str, Any]:
        """open_clip's preprocess_cfg, without the size."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None, where: str) -> Preprocess:
        """The inverse of `to_config`; keys left out have open_clip's defaults. `where` starts the message.

        Raises:
            UserError: an unknown resize mode or interpolation, or a mean or std that is not three numbers.
        """
        found = {key: value for key, value in (config or {}).items() if key in cls.__dataclass_fields__ and value is not None}
        for key in ("mean", "std"):
            if key in found:
                value = found[key] if isinstance(found[key], (list, tuple)) else [found[key]] * 3
                if len(value) != 3 or not all(isinstance(number, (int, float)) for number in value) or (key == "std" and min(value) <= 0):
                    raise UserError(f"{where}: preprocess_cfg.{key} is {found[key]!r}. Use three numbers.")
                found[key] = tuple(float(number) for number in value)
        for key, valid in (("resize_mode", RESIZE_MODES), ("interpolation", INTERPOLATIONS)):
            if found.get(key, valid[0]) not in valid:
                raise UserError(f"{where}: preprocess_cfg.{key} is {found[key]!r}. Use one of: {', '.join(valid)}.")
        fill = found.get("fill_color", 0)
        if not isinstance(fill, int) or not 0 <= fill <= 255:
            raise UserError(f"{where}: preprocess_cfg.fill_color is {fill!r}. Use a grey level from 0 to 255.")
        return cls(**found)
