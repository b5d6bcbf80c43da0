"""Metrics of torchmetrics, for those that add up over batches and workers."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from syncnorm.errors import ConfigError, in_one_line
from syncnorm.train.config.section import name_hint
from syncnorm.train.waiting import from_all

Batch = tuple[Tensor, Tensor]
"""Outputs and targets."""
# Gathers a state: of all workers, in rank order.
Gather = Callable[..., list[Tensor]]

# Where torchmetrics keeps its classes.
_MODULES = (
    "torchmetrics.classification",
    "torchmetrics.regression",
    "torchmetrics.segmentation",
    "torchmetrics.image",
    "torchmetrics.text",
    "torchmetrics.audio",
    "torchmetrics",
)


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
        self._kept: list[Batch] | None = None

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
        if self._kept is not None:
            self._kept.append((outputs, targets))
            return
        for name, meter in self._meters.items():
            _update(name, meter, outputs, targets)

    @contextmanager
    def kept(self) -> Iterator[list[Batch]]:
        """Keep the batches that are added in the block, in place of adding them."""
        self._kept = kept = []
        try:
            yield kept
        finally:
            self._kept = None

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that each metric is the same however many workers measure it. No exchange.

        Three times a batch is given to one worker, to three, and to one in parts.

        Raises:
            ConfigError: it is not, cannot be computed of several workers' states, or is something
                else than numbers.
        """
        batch = [(outputs, targets)]
        parts = [(outputs[part], targets[part]) for part in (slice(1), slice(1, None))]
        has_parts = 1 < len(targets) == len(outputs)
        for name, meter in self._meters.items():
            value = _measure(name, meter, batch * 3)
            if not isinstance(value, Tensor):
                raise ConfigError(
                    f"`task.metrics.{name}` must give a number, or several, got "
                    f"{type(value).__name__}. It measures a curve: choose a figure of it."
                )
            others = {"of three workers": _measure(name, meter, batch, workers=3)}
            if has_parts:
                others["in smaller batches"] = _measure(name, meter, parts * 3)
            for way, other in others.items():
                if not torch.allclose(other, value, equal_nan=True):
                    raise ConfigError(
                        f"`task.metrics.{name}` must be the same on any number of workers, got "
                        f"{value.tolist()}, and {way} {other.tolist()}. It may need an argument, "
                        "such as data_range."
                    )

    def gather(self) -> dict[str, float]:
        """Compute each metric over all workers; one of several values has a number with its name.

        *Collectives*: a gathering of who has samples, and of each state; every worker must call.
        """
        from torchmetrics.utilities.distributed import gather_all_tensors

        has_samples = from_all([bool(meter.update_called) for meter in self._meters.values()])
        results: dict[str, float] = {}
        for (name, meter), counts in zip(self._meters.items(), zip(*has_samples), strict=True):

            def gather(state: Tensor, group: Any = None, counts: Any = counts) -> list[Tensor]:
                states = gather_all_tensors(state, group)
                # A state of nothing is not always neutral: some metrics divide by its count.
                return [one for one, has in zip(states, counts, strict=True) if has] or states

            values = _compute(name, meter, gather).flatten().tolist()
            names = [name] if len(values) == 1 else [f"{name}_{i}" for i in range(len(values))]
            results.update(zip(names, values, strict=True))
        return results


def _update(name: str, meter: Any, outputs: Tensor, targets: Tensor) -> None:
    # Sums of squares of float32 lose what lies far from 0, other digits in each cut of a batch.
    exact = [each.double() if each.is_floating_point() else each for each in (outputs, targets)]
    try:
        with torch.autocast(outputs.device.type, enabled=False):
            meter.update(*exact)
    except Exception as error:
        raise ConfigError(
            f"`task.metrics.{name}` must suit the task: {in_one_line(error)}"
        ) from None


def _measure(name: str, meter: Any, batches: Sequence[Batch], workers: int = 1) -> Any:
    """Compute a metric as if each of so many workers had these batches."""
    meter.reset()
    for outputs, targets in batches:
        _update(name, meter, outputs, targets)
    return _compute(name, meter, lambda state, group=None: [state.clone() for _ in range(workers)])


def _compute(name: str, meter: Any, gather: Gather) -> Any:
    """Compute a metric of the states that `gather` gives, its numbers in one tensor.

    Raises:
        ConfigError: it cannot be computed of them.
    """
    try:
        with meter.sync_context(dist_sync_fn=gather, distributed_available=lambda: True):
            found = meter.compute()
    except Exception as error:  # some are not made for several workers, and fail anyhow
        raise ConfigError(
            f"`task.metrics.{name}` must be one that several workers can measure together, got "
            f"{in_one_line(error)}"
        ) from None
    is_several = isinstance(found, tuple) and all(
        isinstance(each, Tensor) and each.numel() == 1 for each in found
    )
    return torch.stack([each.reshape(()) for each in found]) if is_several else found


def _make(name: str, options: Mapping[str, Any], device: torch.device) -> Any:
    try:
        torchmetrics: Any = importlib.import_module("torchmetrics")
    except ImportError as error:
        raise ConfigError(
            f"`task.metrics` must be left out where torchmetrics is not installed: {error}. "
            "Install it with: pip install 'syncnorm[metrics]'"
        ) from None
    known: dict[str, Any] = {}
    for module in _MODULES:
        with suppress(ImportError):  # an old version has none of this name
            known |= {
                key: value
                for key, value in vars(importlib.import_module(module)).items()
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
