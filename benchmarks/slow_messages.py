"""Time of a training step whose messages arrive late, by normalisation layer.

A part of `python -m benchmarks.scaling`, with 2 workers of one thread each. The delay is injected: a
collective counts as complete so many milliseconds after it was, whoever asks. The sender is not
held up, and one who asks later waits for what is left, or not at all. Each exchange of statistics
is late, and each bucket of gradients of DistributedDataParallel; in a second table the statistics
alone are.

Real links delay a message once for each round of the collective; here it is once for all.
"""

# Annotations are evaluated here: DDP compares those of its hook with the types.
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from benchmarks import paired, scaling_rank
from syncnorm.comm import exchange, shared

DELAYS_MS = (0, 1, 10, 50)
SYNCS = ("local", "running", "lagged", "batch")
WORKERS, BATCH = 2, 32


class Late(dist.Work):
    """A collective that is complete some time after another."""

    def __init__(self, work: dist.Work, seconds: float) -> None:
        super().__init__()
        self.prompt = work
        self._seconds = seconds
        self._arrived: float | None = None
        work.get_future().add_done_callback(lambda _: self.note())

    def note(self) -> None:
        """Begin the delay."""
        self._arrived = time.perf_counter()

    def wait(self, timeout: timedelta = timedelta(minutes=10)) -> bool:
        self.prompt.wait(timeout)
        now = time.perf_counter()
        left = (self._arrived or now) + self._seconds - now
        if left > 0:
            time.sleep(left)
        return True


@contextmanager
def late_sums(seconds: Callable[[], float]) -> Iterator[None]:
    """Have sums of `torch.distributed` arrive late, by what the function returns at each."""
    prompt = dist.all_reduce

    def all_reduce(
        tensor: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
    ) -> dist.Work | None:
        work = prompt(tensor, group=group, async_op=True)
        assert work is not None
        late = Late(work, seconds())
        if async_op:
            return late
        late.wait()
        return None

    # Nothing goes through shared memory, as between machines.
    with (
        mock.patch.object(dist, "all_reduce", all_reduce),
        mock.patch.object(shared, "segment_of", return_value=None),
    ):
        yield


def late_gradients(seconds: float, bucket: dist.GradBucket) -> Future[Tensor]:
    """A communication hook of DDP: the mean over the workers, late."""
    buffer = bucket.buffer().div_(dist.get_world_size())
    # The group's own method: `late_sums` is not to delay it once more.
    sent = dist.group.WORLD.allreduce([buffer]).get_future()
    arrived: Future[Tensor] = Future()

    def arrive(_: Future[object]) -> None:
        threading.Timer(seconds, arrived.set_result, (buffer,)).start()

    if seconds:
        sent.add_done_callback(arrive)
        return arrived
    return sent.then(lambda _: buffer)


def times(
    milliseconds: int, gradients_too: bool, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """On a worker: seconds of each step, and exchanges in a step, by `sync`."""
    seconds = milliseconds / 1e3
    messages: Counter[str] = Counter()

    def counting(sync: str, step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with exchange.record() as made:
                step()
            messages[sync] += len(made)

        return run

    steps = {}
    for sync in SYNCS:
        model = scaling_rank.wrapped(sync)
        model.register_comm_hook(seconds if gradients_too else 0.0, late_gradients)
        steps[sync] = counting(sync, scaling_rank.step_of(model, BATCH))
    with late_sums(lambda: seconds):
        paired.rounds(steps, 3, warm_up=0)
        messages.clear()
        taken = paired.rounds(steps, rounds, warm_up=0)
    return taken, {sync: messages[sync] / rounds for sync in SYNCS}


def measure(rounds: int) -> None:
    """Print the tables."""
    for gradients_too in (True, False):
        what = "each message" if gradients_too else "each message of statistics, none of gradients"
        print(f"step time / local, median [95 % interval]; delay of {what}, {rounds} rounds\n")
        print(f"| delay, ms | local, ms | {' | '.join(SYNCS[1:])} | exchanges in a step |")
        print("|---|---|---|---|---|---|", flush=True)
        for delay in DELAYS_MS if gradients_too else DELAYS_MS[1:]:
            # Shared memory is for workers of one machine, whose messages are not late.
            with scaling_rank.workers(WORKERS, "0") as pool:
                ((taken, messages), *_) = pool.run(times, delay, gradients_too, rounds)
            local = taken["local"]
            ratios = [str(paired.ratio(taken[sync], local)) for sync in SYNCS[1:]]
            counts = ", ".join(f"{messages[sync]:.3g}" for sync in SYNCS[1:])
            print(
                f"| {delay} | {1e3 * statistics.median(local):.0f} | {' | '.join(ratios)} "
                f"| {counts} |",
                flush=True,
            )
        print()
