"""Members of an archive or a folder. A name is only ever a name: nothing is written under it."""

from __future__ import annotations

import functools
import os
import re
import stat
import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from fastrepa.data.images import readable_extensions
from fastrepa.data.sources.entries import MAX_IMAGE_BYTES, Rejected, read_file, read_range
from fastrepa.errors import DataError, printable

LABEL_EXTENSIONS = {".cls", ".json"}
NOTE_EXTENSIONS = {".csv", ".tsv", ".jsonl", ".ndjson", ".txt"}  # may be tables of labels
_NOTES = 1 << 16  # of them that are remembered
# Passed over with all that is below them, as is every name that begins with a dot.
_HIDDEN = {"__MACOSX", "@eaDir"}
# By their names. What a file is, its first bytes say.
ARCHIVE_EXTENSIONS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip",
                      ".tar.zst", ".tzst")  # fmt: skip
TABLE_EXTENSIONS = (".parquet", ".pq")

_LOOKED = 4096  # files of unknown names that are looked into
# How pictures begin that Pillow reads, and those of telephones and cameras that it does not.
_PICTURE = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF.{4}WEBP|BM.{12}[\x28\x6c\x7c]|II\*\0|MM\0\*|"
    rb".{4}ftyp(?:hei|hev|mif|msf|avi|crx)|\xff\x0a|\0\0\0\x0cJXL |\0\0\0\x0cjP  |FUJIFILM",
    re.DOTALL,
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

Rows = list[dict[int, "str | None"]]
"""Of each container: a text about every image, by its place there."""

ReportByte = Callable[[int], None]  # gets the byte of the archive that was reached


class UnsafeNameError(Exception):
    """Says why a member's name is not accepted."""


@functools.cache
def picture_extensions() -> frozenset[str]:
    """Lower-case extensions, with their dot, of the files that count as images."""
    return frozenset(readable_extensions())


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is passed over, without a word: systems leave such behind."""
    return name.startswith(".") or name in _HIDDEN


def extension_of(name: str) -> str:
    """Return the extension: ".png" of "a/b.c.PNG"."""
    return os.path.splitext(name)[1].lower()


def stem_of(name: str) -> str:
    """An archive's name without folder and extension: "n01440764" of "a/n01440764.tar.gz"."""
    base = name.rsplit("/", 1)[-1]
    ends = [end for end in ARCHIVE_EXTENSIONS if base.lower().endswith(end)]
    return base[: -len(max(ends, key=len))] if ends else base


