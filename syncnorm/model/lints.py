"""Likely mistakes round batch norms, found in the order in which modules are called, or in a loader.

Each function gives sentences for a person, none where there is nothing to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from syncnorm import checks, tracing
from syncnorm.family.layer import Pooling
from syncnorm.model.makers import Makers
from syncnorm.model.norm_parameters import is_norm
from syncnorm.model.sample import call, evaluating_untouched
from syncnorm.recomputing import is_recomputing

_BATCH_NORMS = (_BatchNorm, Pooling)


class Call(NamedTuple):
    """A call of a module."""

    module: nn.Module
    fed_by: nn.Module | None
    """The module whose output it was given, untouched; None: it was given something else."""


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[list[Call]]:
    """Record the calls of modules that have parameters, or no modules in them.

    Of the first forward within the block, without what activation checkpointing repeats.
    """
    calls: list[Call] = []
    makers: Makers[nn.Module] = Makers()
    is_over = False

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_over or is_recomputing():
            return
        x = next(iter((*args, *kwargs.values())), None)
        calls.append(Call(module, makers.maker_of(x)))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not is_over:
            makers.note(output, module)

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal is_over
        is_over = True

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            if any(True for _ in module.parameters(recurse=False)) or not any(module.children()):
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after).remove)
        if not isinstance(model, torch.jit.ScriptModule):
            stack.callback(model.register_forward_hook(end).remove)
        yield calls


def model_lints(model: nn.Module, calls: Sequence[Call], sample: Any = None) -> list[str]:
    """All lints of a model's structure.

    Args:
        model: the one that was called.
        calls: of one forward.
        sample: the argument of that forward, for figures; None: there are none.
    """
    return [*dropout_lints(model, calls, sample), *head_lints(model, calls)]


def dropout_lints(model: nn.Module, calls: Sequence[Call], sample: Any) -> list[str]:
    """Name each dropout that runs before a batch norm, and the variances there.

    Li et al., arXiv:1801.05134: the variance that training sees is not that of evaluation.
    """
    names = _names(model)
    order = [each.module for each in calls]
    behind: dict[nn.Module, Sequence[nn.Module]] = {}
    for i, module in enumerate(order):
        if isinstance(module, _DropoutNd) and module.p > 0 and _trains(model, module):
            norms = [m for m in order[i + 1 :] if isinstance(m, _BATCH_NORMS) and _trains(model, m)]
            if norms:
                behind.setdefault(module, norms)
    figures = _variances(model, behind, sample) if behind and sample is not None else {}
    found = []
    for module, norms in behind.items():
        # One that was not looked at may be meant.
        after = next((norm for norm in norms if figures.get(norm, "") is not None), None)
        if after is not None:
            found.append(
                f"dropout at {names[module]!r} runs before {names[after]!r}: training statistics "
                f"hold a variance that evaluation does not have{figures.get(after, '')}. Move it "
                "behind the last batch normalisation."
            )
    return found


def _variances(
    model: nn.Module, behind: Mapping[nn.Module, Sequence[nn.Module]], sample: Any
) -> dict[nn.Module, str | None]:
    """Say the variances of the inputs of norms behind dropouts, with these and without, on the sample.

    Of a norm that is called several times, those of the first call that differs; None if none does:
    no dropout reaches it.
    """
    seen: dict[bool, dict[nn.Module, list[float]]] = {True: {}, False: {}}
    for is_on, variances in seen.items():

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = checks.input_of(args, kwargs)
            if tracing.tracer_of(x) is not None:
                return
            by_channel = x.detach().transpose(0, 1).flatten(1).cpu().double()
            variance = by_channel.var(1, correction=0).mean().item()
            variances.setdefault(module, []).append(variance)  # noqa: B023 this round's

        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(evaluating_untouched(model))
            for dropout in behind:
                dropout.training = is_on
            for norm in {norm for norms in behind.values() for norm in norms}:
                stack.callback(norm.register_forward_pre_hook(look, with_kwargs=True).remove)
            call(model, sample, "sample")
    return {
        norm: _contrast(with_it, seen[False].get(norm, [])) for norm, with_it in seen[True].items()
    }


def _contrast(with_dropout: list[float], without: list[float]) -> str | None:
    for on, off in zip(with_dropout, without, strict=False):
        if not math.isclose(on, off, rel_tol=1e-5):
            ratio = f" (ratio {off / on:.2f})" if on else ""
            return f", {on:.3g} against {off:.3g} on the sample{ratio}"
    # A constant sample tells nothing.
    return None if any(without) else ""


def head_lints(model: nn.Module, calls: Sequence[Call]) -> list[str]:
    """Name a batch norm that is the last of the layers, after some that learn."""
    layers = [
        each.module
        for each in calls
        if any(True for _ in each.module.parameters(recurse=False))
        or isinstance(each.module, _BATCH_NORMS)
    ]
    is_last = layers and isinstance(layers[-1], _BATCH_NORMS) and _trains(model, layers[-1])
    if not is_last or all(is_norm(layer) for layer in layers):
        return []
    return [
        f"batch norm {_names(model)[layers[-1]]!r} is the last layer before the loss: the mean and "
        "variance of an output over a batch are its bias and weight, whatever the targets are, and "
        "a sample's output depends on the others. End with a layer that has no batch norm behind "
        "it, unless that is meant."
    ]


def decay_lints(model: nn.Module, calls: Sequence[Call], optimizer: Optimizer) -> list[str]:
    """Show the effective learning rates of weights directly before batch norms, where they decay.

    BN(a w) = BN(w), so a step turns w by lr / ||w||^2 times the gradient at ||w|| = 1: decay changes
    that rate, not the function. van Laarhoven, arXiv:1706.05350.
    """
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    rates: dict[str, float] = {}
    decays: set[float] = set()
    for each in calls:
        weight = None if each.fed_by is None else getattr(each.fed_by, "weight", None)
        if not isinstance(each.module, _BATCH_NORMS) or not _trains(model, each.module):
            continue
        group = groups.get(weight) if isinstance(weight, nn.Parameter) else None
        if weight is None or group is None or weight.ndim < 2 or not group.get("weight_decay"):
            continue
        decays.add(float(group["weight_decay"]))
        square = weight.detach().cpu().double().square().sum().item()
        rates[_names(model)[each.fed_by]] = float(group["lr"]) / square if square else float("inf")
    if not rates:
        return []
    shown = sorted(rates, key=lambda name: rates[name])
    least, most = shown[0], shown[-1]
    values = f"{rates[least]:.3g} at {least!r}"
    values += f" to {rates[most]:.3g} at {most!r}" if len(shown) > 1 else ""
    return [
        f"weight decay {', '.join(f'{each:g}' for each in sorted(decays))} acts on {len(rates)} "
        "weight(s) directly before batch norms, which take their scale out: what it "
        f"sets is their effective learning rate lr / ||w||^2, now {values}. It grows as they "
        "shrink; watch it, or leave these weights out of the decay."
    ]


def sampler_lints(loader: DataLoader[Any]) -> list[str]:
    """Name a sampler of training data that gives the same order in every epoch.

    The same samples then share their statistics every time, which distorts the loss that is
    minimised: Wu, Yun and Sra, arXiv:2302.12444.
    """
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler:
        return []
    sampler, always = batches.sampler, "every epoch has the same order and the same samples "
    always += "together in a statistic"
    if isinstance(sampler, DistributedSampler) and sampler.shuffle:
        if sampler.epoch != 0:
            return []
        return [
            "the loader's DistributedSampler is at epoch 0, and stays there if nobody calls "
            f"set_epoch: {always}. Call loader.sampler.set_epoch(epoch) before each."
        ]
    if isinstance(sampler, DistributedSampler | SequentialSampler):
        return [
            f"the loader's {type(sampler).__name__} does not shuffle: {always}. Give the loader "
            "shuffle=True, or the sampler, if it is of training data."
        ]
    return []


def _trains(model: nn.Module, module: nn.Module) -> bool:
    """False if a module is frozen: in evaluation mode while the model trains."""
    return module.training or not model.training


def _names(model: nn.Module) -> dict[nn.Module | None, str]:
    return {module: name for name, module in model.named_modules()}
