"""A step and an evaluation over several workers."""

import math
import random
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from syncnorm import rng
from syncnorm.train.average import MovingAverage
from syncnorm.train.buffers import running_digest
from tests.train import runs

# On 3 workers: ragged, one empty, two empty.
COUNTS = [7, 2, 1]


def close(got, want, what):
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.clip=0.1"],
        ["train.ema=0.5"],
        ["train.optimizer.nesterov=true"],
        [
            "norm.name=sync_batch_renorm",
            "norm.renorm.warmup_steps=0",
            "norm.renorm.r_steps=0",
            "norm.renorm.d_steps=0",
        ],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("count", COUNTS)
def test_steps_are_those_of_one_worker(pool, count, overrides):
    (expected, parameters, buffers), *_ = pool(1).run(runs.one_step, count, overrides, 3)
    for result, some, others in pool(3).run(runs.one_step, count, overrides, 3):
        assert result.loss == pytest.approx(expected.loss, rel=1e-12)
        assert (result.grad_norm is None) == (expected.grad_norm is None)
        if expected.grad_norm is not None:
            assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-11)
        close(some, parameters, "parameters")
        close(
            [b.double() for b in others.values()], [b.double() for b in buffers.values()], "buffers"
        )


def test_spectral_norms_make_one_iteration_in_a_step(pool):
    """Whatever number of forwards a worker has, and whether weights are computed again."""
    spectral = [*GROUPS, "norm.weights=spectral_norm"]
    (expected, parameters, buffers), *_ = pool(1).run(runs.one_step, 24, spectral, 3)
    for world_size, options in (
        (1, ["launch.micro_batch=6"]),
        (2, ["launch.micro_batch=6"]),
        (1, ["train.recompute=[layer1]"]),
    ):
        for result, some, others in pool(world_size).run(
            runs.one_step, 24, [*spectral, *options], 3
        ):
            assert result.loss == pytest.approx(expected.loss, rel=1e-12)
            close(some, parameters, "parameters")
            for name, buffer in buffers.items():
                close([others[name].double()], [buffer.double()], name)
    assert any(name.endswith("._u") for name in buffers)


def test_seeding_draws_as_torch_python_and_numpy_do_and_keeps_nothing():
    """torch.manual_seed keeps a stack of each call for each kind of device that is not there."""
    rng.seed_all(7)  # what the first call imports is kept
    torch.manual_seed(7)
    expected = torch.rand(3), random.Random(7).random()
    tracemalloc.start()
    for seed in range(100):
        rng.seed_all(seed)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 10_000
    rng.seed_all(7)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    assert np.random.rand() == np.random.RandomState([6, 0]).rand() != expected[1]


GROUPS = ["train.global_batch=24", "train.norm_batch=6"]


