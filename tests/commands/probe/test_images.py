"""A sample of a set: its labels are those of its images, however few classes are drawn."""

import json
import os
import shutil

import numpy as np
import pytest

from fastrepa.commands.probe.images import LEAST_OF_CLASS, choose_classes_of, draw_sample
from fastrepa.commands.probe.probe import probe
from fastrepa.data.gallery import Gallery
from fastrepa.errors import ConfigError
from tests.runs import ROOT
from tests.sets.trees import write_tree

EMOJI = ROOT / "configs/quickstart/emoji/validation"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_images_labels_and_names_belong_together(seed):
    gallery = Gallery(EMOJI)
    by_name = {gallery.key(number): number for number in range(len(gallery.labels))}
    sample = draw_sample(EMOJI, 40, seed=seed)
    assert len(sample.classes) == 2 and "2 of 8 classes drawn" in sample.said[-1]
    assert sample.labels is not None and set(sample.labels) == {0, 1}
    for image, label, name in zip(sample.images, sample.labels, sample.names, strict=True):
        number = by_name[name]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), gallery.image(number))
        assert sample.classes[label] == gallery.classes[gallery.labels[number]]


def test_the_same_for_a_seed_and_no_image_twice():
    first, second, other = (draw_sample(EMOJI, 60, seed=seed) for seed in (3, 3, 4))
    assert first.names == second.names != other.names
    assert len(set(first.names)) == len(first.names)


def test_classes_that_cannot_be_told_are_passed_over():
    labels = np.repeat(np.arange(5), [50, LEAST_OF_CLASS, LEAST_OF_CLASS - 1, 40, 1])
    allowed, said = choose_classes_of(labels, 500, seed=0)
    assert allowed == [0, 1, 3] and "2 of 5" in said[0]
    assert choose_classes_of(np.repeat([0, 1], [50, 3]), 500, seed=0) == (None, [])


def test_a_set_has_its_own_resolution():
    with pytest.raises(ConfigError, match=r"--resolution: 32, but .* was prepared at 64 px"):
        draw_sample(EMOJI, 20, resolution=32)


def test_names_with_stray_bytes_and_controls_can_be_written_and_drawn(tmp_path):
    """A folder has bytes for a name: what is no text is an escape on sheet and record."""
    names = (b"caf\xe9", b"ant\x1b[31m")
    for number, name in enumerate(names):
        write_tree(tmp_path / str(number), {"x": LEAST_OF_CLASS})
        shutil.copytree(tmp_path / str(number) / "x", tmp_path / "set" / os.fsdecode(name))
    probed = probe(tmp_path / "set", encoders="resnet10t=random@32", resolution=16, out=tmp_path)
    assert probed.files == ["probe.json", "features.png"]
    assert json.loads((tmp_path / "probe.json").read_text())["classes"] == [
        "ant\\x1b[31m", "caf\\udce9"
    ]  # fmt: skip
