"""monitor: what the layers saw, by hand from what went into them; and that nobody pays for what is
not read.
"""

from __future__ import annotations

import copy
import gc
import io
import json
import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from syncnorm import (
    Lagged,
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    accumulate,
    functional,
    monitor,
    prepare_ddp,
)
from syncnorm.comm import exchange, tally
from tests.model.curves import resnet18
from tests.model.parts import state_of, uneven_batch
from tests.operators import Operators

NAMES = ("count", "between_share", "mean_gap", "var_gap", "r_clipped", "d_clipped")
R_MAX, D_MAX = 1.1, 0.1
BOUNDS = RenormSchedule.constant(R_MAX, D_MAX)
EPS = 1e-5


def _model(sync: str | Lagged, schedule: RenormSchedule = BOUNDS) -> nn.Sequential:
    """A batch norm "0" of 4 channels and a renorm "2" of 3, made alike on all workers.

    The running statistics of the latter are such that in the second batch r and d are at their
    bounds in some channels.
    """
    torch.manual_seed(0)
    renorm = SyncBatchRenorm(3, momentum=0.9, schedule=schedule, sync=sync)
    renorm.get_buffer("running_mean")[1] = 3.0
    return nn.Sequential(SyncBatchNorm(4, sync=sync), nn.Conv1d(4, 3, 1), renorm).double()


class Watched(NamedTuple):
    """What one rank knows after training, for the expectation by hand."""

    report: dict[str, Any]
    inputs: dict[str, Tensor]
    """Of each layer, in the last training forward."""
    before: dict[str, Tensor]
    """The buffers before the last training forward, and after it."""
    after: dict[str, Tensor]


def _watched(model: nn.Module, batches: Sequence[Tensor]) -> Watched:
    prepare_ddp(model)
    watch = monitor(model)
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0].detach().clone())
        )
    before = state_of(model)
    for batch in batches:
        before = state_of(model)
        model(batch).sin().sum().backward()
    return Watched(watch.read(), inputs, before, state_of(model))


def _train(sync: str | Lagged, batches: Sequence[Sequence[Tensor]]) -> Watched:
    """Train on this rank's shard of each batch."""
    return _watched(_model(sync), [shards[dist.get_rank()] for shards in batches])


