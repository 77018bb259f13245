"""Checkpoints: what is written beside training, what is kept, what is read back."""

import dataclasses
import json
import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastrepa.checkpoint import writer as checkpoint_writer
from fastrepa.checkpoint.format import (
    RunState,
    StoredTensors,
    checkpoint_path,
    checkpoints,
    damage,
    improves,
    newest_checkpoint,
    part_name,
    read_state,
    superseded,
)
from fastrepa.checkpoint.fragments import shares
from fastrepa.checkpoint.host_tensors import HostTensors, write_durably
from fastrepa.checkpoint.kinds import KINDS
from fastrepa.checkpoint.writer import CheckpointWriter
from fastrepa.config import KeepBestConfig, TrainingConfig
from fastrepa.errors import CheckpointError
from fastrepa.runtime.files import sha256_of, temporary
from tests.runs import said_by

pytestmark = pytest.mark.ranks

SHAPES = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    max_size=8,
)
METRICS = st.floats(allow_nan=True) | st.none()


def state(step, **metrics):
    return RunState(
        step=step, optimizer_step=step, samples_seen=8 * step, side=32, channels=3,
        encoder_widths=[], classes=["a", "b"], world_size=1, metrics=metrics,
    )  # fmt: skip


def everything(whole):
    return {(k, n): whole.get(n, k).clone() for k in KINDS for n in whole.params}


def test_a_save_holds_its_step_though_training_goes_on(writer, tmp_path):
    whole = writer.whole
    for name in whole.params:
        for number, kind in enumerate(KINDS):
            whole.set(name, kind, torch.randn(whole.get(name, kind).shape) + number)
    before = everything(whole)
    writer.save(state(5))
    for name in whole.params:
        whole.set(name, "weight", torch.zeros_like(whole.get(name, "weight")))
    writer.wait(required=True)
    path = checkpoint_path(tmp_path, 5)
    assert damage(path) is None
    assert newest_checkpoint(tmp_path) == path
    assert read_state(path) == state(5)
    for kind in KINDS:
        stored = StoredTensors(path, kind)
        fixed = {"pos_embed"} if kind in ("weight", "ema") else set()
        assert stored.keys() == whole.params.keys() | fixed
        assert load_file(path / part_name(kind, 0, 1)).keys() == stored.keys()
        for name in whole.params:
            assert torch.equal(stored[name], before[kind, name]), (kind, name)
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert set(listed) == {p.name for p in path.iterdir()} - {"manifest.json"}


def test_polls_between_steps_finish_a_save_and_never_wait_for_it(writer, tmp_path, monkeypatch):
    go, real = threading.Event(), checkpoint_writer.write_durably

    def slow(*args):
        assert go.wait(30)
        return real(*args)

    monkeypatch.setattr(checkpoint_writer, "write_durably", slow)
    writer.save(state(1))
    for _ in range(20):
        writer.poll()  # would hang here, were it to wait
    assert checkpoints(tmp_path) == []
    go.set()
    for _ in range(2000):
        writer.poll()
        if not checkpoints(tmp_path):
            threading.Event().wait(0.005)
    assert checkpoints(tmp_path) == [checkpoint_path(tmp_path, 1)]
    assert {
        "copy",
        "exchange",
        "write",
        "sha256",
        "fsync",
        "finish",
        "save",
    } == writer.seconds.keys()


def test_the_next_save_waits_for_the_one_before_and_old_ones_go(writer, tmp_path):
    for step in (1, 2, 3, 4):
        writer.save(state(step))
    writer.wait(required=True)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_0000003", "step_0000004"]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_failed_save_is_a_warning_and_an_error_only_at_the_end(writer, tmp_path, capsys):
    writer.save(state(1))
    writer.wait(required=True)
    in_the_way = temporary(checkpoint_path(tmp_path, 2))
    in_the_way.write_text("a file where the folder should be")
    writer.save(state(2))
    writer.wait()
    said = capsys.readouterr().out
    assert "warning: " in said
    assert "step_0000002: cannot be written" in said
    assert "step_0000001 still counts" in said
    assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)
    in_the_way.write_text("again")
    writer.save(state(2))
    with pytest.raises(CheckpointError, match=r"step_0000002: cannot be written .*are intact"):
        writer.wait(required=True)
    in_the_way.unlink(missing_ok=True)
    writer.save(state(3))  # the next one is not harmed
    writer.wait(required=True)
    assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 3)


