"""Methods with averages over steps against loops over the formulas of their authors' code.

Each loop follows the code's formulas, in one process; where ours departs, the test says how.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from syncnorm.family import MABN, CentredWeight, OnlineNorm, PowerNorm, UnifiedNorm

C, STEPS, EPS = 4, 16, 1e-5


class Out(NamedTuple):
    """What comes out of a step."""

    y: Tensor
    dx: Tensor
    dweight: Tensor


def batches(outlier: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Batches (N, C, L) and cotangents; the values of one are large."""
    torch.manual_seed(5)
    shape = (STEPS, 6, C, 5)
    x, g = torch.randn(shape, dtype=torch.float64) + 0.3, torch.randn(shape, dtype=torch.float64)
    if outlier is not None:
        x[outlier] *= 30
    return list(zip(x, g, strict=True))


def filled(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Give weight and bias values that are nothing special; as (1, C, 1)."""
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in layer.double().parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer.weight.detach().view(1, -1, 1), layer.bias.detach().view(1, -1, 1)


def ours(layer: nn.Module, steps: list[tuple[Tensor, Tensor]]) -> list[Out]:
    came_out = []
    for x, g in steps:
        layer.zero_grad()
        x = x.clone().requires_grad_()
        y = layer(x)
        y.backward(g)
        came_out.append(Out(y.detach(), x.grad, layer.weight.grad.clone()))
    return came_out


def mean(t: Tensor) -> Tensor:
    return t.mean((0, 2), keepdim=True)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def power_loop(steps, weight, bias, warmup, alpha=0.9) -> tuple[list[Out], Tensor, Tensor]:
    """sIncerass/powernorm; the input is scaled by groups already."""
    came_out, psi, ema = [], torch.ones(1, C, 1, dtype=torch.float64), torch.zeros(1, C, 1)
    for t, (x, dy) in enumerate(steps, start=1):
        q = mean(x * x)
        z = x / ((q if t <= warmup else psi) + EPS).sqrt()
        if t < warmup:
            psi = psi * (t - 1) / t + q / t
        psi = alpha * psi + (1 - alpha) * q
        g = dy * weight
        approximate = g - (1 - alpha) * ema * z
        ema = ema + mean(approximate * z)
        dx = approximate / (q + EPS).sqrt()
        came_out.append(Out(z * weight + bias, dx, (dy * z).sum((0, 2))))
    return came_out, psi, ema


def test_power_norm():
    # Batches of one mean square: then the last step of the warm-up, which weighs more in psi than
    # in the code, shows nowhere.
    steps = [(x / mean(x * x).sqrt(), g) for x, g in batches()]
    layer = PowerNorm(C, warmup=6, scaling_groups=0)
    weight, bias = filled(layer)
    came_out = ours(layer, steps)
    expected, psi, ema = power_loop(steps, weight, bias, warmup=6)
    for got, want in zip(came_out, expected, strict=True):
        for one, two in zip(got, want, strict=True):
            close(one, two)
    state = layer.state_dict()
    close(state["running_square"], psi.flatten())
    close(state["nu"], 0.1 * ema.flatten())


def test_power_norm_divides_the_gradient_by_what_divides_the_input():
    steps = batches()
    layer = PowerNorm(C, warmup=4, scaling_groups=0)
    weight, bias = filled(layer)
    ours(layer, steps[:4])
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    (x, dy) = steps[4]
    (got,) = ours(layer, [(x, dy)])
    psi, nu = (state[name].view(1, C, 1) for name in ("running_square", "nu"))
    z = x / (psi + EPS).sqrt()
    close(got.y, z * weight + bias)
    in_code = (dy * weight - nu * z) / (mean(x * x) + EPS).sqrt()
    close(got.dx, in_code * ((mean(x * x) + EPS) / (psi + EPS)).sqrt())


@pytest.mark.parametrize("warmup", [0, 4])
def test_power_norm_may_average_over_all_batches(warmup):
    layer = PowerNorm(C, warmup=warmup, momentum=None, scaling_groups=0).double()
    ours(layer, batches())
    squares = [mean(x * x).flatten() for x, _ in batches()]
    close(layer.state_dict()["running_square"], torch.stack(squares).mean(0))


def test_group_scaling():
    torch.manual_seed(0)
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    scaled = PowerNorm(6, scaling_groups=2).double().prepare(x)
    for part, got in zip(x.split(3, 1), scaled.split(3, 1), strict=True):
        close(got, part / (part.square().mean(1, keepdim=True) + EPS).sqrt())


def window_loop(steps, weight, bias, *, window, warmup, after, momentum, unified, filtered=False):
    """megvii-model/MABN, and hikvision-research/Unified-Normalization."""
    came_out, running = [], torch.ones(1, C, 1, dtype=torch.float64)
    squares = torch.zeros(window, C, dtype=torch.float64)
    gradients, ema, skips, rs = squares.clone(), torch.zeros(1, C, 1), [], []
    for t, (x, dy) in enumerate(steps, start=1):
        skip, recorded = False, squares.sqrt().var()
        squares[t % window] = mean(x * x).flatten()
        geometric = squares.log().mean(0).exp()
        if filtered and t >= warmup and (squares.mean(0) - geometric > recorded * window).any():
            squares[t % window], skip = running.flatten(), True
        is_alone = t <= window or t < warmup or skip
        average = squares.log().mean(0).exp() if unified else squares.mean(0)
        s2 = mean(x * x) if is_alone else average.view(1, C, 1)
        r = ((s2 + EPS) / (running + EPS)).sqrt().clip(0.2, 5)
        r = torch.ones_like(r) if t <= max(after, warmup) or skip else r
        z = x / (s2 + EPS).sqrt()
        running = momentum * running + (1 - momentum) * s2
        y = (z if unified else r * z) * weight + bias
        g = dy * weight * r
        b = mean(g * z)
        gradients[t % window] = ema.flatten() if skip else b.flatten()
        c = b if is_alone else gradients.mean(0).view(1, C, 1)
        if unified:
            ema = momentum * ema + (1 - momentum) * c
            c = c if skip else ema
        came_out.append(Out(y, (g - c * z) / (s2 + EPS).sqrt(), (dy * r * z).sum((0, 2))))
        skips.append(skip)
        rs.append(r.flatten())
    return came_out, running.flatten(), skips, rs


def test_mabn():
    layer = MABN(C, window=3, warmup=5, renorm_after=8)
    weight, bias = filled(layer)
    expected, running, _, rs = window_loop(
        batches(), weight, bias, window=3, warmup=5, after=8, momentum=0.98, unified=False
    )
    for got, want in zip(ours(layer, batches()), expected, strict=True):
        for one, two in zip(got, want, strict=True):
            close(one, two)
    close(layer.running_square, running)
    assert (rs[-1] != 1).all()


@pytest.mark.parametrize("filtered", [False, True])
def test_unified_norm_but_for_r_in_the_gradient_of_the_weight(filtered):
    layer = UnifiedNorm(C, window=3, warmup=5, renorm_after=8, outlier_filtration=filtered)
    weight, bias = filled(layer)
    expected, running, skips, rs = window_loop(
        batches(outlier=10),
        weight,
        bias,
        window=3,
        warmup=5,
        after=8,
        momentum=0.9,
        unified=True,
        filtered=filtered,
    )
    for got, want, r in zip(ours(layer, batches(outlier=10)), expected, rs, strict=True):
        close(got.y, want.y)
        close(got.dx, want.dx)
        close(got.dweight * r, want.dweight)
    close(layer.running_square, running)
    assert any(skips) is filtered
    assert skips.count(True) < STEPS - 5
    assert (rs[-1] != 1).all()


def online_loop(steps, weight, bias, a=0.999, b=0.99) -> list[Out]:
    """Cerebras/online-normalization, with its layer scaling."""
    came_out = []
    m, var = torch.zeros(C, 1, dtype=torch.float64), torch.ones(C, 1, dtype=torch.float64)
    u, v = torch.zeros_like(m), torch.zeros_like(m)
    for x, dy in steps:
        y, scales = torch.empty_like(x), []
        for i, each in enumerate(x):
            scales.append((var + EPS).sqrt())
            y[i] = (each - m) / scales[i]
            mu = each.mean(1, keepdim=True)
            spread = (each - mu).square().mean(1, keepdim=True)
            var = a * var + (1 - a) * spread + a * (1 - a) * (mu - m) ** 2
            m = m + (1 - a) * (mu - m)
        z = y * weight + bias
        rms = (z.square().mean((1, 2), keepdim=True) + EPS).sqrt()
        out = z / rms
        dz = (dy - (dy * out).mean((1, 2), keepdim=True) * out) / rms
        dx = torch.empty_like(x)
        for i, grad in enumerate(dz * weight):
            h = grad - (1 - b) * v * y[i]
            v = v + (h * y[i]).mean(1, keepdim=True)
            dx[i] = h / scales[i] - (1 - b) * u
            u = u + dx[i].mean(1, keepdim=True)
        came_out.append(Out(out, dx, (dz * y).sum((0, 2))))
    return came_out


def test_online_norm():
    layer = OnlineNorm(C)
    weight, bias = filled(layer)
    expected = online_loop(batches(), weight, bias)
    for got, want in zip(ours(layer, batches()), expected, strict=True):
        for one, two in zip(got, want, strict=True):
            close(one, two)


def test_online_norm_makes_gradients_orthogonal_to_1_and_y_in_the_long_run():
    torch.manual_seed(1)
    layer = OnlineNorm(2, guard=None, affine=False, momentum=0.01, gradient_momentum=0.02).double()
    along: list[Tensor] = []
    for _ in range(60):
        x = torch.randn(32, 2, 8, dtype=torch.float64) * 3 + 1
        x.requires_grad_()
        y = layer(x)
        y.backward(torch.randn_like(x) + 0.5 + 0.5 * y.detach())
        along.append(torch.stack([x.grad.mean(), (x.grad * y.detach()).mean()]).abs())
    assert (torch.stack(along[-10:]).mean(0) < 0.1 * along[0]).all()


@pytest.mark.parametrize(
    "make",
    [lambda: MABN(C), lambda: UnifiedNorm(C), lambda: PowerNorm(C, scaling_groups=0)],
    ids=["mabn", "unified", "power"],
)
def test_a_batch_norm_is_taken_and_given(make: Callable[[], nn.Module]):
    plain, layer = nn.BatchNorm1d(C, dtype=torch.float64), make().double()
    for x, _ in batches():
        plain(x)
    with torch.no_grad():
        layer.take(plain)
    close(layer.running_square, plain.running_var + plain.running_mean**2)
    assert layer.weight is plain.weight
    assert int(layer.num_batches_tracked) == 0
    ours(layer, batches())
    x = batches()[0][0]
    expected = layer.eval()(x)
    given = layer.as_batch_norm()
    close(nn.functional.batch_norm(x, *given[:4], eps=layer.eps), expected)


def test_what_no_batch_norm_evaluates_as():
    assert PowerNorm(C).as_batch_norm() is None
    assert OnlineNorm(C).as_batch_norm() is None
    assert OnlineNorm(C, guard="clamp").as_batch_norm() is None
    given = OnlineNorm(C, guard=None).as_batch_norm()
    assert given is not None
    assert given.var.tolist() == [1.0] * C
    scaled = PowerNorm(C)
    scaled.take(nn.BatchNorm1d(C))
    assert scaled.running_square.tolist() == [1.0] * C


def test_centred_weight():
    layer = nn.Conv1d(3, 4, 2, dtype=torch.float64)
    expected = layer.weight - layer.weight.mean((1, 2), keepdim=True)
    register_parametrization(layer, "weight", CentredWeight())
    close(layer.weight, expected)
    out = layer(torch.ones(1, 3, 5, dtype=torch.float64))
    close(out, layer.bias.view(1, 4, 1).expand_as(out))
