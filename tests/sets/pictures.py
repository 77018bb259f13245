"""Picture files of every kind, those that Pillow cannot write among them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SHORT, _LONG = 3, 4


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(seed: int, side: int = 32, channels: int = 3) -> np.ndarray:
    """Make smooth colours uint8 [side, side, channels], which a JPEG keeps nearly as they are."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, channels), dtype=np.uint8)
    bands = [
        Image.fromarray(small[..., c]).resize((side, side), Image.Resampling.BICUBIC)
        for c in range(channels)
    ]
    return np.stack([np.asarray(band) for band in bands], axis=-1)


# PNG ------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def packed(row: np.ndarray, bits: int) -> bytes:
    """Pack samples [w] or [w, c] of a row, the first in the highest bits."""
    if bits == 16:
        return row.astype(">u2").tobytes()
    places = np.arange(bits - 1, -1, -1)
    return np.packbits(row.reshape(-1, 1).astype(np.int64) >> places & 1).tobytes()


def png(
    samples: np.ndarray, colour: int, bits: int, before: bytes = b"", rows: int | None = None
) -> bytes:
    """Make a PNG of samples [h, w] or [h, w, c] of so many bits.

    before: chunks before the pixels. rows: how many of them are there.
    """
    height, width = samples.shape[:2]
    raw = b"".join(b"\0" + packed(row, bits) for row in samples[:rows])
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"".join([
        _SIGNATURE, chunk(b"IHDR", head), before, chunk(b"IDAT", zlib.compress(raw)),
        chunk(b"IEND", b""),
    ])  # fmt: skip


def key_chunk(*samples: int) -> bytes:
    """The colour that is transparent."""
    return chunk(b"tRNS", struct.pack(f">{len(samples)}H", *samples))


# TIFF -----------------------------------------------------------------------------------------


def tiff(
    samples: np.ndarray, bits: int, white_is_zero: bool = False, deflate: bool = False,
    order: str = "<", **more: int,
) -> bytes:  # fmt: skip
    """Make a grey TIFF of samples [h, w] in one strip; more: t281=4095 for another tag."""
    height, width = samples.shape
    kind = f"{order}{'i' if samples.dtype.kind == 'i' else 'u'}2"
    rows = [row.astype(kind).tobytes() if bits == 16 else packed(row, bits) for row in samples]
    strip = zlib.compress(b"".join(rows)) if deflate else b"".join(rows)
    tags = {
        256: width, 257: height, 258: bits, 259: 8 if deflate else 1,
        262: 0 if white_is_zero else 1, 273: 8, 277: 1, 278: height, 279: len(strip),
        **{int(tag[1:]): value for tag, value in more.items()},
    }  # fmt: skip
    strip += b"\0" * (len(strip) % 2)
    directory = struct.pack(f"{order}H", len(tags)) + b"".join(
        struct.pack(f"{order}HHIH2x", tag, _SHORT, 1, value)
        if value < 65536 and tag not in (273, 279)
        else struct.pack(f"{order}HHII", tag, _LONG, 1, value)
        for tag, value in sorted(tags.items())
    )
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(strip))
    return head + strip + directory + bytes(4)


# All kinds ------------------------------------------------------------------------------------


def every_kind(seed: int, side: int = 32) -> Iterator[tuple[str, bytes]]:
    """Give (file name, file) of a square picture in every way to store one that is read."""
    colours = smooth(seed, side)
    image, grey = Image.fromarray(colours), colours[..., 0]
    alpha = np.dstack([colours, smooth(seed + 1, side, 1)])
    palette = image.quantize(16)
    deep = grey.astype(np.uint16) * 257
    yield "rgb.png", saved(image, "PNG")
    yield "named.jpg", saved(image, "PNG")
    for bits in (1, 2, 4, 8):
        low = grey >> (8 - bits)
        yield f"grey{bits}.png", png(low, 0, bits)
        yield f"key{bits}.png", png(low, 0, bits, key_chunk(int(low[3, 5])))
        yield f"polarity{bits}.tif", tiff(low, bits, white_is_zero=True, deflate=bool(seed % 2))
    yield "grey16.png", png(deep, 0, 16)
    yield "key16.png", png(deep, 0, 16, key_chunk(int(deep[3, 5])))
    yield "rgb16.png", png(colours.astype(np.uint16) * 257, 2, 16)
    yield "rgbkey.png", png(colours, 2, 8, key_chunk(*map(int, colours[3, 5])))
    yield "rgba.png", saved(Image.fromarray(alpha), "PNG")
    yield "rgba16.png", png(alpha.astype(np.uint16) * 257, 6, 16)
    yield "la.png", png(alpha[..., [0, 3]], 4, 8)
    yield "la16.png", png(alpha[..., [0, 3]].astype(np.uint16) * 257, 4, 16)
    yield "palette.png", saved(palette, "PNG")
    yield "palettealpha.png", saved(palette, "PNG", transparency=bytes(range(0, 256, 16)))
    yield "polarity16.tif", tiff(deep, 16, white_is_zero=True)
    yield "signed.tif", tiff((deep >> 1).astype(np.int16), 16, t339=2)
    yield "big.tif", tiff(deep, 16, order=">")
    yield "twelve.tif", tiff(deep >> 4, 12)
    yield "most.tif", tiff(deep >> 4, 16, t281=4095)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        yield (
            f"turn{turn}.{'jpg' if turn % 2 else 'png'}",
            saved(image, "JPEG" if turn % 2 else "PNG", exif=exif),
        )
    yield "rgb.jpg", saved(image, "JPEG", quality=90)
    yield "progressive.jpg", saved(image, "JPEG", progressive=True)
    yield "grey.jpg", saved(image.convert("L"), "JPEG")
    yield "cmyk.jpg", saved(image.convert("CMYK"), "JPEG")
    yield "keeprgb.jpg", saved(image, "JPEG", keep_rgb=True)
    yield "mpo.jpg", saved(image, "MPO", save_all=True, append_images=[image])
    yield "gif.gif", saved(palette, "GIF")
    yield "clear.gif", saved(palette, "GIF", transparency=3)
    yield "moving.gif", saved(palette, "GIF", save_all=True, append_images=[image.quantize(4)])
    yield "lossy.webp", saved(image, "WEBP")
    yield "alpha.webp", saved(Image.fromarray(alpha), "WEBP", lossless=True, exact=True)
    yield "bmp.bmp", saved(image, "BMP")
    for compression in ("jpeg", "tiff_lzw", "packbits"):
        yield f"{compression}.tif", saved(image, "TIFF", compression=compression)
    yield "cmyk.tif", saved(image.convert("CMYK"), "TIFF")
    yield "rgba.tif", saved(Image.fromarray(alpha), "TIFF")
    yield "jp2.jp2", saved(image, "JPEG2000")
    yield "tga.tga", saved(Image.fromarray(alpha), "TGA")
    yield "ppm.ppm", saved(image, "PPM")
    yield "pgm16.pgm", saved(Image.fromarray(deep), "PPM")
    yield "ico.ico", saved(image, "ICO", sizes=[(side, side)])
