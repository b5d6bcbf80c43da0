"""All that a run's future depends on, as a snapshot, and back.

What follows from a snapshot is what would have followed without it, bit for bit on as many workers: parameters,
buffers, averages, optimizer, schedule, random numbers and the place in the data are in it. On another number of workers
it goes on as the same training, to rounding.
"""

import platform
import random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm.base import SyncNorm
from syncnorm.errors import CheckpointError
from syncnorm.train.config import Config
from syncnorm.train.learner import Learner
from syncnorm.train.position import Position
from syncnorm.train.snapshot import Snapshot


def versions() -> dict[str, str]:
    """What the run is computed with."""
    from syncnorm import __version__

    return {"syncnorm": __version__, "torch": torch.__version__, "python": platform.python_version()}


def capture(learner: Learner, position: Position) -> Snapshot:
    """Gather the state of all workers; the tensors are those in use, not copies.

    *Collectives*: one gathering of what is each worker's own; every worker must call.
    """
    own: list[Any] = [None] * learner.workers.world_size
    dist.all_gather_object(own, {"rng": _random_state(), "buffers": _own_buffers(learner.model)})
    tensors = {"model": learner.model.state_dict()}
    if learner.average is not None:
        tensors["ema"] = learner.average.state_dict()
    return Snapshot(
        step=position.step,
        tensors=tensors,
        states={
            "optimizer": learner.optimizer.state_dict(),
            "schedule": _plain(learner.schedule.state_dict()),
            "workers": own,
        },
        facts={
            "position": position.as_facts(),
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
        learner.model.load_state_dict(snapshot.tensors["model"])
        if learner.average is not None:
            learner.average.load_state_dict(snapshot.tensors["ema"])
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
            f"the checkpoint of step {snapshot.step} is of another configuration: {', '.join(differences)} differ"
        )


def different_keys(config: Config, other: Any) -> list[str]:
    """The dotted keys that fix the result and differ between a configuration and the plain form of another."""
    if not isinstance(other, dict):
        return ["all"]
    mine = _flat(config.mathematics())
    theirs = _flat({name: value for name, value in other.items() if name in ("model", "data", "norm", "train")})
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


def _own_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of layers whose statistics are each worker's own."""
    state = model.state_dict()
    return {
        f"{name}.{key}".lstrip("."): state[f"{name}.{key}".lstrip(".")].cpu()
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not (isinstance(module, SyncNorm) and module.sync != "none")
        for key, _ in module.named_buffers(recurse=False)
    }


def _put_own(learner: Learner, own: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, value in own["buffers"].items():
            learner.model.get_buffer(name).copy_(value)
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
    """A schedule's state without what only its own code can load: a partial function says where it is from."""
    return {name: value for name, value in state.items() if _is_plain(value)} | {
        name: [_plain(one) for one in value] for name, value in state.items() if name == "_schedulers"
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str | Tensor)
