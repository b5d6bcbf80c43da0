"""Gradients of gradients over the workers: equal to those of the whole batch in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncnorm import Lagged, SyncBatchNorm, functional, prepare_ddp, reference
from syncnorm.comm import exchange
from syncnorm.errors import InputError
from syncnorm.testing import assert_close
from tests.distributed.steps import Batch, make_layer, parameters, trained_statistics

CHANNELS = 3
RENORM = {"bounds": (1.5, 0.5)}
SPLITS = [[7], [3, 4], [0, 7], [2, 0, 5], [1, 4, 2]]


def _cotangents(batch: Batch, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of dx, and for each rank, all different, of dweight and dbias."""
    g = torch.Generator().manual_seed(5)
    wide = {"generator": g, "dtype": torch.float64}
    v = torch.randn(batch.x.shape, **wide).to(batch.x.dtype)
    return v, torch.randn(ranks, CHANNELS, **wide), torch.randn(ranks, CHANNELS, **wide)


def _differentiate(
    x: Tensor,
    g: Tensor,
    mask: Tensor | None,
    v: Tensor,
    u: Tensor,
    t: Tensor,
    options: dict[str, Any],
) -> tuple[list[Tensor], list[tuple[str, int]]]:
    """The derivative of sum v dx + sum u dweight + sum t dbias by x, g and weight, on one rank.

    Returned with the exchanges.
    """
    layer = make_layer(CHANNELS, dtype=torch.promote_types(x.dtype, torch.float32), **options)
    with torch.no_grad():
        for parameter, value in zip(
            (layer.weight, layer.bias), parameters(CHANNELS, torch.float64), strict=True
        ):
            parameter.copy_(value)
    x, g = x.detach().requires_grad_(), g.detach().requires_grad_()
    with exchange.record() as exchanges:
        y = layer(x, mask)
        dx, dweight, dbias = torch.autograd.grad(
            y, (x, layer.weight, layer.bias), g, create_graph=True
        )
        objective = (v * dx).sum() + (u * dweight).sum() + (t * dbias).sum()
        second = torch.autograd.grad(objective, (x, g, layer.weight))
    return list(second), [(e.kind, e.numel) for e in exchanges]


def _oracle(batch: Batch, sizes: list[int], options: dict[str, Any]) -> list[Tensor]:
    """The same derivative of the whole batch.

    u dweight + t dbias of a rank is its share of g times the y of weight u, bias t.
    """
    v, u, t = _cotangents(batch, len(sizes))
    weight, bias = (p.requires_grad_() for p in parameters(CHANNELS, torch.float64))
    x, g = (a.double().requires_grad_() for a in (batch.x.detach(), batch.cotangent.detach()))

    def forward(weight: Tensor, bias: Tensor) -> Tensor:
        if "bounds" not in options:
            return reference.batch_norm(x, weight, bias, mask=batch.mask)
        r_max, d_max = options["bounds"]
        running = trained_statistics(CHANNELS)
        return reference.batch_renorm(
            x, weight, bias, mask=batch.mask, running=running, r_max=r_max, d_max=d_max
        )

    (dx,) = torch.autograd.grad(forward(weight, bias), x, g, create_graph=True)
    objective = (v.double() * dx).sum()
    for rank, share in enumerate(torch.arange(len(x)).split(sizes)):
        objective = objective + (g * forward(u[rank], t[rank]))[share].sum()
    return list(torch.autograd.grad(objective, (x, g, weight)))


def _on_ranks(
    pool: Any, batch: Batch, sizes: list[int], options: dict[str, Any]
) -> list[tuple[list[Tensor], list[tuple[str, int]]]]:
    v, u, t = _cotangents(batch, len(sizes))
    shards = zip(batch.shards(sizes), v.split(sizes), u, t, strict=True)
    return pool(len(sizes)).run_each(
        _differentiate, [(*s, v, u, t, options) for s, v, u, t in shards]
    )


def _compare(
    got: list[list[Tensor]], expected: list[Tensor], dtype: torch.dtype, factor: float = 1.0
) -> None:
    x, g, weight = zip(*got, strict=True)
    assert_close(torch.cat(x), expected[0], dtype, "by x", factor)
    assert_close(torch.cat(g), expected[1], dtype, "by the gradient of y", factor)
    assert_close(
        torch.stack(weight).double().sum(0),
        expected[2],
        torch.promote_types(dtype, torch.float32),
        "by weight",
        factor,
    )


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("options", [{}, RENORM], ids=["norm", "renorm"])
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_the_second_derivative_is_that_of_the_whole_batch(pool, sizes, options, masked):
    batch = Batch.random((7, CHANNELS, 4), torch.float64, masked=masked)
    got = [second for second, _ in _on_ranks(pool, batch, sizes, options)]
    _compare(got, _oracle(batch, sizes, options), torch.float64)


