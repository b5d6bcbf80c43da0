"""The command `syncnorm evaluate`: in this process, on workers of its own, or under torchrun."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from syncnorm.errors import ConfigError
from syncnorm.model.mixed import Choice, Mix, Prior
from syncnorm.run.env import Launched
from syncnorm.run.joining import joined
from syncnorm.run.own_workers import check_device, run_on
from syncnorm.train.config.schema import Config
from syncnorm.train.finished.evaluate import Evaluation, evaluate_run
from syncnorm.train.finished.load import read_run
from syncnorm.train.metrics import json_value
from syncnorm.train.task.measures import format_metric

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
    device: str
    statistics: str


def run_evaluate(request: Request, workers: int | None, launched: Launched | None) -> None:
    """Evaluate a run's model, and print its metrics.

    Args:
        request: what to evaluate.
        workers: to start on this machine; None: this process alone.
        launched: this worker's rank; None outside a launcher.

    Raises:
        ConfigError: bad input; see `evaluate_run`.
        RunError: code that the configuration names failed, or a worker was lost.
    """
    run_on(partial(_evaluate, request, _read(request)), workers, launched, request.device)


def _read(request: Request) -> Config:
    check_device(request.device)
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


def _evaluate(request: Request, config: Config, launched: Launched | None) -> None:
    with joined(config, request.device, launched) as workers:
        found = evaluate_run(
            request.run,
            config,
            workers,
            request.split,
            request.checkpoint,
            request.allowed,
            has_other_data=bool(request.data),
            statistics=_statistics(request.statistics),
        )
        if workers.is_first:
            _print(request, found)


def _print(request: Request, found: Evaluation) -> None:
    if request.as_json:
        facts = {"run": str(request.run), "step": found.step, "split": found.split}
        facts |= {"samples": found.samples, "metrics": json_value(found.metrics)}
        print(json.dumps(facts, allow_nan=False), flush=True)
        return
    for name, value in found.metrics.items():
        print(f"{found.split} {format_metric(name, value)}", flush=True)
