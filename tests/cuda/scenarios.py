"""Trainings of a small network, the same on any device: float64, on uneven shards, with masks."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncnorm import (
    Lagged,
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    accumulate,
    convert,
    frozen_statistics,
    functional,
    join,
    monitor,
    prepare_ddp,
    recalibrate,
    scale_loss,
)
from syncnorm.module import SyncNorm
from syncnorm.verify.steps import fill
from tests.distributed.steps import (
    Batch,
    Outcome,
    check_against_oracle,
    make_layer,
    one_step,
    parameters,
    train_step,
)

SIZES = (6, 3)
# At the first steps, and in between, layers wait and do not wait.
LAGGED = Lagged(forward_rate=0.3, backward_rate=0.1, max_drift=0.25)


def make(kind: str, channels: int, **options: Any) -> SyncNorm:
    """A layer: "norm" or "renorm"."""
    if kind == "norm":
        return SyncBatchNorm(channels, **options)
    schedule = RenormSchedule(2.0, 1.0, 0, 2, 4)
    return SyncBatchRenorm(channels, schedule=schedule, **options)


class Net(nn.Module):
    """Two layers, the first of which may be given a mask and be repeated."""

    def __init__(self, kind: str, is_repeated: bool | None = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        options["dtype"] = torch.float64
        self.conv1, self.norm1 = nn.Conv1d(3, 6, 3).double(), make(kind, 6, **options)
        self.conv2, self.norm2 = nn.Conv1d(6, 5, 1).double(), make(kind, 5, **options)
        self.head = nn.Linear(5, 2).double()
        self.is_repeated = is_repeated
        """True or False: repeated by a checkpoint that is re-entrant or not; None: not at all."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.conv1(x)
        if self.is_repeated is None:
            x = torch.tanh(self.norm1(x, mask))
        else:
            x = checkpoint(self._first, x, mask, use_reentrant=self.is_repeated)
        x = torch.tanh(self.norm2(self.conv2(x)))
        return self.head(x.mean(2))

    def _first(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return torch.tanh(self.norm1(x, mask))


def batches(steps: int, device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """This rank's shards of x (N, 3, 8), target (N, 2) and mask (N, 1, 6); means drift and jump."""
    g = torch.Generator().manual_seed(1)
    whole = sum(SIZES)
    drift = 0.3 * torch.arange(float(whole)).view(-1, 1, 1)
    made = []
    for step in range(steps):
        x = torch.randn(whole, 3, 8, generator=g, dtype=torch.float64)
        x = x * (1.0 + 0.8 * (step // 3 % 2)) + drift
        y = torch.randn(whole, 2, generator=g, dtype=torch.float64)
        mask = torch.randint(0, 3, (whole, 1, 6), generator=g).double()
        made.append(tuple(_mine(t).to(device) for t in (x, y, mask)))
    return made


def _mine(t: Tensor) -> Tensor:
    return t.split(SIZES)[dist.get_rank()] if dist.get_world_size() == len(SIZES) else t


def on_cpu(model: nn.Module) -> dict[str, Tensor]:
    """The model's state."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def train(
    device: str, kind: str, sync: str, is_repeated: bool | None = None, is_accumulated: bool = False
) -> dict[str, Tensor]:
    """Train under DistributedDataParallel; the losses of this rank and the state at the end."""
    mode = LAGGED if sync == "lagged" else sync
    model = prepare_ddp(Net(kind, is_repeated, sync=mode).to(device))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for number, (x, y, mask) in enumerate(batches(7, device)):
        if number % 2 == 0:
            optimizer.zero_grad()
        with accumulate(model) if is_accumulated else contextlib.nullcontext():
            loss = (wrapped(x, mask) - y).square().mean()
            scale_loss(loss, len(x)).backward()
        optimizer.step()
        losses.append(loss.detach().cpu())
    model.eval()
    with torch.no_grad():
        evaluated = model(x).cpu()
    return {"losses": torch.stack(losses), "evaluated": evaluated, **on_cpu(model)}


def train_until_data_ends(device: str, sync: str) -> dict[str, Tensor]:
    """Train within `join`; the first rank has more batches."""
    model = prepare_ddp(Net("norm", sync=sync).to(device))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with join(wrapped, optimizer):
        for x, y, mask in batches(2 + 2 * (dist.get_rank() == 0), device):
            optimizer.zero_grad()
            loss = (wrapped(x, mask) - y).square().mean()
            scale_loss(loss, len(x)).backward()
            optimizer.step()
    return on_cpu(model)


def whole_models(device: str) -> dict[str, Tensor]:
    """What acts on whole models: convert, monitor, freeze, recalibrate."""
    torch.manual_seed(0)
    parts = [nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 5, 1)]
    model = nn.Sequential(*parts, nn.BatchNorm1d(5)).double().to(device)
    model = prepare_ddp(convert(model))
    found: dict[str, Tensor] = {}
    watch = monitor(model)
    data = batches(3, device)
    for x, _, _ in data:
        model(x).square().mean().backward()
    for name, figures in watch.read()["layers"].items():
        numbers = {key: value for key, value in figures.items() if value is not None}
        found |= {f"{name} {key}": torch.tensor(float(value)) for key, value in numbers.items()}
    with frozen_statistics(model):
        found["frozen"] = model(data[0][0]).detach().cpu()
    recalibrate(model, [x for x, _, _ in data])
    return {**found, **on_cpu(model)}


def gradient_of_gradient(device: str, kind: str) -> dict[str, Tensor]:
    """The gradient of a penalty on the gradient."""
    layer = make(kind, 3, dtype=torch.float64).to(device)
    x, _, mask = batches(1, device)[0]
    x.requires_grad_()
    weights = torch.linspace(0.0, 1.0, 6, dtype=torch.float64, device=device)
    y = (layer(x[..., :6], mask) * weights).tanh().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    grad.square().sum().backward()
    assert layer.weight.grad is not None
    return {"x": x.grad.cpu(), "weight": layer.weight.grad.cpu()}


def functional_form(device: str) -> dict[str, Tensor]:
    """`functional.sync_batch_norm`, and statistics of this rank alone beside pooled ones."""
    x, _, mask = batches(1, device)[0]
    x = x[..., :6].requires_grad_()
    mean = torch.zeros(3, dtype=torch.float64, device=device)
    var = torch.ones(3, dtype=torch.float64, device=device)
    y = functional.sync_batch_norm(x, mean, var, mask=mask, training=True)
    z = make("norm", 3, dtype=torch.float64, process_group=1).to(device)(x, mask)
    F.silu(y * z).sum().backward()
    assert x.grad is not None
    return {"y": y.detach().cpu(), "mean": mean.cpu(), "var": var.cpu(), "x": x.grad.cpu()}


def layer_steps(
    device: str, steps: list[tuple[Tensor, Tensor, Tensor | None]], options: dict[str, Any]
) -> list[Outcome]:
    """`train_step` of `tests.distributed.steps`, on this device."""
    moved = [tuple(None if t is None else t.to(device) for t in step) for step in steps]
    return train_step(moved, {**options, "device": device})


def check_layer(
    pool, device: str, batches: list[Batch], sizes: tuple[int, ...], options: dict[str, Any]
) -> list[list[Outcome]]:
    """Run steps on the ranks of a pool and compare them with the oracle; the outcomes by rank."""
    by_rank = list(zip(*(b.shards(sizes) for b in batches), strict=True))
    found = pool.run_each(layer_steps, [(device, list(steps), options) for steps in by_rank])
    check_against_oracle(found, batches, sizes, options, factor=2.0)
    return found


def torchs_step(device: str, x: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient of torch's own layer, with the same weight and bias."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    layer = nn.SyncBatchNorm(x.shape[1], device=device, dtype=dtype)
    weight, bias = parameters(x.shape[1], dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    x = x.to(device).requires_grad_()
    y = layer(x)
    y.backward(cotangent.to(device))
    assert x.grad is not None
    return y.detach().cpu(), x.grad.cpu()


def deep_training(device: str, sync: str) -> Tensor:
    """Losses of a deep network whose gradients leave in many buckets, beside the statistics."""
    torch.manual_seed(dist.get_rank())
    layers: list[nn.Module] = []
    for _ in range(30):
        layers += [nn.Conv1d(8, 8, 1), SyncBatchNorm(8, sync=sync), nn.ReLU()]
    model = prepare_ddp(nn.Sequential(*layers).to(device))
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.001)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = wrapped(torch.randn(4, 8, 16, device=device)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


def compiled_steps(
    device: str,
    steps: list[tuple[Tensor, Tensor, Tensor | None]],
    options: dict[str, Any],
    backend: str,
) -> list[Outcome]:
    """Steps of a compiled layer on this rank's shards."""
    torch._dynamo.reset()
    x = steps[0][0]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    layer = make_layer(x.shape[1], dtype=dtype, device=device, **options)
    fill(layer, dict(zip(("weight", "bias"), parameters(x.shape[1], dtype), strict=True)))
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    moved = [tuple(None if t is None else t.to(device) for t in step) for step in steps]
    return [one_step(layer, *step, run=compiled) for step in moved]


def check_compiled_layer(
    pool,
    device: str,
    dtype: torch.dtype,
    options: dict[str, Any],
    sizes: tuple[int, ...],
    *,
    masked: bool,
) -> None:
    """Run steps of a compiled layer on the ranks of a pool and compare them with the oracle."""
    batches = [Batch.random((8, 5, 6, 7), dtype, masked=masked, seed=seed) for seed in range(2)]
    by_rank = list(zip(*(b.shards(sizes) for b in batches), strict=True))
    backend = "inductor" if device == "cuda" else "aot_eager"
    args = [(device, list(steps), options, backend) for steps in by_rank]
    found = pool.run_each(compiled_steps, args)
    check_against_oracle(found, batches, sizes, options, factor=2.0)


def compiled_training(device: str, sync: str) -> dict[str, Tensor]:
    """Train a model that is compiled under DistributedDataParallel."""
    torch._dynamo.reset()
    model = prepare_ddp(Net("norm", sync=LAGGED if sync == "lagged" else sync).to(device))
    wrapped = torch.compile(
        DistributedDataParallel(model), backend="inductor" if device == "cuda" else "aot_eager"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y, mask in batches(4, device):
        optimizer.zero_grad()
        loss = (wrapped(x, mask) - y).square().mean()
        scale_loss(loss, len(x)).backward()
        optimizer.step()
    return on_cpu(model)
