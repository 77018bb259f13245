"""Parquet tables of images (Hugging Face's layout, or any with a bytes column) -> a listing.

The image bytes are copied once, in order, to `spool/00000.bin`, with their places and labels in
`00000.npy`: read in shuffled order, a table would decode a whole row group for every image.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastrepa.data.classes import same_name
from fastrepa.data.sources.class_folders import distinct_classes
from fastrepa.data.sources.entries import (
    ENTRY_DTYPE,
    MAX_IMAGE_BYTES,
    MAX_LABEL,
    Listing,
    Rejected,
)
from fastrepa.data.sources.splits import splits_among
from fastrepa.data.sources.spool import byte_bar, check_room, finished, identity, new_copy
from fastrepa.errors import DataError, nearest, printable
from fastrepa.reading.arrays import read_npy
from fastrepa.reading.text import parse_json
from fastrepa.runtime.files import write_array

_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "class", "cls")
_SPLIT_NAMES = {"split", "subset", "partition", "set"}
_BATCH = 64  # rows in memory
_MAX_CLASS_NAME = 4096  # characters

_ROW_DTYPE = np.dtype([("row", "<i8"), ("offset", "<i8"), ("size", "<i8"), ("label", "<i8")])


@dataclass(frozen=True)
class _Columns:
    image: str
    inner: str  # the image's bytes: "image", or "image.bytes" of a struct
    label: str
    text: bool  # labels are class names
    class_names: list[str] | None  # in the table's own metadata


def list_tables(
    source: Path,
    paths: list[Path],
    *,
    image_column: str | None,
    label_column: str | None,
    class_names: list[str] | None,
    spool: Path,
    progress: bool,
) -> Listing:
    """List the parquet files `paths`: the source itself, or files in the folder that it is.

    Raises DataError for damaged tables, for columns that are not there or cannot be chosen, and
    when pyarrow is not installed.
    """
    _require_pyarrow(source)
    columns = _choose(paths[0], image_column, label_column)
    if class_names is not None and columns.text:
        raise DataError(
            printable(f"{source}: class names go with numeric labels; those of {columns.label} ")
            + "are text"
        )
    names = class_names or columns.class_names
    copies = []
    total, before = sum(path.stat().st_size for path in paths), 0
    with byte_bar(f"copying images of {source.name}", total, progress) as report:
        for number, path in enumerate(paths):
            _refuse_splits(path, columns)
            if _choose(path, columns.image, columns.label) != columns:
                raise DataError(printable(f"{path}: other columns or classes than {paths[0].name}"))
            copy = spool / f"{number:05d}.bin"
            share = path.stat().st_size
            note = _copied(path, columns, copy, lambda part: report(int(before + part * share)))  # noqa: B023
            copies.append((path, copy, note))
            before += share
    return _listing(source, copies, columns, names)


def _require_pyarrow(source: Path) -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise DataError(
            printable(f"{source}: parquet needs pyarrow: ") + "pip install 'fastrepa[parquet]'"
        ) from None


def _open(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Buffered streams, and no whole row group ahead: these are gigabytes.
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: BaseException) -> DataError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(printable(f"{path}: damaged or no parquet table ({first})"))


def _choose(path: Path, image: str | None, label: str | None) -> _Columns:
    """The two columns to read: those named, or the only candidates."""
    import pyarrow as pa

    with _open(path) as table:
        schema = table.schema_arrow
    images, labels = dict[str, str](), dict[str, bool]()
    for column in schema:
        kind = column.type
        if _is_bytes(kind):
            images[column.name] = column.name
        elif pa.types.is_struct(kind) and any(
            part.name == "bytes" and _is_bytes(part.type) for part in kind
        ):
            images[column.name] = f"{column.name}.bytes"
        else:
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            if text or pa.types.is_integer(kind):
                labels[column.name] = text
    kinds = ", ".join(f"{column.name} ({column.type})" for column in schema)
    where = printable(f"{path}: its columns are {kinds}")
    image = _pick(image, images, _IMAGE_NAMES, "image", "binary or a struct with bytes", where)
    label = _pick(label, labels, _LABEL_NAMES, "label", "integer or text", where)
    return _Columns(image, images[image], label, labels[label], _metadata_names(schema, label))


def _refuse_splits(path: Path, columns: _Columns) -> None:
    """Raise DataError where a column beside the label's says that rows are of several splits."""
    import pyarrow as pa

    with _open(path) as table:
        named = set(table.schema_arrow.names) & _SPLIT_NAMES - {columns.label}
        for name in sorted(named):
            try:
                values = table.read([name]).column(name).unique().to_pylist()
            except (pa.ArrowException, OSError, ValueError) as error:
                raise _damaged(path, error) from None
            if splits := splits_among(value for value in values if isinstance(value, str)):
                raise DataError(
                    f"{path}: its column {name} has {', '.join(splits)}; give a table of one split"
                )


def _pick(
    wanted: str | None,
    candidates: dict[str, Any],
    preferred: tuple[str, ...],
    what: str,
    kinds: str,
    where: str,
) -> str:
    if wanted is not None:
        if wanted not in candidates:
            raise DataError(
                f"{where}; {what} column {printable(wanted)!r} is not one of them that is {kinds}"
                + nearest(wanted, candidates)
            )
        return wanted
    if len(candidates) == 1:
        return next(iter(candidates))
    named = [name for name in preferred if name in candidates]
    if len(named) == 1:
        return named[0]
    possible = printable(", ".join(named or candidates)) or "none"
    raise DataError(f"{where}; name the {what} column ({kinds}; candidates: {possible})")


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _metadata_names(schema: Any, label: str) -> list[str] | None:
    """Class names that Hugging Face's `datasets` writes into the schema."""
    try:
        info = parse_json((schema.metadata or {})[b"huggingface"], "huggingface")
        names = info["info"]["features"][label]["names"]
    except (KeyError, DataError, TypeError):
        return None
    strings = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return list(map(same_name, names)) if strings and names else None


