"""A step on a device has the host wait for nothing but the workers' notes.

Meta tensors stand for those of a device: they cannot be read, and code that asks for the CPU takes
the other branch with them. What is copied to or from the host is found in a log of operators.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import distributed
from torch.utils._pytree import tree_leaves

from syncnorm.run.dry_run import _return_bucket
from syncnorm.train.config.file import load_config
from syncnorm.train.data.feed import TRAIN, MemoryFeed
from syncnorm.train.step import StepBatch, training_step
from syncnorm.train.step_notes import Flags, Notes, PendingNotes
from syncnorm.train.workers import Workers
from syncnorm.undocumented import TorchDispatchMode, fake_store
from tests.train.nets import Net
from tests.train.runs import images_and_labels, setup_of

META = torch.device("meta")


class Centered(Net):
    """A network with a buffer of its own, which all workers take over from the first."""

    center: Tensor

    def __init__(self, in_channels: int, num_classes: int, norm_layer) -> None:
        super().__init__(in_channels, num_classes, norm_layer)
        self.register_buffer("center", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        self.center.lerp_(y.detach().mean(0), 0.1)
        return self.fc(y - self.center)


class Arranged:
    """DDP's reducer, whose arrangement of buckets stays: a new one would be read on the host."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


class Copies(TorchDispatchMode):
    """Logs the operators that have tensors of both the host and the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if len({t.device for t in tensors}) > 1:
            on_host = next(t for t in tensors if t.device.type == "cpu")
            is_async = (func, args[2:]) == (torch.ops.aten.copy_.default, (True,))
            how = "not waited for" if is_async else "waited for"
            self.found.append(f"{func.name()} {on_host.dtype}, {how}")
        return result


@pytest.fixture
def alone():
    """The first of two workers; the other's part of every sum is missing."""
    dist.init_process_group("fake", store=fake_store(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def _steps(overrides: list[str], monkeypatch: Any) -> list[str]:
    """Take two steps on the device; the operators that copy from or to the host in the second."""
    config = load_config("digits", overrides)
    feed = MemoryFeed(images_and_labels(16), config, META)
    # DDP reads the shapes of the others' parameters when it is made.
    monkeypatch.setattr(distributed, "_verify_param_shape_across_processes", lambda *_: None)
    setup = setup_of(config, Workers(0, 2, META), feed)
    setup.ddp.register_comm_hook(None, _return_bucket)
    setup.ddp.reducer = Arranged(setup.ddp.reducer)
    read: list[PendingNotes] = []

    def notes(self: PendingNotes, flags: Flags, *, failed: bool, lacks: bool) -> Notes:
        assert not lacks
        read.append(self)
        return Notes([0.5, 0.5], [8.0, 8.0], False, False, failed, lacks, are_alike=True)

    # The one thing that a step waits for.
    monkeypatch.setattr(PendingNotes, "exchange", notes)
    log = Copies()
    for step in (1, 2):
        indices = torch.arange(16, device=META)
        with log:
            log.found.clear()
            batches = feed.batches(TRAIN, setup.forwards(indices), 1)
            assert training_step(setup, batches, StepBatch(indices, 1, step)).was_taken
    assert len(read) == 2
    return log.found


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["norm.name=sync_batch_renorm"],
        ["norm.sync=running"],
        ["norm.sync=lagged"],
        ["norm.sync=none"],
        ["norm.name=batch_norm", "norm.sync=none"],
        ["train.ema=0.5"],
        ["train.norm_batch=4", "train.global_batch=16"],
        ["train.norm_batch=4", "train.global_batch=16", "launch.micro_batch=4"],
        ["train.optimizer.name=AdamW", "train.optimizer.momentum=null"],
        ["train.not_finite=skip"],
        ["data.augment.crop=1", "data.augment.flip=true", "data.augment.cutout=2"],
        ["model.name=tests.train.test_no_waiting:Centered"],
    ],
    ids=" ".join,
)
def test_a_step_reads_nothing_on_the_host(alone, monkeypatch, overrides):
    assert _steps(overrides, monkeypatch) == []


def test_a_clipped_gradients_norm_is_waited_for(alone, monkeypatch):
    """It decides whether the optimizer steps. The control: what is read is seen."""
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta"):
        _steps(["train.clip=1"], monkeypatch)


def test_a_copy_is_seen():
    with Copies() as log:
        torch.zeros(2).to(META)
        torch.zeros(2).to(META, non_blocking=True)
    assert log.found == ["aten::_to_copy torch.float32, waited for"] * 2
