"""`syncnorm doctor`: checks for whatever would keep a run from starting, slow it down or end it.

A check judges the values that it is given, so that it can be tried without a machine that has
them. `diagnose` reads the values of this machine.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from syncnorm import native
from syncnorm.comm import shared
from syncnorm.run.env import Tuning, read_tuning
from syncnorm.run.loopback import try_loopback
from syncnorm.system import count_cores, free_memory
from syncnorm.train.memory import GIB

# The package whose version stands for each extra.
_EXTRAS = {
    "train": "safetensors",
    "data": "pillow",
    "metrics": "torchmetrics",
    "report": "matplotlib",
    "export": "onnxscript",
    "merge": "scipy",
    "tensorboard": "tensorboard",
    "storage": "fsspec",
    "ray": "ray",
    "cuda": "triton",
}


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Args:
        name: of the check.
        status: fail: a run will not start or not end well; warn: it will be slow, or a part of
            syncnorm is missing.
        detail: the value that was found.
        remedy: what to do about it; empty with ok.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""


def check_machine(run_dir: Path) -> list[Check]:
    """Check this machine; takes some seconds, and leaves nothing behind.

    Args:
        run_dir: where runs are to be kept.
    """
    backends = _backends()
    cuda = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
    folder = existing_folder(run_dir)
    is_writable = folder is not None and os.access(folder, os.W_OK | os.X_OK)
    shm = Path("/dev/shm")
    return [
        check_python(sys.version_info[:3]),
        check_torch(torch.__version__),
        check_backends(backends, cuda),
        check_cuda(cuda, nvidia_devices=len(list(Path("/dev").glob("nvidia[0-9]*")))),
        check_cores(count_cores(), torch.get_num_threads()),
        check_memory(free_memory()),
        check_shared_memory(shutil.disk_usage(shm).total if shm.is_dir() else None, cuda),
        check_run_folder(run_dir, folder, is_writable),
        check_disk(shutil.disk_usage(folder or Path()).free),
        *check_fsync(_fsync_seconds(folder) if folder is not None and is_writable else None),
        check_host_name(socket.gethostname(), _host_error()),
        check_gloo_pair(try_loopback()),
        check_native(native.library() is not None, native.load().detail),
        check_messages(shared.refusal()),
        *check_environment(read_tuning(), has_glibc=platform.libc_ver()[0] == "glibc"),
        *(
            check_extra(extra, _version(package))
            for extra, package in _EXTRAS.items()
            if extra != "cuda" or (cuda and sys.platform == "linux" and torch.version.hip is None)
        ),
    ]


def render(checks: Sequence[Check]) -> str:
    """Format a line for each check, with the remedy below it, and a line of counts."""
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
    """Return 1 if a check failed, else 0."""
    return int(any(check.status == "fail" for check in checks))


def _check(
    name: str, detail: str, remedy: str = "", *, warn: bool = False, fail: bool = False
) -> Check:
    return Check(
        name, "fail" if fail else "warn" if warn else "ok", detail, remedy if warn or fail else ""
    )


def check_python(version: tuple[int, ...]) -> Check:
    """Fail on a version of Python that is too old."""
    text = ".".join(map(str, version))
    return _check("python", text, "Use Python 3.11 or later.", fail=version < (3, 11))


def check_torch(version: str) -> Check:
    """Fail on a version of torch that is too old."""
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    return _check("torch", version, "pip install 'torch>=2.11'", fail=numbers < (2, 11))


def check_backends(backends: Collection[str], cuda: Sequence[str]) -> Check:
    """Fail where torch.distributed lacks gloo, or nccl for the CUDA devices that there are."""
    lacking = [] if "gloo" in backends else ["gloo"]
    if cuda and "nccl" not in backends:
        lacking.append("nccl")
    remedy = f"Install a build of torch with {' and '.join(lacking)}."
    return _check("backends", ", ".join(backends) or "none", remedy, fail=bool(lacking))


def check_cuda(cuda: Sequence[str], nvidia_devices: int) -> Check:
    """Warn if torch sees none of the system's NVIDIA devices."""
    return _check(
        "cuda",
        ", ".join(cuda) or f"torch sees none of {nvidia_devices} devices: workers use the CPU",
        "Install a build of torch for CUDA that this driver can run, and look at "
        "CUDA_VISIBLE_DEVICES.",
        warn=nvidia_devices > 0 and not cuda,
    )


def check_cores(cores: float, threads: int) -> Check:
    """Warn if a process of torch would use more threads than there are cores."""
    return _check(
        "cores",
        f"{cores:g}, and {threads} threads in a process",
        f"export OMP_NUM_THREADS={max(int(cores), 1)}, or 1 where several workers share the "
        "machine",
        warn=threads > max(cores, 1),
    )


def check_memory(free: float) -> Check:
    """Judge the free memory, in bytes."""
    return _check(
        "memory",
        f"{free / GIB:.1f} GiB free",
        "Free some, or take fewer workers.",
        warn=free < 2 * GIB,
        fail=free < 0.5 * GIB,
    )


