"""The quickstart's bundle is whole, small, balanced as documented, and its parts are disjoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.quickstart.emoji import base_of, build, choose, is_validation
from fastrepa.config import DataConfig
from fastrepa.data.format.shards import ShardSet
from fastrepa.data.pipeline import DataPipeline
from fastrepa.errors import DataError

BUNDLE = Path(__file__).parents[1] / "configs" / "quickstart" / "emoji"
PARTS = ("train", "validation")
CLASSES = [
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
]


def sources(part: str) -> list[str]:
    return [json.loads(line) for line in (BUNDLE / part / "sources.jsonl").open()]


def test_bundle_is_whole_and_small() -> None:
    sizes = {part: ShardSet.open(BUNDLE / part, resolution=64, verify="full") for part in PARTS}
    assert {part: shards.num_samples for part, shards in sizes.items()} == {
        "train": 1783,
        "validation": 120,
    }
    assert all(shards.classes == CLASSES for shards in sizes.values())
    files = [path for part in PARTS for path in (BUNDLE / part).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert "Microsoft Corporation" in (BUNDLE / "LICENSE").read_text()


def test_no_motif_is_in_both_parts() -> None:
    bases = [{base_of(Path(source).stem) for source in sources(part)} for part in PARTS]
    assert not bases[0] & bases[1]
    assert 0.05 < len(bases[1]) / len(bases[0] | bases[1]) < 0.10
    assert all(is_validation(base) for base in bases[1])
    assert not any(is_validation(base) for base in bases[0])


def test_variants_share_their_base() -> None:
    woman_astronaut_dark, man_astronaut = "1F469-1F3FF-200D-1F680", "1f468-200d-1f680"
    assert base_of(woman_astronaut_dark) == base_of(man_astronaut) == "1F9D1-1F680"
    runner_right = "1F3C3-1F3FB-200D-2642-FE0F-200D-27A1-FE0F"
    assert base_of(runner_right) == base_of("1F3C3") == "1F3C3"
    assert base_of("1F600") != base_of("1F601")
    assert base_of("2642-FE0F") != base_of("2640-FE0F")


def test_bundle_decodes_to_coloured_objects_on_white() -> None:
    shards = ShardSet.open(BUNDLE / "train")
    config = DataConfig(path=str(shards.path), resolution=64)
    with DataPipeline(
        shards, config, global_batch=256, micro_batch=256, device=torch.device("cpu")
    ) as pipeline:
        batch = next(pipeline)
    images = batch.image_u8.float()
    assert images.shape == (256, 3, 64, 64)
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners.mean(dim=(1, 2)) > 240).float().mean() > 0.9
    assert images[:, :, 16:48, 16:48].mean() < 200
    assert (images.amax(dim=1) - images.amin(dim=1)).amax() > 200
    assert batch.label.unique().tolist() == list(range(8))


@pytest.fixture
def package(tmp_path: Path) -> tuple[Path, Path]:
    """A few images and labels shaped like the two packages'."""
    images = tmp_path / "assets"
    images.mkdir()
    smileys = [f"1F6{i:02X}" for i in range(9)]
    names = [*smileys, "1F44B", "1F44B-1F3FB", "1F44B-1F3FD", "2764", "1F3F4", "1F3FD"]
    for number, name in enumerate(names):
        picture = np.full((80, 80, 4), number, dtype=np.uint8)
        Image.fromarray(picture).save(images / f"{name.lower()}.webp")

    def entry(code: str, category: str, **more: object) -> dict[str, object]:
        return {"unified": code, "non_qualified": None, "category": category, **more}

    tones = {tone: entry(f"1F44B-{tone}", "") for tone in ("1F3FB", "1F3FD", "1F3FF")}
    entries = [
        *(entry(code, "Smileys & Emotion") for code in smileys),
        entry("1F44B", "People & Body", skin_variations=tones),
        entry("2764-FE0F", "Symbols"),
        entry("1F4A5", "Symbols"),  # no image
        entry("1F3F4", "Flags"),
        entry("1F3FD", "Component"),
    ]
    labels = tmp_path / "emoji.json"
    labels.write_text(json.dumps(entries))
    return images, labels


def test_chooses_the_documented_images(package: tuple[Path, Path]) -> None:
    chosen = list(choose(*package))
    others = [(emoji.image.stem, emoji.category) for emoji in chosen[9:]]
    assert others == [
        ("1f44b", "People & Body"),
        ("1f44b-1f3fd", "People & Body"),
        ("2764", "Symbols"),
    ]
    assert {emoji.category for emoji in chosen[:9]} == {"Smileys & Emotion"}


def test_wrong_inputs_are_one_line(package: tuple[Path, Path], tmp_path: Path) -> None:
    images, labels = package
    (tmp_path / "none").mkdir()
    (tmp_path / "other.json").write_text('[{"a": 1}]')
    (tmp_path / "broken.json").write_text("[")
    for folder, file, message in (
        (tmp_path / "absent", labels, "absent: no such folder"),
        (tmp_path / "none", labels, "holds none of the images"),
        (images, tmp_path / "absent.json", "No such file"),
        (images, tmp_path / "other.json", "not emoji-datasource's"),
        (images, tmp_path / "broken.json", "not emoji-datasource's"),
    ):
        with pytest.raises(DataError, match=message):
            build(folder, file, tmp_path / "out", quality=90, progress=False)
