"""Train on uneven shards as on whole batches, with DistributedDataParallel alone.

    torchrun --nproc-per-node 2 examples/ddp.py

Worker 0 takes a third of each batch and worker 1 the rest, as when videos or point clouds differ in
size. Needs scikit-learn, for its digits.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm import SyncBatchNorm, prepare_ddp, scale_loss

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


def main() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    shares = torch.arange(1, size + 1).cumsum(0) / (size * (size + 1) / 2)

    torch.manual_seed(0)
    model = DistributedDataParallel(prepare_ddp(make_model()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(EPOCHS):
        # The same order on every worker, by the seed.
        for batch in torch.randperm(1500).split(BATCH):
            mine = batch.tensor_split((shares[:-1] * len(batch)).long())[rank]
            optimizer.zero_grad()
            loss = scale_loss(F.cross_entropy(model(x[mine]), y[mine]), len(mine))
            loss.backward()
            optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if rank == 0:
            print(f"epoch {epoch + 1}: loss of its last batch {total / size:.3f}")
    model.eval()  # from here on no worker waits for another
    if rank == 0:
        accuracy = (model.module(x[1500:]).argmax(1) == y[1500:]).float().mean()
        print(f"test accuracy {100 * accuracy:.2f} %")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
