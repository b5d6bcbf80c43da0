"""What a check is, and what becomes of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from syncnorm.verify.team import Team

Status = Literal["passed", "failed", "hangs", "not offered", "not run"]


class Wrong(Exception):
    """A layer does not do what a check asks; the message gives the numbers."""


@dataclass(frozen=True)
class Verdict:
    """What a check came to.

    Args:
        status: hangs: workers wait for each other for good; not offered: the layer does not claim
            to do this, or there are too few workers; not run: an earlier check ended the run.
        reason: why, unless it passed.
    """

    status: Status
    reason: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether the layer did wrong."""
        return self.status in ("failed", "hangs")


@dataclass(frozen=True)
class Check:
    """One promise, held against a layer on live workers.

    Args:
        theme: what it belongs to.
        name: what the report and `--json` call it.
        meaning: what is so if it passes.
        run: called on every worker at once with its `Team`; raises `Wrong`.
        needs: capabilities (see `subject`) without which it makes no sense.
        workers: the fewest with which it makes sense.
    """

    theme: str
    name: str
    meaning: str
    run: Callable[[Team], None]
    needs: tuple[str, ...] = ()
    workers: int = 1


_checks: dict[str, Check] = {}


def check(
    name: str, meaning: str, *, needs: str = "", workers: int = 1
) -> Callable[[Callable[[Team], None]], Check]:
    """Make a function a check of its module's theme; `needs`: capabilities with commas between."""

    def register(function: Callable[[Team], None]) -> Check:
        theme = function.__module__.rpartition(".")[2]
        made = Check(
            theme, name, meaning, function, tuple(n.strip() for n in needs.split(",") if n), workers
        )
        assert name not in _checks
        _checks[name] = made
        return made

    return register


def all_checks() -> dict[str, Check]:
    """Every check by its name, in the order in which they are run."""
    from syncnorm.verify import checks  # noqa: F401 they register themselves

    return dict(_checks)
