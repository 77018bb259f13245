"""The doctor really tries, tells why not and what would help, and survives whatever is broken."""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
import resource
import socket
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from rich.console import Console

from fastrepa.commands.doctor import examine, machine, probes, recipes
from fastrepa.commands.doctor.examine import doctor, print_doctor, print_findings, to_json
from fastrepa.commands.doctor.findings import SECTIONS, Finding
from fastrepa.commands.doctor.probes import PROBES
from tests.runs import command, environment

WITHOUT_GPU = not torch.cuda.is_available()


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    """Return what the command says to programs: a process, which starts one for every probe."""
    done = subprocess.run(
        command("doctor", "--json", cold=True), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [Finding(**finding) for finding in json.loads(done.stdout)["findings"]]


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {f"{f.section}: {f.name}": f for f in findings}


# This machine ------------------------------------------------------------------------------------


def test_findings_are_complete_and_in_order(findings):
    order = [SECTIONS.index(f.section) for f in findings]
    assert order == sorted(order)
    assert len({(f.section, f.name) for f in findings}) == len(findings)
    assert all(f.status in ("ok", "off", "broken", "note") for f in findings)
    assert all(f.detail for f in findings)
    for f in findings:
        if f.section == "fast paths" and f.status in ("off", "broken"):
            assert f.remedy, f
    named = {f.name for f in findings if f.section == "fast paths"}
    assert named >= {p.name for key, p in PROBES.items() if key != "torch"}
    assert named >= {"attention", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient"}


def test_versions_and_devices_are_true(findings):
    found = by_name(findings)
    assert found["versions: torch"].detail == importlib.metadata.version("torch")
    assert found["versions: cuda (of torch)"].detail == (torch.version.cuda or "none")
    assert "cores" in found["devices: cpu"].detail
    if WITHOUT_GPU:
        assert found["devices: gpu"].status == "off"
    else:
        assert torch.cuda.get_device_name(0) in found["devices: cuda:0"].detail


@pytest.mark.parametrize(
    ("name", "distribution"),
    [
        ("DALI decode on the CPU", "nvidia-dali-cuda130"),
        ("DALI wheel fits torch", "nvidia-dali-cuda130"),
        ("DeepSpeed", "deepspeed"),
        ("Triton interpreter", "triton"),
        ("sdpa-flash", "torch"),
        ("attention", "torch"),
        ("diffusers (codec sd-vae)", "diffusers"),
    ],
)
def test_what_is_installed_here_works(findings, name, distribution):
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed")
    finding = by_name(findings)[f"fast paths: {name}"]
    assert finding.status == "ok", finding


@pytest.mark.skipif(not WITHOUT_GPU, reason="a GPU is here")
@pytest.mark.parametrize(
    "name", ["Triton kernels on the GPU", "sdpa-cudnn", "DALI decode on the GPU (mixed)"]
)
def test_without_a_gpu_its_paths_are_off_and_ask_for_one(findings, name):
    finding = by_name(findings)[f"fast paths: {name}"]
    assert finding.status == "off", finding
    assert "GPU" in finding.remedy


@pytest.mark.gpu
def test_with_a_gpu_its_paths_work(findings):
    found = by_name(findings)
    for name in ("Triton kernels on the GPU", "sdpa-flash", "sdpa-efficient"):
        assert found[f"fast paths: {name}"].status == "ok", found[f"fast paths: {name}"]


# Packages that are absent or broken --------------------------------------------------------------


def fake_package(folder, monkeypatch, name: str, **files: str) -> None:
    """A package ahead of all others, in this process and in the probes'."""
    package = folder / name
    package.mkdir()
    for stem, text in files.items():
        (package / f"{stem}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize(
    ("text", "timeout", "detail", "remedy"),
    [
        (
            "raise ImportError('libtorch.so: undefined symbol: _ZN3c10')",
            60,
            "ImportError: libtorch.so: undefined symbol: _ZN3c10",
            "pip install --force-reinstall --no-deps xformers",
        ),
        (
            "import no_such_module_anywhere",
            60,
            "ModuleNotFoundError: No module named 'no_such_module_anywhere'",
            "pip install xformers, with its dependencies (no_such_module_anywhere is missing)",
        ),
        ("import os; os.abort()", 60, "died of SIGABRT", "--force-reinstall"),
        ("import ctypes; ctypes.string_at(0)", 60, "died of SIGSEGV", "--force-reinstall"),
        ("raise SystemExit(3)", 60, "ended with code 3", "--force-reinstall"),
        ("import time; time.sleep(600)", 3, "gave no answer within 3 s", "--force-reinstall"),
    ],
    ids=["import-error", "dependency", "abort", "segfault", "exit", "hang"],
)
def test_a_broken_package_is_a_finding(tmp_path, monkeypatch, text, timeout, detail, remedy):
    fake_package(tmp_path, monkeypatch, "xformers", __init__=text)
    found = by_name(doctor(probes=["xformers"], timeout=timeout))["fast paths: xformers"]
    assert found.status == "broken"
    assert found.detail.startswith(detail)
    assert remedy in found.remedy


def test_a_package_whose_library_does_not_load_is_broken_though_it_imports(tmp_path, monkeypatch):
    fake_package(
        tmp_path,
        monkeypatch,
        "xformers",
        __init__="__version__ = '9'\nprint('noise on stdout')",
        _cpp_lib="_cpp_library_load_exception = OSError('built for torch 1.0')",
    )
    # Whoever prints, or lies in the working folder, is not in the way.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "json.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = by_name(doctor(probes=["xformers"]))["fast paths: xformers"]
    assert found.status == "broken"
    assert "do not load on torch" in found.detail
    assert "built for torch 1.0" in found.detail


def test_a_kernel_with_wrong_numbers_is_broken(tmp_path, monkeypatch):
    """The probe compares: a kernel that merely runs is not enough."""
    fake_package(
        tmp_path,
        monkeypatch,
        "fastrepa_kernels",
        __init__="",
        launch="from contextlib import nullcontext as backend",
        adaln="def layernorm_modulate_reference(x, shift, scale): return x\n"
        "def layernorm_modulate(x, shift, scale): return x + 1e-3",
    )
    found = by_name(doctor(probes=["interpreter"]))["fast paths: Triton interpreter"]
    assert found.status == "broken"
    assert re.search(r"off by 1\.\de-03|off by 9\.\de-04", found.detail)


def test_nothing_installed_at_all(monkeypatch):
    monkeypatch.setattr(examine, "_installed", lambda name: False)
    monkeypatch.setattr(machine, "version_of", lambda name: None)
    findings = doctor()
    paths = [f for f in findings if f.section == "fast paths"]
    assert len(paths) == len(PROBES)
    assert all(f.status == "off" and f.remedy.startswith("pip install") for f in paths)
    versions = [f for f in findings if f.section == "versions" and f.status == "off"]
    assert all("pip install" in f.remedy for f in versions)
    assert len(versions) >= 15
    console = Console(file=io.StringIO(), width=100)
    print_findings(findings, console)
    assert f"0 of {len(PROBES)} fast paths work here" in console.file.getvalue()


def test_presence_is_looked_up_without_importing_anything(tmp_path, monkeypatch):
    fake_package(tmp_path, monkeypatch, "fragile_package", __init__="raise SystemExit", sub="")
    assert examine._installed("fragile_package")
    assert examine._installed("fragile_package.sub")
    assert not examine._installed("fragile_package.other")
    assert not examine._installed("no_such_package.sub")
    assert "fragile_package" not in sys.modules


# Rules that need another machine -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "wheels", "status", "remedy"),
    [
        ("13.0", {"nvidia-dali-cuda130"}, "ok", ""),
        ("12.8", {"nvidia-dali-cuda120"}, "ok", ""),
        ("12.8", {"nvidia-dali-cuda130"}, "broken", "pip install 'fastrepa[train-cuda12]'"),
        ("13.2", {"nvidia-dali-cuda120"}, "broken", "pip install 'fastrepa[train]'"),
        (
            "13.2",
            {"nvidia-dali-cuda120", "nvidia-dali-cuda130"},
            "broken",
            "pip uninstall nvidia-dali-cuda120",
        ),
    ],
)
def test_the_dali_wheel_must_fit_the_cuda_of_torch(monkeypatch, cuda, wheels, status, remedy):
    monkeypatch.setattr(probes, "version_of", lambda name: "2.0" if name in wheels else None)
    (finding,) = probes._dali_wheel(cuda)
    assert finding.status == status
    assert remedy in finding.remedy
    assert probes._dali_wheel(None) == []


def test_system_limits(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage(64 << 20, 0, 64 << 20))
    found = by_name(machine.system())
    assert found["system: open files"].status == "note"
    assert "ulimit -n" in found["system: open files"].remedy
    assert found["system: /dev/shm"].status == "note"
    assert "0.1 GiB" in found["system: /dev/shm"].detail
    assert "--shm-size" in found["system: /dev/shm"].remedy

    unlimited = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda _: (unlimited, unlimited))

    def gone(path: str) -> None:
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(machine.shutil, "disk_usage", gone)
    found = by_name(machine.system())
    assert found["system: open files"].status == "ok"
    assert "unlimited" in found["system: open files"].detail
    assert found["system: /dev/shm"].status == "broken"
    assert found["system: disk"].status == "broken"


