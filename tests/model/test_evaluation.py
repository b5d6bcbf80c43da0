"""evaluation_statistics: sharded inference batches are normalised as the whole batch would be."""

from __future__ import annotations

import copy
import pickle
import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from syncnorm import (
    Mix,
    Prior,
    SyncBatchNorm,
    SyncBatchRenorm,
    accumulate,
    convert,
    evaluation_statistics,
    prepare_ddp,
)
from syncnorm.comm import exchange
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
    UnifiedNorm,
)
from syncnorm.family.layer import FamilyLayer
from syncnorm.model import mixed
from syncnorm.testing import assert_close, shard
from tests.model.foreign import OwnForward
from tests.model.parts import HomeMade, selective_contexts, state_of

C = 3
SPLITS = [(5,), (3, 2), (5, 0), (1, 0, 4)]
CHOICES = ["running", "batch", Mix(0.7), Mix(0.0), Mix(1.0), Prior(4), Prior(0)]
LAYERS = {
    "batch": lambda: SyncBatchNorm(C),
    "running": lambda: SyncBatchNorm(C, sync="running"),
    "lagged": lambda: SyncBatchNorm(C, sync="lagged"),
    "none": lambda: SyncBatchNorm(C, sync="none"),
    "renorm": lambda: SyncBatchRenorm(C),
    "torch": lambda: nn.BatchNorm2d(C),
    "torch_sync": lambda: nn.SyncBatchNorm(C),
    "plain": lambda: SyncBatchNorm(C, affine=False),
}


def make(kind: str) -> nn.Sequential:
    """A layer with parameters and running statistics that are nothing special, evaluating."""
    torch.manual_seed(4)
    model = nn.Sequential(LAYERS[kind]()).double().eval()
    layer = model[0]
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(C) + 1)
        layer.running_mean.copy_(torch.randn(C))
        layer.running_var.copy_(torch.rand(C) + 0.5)
    return model


