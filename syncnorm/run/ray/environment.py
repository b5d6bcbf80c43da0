"""The runtime environment of a Ray job: variables, the code of the working folder, the user's own."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from syncnorm.errors import ConfigError
from syncnorm.run.env import read_cluster
from syncnorm.train.config import strict_yaml
from syncnorm.train.config.schema import Config
from syncnorm.train.config.section import REFERENCE

# Least time between a stop and a kill. Workers finish their step and save, and a network file
# system may show them the STOP file only after a minute. `stop` waits for the job's end, however
# long that takes.
_STOP_SECONDS = 120
_STOP_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
_NEVER_PACKED = (
    "**/.git", "**/.venv", "**/venv", "**/__pycache__", "**/checkpoints", "**/.env",
    "**/*.safetensors", "**/.ray/auth_token",
)  # fmt: skip
# Characters of a path that have a meaning in gitignore patterns, or are stripped at their end.
_ESCAPED = {character: f"\\{character}" for character in "\\*?[]"} | {
    character: f"[{character}]" for character in " \t\n"
}


def read_runtime_env(path: Path | None) -> dict[str, Any]:
    """Read a runtime environment of Ray's from a YAML or JSON file; empty without one.

    Raises:
        ConfigError: it cannot be read, or Ray would not take it.
    """
    if path is None:
        return {}
    # After what Ray must be told before it is imported.
    from syncnorm.run.ray.client import RuntimeEnv

    try:
        values = strict_yaml.parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"`--runtime-env` must be a YAML or JSON file, got {str(path)!r}: {error}"
        ) from None
    if not isinstance(values, dict) or not isinstance(values.get("env_vars") or {}, dict):
        raise ConfigError(
            f"`--runtime-env` must hold a mapping, as Ray's runtime_env is one, got {str(path)!r}"
        )
    values = {key: value for key, value in values.items() if value is not None}
    try:
        RuntimeEnv(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"`--runtime-env` must hold what Ray's runtime_env takes, got {str(path)!r}: {error}"
        ) from None
    return values


def make_runtime_env(config: Config, own: Mapping[str, Any]) -> dict[str, Any]:
    """Merge what a job needs into the user's own runtime environment.

    Args:
        config: of the run.
        own: from `read_runtime_env`.

    Raises:
        ConfigError: both set the same.
    """
    seconds = max(_STOP_SECONDS, round(2 * config.launch.patience_seconds))
    variables = dict(own.get("env_vars", {}))
    if _STOP_VARIABLE in variables:
        raise ConfigError(
            f"`--runtime-env` must leave {_STOP_VARIABLE} out: it follows from "
            "launch.timeout_seconds"
        )
    # Ray's default of 3 seconds is too short for a save.
    environment = {**own, "env_vars": {**variables, _STOP_VARIABLE: str(seconds)}}
    place = own.get("working_dir", str(Path.cwd()))
    if "working_dir" in own or names_code(config):
        environment["working_dir"] = place
    if "working_dir" in environment and "://" not in str(place):
        environment["excludes"] = [
            *own.get("excludes", []),
            *exclude_patterns(Path(place).absolute(), config.run_dir, config.data.root),
        ]
    return environment


def names_code(config: Config) -> bool:
    """Return True if a configuration names callables that are not built in."""
    names = (config.model.name, config.data.name, config.task.name, *config.follow.loggers)
    return any(map(REFERENCE.fullmatch, names))


def read_resources(
    cpus: float | None, gpus: float | None, memory: int | None, others: str | None
) -> dict[str, Any]:
    """Return the resources of a job's driver as arguments of Ray's client.

    Args:
        cpus, gpus: numbers; None: Ray's own.
        memory: bytes.
        others: further resources by name, as JSON.

    Raises:
        ConfigError: the JSON is no mapping from names to numbers.
    """
    named = {"entrypoint_num_cpus": cpus, "entrypoint_num_gpus": gpus, "entrypoint_memory": memory}
    found: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if others is not None:
        try:
            values = json.loads(others)
        except ValueError:
            values = None
        if not isinstance(values, dict) or not all(
            type(value) in (int, float) for value in values.values()
        ):
            raise ConfigError(
                '`--entrypoint-resources` must be JSON such as {"spot": 1}, got ' + repr(others)
            )
        found["entrypoint_resources"] = values
    return found


def exclude_patterns(here: Path, *others: str | None) -> list[str]:
    """Return gitignore patterns for all in the working folder that is not code.

    Args:
        here: the working folder.
        others: folders of runs and data.
    """
    token, home = read_cluster().token_path, here.resolve()
    token = token and token.absolute()
    found = set[str]()
    for other in (*others, token):
        if other is not None:
            path = here / other
            # The name as given, the link that it may be, and the target of that.
            for name in (
                Path(os.path.normpath(path)),
                path.parent.resolve() / path.name,
                path.resolve(),
            ):
                found |= {
                    str(name.relative_to(root)) for root in (here, home) if root in name.parents
                }
    found |= set(_unpackable(here, found))
    return [*_NEVER_PACKED, *sorted("/" + "".join(map(_escape, name)) for name in found)]


def _unpackable(here: Path, left_out: set[str]) -> Iterator[str]:
    """Name what Ray would wait for, such as a pipe, cannot read, or cannot write into an archive."""
    skipped = {pattern.removeprefix("**/") for pattern in _NEVER_PACKED}
    for folder, folders, files in os.walk(here):
        at = Path(folder).relative_to(here)
        for name in (*folders, *files):
            path = here / at / name
            is_fit = path.is_dir() or (path.is_file() and os.access(path, os.R_OK))
            # A link to nothing is packed as one.
            if any(map(_is_no_text, name)) or not (is_fit or path.is_symlink()):
                yield str(at / name)
        folders[:] = [
            name for name in folders if name not in skipped and str(at / name) not in left_out
        ]


def _escape(character: str) -> str:
    """Escape a character of a path for a pattern."""
    return "?" if _is_no_text(character) else _ESCAPED.get(character, character)


def _is_no_text(character: str) -> bool:
    """A byte of a name that is no text is a surrogate in Python."""
    return "\ud800" <= character <= "\udfff"
