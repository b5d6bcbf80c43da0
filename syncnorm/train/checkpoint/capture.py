"""The state of a run: captured as a snapshot, and restored from one.

A snapshot holds all that the run's future depends on: parameters, buffers, averages, modes,
optimizer, schedule, random numbers and progress. From it a run goes on bit for bit as it would have
without it, on as many workers; on another number of workers as the same training, to rounding.
"""

import logging
import math
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from syncnorm import rng
from syncnorm.errors import CheckpointError, ConfigError
from syncnorm.model.modes import in_evaluation, put_in_evaluation
from syncnorm.train import buffers, optim
from syncnorm.train.checkpoint.same_run import (
    check_same,
    check_same_data,
    data_facts,
    epochs_of,
)
from syncnorm.train.checkpoint.snapshot import Snapshot
from syncnorm.train.checkpoint.store import CheckpointStore
from syncnorm.train.metrics import from_json_value
from syncnorm.train.scaling import load_scaler, rescale_gradient_averages, scaler_state
from syncnorm.train.setup import Setup
from syncnorm.train.waiting import from_all, from_first

_log = logging.getLogger(__name__)


@dataclass
class Progress:
    """The steps and epochs that a run has done; readable from outside when it ends early.

    Args:
        epoch: the one under way or last done, from 1; 0 before the first.
        step_in_epoch: steps of it that are done.
        step: steps of the whole run that are done.
        loss_sum: sum of the losses of this epoch's steps so far.
        left_out: steps of this epoch that were left out, and have no loss.
        metrics: of the last evaluation; None before.
        best: the best value so far of the metric that decides; higher is better.
        since_best: evaluations since that one.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    left_out: int = 0
    metrics: dict[str, float] | None = None
    best: float | None = None
    since_best: int = 0

    def load_facts(self, facts: dict[str, Any]) -> None:
        """Load what JSON has of a dict of one; TypeError or KeyError if it is another."""
        facts = from_json_value(facts)
        for name, value in asdict(Progress(**{name: facts[name] for name in asdict(self)})).items():
            setattr(self, name, value)

    def begin_epoch(self) -> None:
        """Go on to the next epoch, with none of its steps done."""
        self.epoch += 1
        self.step_in_epoch, self.loss_sum, self.left_out = 0, 0.0, 0

    @property
    def mean_loss(self) -> float:
        """The mean of this epoch's steps that were taken; NaN before the first."""
        taken = self.step_in_epoch - self.left_out
        return self.loss_sum / taken if taken else math.nan

    def update_best(self, value: float) -> bool:
        """Note the value of an evaluation; True if it is the best so far. NaN never is."""
        self.since_best += 1
        if math.isnan(value) or (self.best is not None and value <= self.best):
            return False
        self.best, self.since_best = value, 0
        return True


