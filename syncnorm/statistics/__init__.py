"""Sources of a layer's training statistics: one file for each mode.

    source.py       the protocols: `Mode`, what a layer's `sync` means, and `Source`, which acts
    batch.py        "batch": pooled at once; "none": this worker's alone
    running.py      "running": local statistics, running statistics pooled off the critical path
    lagged.py       "lagged": averages one step old, in both passes
    grouped.py      several statistics in one step, for the trainer
    accumulated.py  several forwards, one update
    repeated.py     forwards that activation checkpointing repeats

and what these share: `pool.py` (the moments of all layers in one message a step),
`flat.py` (that message), `steps.py` (where a step begins and ends), `buffers.py` (buffers that are
up to date for whoever reaches for them).

A new mode is a file with a `Mode` and its `Source`, and a line in `MODES`; for the trainer its name
in `train/config/norm.py`, too.
"""

from syncnorm.maths.lagged import Lagged
from syncnorm.statistics.batch import BatchMode, LocalMode
from syncnorm.statistics.lagged import LaggedMode
from syncnorm.statistics.running import RunningMode
from syncnorm.statistics.source import Mode

MODES: dict[str, type[Mode]] = {
    mode.name: mode for mode in (BatchMode, RunningMode, LaggedMode, LocalMode)
}
"""The modes by the name that is given as `sync`; the first is the default."""


def mode_of(sync: str | Lagged) -> Mode:
    """The mode that a layer's `sync` names, with its options if it is a `Lagged`."""
    return LaggedMode(sync) if isinstance(sync, Lagged) else MODES[sync]()
