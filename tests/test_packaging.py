"""The wheel and the sdist: what they hold, and what an environment that has only them can do."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path

import pytest

import fastrepa
from tests.runs import ROOT, SMALL, environment, metrics

pytestmark = pytest.mark.slow

SITE = Path(sysconfig.get_paths()["purelib"])
PARTS = ("engine", "kernels", "configs", "docs", "tests", "benchmarks")
# What a torch without Triton needs, at most.
TORCH = ("torch", "filelock", "typing-extensions", "sympy", "mpmath", "networkx", "jinja2",
         "markupsafe", "fsspec", "setuptools")  # fmt: skip


def ran(*command, code=0, cwd=None):
    """Return what a command printed, on both streams; it must end with `code`."""
    env = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the wheel and the sdist, of a copy: setuptools leaves its own files beside sources."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    for part in PARTS:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "records")
        shutil.copytree(ROOT / part, source / part, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, source)
    ran(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def installed(wheel, folder):
    """Return the bin folder of a new environment that has the wheel, and its site-packages."""
    venv.create(folder, symlinks=True)
    ran(
        sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--no-index",
        "--no-deps", "--quiet", "--disable-pip-version-check", wheel,
    )  # fmt: skip
    (site,) = folder.glob("lib/*/site-packages")
    return folder / "bin", site


def test_the_sdist_and_the_wheel_hold_what_they_should(built):
    wheel, sdist = built
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        meta = next(n for n in names if n.endswith("METADATA"))
        metadata = Parser().parsestr(file.read(meta).decode())
    with tarfile.open(sdist) as file:
        source = {name.partition("/")[2] for name in file.getnames()}
    kept = {file.relative_to(ROOT).as_posix() for file in (ROOT / "configs").rglob("*")
            if file.is_file() and "__pycache__" not in file.parts}  # fmt: skip
    assert kept <= source
    scripts = {"configs/quickstart/emoji.py"}  # which made the images
    assert {f"fastrepa/recipes/{n.removeprefix('configs/')}" for n in kept - scripts} <= names
    for part in ("engine/fastrepa/**/*", "kernels/fastrepa_kernels/**/*"):
        files = {file for file in ROOT.glob(part) if file.is_file() and file.suffix != ".pyc"}
        assert {file.relative_to(ROOT / part.split("/")[0]).as_posix() for file in files} <= names
    assert {"docs/cluster.md", "tests/runs.py", "tests/conftest.py", "Makefile"} <= source
    assert not [n for n in names | source if n.endswith(".pyc")]

    links = dict(text.split(", ") for text in metadata.get_all("Project-URL"))
    assert {"Homepage", "Documentation", "Issues"} <= set(links)
    assert metadata["Author"] and metadata["Maintainer"]
    assert metadata["Version"] == fastrepa.__version__
    page = metadata.get_payload()
    targets = re.findall(r"\]\(([^)\s]+)|(?:src|srcset|href)=\"([^\"]+)", page)
    targets = [a or b for a, b in targets if not (a or b).startswith("#")]
    assert targets and all(target.startswith("https://") for target in targets)
    home = links["Homepage"].replace("github.com", "raw.githubusercontent.com")
    assert f"({home}/main/docs/quickstart_samples.png)" in page


def test_the_kernels_alone_need_torch_and_nothing_else(built, tmp_path):
    python, site = installed(built[0], tmp_path / "env")
    for name in TORCH:
        for top in {file.parts[0] for file in distribution(name).files if ".." not in file.parts}:
            if top != "__pycache__" and not (site / top).exists():
                (site / top).symlink_to(SITE / top)
    if (SITE / "nvidia").exists():  # the libraries of a torch for CUDA
        (site / "nvidia").symlink_to(SITE / "nvidia")
    program = (
        "import importlib.util, sys, torch, fastrepa, fastrepa_kernels\n"
        "x = torch.randn(2, 3, 8, requires_grad=True)\n"
        "fastrepa_kernels.layernorm_modulate(x, x[:, 0], x[:, 1]).sum().backward()\n"
        "assert not [n for n in ('triton', 'typer', 'yaml') if importlib.util.find_spec(n)]\n"
        "assert 'site-packages/fastrepa_kernels' in fastrepa_kernels.__file__"
    )
    ran(python / "python", "-c", program, cwd=tmp_path)
    for command in ([python / "fastrepa"], [python / "python", "-m", "fastrepa", "train", "x"]):
        said = ran(*command, code=1, cwd=tmp_path)
        assert re.fullmatch(
            r"fastrepa: error: fastrepa's commands need more: pip install 'fastrepa\[train\]' "
            r"\(no \w+ here\)\n", said,
        )  # fmt: skip


def test_the_engine_runs_a_recipe_by_its_name_in_any_folder(built, tmp_path):
    python, site = installed(built[0], tmp_path / "env")
    # Its own .pth files, which would bring this checkout, are not read there.
    (site / "shared.pth").write_text(f"{SITE}\n")
    work = tmp_path / "elsewhere"
    work.mkdir()
    said = ran(python / "fastrepa", "recipes", cwd=work)
    for recipe in ROOT.glob("configs/*.yaml"):
        assert recipe.stem in said
    assert str(site / "fastrepa/recipes") in said.replace("\n", "")
    small = [*SMALL[1:], "training.steps=2"]
    ran(python / "fastrepa", "train", "quickstart", *small, cwd=work)
    assert metrics(work / "runs/quickstart")[-1]["step"] == 2
    config = (work / "runs/quickstart/config.yaml").read_text()
    assert f"path: {site}/fastrepa/recipes/quickstart/emoji/train" in config.replace("\n    ", " ")
