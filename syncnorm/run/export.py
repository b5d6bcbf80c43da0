"""The command `syncnorm export`."""

from pathlib import Path

from syncnorm.run.in_process import errors_in_one_line
from syncnorm.train.finished.export import export_model
from syncnorm.train.finished.load import load


def run_export(run: Path, output: Path, checkpoint: str, allowed: tuple[str, ...]) -> None:
    """Write the model of a run to a file, and print the file's path.

    Raises:
        ConfigError: see `load` and `export_model`.
        LocalRunError: code that the configuration names failed.
    """
    with errors_in_one_line():
        export_model(load(run, checkpoint=checkpoint, allow=allowed), output)
    print(output)
