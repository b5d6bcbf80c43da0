"""The checks of torch's own suite for its SyncBatchNorm, made of both layers on a CPU.

That suite compares parameters or running statistics. Here outputs, input gradients, parameters and
buffers are all held against the whole batch in one process, in float64; and a layer with the
classic mistakes fails every one of the tests.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm import (
    RenormSchedule,
    SyncBatchRenorm,
    convert,
    convert_sync_batchnorm,
    join,
    prepare_ddp,
    reference,
    scale_loss,
)
from syncnorm.testing import RankFailure, RankPool, assert_close
from syncnorm.verify.collectives import counted
from tests.distributed.steps import make_layer, parameters, trained_statistics
from tests.verify.naive import Naive

BOUNDS = (1.5, 0.5)
KINDS = ["norm", "renorm"]
Steps = Sequence[tuple[Tensor, Tensor]]
"""Inputs and targets of each training step."""

both = pytest.mark.parametrize("kind", KINDS)


class Whole(nn.Module):
    """The oracle as a layer: the whole batch in one process."""

    def __init__(
        self, kind: str, channels: int, *, momentum: float = 0.1, affine: bool = True
    ) -> None:
        super().__init__()
        self.is_renorm, self.momentum = kind == "renorm", momentum
        self.running = _initial(kind, channels)
        if affine:
            self.weight, self.bias = (
                nn.Parameter(torch.ones(channels)),
                nn.Parameter(torch.zeros(channels)),
            )
        else:
            self.weight = self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return reference.batch_norm_inference(x, self.weight, self.bias, self.running)
        if self.is_renorm:
            r_max, d_max = BOUNDS
            return reference.batch_renorm(
                x,
                self.weight,
                self.bias,
                running=self.running,
                r_max=r_max,
                d_max=d_max,
                momentum=self.momentum,
            )
        return reference.batch_norm(
            x, self.weight, self.bias, running=self.running, momentum=self.momentum
        )


def _initial(kind: str, channels: int) -> reference.RunningStatistics:
    if kind != "renorm":
        return reference.RunningStatistics.initial(channels)
    running = trained_statistics(channels)
    return reference.RunningStatistics(running.mean.float().double(), running.var.float().double())


def _layer(kind: str, channels: int, **options) -> nn.Module:
    if kind == "naive":
        return Naive(channels, **options)
    return make_layer(
        channels, bounds=BOUNDS if kind == "renorm" else None, **{"momentum": 0.1, **options}
    )


def _model(
    kind: str, is_whole: bool, spatial: Sequence[int], dtype: torch.dtype, **options
) -> nn.Module:
    """Vectors pass through a network, images through the layer alone, called "norm"."""
    torch.manual_seed(0)
    layer = Whole(kind, 4, **options) if is_whole else _layer(kind, 4, **options)
    if layer.weight is not None:
        with torch.no_grad():
            for own, value in zip(
                (layer.weight, layer.bias), parameters(4, torch.float64), strict=True
            ):
                own.copy_(value)
    model = nn.Sequential()
    if not spatial:
        model.add_module("first", nn.Linear(4, 4))
    model.add_module("norm", layer)
    if not spatial:
        model.add_module("last", nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))
    return model.to(dtype).double() if is_whole else model.to(dtype)


@dataclass
class Trained:
    """The results of a training, on one rank or on the whole batches."""

    outputs: list[Tensor] = field(default_factory=list)
    grad_inputs: list[Tensor] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    grad_types: set[torch.dtype] = field(default_factory=set)


def _train(model: nn.Module, steps: Steps, lr: float = 0.1) -> Trained:
    """Gradients of the inputs are those of the mean over all workers' samples."""
    trained = Trained()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    workers = dist.get_world_size() if isinstance(model, DistributedDataParallel) else 1
    for x, target in steps:
        optimizer.zero_grad()
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = model(x)
        loss = (y - target).square().mean() if len(x) else y.sum() * 0.0
        (scale_loss(loss, len(x)) if workers > 1 else loss).backward()
        optimizer.step()
        trained.outputs.append(y.detach())
        trained.grad_inputs.append(x.grad / workers)
        trained.grad_types |= {p.grad.dtype for p in model.parameters()}
    return trained


def _on_rank(kind: str, steps: Steps, options: dict, is_joined: bool = False) -> Trained:
    """Under DDP, after a pickled copy was made of the model."""
    spatial = steps[0][0].shape[2:]
    model = _model(kind, False, spatial, steps[0][0].dtype, **options)
    wrapped = DistributedDataParallel(prepare_ddp(pickle.loads(pickle.dumps(model))))  # noqa: S301
    if is_joined:
        with join(wrapped):
            trained = _train(wrapped, steps)
    else:
        trained = _train(wrapped, steps)
    trained.state = wrapped.module.state_dict()
    return trained


