"""What a configuration describes, built: the data, the model and what changes it."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from syncnorm import prepare_ddp
from syncnorm.train.config import Config
from syncnorm.train.data import DATASETS, Dataset
from syncnorm.train.models import MODELS
from syncnorm.train.norm import make_norm_layer
from syncnorm.train.step import learning_rate_factor


@dataclass(frozen=True)
class Learner:
    """The model and what changes it."""

    model: nn.Module
    ddp: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR


def load_data(config: Config, device: torch.device) -> Dataset:
    """Load the whole data set onto this worker's device."""
    data = DATASETS[config.data.name]()
    dtype = getattr(torch, config.train.dtype)
    return replace(data, train=data.train.to(device, dtype), test=data.test.to(device, dtype))


def make_model(config: Config, data: Dataset, total_steps: int) -> nn.Module:
    """Build the model for data of this shape, ready for DDP."""
    torch.manual_seed(config.train.seed)
    images = data.train.images
    model = MODELS[config.model.name](
        in_channels=images.shape[1],
        num_classes=data.num_classes,
        norm_layer=make_norm_layer(config.norm, total_steps),
    )
    # Drawn in float32 whatever the dtype, so that a float64 run starts from the same weights.
    return prepare_ddp(model.to(images.device, images.dtype))


def make_learner(config: Config, data: Dataset, steps_per_epoch: int) -> Learner:
    """Build model, optimizer and schedule; alike on all workers, as all draw from the same seed."""
    total_steps = config.train.epochs * steps_per_epoch
    model = make_model(config, data, total_steps)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.train.lr,
        momentum=config.train.momentum,
        weight_decay=config.train.weight_decay,
    )
    factor = partial(
        learning_rate_factor,
        warmup_steps=round(config.train.warmup * total_steps),
        total_steps=total_steps,
    )
    return Learner(model, DistributedDataParallel(model), optimizer, LambdaLR(optimizer, factor))
