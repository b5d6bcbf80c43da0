"""A training step of ResNet-50 by normalisation layer: time and peak memory.

Bfloat16 by autocast, channels last, batch 256 on each rank, SGD. With two devices there are two
ranks under DistributedDataParallel, over NCCL. With one there is one process, and pooled layers
have a second rank that is nobody: they do all of their work but the transport.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks import paired
from benchmarks.gpu import part, timing
from syncnorm import prepare_ddp
from syncnorm.bench.candidates import LOCAL, MODES, Candidate
from syncnorm.bench.memory import peak_bytes
from syncnorm.testing import RankPool
from syncnorm.train.models import MODELS

NORMS = (LOCAL, "nn.SyncBatchNorm", *MODES)
BATCH, SIZE = 256, 224
# Of a device on which that batch does not fit.
BYTES_PER_IMAGE = 2**27
ROUNDS_AT_ONCE, MOST_ROUNDS = 10, 60
# A step alone would be measured with the host's way to its first kernel.
STEPS = 3


def _batch_size(settings: part.Settings) -> int:
    if settings.is_small:
        return 2
    fits = torch.cuda.mem_get_info()[1] // BYTES_PER_IMAGE
    return BATCH if fits >= BATCH else 2 ** (int(fits).bit_length() - 1)


def _step(norm: Candidate, settings: part.Settings, batch: int) -> Any:
    """A function that makes one training step."""
    torch.manual_seed(0)
    model = MODELS["digits_resnet" if settings.is_small else "resnet50_imagenet"](
        in_channels=3, num_classes=1000, norm_layer=norm.make
    )
    device, channels_last = settings.device, torch.channels_last
    wrapped = prepare_ddp(model.to(device=device, memory_format=channels_last))
    if dist.get_backend() != "fake":
        wrapped = DistributedDataParallel(wrapped)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    size = 32 if settings.is_small else SIZE
    images = torch.randn(batch, 3, size, size, device=device)
    images = images.contiguous(memory_format=channels_last)
    labels = torch.arange(batch, device=device) % 1000

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = F.cross_entropy(wrapped(images), labels)
        loss.backward()
        optimizer.step()

    return step


def _peak(step: Callable[[], None], device: str) -> int | None:
    """The device's bytes that a step takes beyond those that are kept."""
    if device != "cuda":
        step()
        return None
    return peak_bytes(step, device)


def measure(settings: part.Settings) -> None:
    """Write a row for each layer, anew whenever there are more rounds."""
    torch.backends.cudnn.benchmark = True
    with timing.workers() as (number, backend):
        batch = _batch_size(settings)
        key = {"part": "step", "ranks": number, "backend": backend, "batch": batch}
        turns: dict[str, Callable[[], None]] = {}
        peaks: dict[str, int | None] = {}
        for name in NORMS:
            try:
                step = _step(Candidate(name), settings, batch)
                for _ in range(2):  # the first makes the optimizer's buffers, and chooses kernels
                    step()
                peaks[name] = _peak(step, settings.device)
            except Exception as error:  # all ranks have the same layers, and so the same errors
                _write(settings, **key, layer=name, error=part.in_one_line(error))
                if part.is_device_lost():
                    raise
            else:
                turns[name] = lambda step=step: _turn(step, settings)
        if turns:
            _measure_rounds(settings, key, turns, peaks)


def _turn(step: Callable[[], None], settings: part.Settings) -> None:
    for _ in range(1 if settings.is_small else STEPS):
        step()
    timing.synchronize(settings.device)


def _measure_rounds(
    settings: part.Settings,
    key: dict[str, Any],
    turns: dict[str, Callable[[], None]],
    peaks: dict[str, int | None],
) -> None:
    steps, most = (1, 2) if settings.is_small else (STEPS, MOST_ROUNDS)
    # A few first, so that there are figures at all.
    at_once = 2
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    done, longest = 0, 0.0
    while done < most and _all_have_time(settings, longest * at_once):
        start = time.monotonic()
        for name, times in paired.rounds(turns, at_once, warm_up=0).items():
            seconds[name] += [each / steps for each in times]
        longest = max(longest, (time.monotonic() - start) / at_once)
        done, at_once = done + at_once, ROUNDS_AT_ONCE
        for name, times in seconds.items():
            row = {"layer": name, "steps": steps, "peak": peaks[name], **timing.spread(times)}
            if LOCAL in seconds:
                row["to_local"] = paired.ratio(times, seconds[LOCAL])
            _write(settings, **key, **row)


def _all_have_time(settings: part.Settings, seconds: float) -> bool:
    """True, on all ranks alike, if so much time is left on each."""
    left = torch.tensor(min(settings.left - 1.2 * seconds, 1e9), device=settings.device)
    if dist.get_backend() != "fake":
        dist.all_reduce(left, dist.ReduceOp.MIN)
    return left.item() > 0.0


def _write(settings: part.Settings, **row: Any) -> None:
    if dist.get_rank() == 0:
        settings.write(**row)


def main() -> None:
    settings = part.from_arguments()
    if settings.device == "cuda" and torch.cuda.device_count() >= 2:
        # Statistics and gradients have a communicator each, whose operations overlap.
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
        with RankPool(2, "nccl", max(settings.left, 1.0), "cuda") as pool:
            pool.run(measure, settings)
    else:
        measure(settings)


if __name__ == "__main__":
    main()
