"""Any image that Pillow reads -> its RGB pixels, or the square that is trained on -> encoded bytes.

The one place where an image file is opened. Pixels are upright and on white; samples of 16 bits are
scaled from their full range, or from the smaller one that the file itself states. What a decoder
would mend without a word is refused as unreadable.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastrepa.data.format.shards import ImageFormat
from fastrepa.errors import DataError
from fastrepa.reading.damage import jpeg_damage, png_damage

# Refused above: what one source may have (Pillow's own limit is a third more), and what a resize
# may make of a very long, narrow image (pixels).
MAX_PIXELS = 1 << 27
MAX_RESIZED_PIXELS = 1 << 26

# Not among the formats that are tried: Pillow would start Ghostscript on whatever the file says.
_NEVER = {"EPS"}
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# TIFF's tags, and some of their values.
_BITS, _COMPRESSION, _POLARITY, _OFFSETS, _COUNTS = 258, 259, 262, (273, 324), (279, 325)
_MOST, _PLANAR, _SIGNED, _TABLES = 281, 284, 339, 347
_OF_JPEG, _SEPARATE = 7, 2
_DIM = 1 << 14  # samples of 16 bits that stay below have fewer, perhaps
_BASELINE, _PROGRESSIVE = 0xC0, 0xC2  # JPEG's start-of-frame markers that every decoder knows


# What Pillow finds odd beside the pixels is nobody's matter; of its two limits of size it raises at
# the second. For the whole process, since images are decoded by threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


class UnreadableImageError(Exception):
    """Says why one image cannot be used, in a few words."""


@dataclass(frozen=True)
class Stored:
    """An image as it goes into a shard, and what its source was."""

    data: bytes
    width: int  # of the source, upright, in pixels
    height: int
    format: str  # Pillow's names
    mode: str
    animated: bool  # only its first frame (or page) was taken
    enlarged: bool  # the source's short side is below the resolution
    original: bool  # the source's own bytes
    misnamed: bool  # its extension is that of another format
    dim: bool  # of 16 bits, but no sample reaches a quarter of the range


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _NEVER)


@functools.cache
def _extensions() -> dict[str, str]:
    """Format of every lower-case file extension, with its dot, that we can open."""
    return {ext: f for ext, f in Image.registered_extensions().items() if f in _formats()}


def readable_extensions() -> set[str]:
    """Lower-case file extensions, with their dot, of the formats that are read."""
    return set(_extensions())


def image_files(folder: Path) -> list[Path]:
    """The files below a folder that are images by their names, sorted; what is hidden is none."""
    extensions = readable_extensions()
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in extensions
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def store(
    data: bytes, resolution: int, image_format: ImageFormat, quality: int, name: str = ""
) -> Stored:
    """The bytes to store for a source image: its `load_square`, encoded.

    For "jpeg", a source that is already an upright RGB or grey JPEG of exactly this size is kept
    as it is: encoding it again would only lose. `name` tells whether the extension fits.
    Raises UnreadableImageError for whatever cannot be decoded.
    """
    image = open_image(data)
    animated = _has_frames(image)
    oriented = decode(image, data)
    format_, mode, dim = image.format or "", image.mode, _is_dim(image, data)
    upright = _UPRIGHT.get(oriented or 1)
    size = image.size if oriented is None or oriented < 5 else image.size[::-1]
    original = (
        image_format == "jpeg"
        and image.size == (resolution, resolution)
        and _is_plain_jpeg(image, data)
        and oriented is not None
        and upright is None
    )
    if not original:
        square = center_crop(_upright_rgb(image, oriented, data), resolution)
        data = encode(square, image_format, quality)
    named = _extensions().get(os.path.splitext(name)[1].lower())
    return Stored(
        data=data,
        width=size[0],
        height=size[1],
        format=format_,
        mode=mode,
        animated=animated,
        enlarged=min(size) < resolution,
        original=original,
        misnamed=named is not None and named != ("JPEG" if format_ == "MPO" else format_),
        dim=dim,
    )


def load_square(data: bytes, resolution: int) -> Image.Image:
    """The image in `data` as `decode_rgb` gives it, center-cropped to resolution x resolution."""
    return center_crop(decode_rgb(data), resolution)


def decode_rgb(data: bytes, *, repaired: bool = False) -> Image.Image:
    """The image in `data` as RGB, upright, on white.

    Of an animated file, the first frame. Colour profiles are not applied (nor does the reference).
    Raises UnreadableImageError for whatever Pillow cannot decode, decompression bombs included,
    and, unless `repaired`, for damage that its decoder repairs.
    """
    image = open_image(data)
    return _upright_rgb(image, decode(image, data, repaired=repaired), data)


def read_rgb(path: Path) -> np.ndarray:
    """The pixels uint8 [H,W,3] of an image file, as `decode_rgb`'s; DataError that names it."""
    try:
        return np.array(decode_rgb(path.read_bytes()))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnreadableImageError as error:
        raise DataError(f"{path}: cannot be decoded ({error})") from None


