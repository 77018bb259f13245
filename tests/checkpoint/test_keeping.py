"""Pruning, saving and reading checkpoints: nothing of others goes, nothing not finite is good."""

import json
import math
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrepa.checkpoint import format as checkpoint_format
from fastrepa.checkpoint import writer as checkpoint_writer
from fastrepa.checkpoint.format import (
    NotFinite,
    check_finite,
    checkpoint_path,
    checkpoints,
    damage,
    newest_checkpoint,
    read_state,
    step_number,
    stranger,
    superseded,
    with_newest,
)
from fastrepa.checkpoint.host_tensors import CHUNK, is_finite
from fastrepa.checkpoint.kinds import KINDS
from fastrepa.checkpoint.writer import CheckpointWriter
from fastrepa.config import KeepBestConfig, TrainingConfig
from fastrepa.errors import CheckpointError
from fastrepa.runtime.files import temporary
from tests.checkpoint.test_checkpoint import state, stored

pytestmark = pytest.mark.ranks


def names(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


# What is deleted --------------------------------------------------------------------------------


def test_steps_are_numbers_and_other_names_do_not_count(tmp_path):
    for step in (9_999_999, 10_000_000, 123_456_789, 5):
        stored(tmp_path, step)
    for name in (
        "step_0000005_best",
        "step_00000005",
        "step_5",
        "step_0000005.old",
        "step_٠٠٠٠٠٠٥",
    ):
        shutil.copytree(checkpoint_path(tmp_path, 5), tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints/step_0000006").write_text("a file")
    found = checkpoints(tmp_path)
    assert [step_number(p) for p in found] == [5, 9_999_999, 10_000_000, 123_456_789]
    assert newest_checkpoint(tmp_path) == found[-1]
    policy = TrainingConfig(keep_checkpoints=1)
    assert superseded(tmp_path, found[2], policy) == found[:2]
    best = TrainingConfig(keep_checkpoints=1, keep_best=KeepBestConfig(metric="fid", mode="min"))
    for step in (9_999_999, 10_000_000):  # equals: the newer one is the best
        shutil.rmtree(checkpoint_path(tmp_path, step))
        stored(tmp_path, step, 1.0)
    assert superseded(tmp_path, found[-1], best) == [found[0], found[1]]


def test_what_may_be_a_users_own_stays_and_is_named_once(writer, tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    ours = stored(tmp_path, 1)
    for step in (2, 3, 5, 6, 7):
        stored(tmp_path, step)
    (folder / "step_0000002/notes.txt").write_text("why this one is kept")
    (folder / "step_0000003/samples").mkdir()
    shutil.copytree(folder / "step_0000001", folder / "step_0000004")  # of another step
    (folder / "step_0000005").rename(tmp_path / "elsewhere")
    (folder / "step_0000005").symlink_to(tmp_path / "elsewhere")
    (folder / "step_0000006/manifest.json").unlink()
    later = json.loads((folder / "step_0000007/state.json").read_text()) | {"format": 3}
    (folder / "step_0000007/state.json").write_text(json.dumps(later))
    for step in (8, 9, 10):
        writer.save(state(step))
    writer.wait(required=True)
    assert names(tmp_path) == [f"step_{s:07d}" for s in (2, 3, 4, 5, 6, 7, 9, 10)]
    assert not ours.exists() and (tmp_path / "elsewhere/manifest.json").exists()
    said = capsys.readouterr().out
    for step, words in {
        2: "notes.txt in it is none of its files", 3: "samples in it is", 4: "is of step 1",
        5: "it is a link", 6: "manifest.json does not say", 7: "of another version",
    }.items():  # fmt: skip
        assert said.count(f"step_{step:07d}: an old checkpoint, not removed (") == 1
        assert words in said


def test_one_that_cannot_be_removed_does_not_stop_the_others(
    writer, tmp_path, monkeypatch, capsys
):  # fmt: skip
    for step in (1, 2, 3):
        stored(tmp_path, step)
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, *how: "0000001" not in str(p) and access(p, *how))
    for step in (4, 5):
        writer.save(state(step))
    writer.wait(required=True)
    assert names(tmp_path) == ["step_0000001", "step_0000004", "step_0000005"]
    said = capsys.readouterr().out
    assert said.count("step_0000001: an old checkpoint, not removed (Permission denied)") == 1
    assert damage(checkpoint_path(tmp_path, 1)) is None


def test_a_pruned_checkpoint_goes_at_once_and_a_kill_leaves_nothing_that_looks_like_one(
    writer, engine, tmp_path, monkeypatch
):  # fmt: skip
    seen = []

    def killed(path, *_, **__):
        seen.append((path, names(tmp_path)))
        (path / "state.json").unlink()
        raise OSError("killed half way")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer.shutil, "rmtree", killed)
        for step in (1, 2, 3):
            writer.save(state(step))
        writer.wait(required=True)
    ((path, there),) = seen
    assert path == temporary(tmp_path / "checkpoints/pruned_step_0000001")
    assert there == [path.name, "step_0000002", "step_0000003"]
    assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 3)
    world, group, whole, fixed = engine
    CheckpointWriter(tmp_path, whole, fixed, world, group, TrainingConfig())
    assert names(tmp_path) == ["step_0000002", "step_0000003"]


