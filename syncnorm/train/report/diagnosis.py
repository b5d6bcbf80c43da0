"""The page of a diagnosis: advice, and a figure and a table for each measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from syncnorm.train.files import write_text_whole
from syncnorm.train.report.diagnosis_figures import along_gradient, by_layer, surfaces
from syncnorm.train.report.page import template
from syncnorm.train.report.svg import figure_style
from syncnorm.train.report.text import ABSENT, plain

_MODES = {
    "evaluation": "by running statistics as they are",
    "batch": "by the batch, as in training",
    "recalibrated": "by running statistics taken anew at each point",
}


@dataclass
class Section:
    """A section of the page.

    Args:
        title: of the measure.
        note: its meaning.
        facts: names and values.
        figures: title, note and drawing of each.
        columns: of the table: heading, and name in the measure.
        rows: a layer's name, and its cells.
    """

    title: str
    note: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    figures: list[tuple[str, str, Markup]] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    rows: list[tuple[str, list[str]]] = field(default_factory=list)

    def add(self, title: str, note: str, figure: Markup | None) -> None:
        """Add a figure, if there is one."""
        if figure is not None:
            self.figures.append((title, note, figure))

    def tabulate(self, layers: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> None:
        """Add a table: a row for each layer, a column for each heading, by the value's name."""
        self.columns = list(columns)
        self.rows = [
            (name, [_cell(each.get(key)) for key in columns.values()])
            for name, each in layers.items()
        ]


def write_page(found: Mapping[str, Any], output: Path) -> Path:
    """Write a page about what `diagnosis.json` holds; it loads nothing."""
    write_text_whole(output, render(found))
    return output


def render(found: Mapping[str, Any]) -> str:
    """Render the page as HTML."""
    makers = {
        "statistics": _statistics,
        "gradients": _gradients,
        "smoothness": _smoothness,
        "shift": _shift,
        "covariate": _covariate,
        "surface": _surface,
    }
    with figure_style():
        parts = [makers[name](each) for name, each in found["measures"].items() if each]
    return plain(template("diagnosis.html").render(found=found, parts=parts)) + "\n"


def _statistics(found: Mapping[str, Any]) -> Section:
    layers, loss = found["layers"], found["loss"]
    section = Section(
        "Statistics of the normalisation layers",
        "Of what enters each layer, over all batches, as training normalises the layers before.",
        [
            ("loss, normalised by batches", _cell(loss["training"])),
            ("loss, by running statistics", _cell(loss["evaluation"])),
            ("loss, by the data's statistics", _cell(loss["population"])),
            ("samples in a statistic", _cell(found["samples"])),
        ],
    )
    between = _columns(layers, {"between workers": "between_share", "by chance": "chance_share"})
    section.add(
        "Variance between workers",
        "Its share of all variance, and what samples shared out at random would leave.",
        by_layer("between", "Variance between workers", [*layers], between, share=True),
    )
    gaps = _columns(layers, {"mean": "mean_gap", "deviation": "var_gap"})
    section.add(
        "Running statistics against the data's",
        "The mean's distance in standard deviations; the logarithm of the deviations' ratio.",
        by_layer("gaps", "Gap of running statistics", [*layers], gaps),
    )
    section.tabulate(
        layers,
        {
            "Between workers": "between_share",
            "By chance": "chance_share",
            "Gap of the mean": "mean_gap",
            "Gap of the deviation": "var_gap",
            "Constant channels": "flat_share",
            "Values in a statistic": "values",
            "Frozen": "is_frozen",
        },
    )
    return section


