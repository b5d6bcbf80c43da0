"""Write the hashes of what the image installs, for pip's `--require-hashes`.

`python -m tools.hashes` looks up the versions of docker/constraints.txt and of docker/build.txt and
writes docker/hashes.txt and docker/build.txt. pip asks the index and downloads no package. torch has
no line: each index has builds of its own, so whoever builds an image gives the hash of theirs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

DOCKER = Path(__file__).parents[1] / "docker"
# What is written, by where the versions are.
FILES = {"hashes.txt": "constraints.txt", "build.txt": "build.txt"}
ARCHITECTURES = ("x86_64", "aarch64")
# glibc's minor versions that wheels for the image's Debian may ask for.
_GLIBC = range(5, 37)
_HEAD = "# Written by `python -m tools.hashes`: a wheel of each architecture, or one for all.\n"


def pins(text: str) -> dict[str, str]:
    """The version of each package that a file of pip's names."""
    return dict(re.findall(r"^([\w.\-]+)==([\w.+!]+)", text, flags=re.MULTILINE))


def canonical(name: str) -> str:
    """The name by which indexes compare packages."""
    return re.sub(r"[-_.]+", "-", name).lower()


def look_up(architecture: str, versions: dict[str, str]) -> dict[str, str]:
    """Ask pip for the SHA-256 of the wheel that it would install, by package."""
    platforms = [f"manylinux_2_{minor}_{architecture}" for minor in reversed(_GLIBC)]
    platforms += [f"manylinux{year}_{architecture}" for year in ("2014", "2010", "1")]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--quiet"),
                *("--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:"),
                *("--target", folder, "--report", str(report), "--python-version", "3.11"),
                *(f"--platform={each}" for each in platforms),
                *(f"{name}=={version}" for name, version in versions.items()),
            ],
            check=True,
        )
        installs = json.loads(report.read_text())["install"]
    return {
        canonical(each["metadata"]["name"]): each["download_info"]["archive_info"]["hashes"][
            "sha256"
        ]
        for each in installs
    }


def requirements(versions: dict[str, str], found: Iterable[dict[str, str]]) -> str:
    """The lines of a file for `--require-hashes`.

    Raises:
        KeyError: a package has no hash.
    """
    lines = []
    for name, version in versions.items():
        hashes = dict.fromkeys(each[canonical(name)] for each in found)
        lines.append(
            " \\\n    ".join([f"{name}=={version}", *(f"--hash=sha256:{h}" for h in hashes)])
        )
    return _HEAD + "\n".join(lines) + "\n"


def main() -> None:
    """Write both files."""
    for target, source in FILES.items():
        versions = pins((DOCKER / source).read_text())
        versions.pop("torch", None)
        found = [look_up(architecture, versions) for architecture in ARCHITECTURES]
        (DOCKER / target).write_text(requirements(versions, found))


if __name__ == "__main__":
    main()
