"""explain: what it says is what training does, and saying it changes nothing and asks nobody."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from syncnorm import (
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    explain,
    groups,
    monitor,
    prepare_ddp,
    recalibrate,
)
from syncnorm.comm import exchange
from syncnorm.errors import InputError
from syncnorm.model.explain import mean_ratio
from tests.model.foreign import OwnForward

COTANGENT = torch.randn(6, 4, generator=torch.Generator().manual_seed(8))


def test_one_row_for_each_normalisation_layer():
    patched = nn.BatchNorm2d(4)
    patched.forward = lambda x: x
    model = nn.Sequential(
        nn.BatchNorm2d(4), nn.SyncBatchNorm(4), SyncBatchNorm(4), OwnForward(4), patched, nn.GroupNorm(2, 4),
        nn.LayerNorm(4), nn.InstanceNorm2d(4), SyncBatchRenorm(4), nn.ReLU(), nn.LazyBatchNorm2d(),
    )  # fmt: skip
    assert [(row.layer, row.now, row.convert.partition(",")[0]) for row in explain(model).rows] == [
        ("0", "BatchNorm2d", "SyncBatchNorm"),
        ("1", "torch.nn.SyncBatchNorm", "SyncBatchNorm"),
        ("2", "SyncBatchNorm", "unchanged"),
        ("3", "OwnForward", "refused: is a OwnForward"),
        ("4", "BatchNorm2d", "refused: has a forward that was set on the instance"),
        ("5", "GroupNorm", "unchanged"),
        ("6", "LayerNorm", "unchanged"),
        ("7", "InstanceNorm2d", "unchanged"),
        ("8", "SyncBatchRenorm", "unchanged"),
        ("10", "LazyBatchNorm2d", "SyncBatchNorm"),
    ]


class Twice(nn.Module):
    """A layer that is called twice, once with fewer positions, and one that is not called."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = SyncBatchNorm(3, **options)
        self.other = SyncBatchNorm(5, **options)
        self.unused = SyncBatchNorm(7, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.norm(x)[:, :, :2])
        return self.other(torch.cat([y, y[:, :2]], 1))


