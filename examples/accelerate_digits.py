"""Pooled statistics in Accelerate: one line before `accelerator.prepare`.

    torchrun --nproc-per-node 2 examples/accelerate_digits.py

Needs accelerate; `accelerate launch` starts it as well.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from syncnorm import convert, prepare_ddp


def main() -> None:
    accelerator = Accelerator(cpu=True)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 36, 10),
    )
    model = prepare_ddp(convert(model).to(accelerator.device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(
        TensorDataset(x[:1500], y[:1500]), batch_size=8, shuffle=True, drop_last=True
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(2):
        for images, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(images), labels))
            optimizer.step()
    plain = accelerator.unwrap_model(model).eval()
    accuracy = (plain(x[1500:]).argmax(1) == y[1500:]).float().mean()
    accelerator.print(f"test accuracy {100 * accuracy:.2f} %")
    accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
