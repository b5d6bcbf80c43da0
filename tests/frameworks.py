"""Other frameworks that some tests run with: where one is missing they skip, and none is imported
while tests are collected.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock


def import_or_skip(package: str) -> ModuleType:
    """The package, or a skip of what asks for it.

    One process of this user imports at a time: mmengine's yapf writes a cache when it is imported
    for the first time, and one that is imported meanwhile reads the half of it.
    """
    with FileLock(Path(tempfile.gettempdir()) / f"syncnorm-tests-import-{os.getuid()}.lock"):
        return pytest.importorskip(package, reason=f"{package} is not installed")


def frameworks(*packages: str) -> Callable[[], None]:
    """A fixture for all tests of the file that it is named in, which imports the packages first."""

    @pytest.fixture(scope="module", autouse=True)
    def imported() -> None:
        for package in packages:
            import_or_skip(package)

    return imported
