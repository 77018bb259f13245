"""The cases that are measured: every operation, its rivals, its shapes and its roofline.

A provider is called with the same tensors as every other; "eager" is the operation's own reference,
vectorised, "compile" is torch.compile of it, "loop" (alignment only) goes sample by sample as the
published REPA code does. "ours" is the public function. Attention has every backend as a provider,
and "ours" is the one that fastrepa_kernels.attention chooses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrepa.config import SIT_MODELS
from fastrepa.model.operations import per_sample_alignment
from fastrepa_kernels import adaln, adamw_ema, cost, mlp
from fastrepa_kernels.adaln_linear import (
    adaln_linear,
    adaln_linear_cost,
    adaln_linear_reference,
    adaln_mlp,
    adaln_mlp_cost,
    adaln_mlp_reference,
)
from fastrepa_kernels.attention import (
    BACKENDS,
    attention,
    attention_cost,
    attention_reference,
    refusal,
)
from fastrepa_kernels.projector_alignment import (
    projector_alignment,
    projector_alignment_cost,
    projector_alignment_reference,
)

SIZES = {f"{name}/2": size for name, size in SIT_MODELS.items()}
PROJECTOR, FEATURES = 2048, 768


@dataclass(frozen=True)
class Shape:
    model: str
    batch: int
    tokens: int

    @property
    def width(self) -> int:
        return SIZES[self.model][0]

    @property
    def heads(self) -> int:
        return SIZES[self.model][2]

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    def __str__(self) -> str:
        return f"{self.model} b{self.batch} t{self.tokens}"


@dataclass(frozen=True)
class OperationInputs:
    """The tensors of one measurement.

    leaves get gradients (unless the case has no backward); fixed tensors do not.
    """

    leaves: list[Tensor]
    fixed: list[Tensor]
    upstream: list[Tensor]


Provider = Callable[[list[Tensor], list[Tensor]], tuple[Tensor, ...]]


def _nothing_against(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
    return ""


@dataclass(frozen=True)
class OperationCase:
    """An operation that is measured, with its rivals and its cost."""

    name: str
    build: Callable[[Shape, torch.dtype, torch.device], OperationInputs]
    providers: dict[str, Provider]
    cost: Callable[[Shape, int], dict[str, cost.Cost]]
    backward: bool = True
    row_kernels: bool = False
    """Kernels that take less time than autograd takes to launch them: on CUDA graphs are timed."""
    refusal: Callable[[str, Shape, torch.dtype, torch.device], str] = _nothing_against
    """Why a provider cannot be measured at a shape, '' where it can."""
    cpu_shapes: list[Shape] = field(default_factory=lambda: [Shape("SiT-S/2", 24, 256)])

    def shapes(self, device: torch.device) -> list[Shape]:
        return self.cpu_shapes if device.type == "cpu" else GPU_SHAPES


# Most valuable first: a run that is cut short has the rows that decide.
GPU_SHAPES = [
    Shape("SiT-XL/2", 256, 256),
    *(Shape(model, 256, 256) for model in ("SiT-B/2", "SiT-L/2")),
    *(Shape("SiT-XL/2", batch, 256) for batch in (32, 128)),
    *(Shape(m, b, 256) for m in ("SiT-B/2", "SiT-L/2") for b in (32, 128)),
    *(Shape(m, b, 1024) for b in (32, 128, 256) for m in ("SiT-XL/2", "SiT-B/2", "SiT-L/2")),
]


def _randn(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _modulated(per_sample: int, branch: bool, outputs: str) -> Callable[..., OperationInputs]:
    """Make x (and branch), then `per_sample` vectors [B,D] that are chunks of one tensor."""

    def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> OperationInputs:
        b, t, d = shape.batch, shape.tokens, shape.width
        x = _randn(device, torch.float32, b, t, d)
        vectors = _randn(device, dtype, b, per_sample * d).chunk(per_sample, dim=1)
        leaves = [x, *([_randn(device, dtype, b, t, d)] if branch else []), *vectors]
        upstream = [
            _randn(device, torch.float32 if kind == "x" else dtype, b, t, d) for kind in outputs
        ]
        return OperationInputs(leaves, [], upstream)

    return build


def _alignment(shape: Shape, dtype: torch.dtype, device: torch.device) -> OperationInputs:
    d, p, z = shape.width, PROJECTOR, FEATURES
    shapes = ((p, d), (p,), (p, p), (p,), (z, p), (z,))
    weights = [_randn(device, dtype, *s) * (s[-1] ** -0.5 if len(s) == 2 else 0.1) for s in shapes]
    x = _randn(device, torch.float32, shape.batch, shape.tokens, d)
    # Targets near the projections, as in training; cosines that cancel would leave a loss near 0.
    with torch.no_grad():
        part = x.to(dtype) @ weights[0].t()
        near = F.silu(F.silu(part) @ weights[2].t()) @ weights[4].t()
        target = near / near.float().std().to(dtype) + _randn(device, dtype, *near.shape)
    return OperationInputs([x, *weights], [target], [torch.ones((), device=device)])


def _linear_gelu(shape: Shape, dtype: torch.dtype, device: torch.device) -> OperationInputs:
    d, f = shape.width, 4 * shape.width
    x = _randn(device, dtype, shape.batch, shape.tokens, d)
    weight, bias = _randn(device, dtype, f, d) * d**-0.5, _randn(device, dtype, f)
    return OperationInputs(
        [x, weight, bias], [], [_randn(device, dtype, shape.batch, shape.tokens, f)]
    )


def _block_half(*widths: int) -> Callable[..., OperationInputs]:
    """Stream, branch, three vectors, and Linears from width to width (in multiples of D)."""

    def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> OperationInputs:
        b, t, d = shape.batch, shape.tokens, shape.width
        modulated = _modulated(3, True, "x")(shape, dtype, device)
        sizes = [w * d for w in widths]
        for i, o in itertools.pairwise(sizes):
            modulated.leaves.extend(
                (_randn(device, dtype, o, i) * i**-0.5, _randn(device, dtype, o))
            )
        out = _randn(device, dtype, b, t, sizes[-1])
        return OperationInputs(modulated.leaves, [], [*modulated.upstream, out])

    return build


def _linear_half(function: Callable) -> Callable:
    def call(x, branch, gate, shift, scale, weight, bias):
        return function(x, shift, scale, weight, bias, residual=(branch, gate))

    return call


def _mlp_half(function: Callable) -> Callable:
    def call(x, branch, gate, shift, scale, *weights):
        return function(x, shift, scale, weights, residual=(branch, gate))

    return call


def _optimiser(shape: Shape, dtype: torch.dtype, device: torch.device) -> OperationInputs:
    """A flat partition of width^2 x batch elements: 340M for SiT-XL/2 at batch 256."""
    size = shape.width**2 * shape.batch
    p, m, e = (_randn(device, torch.float32, size) for _ in range(3))
    v = _randn(device, torch.float32, size).square()
    return OperationInputs([], [p, _randn(device, dtype, size), m, v, e], [])


_RATES: dict[str, Any] = {
    "step": 100, "lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0,
    "ema_decay": 0.9999,
}  # fmt: skip


def _optimiser_ours(leaves: list[Tensor], fixed: list[Tensor]) -> tuple[Tensor, ...]:
    p, g, m, v, e = fixed
    adamw_ema.adamw_ema_(p, g, m, v, e, **_RATES)
    return p, m, v, e


def _optimiser_eager(leaves: list[Tensor], fixed: list[Tensor]) -> tuple[Tensor, ...]:
    """AdamW as torch writes it without fusion, then the EMA as training scripts write it."""
    p, g, m, v, e = fixed
    b1, b2 = _RATES["betas"]
    g = g.to(p.dtype)
    m.lerp_(g, 1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    root = v.sqrt().div_((1 - b2 ** _RATES["step"]) ** 0.5).add_(_RATES["eps"])
    p.addcdiv_(m, root, value=-_RATES["lr"] / (1 - b1 ** _RATES["step"]))
    e.mul_(_RATES["ema_decay"]).add_(p, alpha=1 - _RATES["ema_decay"])
    return p, m, v, e


def _plain(function: Callable) -> Provider:
    def call(leaves: list[Tensor], fixed: list[Tensor]) -> tuple[Tensor, ...]:
        outputs = function(*leaves)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return call


def _rivals(ours: Callable, eager: Callable) -> dict[str, Provider]:
    compiled = torch.compile(eager, dynamic=False)
    return {"ours": _plain(ours), "eager": _plain(eager), "compile": _plain(compiled)}


def _aligned(function: Callable) -> Provider:
    return lambda leaves, fixed: (function(leaves[0], leaves[1:], fixed[0]),)


def _both(function: Callable, *sizes: str) -> Callable[[Shape, int], dict[str, cost.Cost]]:
    """Forward and backward costs of adaLN operations, whose residual stream is fp32."""

    def costs(shape: Shape, itemsize: int) -> dict[str, cost.Cost]:
        at = (shape.batch, shape.tokens, shape.width, 4, itemsize)
        return {"forward": function(*at), "backward": function(*at, backward=True)}

    return costs


def _block_half_cost(function: Callable, out: int) -> Callable[[Shape, int], dict[str, cost.Cost]]:
    def costs(shape: Shape, itemsize: int) -> dict[str, cost.Cost]:
        d = shape.width
        at = (shape.batch, shape.tokens, d, out * d, 4, itemsize)
        return {
            "forward": function(*at, residual=True),
            "backward": function(*at, residual=True, backward=True),
        }

    return costs


def _alignment_cost(shape: Shape, itemsize: int) -> dict[str, cost.Cost]:
    """Count the whole alone: the forward of our op does all the work, eager's does a third."""
    at = (shape.rows, shape.width, PROJECTOR, FEATURES, itemsize)
    return {"both": projector_alignment_cost(*at, x_itemsize=4)}


