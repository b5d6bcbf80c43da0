"""Trial all-reduce of two processes, each `python -m syncnorm.run.loopback RANK FILE`."""

import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# On a busy machine a process may take a minute to import torch.
_DEADLINE_SECONDS = 120.0
_WORLD_SIZE = 2
_SUM = "3"


def try_loopback(deadline_seconds: float = _DEADLINE_SECONDS) -> str | None:
    """Start two processes that all-reduce 1 + 2 over gloo.

    Args:
        deadline_seconds: for all of it.

    Returns:
        None if both have the sum, else the error.
    """
    with tempfile.TemporaryDirectory(prefix="syncnorm-") as folder:
        command = [sys.executable, "-m", "syncnorm.run.loopback"]
        pair = [
            subprocess.Popen(
                [*command, str(rank), str(Path(folder, "store"))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(_WORLD_SIZE)
        ]
        try:
            return _wait(pair, time.monotonic() + deadline_seconds, deadline_seconds)
        finally:
            for process in pair:
                process.kill()
                process.communicate()


def _wait(pair: list[subprocess.Popen[str]], deadline: float, seconds: float) -> str | None:
    for rank, process in enumerate(pair):
        try:
            out, err = process.communicate(timeout=max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            return f"no sum within {seconds:g} seconds"
        if process.returncode != 0:
            return (
                err.strip().splitlines()
                or [f"process {rank} ended with status {process.returncode}"]
            )[-1]
        if out.strip() != _SUM:
            return f"process {rank} has {out.strip()!r}, not {_SUM!r}"
    return None


def _pool(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=_WORLD_SIZE,
        timeout=timedelta(seconds=_DEADLINE_SECONDS),
    )
    value = torch.tensor(rank + 1.0)
    dist.all_reduce(value)
    print(f"{value.item():g}")
    dist.destroy_process_group()


if __name__ == "__main__":
    _pool(int(sys.argv[1]), sys.argv[2])
