"""Groups of workers: rules, groups, meshes; copies, pickles, other worlds; disagreement."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from syncnorm import (
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    groups,
    prepare_ddp,
    reference,
    scale_loss,
)
from syncnorm.comm import exchange, naming, rules
from syncnorm.comm import groups as live
from syncnorm.comm.groups import statistics_group
from syncnorm.errors import ExchangeError, FaultError, InputError
from syncnorm.testing import RankPool, assert_close
from tests.distributed.steps import (
    Batch,
    Outcome,
    compare,
    make_layer,
    one_step,
    oracle_steps,
    parameters,
)

Shards = list[tuple[Tensor, Tensor, Tensor | None]]


# Rules, without workers.


@pytest.mark.parametrize(
    ("rule", "world_size", "expected"),
    [
        ("world", 3, [(0, 1, 2)]),
        (1, 3, [(0,), (1,), (2,)]),
        (2, 4, [(0, 1), (2, 3)]),
        (4, 4, [(0, 1, 2, 3)]),
        (groups.for_samples(8, 4), 4, [(0, 1), (2, 3)]),
        (groups.for_samples(9, 4), 7, [(0, 1, 2), (3, 4, 5, 6)]),
        (groups.for_samples(9, 4), 4, [(0, 1, 2, 3)]),
        (groups.for_samples(4, 4), 3, [(0,), (1,), (2,)]),
        (groups.for_samples(99, 4), 3, [(0, 1, 2)]),
    ],
    ids=str,
)
def test_parts(rule, world_size, expected):
    assert rules.parts(rule, world_size) == expected


@given(st.integers(1, 100), st.integers(1, 20), st.integers(1, 40))
def test_for_samples_takes_as_few_neighbours_as_hold_them(samples, local_batch_size, world_size):
    parts = rules.parts(groups.for_samples(samples, local_batch_size), world_size)
    assert [rank for part in parts for rank in part] == list(range(world_size))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    if samples <= local_batch_size * world_size:
        assert min(sizes) * local_batch_size >= samples
        # One group more, and some group would be too small.
        assert world_size // (len(parts) + 1) * local_batch_size < samples
    else:
        assert sizes == [world_size]


# Training by them: each group against the oracle on its part of the batch.


@contextmanager
def _on_machines(names: str | None) -> Iterator[None]:
    """Have ranks find themselves on machines of these names, or on this one if None."""
    real = live.machine_id
    live._known.clear()
    if names is not None:
        live.machine_id = lambda: names[dist.get_rank()]
    try:
        yield
    finally:
        live.machine_id = real
        live._known.clear()


def _spec(what: Any) -> groups.Spec:
    """On one rank: a rule as it is; of lists of ranks a group; of "mesh" a row of a mesh."""
    if isinstance(what, list):
        made = [dist.new_group(ranks) for ranks in what]
        return next(
            group for group, ranks in zip(made, what, strict=True) if dist.get_rank() in ranks
        )
    if what == "mesh":
        return init_device_mesh(
            "cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("across", "pair")
        )["pair"]
    return what


def _layer(spec: groups.Spec, **options: Any) -> SyncBatchNorm:
    layer = make_layer(3, process_group=spec, dtype=torch.float64, **options)
    with torch.no_grad():
        for p, value in zip(layer.parameters(), parameters(3, torch.float64), strict=True):
            p.copy_(value)
    return layer


def _train(what: Any, steps: Shards, options: dict[str, Any]) -> list[Outcome]:
    machines = what[3:] if isinstance(what, str) and what.startswith("on ") else None
    with _on_machines(machines):
        layer = _layer(_spec(what if machines is None else "node"), **options)
        return [one_step(layer, *step) for step in steps]


def _by_rank(batches: list[Batch], sizes: list[int]) -> list[Shards]:
    return [list(steps) for steps in zip(*(b.shards(sizes) for b in batches), strict=True)]


def _check_parts(
    got: list[list[Outcome]],
    batches: list[Batch],
    sizes: list[int],
    parts: list[tuple[int, ...]],
    **options: Any,
) -> None:
    """Every group against the oracle on the samples of its members."""
    shards = _by_rank(batches, sizes)
    for part in parts:
        own = [
            Batch(*(torch.cat([shards[r][i][j] for r in part]) for j in (0, 1)))
            for i in range(len(batches))
        ]
        for step, expected in enumerate(oracle_steps(own, options)):
            outcomes = [got[rank][step] for rank in part]
            compare(
                outcomes, expected, torch.float64, [sizes[r] for r in part], f"{part} step {step}"
            )


CASES = [
    (None, [(0, 1, 2)], [4, 1, 3]),
    ("world", [(0, 1, 2)], [4, 1, 3]),
    ("node", [(0, 1)], [4, 1]),
    ("on ABAA", [(0, 2, 3), (1,)], [3, 5, 0, 2]),
    ("on AB", [(0,), (1,)], [3, 5]),
    (2, [(0, 1), (2, 3)], [3, 1, 4, 4]),
    (groups.for_samples(2, 2), [(0,), (1,), (2,)], [4, 3, 3]),
    (groups.for_samples(3, 2), [(0, 1, 2)], [4, 1, 3]),
    ([[0, 1], [2, 3]], [(0, 1), (2, 3)], [3, 1, 0, 4]),
    ([[0, 2], [1]], [(0, 2), (1,)], [3, 4, 2]),
    ("mesh", [(0, 1), (2, 3)], [2, 3, 4, 1]),
]


@pytest.mark.parametrize(("what", "parts", "sizes"), CASES, ids=[str(c[0]) for c in CASES])
@pytest.mark.parametrize("options", [{}, {"bounds": (2.0, 1.0)}], ids=["norm", "renorm"])
def test_each_group_equals_the_oracle_on_its_samples(pool, what, parts, sizes, options):
    batches = [Batch.random((sum(sizes), 3, 5), torch.float64, seed=seed) for seed in (0, 1)]
    got = pool(len(sizes)).run_each(
        _train, [(what, steps, options) for steps in _by_rank(batches, sizes)]
    )
    _check_parts(got, batches, sizes, parts, **options)
    everyone = [tuple(range(len(sizes)))]
    if parts != everyone:
        with pytest.raises(AssertionError):
            _check_parts(got, batches, sizes, everyone, **options)


def _short() -> str:
    with _on_machines(None), pytest.warns(UserWarning, match="more samples than all 2") as caught:
        statistics_group(groups.for_samples(64, local_batch_size=4))
    return str(caught[0].message)


def test_too_few_samples_on_all_workers_are_told(pool):
    assert (
        pool(2).run(_short)
        == [
            "`process_group=for_samples(64, local_batch_size=4)` asks for more samples than all 2 "
            "worker(s) hold "
            "together; they pool what they have."
        ]
        * 2
    )


def _exchanges_of_resolving() -> list[list[str]]:
    found = []
    with _on_machines(None):
        for spec in ("node", "node", 2, "world"):
            with exchange.record() as made:
                statistics_group(spec)
            found.append([one.kind for one in made])
    return found


def test_the_machines_are_asked_once(pool):
    assert pool(2).run(_exchanges_of_resolving) == [[["agreement"] * 2, [], [], []]] * 2


def _errors(specs: list[groups.Spec]) -> list[str]:
    return [_message(lambda spec=spec: statistics_group(spec)) for spec in specs]


def _message(call: Callable[[], object]) -> str:
    try:
        call()
    except (InputError, FaultError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_rules_that_do_not_fit_are_one_error_on_all(pool):
    answers = pool(3).run(_errors, [2, groups.Ranks((0, 7)), groups.Ranks((0, 1, 2))])
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0].startswith(
        "InputError: `process_group` must divide the number of workers, got 2 for 3 worker"
    )
    assert "must hold ranks of the 3 worker(s) that there are, got (0, 7)" in answers[0][1]
    assert answers[0][2] == "no error"


def _mesh_of_two() -> tuple[str, str]:
    named = init_device_mesh("cpu", (2, 2), mesh_dim_names=("across", "pair"))
    return tuple(
        _message(lambda m=m: SyncBatchNorm(3, process_group=m)) for m in (named, named["pair"])
    )


def test_a_mesh_of_two_dimensions_is_refused_by_name(pool):
    for refused, taken in pool(4).run(_mesh_of_two):
        assert (
            "must be a mesh of one dimension, got 2 dimensions ('across', 'pair') of sizes (2, 2)"
            in refused
        )
        assert taken == "no error"


# The order in which groups are made.


def _made_in_order() -> list[list[int]]:
    """A model whose layers pool over crossing parts; the groups as each rank has them."""
    with _on_machines("ABAB"):
        specs: list[groups.Spec] = [
            "node",
            2,
            _spec([[0, 3], [1], [2]]),
            1,
            "node",
            groups.for_samples(6, 2),
        ]
        model = nn.Sequential(*(SyncBatchNorm(3, process_group=spec) for spec in specs))
        prepare_ddp(model)
        model(torch.randn(4, 3, 2)).sum().backward()
        return [live.ranks(statistics_group(spec)) for spec in specs]


def test_crossing_groups_are_made_in_one_order(pool):
    everyone = [0, 1, 2, 3]
    assert pool(4).run(_made_in_order) == [
        [[0, 2], [0, 1], [0, 3], [0], [0, 2], everyone],
        [[1, 3], [0, 1], [1], [1], [1, 3], everyone],
        [[0, 2], [2, 3], [2], [2], [0, 2], everyone],
        [[1, 3], [2, 3], [0, 3], [3], [1, 3], everyone],
    ]


def _made_by_members() -> tuple[str, str, list[int]]:
    """Rank 1 has made a group more than the others.

    The name that torch would give one of 0 and 1, and that it has.
    """
    spec = _spec([[0, 1], [2]])
    count = dist.distributed_c10d._world.group_count
    if dist.get_rank() == 1:
        dist.new_group([1], use_local_synchronization=True)
    with _on_machines(None):
        before = dist.distributed_c10d._hash_ranks_to_str([0, 1])
        SyncBatchNorm(3, process_group=spec)(torch.randn(4, 3))
        made = statistics_group(spec)
    # For torch itself: where this differs, a group that all make together has several names.
    dist.distributed_c10d._world.group_count = count
    return before, made.group_name if made is not None else "", live.ranks(made)


def _splits() -> int:
    """Splits of the default group that are asked for while its ranks but the last make a group."""
    asked, world = [], dist.group.WORLD
    assert world is not None
    among = dist.new_group([0, 1])
    # As init_process_group(device_id=...) sets it.
    world.bound_device_id = torch.device("cuda", dist.get_rank())
    with mock.patch.object(dist.distributed_c10d, "_get_split_source", side_effect=asked.append):
        if dist.get_rank() < 2:
            prepare_ddp(nn.Sequential(SyncBatchNorm(3)), among)(torch.randn(4, 3))
    world.bound_device_id = None
    return len(asked)


def test_a_group_of_some_ranks_asks_nothing_of_the_others():
    """NCCL splits the communicator of a default group with a device together with all its ranks."""
    with RankPool(3) as ranks:
        assert ranks.run(_splits) == [0, 0, 0]


def test_members_that_have_made_different_numbers_of_groups_do_not_wait_for_each_other():
    """Also the test of the undocumented ways to ask for that number and to set it."""
    # Of its own: the kept pool's ranks may have made different numbers of groups before.
    with RankPool(3) as ranks:
        first, second, third = ranks.run(_made_by_members)
    assert first[0] != second[0], "nothing to wait for: torch has one name"
    assert first[1:] == (second[1], [0, 1])
    assert third[1:] == ("", [2])


# Workers that disagree.


def _prepare(what: Any) -> str:
    """prepare_ddp of a model whose second layer is as this rank says."""
    options = (
        what if isinstance(what, dict) else {"process_group": dist.GroupMember.NON_GROUP_MEMBER}
    )
    if not isinstance(what, dict) and what != "outside":
        made = [dist.new_group(list(part)) for part in ((0, 1), (1, 2))]
        options["process_group"] = made[what]
    kind = SyncBatchRenorm if "schedule" in options else SyncBatchNorm
    model = nn.Sequential(SyncBatchNorm(4))
    if not options.pop("is_absent", False):
        model.append(kind(4, **options))
    return _message(lambda: prepare_ddp(model))


def _no_correction(step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones_like(step), torch.zeros_like(step)


LAYERS = "FaultError: `model` must have the same layers in the same order on every worker, got "
WORDS = "FaultError: `process_group` must mean the same workers to each of them, got "


@pytest.mark.parametrize(
    ("whats", "message"),
    [
        ([{"process_group": 3}] * 3, "no error"),
        ([{"process_group": 3}, {"process_group": 1}, {"process_group": 3}],
         WORDS + "3 on rank(s) [0, 2] and 1 on rank(s) [1] in layer '1'. Give each"),
        ([{"process_group": "node"}, {}, {}],
         WORDS + "'node' on rank(s) [0] and 'world' on rank(s) [1, 2] in layer '1'"),
        ([{}, {"process_group": "world"}, {}], "no error"),
        ([0, 0, 1], WORDS + "ranks [0, 1] on rank(s) [0, 1] and ranks [1, 2] on rank(s) [2] in layer '1'"),
        ([0, 0, "outside"],
         WORDS + "ranks [0, 1] on rank(s) [0, 1] and a group without it on rank(s) [2] in layer '1'"),
        ([{"process_group": groups.Ranks((0, 1))}] * 3, WORDS + "ranks [0, 1] on rank(s) [0, 1, 2] in layer '1'"),
        ([{"process_group": groups.Ranks((0, 9))}, {"process_group": 1}, {"process_group": 1}],
         WORDS + "ranks [0, 9] on rank(s) [0] and 1 on rank(s) [1, 2]"),
        ([{"sync": "none"}, {}, {}],
         LAYERS + "1 SyncBatchNorm(4, eps=1e-05, "),
        ([{"sync": "none"}, {}, {}], "sync='none') on rank(s) [0] and 1 SyncBatchNorm(4, eps=1e-05, "),
        ([{"sync": "none"}, {}, {}], "sync='batch') on rank(s) [1, 2] as number 1. Build the model alike"),
        ([{"is_absent": True}, {}, {}], LAYERS + "none on rank(s) [0] and 1 SyncBatchNorm(4, eps=1e-05, "),
        ([{}, {}, {"sync": "running"}], "sync='running') on rank(s) [2] as number 1"),
        ([{}, {"eps": 1e-3}, {}], LAYERS),
        ([{}, {"momentum": 0.2}, {}], LAYERS),
        ([{"sync": "none"}, {"sync": "none"}, {"sync": "none", "track_running_stats": False}], LAYERS),
        ([{"schedule": RenormSchedule()}] * 2 + [{"schedule": RenormSchedule.constant(3.0, 5.0)}], LAYERS),
        ([{"schedule": _no_correction}] * 2 + [{"schedule": RenormSchedule()}],
         "schedule=_no_correction, running_average='std') on rank(s) [0, 1]"),
        ([{"schedule": _no_correction}] * 3, "no error"),
        ([{}, {}, {"dtype": torch.float64}],
         "FaultError: `model` must have the same parameters and buffers on every worker, got "
         "weight float32 (4,), bias float32 (4,), running_mean float32 (4,), running_var float32 (4,), "
         "num_batches_tracked int64 () on rank(s) [0, 1] and weight float64 (4,), bias float64 (4,), "),
        ([{"dtype": torch.float64, "sync": "none"}] + [{"sync": "none"}] * 2, "in layer '1'. Cast and change"),
    ],
    # Not `str`, which of a function gives its address: another one in each process.
    ids=itertools.count(),
)  # fmt: skip
def test_workers_that_disagree_are_one_error_on_all(pool, whats, message):
    if 0 in whats and "outside" in whats:  # making groups is for all
        answers = pool(3).run_each(_prepare_made, [(what,) for what in whats])
    else:
        answers = pool(3).run_each(_prepare, [(what,) for what in whats])
    assert answers[0] == answers[1] == answers[2]
    assert message in answers[0]


def _prepare_made(what: Any) -> str:
    made = [dist.new_group(list(part)) for part in ((0, 1), (1, 2))]
    group = dist.GroupMember.NON_GROUP_MEMBER if what == "outside" else made[what]
    return _message(
        lambda: prepare_ddp(nn.Sequential(SyncBatchNorm(4), SyncBatchNorm(4, process_group=group)))
    )


# The group that prepare_ddp is given.


def _stages(sync: str) -> tuple[Any, ...]:
    """Two pipeline stages of two replicas, that is two models, whose layers name no workers."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "replica"))["replica"]
    rank = dist.get_rank()
    width, number = (4, 1) if rank < 2 else (3, 2)
    norms = (SyncBatchNorm(width, sync=sync, dtype=torch.float64) for _ in range(number))
    stage = prepare_ddp(nn.Sequential(nn.Linear(2, width, dtype=torch.float64), *norms), mesh)
    ddp = DistributedDataParallel(stage, process_group=mesh.get_group())
    x = torch.linspace(rank, 8, 2 * (rank + 2), dtype=torch.float64).view(-1, 2)
    ddp(x).square().mean().backward()
    seen = stage[0](x).detach()
    copied = copy.deepcopy(stage)[1].process_group is mesh
    return live.ranks(statistics_group(stage[1].process_group)), copied, seen, stage[1].running_mean


