"""Tests with the lowest, the pinned and the newest versions of what each extra brings.

`make matrix` runs all, `nox --keywords 'lowest and train'` one; docs/versions.md has what was
seen. torch is that of constraints.txt, for the part `torch` the lowest and the newest, too, or the
one named behind `--`: on Linux another one may be a build for CUDA, of several GB.
`--force-python 3.13` takes another Python, which must be in PATH.
"""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path

import nox
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
TOOLS = ["pytest", "pytest-timeout", "hypothesis", "scikit-learn", "pillow"]
# Of each part: its extras, what else its tests import, and the tests that use its packages most.
PARTS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "torch": (
        ["train"],
        ["scipy"],
        [
            "tests/unit/test_undocumented.py",
            "tests/unit/test_layers.py",
            "tests/unit/test_kernels.py",
            "tests/unit/test_native.py",
            "tests/unit/test_portable.py",
            "tests/distributed/test_groups.py",
            "tests/distributed/test_faults.py",
            "tests/distributed/test_double_backward.py",
            "tests/distributed/test_shared_memory.py",
            "tests/distributed/test_sync_batch_norm.py",
            "tests/distributed/test_sync_batch_renorm.py",
            "tests/distributed/test_what_torchs_suite_checks.py",
            "tests/model/test_compile.py",
            "tests/model/test_ddp.py",
            "tests/model/test_convert.py",
            "tests/model/test_convert_layers.py",
            "tests/model/test_checkpointing.py",
            "tests/model/test_transforms.py",
            "tests/model/test_tools.py",
            "tests/model/test_around.py",
            "tests/model/test_export.py",
            "tests/model/test_accumulate.py",
            "tests/model/test_frozen.py",
            "tests/model/test_lagged.py",
            "tests/train/test_step.py",
            "tests/train/test_optimisation.py",
        ],
    ),
    "triton": (
        ["train", "cuda"],
        [],
        [
            "tests/unit/test_triton.py",
            "tests/unit/test_triton_cubins.py",
            "tests/unit/test_ptx.py",
            "tests/model/test_budgets.py",
            "tests/distributed/test_device_course.py",
        ],
    ),
    "train": (
        ["train"],
        [],
        [
            "tests/train/test_config.py",
            "tests/train/test_config_show.py",
            "tests/train/test_strict_yaml.py",
            "tests/train/test_checkpoint.py",
            "tests/train/test_snapshot.py",
            "tests/train/test_callables.py",
            "tests/launch/test_use.py",
            "tests/launch/test_bad_input.py",
        ],
    ),
    "extras": (
        ["train", "data", "metrics", "report", "export", "merge", "tensorboard", "storage"],
        ["onnxruntime"],
        [
            "tests/train/test_report.py",
            "tests/train/test_report_safe.py",
            "tests/train/test_loggers.py",
            "tests/train/test_tasks.py",
            "tests/train/test_files.py",
            "tests/train/test_storage.py",
            "tests/model/test_export.py",
            "tests/model/test_merge_match.py",
        ],
    ),
    "integrations": (
        ["train", "integrations"],
        ["accelerate", "transformers"],
        [
            "tests/model/test_lightning.py",
            "tests/model/test_accelerate.py",
            "tests/model/test_hf_trainer.py",
            "tests/model/test_crossq.py",
            "tests/model/test_mmengine.py",
        ],
    ),
    "ray": (
        ["train", "report", "ray"],
        [],
        [
            "tests/launch/test_ray_units.py",
            "tests/launch/test_ray_driver.py",
            "tests/launch/test_sweep_units.py",
        ],
    ),
}

# What a CPU's workers may be without, by the environment of their tests.
WAYS: dict[str, dict[str, str]] = {
    "gloo": {"SYNCNORM_SHARED_MEMORY": "0"},
    "operators": {"SYNCNORM_NATIVE": "0"},
    "mixed": {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "mixed"), str(ROOT)])},
}
# Numerics, messages, faults, kills and the trainer; none of other frameworks.
OF_WAYS = [
    "tests/unit/test_kernels.py",
    "tests/unit/test_layers.py",
    "tests/unit/test_native.py",
    "tests/distributed",
    "tests/model",
    "tests/verify",
    "tests/train/test_step.py",
    "tests/train/test_loop.py",
    "tests/train/test_invariance.py",
    "tests/train/test_saver.py",
    "tests/train/test_checkpoint_kills.py",
    "tests/train/test_seam_examples.py",
    "tests/launch/test_ended_runs.py",
    "tests/launch/test_kill_drill.py",
]
OTHERS = ["accelerate", "crossq", "hf_trainer", "lightning", "mmengine"]

