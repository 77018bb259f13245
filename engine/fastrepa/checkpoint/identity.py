"""A checkpoint's record of the data it was trained on, beside the data that is there now.

A label is a number: a set whose classes are others, or stand in another order, would teach the
generator other things under the labels that it knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fastrepa.checkpoint.format import RunState
from fastrepa.data.classes import first_difference
from fastrepa.data.datasets import DataSet
from fastrepa.data.format.shards import MANIFEST, load_manifest
from fastrepa.errors import DataError


def trained_classes(state: RunState, num_classes: int) -> list[int]:
    """Numbers of the classes that had images in training; all where that is not recorded."""
    if state.trained is not None:
        return [number for number in state.trained if number < num_classes]
    return list(range(len(state.classes) or num_classes))


def check_classes(state: RunState, data: DataSet) -> None:
    """DataError that names the first class of the set which is not the checkpoint's."""
    if found := other_classes(state, data.classes):
        raise DataError(
            f"{data.path}: {found}: labels mean other classes than in the run; give the set that "
            f"it was trained on, or name another run"
        )


def other_classes(state: RunState, classes: Sequence[str]) -> str:
    """Words for the first class that differs; none where they are alike or were not recorded."""
    if not state.classes or (found := first_difference(state.classes, classes)) is None:
        return ""
    number, was, now = found
    then = f"in the checkpoint of step {state.step}"
    if was is None:
        return f"class {number} is {now!r}; {then} there is no such class"
    if now is None:
        return f"there is no class {number}, {then} it is {was!r}"
    return f"class {number} is {now!r}, {then} it is {was!r}"


def other_samples(state: RunState, data: DataSet) -> Iterator[str]:
    """Words for a set of the same classes that holds other samples, as far as it is recorded."""
    if state.num_samples not in (0, data.num_samples):
        yield f"data.path held {state.num_samples:,} images and now holds {data.num_samples:,}"
    elif state.data_digest not in ("", data.digest):
        yield "data.path holds other images or labels than before"


def classes_beside(state: RunState, path: Path) -> str:
    """As `other_classes`, of the prepared set at `path`, where there still is one."""
    if not (path / MANIFEST).is_file():
        return ""
    try:
        manifest = load_manifest(path)
    except DataError:
        return ""
    return other_classes(state, [record.name for record in manifest.classes])
