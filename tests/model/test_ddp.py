"""prepare_ddp and scale_loss."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.nn.parallel import DistributedDataParallel

from syncnorm import (
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    accumulate,
    gather,
    prepare_ddp,
    scale_loss,
)
from syncnorm.comm import exchange
from syncnorm.errors import FaultError, InputError
from syncnorm.model.adopt import adopt_state_dict
from syncnorm.module import SyncNorm
from tests.as_device import as_device
from tests.unit.budgets import Log


def _scaled(counts: list[int]) -> tuple[float, list[tuple[str, int]]]:
    with exchange.record() as exchanges:
        loss = scale_loss(torch.tensor(3.0), counts[dist.get_rank()])
    return loss.item(), [(e.kind, e.numel) for e in exchanges]


@pytest.mark.parametrize("counts", [[4, 4], [1, 3], [0, 5], [2, 0, 4], [0, 0]], ids=str)
def test_scale_loss(pool, counts):
    total = sum(counts)
    for rank, (loss, exchanges) in enumerate(pool(len(counts)).run(_scaled, counts)):
        assert loss == pytest.approx(3.0 * counts[rank] * len(counts) / total if total else 0.0)
        assert exchanges == [("count", 2)]


def _scaled_by_unread(counts: list[float]) -> tuple[list[float], list[str]]:
    """The loss and its gradient, of a mean over nothing where there is none; and what was called."""
    count = counts[dist.get_rank()] if dist.is_initialized() else counts[0]
    mean = torch.tensor(3.0 if count else torch.nan, requires_grad=True)
    with as_device(), Log("cpu") as log:
        loss = scale_loss(mean, torch.tensor(count))
        loss.backward()
    return [loss.item(), mean.grad.item()], log.names


@pytest.mark.parametrize(
    "counts", [[5], [0], [1, 3], [0, 5], [2, 0, 4], [0, 0], [1.5, 2.0]], ids=str
)
def test_a_count_on_a_device_is_not_read(pool, counts):
    total = sum(counts) or 1
    run = pool(len(counts)).run(_scaled_by_unread, counts)
    for count, (got, operators) in zip(counts, run, strict=True):
        weight = count * len(counts) / total
        assert got == pytest.approx([3.0 * weight, weight])
        assert "aten._local_scalar_dense" not in operators


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_one_on_a_device_that_is_none_makes_all_losses_nan(pool, wrong):
    for (loss, _), _ in [*pool(2).run(_scaled_by_unread, [3.0, wrong]), _scaled_by_unread([wrong])]:
        assert math.isnan(loss)


def _of_no_count(count: float, shape: tuple[int, ...] = ()) -> str:
    with pytest.raises(FaultError) as caught:
        scale_loss(torch.ones(shape), count)
    return str(caught.value)


@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf")])
def test_a_count_that_is_none_is_one_error_on_all(pool, wrong):
    first, second = pool(2).run_each(_of_no_count, [(3,), (wrong,)])
    assert first == second
    assert f"`local_count` must be finite and >= 0, got {wrong} on rank 1. It" in first
    assert f"got {wrong} on rank 0" in _of_no_count(wrong)


def _by(kind: str) -> float:
    """A loss of 2 by a count of this type, as many on each worker."""
    counts = {
        "int8": torch.tensor(100, dtype=torch.int8),
        "uint8": torch.tensor([200], dtype=torch.uint8),
        "numpy": np.uint8(200),
        "half": torch.tensor(60_000.0, dtype=torch.float16),
        "bool": torch.tensor(True),
    }
    return scale_loss(torch.tensor(2.0), counts[kind]).item()


@pytest.mark.parametrize("kind", ["int8", "uint8", "numpy", "half", "bool"])
def test_a_count_may_have_any_type_of_number(pool, kind):
    assert pool(3).run(_by, kind) == [pytest.approx(2.0, rel=1e-6)] * 3


def test_what_is_no_number_is_one_error_on_all(pool):
    for wrong in ((torch.ones(2),), ("3",), (10**400,), (3, (2,))):
        first, second = pool(2).run_each(_of_no_count, [(3,), wrong])
        assert first == second
    assert "`local_count` must be finite and >= 0, got nan on rank 1" in first
    with pytest.raises(InputError, match=r"`loss` must be a mean, of shape \(\), got \(2,\)"):
        scale_loss(torch.ones(2), 3)


def _compiled_step() -> float:
    weight = torch.ones(2, requires_grad=True)

    def step(x):
        loss = (gather(x) * weight).mean()
        scale_loss(loss, 3).backward()

    torch.compile(step, backend="eager")(torch.full((4, 2), 2.0))
    return weight.grad.tolist()


def test_a_compiled_step_calls_them(pool):
    assert pool(2).run(_compiled_step) == [[1.0, 1.0]] * 2
    assert _compiled_step() == [1.0, 1.0]


def test_scale_loss_alone_is_the_loss():
    loss = torch.tensor(3.0, requires_grad=True)
    assert scale_loss(loss, 5) is loss
    assert scale_loss(loss * torch.nan, 0) == 0


def _buffers_under_ddp(prepare: bool, sync: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Running means after preparing and after two training steps, with start values that differ by
    rank.
    """
    rank = dist.get_rank()
    model = nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4, sync=sync), nn.Linear(4, 1))
    model[1].running_mean.fill_(rank + 1.0)
    if prepare:
        assert prepare_ddp(model) is model
    wrapped = DistributedDataParallel(model)
    start = [b.clone() for b in model.buffers()]
    for step in range(2):
        torch.manual_seed(10 * rank + step)
        wrapped(torch.randn(5 + rank, 3)).square().mean().backward()
    return start, [b.clone() for b in model.buffers()]


