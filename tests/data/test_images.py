"""Decoding and cropping: every kind of image file becomes the right RGB square, or says why not."""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastrepa.data.images import (
    MAX_PIXELS,
    UnreadableImageError,
    center_crop,
    encode,
    load_square,
    readable_extensions,
    store,
)
from tests.sets.trees import noise

# --- the crop, against an oracle that resamples with explicit weights in float64 ---------------


def box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def cubic(x: float, a: float = -0.5) -> float:
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def weights(n_in: int, n_out: int, kernel, support: float) -> np.ndarray:
    """Return [n_out, n_in]: the kernel widened by the scale when shrinking (antialiasing)."""
    scale = n_in / n_out
    widen = max(scale, 1.0)
    matrix = np.zeros((n_out, n_in))
    for i in range(n_out):
        center = (i + 0.5) * scale
        low = max(int(center - support * widen + 0.5), 0)
        high = min(int(center + support * widen + 0.5), n_in)
        for j in range(low, high):
            matrix[i, j] = kernel((j - center + 0.5) / widen)
        matrix[i] /= matrix[i].sum()
    return matrix


def resample(pixels: np.ndarray, height: int, width: int, kernel, support: float) -> np.ndarray:
    across = np.einsum("oj,hjc->hoc", weights(pixels.shape[1], width, kernel, support), pixels)
    across = np.clip(np.floor(across + 0.5), 0, 255)
    down = np.einsum("oi,iwc->owc", weights(pixels.shape[0], height, kernel, support), across)
    return np.clip(np.floor(down + 0.5), 0, 255)


def crop_oracle(pixels: np.ndarray, target: int) -> np.ndarray:
    pixels = pixels.astype(np.float64)
    while min(pixels.shape[:2]) >= 2 * target:
        pixels = resample(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, box, 0.5)
    short = min(pixels.shape[:2])
    height, width = (round(side * (target / short)) for side in pixels.shape[:2])
    pixels = resample(pixels, height, width, cubic, 2.0)
    top, left = math.floor((height - target) / 2), math.floor((width - target) / 2)
    return pixels[top : top + target, left : left + target]


@pytest.mark.parametrize(
    ("height", "width"),
    [(16, 16), (32, 32), (31, 32), (33, 40), (67, 131), (150, 64), (64, 151), (9, 13), (16, 29)],
)
def test_center_crop_is_dhariwals(height: int, width: int) -> None:
    pixels = noise(height * 1000 + width, height, width)
    ours = np.asarray(center_crop(Image.fromarray(pixels), 16)).astype(np.float64)
    difference = np.abs(ours - crop_oracle(pixels, 16))
    # Rounding between the two passes differs where Pillow takes the vertical one first.
    assert difference.max() <= 1
    assert difference.mean() < 0.25


# --- every kind of pixel -----------------------------------------------------------------------


def saved(tmp_path: Path, image: Image.Image, name: str, **options: object) -> Path:
    path = tmp_path / name
    image.save(path, **options)
    return path


def pixel(path: Path) -> tuple[int, ...]:
    square = load_square(path.read_bytes(), 8)
    assert (square.mode, square.size) == ("RGB", (8, 8))
    return square.getpixel((4, 4))


def full(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (8, 8), colour)  # type: ignore[arg-type]


def test_alpha_is_composited_on_white(tmp_path: Path) -> None:
    half_red = full("RGBA", (255, 0, 0, 128))
    for name in ("a.png", "a.webp", "a.tiff"):
        path = saved(tmp_path, half_red, name, **({"lossless": True} if "webp" in name else {}))
        assert pixel(path) == (255, 127, 127)
    assert pixel(saved(tmp_path, full("RGBA", (0, 0, 0, 0)), "clear.png")) == (255, 255, 255)
    assert pixel(saved(tmp_path, full("LA", (0, 128)), "la.png")) == (127, 127, 127)


def test_transparent_colours_are_composited_on_white(tmp_path: Path) -> None:
    palette = full("P", 1)
    palette.putpalette([0, 0, 255, 10, 20, 30, *[0] * 762])
    assert pixel(saved(tmp_path, palette, "p.png")) == (10, 20, 30)
    assert pixel(saved(tmp_path, palette, "pt.png", transparency=1)) == (255, 255, 255)
    assert pixel(saved(tmp_path, palette, "p.gif")) == (10, 20, 30)
    assert pixel(saved(tmp_path, palette, "pt.gif", transparency=1)) == (255, 255, 255)
    assert pixel(saved(tmp_path, full("L", 7), "lt.png", transparency=7)) == (255, 255, 255)
    colour = saved(tmp_path, full("RGB", (1, 2, 3)), "rgbt.png", transparency=(1, 2, 3))
    assert pixel(colour) == (255, 255, 255)


