"""Archives -> a listing: tar, tar of tars, zip and compressed tars, by class folders or by `.cls`.

Nothing is extracted: images stay where they are, as byte ranges. Only compressed tars are
decompressed, once (spool.py).
"""

from __future__ import annotations

from io import FileIO
from pathlib import Path

import numpy as np

from fastrepa.data.sources.entries import ENTRY_DTYPE, Listing, Rejected
from fastrepa.data.sources.members import Members, extension_of, picture_extensions, stem_of
from fastrepa.data.sources.spool import COMPRESSIONS, byte_bar, decompressed
from fastrepa.data.sources.tars import scan_tar
from fastrepa.data.sources.webdataset import holds_labels, labels_of_keys
from fastrepa.data.sources.zips import scan_zip
from fastrepa.errors import DataError, printable

_MAGIC = {b"PK": "zip", b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz",
          b"\x28\xb5\x2f\xfd": "zstd"}  # fmt: skip
_SPLITS = {"train", "val", "valid", "validation", "test"}


def list_archives(
    source: Path,
    paths: list[Path],
    *,
    inside: str | None,
    class_names: list[str] | None,
    spool: Path,
    progress: bool,
) -> Listing:
    """List the archives `paths`: the source itself, or files in the folder that it is.

    Args:
        inside: only members below this path of each archive.
        class_names: of numeric labels (.cls); None: the decimal numbers.

    Raises DataError for damaged archives, and for those that hold no image in a class.
    """
    kinds = [_kind(path) for path in paths]
    # Compressed ones first: their copies are then scanned like the others.
    files = [
        decompressed(path, kind, str(path), spool / f"{number:05d}.tar", progress)
        if kind in COMPRESSIONS
        else path
        for number, (path, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    found = []
    total, before = sum(file.stat().st_size for file in files), 0
    with byte_bar(f"scanning {source.name}", total, progress) as report:
        for path, kind, file in zip(paths, kinds, files, strict=True):
            members = Members(
                file,
                str(path),
                prefix="" if path == source else f"{path.name}/",
                inside=f"{inside.strip('/')}/" if inside else "",
            )
            with FileIO(file) as opened:
                scan = scan_zip if kind == "zip" else scan_tar
                scan(opened, members, lambda done, before=before: report(before + done))  # type: ignore[misc]
            before += file.stat().st_size
            found.append(members)
    if not any(_pictures(members) for members in found):
        below = f" below {inside}" if inside else ""
        first = next((r for members in found for r in members.rejected), None)
        why = f"; rejected: {first.name}: {first.reason}" if first else ""
        raise DataError(printable(f"{source}: holds no image{below}{why}"))
    if holds_labels(found):
        labels, classes = labels_of_keys(found, class_names)
    else:
        if class_names is not None:
            raise DataError(f"{source}: class names go with numeric labels; it has class folders")
        labels, classes = _labels_of_folders(source, found, stems=source not in paths, whole=inside)
    return _listing(source, classes, found, labels)


def _kind(path: Path) -> str:
    """Tell an archive's kind by its first bytes, whatever its name says."""
    if not path.is_file():
        raise DataError(printable(f"{path}: not a regular file"))
    try:
        with path.open("rb") as file:
            start = file.read(6)
    except OSError as error:
        raise DataError(printable(f"{path}: cannot be read ({error.strerror})")) from None
    if not start:
        raise DataError(printable(f"{path}: empty file"))
    # A zip may have a program before it, which unpacks it.
    other = "zip" if path.suffix.lower() == ".zip" else "tar"
    kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), other)
    if kind == "zstd":
        raise DataError(printable(f"{path}: zstd is not read; decompress it with `zstd -d`"))
    return kind


def _pictures(members: Members) -> list[int]:
    pictures = picture_extensions()
    return [i for i, name in enumerate(members.names) if extension_of(name) in pictures]


