"""Methods with averages over steps: what is waited for, what is kept, what a step leaves behind."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from syncnorm import frozen_statistics, undocumented
from syncnorm.comm import exchange
from syncnorm.errors import FaultError, InputError
from syncnorm.family import MABN, OnlineNorm, PowerNorm, UnifiedNorm
from syncnorm.testing import shard
from tests.distributed.test_family import close, data, fill

C = 3
WARM = 4
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "power": partial(PowerNorm, C, warmup=WARM),
    "mabn": partial(MABN, C, window=2, warmup=WARM + 1, renorm_after=5),
    "mabn_lagged": partial(MABN, C, window=2, warmup=WARM + 1, renorm_after=5, lagged=True),
    "unified": partial(UnifiedNorm, C, window=2, warmup=WARM + 1, renorm_after=5),
    "unified_lagged": partial(
        UnifiedNorm, C, window=2, warmup=WARM + 1, renorm_after=5, lagged=True
    ),
    "online": partial(OnlineNorm, C, momentum=0.1),
}
AVERAGED_GRADIENTS = ("nu", "gradients", "gradient", "u", "v")
UNWAITED = ["power", "mabn_lagged", "unified_lagged", "online"]


def take_step(layer: nn.Module, step: int, samples: int | None = None) -> list[Tensor]:
    """Take a step on this rank's part of a batch of 5; what came out."""
    sizes = (3, 2) if dist.is_initialized() and dist.get_world_size() == 2 else (5,)
    rank = dist.get_rank() if dist.is_initialized() else 0
    x, _, cotangent = (shard(each, sizes)[rank][:samples] for each in data(step, 5))
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(cotangent)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def filled(name: str) -> nn.Module:
    layer = LAYERS[name]()
    fill(layer)
    return layer