def data(count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """A whole batch off the running statistics, weights and the cotangent."""
    g = torch.Generator().manual_seed(9)
    x = 2 * torch.randn(count, C, 4, 2, generator=g, dtype=torch.float64) + 3
    mask = torch.rand(count, 1, 4, 2, generator=g, dtype=torch.float64)
    return x, mask * (mask > 0.3), torch.randn(x.shape, generator=g, dtype=torch.float64)


def oracle(layer: Any, x: Tensor, mask: Tensor | None, choice: Any) -> Tensor:
    """The formula on the whole batch, by plain operators."""
    dims, shape = (0, 2, 3), (1, C, 1, 1)
    w = torch.ones_like(x[:, :1]) if mask is None else mask
    n = w.sum()
    mean = (w * x).sum(dims) / n
    var = (w * (x - mean.view(shape)) ** 2).sum(dims) / n
    a = {"running": 1.0, "batch": 0.0}.get(choice)
    if isinstance(choice, Mix):
        a = choice.source
    elif isinstance(choice, Prior):
        a = choice.samples / (choice.samples + x.shape[0])
    mean = a * layer.running_mean + (1 - a) * mean
    var = a * layer.running_var + (1 - a) * var
    y = (x - mean.view(shape)) / (var + layer.eps).sqrt().view(shape)
    return y if layer.weight is None else y * layer.weight.view(shape) + layer.bias.view(shape)


def run(
    kind: str, choice: Any, x: Tensor, mask: Tensor | None, cotangent: Tensor
) -> dict[str, Any]:
    """Evaluate this rank's shard with gradients, and without."""
    model = prepare_ddp(make(kind))
    before = state_of(model)
    x = x.clone().requires_grad_()
    arguments = () if mask is None else (mask,)
    with evaluation_statistics(model, choice), exchange.record() as made:
        y = model[0](x, *arguments)
        y.backward(cotangent)
    with evaluation_statistics(model, choice), torch.no_grad(), exchange.record() as quiet:
        again = model[0](x, *arguments)
    now = state_of(model)
    return {
        "y": y.detach(),
        "again": again,
        "dx": x.grad,
        "dp": [p.grad for p in model.parameters()],
        "is_kept": all(torch.equal(now[key], value) for key, value in before.items()),
        "sent": [(e.kind, e.numel) for e in made],
        "quiet": [(e.kind, e.numel) for e in quiet],
        "plain": model(x.detach()),
    }


def compare(pool, kind: str, choice: Any, sizes: tuple[int, ...], has_mask: bool) -> list[Any]:
    """Hold the ranks against the whole batch; what they returned."""
    x, mask, cotangent = data(sum(sizes))
    masks = shard(mask, sizes) if has_mask else [None] * len(sizes)
    ranks = pool(len(sizes)).run_each(
        run,
        [(kind, choice, *each) for each in zip(shard(x, sizes), masks, shard(cotangent, sizes))],
    )
    layer = make(kind)[0]
    x.requires_grad_()
    y = oracle(layer, x, mask if has_mask else None, choice)
    dx, *dp = torch.autograd.grad(y, [x, *layer.parameters()], cotangent)
    for name in ("y", "again"):
        assert_close(torch.cat([r[name] for r in ranks]), y, torch.float64, name)
    assert_close(torch.cat([r["dx"] for r in ranks]), dx, torch.float64, "dx")
    for number, expected in enumerate(dp):
        assert_close(sum(r["dp"][number] for r in ranks), expected, torch.float64, "dp")
    assert all(r["is_kept"] for r in ranks)
    return ranks


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("has_mask", [False, True])
def test_equals_the_whole_batch(pool, choice, sizes, has_mask):
    for rank in compare(pool, "batch", choice, sizes, has_mask):
        room = 2 * C + 1 + isinstance(choice, Prior)
        if choice == "running":
            assert rank["sent"] == rank["quiet"] == []
            assert torch.equal(rank["again"], rank["plain"])
        elif len(sizes) > 1:
            assert [kind for kind, _ in rank["sent"]] == ["moments", "gradients"]
            assert rank["sent"] == [
                ("moments", exchange.size_of(room)),
                ("gradients", exchange.size_of(2 * C)),
            ]
            assert rank["quiet"] == rank["sent"][:1]


@pytest.mark.parametrize("choice", ["batch", Mix(0.7), Prior(4)], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_all_kinds_of_layers(pool, kind, choice):
    compare(pool, kind, choice, (3, 2), has_mask=False)


def detached(x: Tensor, *rest: Any) -> Any:
    return MOMENTS(x.detach(), *rest)


def local(sums: Any, group: Any, name: str) -> Tensor:
    return sums.sums


MOMENTS = mixed.moments_of_sums


@pytest.mark.parametrize("defect", ["no gradient of the moments", "not pooled", "other weight"])
def test_a_planted_defect_is_seen(pool, defect):
    x, _, cotangent = data()
    ranks = pool(2).run_each(
        planted, [(defect, *each) for each in zip(shard(x, (3, 2)), shard(cotangent, (3, 2)))]
    )
    x.requires_grad_()
    y = oracle(make("batch")[0], x, None, Mix(0.7))
    (dx,) = torch.autograd.grad(y, x, cotangent)
    is_same = torch.allclose(torch.cat([r["y"] for r in ranks]), y)
    assert is_same == (defect == "no gradient of the moments")
    assert not torch.allclose(torch.cat([r["dx"] for r in ranks]), dx)


def planted(defect: str, x: Tensor, cotangent: Tensor) -> dict[str, Any]:
    """Evaluate with one thing wrong."""
    with pytest.MonkeyPatch.context() as patch:
        if defect == "no gradient of the moments":
            patch.setattr(mixed, "moments_of_sums", detached)
        elif defect == "not pooled":
            patch.setattr(mixed, "_pooled_sums", local)
        choice = Mix(0.3) if defect == "other weight" else Mix(0.7)
        return run("batch", choice, x, None, cotangent)


def uneven_gradients(x: Tensor) -> list[str]:
    """Only rank 0's input needs a gradient, and no parameter does."""
    model = make("plain")
    x = x.clone().requires_grad_(dist.get_rank() == 0)
    with evaluation_statistics(model, Mix(0.5)), exchange.record() as made:
        model(x).square().sum().backward()
    return [e.kind for e in made]


def test_workers_may_differ_in_what_needs_a_gradient(pool):
    x, _, _ = data()
    by_rank = pool(2).run_each(uneven_gradients, [(part,) for part in shard(x, (3, 2))])
    assert by_rank == [["moments", "gradients"]] * 2


def test_differentiates_twice():
    layer = make("batch")
    x = data(2)[0].requires_grad_()
    for choice in ("batch", Mix(0.7)):
        with evaluation_statistics(layer, choice):
            assert torch.autograd.gradgradcheck(layer, x)


def one_value(choice: Any) -> tuple[Tensor, Tensor]:
    """A batch of one value over all workers; and one in which nothing counts."""
    model = make("batch")
    x = torch.full((int(dist.get_rank() == 1), C, 1, 1), 3.0, dtype=torch.float64)
    with evaluation_statistics(model, choice):
        return model(x), model[0](x, torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize("choice", ["batch", Mix(0.7), Prior(3)], ids=str)
def test_a_batch_of_one_value_and_one_in_which_nothing_counts(pool, choice):
    layer = make("batch")[0]
    x = torch.full((1, C, 1, 1), 3.0, dtype=torch.float64)
    expected = oracle(layer, x, None, choice)
    empty, (y, nothing) = pool(2).run(one_value, choice)
    assert all(t.shape == (0, C, 1, 1) for t in empty)
    assert_close(y, expected, torch.float64, "y")
    bias = layer.bias.detach().view(1, C, 1, 1)
    assert_close(nothing, bias if choice == "batch" else layer(x), torch.float64, "y")


def _under(layer: nn.Module, x: Tensor, choice: Any) -> Tensor:
    with evaluation_statistics(layer, choice):
        return layer(x)


@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize("kind", ["batch", "torch", "estimated"])
def test_statistics_without_weight_may_be_nan(kind, has_grad):
    x = data()[0]
    layer = make_family(kind) if kind in FAMILY else make(kind)[0]
    as_batch, as_running = _under(layer, x, "batch"), layer(x)
    wrong = torch.cat([x, torch.full_like(x[:1], torch.nan)])
    with torch.set_grad_enabled(has_grad):
        y = _under(layer, wrong, Mix(1.0))
        assert_close(y[:-1], as_running, torch.float64, "y")
        layer.running_mean.fill_(torch.nan)
        for choice in (Mix(0.0), Prior(0.0)):
            assert_close(_under(layer, x, choice), as_batch, torch.float64, str(choice))


def _by_itself(layer: nn.Module, x: Tensor, choice: Any, cotangent: Tensor) -> list[Tensor]:
    """Output and gradients by the batch's own statistics, in training (None) or evaluation."""
    x = x.clone().requires_grad_()
    if choice is None:
        y = layer.train()(x)
    else:
        y = _under(layer.eval(), x, choice)
        with torch.no_grad():
            assert torch.equal(_under(layer, x, choice), y)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], cotangent)]