@pytest.mark.parametrize("sync", ["batch", "running"])
def test_layers_that_name_no_workers_pool_over_the_group_of_prepare_ddp(pool, sync):
    answers = pool(4).run(_stages, sync)
    for ranks in ((0, 1), (2, 3)):
        pooled = torch.cat([answers[rank][2] for rank in ranks])
        for rank in ranks:
            members, copied, seen, mean = answers[rank]
            assert members == list(ranks)
            assert copied
            assert_close(mean, 0.1 * pooled.mean(0), torch.float64, "running_mean")
            assert not torch.allclose(mean, 0.1 * seen.mean(0)), (
                "the replicas must differ for this to say anything"
            )


def _blocks() -> list[nn.Sequential]:
    torch.manual_seed(5)
    return [
        nn.Sequential(nn.Linear(4, 4), SyncBatchNorm(4), nn.ReLU(), nn.Linear(4, 4)).double()
        for _ in range(4)
    ]


def _pipeline(x: Tensor, y: Tensor, count: int) -> dict[int, list[Tensor]]:
    """Take a step of two pipelines, whose replicas have a half of each micro-batch.

    Returns:
        By its number each stage's gradients, summed over the replicas, and its running mean.
    """
    from torch.distributed.pipelining import PipelineStage, ScheduleInterleavedZeroBubble

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "replica"))
    here, replica = mesh["stage"].get_local_rank(), mesh["replica"].get_local_rank()
    x, y = (each.view(count, 2, -1, 4)[:, replica].flatten(0, 1) for each in (x, y))
    like = x[: len(x) // count].detach().clone().requires_grad_()
    blocks = _blocks()
    stages = [
        PipelineStage(
            prepare_ddp(blocks[number], mesh["replica"]),
            number,
            4,
            torch.device("cpu"),
            input_args=(like,),
            output_args=(like,),
            group=mesh["stage"].get_group(),
        )
        for number in (here, here + 2)
    ]
    schedule = ScheduleInterleavedZeroBubble(
        stages, count, loss_fn=lambda y, target: (y * target).sum(), scale_grads=False
    )
    schedule.step(*([x] if here == 0 else []), **({"target": y} if here else {}))
    found = {}
    for number in (here, here + 2):
        grads = [parameter.grad for parameter in blocks[number].parameters()]
        for grad in grads:
            dist.all_reduce(grad, group=mesh["replica"].get_group())
        found[number] = [*grads, blocks[number][1].running_mean]
    return found


def test_a_pipelines_replicas_train_as_one_of_whole_micro_batches(pool):
    """By the schedule that interleaves stages, and takes two backward passes of each."""
    count = 4
    x, y = torch.randn(2, count * 6, 4, dtype=torch.float64, generator=torch.manual_seed(2))
    blocks = _blocks()
    for part, target in zip(x.chunk(count), y.chunk(count)):
        (nn.Sequential(*blocks)(part) * target).sum().backward()
    for found in pool(4).run(_pipeline, x, y, count):
        for number, values in found.items():
            expected = [each.grad for each in blocks[number].parameters()]
            for got, value in zip(values, [*expected, blocks[number][1].running_mean], strict=True):
                torch.testing.assert_close(got, value, rtol=1e-10, atol=1e-10)


def _prepare_among(spec: groups.Spec, group: list[int] | None) -> groups.Spec:
    layer = SyncBatchNorm(4, process_group=spec)
    prepare_ddp(nn.Sequential(layer), None if group is None else dist.new_group(group))
    return layer.process_group


def test_a_group_of_all_workers_or_a_layer_with_its_own_changes_nothing(pool):
    for spec, group in ((None, None), (None, [0, 1]), ("world", [0, 1]), (1, [0, 1])):
        assert pool(2).run(_prepare_among, spec, group) == [spec] * 2


def _wait_in_vain() -> str:
    with pytest.raises(ExchangeError) as caught, naming.explain_absence(range(3)):
        raise dist.DistStoreError("Wait timeout")
    return str(caught.value)


def test_a_group_that_not_all_make_is_named(pool):
    """The error of torch's new_group after the timeout; waiting for it would take as long."""
    for rank, said in enumerate(pool(2).run(_wait_in_vain)):
        assert (
            f"must be made by all of ranks [0, 1, 2], got an error on rank {rank}: Wait timeout. "
            "Ranks" in said
        )


# Copies and pickles.


def _torchs_layer_fails() -> str:
    layer = nn.SyncBatchNorm(3, process_group=dist.new_group([0, 1]))
    try:
        copy.deepcopy(layer)
    except (TypeError, RuntimeError) as error:
        return str(error)
    return "no error"


def test_a_group_in_torchs_layer_cannot_be_copied(pool):
    """Copies of torch's own groups fail; if torch mends that, ours may keep groups plainly."""
    assert all("pickle" in answer for answer in pool(2).run(_torchs_layer_fails))


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),  # noqa: S301 our own
    "averaged": lambda module: AveragedModel(module).module,
}


