"""The choice of what a model's batch norms evaluate by, for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm import checks
from syncnorm.comm import groups
from syncnorm.errors import InputError
from syncnorm.family.layer import FamilyLayer
from syncnorm.model.convert.others import has_own_forward, is_home_made
from syncnorm.model.mixed import Choice, How, Mix, Prior
from syncnorm.module import SyncNorm
from syncnorm.ops import LocalSums, Statistic
from syncnorm.statistics.source import Lent, Source
from syncnorm.undocumented import disable_dynamo, unseen_by_selective_checkpoint


@contextmanager
def evaluation_statistics(
    model: nn.Module, statistics: Choice = "batch", *, process_group: groups.Spec = None
) -> Iterator[None]:
    """Choose the statistics of evaluation forwards within the block.

        mean = a running_mean + (1 - a) mean_batch        var = a running_var + (1 - a) var_batch

    For data that differ from the training's: a = 1 for "running", 0 for "batch" (as in training),
    between them for `Mix` and `Prior`. All batch normalisations of the model are meant, ours,
    whatever their `sync`, and torch's; dropout and the like stay as in evaluation. Of the family's
    layers (`syncnorm.family`) those are that have `batch_statistics`.

    *Statistics*: the batch's are those of a training forward: over all workers of `process_group`,
    weighted by a mask where there is one, variance biased. What is kept stays as it is. Where
    nothing counts, a is 1; "batch" gives the bias there and for a single value, as training does.

    *Collectives*: for each forward of a layer one all-reduce of 2C+1 numbers, 2C+2 with `Prior`,
    none with "running"; in grad mode one of 2C in the backward pass. A layer of the family sends
    one number in a message more with `Prior`, and `L1BatchNorm` two messages each way. Every worker
    must call as often, with samples or without; a forward that activation checkpointing repeats
    within the block exchanges nothing. `process_group=1` keeps each worker's batch its own.

    *Gradients*: through the batch's statistics, times 1 - a; of weight and bias local sums, as in
    training. Of any order.

    Args:
        model: in evaluation mode, also one wrapped by DistributedDataParallel.
        statistics: "running", "batch", `Mix(source)` or `Prior(samples)`.
        process_group: the workers that share an inference batch; None: all. See `syncnorm.groups`.

    Raises:
        InputError: an argument breaks its rule; a layer has no running statistics to mix in, or
            evaluates by code of its own; or, before any exchange, a layer is called in training
            mode.

    Example:
        >>> from syncnorm import SyncBatchNorm
        >>> layer, x = SyncBatchNorm(1, eps=1e-12).eval(), torch.tensor([[1.0], [3.0]])
        >>> with evaluation_statistics(layer, "batch"):
        ...     layer(x).tolist()
        [[-1.0], [1.0]]

    References:
        Nado et al., Evaluating prediction-time batch normalization, arXiv:2006.10963, for "batch".
    """
    if not isinstance(statistics, Mix | Prior) and statistics not in ("running", "batch"):
        raise InputError(
            '`statistics` must be "running", "batch", a Mix or a Prior, got '
            f'{statistics!r}. The default is "batch".'
        )
    kinds = _BatchNorm | FamilyLayer
    layers = {n: m for n, m in model.named_modules() if isinstance(m, kinds) or is_home_made(m)}
    _check(layers, statistics)
    how = How(statistics, groups.statistics_group(process_group))
    with ExitStack() as stack:
        for name, layer in layers.items():
            if isinstance(layer, SyncNorm):
                stack.enter_context(_put(layer, "statistics", _Ours(layer.statistics, how)))
            elif isinstance(layer, FamilyLayer):
                stack.enter_context(_put(layer, "chosen", _Family(how)))
            elif isinstance(layer, _BatchNorm) and not _has_own_way(layer):
                stack.enter_context(_put(layer, "forward", _Theirs(layer, name, how)))
                # What copies and pickles ask an object for, also where it is an attribute of its
                # own.
                stack.enter_context(_put(layer, "__getstate__", partial(_state_outside, layer)))
        yield


@contextmanager
def _put(layer: nn.Module, name: str, value: object) -> Iterator[None]:
    """Set an attribute of a layer's own, then put back what was there."""
    own = vars(layer)
    before = own.get(name)
    own[name] = value
    try:
        yield
    finally:
        del own[name]
        if before is not None:
            own[name] = before


