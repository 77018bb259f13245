"""Help of every command: readable at any width, with an example that can be typed."""

import io
import re
import shlex
import subprocess
import sys
from inspect import cleandoc

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from fastrepa.cli import app
from fastrepa.cli.app import loading
from fastrepa.cli.help import EXAMPLES, PANELS
from fastrepa.config import load_config
from tests.command_line import run

ROOT = get_command(app)


def commands(group=ROOT, before=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*before, name))
        else:
            yield (*before, name), command


ALL = dict(commands())
each_command = pytest.mark.parametrize("words", ALL, ids=" ".join)


def shown(words, width, monkeypatch):
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", width)
    return run(*words, "--help")


@each_command
@pytest.mark.parametrize("width", [80, 130])
def test_help_is_as_wide_as_the_terminal(words, width, monkeypatch):
    lines = [line.rstrip() for line in shown(words, width, monkeypatch).splitlines()]
    assert max(map(len, lines)) <= width
    prose = [line[1:] for line in lines[: lines.index(next(x for x in lines if x[:1] == "╭"))]]
    paragraphs = "\n".join(prose).split("\n\n")[2:]
    for paragraph in paragraphs:  # no line ends before the next one's first word would not fit
        for line, below in zip(rows := paragraph.strip().splitlines(), rows[1:], strict=False):
            assert len(line) + 1 + len(below.split()[0]) > width - 2, line


@each_command
def test_help_says_all_that_the_code_says(words, monkeypatch):
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", shown(words, 400, monkeypatch)).split())
    command = ALL[words]
    assert " ".join(cleandoc(command.callback.__doc__).split()) in said
    for parameter in command.params:
        assert parameter.help.replace("\\[", "[") in said, parameter.name
    assert "<bool>" not in said
    assert f"Example: {EXAMPLES[words[-1]]}" in said


def test_the_input_of_an_encoder_is_not_taken_for_markup(monkeypatch):
    for words in (["probe"], ["evaluate"], ["prepare"], ["data", "encode"]):
        assert "NAME[=WEIGHTS][@INPUT]" in shown(words, 200, monkeypatch)


@each_command
def test_the_example_can_be_typed(words):
    typed = shlex.split(EXAMPLES[words[-1]])
    assert typed[: len(words) + 1] == ["fastrepa", *words]
    given = ALL[words].make_context(words[-1], typed[len(words) + 1 :]).params
    if given.get("config"):
        load_config(given["config"], given["overrides"] or [])


def test_the_groups_hold_options_that_there_are():
    assert EXAMPLES.keys() == {words[-1] for words in ALL}
    for name, panels in PANELS.items():
        own = {parameter.name for parameter in ROOT.commands[name].params}
        grouped = [option for options in panels.values() for option in options]
        assert len(grouped) == len(set(grouped)) and own >= set(grouped), name


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("fastrepa tr", "train"),
        ("fastrepa train qui", "quickstart"),
        ("fastrepa train quickstart training.optimizer.l", "training.optimizer.lr="),
        ("fastrepa sample runs/a data.codec.s", "data.codec.side="),
        ("fastrepa config sample.gu", "sample.guidance_low\nsample.guidance_high"),
    ],
)
def test_the_shell_completes(typed, completed):
    words = typed.split()
    told = {
        "_FASTREPA_COMPLETE": "complete_bash", "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
    }  # fmt: skip
    done = CliRunner().invoke(app, [], env=told, prog_name="fastrepa")
    assert done.output.strip() == completed


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "nowhere", "."], ["evaluate", ".", "nowhere"], ["probe", "nowhere"],
        ["convert", "nowhere", "a.pt", "--to", "reference"],
        ["convert", "run", "nowhere", "--from", "zero"], ["data", "encode", "nowhere"],
        ["sample", "nowhere"], ["train", "nowhere"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_is_not_there_is_refused_before_torch_is_loaded(words, tmp_path):
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from fastrepa.cli import app\n"
        "error = CliRunner().invoke(app, sys.argv[1:]).exception\n"
        "assert str(error).startswith('nowhere: '), error\n"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, *words], check=True, cwd=tmp_path)


def test_a_terminal_is_told_of_loading_and_nothing_stays(monkeypatch):
    told = io.StringIO()
    monkeypatch.setattr("sys.stderr", told)
    with loading():
        pass
    assert told.getvalue() == ""  # no terminal
    monkeypatch.setattr(told, "isatty", lambda: True, raising=False)
    with loading():
        assert told.getvalue() == "loading ..."
    assert told.getvalue().endswith("\r\033[K")
