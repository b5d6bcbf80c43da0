"""ElasticBatchSampler: the same steps on any number of workers, in a loop of one's own."""

from __future__ import annotations

import copy
import io
import re
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from syncnorm import (
    ElasticBatchSampler,
    SyncBatchNorm,
    SyncBatchRenorm,
    accumulate,
    prepare_ddp,
    recalibrate,
)
from syncnorm.comm import exchange
from syncnorm.errors import FaultError, InputError, UnevenShardsWarning
from syncnorm.placement import epoch_order
from tests.model.elastic import gap, train, train_alone

OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "side by side": {"norm_batch": 4},
    "rounds": {"norm_batch": 6, "micro_batch": 6},
}
# Eight epochs.
STEPS = 40


def samplers(size: int, global_batch: int, world_size: int, **options: Any) -> list[Any]:
    return [
        ElasticBatchSampler(size, global_batch, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


@given(
    size=st.integers(1, 60),
    norm_batch=st.integers(1, 10),
    statistics=st.none() | st.integers(1, 6),
    micro_batch=st.none() | st.integers(1, 30),
    world_size=st.integers(1, 6),
)
def test_each_step_has_the_same_samples(size, norm_batch, statistics, micro_batch, world_size):
    global_batch = norm_batch * (statistics or 1)
    options = {"norm_batch": norm_batch if statistics else None}
    options["micro_batch"] = micro_batch and max(micro_batch, options["norm_batch"] or global_batch)
    workers = samplers(size, global_batch, world_size, **options)
    (rounds,) = {each.rounds for each in workers}
    drawn = [list(each) for each in workers]
    assert {len(batches) for batches in drawn} == {len(workers[0])}
    for indices in epoch_order(size, 0, 1).split(global_batch):
        step = []
        for number in range(rounds):
            assert {each.ends_step for each in workers} == {number == rounds - 1}
            for each, batches in zip(workers, drawn, strict=True):
                batch = batches.pop(0)
                assert len(batch) <= ((micro_batch and options["micro_batch"]) or size)
                assert each.count == len(batch) or (each.count == 0 and len(batch) == 1)
                step += batch[: each.count]
                each.advance()
        assert sorted(step) == sorted(indices.tolist())
    assert all((each.epoch, each.step) == (1, 0) for each in workers)


def test_the_cursor_counts_what_is_done_not_what_is_drawn():
    (sampler,) = samplers(10, 4, 1)
    epoch = list(sampler)
    assert (sampler.epoch, sampler.step) == (0, 0)
    sampler.advance()
    assert list(sampler) == epoch[1:]
    assert len(sampler) == 3
    (other,) = samplers(10, 4, 1)
    other.load_state_dict(sampler.state_dict())
    assert list(other) == epoch[1:]
    other.advance()
    other.advance()
    assert (other.epoch, other.step) == (1, 0)
    assert list(other) not in (epoch, epoch[1:])


@pytest.fixture(scope="module")
def whole(pool):
    """Steps of each kind on one worker."""
    return {name: pool(1).run(train, options, STEPS)[0] for name, options in OPTIONS.items()}


def test_whole_batches_train_as_torch_does(whole):
    assert gap(whole["whole"], train_alone(STEPS)) <= 1e-12
    # The negative control: statistics over other samples are another curve.
    assert gap(whole["side by side"], whole["whole"]) > 1e-3


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_curve_is_the_same_on_any_number_of_workers(pool, whole, world_size, name):
    results = pool(world_size).run(train, OPTIONS[name], STEPS)
    assert max(gap(each, whole[name]) for each in results) <= 1e-12
    # Stand-ins took part where the last step of an epoch has fewer samples than workers.
    assert (0 in results[-1].drawn) == (world_size > 2)


@pytest.mark.parametrize("name", OPTIONS)
def test_stopped_on_four_workers_it_goes_on_with_three_and_two(pool, whole, name):
    # In the middle of an epoch, and with samples that loaders have fetched ahead.
    first = pool(4).run(train, OPTIONS[name], 13, None, 1)[0]
    assert first.sampler["step"] == 13 % 5
    for world_size in (3, 2):
        last = pool(world_size).run(train, OPTIONS[name], STEPS - 13, first, 1)[0]
        joined = last._replace(losses=first.losses + last.losses)
        assert gap(joined, whole[name]) <= 1e-12


@pytest.mark.parametrize("sync", ["running", "lagged"])
def test_a_stand_in_has_no_weight_in_other_modes(pool, sync):
    """Their running statistics are those of the step's samples, each once."""
    results = pool(4).run(_last_step, sync)
    x = torch.cat([x for x, _ in results])
    assert len(x) == 2
    for _, mean in results:
        assert torch.allclose(mean, x.mean((0, 2)), atol=1e-14, rtol=0)


def _last_step(sync: str) -> tuple[Tensor, Tensor]:
    """On the last step, of 2 samples: this worker's, and the running mean."""
    g = torch.Generator().manual_seed(0)
    data = torch.randn(6, 3, 5, generator=g, dtype=torch.float64)
    sampler = ElasticBatchSampler(6, 4)
    sampler.load_state_dict(sampler.state_dict() | {"step": 1})
    layer = SyncBatchNorm(3, sync=sync, momentum=1.0, dtype=torch.float64)
    model = sampler.attach(prepare_ddp(nn.Sequential(layer)))
    (indices,) = sampler
    x = data[indices]
    sampler.scale_loss(model(x).square().mean()).backward()
    return x[: sampler.count], layer.running_mean.clone()


def _warnings() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train({}, 5)
    return [str(w.message) for w in caught if issubclass(w.category, UnevenShardsWarning)]


def test_scaled_losses_are_not_warned_of(pool):
    assert pool(3).run(_warnings) == [[]] * 3


def _kinds(options: dict[str, Any]) -> list[str]:
    """The exchanges of a step, without DDP's."""
    sampler = ElasticBatchSampler(12, 12, **options)
    model = sampler.attach(prepare_ddp(nn.Sequential(SyncBatchNorm(3, dtype=torch.float64))))
    with exchange.record() as record:
        for indices in sampler:
            x = torch.ones(len(indices), 3, dtype=torch.float64)
            sampler.scale_loss(model(x).mean()).backward()
            sampler.advance()
    return [one.kind for one in record]


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, ["moments", "gradients"]),
        ({"norm_batch": 6}, ["all moments"]),
        ({"norm_batch": 3, "micro_batch": 3}, ["all moments"]),
        # In turn over both workers.
        ({"norm_batch": 4, "micro_batch": 4}, ["all moments"]),
    ],
)
def test_exchanges_of_a_step(pool, options, kinds):
    assert pool(2).run(_kinds, options) == [kinds] * 2


