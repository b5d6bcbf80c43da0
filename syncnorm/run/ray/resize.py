"""No step is lost when Ray changes the number of workers."""

import time
from pathlib import Path

from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import TrainControllerState

from syncnorm.run.folder import read_exit
from syncnorm.run.ray.worker import RESIZE

_POLL_SECONDS = 0.1


class SaveBeforeResize(ControllerCallback):
    """Has the workers save before Ray Train ends them to start more or fewer.

    Ray has no public hook there; it takes callbacks of this kind in `RunConfig`, and calls this one
    in its controller.

    Args:
        folder: of the run.
        patience_seconds: how long to wait for the workers.
    """

    def __init__(self, folder: Path, patience_seconds: float) -> None:
        self._folder = folder
        self._patience = patience_seconds

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Wait for the save, where the state says that the number is about to change."""
        if type(current_state).__name__ != "ResizingState":
            return
        ask = self._folder / RESIZE
        ask.touch()
        deadline = time.monotonic() + self._patience
        # Written once the state is on disk.
        while read_exit(self._folder) is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        ask.unlink(missing_ok=True)
