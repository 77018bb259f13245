"""Any image that Pillow reads -> the RGB square that is trained on -> its encoded bytes."""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastrepa.data.shards import ImageFormat

# Refused above: what a resize may make of a very long, narrow image (pixels).
MAX_RESIZED_PIXELS = 1 << 26

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


class UnreadableImageError(Exception):
    """Why one image cannot be used, in a few words."""


def readable_extensions() -> set[str]:
    """Lower-case file extensions, with their dot, of the formats that Pillow can open."""
    return {ext for ext, name in Image.registered_extensions().items() if name in Image.OPEN}


def load_square(path: Path, resolution: int) -> Image.Image:
    """The image of a file as RGB, upright, on white, center-cropped to resolution x resolution.

    Of an animated file, the first frame. Colour profiles are not applied (nor does the reference).
    Raises UnreadableImageError for whatever Pillow cannot decode, decompression bombs included.
    """
    try:
        with warnings.catch_warnings():
            # Between Pillow's two limits it warns; beyond the second it raises.
            warnings.simplefilter("ignore")
            if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
                raise UnreadableImageError("not a regular file")
            with Image.open(path) as image:
                image.load()
                square = center_crop(_to_rgb(_upright(image)), resolution)
                square.info = {}  # Pillow would write profiles and comments into our files
                return square
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError("no image format that Pillow knows") from None
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        reason = error.strerror if isinstance(error, OSError) else None
        raise UnreadableImageError(reason or str(error) or type(error).__name__) from None


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
        image.save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
    else:
        image.save(buffer, "WEBP", quality=quality, lossless=quality == 100, method=6)
    return buffer.getvalue()


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


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
    return image.convert("RGB")
