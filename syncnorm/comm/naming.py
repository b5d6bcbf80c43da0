"""One name on all ranks for a group that only its members make.

torch names such a group by its ranks and a number that ranks need not agree on: from 2.15 on that
of the groups that a rank has made, before that of the groups that it is in. Members that count
differently would wait for each other under different names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from syncnorm import undocumented
from syncnorm.comm import exchange
from syncnorm.errors import ExchangeError

# More groups than are ever made among all ranks.
_FIRST_NUMBER = 10**9


@contextmanager
def same_name(
    members: tuple[int, ...], group: dist.ProcessGroup | None, device: torch.device
) -> Iterator[None]:
    """Have a group that its members alone make within the block get one name on all of them.

    *Collectives*: before torch 2.15, one all-gather of one number over `group`.

    Args:
        members: all of which enter.
        group: one of just these members, if there is one; without it nothing can be agreed on
            before torch 2.15.
        device: for a message over it.
    """
    # A number that all members know: groups of just these ranks are made by all of them together.
    count = undocumented.members_of_groups().count(members)
    with undocumented.numbering_groups_from(_FIRST_NUMBER + count):
        if group is not None and not undocumented.is_named_by_count():
            _pad_memberships(group, device)
        yield


def _pad_memberships(group: dist.ProcessGroup, device: torch.device) -> None:
    """Make groups of one until all members of `group` are in equally many groups."""
    number = undocumented.count_own_groups()
    message = torch.full((1,), number, dtype=torch.float64, device=device)
    most = int(exchange.gather(message, group, "agreement").max())
    for _ in range(most - number):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)


@contextmanager
def explain_absence(ranks: Sequence[int]) -> Iterator[None]:
    """Name the error where not all of these ranks make a group: torch says "Wait timeout"."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ExchangeError):
            raise
        raise ExchangeError(
            f"process group must be made by all of ranks {list(ranks)}, got an error on rank "
            f"{dist.get_rank()}: {error}. Ranks that do not train make none: say who does, with "
            "process_group=group in prepare_ddp and the layers."
        ) from error
