"""A plugin for Lightning (either package name) that pools statistics during fitting."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from contextlib import suppress
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm.layers import SyncBatchNorm
from syncnorm.model.convert.convert import convert, revert
from syncnorm.model.ddp import prepare_ddp
from syncnorm.module import SyncNorm

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


class LayerSync:
    """Pool batch norms over Lightning's workers; replaces `sync_batchnorm=True`.

        Trainer(strategy="ddp", devices=4, plugins=[LayerSync()])

    During fitting the module's batch norms are `SyncBatchNorm`; afterwards they have their former
    classes again, with the state they have learnt. Checkpoints have the usual keys. On one device
    Lightning does not call the plugin.

    A module that has layers of ours already is only prepared for DistributedDataParallel, and stays
    as it is. So must be those with `SyncBatchRenorm` or `sync="lagged"`, whose clock and averages
    are in checkpoints: Lightning restores a checkpoint before the plugin acts. Convert in the
    module's `__init__`.

    Args:
        options: of `convert`: process_group, select, sync, momentum, eps.
    """

    def __init__(self, **options: Any) -> None:
        # Lightning accepts plugins of its own class only, and has two package names. Where none is
        # imported yet, whoever makes a Trainer will import one that is installed.
        names = [name for name in _PACKAGES if name in sys.modules] or [
            name for name in _PACKAGES if importlib.util.find_spec(name.partition(".")[0])
        ]
        for name in names:
            # A folder of that name is no package.
            with suppress(ModuleNotFoundError):
                importlib.import_module(f"{name}.plugins").LayerSync.register(type(self))
        self.options = options
        self._has_converted = False

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert and prepare the model. Lightning calls this on every worker before wrapping."""
        trainer: Any = model.trainer
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self._has_converted = bool(norms) and not any(isinstance(m, SyncNorm) for m in norms)
        if self._has_converted:
            convert(model, SyncBatchNorm, **self.options)
        # Lightning would move it next. It is moved now since prepare_ddp broadcasts buffers, and
        # the backend may support one kind of device only.
        return prepare_ddp(model.to(trainer.strategy.root_device))

    def revert(self, model: nn.Module) -> nn.Module:
        """Undo the conversion. Lightning calls this on every worker after fitting."""
        return revert(model) if self._has_converted else model
