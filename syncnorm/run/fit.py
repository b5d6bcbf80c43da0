"""`syncnorm.fit`: a training run from a program or a notebook."""

import itertools
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch.distributed as dist
from torch import nn

from syncnorm.errors import ConfigError
from syncnorm.run.ending import Exit, read_exit
from syncnorm.run.env import read_launched
from syncnorm.run.errors import RunStopped
from syncnorm.run.given import Constant, Given, name_of
from syncnorm.run.local import run_local
from syncnorm.run.notebook import Follower, is_notebook
from syncnorm.run.request import RunRequest
from syncnorm.run.resume import choose_config
from syncnorm.run.worker import work_in_program
from syncnorm.train.callbacks import Callback
from syncnorm.train.config.callables import GIVEN, check_callables
from syncnorm.train.config.file import Written, check, from_values, set_values
from syncnorm.train.data.datasets import Dataset, types_of
from syncnorm.train.data.splits import Splits

__all__ = ["Callback", "Result", "fit"]

_calls = itertools.count(1)
_lock = threading.Lock()


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Args:
        folder: of the run: `metrics.jsonl`, `checkpoints`, `exit.json`.
        is_done: True if it came to its end; False if it was asked to stop, has saved, and can be
            resumed.
        reason: for its end.
        step: optimizer steps done.
        metrics: the last ones of each split, such as `{"test": {"accuracy": 0.99}}`; the one that
            decides comes first.
    """

    folder: Path
    is_done: bool
    reason: str
    step: int
    metrics: dict[str, dict[str, float]]


@contextmanager
def _alone() -> Iterator[None]:
    """Refuse a call while another thread makes one.

    Workers learn of their run by the environment of this process, and of what is given by one table.
    """
    if not _lock.acquire(blocking=False):
        raise ConfigError(
            "`fit` must be called by one thread of a program at a time, got a call while another is "
            "under way. Make the calls one after the other, or in processes of their own."
        )
    try:
        yield
    finally:
        _lock.release()


@_alone()
def fit(
    config: str | Path | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    *,
    dataset: Any = None,
    model: Any = None,
    task: Any = None,
    callbacks: Sequence[Callback] = (),
    resume: str | Path | None = None,
    allow: Sequence[str] = (),
) -> Result:
    """Train, as `syncnorm train` does: on workers of this machine, or as one worker of torchrun.

    Workers are forks of this process where it has a single thread, and else new processes, to which
    everything given is sent. In a script the call then belongs behind
    `if __name__ == "__main__":`, as with any use of multiprocessing. In a notebook the progress is
    shown in the cell.

    Args:
        config: a YAML file, the name of a packed configuration, or its keys and values. Sections
            `data`, `model` and `task` need no name where an object is given for them. With
            `resume`, the run's own if left out.
        overrides: values for dotted keys, such as `{"train.lr": 0.1}`.
        dataset: a `Splits` or a `Dataset` (syncnorm.train.data), or a function that returns one:
            it is called with `data.root` and `data.options`.
        model: a network, or a function or class that makes one of `model.options` and those of
            in_channels, num_classes and norm_layer that it takes.
        task: an object with `loss`, `metrics` and `best` (syncnorm.train.task.Task), or a function
            or class that makes one of `task.options`.
        callbacks: see `Callback`.
        resume: the folder or the address of the run to go on with.
        allow: packages whose callables the configuration may name.

    Returns:
        The result; the same on all workers of torchrun.

    Raises:
        ConfigError: the configuration, or what is given, cannot be used.
        RunError: a worker failed; as a RunStopped, a signal other than Ctrl-C's stopped the run, when
            all workers have saved.
        KeyboardInterrupt: after Ctrl-C, when all workers have saved.
    """
    given, named = _given(dataset, model, task)
    others = [callbacks]
    if isinstance(callbacks, Sequence):
        others = [each for each in callbacks if not isinstance(each, Callback)]
    if others:
        raise ConfigError(
            f"`callbacks` must be a list of Callback objects, got {types_of(others[0])}"
        )
    written = _written(config, resume)
    set_values(written, {**overrides, **named})
    launched = read_launched()
    follower = Follower() if launched is None and is_notebook() else None
    run = RunRequest(
        check(written),
        "fit" if isinstance(config, Mapping) else written.path.stem,
        None if resume is None else str(resume),
        tuple(allow),
        Given(given, callbacks),
        shows=follower is None,
        prints=False,
    )
    run.given.give()
    check_callables(run.config, run.allowed)
    if launched is not None:
        if dist.is_initialized():
            raise ConfigError("`fit` makes the process group itself: call it before there is one")
        # A second run of the same launch is another one, also after torchrun has restarted both.
        number = next(_calls)
        if launched.launch_id is not None:
            launched = replace(launched, launch_id=f"{launched.launch_id} {number}")
        return _result(*work_in_program(run, launched))
    if follower is None:
        return _run(run)
    with follower:
        return _run(run, follower.begin)


def _run(request: RunRequest, begin: Callable[[Path], None] | None = None) -> Result:
    try:
        folder = run_local(request, begin)
    except RunStopped as stopped:
        if stopped.number == signal.SIGINT:
            raise KeyboardInterrupt(str(stopped)) from None
        if stopped.number is not None:
            raise
        folder = stopped.folder
    end = read_exit(folder)
    assert end is not None, "a run that is over has recorded its end"
    return _result(folder, end)


def _result(folder: Path, end: Exit) -> Result:
    return Result(folder, end.status == "done", end.reason, end.step, end.metrics)


def _given(
    dataset: Any, model: Any, task: Any
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Return the callables by their names, and the keys that get these names."""
    callables, named = {}, {}
    for key, what, given, is_object, rule in (
        (
            "data.name",
            "dataset",
            dataset,
            isinstance(dataset, Dataset | Splits),
            "a Splits or a Dataset, or a callable that makes one",
        ),
        (
            "model.name",
            "model",
            model,
            isinstance(model, nn.Module),
            "a network, or a callable that makes one",
        ),
        (
            "task.name",
            "task",
            task,
            not isinstance(task, type) and hasattr(task, "loss"),
            "an object with `loss` and `metrics`, or a callable that makes one",
        ),
    ):
        if given is None:
            continue
        if not is_object and not callable(given):
            raise ConfigError(f"`{what}` must be {rule}, got {types_of(given)}")
        name = f"{GIVEN}:{what}" if is_object else name_of(what, given)
        callables[name] = Constant(given) if is_object else given
        named[key] = name
    return callables, named


def _written(config: str | Path | Mapping[str, Any] | None, resume: str | Path | None) -> Written:
    if isinstance(config, Mapping):
        return from_values(config)
    return choose_config(
        None if config is None else str(config), (), None if resume is None else str(resume)
    )