def test_grey_cmyk_and_sixteen_bits(tmp_path: Path) -> None:
    assert pixel(saved(tmp_path, full("L", 77), "l.png")) == (77, 77, 77)
    assert pixel(saved(tmp_path, full("1", 1), "one.png")) == (255, 255, 255)
    cmyk = pixel(saved(tmp_path, full("CMYK", (0, 255, 255, 0)), "cmyk.tiff"))
    assert cmyk == (255, 0, 0)
    # Scaled and rounded; Pillow's own conversion to 8 bits would clip at 255.
    for value, eight in ((0x8080, 128), (0x01C0, 2), (0xFFFF, 255)):
        sixteen = Image.fromarray(np.full((8, 8), value, dtype=np.uint16))
        for name in ("i16.png", "i16.tiff"):
            assert pixel(saved(tmp_path, sixteen, name)) == (eight,) * 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "jpg", "tiff"])
def test_exif_rotation_is_honoured(tmp_path: Path, orientation: int, extension: str) -> None:
    # Smooth, so that JPEG keeps it; a different value in every corner.
    ramp = np.add.outer(np.arange(16) * 9, np.arange(16) * 3)
    upright = np.stack([ramp, ramp, ramp], axis=-1).astype(np.uint8)
    # What the EXIF standard says row 0 and column 0 of the stored picture are.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if extension == "jpg" else {}
    image = Image.fromarray(np.ascontiguousarray(stored))
    path = saved(tmp_path, image, f"x.{extension}", exif=exif, **options)
    got = np.asarray(load_square(path.read_bytes(), 16)).astype(int)
    assert np.abs(got - upright.astype(int)).max() <= 2


