"""The command line of a run that goes on: the configuration is the run's own."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from syncnorm.errors import ConfigError
from syncnorm.system import call_apart
from syncnorm.train.config.file import Written, parse, read
from syncnorm.train.config.section import is_url


class NoConfigError(ConfigError):
    """Neither a configuration was named nor a run to go on with."""


def choose_config(config: str | None, overrides: Sequence[str], resume: str | None) -> Written:
    """Read the configuration of `syncnorm train`: the one that is named, or the run's own.

    Args:
        config: the first argument, which is an override where no configuration is named.
        overrides: the others.
        resume: the folder or the address of the run that goes on; None for a new run.

    Raises:
        NoConfigError: there is neither.
        ConfigError: it cannot be read.
    """
    if config is not None and ("=" not in config or Path(config).exists()):
        return read(config, overrides)
    if resume is None:
        raise NoConfigError(
            "a run must be given a configuration, a YAML file or the name of a packed one such as "
            "digits; one that is resumed (`--resume RUN`) has its own"
        )
    overrides = [*([] if config is None else [config]), *overrides]
    if is_url(resume):
        from syncnorm.train.storage.fetch import read_config

        # Not a copy of the run: each worker of torchrun asks for it.
        return parse(call_apart(read_config, resume), Path("config.yaml"), overrides)
    path = Path(resume) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"`--resume` must name a run's folder, got {resume!r}")
    return read(str(path), overrides)


def resume_command(folder: Path, allowed: Sequence[str]) -> str:
    """Write the command that goes on with a run, to be pasted into a shell."""
    return shlex.join(["syncnorm", "train", "--resume", str(folder), *allow_options(allowed)])


def allow_options(allowed: Sequence[str]) -> list[str]:
    """Write the options of a command that is to take the same packages' callables."""
    return [word for package in allowed for word in ("--allow", package)]