def _on_one(kind: str, steps: Steps, options: dict) -> Trained:
    model = _model(kind, True, steps[0][0].shape[2:], steps[0][0].dtype, **options)
    trained = _train(model, [(x.double(), target.double()) for x, target in steps])
    running = model.norm.running
    counted = torch.tensor(running.num_batches_tracked)
    buffers = {
        "running_mean": running.mean,
        "running_var": running.var,
        "num_batches_tracked": counted,
    }
    trained.state = model.state_dict() | {f"norm.{name}": value for name, value in buffers.items()}
    return trained


def _data(
    sizes: Sequence[int], count: int, spatial: Sequence[int] = (), dtype=torch.float64
) -> list[list]:
    """By rank the shards of `count` batches.

    The mean drifts along each batch, so that shards differ.
    """
    g = torch.Generator().manual_seed(7)
    drift = torch.linspace(-1, 1, sum(sizes), dtype=torch.float64).view(-1, 1, *[1] * len(spatial))
    by_rank: list[list] = [[] for _ in sizes]
    for _ in range(count):
        x = torch.randn(sum(sizes), 4, *spatial, generator=g, dtype=torch.float64) + drift
        target = torch.randn(
            sum(sizes), 4 if spatial else 2, *spatial, generator=g, dtype=torch.float64
        )
        for steps, *shard in zip(
            by_rank, x.to(dtype).split(sizes), target.to(dtype).split(sizes), strict=True
        ):
            steps.append(tuple(shard))
    return by_rank


def _union(by_rank: Sequence[Steps]) -> Steps:
    """The values of all workers together, in each step."""
    together = []
    for step in range(max(len(steps) for steps in by_rank)):
        parts = [steps[step] for steps in by_rank if step < len(steps)]
        together.append(tuple(torch.cat(each) for each in zip(*parts, strict=True)))
    return together


