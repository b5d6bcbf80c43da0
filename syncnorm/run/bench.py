"""The command `syncnorm bench`: checks its arguments, compares layers, writes what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from syncnorm.bench.candidates import candidates
from syncnorm.bench.cases import cases
from syncnorm.bench.report import Report, cores, machine
from syncnorm.bench.runner import Runner
from syncnorm.bench.table import print_case, print_end, print_head
from syncnorm.errors import ConfigError, in_one_line
from syncnorm.run.env import Launched, set_for_children, set_for_nccl, set_for_profiler
from syncnorm.run.errors import RunError
from syncnorm.run.interrupt import as_keyboard_interrupt
from syncnorm.train.files import check_output, write_text_whole

_LOCAL_WORKERS = 2
_FORMATS = (".pdf", ".png", ".svg")


@dataclass(frozen=True)
class Options:
    """The command's options.

    Args:
        workers: to start; None for 2 on a CPU, and for one on each CUDA device.
        device: "cpu" or "cuda".
        batch: samples on each worker.
        layers: `package:Class`.
        only: parts of the names of cases; all if empty.
        compiles: compare compiled layers, too.
        rounds: of a case, at most.
        seconds: for everything, about.
        output, plot: files to write, of all figures and of a picture.
    """

    workers: int | None = None
    device: str = "cpu"
    batch: int = 16
    layers: Sequence[str] = ()
    only: Sequence[str] = ()
    compiles: bool = False
    rounds: int = 31
    seconds: float = 300.0
    output: Path | None = None
    plot: Path | None = None


def run_bench(options: Options, launched: Launched | None) -> None:
    """Compare layers, print a table for each case, and write the files.

    Raises:
        ConfigError: an argument is invalid; raised before a worker is started.
        RunError: a layer failed; raised when everything is written.
    """
    if launched is not None:
        raise ConfigError(
            "`syncnorm bench` starts its own workers, got RANK in the environment. Call it "
            "without a launcher."
        )
    workers = _count_workers(options)
    compared = candidates(options.layers, options.device, options.compiles)
    on = cases(options.batch, options.device, options.only)
    _check_files(options)
    set_for_children()
    set_for_profiler()
    if options.device == "cuda":
        set_for_nccl()
    if options.compiles:
        _check_compiler(options.device)
    report = Report(
        machine=machine(options.device),
        device=options.device,
        backend="nccl" if options.device == "cuda" else "gloo",
        workers=workers,
        cores=cores(),
    )
    print_head(report)
    with as_keyboard_interrupt():
        Runner(report, options.rounds, print_case).run(on, compared, options.seconds)
    print_end(report)
    if options.output is not None:
        text = report.model_dump_json(indent=1) + "\n"
        _write(options.output, lambda path: write_text_whole(path, text))
    if options.plot is not None:
        # Here, because only the picture needs matplotlib, which takes a second.
        from syncnorm.bench.plot import write_plot

        _write(options.plot, lambda path: write_plot(report, path))
    if errors := report.errors():
        raise RunError("; ".join(f"{layer} failed: {e}" for layer, e in errors.items()))
    if not report.cases:
        raise RunError("no case was measured")


def _count_workers(options: Options) -> int:
    if options.device not in ("cpu", "cuda"):
        raise ConfigError(f"`--device` must be cpu or cuda, got {options.device!r}.")
    if options.device == "cpu":
        return options.workers or _LOCAL_WORKERS
    count = torch.cuda.device_count()
    if count == 0:
        raise ConfigError("`--device` must be cpu where there is no CUDA device, got 'cuda'.")
    if (options.workers or 1) > count:
        raise ConfigError(
            f"`--workers` must be at most {count}, a CUDA device for each, got {options.workers}."
        )
    return options.workers or count


def _check_files(options: Options) -> None:
    for name, path in (("--output", options.output), ("--plot", options.plot)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(f"`{name}` must be a file in a folder that exists, got '{path}'.")
        if path is not None:
            check_output(path, name)
    if options.plot is None:
        return
    if options.plot.suffix not in _FORMATS:
        raise ConfigError(f"`--plot` must end with {', '.join(_FORMATS)}, got '{options.plot}'.")
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "`--plot` needs matplotlib. Install it with: pip install 'syncnorm[report]'"
        )


def _check_compiler(device: str) -> None:
    """Compile something small: nothing else tells if torch.compile finds a compiler that works."""
    try:
        torch.compile(torch.sin)(torch.ones(3, device=device))
    except Exception as error:
        cause = in_one_line(error)[:300]
        raise ConfigError(f"`--compile` needs what torch.compile works with, got {cause}") from None


def _write(path: Path, write: Callable[[Path], None]) -> None:
    try:
        write(path)
    except OSError as error:
        raise RunError(f"'{path}' could not be written: {error}") from None
    print(path)
