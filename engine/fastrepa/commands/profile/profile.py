"""`fastrepa profile`: where every millisecond of a training step goes, measured.

The real trainer takes real steps, three times over: undisturbed, for the time of its regions
(training/meters.py); once while every operation is counted (operation_costs.py) and once while
reads of values are noted (host_syncs.py); and a few times under torch.profiler, which slows them
down, for the time of each operation. Rates are held against ceilings measured here (cost.py).
Seconds are per step, of the first rank.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from fastrepa.commands.profile.host_syncs import HostSync, HostSyncs
from fastrepa.config import Config, VisionConfig, config_from_dict
from fastrepa.data.datasets import located, open_data, with_classes
from fastrepa.errors import ConfigError, WeightsError, writing
from fastrepa.profiling.activity import Annotating, profiler
from fastrepa.profiling.operation_costs import NOTHING, OperationCosts, Parts
from fastrepa.profiling.random_batches import RandomBatches
from fastrepa.profiling.trace import PART, STEP, Operation, Trace, read_trace
from fastrepa.runtime.regions import NAMES, REGIONS
from fastrepa.runtime.threads import BUSY, others
from fastrepa.runtime.world import World
from fastrepa.training.look_ahead import Batches
from fastrepa.training.memory.decision import resolve_memory
from fastrepa.training.messages import first_line
from fastrepa.training.meters import image_flops
from fastrepa.training.run import Run
from fastrepa.training.trainer import Trainer
from fastrepa.training.zero.collectives import time_collectives
from fastrepa.training.zero.settings import micro_batch
from fastrepa.vision.registry import find_recipe
from fastrepa.vision.weights import find_package_weights
from fastrepa_kernels.cost import Ceilings, Cost, measure_ceilings

TRACED = 3  # steps under the profiler; more would only make the trace larger
MOST = 10_000  # steps, and warm-up steps
NOTABLE = 0.02  # of a step: what takes less is not worth a sentence
UNSTEADY = 1.5  # slowest step over fastest: no comparison is drawn from such
ENOUGH = 5  # readings that have a spread; on a GPU, for which reading waits, as many in all
SAME = ("data_wait", "encoder", "codec")  # regions of the same code whatever the kernels
WORST = 3  # operations, and gaps, that get one
AGAINST = ("eager",)
OWN_FILES = ("profile.json", "roofline.png", "step.png", "trace.json", "trace_eager.json")


@dataclass(frozen=True)
class Profile:
    """One trainer's step.

    line: its log line, undisturbed (images_per_s, shares, peak_memory_bytes, ...): of the median
    reading, which on the CPU is a step, on a GPU several; fastest, slowest: seconds of a step by
    reading; regions: seconds; spread: their 20th and 80th percentiles, of `readings`; host_syncs:
    where a GPU would be waited for, with how often a step.
    """

    kernels: str
    line: dict[str, float]
    fastest: float
    slowest: float
    regions: dict[str, float]
    spread: dict[str, tuple[float, float]]
    readings: int
    trace: Trace
    host_syncs: list[tuple[HostSync, int]]
    file: Path

    @property
    def seconds(self) -> float:
        return self.line["step_seconds"]


@dataclass(frozen=True)
class ProfileReport:
    """A profile and what it is compared with.

    profiles: as configured, then the others. said: what was real and what not.
    """

    config: Config
    device: str
    first_line: str
    steps: int
    said: list[str]
    ceilings: Ceilings
    profiles: list[Profile]
    folder: Path


def profile_run(
    config: Config,
    world: World,
    *,
    steps: int = 10,
    warmup: int = 3,
    out: Path,
    against: str | None = None,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> ProfileReport | None:
    """Profile training steps of `config` into folder `out`; None on every rank but the first.

    Nothing of the run's own folder is read or written. Raises ConfigError: an option that is not
    allowed, a folder that holds other things.
    """
    for option, value, low in (("--steps", steps, 1), ("--warmup", warmup, 1)):
        if not low <= value <= MOST:
            raise ConfigError(f"{option}: {value} is not between {low} and {MOST:,}")
    if against is not None and against not in AGAINST:
        raise ConfigError(f"--against: {against!r} is not one of {', '.join(AGAINST)}")
    if against == config.kernels:
        raise ConfigError(f"--against: the configuration's kernels are {against!r} already")
    if world.is_rank_0:
        _open_folder(out)
    config = resolve_memory(with_classes(config), world)
    busy = others() if world.device.type == "cpu" and world.is_rank_0 else None
    profiles, line = [], ""
    ways = [config.kernels, *([against] if against else [])]
    for number, kernels in enumerate(ways):

        def report(done: float, kernels: str = kernels, number: int = number) -> None:
            progress(f"{kernels} kernels", (number + done) / len(ways))

        changed = config.model_copy(update={"kernels": kernels})
        with _trainer(changed, world) as (trainer, batches, said):
            line = line or first_line(trainer)
            name = f"trace{'' if number == 0 else '_' + kernels}.json"
            profiles.append(_profile(trainer, batches, steps, warmup, out / name, report))
    dtype = config.training.dtype
    if not world.is_rank_0:
        return None
    progress("ceilings", 1.0)
    ceilings = measure_ceilings(world.device, dtype)
    device = "cpu"
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
    if busy is not None and busy > BUSY:
        said.append(f"warning: others took {busy:.0%} of the cores when this began")
    return ProfileReport(config, device, line, steps, said, ceilings, profiles, out)


def _open_folder(out: Path) -> None:
    with writing(f"--out: {out}"):
        out.mkdir(parents=True, exist_ok=True)
        strange = sorted(p.name for p in out.iterdir() if p.name not in OWN_FILES)
    if strange:
        raise ConfigError(f"--out: {out} holds {strange[0]}, which is no profile's; name another")


@dataclass(frozen=True)
class OperationGroup:
    """Operations that belong together, per step."""

    name: str
    calls: float
    seconds: float
    cost: Cost
    kernels: dict[str, float]

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds that the roofline allows."""
        return ceilings.floor_seconds(self.cost)

    @property
    def flops_per_second(self) -> float:
        return self.cost.flops / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_second(self) -> float:
        return self.cost.bytes / self.seconds if self.seconds else 0.0


