"""What workers tell each other, and what the first does by itself while the others wait."""

from collections.abc import Callable
from concurrent import futures
from typing import Any, TypeVar

import torch.distributed as dist

from syncnorm.errors import CheckpointError, ConfigError

T = TypeVar("T")

# Far below every time limit of a worker, which the others would reach as they wait.
_LOOK_SECONDS = 0.3


def from_all(mine: T) -> list[T]:
    """Gather an object of each worker, in rank order.

    *Collectives*: one all_gather_object; every worker must call.
    """
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def from_first(is_first: bool, work: Callable[[], T]) -> T:
    """Do something on the first worker, and return its result, or raise its error, on all.

    *Collectives*: one broadcast; every worker must call.

    Args:
        is_first: True on the first worker, which alone calls `work`.
        work: within the time limit of a collective; its result is pickled.

    Raises:
        ConfigError, CheckpointError: that of the first worker.
    """
    found: list[Any] = [None]
    if is_first:
        try:
            found = [work()]
        except (ConfigError, CheckpointError) as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], ConfigError | CheckpointError):
        raise found[0]
    return found[0]


def in_thread_of_first(
    work: Callable[[], T] | None, alive: Callable[[], None]
) -> "futures.Future[T] | None":
    """Do something in a thread on the first worker, however long that takes.

    *Collectives*: as of `wait_for_first`; every worker must call.

    Args:
        work: None where there is nothing to do, as on all others.
        alive: called meanwhile, on every worker.

    Returns:
        What has come of it; None where there was nothing to do.
    """
    if work is None:
        wait_for_first(None, alive)
        return None
    thread = futures.ThreadPoolExecutor(1)
    future = thread.submit(work)
    thread.shutdown(wait=False)
    wait_for_first(lambda seconds: bool(futures.wait([future], seconds).done), alive)
    return future


def wait_for_first(is_over: Callable[[float], bool] | None, alive: Callable[[], None]) -> None:
    """Wait until something is over on the first worker, however long that takes.

    *Collectives*: a broadcast every now and then; every worker must call.

    Args:
        is_over: waits so many seconds at most, and tells; None if there is nothing to wait for.
            That of the first worker alone counts.
        alive: called meanwhile, on every worker.
    """
    while True:
        over = [is_over is None or is_over(_LOOK_SECONDS)]
        dist.broadcast_object_list(over, src=0)
        alive()
        if over[0]:
            return
