"""The one line before transformers' Trainer, in the real library."""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from syncnorm import convert, prepare_ddp, revert
from tests.frameworks import frameworks
from tests.model.whole import as_torchruns_worker, largest_difference

with_frameworks = frameworks("transformers", "accelerate")
STEPS, BATCH = 3, 8


class Images(Dataset[dict[str, Tensor]]):
    """The mean drifts along the set, so shards differ."""

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(index)
        image = torch.randn(3, 32, 32, generator=g, dtype=torch.float64) + index % BATCH
        return {"pixel_values": image, "labels": torch.tensor(index % 3)}


def train(is_converted: bool) -> dict[str, Tensor]:
    """Train a small ResNet, BATCH samples a step over all workers; the state at its end."""
    from transformers import (
        ResNetConfig,
        ResNetForImageClassification,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    with as_torchruns_worker(), tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, use_cpu=True, ddp_backend="gloo", num_train_epochs=1, learning_rate=0.05, optim="sgd",
            per_device_train_batch_size=BATCH // dist.get_world_size(), report_to="none", save_strategy="no",
            disable_tqdm=True, max_grad_norm=0.0, average_tokens_across_devices=False, train_sampling_strategy="sequential",
        )  # fmt: skip
        set_seed(0)
        config = ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
            num_labels=3,
        )
        model: nn.Module = ResNetForImageClassification(config).double()
        if is_converted:
            model = prepare_ddp(convert(model).to(arguments.device))
        Trainer(model=model, args=arguments, train_dataset=Images()).train()
    return revert(model).state_dict()


def test_two_workers_train_as_one(pool):
    (expected,) = pool(1).run(train, False)
    first, second = pool(2).run(train, True)
    assert largest_difference(first, expected) < 1e-12
    assert all(torch.equal(first[name], second[name]) for name in first)
    local, _ = pool(2).run(train, False)
    assert largest_difference(local, expected) > 1e-3, "the negative control"
