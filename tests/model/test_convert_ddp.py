"""A model that was converted and is sharded under DistributedDataParallel trains as torch's does on
the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from syncnorm import convert, revert
from tests.model.curves import curve_of
from tests.model.foreign import ARCHITECTURES

STEPS, SIZE, SIZES = 5, 9, (6, 3)


def _batches() -> list[tuple[Tensor, Tensor]]:
    """The mean drifts along each batch, so that shards differ."""
    g = torch.Generator().manual_seed(5)
    drift = torch.linspace(-1, 1, SIZE, dtype=torch.float64).view(-1, 1, 1, 1)
    images = torch.randn(STEPS, SIZE, 3, 16, 16, generator=g, dtype=torch.float64) + drift
    return list(zip(images, torch.randint(0, 5, (STEPS, SIZE), generator=g), strict=True))


def _train(
    name: str, sizes: Sequence[int], is_converted: bool
) -> tuple[list[float], dict[str, Tensor]]:
    """The curve of the large batch's loss, and the state at the end, reverted if it was converted."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().double()
    if is_converted:
        convert(model)
    curve = curve_of(model, _batches(), sizes, lr=0.02)
    return curve, {key: value.clone() for key, value in revert(model).state_dict().items()}


@pytest.mark.parametrize("name", ["digits_resnet", "transformers ResNet"])
def test_two_workers_train_as_torchs_model_on_the_whole_batch(pool, name):
    if name.startswith("transformers"):
        pytest.importorskip("transformers", reason="transformers is not installed")
    curve, state = _train(name, (SIZE,), False)
    assert min(abs(a - b) for a, b in pairwise(curve)) > 1e-2, "the run must go somewhere"
    for got, sharded in pool(len(SIZES)).run(_train, name, SIZES, True):
        assert got == pytest.approx(curve, rel=1e-10)
        assert sharded.keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(sharded[key], value, rtol=1e-10, atol=1e-10, msg=key)
    # The negative control: torch's own layers normalise each shard by itself.
    (local, _), _ = pool(len(SIZES)).run(_train, name, SIZES, False)
    assert local[-1] != pytest.approx(curve[-1], rel=1e-3)
