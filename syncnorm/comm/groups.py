"""From the process group that a user names to the one that statistics travel on.

Statistics have a group of their own over the same ranks. On the group that DistributedDataParallel uses they
would queue behind gradient buckets, and where a parameter is used on one rank only, the order of messages
would differ between ranks, which gloo answers with an abort.
"""

from __future__ import annotations

import weakref
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _resolve_process_group

from syncnorm.errors import InputError

Group = dist.ProcessGroup


class Named(NamedTuple):
    """In code that is being compiled: the statistics group of the process group of this name, which `look_up` finds.

    The compiled code looks it up whenever it runs: groups may have been made, or made anew, since.
    """

    name: str
    """"" is the default group."""


# Per default group: a program may destroy its default group and initialise another. torch keeps the groups until
# then; kept here too, their threads would outlive torch.distributed and abort the process at its end.
_Made = weakref.WeakValueDictionary[tuple[str, tuple[int, ...]], Group]
_made: weakref.WeakKeyDictionary[Group, _Made] = weakref.WeakKeyDictionary()


def is_initialized() -> bool:
    """Whether torch.distributed has a default process group."""
    return dist.is_available() and dist.is_initialized()


def is_shared() -> bool:
    """Whether there are other workers at all."""
    return is_initialized() and dist.get_world_size() > 1


def statistics_group(process_group: Group | None = None) -> Group | None:
    """The group over which statistics of `process_group` are pooled; None if there is nobody to pool with.

    Made at the first call for a set of ranks, with the timeout of `process_group`, then kept.

    *Collectives*: the first call must be made by every member of `process_group` (and by no one else); later
    calls exchange nothing.

    Args:
        process_group: the ranks to pool over; None means the default group, or no group if there is none.

    Raises:
        InputError: a group was given although torch.distributed is not initialised, or this rank is not in it.
    """
    if torch.compiler.is_compiling():
        # Of another type, since it is only passed on to `exchange.sum_`.
        return Named("" if process_group is None else process_group.group_name)  # pyright: ignore[reportReturnType]
    if not is_initialized():
        if process_group is not None:
            raise InputError(
                f"`process_group` must belong to an initialised torch.distributed, got {process_group!r} "
                "without a default group. Call torch.distributed.init_process_group first, or pass None."
            )
        return None
    world = dist.group.WORLD
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise InputError(
            "`process_group` must contain this rank, got a group without it "
            f"(rank {dist.get_rank()}). Give each rank the group that it is a member of."
        )
    assert world is not None
    parent = process_group or world
    members, backend = dist.get_process_group_ranks(parent), dist.get_backend_config(parent)
    if len(members) == 1:
        return None
    groups = _made.setdefault(world, weakref.WeakValueDictionary())
    key = (backend, tuple(members))
    made = groups.get(key)
    if made is None:
        made = dist.new_group(
            members,
            timeout=_timeout(parent),
            backend=backend,
            use_local_synchronization=len(members) < dist.get_world_size(),
        )
        assert isinstance(made, dist.ProcessGroup)
        groups[key] = made
    return made


def look_up(named: Named) -> Group | None:
    """The group that `statistics_group` gives when code is not being compiled. *Collectives*: the same."""
    # Not documented; what torch's own collectives in compiled code use.
    return statistics_group(_resolve_process_group(named.name) if named.name else None)  # pyright: ignore[reportArgumentType]


def runs(size: int) -> Group | None:
    """The group of this rank when all ranks are cut into runs of `size` neighbours; None for runs of one.

    Made at the first call for a size, with the timeout of the default group, then kept.

    *Collectives*: the first call for a size must be made by every rank; later calls exchange nothing.

    Args:
        size: ranks in a run, a divisor of the world size.
    """
    world = dist.group.WORLD
    if size == 1 or world is None:
        return None
    made = _made.setdefault(world, weakref.WeakValueDictionary())
    start = dist.get_rank() // size * size
    key = ("runs", tuple(range(start, start + size)))
    if key not in made:
        mine, _ = dist.new_subgroups(size, timeout=_timeout(world))
        assert isinstance(mine, dist.ProcessGroup)
        made[key] = mine
        return mine
    return made[key]


def _timeout(group: Group) -> timedelta | None:
    """How long the user wants to wait for others; torch would give a new group its own default of half an hour.

    None for a backend that keeps no such option: its default then.
    """
    # Not documented, and there is no other way to ask; a test notices if it changes.
    options = group._get_backend(group._device_types[0]).options  # pyright: ignore[reportAttributeAccessIssue]
    return None if options is None else options._timeout


def rank() -> int:
    """This process's global rank; 0 without torch.distributed."""
    return dist.get_rank() if is_initialized() else 0


def ranks(group: Group | None) -> list[int]:
    """The global ranks of the members of `group`, in its order; this process alone without a group."""
    return [rank()] if group is None else dist.get_process_group_ranks(group)
