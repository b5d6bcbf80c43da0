"""The exceptions and warnings of syncnorm.

SyncnormError
├── InputError (ValueError)       an argument breaks its rule; raised locally, alike on all workers
├── FaultError (ValueError)       one worker's data breaks a rule; all workers raise the same error
├── ExchangeError (RuntimeError)  workers disagree about an exchange, one is missing, or it broke
├── ConfigError (ValueError)      a configuration file or override cannot be used; exit status 2
└── CheckpointError               a checkpoint is damaged, incomplete or no checkpoint at all

SingleValueWarning (UserWarning)   a statistic was taken over a single value
UnevenShardsWarning (UserWarning)  workers held unequal shards, and the loss was not scaled
"""

from collections.abc import Sequence

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ExchangeError",
    "FaultError",
    "InputError",
    "SingleValueWarning",
    "SyncnormError",
    "UnevenShardsWarning",
]


class SyncnormError(Exception):
    """Base class of every error that syncnorm raises on purpose."""


class InputError(SyncnormError, ValueError):
    """An argument breaks its rule. Raised before any exchange, so no worker is left waiting."""


class FaultError(SyncnormError, ValueError):
    """The data of one worker breaks a rule.

    Carried in the exchange and raised by all workers alike.
    """


class ExchangeError(SyncnormError, RuntimeError):
    """Workers disagree about an exchange, one did not come to it, or it broke.

    The message names layer and ranks. A RuntimeError, as are the errors of torch.distributed. In
    debug mode it is the same on every live worker.
    """


class ConfigError(SyncnormError, ValueError):
    """A configuration cannot be used; the message names the key."""


class CheckpointError(SyncnormError):
    """A checkpoint cannot be used; the message names the file and what is wrong with it."""


def in_one_line(error: BaseException) -> str:
    """Describe an exception in one line: its type and its message."""
    try:
        message = " ".join(str(error).split())
    except Exception:  # a class of the user's may do anything
        message = "without a message that can be read"
    return ": ".join(filter(None, (type(error).__name__, message)))


def join_first(words: Sequence[str], most: int, separator: str = ", ") -> str:
    """Join as many words as a sentence has room for, and say how many more there are."""
    more = len(words) - most
    return separator.join(words[:most]) + (f" and {more} more" if more > 0 else "")


class SingleValueWarning(UserWarning):
    """A training statistic was taken over one value per channel, so the output is the bias."""


class UnevenShardsWarning(UserWarning):
    """Workers held unequally much of a batch, and `scale_loss` was not called."""
