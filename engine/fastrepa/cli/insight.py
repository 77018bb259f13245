"""Commands that measure and explain: plan, profile, bench, report, watch, probe, doctor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from fastrepa.cli.app import (
    ConfigArgument,
    OverridesArgument,
    RunOverridesArgument,
    app,
    loading,
    require,
)
from fastrepa.runtime.terminal import say


@app.command()
def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, separated by commas.")] = "8,64",
    gpu: Annotated[
        str | None, typer.Option(help="a100, h100, h200 or b200; default: h100.")
    ] = None,
    gpu_tflops: Annotated[
        float | None,
        typer.Option(
            help="1e12 FLOP/s, dense, in training.precision, for --gpu's or of another GPU."
        ),
    ] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GB, the same.")] = None,
    gpu_bandwidth: Annotated[
        float | None, typer.Option(help="GB/s of the memory, the same.")
    ] = None,
    efficiency: Annotated[
        float | None,
        typer.Option(
            help="Share of peak that the generator reaches; default: by model and micro-batch."
        ),
    ] = None,
    frozen_efficiency: Annotated[
        float, typer.Option(help="Share of peak that encoders and codec reach.")
    ] = 0.4,
    hbm_efficiency: Annotated[
        float, typer.Option(help="Share of the memory's bandwidth that is reached.")
    ] = 0.8,
    link_efficiency: Annotated[
        float, typer.Option(help="Share of the links' bandwidths that is reached.")
    ] = 0.8,
    overlap: Annotated[
        float, typer.Option(help="Share of the compute that can hide communication.")
    ] = 0.8,
    nvlink_gbs: Annotated[
        float | None,
        typer.Option(help="NVLink: GB/s per GPU and direction; default: the datasheet's."),
    ] = None,
    network_gbs: Annotated[
        float | None,
        typer.Option(help="Network: GB/s per GPU and direction; default: the datasheet's."),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs that NVLink joins.")] = 8,
    storage_gbs: Annotated[float, typer.Option(help="GB/s that each GPU's ranks read.")] = 0.25,
    pcie_gbs: Annotated[
        float, typer.Option(help="GB/s between GPU and host, per direction.")
    ] = 25.0,
    host_memory_gbs: Annotated[float, typer.Option(help="GB/s of host memory, per GPU.")] = 25.0,
    nvme_gbs: Annotated[float, typer.Option(help="GB/s of NVMe, per GPU.")] = 1.5,
    reserve_gb: Annotated[
        float, typer.Option(help="GB left for CUDA, NCCL and fragmentation.")
    ] = 4.0,
    image_bytes: Annotated[
        float | None, typer.Option(help="Bytes of a stored image; default: the data set's mean.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    png: Annotated[Path | None, typer.Option(help="Draw the plan as a picture, here.")] = None,
) -> None:
    """Memory, time and cost of a recipe on GPUs that are not here, and the way that is advised.

    Nothing is trained and no GPU is used: it is arithmetic, and every assumption is printed.
    """
    from fastrepa.config import load_config

    resolved = load_config(config, overrides or [])
    with loading():
        from fastrepa.commands.plan.plan import Assumptions, make_plan, parse_gpus
        from fastrepa.commands.plan.report import print_plan
        from fastrepa.commands.plan.speed import choose_gpu

    hardware = choose_gpu(gpu, tflops=gpu_tflops, memory=gpu_memory, bandwidth=gpu_bandwidth)
    assumptions = Assumptions(
        efficiency=efficiency,
        frozen_efficiency=frozen_efficiency,
        hbm_efficiency=hbm_efficiency,
        link_efficiency=link_efficiency,
        overlap=overlap,
        nvlink=None if nvlink_gbs is None else 1e9 * nvlink_gbs,
        network=None if network_gbs is None else 1e9 * network_gbs,
        per_node=gpus_per_node,
        storage=1e9 * storage_gbs,
        pcie=1e9 * pcie_gbs,
        host_memory=1e9 * host_memory_gbs,
        nvme=1e9 * nvme_gbs,
        reserve=1e9 * reserve_gb,
        image_bytes=image_bytes,
    )
    result = make_plan(resolved, gpus=parse_gpus(gpus), gpu=hardware, assumptions=assumptions)
    print_plan(result, as_json=json, picture=png)


@app.command()
def profile(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    steps: Annotated[int, typer.Option(help="Steps that are timed.")] = 10,
    warmup: Annotated[int, typer.Option(help="Steps before them.")] = 3,
    against: Annotated[
        str | None, typer.Option(help="eager: the eager kernels too, side by side.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder; default: NAME_profile, here; of a run's config.yaml, RUN/profile."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show where every millisecond of a step goes: by region, part and kernel, with idle gaps.

    Takes real steps and writes a trace, two pictures and profile.json into a folder; a run's own
    files are not touched. Data and encoder weights that are not here are replaced by random ones.
    """
    from fastrepa.config import load_config

    resolved = load_config(config, overrides or [])
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks on stderr
    with loading():
        from fastrepa.commands.profile.profile import profile_run
        from fastrepa.commands.profile.report import print_profile
        from fastrepa.runtime.world import destroy_world, init_world

    world = init_world(2 * resolved.survival.stall_seconds)
    try:
        with _progress("profiling", shown=world.is_rank_0) as progress:
            report = profile_run(
                resolved,
                world,
                steps=steps,
                warmup=warmup,
                out=out or _beside(config, "profile"),
                against=against,
                progress=progress,
            )
        if report is not None:
            print_profile(report, as_json=json)
    finally:
        destroy_world()


