"""`fastrepa plan`: what a recipe needs on GPUs that are not here, and how long it takes.

    memory   resident states + the highest moment of backward, update, encoding or sampling
    step     max(input, frozen networks + generator + exposed communication + optimiser)

Everything is arithmetic: parameters, activations and messages follow the code that would run
(training/memory); speeds are datasheet values times efficiencies, the generator's of our record
(speed.py), the others assumed, and each is part of the answer. Bytes and rates are decimal
(1 GB = 1e9 bytes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from fastrepa.commands.plan.speed import LAUNCH, LAUNCHES, RECORD, generator_seconds, public_run
from fastrepa.config import Config, TrainingConfig
from fastrepa.data.datasets import with_classes
from fastrepa.errors import ConfigError, shown
from fastrepa.model.sit import recomputed_blocks
from fastrepa.runtime.hardware import GPU, Links, find_gpu
from fastrepa.runtime.regions import SAMPLING
from fastrepa.training.memory.decision import (
    RESERVE,
    fitted,
    memory_moments,
    sharding,
    with_h,
)
from fastrepa.training.memory.sharding import PARTS, Sharding, host, messages, nvme, twice_let_go
from fastrepa.training.memory.workload import Workload, measure_workload
from fastrepa.training.zero.settings import micro_batch
from fastrepa_kernels.adamw_ema import adamw_ema_cost

STEP_PARTS = (
    "generator", "recomputation", "encoders", "codec", "optimiser", "offload", "communication",
    "input wait",
)  # fmt: skip
STAGES = (0, 1, 2, 3)
RECOMPUTE = (0, 2, 1)  # those that are advised
MOST_GPUS = 100_000
TIE = 1.005  # settings this near to the fastest are as good: the simplest of them is named
GAIN = 1.25  # stages 2, 3 and offload must gain this over a simpler way: overlap is assumed
AMPLE = 0.5  # of the GPU's memory: stages 0 and 1 that need no more are advised at any gain
ROOM = 0.95  # of the GPU's memory: what needs more is advised only where nothing else fits
DAY = 86_400


@dataclass(frozen=True)
class Assumptions:
    """Values not known before they are measured; every field is an option of `fastrepa plan`.

    Rates in bytes/s per GPU and direction, shares in (0, 1], reserve in bytes. efficiency: None is
    by the generator's shapes and its micro-batch (speed.py).
    """

    efficiency: float | None = None
    frozen_efficiency: float = 0.4
    hbm_efficiency: float = 0.8
    link_efficiency: float = 0.8
    overlap: float = 0.8
    nvlink: float | None = None
    network: float | None = None
    per_node: int = 8
    storage: float = 0.25e9
    pcie: float = 25e9
    host_memory: float = 25e9
    nvme: float = 1.5e9
    reserve: float = RESERVE
    image_bytes: float | None = None

    def __post_init__(self) -> None:
        for name in (
            "efficiency", "frozen_efficiency", "hbm_efficiency", "link_efficiency", "overlap",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None:
                continue
            low = value >= 0 if name == "overlap" else value > 0
            if not (low and value <= 1):
                raise ConfigError(f"{_option(name)}: {value} is not a share between 0 and 1")
        for name in (
            "nvlink", "network", "storage", "pcie", "host_memory", "nvme", "image_bytes",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{_option(name)}: must be above 0, got {value:g}")
        if not 0 <= self.reserve < float("inf"):
            raise ConfigError(f"{_option('reserve')}: must be 0 or more, got {self.reserve:g}")
        if self.per_node < 1:
            raise ConfigError(f"{_option('per_node')}: must be 1 or more, got {self.per_node}")

    def links(self, gpu: GPU) -> Links:
        e = self.link_efficiency
        return Links(
            self.per_node, e * (self.nvlink or gpu.nvlink), e * (self.network or gpu.network)
        )


@dataclass(frozen=True)
class Estimate:
    """One way to run on one number of GPUs.

    memory: bytes per GPU by part, at the moment (`moment`) of the peak; training, sampling: the
    same at the highest moment of a step, and while the grids of sample_every are drawn; host: bytes
    of host memory per GPU by part; nvme: bytes on NVMe per GPU; step: seconds by part, waiting
    counted only where nothing else is done; hidden: seconds of communication under compute;
    activations: the most bytes of them at any moment, of the peak or not; sent: bytes per GPU and
    step; efficiency: of peak, the generator's; public_images_per_second: at the model FLOPs of
    peak of the best public run, or as fast as this one where that is less.
    """

    sharding: Sharding
    memory: dict[str, float]
    moment: str
    training: dict[str, float]
    sampling: dict[str, float]
    host: dict[str, float]
    nvme: float
    activations: float
    step: dict[str, float]
    hidden: float
    sent: float
    images_per_second: float
    public_images_per_second: float
    efficiency: float
    mfu: float
    days: float
    gpu_hours: float

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        return sum(self.step.values())

    def first_too_much(self, capacity: float) -> str | None:
        """The part at which the sum passes the capacity, None where all of it fits."""
        total = 0.0
        for part in (*(p for p in PARTS if p != "activations"), "activations"):
            total += self.memory[part]
            if total > capacity:
                return part
        return None


@dataclass(frozen=True)
class GpuCountEstimates:
    """The estimates for one number of GPUs.

    others: as configured, but with h kept, or not where it was, and with every block recomputed, or
    none where some are; cheapest: of all that fit, None where none does, and then `least` is the
    smallest.
    """

    configured: Estimate
    others: tuple[Estimate, ...]
    cheapest: Estimate | None
    least: Estimate


@dataclass(frozen=True)
class CapacityPlan:
    """The memory and time that a configuration takes; rows: one for each number of GPUs."""

    config: Config
    gpu: GPU
    assumptions: Assumptions
    workload: Workload
    rows: tuple[GpuCountEstimates, ...]


def parse_gpus(text: str) -> list[int]:
    """Parse "8,64,512" to numbers of GPUs, ascending; ConfigError names what is not allowed."""
    counts = []
    for word in text.split(","):
        try:
            count = int(word)
        except ValueError:
            raise ConfigError(
                f"--gpus: {shown(word.strip())} is not a number; expected such as 8,64,512"
            ) from None
        if not 1 <= count <= MOST_GPUS:
            raise ConfigError(f"--gpus: {count} is not between 1 and {MOST_GPUS:,}")
        counts.append(count)
    return sorted(set(counts))


def make_plan(
    config: Config,
    *,
    gpus: Sequence[int],
    gpu: str | GPU = "h100",
    assumptions: Assumptions | None = None,
) -> CapacityPlan:
    """Plan a resolved configuration for each number of GPUs. gpu: one of them, or a name.

    ConfigError: an unknown GPU, a batch that some number of GPUs does not divide, shapes that do
    not work.
    """
    hardware = find_gpu(gpu) if isinstance(gpu, str) else gpu
    a = assumptions or Assumptions()
    for count in gpus:  # before anything is measured
        _check_batch(config.training, count)
    config = with_classes(config)
    workload = measure_workload(config, image_bytes=a.image_bytes)
    rows = []
    for count in gpus:
        as_set = sharding(config, count, workload.parameters)
        as_set = fitted(workload, as_set, hardware.memory, reserve=a.reserve)
        every = [estimate(workload, s, hardware, a) for s in _ways(workload, count)]
        fitting = [e for e in every if e.total <= hardware.memory]
        cheapest = None
        if fitting:
            best = _advised(fitting, hardware.memory).sharding
            best = with_h(workload, best, hardware.memory, reserve=a.reserve)
            cheapest = estimate(workload, best, hardware, a)
        rows.append(
            GpuCountEstimates(
                estimate(workload, as_set, hardware, a),
                tuple(estimate(workload, s, hardware, a) for s in _others(config.training, as_set)),
                cheapest,
                min(every, key=lambda e: e.total),
            )
        )
    return CapacityPlan(config, hardware, a, workload, tuple(rows))


def _others(training: TrainingConfig, s: Sharding) -> Iterator[Sharding]:
    """Yield the same way with h kept or not, where nothing is recomputed; and with the other
    extreme of recomputation, where training.keep auto keeps nothing.
    """
    if not s.eager and not s.recompute:
        yield replace(s, keep_h=not s.keep_h)
    keep_h = s.keep_h and training.keep_h
    yield replace(s, recompute=0 if s.recompute else 1, keep_h=keep_h)


def estimate(w: Workload, s: Sharding, gpu: GPU, a: Assumptions) -> Estimate:
    """Memory, time and cost of one way to run."""
    moments = memory_moments(w, s, a.reserve)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    training = (memory for name, memory in moments.items() if name != SAMPLING)
    images = s.micro * s.forwards  # per GPU and step
    peak = gpu.bf16 if s.bf16 else gpu.fp32
    frozen_rate = peak * a.frozen_efficiency
    forward = generator_seconds(
        w, s.micro, gpu, hbm_efficiency=a.hbm_efficiency, efficiency=a.efficiency
    )
    n = w.parameters.numel
    update = adamw_ema_cost(
        round(n / s.share(1)), grad_itemsize=4, low_itemsize=2 if s.bf16 else 0, emas=s.emas
    ).bytes
    step = {
        "generator": s.forwards * forward,
        "recomputation": s.forwards * forward * w.recomputed_flops(s.recompute) / w.training_flops,
        "encoders": images * sum(f.flops for _, f in w.encoders) / frozen_rate,
        "codec": images * (w.codec_encoder.flops if w.codec_encoder else 0) / frozen_rate,
        "optimiser": update / (gpu.hbm * a.hbm_efficiency),
        "offload": 0.0,
    }
    if s.offload != "none":
        step["optimiser"] = update / a.host_memory
        # Gradients down and weights up; with weights there too, those of forward and backward.
        crossing = s.itemsize * n / s.world * (4 if s.offloads_parameters else 2)
        # States are read and written, each master with them.
        step["offload"] = crossing / a.pcie + 2 * nvme(s, w.parameters) / a.nvme
    m = w.config.model
    again = twice_let_go(m.width, recomputed_blocks(m.depth, s.recompute))
    links, sent = a.links(gpu), messages(s, w.parameters, again)
    free, bound = 0.0, 0.0
    for message in sent:
        seconds = links.collective_seconds(message.op, message.size, message.calls, s.world)
        if message.overlapped:
            free += seconds
        else:
            bound += seconds
    hidden = min(free, a.overlap * (step["generator"] + step["recomputation"]))
    step["communication"] = bound + free - hidden
    reading = images * w.input_bytes / a.storage
    step["input wait"] = max(0.0, reading - sum(step.values()))  # read ahead of the step
    seconds = sum(step.values())
    config = w.config.training
    return Estimate(
        sharding=s,
        memory=moments[moment],
        moment=moment,
        training=max(training, key=lambda memory: sum(memory.values())),
        sampling=moments[SAMPLING],
        host=host(s, w.parameters),
        nvme=nvme(s, w.parameters),
        activations=max(w.curve(s.recompute, s.keep_h).at(s.micro)),
        step=step,
        hidden=hidden,
        sent=sum(m.sent(s.world) for m in sent),
        images_per_second=config.global_batch / seconds,
        public_images_per_second=config.global_batch
        / max(seconds, images * w.training_flops / (public_run(gpu).share * peak)),
        efficiency=images * w.training_flops / step["generator"] / peak,
        mfu=images * w.training_flops / seconds / peak,
        days=config.steps * seconds / DAY,
        gpu_hours=config.steps * seconds / 3600 * s.world,
    )


def _check_batch(training: TrainingConfig, world: int) -> None:
    try:
        micro_batch(training, world)
    except ConfigError as error:
        batch = training.global_batch
        above = -(-batch // world) * world
        raise ConfigError(
            f"--gpus: {world}: {error}; allowed are divisors of the batch, or another batch such "
            f"as training.global_batch={above}"
        ) from None


def _ways(w: Workload, world: int) -> Iterator[Sharding]:
    """Every stage, offload to host memory, micro-batch and recomputation, the simplest first."""
    config = w.config
    per_gpu = config.training.global_batch // world
    micros = [m for m in range(per_gpu, 0, -1) if per_gpu % m == 0]
    homes: list[dict[str, Any]] = [{"offload": "none", "offload_parameters": False}]
    homes += [{"offload": "cpu", "offload_parameters": also} for also in (False, True)]
    for stage, home in product(STAGES, homes):
        if (home["offload"] != "none" and stage == 0) or (home["offload_parameters"] and stage < 3):
            continue
        for micro in micros:
            changed = config.model_copy(
                update={
                    "zero": config.zero.model_copy(update={"stage": stage, **home}),
                    "training": config.training.model_copy(update={"micro_batch": micro}),
                }
            )
            way = sharding(changed, world, w.parameters)
            for every in RECOMPUTE:
                yield replace(way, recompute=every)


def _advised(ways: Sequence[Estimate], capacity: float) -> Estimate:
    """Choose, among what fits with memory to spare, stage 0 or 1 unless these need most of the
    memory and a higher one is much faster; of the fastest settings there the simplest.
    """
    ways = [e for e in ways if e.total <= ROOM * capacity] or ways

    def home(e: Estimate) -> tuple[bool, bool, int]:
        s = e.sharding
        return s.offload != "none", s.offloads_parameters, max(s.stage, 1)

    simple = [e for e in ways if home(e) == (False, False, 1)]
    if simple and min(simple, key=lambda e: e.seconds).total <= AMPLE * capacity:
        ways = simple
    fastest = min(e.seconds for e in ways)
    simplest = min(home(e) for e in ways if e.seconds <= fastest * GAIN)
    ways = [e for e in ways if home(e) == simplest]
    fastest = min(e.seconds for e in ways)
    return min(
        (e for e in ways if e.seconds <= fastest * TIE),
        key=lambda e: (
            RECOMPUTE.index(e.sharding.recompute), e.sharding.forwards, e.sharding.stage,
        ),
    )  # fmt: skip


def _option(field: str) -> str:
    names = {"nvlink": "nvlink-gbs", "network": "network-gbs", "storage": "storage-gbs",
             "reserve": "reserve-gb", "per_node": "gpus-per-node", "pcie": "pcie-gbs",
             "host_memory": "host-memory-gbs", "nvme": "nvme-gbs"}  # fmt: skip
    return "--" + names.get(field, field.replace("_", "-"))


def plan_as_dict(plan: CapacityPlan) -> dict[str, Any]:
    """Return a plan for programs: bytes, seconds, and everything that was assumed."""
    a, gpu = plan.assumptions, plan.gpu
    links = a.links(gpu)

    def way(e: Estimate) -> dict[str, Any]:
        s = e.sharding
        return {
            "zero_stage": s.stage,
            "micro_batch": s.micro,
            "forwards": s.forwards,
            "recompute": s.recompute or "none",
            "keep": s.keep,
            "offload": s.offload,
            "offload_parameters": s.offloads_parameters,
            "fits": e.total <= gpu.memory,
            "too_much": e.first_too_much(gpu.memory),
            "memory_bytes": e.memory,
            "memory_total_bytes": e.total,
            "memory_moment": e.moment,
            "training_memory_bytes": e.training,
            "sampling_memory_bytes": e.sampling,
            "host_bytes": e.host,
            "host_total_bytes": sum(e.host.values()),
            "nvme_bytes": e.nvme,
            "activations_bytes": e.activations,
            "step_seconds": e.step,
            "step_total_seconds": e.seconds,
            "hidden_communication_seconds": e.hidden,
            "sent_bytes": e.sent,
            "images_per_second": e.images_per_second,
            "public_images_per_second": e.public_images_per_second,
            "generator_efficiency": e.efficiency,
            "mfu": e.mfu,
            "days": e.days,
            "gpu_hours": e.gpu_hours,
        }

    return {
        "gpu": {"name": gpu.title, "memory_bytes": gpu.memory, "source": gpu.source},
        "assumptions": {name: {"value": v, "why": why} for name, v, why in assumed(plan)},
        "links": {"nvlink_bytes_per_s": links.nvlink, "network_bytes_per_s": links.network},
        "workload": {
            "parameters": plan.workload.parameters.numel,
            "forward_flops_per_image": plan.workload.forward_flops,
            "training_flops_per_image": plan.workload.training_flops,
            "encoder_flops_per_image": {n: f.flops for n, f in plan.workload.encoders},
            "codec_flops_per_image": c.flops if (c := plan.workload.codec_encoder) else 0,
            "input_bytes_per_image": plan.workload.input_bytes,
        },
        "plans": [
            {
                "gpus": row.configured.sharding.world,
                "configured": way(row.configured),
                "others": [way(e) for e in row.others],
                "cheapest": way(row.cheapest) if row.cheapest else None,
                "least_memory": way(row.least),
            }
            for row in plan.rows
        ],
    }


def assumed(plan: CapacityPlan) -> list[tuple[str, str, str]]:
    """Return (option or name, value, its meaning and where it is from) of every assumption."""
    a, gpu, w = plan.assumptions, plan.gpu, plan.workload
    bf16 = plan.config.training.bf16
    peak = gpu.bf16 if bf16 else gpu.fp32
    kind = "dense bf16" if bf16 else "fp32 without tensor cores"
    per_s = "GB/s per GPU and direction"
    public = public_run(gpu)
    return [
        ("GPU", gpu.title, f"not measured: {gpu.source}"),
        ("memory", f"{gpu.memory / 1e9:.0f} GB", "of 1e9 bytes (--gpu-memory)"),
        ("peak", f"{peak / 1e12:.0f} TFLOP/s", f"{kind} (--gpu-tflops)"),
        ("HBM", f"{gpu.hbm / 1e9:.0f} GB/s", "the GPU's memory (--gpu-bandwidth)"),
        (_option("efficiency"), generator_shares(plan),
         "of peak, the generator: " + ("as given" if a.efficiency else f"our record ({RECORD}), by "
         "model, micro-batch, peak and HBM")),
        ("launches", f"{1e6 * LAUNCH[plan.config.training.compile]:g} us",
         f"each, {LAUNCHES} a block as recorded: no forward and backward takes less; assumed"),
        ("public runs", f"{public.share:.1%}",
         f"of peak, the best of others ({public.what}: docs/published_numbers.md)"),
        (_option("frozen_efficiency"), f"{a.frozen_efficiency:.0%}",
         "of peak, encoders and codec; assumed"),
        (_option("hbm_efficiency"), f"{a.hbm_efficiency:.0%}", "of HBM bandwidth; assumed"),
        (_option("nvlink"), f"{(a.nvlink or gpu.nvlink) / 1e9:.0f}",
         f"{per_s}; {'as given' if a.nvlink else 'datasheet'}"),
        (_option("network"), f"{(a.network or gpu.network) / 1e9:.0f}",
         f"{per_s}; {'as given' if a.network else 'datasheet of the server'}"),
        (_option("link_efficiency"), f"{a.link_efficiency:.0%}", "of both; assumed"),
        (_option("per_node"), str(a.per_node), "GPUs that NVLink joins"),
        ("latency", "5 us, 15 us", "per hop of a tree, inside and between servers; assumed"),
        (_option("overlap"), f"{a.overlap:.0%}",
         "of the generator's time can hide communication that DeepSpeed overlaps "
         "(stage 3, or overlap_comm); below that none is hidden"),
        (_option("storage"), f"{a.storage / 1e9:g}", "GB/s read per GPU; assumed"),
        (_option("pcie"), f"{a.pcie / 1e9:g}",
         "GB/s per GPU and direction between GPU and host, with zero.offload; assumed"),
        (_option("host_memory"), f"{a.host_memory / 1e9:g}",
         "GB/s of host memory per GPU, the optimiser's pass with zero.offload; assumed"),
        (_option("nvme"), f"{a.nvme / 1e9:g}",
         "GB/s of NVMe per GPU, with zero.offload=nvme; assumed"),
        ("input", f"{w.input_bytes:,.0f}",
         f"bytes read per image: {w.input_is} (an image: {_option('image_bytes')})"),
        (_option("reserve"), f"{a.reserve / 1e9:g}",
         "GB for CUDA, NCCL, libraries and fragmentation; assumed"),
        ("prepared", "",
         f"latents {_state(w.codec_encoder is None)}, targets {_state(not w.encoders)} in training "
         "(data.latents, vision.targets)"),
    ]  # fmt: skip


def generator_shares(plan: CapacityPlan) -> str:
    """The least and the greatest share of peak of the generator, as configured."""
    values = sorted(row.configured.efficiency for row in plan.rows)
    low, high = f"{values[0]:.0%}", f"{values[-1]:.0%}"
    return low if low == high else f"{low} .. {high}"


def _state(ready: bool) -> str:
    return "read" if ready else "computed"
