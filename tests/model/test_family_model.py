"""Layers of the family in a model: conversion and back, DDP, freezing, explain, join."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from syncnorm import (
    SyncBatchNorm,
    SyncBatchRenorm,
    convert,
    explain,
    frozen_statistics,
    prepare_ddp,
    revert,
    scale_loss,
)
from syncnorm.comm import exchange
from syncnorm.errors import FaultError, InputError
from syncnorm.family import (
    MABN,
    METHODS,
    BalancedBatchNorm,
    BatchChannelNorm,
    EstimatedBatchNorm,
    EvoNorm,
    L1BatchNorm,
    OnlineNorm,
    PowerNorm,
    RegionNorm,
    UnifiedNorm,
)
from syncnorm.testing import shard


def network(norm: Any = nn.BatchNorm2d) -> nn.Sequential:
    """A network of two layers with a norm in between, the same on every worker."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(12, 2)
    ).double()


def batch(count: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(count, 2, 6, 6, generator=generator, dtype=torch.float64)


def test_convert_puts_a_layer_in_the_place_and_keeps_its_parameters():
    model = network()
    model(batch())
    old = model[1]
    assert convert(model, L1BatchNorm) is model
    new = model[1]
    assert isinstance(new, L1BatchNorm)
    assert new.weight is old.weight
    assert new.bias is old.bias
    assert torch.equal(new.running_mean, old.running_mean)
    torch.testing.assert_close(new.running_deviation, old.running_var.sqrt())
    assert int(new.num_batches_tracked) == 0
    assert new.running_mean.dtype == torch.float64


def test_convert_has_options_and_keeps_eps_and_an_uncommon_momentum():
    model = nn.Sequential(nn.BatchNorm1d(3, eps=1e-3), nn.BatchNorm1d(3, momentum=0.3))
    convert(model, L1BatchNorm, sync="none")
    assert [(m.eps, m.momentum, m.sync) for m in model] == [
        (1e-3, 0.1, "none"),
        (1e-5, 0.3, "none"),
    ]
    model = convert(nn.Sequential(nn.BatchNorm1d(3)), L1BatchNorm, momentum=0.5)
    assert model[0].momentum == 0.5


def test_convert_replaces_one_layer_under_all_its_names_and_follows_select():
    shared = nn.BatchNorm1d(3)
    model = nn.Sequential(shared, nn.Sequential(shared), nn.BatchNorm1d(3))
    convert(model, L1BatchNorm, select=lambda name, layer: name != "2")
    assert model[0] is model[1][0]
    assert isinstance(model[0], L1BatchNorm)
    assert type(model[2]) is nn.BatchNorm1d


def test_convert_of_a_batch_norm_itself_returns_the_new_layer():
    assert isinstance(convert(nn.BatchNorm1d(3), EvoNorm, variant="b1"), EvoNorm)


@pytest.mark.parametrize("first", [None, SyncBatchNorm])
def test_revert_evaluates_as_before_and_has_counted_all(first):
    model = network()
    model(batch())
    if first is not None:
        convert(model, first)
    convert(model, L1BatchNorm)
    for _ in range(3):
        model(batch())
    expected = model.eval()(batch())
    weight = model[1].weight
    assert revert(model) is model
    assert type(model[1]) is nn.BatchNorm2d
    assert model[1].weight is weight
    assert int(model[1].num_batches_tracked) == 4
    torch.testing.assert_close(model(batch()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [L1BatchNorm, EstimatedBatchNorm, MABN, UnifiedNorm])
def test_revert_of_a_half_model_runs(cls, dtype):
    model = nn.Sequential(nn.BatchNorm2d(2)).to(dtype)
    x = torch.randn(4, 2, 3, 3).to(dtype)
    expected = model.eval()(x)
    revert(convert(model, cls))
    assert model[0].running_var.dtype == dtype
    torch.testing.assert_close(model(x), expected)


def test_revert_of_a_dead_channel_evaluates_as_before():
    layer = L1BatchNorm(2, eps=1e-8)
    layer.running_deviation.zero_()
    x = torch.tensor([[1e-9, 0.0]])
    expected = layer.eval()(x)
    torch.testing.assert_close(revert(layer, to=nn.BatchNorm1d)(x), expected)


def test_revert_of_a_layer_that_was_built_needs_to():
    model = network(L1BatchNorm)
    with pytest.raises(InputError, match="`to` must say what it shall be"):
        revert(model)
    assert type(revert(model, to=nn.BatchNorm2d)[1]) is nn.BatchNorm2d


def test_revert_refuses_what_no_batch_norm_evaluates_as():
    model = network(EvoNorm)
    with pytest.raises(InputError, match="'1' is a EvoNorm, which no batch norm evaluates as"):
        revert(model, to=nn.BatchNorm2d)
    assert isinstance(model[1], EvoNorm)


class Special(nn.BatchNorm2d):
    """A batch norm with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class StaysFrozen(nn.BatchNorm2d):
    """A batch norm that never trains."""

    def train(self, mode: bool = True) -> StaysFrozen:
        return super().train(False)


class OfWidth(nn.BatchNorm2d):
    """A batch norm with a constructor of its own."""

    def __init__(self, width: int) -> None:
        super().__init__(width)


class OfOurs(SyncBatchNorm):
    """A subclass of ours."""


class AnyDimension(nn.BatchNorm2d):
    """A batch norm that loses nothing."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def with_forward() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda x: x
    return layer


def hooked() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(4)
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Special(4), "is a Special, whose own forward would be lost"),
        (with_forward(), "has a forward that was set on the instance"),
        (StaysFrozen(4), "is a StaysFrozen, whose own train would be lost"),
        (OfWidth(4), "is a OfWidth, whose own __init__ would be lost"),
        (convert(StaysFrozen(4)), "is a SyncBatchNorm_StaysFrozen, whose own train would be lost"),
        (OfOurs(4), "is a OfOurs, whose own methods would be lost"),
        (torch.jit.script(nn.BatchNorm2d(4)), "is compiled by torch.jit"),
        (
            SyncBatchNorm(4, sync="running"),
            '`sync` must be "batch" or "none" for a method of the family, got \'running\'',
        ),
        (nn.LazyBatchNorm2d(), "is lazy or parametrized"),
        (nn.BatchNorm2d(4, track_running_stats=False), "keeps no running statistics"),
        (hooked(), "has hooks, which a new layer does not have"),
    ],
)
def test_convert_refuses_what_would_be_lost(layer, message):
    model = nn.Sequential(nn.BatchNorm2d(4), layer)
    with pytest.raises(InputError, match=message):
        convert(model, L1BatchNorm)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_class_with_nothing_of_its_own_is_replaced_and_comes_back():
    model = nn.Sequential(AnyDimension(4))
    assert isinstance(convert(model, L1BatchNorm)[0], L1BatchNorm)
    assert type(revert(model)[0]) is AnyDimension
    assert isinstance(convert(convert(model), L1BatchNorm)[0], L1BatchNorm)
    assert type(revert(model)[0]) is AnyDimension


