"""launch: the choice of path, and tables that have a row for every width they promise."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastrepa_kernels import launch
from tests.runs import ROOT, environment


def test_cpu_tensors_take_the_torch_path_unless_forced():
    x = torch.zeros(2)
    assert not launch.use_triton(x)
    with launch.backend("triton"):
        assert launch.use_triton(x)
        assert launch.use_triton(x, launch.WIDEST_ROW)
        assert not launch.use_triton(x, launch.WIDEST_ROW + 1)
        assert not launch.use_triton(x.double())
        with launch.backend("torch"):
            assert not launch.use_triton(x)
        assert launch.use_triton(x)
    assert not launch.use_triton(x)


def test_backend_is_restored_after_an_error():
    with pytest.raises(KeyError), launch.backend("triton"):
        raise KeyError
    assert not launch.use_triton(torch.zeros(2))
    with pytest.raises(ValueError, match="backend: name must be"), launch.backend("cuda"):
        pass


PADDED = {"norm_forward": {1152}}  # faster so, as launch.py says


@pytest.mark.parametrize("family", sorted(launch.ROWS))
def test_every_width_has_a_row(family):
    for width in (1, 72, 512, 513, 1152, launch.WIDEST_ROW):
        row = launch.rows(family, width, torch.device("cpu"))
        assert width <= row.width
        assert all(piece & (piece - 1) == 0 for piece in (row.block_d, row.tail))
    for table in launch.ROWS[family].values():
        assert max(table) == launch.WIDEST_ROW
        padded = {width for width, row in table.items() if width != row.width}
        assert padded <= PADDED.get(family, set())
        assert all(width <= row.width for width, row in table.items())


def test_a_width_takes_the_narrowest_row_that_holds_it():
    for width, held in ((72, 384), (385, 512), (768, 768), (1152, 1152), (1153, 2048)):
        assert launch.rows("norm_backward", width, torch.device("cpu")).width == held


def test_every_generation_has_every_table():
    families = (launch.ROWS, launch.FLAT, launch.GEMM, launch.COLUMNS)
    for table in (table for family in families for table in family.values()):
        assert tuple(table) == launch.GENERATIONS


@pytest.mark.parametrize(
    ("capability", "generation"),
    [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 80)],
)
def test_generation_of_a_device(monkeypatch, capability, generation):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert launch.generation(torch.device("cuda")) == generation


def test_tensors_on_another_device_than_the_current_one_are_refused(monkeypatch):
    class Elsewhere:
        dtype, is_cuda, device = torch.float32, True, torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ValueError, match="tensors are on cuda:1 but the current device is cuda:0"):
        launch.use_triton(Elsewhere())


def test_splits_of_a_reduction_fill_the_device_without_writing_much():
    assert launch.rows_per_split(256, 256) == 64
    assert launch.rows_per_split(32, 256) == 16
    assert launch.rows_per_split(1, 16) == 8
    assert launch.rows_per_split(256, 256, 32) == 32


def test_splits_of_a_reduction_fill_the_last_wave():
    """396 programs at once: 3 splits of 256 samples are 1.94 waves of 86 rows, 4 are 3 of 64."""
    assert launch.rows_per_split(256, 256, 64, slots=396) == 86
    assert launch.rows_per_split(192, 256, 64, slots=396) == 64
    assert launch.rows_per_split(32, 256, 64, slots=396) == 16  # less than a wave: as without
    row = launch.ROWS["norm_backward"][90][1152]
    assert launch.slots(row, torch.device("cpu")) == 0


@pytest.mark.parametrize(
    ("gigabytes", "width", "rows"),
    [(141, 2048, 32768), (80, 2048, 32768), (40, 2048, 16384), (24, 2048, 8192), (8, 2048, 4096),
     (80, 4096, 16384), (80, 32768, 4096)],
)  # fmt: skip
def test_chunk_rows(monkeypatch, gigabytes, width, rows):
    """The same for one device and one configuration, whatever else is in its memory."""
    device = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    assert launch.chunk_rows(torch.device("cuda"), 2 * (4 * width + 768)) == rows
    assert launch.chunk_rows(torch.device("cpu"), 2 * (4 * width + 768)) == 1024


def test_the_cosine_has_programs_for_a_device():
    assert launch.cosine_rows(65536) == launch.cosine_rows(32768) == 16
    assert launch.cosine_rows(16384) == 8
    assert launch.cosine_rows(4096) == launch.cosine_rows(1) == 4


def test_autocast_dtype():
    x = torch.zeros(2)
    assert launch.autocast_dtype(x) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert launch.autocast_dtype(x) == torch.bfloat16


def test_without_triton_every_cpu_path_is_there_and_a_triton_path_is_one_clear_error():
    program = [sys.executable, "-m", "tests.programs.without_triton"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "fastrepa_kernels: Triton is not installed (pip install triton); without it, "
        'fastrepa_kernels.launch.backend("torch") has the torch paths\n'
    )
