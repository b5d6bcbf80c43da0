"""Workers that are in different exchanges: one error on all, which names the place of each rank."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncnorm import SyncBatchNorm, accumulate, convert, functional, prepare_ddp, scale_loss
from syncnorm.comm import exchange, groups
from syncnorm.comm.inflight import reset_calls
from syncnorm.errors import ExchangeError, UnevenShardsWarning
from syncnorm.shards import Shard

WIDTHS = (4, 4, 4, 7)


class Experts(nn.Module):
    """Layers of which a forward uses some; 4 and 7 channels wide."""

    def __init__(self, options: dict[str, object] | None = None) -> None:
        super().__init__()
        self.norms = nn.ModuleList(SyncBatchNorm(width, **(options or {})) for width in WIDTHS)

    def forward(self, x: Tensor, used: list[int]) -> Tensor:
        return sum((self.norms[i](x[:, : WIDTHS[i]]).mean() for i in used), start=x.new_zeros(()))


def _mixed(
    options: dict[str, object], used: list[int], is_scaled: bool, is_ddp: bool, steps: int
) -> str:
    """The error that a worker gets whose forward uses these layers."""
    model = prepare_ddp(Experts(options))
    group = groups.statistics_group()
    assert group is not None
    # Other tests have made calls in this pool.
    reset_calls(group)
    whole = DistributedDataParallel(model, find_unused_parameters=True) if is_ddp else model
    x = torch.randn(5, 7)
    try:
        for _ in range(steps):
            loss = whole(x, used)
            (scale_loss(loss, len(x)) if is_scaled else loss).backward()
    except ExchangeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("is_ddp", [False, True])
@pytest.mark.parametrize(
    ("used", "places"),
    [
        # Equally wide.
        (
            ([0, 1], [0, 2]),
            ("'norms.1' (training forward, moments", "'norms.2' (training forward, moments"),
        ),
        # A forward meets a backward pass, of layers of other widths.
        (
            ([0, 1, 3], [0, 1]),
            ("'norms.3' (training forward, moments", "'norms.1' (backward, gradients"),
        ),
        # Of other widths, forward.
        (
            ([0, 3], [0, 2]),
            ("'norms.3' (training forward, moments", "'norms.2' (training forward, moments"),
        ),
        # In another order.
        (
            ([1, 2], [2, 1]),
            ("'norms.1' (training forward, moments", "'norms.2' (training forward, moments"),
        ),
        # Once more.
        (
            ([1, 1, 2], [1, 2]),
            ("'norms.1' (training forward, moments", "'norms.2' (training forward, moments"),
        ),
    ],
    ids=str,
)
def test_workers_in_different_layers_raise_the_same(pool, used, places, is_ddp):
    errors = pool(2).run_each(_mixed, [({}, each, False, is_ddp, 1) for each in used])
    assert errors[0] == errors[1]
    for rank, place in enumerate(places):
        assert f"rank {rank} at call" in errors[0]
        assert place in errors[0]


def test_a_layer_that_one_worker_skips_before_its_loss_is_scaled(pool):
    errors = pool(3).run_each(
        _mixed, [({}, used, True, False, 1) for used in ([0, 3], [0], [0, 3])]
    )
    assert len(set(errors)) == 1
    assert "ranks 0, 2 at call 1 of 'norms.3' (training forward, moments" in errors[0]
    assert "rank 1 at call 1 of 'scale_loss' (count" in errors[0]


def test_the_mean_of_three_identities_is_not_taken_for_one(pool):
    """Each of three workers is in another layer."""
    errors = pool(3).run_each(_mixed, [({}, [used], False, False, 1) for used in (0, 1, 2)])
    assert len(set(errors)) == 1
    assert "no error" not in errors[0]


@pytest.mark.parametrize("sync", ["running", "lagged"])
def test_layers_that_act_together_are_not_mixed_up_by_what_a_forward_uses(pool, sync):
    """Their flat messages hold all layers; a lagged layer that waits has messages of its own."""
    options = {"sync": sync}
    found = pool(2).run_each(
        _mixed, [(options, used, False, False, 2) for used in ([0, 1], [0, 2])]
    )
    assert found[0] == found[1]
    assert ("no error" in found[0]) == (sync == "running")


def _two_models(rank: int) -> str:
    """Equal models under two names; each worker trains another one first."""
    models = {
        name: prepare_ddp(nn.ModuleDict({name: SyncBatchNorm(4, sync="running")}))
        for name in ("a", "b")
    }
    for name, model in models.items():
        model.forward = model[name].forward
    try:
        for name in ("ab", "ba")[rank] * 2:
            models[name](torch.randn(3, 4))
    except ExchangeError as error:
        return str(error)
    return "no error"


def test_models_that_workers_train_in_another_order(pool):
    errors = pool(2).run_each(_two_models, [(0,), (1,)])
    assert errors[0] == errors[1]
    assert "'a' (all moments" in errors[0]
    assert "'b' (all moments" in errors[0]


def _other_width(rank: int) -> str:
    """One name, and another number of channels on each worker."""
    layers = nn.ModuleList([SyncBatchNorm(4), SyncBatchNorm(7)])
    prepare_ddp(layers)
    layers[0].label = layers[1].label = "head"
    try:
        layers[rank](torch.randn(3, layers[rank].num_features))
    except ExchangeError as error:
        return str(error)
    return "no error"


def test_layers_of_one_name_and_other_widths(pool):
    errors = pool(2).run_each(_other_width, [(0,), (1,)])
    assert errors[0] == errors[1]
    assert "rank 0 at call 1 of 'head' (training forward, moments, 9 float64)" in errors[0]
    assert "rank 1 at call 1 of 'head' (training forward, moments, 15 float64)" in errors[0]


def _backward_in_another_order(rank: int) -> str:
    layers = {name: SyncBatchNorm(4) for name in ("a", "b")}
    prepare_ddp(nn.ModuleDict(layers))
    losses = {name: layer(torch.randn(3, 4)).square().mean() for name, layer in layers.items()}
    try:
        for name in ("ab", "ba")[rank]:
            losses[name].backward()
    except ExchangeError as error:
        return str(error)
    return "no error"


def test_backward_passes_in_another_order(pool):
    errors = pool(2).run_each(_backward_in_another_order, [(0,), (1,)])
    assert errors[0] == errors[1]
    assert "rank 0 at call 1 of 'a' (backward, gradients" in errors[0]


def _without_prepare_ddp(rank: int) -> tuple[str, list[int]]:
    """A forward meets a backward pass of a layer as wide."""
    x = torch.randn(3, 4)
    try:
        with exchange.record() as record:
            y = SyncBatchNorm(4)(x.requires_grad_())
            if rank == 0:
                functional.sync_batch_norm(x)
            y.square().mean().backward()
    except ExchangeError as error:
        return str(error), [each.numel for each in record]
    return "no error", []


def test_a_forward_that_meets_a_backward_pass(pool):
    (first, sizes), (second, _) = pool(2).run_each(_without_prepare_ddp, [(0,), (1,)])
    assert first == second
    assert "rank 0 at call 1 of 'sync_batch_norm' (training forward, moments" in first
    assert "rank 1 at call 1 of 'SyncBatchNorm(4)' (backward, gradients" in first
    assert sizes[:2] == [2 * 4 + 2] * 2


def _sizes(widths: list[int]) -> list[tuple[str, int]]:
    layers = [SyncBatchNorm(width) for width in widths]
    prepare_ddp(nn.ModuleList(layers))
    with exchange.record() as record:
        for layer in layers:
            layer(torch.randn(3, layer.num_features)).square().mean().backward()
        scale_loss(torch.zeros(()), 3)
    return [(each.kind, each.numel) for each in record]


def test_all_messages_of_a_prepared_model_have_the_size_of_its_widest_layers(pool):
    room = 2 * 9 + 2
    for sizes in pool(2).run(_sizes, [3, 9]):
        assert sizes == [("moments", room), ("gradients", room)] * 2 + [("count", room)]
    for sizes in pool(2).run(_sizes, [3, 3]):  # in the same processes
        assert sizes == [("moments", 8), ("gradients", 8)] * 2 + [("count", 8)]


def _compiled(rank: int) -> str:
    model = prepare_ddp(Experts())
    torch._dynamo.reset()
    step = torch.compile(lambda x, a, b: model(x, [a, b]).sum(), backend="aot_eager")
    try:
        step(torch.randn(5, 7), 0, (1, 2)[rank]).backward()
    except ExchangeError as error:
        return str(error)
    return "no error"


def test_compiled_layers_are_told_apart_too(pool):
    errors = pool(2).run_each(_compiled, [(0,), (1,)])
    assert errors[0] == errors[1]
    assert "'norms.1' (training forward, moments" in errors[0]


def _shards(sizes: list[int], rank: int, how: str, sync: str) -> list[str]:
    """The warnings of a worker that trains on a shard of this size, a few times."""
    Shard.has_warned = False
    model = convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), sync=sync)
    prepare_ddp(model)
    teacher = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            x = torch.randn(sizes[rank], 3)
            with torch.no_grad():
                teacher(x)
            loss = model(x).square().mean()
            (scale_loss(loss, len(x)) if how == "scaled" else loss).backward()
    return [str(w.message) for w in caught if w.category is UnevenShardsWarning]


@pytest.mark.parametrize("sync", ["batch", "running"])
@pytest.mark.parametrize(
    ("sizes", "how", "count"),
    [
        ([1, 5], "scaled", [0, 0]),
        ([3, 3], "not scaled", [0, 0]),
        ([1, 5], "not scaled", [1, 1]),
        ([2, 4, 6], "not scaled", [1, 0, 1]),  # the one with a mean shard cannot tell
    ],
)
def test_uneven_shards_without_scale_loss_are_noticed_once(pool, sizes, how, count, sync):
    found = pool(len(sizes)).run_each(
        _shards, [(sizes, rank, how, sync) for rank in range(len(sizes))]
    )
    assert [len(each) for each in found] == count
    if count[0]:
        whole = sum(sizes)
        for rank in (0, len(sizes) - 1):
            assert (
                f"rank {rank} had {sizes[rank]} of {whole} values per channel in '1'"
                in found[rank][0]
            )
            assert "Add `loss = scale_loss(loss, n)`" in found[rank][0]


def _twice_in_a_step() -> list[str]:
    Shard.has_warned = False
    model = prepare_ddp(nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4, sync="running")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with accumulate(model):
                sum(model(torch.randn(3, 3)).square().mean() for _ in range(2)).backward()
    return [str(w.message) for w in caught if w.category is UnevenShardsWarning]


def test_all_calls_of_a_step_count_as_its_shard(pool):
    assert pool(2).run(_twice_in_a_step) == [[], []]


def _not_prepared(rank: int) -> list[str]:
    Shard.has_warned = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SyncBatchNorm(4)(torch.randn(2 + rank, 4)).square().mean().backward()
    return [str(w.message) for w in caught if w.category is UnevenShardsWarning]


def test_layers_that_no_ddp_was_prepared_for_say_nothing_of_shards(pool):
    assert pool(2).run_each(_not_prepared, [(0,), (1,)]) == [[], []]


def _penalty(sync: str, is_scaled: bool) -> list[str]:
    Shard.has_warned = False
    model = prepare_ddp(nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4, sync=sync)))
    rank = dist.get_rank()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            x = torch.randn(2 + 2 * rank, 3, requires_grad=True)
            (dx,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
            loss = dx.square().sum(1).mean() + model(x).square().mean()
            (scale_loss(loss, len(x)) if is_scaled else loss).backward()
    return [str(w.message) for w in caught if w.category is UnevenShardsWarning]


@pytest.mark.parametrize("is_scaled", [True, False])
@pytest.mark.parametrize("sync", ["batch", "running"])
def test_a_gradient_within_a_loss_needs_no_scaling(pool, sync, is_scaled):
    """As in a gradient penalty, whose mean is what is scaled."""
    found = pool(2).run(_penalty, sync, is_scaled)
    assert [len(each) for each in found] == [0 if is_scaled else 1] * 2


def _scaled_under_checkpointing(is_reentrant: bool) -> list[str]:
    Shard.has_warned = False
    model = prepare_ddp(nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4)))
    rank = dist.get_rank()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = checkpoint(
            model, torch.randn(2 + 2 * rank, 3, requires_grad=True), use_reentrant=is_reentrant
        )
        scale_loss(y.square().mean(), len(y)).backward()
        # Equal shards, whose fractional weights add up with a rounding error.
        layer = prepare_ddp(SyncBatchNorm(4))
        layer(torch.randn(2, 4, 3), torch.full((2, 1, 3), 0.1)).square().mean().backward()
    return [str(w.message) for w in caught if w.category is UnevenShardsWarning]


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_scaled_losses_of_checkpointed_forwards_and_equal_fractional_shards_are_right(
    pool, is_reentrant
):
    assert pool(3).run(_scaled_under_checkpointing, is_reentrant) == [[]] * 3
