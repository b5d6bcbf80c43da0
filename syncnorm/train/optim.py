"""Optimizers and schedules of the learning rate, by torch's names."""

import inspect
import math
import reprlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, create_model
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, SequentialLR

from syncnorm.errors import ConfigError, in_one_line
from syncnorm.train.config.section import name_hint

# Steps after a warm-up that are tried before a run begins.
_TRIED = 3


def _optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    # LBFGS evaluates the loss several times a step, SparseAdam needs sparse gradients.
    return {
        name: member
        for name, member in vars(torch.optim).items()
        if inspect.isclass(member)
        and issubclass(member, torch.optim.Optimizer)
        and member not in (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
    }


def _schedulers() -> dict[str, type[LRScheduler]]:
    # These need functions, other schedulers or a metric, which a configuration does not hold.
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
# These compute the same bits where an operator takes all parameters at once, which on the CPU torch
# leaves to the caller. Of small ones that saves most of the time.
_SAME_TOGETHER = frozenset(
    ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "RMSprop", "Rprop", "SGD")
)


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


# Factor of the learning rate, as a function of the share of steps done after the warm-up.
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
    """Raise ValueError unless the optimizer accepts these arguments.

    It is pydantic's ValidationError, which names the argument, where the type is wrong.
    """
    arguments(name).model_validate(_tuples(options))
    _attempt(name, options, lambda: _trial_optimizer(name, options))


