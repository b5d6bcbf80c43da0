"""Data that runs out: a worker without data answers the exchanges of the others with zeros.

Every forward begins with a roll call, three numbers summed over the workers. Nothing else changes
while all have data. Once one has left, each exchange is preceded by a header that says what will be
summed, and which reductions of gradients have begun, so that those who have left can take part in
whatever it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm.comm import exchange, groups, inflight
from syncnorm.compiled import untraced
from syncnorm.errors import ExchangeError, FaultError, InputError
from syncnorm.model.join.ddp import GRADIENTS, SYNC, Reductions
from syncnorm.model.join.handover import Handover, Stateful, check
from syncnorm.module import SyncNorm
from syncnorm.statistics.flat import device_of

_NEXT, _SUM, _GATHER, _REDUCE = 1, 2, 3, 4
_CODES = {"sum": _SUM, "gather": _GATHER}
# In a header the numbers of reductions follow the code, each a digit of this base.
_BASE = 64
# In a roll call the number of the part follows what its forward is like.
_KINDS = 16
_TRAINING = 1


@contextmanager
def join(model: nn.Module, *stateful: Stateful) -> Iterator[None]:
    """Within the block, a worker whose data ends early goes on answering the others, forward and
    backward.

        with join(ddp_model, optimizer):
            for x, y in batches:                     # as many as this worker has, also none
                loss = criterion(ddp_model(x), y)
                scale_loss(loss, len(x)).backward()
                optimizer.step()

    Each step is that of the batch which the workers that still have data hold together: statistics,
    and with `scale_loss` also gradients. For `scale_loss` multiplies by the number of *all*
    workers, and DDP divides by it, those included that have left (they add zeros). Without
    `scale_loss` the gradient shrinks with every worker that leaves. Several forwards may share a
    backward pass, or have none. Gradients may be accumulated, either with all but the last of an
    update in `no_sync`, or with none (with `find_unused_parameters`: in `no_sync`); a worker whose
    data ends within an update leaves its gradients as they are.

    At the end all workers have the parameters, running statistics (not those of `sync="none"`,
    which are each worker's own) and the states of `stateful` of one who was there last. Of two
    models that are trained together each has its `join`, one within the other: `with join(g,
    opt_g), join(d, opt_d):`.

    *Collectives*: in each forward an exchange of three numbers besides its own; once a worker has
    left, one of four numbers before each, and one more in a backward pass without any. At the end
    two more, and two for each of `stateful`. Every worker must use the block, and make the same
    exchanges as those that still have data; other collectives within it are not answered. A forward
    in evaluation mode under `torch.no_grad()` has none, unless DDP broadcasts buffers.

    An error that ends the block on all workers that have data is an ExchangeError on those that
    have left. One on a single worker is an ExchangeError on the others at their next exchange, if a
    worker had left before. Else they wait for the timeout of their group.

    Args:
        model: one wrapped by DistributedDataParallel (any buffer setting), or one whose gradients
            somebody else pools; given to `prepare_ddp` before. Called itself: the roll is called
            when its forward begins.
        stateful: whatever else changes from step to step: optimizers, schedulers, a GradScaler, an
            AveragedModel, or any object with `state_dict` and `load_state_dict`, for instance a
            counter of your own. The state must be of what `torch.load(weights_only=True)` takes.
            Left out, the workers go on with different states: with different optimizers their
            parameters drift apart.

    Raises:
        InputError: a layer has `sync="lagged"` (its averages also follow the backward pass of a
            worker's last step) or pools over other workers than the rest; one of `stateful` has no
            state.
        FaultError: the workers that still have data begin different forwards; the same on all
            workers.
        ExchangeError: another worker's block ended with an error.

    Example:
        >>> from syncnorm import SyncBatchNorm
        >>> layer = SyncBatchNorm(3)
        >>> with join(layer):
        ...     y = layer(torch.randn(8, 3))
    """
    is_ddp = isinstance(model, DistributedDataParallel)
    layers = [m for m in model.modules() if isinstance(m, SyncNorm) and m.sync_mode.is_pooled]
    group = groups.statistics_group(model.process_group if is_ddp else None)
    _check(layers, group)
    check(stateful)
    if group is None:
        yield
        return
    with _roll_call(group) as roll, roll.includes(model, layers, stateful):
        try:
            yield
        except Exception as error:
            roll.give_up(error)
            raise
        roll.leave()


def _check(layers: list[SyncNorm], group: groups.Group | None) -> None:
    for layer in layers:
        if not layer.sync_mode.allows_join:
            raise InputError(
                '`sync` must be "batch", "running" or "none" where workers may run out of data, '
                f'got "{layer.sync}" in {layer.label!r}. Give the workers equally many batches, '
                "empty ones if need be."
            )
        if groups.statistics_group(layer.workers) is not group:
            raise InputError(
                "`process_group` must be that of the model in all layers where workers may run out "
                f"of data, got ranks {groups.ranks(groups.statistics_group(layer.workers))} in "
                f"{layer.label!r}. Give the workers equally many batches, empty ones if need be."
            )


_open: list[RollCall] = []


@contextmanager
def _roll_call(group: groups.Group) -> Iterator[RollCall]:
    """The one of the block around, or a new one."""
    if _open:
        (roll,) = _open
        if roll.group is not group:
            raise InputError(
                "`process_group` must be that of the model where workers may run out of data, got "
                f"ranks {groups.ranks(group)} in a `join` within another. Give both models the "
                "same workers."
            )
        yield roll
        return
    roll = RollCall(group)
    _open.append(roll)
    exchange.announcers.append(roll.announce)
    try:
        yield roll
    finally:
        exchange.announcers.remove(roll.announce)
        _open.remove(roll)


@dataclass(eq=False)
class Part:
    """A module whose forward calls the roll."""

    number: int
    layers: list[SyncNorm]
    reductions: Reductions | None

    def look(self, module: nn.Module) -> int:
        """The properties of the forward that now begins; 0: it exchanges nothing."""
        is_training = module.training or any(layer.training for layer in self.layers)
        if self.reductions is None:
            gradients = GRADIENTS if torch.is_grad_enabled() else 0
            return _TRAINING + gradients if is_training else 0
        what = self.reductions.look()
        return what + _TRAINING if is_training else what if what & ~SYNC else 0


class RollCall:
    """Who still has data, and the answers of those who have not.

    Args:
        group: all workers.
    """

    def __init__(self, group: groups.Group) -> None:
        self.group = group
        self._members = groups.ranks(group)
        self._device = groups.device_for(group)
        self._parts: list[Part] = []
        self._layers: list[SyncNorm] = []
        self._stateful: list[Stateful] = []
        self._is_talking = False
        self._present = len(self._members)
        """Number of workers that have data."""
        self._due: list[Part] = []
        """Models whose reductions the next header must announce to workers that have left."""
        self._due_late: list[Part] = []
        """Models whose reductions must be announced at the end of the backward pass."""
        self._steps = 0
        """Number of steps that this worker had data for, counting all forwards."""
        self._is_over = False
        """True if all workers know of an error."""

    @contextmanager
    def includes(
        self, model: nn.Module, layers: list[SyncNorm], stateful: Sequence[Stateful]
    ) -> Iterator[None]:
        """Within the block, forwards of `model` call the roll, and its state is handed over at the
        end.
        """
        before = len(self._parts), len(self._layers), len(self._stateful)
        if layers:
            self._device = groups.device_for(self.group, device_of(layers[0]))
        self._layers += layers
        self._stateful += stateful
        handles = [
            self._hook(module, layers) for module in model.modules() if _is_part(module, model)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for part in self._parts[before[0] :]:
                if part.reductions is not None:
                    part.reductions.close()
            for some, count in zip(
                (self._parts, self._layers, self._stateful), before, strict=True
            ):
                del some[count:]

    def _hook(self, module: nn.Module, layers: list[SyncNorm]) -> Any:
        part = Part(len(self._parts), layers, None)
        if isinstance(module, DistributedDataParallel):
            part.reductions = Reductions(module, partial(self._reduce, part), self._share)
        self._parts.append(part)
        return module.register_forward_pre_hook(untraced(partial(self._begin, part)), prepend=True)

    def _share(self) -> float:
        return len(self._members) / self._present

    @property
    def _has_absent(self) -> bool:
        return self._present < len(self._members)

    def _begin(self, part: Part, module: nn.Module, args: object) -> None:
        """A forward begins here: this worker has data."""
        what = part.look(module)
        if not what:
            return
        self._call(1.0, part.number * _KINDS + what)
        self._steps += 1
        if part.reductions is not None:
            part.reductions.say_absent(self._has_absent)
            part.reductions.forward(what)

    def _reduce(self, part: Part) -> None:
        """A reduction of gradients begins here, in a backward pass."""
        if not self._has_absent:
            return
        assert part.reductions is not None
        (self._due_late if part.reductions.is_known_late else self._due).append(part)
        # Not documented, and used by DDP itself: it runs at the end of this backward pass, before
        # DDP waits.
        torch.autograd.Variable._execution_engine.queue_callback(self._flush)  # pyright: ignore[reportAttributeAccessIssue]

    def _flush(self) -> None:
        """Tell of the reductions that no header has told of."""
        self._due += self._due_late
        self._due_late = []
        if self._due:
            self._head(_REDUCE, 0)

    def announce(self, op: str, message: Tensor, group: groups.Group) -> None:
        """Tell those who have left what comes."""
        if self._is_talking:
            return
        if group is not self.group:
            raise InputError(
                "`process_group` must be that of the model where workers may run out of data, got "
                f"ranks {groups.ranks(group)} in an exchange. Make it outside of the block."
            )
        if self._has_absent:
            self._head(_CODES[op], message.numel())

    def give_up(self, error: Exception) -> None:
        """An error ends the block here: tell all others where they expect a header."""
        if not self._has_absent or self._is_over or isinstance(error, ExchangeError):
            return
        self._is_over = True
        with self._unannounced():
            # Nobody waits: perhaps the others do not come.
            exchange.start_sum(self._message(0.0, 0.0, 0.0, 1.0), self.group, "join")

    @torch.no_grad()
    def leave(self) -> None:
        """This worker has no more data: answer until nobody has, and get what those have who were
        there last.
        """
        is_anybody_there = self._call(0.0, 0)
        while is_anybody_there:
            code, numel = self._hear(0.0, 0.0, 0.0, 0.0)
            due, code = divmod(code, _BASE)
            while due:
                due, number = divmod(due, _BASE)
                self._reductions(number - 1).match_reduction()
            if code == _NEXT:
                is_anybody_there = self._count(0.0, 0)
            elif code != _REDUCE:
                self._take_part(code, numel)
        for part in self._parts:
            if part.reductions is not None:
                part.reductions.wait()
                part.reductions.say_absent(False)
        self._present = len(self._members)
        with self._unannounced():
            self._hand_over()
        inflight.count_anew(self.group)

    def _reductions(self, number: int) -> Reductions:
        reductions = self._parts[number].reductions
        assert reductions is not None
        return reductions

    def _take_part(self, code: int, numel: int) -> None:
        zeros = torch.zeros(numel, dtype=torch.float64, device=self._device)
        with self._unannounced():
            if code == _GATHER:
                exchange.gather(zeros, self.group, exchange.NO_DATA)
            else:
                exchange.sum_(zeros, self.group, exchange.NO_DATA)

    def _call(self, present: float, what: int) -> int:
        """Call the roll, where those who have left expect it."""
        if self._has_absent:
            self._head(_NEXT, 0)
        return self._count(present, what)

    def _count(self, present: float, what: int) -> int:
        count, total, squares = self._talk(present, float(what), float(what * what))
        if count * squares != total * total:
            self._is_over = True
            raise FaultError(
                "Forwards within `join` must be alike on all workers that still have data, got "
                "different ones: of another model, in training or evaluation mode, with or without "
                "gradients, in no_sync or not. Evaluate under torch.no_grad(), or after the block."
            )
        self._present = round(count)
        if count and not present:
            number, what = divmod(round(total / count), _KINDS)
            if self._parts[number].reductions is not None:
                self._reductions(number).match_forward(what)
        return self._present

    def _head(self, code: int, numel: int) -> None:
        """Tell those who have left what comes, and which reductions have begun."""
        due = 0
        for part in reversed(self._due):
            due = due * _BASE + part.number + 1
        self._due = []
        self._hear(1.0, float(due * _BASE + code), float(numel), 0.0)

    def _hear(self, *numbers: float) -> tuple[int, int]:
        """Code and size of what comes."""
        total, code, numel, errors = self._talk(*numbers)
        if errors:
            self._is_over = True
            raise ExchangeError(
                "the block of `join` must end alike on all workers that have data, got an error on "
                f"{errors:g} of {total + errors:g}. Look for the cause in their logs."
            )
        return round(code / total), round(numel / total)

    def _talk(self, *numbers: float) -> list[float]:
        """Their sums over the workers."""
        with self._unannounced():
            return exchange.sum_(self._message(*numbers), self.group, "join").tolist()

    def _message(self, *numbers: float) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64).to(self._device)

    @contextmanager
    def _unannounced(self) -> Iterator[None]:
        """Exchanges within it are the talk itself, or answers to what was announced."""
        before, self._is_talking = self._is_talking, True
        try:
            yield
        finally:
            self._is_talking = before

    def _hand_over(self) -> None:
        """All went on without those who had left."""
        rank = groups.rank()
        steps = self._talk(*(float(self._steps if r == rank else 0) for r in self._members))
        self._steps, mine = round(max(steps)), self._steps
        is_giver = self._members[steps.index(max(steps))] == rank
        for part in self._parts:
            if part.reductions is not None:
                part.reductions.hand_over(is_giver)
        Handover(self.group, self._device, is_giver, mine < self._steps).give(
            self._layers, self._stateful
        )


def _is_part(module: nn.Module, model: nn.Module) -> bool:
    return module is model or isinstance(module, DistributedDataParallel)
