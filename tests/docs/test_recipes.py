"""What docs/recipes.md tells users to write, in the real libraries, where they are installed."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from syncnorm import convert, revert
from syncnorm.family import L1BatchNorm
from syncnorm.module import SyncNorm

ROOT = Path(__file__).parents[2]
BLOCKS = dict(
    re.findall(
        r"```python\n(# needs (?:\w+))\n(.*?)```", (ROOT / "docs/recipes.md").read_text(), re.DOTALL
    )
)
BLOCKS = {needs.removeprefix("# needs "): block for needs, block in BLOCKS.items()}
SHAPES = {
    "monai": (1, 8, 8, 8),
    "segmentation_models_pytorch": (3, 64, 64),
    "ultralytics": (3, 64, 64),
    "transformers": (3, 32, 32),
}
SIZES = (3, 1)
# Their operators are not needed here, only their names.
DECLARED = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def names_of(library: str) -> dict[str, Any]:
    """Run the library's block."""
    if importlib.util.find_spec("torchvision") is not None:
        try:
            import torchvision  # noqa: F401
        except RuntimeError:  # built for CUDA, beside a CPU build of torch
            operators = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                operators.define(name + DECLARED)
            globals()["_kept"] = operators
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="syncnorm-yolo-"))
    there = types.ModuleType("recipe")
    torch.manual_seed(0)
    exec(compile(BLOCKS[library], "docs/recipes.md", "exec"), vars(there))
    return vars(there)


def model_of(library: str) -> nn.Module:
    names = names_of(library)
    if library != "ultralytics":
        return names["model"]
    trainer = names["PooledTrainer"].__new__(names["PooledTrainer"])
    # What setup_model reads of a trainer, whose constructor would look for a data set.
    trainer.model, trainer.device, trainer.resume = "yolo11n.yaml", torch.device("cpu"), False
    trainer.args = types.SimpleNamespace(pretrained=False, distill_model=None)
    trainer.data = {"nc": 3, "channels": 3, "names": {0: "a", 1: "b", 2: "c"}}
    trainer.setup_model()
    return trainer.model


def without_chance(model: nn.Module) -> nn.Module:
    """Take out what is drawn at random, in place."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model.double().train()


def tensors(outputs: Any) -> list[Tensor]:
    return [
        leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad
    ]


def run(model: nn.Module, x: Tensor, part: slice) -> list[Tensor]:
    """Forward, and backward from fixed cotangents of the whole batch's outputs."""
    outputs = tensors(model(x[part]))
    total = torch.zeros((), dtype=torch.float64)
    for number, output in enumerate(outputs):
        g = torch.Generator().manual_seed(number)
        shape = (len(x), *output.shape[1:])
        cotangent = torch.randn(shape, generator=g, dtype=torch.float64)
        total = total + (output * cotangent[part]).sum()
    (
        total * (dist.get_world_size() if isinstance(model, DistributedDataParallel) else 1)
    ).backward()
    return [output.detach() for output in outputs]


def gap(got: Tensor, expected: Tensor, scale: Tensor) -> float:
    return (
        float((got - expected).abs().max() / scale.abs().max().clamp(min=1e-3)) if len(got) else 0.0
    )


def compare(library: str, is_pooled: bool) -> tuple[dict[str, float], list[Tensor]]:
    """The largest gaps to torch's layers on the joined batch; and this worker's statistics."""
    model = without_chance(model_of(library))
    rank = dist.get_rank()
    three = nn.BatchNorm3d if library == "monai" else nn.BatchNorm2d
    alone = revert(copy.deepcopy(model), to=three)
    assert not any(isinstance(m, SyncNorm) for m in alone.modules())
    assert any(isinstance(m, SyncNorm) for m in model.modules())
    x = torch.randn(
        sum(SIZES),
        *SHAPES[library],
        generator=torch.Generator().manual_seed(7),
        dtype=torch.float64,
    )
    x += torch.arange(len(x)).view(-1, *[1] * len(SHAPES[library]))  # so that shards differ
    part = slice(0, SIZES[0]) if rank == 0 else slice(SIZES[0], None)
    expected = run(alone, x, slice(None))
    trained = model if is_pooled else revert(model, to=three)
    ddp = DistributedDataParallel(trained, find_unused_parameters=True, broadcast_buffers=False)
    outputs = run(ddp, x, part)
    largest = max(p.grad.abs().max() for p in alone.parameters() if p.grad is not None)
    gaps = {
        "outputs": max(gap(o, e[part], e) for o, e in zip(outputs, expected, strict=True)),
        "gradients": max(
            gap(p.grad, q.grad, torch.as_tensor(largest))
            for p, q in zip(trained.parameters(), alone.parameters(), strict=True)
            if q.grad is not None
        ),
        "buffers": max(
            gap(b.double(), c.double(), c.double())
            for b, c in zip(trained.buffers(), alone.buffers(), strict=True)
            if c.ndim
        ),
    }
    return gaps, [b.clone() for name, b in trained.named_buffers() if "running" in name]


@pytest.mark.parametrize("library", SHAPES)
def test_two_workers_are_torchs_layers_on_the_joined_batch(pool, library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    (gaps, mine), (others, theirs) = pool(2).run(compare, library, True)
    assert max(*gaps.values(), *others.values()) <= 1e-12, (gaps, others)
    assert len(mine) > 2
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    (local, _), _ = pool(2).run(compare, library, False)
    assert min(local.values()) > 1e-3, "the negative control"


def test_timms_activations_are_taken_out_of_its_norms():
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    take_out_activations = names_of("timm")["take_out_activations"]
    import timm

    model = timm.create_model("mobilenetv3_small_050").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        take_out_activations(model)
        assert torch.equal(model(x), before)
        convert(model, L1BatchNorm)
        assert any(isinstance(m, L1BatchNorm) for m in model.modules())
        assert not any(isinstance(m, _BatchNorm) for m in model.modules())
        model(x)


def test_ultralytics_finds_the_norms_that_it_looks_for():
    """It looks by isinstance for weight decay and frozen layers, and by attributes to fuse."""
    if importlib.util.find_spec("ultralytics") is None:
        pytest.skip("ultralytics is not installed")
    model = model_of("ultralytics")
    norms = [m for m in model.modules() if isinstance(m, SyncNorm)]
    assert norms
    assert all(isinstance(m, nn.BatchNorm2d) for m in norms)
    x = torch.rand(2, 3, 64, 64)
    model(x)  # statistics that are not those of the beginning
    model.eval()
    with torch.no_grad():
        before = model(x)[0]
        after = model.fuse(verbose=False)(x)[0]
    assert not any(isinstance(m, SyncNorm) for m in model.modules())
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_every_block_is_found_and_has_a_test():
    assert BLOCKS.keys() == SHAPES.keys() | {"timm"}
