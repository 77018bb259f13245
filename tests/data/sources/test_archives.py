"""Archives: every kind read back byte for byte, compressed ones within bounds."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastrepa.data.format.shards import ShardSet
from fastrepa.data.sources import spool
from fastrepa.runtime.files import HOST
from tests.data.sources.test_sources import contents, listed, reasons, refused
from tests.sets.archives import PICTURES, Files, by_class, tar_bytes, written, zip_bytes

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
    killed = subprocess.Popen(["true"])
    killed.wait()
    written(copy.parent / f".00000.tar.{killed.pid}@{HOST}.tmp", b"rest")
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
