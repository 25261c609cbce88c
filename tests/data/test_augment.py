"""Crops and the two ways of decoding, against PIL and open_clip."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmlg_scale import towers
from mmlg_scale.augmentation import Augmentation
from mmlg_scale.cli import main
from mmlg_scale.data.augment import HUE_STEPS, STEPS, Colours, crop_batch, crop_boxes, draw_colours, recolour, uniforms
from mmlg_scale.data.images import _crop_box, check_decodes, decode, random_resized_crop
from mmlg_scale.data.pipeline import StreamSettings, TrainStream
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.errors import UserError
from mmlg_scale.recipe import Data, Engine, Recipe
from mmlg_scale.recipe_file import check_keys
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


JITTER = Augmentation(color_jitter=[0.4, 0.3, 0.5, 0.2], color_jitter_prob=0.7, gray_scale_prob=0.25)


def many_colours(count: int, **options: object) -> list[Colours]:
    return [draw_colours(replace(JITTER, **options), 3, index % 7, index) for index in range(count)]  # type: ignore[arg-type]


def picture(side: int = 90) -> np.ndarray:
    """Every kind of pixel: noise, smooth parts, pure colours, greys, black and white."""
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    corners = np.array([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 128, 255)], np.uint8)
    noise[: len(corners), 0] = corners
    noise[:, 1:60] = np.asarray(Image.open(io.BytesIO(photograph(side, side))))[:, 1:60]
    noise[:40, 60:70] = np.arange(40, dtype=np.uint8)[:, None, None] * 6
    return noise


def by_torchvision(image: Image.Image | torch.Tensor, colours: Colours) -> Image.Image | torch.Tensor:
    """The same changes, by torchvision's functions."""
    from torchvision.transforms import functional as F

    for kind, factor in colours.changes:
        change = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[kind]
        image = change(image, factor / (HUE_STEPS if kind == 3 else STEPS))
    return F.rgb_to_grayscale(image, 3) if colours.grey else image


@pytest.mark.parametrize("kind", range(4))
def test_a_change_of_colours_is_torchvisions(kind: int) -> None:
    """Within the rounding of one step, of what torchvision makes of the same numbers in floating point; PIL's own within its rounding."""
    image = picture()
    exact = torch.from_numpy(image).permute(2, 0, 1).double() / 255
    for factor in (0, 1, 50, 127, 128, 129, 200, 383, 1000) if kind < 3 else (-6144, -4000, -983, -1, 0, 1, 700, 2048, 5000, 6144):
        colours = Colours(((kind, factor),))
        found, before = recolour(image, colours), image.copy()
        assert np.array_equal(image, before)
        wanted = 255 * by_torchvision(exact, colours).permute(1, 2, 0).numpy()
        # Half a level of rounding; contrast has the mean rounded besides, as PIL has, and all greys are PIL's, hundredths of a level away.
        slack = {0: 0.001, 1: 0.55 * abs(factor / 128 - 1), 2: 0.6 * abs(factor / 128 - 1), 3: 1 / 16}[kind]
        assert np.abs(found - wanted).max() <= 0.501 + slack
        theirs = np.asarray(by_torchvision(Image.fromarray(image), colours)).astype(int)
        if kind < 3:
            assert np.abs(found - theirs).max() <= 1
        else:
            # PIL's hue, saturation and value have 8 bits: it moves colours by some levels even when it turns by nothing.
            by_nothing = np.asarray(by_torchvision(Image.fromarray(image), Colours(((3, 0),)))).astype(int)
            assert np.abs(found - theirs).mean() < 0.5 + 1.5 * np.abs(image - by_nothing).mean()


def test_grey_is_pils_to_the_last_bit() -> None:
    image = picture()
    assert np.array_equal(recolour(image, Colours((), True)), np.asarray(Image.fromarray(image).convert("L").convert("RGB")))


def test_changes_one_after_the_other_are_torchvisions() -> None:
    image = picture(60)
    exact = torch.from_numpy(image).permute(2, 0, 1).double() / 255
    for colours in many_colours(40, color_jitter_prob=1.0):
        wanted = 255 * by_torchvision(exact, colours).permute(1, 2, 0).numpy()
        difference = np.abs(recolour(image, colours) - wanted)
        assert difference.mean() < 0.75
        assert np.percentile(difference, 99) < 3
    assert recolour(image, Colours()) is image


