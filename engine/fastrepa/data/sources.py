"""What `fastrepa prepare` reads: any kind of source -> one flat listing of labelled byte ranges."""

from __future__ import annotations

from pathlib import Path

from fastrepa.data.entries import (
    ENTRY_DTYPE,
    MAX_IMAGE_BYTES,
    Listing,
    Rejected,
    printable,
    read_entry,
    read_file,
    read_range,
)

__all__ = [
    "ENTRY_DTYPE",
    "MAX_IMAGE_BYTES",
    "Listing",
    "Rejected",
    "list_source",
    "printable",
    "read_entry",
    "read_file",
    "read_range",
]


def list_source(
    source: Path,
    *,
    inside: str | None = None,
    class_names: Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    spool: Path,
    progress: bool,
) -> Listing:
    raise NotImplementedError  # filled in the next commit
