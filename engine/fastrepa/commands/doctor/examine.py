"""What this machine can do: versions, devices, fast paths, and what would enable the others.

Every fast path is really tried, on a few hundred numbers. A probe runs in a process of its own,
because what is broken may not raise but abort, hang, or need a variable set before it is imported;
whatever happens there is a finding here. Nothing goes over the network.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastrepa.runtime.launch import outside_the_world

SECTIONS = ("versions", "devices", "fast paths", "system")
MARKS = {"ok": "[green]✓[/]", "off": "[dim]–[/]", "broken": "[red]✗[/]", "note": "[yellow]![/]"}

TIMEOUT = 120.0
"""Seconds that a probe may take: some import a great deal from a cold disk."""

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
)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    section: one of SECTIONS. status: "ok" | "off" (not installed, or not for this hardware) |
    "broken" (installed, fails) | "note" (works; worth knowing). detail: what was found, or why not.
    remedy: what would enable or mend it; empty where nothing is amiss.
    """

    section: str
    name: str
    status: str
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Probe:
    """Something to try: `package` brings `module`, without which there is nothing to try."""

    name: str
    package: str
    module: str
    remedy: str
    """What installs it."""
    run: Callable[[], list[Finding]]
    environment: dict[str, str] | None = None


def doctor(*, probes: Iterable[str] | None = None, timeout: float = TIMEOUT) -> list[Finding]:
    """All findings, in the order of the report; takes some seconds, and never raises.

    `probes` chooses among PROBES by name (all by default).
    """
    chosen = [p for key, p in PROBES.items() if probes is None or key in set(probes)]
    workers = max(1, min(4, len(os.sched_getaffinity(0)), len(chosen)))
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(lambda probe: _try(probe, timeout), chosen))
    found = [*_versions(), *(finding for result in results for finding in result), *_system()]
    return sorted(found, key=lambda finding: SECTIONS.index(finding.section))


def print_doctor(as_json: bool = False, console: Console | None = None) -> None:
    """Run the doctor and print a table for people, or JSON for programs."""
    console = console or Console(highlight=False)
    if as_json:
        # Not through the console, which would fold long lines.
        print(to_json(doctor()), file=console.file)
        return
    with console.status("trying the fast paths ..."):
        findings = doctor()
    print_findings(findings, console)


def to_json(findings: list[Finding]) -> str:
    """{"findings": [{section, name, status, detail, remedy}, ...]}"""
    return json.dumps({"findings": [asdict(f) for f in findings]}, indent=2, ensure_ascii=False)


def print_findings(findings: list[Finding], console: Console) -> None:
    """One table per section, and a last line that sums up."""
    for section in SECTIONS:
        rows = [f for f in findings if f.section == section]
        if not rows:
            continue
        table = Table(
            title=f"[bold]{section}[/]",
            title_justify="left",
            box=None,
            show_header=False,
            pad_edge=False,
            padding=(0, 2, 0, 0),
        )
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for f in rows:
            detail = escape(f.detail)
            if f.status == "off":
                detail = f"[dim]{detail}[/]"
            if f.remedy:
                detail += f"\n[cyan]→ {escape(f.remedy)}[/]"
            table.add_row(MARKS[f.status], escape(f.name), detail)
        console.print(table)
        console.print()
    paths = [f for f in findings if f.section == "fast paths"]
    works = sum(f.status in ("ok", "note") for f in paths)
    broken = [f.name for f in findings if f.status == "broken"]
    summary = f"{works} of {len(paths)} fast paths work here"
    console.print(summary + (f"; broken: {', '.join(broken)}" if broken else "; nothing is broken"))


# In this process: what needs no import -----------------------------------------------------------


def _versions() -> list[Finding]:
    out = [Finding("versions", "fastrepa", "ok", _version("fastrepa") or "not installed")]
    out.append(Finding("versions", "python", "ok", platform.python_version()))
    for name, extra in VERSIONS:
        version = _version(name)
        if version:
            out.append(Finding("versions", name, "ok", version))
            continue
        if name == "nvidia-dali-cuda120" and _version("nvidia-dali-cuda130"):
            continue  # one of the two is enough
        remedy = f"pip install 'fastrepa[{extra}]'" if extra else "pip install fastrepa"
        out.append(Finding("versions", name, "off", "not installed", remedy))
    return out


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except Exception:  # absent, or its metadata are damaged
        return None