nox.options.sessions = ["versions"]


def lowest(needed: list[str]) -> list[str]:
    """Requirements for exactly the lowest versions that satisfy all of these."""
    highest: dict[str, Requirement] = {}
    for each in map(Requirement, needed):
        if each.name not in highest or _floor(highest[each.name]) < _floor(each):
            highest[each.name] = each
    for each in highest.values():
        each.specifier = SpecifierSet(f"=={_floor(each)}" if each.specifier else "")
    return [str(each) for each in highest.values()]


def _floor(requirement: Requirement) -> Version:
    return max((Version(each.version) for each in requirement.specifier), default=Version("0"))


def requirements(part: str) -> list[str]:
    """What a part and its tests import of other packages, as pyproject.toml asks for it."""
    extras, others, _ = PARTS[part]
    dev = {Requirement(each).name: each for each in EXTRAS["dev"]}
    named = [dev.get(name, name) for name in others]
    return [each for extra in extras for each in EXTRAS[extra]] + named


@nox.session(venv_backend="venv")
@nox.parametrize("part", list(PARTS))
@nox.parametrize("which", ["lowest", "pinned", "newest"])
def versions(session: nox.Session, which: str, part: str) -> None:
    """Install one part in an environment of its own, and run its tests."""
    needed = requirements(part)
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    torch = _line_of("torch", pins)
    if part == "torch" and which != "pinned":
        (torch,) = PROJECT["dependencies"] if which == "newest" else lowest(PROJECT["dependencies"])
    if session.posargs:
        torch = f"torch=={session.posargs[0]}"
    constraints = Path(session.create_tmp()) / "constraints.txt"
    more: list[str] = []
    if which == "lowest":
        needed = lowest(needed)
    elif which == "pinned":
        more = (ROOT / "docker" / "constraints.txt").read_text().splitlines()
    kept = [line for line in more if line.strip() and not line.startswith(("#", "torch=="))]
    constraints.write_text("\n".join([torch, *kept]) + "\n")
    # Not compiled: torch brings thousands of files that no test imports.
    session.install("--no-compile", "--constraint", str(constraints), torch, *needed, *TOOLS)
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    tests = ["-q", "-m", "not slow", "-p", "no:cacheprovider", *PARTS[part][2]]
    session.run("python", "-m", "pytest", *tests, env=environment)


@nox.session(venv_backend="none")
@nox.parametrize("way", list(WAYS))
def ways(session: nox.Session, way: str) -> None:
    """Run the tests without shared memory, without the native library, or with it on some workers."""
    left_out = [f"--ignore=tests/model/test_{name}.py" for name in OTHERS]
    tests = session.posargs or [*OF_WAYS, *left_out]
    options = ["-q", "-m", "not slow", "-p", "no:cacheprovider", "--numprocesses", "2"]
    environment = {"PYTHONPATH": str(ROOT), **WAYS[way]}
    session.run(sys.executable, "-m", "pytest", *options, *tests, env=environment)


@nox.session(venv_backend="venv")
def stand_in(session: nox.Session) -> None:
    """Run the tests of CUDA, or a command, with a stand-in for a GPU: see drills/stand_in.

    Installs the lowest torch, or the one that is named first, in its build for CUDA.
    """
    given = list(session.posargs)
    torch = f"torch=={given.pop(0)}" if given and given[0][0].isdigit() else None
    needed = [torch] if torch else lowest(PROJECT["dependencies"])
    # Triton 3.6's interpreter does not know a later numpy.
    needed += ["numpy<2.4", *requirements("train"), *TOOLS]
    session.install("--no-compile", *needed)
    environment = {"PYTHONPATH": str(ROOT)}
    session.run("python", "-m", "drills.stand_in", *given, env=environment)


def _line_of(name: str, pins: list[str]) -> str:
    (found,) = (line for line in pins if line.startswith(f"{name}=="))
    return found
