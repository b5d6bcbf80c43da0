"""The derivative of a normaliser's gradient, for gradient penalties and Hessian-vector products.

The gradient, of g = dL/dy, x and weight, with xhat = (x - mean) * s, s = invstd, A = mean g, B =
mean g xhat:

    dx = weight * s * (g - w * (A + xhat * B))
    dweight = local sum g xhat        dbias = local sum g

For cotangents v of dx, u of dweight and t of dbias, with v' = weight * v, the derivative of F = sum
v dx + sum (u xhat + t) g, sums being over the whole statistic (u, t and weight are each worker's
own):

    P = sum v' g        V1 = sum w v'        V2 = sum w v' xhat
    U1 = sum u g        U2 = sum u g xhat
    dF/dg = s * (v' - V1/n - xhat * V2/n) + u * xhat + t
    dF/dx = s * (q - w/n * (Q1 + xhat * (Q2 + s * (P - V1 A - V2 B))))
    q = u g - s (w v' B + g V2/n)
    Q1 = sum q = U1 - s * (V1 B + V2 A)        Q2 = sum q xhat = U2 - 2 s V2 B
    dF/dweight = local sum v dx / weight

q is dF/dxhat where s is held. All through x: mean and s are functions of it, and so are A and B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from syncnorm.maths import kernels
from syncnorm.maths.shapes import facing


@dataclass(frozen=True)
class SecondDerivative:
    """One rank's part of the derivative.

    x, g and v are (N, C, *S), at least float32; mask (N, 1, *S) or None; all else (C,), float64.
    `pooled` are the sums of all workers over n, those of v times their worker's weight: [P, V1, V2,
    U1, U2] / n.
    """

    v: Tensor
    u: Tensor
    t: Tensor
    g: Tensor
    x: Tensor
    mask: Tensor | None
    weight: Tensor
    mean: Tensor
    invstd: Tensor
    mean_dy: Tensor
    mean_dy_xhat: Tensor

    def sums(self) -> Tensor:
        """This rank's [sum v g, sum w v, sum w v xhat, sum u g, sum u g xhat], shape (5, C).

        The layer's weight is left out.
        """
        wv = self.v if self.mask is None else self.v * self.mask.to(self.v.dtype)
        vg = kernels.backward_sums(self.v, self.g, torch.zeros_like(self.mean)).view(2, -1)[1]
        v1, v2 = kernels.backward_sums(wv, self.x, self.mean).view(2, -1)
        g1, g2 = kernels.backward_sums(self.g, self.x, self.mean).view(2, -1)
        return torch.stack([vg, v1, v2 * self.invstd, self.u * g1, self.u * g2 * self.invstd])

    def wrt_weight(self, sums: Tensor) -> Tensor:
        """dF/dweight, from this worker's own sums."""
        vg, v1, v2, _, _ = sums
        return self.invstd * (vg - v1 * self.mean_dy - v2 * self.mean_dy_xhat)

    def wrt_gradient(self, pooled: Tensor) -> Tensor:
        """dF/dg."""
        s, (_, v1, v2, _, _) = self.invstd, pooled
        rest = kernels.normalize(self.x, self.mean, s * (self.u - s * v2), self.t - s * v1)
        return rest + _times(self.v, s * self.weight)

    def wrt_input(self, pooled: Tensor) -> Tensor:
        """dF/dx."""
        s, a, b = self.invstd, self.mean_dy, self.mean_dy_xhat
        p, v1, v2, u1, u2 = pooled
        q1 = u1 - s * (v1 * b + v2 * a)
        q2 = u2 - 2.0 * s * v2 * b
        wv = self.v if self.mask is None else self.v * self.mask.to(self.v.dtype)
        # s q: what is left has the form of the first derivative.
        sq = _times(self.g, s * (self.u - s * v2)) - _times(wv, s * s * b * self.weight)
        slope = s * s * (q2 + s * (p - v1 * a - v2 * b))
        return kernels.backward_input(
            sq, self.x, self.mean, torch.ones_like(s), s * q1, slope, self.mask
        )


def _times(t: Tensor, coefficient: Tensor) -> Tensor:
    return t * facing(coefficient.to(t.dtype), t)
