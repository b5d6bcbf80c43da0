"""The parameters that are trained, and in groups: which decay, and at which share of the rate."""

import inspect
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from syncnorm.errors import ConfigError
from syncnorm.model.norm_parameters import norm_parameters
from syncnorm.train.config.section import check_finds
from syncnorm.train.config.train import TrainSection
from syncnorm.train.optim import OPTIMIZERS


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze, in place, the modules and the parameters whose names the expressions find.

    A module is frozen whole: its parameters are not trained, and all within it is in evaluation
    mode, so that running statistics stay.

    Raises:
        ConfigError: an expression finds nothing, or nothing is left to train.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    parameters = dict(model.named_parameters())
    check_finds("train.freeze", patterns, [*modules, *parameters], "a module or a parameter")
    for pattern in patterns:
        for name, module in modules.items():
            if re.search(pattern, name):
                module.requires_grad_(False).eval()
        for name, parameter in parameters.items():
            if re.search(pattern, name):
                parameter.requires_grad_(False)
    if patterns and not any(p.requires_grad for p in parameters.values()):
        raise ConfigError(
            f"`train.freeze` must leave a parameter to train, got {list(patterns)}, which find all "
            f"{len(parameters)} parameters"
        )


def parameter_groups(model: nn.Module, train: TrainSection) -> list[dict[str, Any]]:
    """Group the parameters that are trained by their weight decay and their share of the rate.

    The groups are in the order of their first parameters, so alike on all workers. A group of
    parameters that do not decay has `weight_decay`, one with a rate of its own has `rate`.

    Raises:
        ConfigError: an expression of `train.rates` finds no parameter that is trained.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_finds("train.rates", train.rates, trained, "a parameter that is trained")
    undecayed = _undecayed(model) if train.decay == "weights" and _has_decay(train) else set()
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in trained.items():
        rate = next((f for pattern, f in train.rates.items() if re.search(pattern, name)), 1.0)
        key = (rate, parameter in undecayed)
        if key not in groups:
            own_rate = {} if rate == 1.0 else {"rate": rate}
            own_decay = {"weight_decay": 0.0} if parameter in undecayed else {}
            groups[key] = {"params": [], **own_rate, **own_decay}
        groups[key]["params"].append(parameter)
    return list(groups.values())


def _undecayed(model: nn.Module) -> set[nn.Parameter]:
    """Find biases, parameters of normalisation layers, and others of one dimension."""
    return {*norm_parameters(model).values()} | {
        p for name, p in model.named_parameters() if p.ndim < 2 or name.split(".")[-1] == "bias"
    }


def _has_decay(train: TrainSection) -> bool:
    parameters = inspect.signature(OPTIMIZERS[train.optimizer.name]).parameters
    if "weight_decay" not in parameters:
        return False
    return bool(train.optimizer.options.get("weight_decay", parameters["weight_decay"].default))
