"""Pooled statistics in Accelerate, on any number of workers: two lines before `prepare`.

    torchrun --nproc-per-node 2 examples/accelerate_digits.py

Given a folder it goes on from there, and stops and saves after so many steps; the number of
workers may be another one. Needs accelerate; `accelerate launch` starts it as well.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from syncnorm import ElasticBatchSampler, convert, prepare_ddp

EPOCHS = 2


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.Tensor(images).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def train(folder: Path | None = None, steps: float = float("inf")) -> tuple[nn.Module, Tensor]:
    """Train to the end, or stop after so many steps; the model, and the loss of each step."""
    accelerator = Accelerator(cpu=True)
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 36, 10),
    )
    sampler = ElasticBatchSampler(1500, 16)
    model = sampler.attach(prepare_ddp(convert(model).to(accelerator.device)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    # Not the loader: it would be sharded again.
    model, optimizer = accelerator.prepare(model, optimizer)
    loader = DataLoader(TensorDataset(x[:1500], y[:1500]), batch_sampler=sampler)
    accelerator.register_for_checkpointing(sampler)
    if folder is not None and folder.exists():
        accelerator.load_state(str(folder))

    losses: list[Tensor] = []
    while sampler.epoch < EPOCHS and len(losses) < steps:
        for batch in loader:
            images, labels = (each.to(accelerator.device) for each in batch)
            optimizer.zero_grad()
            loss = sampler.scale_loss(F.cross_entropy(model(images), labels))
            accelerator.backward(loss)
            optimizer.step()
            sampler.advance()
            losses.append(loss.detach())
            if len(losses) == steps:
                break
    if folder is not None:
        accelerator.save_state(str(folder))
    return accelerator.unwrap_model(model), accelerator.reduce(torch.stack(losses), "mean")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    model, losses = train(folder, int(sys.argv[2]) if len(sys.argv) > 2 else float("inf"))
    x, y = digits()
    accuracy = (model.eval()(x[1500:]).argmax(1) == y[1500:]).float().mean()
    accelerator = Accelerator(cpu=True)
    accelerator.print(f"{len(losses)} steps; losses of the last: {losses[-3:].tolist()}")
    accelerator.print(f"test accuracy {100 * accuracy:.2f} %")
    accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
