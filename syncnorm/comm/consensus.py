"""Debug mode: workers agree on an exchange before they make it.

Each worker leaves its signature of the exchange in the Store of the process group and looks for
those of the others. Whoever first sees them all, or runs out of patience, writes the decision (a
compare-and-set, so there is one): to go, or what is wrong. All obey the decision, also one who
comes late and then finds every signature there; so nobody goes into an exchange that another has
given up. What is wrong is also written for the whole world, and is the answer to everybody who
comes to an exchange later, over whatever group.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.distributed as dist

from syncnorm.comm import debug, groups
from syncnorm.comm.inflight import Flight, describe, world_store
from syncnorm.errors import ExchangeError

NO_DATA = "no data"
"""The kind of a worker's answers when its data has run out: zeros, to whatever the others exchange.
"""
_VERDICT, _HEARD = "syncnorm/verdict", "syncnorm/heard"
_GO = "go"
# How long one who raises stays for the others to hear of it: the store may end with this process.
_GRACE_SECONDS = 1.0
_SHORTEST_NAP_SECONDS, _LONGEST_NAP_SECONDS = 0.0002, 0.02


class Signature(NamedTuple):
    """What a worker is about to exchange."""

    kind: str
    name: str
    call: int
    numel: int
    """How many numbers it carries."""
    size: int
    """How many travel."""

    def __str__(self) -> str:
        return describe(*self[:4])


class Signing:
    """The words between the members of a group about one exchange.

    Args:
        flight: the exchange.
        group: over which group.
    """

    def __init__(self, flight: Flight, group: dist.ProcessGroup) -> None:
        self._flight = flight
        # Not documented; a test notices if it changes.
        self._store = dist.distributed_c10d._get_process_group_store(group)
        self._world = world_store()
        self._number = flight.line.signed
        flight.line.signed += 1

    @property
    def patience_seconds(self) -> float:
        return debug.debug_timeout_seconds() or self._flight.line.timeout_seconds

    def reach(self) -> None:
        """Return when all members are about to make this exchange, or raise what all others raise."""
        try:
            if self._world.check([_VERDICT]):
                raise ExchangeError(self._world.get(_VERDICT).decode())
            self._forget_earlier()
            flight = self._flight
            mine = Signature(flight.kind, flight.name, flight.call, flight.count, flight.size)
            self._store.set(self._key("is", groups.rank()), json.dumps(mine))
            decision = self._store.compare_set(self._key("decision"), "", self._judge()).decode()
            if decision != _GO:
                raise ExchangeError(self._publish(decision, len(self._who("is"))))
        except dist.DistError as error:
            raise ExchangeError(self._lost(error)) from error

    def broken(self, error: BaseException) -> str:
        """After the exchange broke: find out who is still there; the same words everywhere."""
        try:
            self._store.set(self._key("broke", groups.rank()), "")
            self._wait(lambda: len(self._who("broke")) == len(self._members), _GRACE_SECONDS)
            here = self._who("broke")
            gone = [rank for rank in self._members if rank not in here]
            what = (
                f"nothing more from {_ranks(gone)}"
                if gone
                else f"from rank {groups.rank()}: {error}"
            )
            return self._publish(
                f"exchange must be made by all of ranks {self._members}, got {what}, in "
                f"{self._flight}. "
                "Look for the cause in the log of that worker.",
                len(here),
            )
        except dist.DistError as lost:
            return self._lost(lost)

    @property
    def _members(self) -> list[int]:
        return self._flight.line.members

    def _judge(self) -> str:
        """The decision, as far as this worker can tell."""
        everyone = [self._key("is", rank) for rank in self._members]
        self._wait(
            lambda: (
                self._store.check(everyone)
                or self._store.check([self._key("decision")])
                or self._world.check([_VERDICT])
            ),
            self.patience_seconds,
        )
        if self._store.check(everyone):
            at = dict(zip(self._members, map(_read, self._store.multi_get(everyone)), strict=True))
            return _GO if _are_alike(at) else self._complain(at, [])
        if self._world.check([_VERDICT]):
            return self._world.get(_VERDICT).decode()
        at = {rank: self._signature(rank, self._number) for rank in self._who("is")}
        return self._complain(at, [rank for rank in self._members if rank not in at])

    def _complain(self, at: dict[int, Signature], missing: list[int]) -> str:
        late = []
        for rank in missing:
            last = (
                f"last at {self._signature(rank, self._number - 1)}"
                if self._number
                else "at none before"
            )
            late.append(f"rank {rank} not there within {self.patience_seconds:g} s ({last})")
        return at_different_places({rank: str(place) for rank, place in at.items()}, late)

    def _who(self, what: str) -> list[int]:
        return [rank for rank in self._members if self._store.check([self._key(what, rank)])]

    def _signature(self, rank: int, number: int) -> Signature:
        return _read(self._store.get(_key(number, "is", rank)))

    def _forget_earlier(self) -> None:
        """All have left the last exchange but one: each has come to the last one."""
        if self._number >= 2:
            self._store.delete_key(_key(self._number - 2, "is", groups.rank()))
            if groups.rank() == self._members[0]:
                self._store.delete_key(_key(self._number - 2, "decision"))

    def _publish(self, verdict: str, present: int) -> str:
        """Tell the world, and stay until so many have heard. Returns the verdict that was first."""
        first = self._world.compare_set(_VERDICT, "", verdict).decode()
        # The one that hosts the store may have heard enough, and left.
        with contextlib.suppress(dist.DistError):
            self._world.add(_HEARD, 1)
            self._wait(lambda: self._world.add(_HEARD, 0) >= present, _GRACE_SECONDS)
        return first

    def _lost(self, error: BaseException) -> str:
        return (
            "exchange must be agreed upon through the Store of the process group, which cannot be "
            "reached at "
            f"{self._flight}: {error}. The worker that hosts it (rank 0, unless a launcher does) "
            "has ended."
        )

    def _wait(self, is_done: Callable[[], bool], patience_seconds: float) -> None:
        deadline, nap = time.monotonic() + patience_seconds, _SHORTEST_NAP_SECONDS
        while not is_done() and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(nap, left))
            nap = min(nap * 1.5, _LONGEST_NAP_SECONDS)

    def _key(self, what: str, rank: int | None = None) -> str:
        return _key(self._number, what, rank)


def at_different_places(at: dict[int, str], late: Sequence[str] = ()) -> str:
    """Words for workers that are in different exchanges.

    Args:
        at: of each rank, the exchange that it is in.
        late: what to say of those who are in none.
    """
    places = [
        f"{_ranks([r for r in at if at[r] == place])} at {place}"
        for place in dict.fromkeys(at.values())
    ]
    return (
        "workers must make the same exchanges in the same order, got "
        f"{', '.join([*places, *late])}. Look at what "
        "differs there: a layer skipped or called once more, evaluation mode, another number of "
        "channels or batches, "
        "an error, a worker that ended or is slow."
    )


def _key(number: int, what: str, rank: int | None = None) -> str:
    return f"syncnorm/{number}/{what}" if rank is None else f"syncnorm/{number}/{what}/{rank}"


def _are_alike(at: dict[int, Signature]) -> bool:
    """Whether it is one exchange. One who has no more data knows no more of it than its size."""
    sizes = {place.size for place in at.values()}
    return len(sizes) == 1 and len({place for place in at.values() if place.kind != NO_DATA}) <= 1


def _read(signature: bytes) -> Signature:
    return Signature(*json.loads(signature))


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
