"""Every kind of damage is named with its file and sample, all of them at once, and nothing else."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from fastrepa.cli import app
from fastrepa.commands.prepare.prepare import prepare
from fastrepa.commands.verify.verify import SHOWN, VerifyReport, print_report, verify
from fastrepa.data.format.columns import seal
from fastrepa.data.format.index import load_index
from fastrepa.data.format.shards import (
    FeaturesColumn,
    FileRecord,
    MomentsColumn,
    ShardSet,
    write_manifest,
)
from fastrepa.data.images import encode
from fastrepa.errors import DataError
from tests.sets.trees import RESOLUTION, flip_byte, noise

VIEWS, TOKENS, WIDTH = 2, 4, 5


def add_columns(folder: Path) -> None:
    """Sound columns of two views: moments [8,2,2], and features of 2x2 tokens."""
    manifest = ShardSet.open(folder).manifest
    made = {"views": VIEWS, "precision": "fp32", "weights": "random", "digest": None, "files": ()}
    moments = MomentsColumn(**made, channels=4, side=2)
    features = FeaturesColumn(
        **made, encoder="enc", timm_name="enc", input_side=16, grid=2, width=WIDTH,
        mean=(0.5,) * 3, std=(0.5,) * 3, order="normalise-resize", norm=True, min_cosine=0.999,
    )  # fmt: skip
    draw = np.random.default_rng(0)
    files: dict[str, list[FileRecord]] = {"moments": [], "features.enc": []}
    for shard in manifest.shards:
        rows = np.zeros((shard.samples, VIEWS), moments.dtype)
        rows["moments"] = draw.uniform(0.1, 1, rows["moments"].shape)
        more = np.zeros((shard.samples, VIEWS), features.dtype)
        more["scale"] = draw.uniform(0.1, 1, more["scale"].shape)
        more["tokens"] = draw.integers(-127, 128, more["tokens"].shape)
        for name, array in (("moments", rows), ("features.enc", more)):
            seal(array)
            path = folder / f"{Path(shard.file).stem}.{name}.npy"
            np.save(path, array)
            files[name].append(FileRecord.of(path))
    columns = {
        "moments": moments.model_copy(update={"files": tuple(files["moments"])}),
        "features": (features.model_copy(update={"files": tuple(files["features.enc"])}),),
    }
    write_manifest(folder, manifest.model_copy(update=columns))


@pytest.fixture(scope="module")
def sound(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "set"
    prepare(tree, path, resolution=RESOLUTION, shard_size=8, workers=0, progress=False)
    add_columns(path)
    return path


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of a sound set: 34 images in 5 shards, two columns of two views."""
    shutil.copytree(sound, tmp_path / "set")
    return tmp_path / "set"


def check(folder: Path, **options: Any) -> VerifyReport:
    return verify(folder, workers=0, progress=False, **options)


def lines(folder: Path, **options: Any) -> list[str]:
    return [str(problem) for problem in check(folder, **options).problems]


# What a damage is: something done to the folder, and every line that it must bring about. -------


