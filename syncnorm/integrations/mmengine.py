"""Our layers and wrapper in the registries of mmengine (and so of mmcv, mmdet, mmseg, mmpretrain).

    custom_imports = dict(imports=["syncnorm.integrations.mmengine"])
    # or "PooledBRN"; options go in the same dict
    norm_cfg = dict(type="PooledBN")
    # needed by sync="running" and "lagged" only
    model_wrapper_cfg = dict(type="PooledDistributedDataParallel")

`build_norm_layer` calls both "bn", as it does all subclasses of torch's, so parameters keep their
names: a checkpoint of a model with norm_cfg = dict(type="BN") or "SyncBN" loads. Leave `sync_bn`
out of the config: it replaces our layers by torch's.
"""

from __future__ import annotations

from typing import Any

from mmengine.model import MMDistributedDataParallel  # pyright: ignore[reportMissingImports]
from mmengine.registry import MODEL_WRAPPERS, MODELS  # pyright: ignore[reportMissingImports]
from torch import nn

from syncnorm.layers import SyncBatchNorm, SyncBatchRenorm
from syncnorm.model.ddp import prepare_ddp

MODELS.register_module(name="PooledBN", module=SyncBatchNorm)
MODELS.register_module(name="PooledBRN", module=SyncBatchRenorm)


@MODEL_WRAPPERS.register_module()
class PooledDistributedDataParallel(MMDistributedDataParallel):
    """MMDistributedDataParallel that calls `prepare_ddp` on the model before wrapping it."""

    def __init__(
        self, module: nn.Module, *args: Any, process_group: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(
            prepare_ddp(module, process_group), *args, process_group=process_group, **kwargs
        )
