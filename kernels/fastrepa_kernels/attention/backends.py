"""The backends of attention: what each is called, how it is loaded, and its call.

Shapes: B batch, T tokens, H heads, d head dimension; qkv [B,T,3,H,d], out [B,T,H,d].

torch's own kernels are called by their aten names: `scaled_dot_product_attention` would choose
again at every call. The gradient of qkv is written in place by flash-attn 2, 3, 4 and math-chunked;
the other backends give three tensors, which one pass puts together while it sums their columns,
which are the gradient of the bias that qkv's Linear added.

Only `math-chunked` is computed here: for a half dtype on a CPU, where flash attention's backward is
slow. The products of `attention_reference` for some samples and heads at a time, whose scores stay
in the cache and are made again in backward; it keeps nothing but qkv and the output.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrepa_kernels import launch
from fastrepa_kernels.activation import column_sums, sum_of_parts
from fastrepa_kernels.aot import AotCase
from fastrepa_kernels.aot.sass import Traffic
from fastrepa_kernels.language import tl, triton
from fastrepa_kernels.registration import differentiable, first_order

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


CPU_CHUNK = 1 << 20  # bytes of scores at a time

Norm = tuple[Tensor, Tensor]  # weight and bias of a LayerNorm over d


def attention_reference(
    qkv: Tensor, q_norm: Norm | None = None, k_norm: Norm | None = None, eps: float = 1e-5
) -> Tensor:
    """The specification, in whatever dtype it is given (float64 in tests).

    qkv [B,T,3,H,d]; q_norm, k_norm: (weight [d], bias [d]). Returns [B,T,H,d].
    """
    q, k, v = qkv.transpose(1, 3).unbind(2)  # [B,H,T,d]
    if q_norm is not None:
        q = F.layer_norm(q, q.shape[-1:], *q_norm, eps=eps)
    if k_norm is not None:
        k = F.layer_norm(k, k.shape[-1:], *k_norm, eps=eps)
    probabilities = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)  # [B,H,T,T]
    return (probabilities @ v).transpose(1, 2)


_loaded: dict[str, ModuleType] = {}


def load(name: str) -> str:
    """Load a backend's package into `_loaded`; return '' or why it cannot be."""
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
        return f"does not load ({first_line(e)})"
    return ""


def first_line(e: BaseException) -> str:
    """Return an error's type and the first line of what it says."""
    text = next((line.strip() for line in str(e).splitlines() if line.strip()), "")
    return f"{type(e).__name__}: {text[:160]}" if text else type(e).__name__


