"""Build the sdist, the wheel from it, check both, and write the notes of the version.

Beside them come a list of what the image holds, in CycloneDX's form, and the licenses of all
packages that the extras bring.

`python -m tools.release [FOLDER]`, or `make release`. It needs the extra `dev`, and uploads nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tools import hashes, licenses

ROOT = Path(__file__).parents[1]


def version(root: Path = ROOT) -> str:
    """The version, from its only place."""
    text = (root / "syncnorm" / "__init__.py").read_text()
    (found,) = re.findall(r'^__version__ = "(.+)"$', text, flags=re.MULTILINE)
    return found


def notes(changelog: str, number: str) -> str:
    """What CHANGELOG.md says about a version, its heading left out.

    Raises:
        ValueError: it says nothing.
    """
    parts = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]
    for part in parts:
        heading, _, text = part.partition("\n")
        if heading.split()[0] == number and text.strip():
            return text.strip() + "\n"
    known = ", ".join(part.split()[0] for part in parts)
    raise ValueError(f"CHANGELOG.md must have a section `## {number}`, got {known}. Write it.")


def missing(changelog: str, number: str, dockerfile: str) -> list[str]:
    """List what the repository lacks that only a releaser can give, a sentence for each.

    These are the day in the version's heading, `## 1.2.3 (2026-01-31)`, and the digest of the base
    image.
    """
    found = []
    heading = rf"^## {re.escape(number)} \(\d{{4}}-\d\d-\d\d\)$"
    if not re.search(heading, changelog, flags=re.MULTILINE):
        found.append(f"CHANGELOG.md calls {number} unreleased. Give it its day.")
    (digest,) = re.findall(r'^ARG BASE_DIGEST="(.*)"$', dockerfile, flags=re.MULTILINE)
    (tag,) = re.findall(r"^FROM (.+)\$\{BASE_DIGEST", dockerfile, flags=re.MULTILINE)
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        found.append(
            f"BASE_DIGEST of docker/Dockerfile must be sha256:..., got {digest!r}: the image would "
            f"begin with whatever {tag} is on the day. Write there the digest that `docker buildx "
            f"imagetools inspect {tag}` prints."
        )
    return found


def build(folder: Path) -> list[Path]:
    """Make the sdist, and the wheel from what the sdist holds, in an empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} must be empty. Remove what is there.")
    _run("build", "--no-isolation", "--outdir", str(folder), str(ROOT))
    return sorted(folder.iterdir())


def check(files: list[Path]) -> None:
    """Check the metadata of both and the files of the wheel."""
    _run("twine", "check", "--strict", *map(str, files))
    _run("check_wheel_contents", *(str(file) for file in files if file.suffix == ".whl"))


def list_image(path: Path) -> None:
    """Write the packages of the image, with hashes where they have any, as CycloneDX JSON.

    The same packages make the same file: it has no time and no number of its own.
    """
    hashed, constraints = (
        (ROOT / "docker" / name).read_text() for name in ("hashes.txt", "constraints.txt")
    )
    # Each with its lines of hashes.
    blocks = re.split(r"\n(?=[\w.\-]+==)", hashed)
    by_name = {
        name: re.findall(r"--hash=sha256:([0-9a-f]{64})", block)
        for block in blocks
        for name in hashes.pins(block)
    }
    components = []
    for name, version in hashes.pins(constraints).items():
        purl = f"pkg:pypi/{hashes.canonical(name)}@{version}"
        wheels = [{"alg": "SHA-256", "content": digest} for digest in by_name.get(name, [])]
        files = {"type": "distribution", "url": purl, "hashes": wheels}
        components.append(
            {
                "type": "library",
                "bom-ref": purl,
                "name": name,
                "version": version,
                "purl": purl,
                "externalReferences": [files] if wheels else [],
            }
        )
    made = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": components}
    path.write_text(json.dumps(made, indent=2) + "\n")


def _run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True)


def main(arguments: list[str]) -> None:
    """Build, check, and write the notes beside."""
    folder = Path(*arguments) if arguments else ROOT / "dist"
    number = version()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    text = notes(changelog, number)
    files = build(folder.absolute())
    check(files)
    written, image, allowed = (
        folder / name
        for name in (f"notes-{number}.md", f"image-{number}.cdx.json", f"licenses-{number}.md")
    )
    written.write_text(text)
    list_image(image.absolute())
    allowed.write_text(licenses.table(["all"])[0])
    for each in (*files, written, image, allowed):
        print(f"{each.stat().st_size / 1e6:7.2f} MB  {each}")
    for each in missing(changelog, number, (ROOT / "docker" / "Dockerfile").read_text()):
        print(f"Before you upload: {each}")


if __name__ == "__main__":
    main(sys.argv[1:])
