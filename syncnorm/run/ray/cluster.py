"""Capacity check: the CPUs and GPUs of a Ray cluster against the needs of a run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray._private.state import state as _state  # Ray Train asks it the same
from ray.util.state import list_actors

from syncnorm.errors import ConfigError
from syncnorm.train.config.schema import Config


@dataclass(frozen=True)
class Capacity:
    """Workers that fit on a cluster when nothing else runs on it.

    Args:
        workers: of this run.
        is_gpu: each of them has a GPU.
        per_worker: resources that Ray reserves for each.
        totals: of the cluster, in words.
    """

    workers: int
    is_gpu: bool
    per_worker: dict[str, float]
    totals: str


def read_reserved(submission_id: str) -> dict[str, float]:
    """Read what Ray reserves on this node for the driver of a job."""
    name = f"_ray_internal_job_actor_{submission_id}"
    try:
        found: list[Any] = list_actors(
            filters=[("name", "=", name), ("state", "=", "ALIVE")], detail=True
        )
    except Exception:  # whatever keeps the cluster from answering; then the check is less strict
        return {}
    return dict(found[0].required_resources or {}) if found else {}


def read_capacity(config: Config, reserved: Mapping[str, float]) -> Capacity:
    """Count the workers that fit on the connected cluster's nodes, busy or not.

    Args:
        config: of the run.
        reserved: on this node, for its driver.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = [
        _without(node["Resources"], reserved) if node["NodeID"] == here else node["Resources"]
        for node in ray.nodes()
        if node["Alive"]
    ]
    if limits := _state.get_max_resources_from_cluster_config():
        # An autoscaler may add nodes; of what sizes is its affair.
        nodes = [_without(limits, reserved)]
    capacity = capacity_of(nodes, config.launch.device, config.launch.fewest_workers)
    besides = " besides the driver's" if reserved else ""
    return replace(capacity, totals=capacity.totals + besides)


def capacity_of(nodes: Sequence[Mapping[str, float]], device: str, fewest: int) -> Capacity:
    """Count the workers that fit on nodes with these resources.

    Args:
        nodes: resources of each, as Ray names them.
        device: cuda: a GPU for each worker; cpu: none; auto: if there is one for each of the
            fewest.
        fewest: workers that there must be.
    """
    with_gpu = {"CPU": 1.0, "GPU": 1.0}
    is_gpu = device == "cuda" or (device == "auto" and _fit(nodes, with_gpu) >= fewest)
    per_worker = with_gpu if is_gpu else {"CPU": 1.0}
    totals = " and ".join(
        f"{sum(node.get(name, 0) for node in nodes):g} {name}s" for name in ("CPU", "GPU")
    )
    return Capacity(
        _fit(nodes, per_worker), is_gpu, per_worker, f"{totals} on {len(nodes)} node(s)"
    )


def check_capacity(config: Config, capacity: Capacity) -> None:
    """Refuse a run that the cluster can never place: Ray would wait without a message.

    Raises:
        ConfigError: with the numbers.
    """
    fewest = config.launch.fewest_workers
    if capacity.workers < fewest:
        each = " and ".join(f"{number:g} {name}" for name, number in capacity.per_worker.items())
        raise ConfigError(
            f"`launch.workers` must be at most {capacity.workers} on this cluster, which has "
            f"{capacity.totals}, got {fewest}: each takes {each} of one node. Take fewer, or add "
            "nodes first."
        )


def _without(node: Mapping[str, float], reserved: Mapping[str, float]) -> dict[str, float]:
    return {name: number - reserved.get(name, 0) for name, number in node.items()}


def _fit(nodes: Sequence[Mapping[str, float]], per_worker: Mapping[str, float]) -> int:
    return sum(
        min(math.floor(node.get(name, 0) / number) for name, number in per_worker.items())
        for node in nodes
    )
