"""Finds where the members of a tar lie, by its headers alone.

Standard `tarfile` makes an object for each member and reads the archive as a stream of them; of a
150 GB archive of 1.3 million images we want three integers and a name each. Understood are ustar,
GNU (long names, base-256 sizes) and pax headers; links, devices and sparse files are rejected.
A tar inside the tar (ImageNet's one per class) is read in place.
"""

from __future__ import annotations

import os
import re
from io import FileIO
from typing import NoReturn

from fastrepa.data.sources.members import Members, ReportByte
from fastrepa.errors import DataError, printable

BLOCK = 512
_WINDOW = 4096
_MAX_LONG = 1 << 20  # bytes of one long name or pax header
_ZERO = bytes(BLOCK)
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device",
          b"6": "a pipe", b"M": "part of a file of another volume"}  # fmt: skip
_WITHOUT_DATA = b"123456"
_SPARSE = "a sparse file"


def scan_tar(file: FileIO, members: Members, report: ReportByte) -> None:
    """Offer every member of an open tar to `members`, those of tars inside it included.

    Raises DataError, naming the byte, where the archive is damaged or truncated.
    """
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # headers only: no read-ahead
    _Scan(file, members, report).run(0, os.fstat(file.fileno()).st_size, None)
    members.finish()


def scan_inner_tar(
    file: FileIO, members: Members, report: ReportByte, start: int, end: int, folder: str
) -> None:
    """Offer the members of a tar in bytes start..end of an open file, as files of `folder`."""
    _Scan(file, members, report).run(start, end, folder)


def is_header(block: bytes) -> bool:
    """Tell whether a block of 512 bytes has the checksum of a tar header."""
    try:
        wanted = _number(block[148:156])
    except ValueError:
        return False
    if len(block) < BLOCK or block == _ZERO:
        return False
    rest = block[:148] + block[156:]
    total = sum(rest) + 8 * ord(" ")
    # Some old programs summed signed bytes.
    return wanted == total or wanted == total - 256 * sum(byte > 127 for byte in rest)


