"""Takes the native library away from rank 1 of each process group: workers whose builds differ.

Python imports this file at the start of every process that has its folder on PYTHONPATH, so that it
holds for ranks of a pool and for workers of any launcher.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_GROUPS = "torch.distributed.distributed_c10d"
# What may have been found out before a process knows its rank: it may be a fork.
_FOUND_OUT = {
    "syncnorm.native": ("load",),
    "syncnorm.comm.shared": ("_functions",),
    "syncnorm.maths.kernels.native": ("_functions", "_types"),
}


class _Finder(importlib.abc.MetaPathFinder):
    """Changes the module of process groups when torch imports it, for torch need not be imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _GROUPS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def then_change(module: ModuleType) -> None:
            execute(module)
            _change(module)

        spec.loader.exec_module = then_change
        return spec


def _change(module: Any) -> None:
    begin = module.init_process_group

    @functools.wraps(begin)
    def init_process_group(*args: Any, **kwargs: Any) -> None:
        begin(*args, **kwargs)
        if module.get_rank() == 1:
            _take_away()

    module.init_process_group = init_process_group


def _take_away() -> None:
    os.environ["SYNCNORM_NATIVE"] = "0"
    for name, functions in _FOUND_OUT.items():
        if name in sys.modules:
            for function in functions:
                getattr(sys.modules[name], function).cache_clear()


sys.meta_path.insert(0, _Finder())
