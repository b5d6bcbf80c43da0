"""Torch's compiler stays away, and nothing else changes."""

import subprocess
import sys
from pathlib import Path

import torch

from syncnorm.train.compiler import without_compiler
from syncnorm.train.optim import OPTIMIZERS

ROOT = Path(__file__).parents[2]


def parameters_after(cls: type[torch.optim.Optimizer]) -> torch.Tensor:
    """A matrix after some steps, gone on with from a saved state."""
    matrix = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
    optimizer = cls([matrix], lr=0.1)  # pyright: ignore[reportCallIssue]
    for step in range(6):
        if step == 3:
            state = optimizer.state_dict()
            optimizer = cls([matrix], lr=0.2)  # pyright: ignore[reportCallIssue]
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        (matrix.sin() ** 2 * torch.arange(12.0).reshape(3, 4)).sum().backward()
        optimizer.step()
        assert matrix.is_leaf
    return matrix.detach()


def compare() -> None:
    """In a process of its own: all optimizers without the compiler, then torch's own with it."""
    light = {name: parameters_after(cls) for name, cls in OPTIMIZERS.items()}
    assert "torch._dynamo" not in sys.modules
    for name, got in light.items():
        expected = parameters_after(getattr(torch.optim, name))
        assert torch.equal(got, expected), name
        assert torch.equal(parameters_after(OPTIMIZERS[name]), expected), name
    assert "torch._dynamo" in sys.modules


def train_alone(folder: str) -> None:
    """In a process of its own: a run of one worker."""
    import torch.distributed as dist

    from tests.train import runs

    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    runs.train_digits(folder, ["train.epochs=1", "train.global_batch=500", "train.ema=0.5"])
    assert {"torch._dynamo", "sklearn"}.isdisjoint(sys.modules)
    assert "_dynamo" not in vars(torch)
    dist.destroy_process_group()


def in_a_process(code: str) -> None:
    code = f"from tests.train import test_compiler as t; {code}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr


def test_optimizers_take_the_same_steps():
    in_a_process("t.compare()")


def test_a_run_imports_neither_the_compiler_nor_scikit_learn(tmp_path):
    in_a_process(f"t.train_alone({str(tmp_path)!r})")


def test_hooks_of_a_step_are_called():
    seen = []
    optimizer = without_compiler(torch.optim.SGD)([torch.zeros(1, requires_grad=True)], lr=0.1)
    assert (type(optimizer).__name__, type(optimizer).__module__) == ("SGD", "torch.optim.sgd")
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step()
    assert seen == ["before", "after"]