def test_convert_keeps_the_workers_and_the_mode():
    model = nn.Sequential(SyncBatchNorm(4, process_group=1), SyncBatchNorm(4, sync="none"))
    convert(model, L1BatchNorm)
    assert [layer.process_group for layer in model] == [1, None]
    assert [layer.sync for layer in model] == ["batch", "none"]


def group_after_a_round() -> list[Any]:
    """The groups of torch's layer while it is one of the family, and afterwards."""
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    model = convert(nn.Sequential(nn.SyncBatchNorm(4, process_group=group)), L1BatchNorm)
    model(torch.full((2, 4, 1, 1), float(dist.get_rank())))
    mean = model[0].running_mean.tolist()
    revert(model)
    return [mean, type(model[0]) is nn.SyncBatchNorm, model[0].process_group is group]


def test_the_group_of_torchs_layer_comes_along_and_back(pool):
    for rank, found in enumerate(pool(2).run(group_after_a_round)):
        assert found == [pytest.approx([0.1 * rank] * 4), True, True]


def test_revert_of_a_chain_gives_what_was_there_first():
    model = nn.Sequential(nn.BatchNorm2d(4))
    model[0].num_batches_tracked.fill_(7)
    revert(convert(convert(model, SyncBatchRenorm), L1BatchNorm))
    assert (model[0].momentum, int(model[0].num_batches_tracked)) == (0.1, 7)
    revert(convert(convert(model, momentum=0.5, eps=0.1), MABN))
    # With the eps of the layer that it evaluates as.
    assert (model[0].momentum, model[0].eps) == (0.1, 0.1)


