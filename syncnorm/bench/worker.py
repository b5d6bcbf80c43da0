"""One rank of a benchmark: builds the candidates of a case and lets them take turns.

The runner calls `begin`, `prepare` for each candidate, `take_rounds` and `peaks`, on all ranks at
once. What decides about a collective is agreed on by all of them.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm.bench import paired
from syncnorm.bench.candidates import LOCAL, Candidate
from syncnorm.bench.cases import Case
from syncnorm.bench.memory import peak_bytes
from syncnorm.comm import exchange
from syncnorm.model.ddp import prepare_ddp
from syncnorm.module import SyncNorm
from syncnorm.train.models import MODELS
from syncnorm.verify.collectives import counted

COPY = "copy"
LEAST_ROUNDS = 6
"""The fewest of which the interval is one of 95 %."""
_WARM_UP = 2
# Of a turn: short ones are as long as what the clock and the scheduler add.
_LEAST_SECONDS = {"cpu": 2e-3, "cuda": 2e-2}
_CLASSES = 10

Step = Callable[[], None]


class Prepared(NamedTuple):
    """The messages of one step that normalisation sends; None where they cannot be told."""

    messages: int | None
    message_bytes: int | None


@dataclass
class _Running:
    """The case that this rank is in."""

    case: Case
    device: str
    x: Tensor
    grad: Tensor
    calls: int = 1
    steps: dict[str, Step] = field(default_factory=dict)


_running: _Running | None = None


def begin(case: Case, device: str) -> int:
    """Make the case's data, and return the number of calls in a turn."""
    global _running
    _running = None  # frees what the case before has kept
    torch.compiler.reset()
    torch.manual_seed(dist.get_rank())
    x, grad = (torch.randn(case.shape, device=device) for _ in range(2))
    if case.channels_last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    _running = _Running(case, device, x, grad)
    if case.model is None:
        _running.x.requires_grad_()
        local = _layer_step(_running, Candidate(LOCAL))
        seconds = min(_timed(local, device) for _ in range(4))
        _running.calls = max(1, math.ceil(_LEAST_SECONDS[device] / _agreed(seconds)))
    return _running.calls


def prepare(candidate: Candidate) -> Prepared:
    """Add a candidate to the case's turns, once its first steps are done."""
    assert _running is not None
    make = _layer_step if _running.case.model is None else _model_step
    step = make(_running, candidate)
    for _ in range(2):
        step()
    found = _messages(step, candidate, _running.case)
    _running.steps[candidate.name] = step
    return found


def take_rounds(count: int, until: float, end: float) -> dict[str, list[float]]:
    """Seconds of each candidate, and of a copy of the input, in each round.

    Args:
        count: of rounds, at most.
        until: when to end, by `time.monotonic`, which all processes of a machine share.
        end: when to end even if there are fewer than `LEAST_ROUNDS`.
    """
    assert _running is not None
    run = _running
    turns: dict[str, Step] = {name: partial(_turn, run, step) for name, step in run.steps.items()}
    if run.case.model is None:
        source, target = run.x.detach(), torch.empty_like(run.grad)
        turns[COPY] = partial(_turn, run, lambda: _copy(target, source))

    def goes_on(done: int) -> bool:
        return _agreed(time.monotonic() - (until if done >= LEAST_ROUNDS else end)) < 0

    seconds = paired.rounds(turns, count, _WARM_UP, goes_on)
    return {name: [each / run.calls for each in times] for name, times in seconds.items()}


def peaks() -> dict[str, int | None]:
    """The peak of each candidate's memory in a step; after the rounds, for it slows them down."""
    assert _running is not None
    found = {}
    for name, step in _running.steps.items():
        _running.x.grad = None  # which a step would free first
        found[name] = peak_bytes(step, _running.device)
    return found


def _layer_step(run: _Running, candidate: Candidate) -> Step:
    layer = _prepared(candidate.make(run.x.shape[1], run.x.ndim).to(run.device))
    called: Any = torch.compile(layer) if candidate.is_compiled else layer

    def step() -> None:
        run.x.grad = None
        called(run.x).backward(run.grad)

    return step


def _model_step(run: _Running, candidate: Candidate) -> Step:
    torch.manual_seed(0)
    model = MODELS[f"{run.case.model}_imagenet"](
        in_channels=run.x.shape[1], num_classes=_CLASSES, norm_layer=candidate.make
    )
    # No second copy of the gradients: all candidates are in memory together.
    wrapped: Any = DistributedDataParallel(
        _prepared(model.to(run.device)), gradient_as_bucket_view=True
    )
    if candidate.is_compiled:
        wrapped = torch.compile(wrapped)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    labels = torch.arange(len(run.x), device=run.device) % _CLASSES

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(wrapped(run.x), labels).backward()
        optimizer.step()

    return step


def _prepared(model: nn.Module) -> nn.Module:
    """Ours made ready for DDP, which "running" and "lagged" need; others as they are."""
    if not any(isinstance(module, SyncNorm) for module in model.modules()):
        return model
    with warnings.catch_warnings(action="ignore"):  # of other people's layers, on purpose here
        return prepare_ddp(model)


def _messages(step: Step, candidate: Candidate, case: Case) -> Prepared:
    with exchange.record() as exchanges:
        step()
    if exchanges:
        return Prepared(len(exchanges), sum(8 * each.numel for each in exchanges))
    if case.model is not None or candidate.is_compiled:
        # DDP's own collectives are not told from a layer's, nor seen in compiled code.
        return Prepared(None, None)
    with counted(lambda tensor: tensor.nbytes) as collectives:
        step()
    return Prepared(len(collectives), sum(size for _, size in collectives))


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


def _turn(run: _Running, step: Step) -> None:
    for _ in range(run.calls):
        step()
    if run.device == "cuda":
        torch.cuda.synchronize()


def _timed(step: Step, device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _agreed(value: float) -> float:
    """The largest of all ranks' values."""
    most = torch.tensor(value, dtype=torch.float64, device=_running.device if _running else "cpu")
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()