def test_prepare_ddp_gives_all_workers_the_buffers_of_rank_zero_once(pool):
    (start0, end0), (start1, end1) = pool(2).run(_buffers_under_ddp, True, "none")
    assert all(torch.equal(a, b) for a, b in zip(start0, start1, strict=True))
    assert not torch.equal(end0[0], end1[0]), "local statistics stay each worker's own"
    # What DDP does to buffers by itself, and prepare_ddp keeps it from doing: rank 0's replace
    # everyone's.
    (_, end0), (_, end1) = pool(2).run(_buffers_under_ddp, False, "none")
    drift = (end0[0] - end1[0]).abs().max()
    (_, kept0), (_, kept1) = pool(2).run(_buffers_under_ddp, True, "none")
    assert (kept0[0] - kept1[0]).abs().max() > drift * 1.01


def test_pooled_buffers_stay_equal_under_ddp(pool):
    for prepare in (True, False):
        (_, end0), (_, end1) = pool(2).run(_buffers_under_ddp, prepare, "batch")
        assert all(torch.equal(a, b) for a, b in zip(end0, end1, strict=True))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: SyncBatchNorm(4),
    "renorm": lambda: SyncBatchRenorm(4, schedule=RenormSchedule.switch(100, 3.0, 5.0)),
    "running": lambda: SyncBatchNorm(4, sync="running"),
    "lagged": lambda: SyncBatchNorm(4, sync="lagged"),
    "none": lambda: SyncBatchNorm(4, sync="none"),
    "torch": lambda: nn.BatchNorm1d(4),
}


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state from somewhere else, past a schedule's beginning, that does not wait."""
    return {
        key: torch.zeros_like(value)
        if key.endswith("waits")
        else value + (9000 if value.dtype == torch.int64 else 2)
        for key, value in model.state_dict().items()
    }


def _write(model: nn.Module) -> None:
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.fill_(3)


ARRIVALS: dict[str, Callable[[nn.Module], object]] = {
    "load_state_dict": lambda model: model.load_state_dict(_trained(model)),
    "assign": lambda model: model.load_state_dict(_trained(model), assign=True),
    "adopt_state_dict": lambda model: adopt_state_dict(model, _trained(model)),
    "written": _write,
    "reset": lambda model: model[1].reset_running_stats(),
}


