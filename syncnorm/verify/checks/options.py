"""Arguments of the constructor."""

from __future__ import annotations

from typing import Any

import torch

from syncnorm.verify.check import check
from syncnorm.verify.compare import expect_close
from syncnorm.verify.team import Team
from syncnorm.verify.trial import make_layer, my_shard, ragged, trial
from syncnorm.verify.truth import Oracle, random_batch


@check("momentum-none", "momentum=None averages all batches alike", needs="momentum")
def momentum_none(team: Team) -> None:
    _trial(team, momentum=None)


@check("momentum-one", "momentum=1 keeps the last batch alone", needs="momentum")
def momentum_one(team: Team) -> None:
    _trial(team, momentum=1.0)


@check("large-eps", "eps is added to the variance, inside the root", needs="eps")
def large_eps(team: Team) -> None:
    _trial(team, eps=0.5)


@check("no-affine", "affine=False has no weight and no bias", needs="affine")
def no_affine(team: Team) -> None:
    _trial(team, affine=False)


@check(
    "no-running-stats",
    "track_running_stats=False keeps none, and evaluates by the local batch",
    needs="track_running_stats",
)
def no_running_stats(team: Team) -> None:
    _trial(team, track_running_stats=False)
    sizes = ragged(team.world_size)
    layer = make_layer(team, 4, track_running_stats=False).eval()
    x, _, _ = my_shard(team, random_batch(sum(sizes)), sizes)
    alone = Oracle(team.subject, 4, {"track_running_stats": False})(x.cpu())
    expect_close(f"output of rank {team.rank} in evaluation", layer(x).cpu(), alone, torch.float64)


def _trial(team: Team, **options: Any) -> None:
    sizes = ragged(team.world_size)
    trial(team, [random_batch(sum(sizes), seed=seed) for seed in range(3)], sizes, **options)
