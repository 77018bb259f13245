"""Keyed random values: each a function of (seed, stream, step, sample, element) alone.

The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC 2011), which turns a 128-bit counter under a 64-bit key into four 32-bit words:

    key      the seed
    word 0   block of four elements, element // 4 (of two for uniform values, element // 2)
    word 1   sample, its low 32 bits
    word 2   step
    word 3   stream (8 bits), then the sample's high 24 bits

    uniform  (w + 1/2) 2^-b of the b = 23 (fp32) or 52 (float64) highest bits of one or two words
    normal   r cos a, r sin a with r = sqrt(-2 log u): Box-Muller of two words

Shapes: B samples, any number of elements each. There is no state, nothing is saved and nothing has
a gradient. The torch path is the specification, and the kernel has ITS BITS, to the last: all is
integer and float64 arithmetic, and logarithm, square root, sine and cosine are written out in sums,
products and quotients, because those alone are rounded alike everywhere (IEEE 754). torch's own
functions differ in the last place between processors and libraries, on x86 its square root, too.
So the kernel must not contract a*b+c: it is compiled without fused multiply-adds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastrepa_kernels import launch
from fastrepa_kernels.aot import AotCase
from fastrepa_kernels.cost import Cost
from fastrepa_kernels.language import tl, triton

_WORD = 0xFFFFFFFF
# Philox4x32 multipliers less 2^32: with a 32-bit word the product then fits in a signed 64-bit.
_MULTIPLIER_0 = 0xD2511F53 - 2**32
_MULTIPLIER_1 = 0xCD9E8D57 - 2**32
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

# log(m) = 2 s (1 + s^2/3 + s^4/5 + ...) with s = (m-1)/(m+1): |s| < 0.172, last term below 2e-17.
_LOG = tl.constexpr(tuple(2.0 / (2 * k + 1) for k in range(11)))
# Taylor series on [-pi/4, pi/4]: the last terms are below 5e-17.
_SIN = tl.constexpr(tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(9)))
_COS = tl.constexpr(tuple((-1) ** k / math.factorial(2 * k) for k in range(10)))
_LOG_2 = tl.constexpr(math.log(2.0))
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_ANGLE = tl.constexpr(math.pi * 2.0**-31)  # radians a step of the 30-bit quarter circle

# Elements that one block of four words makes, and the dtypes that a draw may have.
_EACH = {"words": 4, "uniform": 2, "normal": 4}
_DTYPES = {
    "words": (torch.int64,),
    "uniform": (torch.float32, torch.float64),
    "normal": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
}


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply Philox4x32-10 to int64 tensors [...] of 32-bit words (0 <= word < 2^32), of one shape.

    Source: Salmon et al. 2011; agrees with the known answers of their Random123 library.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        # (M - 2^32) c = M c - 2^32 c: same low word, and a high word that is short of c.
        high0, high1 = (p0 >> 32) + c0, (p1 >> 32) + c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _WORD, high0 ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def keyed_random_reference(
    draw: str,
    seed: int,
    stream: int,
    step: int | Tensor,
    samples: Tensor,
    count: int,
    dtype: torch.dtype,
) -> Tensor:
    """The specification, with the arguments of `keyed_random`: samples [B] -> [B, count]."""
    sample = samples[:, None]  # [B, 1]
    block = torch.arange(-(-count // _EACH[draw]), device=samples.device)[None, :]  # [1, blocks]
    zero = torch.zeros_like(sample) + torch.zeros_like(block)  # [B, blocks]
    counter = (
        zero + block,
        zero + (sample & _WORD),
        zero + step,
        zero + ((sample >> 32) | (stream << 24)),
    )
    return values_of(draw, philox4x32(counter, (seed & _WORD, seed >> 32)), count, dtype)


def values_of(
    draw: str, words: tuple[Tensor, Tensor, Tensor, Tensor], count: int, dtype: torch.dtype
) -> Tensor:
    """Return the first `count` elements [B, count] that blocks of words, each [B, blocks], make."""
    w0, w1, w2, w3 = words
    if draw == "normal":
        lanes = [*_box_muller(w0, w1), *_box_muller(w2, w3)]
    elif draw == "uniform":
        lanes = [_cell(w0, w1, dtype), _cell(w2, w3, dtype)]
    else:
        lanes = [w0, w1, w2, w3]
    return torch.stack(lanes, -1).flatten(1)[:, :count].to(dtype)  # from [B, blocks, 2 or 4]


def _cell(high: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the middle of a word's cell: one of 2^23 in (0, 1) or, by two words, of 2^52."""
    if dtype == torch.float32:
        return ((high >> 9).double() + 0.5) * 2.0**-23
    return (((high << 20) | (low >> 12)).double() + 0.5) * 2.0**-52


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Return c0 + c1 x + c2 x^2 + ... by Horner's rule, one rounding per operation."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _log(x: Tensor) -> Tensor:
    """Return the natural logarithm of positive, normal float64 values, to a few 1e-16 relative."""
    mantissa, exponent = torch.frexp(x)  # mantissa in [1/2, 1)
    small = mantissa < _SQRT_HALF.value
    mantissa = torch.where(small, mantissa * 2.0, mantissa)  # [sqrt(1/2), sqrt(2))
    exponent = exponent.double() - small.double()
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return exponent * _LOG_2.value + s * _polynomial(s * s, _LOG.value)


