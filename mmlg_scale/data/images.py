"""Encoded images -> what a model sees: the geometry of open_clip's evaluation transform, and random crops for training.

An image is read as a viewer shows it (`viewed`), by packing, training and evaluation alike: upright, over white, 16 bits as 8, palettes as
colours. Of every other RGB or grey image, evaluation's grey levels are open_clip's to the last bit; open_clip takes pixels as they are
stored, so that it sees lying photographs, the colours under transparency and white for nearly all of 16 bits. Training reads ordinary JPEGs
in a third of the time (`jpeg.py`), a grey level apart here and there.
"""

from __future__ import annotations

import io
import math
import warnings

import numpy as np
from PIL import Image, ImageOps

from mmlg_scale.data.jpeg import jpeg_size, read_jpeg, resize
from mmlg_scale.towers import Preprocess

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""PIL would try every plugin it has, and some start other programs."""
MAX_PIXELS = 2**27
"""Of an image as it is packed: 134 million, half a gigabyte once decoded. Phones take 108 million."""
MAX_RESIZED_PIXELS = 2**24
"""Of an image that is resized as a whole before it is cropped; of a thinner one only what the crop needs is."""
READING = 2
"""What an image is read as, for whoever keeps what was computed of it: 1 was its pixels as they are stored, 2 what viewers show."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PLAIN = Preprocess()
Box = tuple[int, int, int, int]
"""(left, top, width, height) in pixels of the whole image."""

# Ours is the bound that counts; PIL warns from two thirds of it on.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# EXIF data of strangers; see `orientation`.
warnings.filterwarnings("ignore", message=".*Corrupt EXIF data", category=UserWarning)


