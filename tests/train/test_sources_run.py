"""Runs on sources of files, with random changes and loader processes: one curve on any workers."""

from pathlib import Path
from typing import Any

import pytest

from tests.train import runs
from tests.train.files import noise, write_folder, write_image

TRAIN = {"epochs": 3, "global_batch": 12, "lr": 0.02, "dtype": "float64"}
CHANGES = {"crop": 1, "flip": True, "cutout": 3, "mixup": 0.4, "cutmix": 1.0}


def classes(root: Path) -> dict[str, Any]:
    names = [
        f"{part}/{label}/{n}.png" for part in ("train", "test") for label in "ab" for n in range(15)
    ]
    write_folder(root, names)
    options = {"size": 8, "random_crop": True}
    data = {"name": "folder", "root": str(root), "options": options, "augment": CHANGES}
    return {"data": {**data, "loader": {"workers": 1}}, "model": {"name": "digits_resnet"}}


def masks(root: Path) -> dict[str, Any]:
    for split in ("train", "test"):
        for number in range(30):
            image = noise(number, 8, 8)
            mask = (image[:, :, 0] > 127).astype("u1")
            mask[number % 8] = 255
            write_image(root / split / "images" / f"{number}.png", image)
            write_image(root / split / "masks" / f"{number}.png", mask)
    options = {"size": 8, "num_classes": 2, "flip": True}
    return {
        "data": {"name": "masks", "root": str(root), "options": options},
        "model": {"name": "tests.train.tasks:SmallUNet"},
        "task": {"name": "segment"},
    }


def memory(root: Path) -> dict[str, Any]:
    data = {"name": "digits", "augment": CHANGES}
    train = {**TRAIN, "epochs": 1, "global_batch": 120}
    return {"data": data, "model": {"name": "digits_resnet"}, "train": train}


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in runs.events(folder, "step")]


@pytest.mark.parametrize("kind", [classes, masks, memory])
def test_the_curve_is_that_of_one_worker(pool, tmp_path, kind):
    sections = {"train": TRAIN, "norm": {"momentum": 0.1}, **kind(tmp_path / "data")}
    curves = []
    for world_size in (1, 3):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        pool(world_size).run(runs.train_sections, str(folder), sections)
        curves.append(losses(folder))
    assert len(curves[0]) >= 9
    assert curves[1] == pytest.approx(curves[0], rel=1e-12)