def _check(layers: dict[str, Any], statistics: Choice) -> None:
    own = {name: layer for name, layer in layers.items() if _has_own_way(layer)}
    if own and statistics != "running":
        family = [
            f"{n!r} ({type(m).__name__})" for n, m in own.items() if isinstance(m, FamilyLayer)
        ]
        if family:
            raise InputError(
                "`model` must have layers of syncnorm.family with a method `batch_statistics`, "
                f"which takes those of a batch, got {', '.join(family)}. Write it, or choose "
                '"running".'
            )
        raise InputError(
            f"`model` must have batch norms whose statistics can be chosen, got {[*own]}, which "
            "evaluate in ways of their own. convert(model) makes them layers of ours where it can."
        )
    bare = [
        name
        for name, layer in layers.items()
        if any(getattr(layer, kept, 0) is None for kept in ("running_mean", "running_var"))
    ]
    if bare and isinstance(statistics, Mix | Prior):
        raise InputError(
            f'`statistics` must be "batch" for layers without running statistics, got {statistics} '
            f"for {bare}."
        )


def _has_own_way(layer: nn.Module) -> bool:
    if isinstance(layer, FamilyLayer):
        return not hasattr(layer, "batch_statistics")
    # A block around this one is no way of the layer's own.
    is_lent = isinstance(vars(layer).get("forward"), _Theirs)
    is_own = not isinstance(layer, _BatchNorm) or (has_own_forward(layer) and not is_lent)
    return is_own and not isinstance(layer, SyncNorm)


class _Ours(Lent):
    """A layer's own source, except that it evaluates as the block says.

    Args:
        source: the layer's own.
        how: the block's choice.
    """

    def __init__(self, source: Source, how: How) -> None:
        super().__init__(source)
        self.how = how

    @disable_dynamo
    def evaluate(self, layer: SyncNorm, x: Tensor, mask: Tensor | None) -> Tensor:
        self.settle()
        return self.how.evaluate(layer, x, mask, layer.label)

    @disable_dynamo
    def forward(self, layer: SyncNorm, x: Tensor, mask: Tensor | None) -> Tensor:
        raise _training(layer.label)

    def statistic(self, layer: SyncNorm, local: LocalSums) -> Statistic:
        raise _training(layer.label)


class _Theirs:
    """The forward of a batch norm of torch's within the block."""

    def __init__(self, layer: _BatchNorm, name: str, how: How) -> None:
        self.layer, self.name, self.how = layer, name or type(layer).__name__, how

    @disable_dynamo
    @unseen_by_selective_checkpoint
    def __call__(self, input: Tensor) -> Tensor:  # torch's name for the argument
        if self.layer.training:
            raise _training(self.name)
        checks.check_input(input, self.layer.num_features)
        return self.how.evaluate(self.layer, input, None, self.name)


def _state_outside(layer: nn.Module) -> Any:
    """The state of a layer of torch's for a copy, which is no part of the block."""
    state = type(layer).__getstate__(layer)
    if isinstance(state, dict):  # else there are slots, and they are next to it
        return {k: v for k, v in state.items() if k not in ("forward", "__getstate__")}
    return state


class _Family:
    """What normalises in place of a layer of the family within the block."""

    def __init__(self, how: How) -> None:
        self.how = how

    @disable_dynamo
    def __call__(self, layer: FamilyLayer, x: Tensor, weights: tuple[Tensor | None, ...]) -> Tensor:
        if layer.training:
            raise _training(layer.label)
        return self.how.evaluate_family(layer, x, weights)


def _training(name: str) -> InputError:
    return InputError(
        "`model` must be in evaluation mode within evaluation_statistics, got a training forward "
        f"of {name}. Call model.eval(), or train outside of the block."
    )
