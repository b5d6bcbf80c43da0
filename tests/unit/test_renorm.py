"""RenormSchedule, and renormalisation in one process: the paper's properties, published defects."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from syncnorm import (
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    accumulate,
    convert,
    explain,
    frozen_statistics,
    functional,
    monitor,
    prepare_ddp,
    reference,
)
from syncnorm.errors import InputError
from syncnorm.maths import kernels
from syncnorm.testing import assert_close


def at(schedule: RenormSchedule, step: int) -> tuple[float, float]:
    r_max, d_max = schedule.at(torch.tensor(step))
    return r_max.item(), d_max.item()


@pytest.mark.parametrize(
    ("step", "r_max", "d_max"),
    [
        (0, 1.0, 0.0),
        (4_999, 1.0, 0.0),
        (5_000, 1.0, 0.0),
        (15_000, 1 + 2 * 10 / 35, 2.5),
        (25_000, 1 + 2 * 20 / 35, 5.0),
        (40_000, 3.0, 5.0),
        (10**12, 3.0, 5.0),
    ],
)
def test_the_papers_schedule(step, r_max, d_max):
    assert at(RenormSchedule(), step) == (r_max, d_max)


@given(
    st.integers(0, 2**62),
    st.floats(1, 1e6),
    st.floats(0, 1e6),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
)
def test_never_beyond_the_bounds(step, r_max, d_max, warmup, r_length, d_length):
    schedule = RenormSchedule(r_max, d_max, warmup, warmup + r_length, warmup + d_length)
    r, d = at(schedule, step)
    assert 1.0 <= r <= r_max
    assert 0.0 <= d <= d_max
    if step >= warmup + max(r_length, d_length):
        assert (r, d) == pytest.approx((r_max, d_max), rel=1e-15)


def test_other_schedules():
    assert at(RenormSchedule.constant(2.0, 1.0), 0) == (2.0, 1.0)
    switch = RenormSchedule.switch(10, 2.0, 1.0)
    assert [at(switch, step) for step in (9, 10)] == [(1.0, 0.0), (2.0, 1.0)]
    infinite = RenormSchedule.constant(float("inf"), float("inf"))
    assert at(infinite, 3) == (float("inf"), float("inf"))
    short = RenormSchedule().scaled(1_300)
    assert (short.warmup_steps, short.r_steps, short.d_steps) == (50, 400, 250)
    assert RenormSchedule().scaled(130_000) == RenormSchedule()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "`schedule` must return (r_max, d_max), got None. Correct the schedule."),
        ((3.0,), "`schedule` must return (r_max, d_max), got (3.0,)."),
        ((3.0, 5.0, 6.0), "`schedule` must return (r_max, d_max), got (3.0, 5.0, 6.0)."),
        (("3", 5.0), "`r_max` must be a number or a tensor of one, got '3'."),
        (
            (3.0, torch.tensor([5.0, 6.0])),
            "`d_max` must be a number or a tensor of one, got tensor(",
        ),
        ((3.0, -1.0), "`d_max` must be >= 0, got -1. Correct the schedule."),
    ],
    ids=str,
)
def test_a_schedule_that_returns_no_bounds(returned, message):
    with pytest.raises(InputError, match=re.escape(message)):
        SyncBatchRenorm(3, schedule=lambda step: returned)(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RenormSchedule(r_max=0.9), "`r_max` must be >= 1, got 0.9."),
        (lambda: RenormSchedule(r_max=float("nan")), "`r_max` must be >= 1, got nan."),
        (lambda: RenormSchedule(d_max=-1.0), "`d_max` must be >= 0, got -1.0."),
        (lambda: RenormSchedule(warmup_steps=-1), "`warmup_steps` must be >= 0, got -1."),
        (
            lambda: RenormSchedule(r_steps=4_000),
            "`r_steps` must be >= warmup_steps = 5000, got 4000.",
        ),
        (
            lambda: RenormSchedule(d_steps=4_000),
            "`d_steps` must be >= warmup_steps = 5000, got 4000.",
        ),
        (
            lambda: RenormSchedule(d_max=float("inf")),
            "`d_steps` must be warmup_steps = 5000 where the bound is infinite",
        ),
        (lambda: RenormSchedule().scaled(0), "`total_steps` must be >= 1, got 0."),
        (
            lambda: SyncBatchRenorm(3, track_running_stats=False),
            "`track_running_stats` must be True, got False.",
        ),
        (
            lambda: SyncBatchRenorm(3, running_average="mean"),
            '`running_average` must be "std" or "var", got \'mean\'.',
        ),
        (
            lambda: SyncBatchRenorm(3, schedule=lambda step: (step * torch.nan, step * 0.0))(
                torch.randn(4, 3)
            ),
            "`r_max` must be >= 1, got nan. Correct the schedule.",
        ),
        (
            lambda: functional.sync_batch_renorm(
                torch.randn(4, 3), torch.zeros(3), torch.ones(3), r_max=0.5, d_max=0
            ),
            "`r_max` must be >= 1, got 0.5.",
        ),
        (
            lambda: functional.sync_batch_renorm(
                torch.randn(4, 3), torch.zeros(3), torch.ones(3), r_max=2, d_max=-1
            ),
            "`d_max` must be >= 0, got -1.",
        ),
        (
            lambda: functional.sync_batch_renorm(torch.randn(4, 3), None, None, r_max=2, d_max=1),  # pyright: ignore
            "`running_mean` and `running_var` must be given, got None.",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make()


def _layer(bounds: tuple[float, float], **options) -> SyncBatchRenorm:
    layer = SyncBatchRenorm(
        4, schedule=RenormSchedule.constant(*bounds), dtype=torch.float64, **options
    )
    g = torch.Generator().manual_seed(4)
    for t in (layer.running_mean, layer.bias.data):
        t.copy_(torch.randn(4, generator=g, dtype=torch.float64))
    for t in (layer.running_var, layer.weight.data):
        t.copy_(torch.rand(4, generator=g, dtype=torch.float64) + 0.3)
    return layer


def _x(*shape: int) -> torch.Tensor:
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 2 + 1
    )


@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_unclipped_training_equals_evaluation(eps):
    """Also against eps entering twice, or scaled by r: with eps = 0.1 either would show."""
    layer = _layer((float("inf"), float("inf")), eps=eps)
    expected = layer.eval()(_x(6, 4, 5))
    assert_close(layer.train()(_x(6, 4, 5)), expected, torch.float64, "y")


def test_at_the_trivial_bounds_it_is_batch_norm_bit_for_bit():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        renorm = SyncBatchRenorm(
            4, momentum=0.1, schedule=RenormSchedule.constant(1.0, 0.0), running_average="var"
        )
        norm = SyncBatchNorm(4)
        nn.init.normal_(renorm.weight)
        nn.init.normal_(renorm.bias)
        norm.load_state_dict(renorm.state_dict())
        for _ in range(3):
            x, cotangent = torch.randn(6, 4, 5, 5).to(dtype), torch.randn(6, 4, 5, 5).to(dtype)
            grads = []
            for layer in (renorm, norm):
                leaf = x.clone().requires_grad_()
                y = layer(leaf)
                y.backward(cotangent)
                grads.append((y, leaf.grad, layer.weight.grad, layer.bias.grad))
            assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        for (name, a), (_, b) in zip(renorm.named_buffers(), norm.named_buffers(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("running_average", ["std", "var"])
def test_on_constant_statistics_the_averages_converge_geometrically(running_average):
    layer = _layer((1.0, 0.0), running_average=running_average, momentum=0.2)
    x = _x(50, 4)
    mean, var = x.mean(0), x.var(0, correction=0 if running_average == "std" else 1)
    start = (layer.running_mean.clone(), layer.running_var.clone())
    for k in range(1, 8):
        layer(x)
        left = (1 - 0.2) ** k
        assert_close(layer.running_mean, mean + left * (start[0] - mean), torch.float64, "mean")
        if running_average == "var":
            assert_close(layer.running_var, var + left * (start[1] - var), torch.float64, "var")
        else:
            sigma, now = torch.sqrt(var + layer.eps), torch.sqrt(layer.running_var + layer.eps)
            assert_close(
                now,
                sigma + left * (torch.sqrt(start[1] + layer.eps) - sigma),
                torch.float64,
                "sigma",
            )


def test_weight_and_bias_come_after_the_correction():
    """y(weight, bias) = y(1, 0) * weight + bias; a correction of the affine output would break it."""
    layer = _layer((1.5, 0.4))
    y = layer(_x(6, 4))
    bare = functional.sync_batch_renorm(
        _x(6, 4), *_running(_layer((1.5, 0.4))), r_max=1.5, d_max=0.4
    )
    assert_close(y, bare * layer.weight + layer.bias, torch.float64, "y")


def _running(layer: SyncBatchRenorm) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.running_mean, layer.running_var


def test_the_clips_open_as_the_clock_runs():
    """Clips stuck at batch norm: after the ramp an unclipped batch is normalised as in evaluation."""
    layer = SyncBatchRenorm(
        4, schedule=RenormSchedule(100.0, 100.0, 2, 4, 4), momentum=0.0, dtype=torch.float64
    )
    x = _x(8, 4)
    outputs = [layer(x) for _ in range(5)]
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[2], outputs[3])
    assert_close(outputs[4], layer.eval()(x), torch.float64, "y")


def test_one_sample_with_spatial_extent():
    """A Bessel factor from N alone would divide by zero."""
    layer = _layer((2.0, 1.0), running_average="var", momentum=1.0)
    x = _x(1, 4, 6)
    layer(x)
    assert_close(layer.running_var, x[0].var(1, correction=1), torch.float64, "running_var")


def test_evaluation_does_not_use_the_batch():
    layer = _layer((2.0, 1.0)).eval()
    x = _x(6, 4)
    assert torch.equal(layer(x)[:1], layer(x[:1]))
    y = functional.sync_batch_renorm(
        x,
        layer.running_mean,
        layer.running_var,
        layer.weight,
        layer.bias,
        r_max=2.0,
        d_max=1.0,
        training=False,
    )
    assert torch.equal(y, layer(x))


def test_state_dicts_are_batch_norms():
    ours, theirs = SyncBatchRenorm(4), nn.BatchNorm2d(4)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_a_resumed_run_continues_the_ramp():
    schedule = RenormSchedule(3.0, 5.0, 2, 8, 8)
    one = SyncBatchRenorm(4, schedule=schedule)
    for _ in range(5):
        one(_x(6, 4).float())
    other = SyncBatchRenorm(4, schedule=schedule)
    other.load_state_dict(one.state_dict())
    assert [b.item() for b in other.bounds()] == [b.item() for b in one.bounds()] == [2.0, 2.5]


def test_functional_equals_the_layer():
    for running_average in ("std", "var"):
        layer = _layer((1.5, 0.7), running_average=running_average)
        running = [t.clone() for t in _running(layer)]
        y = functional.sync_batch_renorm(
            _x(6, 4), *running, layer.weight, layer.bias, r_max=1.5, d_max=torch.tensor(0.7, dtype=torch.float64),
            running_average=running_average,
        )  # fmt: skip
        assert torch.equal(y, layer(_x(6, 4)))
        assert torch.equal(running[0], layer.running_mean)
        assert torch.equal(running[1], layer.running_var)


@pytest.mark.parametrize("make", [SyncBatchNorm, SyncBatchRenorm], ids=lambda c: c.__name__)
def test_no_extra_pass_over_the_data(make, monkeypatch):
    calls = []
    x = torch.randn(4, 3, 5, requires_grad=True)
    own = kernels.fused_for(x)
    passes = ("normalize", "backward_sums", "backward_input")
    passes = ("local_moments" if own is None else "moments", *passes)
    for name in passes:
        original = getattr(own or kernels, name)
        monkeypatch.setattr(
            own or kernels,
            name,
            lambda *a, name=name, call=original: (calls.append(name), call(*a))[1],
        )
    make(3)(x).backward(torch.randn(4, 3, 5))
    assert calls == [*passes]


def _take_away(model: nn.Module) -> nn.Module:
    """As test-time adaptation (TENT) does it: batch statistics in any mode."""
    layer = model[0]
    layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    return model


@pytest.mark.parametrize("sync", ["batch", "running", "lagged", "none"])
def test_running_statistics_that_were_taken_away_are_one_clear_error(sync):
    """The batch alone is used where torch's layer goes on by it, also in evaluation."""
    x = torch.randn(6, 3)
    model = prepare_ddp(nn.Sequential(SyncBatchRenorm(3, sync=sync)))
    model(x).sum().backward()
    _take_away(model)
    message = re.escape(
        "`running_mean` must be there in training, got None in '0'. Renormalisation corrects "
        "towards the running "
        "statistics. To normalise by the batch alone, convert(model, SyncBatchNorm) first."
    )
    with pytest.raises(InputError, match=message):
        model(x)
    with pytest.raises(InputError, match=message), accumulate(model):
        model(x)
    with pytest.raises(InputError, match=message), frozen_statistics(model):
        model(x)
    assert monitor(model).read()["layers"]["0"]["mean_gap"] is None
    assert explain(model, x).rows[0].values == 6
    assert_close(
        model.eval()(x), reference.batch_norm(x.double()), torch.float32, "y in evaluation"
    )
    convert(model, SyncBatchNorm)
    assert_close(
        prepare_ddp(model.train())(x),
        reference.batch_norm(x.double()),
        torch.float32,
        "y after conversion",
    )