def _sqrt(x: Tensor) -> Tensor:
    """Return the square root of positive, normal float64 values, to a few 1e-16 relative."""
    mantissa, exponent = torch.frexp(x)
    half = exponent.long() >> 1
    mantissa = torch.where(exponent & 1 == 1, mantissa * 2.0, mantissa)  # [1/2, 2)
    root = mantissa * 0.485 + 0.485  # within 3%; Heron's rule squares the error four times
    for _ in range(4):
        root = (root + mantissa / root) * 0.5
    return root * ((half + 1023) << 52).view(torch.float64)  # 2^half, by its bits


def _box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return two independent standard normals (float64) from two 32-bit words per element."""
    u = (radius.double() + 0.5) * 2.0**-32  # open interval: the logarithm is finite
    r = _sqrt(_log(u) * -2.0)
    # The low 30 bits pick a point on the quarter circle around angle 0, symmetric about it;
    # bit 30 mirrors it at the diagonal and bit 31 at the origin, which covers the circle evenly.
    a = ((angle & 0x3FFFFFFF).double() - (2.0**29 - 0.5)) * _ANGLE.value
    square = a * a
    cosine, sine = _polynomial(square, _COS.value), a * _polynomial(square, _SIN.value)
    mirrored = (angle >> 30) & 1 == 1
    r = torch.where(angle >> 31 == 1, -r, r)
    return r * torch.where(mirrored, sine, cosine), r * torch.where(mirrored, cosine, sine)


@triton.jit
def _horner(x, C: tl.constexpr, LAST: tl.constexpr):
    value = tl.full(x.shape, C[LAST], tl.float64)
    for i in tl.static_range(1, LAST + 1):
        value = value * x + C[LAST - i]
    return value


@triton.jit
def _frexp_of(x):
    """Return (mantissa in [1/2, 1), int64 exponent) of positive, normal float64, by their bits."""
    bits = x.to(tl.int64, bitcast=True)
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | (1022 << 52)).to(tl.float64, bitcast=True)
    return mantissa, (bits >> 52) - 1022


@triton.jit
def _log_of(x):
    mantissa, exponent = _frexp_of(x)
    # not a bare constant: in a comparison Triton 3.6 rounds it to fp32
    small = mantissa < tl.full(mantissa.shape, _SQRT_HALF, tl.float64)
    mantissa = tl.where(small, mantissa * 2.0, mantissa)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return (exponent - small.to(tl.int64)).to(tl.float64) * _LOG_2 + s * _horner(s * s, _LOG, 10)


@triton.jit
def _sqrt_of(x):
    mantissa, exponent = _frexp_of(x)
    mantissa = tl.where((exponent & 1) == 1, mantissa * 2.0, mantissa)
    root = mantissa * 0.485 + 0.485
    for _ in tl.static_range(4):
        root = (root + mantissa / root) * 0.5
    return root * (((exponent >> 1) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _box_muller_of(radius, angle):
    r = _sqrt_of(_log_of((radius.to(tl.float64) + 0.5) * 2.0**-32) * -2.0)
    a = ((angle & 0x3FFFFFFF).to(tl.float64) - 536870911.5) * _ANGLE  # 2^29 - 1/2
    square = a * a
    cosine, sine = _horner(square, _COS, 9), a * _horner(square, _SIN, 8)
    mirrored = ((angle >> 30) & 1) == 1
    r = tl.where((angle >> 31) == 1, -r, r)
    return r * tl.where(mirrored, sine, cosine), r * tl.where(mirrored, cosine, sine)


@triton.jit
def _cell_of(high, low, FLOAT64: tl.constexpr):
    if FLOAT64:
        cell = (high.to(tl.int64) << 20) | (low >> 12).to(tl.int64)
        return (cell.to(tl.float64) + 0.5) * 2.0**-52
    else:
        return ((high >> 9).to(tl.float64) + 0.5) * 2.0**-23


@triton.jit
def _values_of(w0, w1, w2, w3, DRAW: tl.constexpr, FLOAT64: tl.constexpr):
    """Return the elements of blocks of words [BLOCK]: [BLOCK, 2] or [BLOCK, 4]."""
    if DRAW == "uniform":
        return tl.join(_cell_of(w0, w1, FLOAT64), _cell_of(w2, w3, FLOAT64))
    else:
        if DRAW == "normal":
            v0, v1 = _box_muller_of(w0, w1)
            v2, v3 = _box_muller_of(w2, w3)
        else:
            v0, v1, v2, v3 = w0, w1, w2, w3
        # [BLOCK, 2, 2], and the last of a join is its fastest
        return tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), (w0.shape[0], 4))


# Words are u32 whatever their value: without the annotation a step of 1, of a multiple of 16 and
# of more than 31 bits would each compile the kernel again. `stream` is a word of the launcher's.
@triton.jit(do_not_specialize=["key0", "key1", "stream_id", "step"])
def _keyed_random_kernel(
    samples_ptr, step_ptr, out_ptr, key0: tl.uint32, key1: tl.uint32, stream_id: tl.uint32,
    step: tl.uint32, count, num_pid_n, stride_samples,
    DRAW: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draw BLOCK counters of one sample, EACH elements of each; out [B, count]."""
    pid = tl.program_id(0)
    row = (pid // num_pid_n).to(tl.int64)
    offs_block = (pid % num_pid_n).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] int64
    if step_ptr is not None:
        step = tl.load(step_ptr)
    sample = tl.load(samples_ptr + row * stride_samples)
    zeros = offs_block.to(tl.uint32) * 0  # [BLOCK]
    w0, w1, w2, w3 = tl.philox_impl(
        offs_block.to(tl.uint32),
        zeros + sample.to(tl.uint32),
        zeros + step.to(tl.uint32),
        zeros + ((sample >> 32).to(tl.uint32) | (stream_id.to(tl.uint32) << 24)),
        key0.to(tl.uint32),
        key1.to(tl.uint32),
    )
    out_dtype: tl.constexpr = out_ptr.dtype.element_ty
    values = _values_of(w0, w1, w2, w3, DRAW, out_dtype == tl.float64)
    if (out_dtype == tl.bfloat16) or (out_dtype == tl.float16):
        values = values.to(tl.float32)  # torch rounds a float64 twice on its way to a half dtype
    offs_n = offs_block[:, None] * EACH + tl.arange(0, EACH)[None, :]  # [BLOCK, EACH] int64
    tl.store(out_ptr + (row * count + offs_n), values.to(out_dtype), mask=offs_n < count)


