"""Membrane potential batch norm, for spiking networks. arXiv:2308.08359.

A neuron's membrane potential u is normalised before it is compared with the threshold:

    u_t = decay u_{t-1} (1 - spike_{t-1}) + input_t
    spike_t = 1 where (u_t - mean) / sqrt(var + eps) weight + bias > threshold, else 0

The layer is the normalisation. The same one is called at each of T time steps. Potential and
spikes, with their surrogate gradient, are the network's. The running statistics follow T batches a
step: 1 - (1 - momentum)^T is the weight of a step.

For inference the layer goes into the threshold. A spike falls where

    u > v                  for weight > 0
    u < v                  for weight < 0
    bias > threshold       for weight = 0, whatever u is

with v = (threshold - bias) sqrt(running_var + eps) / weight + running_mean. The paper gives the
first case. Its form by elements, with a statistic for each element of a sample, is this layer with
as many features on u.flatten(1).

*Collectives*: one all-reduce of 2C+1 numbers for each time step, the next of which depends on it,
and one of 2C each in the backward pass. T must be the same on all workers: other numbers meet in
one message, which is an error on all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from syncnorm.family.batch_norm import PooledBatchNorm
from syncnorm.family.passes import channels


class MembranePotentialBatchNorm(PooledBatchNorm):
    """Batch normalisation of a membrane potential, with the arguments of `FamilyLayer`."""

    @torch.no_grad()
    def folded_threshold(self, threshold: float) -> FoldedThreshold:
        """Put the layer, as it evaluates, into the threshold that its output is compared with.

        Args:
            threshold: of the normalised potential. The authors' code fires above half of its V_th.
        """
        mean, var = self.running_mean.double(), self.running_var.double()
        ones = torch.ones_like(mean)
        weight = ones if self.weight is None else self.weight.double()
        bias = ones - 1 if self.bias is None else self.bias.double()
        value = (threshold - bias) * (var + self.eps).sqrt() / weight + mean
        # Without a weight all potentials fire, or none does.
        constant = torch.where(bias > threshold, -torch.inf, torch.inf)
        value = torch.where(weight == 0, constant, value)
        sign = torch.where(weight < 0, -ones, ones)
        return FoldedThreshold(value.to(self.running_mean.dtype), sign.to(self.running_mean.dtype))


class FoldedThreshold(nn.Module):
    """Firing by a threshold per channel: 1 where sign u > sign value, else 0.

    Args:
        value: (C,), also infinite.
        sign: (C,), 1 or -1.
    """

    value: Tensor
    sign: Tensor

    def __init__(self, value: Tensor, sign: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)
        self.register_buffer("sign", sign)

    def forward(self, u: Tensor) -> Tensor:
        """Give the spikes of a potential u, (N, C, *S), in its type."""
        return (channels(self.sign, u) * u > channels(self.sign * self.value, u)).to(u.dtype)
