"""Mixup and CutMix: a sample with a part of another, drawn from (seed, epoch, sample) alone.

Mixup (Zhang, Cisse, Dauphin and Lopez-Paz 2018, arXiv:1710.09412, equation 1):

    x~ = lambda x_i + (1 - lambda) x_j,    y~ = lambda y_i + (1 - lambda) y_j

CutMix (Yun et al. 2019, arXiv:1905.04899, equations 1 and 2), M being 0 in a box and 1 elsewhere:

    x~ = M x_i + (1 - M) x_j,              y~ = lambda y_i + (1 - lambda) y_j

    centre of the box: uniform over the image;  sides: H sqrt(1 - lambda), W sqrt(1 - lambda)

where lambda becomes the share of M that is 1 once the box is cut off at the image's border. In both
lambda ~ Beta(alpha, alpha), and y are class probabilities. Where both are asked for, a sample has
one or the other, with equal chances. Sample j is any of the training set, with its own random
changes of this epoch.

The papers draw lambda once, and j within the batch; here each sample has its own of both, so a
sample's change does not depend on its batch.
"""

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from syncnorm.train.data.augment import draw

if TYPE_CHECKING:
    from syncnorm.train.config.schema import AugmentSection

_LEVELS = 2**16


def partners(indices: Tensor, count: int, seed: int, epoch: int) -> Tensor:
    """Draw for each sample (N,) the one of all `count` that it is mixed with."""
    return draw(indices, count, "mix partner", seed, epoch)


def mix(
    samples: tuple[Tensor, Tensor],
    others: tuple[Tensor, Tensor],
    indices: Tensor,
    options: "AugmentSection",
    seed: int,
    epoch: int,
) -> tuple[Tensor, Tensor]:
    """Mix samples with their partners, by mixup or CutMix as the options say.

    Args:
        samples: inputs (N, ...), for CutMix images (N, C, H, W), and class probabilities (N, K).
        others: the same of `partners`.
        indices: (N,), int64, the samples' numbers in the training set.
        options: `mixup` and `cutmix`, not both 0.
        seed: of the run.
        epoch: of the run.

    Returns:
        The mixed inputs and class probabilities.
    """
    (inputs, targets), (other_inputs, other_targets) = samples, others
    indices = indices.to(inputs.device)
    is_cut = _is_cut(indices, options, seed, epoch)  # (N,), bool
    mixed, share = inputs, torch.ones(len(inputs), dtype=torch.float64, device=inputs.device)
    if options.mixup:
        share = draw_beta(indices, options.mixup, "mixup", seed, epoch)
        kept = share.to(inputs.dtype).reshape(-1, *(1,) * (inputs.ndim - 1))
        mixed = kept * inputs + (1 - kept) * other_inputs
    if options.cutmix:
        box = _boxes(indices, inputs.shape[2:], options.cutmix, seed, epoch)  # (N, H, W)
        pasted = torch.where(box[:, None], other_inputs, inputs)
        cut_share = (~box).flatten(1).sum(1).double() / box[0].numel() if len(box) else share
        mixed = torch.where(is_cut.reshape(-1, 1, 1, 1), pasted, mixed)
        share = torch.where(is_cut, cut_share, share)
    share = share.to(targets.dtype)[:, None]
    return mixed, share * targets + (1 - share) * other_targets


def _is_cut(indices: Tensor, options: "AugmentSection", seed: int, epoch: int) -> Tensor:
    if options.mixup and options.cutmix:
        return draw(indices, 2, "mix kind", seed, epoch).bool()
    return torch.full_like(indices, bool(options.cutmix), dtype=torch.bool)


def _boxes(indices: Tensor, size: tuple[int, ...], alpha: float, seed: int, epoch: int) -> Tensor:
    """Mark each sample's box: (N, H, W), bool."""
    ratio = (1 - draw_beta(indices, alpha, "cutmix", seed, epoch)).sqrt()
    marks = []
    for name, length in zip(("row", "column"), size, strict=True):
        centres = draw(indices, length, f"cutmix {name}", seed, epoch)[:, None]
        sides = (length * ratio).long()[:, None]
        first = centres - sides // 2
        coordinates = torch.arange(length, device=indices.device)
        marks.append((coordinates >= first) & (coordinates < first + sides))  # (N, length)
    return marks[0][:, :, None] & marks[1][:, None, :]


def draw_beta(indices: Tensor, alpha: float, stream: str, seed: int, epoch: int) -> Tensor:
    """Draw a number of Beta(alpha, alpha) for each index, in float64.

    With U and V uniform over (0, 1), 2 alpha (U^(-1/alpha) - 1) cos(2 pi V)^2 is the square of a
    Student's t with 2 alpha degrees of freedom (Bailey 1994, Math. Comp. 62, 779), and
    (1 + t / sqrt(2 alpha + t^2)) / 2 is of Beta(alpha, alpha) (Devroye 1996, "Random variate
    generation in one line of code").

    U and V take 2**16 values each. The powers and cosines of these come from tables, made once: all
    that is left to compute is rounded alike on every device and in every batch.
    """
    power, rest, cosine = _tables(alpha, indices.device)
    u = draw(indices, _LEVELS, f"{stream} u", seed, epoch)
    v = draw(indices, _LEVELS, f"{stream} v", seed, epoch)
    spread = rest[u] * cosine[v].square()
    # t / sqrt(2 alpha + t^2), without its sign
    root = (spread / (power[u] + spread)).sqrt()
    return (1 + cosine[v].sign() * root) / 2


@lru_cache(maxsize=8)
def _tables(alpha: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Compute U^(1/alpha), 1 - U^(1/alpha) and cos(2 pi U) at the middles of 2**16 intervals."""
    uniform = (torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS
    logarithm = uniform.log() / alpha
    cosine = (2 * math.pi * uniform).cos()
    return logarithm.exp().to(device), -logarithm.expm1().to(device), cosine.to(device)
