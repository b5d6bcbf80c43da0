"""Measure what an installation costs: each extra from the built wheel, in an empty environment.

`python -m tools.installs [EXTRA ...]` prints a table for these extras, for `none` and all but `dev`
if none is named: what pip downloads, what it puts into the environment, and the seconds to a
first use, in brackets those of CPU that it took: the former depend on what else runs. torch is that
of constraints.txt, wherever pip finds it. Files are compiled when they are first imported, as `make`
has it, which is a part of the first use.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools import release

ROOT = release.ROOT
CONVERT = """
import torch
from syncnorm import convert

model = convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(8, 3, 16, 16)).square().mean().backward()
    optimizer.step()
"""
MATCH = """
import torch
from syncnorm.merge import match_weights

a, b = (
    torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    for _ in range(2)
)
match_weights(a, b)
"""
DRAW = """
from pathlib import Path
from PIL import Image

for number in range(64):
    path = Path("photos", "dark" if number % 2 else "light", f"{number}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), 2 * number if number % 2 else 255 - 2 * number).save(path)
"""
TRAIN = ["syncnorm", "train", "digits", "train.epochs=1"]
F1 = "task.metrics.MulticlassF1Score.num_classes=10"
PHOTOS = ["data.name=folder", "data.root=photos", "data.options.size=8", "data.options.channels=1"]
# The extra, those it needs besides, what its first use is, and the commands of it. RUN is the folder
# of the run that was trained before.
USES: dict[str, tuple[list[str], str, list[list[str]]]] = {
    "none": ([], "a converted model trains 3 steps", [["python", "-c", CONVERT]]),
    "train": ([], "`syncnorm train digits train.epochs=1`, 2 workers", [TRAIN]),
    "data": (
        ["train"],
        "drawn images, and a run on their folder",
        [["python", "-c", DRAW], [*TRAIN, *PHOTOS, "train.global_batch=16"]],
    ),
    "metrics": (["train"], f"that run with `{F1}`", [[*TRAIN, F1]]),
    "report": (["train"], "that run, and its page", [TRAIN]),
    "export": (
        ["train"],
        "that run, and `syncnorm export RUN -o model.onnx`",
        [TRAIN, ["syncnorm", "export", "RUN", "-o", "model.onnx"]],
    ),
    "merge": ([], "`match_weights` of two small networks", [["python", "-c", MATCH]]),
    "tensorboard": (
        ["train"],
        "that run with `follow.loggers.tensorboard={}`",
        [[*TRAIN, "follow.loggers.tensorboard={}"]],
    ),
    "storage": (
        ["train"],
        "that run, copied to `run_dir=memory://runs`",
        [[*TRAIN, "run_dir=memory://runs"]],
    ),
    "ray": (
        ["train"],
        "`syncnorm sweep digits train.lr=0.05,0.1` of 1 epoch each",
        [["syncnorm", "sweep", *TRAIN[2:], "data.validation=0.1", "train.lr=0.05,0.1"]],
    ),
    "cuda": (
        [],
        "`import triton`: nothing else without a GPU",
        [["python", "-c", "import triton"]],
    ),
    "integrations": (
        [],
        "the three modules are imported",
        [
            ["python", "-c", f"import syncnorm.integrations.{each}"]
            for each in ("lightning", "mmengine", "crossq")
        ],
    ),
    "all": ([], "that run, and its page", [TRAIN]),
}


@dataclass(frozen=True)
class Seconds:
    """How long something took: by the clock, and of the CPU in all its processes."""

    clock: float = 0.0
    cpu: float = 0.0

    @classmethod
    def now(cls) -> Seconds:
        """The clock, and what processes that have ended took."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return cls(time.monotonic(), used.ru_utime + used.ru_stime)

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.clock + other.clock, self.cpu + other.cpu)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.clock - other.clock, self.cpu - other.cpu)

    def __str__(self) -> str:
        return f"{self.clock:.0f} s ({self.cpu:.0f} s)"


def size(*paths: Path) -> int:
    """The bytes of files and of the files in folders."""
    files = (file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]))
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def measure(extra: str, wheel: Path, folder: Path) -> str:
    """Install and use an extra in an empty folder; a row of the table."""
    besides, words, commands = USES[extra]
    extras = f"[{','.join([*besides, extra])}]" if extra != "none" else ""
    wanted = f"{wheel}{extras}"
    downloads, environment, place = (folder / name for name in ("downloads", "env", "place"))
    place.mkdir()
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    _run([sys.executable, "-m", "pip", "download", "-q", "-d", downloads, *constraints, wanted])
    _run([sys.executable, "-m", "venv", "--without-pip", environment])
    before = size(environment / "lib")
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install"]
    pip += ["-q", "--no-index", "--no-compile", "--find-links", downloads, *constraints]
    installed_in = _run([*pip, wanted])
    installed = size(environment / "lib") - before
    used_in = Seconds()
    for program, *arguments in commands:
        runs = sorted(str(each) for each in place.glob("runs/*"))
        arguments = [runs[-1] if each == "RUN" else each for each in arguments]
        used_in += _run([environment / "bin" / program, *arguments], place)
    cells = [f"`syncnorm{extras}`", f"{size(downloads) / 1e6:.0f} MB", f"{installed / 1e6:.0f} MB"]
    cells += [str(installed_in), f"{words}: {used_in}"]
    return f"| {' | '.join(cells)} |"


def _run(command: Sequence[str | Path], folder: Path = ROOT) -> Seconds:
    """Run a command; the seconds it took. What it prints is shown if it fails."""
    began = Seconds.now()
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        done.check_returncode()
    return Seconds.now() - began


def main(extras: list[str]) -> None:
    """Build the wheel and print a row for each extra."""
    if unknown := set(extras) - USES.keys():
        raise SystemExit(f"extras must be among {', '.join(USES)}, got {', '.join(unknown)}")
    with tempfile.TemporaryDirectory() as top:
        (wheel,) = (each for each in release.build(Path(top, "dist")) if each.suffix == ".whl")
        print(f"From {wheel.name} of {size(wheel) / 1e6:.2f} MB.\n")
        print("| installed | pip downloads | in the environment | pip took | first use |")
        print("|---|---|---|---|---|")
        for extra in extras or USES:
            with tempfile.TemporaryDirectory() as folder:
                print(measure(extra, wheel, Path(folder)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
