"""The mirrored samples are frozen, because a run is resumed and compared across versions."""

from __future__ import annotations

import numpy as np
import torch

from fastrepa.config import DataConfig
from fastrepa.data.pipeline import DataPipeline
from tests.sets import written

# Of seed 7, the numbers within a step's 8 samples, by step.
MIRRORED = {
    0: [0, 1, 2, 3, 4, 6, 7],
    1: [1, 3, 5, 6],
    2: [0, 3, 4, 6],
    3: [1, 2, 3, 4, 6, 7],
    10_000: [1, 2, 3, 5, 6, 7],
}


def views(tmp_path, step, micro_batch, *, image):
    """Return 0 or 1 of each of a step's samples, by the moments; images are checked beside them."""
    data = written.write_set(tmp_path / f"{step}-{micro_batch}-{image}", latents=2)
    config = DataConfig(path=str(data.path), resolution=data.resolution, flip=True, window=2)
    found = []
    with DataPipeline(
        data, config, global_batch=8, micro_batch=micro_batch, seed=7, start_step=step,
        device=torch.device("cpu"), image=image, moments=True,
    ) as pipeline:  # fmt: skip
        for _ in range(8 // micro_batch):
            batch = next(pipeline)
            for i, moments in enumerate(batch.moments):
                number, view = next(
                    (n, v)
                    for n in range(written.SAMPLES)
                    for v in (0, 1)
                    if np.array_equal(written.moments(n, v), moments.numpy())
                )
                found.append(view)
                if image:
                    expected = torch.from_numpy(written.image(number)).permute(2, 0, 1)
                    expected = expected.flip(-1) if view else expected
                    assert torch.equal(batch.image_u8[i], expected)
    return found


def mirrored(found):
    return [i for i, view in enumerate(found) if view]


def test_which_samples_are_mirrored(tmp_path):
    for step, expected in MIRRORED.items():
        assert mirrored(views(tmp_path, step, 8, image=False)) == expected


def test_images_are_mirrored_with_their_moments_in_any_micro_batch(tmp_path):
    assert mirrored(views(tmp_path, 2, 4, image=True)) == MIRRORED[2]
