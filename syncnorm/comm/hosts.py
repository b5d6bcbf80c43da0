"""The hosts of a group's members: who shares memory with whom, and sums on two levels.

Where all members are on one host, they share memory. Where they are on several, and some share one,
sums go by two levels: within each host over memory, between the first member of each over gloo, and
back. Where each has a host to itself, or any cannot do its part, all of them send over gloo.

A host is what has one running kernel and one numbering of processes: two containers that do not see
each other's processes are two.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm import native, system, undocumented
from syncnorm.comm import shared
from syncnorm.comm.shared import Facts, Segment

# More than a first member waits for other hosts: it is to raise before those that wait for it.
_MARGIN_SECONDS = 5.0


class TwoLevels:
    """One member's part in the sums of a group on several hosts.

    Args:
        within: the memory of this host's members; None where there is only one.
        between: on the first of them, the group of the first of each host; None on the others.
    """

    def __init__(self, within: Segment | None, between: dist.ProcessGroup | None) -> None:
        self._within = within
        self._between = between
        self._is_over = False
        self._pid = os.getpid()

    def sum_(self, message: Tensor, seconds: float, wait: Callable[[dist.Work], None]) -> Tensor:
        """Sum `message`, which may be overwritten: the same bits on all members.

        Each number is added up in the order of the members within a host, and by gloo between hosts.
        If members of a host send different sizes, the result is NaN on all members of all hosts.

        Args:
            seconds: to wait for members of this host.
            wait: waits for the sum between hosts.

        Raises:
            RuntimeError: a member has ended, or not come within `seconds`. From then on every sum
                of every member raises.
        """
        if os.getpid() != self._pid:
            raise RuntimeError(shared.FORKED)
        if self._is_over:
            raise RuntimeError("Connection closed by peer: an earlier exchange of this group broke")
        try:
            return self._sum(message, seconds, wait)
        except BaseException:
            # An interrupt, too: whoever goes on would be one message ahead of the others.
            self._give_up()
            raise

    def _sum(self, message: Tensor, seconds: float, wait: Callable[[dist.Work], None]) -> Tensor:
        within, size, is_first = self._within, message.numel(), self._between is not None
        if within is None:
            return self._sum_between(message, wait)
        part = within.send(message, size, 0, seconds)
        is_same = part.wait(seconds)
        # The other hosts hear of it by the sum, this one has seen it.
        total = part.total if is_same else message.fill_(torch.nan)
        if is_first:
            self._sum_between(total, wait)
        if not is_same:
            return total
        patience = seconds + _MARGIN_SECONDS
        answer = within.send(total, size, 0, patience, is_zero=not is_first)
        answer.wait(patience)
        return answer.total

    def _sum_between(self, total: Tensor, wait: Callable[[dist.Work], None]) -> Tensor:
        assert self._between is not None
        wait(self._between.allreduce([total]))
        return total

    def _give_up(self) -> None:
        """Have all members raise: those of this host by its memory, others by closed connections."""
        self._is_over = True
        if self._within is not None:
            self._within.give_up()
        # Its connections close with it.
        self._between = None


# By their groups, and held by nothing else: torch must be able to end them.
_levels: weakref.WeakKeyDictionary[dist.ProcessGroup, TwoLevels] = weakref.WeakKeyDictionary()

levels_of: Callable[[dist.ProcessGroup], TwoLevels | None] = _levels.get


def negotiate(group: dist.ProcessGroup, machine: str) -> None:
    """Have those members of a new group that are on one host share memory, if all of them can.

    *Collectives*: two gathers of objects over `group`, where that sends the CPU's tensors by gloo,
    and between them the making of a group of the first member of each host, if there are several;
    every member must call.
    """
    types = undocumented.device_types(group)
    if "cpu" not in types or undocumented.backend_for(group, torch.device("cpu")) != "gloo":
        return
    me = dist.get_group_rank(group, dist.get_rank())
    # Each may be the first of its host.
    why, fd, token = shared.offer(dist.get_world_size(group))
    try:
        said = _gather(_facts(why, machine, fd, token), group)
        hosts = _by_host(said)
        if len(hosts) < len(said) and all(_can_share(facts, said[0]) for facts in said):
            _share(group, me, said, hosts, fd)
    finally:
        if fd >= 0:
            os.close(fd)


def _facts(why: str, machine: str, fd: int, token: str) -> Facts:
    """This member's part in the negotiation."""
    host = machine if why else f"{machine} {shared.numbering()}"
    digest = "" if why else native.build.digest()
    started = shared.start_of(os.getpid())
    return Facts(why, host, digest, os.getpid(), started, system.usable_cores(), fd, token)


def _can_share(facts: Facts, first: Facts) -> bool:
    return not facts.refusal and facts.digest == first.digest and facts.started != ""


def _by_host(said: list[Facts]) -> list[list[int]]:
    """The members of each host, in the order of the first of each."""
    hosts: dict[str, list[int]] = {}
    for member, facts in enumerate(said):
        hosts.setdefault(facts.machine, []).append(member)
    return list(hosts.values())


def _share(
    group: dist.ProcessGroup, me: int, said: list[Facts], hosts: list[list[int]], fd: int
) -> None:
    """Share memory in each host, and connect the hosts, unless any member fails in its part."""
    (host,) = (members for members in hosts if me in members)
    is_first = len(hosts) > 1 and me == host[0]
    handle = between = None
    try:
        if len(host) > 1:
            handle = shared.map_first(host.index(me), [said[member] for member in host], fd)
        if is_first:
            between = _connect(group, hosts.index(host), len(hosts))
        is_ready = (handle is not None or len(host) == 1) and (between is not None or not is_first)
        if not all(_gather(is_ready, group)):
            return
        segment = None
        if handle is not None:
            ranks = dist.get_process_group_ranks(group)
            peers = [said[member] for member in host]
            segment = Segment(handle, peers, [ranks[member] for member in host])
            handle = None
        if len(hosts) > 1:
            _levels[group] = TwoLevels(segment, between)
        elif segment is not None:
            shared.segments[group] = segment
    finally:
        if handle is not None:
            shared.close(handle)


def _connect(group: dist.ProcessGroup, number: int, size: int) -> dist.ProcessGroup | None:
    """Make the group of the first member of each host; None if they do not meet."""
    try:
        return undocumented.gloo_beside(group, "syncnorm/hosts", number, size)
    except RuntimeError:
        return None


def _gather(mine: Any, group: dist.ProcessGroup) -> list[Any]:
    # Not an exchange of `exchange`: it is part of making the group, which nobody counts.
    said: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, mine, group=group)
    return said
