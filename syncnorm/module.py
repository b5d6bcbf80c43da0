"""What the layers share, and where their training statistics come from.

A layer asks its `statistics` what to normalise a batch by, and hands it what its running statistics
should follow: `Immediate` pools each batch at once; `syncnorm.model` has sources that act for all
layers of a model together.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm import compiled, functional, observed, ops
from syncnorm.comm import groups
from syncnorm.errors import InputError
from syncnorm.maths import moments
from syncnorm.maths.lagged import Lagged
from syncnorm.maths.moments import Moments
from syncnorm.ops import LocalSums, Statistic
from syncnorm.statistics import averages
from syncnorm.statistics.averages import AVERAGES

# So many calls of a layer that is checkpointed may come before the backward pass that repeats them.
_REMEMBERED_CALLS = 64
# fairscale's checkpoint wrapper sets track_running_stats to False in the forward that is made
# without gradients, to leave the update to the repetition, and keeps its value here. Our layers
# update in that forward.
_FAIRSCALES_BACKUP = "_track_running_stats_backup"
# Whether torch's own layers may be without a bias: from 2.13 on.
_TORCH_HAS_BIAS = "bias" in inspect.signature(_BatchNorm.__init__).parameters


@dataclass
class Call:
    """What a training forward of a layer saw, for the case that it is repeated (activation
    checkpointing).
    """

    sums: Tensor
    """The local sums, by which a repetition finds the call that it repeats."""
    before: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    """Renormalisation: running mean and variance before the batch, r_max and d_max."""
    averages: Any = None
    """sync="lagged": the averages."""
    repeated_in: int | None = None
    """The backward pass that has repeated this call last."""
    is_frozen: bool = False
    """Whether it must leave no trace (see syncnorm.model.frozen)."""


class Freeze:
    """Marks a layer whose statistics are frozen.

    Whoever copies the layer gets it without the mark.
    """

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class StatisticsSource(Protocol):
    """Where a layer's training statistics come from, and where its batch's sums go."""

    def take(self, layer: SyncNorm, local: LocalSums, call: Call) -> Statistic:
        """What to normalise this batch by. Nothing must be kept of a call that `is_frozen`."""
        ...

    def record(self, layer: SyncNorm, statistic: Statistic) -> None:
        """Have the running statistics follow the batch; called after the forward, never when it is
        repeated.
        """
        ...

    def parts(self, count: int) -> Sequence[int] | None:
        """Sizes of the parts of a batch of `count` that have a statistic each, in its order; None:
        it has one.
        """
        ...

    def settle(self) -> None:
        """Bring the running statistics up to date before they are read.

        Never starts an exchange, never raises.
        """
        ...

    def forget(self, layer: SyncNorm) -> None:
        """Drop what is under way for this layer: its running statistics are about to be replaced."""
        ...


class Immediate:
    """The statistics of the batch itself, over a process group or local; running statistics follow
    at once.
    """

    def take(self, layer: SyncNorm, local: LocalSums, call: Call) -> Statistic:
        if layer.sync != "batch":
            return ops.local_statistic(local, layer.label)
        return ops.statistic_over(local, layer.workers, layer.label, is_averaged=layer.is_prepared)

    def record(self, layer: SyncNorm, statistic: Statistic) -> None:
        layer.update_running(statistic.batch, layer.momentum)

    def parts(self, count: int) -> None:
        return None

    def settle(self) -> None:
        pass

    def forget(self, layer: SyncNorm) -> None:
        pass


class Unattached(Immediate):
    """For modes in which layers act together: an error until `prepare_ddp` has introduced them to
    each other.
    """

    def take(self, layer: SyncNorm, local: LocalSums, call: Call) -> Statistic:
        if local.observer is not None:
            return ops.statistic_over(local, layer.workers, layer.label)
        if groups.statistics_group(layer.workers) is None:
            return ops.pooled_statistic(local, None, layer.label)
        raise InputError(
            f'`sync` must be "batch" or "none" in a layer that is not attached, got {layer.sync!r} '
            f"in {layer}. "
            "Call prepare_ddp(model) on every worker before training (and before "
            "DistributedDataParallel)."
        )


def _forget_and_fill(layer: SyncNorm, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Before a state dict is loaded: what is under way belongs to the old state.

    One of a batch norm has no averages, so a lagged layer starts by pooling; and other layers have
    no use for them.
    """
    layer.statistics.forget(layer)
    names = [f"{prefix}{name}" for name in AVERAGES]
    if layer.sync != "lagged":
        for name in names:
            state_dict.pop(name, None)
        return
    brought = [
        name
        for name in AVERAGES
        if averages.is_brought(layer, name, state_dict.get(f"{prefix}{name}"))
    ]
    mean = state_dict.get(f"{prefix}running_mean")
    if mean is not None and not brought and averages.is_brought(layer, "running_mean", mean):
        state_dict |= {
            f"{prefix}{name}": value for name, value in averages.initial(layer, mean.device).items()
        }


