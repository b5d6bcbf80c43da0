"""Pooled statistics in Lightning: one plugin instead of `sync_batchnorm=True`, on CPUs, too.

    torchrun --nproc-per-node 2 examples/lightning_digits.py

Needs lightning, and scikit-learn for its digits.
"""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from syncnorm.integrations.lightning import LayerSync


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 36, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    torch.manual_seed(0)
    module = Digits()
    # 8 samples on each worker, and statistics of all of them.
    loader = DataLoader(
        TensorDataset(x[:1500], y[:1500]), batch_size=8, shuffle=True, drop_last=True
    )
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", plugins=[LayerSync()], max_epochs=2,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    if trainer.is_global_zero:
        print("after fitting:", module.net[1])
        accuracy = (module.net.eval()(x[1500:]).argmax(1) == y[1500:]).float().mean()
        print(f"test accuracy {100 * accuracy:.2f} %")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
