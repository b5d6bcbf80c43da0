"""The tutorial's scripts run on live workers, and print what it says."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.launch import commands

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "tutorial.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
TOLERANCE = 3.0  # per cent: other machines round otherwise


def steps() -> list[tuple[dict[str, str], str, str]]:
    """Each command with the files that are there by then, and what it is said to print."""
    found: list[tuple[dict[str, str], str, str]] = []
    files: dict[str, str] = {}
    for place, (language, text) in enumerate(BLOCKS):
        if language == "python":
            name = re.match(r"# (\w+\.py)\n", text)
            assert name is not None
            files[name[1]] = text
        elif language == "console":
            assert BLOCKS[place + 1][0] == "text"
            found.append((dict(files), text.strip(), BLOCKS[place + 1][1]))
    return found


STEPS = [step for step in steps() if ".py" in step[1]]


def played(folder: str, script: str) -> str:
    """On a worker: what a script prints, within the process group that there is."""
    threads = torch.get_num_threads()
    with (
        mock.patch.object(dist, "init_process_group"),
        mock.patch.object(dist, "destroy_process_group"),
        mock.patch.object(sys, "path", [folder, *sys.path]),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        try:
            runpy.run_path(str(Path(folder) / script), run_name="__main__")
        finally:
            sys.modules.pop("digits", None)
            torch.set_num_threads(threads)
    return printed.getvalue()


def numbers(text: str) -> list[float]:
    return [float(each) for each in re.findall(r"-?\d+(?:\.\d+)?(?:e-\d+)?", text)]


def check(script: str, printed: str, said: str) -> None:
    """Compare what is printed with the page: words exactly, figures as far as machines agree."""
    without = r"-?\d+(\.\d+)?(e-\d+)?"
    assert re.sub(without, "#", printed).split() == re.sub(without, "#", said).split()
    assert len(numbers(printed)) == len(numbers(said)) > 0
    for mine, theirs in zip(numbers(printed), numbers(said)):
        is_rounding = theirs < 1e-12 and mine < 1e-12
        assert is_rounding or mine == pytest.approx(theirs, abs=TOLERANCE, rel=0.5), script


@pytest.mark.parametrize("number", range(len(STEPS)))
def test_a_script_prints_what_the_page_says(number, pool, tmp_path):
    files, command, said = STEPS[number]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    script = command.split()[-1]
    workers = 2 if command.startswith("torchrun --nproc-per-node 2 ") else 1
    printed = "".join(pool(workers).run(played, str(tmp_path), script))
    check(script, printed, said)


def test_pooling_is_what_mends_it():
    """The page's story, in its own figures: they are compared with what is printed above."""
    local, _, pooled, proof = (numbers(said) for _, _, said in STEPS)
    assert local[1] != local[5]
    assert max(local[1], local[5]) + 2 * TOLERANCE < pooled[1] == pooled[5]
    assert proof[0] > 1e-3
    assert proof[1] < 1e-12


@pytest.mark.slow
def test_the_commands_run_as_they_stand(tmp_path):
    for files, command, said in steps():
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        launcher, *arguments = command.replace("torchrun ", "torchrun --standalone ").split()
        modules = {
            "torchrun": ["-m", "torch.distributed.run"],
            "python": [],
            "syncnorm": ["-m", "syncnorm"],
        }
        done = commands.run([sys.executable, *modules[launcher], *arguments], tmp_path)
        assert done.returncode == 0, done.stderr
        # Two workers may write one line between them.
        lines = re.sub(r"(?<=\d)worker", "\nworker", done.stdout).splitlines()
        printed = "\n".join(sorted(filter(None, lines)))
        if launcher == "torchrun":
            check(command, printed, said)
        else:
            assert set(said.splitlines()) <= set(printed.splitlines())
