"""The results of a run and the files it leaves behind, for `drills.kill_drill`."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from syncnorm.train.checkpoint.snapshot import Snapshot
from syncnorm.train.checkpoint.store import CheckpointStore
from syncnorm.train.metrics import read_events


class Evidence(NamedTuple):
    """The results of a run.

    Args:
        digest: of the last checkpoint.
        curve: loss and learning rate of each step, loss and test accuracy after each epoch, as they
            are on record.
        best: name of the checkpoint that is marked as the best.
        save_bytes: that the last checkpoint takes.
    """

    digest: str
    curve: dict[str, list[Any]]
    best: str | None
    save_bytes: int


def gather(run: Path) -> tuple[Evidence | None, list[str]]:
    """Read a run's folder.

    Returns:
        The evidence, None without a checkpoint; and what is wrong with it by itself.
    """
    store = CheckpointStore(run / "checkpoints")
    snapshot, path, problems = store.newest()
    if snapshot is None or path is None:
        return None, [*problems, "there is no checkpoint"]
    curve, different = read_curve(run)
    best = store.best()
    size = sum(file.stat().st_size for file in path.iterdir())
    return Evidence(digest(snapshot), curve, None if best is None else best.name, size), [
        *problems,
        *different,
    ]


def digest(snapshot: Snapshot) -> str:
    """SHA-256 over all state of a checkpoint.

    That is weights, buffers, averages, optimizer, schedule, each worker's random numbers and the
    position.
    """
    sha256 = hashlib.sha256()
    _feed(sha256, [snapshot.tensors, snapshot.states, snapshot.facts["position"]])
    return sha256.hexdigest()


def _feed(sha256: Any, value: object) -> None:
    # Each part has its kind and its length in front, so that no two values have the same bytes.
    if isinstance(value, torch.Tensor):
        _feed(sha256, [str(value.dtype), list(value.shape)])
        sha256.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        _feed(
            sha256,
            sorted(([repr(key), child] for key, child in value.items()), key=lambda item: item[0]),
        )
    elif isinstance(value, list | tuple):
        sha256.update(b"list" + struct.pack("<q", len(value)))
        for child in value:
            _feed(sha256, child)
    else:
        data = repr(value).encode()
        sha256.update(b"value" + struct.pack("<q", len(data)) + data)


def read_curve(run: Path) -> tuple[dict[str, list[Any]], list[str]]:
    """Read the records of each step and epoch; a repeated step must have the same record.

    Returns:
        The records, and the steps of which there are two.
    """
    curve: dict[str, list[Any]] = {}
    different: list[str] = []
    for event in read_events(run / "metrics.jsonl")[0]:
        if event["event"] not in ("step", "epoch"):
            continue
        name = f"{event['event']} {event['step']}"
        values = [event["loss"], event["lr"], event.get("validation_accuracy")]
        if curve.setdefault(name, values) != values:
            different.append(f"{name} is on record with {curve[name]} and with {values}")
    return curve, different


def left_behind(run: Path) -> list[str]:
    """Name temporary files that dead writers left in a run's folder, and locks still held."""
    found = [f"left behind: {path.relative_to(run)}" for path in sorted(run.rglob(".tmp-*"))]
    return found + [
        f"still locked: {name}" for name in ("run.lock", "checkpoints") if _is_locked(run / name)
    ]


def _is_locked(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def processes(name: str, value: str) -> list[int]:
    """The living processes that have this in their environment, those of other users left out."""
    entry = f"{name}={value}".encode()
    return [
        int(path.name)
        for path in Path("/proc").glob("[0-9]*")
        if entry in environment(int(path.name))
    ]


def environment(pid: int) -> list[bytes]:
    """The environment of a process; empty if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


def kill(pids: Iterable[int]) -> None:
    """Kill processes, as far as they still are."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
