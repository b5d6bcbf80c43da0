"""Arguments of the constructor."""

from __future__ import annotations

import torch

from syncnorm.verify.check import check
from syncnorm.verify.compare import expect_close
from syncnorm.verify.context import Context
from syncnorm.verify.oracle import Oracle, random_batch
from syncnorm.verify.steps import check_three_steps, make_layer, my_shard, ragged


@check("momentum-none", "momentum=None averages all batches alike", needs="momentum")
def momentum_none(context: Context) -> None:
    check_three_steps(context, momentum=None)


@check("momentum-one", "momentum=1 keeps the last batch alone", needs="momentum")
def momentum_one(context: Context) -> None:
    check_three_steps(context, momentum=1.0)


@check("large-eps", "eps is added to the variance, inside the root", needs="eps")
def large_eps(context: Context) -> None:
    check_three_steps(context, eps=0.5)


@check("no-affine", "affine=False has no weight and no bias", needs="affine")
def no_affine(context: Context) -> None:
    check_three_steps(context, affine=False)


@check(
    "no-running-stats",
    "track_running_stats=False keeps none, and evaluates by the local batch",
    needs="track_running_stats",
)
def no_running_stats(context: Context) -> None:
    check_three_steps(context, track_running_stats=False)
    sizes = ragged(context.world_size)
    layer = make_layer(context, 4, track_running_stats=False).eval()
    x, _, _ = my_shard(context, random_batch(sum(sizes)), sizes)
    alone = Oracle(context.under_test, 4, {"track_running_stats": False})(x.cpu())
    expect_close(
        f"output of rank {context.rank} in evaluation", layer(x).cpu(), alone, torch.float64
    )