def open_image(payload: bytes) -> Image.Image:
    """The image, not yet decoded.

    Raises:
        ValueError: it has more than MAX_PIXELS.
        OSError: no image of FORMATS.
    """
    try:
        image = Image.open(io.BytesIO(payload), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise OSError(f"no image of a supported format: {', '.join(FORMATS)}") from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than the {MAX_PIXELS:,} that are decoded")
    return image


def check_png(payload: bytes) -> None:
    """Compare a PNG's checksums, without which PIL takes a stream of wrong bytes for pixels. Raises SyntaxError or OSError."""
    if payload.startswith(PNG_SIGNATURE):
        with open_image(payload) as image:
            image.verify()


def load_cheaply(payload: bytes) -> None:
    """Decode all of an image, a JPEG at an eighth of its size, which still reads every byte."""
    with open_image(payload) as image:
        image.draft(None, (1, 1))
        image.load()


def check_decodes(payload: bytes) -> None:
    """`check_png` and `load_cheaply`.

    Raises:
        Exception: not an image, or damaged; PIL's plugins raise OSError, SyntaxError, ValueError and others.
    """
    check_png(payload)
    load_cheaply(payload)


UPRIGHT, OPAQUE, SHALLOW, PLAIN_COLOURS = "turned upright", "over white", "16 to 8 bits", "without a palette"
ORIENTATION = 0x0112
"""Tag of EXIF 2.3, section 4.6.4. Its values from 2 on, and what undoes each:"""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TELLING = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
"""Where PIL looks for it. To ask costs a fiftieth of reading a small image, which most need not pay."""
SWAPPED, STARTS_AT_RIGHT, STARTS_AT_BOTTOM = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)
"""Orientations where width and height change places, and where the stored image's last column or row becomes the first of its side."""
TO_8_BITS = ((np.arange(2**16) + 128) // 257).astype(np.uint8)


def orientation(image: Image.Image) -> int:
    """EXIF's orientation: 1 is upright, and also said of data that cannot be read, which viewers pass over."""
    if image.format == "PNG":
        image.load()  # it may be said behind the pixels
    if not any(name in image.info for name in TELLING):
        return 1
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # of damaged EXIF data PIL raises nearly anything
        return 1
    return found if found in TURNS else 1


def viewed(opened: Image.Image, turned: int) -> tuple[Image.Image, list[str]]:
    """An image as viewers show it, and what had to be done for that.

    Turned upright from the orientation `turned`, transparency laid over white, 16 bits rounded to 8, palettes and single bits made colours
    and grey levels.
    """
    image, done = opened, list[str]()
    if turned in TURNS:
        image = image.transpose(TURNS[turned])
        done.append(UPRIGHT)
    if image.mode.startswith("I"):
        image = _shallow(image, opened.info.get("transparency"))
        done.append(SHALLOW)
    elif image.has_transparency_data and not _is_opaque(image):
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(rgba)
        done.append(OPAQUE)
    elif image.mode in ("1", "P"):
        image = image.convert("L" if image.mode == "1" else "RGBA")  # by way of RGBA, or PIL warns of an alpha that is lost
        done.append(PLAIN_COLOURS)
    return (image.convert("RGB") if done and image.mode not in ("L", "RGB") else image), done


def _is_opaque(image: Image.Image) -> bool:
    if image.mode not in ("LA", "RGBA"):
        image = image.convert("RGBA")  # a palette, or one colour, with transparency
    return image.getchannel("A").getextrema()[0] == 255


def _shallow(image: Image.Image, transparent: object) -> Image.Image:
    """Grey of 16 bits in 8; `transparent` is the value that a PNG has in place of an alpha channel."""
    values = np.asarray(image)
    values = values.clip(0, 2**16 - 1).astype(np.uint16) if values.dtype != np.uint16 else values
    grey = TO_8_BITS[values]
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def as_shown(payload: bytes) -> tuple[bytes, list[str]] | None:
    """`viewed` as a PNG, and what was done; None where nothing was.

    What is packed so is read by programs that know of no orientation, such as open_clip's own loader, as it is read here.
    """
    with open_image(payload) as opened:
        image, done = viewed(opened, orientation(opened))
        if not done:
            return None
        buffer = io.BytesIO()
        image.save(buffer, "PNG", exif=b"")
        return buffer.getvalue(), done


def decode(payload: bytes, image_size: int, *, preprocess: Preprocess = PLAIN, draft: bool = False) -> np.ndarray:
    """Resize, crop or pad what viewers show, as open_clip's evaluation transform does with this preprocessing: RGB, uint8 [H, W, 3].

    An image so thin that `longest` leaves less than half a pixel of its shorter side keeps one; open_clip fails there.

    Args:
        draft: for training: an ordinary JPEG is read by `jpeg.py`, and any JPEG at 1/2, 1/4 or 1/8 of its size where that is still no
            smaller than what is wanted. Faster, a grey level or two apart.
    """
    if draft:
        quick = _decode_quickly(payload, image_size, preprocess)
        if quick is not None:
            return quick
    resample = resampling(preprocess)
    with open_image(payload) as opened:
        turned = orientation(opened)
        whole = opened.size[::-1] if turned in SWAPPED else opened.size
        size = _resized(whole, image_size, preprocess.resize_mode)
        if draft:
            opened.draft(None, size[::-1] if turned in SWAPPED else size)  # the smallest scale that is no smaller in both directions
        image, _ = viewed(opened, turned)
        inside = _extent(image, whole, turned)
        if preprocess.resize_mode == "shortest" and math.prod(size) > MAX_RESIZED_PIXELS:
            return np.asarray(_resized_centre(image, inside, size, image_size, resample).convert("RGB"))
        found = image.resize(size, resample, box=inside) if image.size != size else image
        return np.asarray(_crop_or_pad(found, image_size, preprocess.fill_color).convert("RGB"))


def _extent(image: Image.Image, whole: tuple[int, int], turned: int) -> tuple[float, float, float, float]:
    """Where the whole image lies in one that may have been decoded at a fraction of its size, and then turned.

    A side that is no multiple of the fraction is rounded up: its last pixel, the first one once turned, covers less.
    """
    reduced = round(whole[0] / image.width)
    width, height = whole[0] / reduced, whole[1] / reduced
    left = image.width - width if turned in STARTS_AT_RIGHT else 0
    top = image.height - height if turned in STARTS_AT_BOTTOM else 0
    return left, top, min(left + width, image.width), min(top + height, image.height)


def _decode_quickly(payload: bytes, image_size: int, preprocess: Preprocess) -> np.ndarray | None:
    """`decode` of an ordinary JPEG that is neither padded nor thin; None for others."""
    whole = jpeg_size(payload, MAX_PIXELS)
    if whole is None:
        return None
    size = _resized(whole, image_size, preprocess.resize_mode)
    if min(size) < image_size or math.prod(size) > MAX_RESIZED_PIXELS:
        return None
    found = _read_part(payload, whole, (0, 0, *whole), size, preprocess)
    if found is None:
        return None
    left, top = (round((side - image_size) / 2) for side in size)
    return found[top : top + image_size, left : left + image_size]


def _read_part(payload: bytes, whole: tuple[int, int], box: Box, size: tuple[int, int], preprocess: Preprocess) -> np.ndarray | None:
    """The box of an ordinary JPEG, resized to `size`; None where PIL should have a look."""
    wanted = min(1.0, max(side / part for side, part in zip(size, box[2:], strict=True)))
    read = read_jpeg(payload, whole, (math.ceil(whole[0] * wanted), math.ceil(whole[1] * wanted)))
    if read is None:
        return None
    pixels, fraction = read
    left, top, width, height = box
    if fraction == 1:
        return resize(pixels[top : top + height, left : left + width], size, preprocess.interpolation)
    # torch's resize has no boxes that begin or end within a pixel. So large an image is slow to decode anyway.
    inside = (left * fraction, top * fraction, (left + width) * fraction, (top + height) * fraction)
    return np.asarray(Image.fromarray(pixels).resize(size, resampling(preprocess), box=inside))


def resampling(preprocess: Preprocess) -> Image.Resampling:
    """PIL's name of the interpolation; `random` is bicubic outside training, and there we draw nothing either."""
    return Image.Resampling.BILINEAR if preprocess.interpolation == "bilinear" else Image.Resampling.BICUBIC


def _resized(whole: tuple[int, int], image_size: int, resize_mode: str) -> tuple[int, int]:
    """(width, height) after the resize. Truncation in one mode and rounding in the other are torchvision's and open_clip's."""
    if resize_mode == "squash":
        return image_size, image_size
    if resize_mode == "longest":
        ratio = max(side / image_size for side in whole)
        return max(1, round(whole[0] / ratio)), max(1, round(whole[1] / ratio))
    width, height = (int(image_size * side / min(whole)) for side in whole)
    return width, height


def _crop_or_pad(image: Image.Image, size: int, fill: int) -> Image.Image:
    """open_clip's CenterCropOrPad."""
    if min(image.size) < size:
        missing = [max(0, size - side) for side in image.size]
        border = (missing[0] // 2, missing[1] // 2, (missing[0] + 1) // 2, (missing[1] + 1) // 2)
        bands = len(image.getbands())
        padded = ImageOps.expand(image, border, fill if bands == 1 else (fill,) * bands)
        palette = image.getpalette() if image.mode == "P" else None
        if palette is not None:
            padded.putpalette(palette)
        image = padded
    left, top = (round((side - size) / 2) for side in image.size)
    return image if image.size == (size, size) else image.crop((left, top, left + size, top + size))


def _resized_centre(
    image: Image.Image, extent: tuple[float, float, float, float], size: tuple[int, int], image_size: int, resample: Image.Resampling
) -> Image.Image:
    """The centre square of `image` resized to `size`, of which the rest is never computed.

    Equal to cropping afterwards except where a grey level lies on the edge between two: the box is rounded to single precision. `extent` is
    where in `image` the picture lies: left, top, right, bottom.
    """
    scales = [(extent[axis + 2] - extent[axis]) / size[axis] for axis in (0, 1)]
    starts = [extent[axis] + scales[axis] * round((size[axis] - image_size) / 2) for axis in (0, 1)]
    stops = [start + scale * image_size for start, scale in zip(starts, scales, strict=True)]
    # Two pixels on each side take part in an interpolation, of a smaller image as many more as it is smaller.
    margins = [math.ceil(2 * max(1.0, scale)) + 1 for scale in scales]
    first = [max(0, math.floor(start) - margin) for start, margin in zip(starts, margins, strict=True)]
    last = [min(side, math.ceil(stop) + margin) for side, stop, margin in zip(image.size, stops, margins, strict=True)]
    part = image.crop((first[0], first[1], last[0], last[1]))
    left, top, right, bottom = starts[0] - first[0], starts[1] - first[1], stops[0] - first[0], stops[1] - first[1]
    return part.resize((image_size, image_size), resample, box=(left, top, min(right, part.width), min(bottom, part.height)))


def random_resized_crop(
    payload: bytes,
    image_size: int,
    generator: np.random.Generator,
    *,
    preprocess: Preprocess = PLAIN,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """RGB of what viewers show, a box of `scale` of the area with a log-uniform aspect ratio in `ratio`, resized: uint8 [H, W, 3].

    The distribution is that of torchvision's RandomResizedCrop with open_clip's settings: ten draws, then the central crop whose ratio is
    nearest. JPEGs are decoded at a fraction of their size where the box then still has `image_size` pixels in each direction, ordinary ones
    by `jpeg.py`. Of `preprocess` only the interpolation is used: a box that is drawn has no other geometry.
    """
    whole = jpeg_size(payload, MAX_PIXELS)
    box = None if whole is None else _crop_box(*whole, generator, scale, ratio)
    if whole is not None and box is not None:
        found = _read_part(payload, whole, box, (image_size, image_size), preprocess)
        if found is not None:
            return found
    with open_image(payload) as opened:
        turned = orientation(opened)
        width, height = opened.size[::-1] if turned in SWAPPED else opened.size
        left, top, box_width, box_height = box or _crop_box(width, height, generator, scale, ratio)
        wanted = image_size / min(box_width, box_height)
        if wanted < 1:
            least = math.ceil(width * wanted), math.ceil(height * wanted)
            opened.draft("RGB", least[::-1] if turned in SWAPPED else least)
        image = viewed(opened, turned)[0].convert("RGB")
    first, reduced = _extent(image, (width, height), turned), round(width / image.width)
    inside = (
        first[0] + left / reduced,
        first[1] + top / reduced,
        min(first[0] + (left + box_width) / reduced, first[2]),
        min(first[1] + (top + box_height) / reduced, first[3]),
    )
    return np.asarray(image.resize((image_size, image_size), resampling(preprocess), box=inside))


def _crop_box(width: int, height: int, generator: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """A random box."""
    for _ in range(10):
        area = width * height * generator.uniform(*scale)
        aspect = float(np.exp(generator.uniform(np.log(ratio[0]), np.log(ratio[1]))))
        box_width, box_height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < box_width <= width and 0 < box_height <= height:
            return (
                int(generator.integers(0, width - box_width + 1)),
                int(generator.integers(0, height - box_height + 1)),
                box_width,
                box_height,
            )
    box_width = min(width, round(height * ratio[1]))
    box_height = min(height, round(width / ratio[0]))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height
