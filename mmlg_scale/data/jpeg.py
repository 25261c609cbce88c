"""Ordinary JPEGs, decoded and resized for training in a third of PIL's time. Everything else, and whatever is odd, is left to PIL.

libjpeg-turbo writes straight into an array: without reduction the same pixels as PIL's. torch's resize has PIL's kernels, with weights
rounded to 16 bits, so that a grey level may differ; evaluation and packing therefore use PIL alone.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import simplejpeg
import torch
from torch.nn import functional as F

SIGNATURE = b"\xff\xd8\xff"
START_OF_SCAN, APP1 = 0xDA, 0xE1
EXIF = b"Exif\0\0"
ORIENTATION_TAG, MAX_TAGS = 0x0112, 200
UPRIGHT_ENTRY = ((3, 2), (1, 4), (1, 2))
"""One short with the value 1: (number, bytes) of type, count and value."""
ORDINARY = ("YCbCr", "Gray")
"""Colour spaces that PIL would take for RGB or grey, too; CMYK, YCCK and RGB inside a JPEG are rare, and PIL's."""


def jpeg_size(payload: bytes, max_pixels: int) -> tuple[int, int] | None:
    """(width, height) of an ordinary JPEG, of its header alone; None for everything else, and for one that is or may be to be turned."""
    if not payload.startswith(SIGNATURE) or not is_upright(payload):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(payload)
    except ValueError:
        return None
    return (width, height) if colours in ORDINARY and 0 < width * height <= max_pixels else None


def is_upright(payload: bytes) -> bool:
    """Whether a JPEG's header says that it is upright, or nothing of that; what is in any way odd is left to PIL, as False.

    Segments are those of ITU-T T.81, annex B.1.1.4; most files have about eight before the first scan.
    """
    position, length = 2, len(payload)
    while position + 4 <= length and payload[position] == 0xFF:
        marker = payload[position + 1]
        if marker == START_OF_SCAN:
            return True
        stop = position + 2 + (payload[position + 2] << 8 | payload[position + 3])
        if marker == APP1 and not _says_upright(payload[position + 4 : stop]):
            return False
        position = stop
    return False


def _says_upright(content: bytes) -> bool:
    """Whether an APP1 segment has no orientation but "upright"; EXIF 2.3, section 4.6.2: a TIFF of one directory, or two."""
    if not content.startswith(EXIF):
        return b"tiff:Orientation" not in content  # XMP, in which PIL looks, too
    order: Literal["little", "big"] = "little" if content[6:8] == b"II" else "big"
    first = 6 + int.from_bytes(content[10:14], order)
    count = int.from_bytes(content[first : first + 2], order)
    tag = ORIENTATION_TAG.to_bytes(2, order)
    for start in range(first + 2, first + 2 + 12 * min(count, MAX_TAGS), 12):
        if content[start : start + 2] == tag:
            return content[start + 2 : start + 10] == b"".join(part.to_bytes(size, order) for part, size in UPRIGHT_ENTRY)
    return count <= MAX_TAGS and content[6:8] in (b"II", b"MM")


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
