"""Trial all-reduce of two processes."""

import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

# On a busy machine a process may take a minute to import torch.
_DEADLINE_SECONDS = 120.0
_WORLD_SIZE = 2


def try_loopback(deadline_seconds: float = _DEADLINE_SECONDS) -> str | None:
    """Start two processes that all-reduce 1 + 2 over gloo.

    Args:
        deadline_seconds: for all of it.

    Returns:
        None if both have the sum, else the error.
    """
    deadline = time.monotonic() + deadline_seconds
    with tempfile.TemporaryDirectory(prefix="syncnorm-") as folder:
        store = Path(folder, "store").as_uri()
        pair: Any = spawn(_pool, (store,), nprocs=_WORLD_SIZE, join=False)
        try:
            while not pair.join(max(deadline - time.monotonic(), 0)):
                if time.monotonic() > deadline:
                    return f"no sum within {deadline_seconds:g} seconds"
        except (ProcessRaisedException, ProcessExitedException) as error:
            return str(error).strip().splitlines()[-1]
        finally:
            for process in pair.processes:
                process.kill()
                process.join()
    return None


def _pool(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo", store, timedelta(seconds=_DEADLINE_SECONDS), world_size=_WORLD_SIZE, rank=rank
    )
    value = torch.tensor(rank + 1.0)
    dist.all_reduce(value)
    dist.destroy_process_group()
    if value != 3:
        raise ArithmeticError(f"process {rank} has {value:g}, not 3")