def _copies() -> list[bool]:
    """A copy takes the batches of the same sampler; what was pickled can be attached anew."""
    sampler = ElasticBatchSampler(12, 12, norm_batch=2)
    layer = SyncBatchNorm(3, dtype=torch.float64)
    model = sampler.attach(prepare_ddp(nn.Sequential(layer)))
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(sampler.count, 3, dtype=torch.float64)
    expected = model(x)
    sampler.attach(loaded)
    # Replaced: of the hooks of two samplers the older would win.
    whole = ElasticBatchSampler(12, 12).attach(copy.deepcopy(model))
    return [
        torch.equal(expected, twin(x)),
        torch.equal(expected, loaded(x)),
        torch.equal(expected, whole(x)),
        len(whole._forward_pre_hooks) == 1,
    ]


def test_models_with_a_sampler_can_be_copied_and_pickled(pool):
    assert pool(2).run(_copies) == [[True, True, False, True]] * 2


def _loaded(norm_batch: int | None) -> tuple[Tensor, Tensor]:
    """A model that was pickled at a step with a stand-in, and trains on batches of a loader."""
    sampler = ElasticBatchSampler(5, 4, norm_batch=norm_batch)
    model = sampler.attach(prepare_ddp(nn.Sequential(SyncBatchNorm(3, dtype=torch.float64))))
    model(torch.randn(sampler.count, 3, dtype=torch.float64))
    sampler.advance()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = prepare_ddp(torch.load(file, weights_only=False))
    torch.manual_seed(dist.get_rank())
    x = torch.randn(4, 3, dtype=torch.float64) + 10 * dist.get_rank()
    y = loaded(x)
    assert not loaded._forward_pre_hooks or norm_batch is None
    return x, y


