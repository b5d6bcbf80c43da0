"""sync="running": one hidden exchange per training forward; buffers are those of the pooled data."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from syncnorm import SyncBatchNorm, accumulate, debug, prepare_ddp, reference
from syncnorm.comm import exchange
from syncnorm.errors import ExchangeError
from syncnorm.testing import RankPool, assert_close, shard
from tests.model.parts import KINDS, state_of, uneven_batch


def _train(
    kind: str, batches: list[Tensor], sizes: tuple[int, ...], layers: int
) -> tuple[dict, list]:
    rank = dist.get_rank()
    model = nn.Sequential(*(KINDS[kind](4) for _ in range(layers)))
    wrapped = DistributedDataParallel(prepare_ddp(model))
    with exchange.record() as record:
        for batch in batches:
            wrapped(batch.split(list(sizes))[rank]).square().mean().nan_to_num().backward()
    return state_of(model), [(e.kind, e.numel) for e in record]


def _evaluated_in_a_fork(is_debug: bool) -> tuple[int, list[int]]:
    """The status of a child that evaluates while an update is under way; and the steps counted."""
    with debug(timeout_seconds=60) if is_debug else nullcontext():
        return _evaluated_in_a_child()


def _evaluated_in_a_child() -> tuple[int, list[int]]:
    model = prepare_ddp(nn.Sequential(SyncBatchNorm(3, sync="running")))
    batches = [torch.randn(4, 3) for _ in range(2)]
    model(batches[0])
    child = os.fork()
    if child == 0:
        try:
            model.eval()(batches[0])
            with pytest.raises(ExchangeError, match="a forked process has no part"):
                model.train()(batches[1])
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    counts = [int(model[0].num_batches_tracked)]
    model(batches[1])
    return status, [*counts, int(model[0].num_batches_tracked)]


@pytest.mark.parametrize("is_debug", [False, True])
@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_forked_process_waits_for_nobody(monkeypatch, switch, is_debug):
    """As a loader's process does that holds the model; and its parent goes on."""
    monkeypatch.setenv("SYNCNORM_SHARED_MEMORY", switch)
    with RankPool(2, timeout_seconds=120) as ranks:
        assert ranks.run(_evaluated_in_a_fork, is_debug) == [(0, [1, 2])] * 2


@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("sizes", [(6, 2), (5, 1, 2), (8, 0)], ids=str)
def test_one_exchange_per_training_forward_however_many_layers(pool, sizes, layers):
    batches = [uneven_batch(8, seed) for seed in range(3)]
    for _, exchanges in pool(len(sizes)).run(_train, "norm", batches, sizes, layers):
        assert exchanges == [("all moments", exchange.size_of(layers * 9 + len(sizes)))] * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(6, 2), (5, 1, 2), (0, 8)], ids=str)
def test_buffers_are_the_total_variance_and_equal_to_the_bit(pool, sizes, kind):
    """Total variance: within plus between workers.

    The mean of local variances would be far off here.
    """
    batches = [uneven_batch(8, seed) for seed in range(3)]
    running = reference.RunningStatistics.initial(4)
    for batch in batches:
        if kind == "norm":
            reference.batch_norm(batch, running=running)
        else:
            reference.batch_renorm(batch, running=running, r_max=2.0, d_max=1.0)
    answers = [state for state, _ in pool(len(sizes)).run(_train, kind, batches, sizes, 1)]
    for state in answers:
        assert all(torch.equal(state[k], v) for k, v in answers[0].items())
        assert_close(state["0.running_mean"], running.mean, torch.float64, "running_mean")
        assert_close(state["0.running_var"], running.var, torch.float64, "running_var")
        assert int(state["0.num_batches_tracked"]) == 3
    local = (
        torch.stack([b.split(list(sizes))[0].var((0, 2)) for b in batches if sizes[0]])
        if sizes[0]
        else None
    )
    if local is not None and kind == "norm":
        assert (local.mean(0) < 0.9 * batches[0].var((0, 2))).all(), (
            "the shards must differ for this to say anything"
        )


