"""The process groups of statistics: from `process_group` to the group that messages travel on.

Statistics have a group of their own over the same ranks. On the group that DistributedDataParallel
uses they would queue behind gradient buckets, and where a parameter is used on one rank only, the
order of messages would differ between ranks, which gloo answers with an abort. Under NCCL they are
a second communicator: docs/ddp.md has what that asks for.

Callers outside of `comm` need only this module: it has the names of `handles`, `rules` and `world`.
"""

from __future__ import annotations

import socket
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from syncnorm import undocumented
from syncnorm.comm import exchange, hosts, naming, rules
from syncnorm.comm.handles import (
    GivenGroup,
    GroupHandle,
    NamedGroup,
    NotMember,
    Spec,
    existing_group,
    to_handle,
    to_name,
    to_user,
)
from syncnorm.comm.rules import Ranks, Rule
from syncnorm.comm.world import (
    Group,
    device_for,
    is_current,
    is_initialized,
    is_shared,
    rank,
    ranks,
)
from syncnorm.errors import InputError
from syncnorm.system import boot_id
from syncnorm.undocumented import timeout_of

__all__ = [
    "GivenGroup",
    "Group",
    "GroupHandle",
    "NotMember",
    "Rule",
    "Spec",
    "cut",
    "device_for",
    "existing_group",
    "is_shared",
    "least_size",
    "machine_id",
    "make_all",
    "parent_and_rule",
    "rank",
    "ranks",
    "set_machines",
    "statistics_group",
    "to_handle",
    "to_user",
]

GroupKey = tuple[str, tuple[int, ...]]
"""Backend and members of a group."""


@dataclass
class _Workers:
    """The ranks and groups of one default group, as far as this rank knows them."""

    # Weak: torch keeps the groups until it is shut down; kept here too, their threads would outlive
    # it and abort the process at its end.
    made: weakref.WeakValueDictionary[GroupKey, Group] = field(
        default_factory=weakref.WeakValueDictionary
    )
    """This rank's groups."""
    made_by_all: set[GroupKey] = field(default_factory=set)
    """Groups that every rank has taken part in making, members or not; the same on all ranks."""
    mine: dict[tuple[str, Rule], tuple[int, ...]] = field(default_factory=dict)
    """The part that this rank is in, by backend and rule."""
    keys: dict[GroupHandle, GroupKey] = field(default_factory=dict)
    """The groups of rules that were asked for before. Every exchange of a layer asks."""
    machines: list[str] = field(default_factory=list)
    """The machine of each rank, once exchanged."""


# A program may destroy its default group and initialise another, perhaps over other ranks.
_known: weakref.WeakKeyDictionary[Group, _Workers] = weakref.WeakKeyDictionary()


def _workers() -> _Workers:
    world = dist.group.WORLD
    assert world is not None
    known = _known.get(world)
    if known is None:
        known = _known[world] = _Workers()
    return known


def statistics_group(process_group: Spec | GroupHandle = None) -> Group | None:
    """The group over which statistics of `process_group` are pooled; None for this rank alone.

    Made at the first call for a set of ranks, with the timeout of the group given, else the default
    group's; then kept.

    *Collectives*: the first call for a rule (or for a group of all ranks) must be made by every
    rank, in the same order as those for others; the first one for a group of some ranks by these,
    and by no one else. Later calls exchange nothing.

    Args:
        process_group: the ranks to pool over; None means all, or this one alone where
            torch.distributed is not initialised.

    Raises:
        InputError: a group was given although torch.distributed is not initialised, this rank is
            not in it, or the rule does not fit the ranks that there are.
    """
    if torch.compiler.is_compiling():
        # Of another type, since it is only passed on to `exchange.sum_`.
        return NamedGroup(to_name(process_group))  # pyright: ignore[reportReturnType]
    handle = None if process_group is None else to_handle(process_group)
    world = dist.group.WORLD
    if world is None:
        _check_alone(handle)
        return None
    workers = _known.get(world) or _workers()
    key = workers.keys.get(handle)
    if key is None:
        parent, rule = parent_and_rule(handle)
        backend = dist.get_backend_config(parent)
        if isinstance(rule, Ranks):
            members = rule.members
            if (backend, members) not in workers.made:
                _make_among(rule, handle, parent)
        else:
            members = workers.mine.get((backend, rule)) or _resolve(rule, parent)
        key = backend, members
        # What a user has made may end, and be made again.
        if not isinstance(handle, GivenGroup | Ranks):
            workers.keys[handle] = key
    return None if len(key[1]) == 1 else workers.made[key]


def cut(handle: GroupHandle, world_size: int) -> tuple[tuple[int, ...], ...] | None:
    """The parts that pool, if there were `world_size` ranks; None if not known yet.

    Two handles of one cut share their groups. Of a group that was given it is the one part.

    *Collectives*: none, and no group is made.

    Raises:
        InputError: the rule does not fit so many.
    """
    if isinstance(handle, GivenGroup | Ranks):
        members = handle if isinstance(handle, Ranks) else handle.members
        return (members.members,)
    machines = _workers().machines if is_initialized() else []
    if isinstance(handle, NotMember) or (handle == "node" and len(machines) != world_size > 1):
        return None
    return tuple(rules.parts(handle or "world", world_size, lambda: machines or [""]))


