"""Philox and Box-Muller on Python's own numbers, one value at a time: what the bits must be."""

from __future__ import annotations

import math

# Random123, tests/kat_vectors, "philox4x32 10": counter, key, answer.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def scalar_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 as the paper writes it, on Python's unbounded integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def scalar_box_muller(word0: int, word1: int) -> tuple[float, float]:
    """The documented polynomials on Python's floats: one IEEE 754 rounding per operation."""

    def horner(x: float, coefficients: list[float]) -> float:
        value = coefficients[-1]
        for coefficient in coefficients[-2::-1]:
            value = value * x + coefficient
        return value

    mantissa, exponent = math.frexp((word0 + 0.5) * 2.0**-32)
    if mantissa < math.sqrt(0.5):
        mantissa, exponent = mantissa * 2, exponent - 1
    s = (mantissa - 1) / (mantissa + 1)
    log = exponent * math.log(2) + s * horner(s * s, [2 / (2 * k + 1) for k in range(11)])
    mantissa, exponent = math.frexp(log * -2)
    mantissa *= 1 + exponent % 2
    root = mantissa * 0.485 + 0.485
    for _ in range(4):
        root = (root + mantissa / root) * 0.5
    r = root * 2.0 ** (exponent // 2)
    a = (word1 % 2**30 - (2.0**29 - 0.5)) * (math.pi * 2.0**-31)
    cosine = horner(a * a, [(-1) ** k / math.factorial(2 * k) for k in range(10)])
    sine = a * horner(a * a, [(-1) ** k / math.factorial(2 * k + 1) for k in range(9)])
    if (word1 >> 30) % 2:
        cosine, sine = sine, cosine
    sign = -1 if word1 >> 31 else 1
    return sign * r * cosine, sign * r * sine
