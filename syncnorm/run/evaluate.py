"""The command `syncnorm evaluate`: in this process, on workers of its own, or under torchrun."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from syncnorm.errors import ConfigError
from syncnorm.model.mixed import Choice, Mix, Prior
from syncnorm.run import env, interrupt
from syncnorm.run.env import Launched, read_launched
from syncnorm.run.errors import LocalRunError
from syncnorm.run.in_process import errors_in_one_line
from syncnorm.run.local import run_once
from syncnorm.run.machine import choose_device
from syncnorm.run.processes import can_fork, prepare_to_fork
from syncnorm.run.worker import end_with, join
from syncnorm.train.config.schema import Config
from syncnorm.train.judged import Evaluation, evaluate_run
from syncnorm.train.loaded import read_run
from syncnorm.train.processes import die_with_parent
from syncnorm.train.task.measures import format_metric

_PATIENCE_SECONDS = 30.0
_NUMBERED = {"mix": Mix, "prior": Prior}


@dataclass(frozen=True)
class Request:
    """An evaluation as the command line asks for it.

    Args:
        run: its folder.
        split: train, validation or test; None: the test set, or else the validation set.
        data: values for keys of the section `data`, such as `root=other`.
        checkpoint: its name.
        allowed: packages whose callables the configuration may name.
        as_json: True to print one JSON object.
        device: auto, cpu or cuda.
        statistics: running, batch, mix:WEIGHT or prior:SAMPLES.
    """

    run: Path
    split: str | None
    data: Sequence[str]
    checkpoint: str
    allowed: tuple[str, ...]
    as_json: bool
    device: str = "auto"
    statistics: str = "running"


def run_evaluate(request: Request, workers: int | None, launched: Launched | None) -> None:
    """Evaluate a run's model, and print its metrics.

    Args:
        request: what to evaluate.
        workers: to start on this machine; None: this process alone.
        launched: this worker's rank; None outside a launcher.

    Raises:
        ConfigError: bad input; see `evaluate_run`.
        LocalRunError: code that the configuration names failed, or a worker was lost.
    """
    config = _read(request)
    if launched is not None and workers is not None:
        raise ConfigError(
            f"`--workers` must be left to the launcher, which started {launched.world_size}, got "
            f"{workers}."
        )
    if workers is None or workers == 1:
        with errors_in_one_line(0 if launched is None else launched.rank):
            _print(request, _evaluate(request, config, launched))
    else:
        _start_workers(request, config, workers)


def _read(request: Request) -> Config:
    if request.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"`--device` must be auto, cpu or cuda, got {request.device!r}")
    _statistics(request.statistics)
    keys = [f"data.{each}" for each in request.data]
    return read_run(request.run, request.allowed, overrides=keys)


def _statistics(text: str) -> Choice:
    """Read what `--statistics` names.

    Raises:
        ConfigError: it names nothing.
    """
    name, _, number = text.partition(":")
    try:
        if name in _NUMBERED and number:
            return _NUMBERED[name](float(number))
    except ValueError as error:  # no number, or one out of range
        raise ConfigError(f"`--statistics` of {text!r}: {error}") from None
    if text not in ("running", "batch"):
        raise ConfigError(
            "`--statistics` must be running, batch, mix:WEIGHT (of the running ones) or "
            f"prior:SAMPLES, got {text!r}"
        )
    return text


def _evaluate(request: Request, config: Config, launched: Launched | None) -> Evaluation:
    workers = join(request.device, launched, config.launch.timeout_seconds)
    try:
        return evaluate_run(
            request.run,
            config,
            workers,
            request.split,
            request.checkpoint,
            request.allowed,
            has_other_data=bool(request.data),
            statistics=_statistics(request.statistics),
        )
    finally:
        dist.destroy_process_group()


def _print(request: Request, found: Evaluation) -> None:
    if not found.is_first:
        return
    if request.as_json:
        facts = {"run": str(request.run), "step": found.step, "split": found.split}
        print(json.dumps({**facts, "samples": found.samples, "metrics": found.metrics}), flush=True)
        return
    for name, value in found.metrics.items():
        print(f"{found.split} {format_metric(name, value)}", flush=True)


def _start_workers(request: Request, config: Config, count: int) -> None:
    forks = can_fork(choose_device(request.device, 0, count))
    if forks:
        prepare_to_fork()
    work = partial(_work, request, config)
    try:
        with env.for_workers(), interrupt.for_launcher():
            failure = run_once(work, count, forks, _PATIENCE_SECONDS)
    except interrupt.Stopped as stopped:
        raise LocalRunError(f"stopped by {stopped.number.name}", 128 + stopped.number) from None
    if failure is not None:
        raise LocalRunError(failure.reason)


def _work(request: Request, config: Config) -> NoReturn:
    launched = read_launched()
    assert launched is not None
    end_with(partial(_evaluate_as_launched, request, config, launched), launched)


@record
def _evaluate_as_launched(request: Request, config: Config, launched: Launched) -> None:
    die_with_parent(launched.launcher_pid)
    _print(request, _evaluate(request, config, launched))
