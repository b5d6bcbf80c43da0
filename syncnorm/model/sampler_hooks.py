"""The hooks of a model whose training forwards are of a sampler's batches."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from syncnorm import checks
from syncnorm.comm import groups
from syncnorm.module import SyncNorm
from syncnorm.recomputing import is_recomputing
from syncnorm.statistics.grouped import StatisticGroups
from syncnorm.statistics.steps import remove_deserted
from syncnorm.undocumented import disable_dynamo

if TYPE_CHECKING:
    from syncnorm.model.sampler import ElasticBatchSampler


class SamplerHooks:
    """Tells the layers of one model, before each training forward, whose batch it is.

    Args:
        sampler: at whose cursor the batch is.
        layers: that have several statistics in a step, by name; or none.
    """

    is_stand_in: bool

    def __init__(self, sampler: ElasticBatchSampler, layers: dict[str, SyncNorm]) -> None:
        self.is_stand_in = False
        """True if this worker's batch has no weight."""
        self._sampler: ElasticBatchSampler | None = sampler
        """None in what was pickled with its model, whose batches are nobody's until `attach`."""
        self._groups = StatisticGroups(layers) if layers else None
        self._is_open = False
        """True if a step has begun that some numbers of workers take in several rounds."""
        self._handles: list[RemovableHandle] = []
        sampler._register(self)

    @classmethod
    def on(
        cls,
        model: nn.Module,
        sampler: ElasticBatchSampler,
        layers: dict[str, SyncNorm],
        *,
        has_stand_ins: bool,
    ) -> Self:
        """Put the hooks onto a model, in place of those that it may have. On every worker alike."""
        for hook in list(model._forward_pre_hooks.values()):
            before = getattr(hook, "__self__", None)
            if isinstance(before, SamplerHooks):
                before._remove(model)
        self = cls(sampler, layers)
        if self._groups is not None:
            self._groups.steps.attach(model)
        # Before the hooks that delimit the steps.
        self._handles.append(model.register_forward_pre_hook(self._before, prepend=True))
        if has_stand_ins:
            for m in model.modules():
                if isinstance(m, SyncNorm):
                    hook = m.register_forward_pre_hook(self._weigh, with_kwargs=True)
                    self._handles.append(hook)
        return self

    def end_step(self) -> None:
        """Send what the rounds of a step have left for the running statistics."""
        if self._is_open and self._groups is not None:
            self._groups.steps.end_block()
            self._close()

    def drop_step(self) -> None:
        """Forget a step that was not ended."""
        self.is_stand_in = False
        if self._is_open and self._groups is not None:
            self._groups.steps.listener.drop()
            self._close()

    def _close(self) -> None:
        assert self._groups is not None
        self._is_open = self._groups.steps.is_held = False

    @disable_dynamo
    def _before(self, model: nn.Module, args: object) -> None:
        # A forward of a model in evaluation mode is of other data, even if some layers train.
        if not model.training or is_recomputing():
            return
        if self._sampler is None:
            self._remove(model)
            return
        parts, sampler = self._sampler._parts(), self._sampler
        sampler.note_training()
        self.is_stand_in = not any(parts)
        if self._groups is None:
            return
        # Not by the number of rounds: that depends on how many workers there are.
        if sampler.micro_batch is not None and not self._is_open:
            self._groups.steps.begin_block()
            self._is_open = self._groups.steps.is_held = True
        if self.is_stand_in:
            # Its rows are in the first statistic. The others have none, and are exchanged as well.
            parts = [1, *parts[1:]]
        self._groups.place(groups.statistics_group(sampler._current().shared_by), parts)

    def _weigh(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give a stand-in's rows a mask of zeros."""
        if not (self.is_stand_in and layer.training and isinstance(layer, SyncNorm)):
            return None
        x = checks.input_of(args, kwargs)
        if not isinstance(x, Tensor):
            return None
        # (N, 1, ...), which broadcasts to x, (N, C, *S).
        return (x,), {"mask": x.new_zeros(x.shape[:1] + (1,) * (x.dim() - 1))}

    def _remove(self, model: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()
        if self._groups is not None:
            self.drop_step()
            for layer in list(self._groups.pool.layers.values()):
                self._groups.release(layer)
                layer.use_mode(layer.sync_mode)
            remove_deserted(model)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sampler": None, "is_stand_in": False, "_is_open": False}

    def __deepcopy__(self, memo: dict[int, Any]) -> SamplerHooks:
        """Copy with a model, whose copy is given batches of the same sampler."""
        memo[id(self._sampler)] = self._sampler
        memo[id(self)] = new = object.__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        new._is_open = False
        if self._sampler is not None:
            self._sampler._register(new)
        return new