HALF_TYPES = (torch.bfloat16, torch.float16)


def _kept_type(before: torch.dtype, after: torch.dtype) -> torch.dtype:
    """The type of a running statistic that a cast of the layer would take from one type to another:
    at least float32.

    One that was a half type already was asked for.
    """
    return torch.float32 if after in HALF_TYPES and before not in HALF_TYPES else after


class SyncNorm(_BatchNorm):
    """What SyncBatchNorm and SyncBatchRenorm share; abstract."""

    statistics: StatisticsSource
    workers: groups.GroupHandle
    """`process_group` as it is kept: what can be copied and pickled."""
    lagged_mean: Tensor
    lagged_var: Tensor
    lagged_gradient: Tensor
    lagged_updates: Tensor
    lagged_waits: Tensor
    _is_hf_initialized = averages.Loaded()

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        process_group: groups.Spec,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        *,
        bias: bool,
        **options: Any,
    ) -> None:
        functional.check_hyperparameters(num_features, eps, momentum)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if not bias:  # not by torch's argument, which old versions lack
            self.register_parameter("bias", None)
        self.set_up(process_group, device, **options)

    def set_up(
        self,
        process_group: groups.Spec,
        device: torch.device | str | None = None,
        *,
        sync: str | Lagged = "batch",
    ) -> None:
        """Add to torch's layer what makes it one of ours: while it is built, and when it is
        converted.
        """
        options = sync if isinstance(sync, Lagged) else Lagged()
        sync = "lagged" if isinstance(sync, Lagged) else sync
        functional.check_choice("sync", sync, ("batch", "running", "lagged", "none"))
        self.process_group = process_group
        self.sync = sync
        self.lagged = options
        self.label = f"{type(self).__name__}({self.num_features})"
        """What errors call this layer; `prepare_ddp` makes it the name within the model."""
        self.is_prepared = False
        """Set by `prepare_ddp`: gradients are averaged over the workers."""
        if (
            self.running_mean is not None
            and self.running_var is not None
            and self.running_mean.dtype in HALF_TYPES
        ):
            self.running_mean, self.running_var = (
                self.running_mean.float(),
                self.running_var.float(),
            )
        self.statistics = Immediate() if sync in ("batch", "none") else Unattached()
        if sync == "lagged":
            tensors = (*self.parameters(recurse=False), *self.buffers(recurse=False))
            for name, value in averages.initial(
                self, next((t.device for t in tensors), device)
            ).items():
                self.register_buffer(name, value)
        self.seen: tuple[Call, Moments] | None = None
        """The last training statistic, for those who watch: what went into it, and what the batch
        was normalised by.
        """
        self.freeze: Freeze | None = None
        """Set while forwards must leave no trace."""
        self._has_warned = False
        self._calls: deque[Call] = deque(maxlen=_REMEMBERED_CALLS)
        """Those that checkpoints may repeat."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor | None = None, mask: Tensor | None = None, *, input: Tensor | None = None
    ) -> Tensor:
        """Normalise x, shape (N, C, *S); mask: weights >= 0 broadcastable to (N, 1, *S), for
        training only.

        `input` is torch's name for x.
        """
        if type(x) is not Tensor and isinstance(x, observed.Proxy):
            return observed.module_call(self, x, mask)
        if x is None or input is not None:
            x = functional.one_input(x, input)
        functional.check_input(x, self.num_features)
        weights = functional.expand_mask(mask, x)
        if not self.training:
            self.statistics.settle()
            return functional.evaluate(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.eps
            )
        if torch.compiler.is_compiling() and type(self.statistics) is not Immediate:
            return self._train_untraced(x, weights)
        return self._train(x, weights)

    def _train(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Normalise a batch by its statistic, or each of its parts by its own."""
        parts = self.statistics.parts(x.shape[0])
        if parts is None:
            return self._train_part(x, weights)
        masks = [None] * len(parts) if weights is None else weights.split(parts)
        return torch.cat(
            [self._train_part(part, mask) for part, mask in zip(x.split(parts), masks, strict=True)]
        )

    _train_untraced = compiled.untraced(_train)

    def _train_part(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Normalise by one statistic, and have the running statistics follow it."""
        local = ops.local_sums(x, weights)
        if local.observer is not None:
            return self._train_observed(x, local)
        call = self._find_call(local) if ops.is_recomputing() else self._new_call(local)
        statistic = self.statistics.take(self, local, call)
        functional.check_count(statistic, self._warn_once)
        y = ops.normalize(x, *self._affine(statistic, call), statistic, self.eps, local.mask)
        if call.is_frozen or ops.is_recomputing():
            return y
        if torch.compiler.is_compiling():
            statistic = statistic._replace(batch=compiled.unless_repeated(statistic.batch))
        else:
            self.seen = (call, statistic.batch)
        with torch.no_grad():
            self.statistics.record(self, statistic)
        return y

    def _train_observed(self, x: Tensor, local: LocalSums) -> Tensor:
        """The same where something looks at operators (see `syncnorm.observed`): nothing is
        remembered or exchanged.
        """
        call = Call(local.sums, self._before())
        if isinstance(self.statistics, Immediate):
            statistic = self.statistics.take(self, local, call)
        elif local.observer == observed.FAKE:
            statistic = ops.local_statistic(local, self.label)
        else:
            raise observed.refuse(local.observer or "", self.label)
        y = ops.normalize(x, *self._affine(statistic, call), statistic, self.eps, local.mask)
        if (
            isinstance(self.statistics, Immediate)
            and self.freeze is None
            and not ops.is_recomputing()
        ):
            with torch.no_grad(), observed.updating(local.observer or "", self.label):
                self.statistics.record(self, statistic)
        return y

    def update_running(self, batch: Moments, momentum: float | None) -> None:
        """Move the running statistics towards those of `batch`, once.

        For those who own the layer's statistics.
        """
        is_tracking = self.track_running_stats or vars(self).get(_FAIRSCALES_BACKUP, False)
        if is_tracking and self.running_mean is not None and self.running_var is not None:
            factor = moments.average_factor(self.num_batches_tracked, batch, momentum)
            moments.update_running_mean_(self.running_mean, batch, factor)
            self._update_running_var(batch, factor)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; the running statistics are up to date when training
        ends.
        """
        if not mode:
            self.statistics.settle()
        return super().train(mode)

    # Methods, not hooks: a layer that is converted, and back, keeps the hooks that it had and no
    # others.
    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        self.statistics.settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        _forget_and_fill(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def reset_parameters(self) -> None:
        """Set weight, bias and the running statistics to their initial values."""
        if self.affine and self.bias is None and not _TORCH_HAS_BIAS:
            self.reset_running_stats()
            nn.init.ones_(self.weight)
        else:
            super().reset_parameters()

    def reset_running_stats(self) -> None:
        """Set the running statistics (and the averages of `sync="lagged"`) to their initial values."""
        if "statistics" in self.__dict__:
            self.statistics.forget(self)
            if self.sync == "lagged":
                averages.begin(self)
        super().reset_running_stats()

    def extra_repr(self) -> str:
        workers = "" if self.workers is None else f", process_group={self.workers!r}"
        theirs = super().extra_repr()
        if self.affine and self.bias is None and not _TORCH_HAS_BIAS:
            theirs += ", bias=False"
        return f"{theirs}, sync={self.lagged if self.sync == 'lagged' else self.sync!r}{workers}"

    @property
    def process_group(self) -> groups.Spec:
        """The workers to pool over, as they were given: see `syncnorm.groups`.

        A copy shares a group that was given; a pickle holds the ranks of its members, and what is
        loaded from it gives these as `groups.Ranks`.
        """
        return groups.to_user(self.workers)

    @process_group.setter
    def process_group(self, value: groups.Spec) -> None:
        self.workers = groups.to_handle(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Moved or cast: what is under way belongs to the old tensors, and no statistic loses
        # digits.
        self.statistics.settle()
        buffers = {name: b for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)
        for name, before in buffers.items():
            now = self.get_buffer(name)
            kept = before.dtype if name in AVERAGES else _kept_type(before.dtype, now.dtype)
            if now.dtype != kept:
                self._buffers[name] = (now if before.is_meta else before).to(now.device, kept)
        if (
            self.sync == "lagged"
            and buffers["lagged_mean"].is_meta
            and not self.lagged_mean.is_meta
        ):
            # Materialised, as uninitialised memory. A checkpoint that fills the layer may be a
            # batch norm's.
            averages.begin(self)
        return self

    def _new_call(self, local: LocalSums) -> Call:
        """Remember what this forward sees, if that is more than the batch; no exchange has been
        made.
        """
        call = Call(local.sums, self._before(), is_frozen=self.freeze is not None)
        depends_on_more = call.before is not None or self.sync == "lagged"
        if depends_on_more and not torch.compiler.is_compiling() and ops.may_be_repeated():
            self._calls.append(call)
        return call

    def _find_call(self, local: LocalSums) -> Call:
        """The call that the present one repeats: the newest with the same local sums that was not
        repeated yet.
        """
        if not self._calls:
            # Repeated in a way that is not known: the last one.
            return self.seen[0] if self.seen is not None else Call(local.sums)
        if len(self._calls) == 1:
            return self._calls[0]
        task, calls = ops.backward_pass(), list(reversed(self._calls))
        # Bit by bit: what is not a number equals itself.
        bits = torch.stack([call.sums for call in calls]).view(torch.int64) == local.sums.view(
            torch.int64
        )
        alike = [
            call for call, is_alike in zip(calls, bits.all(1).tolist(), strict=True) if is_alike
        ]
        if not alike and len(calls) == _REMEMBERED_CALLS:
            raise InputError(
                f"`checkpoint` must repeat one of the last {_REMEMBERED_CALLS} training forwards "
                "of a layer, got none "
                f"of them in {self.label}. Make the backward pass sooner, or checkpoint fewer "
                "calls of this layer."
            )
        alike = alike or calls
        others = [call for call in alike if call.repeated_in != task]
        found = next((call for call in others if call.repeated_in is None), (others or alike)[0])
        found.repeated_in = task
        return found

    def __prepare_scriptable__(self) -> NoReturn:
        raise InputError(
            f"`torch.jit.script` must be given torch's layers, got {type(self).__name__}. Script "
            "revert(model), or "
            "trace the model in evaluation mode."
        )

    def __getstate__(self) -> dict[str, Any]:
        # What awaits a backward pass awaits it of this object, not of a copy.
        return {**self.__dict__, "_calls": deque(maxlen=_REMEMBERED_CALLS)}

    def _before(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """What `Call.before` holds."""
        return None

    @abstractmethod
    def _affine(self, statistic: Statistic, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias to normalise with."""

    @abstractmethod
    def _update_running_var(self, batch: Moments, factor: float | Tensor) -> None:
        """Move the running variance."""

    def _warn_once(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            functional.warn_single_value()
