"""A run is its folder: which one a file means, what others left in it, what cannot be written."""

import io
import json
import logging
import os
import re
import shutil
import sys
import types
import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from fastrepa.config import config_from_dict, load_config, load_run_config, told_of_folder
from fastrepa.errors import CheckpointError, ConfigError, DataError, FastrepaError
from fastrepa.generation.pictures import save_curves
from fastrepa.reading.metrics import read_metrics
from fastrepa.runtime import exit_codes
from fastrepa.runtime.files import HOST
from fastrepa.runtime.ownership import take
from fastrepa.runtime.rank_log import RankLog, hold
from fastrepa.runtime.terminal import Terminal
from fastrepa.runtime.world import World
from fastrepa.training import run as training_run
from fastrepa.training import telemetry as training_telemetry
from fastrepa.training.telemetry import Telemetry
from fastrepa.training.zero import offload
from tests import command_line
from tests.runs import ROOT, SMALL

QUICKSTART = ROOT / "configs/quickstart.yaml"
TREE = load_config(QUICKSTART).model_dump(mode="json")
METRICS = dict.fromkeys(
    ("images_per_s", "peak_memory_bytes", "skipped_steps", "data_wait", "step_seconds"), 1.0
)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder to be in, with runs/a in it, which remembers that name."""
    monkeypatch.chdir(tmp_path)
    Path("runs/a/checkpoints").mkdir(parents=True)
    Path("runs/a/config.yaml").write_text(json.dumps(TREE | {"run": "runs/a"}))
    return tmp_path


def means(file: str | Path, *overrides: str) -> tuple[str, str]:
    """The folder that a file means, and what is said of it."""
    config = load_config(file, overrides)
    return config.run, told_of_folder(Path(file), config.run)


def test_a_runs_own_file_means_the_folder_that_it_lies_in(runs, monkeypatch):
    assert means("runs/a/config.yaml") == ("runs/a", "")
    shutil.copytree("runs/a", "runs/copy")
    for file in ("runs/copy/config.yaml", f"{runs}/runs/copy/config.yaml"):
        folder, said = means(file)
        assert folder == str(Path(file).parent)
        assert "runs/copy" in said and said.endswith("says run: runs/a")
    assert load_run_config(Path("runs/copy")).run == "runs/copy"
    shutil.move("runs/a", "elsewhere")
    assert means("elsewhere/config.yaml")[0] == "elsewhere"
    Path("other").mkdir()
    monkeypatch.chdir("other")
    assert means("../elsewhere/config.yaml")[0] == "../elsewhere"
    monkeypatch.chdir("../elsewhere")
    assert means("config.yaml")[0] == str(runs / "elsewhere")
    assert load_run_config(Path()).run == "."


def test_a_link_to_a_runs_file_and_to_its_folder(runs):
    Path("latest").symlink_to("runs/a")
    assert means("latest/config.yaml") == ("latest", "")
    Path("a.yaml").symlink_to("runs/a/config.yaml")
    assert means("a.yaml") == (str(runs / "runs/a"), "")
    Path("b/checkpoints").mkdir(parents=True)  # a run whose file is another's
    Path("b/config.yaml").symlink_to("../runs/a/config.yaml")
    assert means("b/config.yaml")[0] == "b"


@pytest.mark.parametrize("left", ["metrics.jsonl", "rank_0.log"])
def test_a_run_that_has_saved_nothing_yet(runs, left):
    shutil.rmtree("runs/a/checkpoints")
    Path("runs/a", left).touch()
    shutil.move("runs/a", "b")
    assert means("b/config.yaml")[0] == "b"


def test_a_project_with_a_folder_called_checkpoints_is_no_run(runs):
    """Training there would replace its config.yaml, comments and all."""
    for name in (
        "others/checkpoints/dino.pt",
        "more/checkpoints/step_1000.pt",
        "files/checkpoints",
    ):
        Path(name).parent.mkdir(parents=True)
        Path(name).touch()
        file = Path(name.split("/")[0], "config.yaml")
        shutil.copy("runs/a/config.yaml", file)
        assert means(file) == ("runs/a", "")
    Path("others/checkpoints/step_0000004").mkdir()  # a user's file beside a run's
    assert means("others/config.yaml")[0] == "others"


def test_files_that_are_no_runs_own_and_folders_that_are_typed(runs):
    folder, said = means("runs/a/config.yaml", "run=runs/c")
    assert folder == "runs/c" and "runs/a/config.yaml is of the run in runs/a" in said
    assert means("runs/a/config.yaml", "run=./runs/a") == ("./runs/a", "")
    assert load_config("runs/a/config.yaml", ["run=d"], run=Path("runs/e")).run == "runs/e"
    for name in ("recipe.yaml", "recipes/config.yaml"):  # nothing of a run is beside them
        Path(name).parent.mkdir(exist_ok=True)
        shutil.copy("runs/a/config.yaml", name)
        assert means(name) == ("runs/a", "")
    Path("runs/a/recipe.yaml").write_text(json.dumps(TREE | {"run": "runs/x"}))
    assert means("runs/a/recipe.yaml") == ("runs/x", "")
    without = {key: value for key, value in TREE.items() if key != "run"}
    Path("runs/a/config.yaml").write_text(json.dumps(without))
    assert means("runs/a/config.yaml") == ("runs/a", "")
    shutil.move("runs/a", "~nobody")  # a folder of that name is no home
    assert means(runs / "~nobody/config.yaml")[0] == str(runs / "~nobody")
    assert load_run_config(Path("~nobody")).run == "./~nobody"


# metrics.jsonl ------------------------------------------------------------------------------------

FOREIGN = (
    b"[1, 2]", b"null", b'{"step": "x"}', b'{"step": 1e999}', b'{"step": 3.5}', b'{"step": -1}',
    b'{"step": true, "loss": 1}', b'{"step": 1' + 30 * b"0" + b"}", b"\xff\xfe", b"\0\0\0",
    b'{"step": 2, "loss": "x"}', b'{"step": 2, "loss": {"a": 1}}', b'{"loss": 1}', b'"step"',
    b'{"step": 2, "loss": 1' + 600 * b"0" + b"}", b'{"step": 2, "step": 2}', 100000 * b"[",
    b'{"step": 3, "loss": 7}', b'{"step": 4, "lo',
)  # fmt: skip


def telemetry(run: Path, start_step: int, **training: object) -> Telemetry:
    tree = TREE | {
        "run": str(run),
        "training": TREE["training"] | {"tensorboard": False} | training,
    }
    return Telemetry(run, config_from_dict(tree), start_step=start_step, active=True)


def test_foreign_lines_are_set_aside_and_undone_steps_go(tmp_path, capsys):
    ours = [b'{"step": 1, "loss": 1}', b'{"step": 2, "loss": null, "seconds": 8}', b'{"step": 2, '
            b'"fid": 5}', b'{"step": 3, "loss": 3}']  # fmt: skip
    undone = b'{"step": 5, "loss": 5}'
    mixed = [undone, *ours[:2], *FOREIGN[:-1], ours[3], ours[2], FOREIGN[-1]]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(mixed))
    with telemetry(tmp_path, 3) as run:
        assert path.read_bytes() == b"".join(line + b"\n" for line in ours)
        assert [line["step"] for line in run.history()] == [1, 2, 3]
        assert run.history()[1]["fid"] == 5 and run.history()[1]["loss"] != 0
    said = capsys.readouterr().out
    assert f"warning: {path}: {len(FOREIGN)} lines that no run wrote, or twice" in said
    assert said.count("\n") == 1
    aside = (tmp_path / "metrics.jsonl.dropped").read_bytes()
    assert sorted(aside.splitlines()) == sorted(FOREIGN)
    before = path.stat()
    with telemetry(tmp_path, 3):
        assert capsys.readouterr().out == ""
    assert path.stat().st_ino == before.st_ino  # what is whole is not written again


def test_a_run_draws_while_it_trains_and_says_how_far_it_is(world, tmp_path, monkeypatch):
    """The curves with every grid, and at the end; a picture that fails is a warning."""
    drawn = []

    def save(lines, path):
        drawn.append(len(lines))
        if len(drawn) == 2:
            raise ValueError("no mood")
        save_curves(lines, path)

    monkeypatch.setattr(training_run, "save_curves", save)
    monkeypatch.setattr(training_telemetry, "QUIET", 0.0)
    said = command_line.run(
        "train", ROOT / "configs/quickstart.yaml", f"run={tmp_path}", *SMALL, "training.steps=3",
        "training.sample_every=1", "training.checkpoint_every=0",
    )  # fmt: skip
    assert drawn == [1, 2, 3]
    assert f"warning: {tmp_path}/curves.png: left out (ValueError: no mood)" in said
    for step in (1, 2, 3):
        assert f"step {step}: drawing samples, 2 of 4 · ETA 0.0 min" in said
    assert "4 of 4" not in said  # nothing is left to wait for


def test_a_bar_counts_what_is_done_beside_the_steps(tmp_path):
    with telemetry(tmp_path, 0) as run:
        out = io.StringIO()
        run.console = Terminal(file=out, force_terminal=True, width=200)
        run.start(1)
        with run.counting("drawing", 8) as advance:
            advance(2.5)
            run._bar._progress.refresh()
            assert "drawing, 2 of 8" in out.getvalue()
            advance(7)  # more ranks than images
            run._bar._progress.refresh()
            assert "drawing, 8 of 8" in out.getvalue()
        run._bar._progress.refresh()
        assert "training" in out.getvalue().rpartition("drawing, 8 of 8")[2]


def test_metrics_that_cannot_be_read_or_written(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DataError, match=r"metrics\.jsonl: cannot be read \(Is a directory\)"):
        telemetry(tmp_path, 0)
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "environment.json").mkdir()
    with pytest.raises(ConfigError, match=f"{tmp_path}: cannot be written"):
        telemetry(tmp_path, 0)
    (tmp_path / "environment.json").rmdir()
    with telemetry(tmp_path, 0) as run:
        (tmp_path / "metrics.jsonl").mkdir()
        assert run.history() == []
    assert capsys.readouterr().out.count("warning: ") == 1
    assert read_metrics(tmp_path / "none").by_step() == []


def test_wandb_knows_a_run_by_its_folder(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(
        init=lambda **how: begun.append(how["id"]) or types.SimpleNamespace(finish=lambda: None)
    ))  # fmt: skip

    def key(folder: str) -> str:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        with telemetry(tmp_path / folder, 0, wandb="project"):
            return begun[-1]

    first = key("a/base")
    assert re.fullmatch(r"base-[0-9a-f]{8}", first)
    assert key("b/base") != first and key("a/base") == first
    shutil.move(tmp_path / "a/base", tmp_path / "moved")
    assert key("moved") == first
    shutil.copytree(tmp_path / "moved", tmp_path / "copy")
    assert key("copy") not in (first, "copy") and key("moved") == first
    for name in ("offline-run-20250101_000000-old", "run-20260101_000000-my-run"):
        (tmp_path / "renamed/wandb" / name).mkdir(parents=True)
    assert key("renamed") == key("renamed") == "my-run"


def test_trackio_has_numbers_and_grids_of_every_part_of_a_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))  # before its first import
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    run = tmp_path / "base"
    run.mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "grid.png")
    for step in (1, 2):
        with telemetry(run, step - 1, trackio="a project") as voice:
            voice.log(METRICS | {"step": step, "loss": 1.0 / step})
            voice.picture("samples", tmp_path / "grid.png", step)
    said = capfd.readouterr().out
    assert said.count("trackio") == 4 and "trackio: trackio show --project 'a project'" in said
    key = json.loads((run / "trackio.json").read_text())["id"]
    assert SQLiteStorage.get_runs("a project") == [key] and key.startswith("base-")
    logs = [line for line in SQLiteStorage.get_logs("a project", key) if "loss" in line]
    assert [(line["step"], line["loss"]) for line in logs] == [(1, 1.0), (2, 0.5)]
    assert len(list((tmp_path / "kept/media").rglob("*.png"))) == 2
    monkeypatch.setattr(trackio, "init", lambda **how: 1 / 0)
    with telemetry(run, 2, trackio="a project") as voice:
        voice.log(METRICS | {"step": 3, "loss": 0.25})
    said = capfd.readouterr().out
    assert said.count("warning: trackio: left out (ZeroDivisionError") == 1
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(FastrepaError, match=r"pip install 'fastrepa\[trackio\]'"):
        telemetry(run, 3, trackio="a project")


# What cannot be written ---------------------------------------------------------------------------


def test_a_run_folder_is_held_for_one_process(tmp_path):
    words = f"{tmp_path}: in use by fastrepa train on {HOST}, process {os.getpid()}, since "
    with ExitStack() as held:
        hold(tmp_path, held)
        with pytest.raises(CheckpointError, match=re.escape(words)):
            hold(tmp_path, held)
    with ExitStack() as held:
        hold(tmp_path, held)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(
        CheckpointError, match=r"file/run: the run folder is not writable \(Not a d"
    ):
        hold(tmp_path / "file/run", held)


def test_a_log_without_room_is_told_once(tmp_path, capsys, monkeypatch):
    log = RankLog(tmp_path, World())
    full, another = Path("/dev/full").open("w", buffering=1), logging.getLogger("another")  # noqa: SIM115
    monkeypatch.setattr(log._handler, "stream", full)
    another.addHandler(broken := logging.StreamHandler(full))
    for _ in range(9):
        logging.getLogger("fastrepa").warning("x")
        another.warning("x")
    another.removeHandler(broken)
    log.stacks("why")
    log.close()
    said = capsys.readouterr().err
    assert said == (
        "warning: /dev/full: cannot be written (No space left on device); training goes on\n"
    )


def test_streams_that_take_nothing_end_no_run(tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    before = [os.fdopen(writing, "w"), Path("/dev/full").open("w")]  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", before[0])
    monkeypatch.setattr(sys, "stderr", before[1])
    log = RankLog(tmp_path, World())
    for _ in range(3):
        print("x" * 10000)
        print("x", file=sys.stderr, flush=True)
        sys.stdout.flush()
        warnings.showwarning("old", UserWarning, "x.py", 1)
    log.close()
    assert [sys.stdout, sys.stderr] == before
    for stream in before:
        stream.close()  # as Python does at its end: that, too, is no error now
    said = log.path.read_text()
    assert said.count("stdout: cannot be written (Broken pipe); training goes on") == 1
    assert said.count("stderr: cannot be written (No space left on device); training goes on") == 1
    assert said.count("UserWarning: old") == 3


def test_a_note_of_exit_codes_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(exit_codes.NOTE, str(tmp_path / "codes"))
    assert (exit_codes.for_launcher(75), exit_codes.for_launcher(76)) == (0, 76)
    assert (tmp_path / "codes").read_text() == "75\n76\n"
    for where in ("/dev/full", tmp_path / "none/codes"):
        monkeypatch.setenv(exit_codes.NOTE, str(where))
        assert exit_codes.for_launcher(75) == 75
        assert f"{where} cannot be written" in capsys.readouterr().err


# Swap folders -------------------------------------------------------------------------------------


def zero(nvme: Path):
    return config_from_dict(
        TREE | {"zero": {"stage": 3, "offload": "nvme", "nvme_path": str(nvme)}}
    ).zero


def test_swap_folders_are_of_a_folder_and_a_process(tmp_path, monkeypatch):
    settings, folders = zero(tmp_path / "nvme"), set()
    for here in ("one", "two"):
        (tmp_path / here).mkdir()
        monkeypatch.chdir(tmp_path / here)
        folders |= {offload.swap_folder(settings, run) for run in ("a_b", "a/b", "a")}
    assert len(folders) == 6
    assert offload.swap_folder(settings, str(tmp_path / "two/a")) in folders
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert offload.swap_folder(settings, "a") not in folders


def test_swap_folders_of_dead_processes_go(tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "_check_async_io", lambda: None)
    settings = zero(tmp_path)
    offload.check_offload(settings, "a")
    offload.check_offload(settings, "a")  # as its profile does after its plan
    mine = offload.swap_folder(settings, "a")
    dead, living, young, away, left_away = (
        tmp_path / f"{name}.0123abcd.1@{host}.0123abcd.swap"
        for name, host in (("dead", HOST), ("living", HOST), ("young", HOST), ("x", "far"),
                           ("y", "far"))
    )  # fmt: skip
    others = [tmp_path / name for name in ("runs_base", "x.swap", "a.1@far.swap")]
    for folder in (dead, living, young, away, left_away, *others):
        (folder / "zero_stage_3").mkdir(parents=True)
        (folder / "zero_stage_3/1.swp").touch()
        if folder != young:
            for path in (folder / "zero_stage_3/1.swp", folder / "zero_stage_3", folder):
                os.utime(path, (1e9, 1e9))
    (away / "zero_stage_3/1.swp").write_text("of now")
    (tmp_path / "link.0123abcd.1@far.0123abcd.swap").symlink_to(others[0])
    release = take(living, "fastrepa train")
    os.utime(living, (1e9, 1e9))
    offload.check_offload(settings, "b")
    release()
    assert not dead.exists() and not left_away.exists()
    for folder in (mine, living, young, away, *others, offload.swap_folder(settings, "b")):
        assert folder.is_dir(), folder
    assert not list(tmp_path.glob(".*"))
