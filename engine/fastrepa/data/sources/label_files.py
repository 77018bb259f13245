"""Labels that lie beside the images, in a file: dataset.json is read, tables are refused by name.

    dataset.json   {"labels": [["00000/img00000000.png", 12], ...]} or {"labels": {PATH: 12}}, as
                   StyleGAN's and EDM's dataset_tool write it: paths from its own folder. "labels":
                   null says that there are none.

A table (.csv, .tsv, .json, .jsonl, .txt) is one of labels when it names images of the source and
says something else of them that may be a label. Where that is the class folder's name, in every
row, table and folders agree, and the folders are read.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastrepa.data.classes import same_name
from fastrepa.data.format.reference_layout import LABELS, short
from fastrepa.data.sources.entries import MAX_IMAGE_BYTES, MAX_LABEL
from fastrepa.data.sources.members import Members, Note, Rows, extension_of
from fastrepa.data.sources.splits import is_mask_name
from fastrepa.errors import DataError
from fastrepa.reading.text import parse_json

_CHUNK = re.compile(r"(?:.*/)?[0-9]{5}/img[0-9]{8}\.[A-Za-z]+")  # dataset_tool's own names
_MOST = 64 << 20  # bytes of a table that is looked into
_ROWS = 200_000
_TRIED = 64  # files that are looked into
_LONGEST = 255  # characters of a path that is shown
_FEW = 20  # rows, of which a column of labels may have no two alike
# What a table may say of an image without labelling it.
_NO_LABEL = re.compile(
    r"(?:image|img|file|orig(?:inal)?)?[-_ ]?(?:width|height|size|bytes|channels|mode|format|"
    r"captions?|text|prompts?|descriptions?|urls?|source|reason|licen[cs]e|author|date|time|"
    r"md5|sha1|sha256|hash|phash|index|path|folder|split|fold)"
)
_LABELLED_FILES = re.compile(
    r".*(?:label|anno|target|metadata)[^/]*\.(?:mat|npy|npz|pkl|h5|hdf5|xlsx?|parquet)"
)

Row = list[tuple[str, str]]
"""One row of a table: (column, text)."""


@dataclass(frozen=True)
class DatasetJson:
    """A dataset.json: its container, its name there, and what it says of "labels"."""

    members: Members
    name: str
    labels: Any


def find_dataset_json(found: list[Members]) -> list[DatasetJson]:
    """Return every dataset.json that says "labels"."""
    places = [
        (members, i)
        for members in found
        for i, name in enumerate(members.names)
        if name.rpartition("/")[2] == LABELS
    ]
    opened = ((members, i, _opened(members, i)) for members, i in places[:_TRIED])
    return [
        DatasetJson(members, members.names[i], said["labels"])
        for members, i, said in opened
        if "labels" in said
    ]


def labels_of_dataset_json(
    found: list[Members], files: list[DatasetJson], class_names: list[str] | None
) -> tuple[list[dict[int, int]], list[str]]:
    """Label of every image of each container, by its place there, and the classes.

    Images that are not listed, and listed ones that are not there, become rejected members.
    Raises DataError where the file labels something else, or has no class numbers.
    """
    most = MAX_LABEL if class_names is None else len(class_names) - 1
    rows: list[dict[int, int]] = []
    for members in found:
        here = [file for file in files if file.members is members]
        if len(here) != 1:
            several = "has several" if here else "has no"
            raise DataError(f"{members.label}: {several} {LABELS}; give what one of them labels")
        rows.append(_labels(here[0], most))
        members.label_file = here[0].name
    top = max((label for row in rows for label in row.values()), default=-1)
    return rows, class_names or [str(label) for label in range(top + 1)]


def _opened(members: Members, place: int) -> dict[str, Any]:
    raw = members.read(place, MAX_IMAGE_BYTES)
    value = parse_json(raw or b"", f"{members.label}: {members.names[place]}")
    return value if isinstance(value, dict) else {}


def _labels(file: DatasetJson, most: int) -> dict[int, int]:
    members, name, listed = file.members, file.name, file.labels
    folder = name[: -len(LABELS)]
    where = f"{members.label}: {name}"
    pictures = members.pictures()
    outside = [i for i in pictures if not members.names[i].startswith(folder)]
    if outside:
        raise DataError(
            f"{where}: labels of another part than {members.names[outside[0]]}; REPA's layout is "
            "read as a folder with images/ and vae-sd/, other labels with --inside their folder"
        )
    if listed is None:
        strange = [i for i in pictures if not _CHUNK.fullmatch(members.names[i])]
        if strange:
            raise DataError(
                f"{where}: says that there are no labels, but {members.names[strange[0]]} lies in a"
                " folder of another name than dataset_tool's; remove the file if folders are the "
                "classes"
            )
        return dict.fromkeys(pictures, 0)
    entries = list(listed.items()) if isinstance(listed, dict) else listed
    if not isinstance(entries, list) or not entries:
        raise DataError(f'{where}: has no list "labels" with entries')
    by_name = {members.names[i]: i for i in pictures}
    composed: dict[str, list[int]] = {}  # a name in another Unicode form means the only such file
    for at in pictures:
        composed.setdefault(same_name(members.names[at]), []).append(at)
    beyond = set[int]()
    labels: dict[int, int] = {}
    twice = set[int]()
    for number, entry in enumerate(entries):
        pair = isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[0], str)
        label = entry[1] if pair else None
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise DataError(
                f"{where}: labels[{number}] is {short(entry)}, not [PATH, class number]"
            )
        parts = re.split(r"[/\\]", entry[0])  # some were written on Windows
        path = "/".join(part for part in parts if part not in ("", "."))
        i = by_name.get(folder + path)
        if i is None and len(alike := composed.get(same_name(folder + path), [])) == 1:
            i = alike[0]
        if i is None:
            members.reject((folder + path)[:_LONGEST], f"labelled in {LABELS}, but missing")
        elif i in beyond:
            continue  # rejected already
        elif i in labels:
            twice.add(i)
        elif label > most:
            members.reject(members.names[i], f"its label is {short(label)}, beyond {most}")
            beyond.add(i)
        else:
            labels[i] = label
    for i in sorted(twice):
        del labels[i]
        members.reject(members.names[i], f"labelled twice in {LABELS}")
    for i in sorted(set(pictures) - labels.keys() - twice - beyond, key=members.names.__getitem__):
        members.reject(members.names[i], f"no label in {LABELS}")
    return labels


# --- tables ------------------------------------------------------------------------------------


def refuse_tables(found: list[Members], class_of: Rows, take: str) -> None:
    """Raise DataError where a table beside the images labels them otherwise than their folders.

    class_of: the class folder of every image; empty where there are none. take: what to give for
    --inside to have the folders as classes.
    """
    names: _Names | None = None
    for members in found:
        for note in _candidates(members):
            names = names or _Names(found, class_of or [{} for _ in found])
            known = _LABELLED_FILES.fullmatch(note.name.casefold()) is not None
            if known or names.are_labelled_by(members, note):
                instead = f", or --inside {take} to take the folders as classes" if class_of else ""
                raise DataError(
                    f"{members.label}: {note.name} looks like labels of its images, and tables of "
                    "labels are not read; give class folders, or a dataset.json of [PATH, number]"
                    + instead
                )


def refuse_notes(found: list[Members]) -> None:
    """Raise DataError where images of one folder have a note each in a folder of labels.

    Pascal VOC's JPEGImages/ and Annotations/, YOLO's images/ and labels/.
    """
    names = [members.names[i].rpartition(".")[0] for members in found for i in members.pictures()]
    own, stems = set(names), {name.rpartition("/")[2] for name in names}
    for members in found:
        for name in members.left():
            folder, _, base = name.rpartition(".")[0].rpartition("/")
            if is_mask_name(folder) and base in stems and f"{folder}/{base}" not in own:
                raise DataError(
                    f"{members.label}: {name} looks like the labels of an image, and such are not "
                    "read; give class folders, or the images alone, as one class"
                )


def _tails(name: str) -> tuple[str, str]:
    """A path's file name, and the same with the folder that it lies in."""
    parts = name.casefold().split("/")
    return parts[-1], "/".join(parts[-2:])


