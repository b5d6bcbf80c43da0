"""`syncnorm verify` on a Ray cluster.

The job's driver is `python -m syncnorm.run.ray.verify WORKERS ARGUMENTS...`. Ray places an actor
for each worker, which runs `syncnorm verify` in a process of its own with torchrun's environment
variables: a check that hangs ends this process and no process of Ray's.
"""

import logging
import shlex
import socket
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from syncnorm.run import env
from syncnorm.run.ray.client import JobSubmissionClient, translated_errors
from syncnorm.run.ray.environment import exclude_patterns
from syncnorm.run.ray.submit import LogLines, follow

_PLACE_SECONDS = 60


def submit_verify(
    client: JobSubmissionClient, workers: int, arguments: Sequence[str], packs_code: bool
) -> int:
    """Submit a verification, print its log, and return its exit status.

    Args:
        client: of the cluster.
        workers: number of workers; each takes a CPU, and a GPU if there is one for each.
        arguments: of `syncnorm verify`.
        packs_code: send the current folder along, because a layer is named.
    """
    name = f"verify-{uuid.uuid4().hex[:8]}"
    environment: dict[str, Any] = {}
    if packs_code:
        here = Path.cwd()
        environment = {"working_dir": str(here), "excludes": exclude_patterns(here)}
    command = ["exec", "python", "-m", "syncnorm.run.ray.verify", str(workers), *arguments]
    with translated_errors(client.get_address()):
        client.submit_job(
            entrypoint=shlex.join(command), submission_id=name, runtime_env=environment
        )
    status = follow(client, name, LogLines(sys.stdout))
    return 1 if status.exit_code is None else status.exit_code


def main(arguments: Sequence[str]) -> int:
    """Place the workers, run the verification, and return the exit status of rank 0."""
    workers = int(arguments[0])
    ray.init(address="auto", logging_level=logging.WARNING)
    has_gpus = ray.cluster_resources().get("GPU", 0) >= workers
    bundle = {"CPU": 1.0, **({"GPU": 1.0} if has_gpus else {})}
    group = placement_group([bundle] * workers, strategy="SPREAD")
    if not group.wait(_PLACE_SECONDS):
        print(
            f"syncnorm: no room for {workers} workers with {bundle} each within {_PLACE_SECONDS} s",
            file=sys.stderr,
        )
        return 1
    hosts: list[Any] = [
        _WorkerHost.options(
            num_cpus=1,
            num_gpus=bundle.get("GPU", 0.0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=rank
            ),
        ).remote()
        for rank in range(workers)
    ]
    host, port = ray.get(hosts[0].address.remote())
    runs = [
        host_actor.run.remote(rank, workers, host, port, has_gpus, arguments[1:])
        for rank, host_actor in enumerate(hosts)
    ]
    # The others end when rank 0 has, or are ended with the job.
    status, out, err = ray.get(runs[0])
    print(out, end="", flush=True)
    print("".join(f"syncnorm: {line}\n" for line in err.splitlines()), end="", file=sys.stderr)
    return status


@ray.remote
class _WorkerHost:
    """Actor that launches one worker on its node."""

    def address(self) -> tuple[str, int]:
        """Return this node's IP address and a free port."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return ray.util.get_node_ip_address(), listener.getsockname()[1]

    def run(
        self,
        rank: int,
        world_size: int,
        host: str,
        port: int,
        has_gpu: bool,
        arguments: Sequence[str],
    ) -> tuple[int, str, str]:
        """Run one worker to its end: exit status, standard output, standard error."""
        done = subprocess.run(
            [sys.executable, "-m", "syncnorm", "verify", *arguments],
            env=env.worker_environment(rank, world_size, host, port, has_gpu),
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr


if __name__ == "__main__":
    from syncnorm.run.ray import verify

    sys.exit(verify.main(sys.argv[1:]))