def test_nothing_is_removed_while_the_new_one_reads_back_damaged(
    writer, tmp_path, monkeypatch, capsys
):
    for step in (1, 2):
        writer.save(state(step))
    writer.wait(required=True)
    real = checkpoint_writer.write_durably

    def flips_a_bit(path, *args):
        digest = real(path, *args)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint_writer, "write_durably",
            lambda p, *a: (flips_a_bit if p.name == "ema.safetensors" else real)(p, *a),
        )  # fmt: skip
        writer.save(state(3))
        writer.wait(required=True)
    assert "reads back damaged (ema.safetensors differs" in capsys.readouterr().out
    assert [p.name[-1] for p in checkpoints(tmp_path)] == ["1", "2", "3"]
    with pytest.warns(UserWarning, match="step_0000003 is damaged"):
        assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 2)
    writer.save(state(3))  # takes the damaged one's place
    writer.wait(required=True)
    assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 3)
    assert [p.name[-1] for p in checkpoints(tmp_path)] == ["2", "3"]


def test_three_ranks_save_what_they_hold_in_every_stage(tmp_path):
    # Three: no tensor's size divides by it, so slices are padded and partitions cut tensors.
    said = said_by("tests.programs.saved_fragments", tmp_path, ranks=3)
    assert said.count("stage ") == 4


def test_what_a_killed_process_left_is_cleared_away(engine, tmp_path):
    left = tmp_path / "checkpoints" / ".partial_step_0000009"
    left.mkdir(parents=True)
    (left / "ema-00003-of-00004.safetensors").write_bytes(b"half")
    world, group, whole, fixed = engine
    CheckpointWriter(tmp_path, whole, fixed, world, group, TrainingConfig())
    assert not left.exists()


# Which ones stay ------------------------------------------------------------------------------


def stored(run, step, metric=None):
    """A checkpoint folder with a state and a manifest, and next to nothing else."""
    folder = checkpoint_path(run, step)
    folder.mkdir(parents=True)
    metrics = {} if metric is None else {"fid": metric}
    text = json.dumps(dataclasses.asdict(state(step, **metrics))).encode()
    files = {"state.json": write_durably(folder / "state.json", [text])}
    for kind in KINDS:
        name = part_name(kind, 0, 1)
        files[name] = write_durably(folder / name, HostTensors({}, pin=False).file_chunks())
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


@settings(max_examples=40, deadline=None)
@given(
    found=st.dictionaries(st.integers(1, 40), METRICS, min_size=1, max_size=9),
    keep=st.integers(1, 4), every=st.sampled_from([0, 5, 7]), mode=st.sampled_from(["min", "max"]),
    cut=st.sets(st.integers(1, 40), max_size=4),
)  # fmt: skip
def test_the_policy_keeps_the_newest_the_regular_and_the_best(
    tmp_path_factory, found, keep, every, mode, cut
):
    run = tmp_path_factory.mktemp("run")
    for step, metric in found.items():
        stored(run, step, metric)
    saved = max(found)
    cut = {s for s in found if s in cut and s != saved}
    for step in cut:
        (checkpoint_path(run, step) / "state.json").write_text("{}")
    future = stored(run, 99)
    policy = TrainingConfig(
        keep_checkpoints=keep, keep_every=every, keep_best=KeepBestConfig(metric="fid", mode=mode)
    )
    gone = superseded(run, checkpoint_path(run, saved), policy)
    whole = sorted(set(found) - cut)
    values = {s: found[s] for s in whole if found[s] is not None and math.isfinite(found[s])}
    expected = {saved, *whole[-keep:]} | {s for s in whole if every and s % every == 0}
    if values:
        extreme = (min if mode == "min" else max)(values.values())
        expected.add(max(s for s, v in values.items() if v == extreme))
    assert gone == [checkpoint_path(run, s) for s in sorted(set(found) - expected)]
    assert future.exists()


