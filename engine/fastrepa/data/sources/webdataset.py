"""Labels of WebDataset: KEY.jpg with KEY.cls (decimal text) or KEY.json ("label" or "cls").

The key is the name up to the first dot after the last slash. Labels stay the numbers they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fastrepa.data.classes import same_name
from fastrepa.data.sources.entries import MAX_LABEL
from fastrepa.data.sources.members import Members, extension_of, picture_extensions
from fastrepa.errors import DataError, printable, worded
from fastrepa.reading.text import parse_json

_MAX_CLS = 64  # bytes
_MAX_JSON = 1 << 20
_TRIED = 16  # images whose .json is looked into, to tell labels from other notes


@dataclass
class _Sample:
    """Places of the members of one key."""

    images: list[int] = field(default_factory=list)
    cls: int | None = None
    json: int | None = None


def holds_labels(found: list[Members]) -> bool:
    """Tell whether archives hold labels of their own, rather than class folders."""
    if any(name.lower().endswith(".cls") for members in found for name in members.names):
        return True
    tried = 0
    for members in found:
        if not any(name.lower().endswith(".json") for name in members.names):
            continue
        for sample in _samples(members).values():
            if sample.images and sample.json is not None:
                tried += 1
                if isinstance(_json_label(members, sample.json), int):
                    return True
                if tried == _TRIED:
                    return False
    return False


def labels_of_keys(
    found: list[Members], class_names: list[str] | None
) -> tuple[list[dict[int, int]], list[str]]:
    """Label of every usable image of each container, by its place there, and the classes.

    Images without a usable label, and labels without an image, become rejected members.
    """
    labels = []
    most = MAX_LABEL if class_names is None else len(class_names) - 1
    for members in found:
        members.labelled = True
        row: dict[int, int] = {}
        for key, sample in _samples(members).items():
            if not sample.images:
                if sample.cls is not None:
                    members.reject(members.names[sample.cls], "a label without an image")
                continue
            if len(sample.images) > 1:
                for i in sample.images:
                    members.reject(members.names[i], f"not the only image of the key {key}")
                continue
            image = sample.images[0]
            label = _label(members, sample)
            if isinstance(label, str):
                members.reject(members.names[image], label)
            elif label > most:
                members.reject(members.names[image], f"its label is {label}, beyond {most}")
            else:
                row[image] = label
        labels.append(row)
    if class_names is None:
        top = max((label for row in labels for label in row.values()), default=-1)
        class_names = [str(label) for label in range(top + 1)]
    return labels, class_names


def _samples(members: Members) -> dict[str, _Sample]:
    pictures = picture_extensions()
    samples: dict[str, _Sample] = {}
    for i, name in enumerate(members.names):
        folder, slash, base = name.rpartition("/")
        sample = samples.setdefault(folder + slash + base.split(".", 1)[0], _Sample())
        extension = extension_of(name)
        if extension in pictures:
            sample.images.append(i)
        elif extension == ".cls":
            sample.cls = i
        else:
            sample.json = i
    return samples


def _label(members: Members, sample: _Sample) -> int | str:
    """A label, or why there is none."""
    if sample.cls is None:
        return "no .cls" if sample.json is None else _json_label(members, sample.json)
    text = members.read(sample.cls, _MAX_CLS)
    if text is None:
        return "its .cls cannot be read"
    stripped = text.strip()
    if not stripped.isdigit() or len(stripped) > 10:
        return printable(f"its .cls is {text.decode('utf-8', 'replace')!r}, no class index")
    return int(stripped)


def _json_label(members: Members, place: int) -> int | str:
    raw = members.read(place, _MAX_JSON)
    try:
        value = parse_json(raw or b"", members.names[place])
        label = value.get("label", value.get("cls"))
    except (DataError, AttributeError):
        return "its .json is not a JSON object"
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        return 'its .json has no class index as "label" or "cls"'
    return label


def read_class_names(path: Path) -> list[str]:
    """Class names from a text file, one a line, in composed form; DataError when it is none."""
    try:
        # Lines end as files' do: a name may hold what str.splitlines takes for an end.
        names = same_name(path.read_text(encoding="utf-8-sig")).split("\n")
    except OSError as error:
        raise DataError(printable(f"{path}: cannot be read ({worded(error)})")) from None
    except ValueError:
        raise DataError(printable(f"{path}: not UTF-8 text")) from None
    while names and not names[-1].strip():
        names.pop()
    names = [name.strip() for name in names]
    if not names or not all(names):
        raise DataError(printable(f"{path}: wanted one class name on every line, from the first"))
    if len(names) > MAX_LABEL + 1:
        raise DataError(printable(f"{path}: more than {MAX_LABEL + 1} classes"))
    return names
