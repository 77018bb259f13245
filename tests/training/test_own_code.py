"""Losses, encoders and metrics from a user's own files: what they do, and what is said of them."""

from types import SimpleNamespace

import pytest
import torch

import fastrepa
from fastrepa.commands.evaluate.evaluator import choose_metrics
from fastrepa.commands.evaluate.own_metric import OwnMetric
from fastrepa.config import EncoderConfig, load_config, own_files, save_config
from fastrepa.config.sections import TrainingConfig
from fastrepa.errors import ConfigError
from fastrepa.reading.own_code import _module as own_code_of
from fastrepa.reading.own_code import keep_copies, own_code
from fastrepa.training.extra_losses import ExtraLosses
from fastrepa.vision.features import build_encoder, cached_features
from fastrepa.vision.pooled import PooledEncoder
from tests.runs import ROOT, SMALL, metrics, train

SIZE = [
    "data.resolution=64", "data.codec={name: pixel, side: 16}", "model.width=32", "model.depth=2",
    "model.heads=2", "vision.encoders=[]", "training.steps=2",
]  # fmt: skip
EDGES = "def edges(p):\n    return (p.velocity - p.target).diff(dim=2).square().mean()\n"


def written(path, text):
    path.write_text(text)
    return path


def test_a_term_is_the_same_in_parts_on_ranks_and_in_any_stage(world, tmp_path, capsys):
    file = written(tmp_path / "my.py", EDGES)
    add = [*SIZE, f"training.extra_losses=[{{use: {file}:edges, weight: 0.5}}]"]
    recipe = ROOT / "configs/quickstart.yaml"

    def alone(*overrides):
        given = [*SMALL, *add, f"run={tmp_path / 'one'}", *overrides]
        return fastrepa.train(load_config(recipe, given))

    alone()
    train(tmp_path / "two", *add, "zero.stage=3", "training.micro_batch=2", ranks=2)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for line, shared in zip(one, two, strict=True):
        assert line["edges_loss"] > 0
        together = line["velocity_loss"] + 0.5 * line["edges_loss"]
        assert line["loss"] == pytest.approx(together, rel=1e-6)
        for key in ("loss", "edges_loss", "grad_norm"):
            assert shared[key] == pytest.approx(line[key], rel=1e-4)
    assert len(list((tmp_path / "one/own").iterdir())) == 1
    file.write_text(EDGES.replace("diff(dim=2)", "diff(dim=3)"))
    capsys.readouterr()
    own_code_of.cache_clear()  # as another process would begin
    alone("training.steps=3")
    assert "my.py is not what it was (" in capsys.readouterr().out
    assert len(list((tmp_path / "one/own").iterdir())) == 2
    file.unlink()
    own_code_of.cache_clear()
    with pytest.raises(ConfigError, match=f"training.extra_losses: {file}: no such file"):
        alone("training.steps=4")
    assert fastrepa.load(tmp_path / "one").sample(num=1).shape == (1, 16, 16, 3)


