"""Metrics of torchmetrics, for those that add up over batches and workers."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from syncnorm.errors import ConfigError, in_one_line
from syncnorm.train.config.section import name_hint

# Where torchmetrics keeps its classes.
_MODULES = ("classification", "regression", "segmentation", "image", "text", "audio", "")


class Meters:
    """Metrics of torchmetrics by name, over outputs and targets.

    Args:
        wanted: by the class's name, its arguments.
        device: of the outputs.

    Raises:
        ConfigError: torchmetrics is missing, has no such metric, or one refuses its arguments or
            keeps all samples in place of sums.
    """

    def __init__(self, wanted: Mapping[str, Mapping[str, Any]], device: torch.device) -> None:
        self._meters = {name: _make(name, options, device) for name, options in wanted.items()}

    @property
    def names(self) -> list[str]:
        """Their names."""
        return list(self._meters)

    def reset(self) -> None:
        """Begin an evaluation."""
        for meter in self._meters.values():
            meter.reset()

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Raises:
            ConfigError: a metric refuses it.
        """
        for name, meter in self._meters.items():
            try:
                meter.update(outputs, targets)
            except (ValueError, TypeError, RuntimeError) as error:
                cause = " ".join(str(error).split())
                raise ConfigError(f"`task.metrics.{name}` must suit the task: {cause}") from None

    def gather(self) -> dict[str, float]:
        """Compute each metric over all workers; one of several values has a number with its name.

        *Collectives*: those of torchmetrics, a gathering of each state; every worker must call.
        """
        results: dict[str, float] = {}
        for name, meter in self._meters.items():
            values = torch.as_tensor(meter.compute()).flatten().tolist()
            names = [name] if len(values) == 1 else [f"{name}_{i}" for i in range(len(values))]
            results.update(zip(names, values, strict=True))
        return results


def _make(name: str, options: Mapping[str, Any], device: torch.device) -> Any:
    try:
        torchmetrics: Any = importlib.import_module("torchmetrics")
    except ImportError as error:
        raise ConfigError(
            f"`task.metrics` must be left out where torchmetrics is not installed: {error}. "
            "Install it with: pip install 'syncnorm[metrics]'"
        ) from None
    known = {
        key: value
        for module in _MODULES
        for key, value in vars(getattr(torchmetrics, module, torchmetrics)).items()
        if isinstance(value, type) and issubclass(value, torchmetrics.Metric)
    }
    if name not in known:
        raise ConfigError(
            f"`task.metrics` must name classes of torchmetrics, got {name!r}."
            f"{name_hint(name, known)}"
        )
    try:
        meter = known[name](**options).to(device)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        cause = in_one_line(error)
        raise ConfigError(f"`task.metrics.{name}` must suit it: {cause}") from None
    if not all(isinstance(state, Tensor) for state in meter.metric_state.values()):
        raise ConfigError(
            f"`task.metrics` must add up, but {name} keeps every sample. Some do not if "
            "`thresholds` is a number."
        )
    return meter.set_dtype(torch.float64)
