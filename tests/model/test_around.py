"""What other parts of torch do with our layers under DistributedDataParallel and FSDP2."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional_collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from syncnorm import (
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    gather,
    prepare_ddp,
    reference,
    scale_loss,
    shards,
)
from syncnorm.comm import exchange
from syncnorm.errors import InputError, UnevenShardsWarning
from syncnorm.family import OnlineNorm, PowerNorm
from syncnorm.testing import assert_close
from tests.as_device import call_as_device
from tests.model.parts import uneven_batch

SIZES = (5, 3)


def _network(norm: type[nn.Module] = SyncBatchNorm) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(4, 6, 1), norm(6), nn.ReLU(), nn.Conv1d(6, 2, 5), nn.Flatten()
    ).double()


def _shard(step: int, size: int, rank: int) -> Tensor:
    return uneven_batch(size, 10 * step + rank)


def _whole(step: int) -> Tensor:
    return torch.cat([_shard(step, size, rank) for rank, size in enumerate(SIZES)])


def _loss(y: Tensor) -> Tensor:
    return (y - torch.tensor([1.0, -1.0], dtype=y.dtype)).square().mean()


def _trained_alone(
    optimizer: type[torch.optim.Optimizer], steps: int, **options
) -> dict[str, Tensor]:
    """torch's own layer on the whole batches."""
    model = _network(nn.BatchNorm1d)
    optim = optimizer(model.parameters(), **options)
    for step in range(steps):
        optim.zero_grad()
        _loss(model(_whole(step))).backward()
        optim.step()
    return model.state_dict()


def _train(model: nn.Module, optim: torch.optim.Optimizer, steps: int) -> None:
    rank = dist.get_rank()
    for step in range(steps):
        optim.zero_grad()
        x = _shard(step, SIZES[rank], rank)
        scale_loss(_loss(model(x)), len(x)).backward()
        optim.step()


def _equal(state: dict[str, Tensor], expected: dict[str, Tensor], factor: float = 100) -> None:
    for name, value in expected.items():
        assert_close(state[name], value, torch.float64, name, factor)


OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "eps": 1e-2}),
}


def _foreach(name: str) -> dict[str, Tensor]:
    model = prepare_ddp(_network())
    optimizer, options = OPTIMIZERS[name]
    _train(
        DistributedDataParallel(model), optimizer(model.parameters(), foreach=True, **options), 5
    )
    return model.state_dict()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_foreach_optimizers(pool, name):
    optimizer, options = OPTIMIZERS[name]
    expected = _trained_alone(optimizer, 5, foreach=False, **options)
    for state in pool(2).run(_foreach, name):
        _equal(state, expected)


def _functional() -> tuple[Tensor, list[Tensor], dict[str, Tensor], bool, list[str]]:
    """A call with other parameters and buffers, whose update goes into what was given."""
    rank = dist.get_rank()
    model = prepare_ddp(_network())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    given = {k: (v * 1.5).requires_grad_() for k, v in model.named_parameters()}
    given |= {k: v.clone() for k, v in model.named_buffers()}
    with exchange.record() as record:
        y = functional_call(model, given, (_shard(0, SIZES[rank], rank),))
        parameters = [v for v in given.values() if v.requires_grad]
        grads = torch.autograd.grad(
            y, parameters, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        )
    is_same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return (
        y.detach(),
        list(grads),
        {k: v.detach() for k, v in given.items()},
        is_same,
        [e.kind for e in record],
    )


def test_functional_call(pool):
    whole = _network(nn.BatchNorm1d)
    given = {k: (v * 1.5).detach().requires_grad_() for k, v in whole.named_parameters()}
    given |= {k: v.clone() for k, v in whole.named_buffers()}
    y = functional_call(whole, given, (_whole(0),))
    answers = pool(2).run(_functional)
    cotangent = torch.cat(
        [torch.linspace(-1, 1, a[0].numel(), dtype=y.dtype).view_as(a[0]) for a in answers]
    )
    expected = torch.autograd.grad(y, [v for v in given.values() if v.requires_grad], cotangent)
    assert_close(torch.cat([a[0] for a in answers]), y, torch.float64, "y")
    for got, value in zip(zip(*(a[1] for a in answers)), expected, strict=True):
        assert_close(sum(got), value, torch.float64, "gradient", 10)
    for _, _, state, is_same, kinds in answers:
        assert_close(state["1.running_var"], given["1.running_var"], torch.float64, "running_var")
        assert is_same, "the model's own buffers stay"
        assert kinds == ["moments", "gradients"]


