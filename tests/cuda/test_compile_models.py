"""Compiled models on ranks that share a device: the same as on the CPU."""

from __future__ import annotations

import pytest

from tests.cuda import scenarios

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("sync", ["batch", "none", "running", "lagged"])
def test_a_compiled_model(equal_on_both, sync):
    equal_on_both(2, scenarios.compiled_training, sync)