def _train_on(what: Any, way: str, steps: Shards) -> tuple[list[Outcome], list[bool], str]:
    """A step, a copy, and a step of the copy and of the original."""
    spec = _spec(what)
    layer = _layer(spec)
    first = one_step(layer, *steps[0])
    before = statistics_group(layer.process_group)
    other = WAYS[way](layer)
    facts = [
        layer.process_group is spec,
        other.process_group == spec,
        statistics_group(other.process_group) is before,
    ]
    outcomes = [first, one_step(other, *steps[1])]
    if way != "copy":  # which shares the buffers
        again = one_step(layer, *steps[1])
        facts.append(
            torch.equal(again.y, outcomes[1].y)
            and torch.equal(again.grad_input, outcomes[1].grad_input)
        )
    return outcomes, facts, repr(other)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", [[[0, 1], [2, 3]], "mesh", 2, groups.for_samples(7, 4)], ids=str)
def test_training_goes_on_in_a_copy(pool, what, way):
    sizes, parts = [3, 1, 2, 4], [(0, 1), (2, 3)]
    batches = [Batch.random((sum(sizes), 3, 5), torch.float64, seed=seed) for seed in (2, 3)]
    answers = pool(4).run_each(
        _train_on, [(what, way, steps) for steps in _by_rank(batches, sizes)]
    )
    _check_parts([outcomes for outcomes, _, _ in answers], batches, sizes, parts)
    is_ranks = way == "pickle" and not isinstance(what, int | groups.ForSamples)
    for rank, (_, facts, text) in enumerate(answers):
        assert facts[0], "the layer gives back what it was given"
        assert facts[1] != is_ranks, "what was a group is its ranks in a pickle"
        assert all(facts[2:]), "the same group, and the same bits"
        members = parts[rank // 2]
        shown = f"Ranks(members={members})" if is_ranks else f"ranks {list(members)}"
        assert (
            f"process_group={what if isinstance(what, int | groups.ForSamples) else shown})" in text
        )


class Net(nn.Module):
    """Two layers with the same workers, in two modes."""

    def __init__(self, spec: groups.Spec, sync: str) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = SyncBatchNorm(4, process_group=spec, sync=sync)
        self.last = nn.Linear(4, 2)
        self.end = SyncBatchNorm(2, process_group=spec)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.last(self.norm(self.first(x))))


