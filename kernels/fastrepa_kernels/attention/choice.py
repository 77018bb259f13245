"""The choice of attention's backend: the first of an order that its rules and a trial allow.

A backend of PRIORITY is taken when its rules allow it, its package loads and one small forward and
backward gives the right numbers on the device at hand. `choose` says which one runs and why not the
others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastrepa_kernels import launch
from fastrepa_kernels.attention.backends import (
    BACKENDS,
    FLASH,
    MODULES,
    PACKED,
    attention_reference,
    first_line,
    load,
    run,
)

# Head dimensions that flash-attn 2 and 3 have kernels for; others are padded to the next one, so
# that 72 costs what 96 does.
BUILT = (64, 96, 128, 192, 256)

_LAST = ("flash-attn-2", "sdpa-flash", "xformers", "sdpa-efficient", "math")
# Device generation -> (order for head dimensions in BUILT, order for others). From published
# timings and the padding above. Of torch's three an H200 confirms the order at a head dimension of
# 72 (benchmarks/records/gpu_suite_h200.jsonl); the rest is not measured.
PRIORITY: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {
    80: (
        ("flash-attn-2", "sdpa-flash", "sdpa-cudnn", *_LAST[2:]),
        ("flash-attn-2", "sdpa-flash", "sdpa-cudnn", *_LAST[2:]),
    ),
    90: (
        ("flash-attn-3", "sdpa-cudnn", "flash-attn-4", *_LAST),
        ("sdpa-cudnn", "flash-attn-4", "flash-attn-3", *_LAST),
    ),
    100: (("flash-attn-4", "sdpa-cudnn", *_LAST), ("flash-attn-4", "sdpa-cudnn", *_LAST)),
}
CPU_PRIORITY = ("sdpa-flash", "math")
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """The backend that runs, and those before it in the order with the reason they do not."""

    backend: str
    passed_over: tuple[tuple[str, str], ...] = ()


def choose(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    backend: str = "auto",
    require: str = "any",
    deterministic: bool = False,
) -> Choice:
    """Choose the backend for attention of `dtype` with heads of `head_dim` on `device`.

    backend: one of BACKENDS, or "auto" for the first of PRIORITY that works. require: "flash" makes
    anything that is not of FLASH an error. deterministic: only backends whose backward is.
    Raises ValueError where the wanted backend cannot run, or nothing of what is required.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    if require not in ("any", "flash"):
        raise ValueError(f"require: {require!r} is not one of any, flash")
    case = (device.type, device.index, dtype, head_dim, deterministic)
    if backend != "auto":
        if require == "flash" and backend not in FLASH:
            raise ValueError(
                f"require: 'flash' does not allow backend {backend!r}; it allows {', '.join(FLASH)}"
            )
        why = _refusal(backend, *case)
        if why:
            raise ValueError(f"backend: {backend!r} cannot run here: {why}")
        return Choice(backend)
    passed_over: list[tuple[str, str]] = []
    for name in order(device, dtype, head_dim):
        if require == "flash" and name not in FLASH:
            continue
        why = _refusal(name, *case)
        if not why:
            return Choice(name, tuple(passed_over))
        passed_over.append((name, why))
    reasons = "; ".join(f"{name}: {why}" for name, why in passed_over)
    raise ValueError(f"require: {require!r}, but nothing of it runs here ({reasons})")


def order(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """Return the backends to try on a device, the first that works to be taken."""
    if device.type == "cuda" and dtype != torch.float64:
        built, padded = PRIORITY[launch.generation(device)]
        return built if head_dim in BUILT else padded
    if device.type == "cpu" and dtype != torch.float64:
        return ("math-chunked", *CPU_PRIORITY) if dtype in HALF else CPU_PRIORITY
    return ("math",)


def refusal(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    deterministic: bool = False,
) -> str:
    """Say why backend `name` cannot be used, '' where it can: by rule, import and a real trial."""
    return _refusal(name, device.type, device.index, dtype, head_dim, deterministic)


@cache
def _refusal(
    name: str, kind: str, index: int | None, dtype: torch.dtype, head_dim: int, deterministic: bool
) -> str:
    device = torch.device(kind) if index is None else torch.device(kind, index)
    capability = torch.cuda.get_device_capability(device) if kind == "cuda" else None
    why = rule(name, kind, capability, dtype, head_dim, deterministic)
    if not why and name in MODULES:
        why = load(name)
    if not why and kind == "cuda":
        why = _trial(name, device, dtype, head_dim, deterministic)
    return why


def rule(
    name: str,
    kind: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
    deterministic: bool,
) -> str:
    """Say what the backends' own sources and documents refuse; '' where they refuse nothing.

    kind: a device's type; capability: of a CUDA device.
    """
    if name in ("math", "sdpa"):
        return ""
    if name == "math-chunked":
        return "" if kind == "cpu" else f"needs a CPU, not {kind}"
    if kind != "cuda" or capability is None:
        if name == "sdpa-flash" and kind == "cpu":
            return "" if dtype != torch.float64 else "float64 is computed by math"
        return f"needs a GPU, not {kind}"
    major = capability[0]
    widest = 256 if name != "sdpa-cudnn" or major == 9 else 128
    if name == "flash-attn-4" and major != 9:
        widest = 128
    majors = {"flash-attn-3": (9,), "flash-attn-4": (9, 10, 11), "sdpa-efficient": None}.get(
        name, (8, 9, 10, 11, 12)
    )
    if majors and major not in majors:
        return f"no kernels for compute capability {major}.{capability[1]}"
    if dtype == torch.float64 or (name in FLASH and dtype not in HALF):
        return f"does not take {_word(dtype)}"
    if head_dim > widest and name in FLASH:
        return f"head dimension {head_dim} is above {widest}"
    if head_dim % 8 and name != "flash-attn-2":
        return f"head dimension {head_dim} is no multiple of 8"
    if deterministic and name == "sdpa-cudnn":
        return "its backward is not deterministic"
    return ""


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _trial(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool
) -> str:
    """Try a small forward and backward against the reference in float64; '' or what went wrong."""
    generator = torch.Generator(device).manual_seed(0)  # no one else's randomness is touched
    given = torch.randn((1, 128, 3, 2, head_dim), device=device, generator=generator).to(dtype)

    def forward_and_backward(
        x: Tensor, of: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, ...]:
        x, bias = x.requires_grad_(), x.new_zeros(x.shape[2:].numel()).requires_grad_()
        y = of(x, bias)
        wanted = (x, bias) if name in PACKED else (x,)
        return y.detach(), *torch.autograd.grad(y.double().square().sum(), wanted)

    def specification(x: Tensor, bias: Tensor) -> Tensor:
        return attention_reference(x + bias.view(x.shape[2:]))

    with torch.inference_mode(False), torch.enable_grad(), launch.without_autocast(given):
        exact = forward_and_backward(given.double(), specification)
        try:
            ours = forward_and_backward(
                given.clone(),
                lambda x, bias: run(
                    name, x, bias if name in PACKED else None, None, None, 0.0, deterministic
                ),
            )
        except Exception as e:
            return f"fails on this device ({first_line(e)})"
    # A wrong one is off by its own size; float32 kernels may compute in TF32.
    allowed = 10 * torch.finfo(torch.bfloat16).eps
    for a, b in zip(ours, exact, strict=True):
        error = float((a.double() - b).norm() / b.norm())
        if not error < allowed:
            return f"is wrong on this device by {error:.1e}"
    return ""
