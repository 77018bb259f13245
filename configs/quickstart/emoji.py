"""The quickstart's data set, rebuilt from its sources: 3-D emoji on white, 64 x 64, 8 classes.

    python configs/quickstart/emoji.py --images DIR --labels emoji.json OUT

DIR holds the WebP images of npm `@lobehub/fluent-emoji-3d` 1.1.0, named by code points; emoji.json
is that of npm `emoji-datasource-google` 16.0.0, joined by code points. OUT gets `train` and
`validation`, each a set made by `prepare`.

Which emoji: every one of the 8 categories that are not Component or Flags, and of the skin-tone
variants those in the medium tone; the other four would not fit into the 8 MB that the repository
has for them (and would make every second image a person). Held out for validation: about 7% of the
motifs, chosen by a hash of their name, so that all variants of one motif (skin tone, gender,
direction) are on one side.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastrepa.commands.prepare.prepare import prepare
from fastrepa.errors import DataError
from fastrepa.reading.text import read_json

LEFT_OUT = ("Component", "Flags")
TONES = ("1F3FD",)
VALIDATION_SHARE = 0.07

# Code points that vary a motif: skin tones, gender signs, the direction arrow, glue.
_VARIATION = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF", "2640", "2642", "27A1", "FE0F", "200D"}
_ADULTS = ("1F468", "1F469")  # man, woman
_PERSON = "1F9D1"


class Emoji(NamedTuple):
    """One image of the set."""

    image: Path
    category: str
    base: str  # motif: its code points without variations, a man or woman as a person


def base_of(unified: str) -> str:
    """The motif of a code-point sequence such as "1F469-1F3FF-200D-1F680" (woman astronaut)."""
    points = unified.upper().split("-")
    # A sign that is no variation of anything stands for itself.
    motif = [point for point in points if point not in _VARIATION] or points[:1]
    return "-".join(_PERSON if point in _ADULTS else point for point in motif)


def is_validation(base: str) -> bool:
    """Tell whether a motif is held out, by its name alone."""
    draw = int.from_bytes(hashlib.sha256(base.encode()).digest()[:8]) / 2**64
    return draw < VALIDATION_SHARE


def choose(images: Path, labels: Path) -> Iterator[Emoji]:
    """The emoji of the set, in the order of emoji.json; those without an image are passed over."""
    if not images.is_dir():
        raise DataError(f"{images}: no such folder")
    foreign = "not emoji-datasource's emoji.json"
    try:
        entries: list[dict[str, Any]] = read_json(labels)
    except DataError as error:
        raise DataError(f"{error}: {foreign}") from None
    try:
        for entry in entries:
            if entry["category"] in LEFT_OUT:
                continue
            variants = entry.get("skin_variations", {})
            kept = [variants[tones] for tones in variants if set(tones.split("-")) <= set(TONES)]
            for form in [entry, *kept]:
                image = _image(images, form)
                if image:
                    yield Emoji(image, entry["category"], base_of(form["unified"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{labels}: {foreign} ({error!r})") from None


def build(images: Path, labels: Path, out: Path, *, quality: int, progress: bool = True) -> None:
    """Make OUT/train and OUT/validation with `prepare`."""
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary)
        for emoji in choose(images, labels):
            part = "validation" if is_validation(emoji.base) else "train"
            link = tree / part / emoji.category / emoji.image.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(emoji.image.resolve())
        if not tree.joinpath("train").is_dir():
            raise DataError(f"{images}: holds none of the images that {labels} names")
        for part in ("train", "validation"):
            report = prepare(
                tree / part,
                out / part,
                resolution=64,
                shard_size=512,
                image_format="jpeg",
                quality=quality,
                progress=progress,
            )
            print(f"{report.path}: {report.report.images} images, {report.num_bytes} bytes")


def _image(images: Path, form: dict[str, Any]) -> Path | None:
    for name in (form["unified"], form["non_qualified"]):
        # The image set drops the variation selector FE0F here and there.
        for stem in (name, name.replace("-FE0F", "")) if name else ():
            path = images / f"{stem.lower()}.webp"
            if path.exists():
                return path
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--images", type=Path, required=True, help="folder of CODEPOINTS.webp")
    parser.add_argument("--labels", type=Path, required=True, help="emoji.json")
    parser.add_argument("--quality", type=int, default=90, help="of JPEG (default: 90)")
    parser.add_argument("out", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    try:
        build(arguments.images, arguments.labels, arguments.out, quality=arguments.quality)
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
