"""The base class of the layers: arguments, state, and the training forward.

What a layer normalises a batch by comes from its `statistics`, see `syncnorm.statistics`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm import checks, inference, ops, tracing
from syncnorm.comm import exchange, groups
from syncnorm.maths import renorm
from syncnorm.maths.lagged import Lagged
from syncnorm.maths.moments import Moments
from syncnorm.maths.precision import HALF_TYPES
from syncnorm.ops import LocalSums, Statistic
from syncnorm.recomputing import may_be_repeated
from syncnorm.statistics import MODES, mode_of, repeated
from syncnorm.statistics.buffers import LoadedMark
from syncnorm.statistics.source import Mode, Source
from syncnorm.undocumented import count_dispatch_modes, unseen_by_selective_checkpoint

# fairscale's checkpoint wrapper sets track_running_stats to False in the forward that is made
# without gradients, to leave the update to the repetition, and keeps its value here. Our layers
# update in that forward.
_FAIRSCALES_BACKUP = "_track_running_stats_backup"
# Whether torch's own layers may be without a bias: from 2.13 on.
_TORCH_HAS_BIAS = "bias" in inspect.signature(_BatchNorm.__init__).parameters


class Seen(NamedTuple):
    """The last training forward of a layer, for `monitor` and for repetitions in no known checkpoint."""

    sums: Tensor
    """The local sums, shape (2C+1,)."""
    batch: Moments
    """The moments that the batch was normalised by."""
    correction: renorm.Correction | None


# The buffers of all modes.
MODE_BUFFERS = {name for mode in MODES.values() for name in mode().buffer_names}


def _kept_type(before: torch.dtype, after: torch.dtype) -> torch.dtype:
    """The type that a running statistic has after a cast of its layer: no half type, unless it had one."""
    return torch.float32 if after in HALF_TYPES and before not in HALF_TYPES else after


class SyncNorm(_BatchNorm):
    """Base class of SyncBatchNorm and SyncBatchRenorm; abstract."""

    label: str
    running_mean: Tensor | None
    running_var: Tensor | None

    has_frozen_statistics: bool
    """True within `frozen_statistics`: forwards must leave no trace. Not copied or pickled."""
    averages_std = False
    """True if the running variance follows by its root, the standard deviation."""
    statistics: Source
    """The source of training statistics."""
    sync_mode: Mode
    """The meaning of `sync`."""
    workers: groups.GroupHandle
    """`process_group` as it is kept: what can be copied and pickled."""
    _is_hf_initialized = LoadedMark()

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
        checks.check_hyperparameters(num_features, eps, momentum)
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
        """Add to torch's layer what makes it one of ours: while it is built, or converted."""
        if not isinstance(sync, Lagged):
            checks.check_choice("sync", sync, tuple(MODES))
        self.process_group = process_group
        self.use_mode(mode_of(sync))
        self.label = f"{type(self).__name__}({self.num_features})"
        """Its name in errors; `prepare_ddp` makes it the name within the model."""
        self.is_prepared = False
        """Set by `prepare_ddp`: gradients are averaged over the workers."""
        self.kept_from_ddp: set[str] = set()
        """The names of its buffers that DistributedDataParallel is not to broadcast."""
        mean, var = self.running_mean, self.running_var
        if mean is not None and var is not None and mean.dtype in HALF_TYPES:
            self.running_mean, self.running_var = mean.float(), var.float()
        tensors = (*self.parameters(recurse=False), *self.buffers(recurse=False))
        where = next((t.device for t in tensors), device)
        for name, value in self.sync_mode.buffers(self.num_features, where).items():
            self.register_buffer(name, value)
        self.seen: Seen | None = None
        self.has_frozen_statistics = False
        self._has_warned = False

    def use_mode(self, mode: Mode) -> None:
        """Set the mode, and the source of a layer that is alone. Adds no buffers."""
        self.sync_mode = mode
        self.statistics = mode.new_source()

    @property
    def sync(self) -> str:
        """The name of the mode: "batch", "running", "lagged" or "none"."""
        return self.sync_mode.name

    @property
    def is_pooled(self) -> bool:
        """True if workers exchange statistics."""
        return self.sync_mode.is_pooled

    @property
    def failure(self) -> exchange.Failure | None:
        """The failed exchange that the running statistics lack; the next training forward raises it."""
        return self.statistics.failure

    def settle(self) -> None:
        """Bring the running statistics up to date, before they are read. Starts no exchange."""
        self.statistics.settle()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor | None = None, mask: Tensor | None = None, *, input: Tensor | None = None
    ) -> Tensor:
        """Normalise x, shape (N, C, *S), by batch or running statistics.

        The mask holds weights >= 0, broadcastable to (N, 1, *S), for statistics of the batch only.
        `input` is torch's name for x.
        """
        if type(x) is not Tensor and isinstance(x, tracing.Proxy):
            return tracing.module_call(self, x, mask)
        if x is None or input is not None:
            x = checks.one_input(x, input)
        checks.check_input(x, self.num_features)
        weights = None if mask is None else checks.expand_mask(mask, x)
        forward = self.statistics.forward if self.training else self.statistics.evaluate
        if not torch.compiler.is_compiling() and count_dispatch_modes():
            forward = unseen_by_selective_checkpoint(forward)
        return forward(self, x, weights)

    def evaluate(self, x: Tensor) -> Tensor:
        """Normalise x by the running statistics, or by the local batch without them.

        Called by the source, for an evaluation forward.
        """
        return inference.evaluate(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.eps
        )

    def train_forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Normalise x by one statistic, and have the running statistics follow it.

        Called by the source, for a batch or for each of its parts.
        """
        weight, bias = self.weight, self.bias
        local = ops.local_sums(x, mask, weight, bias)
        is_unread = local.is_compiled or local.tracer is not None
        statistic = repeated.find(self) if local.is_repeated and not is_unread else None
        if statistic is None:
            statistic = self.new_statistic(local)
        y, statistic = ops.normalize_batch(x, weight, bias, statistic, self.eps, local)
        if not local.is_repeated and not self.has_frozen_statistics:
            self._follow(local, statistic)
        if not is_unread and not local.is_repeated and may_be_repeated():
            repeated.keep(self, statistic)
        return y

    def new_statistic(self, local: LocalSums) -> Statistic:
        """The statistic to normalise a batch by. Here workers exchange."""
        source = self.statistics
        if local.tracer is not None:
            return source.traced_statistic(self, local)
        statistic = source.statistic(self, local)
        checks.check_count(statistic, self._warn_once)
        return statistic

    def _follow(self, local: LocalSums, statistic: Statistic) -> None:
        """Have the running statistics follow, now or when their source says so.

        Called after each forward that is not frozen and no repetition.
        """
        if local.tracer is not None:
            with tracing.updating(local.tracer, self.label):
                self.statistics.record(self, local, statistic.moments)
            return
        if not local.is_compiled:
            # Past torch's own `__setattr__`, which looks for parameters and modules.
            vars(self)["seen"] = Seen(local.sums, statistic.moments, statistic.correction)
        self.statistics.record(self, local, statistic.moments)

    @property
    def is_tracking(self) -> bool:
        """True if a training forward that is made now moves the running statistics."""
        return self.track_running_stats or vars(self).get(_FAIRSCALES_BACKUP, False)

    def update_running(self, batch: Moments, momentum: float | None) -> None:
        """Move the running statistics towards those of `batch`, once.

        For those who own the layer's statistics, and have asked `is_tracking` in the forward.
        """
        # Past `CurrentBuffers`: what was under way is done, or is this.
        own, is_std = self._buffers, self.averages_std
        mean, var = dict.get(own, "running_mean"), dict.get(own, "running_var")
        if mean is not None and var is not None:
            counter = dict.get(own, "num_batches_tracked")
            ops.update_running_(mean, var, counter, batch, momentum, self.eps, is_std=is_std)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; running statistics are up to date when training ends."""
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
        self.statistics.discard(self)
        own = {*self.sync_mode.buffer_names}
        self.sync_mode.complete(self, state_dict, prefix, sorted(MODE_BUFFERS - own))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def reset_parameters(self) -> None:
        """Set weight, bias and the running statistics to their initial values."""
        if self.affine and self.bias is None and not _TORCH_HAS_BIAS:
            self.reset_running_stats()
            nn.init.ones_(self.weight)
        else:
            super().reset_parameters()

    def reset_running_stats(self) -> None:
        """Set the running statistics, and the buffers of the mode, to their initial values."""
        if "statistics" in self.__dict__:
            self.statistics.discard(self)
            self.sync_mode.begin(self)
        super().reset_running_stats()

    def extra_repr(self) -> str:
        workers = "" if self.workers is None else f", process_group={self.workers!r}"
        return f"{self.arguments()}{workers}"

    def arguments(self) -> str:
        """The arguments in words, without the process group: the same on all workers."""
        theirs = super().extra_repr()
        if self.affine and self.bias is None and not _TORCH_HAS_BIAS:
            theirs += ", bias=False"
        return f"{theirs}, sync={self.sync_mode.argument!r}"

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
        own, is_filled = self.sync_mode.buffer_names, False
        for name, before in buffers.items():
            now = self.get_buffer(name)
            kept = before.dtype if name in own else _kept_type(before.dtype, now.dtype)
            if now.dtype != kept:
                self._buffers[name] = (now if before.is_meta else before).to(now.device, kept)
            is_filled |= name in own and before.is_meta and not now.is_meta
        if is_filled:
            # Materialised, as uninitialised memory. A checkpoint that fills the layer may be a
            # batch norm's.
            self.sync_mode.begin(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.has_frozen_statistics = False

    def __prepare_scriptable__(self) -> NoReturn:
        raise checks.no_script(self)

    def _warn_once(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            checks.warn_single_value()
