"""Debug mode: ranks agree on an exchange, through the group's Store, before they make it.

Each rank writes the identity of its exchange into the Store and reads those of the others. The
first that sees them all, or that has waited too long, writes the decision (a compare-and-set, so
there is one): to go, or the error. All obey the decision, also a late rank that then finds every
identity there; so no rank enters an exchange that another has given up. An error is also written
into the Store of the default group, and every rank that comes to an exchange later, over whatever
group, raises it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.distributed as dist

from syncnorm import undocumented
from syncnorm.comm import debug
from syncnorm.comm.inflight import InFlight, describe
from syncnorm.comm.world import rank as own_rank
from syncnorm.errors import ExchangeError

NO_DATA = "no data"
"""The kind of the zeros that a rank without data sends, whatever the others exchange."""
_VERDICT, _HEARD = "syncnorm/verdict", "syncnorm/heard"
_GO = "go"
# A rank that raises waits so long for the others to read the error: the Store may end with it.
_GRACE_SECONDS = 1.0
_SHORTEST_NAP_SECONDS, _LONGEST_NAP_SECONDS = 0.0002, 0.02


class CollectiveId(NamedTuple):
    """The identity of the exchange that a rank is about to make."""

    kind: str
    name: str
    call: int
    numel: int
    """Numbers of the payload."""
    size: int
    """Numbers sent."""

    def __str__(self) -> str:
        return describe(*self[:4])


class Consensus:
    """Agreement of the members of a group on one exchange.

    Args:
        flight: the exchange.
        group: the ranks.
    """

    def __init__(self, flight: InFlight, group: dist.ProcessGroup) -> None:
        self._flight = flight
        self._store = undocumented.store_of(group)
        self._world = undocumented.world_store()
        self._number = flight.log.agreed
        flight.log.agreed += 1

    @property
    def timeout_seconds(self) -> float:
        return debug.wait_seconds or self._flight.log.timeout_seconds

    def agree(self) -> None:
        """Return once all members are about to make this exchange; else raise the same on all."""
        try:
            if self._world.check([_VERDICT]):
                raise ExchangeError(self._world.get(_VERDICT).decode())
            self._delete_earlier()
            flight = self._flight
            mine = CollectiveId(flight.kind, flight.name, flight.call, flight.count, flight.size)
            self._store.set(self._key("is", own_rank()), json.dumps(mine))
            decision = self._store.compare_set(self._key("decision"), "", self._decide()).decode()
            if decision != _GO:
                raise ExchangeError(self._publish(decision, len(self._ranks_with("is"))))
        except dist.DistError as error:
            raise ExchangeError(self._store_lost(error)) from error

    def diagnose(self, error: BaseException) -> str:
        """Find out which ranks are gone after an error; returns the same message on all others."""
        try:
            self._store.set(self._key("broke", own_rank()), "")
            self._wait(lambda: len(self._ranks_with("broke")) == len(self._members), _GRACE_SECONDS)
            here = self._ranks_with("broke")
            gone = [rank for rank in self._members if rank not in here]
            what = (
                f"nothing more from {_ranks(gone)}" if gone else f"from rank {own_rank()}: {error}"
            )
            return self._publish(
                f"exchange must be made by all of ranks {self._members}, got {what}, in "
                f"{self._flight}. Look for the cause in the log of that worker.",
                len(here),
            )
        except dist.DistError as lost:
            return self._store_lost(lost)

    @property
    def _members(self) -> list[int]:
        return self._flight.log.members

    def _decide(self) -> str:
        """Wait for the other ranks; returns the decision that this rank would write."""
        everyone = [self._key("is", rank) for rank in self._members]
        self._wait(
            lambda: (
                self._store.check(everyone)
                or self._store.check([self._key("decision")])
                or self._world.check([_VERDICT])
            ),
            self.timeout_seconds,
        )
        if self._store.check(everyone):
            at = dict(zip(self._members, map(_parse, self._store.multi_get(everyone)), strict=True))
            return _GO if _are_alike(at) else self._describe_mismatch(at, [])
        if self._world.check([_VERDICT]):
            return self._world.get(_VERDICT).decode()
        at = {rank: self._read(rank, self._number) for rank in self._ranks_with("is")}
        return self._describe_mismatch(at, [rank for rank in self._members if rank not in at])

    def _describe_mismatch(self, at: dict[int, CollectiveId], missing: list[int]) -> str:
        late = []
        for rank in missing:
            last = (
                f"last at {self._read(rank, self._number - 1)}"
                if self._number
                else "at none before"
            )
            late.append(f"rank {rank} not there within {self.timeout_seconds:g} s ({last})")
        return at_different_places({rank: str(place) for rank, place in at.items()}, late)

    def _ranks_with(self, what: str) -> list[int]:
        return [rank for rank in self._members if self._store.check([self._key(what, rank)])]

    def _read(self, rank: int, number: int) -> CollectiveId:
        return _parse(self._store.get(_key(number, "is", rank)))

    def _delete_earlier(self) -> None:
        """Delete the keys of the last exchange but one: all ranks have come to the last one."""
        if self._number >= 2:
            self._store.delete_key(_key(self._number - 2, "is", own_rank()))
            if own_rank() == self._members[0]:
                self._store.delete_key(_key(self._number - 2, "decision"))

    def _publish(self, verdict: str, present: int) -> str:
        """Write the error, unless there is one; returns it once `present` ranks have read it."""
        first = self._world.compare_set(_VERDICT, "", verdict).decode()
        # The one that hosts the store may have heard enough, and left.
        with contextlib.suppress(dist.DistError):
            self._world.add(_HEARD, 1)
            self._wait(lambda: self._world.add(_HEARD, 0) >= present, _GRACE_SECONDS)
        return first

    def _store_lost(self, error: BaseException) -> str:
        return (
            "exchange must be agreed upon through the Store of the process group, which cannot be "
            f"reached at {self._flight}: {error}. The worker that hosts it (rank 0, unless a "
            "launcher does) has ended."
        )

    def _wait(self, is_done: Callable[[], bool], timeout_seconds: float) -> None:
        deadline, nap = time.monotonic() + timeout_seconds, _SHORTEST_NAP_SECONDS
        while not is_done() and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(nap, left))
            nap = min(nap * 1.5, _LONGEST_NAP_SECONDS)

    def _key(self, what: str, rank: int | None = None) -> str:
        return _key(self._number, what, rank)


def at_different_places(at: dict[int, str], late: Sequence[str] = ()) -> str:
    """Return the error message for ranks that are in different exchanges.

    Args:
        at: the exchange of each rank that is in one.
        late: words for those that are in none.
    """
    places = [
        f"{_ranks([r for r in at if at[r] == place])} at {place}"
        for place in dict.fromkeys(at.values())
    ]
    return (
        "workers must make the same exchanges in the same order, got "
        f"{', '.join([*places, *late])}. Look at what differs there: a layer skipped or called "
        "once more, evaluation mode, another number of channels or batches, an error, a worker "
        "that ended or is slow."
    )


def _key(number: int, what: str, rank: int | None = None) -> str:
    return f"syncnorm/{number}/{what}" if rank is None else f"syncnorm/{number}/{what}/{rank}"


def _are_alike(at: dict[int, CollectiveId]) -> bool:
    """True if all ranks are about to make one exchange. A rank without data knows only its size."""
    sizes = {place.size for place in at.values()}
    return len(sizes) == 1 and len({place for place in at.values() if place.kind != NO_DATA}) <= 1


def _parse(text: bytes) -> CollectiveId:
    return CollectiveId(*json.loads(text))


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