def _labels_of_folders(
    source: Path, found: list[Members], *, stems: bool, whole: str | None
) -> tuple[list[dict[int, int]], list[str]]:
    """Label of every image of each container, by its place there, and the classes.

    stems: an archive whose images lie in no folder is a class of the archive's name.
    whole: when given, the path that was asked for; otherwise leading folders that all images
    share are passed over, as long as a class folder is left.
    """
    pictures = [_pictures(members) for members in found]
    flat = [
        stems and bool(chosen) and all("/" not in members.names[i] for i in chosen)
        for members, chosen in zip(found, pictures, strict=True)
    ]
    strip = 0
    if whole is None:
        foldered = [
            (members, chosen)
            for members, chosen, is_flat in zip(found, pictures, flat, strict=True)
            if not is_flat
        ]
        strip = _shared_folders(foldered)
    class_of = [
        {i: stem_of(members.label) if is_flat else _class(members.names[i], strip) for i in chosen}
        for members, chosen, is_flat in zip(found, pictures, flat, strict=True)
    ]
    if len(found) > 1 and len({name for row in class_of for name in row.values()}) == 1:
        # One archive per class, each with the same folder inside.
        class_of = [
            dict.fromkeys(row, stem_of(members.label))
            for members, row in zip(found, class_of, strict=True)
        ]
        flat = [True] * len(found)
    for members, row in zip(found, class_of, strict=True):
        for i in [i for i, name in row.items() if name is None]:
            members.reject(members.names[i], "lies in no class folder")
            del row[i]
    classes = sorted({name for row in class_of for name in row.values() if name is not None})
    if not classes:
        raise DataError(printable(f"{source}: its images lie in no class folders (CLASS/IMAGE)"))
    _check_classes(source, found, flat, strip, set(classes))
    places = {name: label for label, name in enumerate(classes)}
    return [{i: places[name] for i, name in row.items() if name} for row in class_of], classes


def _shared_folders(found: list[tuple[Members, list[int]]]) -> int:
    """Count the leading folders that all images share, leaving each a class folder."""
    shared: list[str] | None = None
    depth, previous = 1 << 30, ""
    for members, chosen in found:
        for i in chosen:
            folder = members.names[i].rpartition("/")[0]
            if not folder or folder == previous:
                continue
            previous = folder
            parts = folder.split("/")
            depth = min(depth, len(parts))
            shared = parts if shared is None else shared
            while parts[: len(shared)] != shared:
                shared = shared[:-1]
    return 0 if shared is None else min(len(shared), depth - 1)


def _class(name: str, strip: int) -> str | None:
    parts = name.split("/")
    return parts[strip] if len(parts) > strip + 1 else None


def _check_classes(
    source: Path, found: list[Members], flat: list[bool], strip: int, classes: set[str]
) -> None:
    """Raise DataError where a class would silently be lost, or the classes are none."""
    if len(classes) > 1 and classes <= _SPLITS:
        raise DataError(
            printable(f"{source}: its top folders are {', '.join(sorted(classes))}, no classes; ")
            + "name the one to take, by its whole path inside the archive (inside)"
        )
    for members, is_flat in zip(found, flat, strict=True):
        for name, reason in members.lost:
            lost = stem_of(members.label) if is_flat else _class(name, strip)
            if lost is not None and lost not in classes:
                raise DataError(
                    printable(f"{source}: no image of class {lost} can be used ({name}: {reason})")
                )
        folders = {name.rpartition("/")[0] for name in members.names}
        for nested in members.nested:
            inner = f"{nested}/"[len(members.inside) :]
            if not any(f"{folder}/".startswith(inner) for folder in folders):
                raise DataError(printable(f"{members.label}: {nested}.tar holds no image"))
        if not _pictures(members):
            raise DataError(printable(f"{members.label}: holds no image"))


def _listing(
    source: Path, classes: list[str], found: list[Members], labels: list[dict[int, int]]
) -> Listing:
    parts, names, ignored = [], list[str](), list[str]()
    rejected: list[Rejected] = []
    pictures = picture_extensions()
    for container, (members, row) in enumerate(zip(found, labels, strict=True)):
        chosen = np.fromiter(row, dtype=np.int64, count=len(row))
        entries = np.empty(len(row), dtype=ENTRY_DTYPE)
        entries["container"] = container
        for name in ("offset", "size", "inflated"):
            entries[name] = np.array(getattr(members, name), dtype=np.int64)[chosen]
        entries["label"] = np.fromiter(row.values(), dtype=np.int32, count=len(row))
        parts.append(entries)
        names.extend(members.prefix + members.names[i] for i in row)
        rejected.extend(members.rejected)
        ignored.extend(members.ignored)
        if not members.labelled:
            ignored.extend(
                printable(members.prefix + name)
                for name in members.names
                if extension_of(name) not in pictures
            )
    if not names:
        first = f" ({rejected[0].name}: {rejected[0].reason})" if rejected else ""
        raise DataError(printable(f"{source}: no image of it can be used{first}"))
    return Listing(
        root=source,
        classes=classes,
        containers=[members.path for members in found],
        entries=np.concatenate(parts),
        names=names,
        rejected=rejected,
        ignored=ignored,
    )
