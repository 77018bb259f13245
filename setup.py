"""What pyproject.toml cannot say: that configs/ is a part of the package, and README for PyPI."""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
HOME = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Homepage"]
PICTURES = (".png", ".svg", ".jpg", ".gif")


def readme() -> str:
    """Return README with the whole addresses of what it shows and links to."""

    def whole(match: re.Match[str]) -> str:
        before, path = match.groups()
        raw = HOME.replace("//github.com", "//raw.githubusercontent.com") + "/main"
        return f"{before}{raw if path.endswith(PICTURES) else f'{HOME}/blob/main'}/{path}"

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"""(\]\(|(?:src|srcset|href)=")(?![a-z]+:|#|//)([^)"\s]+)""", whole, text)


setup(
    packages=[*find_packages("engine"), *find_packages("kernels"), "fastrepa.recipes"],
    package_dir={
        "fastrepa": "engine/fastrepa",
        "fastrepa_kernels": "kernels/fastrepa_kernels",
        "fastrepa.recipes": "configs",
    },
    long_description=readme(),
    long_description_content_type="text/markdown",
)
