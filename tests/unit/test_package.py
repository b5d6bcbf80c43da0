"""What pyproject.toml says about the package is so, and a release is made of what is there."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.model.bom import Bom
from hatchling.builders.sdist import SdistBuilder

import syncnorm
from tools import hashes, installs, licenses, release

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSIONS = (ROOT / "docs" / "versions.md").read_text()
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
OWN = EXTRAS.keys() - {"dev", "all"}
# The module of a package that is called otherwise, or that torch imports where it is asked to.
MODULES = {
    "onnxscript": "torch.onnx",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "sb3-contrib": "sb3_contrib",
    "tensorboard": "torch.utils.tensorboard",
}
# Modules that a package of an extra brings, and clients of services that a user has or has not.
BROUGHT = {"markupsafe": "jinja2", "requests": "ray"}
USERS = {"IPython", "mlflow", "trackio", "wandb"}


def name_of(requirement: str) -> str:
    """The package that is required."""
    return re.split(r"[\[<>=!~; ]", requirement)[0]


def modules_of(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """The modules that code imports by a statement (True) or may import by a string (False)."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test).endswith("TYPE_CHECKING"):
        return
    if isinstance(tree, ast.Import):
        yield from ((alias.name, True) for alias in tree.names)
    elif isinstance(tree, ast.ImportFrom):
        yield tree.module or "", True
    elif isinstance(tree, ast.Attribute) and ast.unparse(tree).startswith("torch."):
        yield ast.unparse(tree), False
    elif isinstance(tree, ast.Constant) and isinstance(tree.value, str):
        yield tree.value, False
    for child in ast.iter_child_nodes(tree):
        yield from modules_of(child)


@cache
def found_modules() -> set[tuple[str, bool]]:
    """The `modules_of` the package."""
    return {
        found
        for path in (ROOT / "syncnorm").rglob("*.py")
        for found in modules_of(ast.parse(path.read_text()))
    }


@pytest.mark.parametrize("extra", sorted(OWN))
def test_an_extra_holds_only_what_a_line_imports(extra):
    names = {name for name, _ in found_modules()}
    for requirement in EXTRAS[extra]:
        module = MODULES.get(name_of(requirement), name_of(requirement))
        assert any(name == module or name.startswith(f"{module}.") for name in names), requirement


def test_every_import_is_in_an_extra():
    packages = {name_of(each) for extra in OWN for each in EXTRAS[extra]}
    known = {MODULES.get(name, name) for name in packages} | USERS | {"syncnorm", "torch"}
    known |= {module for module, by in BROUGHT.items() if by in packages}
    tops = {name.partition(".")[0] for name, by_statement in found_modules() if by_statement}
    assert tops - known - sys.stdlib_module_names == set()


def test_all_holds_every_extra_but_other_frameworks_and_tools():
    (line,) = EXTRAS["all"]
    assert line.removeprefix("syncnorm[").removesuffix("]").split(",") == [
        extra for extra in EXTRAS if extra in OWN - {"integrations"}
    ]


def test_every_requirement_has_one_floor_and_no_ceiling():
    for extra in EXTRAS.keys() - {"all"}:
        for requirement in EXTRAS[extra]:
            assert re.fullmatch(
                r"[\w.\-]+(\[[\w,]+\])?>=\d[\d.]*(; sys_platform == 'linux')?", requirement
            )


def test_floors_are_the_same_wherever_they_are_named():
    python = PROJECT["project"]["requires-python"].removeprefix(">=")
    (torch,) = (each.removeprefix("torch>=") for each in PROJECT["project"]["dependencies"])
    tools = PROJECT["tool"]
    assert tools["ruff"]["target-version"] == "py" + python.replace(".", "")
    assert tools["basedpyright"]["pythonVersion"] == python
    for path, sentence in (
        ("README.md", f"needs Python {python}, torch {torch} or later"),
        ("docs/versions.md", f"needs Python {python} or later and torch {torch} or later"),
        ("CONTRIBUTING.md", f"The oldest that is supported, {torch}, and the newest"),
        ("Makefile", f"Needs Python >= {python} with"),
        ("syncnorm/run/doctor.py", f"Use Python {python} or later."),
        ("syncnorm/run/doctor.py", f"pip install 'torch>={torch}'"),
    ):
        assert sentence in (ROOT / path).read_text(), path
    # Those of which the page says what happens below.
    floors = {(name_of(each), each.partition(">=")[2]) for some in EXTRAS.values() for each in some}
    rows = re.findall(r"^\| ([a-z-]+)(?:, .*?)? \| ([\d.]+) \|", VERSIONS, flags=re.MULTILINE)
    assert len(rows) > 5
    assert set(rows) - floors == set()


