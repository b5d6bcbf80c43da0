"""A callback in Ray Train's controller, so that no step is lost when the world size changes."""

import time
from pathlib import Path

from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import TrainControllerState

from syncnorm.run.ending import read_exit
from syncnorm.run.ray.worker import RESIZE
from syncnorm.train.files import open_to_write

_POLL_SECONDS = 0.1


class SaveBeforeResize(ControllerCallback):
    """Callback that makes the workers save before Ray Train ends them to start more or fewer.

    Ray has no public hook for this. It accepts internal callbacks in `RunConfig` and calls them in
    its controller.

    Args:
        folder: of the run.
        patience_seconds: limit of the wait for the workers.
    """

    def __init__(self, folder: Path, patience_seconds: float) -> None:
        self._folder = folder
        self._patience = patience_seconds

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Ask for a save and wait for it, if Ray is about to change the number of workers."""
        if type(current_state).__name__ != "ResizingState":
            return
        ask = self._folder / RESIZE
        open_to_write(ask).close()
        deadline = time.monotonic() + self._patience
        # exit.json is written once the checkpoint is on disk.
        while read_exit(self._folder) is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        ask.unlink(missing_ok=True)
