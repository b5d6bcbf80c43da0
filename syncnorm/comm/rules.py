"""Rules by which workers pool: valid for any number of them, before there are any, in a pickle.

Pure functions: a rule and the world size give the parts. `syncnorm.comm.groups` makes their groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from syncnorm.errors import InputError


@dataclass(frozen=True)
class ForSamples:
    """The rule of `for_samples`."""

    samples: int
    local_batch_size: int

    def __repr__(self) -> str:
        return f"for_samples({self.samples}, local_batch_size={self.local_batch_size})"


@dataclass(frozen=True)
class Ranks:
    """The rule of these global ranks: the form of a process group in a pickle.

    >>> Ranks((2, 0))
    Ranks(members=(0, 2))
    """

    members: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(sorted(self.members)))


Rule = str | int | ForSamples | Ranks
"""A cut of the workers into parts, each of which pools by itself."""


def for_samples(samples: int, local_batch_size: int) -> ForSamples:
    """Pool over as few neighbouring workers as hold `samples` samples together.

        workers in a group >= ceil(samples / local_batch_size)

    Neighbours by rank are cut into as many groups as that allows, of nearly equal size. Where all
    workers together hold fewer samples, all of them pool, and a warning says so.

    Args:
        samples: in each statistic, at least 1.
        local_batch_size: samples that each worker has in a forward, at least 1.

    Returns:
        A value for `process_group`, the same on all workers; resolved when the workers are known.

    Raises:
        InputError: an argument is below 1.

    Example:
        >>> parts(for_samples(16, local_batch_size=4), world_size=10)
        [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
    """
    for name, value in (("samples", samples), ("local_batch_size", local_batch_size)):
        if not isinstance(value, int) or value < 1:
            raise InputError(
                f"`{name}` must be an integer of at least 1, got {value!r}. It counts samples."
            )
    return ForSamples(samples, local_batch_size)


def check(rule: object) -> Rule:
    """Return the rule; InputError if it is none, whatever the workers."""
    if isinstance(rule, ForSamples | Ranks) or (
        isinstance(rule, str) and rule in ("world", "node")
    ):
        return rule
    if isinstance(rule, int) and not isinstance(rule, bool) and rule >= 1:
        return rule
    raise InputError(
        '`process_group` must be None, "world", "node", a number of neighbouring workers of at '
        "least 1, groups.for_samples(...), a ProcessGroup or a one-dimensional DeviceMesh, got "
        f"{rule!r}. None pools over all workers."
    )


def parts(
    rule: Rule, world_size: int, machines: Callable[[], Sequence[str]] = list
) -> list[tuple[int, ...]]:
    """Cut ranks 0 to world_size - 1 into parts, in the order in which their groups are made.

    `Ranks` has one part, its members.

    Args:
        machines: called for "node" only; the machine of each rank.

    Raises:
        InputError: the rule does not fit these workers.

    Example:
        >>> parts(2, world_size=4), parts("node", 3, lambda: ["a", "b", "a"])
        ([(0, 1), (2, 3)], [(0, 2), (1,)])
    """
    if isinstance(rule, ForSamples):
        return _runs(world_size, max(1, world_size // _workers_for(rule)))
    if isinstance(rule, Ranks):
        _check_members(rule, world_size)
        return [rule.members]
    if isinstance(rule, int):
        if world_size % rule:
            raise InputError(
                f"`process_group` must divide the number of workers, got {rule} for {world_size} "
                "worker(s). Take a divisor, or groups.for_samples, which takes any number of "
                "workers."
            )
        return _runs(world_size, world_size // rule)
    return _by_name(machines()) if rule == "node" else [tuple(range(world_size))]


def is_short(rule: Rule, world_size: int) -> bool:
    """True if all workers together hold fewer samples than the rule asks for."""
    return isinstance(rule, ForSamples) and world_size < _workers_for(rule)


def _workers_for(rule: ForSamples) -> int:
    return -(-rule.samples // rule.local_batch_size)


def _runs(world_size: int, number: int) -> list[tuple[int, ...]]:
    """Cut the ranks into `number` runs of neighbours, of nearly equal length."""
    cuts = [world_size * i // number for i in range(number + 1)]
    return [tuple(range(start, stop)) for start, stop in pairwise(cuts)]


def _by_name(names: Sequence[str]) -> list[tuple[int, ...]]:
    """The ranks of each name, in the order of the first of each."""
    together: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        together.setdefault(name, []).append(rank)
    return [tuple(ranks) for ranks in together.values()]


def _check_members(rule: Ranks, world_size: int) -> None:
    missing = [rank for rank in rule.members if not 0 <= rank < world_size]
    if missing or not rule.members:
        raise InputError(
            f"`process_group` must hold ranks of the {world_size} worker(s) that there are, got "
            f"{rule.members}. Set layer.process_group to a group of theirs, or to a rule such as "
            '"node" or 2, which fits any number.'
        )
