"""The examples stop on four workers and go on with three and two, on the curve of one."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.model.lightning_workers import kept_workers


@contextmanager
def _accelerate_by_torchrun() -> Iterator[None]:
    """What torchrun sets. The process group is there already, so nobody connects to the port.

    Accelerate keeps what it has found in the process, which other tests have used, or will.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def reset() -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
             "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # fmt: skip
    reset()
    with mock.patch.dict(os.environ, there):
        yield
    reset()


def _ddp(path: Path | None, done: int, steps: int) -> Any:
    return importlib.import_module("examples.ddp").train(path, steps - done)


def _accelerate(path: Path | None, done: int, steps: int) -> Any:
    with _accelerate_by_torchrun():
        return importlib.import_module("examples.accelerate_digits").train(path, steps - done)


def _lightning(path: Path | None, done: int, steps: int) -> Any:
    example = importlib.import_module("examples.lightning_digits")
    module, losses = example.train(path, steps, (kept_workers(),), dist.get_world_size())
    return module.net, losses


def _hf_trainer(path: Path | None, done: int, steps: int) -> Any:
    assert path is not None
    with _accelerate_by_torchrun():
        trainer, losses = importlib.import_module("examples.hf_trainer_digits").train(path, steps)
    return trainer.accelerator.unwrap_model(trainer.model), losses


RUNS = {"ddp": _ddp, "accelerate": _accelerate, "lightning": _lightning, "hf_trainer": _hf_trainer}


def run(
    name: str, path: Path | None, done: int, steps: int
) -> tuple[list[float], dict[str, Tensor]]:
    """The losses from step `done` to `steps`, and the state of the model, in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        model, losses = RUNS[name](path, done, steps)
    finally:
        torch.set_default_dtype(torch.float32)
    return losses.tolist(), {key: value.clone() for key, value in model.state_dict().items()}


# Each stops in the middle of an epoch, and goes over the end of one, whose last step is short.
@pytest.mark.parametrize(
    ("name", "needs", "file", "stops"),
    [
        ("ddp", "torch", "run.pt", (10, 20, 34)),
        pytest.param("accelerate", "accelerate", "run", (30, 60, 100), marks=pytest.mark.slow),
        pytest.param("lightning", "lightning", "run.ckpt", (30, 60, 100), marks=pytest.mark.slow),
        pytest.param("hf_trainer", "transformers", "run", (20, 30, 50), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_it_goes_on_with_other_workers_on_the_same_curve(pool, tmp_path, name, needs, file, stops):
    pytest.importorskip(needs, reason=f"{needs} is not installed")
    (tmp_path / "alone").mkdir()
    (expected, whole), *_ = pool(1).run(run, name, tmp_path / "alone" / file, 0, stops[-1])
    losses: list[float] = []
    for world_size, stop in zip((4, 3, 2), stops, strict=True):
        results = pool(world_size).run(run, name, tmp_path / file, len(losses), stop)
        assert all(curve == results[0][0] for curve, _ in results)
        losses += results[0][0]
        assert len(losses) == stop
    curve, alone = (torch.tensor(each, dtype=torch.float64) for each in (losses, expected))
    gaps = (curve - alone).abs() / alone
    assert gaps.max() <= 1e-12
    for _, state in results:
        for key, value in whole.items():
            assert torch.allclose(state[key], value, rtol=0, atol=1e-10), key