@pytest.mark.parametrize("norm_batch", [None, 1])
def test_a_model_that_was_pickled_trains_on_other_batches(pool, norm_batch):
    x, y = (torch.cat(each) for each in zip(*pool(2).run(_loaded, norm_batch), strict=True))
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True))


def _other_forwards() -> tuple[Tensor, Tensor, int]:
    """Forwards that are of no batch, while the cursor is at one with stand-ins."""
    torch.manual_seed(dist.get_rank())
    sampler = ElasticBatchSampler(2, 2)
    layer = SyncBatchNorm(3, dtype=torch.float64)
    model = sampler.attach(prepare_ddp(nn.Sequential(layer)))
    x = torch.randn(8, 3, dtype=torch.float64)
    recalibrate(model, [x])
    everything = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(everything, x)
    return layer.running_mean.clone(), torch.cat(everything).mean(0), sampler.count


def test_forwards_of_other_data_have_their_weight(pool):
    results = pool(3).run(_other_forwards)
    assert [count for *_, count in results] == [1, 1, 0]
    for got, expected, _ in results:
        assert torch.allclose(got, expected, atol=1e-14)


def _compiled() -> tuple[Tensor, Tensor]:
    """Running means of a compiled model and of the same, over a step with stand-ins and one without."""
    g = torch.Generator().manual_seed(0)
    data = torch.randn(5, 3, generator=g, dtype=torch.float64)
    means = []
    for is_compiled in (False, True):
        sampler = ElasticBatchSampler(5, 4, shuffle=False)
        layer = SyncBatchNorm(3, dtype=torch.float64)
        model = sampler.attach(prepare_ddp(nn.Sequential(layer)))
        if is_compiled:
            model.compile(backend="eager")
        for indices in sampler:
            sampler.scale_loss(model(data[indices]).square().mean()).backward()
            sampler.advance()
        means.append(layer.running_mean.clone())
    return means[0], means[1]


def test_a_compiled_model_knows_its_stand_ins(pool):
    for plain, compiled in pool(2).run(_compiled):
        assert torch.allclose(plain, compiled, atol=1e-14)


def _attach_error(by_rank: list[dict[str, Any]]) -> str:
    options = {"size": 12, "global_batch": 6} | by_rank[dist.get_rank()]
    try:
        ElasticBatchSampler(**options).attach(prepare_ddp(nn.Sequential(SyncBatchNorm(3))))
    except FaultError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("by_rank", "words"),
    [
        ([{}, {"seed": 1}], "made alike on every worker, got size=12, global_batch=6"),
        ([{}, {"size": 13}], "and size=13, global_batch=6"),
        ([{}, {"rank": 0, "world_size": 2}], "got rank 0 of 2 on rank 1 of 2"),
        ([{"rank": 0, "world_size": 1}] * 2, "got rank 0 of 1 on rank 0 of 2"),
    ],
)
def test_workers_whose_samplers_differ_are_one_error_on_all(pool, by_rank, words):
    one, other = pool(2).run(_attach_error, by_rank)
    assert one == other
    assert words in one


def one_layer(**options: Any) -> nn.Module:
    return nn.Sequential(SyncBatchNorm(3, **options))


