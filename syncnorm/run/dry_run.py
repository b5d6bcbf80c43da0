"""`syncnorm train --dry-run`: one step as one of the workers, without the others."""

import sys
import time
from contextlib import closing
from datetime import timedelta

import torch
import torch.distributed as dist

from syncnorm.comm import exchange
from syncnorm.run.in_process import errors_in_one_line
from syncnorm.run.machine import check_capacity, choose_device
from syncnorm.run.request import RunRequest
from syncnorm.train.config.schema import Config
from syncnorm.train.data.feed import TRAIN
from syncnorm.train.data.regimes import training_order
from syncnorm.train.header import describe_data, describe_model
from syncnorm.train.memory import (
    Need,
    available_bytes,
    check_fits,
    estimate,
    format_bytes,
    peak_memory,
)
from syncnorm.train.setup import (
    Setup,
    check_decides,
    load_feed,
    make_bare_model,
    make_setup,
    task_of,
)
from syncnorm.train.step import StepBatch, training_step
from syncnorm.train.weights import load_weights
from syncnorm.train.workers import Workers
from syncnorm.undocumented import fake_store


def dry_run(request: RunRequest) -> str:
    """Build the model, take one step as the first of `launch.workers`, and describe its costs.

    There are no other workers, and so the loss means nothing: their part of every sum is missing.
    Memory, payloads and this worker's own computation are those of a step.

    Raises:
        ConfigError: the configuration does not fit the machine or the data.
        RunError: code that the configuration names failed.
    """
    config = request.config
    device = choose_device(config.launch.device, 0, config.launch.most_workers)
    note = check_capacity(config.launch, device)
    if note is not None:
        print(f"syncnorm: {note}", file=sys.stderr)
    number = config.launch.most_workers
    workers = Workers(0, number, device, number)
    # A backend of torch's own tests, which sends nothing. A test notices if torch changes it.
    dist.init_process_group(
        "fake",
        store=fake_store(),
        rank=0,
        world_size=workers.world_size,
        timeout=timedelta(seconds=60),
    )
    try:
        with errors_in_one_line():
            return _describe(request, config, workers)
    finally:
        dist.destroy_process_group()


def _describe(request: RunRequest, config: Config, workers: Workers) -> str:
    with closing(load_feed(config, workers.device, request.allowed)) as feed:
        steps_per_epoch = -(-feed.sizes[TRAIN] // config.train.global_batch)
        total_steps = config.train.epochs * steps_per_epoch
        task = task_of(config, workers.device, feed, request.allowed)
        if request.resume is None:
            check_decides(config, task)
        model = make_bare_model(config, workers.device, feed, total_steps, request.allowed)
        need = estimate(config, workers, feed, model, task)
        free = available_bytes(config, workers, 1)
        check_fits(need, free, 0)
        setup = make_setup(config, workers, feed, total_steps, model, task)
        load_weights(setup.model, config.model, workers)
        setup.ddp.register_comm_hook(None, _return_bucket)
        order = training_order(config, feed, 1)
        indices = order[: config.train.global_batch].to(feed.index_device)
        batches = feed.batches(TRAIN, setup.forwards(indices), epoch=1)
        tally = exchange.Tally()
        before = peak_memory(workers.device)
        started = time.perf_counter()
        training_step(setup, batches, StepBatch(indices, 1, 1))
        seconds = time.perf_counter() - started
        totals = {kind: (total.count, total.numbers) for kind, total in tally.take().items()}
        lines = [
            describe_model(setup),
            describe_data(setup, feed),
            f"step: {setup.describe_step()}",
            *_describe_memory(need, free, peak_memory(workers.device) - before),
            f"one step, the first, without waiting for others: {seconds:.2f} s",
            *_describe_messages(setup, totals),
        ]
        return "\n".join(lines)


def _return_bucket(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # pyright: ignore[reportPrivateImportUsage]
    """Return this worker's gradient as the average: the fake backend does not compute one."""
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _describe_memory(need: Need, free: float, grown: int) -> list[str]:
    has = "unknown" if free == float("inf") else format_bytes(free)
    return [
        f"memory: a worker needs about {need}; it has {has}; "
        f"the step took {format_bytes(grown)} more "
        "than before"
    ]


def _describe_messages(setup: Setup, totals: dict[str, tuple[int, int]]) -> list[str]:
    gradients = sum(
        p.numel() * p.element_size() for p in setup.model.parameters() if p.requires_grad
    )
    lines = [f"gradients of parameters: {format_bytes(gradients)} per worker and step"]
    for kind, (count, numbers) in sorted(totals.items()):
        lines.append(
            f"messages of {kind}: {count}, of {8 * numbers / 1024:.2f} KiB in all, per worker and "
            "step"
        )
    return lines