def safe_name(raw: str) -> str | None:
    """A member's name without "./" and "//"; None for hidden ones, which are passed over.

    Raises UnsafeNameError for names that no archive of images has by honest means.
    """
    if _CONTROL.search(raw):
        raise UnsafeNameError("control characters in its name")
    if "\\" in raw:
        raise UnsafeNameError("a backslash in its name")
    if raw.startswith("/"):
        raise UnsafeNameError("its name is an absolute path")
    parts = [part for part in raw.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UnsafeNameError("'..' in its name")
    if not parts:
        raise UnsafeNameError("no name")
    if any(map(is_hidden, parts)):
        return None
    return "/".join(parts)


@dataclass(frozen=True)
class Note:
    """A file that may be a table of labels, and where it lies."""

    name: str
    offset: int
    size: int
    inflated: int


@dataclass
class Members:
    """Images and labels found in one container, in its order, and what became of the rest."""

    path: Path  # of the container: an archive, or a folder, whose members are files below it
    label: str  # what the user calls it, for messages
    prefix: str = ""  # before every name that people see
    inside: str = ""  # "" or a path with "/" at its end: only members below it count
    names: list[str] = field(default_factory=list)  # below `inside`
    offset: array[int] = field(default_factory=lambda: array("q"))
    size: array[int] = field(default_factory=lambda: array("q"))
    inflated: array[int] = field(default_factory=lambda: array("q"))
    rejected: list[Rejected] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)  # safe names of rejected images, why
    ignored: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # of those ignored: pictures by their bytes
    nested: list[str] = field(default_factory=list)  # folders that nested archives stand for
    labelled: bool = False  # .cls and .json were read as labels
    label_file: str | None = None  # the member that was read as the labels of all
    notes: list[Note] = field(default_factory=list)
    folders: list[str] | None = None  # of a folder: the visible ones below it; None: an archive
    _seen: set[str] = field(default_factory=set)
    _looked: int = 0

    def offer(
        self, raw: str, offset: int, size: int, inflated: int = -1, wrong: str | None = None
    ) -> None:
        """Take in one member. `wrong`: why its bytes cannot be used, if so."""
        try:
            name = safe_name(raw)
        except UnsafeNameError as error:
            self.reject(raw, str(error))
            return
        if name is None or not name.startswith(self.inside):
            return
        name = name[len(self.inside) :]
        picture = extension_of(name) in picture_extensions()
        if not picture and extension_of(name) not in LABEL_EXTENSIONS:
            if name.lower().endswith(ARCHIVE_EXTENSIONS):
                self.reject(name, "an archive inside an archive; unpack or list it by itself")
            else:
                self.pass_over(name, None if wrong else (offset, size, inflated))
            return
        if wrong is None and name in self._seen:
            wrong = "a second member of this name"
        if wrong is None and max(size, inflated) > MAX_IMAGE_BYTES:
            wrong = f"{max(size, inflated)} bytes; an image may have {MAX_IMAGE_BYTES}"
        if wrong is not None:
            self.reject(name, wrong)
            if picture:
                self.lost.append((name, wrong))
            return
        self._seen.add(name)
        self.take(name, offset, size, inflated)

    def take(self, name: str, offset: int, size: int, inflated: int = -1) -> None:
        """Take in an image or a file of labels."""
        self.names.append(name)
        self.offset.append(offset)
        self.size.append(size)
        self.inflated.append(inflated)

    def pass_over(self, name: str, place: tuple[int, int, int] | None) -> None:
        """Note a file that is neither; `place`: its offset, size and inflated size, if it has one.

        A file that begins as pictures do is noted as one of those that are not read.
        """
        extension = extension_of(name)
        shown = printable(self.prefix + name)
        self.ignored.append(shown)
        if place is None:
            return
        if extension in NOTE_EXTENSIONS:
            if len(self.notes) < _NOTES:
                self.notes.append(Note(name, *place))
        elif self._starts_as_a_picture(name, *place):
            self.unread.append(shown)

    def stray(self, name: str) -> None:
        """Note an image that belongs to no class."""
        self.ignored.append(printable(self.prefix + name))
        self.unread.append(self.ignored[-1])

    def left(self) -> list[str]:
        """Printable names of what is neither an image nor was read as labels."""
        pictures = picture_extensions()
        unread = (
            printable(self.prefix + name)
            for name in ([] if self.labelled else self.names)
            if extension_of(name) not in pictures and name != self.label_file
        )
        return [*self.ignored, *unread]

    def pictures(self) -> list[int]:
        """The places of the images."""
        pictures = picture_extensions()
        return [i for i, name in enumerate(self.names) if extension_of(name) in pictures]

    def read(self, place: int, limit: int) -> bytes | None:
        """The bytes of a member; None where there are more than `limit`, or it cannot be read."""
        return self.read_note(
            Note(self.names[place], self.offset[place], self.size[place], self.inflated[place]),
            limit,
        )

    def read_note(self, note: Note, limit: int) -> bytes | None:
        if max(note.size, note.inflated) > limit:
            return None
        try:
            if self.folders is not None:
                return read_file(self.path / note.name)
            return read_range(self.path, note.offset, note.size, note.inflated)
        except (OSError, DataError):
            return None

    def _starts_as_a_picture(self, name: str, offset: int, size: int, inflated: int) -> bool:
        """Tell whether a file's first bytes are a picture's. A few thousand are looked at."""
        self._looked += 1
        if max(size, inflated) < 16 or self._looked > _LOOKED:
            return False
        try:
            if self.folders is not None:
                with FileIO(os.open(self.path / name, os.O_RDONLY | os.O_NONBLOCK)) as file:
                    start = file.read(16) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
            else:
                start = read_range(self.path, offset, min(size, 64))
                if inflated >= 0:
                    start = zlib.decompressobj(wbits=-zlib.MAX_WBITS).decompress(start, 16)
        except (OSError, DataError, zlib.error):
            return False
        return _PICTURE.match(start or b"") is not None

    def nest(self, raw: str) -> str | None:
        """The folder that a tar inside the archive stands for; None: it is not to be read."""
        try:
            name = safe_name(raw)
        except UnsafeNameError as error:
            self.reject(raw, str(error))
            return None
        if name is None:
            return None
        folder = name[: -len(".tar")]
        if folder in self.nested or not folder:
            self.reject(name, "a second member of this name")
            return None
        if not f"{folder}/".startswith(self.inside) and not self.inside.startswith(f"{folder}/"):
            return None
        self.nested.append(folder)
        return folder

    def reject(self, name: str, reason: str) -> None:
        self.rejected.append(Rejected(printable(self.prefix + name), reason))

    def finish(self) -> None:
        """Let go of what only the scan needs."""
        self._seen.clear()
