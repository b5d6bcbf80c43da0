"""The command `syncnorm`. Exit status: 0 done, 1 failed, 2 bad input."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from syncnorm.errors import ConfigError
from syncnorm.run.env import read_launched
from syncnorm.run.local import LocalRunError, run_local
from syncnorm.run.recalibrate import run_recalibrate
from syncnorm.run.worker import run_worker
from syncnorm.train.config_file import load_config

app = typer.Typer(
    name="syncnorm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _syncnorm() -> None:
    """Train a sharded batch as if it were one batch."""


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a packed configuration such as digits.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Replace values, such as train.lr=0.1."),
    ] = None,
) -> None:
    """Train on workers of this machine, or as one worker of torchrun when started by it.

    The last two lines of standard output are the test accuracy and the run's folder.
    """
    arguments = overrides or []
    checked = load_config(config, arguments)
    launched = read_launched()
    name = Path(config).stem
    if launched is None:
        run_local(checked, name, [config, *arguments])
    else:
        run_worker(checked, name, launched)


@app.command()
def recalibrate(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    mix: Annotated[float, typer.Option(help="Weight of the new statistics, in (0, 1].")] = 1.0,
) -> None:
    """Replace a run's running statistics by those of its training set, in a new checkpoint beside the old one.

    In this process, or as one worker of torchrun. The last line of standard output is the new checkpoint.
    """
    run_recalibrate(run, mix, read_launched())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its status.

    Args:
        arguments: without the program's name; those of the process if None.
    """
    try:
        app(args=arguments)
    except ConfigError as error:
        _stop(error, 2)
    except LocalRunError as error:
        _stop(error, 1)


def _stop(error: Exception, status: int) -> None:
    print(f"syncnorm: {error}", file=sys.stderr)
    sys.exit(status)
