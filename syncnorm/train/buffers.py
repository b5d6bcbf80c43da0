"""Buffers of a model's own that training may change: a center, a codebook, a queue.

All workers go on with the first worker's, as under plain DistributedDataParallel. That sends them
before each forward; here they are sent after each step, so that evaluations, averages and
checkpoints see the same ones, too.

Not among them are the statistics of batch norms and of `syncnorm.family`, which are pooled or each
worker's own, and buffers that the model has told DistributedDataParallel to ignore, which are each
worker's own.

`gather_digests` shows at the end of a run on which workers all buffers are the same.
"""

import hashlib
import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm import undocumented
from syncnorm.device import model_device
from syncnorm.family.layer import Pooling
from syncnorm.module import SyncNorm
from syncnorm.train.waiting import from_all

# By a buffer's name in the model, the module that has it and its name there. The slot stays when
# the model puts another tensor into it.
Slots = dict[str, tuple[nn.Module, str]]
_NORMS = (_BatchNorm, Pooling)


def shared_slots(model: nn.Module) -> Slots:
    """The buffers that are the same on all workers because the first worker's are sent."""
    ignored = _ignored_by_ddp(model)
    return {
        name: slot
        for name, slot in _all_slots(model).items()
        if not isinstance(slot[0], _NORMS) and name not in ignored
    }


def local_slots(model: nn.Module) -> Slots:
    """The buffers that are each worker's own."""
    ignored = _ignored_by_ddp(model)
    return {
        name: (module, key)
        for name, (module, key) in _all_slots(model).items()
        if (not _is_common(module) if isinstance(module, _NORMS) else name in ignored)
    }


def values(slots: Slots) -> dict[str, Tensor]:
    """The tensors that are in the slots now."""
    found = {name: getattr(module, key) for name, (module, key) in slots.items()}
    return {name: value for name, value in found.items() if value is not None}


def unsaved(model: nn.Module) -> dict[str, Tensor]:
    """The shared buffers that the model's state dict leaves out."""
    return values(
        {
            name: (module, key)
            for name, (module, key) in shared_slots(model).items()
            if key in module._non_persistent_buffers_set
        }
    )


