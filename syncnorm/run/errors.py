"""The error of a run, for the person who started it."""

from syncnorm.errors import SyncnormError


class LocalRunError(SyncnormError):
    """A local run failed or was stopped; the message is for the person who started it.

    Args:
        message: the reason.
        exit_code: of the command.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
