"""The command line of a run that goes on: the configuration is the run's own."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import typer

from syncnorm.errors import ConfigError


def choose_config(
    config: str | None, overrides: Sequence[str], resume: Path | None
) -> tuple[str, list[str]]:
    """Choose the configuration of `syncnorm train`: the one that is named, or the run's own.

    Args:
        config: the first argument, which is an override where no configuration is named.
        overrides: the others.
        resume: the folder of the run that goes on; None for a new run.

    Returns:
        The path or name of the configuration, and all overrides.

    Raises:
        BadParameter: there is neither.
        ConfigError: the folder is not a run's.
    """
    is_named = config is not None and ("=" not in config or Path(config).exists())
    if config is not None and is_named:
        return config, list(overrides)
    if resume is None:
        raise typer.BadParameter(
            "must be a YAML file or the name of a packed configuration; only with --resume RUN it "
            "may be left out",
            param_hint="config",
        )
    path = resume / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"`--resume` must name a run's folder, got {str(resume)!r}")
    return str(path), [*([] if config is None else [config]), *overrides]


def resume_command(folder: Path, allowed: Sequence[str]) -> str:
    """Write the command that goes on with a run, to be pasted into a shell."""
    options = [word for package in allowed for word in ("--allow", package)]
    return shlex.join(["syncnorm", "train", "--resume", str(folder), *options])