def _system() -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = f"{_limit(soft)} (hard limit {_limit(hard)})"
    enough = soft == resource.RLIM_INFINITY or soft >= OPEN_FILES
    remedy = "" if enough else f"ulimit -n {OPEN_FILES} or more, for many shards and readers"
    out = [Finding("system", "open files", "ok" if enough else "note", files, remedy)]
    try:
        shm = shutil.disk_usage("/dev/shm")
        enough = shm.total >= SHARED_MEMORY
        remedy = "" if enough else "docker run --shm-size=8g: readers and NCCL share memory there"
        detail = f"{_gib(shm.total)}, {_gib(shm.free)} free"
        out.append(Finding("system", "/dev/shm", "ok" if enough else "note", detail, remedy))
    except OSError as e:
        remedy = "mount a tmpfs there: reader processes hand over batches through it"
        out.append(Finding("system", "/dev/shm", "broken", _one_line(e), remedy))
    out.append(_compiler())
    detail = "not tried: the doctor stays off the network"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        detail += "; HF_HUB_OFFLINE is set, only weights in the cache can be loaded"
    out.append(Finding("system", "weights hub", "off", detail))
    return out


def _compiler() -> Finding:
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


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _one_line(error: BaseException | str) -> str:
    """A message that fits in a table: its first line that says something."""
    text = str(error).strip()
    line = next((part.strip() for part in text.splitlines() if part.strip()), "")
    kind = "" if isinstance(error, str) else type(error).__name__
    line = line if len(line) <= 300 else line[:297] + "..."
    return f"{kind}: {line}" if kind and line else line or kind or "no message"


# Probes: each in a process of its own ------------------------------------------------------------

# Modules of this process are found there too; -P keeps files of the working folder out of the way.
_CHILD = "import sys; from fastrepa.commands.doctor import _answer; _answer(sys.argv[1])"


def _try(probe: Probe, timeout: float) -> list[Finding]:
    """A probe's findings, or the finding that it could not answer."""
    if not _installed(probe.module):
        return [Finding("fast paths", probe.name, "off", "not installed", probe.remedy)]
    key = next(k for k, p in PROBES.items() if p is probe)
    environment = outside_the_world() | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment |= probe.environment or {}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CHILD, key],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return [_broken(probe, f"gave no answer within {timeout:g} s")]
    except OSError as e:
        return [_broken(probe, f"could not be started: {_one_line(e)}")]
    try:
        return [Finding(**finding) for finding in json.loads(done.stdout)]
    except (ValueError, TypeError):
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return [_broken(probe, f"{_ending(done.returncode)}: {_one_line(last[0])}")]


def _answer(key: str) -> None:
    """In the probe's process: print the findings as JSON, and leave at once."""
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes elsewhere
    probe = PROBES[key]
    try:
        findings = probe.run()
    except ModuleNotFoundError as e:
        remedy = f"pip install {probe.package}, with its dependencies ({e.name} is missing)"
        findings = [_path(probe.name, "broken", _one_line(e), remedy)]
    except Exception as e:
        findings = [_broken(probe, _one_line(e))]
    os.write(out, json.dumps([asdict(f) for f in findings]).encode())
    os._exit(0)  # a library that fails while it is taken down has worked all the same


def _broken(probe: Probe, detail: str) -> Finding:
    remedy = f"pip install --force-reinstall --no-deps {probe.package}"
    return Finding("fast paths", probe.name, "broken", detail, remedy)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:
        return f"died of signal {-code}"


def _installed(module: str) -> bool:
    """Whether the module's file is there. Its parents are not imported: they may be broken."""
    path: Sequence[str] | None = None
    parts = module.split(".")
    for i in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: i + 1]), path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return True


def _path(name: str, status: str, detail: str, remedy: str = "") -> Finding:
    return Finding("fast paths", name, status, detail, remedy)


_A_GPU = "an NVIDIA GPU with its driver"


def _probe_torch() -> list[Finding]:
    """Torch's own versions, the devices, and SDPA's backends."""
    import torch

    built = torch.version.cuda
    out = [Finding("versions", "cuda (of torch)", "ok" if built else "off", built or "none")]
    cudnn = torch.backends.cudnn.version() if built else None
    if cudnn:
        # 92600 is 9.26.0; before version 9 the major stood one digit lower.
        unit = 10_000 if cudnn >= 90_000 else 1_000
        text = f"{cudnn // unit}.{cudnn % unit // 100}.{cudnn % 100}"
        out.append(Finding("versions", "cudnn", "ok", text))
    if built and torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        out.append(Finding("versions", "nccl", "ok", nccl))
    out += _devices(torch)
    out += _dali_wheel(built)
    out += _sdpa(torch)
    return out


