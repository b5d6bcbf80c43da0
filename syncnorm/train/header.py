"""The first lines of a run on the screen: workers, model, data and folder."""

from pathlib import Path

import torch

from syncnorm.train.config.schema import Config
from syncnorm.train.data.feed import TRAIN, Feed
from syncnorm.train.setup import Setup


def describe_workers(count: int, device: torch.device) -> str:
    """Describe where a run is computed.

    Args:
        count: of workers.
        device: of one of them.
    """
    kind = device.type
    if kind == "cuda":
        kind = f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{count} worker{'s' if count > 1 else ''} on {kind}"


def describe_model(setup: Setup) -> str:
    """Describe the size of the model, and how many layers are ours."""
    count = sum(p.numel() for p in setup.model.parameters() if p.requires_grad)
    return (
        f"model: {setup.config.model.name}, {count} parameters trained, {len(setup.layers)} "
        f"layer{'' if len(setup.layers) == 1 else 's'} of syncnorm's"
    )


def describe_data(setup: Setup, feed: Feed) -> str:
    """Describe the data, the length of an epoch, and an order that is not just any."""
    steps = -(-feed.sizes[TRAIN] // setup.config.train.global_batch)
    regime, classes = setup.config.data.regime, feed.signature.num_classes
    order = "" if regime == "iid" else f", regime {regime}"
    has_classes = setup.config.task.name in ("classify", "segment") and (classes or 0) > 1
    count = f" of {classes} classes" if has_classes else ""
    return (
        f"data: {feed.describe()}{count}, {steps} step{'s' if steps > 1 else ''} per epoch{order}"
    )


def shown_path(folder: Path, config: Config) -> Path:
    """Write a run's folder from the working folder, as `run_dir` was given."""
    if Path(config.run_dir).is_absolute():
        return folder
    try:
        return folder.relative_to(Path.cwd())
    except (OSError, ValueError):  # the working folder is another one now, or gone
        return folder


def header(setup: Setup, feed: Feed, folder: Path) -> list[str]:
    """Write the lines about a run that is about to train."""
    return [
        describe_model(setup),
        describe_data(setup, feed),
        f"folder: {shown_path(folder, setup.config)}",
    ]
