"""Types: absolute errors against float64, and casts of the layer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.precision import CASES, LAYERS, QUANTITIES, errors, pooled, step, torchs, truth
from benchmarks.precision import batch as batch_of
from syncnorm import SyncBatchNorm, SyncBatchRenorm, convert, reference, revert
from syncnorm.testing import assert_close

HALF = [torch.bfloat16, torch.float16]
# One rounding to the type moves a value by up to this share of it; float32's own errors come on
# top.
ROUNDING = {torch.bfloat16: 2.0**-8 + 1e-5, torch.float16: 2.0**-11 + 1e-5}


def _bounds(case: str) -> dict[str, float]:
    """Largest error allowed, as a share of the largest value: one rounding of the half type."""
    if case == "float64":
        return dict.fromkeys(QUANTITIES, 1e-14)
    given, layer, _ = CASES[case]
    outputs = ROUNDING.get(given, 5e-7)
    # Two workers' gradients of weight and bias are rounded before they are added up.
    parameters = 2 * ROUNDING[layer] if layer in ROUNDING else 2e-6
    return dict(
        zip(QUANTITIES, (outputs, outputs, parameters, parameters, 5e-7, 5e-7), strict=True)
    )


def _check(found: dict[str, float], bounds: dict[str, float], theirs: dict[str, float]) -> None:
    for name, bound in bounds.items():
        assert found[name] <= bound, (
            f"{name}: {found[name]:.1e} over {bound:.1e}; torch's own {theirs[name]:.1e}"
        )


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("case", CASES)
def test_errors_are_those_of_one_rounding(pool, case, layer):
    found = errors(pooled(pool(2), layer, CASES[case]), truth(layer, CASES[case]))
    _check(found, _bounds(case), torchs(CASES[case]))


def test_the_bounds_can_tell():
    """Negative controls: torch's half statistics, a type too coarse, and statistics of one shard."""
    theirs = torchs(CASES[".half()"])
    with pytest.raises(AssertionError, match=r"running_mean: \d\.\de-04 over 5\.0e-07"):
        _check(theirs, _bounds(".half()"), theirs)
    for fine, coarse in (
        ("float64", "float32"),
        ("float32", "autocast float16"),
        (".half()", ".bfloat16()"),
    ):
        with pytest.raises(AssertionError, match="y: "):
            _check(torchs(CASES[coarse]), _bounds(fine), theirs)
    x, g = batch_of(torch.float32)
    shard = step("SyncBatchNorm", CASES["float32"], x, g)
    shard["running_mean"] = step("SyncBatchNorm", CASES["float32"], x[:5], g[:5])["running_mean"]
    found = errors(shard, truth("SyncBatchNorm", CASES["float32"]))
    with pytest.raises(AssertionError, match="running_mean: "):
        _check(found, _bounds("float32"), theirs)


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("is_autocast", [True, False], ids=["autocast", "cast"])
@pytest.mark.parametrize("make", [SyncBatchNorm, SyncBatchRenorm])
def test_types_are_those_of_torch(make, is_autocast, dtype, is_training):
    """Outputs and gradients behind a convolution; under autocast the model gets float32."""
    found = []
    for norm in (nn.BatchNorm2d, make):
        model = nn.Sequential(nn.Conv2d(2, 4, 3), norm(4)).train(is_training)
        x = torch.randn(3, 2, 6, 6, requires_grad=True)
        if not is_autocast:
            model, x = model.to(dtype), x.detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=is_autocast):
            y = model(x)
            z = model[1](torch.randn(2, 4, 3, 3)) if is_autocast else y
        y.backward(torch.randn_like(y))
        found.append([y.dtype, z.dtype, x.grad.dtype, *(p.grad.dtype for p in model.parameters())])
    assert found[0] == found[1]
    assert found[0][0] == dtype


def _types(layer: nn.Module) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    return layer.weight.dtype, layer.running_mean.dtype, layer.running_var.dtype