def test_a_local_second_derivative_is_another(pool):
    """The negative control of the test above."""
    batch = Batch.random((7, CHANNELS, 4), torch.float64)
    got = [second for second, _ in _on_ranks(pool, batch, [3, 4], {"sync": "none"})]
    with pytest.raises(AssertionError, match="by x"):
        _compare(got, _oracle(batch, [3, 4], {}), torch.float64)


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_second_derivatives_of_other_types_and_layouts(pool, dtype, channels_last):
    batch = Batch.random((9, CHANNELS, 6, 5), dtype, channels_last=channels_last)
    got = [second for second, _ in _on_ranks(pool, batch, [3, 6], {})]
    # The gradient that is differentiated is rounded to the type, too.
    _compare(got, _oracle(batch, [3, 6], {}), dtype, factor=2.0)


@pytest.mark.parametrize("sizes", [[3, 4], [0, 7]], ids=str)
def test_differentiating_twice_costs_one_more_message_on_every_worker(pool, sizes):
    batch = Batch.random((7, CHANNELS, 4), torch.float64)
    expected = [
        ("moments", exchange.size_of(2 * CHANNELS + 1)),
        ("gradients", exchange.size_of(2 * CHANNELS)),
        ("second", exchange.size_of(5 * CHANNELS)),
    ]
    for _, exchanges in _on_ranks(pool, batch, sizes, {}):
        assert exchanges == expected


def _twice_where_some_need_gradients(
    needs_grad: list[bool], weight_is_frozen: bool
) -> list[tuple[str, int]]:
    """The exchanges of a derivative of dbias, and of dweight unless that is frozen."""
    rank = dist.get_rank()
    layer = SyncBatchNorm(CHANNELS)
    layer.weight.requires_grad_(not weight_is_frozen)
    batch = Batch.random((4, CHANNELS), torch.float32, seed=rank)
    with exchange.record() as exchanges:
        layer(batch.x.requires_grad_(needs_grad[rank])).backward(batch.cotangent, create_graph=True)
        sum(p.grad.square().sum() for p in layer.parameters() if p.requires_grad).backward()
    return [(e.kind, e.numel) for e in exchanges]


@pytest.mark.parametrize("weight_is_frozen", [False, True], ids=["", "frozen weight"])
def test_workers_may_differ_in_whether_the_input_needs_a_gradient(pool, weight_is_frozen):
    """The exchanges must not depend on it: a layer that asks hangs here."""
    first, second = pool(2).run(_twice_where_some_need_gradients, [True, False], weight_is_frozen)
    assert first == second
    assert [kind for kind, _ in first].count("second") == 1


def _penalised_model(norm: nn.Module) -> nn.Module:
    """Smooth, and the normalisation is called twice."""
    torch.manual_seed(3)
    hidden = nn.Sequential(norm, nn.Tanh(), nn.Linear(CHANNELS, CHANNELS), norm, nn.Tanh())
    return nn.Sequential(nn.Linear(4, CHANNELS), hidden, nn.Linear(CHANNELS, 1)).double()


