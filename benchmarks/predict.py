"""One training step of SiT, line by line, ours and `plain+compile`'s: an estimate, never a record.

    python -m benchmarks.predict [--model SiT-XL/2] [--batch 256] [--json]

Every line is launches, bytes and FLOPs, counted from shapes by the operations' own cost functions
where there is one. Its time, in ms:

    max(FLOPs / rate, bytes / (share x copy), launches x smallest kernel) + launches x gap

Our kernels' shares of the copy rate are what aot.py estimates from their machine code; the rates of
copies, products and attention were measured on an H200; everything else is assumed, and printed.
Launches of the model are those tests/benchmarks/test_predict.py counts; of the optimiser's phase
and of the draws, the most that tests allow. Weights and activations are bf16 around an fp32
residual stream, targets are cached, one GPU. `plain+compile` is commands/bench/plain_step.py: its
blocks' bytes were counted in the code that Inductor (torch 2.11) made of two of them for sm_90.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
import triton

from benchmarks.cases import FEATURES, PROJECTOR, SIZES, Shape
from benchmarks.common import command_line
from fastrepa_kernels import adamw_ema, aot, launch
from fastrepa_kernels.activation import activation_cost
from fastrepa_kernels.adaln import gated_residual_layernorm_modulate_cost, layernorm_modulate_cost
from fastrepa_kernels.attention import attention_cost
from fastrepa_kernels.cost import Cost, matmul_cost

PARAMETERS = {"SiT-B/2": 137_845_008, "SiT-L/2": 465_955_600, "SiT-XL/2": 683_242_512}
PATCH_VALUES, LATENT_VALUES = 16, 4096  # of a token, of an image: 4 x 32 x 32 in patches of 2
MOST_DRAWS, MOST_OPTIMISER = 12, 40  # launches that tests of the two allow

# Bytes an element of [N, D] that Inductor's kernels move in one block, backward's weight gradients'
# casts apart: 3,473 MB and 8,305 MB at N = 65,536, D = 1152.
INDUCTOR_FORWARD, INDUCTOR_BACKWARD = 46, 110


@dataclass(frozen=True)
class Machine:
    """The device's assumed properties; rates a second, times in seconds.

    The first four are what an H200 did in the step that records/gpu_suite_h200* have: products and
    cuDNN's attention over the time of their kernels. Alone and for a moment products reach 792e12.
    """

    copy: float = 4.25e12
    products: float = 677e12
    attention_forward: float = 209e12
    attention_backward: float = 141e12
    torch_share: float = 0.80  # of the copy rate, by torch's and Inductor's pointwise kernels
    sums_share: float = 0.60  # by torch's sums over the rows of a tall matrix
    gap: float = 1.3e-6  # between one kernel and the next
    smallest: float = 2e-6  # of any kernel
    processors: int = 132


@dataclass(frozen=True)
class Line:
    name: str
    launches: int
    cost: Cost
    share: float = 1.0  # of the copy rate
    rate: float | None = None  # FLOPs a second, where they and not bytes may take the time

    def milliseconds(self, machine: Machine) -> float:
        compute = self.cost.flops / self.rate if self.rate else 0.0
        memory = self.cost.bytes / (self.share * machine.copy)
        busy = max(compute, memory, self.launches * machine.smallest)
        return 1000 * (busy + self.launches * machine.gap)


@dataclass(frozen=True)
class Step(Shape):
    """The shapes of a step: N = batch x tokens rows of width D, F = 4 D."""

    model: str = "SiT-XL/2"
    batch: int = 256
    tokens: int = 256
    keep_h: bool = True

    @property
    def depth(self) -> int:
        return SIZES[self.model][1]

    @property
    def elements(self) -> int:
        return self.rows * self.width


def case_names(step: Step) -> dict[str, str]:
    """Our kernels on the step's path: what each is called here -> its case of aot.py."""
    d = step.width
    again = "" if step.keep_h else ", f(a) again"
    rows = launch.COLUMNS["sums"][90].rows
    return {
        "norm": f"_norm_fwd_kernel gated width {d}",
        "first norm": f"_norm_fwd_kernel width {d}",
        "norm'": f"_norm_bwd_kernel gated y again width {d}",
        "first norm'": f"_norm_bwd_kernel y again width {d}",
        "GELU": "_activation_fwd_kernel gelu",
        "GELU'": f"_activation_bwd_kernel gelu{again}",
        "SiLU": "_activation_fwd_kernel silu",
        "SiLU'": "_activation_bwd_kernel silu",
        "stack": "_stack_kernel with sums",
        "sums": f"_column_sums_kernel {rows} rows",
        "cosine": f"_cosine_kernel bf16 target width {max(512, triton.next_power_of_2(FEATURES))}",
        "scale": f"_scale_kernel block {launch.FLAT['activation'][90].block}",
        "optimiser": f"_adamw_ema_kernel device flag block {launch.FLAT['optimiser'][90].block}",
    }


