"""SiLU and tanh-GELU as single passes; the backward also sums columns, for bias gradients.

    forward:   h = f(a)        backward:  da = dh f'(a),  sums = sum over rows of da

    SiLU(a) = a s(a)           SiLU'(a) = s (1 + a (1 - s))
    GELU(a) = a s(2u)          GELU'(a) = s + a s (1 - s) 2u',   u = k (a + 0.044715 a^3)
with s the logistic function and k = sqrt(2/pi): 0.5 (1 + tanh u) = s(2u). 1 - s is s of the other
sign: subtracted it would lose all its digits where GELU' multiplies it by a^3.

Shapes: N rows, C columns; a, h, dh, da [N,C] contiguous, sums [C] fp32. Nothing is saved here:
these are the pointwise halves of projector_alignment, adaln_mlp and linear_gelu, which own the
autograd. `out` may be one of the inputs. Backward can write h once more in its pass. Column sums
are two-stage, in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrepa_kernels import launch
from fastrepa_kernels.aot import AotCase
from fastrepa_kernels.aot.sass import Traffic
from fastrepa_kernels.cost import Cost
from fastrepa_kernels.language import tl, triton


@triton.jit
def _logistic(z):
    """Return (s(z), 1 - s(z)), both to their last digits."""
    e = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(z < 0, smaller, larger), tl.where(z < 0, larger, smaller)


@triton.jit
def _twice_u(a):
    return 1.5957691216057308 * (a + 0.044715 * a * a * a)  # 2 sqrt(2/pi)


@triton.jit
def _activation_fwd_kernel(a_ptr, h_ptr, size, GELU: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] int64
    mask = offs < size
    a = tl.load(a_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    s, _ = _logistic(_twice_u(a) if GELU else a)  # backward makes the same bits again
    tl.store(h_ptr + offs, (a * s).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _activation_bwd_kernel(
    dh_ptr, a_ptr, da_ptr, h_ptr, sums_ptr, N, C,
    GELU: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Walk down ROWS rows of BLOCK_C columns; sums [cdiv(N, ROWS), C]."""
    pid_c, pid_n = tl.program_id(0), tl.program_id(1)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, ROWS, BLOCK_N):
        offs_n = pid_n * ROWS + start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        offs = offs_n.to(tl.int64)[:, None] * C + offs_c[None, :]  # [BLOCK_N, BLOCK_C] int64
        mask = (offs_n < N)[:, None] & (offs_c < C)[None, :]
        a = tl.load(a_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_C]
        dh = tl.load(dh_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_C]
        s, one_minus_s = _logistic(_twice_u(a) if GELU else a)
        if GELU:
            slope = 1.5957691216057308 * (1.0 + 0.134145 * a * a)
            da = dh * (s + a * s * one_minus_s * slope)
        else:
            da = dh * s * (1.0 + a * one_minus_s)
        if h_ptr is not None:
            tl.store(h_ptr + offs, (a * s).to(h_ptr.dtype.element_ty), mask=mask)
        tl.store(da_ptr + offs, da.to(da_ptr.dtype.element_ty), mask=mask)
        if SUMS:
            acc += da  # masked rows loaded dh = 0; reduced once, no barrier within the loop
    if SUMS:
        offs = pid_n.to(tl.int64) * C + offs_c
        tl.store(sums_ptr + offs, tl.sum(acc, 0), mask=offs_c < C)


