"""Every key of the configuration is told about: by its description, on a page, in a schema."""

import re
import subprocess
import sys
from pathlib import Path

import fastjsonschema
import pytest
from pydantic import BaseModel

from fastrepa.config import Config, EncoderConfig, config_from_dict, load_config, save_config
from fastrepa.config.keys import all_keys, find_keys, schema
from fastrepa.data.datasets import with_classes
from fastrepa.errors import ConfigError, DataError
from fastrepa.reading.text import read_yaml
from fastrepa.vision.features import plan_encoder
from fastrepa.vision.registry import REGISTRY
from tests.command_line import run
from tests.runs import ROOT


def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
    """The model and all that are in it."""
    found = {model}
    for field in model.model_fields.values():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= sections(kind)
    return found


@pytest.mark.parametrize("section", sorted(sections(Config), key=str), ids=lambda s: s.__name__)
def test_every_key_has_a_description(section):
    assert section.__doc__ and section.__doc__.strip()
    for name, field in section.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        assert field.description or is_section, (
            f"{section.__name__}.{name}: give it Field(..., description=...): what it is, its unit,"
            f" and what null, 0 or auto mean"
        )


def test_the_page_and_the_schema_are_up_to_date():
    """Make them anew by `fastrepa config --markdown > docs/configuration.md` and
    `fastrepa config --schema > configs/schema.json`.
    """
    assert run("config", "--markdown") == (ROOT / "docs/configuration.md").read_text()
    assert run("config", "--schema") == (ROOT / "configs/schema.json").read_text()


RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
SMALL = {"run": "r", "data": {"path": "d"}, "model": {"name": "SiT-B/2"}}
SHAPE = {"width": 48, "depth": 3, "heads": 3, "patch": 2}


@pytest.fixture(scope="module")
def check():
    return fastjsonschema.compile(schema())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_editors_take_the_recipes_and_find_the_schema(recipe, check):
    check(read_yaml(recipe, ConfigError))
    first = recipe.read_text().splitlines()[0]
    named = first.removeprefix("# yaml-language-server: $schema=")
    assert (recipe.parent / named).samefile(ROOT / "configs/schema.json")


@pytest.mark.parametrize(
    "more",
    [
        {"model": SHAPE}, {"model": {**SHAPE, "name": None, "num_classes": 3}},
        {"model": {"name": "SiT-XL/8", "width": None}}, {"alignment": {}},
        {"training": {"ema": 0.5}}, {"training": {"ema": {"sigma_rel": 0.1}}},
        {"training": {"ema": [0.5, {"sigma_rel": 0.1}]}}, {"alignment": {"block": 3}},
        {"training": {"recompute": "auto"}},
        {"training": {"recompute": 2, "optimizer": {"betas": [0, 0.5]}}},
        {"training": {"keep_best": {"metric": "loss"}, "micro_batch": None}},
        {"zero": {"overlap_comm": True, "stage": 3, "prefetch_bucket_size": 0}},
        {"vision": {"encoders": [{"name": "x"}]}, "evaluation": {"metrics": ["fid"]}},
    ],
)  # fmt: skip
def test_what_the_engine_takes_editors_take(more, check):
    config_from_dict({**SMALL, **more})
    check({**SMALL, **more})


@pytest.mark.parametrize(
    "more",
    [
        {"trainin": {}}, {"run": None}, {"model": {"name": "SiT-B/3"}}, {"model": {"width": 48}},
        {"training": {"stepz": 1}}, {"training": {"steps": 0}}, {"training": {"ema": 1.0}},
        {"training": {"ema": []}}, {"training": {"ema": [{"sigma": 0.1}]}},
        {"training": {"optimizer": {"betas": [0.5]}}}, {"training": {"recompute": "some"}},
        {"zero": {"overlap_comm": 1}}, {"zero": {"stage": 4}}, {"seed": -1}, {"data": {}},
        {"vision": {"encoders": [{"name": "x", "grid": "cubic"}]}}, {"alignment": {"block": 0}},
    ],
)  # fmt: skip
def test_what_the_engine_refuses_editors_refuse(more, check):
    with pytest.raises(ConfigError):
        config_from_dict({**SMALL, **more})
    with pytest.raises(fastjsonschema.JsonSchemaException):
        check({**SMALL, **more})


def test_a_key_is_told_about_in_words():
    said = {key.path: (key.default or key.without, key.allowed) for key in all_keys()}
    assert said["training.clip"] == ("1.0", "a number from 0")
    assert said["training.steps"] == ("400000", "a whole number from 1")
    assert said["sample.sampler"] == ("ode", "ode, heun or sde")
    assert said["run"] == ("required", "text")
    assert said["model.width"] == ("from model.name", "a whole number from 1")
    assert said["training.recompute"] == ("none", "none, auto or a whole number from 1")
    assert said["training.micro_batch"] == ("null", "null or a whole number from 1")
    assert said["training.optimizer.betas"] == ("[0.9, 0.999]", "a list of 2: a number from 0 to 1")
    assert said["training.ema.0.decay"] == ("null", "null or a number from 0 below 1")
    assert said["vision.encoders"] == ("[]", "a list of sections")


