"""sync="lagged" on live workers against the same rule in one float64 process."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm import (
    Lagged,
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    accumulate,
    prepare_ddp,
    scale_loss,
)
from syncnorm.comm import exchange
from syncnorm.errors import InputError
from syncnorm.reference import LaggedBatchNorm

CHANNELS = (6, 5)


OPTIONS = Lagged(forward_rate=0.3, backward_rate=0.1, max_drift=0.25)


class ReferenceNorm(nn.Module):
    """The oracle with a layer's parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(channels, dtype=torch.float64))
        self.rule = LaggedBatchNorm(
            channels, OPTIONS.forward_rate, OPTIONS.backward_rate, OPTIONS.max_drift, eps=1e-5
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.rule(x, self.weight, self.bias, mask)


class Net(nn.Module):
    def __init__(self, norm) -> None:
        super().__init__()
        torch.manual_seed(0)
        first, second = CHANNELS
        self.conv1, self.norm1 = nn.Conv1d(3, first, 3, dtype=torch.float64), norm(first)
        self.conv2, self.norm2 = nn.Conv1d(first, second, 1, dtype=torch.float64), norm(second)
        self.head = nn.Linear(second, 2, dtype=torch.float64)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x), mask))
        x = torch.relu(self.norm2(self.conv2(x), mask))
        return self.head(x.mean(2))


