"""The placement of a step, checked against the configuration."""

import pytest

from syncnorm.errors import ConfigError
from syncnorm.train.placement import place


def test_a_statistic_that_needs_more_samples_at_once_than_allowed_is_refused():
    message = (
        "`launch.micro_batch` must be at least 32 where a statistic of 64 samples is shared by "
        r"2 worker\(s\), got 31"
    )
    with pytest.raises(ConfigError, match=message):
        place(64, 64, 0, 2, 31)
    place(64, 64, 0, 2, 32)


def test_what_a_worker_must_have_at_once_is_of_the_norm_batches_as_they_are_cut():
    """48 samples at 32 a statistic are two of 24."""
    assert place(48, 32, 0, 1, 24).rounds == ((slice(0, 24),), (slice(24, 48),))
    with pytest.raises(ConfigError, match=r"at least 24 where .* got 23"):
        place(48, 32, 0, 1, 23)
