"""Wheels, in a folder to carry, of what a borrowed GPU machine lacks; `make gpu-wheels [DALI=1]`.

    python -m benchmarks.gpu_suite.wheels fetch [--dali]
    python -m benchmarks.gpu_suite.wheels join SITE [--parts FOLDER]     on that machine

`fetch` fills .gpu-wheels with the wheels and the commit, for Python 3.12 on x86-64 whatever Python
runs it. DALI is too large for one transfer: with --dali .gpu-dali gets it, and what it imports, cut
into parts that fill a transfer of 60 MiB beside the tree and the wheels. `join` keeps the part that
came with a call in FOLDER; with the last it checks the whole and installs it into SITE.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import command_line
from benchmarks.provenance import COMMIT, ROOT, WHEELS, provenance

FOLDER, DALI = ROOT / WHEELS, ROOT / ".gpu-dali"
PARTS = FOLDER / "dali.json"
"""The parts' names and digests; it travels with the wheels."""
BINARY = (
    "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "hjson", "simplejpeg",
)  # fmt: skip
FROM_SOURCE = ("deepspeed",)
OF_DALI = (
    "nvidia-dali-cuda130", "astunparse", "gast", "optree", "nvtx", "makefun", "libcst",
    "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg", "nvidia-nvjpeg2k-cu13", "nvidia-nvtiff-cu13",
    "nvidia-libnvcomp-cu13",
)  # fmt: skip
PYTHON = "3.12"
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)), "manylinux2014_x86_64",
    "manylinux1_x86_64",
)  # fmt: skip
TRANSFER = 60 << 20
"""Bytes of one transfer."""
# Compiled when imported: most of it never is.
INSTALL = ("install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target")


def pinned(names: tuple[str, ...]) -> list[str]:
    """Return `name==version` of each, as constraints.txt has it.

    Raises ValueError for a name that it does not pin.
    """
    versions = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if match := re.match(r"([\w.-]+)==(\S+)", line):
            versions[match[1].lower().replace("_", "-")] = match[2]
    missing = [name for name in names if name not in versions]
    if missing:
        raise ValueError(f"constraints.txt: {', '.join(missing)} not pinned")
    return [f"{name}=={versions[name]}" for name in names]


def fetch() -> None:
    """Fill .gpu-wheels with the wheels and commit.json."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    _download(pinned(BINARY), FOLDER)
    # Published as source only; the wheel is pure Python.
    _pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(FOLDER), *pinned(FROM_SOURCE))
    impure = [w.name for w in FOLDER.glob("deepspeed*") if not w.name.endswith("py3-none-any.whl")]
    if impure:
        raise ValueError(f"{impure[0]}: built for this machine only; is DS_BUILD_OPS set?")
    (ROOT / COMMIT).write_text(json.dumps(provenance(), indent=1) + "\n")


def fetch_dali() -> None:
    """Fill .gpu-dali with parts of a tar archive of DALI's wheels, and write dali.json."""
    size = TRANSFER - _bytes_of_tree() - sum(f.stat().st_size for f in FOLDER.iterdir())
    if size < 1 << 20:
        raise ValueError(f"{FOLDER} and the tree leave {size} of {TRANSFER} bytes for a part")
    shutil.rmtree(DALI, ignore_errors=True)
    DALI.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        _download(pinned(OF_DALI), Path(folder))
        whole = Path(folder) / "dali.tar"
        with tarfile.open(whole, "w") as archive:
            for wheel in sorted(Path(folder).glob("*.whl")):
                archive.add(wheel, wheel.name)
        PARTS.write_text(json.dumps(_cut(whole, DALI, size), indent=1) + "\n")


def _cut(whole: Path, folder: Path, size: int) -> dict[str, Any]:
    """Write `whole` into `folder` in parts of `size` bytes; return their names and all digests."""
    count, parts = -(-whole.stat().st_size // size), {}
    with whole.open("rb") as file:
        for number in range(1, count + 1):
            data = file.read(size)
            name = f"part-{number}-of-{count}"
            (folder / name).write_bytes(data)
            parts[name] = hashlib.sha256(data).hexdigest()
    return {"sha256": _sha256([folder / name for name in parts]), "parts": parts}


def join(parts: Path, kept: Path, site: Path) -> list[str]:
    """Keep the parts that came, check them, and with the last of them install the wheels in `site`.

    parts: the folder that travels, kept: one that outlives the call. Returns the names of the parts
    that are still to come. Raises ValueError for a part or a whole that is not what was cut.
    """
    cut = json.loads(PARTS.read_text())
    kept.mkdir(parents=True, exist_ok=True)
    for name, digest in cut["parts"].items():
        if (parts / name).is_file():
            if _sha256([parts / name]) != digest:
                raise ValueError(f"{parts / name}: not the part that was cut; carry it again")
            shutil.copy(parts / name, kept / name)
    missing = [name for name in cut["parts"] if not (kept / name).is_file()]
    if missing:
        return missing
    names = [kept / name for name in cut["parts"]]
    if _sha256(names) != cut["sha256"]:
        raise ValueError(f"{kept}: together the parts are not what was cut; carry them again")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "dali.tar"
        with whole.open("wb") as file:
            for name in names:
                file.write(name.read_bytes())
        with tarfile.open(whole) as archive:
            archive.extractall(folder, filter="data")
        _pip(*INSTALL, str(site), *map(str, sorted(Path(folder).glob("*.whl"))))
    return []


def _sha256(files: list[Path]) -> str:
    sha = hashlib.sha256()
    for file in files:
        sha.update(file.read_bytes())
    return sha.hexdigest()


def _download(packages: list[str], folder: Path) -> None:
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    _pip(
        "download", "--quiet", "--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}",
        "--implementation=cp", *platforms, "--dest", str(folder), *packages,
    )  # fmt: skip


def _pip(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True
    )


def _bytes_of_tree() -> int:
    """Bytes of the files that travel: those that git has, and those it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
        capture_output=True, check=True,
    ).stdout.split(b"\0")  # fmt: skip
    files = {ROOT / name.decode() for name in listed if name}
    return sum(f.stat().st_size for f in files if f.is_file())


def options() -> argparse.ArgumentParser:
    parser = command_line("gpu_suite.wheels", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch").add_argument("--dali", action="store_true")
    joining = commands.add_parser("join")
    joining.add_argument("site", type=Path, metavar="SITE", help="folder of the other wheels")
    joining.add_argument(
        "--parts", type=Path, default=Path(tempfile.gettempdir()) / "fastrepa-dali",
        help="keeps the parts between calls",
    )  # fmt: skip
    return parser


def main(arguments: list[str] | None = None) -> int:
    given = options().parse_args(arguments)
    if given.command == "join":
        missing = join(DALI, given.parts, given.site)
        print(f"DALI: {', '.join(missing)} still to come" if missing else "DALI: installed")
        return 0
    fetch()
    if given.dali:
        fetch_dali()
    for path in sorted([*FOLDER.iterdir(), *(DALI.iterdir() if given.dali else ())]):
        print(f"{path.stat().st_size:>10,}  {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
