"""Damage of a picture that its decoder repairs without a word: grey rows, noise, black below.

Each function takes a file that was decoded and says, in a few words, what is wrong with its data,
or None. What is beside the pixels is never wrong: revisions, profiles, bytes after the end.
"""

from __future__ import annotations

import re
import zlib

import simplejpeg

# libjpeg's warnings that are about the coefficients, in its words.
_LOST = re.compile(
    r"premature end of|bad Huffman code|bad arithmetic code|instead of RST|Inconsistent progression"
    r"|(?P<left>\d+) extraneous bytes before marker 0x(?P<marker>\w+)",
    re.IGNORECASE,
)
# In entropy-coded data: neither a stuffed byte nor a restart.
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
_OWN_BYTES = 8  # at the end of real data that may have the value of the filling behind them
_EOI, _SOS, _NO_LENGTH = 0xD9, 0xDA, (0x01, 0xD8)
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1, 0xC9), (0xC2, 0xCA)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
          (0, 1, 1, 2))  # fmt: skip
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by PNG's colour type


def jpeg_damage(data: bytes) -> str | None:
    """Say what libjpeg repairs in a JPEG: codes that are none, data or restart markers lost."""
    if _warning(data) is not None:
        # It stops at its first warning, and that may be about the header alone.
        bare = _bare(data)
        said = _warning(bare)
        if (match := _LOST.search(said or "")) and not _is_padding(bare, match):
            return str(said).removeprefix("Corrupt JPEG data: ")
    return "the scans that refine it are missing" if _is_unfinished(data) else None


def _warning(data: bytes) -> str | None:
    """Return libjpeg's first warning; the picture is decoded as small and rough as can be."""
    try:
        simplejpeg.decode_jpeg(
            data, colorspace="gray", fastdct=True, fastupsample=True, min_height=1, min_width=1,
            min_factor=8, strict=True,
        )  # fmt: skip
    except ValueError as error:
        return str(error)
    return None


def _bare(data: bytes) -> bytes:
    """Return a JPEG without what its header says beside the frame and the tables."""
    kept, at, frame = [data[:2]], 2, 0
    while match := _MARKER.search(data, at):
        marker, start = match[1][0], match.end()
        at = start if marker in _NO_LENGTH else start + int.from_bytes(data[start : start + 2])
        body = data[start:at]
        if marker in _FRAMES:
            frame = marker
        if marker == _SOS:
            if frame in _SEQUENTIAL:  # where they mean nothing, and some writers leave them zero
                body = body[:-3] + b"\0\x3f\0"
            return b"".join([*kept, b"\xff\xda", body, data[at:]])
        if marker not in _NO_LENGTH and not 0xE0 <= marker <= 0xEF and marker != 0xFE:
            kept += [b"\xff", match[1], body]
    return data


def _is_padding(data: bytes, said: re.Match[str]) -> bool:
    """Tell whether the bytes left over at the end of the data are one value: a writer's filling.

    Zeros in place of lost data are codes, of which the decoder takes many before some are left.
    """
    if said["left"] is None or int(said["marker"], 16) != _EOI:
        return False
    coded = data[: data.find(b"\xff\xd9", data.find(b"\xff\xda"))]
    taken = len(coded) - len(coded.rstrip(coded[-1:])) - int(said["left"])
    return 0 <= taken <= _OWN_BYTES


def _is_unfinished(data: bytes) -> bool:
    """Tell whether a component has no scan, or its last bits (Al) never came.

    A JPEG of several scans that is cut between two of them is, to libjpeg, a rough one.
    """
    components, progressive, at = b"", False, 2
    low: dict[int, dict[int, int]] = {}  # component -> coefficient -> Al of its last scan
    while match := _MARKER.search(data, at):
        marker, at = match[1][0], match.end()
        if marker == _EOI:
            break
        if marker in _NO_LENGTH:
            continue
        length = int.from_bytes(data[at : at + 2])
        body, at = data[at + 2 : at + length], at + length
        if marker in _FRAMES:
            components, progressive = body[6::3], marker in _PROGRESSIVE
        elif marker == _SOS and len(body) >= 4:
            count = body[0]
            first, last, bits = body[-3:]
            if not progressive and count == len(components):
                return False
            for component in body[1 : 1 + 2 * count : 2]:
                scans = low.setdefault(component, {})
                wanted = range(first, min(last, 63) + 1) if progressive else range(1)
                scans.update(dict.fromkeys(wanted, bits & 15 if progressive else 0))
    return any(0 not in low.get(c, {}) or any(low[c].values()) for c in components)


def png_damage(data: bytes, dark_end: bool) -> str | None:
    """Say what Pillow passes over in a PNG: a checksum of its pixels that is wrong, rows missing.

    dark_end: its last rows are all zero, as rows that never came would be.
    """
    whole, parts, at = memoryview(data), [], 8
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        end = at + 8 + length
        if kind == b"IDAT" and end + 4 <= len(data):
            if zlib.crc32(whole[at + 4 : end]) != int.from_bytes(data[end : end + 4]):
                return "the checksum of its pixels is wrong"
            parts.append(whole[at + 8 : end])
        at = end + 4
    if dark_end and at <= len(data):
        wanted = _png_bytes(data)
        if len(zlib.decompressobj().decompress(b"".join(parts), wanted)) < wanted:
            return "its last rows are missing"
    return None


def _png_bytes(data: bytes) -> int:
    """Bytes of a PNG's rows, with the one that names a row's filter, before compression."""
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    bits = data[24] * _CHANNELS.get(data[25], 0)
    total = 0
    for x, y, across, down in _ADAM7 if data[28] else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // across), -(-(height - y) // down)
        total += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    return total