def _updates(
    model: nn.Module, x: Tensor, target: Tensor, count: int, group: Any = None
) -> dict[str, Tensor]:
    """So many steps of SGD under DDP over the workers of `group`."""
    ddp = DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(count):
        optimizer.zero_grad()
        scale_loss((ddp(x) - target).square().mean(), len(x), group).backward()
        optimizer.step()
    return {k: v.clone() for k, v in model.state_dict().items()}


def _data(counts: list[int], rank: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    x, target = (
        torch.randn(sum(counts), width, generator=g, dtype=torch.float64) for width in (3, 2)
    )
    x = x + torch.linspace(-3, 3, sum(counts), dtype=torch.float64).unsqueeze(1)
    return x.split(counts)[rank], target.split(counts)[rank]


def _net(spec: groups.Spec, sync: str) -> Net:
    torch.manual_seed(7)
    return Net(spec, sync).double()


def _copies_under_ddp(folder: str, sync: str) -> tuple[list[dict[str, Tensor]], bool]:
    """Six steps; three, and three of a copy.

    A deep copy, a loaded one, an average, a copy of the DDP module.
    """
    half = [[0, 1], [2, 3]]
    group, rank = _spec(half), dist.get_rank()
    x, target = _data([3, 1, 2, 4], rank)
    straight = prepare_ddp(_net(group, sync), group)
    states = [_updates(straight, x, target, 6, group)]
    model = prepare_ddp(_net(group, sync), group)
    _updates(model, x, target, 3, group)
    path = Path(folder) / f"{sync}-{rank}.pt"
    torch.save(model, path)
    average = AveragedModel(model)
    copies = [
        copy.deepcopy(model),
        torch.load(path, weights_only=False),
        average.module,
    ]
    shares = all(c.norm.process_group is group for c in (copies[0], copies[2]))
    states += [_updates(each, x, target, 3, group) for each in copies]
    return states, shares


@pytest.mark.parametrize("sync", ["batch", "running", "lagged"])
def test_copies_and_saved_models_go_on_as_the_model_does(pool, sync, tmp_path):
    answers = pool(4).run(_copies_under_ddp, str(tmp_path), sync)
    for rank, (states, shares) in enumerate(answers):
        assert shares
        for state in states[1:]:
            for name, value in state.items():
                assert torch.equal(value, states[0][name]), name
        assert torch.equal(states[0]["first.weight"], answers[rank ^ 1][0][0]["first.weight"]), (
            "one model in a half"
        )
    assert not torch.equal(answers[0][0][0]["first.weight"], answers[2][0][0]["first.weight"]), (
        "another in the other"
    )


def test_a_saved_model_with_groups_equals_the_large_batch(pool, tmp_path):
    """The states of the test above, against one process that has all samples of the half."""
    answers = pool(4).run(_copies_under_ddp, str(tmp_path), "batch")
    for ranks, counts in (((0, 1), [3, 1]), ((2, 3), [2, 4])):
        shards = [_data([3, 1, 2, 4], rank) for rank in ranks]
        x, target = (torch.cat([shard[i] for shard in shards]) for i in (0, 1))
        alone = _net(None, "batch")
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.05)
        running = [reference.RunningStatistics.initial(c) for c in (4, 2)]
        for _ in range(6):
            optimizer.zero_grad()
            h = reference.batch_norm(
                alone.first(x), alone.norm.weight, alone.norm.bias, running=running[0]
            )
            y = reference.batch_norm(
                alone.last(h), alone.end.weight, alone.end.bias, running=running[1]
            )
            (y - target).square().mean().backward()
            optimizer.step()
        for state in answers[ranks[0]][0]:
            for name, p in alone.named_parameters():
                assert_close(state[name], p, torch.float64, name, factor=10.0)
            assert_close(
                state["norm.running_var"], running[0].var, torch.float64, "running_var", factor=10.0
            )
        assert sum(counts) == len(x)


