"""Faults in a model of several layers: raised by all workers at one point, and leaving nothing
behind.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncnorm import SyncBatchNorm, debug, prepare_ddp, reference
from syncnorm.comm import exchange
from syncnorm.errors import FaultError, InputError
from syncnorm.testing import assert_close
from tests.model.parts import KINDS, Masked, RaisesOnce, uneven_batch


def _called_by_parts() -> str:
    model = nn.Sequential(nn.Sequential(KINDS["norm"](4)), nn.Identity())
    prepare_ddp(model)
    try:
        model[0](uneven_batch(3, 0))
        return "no error"
    except InputError as error:
        return str(error)


def test_a_model_called_by_its_parts_is_noticed(pool):
    answers = pool(2).run(_called_by_parts)
    assert answers == [answers[0]] * 2
    assert "got a direct call of layer '0.0'. Call the model itself" in answers[0]


class _SetsItsMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = KINDS["norm"](4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.train()(x)


def _trained_within_an_evaluation() -> str:
    model = prepare_ddp(_SetsItsMode()).eval()
    with pytest.raises(InputError) as raised:
        model(uneven_batch(3, 0))
    return str(raised.value)


def test_a_mode_that_is_set_within_the_forward_is_named(pool):
    for answer in pool(2).run(_trained_within_an_evaluation):
        assert (
            "layer 'layer'. Call the model itself, and put its layers into training mode" in answer
        )


def _bad_mask(bad_rank: int) -> list[str]:
    layer = KINDS["norm"](4)
    model = prepare_ddp(Masked(layer))
    messages = []
    for step in range(2):
        mask = torch.ones(3, 1, 5)
        if step == 0 and dist.get_rank() == bad_rank:
            mask[1] = torch.nan
        try:
            y = model(uneven_batch(3, step), mask)
            y.square().mean().backward()
            messages.append(
                f"fine {bool(y.isfinite().all() and layer.weight.grad.isfinite().all())}"
            )
        except FaultError as error:
            messages.append(str(error))
    model(uneven_batch(3, 5), None)
    return [*messages, str(int(model.state_dict()["layer.num_batches_tracked"]))]


def test_a_bad_mask_is_raised_by_all_when_the_message_has_arrived(pool):
    answers = pool(3).run(_bad_mask, 1)
    assert answers == [answers[0]] * 3
    first, second, updates = answers[0]
    assert first == "fine True"
    assert (
        "got others on rank 1 in layer 'layer', in the last training forward. They counted as 0."
        in second
    )
    assert updates == "1", "the faulty forward leaves no trace, and work goes on"


def test_a_forward_that_raises_leaves_no_trace():
    model = prepare_ddp(nn.Sequential(KINDS["norm"](4), nn.Linear(7, 2)))
    with pytest.raises(RuntimeError):
        model(uneven_batch(6, 0))
    model[1] = nn.Identity()
    model(uneven_batch(6, 1))
    running = reference.RunningStatistics.initial(4)
    reference.batch_norm(uneven_batch(6, 1), running=running)
    assert_close(model.state_dict()["0.running_mean"], running.mean, torch.float64, "running_mean")


def _raise_then_evaluate(sync: str) -> tuple[list[str], Tensor]:
    """A forward that raises everywhere, an evaluation on one worker, then training as if nothing
    had been.
    """
    model = prepare_ddp(
        nn.Sequential(SyncBatchNorm(4, sync=sync, dtype=torch.float64), RaisesOnce())
    )
    rank = dist.get_rank()
    with exchange.record() as record:
        with contextlib.suppress(RuntimeError):
            model(uneven_batch(6, 100 + rank) + 1000)
        if rank == 0:
            model.eval()(uneven_batch(6, 0))
            model.train()
        for step in range(2):
            model(uneven_batch(6, 10 * step + rank)).square().mean().backward()
    return [e.kind for e in record], model.state_dict()["0.running_mean"]


@pytest.mark.parametrize("sync", ["running", "lagged"])
def test_a_forward_that_raised_sends_nothing_later(pool, sync):
    running = reference.RunningStatistics.initial(4)
    for step in range(2):
        reference.batch_norm(
            torch.cat([uneven_batch(6, 10 * step), uneven_batch(6, 10 * step + 1)]), running=running
        )
    answers = pool(2).run(_raise_then_evaluate, sync)
    assert answers[0][0] == answers[1][0]
    for _, mean in answers:
        assert_close(mean, running.mean, torch.float64, "running_mean")


def _looked_at_by_one_worker(action: str) -> list[str]:
    """A bad mask on rank 1, then rank 0 alone saves, or loads a state; what the next two forwards
    of each say.
    """
    layer = KINDS["norm"](4)
    model = prepare_ddp(Masked(layer))
    mask = torch.ones(3, 1, 5)
    mask[0] = -1.0 if dist.get_rank() == 1 else 1.0
    model(uneven_batch(3, 0), mask)
    if dist.get_rank() == 0:
        state = model.state_dict()
        if action == "load":
            model.load_state_dict(state)
            layer.reset_running_stats()
    messages = []
    for _ in range(2):
        try:
            model(uneven_batch(3, 1), None)
            messages.append("fine")
        except FaultError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("action", ["save", "load"])
def test_who_looks_first_neither_raises_alone_nor_loses_the_fault(pool, action):
    answers = pool(2).run(_looked_at_by_one_worker, action)
    assert answers[0] == answers[1]
    assert "on rank 1 in layer 'layer'" in answers[0][0]
    assert answers[0][1] == "fine"


def _nan_in_debug_mode(sync: str) -> str:
    x = uneven_batch(3, 0)
    if dist.get_rank() == 1:
        x[1, 2] = torch.nan
    model = prepare_ddp(
        nn.Sequential(nn.Identity(), SyncBatchNorm(4, sync=sync, dtype=torch.float64))
    )
    try:
        with debug():
            model(x)
            model(x)
        return "no error"
    except FaultError as error:
        return str(error)


@pytest.mark.parametrize("sync", ["batch", "running", "lagged"])
def test_debug_mode_names_layer_and_rank_of_a_nan(pool, sync):
    answers = pool(2).run(_nan_in_debug_mode, sync)
    assert answers[0] == answers[1]
    assert answers[0].startswith("`x` must be finite (debug mode), got NaN or infinity on rank")
    assert "1" in answers[0].split(" in ")[0]
    assert "layer '1'" in answers[0] or "in 1." in answers[0]


def _nan_by_default() -> bool:
    x = torch.full((3, 4), torch.nan if dist.get_rank() == 1 else 1.0)
    layer = SyncBatchNorm(4)
    return bool(layer(x).isnan().all() and layer.running_mean.isnan().all())


def test_a_nan_propagates_to_all_workers_by_default(pool):
    assert pool(2).run(_nan_by_default) == [True, True]


def _called_directly_on_one_worker() -> list[str]:
    """The error, before any exchange, of a worker that is alone in calling a part of a model."""
    errors = []
    for sync in ("running", "lagged"):
        model = prepare_ddp(nn.Sequential(SyncBatchNorm(4, sync=sync)))
        if dist.get_rank() == 0:
            with exchange.record() as sent, pytest.raises(InputError) as caught:
                model[0](uneven_batch(3, 0).float())
            assert not sent
            errors.append(str(caught.value))
        dist.barrier()
    return errors


def test_a_direct_call_is_refused_before_any_exchange(pool):
    errors, _ = pool(2).run(_called_directly_on_one_worker)
    assert len(errors) == 2
    assert all("got a direct call of layer '0'" in error for error in errors)


def test_a_direct_call_after_a_forward_that_raised_is_noticed():
    model = prepare_ddp(nn.Sequential(KINDS["norm"](4), RaisesOnce()))
    with pytest.raises(RuntimeError, match="once"):
        model(uneven_batch(6, 0))
    with pytest.raises(InputError, match="got a direct call of layer '0'"):
        model[0](uneven_batch(6, 0))
    try:
        raise KeyError
    except KeyError:
        # A forward that succeeds while somebody handles an exception counts.
        model(uneven_batch(6, 0))
    assert int(model.state_dict()["0.num_batches_tracked"]) == 1


def test_a_mask_of_many_dimensions_is_no_less_an_error():
    x = torch.randn(2, 3, *[1] * 8)
    with pytest.raises(FaultError, match="got -1"):
        SyncBatchNorm(3)(x, torch.full((2, 1, *[1] * 8), -1.0))
