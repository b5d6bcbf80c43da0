"""The exponential moving average of a model, without a wait for the device."""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class MovingAverage(AveragedModel):
    """torch's average of parameters and buffers, updated on the device alone.

    torch's own update sends its count of updates, which the average does not depend on, to the
    device in each step, and waits for it.

    Args:
        model: copied.
        decay: the share of the average that an update keeps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move towards `model`; the first update copies it."""
        mine = chain(self.module.parameters(), self.module.buffers())
        theirs = chain(model.parameters(), model.buffers())
        assert self.multi_avg_fn is not None
        if int(self.n_averaged) == 0:  # it lies on the CPU
            for average, value in zip(mine, theirs, strict=False):
                average.copy_(value)
        else:
            for averages, values in _grouped(mine, theirs):
                self.multi_avg_fn(averages, values, self.n_averaged)
        self.n_averaged.add_(1)


def _grouped(
    mine: Iterable[Tensor], theirs: Iterable[Tensor]
) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """Group both, which are in one order, by the device and type of the first."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    # Not strict, as in torch: one of them may have lost a buffer.
    for average, value in zip(mine, theirs, strict=False):
        averages, values = groups.setdefault((average.device, average.dtype), ([], []))
        averages.append(average)
        values.append(value.to(average.device))
    return groups.values()
