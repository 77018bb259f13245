"""Archives of a few images, made in memory."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

Files = dict[str, bytes]

PICTURES: Files = {
    f"{kind}/{i}.JPEG": os.urandom(10 + 700 * i) for kind in ("ant", "bee") for i in range(4)
}


def tar_bytes(files: Files, format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def zip_bytes(files: Files, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def by_class(files: Files, prefix: str = "") -> dict[str, tuple[str, bytes]]:
    return {prefix + name: (name.split("/")[0], data) for name, data in files.items()}