@pytest.mark.parametrize("make", [SyncBatchNorm, SyncBatchRenorm])
def test_a_cast_takes_no_digit_from_running_statistics(make):
    layer = make(3)
    layer.running_mean.fill_(1 / 3)
    mean = layer.running_mean.clone()
    for cast in (torch.float16, torch.bfloat16, torch.float16):
        assert _types(layer.to(cast)) == (cast, torch.float32, torch.float32)
        assert torch.equal(layer.running_mean, mean)
    assert _types(layer.float()) == (torch.float32,) * 3
    assert _types(layer.double()) == (torch.float64,) * 3
    assert _types(layer.half()) == (torch.float16, torch.float32, torch.float32)
    assert _types(copy.deepcopy(layer)) == _types(layer)
    assert layer.num_batches_tracked.dtype == torch.int64
    assert _types(make(3, dtype=torch.float16)) == (torch.float16, torch.float32, torch.float32)
    untracked = SyncBatchNorm(3, track_running_stats=False).half()
    assert untracked.running_mean is None


def test_a_layer_on_meta_is_cast_alike():
    layer = SyncBatchNorm(3, device="meta").half().to_empty(device="cpu")
    assert _types(layer) == (torch.float16, torch.float32, torch.float32)
    layer.reset_running_stats()
    assert layer.running_var.tolist() == [1.0] * 3


def test_half_statistics_are_had_by_casting_them():
    """torch's rule, on request: half statistics stay half, and evaluate as torch's do.

    They are updated with one rounding.
    """
    layer = SyncBatchNorm(4).half()
    layer.running_mean, layer.running_var = layer.running_mean.half(), layer.running_var.half()
    layer = copy.deepcopy(layer.half().to("cpu"))
    assert _types(layer) == (torch.float16,) * 3
    x = (torch.randn(8, 4, 5, generator=torch.Generator().manual_seed(0)) + 1).half()
    layer(x)
    running = reference.RunningStatistics.initial(4)
    reference.batch_norm(x, running=running)
    assert torch.equal(layer.running_mean, running.mean.half())
    assert torch.equal(layer.running_var, running.var.half())
    layer.eval()
    given = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    assert torch.equal(layer(x), F.batch_norm(x, *given))
    assert _types(layer.float()) == (torch.float32,) * 3


def test_state_dicts_of_half_layers_load():
    theirs, ours = nn.BatchNorm1d(4).half(), SyncBatchNorm(4).half()
    theirs(torch.randn(8, 4).half())
    ours.load_state_dict(theirs.state_dict())
    assert _types(ours) == (torch.float16, torch.float32, torch.float32)
    assert torch.equal(ours.running_mean, theirs.running_mean.float())
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.running_var, theirs.running_var.float())
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert _types(ours) == (torch.float16,) * 3, "assign=True takes the tensors themselves"


@pytest.mark.parametrize("make", [SyncBatchNorm, SyncBatchRenorm])
@pytest.mark.parametrize("parameters", [*HALF, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("given", [*HALF, torch.float32, torch.float64], ids=str)
def test_evaluation_takes_every_mix_of_types(given, parameters, make):
    layer = make(3).to(parameters).eval()
    layer.running_mean.copy_(torch.tensor([0.3, -1.0, 2.0]))
    layer.running_var.copy_(torch.tensor([0.5, 1.0, 4.0]))
    x = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(
        given
    )
    running = reference.RunningStatistics(layer.running_mean.double(), layer.running_var.double())
    expected = reference.batch_norm_inference(
        x, layer.weight.detach(), layer.bias.detach(), running
    )
    y = layer(x)
    y.backward(torch.randn_like(y))
    assert y.dtype == given
    assert layer.weight.grad.dtype == parameters
    coarse = (
        given
        if given in HALF
        else torch.float64
        if given == parameters == torch.float64
        else torch.float32
    )
    assert_close(y, expected, coarse, "y")


@pytest.mark.parametrize("to", [SyncBatchNorm, SyncBatchRenorm])
def test_a_half_model_is_converted_and_back(to):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).half()
    x = torch.randn(6, 3).half()
    model(x)
    mean = model[1].running_mean.clone()
    convert(model, to)
    assert _types(model[1]) == (torch.float16, torch.float32, torch.float32)
    assert torch.equal(model[1].running_mean, mean.float())
    model(x)
    revert(model)
    assert _types(model[1]) == (torch.float16,) * 3
    assert model(x).dtype == torch.float16
