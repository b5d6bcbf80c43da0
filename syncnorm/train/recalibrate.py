"""Give a finished run's model population statistics of its training set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from syncnorm import recalibrate
from syncnorm.errors import ConfigError
from syncnorm.train.config import Config
from syncnorm.train.config_file import load_config
from syncnorm.train.data import Dataset, Split, shard
from syncnorm.train.files import write_whole
from syncnorm.train.learner import load_data, make_model
from syncnorm.train.step import evaluate
from syncnorm.train.workers import Workers

CHECKPOINT = "checkpoint.pt"
RECALIBRATED = "checkpoint-recalibrated.pt"


@dataclass(frozen=True)
class Recalibrated:
    """The test accuracy, 0 to 1, by the old and by the new statistics, and the new checkpoint."""

    before: float
    after: float
    path: Path


def read_run(folder: Path) -> tuple[Config, dict[str, Any]]:
    """The configuration of a run and its checkpoint, which is loaded without running code.

    Raises:
        ConfigError: it is not the folder of a finished run.
    """
    for name in ("config.yaml", CHECKPOINT):
        if not (folder / name).is_file():
            raise ConfigError(f"run {str(folder)!r} has no {name}. Name the folder of a finished run.")
    config = load_config(str(folder / "config.yaml"))
    try:
        state = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, all of which mean the same here
        first = str(error).strip().splitlines()
        raise ConfigError(f"{folder / CHECKPOINT}: cannot be loaded: {first[0] if first else error!r}") from None
    if not isinstance(state, dict) or "model" not in state:
        raise ConfigError(f"{folder / CHECKPOINT}: holds no model")
    return config, state


def recalibrate_run(folder: Path, workers: Workers, mix: float) -> Recalibrated:
    """Recalibrate on the training set, each worker taking its share of the batches, and write a new checkpoint.

    *Collectives*: those of `syncnorm.recalibrate` and of two evaluations; every worker must call.
    """
    config, state = read_run(folder)
    data = load_data(config, workers.device)
    model = make_model(config, data, total_steps=1)
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{folder / CHECKPOINT}: does not fit the run's configuration: {reason}") from None
    before = _accuracy(model, data, workers, config)
    recalibrate(model, _batches(data.train, workers, config.train.global_batch), mix=mix)
    after = _accuracy(model, data, workers, config)
    path = folder / RECALIBRATED
    if workers.is_first:
        write_whole(path, lambda file: torch.save({**state, "model": model.state_dict()}, file))
    return Recalibrated(before, after, path)


def _batches(split: Split, workers: Workers, size: int) -> list[torch.Tensor]:
    """Every worker's share of the batches: which batch is whose changes nothing but rounding."""
    return list(split.images.split(size))[workers.rank :: workers.world_size]


def _accuracy(model: nn.Module, data: Dataset, workers: Workers, config: Config) -> float:
    mine = data.test[shard(len(data.test), workers.rank, workers.world_size)]
    return evaluate(model, mine, config.train.global_batch)