def open_image(data: bytes) -> Image.Image:
    """Pillow's image of `data`, of which nothing but the header was read: format, size and mode.

    No format is tried that starts a program. Raises UnreadableImageError, also for more than
    MAX_PIXELS.
    """
    with _saying_why():
        if not data:
            raise UnreadableImageError("empty: zero bytes")
        image = Image.open(io.BytesIO(data), formats=_formats())
        if image.width * image.height > MAX_PIXELS:
            raise UnreadableImageError(
                f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}: perhaps a "
                "decompression bomb"
            )
        return image


def decode(image: Image.Image, data: bytes, *, repaired: bool = False) -> int | None:
    """Decode what `open_image` gave for `data`; its EXIF orientation, None for a broken block.

    `draft`, which lets libjpeg halve while decoding, is not used: it would change the crop.
    Raises UnreadableImageError, unless `repaired` also for damage that the decoder repairs.
    """
    with _saying_why():
        damage = None if repaired else _strips_missing(image)
        image.load()
        damage = damage or (None if repaired else _damage(image, data))
        if damage is not None:
            raise UnreadableImageError(f"damaged: {damage}")
        return _orientation(image)


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The "center-crop-dhariwal" of REPA_SPEC.md ("Reference data layout").

    Halve with a BOX filter while the short side is at least twice the target, BICUBIC to the
    target's short side, then crop the centre.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_RESIZED_PIXELS:
        raise UnreadableImageError(f"{image.width}x{image.height} is too narrow to be cropped")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def encode(image: Image.Image, image_format: ImageFormat, quality: int) -> bytes:
    """Encoded bytes: PNG is lossless, JPEG keeps full colour resolution (4:4:4), WebP at quality
    100 is lossless. `quality` (1..100) means nothing to PNG."""
    buffer = io.BytesIO()
    if image_format == "png":
        image.save(buffer, "PNG")
    elif image_format == "jpeg":
        # optimize: 6 % fewer bytes for a fifth more time (256 px, quality 95).
        image.save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
    elif quality == 100:
        # For lossless WebP quality is effort; more than this costs 5 to 150 times for no byte less.
        image.save(buffer, "WEBP", lossless=True, quality=50, method=2)
    else:
        image.save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


@contextmanager
def _saying_why() -> Iterator[None]:
    """Make an UnreadableImageError of whatever Pillow raises, which is almost anything."""
    try:
        yield
    except (UnreadableImageError, MemoryError):  # want of memory is not the image's fault
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError("no image format that Pillow knows") from None
    except Exception as error:
        raise UnreadableImageError(str(error) or type(error).__name__) from None


def _damage(image: Image.Image, data: bytes) -> str | None:
    """Say what the decoder of a loaded image repaired."""
    if image.format in ("JPEG", "MPO"):
        return jpeg_damage(data)
    if image.format == "PNG":
        end = image.crop((0, max(0, image.height - 2), *image.size))
        rows = np.asarray(end).reshape(end.height, -1)
        return png_damage(data, dark_end=not rows.any(axis=1).all())
    if image.format == "TIFF":
        return next(filter(None, map(jpeg_damage, _jpegs_of_tiff(image, data))), None)
    return None


def _strips_missing(image: Image.Image) -> str | None:
    """Say whether the strips or tiles of a TIFF, not yet loaded, leave a part of it black."""
    if image.format != "TIFF":
        return None
    planes = len(image.getbands()) if _tag(image, _PLANAR) == _SEPARATE else 1
    extents = [tile[1] for tile in image.tile]  # type: ignore[attr-defined]
    covered = sum((right - left) * (lower - upper) for left, upper, right, lower in extents)
    whole = covered >= planes * image.width * image.height
    return None if whole else "strips of it are missing"


def _jpegs_of_tiff(image: Image.Image, data: bytes) -> Iterator[bytes]:
    """The strips or tiles of a TIFF of JPEGs, each with the tables that they share."""
    if _tag(image, _COMPRESSION) != _OF_JPEG:
        return
    tags = image.tag_v2  # type: ignore[attr-defined]
    tables = bytes(tags.get(_TABLES, b""))[:-2] or b"\xff\xd8"
    for offsets, counts in zip(_OFFSETS, _COUNTS, strict=True):
        for offset, count in zip(tags.get(offsets, ()), tags.get(counts, ()), strict=False):
            yield tables + data[offset + 2 : offset + count]


def _tag(image: Image.Image, number: int) -> int | None:
    """The largest value of a tag of whole numbers; None where there is none, or no TIFF."""
    values = getattr(image, "tag_v2", {}).get(number)
    values = values if isinstance(values, tuple) else (values,)
    return max((value for value in values if isinstance(value, int)), default=None)


