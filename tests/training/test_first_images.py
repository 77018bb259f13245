"""The images that an encoder's precision is measured on: the first of the run's own order."""

import torch

from fastrepa.config import load_config
from fastrepa.data.datasets import open_data
from fastrepa.data.pipeline import DataPipeline
from fastrepa.training.inputs import LOOKED_AT, first_images
from tests.runs import ROOT, SMALL
from tests.sets.trees import write_tree


def test_they_are_those_that_training_begins_with():
    config = load_config(ROOT / "configs/quickstart.yaml", ["run=x", *SMALL])
    data, cpu = open_data(config.data.path), torch.device("cpu")
    images = first_images(data, config.data, config.seed, cpu)
    assert images.shape == (LOOKED_AT, 3, config.data.resolution, config.data.resolution)
    assert images.dtype == torch.uint8
    batch = config.training.global_batch
    with DataPipeline(
        data, config.data, global_batch=batch, micro_batch=batch, seed=config.seed, device=cpu
    ) as batches:
        first, second = next(batches), next(batches)
    assert torch.equal(images, torch.cat([first.image_u8, second.image_u8]))


def test_a_set_of_fewer_gives_all_it_has(make_set, tmp_path):
    data = make_set(write_tree(tmp_path / "few", {"ant": 3, "bee": 2}))
    config = load_config(
        ROOT / "configs/quickstart.yaml",
        ["run=x", *SMALL, f"data.path={data.path}", f"data.resolution={data.resolution}"],
    )
    assert len(first_images(data, config.data, config.seed, torch.device("cpu"))) == 5
