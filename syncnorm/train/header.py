"""The first lines of a run on the screen: workers, folder, model and data."""

from pathlib import Path

import torch

from syncnorm.train.data.feed import TRAIN, Feed
from syncnorm.train.setup import Setup


def describe_place(count: int, device: torch.device, folder: Path) -> str:
    """Describe where a run is computed, and its folder.

    Args:
        count: of workers.
        device: of one of them.
        folder: of the run.
    """
    kind = device.type
    if kind == "cuda":
        kind = f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{count} worker{'s' if count > 1 else ''} on {kind}: {folder}"


def describe_model(setup: Setup) -> str:
    """Describe the size of the model, and how many layers are ours."""
    count = sum(p.numel() for p in setup.model.parameters() if p.requires_grad)
    return (
        f"model: {setup.config.model.name}, {count} parameters trained, {len(setup.layers)} "
        "layers of syncnorm's"
    )


def describe_data(setup: Setup, feed: Feed) -> list[str]:
    """Describe the data and the length of an epoch; a line more where a step takes all of it."""
    size, batch = feed.sizes[TRAIN], setup.config.train.global_batch
    steps = -(-size // batch)
    lines = [f"data: {feed.describe()}, {steps} steps per epoch"]
    if batch > size:
        lines.append(
            f"train.global_batch is {batch}, and there are {size} samples to train on: an epoch is "
            "one step of them all"
        )
    return lines
