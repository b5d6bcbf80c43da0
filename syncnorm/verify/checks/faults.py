"""Wrong input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from syncnorm.verify.check import check
from syncnorm.verify.compare import expect, expect_same_bits
from syncnorm.verify.team import Team, describe
from syncnorm.verify.trial import make_layer, my_shard, ragged, take_step
from syncnorm.verify.truth import random_batch


@check(
    "bad-mask",
    "a negative weight on one worker is the same error on all, and nothing was updated",
    needs="mask",
)
def bad_mask(team: Team) -> None:
    sizes = [2] * team.world_size
    layer = make_layer(team, 4)
    x, _, _ = my_shard(team, random_batch(sum(sizes)), sizes)
    mask = torch.ones(2, 1, 5, device=team.device)
    if team.rank == team.world_size - 1:
        mask[1, 0, 2] = -1.0
    before = {name: b.clone() for name, b in layer.named_buffers()}
    raised = _expect_one_error(team, layer, x, mask)
    if raised is None and team.device.type != "cpu":
        return  # documented: on CUDA nobody looks at values, outside of debug mode
    expect(raised is not None, "a negative weight in a mask raises nothing")
    for name, value in layer.named_buffers():
        expect_same_bits(f"{name} of rank {team.rank} after a fault", value, before[name])
    take_step(team, layer, random_batch(sum(sizes)), sizes)


@check("wrong-channels", "a wrong number of channels is an error, and the layer works afterwards")
def wrong_channels(team: Team) -> None:
    _expect_refused(team, (3, 5), "x of 3 channels, to a layer of 4,")


@check(
    "wrong-dimensions",
    "input without a channel dimension is an error, and the layer works afterwards",
)
def wrong_dimensions(team: Team) -> None:
    _expect_refused(team, (), "x of one dimension")


@check(
    "nan-is-seen",
    "NaN in one worker's input reaches every worker's output, in its channel and in no other",
)
def nan_is_seen(team: Team) -> None:
    sizes = [2] * team.world_size
    batch = random_batch(sum(sizes))
    batch.x[-1, 2, 0] = float("nan")
    for rank, step in enumerate(take_step(team, make_layer(team, 4), batch, sizes)):
        is_nan = step.y.isnan().all(2).all(0).tolist()
        others = step.y[:, [0, 1, 3]]
        expect(
            is_nan[2],
            f"output of rank {rank} hides that the input of rank {team.world_size - 1} has a NaN",
        )
        expect(
            bool(others.isfinite().all()),
            f"output of rank {rank} is not finite in channels without NaN",
        )


def _expect_refused(team: Team, tail: tuple[int, ...], what: str) -> None:
    layer = make_layer(team, 4)
    raised = _expect_one_error(
        team, layer, torch.ones(2, *tail, dtype=torch.float64, device=team.device), None
    )
    expect(raised is not None, f"{what} raises nothing")
    sizes = ragged(team.world_size)
    take_step(team, layer, random_batch(sum(sizes)), sizes)


def _expect_one_error(team: Team, layer: nn.Module, x: Tensor, mask: Tensor | None) -> str | None:
    """The error that all workers raise; None if none does."""
    try:
        layer(x) if mask is None else layer(x, mask)
        mine = None
    except Exception as error:  # whatever a layer may raise
        mine = describe(error)
    said = team.gather(mine)
    others = [f"rank {rank}: {text}" for rank, text in enumerate(said)]
    expect(len(set(said)) == 1, f"workers do not raise the same error: {'; '.join(others)}")
    return mine
