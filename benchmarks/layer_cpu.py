"""Forward and backward of one layer on a CPU, 2 gloo workers with one thread each.

    python -m benchmarks.layer_cpu [rounds] [--family]

Compares, in interleaved rounds on the same data: torch.nn.BatchNorm (local statistics),
SyncBatchNorm without and with its two messages, and a pooled layer written with plain
differentiable operators. The workers begin each of them together. With `--family`, the layers of
`syncnorm.family` and SyncBatchNorm, all with their messages.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import paired
from syncnorm import SyncBatchNorm
from syncnorm.bench.naive import NaiveSyncBatchNorm
from syncnorm.comm import exchange, groups
from syncnorm.family import METHODS, BalancedBatchNorm, EvoNorm, RegionNorm
from syncnorm.testing import RankPool

SHAPES = [(32, 64, 56, 56), (32, 256, 14, 14), (16, 512, 7, 7), (8, 64, 8, 8), (200_000, 64)]
FAMILY_SHAPES = [(32, 64, 56, 56), (32, 256, 14, 14)]
WORKERS = 2
# Elements of layers that get ten times as many rounds.
SMALL = 1_000_000


def _cases() -> list[tuple[tuple[int, ...], bool]]:
    return [
        (shape, last) for shape in SHAPES for last in ([False, True] if len(shape) > 2 else [False])
    ]


def _of_family(x: Tensor, g: Tensor) -> dict[str, Callable[[], None]]:
    channels = x.shape[1]
    tasks = torch.arange(len(x)) % 4
    mask = torch.rand(len(x), 1, *x.shape[2:]) < 0.3
    calls: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
        "SyncBatchNorm": (SyncBatchNorm(channels), ()),
        **{method.__name__: (method(channels), ()) for method in METHODS.values()},
        "BalancedBatchNorm, 4 tasks": (BalancedBatchNorm(channels, 4), (tasks,)),
        "RegionNorm": (RegionNorm(channels), (mask,)),
        **{f"EvoNorm, {v}": (EvoNorm(channels, v), ()) for v in ("b0", "b1", "b2")},
    }

    def step(layer: nn.Module, more: tuple[Tensor, ...]) -> None:
        x.grad = None
        layer(x, *more).backward(g)

    return {name: partial(step, *call) for name, call in calls.items()}


def _print_family(rounds: int) -> None:
    found: dict[str, list[str]] = {}
    for shape in FAMILY_SHAPES:
        # The same on all workers: tasks and masks are drawn, too.
        torch.manual_seed(0)
        x = torch.randn(shape).requires_grad_()
        seconds = paired.rounds(_of_family(x, torch.randn(shape)), rounds, line_up=_line_up)
        for name, each in seconds.items():
            found.setdefault(name, []).append(str(paired.ratio(each, seconds["SyncBatchNorm"])))
    if dist.get_rank() == 0:
        print(f"| time / SyncBatchNorm | {' | '.join(map(str, FAMILY_SHAPES))} |")
        print("|---" * (1 + len(FAMILY_SHAPES)) + "|")
        for name, cells in found.items():
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _candidates(x: Tensor, g: Tensor) -> dict:
    channels = x.shape[1]
    local = nn.BatchNorm2d(channels) if x.ndim == 4 else nn.BatchNorm1d(channels)
    layers = {
        "local": local,
        "ours, no messages": SyncBatchNorm(channels, sync="none"),
        "ours": SyncBatchNorm(channels),
        "plain": NaiveSyncBatchNorm(channels),
    }

    def step(layer: nn.Module) -> None:
        x.grad = None
        layer(x).backward(g)

    return {name: (lambda layer=layer: step(layer)) for name, layer in layers.items()}


def _line_up() -> None:
    """Go on together, by a message over shared memory: a barrier of gloo's ends less evenly."""
    exchange.sum_(torch.zeros(1, dtype=torch.float64), groups.statistics_group(), "line up")


def _worker(rounds: int, family: bool) -> None:
    rank = dist.get_rank()
    if family:
        _print_family(rounds)
    for shape, channels_last in [] if family else _cases():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(rank))
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        faults = paired.page_faults()
        # A small layer takes no longer than a disturbance does.
        count = rounds if x.numel() > SMALL else 10 * rounds
        seconds = paired.rounds(_candidates(x, torch.randn_like(x)), count, line_up=_line_up)
        faults = paired.page_faults() - faults
        if rank == 0:
            _print_row(shape, channels_last, seconds, faults)


def _print_row(
    shape: tuple[int, ...], channels_last: bool, seconds: dict[str, list[float]], faults: int
) -> None:
    to_local = [
        paired.ratio(seconds[name], seconds["local"])
        for name in ("ours, no messages", "ours", "plain")
    ]
    plain_to_ours = paired.ratio(seconds["plain"], seconds["ours"])
    layout = "channels last" if channels_last else "contiguous"
    cells = [str(shape), layout, *map(str, to_local), str(plain_to_ours), str(faults)]
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    paired.fix_allocator()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=31)
    parser.add_argument("--family", action="store_true")
    given = parser.parse_args()
    print(
        f"{WORKERS} workers, one thread each, {given.rounds} rounds; median ratio [95 % interval]"
    )
    print(f"torch {torch.__version__}; {paired.settings()}", flush=True)
    if not given.family:
        columns = [
            "shape per worker",
            "layout",
            "ours without messages / local",
            "ours / local",
            "plain / local",
        ]
        print(f"| {' | '.join([*columns, 'plain / ours', 'page faults'])} |")
        print("|---|---|---|---|---|---|---|", flush=True)
    with RankPool(WORKERS, timeout_seconds=paired.MOST_SECONDS) as pool:
        pool.run(_worker, given.rounds, given.family)


if __name__ == "__main__":
    main()
