"""Notebooks from the examples: `python -m tools.notebooks FOLDER`.

A script with lines `# %%` is a notebook, cut there into cells; its docstring is the first one. The
notebooks are not kept in the repository: they are what this makes of the scripts, with no output in
them.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import jupytext
from nbformat import NotebookNode

EXAMPLES = Path(__file__).parents[1] / "examples"
CELL = "# %%"


def scripts() -> list[Path]:
    """The examples that are notebooks."""
    return [each for each in sorted(EXAMPLES.glob("*.py")) if f"\n{CELL}" in each.read_text()]


def notebook(text: str) -> NotebookNode:
    """Make a notebook of a script's text."""
    tree = ast.parse(text)
    first = tree.body[0]
    docstring = ast.get_docstring(tree)
    assert docstring is not None
    assert first.end_lineno is not None
    title, _, rest = docstring.partition("\n")
    words = f"# {title.rstrip('.')}\n{rest}"
    code = "".join(text.splitlines(keepends=True)[first.end_lineno :]).lstrip()
    made = jupytext.reads(code, fmt="py:percent")
    made.cells.insert(0, NotebookNode(cell_type="markdown", metadata={}, source=words, id="title"))
    made.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    return made


def page(text: str, path: str) -> str:
    """Make a Markdown page of a script's text: its words, its code, and where the files are."""
    name = Path(path).name
    made = notebook(text)
    cells = [
        each.source if each.cell_type == "markdown" else f"```python\n{each.source}\n```"
        for each in made.cells
    ]
    links = f"[The script]({name})"
    if f"\n{CELL}" in text:
        links += f', <a href="{Path(name).stem}.ipynb">a notebook of it</a>'
    return "\n\n".join([cells[0], links + ".", *cells[1:]]) + "\n"


def write(folder: Path) -> list[Path]:
    """Write all notebooks into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [folder / f"{each.stem}.ipynb" for each in scripts()]
    for path, script in zip(made, scripts(), strict=True):
        jupytext.write(notebook(script.read_text()), path)
    return made


if __name__ == "__main__":
    for each in write(Path(sys.argv[1])):
        print(each)
