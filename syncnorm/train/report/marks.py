"""Restarts, faults and checkpoints in a figure: a lane above the curve for each run."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from syncnorm.train.report.run import Run
from syncnorm.train.report.svg import run_colour, run_group

# By kind: matplotlib's marker, the sign for it in text.
SIGNS = {"checkpoint": ("|", "|"), "restart": (9, "▸"), "fault": ("x", "×")}
# Marks nearer to each other than this share of the axis look like one.
_NEAREST = 1 / 150


def draw_marks(above: Axes, axes: Axes, runs: Sequence[Run]) -> None:
    """Draw the marks of all runs.

    Args:
        above: becomes the lanes.
        axes: the curve, with its limits set; restarts and faults go through it as lines.
        runs: the first run's lane is the topmost.
    """
    above.set_axis_off()
    above.set_ylim(len(runs) - 0.5, -0.5)
    size = min(4.5, 30 / len(runs))  # points; the lanes of many runs are narrow
    for index, run in enumerate(runs):
        colour = run_colour(index)
        for kind, (marker, _) in SIGNS.items():
            steps = apart(
                [mark.step for mark in run.events.marks if mark.kind == kind], axes.get_xlim()[1]
            )
            lane = [index] * len(steps)
            above.plot(
                steps,
                lane,
                color=colour,
                linestyle="",
                marker=marker,
                markersize=size,
                clip_on=False,
                gid=run_group(index),
            )
            if kind != "checkpoint":
                for step in steps:
                    axes.axvline(
                        step,
                        color=colour,
                        linewidth=0.8,
                        linestyle="dashed",
                        alpha=0.6,
                        gid=run_group(index),
                    )


def apart(steps: Sequence[int], length: float) -> list[int]:
    """Leave out marks that would look like one."""
    return sorted({round(step / length / _NEAREST): step for step in steps}.values())