@pytest.mark.parametrize("choice", ["batch", Mix(0.0)], ids=str)
@pytest.mark.parametrize("kind", ["batch", "torch", "membrane"])
def test_a_large_mean_costs_no_more_than_in_training(kind, choice):
    torch.manual_seed(2)
    x, cotangent = torch.randn(16, C, 5, 6) + 1e4, torch.randn(16, C, 5, 6)
    truth = _by_itself(SyncBatchNorm(C).double(), x.double(), None, cotangent.double())
    trained = _by_itself(SyncBatchNorm(C), x, None, cotangent)
    layer = {"torch": nn.BatchNorm2d, "membrane": MembranePotentialBatchNorm}.get(
        kind, SyncBatchNorm
    )
    got = _by_itself(layer(C), x, choice, cotangent)
    for ours, reference, exact in zip(got, trained, truth, strict=True):
        rounding = 1e-6 * exact.abs().max()
        error, allowed = (ours - exact).abs().max(), (reference - exact).abs().max()
        assert error <= 2 * allowed + rounding


def samples_of_other_sizes() -> Tensor:
    """Each rank's samples have a size of their own."""
    rank = dist.get_rank()
    model = make("batch")
    x = data()[0][: 2 - rank, :, : 3 + rank]
    with evaluation_statistics(model, Prior(2)):
        return model(x).flatten(2)


