"""keyed_random: Random123's known answers, and the same bits on every path."""

import math
import random

import pytest
import torch
import triton
import triton.language as tl

from fastrepa_kernels import keyed_random, launch
from fastrepa_kernels.keyed_random import (
    _EACH,
    _values_of,
    keyed_random_cost,
    keyed_random_reference,
    philox4x32,
    values_of,
)
from tests.kernels.scalar import KNOWN_ANSWERS, scalar_box_muller, scalar_philox
from tests.launches import counted, interpreted, run_compiling

SEED, STREAM = 0x89ABCDEF_01234567, 5
SAMPLES = [5, 0, 2**33 + 5, 2**32 - 1, 2**56 - 1, 17]
# Words around which something turns: the quarter circles, and the halving of log's argument, also
# where it differs from its rounding to fp32.
TURNS = [0, 1, 2**29, 2**30, 2**31, 2**32, *(math.ceil(math.sqrt(0.5) * 2**e) for e in (32, 31, 9))]
WORDS = sorted({w + d for w in TURNS for d in range(-40, 41) if 0 <= w + d < 2**32})
DRAWS = {
    "words": torch.int64,
    "uniform": torch.float32,
    "uniform64": torch.float64,
    "normal": torch.float32,
    "normal64": torch.float64,
    "normal16": torch.float16,
    "bf16": torch.bfloat16,
}


@triton.jit
def _philox_kernel(counter_ptr, out_ptr, key0: tl.uint32, key1: tl.uint32, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK) * 4
    words = tl.philox_impl(
        tl.load(counter_ptr + offs).to(tl.uint32),
        tl.load(counter_ptr + offs + 1).to(tl.uint32),
        tl.load(counter_ptr + offs + 2).to(tl.uint32),
        tl.load(counter_ptr + offs + 3).to(tl.uint32),
        key0.to(tl.uint32),
        key1.to(tl.uint32),
    )
    for i in tl.static_range(4):
        tl.store(out_ptr + offs + i, words[i].to(tl.int64))


@triton.jit
def _values_kernel(
    w_ptr, out_ptr,
    DRAW: tl.constexpr, FLOAT64: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, BLOCK)
    w0 = tl.load(w_ptr + offs * 4).to(tl.uint32)
    w1 = tl.load(w_ptr + offs * 4 + 1).to(tl.uint32)
    w2 = tl.load(w_ptr + offs * 4 + 2).to(tl.uint32)
    w3 = tl.load(w_ptr + offs * 4 + 3).to(tl.uint32)
    values = _values_of(w0, w1, w2, w3, DRAW, FLOAT64)
    tl.store(out_ptr + offs[:, None] * EACH + tl.arange(0, EACH)[None, :], values)


def padded(rows, device):
    """Return [BLOCK, 4] int64, filled up with zeros to a power of two."""
    size = triton.next_power_of_2(len(rows))
    return torch.tensor([*rows, *[[0] * 4] * (size - len(rows))], device=device)


def philox(rows, key, device):
    counter = padded(rows, device)
    if not launch.use_triton(counter):
        return torch.stack(philox4x32(tuple(counter.unbind(1)), key), 1)[: len(rows)].tolist()
    out = torch.zeros_like(counter)
    _philox_kernel[(1,)](
        counter_ptr=counter, out_ptr=out, key0=key[0], key1=key[1], BLOCK=len(counter)
    )
    return out[: len(rows)].tolist()


def made_of(words, draw, device):
    """Return float64 values of the blocks `words`, a list of lists of four: [N, 2 or 4]."""
    given, each = padded(words, device), _EACH[draw]
    if not launch.use_triton(given):
        blocks = tuple(w[:, None] for w in given.unbind(1))
        return values_of(draw, blocks, each, torch.float64)[: len(words)].cpu()
    out = torch.full((len(given), each), float("nan"), dtype=torch.float64, device=device)
    _values_kernel[(1,)](
        w_ptr=given, out_ptr=out, DRAW=draw, FLOAT64=True, EACH=each, BLOCK=len(given),
        enable_fp_fusion=False,
    )  # fmt: skip
    return out[: len(words)].cpu()


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(place_fp32, counter, key, answer):
    assert scalar_philox(counter, key) == answer  # the oracle of the other tests is right, too
    assert philox([counter], key, place_fp32.device) == [list(answer)]


def test_philox_equals_the_scalar_form_on_random_and_extreme_counters(place_fp32):
    rng = random.Random(1)
    words = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    counters = [tuple(rng.choice(words) for _ in range(4)) for _ in range(200)]
    counters += [tuple(rng.getrandbits(32) for _ in range(4)) for _ in range(800)]
    for key in ((0, 0), (2**32 - 1, 1), (rng.getrandbits(32), rng.getrandbits(32))):
        expected = [list(scalar_philox(c, key)) for c in counters]
        assert philox(counters, key, place_fp32.device) == expected


