"""Metrics of torchmetrics, for those that add up over batches and workers."""

import copy
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from syncnorm.errors import ConfigError, in_one_line
from syncnorm.train.config.section import name_hint
from syncnorm.train.waiting import from_all

# Gathers a state: of all workers, in rank order.
Gather = Callable[..., list[Tensor]]

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
            except Exception as error:
                raise ConfigError(
                    f"`task.metrics.{name}` must suit the task: {in_one_line(error)}"
                ) from None

    def check(self, add: Callable[[], object]) -> None:
        """Compute each metric as if three workers had a batch each, and one had all three.

        No exchange.

        Args:
            add: adds a batch, the same at each call.

        Raises:
            ConfigError: it is not the same, cannot be computed of several workers' states, or is
                something else than numbers.
        """
        self.reset()
        add()
        of_three = {
            name: _compute(
                name, copy.deepcopy(meter), lambda state, group=None: [state.clone()] * 3
            )
            for name, meter in self._meters.items()
        }
        add()
        add()
        for name, meter in self._meters.items():
            of_one, several = meter.compute(), of_three[name]
            if not isinstance(of_one, Tensor):
                raise ConfigError(
                    f"`task.metrics.{name}` must give a number, or several in one tensor, got "
                    f"{type(of_one).__name__}. It measures a curve: choose a figure of it."
                )
            if not torch.allclose(several, of_one, equal_nan=True):
                raise ConfigError(
                    f"`task.metrics.{name}` must be the same on any number of workers, got "
                    f"{several.tolist()} of three with a batch each, and {of_one.tolist()} of one "
                    "with all three"
                )

    def gather(self) -> dict[str, float]:
        """Compute each metric over all workers; one of several values has a number with its name.

        *Collectives*: a gathering of who has samples, and of each state; every worker must call.
        """
        from torchmetrics.utilities.distributed import gather_all_tensors

        def gather(state: Tensor, group: Any = None) -> list[Tensor]:
            states = gather_all_tensors(state, group)
            # A state of nothing is not always neutral: some metrics divide by its count.
            return [
                one for one, counts in zip(states, has_samples, strict=True) if counts
            ] or states

        results: dict[str, float] = {}
        for name, meter in self._meters.items():
            has_samples = from_all(bool(meter.update_called))
            values = _compute(name, meter, gather).flatten().tolist()
            names = [name] if len(values) == 1 else [f"{name}_{i}" for i in range(len(values))]
            results.update(zip(names, values, strict=True))
        return results


def _compute(name: str, meter: Any, gather: Gather) -> Any:
    """Compute a metric of the states that `gather` gives.

    Raises:
        ConfigError: it cannot be computed of them.
    """
    try:
        with meter.sync_context(dist_sync_fn=gather, distributed_available=lambda: True):
            return meter.compute()
    except Exception as error:  # some are not made for several workers, and fail anyhow
        raise ConfigError(
            f"`task.metrics.{name}` must be one that several workers can measure together, got "
            f"{in_one_line(error)}"
        ) from None


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
        meter = known[name](**{**options, "sync_on_compute": False}).to(device)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        cause = in_one_line(error)
        raise ConfigError(f"`task.metrics.{name}` must suit it: {cause}") from None
    if not all(isinstance(state, Tensor) for state in meter.metric_state.values()):
        raise ConfigError(
            f"`task.metrics` must add up, but {name} keeps every sample. Some do not if "
            "`thresholds` is a number."
        )
    return meter.set_dtype(torch.float64)
