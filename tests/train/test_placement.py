"""The placement of a step, checked against the configuration."""

import itertools
from contextlib import suppress

import pytest
from pydantic import ValidationError

from syncnorm import ElasticBatchSampler
from syncnorm.errors import ConfigError, InputError
from syncnorm.train.config.train import TrainSection
from syncnorm.train.workers import place_checked


def test_a_statistic_that_needs_more_samples_at_once_than_allowed_is_refused():
    message = (
        "`launch.micro_batch` must be at least 32 where 64 samples in statistics of at most 64 are "
        r"shared by 2 worker\(s\), got 31"
    )
    with pytest.raises(ConfigError, match=message):
        place_checked(64, 64, 0, 2, 31)
    place_checked(64, 64, 0, 2, 32)


def test_what_a_worker_must_have_at_once_is_of_the_norm_batches_as_they_are_cut():
    """48 samples at 32 a statistic are two of 24."""
    assert place_checked(48, 32, 0, 1, 24).rounds == ((slice(0, 24),), (slice(24, 48),))
    with pytest.raises(ConfigError, match=r"at least 24 where .* got 23"):
        place_checked(48, 32, 0, 1, 23)


def test_the_trainer_and_the_sampler_take_the_same_numbers():
    taken: dict[str, set[tuple[int, ...]]] = {"trainer": set(), "sampler": set()}
    for numbers in itertools.product((4, 6), (1, 2, 3, 4, 5, 6, 7), (1, 2, 3), (1, 2, 3)):
        global_batch, norm_batch, world_size, micro_batch = numbers
        with suppress(ValidationError, ConfigError):
            train = TrainSection(epochs=1, lr=0.1, global_batch=global_batch, norm_batch=norm_batch)
            place_checked(train.global_batch, norm_batch, 0, world_size, micro_batch)
            taken["trainer"].add(numbers)
        with suppress(InputError):
            sampler = ElasticBatchSampler(
                global_batch,
                global_batch,
                norm_batch=norm_batch,
                micro_batch=micro_batch,
                rank=0,
                world_size=world_size,
            )
            assert sampler.rounds
            taken["sampler"].add(numbers)
    assert taken["trainer"] == taken["sampler"]
    assert (6, 3, 1, 3) in taken["trainer"]
