"""The configuration: what is filled in, what is refused, and in which words."""

# ruff: noqa: E501 - one refusal a line
from pathlib import Path

import pytest

from fastrepa.config import EmaConfig, config_from_dict, load_config, save_config
from fastrepa.errors import ConfigError
from tests.runs import ROOT

BASE = {"run": "r", "data": {"path": "shards"}, "model": {"name": "SiT-XL/2"}}
RECIPES = sorted(Path("configs").glob("*.yaml"))
EMOJI = ROOT / "configs/quickstart/emoji"


def edited(**sections):
    return {**BASE, **sections}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("SiT-S/8", (384, 12, 6, 8, 4)),
        ("SiT-B/2", (768, 12, 12, 2, 4)),
        ("SiT-L/4", (1024, 24, 16, 4, 8)),
        ("SiT-XL/2", (1152, 28, 16, 2, 8)),
    ],
)
def test_a_model_name_fills_in_its_shape_and_alignment_block(name, shape):
    c = config_from_dict(edited(model={"name": name}))
    m = c.model
    assert (m.width, m.depth, m.heads, m.patch, c.alignment.block) == shape


@pytest.mark.parametrize(("depth", "block"), [(1, 1), (2, 1), (6, 2), (8, 2), (12, 4), (28, 9)])
def test_another_depth_is_aligned_after_its_first_third(depth, block):
    shape = {"width": 64, "depth": depth, "heads": 2, "patch": 2}
    assert config_from_dict(edited(model=shape)).alignment.block == block


def test_the_paper_defaults():
    c = config_from_dict(BASE)
    t = c.training
    assert (t.global_batch, t.steps, t.ema, t.clip, t.checkpoint_every) == (
        256,
        400_000,
        (EmaConfig(decay=0.9999),),
        1.0,
        50_000,
    )
    o = t.optimizer
    assert (o.lr, o.betas, o.eps, o.weight_decay) == (1e-4, (0.9, 0.999), 1e-8, 0.0)
    assert (c.alignment.weight, c.alignment.projector_width, c.model.label_dropout) == (
        0.5,
        2048,
        0.1,
    )
    assert (c.objective.path, c.objective.time, c.seed) == ("linear", "uniform", 0)


def test_saved_is_read_back_equal(tmp_path):
    c = config_from_dict(edited(vision={"encoders": [{"name": "dinov2-vit-b"}]}))
    save_config(c, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == c


def test_overrides(tmp_path):
    save_config(
        config_from_dict(edited(vision={"encoders": [{"name": "dinov2-vit-b"}]})),
        tmp_path / "c.yaml",
    )
    c = load_config(
        tmp_path / "c.yaml",
        ["training.optimizer.lr=3e-4", "vision.encoders.0.name=mae-vit-l", "training.wandb=null",
         "training.optimizer.betas=[0.9, 0.95]", "zero.stage=3"],
    )  # fmt: skip
    assert (c.training.optimizer.lr, c.zero.stage) == (3e-4, 3)
    assert (c.vision.encoders[0].name, c.training.optimizer.betas) == ("mae-vit-l", (0.9, 0.95))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (edited(trainin={}), "trainin: unknown key .did you mean 'training'"),
        (edited(training={"stepz": 1}), "training.stepz: unknown key .did you mean 'steps'"),
        (edited(zero={"qqqq": 1}), "zero.qqqq: unknown key .known: .*, stage"),
        (edited(training={"steps": "many"}), "training.steps: 'many' is not allowed: .*integer"),
        (edited(training={"steps": True}), "training.steps: True is not allowed"),
        (edited(training={"steps": 0}), "training.steps: 0 is not allowed: .*greater than 0"),
        (edited(zero={"stage": 4}), "zero.stage: 4 is not allowed: .*0, 1, 2 or 3"),
        (edited(training={"ema": 1.0}), "training.ema.0.decay: 1.0 is not allowed: .*less than 1"),
        (edited(training={"ema": [0.9, 0.5, 0.9]}), "training.ema: 0.9 is there twice"),
        (edited(training={"ema": []}), "training.ema: a list of 1 to 4, got 0"),
        (edited(training={"ema": [{"sigma": 0.1}]}), "ema.0.sigma: unknown key .*'sigma_rel'"),
        (edited(training={"ema": {"sigma_rel": 0.5}}), "ema.0.sigma_rel: 0.5 is not allowed"),
        (edited(training={"ema": "most"}), "training.ema: 'most' is neither a decay nor"),
        (edited(training={"ema": {}}), "training.ema: give a decay such as 0.9999, or"),
        (edited(zero={"stage": 0, "offload": "cpu"}), "zero.offload: 'cpu' needs zero.stage 1, 2 or 3"),
        (edited(zero={"stage": 2, "offload": "nvme", "nvme_path": "x"}), "zero.offload: 'nvme' needs zero.stage 3"),
        (edited(zero={"stage": 3, "offload": "nvme"}), "zero.nvme_path: .*needs a folder"),
        (edited(zero={"stage": 3, "offload_parameters": True}), "zero.offload_parameters: needs .*'none'"),
        (edited(zero={"reduce_bucket_size": 0}), "zero.reduce_bucket_size: 0 is not .*auto or a number from 1"),
        (edited(zero={"overlap_comm": 1}), "zero.overlap_comm: 1 is not .*true, false or auto"),
        (edited(training={"recompute": 0}), "training.recompute: 0 is not .*none or auto or a number from 1"),
        (edited(training={"recompute": "some"}), "training.recompute: 'some' is not allowed"),
        (edited(data={}), "data.path: required key is missing"),
        (edited(data={"path": "x", "codec": {"nam": "pixel"}}), "data.codec.nam: unknown key .*'name'"),
        (edited(vision={"encoders": [{"name": "x", "grid": "cubic"}]}), "vision.encoders.0.grid: 'cubic'"),
        (edited(model={"name": "SiT-XL/3"}), "model.name: 'SiT-XL/3' .*did you mean 'SiT-XL/"),
        (edited(model={"name": "SiT-B/2", "depth": 3}), "model.depth: 3 contradicts model.name"),
        (edited(model={"width": 64, "heads": 2}), r"model: give a name .*\(missing: depth, patch\)"),
        (edited(model={"width": 66, "heads": 4, "depth": 1, "patch": 2}), "model.width: 66 must be"),
        (edited(training={"global_batch": 10, "micro_batch": 4}), "training.micro_batch: 4 does not"),
        (edited(sample={"guidance_low": 0.8, "guidance_high": 0.2}), "sample.guidance_low: 0.8 is above"),
        (edited(sample={"cfg": 2.0}, model={"name": "SiT-B/2", "label_dropout": 0.0}), "sample.cfg: 2.0"),
        (edited(vision={"encoders": [{"name": "x"}]}, alignment={"block": 29}), "alignment.block: 29"),
    ],
)  # fmt: skip
def test_what_is_refused(tree, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(tree)


def test_averages_are_one_or_a_list_and_written_as_they_are_read(tmp_path):
    path = tmp_path / "c.yaml"
    for given, emas in (
        (0.5, [EmaConfig(decay=0.5)]),
        ({"sigma_rel": 0.1}, [EmaConfig(sigma_rel=0.1)]),
        ([0.5, {"sigma_rel": 0.05}], [EmaConfig(decay=0.5), EmaConfig(sigma_rel=0.05)]),
    ):
        config = config_from_dict(edited(training={"ema": given}))
        assert config.training.ema == tuple(emas)
        save_config(config, path)
        assert load_config(path) == config
        written = given if isinstance(given, list) else [given]
        assert config.model_dump(mode="json")["training"]["ema"] == written
    config = load_config(path, ["training.ema.1.sigma_rel=0.2", "training.ema.0=0.25"])
    assert [str(e) for e in config.training.ema] == ["0.25", "sigma_rel=0.2"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps", "expected path.to.key=value"),
        ("run.x=1", "run is a value"),
        ("vision.encoders.0.name=x", "'0' is no position in a list of 0"),
        ("seed=[", "not valid YAML"),
        ("training.step=5", "did you mean 'steps'"),
    ],
)
def test_what_an_override_cannot_be(tmp_path, override, message):
    save_config(config_from_dict(BASE), tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml", [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such configuration file .did you mean 'quick.yaml'"),
        ("a: [1", "not valid YAML"),
        ("- 1", "is a mapping of keys, got list"),
        ("", "got nothing"),
    ],
)
def test_what_a_file_cannot_be(tmp_path, content, message):
    (tmp_path / "quick.yaml").write_text("run: r")
    path = tmp_path / "quik.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_in_configs_is_valid(path):
    load_config(path)


