"""Waiting on all workers for something that the first one does by itself."""

from collections.abc import Callable

import torch.distributed as dist

# Far below every time limit of a worker, which the others would reach as they wait.
_LOOK_SECONDS = 0.3


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
