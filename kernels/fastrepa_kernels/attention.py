"""Self-attention on packed projections: softmax(q k^T / sqrt(d)) v behind one call.

Shapes: B batch, T tokens, H heads, d head dimension; qkv [B,T,3,H,d] is what one Linear gives, seen
as a view. q and k may be normalised over d first (LayerNorm with weight and bias: qk-norm).
Saved for backward: qkv, the output and one log-sum per row; `math` keeps the T x T probabilities.

A backend is chosen, called without copying q, k or v, and never silently. `choose` says which one
runs and why not the others; PRIORITY is the order by device generation and head dimension; a
backend of PRIORITY is taken when its rules allow it, its package loads and one small forward and
backward gives the right numbers on the device at hand.

Only `math-chunked` is computed here: for a half dtype on a CPU, where flash attention's backward is
slow. The products of `attention_reference` for some samples and heads at a time, whose scores stay
in the cache and are made again in backward; it keeps nothing but qkv and the output.

torch's own kernels are called by their aten names: `scaled_dot_product_attention` would choose
again at every call. The gradient of qkv is written in place by flash-attn 2, 3, 4 and math-chunked;
the other backends give three tensors, which one pass puts together while it sums their columns,
which are the gradient of the bias that qkv's Linear added.

Never run, because no GPU was at hand: all that is not for the CPU. The calls follow the sources of
flash-attn 2.8.3.post2 (its hopper/ folder is flash-attn 3), flash-attn-4 4.0.0b36 and xformers
0.0.35, and are tested against stand-ins with those signatures; torch's own are tested against its
shape functions (2.11 and 2.15).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastrepa_kernels import launch
from fastrepa_kernels.activation import column_sums, sum_of_parts
from fastrepa_kernels.aot import AotCase
from fastrepa_kernels.cost import Cost
from fastrepa_kernels.registration import differentiable, first_order
from fastrepa_kernels.sass import Traffic

SDPA = ("sdpa-cudnn", "sdpa-flash", "sdpa-efficient")  # torch's own kernels
# flash-attn and flash-attn-4 share the folder flash_attn.
MODULES = {
    "flash-attn-2": "flash_attn.flash_attn_interface",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-4": "flash_attn.cute.interface",
    "xformers": "xformers.ops.fmha",
}
# "sdpa" is what torch would take by itself: never chosen here, and what a rival computes with.
BACKENDS = (*MODULES, *SDPA, "math", "math-chunked", "sdpa")
PACKED = ("flash-attn-4", "xformers", *SDPA, "math-chunked")
"""Backends whose backward passes here as one tensor, and can sum the gradient of qkv's bias."""
FLASH = ("flash-attn-2", "flash-attn-3", "flash-attn-4", "sdpa-cudnn", "sdpa-flash")
"""Backends that are FlashAttention, for `require="flash"`; cuDNN's is one too."""

# Head dimensions that flash-attn 2 and 3 have kernels for; others are padded to the next one, so
# that 72 costs what 96 does.
BUILT = (64, 96, 128, 192, 256)

_LAST = ("flash-attn-2", "sdpa-flash", "xformers", "sdpa-efficient", "math")
# Device generation -> (order for head dimensions in BUILT, order for others). From published
# timings and the padding above; benchmarks/gpu_suite.py measures it and nobody has yet.
PRIORITY: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {
    80: (
        ("flash-attn-2", "sdpa-flash", "sdpa-cudnn", *_LAST[2:]),
        ("flash-attn-2", "sdpa-flash", "sdpa-cudnn", *_LAST[2:]),
    ),
    90: (
        ("flash-attn-3", "sdpa-cudnn", "flash-attn-4", *_LAST),
        ("sdpa-cudnn", "flash-attn-4", "flash-attn-3", *_LAST),
    ),
    100: (
        ("flash-attn-4", "sdpa-cudnn", *_LAST),
        ("flash-attn-4", "sdpa-cudnn", *_LAST),
    ),
}
CPU_PRIORITY = ("sdpa-flash", "math")
HALF = (torch.float16, torch.bfloat16)

CPU_CHUNK = 1 << 20  # bytes of scores at a time

Norm = tuple[Tensor, Tensor]  # weight and bias of a LayerNorm over d