def _state_of_rank_zero(layer: str) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Rank 0's state comes in before DDP wraps a trained model; then as wrapped, and after training
    and evaluation.
    """
    torch.manual_seed(0)
    trained = prepare_ddp(nn.Sequential(nn.Linear(3, 4), LAYERS[layer](), nn.Linear(4, 2)))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(dist.get_rank()))
    DistributedDataParallel(trained)(x).square().mean().backward()
    found = {}
    for way, come_in in ARRIVALS.items():
        model = copy.deepcopy(trained)
        if dist.get_rank() == 0:
            come_in(model)
        wrapped = DistributedDataParallel(model)
        found[way] = [{k: v.clone() for k, v in model.state_dict().items()}]
        evaluated = wrapped.eval()(torch.ones(2, 3)).detach()
        wrapped.train()
        for _ in range(2):
            wrapped(x).square().mean().backward()
        # Running statistics of each worker's own differ from here on.
        found[way].append(
            {"evaluated": evaluated, **({} if layer in ("none", "torch") else model.state_dict())}
        )
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_ddp_gives_all_workers_the_state_that_rank_zero_has_when_it_wraps(pool, layer):
    first, second = pool(2).run(_state_of_rank_zero, layer)
    for way, states in first.items():
        for one, other in zip(states, second[way], strict=True):
            for key, value in one.items():
                assert torch.equal(value, other[key]), f"{way} {key}"
    assert (first["written"][0]["1.running_mean"] == 3.0).all()
    counted = {way: int(states[0]["1.num_batches_tracked"]) for way, states in first.items()}
    assert counted == {
        "load_state_dict": 9001,
        "assign": 9001,
        "adopt_state_dict": 9001,
        "written": 3,
        "reset": 0,
    }


def _others_buffers(how: str) -> tuple[list[float], set[str]]:
    """Buffers of each worker's own, before DDP and under it; and what travelled in a training
    forward.
    """
    model = nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4))
    for name in ("left", "other"):
        model.register_buffer(name, torch.full((), float(dist.get_rank())))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["left"])
    prepare_ddp(prepare_ddp(model))
    seen = [model.left.item(), model.other.item()]
    wrapped = DistributedDataParallel(model, broadcast_buffers=how == "broadcast")
    wrapped(torch.randn(4, 3)).sum().backward()
    return [*seen, model.left.item(), model.other.item()], wrapped.parameters_to_ignore


@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated")
@pytest.mark.parametrize("how", ["broadcast", "none"])
def test_buffers_of_others_are_left_to_ddp(pool, how):
    for rank, (seen, ignored) in enumerate(pool(2).run(_others_buffers, how)):
        assert seen == [rank, rank, rank, 0 if how == "broadcast" else rank]
        ours = {f"1.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")}
        assert ignored == {"left", *ours}


def _statistics_of_ones_own(how: str) -> Tensor:
    """Running means after steps of a layer that pools with nobody, in a model that is wrapped since
    it was prepared.
    """
    torch.manual_seed(0)
    model = prepare_ddp(nn.Sequential(nn.Conv1d(2, 3, 1), SyncBatchNorm(3, process_group=1)))
    if how == "compiled":
        model = torch.compile(model, backend="eager")
    elif how == "a part compiled":
        model[1] = torch.compile(model[1], backend="eager")
    elif how == "a part of another":
        model = nn.Sequential(model, nn.Flatten())
    elif how == "checkpointed":
        apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, SyncBatchNorm))
    elif how == "a buffer by two names":
        view = nn.Module()
        view.register_buffer("running_mean_seen", model[1].running_mean)
        model = nn.Sequential(OrderedDict(view=view, model=model))
        view.forward = lambda x: x
    elif how == "told to leave others":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["other"])
    x = torch.arange(24.0).view(4, 2, 3)
    ddp = DistributedDataParallel(model)
    for _ in range(2):
        ddp((1.0 + dist.get_rank()) * x).sum().backward()
    ddp(torch.zeros(4, 2, 3))
    (mean,) = (b for name, b in model.named_buffers() if "running_mean" in name)
    return mean


@pytest.mark.parametrize(
    "how",
    [
        *("compiled", "a part compiled", "a part of another", "checkpointed"),
        *("a buffer by two names", "told to leave others"),
    ],
)
def test_what_is_each_workers_own_stays_so_however_the_model_is_wrapped(pool, how):
    plain = pool(2).run(_statistics_of_ones_own, "plain")
    assert not torch.allclose(*plain)
    torch.testing.assert_close(pool(2).run(_statistics_of_ones_own, how), plain)


def _prepare_wrapped() -> str:
    with pytest.warns(UserWarning, match="syncnorm") as caught:
        prepare_ddp(
            DistributedDataParallel(
                nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4), SyncBatchNorm(4))
            )
        )
    return " ".join(str(each.message) for each in caught)


def test_a_model_that_is_wrapped_already_is_one_warning(pool):
    for said in pool(2).run(_prepare_wrapped):
        assert said.count("must be prepared before DistributedDataParallel wraps it") == 1


def test_prepare_ddp_says_when_a_switch_has_replaced_our_layers():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Identity(), SyncBatchNorm(4)))
    with pytest.warns(UserWarning, match=r"contains torch.nn.SyncBatchNorm at \['1'\]"):
        prepare_ddp(model)


def _switched_when_prepared() -> None:
    model = prepare_ddp(nn.Sequential(nn.Linear(2, 4), SyncBatchNorm(4)))
    whole = nn.ModuleDict({"net": nn.SyncBatchNorm.convert_sync_batchnorm(model)})
    # On a CPU DDP then refuses torch's layers.
    with pytest.warns(UserWarning, match=r"SyncBatchNorm at \['net.1'\]") as caught:
        with pytest.raises(ValueError, match="SyncBatchNorm"):
            DistributedDataParallel(whole)
    assert [each.filename for each in caught] == [__file__]


def test_so_does_ddp_when_it_was_after_prepare_ddp(pool):
    pool(2).run(_switched_when_prepared)


def test_scale_loss_of_nothing_is_zero(pool):
    assert pool(2).run(_scaled_mean_of_nothing) == [(0.0, 0.0)] * 2


def _scaled_mean_of_nothing() -> tuple[float, float]:
    weight = torch.ones(3, requires_grad=True)
    loss = scale_loss((torch.empty(0, 3) * weight).mean(), 0)
    loss.backward()
    return loss.item(), weight.grad.abs().max().item()


def test_prepare_ddp_needs_no_group():
    model = nn.Sequential(SyncBatchNorm(4))
    assert prepare_ddp(model) is model


def _gradients(counts: list[int]) -> list[torch.Tensor]:
    """DDP's averaged gradients of a model with a layer in the middle, on shards that may be empty."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), SyncBatchNorm(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    x = torch.randn(sum(counts), 2, 4, 4, dtype=torch.float64)
    y = torch.randn(sum(counts), 3, dtype=torch.float64)
    if len(counts) > 1:
        rank = dist.get_rank()
        x, y = x.split(counts)[rank], y.split(counts)[rank]
        model = DistributedDataParallel(prepare_ddp(model))
    out = model(x)
    loss = (
        (out - y).square().mean()
        if len(x)
        else (out * 0.0).mean()
        if out.numel()
        else out.sum() * 0.0
    )
    scale_loss(loss, len(x)).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("counts", [[3, 3], [5, 1], [6, 0], [0, 4, 2]], ids=str)
