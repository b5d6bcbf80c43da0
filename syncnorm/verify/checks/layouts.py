"""Shapes and layouts in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from syncnorm.verify.check import check
from syncnorm.verify.compare import expect
from syncnorm.verify.context import Context
from syncnorm.verify.oracle import random_batch
from syncnorm.verify.steps import Layout, check_steps, make_layer, my_shard, ragged


@check("shape-nc", "input of two dimensions (N, C)", needs="2-D input")
def shape_nc(context: Context) -> None:
    _check_steps(context, (4,))


@check("shape-ncl", "input of three dimensions (N, C, L)", needs="3-D input")
def shape_ncl(context: Context) -> None:
    _check_steps(context, (4, 7))


@check("shape-nchw", "images (N, C, H, W)", needs="4-D input")
def shape_nchw(context: Context) -> None:
    _check_steps(context, (4, 3, 5))


@check("shape-ncdhw", "volumes (N, C, D, H, W)", needs="5-D input")
def shape_ncdhw(context: Context) -> None:
    _check_steps(context, (4, 2, 3, 5))


@check("channels-last", "images in channels-last layout", needs="4-D input")
def channels_last(context: Context) -> None:
    _check_steps(context, (4, 3, 5), channels_last_)


@check("channels-last-3d", "volumes in channels-last layout", needs="5-D input")
def channels_last_3d(context: Context) -> None:
    _check_steps(context, (4, 2, 3, 5), channels_last_)


@check("strided", "input whose elements do not lie side by side in memory")
def strided(context: Context) -> None:
    _check_steps(context, (4, 6), lambda t: torch.cat([t, t + 1], dim=-1)[..., : t.shape[-1]])


@check("expanded-gradient", "an output gradient that is one number, expanded")
def expanded_gradient(context: Context) -> None:
    sizes = ragged(context.world_size)
    batch = random_batch(sum(sizes), (4, 3, 5))
    batch.cotangent.copy_(batch.cotangent[:, :, :1, :1].clone().expand_as(batch.cotangent))
    # Of a mean over H and W torch makes such a gradient; what it is multiplied by varies, or it
    # would have none.
    check_steps(context, [batch], sizes, _mean_over_space)


@check(
    "layout-kept",
    "the output has the input's layout, contiguous or channels last",
    needs="4-D input",
)
def layout_kept(context: Context) -> None:
    sizes = [2] * context.world_size
    layer = make_layer(context, 4, torch.float32)
    x, _, _ = my_shard(context, random_batch(sum(sizes), (4, 3, 5), torch.float32), sizes)
    for name, shard in (("contiguous", x), ("channels-last", channels_last_(x))):
        strides = layer(shard).stride()
        expect(
            strides == shard.stride(),
            f"output of {name} input has strides {strides}, should be {shard.stride()}",
        )


def channels_last_(t: Tensor) -> Tensor:
    """The same values with the channels side by side in memory."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _mean_over_space(layer, x: Tensor, mask: Tensor | None) -> Tensor:
    y = layer(x)
    return y.mean((2, 3), keepdim=True).expand_as(y)


def _check_steps(context: Context, tail: tuple[int, ...], layout: Layout = torch.clone) -> None:
    sizes = ragged(context.world_size)
    check_steps(
        context,
        [random_batch(sum(sizes), tail, seed=seed) for seed in range(2)],
        sizes,
        layout=layout,
    )
