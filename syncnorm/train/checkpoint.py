"""The final checkpoint: plain tensors and values, loaded without running code."""

from pathlib import Path

import torch
from torch import nn

from syncnorm.train.config import Config
from syncnorm.train.files import write_whole


def save_checkpoint(
    path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, config: Config
) -> None:
    """Write `model`, `optimizer`, `step` and `config` for `torch.load(path, weights_only=True)`.

    Args:
        path: the file, replaced as a whole or not at all.
        model: the bare model, not its DDP wrapper, so that the keys are those of the network.
        optimizer: its state.
        step: optimizer steps done.
        config: stored as a plain dictionary.
    """
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "config": config.model_dump(),
    }
    write_whole(path, lambda file: torch.save(content, file))
