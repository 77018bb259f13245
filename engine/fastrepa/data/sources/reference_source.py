"""REPA's own layout (reference.py) as a source: pictures, labels and latents, paired by name.

`ReferenceSet` opens a set to train on, and refuses one with anything missing. Here the complete
samples are taken, and the others rejected by name.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from fastrepa.data.format.reference import IMAGES, LABELS, LATENTS
from fastrepa.data.sources.entries import ENTRY_DTYPE, MAX_LABEL, Listing, Rejected, printable
from fastrepa.errors import DataError

_IMAGE = re.compile(r"([^/\\]+/)?img(\d+)\.png")
_MOMENTS = re.compile(r"([^/\\]+/)?img-mean-std-(\d+)\.npy")


def is_reference(source: Path) -> bool:
    """Whether a folder is laid out as the reference's."""
    return (source / IMAGES).is_dir() and (source / LATENTS / LABELS).is_file()


def list_reference(source: Path, class_names: list[str] | None) -> Listing:
    """List a set in the reference's layout, `moments` included.

    Raises DataError when dataset.json is damaged, or no sample is complete.
    """
    rejected: list[Rejected] = []
    ignored: list[str] = []
    labels = _labels(source / LATENTS / LABELS, class_names, rejected)
    images = _files(source, IMAGES, _IMAGE, ignored)
    latents = _files(source, LATENTS, _MOMENTS, ignored)
    complete = []
    for key, (name, size) in images.items():
        if key not in latents:
            rejected.append(Rejected(printable(name), f"no latents in {LATENTS}"))
        elif key not in labels:
            rejected.append(Rejected(printable(name), f"no usable label in {LATENTS}/{LABELS}"))
        else:
            complete.append((name, size, latents[key][0], labels[key]))
    for key, (name, _) in latents.items():
        if key not in images:
            rejected.append(Rejected(printable(name), "latents without an image"))
    for key in labels:
        if key not in images and key not in latents:
            name = f"{LATENTS}/{key[0]}img-mean-std-{key[1]}.npy"
            rejected.append(Rejected(printable(name), "labelled, but missing"))
    if not complete:
        first = f" ({rejected[0].name}: {rejected[0].reason})" if rejected else ""
        raise DataError(printable(f"{source}: no sample with image, latents and label{first}"))
    entries = np.zeros(len(complete), dtype=ENTRY_DTYPE)
    entries["container"], entries["inflated"] = -1, -1
    entries["size"] = [size for _, size, _, _ in complete]
    entries["label"] = [label for *_, label in complete]
    top = int(entries["label"].max())
    return Listing(
        root=source,
        classes=class_names or [str(label) for label in range(top + 1)],
        containers=[],
        entries=entries,
        names=[name for name, *_ in complete],
        rejected=rejected,
        ignored=ignored,
        moments=[moments for _, _, moments, _ in complete],
    )


def _labels(
    path: Path, class_names: list[str] | None, rejected: list[Rejected]
) -> dict[tuple[str, str], int]:
    """Label by folder and number."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["labels"]
    except OSError as error:
        raise DataError(printable(f"{path}: cannot be read ({error.strerror})")) from None
    except (ValueError, RecursionError) as error:
        raise DataError(printable(f"{path}: not valid JSON ({error})")) from None
    except (KeyError, TypeError):
        entries = None
    if not isinstance(entries, list) or not entries:
        raise DataError(printable(f'{path}: has no list "labels" with entries'))
    most = MAX_LABEL if class_names is None else len(class_names) - 1
    labels: dict[tuple[str, str], int] = {}
    twice = set()
    for number, entry in enumerate(entries):
        name, label = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        match = _MOMENTS.fullmatch(name) if isinstance(name, str) else None
        if match is None or match[1] in ("./", "../"):
            raise DataError(
                printable(f"{path}: labels[{number}] is {_short(entry)}, ")
                + 'not ["FOLDER/img-mean-std-NUMBER.npy", label]'
            )
        key = (match[1] or "", match[2])
        if key in labels:
            twice.add(key)
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label <= most:
            text = f"its label is {_short(label)}, not 0..{most}"
            rejected.append(Rejected(printable(f"{LATENTS}/{name}"), text))
        else:
            labels[key] = label
    for key in sorted(twice):
        del labels[key]
        name = f"{LATENTS}/{key[0]}img-mean-std-{key[1]}.npy"
        rejected.append(Rejected(printable(name), f"labelled twice in {LABELS}"))
    return labels


def _files(
    source: Path, top: str, pattern: re.Pattern[str], ignored: list[str]
) -> dict[tuple[str, str], tuple[str, int]]:
    """Files of one half of the layout by folder and number: their names below source, and sizes."""
    found = {}
    folders = [""]
    for folder in folders:
        try:
            with os.scandir(source / top / folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            text = f"{source / top / folder}: cannot be read ({error.strerror})"
            raise DataError(printable(text)) from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if not folder:
                    folders.append(f"{entry.name}/")
                continue
            match = pattern.fullmatch(folder + entry.name)
            if match is None:
                if entry.name != LABELS:
                    ignored.append(printable(f"{top}/{folder}{entry.name}"))
                continue
            try:
                size = entry.stat().st_size
            except OSError:  # a link to nowhere
                continue
            found[match[1] or "", match[2]] = (f"{top}/{folder}{entry.name}", size)
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
