"""The portable kernels: what they cost on a GPU, and half types.

The budgets are those of a CUDA device, by the log of `budgets.py`: none is needed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from syncnorm.maths.kernels import composed, portable
from syncnorm.maths.kernels.arguments import Reference
from syncnorm.maths.moments import Raw
from tests.unit.budgets import Log

SHAPES = [(32, 256, 14, 14), (256, 2048, 7, 7), (65536, 64), (1, 32, 64, 64, 64)]
LAYOUTS = ["contiguous", "channels_last", "crop"]


def _empty(shape: tuple[int, ...], dtype: torch.dtype, how: str) -> Tensor:
    empty: Any = torch.empty(shape, dtype=dtype, device="meta")
    if how == "channels_last":
        return empty.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == "crop":
        larger = empty.new_empty(*shape[:2], *(size + 2 for size in shape[2:]))
        return larger[(..., *[slice(1, -1)] * (len(shape) - 2))]
    return empty


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_traffic_launches_and_memory(shape, dtype, how, masked):
    """In units of x: read and written, and the most that is alive besides x, g and the result."""
    x = _empty(shape, dtype, how)
    g = _empty(shape, dtype, "channels_last" if how == "channels_last" else "contiguous")
    mask = torch.empty(shape[0], 1, *shape[2:], device="meta") if masked else None
    by = torch.empty(2, shape[1], device="meta", dtype=torch.float64)
    scale, shift, slope = torch.empty(3, shape[1], device="meta")
    count = None if mask is None else torch.empty(1, device="meta", dtype=torch.float64)
    with Log() as sums:
        portable.raw_sums(x, mask, count)
    with Log() as forward:
        portable.normalize(x, by[0], scale, shift)
    with Log() as backward_sums:
        portable.standardised_sums(g, x, by)
    with Log() as backward:
        portable.combine(g, x, by[0], scale, shift, slope, mask)

    is_half = dtype == torch.bfloat16
    # Sums of the runs, and the mask.
    slack = (0.25 if is_half else 0.15) + 0.05 * masked
    reads = {(False, False): 3, (True, False): 2, (False, True): 9, (True, True): 16}
    assert sums.traffic(x) < reads[is_half, masked] + slack
    assert forward.traffic(x) < 2 + slack
    # What is not dense is copied first.
    copies = 2 if how == "crop" and x.ndim > 2 else 0
    assert backward_sums.traffic(x) < 2 + copies + slack
    assert backward.traffic(x) < (7 if is_half else 5) + masked * (4 if is_half else 2) + slack
    if not masked:
        assert len(sums.names) + len(forward.names) <= 12
        # Each copy of what is not dense is an operator more.
        assert len(backward_sums.names) + len(backward.names) <= (9 if is_half else 8) + copies // 2
    for log, result in ((sums, 0), (forward, 1), (backward_sums, 0), (backward, 1)):
        assert log.peak / x.nbytes - result < 1.1


def test_the_log_counts_what_one_call_hides():
    x = torch.empty(4, 8, 16, device="meta")
    with Log() as log:
        x.sum((0, 2), dtype=torch.float64)
    # Read, copied to float64 and read there.
    assert (log.names, log.launches, log.largest) == (["sum"], 2, 2 * x.nbytes)
    assert log.bytes == 5 * x.nbytes + 8 * 8
    with Log() as log:
        x.to(torch.bfloat16).sum((0, 2), dtype=torch.float32)
    assert (log.names, log.launches, log.largest) == (["_to_copy", "sum"], 2, x.nbytes // 2)
    with Log() as log:
        y = x[:, :, 2:] * torch.empty(8, 1, device="meta").expand(4, 8, 14)
        y.transpose(0, 1).add_(1.0)
    assert log.names == ["mul", "add_"]
    assert (log.bytes, log.peak) == (4 * y.nbytes + 32, y.nbytes + 32)
    with Log() as log:
        torch.cat([x, x], out=x.new_empty(8, 8, 16, dtype=torch.float64))
    assert (log.names, log.launches, log.bytes) == (["cat"], 2, 6 * x.nbytes)
    with pytest.raises(RuntimeError, match="meta"), Log():
        x.max().item()


def _batch(shape: tuple[int, ...], how: str, mean: float, dtype: torch.dtype) -> Tensor:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 2 + mean).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if how == "channels_last" else x


@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("dtype", "mean"), [(torch.float32, 2e4), (torch.bfloat16, 2e2), (torch.float16, 2e3)], ids=str
)
@pytest.mark.parametrize("shape", [(16, 8, 56, 56), (20000, 8), (2, 2, 400, 400)], ids=str)
def test_sums_at_the_largest_mean(shape, dtype, mean, how):
    """About a pivot that few bits are lost to: the mean is 10,000 standard deviations, or as many
    as the type can tell apart.
    """
    x = _batch(shape, how, mean, dtype)
    dims = [0, *range(2, x.ndim)]
    count = x.numel() // x.shape[1]
    total, squares, _ = portable.raw_sums(x, None, None).split((x.shape[1], x.shape[1], 1))
    truth = x.double().var(dims, correction=0)
    var = squares / count - (total / count).square()
    assert ((var - truth).abs() / truth).max() <= 1e-5
    got, std = total / count, truth.sqrt()
    assert ((got - x.double().mean(dims)).abs() / std).max() <= 1e-6


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_rounded_once(dtype, masked):
    x = _batch((6, 5, 9, 7), "contiguous", 30.0, dtype)
    generator = torch.Generator().manual_seed(5)
    g = torch.randn(x.shape, generator=generator).to(dtype)
    mask = torch.rand(6, 1, 9, 7, generator=generator) if masked else None
    w = 1.0 if mask is None else mask.double()
    mean = torch.full((5,), 30.0).double()
    scale, shift, a, b = torch.rand(4, 5, generator=generator).double()
    c = [t.view(-1, 1, 1) for t in (mean, scale, shift, a, b)]
    y = (x.double() - c[0]) * c[1] + c[2]
    dx = c[1] * (g.double() - w * (c[3] + c[4] * (x.double() - c[0])))
    ulp = torch.finfo(dtype).eps
    for got, truth in (
        (portable.normalize(x, mean, scale, shift), y),
        (portable.backward_input(g, x, mean, scale, a, b, mask), dx),
    ):
        # Half a unit in the last place, and float32's roundings of numbers of the size of the mean.
        assert ((got.double() - truth).abs() <= truth.abs() * ulp / 2 + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("is_renorm", [False, True], ids=["norm", "renorm"])
def test_workers_that_know_of_several_values_and_others_have_the_same_bits(dtype, is_renorm):
    """Whether a batch has several values for certain is known to each worker for itself."""
    torch.manual_seed(0)
    x = torch.randn(5, 64, 3, 3).to(dtype)
    sums = composed.moments(x * 3 + 7, None)
    weight, bias = torch.randn(2, 64)
    results = []
    for knows in (True, False):
        batch, running = Raw(sums, knows), [torch.zeros(64), torch.ones(64)]
        counter, bound = torch.tensor(4), torch.tensor(2.0, dtype=torch.float64)
        reference = Reference(running[0], running[1], (bound, bound)) if is_renorm else None
        y, batch.rows = composed.normalize(x, batch, weight, bias, 1e-5, reference)
        composed.update_running_(*running, counter, batch, 0.1, 1e-5, is_renorm)
        results.append([y, batch.rows, *running, counter])
    for known, unknown in zip(*results, strict=True):
        assert known.equal(unknown)
    assert counter == 5
