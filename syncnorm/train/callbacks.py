"""Points of a run at which code of the user's own is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from syncnorm.train.loop import Run


class Callback:
    """Code of one's own in a run of `syncnorm.fit`: inherit, and override the points you need.

    Every worker calls every point, after the same step, so a callback may exchange messages if all
    workers do. It has a copy of its own on each: what is for one eye or one file belongs behind
    `if run.workers.is_first:`. An exception ends the run; its checkpoints stay.

    A run offers, to be read: `config`, `workers` (rank, world_size, device, is_first), `model` (the
    network in training), `progress` (epoch, step, metrics), `setup.optimizer`; and `stop(reason)`,
    which saves and ends the run after the next step. What a callback changes in the model is part
    of the run only if all workers change it alike. A resumed run begins with new callbacks, from
    `progress.step` on.
    """

    def on_start(self, run: Run) -> None:
        """Called before the first step of this process; a resumed run has done some already."""

    def on_step(self, run: Run, loss: float) -> None:
        """Called after each step.

        Args:
            run: the run.
            loss: of the step, over all workers.
        """

    def on_evaluation(self, run: Run, split: str, metrics: Mapping[str, float]) -> None:
        """Called after each evaluation.

        Args:
            run: the run.
            split: "validation" or "test".
            metrics: by name, the same on all workers; the one that decides comes first.
        """

    def on_epoch(self, run: Run, loss: float) -> None:
        """Called after each epoch, and the evaluation that it ends with.

        Args:
            run: the run.
            loss: the mean of its steps.
        """

    def on_end(self, run: Run, metrics: Mapping[str, Mapping[str, float]]) -> None:
        """Called after the last step of a run that is done or was stopped.

        Args:
            run: the run.
            metrics: the last ones of each split.
        """
