"""From what a user calls `process_group` to the group that statistics travel on.

Statistics have a group of their own over the same ranks. On the group that DistributedDataParallel
uses they would queue behind gradient buckets, and where a parameter is used on one rank only, the
order of messages would differ between ranks, which gloo answers with an abort.
"""

from __future__ import annotations

import socket
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.device_mesh import DeviceMesh

from syncnorm.comm import exchange, naming, rules
from syncnorm.comm.rules import ForSamples, Ranks, Rule
from syncnorm.errors import InputError

Group = dist.ProcessGroup
Spec = Group | DeviceMesh | str | int | ForSamples | Ranks | None
"""What `process_group` may be; see `syncnorm.groups`."""


class Outside:
    """In place of the group that a rank is not in.

    Nothing raises alone, so it is an error when it is used.
    """

    def __repr__(self) -> str:
        return "a group without it"


class Given:
    """A group that a user gave.

    Copies in this process share it; a pickle holds the ranks of its members.
    """

    def __init__(self, what: Group | DeviceMesh, group: Group) -> None:
        self.what = what
        self.group = group
        self.members = Ranks(tuple(dist.get_process_group_ranks(group)))
        self.is_world = group is dist.group.WORLD
        self.name = group.group_name
        _given[self.name] = self

    @property
    def rule(self) -> Rule:
        """What it comes to where it does not exist."""
        return "world" if self.is_world else self.members

    def __deepcopy__(self, memo: dict[int, Any]) -> Given:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (str, ("world",)) if self.is_world else (Ranks, (self.members.members,))

    def __repr__(self) -> str:
        return f"ranks {list(self.members.members)}"


# By the names of their groups, for compiled code.
_given: weakref.WeakValueDictionary[str, Given] = weakref.WeakValueDictionary()

Kept = Given | Outside | Rule | None
"""What a module keeps of a `Spec`: it can be copied and pickled."""


def keep(spec: Spec | Kept) -> Kept:
    """`spec` in the form in which a module keeps it.

    Raises:
        InputError: it can be none, whatever the workers.
    """
    if spec is None or isinstance(spec, Given | Outside):
        return spec
    if isinstance(spec, Group):
        return Given(spec, _check_live(spec))
    if isinstance(spec, DeviceMesh):
        return _keep_mesh(spec)
    return Outside() if spec == dist.GroupMember.NON_GROUP_MEMBER else rules.check(spec)


def _keep_mesh(mesh: DeviceMesh) -> Given | Outside:
    if mesh.ndim != 1:
        raise InputError(
            f"`process_group` must be a mesh of one dimension, got {mesh.ndim} dimensions "
            f"{mesh.mesh_dim_names or tuple(range(mesh.ndim))} of sizes {tuple(mesh.shape)}. "
            "Take one of them: mesh[name]."
        )
    return Outside() if mesh.get_coordinate() is None else Given(mesh, mesh.get_group())


def _check_live(group: Group) -> Group:
    if not _is_live(group):
        raise InputError(
            "`process_group` must belong to the present torch.distributed, got a group of one that "
            "was shut down. "
            "Make it after init_process_group."
        )
    return group


def rule_of(kept: Kept) -> Rule | Outside:
    """The workers that are meant, as something that can be compared."""
    return kept.rule if isinstance(kept, Given) else kept or "world"


def given(kept: Kept) -> Spec:
    """What the user gave; of an unpickled group its `Ranks`."""
    if isinstance(kept, Outside):
        return dist.GroupMember.NON_GROUP_MEMBER
    return kept.what if isinstance(kept, Given) else kept


def live(process_group: Spec) -> Group | None:
    """The group that is meant by a group, a mesh or None; None without torch.distributed.

    Raises:
        InputError: it is a rule, or this rank is not in it.
    """
    kept = keep(process_group)
    if isinstance(kept, Given):
        return kept.group
    if kept is not None:
        raise InputError(
            "`process_group` must be the group that DistributedDataParallel is given, got "
            f"{kept!r}. "
            "With whom a layer pools is said in the layer: SyncBatchNorm(..., process_group=...)."
        )
    return dist.group.WORLD if is_initialized() else None


def is_initialized() -> bool:
    """Whether torch.distributed has a default process group."""
    return dist.is_available() and dist.is_initialized()


def is_shared() -> bool:
    """Whether there are other workers at all."""
    return is_initialized() and dist.get_world_size() > 1


Part = tuple[str, tuple[int, ...]]
"""Backend and members of a group that is to be made."""


