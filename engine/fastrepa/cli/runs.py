"""Commands about one run: train, sample, evaluate, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastrepa.cli.app import (
    ClassesOption,
    ConfigArgument,
    OverridesArgument,
    RunOverridesArgument,
    app,
    loading,
    require,
)
from fastrepa.reading.text import expanded
from fastrepa.runtime.terminal import say, typed


@app.command()
def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Build everything, take one step on noise, write nothing."),
    ] = False,
) -> None:
    """Train, or continue the run whose folder the configuration names.

    One process by plain command, several under torchrun, deepspeed or srun. Ctrl-C, SIGTERM,
    SIGUSR1 and SIGHUP finish the step and save; the same command continues; Ctrl-C twice ends at
    once. Exit codes: 0 finished, 1 error, 130 after Ctrl-C, 75 after the other signals (saved,
    start it again), 76 when another rank was lost.
    """
    from fastrepa.runtime.signals import StopSignals

    with StopSignals() as signals:
        code = _train(config, overrides or [], dry_run, signals)
    if code:
        raise typer.Exit(code)


def _train(config: Path, overrides: list[str], dry_run: bool, signals: Any) -> int:
    from fastrepa.config import load_config, told_of_folder

    resolved = load_config(config, overrides)
    from fastrepa.runtime.threads import before_torch, others

    before_torch(others)
    with loading():
        import fastrepa.training.run  # noqa: F401 - which is what takes seconds
        from fastrepa.api import run_training
        from fastrepa.runtime.world import destroy_world

    words = told_of_folder(config, resolved.run)
    try:
        return run_training(resolved, words=words, dry_run=dry_run, signals=signals)
    finally:
        destroy_world()


StepOption = Annotated[
    str | None,
    typer.Option(help="A step, or best (by training.keep_best); default: the newest."),
]
CodecWeightsOption = Annotated[
    Path | None,
    typer.Option(help="Where the autoencoder lies now: short for data.codec.weights=PATH."),
]
EmaOption = Annotated[
    str | None,
    typer.Option("--ema", help="Another average than the first: 0.999, or sigma_rel=0.05."),
]
SamplePrecisionOption = Annotated[
    str | None, typer.Option(help="The generator's: run (as it was trained), fp32, tf32 or bf16.")
]
SampleCompileOption = Annotated[
    str | None, typer.Option(help="The generator under torch.compile: none, blocks or graphs.")
]


@app.command()
def sample(
    run: Annotated[
        Path, typer.Argument(help="A run, a checkpoint folder of it, or an exported .safetensors.")
    ],
    overrides: RunOverridesArgument = None,
    num: Annotated[int | None, typer.Option("--num", "-n", help="How many images.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ode, heun or sde.")] = None,
    steps: Annotated[int | None, typer.Option(help="Integration steps.")] = None,
    cfg: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    guidance_low: Annotated[float | None, typer.Option(help="Guide from this time on.")] = None,
    guidance_high: Annotated[float | None, typer.Option(help="Guide up to this time.")] = None,
    precision: SamplePrecisionOption = None,
    compile: SampleCompileOption = None,
    classes: ClassesOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default: RUN/generated.")] = None,
    npz: Annotated[bool, typer.Option("--npz", help="Also write the ADM evaluation file.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the images.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images per forward.")] = 32,
    step: StepOption = None,
    ema: EmaOption = None,
    codec_weights: CodecWeightsOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove what was drawn there with other settings.")
    ] = False,
) -> None:
    """Draw images from a run's averaged weights; settings left out are the run's own.

    What was stopped goes on by the same command; --num may differ, and no image goes.
    """
    from fastrepa.config import load_run_config, run_folder

    if run.suffix != ".safetensors":  # no run: refused before torch is imported, for seconds
        load_run_config(run_folder(run), overrides or ())
    with loading():
        from fastrepa.checkpoint.choice import options_of
        from fastrepa.generation.sample import sample_run

    done = sample_run(
        run,
        out,
        classes=classes,
        say=say,
        seed=seed,
        batch_size=batch_size,
        npz=npz,
        wanted=options_of(step, ema, overrides, codec_weights),
        overwrite=overwrite,
        num=num,
        sampler=sampler,
        steps=steps,
        cfg=cfg,
        guidance_low=guidance_low,
        guidance_high=guidance_high,
        precision=precision,
        compile=compile,
    )
    if done.is_rank_0:
        files = [str(p) for p in (done.grid, done.npz) if p]
        there = f", {done.there} were there" if done.there else ""
        there += f", {done.more} more stay" if done.more else ""
        if done.removed:
            say(f"{done.folder}: {done.removed} files of other settings removed")
        beside = f"; {', '.join(files)}" if files else ""
        say(f"{done.num} images in {done.folder} ({done.seconds:.1f} s{there}){beside}")


@app.command()
def evaluate(
    samples: Annotated[
        Path,
        typer.Argument(
            help="A run, a checkpoint folder of it or an exported .safetensors (it generates), a "
            "folder of images, an npz of ADM's, a prepared data set, or an npz of statistics."
        ),
    ],
    reference: Annotated[Path, typer.Argument(help="What they are compared with; any of these.")],
    overrides: RunOverridesArgument = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="fid, sfid, inception_score, kid, precision, recall, clip_score, and fd_, kd_, "
            "precision_ or recall_ with an encoder's space (fd_dinov2_vitb14), or FILE.py:CLASS of "
            "your own, with commas. Default: the encoders', or without any the first six."
        ),
    ] = None,
    encoders: Annotated[
        str | None, typer.Option(help="Spaces to measure in: NAME[=WEIGHTS][@INPUT], with commas.")
    ] = None,
    inception_weights: Annotated[
        Path | None, typer.Option(help="A local file; default: torch-fidelity's, downloaded once.")
    ] = None,
    clip: Annotated[
        str, typer.Option(help="open_clip's NAME=WEIGHTS (a tag or file), or local-dir:FOLDER.")
    ] = "ViT-L-14=openai",
    num: Annotated[int | None, typer.Option("--num", "-n", help="Images of a run.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="How a run's images are drawn: ode, heun or sde.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Integration steps.")] = None,
    cfg: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    guidance_low: Annotated[float | None, typer.Option(help="Guide from this time on.")] = None,
    guidance_high: Annotated[float | None, typer.Option(help="Guide up to this time.")] = None,
    precision: SamplePrecisionOption = None,
    compile: SampleCompileOption = None,
    seed: Annotated[int, typer.Option(help="Seed of a run's images.")] = 0,
    step: StepOption = None,
    ema: EmaOption = None,
    codec_weights: CodecWeightsOption = None,
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
    require(samples, reference)
    with loading():
        from fastrepa.checkpoint.choice import options_of
        from fastrepa.commands.evaluate.evaluate import evaluate as measure
        from fastrepa.commands.evaluate.report import print_evaluation
        from fastrepa.vision.registry import parse_encoders

    model, _, weights = clip.partition("=")
    brings, colon, folder = model.partition("local-dir:")
    model = brings + colon + expanded(folder)
    done = measure(
        samples,
        reference,
        metrics=[m.strip() for m in metrics.split(",") if m.strip()] if metrics else None,
        encoders=parse_encoders(encoders, "--encoders") if encoders else (),
        inception_weights=None if inception_weights is None else str(inception_weights),
        clip=(model, expanded(weights) or None), batch_size=batch_size, cache=cache,
        save_statistics=save_statistics, seed=seed,
        wanted=options_of(step, ema, overrides, codec_weights), num=num, sampler=sampler,
        steps=steps, cfg=cfg, guidance_low=guidance_low, guidance_high=guidance_high,
        precision=precision, compile=compile,
    )  # fmt: skip
    if done.is_rank_0:
        print_evaluation(done, as_json=json)


@app.command()
def convert(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run folder, a checkpoint folder of it or an exported .safetensors; with --from "
            "the run to make."
        ),
    ],
    file: Annotated[
        Path | None,
        typer.Argument(
            help="The file or folder to write, or with --from to read; --to hub needs none."
        ),
    ] = None,
    overrides: RunOverridesArgument = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="reference (REPA's .pt), safetensors, zero (DeepSpeed's), diffusers (a folder) or "
            "hub (that folder, with a model card, on the Hugging Face hub).",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", help="reference (a .pt of REPA's or bare weights) or zero (DeepSpeed's)."
        ),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="What safetensors and diffusers hold: ema or raw.")
    ] = "ema",
    step: StepOption = None,
    ema: EmaOption = None,
    ema_sigma_rel: Annotated[
        float | None,
        typer.Option(
            help="An EDM2 average that was not kept, made from the power-function averages that "
            "the run's checkpoints have."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="With --from: the new run's YAML configuration; default: what the file's own "
            "args say."
        ),
    ] = None,
    repo: Annotated[str | None, typer.Option(help="OWNER/NAME, or NAME of yours.")] = None,
    private: Annotated[
        bool, typer.Option("--private", help="A new repository that only you see.")
    ] = False,
    license: Annotated[
        str | None,
        typer.Option(help="The weights' licence (cc-by-4.0); default: none is stated."),
    ] = None,
    datasets: Annotated[
        str | None,
        typer.Option(help="Hub ids of the data sets trained on, with commas."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write what would be pushed; push nothing.")
    ] = False,
) -> None:
    """A run's newest checkpoint, or another, as other people's files, or theirs as a run to go on.

    zero is a universal checkpoint of DeepSpeed's: engines of stages 1 to 3 on any number of ranks
    load it with "checkpoint": {"load_universal": true} in their configuration. Read are these and
    plain ZeRO checkpoints. What diffusers makes is for DiffusionPipeline.from_pretrained with
    trust_remote_code=True, or for plain torch, and needs nothing of ours; hub pushes it with a card
    made of the run's configuration, data, metrics and samples.
    """
    from fastrepa.errors import ConfigError

    if (to is None) == (source is None):
        raise ConfigError(
            "convert: give one of --to reference|safetensors|zero|diffusers|hub and --from "
            "reference|zero"
        )
    require(*([run] if to is not None else [file] if file is not None else []))
    with loading():
        from fastrepa.checkpoint.choice import parse_step

    if to == "hub":
        with loading():
            from fastrepa.commands.convert.card import CardWords
            from fastrepa.commands.convert.hub import publish

        if repo is None:
            raise ConfigError("--to hub: give --repo OWNER/NAME")
        named = [name.strip() for name in (datasets or "").split(",") if name.strip()]
        done = publish(
            run, CardWords(repo, license, named), folder=file, private=private, dry_run=dry_run,
            weights=weights, ema=ema, ema_sigma_rel=ema_sigma_rel, step=parse_step(step),
            overrides=overrides or (),
        )  # fmt: skip
        stated = "" if license else "; no licence is stated (--license)"
        what = f"step {done.state.step} of {run}"
        if done.url is None:
            say(f"{what} in {file}: what would be pushed to {repo}; nothing was{stated}")
        else:
            say(f"{what} at {done.url}{stated}")
        return
    if repo or private or license or datasets or dry_run:
        raise ConfigError(
            "convert: --repo, --private, --license, --datasets and --dry-run go with --to hub"
        )
    if file is None:
        raise ConfigError("convert: name the file or folder, after the run")
    with loading():
        from fastrepa.commands.convert.exchange import export_run, import_reference

    if to is not None:
        state = export_run(
            run, file, to, weights=weights, ema=ema, ema_sigma_rel=ema_sigma_rel,
            step=parse_step(step), overrides=overrides or (),
        )  # fmt: skip
        say(f"step {state.step} of {run} in {file}")
    else:
        assert source is not None
        if step:
            raise ConfigError("--step: is for --to")
        state = import_reference(file, run, config, source=source, overrides=overrides or ())
        command = f"fastrepa train {typed(run / 'config.yaml')}"
        if not state.optimizer_step:  # weights alone, to draw from
            command = f"fastrepa sample {typed(run)}; to train them on: {command}"
        say(f"{run} starts at step {state.step}: {command}")
