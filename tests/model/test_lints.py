"""Lints of explain and of a training's first step: each speaks where it should, and is silent else."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from syncnorm import ElasticBatchSampler, SyncBatchNorm, explain
from syncnorm.family import EvoNorm
from syncnorm.model.lints import decay_lints, head_lints, model_lints, recorded_calls
from syncnorm.model.makers import Makers

X = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))


def lints(model: nn.Module, x: Tensor = X, **options: object) -> list[str]:
    return explain(model, x, **options).lints


# The same order in every epoch.

DATA = TensorDataset(torch.zeros(8, 3))


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        (DataLoader(DATA), "the loader's SequentialSampler does not shuffle: every epoch has the same order"),
        (DataLoader(DATA, sampler=DistributedSampler(DATA, 2, 0, shuffle=False)), "DistributedSampler does not shuffle"),
        (DataLoader(DATA, sampler=DistributedSampler(DATA, 2, 0)), "is at epoch 0"),
        (DataLoader(DATA, shuffle=True), None),
        (DataLoader(DATA, batch_sampler=ElasticBatchSampler(8, 4)), None),
        (DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 2, False)), None),
        (DataLoader(DATA, batch_size=None), None),
    ],
)  # fmt: skip
def test_samplers(loader, said):
    found = explain(nn.BatchNorm1d(3), loader=loader).lints
    if said is None:
        assert found == []
    else:
        (lint,) = found
        assert said in lint


# Dropout before a batch norm.


def test_the_variance_with_dropout_and_without_is_measured():
    """x of mean c and variance v: c^2 (1/p - 1) + v/p against v, p being what is kept."""
    torch.manual_seed(0)
    x = 2 * torch.randn(4000, 3) + 3
    model = nn.Sequential(nn.Dropout(0.2), SyncBatchNorm(3), nn.Linear(3, 2))
    (lint,) = lints(model, x)
    found = re.search(r"does not have, (\S+) against (\S+) on the sample \(ratio (\S+)\)", lint)
    assert found
    on, off, ratio = map(float, found.groups())
    variance = x.var(0, correction=0).mean().item()
    assert off == pytest.approx(variance, rel=0.01)
    assert on == pytest.approx(9 * (1 / 0.8 - 1) + 4 / 0.8, rel=0.05)
    assert ratio == pytest.approx(off / on, abs=0.01)


def test_measuring_changes_nothing():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[3].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert len(lints(model)) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model] == [True, True, True, False]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_dropout_before_a_layer_of_the_family():
    model = nn.Sequential(nn.Dropout(0.5), EvoNorm(3), nn.Conv2d(3, 2, 1))
    (lint,) = lints(model, torch.randn(4, 3, 2, 2))
    assert lint.startswith("dropout at '0' runs before '1'")


# Weight decay.


class Ways(nn.Module):
    """One weight goes straight into a batch norm, one by way of a function, one nowhere near."""

    def __init__(self) -> None:
        super().__init__()
        self.straight, self.bent, self.head = (nn.Linear(3, 3) for _ in range(3))
        self.first, self.second = SyncBatchNorm(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.straight(x)))
        return self.head(self.second(F.relu(self.bent(x))))


def test_effective_learning_rates():
    model = Ways()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.02)
    (lint,) = lints(model, optimizer=sgd)
    rate = 0.1 / model.straight.weight.square().sum().item()
    assert lint.startswith("weight decay 0.02 acts on 1 weight(s) directly before batch norms")
    assert f"lr / ||w||^2, now {rate:.3g} at 'straight'." in lint
    groups = [
        {"params": [model.straight.weight], "weight_decay": 0.0},
        {"params": [model.head.weight], "weight_decay": 0.1},
    ]
    assert lints(model, optimizer=torch.optim.SGD(groups, lr=0.1)) == []
    assert lints(model) == []
    model.first.eval()
    assert lints(model, optimizer=sgd) == [], "it is frozen, so the scale counts"


def test_the_least_and_the_greatest_rate():
    model = nn.Sequential(
        nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), SyncBatchNorm(2), nn.ReLU(inplace=True),
        nn.Conv2d(2, 2, 1), nn.ReLU(inplace=True), SyncBatchNorm(2), nn.Conv2d(2, 2, 1),
    )  # fmt: skip
    with torch.no_grad():
        for number, value in ((0, 1.0), (2, 0.1), (5, 9.0)):
            model[number].weight.fill_(value)
    adam = torch.optim.AdamW(model.parameters(), lr=0.6, weight_decay=0.1)
    (lint,) = lints(model, torch.randn(4, 3, 2, 2), optimizer=adam)
    assert "acts on 2 weight(s)" in lint
    assert "now 0.1 at '0' to 15 at '2'." in lint


# A batch norm before the loss.


@pytest.mark.parametrize(
    ("layers", "speaks"),
    [
        ([nn.Linear(3, 2), nn.BatchNorm1d(2)], True),
        ([nn.Linear(3, 2), SyncBatchNorm(2, affine=False), nn.Softmax(1)], True),
        ([nn.BatchNorm1d(3), nn.Linear(3, 2)], False),
        ([nn.Linear(3, 2), nn.LayerNorm(2)], False),
        ([nn.BatchNorm1d(3), nn.Dropout(0.5)], False),
        ([nn.Linear(3, 2), nn.BatchNorm1d(2).eval()], False),
    ],
    ids=str,
)
def test_a_batch_norm_before_the_loss(layers, speaks):
    found = lints(nn.Sequential(*layers))
    if speaks:
        (lint,) = found
        assert lint.startswith("batch norm '1' is the last layer before the loss:")
    else:
        assert found == []


def test_it_is_the_order_of_execution_and_of_one_forward():
    model = Ways()
    with recorded_calls(model) as calls:
        model(X)
        model.first(X)
        model(X)
    assert [each.module for each in calls] == [
        model.straight, model.first, model.bent, model.second, model.head,
    ]  # fmt: skip
    assert [each.fed_by for each in calls] == [None, model.straight, None, None, model.second]
    assert head_lints(model, calls) == []


def test_a_view_is_the_tensor_and_what_was_written_to_is_not():
    makers: Makers[str] = Makers()
    for leaf in (torch.ones(2, 3), torch.ones(2, 3, requires_grad=True)):
        x = leaf * 2
        makers.note(x, "made")
        assert makers.maker_of(x) == makers.maker_of(x.flatten()) == "made"
        assert makers.maker_of(x[:1]) is makers.maker_of(x.clone()) is makers.maker_of(None) is None
        torch.relu_(x)
        assert makers.maker_of(x) is None


def test_what_checkpointing_repeats_is_no_call():
    model = nn.Sequential(nn.Linear(3, 3), SyncBatchNorm(3), nn.Linear(3, 2))

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            y = checkpoint(self.model[:2], x, use_reentrant=False)
            self.model[2](y).sum().backward()
            return y

    around = Around()
    with recorded_calls(around) as calls:
        around(X)
    assert [each.module for each in calls] == [*model]
    assert model_lints(around, calls) == []
    sgd = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    assert len(decay_lints(around, calls, sgd)) == 1
