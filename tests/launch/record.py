"""What a run has written, read while it is being written."""

from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from syncnorm.train.metrics import read_events
from tests.launch import commands


class Run:
    """The only run below a folder, or the one of this name, at any time."""

    def __init__(self, folder: Path, name: str = "*") -> None:
        self._folder = folder
        self._name = name

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        records = list(self._folder.glob(f"runs/{self._name}/metrics.jsonl"))
        assert len(records) <= 1, records
        return [
            event
            for record in records
            for event in read_events(record)[0]
            if event["event"] in kinds
        ]

    def groups(self) -> list[int]:
        """The number of workers of all groups so far."""
        return [event["world_size"] for event in self.events("start")]

    def losses(self) -> dict[int, float]:
        """Of each step as it was last taken."""
        return {event["step"]: event["loss"] for event in self.events("step")}

    def has_group(self, number: int, steps: int) -> bool:
        """Whether at least so many groups of workers have been, and the last has made so many
        steps.
        """
        kinds = [event["event"] for event in self.events("start", "step")]
        return kinds.count("start") >= number and kinds[::-1].index("start") >= steps


def undisturbed(folder: Path, options: list[str], seconds: float) -> dict[int, float]:
    """The losses of `syncnorm train` with these options, in a new folder."""
    folder.mkdir()
    with commands.started([*commands.SYNCNORM, "train", *options], folder) as process:
        _, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    return Run(folder).losses()


def run_folder(folder: Path, done: CompletedProcess[str]) -> Path:
    """The run's folder, as the last line names it."""
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


def digests(out: str) -> list[str]:
    """Of the running statistics of each worker, as a command has printed them."""
    return [line.split()[-1] for line in out.splitlines() if "sha256" in line]
