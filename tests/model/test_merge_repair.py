"""repair gives an interpolated network the interpolated statistics, whoever has which batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncnorm import SyncBatchNorm, recalibrate
from syncnorm.comm import exchange
from syncnorm.errors import FaultError, InputError
from syncnorm.merge import interpolate, repair
from syncnorm.reference import moments
from syncnorm.testing import assert_close

repair_module = __import__("sys").modules["syncnorm.merge.repair"]
ALPHA = 0.3
SPLITS = [(5,), (3, 2), (5, 0), (1, 0, 4)]


def _bare(seed: int) -> nn.Sequential:
    """Layers without batch norms, among them one without a bias and one transposed."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 5, 2), nn.Tanh()),
        *(nn.Conv2d(5, 3, 3, bias=False), nn.Dropout(), nn.Flatten()),
        *(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)),
    ).double()


def _normed(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False)),
        *(SyncBatchNorm(5), nn.ReLU(), nn.Flatten(), nn.Linear(5, 3)),
    ).double()
    for layer in (model[1], model[4]):
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias)
    return model


def _mixed(seed: int) -> nn.Sequential:
    """A batch norm after the first convolution, none after the second."""
    model = _normed(seed)
    model[4] = nn.Identity()
    return model


KINDS = {"bare": _bare, "normed": _normed, "mixed": _mixed}


def _batches() -> list[Tensor]:
    g = torch.Generator().manual_seed(9)
    return [
        torch.randn(n, 2, 5, 5, generator=g, dtype=torch.float64) * (i + 1) / 2 + i - 2
        for i, n in enumerate((3, 1, 4, 2, 5))
    ]


def _rows(x: Tensor) -> Tensor:
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _channelwise(value: Tensor, x: Tensor) -> Tensor:
    return value.view(-1, *[1] * (x.ndim - 2))


def _through(model: nn.Sequential, x: Tensor, see=None) -> Tensor:
    """The layers one by one; see(index, output) may change a layer's output."""
    for index, layer in enumerate(model.eval()):
        y = layer(x)
        x = y if see is None else see(index, y)
    return x


@torch.no_grad()
def _expected(kind: str, batches: list[Tensor]) -> nn.Sequential:
    """Line by line from the paper, in one process."""
    a, b = KINDS[kind](0), KINDS[kind](1)
    model = interpolate(a, b, ALPHA)
    bared = {"bare": (0, 2, 4, 7), "mixed": (3,), "normed": ()}[kind]
    norms = {"bare": (), "mixed": (1,), "normed": (1, 4)}[kind]
    statistics = []
    for each in (a, b):
        seen: dict[int, list[Tensor]] = {index: [] for index in bared}

        def keep(index: int, y: Tensor, seen=seen) -> Tensor:
            if index in bared:
                seen[index].append(_rows(y))
            return y

        for x in batches:
            _through(each, x, keep)
        statistics.append({i: torch.cat(rows) for i, rows in seen.items()})
    mean = {i: torch.lerp(*(s[i].mean(0) for s in statistics), ALPHA) for i in bared}
    std = {i: torch.lerp(*(s[i].std(0, correction=0) for s in statistics), ALPHA) for i in bared}
    seen = {index: [] for index in (*bared, *norms)}

    def normalise(index: int, y: Tensor) -> Tensor:
        if index + 1 in norms:  # what goes into a batch norm, which is left out
            return y
        if index not in seen:
            return y
        _, batch_mean, var = moments(_rows(y))
        seen[index].append(_rows(y))
        norm = model[index]
        weight, bias, eps = (
            (norm.weight, norm.bias, norm.eps)
            if index in norms
            else (std[index], mean[index], 1e-12)
        )
        z = (y - _channelwise(batch_mean, y)) / _channelwise((var + eps).sqrt(), y)
        return z * _channelwise(weight, y) + _channelwise(bias, y)

    plain = copy.deepcopy(model)
    for index in norms:
        plain[index] = nn.Identity()
    for x in batches:
        _through(plain, x, normalise)
    for index, rows in seen.items():
        population = torch.cat(rows)
        layer = model[index]
        if index in norms:
            layer.running_mean.copy_(population.mean(0))
            layer.running_var.copy_(population.var(0))
            continue
        scale = std[index] / (population.var(0, correction=0) + 1e-12).sqrt()
        axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        layer.weight.copy_(layer.weight.movedim(axis, -1).mul(scale).movedim(-1, axis))
        bias = torch.zeros_like(scale) if layer.bias is None else layer.bias
        layer.bias = nn.Parameter((bias - population.mean(0)) * scale + mean[index])
    return model


