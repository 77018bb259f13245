"""Finds where a zip's members lie: stored ones as they are, deflated ones as compressed ranges."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
from io import FileIO

from fastrepa.data.sources.members import Members, ReportByte
from fastrepa.data.sources.tars import scan_inner_tar
from fastrepa.errors import DataError, printable

_LOCAL = struct.Struct("<4s22xHH")  # a member's own header: magic, lengths of name and extra field
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_PATCH = 0x20


def scan_zip(file: FileIO, members: Members, report: ReportByte) -> None:
    """Offer every member of an open zip to `members`; tars that are stored are read in place.

    Raises DataError when the central directory or a tar inside is damaged or truncated.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            infos, directory = archive.infolist(), archive.start_dir
    except Exception as error:  # zipfile raises almost anything on damaged directories
        text = str(error) or type(error).__name__
        raise DataError(printable(f"{members.label}: damaged or truncated zip ({text})")) from None
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    infos.sort(key=lambda info: info.header_offset)
    reached = 0  # a bomb lets many names share the same bytes
    for number, info in enumerate(infos):
        if number % 1000 == 0:
            report(info.header_offset)
        if info.is_dir():
            continue
        offset = _data_offset(file, info.header_offset)
        wrong = _wrong(info)
        if wrong is None and info.header_offset < reached:
            wrong = "its bytes overlap those of another member"
        elif wrong is None and (offset is None or offset + info.compress_size > directory):
            wrong = "its header inside the archive is damaged"
        elif offset is not None:
            reached = max(reached, offset + info.compress_size)
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        name = info.orig_filename
        if name.lower().endswith(".tar") and wrong is None and not deflated:
            assert offset is not None
            if (folder := members.nest(name)) is not None:
                end = offset + info.file_size
                scan_inner_tar(file, members, report, offset, end, folder)
        else:
            inflated = info.file_size if deflated else -1
            members.offer(name, offset or 0, info.compress_size, inflated, wrong)
    members.finish()


def _wrong(info: zipfile.ZipInfo) -> str | None:
    if info.flag_bits & _ENCRYPTED:
        return "encrypted"
    mode = info.external_attr >> 16
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
    if info.flag_bits & _PATCH or info.compress_type not in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    ):
        return f"compressed by method {info.compress_type}, not deflate"
    if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
        return "stored, but with two different sizes"
    return None


def _data_offset(file: FileIO, header: int) -> int | None:
    """Return where a member's data begins, by its own header; None when there is none."""
    raw = os.pread(file.fileno(), _LOCAL.size, header) if header >= 0 else b""
    if len(raw) < _LOCAL.size:
        return None
    magic, name, extra = _LOCAL.unpack(raw)
    return header + _LOCAL.size + name + extra if magic == b"PK\x03\x04" else None