@triton.jit
def _column_sums_kernel(
    t_ptr, sums_ptr, N, C, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sum ROWS rows at a time: sums [cdiv(N, ROWS), C]."""
    pid_c, pid_n = tl.program_id(0), tl.program_id(1)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, ROWS, BLOCK_N):
        offs_n = pid_n * ROWS + start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        offs = offs_n.to(tl.int64)[:, None] * C + offs_c[None, :]  # [BLOCK_N, BLOCK_C] int64
        mask = (offs_n < N)[:, None] & (offs_c < C)[None, :]
        acc += tl.load(t_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    offs = pid_n.to(tl.int64) * C + offs_c
    tl.store(sums_ptr + offs, tl.sum(acc, 0), mask=offs_c < C)


MOST_PARTS = 1024
_GELU = 1.5957691216057308  # 2 sqrt(2/pi)
_BLOCK = 1 << 17  # elements: 2 MiB of buffers in fp32, which stay in a CPU's cache


def _twice_u_torch(x: Tensor, out: Tensor) -> Tensor:
    k = x.new_full((), _GELU)
    return torch.addcmul(k, x, x, value=0.044715 * _GELU, out=out).mul_(x)


def _gelu_torch(a: Tensor, out: Tensor) -> None:
    """Write GELU(a) to out, which may be `a`, block by block.

    By the logistic function, which costs a CPU a third of aten's tanh.
    """
    s = a.new_empty(min(_BLOCK, a.numel()), dtype=launch.arithmetic_dtype(a))
    for x, h in zip(a.view(-1).split(_BLOCK), out.view(-1).split(_BLOCK), strict=True):
        x = x.to(s.dtype)
        torch.mul(x, _twice_u_torch(x, s[: x.numel()]).sigmoid_(), out=h)


def _gelu_backward_torch(dh: Tensor, a: Tensor, out: Tensor, again: Tensor | None) -> None:
    """Write dh GELU'(a) to out, which may be `dh` or `a`, and GELU(a) to again, block by block.

    One logistic function serves both: a 2u' = 3 (2u) - 2 k' a with k' = 2 k, so that
    GELU' = s + 3 s (1 - s) (2u - 2/3 k' a).
    """
    wide = launch.arithmetic_dtype(a)
    buffers = a.new_empty((3, min(_BLOCK, a.numel())), dtype=wide)
    flat = (t.view(-1).split(_BLOCK) for t in (a, dh, out, out if again is None else again))
    for x, dh_part, da, h_part in zip(*flat, strict=True):
        slope, s, copy = buffers[:, : x.numel()]
        x = x if x.dtype == wide else copy.copy_(x)
        torch.sigmoid(_twice_u_torch(x, slope), out=s)
        slope.sub_(x, alpha=2 / 3 * _GELU)
        torch.ops.aten.sigmoid_backward.grad_input(slope, s, grad_input=slope)
        torch.add(s, slope, alpha=3, out=slope)
        if again is not None:
            torch.mul(x, s, out=h_part)
        torch.mul(slope, dh_part, out=da)  # which may be a: x is used up


def column_sums(t: Tensor) -> Tensor:
    """Sum t [N,C], contiguous, over its rows: [C] in fp32 (float64 for float64)."""
    wide = launch.arithmetic_dtype(t)
    if t.numel() and launch.use_triton(t):
        (n, c), table = t.shape, launch.COLUMNS["sums"][launch.generation(t.device)]
        num_pid_c, num_pid_n = triton.cdiv(c, table.block_c), triton.cdiv(n, table.rows)
        parts = torch.empty((num_pid_n, c), dtype=wide, device=t.device)
        _column_sums_kernel[(num_pid_c, num_pid_n)](
            t_ptr=t, sums_ptr=parts, N=n, C=c, ROWS=table.rows,
            BLOCK_N=table.block_n, BLOCK_C=table.block_c, num_warps=table.num_warps,
        )  # fmt: skip
        return sum_of_parts(parts)
    if t.is_cuda or t.dtype == wide:
        return t.sum(0, dtype=wide)
    total = t.new_zeros(t.shape[1], dtype=wide)
    for rows in t.split(max(1, _BLOCK // t.shape[1])):  # a CPU casts all it is given, then adds
        total += rows.sum(0, dtype=wide)
    return total


def sum_of_parts(parts: Tensor) -> Tensor:
    """Sum partial sums [S,C] over S: [C].

    Where S is in the hundreds aten's kernel, made for more rows, takes longer than ours.
    """
    if not 0 < len(parts) <= MOST_PARTS or not launch.use_triton(parts):
        return parts.sum(0)
    (s, c), table = parts.shape, launch.COLUMNS["parts"][launch.generation(parts.device)]
    total = torch.empty(c, dtype=parts.dtype, device=parts.device)
    _column_sums_kernel[(triton.cdiv(c, table.block_c), 1)](
        t_ptr=parts, sums_ptr=total, N=s, C=c, ROWS=triton.cdiv(s, table.rows) * table.rows,
        BLOCK_N=table.block_n, BLOCK_C=table.block_c, num_warps=table.num_warps,
    )  # fmt: skip
    return total


def activate(a: Tensor, out: Tensor, *, gelu: bool) -> None:
    """Write f(a) to out: [N,C] both, contiguous and of one dtype; `out` may be `a`."""
    if not launch.use_triton(a):
        if gelu:
            _gelu_torch(a, out)
        else:
            torch.ops.aten.silu.out(a, out=out)
    elif a.numel():
        flat = launch.FLAT["activation"][launch.generation(a.device)]
        _activation_fwd_kernel[(triton.cdiv(a.numel(), flat.block),)](
            a_ptr=a, h_ptr=out, size=a.numel(), GELU=gelu, BLOCK=flat.block,
            num_warps=flat.num_warps,
        )  # fmt: skip


def partial_rows(a: Tensor, rows: int) -> int:
    """Return how many rows of partial sums activate_backward gives for `rows` rows of a [N,C]."""
    if not launch.use_triton(a):
        return 1
    return triton.cdiv(rows, launch.COLUMNS["activation"][launch.generation(a.device)].rows)


def activate_backward(
    dh: Tensor, a: Tensor, out: Tensor, *, gelu: bool, sums: bool, again: Tensor | None = None,
    parts: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Write dh f'(a) to out: [N,C] all; if `sums`, return out's column sums [C].

    The sums are fp32 (float64 for float64). again [N,C]: receives f(a) in the same pass, where the
    forward's was not kept. parts [partial_rows(a, N),C]: receives partial sums, and nothing is
    returned; the caller adds them up.
    """
    if not launch.use_triton(a):
        if gelu:
            _gelu_backward_torch(dh, a, out, again)
        else:
            if again is not None:
                activate(a, again, gelu=False)
            torch.ops.aten.silu_backward.grad_input(dh, a, grad_input=out)
        if parts is not None:
            parts.copy_(column_sums(out))
        return column_sums(out) if sums and parts is None else None
    n, c = a.shape
    if not a.numel():
        return torch.zeros(c, device=a.device) if sums else None
    table = launch.COLUMNS["activation"][launch.generation(a.device)]
    num_pid_c, num_pid_n = triton.cdiv(c, table.block_c), triton.cdiv(n, table.rows)
    given = parts is not None
    if parts is None:
        parts = torch.empty((num_pid_n, c) if sums else (0,), dtype=torch.float32, device=a.device)
    _activation_bwd_kernel[(num_pid_c, num_pid_n)](
        dh_ptr=dh, a_ptr=a, da_ptr=out, h_ptr=again, sums_ptr=parts, N=n, C=c, GELU=gelu, SUMS=sums,
        ROWS=table.rows, BLOCK_N=table.block_n, BLOCK_C=table.block_c, num_warps=table.num_warps,
    )  # fmt: skip
    return sum_of_parts(parts) if sums and not given else None


