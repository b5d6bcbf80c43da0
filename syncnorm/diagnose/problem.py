"""A model, batches and a loss; and the passes over them that all workers make together."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.comm import exchange, groups
from syncnorm.device import model_device
from syncnorm.diagnose.state import in_training, seeded
from syncnorm.errors import FaultError, InputError
from syncnorm.model.modes import evaluating
from syncnorm.shards import Shard

Terms = Mapping[str, tuple[Tensor, Tensor | float]]
Loss = Callable[[nn.Module, Any], Terms]
Gradient = dict[str, Tensor]


@dataclass(frozen=True)
class Forward:
    """This worker's samples of one statistic.

    Args:
        batch: what the loss takes.
        parts: the number of samples of each part of the batch, by the part's number, in the order
            in which they lie in `batch`. A part is what one worker of the training has.
    """

    batch: Any
    parts: Mapping[int, int]


class Problem:
    """What is measured: the loss of a model over batches that lie on the workers.

        loss = sum over terms of (sum over all samples / count over all samples)

    Args:
        model: bare, not wrapped by DistributedDataParallel.
        loss: the sum and the count of each term of a batch's loss.
        batches: this worker's forwards of each batch. Where layers exchange in forwards, every
            worker has equally many, some perhaps of empty batches; else as many as it likes.
        parts: number of parts that a batch has, on all workers.
        samples: of one statistic of the training.
        lr: learning rate, the unit of steps along the gradient.
        frozen: names of modules that the training keeps in evaluation mode.
        scale: of losses in backward passes: the number of workers after `prepare_ddp`, whose layers
            may hold averages of gradients that DistributedDataParallel averages.
        process_group: the workers, see `syncnorm.groups`.
        tick: called after each pass over a forward with its cost: 1, or 3 with a backward.
    """

    model: nn.Module
    loss: Loss
    batches: Sequence[Sequence[Forward]]
    parts: int
    samples: int
    lr: float
    frozen: frozenset[str]
    scale: int
    group: groups.Group | None
    device: torch.device
    sizes: Tensor
    evaluation_loss: float
    under_way: tuple[int, Forward]

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: Sequence[Sequence[Forward]],
        *,
        parts: int,
        samples: int,
        lr: float,
        frozen: Collection[str] = (),
        scale: int = 1,
        process_group: groups.Spec = None,
        tick: Callable[[int], object] = lambda cost: None,
    ) -> None:
        if not batches:
            raise InputError("`batches` must be at least one batch, got none")
        self.model, self.loss, self.batches = model, loss, batches
        self.parts, self.samples, self.lr = parts, samples, lr
        self.frozen, self.scale = frozenset(frozen), scale
        self.group = groups.statistics_group(process_group)
        self.tick = tick
        self.device = model_device(model)
        self.counts: list[dict[str, float]] = []
        """The count of each term over all workers, by batch; known after `begin`."""
        self.sizes = self.zeros(len(batches), parts)
        """Samples of each batch and part, (K, P); known after `begin`."""
        self.under_way = 0, Forward(None, {})
        """The batch and the forward that the model is at, for hooks."""
        self.evaluation_loss = math.nan
        """Over all batches, in evaluation mode."""

    @property
    def everything(self) -> range:
        """The numbers of all batches."""
        return range(len(self.batches))

    @property
    def passes(self) -> int:
        """This worker's forwards over all batches."""
        return sum(map(len, self.batches))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def sum(self, message: Tensor, what: str) -> Tensor:
        """Sum float64 numbers over the workers: one all-reduce; every worker must call."""
        return exchange.sum_(message, self.group, "diagnosis", what)

    def begin(self) -> None:
        """Compute the loss in evaluation mode, and find the counts of its terms.

        *Collectives*: two gatherings of a text and one sum; every worker must call.

        Raises:
            FaultError: the loss cannot be computed on some worker; on all of them, before anything
                else was exchanged.
        """
        found: list[dict[str, tuple[float, float]]] = [{} for _ in self.batches]
        sizes = self.zeros(len(found), self.parts)
        error = ""
        try:
            for number, forwards in enumerate(self.batches):
                for forward in forwards:
                    for part, size in forward.parts.items():
                        sizes[number, part] += size
            with evaluating(self.model), torch.no_grad():
                for number, _, terms in self.losses(self.everything):
                    for name, (total, count) in terms.items():
                        before = found[number].get(name, (0.0, 0.0))
                        found[number][name] = before[0] + float(total), before[1] + float(count)
            if not self.exchanges:
                self._try_training()
        except Exception as caught:  # sent to the other workers
            error = f"{type(caught).__name__}: {caught}"
        names = self._agree({name for each in found for name in each}, error)
        sums = [[each.get(name, (0.0, 0.0)) for name in names] for each in found]
        message = torch.tensor(sums, dtype=torch.float64, device=self.device).flatten()
        flat = self.sum(torch.cat([sizes.flatten(), message]), "losses")
        self.sizes = flat[: sizes.numel()].view_as(sizes)
        pooled = flat[sizes.numel() :].view(len(found), len(names), 2)
        self.counts = [dict(zip(names, row, strict=True)) for row in pooled[..., 1].tolist()]
        totals, counts = pooled.sum(0).unbind(1)  # (terms,)
        self.evaluation_loss = float((totals / counts)[counts != 0].sum())

    @property
    def exchanges(self) -> bool:
        """True if forwards exchange statistics; then a fault in them is raised by all workers."""
        return any(getattr(m, "is_pooled", False) for m in self.model.modules())

    def _try_training(self) -> None:
        """Let layers of torch's own refuse what they cannot normalise, such as a single value."""
        with self.training(), torch.no_grad():
            for _ in self.losses(self.everything):
                pass

    def _agree(self, names: set[str], error: str) -> list[str]:
        texts = [json.dumps([sorted(names), error])]
        if self.group is not None:
            texts = exchange.gather_text(texts[0], self.group, "diagnosis", self.device)
        parsed = [json.loads(text) for text in texts]
        ranks = groups.ranks(self.group)
        errors = [f"rank {r}: {e[1]}" for r, e in zip(ranks, parsed, strict=True) if e[1]]
        if errors:
            raise FaultError(
                f"`loss` must be computed on every worker, got an error on {'; '.join(errors)}"
            )
        return sorted({name for each, _ in parsed for name in each})

    def losses(self, batches: Iterable[int]) -> Iterator[tuple[int, Forward, Terms]]:
        """Compute the terms of each forward of these batches, in whatever mode the model is."""
        for number in batches:
            for order, forward in enumerate(self.batches[number]):
                self.under_way = number, forward
                with seeded(1000 * number + order):
                    terms = self.loss(self.model, forward.batch)
                yield number, forward, terms
                self.tick(1)

    def total(self, batches: Iterable[int]) -> dict[str, float]:
        """Add up the counts of these batches, by term."""
        chosen = [self.counts[number] for number in batches]
        return {name: math.fsum(each[name] for each in chosen) for name in self.counts[0]}

    @contextmanager
    def training(self, *, with_noise: bool = False) -> Iterator[None]:
        """Have the model normalise by batches within the block, see `in_training`."""
        with in_training(self.model, self.frozen, with_noise=with_noise):
            yield

    def share(self, terms: Terms, counts: Mapping[str, float]) -> Tensor:
        """This worker's share of the loss: each term by its count over all workers, ()."""
        shares = [total / counts[name] for name, (total, _) in terms.items() if counts[name]]
        return torch.stack(shares).sum() if shares else torch.zeros((), device=self.device)

    @torch.no_grad()
    def local_loss(self, batches: Sequence[int]) -> Tensor:
        """Compute this worker's share of the loss over batches, in whatever mode the model is, ()."""
        loss, counts = self.zeros(1), self.total(batches)
        for _, _, terms in self.losses(batches):
            loss += self.share(terms, counts).double()
        return loss[0]

    def gradient(
        self, batches: Sequence[int], look: Callable[[Tensor], object] = lambda share: None
    ) -> tuple[float, Gradient]:
        """Compute the loss normalised by batches, and its gradient in float64.

        `grad` of the parameters stays as it is. `look` is called with this worker's share of the
        loss, (), before each backward pass.

        *Collectives*: those of the forwards and backwards, and one sum of as many numbers as there
        are parameters, and 1; every worker must call.
        """
        parameters, counts = self.parameters, self.total(batches)
        total = {name: p.new_zeros(p.shape, dtype=torch.float64) for name, p in parameters.items()}
        loss = self.zeros(1)
        with self.training(), torch.enable_grad():
            for _, _, terms in self.losses(batches):
                share = self.share(terms, counts)
                loss += share.detach().double()
                if not share.requires_grad or not parameters:
                    continue
                look(share)
                # Summed, not averaged: shards may be uneven.
                Shard.scaled_losses += 1
                found = torch.autograd.grad(
                    share * self.scale, list(parameters.values()), allow_unused=True
                )
                for each, part in zip(total.values(), found, strict=True):
                    if part is not None:
                        each += part.double() / self.scale
                self.tick(2)
        message = torch.cat([loss, *(each.flatten().to(self.device) for each in total.values())])
        value, *parts = self.sum(message, "gradient").split(
            [1, *(each.numel() for each in total.values())]
        )
        shaped = zip(total.items(), parts, strict=True)
        return value.item(), {name: part.view_as(like) for (name, like), part in shaped}

    def zeros(self, *shape: int) -> Tensor:
        """Make float64 zeros on the model's device."""
        return torch.zeros(shape, dtype=torch.float64, device=self.device)


def norm(gradient: Mapping[str, Tensor]) -> float:
    """Compute the Euclidean norm of all of it."""
    return math.sqrt(math.fsum(float(part.square().sum()) for part in gradient.values()))


def difference(one: Gradient, other: Gradient) -> Gradient:
    """Subtract."""
    return {name: part - other[name] for name, part in one.items()}
