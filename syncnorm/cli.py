"""The command `syncnorm`. Exit status: 0 done, 1 failed, 2 bad input, 75 stopped and resumable."""

import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from syncnorm import __version__
from syncnorm.errors import ConfigError
from syncnorm.run import use
from syncnorm.run.arguments import Allow, Config, Insecure, Overrides
from syncnorm.run.env import read_launched
from syncnorm.run.errors import RunError
from syncnorm.run.in_process import add_working_folder_to_path
from syncnorm.run.ray import cli
from syncnorm.system import flush_streams, send_nowhere, tell

# Nothing above imports torch, which takes seconds of a core: each command imports its own work.

app: typer.Typer = typer.Typer(
    name="syncnorm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

config_app: typer.Typer = typer.Typer(
    no_args_is_help=True, help="Print a resolved configuration, or the keys and their meaning."
)
app.add_typer(config_app, name="config")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"syncnorm {__version__}")
        raise typer.Exit


@app.callback()
def _syncnorm(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Train a sharded batch as if it were one batch."""


@app.command()
def train(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML file, or the name of a packed configuration such as digits. With "
            "--resume, the run's own if left out.",
        ),
    ] = None,
    overrides: Overrides = None,
    dry: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Take one step without the other workers, print its costs, and stop."
        ),
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Resume the run in this folder, or at this address."),
    ] = None,
    allow: Allow = None,
) -> None:
    """Train on workers of this machine, or as one worker of torchrun when started by it.

    The last two lines of standard output are the metric that decides and the run's folder.
    """
    from syncnorm.run.dry_run import dry_run
    from syncnorm.run.local import run_local
    from syncnorm.run.request import RunRequest
    from syncnorm.run.resume import NoConfigError, choose_config
    from syncnorm.run.worker import run_worker
    from syncnorm.train.config.callables import check_callables
    from syncnorm.train.config.file import check

    try:
        written = choose_config(config, overrides or [], resume)
    except NoConfigError as error:
        raise typer.BadParameter(str(error), param_hint="config") from None
    request = RunRequest(check(written), written.path.stem, resume, tuple(allow or ()))
    check_callables(request.config, request.allowed)
    launched = read_launched()
    if request.allowed:  # else a file here could take the place of a package
        add_working_folder_to_path()
    if dry:
        print(dry_run(request))
    elif launched is None:
        run_local(request)
    else:
        run_worker(request, launched)


use.add_commands(app)


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Folders or addresses of the runs to compare."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Write it again while runs go on; the page reloads itself."),
    ] = False,
) -> None:
    """Write an HTML page about runs: curves, layers, faults, differences of their configurations.

    The page is one file that loads nothing. The last line of standard output is its path.
    """
    from syncnorm.run.interrupt import as_keyboard_interrupt
    from syncnorm.train.config.section import is_url
    from syncnorm.train.files import check_output
    from syncnorm.train.report import watch_report, write_report

    if watch and any(map(is_url, runs)):
        raise ConfigError("`--watch` must be left out for addresses: a copy is made of each, once")
    if output.suffix not in (".html", ".htm"):  # a run's record, say
        raise ConfigError(f"`--output` must end in .html, got {str(output)!r}")
    check_output(output)
    folders = [use.folder_of(run) for run in runs]
    if watch:
        with as_keyboard_interrupt():
            print(watch_report(folders, output))
    else:
        print(write_report(folders, output))


@config_app.command()
def show(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved configuration, with the origin of each value."""
    from syncnorm.train.config.show import show as show_config

    print(show_config(config, overrides or []), end="")


@config_app.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="As Markdown, for docs/config.md.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="As JSON Schema, for editors.")] = False,
) -> None:
    """Print every key with its type, range, default and meaning."""
    from syncnorm.train.config.show import schema as schema_text

    print(schema_text("json" if json else "markdown" if markdown else "text"), end="")


@app.command()
def doctor(run_dir: Annotated[Path, typer.Option(help="The folder for runs.")] = Path()) -> None:
    """Check this machine: versions, devices, memory, network, disk.

    Exit status 1 if a run would fail.
    """
    from syncnorm.run.doctor import check_machine, exit_status, render

    checks = check_machine(run_dir)
    print(render(checks))
    raise typer.Exit(exit_status(checks))


@app.command()
def verify(
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers to start on this machine; 2 if not given.")
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PACKAGE:CLASS",
            help="A layer class to import and verify; syncnorm's own if not given.",
        ),
    ] = None,
    deadline: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Limit of the time for one check.")
    ] = 60.0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    address: Annotated[
        str | None,
        typer.Option(
            help="http(s)://HOST:PORT of a Ray dashboard; starts the workers on its cluster."
        ),
    ] = None,
    insecure: Insecure = False,
) -> None:
    """Compare layers on live workers with the whole batch in float64.

    Starts workers on this machine or on a Ray cluster, or is one worker of torchrun. Any
    synchronised layer can be verified; checks of features that it does not claim are "not offered".
    Exit status 1 if a check fails.
    """
    if address is not None:
        options = [word for name in layer or [] for word in ("--layer", name)]
        options += ["--deadline", f"{deadline:g}", *(["--json"] if json else [])]
        raise typer.Exit(
            cli.verify_on_cluster(address, insecure, workers or 2, options, packs_code=bool(layer))
        )
    from syncnorm.run.verify import run_verify

    if layer:
        add_working_folder_to_path()
    raise typer.Exit(run_verify(workers, layer or [], deadline, json, read_launched()))


@app.command()
def bench(
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Workers to start: 2 if not given, on CUDA as many as there are devices."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[int, typer.Option(min=2, help="Samples on each worker.")] = 16,
    layer: Annotated[
        list[str] | None,
        typer.Option(metavar="PACKAGE:CLASS", help="A layer class to import and compare, too."),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Only cases with this in their name, such as layer, model, resnet18 or 7x7.",
        ),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compare compiled layers, too.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of a case, at most.")] = 31,
    seconds: Annotated[float, typer.Option(min=1, help="Time for everything, about.")] = 300.0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file for all figures, as JSON.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="A picture: .svg, .png or .pdf.")] = None,
) -> None:
    """Compare the speed of normalisation layers on this machine.

    Local, pooled by hand and syncnorm's own in each mode, alone and in training steps, on workers
    that it starts. Exit status 1 if a layer fails.
    """
    from syncnorm.run.bench import Options, run_bench

    if layer:
        add_working_folder_to_path()
    options = Options(
        workers, device, batch, layer or (), case or (), compile, rounds, seconds, output, plot
    )
    run_bench(options, read_launched())


cli.add_commands(app)


class _Command(TyperCommand):
    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        # Typer has braces around what is required; the usual way is to have none.
        pieces = super().collect_usage_pieces(ctx)
        return [piece.replace("{", "").replace("}", "") for piece in pieces]


for _each in (*app.registered_commands, *config_app.registered_commands):
    _each.cls = _Command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its status.

    Args:
        arguments: without the program's name; those of the process if None.
    """
    try:
        try:
            app(args=arguments)
        except SystemExit:
            flush_streams()  # an error shows here, and not when the interpreter ends
            raise
    except ConfigError as error:
        _stop(error, 2)
    except RunError as error:
        _stop(error, error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE) or error.filename is not None:
            raise
        if arguments is None:
            send_nowhere(1)
        if error.errno == errno.EPIPE:
            sys.exit(1)
        _stop(f"what it writes has no room: {error.strerror}", 1)


def _stop(error: Exception | str, status: int) -> None:
    tell(f"syncnorm: {error}")
    sys.exit(status)
