"""Every kind of damage is named with its file and sample, all of them at once, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from fastrepa.cli import app
from fastrepa.commands.prepare.prepare import prepare
from fastrepa.commands.verify.verify import SHOWN, print_report, verify
from fastrepa.data.format.columns import seal
from fastrepa.data.format.index import load_index
from fastrepa.data.format.shards import (
    FeaturesColumn,
    FileRecord,
    MomentsColumn,
    ShardSet,
)
from fastrepa.data.format.writing import write_manifest
from fastrepa.errors import DataError
from tests.commands.verify.damages import (
    DAMAGES,
    INDEX,
    MOMENTS,
    TAR,
    K,
    _alter_image,
    _found,
    check,
    edit_index,
    edit_manifest,
    edit_rows,
    lines,
)
from tests.sets.trees import RESOLUTION

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


def test_two_classes_of_one_name_are_worth_a_look_and_not_wrong(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["classes"][2].update(name="ant"))
    report = check(folder)
    assert report.ok
    assert report.notes == ["manifest.json: 'ant' is the name of classes 0 and 2"]


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