def check_schedule(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError unless the schedule accepts these arguments, as `check_optimizer` does."""
    arguments(name).model_validate(_tuples(options))
    if name in SCHEDULERS:
        trial = _trial_optimizer("SGD", {"momentum": 0.9})
        _attempt(name, options, lambda: _try_out(SCHEDULERS[name](trial, **options), 1))


def check_together(
    optimizer: str, optimizer_options: Mapping[str, Any], name: str, options: Mapping[str, Any]
) -> None:
    """Raise ValueError unless the schedule `name` fits the optimizer; each is right by itself."""
    if name not in SCHEDULERS:
        return
    try:
        SCHEDULERS[name](_trial_optimizer(optimizer, optimizer_options), **options)
    except Exception as error:  # such as a schedule of momentum where there is none
        raise ValueError(f"schedule {name} must fit optimizer {optimizer}: {error}") from None


@cache
def arguments(name: str) -> type[BaseModel]:
    """Model the arguments of an optimizer or a schedule, without those that the trainer gives.

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
        # Given here: names that torch imports for type checkers alone.
        return get_type_hints(target.__init__, localns={"Callable": Callable, "Iterable": Iterable})
    except NameError:  # a name that came with another release: any value will do
        return {}


def _without_tensors(hint: Any) -> Any:
    """Reduce a type hint to what a configuration can hold: float | Tensor becomes float."""
    generic, arguments = get_origin(hint), get_args(hint)
    if not arguments or generic is Literal:
        return hint
    kept = [_without_tensors(argument) for argument in arguments if argument is not torch.Tensor]
    if generic is tuple:
        return tuple[*kept]
    if generic in (list, Iterable):
        return tuple[kept[0], ...]
    if generic is Callable:
        return hint
    some = [argument for argument in kept if argument is not NoneType]
    if len(some) > 1:  # left to the class itself
        return Any
    return some[0] | None if NoneType in kept else some[0]


def make_optimizer(
    name: str,
    parameters: Iterable[torch.Tensor] | list[dict[str, Any]],
    lr: float,
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """Build the optimizer over parameter groups, or those of the parameters that are trained.

    A group steps at the optimizer's learning rate times its `rate`, if it has one.

    Raises:
        ConfigError: the optimizer does not take such parameters, as Muon does matrices alone.
    """
    trained = [each for each in parameters if isinstance(each, dict) or each.requires_grad]
    together = (
        {"foreach": True}
        if name in _SAME_TOGETHER and not {"foreach", "fused"} & options.keys()
        else {}
    )
    try:
        optimizer = OPTIMIZERS[name](trained, lr=lr, **together, **_tuples(options))  # pyright: ignore[reportCallIssue]
    except Exception as error:
        raise ConfigError(
            f"`train.optimizer` must take the model's parameters, got {name}: {in_one_line(error)}"
        ) from None
    _apply_rates(optimizer)
    return optimizer


def _apply_rates(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer take each step at the scheduled rate times the `rate` of the group.

    Outside of a step all groups have the scheduled rate, so it is what schedules work on, some of
    which set it whatever it was before, and what is recorded.
    """
    scheduled: list[Any] = []

    def scale(optimizer: torch.optim.Optimizer, *_: object) -> None:
        scheduled[:] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group.get("rate", 1.0)

    def restore(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group, lr in zip(optimizer.param_groups, scheduled, strict=True):
            group["lr"] = lr

    if any("rate" in group for group in optimizer.param_groups):
        optimizer.register_step_pre_hook(scale)
        optimizer.register_step_post_hook(restore)


def make_schedule(
    name: str,
    optimizer: torch.optim.Optimizer,
    warmup: float,
    total_steps: int,
    options: Mapping[str, Any],
) -> LRScheduler:
    """Build the schedule: a linear warm-up, then the schedule `name`.

    Args:
        name: one of FACTORS or SCHEDULERS.
        optimizer: the schedule sets its learning rate; its `lr` is the highest.
        warmup: share of `total_steps`, in [0, 1).
        total_steps: steps of the whole run.
        options: arguments of a class of torch's, whose steps count from the end of the warm-up.

    Raises:
        ConfigError: the class ends before the run does, or breaks in its first steps.
    """
    warmup_steps = round(warmup * total_steps)
    if name in SCHEDULERS:
        trial = _trial_optimizer("SGD", {"momentum": 0.9})
        try:
            with warnings.catch_warnings(action="ignore"):
                # Of a warm-up, which is our own, one step will do.
                schedule = _sequence(name, trial, min(warmup_steps, 1), total_steps, options)
                _try_out(schedule, total_steps - warmup_steps)
        except Exception as error:  # a class may raise anything
            raise ConfigError(
                f"`train.schedule` must last for {total_steps} steps, {warmup_steps} of them "
                f"warm-up, got {name} with {reprlib.repr(dict(options))}: {in_one_line(error)}"
            ) from None
    return _sequence(name, optimizer, warmup_steps, total_steps, options)


def _try_out(schedule: LRScheduler, steps: int) -> None:
    """Step as a run does in the beginning; `steps` follow the warm-up."""
    last = schedule._schedulers[1] if isinstance(schedule, SequentialLR) else schedule
    if isinstance(last, OneCycleLR) and last.total_steps < steps:
        raise ValueError(f"it has {last.total_steps} steps")
    # A length of 0 is divided by only now. torch warns if a schedule steps before its optimizer.
    schedule.optimizer.step()
    for _ in range(min(steps, _TRIED) + isinstance(schedule, SequentialLR)):
        schedule.step()


def _sequence(
    name: str,
    optimizer: torch.optim.Optimizer,
    warmup_steps: int,
    total_steps: int,
    options: Mapping[str, Any],
) -> LRScheduler:
    if name in FACTORS:
        return LambdaLR(
            optimizer,
            partial(factor, name=name, warmup_steps=warmup_steps, total_steps=total_steps),
        )
    # Before there is another schedule, which would leave its marks on the optimizer.
    if warmup_steps == 0:
        return SCHEDULERS[name](optimizer, **options)
    warm_up = LambdaLR(
        optimizer,
        partial(factor, name="constant", warmup_steps=warmup_steps, total_steps=total_steps),
    )
    return SequentialLR(
        optimizer, [warm_up, SCHEDULERS[name](optimizer, **options)], milestones=[warmup_steps]
    )


def follow_length(schedule: LRScheduler) -> bool:
    """Set the rate of the step to come as the schedule's own length has it, after a restoration.

    Returns:
        False if the schedule does not depend on the run's length as our own do: one of torch's with
        a length of its own, or before the end of a warm-up.
    """
    if isinstance(schedule, LambdaLR):
        step = schedule.last_epoch
        factors = [factor(step) for factor in schedule.lr_lambdas]
        rates = [base * f for base, f in zip(schedule.base_lrs, factors, strict=True)]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates
        return True
    if isinstance(schedule, SequentialLR):
        is_warm = schedule.last_epoch >= schedule._milestones[0]
        return is_warm and follow_length(schedule._schedulers[1])
    return not isinstance(schedule, OneCycleLR)


def factor(step: int, name: str, warmup_steps: int, total_steps: int) -> float:
    """The learning rate at a step, as a share of the highest.

    Args:
        step: 0 for the first step.
        name: one of FACTORS.
        warmup_steps: steps of the warm-up; the first of them already has factor 1/warmup_steps.
        total_steps: steps of the whole run.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return FACTORS[name]((step - warmup_steps) / max(total_steps - warmup_steps, 1))


def _check_name(name: str, known: Mapping[str, Any]) -> str:
    if name not in known:
        raise ValueError(
            f"must be one of {', '.join(known)}, got {reprlib.repr(name)}.{name_hint(name, known)}"
        )
    return name


def _attempt(name: str, options: Mapping[str, Any], make: Callable[[], object]) -> None:
    try:
        make()
    except Exception as error:  # a class may raise anything over its arguments
        raise ValueError(f"{name} refuses {reprlib.repr(dict(options))}: {error}") from None


def _trial_optimizer(name: str, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    cls = OPTIMIZERS[name]
    # Without torch's wrapper around this method, which imports torch's compiler: two seconds at
    # every start.
    light = type(name, (cls,), {"add_param_group": inspect.unwrap(cls.add_param_group)})
    # Two-dimensional, as Muon asks for matrices.
    return light([torch.zeros(1, 1, requires_grad=True)], lr=0.1, **_tuples(options))  # pyright: ignore[reportCallIssue]


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert lists, which YAML has, to tuples, which optimizers take (betas)."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