def attention_reference(
    qkv: Tensor, q_norm: Norm | None = None, k_norm: Norm | None = None, eps: float = 1e-5
) -> Tensor:
    """The specification, in whatever dtype it is given (float64 in tests): [B,T,H,d]."""
    q, k, v = qkv.transpose(1, 3).unbind(2)  # [B,H,T,d]
    if q_norm is not None:
        q = F.layer_norm(q, q.shape[-1:], *q_norm, eps=eps)
    if k_norm is not None:
        k = F.layer_norm(k, k.shape[-1:], *k_norm, eps=eps)
    probabilities = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (probabilities @ v).transpose(1, 2)


# The choice ---------------------------------------------------------------------------------------


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
    """Which backend computes attention of `dtype` with heads of `head_dim` on `device`.

    backend: one of BACKENDS, or "auto" for the first of PRIORITY that works. require: "flash" makes
    anything that is not of FLASH an error. deterministic: only backends whose backward is.
    Raises ValueError where the wanted backend cannot run, or nothing of what is required.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    if require not in ("any", "flash"):
        raise ValueError(f"require: {require!r} is not one of any, flash")
    at = (device.type, device.index, dtype, head_dim, deterministic)
    if backend != "auto":
        if require == "flash" and backend not in FLASH:
            raise ValueError(
                f"require: 'flash' does not allow backend {backend!r}; it allows {', '.join(FLASH)}"
            )
        why = _refusal(backend, *at)
        if why:
            raise ValueError(f"backend: {backend!r} cannot run here: {why}")
        return Choice(backend)
    passed_over: list[tuple[str, str]] = []
    for name in order(device, dtype, head_dim):
        if require == "flash" and name not in FLASH:
            continue
        why = _refusal(name, *at)
        if not why:
            return Choice(name, tuple(passed_over))
        passed_over.append((name, why))
    reasons = "; ".join(f"{name}: {why}" for name, why in passed_over)
    raise ValueError(f"require: {require!r}, but nothing of it runs here ({reasons})")


def order(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """Backends to try on a device, the first that works to be taken."""
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
    """Why backend `name` cannot be used, '' where it can: by rule, by import, by a real trial."""
    return _refusal(name, device.type, device.index, dtype, head_dim, deterministic)


@cache
def _refusal(
    name: str, kind: str, index: int | None, dtype: torch.dtype, head_dim: int, deterministic: bool
) -> str:
    device = torch.device(kind) if index is None else torch.device(kind, index)
    capability = torch.cuda.get_device_capability(device) if kind == "cuda" else None
    why = rule(name, kind, capability, dtype, head_dim, deterministic)
    if not why and name in MODULES:
        why = _import(name)
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
    """What the backends' own sources and documents demand; '' where nothing speaks against it.

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
    wide = 256 if name != "sdpa-cudnn" or major == 9 else 128
    if name == "flash-attn-4" and major != 9:
        wide = 128
    majors = {"flash-attn-3": (9,), "flash-attn-4": (9, 10, 11), "sdpa-efficient": None}.get(
        name, (8, 9, 10, 11, 12)
    )
    if majors and major not in majors:
        return f"no kernels for compute capability {major}.{capability[1]}"
    if dtype == torch.float64 or (name in FLASH and dtype not in HALF):
        return f"does not take {_word(dtype)}"
    if head_dim > wide and name in FLASH:
        return f"head dimension {head_dim} is above {wide}"
    if head_dim % 8 and name != "flash-attn-2":
        return f"head dimension {head_dim} is no multiple of 8"
    if deterministic and name == "sdpa-cudnn":
        return "its backward is not deterministic"
    return ""


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_loaded: dict[str, ModuleType] = {}


def _import(name: str) -> str:
    """Load a backend's package into `_loaded`; '' or why it cannot be."""
    if name in _loaded:
        return ""
    top = MODULES[name].partition(".")[0]
    try:
        if importlib.util.find_spec(top) is None:
            return "not installed"
        _loaded[name] = importlib.import_module(MODULES[name])
    except ModuleNotFoundError as e:
        ours = f"{e.name}.".startswith(f"{top}.")
        return "not installed" if ours else f"{e.name} is missing"
    except Exception as e:  # what is built for another torch or CUDA raises almost anything
        return f"does not load ({_first_line(e)})"
    return ""