def test_colours_are_drawn_as_torchvision_draws_them() -> None:
    """How often, in which order, and from which distributions."""
    drawn = many_colours(6000)
    jittered = [colours.changes for colours in drawn if colours.changes]
    assert abs(len(jittered) / 6000 - 0.7) < 0.02
    assert abs(np.mean([colours.grey for colours in drawn]) - 0.25) < 0.02
    orders = Counter(tuple(kind for kind, _ in changes) for changes in jittered)
    assert len(orders) == 24  # all orders, equally often
    assert all(abs(count / len(jittered) - 1 / 24) < 0.01 for count in orders.values())
    for kind, (least, most, steps) in enumerate(((0.6, 1.4, 128), (0.7, 1.3, 128), (0.5, 1.5, 128), (-0.2, 0.2, HUE_STEPS))):
        values = np.array([factor for changes in jittered for of, factor in changes if of == kind]) / steps
        assert least - 0.5 / steps <= values.min() < least + 0.01 * (most - least) + 0.5 / steps
        assert most - 0.01 * (most - least) - 0.5 / steps < values.max() <= most + 0.5 / steps
        counts = np.histogram(values, bins=8, range=(least, most))[0] / len(values)
        assert np.abs(counts - 1 / 8).max() < 0.02
    many = [draw_colours(Augmentation(color_jitter=[3.0, 0, 0, 0], color_jitter_prob=1.0), 0, 0, index).changes for index in range(500)]
    assert {kind for ((kind, _),) in many} == {0}  # a strength of 0 leaves a change out
    factors = np.array([factor for ((_, factor),) in many]) / 128
    assert factors.min() >= 0
    assert abs(factors.mean() - 2) < 0.2


