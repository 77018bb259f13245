"""Mutated weights and checkpoints: read, or refused in a line that names the file."""

import io
import zipfile

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrepa.checkpoint.format import (
    RunState,
    StoredTensors,
    damage,
    part_name,
    read_state,
    seal,
)
from fastrepa.checkpoint.host_tensors import write_durably
from fastrepa.checkpoint.kinds import KINDS
from fastrepa.errors import CheckpointError, WeightsError
from fastrepa.model.conversion import load_reference
from fastrepa.reading.tensors import SafeTensors
from fastrepa.vision.weights import read_checkpoint
from tests.reading.refusals import one_line


def _bytes_of(save):
    held = io.BytesIO()
    save(held)
    return held.getvalue()


SMALLEST = {"model": {"a": torch.arange(6.0).view(2, 3)}, "ema": {"a": torch.ones(2, 3)},
            "steps": 3, "opt": {"param_groups": [{"params": [0]}], "state": {0: {"step":
            torch.tensor(2.0), "exp_avg": torch.ones(2, 3), "exp_avg_sq": torch.ones(2, 3)}}},
}  # fmt: skip
ZIPPED = _bytes_of(lambda held: torch.save(SMALLEST, held))
LEGACY = _bytes_of(lambda held: torch.save(SMALLEST, held, _use_new_zipfile_serialization=False))
SAFE = safetensors.torch.save({"a": torch.arange(6.0), "b": torch.ones(2, 2)}, {"format": "pt"})
with zipfile.ZipFile(io.BytesIO(ZIPPED)) as opened:
    PICKLE = next(opened.read(n) for n in opened.namelist() if n.endswith("data.pkl"))
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["set", "flip", "cut", "drop", "add"]),
              st.integers(0, 255)), min_size=1, max_size=4,
)  # fmt: skip


def mutated(data, edits):
    data = bytearray(data)
    for where, how, value in edits:
        at = int(where * max(0, len(data) - 1))
        if how == "set":
            data[at : at + 1] = bytes([value])
        elif how == "flip":
            data[at : at + 1] = bytes(b ^ (1 << value % 8) for b in data[at : at + 1])
        elif how == "cut":
            del data[at:]
        elif how == "drop":
            del data[at : at + value % 9 + 1]
        else:
            data[at:at] = bytes([value]) * (value % 5 + 1)
    return bytes(data)


def repacked(pickle):
    """The small torch file with another pickle in it, its checksums being right."""
    held = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(ZIPPED)) as before, zipfile.ZipFile(held, "w") as after:
        for entry in before.infolist():
            data = pickle if entry.filename.endswith("data.pkl") else before.read(entry)
            after.writestr(entry.filename, data)
    return held.getvalue()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def readers(path):
    for read, kind in ((load_reference, CheckpointError), (read_checkpoint, WeightsError)):
        try:
            found = read(path)
        except kind as error:
            one_line(error, path)
        else:
            assert found is not None


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(edits=EDITS, source=st.sampled_from(["zip", "pickle", "legacy"]))
def test_any_torch_file_is_read_or_refused(scratch, edits, source):
    path = scratch / "a.pt"
    whole = {"zip": ZIPPED, "pickle": PICKLE, "legacy": LEGACY}[source]
    data = mutated(whole, edits)
    path.write_bytes(repacked(data) if source == "pickle" else data)
    readers(path)


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(edits=EDITS)
def test_any_safetensors_file_is_read_or_refused(scratch, edits):
    path = scratch / "a.safetensors"
    path.write_bytes(mutated(SAFE, edits))
    try:
        load_reference(path)
        opened = SafeTensors(path, CheckpointError)
        assert all(isinstance(value, torch.Tensor) for value in opened.values())
    except CheckpointError as error:
        one_line(error, path)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(edits=EDITS, name=st.sampled_from(["manifest.json", "state.json", "ema.safetensors"]))
def test_any_checkpoint_is_whole_or_damaged(scratch, edits, name):
    folder = scratch / "step_0000002"
    if not folder.exists():
        folder.mkdir()
        state = RunState(step=2, optimizer_step=2, samples_seen=16, side=4, channels=3,
                         encoder_widths=[8], classes=["cat"], world_size=1,
                         emas={"ema": 0.9})  # fmt: skip
        names = [part_name(kind, 0, 1) for kind in KINDS]
        seal(folder, {n: write_durably(folder / n, [SAFE]) for n in names}, state)
    before = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(mutated(before, edits))
        for contents in (True, False):
            problem = damage(folder, contents=contents)
            assert problem is None or "\n" not in problem
            assert problem or name != "state.json" or not contents or (
                (folder / name).read_bytes() == before)  # fmt: skip
        for read in (read_state, lambda path: dict(StoredTensors(path, "ema"))):
            try:
                read(folder)
            except CheckpointError as error:
                one_line(error, folder)
    finally:
        (folder / name).write_bytes(before)