def test_the_layout_of_key_and_counter(place_fp32):
    """Runs are compared and resumed across versions and devices: the layout may not drift."""
    samples = torch.tensor(SAMPLES, device=place_fp32.device)
    for step in (0, 1, 16, 2**31, 0xFEDCBA98, 2**32 - 1):
        got = keyed_random("words", SEED, STREAM, step, samples, 10, torch.int64)
        expected = []
        for sample in SAMPLES:
            words: list[int] = []
            for block in range(3):
                counter = (block, sample % 2**32, step, (STREAM << 24) | sample >> 32)
                words += scalar_philox(counter, (SEED % 2**32, SEED >> 32))
            expected.append(words[:10])
        assert got.tolist() == expected


def test_normals_have_the_bits_of_plain_ieee_arithmetic(place_fp32):
    """They are equal on every device: no operation but sums, products and quotients."""
    rng = random.Random(2)
    blocks = [[w, rng.choice(WORDS), rng.getrandbits(32), w] for w in WORDS]
    blocks += [[rng.getrandbits(32) for _ in range(4)] for _ in range(2000)]
    expected = [[*scalar_box_muller(a, b), *scalar_box_muller(c, d)] for a, b, c, d in blocks]
    got = made_of(blocks, "normal", place_fp32.device)
    assert got.tolist() == expected
    assert (got.abs() <= math.sqrt(2 * 33 * math.log(2)) + 1e-12).all()


def test_uniforms_are_the_middles_of_open_cells(place_fp32):
    rng = random.Random(3)
    blocks = [[w, rng.choice(WORDS), rng.getrandbits(32), w] for w in WORDS]
    expected = [
        [(((high << 20) | (low >> 12)) + 0.5) / 2**52 for high, low in ((a, b), (c, d))]
        for a, b, c, d in blocks
    ]
    got = made_of(blocks, "uniform", place_fp32.device)
    assert got.tolist() == expected
    assert ((got > 0) & (got < 1)).all()
    single = values_of("uniform", torch.tensor(blocks).T[:, :, None], 2, torch.float32)
    assert single.tolist() == [[((w >> 9) + 0.5) / 2**23 for w in (a, c)] for a, _, c, _ in blocks]
    assert ((single > 0) & (single < 1)).all()


@pytest.mark.parametrize("name", DRAWS)
def test_the_kernel_has_the_bits_of_the_torch_path(place_fp32, name):
    draw, dtype = name.rstrip("0123456789"), DRAWS[name]
    if name == "bf16":
        draw = "normal"
        if place_fp32.device == "cpu" and place_fp32.backend == "triton":
            pytest.skip("the interpreter truncates to bf16")
    host = torch.tensor(SAMPLES)
    for count in (1, 2, 3, 5, 64, 1030):  # within a block, several, and several programs
        for step in (3, 2**32 - 1):
            expected = keyed_random_reference(draw, SEED, STREAM, step, host, count, dtype)
            samples = host.to(place_fp32.device)
            got = keyed_random(draw, SEED, STREAM, step, samples, count, dtype)
            assert got.dtype == dtype
            assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("word", [0, 1, 16, 2**31, 2**32 - 1])
def test_keys_at_the_ends_of_their_ranges(place_fp32, word):
    """Numbers that a launch might take for constants, or for signed."""
    host = torch.tensor(SAMPLES[-2:])
    for key in ((word, 7, 7), (word << 32 | 7, 7, 7), (7, word % 256, 7), (7, 7, word)):
        expected = keyed_random_reference("words", *key, host, 4, torch.int64)
        samples = host.to(place_fp32.device)
        got = keyed_random("words", *key, samples, 4, torch.int64)
        assert torch.equal(got.cpu(), expected)
    step = torch.tensor(word, device=place_fp32.device)
    got = keyed_random("words", 7, 7, step, samples, 4, torch.int64)
    assert torch.equal(got.cpu(), expected)


def test_samples_of_any_stride_and_none(place_fp32):
    rows = torch.arange(40, device=place_fp32.device).reshape(10, 4)
    for samples in (rows[:, 1], rows[3, 2].expand(7), rows[::3, 0]):
        got = keyed_random("normal", 1, 2, 3, samples, 6, torch.float32)
        dense = keyed_random("normal", 1, 2, 3, samples.clone().contiguous(), 6, torch.float32)
        assert got.is_contiguous()
        assert torch.equal(got, dense)
    assert keyed_random("normal", 1, 2, 3, rows[:0, 0], 6, torch.float32).shape == (0, 6)
    assert keyed_random("normal", 1, 2, 3, rows[0], 0, torch.float32).shape == (4, 0)


