"""Any kind of source that `fastrepa prepare` reads -> one flat listing of labelled byte ranges.

A source is, told by what lies at its path:
    a folder of class folders of images (folders.py, class_folders.py)
    a .tar (compressed or not) or .zip of CLASS/IMAGE, or of a tar for each class (archives.py)
    a folder of such archives, with class folders inside, or one for each class
    images with a dataset.json of labels (label_files.py), in a folder or an archive
    WebDataset's images with .cls or .json, in tars, or unpacked (webdataset.py)
    a parquet file, or a folder of them (tables.py)
    REPA's layout, images/ beside vae-sd/ (reference_source.py)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastrepa.data.format.reference_layout import IMAGES, is_reference
from fastrepa.data.format.shards import FORMAT, MANIFEST, ShardSet
from fastrepa.data.sources.archives import scan_archives
from fastrepa.data.sources.class_folders import Inside, labels_of_folders, refuse_splits
from fastrepa.data.sources.entries import ENTRY_DTYPE, Listing, Rejected, close_files
from fastrepa.data.sources.folders import entries_of, scan_folder
from fastrepa.data.sources.label_files import (
    find_dataset_json,
    labels_of_dataset_json,
)
from fastrepa.data.sources.members import (
    ARCHIVE_EXTENSIONS,
    TABLE_EXTENSIONS,
    Members,
    stem_of,
)
from fastrepa.data.sources.reference_source import list_reference
from fastrepa.data.sources.splits import split_of, splits_among
from fastrepa.data.sources.tables import list_tables
from fastrepa.data.sources.webdataset import holds_labels, labels_of_keys, read_class_names
from fastrepa.errors import DataError, printable
from fastrepa.reading.text import read_json


def list_source(
    source: Path,
    *,
    inside: str | None = None,
    class_names: Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    spool: Path,
    progress: bool,
) -> Listing:
    """List a source of any kind.

    Args:
        source: see above. Hidden files and folders are passed over.
        inside: a folder in the source, whose folders are then the classes; "." at its end takes
            them whatever they are called. For tables and archives whose names tell a split, it.
        class_names: text file with a class name on each line, for sources with numeric labels.
        image_column, label_column: parquet: None takes the only one that can be meant.
        spool: folder for copies of what cannot be read at random (compressed tars, parquet);
            nothing else is written, and finished copies are used again.
        progress: show progress bars.

    Raises DataError, in one line, for a source that is damaged, ambiguous or of no known kind, and
    for an argument that does not apply to its kind.
    """
    if not source.exists():
        raise DataError(printable(f"{source}: no such file or folder"))
    close_files()
    given = {"inside": inside, "class_names": class_names, "image_column": image_column,
             "label_column": label_column}  # fmt: skip
    try:
        names = None if class_names is None else read_class_names(class_names)
        return _list(source, Inside(inside), given, names, spool, progress)
    except DataError as error:
        raise DataError(printable(error)) from None  # names may hold anything


def _list(
    source: Path,
    inside: Inside,
    given: dict[str, Any],
    names: list[str] | None,
    spool: Path,
    progress: bool,
) -> Listing:
    source = inside.enter(source)
    tables, archives = _files_of(source)
    if tables and archives:
        raise DataError(f"{source}: holds {tables[0].name} and {archives[0].name}; "
                        "give one kind alone")  # fmt: skip
    if tables:
        tables, inside = _of_one_split(source, tables, inside)
        if inside.path:
            _refuse(source, given, "inside", "a parquet table")
        return list_tables(
            source, tables, image_column=given["image_column"], label_column=given["label_column"],
            class_names=names, spool=spool, progress=progress,
        )  # fmt: skip
    if archives:
        _refuse(source, given, "image_column label_column", "an archive")
        archives, inside = _of_one_split(source, archives, inside)
        found = scan_archives(source, archives, inside.path, spool=spool, progress=progress)
        _check_pictures(source, found, inside)
        return _listing(source, found, inside, names or _names_of_set(source))
    if is_reference(source):
        only_folder = "image_column label_column" + (" inside" if inside.path else "")
        _refuse(source, given, only_folder, "a set in the reference's layout")
        return list_reference(source, names)
    if source.name == IMAGES and is_reference(source.parent) and not inside.as_it_is:
        raise DataError(f"{source}: its labels lie beside it, in REPA's layout; give its folder")
    _refuse(source, given, "image_column label_column", "a folder of class folders")
    if inside.path:
        raise DataError(f"{source}: holds no folder {inside.path} (--inside)")
    return _listing(source, [scan_folder(source)], inside, names)


def _files_of(source: Path) -> tuple[list[Path], list[Path]]:
    """Tables and archives: the source itself, or, in a folder without folders, its files."""
    if not source.is_dir():
        name = source.name.lower()
        if name.endswith(TABLE_EXTENSIONS):
            return [source], []
        if name.endswith(ARCHIVE_EXTENSIONS):
            return [], [source]
        raise DataError(
            f"{source}: not a folder of class folders, nor by its name an archive ("
            f"{' '.join(ARCHIVE_EXTENSIONS[:-2])}) or a table ({' '.join(TABLE_EXTENSIONS)})"
        )
    folders, files = entries_of(source)
    if folders:
        return [], []
    return (
        [source / name for name, _ in files if name.lower().endswith(TABLE_EXTENSIONS)],
        [source / name for name, _ in files if name.lower().endswith(ARCHIVE_EXTENSIONS)],
    )


def _of_one_split(source: Path, paths: list[Path], inside: Inside) -> tuple[list[Path], Inside]:
    """The files of the split that `inside` names, and what it then asks for within each.

    Raises DataError for files of several splits of which none was chosen.
    """
    name_of = {path: _bare_name(path) for path in paths}
    several = splits_among(name_of.values())
    if not several or (inside.as_it_is and not inside.path):
        return paths, inside
    split = {path: found[0] for path in paths if (found := split_of(name_of[path]))}
    wanted = split_of(inside.path)
    chosen = [path for path in paths if wanted and split.get(path) == wanted[0]]
    if not chosen:
        first = {split[path]: path.name for path in reversed(paths) if name_of[path] in several}
        one = "train" if "train" in first else min(first)
        raise DataError(
            f"{source}: its files are of several splits ({', '.join(sorted(first.values()))}); "
            f"give one of them, --inside {inside.below(one, whole=False)}, or all, --inside "
            + inside.below(".", whole=False)
        )
    return chosen, Inside("." if inside.as_it_is else None)


def _bare_name(path: Path) -> str:
    return path.stem if path.name.lower().endswith(TABLE_EXTENSIONS) else stem_of(path.name)


def _refuse(source: Path, given: dict[str, Any], arguments: str, kind: str) -> None:
    for name in arguments.split():
        if given[name] is not None:
            raise DataError(f"{source}: {name.replace('_', ' ')} does not apply to {kind}")


def _names_of_set(source: Path) -> list[str] | None:
    """Class names of a prepared set, which is checked too; None for any other source."""
    try:
        manifest = read_json(source / MANIFEST)
    except DataError:
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    return ShardSet.open(source, verify="sizes").classes


def _check_pictures(source: Path, found: list[Members], inside: Inside) -> None:
    if not any(members.pictures() for members in found):
        below = f" below {inside.path}" if inside.path else ""
        first = next((r for members in found for r in members.rejected), None)
        why = f"; rejected: {first.name}: {first.reason}" if first else ""
        raise DataError(f"{source}: holds no image{below}{why}")


def _labels(
    source: Path, found: list[Members], inside: Inside, class_names: list[str] | None
) -> tuple[list[dict[int, int]], list[str]]:
    """Label of every image of each container, by its place there, and the classes."""
    files, keys = find_dataset_json(found), holds_labels(found)
    if not files and not keys:
        if class_names is not None and found[0].folders is not None:
            raise DataError(f"{source}: class names does not apply to a folder of class folders")
        if class_names is not None:
            raise DataError(f"{source}: class names go with numeric labels; it has class folders")
        return labels_of_folders(source, found, inside)
    if not inside.as_it_is:
        pictures = [(members, members.pictures()) for members in found]
        refuse_splits(source, pictures, inside, classes=None)
    if files and keys:
        raise DataError(f"{source}: has labels in {files[0].name} and beside its images; "
                        "remove those that are not to be read")  # fmt: skip
    if files:
        return labels_of_dataset_json(found, files, class_names)
    return labels_of_keys(found, class_names)


def _listing(
    source: Path, found: list[Members], inside: Inside, class_names: list[str] | None
) -> Listing:
    labels, classes = _labels(source, found, inside, class_names)
    parts, names, rejected = [], list[str](), list[Rejected]()
    containers: list[Path] = []
    ignored, unread = list[str](), list[str]()
    for members, row in zip(found, labels, strict=True):
        chosen = np.fromiter(row, dtype=np.int64, count=len(row))
        entries = np.empty(len(row), dtype=ENTRY_DTYPE)
        entries["container"] = len(containers) if members.folders is None else -1
        containers += [members.path] if members.folders is None else []
        for name in ("offset", "size", "inflated"):
            entries[name] = np.array(getattr(members, name), dtype=np.int64)[chosen]
        entries["label"] = np.fromiter(row.values(), dtype=np.int32, count=len(row))
        parts.append(entries)
        names.extend(members.prefix + members.names[i] for i in row)
        rejected.extend(members.rejected)
        ignored.extend(members.left())
        unread.extend(members.unread)
    if not names:
        first = f" ({rejected[0].name}: {rejected[0].reason})" if rejected else ""
        raise DataError(f"{source}: no image of it can be used{first}")
    return Listing(
        root=source,
        classes=classes,
        containers=containers,
        entries=np.concatenate(parts),
        names=names,
        rejected=rejected,
        ignored=sorted(ignored, key=lambda name: (name.count("/"), name)),
        unread=unread,
    )
