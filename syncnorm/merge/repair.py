"""REPAIR: the statistics of an interpolated network set to the interpolation of its endpoints'."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm import ops
from syncnorm.comm import groups
from syncnorm.errors import FaultError, InputError
from syncnorm.maths.moments import Raw
from syncnorm.merge.calls import LAYERS, TRANSPOSED, Call, calls
from syncnorm.merge.interpolate import bare, check_alike, check_alpha
from syncnorm.model.modes import evaluating
from syncnorm.model.recalibrate import recalibrate
from syncnorm.model.sample import call, check_batches, uncompiled
from syncnorm.model.worker_failures import check_finite, sum_unless_failed


@torch.no_grad()
def repair(
    model: nn.Module,
    a: nn.Module,
    b: nn.Module,
    batches: Iterable[Any],
    alpha: float = 0.5,
    *,
    process_group: groups.Spec = None,
) -> nn.Module:
    """Give the channels of an interpolated network the mean and deviation that they should have.

        mean(x)  =  (1 - alpha) mean(x_a)  +  alpha mean(x_b)
        std(x)   =  (1 - alpha) std(x_a)   +  alpha std(x_b)

    Channels of an interpolated network vary less than those of its endpoints, layer by layer.

    *Batch norms*: their outputs have mean `bias` and deviation `weight`, which interpolation has
    interpolated, so the targets are met once running statistics are those of the network's own
    activations: they are re-estimated, as `syncnorm.recalibrate` does.

    *Layers that no batch norm follows*, convolutions and linear ones, but for the one that gives
    the output: their outputs x are rescaled and shifted, which goes into their weight and bias. A
    layer without a bias gets one.

    *Statistics*: those of the endpoints in evaluation mode over all batches of all workers. Those
    of `model`: as in `recalibrate`, each batch normalised by itself on its way to deeper layers.
    They depend on the set of batches, not on which worker had them, to rounding.

    *Collectives*: one all-reduce at the end of the batches, of 2C+1 numbers for each layer and a
    number for each worker; before it one for the targets, with twice that for layers that no batch
    norm follows, where there are some. Every worker must call, with any number of batches.

    Args:
        model: an interpolation of `a` and `b`, changed in place; see `interpolate`.
        a: stays as it is.
        b: stays as it is; its channels should be in the order of those of `a`, see `match_weights`.
        batches: see `recalibrate`. Gone through twice where there are layers without a batch norm.
        alpha: share of `b`, in [0, 1].
        process_group: the workers; None: all of them.

    Returns:
        `model`.

    Raises:
        InputError: `alpha` is out of range, the networks differ, cannot be traced by torch.fx or
            have nothing to repair, or `batches` can be gone through once only.
        FaultError: no worker had a batch, what comes to a layer is not finite, or the forward failed
            on another worker; on all workers, and nothing was changed.

    References:
        Jordan et al., REPAIR, arXiv:2211.08403, its two equations for mean and deviation, and
        KellerJordan/REPAIR, whose notebooks for networks with batch norms re-estimate their
        statistics. Deviations: moments are merged by count, not averaged over batches; all
        variances are divided by the count; the small number in the denominator is 1e-12, not 1e-5.
    """
    check_alpha(alpha)
    check_batches(batches)
    bare_model, a, b = bare(model), bare(a), bare(b)
    check_alike(bare_model, a, b)
    bared = [
        each
        for each in calls(bare_model)
        if isinstance(each.module, LAYERS) and not each.is_normalised and not each.is_output
    ]
    for each in bared:
        _check(each)
    targets = []
    if bared:
        if isinstance(batches, Iterator):
            raise InputError(
                "`batches` must be there to be gone through twice, got an iterator. Give a list or "
                "a loader."
            )
        targets = _targets(a, b, bared, batches, alpha, groups.statistics_group(process_group))
    with _followed(bare_model, bared, targets) as norms:
        recalibrate(bare_model, batches, process_group=process_group)
    for each, norm, target in zip(bared, norms, targets, strict=True):
        _fold(each.module, norm, target)
    return model


class _Target(NamedTuple):
    """What the channels of a layer's output should have, (C,), float64."""

    mean: Tensor
    std: Tensor
    values: Tensor
    """The number of values of a channel, (); the same in all three networks."""


def _check(each: Call) -> None:
    if isinstance(each.module, TRANSPOSED) and each.module.groups != 1:
        raise InputError(
            f"`model` must have transposed convolutions of one group, got {each.module.groups} in "
            f"{each.name!r}"
        )