@interpreted
def test_a_draw_is_one_launch_and_never_waits():
    samples, step = torch.arange(3), torch.tensor(7)
    with launch.backend("triton"):
        for name, dtype in (("normal", torch.float32), ("uniform", torch.float64)):
            for when in (7, step):
                with counted() as launches:
                    keyed_random(name, SEED, STREAM, when, samples, 6, dtype)
                poison = "aten.fill_.Scalar"  # conftest.py's
                assert [n for n in launches if n != poison] == ["_keyed_random_kernel"]


def test_no_step_and_no_seed_compiles_the_kernel_again():
    """Triton compiles anew for 1, for multiples of 16 and beyond 31 bits, unless it is told not to.

    Asked of Triton's own key of a launch, in a process with its compiler.
    """
    program = """
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature
from fastrepa_kernels.keyed_random import _keyed_random_kernel as kernel
bind = create_function_from_signature(
    kernel.signature, kernel.params, CUDABackend(GPUTarget("cuda", 90, 32))
)
samples, out = torch.arange(8), torch.empty(8, 64)
words = (0, 1, 2, 16, 2**31 - 1, 2**31, 2**32 - 1)
def key(key0=7, key1=7, stream=7, step=7, count=64):
    given = (samples, None, out, key0, key1, stream, step, count, 8, 1)
    return str(bind(*given, DRAW="normal", EACH=4, BLOCK=128)[1])
names = ("key0", "key1", "stream", "step")
assert {key(**{n: w}) for n in names for w in words} == {key()}, "compiled again"
assert key(count=1) != key()  # the question is one that can be answered with yes
"""
    done = run_compiling("-c", program)
    assert done.returncode == 0, done.stderr[-2000:]


def test_registration():
    samples = torch.arange(3)
    for step_at in (None, torch.tensor(9)):
        for draw, count, dtype in (("normal", 5, torch.float16), ("uniform", 3, torch.float64)):
            torch.library.opcheck(
                torch.ops.fastrepa.keyed_random,
                (samples, step_at, [1, 2], 3, 4, count, draw, dtype),
            )


def test_compiled_graph_is_whole_and_agrees(place_fp32):
    backend = "inductor" if place_fp32.device == "cuda" else "aot_eager"
    samples = torch.arange(5, device=place_fp32.device)

    def noised(step):
        return keyed_random("normal", SEED, STREAM, step, samples, 9, torch.float32) * 2

    compiled = torch.compile(noised, fullgraph=True, backend=backend)
    for step in (3, 4, 2**32 - 1, torch.tensor(4, device=place_fp32.device)):
        assert torch.equal(compiled(step), noised(step))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"draw": "cauchy"}, ValueError, "draw: 'cauchy' is none of 'words', 'uniform', 'normal'"),
        ({"seed": -1}, ValueError, "seed: -1 is not in"),
        ({"seed": 2**64}, ValueError, "seed: 18446744073709551616 is not in"),
        ({"stream": 256}, ValueError, "stream: 256 is not in 0 .. 255"),
        ({"step": 2**32}, ValueError, "step: 4294967296 is not in"),
        ({"step": torch.tensor([1])}, TypeError, r"step: expected int64 \[\] on cpu, got"),
        ({"step": torch.tensor(1.0)}, TypeError, r"step: expected int64 .* torch.float32 \[\] on"),
        ({"step": torch.zeros((), dtype=torch.int64, device="meta")}, TypeError, "on meta$"),
        ({"samples": torch.zeros(2)}, TypeError, r"samples: expected int64 \[B\], got torch.float"),
        ({"samples": torch.arange(2)[:, None]}, TypeError, r"got torch.int64 \[2, 1\]"),
        ({"count": 2**34 + 1}, ValueError, r"shape: 17179869185 elements .* more than 2\^34"),
        (
            {"count": 2**33 + 1, "draw": "uniform"},
            ValueError, r"shape: 8589934593 elements .* more than 2\^33",
        ),
        ({"dtype": torch.int32}, TypeError, r"dtype: torch.int32 is neither torch.float32 nor"),
        ({"draw": "words"}, TypeError, r"dtype: torch.float32 is not torch.int64"),
        (
            {"draw": "uniform", "dtype": torch.float16},
            TypeError, r"dtype: torch.float16 is neither torch.float32 nor torch.float64$",
        ),
    ],
)  # fmt: skip
def test_errors_name_the_argument(change, error, words):
    given = {
        "draw": "normal", "seed": 0, "stream": 0, "step": 0, "samples": torch.arange(2),
        "count": 4, "dtype": torch.float32,
    }  # fmt: skip
    with pytest.raises(error, match=words):
        keyed_random(**given | change)


def test_cost():
    assert keyed_random_cost(10, 2).bytes == 20
