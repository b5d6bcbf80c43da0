"""Workers on this machine, started with torch's own elastic launcher."""

import logging
import shutil
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from syncnorm.errors import SyncnormError
from syncnorm.run import env
from syncnorm.run.device import choose_device
from syncnorm.run.failure import Failure, root_cause
from syncnorm.run.folder import Exit, make_run_folder
from syncnorm.train.config import Config
from syncnorm.train.metrics import last_step


class LocalRunError(SyncnormError):
    """A local run ended before its time; the message is for the person who started it."""


def run_local(config: Config, name: str, arguments: Sequence[str]) -> None:
    """Start `launch.workers` workers, each running `syncnorm train ARGUMENTS`, and wait for them.

    Args:
        config: checked already; the workers read it again.
        name: of the configuration, for the run's folder.
        arguments: of the command `syncnorm train`.

    Raises:
        ConfigError: the machine lacks the devices asked for, or the run's folder cannot be made.
        LocalRunError: a worker failed, or this process was told to stop.
    """
    choose_device(config.launch.device, 0, config.launch.workers)
    folder = make_run_folder(config, name)
    env.set_for_workers(folder)
    _silence_agent()
    logs = tempfile.mkdtemp(prefix="syncnorm-")
    try:
        launch = elastic_launch(_launch_config(config.launch.workers, logs), sys.executable)
        launch("-m", "syncnorm", "train", *arguments)
    except ChildFailedError as error:
        raise LocalRunError(_tell(root_cause(error), folder)) from None
    except SignalException as error:
        reason = f"stopped by {error.sigval.name}"
        _record(reason, folder)
        raise LocalRunError(f"{reason}\n{folder}") from None
    finally:
        shutil.rmtree(logs, ignore_errors=True)


def _silence_agent() -> None:
    """Keep torch's account of a failure off the screen: ours says the same in a line."""
    agent = logging.getLogger("torch.distributed.elastic")
    agent.addHandler(logging.NullHandler())
    agent.propagate = False


def _launch_config(workers: int, logs: str) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
    )


def _tell(failure: Failure, folder: Path) -> str:
    """Put the failure on record in the run's folder and into words."""
    _record(failure.reason, folder)
    if not failure.traceback:
        return f"{failure.reason}\n{folder}"
    path = folder / "traceback.txt"
    path.write_text(failure.traceback, encoding="utf-8")
    return f"{failure.reason}\n{path}"


def _record(reason: str, folder: Path) -> None:
    Exit("failed", reason, last_step(folder / "metrics.jsonl"), 1).write(folder)