def same(one: Any, two: Any) -> bool:
    """True if two lists or dictionaries of tensors have the same bits."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@contextmanager
def waits() -> Iterator[list[str]]:
    """The kinds of the sums that are waited for when they are sent."""
    kinds: list[str] = []
    true = exchange.sum_

    def sum_(message: Tensor, group: Any, kind: str, name: str = "") -> Tensor:
        kinds.append(kind)
        return true(message, group, kind, name)

    with patch.object(exchange, "sum_", sum_):
        yield kinds


def waited_for(name: str) -> list[list[str]]:
    layer, by_step = filled(name), []
    for step in range(WARM + 3):
        with waits() as kinds:
            take_step(layer, step)
        by_step.append(kinds)
    return by_step


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_waited_for(pool, name):
    both = ["moments", "gradients"]
    while_warm, after = {
        "power": (["moments"], []),
        "mabn": (both, both),
        "mabn_lagged": (both, []),
        "unified": (both, both),
        "unified_lagged": (both, []),
        "online": ([], []),
    }[name]
    assert pool(2).run(waited_for, name) == [[while_warm] * WARM + [after] * 3] * 2


def one_after_the_other(name: str) -> list[list[Tensor]]:
    """Take steps, after the warm-up rank 0 to their ends before rank 1 begins them."""
    layer, came_out = filled(name), []
    store = undocumented.world_store()
    for step in range(WARM + 4):
        key = f"test/{name}/{step}"
        if step >= WARM and dist.get_rank() == 1:
            store.wait([key], timedelta(seconds=60))
        came_out.append(take_step(layer, step))
        if step >= WARM and dist.get_rank() == 0:
            store.set(key, "done")
            # The next step begins with what all have sent in this one.
    return came_out


def together(name: str) -> list[list[Tensor]]:
    layer = filled(name)
    return [take_step(layer, step) for step in range(WARM + 4)]


@pytest.mark.parametrize("name", UNWAITED)
def test_a_worker_may_end_a_step_before_another_begins_it(pool, name):
    late, expected = pool(2).run(one_after_the_other, name), pool(2).run(together, name)
    for got, want in zip(late, expected, strict=True):
        assert all(same(a, b) for a, b in zip(got, want, strict=True))


def interrupted(name: str, stop: int, how: str) -> tuple[Any, Any]:
    """Steps without and with an interruption after which another layer goes on."""
    layer = filled(name)
    for step in range(stop):
        take_step(layer, step)
    if how == "state_dict":
        other = LAYERS[name]().double()
        other.load_state_dict(copy.deepcopy(layer.state_dict()))
    else:
        other = copy.deepcopy(layer)
    plain = [take_step(layer, step) for step in range(stop, WARM + 6)]
    resumed = [take_step(other, step) for step in range(stop, WARM + 6)]
    return [*plain, layer.state_dict()], [*resumed, other.state_dict()]


@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
@pytest.mark.parametrize("stop", [2, WARM, WARM + 3])
@pytest.mark.parametrize("name", LAYERS)
def test_a_resumed_run_is_the_same_to_the_bit(pool, name, stop, how):
    for plain, resumed in pool(2).run(interrupted, name, stop, how):
        assert all(same(a, b) for a, b in zip(plain, resumed, strict=True))


def test_a_load_replaces_what_is_under_way():
    layer = filled("power")
    before = copy.deepcopy(layer.state_dict())
    for step in range(WARM + 2):
        take_step(layer, step)
    layer.load_state_dict(before)
    assert same(layer.state_dict(), before)
    with waits() as kinds:
        take_step(layer, 0)
    assert kinds == ["moments"]


def frozen(name: str, steps: int) -> tuple[Any, Any, list[str]]:
    layer = filled(name)
    for step in range(steps):
        take_step(layer, step)
    before = copy.deepcopy(layer.state_dict())
    with exchange.record() as exchanges, frozen_statistics(layer):
        take_step(layer, 50)
        take_step(layer, 51)
    return before, layer.state_dict(), [each.kind for each in exchanges]


@pytest.mark.parametrize("name", LAYERS)
def test_frozen_nothing_moves_and_only_what_is_waited_for_is_sent(pool, name):
    for steps in (1, WARM + 2):
        for before, after, kinds in pool(2).run(frozen, name, steps):
            assert same(before, after)
            is_warm = steps < WARM
            waited = {"power": ["moments"] if is_warm else [], "online": []}
            otherwise = ["moments", "gradients"] if is_warm or name in ("mabn", "unified") else []
            assert kinds == 2 * waited.get(name, otherwise)


def repeated(name: str, reentrant: bool | None) -> list[Any]:
    layer, x = filled(name), None
    came_out: list[Any] = []
    for step in range(WARM + 3):
        x, _, cotangent = (shard(each, (3, 2))[dist.get_rank()] for each in data(step, 5))
        x = x.clone().requires_grad_()
        y = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
        y.backward(cotangent)
        came_out.append([y.detach(), x.grad])
    return [*came_out, [p.grad for p in layer.parameters()], layer.state_dict()]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_checkpointing_changes_no_bit(pool, name, reentrant):
    plain, again = pool(2).run(repeated, name, None), pool(2).run(repeated, name, reentrant)
    for got, expected in zip(again, plain, strict=True):
        assert all(same(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_a_second_derivative_is_refused(name):
    layer = filled(name)
    x = data(0, 5)[0].requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(InputError, match="gradient of this layer must not be differentiated"):
        grad.square().sum().backward()


def nothing_for_anybody(name: str) -> tuple[Any, Any]:
    layer = filled(name)
    for step in range(WARM + 1):
        take_step(layer, step)
    before = copy.deepcopy(layer.state_dict())
    take_step(layer, WARM + 1, samples=0)
    return before, layer.state_dict()


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_without_samples_moves_nothing(pool, name):
    for before, after in pool(2).run(nothing_for_anybody, name):
        assert same(before, after)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_that_are_not_finite_leave_nothing(name):
    layer = filled(name)
    for step in range(WARM + 2):
        take_step(layer, step)
    before = {n: b.clone() for n, b in layer.state_dict().items() if n in AVERAGED_GRADIENTS}
    x, _, cotangent = data(WARM + 2, 5)
    cotangent[1, 1, 0, 0] = torch.inf
    layer(x.requires_grad_()).backward(cotangent)
    after = layer.state_dict()
    assert before
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def with_wrong_mask(name: str, steps: int) -> tuple[list[str], bool]:
    """The errors of two forwards, the first with a mask that is wrong on rank 1."""
    layer, errors = filled(name), []
    for step in range(steps):
        take_step(layer, step)
    before = copy.deepcopy(layer.state_dict())
    wrong = -1.0 if dist.get_rank() == 1 else 1.0
    for weight in (wrong, 1.0):
        mask = torch.full((2, 1, 1, 1), weight, dtype=torch.float64)
        try:
            layer(torch.ones(2, C, 4, 3, dtype=torch.float64), mask).sum().backward()
        except FaultError as error:
            errors.append(str(error))
            assert same(before, layer.state_dict())
        else:
            errors.append("")
    return errors, same(before, layer.state_dict())


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "online"])
def test_a_wrong_mask_is_the_same_error_on_all_workers(pool, name):
    for steps, is_late in ((1, False), (WARM + 2, name in UNWAITED)):
        first, second = pool(2).run(with_wrong_mask, name, steps)
        assert first == second
        label = type(LAYERS[name]()).__name__
        said = f"`mask` must hold finite weights >= 0, in {label}. No statistics were updated."
        assert first[0] == (["", said] if is_late else [said, ""])


@pytest.mark.parametrize("name", ["power", "mabn_lagged", "unified"])
def test_where_nobody_looks_a_wrong_mask_leaves_nothing(name):
    """As on CUDA."""
    layer = filled(name)
    for step in range(WARM + 2):
        take_step(layer, step)
    before = copy.deepcopy(layer.state_dict())
    x = data(WARM + 2, 5)[0].requires_grad_()
    with patch("syncnorm.device._HOSTS", ()):
        layer(x, torch.full((5, 1, 1, 1), -1.0)).sum().backward()
        assert same(before, layer.state_dict())
        layer(x)


@pytest.mark.parametrize("kind", [torch.bool, torch.float64, torch.bfloat16])
def test_masks_of_any_type(kind):
    layer = LAYERS["unified"]()
    x, mask, cotangent = (each.float() for each in data(0, 5))
    expected = x.clone().requires_grad_()
    layer(expected, mask).backward(cotangent)
    layer = LAYERS["unified"]()
    x.requires_grad_()
    layer(x, mask.to(kind)).backward(cotangent)
    assert torch.equal(x.grad, expected.grad)


def all_masked(name: str) -> list[Tensor]:
    """Take a step in the warm-up in which nothing counts on any worker."""
    layer = LAYERS[name]()
    x, _, _ = data(0, 2)
    x = x.requires_grad_()
    y = layer.double()(x, torch.zeros(2, 1, *x.shape[2:]))
    y.sum().backward()
    return [y.detach(), x.grad, torch.tensor(int(layer.num_batches_tracked))]


@pytest.mark.parametrize("name", ["power", "mabn", "unified"])
def test_where_nothing_counts_the_output_is_the_bias(pool, name):
    for y, gradient, steps in pool(2).run(all_masked, name):
        assert torch.equal(y, torch.zeros_like(y))
        assert torch.equal(gradient, torch.zeros_like(gradient))
        assert steps == 0


def poisoned(is_bad: bool) -> dict[str, Tensor]:
    """Take steps of an online layer, one of which has a value that is not finite on rank 1."""
    layer = OnlineNorm(C, guard=None).double()
    for step in range(3):
        x, _, _ = data(step, 2)
        if is_bad and dist.get_rank() == 1 and step == 1:
            x[0, 0, 0, 0] = torch.inf
        layer(x)
    return dict(layer.state_dict())


def test_a_value_that_is_not_finite_leaves_nothing_in_online_statistics(pool):
    first, second = pool(2).run(poisoned, True)
    assert all(first[key].isfinite().all() for key in first)
    assert all(torch.equal(first[key], second[key]) for key in first)


def written() -> list[Tensor]:
    """Write a statistic, and read one, while sums are under way."""
    layer = OnlineNorm(C, guard=None).double()
    layer(data(0, 2)[0])
    read = layer.running_mean.clone()
    layer(data(1, 2)[0])
    layer.running_mean.fill_(5.0)
    layer.eval()(data(2, 2)[0])
    return [read, layer.running_mean.clone()]


def test_who_reads_or_writes_a_statistic_finds_the_last_step_in_it(pool):
    first, second = pool(2).run(written)
    assert torch.equal(first[0], second[0]), "the average over the workers"
    assert all((each[1] == 5).all() for each in (first, second))


def two_backwards() -> Tensor:
    """Two forwards before their backward passes."""
    layer = OnlineNorm(C, guard=None, gradient_momentum=0.5).double()
    x, _, cotangent = data(0, 2)
    ys = [layer(x.clone().requires_grad_()) for _ in range(2)]
    for y in ys:
        y.backward(cotangent * 100)
    return layer.u.clone()


def test_what_moves_while_an_average_is_under_way_keeps_its_move(pool):
    together = pool(2).run(two_backwards)
    (alone,) = pool(1).run(two_backwards)
    # All workers have the same data, so the average is each one's own.
    for each in together:
        close(each, alone)


@pytest.mark.parametrize("name", ["power", "mabn", "unified"])
def test_an_activation_may_write_over_the_output(name):
    make = LAYERS[name]
    gradients = []
    for in_place in (True, False):
        layer = type(make())(C, affine=False, warmup=2).double()
        x, _, cotangent = data(0, 3)
        x.requires_grad_()
        torch.nn.ReLU(inplace=in_place)(layer(x)).backward(cotangent)
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_the_counter_is_looked_at_when_it_can_tell_something(monkeypatch):
    """As on a device whose numbers the host would have to wait for."""
    monkeypatch.setattr("syncnorm.family.mean_square.is_host", lambda _: False)
    layer = PowerNorm(C, warmup=4).double()
    kinds = []
    for step in range(7):
        looked = layer._forwards_left
        kinds.append((layer.is_warming_up(4), looked <= 0))
        if step != 2:  # a step without samples
            layer.num_batches_tracked += 1
    assert [warms for warms, _ in kinds] == [True] * 5 + [False] * 2
    assert [looks for _, looks in kinds] == [True, False, False, False, True, True, True]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("power", "gradient_momentum=0.1, warmup=4, scaling_groups=1"),
        ("mabn_lagged", "window=2, warmup=5, renorm_after=5, lagged=True"),
        ("unified", "renorm_after=5, lagged=False, outlier_filtration=False"),
        ("online", "gradient_momentum=0.01, guard='layer_scaling'"),
    ],
)
def test_a_layer_says_on_what_workers_must_agree(name, said):
    assert repr(LAYERS[name]()).endswith(f"{said})")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(PowerNorm, 4, scaling_groups=3), "`scaling_groups` must divide .* = 4, got 3"),
        (partial(PowerNorm, 4, gradient_momentum=0.0), r"`gradient_momentum` must be in \(0, 1\]"),
        (partial(PowerNorm, 4, warmup=1.5), "`warmup` must be a number of steps, .*, got 1.5"),
        (partial(MABN, 4, window=1), "`window` must be a number of steps, at least 2, got 1"),
        (partial(UnifiedNorm, 4, window=2.5), "`window` must be .* at least 2, got 2.5"),
        (partial(MABN, 4, warmup=-1), "`warmup` must be .* at least 0, got -1"),
        (partial(UnifiedNorm, 4, renorm_after=None), "`renorm_after` must be .* got None"),
        (partial(OnlineNorm, 4, momentum=None), r"`momentum` must be in \(0, 1\), got None"),
        (partial(OnlineNorm, 4, guard="other"), "`guard` must be .*, got 'other'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(InputError, match=message):
        make()


def counted_steps(sync: str, *sizes: list[int]) -> list[int]:
    """The batches that an OnlineNorm has counted after each step, by this worker's sizes."""
    layer = OnlineNorm(C, sync=sync)
    counted = []
    for of_workers in sizes:
        x = torch.randn(of_workers[dist.get_rank()], C, 4, requires_grad=True)
        layer(x).sum().backward()
        counted.append(int(layer.num_batches_tracked))
    return counted