def test_the_forward_is_that_of_the_local_layer(pool):
    batch = uneven_batch(8, 0)
    for rank, y in enumerate(pool(2).run(_forward, shard(batch, (6, 2)))):
        assert_close(y, reference.batch_norm(batch.split([6, 2])[rank]), torch.float64, "y")


def _forward(shards: list[Tensor]) -> Tensor:
    model = prepare_ddp(nn.Sequential(KINDS["norm"](4)))
    return model(shards[dist.get_rank()]).detach()


def _seen() -> tuple[list[float], list[float], list[str]]:
    """The running mean after each of three forwards: as the layer's, and as a tensor held since the
    first.
    """
    layer = KINDS["norm"](1)
    model = prepare_ddp(nn.Sequential(layer))
    held = layer.running_mean
    as_layers, as_held = [], []
    with exchange.record() as record:
        for step in range(3):
            model(uneven_batch(4, step, 1) + dist.get_rank())
            as_held.append(held.item())
            as_layers.append(layer.running_mean.item())
    return as_layers, as_held, [each.kind for each in record]


def test_who_reaches_for_a_buffer_finds_the_last_forward_in_it(pool):
    running = reference.RunningStatistics.initial(1)
    expected = [0.0]
    for step in range(3):
        batch = uneven_batch(4, step, 1)
        reference.batch_norm(torch.cat([batch, batch + 1]), running=running)
        expected.append(running.mean.item())
    for as_layers, as_held, kinds in pool(2).run(_seen):
        assert as_layers == pytest.approx(expected[1:], rel=1e-12)
        assert as_held == pytest.approx(expected[:3], rel=1e-12), (
            "the update is late for those who go around the layer"
        )
        assert kinds == ["all moments"] * 3