def test_who_begins_clears_what_the_dead_left_and_nothing_else(engine, tmp_path):
    folder = tmp_path / "checkpoints"
    mine = temporary(folder / "step_0000007")
    dead = temporary(folder / "step_0000008", by=mine.name.split(".")[2].replace(
        str(os.getpid()), str(2**22 - 3)))  # fmt: skip
    alive = temporary(folder / "step_0000009", by=f"1@{mine.name.split('@')[1][:-4]}")
    others = [folder / n for n in (".partial_mine", ".step_0000001.bak", "step_0000002_best")]
    for path in (mine, dead, alive, *others):
        path.mkdir(parents=True)
        (path / "ema-00003-of-00004.safetensors").write_bytes(b"half")
    world, group, whole, fixed = engine
    CheckpointWriter(tmp_path, whole, fixed, world, group, TrainingConfig())
    assert names(tmp_path) == sorted(p.name for p in (alive, *others))


def test_a_users_folder_in_the_way_of_a_save_is_put_aside(writer, tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    stored(tmp_path, 1)
    shutil.copytree(folder / "step_0000001", folder / "step_0000002")
    (folder / "step_0000002.1").mkdir()
    for step in (2, 3, 3):  # and one of its own is replaced
        writer.save(state(step))
    writer.wait(required=True)
    assert names(tmp_path) == ["step_0000002", "step_0000002.1", "step_0000002.2", "step_0000003"]
    assert read_state(folder / "step_0000002.2").step == 1
    assert (
        "step_0000002: in the way of a checkpoint, is now step_0000002.2" in capsys.readouterr().out
    )


# Not finite -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(0, 9), place=st.integers(0, 8), value=st.sampled_from(
        [math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0, 1e-40]
    ),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float8_e5m2]),
)  # fmt: skip
def test_is_finite_is_isfinite_of_all(size, place, value, dtype):
    values = torch.ones(size, dtype=torch.float32)
    if place < size:
        values[place] = value
    values = values.to(dtype)
    assert is_finite(values) == bool(values.float().isfinite().all())


