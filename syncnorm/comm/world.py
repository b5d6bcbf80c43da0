"""The default process group, the ranks of a group, and the device of a payload."""

from __future__ import annotations

import torch
import torch.distributed as dist

from syncnorm import undocumented

Group = dist.ProcessGroup


def is_initialized() -> bool:
    """True if torch.distributed has a default process group."""
    return dist.is_available() and dist.is_initialized()


def is_shared() -> bool:
    """True if there are other ranks than this."""
    return is_initialized() and dist.get_world_size() > 1


def is_current(group: Group) -> bool:
    """False for a group of a torch.distributed that has been shut down since."""
    try:
        return bool(dist.get_process_group_ranks(group))
    except (KeyError, ValueError):
        return False


def rank() -> int:
    """This process's global rank; 0 without torch.distributed."""
    return dist.get_rank() if is_initialized() else 0


def ranks(group: Group | None) -> list[int]:
    """The global ranks of the members of `group`, in its order; this rank alone without a group."""
    return [rank()] if group is None else dist.get_process_group_ranks(group)


def device_for(group: Group, preferred: torch.device | None = None) -> torch.device:
    """A device whose tensors `group` can send: the preferred one, else the CPU, else its own."""
    types = undocumented.device_types(group)
    if preferred is not None and preferred.type in types:
        return preferred
    if "cpu" in types:
        return torch.device("cpu")
    # That of `init_process_group(device_id=...)`, which need not be the current one.
    world = dist.group.WORLD
    bound = None if world is None else undocumented.bound_device(world)
    return bound if bound is not None and bound.type == types[0] else torch.device(types[0])