def _average(model: nn.Module) -> None:
    """What reads and writes in one."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.mul_(2).add_(1)


def _swap(model: nn.Module) -> None:
    for name in ("running_mean", "running_var"):
        torch.utils.swap_tensors(
            model[0].get_buffer(name), torch.full((4,), 3.0, dtype=torch.float64)
        )


def _copy_from_a_teacher(model: nn.Module) -> None:
    teacher = copy.deepcopy(model)
    for own, other in zip(model.buffers(), teacher.buffers(), strict=True):
        own.copy_(2 * other)


def _reassign(model: nn.Module) -> None:
    model[0].running_mean = torch.full_like(model[0].running_var, 3.0)
    model[0].register_buffer("running_var", torch.full_like(model[0].running_var, 3.0))


def _parametrize(model: nn.Module) -> None:
    parametrize.register_parametrization(model[0], "running_mean", nn.Identity(), unsafe=True)
    parametrize.remove_parametrizations(model[0], "running_mean", leave_parametrized=False)


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "zero_": lambda model: model[0].running_mean.zero_(),
    "the clock": lambda model: model[0].num_batches_tracked.fill_(7),
    ".data": lambda model: setattr(
        model[0].running_mean, "data", torch.ones(4, dtype=torch.float64)
    ),
    "_buffers": lambda model: model[0]._buffers["running_var"].fill_(5),
    "reassign": _reassign,
    "delete": lambda model: (
        delattr(model[0], "running_mean"),
        model[0].register_buffer("running_mean", None),
    ),
    "average": _average,
    "AveragedModel": lambda model: model.load_state_dict(
        AveragedModel(model, use_buffers=True).module.state_dict()
    ),
    "swap_tensors": _swap,
    "copy_ from a teacher": _copy_from_a_teacher,
    "update_bn": lambda model: torch.optim.swa_utils.update_bn([uneven_batch(4, 7)], model),
    "assign": lambda model: model.load_state_dict(
        {k: v + 1 for k, v in model.state_dict().items()}, assign=True
    ),
    "parametrize": _parametrize,
    "functional_call": lambda model: torch.func.functional_call(
        model, {k: v * 2 for k, v in model.named_buffers()}, uneven_batch(4, 9)
    ),
    "cast": lambda model: model.float().double(),
}


@pytest.mark.parametrize("sync", ["running", "lagged"])
@pytest.mark.parametrize("write", WRITES)
def test_what_others_write_counts_as_with_a_layer_that_updates_at_once(write, sync):
    """Between two forwards, and whatever becomes of the statistics in the second."""
    at_once = nn.Sequential(SyncBatchNorm(4, dtype=torch.float64))
    late = prepare_ddp(nn.Sequential(SyncBatchNorm(4, dtype=torch.float64, sync=sync)))
    for model in (at_once, late):
        model(uneven_batch(6, 0))
        WRITES[write](model)
    for _ in range(2):
        for name, value in at_once.named_buffers():
            torch.testing.assert_close(
                dict(late.named_buffers())[name], value, rtol=1e-12, atol=1e-12, msg=name
            )
        for model in (at_once, late):
            model(uneven_batch(6, 1))
    assert write == "delete" or not torch.equal(at_once[0].running_mean, torch.zeros(4))


def _write_under_way(is_alone: bool) -> list[Tensor]:
    """One worker, or each, writes what it holds since before the forward."""
    model = prepare_ddp(nn.Sequential(KINDS["norm"](4)))
    mean, var = model[0].running_mean, model[0].running_var
    model(uneven_batch(6, dist.get_rank()))
    if not is_alone or dist.get_rank() == 1:
        mean.fill_(3.0)
    return [mean, var, model.state_dict()["0.running_mean"]]


def test_what_is_written_into_a_buffer_that_somebody_holds_stays(pool):
    for is_alone in (False, True):
        first, second = pool(2).run(_write_under_way, is_alone)
        assert (second[0] == 3.0).all(), "the update is older"
        assert torch.equal(second[0], second[2])
        assert torch.equal(first[1], second[1]), "the others follow the update"
        assert not torch.equal(first[1], torch.ones(4).double())
        assert torch.equal(first[0], second[0]) is not is_alone


def _patterns(name: str) -> tuple[dict, int]:
    """One way of training with three micro-batches; the state and the number of exchanges."""
    rank = dist.get_rank()
    x = [uneven_batch(5, 10 * seed + rank) for seed in range(3)]
    layer = KINDS["renorm"](4)
    model = prepare_ddp(nn.Sequential(layer))
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with exchange.record() as record:
        if name == "plain" or name == "gradient accumulation":
            for each in x:
                (model(each) * weight).mean().backward()
        elif name == "forwards first":
            sum((model(each) * weight).mean() for each in x).backward()
        elif name == "without backward":
            for each in x:
                model(each)
        elif name == "checkpoint":
            for each in x:
                leaf = each.clone().requires_grad_()
                (checkpoint(model, leaf, use_reentrant=False) * weight).mean().backward()
        elif name == "reentrant checkpoint":
            for each in x:
                leaf = each.clone().requires_grad_()
                (checkpoint(model, leaf, use_reentrant=True) * weight).mean().backward()
        elif name == "evaluation between, on one worker":
            for each in x:
                (model(each) * weight).mean().backward()
                if rank == 0:
                    model.eval()(each)
                    model.train()
    state = state_of(model)
    state["grad"] = layer.weight.grad.clone() if layer.weight.grad is not None else torch.zeros(())
    return state, len(record)


@pytest.mark.parametrize(
    "name",
    [
        "gradient accumulation",
        "forwards first",
        "without backward",
        "checkpoint",
        "reentrant checkpoint",
        "evaluation between, on one worker",
    ],
)
def test_every_pattern_gives_the_plain_ones_buffers(pool, name):
    plain = pool(2).run(_patterns, "plain")
    for (state, exchanges), (expected, _) in zip(pool(2).run(_patterns, name), plain, strict=True):
        assert exchanges == 3
        for key, value in expected.items():
            if key != "grad" or name != "without backward":
                torch.testing.assert_close(
                    state[key], value, rtol=1e-13, atol=1e-14, msg=lambda m, k=key: f"{k} {m}"
                )


def _used_twice() -> Tensor:
    layer = KINDS["norm"](4)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(a) + self.layer(b)

    model = prepare_ddp(Twice())
    rank = dist.get_rank()
    model(uneven_batch(3, rank), uneven_batch(3, 10 + rank))
    state = model.state_dict()
    count = state["layer.num_batches_tracked"].view(1)
    return torch.cat([state["layer.running_mean"], state["layer.running_var"], count])


def test_a_layer_used_twice_gets_one_merged_update(pool):
    running = reference.RunningStatistics.initial(4)
    reference.batch_norm(torch.cat([uneven_batch(3, s) for s in (0, 1, 10, 11)]), running=running)
    for got in pool(2).run(_used_twice):
        assert_close(
            got,
            torch.cat([running.mean, running.var, torch.ones(1).double()]),
            torch.float64,
            "buffers",
        )


class _CallsItself(nn.Module):
    """Takes two scales, as in a pyramid, or has its own evaluation for a target."""

    def __init__(self, sync: str, evaluates: bool) -> None:
        super().__init__()
        self.first, self.last = (SyncBatchNorm(4, sync=sync, dtype=torch.float64) for _ in "ab")
        self.evaluates = evaluates
        self.interrupts = False

    def forward(self, x: Tensor, is_outer: bool = True) -> Tensor:
        y = self.first(x)
        if is_outer:
            self.train(not self.evaluates)
            inner = self(x + 10, False)
            self.train()
            y = self.last(y) + inner
        elif self.interrupts:
            self.interrupts = False
            raise KeyboardInterrupt
        return y


def _calls_itself(sync: str, evaluates: bool) -> tuple[int, dict[str, Tensor]]:
    model = prepare_ddp(_CallsItself(sync, evaluates))
    x = uneven_batch(3, dist.get_rank())
    with exchange.record() as record:
        model(x).square().mean().backward()
        # Of a forward that is interrupted torch tells nobody the end.
        model.interrupts = not evaluates
        with pytest.raises(KeyboardInterrupt) if model.interrupts else nullcontext():
            model(x).square().mean().backward()
        model(x).square().mean().backward()
    return sum(e.kind == "all moments" for e in record), state_of(model)


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("sync", ["running", "lagged"])
def test_a_forward_that_the_model_makes_of_itself_is_a_part_of_it(pool, sync, evaluates):
    steps = 3 if evaluates else 2
    x = torch.cat([uneven_batch(3, rank) for rank in (0, 1)])
    running = reference.RunningStatistics.initial(4)
    for _ in range(steps):
        reference.batch_norm(x if evaluates else torch.cat([x, x + 10]), running=running)
    for sent, state in pool(2).run(_calls_itself, sync, evaluates):
        assert sent == steps
        assert state["first.num_batches_tracked"] == state["last.num_batches_tracked"] == steps
        assert_close(state["first.running_mean"], running.mean, torch.float64, "running_mean")
        assert_close(state["first.running_var"], running.var, torch.float64, "running_var")


def test_a_copy_has_the_update_that_was_under_way():
    model = prepare_ddp(nn.Sequential(KINDS["norm"](4)))
    model(uneven_batch(6, 0))
    other = copy.deepcopy(model)
    assert int(other[0].num_batches_tracked) == 1
    expected = model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in other.state_dict().items())
    other(uneven_batch(6, 1))
    assert int(other.state_dict()["0.num_batches_tracked"]) == 2
    assert int(model.state_dict()["0.num_batches_tracked"]) == 1


def test_loading_drops_what_was_under_way():
    model = prepare_ddp(nn.Sequential(KINDS["norm"](4)))
    start = state_of(model)
    model(uneven_batch(6, 0))
    model.load_state_dict(start)
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())


def test_the_momentum_is_that_of_the_forward():
    """swa_utils.update_bn changes it for its forwards and puts it back before the last update is
    applied.
    """
    model = prepare_ddp(nn.Sequential(SyncBatchNorm(1, sync="running", momentum=0.9)))
    batches = [torch.full((4, 1), v) for v in (3.0, 6.0)]
    torch.optim.swa_utils.update_bn(batches, model)
    assert model.state_dict()["0.running_mean"].item() == pytest.approx(4.5)


class _Branches(nn.Module):
    """A branch that one worker takes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.first = (SyncBatchNorm(2, sync="running") for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.always(x)
        return self.first(y) if dist.get_rank() == 0 else y


def _branches_step(accumulates: bool) -> dict[str, Tensor]:
    model = prepare_ddp(_Branches())
    with accumulate(model) if accumulates else nullcontext():
        model(uneven_batch(6, dist.get_rank())[:, :2])
        model.first.track_running_stats = False
    return model.state_dict()


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_branch_of_one_worker_moves_the_statistics_of_all(pool, accumulates):
    one, other = pool(2).run(_branches_step, accumulates)
    assert one["first.num_batches_tracked"].item() == 1
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("sync", ["batch", "none", "running", "lagged"])
def test_what_is_tracked_is_that_of_the_forward(sync, accumulates):
    """Who freezes a part of a network for some epochs sets and clears `track_running_stats`."""
    model = prepare_ddp(nn.Sequential(SyncBatchNorm(1, sync=sync, momentum=0.5)))
    (layer,) = model
    for is_tracking, value in [(True, 4.0), (False, 100.0), (True, 6.0), (False, 100.0)]:
        with accumulate(model) if accumulates else nullcontext():
            layer.track_running_stats = is_tracking
            y = model(torch.tensor([[value - 1], [value + 1]], requires_grad=True))
            layer.track_running_stats = not is_tracking
        y.sum().backward()
    assert layer.running_mean.item() == 4.0
    assert layer.num_batches_tracked.item() == 2


def test_reset_move_and_evaluation_mode_find_nothing_under_way():
    model = prepare_ddp(nn.Sequential(KINDS["norm"](4)))
    model(uneven_batch(6, 0))
    model[0].reset_running_stats()
    assert int(model.state_dict()["0.num_batches_tracked"]) == 0
    model(uneven_batch(6, 0))
    model.eval()
    assert int(model[0].num_batches_tracked) == 1
    model.train()(uneven_batch(6, 0))
    model.float()
    assert int(model[0].num_batches_tracked) == 2


def test_prepared_twice_updates_once():
    model = nn.Sequential(KINDS["norm"](4))
    prepare_ddp(model)(uneven_batch(6, 0))
    prepare_ddp(model)(uneven_batch(6, 0))
    assert int(model.state_dict()["0.num_batches_tracked"]) == 2


def test_statistics_that_are_not_tracked_stay():
    layer = SyncBatchNorm(3)
    layer.track_running_stats = False
    layer(torch.randn(5, 3))
    assert torch.equal(layer.running_mean, torch.zeros(3))


def _trained(sync: str) -> bytes:
    torch.manual_seed(dist.get_rank())
    model = prepare_ddp(nn.Sequential(SyncBatchNorm(3, sync=sync)))
    model(torch.randn(5, 3)).square().mean().backward()
    stream = io.BytesIO()
    torch.save(model, stream)
    return stream.getvalue()


@pytest.mark.parametrize("sync", ["running", "lagged"])
def test_a_pickled_model_settles_where_there_is_no_group(pool, sync):
    first, second = (
        torch.load(io.BytesIO(data), weights_only=False).eval()  # our own ranks made them
        for data in pool(2).run(_trained, sync)
    )
    assert int(first[0].num_batches_tracked) == 1
    assert torch.equal(first[0].running_mean, second[0].running_mean)


@pytest.mark.parametrize("sync", ["running", "lagged"])
def test_a_model_that_is_made_of_inference_tensors(sync):
    with torch.inference_mode():
        layer = SyncBatchNorm(3, sync=sync)
        model, x = prepare_ddp(nn.Sequential(layer)), torch.randn(8, 3) + 5
        model(x)
        torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(0))
