"""The doctor's probes: each tries one fast path, in a process of its own (examine.py)."""

from __future__ import annotations

import importlib
import os
from typing import Any

from fastrepa.commands.doctor.findings import Finding, Probe, fast_path, gib, one_line, version_of
from fastrepa.runtime.hardware import cpu_name, usable_cores

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
    cores, threads = usable_cores(), torch.get_num_threads()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    vectors = torch.backends.cpu.get_cpu_capability()
    cpu = f"{cpu_name()}, {cores} cores, torch on {threads}, {vectors}, {gib(memory)}"
    out = [Finding("devices", "cpu", "ok", cpu)]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            detail = (
                f"{p.name}, {gib(p.total_memory)}, compute capability {p.major}.{p.minor},"
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
            why = one_line(str(e))
        remedy = f"{_A_GPU} for CUDA {torch.version.cuda}"
        if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
            shown = os.environ["CUDA_VISIBLE_DEVICES"]
            remedy += f"; CUDA_VISIBLE_DEVICES is {shown!r}"
    out.append(Finding("devices", "gpu", "off", why, remedy))
    return out


def _dali_wheel(cuda: str | None) -> list[Finding]:
    """DALI is built for one CUDA major, which must be torch's."""
    wheels = {major: version_of(f"nvidia-dali-cuda{major}0") for major in (11, 12, 13)}
    have = [major for major, version in wheels.items() if version]
    if not have or not cuda:
        return []  # said elsewhere: DALI is not installed, or there is no CUDA to fit
    want = int(cuda.split(".")[0])
    extra = {12: "train-cuda12", 13: "train"}.get(want)
    name = "DALI wheel fits torch"
    if have == [want]:
        return [fast_path(name, "ok", f"both for CUDA {want}")]
    if want in have:
        other = ", ".join(f"nvidia-dali-cuda{m}0" for m in have if m != want)
        detail = f"two wheels share one folder: cuda{have[0]}0 and cuda{have[1]}0"
        remedy = f"pip uninstall {other}; pip install --force-reinstall nvidia-dali-cuda{want}0"
        return [fast_path(name, "broken", detail, remedy)]
    detail = f"torch is built for CUDA {want}, DALI for CUDA {have[0]}"
    remedy = f"pip uninstall nvidia-dali-cuda{have[0]}0"
    remedy += f"; pip install 'fastrepa[{extra}]'" if extra else f" and a torch for CUDA {have[0]}"
    return [fast_path(name, "broken", detail, remedy)]


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
        return fast_path(name, status, f"{where}, head dim {' and '.join(works)}")
    reason = next(iter(why.values()))
    if "on this device" in reason:
        return fast_path(name, "broken", reason, "a release built for this torch, CUDA and GPU")
    return fast_path(name, "off", reason, "another GPU or torch" if cuda else _A_GPU)


def _probe_attention() -> list[Finding]:
    """Say what attention.backend auto takes here."""
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
        return [fast_path("attention", "ok", detail)]
    why = "; ".join(f"{name}: {reason}" for name, reason in slow[0].passed_over)
    return [fast_path("attention", "note", f"{detail}, no FlashAttention ({why})")]


def _probe_triton(device: str) -> list[Finding]:
    """One of our own kernels against its reference."""
    import torch

    name = "Triton kernels on the GPU" if device == "cuda" else "Triton interpreter"
    if device == "cuda" and not torch.cuda.is_available():
        return [
            fast_path(name, "off", "no GPU; the torch paths of the same operations run", _A_GPU)
        ]
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
        return [fast_path(name, "broken", detail, "a triton that belongs to this torch")]
    detail = "layernorm_modulate agrees with its reference"
    return [
        fast_path(name, "ok", detail + ("" if device == "cuda" else " (for tests, on the CPU)"))
    ]


def _probe_flash(name: str) -> list[Finding]:
    """A flash-attn package against plain attention, where there is a GPU for it."""
    import torch

    from fastrepa_kernels.attention import MODULES

    importlib.import_module(MODULES[name])
    if not torch.cuda.is_available():
        return [fast_path(name, "off", "installed, but there is no GPU", _A_GPU)]
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
        detail += f" (built for {built})" if built else f": {one_line(problem)}"
        return [fast_path("xformers", "broken", detail, "an xformers release built for this torch")]
    if not torch.cuda.is_available():
        return [fast_path("xformers", "off", f"{xformers.__version__} loads; no GPU here", _A_GPU)]
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
            return [fast_path(name, "off", "no GPU; data.decode auto takes the CPU", _A_GPU)]
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
        return [fast_path(name, "broken", detail)]
    return [fast_path(name, "ok", "a pipeline decoded two JPEGs")]


def _dali_package() -> str:
    return "nvidia-dali-cuda" + ("120" if version_of("nvidia-dali-cuda120") else "130")


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
        return [fast_path("DeepSpeed", "note", detail, "unset DS_ACCELERATOR to use the GPU")]
    return [fast_path("DeepSpeed", "ok", detail)]


def _probe_diffusers() -> list[Finding]:
    """The autoencoder's class builds and decodes, on a toy of random weights."""
    import torch
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    with torch.no_grad():
        image = vae.decode(torch.zeros(1, 4, 4, 4)).sample
    assert image.shape[:2] == (1, 3)
    return [fast_path("diffusers (codec sd-vae)", "ok", "a toy autoencoder decoded")]


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
