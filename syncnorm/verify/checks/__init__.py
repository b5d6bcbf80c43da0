"""The checks, by theme, in the order in which they are run."""

from syncnorm.verify.check import Check, registered  # noqa: I001 the order of the report
from syncnorm.verify.checks import (
    shards,
    counts,
    masks,
    precision,
    layouts,
    options,
    gradients,
    buffers,
    evaluation,
    renorm,
    state,
    messages,
    faults,
    ddp,
)

__all__ = [
    "all_checks",
    "buffers",
    "counts",
    "ddp",
    "evaluation",
    "faults",
    "gradients",
    "layouts",
    "masks",
    "messages",
    "options",
    "precision",
    "renorm",
    "shards",
    "state",
]


def all_checks() -> dict[str, Check]:
    """Every check by its name, in the order in which they are run."""
    return dict(registered)
