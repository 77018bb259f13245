"""Archives -> their members: tar, tar of tars, zip and compressed tars.

Nothing is extracted: images stay where they are, as byte ranges. Only compressed tars are
decompressed, once (spool.py).
"""

from __future__ import annotations

from io import FileIO
from pathlib import Path

from fastrepa.data.sources.members import Members
from fastrepa.data.sources.spool import COMPRESSIONS, byte_bar, decompressed
from fastrepa.data.sources.tars import scan_tar
from fastrepa.data.sources.zips import scan_zip
from fastrepa.errors import DataError, printable, worded

_MAGIC = {b"PK": "zip", b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz",
          b"\x28\xb5\x2f\xfd": "zstd"}  # fmt: skip


def scan_archives(
    source: Path, paths: list[Path], inside: str, *, spool: Path, progress: bool
) -> list[Members]:
    """Find the members of the archives `paths`: the source itself, or files in the folder it is.

    inside: only members below this path of each archive; "": all. Raises DataError for damage.
    """
    kinds = [_kind(path) for path in paths]
    # Compressed ones first: their copies are then scanned like the others.
    files = [
        decompressed(path, kind, str(path), spool / f"{number:05d}.tar", progress)
        if kind in COMPRESSIONS
        else path
        for number, (path, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    found = []
    total, before = sum(file.stat().st_size for file in files), 0
    with byte_bar(f"scanning {source.name}", total, progress) as report:
        for path, kind, file in zip(paths, kinds, files, strict=True):
            members = Members(
                file,
                str(path),
                prefix="" if path == source else f"{path.name}/",
                inside=f"{inside}/" if inside else "",
            )
            with FileIO(file) as opened:
                scan = scan_zip if kind == "zip" else scan_tar
                scan(opened, members, lambda done, before=before: report(before + done))  # type: ignore[misc]
            before += file.stat().st_size
            found.append(members)
    return found


def _kind(path: Path) -> str:
    """Tell an archive's kind by its first bytes, whatever its name says."""
    if not path.is_file():
        raise DataError(printable(f"{path}: not a regular file"))
    try:
        with path.open("rb") as file:
            start = file.read(6)
    except OSError as error:
        raise DataError(printable(f"{path}: cannot be read ({worded(error)})")) from None
    if not start:
        raise DataError(printable(f"{path}: empty file"))
    # A zip may have a program before it, which unpacks it.
    other = "zip" if path.suffix.lower() == ".zip" else "tar"
    kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), other)
    if kind == "zstd":
        raise DataError(printable(f"{path}: zstd is not read; decompress it with `zstd -d`"))
    return kind
