"""The roofline of one SiT training step, operation by operation: an estimate, never a measurement.

    python -m benchmarks.predict --terabytes-per-s 4.0 --teraflops-per-s 790 --utilisation 0.6

Both ceilings are yours to give, best from a record (`ceiling_bytes_per_s`, `ceiling_flops_per_s`).
The step is estimated as its matrix products (three times the forward's FLOPs) at `utilisation` of
the product rate. Per operation: calls a step x (forward + backward floor of cost.py). A block is an
adaln_linear (norm and qkv), attention with its projection, and an adaln_mlp; both include products.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from benchmarks.cases import FEATURES, PROJECTOR, WIDTHS
from fastrepa_kernels import adamw_ema
from fastrepa_kernels.adaln_linear import adaln_linear_cost, adaln_mlp_cost
from fastrepa_kernels.cost import Ceilings, Cost, diffusion_transformer_flops
from fastrepa_kernels.projector_alignment import projector_alignment_cost

DEPTHS = {"SiT-S/2": 12, "SiT-B/2": 12, "SiT-L/2": 24, "SiT-XL/2": 28}
PARAMETERS = {"SiT-B/2": 137_845_008, "SiT-L/2": 465_955_600, "SiT-XL/2": 683_242_512}


@dataclass(frozen=True)
class Line:
    name: str
    calls: int
    parts: tuple[Cost, ...]  # forward and backward have floors of their own

    def milliseconds(self, ceilings: Ceilings) -> float:
        return 1000 * self.calls * sum(ceilings.floor_seconds(part) for part in self.parts)


def step_lines(model: str, batch: int, tokens: int) -> list[Line]:
    """bf16 weights and activations around an fp32 residual stream; bf16 gradients."""
    d, depth, n = WIDTHS[model], DEPTHS[model], batch * tokens

    shape = (batch, tokens, d)

    def half(function, out: int) -> tuple[Cost, Cost]:
        return function(*shape, out, 4, 2, residual=True), function(
            *shape, out, 4, 2, residual=True, backward=True
        )

    return [
        Line("adaln_linear", depth, half(adaln_linear_cost, 3 * d)),
        Line("adaln_mlp", depth, half(adaln_mlp_cost, 4 * d)),
        Line(
            "projector_alignment", 1,
            (projector_alignment_cost(n, d, PROJECTOR, FEATURES, 2, x_itemsize=4),),
        ),
        Line(
            "adamw_ema_", 1,
            (adamw_ema.adamw_ema_cost(PARAMETERS[model], grad_itemsize=2, low_itemsize=2),),
        ),
    ]  # fmt: skip


def step_milliseconds(
    model: str, batch: int, tokens: int, ceilings: Ceilings, utilisation: float
) -> float:
    forward = diffusion_transformer_flops(batch, tokens, WIDTHS[model], DEPTHS[model])
    return 1000 * 3 * forward / (utilisation * ceilings.flops_per_second)


def markdown(model: str, batch: int, tokens: int, ceilings: Ceilings, utilisation: float) -> str:
    step = step_milliseconds(model, batch, tokens, ceilings, utilisation)
    lines = [
        f"{model}, {batch} images of {tokens} tokens: {step:.0f} ms a step (estimate)",
        "",
        "| operation | calls | GB moved a step | TFLOP a step | floor ms | share of step |",
        "|---|---|---|---|---|---|",
    ]
    for line in step_lines(model, batch, tokens):
        moved = line.calls * sum(part.bytes for part in line.parts) / 1e9
        flops = line.calls * sum(part.flops for part in line.parts) / 1e12
        ms = line.milliseconds(ceilings)
        lines.append(
            f"| {line.name} | {line.calls} | {moved:.1f} | {flops:.2f} | {ms:.2f} | "
            f"{ms / step:.1%} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--terabytes-per-s", type=float, required=True)
    parser.add_argument("--teraflops-per-s", type=float, required=True)
    parser.add_argument("--utilisation", type=float, default=0.6)
    parser.add_argument("--model", choices=sorted(PARAMETERS), default="SiT-XL/2")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args(arguments)
    ceilings = Ceilings(1e12 * options.terabytes_per_s, 1e12 * options.teraflops_per_s)
    print(markdown(options.model, options.batch, options.tokens, ceilings, options.utilisation))
    return 0


if __name__ == "__main__":
    sys.exit(main())
