"""Owners of folders: who holds one, who is told, what death, forks and file systems do to it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fastrepa.errors import ConfigError, DataError
from fastrepa.runtime import files, ownership
from fastrepa.runtime.files import HOST, aside, sweep, temporary
from fastrepa.runtime.ownership import InUse, owned, take
from fastrepa.runtime.ownership import holder as seen_holder

DEAD = 2**22 + 1  # more than Linux has processes
HOLDER = """
import os, sys, time
from pathlib import Path
from fastrepa.runtime.ownership import owned
with owned(Path(sys.argv[1]), "holder"):
    if sys.argv[2] == "fork":
        read, write = os.pipe()
        if os.fork() == 0:
            os.write(write, b".")
            time.sleep(60)
            os._exit(0)
        os.read(read, 1)  # it has begun, and let go
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder():
    """Start a process that holds a folder."""
    started = []

    def start(folder: Path, how: str = "alone") -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), how],
            stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):  # it and its child have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_one_holds_it_and_the_other_is_told_who(tmp_path, holder):
    folder = tmp_path / "a" / "b"
    process = holder(folder)
    words = rf"b: in use by holder on {re.escape(HOST)}, process {process.pid}, since 20[\d:T+-]+$"
    with pytest.raises(DataError, match=words), owned(folder, "second", DataError):
        pass
    with pytest.raises(InUse, match=words):
        take(folder, "second")
    with owned(folder, "beside it", file="thing"):
        assert sorted(os.listdir(folder)) == [".lock", ".thing.lock"]
    assert os.listdir(folder) == [".lock"]


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_death_releases_it_though_children_live_on(tmp_path, holder, how):
    """A forked child has its parent's descriptors, and may outlive it for long."""
    process = holder(tmp_path, how)
    process.kill()
    process.wait()
    assert (tmp_path / ".lock").read_bytes().startswith(b"holder on ")
    with owned(tmp_path, "next"):
        assert (tmp_path / ".lock").read_bytes().startswith(b"next on ")
    assert not os.listdir(tmp_path)


def test_a_fork_that_unwinds_does_not_release_what_its_parent_holds(tmp_path):
    with owned(tmp_path, "parent"):
        release = take(tmp_path, "parent", "thing")
        child = os.fork()
        if child == 0:
            release()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(InUse, match=r"/thing: in use by parent on"):
            take(tmp_path, "other", "thing")
        release()
    assert not os.listdir(tmp_path)


def test_who_waits_says_so_once_and_goes_on_after_the_others_end(tmp_path, holder):
    process, said = holder(tmp_path), []

    def told(who: str) -> None:
        said.append(who)
        process.terminate()

    with owned(tmp_path, "second", wait=told):
        process.wait()
        assert (tmp_path / ".lock").read_bytes().startswith(b"second on ")
    assert len(said) == 1 and f"process {process.pid}," in said[0]


