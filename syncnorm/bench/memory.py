"""Memory of a step: what torch's allocators hold at its peak beyond what they held before."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], object], device: str) -> int | None:
    """The bytes that `step` takes at its peak; None if it allocates nothing.

    On a CPU torch's profiler sees each allocation of tensors, temporaries of operators included.
    What a library takes from the system by itself is not seen.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return _highest(json.loads(path.read_text())["traceEvents"])


def _highest(events: Iterable[Mapping[str, Any]]) -> int | None:
    """The highest total over its first value, from the allocations in a trace."""
    found = sorted(
        (event["ts"], event["args"]["Total Allocated"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
    )
    if not found:
        return None
    _, total, first = found[0]
    return max(each for _, each, _ in found) - (total - first)
