"""A context in which a worker without data matches the exchanges of the others with zeros."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm import undocumented
from syncnorm.comm import exchange, groups, inflight
from syncnorm.errors import InputError
from syncnorm.family.layer import Pooling
from syncnorm.model.join.coordinator import Coordinator
from syncnorm.model.join.handover import Stateful, check
from syncnorm.module import SyncNorm


@contextmanager
def join(model: nn.Module, *stateful: Stateful) -> Iterator[None]:
    """Let workers run out of data at different times: those without match the others' exchanges.

        with join(ddp_model, optimizer):
            for x, y in batches:                     # as many as this worker has, also none
                loss = criterion(ddp_model(x), y)
                scale_loss(loss, len(x)).backward()
                optimizer.step()

    Each step is that of the batch which the workers that still have data hold together: statistics,
    and with `scale_loss` also gradients. (`scale_loss` multiplies by the number of *all* workers,
    and DDP divides by it, including those without data, which add zeros. Without `scale_loss` the
    gradient shrinks with every worker that runs out.) Several forwards may share a backward pass,
    or have none. Gradients may be accumulated, either with all but the last of an update in
    `no_sync`, or with none (with `find_unused_parameters`: in `no_sync`); a worker whose data ends
    within an update leaves its gradients as they are.

    At the end all workers have the parameters, running statistics (not those of `sync="none"`,
    which are each worker's own) and the states of `stateful` of a worker whose data lasted longest.
    Two models that are trained together have a `join` each, one within the other: `with join(g,
    opt_g), join(d, opt_d):`.

    *Collectives*: in each forward an exchange of three numbers besides its own; once a worker has
    run out, one of four numbers before each, and one more in a backward pass without any. At the
    end two more, and two for each of `stateful`. Every worker must use the block, and make the same
    exchanges as those that still have data; other collectives within it are not matched. A forward
    in evaluation mode under `torch.no_grad()` has none, unless DDP broadcasts buffers.

    An error that ends the block on all workers that have data is an ExchangeError on those that
    have run out. An error on a single worker is an ExchangeError on the others at their next
    exchange, if a worker had run out before. Else they wait for the timeout of their group.

    Args:
        model: one wrapped by DistributedDataParallel (any buffer setting), or one whose gradients
            somebody else pools; given to `prepare_ddp` before. Call this object itself: a hook at
            the beginning of its forward counts the workers that have data.
        stateful: all other objects that change from step to step: optimizers, schedulers, a
            GradScaler, an AveragedModel, or any object with `state_dict` and `load_state_dict`,
            such as a counter of your own. The state must be of types that
            `torch.load(weights_only=True)` reads. Left out, the workers go on with different
            states: with different optimizers their parameters drift apart.

    Raises:
        InputError: a layer has `sync="lagged"` (its averages also follow the backward pass of a
            worker's last step) or pools over other workers than the rest; DDP sends by NCCL; FSDP
            shards the model; one of `stateful` has no state, or is an optimizer of torch's whose
            steps exchange parameters; the model is in a `join` or in `accumulate` already.
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
    layers = [m for m in model.modules() if isinstance(m, SyncNorm | Pooling) and m.is_pooled]
    group = groups.statistics_group(model.process_group if is_ddp else None)
    _check(layers, group)
    check(stateful)
    if group is None:
        yield
        return
    _check_collectives(model)
    with _coordinator(group) as coordinator, coordinator.register(model, layers, stateful):
        try:
            yield
        except Exception as error:
            coordinator.abort(error)
            raise
        coordinator.match_others()


def _check(layers: list[SyncNorm | Pooling], group: groups.Group | None) -> None:
    for layer in layers:
        if isinstance(layer, SyncNorm) and layer.statistics.is_accumulating:
            raise InputError(
                "`model` must not be accumulating where workers may run out of data, got `join` "
                "within `accumulate`. Open `join` first."
            )
        if isinstance(layer, SyncNorm) and not layer.sync_mode.normalizes_by_batch:
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


def _check_collectives(model: nn.Module) -> None:
    """Refuse collectives that a worker without data cannot match.

    Those of FSDP are unknown here. DDP's over NCCL may hang where workers launch them in different
    orders: a worker without data starts the sums of all gradients at once, one with data starts
    them one by one, between the exchanges of the layers.
    """
    for module in model.modules():
        if undocumented.is_managed_by_fsdp(module):
            raise InputError(
                "`model` must not be sharded where workers may run out of data, got one of FSDP, "
                "whose collectives a worker without data cannot match. Use "
                "DistributedDataParallel, or give the workers equally many batches, empty ones if "
                "need be."
            )
        if isinstance(module, DistributedDataParallel):
            assert module.process_group is not None
            backend = undocumented.backend_for(module.process_group, module.device)
            if backend == "nccl":
                raise InputError(
                    "`model` must not exchange gradients by NCCL where workers may run out of "
                    f"data, got DistributedDataParallel on {module.device}. NCCL needs one order "
                    "of launches on all workers, and one without data cannot follow it. Give the "
                    "workers equally many batches, empty ones if need be."
                )


_open: list[Coordinator] = []


def is_open() -> bool:
    """True within a `join`."""
    return bool(_open)


@contextmanager
def _coordinator(group: groups.Group) -> Iterator[Coordinator]:
    """The coordinator of the enclosing block, or a new one."""
    if _open:
        (coordinator,) = _open
        if coordinator.group is not group:
            raise InputError(
                "`process_group` must be that of the model where workers may run out of data, got "
                f"ranks {groups.ranks(group)} in a `join` within another. Give both models the "
                "same workers."
            )
        yield coordinator
        return
    coordinator = Coordinator(group)
    _open.append(coordinator)
    # A worker that raises starts a header for which it does not wait (`abort`), which meets a sum of
    # the others.
    inflight.log_of(group).is_on_one_level = True
    exchange.announcers.append(coordinator.announce)
    try:
        yield coordinator
    finally:
        inflight.log_of(group).is_on_one_level = False
        exchange.announcers.remove(coordinator.announce)
        _open.remove(coordinator)