def compiled_shares(step: Step) -> dict[str, float]:
    """Take aot.py's estimate for each of `case_names`, by compiling them for sm_90."""
    cases = {case.name: case for case in aot.all_cases()}
    shares = {}
    for ours, name in case_names(step).items():
        share = aot.compile_case(cases[f"{name} sm_90"]).share
        assert share is not None, f"{name}: its case says no traffic"
        shares[ours] = share
    return shares


# What both do -------------------------------------------------------------------------------------


def _moved(count: float) -> Cost:
    return Cost(0, round(count))


def product_lines(step: Step, machine: Machine) -> list[Line]:
    """The products and attention of all blocks, forward and backward."""
    n, d, depth, rate = step.rows, step.width, step.depth, machine.products
    lines = []
    for name, k, m in (("qkv", d, 3 * d), ("proj", d, d), ("fc1", d, 4 * d), ("fc2", 4 * d, d)):
        forward = matmul_cost(n, m, k, 2)
        backward = matmul_cost(n, k, m, 2) + matmul_cost(m, k, n, 2)
        lines += [
            Line(f"product {name}", depth, forward * depth, rate=rate),
            Line(f"product {name}, backward", 2 * depth, backward * depth, rate=rate),
        ]
    for word, backward, speed, launches in (
        ("attention", False, machine.attention_forward, 1),
        ("attention, backward", True, machine.attention_backward, 3),
    ):
        cost = attention_cost(
            step.batch, step.tokens, step.heads, d // step.heads, 2, backward=backward
        )
        lines.append(Line(word, launches * depth, cost * depth, rate=speed))
    return lines


def small_lines(step: Step, machine: Machine) -> list[Line]:
    """Conditioning, both ends, the loss and the targets: torch's kernels."""
    n, d, b, depth, share = step.rows, step.width, step.batch, step.depth, machine.torch_share
    modulation = matmul_cost(b, 6 * d, d, 2)
    both = modulation + matmul_cost(b, d, 6 * d, 2) + matmul_cost(6 * d, d, b, 2)
    embed = 2 + 2 + 4 + 4 + 4 + (4 + 2 + 2 + 2)  # patches, to fp32, positions; backward's cast, dW
    final = matmul_cost(n, PATCH_VALUES, d, 2)
    ends = _moved(embed * step.elements) + final * 3
    return [
        # SiLU, a product; the six gradients joined, their sum, two products, SiLU', onto c's
        Line("adaLN modulation", 8 * depth, both * depth, share, machine.products),
        Line("patches, positions, final layer", 30, ends, share),
        Line("time and label embedding", 30, both, share),
        Line("loss and unpatchify", 20, _moved(20 * 4 * b * LATENT_VALUES), share),
        Line("targets to bf16", 3, _moved(n * FEATURES * 3), share),
    ]


# Ours ---------------------------------------------------------------------------------------------


