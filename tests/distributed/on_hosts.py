"""Groups whose members are on several hosts: a member's host is what a test tells it to say."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from syncnorm.comm import groups, hosts
from syncnorm.comm.groups import Group

WORLD = 4


def group_of(layout: str, seconds: float = 60.0) -> Group:
    """A group of all ranks, each on the host of its letter."""
    group = dist.new_group(list(range(len(layout))), timeout=timedelta(seconds=seconds))
    assert isinstance(group, Group)
    hosts.negotiate(group, layout[dist.get_rank()])
    return group


def say(layout: str) -> None:
    """Have every group from now on find its members on these hosts."""
    groups.machine_id = lambda: layout[dist.get_rank()]