def test_a_prior_counts_samples_whatever_their_size(pool):
    x, layer = data()[0], make("batch")[0]
    parts = [x[:2, :, :3], x[:1, :, :4]]
    whole = torch.cat([p.transpose(0, 1).flatten(1) for p in parts], 1)  # (C, values)
    a = 2 / (2 + 3)
    mean = a * layer.running_mean + (1 - a) * whole.mean(1)
    var = a * layer.running_var + (1 - a) * whole.var(1, unbiased=False)
    for got, part in zip(pool(2).run(samples_of_other_sizes), parts):
        y = nn.functional.batch_norm(part, mean, var, layer.weight, layer.bias, eps=layer.eps)
        assert_close(got, y.flatten(2), torch.float64, "y")


def alone() -> tuple[Tensor, Tensor, int]:
    rank = dist.get_rank()
    model = make("batch")
    x = data()[0][rank : rank + 2]
    with evaluation_statistics(model, "batch", process_group=1), exchange.record() as made:
        y = model(x)
    return y, oracle(model[0], x, None, "batch"), len(made)


def test_a_process_group(pool):
    for y, expected, sent in pool(2).run(alone):
        assert_close(y, expected, torch.float64, "y")
        assert sent == 0


def wrong_mask() -> str:
    model = make("batch")
    try:
        with evaluation_statistics(model, Prior(3)):
            model[0](data()[0], torch.full((1, 1, 1, 1), -1.0 if dist.get_rank() else 1.0))
    except FaultError as error:
        return str(error)
    return "nothing was raised"


def test_a_wrong_mask_is_the_same_error_on_every_worker(pool):
    first, second = pool(2).run(wrong_mask)
    assert first == second
    assert "`mask` must hold finite weights >= 0, got -1 (shape (5, 1, 4, 2), rank 1)" in first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_grad", [False, True])
def test_other_types(dtype, has_grad):
    model, wide = make("batch").to(dtype), make("batch")
    wide.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    x = data()[0].to(dtype)
    with evaluation_statistics(model, Mix(0.6)), torch.set_grad_enabled(has_grad):
        y = model(x)
    assert y.dtype == dtype
    assert_close(y, oracle(wide[0], x.double(), None, Mix(0.6)), dtype, "y")


@pytest.mark.parametrize("kind", ["batch", "torch"])
def test_blocks_end_where_they_should(kind):
    model, x = make(kind), data()[0]
    plain = model(x)
    with evaluation_statistics(model, "batch"):
        batch = model(x)
        with evaluation_statistics(model, "running"):
            assert torch.equal(model(x), plain)
        assert torch.equal(model(x), batch)
        with pytest.raises(IndexError), evaluation_statistics(model, Mix(0.5)):
            torch.zeros(2).sum(3)
        assert torch.equal(model(x), batch)
    assert not torch.allclose(batch, plain)
    assert torch.equal(model(x), plain)
    assert "forward" not in vars(model[0])


def repeated(
    name: str, choice: Any, x: Tensor, cotangent: Tensor, how: dict[str, Any] | None
) -> list[Any]:
    """Evaluate with gradients, rank 1 within a checkpoint: output, gradient and messages."""
    layer = make_family(name) if name in FAMILY else make(name)[0]
    x = x.clone().requires_grad_()
    with evaluation_statistics(layer, choice), exchange.record() as sent:
        if how is not None and dist.get_rank() == 1:
            y = checkpoint(layer, x, use_reentrant=False, **how)
        else:
            y = layer(x)
        y.backward(cotangent)
    return [y.detach(), x.grad, [each.kind for each in sent]]


