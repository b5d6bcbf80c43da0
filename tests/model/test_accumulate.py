"""accumulate: several forwards, one exact update of the running statistics."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm import (
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    accumulate,
    convert,
    frozen_statistics,
    prepare_ddp,
    reference,
    scale_loss,
)
from syncnorm.comm import exchange
from syncnorm.errors import InputError
from syncnorm.testing import assert_close
from tests.as_device import as_device
from tests.model.parts import HomeMade, state_of, uneven_batch


def _accumulated(sync: str, rounds: int) -> tuple[dict, list[str]]:
    """Micro-batches of one global batch, cut by rank and round."""
    rank, world = dist.get_rank(), dist.get_world_size()
    layer = SyncBatchRenorm(
        4, schedule=RenormSchedule.constant(2.0, 1.0), sync=sync, dtype=torch.float64
    )
    model = prepare_ddp(nn.Sequential(layer))
    pieces = uneven_batch(12, 3).tensor_split(rounds * world)
    with exchange.record() as record:
        with accumulate(model):
            before = layer.running_mean.clone()
            for i in range(rounds):
                model(pieces[i * world + rank]).square().mean().backward()
                assert torch.equal(layer.running_mean, before)
        kinds = [e.kind for e in record]
    return state_of(model), kinds


@pytest.mark.parametrize("sync", ["batch", "running", "lagged"])
@pytest.mark.parametrize("rounds", [1, 3, 5])
def test_accumulate_gives_one_exact_update(pool, rounds, sync):
    running = reference.RunningStatistics.initial(4)
    reference.batch_renorm(uneven_batch(12, 3), running=running, r_max=2.0, d_max=1.0)
    for state, kinds in pool(2).run(_accumulated, sync, rounds):
        assert_close(state["0.running_mean"], running.mean, torch.float64, "running_mean")
        assert_close(state["0.running_var"], running.var, torch.float64, "running_var")
        assert int(state["0.num_batches_tracked"]) == 1
        assert kinds.count("all moments") == (0 if sync == "batch" else 1)


def test_accumulate_alone_and_when_it_fails():
    layer = SyncBatchNorm(4, dtype=torch.float64)
    with accumulate(layer):
        for piece in uneven_batch(8, 0).split([5, 3]):
            layer(piece)
    running = reference.RunningStatistics.initial(4)
    reference.batch_norm(uneven_batch(8, 0), running=running)
    assert_close(layer.running_var, running.var, torch.float64, "running_var")
    state = state_of(layer)
    with pytest.raises(RuntimeError, match="7 channels"), accumulate(layer):
        _one_good_one_bad(layer)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
    with accumulate(layer), pytest.raises(InputError, match="must not be accumulating already"):
        accumulate(layer).__enter__()


def _one_good_one_bad(layer: nn.Module) -> None:
    layer(uneven_batch(5, 1))
    raise RuntimeError("7 channels")


def test_a_copy_made_while_accumulating_is_free():
    for sync in ("batch", "running"):
        model = prepare_ddp(nn.Sequential(SyncBatchNorm(4, sync=sync, dtype=torch.float64)))
        with accumulate(model):
            model(uneven_batch(6, 0))
            other = copy.deepcopy(model)
            loaded = pickle.loads(pickle.dumps(model[0]))  # noqa: S301 our own
        for seed in range(2):
            other(uneven_batch(6, seed))
        assert int(other.state_dict()["0.num_batches_tracked"]) == 2
        if sync == "batch":
            loaded(uneven_batch(6, 0))
            assert int(loaded.num_batches_tracked) == 1


@pytest.mark.parametrize("block", [accumulate, frozen_statistics], ids=lambda b: b.__name__)
def test_layers_that_are_not_ours_are_not_left_out_in_silence(block):
    x, name = torch.randn(6, 3), block.__name__
    theirs = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(HomeMade(3)))
    message = f"`model` must have layers of ours for {name}, got only '0' (BatchNorm1d), '1.0' (HomeMade). convert("
    with pytest.raises(InputError, match=re.escape(message)), block(theirs):
        theirs(x)
    assert int(theirs[0].num_batches_tracked) == 0
    message = f"`model` must have layers of ours for {name}, got only a LazySyncNorm itself."
    with pytest.raises(InputError, match=re.escape(message)), block(convert(nn.LazyBatchNorm1d())):
        pass
    mixed = nn.Sequential(nn.BatchNorm1d(3), SyncBatchNorm(3))
    message = f"{name} leaves out layers of `model` that are no batch norms of ours: '0' (BatchNorm1d). Their running"
    with pytest.warns(UserWarning, match=re.escape(message)) as caught, block(mixed):
        mixed(x)
    assert caught[0].filename == __file__
    assert int(mixed[1].num_batches_tracked) == (block is accumulate)


@pytest.mark.parametrize("block", [accumulate, frozen_statistics], ids=lambda b: b.__name__)
def test_layers_that_training_forwards_do_not_update_need_not_be_ours(block):
    without = nn.BatchNorm1d(3, track_running_stats=False)
    for other in (
        nn.BatchNorm1d(3).eval(),
        without,
        nn.InstanceNorm1d(3),
        nn.InstanceNorm1d(3, track_running_stats=True).eval(),
        nn.GroupNorm(1, 3),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with block(nn.Sequential(other)), block(nn.Sequential(other, SyncBatchNorm(3))):
                pass


_PARTS = [[1, 3], [5, 1]]
"""Sizes of the micro-batches of each worker."""


def _small_model(norm: type[nn.Module]) -> nn.Sequential:
    linear = nn.Linear(12, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(-1, 1, 24).view(2, 12))
    return nn.Sequential(linear, norm(2, dtype=torch.float64))


def _distance(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (y - x[:, :2]).square().sum(1)


def _weighed() -> tuple[torch.Tensor | None, torch.Tensor]:
    """As docs/ddp.md has it."""
    rank = dist.get_rank()
    before = sum(map(sum, _PARTS[:rank]))
    x = uneven_batch(10, 3).flatten(1)[:, :12][before : before + sum(_PARTS[rank])]
    model = _small_model(SyncBatchNorm)
    ddp_model = DistributedDataParallel(prepare_ddp(model))
    micro_batches = x.split(_PARTS[rank])
    with accumulate(model):
        for number, each in enumerate(micro_batches, 1):
            with contextlib.nullcontext() if number == len(micro_batches) else ddp_model.no_sync():
                loss = _distance(ddp_model(each), each).mean() * len(each) / len(x)
                scale_loss(loss, len(x)).backward()
    return model[0].weight.grad, model[1].running_var


def test_uneven_micro_batches_of_uneven_shards_weigh_as_the_whole_batch(pool):
    """In the gradient each is normalised by itself, pooled; the running variance is of all."""
    x = uneven_batch(10, 3).flatten(1)[:, :12]
    model = _small_model(nn.BatchNorm1d)
    first, second = (
        shard.split(sizes) for shard, sizes in zip(x.split([4, 6]), _PARTS, strict=True)
    )
    for parts in zip(first, second, strict=True):
        each = torch.cat(parts)
        (_distance(model(each), each).sum() / len(x)).backward()
    running_var = 0.9 + 0.1 * model[0](x).var(0)
    for gradient, var in pool(2).run(_weighed):
        assert_close(gradient, model[0].weight.grad, torch.float64, "gradient")
        assert_close(var, running_var, torch.float64, "running variance")


def _accumulated_without_samples(is_renorm: bool, kernels: str | None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    layer = (SyncBatchRenorm if is_renorm else SyncBatchNorm)(64, dtype=torch.float64)
    model = prepare_ddp(nn.Sequential(layer))
    x = torch.randn(3, 64, 3) + torch.rand(64, 1)
    own = x.split([2, 1, 0])[dist.get_rank()]
    with as_device(kernels) if kernels else contextlib.nullcontext(), accumulate(model):
        for scale in (1.0, 1.3):
            model((own * scale).requires_grad_()).sum().backward()
    return [layer.running_mean, layer.running_var]


@pytest.mark.parametrize("kernels", [None, "triton", "composed"], ids=str)
@pytest.mark.parametrize("is_renorm", [False, True], ids=["norm", "renorm"])
def test_a_worker_without_samples_has_the_bits_of_the_others(pool, is_renorm, kernels):
    """Its empty batch goes through no kernel, or through another one."""
    if kernels == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    first, *others = pool(3).run(_accumulated_without_samples, is_renorm, kernels)
    for other in others:
        for got, expected in zip(other, first, strict=True):
            assert torch.equal(got, expected)
