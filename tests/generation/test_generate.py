"""Images by number: the same in any batch and any process; classes and files."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastrepa.config import SampleConfig
from fastrepa.data.classes import choose_classes
from fastrepa.errors import ConfigError, FastrepaError
from fastrepa.generation.folder import (
    Claim,
    claim_folder,
    read_png,
    torn_images,
    write_adm_npz,
    write_png,
)
from fastrepa.generation.generate import default_labels, generate, rank_batches
from fastrepa.randomness import KeyedRandom, Stream
from tests.generation.tiny import CLASSES, CODEC, SIDE, tiny_model

SHAPE = (3, SIDE, SIDE)


def draw(
    model: Any,
    ids: Tensor,
    batch_size: int,
    labels: Tensor | None = None,
    seed: int = 3,
    **sampling,
) -> Tensor:
    settings = SampleConfig(**{"sampler": "sde", "steps": 5, "cfg": 2.0, **sampling})
    return generate(
        model,
        CODEC,
        default_labels(int(ids.max()) + 1, len(CLASSES))[ids] if labels is None else labels,
        seed=seed,
        sample_ids=ids,
        batch_size=batch_size,
        sample_config=settings,
        path="linear",
        input_shape=SHAPE,
        null_label=len(CLASSES),
    )


def elementwise(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """A model without sums, so that no rounding depends on the batch."""
    return x * (1 + labels.view(-1, 1, 1, 1) / 8) - t.view(-1, 1, 1, 1)


# Independence of batch and process ---------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ode", "heun", "sde"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_noise_does_not_depend_on_the_batch(sampler, batch_size):
    ids = torch.arange(20)
    together = draw(elementwise, ids, 20, sampler=sampler)
    assert together.shape == (20, 3, SIDE, SIDE)
    assert together.dtype == torch.uint8
    assert torch.equal(together, draw(elementwise, ids, batch_size, sampler=sampler))
    ranks = [torch.cat(rank_batches(20, batch_size, rank, 2)) for rank in range(2)]
    parts = torch.cat([draw(elementwise, own, batch_size, sampler=sampler) for own in ranks])
    assert torch.equal(together, parts[torch.cat(ranks).argsort()])


def test_images_start_from_their_own_noise():
    """A velocity of zero leaves the noise: keyed by seed, stream and image number."""
    ids = torch.tensor([4, 0, 2**40])
    still = draw(lambda x, t, y: 0 * x, ids, 2, labels=ids * 0, sampler="ode")
    noise = KeyedRandom(3).normal(Stream.SAMPLE_NOISE, 0, ids, SHAPE)
    assert torch.equal(still, CODEC.decode(noise))
    assert not torch.equal(still, draw(lambda x, t, y: 0 * x, ids, 2, ids * 0, 4, sampler="ode"))


def test_step_noise_is_fresh_in_every_step_and_image():
    """The changes under a still model are nearly the noises alone: none may resemble another."""
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.zeros_like(x)

    draw(model, torch.arange(3), 3, cfg=1.0, steps=5)
    changes = [(b - a).flatten(1) for a, b in pairwise(seen)]  # of each step: [3, elements]
    off_diagonal = torch.corrcoef(torch.cat(changes)) - torch.eye(3 * 4)
    assert off_diagonal.abs().max() < 0.3


@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_a_batch_size_gives_the_same_bits_for_any_number_of_processes_and_images(sampler):
    model = tiny_model()
    whole = draw(model, torch.arange(16), 4, sampler=sampler)
    for world in (2, 3):
        own = [torch.cat(rank_batches(16, 4, rank, world)) for rank in range(world)]
        parts = torch.cat([draw(model, ids, 4, sampler=sampler) for ids in own])
        assert torch.equal(whole, parts[torch.cat(own).argsort()])
    assert torch.equal(whole[:10], draw(model, torch.arange(10), 4, sampler=sampler))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_another_batch_size_differs_by_rounding_only(batch_size):
    model, ids = tiny_model(), torch.arange(16)
    a, b = draw(model, ids, 16).int(), draw(model, ids, batch_size).int()
    assert a.float().std() > 20  # not all clamped or grey
    assert (a - b).abs().max() <= 1
    assert (a != b).float().mean() < 1e-3


def test_every_forward_has_the_same_shape():
    sizes: list[int] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(x))
        return 0 * x

    draw(model, torch.arange(10), 4, sampler="ode", steps=2, cfg=2.0, guidance_high=0.6)
    assert sizes == [4, 8] * 3  # t = 1 without guidance, t = 0.5 with it


def test_rank_batches_share_out_every_image_once():
    for num, batch, world in ((10, 4, 1), (10, 4, 2), (10, 4, 5), (64, 32, 4), (1, 8, 2)):
        dealt = [rank_batches(num, batch, rank, world) for rank in range(world)]
        numbers = torch.cat([ids for batches in dealt for ids in batches])
        assert sorted(numbers.tolist()) == list(range(num))
        assert all(int(ids[0]) % batch == 0 for batches in dealt for ids in batches)


def test_the_model_is_in_eval_mode_and_left_as_it_was():
    model, ids = tiny_model(), torch.arange(8)
    model.label_dropout = 0.9
    calm = draw(model, ids, 8)
    model.train()
    assert torch.equal(calm, draw(model, ids, 8))
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_labels_and_defaults_reach_the_model():
    model, ids = tiny_model(), torch.arange(4)
    zeros, ones = (draw(model, ids, 4, labels=torch.full((4,), k)) for k in (0, 1))
    assert (zeros != ones).float().mean() > 0.5
    settings = SampleConfig(sampler="sde", steps=5, cfg=2.0)
    implied = generate(  # the codec's shape and the model's null class
        model,
        CODEC,
        torch.zeros(4, dtype=torch.int64),
        seed=3,
        sample_ids=ids,
        batch_size=4,
        sample_config=settings,
        path="linear",
    )
    assert torch.equal(zeros, implied)


def test_no_images_and_lengths_that_differ():
    none = torch.empty(0, dtype=torch.int64)
    empty = generate(
        elementwise,
        CODEC,
        none,
        seed=0,
        sample_ids=none,
        batch_size=4,
        sample_config=SampleConfig(),
        path="linear",
        null_label=5,
    )
    assert empty.shape == (0, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match="labels"):
        draw(elementwise, torch.arange(3), 4, labels=torch.zeros(2, dtype=torch.int64))


def test_progress_adds_up_to_the_images():
    told: list[float] = []
    generate(
        elementwise,
        CODEC,
        torch.zeros(10, dtype=torch.int64),
        seed=0,
        sample_ids=torch.arange(10),
        batch_size=4,
        sample_config=SampleConfig(steps=5),
        path="linear",
        null_label=5,
        progress=told.append,
    )
    assert len(told) == 3 * 5
    assert sum(told) == pytest.approx(10)


# Classes -----------------------------------------------------------------------------------------


def test_default_labels():
    assert default_labels(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert default_labels(5, 10, [4, 2]).tolist() == [4, 2, 4, 2, 4]


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        (None, [0, 1, 2, 3, 4]),
        ([], [0, 1, 2, 3, 4]),
        (["Animals & Nature", "objects"], [0, 3]),
        (["Food", "food"], [1, 2]),
        (["0", 2, " 4 "], [0, 2, 4]),
        (["3"], [4]),  # a name wins over a number
    ],
)
def test_classes_by_name_and_number(requested, expected):
    assert choose_classes(requested, CLASSES, len(CLASSES)) == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("Objcts", "'Objcts' is no class.*did you mean 'Objects'"),
        ("5", "'5' is no class.*from 0 to 4"),
        ("-1", "'-1' is no class"),
        ("FOOD", "'FOOD' is no class"),  # two names would do
    ],
)
def test_a_class_that_is_none_is_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        choose_classes([0, wrong], CLASSES, len(CLASSES))


def test_classes_of_a_run_without_names():
    assert choose_classes(["7"], [], 10) == [7]
    with pytest.raises(ConfigError, match=r"'cat' is no class; a class is a number from 0 to 9$"):
        choose_classes(["cat"], [], 10)


# Files -------------------------------------------------------------------------------------------


def random_images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 5, 7), dtype=torch.uint8, generator=generator)


def test_png_and_adm_npz_hold_the_images(tmp_path):
    images = random_images(6)
    for i, image in enumerate(images):
        write_png(image, tmp_path / f"{i:06d}.png")
        assert torch.equal(read_png(tmp_path / f"{i:06d}.png"), image)
    path = write_adm_npz(tmp_path, 5)
    assert path.name == "samples_5x5x7x3.npz"
    with np.load(path) as archive:
        assert archive.files == ["arr_0"]
        array = archive["arr_0"]
    assert array.dtype == np.uint8
    assert np.array_equal(array, images[:5].permute(0, 2, 3, 1).numpy())
    assert len(list(tmp_path.iterdir())) == 7  # nothing half written
    (tmp_path / "000003.png").unlink()
    with pytest.raises(FastrepaError, match=r"000003\.png: missing \(1 of 6\)"):
        write_adm_npz(tmp_path, 6)


def claimed(folder, num=2, *, overwrite=False, **settings):
    """Claim for `num` images in batches of up to 4: what came of it, and the record left."""
    record = {"seed": 1, "batch_size": 4, **settings, "num": num}
    claim = claim_folder(folder, record, overwrite=overwrite)
    return claim, json.loads((folder / "sampling.json").read_text())


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "000000.png").write_bytes(b"mine")
    for overwrite in (False, True):
        with pytest.raises(
            FastrepaError, match=r"photos: holds files .*000000\.png.*another --out"
        ):
            claimed(foreign, overwrite=overwrite)
    assert (foreign / "000000.png").read_bytes() == b"mine"
    assert len(list(foreign.iterdir())) == 1
    with pytest.raises(FastrepaError, match="is a file"):
        claimed(foreign / "000000.png")
    for impossible in (foreign / "000000.png" / "below", foreign / ("a" * 300)):
        with pytest.raises(FastrepaError, match="cannot be written"):
            claimed(impossible)


def test_what_a_killed_process_left_is_no_folder_of_somebody_else(tmp_path):
    for name in (".lock", ".sampling.json.1@there.tmp"):
        (tmp_path / name).touch()
    assert claimed(tmp_path)[0] == Claim(batch_size=2, removed=0, more=0)


THEIRS = ["notes.txt", "best.png", "00.png", "0000001.png", "000002.png", "000123.png",
          "samples_9x4x4x3.npz", "samples_2x4x4x3.npz.bak", "000000.png.partial"]  # fmt: skip


def test_an_own_folder_is_used_again_and_nothing_goes_unasked(tmp_path):
    folder = tmp_path / "new" / "samples"
    folder.mkdir(parents=True)
    assert claimed(folder) == (Claim(2, 0, 0), {"seed": 1, "batch_size": 2, "num": 2})
    ours = ["000000.png", "000001.png", "samples_2x4x4x3.npz"]
    for name in [*ours, *THEIRS, "grid.png"]:
        (folder / name).write_bytes(b"old")
    before = names(folder)
    words = r"samples: has 3 files of other settings \(seed 1, now 2\); .*--out, or --overwrite"
    with pytest.raises(FastrepaError, match=words):
        claimed(folder, seed=2)
    assert names(folder) == before
    assert json.loads((folder / "sampling.json").read_text())["seed"] == 1
    claim, record = claimed(folder, overwrite=True)  # the same settings
    assert (claim.removed, record["seed"], names(folder)) == (0, 1, before)
    claim, record = claimed(folder, seed=2, overwrite=True)
    assert (claim.removed, record["seed"]) == (3, 2)
    assert names(folder) == sorted([*THEIRS, "grid.png", "sampling.json"])
    claimed(folder, seed=3)  # no image, so nothing to lose
    for overwrite in (False, True):
        with pytest.raises(FastrepaError, match=r"000002\.png: in the way"):
            claimed(folder, num=3, seed=3, overwrite=overwrite)


def test_the_record_tells_the_truth_about_all_images(tmp_path):
    """Fewer are asked for, or more; batches stay as large as those of what is there."""
    claimed(tmp_path, num=10)
    (tmp_path / "000009.png").touch()
    assert claimed(tmp_path, num=2) == (Claim(4, 0, 1), {"seed": 1, "batch_size": 4, "num": 10})
    assert claimed(tmp_path, num=12)[1]["num"] == 12
    with pytest.raises(FastrepaError, match="batch_size 4, now 3"):
        claimed(tmp_path, num=12, batch_size=3)
    with pytest.raises(FastrepaError, match=r"cfg None, now 2\.0"):
        claimed(tmp_path, num=12, cfg=2.0)
    assert claimed(tmp_path, num=12, run="moved")[1]["num"] == 12


@pytest.mark.parametrize("text", ["", "[", "[1]", "{}", '{"num": "2"}', '{"num": true}'])
def test_images_without_a_record_that_can_be_read_are_left_alone(tmp_path, text):
    (tmp_path / "sampling.json").write_text(text)
    claimed(tmp_path)
    (tmp_path / "000000.png").write_bytes(b"an image")
    (tmp_path / "sampling.json").write_text(text)
    for overwrite in (False, True):
        with pytest.raises(FastrepaError, match=r"sampling\.json: not a record"):
            claimed(tmp_path, overwrite=overwrite)
    assert (tmp_path / "000000.png").read_bytes() == b"an image"


def test_a_folder_in_the_way_is_named_before_anything_goes(tmp_path):
    claimed(tmp_path)
    (tmp_path / "000000.png").touch()
    (tmp_path / "000001.png").mkdir()
    for settings in ({"seed": 1}, {"seed": 2, "overwrite": True}):
        with pytest.raises(FastrepaError, match=r"000001\.png: in the way"):
            claimed(tmp_path, **settings)
    assert names(tmp_path) == ["000000.png", "000001.png", "sampling.json"]
    assert claimed(tmp_path, 1, seed=2, overwrite=True)[0].removed == 1
    assert names(tmp_path) == ["000001.png", "sampling.json"]
    (tmp_path / "sampling.json").unlink()
    (tmp_path / "sampling.json").mkdir()
    with pytest.raises(FastrepaError, match=r"sampling\.json: is a folder"):
        claimed(tmp_path)


def test_images_that_are_not_whole_are_found_and_others_refused(tmp_path):
    write_png(random_images(1)[0], tmp_path / "000000.png")
    whole = (tmp_path / "000000.png").read_bytes()
    torn = [b"", whole[:5], whole[:20], whole[:30], whole[:-1], whole[:-12]]
    for i, data in enumerate(torn):
        (tmp_path / f"{i + 2:06d}.png").write_bytes(data)
    assert torn_images(tmp_path, 10, 5, 7) == [2, 3, 4, 5, 6, 7]
    with pytest.raises(FastrepaError, match=r"000000\.png: not the image that"):
        torn_images(tmp_path, 10, 7, 7)
    (tmp_path / "000001.png").write_text("notes")
    with pytest.raises(FastrepaError, match=r"000001\.png: not the image that"):
        torn_images(tmp_path, 10, 5, 7)
    write_png(torch.zeros(3, 5, 8, dtype=torch.uint8), tmp_path / "000001.png")
    with pytest.raises(FastrepaError, match=r"000001\.png: 8x5 pixels, the first image has 7x5"):
        write_adm_npz(tmp_path, 2)
