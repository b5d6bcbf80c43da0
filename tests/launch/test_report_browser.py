"""The report's page in a real browser, without a network and without its sandbox, which containers
do not allow.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from syncnorm.train.report import write_report
from tests.launch import commands
from tests.train.report_runs import write_examples

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

DEADLINE_SECONDS = 600
BLUE, LIGHT_BLUE = (0x00, 0x72, 0xB2), (0x5A, 0xB4, 0xEC)


def browse(page: Path, *arguments: str) -> tuple[str, str]:
    """Open a page; return what the browser prints, and what it has to say about the page."""
    profile = page.parent / "profile"
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
        *arguments,
        page.as_uri(),
    ]
    with commands.started(command, page.parent) as process:
        out, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, err
    return out, "\n".join(line for line in err.splitlines() if "CONSOLE" in line)


def screenshot(page: Path, width: int, *arguments: str) -> np.ndarray:
    """The page's upper part as (height, width, 3) in 0 to 255."""
    image = page.with_suffix(f".{width}.png")
    browse(page, f"--window-size={width},2400", f"--screenshot={image}", *arguments)
    return np.rint(imread(image)[..., :3] * 255).astype(int)


def count(image: np.ndarray, colour: tuple[int, int, int]) -> int:
    """How many pixels have a colour."""
    return int((image == colour).all(axis=-1).sum())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write_report(write_examples(folder), folder / "report.html")


def test_the_browser_reads_it_as_it_was_meant(page):
    dom, said = browse(page, "--dump-dom")
    assert said == ""
    assert "<h1>3 runs compared</h1>" in dom
    assert dom.count('role="img"') == 6 + 3 * 3 + 2
    assert dom.count("<tr") == page.read_text().count("<tr")
    assert "the loss of step 396 is nan" in dom


ADDITIONS = {
    "inline script": "<script>document.title = 'no'</script>",
    "the image": "<img src='other.png'>",
    "the stylesheet": "<link rel='stylesheet' href='other.css'>",
}


@pytest.fixture(scope="module")
def worse(page) -> tuple[str, str]:
    """What the browser makes of the page with all additions, and says about it."""
    path = page.with_name("worse.html")
    additions = "".join(ADDITIONS.values())
    path.write_text(page.read_text().replace("<footer>", f"{additions}<footer>"))
    return browse(path, "--dump-dom")


@pytest.mark.parametrize("what", ADDITIONS)
def test_the_policy_holds_and_is_heard(worse, what):
    dom, said = worse
    (line,) = (line for line in said.splitlines() if what in line)
    assert "Content Security Policy" in line
    assert "<title>no</title>" not in dom


def test_a_run_is_hidden_without_a_script(page):
    shown = screenshot(page, 1200)
    path = page.with_name("hidden.html")
    path.write_text(page.read_text().replace('id="show-0" checked', 'id="show-0"'))
    hidden = screenshot(path, 1200)
    # Its swatches stay.
    assert 0 < count(hidden, BLUE) < count(shown, BLUE) / 2


@pytest.mark.parametrize("width", [1200, 400])
def test_it_is_drawn(page, width):
    image = screenshot(page, width)
    assert image.shape == (2400, width, 3)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 200
    assert count(image, BLUE) > 100
    assert image[2, 2].min() > 230


def test_it_is_dark_where_the_reader_prefers_that(page):
    image = screenshot(page, 1200, "--force-dark-mode")
    assert image[2, 2].max() < 40
    assert count(image, LIGHT_BLUE) > 500
    assert count(image, BLUE) == 0


WIDTHS = (1200, 1000, 700, 400)


@pytest.fixture(scope="module")
def widths(page) -> str:
    """The title of a page that holds the report in frames of all widths, and says theirs."""
    # Only a script can say how wide the page became, so the copy goes without the policy. It is
    # asked within a frame, because a window of this browser is at least 500 wide.
    text = (
        page.read_text()
        .replace("Content-Security-Policy", "nothing")
        .replace("<details>", "<details open>")
    )
    script = (
        "<script>parent.postMessage(innerWidth + ' takes ' + document.documentElement.scrollWidth, "
        "'*')</script></body>"
    )
    page.with_name("measured.html").write_text(text.replace("</body>", script))
    frame = page.with_name("frame.html")
    frame.write_text(
        "<title>:</title><script>onmessage = e => { document.title += e.data + ';' }</script>"
        + "".join(
            f"<iframe src='measured.html' style='border: 0; height: 900px; width: {width}px'>"
            "</iframe>"
            for width in WIDTHS
        )
    )
    dom, _ = browse(frame, "--dump-dom", "--window-size=1300,1000", "--virtual-time-budget=5000")
    return dom[: dom.index("</title>")].partition("<title>:")[2]


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_hangs_out_at_the_side(widths, width):
    assert f"{width} takes {width}" in widths.split(";")
