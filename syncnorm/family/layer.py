"""The bases of the family's layers: `Pooling`, with whom they pool, and `FamilyLayer`, a batch norm's life.

A call is `forward` -> `check`, `standardized` (`normalize` in training, else `evaluate`), `finish`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm import checks, tracing, undocumented
from syncnorm.comm import exchange, groups
from syncnorm.errors import InputError
from syncnorm.family.passes import affine
from syncnorm.family.pooled import widened
from syncnorm.maths.precision import HALF_TYPES
from syncnorm.recomputing import is_recomputing


class Pooling(nn.Module):
    """A layer that takes statistics of the batch with other workers.

    Args:
        sync: "batch": over the batches of all workers, which are one: each must call, with samples
            or without, forward and backward; "none": each worker's own.
        process_group: the workers; None: all of them.
    """

    num_features: int
    workers: groups.GroupHandle
    label: str
    has_frozen_statistics: bool
    """True within `frozen_statistics`: nothing that is kept between steps moves."""

    def __init__(
        self, sync: Literal["batch", "none"] = "batch", process_group: groups.Spec = None
    ) -> None:
        checks.check_choice("sync", sync, ("batch", "none"))
        super().__init__()
        self.sync = sync
        self.workers = groups.to_handle(process_group)
        self.label = type(self).__name__
        """Its name in errors; `prepare_ddp` makes it the name within the model."""
        self.has_frozen_statistics = False
        self.kept_from_ddp: set[str] = set()
        """The names of its buffers that DistributedDataParallel is not to broadcast."""
        self.gradient_scale = 1
        """What gradients are divided by when they are averaged: the workers of `prepare_ddp`, or of DDP.

        What is kept of gradients is kept without it, and holds for any number of workers.
        """

    def __prepare_scriptable__(self) -> NoReturn:
        raise checks.no_script(self)

    @property
    def is_pooled(self) -> bool:
        """True if workers exchange statistics."""
        return self.sync != "none"

    @property
    def has_common_statistics(self) -> bool:
        """True if what is kept between steps is the same on all workers at every step's end."""
        return self.is_pooled

    @property
    def group(self) -> groups.Group | None:
        """The workers that it pools with; None: nobody. Fake tensors have nothing to exchange."""
        is_alone = not self.is_pooled or tracing.is_fake(self)
        return None if is_alone else groups.statistics_group(self.workers)

    def arguments(self) -> str:
        """Describe the arguments on which workers must agree: all but the process group."""
        return self.extra_repr()

    @abstractmethod
    def message_sizes(self) -> list[int]:
        """Count the numbers in each message of a training step, forward, then backward."""

    @property
    def failure(self) -> exchange.Failure | None:
        """The failed exchange that the statistics lack; the next training forward raises it."""
        return None

    def settle(self) -> None:
        """Apply what is under way, before statistics are read. Starts no exchange."""

    def discard(self) -> None:
        """Forget what is under way, before statistics are replaced. Starts no exchange."""

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; statistics are up to date when training ends."""
        if not mode:
            self.settle()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What is under way belongs to the old tensors, and no statistic loses digits.
        self.settle()
        buffers = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, now in self._buffers.items():
            before = buffers[name]
            if now is not None and before is not None and now.dtype in HALF_TYPES:
                self._buffers[name] = before.to(now.device)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        self.settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.discard()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        # Nothing is under way in a copy, and it is in none of the blocks that the layer is in.
        self.settle()
        return {**self.__dict__, "has_frozen_statistics": False}

    @property
    def process_group(self) -> groups.Spec:
        """The workers to pool over, as they were given."""
        return groups.to_user(self.workers)


class PlainBatchNorm(NamedTuple):
    """What a batch norm of torch's needs to evaluate as a layer does."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float | None = None
    """None: that of the layer."""


Chosen = Callable[["FamilyLayer", Tensor, tuple[Tensor | None, ...]], Tensor]
"""What normalises in place of a layer: from the layer, x and weights that it has been given."""