def _targets(
    a: nn.Module,
    b: nn.Module,
    bared: list[Call],
    batches: Iterable[Any],
    alpha: float,
    group: groups.Group | None,
) -> list[_Target]:
    """Interpolate the pooled statistics of the endpoints."""
    sums = [[_zeros(each.module) for each in bared] for _ in (a, b)]
    failure = None
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for model, totals in zip((a, b), sums, strict=True):
            stack.enter_context(evaluating(model))
            for each, total in zip(bared, totals, strict=True):
                layer = model.get_submodule(each.name)
                stack.callback(layer.register_forward_hook(_adding_to(total)).remove)
        try:
            for batch in batches:
                call(a, batch, "batches")
                call(b, batch, "batches")
        except Exception as error:  # sent to the other workers, then raised
            failure = error
    device = sums[0][0].device
    message = torch.cat([total.to(device) for totals in sums for total in totals])
    message = sum_unless_failed(message, failure, group, "targets")
    pooled = message.split([len(t) for ts in sums for t in ts])
    check_finite(zip([each.name for each in bared] * 2, pooled, strict=True))
    moments = [Raw(each) for each in pooled]
    if all(each.count == 0 for each in moments):
        raise FaultError(
            "`batches` must hold data on at least one worker, got none. Nothing was changed."
        )
    pairs = zip(moments[: len(bared)], moments[len(bared) :], strict=True)
    return [
        _Target(torch.lerp(p.mean, q.mean, alpha), torch.lerp(_std(p), _std(q), alpha), p.count)
        for p, q in pairs
    ]


def _std(moments: Any) -> Tensor:
    return moments.var.sqrt()


def _zeros(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    return torch.zeros(2 * _width(layer) + 1, dtype=torch.float64, device=weight.device)


def _width(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _adding_to(total: Tensor) -> Any:
    """A hook that adds the sums of a layer's output."""

    def add(layer: nn.Module, args: Any, output: Tensor) -> None:
        total.add_(ops.local_sums(_by_channel(layer, output), None).sums)

    return add


def _by_channel(layer: nn.Module, output: Tensor) -> Tensor:
    """A layer's output with its channels second: of a linear one, whose channels are last, rows."""
    return output.flatten(0, -2) if isinstance(layer, nn.Linear) else output


class _Follower(_BatchNorm):
    """A batch norm for a while, of inputs of any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class _Pair(nn.Module):
    """A layer and what follows it."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm
        self.training = layer.training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = self.layer(*args, **kwargs)
        return self.norm(_by_channel(self.layer, output)).view_as(output)


@contextmanager
def _followed(
    model: nn.Module, bared: list[Call], targets: list[_Target]
) -> Iterator[list[_Follower]]:
    """Put a batch norm behind each layer that has none, which has its targets as weight and bias.

    Within the block deeper layers get what they will get once it is folded into its layer.
    """
    norms = []
    try:
        for each, target in zip(bared, targets, strict=True):
            weight: Any = each.module.weight
            norm = _Follower(len(target.mean), eps=1e-12).to(weight.device, weight.dtype)
            norm.weight.copy_(target.std)
            norm.bias.copy_(target.mean)
            # Where fewer than two values come by there is no deviation.
            norm.running_var.fill_(torch.nan)  # pyright: ignore[reportOptionalMemberAccess]
            norms.append(norm)
            norm.training = model.training
            model.set_submodule(each.name, _Pair(each.module, norm))
        yield norms
    finally:
        for each in bared[: len(norms)]:
            model.set_submodule(each.name, each.module)


def _fold(layer: Any, norm: _Follower, target: _Target) -> None:
    """Fold a batch norm of running statistics into the layer before it."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    var = norm.running_var.double() * (target.values - 1) / target.values
    # A channel that never varies has no deviation to be rescaled.
    scale = torch.where(var > 0, target.std / (var + norm.eps).sqrt(), 1.0)
    axis = 1 if isinstance(layer, TRANSPOSED) else 0
    shape = [-1 if axis == dim else 1 for dim in range(layer.weight.ndim)]
    layer.weight.copy_(layer.weight.double() * scale.view(shape))
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros_like(norm.bias), layer.weight.requires_grad)
    shift = (layer.bias.double() - norm.running_mean.double()) * scale
    layer.bias.copy_(shift + target.mean)
