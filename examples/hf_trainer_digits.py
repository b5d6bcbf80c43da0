"""Pooled statistics in Hugging Face's Trainer, on any number of workers.

    torchrun --nproc-per-node 2 examples/hf_trainer_digits.py

Given a folder it goes on from its last checkpoint, and stops and saves after so many steps in all;
the number of workers may be another one. Needs transformers with accelerate, and scikit-learn for
its digits.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from syncnorm import ElasticBatchSampler, convert, prepare_ddp


class Elastic(TrainerCallback):
    """Moves the sampler's cursor, which follows from the number of steps that are saved."""

    def __init__(self, sampler: ElasticBatchSampler, steps: int) -> None:
        self.sampler, self.steps = sampler, steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        epoch, step = divmod(state.global_step, self.sampler.steps_per_epoch)
        self.sampler.load_state_dict(self.sampler.state_dict() | {"epoch": epoch, "step": step})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.sampler.advance()
        if state.global_step == self.steps:
            control.should_save = control.should_training_stop = True

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.sampler.advance()


class ElasticTrainer(Trainer):
    def __init__(self, sampler: ElasticBatchSampler, **options: Any) -> None:
        super().__init__(**options)
        self.sampler = sampler
        self.losses: list[Tensor] = []

    def get_train_dataloader(self) -> DataLoader:
        # Not prepared by Accelerate, which would shard it again.
        return DataLoader(
            self.train_dataset, batch_sampler=self.sampler, collate_fn=self.data_collator
        )

    def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
        loss = self.sampler.scale_loss(super().compute_loss(model, inputs))
        self.losses.append(loss.detach())
        return loss


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.Tensor(images).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def train(folder: Path, steps: int = -1) -> tuple[ElasticTrainer, Tensor]:
    """Train to the end, or to so many steps in all; the trainer, and the loss of each step."""
    args = TrainingArguments(
        str(folder), use_cpu=True, num_train_epochs=2, learning_rate=0.003, save_strategy="no", report_to="none",
        disable_tqdm=True,
        # The sampler begins where it was. Trainer need not draw what was done before.
        ignore_data_skip=True,
    )  # fmt: skip
    x, y = digits()
    dataset = [{"pixel_values": x[i], "labels": int(y[i])} for i in range(1500)]
    sampler = ElasticBatchSampler(len(dataset), 32)
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16], depths=[1], layer_type="basic", num_labels=10
    )  # fmt: skip
    model = convert(ResNetForImageClassification(config)).to(args.device)
    trainer = ElasticTrainer(
        sampler,
        model=sampler.attach(prepare_ddp(model)),
        args=args,
        train_dataset=dataset,
        callbacks=[Elastic(sampler, steps)],
    )
    last = get_last_checkpoint(str(folder)) if folder.exists() else None
    trainer.train(resume_from_checkpoint=last)
    return trainer, trainer.accelerator.reduce(torch.stack(trainer.losses), "mean")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        trainer, losses = train(folder, int(sys.argv[2]) if len(sys.argv) > 2 else -1)
    if trainer.is_world_process_zero():
        x, y = digits()
        print(f"{len(losses)} steps; losses of the last: {losses[-3:].tolist()}")
        with torch.no_grad():
            guesses = trainer.model.eval()(x[1500:]).logits.argmax(1)
        print(f"test accuracy {100 * (guesses == y[1500:]).float().mean():.2f} %")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