def run(
    name: str, qkv: Tensor, bias: Tensor | None, q_norm: Norm | None, k_norm: Norm | None,
    eps: float, deterministic: bool,
) -> Tensor:  # fmt: skip
    """Compute attention of qkv [B,T,3,H,d] by backend `name`: [B,T,H,d]."""
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
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B,H,T,d]
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
    """Return the shape of a backend's log-sums."""
    if name == "math-chunked":
        return b, h, 0
    if name == "sdpa-cudnn":
        return b, h, t, 1
    return b, h, -(-t // 32) * 32 if name == "sdpa-efficient" else t


@torch.library.custom_op("fastrepa::packed_attention", mutates_args=())
def _packed_attention(
    qkv: Tensor, bias: Tensor | None, name: str, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """Return (out [B,T,H,d], log-sums fp32) by a kernel that torch.compile cannot look into.

    `bias` is not read: only its gradient is asked for. `deterministic` only tells backward.
    """
    if name == "math-chunked":
        b, t, _, h, _ = qkv.shape
        return _chunked(qkv), qkv.new_empty(_sums_shape(name, b, t, h), dtype=torch.float32)
    q, k, v = qkv.unbind(2)  # [B,T,H,d], views
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
    """Return (dqkv [B,T,3,H,d], its column sums [3 H d], fp32 or float64, empty if not needed)."""
    q, k, v = qkv.unbind(2)  # [B,T,H,d], views
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
    """Return (out [B,H,T,d], log-sums) of q, k, v [B,H,T,d], without dropout."""
    aten = torch.ops.aten
    if name == "sdpa-cudnn":
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    if name == "sdpa-efficient":
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def _aten_backward(name: str, by_head: list[Tensor], sums: Tensor) -> Sequence[Tensor]:
    """Return (dq, dk, dv) of (grad, q, k, v, out), [B,H,T,d] each."""
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
    """Write dq, dk, dv [N,C] side by side to out [N,3C]; sums [cdiv(N, ROWS), 3C] of ROWS rows."""
    pid_c, pid_n = tl.program_id(0), tl.program_id(1)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    acc_q = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    acc_k = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, ROWS, BLOCK_N):
        offs_n = pid_n * ROWS + start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        row_start = offs_n.to(tl.int64)[:, None] * C  # [BLOCK_N, 1] int64
        mask = (offs_n < N)[:, None] & (offs_c < C)[None, :]
        offs = row_start + offs_c[None, :]  # [BLOCK_N, BLOCK_C] int64
        dq = tl.load(dq_ptr + offs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_C]
        dk = tl.load(dk_ptr + offs, mask=mask, other=0.0)
        dv = tl.load(dv_ptr + offs, mask=mask, other=0.0)
        out_ptrs = out_ptr + (3 * row_start + offs_c[None, :])
        tl.store(out_ptrs, dq, mask=mask)
        tl.store(out_ptrs + C, dk, mask=mask)
        tl.store(out_ptrs + 2 * C, dv, mask=mask)
        if SUMS:  # reduced once, after the loop: no barrier within it
            acc_q += dq.to(tl.float32)
            acc_k += dk.to(tl.float32)
            acc_v += dv.to(tl.float32)
    if SUMS:
        sums_ptrs = sums_ptr + (pid_n.to(tl.int64) * 3 * C + offs_c)
        tl.store(sums_ptrs, tl.sum(acc_q, 0), mask=offs_c < C)
        tl.store(sums_ptrs + C, tl.sum(acc_k, 0), mask=offs_c < C)
        tl.store(sums_ptrs + 2 * C, tl.sum(acc_v, 0), mask=offs_c < C)


def _stacked(grads: Sequence[Tensor], sums: bool) -> tuple[Tensor, Tensor]:
    """Stack (dq, dk, dv), [B,T,H,d] each, to [B,T,3,H,d]; with `sums`, its column sums [3 H d]."""
    b, t, h, d = grads[0].shape
    wide = launch.arithmetic_dtype(grads[0])
    if not launch.use_triton(grads[0]):
        dqkv = torch.stack(list(grads), 2)
        dbias = column_sums(dqkv.view(b * t, 3 * h * d)) if sums else dqkv.new_empty(0, dtype=wide)
        return dqkv, dbias
    dq, dk, dv = (x.contiguous() for x in grads)  # torch's kernels lay them out as they are read
    dqkv = torch.empty((b, t, 3, h, d), dtype=dq.dtype, device=dq.device)
    n, c, table = b * t, h * d, launch.COLUMNS["stack"][launch.generation(dq.device)]
    num_pid_c, num_pid_n = triton.cdiv(c, table.block_c), triton.cdiv(n, table.rows)
    parts = torch.empty((num_pid_n, 3 * c) if sums else (0,), dtype=wide, device=dq.device)
    if dqkv.numel():
        _stack_kernel[(num_pid_c, num_pid_n)](
            dq_ptr=dq, dk_ptr=dk, dv_ptr=dv, out_ptr=dqkv, sums_ptr=parts, N=n, C=c, SUMS=sums,
            ROWS=table.rows, BLOCK_N=table.block_n, BLOCK_C=table.block_c,
            num_warps=table.num_warps,
        )  # fmt: skip
    return dqkv, sum_of_parts(parts) if sums else parts


# math-chunked -------------------------------------------------------------------------------------


def _chunked(qkv: Tensor) -> Tensor:
    b, t, _, h, d = qkv.shape
    out = qkv.new_empty((b, t, h, d))
    for part, into in _parts(qkv, out):
        probabilities, _, _, v = _probabilities(part)  # [b h,T,T] and [b h,T,d]
        _write(into, probabilities @ v)
    return out


def _chunked_backward(grad: Tensor, qkv: Tensor) -> Tensor:
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    for part, grad_part, into in _parts(qkv, grad, dqkv):
        probabilities, q, k, v = _probabilities(part)
        dout = _by_head(grad_part)  # [b h,T,d], as q, k and v
        dscores = torch._softmax_backward_data(dout @ v.mT, probabilities, -1, v.dtype)
        _write(into[:, :, 0], (dscores @ k).mul_(part.shape[-1] ** -0.5))
        _write(into[:, :, 1], dscores.mT @ q)  # q is scaled already
        _write(into[:, :, 2], probabilities.mT @ dout)
    return dqkv


def _parts(qkv: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same samples and heads of each, as many as CPU_CHUNK allows; heads next to last."""
    _, t, _, h, _ = qkv.shape
    matrices = CPU_CHUNK // max(1, t * t * _product_dtype(qkv.dtype).itemsize)
    samples, heads = max(1, matrices // max(1, h)), max(1, min(h, matrices))
    for group in zip(*(x.split(samples) for x in (qkv, *others)), strict=True):
        yield from zip(*(x.split(heads, -2) for x in group), strict=True)


def _probabilities(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (P [b h,T,T], q / sqrt(d), k, v [b h,T,d] each) of qkv [b,T,3,h,d]."""
    q, k, v = (_by_head(x) for x in qkv.unbind(2))
    q = q * q.shape[-1] ** -0.5
    return (q @ k.mT).softmax(-1), q, k, v


def _by_head(x: Tensor) -> Tensor:
    """Lay [b,T,h,d] out as [b h,T,d], in the dtype that products have."""
    return x.transpose(1, 2).to(_product_dtype(x.dtype)).flatten(0, 1)


def _write(into: Tensor, by_head: Tensor) -> None:
    """Write [b h,T,d] into [b,T,h,d]."""
    into.copy_(by_head.unflatten(0, (into.shape[0], into.shape[2])).transpose(1, 2))


@cache
def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if launch.cpu_multiplies(dtype) else torch.float32


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