@pytest.mark.parametrize("how", [{}, {"context_fn": selective_contexts}], ids=["all", "some"])
@pytest.mark.parametrize("choice", [Mix(0.7), Prior(4)], ids=str)
@pytest.mark.parametrize("name", ["batch", "torch", "l1", "evo", "channel"])
def test_a_forward_that_one_worker_repeats_exchanges_nothing(pool, name, choice, how):
    x, _, cotangent = data()
    parts = [*zip(shard(x, (3, 2)), shard(cotangent, (3, 2)))]
    again = pool(2).run_each(repeated, [(name, choice, *each, how) for each in parts])
    plain = pool(2).run_each(repeated, [(name, choice, *each, None) for each in parts])
    for got, expected in zip(again, plain, strict=True):
        assert_close(got[0], expected[0], torch.float64, "y")
        assert_close(got[1], expected[1], torch.float64, "dx")
    assert again[0][2] == again[1][2] == plain[1][2]


@pytest.mark.parametrize("kind", ["batch", "torch"])
def test_compiled_models_take_part_in_the_block(kind):
    model, x = make(kind), data()[0]
    compiled = torch.compile(model, backend="eager")
    plain = compiled(x)
    with evaluation_statistics(model, Mix(0.5)):
        assert_close(compiled(x), oracle(model[0], x, None, Mix(0.5)), torch.float64, "y")
    assert torch.equal(compiled(x), plain)


def test_under_a_transform_it_is_an_error():
    layer, x = make("batch")[0], data()[0]
    message = re.escape(
        "`statistics` must be \"running\" under a transform of torch.func, got 'batch'"
    )
    with evaluation_statistics(layer, "batch"), pytest.raises(InputError, match=message):
        torch.func.vmap(layer)(x[:, None])


def test_copies_and_pickles_of_the_block_are_not_part_of_it():
    model, x = make("batch"), data()[0]
    plain = model(x)
    with evaluation_statistics(model, "batch"):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
            assert torch.equal(other(x), plain)
        with accumulate(model):
            assert not torch.allclose(model(x), plain)
        with pytest.raises(InputError, match="is used by accumulate, evaluation_statistics or"):
            convert(model, SyncBatchRenorm)


FAMILY = {
    "l1": L1BatchNorm,
    "evo": EvoNorm,
    "channel": BatchChannelNorm,
    "estimated": EstimatedBatchNorm,
    "membrane": MembranePotentialBatchNorm,
    "balanced": BalancedBatchNorm,
    "online": OnlineNorm,
    "power": partial(PowerNorm, scaling_groups=0),
    "unified": UnifiedNorm,
    "mabn": MABN,
}
# Of these a training forward is no evaluation by the batch's statistics.
OTHERWISE = ("estimated", "balanced", "online", "power", "unified", "mabn")


def family_batch(name: str, x: Tensor) -> dict[str, Tensor]:
    """What the family's layers normalise a batch by."""
    mean = x.mean((0, 2, 3))
    centered = x - mean.view(1, C, 1, 1)
    if name == "l1":
        deviation = (torch.pi / 2) ** 0.5 * centered.abs().mean((0, 2, 3))
        return {"running_mean": mean, "running_deviation": deviation}
    var = centered.square().mean((0, 2, 3))
    if name in ("power", "unified", "mabn"):
        return {"running_square": x.square().mean((0, 2, 3))}
    return {"running_var": var} if name == "evo" else {"running_mean": mean, "running_var": var}


def make_family(name: str) -> nn.Module:
    torch.manual_seed(3)
    layer = FAMILY[name](C, sync="none").double()
    for _ in range(3):
        layer(torch.randn(6, C, 4, 2, dtype=torch.float64))
    return layer.eval()


def run_family(name: str, choice: Any, x: Tensor, cotangent: Tensor) -> list[Any]:
    layer = make_family(name)
    before = state_of(layer)
    x = x.clone().requires_grad_()
    with evaluation_statistics(layer, choice), exchange.record() as made:
        y = layer(x)
        y.backward(cotangent)
        layer.train()
        with pytest.raises(InputError, match="must be in evaluation mode"):
            layer(x)
        layer.eval()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert not {"evaluate", "normalize"} & vars(layer).keys()
    return [y.detach(), x.grad, [p.grad for p in layer.parameters()], len(made)]


