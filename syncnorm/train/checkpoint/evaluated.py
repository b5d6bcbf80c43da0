"""The evaluated model in a checkpoint: the moving average, if there is one."""

from torch import Tensor

from syncnorm.train.checkpoint.snapshot import Snapshot


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
