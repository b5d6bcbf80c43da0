"""As `test_compile`, over two ranks: a file of its own, that another process runs."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.scenarios import check_compiled_layer

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("options", [{}, {"bounds": (1.25, 0.25)}], ids=["norm", "renorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_compiled_on_two_ranks(ranks, device, dtype, options, masked):
    check_compiled_layer(ranks(2), device, dtype, options, (5, 3), masked=masked)
