"""The build of the native library: this folder's C files, once for each level of instruction set.

It needs a C compiler and nothing else: neither torch nor Python's headers. The build backend runs
it for wheels and editable installs (hatch_build.py); `python syncnorm/native/build.py` runs it
in place. The file imports nothing of the package, which may not be installed yet.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
_FLAGS = [
    "-std=c11",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Werror=implicit",
    "-Wno-psabi",
]
# Sums are written in the order in which they are to be taken, NaN means a fault, and x * x - x * x
# must be 0; but nobody looks at floating-point exceptions or errno.
_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
_X86 = {level: [f"-march={level}"] for level in ("x86-64-v4", "x86-64-v3", "x86-64")}
_LIBRARIES = ["-lm"]


class BuildError(Exception):
    """The library could not be built; the message says why."""


def levels() -> dict[str, list[str]]:
    """The levels of this machine's kind of processor, best first, with the compiler's flags."""
    machine = platform.machine().lower()
    return _X86 if machine in ("x86_64", "amd64") else {machine: []}


def library_path(folder: Path, level: str) -> Path:
    """The library of a level in a folder."""
    return folder / f"syncnorm-{level}.so"


def sources() -> list[Path]:
    """The C files."""
    return sorted(HERE.glob("*.c"))


def digest() -> str:
    """Identify the sources; a library keeps that of the sources that it was built from."""
    files = sorted([*HERE.glob("*.[ch]"), Path(__file__)])
    return hashlib.blake2b(b"\0".join(f.read_bytes() for f in files), digest_size=8).hexdigest()


def compiler() -> list[str]:
    """The command of the C compiler: $CC, or the first of cc, gcc and clang.

    Raises:
        BuildError: there is none.
    """
    if os.name != "posix":
        raise BuildError(f"no build for {sys.platform}")
    given = shlex.split(os.environ.get("CC", ""))
    for command in [given] if given else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError("no C compiler was found (CC, cc, gcc, clang)")


def build(folder: Path = HERE, flags: Sequence[str] = ()) -> list[Path]:
    """Compile the library into `folder`, once for each level that the compiler knows.

    Args:
        folder: where to put the libraries; a library that is in use there is not disturbed.
        flags: more of the compiler's.

    Returns:
        The libraries, best first; a level that the compiler does not know is left out.

    Raises:
        BuildError: not even the lowest level could be compiled.
    """
    command = [*compiler(), *_FLAGS, f'-DSYNCNORM_DIGEST="{digest()}"', *flags]
    files = [str(path) for path in sources()]
    built = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        jobs = {
            level: subprocess.Popen(
                [
                    *command,
                    *own,
                    "-o",
                    str(library_path(Path(scratch), level)),
                    *files,
                    *_LIBRARIES,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for level, own in levels().items()
        }
        said = {level: job.communicate()[0] for level, job in jobs.items()}
        for level, job in jobs.items():
            if job.returncode == 0:
                path = library_path(folder, level)
                library_path(Path(scratch), level).replace(path)
                built.append(path)
    if not built:
        *_, lowest = said
        raise BuildError(f"{shlex.join(command[:1])} failed: {said[lowest].strip()}")
    return built


if __name__ == "__main__":
    print(*build(), sep="\n")
