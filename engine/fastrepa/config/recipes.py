"""The recipes that come with fastrepa, and the quickstart's images: the repository's configs/.

An installed package holds them as its folder `recipes`, so that a recipe runs by its name in any
folder.
"""

from __future__ import annotations

import re
from pathlib import Path

# A path into what is shipped: as recipes write it, or as of an install that is elsewhere now.
_SHIPPED = re.compile(r"(?:.*/)?(?:configs|fastrepa/recipes)/(quickstart/.+)")


def recipes_folder() -> Path:
    """Return the folder of the recipes, with cluster/ (launch files) and quickstart/ (images)."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "configs"


def recipe_names() -> list[str]:
    """Return what the recipes are called on the command line."""
    return sorted(file.stem for file in recipes_folder().glob("*.yaml"))


def recipe_file(name: str) -> Path | None:
    """Return the file of a recipe; None where none has that name."""
    return recipes_folder() / f"{name}.yaml" if name in recipe_names() else None


def about(name: str) -> str:
    """Return the first sentence of a recipe's own words on itself."""
    lines = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    words: list[str] = []
    for line in lines:
        if not line.startswith("# ") or "$schema" in line:
            if words:
                break
            continue
        words.append(line[2:].strip())
    return re.split(r"\.(?:\s|$)", " ".join(words), maxsplit=1)[0]


def of_the_install(path: str) -> str:
    """Return where data that come with fastrepa are, for a path of theirs at which nothing is; any
    other path as it is.
    """
    shipped = _SHIPPED.fullmatch(path)
    here = recipes_folder() / shipped[1] if shipped else None
    return str(here) if here is not None and here.exists() else path
