"""The trainer's examples of other tasks: the same run on 1 to 4 workers, and when resumed."""

import pytest
import torch

from examples import detection, segmentation
from tests.train import runs
from tests.train.test_loop import curve

# Ten steps an epoch, the last of one sample: all shards of it but the first are empty. With three
# images on a worker, or one, some step has a worker without boxes.
SMALL = [
    "train.dtype=float64",
    "train.global_batch=6",
    "train.epochs=3",
    # AdamW divides gradients that are 0 but for rounding by their own size.
    "train.optimizer.name=SGD",
    "train.lr=0.01",
    "train.evaluate_every=15",
    "data.options.count=55",
    "data.options.size=16",
    "model.options.width=4",
]


def run(pool, workers: int, folder, example: str, options: list[str], **stop) -> tuple:
    folder.mkdir(exist_ok=True)
    return pool(workers).run(
        runs.train_example, str(folder), f"examples/{example}.yaml", options, *stop.values()
    )[0]


def outcome_of(folder) -> list[float]:
    """The losses of all steps, then the metrics of all evaluations."""
    values = curve(folder)
    for event in runs.events(folder, "epoch"):
        values += [value for key, value in sorted(event.items()) if key.startswith("validation_")]
    return values


@pytest.mark.parametrize("example", ["detection", "segmentation"])
def test_thirty_steps_are_the_same_stopped_on_four_workers_and_gone_on_with_two_and_three(
    pool, tmp_path, example
):
    run(pool, 1, tmp_path / "whole", example, SMALL)
    expected = outcome_of(tmp_path / "whole")
    assert len(curve(tmp_path / "whole")) == 30
    for workers, stop_at in ((4, 8), (2, 18), (3, None)):
        run(pool, workers, tmp_path / "parts", example, SMALL, stop_at=stop_at, rank=0)
    assert outcome_of(tmp_path / "parts") == pytest.approx(expected, rel=1e-12)
    assert [event["world_size"] for event in runs.events(tmp_path / "parts", "start")] == [4, 2, 3]
    local = [*SMALL, "norm.sync=none", "train.epochs=1"]
    run(pool, 2, tmp_path / "local", example, local)
    assert curve(tmp_path / "local") != pytest.approx(expected[:10], rel=1e-3)


def test_some_images_have_no_box_and_some_pixels_are_ignored():
    data = detection.load(None, count=55, size=16)
    counts = [len(data.train[index][1]) for index in range(55)]
    assert {0, 1, 2} == set(counts)
    assert any(sum(counts[i : i + 2]) == 0 for i in range(0, 54, 2))
    masks = torch.stack([segmentation.load(None, 55, 16).train[i][1] for i in range(55)])
    assert {0, 1, 2, segmentation.IGNORED} == set(masks.unique().tolist())
