"""The device of these tests: CUDA, else they are skipped.

SYNCNORM_TEST_DEVICE=cpu runs them on the CPU, but for what only CUDA has: so a test can be tried
before there is a GPU to run it on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from syncnorm.testing import RankPool, assert_close

# In which Triton has time for some kernels, and torch's compiler for a model, in a dozen processes
# side by side; and less than the time in which `benchmarks.gpu` ends a test that hangs.
POOL_SECONDS = 120.0


@pytest.fixture(scope="session")
def device() -> str:
    """The device under test."""
    name = os.environ.get("SYNCNORM_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return name


@pytest.fixture(scope="session")
def only_cuda(device) -> None:
    """Skip where the device is another: there are no CUDA graphs, and no synchronisations."""
    if device != "cuda":
        pytest.skip("only CUDA has this")


@pytest.fixture(scope="session")
def ranks(device) -> Iterator[Callable[..., RankPool]]:
    """ranks(number, backend="gloo"): a live pool on the device, which all its ranks may share."""
    pools: dict[tuple[int, str], RankPool] = {}

    def get(number: int, backend: str = "gloo") -> RankPool:
        if backend == "nccl" and device == "cpu":
            backend = "gloo"
        if backend == "nccl" and torch.cuda.device_count() < number:
            pytest.skip(f"NCCL wants a device for each of {number} ranks")
        if backend == "nccl":
            # As the documents ask for: statistics and gradients have a communicator each.
            os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
        key = number, backend
        if key not in pools or not pools[key].is_alive:
            pools[key] = RankPool(number, backend, POOL_SECONDS, device)
        return pools[key]

    yield get
    for each in pools.values():
        each.close()


@pytest.fixture
def equal_on_both(ranks, pool, device):
    """Check that a function from a device to tensors gives the same there as on the CPU.

    The tests of the CPU hold that against the oracle.
    """

    def check(number: int, function: Callable[..., dict], *args, backend: str = "gloo") -> None:
        found = ranks(number, backend).run(function, device, *args)
        for got, expected in zip(found, pool(number).run(function, "cpu", *args), strict=True):
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                assert_close(got[name], value, torch.float64, name, factor=10.0)

    return check