SAMPLER = {"size": 9, "global_batch": 4}
ERRORS = [
    (lambda: ElasticBatchSampler(0, 4), "`size` must be a whole number, at least 1, got 0"),
    (lambda: ElasticBatchSampler(9, 0), "`global_batch` must be a whole number, at least 1, got 0"),
    *(
        (
            partial(ElasticBatchSampler, 9, 4, norm_batch=wrong),
            f"`norm_batch` must be a divisor of global_batch = 4, got {wrong}. A step",
        )
        for wrong in (-2, 0, 3, 5)
    ),
    (
        lambda: ElasticBatchSampler(9, 4, micro_batch=0),
        "`micro_batch` must be a whole number, at least 1, got 0",
    ),
    (lambda: ElasticBatchSampler(9.0, 4), "`size` must be a whole number, at least 1, got 9.0"),
    (lambda: ElasticBatchSampler(9, 4, norm_batch=2.0), "`norm_batch` must be a whole number"),
    (lambda: ElasticBatchSampler(9, 4, seed="a"), "`seed` must be a whole number, got 'a'"),
    (
        lambda: ElasticBatchSampler(9, 4).load_state_dict(None),
        "`state_dict` must be of an ElasticBatchSampler, got one without",
    ),
    (lambda: ElasticBatchSampler(9, 4, rank=1), "must be given together, got one of them"),
    (lambda: ElasticBatchSampler(9, 4, rank=2, world_size=2), "`rank` must be from 0 to 1, got 2"),
    (
        lambda: list(ElasticBatchSampler(9, 4, micro_batch=1, rank=0, world_size=2)),
        "`micro_batch` must be at least 2 where 4 samples in statistics of at most 4 are shared by "
        "2 worker(s), got 1",
    ),
    (
        # Of the last step, known before the first: 3 statistics on 4 workers are shared by all,
        # and 2 by two each.
        lambda: list(
            ElasticBatchSampler(40, 24, norm_batch=8, micro_batch=3, rank=0, world_size=4)
        ),
        "`micro_batch` must be at least 4 where 16 samples in statistics of at most 8 are shared",
    ),
    (
        lambda: ElasticBatchSampler(9, 4, norm_batch=2).attach(one_layer(sync="none")),
        'with `norm_batch` layers must have sync="batch" and pool over all workers, got '
        "sync='none' and process_group=None in '0'",
    ),
    (
        lambda: ElasticBatchSampler(9, 4, norm_batch=2).attach(one_layer(process_group="node")),
        "got sync='batch' and process_group='node' in '0'",
    ),
    (
        lambda: ElasticBatchSampler(9, 4, norm_batch=2).scale_loss(torch.zeros(())),
        "`attach` must be called with the model before it is trained with norm_batch",
    ),
    (
        lambda: ElasticBatchSampler(1, 4, rank=0, world_size=2).scale_loss(torch.zeros(())),
        "in a step of 1 sample(s) on 2 workers, some of which have none",
    ),
    (
        lambda: ElasticBatchSampler(9, 4).load_state_dict({"seed": 0}),
        "got one without ['epoch', 'global_batch', 'norm_batch', 'shuffle', 'size', 'step']",
    ),
    (
        lambda: ElasticBatchSampler(9, 4, seed=1).load_state_dict(
            ElasticBatchSampler(8, 4).state_dict()
        ),
        "got size=8 where this one has 9, seed=0 where this one has 1",
    ),
    (
        lambda: ElasticBatchSampler(9, 4).load_state_dict(
            ElasticBatchSampler(9, 4).state_dict() | {"step": 3}
        ),
        "a whole step from 0 to 2 of an epoch from 0 on, got step 3 of epoch 0",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[m for _, m in ERRORS])
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(InputError, match=re.escape(message)):
        call()


def test_a_loop_that_does_not_advance_is_told_so():
    (sampler,) = samplers(8, 4, 1)
    for _ in range(2):  # looking at the data is no training
        list(sampler)
    for _ in sampler:
        sampler.scale_loss(torch.zeros(()))
    with pytest.raises(InputError, match="`advance` must be called after each batch"):
        next(iter(sampler))
    # Without `scale_loss`, the forwards of a model that is attached tell.
    sampler.load_state_dict(sampler.state_dict())
    model, data = sampler.attach(one_layer()), torch.randn(8, 3)
    model.eval()
    for _ in range(2):
        for indices in sampler:
            model(data[indices])
    model.train()
    for indices in sampler:
        model(data[indices])
    with pytest.raises(InputError, match="`advance` must be called after each batch"):
        next(iter(sampler))


def test_a_step_of_several_rounds_is_one_update(pool):
    (one,), (other,) = pool(1).run(_rounds_by_hand, False), pool(1).run(_rounds_by_hand, True)
    for key, value in other.items():
        assert torch.allclose(one[key], value, atol=1e-14, rtol=0)
    assert int(one["0.num_batches_tracked"]) == 2


def _two_views(evaluates: bool) -> tuple[dict[str, Tensor], list[list[float]]]:
    """An epoch of two forwards a step, or of one and a look at the statistics before `advance`."""
    data = torch.randn(24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data += torch.arange(24.0)[:, None]
    sampler = ElasticBatchSampler(24, 8, norm_batch=2, micro_batch=2, shuffle=False)
    model = sampler.attach(prepare_ddp(nn.Sequential(SyncBatchRenorm(3, dtype=torch.float64))))
    seen: list[list[float]] = []
    while sampler.epoch < 1:
        for indices in sampler:
            model(data[indices])
            if not evaluates:
                model(2 * data[indices])
            elif sampler.ends_step:
                seen.append(model.eval()(torch.ones(1, 3).double())[0].tolist())
                model.train()
            sampler.advance()
    return model.state_dict(), seen


@pytest.mark.parametrize("evaluates", [False, True])
def test_several_forwards_of_a_batch_are_one_update_on_any_number_of_workers(pool, evaluates):
    (one, seen), *_ = pool(1).run(_two_views, evaluates)
    assert int(one["0.num_batches_tracked"]) == 3
    for world_size in (2, 4):
        for state, looks in pool(world_size).run(_two_views, evaluates):
            assert torch.allclose(torch.tensor(looks), torch.tensor(seen), atol=1e-12)
            for key, value in one.items():
                assert torch.allclose(state[key], value, atol=1e-12, rtol=0), key


class _FailsOnce(nn.Module):
    """Between two layers."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise ValueError("no memory")
        return x


def _retried(at: int) -> dict[str, Tensor]:
    data = torch.randn(24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data += torch.arange(24.0)[:, None]
    sampler = ElasticBatchSampler(24, 8, norm_batch=2, micro_batch=2, shuffle=False)
    a, b = (SyncBatchNorm(3, dtype=torch.float64) for _ in range(2))
    model = sampler.attach(prepare_ddp(nn.Sequential(a, _FailsOnce(at), b)))
    for indices in sampler:
        try:
            model(data[indices])
        except ValueError:
            model(data[indices])
        sampler.advance()
    return model.state_dict()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_forward_that_raises_is_no_part_of_its_step(pool, world_size):
    (expected,) = pool(1).run(_retried, 0)
    for state in pool(world_size).run(_retried, 2):
        for key, value in expected.items():
            assert torch.allclose(state[key], value, atol=1e-12, rtol=0), key


def _rounds_by_hand(is_attached: bool) -> dict[str, Tensor]:
    """Two steps, by a sampler or by `accumulate`; with it a first one that broke off and came again."""
    data = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = prepare_ddp(nn.Sequential(SyncBatchRenorm(3, dtype=torch.float64)))
    if not is_attached:
        for step in data.split(4):
            with accumulate(model):
                for part in step.split(2):
                    model(part)
        return model.state_dict()
    sampler = ElasticBatchSampler(8, 4, norm_batch=2, micro_batch=2, shuffle=False)
    sampler.attach(model)
    model(data[next(iter(sampler))])
    for indices in sampler:
        model(data[indices])
        sampler.advance()
    return model.state_dict()
