"""join in loops other than one forward, one backward: as one process on what the workers hold
together.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from syncnorm import SyncBatchNorm, accumulate, join, prepare_ddp, scale_loss
from syncnorm.errors import ExchangeError, FaultError
from syncnorm.testing import assert_close
from tests.model.parts import batches_of, union_of


class _Net(nn.Module):
    """With a buffer of its own that DDP broadcasts, and a part that is left out when asked to."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv1d(4, 5, 1), norm(5), nn.ReLU(), nn.Conv1d(5, 4, 3), norm(4)
        )
        self.head, self.extra = nn.Conv1d(4, 4, 3, padding=2), nn.Conv1d(4, 4, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, is_full: bool = True) -> Tensor:
        if self.training:
            self.seen += 1
        y = self.head(self.body(x))
        return y + self.extra(y) if is_full else y


def _loss(y: Tensor) -> Tensor:
    target = torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)[:, None]
    return (y - target).square().mean((1, 2)).mean()


Scale = Callable[[Tensor, int], Tensor]
Quiet = Callable[[], contextlib.AbstractContextManager]


def _views(model: nn.Module, x: Tensor, step: int, quiet: Quiet) -> Tensor:
    return _loss(model(x) - model(2 * x + 1))


def _views_half_quiet(model: nn.Module, x: Tensor, step: int, quiet: Quiet) -> Tensor:
    """The reduction is that of the first forward."""
    first = model(x)
    with quiet():
        return _loss(first - model(2 * x + 1))


def _teacher(model: nn.Module, x: Tensor, step: int, quiet: Quiet) -> Tensor:
    with torch.no_grad():
        target = model(x + 1)
    return _loss(model(x) - target)


def _steady_teacher(model: nn.Module, x: Tensor, step: int, quiet: Quiet) -> Tensor:
    with torch.no_grad():
        model.eval()
        target = model(x + 1)
        model.train()
    return _loss(model(x) - target)


def _wasted(model: nn.Module, x: Tensor, step: int, quiet: Quiet) -> Tensor:
    """The last forward never goes backward."""
    loss = _loss(model(x))
    model(3 * x)
    return loss


def _penalty(model: nn.Module, x: Tensor, step: int, quiet: Quiet) -> Tensor:
    """Gradients by the input are taken, which reduces none of the parameters', before another
    forward.
    """
    x = x.requires_grad_()
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return _loss(model(x)) + slope.square().mean((1, 2)).mean()


def _unused(model: nn.Module, x: Tensor, step: int, quiet: Quiet) -> Tensor:
    """A part is used in the first step only."""
    return _loss(model(x, step == 0))


def _plain(model: nn.Module, x: Tensor, step: int, quiet: Quiet) -> Tensor:
    return _loss(model(x))


def _steps(
    model: nn.Module,
    batches: list[Tensor],
    kind: str,
    scale: Scale,
    quiet: Quiet,
    every: int = 1,
    is_quiet: bool = False,
) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for start in range(0, len(batches), every):
        with accumulate(model):
            for step, x in enumerate(batches[start : start + every], start=start):
                with quiet() if is_quiet and step + 1 < start + every else contextlib.nullcontext():
                    scale(globals()[kind](model, x, step, quiet), len(x)).backward()
        if start + every <= len(batches):
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


def _on_worker(
    counts: list[int], kind: str, ddp: dict, every: int = 1, is_quiet: bool = False
) -> dict[str, Tensor]:
    rank = dist.get_rank()
    model = prepare_ddp(_Net(SyncBatchNorm).double())
    wrapped = DistributedDataParallel(model, **ddp)
    with join(wrapped):
        _steps(
            wrapped,
            batches_of(rank, counts[rank]),
            kind,
            scale_loss,
            wrapped.no_sync,
            every,
            is_quiet,
        )
        with torch.no_grad():
            # Everybody validates when its data has ended.
            model.eval()(torch.ones(1, 4, 3, dtype=torch.float64))
    return {name: value.clone() for name, value in model.state_dict().items()}


def _hold(got: list[dict[str, Tensor]], counts: list[int], kind: str, every: int = 1) -> None:
    whole = _Net(SyncBatchNorm).double()
    with torch.random.fork_rng():
        _steps(
            whole, union_of(counts), kind, lambda loss, count: loss, contextlib.nullcontext, every
        )
    for rank, state in enumerate(got):
        for name, expected in whole.state_dict().items():
            assert_close(
                state[name], expected, torch.float64, f"{kind}, {name}, rank {rank}", factor=100
            )


KINDS = ["_views", "_views_half_quiet", "_teacher", "_steady_teacher", "_wasted", "_penalty"]


