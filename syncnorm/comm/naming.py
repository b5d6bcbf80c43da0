"""How torch names a group that only its members make: by its ranks and a number that they need not
agree on.

From 2.15 on the number is that of the groups that a rank has made, before that of the groups that
it is in. Members who count differently would wait for each other under different names. Nothing of
this is documented, and there is no other way to ask; a test notices if it changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from syncnorm.comm import exchange
from syncnorm.errors import ExchangeError

# More groups than are ever made among all ranks.
_FIRST_NUMBER = 10**9


@contextmanager
def alike(
    members: tuple[int, ...], group: dist.ProcessGroup | None, device: torch.device
) -> Iterator[None]:
    """Within it, a group that is made by its members alone has one name.

    *Collectives*: before torch 2.15, one all-gather of one number over `group`.

    Args:
        members: all of which enter.
        group: one of just these members, if there is one; without it nothing can be agreed on
            before torch 2.15.
        device: for a message over it.
    """
    with _counting_from(_FIRST_NUMBER + _count_among(members)):
        if group is not None and not _is_named_by_count():
            _even_out(group, device)
        yield


@contextmanager
def _counting_from(number: int) -> Iterator[None]:
    """Have torch number groups from here on, and as before afterwards: all ranks count those of all
    ranks alike.
    """
    before, c10d._world.group_count = c10d._world.group_count, number
    try:
        yield
    finally:
        c10d._world.group_count = before


def _count_among(members: tuple[int, ...]) -> int:
    """How many groups there are of just these ranks, which all of them know."""
    return sum(tuple(sorted(ranks)) == members for ranks in c10d._world.pg_group_ranks.values())


def _is_named_by_count() -> bool:
    """Whether the number in a group's name is that of the groups that have been made."""
    name = c10d._hash_ranks_to_str([0])
    with _counting_from(0):
        return name != c10d._hash_ranks_to_str([0])


def _even_out(group: dist.ProcessGroup, device: torch.device) -> None:
    """Have the members of `group` be in equally many groups, those in fewer by groups of their own
    alone.
    """
    number = len(c10d._world.pg_names)
    most = int(
        exchange.gather(
            torch.full((1,), number, dtype=torch.float64, device=device), group, "agreement"
        ).max()
    )
    for _ in range(most - number):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)


@contextmanager
def made_by(ranks: Sequence[int]) -> Iterator[None]:
    """Name the error where a group is not made by all of these ranks: torch says "Wait timeout"."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ExchangeError):
            raise
        raise ExchangeError(
            f"process group must be made by all of ranks {list(ranks)}, got an error on rank "
            f"{dist.get_rank()}: "
            f"{error}. "
            "Ranks that do not train make none: say who does, with process_group=group in "
            "prepare_ddp and the layers."
        ) from error
