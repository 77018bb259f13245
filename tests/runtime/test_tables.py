"""Every table reads at 60 and 80 columns: no number and no name of it is cut short."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fastrepa.commands.bench.report import print_bench
from fastrepa.commands.probe.report import print_data_probe, print_run_probe
from fastrepa.config import SIT_MODELS
from fastrepa.data.format.shards import ShardSet
from fastrepa.runtime.terminal import Terminal, print_table
from fastrepa.vision.registry import REGISTRY
from tests.command_line import run
from tests.runs import ROOT

NAMES = ("dinov2-vit-b", "a_timm_name_of_forty_characters.in12k_ft", "fastrepa::adaln_linear", "")
NUMBERS = ("16x16x768", "0.123", "1,234,567", "12.5 .. 13.75", "87.5%", "-", "3 TFLOP/s", "0.001")
HEADINGS = ("mean share", "LDS", "images/s", "p20 .. p80", "of peak", "cosine", "rate", "a device")


def shown(width: int, show: Callable[[Terminal], object]) -> str:
    console = Terminal(width=width, file=io.StringIO())
    show(console)
    said: str = console.file.getvalue()  # type: ignore[attr-defined]
    return said


def letters(text: str) -> str:
    """Return a text without blanks and frames, between which names may be folded."""
    return re.sub(r"[\s─━┃│]", "", text)


@pytest.mark.parametrize("width", [36, 60, 80, 200])
@pytest.mark.parametrize("columns", [1, 3, 8])
def test_no_number_and_no_name_is_cut_short(width: int, columns: int) -> None:
    table = Table("features", title="a title", box=SIMPLE_HEAD)
    for heading in HEADINGS[:columns]:
        table.add_column(heading, justify="right", no_wrap=columns == 3)
    table.add_column("what it is", no_wrap=True, overflow="ellipsis", max_width=5)
    for number, name in enumerate(NAMES):
        if number == 2:
            table.add_section()
        cell = Text(name, "bold") if number % 2 else name
        table.add_row(cell, *NUMBERS[:columns], "words of some length")
    said = shown(width, lambda console: print_table(console, table))
    assert "…" not in said and "a title" in said
    assert max(map(len, said.splitlines())) <= width
    lines = said.splitlines()
    for number in NUMBERS[:columns]:
        assert sum(number in line for line in lines) >= len(NAMES), number
    if width < 200:
        assert "words of some length" in said or columns < 8
    else:  # a table: a row is a line
        assert all(any(name in line and NUMBERS[0] in line for line in lines) for name in NAMES)
    if columns == 8 and width < 200:  # a list
        assert all(name in letters(said) for name in NAMES)
        assert "mean share 16x16x768" in said


@pytest.mark.parametrize("width", [60, 80])
def test_what_probe_prints(width: int) -> None:
    def measured(name: str) -> SimpleNamespace:
        accuracy = SimpleNamespace(linear=0.912, neighbours=0.834, layout=0.756)
        return SimpleNamespace(
            name=name, grid=16, width=768, lds=0.321, rmsc=0.543, rank=123.4, mean_share=0.11,
            mean_cosine=0.22, separability=accuracy,
        )  # fmt: skip

    encoders = [
        SimpleNamespace(features=measured(name), random=measured("r"), pixels=measured("p"),
                        images_per_second=1234.0, cache_bytes=197124, verdict="helps", why="so",
                        gains={}, duplicates=0)
        for name in NAMES[:2]
    ]  # fmt: skip
    sample = SimpleNamespace(names=["x"] * 9, resolution=64, classes=["a", "b"], labels=1,
                             no_labels="")  # fmt: skip
    found: Any = SimpleNamespace(data="set", device="cpu", said=[], sample=sample, missing=[],
                                 encoders=encoders, duplicates=[])  # fmt: skip
    said = shown(width, lambda console: print_data_probe(found, console))
    assert "…" not in said
    table = said[: said.index("helps")]
    for whole in ("1. dinov2-vit-b", f"2. {NAMES[1]}", "random weights", "raw pixels"):
        assert whole in table
    for number in ("16x16x768", "0.321", "0.543", "0.912", "0.834", "0.756", "123", "0.11"):
        assert table.count(number) >= 4
    assert table.count("1,234") == table.count("197,124") == 2

    values = np.linspace(0.1, 0.9, 24).reshape(3, 8)
    of_run: Any = SimpleNamespace(
        encoders=["dinov2-vit-b"], said=[], held_out=500, cknna=values[None], cka=values[None],
        accuracy=values, encoder_accuracy=[0.5], chance=0.1, block=2, time=0.5, fitted=9,
        steps=[100_000 * i for i in range(8)],
    )  # fmt: skip
    said = shown(width, lambda console: print_run_probe(of_run, console))
    assert "…" not in said and "2 (aligned)" in said
    assert all(said.count(f"{value:.3f}") >= 3 for value in values.flat)
    assert all(f"{step:,}" in said for step in of_run.steps)


@pytest.mark.parametrize("width", [60, 80])
def test_what_bench_prints(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    results: Any = [
        SimpleNamespace(
            case=SimpleNamespace(contender=name, group=1, sampler=None, precision="bf16", batch=32,
                                 ranks=1),
            problem="", unfinished="", failed=False, line="", median=1234.5, images_per_s=4321.0,
            milliseconds=lambda p: 1200 + 100 * p, above_weights=12.34e9,
            seconds=[1.2] * 9,
        )
        for name in ("ours", "ours+recompute", "plain+compile")
    ]  # fmt: skip
    print_bench(results, tmp_path)
    said = capsys.readouterr().out
    assert "…" not in said
    for whole in ("ours+recompute", "plain+compile", "4321", "1220 .. 1280", "12.3", "1.00x"):
        assert whole in said


@pytest.mark.parametrize("width", [60, 80])
def test_what_commands_print(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_set: Callable[..., ShardSet],
    tree: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", str(width))
    folder = make_set().path
    said = run("data", "verify", folder)
    assert "files" in said and "34" in said
    said += run("data", "show", folder, "--out", tmp_path)
    assert letters(str(folder)) in letters(said)
    said += run("prepare", tree, tmp_path / "more", "--resolution", 16, "--workers", 0)
    assert "34 images of 3 classes" in said
    models = run("models")
    assert all(re.search(rf"{name}/2\s", models) for name in SIT_MODELS) and "130.3 M" in models
    encoders = run("encoders")
    assert all(name in encoders for name in REGISTRY)
    plan = run("plan", ROOT / "configs/imagenet256_sit_b2_dinov2b.yaml", "--gpus", "8,64,256")
    for whole in (
        "activations",
        "GPU-hours",
        "--gpus-per-node",
        "ZeRO 1, 1 x 32",
        "H100 SXM 80 GB",
    ):
        assert whole in plan
    assert "…" not in said + models + encoders + plan


def test_every_table_is_printed_so() -> None:
    for file in (ROOT / "engine/fastrepa").rglob("*.py"):
        text = file.read_text()
        if re.search(r"^from rich\.table import", text, re.MULTILINE) and "doctor" not in str(file):
            assert "print_table(" in text and not re.search(r"\.print\((table|_\w+\(\w+\))\)", text)
