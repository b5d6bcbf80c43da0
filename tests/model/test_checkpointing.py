"""Activation checkpointing: a repeated forward updates nothing and sees what the first one saw."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import math
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from syncnorm import (
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    convert,
    frozen_statistics,
    prepare_ddp,
    recalibrate,
    revert,
    scale_loss,
)
from syncnorm.comm import exchange
from tests.model.parts import uneven_batch


def _checkpointed(reentrant: bool | None, make: str) -> list[Tensor]:
    """Gradients and buffers of a pooled layer, with and without activation checkpointing."""
    layer = {
        "norm": lambda: SyncBatchNorm(4, dtype=torch.float64),
        "renorm": lambda: SyncBatchRenorm(
            4, schedule=RenormSchedule.constant(1.5, 0.5), dtype=torch.float64
        ),
    }[make]()
    for step in range(3):
        x = uneven_batch(4, step + 10 * dist.get_rank()).requires_grad_()
        y = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
        cotangent = torch.randn(
            4, 4, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64
        )
        y.backward(cotangent)
    return [x.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()]


@pytest.mark.parametrize("make", ["norm", "renorm"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_updates_once_and_changes_no_bit(pool, reentrant, make):
    """Also the test of the undocumented torch function that says whether a forward is being
    repeated.
    """
    plain = pool(2).run(_checkpointed, None, make)
    for got, expected in zip(pool(2).run(_checkpointed, reentrant, make), plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def _with_another_forward(other: str, reentrant: bool | None) -> Tensor:
    """The gradient where the same batch passes once more, not checkpointed, before the backward
    pass.
    """
    layer = SyncBatchRenorm(4, schedule=RenormSchedule.constant(10.0, 10.0), dtype=torch.float64)
    for step in range(2):
        x = uneven_batch(4, step + 10 * dist.get_rank()).requires_grad_()
        y = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
        with contextlib.ExitStack() as stack:
            if other != "plain":
                stack.enter_context(frozen_statistics(layer))
                stack.enter_context(
                    torch.inference_mode() if "inference" in other else torch.no_grad()
                )
            if "hooks" in other:
                stack.enter_context(torch.autograd.graph.save_on_cpu())
            target = layer(x.detach()).detach()
        (y * target.clone().sin()).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize(
    "other", ["plain", "teacher", "teacher in inference mode", "teacher with hooks"]
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_plain_forward_of_the_same_batch_is_not_taken_for_the_one_to_be_repeated(
    pool, reentrant, other
):
    """Also the test of the undocumented torch functions that tell whether a forward may be
    repeated.
    """
    plain = pool(2).run(_with_another_forward, other, None)
    for got, expected in zip(
        pool(2).run(_with_another_forward, other, reentrant), plain, strict=True
    ):
        assert torch.equal(got, expected)


def _forwards_before_backwards(make: str, is_checkpointed: bool) -> list[Tensor]:
    """Several forwards, then one backward pass: a repeated forward must see what the first one saw."""
    torch.manual_seed(0)
    bounds = RenormSchedule.constant(1.5, 0.5)
    layer = {
        "renorm": lambda: SyncBatchRenorm(4, schedule=bounds, dtype=torch.float64),
        "lagged": lambda: SyncBatchNorm(4, sync="lagged", dtype=torch.float64),
        "lagged renorm": lambda: SyncBatchRenorm(
            4, schedule=bounds, sync="lagged", dtype=torch.float64
        ),
    }[make]()
    model = prepare_ddp(nn.Sequential(layer))
    for step in range(2):
        xs = [
            uneven_batch(4, 10 * step + 3 * dist.get_rank() + i).requires_grad_() for i in range(3)
        ]
        ys = [
            checkpoint(model, x, use_reentrant=False) if is_checkpointed else model(x) for x in xs
        ]
        if dist.get_rank() == 0:
            model.state_dict()
        sum((y * torch.linspace(-1, 2, y.numel()).view_as(y).sin()).mean() for y in ys).backward()
    return [*(x.grad for x in xs), layer.weight.grad, layer.bias.grad, *model.state_dict().values()]


@pytest.mark.parametrize("make", ["renorm", "lagged", "lagged renorm"])
def test_checkpointing_with_several_forwards_before_the_backward_pass(pool, make):
    plain = pool(2).run(_forwards_before_backwards, make, False)
    for got, expected in zip(
        pool(2).run(_forwards_before_backwards, make, True), plain, strict=True
    ):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def _checkpointed_steps(make: str, is_checkpointed: bool, batches: list[list[int]]) -> list[Tensor]:
    """Gradients of several steps; a rank's batches are named by seed, and -1 is an empty one."""
    torch.manual_seed(0)
    bounds = RenormSchedule.constant(1.5, 0.5)
    layer = {
        "renorm": lambda: SyncBatchRenorm(4, schedule=bounds, dtype=torch.float64),
        "lagged": lambda: SyncBatchNorm(4, sync="lagged", dtype=torch.float64),
    }[make]()
    model = prepare_ddp(nn.Sequential(layer))
    gradients = []
    for step, seed in enumerate(batches[dist.get_rank()]):
        x = (uneven_batch(4, seed) if seed >= 0 else torch.empty(0, 4, 5).double()).requires_grad_()
        y = checkpoint(model, x, use_reentrant=False) if is_checkpointed else model(x)
        y.backward(uneven_batch(len(x), 50 + step))
        gradients += [x.grad.clone(), layer.weight.grad.clone()]
    return gradients


