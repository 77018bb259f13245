"""The held-out emoji as other people's files: what `fastrepa prepare` reads."""

import io
import tarfile
from pathlib import Path

from tests.runs import ROOT


def emoji() -> list[tuple[int, bytes]]:
    """Return (label, JPEG) of the 120 held-out emoji."""
    files: dict[str, dict[str, bytes]] = {}
    with tarfile.open(ROOT / "configs/quickstart/emoji/validation/shard-00000.tar") as tar:
        for member in tar:
            key, _, kind = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            files.setdefault(key, {})[kind] = file.read()
    return [(int(file["cls"]), file["jpg"]) for file in files.values()]


def write_tar_of_tars(images: list[tuple[int, bytes]], path: Path) -> None:
    """Write one tar that holds a tar for every class, as ImageNet comes."""
    with tarfile.open(path, "w") as outer:
        for label in sorted({label for label, _ in images}):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for number, (of, data) in enumerate(images):
                    if of == label:
                        member = tarfile.TarInfo(f"n{label:08d}_{number}.JPEG")
                        member.size = len(data)
                        inner.addfile(member, io.BytesIO(data))
            member = tarfile.TarInfo(f"n{label:08d}.tar")
            member.size = len(buffer.getvalue())
            outer.addfile(member, io.BytesIO(buffer.getvalue()))


def write_class_folders(images: list[tuple[int, bytes]], folder: Path) -> None:
    for number, (label, data) in enumerate(images):
        path = folder / f"class{label}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