def _mine(split: tuple[int, ...]) -> list[Tensor]:
    rank = dist.get_rank()
    return _batches()[sum(split[:rank]) : sum(split[: rank + 1])]


def _repaired(kind: str, split: tuple[int, ...], defect: str = "") -> tuple[dict, list, bool]:
    a, b = KINDS[kind](0), KINDS[kind](1)
    model = interpolate(a, b, ALPHA)
    before = [copy.deepcopy(each.state_dict()) for each in (a, b)]
    modes = [each.training for each in model.modules()]
    with exchange.record() as record, pytest.MonkeyPatch.context() as patch:
        if defect:
            DEFECTS[defect](patch)
        assert repair(model, a, b, _mine(split), ALPHA) is model
    is_untouched = all(
        torch.equal(value, state[name])
        for each, state in zip((a, b), before, strict=True)
        for name, value in each.state_dict().items()
    ) and modes == [each.training for each in model.modules()]
    return dict(model.state_dict()), [e.kind for e in record], is_untouched


def _compare(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert_close(state[name], value, torch.float64, name)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_whoever_has_which_batch(pool, kind, split):
    expected = _expected(kind, _batches()).state_dict()
    answers = pool(len(split)).run(_repaired, kind, split)
    for state, kinds, is_untouched in answers:
        assert all(torch.equal(value, answers[0][0][name]) for name, value in state.items())
        assert state.keys() == expected.keys()
        _compare(state, expected)
        needed = ["population"] if kind == "normed" else ["targets", "population"]
        assert kinds == (needed if len(split) > 1 else [])
        assert is_untouched


DEFECTS = {
    "targets are each worker's own": lambda patch: patch.setattr(
        repair_module, "sum_unless_failed", lambda message, *_: message
    ),
    "variances in place of deviations": lambda patch: patch.setattr(
        repair_module, "_std", lambda m: m.var
    ),
    "the deviation's target is left out": lambda patch: patch.setattr(
        repair_module, "_std", lambda m: torch.ones_like(m.m2)
    ),
    "the shift is left out": lambda patch: patch.setattr(
        repair_module, "_fold", _folding_without_shift
    ),
    "deeper layers get what they got": lambda patch: patch.setattr(
        repair_module, "_Follower", _Idle
    ),
}


def _folding_without_shift(layer, norm, target, fold=repair_module._fold) -> None:
    fold(layer, norm, target._replace(mean=norm.running_mean))


class _Idle(repair_module._Follower):
    """Passes on what it gets."""

    def forward(self, input: Tensor) -> Tensor:
        return input


@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defects_are_caught(pool, defect):
    expected = _expected("bare", _batches()).state_dict()
    (state, *_), *_ = pool(2).run(_repaired, "bare", (3, 2), defect)
    with pytest.raises(AssertionError, match="elements are off"):
        _compare(state, expected)


def test_the_targets_are_met():
    """One batch: what normalises it on its way is what stays."""
    a, b = _bare(0), _bare(1)
    (x,) = _batches()[:1]
    model = repair(interpolate(a, b, ALPHA), a, b, [x], ALPHA)
    outputs = []
    for each in (a, b, model):
        seen: dict[int, Tensor] = {}
        with torch.no_grad():
            _through(each, x, lambda i, y, seen=seen: seen.setdefault(i, y))
        outputs.append(seen)
    for index in (0, 2, 4, 7):
        first, second, own = (_rows(seen[index]) for seen in outputs)
        for statistic in (lambda r: r.mean(0), lambda r: r.std(0, correction=0)):
            target = torch.lerp(statistic(first), statistic(second), ALPHA)
            # 1e-12 stands beside variances down to 1e-4.
            assert_close(statistic(own), target, torch.float64, str(index), factor=1e3)
    assert torch.equal(model[9].weight, interpolate(a, b, ALPHA)[9].weight)


@pytest.mark.parametrize("length", [4, 5])
def test_channels_of_linear_layers_are_the_last(length):
    """Tokens (N, L, D) are rows."""
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double() for _ in range(2))
    x = torch.randn(50, length, 3, dtype=torch.float64)
    tokens, rows = (repair(interpolate(a, b), a, b, [each]) for each in (x, x.flatten(0, 1)))
    for got, expected in zip(tokens.parameters(), rows.parameters(), strict=True):
        torch.testing.assert_close(got, expected)


