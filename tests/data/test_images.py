"""Images as models see them, bit for bit against open_clip's evaluation transform before it normalises.

open_clip takes pixels as they are stored. What viewers show otherwise is compared with its transform of what they show.
"""

from __future__ import annotations

import io
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, PngImagePlugin

from mmlg_scale import towers
from mmlg_scale.data import images as images_module
from mmlg_scale.data.evaluation import load_eval_split
from mmlg_scale.data.images import as_shown, check_decodes, decode, open_image, random_resized_crop
from mmlg_scale.data.jpeg import is_upright
from mmlg_scale.data.mixture import JoinedReader
from mmlg_scale.data.pack import PackSettings, pack_table
from mmlg_scale.data.pipeline import StreamSettings, TrainStream
from mmlg_scale.data.reader import ShardReader
from tests.data.specs import spec_for


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def payloads(width: int, height: int, seed: int = 0) -> dict[str, bytes]:
    """Noise in every mode and format: what an interpolation or an offset does wrong shows in it at once."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    rgb, grey = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels[..., 0])
    rgba, palette = Image.fromarray(pixels), rgb.quantize(17)
    return {
        "RGB": encoded(rgb, "PNG"),
        "RGBA": encoded(rgba, "PNG"),
        "L": encoded(grey, "PNG"),
        "LA": encoded(Image.fromarray(pixels[..., :2], "LA"), "PNG"),
        "P": encoded(palette, "PNG"),
        "P transparent": encoded(palette, "PNG", transparency=3),
        "1": encoded(grey.convert("1"), "PNG"),
        "opaque": encoded(rgb.convert("RGBA"), "PNG"),
        "grey, opaque": encoded(grey.convert("LA"), "PNG"),
        "16 bits": encoded(Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG"),
        "16 bits, dark": encoded(Image.fromarray(pixels[..., 0].astype(np.uint16)), "PNG"),
        "JPEG": encoded(rgb, "JPEG"),
        "grey JPEG": encoded(grey, "JPEG"),
        "CMYK JPEG": encoded(rgb.convert("CMYK"), "JPEG"),
        "WebP": encoded(rgba, "WEBP"),
        "BMP": encoded(rgb, "BMP"),
        "upright JPEG": encoded(rgb, "JPEG", exif=turned(1)),
        **{f"turned {value}": encoded(rgb, "JPEG", exif=turned(value)) for value in range(2, 9)},
    }


def turned(orientation: object) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0110], exif[0x0112], exif[0x0132] = "camera", orientation, "2020:01:01 00:00:00"
    return exif


ORDINARY = ("RGB", "L", "JPEG", "grey JPEG", "CMYK JPEG", "BMP", "opaque", "grey, opaque", "upright JPEG")


def packed(payload: bytes) -> bytes:
    """What packing makes of an image: of an ordinary one nothing."""
    shown = as_shown(payload)
    return payload if shown is None else shown[0]


def open_clips(payload: bytes, size: int, preprocess: towers.Preprocess) -> np.ndarray:
    from torchvision.transforms import Compose, Normalize

    transform = towers.open_clip.image_transform(
        size,
        is_train=False,
        resize_mode=preprocess.resize_mode,
        interpolation=preprocess.interpolation,
        fill_color=preprocess.fill_color,
    )
    *geometry, _to_tensor, normalise = transform.transforms
    assert isinstance(normalise, Normalize)
    return np.asarray(Compose(geometry)(Image.open(io.BytesIO(payload))))


SIZES = [(32, 32), (33, 31), (97, 130), (131, 64), (320, 241), (5, 7), (3, 90), (60, 2), (31, 63), (1, 1), (20, 20)]


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_decoding_is_open_clips_to_the_last_bit(width: int, height: int, resize_mode: str) -> None:
    for name, payload in payloads(width, height).items():
        for interpolation, fill, size in (("bicubic", 0, 32), ("bilinear", 7, 17), ("random", 7, 32)):
            preprocess = towers.Preprocess(interpolation=interpolation, resize_mode=resize_mode, fill_color=fill)  # type: ignore[arg-type]
            ours = decode(payload, size, preprocess=preprocess)
            assert ours.dtype == np.uint8
            assert np.array_equal(ours, open_clips(packed(payload), size, preprocess)), (name, interpolation, fill, size)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.integers(1, 48),
    mode=st.sampled_from(["shortest", "longest", "squash"]),
    fill=st.integers(0, 255),
)
def test_any_geometry_is_open_clips(width: int, height: int, size: int, mode: str, fill: int) -> None:
    preprocess = towers.Preprocess(resize_mode=mode, fill_color=fill)  # type: ignore[arg-type]
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    payload = encoded(Image.fromarray(pixels), "PNG")
    ours = decode(payload, size, preprocess=preprocess)
    if mode == "longest" and round(min(width, height) / (max(width, height) / size)) == 0:
        with pytest.raises(ValueError, match="must be > 0"):
            open_clips(payload, size, preprocess)
        assert ours.shape == (size, size, 3)  # a line, where open_clip has none
    else:
        assert np.array_equal(ours, open_clips(payload, size, preprocess))


def test_a_line_keeps_one_pixel_where_the_longer_side_counts() -> None:
    payload = encoded(Image.new("RGB", (900, 1), (200, 10, 30)), "PNG")
    found = decode(payload, 32, preprocess=towers.Preprocess(resize_mode="longest", fill_color=9))
    rows = (found == (200, 10, 30)).all(axis=(1, 2))
    assert rows.sum() == 1
    assert (found[~rows] == 9).all()


@pytest.mark.parametrize(("width", "height"), [(700, 3), (2, 500), (901, 5), (1, 800)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_only_the_centre_of_a_thin_image_is_resized(width: int, height: int, interpolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way for images too large to resize as a whole, taken by small ones that also go the other way."""
    preprocess = towers.Preprocess(interpolation=interpolation)  # type: ignore[arg-type]
    found = {name: decode(payload, 48, preprocess=preprocess) for name, payload in payloads(width, height).items()}
    monkeypatch.setattr(images_module, "MAX_RESIZED_PIXELS", 0)
    for name, payload in payloads(width, height).items():
        difference = np.abs(decode(payload, 48, preprocess=preprocess).astype(int) - found[name])
        assert difference.max() <= 1, name
        assert (difference > 0).mean() < 1e-3, name


