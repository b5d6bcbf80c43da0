"""The family's methods on uneven workers equal the papers' formulas on the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncnorm.comm import exchange, groups
from syncnorm.comm.inflight import log_of
from syncnorm.errors import FaultError, InputError
from syncnorm.family import (
    MABN,
    BalancedBatchNorm,
    BatchChannelNorm,
    EstimatedBatchNorm,
    EvoNorm,
    L1BatchNorm,
    MembranePotentialBatchNorm,
    OnlineNorm,
    PowerNorm,
    RegionNorm,
    UnifiedNorm,
    passes,
)
from syncnorm.testing import shard
from tests.distributed import family_reference as reference
from tests.distributed import planted_averages, planted_family
from tests.distributed.family_reference import close

# Beyond the steps in which averages begin.
STEPS = 12
CHANNELS = 3
SPLITS = [(5,), (3, 2), (5, 0), (1, 0, 4)]
DEFECTS = planted_family.DEFECTS | planted_averages.DEFECTS
Whole = Callable[..., Tensor]
"""Takes the batch, the mask, and the layer's state, which it moves."""


@dataclass(frozen=True)
class Method:
    """A method: how its layer is made, its oracle, and the messages of a forward and backward."""

    make: Callable[..., nn.Module]
    oracle: Whole
    messages: tuple[str, ...]
    has_mask: bool = False
    convert: Callable[[Tensor], Tensor] | None = None
    """What becomes of the mask before the layer is given it."""
    is_derivative: bool = True
    """False where the backward pass is not the derivative of the forward pass."""
    knows_shards: bool = False
    """True if the oracle takes the sizes of the shards, too."""

    def arguments(self, mask: Tensor) -> list[Tensor]:
        given = mask if self.convert is None else self.convert(mask)
        return [given] if self.has_mask else []


def tasks_from(mask: Tensor) -> Tensor:
    """A task for each sample, one of three, by what the mask covers."""
    return mask.flatten(1).sum(1).to(torch.int64) % 3


def _evo(variant: str) -> Method:
    return Method(
        partial(EvoNorm, CHANNELS, variant),
        lambda x, mask, state: reference.evo_norm(x, state, variant, 1e-5, 0.1),
        ("sums", "gradients"),
    )


def _power(**options: Any) -> Method:
    return Method(
        partial(PowerNorm, CHANNELS, warmup=6, **options),
        lambda x, mask, state: reference.power_norm(
            x, mask, state, warmup=6, groups=options.get("scaling_groups", 1)
        ),
        ("moments", "gradients"),
        has_mask=True,
        is_derivative=False,
    )


def _mabn(*, lagged: bool) -> Method:
    options = {"warmup": 5, "renorm_after": 7, "lagged": lagged}
    return Method(
        partial(MABN, CHANNELS, window=3, **options),
        lambda x, mask, state: reference.mabn(x, mask, state, **options),
        ("moments", "gradients"),
        has_mask=True,
        is_derivative=False,
    )


def _unified(*, outlier_filtration: bool, lagged: bool) -> Method:
    options = {"warmup": 5, "renorm_after": 7, "lagged": lagged}
    options["outlier_filtration"] = outlier_filtration
    return Method(
        partial(UnifiedNorm, CHANNELS, window=3, **options),
        lambda x, mask, state: reference.unified_norm(x, mask, state, **options),
        ("moments", "gradients"),
        has_mask=True,
        is_derivative=False,
    )


def _online(guard: str | None) -> Method:
    return Method(
        partial(OnlineNorm, CHANNELS, guard=guard),
        lambda x, mask, state, sizes: reference.online_norm(x, state, sizes, guard=guard),
        ("moments", "gradients"),
        is_derivative=False,
        knows_shards=True,
    )


