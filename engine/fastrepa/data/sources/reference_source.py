"""The reference's layout as a source: pictures, labels and latents, paired by name.

`ReferenceSet` opens a set to train on, and refuses one with anything missing. Here the complete
samples are taken, and the others rejected by name.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

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
from fastrepa.data.sources.entries import ENTRY_DTYPE, MAX_LABEL, Listing, Rejected
from fastrepa.errors import DataError, printable


def list_reference(source: Path, class_names: list[str] | None) -> Listing:
    """List a set in the reference's layout, `moments` included.

    Raises DataError when dataset.json is damaged, or no sample is complete.
    """
    rejected: list[Rejected] = []
    ignored: list[str] = []

    def reject(part: str, key: Key, reason: str) -> None:
        rejected.append(Rejected(printable(name_of(part, key)), reason))

    try:
        labels = _labels(source, class_names, rejected)
        images, latents = (_sizes(source, part, ignored) for part in (IMAGES, LATENTS))
    except DataError as error:
        raise DataError(printable(str(error))) from None
    complete = []
    for key in images:
        if key not in latents:
            reject(IMAGES, key, f"no latents in {LATENTS}")
        elif key not in labels:
            reject(IMAGES, key, f"no usable label in {LATENTS}/{LABELS}")
        else:
            complete.append(key)
    for key in sorted(latents.keys() - images.keys()):
        reject(LATENTS, key, "latents without an image")
    for key in sorted(labels.keys() - images.keys() - latents.keys()):
        reject(LATENTS, key, "labelled, but missing")
    if not complete:
        first = f" ({rejected[0].name}: {rejected[0].reason})" if rejected else ""
        raise DataError(printable(f"{source}: no sample with image, latents and label{first}"))
    entries = np.zeros(len(complete), dtype=ENTRY_DTYPE)
    entries["container"], entries["inflated"] = -1, -1
    entries["size"] = [images[key] for key in complete]
    entries["label"] = [labels[key] for key in complete]
    top = int(entries["label"].max())
    return Listing(
        root=source,
        classes=class_names or [str(label) for label in range(top + 1)],
        containers=[],
        entries=entries,
        names=[name_of(IMAGES, key) for key in complete],
        rejected=rejected,
        ignored=ignored,
        moments=[name_of(LATENTS, key) for key in complete],
    )


def _labels(
    source: Path, class_names: list[str] | None, rejected: list[Rejected]
) -> dict[Key, int]:
    most = MAX_LABEL if class_names is None else len(class_names) - 1
    labels: dict[Key, int] = {}
    twice = set()
    for entry in read_labels(source):
        if entry.key is None:
            raise DataError(f"{source / LATENTS / LABELS}: {entry.misnamed}")
        if entry.key in labels:
            twice.add(entry.key)
        if entry.label is None or entry.label > most:
            text = f"its label is {short(entry.entry[1])}, not 0..{most}"
            rejected.append(Rejected(printable(f"{LATENTS}/{entry.file}"), text))
        else:
            labels[entry.key] = entry.label
    for key in sorted(twice):
        del labels[key]
        rejected.append(Rejected(printable(name_of(LATENTS, key)), f"labelled twice in {LABELS}"))
    return labels


def _sizes(source: Path, part: str, ignored: list[str]) -> dict[Key, int]:
    """Bytes of every file of the layout, at most one folder deep."""
    found = {}
    top = scan_folder(source, part)
    for folder in ("", *top.folders):
        scan = scan_folder(source, part, folder) if folder else top
        found.update({(folder, number): size for number, size in scan.sizes.items()})
        strange = (name for name in scan.strange if name != LABELS)
        ignored += [printable("/".join(filter(None, (part, folder, name)))) for name in strange]
    return found