def test_revert_refuses_what_would_be_lost():
    model = convert(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), L1BatchNorm)
    model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="'1' has hooks, which a new layer does not have"):
        revert(model)
    parametrized = convert(nn.Sequential(nn.BatchNorm2d(4)), L1BatchNorm)
    parametrize.register_parametrization(parametrized[0], "weight", nn.Identity())
    with pytest.raises(InputError, match="'0' is parametrized"):
        revert(parametrized)
    assert isinstance(model[0], L1BatchNorm)


@pytest.mark.parametrize(
    ("norm", "act"),
    [(SyncBatchNorm, lambda m: convert(m, L1BatchNorm)), (L1BatchNorm, revert)],
    ids=["convert", "revert"],
)
def test_no_layer_is_replaced_within_a_block_that_holds_it(norm, act):
    model = convert(nn.Sequential(nn.BatchNorm2d(4)), norm)
    with frozen_statistics(model), pytest.raises(InputError, match="wait for the end of its block"):
        act(model)
    act(model)


@pytest.mark.parametrize("to", [SyncBatchNorm, MABN])
def test_a_model_of_another_method_is_not_converted_without_a_word(to):
    model = nn.Sequential(L1BatchNorm(4))
    with pytest.warns(UserWarning, match=r"layers of syncnorm.family, '0' \(L1BatchNorm\)") as said:
        convert(model, to)
    assert said[0].filename == __file__
    assert isinstance(model[0], L1BatchNorm)
    mixed = convert(nn.Sequential(nn.BatchNorm2d(4), EvoNorm(4)), L1BatchNorm)
    mixed.append(nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match=r"syncnorm.family, '0' \(L1BatchNorm\), which stay what"):
        convert(mixed, to, select="0|2")
    assert isinstance(mixed[2], to)


def test_convert_names_the_option_that_was_meant():
    with pytest.raises(InputError, match=r"Did you mean `variant`\?"):
        convert(nn.BatchNorm1d(3), EvoNorm, variants="b0")
    with pytest.raises(InputError, match=r"a layer of syncnorm\.family that .* got"):
        convert(nn.BatchNorm1d(3), RegionNorm)


def test_half_precision_keeps_the_statistics_in_float32():
    layer = L1BatchNorm(3).half()
    assert layer.weight.dtype == torch.float16
    assert layer.running_mean.dtype == layer.running_deviation.dtype == torch.float32
    layer(torch.randn(4, 3).half())
    assert L1BatchNorm(3, dtype=torch.bfloat16).running_mean.dtype == torch.float32