class FamilyLayer(Pooling):
    """A layer that normalises x (N, C, *S) by statistics of the batch; abstract.

    In evaluation it uses the running statistics. Parameters and running statistics are called as
    BatchNorm's are.

    A subclass must supply

        normalize           a training forward: takes statistics by `pooled_moments` or `pooled_sum`
                            and calls `follow` with them
        evaluate            an evaluation forward, by the buffers
        message_sizes       the numbers in what is sent, for `prepare_ddp` and `explain`

    and may supply

        batch_statistics    of a batch, by the names of the `running_` buffers: for
                            `evaluation_statistics` (as that of `PooledBatchNorm`)
        as_batch_norm       the batch norm that evaluates alike: for `revert` and `export`
        take                more of what a batch norm has, where one is converted
        settle, discard, failure
                            where sums are under way between forwards (see `LateSums`)
        ones, not_by_channel, scales_at_once
                            what is true of its parameters and buffers

    Args:
        num_features: channels C.
        eps: added to variances.
        momentum: weight of a batch in the running statistics; None: their average over all batches.
        affine: True for a weight and a bias per channel.
        sync, process_group: see `Pooling`.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    eps: float
    momentum: float | None
    num_features: int
    looks_ahead: bool = False
    """True within a diagnosis: estimates are those with the batch, though they are frozen."""
    chosen: Chosen | None = None
    """Set within `evaluation_statistics`, where it takes the place of `normalize` and `evaluate`."""
    ones: ClassVar[frozenset[str]] = frozenset({"weight", "running_var"})
    """The parameters and buffers that begin at 1; all others begin at 0."""
    not_by_channel: ClassVar[frozenset[str]] = frozenset()
    """The parameters and buffers whose last axis is none of channels, whatever its length."""
    scales_at_once: ClassVar[bool] = False
    """True if `normalize` and `evaluate` apply weight and bias, by `scale`."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        sync: Literal["batch", "none"] = "batch",
        process_group: groups.Spec = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.check_hyperparameters(num_features, eps, momentum)
        super().__init__(sync, process_group)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            filled = torch.full((num_features,), value, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(filled) if affine else None)
        wide = torch.float32 if (dtype or torch.get_default_dtype()) in HALF_TYPES else dtype
        ones = torch.ones(num_features, device=device, dtype=wide)
        self.register_buffer("running_mean", ones - 1)
        self.register_buffer("running_var", ones)
        self.register_buffer(
            "num_batches_tracked", torch.zeros((), dtype=torch.int64, device=device)
        )

    @undocumented.unseen_by_selective_checkpoint
    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (N, C, *S)."""
        self.check(x)
        if not self.training:
            self.settle()
        return self.finish(self.standardized(widened(x))).to(x.dtype)

    def check(self, x: Tensor) -> None:
        """Raise InputError for an input of another shape or a DTensor, before any exchange."""
        if self.training and undocumented.is_jit_tracing():
            raise InputError(
                f"{self.label} must be traced in evaluation mode, got training: a trace would keep "
                "the numbers of this batch. Call model.eval() first."
            )
        checks.check_input(x, self.num_features)
        if self.training and type(x) is not Tensor:
            checks.check_local(x)  # before what may read its memory

    def standardized(self, x: Tensor, *weights: Tensor | None) -> Tensor:
        """Normalise as the mode says, or as `evaluation_statistics` does."""
        if self.chosen is not None:
            return self.chosen(self, x, weights)
        return self._by_batch(x, *weights) if self.training else self.evaluate(x)

    @undocumented.disable_dynamo
    @undocumented.unseen_by_selective_checkpoint
    def _by_batch(self, x: Tensor, *weights: Tensor | None) -> Tensor:
        """Normalise by the batch: compiled code calls this, and does not see its checkpoints."""
        return self.normalize(x, *weights)

    @abstractmethod
    def normalize(self, x: Tensor) -> Tensor:
        """Normalise by the batch, and have the running statistics follow."""

    @abstractmethod
    def evaluate(self, x: Tensor) -> Tensor:
        """Normalise by the running statistics."""

    def finish(self, z: Tensor) -> Tensor:
        """Apply weight and bias, unless `normalize` and `evaluate` have done so."""
        return z if self.scales_at_once else self.scale(z)

    def scale(self, x: Tensor, mean: Tensor | None = None, by: Tensor | None = None) -> Tensor:
        """Apply weight and bias to (x - mean) by, in one pass; both (C,), None: 0 and 1."""
        weight = self.weight
        factor = by if weight is None else weight if by is None else by * weight
        return affine(x, mean, factor, self.bias)

    def take(self, layer: _BatchNorm) -> None:
        """Take over a batch norm's parameters, the same objects, and its running statistics.

        Its steps were none of this method: they are not counted.
        """
        self.weight, self.bias = layer.weight, layer.bias
        for name, buffer in layer.named_buffers(recurse=False):
            if name in self._buffers and name != "num_batches_tracked":
                self.get_buffer(name).copy_(buffer)

    def as_batch_norm(self) -> PlainBatchNorm | None:
        """Find the batch norm that evaluates as this layer does; None: there is none."""
        return None

    @torch.no_grad()
    def follow(self, count: Tensor, **values: Tensor) -> None:
        """Move running statistics towards a batch's; they stay where the batch is empty.

        Args:
            count: of the batch's values, ().
            values: by the names of the buffers without `running_`, (C,).
        """
        # Activation checkpointing repeats a forward that has been counted.
        if self.has_frozen_statistics or is_recomputing():
            return
        for name, value in self.moved(count, **values).items():
            getattr(self, f"running_{name}").copy_(value)
        self.num_batches_tracked += (count > 0).to(torch.int64)

    @torch.no_grad()
    def moved(self, count: Tensor, **values: Tensor) -> dict[str, Tensor]:
        """Compute what `follow` makes of the running statistics, by the same names."""
        rate = self.rate(self.num_batches_tracked + (count > 0))
        after = {}
        for name, value in values.items():
            running = getattr(self, f"running_{name}")
            moved = torch.lerp(running.double(), value.detach(), rate)
            after[name] = torch.where(count > 0, moved, running.double()).to(running.dtype)
        return after

    def rate(self, step: Tensor) -> Tensor:
        """Weigh a step, which count from 1, in what is averaged over steps, (), float64."""
        step = step.clamp(min=1).double()
        return 1 / step if self.momentum is None else torch.full_like(step, self.momentum)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set parameters and statistics to their initial values, after `to_empty` too."""
        for name, parameter in self.named_parameters(recurse=False):
            parameter.fill_(name in self.ones)
        self.reset_running_stats()

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Set what is kept between steps to its initial values."""
        self.discard()
        for name, buffer in self.named_buffers(recurse=False):
            buffer.fill_(name in self.ones)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("chosen", None)
        return state

    def extra_repr(self) -> str:
        """Describe the arguments."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, sync={self.sync!r}"
