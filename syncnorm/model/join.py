"""Data that runs out: a worker without data answers the exchanges of the others with zeros.

Every step begins with a roll call, one number summed over the workers. Nothing else changes while all have data. Once
one has left, each exchange is preceded by a header that says what will be summed, so that those who have left can take
part in whatever it is, in a thread of their own: the main thread meanwhile shadows DistributedDataParallel.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm.base import SyncNorm
from syncnorm.comm import exchange, flight, groups
from syncnorm.errors import InputError
from syncnorm.model.running import device_of

_NEXT, _SUM, _GATHER = 1.0, 2.0, 3.0
_CODES = {"sum": _SUM, "gather": _GATHER}


@contextmanager
def join(model: nn.Module, *optimizers: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block, a worker whose data ends early goes on answering the others, forward and backward.

        with join(ddp_model, optimizer):
            for x, y in batches:                     # as many as this worker has, also none
                loss = criterion(ddp_model(x), y)
                scale_loss(loss, len(x)).backward()
                optimizer.step()

    Each step is that of the batch which the workers that still have data hold together: statistics, and with
    `scale_loss` also gradients. For `scale_loss` multiplies by the number of *all* workers, and DDP divides by it,
    those included that have left (they add zeros): `divide_by_initial_world_size=True`, which this block sets. Without
    `scale_loss` the gradient shrinks with every worker that leaves.

    At the end all workers have the parameters, running statistics (not those of `sync="none"`, which are each worker's
    own) and optimizer state (learning rate included) of one who was there last. Schedulers of the learning rate are the
    caller's: step them after the block.

    *Collectives*: in each step an exchange of one number besides those of the forwards; once a worker has left, one of
    three numbers before each. At the end two more, and two for each optimizer. Every worker must use the block, and
    make the same exchanges as those that still have data; other collectives within it are not answered. With DDP its
    own join is entered too.

    An error that ends the block on one worker leaves the others to the timeout of their group.

    Args:
        model: one wrapped by DistributedDataParallel (any buffer setting), or one whose gradients somebody else pools;
            given to `prepare_ddp` before. Called itself: the roll is called when its forward begins.
        optimizers: those that keep something from step to step (momentum). Left out, the workers go on with different
            states, and their parameters drift apart.

    Raises:
        InputError: a layer has `sync="lagged"` (its averages also follow the backward pass of a worker's last step) or
            pools over other workers than the rest.

    Example:
        >>> from syncnorm import SyncBatchNorm
        >>> layer = SyncBatchNorm(3)
        >>> with join(layer):
        ...     y = layer(torch.randn(8, 3))
    """
    is_ddp = isinstance(model, DistributedDataParallel)
    layers = [m for m in model.modules() if isinstance(m, SyncNorm) and m.sync != "none"]
    group = groups.statistics_group(model.process_group if is_ddp else None)
    _check(layers, group)
    if group is None:
        yield
        return
    roll = RollCall(group, layers, optimizers)
    hook = model.register_forward_pre_hook(roll.begin, prepend=True)
    exchange.announcers.append(roll.announce)
    try:
        with model.join() if is_ddp else contextlib.nullcontext():
            yield
            roll.leave()
        roll.end()
    finally:
        exchange.announcers.remove(roll.announce)
        hook.remove()


def _check(layers: list[SyncNorm], group: groups.Group | None) -> None:
    for layer in layers:
        if layer.sync == "lagged":
            raise InputError(
                f'`sync` must be "batch", "running" or "none" where workers may run out of data, got "lagged" in '
                f"{layer.label!r}. Give the workers equally many batches, empty ones if need be."
            )
        if groups.statistics_group(layer.workers) is not group:
            raise InputError(
                f"`process_group` must be that of the model in all layers where workers may run out of data, got ranks "
                f"{groups.ranks(groups.statistics_group(layer.workers))} in {layer.label!r}. Give the workers "
                "equally many batches, empty ones if need be."
            )


