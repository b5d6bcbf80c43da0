"""CrossQ of sb3-contrib: its batch renormalisation becomes ours.

model = CrossQ("MlpPolicy", "Pendulum-v1")
convert_policy(model.policy)
model.learn(10_000)
"""

from __future__ import annotations

from typing import Any

from sb3_contrib.common.torch_layers import BatchRenorm1d  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from syncnorm.errors import InputError
from syncnorm.layers import SyncBatchRenorm
from syncnorm.maths.renorm import RenormSchedule

_OURS = {"ra_mean": "running_mean", "ra_var": "running_var", "steps": "num_batches_tracked", "scale": "weight"}


class CrossQRenorm(SyncBatchRenorm, BatchRenorm1d):
    """Ours, and still theirs to CrossQ, which sets the mode of its layers by class, and to its saved models."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for theirs, ours in _OURS.items():
            destination[prefix + theirs] = destination.pop(prefix + ours)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for theirs, ours in _OURS.items():
            if prefix + theirs in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
        super()._load_from_state_dict(state_dict, prefix, *args)


def convert_policy(policy: nn.Module, *, process_group: Any = None, sync: str = "batch") -> nn.Module:
    """Make the BatchRenorm1d layers of a CrossQ policy ours, in place, with all their numbers.

    Parameters stay the tensors that the optimizers hold. Momentum, eps, bounds, the length of the warm-up and the clock
    stay, too (`steps > warmup_steps` there is a switch at warmup_steps + 1 here), and the variance goes on being
    averaged (`running_average="var"`). Evaluation gives what it gave. In training, batches are normalised by the biased
    variance, as in the paper; sb3-contrib takes the unbiased one, which differs by 1 / n.

    State dicts keep sb3-contrib's names, so `model.save` and `CrossQ.load` go on working; what is loaded has the layers
    of sb3-contrib.

    *Collectives*: none. With `sync="batch"` training then pools over `process_group`, where there is one.

    Returns:
        `policy`.

    Raises:
        InputError: a layer has no weight and bias. Nothing was changed.
    """
    layers = {name: m for name, m in policy.named_modules() if isinstance(m, BatchRenorm1d)}
    for name, layer in layers.items():
        if not layer.affine:
            raise InputError(
                f"`policy` must have layers with affine=True, got {layer} at {name!r}. Build it with them."
            )
    for layer in layers.values():
        if isinstance(layer, CrossQRenorm):
            continue
        for store in (layer._parameters, layer._buffers):
            entries = [(_OURS.get(name, name), value) for name, value in store.items()]
            store.clear()
            store.update(entries)  # pyright: ignore[reportArgumentType, reportCallIssue]
        schedule = RenormSchedule.switch(layer.warmup_steps + 1, layer.rmax, layer.dmax)
        layer.__class__ = CrossQRenorm
        layer.track_running_stats = True
        layer.set_up(process_group, sync=sync, schedule=schedule, running_average="var")
    return policy