class _Names:
    """All that a table may call the images of a source, and the class folders of those images."""

    def __init__(self, found: list[Members], folders: Rows) -> None:
        self._classes: dict[str, set[str]] = {}  # of every file name, also with its folder
        self._count = 0
        stems: dict[str, set[str]] = {}
        for members, row in zip(found, folders, strict=True):
            for i in members.pictures():
                base, longer = _tails(members.names[i])
                for name in {base, longer}:
                    self._classes.setdefault(name, set()).add(same_name(row.get(i) or ""))
                stems.setdefault(base.rpartition(".")[0], set()).add(base)
                self._count += 1
        # A bare stem is a name only where one file name has it.
        self._of_stem = {stem: min(bases) for stem, bases in stems.items() if len(bases) == 1}

    def named(self, text: str) -> str | None:
        """The file name that a text is, with its extension or without; None: it is none."""
        base, longer = _tails(text.replace("\\", "/").strip())
        name = longer if longer in self._classes else base
        return name if name in self._classes else self._of_stem.get(base)

    def are_labelled_by(self, members: Members, note: Note) -> bool:
        """Tell whether a table's rows label images otherwise than the images' folders do."""
        rows = named = by_stem = 0
        values: dict[tuple[int, str], set[str]] = {}  # of the columns that may be labels
        other = set[tuple[int, str]]()  # columns of rows that do not tell the folder
        for row in itertools.islice(_rows(members, note, self), _ROWS):
            rows += 1
            name = self._name(row)
            if name is None:
                continue
            said = {
                (i, column): text
                for i, (column, text) in enumerate(row)
                if not _NO_LABEL.fullmatch(column.casefold())
                and self.named(text) != name
                and not self._is_whole(text)
            }
            named += 1
            by_stem += not any(text.strip().casefold().endswith(name) for _, text in row)
            for column, text in said.items():
                values.setdefault(column, set()).add(text)
            if not {same_name(text) for text in said.values()} & self._classes[name]:
                other |= said.keys()
        # A column without a value that comes twice numbers the images.
        labels = {c for c in other if named < _FEW or len(values[c]) < named}
        if not labels or (extension_of(note.name) == ".txt" and (named < 2 or 2 * named < rows)):
            return False  # prose may name an image, too
        # A bare number or word may be a name by chance; half of all pictures are not.
        return by_stem < named or 2 * by_stem >= self._count

    def _name(self, row: Row) -> str | None:
        # A whole file name first: a number may be a label and another picture's stem.
        exact = (text for _, text in row if self._is_whole(text))
        texts = itertools.chain(exact, (text for _, text in row))
        return next((name for text in texts if (name := self.named(text))), None)

    def _is_whole(self, text: str) -> bool:
        return not self._classes.keys().isdisjoint(_tails(text.replace("\\", "/").strip()))


