"""Hostile members are rejected by name, damaged archives refused in one line."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.sources.test_sources import contents, listed, reasons, refused
from tests.sets.archives import PICTURES, Files, by_class, tar_bytes, written, zip_bytes

GOOD = {"ant/0.png": b"good ant", "bee/0.png": b"good bee"}


def special(name: str, kind: bytes, format: int = tarfile.PAX_FORMAT, **fields: Any) -> bytes:
    member = tarfile.TarInfo(name)
    member.type = kind
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(format)


def with_member(raw: bytes) -> bytes:
    """GOOD, and then a member whose raw blocks are given."""
    return tar_bytes(GOOD)[:2048] + raw + bytes(10240)


def pax(records: bytes, kind: bytes = b"x", data: bytes = b"data") -> bytes:
    """A pax header and the member it is about."""
    header = special("pax", kind, size=len(records))
    body = records + bytes(-len(records) % 512)
    return header + body + special("ant/1.png", b"0", size=len(data)) + data.ljust(512, b"\0")


def patched(data: bytes, where: bytes, offset: int, value: bytes) -> bytes:
    """Bytes altered after every place where `where` stands."""
    raw, at = bytearray(data), data.find(where)
    while at >= 0:
        raw[at + offset : at + offset + len(value)] = value
        at = data.find(where, at + 1)
    return bytes(raw)


def named(name: str) -> bytes:
    return tar_bytes({**GOOD, name: b"evil"})


def encrypted() -> bytes:
    data = zip_bytes({**GOOD, "ant/1.png": b"evil"})
    raw = bytearray(data)
    last = data.rfind(b"PK\x01\x02")  # ant/1.png is the last entry of the directory
    raw[last + 8] |= 1
    return bytes(raw)


def overlapping() -> bytes:
    """A bomb's trick: two names in the directory share one member's bytes."""
    data = zip_bytes({**GOOD, "ant/1.png": b"evil"}, zipfile.ZIP_STORED)
    raw, last = bytearray(data), data.rfind(b"PK\x01\x02")
    raw[last + 42 : last + 46] = struct.pack("<I", 0)
    return bytes(raw)


def linked() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in GOOD.items():
            archive.writestr(name, data)
        link = zipfile.ZipInfo("ant/1.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    return buffer.getvalue()


def declared(size: int) -> bytes:
    data = zip_bytes({**GOOD, "ant/1.png": b"evil"})
    raw, last = bytearray(data), data.rfind(b"PK\x01\x02")
    raw[last + 24 : last + 28] = struct.pack("<I", size)
    return bytes(raw)


def twice(make: Callable[[Files], bytes]) -> bytes:
    return make({**GOOD, "ant/1.png": b"1", "ant/2.png": b"2"}).replace(b"ant/2", b"ant/1")


def tar_twice() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in [*GOOD.items(), ("ant/1.png", b"1"), ("./ant//1.png", b"2")]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


# One more member beside GOOD, which is rejected by name.
REJECTED: dict[str, tuple[str, Callable[[], bytes], str, str]] = {
    "parent": ("a.tar", lambda: named("ant/../../../1.png"), "ant/../../../1.png", "'..'"),
    "absolute": ("a.tar", lambda: named("/tmp/ant/1.png"), "/tmp/ant/1.png", "absolute"),
    "backslash": ("a.tar", lambda: named("ant\\1.png"), "ant\\1.png", "a backslash"),
    "newline": ("a.tar", lambda: named("ant/1\n.png"), "ant/1\\n.png", "control characters"),
    "escape": ("a.tar", lambda: named("ant/\x1b[2J.png"), "ant/\\x1b[2J.png", "control"),
    "text above": ("a.tar", lambda: named("../../etc/passwd"), "../../etc/passwd", "'..'"),
    "inner above": ("a.tar", lambda: named("../x.tar"), "../x.tar", "'..'"),
    "symlink": ("a.tar", lambda: with_member(special("ant/1.png", b"2", linkname="/etc/passwd")),
                "ant/1.png", "a symbolic link"),
    "hard link": ("a.tar", lambda: with_member(special("ant/1.png", b"1", linkname="ant/0.png")),
                  "ant/1.png", "a hard link"),
    "device": ("a.tar", lambda: with_member(special("ant/1.png", b"3")), "ant/1.png", "a device"),
    "pipe": ("a.tar", lambda: with_member(special("ant/1.png", b"6")), "ant/1.png", "a pipe"),
    "sparse": ("a.tar", lambda: with_member(special("ant/1.png", b"S")), "ant/1.png", "sparse"),
    "unknown": ("a.tar", lambda: with_member(special("ant/1.png", b"Q")), "ant/1.png", "unknown"),
    "pax sparse": ("a.tar", lambda: with_member(pax(b"22 GNU.sparse.major=1\n")), "ant/1.png",
                   "sparse"),
    "pax path": ("a.tar", lambda: with_member(pax(b"20 path=../evil.png\n")), "../evil.png",
                 "'..'"),
    "nul in pax": ("a.tar", lambda: with_member(pax(b"17 path=a/\0b.png\n")), "a/\\x00b.png",
                   "control"),
    "twice in a tar": ("a.tar", tar_twice, "ant/1.png", "a second member"),
    "too large": ("a.tar", lambda: b"", "ant/1.png", "an image may have"),
    "nested twice": ("a.tar", lambda: tar_bytes({**GOOD, "cat.tar": tar_bytes({
        "in.tar": tar_bytes({"x.png": b"x"}), "y.png": b"y"})}), "cat/in.tar", "inside an archive"),
    "inner gzip": ("a.tar", lambda: named("cat.tar.gz"), "cat.tar.gz", "inside an archive"),
    "zip parent": ("a.zip", lambda: zip_bytes({**GOOD, "ant/../../1.png": b""}),
                   "ant/../../1.png", "'..'"),
    "encrypted": ("a.zip", encrypted, "ant/1.png", "encrypted"),
    "bzip2": ("a.zip", lambda: patched(zip_bytes({**GOOD, "ant/1.png": b""}), b"~", 0, b""),
              "ant/1.png", "compressed by method 12"),
    "overlap": ("a.zip", overlapping, "ant/1.png", "overlap"),
    "zip link": ("a.zip", linked, "ant/1.png", "a symbolic link"),
    "zip bomb": ("a.zip", lambda: declared((512 << 20) + 1), "ant/1.png", "an image may have"),
    "twice in a zip": ("a.zip", lambda: twice(zip_bytes), "ant/1.png", "a second member"),
    "inner gzip in zip": ("a.zip", lambda: zip_bytes({**GOOD, "cat.tgz": b"x"}), "cat.tgz",
                          "inside an archive"),
    "no cls": ("a.tar", lambda: tar_bytes({"0.png": b"", "0.cls": b"0", "1.png": b""}),
               "1.png", "no .cls"),
    "empty cls": ("a.tar", lambda: tar_bytes({"0.png": b"", "0.cls": b"0", "1.png": b"",
                                              "1.cls": b""}), "1.png", "no class index"),
    "word cls": ("a.tar", lambda: tar_bytes({"0.png": b"", "0.cls": b"0", "1.png": b"",
                                             "1.cls": b"dog\n"}), "1.png", "its .cls is 'dog"),
    "negative cls": ("a.tar", lambda: tar_bytes({"0.png": b"", "0.cls": b"0", "1.png": b"",
                                                 "1.cls": b"-1"}), "1.png", "no class index"),
    "huge cls": ("a.tar", lambda: tar_bytes({"0.png": b"", "0.cls": b"0", "1.png": b"",
                                             "1.cls": b"4000000000"}), "1.png", "beyond 999999"),
    "long cls": ("a.tar", lambda: tar_bytes({"0.png": b"", "0.cls": b"0", "1.png": b"",
                                             "1.cls": b"1" * 99}), "1.png", "cannot be read"),
    "lone cls": ("a.tar", lambda: tar_bytes({"0.png": b"", "0.cls": b"0", "1.cls": b"1"}),
                 "1.cls", "a label without an image"),
    "two images": ("a.tar", lambda: tar_bytes({"0.png": b"", "0.cls": b"0", "1.png": b"",
                                               "1.jpg": b"", "1.cls": b"1"}),
                   "1.jpg", "not the only image of the key 1"),
}  # fmt: skip


def make_too_large(path: Path) -> None:
    """A (sparse) member of a little more than an image may have."""
    size = (512 << 20) + 512
    with path.open("wb") as file:
        file.write(tar_bytes(GOOD)[:2048] + special("ant/1.png", b"0", size=size))
        file.truncate(2560 + size + 10240)


@pytest.mark.parametrize("case", REJECTED)
def test_hostile_member_is_rejected_by_name(tmp_path: Path, case: str) -> None:
    archive, make, name, expected = REJECTED[case]
    source = written(tmp_path / archive, make())
    if case == "too large":
        make_too_large(source)
    if case == "bzip2":
        with zipfile.ZipFile(source, "w") as made:
            for good, data in GOOD.items():
                made.writestr(good, data)
            made.writestr("ant/1.png", b"evil", zipfile.ZIP_BZIP2)
    listing = listed(source)
    assert expected in reasons(listing)[name]
    kept = contents(listing)
    assert (
        kept.items() >= (by_class(GOOD) if "ant/0.png" in kept else {"0.png": ("0", b"")}).items()
    )
    assert all(name not in kept for name in reasons(listing) if "twice" not in case)
    assert os.listdir(tmp_path) == [archive]


TAR = tar_bytes(PICTURES, tarfile.GNU_FORMAT)
ZIP = zip_bytes(PICTURES)

REFUSED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "zero bytes": ("a.tar", lambda: b"", "empty file"),
    "zero bytes, zip": ("a.zip", lambda: b"", "empty file"),
    "no archive": ("a.tar", lambda: b"\x89PNG" * 500, "not a tar archive (at byte 0)"),
    "short": ("a.tar", lambda: b"x", "truncated in a header"),
    "cut in an image": ("a.tar", lambda: TAR[: 512 * 4 + 100], "truncated in ant/1.JPEG (at byte"),
    "cut in a header": ("a.tar", lambda: TAR[: 512 * 9 + 100], "truncated in a header"),
    "cut between": ("a.tar", lambda: TAR[:1024], "ends without the two blocks of zeros"),
    "hole": ("a.tar", lambda: TAR[:1024] + bytes(2048) + TAR[3200:],
              "damaged (zeros from byte 1024"),
    "flipped header": ("a.tar", lambda: TAR[:1027] + b"~" + TAR[1028:],
                        "damaged header (at byte 1024)"),
    "empty tar": ("a.tar", lambda: tar_bytes({}), "holds no image"),
    "no classes": ("a.tar", lambda: tar_bytes({"1.png": b"", "2.png": b""}), "in no class folders"),
    "only text": ("a.tar", lambda: tar_bytes({"a/1.txt": b""}), "holds no image"),
    "all unsafe": ("a.tar", lambda: tar_bytes({"../a/1.png": b""}), "rejected: ../a/1.png: '..'"),
    "class lost": ("a.tar", lambda: with_member(special("cat/1.png", b"2", linkname="x")),
                   "no image of class cat can be used (cat/1.png: a symbolic link)"),
    "global pax": ("a.tar", lambda: with_member(pax(b"20 path=../evil.png\n", b"g")), "global pax"),
    "pax size": ("a.tar", lambda: with_member(pax(b"11 size=-5\n")),
                  "a pax size that is no number"),
    "pax beyond": ("a.tar", lambda: with_member(pax(b"20 size=99999999999\n")),
                    "truncated in ant/1"),
    "pax garbage": ("a.tar", lambda: with_member(pax(b"9999 path=x\n")), "damaged pax header"),
    "endless name": ("a.tar", lambda: with_member(special("n", b"L", size=1 << 30)),
                      "bytes of name"),
    "endless size": ("a.tar", lambda: with_member(
        special("ant/1.png", b"0", tarfile.GNU_FORMAT, size=1 << 70)), "truncated in ant/1.png"),
    "negative size": ("a.tar", lambda: with_member(
        special("ant/1.png", b"0", tarfile.GNU_FORMAT, size=-512)), "damaged header"),
    "inner cut": ("a.tar", lambda: tar_bytes({"ant.tar": TAR[:2000]}), "truncated in"),
    "inner empty": ("a.tar", lambda: tar_bytes({**GOOD, "cat.tar": tar_bytes({})}),
                    "cat.tar holds no image"),
    "gzip cut": ("a.tar.gz", lambda: gzip.compress(TAR)[:-30], "truncated gzip stream"),
    "gzip flipped": ("a.tar.gz", lambda: gzip.compress(TAR)[:-6] + b"abcdef",
                      "damaged gzip stream"),
    "xz cut": ("a.tar.xz", lambda: lzma.compress(TAR)[:-30], "truncated xz stream"),
    "bzip2 flipped": ("a.tar.bz2", lambda: bz2.compress(TAR)[:50] + bytes(99), "damaged bzip2"),
    "gzip of text": ("a.tar.gz", lambda: gzip.compress(b"text" * 999), "not a tar archive, though"),
    "zstd": ("a.tar.zst", lambda: b"\x28\xb5\x2f\xfd rest", "decompress it with `zstd -d`"),
    "zip cut": ("a.zip", lambda: ZIP[:-100], "damaged or truncated zip"),
    "zip head": ("a.zip", lambda: b"PK\x03\x04", "damaged or truncated zip"),
    "zip directory": ("a.zip", lambda: patched(ZIP, b"PK\x01\x02", 0, b"XX"),
                       "damaged or truncated"),
    "zip name": ("a.zip", lambda: zip_bytes({"ü/1.png": b""}).replace("ü".encode(), b"\xff\xff"),
                 "damaged or truncated"),
    "zip headers": ("a.zip", lambda: patched(ZIP, b"PK\x03\x04", 4, b"").replace(
        b"PK\x03\x04", b"PK\x03\x05"), "holds no image; rejected: ant/0.JPEG: its header"),
    "all cls bad": ("a.tar", lambda: tar_bytes({"1.png": b"", "1.cls": b"x"}),
                    "no image of it can be used (1.png: its .cls is 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_archive_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    archive, make, expected = REFUSED[case]
    source = written(tmp_path / archive, make())
    message = refused(source)
    assert message.startswith(str(source)) and expected in message
    assert set(os.listdir(tmp_path)) <= {archive, "spool"}
    if (tmp_path / "spool").exists():
        assert os.listdir(tmp_path / "spool") == []


def test_class_names_do_not_go_with_folders(tmp_path: Path) -> None:
    names = written(tmp_path / "names.txt", b"a\nb\n")
    source = written(tmp_path / "set.tar", TAR)
    assert "it has class folders" in refused(source, class_names=names)
    assert "image column does not apply to an archive" in refused(source, image_column="x")
