"""The table of mutations fits the tree, and its runner tells a test that notices from one that does
not.
"""

import io

import pytest
from rich.console import Console

from tests.mutations import MUTATIONS, ROOT, Mutation, run

TESTS = {
    "test_sum.py": "from code_under_test import add\n\ndef test():\n    assert add(2, 2) == 4\n",
    "test_wrong.py": "def test_wrong():\n    assert False\n",
}
CODE = "def add(a, b):\n    return a + b\n"
NOTICED = Mutation("minus", "engine/code_under_test.py", "a + b", "a - b", "tests/test_sum.py")
MISSED = Mutation("times", "engine/code_under_test.py", "a + b", "a * b", "tests/test_sum.py")
BROKEN = Mutation("syntax", "engine/code_under_test.py", "a + b", "a +", "tests/test_sum.py")
ABSENT = Mutation("absent", "engine/code_under_test.py", "a / b", "a", "tests/test_sum.py")
TWICE = Mutation("twice", "engine/code_under_test.py", "a", "b", "tests/test_sum.py")
NO_TEST = Mutation("no test", "engine/code_under_test.py", "a + b", "a", "tests/test_none.py")
FAILING = Mutation("failing", "engine/code_under_test.py", "a + b", "a", "tests/test_wrong.py")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_every_row_fits_the_tree(mutation):
    assert mutation.problem(ROOT) == ""
    assert mutation.new != mutation.old


def test_names_are_unique():
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)


@pytest.fixture
def tree(tmp_path):
    for folder in ("engine", "kernels", "tests"):
        (tmp_path / "tree" / folder).mkdir(parents=True)
    (tmp_path / "tree/engine/code_under_test.py").write_text(CODE)
    for name, text in TESTS.items():
        (tmp_path / "tree/tests" / name).write_text(text)
    return tmp_path / "tree"


@pytest.mark.parametrize(
    ("mutations", "status", "words"),
    [
        ([NOTICED], 0, "1 mutations, 0 survived"),
        ([NOTICED, MISSED], 1, "2 mutations, 1 survived"),
        ([BROKEN], 1, "exit status 2"),  # a test that cannot start has noticed nothing
        ([NOTICED, ABSENT], 2, "absent: 'a / b' stands in engine/code_under_test.py 0 times"),
        ([TWICE], 2, "'a' stands in engine/code_under_test.py 3 times, not once"),
        ([NO_TEST], 2, "no test: tests/test_none.py is not there"),
        ([FAILING], 2, "tests/test_wrong.py fails without a mutation"),
    ],
    ids=["noticed", "missed", "broken", "absent", "twice", "no test", "failing"],
)
def test_what_the_runner_makes_of_it(tree, mutations, status, words):
    out = io.StringIO()
    assert run(tree, mutations, 2, Console(file=out, width=300)) == status
    assert words in out.getvalue()
    assert (tree / "engine/code_under_test.py").read_text() == CODE
