"""Buffers of a model's own that training may change: a center, a codebook, a queue.

All workers go on with the first worker's, as under plain DistributedDataParallel. That sends them
before each forward; here they are sent after each step, so that evaluations, averages and
checkpoints see the same ones, too.

Not among them are the statistics of batch norms, which are pooled or each worker's own, and buffers
that the model has told DistributedDataParallel to leave, which are each worker's own.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm.module import SyncNorm

# The module that has a buffer and its name there, by its name in the model. A model may put another
# tensor there.
Places = dict[str, tuple[nn.Module, str]]


def shared_places(model: nn.Module) -> Places:
    """The buffers that are the same on all workers because the first worker's are sent."""
    left = _left_by_ddp(model)
    places = _places(model)
    return {
        name: place
        for name, place in places.items()
        if not isinstance(place[0], _BatchNorm) and name not in left
    }


def local_places(model: nn.Module) -> Places:
    """The buffers that are each worker's own."""
    left = _left_by_ddp(model)
    return {
        name: (module, key)
        for name, (module, key) in _places(model).items()
        if (not _is_pooled(module) if isinstance(module, _BatchNorm) else name in left)
    }


def values(places: Places) -> dict[str, Tensor]:
    """The buffers that are there now."""
    found = {name: getattr(module, key) for name, (module, key) in places.items()}
    return {name: value for name, value in found.items() if value is not None}


def unsaved(model: nn.Module) -> dict[str, Tensor]:
    """The shared buffers that the model's state dict leaves out."""
    places = shared_places(model)
    return values(
        {
            n: (module, key)
            for n, (module, key) in places.items()
            if key in module._non_persistent_buffers_set
        }
    )


def load(model: nn.Module, state: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Load a state dict, in which buffers may have grown, and what `unsaved` gave with it."""
    places = shared_places(model)
    _reshape(places, {name: state[name] for name in places if name in state}, _device(model))
    model.load_state_dict(state)
    put(model, places, others)


@torch.no_grad()
def put(model: nn.Module, places: Places, new: Mapping[str, Tensor]) -> None:
    """Copy values into buffers of the model; KeyError for one that is not among the places."""
    _reshape(places, new, _device(model))
    for name, value in new.items():
        module, key = places[name]
        getattr(module, key).copy_(value)


class SharedBuffers:
    """The buffers that the workers share.

    Args:
        model: whose buffers they are; alike on all workers.
        average: its moving average, if there is one.
    """

    def __init__(self, model: nn.Module, average: nn.Module | None = None) -> None:
        self.places = shared_places(model)
        self._device = _device(model)
        self._average = average
        self._averaged = {} if average is None else shared_places(average)

    def __bool__(self) -> bool:
        return bool(self.places)

    def form(self) -> int:
        """A number that differs where types or shapes do."""
        return zlib.crc32(repr(_forms(values(self.places))).encode())

    @torch.no_grad()
    def share(self, *, are_alike: bool) -> None:
        """Take over the first worker's.

        *Collectives*: one broadcast of all bytes, and one of types and shapes before it; every
            worker must call.

        Args:
            are_alike: whether types and shapes are known to be the same on all workers; as all
                workers say.
        """
        if not self.places:
            return
        is_first = dist.get_rank() == 0
        if not are_alike:
            forms = [_forms(values(self.places))]
            dist.broadcast_object_list(forms, src=0)
            if not is_first:
                self._take_form(forms[0])
        mine = list(values(self.places).values())
        if not any(tensor.numel() for tensor in mine):
            return
        # As bytes: one message for all types, also those that gloo does not know.
        parts = [
            tensor.contiguous().reshape(-1).view(torch.uint8).to(self._device) for tensor in mine
        ]
        message = torch.cat(parts)
        dist.broadcast(message, src=0)
        if not is_first:
            for tensor, part in zip(
                mine, message.split([len(part) for part in parts]), strict=True
            ):
                # A copy, as its bytes may begin where a number of this type cannot.
                tensor.copy_(part.clone().view(tensor.dtype).reshape(tensor.shape))

    def _take_form(self, forms: Mapping[str, Any]) -> None:
        like = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (dtype, shape) in forms.items()
        }
        _reshape(self.places, like, self._device)
        for name in values(self.places).keys() - forms.keys():
            module, key = self.places[name]
            setattr(module, key, None)

    def before_average(self) -> None:
        """Let buffers of the average start again from the model's, where shape or type differ."""
        if self._average is not None:
            mine, before = values(self.places), _forms(values(self._averaged))
            changed = [name for name, form in _forms(mine).items() if before.get(name) != form]
            put(self._average, self._averaged, {name: mine[name] for name in changed})

    def after_average(self) -> None:
        """Give the average the model's counts, positions and marks, which have no mean."""
        if self._average is not None:
            exact = {
                name: value
                for name, value in values(self.places).items()
                if not value.is_floating_point()
            }
            put(self._average, self._averaged, exact)


def _places(model: nn.Module) -> Places:
    return {
        f"{name}.{key}".lstrip("."): (module, key)
        for name, module in model.named_modules()
        for key in module._buffers
    }


def _left_by_ddp(model: nn.Module) -> set[str]:
    # The attribute that DistributedDataParallel reads, with the names that torch.compile's wrapper
    # gives.
    return {
        name.removeprefix("_orig_mod.")
        for name in getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    }


def _is_pooled(layer: nn.Module) -> bool:
    return isinstance(layer, SyncNorm) and layer.sync != "none"


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _reshape(places: Places, like: Mapping[str, Tensor], device: torch.device) -> None:
    """Make room for tensors of other shapes, where there are any."""
    for name, wanted in like.items():
        module, key = places[name]
        there: Tensor | None = getattr(module, key)
        if there is None or there.shape != wanted.shape or there.dtype != wanted.dtype:
            setattr(module, key, torch.empty_like(wanted, device=device))
