"""All that a run's future depends on, as a snapshot, and back.

What follows from a snapshot is what would have followed without it, bit for bit on as many workers:
parameters, buffers, averages, modes, optimizer, schedule, random numbers and the place in the data
are in it. On another number of workers it goes on as the same training, to rounding.
"""

import platform
import random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncnorm.errors import CheckpointError
from syncnorm.model.modes import in_evaluation, put_in_evaluation
from syncnorm.train import buffers
from syncnorm.train.checkpoint.progress import Position
from syncnorm.train.checkpoint.snapshot import Snapshot
from syncnorm.train.config.schema import Config
from syncnorm.train.setup import Learner


def versions() -> dict[str, str]:
    """What the run is computed with."""
    from syncnorm import __version__

    return {
        "syncnorm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def capture(learner: Learner, position: Position) -> Snapshot:
    """Gather the state of all workers; the tensors are those in use, not copies.

    *Collectives*: one gathering of what is each worker's own; every worker must call.
    """
    learner.settle()
    own: list[Any] = [None] * learner.workers.world_size
    mine = {"rng": _random_state(), "buffers": _local(learner.model)}
    if learner.average is not None:
        mine["ema"] = _local(learner.average.module)
    dist.all_gather_object(own, mine)
    tensors = {"model": learner.model.state_dict()}
    unsaved = {"model": buffers.unsaved(learner.model)}
    if learner.average is not None:
        tensors["ema"] = learner.average.state_dict()
        unsaved["ema"] = buffers.unsaved(learner.average)
    return Snapshot(
        step=position.step,
        tensors=tensors,
        states={
            "optimizer": learner.optimizer.state_dict(),
            "schedule": _plain(learner.schedule.state_dict()),
            "workers": own,
            # What a model leaves out of its state dict it may change all the same.
            **({"buffers": unsaved} if unsaved["model"] else {}),
        },
        facts={
            "position": position.as_facts(),
            "in_evaluation": in_evaluation(learner.model),
            "world_size": learner.workers.world_size,
            "config": learner.config.model_dump(),
            "versions": versions(),
        },
    )


def restore(learner: Learner, position: Position, snapshot: Snapshot) -> None:
    """Put a snapshot's state in place, on every worker.

    Raises:
        CheckpointError: it is not of this model, or lacks a part.
    """
    try:
        unsaved = snapshot.states.get("buffers", {})
        buffers.load(learner.model, snapshot.tensors["model"], unsaved.get("model", {}))
        if learner.average is not None:
            buffers.load(learner.average, snapshot.tensors["ema"], unsaved.get("ema", {}))
        if "in_evaluation" in snapshot.facts:  # checkpoints of older versions lack it
            put_in_evaluation(learner.model, snapshot.facts["in_evaluation"])
        learner.optimizer.load_state_dict(snapshot.states["optimizer"])
        learner.schedule.load_state_dict(snapshot.states["schedule"])
        own = snapshot.states["workers"]
        if len(own) == learner.workers.world_size:
            _put_own(learner, own[learner.workers.rank])
        position.become(snapshot.facts["position"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"the checkpoint of step {snapshot.step} does not fit the configuration: {reason}"
        ) from error


def check_same(config: Config, snapshot: Snapshot) -> None:
    """CheckpointError unless the snapshot is of a run with the same mathematics."""
    differences = different_keys(config, snapshot.facts.get("config"))
    if differences:
        raise CheckpointError(
            f"the checkpoint of step {snapshot.step} is of another configuration: "
            f"{', '.join(differences)} differ"
        )


def different_keys(config: Config, other: Any) -> list[str]:
    """The dotted keys that fix the result and differ between a configuration and the plain form of
    another.
    """
    if not isinstance(other, dict):
        return ["all"]
    mine = _flat(config.mathematics())
    theirs = _flat(
        {name: value for name, value in other.items() if name in ("model", "data", "norm", "train")}
    )
    theirs.pop("data.root", None)
    return sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    if not values:
        return {}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _local(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are this worker's own."""
    return {
        name: value.cpu() for name, value in buffers.values(buffers.local_places(model)).items()
    }


def _put_own(learner: Learner, own: dict[str, Any]) -> None:
    buffers.put(learner.model, buffers.local_places(learner.model), own["buffers"])
    if learner.average is not None and "ema" in own:  # checkpoints of older versions lack it
        average = learner.average.module
        buffers.put(average, buffers.local_places(average), own["ema"])
    torch.set_rng_state(own["rng"]["torch"])
    if own["rng"]["cuda"] is not None:
        torch.cuda.set_rng_state(own["rng"]["cuda"])
    version, numbers, gauss = own["rng"]["python"]
    random.setstate((version, tuple(numbers), gauss))


def _random_state() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": [version, list(numbers), gauss],
    }


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A schedule's state without what only its own code can load: a partial function says where it
    is from.
    """
    return {name: value for name, value in state.items() if _is_plain(value)} | {
        name: [_plain(one) for one in value]
        for name, value in state.items()
        if name == "_schedulers"
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str | Tensor)