class _Oracle(nn.Module):
    """The reference as a layer with weight and bias."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(CHANNELS)),
            nn.Parameter(torch.zeros(CHANNELS)),
        )
        self.bounds = options.get("bounds")
        self.running = (
            trained_statistics(CHANNELS)
            if self.bounds
            else reference.RunningStatistics.initial(CHANNELS)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.bounds is None:
            return reference.batch_norm(x, self.weight, self.bias, running=self.running)
        r_max, d_max = self.bounds
        return reference.batch_renorm(
            x, self.weight, self.bias, running=self.running, r_max=r_max, d_max=d_max
        )


def _train_with_penalty(
    model: nn.Module, xs: list[Tensor], samples: int, workers: int
) -> list[Tensor]:
    """Steps on the mean over all samples of y^2 / 2 + |dy/dx|^2, y summed over the batch.

    Returns the parameters after each.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    after = []
    for x in xs:
        x = x.detach().requires_grad_()
        y = model(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        loss = (y.square().sum() / 2 + slope.square().sum()) * workers / samples
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return after


def _penalty_on_rank(shards: list[Tensor], samples: int, options: dict[str, Any]) -> list[Tensor]:
    model = _penalised_model(make_layer(CHANNELS, dtype=torch.float64, **options))
    return _train_with_penalty(
        DistributedDataParallel(prepare_ddp(model)), shards, samples, dist.get_world_size()
    )


@pytest.mark.parametrize("options", [{}, RENORM], ids=["norm", "renorm"])
@pytest.mark.parametrize("sizes", [[4, 4], [1, 7], [3, 0, 5]], ids=str)
def test_a_gradient_penalty_under_ddp_trains_as_one_process(pool, sizes, options):
    g = torch.Generator().manual_seed(1)
    xs = [torch.randn(8, 4, generator=g, dtype=torch.float64) for _ in range(3)]
    expected = _train_with_penalty(_penalised_model(_Oracle(options)), xs, 8, 1)
    by_rank = zip(*(x.split(sizes) for x in xs), strict=True)
    got = pool(len(sizes)).run_each(
        _penalty_on_rank, [(list(shards), 8, options) for shards in by_rank]
    )
    for rank, steps in enumerate(got):
        for step, (a, b) in enumerate(zip(steps, expected, strict=True)):
            assert_close(a, b, torch.float64, f"rank {rank} step {step}")
    assert (expected[0] - expected[2]).abs().max() > 1e-3, "the steps move something"


def test_second_derivatives_in_one_process_pass_torchs_own_check():
    layer = SyncBatchNorm(CHANNELS, affine=False, dtype=torch.float64)
    x = Batch.random((3, CHANNELS, 2), torch.float64).x.requires_grad_()
    assert torch.autograd.gradgradcheck(layer, (x,))


def _checkpointed_penalty(use_checkpoint: bool) -> list[Tensor]:
    """The gradients of a penalty on a gradient, with the forward repeated for it or not."""
    layer = make_layer(CHANNELS, dtype=torch.float64)
    x = torch.randn(4, CHANNELS, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()

    def penalty(x: Tensor) -> Tensor:
        (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        return dx.square().sum()

    value = checkpoint(penalty, x, use_reentrant=False) if use_checkpoint else penalty(x)
    assert isinstance(value, Tensor)
    value.backward()
    return [x.grad, layer.weight.grad]


def test_a_penalty_within_activation_checkpointing(pool):
    for got, expected in zip(
        pool(2).run(_checkpointed_penalty, True),
        pool(2).run(_checkpointed_penalty, False),
        strict=True,
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def _third(layer: nn.Module | None, named: bool, of_weight: bool) -> str | None:
    """The error of a third derivative, with the inputs of its pass named or not."""
    x = torch.randn(4, CHANNELS, 3, dtype=torch.float64, requires_grad=True)
    y = functional.sync_batch_norm(x) if layer is None else layer(x)
    first = layer.weight if of_weight and layer is not None else x
    (dx,) = torch.autograd.grad(y.pow(3).sum(), first, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.pow(3).sum(), x, create_graph=True)
    try:
        ddx.square().sum().backward(inputs=[x] if named else None)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("named", [False, True], ids=["all", "named"])
@pytest.mark.parametrize("of_weight", [False, True], ids=["of x", "of weight"])
@pytest.mark.parametrize("options", [None, {}, RENORM], ids=["function", "norm", "renorm"])
def test_a_third_derivative_is_an_error(pool, options, of_weight, named):
    """Also where a pass names its inputs: other ways to them would be taken for all there are."""
    layer = None if options is None else make_layer(CHANNELS, dtype=torch.float64, **options)
    for error in pool(2).run(_third, layer, named, of_weight):
        assert error is not None
        assert "must be differentiated once, got a third derivative" in error


def _lagged_twice() -> list[str]:
    """The errors of a penalty: in the first step, which pools, and in the second, which does not."""
    model = prepare_ddp(nn.Sequential(SyncBatchNorm(CHANNELS, sync=Lagged(max_drift=100.0))))
    errors = []
    for step in range(2):
        x = torch.randn(4, CHANNELS, generator=torch.Generator().manual_seed(step)).requires_grad_()
        (dx,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
        try:
            dx.square().sum().backward()
        except InputError as error:
            errors.append(str(error))
    return errors


def test_a_lagged_gradient_cannot_be_differentiated(pool):
    for errors in pool(2).run(_lagged_twice):
        assert len(errors) == 2
        assert all("is differentiated, got \"lagged\" in layer '0'." in error for error in errors)


def _frozen(which: str) -> Tensor:
    """The penalty's gradient by x of a layer with a frozen parameter."""
    torch.manual_seed(dist.get_rank())
    layer = SyncBatchNorm(CHANNELS, dtype=torch.float64)
    if which:
        layer.get_parameter(which).requires_grad_(False)
    x = torch.randn(4, CHANNELS, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    dx.square().sum().backward()
    return x.grad


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_frozen_parameter_changes_no_other_second_derivative(pool, which):
    for got, expected in zip(pool(2).run(_frozen, which), pool(2).run(_frozen, ""), strict=True):
        assert torch.equal(got, expected)
