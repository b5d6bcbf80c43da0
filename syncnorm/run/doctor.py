"""What on this machine would keep a run from starting, slow it down or end it.

`gather` looks, `judge` decides: facts are a value, so that each judgement can be tried without a
machine that has it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from syncnorm.run.machine import EXTRAS, Facts, gather

_GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        name: what was looked at.
        status: fail: a run will not start or not end well; warn: it will be slow, or a part of
            syncnorm is missing.
        detail: what was found.
        remedy: what to do about it; empty with ok.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""


def diagnose(run_dir: Path = Path("runs")) -> list[Check]:
    """Look at this machine; takes some seconds, and leaves nothing behind.

    Args:
        run_dir: where runs are to be kept.
    """
    return judge(gather(run_dir))


def judge(facts: Facts) -> list[Check]:
    """Decide what of the facts is good and what is not."""
    return [
        *_software(facts),
        *_devices(facts),
        *_memory(facts),
        *_run_folder(facts),
        *_network(facts),
        *_environment(facts),
        *_extras(facts),
    ]


def render(checks: Sequence[Check]) -> str:
    """Write a line for each check, with the remedy below."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<4}  {check.name:<{width}}  {check.detail}")
        if check.remedy:
            lines.append(f"{'':<4}  {'':<{width}}  -> {check.remedy}")
    count = {
        status: sum(check.status == status for check in checks) for status in ("ok", "warn", "fail")
    }
    lines.append(", ".join(f"{number} {status}" for status, number in count.items()))
    return "\n".join(lines)


def exit_status(checks: Sequence[Check]) -> int:
    """1 if a check failed, else 0."""
    return int(any(check.status == "fail" for check in checks))


def _check(
    name: str, detail: str, remedy: str = "", *, warn: bool = False, fail: bool = False
) -> Check:
    return Check(
        name, "fail" if fail else "warn" if warn else "ok", detail, remedy if warn or fail else ""
    )


def _software(facts: Facts) -> Iterator[Check]:
    python = ".".join(map(str, facts.python))
    yield _check("python", python, "Use Python 3.11 or later.", fail=facts.python < (3, 11))
    numbers = tuple(map(int, re.findall(r"\d+", facts.torch_version)[:2]))
    yield _check("torch", facts.torch_version, "pip install 'torch>=2.11'", fail=numbers < (2, 11))


def _devices(facts: Facts) -> Iterator[Check]:
    there = ", ".join(facts.backends) or "none"
    lacking = [] if "gloo" in facts.backends else ["gloo"]
    if facts.cuda_devices and "nccl" not in facts.backends:
        lacking.append("nccl")
    yield _check(
        "backends",
        there,
        f"Install a build of torch with {' and '.join(lacking)}.",
        fail=bool(lacking),
    )
    yield _check(
        "cuda",
        ", ".join(facts.cuda_devices)
        or f"torch sees none of {facts.nvidia_devices} devices: workers use the CPU",
        "Install a build of torch for CUDA that this driver can run, and look at "
        "CUDA_VISIBLE_DEVICES.",
        warn=facts.nvidia_devices > 0 and not facts.cuda_devices,
    )
    yield _check(
        "cores",
        f"{facts.cores:g}, and {facts.threads} threads in a process",
        f"export OMP_NUM_THREADS={max(int(facts.cores), 1)}, or 1 where several workers share the "
        "machine",
        warn=facts.threads > max(facts.cores, 1),
    )


def _memory(facts: Facts) -> Iterator[Check]:
    yield _check(
        "memory",
        f"{facts.free_memory / _GIB:.1f} GiB free",
        "Free some, or take fewer workers.",
        warn=facts.free_memory < 2 * _GIB,
        fail=facts.free_memory < 0.5 * _GIB,
    )
    size = facts.shared_memory
    yield _check(
        "/dev/shm",
        "none" if size is None else f"{size / _GIB:.2f} GiB",
        "nccl exchanges through it within a machine: start the container with --shm-size=1g or "
        "--ipc=host.",
        warn=bool(facts.cuda_devices) and (size is None or size < 0.5 * _GIB),
    )


def _run_folder(facts: Facts) -> Iterator[Check]:
    yield _check(
        "run folder",
        str(facts.run_dir)
        + (f", to be made in {facts.folder}" if facts.folder not in (None, facts.run_dir) else ""),
        "Set run_dir to a folder that can be written to.",
        fail=facts.folder is None or not facts.is_writable,
    )
    yield _check(
        "disk",
        f"{facts.free_disk / _GIB:.1f} GiB free",
        "Free some, set run_dir to another disk, or keep fewer checkpoints (checkpoint.keep).",
        warn=facts.free_disk < 2 * _GIB,
        fail=facts.free_disk < 0.1 * _GIB,
    )
    if facts.fsync_seconds is not None:
        yield _check(
            "fsync",
            f"{1000 * facts.fsync_seconds:.1f} ms for a small file",
            "Checkpoints wait for it: set run_dir to a local disk, or checkpoint.every to more "
            "steps.",
            warn=facts.fsync_seconds > 0.1,
        )


def _network(facts: Facts) -> Iterator[Check]:
    yield _check(
        "host name",
        facts.host_name + (f": {facts.host_error}" if facts.host_error else ""),
        "gloo asks for its address: add it to /etc/hosts, or export GLOO_SOCKET_IFNAME=lo for one "
        "machine.",
        warn=bool(facts.host_error),
    )
    yield _check(
        "gloo pair",
        facts.loopback_error or "two processes have pooled a sum",
        "export GLOO_SOCKET_IFNAME with the name of an interface of this machine, such as lo.",
        fail=facts.loopback_error is not None,
    )


def _environment(facts: Facts) -> Iterator[Check]:
    """What torchrun leaves to the person who calls it; `syncnorm train` sets it for the workers
    that it starts.
    """
    if not facts.tuning.is_under_torchrun:
        return
    if facts.has_glibc:
        missing = facts.tuning.missing_malloc
        yield _check(
            "malloc",
            f"not set: {', '.join(missing)}" if missing else "set for CPU workers",
            "export " + " ".join(f"{name}={value}" for name, value in missing.items()),
            warn=bool(missing),
        )
    yield _check(
        "restarts",
        "workers that are started again meet "
        + ("at addresses of before" if facts.tuning.shares_store else "anew"),
        "With gloo they do not find each other so: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        warn=facts.tuning.shares_store,
    )


def _extras(facts: Facts) -> Iterator[Check]:
    for extra, version in facts.extras.items():
        yield _check(
            f"extra {extra}",
            f"{EXTRAS[extra]} {version or 'is not installed'}",
            f"pip install 'syncnorm[{extra}]'",
            warn=version is None,
            fail=version is None and extra == "train",
        )
