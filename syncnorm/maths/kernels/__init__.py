"""The four primitives of a normalisation layer, and the choice of modules that compute a whole call.

    local_moments   x, w                   -> [sum wx, sum wx^2, sum w]
    normalize       x, mean, scale, shift  -> (x - mean) * scale + shift
    backward_sums   g, x, mean             -> [sum g, sum g (x - mean)]
    backward_input  g, x, mean, scale, ... -> scale * (g - w * (a + b * (x - mean)))

Each passes once over its x and g.

Shapes: x and g (N, C, *S), any floating type, any strides; mean, scale, shift, a, b (C,) float64; w
(N, 1, *S) or None. Sums come back in float64. An output has the type and memory layout of x. Empty
tensors never reach a kernel: their sums are zeros.

`fused_for` chooses among modules of another interface, that of `composed`: there a function of the
same name also does what is per channel, from the pooled sums on. Who computes a call:

    a CPU with the native library              native (C)
    a CPU without it, or tensors it refuses    the primitives here, by cpu
    CUDA, meta tensors                         triton
    without Triton, and other devices          composed, whose passes over x are portable's
    compiled code, fake tensors                the primitives here, by traced: plain operators
    an empty tensor                            composed where kernels are fused, else zeros
    CUDA: one kept negated, or a wrapper       composed

Batch norm and its gradient are these four with scale = weight / std, shift = bias, a = sum g / n
and b = sum g (x - mean) / (n std^2), the sums being those of all workers.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from syncnorm.device import is_host
from syncnorm.maths.kernels import composed, cpu, native, portable, traced, triton
from syncnorm.maths.kernels.arguments import Reference, Scheduled
from syncnorm.maths.kernels.composed import is_weight
from syncnorm.maths.precision import sum_dtype
from syncnorm.undocumented import FakeTensor, is_wrapper

__all__ = [
    "Reference",
    "Scheduled",
    "backward_input",
    "backward_sums",
    "fused_for",
    "fused_for_lagged",
    "fused_for_running",
    "is_weight",
    "local_moments",
    "message_kernels",
    "native",
    "normalize",
]


def _primitives_for(x: Tensor) -> ModuleType:
    """The module whose functions go over x, where no fused kernels do."""
    if torch.compiler.is_compiling() or (type(x) is not Tensor and isinstance(x, FakeTensor)):
        return traced
    return cpu if is_host(x) else portable


def fused_for(x: Tensor, *others: Tensor | None) -> ModuleType | None:
    """The module of kernels that finish statistics themselves; None where they are finished here.

    See `syncnorm.maths.kernels.composed`. In code that is being compiled, and on a CPU without the
    native library, the primitives of this module and operators of (C,) numbers cost no more.

    Args:
        x: the input, or another tensor that is the first to be worked on.
        others: what else kernels will read; native ones know no subclasses of tensors.
    """
    if torch.compiler.is_compiling():
        return None
    if native.is_usable(x, *others):
        return native if x.numel() else composed
    if is_host(x) or isinstance(x, FakeTensor):
        return None
    # An empty tensor has no launch that fits it, and one kept with the other sign, or in another
    # tensor, is misread. A loop, as in `native.is_usable`.
    for t in (x, *others):
        if t is not None and (t.is_neg() or is_wrapper(t)):
            return composed
    return _preferred(x.device) if x.numel() else composed


def message_kernels(message: Tensor) -> ModuleType:
    """The module that adds the identity of a message, and compares that of a sum, unread."""
    return _preferred(message.device)


def fused_for_running(*tensors: Tensor) -> ModuleType | None:
    """The module that moves running statistics in few launches; None where there is none."""
    if not torch.compiler.is_compiling() and native.is_usable(*tensors):
        return native
    return fused_for(tensors[0])


def fused_for_lagged(
    mean: Tensor, var: Tensor, gradient: Tensor, updates: Tensor, waits: Tensor
) -> ModuleType | None:
    """The module whose kernels move the averages of "lagged"; None where operators do it.

    Kernels take the tensors for those that a layer is made with; others may have been put in their
    place, or cast.
    """
    for t in (mean, var, gradient):
        if t.dtype != torch.float64 or not t.is_contiguous():
            return None
    if not mean.shape == var.shape == gradient.shape[1:]:
        return None
    if not updates.dtype == waits.dtype == torch.int64 or not updates.is_contiguous():
        return None
    if not torch.compiler.is_compiling() and native.is_usable(mean, var, gradient):
        return native
    own = fused_for(mean)
    return None if own is composed else own


def _preferred(device: torch.device) -> ModuleType:
    return triton if device.type in ("cuda", "meta") and triton.is_usable(device) else composed


def local_moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """Raw sums of one worker, shape (2C+1,), float64: [sum wx, sum wx^2, sum w].

    On a CPU and in code that is being compiled; see `fused_for` for others.
    """
    channels = x.shape[1]
    wide = sum_dtype(x.device)
    sums = torch.zeros(2 * channels + 1, dtype=wide, device=x.device)
    if x.numel() == 0:
        return sums
    count = x.numel() // channels if mask is None else mask.sum(dtype=wide)
    # About a pivot p near the mean, so that a large mean costs no digits of the variance.
    p, s1, s2 = _primitives_for(x).centred_sums(x, mask, count)
    sums[:channels] = s1 + count * p
    sums[channels:-1] = s2 + p * (2.0 * s1 + count * p)
    sums[-1] = count
    return sums


def normalize(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x - mean) * scale + shift, in the type and layout of x."""
    if x.numel() == 0:
        return torch.empty_like(x)
    mean, lost = _rounded(mean, x)
    if lost is not None:
        shift = torch.addcmul(shift, scale, lost, value=-1)
    return _primitives_for(x).normalize(x, mean, scale, shift)


def backward_sums(grad_output: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """[sum g (C), sum g (x - mean) (C)], shape (2C,), float64."""
    channels = x.shape[1]
    if x.numel() == 0:
        return torch.zeros(2 * channels, dtype=sum_dtype(x.device), device=x.device)
    mean, lost = _rounded(mean, x)
    sums = _primitives_for(x).backward_sums(grad_output, x, mean)
    if lost is not None:
        sums[channels:].addcmul_(sums[:channels], lost, value=-1)
    return sums


def backward_input(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """scale * (g - w * (a + b * (x - mean))), in the type and layout of x."""
    if x.numel() == 0:
        return torch.empty_like(x)
    mean, lost = _rounded(mean, x)
    if lost is not None:
        a = torch.addcmul(a, b, lost, value=-1)
    return _primitives_for(x).backward_input(grad_output, x, mean, scale, a, b, mask)


def _rounded(mean: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The mean as it meets x, in float32, and what it loses by that; None where it meets a float64.

    What is lost of a mean of 1e4 standard deviations is 6e-4 of one.
    """
    if x.dtype == torch.float64 or mean.dtype != torch.float64:
        return mean, None
    # Clamped to float32's largest numbers, though that changes nothing: a compiler leaves out a
    # conversion and the one back. (With dynamic=True it takes a number that has a name for an input.)
    rounded = mean.float().clamp(-3.4028234663852886e38, 3.4028234663852886e38).double()
    return rounded, mean - rounded