class _Scan:
    def __init__(self, file: FileIO, members: Members, report: ReportByte) -> None:
        self._file, self._members, self._report = file, members, report
        self._window, self._window_start = b"", 0
        self._count = 0

    def run(self, start: int, end: int, folder: str | None) -> None:
        """Read one tar; `folder`: what its members lie in, when it is itself a member."""
        position, long_name, pax = start, None, dict[str, str]()
        while True:
            at = position
            if at == end:
                self._fail(at, "ends without the two blocks of zeros that end a tar: truncated?")
            if at + BLOCK > end:
                self._fail(at, "truncated in a header")
            header = self._read(at, BLOCK)
            if header == _ZERO:
                following = self._after_zeros(at, end)
                if following is None:
                    break
                position = following
                continue
            if not is_header(header):
                self._fail(at, "not a tar archive" if at == start else "damaged header")
            kind, size = header[156:157], self._size(header, at)
            position = at + BLOCK
            if kind in (b"x", b"X", b"g", b"L", b"K"):
                if size > _MAX_LONG:
                    self._fail(at, f"{size} bytes of name or pax header")
                if position + size > end:
                    self._fail(at, "truncated in a long name or pax header")
                data = self._read(position, size)
                position += _padded(size)
                if kind == b"L":
                    long_name = _text(data.split(b"\0", 1)[0])
                elif kind != b"K":
                    records = self._pax(data, at)
                    if kind != b"g":
                        pax = records
                    elif {"path", "size"} & records.keys() or _is_sparse(records):
                        self._fail(at, "a global pax header that sets a path or size")
                continue
            name = pax.get("path") or long_name or _header_name(header)
            sparse = kind == b"S" or _is_sparse(pax)
            if "size" in pax:
                if not re.fullmatch(r"[0-9]{1,18}", pax["size"]):
                    self._fail(at, "a pax size that is no number")
                size = int(pax["size"])
            name = pax.get("GNU.sparse.name", name)
            long_name, pax = None, {}
            if kind == b"S":
                position = self._after_sparse_maps(header, position, end)
            if kind in _WITHOUT_DATA:
                size = 0
            if position + size > end:
                self._fail(at, f"truncated in {printable(name)}")
            self._offer(name, kind, position, size, sparse, folder)
            position += _padded(size)
            self._count += 1
            if self._count % 1000 == 0:
                self._report(position)
        self._report(end)

    def _offer(
        self, name: str, kind: bytes, offset: int, size: int, sparse: bool, folder: str | None
    ) -> None:
        if kind == b"5" or (kind == b"\0" and name.endswith("/")) or kind in b"VD":
            return  # folders and labels
        full = name if folder is None or name.startswith("/") else f"{folder}/{name}"
        wrong = _SPARSE if sparse else _KINDS.get(kind)
        if wrong is None and kind not in (b"\0", b"0", b"7"):
            wrong = f"a member of the unknown type {kind!r}"
        if wrong is None and folder is None and name.lower().endswith(".tar"):
            inner = self._members.nest(name)
            if inner is not None:
                self.run(offset, offset + size, inner)
            return
        self._members.offer(full, offset, size, wrong=wrong)

    def _read(self, offset: int, size: int) -> bytes:
        first = offset - self._window_start
        if first < 0 or first + size > len(self._window):
            self._window_start, first = offset, 0
            self._window = os.pread(self._file.fileno(), max(size, _WINDOW), offset)
        data = self._window[first : first + size]
        if len(data) < size:
            self._fail(offset, "truncated while it is read")
        return data

    def _size(self, header: bytes, at: int) -> int:
        try:
            return _number(header[124:136])
        except ValueError:
            self._fail(at, "damaged header (its size is no number)")

    def _pax(self, data: bytes, at: int) -> dict[str, str]:
        """The records "LENGTH KEY=VALUE\\n" of a pax header."""
        records = {}
        while data.strip(b"\0"):
            match = re.match(rb"([0-9]{1,7}) ([^=]+)=", data)
            length = int(match[1]) if match else 0
            if match is None or not match.end() < length <= len(data) or data[length - 1] != 0x0A:
                self._fail(at, "damaged pax header")
            records[_text(match[2])] = _text(data[match.end() : length - 1])
            data = data[length:]
        return records

    def _after_sparse_maps(self, header: bytes, position: int, end: int) -> int:
        more = header[482]
        while more:
            if position + BLOCK > end:
                self._fail(position, "truncated in a sparse file")
            more = self._read(position, BLOCK)[504]
            position += BLOCK
        return position

    def _after_zeros(self, at: int, end: int) -> int | None:
        """Find the next header after a block of zeros (archives that were joined); None at the end.

        A download with a hole has zeros in its middle, and no header after them.
        """
        position = at
        while position < end:
            chunk = os.pread(self._file.fileno(), min(1 << 20, end - position), position)
            if not chunk:
                self._fail(position, "truncated while it is read")
            rest = chunk.lstrip(b"\0")
            if rest:
                position += (len(chunk) - len(rest)) // BLOCK * BLOCK
                if position + BLOCK > end or not is_header(self._read(position, BLOCK)):
                    self._fail(position, f"damaged (zeros from byte {at} on, then no tar header)")
                return position
            position += len(chunk)
        return None

    def _fail(self, at: int, what: str) -> NoReturn:
        raise DataError(printable(f"{self._members.label}: {what}") + f" (at byte {at})") from None


def _header_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return _text(name)


def _is_sparse(pax: dict[str, str]) -> bool:
    return any(key.startswith("GNU.sparse.") for key in pax)


def _number(raw: bytes) -> int:
    """A size: octal text, or GNU's base 256. ValueError for anything else."""
    if raw[:1] == b"\x80":
        return int.from_bytes(raw[1:], "big")
    text = raw.split(b"\0", 1)[0].strip(b" ")
    if text and not text.isdigit():
        raise ValueError("not octal")
    return int(text or b"0", 8)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