@app.command()
def bench(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="ours+recompute, ours+compile, ours+graphs, eager, eager+compile, plain+compile "
            "or reference; repeat for several. Default: the last four."
        ),
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="fp32, bf16, fp16 (the reference's only); repeat.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Global batch; repeat for a sweep.")
    ] = None,
    ranks: Annotated[list[int] | None, typer.Option(help="Processes; repeat to scale.")] = None,
    sampling: Annotated[bool, typer.Option(help="Also images/s of ODE-50 and SDE-250.")] = False,
    rounds: Annotated[int, typer.Option(help="Turns of every contender.")] = 3,
    steps: Annotated[int, typer.Option(help="Timed steps of a turn.")] = 3,
    warmup: Annotated[int, typer.Option(help="Steps before them.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder; default: NAME_bench, here; of a run's config.yaml, RUN/bench."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """The training step against its rivals: same weights, same batch, turn by turn in one run.

    Appends to bench.jsonl in a folder and draws bench.png; nothing of a run or a data set is read.
    """
    from fastrepa.config import load_config

    resolved = load_config(config, overrides or [])
    with loading():
        from fastrepa.commands.bench.bench import DEFAULT_RIVALS
        from fastrepa.commands.bench.bench import bench as measure
        from fastrepa.commands.bench.report import print_bench

    folder = out or _beside(config, "bench")
    with _progress("bench", shown=True) as progress:
        results = measure(
            resolved,
            against=against if against is not None else list(DEFAULT_RIVALS),
            precisions=precision or [resolved.training.precision],
            batches=batch or [resolved.training.global_batch],
            ranks=ranks or [1],
            sampling=sampling,
            rounds=rounds,
            steps=steps,
            warmup=warmup,
            out=folder,
            progress=progress,
        )
    print_bench(results, folder, as_json=json)
    if any(result.failed for result in results if result.case.contender == "ours"):
        raise typer.Exit(1)


def _beside(config: Path, what: str) -> Path:
    """The folder of what is measured with a configuration: in its run, or here."""
    if config.name == "config.yaml" and (config.parent / "environment.json").is_file():
        return config.parent / what
    return Path(f"{config.stem}_{what}")


@contextmanager
def _progress(title: str, *, shown: bool) -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr, where that is a terminal, moved by (what, share done)."""
    from fastrepa.runtime.progress import Bar

    with Bar(title, 1.0, shown=shown) as bar:
        yield lambda what, share: bar.move(share, f"{title}: {what}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, up to eight.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="HTML file; default: RUN/report.html; of several, here."),
    ] = None,
) -> None:
    """Runs side by side as one HTML page: curves, samples, configurations, times, environments.

    The page needs no network and no other file. Runs that are still going, or were cut off, count.
    """
    with loading():
        from fastrepa.commands.report.report import write_report

    say(write_report(runs, out))


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="A run folder; one that is not there yet, too.")],
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Default: the first that is free from 8710 on."),
    ] = None,
) -> None:
    """A run in a browser while it goes on: curves that grow, samples; Ctrl-C ends it.

    Serves the page of `report` on 127.0.0.1 alone, reads the run's folder and writes nothing. While
    nobody trains the run, samples are drawn on a page of their own.
    """
    from fastrepa.commands.watch.watch import Server

    with Server(run, port) as server, suppress(KeyboardInterrupt):
        waits = "" if run.exists() else ", which is not there yet"
        say(f"{server.address} shows {run}{waits}; Ctrl-C ends it")
        server.serve_forever()


@app.command()
def probe(
    target: Annotated[
        Path, typer.Argument(help="A run folder, a prepared data set, or a folder of images.")
    ],
    overrides: RunOverridesArgument = None,
    encoders: Annotated[
        str | None,
        typer.Option(help="NAME[=WEIGHTS][@INPUT], with commas; of a run by default its own."),
    ] = None,
    num: Annotated[
        int | None, typer.Option("--num", "-n", help="Images; default: 500, of a run 1000.")
    ] = None,
    time: Annotated[
        float | None,
        typer.Option(help="The time of a run's noised inputs: 0 data, 1 noise; default: 0.5."),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="A set the run has not seen; default: validation, beside its own."),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side of a plain folder's images in pixels; default: 256.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of images, and of the noise.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images per forward.")] = 64,
    out: Annotated[
        Path | None, typer.Option(help="Folder; default: RUN/probe, or NAME_probe, here.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Find out what a run's blocks know, step by step; or if an encoder will help on your images.

    A run: how far each block agrees with the encoder (CKNNA, linear CKA) and what a linear probe
    reads from it, over all checkpoints. Images: every encoder beside random weights and raw pixels.
    """
    require(target)
    with loading():
        from fastrepa.commands.probe.probe import print_probe
        from fastrepa.commands.probe.probe import probe as measure

    with _progress("probe", shown=True) as progress:
        probed = measure(
            target,
            encoders=encoders,
            num=num,
            time=time,
            held_out=held_out,
            resolution=resolution,
            seed=seed,
            batch_size=batch_size,
            out=out,
            overrides=overrides or (),
            progress=progress,
        )
    print_probe(probed, as_json=json)


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Versions, devices, which fast paths are available here and what would enable the others."""
    with loading():
        from fastrepa.commands.doctor import print_doctor

    print_doctor(as_json=json)
