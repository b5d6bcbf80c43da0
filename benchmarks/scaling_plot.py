"""The picture of `benchmarks.scaling`: single messages as measured, and a step as reckoned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

from benchmarks import cost_model
from benchmarks.cost_model import Traffic

if TYPE_CHECKING:
    from benchmarks.scaling import Fitted


def draw(
    path: Path,
    fits: Iterable[Fitted],
    cores: int,
    workers: Sequence[int],
    rows: Mapping[str, Sequence[float]],
) -> None:
    """Write the picture as SVG.

    Args:
        path: the file.
        fits: the kinds of message, for the left half.
        cores: of the machine that they were timed on.
        workers, rows: numbers of workers and seconds of a step's messages, for the right half.
    """
    mpl.use("Agg")
    from matplotlib import pyplot  # after the choice of what draws

    # Text stays text, and the file is the same for the same figures.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "scaling", "font.size": 9})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    for number, fit in enumerate(fits):
        size = min(t.bytes for t in fit.timings)
        at = [t.workers for t in fit.timings if t.bytes == size]
        seconds = [
            cost_model.seconds(fit.link, fit.way, Traffic(1, size), count, cores) for count in at
        ]
        left.plot(at, [1e3 * s for s in seconds], color=f"C{number}", label=f"{fit.words}: fitted")
        left.plot(
            at, [1e3 * t.seconds for t in fit.timings if t.bytes == size], "o", color=f"C{number}"
        )
        left.set_title(f"A message of {size // 8} numbers, {cores} cores (dots: measured)")
    for name, row in rows.items():
        right.plot(workers, [1e3 * s for s in row], label=name)
    right.set_title("Messages of a step of ResNet-50 (model, tree)")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("workers")
        axes.set_ylabel("ms")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, framealpha=0.5)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
