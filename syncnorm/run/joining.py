"""The workers' default process group: made for a run or for work on a finished one, and left."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from syncnorm.run.env import Launched, set_for_nccl
from syncnorm.run.machine import choose_device
from syncnorm.train.config.schema import Config
from syncnorm.train.efficiency import set_tf32
from syncnorm.train.workers import Workers

# The watchdog acts first, and writes the stacks of a stuck worker.
GROUP_MARGIN_SECONDS = 30.0


def join(wanted_device: str, launched: Launched | None, timeout_seconds: float) -> Workers:
    """Join the other workers, if there are any, in a default process group.

    Args:
        wanted_device: the configuration's `launch.device`.
        launched: this worker's rank; None for a single process.
        timeout_seconds: of collectives, and half a minute more; torch's default is half an hour.
    """
    rank, world_size, local = 0, 1, (0, 1)
    if launched is not None:
        rank, world_size, local = (
            launched.rank,
            launched.world_size,
            (launched.local_rank, launched.local_world_size),
        )
    device = choose_device(wanted_device, *local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        set_for_nccl()
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds + GROUP_MARGIN_SECONDS)
    if dist.is_initialized():  # by Ray
        pass
    elif launched is None:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    return Workers(rank, world_size, device, local[1])


@contextmanager
def joined(config: Config, device: str, launched: Launched | None) -> Iterator[Workers]:
    """Join the other workers for work on a finished run, and leave them after the block.

    Args:
        config: of the run.
        device: auto, cpu or cuda.
        launched: this worker's rank; None for a single process.
    """
    workers = join(device, launched, config.launch.patience_seconds)
    set_tf32(config.train.tf32)
    try:
        yield workers
    finally:
        dist.destroy_process_group()


def meet(workers: Workers) -> None:
    """Wait until all workers are here. *Collectives*: a barrier; every worker must call."""
    # Of several devices NCCL would guess one, and warn.
    device = workers.device
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