def test_gradients_are_the_large_batchs(pool, counts):
    whole = _gradients([sum(counts)])
    for gradients in pool(len(counts)).run(_gradients, counts):
        for got, expected in zip(gradients, whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def _swap_in_an_average() -> list[float]:
    """Worker 0 alone evaluates with a copy of the model in the place of DDP's."""
    model = prepare_ddp(nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4)))
    ddp = DistributedDataParallel(model)
    average = copy.deepcopy(ddp.module)
    if dist.get_rank() == 0:
        own, ddp.module = ddp.module, average
        ddp.eval()(torch.ones(2, 3))
        ddp.module = own
        ddp.train()
    ddp(torch.randn(4, 3)).square().mean().backward()
    return model[1].running_mean.tolist()


def test_one_worker_may_put_another_model_into_ddp(pool):
    first, second = pool(2).run(_swap_in_an_average)
    assert first == second


def _scaled_in_a_half_type(counts: list[int]) -> tuple[torch.dtype, float, float]:
    loss = torch.ones((), dtype=torch.bfloat16, requires_grad=True)
    scaled = scale_loss(loss, counts[dist.get_rank()])
    scaled.backward()
    assert loss.grad is not None
    return scaled.dtype, scaled.item(), loss.grad.item()


@pytest.mark.parametrize("counts", [[3, 7], [0, 4]])
def test_a_loss_keeps_its_type_on_workers_with_and_without_samples(pool, counts):
    for count, (dtype, value, gradient) in zip(
        counts, pool(2).run(_scaled_in_a_half_type, counts), strict=True
    ):
        assert dtype == torch.bfloat16
        assert value == gradient == pytest.approx(2 * count / sum(counts), rel=2**-8)


