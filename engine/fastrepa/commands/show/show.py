"""`fastrepa data show`: a data set at a glance, as pictures.

The contact sheet has images of every class with their captions. Where a set holds columns, a
second picture compares a few images with their latents (the mean's first channels as colours) and
with each encoder's patch tokens (their first three principal components as colours).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Column, Table

from fastrepa.data.classes import choose_classes, named
from fastrepa.data.datasets import located
from fastrepa.data.gallery import Gallery, choose
from fastrepa.data.images import UnreadableImageError, open_image
from fastrepa.data.sheet import (
    MARK,
    Strip,
    comparison,
    contact_sheet,
    false_colours,
    principal_components,
    save_picture,
)
from fastrepa.errors import DataError
from fastrepa.runtime.terminal import print_table

_PREVIEWED = 3  # channels of a latent that become red, green and blue


@dataclass(frozen=True)
class ShowReport:
    """The files that `show` wrote, and the set's properties in words."""

    pictures: list[Path]
    summary: list[tuple[str, str]]


def show(
    path: str | Path,
    out: str | Path | None = None,
    *,
    num: int = 48,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    features: int = 6,
    say: Callable[[str], None] = lambda text: None,
) -> ShowReport:
    """Write the contact sheet of the data set in folder `path`, and the picture of its columns.

    Args:
        out: the contact sheet, a .png, or a folder for it; default `<name>_show.png` in the current
            folder. The columns' picture lies beside it, `<name>_show_columns.png`.
        num: images on the sheet, as evenly over the classes as they allow.
        classes: names or numbers of the classes to show (`choose_classes`); None: all.
        seed: of the choice.
        features: images in the columns' picture; 0: no such picture.
        say: is told how names and numbers of classes were understood.

    Raises DataError: no data set, an unknown class, or a file in the way that is none of ours.
    """
    for name, value, low in (("num", num, 1), ("features", features, 0), ("seed", seed, 0)):
        if value < low:
            raise DataError(f"{name} must be at least {low}, not {value}")
    folder = located(path)
    gallery = Gallery(folder)
    name = folder.resolve().name
    sheet_path = _picture_path(name, out)
    columns_path = sheet_path.with_name(f"{sheet_path.stem}_columns.png")
    with_columns = features > 0 and (gallery.moments or gallery.encoders)
    wanted = [sheet_path, *([columns_path] if with_columns else [])]
    for picture in wanted:
        _check_free(picture)

    allowed = _labels_of(gallery, classes, say)
    chosen = choose(gallery.labels, num, seed, allowed)
    # Classes in their order; within one, images in the order of the draw.
    chosen = chosen[np.argsort(gallery.labels[chosen], kind="stable")]
    title = f"{name}: {len(chosen)} of {len(gallery.labels):,} images, {gallery.resolution} px"
    captions = [_caption(gallery, number) for number in chosen]
    sheet = contact_sheet([gallery.image(number) for number in chosen], captions, title)
    save_picture(sheet, sheet_path)
    if with_columns:
        few = choose(gallery.labels, features, seed, allowed)
        save_picture(_columns_picture(gallery, few, name), columns_path)
    return ShowReport(wanted, gallery.summary())


def print_shown(report: ShowReport, console: Console) -> None:
    """The set's properties, and what was written."""
    table = Table("", Column(overflow="fold"), show_header=False)
    for name, value in report.summary:
        table.add_row(name, value)
    print_table(console, table)
    for picture in report.pictures:
        console.print(f"wrote {picture}", soft_wrap=True)


def _columns_picture(gallery: Gallery, chosen: np.ndarray, name: str) -> Image.Image:
    images = [gallery.image(number) for number in chosen]
    strips = [Strip(images, "image", f"{gallery.resolution} px", smooth=True)]
    if gallery.moments is not None:
        means = np.stack([gallery.latent_mean(number) for number in chosen])  # [n, C, h, w]
        colours = false_colours(means[:, :_PREVIEWED].transpose(0, 2, 3, 1))
        remark = f"mean, channels 1-{min(_PREVIEWED, means.shape[1])}\n{list(means.shape[1:])}"
        strips.append(Strip(list(colours), "latents", remark))
    for encoder in gallery.encoders:
        tokens = np.stack([gallery.tokens(encoder, number) for number in chosen])  # [n, T, Z]
        side = encoder.grid
        parts = principal_components(tokens.reshape(-1, tokens.shape[-1]))
        colours = false_colours(parts.reshape(len(chosen), side, side, -1))
        remark = f"principal components 1-3\n{side}x{side} tokens of {encoder.width}"
        strips.append(Strip(list(colours), encoder.encoder, remark))
    captions = [_caption(gallery, number) for number in chosen]
    return comparison(strips, captions, f"{name}: what is stored beside its images")


def _caption(gallery: Gallery, number: int) -> tuple[str, str]:
    return named(gallery.classes, int(gallery.labels[number])), gallery.key(number)


def _labels_of(
    gallery: Gallery, classes: Sequence[str] | None, say: Callable[[str], None]
) -> list[int] | None:
    """Numbers of the chosen classes, each of which has images; None: all."""
    if not classes:
        return None
    names = gallery.classes
    chosen = choose_classes(classes, names, len(names), kind=DataError, say=say)
    sizes = np.bincount(gallery.labels, minlength=len(names))
    if empty := [number for number in chosen if not sizes[number]]:
        raise DataError(
            f"{gallery.path}: class number {empty[0]}, {names[empty[0]]!r}, has no images"
        )
    return chosen


def _picture_path(name: str, out: str | Path | None) -> Path:
    path = Path(out) if out is not None else Path(f"{name}_show.png")
    if path.is_dir():
        path = path / f"{name}_show.png"
    if path.suffix.lower() != ".png":
        raise DataError(f"{path}: the picture is a PNG; name it .png")
    if not path.parent.is_dir():
        raise DataError(f"{path.parent}: no such folder")
    return path


def _check_free(path: Path) -> None:
    """DataError unless nothing is there, or an earlier picture of ours."""
    if not path.exists():
        return
    try:
        ours = open_image(path.read_bytes()).info.get("Software") == MARK
    except (UnreadableImageError, OSError):  # whatever it is, it is none of ours
        ours = False
    if not ours:
        raise DataError(
            f"{path}: exists and is no picture of `{MARK}`; choose another --out, or move it"
        )
