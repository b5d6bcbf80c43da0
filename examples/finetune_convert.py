"""Fine-tune a pretrained model with small, biased batches: convert, train, revert, save.

    python examples/finetune_convert.py

A network learns the digits 0 to 4, then all ten, in batches of 8 of one or two digits each: batch
normalisation sees such a batch through statistics that evaluation never uses, renormalisation
corrects towards those it does use. What is saved is a plain torch model. Needs scikit-learn.
"""

import copy
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from syncnorm import RenormSchedule, SyncBatchRenorm, conversion_table, convert, revert

torch.set_num_threads(1)


# %%
def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10),
    )  # fmt: skip


def train(model: nn.Module, x: Tensor, y: Tensor, order: list[Tensor], lr: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    for batch in order:
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * (model.eval()(x).argmax(1) == y).float().mean().item()


# %% [markdown]
# Pretraining sees five of the ten digits.

# %%
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
test = x[1500:], y[1500:]
x, y = x[:1500], y[:1500]

pretrained = make_model()
few = (y < 5).nonzero().squeeze(1)
train(pretrained, x, y, [few[torch.randperm(len(few))[:64]] for _ in range(60)], lr=0.05)
print(f"pretrained on five digits: {accuracy(pretrained, *test):.2f} %")

# %% [markdown]
# Fine-tuning sees all of them, in batches of 8 with one or two digits each: first with torch's
# layers, then with these converted to batch renormalisation.

# %%
by_label = torch.cat([torch.randperm(1500) for _ in range(4)])
by_label = by_label[y[by_label].argsort(stable=True)]
batches = [b for b in by_label.split(8) if len(b) == 8]
order = [batches[i] for i in torch.randperm(len(batches))]
plain, model = copy.deepcopy(pretrained), copy.deepcopy(pretrained)
train(plain, x, y, order, lr=0.01)
print(f"fine-tuned with torch's layers: {accuracy(plain, *test):.2f} %")

# %%
convert(model, SyncBatchRenorm, schedule=RenormSchedule.constant(3.0, 5.0))
print(conversion_table(model))
train(model, x, y, order, lr=0.01)
print(f"fine-tuned with renormalisation: {accuracy(model, *test):.2f} %")

# %% [markdown]
# What is saved needs no syncnorm.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.pt"
    torch.save(revert(model).state_dict(), path)
    again = make_model()
    again.load_state_dict(torch.load(path, weights_only=True))
print(f"loaded into plain torch: {accuracy(again, *test):.2f} %, {again[1]}")
