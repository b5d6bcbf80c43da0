"""The evaluated model in a checkpoint: the moving average, if there is one."""

import logging
from pathlib import Path

from torch import Tensor, nn

from syncnorm.errors import CheckpointError, ConfigError
from syncnorm.train import buffers
from syncnorm.train.checkpoint.snapshot import MANIFEST, Snapshot
from syncnorm.train.checkpoint.store import CHECKPOINTS, CheckpointStore
from syncnorm.train.waiting import from_first
from syncnorm.train.workers import Workers

NEWEST, BEST = "newest", "best"
# The name of a checkpoint, and of its folder, whose running statistics were computed anew.
RECALIBRATED = "recalibrated"

_log = logging.getLogger(__name__)


def read_evaluated(folder: Path, checkpoint: str = NEWEST) -> Snapshot:
    """Read a checkpoint of a run. Newer ones that are damaged are logged.

    Args:
        folder: of the run.
        checkpoint: newest, best, recalibrated, or the name of a folder in `checkpoints`.

    Raises:
        ConfigError: it is not there, or damaged.
    """
    where = folder / (RECALIBRATED if checkpoint == RECALIBRATED else CHECKPOINTS)
    if not where.is_dir():
        remedy = f"Make it: syncnorm recalibrate {folder}"
        if checkpoint != RECALIBRATED:
            remedy = "Name the folder of a run that has saved one."
        raise ConfigError(f"run {str(folder)!r} has no {where.name}. {remedy}")
    store = CheckpointStore(where)
    try:
        if checkpoint not in (NEWEST, RECALIBRATED):
            return _read(store, checkpoint)
        snapshot, _, faults = store.newest()
    except (OSError, CheckpointError) as error:
        raise ConfigError(f"{where}: {error}") from None
    if snapshot is None:
        raise ConfigError(faults[0] if faults else f"{where}: holds no checkpoint")
    for fault in faults:
        _log.warning("a newer checkpoint is left out: %s", fault)
    return snapshot


def _read(store: CheckpointStore, checkpoint: str) -> Snapshot:
    path = _find(store, checkpoint)
    try:
        return store.read(path)
    except CheckpointError:
        if _find(store, checkpoint) == path:
            raise
    # Another one has become the best meanwhile, and this one was pruned.
    return _read(store, checkpoint)


def _find(store: CheckpointStore, checkpoint: str) -> Path:
    if checkpoint == BEST:
        path = store.best()
        if path is None:
            raise ConfigError(
                f"{store.folder}: no checkpoint is marked as the best one. With a validation set, "
                "data.validation, a run marks it."
            )
        return path
    path = store.folder / checkpoint
    if Path(checkpoint).name != checkpoint or not (path / MANIFEST).is_file():
        there = sorted(each.parent.name for each in store.folder.glob(f"*/{MANIFEST}"))
        raise ConfigError(
            f"`--checkpoint` must be {NEWEST}, {BEST}, {RECALIBRATED} or one of "
            f"{', '.join(there) or 'none'}, got {checkpoint!r}"
        )
    return path


def share_evaluated(folder: Path, checkpoint: str, workers: Workers) -> Snapshot:
    """Read a checkpoint on the first worker, and send it to all.

    *Collectives*: one broadcast; every worker must call.

    Raises:
        ConfigError: see `read_evaluated`; on all workers.
    """
    return from_first(workers.is_first, lambda: read_evaluated(folder, checkpoint))


def load_evaluated(model: nn.Module, snapshot: Snapshot, folder: Path) -> None:
    """Fill a model, in place, with the evaluated state of a run.

    Raises:
        ConfigError: it does not fit.
    """
    try:
        buffers.load(model, evaluated_state(snapshot), evaluated_unsaved(snapshot))
    except (RuntimeError, TypeError, AttributeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{folder / CHECKPOINTS}: does not fit the run's configuration: {reason:.300}"
        ) from None


def evaluated_state(snapshot: Snapshot) -> dict[str, Tensor]:
    """The state of the evaluated model: of the moving average if there is one."""
    if "ema" not in snapshot.tensors:
        return snapshot.tensors["model"]
    return _of_module(snapshot.tensors["ema"])


def evaluated_unsaved(snapshot: Snapshot) -> dict[str, Tensor]:
    """The buffers of the evaluated model that its state leaves out."""
    unsaved = snapshot.states.get("buffers", {})
    return (
        _of_module(unsaved.get("ema", {}))
        if "ema" in snapshot.tensors
        else unsaved.get("model", {})
    )


def _of_module(average: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "module."
    return {
        name.removeprefix(prefix): value
        for name, value in average.items()
        if name.startswith(prefix)
    }
