"""An exported evaluation model is a plain batch normalisation: no exchange, no operator of ours."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from syncnorm import SyncBatchNorm, SyncBatchRenorm, prepare_ddp
from syncnorm.errors import InputError
from syncnorm.testing import assert_close

KINDS = {
    "norm": lambda sync: SyncBatchNorm(3, sync=sync),
    "renorm": lambda sync: SyncBatchRenorm(3, sync=sync),
}


def _model(kind: str, sync: str) -> nn.Module:
    """A model with running statistics that are not the initial."""
    torch.manual_seed(0)
    model = prepare_ddp(nn.Sequential(nn.Conv2d(2, 3, 3), KINDS[kind](sync), nn.ReLU()))
    for _ in range(2):
        model(torch.randn(4, 2, 5, 5))
    return model.eval()


def _operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize(
    ("kind", "sync"), [("norm", "batch"), ("renorm", "running"), ("norm", "lagged")]
)
def test_torch_export_gives_a_plain_batch_norm_for_any_batch_size(kind, sync, strict):
    model = _model(kind, sync)
    program = torch.export.export(
        model,
        (torch.randn(4, 2, 5, 5),),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        strict=strict,
    )
    assert _operators(program) == [
        "aten.conv2d.default",
        "aten.batch_norm.default",
        "aten.relu.default",
    ]
    decomposed = _operators(program.run_decompositions())
    assert [name for name in decomposed if "norm" in name] == [
        "aten._native_batch_norm_legit_no_training.default"
    ]
    x = torch.randn(7, 2, 5, 5)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("sync", ["batch", "none", "running", "lagged"])
def test_a_training_forward_is_exported_or_refused(sync, prepared):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), SyncBatchNorm(4, sync=sync))
    if prepared:
        prepare_ddp(model)
    x = torch.randn(4, 3, 8, 8)
    if sync in ("running", "lagged"):
        with pytest.raises(InputError, match=r"where torch\.export takes a training forward, got"):
            torch.export.export(model, (x,), strict=False)
    else:
        program = torch.export.export(copy.deepcopy(model), (x,), strict=False)
        assert_close(program.module()(x), model(x), torch.float32, "y")
    model(x).sum().backward()
    assert int(model[1].num_batches_tracked) > 0 or sync in ("running", "lagged")


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_program_has_the_gradients_of_the_layer(kind, strict):
    layer = KINDS[kind]("batch").double()
    x, v = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    program = torch.export.export(copy.deepcopy(layer), (x,), strict=strict).module()
    gradients = []
    for module in (layer, program):
        given = x.clone().requires_grad_()
        inputs = [given, *module.parameters()]
        gradients.append(torch.autograd.grad((module(given) * v).sum(), inputs))
    for expected, got in zip(*gradients, strict=True):
        assert_close(got, expected, torch.float64, "gradient")


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_export_gives_a_batch_normalization_node(kind, tmp_path: Path):
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    model, path = _model(kind, "batch"), tmp_path / "model.onnx"
    torch.onnx.export(
        model, (torch.randn(4, 2, 5, 5),), path, dynamo=True, optimize=False, verbose=False
    )
    exported = onnx.load(path)
    assert [
        node.op_type for node in exported.graph.node if node.op_type not in ("Conv", "Relu")
    ] == ["BatchNormalization"]
    x = torch.randn(4, 2, 5, 5)
    name = exported.graph.input[0].name
    got: Tensor = torch.from_numpy(ReferenceEvaluator(exported).run(None, {name: x.numpy()})[0])
    torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-5)