@pytest.mark.parametrize("counts", [[4, 2], [0, 3]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_several_forwards_before_a_backward_pass(pool, kind, counts):
    _hold(pool(2).run(_on_worker, counts, kind, {}), counts, kind)


def _error(counts: list[int], kind: str, ddp: dict[str, object]) -> str:
    with pytest.raises(FaultError) as caught:
        _on_worker(counts, kind, ddp)
    return str(caught.value)


SETTINGS = [
    ("_views", {"static_graph": True}),
    ("_unused", {"find_unused_parameters": True}),
    ("_teacher", {"broadcast_buffers": False}),
    ("_views", {"gradient_as_bucket_view": True}),
    ("_views", {"bucket_cap_mb": 1e-5}),
]


@pytest.mark.parametrize(("kind", "ddp"), SETTINGS, ids=str)
def test_with_other_settings_of_ddp(pool, kind, ddp):
    got = pool(2).run(_on_worker, [1, 3], kind, ddp)
    if not ddp.get("broadcast_buffers", True):
        for state in got:
            state["seen"] = got[1]["seen"]
    _hold(got, [1, 3], kind)


def _evaluates_the_wrapper(ddp: dict[str, object]) -> list[float]:
    torch.manual_seed(0)
    rank = dist.get_rank()
    model = nn.Sequential(nn.Linear(2, 3), SyncBatchNorm(3), nn.Linear(3, 2)).double()
    wrapped = DistributedDataParallel(prepare_ddp(model), **ddp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with join(wrapped, optimizer):
        for i in range(3 if rank == 0 else 1):
            with torch.no_grad():
                wrapped.eval()(torch.ones(2, 2).double())
            x = torch.full((4, 2), float(rank + i)).double() + torch.arange(4)[:, None]
            optimizer.zero_grad()
            wrapped.train()(x).square().mean().backward()
            optimizer.step()
    return [float(each.sum()) for each in model.state_dict().values()]


@pytest.mark.parametrize("ddp", [{}, {"static_graph": True}], ids=str)
def test_an_evaluation_of_the_wrapper_exchanges_nothing(pool, ddp):
    """Where a worker has no data any more, DDP would ask the others in each forward."""
    first, second = pool(2).run(_evaluates_the_wrapper, ddp)
    assert first == second


@pytest.mark.parametrize("counts", [[3, 0], [1, 2, 0]], ids=str)
def test_a_static_graph_is_learned_by_all_workers(pool, counts):
    """Before it is known DDP makes exchanges that the others cannot make for a worker."""
    message = (
        r"`static_graph=True` needs all workers in DistributedDataParallel's first step, got data on "
        rf"{len(counts) - 1} of {len(counts)}\. Leave"
    )
    for error in pool(len(counts)).run(_error, counts, "_views", {"static_graph": True}):
        assert re.search(message, error), error


@pytest.mark.parametrize(
    ("is_quiet", "ddp"),
    [(False, {}), (True, {}), (False, {"gradient_as_bucket_view": True})],
    ids=str,
)
@pytest.mark.parametrize("counts", [[6, 2], [4, 3]], ids=str)
def test_accumulated_gradients(pool, counts, is_quiet, ddp):
    """With [4, 3] a worker leaves within an update: what only it has counts all the same."""
    _hold(pool(2).run(_on_worker, counts, "_plain", ddp, 2, is_quiet), counts, "_plain", 2)


class _Counter:
    """A user's own."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def _handed(counts: list[int]) -> tuple[list, dict[str, Tensor]]:
    rank = dist.get_rank()
    wrapped = DistributedDataParallel(prepare_ddp(_Net(SyncBatchNorm)))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    average, counter = AveragedModel(wrapped.module, use_buffers=True), _Counter()
    with join(wrapped, optimizer, schedule, scaler, average, counter):
        for x in batches_of(rank, counts[rank]):
            scaler.scale(scale_loss(_loss(wrapped(x.float())), len(x))).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            average.update_parameters(wrapped.module)
            counter.count += 1
    numbers = [
        optimizer.param_groups[0]["lr"],
        schedule.last_epoch,
        scaler.get_scale(),
        scaler._get_growth_tracker(),
    ]
    return [*numbers, counter.count], {k: v.clone() for k, v in average.state_dict().items()}


def test_what_else_changes_by_step_is_handed_over(pool):
    (first, average), (second, other) = pool(2).run(_handed, [1, 5])
    assert first == second == [0.1 / 32, 5, 16.0, 1, 5]
    assert all(torch.equal(value, average[name]) for name, value in other.items())
    assert int(average["n_averaged"]) == 5


class _Opaque(_Counter):
    def state_dict(self) -> dict[str, object]:
        return {"count": _Counter()}


def _failed(kind: str, counts: list[int]) -> str:
    rank = dist.get_rank()
    wrapped = DistributedDataParallel(prepare_ddp(_Net(SyncBatchNorm).double()))
    parameters = list(wrapped.parameters())
    own = {
        "opaque": lambda: [_Opaque()],
        "stateless": lambda: [object()],
        "zero": lambda: [
            torch.optim.SGD(parameters),
            ZeroRedundancyOptimizer(parameters, torch.optim.SGD),
        ],
        "local": lambda: [
            PostLocalSGDOptimizer(torch.optim.SGD(parameters), PeriodicModelAverager(2))
        ],
    }.get(kind, list)()
    try:
        with join(wrapped, *own):
            for x in batches_of(rank, counts[rank]):
                y = wrapped(x)
                if kind == "all" or (kind == "one" and rank == 2 and counts[0] == 0):
                    raise ValueError("a user's own")
                y.square().mean().backward()
            if kind == "evaluation":
                wrapped.eval()(torch.ones(2, 4, 3, dtype=torch.float64)).sum().backward()
    except (ValueError, ExchangeError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_what_is_refused(pool):
    for said in pool(3).run(_failed, "opaque", [1, 2, 0]):
        assert said.startswith(
            "InputError: `stateful` must have a state that torch.load(weights_only=True) takes, "
            "got another of _Opaque."
        )
    for said in pool(3).run(_failed, "stateless", [1, 1, 1]):
        assert said.startswith(
            "InputError: `stateful` must have the methods state_dict and load_state_dict, got "
            "object."
        )


@pytest.mark.parametrize(
    ("kind", "name"), [("zero", "ZeroRedundancyOptimizer"), ("local", "PostLocalSGDOptimizer")]
)
def test_optimizers_that_step_together_are_refused(pool, kind, name):
    """They would wait for a worker without data until the timeout."""
    for said in pool(2).run(_failed, kind, [1, 2]):
        assert said.startswith(
            "InputError: `stateful` must exchange nothing where workers may run out of data, got "
            f"{name} of torch.distributed"
        )


def test_workers_that_begin_different_forwards(pool):
    for said in pool(3).run(_failed, "evaluation", [1, 2, 2]):
        assert said.startswith(
            "FaultError: Forwards within `join` must be alike on all workers that still have data"
        )


def test_an_error_is_told_to_those_who_have_left(pool):
    *others, last = pool(3).run(_failed, "all", [0, 1, 2])
    words = "ExchangeError: the block of `join` must end alike on all workers that have data, got an error on 2 of 2."
    assert others[0].startswith(words)
    assert others[1] == last == "ValueError: a user's own"


def test_an_error_of_one_worker_is_told_to_the_others(pool):
    first, second, third = pool(3).run(_failed, "one", [0, 2, 2])
    words = "ExchangeError: the block of `join` must end alike on all workers that have data, got an error on 1 of 2."
    assert first.startswith(words)
    assert second.startswith(words)
    assert third == "ValueError: a user's own"


def _critic(norm: type[nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv1d(4, 6, 1), norm(6), nn.ReLU(), nn.Conv1d(6, 1, 3)).double()


def _play(
    models: list[nn.Module],
    optimizers: list[torch.optim.Optimizer],
    batches: list[Tensor],
    scale: Scale,
) -> None:
    """The critic is frozen in the generator's turn, also after the last one."""
    generator, critic = models
    for x in batches:
        for parameter in critic.parameters():
            parameter.requires_grad_()
        fake = generator(x)
        real, false = critic(x), critic(fake.detach())
        optimizers[1].zero_grad()
        scale((real - false - 1).square().mean(), len(x)).backward()
        optimizers[1].step()
        for parameter in critic.parameters():
            parameter.requires_grad_(False)
        optimizers[0].zero_grad()
        scale((critic(fake) - 1).square().mean(), len(x)).backward()
        optimizers[0].step()


def _optimizers(models: list[nn.Module]) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-2) for model in models]


def _adversaries(counts: list[int]) -> list[dict[str, Tensor]]:
    rank = dist.get_rank()
    models = [
        DistributedDataParallel(prepare_ddp(m))
        for m in (_Net(SyncBatchNorm).double(), _critic(SyncBatchNorm))
    ]
    optimizers = _optimizers(models)
    for _ in range(2):
        with join(models[0], optimizers[0]), join(models[1], optimizers[1]):
            _play(models, optimizers, batches_of(rank, counts[rank]), scale_loss)
    return [{k: v.clone() for k, v in model.module.state_dict().items()} for model in models]


@pytest.mark.parametrize("counts", [[3, 1], [0, 2]], ids=str)
def test_two_models_that_are_trained_together(pool, counts):
    models = [_Net(SyncBatchNorm).double(), _critic(SyncBatchNorm)]
    optimizers = _optimizers(models)
    for _ in range(2):
        _play(models, optimizers, union_of(counts), lambda loss, count: loss)
    for states in pool(2).run(_adversaries, counts):
        for state, whole in zip(states, models, strict=True):
            for name, expected in whole.state_dict().items():
                assert_close(state[name], expected, torch.float64, name, factor=1000)
