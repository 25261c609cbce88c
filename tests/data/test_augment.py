"""Crops and the two ways of decoding, against PIL and open_clip."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmlg_scale import towers
from mmlg_scale.data.augment import crop_batch, crop_boxes, uniforms
from mmlg_scale.data.images import _crop_box, check_decodes, decode, random_resized_crop
from mmlg_scale.data.pipeline import StreamSettings, TrainStream
from tests.data.specs import spec_for


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(4, 40), count=st.integers(1, 9))
def test_a_batch_of_crops_equals_pils(seed: int, size: int, count: int) -> None:
    """Within one grey level, and mostly exactly: PIL rounds between its two passes."""
    images = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    boxes = crop_boxes(seed, np.full(count, 2), np.arange(count), size)
    found = crop_batch(images, boxes)
    for image, (side, left, top), ours in zip(images, boxes.T.tolist(), found, strict=True):
        box = (left, top, left + side, top + side)
        theirs = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box))
        difference = np.abs(theirs.astype(int) - ours.transpose(1, 2, 0))
        # Pixels beyond white or black, which PIL cuts off between the passes, move by more: noise is the worst case for that.
        assert np.percentile(difference, 75) <= 1
        assert difference.max() <= 24
    smooth = np.sort(np.sort(images, axis=1), axis=2) // 2 + 60  # nothing to cut off
    for image, (side, left, top), ours in zip(smooth, boxes.T.tolist(), crop_batch(smooth, boxes), strict=True):
        box = (left, top, left + side, top + side)
        theirs = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box))
        assert np.abs(theirs.astype(int) - ours.transpose(1, 2, 0)).max() <= 1


def test_the_whole_image_is_itself() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    boxes = np.array([[20] * 3, [0] * 3, [0] * 3])
    assert np.array_equal(crop_batch(images, boxes), images.transpose(0, 3, 1, 2))


def test_a_crop_depends_on_seed_epoch_and_sample_alone() -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    epochs, indices = generator.integers(0, 5, 64), generator.integers(0, 10**9, 64)
    whole = crop_batch(images, crop_boxes(7, epochs, indices, 32))
    order = generator.permutation(64)
    for part in np.split(order, [1, 5, 30]):
        assert np.array_equal(crop_batch(images[part], crop_boxes(7, epochs[part], indices[part], 32)), whole[part])
    for other in (crop_boxes(8, epochs, indices, 32), crop_boxes(7, epochs + 1, indices, 32), crop_boxes(7, epochs, indices + 1, 32)):
        assert (other != crop_boxes(7, epochs, indices, 32)).any(axis=0).mean() > 0.9


def test_boxes_are_spread_evenly_over_what_they_may_be() -> None:
    side, left, top = crop_boxes(3, np.repeat(np.arange(20), 5000), np.tile(np.arange(5000), 20), 30)
    assert side.min() == 24
    assert side.max() == 30
    inner = [(side == value).mean() for value in range(25, 30)]
    assert np.allclose(inner, 1 / 6, atol=0.01)  # the ends, by rounding, half of that
    for start in (left, top):
        assert start.min() == 0
        assert (start + side).max() == 30
        shares = [(start[side == 24] == value).mean() for value in range(7)]
        assert np.allclose(shares, 1 / 7, atol=0.03)
    assert abs(np.corrcoef(left[side == 24], top[side == 24])[0, 1]) < 0.05


def test_uniform_numbers_are_uniform_and_independent() -> None:
    numbers = uniforms(1, np.repeat(np.arange(50), 1000), np.tile(np.arange(1000), 50), 3)
    for row in numbers:
        counts = np.histogram(row, bins=50, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 95  # chi-squared with 49 degrees of freedom: 99.99 %
    assert np.abs(np.corrcoef(numbers) - np.eye(3)).max() < 0.02
    by_epoch = numbers.reshape(3, 50, 1000)
    assert abs(np.corrcoef(by_epoch[0, 0], by_epoch[0, 1])[0, 1]) < 0.12


def photograph(width: int, height: int) -> bytes:
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([127 + 100 * np.sin(x / (11 + k)) * np.cos(y / (17 + k)) for k in range(3)], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


@pytest.mark.parametrize(("width", "height"), [(640, 480), (300, 900), (130, 97), (64, 64), (40, 70)])
def test_a_drafted_jpeg_is_nearly_the_same_image(width: int, height: int) -> None:
    payload = photograph(width, height)
    full, drafted = decode(payload, 64), decode(payload, 64, draft=True)
    assert full.shape == drafted.shape == (64, 64, 3)
    assert np.abs(full.astype(int) - drafted).mean() < 0.8
    theirs = towers.open_clip.image_transform(64, is_train=False)(Image.open(io.BytesIO(payload)))
    mean, std = (np.array(value)[:, None, None] for value in (towers.open_clip.OPENAI_DATASET_MEAN, towers.open_clip.OPENAI_DATASET_STD))
    assert np.abs(full.transpose(2, 0, 1) - 255 * (theirs.numpy() * std + mean)).max() < 1.01  # what evaluation sees


def test_a_draft_never_has_fewer_pixels_than_wanted() -> None:
    """A size is halved only where the half is still no smaller: with 479 rows, wanting 240, all of them are decoded."""
    for height, halved in ((480, True), (478, False)):
        payload = photograph(600, height)
        difference = np.abs(decode(payload, 240, draft=True).astype(int) - decode(payload, 240))
        assert bool(difference.max() > 2) is halved  # without, only the rounding differs


def test_random_resized_crop_is_torchvisions() -> None:
    """The same distribution of boxes, and for a given box the same pixels up to drafting."""
    from torchvision.transforms import RandomResizedCrop

    generator = np.random.default_rng(0)
    image = Image.new("RGB", (500, 333))
    theirs = np.array([RandomResizedCrop.get_params(image, (0.9, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)])  # top, left, height, width
    left, top, width, height = np.array([_crop_box(500, 333, generator, (0.9, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)]).T
    for ours, column in ((top, 0), (left, 1), (height, 2), (width, 3)):
        spread = max(1.0, theirs[:, column].std())
        assert abs(ours.mean() - theirs[:, column].mean()) < 0.15 * spread + 0.2
        assert 0.85 < (ours.std() + 0.1) / (theirs[:, column].std() + 0.1) < 1.18
    payload = photograph(500, 333)
    left, top, width, height = _crop_box(500, 333, np.random.default_rng(4), (0.9, 1.0), (3 / 4, 4 / 3))
    full = Image.open(io.BytesIO(payload)).convert("RGB")
    expected = np.asarray(full.crop((left, top, left + width, top + height)).resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(expected - random_resized_crop(payload, 64, np.random.default_rng(4))).mean() < 1


def test_resized_crops_repeat_and_differ_by_epoch(scenes: Path) -> None:
    def images(start_step: int = 0, cache_decoded: bool = True) -> list[np.ndarray]:
        settings = StreamSettings(global_batch_size=75, seed=5, augment="resized_crop", cache_decoded=cache_decoded)
        stream = iter(TrainStream(scenes / "train", spec_for(scenes, image_size=24), settings, start_step=start_step))
        found = np.empty((2, 150, 3, 24, 24), np.uint8)
        for step in range(start_step, 4):
            batch = next(stream)
            found[step // 2, batch.indices_B.numpy()] = batch.image_uint8_BCHW.numpy()
        return list(found)

    first, second = images()
    assert (np.abs(first.astype(int) - second).mean(axis=(1, 2, 3)) > 0.5).mean() > 0.9
    assert np.array_equal(images(start_step=2, cache_decoded=False)[1], second)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_a_cut_jpeg_is_found_without_decoding_all_of_it(keep: float) -> None:
    payload = photograph(300, 200)
    check_decodes(payload)
    with pytest.raises(OSError, match="truncated"):
        check_decodes(payload[: int(keep * len(payload))])