def _with_another_head(sync: str, how: str) -> list[list[torch.Tensor]]:
    """Running statistics after a step of an old model and one of a new model with its encoder."""
    torch.manual_seed(0)
    old = prepare_ddp(
        nn.Sequential(
            nn.Sequential(nn.Linear(3, 3), SyncBatchNorm(3, sync=sync)),
            nn.Sequential(nn.Linear(3, 2), SyncBatchNorm(2, sync=sync)),
        )
    )
    encoder = copy.deepcopy(old[0]) if how == "a copy" else old[0]
    head = nn.Sequential(nn.Linear(3, 5), SyncBatchNorm(5, sync=sync))
    model = old if how == "the old model" else nn.Sequential(encoder, head)
    x = torch.randn(2, 6, 3)[:, dist.get_rank() :: 2]
    old(x[0]).square().sum().backward()
    if how == "a copy":
        encoder.load_state_dict(old[0].state_dict())
    sources = [m.statistics for m in model.modules() if isinstance(m, SyncNorm)]
    prepare_ddp(model)
    if how == "the old model":
        assert sources == [m.statistics for m in model.modules() if isinstance(m, SyncNorm)]
    model(x[1]).square().sum().backward()
    if how == "back again":
        prepare_ddp(old)(x[0]).square().sum().backward()
        prepare_ddp(model)(x[0]).square().sum().backward()
    return [[m.running_mean, m.num_batches_tracked] for m in encoder if isinstance(m, SyncNorm)]


@pytest.mark.parametrize("how", ["itself", "a copy", "the old model", "back again"])
@pytest.mark.parametrize("sync", ["running", "lagged"])
def test_an_encoder_may_be_prepared_anew_with_another_head(pool, sync, how):
    first, second = pool(2).run(_with_another_head, sync, how)
    for (mean, count), (other, _) in zip(first, second, strict=True):
        assert torch.equal(mean, other)
        assert mean.abs().max() > 0
        assert int(count) == (4 if how == "back again" else 2)


def _prepared_between_the_passes(sync: str) -> tuple[list[Tensor], int]:
    """Of an encoder that is prepared with another head before the backward pass of its forward."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(3, 3), SyncBatchNorm(3, sync=sync))
    old = prepare_ddp(nn.Sequential(encoder, nn.Linear(3, 2)))
    new = nn.Sequential(encoder, nn.Linear(3, 5), SyncBatchNorm(5, sync=sync))
    x = torch.randn(2, 6, 3)[:, dist.get_rank() :: 2]
    loss = old(x[0]).square().sum()
    prepare_ddp(new)
    loss.backward()
    new(x[1]).square().sum().backward()
    for model in (old, new) * 3:
        prepare_ddp(model)(x[0]).square().sum().backward()
    return list(encoder[1].state_dict().values()), len(old._forward_hooks)


@pytest.mark.parametrize("sync", ["running", "lagged"])
def test_a_model_may_be_prepared_between_the_passes_of_another(pool, sync):
    (first, hooks), (second, _) = pool(2).run(_prepared_between_the_passes, sync)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    assert hooks == 1


@pytest.mark.parametrize("sync", ["running", "lagged"])
def test_a_block_keeps_the_layers_that_it_has(sync):
    """Until `accumulate` has made its update they stay with the model that it was given."""
    layer, x = SyncBatchNorm(3, sync=sync), torch.randn(8, 3)
    old, new = prepare_ddp(nn.Sequential(layer)), nn.Sequential(layer, nn.Linear(3, 2))
    with accumulate(old):
        old(x).sum().backward()
        prepare_ddp(new)
    with pytest.raises(InputError, match="must be used through the model that was given"):
        new(x)
    prepare_ddp(new)(x).sum().backward()
    layer.settle()
    assert int(layer.num_batches_tracked) == 2
