"""The Python of the pages about runs, as written, in the order of a page and in one process.

They run in a folder that has what `make quickstart` leaves, in small: a recipe of a few thousand
parameters, and a run of it.
"""

import re

import pytest

from fastrepa.config import load_config, save_config
from fastrepa.reading.text import read_json
from tests.command_line import kept_world
from tests.end_to_end.snippets import OF_A_RUN, PAGES, snippets
from tests.runs import ROOT, SMALL, train

ENCODER = "vision.encoders.0.input=64"
SIZE = ["data.resolution=64", "data.codec={name: pixel, side: 16}", ENCODER]


@pytest.fixture(scope="module")
def studio(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("studio")
    (folder / "configs").mkdir()
    (folder / "configs/quickstart").symlink_to(ROOT / "configs/quickstart")
    recipe = load_config(ROOT / "configs/quickstart.yaml", [*SMALL, *SIZE, "training.steps=4"])
    save_config(recipe, folder / "configs/quickstart.yaml")
    train(folder / "runs/quickstart", *SIZE, "training.steps=4")
    return folder


def run_in(folder, pieces, monkeypatch):
    monkeypatch.chdir(folder)
    names = {"__name__": "__main__"}
    with kept_world():
        for where, text in pieces:
            exec(compile(text, where, "exec"), names)
    return names


@pytest.mark.parametrize("page", [p for p in PAGES if p.name in OF_A_RUN], ids=lambda p: p.stem)
def test_a_page(studio, page, monkeypatch):
    pieces = [
        (str(s), s.text) for s in snippets() if s.page == page and s.language == "python"
    ]  # fmt: skip
    assert pieces
    run_in(studio, pieces, monkeypatch)


def test_the_tour(studio, monkeypatch):
    notebook = read_json(ROOT / "docs/tour.ipynb")
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    pieces = [(cell["id"], "".join(cell["source"])) for cell in cells]
    names = run_in(studio, pieces, monkeypatch)
    assert len(names["lines"]) >= 5
    prose = "".join(line for cell in notebook["cells"] for line in cell["source"])
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        assert (ROOT / "docs" / target).is_file(), target
