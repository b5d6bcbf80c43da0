"""The plot of a benchmark: each layer's step time over the local layer's, case by case."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from syncnorm.bench.candidates import LOCAL
from syncnorm.bench.report import Report


def write_plot(report: Report, output: Path) -> None:
    """Write the picture, in the format that the file's name says.

    Raises:
        OSError: the file cannot be written.
    """
    rows = report.cases[::-1]  # the first at the top
    series: dict[str, list[tuple[int, float, float, float]]] = {}
    for place, case in enumerate(rows):
        for result in case.results:
            if result.to_local is not None and result.name != LOCAL:
                ratio = result.to_local
                series.setdefault(result.name, []).append(
                    (place, ratio.median, ratio.low, ratio.high)
                )
    figure = Figure(figsize=(9, 2 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1.0, color="grey", linewidth=1)
    for number, (name, points) in enumerate(series.items()):
        # Side by side within the case's row.
        offset = 0.7 * ((number + 0.5) / len(series) - 0.5)
        axes.errorbar(
            [median for _, median, _, _ in points],
            [place - offset for place, *_ in points],
            xerr=[
                [median - low for _, median, low, _ in points],
                [high - median for _, median, _, high in points],
            ],
            fmt="o",
            markersize=3,
            linewidth=1,
            label=name,
        )
    axes.set_yticks(range(len(rows)), [case.case for case in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("step time / local BatchNorm, median and 95 % interval")
    axes.set_title(f"{report.workers} worker(s), {report.device}: {report.machine}", fontsize=9)
    if series:
        figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(output)