def _said_and_done(
    sync: str, process_group: groups.Spec
) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Messages and bytes of a training step, and values of the statistics, as they are said and as
    they are.
    """
    model = nn.Sequential(Twice(sync=sync, process_group=process_group), nn.BatchNorm1d(5).eval())
    prepare_ddp(model)
    x = torch.randn(4, 3, 5)
    model[0].train()
    for _ in range(2):  # a lagged layer waits in its first step
        model(x).sum().backward()
    said = explain(model, x)
    watch = monitor(model)
    if sync == "lagged":  # and wherever it has drifted
        model.state_dict()
        for name in ("norm", "other", "unused"):
            model[0].get_submodule(name).lagged_waits.zero_()
        for source in {id(m.statistics): m.statistics for m in model[0].children()}.values():
            source._averages = None
    with exchange.record() as made:
        model(x).sum().backward()
    figures = watch.read()["layers"]
    rows = {row.layer: row for row in said.rows if row.now == "SyncBatchNorm"}
    return (
        [said.messages, said.bytes],
        [len(made), 8 * sum(one.numel for one in made)],
        [row.values for row in rows.values()],
        [figures[name]["count"] for name in rows],
    )


@pytest.mark.parametrize("process_group", [None, 2, 1], ids=str)
@pytest.mark.parametrize("sync", ["batch", "running", "lagged", "none"])
def test_messages_bytes_and_counts_are_those_of_training(pool, sync, process_group):
    pooled = {None: 4, 2: 2, 1: 1}[process_group] if sync in ("batch", "lagged") else 1
    for said, done, values, counts in pool(4).run(_said_and_done, sync, process_group):
        assert said == done
        assert (said[0] > 0) == (sync != "none" and process_group != 1)
        # Of the two calls of the first layer the last has fewer values, and is what `monitor` sees.
        assert values == [4 * 2 * pooled, 4 * 2 * pooled, None]
        if sync != "lagged":  # whose flat message has the sums of both calls
            assert counts == [*values[:2], None]


def _said_and_done_by_several_names() -> list[tuple[int, int]]:
    """Messages and bytes of layers whose groups are the same workers, said in three ways."""
    specs: list[groups.Spec] = [None, "node", dist.get_world_size()]
    model = nn.Sequential(
        *(SyncBatchNorm(4, process_group=spec, sync="running") for spec in specs),
        *(SyncBatchNorm(4, process_group=spec) for spec in specs),
        nn.Conv1d(4, 9, 1),
        SyncBatchNorm(9),
    )
    prepare_ddp(model)
    x = torch.randn(5, 4, 3)
    with exchange.record() as made:
        model(x).square().sum().backward()
    said = explain(model, x)
    return [(said.messages, said.bytes), (len(made), 8 * sum(one.numel for one in made))]


def test_groups_of_the_same_workers_are_one_whatever_they_are_called(pool):
    for said, done in pool(3).run(_said_and_done_by_several_names):
        assert said == done
    layers = [SyncBatchNorm(2, sync="running", process_group=spec) for spec in (None, 4)]
    assert explain(nn.Sequential(*layers), world_size=4).messages == 1


def test_other_numbers_of_workers():
    x = torch.zeros(4, 2, 3)
    for spec, world_size, workers in (
        (None, 1, 1),
        (None, 8, 8),
        (2, 8, 2),
        (groups.for_samples(9, 4), 7, 3),
    ):
        (row,) = explain(SyncBatchNorm(2, process_group=spec), x, world_size).rows
        assert (row.workers, row.samples, row.values) == (workers, 4 * workers, 12 * workers)
        assert (row.messages, row.bytes) == ((0, 0) if workers == 1 else (2, 8 * 12))
    (row,) = explain(SyncBatchNorm(2, process_group="node"), x, 8).rows
    assert (row.workers, row.values, row.messages) == (None, None, None), (
        "nobody has said where the workers are"
    )
    found = explain(SyncBatchNorm(2, process_group=3), x, 8)
    assert found.lints == [
        "the layer: `process_group` must divide the number of workers, got 3 for 8 worker(s). Take "
        "a divisor, or "
        "groups.for_samples, which takes any number of workers."
    ]


def _node() -> int | None:
    model = nn.Sequential(SyncBatchNorm(2, process_group="node"))
    prepare_ddp(model)
    return explain(model).rows[0].workers


def test_the_workers_of_a_machine_are_known_after_prepare_ddp(pool):
    assert pool(3).run(_node) == [3] * 3


# Changes nothing.


class Restless(nn.Module):
    """Draws random numbers and changes a buffer whenever it is used."""

    def __init__(self, raises: bool = False) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))
        self.raises = raises

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach().mean()
        if self.raises and not self.training:
            raise RuntimeError("in evaluation")
        return x + torch.rand(()) * 0


def _state(model: nn.Module) -> list[Any]:
    """Everything that explaining could change; buffers as they are, without bringing them up to
    date.
    """
    return [
        [b.clone() for b in model.buffers()],
        [p.detach().clone() for p in model.parameters()],
        [p.grad for p in model.parameters()],
        [m.training for m in model.modules()],
        [list(m._forward_pre_hooks) + list(m._forward_hooks) for m in model.modules()],
        [getattr(m, "statistics", None) for m in model.modules()],
        [getattr(m, "seen", None) for m in model.modules()],
        torch.get_rng_state(),
    ]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or a == b


def _model(sync: str, raises: bool = False) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(3, 4), SyncBatchNorm(4, sync=sync), nn.Dropout(0.5), Restless(raises), nn.BatchNorm1d(4).eval(),
        SyncBatchRenorm(4, schedule=RenormSchedule.switch(1, 2.0, 1.0), sync=sync),
    )  # fmt: skip


def _explained(sync: str, raises: bool) -> list[bool]:
    """Whether the state is the same: after explaining on rank 0 alone; after evaluating there;
    after going on.
    """
    rank, x = (
        dist.get_rank(),
        torch.randn(6, 3, generator=torch.Generator().manual_seed(dist.get_rank())),
    )
    model, other = (prepare_ddp(_model(sync, raises)) for _ in range(2))
    for each in (model, other):
        torch.manual_seed(11)
        each(x).backward(COTANGENT)
    before, facts = _state(model), []
    if rank == 0:
        with exchange.record() as made:
            if raises:
                with pytest.raises(RuntimeError, match="in evaluation"):
                    explain(model, x)
            else:
                assert len(explain(model, x).rows) == 3
        facts += [_same(_state(model), before), not made]
    torch.manual_seed(12)
    model(x).backward(COTANGENT)
    torch.manual_seed(12)
    other(x).backward(COTANGENT)
    facts.append(_same([*model.state_dict().values()], [*other.state_dict().values()]))
    facts.append(_same([p.grad for p in model.parameters()], [p.grad for p in other.parameters()]))
    return facts


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("sync", ["batch", "running", "lagged"])
def test_one_worker_explains_alone_and_nothing_has_happened(pool, sync, raises):
    first, second = pool(2).run(_explained, sync, raises)
    assert first == [True] * 4
    assert second == [True] * 2


def _evaluated() -> list[bool]:
    model = prepare_ddp(_model("running"))
    model(torch.randn(6, 3)).backward(COTANGENT)
    before = _state(model)
    with torch.no_grad():
        model.eval()(torch.randn(6, 3))
    model.train()
    model[4].eval()
    return [_same(a, b) for a, b in zip(_state(model), before, strict=True)]


def test_an_evaluation_does_change_such_a_model(pool):
    """What the test above can see: buffers and random numbers."""
    for same in pool(2).run(_evaluated):
        assert not same[0]
        assert not same[-1]


# Lints and advice.


class Backwards(nn.Module):
    """Runs its parts in the reverse of the order in which it has them."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in reversed(self.parts):
            x = part(x)
        return x