@dataclass
class _Workers:
    """What is known about the workers of one default group."""

    # Weak: torch keeps the groups until it is shut down; kept here too, their threads would outlive
    # it and abort the process at its end.
    made: weakref.WeakValueDictionary[Part, Group] = field(
        default_factory=weakref.WeakValueDictionary
    )
    """This rank's groups."""
    made_by_all: set[Part] = field(default_factory=set)
    """Those that every rank has taken part in making, members or not; the same on all ranks."""
    mine: dict[tuple[str, Rule], tuple[int, ...]] = field(default_factory=dict)
    """The part that this rank is in, by backend and rule."""
    machines: list[str] = field(default_factory=list)
    """Of each rank, once they were told."""


# A program may destroy its default group and initialise another, perhaps over other workers.
_known: weakref.WeakKeyDictionary[Group, _Workers] = weakref.WeakKeyDictionary()


def _workers() -> _Workers:
    world = dist.group.WORLD
    assert world is not None
    known = _known.get(world)
    if known is None:
        known = _known[world] = _Workers()
    return known


def statistics_group(process_group: Spec | Kept = None) -> Group | None:
    """The group over which statistics of `process_group` are pooled; None if there is nobody to
    pool with.

    Made at the first call for a set of ranks, with the timeout of the group given, else the default
    group's; then kept.

    *Collectives*: the first call for a rule (or for a group of all ranks) must be made by every
    rank, in the same order as those for others; the first one for a group of some ranks by these,
    and by no one else. Later calls exchange nothing.

    Args:
        process_group: the workers to pool over; None means all, or nobody where torch.distributed
            is not initialised.

    Raises:
        InputError: a group was given although torch.distributed is not initialised, this rank is
            not in it, or the rule does not fit the workers that there are.
    """
    if torch.compiler.is_compiling():
        # Of another type, since it is only passed on to `exchange.sum_`.
        return exchange.Named(_name(process_group))  # pyright: ignore[reportReturnType]
    kept = keep(process_group)
    if not is_initialized():
        _check_alone(kept)
        return None
    parent, rule = origin(kept)
    backend = dist.get_backend_config(parent)
    if isinstance(rule, Ranks):
        members = rule.members
        if (backend, members) not in _workers().made:
            _make_among(rule, kept, parent)
    else:
        members = _workers().mine.get((backend, rule)) or _resolve(rule, parent)
    return None if len(members) == 1 else _workers().made[backend, members]


def _name(spec: Spec | Kept) -> str:
    """`spec` as compiled code knows it."""
    if spec is None:
        return ""
    if isinstance(spec, Given):
        return f"group {spec.name}"
    if isinstance(spec, Group):
        return f"group {spec.group_name}"
    if isinstance(spec, DeviceMesh):
        return (
            "outside" if spec.get_coordinate() is None else f"group {spec.get_group().group_name}"
        )
    if isinstance(spec, Ranks):
        return "ranks " + " ".join(str(rank) for rank in spec.members)
    if isinstance(spec, ForSamples):
        return f"samples {spec.samples} {spec.local_batch_size}"
    if isinstance(spec, Outside) or spec == dist.GroupMember.NON_GROUP_MEMBER:
        return "outside"
    return f"rule {rules.check(spec)}"


def look_up(name: str) -> Group | None:
    """What `statistics_group` gives for the spec of this name where code is not being compiled.

    *Collectives*: the same.
    """
    kind, _, rest = name.partition(" ")
    if kind == "group":
        # Not documented; what torch's own collectives in compiled code use.
        return statistics_group(_given.get(rest) or _resolve_process_group(rest))  # pyright: ignore[reportArgumentType]
    if kind == "rule":
        return statistics_group(int(rest) if rest.isdecimal() else rest)
    if kind == "outside":
        return statistics_group(Outside())
    numbers = [int(word) for word in rest.split()]
    if kind == "samples":
        return statistics_group(ForSamples(*numbers))
    return statistics_group(Ranks(tuple(numbers)) if kind == "ranks" else None)


def least_size(kept: Kept, world_size: int) -> int | None:
    """How many workers pool together in the smallest group, if there were `world_size`; None where
    nobody knows yet.

    Nothing is exchanged or made.

    Raises:
        InputError: the rule does not fit so many.
    """
    if isinstance(kept, Given | Ranks):
        members = kept if isinstance(kept, Ranks) else kept.members
        return len(members.members)
    machines = _workers().machines if is_initialized() else []
    if isinstance(kept, Outside) or (kept == "node" and len(machines) != world_size > 1):
        return None
    return min(
        len(part) for part in rules.parts(kept or "world", world_size, lambda: machines or [""])
    )


