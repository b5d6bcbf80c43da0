"""Train on any number of workers as on one, stop, and go on with another number of them.

    torchrun --nproc-per-node 4 examples/ddp.py

Given a checkpoint's path it goes on from there, and stops and saves after so many steps:

    torchrun --nproc-per-node 4 examples/ddp.py run.pt 20
    torchrun --nproc-per-node 3 examples/ddp.py run.pt

Needs scikit-learn, for its digits.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from syncnorm import ElasticBatchSampler, SyncBatchNorm, prepare_ddp

BATCH, EPOCHS = 96, 3


def make_model() -> nn.Module:
    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            SyncBatchNorm(outputs),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )

    return nn.Sequential(block(1, 16), block(16, 32), nn.Flatten(), nn.Linear(32 * 2 * 2, 10))


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.Tensor(images).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def train(checkpoint: Path | None = None, steps: float = float("inf")) -> tuple[nn.Module, Tensor]:
    """Train to the end, or stop after so many steps; the model, and the loss of each step."""
    x, y = digits()
    # 96 samples a step, on any number of workers; 60 in the last of an epoch.
    sampler = ElasticBatchSampler(1500, BATCH)
    torch.manual_seed(0)
    model = prepare_ddp(make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses: list[Tensor] = []
    if checkpoint is not None and checkpoint.exists():
        states = torch.load(checkpoint)
        for each, state in zip((model, optimizer, sampler), states, strict=True):
            each.load_state_dict(state)

    ddp = DistributedDataParallel(sampler.attach(model))
    loader = DataLoader(TensorDataset(x[:1500], y[:1500]), batch_sampler=sampler)
    while sampler.epoch < EPOCHS and len(losses) < steps:
        for images, labels in loader:
            optimizer.zero_grad()
            # DDP's average of these losses is the mean over the step, and so are the gradients.
            loss = sampler.scale_loss(F.cross_entropy(ddp(images), labels))
            loss.backward()
            optimizer.step()
            sampler.advance()
            losses.append(loss.detach())
            if len(losses) == steps:
                break
    if checkpoint is not None and dist.get_rank() == 0:
        torch.save([each.state_dict() for each in (model, optimizer, sampler)], checkpoint)
    curve = torch.stack(losses)
    dist.all_reduce(curve)
    return model, curve / dist.get_world_size()


def main() -> None:
    checkpoint = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    model, losses = train(checkpoint, int(sys.argv[2]) if len(sys.argv) > 2 else float("inf"))
    model.eval()  # from here on no worker waits for another
    if dist.get_rank() == 0:
        x, y = digits()
        print(f"{len(losses)} steps; losses of the last: {losses[-3:].tolist()}")
        accuracy = (model(x[1500:]).argmax(1) == y[1500:]).float().mean()
        print(f"test accuracy {100 * accuracy:.2f} %")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