def activation_cost(n: int, c: int, itemsize: int, *, backward: bool = False) -> Cost:
    """Count a pass over [n,c]: forward reads a, writes h; backward reads dh, a, writes da."""
    return Cost(
        flops=(12 if backward else 6) * n * c, bytes=(3 if backward else 2) * n * c * itemsize
    )


def _aot_cases() -> list[AotCase]:
    bf = "*bf16"
    cases = []
    for generation in launch.GENERATIONS:
        flat = launch.FLAT["activation"][generation]
        table = launch.COLUMNS["activation"][generation]
        cells = table.block_n * table.block_c
        for gelu in (False, True):
            label = "gelu" if gelu else "silu"
            cases.append(AotCase(
                _activation_fwd_kernel, label, generation, {"a_ptr": bf, "h_ptr": bf},
                {"GELU": gelu, "BLOCK": flat.block}, flat.num_warps, registers=64, shared=0,
                wide_loads=2, long_offsets=("a_ptr", "h_ptr"),
                traffic=Traffic(2 * flat.block, 2 * flat.block),
            ))  # fmt: skip
            for again in (False, True):
                cases.append(AotCase(
                    _activation_bwd_kernel, f"{label}{', f(a) again' if again else ''}", generation,
                    {"dh_ptr": bf, "a_ptr": bf, "da_ptr": bf, "h_ptr": bf, "sums_ptr": "*fp32"},
                    {
                        "GELU": gelu, "SUMS": True, "ROWS": table.rows,
                        "BLOCK_N": table.block_n, "BLOCK_C": table.block_c,
                        **({} if again else {"h_ptr": None}),
                    },
                    table.num_warps, registers=96, shared=8192, wide_loads=2,
                    long_offsets=("dh_ptr", "a_ptr", "da_ptr"),
                    traffic=Traffic(4 * cells, (4 if again else 2) * cells),
                ))  # fmt: skip
        sums = launch.COLUMNS["sums"][generation]
        cases.append(AotCase(
            _column_sums_kernel, f"{sums.rows} rows", generation,
            {"t_ptr": bf, "sums_ptr": "*fp32"},
            {"ROWS": sums.rows, "BLOCK_N": sums.block_n, "BLOCK_C": sums.block_c},
            sums.num_warps, registers=64, shared=8192, wide_loads=1, long_offsets=("t_ptr",),
            traffic=Traffic(2 * sums.block_n * sums.block_c, 0),
        ))  # fmt: skip
        parts = launch.COLUMNS["parts"][generation]
        cases.append(AotCase(
            _column_sums_kernel, "parts", generation, {"t_ptr": "*fp32", "sums_ptr": "*fp32"},
            {"ROWS": 256, "BLOCK_N": parts.block_n, "BLOCK_C": parts.block_c},
            parts.num_warps, registers=64, shared=8192, wide_loads=1, long_offsets=("t_ptr",),
        ))  # fmt: skip
    return cases


AOT_CASES = _aot_cases()