def _check_alone(kept: Kept) -> None:
    """Without torch.distributed there is one worker, and no group that could have been given."""
    if isinstance(kept, Given | Outside | Ranks):
        raise InputError(
            f"`process_group` must belong to an initialised torch.distributed, got {kept!r} "
            "without a default group. Call torch.distributed.init_process_group first, or pass "
            "None."
        )
    rules.parts(kept or "world", 1, lambda: [""])


def origin(kept: Kept) -> tuple[Group, Rule]:
    """The group whose backend and timeout to take over, and the workers that are meant."""
    world = dist.group.WORLD
    assert world is not None
    if isinstance(kept, Outside):
        raise InputError(
            f"`process_group` must contain this rank, got {kept!r} (rank {dist.get_rank()}). "
            "Give each rank the group that it is a member of."
        )
    if isinstance(kept, Given):
        parent, rule = (kept.group if _is_live(kept.group) else world), kept.rule
    else:
        parent, rule = world, kept or "world"
    is_all = isinstance(rule, Ranks) and rule.members == tuple(range(dist.get_world_size()))
    return parent, "world" if is_all else rule


def _is_live(group: Group) -> bool:
    """Whether it is one of the present default group's, not of one that was shut down."""
    try:
        return bool(dist.get_process_group_ranks(group))
    except (KeyError, ValueError):
        return False


def _resolve(rule: Rule, parent: Group) -> tuple[int, ...]:
    """The part of this rank, after all ranks have made the groups of all parts."""
    world_size, backend = dist.get_world_size(), dist.get_backend_config(parent)
    cut = rules.parts(rule, world_size, _machines)
    if rules.is_short(rule, world_size):
        warnings.warn(
            f"`process_group={rule}` asks for more samples than all {world_size} worker(s) hold "
            "together; they pool "
            "what they have.",
            stacklevel=2,
        )
    make_all([(backend, members) for members in cut], parent)
    (mine,) = (members for members in cut if dist.get_rank() in members)
    _workers().mine[backend, rule] = mine
    return mine


def make_all(parts: Sequence[Part], parent: Group) -> None:
    """Make the groups of these parts, but for parts of one. Every rank must call, with the same
    parts in order.

    Every rank takes part in making every group: torch numbers those that it makes among all ranks
    alike everywhere.
    """
    workers = _workers()
    for backend, members in parts:
        if len(members) > 1 and (backend, members) not in workers.made_by_all:
            with naming.made_by(range(dist.get_world_size())):
                made = dist.new_group(list(members), timeout=_timeout(parent), backend=backend)
            workers.made_by_all.add((backend, members))
            if isinstance(made, Group):
                workers.made[backend, members] = made


def _make_among(rule: Ranks, kept: Kept, parent: Group) -> None:
    """Make the group of some ranks, which alone call; nothing for a single one."""
    rules.parts(rule, dist.get_world_size())
    if dist.get_rank() not in rule.members:
        raise InputError(
            f"`process_group` must contain this rank, got ranks {list(rule.members)} (rank "
            f"{dist.get_rank()}). "
            "Set layer.process_group on each worker to its own group, or on all to a rule such as "
            '"node" or 2.'
        )
    if len(rule.members) == 1:
        return
    backend = dist.get_backend_config(parent)
    among = parent if isinstance(kept, Given) and kept.group is parent else None
    with naming.made_by(rule.members), naming.alike(rule.members, among, device_for(parent)):
        group = dist.new_group(
            list(rule.members),
            timeout=_timeout(parent),
            backend=backend,
            use_local_synchronization=True,
        )
    assert isinstance(group, Group)
    _workers().made[backend, rule.members] = group


def _machines() -> list[str]:
    """Of each rank, the machine that it is on; told once, by every rank."""
    workers, world = _workers(), dist.group.WORLD
    assert world is not None
    if not workers.machines:
        workers.machines = exchange.gather_text(
            this_machine(), world, "agreement", device_for(world)
        )
    return workers.machines


def know_machines(names: list[str]) -> None:
    """Take note of what every rank has said of its machine, by rank."""
    _workers().machines = names


def this_machine() -> str:
    """What tells this machine from others: the number of the running kernel, which all its
    containers share.

    Where the system has none, the host's name.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def device_for(group: Group, preferred: torch.device | None = None) -> torch.device:
    """Where a message over `group` can be: the preferred device if it takes that, else the CPU,
    else a current one.
    """
    types = [device.type for device in group._device_types]
    if preferred is not None and preferred.type in types:
        return preferred
    return torch.device("cpu" if "cpu" in types else types[0])


def _timeout(group: Group) -> timedelta | None:
    """How long the user wants to wait for others; torch would give a new group its own default of
    half an hour.

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
