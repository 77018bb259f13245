"""The doctor's findings that need no import: versions, limits, the C++ toolchain."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import sysconfig
from pathlib import Path

from fastrepa.commands.doctor.findings import Finding, gib, one_line, version_of

OPEN_FILES = 4096
SHARED_MEMORY = 1 << 30

# distribution, the extra of fastrepa that brings it ("" is the base install)
VERSIONS = (
    ("torch", ""),
    ("triton", ""),
    ("torchvision", "train"),
    ("timm", "train"),
    ("deepspeed", "train"),
    ("nvidia-dali-cuda130", "train"),
    ("nvidia-dali-cuda120", "train-cuda12"),
    ("numpy", "train"),
    ("pillow", "train"),
    ("pydantic", "train"),
    ("safetensors", "train"),
    ("tensorboard", "train"),
    ("diffusers", "vae"),
    ("flash-attn", "flash"),
    ("flash-attn-4", "flash4"),
    ("xformers", "xformers"),
    ("torch-fidelity", "eval"),
    ("wandb", "wandb"),
    ("trackio", "trackio"),
)


def versions() -> list[Finding]:
    out = [Finding("versions", "fastrepa", "ok", version_of("fastrepa") or "not installed")]
    out.append(Finding("versions", "python", "ok", platform.python_version()))
    for name, extra in VERSIONS:
        version = version_of(name)
        if version:
            out.append(Finding("versions", name, "ok", version))
            continue
        if name == "nvidia-dali-cuda120" and version_of("nvidia-dali-cuda130"):
            continue  # one of the two is enough
        remedy = f"pip install 'fastrepa[{extra}]'" if extra else "pip install fastrepa"
        out.append(Finding("versions", name, "off", "not installed", remedy))
    return out


def system() -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = f"{_limit(soft)} (hard limit {_limit(hard)})"
    enough = soft == resource.RLIM_INFINITY or soft >= OPEN_FILES
    remedy = "" if enough else f"ulimit -n {OPEN_FILES} or more, for many shards and readers"
    out = [Finding("system", "open files", "ok" if enough else "note", files, remedy)]
    try:
        shm = shutil.disk_usage("/dev/shm")
        enough = shm.total >= SHARED_MEMORY
        remedy = "" if enough else "docker run --shm-size=8g: readers and NCCL share memory there"
        detail = f"{gib(shm.total)}, {gib(shm.free)} free"
        out.append(Finding("system", "/dev/shm", "ok" if enough else "note", detail, remedy))
    except OSError as e:
        remedy = "mount a tmpfs there: reader processes hand over batches through it"
        out.append(Finding("system", "/dev/shm", "broken", one_line(e), remedy))
    out.append(compiler())
    detail = "not tried: the doctor stays off the network"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        detail += "; HF_HUB_OFFLINE is set, only weights in the cache can be loaded"
    out.append(Finding("system", "weights hub", "off", detail))
    return out


def compiler() -> Finding:
    """NVMe offload and torch.compile build C++ at run time: compiler, ninja, Python's headers."""
    compiler = os.environ.get("CXX", "g++")
    missing = []
    if not shutil.which(compiler):
        missing.append((f"{compiler} is not on PATH", "apt-get install g++"))
    # torch starts the program, which lies beside a virtual environment's python.
    if not shutil.which("ninja"):
        if (Path(sys.executable).parent / "ninja").exists():
            remedy = "activate the virtual environment, so that its bin folder is on PATH"
        else:
            remedy = "pip install ninja"
        missing.append(("ninja is not on PATH", remedy))
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        missing.append(("Python.h is missing", f"apt-get install python{version}-dev"))
    if missing:
        why, remedies = zip(*missing, strict=True)
        detail = f"{'; '.join(why)}: offload to NVMe and torch.compile build with it"
        return Finding("system", "C++ toolchain", "broken", detail, "; ".join(remedies))
    return Finding("system", "C++ toolchain", "ok", f"{compiler}, ninja, Python.h")


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"
