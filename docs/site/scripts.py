"""The examples as pages, and those with cells as notebooks beside them."""

from pathlib import Path
from typing import Any

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx import addnodes

from tools import notebooks


class ScriptParser(MystParser):
    """A script, read as the page that its notebook is."""

    supported = ("script",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Parse a script's text."""
        super().parse(notebooks.page(inputstring, document["source"]), document)


def hand_out(app: Any, document: nodes.document) -> None:
    """Have links to Python files that are no pages lead to the files, as those to other files do."""
    for link in list(document.findall(addnodes.pending_xref)):
        path = f"{link.get('reftarget')}.py"
        is_page = link["reftarget"] in app.env.found_docs
        if link["refdomain"] == "doc" and not is_page and (app.srcdir / path).exists():
            file = addnodes.download_reference("", "", *link.children, reftarget=f"/{path}")
            link.replace_self(file)


def write(app: Any, error: Exception | None) -> None:
    """Write the notebooks beside their pages."""
    if error is None and app.builder.format == "html":
        notebooks.write(Path(app.outdir) / "examples")


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_source_suffix(".py", "script")
    app.add_source_parser(ScriptParser)
    # Before Sphinx notes the files that are to be handed out.
    app.connect("doctree-read", hand_out, priority=100)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True}
