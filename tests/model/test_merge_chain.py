"""Chain of Merges solves the least squares of the whole batch, whoever has which samples."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from syncnorm import SyncBatchNorm
from syncnorm.comm import exchange
from syncnorm.comm.exchange import size_of
from syncnorm.errors import FaultError, InputError
from syncnorm.merge import chain_of_merges, gram, interpolate
from syncnorm.testing import assert_close

SPLITS = [(5,), (3, 2), (5, 0), (1, 0, 4)]
RIDGE = 1e-3


def _mlp(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(50, 6), nn.ReLU(), nn.Linear(6, 4, bias=False), nn.Tanh()),
        nn.Linear(4, 3),
    ).double()


def _maps(seed: int) -> nn.Sequential:
    """Strides, dilation, paddings of all kinds, batch norms, and a grouped convolution."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=(1, 2), stride=(2, 1), bias=False), nn.BatchNorm2d(4)),
        *(nn.ReLU(), nn.Conv2d(4, 4, 3, padding="same", dilation=2, padding_mode="circular")),
        *(nn.SiLU(), nn.Conv2d(4, 4, 1, groups=2), SyncBatchNorm(4), nn.Dropout()),
        *(nn.Conv2d(4, 3, (1, 2), padding="valid"), nn.Flatten(), nn.Linear(54, 3)),
    ).double()
    for layer in (model[1], model[6]):
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias)
        layer.running_mean.normal_()
    return model


KINDS = {"mlp": _mlp, "maps": _maps}
SOLVED = {"mlp": (1, 3, 5), "maps": (0, 3, 8, 10)}
NORMS = {"mlp": (), "maps": (1, 6)}


def _models(kind: str) -> list[nn.Sequential]:
    """Two that begin alike, as if they had been fine-tuned from one."""
    base, other = KINDS[kind](0), KINDS[kind](1)
    return [interpolate(base, other, share) for share in (0.1, 0.3)]


def _samples() -> list[Tensor]:
    """Of each network's task, five samples."""
    g = torch.Generator().manual_seed(4)
    return [torch.randn(5, 2, 5, 5, generator=g, dtype=torch.float64) + shift for shift in (-1, 1)]


def _unfolded(layer: nn.Module, x: Tensor) -> Tensor:
    """The columns of Xhat (d, n), by torch's own operator."""
    if isinstance(layer, nn.Linear):
        columns = x.T
    else:
        if layer.padding == "same":
            wide, padding = F.pad(x, [2, 2, 2, 2], "circular"), 0
        else:
            wide, padding = x, 0 if layer.padding == "valid" else layer.padding
        parts = F.unfold(wide, layer.kernel_size, layer.dilation, padding, layer.stride)
        columns = parts.transpose(0, 1).flatten(1)
    if layer.bias is not None:
        columns = torch.cat([columns, torch.ones_like(columns[:1])])
    return columns


def _matrix(layer: nn.Module) -> Tensor:
    columns = layer.weight.flatten(1)
    return columns if layer.bias is None else torch.cat([columns, layer.bias[:, None]], 1)


