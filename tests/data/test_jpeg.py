"""The quick way for ordinary JPEGs against PIL: the same pixels, nearly the same resize, the same opinion of damage; all else is PIL's."""

from __future__ import annotations

import io
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from mmlg_scale import towers
from mmlg_scale.data import images
from mmlg_scale.data.images import MAX_PIXELS, decode, random_resized_crop
from mmlg_scale.data.jpeg import jpeg_size, read_jpeg, resize


def picture(width: int, height: int, mode: str = "RGB", **options: object) -> bytes:
    """Structure of every scale, as a JPEG."""
    draws = np.random.default_rng(width * height)
    coarse = Image.fromarray(draws.integers(0, 256, (height // 9 + 2, width // 9 + 2, 3), dtype=np.uint8)).resize((width, height))
    pixels = np.asarray(coarse).astype(int) + draws.normal(0, 9, (height, width, 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode).save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def by_pil(payload: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(payload)).convert("RGB"))


KINDS: dict[str, dict[str, object]] = {
    "4:2:0": {"subsampling": 2},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "grey": {"mode": "L"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "height"), [(64, 48), (97, 31), (1, 1), (17, 200)])
def test_pixels_are_pils(kind: str, width: int, height: int) -> None:
    payload = picture(width, height, **KINDS[kind])  # type: ignore[arg-type]
    assert jpeg_size(payload, MAX_PIXELS) == (width, height)
    found = read_jpeg(payload, (width, height), (width, height))
    assert found is not None
    assert found[1] == 1
    assert np.array_equal(found[0], by_pil(payload))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(224, 224), (61, 90), (300, 301), (7, 5), (256, 243)])
def test_the_resize_is_pils_but_for_the_rounding_of_weights(size: tuple[int, int], interpolation: str) -> None:
    pixels = by_pil(picture(256, 243))
    resample = images.resampling(towers.Preprocess(interpolation=interpolation))  # type: ignore[arg-type]
    wanted = np.asarray(Image.fromarray(pixels).resize(size, resample)).astype(int)
    difference = np.abs(resize(pixels, size, interpolation) - wanted)
    assert difference.max() <= 2
    assert difference.mean() < 0.05


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (90, 71), (71, 90), (128, 256), (200, 151), (40, 31), (3000, 3)])
def test_what_training_decodes_is_what_evaluation_sees(width: int, height: int, resize_mode: str) -> None:
    payload = picture(width, height)
    for interpolation, size in (("bicubic", 64), ("bilinear", 33)):
        preprocess = towers.Preprocess(interpolation=interpolation, resize_mode=resize_mode, fill_color=9)  # type: ignore[arg-type]
        quick, exact = (decode(payload, size, preprocess=preprocess, draft=draft) for draft in (True, False))
        assert quick.shape == exact.shape == (size, size, 3)
        difference = np.abs(quick.astype(int) - exact)
        # PIL takes the vertical pass first where that is cheaper, and rounds between them; a reduced image has been filtered otherwise.
        reduced = (min if resize_mode == "shortest" else max)(width, height) >= 2 * size
        assert difference.mean() < (5 if reduced else 0.4)
        assert reduced or difference.max() <= 2