def test_a_step_is_the_best_so_far_by_what_whole_checkpoints_have(tmp_path):
    lowest, highest = (KeepBestConfig(metric="fid", mode=mode) for mode in ("min", "max"))

    def better(value, rule=lowest, step=6, metric="fid"):
        return improves(tmp_path, step, {metric: value}, rule)

    assert better(7.0) and not better(7.0, metric="loss")  # there is none yet
    for step, value in ((1, 5.0), (2, math.nan), (3, None), (4, 4.0), (5, 3.0), (9, 1.0)):
        stored(tmp_path, step, value)
    (checkpoint_path(tmp_path, 5) / "state.json").write_text("{}")  # cut short
    assert better(3.9) and better(5.1, highest)  # step 9 is of an undone future
    assert not better(4.0) and not better(4.1) and not better(4.9, highest)
    assert not better(0.5, step=9, metric="loss") and not better(1.5, step=9)
    for value in (math.nan, math.inf, -math.inf):
        assert not better(value) and not better(value, highest)


def test_keep_checkpoints_0_keeps_all(tmp_path):
    paths = [stored(tmp_path, step) for step in range(1, 6)]
    assert superseded(tmp_path, paths[-1], TrainingConfig(keep_checkpoints=0)) == []


def test_an_unknown_metric_is_named_with_those_there_are(engine, tmp_path, capsys):
    world, group, whole, fixed = engine
    policy = TrainingConfig(keep_checkpoints=1, keep_best=KeepBestConfig(metric="lossz"))
    writer = CheckpointWriter(tmp_path, whole, fixed, world, group, policy)
    for measured in (False, True):  # an evaluation may come later
        writer.save(state(1, loss=1.0, lr=0.1), measured=measured)
        writer.wait(required=True)
        said = capsys.readouterr().out
        assert ("no metric 'lossz' is logged (known: loss, lr)" in said) == measured


# Files ----------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(shapes=SHAPES)
def test_host_tensors_make_a_safetensors_file(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    host = HostTensors(shapes, pin=False)
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name, value in values.items():
        host.put(name, value)
    seconds = {}
    digest = write_durably(path, host.file_chunks(), seconds)
    read = load_file(path)
    assert read.keys() == values.keys()
    assert all(torch.equal(read[n], v) and read[n].shape == v.shape for n, v in values.items())
    assert digest["bytes"] == path.stat().st_size
    assert digest["sha256"] == sha256_of(path)
    assert {"write", "fsync"} <= seconds.keys()


@settings(max_examples=100, deadline=None)
@given(shapes=SHAPES, size=st.integers(1, 5))
def test_every_tensor_has_one_writer_and_writers_have_like_loads(shapes, size):
    parts = shares(shapes, size)
    assert len(parts) == size
    assert sorted(n for part in parts for n in part) == sorted(shapes)
    count = {name: math.prod(shape) for name, shape in shapes.items()}
    loads = [sum(count[n] for n in part) for part in parts]
    assert max(loads) - min(loads) <= max(count.values(), default=0)


def test_tensors_are_found_in_however_many_files(tmp_path):
    names = [part_name("ema", rank, 3) for rank in range(3)]
    assert names[0] == "ema-00001-of-00003.safetensors"
    assert part_name("ema", 0, 1) == "ema.safetensors"
    for i, name in enumerate(names):
        save_file({f"t{i}": torch.full((2,), float(i))}, tmp_path / name)
    read = StoredTensors(tmp_path, "ema")
    assert {n: float(v[0]) for n, v in read.items()} == {"t0": 0.0, "t1": 1.0, "t2": 2.0}
    save_file({}, tmp_path / part_name("exp_avg_sq", 0, 3))
    with pytest.raises(CheckpointError, match=r"exp_avg\.safetensors is missing"):
        StoredTensors(tmp_path, "exp_avg")  # exp_avg_sq is not taken for it
