"""Any image that Pillow reads -> the RGB square that is trained on -> its encoded bytes."""

from __future__ import annotations

import functools
import io
import os
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastrepa.data.format.shards import ImageFormat

# Refused above: what one source may have (Pillow's own limit is a third more), and what a resize
# may make of a very long, narrow image (pixels).
MAX_PIXELS = 1 << 27
MAX_RESIZED_PIXELS = 1 << 26

# Not among the formats that are tried: Pillow would start Ghostscript on whatever the file says.
_NEVER = {"EPS"}
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
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
_BASELINE, _PROGRESSIVE = 0xC0, 0xC2  # JPEG's start-of-frame markers that every decoder knows


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


def store(
    data: bytes, resolution: int, image_format: ImageFormat, quality: int, name: str = ""
) -> Stored:
    """The bytes to store for a source image: its `load_square`, encoded.

    For "jpeg", a source that is already an upright RGB or grey JPEG of exactly this size is kept
    as it is: encoding it again would only lose. `name` tells whether the extension fits.
    Raises UnreadableImageError for whatever cannot be decoded.
    """
    image, oriented, animated = _decode(data)
    format_, mode = image.format or "", image.mode
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
        data = encode(_square(image, oriented, resolution), image_format, quality)
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
    )


def load_square(data: bytes, resolution: int) -> Image.Image:
    """The image in `data` as RGB, upright, on white, center-cropped to resolution x resolution.

    Of an animated file, the first frame. Colour profiles are not applied (nor does the reference).
    Raises UnreadableImageError for whatever Pillow cannot decode, decompression bombs included.
    """
    image, oriented, _ = _decode(data)
    return _square(image, oriented, resolution)


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


def _decode(data: bytes) -> tuple[Image.Image, int | None, bool]:
    """The decoded image, its EXIF orientation (None: the block is broken), whether it moves.

    `draft`, which lets libjpeg halve while decoding, is not used: it would change the crop.
    """
    try:
        with warnings.catch_warnings():
            # Between Pillow's two limits it warns; beyond the second it raises.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_formats())
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImageError(
                    f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}: perhaps a "
                    "decompression bomb"
                )
            animated = _has_frames(image)
            image.load()
            return image, _orientation(image), animated
    except (UnreadableImageError, MemoryError):  # want of memory is not the image's fault
        raise
    except UnidentifiedImageError:
        reason = "no image format that Pillow knows" if data else "empty: zero bytes"
        raise UnreadableImageError(reason) from None
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise UnreadableImageError(str(error) or type(error).__name__) from None


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


def _square(image: Image.Image, orientation: int | None, resolution: int) -> Image.Image:
    try:
        method = _UPRIGHT.get(orientation or 1)
        square = center_crop(
            _to_rgb(image if method is None else image.transpose(method)), resolution
        )
    except (UnreadableImageError, MemoryError):
        raise
    except Exception as error:  # a palette or mode that only conversion finds broken
        raise UnreadableImageError(str(error) or type(error).__name__) from None
    square.info = {}  # Pillow would write profiles and comments into our files
    return square


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UnreadableImageError("floating-point samples, whose range is unknown")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableImageError("32-bit integer samples, whose range is unknown")
        scaled = (values.astype(np.uint32) * 255 + 32767) // 65535
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")
