"""The card and the versions."""

from __future__ import annotations

import importlib
import platform
import warnings
from typing import Any

import torch

from benchmarks.gpu import part
from syncnorm.maths.kernels import triton


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
        "kernels": _kernels(),
    }


def _kernels() -> str:
    """Whose kernels the layers take, and the warning if they are not Triton's."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if triton.is_usable(torch.device("cuda", 0)):
            return "in Triton"
    return "; ".join(["of torch", *(str(each.message)[:300] for each in caught)])


def _version_of_triton() -> str:
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return "none"


def measure(settings: part.Settings) -> None:
    settings.write(part="machine", **describe(settings.device))


if __name__ == "__main__":
    measure(part.from_arguments())
