"""Runs on sources of files, with random changes and loader processes: one curve on any workers."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.train import runs
from tests.train.files import noise, write_csv, write_folder, write_image

TRAIN = {"epochs": 3, "global_batch": 12, "lr": 0.02, "dtype": "float64"}
HEAD = [*"abcdefgh", "kind"]
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("renamed", r"got classes \['dog', 'zebra'\], not \['cat', 'dog'\]"),
        ("other figures", r"got inputs \{"),
        ("a row less", "got samples 40, not 50"),
        ("other labels", "got other labels. Bring"),
        ("rounded", ""),
    ],
)
def test_a_run_goes_on_with_the_data_that_it_began_with(pool, tmp_path, change, words):
    path, folder = tmp_path / "rows.csv", tmp_path / "run"
    folder.mkdir()
    # The first is as dates are, far from 0.
    numbers = [[(17 * i + j) % 23 + (j == 0) * 10**9 for j in range(8)] for i in range(50)]
    rows = [[*row, ("cat", "dog")[i % 2]] for i, row in enumerate(numbers)]
    changed = {
        "renamed": [[*row[:-1], row[-1].replace("cat", "zebra")] for row in rows],
        "other figures": [[row[0] + i % 2, *row[1:]] for i, row in enumerate(rows)],
        "a row less": rows[:-10],
        "other labels": [[*row[:-1], ("dog", "cat")[i % 2]] for i, row in enumerate(rows)],
        "rounded": [[row[0] + 1e-6, *row[1:]] for row in rows],
    }
    write_csv(path, [HEAD, *rows])
    options = {
        "model": {"name": "tests.train.tasks:Perceptron"},
        "data": {"name": "csv", "root": str(path), "options": {"target": "kind"}},
        "train": {"epochs": 2, "global_batch": 10, "lr": 0.1},
    }
    pool(2).run(runs.train_sections, str(folder), options, 2)
    write_csv(path, [HEAD, *changed[change]])
    for message in pool(2).run(runs.error_of_sections, str(folder), options):
        assert re.search(words, message) if words else message == ""
        assert "Bring them back" in message or not words