def test_broken_exif_leaves_the_picture_as_it_is(tmp_path: Path) -> None:
    picture = full("RGB", (9, 8, 7))
    for number, exif in enumerate((b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff")):
        assert pixel(saved(tmp_path, picture, f"{number}.png", exif=exif)) == (9, 8, 7)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [full("RGB", (250, 0, 0)), full("RGB", (0, 0, 250))]
    for name in ("a.gif", "a.webp", "a.png"):
        path = tmp_path / name
        lossless = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **lossless)
        assert pixel(path) == (250, 0, 0)


def test_wrong_extension_is_read_by_content(tmp_path: Path) -> None:
    full("RGB", (1, 2, 3)).save(tmp_path / "really.png")
    (tmp_path / "really.png").rename(tmp_path / "named.jpg")
    assert pixel(tmp_path / "named.jpg") == (1, 2, 3)


# --- what cannot be used says why --------------------------------------------------------------


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its few bytes do not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


def test_unusable_files_say_why() -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(1, 64, 64)).save(buffer, "JPEG")
    floats = io.BytesIO()
    Image.fromarray(np.ones((8, 8), np.float32)).save(floats, "TIFF")
    negative = io.BytesIO()
    Image.fromarray(np.full((8, 8), -1, np.int32)).save(negative, "TIFF")
    cases = {
        "empty.png": (b"", "zero bytes"),
        "text.png": (b"hello", "no image format"),
        "cut.jpg": (buffer.getvalue()[:-200], "truncated"),
        "bomb.png": (png_claiming(60000, 60000), "decompression bomb"),
        "lesser.png": (png_claiming(MAX_PIXELS // 8192 + 1, 8192), "decompression bomb"),
        "script.eps": (EPS, "no image format"),
        "hollow.png": (png_claiming(64, 64), "truncated|broken|unrecognized"),
        "float.tiff": (floats.getvalue(), "floating-point"),
        "negative.tiff": (negative.getvalue(), "32-bit integer"),
    }
    for name, (data, reason) in cases.items():
        with pytest.raises(UnreadableImageError, match=reason):
            load_square(data, 16)
        with pytest.raises(UnreadableImageError, match=reason):
            store(data, 16, "jpeg", 90, name)


def test_a_line_is_not_blown_up(tmp_path: Path) -> None:
    Image.new("RGB", (1, 20000)).save(tmp_path / "line.png")
    with pytest.raises(UnreadableImageError, match="1x20000 is too narrow"):
        load_square((tmp_path / "line.png").read_bytes(), 256)


# --- encoding ----------------------------------------------------------------------------------


def test_encodings_keep_what_they_promise() -> None:
    smooth = Image.fromarray(noise(3, 8, 8)).resize((32, 32), Image.Resampling.BICUBIC)
    for image_format, quality in (("png", 1), ("webp", 100)):
        data = encode(smooth, image_format, quality)  # type: ignore[arg-type]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(smooth))
    jpeg = Image.open(io.BytesIO(encode(smooth, "jpeg", 90)))
    assert jpeg.format == "JPEG"
    assert [layer[1:3] for layer in jpeg.layer] == [(1, 1)] * 3  # 4:4:4  # type: ignore[attr-defined]
    sizes = [len(encode(smooth, "jpeg", quality)) for quality in (50, 75, 95)]
    assert sizes == sorted(set(sizes))


def test_profiles_and_comments_of_the_source_are_not_kept(tmp_path: Path) -> None:
    path = saved(tmp_path, full("RGB", (1, 2, 3)), "p.png", icc_profile=b"private" * 20)
    assert Image.open(path).info["icc_profile"]
    for image_format in ("png", "jpeg", "webp"):
        data = encode(load_square(path.read_bytes(), 8), image_format, 90)  # type: ignore[arg-type]
        assert b"private" not in data
        assert "icc_profile" not in Image.open(io.BytesIO(data)).info


# --- what is stored, and what is said of the source --------------------------------------------


def jpeg(size: tuple[int, int], mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(5, size[1], size[0])).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def oriented(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        (jpeg((16, 16)), True),
        (jpeg((16, 16), "L"), True),
        (jpeg((16, 16), progressive=True), True),
        (jpeg((16, 16), exif=oriented(1)), True),
        (jpeg((16, 16), comment=b"a comment"), True),
        (jpeg((16, 17)), False),
        (jpeg((17, 17)), False),
        (jpeg((8, 8)), False),
        (jpeg((16, 16), "CMYK"), False),
        (jpeg((16, 16), keep_rgb=True), False),
        (jpeg((16, 16), exif=oriented(3)), False),
        (jpeg((16, 16), exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), True),
        (jpeg((16, 16)).replace(b"\xff\xc0", b"\xff\xc1"), False),
    ],
)
def test_a_jpeg_that_fits_is_kept_as_it_is(data: bytes, kept: bool) -> None:
    stored = store(data, 16, "jpeg", 95)
    assert stored.original == (stored.data == data) == kept
    picture = Image.open(io.BytesIO(stored.data))
    assert (picture.size, picture.format) == ((16, 16), "JPEG")
    # The pixels are the square's, but for what encoding it again loses.
    square = np.asarray(load_square(data, 16)).astype(int)
    difference = np.abs(np.asarray(picture.convert("RGB")).astype(int) - square)
    assert (difference.max() == 0) if kept else (difference.mean() < 12)
    # Other formats never take it over.
    assert not store(data, 16, "png", 95).original


def test_a_jpeg_that_fits_but_is_truncated_is_refused() -> None:
    with pytest.raises(UnreadableImageError, match="truncated"):
        store(jpeg((16, 16))[:-40], 16, "jpeg", 95)


def test_what_is_said_of_the_source() -> None:
    rotated = store(jpeg((40, 20), exif=oriented(6)), 16, "png", 95, "a.png")
    assert (rotated.width, rotated.height, rotated.format, rotated.mode) == (20, 40, "JPEG", "RGB")
    assert (rotated.animated, rotated.enlarged, rotated.original) == (False, False, False)
    assert rotated.misnamed
    for name in ("a.jpg", "a.JPEG", "a", "a.unknown"):
        assert not store(jpeg((40, 20)), 16, "png", 95, name).misnamed
    assert store(jpeg((40, 15)), 16, "png", 95).enlarged
    assert store(jpeg((9, 9), "CMYK"), 16, "jpeg", 95).mode == "CMYK"
    frames = [full("L", 7), full("L", 90)]
    for name in ("GIF", "WEBP", "PNG", "TIFF"):
        buffer = io.BytesIO()
        frames[0].save(buffer, name, save_all=True, append_images=frames[1:])
        assert store(buffer.getvalue(), 8, "png", 95).animated
        buffer = io.BytesIO()
        frames[0].save(buffer, name)
        assert not store(buffer.getvalue(), 8, "png", 95).animated


def test_extensions_are_those_that_are_read() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".gif", ".tiff", ".bmp"} <= readable_extensions()
    assert not {".eps", ".txt", ".tar", ""} & readable_extensions()