def rows(
    operations: Iterable[Operation], name: Callable[[Operation], str | None]
) -> list[OperationGroup]:
    """Operations added up by what `name` calls them, None leaving one out; the longest first."""
    groups: dict[str, list[Operation]] = {}
    for operation in operations:
        key = name(operation)
        if key is not None:
            groups.setdefault(key, []).append(operation)
    out = []
    for key, group in groups.items():
        kernels: Counter[str] = Counter()
        for operation in group:
            kernels.update(operation.kernels)
        calls, seconds = sum(o.calls for o in group), sum(o.seconds for o in group)
        cost = sum((o.cost for o in group), NOTHING)
        out.append(OperationGroup(key, calls, seconds, cost, dict(kernels.most_common())))
    return sorted(out, key=lambda row: -row.seconds)


def by_operation(profile: Profile) -> list[OperationGroup]:
    return rows(profile.trace.operations, lambda o: o.name)


def by_part(profile: Profile) -> list[OperationGroup]:
    """The generator's parts, as "attention, forward"; the alignment is one, since its fused form
    computes the gradients in the forward pass.
    """

    def name(o: Operation) -> str | None:
        if o.part == "alignment":
            return "alignment, both ways"
        if o.region in ("forward", "backward"):
            return f"{o.part or 'losses and the rest'}, {o.region}"
        return None

    return rows(profile.trace.operations, name)


def findings(report: ProfileReport) -> list[str]:
    """Say what stands out, a sentence each: stalls, syncs, operations far above their floor, gaps,
    and what is slower than its rival.
    """
    ours, ceilings = report.profiles[0], report.ceilings
    out = []
    wait = ours.regions["data_wait"]
    if wait > NOTABLE * ours.seconds:
        out.append(
            f"data wait: {_ms(wait)} of {_ms(ours.seconds)} a step; the pipeline is the slower side"
        )
    for sync, times in ours.host_syncs:
        out.append(
            f"host sync: {sync.what} at {sync.where}, in {sync.region.replace('_', ' ')}"
            f"{f', {times} a step' if times > 1 else ''}: a GPU would be waited for"
        )
    traced = ours.trace.seconds
    known = (row for row in by_operation(ours) if row.cost.bytes)
    lost = sorted(known, key=lambda r: r.floor(ceilings) - r.seconds)[:WORST]
    for row in lost:
        floor = row.floor(ceilings)
        if row.seconds - floor > NOTABLE * traced:
            out.append(
                f"above its floor: {row.name}, {_ms(row.seconds)} a step "
                f"({row.seconds / traced:.0%}) where the roofline allows {_ms(floor)}"
            )
    for gap in ours.trace.gaps[:WORST]:
        if gap.seconds > NOTABLE * traced:
            out.append(
                f"idle: {_ms(gap.seconds)} a step in {gap.region.replace('_', ' ')}, after "
                f"{gap.after} and before {gap.before}"
            )
    unsteady = [p for p in report.profiles if p.slowest > UNSTEADY * p.fastest]
    for p in unsteady:
        out.append(
            f"unsteady: steps with {p.kernels} kernels took {_ms(p.fastest)} to {_ms(p.slowest)}; "
            f"take more, on a quieter machine"
        )
    for rival in report.profiles[1:] if not unsteady else []:
        out += _slower(ours, rival)
    return out


