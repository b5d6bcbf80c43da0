"""The plugin in the real Lightning: two workers on ragged shards train as torch does on the whole
batch.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from syncnorm import SyncBatchNorm, SyncBatchRenorm, convert, scale_loss
from tests.frameworks import frameworks
from tests.model.lightning_workers import kept_workers
from tests.model.whole import LR, SIZES, largest_difference, net, shards, train_alone

with_frameworks = frameworks("lightning")


def fit(
    options: dict[str, Any] | None, to: type | None = None, epochs: int = 1, resumed_after: int | None = None,
    folder: str = "", package: str = "lightning.pytorch",
) -> tuple[dict[str, Tensor], list[str], list[str], Any]:  # fmt: skip
    """Train this worker's shards; the state, the batch norms' classes in training and afterwards,
    what is left.
    """
    from syncnorm.integrations.lightning import LayerSync

    library = importlib.import_module(package)

    class Module(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.seen: list[str] = []
            if to is not None:
                convert(self.net, to)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            x, y = batch
            self.seen = norms(self.net)
            return scale_loss(F.cross_entropy(self(x), y), len(x))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LR, momentum=0.9)

    def train(epochs: int, checkpoint: str | None = None) -> tuple[Module, Any]:
        module = Module()
        trainer = library.Trainer(
            accelerator="cpu", devices=dist.get_world_size(), strategy="ddp", max_epochs=epochs,
            plugins=[kept_workers(package), *([] if options is None else [LayerSync(**options)])],
            use_distributed_sampler=False,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(shards(dist.get_rank()), batch_size=None)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        return module, trainer

    checkpoint = None
    if resumed_after is not None:
        checkpoint = f"{folder}/run.ckpt"
        train(resumed_after)[1].save_checkpoint(checkpoint)
    module, _ = train(epochs, checkpoint)
    return (
        module.net.state_dict(),
        module.seen,
        norms(module.net),
        len(module._forward_pre_hooks),
    )


def norms(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model if hasattr(m, "running_mean")]


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_two_workers_train_as_one_on_the_whole_batch_and_torchs_layers_are_back(pool, package):
    pytest.importorskip(package, reason=f"{package} is not installed")
    expected = train_alone(net())
    for state, seen, after, left in pool(len(SIZES)).run(fit, {}, None, 1, None, "", package):
        assert largest_difference(state, expected) < 1e-12
        assert seen == ["SyncBatchNorm"] * 2
        assert after == ["BatchNorm2d", "BatchNorm1d"]
        assert left == 0, "nothing of ours stays in the module"
    # The negative control: without the plugin each worker normalises its shard by itself.
    (local, seen, *_), _ = pool(len(SIZES)).run(fit, None)
    assert seen == ["BatchNorm2d", "BatchNorm1d"]
    assert largest_difference(local, expected) > 1e-3


def test_options_reach_the_layers_and_hidden_exchanges_work(pool):
    """sync="running" pools the statistics that evaluation uses: equal on all workers, other than
    those of "batch".
    """
    first, second = pool(len(SIZES)).run(fit, {"sync": "running"})
    batch, _ = pool(len(SIZES)).run(fit, {})
    key = "1.running_mean"
    assert torch.equal(first[0][key], second[0][key])
    assert not torch.equal(first[0][key], batch[0][key])
    assert first[1:] == batch[1:]


@pytest.mark.parametrize("to", [SyncBatchNorm, SyncBatchRenorm])
def test_layers_that_were_ours_before_stay_ours(pool, to):
    for _, seen, after, _ in pool(len(SIZES)).run(fit, {}, to):
        assert seen == after == [to.__name__] * 2


def test_a_resumed_run_is_the_undisturbed_one(pool, tmp_path):
    """The clock is in the checkpoint, and goes into layers that are there before Lightning restores
    it.
    """
    expected = pool(len(SIZES)).run(fit, {}, SyncBatchRenorm, 2)[0][0]
    for state, *_ in pool(len(SIZES)).run(fit, {}, SyncBatchRenorm, 2, 1, str(tmp_path)):
        assert int(state["1.num_batches_tracked"]) == 2 * len(shards(0))
        assert largest_difference(state, expected) < 1e-12


@pytest.mark.slow
def test_the_plugin_may_be_made_before_lightning_is_imported():
    program = """
from syncnorm.integrations.lightning import LayerSync
plugin = LayerSync()
import lightning.pytorch
lightning.pytorch.Trainer(accelerator="cpu", plugins=[plugin], logger=False)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)
