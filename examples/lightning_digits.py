"""Pooled statistics in Lightning, on any number of workers: a plugin and a callback, on CPUs, too.

    torchrun --nproc-per-node 2 examples/lightning_digits.py

The plugin takes the place of `sync_batchnorm=True`. Given a checkpoint's path it goes on from
there, and stops and saves after so many steps in all; the number of workers may be another one.
Needs lightning, and scikit-learn for its digits.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from syncnorm import ElasticBatchSampler
from syncnorm.integrations.lightning import LayerSync


class Digits(LightningModule):
    def __init__(self, sampler: ElasticBatchSampler) -> None:
        super().__init__()
        self.sampler = sampler
        self.losses: list[Tensor] = []
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 36, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        loss = self.sampler.scale_loss(F.cross_entropy(self.net(x), y))
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Elastic(Callback):
    """Moves the sampler's cursor, and keeps it in Lightning's checkpoints."""

    def __init__(self, sampler: ElasticBatchSampler, checkpoint: Path | None, steps: int) -> None:
        self.sampler, self.checkpoint, self.steps = sampler, checkpoint, steps

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.sampler.attach(module.net)  # after the plugin has converted it

    # A callback's hook: the module's own comes after checkpoints are written.
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.sampler.advance()
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.checkpoint)
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.Tensor(images).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def train(
    checkpoint: Path | None = None, steps: int = -1, plugins: tuple[Any, ...] = (), devices: int = 2
) -> tuple[Digits, Tensor]:
    """Train to the end, or to so many steps in all; the module, and the loss of each step."""
    x, y = digits()
    sampler = ElasticBatchSampler(1500, 16)  # 16 samples a step, and statistics of all of them
    torch.manual_seed(0)
    module, elastic = Digits(sampler), Elastic(sampler, checkpoint, steps)
    loader = DataLoader(TensorDataset(x[:1500], y[:1500]), batch_sampler=sampler)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp", plugins=[LayerSync(), *plugins], callbacks=[elastic],
        use_distributed_sampler=False,  # else Lightning would shard the batches again
        max_epochs=2,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    is_begun = checkpoint is not None and checkpoint.exists()
    trainer.fit(module, loader, ckpt_path=str(checkpoint) if is_begun else None)
    return module, trainer.strategy.reduce(torch.stack(module.losses))


def main() -> None:
    module, losses = train(
        Path(sys.argv[1]) if len(sys.argv) > 1 else None,
        int(sys.argv[2]) if len(sys.argv) > 2 else -1,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "2")),
    )
    if module.global_rank == 0:
        x, y = digits()
        print(f"{len(losses)} steps; losses of the last: {losses[-3:].tolist()}")
        print("after fitting:", module.net[1])
        accuracy = (module.net.eval()(x[1500:]).argmax(1) == y[1500:]).float().mean()
        print(f"test accuracy {100 * accuracy:.2f} %")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
