"""Chain of Merges: one network of several, layer after layer, each by least squares."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm import ops
from syncnorm.comm import groups
from syncnorm.errors import FaultError, InputError
from syncnorm.family.standardised import CONVOLUTIONS
from syncnorm.maths.moments import Raw
from syncnorm.merge.calls import Call, calls
from syncnorm.merge.gram import Sums, add, arriving, leaving, with_bias
from syncnorm.merge.interpolate import bare, check_alike, tensors
from syncnorm.model.modes import evaluating
from syncnorm.model.sample import check_batches
from syncnorm.model.worker_failures import check_finite, sum_unless_failed


@torch.no_grad()
def chain_of_merges(
    models: Sequence[nn.Module],
    batches: Sequence[Iterable[Any]],
    *,
    ridge: float = 1e-4,
    process_group: groups.Spec = None,
) -> nn.Module:
    """Merge fine-tuned networks into one whose layers compute nearly what each of them computes.

        W  =  argmin  sum_i || W Xhat_i - W_i X_i ||^2  +  rho || W - mean_i W_i ||^2
           =  (sum_i Y_i Xhat_i^T + rho mean_i W_i) (sum_i Xhat_i Xhat_i^T + rho I)^-1

    in the order of the forward. Y_i = W_i X_i is what the layer of network i computes on that
    network's batches, and Xhat_i what comes to the layer of the merged network on the same batches,
    through the layers that are merged already. A convolution is a linear layer of unfolded maps. A
    bias is one more column of W, and 1 one more row of Xhat.

    rho is `ridge` times the mean of the diagonal of sum_i Xhat_i Xhat_i^T: in directions of which
    the batches tell nothing, the merged weight is the plain average. So it is wherever the matrix
    cannot be inverted.

    Running statistics of a batch norm become those of what comes to it in the merged network, over
    all batches. All other parameters and buffers are averages, among them grouped and transposed
    convolutions.

    *Collectives*: for each layer one all-reduce of d^2 + C d numbers (d: numbers of unfolded input,
    with that of the bias; C: outputs) and one for each network, for each batch norm one of 2C + 1,
    and in each a number for each worker. Every worker must call, with any number of batches of each network, also
    none: the result depends on the set of samples, not on which worker had them, to rounding.

    Args:
        models: two or more of one architecture, fine-tuned from one network; see `match_weights`
            for others. They stay as they are.
        batches: for each network those that it counts on, see `recalibrate`: of its own task. Gone
            through once for each layer and batch norm.
        ridge: weight of the average, >= 0.
        process_group: the workers; None: all of them.

    Returns:
        The merged network, in evaluation mode.

    Raises:
        InputError: `ridge` is out of range, the networks differ or cannot be traced by torch.fx,
            or `batches` does not hold a list or a loader for each network.
        FaultError: no worker had a batch of some network, a forward failed on another worker, or
            activations are not finite; on all workers.

    References:
        Buzzega et al., Rethinking Layer-wise Model Merging through Chain of Merges,
        arXiv:2508.21421: the objective, with activations of the already merged network; the closed
        form follows from it. Deviations: `rho`; batch norms, which the paper's transformers do not
        have; convolutions.
    """
    models = [bare(each) for each in models]
    _check(models, batches, ridge)
    steps = calls(models[0])
    merged = _average(models)
    group = groups.statistics_group(process_group)
    with ExitStack() as stack:
        for each in (*models, merged):
            stack.enter_context(evaluating(each))
        for step in steps:
            if isinstance(step.module, _BatchNorm):
                if step.module.running_mean is not None:
                    _follow(merged, step, batches, group)
            elif _is_linear(step.module):
                _solve(merged, models, step, batches, ridge, group)
    return merged.eval()


def _check(models: list[nn.Module], batches: Sequence[Iterable[Any]], ridge: float) -> None:
    if not ridge >= 0:
        raise InputError(f"`ridge` must be at least 0, got {ridge}")
    if len(models) < 2 or len(models) != len(batches):
        raise InputError(
            "`models` must be two or more, with one of `batches` for each, got "
            f"{len(models)} and {len(batches)}"
        )
    if any(isinstance(each, Iterator) for each in batches):
        raise InputError(
            "`batches` must be there to be gone through for each layer, got an iterator. Give "
            "lists or loaders."
        )
    for each in batches:
        check_batches(each)
    check_alike(*models)


def _average(models: list[nn.Module]) -> nn.Module:
    merged = copy.deepcopy(models[0])
    states = [tensors(each) for each in models]
    merged.load_state_dict(
        {
            name: torch.stack([s[name].to(each.device).double() for s in states]).mean(0)
            for name, each in states[0].items()
            if each.is_floating_point()
        },
        strict=False,
    )
    return merged


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, CONVOLUTIONS) and layer.groups == 1)


def _follow(
    merged: nn.Module, step: Call, batches: Sequence[Iterable[Any]], group: groups.Group | None
) -> None:
    """Give a batch norm the statistics of what comes to it."""
    norm: Any = merged.get_submodule(step.name)
    sums = torch.zeros(
        2 * norm.num_features + 1, dtype=torch.float64, device=norm.running_mean.device
    )
    failure = None
    try:
        for batch in (batch for each in batches for batch in each):
            sums += ops.local_sums(arriving(merged, step.name, batch), None).sums
    except Exception as error:  # sent to the other workers, then raised
        failure = error
    population = Raw(_pooled(sums, failure, group, "population", step.name))
    if population.count == 0:
        raise FaultError("`batches` must hold data on at least one worker, got none")
    norm.running_mean.copy_(population.mean)
    if population.count > 1:
        norm.running_var.copy_(population.m2 / (population.count - 1))


def _solve(
    merged: nn.Module,
    models: list[nn.Module],
    step: Call,
    batches: Sequence[Iterable[Any]],
    ridge: float,
    group: groups.Group | None,
) -> None:
    """Merge a layer."""
    layer: Any = merged.get_submodule(step.name)
    outputs = len(layer.weight)
    average = with_bias(layer.weight, layer.bias)
    d = average.shape[1]
    size = d * d + outputs * d + len(models)
    message = torch.zeros(size, dtype=torch.float64, device=layer.weight.device)
    sums = Sums.views(message, outputs, d)
    failure = None
    try:
        for number, (model, each) in enumerate(zip(models, batches, strict=True)):
            for batch in each:
                x = arriving(merged, step.name, batch)
                add(sums, layer, x, leaving(model, step.name, batch), number)
    except Exception as error:  # sent to the other workers, then raised
        failure = error
    total = _pooled(message, failure, group, "least squares", step.name)
    pooled = Sums.views(total, outputs, d)
    missing = (pooled.columns == 0).nonzero().flatten().tolist()
    if missing:
        raise FaultError(
            "`batches` must hold data of each network on at least one worker, got none of network "
            f"{', '.join(map(str, missing))}, counted from 0. The merged one would leave it out."
        )
    solution = pooled.solve(average, ridge)
    if layer.bias is not None:
        layer.bias.copy_(solution[:, -1])
    layer.weight.copy_(solution[:, : layer.weight[0].numel()].view_as(layer.weight))


def _pooled(
    message: Tensor, failure: Exception | None, group: groups.Group | None, kind: str, name: str
) -> Tensor:
    """Sum over the workers what comes to a layer of this name."""
    total = sum_unless_failed(message, failure, group, kind)
    check_finite([(name, total)])
    return total