@pytest.mark.parametrize("make", ["renorm", "lagged"])
@pytest.mark.parametrize(
    "batches",
    [[[0, 1, 2, 3], [-1, -1, -1, -1]], [[0, 1, 2, 3], [9, 9, 9, 9]], [[5, 6, 5, 6], [7, 7, 7, 7]]],
    ids=str,
)
def test_checkpointing_with_batches_that_come_again(pool, make, batches):
    """Of the calls with the same sums the newest is repeated; an older one would ask for messages
    of its own.
    """
    plain = pool(2).run(_checkpointed_steps, make, False, batches)
    for got, expected in zip(
        pool(2).run(_checkpointed_steps, make, True, batches), plain, strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def _messages(reentrant: bool, make: str) -> list[str]:
    """The kinds of exchanges of a checkpointed step."""
    layer = {"norm": SyncBatchNorm, "renorm": SyncBatchRenorm}[make](4)
    with exchange.record() as exchanges:
        x = torch.randn(3, 4).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=reentrant)
        assert isinstance(y, Tensor)
        y.square().sum().backward()
    return [each.kind for each in exchanges]


@pytest.mark.parametrize("make", ["norm", "renorm"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_repetition_exchanges_nothing(pool, reentrant, make):
    assert pool(2).run(_messages, reentrant, make) == [["moments", "gradients"]] * 2


def _many_pending(calls: int, reentrant: bool | None, make: str) -> list[Tensor]:
    """Gradients where many forwards await one backward pass; rank 1 has no samples in any."""
    torch.manual_seed(0)
    layer = {"norm": SyncBatchNorm, "renorm": SyncBatchRenorm}[make](4, dtype=torch.float64)
    empty = torch.empty(0, 4, 5).double()
    ys = []
    for i in range(calls):
        x = (empty if dist.get_rank() else uneven_batch(3, i)).requires_grad_()
        ys.append(layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant))
    loss = torch.cat(ys).sin().sum()
    loss.backward()
    return [layer.weight.grad, layer.bias.grad, *layer.buffers()]


@pytest.mark.parametrize("make", ["norm", "renorm"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_many_calls_may_await_the_backward_pass(pool, reentrant, make):
    plain = pool(2).run(_many_pending, 70, None, make)
    for got, expected in zip(pool(2).run(_many_pending, 70, reentrant, make), plain, strict=True):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_kept_goes_with_the_checkpoint(reentrant):
    """And a copy or a pickle of a layer has none of it."""
    layer = SyncBatchNorm(4)
    x = torch.randn(3, 4).requires_grad_()
    y = checkpoint(layer, x, use_reentrant=reentrant)
    kept = weakref.ref(layer.seen.batch)
    layer.seen = None
    assert kept() is not None
    del y
    gc.collect()
    assert kept() is None


def _one_by_one(reentrant: bool | None) -> list[Tensor]:
    """Two forwards, equal on rank 1 alone, and their backward passes, the oldest first."""
    torch.manual_seed(0)
    layer = SyncBatchNorm(2, dtype=torch.float64)
    xs = [torch.randn(4, 2).double(), 5 * torch.randn(4, 2).double()]
    if dist.get_rank() == 1:
        xs[1] = xs[0].clone()
    for x in xs:
        x.requires_grad_()
    ys = [
        layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant) for x in xs
    ]
    for y in ys:
        (y.tanh() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [x.grad for x in xs if x.grad is not None]


@pytest.mark.parametrize("reentrant", [False, True])
def test_calls_that_one_worker_cannot_tell_apart_are_repeated_as_themselves(pool, reentrant):
    plain = pool(2).run(_one_by_one, None)
    for got, expected in zip(pool(2).run(_one_by_one, reentrant), plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def _nested(depths: list[bool], with_teacher: bool) -> list[Tensor]:
    """Gradients through checkpoints within each other, twice over one graph, of equal inputs."""
    torch.manual_seed(0)
    bounds = RenormSchedule.constant(1.5, 0.5)
    layer = SyncBatchRenorm(4, schedule=bounds, dtype=torch.float64)

    def forward(x: Tensor) -> Tensor:
        if with_teacher:
            with torch.no_grad(), frozen_statistics(layer):
                layer(-2 * x)
        return layer(layer(x).sin())

    function = forward
    for reentrant in depths:
        function = functools.partial(checkpoint, function, use_reentrant=reentrant)
    xs = [uneven_batch(4, dist.get_rank()).requires_grad_() for _ in range(2)]
    ys = [function(x) for x in xs]
    grads = []
    for _ in range(2):
        for y in ys:
            y.backward(uneven_batch(4, 7), retain_graph=True)
        grads += [x.grad.clone() for x in xs if x.grad is not None]
    return [*grads, layer.weight.grad, *layer.buffers()]


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize(
    "depths", [[False], [True], [False, False], [True, True], [True, False], [False, True]], ids=str
)
def test_checkpoints_within_each_other_and_passes_over_one_graph(pool, depths, with_teacher):
    plain = pool(2).run(_nested, [], with_teacher)
    for got, expected in zip(pool(2).run(_nested, depths, with_teacher), plain, strict=True):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def _new_forward_within_a_backward_pass() -> float:
    """The mean of a batch that is normalised for the first time in a hook of a backward pass."""
    layer, means = SyncBatchNorm(4, dtype=torch.float64), []
    x = uneven_batch(4, dist.get_rank()).requires_grad_()
    y = checkpoint(layer, x, use_reentrant=True)
    x.register_hook(lambda grad: means.append(layer(9 + uneven_batch(4, 3)).mean().item()))
    y.sin().sum().backward()
    return means[0]


def test_a_new_forward_within_a_backward_pass_is_no_repetition(pool):
    assert all(abs(mean) < 1e-6 for mean in pool(2).run(_new_forward_within_a_backward_pass))


def _after_unequal_recalibration() -> list[Tensor]:
    """A checkpointed step after workers have recalibrated with unequally many batches."""
    layer = SyncBatchNorm(4, dtype=torch.float64)
    model = nn.Sequential(Checkpointed(layer))
    recalibrate(model, [uneven_batch(3, i) for i in range(1 if dist.get_rank() else 70)])
    x = uneven_batch(4, dist.get_rank()).requires_grad_()
    model(x).sin().sum().backward()
    return [x.grad] if x.grad is not None else []


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.inner, x, use_reentrant=True)
        assert isinstance(y, Tensor)
        return y


def test_workers_that_have_made_unequally_many_forwards_train_on(pool):
    assert all(grads for grads in pool(2).run(_after_unequal_recalibration))


def _only_on(ranks: list[int], reentrant: bool) -> list[Tensor]:
    """Gradients where some workers checkpoint, and the others do not."""
    layer = SyncBatchRenorm(4, schedule=RenormSchedule.constant(1.5, 0.5), dtype=torch.float64)
    for step in range(2):
        x = uneven_batch(4, step + 10 * dist.get_rank()).requires_grad_()
        is_repeated = dist.get_rank() in ranks
        y = checkpoint(layer, x, use_reentrant=reentrant) if is_repeated else layer(x)
        assert isinstance(y, Tensor)
        y.sin().sum().backward()
    assert x.grad is not None
    return [x.grad, layer.weight.grad, *layer.buffers()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_workers_may_differ_in_what_they_checkpoint(pool, reentrant):
    plain = pool(2).run(_only_on, [], reentrant)
    for got, expected in zip(pool(2).run(_only_on, [1], reentrant), plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def _lagged_on(ranks: list[int], reentrant: bool) -> list[Tensor]:
    """State and gradients of lagged steps where some workers checkpoint, and exchange besides."""
    torch.manual_seed(0)
    layers = [SyncBatchNorm(4, sync="lagged", dtype=torch.float64) for _ in range(2)]
    model = prepare_ddp(nn.Sequential(*layers))
    if dist.get_rank() in ranks:
        for layer in layers:
            forward = layer.forward
            layer.forward = functools.partial(checkpoint, forward, use_reentrant=reentrant)
    for step in range(4):
        x = uneven_batch(4, step + 10 * dist.get_rank()).requires_grad_()
        model(x).sin().sum().backward()
        scale_loss(torch.ones(()), 1)
    assert x.grad is not None
    return [x.grad, layers[0].weight.grad, *model.state_dict().values()]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("ranks", [[0, 1], [1]], ids=str)
def test_lagged_gradients_leave_in_the_step_whoever_checkpoints(pool, reentrant, ranks):
    plain = pool(2).run(_lagged_on, [], reentrant)
    for got, expected in zip(pool(2).run(_lagged_on, ranks, reentrant), plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def _without_a_graph(is_checkpointed: bool) -> Tensor:
    """The gradient of what follows a layer whose own output needs none."""
    torch.manual_seed(0)
    layer = SyncBatchRenorm(4, affine=False, schedule=RenormSchedule.constant(1.5, 0.5))
    model = nn.Sequential(layer.double(), nn.Linear(5, 2).double())
    for step in range(2):
        x = uneven_batch(4, step)
        y = checkpoint(model, x, use_reentrant=False) if is_checkpointed else model(x)
        model.zero_grad()
        y.sin().sum().backward()
    return model[1].weight.grad


def test_checkpointing_a_layer_whose_output_needs_no_gradient():
    assert torch.equal(_without_a_graph(True), _without_a_graph(False))


def _one_that_is_no_number(steps: int) -> list[float]:
    """The sums of the outputs, where one worker's last batch holds an infinity."""
    layer = SyncBatchRenorm(4, dtype=torch.float64)
    sums = []
    for step in range(steps + 1):
        x = uneven_batch(3, step + 100 * dist.get_rank())
        if step == steps and dist.get_rank() == 1:
            x[0, 0, 0] = torch.inf
        y = checkpoint(layer, x.requires_grad_(), use_reentrant=False)
        assert isinstance(y, Tensor)
        y.square().sum().backward()
        sums.append(float(y[:, 0].detach().sum()))
    return sums


def test_checkpointing_what_is_no_number_is_an_error_on_no_worker(pool):
    """It repeats what the memory holds, however full that is."""
    for sums in pool(2).run(_one_that_is_no_number, 70):
        assert [math.isnan(value) for value in sums] == [*[False] * 70, True]


def _lagged_with_an_empty_worker(is_checkpointed: bool) -> list[Tensor]:
    layer = SyncBatchNorm(4, sync="lagged", dtype=torch.float64)
    model = prepare_ddp(nn.Sequential(layer))
    xs = [
        (uneven_batch(4, i) if dist.get_rank() else torch.empty(0, 4, 5).double()).requires_grad_()
        for i in range(2)
    ]
    ys = [checkpoint(model, x, use_reentrant=False) if is_checkpointed else model(x) for x in xs]
    for y in reversed(ys):
        y.square().sum().backward()
    return [*(x.grad for x in xs if x.grad is not None), *model.state_dict().values()]


def test_checkpointing_lagged_forwards_of_an_empty_worker_one_backward_pass_after_the_other(pool):
    """Those of the empty worker have the same sums, and make different exchanges."""
    plain = pool(2).run(_lagged_with_an_empty_worker, False)
    for got, expected in zip(pool(2).run(_lagged_with_an_empty_worker, True), plain, strict=True):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def _patch_like_fairscale(layer: nn.Module) -> None:
    """What fairscale's checkpoint_wrapper does to each batch norm: no update without gradients."""

    def switch_off(layer: nn.Module, args: object) -> None:
        if not torch.is_grad_enabled():
            layer._track_running_stats_backup = layer.track_running_stats
            layer.track_running_stats = False

    def put_back(layer: nn.Module, args: object, output: object) -> None:
        if not torch.is_grad_enabled():
            layer.track_running_stats = layer._track_running_stats_backup

    layer.register_forward_pre_hook(switch_off)
    layer.register_forward_hook(put_back)


@pytest.mark.parametrize(
    "order", ["converted, then wrapped", "wrapped, then converted", "and back"]
)
@pytest.mark.parametrize("to", [SyncBatchNorm, SyncBatchRenorm], ids=lambda c: c.__name__)
def test_a_wrapper_that_leaves_the_update_to_the_repetition(to, order):
    layer, plain = nn.BatchNorm1d(4), convert(nn.BatchNorm1d(4), to)
    if order.startswith("wrapped"):
        _patch_like_fairscale(layer)
        convert(layer, to)
    else:
        convert(layer, to)
        _patch_like_fairscale(layer)
    if order == "and back":
        revert(layer)
        revert(plain)
    for step in range(3):
        x = uneven_batch(6, step).float().requires_grad_()
        checkpoint(layer, x, use_reentrant=True).square().sum().backward()
        plain(x.detach())
    assert int(layer.num_batches_tracked) == 3
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), plain.buffers(), strict=True))
    if order != "and back":
        layer.track_running_stats = False
        with torch.no_grad():
            layer(uneven_batch(6, 0).float())
        assert int(layer.num_batches_tracked) == 3, "a switch of the user's own holds"


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_what_awaits_a_backward_pass_is_neither_copied_nor_pickled(is_checkpointed):
    layer = SyncBatchRenorm(512)
    sizes = []
    for _ in range(20):
        x = torch.randn(4, 512).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False) if is_checkpointed else layer(x)
        assert isinstance(y, Tensor)
        file = io.BytesIO()
        torch.save(copy.deepcopy(layer), file)
        sizes.append(len(file.getvalue()))
        y.sum().backward()
    assert sizes[-1] < 1.1 * sizes[0]
