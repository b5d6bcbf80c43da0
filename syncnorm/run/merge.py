"""The command `syncnorm merge`: in this process, or as one worker of torchrun."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch.distributed as dist

from syncnorm.errors import ConfigError
from syncnorm.run.env import Launched
from syncnorm.run.folder import write_config
from syncnorm.run.in_process import errors_in_one_line
from syncnorm.run.worker import join
from syncnorm.train import files
from syncnorm.train.checkpoint.store import CHECKPOINTS, CheckpointStore
from syncnorm.train.config.schema import Config
from syncnorm.train.finished.load import read_run
from syncnorm.train.finished.merge import Merged, merge_runs
from syncnorm.train.task.measures import format_metric, format_value
from syncnorm.train.waiting import from_first


@contextmanager
def _made(output: Path, is_first: bool) -> Iterator[None]:
    """Make the new run's folder, and take it away again if the block fails.

    *Collectives*: one broadcast; every worker must call.

    Raises:
        ConfigError: it cannot be made; on all workers, before the work.
    """
    from_first(is_first, partial(_make, output))
    try:
        yield
    except BaseException:
        if is_first:
            files.remove(output)
        raise


def _make(output: Path) -> None:
    if output.exists():
        raise ConfigError(f"`--output` must be a new folder, got {str(output)!r}, which is there")
    try:
        output.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"`--output` must be a folder that can be made, got {str(output)!r}: {error.strerror}"
        ) from None


def _write(result: Merged, config: Config, output: Path) -> None:
    CheckpointStore(output / CHECKPOINTS).write(result.snapshot)
    # Last: it makes the folder a run's.
    write_config(config, output)


def run_merge(
    folders: tuple[Path, Path],
    output: Path,
    alpha: float,
    is_matched: bool,
    allowed: tuple[str, ...],
    launched: Launched | None,
) -> None:
    """Merge two runs into a new one, and print the metrics of all three.

    Raises:
        ConfigError: `alpha` is out of range, `output` is there, or the runs cannot be merged.
        LocalRunError: code that the configuration names failed.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"`--alpha` must be in [0, 1], got {alpha}. 1 is all of the second run.")
    first, second = (read_run(folder, allowed) for folder in folders)
    workers = join(first.launch.device, launched)
    try:
        with errors_in_one_line(workers.rank), _made(output, workers.is_first):
            result = merge_runs(folders, (first, second), alpha, is_matched, workers, allowed)
            if workers.is_first:
                _write(result, first, output)
        if workers.is_first:
            a, b, merged = result.metrics
            for name, value in a.items():
                others = f"{format_value(name, b[name])}, merged {format_value(name, merged[name])}"
                print(f"{result.split} {format_metric(name, value)} and {others}")
            print(output, flush=True)
    finally:
        dist.destroy_process_group()
