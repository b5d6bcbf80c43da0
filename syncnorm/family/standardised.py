"""Weight standardization, plain and scaled, as parametrizations of a layer's weight.

    plain:   W' = (W - mean) / sqrt(var + eps)
    scaled:  W' = gamma gain (W - mean) / sqrt(max(I var, eps))

mean and the biased var are those of the I weights that make one output, over all dimensions of W
but the first. `gain` is a parameter per output; gamma, a constant, keeps the variance through the
activation in front: sqrt(2 / (1 - 1 / pi)) = 1.7139... for ReLU. The layer computes with W';
W itself is the parameter.

Sources: plain, arXiv:1903.10520, to go with batch-channel or group normalisation; the authors' code
takes the unbiased variance. Scaled, arXiv:2101.08692, section 4, and arXiv:2102.06171, for networks
without normalisation; the gain and eps as in github.com/deepmind/deepmind-research, nfnets.

*Collectives*: none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from syncnorm.errors import InputError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The plain convolutions; transposed ones have their outputs in another dimension."""


class WeightStandardization(nn.Module):
    """A parametrization: each output's weights have mean 0 and variance 1.

    Args:
        eps: added to variances.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, weight: Tensor) -> Tensor:
        """Standardise a weight, (outputs, ...)."""
        centered, var = _centered(weight)
        return centered * (var + self.eps).rsqrt()


class ScaledWeightStandardization(nn.Module):
    """A parametrization: each output's weights have mean 0 and a sum of squares (gamma gain)^2.

    Args:
        outputs: the first size of the weight.
        gamma: of the activation in front of the layer.
        eps: the least I var.
    """

    eps: float
    gamma: float
    gain: nn.Parameter

    def __init__(self, outputs: int, gamma: float = 1.0, eps: float = 1e-4) -> None:
        super().__init__()
        self.gamma, self.eps = gamma, eps
        self.gain = nn.Parameter(torch.ones(outputs))

    def forward(self, weight: Tensor) -> Tensor:
        """Standardise a weight, (outputs, ...)."""
        centered, var = _centered(weight)
        inverse = (weight[0].numel() * var).clamp(min=self.eps).rsqrt()
        return centered * inverse * self.gamma * self.gain.view(-1, *[1] * (weight.ndim - 1))


def standardize_weights(model: nn.Module, scaled: bool = False, gamma: float = 1.0) -> nn.Module:
    """Standardise the weights of all convolutions of a model, in place.

    A linear layer is for the caller: give it one of the parametrizations by
    `torch.nn.utils.parametrize.register_parametrization`. Do this before an optimizer is made and
    before the model is wrapped. `remove_parametrizations` gives plain layers again.

    Args:
        model: with convolutions, none of whose weights is parametrized.
        scaled: True for `ScaledWeightStandardization`.
        gamma: see there.

    Returns:
        The model.

    Raises:
        InputError: there is no convolution, or one has a parametrized weight; nothing was changed.
    """
    found = convolutions(model)
    if not found:
        raise InputError(
            f"`model` must have a convolution, got {type(model).__name__} without one. Register "
            "WeightStandardization on the layers that are meant."
        )
    twice = [
        name
        for name, m in model.named_modules()
        if isinstance(m, CONVOLUTIONS) and parametrize.is_parametrized(m, "weight")
    ]
    if twice:
        raise InputError(
            f"`model` must have plain weights, got parametrized ones at {twice}. They would be "
            "standardised on top of that: remove the parametrizations."
        )
    for layer in found:
        own = WeightStandardization()
        if scaled:
            own = ScaledWeightStandardization(layer.out_channels, gamma).to(layer.weight)
        parametrize.register_parametrization(layer, "weight", own)
    return model


def convolutions(model: nn.Module) -> list[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """List the convolutions of a model, without transposed ones."""
    return [m for m in model.modules() if isinstance(m, CONVOLUTIONS)]


def _centered(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight minus the means of its outputs, and their biased variances."""
    dims = tuple(range(1, weight.ndim))
    var, mean = torch.var_mean(weight, dims, correction=0, keepdim=True)
    return weight - mean, var
