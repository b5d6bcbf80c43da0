"""Snapshots, and whether two are equal to the bit."""

from pathlib import Path

import torch

from syncnorm.train.checkpoint.snapshot import Snapshot

OLD, NEW = 0.0, 1.0


def make_snapshot(step: int = 12, fill: float = OLD) -> Snapshot:
    weight = torch.arange(24.0).reshape(1, 2, 3, 4) + fill
    return Snapshot(
        step,
        {"model": {"weight": weight, "count": torch.tensor(step)}, "ema": {"weight": weight / 3}},
        {
            "optimizer": {"state": {0: {"exp_avg": weight * 7}}, "lr": 0.1 + fill},
            "rng": [torch.arange(20, dtype=torch.uint8)],
        },
        {"epoch": 3, "cursor": [1, 2], "config": {"name": "é"}, "loss": 1 / 3},
    )


def assert_equal(left: object, right: object) -> None:
    """Equal to the bit, in types and layout too."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        assert (left.dtype, left.shape, left.is_contiguous()) == (
            right.dtype,
            right.shape,
            right.is_contiguous(),
        )
        assert torch.equal(left.flatten().view(torch.uint8), right.flatten().view(torch.uint8))
    elif isinstance(left, Snapshot) and isinstance(right, Snapshot):
        assert_equal(vars(left), vars(right))
    elif isinstance(left, dict) and isinstance(right, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    else:
        assert repr(left) == repr(right)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