def _gaps(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """d and log r of each channel for a statistic over all of x, before clipping: (2, C)."""
    values = x.transpose(0, 1).flatten(1)
    mean, var, sigma = values.mean(1), values.var(1, correction=0), torch.sqrt(running_var + EPS)
    return torch.stack([(mean - running_mean) / sigma, torch.log(torch.sqrt(var + EPS) / sigma)])


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _figures(gaps: Tensor, is_renorm: bool) -> dict[str, float | None]:
    """From the gaps of all channels (of all workers)."""
    r_clipped = (gaps[1].abs() >= math.log(R_MAX)).double().mean().item()
    d_clipped = (gaps[0].abs() >= D_MAX).double().mean().item()
    return {
        "mean_gap": _rms(gaps[0]),
        "var_gap": _rms(gaps[1]),
        "r_clipped": r_clipped if is_renorm else None,
        "d_clipped": d_clipped if is_renorm else None,
    }


def _between_share(parts: Sequence[Tensor]) -> float:
    """1 - (sum of squares within workers) / (total sum of squares), each with n * eps as the layer
    has it.
    """
    values = [p.transpose(0, 1).flatten(1) for p in parts]
    whole = torch.cat(values, 1)
    within = sum((v - v.mean(1, keepdim=True)).square().sum(1) for v in values if v.numel())
    total = (whole - whole.mean(1, keepdim=True)).square().sum(1)
    floor = whole.shape[1] * EPS
    return (1 - (within + floor) / (total + floor)).mean().item()


def _check_close(got: dict[str, float | None], expected: dict[str, float | None]) -> None:
    assert got.keys() == set(NAMES)
    for name, value in expected.items():
        assert got[name] == (
            None if value is None else pytest.approx(value, rel=1e-9, abs=1e-12)
        ), name


BATCHES = [uneven_batch(8, seed) * scale for seed, scale in ((0, 1.0), (1, 1.5))]


def _shards(sizes: Sequence[int]) -> list[list[Tensor]]:
    return [list(batch.split(list(sizes))) for batch in BATCHES]


@pytest.mark.parametrize("sizes", [(8,), (6, 2), (5, 1, 2), (8, 0)], ids=str)
def test_figures_of_pooled_statistics(pool, sizes):
    ranks = pool(len(sizes)).run(_train, "batch", _shards(sizes))
    for name, is_renorm in (("0", False), ("2", True)):
        parts = [rank.inputs[name] for rank in ranks]
        # Renormalisation knows the running statistics before the batch.
        state = ranks[0].before if is_renorm else ranks[0].after
        gaps = _gaps(torch.cat(parts), state[f"{name}.running_mean"], state[f"{name}.running_var"])
        expected = {
            "count": 8.0 * 5,
            "between_share": _between_share(parts),
            **_figures(gaps, is_renorm),
        }
        for rank in ranks:
            _check_close(rank.report["layers"][name], expected)
            assert rank.report["layers"] == ranks[0].report["layers"]
        assert expected["between_share"] > 0.1 if 0 not in sizes and len(sizes) > 1 else True
        assert expected["mean_gap"] > 0.01
        assert expected["var_gap"] > 0.01
    assert [ranks[0].report["layers"]["2"][name] for name in ("r_clipped", "d_clipped")] == [
        2 / 3,
        1 / 3,
    ]


@pytest.mark.parametrize("sizes", [(6, 2), (5, 1, 2), (8, 0)], ids=str)
@pytest.mark.parametrize("sync", ["running", "none"])
def test_figures_of_local_statistics_are_those_of_all_workers(pool, sizes, sync):
    """Root mean squares and shares over the workers that have data; the share between workers is of
    all of it.
    """
    ranks = pool(len(sizes)).run(_train, sync, _shards(sizes))
    for name, is_renorm in (("0", False), ("2", True)):
        gaps = []
        for rank in ranks:
            state = rank.before if is_renorm else rank.after
            if rank.inputs[name].numel():
                running = state[f"{name}.running_mean"], state[f"{name}.running_var"]
                gaps.append(_gaps(rank.inputs[name], *running))
        expected = {
            "count": 8.0 * 5 / len(sizes),
            "between_share": _between_share([rank.inputs[name] for rank in ranks]),
            **_figures(torch.cat(gaps, 1), is_renorm),
        }
        for rank in ranks:
            _check_close(rank.report["layers"][name], expected)
            assert rank.report["layers"] == ranks[0].report["layers"]


def _lagged() -> tuple[dict[str, Any], dict[str, Tensor]]:
    layer = SyncBatchNorm(4, sync=Lagged(max_drift=math.inf), dtype=torch.float64)
    model = prepare_ddp(nn.Sequential(layer))
    watch = monitor(model)
    # The first two are waited for.
    for batch in (uneven_batch(8, 0), uneven_batch(8, 0), 1.5 * uneven_batch(10, 1)):
        model(batch.tensor_split(2)[dist.get_rank()]).sin().sum().backward()
    return watch.read()["layers"]["0"], state_of(model)


def test_lagged_layers_are_compared_by_the_average_they_used(pool):
    """In the third step that is the first two's moments; count and share are the batch's own."""
    for got, state in pool(2).run(_lagged):
        gaps = _gaps(uneven_batch(8, 0), state["0.running_mean"], state["0.running_var"])
        share = _between_share((1.5 * uneven_batch(10, 1)).tensor_split(2))
        _check_close(got, {"count": 50.0, "between_share": share, **_figures(gaps, False)})


def _in_groups() -> dict[str, Any]:
    """A layer over all three workers, and one over two of them."""
    rank = dist.get_rank()
    made = [dist.new_group([0, 1]), dist.new_group([2])]
    group = made[rank == 2]
    assert isinstance(group, dist.ProcessGroup)
    model = nn.Sequential(
        SyncBatchNorm(4, affine=False, dtype=torch.float64),
        SyncBatchNorm(4, process_group=group, dtype=torch.float64),
    )
    watch = monitor(model)
    with exchange.record() as record:
        model(uneven_batch(9, 0).split([4, 3, 2])[rank])
        layers = watch.read()["layers"]
    return {"layers": layers, "sent": [e.numel for e in record if e.kind == "monitor"]}


def test_a_layer_over_a_sub_group_is_its_groups(pool):
    zero, one, two = pool(3).run(_in_groups)
    assert zero["layers"] == one["layers"]
    assert zero["layers"]["0"] == two["layers"]["0"]
    assert [each["layers"]["1"]["count"] for each in (zero, one, two)] == [35.0, 35.0, 10.0]
    parts = list(uneven_batch(9, 0).split([4, 3, 2]))
    # The first layer's output is the whole batch's, so the second sees its parts on the same scale.
    scale = (
        torch.cat(parts)
        .transpose(0, 1)
        .flatten(1)
        .var(1, correction=0)
        .add(EPS)
        .sqrt()
        .view(1, -1, 1)
    )
    assert zero["layers"]["1"]["between_share"] == pytest.approx(
        _between_share([p / scale for p in parts[:2]])
    )
    assert two["layers"]["1"]["between_share"] == 0.0
    assert [each["sent"] for each in (zero, two)] == [
        [exchange.size_of(3 * 4 + 8)] * 2,
        [exchange.size_of(3 * 4 + 8)],
    ]


def _share_of(shards: Sequence[Tensor]) -> tuple[float, list[int]]:
    model = _model("batch")
    watch = monitor(model)
    model(shards[dist.get_rank()])
    with exchange.record() as record:
        share = watch.read()["layers"]["0"]["between_share"]
    return share, [e.numel for e in record]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_nothing_lies_between_workers_with_the_same_data(pool, workers):
    batch = uneven_batch(6, 0)
    ((share, sent), *_) = pool(workers).run(_share_of, [batch] * workers)
    assert share == pytest.approx(0.0, abs=1e-13)
    assert sent == ([exchange.size_of(3 * (4 + 3) + 8 * 2)] if workers > 1 else [])
    if workers > 1:
        ((share, _), *_) = pool(workers).run(
            _share_of, [batch + 5.0 * rank for rank in range(workers)]
        )
        assert share > 0.5


def test_by_hand():
    """Mean 2 and variance 1 against 0 and 1 in one channel, 0 and 0 in the other. Weights count."""
    layer = SyncBatchRenorm(2, eps=1e-12, schedule=RenormSchedule.constant(1.5, 1.0))
    layer(torch.tensor([[1.0, 0.0], [3.0, 0.0], [99.0, 99.0]]), torch.tensor([[2.0], [2.0], [0.0]]))
    log_r = math.log(1e-12) / 2
    assert monitor(layer).read()["layers"][""] == {
        "count": 4.0,
        "between_share": 0.0,
        "mean_gap": pytest.approx(math.sqrt((2.0**2 + 0.0) / 2)),
        "var_gap": pytest.approx(math.sqrt((0.0 + log_r**2) / 2)),
        "r_clipped": 0.5,
        "d_clipped": 0.5,
    }


def test_batch_normalisation_by_schedule_is_at_its_bounds():
    model = _model("none", RenormSchedule.switch(10, 3.0, 5.0))
    model(BATCHES[0])
    figures = monitor(model).read()["layers"]["2"]
    assert (figures["r_clipped"], figures["d_clipped"]) == (1.0, 1.0)
    assert figures["var_gap"] > 0.01


def test_before_the_first_forward_and_without_layers():
    assert monitor(_model("batch")).read()["layers"] == {
        "0": dict.fromkeys(NAMES),
        "2": dict.fromkeys(NAMES),
    }
    nothing = {"count": 0, "numbers": 0, "seconds": 0.0, "by_kind": {}}
    assert monitor(nn.BatchNorm1d(3)).read() == {"layers": {}, "exchanges": nothing}


def test_what_is_no_number_is_none():
    layer = SyncBatchNorm(2)
    empty = {**dict.fromkeys(NAMES), "count": 0.0}
    layer(torch.empty(0, 2))
    assert monitor(layer).read()["layers"][""] == empty
    layer(torch.tensor([[1.0, math.nan], [3.0, math.inf]]))
    report = monitor(layer).read()
    assert report["layers"][""] == {**empty, "count": 2.0}
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    untracked = SyncBatchNorm(2, track_running_stats=False)
    untracked(torch.tensor([[1.0, 5.0], [3.0, 4.0]]))
    assert monitor(untracked).read()["layers"][""] == {**empty, "count": 2.0, "between_share": 0.0}


def test_layers_that_do_not_train_give_their_last_training_forward():
    model = _model("none")
    watch = monitor(model)
    model(BATCHES[0])
    first = watch.read()["layers"]
    model[2].eval()
    model(BATCHES[1][:5])
    frozen = watch.read()["layers"]
    assert frozen["2"] == first["2"]
    assert (first["0"]["count"], frozen["0"]["count"]) == (40.0, 25.0)
    model.eval()(BATCHES[0])
    assert watch.read()["layers"] == frozen


def test_accumulating_layers_give_the_last_micro_batch():
    model = _model("none")
    watch = monitor(model)
    with accumulate(model):
        for piece in BATCHES[0].split([5, 3]):
            model(piece)
        assert watch.read()["layers"]["2"]["count"] == 15.0
    assert watch.read()["layers"]["2"]["count"] == 15.0


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_a_repeated_forward_is_not_seen(is_reentrant):
    """Of two calls the backward pass repeats the first one last."""
    reports = []
    for is_checkpointed in (False, True):
        model = _model("none")
        xs = [batch.clone().requires_grad_() for batch in (BATCHES[0], BATCHES[1][:5])]
        ys = [
            checkpoint(model, x, use_reentrant=is_reentrant) if is_checkpointed else model(x)
            for x in xs
        ]
        torch.cat([y.sin().flatten() for y in ys]).sum().backward()
        reports.append(monitor(model).read()["layers"])
    assert reports[0] == reports[1]
    assert reports[0]["0"]["count"] == 25.0


SYNCS = ["batch", "running", "lagged", "none"]


def _exchanges(
    sync: str, workers_share: list[int]
) -> tuple[dict, dict, dict, list[tuple[str, int]], dict]:
    model = prepare_ddp(_model(sync))
    wrapped = DistributedDataParallel(model)
    watch, other = monitor(wrapped), monitor(model)
    with exchange.record() as record:
        for batch in BATCHES:
            wrapped(batch.split(workers_share)[dist.get_rank()]).sin().sum().backward()
    sent = [(e.kind, e.numel) for e in record]
    first = watch.read()
    return (
        first["exchanges"],
        watch.read()["exchanges"],
        other.read()["exchanges"],
        sent,
        first["layers"],
    )


@pytest.mark.parametrize("sync", SYNCS)
def test_exchanges_are_those_recorded_since_the_last_reading(pool, sync):
    for first, second, other, sent, layers in pool(2).run(_exchanges, sync, [6, 2]):
        assert list(layers) == ["0", "2"], "named as in the model, not as in the wrapper"
        assert first["count"] == len(sent)
        assert first["numbers"] == sum(numel for _, numel in sent)
        assert first["by_kind"].keys() == {kind for kind, _ in sent}
        for kind, total in first["by_kind"].items():
            numels = [numel for k, numel in sent if k == kind]
            assert (total["count"], total["numbers"]) == (len(numels), sum(numels))
            assert 0 < total["seconds"] < 60
        assert first["seconds"] == pytest.approx(
            sum(t["seconds"] for t in first["by_kind"].values())
        )
        assert second == {"count": 0, "numbers": 0, "seconds": 0.0, "by_kind": {}}
        assert other["count"] == len(sent), "reading is not counted, by whatever monitor"
        assert (len(sent) > 0) == (sync != "none")


def _tallied() -> tuple[int, int, bool]:
    """How many kinds a monitor holds that nobody reads, how many exchanges; and whether it ends."""
    gc.collect()
    before = len(tally.watchers)
    watch = monitor(_model("batch"))
    watched = weakref.ref(watch._tally)
    for _ in range(30):
        exchange.sum_(torch.zeros(3, dtype=torch.float64), dist.group.WORLD, "count")
    kept = watch._tally.take()
    del watch
    gc.collect()
    exchange.sum_(torch.zeros(3, dtype=torch.float64), dist.group.WORLD, "count")
    return len(kept), kept["count"].count, watched() is None and len(tally.watchers) == before


def test_a_monitor_keeps_sums_and_ends_with_its_last_reference(pool):
    assert pool(2).run(_tallied) == [(1, 30, True)] * 2


def _trained(sync: str, is_read: bool) -> dict[str, Tensor | None]:
    model = prepare_ddp(_model(sync))
    watch = monitor(model)
    rank = dist.get_rank()
    for step in range(4):
        y = model(uneven_batch(5 + rank, 10 * step + rank))
        if is_read:
            watch.read()
        y.sin().sum().backward()
        if is_read:
            watch.read()
    return {**state_of(model), **{f"{name}.grad": p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("sync", SYNCS)
def test_reading_changes_no_bit_of_the_training(pool, sync):
    for read, unread in zip(
        pool(2).run(_trained, sync, True), pool(2).run(_trained, sync, False), strict=True
    ):
        assert all(torch.equal(read[name], value) for name, value in unread.items())


def _copied(sync: str) -> list[dict[str, Any]]:
    model = prepare_ddp(_model(sync))
    watch = monitor(model)
    for batch in BATCHES:
        model(batch.tensor_split(2)[dist.get_rank()]).sin().sum().backward()
    reports = [watch.read()]
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    # Made by ourselves, two lines above.
    copies = copy.deepcopy(model), torch.load(stream, weights_only=False)
    model(BATCHES[0][:3])
    reports += [monitor(each).read() for each in copies]
    return [report["layers"] for report in reports]


@pytest.mark.parametrize("sync", SYNCS)
def test_copies_and_pickles_have_seen_what_the_model_saw(pool, sync):
    for original, *copies in pool(2).run(_copied, sync):
        assert copies == [original, original]
        assert original["2"]["count"] == (40.0 if sync in ("batch", "lagged") else 20.0)


def _operators(norm: str, is_watched: bool) -> tuple[int, int]:
    """Of a training step, and of one reading."""
    make = {
        "norm": SyncBatchNorm,
        "renorm": lambda channels: SyncBatchRenorm(channels, schedule=BOUNDS),
    }[norm]
    # Without the library what a layer computes depends on its mean.
    torch.manual_seed(0)
    model = resnet18(make)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    watch = monitor(model) if is_watched else None
    x, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    for step in (
        Operators(),
        Operators(),
    ):  # the first one makes what the optimizer keeps
        with step:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
    reading = Operators()
    if watch is not None:
        with reading:
            assert watch.read()["layers"]["layer4.1.bn2"]["count"] == 4.0 * dist.get_world_size()
    return len(step.names), len(reading.names)


@pytest.mark.parametrize("norm", ["norm", "renorm"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_step_costs_nothing_more_and_a_reading_every_50_steps_under_a_hundredth(
    pool, norm, workers
):
    watched, unwatched = (
        pool(workers).run(_operators, norm, is_watched) for is_watched in (True, False)
    )
    for (step, reading), (plain, nothing) in zip(watched, unwatched, strict=True):
        assert step == plain > 300
        assert nothing == 0
        assert 0 < reading / 50 < 0.01 * step


def test_a_layer_makes_no_operator_more_than_the_function():
    """What is kept for the monitor is there anyway: the function keeps nothing."""
    layer, x = SyncBatchNorm(3), torch.randn(4, 3, 5)
    watch = monitor(layer)
    with Operators() as kept:
        layer(x)
    buffers = layer.running_mean, layer.running_var, layer.weight, layer.bias
    with Operators() as plain:
        functional.sync_batch_norm(x, *buffers, num_batches_tracked=layer.num_batches_tracked)
    assert kept.names == plain.names != []
    assert watch.read()["layers"][""]["count"] == 20.0


class Reads(TorchFunctionMode):
    """Logs what reads a tensor on the host, or makes one of the host's numbers."""

    SEEN = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "tensor")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in self.SEEN:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_reading_waits_for_the_device_once():
    """All but the first reading of these layers, whose widths no other test has."""
    model = nn.Sequential(SyncBatchNorm(11), nn.Conv1d(11, 13, 1), SyncBatchRenorm(13))
    watch = monitor(model)
    model(torch.randn(6, 11, 5))
    with Reads() as first:
        watch.read()
    with Reads() as second:
        watch.read()
    assert "tensor" in first.found  # the control
    assert second.found == ["tolist"]
