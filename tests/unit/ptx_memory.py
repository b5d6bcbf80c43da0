"""Memory that knows who touched each of its bytes, and whether something came between them."""

from __future__ import annotations

import numpy as np

WARP = 32
NOBODY = np.iinfo(np.int32).max


class PtxError(AssertionError):
    """What a kernel must not do."""


class Clock:
    """When the threads of the program that runs waited for each other.

    Threads have numbers of their own within a launch: no barrier is between those of two programs.
    """

    def __init__(self, threads: int) -> None:
        self.now = 0
        self.threads = threads
        self.start(0)

    def start(self, program: int) -> None:
        self.first = program * self.threads
        self.of_block = self.now
        self.of_warps = np.full(self.threads, self.now)

    def is_ordered(
        self, first: np.ndarray, last: np.ndarray, when: np.ndarray, me: np.ndarray
    ) -> np.ndarray:
        """True where what threads `first` to `last` did, at last then, comes before what `me` do."""
        is_same_warp = (first // WARP == me // WARP) & (last // WARP == me // WARP)
        of_warp = np.where(is_same_warp, self.of_warps[me - self.first], self.of_block)
        is_over = (first >= self.first) & (when < np.maximum(of_warp, self.of_block))
        return (first == NOBODY) | ((first == me) & (last == me)) | is_over


class Memory:
    """Bytes from an address on, which the threads read and write.

    Args:
        name: for messages.
        base: the address of the first byte.
        data: the bytes, uint8.
        clock: that of the launch.
        is_shared: of a block. Nobody may read there what nobody has written, and threads may write
            the same number at once.
    """

    def __init__(
        self, name: str, base: int, data: np.ndarray, clock: Clock, *, is_shared: bool = False
    ) -> None:
        self.name, self.base, self.data, self.clock = name, base, data, clock
        self.is_shared = is_shared
        # A writer, and the readers with the lowest and the highest number.
        self.writer, self.first, self.last = (
            np.full(data.size, who, np.int32) for who in (NOBODY, NOBODY, -1)
        )
        self.written, self.read_at = (np.zeros(data.size, np.int64) for _ in "wr")

    def has(self, address: int) -> bool:
        return self.base <= address < self.base + self.data.size

    def read(self, addresses: np.ndarray, size: int, me: np.ndarray) -> np.ndarray:
        """The bytes at some addresses, (threads, size)."""
        at, me = self._places(addresses, size), me[:, None]
        self._must_be_ordered(at, me, "reads", self.writer, self.writer, self.written)
        if self.is_shared and (self.writer[at] == NOBODY).any():
            raise PtxError(f"reads {self.name} that nobody has written")
        # Readers before a barrier matter no more; those of other programs do.
        is_over = (self.first[at] >= self.clock.first) & (self.read_at[at] < self.clock.of_block)
        over = at[is_over]
        self.first[over], self.last[over] = NOBODY, -1
        np.minimum.at(self.first, at, me)
        np.maximum.at(self.last, at, me)
        self.read_at[at] = self.clock.now
        return self.data[at]

    def write(self, addresses: np.ndarray, values: np.ndarray, me: np.ndarray) -> None:
        """Write (threads, size) bytes."""
        at, me = self._places(addresses, values.shape[1]), me[:, None]
        self._must_be_ordered(at, me, "writes", self.first, self.last, self.read_at)
        is_new = self.data[at] != values if self.is_shared else np.ones(at.shape, bool)
        writer, when = self.writer, self.written
        self._must_be_ordered(at[is_new], _spread(me, at)[is_new], "writes", writer, writer, when)
        self.data[at], self.writer[at], self.written[at] = values, me, self.clock.now
        is_lost = self.writer[at] != me
        if self.is_shared:
            is_lost = (self.data[at] != values) & (self.writer[at] // WARP != me // WARP)
        if is_lost.any():
            raise PtxError(f"two threads write {self.name} in one place at once")

    def _places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        if (addresses % size).any():
            raise PtxError(f"takes {size} bytes of {self.name} at an address that is no multiple")
        places = (addresses - self.base)[:, None] + np.arange(size)
        if (places < 0).any() or (places >= self.data.size).any():
            raise PtxError(f"leaves the {self.data.size} bytes of {self.name}")
        return places

    def _must_be_ordered(
        self,
        at: np.ndarray,
        me: np.ndarray,
        does: str,
        first: np.ndarray,
        last: np.ndarray,
        when: np.ndarray,
    ) -> None:
        is_bad = ~self.clock.is_ordered(first[at], last[at], when[at], me)
        if is_bad.any():
            place, mine = at[is_bad][0], _spread(me, at)[is_bad][0]
            other = last[place] if first[place] == mine else first[place]
            (program, thread), (of, by) = (divmod(i, self.clock.threads) for i in (mine, other))
            did = "written" if first is self.writer else "read"
            raise PtxError(
                f"{does} byte {place} of {self.name} in thread {thread} of program {program}, "
                f"{did} by thread {by} of "
                + ("it with no barrier between" if of == program else f"another program, {of}")
            )


def _spread(me: np.ndarray, at: np.ndarray) -> np.ndarray:
    return np.broadcast_to(me, at.shape)