def test_the_last_value_of_a_large_tensor_is_looked_at():
    values = torch.zeros(CHUNK // 2 + 3)
    assert is_finite(values)
    values[-1] = -math.inf
    assert not is_finite(values)
    assert is_finite(torch.tensor([2**40], dtype=torch.int64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_saved_and_nothing_goes_for_it(
    writer, tmp_path, capsys, kind, value
):  # fmt: skip
    whole, name = writer.whole, "blocks.1.attn.qkv.weight"
    for step in (1, 2):
        writer.save(state(step))
    writer.wait(required=True)
    before = whole.get(name, kind).clone()
    bad = before.clone()
    bad[3, 5] = value
    try:
        whole.set(name, kind, bad)
        for step in (3, 4):
            writer.save(state(step))
        writer.wait()
        said = capsys.readouterr().out
        for step in (3, 4):
            words = (
                f"step_000000{step}: not saved, as {kind} {name} is not finite; training goes on, "
            )
            assert words + "and step_0000002 still counts" in said
        assert writer.good == checkpoint_path(tmp_path, 2)
        writer.save(state(5))
        words = f"step_0000005: not saved, as {kind} {name} is not finite; earlier ones are intact"
        with pytest.raises(CheckpointError, match=f"{words}; the last good one is step_0000002"):
            writer.wait(required=True)
        assert names(tmp_path) == ["step_0000001", "step_0000002"]
    finally:
        whole.set(name, kind, before)
    writer.save(state(6))
    writer.wait(required=True)
    assert names(tmp_path) == ["step_0000002", "step_0000006"]


def test_what_is_saved_while_steps_are_bad_replaces_nothing(writer, tmp_path):
    for step, bad in ((1, 0), (2, 0), (3, 1), (4, 2)):
        writer.save(state(step), torch.tensor(float(bad)))
    writer.wait(required=True)
    assert names(tmp_path) == [f"step_000000{s}" for s in (1, 2, 3, 4)]
    assert writer.good == checkpoint_path(tmp_path, 2)
    writer.save(state(5), torch.tensor(0.0))
    writer.wait(required=True)
    assert names(tmp_path) == ["step_0000004", "step_0000005"]


def test_a_checkpoint_that_is_not_finite_is_passed_over_by_name(tmp_path):
    paths = [stored(tmp_path, step) for step in (1, 2, 3)]
    looked = []

    def read(path):
        looked.append(path)
        if path != paths[0]:
            check_finite(path, "ema", {"a": torch.ones(1), "b": torch.tensor([math.nan])})
        return path

    with pytest.warns(UserWarning, match="step_0000003: ema: b is not") as caught:
        assert with_newest(tmp_path, read) == paths[0]
    assert [str(w.message) for w in caught] == [
        f"checkpoint step_000000{s}: ema: b is not finite; trying the one before" for s in (3, 2)
    ]
    assert looked == paths[::-1]
    for path in paths[:2]:
        shutil.rmtree(path)
    words = "no undamaged checkpoint; step_0000003: ema: b is not finite"
    with pytest.raises(CheckpointError, match=words):
        with_newest(tmp_path, read)
    with pytest.raises(NotFinite):
        check_finite(paths[2], "ema", {"b": torch.tensor([-math.inf])})


def test_who_reads_beside_pruning_takes_the_newest_again(tmp_path, monkeypatch, recwarn):
    stored(tmp_path, 1)
    stored(tmp_path, 2)
    done = []

    def goes_on(path):
        """The run saves the next one and prunes all others, as the newest is being read."""
        done.append(path)
        if len(done) < 4:
            stored(tmp_path, 2 + len(done))
            for old in checkpoints(tmp_path)[:-1]:
                shutil.rmtree(old)
            raise OSError("no such file")
        return path

    assert with_newest(tmp_path, goes_on) == checkpoint_path(tmp_path, 5)
    assert not recwarn.list
    done.clear()
    real = checkpoint_format.damage

    def hashed(path, **how):
        """As it is hashed, rather."""
        if done:
            return real(path, **how)
        done.append(path)
        stored(tmp_path, 9)
        shutil.rmtree(path)
        return real(path, **how)

    monkeypatch.setattr(checkpoint_format, "damage", hashed)
    assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 9)
    assert not recwarn.list
    monkeypatch.setattr(checkpoint_format, "damage", real)

    def always(path):
        shutil.rmtree(path)
        stored(tmp_path, step_number(path) + 1)
        raise CheckpointError("gone")

    with pytest.raises(CheckpointError, match="pruned before it could be read"):
        with_newest(tmp_path, always)
    with pytest.raises(CheckpointError, match=r"no checkpoint yet"):
        with_newest(tmp_path / "none", always)
    assert newest_checkpoint(tmp_path / "none") is None


def test_an_error_that_is_not_of_pruning_is_raised(tmp_path):
    stored(tmp_path, 1)

    def read(path):
        raise CheckpointError("--ema: '0.1' is not stored")

    with pytest.raises(CheckpointError, match="--ema"):
        with_newest(tmp_path, read)


def test_a_folder_of_another_step_is_no_checkpoint(tmp_path):
    path = stored(tmp_path, 4)
    shutil.copytree(path, checkpoint_path(tmp_path, 9))
    with pytest.warns(UserWarning, match=r"step_0000009 is damaged \(state.json is of step 4\)"):
        assert newest_checkpoint(tmp_path) == path
    assert stranger(path) is None
