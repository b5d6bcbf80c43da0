"""Optimizers and schedules of the learning rate, by torch's names."""

import inspect
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, create_model
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, SequentialLR

from syncnorm.train.compiler import without_compiler
from syncnorm.train.config.nearest import nearest


def _optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    # LBFGS wants the loss anew several times a step, SparseAdam sparse gradients.
    return {
        name: without_compiler(member)
        for name, member in vars(torch.optim).items()
        if inspect.isclass(member)
        and issubclass(member, torch.optim.Optimizer)
        and member not in (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
    }


def _schedulers() -> dict[str, type[LRScheduler]]:
    # These want functions, other schedulers or a metric, which a configuration does not hold.
    unfit = {
        "LRScheduler",
        "LambdaLR",
        "MultiplicativeLR",
        "SequentialLR",
        "ChainedScheduler",
        "ReduceLROnPlateau",
    }
    return {
        name: member
        for name, member in vars(lr_scheduler).items()
        if inspect.isclass(member)
        and issubclass(member, LRScheduler)
        and name not in unfit
        and name[0] != "_"
    }


OPTIMIZERS = _optimizers()
SCHEDULERS = _schedulers()


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


# From the share of the steps after the warm-up that are done to the factor of the learning rate.
FACTORS: dict[str, Callable[[float], float]] = {
    "cosine": _cosine,
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def check_optimizer_name(name: str) -> str:
    """Return `name`; ValueError if no optimizer has it."""
    return _check_name(name, OPTIMIZERS)


def check_schedule_name(name: str) -> str:
    """Return `name`; ValueError if no schedule has it."""
    return _check_name(name, {**FACTORS, **SCHEDULERS})


def check_optimizer(name: str, options: Mapping[str, Any]) -> None:
    """ValueError unless the optimizer takes these arguments; pydantic's, which names the argument,
    if it can be.
    """
    arguments(name).model_validate(_tuples(options))
    _attempt(name, options, lambda: _trial_optimizer(name, options))


def check_schedule(name: str, options: Mapping[str, Any]) -> None:
    """ValueError unless the schedule takes these arguments; pydantic's, which names the argument,
    if it can be.
    """
    arguments(name).model_validate(_tuples(options))
    if name in SCHEDULERS:
        trial = _trial_optimizer("SGD", {"momentum": 0.9})
        _attempt(name, options, lambda: _step_once(trial, SCHEDULERS[name](trial, **options)))


def check_together(
    optimizer: str, optimizer_options: Mapping[str, Any], name: str, options: Mapping[str, Any]
) -> None:
    """ValueError unless the schedule `name` can be made for this optimizer; both are right by
    themselves.
    """
    if name not in SCHEDULERS:
        return
    try:
        SCHEDULERS[name](_trial_optimizer(optimizer, optimizer_options), **options)
    except Exception as error:  # such as momentum to be changed where there is none
        raise ValueError(f"schedule {name} must fit optimizer {optimizer}: {error}") from None


@cache
def arguments(name: str) -> type[BaseModel]:
    """The arguments of an optimizer or a schedule, but for those that the trainer gives.

    Args:
        name: one of OPTIMIZERS, FACTORS or SCHEDULERS.
    """
    target = OPTIMIZERS.get(name) or SCHEDULERS.get(name)
    fields: dict[str, Any] = {}
    if target is not None:
        hints = _hints(target)
        for parameter in inspect.signature(target).parameters.values():
            if parameter.name not in ("params", "lr", "optimizer", "last_epoch"):
                required = parameter.default is inspect.Parameter.empty
                default = ... if required else parameter.default
                fields[parameter.name] = (_without_tensors(hints.get(parameter.name, Any)), default)
    strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return create_model(name, __config__=strict, **fields)


def _hints(target: type) -> dict[str, Any]:
    try:
        # Names that torch imports for type checkers alone.
        return get_type_hints(target.__init__, localns={"Callable": Callable, "Iterable": Iterable})
    except NameError:  # a name that came with another release: any value will do
        return {}


def _without_tensors(hint: Any) -> Any:
    """What a configuration can hold of the type `hint`."""
    origin, parts = get_origin(hint), get_args(hint)
    if not parts or origin is Literal:
        return hint
    kept = [_without_tensors(part) for part in parts if part is not torch.Tensor]
    if origin is tuple:
        return tuple[*kept]
    if origin in (list, Iterable):
        return tuple[kept[0], ...]
    if origin is Callable:
        return hint
    some = [part for part in kept if part is not NoneType]
    if len(some) > 1:  # the class itself finds out
        return Any
    return some[0] | None if NoneType in kept else some[0]


def make_optimizer(
    name: str, model: torch.nn.Module, lr: float, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Build the optimizer over the parameters of `model` that are trained."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return OPTIMIZERS[name](parameters, lr=lr, **_tuples(options))  # pyright: ignore[reportCallIssue]


def make_schedule(
    name: str,
    optimizer: torch.optim.Optimizer,
    warmup: float,
    total_steps: int,
    options: Mapping[str, Any],
) -> LRScheduler:
    """Build the schedule: a rise in a line over the share `warmup` of all steps, then what `name`
    says.

    Args:
        name: one of FACTORS or SCHEDULERS.
        optimizer: whose learning rate it sets; its `lr` is the highest.
        warmup: share of `total_steps`, in [0, 1).
        total_steps: steps of the whole run.
        options: arguments of a class of torch's, which counts its steps from the end of the
            warm-up.
    """
    warmup_steps = round(warmup * total_steps)
    if name in FACTORS:
        return LambdaLR(
            optimizer,
            partial(factor, name=name, warmup_steps=warmup_steps, total_steps=total_steps),
        )
    rise = LambdaLR(
        optimizer,
        partial(factor, name="constant", warmup_steps=warmup_steps, total_steps=total_steps),
    )
    if warmup_steps == 0:
        return SCHEDULERS[name](optimizer, **options)
    return SequentialLR(
        optimizer, [rise, SCHEDULERS[name](optimizer, **options)], milestones=[warmup_steps]
    )


def factor(step: int, name: str, warmup_steps: int, total_steps: int) -> float:
    """The learning rate at a step, as a share of the highest.

    Args:
        step: 0 for the first step.
        name: one of FACTORS.
        warmup_steps: steps of the rise; the first of them already has factor 1/warmup_steps.
        total_steps: steps of the whole run.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return FACTORS[name]((step - warmup_steps) / max(total_steps - warmup_steps, 1))


def _check_name(name: str, known: Mapping[str, Any]) -> str:
    if name not in known:
        raise ValueError(
            f"must be one of {', '.join(known)}, got {reprlib.repr(name)}. "
            f"The nearest is {nearest(name, list(known))!r}."
        )
    return name


def _attempt(name: str, options: Mapping[str, Any], make: Callable[[], object]) -> None:
    try:
        make()
    except Exception as error:  # whatever the class finds wrong with its arguments
        raise ValueError(f"{name} refuses {reprlib.repr(dict(options))}: {error}") from None


def _trial_optimizer(name: str, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    # Two-dimensional, as Muon asks for matrices.
    return OPTIMIZERS[name]([torch.zeros(1, 1, requires_grad=True)], lr=0.1, **_tuples(options))  # pyright: ignore[reportCallIssue]


def _step_once(optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> None:
    # A length of 0 divides by it only now. torch warns if the schedule steps before its optimizer.
    optimizer.step()
    schedule.step()


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """YAML has lists where optimizers take tuples (betas)."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
