"""A figure of matplotlib as a part of the page.

matplotlib writes a document of its own. As a part of the page it must not bring metadata (which
name an address), style rules or ids that other figures have too. Its colours are variables of the
page's style, so that one figure serves the light and the dark page: two drawings in fixed colours
make the page 2.6 times as large, and every text in them appears twice.
"""

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

# Figures are drawn in placeholder colours, which become variables of the page's style.
MUTED, GRID = "#000001", "#000002"
RUN_COLOURS = 6
LINES = ("solid", "dashed", "dotted", "dashdot")
_VARIABLES = {MUTED: "var(--muted)", GRID: "var(--grid)"} | {
    f"#0001{index:02x}": f"var(--run-{index})" for index in range(RUN_COLOURS)
}

# In inches of 72 points. Letters of 8.5 points are legible on a phone, where a figure is as wide as
# the page.
WIDTH = 4.6
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "syncnorm",
    "text.parse_math": False,  # a layer's name is no formula
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": False,
    "font.size": 8.5,
    "text.color": MUTED,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.minor.size": 0,
    "lines.linewidth": 1.5,
    "lines.solid_joinstyle": "round",
    "image.composite_image": False,
}

_RUN_GROUP = re.compile(r"run-\d+")
_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
_FONT = re.compile(r"font-family: [^;]*;? ?")
_SHORT_FONT = re.compile(r"font: (\S+px) [^;]*")
_REFERENCE = re.compile(r"#([\w-]+)")


def run_colour(index: int) -> str:
    """Return the placeholder of a run's colour; more runs than colours use them again."""
    return f"#0001{index % RUN_COLOURS:02x}"


def run_dashes(index: int) -> str:
    """Return the line style of a run, which distinguishes runs of one colour."""
    return LINES[index // RUN_COLOURS % len(LINES)]


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw with these settings alone, without the user's."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def run_group(index: int) -> str:
    """Return the name of what belongs to a run in a figure: a style can hide it."""
    return f"run-{index}"


def to_svg(figure: Figure, key: str, label: str, over: ET.Element | None = None) -> Markup:
    """Convert a figure to an <svg> element of HTML.

    Args:
        figure: drawn within `figure_style`.
        key: sets its names apart from those of the page's other figures.
        label: description for readers who cannot see the figure.
        over: an element to be put over all others.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The browser may have the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    for each in root.iter():
        each.tag = each.tag.rpartition("}")[2]
        each.attrib = {name.rpartition("}")[2]: value for name, value in each.attrib.items()}
        _remove(each, ("metadata", "style"))
    referred = {name for each in root.iter() for name in _references(each)}
    for each in root.iter():
        _rename(each, key, referred)
        _restyle(each)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": label,
        "class": "figure",
    }
    root.tail = None
    if over is not None:
        root.append(over)
    return Markup(ET.tostring(root, encoding="unicode", method="html"))


def _remove(parent: ET.Element, names: tuple[str, ...]) -> None:
    for child in list(parent):
        if child.tag.rpartition("}")[2] in names:
            parent.remove(child)


def _references(each: ET.Element) -> list[str]:
    texts = (each.attrib.get(name, "") for name in ("href", "clip-path"))
    return [
        name for text in texts if not text.startswith("data:") for name in _REFERENCE.findall(text)
    ]


def _rename(each: ET.Element, key: str, referred: set[str]) -> None:
    name = each.attrib.pop("id", "")
    if _RUN_GROUP.fullmatch(name):
        each.attrib["class"] = name
    elif name in referred:
        each.attrib["id"] = f"{key}-{name}"
    for attribute in ("href", "clip-path"):
        text = each.attrib.get(attribute, "data:")
        if not text.startswith("data:"):
            each.attrib[attribute] = _REFERENCE.sub(rf"#{key}-\1", text)


def _restyle(each: ET.Element) -> None:
    style = each.attrib.get("style")
    if style is not None:
        for colour, variable in _VARIABLES.items():
            style = style.replace(colour, variable)
        # the font of the page
        each.attrib["style"] = _FONT.sub("", _SHORT_FONT.sub(r"font-size: \1", style))
    if "d" in each.attrib:
        # A hundredth of a point is finer than any screen, and a third of the size.
        path = _NUMBER.sub(
            lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), each.attrib["d"]
        )
        each.attrib["d"] = " ".join(path.split())