def least_size(handle: GroupHandle, world_size: int) -> int | None:
    """The size of the smallest part, see `cut`."""
    parts = cut(handle, world_size)
    return None if parts is None else min(map(len, parts))


def _check_alone(handle: GroupHandle) -> None:
    """Raise unless the handle makes sense without torch.distributed, where there is one rank."""
    if isinstance(handle, GivenGroup | NotMember | Ranks):
        raise InputError(
            f"`process_group` must belong to an initialised torch.distributed, got {handle!r} "
            "without a default group. Call torch.distributed.init_process_group first, or pass "
            "None."
        )
    rules.parts(handle or "world", 1, lambda: [""])


def parent_and_rule(handle: GroupHandle) -> tuple[Group, Rule]:
    """The group whose backend and timeout to take over, and the ranks to pool over."""
    world = dist.group.WORLD
    assert world is not None
    if isinstance(handle, NotMember):
        raise InputError(
            f"`process_group` must contain this rank, got {handle!r} (rank {dist.get_rank()}). "
            "Give each rank the group that it is a member of."
        )
    if isinstance(handle, GivenGroup):
        parent, rule = (handle.group if is_current(handle.group) else world), handle.rule
    else:
        parent, rule = world, handle or "world"
    is_all = isinstance(rule, Ranks) and rule.members == tuple(range(dist.get_world_size()))
    return parent, "world" if is_all else rule


def _resolve(rule: Rule, parent: Group) -> tuple[int, ...]:
    """Make the groups of a rule's parts, together with all ranks; returns the part of this rank."""
    world_size, backend = dist.get_world_size(), dist.get_backend_config(parent)
    cut = rules.parts(rule, world_size, _machines)
    if rules.is_short(rule, world_size):
        warnings.warn(
            f"`process_group={rule}` asks for more samples than all {world_size} worker(s) hold "
            "together; they pool what they have.",
            stacklevel=2,
        )
    make_all([(backend, members) for members in cut], parent)
    (mine,) = (members for members in cut if dist.get_rank() in members)
    _workers().mine[backend, rule] = mine
    return mine


def make_all(keys: Sequence[GroupKey], parent: Group) -> None:
    """Make these groups, those of one rank left out.

    *Collectives*: every rank must call, with the same keys in the same order, members or not: torch
    numbers the groups that all ranks make alike everywhere.
    """
    workers = _workers()
    for backend, members in keys:
        if len(members) > 1 and (backend, members) not in workers.made_by_all:
            with naming.explain_absence(range(dist.get_world_size())):
                made = dist.new_group(list(members), timeout=timeout_of(parent), backend=backend)
                if isinstance(made, Group):
                    hosts.negotiate(made, machine_id())
            workers.made_by_all.add((backend, members))
            if isinstance(made, Group):
                workers.made[backend, members] = made


def _make_among(rule: Ranks, handle: GroupHandle, parent: Group) -> None:
    """Make the group of some ranks, which alone call; nothing for a single one."""
    rules.parts(rule, dist.get_world_size())
    if dist.get_rank() not in rule.members:
        raise InputError(
            f"`process_group` must contain this rank, got ranks {list(rule.members)} (rank "
            f"{dist.get_rank()}). Set layer.process_group on each worker to its own group, or on "
            'all to a rule such as "node" or 2.'
        )
    if len(rule.members) == 1:
        return
    backend = dist.get_backend_config(parent)
    among = parent if isinstance(handle, GivenGroup) and handle.group is parent else None
    device = device_for(parent)  # before `connecting_anew`, within which no device is known
    with (
        naming.explain_absence(rule.members),
        undocumented.connecting_anew(),
        naming.same_name(rule.members, among, device),
    ):
        # The timeout of the user's group: torch would give its own default of half an hour.
        group = dist.new_group(
            list(rule.members),
            timeout=timeout_of(parent),
            backend=backend,
            use_local_synchronization=True,
        )
        assert isinstance(group, Group)
        hosts.negotiate(group, machine_id())
    _workers().made[backend, rule.members] = group


def _machines() -> list[str]:
    """The machine of each rank; the first call is a collective of all ranks."""
    workers, world = _workers(), dist.group.WORLD
    assert world is not None
    if not workers.machines:
        workers.machines = exchange.gather_text(machine_id(), world, "agreement", device_for(world))
    return workers.machines


def set_machines(names: list[str]) -> None:
    """Set the machine of each rank, which the ranks have exchanged already."""
    _workers().machines = names


def machine_id() -> str:
    """An identifier of this machine, the same in all its containers.

    It is that of the running kernel's boot; the host's name where the system has none.
    """
    return boot_id() or socket.gethostname()