def _averaged(use_buffers: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    model = prepare_ddp(_network())
    wrapped = DistributedDataParallel(model)
    averaged = AveragedModel(model, use_buffers=use_buffers)
    optim = torch.optim.SGD(model.parameters(), lr=0.05)
    states = []
    for _ in range(3):
        _train(wrapped, optim, 1)
        averaged.update_parameters(model)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    mean = {k: torch.stack([s[k].double() for s in states]).mean(0) for k in states[0]}
    averaged.train()
    rank = dist.get_rank()
    return averaged.module.state_dict(), mean, averaged(_shard(0, SIZES[rank], rank)).detach()


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_model(pool, use_buffers):
    answers = pool(2).run(_averaged, use_buffers)
    state, mean, _ = answers[0]
    for name in ("0.weight", "1.weight", "1.bias"):
        assert_close(state[name], mean[name], torch.float64, name)
    whole = _network(nn.BatchNorm1d)
    whole.load_state_dict(mean)
    y = whole.train()(_whole(0))
    assert_close(torch.cat([a[2] for a in answers]), y, torch.float64, "the average pools, too")


def _copied(sync: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """A copy of a wrapped, trained model goes its own way; with it goes what is under way."""
    model = prepare_ddp(
        nn.Sequential(SyncBatchNorm(4, sync=sync), nn.Conv1d(4, 2, 5), nn.Flatten()).double()
    )
    wrapped = DistributedDataParallel(model)
    _train(wrapped, torch.optim.SGD(model.parameters(), lr=0.05), 2)
    other = copy.deepcopy(wrapped.module)
    state = {k: v.clone() for k, v in other.state_dict().items()}
    rank = dist.get_rank()
    for m in (model, other):
        m(_shard(7, SIZES[rank], rank))
    return state, model.state_dict(), other.state_dict()


@pytest.mark.parametrize("sync", ["batch", "running", "lagged", "none"])
def test_deepcopy(pool, sync):
    for at_copy, of_model, of_copy in pool(2).run(_copied, sync):
        assert int(at_copy["0.num_batches_tracked"]) == 2
        assert all(torch.equal(v, of_copy[k]) for k, v in of_model.items())
        assert not torch.equal(at_copy["0.running_mean"], of_copy["0.running_mean"])


def _full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def _fully_sharded(
    policy: MixedPrecisionPolicy | None, each: bool, steps: int
) -> dict[str, Tensor]:
    model = _network() if policy is None else _network().float()
    prepare_ddp(model)
    mesh = init_device_mesh("cpu", (2,))
    options = {"mesh": mesh} if policy is None else {"mesh": mesh, "mp_policy": policy}
    if each:
        for part in model:
            if list(part.parameters()):
                fully_shard(part, **options)
    fully_shard(model, **options)
    assert isinstance(model[1].weight, DTensor)
    with exchange.record() as record:
        _train(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), steps)
    assert [e.numel for e in record if e.kind == "moments"] == [14] * steps
    return {k: _full(v).clone() for k, v in model.state_dict().items()}


def _by_dtensor(placement: Placement, norm: Callable[[int], nn.Module]) -> str:
    mesh = init_device_mesh("cpu", (2,))
    layer = distribute_module(prepare_ddp(norm(4)), mesh)
    x = distribute_tensor(torch.randn(8, 4), mesh, [placement])
    if norm is SyncBatchNorm:
        layer.eval()(x)
    with pytest.raises(InputError) as caught:
        layer.train()(x)
    return str(caught.value)


@pytest.mark.parametrize("norm", [SyncBatchNorm, OnlineNorm, PowerNorm])
@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
def test_a_dtensor_is_one_error_on_all_workers(pool, placement, norm):
    for said in pool(2).run(_by_dtensor, placement, norm):
        assert "`x` must be this worker's shard in training, got a DTensor of shape (8, 4)" in said


@pytest.mark.parametrize("each", [False, True])
def test_fsdp2_equals_unsharded(pool, each):
    expected = _trained_alone(torch.optim.SGD, 5, lr=0.05, momentum=0.9)
    for state in pool(2).run(_fully_sharded, None, each, 5):
        _equal(state, expected)


def test_fsdp2_in_mixed_precision_has_statistics_of_full_width(pool):
    """Of the bfloat16 activations that the layer is given, the statistics are exact: not rounded
    once more.
    """
    answers = pool(2).run(_low_precision)
    x = torch.cat([a[0] for a in answers]).double()
    running = reference.RunningStatistics.initial(6)
    y = reference.batch_norm(x, running=running)
    for i, (_, _, state) in enumerate(answers):
        assert state["1.running_mean"].dtype == torch.float32
        assert_close(
            state["1.running_mean"], running.mean, torch.float32, f"running_mean of rank {i}"
        )
        assert_close(state["1.running_var"], running.var, torch.float32, f"running_var of rank {i}")
    assert all(a[1].dtype == torch.bfloat16 for a in answers)
    assert_close(torch.cat([a[1] for a in answers]), y, torch.bfloat16, "y")


def _low_precision() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model = _network().float()
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    prepare_ddp(model)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda _, args, y: seen.extend((args[0].detach(), y.detach())))
    rank = dist.get_rank()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(_shard(0, SIZES[rank], rank).float()).float().square().mean().backward()
    assert model[1].weight.grad is not None
    assert _full(model[1].weight.grad).isfinite().all()
    return seen[0], seen[1], {k: _full(v).clone() for k, v in model.state_dict().items()}