class Beside(nn.Module):
    """Runs two parts one after the other, on the same input, and a third on what they give."""

    def __init__(self, first: nn.Module, second: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.head = first, second, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.first(x), self.second(x)], 1))


class Residual(nn.Module):
    """A block with dropout at the end of its branch, and a norm in its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3))
        self.shortcut, self.norm, self.head = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(x) + self.shortcut(x)))


def test_a_compiled_model_is_looked_at_uncompiled():
    backend = mock.Mock(side_effect=lambda graph, _: graph)
    model = nn.Sequential(nn.Linear(4, 4), SyncBatchNorm(4), nn.ReLU())
    found = explain(torch.compile(model, backend=backend), torch.randn(40, 4), world_size=2)
    assert found.messages == 2
    backend.assert_not_called()


def test_a_part_that_is_scripted_takes_no_hooks():
    scripted = torch.jit.script(nn.BatchNorm1d(4))
    model = nn.Sequential(nn.Linear(4, 4), SyncBatchNorm(4), nn.Dropout(), scripted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explain(model, torch.randn(40, 4), world_size=2).messages == 2
    assert scripted.running_mean.tolist() == [0.0] * 4


def test_dropout_before_batch_statistics_by_the_order_of_execution():
    x = torch.randn(40, 4)
    norm, dropout = nn.BatchNorm1d(4), nn.Dropout(0.2)
    assert explain(nn.Sequential(norm, dropout), x).lints == []
    assert explain(Backwards(dropout, norm), x).lints == []
    assert explain(nn.Sequential(nn.Dropout(0.0), norm), x).lints == []
    assert explain(nn.Sequential(dropout, nn.LayerNorm(4)), x).lints == []
    assert explain(nn.Sequential(dropout, norm)).lints == [], (
        "without a sample the order is not known"
    )
    for part in (norm, dropout):  # frozen, or off
        part.eval()
        assert explain(nn.Sequential(dropout, norm), x).lints == []
        part.train()
    assert explain(Beside(dropout, norm, nn.Linear(8, 2)), x).lints == []
    # The norm of the shortcut is called before that behind the sum.
    (lint,) = explain(Residual(), x).lints
    assert lint.startswith("dropout at 'inner.1' runs before 'norm':")
    reverse = Backwards(norm, nn.ReLU(), dropout)
    for model, names in (
        (nn.Sequential(dropout, norm), ("0", "1")),
        (reverse, ("parts.2", "parts.0")),
    ):
        (lint,) = explain(model, x).lints
        assert lint.startswith(
            f"dropout at {names[0]!r} runs before {names[1]!r}: training statistics hold a variance"
        )


def test_a_switch_that_replaced_our_layers_is_told():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(SyncBatchNorm(4)))
    assert re.search(r"contains torch.nn.SyncBatchNorm at \['0'\]", explain(model).lints[0])
    assert explain(nn.Sequential(SyncBatchNorm(4))).lints == []


@pytest.mark.parametrize("values", [2, 4, 8, 32])
def test_how_much_too_small_sigma_is(values):
    g = torch.Generator().manual_seed(0)
    sampled = (
        torch.randn(40000, values, generator=g, dtype=torch.float64)
        .std(1, correction=0)
        .mean()
        .item()
    )
    assert mean_ratio(values) == pytest.approx(sampled, rel=0.01)


@pytest.mark.parametrize(
    ("layer", "shape", "world_size", "advice"),
    [
        (SyncBatchNorm(2), (8, 2), 1, ""),
        (SyncBatchNorm(2), (2, 2), 4, ""),
        (SyncBatchNorm(2), (2, 2), 1, "2 value(s) per statistic, sigma_B is 0.56 sigma on average: SyncBatchRenorm"),
        (SyncBatchNorm(2, process_group=2), (2, 2), 4,
         "4 value(s) per statistic, sigma_B is 0.80 sigma on average: pool over more workers or "
         "SyncBatchRenorm"),
        (SyncBatchNorm(2, sync="none"), (4, 2, 9), 4,
         "4 sample(s) per statistic: pool over more workers or SyncBatchRenorm"),
        (SyncBatchRenorm(2), (4, 2, 9), 1, "4 sample(s) per statistic: larger batches"),
        (nn.BatchNorm1d(2), (4, 2, 9), 1, "4 sample(s) per statistic: SyncBatchRenorm"),
        (SyncBatchNorm(2), (5, 2, 9), 1, ""),
    ],
    ids=str,
)  # fmt: skip
def test_advice(layer, shape, world_size, advice):
    (row,) = explain(layer, torch.zeros(shape), world_size).rows
    assert row.advice == advice


def test_a_frozen_layer_is_told_and_sends_nothing():
    model = nn.Sequential(SyncBatchNorm(2), SyncBatchNorm(2).eval())
    free, frozen = explain(model, torch.zeros(8, 2), 4).rows
    assert free.messages == 2
    assert (frozen.messages, frozen.advice) == (
        None,
        "frozen: in evaluation mode while the model trains",
    )


def test_the_schedule_and_the_readings():
    layer = SyncBatchRenorm(
        2, schedule=RenormSchedule(3.0, 5.0, warmup_steps=0, r_steps=4, d_steps=5)
    )
    model = nn.Sequential(layer)
    layer.num_batches_tracked.fill_(2)
    (row,) = explain(model, readings={"0": {"between_share": 0.25}}).rows
    assert (row.clock, row.r_max, row.d_max, row.between) == (2, 2.0, 2.0, 0.25)
    watch = monitor(model)
    model(torch.randn(5, 2))
    assert explain(model, readings=watch.read()["layers"]).rows[0].between == 0.0


def test_samples_of_other_kinds_and_wrapped_models(pool):
    assert pool(2).run(_wrapped) == [["0"]] * 2
    x = torch.zeros(8, 2)
    for sample in (x, (x, torch.zeros(8)), [x], {"input": x}):
        assert explain(nn.Sequential(SyncBatchNorm(2)), sample, 1).rows[0].values == 8


class Detector(nn.Module):
    """Two inputs, and a third that it may do without."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.BatchNorm2d(3), nn.BatchNorm1d(4)

    def forward(self, images: Tensor, rois: Tensor, targets: Tensor | None = None) -> Tensor:
        self.backbone(images)
        return self.head(rois)