def test_there_are_recipes():
    assert {"quickstart.yaml", "imagenet256_sit_xl2_dinov2b.yaml"} <= {p.name for p in RECIPES}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_recipe_goes_by_its_name_in_any_folder(elsewhere):
    """A folder of that name is no configuration, a file of that name is the one that is meant."""
    (elsewhere / "quickstart").mkdir()
    shipped = EMOJI / "train"
    by_name = load_config("quickstart", ["training.steps=5"])
    assert (by_name.training.steps, Path(by_name.data.path)) == (5, shipped)
    assert by_name.run == "runs/quickstart"
    assert load_config("imagenet256_sit_xl2_dinov2b").data.path == "data/imagenet256"
    reference = "evaluation.reference=configs/quickstart/emoji/validation"
    assert load_config("quickstart", [reference]).evaluation.reference == str(EMOJI / "validation")
    (elsewhere / "quickstart").rmdir()
    save_config(config_from_dict(BASE), elsewhere / "quickstart")
    assert load_config("quickstart").run == "r"


@pytest.mark.parametrize("name", ["quikstart", "quickstart.yaml", "configs/quickstart.yaml"])
def test_a_recipe_that_is_not_there_is_told_with_those_that_are(elsewhere, name):
    names = "imagenet256_sit_b2_dinov2b, imagenet256_sit_xl2_dinov2b, quickstart$"
    with pytest.raises(ConfigError, match=rf"{name}: no such .*did you mean 'quickstart'.*{names}"):
        load_config(name)


@pytest.mark.parametrize(
    "path",
    ["configs/quickstart/emoji/train",
     "/gone/lib/python3.11/site-packages/fastrepa/recipes/quickstart/emoji/train",
     "/gone/fastrepa/configs/quickstart/emoji/train"],
)  # fmt: skip
def test_a_run_finds_the_shipped_images_wherever_the_install_is_now(elsewhere, path):
    config = config_from_dict(edited(data={"path": path}))
    assert config.data.path == str(EMOJI / "train")


def test_paths_of_ones_own_stay_what_they_are(elsewhere):
    (elsewhere / "configs/quickstart/emoji/train").mkdir(parents=True)
    for path in ("configs/quickstart/emoji/train", "configs/quickstart/other", "quickstart/emoji"):
        assert config_from_dict(edited(data={"path": path})).data.path == path