def test_variance_falls_without_it():
    a, b = _bare(0), _bare(1)
    batches = _batches()
    plain, repaired = interpolate(a, b), repair(interpolate(a, b), a, b, batches, 0.5)
    x = torch.cat(batches)
    with torch.no_grad():
        spread = [
            each[:5].eval()(x).std((0, 2, 3)).mean().item() for each in (a, b, plain, repaired)
        ]
    assert spread[2] < 0.6 * min(spread[:2])
    assert spread[3] > 0.8 * min(spread[:2])


def test_an_endpoint_stays_what_it_is():
    a, b = _bare(0), _bare(1)
    (x,) = _batches()[:1]
    model = repair(interpolate(a, b, 0.0), a, b, [x], 0.0)
    with torch.no_grad():
        assert_close(model.eval()(x), a.eval()(x), torch.float64, "output", factor=10.0)


def test_batch_norms_alone_are_recalibrated():
    a, b = _normed(0), _normed(1)
    batches = iter(_batches())
    model = repair(interpolate(a, b), a, b, batches)
    expected = recalibrate(interpolate(a, b), _batches())
    assert all(
        torch.equal(value, expected.state_dict()[name])
        for name, value in model.state_dict().items()
    )


def test_channels_that_never_vary_are_shifted():
    a, b = _bare(0), _bare(1)
    for each in (a, b):
        each[0].weight.data[1] = 0.0
    a[0].bias.data[1], b[0].bias.data[1] = 2.0, 4.0
    model = repair(interpolate(a, b), a, b, _batches())
    assert torch.equal(model[0].weight[1], torch.zeros_like(model[0].weight[1]))
    assert model[0].bias[1].item() == pytest.approx(3.0, abs=1e-12)


def _failing(bad_rank: int, value: float = 0.0) -> tuple[str, bool]:
    a, b = _bare(0), _bare(1)
    model, batches = interpolate(a, b), _batches()
    if dist.get_rank() == bad_rank:
        batches[2] = batches[2][:, :1] if value == 0 else batches[2] * value
    before = copy.deepcopy(model.state_dict())
    try:
        repair(model, a, b, batches)
        message = "no error"
    except (FaultError, RuntimeError) as error:
        message = str(error)
    return message, all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_failing_worker_stops_all_and_nothing_is_changed(pool):
    answers = pool(3).run(_failing, 1)
    assert [is_unchanged for _, is_unchanged in answers] == [True] * 3
    assert answers[0] == answers[2]
    assert "got an error on rank(s) [1]. Nothing was changed" in answers[0][0]
    assert "to have 2 channels, but got 1" in answers[1][0]


def test_targets_that_are_not_finite_are_none(pool):
    answers = pool(2).run(_failing, 1, torch.inf)
    assert answers == [(answers[0][0], True)] * 2
    assert answers[0][0].startswith("activations must be finite, got NaN or infinity at '0' on")


def _without_data(kind: str) -> str:
    a, b = KINDS[kind](0), KINDS[kind](1)
    try:
        repair(interpolate(a, b), a, b, [])
        return "no error"
    except FaultError as error:
        return str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_no_data_anywhere(pool, kind):
    assert (
        pool(2).run(_without_data, kind)
        == ["`batches` must hold data on at least one worker, got none. Nothing was changed."] * 2
    )


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    return model


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


@pytest.mark.parametrize(
    ("model", "batches", "alpha", "message"),
    [
        (_bare(0), [], 2.0, r"`alpha` must be in \[0, 1\], got 2.0"),
        (_bare(0), iter([]), 0.5, "gone through twice, got an iterator"),
        (_bare(0), torch.ones(3, 2, 4, 4), 0.5, "an iterable of batches, got one Tensor"),
        (nn.Linear(2, 2), [], 0.5, "got none in Linear"),
        (_tied(), [], 0.5, "each weight once, got '0' again at '1'"),
        (Twice(), [], 0.5, "each weight once, got 'layer' again at 'layer'"),
        (
            nn.Sequential(nn.ConvTranspose1d(2, 2, 1, groups=2), nn.ReLU(), nn.Linear(2, 2)),
            [],
            0.5,
            "of one group, got 2 in '0'",
        ),
    ],
)
def test_bad_input(model, batches, alpha, message):
    with pytest.raises(InputError, match=message):
        repair(model, model, model, batches, alpha)
