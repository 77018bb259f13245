"""Classes by folders, CLASS/.../IMAGE: one rule for a folder on the disk, an archive, and several.

Leading folders that all images share are passed over. What is no class by its name (splits, masks,
chunks of a running number) is refused with what to give, unless the folders were asked for as they
are.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from fastrepa.data.classes import same_name
from fastrepa.data.sources.label_files import refuse_notes, refuse_tables
from fastrepa.data.sources.members import (
    ARCHIVE_EXTENSIONS,
    TABLE_EXTENSIONS,
    Members,
    Rows,
    stem_of,
)
from fastrepa.data.sources.splits import are_chunks, mask_of, masks_among, splits_among
from fastrepa.errors import DataError, printable

_SHOWN = 4  # names in a message
# Printed as nothing at all, unlike most invisible characters, which a message escapes.
_UNSEEN = dict.fromkeys(
    [0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0,
     *range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)]
)  # fmt: skip


class Inside:
    """The part of a source that was asked for: a path in it; a "." at its end: as it is."""

    def __init__(self, text: str | None = None) -> None:
        parts = [part for part in (text or "").split("/") if part]
        if ".." in parts:
            raise DataError(f"--inside {text}: '..' leads out of the source")
        self.given = text is not None
        self.as_it_is = bool(parts) and parts[-1] == "."
        self.path = "/".join(part for part in parts if part != ".")  # what is still to be found
        self.reached = ""  # the folders that were

    def enter(self, source: Path) -> Path:
        """Go down the path as far as there are folders; return the last one."""
        while self.path:
            first, _, rest = self.path.partition("/")
            if not (source / first).is_dir():
                break
            source, self.path, self.reached = source / first, rest, self.below(first, whole=False)
        return source

    def below(self, *folders: str, whole: bool = True) -> str:
        """Return what to give for a folder that was found inside."""
        return "/".join(filter(None, (self.reached, self.path if whole else "", *folders)))


def labels_of_folders(
    source: Path, found: list[Members], inside: Inside
) -> tuple[list[dict[int, int]], list[str]]:
    """Label of every image of each container, by its place there, and the classes.

    In a folder of archives, one whose images lie in no folder is a class of the archive's name; so
    is a folder on the disk that holds images and no folder.
    Raises DataError where a class would be lost, or folders are no classes by their names.
    """
    pictures = [members.pictures() for members in found]
    stems = any(members.prefix for members in found)
    flat = [
        stems and bool(chosen) and all("/" not in members.names[i] for i in chosen)
        for members, chosen in zip(found, pictures, strict=True)
    ]
    foldered = [
        (members, chosen)
        for members, chosen, is_flat in zip(found, pictures, flat, strict=True)
        if not is_flat
    ]
    if found[0].folders == []:
        refuse_tables(found, [], "")
        return _one_class(source, found, inside)
    lead: list[str] = [] if inside.given else shared_folders(foldered)
    strip = len(lead)
    if not inside.as_it_is:
        _refuse_parts(source, foldered, lead, inside)
    class_of: Rows = [
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
            if members.folders is not None:
                members.stray(members.names[i])
            else:
                members.reject(members.names[i], "lies in no class folder")
            del row[i]
    raw = {name for row in class_of for name in row.values() if name is not None}
    if len(raw) == 1 and not inside.as_it_is:
        refuse_notes(found)
    _check_classes(source, found, flat, lead, raw)
    if not raw:
        refuse_tables(found, [], "")
        raise DataError(f"{source}: its images lie in no class folders (CLASS/IMAGE)")
    if not inside.as_it_is:
        refuse_tables(found, class_of, inside.below(*lead, "."))
    classes = distinct_classes(source, raw)
    places = {name: label for label, name in enumerate(classes)}
    labels = [
        {i: places[same_name(name)] for i, name in row.items() if name is not None}
        for row in class_of
    ]
    return labels, classes


def _one_class(
    source: Path, found: list[Members], inside: Inside
) -> tuple[list[dict[int, int]], list[str]]:
    """All images of a folder without folders, as one class of the folder's name."""
    pictures = [(members, members.pictures()) for members in found]
    if not any(chosen for _, chosen in pictures):
        raise DataError(f"{source}: holds no class folders (expected {source}/CLASS/IMAGE)")
    if not inside.as_it_is:
        _refuse_masks_beside(source, pictures, f"--inside {inside.below('.')} to take all")
    name = os.path.basename(os.path.abspath(source)) or "all"
    return [dict.fromkeys(chosen, 0) for _, chosen in pictures], distinct_classes(source, [name])


