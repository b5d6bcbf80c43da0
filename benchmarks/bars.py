"""Draw docs/accuracy.svg, the README's picture, from a table of docs/results/regimes.md.

    python -m benchmarks.bars

`python -m benchmarks.lagged DATA_FOLDER` measures what the table holds. Run this after a change of the
table: a test compares the picture with it.
"""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
PICTURE = DOCS / "accuracy.svg"
TITLE = "Test accuracy, %: Fashion-MNIST on 4 workers that each see 2 or 3 of the 10 labels"
# From the first cell of a row, all at one learning rate, to the words beside the bar.
ROWS = {
    "local BatchNorm2d, 0.05": "torch's BatchNorm2d, local",
    'renormalisation (r_max 3, d_max 5), `sync="running"`, 0.05': "SyncBatchRenorm, sync=running",
    '`sync="lagged"`, 0.05': "SyncBatchNorm, sync=lagged",
    '`sync="batch"`, 0.05': "SyncBatchNorm, sync=batch",
}
# Middle tones, which can be read on a white page and on a dark one.
TEXT, LOCAL, OURS = "#73797f", "#8a9097", "#3b82c4"


def accuracies(results: str) -> dict[str, float]:
    """Test accuracy in % by the first cell of its row, from the text of docs/results/regimes.md."""
    rows = re.findall(r"^\| (.+?) \| (\d+\.\d)\b", results, flags=re.MULTILINE)
    return {name: float(value) for name, value in rows if name in ROWS}


def draw(values: dict[str, float]) -> str:
    """A bar chart as SVG, one bar for each of `ROWS`."""
    bars = []
    for place, (row, words) in enumerate(ROWS.items()):
        top, width = 40 + 30 * place, 3.1 * values[row]
        colour = LOCAL if place == 0 else OURS
        bars += [
            f'<text x="240" y="{top + 14}" text-anchor="end">{words}</text>',
            f'<rect x="250" y="{top}" width="{width:.1f}" height="20" rx="2" fill="{colour}"/>',
            f'<text x="{258 + width:.1f}" y="{top + 14}">{values[row]:.1f}</text>',
        ]
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 620 165" width="620" height="165"'
            f' font-family="sans-serif" font-size="13" fill="{TEXT}" role="img">',
            f"<title>{TITLE}</title>",
            f'<text x="8" y="20">{TITLE}</text>',
            *bars,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(accuracies((DOCS / "results" / "regimes.md").read_text())))
    print(PICTURE)