IMAGES = torch.zeros(2, 3, 4, 4)


def test_models_with_several_inputs():
    model, rois = Detector(), torch.randn(9, 4)
    for sample in ((IMAGES, rois), [IMAGES, rois, "targets"], {"images": IMAGES, "rois": rois}):
        assert [row.values for row in explain(model, sample, 2).rows] == [64, 18]
    recalibrate(model, [(IMAGES, rois, "targets")])
    torch.testing.assert_close(model.head.running_mean, rois.mean(0))
    message = (
        "must hold the arguments of Detector.forward, images, rois, targets, got Tensor (missing a "
        "required argument: "
        "'rois'). Give a tensor, a tuple with an element for each, or a mapping by name."
    )
    with pytest.raises(InputError, match=re.escape(f"`sample` {message}")):
        explain(model, IMAGES)
    with pytest.raises(InputError, match=re.escape(f"`batches` {message}")):
        recalibrate(model, [IMAGES])


def test_an_empty_sample_gives_no_advice():
    _, head = explain(Detector(), (IMAGES, torch.zeros(0, 4)), 8).rows
    assert (head.samples, head.values, head.advice) == (0, 0, "the sample holds nothing here")
    model = nn.Sequential(Several(SyncBatchNorm(4)))
    (row,) = explain(model, [[torch.zeros(size, 4) for size in (9, 0, 8)]], 1).rows
    assert (row.values, row.advice) == (8, ""), "of several calls the fewest that hold something"


