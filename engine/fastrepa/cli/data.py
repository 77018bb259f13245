"""Commands about a data set: prepare, data verify, data show, data encode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastrepa.cli.app import ClassesOption, app, data_app, loading
from fastrepa.runtime.terminal import Terminal, say

CodecOption = Annotated[
    str | None, typer.Option("--codec", help="sd-vae: also store the latents' mean and deviation.")
]
CodecWeightsOption = Annotated[
    str | None,
    typer.Option(help="The codec's weights: hub id or local folder; default: sd-vae-ft-mse."),
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
def prepare(
    source: Annotated[
        Path,
        typer.Argument(
            help="Class folders of images, a tar, tar.gz or zip of them, images with a "
            "dataset.json, WebDataset tars, parquet tables, or a set of REPA's layout."
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(help="Where the shards go: a folder that is new, empty or a set of this."),
    ],
    resolution: Annotated[int, typer.Option(help="Side of the square crops in pixels.")],
    shard_size: Annotated[int, typer.Option(help="Images per shard.")] = 1000,
    image_format: Annotated[str, typer.Option("--format", help="png, jpeg or webp.")] = "png",
    quality: Annotated[
        int, typer.Option(help="JPEG and WebP quality, 1 to 100; WebP at 100 is lossless.")
    ] = 95,
    seed: Annotated[int, typer.Option(help="Seed of the shuffle.")] = 0,
    workers: Annotated[
        int | None, typer.Option(help="Processes per rank; default: one per core.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave unusable images out, named and counted.")
    ] = False,
    inside: Annotated[
        str | None,
        typer.Option(
            help="Folder inside the source that holds the class folders, or a split of its files; "
            "'.' at its end: the folders there, whatever they are called."
        ),
    ] = None,
    class_names: Annotated[
        Path | None, typer.Option(help="File that names the classes of a source with numbers.")
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="The images' column of parquet tables.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="The labels' column of parquet tables.")
    ] = None,
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
    from fastrepa.runtime.world import World

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

        def add_columns(folder: Path, world: World) -> None:
            encoded.append(encode_columns(folder, **columns, world=world))

        encode = add_columns

    done = make_shards(
        source,
        out,
        resolution=resolution, shard_size=shard_size, quality=quality, seed=seed,
        image_format=image_format,  # type: ignore[arg-type]
        workers=workers, skip_bad=skip_bad, inside=inside, class_names=class_names,
        image_column=image_column, label_column=label_column, encode=encode,
    )  # fmt: skip
    if done.is_rank_0 and done.was_there:
        say(
            f"{done.path} is finished already, {done.report.images:,} images with these settings, "
            f"whatever {source} holds now; to make it again, name another folder"
        )
    elif done.is_rank_0:
        print_report(done.report, Terminal(), done.path, done.images, done.seconds)
    if done.is_rank_0:
        for report in encoded:
            print_columns(report, Terminal())


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
        say(*report.to_json().split("\n"))
    else:
        print_report(report, Terminal())
    if not report.ok:
        raise typer.Exit(1)


@data_app.command("show")
def data_show(
    path: Annotated[Path, typer.Argument(help="A prepared set, or one of REPA's layout.")],
    out: Annotated[
        Path | None, typer.Option(help="PNG or folder; default: NAME_show.png, here.")
    ] = None,
    num: Annotated[int, typer.Option("--num", "-n", help="Images on the sheet.")] = 48,
    classes: ClassesOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice.")] = 0,
    features: Annotated[
        int, typer.Option(help="Images shown beside their latents and features; 0: no picture.")
    ] = 6,
) -> None:
    """Draw a contact sheet of a data set, and its latents and features as pictures."""
    from fastrepa.commands.show.show import print_shown, show

    report = show(path, out, num=num, classes=classes, seed=seed, features=features, say=say)
    print_shown(report, Terminal())


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
        bool,
        typer.Option(
            "--replace",
            help="Make a column anew that has other settings; of one with the same, the files "
            "whose contents were altered.",
        ),
    ] = False,
) -> None:
    """Add latents and an encoder's features to a prepared set; under torchrun, on every GPU.

    A run that was killed goes on where it stopped; files that are missing or damaged are made
    again. Training then needs neither the autoencoder's encoder (data.latents=cached) nor the
    frozen one (vision.targets=cached).
    """
    from fastrepa.data.format.shards import load_manifest
    from fastrepa.errors import DataError

    load_manifest(path)  # a folder that is no set is left as it is
    with loading():
        from fastrepa.commands.prepare.encode import encode_columns, encode_settings, print_encoded
    from fastrepa.runtime.ownership import owned_by_rank_0
    from fastrepa.runtime.world import patient_world

    settings = encode_settings(codec, codec_weights, cache_features, flip, precision, batch_size)
    with patient_world() as world, owned_by_rank_0(path, "fastrepa data encode", world, DataError):
        report = encode_columns(path, **settings, replace=replace, world=world)
    if world.is_rank_0:
        print_encoded(report, Terminal())