# Other worlds.


def _save(path: str) -> None:
    layer = SyncBatchNorm(3, process_group=_spec([[0, 1], [2, 3]]))
    layer(torch.randn(4, 3))
    torch.save(nn.Sequential(layer), f"{path}/{dist.get_rank()}.pt")


def _load(path: str, of_rank: int | None) -> tuple[str, str]:
    of_rank = dist.get_rank() if of_rank is None else of_rank
    model = torch.load(f"{path}/{of_rank}.pt", weights_only=False)
    return _message(lambda: prepare_ddp(model)(torch.randn(4, 3))), repr(model[0].process_group)


def test_a_saved_group_in_another_process(pool, tmp_path):
    pool(4).run(_save, str(tmp_path))
    # Where those ranks are, it goes on.
    assert pool(4).run(_load, str(tmp_path), None)[3] == ("no error", "Ranks(members=(2, 3))")
    assert pool(2).run(_load, str(tmp_path), None)[1] == ("no error", "Ranks(members=(0, 1))")
    # One worker's file is not everyone's, and ranks 2 and 3 are not among two workers: one error on
    # all.
    for world_size, of_rank, words in (
        (4, 0, "ranks [0, 1] on rank(s) [0, 1, 2, 3]"),
        (2, 2, "ranks [2, 3] on"),
    ):
        answers = pool(world_size).run(_load, str(tmp_path), of_rank)
        assert len(set(answers)) == 1
        assert words in answers[0][0]
        assert answers[0][0].startswith(WORDS)


