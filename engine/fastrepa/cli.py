"""The command line: `fastrepa train`, `plan`, `profile`, `bench`, `prepare`, ... (see `--help`).

Imports of torch and its friends stay inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fastrepa import __version__
from fastrepa.errors import FastrepaError, print_error
from fastrepa.runtime.exit_codes import for_launcher

app = typer.Typer(
    name="fastrepa",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train representation-aligned diffusion transformers.",
)

data_app = typer.Typer(no_args_is_help=True, help="Verify a data set, look at it, encode it.")
app.add_typer(data_app, name="data")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fastrepa {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    # The deepspeed launcher passes --local_rank beside LOCAL_RANK, which is the one that counts.
    pass


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, such as configs/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="path.to.key=value, as often as you like.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Build everything, take one step on noise, write nothing."),
    ] = False,
) -> None:
    """Train, or continue the run whose folder the configuration names.

    One process by plain command, several under torchrun, deepspeed or srun. Ctrl-C, SIGTERM and
    SIGUSR1 finish the step and save; the same command continues. Exit codes: 0 finished, 1 error,
    130 after Ctrl-C, 75 after the other two (saved, start it again), 76 when another rank was lost.
    """
    from fastrepa.config import load_config

    resolved = load_config(config, overrides or [])
    from fastrepa.runtime.determinism import make_deterministic, refusals_by_name
    from fastrepa.runtime.survival import watched
    from fastrepa.runtime.world import join_world, leave_world

    make_deterministic(resolved.deterministic)
    world = join_world(2 * resolved.survival.stall_seconds)
    try:
        from fastrepa.training.memory.decision import resolve_memory

        resolved = resolve_memory(resolved, world)
        if dry_run:
            from fastrepa.commands.dry_run import dry_run as take_one_step

            result = take_one_step(resolved, world)
            if world.is_first:
                _print_dry_run(result, resolved.training.global_batch)
            return
        from fastrepa.training.run import Run

        evaluator: Any = None
        if resolved.evaluation.every:
            from fastrepa.commands.evaluate.during_training import RunEvaluator

            evaluator = RunEvaluator
        with watched(Path(resolved.run), resolved.survival, world) as watch, refusals_by_name():
            code = Run(resolved, world, watch.group, evaluator=evaluator).train(watch)
    finally:
        leave_world()
    if code:
        raise typer.Exit(code)


CodecOption = Annotated[
    str | None, typer.Option("--codec", help="sd-vae: also store the latents' mean and deviation.")
]
CodecWeightsOption = Annotated[
    str | None, typer.Option(help="Of the codec: hub id or local folder; default: sd-vae-ft-mse.")
]
CacheFeaturesOption = Annotated[
    str | None,
    typer.Option(help="Encoders whose tokens to store: NAME[=WEIGHTS][@INPUT], with commas."),
]
FlipOption = Annotated[
    bool, typer.Option("--flip", help="Store those of the mirrored images too, for data.flip.")
]
PrecisionOption = Annotated[
    str, typer.Option(help="bf16 or fp32: what codec and encoders compute in.")
]
BatchSizeOption = Annotated[int, typer.Option(help="Images per forward of codec and encoders.")]


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="A YAML file, such as configs/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="path.to.key=value, as often as you like.")
    ] = None,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, separated by commas.")] = "8,64",
    gpu: Annotated[str, typer.Option(help="a100, h100, h200 or b200.")] = "h100",
    efficiency: Annotated[float, typer.Option(help="Of peak, the generator.")] = 0.4,
    frozen_efficiency: Annotated[float, typer.Option(help="Of peak, encoders, codec.")] = 0.4,
    hbm_efficiency: Annotated[float, typer.Option(help="Of HBM bandwidth.")] = 0.8,
    link_efficiency: Annotated[float, typer.Option(help="Of link bandwidths.")] = 0.8,
    overlap: Annotated[
        float, typer.Option(help="Share of the compute that can hide communication.")
    ] = 0.8,
    nvlink_gbs: Annotated[
        float | None, typer.Option(help="GB/s per GPU and direction; default: the datasheet's.")
    ] = None,
    network_gbs: Annotated[
        float | None, typer.Option(help="GB/s per GPU and direction; default: the datasheet's.")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs that NVLink joins.")] = 8,
    storage_gbs: Annotated[float, typer.Option(help="GB/s that each GPU's ranks read.")] = 0.25,
    pcie_gbs: Annotated[float, typer.Option(help="Between GPU and host, per direction.")] = 25.0,
    host_memory_gbs: Annotated[float, typer.Option(help="Of host memory, per GPU.")] = 25.0,
    nvme_gbs: Annotated[float, typer.Option(help="Of NVMe, per GPU.")] = 1.5,
    reserve_gb: Annotated[float, typer.Option(help="For CUDA, NCCL and fragmentation.")] = 4.0,
    image_bytes: Annotated[
        float | None, typer.Option(help="Of a stored image; default: the data set's mean.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    png: Annotated[Path | None, typer.Option(help="Draw it here.")] = None,
) -> None:
    """Memory, time and cost of a recipe on GPUs that are not here, and the cheapest way that fits.

    Nothing is trained and no GPU is used: it is arithmetic, and every assumption is printed.
    """
    from fastrepa.config import load_config

    resolved = load_config(config, overrides or [])
    from fastrepa.commands.plan.plan import Assumptions, make_plan, parse_gpus
    from fastrepa.commands.plan.report import print_plan

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
    result = make_plan(
        resolved,
        gpus=parse_gpus(gpus),
        gpu=gpu,
        assumptions=assumptions,
    )
    print_plan(result, as_json=json, picture=png)


@app.command()
def profile(
    config: Annotated[Path, typer.Argument(help="A YAML file, such as configs/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="path.to.key=value, as often as you like.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps that are timed.")] = 10,
    warmup: Annotated[int, typer.Option(help="Steps before them.")] = 3,
    against: Annotated[
        str | None, typer.Option(help="eager: the eager kernels too, side by side.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default: NAME_profile, here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Where every millisecond of a training step goes: by region, part and kernel, with idle gaps.

    Takes real steps and writes a trace, two pictures and profile.json into a folder; the run's own
    folder is not touched. Data and encoder weights that are not here are replaced by random ones.
    """
    from fastrepa.config import load_config

    resolved = load_config(config, overrides or [])
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks on stderr
    from fastrepa.commands.profile.profile import profile_run
    from fastrepa.commands.profile.report import print_profile
    from fastrepa.runtime.world import join_world, leave_world

    world = join_world(2 * resolved.survival.stall_seconds)
    try:
        with _progress("profiling", shown=world.is_first) as progress:
            report = profile_run(
                resolved,
                world,
                steps=steps,
                warmup=warmup,
                out=out or Path(f"{config.stem}_profile"),
                against=against,
                progress=progress,
            )
        if report is not None:
            print_profile(report, as_json=json)
    finally:
        leave_world()


