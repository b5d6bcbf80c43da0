"""The errors of a run, for the person who started it, and the command's status after a stop."""

from pathlib import Path

from syncnorm.errors import SyncnormError

# EX_TEMPFAIL of sysexits.h, a temporary failure to be tried again. Schedulers know it.
RESUMABLE = 75


class RunError(SyncnormError):
    """A run or a command failed or was stopped; the message is for the person who started it.

    Args:
        message: the reason.
        exit_code: of the command.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RunStopped(RunError):
    """A run was stopped, has saved, and can be resumed.

    Args:
        message: the reason.
        folder: of the run.
        number: of the signal that stopped it; None if a worker did, or its surroundings.
    """

    def __init__(self, message: str, folder: Path, number: int | None) -> None:
        super().__init__(message, RESUMABLE)
        self.folder = folder
        self.number = number
