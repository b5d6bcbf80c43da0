"""The forms of `process_group`: a user's value, a module's handle, a name in compiled code.

A process group can be neither copied nor pickled. A module keeps a handle, which can: copies in
this process share the group, a pickle holds the rule or the ranks.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from syncnorm import undocumented
from syncnorm.comm import rules
from syncnorm.comm.rules import ForSamples, Ranks, Rule
from syncnorm.comm.world import Group, is_current, is_initialized
from syncnorm.errors import InputError

Spec = Group | DeviceMesh | str | int | ForSamples | Ranks | None
"""A value of `process_group`, as a user gives it; see `syncnorm.groups`."""


class NotMember:
    """The handle of a group that this rank is not in.

    Using it raises, keeping it does not: no rank may raise alone, and the members keep a group.
    """

    def __repr__(self) -> str:
        return "a group without it"


class GivenGroup:
    """The handle of a group or mesh that a user gave.

    Copies in this process share it; a pickle holds the ranks of its members.
    """

    members: Ranks
    is_world: bool
    name: str

    def __init__(self, given: Group | DeviceMesh, group: Group) -> None:
        self.given = given
        self.group = group
        self.members = Ranks(tuple(dist.get_process_group_ranks(group)))
        self.is_world = group is dist.group.WORLD
        # torch gives a name again once torch.distributed was shut down and begun anew.
        self.name = f"{group.group_name} {next(_numbers)}"
        _by_name[self.name] = self

    @property
    def rule(self) -> Rule:
        """The rule by which a pickle names these ranks."""
        return "world" if self.is_world else self.members

    def __deepcopy__(self, memo: dict[int, Any]) -> GivenGroup:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (str, ("world",)) if self.is_world else (Ranks, (self.members.members,))

    def __repr__(self) -> str:
        return f"ranks {list(self.members.members)}"


_numbers = itertools.count()
# For compiled code, by their names.
_by_name: weakref.WeakValueDictionary[str, GivenGroup] = weakref.WeakValueDictionary()
# By the id of what was given, which its handle keeps: one name for all layers that are given it, so
# that they can have one compiled graph.
_of_given: weakref.WeakValueDictionary[int, GivenGroup] = weakref.WeakValueDictionary()


def _handle_of(given: Group | DeviceMesh, group: Group) -> GivenGroup:
    """The handle of a group or mesh, the same while somebody has it."""
    known = _of_given.get(id(given))
    if known is None or known.group is not group:
        known = _of_given[id(given)] = GivenGroup(given, group)
    return known


GroupHandle = GivenGroup | NotMember | Rule | None
"""The form in which a module keeps a `Spec`: it can be copied and pickled."""


def to_handle(process_group: Spec | GroupHandle) -> GroupHandle:
    """Return the handle of what the user gave; a handle is returned as it is.

    Raises:
        InputError: it is no process group and no rule, whatever the ranks.
    """
    if process_group is None or isinstance(process_group, GivenGroup | NotMember):
        return process_group
    if isinstance(process_group, Group):
        return _handle_of(process_group, _check_current(process_group))
    if isinstance(process_group, DeviceMesh):
        return _handle_of_mesh(process_group)
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:
        return NotMember()
    return rules.check(process_group)


def _handle_of_mesh(mesh: DeviceMesh) -> GivenGroup | NotMember:
    if mesh.ndim != 1:
        raise InputError(
            f"`process_group` must be a mesh of one dimension, got {mesh.ndim} dimensions "
            f"{mesh.mesh_dim_names or tuple(range(mesh.ndim))} of sizes {tuple(mesh.shape)}. "
            "Take one of them: mesh[name]."
        )
    return NotMember() if mesh.get_coordinate() is None else _handle_of(mesh, mesh.get_group())


def _check_current(group: Group) -> Group:
    if not is_current(group):
        raise InputError(
            "`process_group` must belong to the present torch.distributed, got a group of one that "
            "was shut down. Make it after init_process_group."
        )
    return group


def to_user(handle: GroupHandle) -> Spec:
    """Return the value that the user gave; of an unpickled group its `Ranks`."""
    if isinstance(handle, NotMember):
        return dist.GroupMember.NON_GROUP_MEMBER
    return handle.given if isinstance(handle, GivenGroup) else handle


def existing_group(process_group: Spec) -> Group | None:
    """The process group of a group, a mesh or None; None without torch.distributed.

    Raises:
        InputError: it is a rule, or this rank is not in it.
    """
    handle = to_handle(process_group)
    if isinstance(handle, GivenGroup):
        return handle.group
    if handle is not None:
        raise InputError(
            "`process_group` must be the group that DistributedDataParallel is given, got "
            f"{handle!r}. With whom a layer pools is said in the layer: SyncBatchNorm(..., "
            "process_group=...)."
        )
    return dist.group.WORLD if is_initialized() else None


class NamedGroup(NamedTuple):
    """A group in code that is being compiled.

    The compiled code finds it by name whenever it runs: groups may have been made, or made anew,
    since it was compiled.
    """

    name: str


def to_name(process_group: Spec | GroupHandle) -> str:
    """Return the name of a group, mesh, rule or handle; `of_name` reads it."""
    if process_group is None:
        return ""
    if isinstance(process_group, GivenGroup):
        return f"group {process_group.name}"
    if isinstance(process_group, Group):
        return f"group {process_group.group_name}"
    if isinstance(process_group, DeviceMesh):
        is_outside = process_group.get_coordinate() is None
        return "outside" if is_outside else f"group {process_group.get_group().group_name}"
    if isinstance(process_group, Ranks):
        return "ranks " + " ".join(str(rank) for rank in process_group.members)
    if isinstance(process_group, ForSamples):
        return f"samples {process_group.samples} {process_group.local_batch_size}"
    is_outside = isinstance(process_group, NotMember)
    if is_outside or process_group == dist.GroupMember.NON_GROUP_MEMBER:
        return "outside"
    return f"rule {rules.check(process_group)}"


def of_name(name: str) -> Spec | GroupHandle:
    """Return the group, rule or handle of a name that `to_name` gave."""
    kind, _, rest = name.partition(" ")
    if kind == "group":
        # A backward pass may outlive its layer, and the handle.
        return _by_name.get(rest) or undocumented.group_of_name(rest.split()[0])
    if kind == "rule":
        return int(rest) if rest.isdecimal() else rest
    if kind == "outside":
        return NotMember()
    numbers = [int(word) for word in rest.split()]
    if kind == "samples":
        return ForSamples(*numbers)
    return Ranks(tuple(numbers)) if kind == "ranks" else None
