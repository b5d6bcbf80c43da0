"""One optimizer step and one evaluation, each over all workers together."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from syncnorm import scale_loss
from syncnorm.train.data import Split


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, shard: Split) -> Tensor:
    """Take the step of the global batch of which `shard` is this worker's part, perhaps an empty one.

    *Collectives*: scale_loss's count, the layers' statistics, DDP's gradients; every worker must call it.

    Returns:
        The scaled loss of the shard; its mean over the workers is the mean loss over the global batch.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = scale_loss(mean_loss(model(shard.images), shard.labels), len(shard))
    loss.backward()
    optimizer.step()
    return loss.detach()


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, averaged over samples; of no samples a zero that still reaches every parameter."""
    # Reduction "mean" would be 0/0 for an empty shard.
    return F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


@torch.no_grad()
def evaluate(model: nn.Module, shard: Split, chunk: int) -> float:
    """Return the accuracy on all workers' shards together, from exact counts.

    Args:
        model: the bare model: DDP's forward would exchange messages, and workers have unequally many chunks.
        shard: this worker's part of the test set, perhaps empty.
        chunk: samples per forward.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=shard.labels.device)
    for start in range(0, len(shard), chunk):
        part = shard[slice(start, start + chunk)]
        counts[0] += (model(part.images).argmax(1) == part.labels).sum()
        counts[1] += len(part)
    model.train(was_training)
    dist.all_reduce(counts)
    correct, total = counts.tolist()
    return correct / total


def learning_rate_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Rise in a line to 1 over the warm-up, then fall to 0 along half a cosine.

    Args:
        step: 0 for the first step.
        warmup_steps: steps of the rise; the first of them already has factor 1/warmup_steps.
        total_steps: steps of the whole training.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return (1 + math.cos(math.pi * progress)) / 2
