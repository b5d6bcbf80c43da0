"""Fingerprints of the running statistics, to show on which workers they are the same."""

import hashlib

import torch.distributed as dist
from torch import nn


def running_digest(model: nn.Module) -> str:
    """Return the SHA-256 of all buffers: their names, types, shapes and bits."""
    digest = hashlib.sha256()
    # Making a state dict brings statistics that are under way up to date. It lacks the buffers that
    # a model leaves out.
    model.state_dict()
    for name, buffer in sorted(model.named_buffers(), key=lambda named: named[0]):
        digest.update(f"{name} {buffer.dtype} {tuple(buffer.shape)}\n".encode())
        digest.update(buffer.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def gather_digests(model: nn.Module) -> list[str]:
    """Return every worker's `running_digest`, in rank order. All workers must call it."""
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, running_digest(model))
    return digests