def _copied(
    path: Path, columns: _Columns, copy: Path, report: Callable[[float], None]
) -> dict[str, Any]:
    """Copy the images of one table, unless it was done; the note has names and rejected rows."""
    source = identity(path, image=columns.inner, label=columns.label)
    rows = copy.with_suffix(".npy")
    if (note := finished(copy, source)) is not None and rows.is_file():
        return note
    values = array("q")
    vocabulary: dict[str, int] = {}  # class names in order of appearance
    with new_copy(copy, source) as (file, note), _open(path) as table:
        note["rejected"] = []
        total = max(table.metadata.num_rows, 1)
        for row, image, label in _rows(path, table, columns):
            code = _code(label, vocabulary) if columns.text else label
            wrong = _wrong_image(image) or _wrong_label(label)
            if wrong:
                note["rejected"].append((row, wrong))
                continue
            values.extend((row, file.tell(), len(image), code))
            file.write(image)
            if row % _BATCH == 0:
                check_room(copy.parent, str(path))
                report(row / total)
        note["names"] = list(vocabulary) if columns.text else None
        file.flush()
        write_array(rows, np.array(values, dtype=np.int64).view(_ROW_DTYPE))
    return note


def _rows(path: Path, table: Any, columns: _Columns) -> Any:
    """Number, bytes and label of every row."""
    import pyarrow as pa

    row = 0
    try:
        wanted = [columns.inner, columns.label]
        for batch in table.iter_batches(batch_size=_BATCH, columns=wanted):
            images, labels = batch.column(columns.image), batch.column(columns.label)
            if columns.inner != columns.image:
                # The parent's nulls count as well: field() alone would forget them.
                images = images.flatten()[0]
            for image, label in zip(images, labels, strict=True):
                yield row, image.as_py(), label.as_py()
                row += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _code(label: str | None, vocabulary: dict[str, int]) -> int:
    return -1 if label is None else vocabulary.setdefault(label, len(vocabulary))


def _wrong_image(image: bytes | None) -> str | None:
    if not image:
        return "no image bytes"
    if len(image) > MAX_IMAGE_BYTES:
        return f"{len(image)} bytes; an image may have {MAX_IMAGE_BYTES}"
    return None


def _wrong_label(label: int | str | None) -> str | None:
    if label is None:
        return "no label"
    if isinstance(label, str):
        return None if 0 < len(label) <= _MAX_CLASS_NAME else "an empty or endless class name"
    return None if 0 <= label <= MAX_LABEL else f"its label is {label}, not 0..{MAX_LABEL}"


def _listing(
    source: Path,
    copies: list[tuple[Path, Path, dict[str, Any]]],
    columns: _Columns,
    classes: list[str] | None,
) -> Listing:
    tables = [read_npy(copy.with_suffix(".npy")) for _, copy, _ in copies]
    if columns.text:
        used = [
            {note["names"][code] for code in np.unique(rows["label"])}
            for rows, (_, _, note) in zip(tables, copies, strict=True)
        ]
        classes = distinct_classes(source, set[str]().union(*used))
    elif classes is None:
        top = max((int(rows["label"].max()) for rows in tables if len(rows)), default=-1)
        classes = [str(label) for label in range(top + 1)]
    places = {name: label for label, name in enumerate(classes)}
    parts, names, rejected = [], list[str](), list[Rejected]()
    for container, (rows, (path, _, note)) in enumerate(zip(tables, copies, strict=True)):
        prefix = "" if path == source else f"{path.name}/"
        rejected += [
            Rejected(printable(f"{prefix}row {row}"), reason) for row, reason in note["rejected"]
        ]
        if columns.text:
            # -1: a name that only rejected rows have
            known = (places.get(same_name(name), -1) for name in note["names"])
            codes = np.fromiter(known, dtype=np.int64, count=len(note["names"]))
            labels = codes[rows["label"]]
        else:
            labels = rows["label"]
            beyond = labels >= len(classes)
            rejected += [
                Rejected(printable(f"{prefix}row {row}"), f"its label is {label}, beyond the "
                         f"{len(classes)} classes")
                for row, label in zip(rows["row"][beyond], labels[beyond], strict=True)
            ]  # fmt: skip
            rows, labels = rows[~beyond], labels[~beyond]
        entries = np.empty(len(rows), dtype=ENTRY_DTYPE)
        entries["container"], entries["inflated"] = container, -1
        entries["offset"], entries["size"], entries["label"] = rows["offset"], rows["size"], labels
        parts.append(entries)
        names += [f"{prefix}row {row}" for row in rows["row"].tolist()]
    if not names:
        first = f" ({rejected[0].name}: {rejected[0].reason})" if rejected else ""
        raise DataError(printable(f"{source}: no row of it can be used{first}"))
    return Listing(
        root=source,
        classes=classes,
        containers=[copy for _, copy, _ in copies],
        entries=np.concatenate(parts),
        names=names,
        rejected=rejected,
    )
