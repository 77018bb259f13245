"""A plan on the screen: what fits, what a step is made of, what it costs, what was assumed."""

from __future__ import annotations

from pathlib import Path

from rich.table import Column, Table
from rich.text import Text

from fastrepa.commands.plan.plan import STEP_PARTS, CapacityPlan, Estimate, assumed, plan_as_dict
from fastrepa.runtime.terminal import Terminal, print_table, say_json
from fastrepa.training.memory.sharding import HOST_PARTS, PARTS

WORDS = (
    "1 x 32: one forward of 32 images on each GPU for a step. Memory is that of a step, part by "
    "part at its highest moment; grids of samples are drawn at another. Communication "
    "under the arithmetic takes no time of its own. MFU: the model's FLOPs, nothing twice, of all "
    "GPUs' peak. Advised: ZeRO 0 or 1 with memory to spare, unless they need more than half of it "
    "and a higher stage or offload is a quarter faster."
)


def print_plan(plan: CapacityPlan, *, as_json: bool = False, picture: Path | None = None) -> None:
    """Print the plan, and draw it into `picture` where one is given."""
    if picture is not None:
        from fastrepa.commands.plan.picture import save_plan_picture

        save_plan_picture(plan, picture)
    if as_json:
        say_json(plan_as_dict(plan), indent=1)
        return
    console = Terminal()
    console.print(_headline(plan), soft_wrap=True)
    print_table(console, _memory(plan))
    print_table(console, _time(plan))
    for row in plan.rows:
        console.print(_verdict(plan, row.configured), soft_wrap=True)
        best = row.cheapest
        if best is None:
            text = f"nothing fits; the least is {_way(row.least)}: {_gb(row.least.total)} GB"
        elif best == row.configured:
            text = f"advised, too: {_way(best)}"
        else:
            text = f"advised: {_way(best)}: {_gb(best.total)} GB, {_cost(best)}"
        console.print(f"      {text}", soft_wrap=True)
    console.print(WORDS)
    print_table(console, _assumptions(plan))
    if picture is not None:
        console.print(f"drawn: {picture}", soft_wrap=True)


def _headline(plan: CapacityPlan) -> str:
    c, w = plan.config, plan.workload
    name = c.model.name or f"SiT {c.model.width} wide, {c.model.depth} deep, patch {c.model.patch}"
    parts = [
        f"{name}, {w.parameters.numel / 1e6:,.1f} M trained parameters",
        f"{w.training_flops / 1e12:.3g} TFLOP per image to train",
        *(f"{label} {f.flops / 1e9:.3g} GFLOP" for label, f in w.encoders),
    ]
    if w.codec_encoder:
        parts.append(f"codec {w.codec_encoder.flops / 1e9:.3g} GFLOP")
    parts.append(f"{c.training.steps:,} steps of {c.training.global_batch:,}, "
                 f"{c.training.precision}")  # fmt: skip
    return " · ".join(parts)


def _columns(plan: CapacityPlan, title: str) -> Table:
    counts = (row.configured.sharding.world for row in plan.rows)
    headings = (f"{count:,} GPU{'s' if count > 1 else ''}" for count in counts)
    numbers = (Column(heading, justify="right") for heading in headings)
    return Table("", *numbers, title=title, title_justify="left")


def _memory(plan: CapacityPlan) -> Table:
    table = _columns(plan, f"memory per GPU in GB, {plan.gpu.title}, as configured")
    table.add_row("", *(_way(r.configured, short=True) for r in plan.rows), style="dim")
    for part in PARTS:
        values = [r.configured.training[part] for r in plan.rows]
        if any(values):
            table.add_row(part, *(_gb(v) for v in values))
    table.add_section()
    capacity = plan.gpu.memory
    for name, of in (("a step", "training"), ("drawing samples", "sampling")):
        if of == "training" or plan.config.training.sample_every:
            totals = (sum(getattr(r.configured, of).values()) for r in plan.rows)
            table.add_row(name, *(_fit(total, capacity) for total in totals))
    table.add_row("highest in", *(r.configured.moment for r in plan.rows))
    table.add_section()
    _add_ways(table, plan)
    table.add_section()
    for part in HOST_PARTS:
        values = [r.configured.host[part] for r in plan.rows]
        if any(values):
            table.add_row(f"host memory: {part}", *(_gb(v) for v in values))
    if any(r.configured.nvme for r in plan.rows):
        table.add_row("NVMe", *(_gb(r.configured.nvme) for r in plan.rows))
    return table


