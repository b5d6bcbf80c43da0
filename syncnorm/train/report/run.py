"""Reader of runs' folders."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from syncnorm.errors import ConfigError
from syncnorm.train.config import strict_yaml
from syncnorm.train.files import read_regular
from syncnorm.train.report.events import Events, read_events


@dataclass(frozen=True)
class Run:
    """Content of a run's folder.

    Args:
        name: the configuration's, or else the folder's, with as many of its parents as set it apart
            from the others.
        config_text: `config.yaml` as it stands there.
        config: the same, parsed.
        status: done, failed or stopped; None where no end is on record.
        reason: of the end.
        events: the records of its course.
    """

    name: str
    config_text: str
    config: dict[str, Any]
    status: str | None
    reason: str
    events: Events


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the folders of runs.

    Raises:
        ConfigError: no folder is given, or one is given twice, is not a run's or is unreadable.
    """
    if not folders:
        raise ConfigError("`runs` must be at least one folder of a run, got none.")
    resolved = [_resolve(folder) for folder in folders]
    for path, count in Counter(resolved).items():
        if count > 1:
            raise ConfigError(f"`runs` must be different folders, got {str(path)!r} {count} times.")
    short = _short_names(resolved)
    runs = [_read_run(path, name) for path, name in zip(resolved, short, strict=True)]
    given = Counter(run.config.get("name") for run in runs if _is_name(run.config.get("name")))
    return [_named(run, given) for run in runs]


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name.strip())


def _named(run: Run, given: Counter[Any]) -> Run:
    """Give a run the name of its configuration, beside its folder's where others have that, too."""
    name = run.config.get("name")
    if not _is_name(name):
        return run
    return replace(run, name=name if given[name] == 1 else f"{name} ({run.name})")


def _resolve(folder: Path) -> Path:
    try:
        path = folder.resolve()
        is_run = (path / "config.yaml").is_file()
    except (
        OSError,
        ValueError,
        RuntimeError,
    ):  # a NUL in the path; links that go round in a circle
        path, is_run = folder, False
    if not is_run:
        raise ConfigError(
            f"`runs` must be folders of runs, got {str(folder)!r}, which holds no config.yaml. "
            "`syncnorm train` prints the folder of its run last."
        )
    return path


def _short_names(paths: list[Path]) -> list[str]:
    # Not whole paths, which reveal something about the machine: pages are passed on.
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read_run(folder: Path, name: str) -> Run:
    config_text = _read_text(folder / "config.yaml")
    config = strict_yaml.parse(config_text, str(folder / "config.yaml"))
    if not isinstance(config, dict):
        raise ConfigError(
            f"{folder / 'config.yaml'}: must be a mapping, got {type(config).__name__}"
        )
    status, reason = _read_exit(folder / "exit.json")
    return Run(name, config_text, config, status, reason, read_events(folder / "metrics.jsonl"))


def _read_exit(path: Path) -> tuple[str | None, str]:
    if not path.exists():
        return None, ""
    try:
        note = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: must be JSON: {error}") from None
    if not isinstance(note, dict) or not isinstance(note.get("status"), str):
        raise ConfigError(f"{path}: must be an object with a `status`, got {str(note)[:80]}")
    return note["status"], note["reason"] if isinstance(note.get("reason"), str) else ""


def _read_text(path: Path) -> str:
    try:
        return read_regular(path, follows_links=True).decode()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: must be UTF-8: {error.reason} at byte {error.start}") from None