METHODS = {
    "evo_b0": _evo("b0"),
    "evo_b1": _evo("b1"),
    "evo_b2": _evo("b2"),
    "l1": Method(
        partial(L1BatchNorm, CHANNELS),
        lambda x, mask, state: reference.l1_batch_norm(x, state, 1e-5, 0.1),
        ("sums", "sums", "gradients", "gradients"),
    ),
    "region": Method(
        partial(RegionNorm, CHANNELS),
        lambda x, mask, state: reference.region_norm(x, mask, state, 1e-5),
        ("moments", "gradients"),
        has_mask=True,
    ),
    "estimated": Method(
        partial(EstimatedBatchNorm, CHANNELS),
        lambda x, mask, state: reference.estimated_batch_norm(x, state, 1e-5, 0.1),
        ("moments",),
        is_derivative=False,
    ),
    "batch_channel": Method(
        partial(BatchChannelNorm, CHANNELS, 3),
        lambda x, mask, state: reference.batch_channel_norm(x, state, 3, False, 1e-5, 0.1),
        ("moments", "gradients"),
    ),
    "estimated_channel": Method(
        partial(BatchChannelNorm, CHANNELS, estimate=True),
        lambda x, mask, state: reference.batch_channel_norm(x, state, 1, True, 1e-5, 0.1),
        ("moments",),
        is_derivative=False,
    ),
    "membrane": Method(
        partial(MembranePotentialBatchNorm, CHANNELS),
        lambda x, mask, state: reference.membrane_batch_norm(x, state, 1e-5, 0.1),
        ("moments", "gradients"),
    ),
    "balanced": Method(
        partial(BalancedBatchNorm, CHANNELS, num_tasks=4, kappa=0.4),
        lambda x, mask, state: reference.balanced_batch_norm(
            x, tasks_from(mask), state, 0.4, 1e-5, 0.1
        )[0],
        ("sums", "gradients"),
        has_mask=True,
        convert=tasks_from,
    ),
    "power": _power(),
    "power_plain": _power(scaling_groups=0),
    "mabn": _mabn(lagged=False),
    "mabn_lagged": _mabn(lagged=True),
    "unified": _unified(outlier_filtration=False, lagged=False),
    "unified_filtered": _unified(outlier_filtration=True, lagged=False),
    "unified_lagged": _unified(outlier_filtration=True, lagged=True),
    "online": _online("layer_scaling"),
    "online_clamped": _online("clamp"),
}


def fill(layer: nn.Module) -> dict[str, Tensor]:
    """Give the parameters values that are nothing special; the state as float64."""
    generator = torch.Generator().manual_seed(7)
    layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
    return {name: value.detach().clone() for name, value in layer.state_dict().items()}


