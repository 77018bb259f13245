"""Everything that can be wrong with a data set in the reference's layout (REPA_SPEC.md).

    images/00000/img00000000.png             8-bit RGB
    vae-sd/00000/img-mean-std-00000000.npy   float32 [8,h,w], cat[mean, std]
    vae-sd/dataset.json                      {"labels": [["00000/img-mean-std-00000000.npy", 12]]}

An image, its latents and its label are paired by name: by folder and number.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastrepa.commands.verify.checks import Check, Findings, Problem, image_problem
from fastrepa.data.format.reference import IMAGES, LABELS, LATENTS

CHANNELS, DOWN = 8, 8  # of Stable Diffusion's moments; pixels a latent
PAIRS_PER_CHECK = 128
_NAMES = {IMAGES: r"img(\d+)\.png", LATENTS: r"img-mean-std-(\d+)\.npy"}
_LOOKED_AT = 9  # images whose size is looked at to know that of the set


def is_reference(folder: Path) -> bool:
    """Whether the folder looks like the reference's layout, sound or not."""
    return (folder / IMAGES).is_dir() or (folder / LATENTS).is_dir()


def plan_reference(folder: Path, findings: Findings, *, quick: bool) -> list[Check]:
    """Check names, pairs and labels now; what needs the files' contents, later unless `quick`."""
    images = _by_key(folder, IMAGES, findings)
    latents = _by_key(folder, LATENTS, findings)
    for key in sorted(images.keys() - latents.keys()):
        findings.wrong(f"{IMAGES}/{images[key]}", "has no latents of its name")
    for key in sorted(latents.keys() - images.keys()):
        findings.wrong(f"{LATENTS}/{latents[key]}", "has no image of its name")
    _check_labels(folder, set(latents.values()), findings)
    findings.num_files = len(images) + len(latents) + (folder / LATENTS / LABELS).is_file()
    if quick:
        return []
    findings.num_images, findings.columns["moments"] = len(images), len(latents)
    side = _usual_side(folder, sorted(images.values()))
    keys = sorted(images.keys() | latents.keys())
    checks: list[Check] = []
    for first in range(0, len(keys), PAIRS_PER_CHECK):
        part = keys[first : first + PAIRS_PER_CHECK]
        files = [f"{IMAGES}/{images[key]}" for key in part if key in images]
        files += [f"{LATENTS}/{latents[key]}" for key in part if key in latents]
        sizes = [(folder / file).stat().st_size for file in files]
        checks.append(FilesCheck(folder, tuple(files), side, sum(sizes)))
    findings.num_bytes = sum(check.num_bytes for check in checks)
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

    def run(self, go_on: Callable[[], None]) -> list[Problem]:
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
            problems += [Problem(file, None, problem) for problem in found]
        return problems


def _latents_problems(path: Path, side: int) -> Iterator[str]:
    try:
        moments = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        yield f"not a readable .npy ({error})"
        return
    if not isinstance(moments, np.ndarray):
        yield "an archive of arrays, not one"
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


def _by_key(folder: Path, part: str, findings: Findings) -> dict[str, str]:
    """Path below `part` of every file of the layout, by FOLDER/NUMBER."""
    found: dict[str, str] = {}
    if not (folder / part).is_dir():
        findings.wrong(f"{part}/", "missing")
        return found
    for place, _, names in os.walk(folder / part):
        below = Path(place).relative_to(folder / part)
        for name in sorted(names):
            path = (below / name).as_posix()
            match = re.fullmatch(_NAMES[part], name)
            if match and len(below.parts) == 1:
                found[f"{below}/{match[1]}"] = path
            elif len(below.parts) == 1 and not name.startswith("."):
                # Opening the set refuses it, for it may be a sample with a broken name.
                findings.wrong(f"{part}/{path}", "its name is not of the reference's layout")
            elif path != LABELS or part != LATENTS:
                findings.notes.append(f"{part}/{path}: unknown; not of the reference's layout")
    if not found:
        findings.wrong(f"{part}/", "holds no file of the reference's layout")
    return found


def _check_labels(folder: Path, latents: set[str], findings: Findings) -> None:
    name = f"{LATENTS}/{LABELS}"
    try:
        raw = json.loads((folder / name).read_text(encoding="utf-8"))
        entries = raw["labels"]
    except FileNotFoundError:
        findings.wrong(name, "missing")
        return
    except (ValueError, RecursionError) as error:
        findings.wrong(name, f"not valid JSON ({error})")
        return
    except (KeyError, TypeError):
        entries = None
    if not isinstance(entries, list):
        findings.wrong(name, 'has no list "labels"')
        return
    labelled: Counter[str] = Counter()
    classes = set()
    for number, entry in enumerate(entries):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            findings.wrong(name, f"labels[{number}] is not [file, label]")
            continue
        file, label = entry
        labelled[file] += 1
        if not _is_label(label):
            findings.wrong(name, f"its label is {label!r}, not a whole number from 0 on", file)
        else:
            classes.add(label)
        if file not in latents:
            findings.wrong(name, "labelled, but the file is missing", file)
    for file in sorted(latents - labelled.keys()):
        findings.wrong(f"{LATENTS}/{file}", f"has no label in {LABELS}")
    for file in (file for file, times in labelled.items() if times > 1):
        findings.wrong(name, f"labelled {labelled[file]} times", file)
    if classes and (empty := max(classes) + 1 - len(classes)):
        findings.notes.append(f"{name}: {empty} of the labels 0..{max(classes)} have no sample")


def _is_label(label: Any) -> bool:
    return isinstance(label, int) and not isinstance(label, bool) and label >= 0


def _usual_side(folder: Path, images: list[str]) -> int:
    """The side, in pixels, of most of a few images spread over the set; 0 where none is read."""
    sides: Counter[int] = Counter()
    for image in images[:: max(1, len(images) // _LOOKED_AT)][: _LOOKED_AT + 1]:
        try:
            with Image.open(folder / IMAGES / image) as opened:
                sides[min(opened.size)] += 1
        except Exception:  # FilesCheck will say what is wrong with it
            continue
    return sides.most_common(1)[0][0] if sides else 0