@pytest.mark.parametrize("choice", ["running", "batch", Mix(0.7), Prior(4)], ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_layers_of_the_family(pool, name, choice):
    x, _, cotangent = data()
    sizes = (1, 0, 4)
    ranks = pool(3).run_each(
        run_family,
        [(name, choice, *each) for each in zip(shard(x, sizes), shard(cotangent, sizes))],
    )
    layer = make_family(name)
    a = {"running": 1.0, "batch": 0.0, Mix(0.7): 0.7, Prior(4): 4 / 9}[choice]
    x.requires_grad_()
    mixed = {
        key: a * layer.get_buffer(key) + (1 - a) * value
        for key, value in family_batch(name, x).items()
    }
    y = torch.func.functional_call(layer, mixed, x)
    inputs = [x, *layer.parameters()]
    dx, *dp = torch.autograd.grad(y, inputs, cotangent)
    assert_close(torch.cat([r[0] for r in ranks]), y, torch.float64, "y")
    assert_close(torch.cat([r[1] for r in ranks]), dx, torch.float64, "dx")
    for number, expected in enumerate(dp):
        assert_close(sum(r[2][number] for r in ranks), expected, torch.float64, "dp")
    assert {r[3] for r in ranks} == {
        0 if choice == "running" else (4 if name == "l1" else 2) + isinstance(choice, Prior)
    }
    if choice == "batch" and name not in OTHERWISE:
        assert_close(y, layer.train()(x), torch.float64, "a training forward")


class Unknown(FamilyLayer):
    """A method that does not say what it normalises by."""

    def evaluate(self, x: Tensor) -> Tensor:
        return x / 2


@pytest.mark.parametrize(
    ("model", "choice", "message"),
    [
        (SyncBatchNorm(C), "mix", '`statistics` must be "running", "batch", a Mix or a Prior, got \'mix\''),
        (nn.Sequential(OwnForward(C)), "batch", "must have batch norms whose statistics can be chosen, got ['0']"),
        (nn.Sequential(Unknown(C)), "batch", "`batch_statistics`, which takes those of a batch, got '0' (Unknown)"),
        (nn.Sequential(HomeMade(C)), Mix(0.5), "must have batch norms whose statistics can be chosen, got ['0']"),
        (nn.Sequential(nn.BatchNorm1d(C, track_running_stats=False)), Prior(2),
         "`statistics` must be \"batch\" for layers without running statistics, got Prior(samples=2) for ['0']"),
    ],
)  # fmt: skip
def test_what_is_refused(model, choice, message):
    with pytest.raises(InputError, match=re.escape(message)), evaluation_statistics(model, choice):
        raise AssertionError("the block must not begin")


@pytest.mark.parametrize("layer", [OwnForward(C), HomeMade(C), Unknown(C)], ids=type)
def test_those_evaluate_as_ever_by_running_statistics(layer):
    layer, x = layer.double().eval(), data()[0]
    plain = layer(x)
    with evaluation_statistics(layer, "running"):
        assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("kind", ["batch", "torch", "lagged"])
def test_training_within_the_block_is_an_error(kind):
    model = make(kind).train()
    with (
        evaluation_statistics(model),
        pytest.raises(InputError, match="must be in evaluation mode within evaluation_statistics"),
    ):
        model(data()[0])


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda: Mix(1.2), "`source` must be in [0, 1], got 1.2"),
        (lambda: Mix(float("nan")), "`source` must be in [0, 1], got nan"),
        (lambda: Prior(-1), "`samples` must be finite and >= 0, got -1"),
    ],
)
def test_bad_arguments(make_one, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make_one()


def test_layers_without_running_statistics_take_the_batch():
    layer = SyncBatchNorm(C, track_running_stats=False, dtype=torch.float64).eval()
    x = data()[0]
    with evaluation_statistics(layer, "batch"):
        assert_close(layer(x), oracle(layer_with_zero(layer), x, None, "batch"), torch.float64, "y")


def layer_with_zero(layer: nn.Module) -> nn.Module:
    """The oracle multiplies running statistics by 0."""
    other = SyncBatchNorm(C, dtype=torch.float64)
    other.weight, other.bias = layer.weight, layer.bias
    return other
