"""The command `syncnorm recalibrate`: in this process, or as one worker of torchrun."""

import os
from functools import partial
from pathlib import Path

import torch.distributed as dist

from syncnorm.errors import ConfigError
from syncnorm.run.env import Launched
from syncnorm.run.in_process import errors_in_one_line
from syncnorm.run.worker import join
from syncnorm.train.checkpoint.evaluated import RECALIBRATED
from syncnorm.train.finished.load import read_run
from syncnorm.train.finished.recalibrate import recalibrate_run
from syncnorm.train.task.measures import format_metric, format_value
from syncnorm.train.waiting import from_first


def run_recalibrate(
    folder: Path, mix: float, allowed: tuple[str, ...], launched: Launched | None
) -> None:
    """Recalibrate a run, and print its metrics before and after.

    Raises:
        ConfigError: `mix` is out of range, the folder is not a finished run's or cannot be
            written, or its configuration names code that is not allowed.
        LocalRunError: code that the configuration names failed.
    """
    if not 0 < mix <= 1:
        raise ConfigError(f"`--mix` must be in (0, 1], got {mix}. 1 replaces the old statistics.")
    config = read_run(folder, allowed)
    workers = join(config.launch.device, launched)
    try:
        with errors_in_one_line(workers.rank):
            from_first(workers.is_first, partial(_check_writable, folder))
            result = recalibrate_run(folder, config, workers, mix, allowed)
        if workers.is_first:
            for name, before in result.before.items():
                after = format_value(name, result.after[name])
                print(f"{result.split} {format_metric(name, before)} before, {after} after")
            print(result.path, flush=True)
    finally:
        dist.destroy_process_group()


def _check_writable(folder: Path) -> None:
    kept = folder / RECALIBRATED
    if not os.access(kept if kept.exists() else folder, os.W_OK):
        raise ConfigError(f"run {str(folder)!r} must be writable, for the new checkpoint")
