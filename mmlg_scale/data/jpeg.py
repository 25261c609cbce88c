"""Ordinary JPEGs, decoded and resized for training in a third of PIL's time. Everything else, and whatever is odd, is left to PIL.

libjpeg-turbo writes straight into an array: without reduction the same pixels as PIL's. torch's resize has PIL's kernels, with weights
rounded to 16 bits, so that a grey level may differ; evaluation and packing therefore use PIL alone.
"""

from __future__ import annotations

import numpy as np
import simplejpeg
import torch
from torch.nn import functional as F

SIGNATURE = b"\xff\xd8\xff"
ORDINARY = ("YCbCr", "Gray")
"""Colour spaces that PIL would take for RGB or grey, too; CMYK, YCCK and RGB inside a JPEG are rare, and PIL's."""


def jpeg_size(payload: bytes, max_pixels: int) -> tuple[int, int] | None:
    """(width, height) of an ordinary JPEG, of its header alone; None for everything else."""
    if not payload.startswith(SIGNATURE):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(payload)
    except ValueError:
        return None
    return (width, height) if colours in ORDINARY and 0 < width * height <= max_pixels else None


def read_jpeg(payload: bytes, whole: tuple[int, int], least: tuple[int, int]) -> tuple[np.ndarray, float] | None:
    """RGB, uint8 [H, W, 3]: at 1/2 or less of its size where that is no smaller than `least`; and that fraction, a multiple of 1/8.

    A side that the fraction does not divide is rounded up, its last pixel covering less. Sizes are (width, height). None where the decoder
    has anything to complain of: PIL then decides whether the image is damaged.
    """
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(payload, "RGB", min_width=least[0], min_height=least[1], min_factor=2)
    except ValueError:
        return None
    return pixels, (8 * pixels.shape[1] // whole[0]) / 8 if pixels.shape[1] < whole[0] else 1.0


def resize(pixels_HWC: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """To (width, height), antialiased: uint8 [H, W, 3]. `interpolation` is bilinear, or anything else for bicubic."""
    if pixels_HWC.shape[1::-1] == size:
        return pixels_HWC
    image = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    mode = "bilinear" if interpolation == "bilinear" else "bicubic"
    found = F.interpolate(image, size=size[::-1], mode=mode, antialias=True)
    return found[0].permute(1, 2, 0).numpy()
