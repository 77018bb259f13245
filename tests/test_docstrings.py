"""Docstrings: what is done to a tensor has its shape, and the first words are about the thing."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHAPE = re.compile(r"(?<!\w)\[[\w ,.*+/'()-]*\]")  # [B, T, D], [2C,S,S], [...], []
FRAGMENTS = ("What", "Whether", "Of", "How", "By", "Those")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def trees(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def public(owner: ast.Module | ast.ClassDef) -> Iterator[tuple[str, str, ast.FunctionDef]]:
    """Yield (its docstring, its class's, function) of every public function and method."""
    for node in owner.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            of_class = ast.get_docstring(owner) if isinstance(owner, ast.ClassDef) else None
            yield ast.get_docstring(node) or "", of_class or "", node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node)


def has_tensors(function: ast.FunctionDef) -> bool:
    hints = [hint for hint in (function.args, function.returns) if hint]
    nodes = [node for hint in hints for node in ast.walk(hint)]
    return any(isinstance(node, ast.Name) and node.id == "Tensor" for node in nodes)


def test_functions_of_tensors_say_their_shapes():
    """A forward, or what has no docstring, may leave it to its class or a namesake's docstring."""
    functions = [(path, *f) for path, tree in trees("engine", "kernels") for f in public(tree)]
    shaped = {f.name for _, own, _, f in functions if SHAPE.search(own)}
    missing = [
        f"{path}:{f.lineno} {f.name}"
        for path, own, of_class, f in functions
        if has_tensors(f)
        if not SHAPE.search(own + of_class if not own or f.name == "forward" else own)
        if own or f.name not in shaped
    ]
    assert not missing


def test_a_docstring_begins_with_its_subject_or_an_imperative():
    begun = [
        f"{path}:{getattr(node, 'lineno', 1)}: {text}"
        for path, tree in trees("engine", "kernels", "benchmarks", "tests", "configs")
        for node in ast.walk(tree)
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node))
        if re.split(r"\W", text, maxsplit=1)[0] in FRAGMENTS
    ]
    assert not begun