def test_a_lock_that_is_removed_while_one_waits_for_it_is_not_held(tmp_path, monkeypatch):
    """The old file is locked after its owner removed it: a third may hold the new one by then."""
    flock, first = fcntl.flock, take(tmp_path, "first")

    def late(lock, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        first()  # the owner ends between our open and our lock
        return flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    second = take(tmp_path, "second")
    with pytest.raises(InUse, match="second on"):
        take(tmp_path, "third")
    second()


def test_the_folder_of_an_owner_is_removed_and_made_anew(tmp_path):
    """The lock of who made it anew stays when the first one ends."""
    folder = tmp_path / "out"
    with owned(folder, "first"):
        shutil.rmtree(folder)
        second = take(folder, "second")
    assert (folder / ".lock").read_bytes().startswith(b"second on ")
    second()
    with owned(folder, "third"):
        shutil.rmtree(folder)
    assert not folder.exists()


def test_what_is_not_ours_is_neither_written_nor_removed(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("precious")
    lock = tmp_path / "out" / ".lock"
    lock.parent.mkdir()

    def refused(words: str) -> None:
        with (
            pytest.raises(ConfigError, match=rf"out/\.lock: cannot be written \({words}"),
            owned(lock.parent, "command", ConfigError),
        ):
            pass
        assert lock.exists()

    lock.symlink_to(mine)
    refused("Too many levels of symbolic links")
    assert mine.read_text() == "precious"
    lock.unlink()
    lock.write_text("of another program")
    refused("in the way, and not fastrepa's")
    assert lock.read_text() == "of another program"
    lock.unlink()
    lock.mkdir()
    refused("Is a directory")
    lock.rmdir()
    os.mkfifo(lock)
    refused("in the way, and not fastrepa's")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ESTALE])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, number):
    error = OSError(number, os.strerror(number))

    def failing(*_, **__):
        raise error

    for name in ("open", "pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            with pytest.raises(DataError, match=rf"{tmp_path}.*written \({error.strerror}\)$"):
                owned(tmp_path, "command", DataError).__enter__()
        assert not os.listdir(tmp_path)
    (tmp_path / "file").touch()
    for path, why in (("file", "File exists"), ("file/below", "Not a directory")):
        with pytest.raises(DataError, match=rf"file.*: cannot be written \({why}\)"):
            owned(tmp_path / path, "command", DataError).__enter__()


def test_without_locks_the_file_says_who_holds_it(tmp_path, holder, monkeypatch, capsys):
    process = holder(tmp_path)

    def without(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(ownership.fcntl, "flock", without)
    with pytest.raises(InUse, match=rf"in use by holder on .*, process {process.pid},"):
        take(tmp_path, "second")
    assert not capsys.readouterr().err
    process.kill()
    process.wait()
    with owned(tmp_path, "second"):
        pass
    signed = f"train on elsewhere, process {process.pid}, since 2026-01-01T00:00:00+00:00"
    (tmp_path / ".lock").write_text(signed)
    with owned(tmp_path, "third"):
        said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("no locks (No locks available)" in line for line in said)
    assert said[1].endswith(f"the last to do so was {signed}")


# Temporary names ------------------------------------------------------------------------------


def test_a_temporary_name_is_of_one_process_and_fits():
    path = temporary(Path("folder") / ("é" * 127))
    assert len(os.fsencode(path.name)) <= 255
    assert path.parent == Path("folder")
    assert path.name.endswith(f".{os.getpid()}@{HOST}.tmp")
    assert files.is_temporary(path) and not files.is_temporary(Path(".a.tmp"))


def test_only_what_the_dead_left_half_written_is_swept(tmp_path):
    gone = [f".a.png.{DEAD}@{HOST}.tmp", f".step_0000004.{DEAD}@{HOST}.tmp", ".b.7@elsewhere.tmp"]
    stay = [
        f".a.png.{os.getpid()}@{HOST}.tmp", f".a.png.1@{HOST}.tmp", ".c.7@elsewhere.tmp",
        ".a.tmp", f"a.{DEAD}@{HOST}.tmp", f".a.{DEAD}@{HOST}.tmp.png", ".a@b.tmp", ".x.12@.tmp",
    ]  # fmt: skip
    for name in [*gone, *stay]:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / gone[1]).unlink()
    (tmp_path / gone[1]).mkdir()
    (tmp_path / gone[1] / "ema.safetensors").touch()
    long_ago = time.time() - 2 * 86400
    os.utime(tmp_path / gone[2], (long_ago, long_ago))
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(stay)
    sweep(tmp_path / "none")


def test_a_link_of_a_temporary_name_costs_its_target_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    (tmp_path / f".a.{DEAD}@{HOST}.tmp").symlink_to("folder")
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["folder"] and (tmp_path / "folder" / "kept").exists()


def test_what_fails_half_way_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    failing = aside(path)
    failing.__enter__().write_text("half")
    assert not failing.__exit__(OSError, OSError("full"), None)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_signature_that_a_kill_cut_short_is_in_nobodys_way(tmp_path):
    whole = b"fastrepa train on node7, process 4711, since 2026-01-01T00:00:00+00:00"
    for left in (*(whole[:length] for length in range(len(whole))), bytes(70)):
        (tmp_path / ".lock").write_bytes(left)
        with owned(tmp_path, "fastrepa train"):
            assert (tmp_path / ".lock").read_bytes().startswith(b"fastrepa train on ")
        assert not os.listdir(tmp_path)


def test_who_holds_a_folder_is_seen_without_touching_it(holder, tmp_path):
    assert seen_holder(tmp_path) == seen_holder(tmp_path / "none") == ""
    process = holder(tmp_path)
    before = (tmp_path / ".lock").stat()
    assert seen_holder(tmp_path).startswith(f"holder on {HOST}, process {process.pid}, since ")
    assert (tmp_path / ".lock").stat() == before
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / ".lock").exists()
    assert seen_holder(tmp_path) == ""  # its death released it
    (tmp_path / ".lock").write_text("train on another-host, process 1, since 2026-01-01")
    assert seen_holder(tmp_path).startswith("train on another-host")
    (tmp_path / ".lock").write_text("a file of somebody's")
    assert seen_holder(tmp_path) == ""