def versions() -> dict[str, str]:
    """The versions of the libraries that compute the run."""
    from syncnorm import __version__

    return {
        "syncnorm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def capture(setup: Setup, progress: Progress) -> Snapshot:
    """Capture the state of all workers; the tensors are those in use, not copies.

    *Collectives*: one gathering of each worker's own state; every worker must call.
    """
    setup.flush_statistics()
    mine = {"rng": rng.state(), "buffers": _own_buffers(setup.model)}
    if setup.average is not None:
        mine["ema"] = _own_buffers(setup.average.module)
    own = from_all(mine)
    tensors = {"model": setup.model.state_dict()}
    unsaved = {"model": buffers.unsaved(setup.model)}
    if setup.average is not None:
        tensors["ema"] = setup.average.state_dict()
        unsaved["ema"] = buffers.unsaved(setup.average)
    return Snapshot(
        step=progress.step,
        tensors=tensors,
        states={
            "optimizer": setup.optimizer.state_dict(),
            "schedule": _plain_items(setup.schedule.state_dict()),
            "workers": own,
            **_scaler_states(setup),
            # The model leaves these out of its state dict, and may change them all the same.
            **({"buffers": unsaved} if unsaved["model"] else {}),
        },
        facts={
            "position": asdict(progress),
            "in_evaluation": in_evaluation(setup.model),
            "world_size": setup.workers.world_size,
            "config": setup.config.model_dump(),
            "versions": versions(),
            **data_facts(setup),
        },
    )


def restore(setup: Setup, progress: Progress, snapshot: Snapshot) -> None:
    """Restore a snapshot's state, on every worker.

    Raises:
        CheckpointError: it is of another model, or incomplete.
        ConfigError: the run cannot have the further epochs that the configuration gives it.
    """
    try:
        unsaved = snapshot.states.get("buffers", {})
        buffers.load(setup.model, snapshot.tensors["model"], unsaved.get("model", {}))
        if setup.average is not None:
            buffers.load(setup.average, snapshot.tensors["ema"], unsaved.get("ema", {}))
        put_in_evaluation(setup.model, snapshot.facts["in_evaluation"])
        _load_optimizer(setup.optimizer, snapshot.states["optimizer"])
        setup.schedule.load_state_dict(snapshot.states["schedule"])
        _lengthen(setup, snapshot)
        own = snapshot.states["workers"]
        if setup.scaler.is_enabled():  # whose product with the number of workers stays
            load_scaler(setup.scaler, snapshot.states["scaler"], setup.workers.world_size)
        else:
            rescale_gradient_averages(setup.model, setup.workers.world_size / len(own))
        if len(own) == setup.workers.world_size:
            _restore_own(setup, own[setup.workers.rank])
        progress.load_facts(snapshot.facts["position"])
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"the checkpoint of step {snapshot.step} does not fit the configuration: {reason}"
        ) from error


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state, single numbers in the type that they were saved in.

    torch gives them that of the parameter, and what NAdam, ASGD and others multiply up would go on
    in another one. A tensor of the parameter's shape lies in memory as the parameter does, whose
    elements fused optimizers pair with it by their places: snapshots are contiguous.
    """
    optimizer.load_state_dict(state)
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        loaded = optimizer.state[parameter] if number in state["state"] else {}
        for name, value in loaded.items():
            if isinstance(value, Tensor) and value.ndim == 0:
                saved = state["state"][number][name]
                loaded[name] = saved.to(value.device, copy=True)
            elif isinstance(value, Tensor) and value.shape == parameter.shape:
                loaded[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _lengthen(setup: Setup, snapshot: Snapshot) -> None:
    """Let a run that now has more epochs go on at the learning rate of the longer run.

    Raises:
        ConfigError: the schedule has an end that does not move with the run.
    """
    train, before = setup.config.train, epochs_of(snapshot.facts["config"])
    if before >= train.epochs:
        return
    old = setup.schedule.get_last_lr()[0]
    if not optim.follow_length(setup.schedule):
        raise ConfigError(
            f"`train.epochs` must stay {before} with schedule {train.schedule.name}, which has a "
            f"length of its own or is still warming up, got {train.epochs}. Begin a new run with "
            "model.weights=RUN."
        )
    _log.warning(
        "train.epochs grows from %d to %d: from step %d on all is as in a run of %d, the learning "
        "rate %.3g (it was %.3g)",
        before,
        train.epochs,
        snapshot.step + 1,
        train.epochs,
        setup.schedule.get_last_lr()[0],
        old,
    )


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run goes on from.

    Args:
        source: its name; None if there is none, and the run begins.
        faults: messages about newer ones that are damaged.
    """

    source: str | None
    faults: list[str] = field(default_factory=list)


def resume(setup: Setup, progress: Progress, store: CheckpointStore | None) -> Resumed:
    """Restore the newest good checkpoint, if there is one, on every worker.

    *Collectives*: one broadcast; every worker must call.

    Args:
        setup: newly built; left as it is if there is no checkpoint.
        progress: is set to the checkpoint's.
        store: on the first worker, which alone reads; None on the others.

    Raises:
        ConfigError: the checkpoint is of another configuration, or there are checkpoints, none of
            which can be read or gone on with; on all workers.
        CheckpointError: the checkpoint is of another model.
    """

    def read() -> tuple[Snapshot | None, str | None, list[str]]:
        assert store is not None
        # After a kill in the last save of all, nobody else removes its remains.
        store.clean()
        snapshot, path, faults = store.newest()
        if snapshot is None and faults:
            # To begin again would replace what may still be saved.
            raise ConfigError(
                f"a checkpoint must be readable to go on, got {len(faults)} that are not; the "
                f"newest: {faults[0]}. To begin again, move {str(store.folder)!r} away."
            )
        if snapshot is not None:
            if "optimizer" not in snapshot.states:
                raise ConfigError(
                    "a run that trained must be what is gone on with, got one that was merged. To "
                    "train its model further, begin a run with model.weights=FOLDER."
                )
            check_same(setup.config, snapshot)
            check_same_data(setup, snapshot.facts)
        return snapshot, None if path is None else path.name, faults

    snapshot, source, faults = from_first(store is not None, read)
    if snapshot is not None:
        restore(setup, progress, snapshot)
    return Resumed(source, faults)


def _scaler_states(setup: Setup) -> dict[str, Any]:
    if not setup.scaler.is_enabled():
        return {}
    return {"scaler": scaler_state(setup.scaler, setup.workers.world_size)}


def _own_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copy the buffers that are this worker's own."""
    return {name: value.cpu() for name, value in buffers.values(buffers.local_slots(model)).items()}


def _restore_own(setup: Setup, own: dict[str, Any]) -> None:
    buffers.copy_into(setup.model, buffers.local_slots(setup.model), own["buffers"])
    if setup.average is not None:
        average = setup.average.module
        buffers.copy_into(average, buffers.local_slots(average), own["ema"])
    rng.load_state(own["rng"])


def _plain_items(state: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a schedule's state the objects of its own code, such as partial functions."""
    return {name: value for name, value in state.items() if _is_plain(value)} | {
        name: [_plain_items(one) for one in value]
        for name, value in state.items()
        if name == "_schedulers"
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str | Tensor)