def _slower(ours: Profile, rival: Profile) -> list[str]:
    """Name the regions in which ours is slower by more than both spreads, unless the machine was
    not the same for both: regions of the same code tell.
    """

    def apart(a: Profile, b: Profile, name: str) -> bool:
        notable = a.regions[name] - b.regions[name] > NOTABLE * ours.seconds
        return notable and a.spread[name][0] > b.spread[name][1]

    def both(name: str) -> str:
        against = f"{_ms(ours.regions[name])} against {_ms(rival.regions[name])}"
        return f"{name.replace('_', ' ')}, {against}"

    readings = min(ours.readings, rival.readings)
    if readings < ENOUGH:
        return [f"not compared with {rival.kernels}: {readings} are too few steps for a spread"]
    moved = [n for n in SAME if apart(ours, rival, n) or apart(rival, ours, n)]
    if moved:
        return [
            f"not compared with {rival.kernels}: the machine changed meanwhile; {both(moved[0])}, "
            f"is the same code in both"
        ]
    names = [n for n in REGIONS if n not in SAME and apart(ours, rival, n)]
    return [f"slower than {rival.kernels}: {both(name)}" for name in names]


def report_as_dict(report: ProfileReport) -> dict[str, Any]:
    """Return a profile for programs: seconds, FLOPs and bytes per step."""
    c = report.ceilings

    def measures(row: OperationGroup) -> dict[str, Any]:
        return {
            "name": row.name, "calls": row.calls, "seconds": row.seconds, "flops": row.cost.flops,
            "bytes": row.cost.bytes, "floor_seconds": row.floor(c), "kernels": row.kernels,
        }  # fmt: skip

    return {
        "device": report.device,
        "run": report.first_line,
        "said": report.said,
        "steps": report.steps,
        "ceilings": asdict(c),
        "findings": findings(report),
        "profiles": [
            {
                "kernels": p.kernels,
                "step_seconds": p.seconds,
                "fastest_seconds": p.fastest,
                "slowest_seconds": p.slowest,
                "region_seconds": p.regions,
                "region_spread_seconds": p.spread,
                "mfu_of_ceiling": mfu_of_ceiling(report, p),
                "line": p.line,
                "traced_step_seconds": p.trace.seconds,
                "busy_seconds": p.trace.busy_seconds,
                "parts": [measures(row) for row in by_part(p)],
                "operations": [measures(row) for row in by_operation(p)],
                "gaps": [asdict(gap) for gap in p.trace.gaps],
                "host_syncs": [{**asdict(s), "times": n} for s, n in p.host_syncs],
                "trace": p.file.name,
            }
            for p in report.profiles
        ],
    }


def mfu_of_ceiling(report: ProfileReport, profile: Profile) -> float:
    """Model FLOPs against the matrix-product rate measured here."""
    return profile.line["model_flops_per_s"] / report.ceilings.flops_per_second


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.{1 if seconds < 0.1 else 0}f} ms"


# The trainer ------------------------------------------------------------------------------------


@contextmanager
def _trainer(config: Config, world: World) -> Iterator[tuple[Trainer, Batches, list[str]]]:
    """Yield (trainer, its batches, what is real): data and weights are the real ones where they
    are here; otherwise the weights are random and the images noise, as in a dry run.
    """
    vision, said = _with_weights_that_are_here(config.vision)
    config = config.model_copy(update={"vision": vision})
    codec_here = not config.data.codec.is_autoencoder or _on_disk(config.data.codec.weights)
    real = located(config.data.path).is_dir() and codec_here
    with tempfile.TemporaryDirectory() as folder:
        # No checkpoint is there: the weights are a new run's. It is not evaluated.
        config = config_from_dict(
            {**config.model_dump(mode="json"), "run": str(Path(folder) / "run"), "evaluation": {}}
        )
        if real:
            open_data(config.data.path, resolution=config.data.resolution)
            run = Run(config, world)
            said.append(f"data: read from {config.data.path}")
            with run.open_pipeline() as pipeline:
                yield run.trainer, pipeline, said
            return
        trainer = Trainer(config, world)
        why = "its autoencoder is not here" if not codec_here else "it is not here"
        said.append(f"data: noise instead of {config.data.path} ({why}); its reading is not timed")
        size = micro_batch(config.training, world.size)[0]
        yield trainer, RandomBatches(trainer, world.device, size), said