def _trial(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool
) -> str:
    """One small forward and backward against the reference in float64; '' or what went wrong."""
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
                lambda x, bias: _run(
                    name, x, bias if name in PACKED else None, None, None, 0.0, deterministic
                ),
            )
        except Exception as e:
            return f"fails on this device ({_first_line(e)})"
    # A wrong one is off by its own size; float32 kernels may compute in TF32.
    allowed = 10 * torch.finfo(torch.bfloat16).eps
    for a, b in zip(ours, exact, strict=True):
        error = float((a.double() - b).norm() / b.norm())
        if not error < allowed:
            return f"is wrong on this device by {error:.1e}"
    return ""


def _first_line(e: BaseException) -> str:
    text = next((line.strip() for line in str(e).splitlines() if line.strip()), "")
    return f"{type(e).__name__}: {text[:160]}" if text else type(e).__name__


# The calls ----------------------------------------------------------------------------------------


def _run(
    name: str, qkv: Tensor, bias: Tensor | None, q_norm: Norm | None, k_norm: Norm | None,
    eps: float, deterministic: bool,
) -> Tensor:  # fmt: skip
    packed = q_norm is None and k_norm is None
    if bias is not None and not (packed and name in PACKED):
        raise ValueError(
            f"attention: bias needs q and k without norms and one of {', '.join(PACKED)}; "
            f"got {name}{'' if packed else ' with norms'}"
        )
    q, k, v = qkv.unbind(2)  # [B,T,H,d], views
    if q_norm is not None:
        q = F.layer_norm(q, q.shape[-1:], *q_norm, eps=eps).to(v.dtype)
    if k_norm is not None:
        k = F.layer_norm(k, k.shape[-1:], *k_norm, eps=eps).to(v.dtype)
    if name in ("math", "sdpa"):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if name == "math":
            return torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0].transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    if name in ("flash-attn-2", "flash-attn-3"):
        package: Any = _loaded[name]
        if packed:
            return package.flash_attn_qkvpacked_func(qkv, deterministic=deterministic)
        return package.flash_attn_func(q, k, v, deterministic=deterministic)
    whole = qkv if packed else torch.stack([q, k, v], 2)
    return _packed_attention_call(whole, bias, name, deterministic)[0]


# Packed: one op takes qkv and gives its gradient as one tensor ------------------------------------


