"""Everything that can be wrong with a data set in the reference's layout (reference_layout.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastrepa.commands.verify.checks import Check, FileProblem, Findings, image_problem
from fastrepa.data.format.reference_layout import (
    IMAGES,
    LABELS,
    LATENTS,
    Key,
    name_of,
    read_labels,
    scan_folder,
    short,
)
from fastrepa.data.images import UnreadableImageError, open_image
from fastrepa.errors import DataError
from fastrepa.reading.arrays import read_npy

CHANNELS, DOWN = 8, 8  # of Stable Diffusion's moments; pixels a latent
PAIRS_PER_CHECK = 128
_LISTS = (f"{LATENTS}/{LABELS}", f"{IMAGES}/{LABELS}")  # REPA's dataset_tools.py writes both
_LOOKED_AT = 9  # images whose size is looked at to know that of the set


def plan_reference(folder: Path, findings: Findings, *, quick: bool) -> list[Check]:
    """Check names, pairs and labels now; what needs the files' contents, later unless `quick`."""
    images, latents = (_sizes(folder, part, findings) for part in (IMAGES, LATENTS))
    for key in sorted(images.keys() - latents.keys()):
        findings.wrong(name_of(IMAGES, key), "has no latents of its name")
    for key in sorted(latents.keys() - images.keys()):
        findings.wrong(name_of(LATENTS, key), "has no image of its name")
    _check_labels(folder, {name_of(LATENTS, key) for key in latents}, findings)
    findings.num_files = len(images) + len(latents) + (folder / LATENTS / LABELS).is_file()
    if quick:
        return []
    findings.num_images, findings.columns["moments"] = len(images), len(latents)
    findings.num_bytes = sum(images.values()) + sum(latents.values())
    side = _usual_side([folder / name_of(IMAGES, key) for key in sorted(images)])
    keys = sorted(images.keys() | latents.keys())
    checks: list[Check] = []
    for first in range(0, len(keys), PAIRS_PER_CHECK):
        part = keys[first : first + PAIRS_PER_CHECK]
        files = {name_of(IMAGES, key): images[key] for key in part if key in images}
        files |= {name_of(LATENTS, key): latents[key] for key in part if key in latents}
        checks.append(FilesCheck(folder, tuple(files), side, sum(files.values())))
    return checks


@dataclass(frozen=True)
class FilesCheck:
    """Some images and .npy files: whatever can be wrong with each by itself."""

    folder: Path
    files: tuple[str, ...]
    side: int  # of the images, in pixels
    num_bytes: int

    @property
    def file(self) -> str:
        return self.files[0]

    def run(self, go_on: Callable[[], None]) -> list[FileProblem]:
        problems = []
        for file in self.files:
            go_on()
            path = self.folder / file
            try:
                if path.suffix == ".npy":
                    found = list(_latents_problems(path, self.side // DOWN))
                else:
                    image = image_problem(path.read_bytes(), self.side, "png")
                    found = [] if image is None else [image]
            except OSError as error:
                found = [f"cannot be read ({error.strerror or error})"]
            problems += [FileProblem(file, None, problem) for problem in found]
        return problems


def _latents_problems(path: Path, side: int) -> Iterator[str]:
    try:
        moments = read_npy(path)
    except DataError as error:
        yield str(error).removeprefix(f"{path}: ")
        return
    if moments.dtype != np.dtype("<f4"):
        yield f"of dtype {moments.dtype}, not float32 (<f4)"
    if moments.ndim > 1 and moments.flags.f_contiguous:
        yield "in Fortran order"
    if moments.shape != (CHANNELS, side, side):
        yield f"of shape {list(moments.shape)}, not {[CHANNELS, side, side]}"
    elif moments.dtype.kind == "f":
        if not np.isfinite(moments).all():
            yield "moments that are not finite"
        if (moments[CHANNELS // 2 :] < 0).any():
            yield "a negative standard deviation"


def _sizes(folder: Path, part: str, findings: Findings) -> dict[Key, int]:
    """Bytes of every file of the layout in `part`."""
    found: dict[Key, int] = {}
    if not (folder / part).is_dir():
        findings.wrong(f"{part}/", "missing")
        return found
    top = scan_folder(folder, part)
    beside = [name_of(part, ("", number)) for number in top.sizes]  # in no folder
    beside += [f"{part}/{name}" for name in top.strange + top.hidden]
    for name in top.folders:
        scan = scan_folder(folder, part, name)
        found |= {(name, number): size for number, size in scan.sizes.items()}
        for other in sorted(scan.strange + scan.folders):
            # Opening the set refuses it, for it may be a sample with a broken name.
            findings.wrong(f"{part}/{name}/{other}", "its name is not of the reference's layout")
        beside += [f"{part}/{name}/{other}" for other in scan.hidden]
    for file in beside:
        if file not in _LISTS:
            findings.notes.append(f"{file}: unknown; not of the reference's layout")
    if not found:
        findings.wrong(f"{part}/", "holds no file of the reference's layout")
    return found


def _check_labels(folder: Path, latents: set[str], findings: Findings) -> None:
    name = f"{LATENTS}/{LABELS}"
    if not (folder / name).exists():
        findings.wrong(name, "missing")
        return
    labelled: Counter[str] = Counter()
    classes = set()
    try:
        for entry in read_labels(folder):
            if entry.file is None:
                findings.wrong(name, f"labels[{entry.number}] is not [file, label]")
                continue
            labelled[entry.file] += 1
            if entry.label is None:
                problem = f"its label is {short(entry.entry[1])}, not a whole number from 0 on"
                findings.wrong(name, problem, entry.file)
            else:
                classes.add(entry.label)
            if f"{LATENTS}/{entry.file}" not in latents:
                findings.wrong(name, "labelled, but the file is missing", entry.file)
    except DataError as error:
        findings.wrong(name, str(error).removeprefix(f"{folder / name}: "))
        return
    for file in sorted(latents):
        if file.removeprefix(f"{LATENTS}/") not in labelled:
            findings.wrong(file, f"has no label in {LABELS}")
    for file, times in labelled.items():
        if times > 1:
            findings.wrong(name, f"labelled {times} times", file)
    if classes and (empty := max(classes) + 1 - len(classes)):
        findings.notes.append(f"{name}: {empty} of the labels 0..{max(classes)} have no sample")


def _usual_side(images: list[Path]) -> int:
    """The side, in pixels, of most of a few images spread over the set; 0 where none is read."""
    sides: Counter[int] = Counter()
    for image in images[:: max(1, len(images) // _LOOKED_AT)][: _LOOKED_AT + 1]:
        try:
            sides[min(open_image(image.read_bytes()).size)] += 1
        except (UnreadableImageError, OSError):  # FilesCheck will say what is wrong with it
            continue
    return sides.most_common(1)[0][0] if sides else 0
