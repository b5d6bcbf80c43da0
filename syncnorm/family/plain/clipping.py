"""Adaptive gradient clipping, for networks without normalisation. arXiv:2102.06171, section 4.

    G_i <- clip max(|W_i|, eps) / |G_i| G_i    where |G_i| > clip max(|W_i|, eps)

W_i are the weights that make output i of a layer, all dimensions of W but the first, and G_i is
their gradient; norms are Frobenius'. A parameter of one dimension or none is one unit, as in
github.com/deepmind/deepmind-research, nfnets. The paper leaves out the last linear layer: do not
pass its parameters.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from syncnorm.errors import InputError


@torch.no_grad()
def clip_gradients_adaptively_(
    parameters: Iterable[Tensor], clip: float = 0.01, eps: float = 1e-3
) -> None:
    """Clip gradients, in place, by the norms of the weights that they belong to.

    Call it between the backward pass and the step of the optimizer. Gradients that workers have
    averaged are equal, and so is what becomes of them: nothing is exchanged.

    Args:
        parameters: those whose gradients are clipped; one without a gradient is passed over.
        clip: the largest ratio of a gradient's norm to a weight's; > 0.
        eps: the least norm that a weight counts with, so that weights of 0 can move; > 0.
    """
    for name, value in (("clip", clip), ("eps", eps)):
        if not value > 0:
            raise InputError(f"`{name}` must be > 0, got {value}. The paper's are 0.01 and 1e-3.")
    for parameter in parameters:
        if parameter.grad is not None:
            largest = clip * _norms(parameter).clamp(min=eps)
            norms = _norms(parameter.grad)
            # Below its bound a gradient keeps its bits.
            factor = torch.where(norms > largest, largest / norms, 1.0)
            parameter.grad.mul_(factor.to(parameter.grad.dtype))


def _norms(t: Tensor) -> Tensor:
    """The norms of a tensor's units, to be broadcast against it."""
    if t.ndim <= 1:
        return torch.linalg.vector_norm(t)
    return torch.linalg.vector_norm(t, dim=tuple(range(1, t.ndim)), keepdim=True)
