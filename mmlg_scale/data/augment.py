"""Random crops of a whole batch at once, and random colours; every draw is a function of (seed, epoch, sample), so that batches repeat
however they are made.

Colours are changed as torchvision's ColorJitter and Grayscale change PIL's images, in 16-bit integers in place of PIL's arithmetic, which
takes five times as long: each step is rounded to whole grey levels once. Hue is turned without PIL's detour over hue and saturation of 8
bits, which moves colours by several grey levels by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mmlg_scale.augmentation import Augmentation
from mmlg_scale.streams import Stream, generator

_MASK = 2**64 - 1
CHUNK_PIXELS = 16 * 32**2


def uniforms(seed: int, epochs_B: np.ndarray, indices_B: np.ndarray, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) for each (epoch, sample) -> float64 [count, B].

    SplitMix64's output function (Steele, Lea & Flood 2014) over a key of (seed, epoch, sample) plus multiples of its increment: as good as
    a generator per sample for this, and a hundredth of its cost.
    """
    increment = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key_B = _mix(_mix(np.uint64(seed & _MASK) * increment + epochs_B.astype(np.uint64)) * increment + indices_B.astype(np.uint64))
        steps = np.arange(1, count + 1, dtype=np.uint64)[:, None] * increment
        return (_mix(key_B + steps) >> np.uint64(11)) * 2.0**-53


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def crop_boxes(seed: int, epochs_B: np.ndarray, indices_B: np.ndarray, size: int) -> np.ndarray:
    """Squares of 80 to 100 % of the side, anywhere inside: (side, left, top) in pixels, int64 [3, B]."""
    scale, across, down = uniforms(seed, epochs_B, indices_B, 3)
    side = np.rint(size * (0.8 + 0.2 * scale)).astype(np.int64)
    return np.stack([side, *((part * (size - side + 1)).astype(np.int64) for part in (across, down))])


