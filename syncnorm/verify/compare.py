"""Got against expected, with the numbers where they differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from syncnorm.testing import worst_difference
from syncnorm.verify.check import CheckFailed
from syncnorm.verify.oracle import Step


def expect(condition: bool, reason: str) -> None:
    """Raise `CheckFailed` with this reason unless the condition holds."""
    if not condition:
        raise CheckFailed(reason)


def expect_close(
    what: str,
    got: Tensor | None,
    expected: Tensor,
    dtype: torch.dtype,
    *,
    factor: float = 1.0,
    scale: float | None = None,
) -> None:
    """Raise `CheckFailed` unless `got` is within the tolerance of `dtype`, times `factor`.

    Args:
        what: its name in the reason.
        got, expected: compared in float64.
        dtype: in which it was computed.
        factor: on the tolerance.
        scale: largest value of what it is a part of; that of `expected` if None.
    """
    expect(got is not None, f"{what} is missing")
    assert got is not None
    expect(
        got.shape == expected.shape,
        f"{what} has shape {tuple(got.shape)}, should be {tuple(expected.shape)}",
    )
    # NaN equals nothing here, nor does infinity.
    is_off = ~got.isfinite()
    if is_off.any():
        g, e = got[is_off][0].item(), expected[is_off][0].item()
        raise CheckFailed(f"{what} is {g:g}, should be {e:.6g}")
    worst = worst_difference(got, expected, dtype, factor, scale)
    if worst is None:
        return
    g, e, off, allowed, *_ = worst
    raise CheckFailed(
        f"{what} is {off:.1e} off, allowed {allowed:.1e} (got {g:.6g}, should be {e:.6g})"
    )


def expect_same_bits(what: str, got: Tensor, expected: Tensor) -> None:
    """Raise `CheckFailed` unless two tensors are equal to the bit."""
    expect(got.dtype == expected.dtype, f"{what} has type {got.dtype}, should be {expected.dtype}")
    expect(
        got.shape == expected.shape,
        f"{what} has shape {tuple(got.shape)}, should be {tuple(expected.shape)}",
    )
    if not torch.equal(got, expected):
        off = (got.double() - expected.double()).abs().max().item()
        raise CheckFailed(f"{what} is {off:.1e} off, allowed 0")


def expect_step(
    got: Sequence[Step],
    expected: Step,
    sizes: Sequence[int],
    dtype: torch.dtype,
    *,
    factor: float = 1.0,
    what: str = "",
) -> None:
    """Raise `CheckFailed` unless the shards' outcomes are those of the whole batch.

    Outputs and input gradients are compared with their slice (a gradient that was not asked for is
    left out), gradients of parameters with the sum over ranks, buffers on each rank.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expect_shards(f"{what}output", [step.y for step in got], expected.y, sizes, dtype, factor)
    assert expected.grad_input is not None
    expect_shards(
        f"{what}input gradient",
        [step.grad_input for step in got],
        expected.grad_input,
        sizes,
        dtype,
        factor,
    )
    for name, truth in expected.parameters.items():
        if truth is not None:
            expect_sum(
                f"{what}gradient of {name}",
                [step.parameters.get(name) for step in got],
                truth,
                wide,
                factor,
            )
    for rank, step in enumerate(got):
        for name, truth in expected.buffers.items():
            expect_close(
                f"{what}{name} of rank {rank}", step.buffers.get(name), truth, wide, factor=factor
            )


def expect_shards(
    what: str,
    got: Sequence[Tensor | None],
    expected: Tensor,
    sizes: Sequence[int],
    dtype: torch.dtype,
    factor: float = 1.0,
) -> None:
    """Raise `CheckFailed` unless each rank has its slice of `expected`; None is not looked at."""
    scale = expected.abs().max().item() if expected.numel() else 0.0
    for rank, (part, truth) in enumerate(zip(got, expected.split(list(sizes)), strict=True)):
        if part is not None:
            # Judged against the whole tensor's scale: a shard may hold small values only.
            expect_close(f"{what} of rank {rank}", part, truth, dtype, factor=factor, scale=scale)


def expect_sum(
    what: str,
    got: Sequence[Tensor | None],
    expected: Tensor,
    dtype: torch.dtype,
    factor: float = 1.0,
) -> None:
    """Raise `CheckFailed` unless the ranks' parts add up to `expected`."""
    missing = [rank for rank, part in enumerate(got) if part is None]
    expect(not missing, f"{what} is missing on rank(s) {missing}")
    total = torch.stack([part.double() for part in got if part is not None]).sum(0)
    expect_close(f"{what}, summed over ranks,", total, expected, dtype, factor=factor)