def load(model: nn.Module, state: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Load a state dict, in which buffers may have grown, and the `unsaved` buffers with it."""
    slots = shared_slots(model)
    _reshape(slots, {name: state[name] for name in slots if name in state}, model_device(model))
    model.load_state_dict(state)
    copy_into(model, slots, others)


@torch.no_grad()
def copy_into(model: nn.Module, slots: Slots, new: Mapping[str, Tensor]) -> None:
    """Copy values into buffers of the model; KeyError for one that is not among the slots."""
    _reshape(slots, new, model_device(model))
    for name, value in new.items():
        module, key = slots[name]
        getattr(module, key).copy_(value)


class SharedBuffers:
    """The buffers that the workers share.

    Args:
        model: the model that has them; alike on all workers.
        average: its moving average, if there is one.
    """

    slots: Slots

    def __init__(self, model: nn.Module, average: nn.Module | None = None) -> None:
        self.slots = shared_slots(model)
        self._device = model_device(model)
        self._average = average
        self._average_slots = {} if average is None else shared_slots(average)

    def __bool__(self) -> bool:
        return bool(self.slots)

    def layout_checksum(self) -> int:
        """A number below 2**32 that differs where types or shapes differ."""
        return zlib.crc32(repr(_layouts(values(self.slots))).encode())

    @torch.no_grad()
    def broadcast(self, *, are_alike: bool) -> None:
        """Replace this worker's buffers by the first worker's.

        *Collectives*: one broadcast of all bytes, and one of types and shapes before it unless
            `are_alike`; every worker must call.

        Args:
            are_alike: True if types and shapes are known to be the same on all workers; the same
                value on all workers.
        """
        if not self.slots:
            return
        is_first = dist.get_rank() == 0
        if not are_alike:
            layouts = [_layouts(values(self.slots))]
            dist.broadcast_object_list(layouts, src=0)
            if not is_first:
                self._set_layouts(layouts[0])
        mine = list(values(self.slots).values())
        if not any(tensor.numel() for tensor in mine):
            return
        # As bytes: one message for all types, also those that gloo does not know.
        pieces = [
            tensor.contiguous().reshape(-1).view(torch.uint8).to(self._device) for tensor in mine
        ]
        payload = torch.cat(pieces)
        dist.broadcast(payload, src=0)
        if not is_first:
            for tensor, piece in zip(
                mine, payload.split([len(piece) for piece in pieces]), strict=True
            ):
                # A copy, as its bytes may begin where a number of this type cannot.
                tensor.copy_(piece.clone().view(tensor.dtype).reshape(tensor.shape))

    def _set_layouts(self, layouts: Mapping[str, Any]) -> None:
        like = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (dtype, shape) in layouts.items()
        }
        _reshape(self.slots, like, self._device)
        for name in values(self.slots).keys() - layouts.keys():
            module, key = self.slots[name]
            setattr(module, key, None)

    def resize_average(self) -> None:
        """Let the average's buffers start from the model's again, where shape or type differ."""
        if self._average is not None:
            mine, before = values(self.slots), _layouts(values(self._average_slots))
            changed = {
                name: mine[name]
                for name, layout in _layouts(mine).items()
                if before.get(name) != layout
            }
            copy_into(self._average, self._average_slots, changed)
            # Buffers are averaged in pairs, by their places among those that are there.
            for name in before.keys() - mine.keys():
                module, key = self._average_slots[name]
                setattr(module, key, None)

    def copy_exact_to_average(self) -> None:
        """Copy the model's counts, positions and marks, which have no mean, to the average."""
        if self._average is not None:
            exact = {
                name: value
                for name, value in values(self.slots).items()
                if not value.is_floating_point()
            }
            copy_into(self._average, self._average_slots, exact)


def running_digest(model: nn.Module) -> str:
    """Compute the SHA-256 of all buffers: their names, types, shapes and bits."""
    digest = hashlib.sha256()
    # Making a state dict brings statistics that are under way up to date. It lacks the buffers that
    # a model leaves out.
    model.state_dict()
    for name, buffer in sorted(model.named_buffers(), key=lambda named: named[0]):
        digest.update(f"{name} {buffer.dtype} {tuple(buffer.shape)}\n".encode())
        # By its bytes: numpy does not know all types, such as what autocast leaves.
        whole = buffer.detach().cpu().contiguous().reshape(-1)
        digest.update(whole.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def gather_digests(model: nn.Module) -> list[str]:
    """Gather every worker's `running_digest`, in rank order. All workers must call it."""
    return from_all(running_digest(model))


def _all_slots(model: nn.Module) -> Slots:
    return {
        f"{name}.{key}".lstrip("."): (module, key)
        for name, module in model.named_modules()
        for key in module._buffers
    }


def _ignored_by_ddp(model: nn.Module) -> set[str]:
    # torch.compile's wrapper has other names, which are there, too.
    return {name.removeprefix("_orig_mod.") for name in undocumented.ignored_by_ddp(model)}


def _is_common(layer: nn.Module) -> bool:
    """True if the statistics of a layer are the same on all workers."""
    if isinstance(layer, Pooling):
        return layer.has_common_statistics
    return isinstance(layer, SyncNorm) and layer.is_pooled


def _layouts(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _reshape(slots: Slots, like: Mapping[str, Tensor], device: torch.device) -> None:
    """Put an empty tensor into each slot whose tensor has another type or shape than wanted."""
    for name, wanted in like.items():
        module, key = slots[name]
        present: Tensor | None = getattr(module, key)
        if present is None or present.shape != wanted.shape or present.dtype != wanted.dtype:
            setattr(module, key, torch.empty_like(wanted, device=device))
