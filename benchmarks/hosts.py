"""Exchanges between workers on two hosts, on one level and on two.

    python -m benchmarks.hosts [rounds] [delay in ms ...]

Two network namespaces of this machine are the hosts, with two workers of one thread each. The wire
between them is this program: it reads packets from either side and writes them to the other so many
milliseconds later, so that each round of a collective is late, as on a real link. Needs Linux,
`unshare` and `nsenter` of util-linux, `ip` of iproute2 and /dev/net/tun.

One level is gloo's sum over all four. On two, workers of a host sum over shared memory, and one of
each sums over gloo. Times are medians; a ratio has its 95 % interval.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks import paired, scaling_rank
from syncnorm.comm import exchange, groups, hosts, inflight

WORKERS, OF_A_HOST = 4, 2
SIZES = (130, 1026, 8194, 65538)
CALLS = 5
# From the kernel's headers.
_CLONE_NEWNET, _TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x40000000, 0x400454CA, 0x1, 0x1000


def on_worker(rank: int, store: str, rounds: int) -> None:
    """Take the times of one worker; the first prints them."""
    torch.set_num_threads(1)
    groups.machine_id = lambda: f"host {rank // OF_A_HOST}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORKERS)
    group = groups.statistics_group()
    assert group is not None
    assert hosts.levels_of(group) is not None

    def by_levels(number: int, run: Callable[[], None]) -> Callable[[], None]:
        def on_levels() -> None:
            inflight.log_of(group).is_on_one_level = number == 1
            run()

        return on_levels

    def sums(size: int) -> Callable[[], None]:
        message = torch.zeros(size - 2, dtype=torch.float64)

        def run() -> None:
            for _ in range(CALLS):
                exchange.sum_(message, group, "moments")

        return run

    candidates = {
        f"{number} {size}": by_levels(number, sums(size)) for size in SIZES for number in (1, 2)
    }
    steps = {
        f"{number} step": by_levels(number, scaling_rank.step_of(scaling_rank.wrapped("batch")))
        for number in (1, 2)
    }
    taken = paired.rounds(candidates, rounds, warm_up=2) | paired.rounds(steps, rounds, warm_up=2)
    if rank == 0:
        print(json.dumps(taken), flush=True)
    dist.barrier()


def make_end(number: int) -> tuple[int, int]:
    """Make this thread's namespace a host: open files of its end of the wire, and of itself."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", b"wire", _IFF_TUN | _IFF_NO_PI))
    for command in (
        f"addr add 10.77.0.{number + 1}/24 dev wire",
        "link set lo up",
        "link set wire up",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    return end, os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def forward(ends: tuple[int, int], seconds: float, goes_on: Callable[[], bool]) -> None:
    """Be the wire."""
    queues: list[deque[tuple[float, bytes]]] = [deque(), deque()]
    while goes_on():
        for here, queue in enumerate(queues):
            try:
                while True:
                    packet = os.read(ends[here], 1 << 16)
                    queue.append((time.monotonic() + seconds, packet))
            except BlockingIOError:
                pass
            while queue and queue[0][0] <= time.monotonic():
                os.write(ends[1 - here], queue.popleft()[1])
        due = [queue[0][0] for queue in queues if queue]
        left = max(0.0, min(due) - time.monotonic()) if due else 0.1
        select.select(ends, [], [], left)


def measure(ends: tuple[int, int], spaces: tuple[int, int], delay: float, rounds: int) -> None:
    """Print the rows of one delay."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "wire", "OMP_NUM_THREADS": "1"}
        workers = []
        for rank in range(WORKERS):
            space = f"--net=/proc/{os.getpid()}/fd/{spaces[rank // OF_A_HOST]}"
            command = [sys.executable, "-m", "benchmarks.hosts", "--worker", str(rank)]
            workers.append(
                subprocess.Popen(
                    ["nsenter", space, *command, f"{folder}/store", str(rounds)],
                    stdout=subprocess.PIPE,
                    env=environment,
                    text=True,
                )
            )
        try:
            forward(ends, delay / 1e3, lambda: any(each.poll() is None for each in workers))
        finally:
            for each in workers:
                each.kill()
        said = [each.communicate()[0] for each in workers]
    taken = json.loads(said[0])
    for what in (*SIZES, "step"):
        one, two = taken[f"1 {what}"], taken[f"2 {what}"]
        calls = 1 if what == "step" else CALLS
        times = [f"{1e3 * statistics.median(each) / calls:.2f}" for each in (one, two)]
        print(
            f"| {delay:g} | {what} | {' | '.join(times)} | {paired.ratio(two, one)} |", flush=True
        )


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        on_worker(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
        return
    if Path("/proc/self/uid_map").read_text().split()[2] != "1":
        apart = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-m"]
        os.execvp("unshare", [*apart, "benchmarks.hosts", *sys.argv[1:]])
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 21
    delays = [float(each) for each in sys.argv[2:]] or [0.0, 1.0]
    first, of_first = make_end(0)
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "no second network namespace")
    second, of_second = make_end(1)
    print(f"{WORKERS} workers on 2 hosts, {rounds} rounds; torch {torch.__version__}\n")
    print("| delay of a packet, ms | numbers | one level, ms | two levels, ms | two / one |")
    print("|---|---|---|---|---|")
    for delay in delays:
        measure((first, second), (of_first, of_second), delay, rounds)


if __name__ == "__main__":
    main()
