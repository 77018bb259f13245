"""An archive's members. A member's name is only ever a name: nothing is written under it."""

from __future__ import annotations

import functools
import os
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fastrepa.data.images import readable_extensions
from fastrepa.data.sources.entries import MAX_IMAGE_BYTES, Rejected
from fastrepa.errors import printable

LABEL_EXTENSIONS = {".cls", ".json"}
# By their names. What a file is, its first bytes say.
ARCHIVE_EXTENSIONS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip",
                      ".tar.zst", ".tzst")  # fmt: skip

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

ReportByte = Callable[[int], None]  # gets the byte of the archive that was reached


class UnsafeNameError(Exception):
    """Says why a member's name is not accepted."""


@functools.cache
def picture_extensions() -> frozenset[str]:
    """Lower-case extensions, with their dot, of the files that count as images."""
    return frozenset(readable_extensions())


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
    if any(part.startswith(".") or part == "__MACOSX" for part in parts):
        return None
    return "/".join(parts)


@dataclass
class Members:
    """Images and labels found in one container, in its order, and what became of the rest."""

    path: Path  # of the container
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
    nested: list[str] = field(default_factory=list)  # folders that nested archives stand for
    labelled: bool = False  # .cls and .json were read as labels
    _seen: set[str] = field(default_factory=set)

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
        extension = extension_of(name)
        picture = extension in picture_extensions()
        if not picture and extension not in LABEL_EXTENSIONS:
            if name.lower().endswith(ARCHIVE_EXTENSIONS):
                self.reject(name, "an archive inside an archive; unpack or list it by itself")
            else:
                self.ignored.append(printable(self.prefix + name))
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
        self.names.append(name)
        self.offset.append(offset)
        self.size.append(size)
        self.inflated.append(inflated)

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