class RollCall:
    """Who still has data, and the answers of those who have not.

    Args:
        group: all workers.
        layers: whose running statistics to hand over at the end.
        optimizers: whose states.
    """

    def __init__(
        self, group: groups.Group, layers: list[SyncNorm], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        self._group = group
        self._layers = layers
        self._optimizers = optimizers
        self._device = groups.device_for(group, device_of(layers[0]) if layers else None)
        self._members = groups.ranks(group)
        self._is_talking = False
        self._has_absent = False
        self._steps = 0
        """How many steps this worker had data for, counting all forwards."""
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._answer, name="syncnorm-join", daemon=True)

    def begin(self, model: nn.Module, args: object) -> None:
        """A forward begins here: this worker has data."""
        if model.training or any(layer.training for layer in self._layers):
            self._call(1.0)
            self._steps += 1

    def announce(self, op: str, message: Tensor, group: groups.Group) -> None:
        """Tell those who have left what comes."""
        if self._is_talking:
            return
        if group is not self._group:
            raise InputError(
                f"`process_group` must be that of the model where workers may run out of data, got ranks "
                f"{groups.ranks(group)} in an exchange. Make it outside of the block."
            )
        if self._has_absent:
            self._talk(1.0, _CODES[op], float(message.numel()))

    def leave(self) -> None:
        """This worker has no more data: answer from now on."""
        self._thread.start()

    def end(self) -> None:
        """All have left: give everybody what those have who were there last."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        exchange.announcers.remove(self.announce)
        try:
            self._hand_over()
            flight.count_anew(self._group)
        finally:
            exchange.announcers.append(self.announce)

    @torch.no_grad()
    def _answer(self) -> None:
        """In a thread: take part in every exchange of those who have data."""
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            is_anybody_there = self._call(0.0)
            while is_anybody_there:
                total, code, numel = self._talk(0.0, 0.0, 0.0)
                if code == total * _NEXT:
                    is_anybody_there = self._count(0.0)
                else:
                    self._take_part(code / total, round(numel / total))
        except BaseException as error:  # raised by the main thread
            self._failure = error

    def _take_part(self, code: float, numel: int) -> None:
        zeros = torch.zeros(numel, dtype=torch.float64, device=self._device)
        with self._unannounced():
            if code == _GATHER:
                exchange.gather(zeros, self._group, exchange.NO_DATA)
            else:
                exchange.sum_(zeros, self._group, exchange.NO_DATA)

    def _call(self, present: float) -> int:
        """Call the roll, where those who have left expect it."""
        if self._has_absent:
            self._talk(1.0, _NEXT, 0.0)
        return self._count(present)

    def _count(self, present: float) -> int:
        count = round(self._talk(present)[0])
        self._has_absent = count < len(self._members)
        return count

    def _talk(self, *numbers: float) -> list[float]:
        """Their sums over the workers."""
        message = torch.tensor(numbers, dtype=torch.float64).to(self._device)
        with self._unannounced():
            return exchange.sum_(message, self._group, "join").tolist()

    @contextmanager
    def _unannounced(self) -> Iterator[None]:
        """Exchanges within it are the talk itself, or answers to what was announced."""
        self._is_talking = True
        try:
            yield
        finally:
            self._is_talking = False

    @torch.no_grad()
    def _hand_over(self) -> None:
        """All went on without those who had left."""
        rank = groups.rank()
        mine = torch.tensor([float(self._steps if r == rank else 0) for r in self._members], dtype=torch.float64)
        steps = exchange.sum_(mine.to(self._device), self._group, "join").tolist()
        is_giver, is_late = self._members[steps.index(max(steps))] == rank, self._steps < max(steps)
        for layer in self._layers:
            layer.statistics.settle()
        buffers = [b for layer in self._layers for b in layer.buffers(recurse=False)]
        if buffers:
            wide = torch.cat([b.detach().to(self._device, torch.float64).flatten() for b in buffers])
            given = self._from_giver(wide, is_giver)
            if is_late:
                for buffer, value in zip(buffers, given.split([b.numel() for b in buffers]), strict=True):
                    buffer.copy_(value.view_as(buffer))
        for optimizer in self._optimizers:
            self._hand_over_optimizer(optimizer, is_giver, is_late)

    def _hand_over_optimizer(self, optimizer: torch.optim.Optimizer, is_giver: bool, is_late: bool) -> None:
        """Its state as bytes, four in the place of a number: that is exact."""
        file = io.BytesIO()
        if is_giver:
            torch.save(optimizer.state_dict(), file)
        file.write(bytes(-file.tell() % 4))
        data = torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.int32) if is_giver else torch.zeros(0)
        size = self._from_giver(torch.tensor([data.numel()], dtype=torch.float64).to(self._device), is_giver)
        wide = data.to(self._device, torch.float64) if is_giver else torch.zeros(int(size)).to(self._device).double()
        given = self._from_giver(wide, is_giver)
        if is_late:
            file = io.BytesIO(bytes(given.cpu().to(torch.int32).view(torch.uint8).tolist()))
            optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def _from_giver(self, numbers: Tensor, is_giver: bool) -> Tensor:
        return exchange.sum_(numbers if is_giver else torch.zeros_like(numbers), self._group, "join")
