"""The placement of a step: which worker has which samples, and who shares a statistic.

The samples of a step are fixed, and cut into norm batches, each the samples of one statistic; the
workers only share these out:

    as many norm batches as workers, or more    each worker has whole ones, alone
    fewer, and a divisor of the workers         each is pooled over a run of neighbouring workers
    fewer otherwise                             all workers pool each of them

A worker has its parts of several norm batches in one forward, side by side, or in several forwards
of at most `micro_batch` samples, one after the other. So 12 samples in norm batches of 6 are placed

    on 1 worker                     on 2 workers           on 4 workers
    worker 0: [0:6 + 6:12]          worker 0: [0:6]        workers 0, 1: [0:3] [3:6]
    (micro_batch 6: [0:6] [6:12])   worker 1: [6:12]       workers 2, 3: [6:9] [9:12]

Nothing here depends on anything but its arguments, so all workers compute the same.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Permute `range(count)` by (seed, epoch) alone."""
    # A hash keeps the streams of neighbouring seeds and epochs apart, which seed + epoch would not.
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(count, generator=generator)


def shard(count: int, rank: int, world_size: int) -> slice:
    """Cut `range(count)` into contiguous shards and return that of `rank`.

    Sizes differ by at most 1, and the last shards may be empty.
    """
    size, longer = divmod(count, world_size)
    start = rank * size + min(rank, longer)
    return slice(start, start + size + (rank < longer))


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

    Only the last step of an epoch has fewer samples than the others. Cut evenly, none of its norm
    batches is left with a sample or two.
    """
    number = max(1, -(-count // norm_batch))
    return [shard(count, index, number) for index in range(number)]


# A step of one size is placed again and again.
@lru_cache(maxsize=64)
def place(
    count: int, norm_batch: int, rank: int, world_size: int, micro_batch: int | None
) -> Placement:
    """Place a step of `count` samples whose statistics are over `norm_batch` each.

    A forward has more than `micro_batch` samples where a worker's part of one norm batch has:
    `largest_part` is the least that can be kept to.
    """
    batches = norm_batches(count, norm_batch)
    number, shared_by = len(batches), _shared_by(len(batches), world_size)
    if number >= world_size:
        mine = batches[shard(number, rank, world_size)]
    elif shared_by < world_size:
        mine = [_part(batches[rank // shared_by], rank % shared_by, shared_by)]
    else:
        mine = [_part(batch, rank, world_size) for batch in batches]
    # Parts in a forward: the same number on all workers, which must cut alike where they share.
    width = _parts_per_forward([size(batch) for batch in batches], shared_by, micro_batch)
    rounds = tuple(tuple(mine[start : start + width]) for start in range(0, len(mine), width))
    # The first worker has most.
    most = size(shard(number, 0, world_size)) if shared_by == 1 else len(mine)
    return Placement(shared_by, rounds, most > width)


@lru_cache(maxsize=64)
def place_local(count: int, rank: int, world_size: int, micro_batch: int | None) -> Placement:
    """Place a step whose statistics are over whatever a worker has in a forward.

    That is the worker's shard, cut into rounds of equal size.
    """
    mine, longest = shard(count, rank, world_size), shard(count, 0, world_size)
    # As many rounds on each worker: layers may exchange in each.
    number = 1 if micro_batch is None else max(1, -(-size(longest) // micro_batch))
    return Placement(1, tuple((_part(mine, index, number),) for index in range(number)), number > 1)


def largest_part(count: int, norm_batch: int, world_size: int) -> int:
    """Count the samples of one statistic that a worker must have at once, at most."""
    batches = norm_batches(count, norm_batch)
    return -(-size(batches[0]) // _shared_by(len(batches), world_size))


def no_whole_statistics(global_batch: int, norm_batch: int) -> str:
    """Say why a step has no such norm batches; empty if it has."""
    if 1 <= norm_batch <= global_batch and global_batch % norm_batch == 0:
        return ""
    return (
        f"must be a divisor of global_batch = {global_batch}, got {norm_batch}. A step consists of "
        "whole statistics."
    )


def too_few_at_once(count: int, norm_batch: int, world_size: int, micro_batch: int | None) -> str:
    """Say why a step cannot be placed in forwards of at most `micro_batch`; empty if it can."""
    least = largest_part(count, norm_batch, world_size)
    if micro_batch is None or micro_batch >= least:
        return ""
    return (
        f"must be at least {least} where {count} samples in statistics of at most {norm_batch} are "
        f"shared by {world_size} worker(s), got {micro_batch}. A statistic needs all its samples "
        "at once: take more workers or a smaller norm_batch."
    )


def size(part: slice) -> int:
    """Count the samples of a part."""
    return part.stop - part.start


def _shared_by(number: int, world_size: int) -> int:
    if number >= world_size:
        return 1
    return world_size // number if world_size % number == 0 else world_size


def _parts_per_forward(sizes: list[int], shared_by: int, micro_batch: int | None) -> int:
    if micro_batch is None:
        return len(sizes)
    return max(1, micro_batch // -(-max(sizes) // shared_by))


def _part(whole: slice, index: int, number: int) -> slice:
    part = shard(size(whole), index, number)
    return slice(whole.start + part.start, whole.start + part.stop)