def test_cumulative_momentum_is_the_average_over_all_batches():
    layer = L1BatchNorm(2, momentum=None).double()
    means = []
    for step in range(3):
        x = torch.randn(6, 2, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        layer(x)
        means.append(x.mean(0))
    torch.testing.assert_close(layer.running_mean, torch.stack(means).mean(0))


def _move(layer: nn.Module) -> None:
    next(b for name, b in layer.named_buffers() if name.startswith("running_")).add_(2.0)


def on_ddp(parts: Tensor, kind: str) -> dict[str, Any]:
    """Take a step with DDP, in which rank 0 alone has other statistics before."""
    cls = {"l1": L1BatchNorm, "evo": EvoNorm}[kind]
    model = network(cls)
    if dist.get_rank() == 0:
        _move(model[1])
    model = DistributedDataParallel(prepare_ddp(model))
    with exchange.record() as exchanges:
        loss = model(parts).square().mean()
        scale_loss(loss, len(parts)).backward()
    sizes = [e.numel for e in exchanges if e.kind != "count"]
    bare = model.module
    return {
        "label": bare[1].label,
        "state": bare.state_dict(),
        "gradients": [p.grad for p in bare.parameters()],
        "sizes": sizes,
        "expected": [exchange.size_of(n) for n in bare[1].message_sizes()],
        "explained": explain(bare, batch(2)),
    }


@pytest.mark.parametrize("kind", ["l1", "evo"])
def test_a_step_with_ddp_is_the_step_on_the_whole_batch(pool, kind):
    x = batch()
    by_rank = pool(2).run_each(on_ddp, [(part, kind) for part in shard(x, (3, 2))])
    alone = network({"l1": L1BatchNorm, "evo": EvoNorm}[kind])
    _move(alone[1])
    alone(x).square().mean().backward()
    for each in by_rank:
        assert each["label"] == "1"
        for got, parameter in zip(each["gradients"], alone.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-10, atol=1e-10)
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(each["state"][key], value, rtol=1e-10, atol=1e-10)
        # Another test's model may have made the room of the pool's group larger.
        assert all(got >= size for got, size in zip(each["sizes"], each["expected"], strict=True))
        row = each["explained"].rows[0]
        assert (row.layer, row.sync, row.workers, row.samples) == ("1", "batch", 2, 4)
        assert row.messages == len(each["sizes"])


def test_explain_counts_the_messages_of_the_family():
    said = explain(network(EvoNorm), batch(2), world_size=4)
    row = said.rows[0]
    assert (row.now, row.convert, row.sync) == ("EvoNorm", "unchanged", "batch")
    assert (row.workers, row.samples, row.values, row.messages) == (4, 8, 128, 2)
    assert (said.messages, said.bytes) == (2, 8 * (10 + 10))
    assert not said.lints


def with_other_variant() -> str:
    model = network(lambda c: EvoNorm(c, "b0" if dist.get_rank() == 0 else "b1"))
    try:
        prepare_ddp(model)
    except FaultError as error:
        return str(error)
    return "nothing was raised"


def test_workers_with_other_layers_are_told(pool):
    first, second = pool(2).run(with_other_variant)
    assert first == second
    assert "must have the same layers" in first


@pytest.mark.parametrize("is_reentrant", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_activation_checkpointing_changes_nothing(name, is_reentrant):
    results = []
    for checkpoints in (True, False):
        layer = METHODS[name](4).double()
        kept = []
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(6, 4, 3, 3, generator=generator, dtype=torch.float64) + 1
            cotangent = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            x.requires_grad_()
            if checkpoints:
                y = checkpoint(layer, x, use_reentrant=is_reentrant)
            else:
                y = layer(x)
            y.backward(cotangent)
            kept += [y.detach(), x.grad]
        results.append([*kept, *(p.grad for p in layer.parameters()), *layer.state_dict().values()])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("cls", [EvoNorm, L1BatchNorm, BalancedBatchNorm, BatchChannelNorm])
def test_a_single_value_leaves_the_running_scale_alone(cls):
    layer = cls(2) if cls is not BatchChannelNorm else cls(2, num_groups=1)
    layer(torch.ones(1, 2, 1))
    name = "running_deviation" if cls is L1BatchNorm else "running_var"
    assert layer.get_buffer(name).tolist() == [1.0, 1.0]
    assert int(layer.num_batches_tracked) == 1


@pytest.mark.parametrize("name", ["OnlineNorm", "PowerNorm", "MABN", "UnifiedNorm"])
def test_a_gradient_of_averages_needs_the_buffers_of_its_forward(name):
    """Others, in which averages of the backward pass would be read and written, are an error."""
    layer = {
        "OnlineNorm": lambda: OnlineNorm(2),
        "PowerNorm": lambda: PowerNorm(2, warmup=0),
        "MABN": lambda: MABN(2, warmup=0, window=2),
        "UnifiedNorm": lambda: UnifiedNorm(2, warmup=0, window=2, lagged=True),
    }[name]()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    y = functional_call(layer, state, (torch.randn(4, 2, 3, requires_grad=True),))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(InputError, match="must find the buffers of its forward"):
        y.square().sum().backward()
    after = layer.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    layer(torch.randn(4, 2, 3, requires_grad=True)).square().sum().backward()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_layer_in_training_is_not_traced():
    layer, x = L1BatchNorm(2), torch.randn(4, 2, 3)
    with pytest.raises(InputError, match="must be traced in evaluation mode, got training"):
        torch.jit.trace(layer, (x,))
    layer.eval()
    assert torch.equal(torch.jit.trace(layer, (x,))(x[:1]), layer(x[:1]))
