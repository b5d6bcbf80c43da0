"""The commands that use what a run has learnt: diagnose, recalibrate, evaluate, predict and more."""

from pathlib import Path
from typing import Annotated

import typer

from syncnorm.errors import ConfigError
from syncnorm.run.arguments import Allow, Device, Workers
from syncnorm.run.env import read_launched
from syncnorm.run.in_process import add_working_folder_to_path

_Run = Annotated[str, typer.Argument(metavar="RUN", help="The folder or the address of a run.")]
_Checkpoint = Annotated[
    str,
    typer.Option(help="newest, best, recalibrated, or a folder's name in the run's checkpoints."),
]


def add_commands(app: typer.Typer) -> None:
    """Add the commands, each of which imports its own work."""
    for command in (recalibrate, evaluate, diagnose, predict, export, merge):
        app.command()(command)


def _prepare(run: str, allow: list[str] | None) -> tuple[Path, tuple[str, ...]]:
    """Find a run's folder, and make code of the user's importable if some is allowed."""
    if allow:
        add_working_folder_to_path()
    return folder_of(run), tuple(allow or ())


def folder_of(run: str) -> Path:
    """Find a run's folder; of a run in a store it is a copy, which is made.

    Raises:
        ConfigError: a store refuses; or a worker of torchrun is given an address, which each of
            them would copy to the same place.
    """
    from syncnorm.train.config.section import is_url

    if not is_url(run):
        return Path(run)
    if read_launched() is not None:
        raise ConfigError(f"under torchrun a run must be named by its folder, got {run!r}")
    from syncnorm.train.storage.fetch import local_copy

    return local_copy(run)


def _check_alone(command: str) -> None:
    """Raise ConfigError on one of several workers, which would all write the same."""
    launched = read_launched()
    if launched is not None and launched.world_size > 1:
        raise ConfigError(
            f"`syncnorm {command}` must run in one process, got {launched.world_size} workers "
            "(WORLD_SIZE). Start it without torchrun, or with RANK unset."
        )


def recalibrate(
    run: _Run,
    mix: Annotated[float, typer.Option(help="Weight of the new statistics, in (0, 1].")] = 1.0,
    allow: Allow = None,
) -> None:
    """Recompute the running statistics of a run on its training set, into a new checkpoint.

    Runs in this process, or as one worker of torchrun. The last line of standard output is the new
    checkpoint; the old one stays.
    """
    from syncnorm.run.recalibrate import run_recalibrate

    folder, allowed = _prepare(run, allow)
    run_recalibrate(folder, mix, allowed, read_launched())


def evaluate(
    run: _Run,
    split: Annotated[
        str | None, typer.Option(help="train, validation or test (default, if there is one).")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Other data: keys of data, such as root=DIR."),
    ] = None,
    workers: Workers = None,
    checkpoint: _Checkpoint = "newest",
    device: Device = "auto",
    statistics: Annotated[
        str,
        typer.Option(
            metavar="WHICH",
            help="What batch norms normalise by: running, batch, mix:0.7 (running ones have this "
            "weight) or prior:16 (they count as so many samples).",
        ),
    ] = "running",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    allow: Allow = None,
) -> None:
    """Compute the metrics of a run's model, on a set of its data or on other data.

    In this process, on workers that it starts, or as one worker of torchrun, with one result.
    """
    from syncnorm.run.evaluate import Request, run_evaluate

    folder, allowed = _prepare(run, allow)
    request = Request(folder, split, data or (), checkpoint, allowed, json, device, statistics)
    run_evaluate(request, workers, read_launched())


def diagnose(
    run: _Run,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Some of statistics, gradients, smoothness, shift, covariate, surface; all if not "
            "given.",
        ),
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Batches to look at, at most.")] = 4,
    workers: Workers = None,
    checkpoint: _Checkpoint = "newest",
    device: Device = "auto",
    allow: Allow = None,
) -> None:
    """Measure how a run trains, and say what stands out: statistics, gradients, loss surface.

    Writes diagnosis.json and diagnosis.html into the run's folder, whose path is the last line of
    standard output; advice comes before it.
    """
    from syncnorm.run.diagnose import Request, run_diagnose

    folder, allowed = _prepare(run, allow)
    names = None if only is None else [name.strip() for name in only.split(",")]
    request = Request(folder, checkpoint, names, batches, allowed, device)
    run_diagnose(request, workers, read_launched())


def predict(
    run: _Run,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE", help="Images, folders of images, .npy or .npz arrays, tables."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help=".jsonl, .csv, .npz (outputs as they are), or a folder for masks.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of classes to list.")] = 1,
    checkpoint: _Checkpoint = "newest",
    allow: Allow = None,
) -> None:
    """Predict files with a run's model.

    A file that cannot be read gets a line on standard error, and the others are predicted all the
    same: exit status 1.
    """
    from syncnorm.run.predict import run_predict

    _check_alone("predict")
    folder, allowed = _prepare(run, allow)
    run_predict(folder, files, output, top, checkpoint, allowed)


def export(
    run: _Run,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help=".safetensors for the weights; .pt2 (torch.export) or .onnx for the network from "
            "raw inputs to outputs.",
        ),
    ],
    checkpoint: _Checkpoint = "newest",
    allow: Allow = None,
) -> None:
    """Write a run's model for programs that do not know syncnorm, with torch's batch norms.

    The last line of standard output is the file.
    """
    from syncnorm.run.in_process import errors_in_one_line
    from syncnorm.train.finished.export import export_model
    from syncnorm.train.finished.load import load

    _check_alone("export")
    folder, allowed = _prepare(run, allow)
    with errors_in_one_line():
        export_model(load(folder, checkpoint=checkpoint, allow=allowed), output)
    print(output)


def merge(
    run: _Run,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="A run of the same model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new run's folder.")],
    alpha: Annotated[float, typer.Option(help="Share of OTHER, in [0, 1].")] = 0.5,
    match: Annotated[bool, typer.Option(help="Put OTHER's channels in the order of RUN's.")] = True,
    allow: Allow = None,
) -> None:
    """Merge two runs' models into a new run, which evaluate, predict and export take.

    Weights are interpolated; running statistics are computed on RUN's training set. Runs in this
    process, or as one worker of torchrun. The last line of standard output is the new folder.
    """
    from syncnorm.run.merge import run_merge

    (first, allowed), (second, _) = _prepare(run, allow), _prepare(other, allow)
    run_merge((first, second), output, alpha, match, allowed, read_launched())
