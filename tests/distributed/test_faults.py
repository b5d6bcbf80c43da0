"""Bad data on one worker is the same error on all; degenerate counts change nothing else."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist

from syncnorm import SyncBatchNorm, debug, undocumented
from syncnorm.comm import groups
from syncnorm.errors import FaultError, InputError, SingleValueWarning
from syncnorm.testing import RankPool


def _with_bad_mask(value: float, bad_rank: int, others_have_masks: bool) -> tuple[str, bool, bool]:
    """The error of this rank; True if its buffers are unchanged; True if the layer still works."""
    torch.manual_seed(dist.get_rank())
    layer = SyncBatchNorm(3)
    x = torch.randn(4, 3, 5)
    mask = torch.ones(4, 1, 5)
    if dist.get_rank() == bad_rank:
        mask[2, 0, 3] = value
    elif not others_have_masks:
        mask = None
    before = {name: b.clone() for name, b in layer.named_buffers()}
    try:
        layer(x, mask)
        message = "no error"
    except FaultError as error:
        message = str(error)
    is_still = all(torch.equal(b, before[name]) for name, b in layer.named_buffers())
    layer(x)
    return message, is_still, int(layer.num_batches_tracked) == 1


@pytest.mark.parametrize("others_have_masks", [True, False])
@pytest.mark.parametrize(
    ("value", "shown"), [(-0.5, "-0.5"), (float("nan"), "nan"), (float("inf"), "inf")]
)
@pytest.mark.parametrize("bad_rank", [0, 2])
def test_bad_mask_weights_are_one_error_on_all_workers(
    pool, value, shown, bad_rank, others_have_masks
):
    answers = pool(3).run(_with_bad_mask, value, bad_rank, others_have_masks)
    assert answers == [answers[0]] * 3
    message, is_still, works_again = answers[0]
    assert message.startswith(
        f"`mask` must hold finite weights >= 0, got {shown} (shape (4, 1, 5), rank {bad_rank}) in "
    )
    assert is_still
    assert works_again


def test_a_bad_mask_in_one_process():
    with pytest.raises(FaultError, match=r"got -1 \(shape \(2, 1\), rank 0\)"):
        SyncBatchNorm(3)(torch.randn(2, 3), torch.tensor([[1.0], [-1.0]]))


def _step(sizes: list[int], spatial: tuple[int, ...], weight_zero: bool, in_debug: bool) -> dict:
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    rank = dist.get_rank() if dist.is_initialized() else 0
    layer = SyncBatchNorm(2)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([1.5, -2.5]))
    x = torch.randn(sizes[rank], 2, *spatial, requires_grad=True)
    mask = torch.zeros(sizes[rank], 1, *spatial) if weight_zero else None
    try:
        with debug(in_debug), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = layer(x, mask)
            layer(x.detach(), mask)
    except FaultError as error:
        return {"error": str(error)}
    y.backward(torch.randn_like(y))
    return {
        "y": y.detach(),
        "grad": x.grad,
        "warnings": [w.category for w in caught],
        "buffers": {name: b.clone() for name, b in layer.named_buffers()},
        "weight_grad": layer.weight.grad,
    }


@pytest.mark.parametrize("sizes", [[1], [0, 1], [1, 0, 0]], ids=str)
def test_a_count_of_one_gives_the_bias_and_leaves_the_variance(pool, sizes):
    for rank, got in enumerate(pool(len(sizes)).run(_step, sizes, (), False, False)):
        if sizes[rank]:
            assert torch.equal(got["y"], torch.tensor([[1.5, -2.5]]))
            assert torch.equal(got["grad"], torch.zeros(1, 2))
        assert got["warnings"] == [SingleValueWarning], "one warning per layer, on every worker"
        assert torch.equal(got["buffers"]["running_var"], torch.ones(2))
        assert not torch.equal(got["buffers"]["running_mean"], torch.zeros(2))
        assert int(got["buffers"]["num_batches_tracked"]) == 2


@pytest.mark.parametrize("sizes", [[1], [0, 1], [1, 0, 0]], ids=str)
def test_a_count_of_one_is_an_error_on_all_workers_in_debug_mode(pool, sizes):
    answers = pool(len(sizes)).run(_step, sizes, (), False, True)
    assert answers == [answers[0]] * len(sizes)
    assert "got a total weight of 1 over all workers." in answers[0]["error"]


@pytest.mark.parametrize(
    ("sizes", "weight_zero"), [([0], False), ([0, 0], False), ([2, 3], True), ([4], True)], ids=str
)
def test_a_count_of_zero_changes_nothing(pool, sizes, weight_zero):
    for rank, got in enumerate(pool(len(sizes)).run(_step, sizes, (3, 3), weight_zero, False)):
        assert torch.equal(got["buffers"]["running_mean"], torch.zeros(2))
        assert torch.equal(got["buffers"]["running_var"], torch.ones(2))
        assert int(got["buffers"]["num_batches_tracked"]) == 0
        bias = torch.tensor([1.5, -2.5]).view(1, 2, 1, 1)
        assert torch.equal(got["y"], bias.expand(sizes[rank], 2, 3, 3))
        assert torch.equal(got["grad"], torch.zeros(sizes[rank], 2, 3, 3))
        assert torch.equal(got["weight_grad"], torch.zeros(2))


def _grad_on_some(affine: bool, needs_grad: list[bool]) -> tuple[torch.Tensor | None, bool]:
    rank = dist.get_rank()
    torch.manual_seed(rank)
    layer = SyncBatchNorm(3, affine=affine)
    x = torch.randn(4, 3, requires_grad=needs_grad[rank])
    torch.manual_seed(10 + rank)
    cotangent = torch.randn(4, 3)
    layer(x).backward(cotangent)
    return x.grad, layer.weight is None or layer.weight.grad is not None


@pytest.mark.parametrize("affine", [True, False])
def test_workers_may_differ_in_whether_the_input_needs_a_gradient(pool, affine):
    """The exchange in the backward pass must not depend on it: a layer that asks hangs here."""
    everyone = pool(3).run(_grad_on_some, affine, [True] * 3)
    some = pool(3).run(_grad_on_some, affine, [True, False, True])
    for rank in (0, 2):
        assert torch.equal(some[rank][0], everyone[rank][0])
    assert some[1][0] is None
    assert all(has_weight_grad for _, has_weight_grad in some)


def _missing_from_group() -> str:
    group = dist.new_group([0])
    try:
        SyncBatchNorm(2, process_group=group)(torch.randn(3, 2))
        return "no error"
    except InputError as error:
        return str(error)


def test_a_group_without_this_rank(pool):
    answers = pool(2).run(_missing_from_group)
    assert answers[0] == "no error"
    assert answers[1].startswith("`process_group` must contain this rank")
    assert "(rank 1)" in answers[1]


def _statistics_groups() -> tuple[bool, bool, bool, int]:
    first = groups.statistics_group()
    again = groups.statistics_group(dist.group.WORLD)
    same_ranks = groups.statistics_group(dist.new_group([0, 1]))
    return (
        first is again,
        first is same_ranks,
        first is not dist.group.WORLD,
        len(groups.ranks(first)),
    )


def test_statistics_have_one_group_of_their_own_per_set_of_ranks(pool):
    assert pool(2).run(_statistics_groups) == [(True, True, True, 2)] * 2


def _timeouts() -> list[float]:
    """Of the group that the pool was started with, and of the one for statistics."""
    both = (dist.group.WORLD, groups.statistics_group())
    found = [undocumented.timeout_of(group) for group in both if group is not None]
    return [0.0 if timeout is None else timeout.total_seconds() for timeout in found]


def test_the_statistics_group_takes_over_the_timeout():
    with RankPool(2, timeout_seconds=23.0) as ranks:
        assert ranks.run(_timeouts) == [[23.0, 23.0]] * 2


def _eval_is_silent() -> torch.Tensor:
    layer = SyncBatchNorm(3).eval()
    if dist.get_rank() == 0:
        return layer(torch.ones(2, 3, 4))
    return torch.empty(0)


def test_evaluation_on_one_worker_does_not_wait(pool):
    y, _ = pool(2).run(_eval_is_silent)
    torch.testing.assert_close(y, torch.full((2, 3, 4), 1 / (1 + 1e-5) ** 0.5))
