"""A batch sampler whose steps have the same samples, and statistics, on any number of workers."""

from __future__ import annotations

import json
import operator
import weakref
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from syncnorm import placement
from syncnorm.comm import exchange, groups
from syncnorm.device import model_device
from syncnorm.errors import FaultError, InputError
from syncnorm.model.sampler_hooks import SamplerHooks
from syncnorm.module import SyncNorm
from syncnorm.placement import Placement, epoch_order, no_whole_statistics, size, too_few_at_once
from syncnorm.shards import Shard, of_nothing


@lru_cache(maxsize=64)
def _rounds(count: int, norm_batch: int, world_size: int, micro_batch: int | None) -> int:
    """Count the forwards of a step on the worker that has most, which is the first."""
    wrong = too_few_at_once(count, norm_batch, world_size, micro_batch)
    if wrong:
        raise InputError(f"`micro_batch` {wrong}")
    return len(placement.place(count, norm_batch, 0, world_size, micro_batch).rounds)


# What the samples of a step, and its statistics, follow from.
_FIXED = ("size", "global_batch", "norm_batch", "seed", "shuffle")


class ElasticBatchSampler(Sampler[list[int]]):
    """Cut each step's samples among the workers: the same step on any number of workers.

    The samples of a step follow from (seed, epoch) alone. The workers only share them out, by
    `syncnorm.placement`, so a loop that was stopped on 4 workers goes on with 3 on the same curve:

        sampler = ElasticBatchSampler(len(dataset), global_batch=96)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=4)
        model = DistributedDataParallel(sampler.attach(prepare_ddp(convert(model))))
        while sampler.epoch < epochs:
            for x, y in loader:
                optimizer.zero_grad()
                sampler.scale_loss(criterion(model(x), y)).backward()
                optimizer.step()
                sampler.advance()

    *Batches*: each worker draws `rounds` batches per step. A worker with fewer parts of the step
    than others draws a stand-in in their place: the step's first sample, which is given no weight
    in statistics (`attach`) nor in the gradient (`scale_loss`). So no batch is ever empty.

    *Cursor*: `epoch` and `step` count what the loop has told by `advance` that it has done, not
    what a DataLoader has fetched ahead. Iteration begins there.

    *Collectives*: those of `attach`, and of `advance` where it ends steps of several statistics.

    Args:
        size: number of samples in the data set.
        global_batch: samples of a step, over all workers; the last step of an epoch has the rest.
        norm_batch: samples of a statistic of layers with `sync="batch"`, a divisor of global_batch;
            None: the whole step.
        micro_batch: most samples in a forward of a worker, which takes several if need be. It must
            hold a worker's part of one statistic. None: any number.
        seed: of the order of the samples, anew in each epoch.
        shuffle: False to take the samples in the order of the data set.
        rank, world_size: this worker's number, and how many there are; None: those of
            torch.distributed, once the batches are drawn.

    Attributes:
        epoch: epochs done.
        step: steps done in the epoch under way.

    Raises:
        InputError: an argument is out of range, here or, where it depends on the number of workers,
            when a batch is drawn; the same on all workers.

    Example:
        >>> workers = [ElasticBatchSampler(5, 3, shuffle=False, rank=r, world_size=2) for r in (0, 1)]
        >>> [list(sampler) for sampler in workers]
        [[[0, 1], [3]], [[2], [4]]]
    """

    global_batch: int
    size: int
    norm_batch: int
    seed: int
    shuffle: bool
    epoch: int
    step: int

    def __init__(
        self,
        size: int,
        global_batch: int,
        *,
        norm_batch: int | None = None,
        micro_batch: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        _check_at_least_one("size", size)
        _check_at_least_one("global_batch", global_batch)
        if norm_batch is not None and not _is_whole(norm_batch):
            raise InputError(f"`norm_batch` must be a whole number, got {norm_batch!r}.")
        wrong = "" if norm_batch is None else no_whole_statistics(global_batch, norm_batch)
        if wrong:
            raise InputError(f"`norm_batch` {wrong}")
        _check_at_least_one("micro_batch", micro_batch)
        if not _is_whole(seed):
            raise InputError(f"`seed` must be a whole number, got {seed!r}.")
        if (rank is None) != (world_size is None):
            raise InputError("`rank` and `world_size` must be given together, got one of them.")
        _check_at_least_one("world_size", world_size)
        if rank is not None and world_size is not None and not 0 <= rank < world_size:
            raise InputError(f"`rank` must be from 0 to {world_size - 1}, got {rank}.")
        self.size, self.global_batch = size, global_batch
        self.norm_batch = norm_batch or global_batch
        self.micro_batch = micro_batch
        self.seed, self.shuffle = seed, shuffle
        self.epoch = self.step = 0
        self._round = 0
        self._given = None if rank is None or world_size is None else (rank, world_size)
        self._hooks: list[weakref.ref[SamplerHooks]] = []
        self._is_trained = self._has_ended = False

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, on any number of workers."""
        return -(-self.size // self.global_batch)

    @property
    def rounds(self) -> int:
        """Batches of a step, the same number on every worker and in every step.

        It is 1 without `micro_batch`. Where a framework accumulates gradients, it is the number of
        batches to accumulate; what that divides the loss by has to be multiplied back.
        """
        world_size = self._workers()[1]
        # The last step may be placed in another way.
        return max(
            _rounds(self._count(step), self.norm_batch, world_size, self.micro_batch)
            for step in (0, -1)
        )

    @property
    def count(self) -> int:
        """Samples of this worker in the batch under way; 0 for a stand-in."""
        return sum(self._parts())

    @property
    def ends_step(self) -> bool:
        """True if the batch under way is the last of its step."""
        return self._round + 1 == self.rounds

    def __len__(self) -> int:
        """Count the batches of a whole epoch, wherever in it the cursor is."""
        return self.steps_per_epoch * self.rounds

    def __iter__(self) -> Iterator[list[int]]:
        """Draw this worker's batches of the epoch under way, from the cursor's step on.

        Raises:
            InputError: an epoch was trained without a call of `advance`.
        """
        if self._is_trained and self._has_ended:
            raise InputError(
                "`advance` must be called after each batch, got no call in the epoch before. "
                "Without it the same samples would come again."
            )
        self._restart()
        order = (
            # As the trainer counts epochs.
            epoch_order(self.size, self.seed, self.epoch + 1)
            if self.shuffle
            else torch.arange(self.size)
        )
        rank, rounds = self._workers()[0], self.rounds
        for step in range(self.step, self.steps_per_epoch):
            start = step * self.global_batch
            samples = order[start : start + self._count(step)].tolist()
            of_rounds = self._placement(len(samples), rank).rounds
            for number in range(rounds):
                parts = of_rounds[number] if number < len(of_rounds) else ()
                yield [i for part in parts for i in samples[part]] or samples[:1]
        self._has_ended = True

    def attach(self, model: nn.Module) -> nn.Module:
        """Have the training forwards of `model` take their statistics over the samples drawn.

        Each training forward is of the batch at the cursor. The layers take each statistic over
        `norm_batch` samples, alone or with neighbouring workers; stand-ins have no weight; and a
        step of several statistics makes one update of the running statistics with `micro_batch`: at
        its last `advance`, as within `accumulate`. Until then they are those before the step.

        *Collectives*: two all-gathers of some bytes, and the creation of groups. Every worker must
        call, after `prepare_ddp` and before DistributedDataParallel wraps the model.

        Args:
            model: the module that is called with the batches; changed in place. What was attached
                to it before is replaced.

        Returns:
            `model`.

        Raises:
            InputError: there are several statistics in a step, and a layer does not pool each
                batch over all workers; or `micro_batch` is too small.
            FaultError: the workers' samplers differ; the same on all workers.
        """
        self._agree(model)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, SyncNorm)}
        rounds, counts = self.rounds, (self._count(0), self._count(-1))
        is_grouped = bool(layers) and self._has_several()
        if is_grouped:
            _check_pools_all(layers)
            for count in counts:
                groups.statistics_group(self._placement(count, 0).shared_by)
        has_stand_ins = any(
            self._has_stand_in(count, number) for count in counts for number in range(rounds)
        )
        SamplerHooks.on(model, self, layers if is_grouped else {}, has_stand_ins=has_stand_ins)
        return model

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Weight a mean loss so that DDP's average over workers is the mean over the step's samples.

            scaled = loss * count * world_size / (samples of the step)

        The gradients of a step's rounds are added up. *Collectives*: none: the sampler knows all
        shards. *Gradients*: those of the loss, scaled.

        Args:
            loss: mean over this worker's samples, shape (). Of a stand-in the value does not
                matter. A sum over samples is divided by max(1, count) before. A mean over anything
                but samples (pixels, boxes) needs `syncnorm.scale_loss` and its message.

        Raises:
            InputError: statistics are to be placed, or some worker has a stand-in now, and `attach`
                was not called; the same on all workers.
        """
        total, world_size = self._count(self.step), self._workers()[1]
        if not self._hooks and (self._has_several() or self._has_stand_in(total, self._round)):
            raise InputError(
                "`attach` must be called with the model before it is trained with norm_batch, or "
                f"in a step of {total} sample(s) on {world_size} workers, some of which have none "
                "and draw a stand-in."
            )
        Shard.scaled_losses += 1
        self.note_training()
        if self.count == 0:
            return of_nothing(loss)
        return loss * (self.count * world_size / total)

    def advance(self) -> None:
        """Move the cursor: the loop is done with a batch. Call it after each, on every worker.

        *Collectives*: none without `micro_batch`, or where a step is one statistic. Else, at a
        step's last batch, one message of the running statistics for each model attached, which is
        not waited for.
        """
        attached = self._attached()
        for each in attached:
            each.is_stand_in = False
        self._is_trained = self._has_ended = False
        if not self.ends_step:
            self._round += 1
            return
        for each in attached:
            each.end_step()
        self._round, self.step = 0, self.step + 1
        if self.step == self.steps_per_epoch:
            self.step, self.epoch = 0, self.epoch + 1

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor, and what it refers to; to be loaded on any number of workers."""
        return {name: getattr(self, name) for name in (*_FIXED, "epoch", "step")}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Move the cursor to where a sampler was. Call it on every worker, before iteration.

        Raises:
            InputError: the state is that of another size, global_batch, norm_batch, seed or
                shuffle, or no state at all; the cursor is where it was.
        """
        missing = {*_FIXED, "epoch", "step"} - {*(state_dict or ())}
        if missing:
            raise InputError(
                f"`state_dict` must be of an ElasticBatchSampler, got one without {sorted(missing)}."
            )
        others = [name for name in _FIXED if state_dict[name] != getattr(self, name)]
        if others:
            got = ", ".join(
                f"{name}={state_dict[name]} where this one has {getattr(self, name)}"
                for name in others
            )
            raise InputError(
                f"`state_dict` must be of a sampler with the same arguments, got {got}. The number "
                "of workers and micro_batch may differ; the samples of a step may not."
            )
        are_whole = _is_whole(state_dict["step"]) and _is_whole(state_dict["epoch"])
        if (
            not are_whole
            or not 0 <= state_dict["step"] < self.steps_per_epoch
            or state_dict["epoch"] < 0
        ):
            raise InputError(
                f"`state_dict` must have a whole step from 0 to {self.steps_per_epoch - 1} of an epoch "
                f"from 0 on, got step {state_dict['step']} of epoch {state_dict['epoch']}."
            )
        self.epoch, self.step = state_dict["epoch"], state_dict["step"]
        self._restart()

    def _parts(self) -> list[int]:
        """This worker's number of samples of each statistic, in the batch under way."""
        of_rounds = self._current().rounds
        return (
            [size(part) for part in of_rounds[self._round]] if self._round < len(of_rounds) else []
        )

    def _current(self) -> Placement:
        """This worker's placement of the step under way."""
        return self._placement(self._count(self.step), self._workers()[0])

    def note_training(self) -> None:
        """Take note that the batches are trained with, not only looked at."""
        self._is_trained = True

    def _register(self, hooks: SamplerHooks) -> None:
        """Have a model's hooks told where steps end."""
        self._hooks = [*(ref for ref in self._hooks if ref() is not None), weakref.ref(hooks)]

    def _workers(self) -> tuple[int, int]:
        """This worker's rank, and the number of workers."""
        if self._given is not None:
            return self._given
        return groups.rank(), len(groups.ranks(groups.existing_group(None)))

    def _count(self, step: int) -> int:
        """Samples of a step of an epoch; -1: of the last."""
        return min(self.global_batch, self.size - step % self.steps_per_epoch * self.global_batch)

    def _placement(self, count: int, rank: int) -> Placement:
        world_size = self._workers()[1]
        return placement.place(count, self.norm_batch, rank, world_size, self.micro_batch)

    def _has_several(self) -> bool:
        """True if some step has several statistics of a layer."""
        return self._count(0) > self.norm_batch

    def _has_stand_in(self, count: int, number: int) -> bool:
        """True if some worker has no sample in a round of a step of `count`."""
        # The last worker has fewest.
        of_rounds = self._placement(count, self._workers()[1] - 1).rounds
        return number >= len(of_rounds) or not any(map(size, of_rounds[number]))

    def _attached(self) -> list[SamplerHooks]:
        return [hooks for ref in self._hooks if (hooks := ref()) is not None]

    def _restart(self) -> None:
        """Begin the step at the cursor anew."""
        self._round = 0
        self._is_trained = self._has_ended = False
        for hooks in self._attached():
            hooks.drop_step()

    def _agree(self, model: nn.Module) -> None:
        """Compare the samplers of all workers.

        Raises:
            FaultError: they differ; the same on all workers.
        """
        names = (*_FIXED, "micro_batch", "epoch", "step")
        words = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        rank, world_size = self._workers()
        said, world = [json.dumps([words, rank, world_size])], groups.statistics_group()
        if world is not None:
            device = groups.device_for(world, model_device(model))
            said = exchange.gather_text(said[0], world, "agreement", device)
        for other, text in enumerate(said):
            theirs, *workers = json.loads(text)
            if theirs != json.loads(said[0])[0]:
                raise FaultError(
                    "`ElasticBatchSampler` must be made alike on every worker, got "
                    f"{json.loads(said[0])[0]} on rank 0 and {theirs} on rank {other}."
                )
            if workers != [other, len(said)]:
                raise FaultError(
                    f"`rank` and `world_size` must be those of torch.distributed to attach a model, "
                    f"got rank {workers[0]} of {workers[1]} on rank {other} of {len(said)}."
                )

    def __getstate__(self) -> dict[str, Any]:
        # Whoever copies or pickles a model has its sampler with it; the hooks register themselves.
        return {**self.__dict__, "_hooks": []}


def _is_whole(value: Any) -> bool:
    """True for a whole number of Python's, numpy's or torch's."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _check_at_least_one(name: str, value: int | None) -> None:
    if value is not None and (not _is_whole(value) or value < 1):
        raise InputError(f"`{name}` must be a whole number, at least 1, got {value!r}.")


def _check_pools_all(layers: Mapping[str, SyncNorm]) -> None:
    for name, layer in layers.items():
        if not layer.sync_mode.pools_each_batch() or layer.workers not in (None, "world"):
            raise InputError(
                'with `norm_batch` layers must have sync="batch" and pool over all workers, got '
                f"sync={layer.sync!r} and process_group={layer.process_group!r} in {name!r}. The "
                "sampler says what each statistic is taken over."
            )