def test_a_draw_of_colours_depends_on_seed_epoch_and_sample_and_on_no_other_draw() -> None:
    base = many_colours(300)
    assert base == many_colours(300)
    assert [colours.grey for colours in many_colours(300, color_jitter=None, color_jitter_prob=0.0)] == [colours.grey for colours in base]
    assert [colours.changes for colours in many_colours(300, gray_scale_prob=0.0)] == [colours.changes for colours in base]
    for seed, epoch, index in ((4, 0, 0), (3, 1, 0), (3, 0, 1)):
        always = replace(JITTER, color_jitter_prob=1.0)
        assert draw_colours(always, seed, epoch, index) != draw_colours(always, 3, 0, 0)


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [((500, 333), (0.4, 1.0), (3 / 4, 4 / 3)), ((333, 500), (0.08, 0.5), (1.0, 1.0)), ((900, 200), (0.5, 1.0), (0.5, 1.2))],
)
def test_boxes_of_any_setting_are_torchvisions(size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Areas, ratios and places; the last case mostly ends in the central box that fits."""
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = Image.new("RGB", size)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(1500)])[:, [1, 0, 3, 2]].astype(float)
    draws = np.random.default_rng(0)
    ours = np.array([_crop_box(*size, draws, scale, ratio) for _ in range(1500)]).astype(float)
    for found in (theirs, ours):
        area = found[:, 2] * found[:, 3] / (size[0] * size[1])
        assert area.max() <= scale[1] + 0.01
        assert (ratio[0] * 0.97 <= found[:, 2] / found[:, 3]).all()
        assert (found[:, 2] / found[:, 3] <= ratio[1] * 1.03).all()
    of = [np.column_stack([box, box[:, 2] * box[:, 3], np.log(box[:, 2] / box[:, 3])]) for box in (theirs, ours)]
    for column in range(6):
        one, other = (np.sort(values[:, column]) for values in of)
        spread = max(one.std(), 1e-3, 0.5 if column < 4 else 0)
        # Kolmogorov and Smirnov's distance by quantiles: whole numbers tie.
        assert np.abs(one[75::150] - other[75::150]).max() < 0.25 * spread + (1 if column < 4 else 0)


def test_aug_cfg_at_its_defaults_changes_no_bit_and_its_values_are_used(scenes: Path) -> None:
    def images(aug_cfg: Augmentation | None = None, **options: object) -> np.ndarray:
        more = options if aug_cfg is None else {"aug_cfg": aug_cfg, **options}
        settings = StreamSettings(**{"global_batch_size": 50, "seed": 5, "augment": "resized_crop", **more})  # type: ignore[arg-type]
        batch = next(iter(TrainStream(scenes / "train", spec_for(scenes, image_size=24), settings)))
        return batch.image_uint8_BCHW.numpy()

    plain = images()
    reader = ShardReader(scenes / "train")
    order = next(
        iter(TrainStream(scenes / "train", spec_for(scenes, image_size=24), StreamSettings(global_batch_size=50, seed=5)))
    ).indices_B
    for row, index in enumerate(order.tolist()[:10]):
        draws = np.random.default_rng([5, 0, index, 0x6D6D6C67, 2])
        assert np.array_equal(plain[row].transpose(1, 2, 0), random_resized_crop(reader.image_bytes(index), 24, draws))
        draws = np.random.default_rng([5, 0, index, 0x6D6D6C67, 2])
        small = random_resized_crop(reader.image_bytes(index), 24, draws, scale=(0.2, 0.3), ratio=(1.0, 2.0))
        wanted = recolour(small, draw_colours(JITTER, 5, 0, index))
        if row == 0:
            both = images(replace(JITTER, scale=[0.2, 0.3], ratio=[1.0, 2.0]))
        assert np.array_equal(both[row].transpose(1, 2, 0), wanted)
    assert np.array_equal(images(Augmentation()), plain)


def test_colours_are_the_same_on_any_ranks_and_workers_and_after_a_resume(scenes: Path) -> None:
    def run(start_step: int = 0, **options: object) -> dict[tuple[int, int], np.ndarray]:
        settings = StreamSettings(**{"global_batch_size": 75, "seed": 5, "augment": "resized_crop", "aug_cfg": JITTER, **options})  # type: ignore[arg-type]
        stream = iter(TrainStream(scenes / "train", spec_for(scenes, image_size=16), settings, start_step=start_step))
        found = {}
        for step in range(start_step, 4):
            batch = next(stream)
            found.update(
                {(step, index): image for index, image in zip(batch.indices_B.tolist(), batch.image_uint8_BCHW.numpy(), strict=True)}
            )
        return found

    whole = run()
    assert len(whole) == 300
    parts: dict[tuple[int, int], np.ndarray] = {}
    for rank in range(3):
        parts |= run(rank=rank, world_size=3)
    for other in (parts, run(num_workers=2), {**{key: whole[key] for key in whole if key[0] < 2}, **run(start_step=2)}):
        assert other.keys() == whole.keys()
        assert all(np.array_equal(other[key], whole[key]) for key in whole)


BOTH = "Give both, such as 0.8 and"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"scale": [0.5, 1.2]}, r"data\.aug_cfg\.scale: is \[0.5, 1.2\]\. Use two numbers from 0.0001 to 1.0, the smaller one first"),
        ({"scale": [0.9, 0.5]}, "the smaller one first"),
        ({"scale": [0.0, 1.0]}, "Use two numbers from 0.0001 to 1.0"),
        ({"scale": [0.5]}, "Use two numbers"),
        ({"scale": [float("nan"), 1.0]}, "Use two numbers"),
        ({"ratio": [0, 1]}, r"ratio: is \[0, 1\]\. Use two numbers from 0.01 to 100"),
        ({"color_jitter": [0.1] * 3, "color_jitter_prob": 1}, "Use four numbers: brightness, contrast, saturation from 0 to 100, hue"),
        ({"color_jitter": [0.1, 0.1, 0.1, 0.6], "color_jitter_prob": 1}, "hue from 0 to 0.5"),
        ({"color_jitter": [-0.1, 0.1, 0.1, 0.1], "color_jitter_prob": 1}, "Use four numbers"),
        ({"color_jitter": [0.1] * 4}, BOTH),
        ({"color_jitter_prob": 0.5}, BOTH),
    ],
)
def test_a_setting_that_does_not_fit_is_one_line(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        Recipe(data=Data(augment="resized_crop", aug_cfg=Augmentation(**given))).check()
    assert "\n" not in str(caught.value)


def test_options_and_files_of_other_keys_are_refused_with_the_valid_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    for key in ("use_timm", "re_prob", "re_count", "interpolation"):
        file.write_text(f"data:\n  augment: resized_crop\n  aug_cfg:\n    scale: [0.4, 1.0]\n    {key}: 1\n")
        with pytest.raises(
            UserError, match=rf"unknown recipe key data\.aug_cfg\.{key}\. Valid keys: data\.aug_cfg\.scale, data\.aug_cfg\.ratio, "
        ):
            check_keys(file)
    assert main(["recipe", "show", "demo", "--data.aug_cfg.re_prob=1"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert (
        "Valid: --data.aug_cfg.color_jitter, --data.aug_cfg.color_jitter_prob, --data.aug_cfg.gray_scale_prob, --data.aug_cfg.ratio" in told
    )
    assert main(["recipe", "show", "demo", "--data.aug_cfg.scale=0.4"]) == 2
    assert "data.aug_cfg.scale: 0.4 does not fit. Use a list, [first, second, ...]." in capsys.readouterr().err


def test_what_is_not_drawn_is_refused() -> None:
    grey = Augmentation(gray_scale_prob=0.2)
    for augment in ("none", "crop"):
        with pytest.raises(
            UserError, match=rf"data\.aug_cfg: is given, and data\.augment {augment} does not draw it\. Set data\.augment to"
        ):
            Recipe(data=Data(augment=augment, aug_cfg=grey)).check()  # type: ignore[arg-type]
    kept = Recipe(data=Data(augment="resized_crop", aug_cfg=grey), engine=Engine(keep_features=True))
    with pytest.raises(UserError, match=r"keeps features of whole images, data\.augment is resized_crop\. Use none"):
        kept.check()


def test_settings_are_part_of_a_run_and_defaults_are_not() -> None:
    """So that runs from before there were such settings are known."""
    plain, grey = (Recipe(data=Data(augment="resized_crop", aug_cfg=Augmentation(gray_scale_prob=share))) for share in (0.0, 0.2))
    for role in ("ancestor", "extraction", "descendant"):
        assert plain.used_by(role, init="mmlg")["data"] == {"augment": "resized_crop", "check": "auto"}
        assert grey.used_by(role, init="mmlg")["data"] == {
            "augment": "resized_crop",
            "check": "auto",
            "aug_cfg": {
                "scale": [0.9, 1.0],
                "ratio": [3 / 4, 4 / 3],
                "color_jitter": None,
                "color_jitter_prob": 0.0,
                "gray_scale_prob": 0.2,
            },
        }
