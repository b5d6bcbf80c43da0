"""Before anything is pooled, every worker says which layers it has and with whom each pools; all go
on, or none.

A worker that means other workers than these mean would wait for somebody who never comes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from syncnorm.comm import exchange, groups
from syncnorm.comm.groups import Group, Kept
from syncnorm.comm.rules import Ranks
from syncnorm.errors import FaultError


class Statement(NamedTuple):
    """What one worker says of a layer."""

    name: str
    kind: str
    workers: str
    """With whom it pools, in words."""
    members: list[int] | None
    """Their ranks, where these were given; None for a rule, which is the same in the same words."""
    backend: str


def agree(layers: Sequence[tuple[str, str, Kept]], among: Group, device: torch.device) -> None:
    """Compare what the members of `among` say of their layers; where these are all workers, make
    their groups.

    *Collectives*: two all-gathers over `among`, and the creation of groups. Every member must call.

    Args:
        layers: name, kind (in words) and process group of each layer.

    Raises:
        FaultError: they do not agree; the same on all members.
    """
    mine = [_state(*layer) for layer in layers]
    text = json.dumps([groups.this_machine(), mine])
    texts = exchange.gather_text(text, among, "agreement", groups.device_for(among, device))
    machines, rows = zip(*(json.loads(each) for each in texts))
    said = dict(zip(groups.ranks(among), ([Statement(*each) for each in row] for row in rows)))
    _check_layers(said)
    for statements in zip(*said.values()):
        _check_workers(dict(zip(said, statements)))
    if list(said) == list(range(dist.get_world_size())):
        groups.know_machines(list(machines))
        for (_, _, kept), *statements in zip(layers, *said.values()):
            parts = {(s.backend, tuple(s.members)) for s in statements if s.members is not None}
            groups.make_all(sorted(parts), groups.origin(kept)[0])


def _state(name: str, kind: str, kept: Kept) -> Statement:
    if isinstance(kept, groups.Outside):
        return Statement(name, kind, repr(kept), [], "")
    parent, rule = groups.origin(kept)
    backend = dist.get_backend_config(parent)
    if isinstance(rule, Ranks):
        members = list(rule.members)
        return Statement(name, kind, f"ranks {members}", members, backend)
    return Statement(name, kind, repr(rule), None, backend)


def _check_layers(said: dict[int, list[Statement]]) -> None:
    """The same layers in the same order."""
    for number in range(max(len(each) for each in said.values())):
        found = {
            r: each[number][:2] if number < len(each) else ("none", "") for r, each in said.items()
        }
        if len(set(found.values())) > 1:
            raise FaultError(
                "`model` must have the same layers in the same order on every worker, got "
                f"{_by_worker({r: ' '.join(each).strip() for r, each in found.items()})} as number "
                f"{number}. "
                "Build the model alike on all workers."
            )


def _check_workers(said: dict[int, Statement]) -> None:
    """The same rule; or each worker the ranks that those ranks give, too."""
    if not all(_is_answered(rank, said) for rank in said):
        layer = next(iter(said.values())).name
        raise FaultError(
            "`process_group` must mean the same workers to each of them, got "
            f"{_by_worker({r: s.workers for r, s in said.items()})} in layer {layer!r}. "
            'Give each worker the group that it is in, or all the same rule, such as 2 or "node".'
        )


def _is_answered(rank: int, said: dict[int, Statement]) -> bool:
    members = said[rank].members
    if members is None:
        return all(other[2:] == said[rank][2:] for other in said.values())
    exist = all(0 <= member < dist.get_world_size() for member in members)
    return (
        rank in members
        and exist
        and all(said[m][3:] == said[rank][3:] for m in members if m in said)
    )


def _by_worker(words: dict[int, str]) -> str:
    alike = {text: [r for r, each in words.items() if each == text] for text in words.values()}
    return " and ".join(f"{text} on rank(s) {ranks}" for text, ranks in alike.items())
