"""A report's page taken apart."""

from html.parser import HTMLParser
from pathlib import Path

from syncnorm.train.report import write_report

# What HTML says has no end tag.
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """A page taken apart: elements with their attributes, cells by the heading of their column, and
    all text.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tagged: list[tuple[str, str]] = []
        self.rows: list[dict[str, str]] = []
        self.open: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append((tag, attributes.get("data-label", "")))
        if tag == "tr":
            self.rows.append({})

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "style":
            return
        self.tagged.append((self.open[-1][0] if self.open else "", data))
        label = next((label for tag, label in reversed(self.open) if tag == "td"), "")
        if label:
            self.rows[-1][label] = self.rows[-1].get(label, "") + data

    @property
    def texts(self) -> list[str]:
        return [text for _, text in self.tagged]

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def summary(self) -> list[dict[str, str]]:
        return [row for row in self.rows if "Status" in row]

    @property
    def marks(self) -> list[tuple[str, str]]:
        return [(row["Step"], row["What"]) for row in self.rows if "What" in row]

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.elements if attribute in attributes]

    def figure(self, title: str) -> str:
        """What a figure says to those who cannot see it."""
        return next(label for label in self.values("aria-label") if label.startswith(title))


def report(tmp_path: Path, *runs: Path) -> Page:
    return Page(write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8"))