def data(step: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """A whole batch (N, C, 4, 3) some way off 0, a mask and the cotangent."""
    generator = torch.Generator().manual_seed(100 + step)
    shape = (count, CHANNELS, 4, 3)
    x = 2 * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
    mask = (torch.rand(count, 1, 4, 3, generator=generator) < 0.4).double()
    return x, mask, torch.randn(shape, generator=generator, dtype=torch.float64)


def on_rank(name: str, parts: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Any]:
    """Take steps on this rank's shards; what came out, and the layer's state."""
    method = METHODS[name]
    layer = method.make()
    fill(layer)
    steps, sent = [], []
    for x, mask, cotangent in parts:
        layer.zero_grad()
        x = x.clone().requires_grad_()
        with exchange.record() as exchanges:
            y = layer(x, *method.arguments(mask))
            y.backward(cotangent)
        steps.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
        sent.append(tuple(e.kind for e in exchanges))
        if exchanges:
            room = log_of(groups.statistics_group(None)).room
            assert [e.numel for e in exchanges] == [
                exchange.size_of(count, room) for count in layer.message_sizes()
            ]
    return {"steps": steps, "state": layer.state_dict(), "sent": sent}


def on_rank_with_defect(
    name: str, defect: str, parts: list[tuple[Tensor, Tensor, Tensor]]
) -> dict[str, Any]:
    """As `on_rank`, with a defect planted in the method."""
    with DEFECTS[name, defect]():
        return on_rank(name, parts)


def sharded(steps: int, sizes: tuple[int, ...]) -> tuple[list[Any], list[list[Any]]]:
    """The batches of steps, and by rank its shards of them."""
    batches = [data(step, sum(sizes)) for step in range(steps)]
    shards = [list(zip(*(shard(each, sizes) for each in batch))) for batch in batches]
    return batches, [[s[r] for s in shards] for r in range(len(sizes))]


def compare(
    name: str, sizes: tuple[int, ...], batches: list[Any], by_rank: list[dict[str, Any]]
) -> None:
    """Assert that what came out on the ranks is the oracle's on the whole batches."""
    method = METHODS[name]
    state = fill(method.make())
    names = [n for n, _ in method.make().named_parameters()]
    for step, (x, mask, cotangent) in enumerate(batches):
        x = x.clone().requires_grad_()
        used = state | {n: state[n].clone().requires_grad_() for n in names}
        y = method.oracle(x, mask, used, *([sizes] if method.knows_shards else []))
        expected = torch.autograd.grad(y, [x, *(used[n] for n in names)], cotangent)
        state |= {n: v for n, v in used.items() if n not in names}
        ranks = [each["steps"][step] for each in by_rank]
        close(torch.cat([r[0] for r in ranks]), y)
        close(torch.cat([r[1] for r in ranks]), expected[0])
        for index, gradient in enumerate(expected[1:], start=2):
            close(sum(r[index] for r in ranks), gradient)
        if len(by_rank) > 1:
            assert all(each["sent"][step] == method.messages for each in by_rank)
    for each in by_rank:
        for key in each["state"]:
            close(each["state"][key].double(), state[key].double())
            assert torch.equal(each["state"][key], by_rank[0]["state"][key])


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_equals_the_whole_batch(pool, name, sizes):
    batches, parts = sharded(STEPS, sizes)
    by_rank = pool(len(sizes)).run_each(on_rank, [(name, part) for part in parts])
    compare(name, sizes, batches, by_rank)


@pytest.mark.parametrize(("name", "defect"), DEFECTS)
def test_a_planted_defect_is_seen(pool, name, defect):
    sizes = (3, 2)
    batches, parts = sharded(STEPS, sizes)
    by_rank = pool(2).run_each(on_rank_with_defect, [(name, defect, part) for part in parts])
    with pytest.raises(AssertionError):
        compare(name, sizes, batches, by_rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_regions_of_a_soft_mask_in_a_half_type_make_a_whole(dtype):
    x, mask, _ = data(0, 5)
    soft = (mask * torch.linspace(0.1, 0.9, mask.numel()).view_as(mask)).to(dtype)
    layer = RegionNorm(CHANNELS).double()
    close(layer(x, soft), layer(x, soft.double()))


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].is_derivative])
def test_differentiates_twice(name):
    method = METHODS[name]
    layer = method.make()
    fill(layer)
    x, mask, _ = (each[:2, :, :2, :2].contiguous() for each in data(0, 3))

    def run(x: Tensor) -> Tensor:
        return layer(x, *method.arguments(mask))

    assert torch.autograd.gradcheck(run, x.requires_grad_())
    assert torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize("name", ["evo_b0", "balanced"])
def test_differentiates_twice_where_positions_are_equal(name):
    """A variance that rounding has brought below 0 has a second derivative, too."""
    layer = METHODS[name].make()
    fill(layer)
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(3, CHANNELS, 1, 1, generator=generator, dtype=torch.float64)
        x = x.expand(-1, -1, 1, 3).contiguous().requires_grad_()
        assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("estimate", [False, True])
@pytest.mark.parametrize("ndim", [4, 5])
def test_channels_last_loses_no_digits_of_groups_at_a_large_mean(ndim, estimate):
    layout = torch.channels_last if ndim == 4 else torch.channels_last_3d
    x = (torch.randn(3, 4, *[6] * (ndim - 2)) + 1000).to(memory_format=layout)
    layer = BatchChannelNorm(4, 2, estimate=estimate)
    for mode in (True, False):
        truth = copy.deepcopy(layer).double().train(mode)(x.double())
        y = layer.train(mode)(x)
        torch.testing.assert_close(y.double(), truth, rtol=0, atol=2e-3)
        assert y.is_contiguous(memory_format=layout)


