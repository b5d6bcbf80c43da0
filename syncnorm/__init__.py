"""syncnorm trains a sharded batch as if it were one batch.

To read the code, begin with `layers.py`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from syncnorm._public import *
    from syncnorm.run.fit import fit as fit
    from syncnorm.train.callbacks import Callback as Callback
    from syncnorm.train.finished.load import load as load

__all__ = [
    "SAM",
    "ElasticBatchSampler",
    "Lagged",
    "Mix",
    "Prior",
    "RenormSchedule",
    "SyncBatchNorm",
    "SyncBatchRenorm",
    "accumulate",
    "adopt_state_dict",
    "conversion_table",
    "convert",
    "convert_sync_batchnorm",
    "debug",
    "evaluation_statistics",
    "explain",
    "frozen_statistics",
    "functional",
    "gather",
    "groups",
    "join",
    "monitor",
    "prepare_ddp",
    "recalibrate",
    "register_adapter",
    "revert",
    "scale_loss",
    "train_only_norms",
]
__version__ = "0.1.0"

# The trainer's names. It needs more packages than torch, so that `from syncnorm import *` is without.
_TRAINER = {"Callback": "train.callbacks", "fit": "run.fit", "load": "train.finished.load"}


def __getattr__(name: str) -> Any:
    """Import torch and all public names with the first of them.

    The command has to be up before that (see `__main__`).
    """
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _TRAINER:
        try:
            return getattr(import_module(f"{__name__}.{_TRAINER[name]}"), name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in ("", __name__, "torch"):
                raise
            raise ModuleNotFoundError(
                f"syncnorm.{name} needs {error.name}. Install it with: pip install "
                "'syncnorm[train]'",
                name=error.name,
            ) from None
    # A module of the package is imported alone: the public names are made of them, and may be half
    # way there.
    if name in __all__ and name not in ("functional", "groups"):
        public = import_module(f"{__name__}._public")
        globals().update((each, getattr(public, each)) for each in __all__)
        return globals()[name]
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_TRAINER})