def test_a_line_of_30000_pixels_takes_no_memory() -> None:
    """Resized as a whole it would have 1.5 thousand million pixels. Along the line that can be done, and across it nothing changes."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 30_000, 3), dtype=np.uint8)
    long = Image.fromarray(pixels).resize((224 * 30_000, 1), Image.Resampling.BICUBIC)
    expected = np.asarray(long)[:, (224 * 30_000 - 224) // 2 :][:, :224].repeat(224, axis=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lying = decode(encoded(Image.fromarray(pixels), "PNG"), 224)
    standing = decode(encoded(Image.fromarray(pixels.transpose(1, 0, 2)), "PNG"), 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB
    for found in (lying, standing.transpose(1, 0, 2)):
        difference = np.abs(found.astype(int) - expected)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3


def test_drafts_of_other_geometries_are_nearly_the_same_image() -> None:
    y, x = np.mgrid[0:480, 0:700]
    pixels = np.stack([127 + 100 * np.sin(x / (11 + k)) * np.cos(y / (17 + k)) for k in range(3)], axis=-1).astype(np.uint8)
    payload = encoded(Image.fromarray(pixels), "JPEG", quality=92)
    for mode in ("shortest", "longest", "squash"):
        preprocess = towers.Preprocess(resize_mode=mode, fill_color=100)  # type: ignore[arg-type]
        full, drafted = decode(payload, 60, preprocess=preprocess), decode(payload, 60, preprocess=preprocess, draft=True)
        assert not np.array_equal(full, drafted)
        assert np.abs(full.astype(int) - drafted).mean() < 1.5


def test_random_crops_interpolate_as_the_model_does() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    payload = encoded(Image.fromarray(pixels), "PNG")
    for interpolation, resampling in (("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)):
        found = random_resized_crop(payload, 32, np.random.default_rng(4), preprocess=towers.Preprocess(interpolation=interpolation))  # type: ignore[arg-type]
        left, top, width, height = images_module._crop_box(70, 50, np.random.default_rng(4), (0.9, 1.0), (3 / 4, 4 / 3))
        expected = Image.fromarray(pixels).resize((32, 32), resampling, box=(left, top, left + width, top + height))
        assert np.array_equal(found, np.asarray(expected))


def test_only_supported_formats_are_opened() -> None:
    image = Image.new("RGB", (20, 20), (3, 200, 40))
    for format in ("GIF", "TIFF", "PPM", "ICO", "EPS"):
        with pytest.raises(OSError, match="no image of a supported format: PNG, JPEG, WEBP, BMP"):
            decode(encoded(image, format), 16)
    for format in ("PNG", "JPEG", "WEBP", "BMP", "MPO"):  # MPO: a phone's JPEG with a preview
        options = {"save_all": True, "append_images": [ImageChops.invert(image)]} if format == "MPO" else {}
        payload = encoded(image, format, **options)
        check_decodes(payload)
        assert np.abs(decode(payload, 16).astype(int) - (3, 200, 40)).max() <= 6


def test_there_is_a_bound_on_pixels() -> None:
    """A PNG of 200 bytes can announce gigabytes."""
    whole = encoded(Image.new("1", (13_000, 12_000)), "PNG")
    for read in (open_image, check_decodes, lambda payload: decode(payload, 16)):
        with pytest.raises(ValueError, match="13000 x 12000 pixels, more than the 134,217,728 that are decoded"):
            read(whole)
    tracemalloc.start()
    with open_image(encoded(Image.new("1", (12_000, 11_000)), "PNG")) as image:  # 132 million; a phone takes 108
        assert image.size == (12_000, 11_000)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("resize_mode", ["longest", "squash"])
def test_streams_sweeps_and_evaluations_obey_the_models_geometry(scenes: Path, resize_mode: str) -> None:
    from mmlg_scale.data.sweep import Sweep

    preprocess = towers.Preprocess(resize_mode=resize_mode, interpolation="bilinear")  # type: ignore[arg-type]
    spec = spec_for(scenes, image_size=24, preprocess=preprocess)
    reader = ShardReader(scenes / "train")

    def wanted(reader: ShardReader, index: int) -> np.ndarray:
        return open_clips(reader.image_bytes(index), 24, preprocess).transpose(2, 0, 1)

    for cache in (True, False):
        batch = next(iter(TrainStream(scenes / "train", spec, StreamSettings(global_batch_size=10, seed=0, cache_decoded=cache))))
        for row, index in enumerate(batch.indices_B.tolist()):
            assert np.array_equal(batch.image_uint8_BCHW[row].numpy(), wanted(reader, index))
    assert np.array_equal(Sweep(JoinedReader([reader]), spec, item_size=4)[1].image_uint8_NCHW[2].numpy(), wanted(reader, 6))
    split = load_eval_split(scenes / "test", spec)
    assert np.array_equal(split.images_uint8_NCHW()[7].numpy(), wanted(ShardReader(scenes / "test"), 7))


def stored_otherwise() -> dict[str, tuple[bytes, Image.Image]]:
    """Name -> an image that programs show otherwise than it is stored, and what they show."""
    slope = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (40, 1))
    rgb = Image.fromarray(np.stack([slope, slope[:, ::-1], np.full_like(slope, 70)], axis=-1))
    deep = (slope.astype(np.uint16) << 8) | slope
    hole = np.zeros((40, 64), np.uint8)
    hole[10:30, 10:30] = 255
    logo = Image.fromarray(np.dstack([np.zeros((40, 64, 3), np.uint8), hole]))
    palette = rgb.quantize(30)
    return {
        "turned upright": (encoded(rgb, "JPEG", quality=95, exif=turned(6)), rgb.transpose(Image.Transpose.ROTATE_270)),
        "16 to 8 bits": (encoded(Image.fromarray(deep), "PNG"), Image.fromarray(slope)),
        "over white": (encoded(logo, "PNG"), Image.fromarray(255 - hole)),
        "without a palette": (encoded(palette, "PNG"), palette.convert("RGB")),
    }


def test_what_viewers_show_otherwise_is_packed_as_they_show_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = stored_otherwise()
    for name, (payload, wanted) in images.items():
        shown = as_shown(payload)
        assert shown is not None
        assert shown[1] == [name]
        found = Image.open(io.BytesIO(shown[0]))
        assert found.size == wanted.size
        assert np.abs(np.asarray(found.convert("RGB")).astype(int) - np.asarray(wanted.convert("RGB"))).max() <= (
            8 if name == "turned upright" else 0
        )
        assert as_shown(shown[0]) is None
    for name, payload in payloads(20, 30).items():
        assert (as_shown(payload) is None) == (name in ORDINARY), name

    rows = []
    for number, (payload, _) in enumerate([*images.values(), *[(payloads(20, 30)["RGB"], None)] * 3]):
        path = tmp_path / f"{number}.{'jpg' if payload.startswith(bytes([255])) else 'png'}"
        path.write_bytes(payload)
        rows.append(f"{path.name},x,{'val' if number == 5 else 'test' if number == 6 else 'train'}")
    table = tmp_path / "t.csv"
    table.write_text("filepath,caption,split\n" + "\n".join(rows) + "\n")
    pack_table(table, tmp_path / "shown")
    assert capsys.readouterr().out == (
        "images packed as viewers show them, not as they are stored: 16 to 8 bits 1, over white 1, turned upright 1, without a palette 1\n"
    )
    reader = ShardReader(tmp_path / "shown" / "train")
    wanted_bytes = [as_shown(payload) for payload, _ in images.values()]
    assert [reader.image_bytes(index) for index in range(4)] == [shown[0] for shown in wanted_bytes if shown is not None]
    assert reader.image_bytes(4) == payloads(20, 30)["RGB"]
    assert np.array_equal(reader.image(2, 40), decode(encoded(images["over white"][1], "PNG"), 40))

    pack_table(table, tmp_path / "stored", PackSettings(as_shown=False))
    assert capsys.readouterr().out == ""
    stored = ShardReader(tmp_path / "stored" / "train")
    assert [stored.image_bytes(index) for index in range(4)] == [payload for payload, _ in images.values()]
    for index in range(4):
        for draft in (False, True):
            assert np.abs(stored.image(index, 24, draft=draft).astype(int) - reader.image(index, 24, draft=draft)).max() <= 2 * draft
        crops = [of.crop(index, 24, np.random.default_rng(index)) for of in (stored, reader)]
        assert np.array_equal(*crops)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photographs_are_read_as_upright_ones(orientation: int) -> None:
    """Against the same picture stored upright, also where a JPEG is decoded at a fraction of a size that it does not divide."""
    y, x = np.mgrid[0:333, 0:457]
    pixels = np.stack([127 + 60 * np.sin(x / (31 + k)) + 50 * np.cos(y / (9 + 3 * k)) for k in range(3)], axis=-1).astype(np.uint8)
    upright = Image.fromarray(pixels)
    undone = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's numbers: each turn is undone by EXIF's
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undone[orientation]))
    lying = encoded(stored, "JPEG", quality=97, exif=turned(orientation))
    straight = encoded(upright, "JPEG", quality=97)
    assert is_upright(straight)
    assert is_upright(lying) == (orientation == 1)
    for mode in ("shortest", "longest", "squash"):
        for draft in (False, True):
            preprocess = towers.Preprocess(resize_mode=mode)  # type: ignore[arg-type]
            found, wanted = (decode(payload, 40, preprocess=preprocess, draft=draft).astype(int) for payload in (lying, straight))
            assert np.abs(found - wanted).mean() < 0.7, (mode, draft)
            assert np.abs(found - wanted).max() <= 6, (mode, draft)
    for seed in range(3):
        found, wanted = (random_resized_crop(payload, 40, np.random.default_rng(seed)).astype(int) for payload in (lying, straight))
        assert np.abs(found - wanted).mean() < 0.7
        assert np.abs(found - wanted).max() <= 6


def test_what_exif_says_is_read_without_pil_only_where_it_is_plain() -> None:
    """Damaged or unusual EXIF data say nothing: the image is upright. XMP can tell an orientation, too, and is PIL's."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    plain = encoded(image, "JPEG")

    def with_app1(content: bytes) -> bytes:
        return plain[:2] + b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content + plain[2:]

    directory = {
        order: b"Exif\0\0" + magic + b"".join(int.to_bytes(value, size, order) for value, size in ((42, 2), (8, 4), (1, 2)))
        for order, magic in (("little", b"II"), ("big", b"MM"))
    }
    for order, head in directory.items():
        for value in range(10):
            entry = b"".join(int.to_bytes(part, size, order) for part, size in ((0x0112, 2), (3, 2), (1, 4), (value, 2), (0, 2), (0, 4)))  # type: ignore[arg-type]
            payload = with_app1(head + entry)
            with open_image(payload) as opened:
                assert images_module.orientation(opened) == (value if 2 <= value <= 8 else 1)
            assert is_upright(payload) == (value == 1)
    for content in (b"Exif\0\0", b"Exif\0\0XX", directory["big"], directory["little"] + b"\xff" * 12, b"Exif\0\0II*\0\xff\xff\xff\x7f"):
        payload = with_app1(content)
        assert np.array_equal(decode(payload, 20), decode(plain, 20))
        crops = [random_resized_crop(of, 20, np.random.default_rng(1)).astype(int) for of in (payload, plain)]
        assert np.abs(crops[0] - crops[1]).mean() < 1  # PIL's way and the quick one
    xmp = with_app1(b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>')
    assert not is_upright(xmp)
    assert np.array_equal(decode(xmp, 20), decode(packed(xmp), 20))
    squash = towers.Preprocess(resize_mode="squash")
    difference = decode(xmp, 20, preprocess=squash)[::-1, ::-1].astype(int) - decode(plain, 20, preprocess=squash)
    assert np.abs(difference).max() <= 1
    both = [(encoded(image, "PNG", exif=turned(6)), packed(encoded(image, "PNG", exif=turned(6))))]
    both.append((encoded(image, "WEBP", lossless=True, exif=turned(6)), both[0][1]))
    told = PngImagePlugin.PngInfo()
    told.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    both.append((encoded(image, "PNG", pnginfo=told), both[0][1]))
    for payload, upright in both:
        assert np.array_equal(decode(payload, 20), decode(upright, 20))
        assert np.array_equal(decode(upright, 20), decode(encoded(image.transpose(Image.Transpose.ROTATE_270), "PNG"), 20))
    for cut in range(2, 700, 7):
        is_upright(plain[:cut])  # whatever it says, it ends


def test_sixteen_bits_and_transparent_values() -> None:
    """Every level is rounded to the nearest of 256; a PNG's transparent grey is white."""
    levels = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    wanted = np.rint(levels / 257).astype(np.uint8)
    found = decode(encoded(Image.fromarray(levels), "PNG"), 256)
    assert np.array_equal(found, np.repeat(wanted[..., None], 3, axis=-1))
    clear = decode(encoded(Image.fromarray(levels), "PNG", transparency=300), 256)
    assert (clear[levels == 300] == 255).all()
    assert np.array_equal(clear[levels != 300], found[levels != 300])
