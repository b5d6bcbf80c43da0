"""One worker of a run, whoever launched it: join the others, train, say how it ended."""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from syncnorm.errors import ConfigError
from syncnorm.run.device import choose_device
from syncnorm.run.env import Launched
from syncnorm.run.folder import Exit, make_run_folder
from syncnorm.run.parent import die_with_parent
from syncnorm.train.config import Config
from syncnorm.train.loop import Outcome, Position, train
from syncnorm.train.workers import Workers

# How long a worker waits for the others before it says that they are gone; torch's default is half an hour.
GROUP_TIMEOUT = timedelta(seconds=60)


def run_worker(config: Config, name: str, launched: Launched) -> NoReturn:
    """Do `work`, and end this process with status 0 or 1."""
    status = 0
    try:
        work(config, name, launched)
    except Exception:
        if launched.launcher_pid is None:
            raise
        # Our own launcher has the cause from the worker's error file and tells it once, not once per worker.
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: DDP keeps the process group alive, and a thread of gloo's that lets go of its last message while the
    # interpreter is taken down aborts the process. One run in 15 ended so.
    os._exit(status)


@record
def work(config: Config, name: str, launched: Launched) -> None:
    """Train as the worker that the launcher says this process is.

    Args:
        config: the same on all workers.
        name: of the configuration, for the run's folder.
        launched: which worker this is.
    """
    die_with_parent(launched.launcher_pid)
    # Ctrl-C ends a worker at once; as a KeyboardInterrupt it would wait for the message in flight.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    workers = join(config.launch.device, launched)
    folder = _agree(config, name, launched)
    position = Position()
    try:
        outcome = train(config, workers, folder, position)
    except Exception as error:
        if workers.is_first:
            Exit("failed", f"{type(error).__name__}: {error}", position.step, 1).write(folder)
        raise
    if workers.is_first:
        Exit("done", "all epochs done", position.step, 0).write(folder)
        print("\n".join(_summary(outcome, folder)), flush=True)
    dist.destroy_process_group()


def join(wanted_device: str, launched: Launched | None) -> Workers:
    """Join the other workers, if there are any, in a default process group.

    Args:
        wanted_device: the configuration's `launch.device`.
        launched: which worker this is; None: the only one.
    """
    rank, world_size, local = 0, 1, (0, 1)
    if launched is not None:
        rank, world_size, local = launched.rank, launched.world_size, (launched.local_rank, launched.local_world_size)
    device = choose_device(wanted_device, *local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if launched is None:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=GROUP_TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=GROUP_TIMEOUT)
    return Workers(rank, world_size, device)


def _agree(config: Config, name: str, launched: Launched) -> Path:
    """Return the run's folder, the same on all workers, after a look at whether they have the same task."""
    folder = launched.run_folder
    if folder is None and launched.rank == 0:
        folder = make_run_folder(config, name)
    answers: list[tuple[str, Path | None]] = [("", None)] * launched.world_size
    dist.all_gather_object(answers, (config.model_dump_json(), folder))
    different = [rank for rank, (task, _) in enumerate(answers) if task != answers[0][0]]
    if different:
        raise ConfigError(f"configuration {name!r} of workers {different} differs from that of worker 0")
    folder = answers[0][1]
    assert folder is not None
    return folder


def _summary(outcome: Outcome, folder: Path) -> list[str]:
    digests = outcome.digests
    lines = [f"running statistics of worker {rank}: sha256 {digest}" for rank, digest in enumerate(digests)]
    if len(set(digests)) == 1:
        lines.append(f"running statistics: equal on all {len(digests)} workers")
    else:
        lines.append(f"running statistics: different on {len(set(digests))} of {len(digests)} workers")
        lines.append("each worker judged its share of the test set by its own; the checkpoint holds those of worker 0")
    return [*lines, f"test accuracy {100 * outcome.test_accuracy:.2f} %", str(folder)]
