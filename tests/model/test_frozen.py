"""frozen_statistics: training forwards with batch statistics as always, that update nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncnorm import (
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    accumulate,
    convert,
    frozen_statistics,
    monitor,
    prepare_ddp,
    recalibrate,
    reference,
)
from syncnorm.comm import exchange
from syncnorm.errors import InputError
from syncnorm.family import EstimatedBatchNorm
from syncnorm.testing import assert_close
from tests.model.parts import state_of, uneven_batch

MODES = ["batch", "running", "lagged", "none"]


def _make(sync: str, renorm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    options = {"sync": sync, "dtype": torch.float64}
    if renorm:
        layer: nn.Module = SyncBatchRenorm(4, schedule=RenormSchedule.constant(2.0, 1.0), **options)
    else:
        layer = SyncBatchNorm(4, **options)
    return nn.Sequential(layer, nn.Conv1d(4, 3, 1).double(), SyncBatchNorm(3, **options))


def _step(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


def _with_and_without(
    sync: str, renorm: bool, wrapped: bool
) -> tuple[list[Tensor], list[Tensor], bool, bool, list[str]]:
    """A step of sharpness-aware minimisation: the second forward of a batch, frozen, against that
    of a copy.
    """
    rank = dist.get_rank()
    bare = prepare_ddp(_make(sync, renorm))
    model = DistributedDataParallel(bare) if wrapped else bare
    watch = monitor(model)
    for step in range(2):
        _step(model, uneven_batch(4 + rank, 10 * rank + step))
    before, figures = state_of(bare), watch.read()["layers"]
    twin = prepare_ddp(_make(sync, renorm))
    wrapped_twin = DistributedDataParallel(twin) if wrapped else twin
    twin.load_state_dict(before)  # after DDP, which gives all workers rank 0's
    x = uneven_batch(5, 50 + rank) * 1.1
    with exchange.record() as record, frozen_statistics(model):
        frozen = _step(model, x)
    is_still = all(torch.equal(v, before[k]) for k, v in bare.state_dict().items())
    is_unseen = watch.read()["layers"] == figures
    expected = _step(wrapped_twin, x)
    # And the training goes on as if nothing had been.
    after = _step(model, x)
    assert all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))
    assert all(torch.equal(v, state_of(twin)[k]) for k, v in state_of(bare).items())
    assert not torch.equal(bare[0].running_mean, before["0.running_mean"]), (
        "the unfrozen step does update"
    )
    return frozen, expected, is_still, is_unseen, [e.kind for e in record]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("sync", MODES)
def test_same_outputs_and_gradients_and_nothing_changes(pool, sync, renorm, wrapped):
    for frozen, expected, is_still, is_unseen, kinds in pool(2).run(
        _with_and_without, sync, renorm, wrapped
    ):
        assert all(torch.equal(a, b) for a, b in zip(frozen, expected, strict=True))
        assert is_still
        assert is_unseen
        assert kinds == {"batch": ["moments"] * 2 + ["gradients"] * 2}.get(sync, kinds)
        if sync in ("running", "none"):
            assert kinds == []
        assert not any(kind.startswith("all") for kind in kinds)


def test_the_first_step_of_a_lagged_layer_waits_when_frozen_too(pool):
    for kinds in pool(2).run(_first_step):
        assert kinds == ["moments", "moments", "gradients", "gradients"]


def _first_step() -> list[str]:
    model = prepare_ddp(_make("lagged"))
    with exchange.record() as record, frozen_statistics(model):
        _step(model, uneven_batch(5, dist.get_rank()))
    return [e.kind for e in record]


def _counters(model: nn.Module) -> list[int]:
    state = model.state_dict()
    return [int(state[name]) for name in state if name.endswith("num_batches_tracked")]


def _nested(model: nn.Module, x: Tensor) -> None:
    with frozen_statistics(model[0]):
        model(x)
    model(x)
    torch.ones(2) + torch.ones(3)


@pytest.mark.parametrize("sync", MODES)
def test_nested_blocks_and_exceptions(sync):
    model = prepare_ddp(_make(sync))
    x = uneven_batch(6, 0)
    with pytest.raises(RuntimeError, match="size of tensor"), frozen_statistics(model):
        _nested(model, x)
    assert _counters(model) == [0, 0]
    with frozen_statistics(model[0]):
        model(x)
    assert _counters(model) == [0, 1], "only the part that was meant"
    model(x)
    assert _counters(model) == [1, 2]


@pytest.mark.parametrize("sync", MODES)
def test_with_accumulate(sync):
    """Frozen forwards are no part of an accumulated update, and an accumulated update no way around
    the block.
    """
    model = prepare_ddp(_make(sync))
    running = reference.RunningStatistics.initial(4)
    reference.batch_norm(uneven_batch(6, 1), running=running)
    with accumulate(model):
        model(uneven_batch(6, 1)[:4])
        with frozen_statistics(model):
            model(uneven_batch(7, 2))
        model(uneven_batch(6, 1)[4:])
    assert_close(model.state_dict()["0.running_mean"], running.mean, torch.float64, "running_mean")
    assert _counters(model) == [1, 1]
    before = state_of(model)
    with frozen_statistics(model), accumulate(model):
        model(uneven_batch(7, 2))
    assert all(torch.equal(v, before[k]) for k, v in state_of(model).items())


@pytest.mark.parametrize("sync", MODES)
def test_tied_layers_copies_and_recalibration(sync):
    layer = SyncBatchNorm(4, sync=sync, dtype=torch.float64)
    model = prepare_ddp(nn.Sequential(layer, nn.Identity(), layer))
    with frozen_statistics(model):
        model(uneven_batch(6, 0))
        free = copy.deepcopy(model)
        assert _counters(model) == [0, 0]
        recalibrate(model, [uneven_batch(6, 0)])
        assert not torch.equal(layer.running_mean, torch.zeros(4, dtype=torch.float64))
    free(uneven_batch(6, 0))
    assert _counters(free)[0] > 0, "a copy made in the block is not part of it"
    model(uneven_batch(6, 0))
    assert _counters(model)[0] > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("sync", ["batch", "running", "lagged"])
def test_checkpointed_forwards_that_are_repeated_after_the_block(sync, use_reentrant):
    model = prepare_ddp(_make(sync, renorm=True))
    for step in range(2):
        _step(model, uneven_batch(5, step))
    before = state_of(model)
    x = uneven_batch(6, 9).requires_grad_()
    with frozen_statistics(model):
        y = checkpoint(model, x, use_reentrant=use_reentrant)
        plain = model(x.detach().requires_grad_())
    assert torch.equal(y, plain)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    assert all(torch.equal(v, before[k]) for k, v in state_of(model).items())
    model(x.detach())
    assert _counters(model) == [3, 3]


def test_an_instance_norm_with_running_statistics_is_told():
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    with pytest.warns(UserWarning, match=r"'1' \(InstanceNorm2d\)"):
        with frozen_statistics(nn.Sequential(SyncBatchNorm(4), norm)):
            pass
    with pytest.raises(InputError, match="got only a InstanceNorm2d itself"):
        with frozen_statistics(norm):
            pass


def test_a_lazy_layer_that_was_converted_asks_for_a_forward():
    model = convert(nn.Sequential(nn.LazyBatchNorm2d()))
    with pytest.raises(InputError, match="Lazy ones are converted in their first forward"):
        with frozen_statistics(model):
            pass


@pytest.mark.parametrize("last", [SyncBatchNorm, EstimatedBatchNorm])
def test_a_block_that_is_interrupted_before_it_begins_leaves_nothing_frozen(last, monkeypatch):
    """An update under way is waited for first: for long, if another worker is late."""
    model = nn.Sequential(SyncBatchNorm(4), EstimatedBatchNorm(4), last(4))

    def interrupted() -> None:
        raise KeyboardInterrupt

    waits = model[2].statistics if last is SyncBatchNorm else model[2]
    monkeypatch.setattr(waits, "settle", interrupted)
    with pytest.raises(KeyboardInterrupt), frozen_statistics(model):
        raise AssertionError("the block must not begin")
    assert not any(layer.has_frozen_statistics for layer in model[:2])
    monkeypatch.undo()
    model(torch.randn(5, 4))
    assert [int(layer.num_batches_tracked) for layer in model] == [1, 1, 1]