class _Copied(torch.autograd.Function):
    """What all workers of a tensor-parallel group read: the gradients of all of them are added up."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        total = functional_collectives.all_reduce(g, "sum", dist.group.WORLD)
        assert type(total) is functional_collectives.AsyncCollectiveTensor
        return total


def _unwaited(renormalised: bool, which: str) -> list[Tensor]:
    """y and the gradients of a layer whose input or gradient is a sum that nobody has waited for."""
    torch.manual_seed(0)
    layer = SyncBatchNorm(4).double()
    if renormalised:
        layer = SyncBatchRenorm(4, schedule=RenormSchedule.constant(1.5, 0.5)).double()
    x, g = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    if which == "input":
        x = functional_collectives.all_reduce(x / 2, "sum", dist.group.WORLD)
        assert type(x) is functional_collectives.AsyncCollectiveTensor
    x.requires_grad_()
    y = layer(x)
    is_copied = which == "gradient"
    grads = torch.autograd.grad(
        _Copied.apply(y) if is_copied else y,
        [x, layer.weight, layer.bias],
        g / 2 if is_copied else g,
    )
    return [functional_collectives.wait_tensor(t.detach()).clone() for t in (y, *grads)]


@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize("which", ["input", "gradient"])
@pytest.mark.parametrize("course", [None, "composed", "triton"])
def test_a_sum_that_nobody_has_waited_for(pool, course, which, renormalised):
    """Functional collectives give tensors that have no memory of their own: kernels cannot read them."""
    if course == "triton":
        pytest.importorskip("triton")
    call = [_unwaited] if course is None else [call_as_device, course, _unwaited]
    expected = pool(2).run(_unwaited, renormalised, "")
    for got, values in zip(pool(2).run(*call, renormalised, which), expected, strict=True):
        for name, one, other in zip(("y", "x", "weight", "bias"), got, values, strict=True):
            assert_close(one, other, torch.float64, name, 10)


def _unwaited_rows() -> Tensor:
    """The gradient of `gather`, which is sent on, of a sum that nobody has waited for."""
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    g = torch.arange(12.0, dtype=torch.float64).view(4, 3)
    (dx,) = torch.autograd.grad(_Copied.apply(gather(x)), x, g / 2)
    return functional_collectives.wait_tensor(dx)


@pytest.mark.parametrize("course", [None, "composed", "triton"])
def test_a_message_that_nobody_has_waited_for(pool, course):
    if course == "triton":
        pytest.importorskip("triton")
    call = [_unwaited_rows] if course is None else [call_as_device, course, _unwaited_rows]
    for rank, rows in enumerate(pool(2).run(*call)):
        # Of the copies of both workers.
        assert torch.equal(
            rows, 2 * torch.arange(12.0, dtype=torch.float64).view(4, 3)[2 * rank :][:2]
        )


def _warned_of_unwaited() -> int:
    shards.Shard.has_warned = False
    model = prepare_ddp(nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4)))
    y = model(torch.randn(2 + 2 * dist.get_rank(), 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y.backward(functional_collectives.AsyncCollectiveTensor(torch.ones_like(y)))
    return sum(w.category is UnevenShardsWarning for w in caught)


def test_a_gradient_that_nobody_has_waited_for_is_a_losss(pool):
    assert pool(2).run(_warned_of_unwaited) == [1, 1]
