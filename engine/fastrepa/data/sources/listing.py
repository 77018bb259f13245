"""Any kind of source that `fastrepa prepare` reads -> one flat listing of labelled byte ranges.

A source is, told by what lies at its path:
    a folder of class folders of images
    a .tar (compressed or not) or .zip of CLASS/IMAGE, or of a tar for each class (archives.py)
    a folder of such archives, with class folders inside, or one for each class
    WebDataset tars, a file or a folder of them (webdataset.py)
    a parquet file, or a folder of them (tables.py)
    REPA's layout, images/ beside vae-sd/ (reference_source.py)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from fastrepa.data.format.reference_layout import is_reference
from fastrepa.data.format.shards import FORMAT, MANIFEST, ShardSet
from fastrepa.data.sources.archives import list_archives
from fastrepa.data.sources.entries import ENTRY_DTYPE, Listing, close_files
from fastrepa.data.sources.members import ARCHIVE_EXTENSIONS, picture_extensions
from fastrepa.data.sources.reference_source import list_reference
from fastrepa.data.sources.tables import list_tables
from fastrepa.data.sources.webdataset import read_class_names
from fastrepa.errors import DataError, printable

_TABLES = (".parquet", ".pq")


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
        inside: archives: only what lies below this path inside them.
        class_names: text file with a class name on each line, for sources with numeric labels.
        image_column, label_column: parquet: None takes the only one that can be meant.
        spool: folder for copies of what cannot be read at random (compressed tars, parquet);
            nothing else is written, and finished copies are used again.
        progress: show progress bars.

    Raises DataError, in one line, for a source that is damaged or of no known kind, and for an
    argument that does not apply to its kind.
    """
    if not source.exists():
        raise DataError(printable(f"{source}: no such file or folder"))
    close_files()
    given = {"inside": inside, "class_names": class_names, "image_column": image_column,
             "label_column": label_column}  # fmt: skip
    names = None if class_names is None else read_class_names(class_names)
    tables, archives = _files_of(source)
    if tables and archives:
        raise DataError(printable(f"{source}: holds {tables[0].name} and {archives[0].name}; ")
                        + "give one kind alone")  # fmt: skip
    if tables:
        _refuse(source, given, "inside", "a parquet table")
        return list_tables(
            source, tables, image_column=image_column, label_column=label_column,
            class_names=names, spool=spool, progress=progress,
        )  # fmt: skip
    if archives:
        _refuse(source, given, "image_column label_column", "an archive")
        return list_archives(
            source, archives, inside=inside, class_names=names or _names_of_set(source),
            spool=spool, progress=progress,
        )  # fmt: skip
    if is_reference(source):
        _refuse(
            source, given, "inside image_column label_column", "a set in the reference's layout"
        )
        return list_reference(source, names)
    _refuse(source, given, " ".join(given), "a folder of class folders")
    return _list_folders(source)


def _files_of(source: Path) -> tuple[list[Path], list[Path]]:
    """Tables and archives: the source itself, or, in a folder without folders, its files."""
    if not source.is_dir():
        name = source.name.lower()
        if name.endswith(_TABLES):
            return [source], []
        if name.endswith(ARCHIVE_EXTENSIONS):
            return [], [source]
        raise DataError(
            printable(f"{source}: not a folder of class folders, nor by its name an archive (")
            + f"{' '.join(ARCHIVE_EXTENSIONS[:-2])}) or a table ({' '.join(_TABLES)})"
        )
    folders, files = _entries(source, "")
    if folders:
        return [], []
    return (
        [source / name for name, _ in files if name.lower().endswith(_TABLES)],
        [source / name for name, _ in files if name.lower().endswith(ARCHIVE_EXTENSIONS)],
    )


def _refuse(source: Path, given: Mapping[str, object], arguments: str, kind: str) -> None:
    for name in arguments.split():
        if given[name] is not None:
            raise DataError(
                printable(f"{source}: {name.replace('_', ' ')} does not apply to {kind}")
            )


def _names_of_set(source: Path) -> list[str] | None:
    """Class names of a prepared set, which is checked too; None for any other source."""
    try:
        manifest = json.loads((source / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    return ShardSet.open(source, verify="sizes").classes


def _list_folders(source: Path) -> Listing:
    """List SOURCE/CLASS/.../IMAGE, in sorted order."""
    extensions = picture_extensions()
    folders, strays = _entries(source, "")
    if not folders:
        raise DataError(printable(f"{source}: holds no class folders ")
                        + printable(f"(expected {source}/CLASS/IMAGE)"))  # fmt: skip
    names, sizes, labels = list[str](), list[int](), list[int]()
    ignored = [name for name, _ in strays]
    for label, folder in enumerate(folders):
        before, unfit = len(names), len(ignored)
        for name, size in _walk(source, folder, frozenset({os.path.realpath(source)})):
            if os.path.splitext(name)[1].lower() in extensions:
                names.append(name)
                sizes.append(size)
                labels.append(label)
            else:
                ignored.append(name)
        if len(names) == before:
            other = [n for n in ignored[unfit:] if n.lower().endswith(_TABLES + ARCHIVE_EXTENSIONS)]
            hint = f"it holds {other[0]}: give that, or its folder" if other else (
                "remove or fill it")  # fmt: skip
            raise DataError(printable(f"{source / folder}: class folder without images; {hint}"))
    entries = np.zeros(len(names), dtype=ENTRY_DTYPE)
    entries["container"], entries["inflated"] = -1, -1
    entries["size"], entries["label"] = sizes, labels
    return Listing(source, folders, [], entries, names, ignored=ignored)


def _walk(source: Path, folder: str, above: frozenset[str]) -> Iterator[tuple[str, int]]:
    """Files anywhere below source/folder. Links are followed, except back to a folder above."""
    real = os.path.realpath(source / folder)
    if real in above:
        return
    folders, files = _entries(source, folder)
    yield from ((f"{folder}/{name}", size) for name, size in files)
    for name in folders:
        yield from _walk(source, f"{folder}/{name}", above | {real})


def _entries(source: Path, folder: str) -> tuple[list[str], list[tuple[str, int]]]:
    """Sorted names of the visible folders, and of the other visible entries with their sizes."""
    folders, files = [], []
    try:
        with os.scandir(source / folder) as scan:
            for entry in scan:
                if entry.name.startswith("."):
                    continue
                try:
                    if entry.is_dir():
                        folders.append(entry.name)
                    else:
                        files.append((entry.name, entry.stat().st_size))
                except OSError:  # a link to nowhere or to itself: reading it will say so
                    files.append((entry.name, -1))
    except OSError as error:
        text = f"{source / folder}: cannot be read ({error.strerror})"
        raise DataError(printable(text)) from None
    return sorted(folders), sorted(files)
