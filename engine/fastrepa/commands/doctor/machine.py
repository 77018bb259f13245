"""The doctor's findings that need no import: versions, limits, load, disk, hub, C++ toolchain."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import sysconfig
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from fastrepa.commands.doctor.findings import Finding, gib, one_line, version_of
from fastrepa.runtime.hardware import usable_cores
from fastrepa.runtime.hub import unreachable
from fastrepa.runtime.threads import BUSY, others

OPEN_FILES = 4096
SHARED_MEMORY = 1 << 30
CHECKPOINT = 11e9  # bytes of one of SiT-XL/2: weights, two moments and an average, in fp32

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
    return [*out, compiler(), load(), disk()]


def load() -> Finding:
    """Tell whether the cores are this process's alone."""
    cores, share = usable_cores(), others()
    taken = "it is not known what others take" if share is None else f"others take {share:.0%}"
    detail = f"{cores} cores to use; {taken}"
    if share is None or share <= BUSY:
        return Finding("system", "load", "ok", detail)
    remedy = "a run on the CPU is slower, and what is timed now is not true: wait, or other cores"
    return Finding("system", "load", "note", detail, remedy)


def disk() -> Finding:
    """Tell how much room runs have in the current folder, where they lie by default."""
    try:
        free = shutil.disk_usage(".").free
    except OSError as e:
        return Finding("system", "disk", "broken", one_line(e), "another current folder")
    remedy = f"a checkpoint of SiT-XL/2 takes {gib(CHECKPOINT)}, of the quickstart 0.03 GiB"
    enough = free >= 2 * CHECKPOINT
    detail = f"{gib(free)} free in the current folder"
    return Finding("system", "disk", "ok" if enough else "note", detail, "" if enough else remedy)


def hub() -> Finding:
    """Ask whether the hub of weights answers; nothing is loaded."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        detail = "HF_HUB_OFFLINE is set, only weights in the cache can be loaded"
        return Finding("system", "weights hub", "off", detail, "unset HF_HUB_OFFLINE")
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if problem := unreachable(address):
        remedy = "weights of its cache, of packages and of local files; HTTPS_PROXY, HF_ENDPOINT"
        return Finding("system", "weights hub", "note", problem, remedy)
    if urlsplit(address).scheme in getproxies():
        return Finding("system", "weights hub", "ok", f"{address} behind a proxy, not asked")
    return Finding("system", "weights hub", "ok", f"{address} answers")


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