def _attention(shape: Shape, dtype: torch.dtype, device: torch.device) -> OperationInputs:
    b, t, h, d = shape.batch, shape.tokens, shape.heads, shape.width // shape.heads
    return OperationInputs(
        [_randn(device, dtype, b, t, 3, h, d)], [], [_randn(device, dtype, b, t, h, d)]
    )


SCORES = 8 << 30  # bytes of T x T scores above which written-out attention is not measured


def _attention_refusal(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
    if name in BACKENDS and name != "math":
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return refusal(name, device, dtype, shape.width // shape.heads)
    size = shape.batch * shape.heads * shape.tokens**2 * (torch.finfo(dtype).bits // 8)
    if name != "ours" and size > SCORES:
        return f"its scores would be {size / 2**30:.0f} GiB"
    return ""


def _attention_cost(shape: Shape, itemsize: int) -> dict[str, cost.Cost]:
    at = (shape.batch, shape.tokens, shape.heads, shape.width // shape.heads, itemsize)
    return {"forward": attention_cost(*at), "backward": attention_cost(*at, backward=True)}


def _gelu_cost(shape: Shape, itemsize: int) -> dict[str, cost.Cost]:
    at = (shape.rows, shape.width, 4 * shape.width, itemsize)
    return {
        "forward": mlp.linear_gelu_cost(*at),
        "backward": mlp.linear_gelu_cost(*at, backward=True),
    }


def _optimiser_cost(shape: Shape, itemsize: int) -> dict[str, cost.Cost]:
    size = shape.width**2 * shape.batch
    return {"forward": adamw_ema.adamw_ema_cost(size, grad_itemsize=itemsize)}


CASES = {
    case.name: case
    for case in (
        OperationCase(
            "projector_alignment",
            _alignment,
            {
                "ours": _aligned(projector_alignment),
                "eager": _aligned(projector_alignment_reference),
                "compile": _aligned(torch.compile(projector_alignment_reference, dynamic=False)),
                "loop": _aligned(per_sample_alignment),
            },
            _alignment_cost,
        ),
        OperationCase(
            "adaln_mlp",
            _block_half(1, 4, 1),
            _rivals(_mlp_half(adaln_mlp), _mlp_half(adaln_mlp_reference)),
            _block_half_cost(adaln_mlp_cost, 4),
        ),
        OperationCase(
            "adaln_linear",
            _block_half(1, 3),
            _rivals(_linear_half(adaln_linear), _linear_half(adaln_linear_reference)),
            _block_half_cost(adaln_linear_cost, 3),
        ),
        OperationCase(
            "gated_residual_layernorm_modulate",
            _modulated(3, True, "xy"),
            _rivals(
                adaln.gated_residual_layernorm_modulate,
                adaln.gated_residual_layernorm_modulate_reference,
            ),
            _both(adaln.gated_residual_layernorm_modulate_cost),
            row_kernels=True,
        ),
        OperationCase(
            "attention",
            _attention,
            _rivals(attention, attention_reference)
            | {name: _plain(partial(attention, backend=name)) for name in BACKENDS},
            _attention_cost,
            refusal=_attention_refusal,
            cpu_shapes=[Shape("SiT-S/2", 32, tokens) for tokens in (64, 128, 256)],
        ),
        OperationCase(
            "adamw_ema",
            _optimiser,
            {
                "ours": _optimiser_ours,
                "eager": _optimiser_eager,
                "compile": torch.compile(_optimiser_eager, dynamic=False),
            },
            _optimiser_cost,
            backward=False,
            row_kernels=True,
        ),
        OperationCase(
            "linear_gelu",
            _linear_gelu,
            _rivals(mlp.linear_gelu, mlp.linear_gelu_reference),
            _gelu_cost,
        ),
        OperationCase(
            "layernorm_modulate",
            _modulated(2, False, "y"),
            _rivals(adaln.layernorm_modulate, adaln.layernorm_modulate_reference),
            _both(adaln.layernorm_modulate_cost),
            row_kernels=True,
        ),
        OperationCase(
            "gated_residual",
            _modulated(1, True, "x"),
            _rivals(adaln.gated_residual, adaln.gated_residual_reference),
            _both(adaln.gated_residual_cost),
            row_kernels=True,
        ),
    )
}