def _data(steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Batches of 9 whose mean and scale jump now and then, so that the guard fires, and masks of
    weights.
    """
    g = torch.Generator().manual_seed(1)
    data = []
    for step in range(steps):
        jump = 1.0 + 0.8 * (step // 6 % 2)
        x = torch.randn(9, 3, 8, generator=g, dtype=torch.float64) * jump + 0.3 * torch.arange(
            9.0
        ).view(-1, 1, 1)
        y = torch.randn(9, 2, generator=g, dtype=torch.float64)
        data.append((x, y, torch.randint(0, 3, (9, 1, 6), generator=g).double()))
    return data


def _oracle(
    data: list[tuple[Tensor, Tensor, Tensor]],
) -> tuple[list[float], list[list[bool]], dict[str, Tensor]]:
    model = Net(ReferenceNorm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses, waits = [], []
    for x, y, mask in data:
        waits.append([model.norm1.rule.waits, model.norm2.rule.waits])
        optimizer.zero_grad()
        loss = (model(x, mask) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        model.norm1.rule.step()
        model.norm2.rule.step()
    state = {k: v.detach() for k, v in model.named_parameters()}
    for name in ("norm1", "norm2"):
        rule = getattr(model, name).rule
        state[f"{name}.running_mean"], state[f"{name}.running_var"] = (
            rule.running.mean,
            rule.running.var,
        )
        state[f"{name}.lagged_mean"], state[f"{name}.lagged_var"] = rule.average
        state[f"{name}.lagged_gradient"] = torch.stack(rule.gradient)
        state[f"{name}.lagged_waits"] = torch.tensor(int(rule.waits))
    return losses, waits, state


def _norm(channels: int) -> SyncBatchNorm:
    return SyncBatchNorm(channels, dtype=torch.float64, sync=OPTIONS)


def _live(
    data: list[tuple[Tensor, Tensor, Tensor]], sizes: tuple[int, ...], stop_at: int | None = None
) -> tuple[list[float], list[list[tuple[str, int]]], dict[str, Tensor]]:
    """Train on this rank's shards; with `stop_at`, save, build anew and resume there."""
    rank = dist.get_rank()
    model, optimizer, wrapped = _build()
    losses, exchanges = [], []
    for step, batch in enumerate(data):
        if step == stop_at:
            saved = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
            saved.seek(0)
            state = torch.load(saved, weights_only=True)
            model, optimizer, wrapped = _build()
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        x, y, mask = (t.split(list(sizes))[rank] for t in batch)
        optimizer.zero_grad()
        with exchange.record() as record:
            out = wrapped(x, mask)
            loss = (out - y).square().mean() if len(x) else out.sum() * 0.0
            scaled = scale_loss(loss, len(x))
            scaled.backward()
        optimizer.step()
        exchanges.append([(e.kind, e.numel) for e in record])
        losses.append(scaled.detach())
    curve = torch.stack(losses)
    dist.all_reduce(curve)
    return (
        (curve / len(sizes)).tolist(),
        exchanges,
        {k: v.clone() for k, v in model.state_dict().items()},
    )


def _build() -> tuple[nn.Module, torch.optim.Optimizer, nn.Module]:
    model = prepare_ddp(Net(_norm))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    # DDP rearranges its buckets after the first backward pass unless it looks for unused
    # parameters, and a resumed run would add up the gradients of three workers in another order.
    return model, optimizer, DistributedDataParallel(model, find_unused_parameters=True)


@pytest.fixture(scope="module")
def oracle():
    return _oracle(_data(20))


@pytest.mark.parametrize("sizes", [(9,), (6, 3), (4, 0, 5), (2, 6, 1)], ids=str)
def test_equals_the_rule_in_one_process(pool, oracle, sizes):
    losses, waits, state = oracle
    for curve, _, got in pool(len(sizes)).run(_live, _data(20), sizes):
        assert curve == pytest.approx(losses, rel=1e-10)
        for name, value in state.items():
            # Every worker's loss carries DDP's factor, the number of workers, and so do gradient
            # means.
            value = value * len(sizes) if name.endswith("gradient") else value
            torch.testing.assert_close(
                got[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert {name for name in got if "lagged" in name and "updates" not in name} <= state.keys()
    fired = [any(w) for w in waits[2:]]
    assert any(fired), "the guard must fire"
    assert not all(fired), "and not always"


def test_two_messages_a_step_and_two_per_waiting_layer(pool, oracle):
    _, waits, _ = oracle
    for _, exchanges, _ in pool(3).run(_live, _data(20), (2, 6, 1)):
        for step, (record, waiting) in enumerate(zip(exchanges, waits, strict=True)):
            room, together = 2 * max(CHANNELS) + 2, sum(2 * c + 1 for c in CHANNELS)
            flat = [("all moments", exchange.size_of(together + 3))]
            moments = [("moments", room)] * sum(waiting)
            gradients = [("gradients", room)] * sum(waiting)
            flat_gradients = [("all gradients", exchange.size_of(together))]
            assert record == moments + flat + [("count", room)] + gradients + flat_gradients, step


def _waits_of_quiet_steps() -> list[int]:
    """How often a layer that never drifts waits, by step."""
    model = prepare_ddp(nn.Sequential(SyncBatchNorm(3, sync=Lagged(max_drift=float("inf")))))
    waits = []
    for _ in range(4):
        with exchange.record() as record:
            model(torch.randn(5, 3)).square().mean().backward()
        waits.append(sum(e.kind in ("moments", "gradients") for e in record))
    return waits


def test_the_first_two_steps_wait(pool):
    """The first change of the weights is apart from any drift that was seen."""
    assert pool(2).run(_waits_of_quiet_steps) == [[2, 2, 0, 0]] * 2


@pytest.mark.parametrize("sizes", [(9,), (2, 6, 1)], ids=str)
def test_a_resumed_run_is_exact(pool, sizes):
    """Bit for bit, with a stop in the middle of averaging and with a drifting layer."""
    whole = pool(len(sizes)).run(_live, _data(12), sizes)
    for stop_at in (1, 6, 7):
        resumed = pool(len(sizes)).run(_live, _data(12), sizes, stop_at)
        for (curve, _, state), (expected_curve, _, expected) in zip(resumed, whole, strict=True):
            assert curve == expected_curve
            assert all(torch.equal(state[k], v) for k, v in expected.items())


def test_without_attachment_it_is_an_error_on_several_workers(pool):
    message = pool(2).run(_unattached, "lagged")[0]
    assert pool(2).run(_unattached, "lagged") == [message] * 2
    assert "got 'lagged' in SyncBatchNorm(3," in message
    assert "Call prepare_ddp(model) on every worker" in message


def _unattached(sync: str) -> str:
    try:
        SyncBatchNorm(3, sync=sync)(torch.randn(4, 3))
        return "no error"
    except InputError as error:
        return str(error)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lagged(forward_rate=0.0), r"`forward_rate` must be in \(0, 1\], got 0.0"),
        (lambda: Lagged(backward_rate=1.5), r"`backward_rate` must be in \(0, 1\], got 1.5"),
        (lambda: Lagged(max_drift=-1.0), r"`max_drift` must be >= 0, got -1.0"),
        (lambda: Lagged(max_drift=float("nan")), r"`max_drift` must be >= 0, got nan"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(InputError, match=message):
        make()


def _untidy_steps() -> list[list[str]]:
    """Messages of steps that are not forward-then-backward, in the order in which they leave."""
    torch.manual_seed(dist.get_rank())
    model = prepare_ddp(nn.Sequential(SyncBatchNorm(3, sync=Lagged(max_drift=float("inf")))))
    x = torch.randn(5, 3)
    kinds = []
    with exchange.record() as record:
        model(x).square().mean().backward()
        kinds.append(len(record))
        with torch.no_grad():
            model(x)
        kinds.append(len(record))
        first, second = model(x), model(x)
        (first * second).mean().backward()
        kinds.append(len(record))
        if dist.get_rank() == 0:
            model.eval()(x)
            model.state_dict()
            model.train()
        model(x).square().mean().backward()
        with accumulate(model):
            for _ in range(2):
                model(x).square().mean().backward()
    return [[e.kind for e in record], [str(k) for k in kinds]]


def test_messages_keep_their_order_in_untidy_steps(pool):
    answers = pool(2).run(_untidy_steps)
    assert answers == [answers[0]] * 2
    kinds = [kind for kind in answers[0][0] if kind.startswith("all")]
    assert kinds == ["all moments", "all gradients"] * 6


def test_a_copy_is_independent():
    model = prepare_ddp(nn.Sequential(SyncBatchNorm(3, sync="lagged")))
    model(torch.randn(5, 3)).square().mean().backward()
    other = copy.deepcopy(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    other(torch.randn(5, 3))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert int(other.state_dict()["0.num_batches_tracked"]) == 2


def _renorm_lagged() -> tuple[Tensor, Tensor]:
    """Unclipped, lagged renormalisation is normalisation by the running statistics, whatever the
    averages.
    """
    torch.manual_seed(0)
    layer = SyncBatchRenorm(
        3, schedule=RenormSchedule.constant(1e6, 1e6), sync="lagged", dtype=torch.float64
    )
    model = prepare_ddp(nn.Sequential(layer))
    for seed in range(4):
        g = torch.Generator().manual_seed(10 * dist.get_rank() + seed)
        x = torch.randn(5, 3, generator=g, dtype=torch.float64)
        model(x).square().mean().backward()
    running_mean, running_var = layer.running_mean.clone(), layer.running_var.clone()
    y = model(x).detach()
    expected = (x - running_mean) / torch.sqrt(running_var + layer.eps)
    return y, expected


def test_renorm_takes_lagged_statistics_too(pool):
    for y, expected in pool(2).run(_renorm_lagged):
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


def _overflow(where: str) -> list[bool]:
    """One step whose input or gradient overflows on one worker, then ordinary ones: what is finite
    in each.
    """
    torch.manual_seed(0)
    model = prepare_ddp(nn.Sequential(SyncBatchNorm(3, sync="lagged", affine=False)))
    finite = []
    for step in range(5):
        g = torch.Generator().manual_seed(10 * dist.get_rank() + step)
        x = torch.randn(5, 3, generator=g)
        is_bad = step == 2 and dist.get_rank() == 0
        if is_bad and where == "input":
            x[0, 0] = torch.inf
        x.requires_grad_()
        y = model(x)
        (y * torch.randn(5, 3, generator=g)).mean().mul(
            torch.inf if is_bad and where == "gradient" else 1.0
        ).backward()
        finite.append(bool(y.isfinite().all() and x.grad.isfinite().all()))
    return finite


@pytest.mark.parametrize("where", ["input", "gradient"])
def test_an_overflow_passes(pool, where):
    """A gradient scaler skips such a step; averages that took it in would never be finite again."""
    answers = pool(2).run(_overflow, where)
    assert answers[0] == [True, True, False, True, True]
    assert answers[1][3:] == [True, True]


def _several_backward_passes() -> list[int]:
    """Gradients of one layer's output taken twice before the whole backward pass (GradNorm,
    PCGrad).
    """
    torch.manual_seed(dist.get_rank())
    model = prepare_ddp(
        nn.Sequential(SyncBatchNorm(3, sync="lagged"), SyncBatchNorm(3, sync="lagged"))
    )
    y = model(torch.randn(5, 3))
    for _ in range(2):
        torch.autograd.grad(y.square().mean(), model[1].weight, retain_graph=True)
    y.square().mean().backward()
    state = model.state_dict()
    return [int(state[f"{i}.lagged_updates"][1]) for i in range(2)]


def test_the_message_waits_for_all_layers_not_for_as_many_calls(pool):
    assert pool(2).run(_several_backward_passes) == [[1, 1]] * 2


def _accumulated_rounds() -> list[str]:
    """Micro-batches whose graphs are freed one after the other, and their memory perhaps used
    again.
    """
    torch.manual_seed(dist.get_rank())
    model = prepare_ddp(nn.Sequential(SyncBatchNorm(3, sync="lagged")))
    kinds = []
    for _ in range(3):
        with exchange.record() as record:
            with accumulate(model):
                for _ in range(4):
                    model(torch.randn(5, 3)).square().mean().backward()
        kinds.append([e.kind for e in record if e.kind.startswith("all")])
    return kinds


def test_the_backward_message_leaves_with_the_block(pool):
    assert pool(2).run(_accumulated_rounds) == [[["all moments", "all gradients"]] * 3] * 2


def _two_forwards_one_backward() -> list[Tensor]:
    """The gradient average after a backward pass over two forwards, and after one over their
    concatenation.
    """
    torch.manual_seed(dist.get_rank())
    options = Lagged(backward_rate=1.0, max_drift=float("inf"))
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    averages = []
    for is_split in (True, False):
        model = prepare_ddp(nn.Sequential(SyncBatchNorm(3, sync=options)))
        for _ in range(2):
            model(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)))
        parts = [model(a), model(b)] if is_split else model(torch.cat([a, b])).split(5)
        (1000 * parts[0].square().mean() + parts[1].square().mean()).backward()
        model(torch.randn(5, 3, generator=torch.Generator().manual_seed(2)))
        model(torch.randn(5, 3, generator=torch.Generator().manual_seed(2)))
        averages.append(model.state_dict()["0.lagged_gradient"])
    return averages


def test_gradients_that_come_late_are_not_lost(pool):
    for split, whole in pool(2).run(_two_forwards_one_backward):
        assert split.abs().max() > 0.5 * whole.abs().max() > 0
