"""The command `syncnorm merge`: in this process, or as one worker of torchrun."""

from contextlib import suppress
from functools import partial
from pathlib import Path

from syncnorm.errors import ConfigError
from syncnorm.run.env import Launched
from syncnorm.run.folder import write_config
from syncnorm.run.joining import joined
from syncnorm.run.own_workers import run_on
from syncnorm.train import files
from syncnorm.train.checkpoint.store import CHECKPOINTS, CheckpointStore
from syncnorm.train.config.schema import Config
from syncnorm.train.finished.load import read_run
from syncnorm.train.finished.merge import Merged, merge_runs
from syncnorm.train.task.measures import format_metric, format_value
from syncnorm.train.waiting import from_first


def _check_output(output: Path) -> None:
    """Raise ConfigError unless the new run's folder can be made, before the work."""
    try:
        if output.exists():
            raise _is_there(output)
        whole = output.resolve()
        missing = [each for each in (whole, *whole.parents) if not each.exists()]
        whole.mkdir(parents=True)
        with suppress(OSError):  # somebody else may have put something there
            for each in missing:
                each.rmdir()
    except OSError as error:
        raise ConfigError(
            f"`--output` must be a folder that can be made, got {str(output)!r}: {error.strerror}"
        ) from None


def _is_there(output: Path) -> ConfigError:
    return ConfigError(f"`--output` must be a new folder, got {str(output)!r}, which is there")


def _write(result: Merged, config: Config, output: Path) -> None:
    """Make the new run's folder, whole or not at all."""
    try:
        output.mkdir(parents=True)
    except FileExistsError:
        raise _is_there(output) from None
    try:
        CheckpointStore(output / CHECKPOINTS).write(result.snapshot)
        # Last: it makes the folder a run's.
        write_config(config, output)
    except BaseException:
        files.remove(output)
        raise


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
        RunError: code that the configuration names failed.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"`--alpha` must be in [0, 1], got {alpha}. 1 is all of the second run.")
    first, second = (read_run(folder, allowed) for folder in folders)
    device = first.launch.device

    def work(launched: Launched | None) -> None:
        with joined(first, device, launched) as workers:
            from_first(workers.is_first, partial(_check_output, output))
            result = merge_runs(folders, (first, second), alpha, is_matched, workers, allowed)
            if workers.is_first:
                _write(result, first, output)
                _print(result, output)

    run_on(work, None, launched, device)


def _print(result: Merged, output: Path) -> None:
    a, b, merged = result.metrics
    for name, value in a.items():
        others = f"{format_value(name, b[name])}, merged {format_value(name, merged[name])}"
        print(f"{result.split} {format_metric(name, value)} and {others}")
    print(output, flush=True)
