"""The checks, by theme, in the order in which they are run."""

from syncnorm.verify.checks import (  # noqa: I001 the order of the report
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
