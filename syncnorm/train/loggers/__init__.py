"""Loggers: services that get a run's figures, besides `metrics.jsonl`, which holds all of them.

A logger runs on the first worker, in a thread of its own (`syncnorm.train.loggers.guarded`):
whatever it does, training goes on.
"""

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from syncnorm.errors import ConfigError
from syncnorm.train.config.callables import resolve
from syncnorm.train.config.schema import LOGGERS, Config
from syncnorm.train.files import read_regular, write_text_whole
from syncnorm.train.loggers.guarded import GuardedLogger

IDS = "loggers.json"

_INSTALL = {"tensorboard": "'syncnorm[tensorboard]'"}


class Logger(Protocol):
    """A service that gets figures. It is called as `Class(run, **options)`, once for a process."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step, by the names that they have in `metrics.jsonl`."""
        ...

    def close(self) -> None:
        """Send what is left, and end."""
        ...


@dataclass(frozen=True)
class LoggedRun:
    """A run as a logger sees it.

    Args:
        name: of the run.
        tags: of the run.
        config: its whole configuration.
        folder: of the run.
    """

    name: str
    tags: tuple[str, ...]
    config: dict[str, Any]
    folder: Path

    def recall(self, service: str) -> str | None:
        """Return the id that the run had at a service before it was resumed."""
        return self._ids().get(service)

    def remember(self, service: str, id: str) -> None:
        """Keep the run's id at a service in the run's folder."""
        ids = self._ids() | {service: id}
        write_text_whole(self.folder / IDS, json.dumps(ids, sort_keys=True) + "\n")

    def _ids(self) -> dict[str, str]:
        try:
            found = json.loads(read_regular(self.folder / IDS))
        except (OSError, ValueError):
            return {}
        # The folder may be somebody else's.
        return {
            service: id
            for service, id in (found.items() if isinstance(found, dict) else ())
            if isinstance(id, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", id, re.ASCII)
        }


def open_loggers(
    config: Config, folder: Path, allowed: tuple[str, ...] = ()
) -> list[GuardedLogger]:
    """Start the loggers that a configuration names; on the first worker.

    Raises:
        ConfigError: the package of one is missing, or its class is not allowed or not there.
    """
    made = []
    for name, options in config.follow.loggers.items():
        # Its own, which it may change.
        values = config.model_dump(mode="json")
        run = LoggedRun(config.name or folder.name, tuple(config.tags), values, folder)
        if name in LOGGERS:
            _check_installed(name)
            make = partial(_make_builtin, name, run, options)
        else:
            make = partial(resolve(name, allowed, "follow.loggers"), run, **options)
        made.append((name, make))
    return [GuardedLogger(name, make) for name, make in made]


def _check_installed(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"`follow.loggers` names {name!r}, which is not installed. Install it with: "
            f"pip install {_INSTALL.get(name, name)}"
        )


def _make_builtin(name: str, run: LoggedRun, options: dict[str, Any]) -> Logger:
    # In the logger's own thread: these packages take seconds to import.
    from syncnorm.train.loggers import builtin

    return builtin.MAKERS[name](run, **options)