def distinct_classes(source: Path, names: Iterable[str]) -> list[str]:
    """Class names in composed form, sorted. Raises DataError for two that look the same."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        look = printable(" ".join(same_name(name).translate(_UNSEEN).split()))
        other = seen.setdefault(look, name)
        if other != name:
            raise DataError(
                f"{source}: the classes {other!a} and {name!a} cannot be told apart; "
                "rename one, or make them one"
            )
    return sorted(map(same_name, seen.values()))


def shared_folders(found: list[tuple[Members, list[int]]]) -> list[str]:
    """Return the leading folders that all images share, leaving each a class folder."""
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
    return [] if shared is None else shared[: depth - 1]


def refuse_splits(
    source: Path, found: list[tuple[Members, list[int]]], inside: Inside, *, classes: int | None
) -> None:
    """Raise DataError where images lie in folders of several splits.

    classes: the depth at which folders are classes; None: labels are told otherwise.
    """
    children: dict[str, set[str]] = defaultdict(set)
    for members, chosen in found:
        for folder in {members.names[i].rpartition("/")[0] for i in chosen}:
            while folder:
                above, _, name = folder.rpartition("/")
                if name in children[above]:
                    break
                children[above].add(name)
                folder = above
    on_disk = any(members.folders is not None for members, _ in found)
    or_path = " or its path" if on_disk else ""
    for above in sorted(children, key=lambda folder: (folder.count("/"), folder)):
        splits = splits_among(children[above])
        if not splits:
            continue
        place = inside.below(above)
        first = "/".join(filter(None, (place, _training(splits))))
        depth = above.count("/") + 1 if above else 0
        if classes is not None and depth > classes:
            raise DataError(
                f"{source}: {place} holds {', '.join(splits)}, splits inside a class; give class "
                f"folders of one split, or --inside {inside.below('.')} to take all together"
            )
        raise DataError(
            f"{source}: its top folders are {', '.join(splits)}, no classes; give one of them, "
            f"--inside {first}{or_path}, or --inside {'/'.join(filter(None, (place, '.')))} to "
            "take all as they are"
        )


def _training(splits: list[str]) -> str:
    return next((name for name in splits if "train" in name.casefold()), splits[0])


def _refuse_parts(
    source: Path, found: list[tuple[Members, list[int]]], lead: list[str], inside: Inside
) -> None:
    """Raise DataError where folders are splits, masks or chunks, by their names."""
    refuse_splits(source, found, inside, classes=len(lead))
    # Stems of the pictures in every class folder, and in the folders below one.
    by_folder: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for members, chosen in found:
        for i in chosen:
            folder, _, name = members.names[i].rpartition("/")
            parts = folder.split("/")[len(lead) :] if folder else []
            stem = name.rpartition(".")[0]
            for above, below in _levels(parts):
                by_folder[above][below].append(stem)
    take = f"--inside {inside.below(*lead, '.')} to take all as they are"
    for above, stems in by_folder.items():
        pair = masks_among(stems)
        if pair is not None:
            image, mask = ("/".join(filter(None, (*lead, above, name))) for name in pair)
            nested = not above and any(folder.split("/")[0] == pair[0] for folder in by_folder)
            give = f"--inside {inside.below(image)}" if nested else "the images without masks"
            raise DataError(
                f"{source}: {mask} has pictures for those of {image}, as masks do, and is no "
                f"class; give {give}, or {take}"
            )
    _refuse_masks_beside(source, found, take)
    if are_chunks(by_folder[""]):
        raise DataError(
            f"{source}: its folders ({', '.join(sorted(by_folder[''])[:_SHOWN])}) are chunks of a "
            f"running number, no classes; add a dataset.json with labels, or {take}"
        )


def _levels(parts: list[str]) -> list[tuple[str, str]]:
    """A picture's class folder, and the folder that it lies in, each with what is above."""
    levels = [("", parts[0])] if parts else []
    return levels + ([("/".join(parts[:-1]), parts[-1])] if len(parts) > 1 else [])


def _refuse_masks_beside(source: Path, found: list[tuple[Members, list[int]]], take: str) -> None:
    for members, chosen in found:
        stems = {members.names[i].rpartition(".")[0]: i for i in chosen}
        for stem, i in stems.items():
            image = mask_of(stem)
            if image in stems:
                raise DataError(
                    f"{source}: {members.names[i]} lies beside {members.names[stems[image]]} as "
                    f"its mask; give the images without their masks, or {take}"
                )


def _class(name: str, strip: int) -> str | None:
    parts = name.split("/")
    return parts[strip] if len(parts) > strip + 1 else None


def _check_classes(
    source: Path, found: list[Members], flat: list[bool], lead: list[str], classes: set[str]
) -> None:
    """Raise DataError where a class would silently be lost."""
    for members, is_flat in zip(found, flat, strict=True):
        if members.folders is not None:
            _check_folders(members, lead, classes)
            continue
        for name, reason in members.lost:
            lost = stem_of(members.label) if is_flat else _class(name, len(lead))
            if lost is not None and lost not in classes:
                raise DataError(
                    f"{source}: no image of class {lost} can be used ({name}: {reason})"
                )
        folders = {name.rpartition("/")[0] for name in members.names}
        for nested in members.nested:
            inner = f"{nested}/"[len(members.inside) :]
            if not any(f"{folder}/".startswith(inner) for folder in folders):
                raise DataError(f"{members.label}: {nested}.tar holds no image")
        if not members.pictures():
            raise DataError(f"{members.label}: holds no image")


def _check_folders(members: Members, lead: list[str], classes: set[str]) -> None:
    """Raise DataError for a class folder on the disk that has no image."""
    assert members.folders is not None
    level = "/".join(lead)
    # Beside the leading folders only an empty one can have been meant as a class.
    beside = {"/".join(lead[:depth]) for depth in range(len(lead))}
    filled = {
        "/".join(name.split("/")[: depth + 1])
        for name in (*members.names, *members.ignored)
        for depth in range(len(lead))
    }
    for folder in members.folders:
        head, _, name = folder.rpartition("/")
        if (head == level and name not in classes) or (head in beside and folder not in filled):
            _refuse_empty(members, folder)


def _refuse_empty(members: Members, folder: str) -> NoReturn:
    held = [name for name in members.left() if name.startswith(f"{folder}/")]
    whole = (*TABLE_EXTENSIONS, *ARCHIVE_EXTENSIONS)
    other = next((name for name in held if name.lower().endswith(whole)), None)
    hint = "remove or fill it"
    if other:
        hint = f"it holds {other}: give that, or its folder"
    elif held:
        hint += f" ({len(held)} other files, such as {held[0]})"
    raise DataError(f"{members.path / folder}: class folder without images; {hint}")
