"""The placement of a step: which worker has which samples, and who shares a statistic.

The configuration fixes the samples of a step and cuts them into norm batches, each the samples of
one statistic; the workers only share these out:

    as many norm batches as workers, or more    each worker has whole ones, alone
    fewer, and a divisor of the workers         each is pooled over a run of neighbouring workers
    fewer otherwise                             all workers pool each of them

A worker has its parts of several norm batches in one forward, side by side, or in several forwards
of at most `micro_batch` samples, one after the other. So 12 samples in norm batches of 6 are placed

    on 1 worker                     on 2 workers           on 4 workers
    worker 0: [0:6 + 6:12]          worker 0: [0:6]        workers 0, 1: [0:3] [3:6]
    (micro_batch 6: [0:6] [6:12])   worker 1: [6:12]       workers 2, 3: [6:9] [9:12]

Nothing here depends on anything but its arguments, so all workers compute the same placement.
"""

from dataclasses import dataclass

import torch

from syncnorm.errors import ConfigError
from syncnorm.train.data.datasets import shard


@dataclass(frozen=True)
class Workers:
    """The group of workers as one of them sees it, however it was launched.

    Args:
        rank: number of this worker.
        world_size: number of workers.
        device: the device that this worker computes on.
        local_world_size: number of workers on its machine.
    """

    rank: int
    world_size: int
    device: torch.device
    local_world_size: int = 1

    @property
    def is_first(self) -> bool:
        """True on the worker that writes files and prints."""
        return self.rank == 0


@dataclass(frozen=True)
class Placement:
    """One worker's part of a step.

    Args:
        shared_by: number of neighbouring workers that share each statistic of this worker's.
        rounds: this worker's forwards; each has parts of the step's samples, one for each
            statistic.
        has_rounds: True if some worker has more than one forward.
    """

    shared_by: int
    rounds: tuple[tuple[slice, ...], ...]
    has_rounds: bool


def norm_batches(count: int, norm_batch: int) -> list[slice]:
    """Cut a step's samples into norm batches of nearly equal size, each at most `norm_batch`.

    Only the last step of an epoch has fewer than `global_batch` samples. Cut evenly, none of its
    norm batches is left with a sample or two.
    """
    number = max(1, -(-count // norm_batch))
    return [shard(count, index, number) for index in range(number)]


def place(
    count: int, norm_batch: int, rank: int, world_size: int, micro_batch: int | None
) -> Placement:
    """Place a step of `count` samples whose statistics are over `norm_batch` each.

    Raises:
        ConfigError: a worker's part of a norm batch is more than `micro_batch`; the same on all
            workers.
    """
    batches = norm_batches(count, norm_batch)
    number = len(batches)
    if number >= world_size:
        shared_by, mine = 1, batches[shard(number, rank, world_size)]
    elif world_size % number == 0:
        shared_by = world_size // number
        mine = [_part(batches[rank // shared_by], rank % shared_by, shared_by)]
    else:
        shared_by, mine = world_size, [_part(batch, rank, world_size) for batch in batches]
    _check(norm_batch, shared_by, micro_batch)
    # Parts in a forward: the same number on all workers, which must cut alike where they share.
    width = _parts_per_forward([_size(batch) for batch in batches], shared_by, micro_batch)
    rounds = tuple(tuple(mine[start : start + width]) for start in range(0, len(mine), width))
    # The first worker has most.
    most = _size(shard(number, 0, world_size)) if shared_by == 1 else len(mine)
    return Placement(shared_by, rounds, most > width)


def place_local(count: int, rank: int, world_size: int, micro_batch: int | None) -> Placement:
    """Place a step whose statistics are over whatever a worker has in a forward.

    That is the worker's shard, cut into rounds of equal size.
    """
    mine, longest = shard(count, rank, world_size), shard(count, 0, world_size)
    # As many rounds on each worker: layers may exchange in each.
    number = 1 if micro_batch is None else max(1, -(-_size(longest) // micro_batch))
    return Placement(1, tuple((_part(mine, index, number),) for index in range(number)), number > 1)


def _parts_per_forward(sizes: list[int], shared_by: int, micro_batch: int | None) -> int:
    if micro_batch is None:
        return len(sizes)
    return max(1, micro_batch // -(-max(sizes) // shared_by))


def _check(norm_batch: int, shared_by: int, micro_batch: int | None) -> None:
    share = -(-norm_batch // shared_by)
    if micro_batch is not None and share > micro_batch:
        raise ConfigError(
            f"`launch.micro_batch` must be at least {share} where a statistic of {norm_batch} "
            f"samples is shared by {shared_by} worker(s), got {micro_batch}. A statistic needs all "
            "its samples at once: take more workers or a smaller train.norm_batch."
        )


def _part(whole: slice, index: int, number: int) -> slice:
    part = shard(_size(whole), index, number)
    return slice(whole.start + part.start, whole.start + part.stop)


def _size(part: slice) -> int:
    return part.stop - part.start
