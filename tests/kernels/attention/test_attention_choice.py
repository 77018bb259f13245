"""attention's choice of a backend: its tables, its rules, and packages that are not there."""

import importlib
import itertools
import sys

import pytest
import torch

from fastrepa_kernels import launch
from fastrepa_kernels.attention import BACKENDS, FLASH, MODULES, PRIORITY, backends, choose, order
from fastrepa_kernels.attention import choice as choices

pytestmark = pytest.mark.usefixtures("another_machine")
CPU = torch.device("cpu")
A100, H100, B200, OLD = (8, 0), (9, 0), (10, 0), (7, 5)


@pytest.fixture
def machine(monkeypatch):
    """A GPU of a capability with some packages, on which whatever is tried works."""

    def make(capability, *packages, failing=()):
        choices._refusal.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(
            choices, "load", lambda name: "" if name in packages else "not installed"
        )
        monkeypatch.setattr(
            choices,
            "_trial",
            lambda name, *_: "fails on this device" if name in failing else "",
        )
        return torch.device("cuda", 0)

    return make


ALL = tuple(MODULES)


@pytest.mark.parametrize(
    ("capability", "packages", "dtype", "dim", "expected"),
    [
        (A100, ALL, torch.bfloat16, 64, "flash-attn-2"),
        (A100, ALL, torch.bfloat16, 72, "flash-attn-2"),
        (A100, (), torch.bfloat16, 72, "sdpa-flash"),
        (A100, ("xformers",), torch.float32, 72, "xformers"),
        (A100, (), torch.float32, 72, "sdpa-efficient"),
        ((8, 9), ("flash-attn-3", "flash-attn-4"), torch.float16, 64, "sdpa-flash"),
        (H100, ALL, torch.bfloat16, 64, "flash-attn-3"),
        (H100, ALL, torch.bfloat16, 72, "sdpa-cudnn"),
        (H100, ("flash-attn-2",), torch.bfloat16, 64, "sdpa-cudnn"),
        (H100, ("flash-attn-3",), torch.bfloat16, 256, "flash-attn-3"),
        (B200, ALL, torch.bfloat16, 72, "flash-attn-4"),
        (B200, ("flash-attn-3",), torch.bfloat16, 64, "sdpa-cudnn"),
        (B200, ("flash-attn-2",), torch.bfloat16, 256, "flash-attn-2"),
        ((12, 0), ("flash-attn-4",), torch.bfloat16, 64, "sdpa-flash"),
        (OLD, ALL[:3], torch.float16, 64, "sdpa-efficient"),
        (H100, ALL, torch.float64, 64, "math"),
        (H100, (), torch.bfloat16, 60, "math"),
    ],
)
def test_first_of_the_table_that_can_run(machine, capability, packages, dtype, dim, expected):
    choice = choose(machine(capability, *packages), dtype, dim)
    assert choice.backend == expected
    tried = order(torch.device("cuda", 0), dtype, dim)
    passed = [name for name, _ in choice.passed_over]
    assert [*passed, expected] == list(tried[: len(passed) + 1])
    assert all(why for _, why in choice.passed_over)


def test_tables_are_complete():
    for built, padded in PRIORITY.values():
        for names in (built, padded):
            assert names[-1] == "math"
            assert len(set(names)) == len(names)
            assert set(names) <= set(BACKENDS)
            flash = [name in FLASH for name in names]
            assert flash == sorted(flash, reverse=True)  # nothing less before any of FLASH
    assert set(PRIORITY) == set(launch.GENERATIONS)
    on_gpus = set(itertools.chain(*itertools.chain(*PRIORITY.values())))
    assert on_gpus == set(BACKENDS) - {"math-chunked", "sdpa"}


def test_deterministic_runs_leave_out_what_is_not(machine):
    device = machine(H100)
    assert choose(device, torch.bfloat16, 72).backend == "sdpa-cudnn"
    assert choose(device, torch.bfloat16, 72, deterministic=True).backend == "sdpa-flash"
    with pytest.raises(ValueError, match="'sdpa-cudnn' cannot run here: its backward is not det"):
        choose(device, torch.bfloat16, 72, backend="sdpa-cudnn", deterministic=True)


def test_what_fails_its_trial_is_passed_over_with_the_reason(machine):
    device = machine(B200, *ALL, failing=("flash-attn-4", "sdpa-cudnn"))
    choice = choose(device, torch.bfloat16, 64)
    assert choice.backend == "flash-attn-2"
    assert choice.passed_over == (
        ("flash-attn-4", "fails on this device"), ("sdpa-cudnn", "fails on this device"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="backend: 'flash-attn-4' cannot run here: fails on this"):
        choose(device, torch.bfloat16, 64, backend="flash-attn-4")


def test_flash_required_is_flash_or_an_error(machine):
    device = machine(H100, "xformers")
    for dtype, dim in itertools.product((torch.float16, torch.bfloat16), (64, 72, 128)):
        assert choose(device, dtype, dim, require="flash").backend in FLASH
    words = r"require: 'flash', but nothing of it runs here \(.*sdpa-flash: does not take float32"
    with pytest.raises(ValueError, match=words):
        choose(device, torch.float32, 64, require="flash")
    with pytest.raises(ValueError, match="require: 'flash' does not allow backend 'xformers'"):
        choose(device, torch.bfloat16, 64, backend="xformers", require="flash")
    assert choose(CPU, torch.float32, 64, require="flash").backend == "sdpa-flash"
    with pytest.raises(ValueError, match="require: 'flash', but nothing of it runs here"):
        choose(CPU, torch.float64, 64, require="flash")


def test_the_real_choice_on_a_cpu():
    for dtype, expected in (
        (torch.float32, "sdpa-flash"), (torch.bfloat16, "math-chunked"),
        (torch.float16, "math-chunked"), (torch.float64, "math"),
    ):  # fmt: skip
        assert choose(CPU, dtype, 72).backend == expected
    assert choose(CPU, torch.bfloat16, 72, require="flash").backend == "sdpa-flash"
    assert choose(torch.device("meta"), torch.float32, 72).backend == "math"
    for name in ("flash-attn-2", "sdpa-cudnn", "sdpa-efficient", "xformers"):
        with pytest.raises(ValueError, match=f"'{name}' cannot run here: needs a GPU, not cpu"):
            choose(CPU, torch.float32, 64, backend=name)


def test_packages_that_are_absent_or_do_not_load(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert backends.load("flash-attn-3") == "not installed"
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "flash_attn").mkdir()  # as flash-attn-4 alone leaves it

    def imported(name, file, text):
        (tmp_path / file).write_text(text)
        importlib.invalidate_caches()
        return backends.load(name)

    assert imported("flash-attn-2", "other.py", "") == "not installed"
    needs = "import flash_attn_2_cuda"
    why = imported("flash-attn-2", "flash_attn/flash_attn_interface.py", needs)
    assert why == "flash_attn_2_cuda is missing"
    why = imported("flash-attn-3", "flash_attn_interface.py", "raise OSError('libcudart.so.11.0')")
    assert why == "does not load (OSError: libcudart.so.11.0)"
    sys.modules.pop("flash_attn", None)
