"""CrossQ of sb3-contrib with our batch renormalisation: `convert_policy(model.policy)`."""

from __future__ import annotations

from typing import Any

from sb3_contrib.common.torch_layers import BatchRenorm1d  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from syncnorm.errors import InputError
from syncnorm.layers import SyncBatchRenorm
from syncnorm.maths.renorm import RenormSchedule

_OURS = {
    "ra_mean": "running_mean",
    "ra_var": "running_var",
    "steps": "num_batches_tracked",
    "scale": "weight",
}


class CrossQRenorm(SyncBatchRenorm, BatchRenorm1d):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Our layer as a subclass of sb3-contrib's, with the names of its state dicts.

    CrossQ sets the training mode of its layers by class.
    """

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for theirs, ours in _OURS.items():
            destination[prefix + theirs] = destination.pop(prefix + ours)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for theirs, ours in _OURS.items():
            if prefix + theirs in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
        super()._load_from_state_dict(state_dict, prefix, *args)


def convert_policy(
    policy: nn.Module, *, process_group: Any = None, sync: str = "batch"
) -> nn.Module:
    """Convert the BatchRenorm1d layers of a CrossQ policy to ours, in place.

    Parameters stay the tensors that the optimizers hold. Momentum, eps, bounds, warm-up, clock and
    averages keep their values. Evaluation gives the same outputs. In training, batches are
    normalised by the biased variance, as in the paper; sb3-contrib takes the unbiased one, larger
    by n / (n - 1), and after the warm-up divides by sqrt(var / r^2 + eps), which for a variance of
    the size of eps is not sqrt(var + eps) / r, the paper's. State dicts keep sb3-contrib's names:
    `model.save` works, and `CrossQ.load` gives a policy with its layers.

    *Collectives*: none. With `sync="batch"` training then pools over `process_group`, where there
    is one.

    Returns:
        `policy`.

    Raises:
        InputError: a layer has no weight and bias. Nothing was changed.
    """
    layers: dict[str, Any] = {
        name: m for name, m in policy.named_modules() if isinstance(m, BatchRenorm1d)
    }
    for name, layer in layers.items():
        if not layer.affine:
            raise InputError(
                f"`policy` must have layers with affine=True, got {layer} at {name!r}. Build it "
                "with them."
            )
    for layer in layers.values():
        if not isinstance(layer, CrossQRenorm):
            _convert(layer, process_group, sync)
    return policy


def _convert(layer: Any, process_group: Any, sync: str) -> None:
    for store in (layer._parameters, layer._buffers):
        entries = [(_OURS.get(name, name), value) for name, value in store.items()]
        store.clear()
        store.update(entries)
    # In sb3-contrib the warm-up lasts while steps <= warmup_steps.
    schedule = RenormSchedule.switch(layer.warmup_steps + 1, layer.rmax, layer.dmax)
    layer.__class__ = CrossQRenorm
    layer.track_running_stats = True
    layer.set_up(process_group, sync=sync, schedule=schedule, running_average="var")
