"""The command `syncnorm verify`: starts local workers, or is one worker of a launcher."""

from collections.abc import Callable, Sequence

import torch.distributed as dist

from syncnorm.errors import ConfigError
from syncnorm.run.env import Launched, read_host, set_for_children
from syncnorm.run.interrupt import as_keyboard_interrupt
from syncnorm.run.joining import join
from syncnorm.testing import leave
from syncnorm.verify import (
    LaunchedRunner,
    LayerUnderTest,
    LocalRunner,
    Report,
    Result,
    layer_under_test,
    ours,
    verify,
)
from syncnorm.verify.check import Check, Verdict
from syncnorm.verify.context import join as join_workers
from syncnorm.verify.report import print_result

_LOCAL_WORKERS = 2


def run_verify(
    workers: int | None,
    layers: Sequence[str],
    deadline_seconds: float,
    json: bool,
    launched: Launched | None,
) -> int:
    """Verify layers and print the results.

    Args:
        workers: number of workers to start; None if a launcher has started them.
        layers: `package:Class`; ours if empty.
        deadline_seconds: for one check.
        json: print one JSON object instead of lines.
        launched: this worker's rank; None outside a launcher.

    Returns:
        The exit status: 1 if a check failed. A worker of a launcher exits instead.

    Raises:
        ConfigError: an argument is invalid.
    """
    tested = [layer_under_test(layer) for layer in layers] or ours()
    if launched is not None:
        if workers is not None:
            raise ConfigError(
                f"`--workers` must be left to the launcher, which started {launched.world_size}, "
                f"got {workers}."
            )
        leave(verify_launched(tested, deadline_seconds, json, launched))
    set_for_children()
    with (
        as_keyboard_interrupt(),
        LocalRunner(workers or _LOCAL_WORKERS, deadline_seconds) as runner,
    ):
        report = verify(runner, tested, _result_printer(json))
    _print_end(report, json)
    return report.exit_status


def verify_launched(
    layers: Sequence[LayerUnderTest], deadline_seconds: float, json: bool, launched: Launched
) -> int:
    """Verify layers as one worker of a launcher; rank 0 prints.

    *Collectives*: those of `verify`; every worker must call.

    Returns:
        The exit status.
    """
    workers = join("auto", launched, deadline_seconds)
    context = join_workers(
        workers.rank, workers.world_size, workers.device, read_host(), deadline_seconds
    )
    report = Report(workers.world_size, dist.get_backend(), workers.device.type)
    show = _result_printer(json) if workers.is_first else id

    def end_after_hang(check: Check, under_test: LayerUnderTest, verdict: Verdict) -> None:
        show(report.add(under_test.reference, check, verdict, deadline_seconds))
        if workers.is_first:
            _print_end(report, json)
        context.leave(after_hang=True)
        leave(1)

    runner = LaunchedRunner(context, dist.get_backend(), end_after_hang)
    verify(runner, layers, show, report=report)
    if workers.is_first:
        _print_end(report, json)
    runner.close()
    return report.exit_status


def _result_printer(json: bool) -> Callable[[Result], object]:
    return id if json else print_result


def _print_end(report: Report, json: bool) -> None:
    print(report.as_json() if json else "\n".join(report.summary()), flush=True)
