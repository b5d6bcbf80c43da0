"""DistributedDataParallel: preparation of a model before wrapping, and weighting of its loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from syncnorm import undocumented
from syncnorm.comm import agreement, debug, exchange, groups
from syncnorm.device import is_host, model_device
from syncnorm.errors import FaultError, InputError
from syncnorm.family.layer import Pooling
from syncnorm.maths.precision import for_sums
from syncnorm.model.convert.others import home_made, stays_local
from syncnorm.module import SyncNorm
from syncnorm.shards import Shard, of_nothing
from syncnorm.statistics.steps import delimited_by, remove_deserted
from syncnorm.undocumented import disable_dynamo

_Model = TypeVar("_Model", bound=nn.Module)
# Prepared models with layers of ours, and none of torch's then.
_without_theirs: WeakSet[nn.Module] = WeakSet()


def prepare_ddp(model: _Model, process_group: groups.Spec = None) -> _Model:
    """Make `model` ready for DistributedDataParallel; call it on every worker, before wrapping.

    - Compares the layers of all workers: their arguments, the types and shapes of their parameters
      and buffers, and the workers that each pools over.
    - Makes the process groups of the statistics.
    - Attaches layers with `sync="running"` or "lagged" to each other and to the forward of `model`,
      also those that belong to another model's (an encoder that is given another head).
    - Gives every worker rank 0's buffers of our layers.
    - Keeps these out of the broadcast that DDP makes before each forward. They are equal by
      construction where statistics are pooled over all workers, and each worker's or group's own
      where they are not.

    When DDP wraps the model, it gives all workers rank 0's state; rank 0's buffers of our layers
    are given then, too, so rank 0 alone may load a checkpoint in between. Other buffers are left to
    DDP.

    *Collectives*: two all-gathers of a few hundred bytes per layer, one broadcast per buffer of our layers
    (and again when DDP wraps the model), and the creation of groups. Every worker must call.

    Args:
        model: changed in place; parameters are left to DDP, which broadcasts them itself.
        process_group: the group that DDP will be given, or a one-dimensional DeviceMesh. If it
            holds some of the workers, layers whose own `process_group` is None pool over these, and
            keep the group as their own. (Any other layer pools with whom it says. One with a rule,
            such as "node", pools by it over all workers there are: these must all call then, not
            the members of this group alone.)

    Returns:
        `model`.

    Raises:
        InputError: `process_group` is no group; or a layer's rule does not fit the workers that
            there are.
        FaultError: the workers differ in their layers, or in with whom these pool; the same on
            every worker.

    Warns:
        UserWarning: the model contains torch.nn.SyncBatchNorm, which a sync-bn switch may have put
            in our place; or home-made layers with running statistics, which stay local; or DDP has
            wrapped it already. When DDP wraps the model: torch.nn.SyncBatchNorm has come into it
            meanwhile.
    """
    ours = {name: m for name, m in model.named_modules() if isinstance(m, SyncNorm | Pooling)}
    among = groups.existing_group(process_group)
    switched = replaced(model)
    for said in (switched, stays_local(home_made(model)), _wrapped(model)):
        if said is not None:
            warnings.warn(said, stacklevel=2)
    if ours and switched is None:
        _without_theirs.add(model)
    _share_group(ours.values(), process_group)
    if among is not None and len(groups.ranks(among)) > 1:
        layers = [
            (
                name,
                f"{type(m).__name__}({m.arguments()})",
                _state(m),
                m.workers if m.is_pooled else 1,
            )
            for name, m in ours.items()
        ]
        agreement.agree(layers, among, model_device(model))
    for name, layer in ours.items():
        layer.label = name or layer.label
        if isinstance(layer, Pooling):
            layer.gradient_scale = 1 if among is None else len(groups.ranks(among))
        layer.settle()
        if layer.is_pooled:
            exchange.make_room(groups.statistics_group(layer.workers), largest_message(layer))
    _attach(model, {name: m for name, m in ours.items() if isinstance(m, SyncNorm)})
    if among is not None:
        # What somebody else has excluded is left to him.
        excluded = set(undocumented.ignored_by_ddp(model))
        for name, layer in ours.items():
            keys = [key for key, _ in layer.named_buffers(recurse=False)]
            layer.kept_from_ddp = {k for k in keys if f"{name}.{k}".lstrip(".") not in excluded}
        _give_state_of_rank_zero(model, among)
    return model


def _share_group(layers: Iterable[SyncNorm | Pooling], process_group: groups.Spec) -> None:
    """Have layers without a process group pool over `process_group`, if it is not all workers."""
    kept = groups.to_handle(process_group)
    if isinstance(kept, groups.GivenGroup) and len(kept.members.members) < dist.get_world_size():
        for layer in layers:
            if layer.workers is None and layer.is_pooled:
                layer.workers = kept


def _give_state_of_rank_zero(model: nn.Module, group: groups.Group) -> set[str]:
    """Broadcast rank 0's buffers of our layers that DDP does not; their names in `model`.

    Layers know which these are. Names may have changed since `prepare_ddp`: it may have been given
    a part of the model, and parts may be wrapped, by torch.compile or for checkpointing.
    """
    buffers = {
        f"{name}.{key}".lstrip("."): buffer
        for name, m in model.named_modules()
        if isinstance(m, SyncNorm | Pooling)
        for key, buffer in m.named_buffers(recurse=False)
        if key in m.kept_from_ddp
    }
    for buffer in buffers.values():
        dist.broadcast(buffer, group=group, group_src=0)
    kept = {id(buffer) for buffer in buffers.values()}
    # A buffer may have further names, under which DDP would find it first.
    named = model.named_buffers(remove_duplicate=False)
    return {name for name, buffer in named if id(buffer) in kept}


@undocumented.leave_uncompiled
def _when_wrapped(ddp: nn.Module, name: str, model: nn.Module | None) -> None:
    """Broadcast our buffers when DistributedDataParallel wraps a model, and keep them from it.

    Every worker of its group comes to this point. DDP itself broadcasts rank 0's state there, but
    not the buffers that are excluded from its broadcasts.
    """
    # Only while it is constructed: a later assignment may be made by one worker alone.
    if not isinstance(ddp, DistributedDataParallel) or name != "module" or name in ddp._modules:
        return
    if model is not None:
        assert ddp.process_group is not None
        said = replaced(model)
        if said is not None and any(m in _without_theirs and replaced(m) for m in model.modules()):
            # Called from torch's registration of the module, in DDP's constructor.
            warnings.warn(said, stacklevel=4)
        # There may be other workers than those of `prepare_ddp`, in a torch.distributed that was
        # begun anew.
        workers = len(groups.ranks(ddp.process_group))
        for layer in model.modules():
            if isinstance(layer, Pooling):
                layer.gradient_scale = workers
        undocumented.let_ddp_ignore(ddp, _give_state_of_rank_zero(model, ddp.process_group))


# A hook on every module of this process, since a prepared model may have been copied or unpickled.
register_module_module_registration_hook(_when_wrapped)


def _state(layer: nn.Module) -> str:
    """What DDP and `prepare_ddp` broadcast of a layer, in words."""
    tensors = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
    words = (
        f"{name} {str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for name, t in tensors
    )
    return ", ".join(words) or "none"


def largest_message(layer: _BatchNorm | Pooling) -> int:
    """The numbers in the largest message that a layer may send; of a batch norm, once converted."""
    return max(layer.message_sizes()) if isinstance(layer, Pooling) else 2 * layer.num_features + 1


def replaced(model: nn.Module) -> str | None:
    """The warning about layers that a sync-bn switch may have put in the place of ours.

    None if there are none. torch's converter also matches our layers, and several frameworks'
    switches call it.
    """
    theirs = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.SyncBatchNorm) and not isinstance(m, SyncNorm)
    ]
    if not theirs:
        return None
    return (
        f"`model` contains torch.nn.SyncBatchNorm at {theirs}: a sync-bn switch (of Lightning, "
        "timm, mmengine or your own) may have replaced syncnorm's layers. Switch it off; these "
        "layers pool by themselves."
    )


def _wrapped(model: nn.Module) -> str | None:
    """The warning about a model that DistributedDataParallel has wrapped already; None if not."""
    if not any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        return None
    return (
        "`model` must be prepared before DistributedDataParallel wraps it, got one that is "
        "wrapped: it will broadcast the buffers of syncnorm's layers before each forward. Write "
        "DistributedDataParallel(prepare_ddp(model))."
    )


def _attach(model: nn.Module, layers: dict[str, SyncNorm]) -> None:
    """Attach layers of one mode and one process group to each other."""
    together: dict[tuple[str, tuple[int, ...]], dict[str, SyncNorm]] = {}
    within = delimited_by(model)
    for name, layer in layers.items():
        layer.is_prepared = True
        source = layer.statistics
        if not (source.steps is None or source.steps in within or source.is_busy):
            # Prepared in another model, whose forward nobody may call any more.
            source.release(layer)
        if not layer.statistics.is_attached:
            members = tuple(groups.ranks(groups.statistics_group(layer.workers)))
            together.setdefault((layer.sync, members), {})[name] = layer
    remove_deserted(model)
    for some in together.values():
        next(iter(some.values())).sync_mode.attach(some, model)


@disable_dynamo
def scale_loss(loss: Tensor, local_count: float, process_group: groups.Spec = None) -> Tensor:
    """Weight a worker's mean loss so that DDP's average over workers is the mean over all samples.

        scaled = loss * local_count * world_size / global_count

    *Collectives*: one all-reduce of one number, on the group of the statistics. Every worker must
    call. *Gradients*: those of the loss, scaled.

    Args:
        loss: mean over this worker's samples, shape (). A worker without samples passes a loss
            that depends on its (empty) output all the same, so that it takes part in the backward
            pass; the value, perhaps NaN, does not matter. A division by a count of its own must be
            one by at least 1: the gradient of 0 / 0 is NaN whatever multiplies it. In a half type
            the weight is rounded to that type, by up to 0.2 %: better a float32 loss.
        local_count: the number of these samples, finite and >= 0 (or of whatever the mean is over:
            boxes, valid pixels); a number, or a tensor of one. On the loss's CUDA device it stays
            there, and nothing waits for it.
        process_group: the workers among which the batch is sharded; None: all of them.

    Returns:
        The scaled loss; zero where this worker has no samples; else, with one worker, the loss itself.

    Raises:
        FaultError: on every worker, if the count of one is none, or its loss no single number. On
            CUDA this is looked at in debug mode only; otherwise the loss is NaN on every worker.
        InputError: the loss is no single number, with one worker.
    """
    group = groups.statistics_group(process_group)
    if (
        isinstance(local_count, Tensor)
        and not (debug.is_on or is_host(local_count))
        and local_count.device == loss.device
        and local_count.numel() == loss.numel() == 1
    ):
        return _scale_by_unread(loss, local_count, group)
    # What is no number, or no mean, travels as NaN, so that all raise.
    given = _number(local_count) if loss.numel() == 1 else math.nan
    sent = given if 0 <= given < math.inf else math.nan
    if group is None:
        if loss.numel() != 1:
            raise InputError(f"`loss` must be a mean, of shape (), got {tuple(loss.shape)}")
        if math.isnan(sent):
            raise _no_counts({0: given})
        return loss if given else of_nothing(loss)
    Shard.scaled_losses += 1
    # Filled rather than copied: a copy from the host would wait for the CUDA device.
    count = torch.full((1,), sent, dtype=torch.float64, device=loss.device)
    total = exchange.sum_(count, group, "count", "scale_loss")
    if (debug.is_on or is_host(total)) and math.isnan(total):
        found = exchange.gather(count.fill_(given), group, "fault", "scale_loss")
        raise _no_counts(dict(zip(groups.ranks(group), found.flatten().tolist(), strict=True)))
    if given == 0:
        return of_nothing(loss)
    return loss * (given * len(groups.ranks(group)) / total).squeeze(0).to(loss.dtype)


def _scale_by_unread(loss: Tensor, local_count: Tensor, group: groups.Group | None) -> Tensor:
    """`scale_loss` by a count that the host does not know: NaN where it is no count."""
    given = for_sums(local_count.detach()).view(1)
    count = total = torch.where((given >= 0) & given.isfinite(), given, torch.nan)
    workers = 1
    if group is not None:
        Shard.scaled_losses += 1
        workers = len(groups.ranks(group))
        total = exchange.sum_(count, group, "count", "scale_loss")
    weight = (count * workers / torch.where(total == 0, 1.0, total)).squeeze(0)
    return torch.where(weight == 0, of_nothing(loss), loss * weight.to(loss.dtype))


def _number(count: Any) -> float:
    """The count as a float, since products of small whole numbers would overflow; NaN if it is none."""
    try:
        return math.nan if isinstance(count, str | bytes) else float(count)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def _no_counts(given: Mapping[int, float]) -> FaultError:
    wrong = ", ".join(f"{n:g} on rank {r}" for r, n in given.items() if not 0 <= n < math.inf)
    return FaultError(
        f"`local_count` must be finite and >= 0, got {wrong}. It is the number of this worker's "
        "samples, 0 without any. Here nan also means a count that is no number, or a loss of several "
        "values: pass its mean."
    )