def our_lines(step: Step, machine: Machine, shares: dict[str, float]) -> list[Line]:
    """List what a Trainer's step launches with `kernels: fused` in ZeRO 0, 1 or 2 on one rank."""
    b, t, d, n, depth = step.batch, step.tokens, step.width, step.rows, step.depth
    gated = gated_residual_layernorm_modulate_cost
    y = _moved(2 * step.elements)  # a bf16 [N, D]
    row = launch.rows("norm_backward", d, torch.device("cpu"))  # the table of sm_90

    def line(name: str, kernel: str, launches: int, cost: Cost) -> Line:
        return Line(name, launches, cost, shares[kernel])

    norms = 2 * depth  # gated: the first block has none, the final layer has one
    gelu = activation_cost(n, 4 * d, 2, backward=True)
    if not step.keep_h:
        gelu += _moved(2 * 4 * step.elements)
    parts = -(-t // row.split) * b * 3 * d * 4
    params = PARAMETERS[step.model]
    return [
        *product_lines(step, machine),
        line("norms", "norm", norms, gated(b, t, d, 4, 2) * norms),
        line("first norm", "first norm", 1, layernorm_modulate_cost(b, t, d, 4, 2)),
        line("GELU", "GELU", depth, activation_cost(n, 4 * d, 2) * depth),
        line(
            "norms, backward, and y", "norm'", norms,
            (gated(b, t, d, 4, 2, backward=True) + y) * norms,
        ),
        line(
            "first norm, backward, and y", "first norm'", 1,
            layernorm_modulate_cost(b, t, d, 4, 2, backward=True) + y,
        ),
        Line("norms' sums a sample", norms + 1, _moved(norms * parts), machine.torch_share),
        line("GELU', and h unless kept", "GELU'", 2 * depth, gelu * depth),
        line("dq, dk, dv in one, and its sums", "stack", 2 * depth, y * (6 * depth)),
        line("bias of fc2", "sums", 2 * depth, y * depth),
        Line("bias of proj", depth, y * depth, machine.sums_share),
        *our_projector_lines(step, machine, shares),
        Line("draws", MOST_DRAWS, _moved(12 * 4 * b * LATENT_VALUES), machine.torch_share),
        *small_lines(step, machine),
        Line(
            "gradients laid flat, their norm", MOST_OPTIMISER - 1, _moved(6 * params),
            machine.torch_share,
        ),
        line(
            "AdamW and EMA", "optimiser", 1,
            adamw_ema.adamw_ema_cost(params, grad_itemsize=2, low_itemsize=2),
        ),
    ]  # fmt: skip


def our_projector_lines(step: Step, machine: Machine, shares: dict[str, float]) -> list[Line]:
    """List projector_alignment, chunk by chunk, and its gradients scaled in backward."""
    n, d, p, z = step.rows, step.width, PROJECTOR, FEATURES
    chunk = min(n, launch.CUDA_CHUNK_ROWS[0])  # its buffers are under CHUNK_SHARE of an H200
    chunks = -(-n // chunk)
    weights = d * p + p * p + p * z
    programs = -(-n // launch.cosine_rows(chunk))
    cosine = n * (3 * 2 * z + 4) + programs * z * 4
    slow = _quantised(n, d, p, z, machine) / _quantised(chunk, d, p, z, machine)
    return [
        Line(
            "projector: products", 9 * chunks, _projector_products(n, d, p, z),
            rate=machine.products * min(1.0, 1 / slow),
        ),
        Line("projector: x to bf16", chunks, _moved(6 * n * d), machine.torch_share),
        Line(
            "projector: SiLU", 2 * chunks, activation_cost(n, p, 2) * 2, shares["SiLU"],
        ),
        Line(
            "projector: SiLU'", 2 * chunks + 2, activation_cost(n, p, 2, backward=True) * 2,
            shares["SiLU'"],
        ),
        Line("projector: cosine", chunks + 3, _moved(cosine), shares["cosine"]),
        Line(
            "projector: gradients scaled", 8, _moved(6 * n * d + 6 * weights), shares["scale"],
        ),
        # The gradient of the aligned block's output, fp32, onto the stream's.
        Line("projector: onto the stream", 1, _moved(12 * n * d), machine.torch_share),
    ]  # fmt: skip


def _projector_products(n: int, d: int, p: int, z: int) -> Cost:
    """Three products, and the gradients of both operands of each."""
    shapes = ((d, p), (p, p), (p, z))
    total = Cost(0, 0)
    for k, m in shapes:
        total += matmul_cost(n, m, k, 2) + matmul_cost(n, k, m, 2) + matmul_cost(m, k, n, 2)
    return total


def _quantised(rows: int, d: int, p: int, z: int, machine: Machine) -> float:
    """The share of processors that tiles of 128 x 256 keep busy in products of `rows` rows."""
    useful = busy = 0.0
    for width in (p, p, z, p, p, d):
        tiles = -(-rows // 128) * -(-width // 256)
        waves = -(-tiles // machine.processors)
        useful += rows * width / (128 * 256)
        busy += waves * machine.processors
    return useful / busy


# plain+compile ------------------------------------------------------------------------------------


def plain_lines(step: Step, machine: Machine) -> list[Line]:
    """List what a loop of torch.compile in bf16 autocast launches, without engine and kernels."""
    n, d, b, depth, share = step.rows, step.width, step.batch, step.depth, machine.torch_share
    p, z, params = PROJECTOR, FEATURES, PARAMETERS[step.model]
    forward, backward = INDUCTOR_FORWARD * step.elements, INDUCTOR_BACKWARD * step.elements
    # SiLU twice, forward and backward with its sums; z and y to the cosine, again, and dz.
    projector = 6 * n * d + 2 * (4 + 6 + 2) * n * p + (4 + 6 + 2) * n * z + 12 * n * d
    tensors = 10 * depth + 17  # trained ones; a foreach kernel takes about 30
    return [
        *product_lines(step, machine),
        Line("Inductor's kernels, forward", 4 * depth, _moved(depth * forward), share),
        Line("Inductor's kernels, backward", 14 * depth, _moved(depth * backward), share),
        Line("projector: products", 9, _projector_products(n, d, p, z), rate=machine.products),
        Line("projector: Inductor's kernels", 12, _moved(projector), share),
        Line("draws", 20, _moved(12 * 4 * b * LATENT_VALUES), share),
        *small_lines(step, machine),
        Line("weights to bf16", tensors, _moved(6 * params), share),
        Line("gradients to fp32", tensors, _moved(6 * params), share),
        Line("norm of the gradients, clipped", tensors // 15, _moved(12 * params), share),
        Line("fused AdamW, fp32", tensors // 30, _moved(28 * params), share),
        Line("foreach EMA", tensors // 30, _moved(12 * params), share),
    ]


# Printed ------------------------------------------------------------------------------------------


def milliseconds(lines: Iterable[Line], machine: Machine) -> float:
    return sum(line.milliseconds(machine) for line in lines)


def markdown(name: str, step: Step, lines: Sequence[Line], machine: Machine) -> str:
    total = milliseconds(lines, machine)
    text = [
        f"### {name}: {total:.1f} ms a step, {1000 * step.batch / total:.0f} images/s (estimate)",
        "",
        "| line | launches | GB | TFLOP | of copy | TFLOP/s | ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        rate = f"{line.rate / 1e12:.0f}" if line.rate else "-"
        text.append(
            f"| {line.name} | {line.launches:,} | {line.cost.bytes / 1e9:.2f} | "
            f"{line.cost.flops / 1e12:.2f} | {line.share:.0%} | {rate} | "
            f"{line.milliseconds(machine):.2f} |"
        )
    launches = sum(line.launches for line in lines)
    moved = sum(line.cost.bytes for line in lines) / 1e9
    flops = sum(line.cost.flops for line in lines) / 1e12
    text.append(f"| **sum** | {launches:,} | {moved:.1f} | {flops:.1f} | | | {total:.1f} |")
    return "\n".join(text)


# A line belongs to the first part whose words its name begins with; "" takes the others.
PARTS = {
    "products of the blocks": ("product ",),
    "attention": ("attention",),
    "rows: norms, GELU, biases, stacking": (
        "norms", "first norm", "GELU", "dq, dk, dv", "bias of", "Inductor's",
    ),
    "projector and cosine": ("projector",),
    "optimiser, averages, casts of weights": (
        "gradients laid", "AdamW", "weights to", "gradients to", "norm of the", "fused", "foreach",
    ),
    "draws, conditioning, ends, loss": ("",),
}  # fmt: skip


def side_by_side(step: Step, sides: dict[str, Sequence[Line]], machine: Machine) -> str:
    """The parts of a step, a column of ms for each side."""
    sums = {name: dict.fromkeys(PARTS, 0.0) for name in sides}
    for name, lines in sides.items():
        for line in lines:
            part = next(key for key, words in PARTS.items() if line.name.startswith(words))
            sums[name][part] += line.milliseconds(machine)
    totals = {name: sum(parts.values()) for name, parts in sums.items()}
    text = [f"| ms, estimated | {' | '.join(sides)} |", "|---|" + "---|" * len(sides)]
    for part in PARTS:
        text.append(f"| {part} | {' | '.join(f'{sums[name][part]:.1f}' for name in sides)} |")
    text.append(f"| **step** | {' | '.join(f'{total:.1f}' for total in totals.values())} |")
    speeds = (f"{1000 * step.batch / total:.0f}" for total in totals.values())
    text.append(f"| images/s | {' | '.join(speeds)} |")
    return "\n".join(text)


def main(arguments: list[str] | None = None) -> int:
    parser = command_line("predict", __doc__)
    m = Machine()
    parser.add_argument("--model", choices=sorted(PARAMETERS), default="SiT-XL/2")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--h-again", action="store_true", help="training.keep: none")
    parser.add_argument("--terabytes-per-s", type=float, default=m.copy / 1e12)
    parser.add_argument("--teraflops-per-s", type=float, default=m.products / 1e12)
    parser.add_argument("--json", action="store_true", help="one object instead of tables")
    options = parser.parse_args(arguments)
    machine = replace(
        m, copy=1e12 * options.terabytes_per_s, products=1e12 * options.teraflops_per_s
    )
    step = Step(options.model, options.batch, options.tokens, not options.h_again)
    shares = compiled_shares(step)
    sides: dict[str, Sequence[Line]] = {
        "ours": our_lines(step, machine, shares),
        "plain+compile": plain_lines(step, machine),
    }
    if options.json:
        found = {name: milliseconds(lines, machine) for name, lines in sides.items()}
        print(json.dumps({"ms": found, "shares": shares, "machine": asdict(machine)}))
        return 0
    print(f"{step.model}, {step.batch} images of {step.tokens} tokens: every number an estimate")
    print("Assumed: " + ", ".join(f"{key} {value:g}" for key, value in asdict(machine).items()))
    for name, lines in sides.items():
        print(f"\n{markdown(name, step, lines, machine)}")
    print(f"\n{side_by_side(step, sides, machine)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
