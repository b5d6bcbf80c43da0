"""A check and its verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from syncnorm.verify.context import Context

Status = Literal["passed", "failed", "hangs", "not offered", "not run"]


class CheckFailed(Exception):
    """The layer breaks the promise of a check; the message gives the numbers."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check.

    Args:
        status: hangs: workers wait for each other for good; not offered: the layer does not claim
            to do this, or there are too few workers; not run: an earlier check ended the run.
        reason: why, unless it passed.
    """

    status: Status
    reason: str = ""

    @property
    def is_bad(self) -> bool:
        """True if the layer broke a promise."""
        return self.status in ("failed", "hangs")


@dataclass(frozen=True)
class Check:
    """One promise, held against a layer on live workers.

    Args:
        theme: its module.
        name: in the report and in `--json`.
        meaning: the promise, in words.
        run: called on every worker at once with its `Context`; raises `CheckFailed`.
        needs: claims of a `LayerUnderTest` without which it is not offered.
        workers: the fewest with which it makes sense.
    """

    theme: str
    name: str
    meaning: str
    run: Callable[[Context], None]
    needs: tuple[str, ...] = ()
    workers: int = 1


registered: dict[str, Check] = {}
"""The checks by name, in the order of their definition."""


def check(
    name: str, meaning: str, *, needs: str = "", workers: int = 1
) -> Callable[[Callable[[Context], None]], Check]:
    """Make a function a check of its module's theme; `needs`: capabilities with commas between."""

    def register(function: Callable[[Context], None]) -> Check:
        theme = function.__module__.rpartition(".")[2]
        made = Check(
            theme, name, meaning, function, tuple(n.strip() for n in needs.split(",") if n), workers
        )
        assert name not in registered
        registered[name] = made
        return made

    return register
