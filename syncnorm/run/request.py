"""A run as somebody asks for it: what every launcher gives to its workers."""

from dataclasses import dataclass, field
from pathlib import Path

from syncnorm.run.given import Given
from syncnorm.train.config.schema import Config
from syncnorm.train.config.section import is_url


@dataclass(frozen=True)
class RunRequest:
    """A run as the command line asks for it.

    Args:
        config: the same on all workers.
        name: of the configuration, for the run's folder.
        resume: the folder or the address of the run to resume; None for a new run.
        allowed: packages whose callables the configuration may name.
        given: objects of a program that the configuration names besides.
        shows: True to show the progress, on standard error.
        prints: True to print the result, on standard output.
    """

    config: Config
    name: str
    resume: Path | str | None = None
    allowed: tuple[str, ...] = ()
    given: Given = field(default_factory=Given)
    shows: bool = True
    prints: bool = True


def uses_store(request: RunRequest) -> bool:
    """Return True if the run's folder is copied to or from a store."""
    return is_url(request.config.run_dir) or is_url(str(request.resume))
