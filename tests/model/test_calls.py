"""What a layer costs a CPU besides arithmetic: the package's Python calls, and torch's operators.

On small inputs they are most of it. `python -m tests.model.test_calls` prints the table of
docs/cpu.md, and with the name of a mode the calls themselves.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor, nn

import syncnorm
from syncnorm import SyncBatchNorm, SyncBatchRenorm, prepare_ddp
from syncnorm.testing import RankPool
from tests import ways
from tests.operators import Operators

_FOLDER = str(Path(syncnorm.__file__).parent)
_PAGE = Path(__file__).parents[2] / "docs" / "cpu.md"
# For each mode calls of a layer in a step, forward and backward, and operators; then of one that
# renormalises.
MOST = {
    "batch": ((41, 14, 15), (48, 14, 18)),
    "none": ((36, 10, 11), (43, 10, 14)),
    "running": ((38, 10, 13), (46, 10, 16)),
    "lagged": ((50, 11, 20), (58, 11, 23)),
}

pytestmark = pytest.mark.skipif(ways.refusal() != "", reason=ways.refusal())


@contextmanager
def _calls() -> Iterator[list[str]]:
    """The package's Python calls in a block."""
    found: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and _FOLDER in frame.f_code.co_filename:
            found.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)


def _step(model: nn.Module, x: Tensor, g: Tensor) -> tuple[list[str], list[str]]:
    with _calls() as forward:
        y = model(x)
    with _calls() as backward:
        y.backward(g)
    return forward, backward


def costs(sync: str, is_renorm: bool, count: int) -> tuple[list[str], list[str], list[str]]:
    """Calls forward and backward, and operators, of a step of `count` layers in their stride."""
    layer = SyncBatchRenorm if is_renorm else SyncBatchNorm
    model = prepare_ddp(nn.Sequential(*(layer(16, sync=sync) for _ in range(count))))
    x, g = torch.randn(8, 16, 4, 4, requires_grad=True), torch.randn(8, 16, 4, 4)
    for _ in range(4):
        model(x).backward(g)
    # The fewest of some steps: one that waits long for the other worker makes calls to look for it.
    steps = [_step(model, x, g) for _ in range(5)]
    forward, backward = (min(calls, key=len) for calls in zip(*steps, strict=True))
    with Operators() as operators:
        model(x).backward(g)
    return forward, backward, operators.names


def of_a_layer(ranks: RankPool, sync: str, is_renorm: bool) -> list[float]:
    """By the difference of a model of three layers and one of a single layer."""
    one, three = (ranks.run(costs, sync, is_renorm, count)[0] for count in (1, 3))
    return [(len(b) - len(a)) / 2 for a, b in zip(one, three, strict=True)]


@pytest.mark.parametrize("is_renorm", [False, True], ids=["norm", "renorm"])
@pytest.mark.parametrize("sync", MOST)
def test_a_layer_makes_few_calls(pool, sync, is_renorm):
    found = of_a_layer(pool(2), sync, is_renorm)
    assert all(0 < each <= most for each, most in zip(found, MOST[sync][is_renorm], strict=True))


def test_the_page_has_these_figures():
    rows = re.findall(r'^\| (\w+), sync="(\w+)" \| ([\d |]+) \|$', _PAGE.read_text(), re.MULTILINE)
    assert len(rows) == 2 * len(MOST)
    for layer, sync, figures in rows:
        assert figures == " | ".join(map(str, MOST[sync][layer == "SyncBatchRenorm"]))


def main() -> None:
    """Print the table, or one mode's calls."""
    if ways.refusal():
        sys.exit(ways.refusal())
    ranks = RankPool(2)
    if sys.argv[1:]:
        for names in ranks.run(costs, sys.argv[1], False, 1)[0]:
            print(*names, "", sep="\n")
    else:
        print("| layer | calls forward | backward | operators |\n|---|---|---|---|")
        for sync in MOST:
            for is_renorm in (False, True):
                name = "SyncBatchRenorm" if is_renorm else "SyncBatchNorm"
                found = (f"{each:g}" for each in of_a_layer(ranks, sync, is_renorm))
                print(f'| {name}, sync="{sync}" | {" | ".join(found)} |')
    ranks.close()


if __name__ == "__main__":
    main()