def _devices(torch: Any) -> list[Finding]:
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    vectors = torch.backends.cpu.get_cpu_capability()
    cpu = f"{_cpu_name()}, {cores} cores, torch on {threads}, {vectors}, {_gib(memory)}"
    out = [Finding("devices", "cpu", "ok", cpu)]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            detail = (
                f"{p.name}, {_gib(p.total_memory)}, compute capability {p.major}.{p.minor},"
                f" {p.multi_processor_count} multiprocessors"
            )
            arch = [int(a.removeprefix("sm_")) for a in torch.cuda.get_arch_list() if "sm_" in a]
            known = any(a // 10 == p.major and a % 10 <= p.minor for a in arch)
            remedy = "" if known else f"a torch build for sm_{p.major}{p.minor}"
            out.append(Finding("devices", f"cuda:{i}", "ok" if known else "note", detail, remedy))
        return out
    if torch.version.cuda is None:
        why, remedy = "this torch is built without CUDA", "pip install torch (PyPI's CUDA build)"
    else:
        try:
            torch.cuda.init()
            why = "torch sees no device"
        except Exception as e:
            why = _one_line(str(e))
        remedy = f"{_A_GPU} for CUDA {torch.version.cuda}"
        if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
            shown = os.environ["CUDA_VISIBLE_DEVICES"]
            remedy += f"; CUDA_VISIBLE_DEVICES is {shown!r}"
    out.append(Finding("devices", "gpu", "off", why, remedy))
    return out


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _dali_wheel(cuda: str | None) -> list[Finding]:
    """DALI is built for one CUDA major, which must be torch's."""
    wheels = {major: _version(f"nvidia-dali-cuda{major}0") for major in (11, 12, 13)}
    have = [major for major, version in wheels.items() if version]
    if not have or not cuda:
        return []  # said elsewhere: DALI is not installed, or there is no CUDA to fit
    want = int(cuda.split(".")[0])
    extra = {12: "train-cuda12", 13: "train"}.get(want)
    name = "DALI wheel fits torch"
    if have == [want]:
        return [_path(name, "ok", f"both for CUDA {want}")]
    if want in have:
        other = ", ".join(f"nvidia-dali-cuda{m}0" for m in have if m != want)
        detail = f"two wheels share one folder: cuda{have[0]}0 and cuda{have[1]}0"
        remedy = f"pip uninstall {other}; pip install --force-reinstall nvidia-dali-cuda{want}0"
        return [_path(name, "broken", detail, remedy)]
    detail = f"torch is built for CUDA {want}, DALI for CUDA {have[0]}"
    remedy = f"pip uninstall nvidia-dali-cuda{have[0]}0"
    remedy += f"; pip install 'fastrepa[{extra}]'" if extra else f" and a torch for CUDA {have[0]}"
    return [_path(name, "broken", detail, remedy)]


HEAD_DIMS = (64, 72)
"""Of SiT-S, B and L, and of SiT-XL."""


def _sdpa(torch: Any) -> list[Finding]:
    """Each backend of scaled_dot_product_attention alone, forward and backward."""
    from fastrepa_kernels.attention import SDPA

    return [_attention_backend(torch, name) for name in SDPA if name != "math"]


def _attention_backend(torch: Any, name: str) -> Finding:
    """A backend of attention.backend, really tried where its rules allow it."""
    from fastrepa_kernels.attention import refusal

    cuda = torch.cuda.is_available()
    device, dtype = (
        (torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)
        if cuda
        else (torch.device("cpu"), torch.float32)
    )
    why = {dim: refusal(name, device, dtype, dim) for dim in HEAD_DIMS}
    works = [str(dim) for dim, reason in why.items() if not reason]
    if works:
        where = "on the GPU, bf16" if cuda else "on the CPU, fp32"
        status = "ok" if len(works) == len(HEAD_DIMS) else "note"
        return _path(name, status, f"{where}, head dim {' and '.join(works)}")
    reason = next(iter(why.values()))
    if "on this device" in reason:
        return _path(name, "broken", reason, "a release built for this torch, CUDA and GPU")
    return _path(name, "off", reason, "another GPU or torch" if cuda else _A_GPU)


def _probe_attention() -> list[Finding]:
    """What attention.backend auto takes here."""
    import torch

    from fastrepa_kernels.attention import FLASH, choose

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    parts, slow = [], []
    for word, dtype in dtypes.items():
        chosen = {dim: choose(device, dtype, dim) for dim in HEAD_DIMS}
        parts.append(f"{word}: " + ", ".join(f"{c.backend} ({d})" for d, c in chosen.items()))
        if cuda and word == "bf16":  # a CPU's best is not always flash
            slow = [c for c in chosen.values() if c.backend not in FLASH]
    detail = "by head dim, " + "; ".join(parts)
    if not slow:
        return [_path("attention", "ok", detail)]
    why = "; ".join(f"{name}: {reason}" for name, reason in slow[0].passed_over)
    return [_path("attention", "note", f"{detail}, no FlashAttention ({why})")]


def _probe_triton(device: str) -> list[Finding]:
    """One of our own kernels against its reference."""
    import torch

    name = "Triton kernels on the GPU" if device == "cuda" else "Triton interpreter"
    if device == "cuda" and not torch.cuda.is_available():
        return [_path(name, "off", "no GPU; the torch paths of the same operations run", _A_GPU)]
    from fastrepa_kernels import launch
    from fastrepa_kernels.adaln import layernorm_modulate, layernorm_modulate_reference

    x = torch.randn(2, 5, 72, device=device)
    shift, scale = torch.randn(2, 2, 72, device=device)
    with launch.backend("triton"):
        ours = layernorm_modulate(x, shift, scale)
    expected = layernorm_modulate_reference(x.double(), shift.double(), scale.double())
    error = float((ours.double() - expected).abs().max())
    if not error < 1e-5:
        detail = f"layernorm_modulate is off by {error:.1e}"
        return [_path(name, "broken", detail, "a triton that belongs to this torch")]
    detail = "layernorm_modulate agrees with its reference"
    return [_path(name, "ok", detail + ("" if device == "cuda" else " (for tests, on the CPU)"))]


def _probe_flash(name: str) -> list[Finding]:
    """A flash-attn package against plain attention, where there is a GPU for it."""
    import torch

    from fastrepa_kernels.attention import MODULES

    importlib.import_module(MODULES[name])
    if not torch.cuda.is_available():
        return [_path(name, "off", "installed, but there is no GPU", _A_GPU)]
    return [_attention_backend(torch, name)]


def _probe_xformers() -> list[Finding]:
    """xformers imports happily without its C++ library: the library itself is asked."""
    import xformers
    from xformers import _cpp_lib

    problem = getattr(_cpp_lib, "_cpp_library_load_exception", None)
    import torch  # xformers has done so by now

    if problem is not None:
        built = getattr(getattr(problem, "build_info", None), "torch_version", None)
        detail = f"its C++ operations do not load on torch {torch.__version__}"
        detail += f" (built for {built})" if built else f": {_one_line(problem)}"
        return [_path("xformers", "broken", detail, "an xformers release built for this torch")]
    if not torch.cuda.is_available():
        return [_path("xformers", "off", f"{xformers.__version__} loads; no GPU here", _A_GPU)]
    return [_attention_backend(torch, "xformers")]


def _probe_dali(device: str) -> list[Finding]:
    """A pipeline that decodes two JPEGs of one colour."""
    import io

    import numpy as np
    from nvidia.dali import fn, pipeline_def
    from PIL import Image

    name = "DALI decode on the CPU" if device == "cpu" else "DALI decode on the GPU (mixed)"
    if device == "mixed":
        import torch

        if not torch.cuda.is_available():
            return [_path(name, "off", "no GPU; data.decode auto takes the CPU", _A_GPU)]
    buffer = io.BytesIO()
    Image.new("RGB", (48, 32), (200, 40, 90)).save(buffer, "JPEG", quality=95)
    encoded = np.frombuffer(buffer.getvalue(), dtype=np.uint8)

    settings: dict[str, Any] = {"device_id": 0 if device == "mixed" else None}

    @pipeline_def(batch_size=2, num_threads=1, **settings)
    def pipeline() -> Any:
        bytes_ = fn.external_source(source=lambda: [encoded, encoded], batch=True)
        return fn.decoders.image(bytes_, device=device)

    pipe = pipeline()
    pipe.build()
    (images,) = pipe.run()
    decoded = np.asarray((images.as_cpu() if device == "mixed" else images)[1])
    colour = decoded.reshape(-1, 3).mean(0)
    if decoded.shape != (32, 48, 3) or np.abs(colour - (200, 40, 90)).max() > 4:
        detail = f"decoded {decoded.shape} of mean colour {colour.round().tolist()}"
        return [_path(name, "broken", detail)]
    return [_path(name, "ok", "a pipeline decoded two JPEGs")]


def _dali_package() -> str:
    return "nvidia-dali-cuda" + ("120" if _version("nvidia-dali-cuda120") else "130")


def _probe_deepspeed() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    device, backend = accelerator.device_name(), accelerator.communication_backend_name()
    detail = f"{deepspeed.__version__}, accelerator {device}, communication {backend}"
    if device == "cpu":
        builder = accelerator.create_op_builder("ShareMemCommBuilder")
        fits = builder is not None and builder.is_compatible(verbose=False)
        detail += "; its shared-memory operation " + (
            "is built at the first start with several ranks" if fits else "does not suit this CPU"
        )
    if device == "cpu" and torch.cuda.is_available():
        return [_path("DeepSpeed", "note", detail, "unset DS_ACCELERATOR to use the GPU")]
    return [_path("DeepSpeed", "ok", detail)]


def _probe_diffusers() -> list[Finding]:
    """The autoencoder's class builds and decodes, on a toy of random weights."""
    import torch
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    with torch.no_grad():
        image = vae.decode(torch.zeros(1, 4, 4, 4)).sample
    assert image.shape[:2] == (1, 3)
    return [_path("diffusers (codec sd-vae)", "ok", "a toy autoencoder decoded")]


_TRAIN = "pip install 'fastrepa[train]' (CUDA 12 host: 'fastrepa[train-cuda12]')"

PROBES: dict[str, Probe] = {
    "torch": Probe("torch", "torch", "torch", "pip install torch", _probe_torch),
    "triton": Probe(
        "Triton kernels on the GPU",
        "triton",
        "triton",
        "pip install triton",
        lambda: _probe_triton("cuda"),
    ),
    "interpreter": Probe(
        "Triton interpreter",
        "triton",
        "triton",
        "pip install triton",
        lambda: _probe_triton("cpu"),
        {"TRITON_INTERPRET": "1"},
    ),
    "attention": Probe("attention", "torch", "torch", "pip install torch", _probe_attention),
    # flash-attn and flash-attn-4 share the folder flash_attn: a module that only one of them has.
    "flash": Probe(
        "flash-attn-2",
        "flash-attn",
        "flash_attn.flash_attn_interface",
        "pip install 'fastrepa[flash]' on a GPU host with nvcc (a long build); SDPA stands in",
        lambda: _probe_flash("flash-attn-2"),
    ),
    "flash3": Probe(
        "flash-attn-3",
        "flash-attn-3",
        "flash_attn_interface",
        "pip install git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper "
        "on a Hopper host with nvcc (a long build); SDPA stands in",
        lambda: _probe_flash("flash-attn-3"),
    ),
    "flash4": Probe(
        "flash-attn-4",
        "flash-attn-4",
        "flash_attn.cute.interface",
        "pip install --pre 'fastrepa[flash4]' on a Hopper or Blackwell host; SDPA stands in",
        lambda: _probe_flash("flash-attn-4"),
    ),
    "xformers": Probe(
        "xformers",
        "xformers",
        "xformers",
        "pip install 'fastrepa[xformers]'; SDPA stands in",
        _probe_xformers,
    ),
    "dali": Probe(
        "DALI decode on the CPU", _dali_package(), "nvidia.dali", _TRAIN, lambda: _probe_dali("cpu")
    ),
    "dali-mixed": Probe(
        "DALI decode on the GPU (mixed)",
        _dali_package(),
        "nvidia.dali",
        _TRAIN,
        lambda: _probe_dali("mixed"),
    ),
    "deepspeed": Probe("DeepSpeed", "deepspeed", "deepspeed", _TRAIN, _probe_deepspeed),
    "diffusers": Probe(
        "diffusers (codec sd-vae)",
        "diffusers",
        "diffusers",
        "pip install 'fastrepa[vae]'",
        _probe_diffusers,
    ),
}
