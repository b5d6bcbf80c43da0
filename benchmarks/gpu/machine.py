"""The card and the versions."""

from __future__ import annotations

import importlib
import platform
from typing import Any

import torch

from benchmarks.gpu import part


def describe(device: str) -> dict[str, Any]:
    """What a table of figures has to say of the machine."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["triton"] = _version_of_triton()
    if device != "cuda":
        return {"card": f"none ({device})", "cards": 0, **versions}
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "cards": torch.cuda.device_count(),
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "second_level_cache": getattr(properties, "L2_cache_size", None),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        **versions,
    }


def _version_of_triton() -> str:
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return "none"


def measure(settings: part.Settings) -> None:
    settings.write(part="machine", **describe(settings.device))


if __name__ == "__main__":
    measure(part.from_arguments())
