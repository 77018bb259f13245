"""The stages, their budgets, and the sizes of the real run and of its rehearsal. Imports no torch:
what starts and kills must not depend on what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A stage of the kit. seconds: its budget; module: what makes its items; compiles: if what the
    rows need is compiled beside it (precompile.py).
    """

    name: str
    seconds: float
    module: str
    compiles: bool = False


DALI = Stage("dali", 150, "decoding")
"""Apart from the others: it needs wheels that are many transfers large."""
STAGES = (
    Stage("ceilings", 60, "ceilings"),
    Stage("correct", 100, "operations", compiles=True),
    Stage("rows", 110, "operations"),
    Stage("step", 220, "steps"),
    Stage("rivals", 560, "steps"),
    Stage("others", 480, "steps"),
    Stage("tests", 150, "tests"),
    Stage("operations", 240, "operations"),
)


@dataclass(frozen=True)
class Item:
    """An item is measured, recorded and, past `limit` seconds, killed as one.

    estimate: seconds; where less is left it is not begun.
    """

    key: str
    run: Callable[[], Iterable[Record]]
    limit: float = 60.0
    estimate: float = 5.0


@dataclass(frozen=True)
class Turn:
    """One contender's training step: `batches` are tried until one fits."""

    name: str
    config: str
    overrides: tuple[str, ...]
    contender: str
    batches: tuple[int, ...]
    estimate: float
    profile: bool = False
    limit: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.contender}, {self.name}"


@dataclass(frozen=True)
class SuiteSize:
    """Sizes to measure with. model, tokens, batches: of operations; rows, width, recipes: of
    products.
    """

    name: str
    device: str
    dtype: str
    model: str
    tokens: int
    batches: tuple[int, ...]
    rows: int
    width: int
    recipes: tuple[str, ...]
    families: tuple[str, ...]
    """Of launch tables, most valuable first: what the label of a row in tune.py begins with."""
    compilers: int
    """Processes that compile for them."""
    rivals: tuple[str, ...]
    """Providers of row kernels, ours first."""
    repeats: int
    warmup: int
    steps: int
    turns: dict[str, tuple[Turn, ...]]
    tests: tuple[tuple[str, tuple[str, ...]], ...]
    """(key, pytest's arguments); the key also names the JUnit file."""
    images: int
    """Of the set that is decoded."""
    decode: tuple[str, ...]
    """Devices."""


B2, XL2 = (f"configs/imagenet256_sit_{size}2_dinov2b.yaml" for size in ("b", "xl"))
STORED = ("data.latents=cached", "vision.targets=cached")
ONLINE = ("data.latents=cached", "vision.targets=online", "vision.encoders.0.weights=random")
BATCHES = (256, 192, 128, 96, 64)


def _xl(contender: str, estimate: float, what: str = "stored", profile: bool = False) -> Turn:
    overrides = STORED if what == "stored" else ONLINE
    return Turn(f"SiT-XL/2, targets {what}", XL2, overrides, contender, BATCHES, estimate, profile)


def _b(contender: str, estimate: float) -> Turn:
    return Turn("SiT-B/2, targets stored", B2, STORED, contender, BATCHES, estimate)


_ALONE = "peak_memory or ceilings"
"""Tests that measure the device."""

FULL = SuiteSize(
    name="full", device="cuda", dtype="bf16", model="SiT-XL/2", tokens=256, batches=(8, 256),
    rows=65536, width=1152,
    recipes=("bf16", "fp8 tensorwise", "fp8 rowwise"),
    families=(
        "norm_backward 1152", "norm_forward 1152", "norm_sums", "activation", "columns stack",
        "columns activation", "cosine 1024", "optimiser", "columns residual", "columns sums",
        "norm_backward 768", "norm_forward 768",
    ),
    compilers=8,
    rivals=("ours", "eager"), repeats=20, warmup=3, steps=10,
    turns={
        "step": (_xl("ours", 75, profile=True),),
        "rivals": (
            _xl("plain+compile", 100), _xl("reference", 50), _xl("eager", 45),
            _xl("eager+compile", 110),
        ),
        "others": (
            _xl("ours+graphs", 110), _xl("ours", 60, "online"), _b("ours", 30),
            _b("plain+compile", 80), _b("ours+graphs", 50),
        ),
    },
    tests=(
        ("tests", ("-n", "8", "-m", "gpu", "tests/kernels", "-k", f"not ({_ALONE})")),
        ("tests-alone", ("-n", "1", "-m", "gpu", "tests/kernels", "-k", _ALONE)),
    ),
    images=512, decode=("cpu", "mixed"),
)  # fmt: skip

TINY = (
    "model.width=32", "model.depth=2", "model.heads=2", "alignment.projector_width=48",
    "vision.encoders.0.weights=random", "vision.encoders.0.input=32", "data.codec.side=8",
    "data.resolution=16", "training.precision=fp32",
)  # fmt: skip


def _tiny(contender: str, *more: str, limit: float = 240, profile: bool = False) -> Turn:
    name, config = " ".join(("tiny", *more)), "configs/quickstart.yaml"
    return Turn(name, config, (*TINY, *more), contender, (4, 2), 1, profile, limit)


TOY = SuiteSize(
    name="toy", device="cpu", dtype="fp32", model="SiT-S/2", tokens=16, batches=(1, 2), rows=16,
    width=16, recipes=("bf16", "fp8 tensorwise"), families=("activation",), compilers=1,
    rivals=("ours", "eager"), repeats=2, warmup=1, steps=2,
    turns={
        "step": (_tiny("ours", profile=True),),
        # The second fails, as its backend needs a GPU; the third takes longer than it may.
        "rivals": (
            _tiny("eager"), _tiny("ours", "attention.backend=sdpa-cudnn"),
            _tiny("ours", "seed=1", limit=0.5), _tiny("reference"),
        ),
        "others": (_tiny("plain+compile", limit=450),),
    },
    tests=(("tests", ("-n", "2", "tests/kernels/test_launch.py")),),
    images=64, decode=("cpu",),
)  # fmt: skip
SIZES = {size.name: size for size in (FULL, TOY)}