def test_a_step_without_any_sample_is_not_counted(pool):
    """Each worker alone knows only of its own."""
    sizes = [2, 1], [0, 0], [0, 3]
    assert pool(2).run(counted_steps, "batch", *sizes) == [[1, 1, 2]] * 2
    assert pool(2).run(counted_steps, "none", *sizes) == [[1, 1, 1], [1, 1, 2]]


def without_positions(shapes: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Statistics after two steps of an online layer on (samples, positions) of this worker."""
    layer = OnlineNorm(C).double()
    fill(layer)
    samples, positions = shapes[dist.get_rank()]
    for _ in range(2):
        x = torch.linspace(-1, 1, samples * C * positions, dtype=torch.float64)
        layer(x.view(samples, C, positions).requires_grad_()).square().sum().backward()
    return dict(layer.state_dict())


def test_samples_without_positions_move_no_online_statistics(pool):
    """They are as no samples."""
    (alone,) = pool(1).run(without_positions, [(2, 4)])
    for state in pool(2).run(without_positions, [(2, 4), (3, 0)]):
        for key, value in alone.items():
            close(state[key], value)
    untouched = OnlineNorm(C).double()
    fill(untouched)
    for state in pool(2).run(without_positions, [(2, 0), (0, 4)]):
        for key, value in untouched.state_dict().items():
            assert torch.equal(state[key], value), key


@pytest.mark.parametrize("sync", ["batch", "none"])
@pytest.mark.parametrize("factor", [1e20, 1e-30, math.inf])
@pytest.mark.parametrize(
    "make",
    [
        partial(MABN, C, window=2, warmup=0),
        partial(UnifiedNorm, C, window=2, warmup=0),
        partial(PowerNorm, C, warmup=0, scaling_groups=0),
        partial(PowerNorm, C, warmup=5, scaling_groups=0),
    ],
)
def test_averages_stay_finite_after_a_batch_whose_square_is_not(make, factor, sync):
    """A float32 has no room for the square of all that it has room for."""
    layer = make(sync=sync)
    for step in range(6):
        x = (torch.randn(3, C, 2, 2) * (factor if step == 1 else 1)).requires_grad_()
        y = layer(x)
        y.backward(torch.randn_like(y))
    state = layer.state_dict()
    assert all(value.isfinite().all() for value in state.values()), state
    assert layer.eval()(torch.randn(3, C, 2, 2)).isfinite().all()
