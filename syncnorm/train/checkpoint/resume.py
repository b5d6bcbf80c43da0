"""Going on from the newest good checkpoint of a run."""

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from syncnorm.errors import CheckpointError
from syncnorm.train.checkpoint.capture import check_same, restore
from syncnorm.train.checkpoint.progress import Position
from syncnorm.train.checkpoint.store import CheckpointStore
from syncnorm.train.setup import Learner


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on from.

    Args:
        source: name of the checkpoint; None if there is none, and the run begins.
        faults: what was wrong with newer ones.
    """

    source: str | None
    faults: list[str] = field(default_factory=list)


def resume(learner: Learner, position: Position, store: CheckpointStore | None) -> Resumed:
    """Put the newest good checkpoint's state in place on every worker.

    *Collectives*: one broadcast; every worker must call.

    Args:
        learner: freshly built; left as it is if there is no checkpoint.
        position: becomes that of the checkpoint.
        store: of the first worker, which alone reads; None on the others.

    Raises:
        CheckpointError: the checkpoint is of another configuration; on all workers.
    """
    found: list[Any] = [None]
    if store is not None:
        # A kill after the last save of all would otherwise leave what that one was removing.
        store.clean()
        try:
            snapshot, path, faults = store.newest()
            if snapshot is not None:
                check_same(learner.config, snapshot)
            found = [(snapshot, None if path is None else path.name, faults)]
        except CheckpointError as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], CheckpointError):
        raise found[0]
    snapshot, source, faults = found[0]
    if snapshot is not None:
        restore(learner, position, snapshot)
    return Resumed(source, faults)
