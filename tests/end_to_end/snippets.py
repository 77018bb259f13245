"""The fenced commands and Python snippets that README and docs tell people to type, and names."""

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.runs import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_A_RUN = ("python.md", "extending.md")  # whose Python wants a run: test_python_pages.py
SHELL = ("", "bash", "sh", "shell", "console")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a page: its words, and what variables it is given."""

    where: str
    words: tuple[str, ...]
    variables: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join((*self.variables, *self.words))


def snippets() -> list[Snippet]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in _FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 2
            found.append(Snippet(page, line, match[1], match[2]))
    return found


def commands() -> list[Command]:
    """List them in the order of the pages; what is there twice comes once."""
    found: dict[str, Command] = {}
    for snippet in snippets():
        if snippet.language not in SHELL:
            continue
        line = snippet.line
        for text in snippet.text.replace("\\\n", "\0").splitlines():
            words = shlex.split(text.replace("\0", " "), comments=True)
            here = f"{snippet.page.relative_to(ROOT)}:{line}"
            line += 1 + text.count("\0")
            count = next((i for i, w in enumerate(words) if not re.match(r"[A-Z_]+=", w)), 0)
            if words:
                command = Command(here, tuple(words[count:]), tuple(words[:count]))
                found.setdefault(str(command), command)
    return list(found.values())


def anchors(page: Path) -> set[str]:
    """Return the anchors of its headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def defined(file: Path) -> set[str]:
    """Functions, classes and constants of a module, and methods as `Class.name`."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            methods = (inner.name for inner in node.body if isinstance(inner, ast.FunctionDef))
            names |= {node.name, *(f"{node.name}.{method}" for method in methods)}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names