def test_paths_are_from_the_yaml_file_and_recorded_whole(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    plain = load_config(ROOT / "configs/quickstart.yaml", [*SMALL, "evaluation.metrics=[fid]"])
    save_config(plain, tmp_path / "recipes/a.yaml")
    text = (tmp_path / "recipes/a.yaml").read_text()
    (tmp_path / "recipes/a.yaml").write_text(text.replace("- fid", "- fid\n  - mine.py:Metric"))
    monkeypatch.chdir(tmp_path)
    config = load_config("recipes/a.yaml", ["training.extra_losses=[mine.py:term]"])
    assert config.evaluation.metrics == ("fid", str(tmp_path / "recipes/mine.py:Metric"))
    assert config.training.extra_losses[0].use == str(tmp_path / "mine.py:term")
    assert len(own_files(config)) == 2
    (tmp_path / "run").mkdir()
    save_config(config, tmp_path / "run/config.yaml")
    assert load_config(tmp_path / "run/config.yaml").training == config.training
    with pytest.raises(ConfigError, match=r"expected FILE\.py:NAME"):
        load_config("recipes/a.yaml", ["training.extra_losses=[mine.py]"])


@pytest.mark.parametrize(("text", "said"), [
    ("x = 1\n1 / 0\n", r"own\.py: line 2: ZeroDivisionError: division by zero"),
    ("def terms(p): ...\n", r"has no term \(did you mean 'terms'\?\); expected is a function"),
    ("term = 3\n", r"own\.py:term is a int, expected is a function"),
    ("def term(p):\n    return p.speed\n", r"own\.py:term: line 2: AttributeError"),
    ("def term(p):\n    return p.velocity\n", r"a float tensor \[\] is expected, got \[2, 3\]"),
    ("def term(p):\n    return 1.0\n", r"a float tensor \[\] is expected, got float"),
    ("def term(p):\n    return p.target.mean()\n", r"does not depend on the prediction's veloc"),
])  # fmt: skip
def test_what_is_wrong_with_a_term_is_said_in_a_line(tmp_path, text, said):
    file = written(tmp_path / "own.py", text)
    config = TrainingConfig(extra_losses=(f"{file}:term",))
    given = [torch.ones(2, 3, requires_grad=True), *[torch.ones(2, 3)] * 5]
    batch = SimpleNamespace(label=None, image_u8=None)
    with pytest.raises(ConfigError, match=said) as caught:
        ExtraLosses(config)(*given, batch, None, [], 0)
    assert str(caught.value).startswith("training.extra_losses: ")


def test_two_terms_of_one_name(tmp_path):
    file = written(tmp_path / "own.py", EDGES + "velocity = edges\n")
    for terms, name in (["edges", "edges"], "edges_loss"), (["velocity"], "velocity_loss"):
        with pytest.raises(ConfigError, match=f"{name} is there already"):
            ExtraLosses(TrainingConfig(extra_losses=[f"{file}:{term}" for term in terms]))


ENCODER = """
import torch
class Net(torch.nn.Module):
    input_side, mean, std = 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    def __init__(self, weights):
        super().__init__()
        self.weights, self.scale = weights, torch.nn.Parameter(torch.randn(()))
    def forward(self, x):
        return self.scale * torch.nn.functional.avg_pool2d(x, 8).flatten(2).transpose(1, 2)
class Vector(Net):
    def forward(self, x):
        return x.mean((2, 3))
class Plain:
    def __init__(self): ...
"""


def test_an_encoder(tmp_path):
    file = written(tmp_path / "enc.py", ENCODER)
    config = EncoderConfig(name=f"{file}:Net", weights="random")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    before = torch.get_rng_state()
    encoder, again = (build_encoder(config, resolution=32, grid=4) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    tokens = encoder(images)
    assert torch.equal(tokens, again(images))
    assert (encoder.width, encoder.grid, encoder.input_side) == (3, (4, 4), 32)
    assert encoder.network.inner.weights == "random"
    expected = torch.nn.functional.avg_pool2d((images / 255 - 0.5) / 0.5, 8).flatten(2).mT
    assert torch.allclose(tokens, encoder.network.inner.scale * expected, atol=1e-6)
    assert not encoder.network.inner.scale.requires_grad
    for name, said in (
        ("Vector", r"forward of \[1, 3, 32, 32\] gives \[1, 3\]; tokens \[B,T,Z\]"),
        ("Plain", r"is no torch\.nn\.Module but a Plain"),
        ("None_", "has no None_"),
    ):
        with pytest.raises(ConfigError, match=said):
            build_encoder(EncoderConfig(name=f"{file}:{name}"), resolution=32, grid=4)
    with pytest.raises(ConfigError, match="'cached' takes encoders by name"):
        cached_features(config, resolution=32, grid=4)
    with pytest.raises(ConfigError, match="has tokens alone; write a metric"):
        PooledEncoder(config)


METRIC = """
class Mean:
    higher_is_better = True
    def features(self, images):
        return images.float().mean((2, 3))
    def score(self, samples, reference):
        return samples.mean() - reference.mean()
class Flat(Mean):
    def features(self, images):
        return images.float().mean()
class Words(Mean):
    def score(self, samples, reference):
        return "good"
class Half:
    def features(self, images): ...
"""


def test_a_metric(tmp_path):
    file = written(tmp_path / "metric.py", METRIC)
    ((mean, _), encoders) = choose_metrics([f"{file}:Mean", "fid"])
    assert (mean.name, mean.kind, mean.higher_is_better, encoders) == ("own_Mean", "own", True, [])
    measure = OwnMetric(mean.name, *mean.own)
    images = torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)
    features = measure(images)["values"]
    assert (features.shape, measure.score(features + 2, features)) == ((2, 3), 2.0)
    before = measure.identity
    file.write_text(METRIC + "# changed\n")
    assert OwnMetric(mean.name, *mean.own).identity != before
    for name, said in (("Half", "has no method score"), ("Meen", "did you mean 'Mean'")):
        with pytest.raises(ConfigError, match=said):
            choose_metrics([f"{file}:{name}"])
    (flat, words), _ = choose_metrics([f"{file}:Flat", f"{file}:Words"])
    with pytest.raises(ConfigError, match=r"features of \[2, 3, 4, 4\] gives \[\], a tensor \[B,D"):
        OwnMetric("own_Flat", *flat.own)(images)
    with pytest.raises(ConfigError, match="score gives a str, a number is expected"):
        OwnMetric("own_Words", *words.own).score(features, features)


def test_a_file_is_run_once_and_kept_as_it_was(tmp_path):
    file = written(tmp_path / "own.py", "import dataclasses\nlog = []\nclass A: ...\n")
    assert own_code("key", f"{file}:A", "class") is own_code("key", f"{file}:A", "class")
    run = tmp_path / "run"
    run.mkdir()
    assert keep_copies(run, [f"{file}:A", f"{file}:B"]) == []
    (copy,) = (run / "own").iterdir()
    assert copy.read_text() == file.read_text()
    assert keep_copies(run, [f"{file}:A"]) == []