@pytest.mark.parametrize("micro_batch", ["null", "6", "13"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_several_statistics_in_a_step(pool, world_size, micro_batch):
    """24 samples in 4 statistics, side by side or one after the other; and 17 samples in 3."""
    for count in (24, 17):
        (expected, parameters, buffers), *_ = pool(1).run(runs.one_step, count, GROUPS, 2)
        options = [*GROUPS, f"launch.micro_batch={micro_batch}"]
        for result, some, others in pool(world_size).run(runs.one_step, count, options, 2):
            assert result.loss == pytest.approx(expected.loss, rel=1e-12)
            close(some, parameters, "parameters")
            close(
                [b.double() for b in others.values()],
                [b.double() for b in buffers.values()],
                "buffers",
            )


def test_the_size_of_a_statistic_matters(pool):
    """The negative control."""
    losses = [
        pool(1)
        .run(runs.one_step, 24, ["train.global_batch=24", f"train.norm_batch={size}"])[0][0]
        .loss
        for size in (24, 6)
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize(
    "norm", ["norm.sync=running", "norm.sync=lagged", "norm.sync=none", "norm.name=batch_norm"]
)
def test_local_statistics_in_several_rounds(pool, norm):
    sync = ["norm.sync=none", norm] if norm == "norm.name=batch_norm" else [norm]
    options = [*sync, "launch.micro_batch=4"]
    for result, _, buffers in pool(2).run(runs.one_step, 21, options, 2):
        assert math.isfinite(result.loss)
        # torch's layer counts every forward, ours every step.
        assert int(buffers["bn1.num_batches_tracked"]) == (
            6 if norm == "norm.name=batch_norm" else 2
        )


def test_the_average_is_what_is_judged(pool):
    (_, plain, buffers), *_ = pool(1).run(runs.one_step, 7, [], 2)
    (_, averaged, averaged_buffers), *_ = pool(1).run(runs.one_step, 7, ["train.ema=0.5"], 2)
    (_, first, first_buffers), *_ = pool(1).run(runs.one_step, 7, [], 1)
    close(averaged, [(a + b) / 2 for a, b in zip(first, plain, strict=True)], "parameters")
    for name in ("bn1.running_mean", "bn1.running_var"):
        close([averaged_buffers[name]], [(first_buffers[name] + buffers[name]) / 2], name)


def test_the_average_has_torchs_keys_and_bits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
    ours = MovingAverage(model, 0.7)
    for _ in range(3):
        model(torch.randn(5, 3))
        nn.init.normal_(model[0].weight)
        theirs.update_parameters(model)
        ours.update_parameters(model)
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert not torch.equal(expected["module.0.weight"], model[0].weight)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_evaluation_counts_every_sample_once(pool, world_size, chunk):
    numbers, labels = [1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 4.0], [1, 0, 1, 1, 0, 0, 1]
    for metrics, frozen, is_merged in pool(world_size).run(
        runs.evaluate_sign, numbers, labels, chunk
    ):
        assert metrics["accuracy"] == 5 / 7
        assert frozen == ["frozen", "frozen.0"]
        assert not is_merged


def test_evaluation_with_fewer_samples_than_workers(pool):
    assert [
        metrics["accuracy"] for metrics, *_ in pool(3).run(runs.evaluate_sign, [1.0], [1], 8)
    ] == [1.0] * 3


@pytest.mark.parametrize(
    "options", [[], ["launch.micro_batch=2", "train.norm_batch=2"]], ids=["", "rounds"]
)
def test_parameters_without_a_part_in_the_loss_are_left_alone(pool, options):
    """One is used by no sample, one by those of some workers; alike on any number of workers."""
    options = ["model.name=tests.train.nets:Routed", "train.optimizer.weight_decay=0.1", *options]
    _, at_first, _ = pool(1).run(runs.one_step, 12, options, 1)[0]
    _, expected, _ = pool(1).run(runs.one_step, 12, options, 3)[0]
    assert not torch.equal(expected[-4], at_first[-4])
    for world_size in (2, 3):
        for _, parameters, _ in pool(world_size).run(runs.one_step, 12, options, 3):
            close(parameters, expected, "parameters")
            assert torch.equal(parameters[-2], at_first[-2])
            assert torch.equal(parameters[-1], at_first[-1])


def test_a_parameter_that_is_frozen_later_is_left_alone(pool):
    """The workers then agree on who has used which parameter; in other steps nobody asks."""
    for kinds, before, after in pool(2).run(runs.unused_steps, ["train.freeze=[conv1]"]):
        # Frozen from the start, it has no part in the sums of gradients.
        assert kinds == ["notes"]
        assert torch.equal(before[0], after[0])
    for kinds, before, after in pool(2).run(runs.unused_steps, []):
        assert kinds == ["notes", "used parameters"]
        changed = [not torch.equal(*pair) for pair in zip(before, after, strict=True)]
        assert changed == [False] + [True] * (len(before) - 1)


def test_buffers_of_ones_own_are_those_that_plain_ddp_gives(pool):
    model = "tests.train.nets:Remembering"
    expected, expected_buffers = pool(2).run(runs.plain_steps, 12, model, 3)[0]
    first, second = pool(2).run(runs.one_step, 12, [f"model.name={model}"], 3)
    close(first[1], expected, "parameters")
    for name, buffer in expected_buffers.items():
        close([first[2][name].double()], [buffer.double()], name)
        assert torch.equal(first[2][name], second[2][name]), name
    assert first[2]["center"].abs().max() > 0


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_samples_that_one_worker_cannot_read_end_an_evaluation_on_all(pool, statistics):
    first, second = pool(2).run(runs.evaluate_unreadable, statistics)
    assert first == second
    # The test set's batches; the layers of the other worker were not left waiting.
    assert first == ("unreadable (worker 1)", 0 if statistics == "running" else 3)


UNUSED = "loss of step 1, which are left as they are in such steps: unused.weight, unused.bias"
SHARED = "center, shift, is_bright, seen, queue, first"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], []),
        (["model.name=tests.train.nets:Net", "model.options.arrives=frozen"], []),
        (
            ["model.name=tests.train.nets:Net", "model.options.arrives=evaluating"],
            ["is put into training mode"],
        ),
        (
            ["model.name=tests.train.nets:Noisy", "launch.micro_batch=3", "norm.sync=running"],
            ["dropout at dropout: its noise"],
        ),
        (
            ["model.name=tests.train.nets:Backwards"],
            [
                "dropout at dropout: its noise",
                "dropout at 'dropout' runs before 'bn': training statistics hold a variance",
                "batch norm 'last' is the last layer before the loss",
            ],
        ),
        (
            ["model.name=tests.train.nets:Drawing"],
            ["the model or the loss draws random numbers"],
        ),
        (
            ["model.name=tests.train.nets:Routed"],
            [UNUSED],
        ),
        (
            ["model.name=tests.train.nets:Remembering"],
            [f"that training changes: {SHARED}. All workers"],
        ),
    ],
    ids=str,
)
def test_what_a_model_makes_the_trainer_say(pool, options, said):
    for lines in pool(2).run(runs.first_warnings, options):
        assert len(lines) == len(said), lines
        assert all(words in line for words, line in zip(said, lines, strict=True)), lines


@pytest.mark.parametrize(("shift_by_rank", "different"), [(False, 1), (True, 3)])
def test_digests_tell_workers_apart(pool, shift_by_rank, different):
    first, *others = pool(3).run(runs.digests_of, shift_by_rank)
    assert all(digests == first for digests in others)
    assert len(set(first)) == different


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float64, torch.complex64, torch.bool], ids=str
)
def test_a_digest_is_of_buffers_of_any_type(dtype):
    """As autocast may leave them: what it cannot read would end a run that is done as a failure."""
    model = nn.Module()
    for name, shape in (("table", (2, 3)), ("count", ()), ("queue", (0, 3))):
        model.register_buffer(name, torch.ones(shape).to(dtype))
    before = running_digest(model)
    assert running_digest(model) == before
    model.get_buffer("table")[1, 2] = 0
    assert running_digest(model) != before