class Differences:
    """Gathers all that is off, and raises at the end."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def __enter__(self) -> Differences:
        return self

    def close(
        self, got: Tensor, expected: Tensor, dtype: torch.dtype, what: str, factor: float = 1.0
    ) -> None:
        try:
            assert_close(got, expected, dtype, what, factor)
        except AssertionError as error:
            self._found.append(str(error))

    def same(self, got: object, expected: object, what: str) -> None:
        if got != expected:
            self._found.append(f"{what} is {got}, should be {expected}")

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None and self._found:
            raise AssertionError("\n".join(self._found))


def _check(
    pool: Callable[[int], RankPool],
    kind: str,
    by_rank: Sequence[Steps],
    is_joined: bool = False,
    **options,
) -> list[Trained]:
    """Train on the shards and on the whole batches, and compare all there is."""
    got = pool(len(by_rank)).run_each(
        _on_rank, [(kind, steps, options, is_joined) for steps in by_rank]
    )
    whole = _on_one("norm" if kind == "naive" else kind, _union(by_rank), options)
    dtype = by_rank[0][0][0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # In half types the loss and its gradient are rounded, too.
    factor = 4.0 if dtype == torch.float16 else 1.0
    with Differences() as differences:
        for step in range(len(whole.outputs)):
            have = [each for each in got if step < len(each.outputs)]
            for what in ("outputs", "grad_inputs"):
                parts = torch.cat([getattr(each, what)[step] for each in have])
                differences.close(
                    parts, getattr(whole, what)[step], dtype, f"{what} of step {step}", factor
                )
        for rank, each in enumerate(got):
            differences.same(each.state.keys(), whole.state.keys(), "state")
            for name, expected in whole.state.items():
                is_statistic = "running" in name or "tracked" in name
                value = each.state.get(name, torch.zeros(0))
                differences.close(
                    value, expected, wide if is_statistic else dtype, f"{name} of rank {rank}"
                )
    return got


@both
def test_parameters_after_five_steps_are_those_of_one_process(pool, kind):
    _check(pool, kind, _data((2, 2), 5))


@both
def test_without_affine_parameters(pool, kind):
    _check(pool, kind, _data((2, 2), 5), affine=False)


@both
def test_two_dimensional_input(pool, kind):
    _check(pool, kind, _data((3, 3), 5))


@both
def test_one_sample_per_process(pool, kind):
    _check(pool, kind, _data((1, 1), 5))


@both
def test_different_input_sizes_give_the_gradient_of_the_whole_batch(pool, kind):
    _check(pool, kind, _data((2, 3, 4), 5))


@both
def test_a_worker_with_empty_input(pool, kind):
    _check(pool, kind, _data((3, 0), 3))
    _check(pool, kind, _data((0, 3), 3))


@both
@pytest.mark.parametrize("spatial", [(4, 3), (4, 3, 2)], ids=["2d", "3d"])
def test_channels_last(pool, kind, spatial):
    by_rank = [
        [tuple(t.movedim(1, -1).contiguous().movedim(-1, 1) for t in shard) for shard in steps]
        for steps in _data((2, 2), 3, spatial)
    ]
    strides = by_rank[0][0][0].stride()
    for each in _check(pool, kind, by_rank):
        assert {t.stride() for t in each.outputs + each.grad_inputs} == {strides}


@both
def test_half(pool, kind):
    got = _check(pool, kind, _data((3, 2), 1, (5, 6), torch.float16))
    for each in got:
        assert each.grad_types == {each.outputs[0].dtype} == {torch.float16}
        assert each.state["norm.running_mean"].dtype == torch.float32


@both
def test_uneven_inputs_under_join(pool, kind):
    first, second = _data((2, 3), 5)
    _check(pool, kind, [first[:3], second], is_joined=True)


def _fed(kind: str, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    layer = _layer(kind, 2, momentum=0.99).double()
    for _ in range(20):
        x = x.detach().requires_grad_()
        y = layer(x)
        y.backward(cotangent)
    return [y.detach(), x.grad, layer.running_mean, layer.running_var]


@both
def test_different_input_sizes_give_the_running_value_of_all_data(pool, kind):
    g = torch.Generator().manual_seed(1)
    xs = [
        torch.randn(2, 2, length, generator=g, dtype=torch.float64) * 0.3**rank + rank
        for rank, length in enumerate((10, 100, 1000))
    ]
    cotangents = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in xs]
    got = pool(3).run_each(_fed, [(kind, *each) for each in zip(xs, cotangents, strict=True)])
    # Samples of different lengths make no batch; their elements in rows do.
    rows, g = (torch.cat([t.movedim(1, -1).reshape(-1, 2) for t in ts]) for ts in (xs, cotangents))
    whole = Whole("norm" if kind == "naive" else kind, 2, momentum=0.99).double()
    for _ in range(20):
        rows = rows.detach().requires_grad_()
        y = whole(rows)
        y.backward(g)
    with Differences() as differences:
        for what, place, expected in (("y", 0, y), ("grad_input", 1, rows.grad)):
            parts = torch.cat([answers[place].movedim(1, -1).reshape(-1, 2) for answers in got])
            differences.close(parts, expected, torch.float64, what)
        for _, _, mean, var in got:
            differences.close(mean, rows.mean(0), torch.float64, "running_mean")
            differences.close(
                var, rows.var(0, correction=int(kind != "renorm")), torch.float64, "running_var"
            )


def _nested(kind: str, halves: Sequence[Sequence[int]], x: Tensor, cotangent: Tensor) -> tuple:
    """A model whose layers are deep down, converted with this worker's group."""
    made = [dist.new_group(list(ranks)) for ranks in halves]
    group = made[next(i for i, ranks in enumerate(halves) if dist.get_rank() in ranks)]
    make = Naive if kind == "naive" else nn.BatchNorm1d
    model = nn.Sequential(
        nn.ModuleDict({"block": nn.Sequential(nn.Identity(), nn.Sequential(make(4)))})["block"]
    )
    model.add_module("outer", make(4))
    if kind == "renorm":
        convert(
            model, SyncBatchRenorm, process_group=group, schedule=RenormSchedule.constant(1.0, 0.0)
        )
    else:
        convert_sync_batchnorm(model, process_group=group)
    layers = [m for m in model.double().modules() if hasattr(m, "running_mean")]
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(cotangent)
    buffers = [layer.running_mean for layer in layers]
    return (
        y.detach(),
        x.grad,
        *buffers,
        [getattr(layer, "process_group", None) is group for layer in layers],
    )


@both
def test_nested_modules_get_the_group(pool, kind):
    halves, sizes = ((0, 2), (1, 3)), (3, 1, 2, 2)
    shards = [steps[0][0] for steps in _data(sizes, 1)]
    cotangents = [steps[0][0].flip(1) for steps in _data(sizes, 1)]
    got = pool(4).run_each(
        _nested, [(kind, halves, *each) for each in zip(shards, cotangents, strict=True)]
    )
    with Differences() as differences:
        for ranks in halves:
            # With these bounds and initial statistics renormalisation is batch normalisation.
            x = torch.cat([shards[rank] for rank in ranks]).requires_grad_()
            momentum = 0.01 if kind == "renorm" else 0.1
            inner, outer = (Whole("norm", 4, momentum=momentum).double() for _ in range(2))
            y = outer(inner(x))
            y.backward(torch.cat([cotangents[rank] for rank in ranks]))
            for what, place, expected in (("y", 0, y), ("grad_input", 1, x.grad)):
                differences.close(
                    torch.cat([got[rank][place] for rank in ranks]), expected, torch.float64, what
                )
            for rank in ranks:
                differences.close(
                    got[rank][2], inner.running.mean, torch.float64, "inner running_mean"
                )
                differences.close(
                    got[rank][3], outer.running.mean, torch.float64, "outer running_mean"
                )
                differences.same(got[rank][4], [True, True], "the group of both layers given")


