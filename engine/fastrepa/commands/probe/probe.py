"""`fastrepa probe`: what a run's blocks know, or whether an encoder will help on a set of images.

The two are told apart by what the target holds: a run folder has a config.yaml; a data set has a
manifest.json, or the reference's layout, or is a folder of pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrepa.commands.probe.data import IMAGES, DataProbe, probe_data
from fastrepa.commands.probe.images import flat_images, has_folders
from fastrepa.commands.probe.picture import save_features, save_heat_map
from fastrepa.commands.probe.report import (
    data_record,
    print_data_probe,
    print_run_probe,
    run_record,
)
from fastrepa.commands.probe.run import IMAGES as RUN_IMAGES
from fastrepa.commands.probe.run import TIME, RunProbe, probe_run
from fastrepa.data.datasets import is_data
from fastrepa.errors import ConfigError, DataError, decoration, worded, writing
from fastrepa.runtime.files import write_whole
from fastrepa.runtime.terminal import Terminal, say_json
from fastrepa.vision.registry import parse_encoders

RECORD, HEAT_MAP, FEATURES = "probe.json", "heat_map.png", "features.png"
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Probed:
    """A probe's findings, its record, and the files in its folder: that and a picture."""

    found: RunProbe | DataProbe
    record: dict[str, Any]
    folder: Path
    files: list[str]


def probe(
    target: Path,
    *,
    encoders: str | None = None,
    num: int | None = None,
    time: float | None = None,
    held_out: Path | None = None,
    resolution: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Probed:
    """Probe the target, and write the record and the picture into a folder.

    By default RUN/probe, or NAME_probe in the current folder. `probe_run` and `probe_data` say what
    the arguments are; `encoders` is the command line's text. Raises ConfigError for an argument
    that is for the other kind of target, DataError for a target of neither, and what the two raise.
    """
    for name, value, least in (("num", num, 1), ("batch-size", batch_size, 1), ("seed", seed, 0)):
        if value is not None and value < least:
            raise ConfigError(f"--{name}: {value} is less than {least}")
    chosen = parse_encoders(encoders, "--encoders") if encoders is not None else ()
    is_run = kind_of(target) == "run"
    foreign: dict[str, Any] = (
        {"resolution": resolution} if is_run else {"time": time, "held-out": held_out}
    )
    for name, value in foreign.items():
        if value is not None:
            kinds = ("a folder of images", "a run") if is_run else ("a run", "a data set")
            raise ConfigError(f"--{name}: is for {kinds[0]}, and {target} is {kinds[1]}")
    if overrides and not is_run:
        raise ConfigError(f"{overrides[0]}: is for a run, and {target} is a data set")
    if not is_run and not chosen:
        raise ConfigError("--encoders: say which to try, such as dinov2-vit-b,clip-vit-l")
    folder = out or (target / "probe" if is_run else Path(f"{target.resolve().name}_probe"))
    _made(folder)
    shared: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "progress": progress}
    if is_run:
        found: RunProbe | DataProbe = probe_run(
            target,
            encoders=chosen,
            held_out=held_out,
            num=num or RUN_IMAGES,
            time=TIME if time is None else time,
            overrides=overrides,
            **shared,
        )
    else:
        found = probe_data(target, chosen, num=num or IMAGES, resolution=resolution, **shared)
    record = run_record(found) if isinstance(found, RunProbe) else data_record(found)
    picture = HEAT_MAP if is_run else FEATURES
    with writing(f"--out: {folder}"):
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        write_whole(folder / RECORD, text.encode())
    files = [RECORD]
    with decoration(folder / picture):
        if isinstance(found, RunProbe):
            save_heat_map(found, folder / picture)
        else:
            save_features(found, folder / picture)
        files.append(picture)
    return Probed(found, record, folder, files)


def print_probe(probed: Probed, *, as_json: bool = False) -> None:
    """The tables and what they say, or the record."""
    if as_json:
        say_json(probed.record, indent=1)
        return
    console = Terminal()
    if isinstance(probed.found, RunProbe):
        print_run_probe(probed.found, console)
    else:
        print_data_probe(probed.found, console)
    console.print(f"{probed.folder}/: {', '.join(probed.files)}", soft_wrap=True)


def kind_of(target: Path) -> str:
    """Return "run" or "data set" by what the folder holds; DataError for neither."""
    if target.is_dir():
        if (target / "config.yaml").is_file():
            return "run"
        if is_data(target) or has_folders(target) or flat_images(target):
            return "data set"
        problem = "holds none of these"
    else:
        problem = "is a file" if target.exists() else "no such folder"
    raise DataError(
        f"{target}: {problem}; expected a run folder (config.yaml), a prepared data set "
        f"(manifest.json) or a folder of images"
    )


def _made(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"--out: {folder}: cannot be made ({worded(e)})") from None
