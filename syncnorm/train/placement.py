"""Where a step is computed: which worker has which samples, and who shares a statistic.

The configuration fixes the samples of a step and cuts them into statistics; the workers only share
them out:

    as many statistics as workers, or more    each worker has whole ones, alone
    fewer, and a divisor of the workers       each is pooled over a run of neighbouring workers
    fewer otherwise                           all workers pool each of them

A worker has its samples of several statistics in one forward, side by side, or in several forwards
of at most `micro_batch` samples, one after the other. Nothing here depends on anything but its
arguments.
"""

from dataclasses import dataclass

from syncnorm.errors import ConfigError
from syncnorm.train.data.datasets import shard


@dataclass(frozen=True)
class Placement:
    """One worker's part of a step.

    Args:
        shared_by: how many neighbouring workers share each statistic of this worker's.
        rounds: this worker's forwards; of each the parts of the step's samples, one for each
            statistic.
        has_rounds: whether some worker has more than one forward.
    """

    shared_by: int
    rounds: tuple[tuple[slice, ...], ...]
    has_rounds: bool


def statistics_of(count: int, norm_batch: int) -> list[slice]:
    """Cut a step's samples into statistics of nearly equal size, at most `norm_batch` samples each.

    Only the last step of an epoch has fewer than `global_batch` samples. Cut evenly, none of its
    statistics is left with a sample or two.
    """
    number = max(1, -(-count // norm_batch))
    return [shard(count, index, number) for index in range(number)]


def place(
    count: int, norm_batch: int, rank: int, world_size: int, micro_batch: int | None
) -> Placement:
    """Place a step of `count` samples whose statistics are over `norm_batch` each.

    Raises:
        ConfigError: a worker's part of a statistic is more than `micro_batch`; the same on all
            workers.
    """
    statistics = statistics_of(count, norm_batch)
    number = len(statistics)
    if number >= world_size:
        shared_by, mine = 1, statistics[shard(number, rank, world_size)]
    elif world_size % number == 0:
        shared_by = world_size // number
        mine = [_part(statistics[rank // shared_by], rank % shared_by, shared_by)]
    else:
        shared_by, mine = (
            world_size,
            [_part(statistic, rank, world_size) for statistic in statistics],
        )
    _check(norm_batch, shared_by, micro_batch)
    together = _together([_size(statistic) for statistic in statistics], shared_by, micro_batch)
    rounds = tuple(tuple(mine[start : start + together]) for start in range(0, len(mine), together))
    # The first worker has most.
    most = _size(shard(number, 0, world_size)) if shared_by == 1 else len(mine)
    return Placement(shared_by, rounds, most > together)


def place_local(count: int, rank: int, world_size: int, micro_batch: int | None) -> Placement:
    """Place a step whose statistics are of whatever a worker has in a forward: a shard, cut into
    equal rounds.
    """
    mine, longest = shard(count, rank, world_size), shard(count, 0, world_size)
    # As many rounds on each worker: layers may exchange in each.
    number = 1 if micro_batch is None else max(1, -(-_size(longest) // micro_batch))
    return Placement(1, tuple((_part(mine, index, number),) for index in range(number)), number > 1)


def _together(sizes: list[int], shared_by: int, micro_batch: int | None) -> int:
    """How many statistics a forward has at most; the same on all workers, which must cut alike
    where they share.
    """
    if micro_batch is None:
        return len(sizes)
    return max(1, micro_batch // -(-max(sizes) // shared_by))


def _check(norm_batch: int, shared_by: int, micro_batch: int | None) -> None:
    share = -(-norm_batch // shared_by)
    if micro_batch is not None and share > micro_batch:
        raise ConfigError(
            f"`launch.micro_batch` must be at least {share} where a statistic of {norm_batch} "
            "samples is shared by "
            f"{shared_by} worker(s), got {micro_batch}. A statistic needs all its samples at once: "
            "take more workers or a smaller train.norm_batch."
        )


def _part(whole: slice, index: int, number: int) -> slice:
    part = shard(_size(whole), index, number)
    return slice(whole.start + part.start, whole.start + part.stop)


def _size(part: slice) -> int:
    return part.stop - part.start