@torch.library.custom_op("fastrepa::keyed_random", mutates_args=())
def _keyed_random(
    samples: Tensor,
    step_at: Tensor | None,
    key: list[int],
    stream: int,
    step: int,
    count: int,
    draw: str,
    dtype: torch.dtype,
) -> Tensor:
    if not launch.use_triton(samples):
        seed, when = key[0] | (key[1] << 32), step if step_at is None else step_at
        values = keyed_random_reference(draw, seed, stream, when, samples, count, dtype)
        return values.contiguous()
    out = torch.empty((samples.shape[0], count), dtype=dtype, device=samples.device)
    if out.numel():
        flat = launch.FLAT["keyed_random"][launch.generation(samples.device)]
        num_pid_n = triton.cdiv(count, flat.block * _EACH[draw])
        _keyed_random_kernel[(samples.shape[0] * num_pid_n,)](
            samples_ptr=samples, step_ptr=step_at, out_ptr=out, key0=key[0], key1=key[1],
            stream_id=stream, step=step, count=count, num_pid_n=num_pid_n,
            stride_samples=samples.stride(0), DRAW=draw, EACH=_EACH[draw], BLOCK=flat.block,
            num_warps=flat.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@_keyed_random.register_fake
def _(samples, step_at, key, stream, step, count, draw, dtype):
    return samples.new_empty((samples.shape[0], count), dtype=dtype)


def keyed_random(
    draw: str,
    seed: int,
    stream: int,
    step: int | Tensor,
    samples: Tensor,
    count: int,
    dtype: torch.dtype,
) -> Tensor:
    """Draw `count` values of each sample: [B, count] of `dtype` on the samples' device.

    draw: "normal" (fp32, float64, bf16, fp16; float64 values, rounded), "uniform" in the open
    interval (0, 1) (fp32, float64) or "words", raw and 32 bits long (int64). seed: 0 .. 2^64 - 1.
    stream: 0 .. 255. step: 0 .. 2^32 - 1, or a 0-d int64 tensor on the samples' device, which the
    host never reads. samples: int64 [B], 0 <= sample < 2^56; its values are not looked at either.

    Raises ValueError for a key or a count out of range and TypeError for other dtypes. Source:
    Salmon et al. 2011; Box and Muller 1958.
    """
    if draw not in _EACH:
        raise ValueError(f"draw: {draw!r} is none of {', '.join(map(repr, _EACH))}")
    if dtype not in _DTYPES[draw]:
        neither = "neither" if len(_DTYPES[draw]) > 1 else "not"
        raise TypeError(f"dtype: {dtype} is {neither} {' nor '.join(map(str, _DTYPES[draw]))}")
    if samples.dtype != torch.int64 or samples.dim() != 1:
        raise TypeError(f"samples: expected int64 [B], got {samples.dtype} {list(samples.shape)}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: {seed} is not in 0 .. 2^64 - 1")
    if not 0 <= stream < 2**8:
        raise ValueError(f"stream: {stream} is not in 0 .. 255")
    step_at = step if isinstance(step, Tensor) else None
    if isinstance(step, Tensor):
        if step.dtype != torch.int64 or step.dim() or step.device != samples.device:
            raise TypeError(
                f"step: expected int64 [] on {samples.device}, got {step.dtype} "
                f"{list(step.shape)} on {step.device}"
            )
        step = 0
    if not 0 <= step < 2**32:
        raise ValueError(f"step: {step} is not in 0 .. 2^32 - 1")
    if count > _EACH[draw] * 2**32:
        limit = 31 + _EACH[draw].bit_length()  # 2^32 blocks
        raise ValueError(f"shape: {count} elements a sample are more than 2^{limit}")
    key = [seed & _WORD, seed >> 32]
    return _keyed_random(samples, step_at, key, int(stream), step, count, draw, dtype)


def keyed_random_cost(n: int, itemsize: int) -> Cost:
    """Count n normal values, written once: 44 float64 operations each, a quotient being one."""
    return Cost(flops=44 * n, bytes=n * itemsize)


def _aot_cases() -> list[AotCase]:
    words = dict.fromkeys(("key0", "key1", "stream_id", "step"), "u32")
    cases = []
    for generation in launch.GENERATIONS:
        flat = launch.FLAT["keyed_random"][generation]
        for draw, out, absent in (
            ("normal", "*fp32", {"step_ptr": None}),
            ("normal", "*bf16", {}),
            ("normal", "*fp64", {}),
            ("uniform", "*fp32", {"step_ptr": None, "count": 1}),
            ("uniform", "*fp64", {}),
        ):
            cases.append(AotCase(
                _keyed_random_kernel, f"{draw} {out[1:]}{'' if absent else ', step on the device'}",
                generation,
                {"samples_ptr": "*i64", "step_ptr": "*i64", "out_ptr": out, **words},
                {
                    "DRAW": draw, "EACH": _EACH[draw], "BLOCK": flat.block, "stride_samples": 1,
                    **absent,
                },
                flat.num_warps, registers=64, shared=2048, wide_loads=0, fp_fusion=False,
                long_offsets=("out_ptr",),
            ))  # fmt: skip
    return cases


AOT_CASES = _aot_cases()