def check_shared_memory(size: int | None, cuda: Sequence[str]) -> Check:
    """Warn if /dev/shm, of `size` bytes or missing, is too small for nccl."""
    return _check(
        "/dev/shm",
        "none" if size is None else f"{size / GIB:.2f} GiB",
        "nccl exchanges through it within a machine: start the container with --shm-size=1g or "
        "--ipc=host.",
        warn=bool(cuda) and (size is None or size < 0.5 * GIB),
    )


def check_run_folder(run_dir: Path, folder: Path | None, is_writable: bool) -> Check:
    """Fail if runs cannot be written.

    Args:
        run_dir: where runs are to be kept.
        folder: see `existing_folder`.
        is_writable: this user may write to `folder`.
    """
    made_in = f", to be made in {folder}" if folder not in (None, run_dir) else ""
    return _check(
        "run folder",
        f"{run_dir}{made_in}",
        "Set run_dir to a folder that can be written to.",
        fail=folder is None or not is_writable,
    )


def check_disk(free: int) -> Check:
    """Judge the free disk space for runs, in bytes."""
    return _check(
        "disk",
        f"{free / GIB:.1f} GiB free",
        "Free some, set run_dir to another disk, or keep fewer checkpoints (checkpoint.keep).",
        warn=free < 2 * GIB,
        fail=free < 0.1 * GIB,
    )


def check_fsync(seconds: float | None) -> Iterator[Check]:
    """Warn of a slow disk; no check where nothing can be written (None)."""
    if seconds is not None:
        yield _check(
            "fsync",
            f"{1000 * seconds:.1f} ms for a small file",
            "Checkpoints wait for it: set run_dir to a local disk, or checkpoint.every to more "
            "steps.",
            warn=seconds > 0.1,
        )


def check_host_name(name: str, error: str) -> Check:
    """Warn if the host's name has no address; `error` says why, and is empty if it has one."""
    return _check(
        "host name",
        name + (f": {error}" if error else ""),
        "gloo asks for its address: add it to /etc/hosts, or export GLOO_SOCKET_IFNAME=lo for one "
        "machine.",
        warn=bool(error),
    )


def check_gloo_pair(error: str | None) -> Check:
    """Fail if two processes of this machine could not pool a sum over gloo."""
    return _check(
        "gloo pair",
        error or "two processes have pooled a sum",
        "export GLOO_SOCKET_IFNAME with the name of an interface of this machine, such as lo.",
        fail=error is not None,
    )


def check_environment(tuning: Tuning, has_glibc: bool) -> Iterator[Check]:
    """Check the variables that torchrun leaves to its caller; `syncnorm train` sets them itself."""
    if not tuning.is_under_torchrun:
        return
    if has_glibc:
        missing = tuning.missing_malloc
        yield _check(
            "malloc",
            f"not set: {', '.join(missing)}" if missing else "set for CPU workers",
            "export " + " ".join(f"{name}={value}" for name, value in missing.items()),
            warn=bool(missing),
        )
    yield _check(
        "restarts",
        "workers that are started again meet "
        + ("at addresses of before" if tuning.shares_store else "anew"),
        "With gloo they do not find each other so: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        warn=tuning.shares_store,
    )


def check_native(is_used: bool, detail: str) -> Check:
    """Check that the native library is used; without it layers on a CPU are slower."""
    return _check(
        "native library",
        detail,
        "With a C compiler there, install syncnorm again.",
        warn=not is_used,
    )


def check_messages(refusal: str) -> Check:
    """Check that CPU workers of this machine can send statistics over shared memory."""
    return _check(
        "shared messages",
        refusal or "between the workers of this machine",
        "Statistics go over gloo, which takes longer.",
        warn=bool(refusal),
    )


def check_extra(extra: str, version: str | None) -> Check:
    """Check that an extra of syncnorm's is installed; without `train` no run starts."""
    return _check(
        f"extra {extra}",
        f"{_EXTRAS[extra]} {version or 'is not installed'}",
        f"pip install 'syncnorm[{extra}]'",
        warn=version is None,
        fail=version is None and extra == "train",
    )


def existing_folder(path: Path) -> Path | None:
    """Return the folder, or the nearest above it that exists; None if a file is in the way."""
    nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
    return nearest if nearest.is_dir() else None


def _backends() -> list[str]:
    if not dist.is_available():
        return []
    is_there = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    return [name for name, there in is_there.items() if there]


def _fsync_seconds(folder: Path) -> float | None:
    """Measure the median time to bring a small file to disk; None if that fails."""
    times = []
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(9):
                file.write(b"\0" * 4096)
                file.flush()
                start = time.perf_counter()
                os.fsync(file.fileno())
                times.append(time.perf_counter() - start)
    except OSError:
        return None
    return statistics.median(times)


def _host_error() -> str:
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError as error:
        return str(error)
    return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