def _candidates(members: Members) -> list[Note]:
    """Files that may be tables, the uppermost first; none that is one picture's own note."""
    jsons = (
        Note(name, members.offset[i], members.size[i], members.inflated[i])
        for i, name in enumerate(members.names)
        if extension_of(name) == ".json"
    )
    other = (
        Note(name, 0, 0, -1)
        for name in members.ignored
        if _LABELLED_FILES.fullmatch(name.casefold())
    )
    notes = [*members.notes, *itertools.islice(jsons, 10 * _TRIED), *other]
    if not notes:
        return []
    own = {members.names[i].rpartition(".")[0] for i in members.pictures()}
    notes = [note for note in notes if note.name.rpartition(".")[0] not in own]
    return sorted(notes, key=lambda note: (note.name.count("/"), note.name))[:_TRIED]


def _rows(members: Members, note: Note, names: _Names) -> Iterator[Row]:
    """The rows of a table, as far as it can be read as one."""
    raw = members.read_note(note, _MOST)
    extension = extension_of(note.name)
    text = (raw or b"").decode("utf-8-sig", "replace")
    lines = (line for line in text.splitlines() if line.strip())
    try:
        if extension == ".json":
            yield from _json_rows(parse_json(text, note.name), names)
        elif extension in (".jsonl", ".ndjson"):
            for line in lines:
                yield from _json_rows(parse_json(line, note.name), names)
        elif extension == ".txt":
            for line in lines:
                yield [("", word) for word in re.split(r"[\s,;]+", line.strip())]
        else:
            yield from _csv_rows(text, extension)
    except (DataError, csv.Error):
        return


def _csv_rows(text: str, extension: str) -> Iterator[Row]:
    head = text.partition("\n")[0]
    comma = "\t" if extension == ".tsv" else max(",;\t|", key=head.count)
    header: list[str] = []
    for row in csv.reader(text.splitlines(), delimiter=comma):
        header = header or row
        yield [(header[i] if i < len(header) else "", value) for i, value in enumerate(row)]


def _json_rows(value: Any, names: _Names) -> Iterator[Row]:
    """Yield whatever in a JSON value may be a row: objects, {name: label} and [name, label]."""
    coco = isinstance(value, dict) and {"images", "annotations"} <= value.keys()
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            yield [*_cells(value), *([("annotations", "")] if coco else [])]
            for key, item in value.items():
                if names.named(key) is not None:
                    yield [
                        ("", key),
                        *(_cells(item) if isinstance(item, dict) else [("", str(item))]),
                    ]
            stack.extend(item for item in value.values() if isinstance(item, (dict, list)))
        elif isinstance(value, list):
            if len(value) == 2 and isinstance(value[0], str):
                yield [("", str(item)) for item in value]
            stack.extend(item for item in value if isinstance(item, (dict, list)))


def _cells(value: dict[str, Any]) -> Row:
    return [(k, str(v)) for k, v in value.items() if isinstance(v, (str, int, float))]