def resize_weights(size: int, side: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Bicubic interpolation (Keys 1981, a = -1/2) from `side` pixels at `start` to `size`, one axis: float32 [B, size out, size in].

    As PIL's resize with a box: pixels outside the box but inside the image take part, and weights are normalised at the image's edge.
    """
    assert (side <= size).all()  # a wider box would need the kernel widened
    centre = start[:, None] + (np.arange(size) + 0.5) * side[:, None] / size
    x = np.abs(np.arange(size) + 0.5 - centre[..., None])
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)


def crop_batch(images_BHWC: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Cut each square out and resize it back: uint8 [B, S, S, 3] and (side, left, top) [3, B] -> uint8 [B, 3, S, S]."""
    size = images_BHWC.shape[1]
    side, left, top = boxes
    # Few different (side, start) occur in small images: each is computed once.
    pairs, which = np.unique(np.concatenate([side * size + left, side * size + top]), return_inverse=True)
    weights = resize_weights(size, pairs // size, pairs % size)
    across_BWW, down_BHH = weights[which[: len(side)]].transpose(0, 2, 1)[:, None], weights[which[len(side) :]][:, None]
    cropped_BCHW = np.empty((len(side), 3, size, size), np.uint8)
    step = max(1, CHUNK_PIXELS // size**2)  # so few at a time that the floats stay in the cache
    for part in (slice(start, start + step) for start in range(0, len(side), step)):
        images_nCHW = images_BHWC[part].transpose(0, 3, 1, 2).astype(np.float32, order="C")
        resized_nCHW = down_BHH[part] @ images_nCHW @ across_BWW[part]
        np.rint(resized_nCHW, out=resized_nCHW)
        np.clip(resized_nCHW, 0, 255, out=resized_nCHW)
        cropped_BCHW[part] = resized_nCHW
    return cropped_BCHW


STEPS = 128
"""Factors are drawn in steps of 1/128, so that products stay within 16 bits."""
HUE_STEPS = 6 * 16 * STEPS
"""Of the whole circle."""


class Colours(NamedTuple):
    """What is done to an image's colours.

    Attributes:
        changes: (kind, factor) in this order: kind 0 brightness, 1 contrast, 2 saturation, in 1/128, 128 changing nothing; 3 hue, in
            1/12,288 of the circle.
        grey: whether it is made grey then.
    """

    changes: tuple[tuple[int, int], ...] = ()
    grey: bool = False


def draw_colours(settings: Augmentation, seed: int, epoch: int, index: int) -> Colours:
    """As torchvision draws them: whether, the order of the four, and each from a uniform distribution."""
    if settings.color_jitter is None and settings.gray_scale_prob == 0:
        return Colours()
    draws = generator(seed, Stream.COLOUR, epoch, index)
    # All are drawn, whatever the settings, so that no draw depends on a setting of another.
    jitter, grey, *parts = draws.random(6).tolist()
    order = draws.permutation(4).tolist()
    changes = []
    if settings.color_jitter is not None and jitter < settings.color_jitter_prob:
        for kind in order:
            strength = settings.color_jitter[kind]
            least = -strength if kind == 3 else max(0.0, 1 - strength)
            most = strength if kind == 3 else 1 + strength
            if strength > 0:
                changes.append((kind, round((least + (most - least) * parts[kind]) * (HUE_STEPS if kind == 3 else STEPS))))
    return Colours(tuple(changes), grey < settings.gray_scale_prob)


def recolour(image_HWC: np.ndarray, colours: Colours) -> np.ndarray:
    """Change an image's colours: uint8 [H, W, 3] -> uint8 [H, W, 3]; the image itself where there is nothing to change."""
    if colours == Colours():
        return image_HWC
    planes_3N = np.ascontiguousarray(image_HWC.reshape(-1, 3).T).astype(np.int16)
    for kind, factor in colours.changes:
        if kind == 0:
            _blend(planes_3N, np.int16(0), factor)
        elif kind == 1:
            _blend(planes_3N, np.int16(_luma(planes_3N).mean() + 0.5), factor)
        elif kind == 2:
            _blend(planes_3N, _luma(planes_3N), factor)
        else:
            _turn_hue(planes_3N, factor)
    if colours.grey:
        planes_3N[:] = _luma(planes_3N)
    found = np.empty_like(image_HWC)
    for channel, plane_N in enumerate(planes_3N.astype(np.uint8)):
        found[..., channel] = plane_N.reshape(image_HWC.shape[:2])
    return found


def _luma(planes_3N: np.ndarray) -> np.ndarray:
    """PIL's grey (ITU-R 601-2), equal to the last bit: int16 [N]."""
    # Numbers with 16 digits after the point, below 256: exact in fp32.
    weights = np.array([19595, 38470, 7471], np.float32) / 65536
    return (weights @ planes_3N.astype(np.float32) + np.float32(0.5)).astype(np.int16)


def _scaled(values: np.ndarray, numerator: int) -> np.ndarray:
    """values * numerator / 128, rounded; |values| is at most 255."""
    whole, part = divmod(numerator, STEPS)
    found = values * np.int16(part)
    found += np.int16(STEPS // 2)
    found >>= np.int16(STEPS.bit_length() - 1)
    if whole:
        found += values * np.int16(whole)
    return found


def _blend(planes_3N: np.ndarray, towards: np.ndarray | np.int16, factor: int) -> None:
    """Move away from `towards`: 0 for brightness, the mean grey for contrast, each pixel's grey for saturation."""
    planes_3N += _scaled(planes_3N - towards, factor - STEPS)
    np.clip(planes_3N, np.int16(0), np.int16(255), out=planes_3N)


def _turn_hue(planes_3N: np.ndarray, shift: int) -> None:
    """Turn the hue (HSV) by shift / 12,288 of the circle, |shift| at most half of it.

    With V the largest and C the range of (R, G, B), a channel is V - C + C * max(0, min(1, 2 - distance)) where distance, on a circle of
    6, is that of the hue from the channel's own: 0, 2, 4. All of it is computed times C, so that nothing is divided.
    """
    red, green, blue = planes_3N
    top, low = (extreme(extreme(red, green), blue) for extreme in (np.maximum, np.minimum))
    chroma = top - low
    hue, other = red - green, blue - red  # of the blue sector, minus 4 (-2 on the circle), and of the green one, minus 2
    hue -= 2 * chroma
    other += 2 * chroma
    _replace(hue, other, top == green)
    _replace(hue, green - blue, top == red)
    hue <<= np.int16(4)  # sixteenths from here on: at most 6 * 255 * 16 < 2^15
    hue += _scaled(chroma, shift)
    chroma <<= np.int16(4)
    low <<= np.int16(4)
    low += np.int16(8)  # rounds
    double, circle = 2 * chroma, 6 * chroma
    # The hue is now from -3 to 6, or with a negative shift from -6 to 3: centres that are never more than a circle away where that counts.
    for channel, centre in zip((red, green, blue), (0, 2, 4) if shift >= 0 else (0, -4, -2), strict=True):
        distance = np.abs(hue - np.int16(centre) * chroma)
        np.minimum(distance, circle - distance, out=distance)
        level = np.minimum(double - distance, chroma)
        np.clip(level, np.int16(0), np.int16(2**15 - 1), out=level)
        level += low
        np.right_shift(level, np.int16(4), out=channel)


def _replace(values: np.ndarray, others: np.ndarray, where: np.ndarray) -> None:
    """values[where] = others[where], by arithmetic: a sixth of the time of a masked copy."""
    values += (others - values) * where.astype(np.int16)
