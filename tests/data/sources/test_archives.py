"""Archives: every kind read back byte for byte, and hostile ones named, rejected or refused."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastrepa.data.format.shards import ShardSet
from fastrepa.data.sources import spool
from tests.data.sources.test_sources import contents, listed, reasons, refused

Files = dict[str, bytes]

PICTURES: Files = {
    f"{kind}/{i}.JPEG": os.urandom(10 + 700 * i) for kind in ("ant", "bee") for i in range(4)
}


def tar_bytes(files: Files, format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def zip_bytes(files: Files, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def by_class(files: Files, prefix: str = "") -> dict[str, tuple[str, bytes]]:
    return {prefix + name: (name.split("/")[0], data) for name, data in files.items()}


# --- by class folders --------------------------------------------------------------------------


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_of_class_folders(tmp_path: Path, format: int) -> None:
    source = written(tmp_path / "set.tar", tar_bytes({**PICTURES, "README": b"hello"}, format))
    listing = listed(source)
    assert listing.classes == ["ant", "bee"]
    assert contents(listing) == by_class(PICTURES)
    assert (listing.ignored, listing.rejected) == (["README"], [])
    assert os.listdir(tmp_path) == ["set.tar"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_unicode_names(tmp_path: Path, format: int) -> None:
    files = {
        "Ünï ✨/" + "x" * 230 + ".png": b"1",
        "/".join(["deep"] + ["y" * 200] * 20) + "/😀.png": b"2",
        "Ünï ✨/" + os.fsdecode(b"\xff\xfe.png"): b"3",
    }
    assert contents(listed(written(tmp_path / "a.tar", tar_bytes(files, format)))) == by_class(
        files
    )
    zipped = dict(list(files.items())[:2])
    assert contents(listed(written(tmp_path / "a.zip", zip_bytes(zipped)))) == by_class(zipped)


def test_tar_of_tars_as_imagenet_has_it(tmp_path: Path) -> None:
    inner = {
        name: {f"{name}_{i}.JPEG": os.urandom(3000 + i) for i in range(5)}
        for name in ("n01440764", "n01443537", "n01484850")
    }
    outer = {f"{name}.tar": tar_bytes(files, tarfile.GNU_FORMAT) for name, files in inner.items()}
    source = written(tmp_path / "train.tar", tar_bytes(outer, tarfile.GNU_FORMAT))
    listing = listed(source)
    assert contents(listing) == {
        f"{kind}/{name}": (kind, data)
        for kind, files in inner.items()
        for name, data in files.items()
    }
    assert os.listdir(tmp_path) == ["train.tar"]
    # The same inside a zip, stored; and below a folder.
    zipped = {f"data/{name}": data for name, data in outer.items()}
    source = written(tmp_path / "train.zip", zip_bytes(zipped, zipfile.ZIP_STORED))
    for inside, prefix in ((None, "data/"), ("data", "")):
        again = listed(source, inside=inside)
        assert again.classes == listing.classes
        assert contents(again) == {
            prefix + name: value for name, value in contents(listing).items()
        }


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip(tmp_path: Path, method: int) -> None:
    source = written(tmp_path / "set.zip", zip_bytes(PICTURES, method))
    listing = listed(source)
    assert contents(listing) == by_class(PICTURES)
    assert (listing.entries["inflated"] >= 0).all() == (method == zipfile.ZIP_DEFLATED)
    # Behind a self-extractor's program.
    source = written(tmp_path / "self.zip", os.urandom(777) + source.read_bytes())
    assert contents(listed(source)) == by_class(PICTURES)


def test_zip64_with_more_members_than_16_bits_count(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for i in range(65_600):
            archive.writestr(zipfile.ZipInfo(f"{i % 3}/{i}.png"), b"%d" % i)
        with archive.open("0/large.png", "w", force_zip64=True) as file:
            file.write(b"large")
    listing = listed(tmp_path / "many.zip")
    assert len(listing.names) == 65_601
    assert contents(listing)["1/65599.png"] == ("1", b"65599")
    assert contents(listing)["0/large.png"] == ("0", b"large")


def test_leading_folders_are_passed_over(tmp_path: Path) -> None:
    deep = {f"a/b/{name}": data for name, data in PICTURES.items()}
    source = written(tmp_path / "set.tar", tar_bytes({"./a/b/note.txt": b"", **deep}))
    assert contents(listed(source)) == {
        f"a/b/{name}": value for name, value in by_class(PICTURES).items()
    }
    one = {f"a/b/{name}": data for name, data in PICTURES.items() if name < "b"}
    assert listed(written(tmp_path / "one.tar", tar_bytes(one))).classes == ["ant"]
    stray = written(tmp_path / "stray.tar", tar_bytes({"cover.png": b"x", **deep}))
    assert reasons(listed(stray)) == {"cover.png": "lies in no class folder"}
    assert listed(stray).classes == ["ant", "bee"]


def test_inside_takes_one_part(tmp_path: Path) -> None:
    files = {f"ILSVRC/Data/CLS-LOC/train/{name}": data for name, data in PICTURES.items()}
    files |= {"ILSVRC/Data/CLS-LOC/test/1.JPEG": b"x", "ILSVRC/Data/CLS-LOC/val/1.JPEG": b"x"}
    for source in (
        written(tmp_path / "kaggle.zip", zip_bytes(files)),
        written(tmp_path / "kaggle.tar", tar_bytes(files)),
    ):
        for inside in ("ILSVRC/Data/CLS-LOC/train", "ILSVRC/Data/CLS-LOC/train/"):
            assert contents(listed(source, inside=inside)) == by_class(PICTURES)
        assert "top folders are test, train, val, no classes" in refused(source)
        assert "holds no image below ILSVRC/Data/CLS" in refused(source, inside="ILSVRC/Data/CLS")


def test_folder_of_archives(tmp_path: Path) -> None:
    ant = {name: data for name, data in PICTURES.items() if name.startswith("ant")}
    bee = {name: data for name, data in PICTURES.items() if name.startswith("bee")}

    def bare(files: Files) -> Files:
        return {name.split("/")[1]: data for name, data in files.items()}

    several, each, same = tmp_path / "several", tmp_path / "each", tmp_path / "same"
    written(several / "1.tar", tar_bytes({f"train/{name}": data for name, data in ant.items()}))
    written(several / "2.zip", zip_bytes({f"train/{name}": data for name, data in bee.items()}))
    written(several / "README.md", b"")
    written(each / "ant.tar.gz", gzip.compress(tar_bytes(bare(ant))))
    written(each / "bee.zip", zip_bytes(bare(bee)))
    for name, files in (("ant", ant), ("bee", bee)):
        images = {f"images/{name}": data for name, data in bare(files).items()}
        written(same / f"{name}.tar", tar_bytes(images))
    assert contents(listed(several)) == {
        **{f"1.tar/train/{name}": ("ant", data) for name, data in ant.items()},
        **{f"2.zip/train/{name}": ("bee", data) for name, data in bee.items()},
    }
    assert contents(listed(each)) == {
        **{f"ant.tar.gz/{name}": ("ant", data) for name, data in bare(ant).items()},
        **{f"bee.zip/{name}": ("bee", data) for name, data in bare(bee).items()},
    }
    assert listed(same).classes == ["ant", "bee"]
    written(each / "cat.tar", tar_bytes({"README": b""}))
    assert "cat.tar: holds no image" in refused(each)


def test_joined_tars_are_read_to_the_end(tmp_path: Path) -> None:
    halves = [dict(list(PICTURES.items())[:5]), dict(list(PICTURES.items())[5:])]
    source = written(tmp_path / "set.tar", b"".join(tar_bytes(half) for half in halves))
    assert contents(listed(source)) == by_class(PICTURES)


def test_scan_reads_headers_only(tmp_path: Path) -> None:
    """A terabyte of (sparse) images is listed as fast as a megabyte."""
    size, count = 256 << 20, 4000
    with (tmp_path / "large.tar").open("wb") as file:
        for i in range(count):
            member = tarfile.TarInfo(f"{i % 2}/{i}.png")
            member.size = size
            file.write(member.tobuf(tarfile.GNU_FORMAT))
            file.seek(size, os.SEEK_CUR)
        file.truncate(file.tell() + 10240)
    started = time.monotonic()
    listing = listed(tmp_path / "large.tar")
    assert time.monotonic() - started < 5
    assert len(listing.names) == count
    assert int(listing.entries["offset"][-1]) == count * 512 + (count - 1) * size


# --- compressed --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("set.tar.gz", gzip.compress),
        ("set.tgz", gzip.compress),
        ("set.tar.bz2", bz2.compress),
        ("set.tar.xz", lzma.compress),
        ("misnamed.tar", gzip.compress),
    ],
)
def test_compressed_tar_is_copied_once(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes]
) -> None:
    source = written(tmp_path / name, compress(tar_bytes(PICTURES)))
    assert contents(listed(source)) == by_class(PICTURES)
    copy = tmp_path / "spool" / "00000.tar"
    assert sorted(os.listdir(copy.parent)) == ["00000.json", "00000.tar"]
    before = copy.stat().st_ino
    assert contents(listed(source)) == by_class(PICTURES)
    assert copy.stat().st_ino == before
    # A killed run's rest and another source's copy are not taken for it.
    written(copy.parent / ".00000.tar.tmp", b"rest")
    fewer = dict(list(PICTURES.items())[1:])
    written(source, compress(tar_bytes(fewer)))
    assert contents(listed(source)) == by_class(fewer)
    assert sorted(os.listdir(copy.parent)) == ["00000.json", "00000.tar"]


def test_expansion_and_disk_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = written(tmp_path / "bomb.tar.gz", gzip.compress(tar_bytes({"a/b.png": bytes(8 << 20)})))
    monkeypatch.setattr(spool, "FREE_EXPANSION", 1 << 20)
    assert "bomb.tar.gz: expands to more than 200 times" in refused(bomb)
    assert os.listdir(tmp_path / "spool") == []
    monkeypatch.setattr(spool, "MAX_EXPANSION", 1 << 20)
    monkeypatch.setattr(spool, "SPARE", 1 << 60)
    assert "MiB are free for its copy" in refused(bomb)
    assert os.listdir(tmp_path / "spool") == []
    monkeypatch.setattr(spool, "SPARE", 0)
    assert len(listed(bomb).names) == 1


# --- WebDataset --------------------------------------------------------------------------------


def test_webdataset_by_cls(tmp_path: Path) -> None:
    files = {"000.jpg": b"0", "000.cls": b"2\n", "b/001.input.png": b"1", "b/001.cls": b" 0 ",
             "002.webp": b"2", "002.cls": b"2", "002.txt": b"caption"}  # fmt: skip
    source = written(tmp_path / "wds.tar", tar_bytes(files))
    assert contents(listed(source)) == {
        "000.jpg": ("2", b"0"), "b/001.input.png": ("0", b"1"), "002.webp": ("2", b"2")
    }  # fmt: skip
    assert listed(source).classes == ["0", "1", "2"]
    names = written(tmp_path / "names.txt", "ant\nbee\nÇat\n".encode())
    assert listed(source, class_names=names).classes == ["ant", "bee", "Çat"]
    assert contents(listed(source, class_names=names))["000.jpg"] == ("Çat", b"0")
    names.write_text("ant\nbee\n")
    few = listed(source, class_names=names)
    assert few.names == ["b/001.input.png"]
    assert reasons(few)["000.jpg"] == "its label is 2, beyond 1"


def test_webdataset_folder_and_json(tmp_path: Path) -> None:
    folder = tmp_path / "wds"
    for shard in range(3):
        files = {}
        for i in range(3):
            files[f"{i}.jpg"] = b"%d %d" % (shard, i)
            files[f"{i}.json"] = json.dumps({"cls": shard, "width": 4}).encode()
        written(folder / f"{shard:02d}.tar", tar_bytes(files))
    assert contents(listed(folder)) == {
        f"{shard:02d}.tar/{i}.jpg": (str(shard), b"%d %d" % (shard, i))
        for shard in range(3)
        for i in range(3)
    }
    # Notes that are no labels leave class folders what they are.
    notes = {**PICTURES, "ant/0.json": b'{"width": 3}'}
    listing = listed(written(tmp_path / "notes.tar", tar_bytes(notes)))
    assert (listing.classes, listing.ignored) == (["ant", "bee"], ["ant/0.json"])


def test_prepared_set_is_a_source(make_set: Callable[..., ShardSet], tmp_path: Path) -> None:
    made = make_set()
    listing = listed(made.path)
    assert listing.classes == made.classes == ["ant", "bee", "cat"]
    assert len(listing.names) == made.num_samples
    assert [int(n) for n in sorted(k.split("/")[1][:8] for k in listing.names)] == list(range(34))
    made.shard_paths[0].write_bytes(made.shard_paths[0].read_bytes()[:-512])
    assert "truncated" in refused(made.path)


# --- hostile -----------------------------------------------------------------------------------

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
