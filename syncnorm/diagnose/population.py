"""Statistics of the data in place of running ones, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from syncnorm.diagnose.observe import Sums, watched
from syncnorm.diagnose.problem import Problem
from syncnorm.model.modes import kept


@contextmanager
def population(problem: Problem, sums: dict[str, Sums]) -> Iterator[None]:
    """Have running statistics be those of the data within the block.

    The variance is the unbiased one. Frozen layers stay, and those with a running statistic besides
    mean and variance: a mean of the data beside an old deviation would be neither's.
    """
    layers = {n: m for n, m in watched(problem.model).items() if n not in problem.frozen}
    buffers = {f"{n}.{b}": v for n, m in layers.items() for b, v in m.named_buffers(recurse=False)}
    with kept(buffers), torch.no_grad():
        for name, layer in layers.items():
            running = {b for b, _ in layer.named_buffers(recurse=False) if b.startswith("running_")}
            if not running <= {"running_mean", "running_var"}:
                continue
            n = sums[name].count.sum()
            mean, var = sums[name].moments()
            values = {"mean": mean, "var": var * n / torch.where(n > 1, n - 1, n)}
            for each, value in values.items():
                if f"running_{each}" in running and n > 0:
                    buffers[f"{name}.running_{each}"].copy_(value)
        yield
