"""The command `syncnorm recalibrate`: in this process, or as one worker of torchrun."""

import os
from functools import partial
from pathlib import Path

from syncnorm.errors import ConfigError
from syncnorm.run.env import Launched
from syncnorm.run.joining import joined
from syncnorm.run.own_workers import run_on
from syncnorm.train.checkpoint.evaluated import RECALIBRATED
from syncnorm.train.finished.load import read_run
from syncnorm.train.finished.recalibrate import Recalibrated, recalibrate_run
from syncnorm.train.task.measures import format_metric, format_value
from syncnorm.train.waiting import from_first


def run_recalibrate(
    folder: Path, mix: float, allowed: tuple[str, ...], launched: Launched | None
) -> None:
    """Recalibrate a run, and print its metrics before and after.

    Raises:
        ConfigError: `mix` is out of range, the folder is not a finished run's or cannot be
            written, or its configuration names code that is not allowed.
        RunError: code that the configuration names failed.
    """
    if not 0 < mix <= 1:
        raise ConfigError(f"`--mix` must be in (0, 1], got {mix}. 1 replaces the old statistics.")
    config = read_run(folder, allowed)
    device = config.launch.device

    def work(launched: Launched | None) -> None:
        with joined(config, device, launched) as workers:
            from_first(workers.is_first, partial(_check_writable, folder))
            result = recalibrate_run(folder, config, workers, mix, allowed)
            if workers.is_first:
                _print(result)

    run_on(work, None, launched, device)


def _print(result: Recalibrated) -> None:
    for name, before in result.before.items():
        after = format_value(name, result.after[name])
        print(f"{result.split} {format_metric(name, before)} before, {after} after")
    print(result.path, flush=True)


def _check_writable(folder: Path) -> None:
    kept = folder / RECALIBRATED
    if not os.access(kept if kept.exists() else folder, os.W_OK):
        raise ConfigError(f"run {str(folder)!r} must be writable, for the new checkpoint")