def test_load_and_room(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    for share, free, status in ((None, 400e9, "ok"), (0.1, 400e9, "ok"), (0.6, 3e9, "note")):
        monkeypatch.setattr(machine, "others", lambda share=share: share)
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _, free=free: usage(0, 0, free))
        assert machine.load().status == machine.disk().status == status
    assert "2 cores to use; others take 60%" in machine.load().detail
    assert "2.8 GiB free" in machine.disk().detail


def test_the_hub(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"https://127.0.0.1:{server.getsockname()[1]}")
        assert machine.hub().status == "ok"
        assert machine.hub().detail.endswith("answers")
    assert machine.hub().status == "note"
    assert "does not answer: Connection refused" in machine.hub().detail
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example.org:3128")
    assert "behind a proxy" in machine.hub().detail
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert machine.hub().status == "off"


def test_what_runs_now(findings, monkeypatch):
    """The recipes, each with what it lacks, and the extras."""
    found = by_name(findings)
    assert found["runs now: quickstart"].status == "ok"
    large = found["runs now: imagenet256_sit_xl2_dinov2b"]
    assert large.status == "off"
    assert "data/imagenet256 (its file says how it is made)" in large.remedy
    words = re.findall(r"[\w-]+", found["runs now: extras"].detail)
    assert {"train", "quickstart", "vae"} <= set(words)
    monkeypatch.setattr(recipes, "version_of", lambda name: None if name == "diffusers" else "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lacks = {f.name: f.remedy for f in recipes.what_runs()}
    assert lacks["quickstart"] == ""
    assert "fastrepa[vae] (pip install 'fastrepa[vae]')" in lacks["imagenet256_sit_b2_dinov2b"]
    assert "sd-vae-ft-mse (HF_HUB_OFFLINE is set)" in lacks["imagenet256_sit_b2_dinov2b"]


@pytest.mark.parametrize("dali", ["nvidia-dali-cuda120", "nvidia-dali-cuda130"])
def test_either_of_dalis_wheels_is_enough(monkeypatch, dali):
    monkeypatch.setattr(
        recipes, "version_of", lambda name: "1" if name == dali or "dali" not in name else None
    )
    assert not recipes.lacks("train")


def test_the_compiler_and_ninja(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = machine.compiler()
    assert finding.status == "broken"
    assert "no-such-compiler is not on PATH" in finding.detail
    assert "apt-get install g++" in finding.remedy
    assert "ninja is not on PATH" in finding.detail
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").touch()
    assert "pip install ninja" in machine.compiler().remedy
    for name in ("no-such-compiler", "ninja"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    assert "is not on PATH" not in machine.compiler().detail


# Output ------------------------------------------------------------------------------------------


def test_json_for_programs(monkeypatch):
    some = [Finding("system", "a", "ok", "ünï [bold]"), Finding("devices", "b", "off", "x", "y")]
    monkeypatch.setattr(examine, "doctor", lambda: some)
    console = Console(file=io.StringIO(), width=20)
    print_doctor(as_json=True, console=console)
    read = json.loads(console.file.getvalue())
    assert [Finding(**f) for f in read["findings"]] == some
    assert json.loads(to_json([])) == {"findings": []}


@pytest.mark.parametrize("width", [60, 160])
def test_table_for_people(width):
    some = [
        Finding("versions", "torch", "ok", "2.15.0"),
        Finding("fast paths", "DALI", "broken", "gone [/red] wrong", "pip install 'x[y]'"),
        Finding("fast paths", "SDPA flash", "ok", "head dim 64"),
        Finding("fast paths", "xformers", "off", "not installed", "pip install it"),
        Finding("runs now", "quickstart", "ok", "here"),
    ]
    console = Console(file=io.StringIO(), width=width)
    print_findings(some, console)
    text = console.file.getvalue()
    for part in ("✓  torch", "✗  DALI", "gone [/red] wrong", "→ pip install 'x[y]'", "–  xformers"):
        assert part in text
    assert "devices" not in text
    assert "1 of 3 fast paths work here; broken: DALI;" in text
    assert "fastrepa train quickstart runs now" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= width