def _with_weights_that_are_here(vision: VisionConfig) -> tuple[VisionConfig, list[str]]:
    """The section with random weights for encoders that would have to be downloaded."""
    if vision.cached_targets:
        return vision, ["targets: the data set's" if vision.encoders else "no encoder"]
    encoders, said = [], []
    for encoder in vision.encoders:
        here = encoder.weights == "random" or _weights_are_here(encoder.name, encoder.weights)
        encoders.append(encoder if here else encoder.model_copy(update={"weights": "random"}))
        how = "its weights" if here and encoder.weights != "random" else "random weights"
        said.append(f"{encoder.name}: {how}")
    return vision.model_copy(update={"encoders": tuple(encoders)}), said or ["no encoder"]


def _weights_are_here(name: str, weights: str) -> bool:
    if weights.startswith("package:"):
        try:
            return bool(find_package_weights(weights.removeprefix("package:")))
        except WeightsError:
            return False
    if weights != "hub":
        return Path(weights).is_file()
    import timm

    source = timm.get_pretrained_cfg(find_recipe(name).timm_name)
    return bool(source and source.hf_hub_id and _on_disk(source.hf_hub_id, "model.safetensors"))


def _on_disk(weights: str, file: str = "config.json") -> bool:
    """Tell whether a local folder, or the hub's cache, holds a model."""
    if Path(weights).is_dir():
        return True
    try:
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(weights, file), str)
    except (ImportError, ValueError):
        return False


# Measuring --------------------------------------------------------------------------------------


def _profile(
    trainer: Trainer,
    batches: Batches,
    steps: int,
    warmup: int,
    file: Path,
    report: Callable[[float], None],
) -> Profile:
    world, config = trainer.world, trainer.config
    traced = min(steps, TRACED)
    total, done = warmup + steps + traced + 3, 0

    def step() -> None:
        nonlocal done
        trainer.meter.add(trainer.train_step(batches))
        done += 1
        report(done / total)

    for _ in range(warmup):
        step()
    meter = trainer.meter
    meter.flops = image_flops(config, world.device, cached_latents=trainer.cached_latents)
    _synchronize(world)
    meter.reset()
    lines = []
    # Reading waits for a GPU, which a step does not: a few times in all, or once.
    each = 1 if world.device.type == "cpu" else steps // ENOUGH if steps >= 2 * ENOUGH else steps
    for number in range(steps // each * each):
        step()
        if (number + 1) % each == 0:
            lines.append(meter.read(trainer.step, 0.0, 0.0))
    lines.sort(key=lambda read: read["step_seconds"])
    line = lines[len(lines) // 2]
    regions = {name: line[name] * line["step_seconds"] for name in NAMES}
    spread = {name: _spread([r[name] * r["step_seconds"] for r in lines]) for name in NAMES}

    annotating = Annotating(world, config.training.global_batch)
    trainer.meter = annotating
    time_collectives(annotating.region)
    with HostSyncs(world.device, lambda: annotating.current) as syncs:
        step()
    parts = Parts(lambda part: record_function(PART + part))
    model = trainer.engine.module
    with parts.watching(model):
        with OperationCosts(lambda: annotating.current, parts) as costs:
            step()
        with ExitStack() as stack:
            stack.callback(_synchronize, world)
            traced_by = stack.enter_context(profiler(world.device))
            step()  # the profiler's own first step is slow
            for _ in range(traced):
                _synchronize(world)
                with record_function(STEP):
                    step()
                    _synchronize(world)
    annotating.reset()
    events = list(traced_by.events() or [])
    if world.is_rank_0:
        traced_by.export_chrome_trace(str(file))
    return Profile(
        kernels=config.kernels,
        line=line,
        fastest=lines[0]["step_seconds"],
        slowest=lines[-1]["step_seconds"],
        regions=regions,
        spread=spread,
        readings=len(lines),
        trace=read_trace(events, costs.counted, on_gpu=world.device.type == "cuda"),
        host_syncs=syncs.waiting,
        file=file,
    )


def _spread(values: list[float]) -> tuple[float, float]:
    """The 20th and the 80th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[round(0.2 * last)], ordered[round(0.8 * last)]


def _synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