@dataclass
class Damage:
    """A damage and the lines that name it; `quick`: those that need no contents."""

    do: Callable[[Path], Any]
    lines: list[str]
    quick: list[str]


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def rehash(folder: Path, name: str) -> None:
    """Make the manifest agree with a file as it is now: the damage lies in what the file says."""
    record = FileRecord.of(folder / name).model_dump()

    def change(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("file") == name:
                value.update(record)
            for item in value.values():
                change(item)
        if isinstance(value, list):
            for item in value:
                change(item)

    edit_manifest(folder, change)


def edit_index(shard: int, change: Callable[[np.ndarray], Any]) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        path = folder / f"shard-{shard:05d}.idx.npy"
        index = load_index(path)
        changed = change(index)
        np.save(path, index if changed is None else changed)
        rehash(folder, path.name)

    return do


def edit_rows(name: str, change: Callable[[np.ndarray], Any], *, sealed: bool = True) -> Any:
    def do(folder: Path) -> None:
        rows = np.load(folder / name)
        changed = change(rows)
        rows = rows if changed is None else changed
        if sealed:
            seal(rows)
        np.save(folder / name, rows)
        rehash(folder, name)

    return do


def edit_bytes(shard: int, where: Callable[[np.void], int], text: bytes) -> Callable[[Path], None]:
    """Overwrite bytes of a shard at a place that the index's record of sample 2 gives."""

    def do(folder: Path) -> None:
        path = folder / f"shard-{shard:05d}.tar"
        offset = where(load_index(folder / f"shard-{shard:05d}.idx.npy")[2])
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(text)
        rehash(folder, path.name)

    return do


def replace_image(data: bytes) -> Callable[[Path], None]:
    """Other bytes for sample 2 of shard 0, in a tar, index and manifest that all agree."""

    def do(folder: Path) -> None:
        path, index_path = folder / "shard-00000.tar", folder / "shard-00000.idx.npy"
        index = load_index(index_path)
        with tarfile.open(path) as tar:
            members = [(m, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (member, old) in enumerate(members):
                new = data if number == 4 else old
                member.size = len(new)
                if number % 2 == 0:
                    index[number // 2]["image_offset"] = tar.offset + 512
                    index[number // 2]["image_size"] = len(new)
                    index[number // 2]["image_crc32"] = zlib.crc32(new)
                tar.addfile(member, io.BytesIO(new))
        np.save(index_path, index)
        rehash(folder, path.name)
        rehash(folder, index_path.name)

    return do


def cut(name: str, count: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - count)


def append(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"x")


def image_bytes(side: int = RESOLUTION, image_format: Any = "png", mode: str = "RGB") -> bytes:
    if mode != "RGB":
        buffer = io.BytesIO()
        Image.fromarray(noise(1, side, side)).convert(mode).save(buffer, "PNG")
        return buffer.getvalue()
    return encode(Image.fromarray(noise(1, side, side)), image_format, 95)


def _after_image(record: np.void) -> int:
    """Offset of the tar header of the sample's .cls."""
    return int(record["image_offset"]) + -(-int(record["image_size"]) // 512) * 512


TAR, INDEX = "shard-00001.tar", "shard-00001.idx.npy"
MOMENTS, FEATURES = "shard-00001.moments.npy", "shard-00001.features.enc.npy"
ALTERED = "altered (its SHA-256 is not the manifest's)"
K = [f"{n:08d}" for n in range(34)]  # keys; shard s has K[8 * s:]

DAMAGES: dict[str, Damage] = {}


def damage(
    name: str, do: Callable[[Path], Any], found: list[str], quick: list[str] | None = None
) -> None:
    DAMAGES[name] = Damage(do, found, [] if quick is None else quick)


for part in ("shard-00004.moments.npy", "shard-00004.features.enc.npy", "sources.jsonl"):
    name = part.split(".", 1)[-1]
    damage(f"missing {name}", lambda f, p=part: (f / p).unlink(),
           [f"{part}: missing, but the manifest lists it"],
           [f"{part}: missing, but the manifest lists it"])  # fmt: skip
    damage(f"truncated {name}", cut(part, 3), [f"{part}: truncated ("], [f"{part}: truncated ("])
    damage(f"too long {name}", append(part), [f"{part}: too long ("], [f"{part}: too long ("])
damage("missing tar", lambda f: (f / TAR).unlink(),
       [f"{TAR}: missing, but the manifest lists it"],
       [f"{TAR}: missing, but the manifest lists it"])  # fmt: skip
damage("missing index", lambda f: (f / INDEX).unlink(),
       [f"{INDEX}: missing, but the manifest lists it"],
       [f"{INDEX}: missing, but the manifest lists it"])  # fmt: skip
damage("too long tar", append(TAR), [f"{TAR}: too long ("], [f"{TAR}: too long ("])
damage("truncated index", cut(INDEX, 3),
       [f"{INDEX}: truncated (", f"{INDEX}: not a readable shard index ("],
       [f"{INDEX}: truncated (", f"{INDEX}: not a readable shard index ("])  # fmt: skip
damage("altered index", lambda f: flip_byte(f / INDEX, (f / INDEX).stat().st_size - 1),
       [f"{INDEX}: {ALTERED}", f"{TAR}: sample {K[15]}: altered (its CRC-32 is not the index's)"],
       [f"{INDEX}: {ALTERED}"])  # fmt: skip
damage("no index at all", lambda f: ((f / INDEX).write_bytes(b"x" * (f / INDEX).stat().st_size)),
       [f"{INDEX}: {ALTERED}", f"{INDEX}: not a readable shard index ("],
       [f"{INDEX}: {ALTERED}", f"{INDEX}: not a readable shard index ("])  # fmt: skip
damage("altered sources", lambda f: flip_byte(f / "sources.jsonl", 5),
       [f"sources.jsonl: {ALTERED}"], [f"sources.jsonl: {ALTERED}"])  # fmt: skip


def _few_sources(folder: Path) -> None:
    path = folder / "sources.jsonl"
    text = path.read_text().splitlines()[:33]
    path.write_text("\n".join(["null", "no json", *text[2:]]) + "\n")
    rehash(folder, path.name)


_SOURCES = [
    "sources.jsonl: line 2 is not JSON",
    f"sources.jsonl: sample {K[0]}: no source is named",
    f"sources.jsonl: sample {K[33]}: no source is named",
]
damage("sources that name too few", _few_sources, _SOURCES, _SOURCES)


def _alter_image(folder: Path) -> None:
    flip_byte(folder / TAR, int(load_index(folder / INDEX)[3]["image_offset"]) + 60)


damage("altered image", _alter_image,
       [f"{TAR}: {ALTERED}", f"{TAR}: sample {K[11]}: altered (its CRC-32 is not the index's)",
        f"{TAR}: sample {K[11]}: image cannot be decoded ("])  # fmt: skip
damage("altered padding", lambda f: flip_byte(f / TAR, (f / TAR).stat().st_size - 1),
       [f"{TAR}: {ALTERED}"])  # fmt: skip
damage("altered moments", lambda f: flip_byte(f / MOMENTS, (f / MOMENTS).stat().st_size - 30),
       [f"{MOMENTS}: {ALTERED}",
        f"{MOMENTS}: sample {K[15]} view 1: altered (its CRC-32 is wrong)"])  # fmt: skip
damage("altered features", lambda f: flip_byte(f / FEATURES, (f / FEATURES).stat().st_size - 12),
       [f"{FEATURES}: {ALTERED}",
        f"{FEATURES}: sample {K[15]} view 1: altered (its CRC-32 is wrong)"])  # fmt: skip

# Counts, labels, keys, places: the files agree with the manifest's sums, not with each other.
for number, (change, line) in enumerate((
    (lambda m: m["classes"][0].update(samples=10),
     "manifest.json: class 'ant' has 10 samples, the indices 9"),
    (lambda m: m.update(num_samples=35), "manifest.json: num_samples is 35, its shards hold 34"),
    (lambda m: m["classes"][0].update(name="bee"),
     "manifest.json: class 'bee' is there more than once"),
    (lambda m: m["features"][0]["files"].pop(),
     "manifest.json: features.enc has 4 files for 5 shards"),
)):  # fmt: skip
    damage(f"count {number}", lambda f, c=change: edit_manifest(f, c), [line], [line])
damage("a file listed twice",
       lambda f: edit_manifest(f, lambda m: m["moments"]["files"].__setitem__(
           4, m["moments"]["files"][3])),
       ["manifest.json: lists shard-00003.moments.npy more than once",
        "shard-00003.moments.npy: rows of "],
       ["manifest.json: lists shard-00003.moments.npy more than once",
        "shard-00003.moments.npy: rows of "])  # fmt: skip
_SHORT = [f"{INDEX}: 7 samples, the manifest says 8",
          "manifest.json: class "]  # fmt: skip
damage("a sample less in the index", edit_index(1, lambda i: i[:7]), _SHORT, _SHORT)
_LABEL = [f"{INDEX}: sample {K[9]}: its label is outside 0..2",
          f"{INDEX}: sample {K[10]}: its label is outside 0..2"]  # fmt: skip


def _labels_outside(index: np.ndarray) -> None:
    index["label"][1:3] = (3, -1)


damage("labels outside", edit_index(1, _labels_outside),
       [*_LABEL, "manifest.json: class ", "its .cls says", "its .cls says"],
       [*_LABEL, "manifest.json: class "])  # fmt: skip


def _other_key(key: bytes) -> Callable[[np.ndarray], None]:
    return lambda index: index["key"].__setitem__(1, key)


damage("a key twice", edit_index(1, _other_key(b"00000001")),
       [f"{TAR}: sample {K[1]}: its key is another sample's, too",
        f"{TAR}: sample {K[1]}: the tar has '{K[9]}.png' where {K[1]}.png should be",
        f"{TAR}: sample {K[1]}: the tar has '{K[9]}.cls' where {K[1]}.cls should be"],
       [f"{TAR}: sample {K[1]}: its key is another sample's, too"])  # fmt: skip
damage("a key that is none", edit_index(1, _other_key(b"x")),
       [f"{INDEX}: sample x: its key is not 8 digits",
        f"{TAR}: sample x: the tar has '{K[9]}.png'", f"{TAR}: sample x: the tar has '{K[9]}.cls'"],
       [f"{INDEX}: sample x: its key is not 8 digits"])  # fmt: skip
for field, value in (("image_size", 10**6), ("image_size", 0), ("image_offset", -1),
                     ("image_offset", 1 << 40)):  # fmt: skip
    outside = f"{INDEX}: sample {K[9]}: its bytes do not lie within {TAR}"
    follows = f"{INDEX}: sample {K[10]}: does not follow the sample before it in {TAR}"
    damage(f"{field} {value}", edit_index(1, lambda i, f=field, v=value: i[f].__setitem__(1, v)),
           [outside, follows], [outside, follows])  # fmt: skip
_MOVED = [f"{INDEX}: sample {K[9]}: does not follow", f"{INDEX}: sample {K[10]}: does not follow"]
damage("image_offset a block too far",
       edit_index(1, lambda i: i["image_offset"].__setitem__(1, i["image_offset"][1] + 512)),
       [*_MOVED, "the tar header of", "altered (its CRC-32", "cannot be decoded", "the tar header"],
       _MOVED)  # fmt: skip


def _shorter(index: np.ndarray) -> None:
    index["image_size"][1] -= 1  # in as many blocks


damage(
    "image_size one less",
    edit_index(1, _shorter),
    [
        f"{TAR}: sample {K[9]}: {K[9]}.png has ",
        f"{TAR}: sample {K[9]}: altered (its CRC-32",
    ],
)

# The tar, in a file whose SHA-256 the manifest knows.
damage(
    "tar header",
    edit_bytes(1, lambda r: int(r["image_offset"]) - 512 + 20, b"\xff"),
    [f"{TAR}: sample {K[10]}: the tar header of {K[10]}.png is damaged (bad checksum)"],
)
damage(
    ".cls header",
    edit_bytes(1, lambda r: _after_image(r) + 20, b"\xff"),
    [f"{TAR}: sample {K[10]}: the tar header of {K[10]}.cls is damaged (bad checksum)"],
)
damage(".cls text", edit_bytes(1, lambda r: _after_image(r) + 512, b"7"),
       [f"{TAR}: sample {K[10]}: its .cls says '7', the index "])  # fmt: skip

# Images.
_IMAGE = f"shard-00000.tar: sample {K[2]}: image "
damage("a truncated image", replace_image(image_bytes()[:-40]), [_IMAGE + "cannot be decoded ("])
damage("no image", replace_image(b"nothing of the kind"), [_IMAGE + "cannot be decoded ("])
damage("a larger image", replace_image(image_bytes(24)), [_IMAGE + "24x24 px, not 16x16"])
damage("a JPEG among PNGs", replace_image(image_bytes(image_format="jpeg")),
       [_IMAGE + "a JPEG image, not PNG"])  # fmt: skip
damage("a palette", replace_image(image_bytes(mode="P")), [_IMAGE + "of mode P, not RGB or L"])


# Columns, sealed again: their bytes are what was written, and wrong.
def _at(field: str, value: float) -> Callable[[np.ndarray], None]:
    def change(rows: np.ndarray) -> None:
        rows[field][2, 1].reshape(-1)[-1] = value

    return change


for value in (np.nan, np.inf):
    damage(f"moments {value}", edit_rows(MOMENTS, _at("moments", value)),
           [f"{MOMENTS}: sample {K[10]} view 1: moments that are not finite"])  # fmt: skip
damage("a negative std", edit_rows(MOMENTS, _at("moments", -0.5)),
       [f"{MOMENTS}: sample {K[10]} view 1: a negative standard deviation"])  # fmt: skip
for value in (0.0, -1.0, np.nan, np.inf):
    text = f"{FEATURES}: sample {K[10]} view 1: scales that are not finite and positive"
    damage(f"scale {value}", edit_rows(FEATURES, _at("scale", value)), [text])
damage("tokens all zero", edit_rows(FEATURES, lambda r: r["tokens"].__setitem__((2, 0), 0)),
       [f"{FEATURES}: sample {K[10]} view 0: every token is zero"])  # fmt: skip
damage("a token of -128", edit_rows(FEATURES, _at("tokens", -128)),
       [f"{FEATURES}: sample {K[10]} view 1: tokens outside -127..127"])  # fmt: skip
damage("a wrong CRC", edit_rows(MOMENTS, lambda r: r["crc32"].__setitem__((0, 0), 1), sealed=False),
       [f"{MOMENTS}: sample {K[8]} view 0: altered (its CRC-32 is wrong)"])  # fmt: skip
damage("moments of another shape", edit_rows(MOMENTS, lambda r: np.ascontiguousarray(r[:, :1])),
       [f"{MOMENTS}: rows of "], [f"{MOMENTS}: rows of "])  # fmt: skip


def _found(wanted: list[str], found: list[str]) -> None:
    """Each wanted beginning or part is in a line of its own, and no line is left over."""
    left = list(found)
    for text in wanted:
        match = next((line for line in left if line.startswith(text) or text in line), None)
        assert match is not None, f"{text!r} is not in {left}"
        left.remove(match)
    # A class that is counted differently is named once for each class.
    assert [line for line in left if "samples, the indices" not in line] == []


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(folder: Path, name: str) -> None:
    kind = DAMAGES[name]
    kind.do(folder)
    _found(kind.lines, lines(folder))
    _found(kind.quick, lines(folder, quick=True))


def test_several_damages_are_all_named(folder: Path) -> None:
    names = ["missing moments.npy", "altered image", "altered features", "altered sources"]
    for name in names:
        DAMAGES[name].do(folder)
    edit_index(2, lambda index: index["label"].__setitem__(0, 99))(folder)
    (folder / "shard-00003.idx.npy").write_bytes(b"")
    wanted = [line for name in names for line in DAMAGES[name].lines]
    wanted += [f"shard-00002.idx.npy: sample {K[16]}: its label is outside", "its .cls says"]
    wanted += ["shard-00003.idx.npy: truncated (0", "shard-00003.idx.npy: not a readable"]
    _found(wanted, lines(folder))


def test_a_sound_set(folder: Path) -> None:
    report = check(folder)
    assert report.ok
    assert (report.problems, report.notes) == ([], [])
    assert report.layout == "shards"
    assert report.num_images == 34
    assert report.columns == {"moments": 34, "features.enc": 34}
    assert report.num_files == 5 * 4 + 2
    listed = [p for p in folder.iterdir() if p.suffix in (".tar", ".npy", ".jsonl")]
    assert report.num_bytes == sum(path.stat().st_size for path in listed)


def test_truncated_tar_names_every_sample_that_is_lost(folder: Path) -> None:
    starts = load_index(folder / INDEX)["image_offset"]
    os.truncate(folder / TAR, int(starts[6]) - 512)
    found = lines(folder)
    assert found[0].startswith(f"{TAR}: truncated (")
    lost = {line.split(": ")[1] for line in found if "beyond the end" in line}
    assert lost == {f"sample {key}" for key in K[14:16]}


def test_leftovers_and_strangers_are_notes(folder: Path) -> None:
    (folder / "readme.txt").write_text("mine")
    (folder / ".shard-00000.tar.tmp").write_bytes(b"")
    (folder / "shard-00000.features.other.12345678.npy").write_bytes(b"")
    (folder.parent / ".set.partial").mkdir()
    report = check(folder)
    assert report.ok
    notes = "\n".join(report.notes)
    for text in (
        "readme.txt: unknown",
        ".shard-00000.tar.tmp: left by",
        ".set.partial: beside",
        "features.other.12345678.npy: of a column that the manifest does not list",
    ):
        assert text in notes
    assert len(report.notes) == 4


def test_every_fault_of_a_manifest(folder: Path) -> None:
    edit_manifest(folder, lambda m: m.update(resolution="16", surprise=1))
    found = lines(folder)
    assert len(found) == 2
    assert any("resolution: Input should be a valid integer" in line for line in found)
    assert any("surprise: Extra inputs are not permitted" in line for line in found)
    (folder / "manifest.json").write_text("{")
    assert "not valid JSON" in lines(folder)[0]
    (folder / "manifest.json").unlink()
    assert lines(folder)[0].startswith("manifest.json: missing")


def test_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data set"):
        check(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds neither manifest\.json"):
        check(tmp_path)


def test_processes_find_the_same(folder: Path) -> None:
    for name in ("altered image", "altered features", "labels outside"):
        DAMAGES[name].do(folder)
    alone, together = lines(folder), verify(folder, workers=2, progress=False).problems
    assert [str(problem) for problem in together] == alone


def test_command_line(folder: Path) -> None:
    run = CliRunner().invoke(app, ["data", "verify", str(folder), "--workers", "0"])
    assert run.exit_code == 0
    assert "nothing wrong" in run.stdout
    assert "34" in run.stdout
    edit_rows("shard-00000.moments.npy", lambda r: r["moments"].__setitem__(..., np.nan))(folder)
    edit_rows(MOMENTS, lambda r: r["moments"].__setitem__(..., np.nan))(folder)
    edit_rows("shard-00002.moments.npy", lambda r: r["moments"].__setitem__(..., np.nan))(folder)
    edit_rows("shard-00003.moments.npy", lambda r: r["moments"].__setitem__(..., np.nan))(folder)
    run = CliRunner().invoke(app, ["data", "verify", str(folder), "--workers", "0"])
    assert run.exit_code == 1
    assert run.stdout.count("not finite") == SHOWN
    assert "and 14 more" in run.stdout
    assert "64 problems in" in run.stdout
    run = CliRunner().invoke(app, ["data", "verify", str(folder), "--workers", "0", "--json"])
    assert run.exit_code == 1
    report = json.loads(run.stdout)
    assert report["ok"] is False
    assert len(report["problems"]) == 64
    assert report["problems"][0]["sample"] == f"{K[0]} view 0"


def test_quick_reads_no_contents(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _alter_image(folder)
    report = check(folder, quick=True)
    assert report.ok
    print_report(report, Console())
    assert "sizes only" in capsys.readouterr().out
    run = CliRunner().invoke(app, ["data", "verify", str(folder), "--quick"])
    assert run.exit_code == 0


def test_ctrl_c_stops_checks_under_way_and_leaves_no_process_behind(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 38)  # a hole that takes minutes to hash
    code = (
        "from pathlib import Path\n"
        "from fastrepa.commands.verify.checks import run_checks\n"
        "from fastrepa.commands.verify.check_shards import HashCheck\n"
        "from fastrepa.data.format.shards import FileRecord\n"
        "record = FileRecord(file='large', bytes=1 << 38, sha256='0' * 64)\n"
        "print('started', flush=True)\n"
        "try:\n"
        f"    run_checks([HashCheck(Path({str(tmp_path)!r}), record)] * 3, 2, True, print)\n"
        "except KeyboardInterrupt:\n"
        "    print('clean', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        try:
            assert run.stdout is not None
            assert run.stdout.readline() == "started\n"
            time.sleep(1.5)  # the workers are hashing
            os.kill(run.pid, signal.SIGINT)
            out, err = run.communicate(timeout=20)
        except BaseException:
            os.killpg(run.pid, signal.SIGKILL)
            raise
    assert "clean" in out
    assert "Traceback" not in err
    for _ in range(100):
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:  # the whole session is gone
            return
        time.sleep(0.05)  # multiprocessing's resource tracker ends a moment after its parent
    pytest.fail("a process is left behind")


# REPA's layout -----------------------------------------------------------------------------------


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """12 images of 16 px in two folders, moments [8,2,2], labels 0..2."""
    root, labels = tmp_path / "reference", []
    for number in range(12):
        below = f"{number // 8:05d}"
        for part in ("images", "vae-sd"):
            (root / part / below).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(noise(number, RESOLUTION, RESOLUTION))
        image.save(root / f"images/{below}/img{number:08d}.png")
        name = f"{below}/img-mean-std-{number:08d}.npy"
        moments = np.random.default_rng(number).uniform(0.1, 1, (8, 2, 2)).astype(np.float32)
        np.save(root / "vae-sd" / name, moments)
        labels.append([name, number % 3])
    (root / "vae-sd/dataset.json").write_text(json.dumps({"labels": labels}))
    return root


def edit_labels(root: Path, change: Callable[[list[Any]], Any]) -> None:
    path = root / "vae-sd/dataset.json"
    listed = json.loads(path.read_text())
    change(listed["labels"])
    path.write_text(json.dumps(listed))


IMAGE, LATENTS = "images/00000/img00000003.png", "vae-sd/00000/img-mean-std-00000003.npy"
LISTED, NAME = "vae-sd/dataset.json", "00000/img-mean-std-00000003.npy"


def save(array: np.ndarray) -> Callable[[Path], None]:
    return lambda root: np.save(root / LATENTS, array)


def moments_with(place: tuple[int, ...], value: float) -> np.ndarray:
    array = np.full((8, 2, 2), 0.5, dtype=np.float32)
    array[place] = value
    return array


REFERENCE_DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no image": (lambda r: (r / IMAGE).unlink(), [f"{LATENTS}: has no image of its name"]),
    "no latents": (
        lambda r: (r / LATENTS).unlink(),
        [f"{IMAGE}: has no latents of its name",
         f"{LISTED}: sample {NAME}: labelled, but the file is missing"],
    ),
    "latents of another folder": (
        lambda r: (r / LATENTS).rename(r / LATENTS.replace("/00000/", "/00001/")),
        [f"{IMAGE}: has no latents of its name",
         f"{LATENTS.replace('/00000/', '/00001/')}: has no image of its name",
         f"{LISTED}: sample {NAME}: labelled, but the file is missing",
         f"{LATENTS.replace('/00000/', '/00001/')}: has no label in dataset.json"],
    ),
    "an undecodable image": (
        lambda r: (r / IMAGE).write_bytes(image_bytes()[:-40]), [f"{IMAGE}: cannot be decoded ("],
    ),
    "an empty image": (lambda r: (r / IMAGE).write_bytes(b""), [f"{IMAGE}: cannot be decoded ("]),
    "another size": (
        lambda r: (r / IMAGE).write_bytes(image_bytes(24)), [f"{IMAGE}: 24x24 px, not 16x16"],
    ),
    "no npy": (lambda r: (r / LATENTS).write_bytes(b"x"), [f"{LATENTS}: not a readable .npy ("]),
    "a truncated npy": (cut(LATENTS, 4), [f"{LATENTS}: not a readable .npy ("]),
    "pickled": (
        lambda r: np.save(r / LATENTS, np.array([{}], dtype=object), allow_pickle=True),
        [f"{LATENTS}: not a readable .npy ("],
    ),
    "shape": (
        save(np.ones((4, 2, 2), np.float32)), [f"{LATENTS}: of shape [4, 2, 2], not [8, 2, 2]"],
    ),
    "dtype": (save(np.ones((8, 2, 2))), [f"{LATENTS}: of dtype float64, not float32"]),
    "NaN": (save(moments_with((0, 1, 1), np.nan)), [f"{LATENTS}: moments that are not finite"]),
    "std": (save(moments_with((7, 1, 1), -0.1)), [f"{LATENTS}: a negative standard deviation"]),
    "a label too few": (
        lambda r: edit_labels(r, lambda e: e.pop(3)), [f"{LATENTS}: has no label in dataset.json"],
    ),
    "a label twice": (
        lambda r: edit_labels(r, lambda e: e.append(e[3])),
        [f"{LISTED}: sample {NAME}: labelled 2 times"],
    ),
    "a negative label": (
        lambda r: edit_labels(r, lambda e: e[3].__setitem__(1, -1)),
        [f"{LISTED}: sample {NAME}: its label is -1"],
    ),
    "a label in words": (
        lambda r: edit_labels(r, lambda e: e[3].__setitem__(1, "cat")),
        [f"{LISTED}: sample {NAME}: its label is 'cat'"],
    ),
    "no pair": (
        lambda r: edit_labels(r, lambda e: e.__setitem__(3, 7)),
        [f"{LISTED}: labels[3] is not [file, label]", f"{LATENTS}: has no label"],
    ),
    "no labels": (lambda r: (r / LISTED).write_text("[]"), [f"{LISTED}: has no list"]),
    "no JSON": (lambda r: (r / LISTED).write_text("{"), [f"{LISTED}: not valid JSON"]),
    "no dataset.json": (lambda r: (r / LISTED).unlink(), [f"{LISTED}: missing"]),
    "a stranger": (
        lambda r: (r / "images/00000/img1 (copy).png").write_bytes(b""),
        ["images/00000/img1 (copy).png: its name is not of the reference's layout"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFERENCE_DAMAGES)
def test_damage_to_the_reference_layout_is_named(reference: Path, name: str) -> None:
    do, wanted = REFERENCE_DAMAGES[name]
    do(reference)
    _found(wanted, lines(reference))


def test_several_damages_to_the_reference_layout(reference: Path) -> None:
    for name in ("no pair", "NaN", "another size"):
        REFERENCE_DAMAGES[name][0](reference)
    _found(
        [line for n in ("no pair", "NaN", "another size") for line in REFERENCE_DAMAGES[n][1]],
        lines(reference),
    )


def test_a_sound_reference_layout(reference: Path) -> None:
    (reference / "images/notes.txt").write_text("mine")
    report = check(reference)
    assert report.ok
    assert report.layout == "reference"
    assert (report.num_images, report.columns, report.num_files) == (12, {"moments": 12}, 25)
    assert report.notes == ["images/notes.txt: unknown; not of the reference's layout"]
    assert check(reference, quick=True).ok


def test_the_quickstart_is_sound() -> None:
    path = Path(__file__).parents[3] / "configs/quickstart/emoji/train"
    report = check(path)
    assert report.ok, report.problems
    assert report.num_images == 1783