def _sums_shape(name: str, b: int, t: int, h: int) -> tuple[int, ...]:
    """The shape of a backend's log-sums."""
    if name == "math-chunked":
        return b, h, 0
    if name == "sdpa-cudnn":
        return b, h, t, 1
    return b, h, -(-t // 32) * 32 if name == "sdpa-efficient" else t


@torch.library.custom_op("fastrepa::packed_attention", mutates_args=())
def _packed_attention(
    qkv: Tensor, bias: Tensor | None, name: str, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """(out [B,T,H,d], log-sums float32) by a kernel that torch.compile cannot look into.

    `bias` is not read: only its gradient is asked for. `deterministic` only tells backward.
    """
    if name == "math-chunked":
        b, t, _, h, _ = qkv.shape
        return _chunked(qkv), qkv.new_empty(_sums_shape(name, b, t, h), dtype=torch.float32)
    q, k, v = qkv.unbind(2)
    if name in SDPA:
        out, sums = _aten(name, *(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2).contiguous(), sums.contiguous()
    package: Any = _loaded[name]
    if name == "flash-attn-4":
        out, sums = package.flash_attn_func(q, k, v, return_lse=True)
    else:
        out, sums = package.memory_efficient_attention_forward_requires_grad(q, k, v)
        sums = sums[..., : qkv.shape[1]]  # xformers pads some; its backward pads again
    return out.contiguous(), sums.contiguous()


@_packed_attention.register_fake
def _(qkv, bias, name, deterministic):
    b, t, _, h, d = qkv.shape
    sums = qkv.new_empty(_sums_shape(name, b, t, h), dtype=torch.float32)
    return qkv.new_empty((b, t, h, d)), sums


@torch.library.custom_op("fastrepa::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, sums: Tensor, name: str, deterministic: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(the gradient of qkv [B,T,3,H,d], its column sums [3 H d] float32 or wider if needed)."""
    q, k, v = qkv.unbind(2)
    if name in SDPA or name == "xformers":
        if name in SDPA:
            by_head = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
            grads = [x.transpose(1, 2) for x in _aten_backward(name, by_head, sums)]
        else:  # it asks torch itself whether the run is deterministic
            package: Any = _loaded[name]
            grads = package.memory_efficient_attention_backward(grad, out, sums, q, k, v)
        return _stacked(grads, need_bias)
    if name == "math-chunked":
        dqkv = _chunked_backward(grad, qkv)
    else:
        dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        dq, dk, dv = dqkv.unbind(2)
        _loaded[name]._flash_attn_bwd(
            q, k, v, out, grad, sums, deterministic=deterministic, dq=dq, dk=dk, dv=dv
        )
    return dqkv, column_sums(dqkv.flatten(0, 1).flatten(1)) if need_bias else sums.new_empty(0)


@_packed_attention_backward.register_fake
def _(grad, qkv, out, sums, name, deterministic, need_bias):
    _, _, _, h, d = qkv.shape
    dbias = qkv.new_empty(3 * h * d if need_bias else 0, dtype=launch.arithmetic_dtype(qkv))
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), dbias


_packed_attention_backward_call = first_order(_packed_attention_backward)


def _setup(ctx, inputs, output):
    qkv, bias, ctx.name, ctx.deterministic = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    out, sums = output
    ctx.save_for_backward(qkv, out, sums)
    ctx.mark_non_differentiable(sums)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    need_bias = ctx.needs_input_grad[1]
    dqkv, dbias = _packed_attention_backward_call(
        grad.contiguous(), *ctx.saved_tensors, ctx.name, ctx.deterministic, need_bias
    )
    return dqkv, dbias.to(ctx.bias_dtype) if need_bias else None, None, None


_packed_attention_call = differentiable(_packed_attention, setup_context=_setup, backward=_backward)


# torch's own kernels ------------------------------------------------------------------------------


def _aten(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, log-sums) of [B,H,T,d] each, without dropout."""
    aten = torch.ops.aten
    if name == "sdpa-cudnn":
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    if name == "sdpa-efficient":
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def _aten_backward(name: str, by_head: list[Tensor], sums: Tensor) -> Sequence[Tensor]:
    """(dq, dk, dv) of (grad, q, k, v, out), [B,H,T,d] each."""
    aten, given, q = torch.ops.aten, (*by_head, sums), by_head[1]
    if name == "sdpa-flash" and q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, False)
    tokens, unread = q.shape[2], q.new_empty((), dtype=torch.int64)  # of dropout: seed and offset
    if name == "sdpa-cudnn":
        return aten._scaled_dot_product_cudnn_attention_backward(
            *given, unread, unread, None, None, None, tokens, tokens, 0.0, False
        )
    if name == "sdpa-flash":
        return aten._scaled_dot_product_flash_attention_backward(
            *given, None, None, tokens, tokens, 0.0, False, unread, unread
        )
    return aten._scaled_dot_product_efficient_attention_backward(
        *given[:4], None, *given[4:], unread, unread, 0.0, [True, True, True, False]
    )[:3]


@triton.jit
def _stack_kernel(
    dq_ptr, dk_ptr, dv_ptr, out_ptr, sums_ptr, N, C,
    SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv [N,C] side by side into out [N,3C]; sums: of ROWS rows at a time, [splits,3C]."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    first = tl.program_id(1) * ROWS
    total_q = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    total_k = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    total_v = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, ROWS, BLOCK_N):
        n = first + start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        row = n.to(tl.int64)[:, None] * C  # int64
        inside = (n < N)[:, None] & (c < C)[None, :]
        dq = tl.load(dq_ptr + (row + c[None, :]), mask=inside, other=0.0)  # [BLOCK_N, BLOCK_C]
        dk = tl.load(dk_ptr + (row + c[None, :]), mask=inside, other=0.0)
        dv = tl.load(dv_ptr + (row + c[None, :]), mask=inside, other=0.0)
        at = out_ptr + (3 * row + c[None, :])
        tl.store(at, dq, mask=inside)
        tl.store(at + C, dk, mask=inside)
        tl.store(at + 2 * C, dv, mask=inside)
        if SUMS:  # reduced once, after the loop: no barrier within it
            total_q += dq.to(tl.float32)
            total_k += dk.to(tl.float32)
            total_v += dv.to(tl.float32)
    if SUMS:
        at = sums_ptr + (tl.program_id(1).to(tl.int64) * 3 * C + c)
        tl.store(at, tl.sum(total_q, 0), mask=c < C)
        tl.store(at + C, tl.sum(total_k, 0), mask=c < C)
        tl.store(at + 2 * C, tl.sum(total_v, 0), mask=c < C)


def _stacked(grads: Sequence[Tensor], sums: bool) -> tuple[Tensor, Tensor]:
    """(dq, dk, dv [B,T,H,d] each) as one [B,T,3,H,d], and with `sums` its column sums [3 H d]."""
    b, t, h, d = grads[0].shape
    wide = launch.arithmetic_dtype(grads[0])
    if not launch.use_triton(grads[0]):
        dqkv = torch.stack(list(grads), 2)
        dbias = column_sums(dqkv.view(b * t, 3 * h * d)) if sums else dqkv.new_empty(0, dtype=wide)
        return dqkv, dbias
    dq, dk, dv = (x.contiguous() for x in grads)  # torch's kernels lay them out as they are read
    dqkv = torch.empty((b, t, 3, h, d), dtype=dq.dtype, device=dq.device)
    n, c, table = b * t, h * d, launch.COLUMNS["stack"][launch.generation(dq.device)]
    splits = triton.cdiv(n, table.rows)
    parts = torch.empty((splits, 3 * c) if sums else (0,), dtype=wide, device=dq.device)
    if dqkv.numel():
        _stack_kernel[(triton.cdiv(c, table.block_c), splits)](
            dq, dk, dv, dqkv, parts, n, c, SUMS=sums, ROWS=table.rows, BLOCK_N=table.block_n,
            BLOCK_C=table.block_c, num_warps=table.num_warps,
        )  # fmt: skip
    return dqkv, sum_of_parts(parts) if sums else parts


# math-chunked -------------------------------------------------------------------------------------


def _chunked(qkv: Tensor) -> Tensor:
    b, t, _, h, d = qkv.shape
    out = qkv.new_empty((b, t, h, d))
    for part, into in _parts(qkv, out):
        probabilities, _, _, v = _probabilities(part)
        _write(into, probabilities @ v)
    return out


def _chunked_backward(grad: Tensor, qkv: Tensor) -> Tensor:
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    for part, grad_part, into in _parts(qkv, grad, dqkv):
        probabilities, q, k, v = _probabilities(part)
        dout = _by_head(grad_part)
        dscores = torch._softmax_backward_data(dout @ v.mT, probabilities, -1, v.dtype)
        _write(into[:, :, 0], (dscores @ k).mul_(part.shape[-1] ** -0.5))
        _write(into[:, :, 1], dscores.mT @ q)  # q is scaled already
        _write(into[:, :, 2], probabilities.mT @ dout)
    return dqkv


def _parts(qkv: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same samples and heads of each, as many as CPU_CHUNK allows; heads are next to last."""
    _, t, _, h, _ = qkv.shape
    matrices = CPU_CHUNK // max(1, t * t * _product_dtype(qkv.dtype).itemsize)
    samples, heads = max(1, matrices // max(1, h)), max(1, min(h, matrices))
    for group in zip(*(x.split(samples) for x in (qkv, *others)), strict=True):
        yield from zip(*(x.split(heads, -2) for x in group), strict=True)


def _probabilities(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(P [b h,T,T], q / sqrt(d), k, v [b h,T,d] each)."""
    q, k, v = (_by_head(x) for x in qkv.unbind(2))
    q = q * q.shape[-1] ** -0.5
    return (q @ k.mT).softmax(-1), q, k, v


def _by_head(x: Tensor) -> Tensor:
    """[b,T,h,d] -> [b h,T,d] in the dtype that products have."""
    return x.transpose(1, 2).to(_product_dtype(x.dtype)).flatten(0, 1)


def _write(into: Tensor, by_head: Tensor) -> None:
    """[b h,T,d] into [b,T,h,d]."""
    into.copy_(by_head.unflatten(0, (into.shape[0], into.shape[2])).transpose(1, 2))


@cache
def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if launch.cpu_multiplies(dtype) else torch.float32


# The public call ----------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def _resolved(
    backend: str, kind: str, index: int | None, dtype: torch.dtype, head_dim: int, strict: bool
) -> str:
    """The backend's name; while torch.compile traces it is found out once."""
    device = torch.device(kind) if index is None else torch.device(kind, index)
    return choose(device, dtype, head_dim, backend=backend, deterministic=strict).backend


def _check(qkv: Tensor, q_norm: Norm | None, k_norm: Norm | None) -> None:
    if qkv.ndim != 5 or qkv.shape[2] != 3 or not qkv.is_floating_point():
        raise ValueError(
            f"attention: qkv must be a floating-point [B, T, 3, H, d]; "
            f"got {tuple(qkv.shape)} {qkv.dtype}"
        )
    for argument, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        for part in norm or ():
            if part.shape != qkv.shape[-1:] or part.device != qkv.device:
                raise ValueError(
                    f"attention: {argument} must be two [{qkv.shape[-1]}] on {qkv.device}; got "
                    f"{tuple(part.shape)} on {part.device} "
                    "(under ZeRO-3, call this inside the owning module's forward)"
                )


def attention(
    qkv: Tensor,
    *,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over every head, no mask: qkv [B,T,3,H,d] -> [B,T,H,d].

    q_norm, k_norm: (weight [d], bias [d]) of a LayerNorm with `eps`. backend: of BACKENDS, or
    "auto" (see `choose`); under torch.use_deterministic_algorithms only those that are. Under
    torch.autocast qkv is cast to its dtype. bias [3 H d]: what was added, detached, to make qkv; it
    is not added again, but its gradient, the column sums of qkv's, is given here, by backends of
    PACKED and without norms only. Source: Vaswani et al. 2017, section 3.2.1.
    Raises ValueError where shapes do not fit or the backend cannot run here.
    """
    cast = launch.autocast_dtype(qkv)
    if cast is not None:
        qkv = qkv.to(cast)
    _check(qkv, q_norm, k_norm)
    if bias is not None and bias.shape != (qkv.shape[2:].numel(),):
        raise ValueError(
            f"attention: bias must be [{qkv.shape[2:].numel()}]; got {tuple(bias.shape)} "
            "(under ZeRO-3, call this inside the owning module's forward)"
        )
    deterministic = torch.are_deterministic_algorithms_enabled()
    device = qkv.device
    name = _resolved(backend, device.type, device.index, qkv.dtype, qkv.shape[-1], deterministic)
    return _run(name, qkv, bias, q_norm, k_norm, eps, deterministic)


def attention_cost(
    batch: int, tokens: int, heads: int, head_dim: int, itemsize: int, *, backward: bool = False
) -> Cost:
    """Two T x T products forward, five backward (the scores are computed again, as flash does).

    Forward reads qkv, writes the output and the fp32 log-sums; backward reads all of it and the
    output's gradient, and writes qkv's.
    """
    product = 2 * batch * heads * tokens * tokens * head_dim
    rows, sums = batch * tokens * heads * head_dim, 4 * batch * heads * tokens
    if backward:
        return Cost(flops=5 * product, bytes=itemsize * 8 * rows + sums)
    return Cost(flops=2 * product, bytes=itemsize * 4 * rows + sums)


def _counted(qkv: Sequence[int], backward: bool) -> int:
    b, t, _, h, d = qkv
    return attention_cost(b, t, h, d, 1, backward=backward).flops


# torch's counter sees neither op's inside.
register_flop_formula(torch.ops.fastrepa.packed_attention)(
    lambda qkv, *_, **__: _counted(qkv, backward=False)
)
register_flop_formula(torch.ops.fastrepa.packed_attention_backward)(
    lambda grad, qkv, *_, **__: _counted(qkv, backward=True)
)


def _aot_cases() -> list[AotCase]:
    pointers = dict.fromkeys(("dq_ptr", "dk_ptr", "dv_ptr", "out_ptr"), "*bf16")
    return [
        AotCase(
            _stack_kernel, "with sums" if sums else "without sums", generation,
            {**pointers, "sums_ptr": "*fp32"},
            {
                "SUMS": sums, "ROWS": table.rows, "BLOCK_N": table.block_n,
                "BLOCK_C": table.block_c,
            },
            table.num_warps, registers=128, shared=8192, wide_loads=3,
            long_offsets=("dq_ptr", "dk_ptr", "dv_ptr", "out_ptr"),
            traffic=Traffic(6 * table.block_n * table.block_c, 6 * table.block_n * table.block_c),
        )
        for generation, table in launch.COLUMNS["stack"].items()
        for sums in (False, True)
    ]  # fmt: skip


AOT_CASES = _aot_cases()