@torch.no_grad()
def _expected(kind: str, samples: Sequence[Tensor], ridge: float = RIDGE) -> nn.Sequential:
    """By a QR decomposition of all samples' rows, with those of the ridge below."""
    models = [each.eval() for each in _models(kind)]
    merged = interpolate(*models).eval()
    for index, layer in enumerate(merged):
        arriving = [merged[:index](x) for x in samples]
        if index in NORMS[kind]:
            rows = torch.cat(arriving).movedim(1, -1).flatten(0, -2)
            layer.running_mean.copy_(rows.mean(0))
            layer.running_var.copy_(rows.var(0))
        if index not in SOLVED[kind]:
            continue
        x = torch.cat([_unfolded(layer, each) for each in arriving], 1)
        y = torch.cat(
            [
                each[: index + 1](own).transpose(0, 1).flatten(1)
                for each, own in zip(models, samples, strict=True)
            ],
            1,
        )
        root = (ridge * x.square().sum() / len(x)).sqrt()
        rows = torch.cat([x.T, root * torch.eye(len(x)).double()])
        targets = torch.cat([y.T, root * _matrix(layer).T])
        w = torch.linalg.lstsq(rows, targets).solution.T
        layer.weight.copy_(w[:, : layer.weight[0].numel()].view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(w[:, -1])
    return merged


def _mine(split: tuple[int, ...]) -> list[list[Tensor]]:
    """This worker's batches of each task: of two samples at most."""
    rank = dist.get_rank()
    parts = [x[sum(split[:rank]) : sum(split[: rank + 1])] for x in _samples()]
    return [list(part.split(2)) if len(part) else [] for part in parts]


def _merged(kind: str, split: tuple[int, ...], defect: str = "") -> tuple[dict, list, bool]:
    models = _models(kind)
    before = copy.deepcopy([each.state_dict() for each in models])
    with exchange.record() as record, pytest.MonkeyPatch.context() as patch:
        if defect:
            DEFECTS[defect](patch, models)
        merged = chain_of_merges(models, _mine(split), ridge=RIDGE)
    is_untouched = all(
        torch.equal(value, state[name])
        for each, state in zip(models, before, strict=True)
        for name, value in each.state_dict().items()
    ) and all(m.training for each in models for m in each.modules())
    return dict(merged.state_dict()), [(e.kind, e.numel) for e in record], is_untouched


def _compare(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        # Normal equations square the condition number, which the ridge bounds by d / ridge.
        assert_close(state[name], value, torch.float64, name, factor=10.0)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_whoever_has_which_samples(pool, kind, split):
    expected = _expected(kind, _samples())
    answers = pool(len(split)).run(_merged, kind, split)
    needed = []
    for index, layer in enumerate(expected):
        if index in SOLVED[kind]:
            c, d = _matrix(layer).shape
            needed.append(("least squares", size_of(d * d + c * d + 2 + len(split))))
        elif index in NORMS[kind]:
            needed.append(("population", size_of(2 * layer.num_features + 1 + len(split))))
    for state, messages, is_untouched in answers:
        assert all(torch.equal(value, answers[0][0][name]) for name, value in state.items())
        _compare(state, expected.state_dict())
        assert messages == (needed if len(split) > 1 else [])
        assert is_untouched


def _module():
    return __import__("sys").modules["syncnorm.merge.chain"]


def _arriving_unmerged(models):
    """What comes to the layer in the first network, in place of the merged one."""
    arriving = _module().arriving
    return lambda _, name, batch: arriving(models[0], name, batch)


DEFECTS = {
    "each worker for itself": lambda patch, _: patch.setattr(
        _module(), "sum_unless_failed", lambda message, *_: message
    ),
    "activations of a network that is not merged": lambda patch, models: patch.setattr(
        _module(), "arriving", _arriving_unmerged(models)
    ),
    "no average in the ridge": lambda patch, _: patch.setattr(
        _module(), "with_bias", lambda *args: 0 * _with_bias(*args)
    ),
    "statistics of batch norms are averages": lambda patch, _: patch.setattr(
        _module(), "_follow", lambda *_: None
    ),
}


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias[:, None]], 1)


@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defects_are_caught(pool, defect):
    expected = _expected("maps", _samples()).state_dict()
    (state, *_), *_ = pool(2).run(_merged, "maps", (3, 2), defect)
    with pytest.raises(AssertionError, match="elements are off"):
        _compare(state, expected)


def test_one_network_twice_is_itself():
    model = _mlp(0)
    merged = chain_of_merges([model, copy.deepcopy(model)], [[x] for x in _samples()])
    for name, value in model.state_dict().items():
        assert_close(merged.state_dict()[name], value, torch.float64, name, factor=10.0)


