"""State dicts and copies."""

from __future__ import annotations

import copy
import io
import pickle

import torch
from torch import Tensor, nn

from syncnorm.verify.check import check
from syncnorm.verify.compare import expect, expect_close, expect_same_bits, expect_shards
from syncnorm.verify.context import Context
from syncnorm.verify.oracle import Oracle, parameters, random_batch
from syncnorm.verify.steps import make_layer, my_shard, plainly, ragged, train_step


@check("state-dict-keys", "the state dict has the keys and shapes of torch.nn.BatchNorm's")
def state_dict_keys(context: Context) -> None:
    got = {name: tuple(t.shape) for name, t in make_layer(context, 4).state_dict().items()}
    expected = {name: tuple(t.shape) for name, t in nn.BatchNorm2d(4).state_dict().items()}
    expect(got == expected, f"state dict has {got}, should have {expected}")


@check(
    "loads-batch-norm", "it loads that of a trained torch.nn.BatchNorm, and evaluates as that does"
)
def loads_batch_norm(context: Context) -> None:
    theirs = nn.BatchNorm1d(4).double()
    theirs(random_batch(6).x)
    ours = make_layer(context, 4)
    ours.load_state_dict(theirs.state_dict())
    x = random_batch(3, seed=1).x
    expect_same_bits(
        "output in evaluation", ours.eval()(x.to(context.device)).cpu(), theirs.eval()(x)
    )


@check(
    "state-dict-round-trip",
    "a layer that loads the state dict of a trained one goes on with the same bits",
)
def state_dict_round_trip(context: Context) -> None:
    def copied(layer: nn.Module) -> nn.Module:
        fresh = make_layer(context, 4)
        buffer = io.BytesIO()
        torch.save(layer.state_dict(), buffer)
        fresh.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
        return fresh

    _goes_on(context, copied, "a layer with its state dict")


@check("deepcopy", "a deep copy goes on with the same bits, and by itself")
def deep_copied(context: Context) -> None:
    _goes_on(context, copy.deepcopy, "a deep copy")


@check("pickle", "so does a pickled one")
def pickled(context: Context) -> None:
    _goes_on(context, lambda layer: pickle.loads(pickle.dumps(layer)), "a pickled copy")  # noqa: S301 of our own


@check("moves-to-a-type", "a layer may be cast: .double() of a float32 one trains in float64")
def cast(context: Context) -> None:
    sizes = ragged(context.world_size)
    layer = context.under_test.make(4).to(context.device).double()
    for name, t in layer.state_dict().items():
        wanted = torch.float64 if t.is_floating_point() else torch.int64
        expect(t.dtype == wanted, f"{name} is {t.dtype} after .double(), should be {wanted}")
    got = train_step(context, layer, random_batch(sum(sizes)), sizes)
    expect(got[0].y.dtype == torch.float64, f"output is {got[0].y.dtype} after .double()")


@check(
    "half-layer",
    "after .half() weights are float16, statistics are not, and it trains",
    needs="float32 statistics",
)
def half_layer(context: Context) -> None:
    sizes = ragged(context.world_size)
    batch = random_batch(sum(sizes), dtype=torch.float16)
    layer, oracle = make_layer(context, 4, torch.float16), Oracle(context.under_test, 4, {})
    oracle.weight, oracle.bias = (p.half().double().requires_grad_() for p in parameters(4))
    got = train_step(context, layer.to(torch.float16), batch, sizes)
    for name, t in layer.state_dict().items():
        wanted = {
            "weight": torch.float16,
            "bias": torch.float16,
            "num_batches_tracked": torch.int64,
        }
        wanted = wanted.get(name, torch.float32)
        expect(t.dtype == wanted, f"{name} is {t.dtype} after .half(), should be {wanted}")
    truth = oracle.step(batch, plainly)
    expect_shards("output", [step.y for step in got], truth.y, sizes, torch.float16)
    for rank, step in enumerate(got):
        for name, value in truth.buffers.items():
            expect_close(f"{name} of rank {rank}", step.buffers[name], value, torch.float32)


def _goes_on(context: Context, make_copy, what: str) -> None:
    """After a step in common, layer and copy take the same second step, each by itself."""
    sizes = ragged(context.world_size)
    layer = make_layer(context, 4)
    train_step(context, layer, random_batch(sum(sizes)), sizes)
    other = make_copy(layer)
    ours, theirs = (_second(context, each, sizes) for each in (layer, other))
    for name, value in ours.items():
        expect_same_bits(f"{name} of {what}, on rank {context.rank},", theirs[name], value)


def _second(context: Context, layer: nn.Module, sizes: list[int]) -> dict[str, Tensor]:
    x, cotangent, _ = my_shard(context, random_batch(sum(sizes), seed=1), sizes)
    layer.zero_grad()
    x.requires_grad_()
    y = layer(x)
    y.backward(cotangent)
    assert x.grad is not None
    return {
        "output": y.detach(),
        "input gradient": x.grad,
        **{k: b.clone() for k, b in layer.named_buffers()},
    }
