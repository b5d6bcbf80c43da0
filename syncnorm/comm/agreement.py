"""Agreement of all ranks on the layers of a model and their groups, before anything is pooled.

A rank that pools over other ranks than these expect would wait for one that never comes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from syncnorm.comm import exchange, groups
from syncnorm.comm.groups import Group, GroupHandle
from syncnorm.comm.rules import Ranks
from syncnorm.errors import FaultError


class Statement(NamedTuple):
    """One rank's description of a layer."""

    name: str
    kind: str
    state: str
    """Its parameters and buffers, with their types and shapes."""
    workers: str
    """The ranks that it pools over, in words."""
    members: list[int] | None
    """These ranks, if given as such; None for a rule, which the words identify."""
    backend: str


def agree(
    layers: Sequence[tuple[str, str, str, GroupHandle]], among: Group, device: torch.device
) -> None:
    """Compare the layers of all members of `among`; make the layers' groups if these are all ranks.

    *Collectives*: two all-gathers over `among`, and the creation of groups. Every member must call.

    Args:
        layers: name, kind and state (in words) and process group of each layer.

    Raises:
        FaultError: they do not agree; the same on all members.
    """
    mine = [_describe(*layer) for layer in layers]
    text = json.dumps([groups.machine_id(), mine])
    texts = exchange.gather_text(text, among, "agreement", groups.device_for(among, device))
    machines, rows = zip(*(json.loads(each) for each in texts))
    said = dict(zip(groups.ranks(among), ([Statement(*each) for each in row] for row in rows)))
    _check_layers(said)
    for statements in zip(*said.values()):
        _check_layer(dict(zip(said, statements)))
    if list(said) == list(range(dist.get_world_size())):
        groups.set_machines(list(machines))
        for (*_, handle), *statements in zip(layers, *said.values()):
            parts = {(s.backend, tuple(s.members)) for s in statements if s.members is not None}
            groups.make_all(sorted(parts), groups.parent_and_rule(handle)[0])


def _describe(name: str, kind: str, state: str, handle: GroupHandle) -> Statement:
    if isinstance(handle, groups.NotMember):
        return Statement(name, kind, state, repr(handle), [], "")
    parent, rule = groups.parent_and_rule(handle)
    backend = dist.get_backend_config(parent)
    if isinstance(rule, Ranks):
        members = list(rule.members)
        return Statement(name, kind, state, f"ranks {members}", members, backend)
    return Statement(name, kind, state, repr(rule), None, backend)


def _check_layers(said: dict[int, list[Statement]]) -> None:
    """Raise unless all ranks have the same layers in the same order."""
    for number in range(max(len(each) for each in said.values())):
        found = {
            r: each[number][:2] if number < len(each) else ("none", "") for r, each in said.items()
        }
        if len(set(found.values())) > 1:
            raise FaultError(
                "`model` must have the same layers in the same order on every worker, got "
                f"{_by_rank({r: ' '.join(each).strip() for r, each in found.items()})} as number "
                f"{number}. Build the model alike on all workers."
            )


def _check_layer(said: dict[int, Statement]) -> None:
    """Raise unless all have the same state, and the same rule.

    Instead of a rule each may give ranks, if those ranks give them, too.
    """
    name = next(iter(said.values())).name
    if len({s.state for s in said.values()}) > 1:
        raise FaultError(
            "`model` must have the same parameters and buffers on every worker, got "
            f"{_by_rank({r: s.state for r, s in said.items()})} in layer {name!r}. "
            "Cast and change the model alike on all workers."
        )
    if not all(_is_shared_by_members(rank, said) for rank in said):
        raise FaultError(
            "`process_group` must mean the same workers to each of them, got "
            f"{_by_rank({r: s.workers for r, s in said.items()})} in layer {name!r}. "
            'Give each worker the group that it is in, or all the same rule, such as 2 or "node".'
        )


def _is_shared_by_members(rank: int, said: dict[int, Statement]) -> bool:
    members = said[rank].members
    if members is None:
        return all(other[3:] == said[rank][3:] for other in said.values())
    exist = all(0 <= member < dist.get_world_size() for member in members)
    return (
        rank in members
        and exist
        and all(said[m][4:] == said[rank][4:] for m in members if m in said)
    )


def _by_rank(words: dict[int, str]) -> str:
    same = {text: [r for r, each in words.items() if each == text] for text in words.values()}
    return " and ".join(f"{text} on rank(s) {ranks}" for text, ranks in same.items())