def test_classifiers_name_the_pythons_and_systems_that_were_tried():
    named = PROJECT["project"]["classifiers"]
    tried = set(re.findall(r"^\| (3\.\d+)\.\d+ \|", VERSIONS, flags=re.MULTILINE))
    (system,) = re.findall(r"^Only (\w+) has been tried", VERSIONS, flags=re.MULTILINE)
    pythons = {f"Programming Language :: Python :: {each}" for each in tried}
    systems = {f"Operating System :: POSIX :: {system}"}
    of_versions = re.compile(r"Programming Language :: Python :: 3\.|Operating System ::")
    assert {each for each in named if of_versions.match(each)} == pythons | systems


def test_the_cost_of_every_extra_is_measured():
    assert installs.USES.keys() == EXTRAS.keys() - {"dev"} | {"none"}
    for extra, (besides, words, _) in installs.USES.items():
        extras = "" if extra == "none" else f"[{','.join([*besides, extra])}]"
        row = rf"^\| `syncnorm{re.escape(extras)}` \|.*\| {re.escape(words)}: \d+ s "
        assert re.search(row, VERSIONS, flags=re.MULTILINE), extra


def test_the_version_stands_in_one_place():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert "version" not in PROJECT["project"]
    assert ROOT / PROJECT["tool"]["hatch"]["version"]["path"] == ROOT / "syncnorm/__init__.py"
    assert release.version() == syncnorm.__version__


def test_the_changelog_has_notes_of_this_version():
    notes = release.notes((ROOT / "CHANGELOG.md").read_text(), syncnorm.__version__)
    assert "(unreleased)" not in notes
    assert "\n- " in notes
    assert "\n## " not in notes


def test_notes_are_one_versions():
    text = "# Changelog\n\n## 1.1 (unreleased)\n\n- new\n\n## 1.0 (2026-01-31)\n\n- old\n"
    assert release.notes(text, "1.1") == "- new\n"
    assert release.notes(text, "1.0") == "- old\n"
    with pytest.raises(ValueError, match=r"`## 2\.0`, got 1\.1, 1\.0"):
        release.notes(text, "2.0")


def test_what_a_releaser_still_has_to_give():
    changelog = "# Changelog\n\n## 1.1 (unreleased)\n\n- new\n\n## 1.0 (2026-01-31)\n\n- old\n"
    dockerfile = 'ARG TORCH_INDEX=""\nARG BASE_DIGEST="{}"\nFROM python:3.11-slim${{BASE_DIGEST}}\n'
    digest = "sha256:" + "0f" * 32
    assert release.missing(changelog, "1.0", dockerfile.format(digest)) == []
    (undated,) = release.missing(changelog, "1.1", dockerfile.format(digest))
    assert undated.startswith("CHANGELOG.md calls 1.1 unreleased")
    for wrong in ("", "sha256:0f", digest.upper()):
        (unfixed,) = release.missing(changelog, "1.0", dockerfile.format(wrong))
        assert f"BASE_DIGEST of docker/Dockerfile must be sha256:..., got {wrong!r}" in unfixed
        assert "python:3.11-slim" in unfixed


def test_a_release_begins_in_an_empty_folder(tmp_path):
    (tmp_path / "old.whl").touch()
    with pytest.raises(FileExistsError, match="must be empty"):
        release.build(tmp_path)


def test_the_sdist_has_all_that_the_repository_tracks():
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("this is no clone: git says " + done.stderr.strip())
    files = SdistBuilder(str(ROOT)).recurse_included_files()
    # Besides, hatchling adds what it builds from.
    held = {Path(each.distribution_path).as_posix() for each in files} | {"pyproject.toml"}
    assert set(done.stdout.splitlines()) - held == set()


def test_the_list_of_the_image_has_its_packages_and_their_hashes(tmp_path):
    release.list_image(tmp_path / "image.json")
    reader: Any = Bom
    listed = reader.from_json(json.loads((tmp_path / "image.json").read_text())).components
    pins = hashes.pins((ROOT / "docker" / "constraints.txt").read_text())
    assert {each.name: each.version for each in listed} == pins
    found = {
        each.name: {digest.content for of in each.external_references for digest in of.hashes}
        for each in listed
    }
    assert {name for name, digests in found.items() if digests} == pins.keys() - {"torch"}
    text = (ROOT / "docker" / "hashes.txt").read_text()
    assert set.union(*found.values()) == set(re.findall(r"sha256:([0-9a-f]{64})", text))
    (yarl,) = (each for each in listed if each.name == "yarl")
    assert str(yarl.purl) == f"pkg:pypi/yarl@{pins['yarl']}"


def test_all_that_the_extras_bring_names_its_license():
    table, silent = licenses.table(["all"])
    # torch's build for CUDA needs it: it has no files, but requirements.
    assert set(silent) <= {"cuda-toolkit"}
    assert "| torch |" in table
    assert len(table.splitlines()) > 50
    with pytest.raises(ValueError, match=r"must be among .*train.*, got trian"):
        licenses.table(["trian"])


def test_programs_beside_the_package_find_what_they_import():
    for folder in ("benchmarks", "drills", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name != "__main__.py":
                import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
