"""Small image trees, and damage to files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

RESOLUTION = 16
CLASS_SIZES = {"ant": 9, "bee": 14, "cat": 11}  # 34 images


def noise(seed: int, height: int, width: int) -> np.ndarray:
    """Make noise uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_tree(root: Path, sizes: dict[str, int] | None = None) -> Path:
    """Write root/CLASS/NN.png: noise, most of it RESOLUTION wide, some larger and oblong."""
    for number, (name, count) in enumerate((sizes or CLASS_SIZES).items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            height, width = (RESOLUTION, RESOLUTION) if i % 3 else (40, 53)
            image = Image.fromarray(noise(1000 * number + i, height, width))
            image.save(root / name / f"{i:02d}.png")
    return root


def flip_byte(path: Path, offset: int) -> None:
    """Alter one byte of a file in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([old ^ 0x10]))