def _has_frames(image: Image.Image) -> bool:
    try:  # MPO: phones put thumbnails and gain maps behind the picture
        return bool(getattr(image, "is_animated", False)) and image.format != "MPO"
    except Exception:  # a second frame that is broken is not needed
        return True


def _orientation(image: Image.Image) -> int | None:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return None
    return orientation if isinstance(orientation, int) else None


def _is_plain_jpeg(image: Image.Image, data: bytes) -> bool:
    """Tell whether every decoder reads the same pixels from this JPEG, in colours or grey."""
    if image.format != "JPEG" or _frame_marker(data) not in (_BASELINE, _PROGRESSIVE):
        return False
    if image.mode == "L":
        return True
    components = [layer[0] for layer in getattr(image, "layer", [])]
    # Stored as RGB, by Adobe's mark or the components' names, which decoders treat differently.
    stored_rgb = image.info.get("adobe_transform") == 0 or components == [82, 71, 66]
    return image.mode == "RGB" and not stored_rgb


def _frame_marker(data: bytes) -> int | None:
    """The start-of-frame marker of a JPEG, which names its process; None where there is none."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return marker
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


def _upright_rgb(image: Image.Image, orientation: int | None, data: bytes) -> Image.Image:
    with _saying_why():  # a palette or mode that only conversion finds broken
        rgb = _to_rgb(image, data)
        method = _UPRIGHT.get(orientation or 1)
        rgb = rgb if method is None else rgb.transpose(method)
        rgb.info = {}  # Pillow would write profiles and comments into our files
        return rgb


def _to_rgb(image: Image.Image, data: bytes) -> Image.Image:
    if image.mode == "F":
        raise UnreadableImageError("floating-point samples, whose range is unknown")
    if image.mode.startswith("I"):
        return _deep_grey(image)
    if image.format == "PNG" and image.mode in ("L", "RGB") and "transparency" in image.info:
        return _without_key(image, data)
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # no way leads further
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as RGB, scaled and rounded; Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableImageError("32-bit integer samples, whose range is unknown")
    full = _full_range(image)
    full = full if values.max() <= full else 65535
    grey = ((values.astype(np.uint32) * 255 + full // 2) // full).astype(np.uint8)
    if image.format == "TIFF" and not _tag(image, _POLARITY):  # white is zero, or Pillow's default
        grey = 255 - grey  # Pillow turns 1 to 8 bits over, but not 16
    if (key := image.info.get("transparency")) is not None:
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _full_range(image: Image.Image) -> int:
    """The sample that is white, by the file's own words: TIFF's depth, sign or largest sample.

    The largest is believed as the end of a range of whole bits, not as one picture's brightest.
    PNG's sBIT says nothing of a range: its samples are scaled to all their bits.
    """
    bits, most = _tag(image, _BITS) or 16, _tag(image, _MOST) or 0
    if _tag(image, _SIGNED) == 2 and bits == 16:
        bits = 15
    if 255 <= most < (1 << bits) - 1 and most & (most + 1) == 0:
        return most
    return (1 << min(bits, 16)) - 1


def _without_key(image: Image.Image, data: bytes) -> Image.Image:
    """A PNG's grey or colours with its one transparent colour, in the file's own depth, as white.

    Pillow compares that colour with samples that it has scaled to 8 bits.
    """
    key, depth = np.atleast_1d(image.info["transparency"]), data[24]
    samples = np.asarray(image).reshape(image.height, image.width, -1)
    key = key & ((1 << depth) - 1)
    if depth == 16:
        rest = open_image(data)  # once more, for the low bytes
        rest.tile = [tile._replace(args="RGB;16L") for tile in rest.tile]  # type: ignore[attr-defined]
        rest.load()
        matches = (samples == key >> 8) & (np.asarray(rest) == key & 255)
    else:
        matches = samples == key * (255 // ((1 << depth) - 1))
    rgb = np.array(image.convert("RGB"))
    rgb[matches.all(axis=-1)] = 255
    return Image.fromarray(rgb)


def _is_dim(image: Image.Image, data: bytes) -> bool:
    """Tell whether an image's samples have 16 bits, but none of them reaches a quarter of those."""
    with _saying_why():
        if image.mode.startswith("I"):
            return bool(_full_range(image) == 65535 and 0 < np.asarray(image).max() < _DIM)
        deep = data[24] == 16 if image.format == "PNG" else _tag(image, _BITS) == 16
        if not deep:
            return False
        samples = np.asarray(image).reshape(image.height, image.width, -1)
        colours = samples[..., : samples.shape[-1] - ("A" in image.getbands())]
        return bool(0 < colours.max() < _DIM >> 8)  # Pillow keeps their high bytes
