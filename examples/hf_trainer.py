"""Pooled statistics in transformers' Trainer: one line before it.

    torchrun --nproc-per-node 2 examples/hf_trainer.py

Needs transformers and accelerate.
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from syncnorm import convert, prepare_ddp


class Digits(Dataset[dict[str, Tensor]]):
    """scikit-learn's digits, as transformers' models take them."""

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def main(folder: str) -> None:
    arguments = TrainingArguments(
        folder, use_cpu=True, ddp_backend="gloo", per_device_train_batch_size=16,
        num_train_epochs=2, learning_rate=0.01, dataloader_drop_last=True,
        save_strategy="no", report_to="none", disable_tqdm=True,
        average_tokens_across_devices=False,  # it would multiply the loss by the number of workers
    )  # fmt: skip
    config = ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        num_labels=10,
    )
    torch.manual_seed(0)
    model = ResNetForImageClassification(config)
    model = prepare_ddp(convert(model).to(arguments.device))  # `device` has made the process group
    digits = Digits()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Subset(digits, range(1500)),
        compute_metrics=lambda p: {
            "accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())
        },
    )
    trainer.train()
    accuracy = trainer.evaluate(Subset(digits, range(1500, 1797)))["eval_accuracy"]
    if trainer.is_world_process_zero():
        print(f"test accuracy {100 * accuracy:.2f} %")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