@pytest.mark.parametrize(("width", "height"), [(256, 256), (300, 233), (700, 480), (60, 50), (1001, 333)])
def test_a_random_crop_is_the_box_that_is_drawn(width: int, height: int) -> None:
    """Against PIL's crop and resize of the whole image; one that is read reduced has been filtered otherwise."""
    payload, scale, ratio = picture(width, height), (0.3, 0.8), (3 / 4, 4 / 3)
    for seed in range(4):
        left, top, box_width, box_height = images._crop_box(width, height, np.random.default_rng(seed), scale, ratio)
        box = Image.fromarray(by_pil(payload)).crop((left, top, left + box_width, top + box_height))
        wanted = np.asarray(box.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
        found = random_resized_crop(payload, 64, np.random.default_rng(seed), scale=scale, ratio=ratio)
        difference = np.abs(found - wanted)
        reduced = min(box_width, box_height) >= 2 * 64
        assert difference.mean() < (5 if reduced else 0.4), seed
        assert reduced or difference.max() <= 2


def test_the_same_numbers_are_drawn_either_way() -> None:
    """A sample's crop does not depend on which decoder reads it."""
    payload = picture(90, 70)
    left, right = np.random.default_rng(3), np.random.default_rng(3)
    quick = random_resized_crop(payload, 48, left)
    with mock.patch.object(images, "read_jpeg", return_value=None):
        slow = random_resized_crop(payload, 48, right)
    assert left.bit_generator.state == right.bit_generator.state
    assert 0 < np.abs(quick.astype(int) - slow).mean() < 2  # PIL's box lets pixels beside it take part


@pytest.mark.parametrize("name", ["CMYK", "PNG", "WEBP", "empty", "header only", "too many pixels"])
def test_everything_else_is_left_to_pil(name: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(by_pil(picture(40, 30))).save(buffer, name if name in ("PNG", "WEBP") else "PNG")
    rest = {"CMYK": picture(40, 30, "CMYK"), "empty": b"", "header only": picture(40, 30)[:20], "too many pixels": picture(40, 30)}
    assert jpeg_size(rest.get(name, buffer.getvalue()), 40 * 30 - 1 if name == "too many pixels" else MAX_PIXELS) is None


def test_damage_is_what_pil_says_it_is() -> None:
    """Bytes changed, cut off, doubled: training fails where PIL does, and reads what PIL reads."""
    whole, draws = picture(96, 80), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        payload = bytearray(whole)
        kind = draws.integers(3)
        at = int(draws.integers(2, len(payload)))
        if kind == 0:
            for place in draws.integers(2, len(payload), draws.integers(1, 6)):
                payload[place] = draws.integers(256)
        elif kind == 1:
            del payload[at:]
        else:
            payload[at:at] = payload[at - 2 : at + 30]
        outcomes = []
        for draft in (True, False):
            try:
                outcomes.append(decode(bytes(payload), 64, draft=draft))
            except Exception:  # PIL's plugins raise nearly anything
                outcomes.append(None)
        quick, exact = outcomes
        assert (quick is None) is (exact is None)
        refused += exact is None
        if quick is not None and exact is not None:
            assert np.abs(quick.astype(int) - exact).mean() < 0.4
    assert 10 < refused < 140


@pytest.mark.parametrize(("width", "height", "eighths"), [(800, 608, 2), (801, 607, 2), (1001, 333, 1), (640, 480, 4)])
def test_a_reduced_photograph_covers_the_same_ground(width: int, height: int, eighths: int) -> None:
    """A slope along each axis, read at a fraction: the fraction is right to where the last, smaller pixel ends."""
    x, y = np.arange(width) / width, np.arange(height)[:, None] / height
    slope = np.stack([255 * x + 0 * y, 255 * y + 0 * x, 127 + 0 * x + 0 * y], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(slope.round().astype(np.uint8)).save(buffer, "JPEG", quality=98, subsampling=0)
    read = read_jpeg(buffer.getvalue(), (width, height), (-(-width * eighths // 8), -(-height * eighths // 8)))
    assert read is not None
    pixels, fraction = read
    assert fraction == eighths / 8
    assert pixels.shape == (-(-height * eighths // 8), -(-width * eighths // 8), 3)
    found = random_resized_crop(buffer.getvalue(), 75, np.random.default_rng(0), scale=(0.5, 0.9)).astype(float)
    left, top, box_width, box_height = images._crop_box(width, height, np.random.default_rng(0), (0.5, 0.9), (3 / 4, 4 / 3))
    middle = (np.arange(75) + 0.5) / 75
    assert np.abs(found[37, :, 0] - 255 * (left + middle * box_width) / width).max() < 2.5
    assert np.abs(found[:, 37, 1] - 255 * (top + middle * box_height) / height).max() < 2.5
