"""StatisticGroups: several statistics in a step, running statistics of all its samples."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncnorm import (
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    accumulate,
    prepare_ddp,
    reference,
)
from syncnorm.comm import exchange, groups
from syncnorm.errors import InputError
from syncnorm.placement import place
from syncnorm.statistics.grouped import StatisticGroups
from syncnorm.testing import assert_close
from tests.model.parts import state_of, uneven_batch

COUNT, NORM_BATCH = 12, 4
CLIP = {"r_max": 1.5, "d_max": 0.5}


def _model() -> tuple[nn.Module, StatisticGroups]:
    layer = SyncBatchRenorm(4, schedule=RenormSchedule.constant(**CLIP), dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, 4))
    model = prepare_ddp(nn.Sequential(layer))
    grouped = StatisticGroups({"0": layer})
    grouped.steps.attach(model)
    return model, grouped


def _step(
    micro_batch: int | None, norm_batch: int
) -> tuple[dict[str, Tensor], Tensor, list[Tensor], list[str]]:
    """One step on all ranks: state, gradient of the weight, outputs of this rank's samples, kinds
    of exchanges.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model, grouped = _model()
    x = uneven_batch(COUNT, 3)
    cotangent = uneven_batch(COUNT, 4)
    placement = place(COUNT, norm_batch, rank, world_size, micro_batch)
    over = groups.statistics_group(placement.shared_by)
    outputs = torch.zeros_like(x)
    with exchange.record() as record, accumulate(model):
        for parts in placement.rounds:
            grouped.place(over, [part.stop - part.start for part in parts])
            y = model(torch.cat([x[part] for part in parts]))
            (y * torch.cat([cotangent[part] for part in parts])).sum().backward()
            for part, piece in zip(
                parts, y.detach().split([part.stop - part.start for part in parts]), strict=True
            ):
                outputs[part] = piece
    gradient = model.get_parameter("0.weight").grad
    assert gradient is not None
    state = state_of(model)  # settles
    total = torch.cat([gradient, outputs.flatten()])
    if world_size > 1:
        dist.all_reduce(total)
    return state, total[:4], [total[4:].view_as(x)], [one.kind for one in record]


@pytest.mark.parametrize("micro_batch", [None, NORM_BATCH], ids=["side by side", "in turn"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("norm_batch", [2, 4, 6, 12])
def test_equals_each_group_by_itself(pool, world_size, norm_batch, micro_batch):
    if micro_batch is not None:
        micro_batch = max(micro_batch, norm_batch)
    x, cotangent = uneven_batch(COUNT, 3), uneven_batch(COUNT, 4)
    weight = torch.linspace(0.5, 2, 4, dtype=torch.float64).requires_grad_()
    outputs = []
    for part, g in zip(x.split(norm_batch), cotangent.split(norm_batch), strict=True):
        running = reference.RunningStatistics.initial(4)
        y = reference.batch_renorm(part, weight, torch.zeros(4).double(), running=running, **CLIP)
        (y * g).sum().backward()
        outputs.append(y.detach())
    running = reference.RunningStatistics.initial(4)
    reference.batch_renorm(x, running=running, **CLIP)
    for state, gradient, (got,), _ in pool(world_size).run(_step, micro_batch, norm_batch):
        assert_close(got, torch.cat(outputs), torch.float64, "y")
        assert weight.grad is not None
        assert_close(gradient, weight.grad, torch.float64, "weight.grad")
        assert_close(state["0.running_mean"], running.mean, torch.float64, "running_mean")
        assert_close(state["0.running_var"], running.var, torch.float64, "running_var")
        assert int(state["0.num_batches_tracked"]) == 1


@pytest.mark.parametrize(
    ("world_size", "norm_batch", "kinds"),
    [
        (
            2,
            4,
            ["all moments"],
        ),  # whole groups inside each worker: no message but the running statistics'
        (2, 2, ["all moments"]),
        (4, 6, ["moments", "gradients", "all moments"]),  # two groups over two workers each
        (3, 6, ["moments"] * 2 + ["gradients"] * 2 + ["all moments"]),  # in turn over all three
    ],
)
def test_exchanges(pool, world_size, norm_batch, kinds):
    for *_, record in pool(world_size).run(_step, None, norm_batch):
        assert record == kinds


def _with_rows_in_dimension_0() -> str:
    model, grouped = _model()
    grouped.place(None, [2, 1])
    with accumulate(model):
        model(uneven_batch(6, 0))  # two rows a sample
    try:
        model(uneven_batch(7, 0))
    except InputError as error:
        return str(error)
    return "no error"


def test_rows_must_divide_among_the_samples(pool):
    (message,) = pool(1).run(_with_rows_in_dimension_0)
    assert (
        "a whole number of rows for each of 3 samples where a forward has several statistics, got "
        "7 rows" in message
    )
    assert "`launch.micro_batch` of the trainer, equal to `norm_batch`" in message


def _copies() -> list[bool]:
    model, grouped = _model()
    grouped.place(groups.statistics_group(), [3])
    model(uneven_batch(3, dist.get_rank()))
    state = state_of(model)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # noqa: S301 our own
    return [all(torch.equal(v, state[k]) for k, v in twin.state_dict().items()) for twin in twins]


def test_a_model_placed_on_a_group_can_be_copied_and_pickled(pool):
    assert pool(2).run(_copies) == [[True, True]] * 2


def test_local_groups_differ_from_the_whole_batch(pool):
    """The negative control."""
    (_, _, (apart,), _), *_ = pool(2).run(_step, None, 4)
    (_, _, (together,), _), *_ = pool(2).run(_step, None, 12)
    assert (apart - together).abs().max() > 0.1


def test_sync_batch_norm_layers_take_parts_too():
    layer = SyncBatchNorm(4, dtype=torch.float64)
    model = prepare_ddp(nn.Sequential(layer))
    grouped = StatisticGroups({"0": layer})
    grouped.steps.attach(model)
    grouped.place(None, [2, 3])
    x = uneven_batch(5, 0)
    expected = torch.cat([reference.batch_norm(part) for part in x.split([2, 3])])
    assert_close(model(x), expected, torch.float64, "y")
