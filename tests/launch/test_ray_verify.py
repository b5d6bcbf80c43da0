"""`syncnorm verify` on workers of a real Ray cluster of two nodes."""

import json

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'syncnorm[ray]'")

from tests.launch.ray_cluster import PATIENCE_SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5000)]


def test_workers_of_a_cluster_verify(cluster, tmp_path):
    arguments = ["verify", "--workers", "2", "--deadline", "60", "--json"]
    with cluster.started(
        *arguments, "--layer", "syncnorm:SyncBatchNorm", folder=tmp_path
    ) as process:
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, err
    found = json.loads(out)
    assert (found["workers"], found["backend"], found["exit_status"]) == (2, "gloo", 0)
    assert sum(result["status"] == "passed" for result in found["results"]) >= 85

    with cluster.started(
        *arguments, "--layer", "torch.nn:SyncBatchNorm", folder=tmp_path
    ) as process:
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1, err
    assert json.loads(out)["results"][0]["status"] == "failed"
