"""Pictures of a data set for people: captioned contact sheets, and rows of pictures to compare.

Arrays in, one Pillow image out; nothing here knows where they came from.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from fastrepa.drawing import INK, PALE
from fastrepa.errors import DataError, printable, writing
from fastrepa.runtime.files import write_whole

TILE = 128
"""Small images are enlarged by a whole factor to at most this many pixels a side."""
LARGEST = 256
"""Larger images are reduced to this many."""

MARK = "fastrepa data show"
"""The PNG's "Software" text, by which our own earlier pictures are known."""

_GUTTER, _MARGIN = 10, 16
_TITLE_SIZE, _TEXT_SIZE = 17, 12
_LOW, _HIGH = 2, 98  # percentiles that become black and white


def tile(image: np.ndarray) -> Image.Image:
    """A picture of a readable size of an image uint8 [H,W,3]; unchanged between the two limits."""
    picture = Image.fromarray(image)
    longest = max(picture.size)
    if longest > LARGEST:
        factor = LARGEST / longest
    elif (whole := TILE // longest) > 1:
        factor = float(whole)
    else:
        return picture
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def contact_sheet(
    images: Sequence[np.ndarray],
    captions: Sequence[tuple[str, str]],
    title: str,
    columns: int | None = None,
) -> Image.Image:
    """Images uint8 [H,W,3] row by row on white, each over its caption: a name, a paler line.

    `columns` defaults to what leaves few places empty on a sheet a little wider than high. Texts
    too long for their tile end in an ellipsis. Raises ValueError for no images.
    """
    if not len(images):
        raise ValueError("images: nothing to show")
    tiles = [tile(image) for image in images]
    width = max(max(t.width for t in tiles), 64)
    height = max(t.height for t in tiles)
    columns = min(len(tiles), columns or _columns_for(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    line = _line_height(_TEXT_SIZE)
    step_x, step_y = width + _GUTTER, height + 2 * line + 4 + _GUTTER
    sheet, top = _blank(columns * step_x - _GUTTER, rows * step_y - _GUTTER, title)
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(tiles, captions, strict=True)):
        row, column = divmod(number, columns)
        x, y = _MARGIN + column * step_x, top + row * step_y
        sheet.paste(picture, (x + (width - picture.width) // 2, y + height - picture.height))
        _draw_caption(draw, x + width // 2, y + height + 3, caption, width)
    return sheet


@dataclass(frozen=True)
class Strip:
    """One row of a comparison: a picture uint8 [H,W,3] for every column, what it is, a remark.

    `smooth`: may be resized with a filter; otherwise every value stays a square of one colour.
    """

    pictures: Sequence[np.ndarray]
    name: str
    remark: str = ""
    smooth: bool = False


def comparison(
    strips: Sequence[Strip], captions: Sequence[tuple[str, str]], title: str
) -> Image.Image:
    """Strips below each other, their names at the left, the captions below the last."""
    first = tile(strips[0].pictures[0])
    side = max(first.size)
    line = _line_height(_TEXT_SIZE)
    left = max(
        _font(_TEXT_SIZE).getlength(text)
        for s in strips
        for text in (s.name, *s.remark.split("\n"))
    )
    left = math.ceil(left) + _GUTTER
    step = side + _GUTTER
    columns = len(captions)
    sheet, top = _blank(
        left + columns * step - _GUTTER, len(strips) * step - _GUTTER + 2 * line + 4, title
    )
    draw = ImageDraw.Draw(sheet)
    for row, strip in enumerate(strips):
        y = top + row * step
        draw.text((_MARGIN, y), strip.name, fill=INK, font=_font(_TEXT_SIZE))
        draw.text((_MARGIN, y + line), strip.remark, fill=PALE, font=_font(_TEXT_SIZE), spacing=4)
        how = Image.Resampling.LANCZOS if strip.smooth else Image.Resampling.NEAREST
        for column, picture in enumerate(strip.pictures):
            shown = Image.fromarray(picture).resize((side, side), how)
            sheet.paste(shown, (_MARGIN + left + column * step, y))
    for column, caption in enumerate(captions):
        x, y = _MARGIN + left + column * step + side // 2, top + len(strips) * step - _GUTTER + 3
        _draw_caption(draw, x, y, caption, side)
    return sheet


def _draw_caption(
    draw: ImageDraw.ImageDraw, x: int, y: int, caption: tuple[str, str], width: int
) -> None:
    """A name and a paler line, centred below (x, y)."""
    for row, (text, colour) in enumerate(zip(caption, (INK, PALE), strict=True)):
        at = (x, y + row * _line_height(_TEXT_SIZE))
        text = _shortened(text, _TEXT_SIZE, width)
        draw.text(at, text, fill=colour, font=_font(_TEXT_SIZE), anchor="ma")


def name_strip(names: Sequence[str], width: int, gutter: int) -> Image.Image:
    """A white line of names, each over the middle of a tile `width` pixels wide, with gutters."""
    size = (len(names) * (width + gutter) + gutter, _line_height(_TEXT_SIZE))
    strip = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(strip)
    for column, name in enumerate(names):
        at = (gutter + column * (width + gutter) + width // 2, 0)
        text = _shortened(name, _TEXT_SIZE, width)
        draw.text(at, text, fill=INK, font=_font(_TEXT_SIZE), anchor="ma")
    return strip


def false_colours(maps: np.ndarray) -> np.ndarray:
    """Colour maps [..., C], C up to 3: uint8, channels stretched over all maps, missing ones grey.

    The 2nd percentile becomes 0 and the 98th 255, so that a few outliers do not leave the rest one
    colour. A constant channel is grey.
    """
    maps = np.asarray(maps, dtype=np.float64)
    flat = maps.reshape(-1, maps.shape[-1])
    low, high = np.percentile(flat, (_LOW, _HIGH), axis=0)
    span = high - low
    safe = np.where(span > 0, span, 1.0)
    shown = np.where(span > 0, np.clip((maps - low) / safe, 0.0, 1.0), 0.5)
    grey = np.full((*maps.shape[:-1], 3 - maps.shape[-1]), 0.5)
    return np.rint(np.concatenate((shown, grey), -1) * 255).astype(np.uint8)


def principal_components(tokens: np.ndarray, count: int = 3) -> np.ndarray:
    """Tokens [N,Z] projected on their first principal components, float64 [N, min(count, N, Z)].

    The sign of a component, which nothing decides, is that which makes its largest loading by
    magnitude positive.
    """
    x = np.asarray(tokens, dtype=np.float64)
    x = x - x.mean(axis=0)
    _, _, axes = np.linalg.svd(x, full_matrices=False)
    axes = axes[:count]
    largest = np.abs(axes).argmax(axis=1)
    signs = np.sign(axes[np.arange(len(axes)), largest])
    return x @ (axes * np.where(signs == 0, 1.0, signs)[:, None]).T


def _columns_for(count: int) -> int:
    wide = max(4, round(math.sqrt(1.5 * count)))
    near = range(max(4, wide - 2), wide + 3)
    return min(near, key=lambda columns: (-count % columns, abs(columns - wide)))


def _blank(width: int, height: int, title: str) -> tuple[Image.Image, int]:
    """A white sheet around a body of this size, its title drawn; and where the body begins."""
    top = _MARGIN + _line_height(_TITLE_SIZE) + _GUTTER
    sheet = Image.new("RGB", (width + 2 * _MARGIN, top + height + _MARGIN), "white")
    text = _shortened(title, _TITLE_SIZE, width)
    ImageDraw.Draw(sheet).text((_MARGIN, _MARGIN), text, fill=INK, font=_font(_TITLE_SIZE))
    return sheet, top


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: Latin, Greek, Cyrillic and many symbols."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(path, size)


def _line_height(size: int) -> int:
    return sum(_font(size).getmetrics()) + 2


def _shortened(text: str, size: int, width: int) -> str:
    """The text, or as much of it as fits into `width` pixels with an ellipsis, on one line."""
    text, font = printable(" ".join(text.split())), _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG that is known as ours; DataError where it cannot be written."""
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", MARK)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=mark)
    with writing(path, DataError):
        write_whole(path, buffer.getvalue())