def test_keys_are_found_by_path_and_section():
    for path, found in (
        ("training.clip", ["training.clip"]),
        ("vision.encoders.3.grid", ["vision.encoders.0.grid"]),
        ("training.optimizer.betas.1", ["training.optimizer.betas"]),
        ("training.keep_best", [f"training.keep_best{end}" for end in ("", ".metric", ".mode")]),
    ):
        assert [key.path for key in find_keys(path)] == found
    assert len(find_keys("training")) > 25
    for wrong, hint in (
        ("training.stepz", "did you mean 'training.steps'"),
        ("lr", "did you mean 'training.optimizer.lr'"),
        ("weights", "did you mean 'data.codec.weights' or 'vision.encoders.0.weights' or"),
        ("qqq", "'qqq': no key of the configuration; `fastrepa config` lists them"),
    ):
        with pytest.raises(ConfigError, match=re.escape(hint)):
            find_keys(wrong)


def test_config_prints_keys_within_80_columns():
    everything = run("config").splitlines()
    assert {line.partition(":")[0] for line in everything if line[0] != " "} == {
        key.path for key in all_keys()
    }
    assert max(map(len, everything)) <= 80
    assert run("config", "training.clip").splitlines() == [
        "training.clip: 1.0", "    gradient norm; 0: no clipping (a number from 0)",
    ]  # fmt: skip


def test_config_shows_what_differs_in_a_file_and_in_a_run(tmp_path):
    recipe = str(ROOT / "configs/quickstart.yaml")
    lines = run("config", recipe, "training.ema=[0.9, {sigma_rel: 0.1}]", "seed=4").splitlines()
    assert lines[0] == f"# {recipe}; * differs from the default"
    for line in (
        "  run: runs/quickstart", "* seed: 4  (default 0)", "  training.clip: 1.0",
        "* training.ema: [0.9, {sigma_rel: 0.1}]  (default [0.9999])",
        "* vision.encoders.0.input: 128  (default null)", "  model.width: 128",
    ):  # fmt: skip
        assert line in lines
    save_config(load_config(recipe), tmp_path / "config.yaml")
    (tmp_path / "checkpoints").mkdir()
    shown = run("config", tmp_path, "training.optimizer", "training.clip=2").splitlines()
    assert shown[0] == "training.optimizer.lr: 0.002  (default 0.0001)"
    assert f"  run: {tmp_path}" in run("config", tmp_path).splitlines()


def test_config_takes_a_recipe_beside_a_folder_of_its_name_and_auto_without_a_warning(
    tmp_path, monkeypatch, recwarn
):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()
    said = run("config", "quickstart", "model.num_classes=auto", "model.num_classes")
    assert said.startswith("model.num_classes: auto  (default 1000)")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=1"], "override 'seed=1': name the file or the run"),
        (["a/b.yaml", "c/d"], "one file or run at a time, not a/b.yaml and c/d"),
        (["a/b.yaml"], "a/b.yaml: no such configuration file"),
        (["tests/"], "tests: not a run folder"),
        (["configs/quickstart.yaml", "seed=x"], "seed: 'x' is not allowed"),
        (["configs/quickstart.yaml", "sede"], "'sede': no key .* .did you mean 'seed'"),
    ],
)  # fmt: skip
def test_what_config_refuses(words, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=message):
        run("config", *words)


def test_encoders_and_generators_are_listed_by_the_code_s_own_tables():
    listed = {
        line.split()[0]: line.split() for line in run("encoders").splitlines() if line.strip()
    }
    assert listed.keys() >= REGISTRY.keys()
    assert listed["dinov2-vit-b"][1:5] == ["224", "14", "768", "hub"]
    assert listed["mocov3-vit-s"][1:] == ["256", "16", "384", "by", "hand", "-"]
    for name in ("siglip-vit-so400m", "dinov3-vit-s"):  # as the network itself has it
        plan = plan_encoder(EncoderConfig(name=name), resolution=256)
        side, patch, width = map(int, listed[name][1:4])
        assert (plan.input_side, plan.own_grid, plan.width) == (side, (side // patch,) * 2, width)
    said = run("encoders", "mae-vit-l")
    assert "https://huggingface.co/timm/vit_large_patch16_224.mae/" in said
    rows = {
        line.split()[0]: line.split()[1:] for line in run("models").splitlines() if line.strip()
    }
    assert rows["SiT-XL/2"] == ["1152", "28", "16", "256", "8", "674.8", "M", "237.2"]
    for printed in (run("encoders"), run("models")):
        assert max(map(len, printed.splitlines())) <= 80


def test_help_and_config_import_no_torch():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from fastrepa.cli import app\n"
        "for words in (['--help'], ['train', '--help'], ['config'], ['config', sys.argv[1]]):\n"
        "    done = CliRunner().invoke(app, words)\n"
        "    assert done.exit_code == 0, done.output\n"
        "heavy = {'torch', 'timm', 'numpy', 'deepspeed', 'matplotlib'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, ROOT / "configs/quickstart.yaml"], check=True)


def test_auto_is_the_number_of_classes_of_the_set(tmp_path):
    recipe = ROOT / "configs/quickstart.yaml"
    data = f"data.path={ROOT / 'configs/quickstart/emoji/train'}"
    config = load_config(recipe, [data, "model.num_classes=auto"])
    assert with_classes(config) == load_config(recipe, [data, "model.num_classes=8"])
    assert with_classes(plain := load_config(recipe)) is plain
    config = load_config(recipe, [f"data.path={tmp_path}", "model.num_classes=auto"])
    with pytest.raises(DataError, match=r"is no data set: .*; without it model.num_classes cannot"):
        with_classes(config)
    plan = ["plan", recipe, data, "--gpus", "1", "--json"]
    assert run(*plan, "model.num_classes=auto") == run(*plan)
