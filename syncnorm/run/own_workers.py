"""Workers that a command starts on this machine for one piece of work, and waits for."""

from collections.abc import Callable
from functools import partial
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import record

from syncnorm.errors import ConfigError
from syncnorm.run import env, interrupt
from syncnorm.run.env import Launched, read_launched
from syncnorm.run.errors import RunError
from syncnorm.run.in_process import ends_are_errors, errors_in_one_line
from syncnorm.run.local import run_once
from syncnorm.run.machine import choose_device
from syncnorm.run.processes import can_fork, prepare_to_fork
from syncnorm.run.worker import end_with
from syncnorm.system import die_with_parent

_PATIENCE_SECONDS = 30.0
Work = Callable[[Launched | None], object]


def check_device(device: str) -> None:
    """Refuse other devices than auto, cpu and cuda.

    Raises:
        ConfigError: it is another.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"`--device` must be auto, cpu or cuda, got {device!r}")


def run_on(work: Work, workers: int | None, launched: Launched | None, device: str) -> None:
    """Do some work in this process, on workers of its own, or as one worker of a launcher.

    Args:
        work: given this worker's rank, None in this process alone. Workers get a pickle of it.
        workers: to start on this machine; None: this process alone.
        launched: this worker's rank; None outside a launcher.
        device: auto, cpu or cuda.

    Raises:
        ConfigError: bad input.
        RunError: code of the user's failed, or a worker was lost.
    """
    if launched is not None and workers is not None:
        raise ConfigError(
            f"`--workers` must be left to the launcher, which started {launched.world_size}, got "
            f"{workers}."
        )
    if workers is None or workers == 1:
        with errors_in_one_line(0 if launched is None else launched.rank):
            work(launched)
    else:
        _start(work, workers, device)


def _start(work: Work, count: int, device: str) -> None:
    forks = can_fork(choose_device(device, 0, count))
    if forks:
        prepare_to_fork()
    try:
        with env.for_workers(), interrupt.for_launcher():
            failure = run_once(partial(_work, work), count, forks, _PATIENCE_SECONDS)
    except interrupt.Stopped as stopped:
        raise RunError(f"stopped by {stopped.number.name}", 128 + stopped.number) from None
    if failure is not None:
        raise RunError(failure.reason)


def _work(work: Work) -> NoReturn:
    launched = read_launched()
    assert launched is not None
    end_with(partial(_as_launched, work, launched), launched)


@record
def _as_launched(work: Work, launched: Launched) -> None:
    die_with_parent(launched.launcher_pid)
    with ends_are_errors():
        work(launched)