def test_evonorm_without_weight_and_bias_is_that_with_1_and_0():
    x, _, cotangent = data(0, 3)
    found = []
    for affine in (True, False):
        layer, again = EvoNorm(CHANNELS, affine=affine).double(), x.clone().requires_grad_()
        y = layer(again)
        found.append([y, *torch.autograd.grad(y, [again, layer.v], cotangent)])
    for one, other in zip(*found, strict=True):
        close(other, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_half_types_are_computed_in_float32(name, dtype):
    method = METHODS[name]
    layer, wide = method.make(), method.make()
    x, mask, _ = data(0, 4)
    x = x.to(dtype)
    arguments = method.arguments(mask)
    y, exact = layer(x, *arguments), wide.double()(x.double(), *arguments)
    assert y.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("block", [8, 80], ids=["of channels", "of samples"])
@pytest.mark.parametrize("name", METHODS)
def test_small_blocks_and_channels_last_are_the_same(monkeypatch, name, block, is_last):
    by_block = []
    for size in (passes._BLOCK, block):
        monkeypatch.setattr(passes, "_BLOCK", size)
        layer, came_out = METHODS[name].make(), []
        fill(layer)
        for step in range(2):
            x, mask, cotangent = data(step, 5)
            if is_last and size == block:
                x, cotangent = (
                    t.contiguous(memory_format=torch.channels_last) for t in (x, cotangent)
                )
            y = layer(x.requires_grad_(), *METHODS[name].arguments(mask))
            y.backward(cotangent)
            came_out += [y, x.grad]
        by_block.append([*came_out, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for one, other in zip(*by_block, strict=True):
        close(other, one)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "region"])
def test_evaluation_uses_running_statistics_and_exchanges_nothing(name):
    layer = METHODS[name].make()
    fill(layer)
    x, _, _ = data(0, 4)
    layer(x)
    layer.eval()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with exchange.record() as exchanges:
        whole, halves = layer(x), torch.cat([layer(x[:1]), layer(x[1:])])
    assert not exchanges
    torch.testing.assert_close(whole, halves)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_evaluation_of_l1_on_normal_values_is_that_of_batch_norm():
    torch.manual_seed(0)
    x = 3 * torch.randn(20000, CHANNELS, dtype=torch.float64) + 1
    layer = L1BatchNorm(CHANNELS, momentum=1.0)
    plain = nn.BatchNorm1d(CHANNELS, momentum=1.0)
    layer(x)
    plain.double()(x)
    torch.testing.assert_close(
        layer.running_deviation.double(), plain.running_var.sqrt(), rtol=0.02, atol=0
    )


def wrong_mask(rank: int) -> str:
    """Normalise with a mask that is wrong on rank 1 alone."""
    layer = RegionNorm(2)
    mask = torch.full((2, 1, 3, 3), 1.5 if rank == 1 else 1.0)
    try:
        layer(torch.ones(2, 2, 3, 3), mask)
    except FaultError as error:
        return str(error)
    return "nothing was raised"


def test_a_wrong_mask_is_the_same_error_on_every_worker(pool):
    by_rank = pool(2).run_each(wrong_mask, [(0,), (1,)])
    assert by_rank[0] == by_rank[1]
    assert by_rank[0].startswith("`mask` must hold weights in [0, 1], in RegionNorm.")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EvoNorm(3, "s0"), '`variant` must be "b0", "b1" or "b2", got \'s0\''),
        (lambda: L1BatchNorm(3, sync="lagged"), '`sync` must be "batch" or "none", got \'lagged\''),
        (lambda: EvoNorm(3)(torch.ones(2, 3)), r"`x` must have positions, \(N, C, \*S\)"),
        (lambda: L1BatchNorm(3)(torch.ones(2, 4)), "`x` must have num_features = 3 channels"),
        (lambda: RegionNorm(3)(torch.ones(2, 3), torch.ones(4, 1)), "`mask` must broadcast to"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()


def without_a_gradient(name: str) -> list[str]:
    """Take a step in which only rank 0's input needs a gradient, and no parameter does."""
    method = METHODS[name]
    layer = method.make()
    fill(layer)
    layer.requires_grad_(False)
    x, mask, _ = data(0, 2)
    given = method.arguments(mask)
    with exchange.record() as exchanges:
        y = layer(x.requires_grad_(dist.get_rank() == 0), *given)
        if y.requires_grad:  # what has no backward message need not
            y.sum().backward()
    return [e.kind for e in exchanges]


@pytest.mark.parametrize("name", METHODS)
def test_all_take_part_in_a_backward_pass_that_only_one_needs(pool, name):
    first, second = pool(2).run(without_a_gradient, name)
    assert first == second == [*METHODS[name].messages]