def _add_ways(table: Table, plan: CapacityPlan) -> None:
    """Rows for every recompute and keep that some number of GPUs was planned with."""
    found: dict[str, dict[int, Estimate]] = {}
    for number, row in enumerate(plan.rows):
        for e in (row.configured, *row.others):
            s = e.sharding
            found.setdefault(f"recompute {s.recompute or 'none'}, keep {s.keep}", {})[number] = e
    for settings, by_row in found.items():
        each = [by_row.get(number) for number in range(len(plan.rows))]
        table.add_row(settings)
        table.add_row("    activations", *(_gb(e.activations) if e else "" for e in each))
        table.add_row("    together", *(_fit(e.total, plan.gpu.memory) if e else "" for e in each))


def _time(plan: CapacityPlan) -> Table:
    table = _columns(plan, "one step in ms, as configured")
    estimates = [r.configured for r in plan.rows]
    for part in STEP_PARTS:
        values = [e.step[part] for e in estimates]
        if any(values):
            table.add_row(part, *(_ms(v) for v in values))
    table.add_section()
    table.add_row("together", *(_ms(e.seconds) for e in estimates), style="bold")
    table.add_row("communication under the arithmetic", *(_ms(e.hidden) for e in estimates))
    table.add_row("sent per GPU, GB", *(_gb(e.sent) for e in estimates))
    table.add_section()
    table.add_row("generator, of peak", *(f"{e.efficiency:.0%}" for e in estimates))
    table.add_row("images/s", *(f"{e.images_per_second:,.0f}" for e in estimates))
    table.add_row(
        "images/s, as public runs", *(f"{e.public_images_per_second:,.0f}" for e in estimates)
    )
    table.add_row("MFU", *(f"{e.mfu:.1%}" for e in estimates))
    table.add_row("days", *(f"{e.days:,.2f}" for e in estimates))
    table.add_row("GPU-hours", *(f"{e.gpu_hours:,.0f}" for e in estimates))
    return table


def _assumptions(plan: CapacityPlan) -> Table:
    table = Table(
        "option or datum", Column("value", justify="right"),
        Column("meaning and source", overflow="fold"),
        title="assumed: estimates follow from these; nothing was measured on these GPUs",
        title_justify="left",
    )  # fmt: skip
    for name, value, why in assumed(plan):
        table.add_row(name, value, why)
    return table


def _verdict(plan: CapacityPlan, e: Estimate) -> str:
    capacity, count = plan.gpu.memory, f"{e.sharding.world:,}".rjust(5)
    part = e.first_too_much(capacity)
    if part is None:
        return f"{count} fits: {_gb(e.total)} of {_gb(capacity)} GB, {_cost(e)}"
    rest = capacity - (e.total - e.memory["activations"])
    why = f"{_gb(e.memory[part])} GB"
    if part == "activations":
        why += f" where {_gb(rest)} are left"
    return (
        f"{count} does not fit: {_gb(e.total)} of {_gb(capacity)} GB; first too much: {part}, {why}"
    )


def _way(e: Estimate, *, short: bool = False) -> str:
    s = e.sharding
    if short:
        return f"ZeRO {s.stage}, {s.forwards} x {s.micro}"
    words = [f"zero.stage={s.stage}", f"training.micro_batch={s.micro}",
             f"training.recompute={s.recompute or 'none'}", f"training.keep={s.keep}"]  # fmt: skip
    if s.offload != "none":
        words.append(f"zero.offload={s.offload}")
    if s.offloads_parameters:
        words.append("zero.offload_parameters=true")
    return " ".join(words)


def _cost(e: Estimate) -> str:
    public = ""
    if e.public_images_per_second < e.images_per_second:
        public = f" ({e.public_images_per_second:,.0f} as the best public run)"
    return (
        f"{e.images_per_second:,.0f} images/s{public}, MFU {e.mfu:.0%}, {e.days:,.2f} days, "
        f"{e.gpu_hours:,.0f} GPU-hours"
    )


def _fit(total: float, capacity: float) -> Text:
    return Text(_gb(total), "bold green" if total <= capacity else "bold red")


def _gb(value: float) -> str:
    return _tenths(value / 1e9)


def _ms(seconds: float) -> str:
    return _tenths(1e3 * seconds)


def _tenths(value: float) -> str:
    return "<0.1" if 0 < value < 0.05 else f"{value:,.1f}"
