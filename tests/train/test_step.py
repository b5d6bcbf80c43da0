"""A step and an evaluation over several workers."""

import pytest
import torch
from torch import nn

from syncnorm.train.step import learning_rate_factor, mean_loss
from tests.train import runs


def test_mean_loss_is_cross_entropy():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 1])
    assert torch.allclose(mean_loss(logits, labels), nn.functional.cross_entropy(logits, labels))


def test_mean_loss_of_no_samples_is_a_zero_that_reaches_the_parameters():
    layer = nn.Linear(4, 3)
    loss = mean_loss(layer(torch.empty(0, 4)), torch.empty(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.zeros(3, 4))


@pytest.mark.parametrize("count", [7, 2, 1])  # on 3 workers: ragged, one empty, two empty
def test_a_step_is_that_of_one_worker(pool, count):
    (expected_loss, expected), *_ = pool(1).run(runs.one_step, count)
    for loss, parameters in pool(3).run(runs.one_step, count):
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        for got, want in zip(parameters, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_evaluation_counts_every_sample_once(pool, world_size, chunk):
    numbers, labels = [1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 4.0], [1, 0, 1, 1, 0, 0, 1]
    for accuracy, was_left_in_training in pool(world_size).run(runs.evaluate_sign, numbers, labels, chunk):
        assert accuracy == 5 / 7
        assert was_left_in_training


def test_evaluation_with_fewer_samples_than_workers(pool):
    assert [accuracy for accuracy, _ in pool(3).run(runs.evaluate_sign, [1.0], [1], 8)] == [1.0] * 3


def test_learning_rate_rises_then_falls():
    factors = [learning_rate_factor(step, warmup_steps=4, total_steps=12) for step in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5)
    assert factors[12] == pytest.approx(0.0)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_learning_rate_without_warm_up_and_of_a_single_step():
    assert learning_rate_factor(0, warmup_steps=0, total_steps=1) == 1.0


@pytest.mark.parametrize(("shift_by_rank", "different"), [(False, 1), (True, 3)])
def test_digests_tell_workers_apart(pool, shift_by_rank, different):
    first, *others = pool(3).run(runs.digests_of, shift_by_rank)
    assert all(digests == first for digests in others)
    assert len(set(first)) == different