def test_a_saved_group_without_any_workers(pool, tmp_path):
    pool(4).run(_save, str(tmp_path))
    code = f"""
import torch
model = torch.load({str(tmp_path / "2.pt")!r}, weights_only=False)
print(model.eval()(torch.zeros(1, 3)).shape)
try:
    model.train()(torch.randn(4, 3))
except ValueError as error:
    print(error)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=900
    ).stdout
    assert "torch.Size([1, 3])" in out
    assert (
        "must belong to an initialised torch.distributed, got Ranks(members=(2, 3)) without a "
        "default group" in out
    )


def _resized(path: str, world_size: int) -> list[list[int]]:
    """The same layers before and after torch.distributed is begun anew by the first ranks."""
    specs = ["world", groups.for_samples(4, 2), "node", _spec([[0, 1, 2], [3]]), dist.group.WORLD]
    layers = [SyncBatchNorm(3, process_group=spec) for spec in specs]
    found = []
    for _ in range(2):
        for layer in layers:
            layer(torch.randn(4, 3))
        found.append([live.ranks(statistics_group(layer.workers)) for layer in layers])
        if len(found) == 1:  # once more
            rank = dist.get_rank()
            dist.destroy_process_group()
            if rank >= world_size:
                break
            dist.init_process_group("gloo", f"file://{path}", rank=rank, world_size=world_size)
    return found


def test_rules_are_resolved_anew_for_other_workers(tmp_path):
    with RankPool(4, timeout_seconds=60.0) as ranks:
        answers = ranks.run(_resized, str(tmp_path / "rendezvous"), 3)
    before, after = answers[2]
    assert before == [[0, 1, 2, 3], [2, 3], [0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 3]]
    # Two samples each: of three workers no two groups can be made of two.
    assert after == [[0, 1, 2]] * 5
    assert answers[3] == [[[0, 1, 2, 3], [2, 3], [0, 1, 2, 3], [3], [0, 1, 2, 3]]]


def test_what_a_layer_shows_of_its_workers():
    assert repr(SyncBatchNorm(3)).endswith("sync='batch')")
    assert "sync='batch', process_group='node')" in repr(SyncBatchNorm(3, process_group="node"))
    layer = SyncBatchNorm(3, process_group=groups.for_samples(8, 4))
    assert "process_group=for_samples(8, local_batch_size=4))" in repr(layer)
    layer.process_group = 2
    assert layer.process_group == 2
    assert "process_group=2)" in repr(layer)


def _names_of_handles() -> list[str]:
    first, other = (dist.new_group([0, 1]) for _ in range(2))
    mesh = init_device_mesh("cpu", (2,))
    kept = [live.to_handle(given) for given in (first, first, other, mesh, mesh)]
    return [getattr(handle, "name", "") for handle in kept]


def test_layers_that_are_given_one_group_can_share_compiled_code(pool):
    """Its name is a constant of their graphs; that of another group is another."""
    for names in pool(2).run(_names_of_handles):
        assert names[0] == names[1]
        assert names[3] == names[4]
        assert len({*names}) == 3
