"""Names that tell parts of a source that are no classes: splits, masks, chunks of a running number.

Every kind of source asks here, with the names it has: folders, members' folders, archives, tables.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

# The one list of split names; what stands for the same split has the same value.
SPLITS = {
    "train": "train", "training": "train", "trainset": "train", "trn": "train",
    "val": "val", "valid": "val", "validation": "val", "valset": "val", "dev": "val",
    "eval": "val", "evaluation": "val", "test": "test", "testing": "test", "testset": "test",
}  # fmt: skip
_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLITS, key=len, reverse=True))})(?![a-z])")
_NUMBERS = re.compile(r"[-_. ]*(?<![a-z0-9])(?:[0-9]+|of|[0-9a-f]{16})(?![a-z0-9])|[0-9]+$")

_IMAGES = re.compile(
    r"(?:jpeg|png|rgb)?_?(?:images?|imgs?|photos?|pictures?|pics|originals?|inputs?|rgb)"
)
_MASKS = re.compile(
    r"(?<![a-z])(?:masks?|annotations?|annots?|labels?|seg|segmentations?(?:class|object)?|"
    r"gt|ground[-_ ]?truths?|trimaps?|mattes?|depths?|contours?)(?![a-z])"
)
_MASK_OF = re.compile(rf"(.+?)[-_. ]*{_MASKS.pattern}[-_. ]*[0-9]*")
_RUNNING = re.compile(r"([^0-9]*)([0-9]+)")
_SAME = 0.9  # of two folders' names, from which they are pairs
_TELLING = 6  # characters of a name, on average, that two pictures do not share by chance


def split_of(name: str) -> tuple[str, str] | None:
    """Return a name's split ("train", "val", "test") and what is left of the name; or None.

    "imagenet-train-00000-of-00002" -> ("train", "imagenet-*"); "train2017" -> ("train", "*")
    """
    lower = name.casefold()
    match = _SPLIT.search(lower)
    if match is None:
        return None
    rest = _NUMBERS.sub("", f"{lower[: match.start()]}*{lower[match.end() :]}")
    return SPLITS[match[1]], rest


def splits_among(names: Iterable[str]) -> list[str]:
    """Return those of `names` that are splits of one thing, sorted; none where it is no two splits.

    A class called `test` among others is none: it takes a second split, of a name that is the same
    but for the split's word and numbers.
    """
    groups: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in set(names):
        found = split_of(name)
        if found is not None:
            groups[found[1]][found[0]].add(name)
    several = [group for group in groups.values() if len(group) > 1]
    return sorted(name for group in several for part in group.values() for name in part)


def masks_among(stems: Mapping[str, Sequence[str]]) -> tuple[str, str] | None:
    """Return a folder of images and one of masks for them, of folders with their pictures' stems.

    By their names (images/ and masks/; cat/ and cat_mask/ of the same pictures), or because two
    hold pictures of the same telling names.
    """
    by_name = {folder.casefold(): folder for folder in stems}
    images = [folder for name, folder in by_name.items() if _IMAGES.fullmatch(name)]
    for name, mask in by_name.items():
        match = _MASKS.search(name)
        if match is None:
            continue
        rest = (name[: match.start()] + name[match.end() :]).strip("-_. ")
        if not rest and images:
            return images[0], mask
        image = by_name.get(rest, mask)
        if image != mask and _shared(stems[image], stems[mask]) > 0.5:
            return image, mask
    return _pairs(stems)


def _pairs(stems: Mapping[str, Sequence[str]]) -> tuple[str, str] | None:
    by_stem: dict[str, str] = {}
    for folder, names in stems.items():
        for stem in names:
            other = by_stem.setdefault(stem, folder)
            if other == folder:
                continue
            if len(names) >= 3 and _telling(names) and _shared(stems[other], names) >= _SAME:
                return other, folder
            break
    return None


def _shared(a: Sequence[str], b: Sequence[str]) -> float:
    """Share of the larger folder's stems that both have, without a mask's suffix."""
    one, two = ({mask_of(stem) or stem for stem in stems} for stems in (a, b))
    return len(one & two) / max(len(one), len(two), 1)


def _telling(stems: Sequence[str]) -> bool:
    """Tell whether names are none that every folder has: 0, 1, 2 or img0001, img0002."""
    if sum(map(len, stems)) < _TELLING * len(stems):
        return False
    matches = [_RUNNING.fullmatch(stem) for stem in stems]
    if not all(matches) or len({match[1] for match in matches if match}) > 1:
        return True
    numbers = sorted(int(match[2]) for match in matches if match)
    return numbers[0] > 1 or numbers[-1] - numbers[0] != len(numbers) - 1


def is_mask_name(name: str) -> bool:
    """Tell whether a folder is called as what belongs to images: masks, labels, annotations."""
    return _MASKS.search(name.casefold()) is not None


def mask_of(stem: str) -> str | None:
    """Return the stem of the picture that a mask's stem names: "a" of "a_mask" and of "a_seg_1"."""
    lower = stem.casefold()
    match = _MASK_OF.fullmatch(lower) if _MASKS.search(lower) else None  # the search is fast
    return stem[: len(match[1])] if match else None


def are_chunks(stems: Mapping[str, Sequence[str]]) -> bool:
    """Tell whether folders only cut a running number: 00000/img00000999, 00001/img00001000."""
    if len(stems) < 2 or not all(name.isdecimal() and len(name) >= 4 for name in stems):
        return False
    ends: list[int] = []
    for folder in sorted(stems):
        matches = [_RUNNING.fullmatch(stem) for stem in stems[folder]]
        if not all(matches):
            return False
        numbers = sorted(int(match[2]) for match in matches if match)
        if numbers[-1] - numbers[0] != len(numbers) - 1 or (ends and numbers[0] != ends[-1] + 1):
            return False
        ends.append(numbers[-1])
    return True