@app.command()
def bench(
    config: Annotated[Path, typer.Argument(help="A YAML file, such as configs/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="path.to.key=value, as often as you like.")
    ] = None,
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
    out: Annotated[Path | None, typer.Option(help="Folder; default: NAME_bench, here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """The training step against its rivals: same weights, same batch, turn by turn in one run.

    Appends to bench.jsonl in a folder and draws bench.png; nothing of a run or a data set is read.
    """
    from fastrepa.config import load_config

    resolved = load_config(config, overrides or [])
    from fastrepa.commands.bench.bench import DEFAULT_RIVALS
    from fastrepa.commands.bench.bench import bench as measure
    from fastrepa.commands.bench.report import print_bench

    folder = out or Path(f"{config.stem}_bench")
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


@contextmanager
def _progress(title: str, *, shown: bool) -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr, where that is a terminal, moved by (what, share done)."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn())
    visible = shown and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not visible) as bar:
        task = bar.add_task(title, total=1.0)

        def move(what: str, share: float) -> None:
            bar.update(task, completed=share, description=f"{title}: {what}")

        yield move


@app.command()
def prepare(
    source: Annotated[
        Path,
        typer.Argument(
            help="Class folders of images, a tar, tar.gz or zip of them, WebDataset tars, parquet "
            "tables, or a set of REPA's layout."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Where the shards go; must not exist yet.")],
    resolution: Annotated[int, typer.Option(help="Side of the square crops in pixels.")],
    shard_size: Annotated[int, typer.Option(help="Images per shard.")] = 1000,
    image_format: Annotated[str, typer.Option("--format", help="png, jpeg or webp.")] = "png",
    quality: Annotated[
        int, typer.Option(help="JPEG and WebP quality, 1 to 100; WebP at 100 is lossless.")
    ] = 95,
    seed: Annotated[int, typer.Option(help="Of the shuffle.")] = 0,
    workers: Annotated[
        int | None, typer.Option(help="Processes per rank; default: one per core.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave unusable images out, named and counted.")
    ] = False,
    inside: Annotated[
        str | None, typer.Option(help="Folder inside the source that holds the class folders.")
    ] = None,
    class_names: Annotated[
        Path | None, typer.Option(help="File that names the classes of a source with numbers.")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Of parquet tables.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Of parquet tables.")] = None,
    codec: CodecOption = None,
    codec_weights: CodecWeightsOption = None,
    cache_features: CacheFeaturesOption = None,
    flip: FlipOption = False,
    precision: PrecisionOption = "bf16",
    batch_size: BatchSizeOption = 64,
) -> None:
    """Turn labelled images into shuffled, checksummed shards; under torchrun, on every rank.

    A run that was killed goes on where it stopped. The set does not depend on processes or ranks.
    Latents and features are made after the images, on every rank's GPU; `fastrepa data encode` adds
    them to a finished set. Of REPA's layout the latents are taken over, unless --codec makes them.
    """
    from fastrepa.commands.prepare.prepare import prepare as make_shards
    from fastrepa.commands.prepare.report import print_report
    from fastrepa.runtime.ranks import Ranks

    encode, encoded = None, []
    stored = source if (source / "vae-sd" / "dataset.json").is_file() and not codec else None
    if codec or codec_weights or cache_features or flip or stored:
        # They bring torch, which the images alone do not need.
        from fastrepa.commands.prepare.encode import check_networks, encode_columns, encode_settings
        from fastrepa.commands.prepare.encode import print_encoded as print_columns

        columns = encode_settings(
            codec, codec_weights, cache_features, flip, precision, batch_size, stored
        )
        check_networks(resolution, columns)

        def add_columns(folder: Path, ranks: Ranks) -> None:
            encoded.append(encode_columns(folder, **columns, ranks=ranks))

        encode = add_columns

    done = make_shards(
        source,
        out,
        resolution=resolution,
        shard_size=shard_size,
        image_format=image_format,  # type: ignore[arg-type]
        quality=quality,
        seed=seed,
        workers=workers,
        skip_bad=skip_bad,
        inside=inside,
        class_names=class_names,
        image_column=image_column,
        label_column=label_column,
        encode=encode,
    )
    if done.is_first:
        print_report(done.report, Console(highlight=False), done.path, done.images, done.seconds)
        for report in encoded:
            print_columns(report, Console(highlight=False))


@data_app.command("verify")
def data_verify(
    path: Annotated[Path, typer.Argument(help="A prepared set, or one of REPA's layout.")],
    workers: Annotated[int | None, typer.Option(help="Processes; default: one per core.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Files, sizes, indices and pairing; no contents.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="For programs, and complete.")] = False,
) -> None:
    """List everything that is wrong with a data set; exit code 1 when anything is."""
    from fastrepa.commands.verify.verify import print_report, verify

    report = verify(path, workers=workers, quick=quick)
    if json:
        print(report.to_json())
    else:
        print_report(report, Console(highlight=False))
    if not report.ok:
        raise typer.Exit(1)


@data_app.command("show")
def data_show(
    path: Annotated[Path, typer.Argument(help="A prepared set, or one of REPA's layout.")],
    out: Annotated[
        Path | None, typer.Option(help="PNG or folder; default: NAME_show.png, here.")
    ] = None,
    num: Annotated[int, typer.Option("--num", "-n", help="Images on the sheet.")] = 48,
    classes: Annotated[
        str | None, typer.Option(help="Class names or numbers, separated by commas.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice.")] = 0,
    features: Annotated[
        int, typer.Option(help="Images shown beside their latents and features; 0: no picture.")
    ] = 6,
) -> None:
    """Draw a contact sheet of a data set, and its latents and features as pictures."""
    from fastrepa.commands.show.show import print_shown, show

    wanted = [c for c in classes.split(",") if c.strip()] if classes else None
    report = show(path, out, num=num, classes=wanted, seed=seed, features=features)
    print_shown(report, Console(highlight=False))


@data_app.command("encode")
def data_encode(
    path: Annotated[Path, typer.Argument(help="A prepared set.")],
    codec: CodecOption = None,
    codec_weights: CodecWeightsOption = None,
    cache_features: CacheFeaturesOption = None,
    flip: FlipOption = False,
    precision: PrecisionOption = "bf16",
    batch_size: BatchSizeOption = 64,
    replace: Annotated[
        bool, typer.Option("--replace", help="Make a column anew that has other settings.")
    ] = False,
) -> None:
    """Add latents and an encoder's features to a prepared set; under torchrun, on every GPU.

    A run that was killed goes on where it stopped. Training then needs neither the autoencoder's
    encoder (data.latents=cached) nor the frozen one (vision.targets=cached).
    """
    from fastrepa.commands.prepare.encode import encode_columns, encode_settings, print_encoded
    from fastrepa.runtime.ranks import joined_ranks

    settings = encode_settings(codec, codec_weights, cache_features, flip, precision, batch_size)
    with joined_ranks() as ranks:
        report = encode_columns(path, **settings, replace=replace, ranks=ranks)
    if ranks.rank == 0:
        print_encoded(report, Console(highlight=False))


EmaOption = Annotated[
    str | None,
    typer.Option("--ema", help="Another average than the first: 0.999, or sigma_rel=0.05."),
]
SamplePrecisionOption = Annotated[
    str | None, typer.Option(help="Of the generator: run (as it was trained), fp32, tf32 or bf16.")
]
SampleCompileOption = Annotated[
    str | None, typer.Option(help="The generator under torch.compile: none, blocks or graphs.")
]


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    num: Annotated[int | None, typer.Option("--num", "-n", help="How many images.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ode, heun or sde.")] = None,
    steps: Annotated[int | None, typer.Option(help="Integration steps.")] = None,
    cfg: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    guidance_low: Annotated[float | None, typer.Option(help="Guide from this time on.")] = None,
    guidance_high: Annotated[float | None, typer.Option(help="Guide up to this time.")] = None,
    precision: SamplePrecisionOption = None,
    compile: SampleCompileOption = None,
    classes: Annotated[
        str | None, typer.Option(help="Class names or numbers, separated by commas.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default: RUN/generated.")] = None,
    npz: Annotated[bool, typer.Option("--npz", help="Also write the ADM evaluation file.")] = False,
    seed: Annotated[int, typer.Option(help="Of the images.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images per forward.")] = 32,
    ema: EmaOption = None,
) -> None:
    """Draw images from a run's averaged weights; settings left out are the run's own.

    What was stopped goes on by the same command; --num may grow.
    """
    from fastrepa.generation.generate import sample_run

    done = sample_run(
        run,
        out,
        classes=[c for c in classes.split(",") if c.strip()] if classes else None,
        seed=seed,
        batch_size=batch_size,
        npz=npz,
        ema=ema,
        num=num,
        sampler=sampler,
        steps=steps,
        cfg=cfg,
        guidance_low=guidance_low,
        guidance_high=guidance_high,
        precision=precision,
        compile=compile,
    )
    if done.is_first:
        files = [str(p) for p in (done.grid, done.npz) if p]
        there = f", {done.there} were there" if done.there else ""
        print(
            f"{done.num} images in {done.folder} ({done.seconds:.1f} s{there}); {', '.join(files)}"
        )


@app.command()
def evaluate(
    samples: Annotated[
        Path,
        typer.Argument(
            help="A run (it generates), a folder of images, an npz of ADM's, a prepared data set, "
            "or an npz of statistics."
        ),
    ],
    reference: Annotated[Path, typer.Argument(help="What they are compared with; any of these.")],
    metrics: Annotated[
        str | None,
        typer.Option(
            help="fid, sfid, inception_score, kid, precision, recall, clip_score, and fd_, kd_, "
            "precision_ or recall_ with an encoder's space (fd_dinov2_vitb14), with commas. "
            "Default: the encoders', or without any the first six."
        ),
    ] = None,
    encoders: Annotated[
        str | None,
        typer.Option(help="Spaces to measure in: NAME[=WEIGHTS][@INPUT], with commas."),
    ] = None,
    inception_weights: Annotated[
        Path | None, typer.Option(help="A local file; default: torch-fidelity's, downloaded once.")
    ] = None,
    clip: Annotated[
        str, typer.Option(help="open_clip's NAME=WEIGHTS (a tag or file), or local-dir:FOLDER.")
    ] = "ViT-L-14=openai",
    num: Annotated[int | None, typer.Option("--num", "-n", help="Images of a run.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Of a run: ode, heun or sde.")] = None,
    steps: Annotated[int | None, typer.Option(help="Integration steps.")] = None,
    cfg: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    guidance_low: Annotated[float | None, typer.Option(help="Guide from this time on.")] = None,
    guidance_high: Annotated[float | None, typer.Option(help="Guide up to this time.")] = None,
    precision: SamplePrecisionOption = None,
    compile: SampleCompileOption = None,
    seed: Annotated[int, typer.Option(help="Of a run's images.")] = 0,
    ema: EmaOption = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--batch", help="Images per forward.")
    ] = 32,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder where the reference's features are kept; default: REFERENCE.statistics."
        ),
    ] = None,
    save_statistics: Annotated[
        Path | None, typer.Option(help="Also write the reference's Inception statistics (npz).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs: one record.")] = False,
) -> None:
    """Measure how far generated images are from real ones; under torchrun, on every GPU.

    Settings of a run's images that are left out are the run's own. Only on Inception's features
    are distances called FID and KID.
    """
    from fastrepa.commands.evaluate.evaluate import evaluate as measure
    from fastrepa.commands.evaluate.report import print_evaluation
    from fastrepa.vision.registry import parse_encoders

    model, _, weights = clip.partition("=")
    done = measure(
        samples,
        reference,
        metrics=[m.strip() for m in metrics.split(",") if m.strip()] if metrics else None,
        encoders=parse_encoders(encoders, "--encoders") if encoders else (),
        inception_weights=None if inception_weights is None else str(inception_weights),
        clip=(model, weights or None),
        batch_size=batch_size,
        cache=cache,
        save_statistics=save_statistics,
        seed=seed,
        ema=ema,
        num=num,
        sampler=sampler,
        steps=steps,
        cfg=cfg,
        guidance_low=guidance_low,
        guidance_high=guidance_high,
        precision=precision,
        compile=compile,
    )
    if done.is_first:
        print_evaluation(done, as_json=json)


@app.command()
def convert(
    run: Annotated[Path, typer.Argument(help="A run folder; with --from the one to make.")],
    file: Annotated[
        Path, typer.Argument(help="The file or folder to write, or with --from to read.")
    ],
    to: Annotated[
        str | None,
        typer.Option("--to", help="reference (REPA's .pt), safetensors or zero (DeepSpeed's)."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", help="reference (a .pt of REPA's or bare weights) or zero (DeepSpeed's)."
        ),
    ] = None,
    weights: Annotated[str, typer.Option(help="Of safetensors: ema or raw.")] = "ema",
    ema: EmaOption = None,
    ema_sigma_rel: Annotated[
        float | None,
        typer.Option(
            help="An EDM2 average that was not kept, made from the power-function averages that "
            "the run's checkpoints have."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="With --from: the new run's YAML configuration.")
    ] = None,
) -> None:
    """A run's newest checkpoint as other people's files, or theirs as a run to go on with.

    zero is a universal checkpoint of DeepSpeed's: engines of stages 1 to 3 on any number of ranks
    load it with "checkpoint": {"load_universal": true} in their configuration. Read are these and
    plain ZeRO checkpoints.
    """
    from fastrepa.errors import ConfigError

    if (to is None) == (source is None):
        raise ConfigError(
            "convert: give one of --to reference|safetensors|zero and --from reference|zero"
        )
    from fastrepa.commands.convert.exchange import export_run, import_reference

    if to is not None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            state = export_run(run, file, to, weights=weights, ema=ema, ema_sigma_rel=ema_sigma_rel)
        for warning in caught:
            print(f"warning: {warning.message}", file=sys.stderr)
        print(f"step {state.step} of {run} in {file}")
    else:
        assert source is not None
        state = import_reference(file, run, config, source=source)
        print(f"{run} starts at step {state.step}: fastrepa train {run}/config.yaml")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, up to eight.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="HTML file; default: NAME_report.html, here.")
    ] = None,
) -> None:
    """Runs side by side as one HTML page: curves, samples, configurations, times, environments.

    The page needs no network and no other file. Runs that are still going, or were cut off, count.
    """
    from fastrepa.commands.report.report import write_report

    print(write_report(runs, out))


@app.command()
def probe(
    target: Annotated[
        Path, typer.Argument(help="A run folder, a prepared data set, or a folder of images.")
    ],
    encoders: Annotated[
        str | None,
        typer.Option(help="NAME[=WEIGHTS][@INPUT], with commas; of a run by default its own."),
    ] = None,
    num: Annotated[
        int | None, typer.Option("--num", "-n", help="Images; default: 500, of a run 1000.")
    ] = None,
    time: Annotated[
        float | None, typer.Option(help="Of a run's noised inputs: 0 data, 1 noise; default: 0.5.")
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="A set the run has not seen; default: validation, beside its own."),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Of a plain folder's images in pixels; default: 256.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of images, and of the noise.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images per forward.")] = 64,
    out: Annotated[
        Path | None, typer.Option(help="Folder; default: RUN/probe, or NAME_probe, here.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What a run's blocks know, step by step; or whether an encoder will help on your images.

    A run: how far each block agrees with the encoder (CKNNA, linear CKA) and what a linear probe
    reads from it, over all checkpoints. Images: every encoder beside random weights and raw pixels.
    """
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
            progress=progress,
        )
    print_probe(probed, as_json=json)


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Versions, devices, which fast paths are available here and what would enable the others."""
    from fastrepa.commands.doctor import print_doctor

    print_doctor(as_json=json)


def main() -> None:
    """The console script: a user's error is one line on stderr and a non-zero exit."""
    try:
        app()
    except FastrepaError as e:
        print_error(e, int(os.environ.get("RANK", "0")))
        sys.exit(for_launcher(1))
    except KeyboardInterrupt:
        print("fastrepa: interrupted", file=sys.stderr)
        sys.exit(for_launcher(130))
    except SystemExit as e:
        sys.exit(for_launcher(e.code) if isinstance(e.code, int) else e.code)


def _print_dry_run(result: object, global_batch: int) -> None:
    from fastrepa.commands.dry_run import DryRun

    assert isinstance(result, DryRun)
    console = Console(highlight=False)
    console.print(result.first_line, soft_wrap=True)
    table = Table(title="dry run: one step at batch 2 on noise, random encoder weights")
    table.add_column("what")
    table.add_column("how much", justify="right")
    table.add_row("loss", f"{result.loss:.4f}")
    table.add_row("parameters", f"{result.parameters:,}")
    table.add_row("  of them trained", f"{result.trained:,}")
    table.add_row("FLOPs per image (with encoders and codec)", _si(result.flops_per_image))
    table.add_row(f"FLOPs per step of {global_batch} images", _si(result.flops_per_step))
    table.add_section()
    for part, size in result.memory.items():
        table.add_row(f"memory per rank: {part}", f"{size / 2**30:.2f} GiB")
    table.add_row("memory per rank, estimate", f"{sum(result.memory.values()) / 2**30:.2f} GiB")
    console.print(table)


def _si(value: float) -> str:
    for unit in ("", " k", " M", " G", " T", " P"):
        if value < 1000:
            return f"{value:.2f}{unit}"
        value /= 1000
    return f"{value:.2f} E"


if __name__ == "__main__":
    main()