def _gradients(found: Mapping[str, Any]) -> Section:
    layers = found["layers"]
    section = Section(
        "The gradient by depth",
        "Layers in the order of construction. In front of a batch norm the cosine of weights and "
        "gradient is 0.",
        [
            ("norm of the whole gradient", _cell(found["norm"])),
            ("first layer's over last layer's", _cell(found["ratio"])),
            ("slope by layer, log2", _cell(found["slope"])),
        ],
    )
    norms = _columns(layers, {"of outputs, a sample's": "activation", "of weights": "gradient"})
    section.add(
        "Norm of the gradient",
        "Even over depth where signals pass well.",
        by_layer("gradient", "Norm of the gradient", [*layers], norms, log=True),
    )
    rates = _columns(layers, {"lr / |W|^2": "effective_lr", "lr |grad| / |W|": "update_ratio"})
    section.add(
        "Effective learning rate",
        "The rate at which a normalised weight turns, and the relative length of a step.",
        by_layer("rates", "Effective learning rate", [*layers], rates, log=True),
    )
    section.tabulate(
        layers,
        {
            "Of outputs": "activation",
            "Of weights": "gradient",
            "Length of weights": "weight",
            "Effective lr": "effective_lr",
            "Update ratio": "update_ratio",
            "Cosine": "cosine",
            "Normalised": "is_invariant",
        },
    )
    return section


def _smoothness(found: Mapping[str, Any]) -> Section:
    def interval(values: list[Any]) -> str:
        return " to ".join(_cell(each) for each in values)

    section = Section(
        "The loss along the gradient",
        "Steps along each batch's gradient; means over the batches. Plain gradient descent lowers "
        "the loss while the learning rate is below 2 / smoothness.",
        [
            ("loss along the way", interval(found["loss_range"])),
            ("change of the gradient", interval(found["predictiveness"])),
            ("effective smoothness", _cell(found["smoothness"])),
            ("norm of the gradient", _cell(found["norm"])),
        ],
    )
    section.add("Loss", "Of the batch itself.", along_gradient(found))
    return section


def _shift(found: Mapping[str, Any]) -> Section:
    layers = {
        name: {f"{form} {of}": each[form][of] for form in each for of in each[form]}
        for name, each in found["layers"].items()
    }
    section = Section(
        "Distributions since the beginning",
        "Kullback-Leibler divergence of what entered each layer at first from what does now.",
    )
    keys = {"median channel": "histogram median", "furthest channel": "histogram max"}
    section.add(
        "Shift",
        "In nats, by histograms.",
        by_layer("shift", "Shift", [*layers], _columns(layers, keys), log=True),
    )
    section.tabulate(
        layers,
        {
            "Histogram, median": "histogram median",
            "Histogram, furthest": "histogram max",
            "Normal form, median": "gaussian median",
            "Normal form, furthest": "gaussian max",
        },
    )
    return section


def _covariate(found: Mapping[str, Any]) -> Section:
    inputs, gradients = found["inputs"], found["gradients"]
    section = Section(
        "Internal covariate shift by a step",
        "What a step of all layers before does to a layer's inputs, and to its gradient.",
    )
    drifts = _columns(inputs, {"mean": "mean_drift", "deviation": "std_drift"})
    section.add(
        "Drift of inputs",
        "In standard deviations; the logarithm of the deviations' ratio.",
        by_layer("drift", "Drift of inputs", [*inputs], drifts),
    )
    changes = _columns(gradients, {"relative change": "relative", "cosine": "cosine"})
    section.add(
        "Change of gradients",
        "The gradient after the layers before have moved, against the one before.",
        by_layer("change", "Change of gradients", [*gradients], changes),
    )
    section.tabulate(
        gradients, {"Change": "change", "Relative change": "relative", "Cosine": "cosine"}
    )
    return section


def _surface(found: Mapping[str, Any]) -> Section:
    section = Section(
        "The loss around the weights",
        "Along two random directions whose filters are as long as the weights', of one batch. The "
        "cross is the model.",
    )
    for mode, figure in surfaces(found).items():
        section.add(mode.capitalize(), _MODES[mode], figure)
    return section


def _columns(
    layers: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]
) -> dict[str, list[float | None]]:
    return {title: [each[name] for each in layers.values()] for title, name in names.items()}


def _cell(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
