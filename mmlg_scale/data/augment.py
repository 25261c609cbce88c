"""Random crops of a whole batch at once; every draw is a function of (seed, epoch, sample), so batches repeat however they are made."""

from __future__ import annotations

import numpy as np

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
