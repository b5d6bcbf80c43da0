"""What a machine is like: the facts that `syncnorm doctor` judges."""

import importlib.metadata
import os
import platform
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from syncnorm.run.env import Tuning, read_tuning
from syncnorm.run.loopback import try_loopback
from syncnorm.train.memory import free_memory

# The package that stands for each extra.
EXTRAS = {
    "train": "safetensors",
    "report": "matplotlib",
    "tensorboard": "tensorboard",
    "ray": "ray",
}


@dataclass(frozen=True)
class Facts:
    """What `gather` finds.

    Args:
        python: version.
        torch_version: as torch writes it.
        backends: of torch.distributed that are there.
        cuda_devices: names of those that torch sees.
        nvidia_devices: how many the system has.
        cores: that this process may use, with a container's quota.
        threads: that torch would use in one process.
        free_memory: bytes.
        run_dir: where runs are to be kept.
        folder: `run_dir`, or the nearest folder above that exists; None if a file is in the way.
        is_writable: whether this user may write there.
        free_disk: bytes there.
        fsync_seconds: for a small file there; None where nothing can be written.
        shared_memory: size of /dev/shm in bytes; None if there is none.
        host_name: of this machine.
        host_error: why the name has no address; empty if it has one.
        loopback_error: why two processes could not pool a sum; None if they did.
        extras: from an extra to the installed version of what it stands for, or None.
        has_glibc: whether glibc's malloc is in use.
        tuning: of the environment.
    """

    python: tuple[int, int, int]
    torch_version: str
    backends: tuple[str, ...]
    cuda_devices: tuple[str, ...]
    nvidia_devices: int
    cores: float
    threads: int
    free_memory: float
    run_dir: Path
    folder: Path | None
    is_writable: bool
    free_disk: int
    fsync_seconds: float | None
    shared_memory: int | None
    host_name: str
    host_error: str
    loopback_error: str | None
    extras: Mapping[str, str | None]
    has_glibc: bool
    tuning: Tuning


def gather(run_dir: Path) -> Facts:
    """Look at this machine.

    Args:
        run_dir: where runs are to be kept.
    """
    folder = existing_folder(run_dir)
    is_writable = folder is not None and os.access(folder, os.W_OK | os.X_OK)
    shared = Path("/dev/shm")
    host_name = socket.gethostname()
    devices = range(torch.cuda.device_count())
    return Facts(
        python=sys.version_info[:3],
        torch_version=torch.__version__,
        backends=_backends(),
        cuda_devices=tuple(torch.cuda.get_device_name(device) for device in devices),
        nvidia_devices=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        cores=cores(),
        threads=torch.get_num_threads(),
        free_memory=free_memory(),
        run_dir=run_dir,
        folder=folder,
        is_writable=is_writable,
        free_disk=shutil.disk_usage(folder or Path()).free,
        fsync_seconds=_fsync_seconds(folder) if folder is not None and is_writable else None,
        shared_memory=shutil.disk_usage(shared).total if shared.is_dir() else None,
        host_name=host_name,
        host_error=_host_error(host_name),
        loopback_error=try_loopback(),
        extras={extra: _version(package) for extra, package in EXTRAS.items()},
        has_glibc=platform.libc_ver()[0] == "glibc",
        tuning=read_tuning(),
    )


def _backends() -> tuple[str, ...]:
    if not dist.is_available():
        return ()
    return tuple(
        name
        for name, is_there in (
            ("gloo", dist.is_gloo_available()),
            ("nccl", dist.is_nccl_available()),
        )
        if is_there
    )


def cores() -> float:
    """How many cores this process may use, with a container's quota."""
    number = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return min(number, int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup, or no quota ("max")
        return number


def existing_folder(path: Path) -> Path | None:
    """The folder, or the nearest above it that exists; None if a file is in the way."""
    nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
    return nearest if nearest.is_dir() else None


def _fsync_seconds(folder: Path) -> float | None:
    """The median time to bring a small file to disk."""
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


def _host_error(name: str) -> str:
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        return str(error)
    return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