def test_it_fits_better_than_the_average():
    models, samples = _models("mlp"), _samples()
    merged = chain_of_merges(models, [[x] for x in samples], ridge=1e-6)

    def error(network: nn.Module) -> float:
        with torch.no_grad():
            return sum(
                (network(x) - model(x)).square().sum().item()
                for model, x in zip(models, samples, strict=True)
            )

    assert error(merged) < 0.2 * error(interpolate(*models))


def test_a_matrix_that_cannot_be_inverted_leaves_the_average():
    """51 numbers of input from 2 samples; the next layers have fewer inputs than samples."""
    models = _models("mlp")
    batches = [[x[:4]] for x in _samples()]
    merged = chain_of_merges(models, batches, ridge=0.0)
    average = interpolate(*models)
    torch.testing.assert_close(merged[1].weight, average[1].weight, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(merged[1].bias, average[1].bias, rtol=1e-14, atol=1e-15)
    assert (merged[5].weight - average[5].weight).abs().max() > 1e-4


def test_batches_in_pieces(monkeypatch):
    """What is unfolded at once does not matter, to rounding."""
    models, batches = _models("maps"), [[x] for x in _samples()]
    whole = chain_of_merges(models, batches, ridge=RIDGE)
    monkeypatch.setattr("syncnorm.merge.gram._ROOM", 1)
    _compare(chain_of_merges(models, batches, ridge=RIDGE).state_dict(), whole.state_dict())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 4), (2, 3, 5)),
        (nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2), (2, 3, 11)),
        (nn.Conv2d(3, 4, (2, 3), padding="same", padding_mode="reflect"), (2, 3, 6, 5)),
        (nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 2, 3, 4, 5)),
    ],
    ids=str,
)
def test_a_layer_is_its_weight_times_what_is_unfolded(layer, shape):
    layer.double()
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    expected = y if isinstance(layer, nn.Linear) else y.movedim(1, -1)
    got = gram._unfolded(layer, x) @ layer.weight.flatten(1).T + layer.bias
    torch.testing.assert_close(got, expected.reshape(-1, 4), rtol=1e-13, atol=1e-13)


def _failing(what: str) -> str:
    models, batches = _models("mlp"), _mine((3, 2))
    if dist.get_rank() == 1:
        if what == "shape":
            batches[1][0] = batches[1][0][:, :1]
        elif what == "nan":
            batches[1][0][0] = torch.nan
    if what == "no data":
        batches = [[], []]
    if what == "no data of one":
        batches[1] = []
    try:
        chain_of_merges(models, batches)
        return "no error"
    except (FaultError, RuntimeError) as error:
        return str(error)


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("shape", "got an error on rank(s) [1]", "shapes cannot be multiplied"),
        ("nan", "must be finite, got NaN or infinity", "must be finite, got NaN or infinity"),
        ("no data", "on at least one worker, got none", "on at least one worker, got none"),
        ("no data of one", "got none of network 1, counted", "got none of network 1, counted"),
    ],
)
def test_faults_of_one_worker_are_raised_by_all(pool, what, first, second):
    answers = pool(2).run(_failing, what)
    assert first in answers[0]
    assert second in answers[1]


@pytest.mark.parametrize(
    ("models", "batches", "ridge", "message"),
    [
        ([_mlp(0), _mlp(1)], [[], []], -1.0, "`ridge` must be at least 0, got -1.0"),
        ([_mlp(0), _mlp(1)], [[]], 0.0, "got 2 and 1"),
        ([_mlp(0)], [[]], 0.0, "got 1 and 1"),
        ([_mlp(0), _mlp(1)], [[], iter([])], 0.0, "for each layer, got an iterator"),
        ([_mlp(0), _mlp(1)], torch.ones(2, 5, 2, 5, 5), 0.0, "of batches, got one Tensor"),
        ([_mlp(0), _maps(1)], [[], []], 0.0, "of one architecture, got '0.weight'"),
    ],
)
def test_bad_input(models, batches, ridge, message):
    with pytest.raises(InputError, match=message):
        chain_of_merges(models, batches, ridge=ridge)
