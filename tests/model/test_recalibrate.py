"""recalibrate gives the population statistics of all batches of all workers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncnorm import (
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    prepare_ddp,
    recalibrate,
    train_only_norms,
)
from syncnorm.comm import exchange
from syncnorm.errors import FaultError, InputError
from syncnorm.reference import moments
from syncnorm.testing import assert_close

KINDS = {
    "torch": lambda c: nn.BatchNorm1d(c),
    "batch": lambda c: SyncBatchNorm(c),
    "running": lambda c: SyncBatchNorm(c, sync="running"),
    "lagged": lambda c: SyncBatchNorm(c, sync="lagged"),
    "renorm": lambda c: SyncBatchRenorm(c, schedule=RenormSchedule.constant(3.0, 5.0)),
}


def _model(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Linear(3, 4),
        KINDS[kind](4),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.Linear(4, 5),
        KINDS[kind](5),
    ]
    return prepare_ddp(nn.Sequential(*layers).double())


def _batches() -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [
        torch.randn(n, 3, generator=g, dtype=torch.float64) * (i + 1) + i
        for i, n in enumerate((5, 2, 9, 4, 3))
    ]


def _expected() -> list[tuple[Tensor, Tensor]]:
    """Each batch normalised by itself, then all activations in front of a layer taken together."""
    model = _model("torch")
    seen = [[], []]
    with torch.no_grad():
        for x in _batches():
            first = model[0](x)
            seen[0].append(first)
            # A linear layer of zero-mean features: its output is what the second layer sees.
            normalised = model[1].train()(first)
            seen[1].append(model[4](torch.relu(normalised)))
    answers = []
    for parts in seen:
        n, mean, var = moments(torch.cat(parts))
        answers.append((mean, var * n / (n - 1)))
    return answers


def _recalibrated(
    kind: str, shares: list[list[int]], mix: float, training: bool
) -> tuple[dict, list, list[bool]]:
    model = _model(kind).train(training)
    model[1].running_var.fill_(float("nan") if mix == 1 else 1.0)
    mine = [_batches()[i] for i in shares[dist.get_rank()]]
    with exchange.record() as record:
        assert recalibrate(model, ([x, "label"] for x in mine), mix=mix) is model
    return dict(model.state_dict()), [e.kind for e in record], [m.training for m in model.modules()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "shares", [[[0, 1, 2, 3, 4]], [[4, 0], [3, 1, 2]], [[2], [], [0, 1, 3, 4]]], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_population_statistics_whoever_has_which_batch(pool, kind, shares, training):
    expected = _expected()
    answers = pool(len(shares)).run(_recalibrated, kind, shares, 1.0, training)
    fresh = _model("torch").state_dict()
    for state, kinds, modes in answers:
        assert all(torch.equal(v, answers[0][0][k]) for k, v in state.items()), (
            "the same bits everywhere"
        )
        for name, (mean, var) in zip(("1", "5"), expected, strict=True):
            assert_close(state[f"{name}.running_mean"], mean, torch.float64, "mean")
            assert_close(state[f"{name}.running_var"], var, torch.float64, "var")
            assert int(state[f"{name}.num_batches_tracked"]) == 0
        assert all(torch.equal(state[k], v) for k, v in fresh.items() if "running" not in k), (
            "parameters stay"
        )
        assert kinds == (["population"] if len(shares) > 1 else [])
        assert modes == [training] * len(modes)


@pytest.mark.parametrize("kind", ["torch", "batch"])
def test_mix_blends_old_and_new(pool, kind):
    (state, _, _), (other, _, _) = pool(2).run(
        _recalibrated, kind, [[4, 0], [3, 1, 2]], 0.25, False
    )
    mean, var = _expected()[0]
    assert_close(state["1.running_mean"], 0.25 * mean, torch.float64, "mean")
    assert_close(state["1.running_var"], 0.75 + 0.25 * var, torch.float64, "var")
    assert torch.equal(state["1.running_var"], other["1.running_var"])


def test_frozen_layers_are_left_alone():
    model = _model("batch").train()
    model[1].eval()
    recalibrate(model, _batches())
    assert torch.equal(model[1].running_mean, torch.zeros(4).double())
    assert not torch.equal(model[5].running_mean, torch.zeros(5).double())
    assert not model[1].training


def test_inputs_as_mappings():
    layer = SyncBatchNorm(3).double()
    recalibrate(layer, [{"x": x, "mask": torch.ones(len(x), 1)} for x in _batches()])
    assert_close(layer.running_mean, torch.cat(_batches()).mean(0), torch.float64, "mean")


def _failing(bad_rank: int) -> tuple[str, bool]:
    model = _model("batch")
    batches = _batches()
    if dist.get_rank() == bad_rank:
        batches[2] = batches[2][:, :2]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        recalibrate(model, batches)
        message = "no error"
    except (FaultError, RuntimeError) as error:
        message = str(error)
    return message, all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items()
    ) and model.training


def test_a_failing_worker_stops_all_and_nothing_is_changed(pool):
    answers = pool(3).run(_failing, 1)
    assert [is_unchanged for _, is_unchanged in answers] == [True] * 3
    assert answers[0] == answers[2]
    assert "got an error on rank(s) [1]. Nothing was changed" in answers[0][0]
    assert "shapes cannot be multiplied" in answers[1][0]


def _not_finite(kind: str, value: float) -> tuple[str, bool]:
    model, batches = _model(kind), _batches()
    if dist.get_rank() == 1:
        batches[2][3, 1] = value
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        recalibrate(model, batches)
        message = "no error"
    except FaultError as error:
        message = str(error)
    return message, all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("kind", "value"), [("torch", torch.nan), ("renorm", torch.inf)])
def test_statistics_that_are_not_finite_replace_none(pool, kind, value):
    answers = pool(2).run(_not_finite, kind, value)
    words = "activations must be finite, got NaN or infinity at '1' on some worker. Look at"
    assert answers == [(answers[0][0], True)] * 2
    assert answers[0][0].startswith(words)


def _without_data() -> str:
    try:
        recalibrate(_model("running"), [])
        return "no error"
    except FaultError as error:
        return str(error)


def test_no_data_anywhere(pool):
    answers = pool(2).run(_without_data)
    assert (
        answers
        == ["`batches` must hold data on at least one worker, got none. Nothing was changed."] * 2
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: recalibrate(nn.BatchNorm1d(3), [], mix=0.0),
            r"`mix` must be in \(0, 1\], got 0.0",
        ),
        (
            lambda: recalibrate(nn.BatchNorm1d(3), [], mix=float("nan")),
            r"`mix` must be in \(0, 1\], got nan",
        ),
        (lambda: recalibrate(nn.Linear(3, 3), []), "got none in Linear"),
        (
            lambda: recalibrate(
                nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3)), torch.randn(4, 1, 3, 3)
            ),
            "`batches` must be an iterable of batches, got one Tensor. Give a list of it",
        ),
        (lambda: recalibrate(nn.BatchNorm1d(3), {"x": torch.ones(2, 3)}), "got one dict"),
        (
            lambda: recalibrate(nn.BatchNorm1d(3, track_running_stats=False), []),
            "got none in BatchNorm1d",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def _wrapped(shares: list[list[int]]) -> Tensor:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    wrapped = nn.parallel.DistributedDataParallel(model)
    batches = [_batches()[i].float() for i in shares[dist.get_rank()]]
    recalibrate(wrapped, [*batches, torch.zeros(1, 3)] if batches else [])
    return model[1].running_mean.clone()


def test_a_wrapped_model_and_a_batch_of_one(pool):
    """DDP's forward would broadcast buffers and hang; torch's layer would refuse the single value."""
    first, second = pool(2).run(_wrapped, [[0, 1], []])
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.zeros(4))


class _Merging(nn.Module):
    """As adapters that `train` merges into the weights for evaluation, and takes out again."""

    is_merged = False

    def train(self, mode: bool = True):
        self.is_merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        assert self.is_merged
        return x


class _OwnForward(nn.BatchNorm1d):
    def forward(self, input):
        return super().forward(input)


class _Pair(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, y):
        return self.norm(x) + y


@pytest.mark.parametrize("norm", [_OwnForward, SyncBatchNorm])
def test_a_model_that_has_been_compiled(norm):
    model, batches = _Pair(norm(3)), [(torch.randn(8, 3), torch.ones(3), "more")] * 2
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(*batches[0][:2])
    recalibrate(compiled, batches)
    torch.testing.assert_close(model.norm.running_mean, batches[0][0].mean(0))


def test_lazy_parameters_are_refused_before_anything_runs():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.LazyLinear(2))
    with pytest.raises(InputError, match=r"must have its parameters, got lazy ones: 1\.weight"):
        recalibrate(model, [torch.randn(4, 3)])
    with pytest.raises(InputError, match=r"must have its parameters, got lazy ones: 1\.weight"):
        train_only_norms(model)
    assert all(p.requires_grad for p in model.parameters())


def test_within_forward_mode_differentiation():
    """Nothing is exchanged, so that nothing is hidden from whoever looks at operators."""
    batches = [torch.randn(4, 3) for _ in range(2)]
    model, other = nn.Sequential(SyncBatchNorm(3)), nn.Sequential(SyncBatchNorm(3))
    recalibrate(other, batches)
    with torch.autograd.forward_ad.dual_level():
        recalibrate(model, batches)
    torch.testing.assert_close(model.state_dict(), other.state_dict())


def test_modes_are_left_and_put_back_by_each_modules_own_train():
    model = nn.Sequential(
        _Merging(), nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()).eval()
    )
    model[2][1].train()
    before = [module.training for module in model.modules()]
    recalibrate(model, [torch.randn(8, 3)])
    assert (
        [module.training for module in model.modules()]
        == before
        == [True, True, True, False, False, True]
    )
    assert not model[0].is_merged
    assert not torch.equal(model[1].running_mean, torch.zeros(3))
    assert torch.equal(model[2][0].running_mean, torch.zeros(3))
