"""Small data sets as files, for the tests of sources."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


def write_image(path: Path, pixels: Any) -> Path:
    """Write an image of unsigned bytes, (H, W) or (H, W, 3); the suffix says its format."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)
    return path


def noise(seed: int, height: int = 9, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_folder(root: Path, names: Sequence[str]) -> Path:
    """Write an image of each name, such as `train/cat/1.png`, with pixels of its own."""
    for number, name in enumerate(names):
        write_image(root / name, noise(number))
    return root


def write_csv(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def samples_of(data: Any) -> list[tuple[Any, Any]]:
    return [data[index] for index in range(len(data))]


def inputs_of(data: Any) -> torch.Tensor:
    return torch.stack([torch.as_tensor(sample[0]) for sample in samples_of(data)])


def targets_of(data: Any) -> list[Any]:
    return [torch.as_tensor(sample[1]).tolist() for sample in samples_of(data)]
