"""One Ray cluster for all tests that need no more than a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.ray_cluster import Cluster, local_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes of two CPUs, whose processes find this syncnorm, as machines of a cluster have it
    installed.
    """
    with local_cluster(environment={"PYTHONPATH": str(Path(__file__).parents[2])}) as cluster:
        yield cluster
