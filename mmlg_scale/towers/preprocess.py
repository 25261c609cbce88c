"""How a model wants its images: geometry (resize, crop) and normalisation, as open_clip's preprocess_cfg says it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmlg_scale.errors import UserError
from mmlg_scale.reading import shown

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

    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, of the data that CLIP was trained on
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0

    def __call__(self, image_uint8_BCHW: Tensor) -> Tensor:
        shift, scale = _levels(self.mean, self.std, image_uint8_BCHW.device)
        # In place: half the time on a CPU, where each further copy of the images leaves the cache.
        return image_uint8_BCHW.float().sub_(shift).div_(scale)

    def to_config(self) -> dict[str, Any]:
        """open_clip's preprocess_cfg, without the size."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None, where: str) -> Preprocess:
        """The inverse of `to_config`; keys left out have open_clip's defaults. `where` starts the message.

        Raises:
            UserError: a value of another type, an unknown resize mode or interpolation, or a mean or std that is not three numbers.
        """
        if config is not None and not isinstance(config, Mapping):
            raise UserError(f"{where}: preprocess_cfg is {shown(config)!r}. Use an object with mean, std, interpolation, resize_mode.")
        found = {key: value for key, value in (config or {}).items() if key in cls.__dataclass_fields__ and value is not None}
        if (config or {}).get("mode", "RGB") != "RGB":
            raise UserError(f"{where}: preprocess_cfg.mode is {shown((config or {})['mode'])!r}. Supported: RGB.")
        for key in ("mean", "std"):
            if key in found:
                found[key] = _three(found[key], f"{where}: preprocess_cfg.{key}", above_zero=key == "std")
        for key, valid in (("resize_mode", RESIZE_MODES), ("interpolation", INTERPOLATIONS)):
            if found.get(key, valid[0]) not in valid:
                raise UserError(f"{where}: preprocess_cfg.{key} is {shown(found[key])!r}. Use one of: {', '.join(valid)}.")
        fill = found.get("fill_color", 0)
        if type(fill) is not int or not 0 <= fill <= 255:
            raise UserError(f"{where}: preprocess_cfg.fill_color is {shown(fill)!r}. Use a grey level from 0 to 255.")
        return cls(**found)


@functools.lru_cache(maxsize=16)
def _levels(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation as grey levels, [3, 1, 1]: kept on the device, where a copy from here would make each step wait."""
    shift, scale = (torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (mean, std))
    return shift, scale


def _three(value: Any, where: str, *, above_zero: bool) -> tuple[float, ...]:
    """One number for each channel; a single number counts for all three, as in open_clip, which takes 0 for its default."""
    numbers = list(value) if isinstance(value, (list, tuple)) else [value] * 3 if value else []
    plain = all(isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) < 1e6 for number in numbers)
    if len(numbers) != 3 or not plain or (above_zero and min(numbers) <= 0):
        raise UserError(f"{where} is {shown(value)!r}. Use three{' positive' if above_zero else ''} numbers.")
    return tuple(float(number) for number in numbers)
