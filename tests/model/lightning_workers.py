"""Lightning on the workers of a pool."""

import importlib
from typing import Any

import torch.distributed as dist


def kept_workers(package: str = "lightning.pytorch") -> Any:
    """Make an environment of Lightning's of the workers that are there already.

    Args:
        package: Lightning's, by its new or its old name.
    """

    class Kept(importlib.import_module(f"{package}.plugins.environments").LightningEnvironment):
        creates_processes_externally = True

        def world_size(self) -> int:
            return dist.get_world_size()

        def global_rank(self) -> int:
            return dist.get_rank()

        def local_rank(self) -> int:
            return dist.get_rank()

        def teardown(self) -> None: ...

    return Kept()