class Several(nn.Module):
    """Levels of a feature pyramid."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [self.layer(x) for x in levels]


def test_one_worker_is_said_and_no_reason_for_renormalisation_alone():
    model, x = nn.Sequential(SyncBatchNorm(2)), torch.zeros(4, 2, 9)
    found = explain(model, x)
    assert (
        found.rows[0].advice
        == "4 sample(s) per statistic: pool over more workers or SyncBatchRenorm"
    )
    hint = "a training step: 0 message(s), 0 bytes from each worker, for 1 worker; for 8: explain(..., world_size=8)"
    assert str(found).splitlines()[2] == hint
    assert "for 1 worker" not in str(explain(model, x, 1)) + str(explain(model, x, 2))
    assert "for 1 worker" not in str(explain(nn.GroupNorm(1, 2), x))


def _wrapped() -> list[str]:
    return [
        row.layer
        for row in explain(
            DistributedDataParallel(prepare_ddp(nn.Sequential(SyncBatchNorm(2))))
        ).rows
    ]


def test_bad_arguments():
    with pytest.raises(
        InputError, match=re.escape("`world_size` must be at least 1, got 0. It counts workers.")
    ):
        explain(SyncBatchNorm(2), world_size=0)
    lazy = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(
        InputError,
        match=re.escape("`model` must have its parameters, got lazy ones: 0.w"),
    ):
        explain(lazy, torch.zeros(4, 2))
    assert isinstance(lazy[0], nn.LazyBatchNorm1d)


def test_the_table():
    model = nn.Sequential(
        nn.BatchNorm1d(3), nn.Dropout(0.5), SyncBatchRenorm(3), nn.GroupNorm(1, 3)
    )
    text = str(explain(model, torch.zeros(2, 3), world_size=2)).splitlines()
    names = "layer now convert sync workers samples values messages bytes clock r_max d_max advice"
    assert " ".join(text[0].split()) == names
    assert text[1].split()[:9] == [
        "0",
        "BatchNorm1d",
        "SyncBatchNorm",
        "batch",
        "2",
        "4",
        "4",
        "2",
        "128",
    ]
    assert text[2].split()[9:12] == ["0", "1", "0"]
    assert text[3].split() == ["3", "GroupNorm", "unchanged"]
    assert text[4] == "a training step: 4 message(s), 256 bytes from each worker"
    assert text[5].startswith("! dropout at '1' runs before '2'")
    # Each column begins where its name does.
    assert text[1][text[0].index("workers")] == "2"
    assert str(explain(nn.Linear(2, 2))) == "no normalisation layer"
    assert math.isclose(mean_ratio(4), 0.798, abs_tol=1e-3)


def test_a_sampler_that_nobody_tells_the_epoch():
    data = TensorDataset(torch.zeros(8, 3))
    sampler = DistributedSampler(data, num_replicas=2, rank=0)
    (lint,) = explain(nn.BatchNorm1d(3), loader=DataLoader(data, sampler=sampler)).lints
    assert "is at epoch 0" in lint
    assert "set_epoch(epoch)" in lint
    sampler.set_epoch(1)
    assert explain(nn.BatchNorm1d(3), loader=DataLoader(data, sampler=sampler)).lints == []