def _evaluated(
    kind: str, x: Tensor, options: dict, who: Sequence[int]
) -> list[tuple[Tensor, Tensor, list]]:
    """Six evaluations on some ranks: outputs, input gradients, and the collectives that they made."""
    layer = _layer(kind, 4, **options).double()
    layer(torch.randn(3, 4, 5, dtype=torch.float64))
    found = []
    for _ in range(6 if dist.get_rank() in who else 0):
        x = x.detach().requires_grad_()
        with counted() as collectives:
            y = layer.eval()(x)
            y.backward(x.detach())
        found.append((y.detach(), x.grad, list(collectives), layer.running_mean, layer.running_var))
    return found


def _check_evaluation(
    pool, kind: str, who: Sequence[int], options: dict, shape: Sequence[int] = (3, 4, 5)
) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with Differences() as differences:
        for rank, found in enumerate(pool(2).run(_evaluated, kind, x, options, who)):
            differences.same(len(found), 6 if rank in who else 0, "number of evaluations")
            for y, grad_input, collectives, *running in found:
                x = x.detach().requires_grad_()
                if running[0] is None:
                    expected = reference.batch_norm(x)
                else:
                    expected = reference.batch_norm_inference(
                        x, None, None, reference.RunningStatistics(*running)
                    )
                expected.backward(x.detach())
                differences.close(y, expected, torch.float64, "y")
                differences.close(grad_input, x.grad, torch.float64, "grad_input")
                differences.same(collectives, [], "what was sent in evaluation")


@both
def test_evaluation_on_rank_0_alone_does_not_wait(pool, kind):
    _check_evaluation(pool, kind, [0], {})
    if kind == "norm":
        _check_evaluation(pool, kind, [0], {"track_running_stats": False})


@both
def test_evaluation_sends_nothing(pool, kind):
    _check_evaluation(pool, kind, [0, 1], {})
    _check_evaluation(pool, kind, [0, 1], {}, (0, 4, 5))


# Test -> what it says of a layer with the classic mistakes. Where its workers wait for each other:
# see below.
NAIVE = {
    test_parameters_after_five_steps_are_those_of_one_process: [
        "first.weight",
        "norm.weight",
        "outputs",
        "grad_inputs",
    ],
    test_without_affine_parameters: ["first.weight of rank 0", "grad_inputs of step 0"],
    test_two_dimensional_input: ["norm.running_var of rank 0", "grad_inputs of step 0"],
    test_one_sample_per_process: ["first.weight of rank 0", "norm.running_var of rank 1"],
    test_different_input_sizes_give_the_gradient_of_the_whole_batch: [
        "first.weight of rank 2",
        "grad_inputs of step 0",
    ],
    test_a_worker_with_empty_input: ["norm.running_var of rank 1"],
    test_half: ["norm.running_mean of rank 0", "grad_inputs of step 0"],
    test_different_input_sizes_give_the_running_value_of_all_data: ["running_var", "grad_input"],
    test_nested_modules_get_the_group: [
        "y",
        "inner running_mean",
        "the group of both layers given is [False, False]",
    ],
    test_evaluation_sends_nothing: [
        "what was sent in evaluation is [('broadcast', 4)], should be []"
    ],
}


@pytest.mark.parametrize("check", NAIVE, ids=lambda check: check.__name__.removeprefix("test_"))
def test_a_naive_layer_fails(pool, check):
    with pytest.raises(AssertionError) as error:
        check(pool, "naive")
    for what in NAIVE[check]:
        assert what in str(error.value)


@pytest.mark.parametrize("spatial", [(4, 3), (4, 3, 2)], ids=["2d", "3d"])
def test_a_naive_layer_fails_channels_last(pool, spatial):
    with pytest.raises(AssertionError, match="grad_inputs of step 0"):
        test_channels_last(pool, "naive", spatial)


@pytest.mark.parametrize(
    "check",
    [test_evaluation_on_rank_0_alone_does_not_wait, test_uneven_inputs_under_join],
    ids=["evaluation", "join"],
)
def test_workers_with_a_naive_layer_wait_for_each_other(check):
    with (
        RankPool(2, timeout_seconds=4.0) as pool,
        pytest.raises(RankFailure, match=r"no answer|Timed out|closed|reset by peer"),
    ):
        check(lambda _: pool, "naive")
