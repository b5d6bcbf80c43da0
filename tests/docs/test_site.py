"""The documentation site: built without a warning, every public name in it, no link without an end."""

from __future__ import annotations

import importlib
import inspect
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from sphinx.util.inventory import InventoryFile

import syncnorm
from syncnorm.cli import app
from tests.launch import commands

ROOT = Path(__file__).parents[2]
# The modules whose names are for users, besides the package itself.
MODULES = [
    "syncnorm.diagnose",
    "syncnorm.errors",
    "syncnorm.family",
    "syncnorm.family.plain",
    "syncnorm.functional",
    "syncnorm.groups",
    "syncnorm.integrations.crossq",
    "syncnorm.integrations.lightning",
    "syncnorm.integrations.mmengine",
    "syncnorm.merge",
    "syncnorm.testing",
    "syncnorm.verify",
]
CHROMIUM = shutil.which("chromium")
WIDTH = 390  # of a phone


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = ["-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-c", "docs/site"]
    done = commands.run(
        [sys.executable, *command, "-d", str(folder / "doctrees"), ".", str(folder / "html")], ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


def public_names() -> set[str]:
    """The names that users are given, as they are imported."""
    names = {f"syncnorm.{name}" for name in (*syncnorm.__all__, *syncnorm._TRAINER)}
    names -= {"syncnorm.functional", "syncnorm.groups"}  # modules
    for module_name in MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # another library's, which is not here
            assert module_name.startswith("syncnorm.integrations.")
            continue
        own = [
            name
            for name, value in vars(module).items()
            if (inspect.isclass(value) or inspect.isfunction(value))
            and value.__module__ == module_name
            and not name.startswith("_")
        ]
        names |= {f"{module_name}.{name}" for name in getattr(module, "__all__", own)}
    return names


def documented(site: Path) -> set[str]:
    """The Python names that have an entry in the reference."""
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    return {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # of other libraries, as they are imported
def test_every_public_name_is_in_the_reference(site):
    names = public_names()
    assert len(names) > 90
    assert names - documented(site) == set()
    assert "syncnorm.nothing_of_the_kind" not in documented(site)


def test_every_command_is_in_the_reference(site):
    text = (site / "docs" / "reference" / "command.html").read_text()
    names = [each.name or each.callback.__name__ for each in app.registered_commands]  # pyright: ignore
    assert len(names) > 10
    assert [name for name in names if f'id="syncnorm-{name.replace("_", "-")}"' not in text] == []
    assert 'id="syncnorm-config-show"' in text


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = {""}
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value is not None:
                self.links.add(value)
            if name == "id" and value is not None:
                self.anchors.add(value)


def broken(folder: Path) -> tuple[int, list[str]]:
    """The number of links within a folder of pages, and those without a file or an anchor."""
    pages = {path.resolve(): Page(path) for path in folder.rglob("*.html")}
    count, found = 0, []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            count += 1
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            has_anchor = there not in pages or unquote(parts.fragment) in pages[there].anchors
            if not there.exists() or not has_anchor:
                found.append(f"{path.relative_to(folder)}: {link}")
    return count, found


def test_every_link_within_the_site_has_an_end(site):
    count, found = broken(site)
    assert count > 3000
    assert found == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "one.html").write_text(
        '<a href="two.html#here">1</a><a href="two.html#gone">2</a><img src="no.png">'
    )
    (tmp_path / "two.html").write_text('<p id="here"></p><a href="#here">3</a><a href="https://a">')
    count, found = broken(tmp_path)
    assert count == 4
    assert sorted(found) == ["one.html: no.png", "one.html: two.html#gone"]


def browse(page: str, site: Path, profile: Path) -> str:
    """Return what a browser makes of a page after its scripts."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--disable-background-networking", "--window-size=1300,1000",
        f"--user-data-dir={profile}", "--virtual-time-budget=5000", "--dump-dom", f"{site.as_uri()}/{page}",
    ]  # fmt: skip
    with commands.started(command, site) as process:
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_search_finds_a_name(site, tmp_path):
    dom = browse("search.html?q=recalibrate", site, tmp_path)
    first = dom[dom.index('class="search-summary"') :].partition("</li>")[0]
    assert "docs/reference/evaluation.html#syncnorm.recalibrate" in first


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_no_page_is_wider_than_a_phone(site, tmp_path):
    """In frames: a window of this browser is at least 500 wide."""
    pages = sorted(path for part in ("docs", "examples") for path in (site / part).rglob("*.html"))
    say = (
        "<script>onload = () => parent.postMessage(document.documentElement.scrollWidth + ' "
        "' + location.pathname, '*')</script></body>"
    )
    frames = ""
    for path in [*pages, site / "wide.html"]:
        text = (
            path.read_text() if path.exists() else f"<body><p style='width: {2 * WIDTH}px'>-</body>"
        )
        copy = path.with_name(f"measured-{path.name}")
        copy.write_text(text.replace("</body>", say))
        frames += f"<iframe src='{copy.relative_to(site)}' style='width: {WIDTH}px'></iframe>"
    (site / "frames.html").write_text(
        "<title>:</title><script>onmessage = e => { document.title += e.data + ';' }</script>"
        + frames
    )
    dom = browse("frames.html", site, tmp_path)
    said = dom[: dom.index("</title>")].partition("<title>:")[2].split(";")[:-1]
    assert len(said) == len(pages) + 1
    wide = [each for each in said if int(each.split()[0]) > WIDTH]
    assert [Path(each.split()[1]).name for each in wide] == ["measured-wide.html"]
