"""What docs/migrate.md tells users to write runs; detectron2, which no registry has, by its
documented interface.
"""

from __future__ import annotations

import importlib
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import syncnorm
from syncnorm import SyncBatchNorm, SyncBatchRenorm
from syncnorm.model.convert import adapters
from tests.frameworks import import_or_skip

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "migrate.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """detectron2's: a subclass of torch's with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("it was converted")


def _detectron2(monkeypatch: pytest.MonkeyPatch) -> None:
    class DefaultTrainer:
        @classmethod
        def build_model(cls, cfg: object) -> nn.Module:
            return nn.Sequential(nn.Conv2d(3, 4, 1), NaiveSyncBatchNorm(4), nn.BatchNorm2d(4))

    for name, contents in {
        "detectron2": {},
        "detectron2.engine": {"DefaultTrainer": DefaultTrainer},
        "detectron2.layers": {"NaiveSyncBatchNorm": NaiveSyncBatchNorm},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(adapters, "_registered", dict(adapters._registered))


def _run(block: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    needs = re.match(r"# needs (\w+)", block)
    if needs and needs[1] == "detectron2":
        _detectron2(monkeypatch)
    elif needs:
        import_or_skip(needs[1])
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    state = nn.Sequential(nn.BatchNorm2d(4)).state_dict()
    keras = {"gamma": torch.ones(4), "beta": torch.zeros(4)}
    names: dict[str, object] = {
        "nn": nn, "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "inplace_abn_state": state,
        "keras_entries": keras | {"moving_mean": torch.zeros(4), "moving_variance": torch.ones(4)},
    }  # fmt: skip
    exec(compile(block, "docs/migrate.md", "exec"), names)
    return names


@pytest.mark.parametrize("block", BLOCKS, ids=[re.sub(r"\W+", "-", b[:40]) for b in BLOCKS])
def test_blocks_run(block, monkeypatch):
    names = _run(block, monkeypatch)
    if "custom_imports" in names:
        from mmengine.registry import MODEL_WRAPPERS, MODELS

        for name in names["custom_imports"]["imports"]:
            importlib.import_module(name)
        options = dict(names["norm_cfg"])
        assert type(MODELS.get(options.pop("type"))(4, **options)) is SyncBatchNorm
        assert MODEL_WRAPPERS.get(names["model_wrapper_cfg"]["type"]) is not None
    if "DefaultTrainer" in names:
        layers = names["Trainer"].build_model(None).train()
        assert all(isinstance(m, SyncBatchNorm) for m in layers[1:])
        layers(torch.randn(2, 3, 4, 4))


def test_every_block_is_found_and_says_what_it_needs():
    assert len(BLOCKS) == 8
    needed = [m[1] for b in BLOCKS if (m := re.match(r"# needs (\w+)", b))]
    assert needed == ["lightning", "accelerate", "mmengine", "detectron2", "sb3_contrib"]


def test_the_tables_new_lines_build_what_they_say():
    rows = [
        line.split(" | ")
        for line in TEXT.splitlines()
        if line.startswith("| ") and line.count(" | ") >= 3
    ]
    assert len(rows) == 19
    lines = {line for row in rows[1:] for line in re.findall(r"`([^`]*\([^`]*\))`", row[2])}
    ours = sorted(line for line in lines if re.match(r"(Sync|nn\.|prepare)", line))
    assert len(ours) == 5
    names = {"nn": nn, "c": 4, "rmax": 3.0, "dmax": 5.0, "model": nn.Sequential(nn.BatchNorm2d(4))}
    names |= {name: getattr(syncnorm, name) for name in syncnorm.__all__}
    for line in ours:
        exec(f"built = {line}", names)
        assert any(
            isinstance(m, SyncBatchNorm | SyncBatchRenorm) for m in names["built"].modules()
        ), line
    for line in lines.difference(ours):
        compile(line, "docs/migrate.md", "exec")
