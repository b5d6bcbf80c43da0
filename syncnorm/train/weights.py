"""Weights that a new run begins with: those of a file, of a folder, or of another run.

| `model.weights` | read |
|---|---|
| FILE.safetensors; .pt, .pth, .bin, .ckpt | the file; of a whole checkpoint its state dict |
| a folder with model.safetensors or pytorch_model.bin | that, or the parts that its index lists |
| a checkpoint's folder, a run's folder | the evaluated model, of a run in its newest checkpoint |

Nothing in them can run code: torch unpickles plain values and tensors alone.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm.errors import CheckpointError, ConfigError, InputError
from syncnorm.model.adopt import NumbersError, adopt_state_dict
from syncnorm.train.checkpoint.evaluated import evaluated_state, read_evaluated
from syncnorm.train.checkpoint.snapshot import MANIFEST, read_snapshot
from syncnorm.train.checkpoint.store import CHECKPOINTS
from syncnorm.train.config.schema import ModelSection
from syncnorm.train.waiting import from_first
from syncnorm.train.workers import Workers

_log = logging.getLogger(__name__)

_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
# What others call the state dict in a whole checkpoint, the likeliest first.
_STATE_DICTS = ("state_dict", "model_state_dict", "model")
_HF_FILES = ("model.safetensors", "pytorch_model.bin")


def load_weights(model: nn.Module, section: ModelSection, workers: Workers) -> None:
    """Fill a new run's model, in place, with the weights that the configuration names, if any.

    Counters of batches begin at 0, as the run does. What was changed or left is logged.

    *Collectives*: one broadcast, if weights are named; every worker must call. The first worker
    alone reads.

    Raises:
        ConfigError: they cannot be read, or do not fit; on all workers.
    """
    if section.weights is None:
        return
    path = Path(section.weights).expanduser()
    found = from_first(workers.is_first, lambda: read_weights(path))
    try:
        state = _without_prefix(found, model.state_dict())
        adopted = adopt_state_dict(model, state, partial=section.partial)
    except InputError as error:
        # Numbers do not fit better in part.
        has_remedy = not (section.partial or isinstance(error, NumbersError))
        remedy = " model.partial=true loads what fits." if has_remedy else ""
        raise ConfigError(
            f"`model.weights` must fit the model, got {section.weights!r}: {error}{remedy}"
        ) from None
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.num_batches_tracked is not None:
            module.num_batches_tracked.zero_()
    for line in (*adopted.notes, *adopted.left.lines()):
        _log.warning("weights of %s: %s", section.weights, line)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict, on the CPU.

    Raises:
        ConfigError: there is none, or none that can be read.
    """
    try:
        return _read_folder(path) if path.is_dir() else _read_file(path)
    except ConfigError:
        raise
    except (OSError, CheckpointError, SafetensorError, ValueError, MemoryError) as error:
        cause = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise _refusal(path, cause or "out of memory") from None


def _refusal(path: Path, cause: str) -> ConfigError:
    return ConfigError(
        f"`model.weights` must name weights that can be read, got {str(path)!r}: {cause}"
    )


def _read_folder(path: Path) -> dict[str, Tensor]:
    if (path / MANIFEST).exists():
        return evaluated_state(read_snapshot(path))
    if (path / CHECKPOINTS).is_dir():
        try:
            return evaluated_state(read_evaluated(path))
        except ConfigError as error:
            raise _refusal(path, str(error)) from None
    for name in _HF_FILES:
        if (path / name).exists():
            return _read_file(path / name)
        if (path / f"{name}.index.json").exists():
            return _read_parts(path / f"{name}.index.json")
    raise _refusal(
        path,
        f"no {' or '.join(_HF_FILES)} there, no {MANIFEST} of a checkpoint, and no {CHECKPOINTS} "
        "of a run. Name a file in it.",
    )


def _read_parts(index: Path) -> dict[str, Tensor]:
    """Read the files that an index of Hugging Face's lists."""
    try:
        parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _refusal(index, "it lists no files under weight_map") from None
    state: dict[str, Tensor] = {}
    for part in sorted(map(str, parts)):
        if Path(part).name != part:
            raise _refusal(index, f"{part!r} is no name of a file beside it")
        state |= _read_file(index.parent / part)
    return state


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if path.suffix not in _PICKLED:
        raise _refusal(path, f"it is none of .safetensors, {', '.join(_PICKLED)}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of any bytes: there is no list of what unpickling raises
        raise _refusal(
            path,
            f"it holds more than tensors and plain values ({type(error).__name__}), or is damaged. "
            "Save its state dict alone, as .safetensors, where you trust it.",
        ) from None
    return _state_dict(path, found)


def _state_dict(path: Path, found: Any) -> dict[str, Tensor]:
    """Find the state dict in what was unpickled."""
    if _is_state_dict(found):
        return found
    inner = {
        name: value
        for name, value in (found.items() if isinstance(found, Mapping) else ())
        if _is_state_dict(value)
    }
    name: Any = next((n for n in _STATE_DICTS if n in inner), None)
    if name is None and len(inner) == 1:
        (name,) = inner
    if name is None:
        cause = f"several state dicts: {', '.join(map(str, inner))}" if inner else "no state dict"
        raise _refusal(path, f"it has {cause}. Save the one that is meant in a file of its own.")
    _log.warning("weights of %s: those under %r", path, name)
    return inner[name]


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and any(isinstance(one, Tensor) for one in value.values())
        and all(isinstance(name, str) for name in value)
        and all(isinstance(one, Tensor) or "_extra_state" in n for n, one in value.items())
    )


def _without_prefix(state: dict[str, Tensor], names: Mapping[str, Any]) -> dict[str, Tensor]:
    """Leave out what stands before all names, such as Lightning's `model.`, and not in the model's."""
    first = next(iter(state), "")
    prefix = first[: first.find(".") + 1]
    is_own = any(name.startswith(prefix) for name in names)
    if not prefix or is_own or not all(name.startswith(prefix) for name in state):
        return state
    return _without_prefix({n.removeprefix(prefix): v for n, v in state.items()}, names)
