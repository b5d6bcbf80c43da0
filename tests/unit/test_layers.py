"""SyncBatchNorm in one process: torch's layer but for the name; bad arguments; public names."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncnorm
from syncnorm import (
    Mix,
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    convert,
    debug,
    evaluation_statistics,
    functional,
    groups,
    module,
    prepare_ddp,
    recalibrate,
    revert,
)
from syncnorm.errors import InputError, SyncnormError
from syncnorm.testing import assert_close
from tests.as_device import as_device

from .test_native import needs_library

# torch's own layers may be without a bias from 2.13 on; ours in every version.
WITHOUT_BIAS = [{"bias": False}] if "bias" in inspect.signature(nn.BatchNorm1d).parameters else []
LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _pair(channels: int, ndim: int, **options) -> tuple[SyncBatchNorm, nn.Module]:
    ours, theirs = SyncBatchNorm(channels, **options), LAYERS[ndim](channels, **options)
    if options.get("affine", True):
        with torch.no_grad():
            ours.weight.uniform_(0.5, 1.5)
            if ours.bias is not None:
                ours.bias.normal_()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, *WITHOUT_BIAS],
)
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 5, 3), (2, 4, 3, 2, 5)], ids=str)
def test_equals_torch_in_training_and_evaluation(shape, options):
    torch.manual_seed(0)
    ours, theirs = _pair(4, len(shape), **options)
    for mode in (True, True, False):
        ours.train(mode)
        theirs.train(mode)
        x, y = (
            torch.randn(shape, generator=torch.Generator().manual_seed(3)).requires_grad_()
            for _ in range(2)
        )
        got, expected = ours(x), theirs(y)
        cotangent = torch.randn(shape)
        got.backward(cotangent)
        expected.backward(cotangent)
        assert_close(got, expected, torch.float32, "y")
        assert_close(x.grad, y.grad, torch.float32, "grad")
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_close(a.grad, b.grad, torch.float32, name)
    for name, b in theirs.named_buffers():
        assert_close(ours.get_buffer(name), b, torch.float32, name)


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, *WITHOUT_BIAS]
)
def test_state_dicts_are_interchangeable(options):
    ours, theirs = SyncBatchNorm(4, **options), nn.BatchNorm2d(4, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert {k: (v.shape, v.dtype) for k, v in ours.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in theirs.state_dict().items()
    }
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("torch_has_it", [True, False])
@pytest.mark.parametrize("make", [SyncBatchNorm, SyncBatchRenorm], ids=lambda c: c.__name__)
def test_without_a_bias(make, torch_has_it, monkeypatch):
    """Also as with a torch whose layers always have one."""
    if not torch_has_it:
        monkeypatch.setattr(module, "_TORCH_HAS_BIAS", False)
        monkeypatch.setattr(
            _BatchNorm, "extra_repr", lambda self: f"{self.num_features}, affine={self.affine}"
        )
    elif not WITHOUT_BIAS:
        pytest.skip("this torch's layers always have a bias")
    layer = make(3, bias=False, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = layer(x)
    assert layer.bias is None
    assert [*layer.state_dict()] == ["weight", "running_mean", "running_var", "num_batches_tracked"]
    assert repr(layer).count("bias=False") == 1
    with torch.no_grad():
        layer.weight.fill_(2.0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 our own
        assert other.bias is None
        other.reset_parameters()
        assert torch.equal(other(x), expected)
        assert revert(other, to=nn.BatchNorm1d).bias is None
    assert "bias=" not in repr(make(3)).replace("bias=True", ""), "said only where there is none"
    with pytest.raises(InputError, match="`bias` must not be given to convert, got False"):
        convert(nn.BatchNorm1d(3), make, bias=False)


@pytest.mark.parametrize("make", [SyncBatchNorm, SyncBatchRenorm], ids=lambda c: c.__name__)
def test_the_input_under_its_names(make):
    x, mask = torch.randn(5, 3), torch.tensor([[1.0], [0.0], [1.0], [1.0], [1.0]])
    expected = make(3)(x, mask)
    for kwargs in ({"x": x, "mask": mask}, {"input": x, "mask": mask}):
        assert torch.equal(make(3)(**kwargs), expected)
        lazy = convert(nn.LazyBatchNorm1d(), make)
        assert torch.equal(lazy(**kwargs), expected)
        assert type(lazy) is make


def test_evaluation_is_exactly_torchs():
    ours, theirs = _pair(3, 4)
    ours.running_mean.normal_()
    ours.running_var.uniform_()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3, 4, 4)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("mode", ["train", "eval", "eval without running statistics"])
def test_an_empty_batch(mode):
    layer = SyncBatchNorm(3, track_running_stats="without" not in mode).train(mode == "train")
    x = torch.empty(0, 3, 4, 4, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 3, 4, 4)
    y.backward(torch.empty_like(y))
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.zeros(3))


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 1, 4, dtype=torch.float64)
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def f(x, weight, bias):
        return functional.sync_batch_norm(x, weight=weight, bias=bias, mask=mask)

    assert torch.autograd.gradcheck(f, (x, weight, bias))


@pytest.mark.parametrize("make", [SyncBatchNorm, SyncBatchRenorm])
def test_tensors_that_torch_keeps_with_the_other_sign(make):
    """Such as the imaginary part of a conjugate: what is in memory is its negative."""
    x, g = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    layer, other = make(3).double(), make(3).double()
    given, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(torch._neg_view(given)), other(-plain)
    y.backward(torch._neg_view(g))
    expected.backward(-g)
    assert_close(y, expected, torch.float64, "y")
    assert_close(given.grad, plain.grad, torch.float64, "gradient of x")
    assert_close(layer.weight.grad, other.weight.grad, torch.float64, "gradient of the weight")
    weight = torch.complex(torch.zeros(1).double(), torch.ones(1).double()).conj().imag
    assert weight.is_neg()
    assert weight.is_contiguous()
    column = x[:, :1]
    assert_close(
        functional.sync_batch_norm(column, weight=weight),
        -functional.sync_batch_norm(column),
        torch.float64,
        "y",
    )


def test_the_output_may_be_modified_in_place():
    """ReLU(inplace=True) after the layer, in every layout: an output that is a view would refuse."""
    for x in (
        torch.randn(2, 3, 4, 4),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ):
        x.requires_grad_()
        nn.Sequential(SyncBatchNorm(3), nn.ReLU(inplace=True))(x).backward(torch.randn(2, 3, 4, 4))
        assert x.grad is not None


def test_functional_equals_the_layer():
    torch.manual_seed(0)
    layer = SyncBatchNorm(3, momentum=None)
    mean, var, count = torch.zeros(3), torch.ones(3), torch.tensor(0)
    for _ in range(2):
        x, mask = torch.randn(4, 3, 5), torch.rand(4, 1, 5) > 0.5
        y = functional.sync_batch_norm(
            x,
            mean,
            var,
            layer.weight,
            layer.bias,
            momentum=None,
            num_batches_tracked=count,
            mask=mask,
        )
        assert torch.equal(y, layer(x, mask))
    assert torch.equal(mean, layer.running_mean)
    assert torch.equal(var, layer.running_var)
    assert count == layer.num_batches_tracked == 2
    y = functional.sync_batch_norm(x, mean, var, layer.weight, layer.bias, training=False)
    assert torch.equal(y, layer.eval()(x))


@pytest.mark.parametrize("make", [SyncBatchNorm, torch.nn.BatchNorm1d])
def test_without_momentum_and_counter_running_statistics_stand_still(make):
    layer = make(3, momentum=None)
    layer.num_batches_tracked = None
    layer(torch.randn(4, 3))
    assert layer.running_mean.tolist() == [0.0] * 3
    assert layer.running_var.tolist() == [1.0] * 3


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_one_running_statistic_alone_is_refused_by_what_reads_them(missing):
    model, x = torch.nn.Sequential(SyncBatchNorm(3)), torch.randn(4, 3)
    setattr(model[0], missing, None)
    with pytest.raises(InputError, match="must be given together, got one in '0'"):
        recalibrate(model, [x])
    with pytest.raises(InputError, match="must be given together, got one"):
        model.eval()(x)
    with (
        pytest.raises(InputError, match='must be "batch" for layers without running statistics'),
        evaluation_statistics(model, Mix(0.5)),
    ):
        raise AssertionError("the block must not begin")


@pytest.mark.parametrize(
    "mask", [torch.tensor([True, False, True, True]), torch.tensor([2, 0, 1, 3])], ids=str
)
def test_masks_of_any_real_type(mask):
    """A weight is a frequency: normalising with it is normalising a batch with so many copies."""
    x = torch.randn(4, 3, dtype=torch.float64)
    layer, repeated = SyncBatchNorm(3, dtype=torch.float64), SyncBatchNorm(3, dtype=torch.float64)
    layer(x, mask.view(4, 1))
    repeated(x.repeat_interleave(mask.long(), 0))
    for name, b in layer.named_buffers():
        assert_close(b, repeated.get_buffer(name), torch.float64, name)


INPUT_ERRORS = [
    (
        lambda: SyncBatchNorm(3)(np.zeros((2, 3))),  # pyright: ignore
        "`x` must be a tensor, got a numpy.ndarray. torch.as_tensor makes one of an array.",
    ),
    (lambda: SyncBatchRenorm(3).eval()([1.0]), "`x` must be a tensor, got a list."),  # pyright: ignore
    (
        lambda: SyncBatchNorm(3)(torch.randn(2, 3), np.ones((2, 1))),  # pyright: ignore
        "`mask` must be a tensor, got a numpy.ndarray.",
    ),
    (lambda: SyncBatchNorm(0), "`num_features` must be at least 1, got 0."),
    (lambda: SyncBatchNorm(3, eps=0.0), "`eps` must be > 0, got 0.0."),
    (lambda: SyncBatchNorm(3, eps=float("nan")), "`eps` must be > 0, got nan."),
    (
        lambda: SyncBatchNorm(3, momentum=1.5),
        "`momentum` must be in [0, 1], or None for a cumulative average, got 1.5",
    ),
    (lambda: SyncBatchNorm(3, momentum=-0.1), "got -0.1"),
    (
        lambda: SyncBatchRenorm(3, schedule="paper"),
        "`schedule` must be a function from the step to (r_max, d_max), got 'paper'.",
    ),
    (
        lambda: SyncBatchRenorm(3, schedule=RenormSchedule),
        "`schedule` must be a function from the step to (r_max, d_max), got <class",
    ),
    (lambda: RenormSchedule(warmup_steps=5.0), "`warmup_steps` must be an integer, got 5.0."),
    (
        lambda: SyncBatchNorm(3, sync="always"),
        '`sync` must be "batch" or "running" or "lagged" or "none", got \'always\'',
    ),
    (
        lambda: SyncBatchNorm(3)(),
        "`x` must be given, got None. Call the layer with a tensor of shape (N, C, *S).",
    ),
    (
        lambda: SyncBatchNorm(3)(torch.randn(2, 3), input=torch.randn(2, 3)),
        "`x` must be given once, got `input` too. These are two names of one argument.",
    ),
    (
        lambda: SyncBatchNorm(3)(torch.randn(3)),
        "`x` must have 2 or more dimensions (N, C, *S), got 1 (shape (3,))",
    ),
    *(
        (
            lambda mode=mode: SyncBatchNorm(3).train(mode)(torch.randn(2, 3).to_sparse()),
            "`x` must be dense, got torch.sparse_coo (shape (2, 3)). Call x.to_dense(), or",
        )
        for mode in (True, False)
    ),
    (
        lambda: SyncBatchNorm(3)(
            torch.nested.nested_tensor([torch.randn(3, 2), torch.randn(3, 4)])
        ),
        "`x` must be dense, got a nested tensor. Call torch.nested.to_padded_tensor(x, 0.0), and",
    ),
    (
        lambda: SyncBatchNorm(3)(torch.randn(2, 4, 5)),
        "must have num_features = 3 channels in dimension 1, got 4",
    ),
    (
        lambda: SyncBatchNorm(3)(torch.zeros(2, 3, dtype=torch.int64)),
        "got torch.int64 (shape (2, 3))",
    ),
    (
        lambda: SyncBatchNorm(3)(torch.zeros(2, 3, dtype=torch.complex64)),
        "got torch.complex64 (shape (2, 3))",
    ),
    (
        lambda: SyncBatchNorm(3)(torch.randn(2, 3, 5), torch.ones(2, 5)),
        "`mask` must broadcast to (N, 1, *S) = (2, 1, 5), got shape (2, 5). A mask without a "
        "channel dimension",
    ),
    (
        lambda: SyncBatchNorm(3)(torch.randn(2, 3, 5), torch.ones(2, 3, 5)),
        "`mask` must broadcast to (N, 1, *S) = (2, 1, 5), got shape (2, 3, 5)",
    ),
    (
        lambda: SyncBatchNorm(3)(torch.randn(2, 3), torch.ones(2, 1, dtype=torch.complex64)),
        "`mask` must be bool or real, got torch.complex64",
    ),
    (
        lambda: functional.sync_batch_norm(torch.randn(2, 3), torch.zeros(3)),
        "`running_mean` and `running_var` must be given together",
    ),
    (
        lambda: functional.sync_batch_norm(torch.randn(2, 3), weight=torch.ones(4)),
        "`weight` must have shape (3,), got (4,) (x has shape (2, 3))",
    ),
    (
        lambda: functional.sync_batch_norm(
            torch.randn(2, 3), torch.zeros(3), torch.ones(3), momentum=None
        ),
        "`num_batches_tracked` must be a counter where `momentum` is None",
    ),
    (
        lambda: functional.sync_batch_norm(torch.randn(2, 3), process_group=groups.Ranks((0, 1))),
        "`process_group` must belong to an initialised torch.distributed, got Ranks(members=(0, "
        "1)) without",
    ),
    (
        lambda: SyncBatchNorm(3, process_group=2)(torch.randn(2, 3)),
        "`process_group` must divide the number of workers, got 2 for 1 worker(s). Take a divisor, "
        "or",
    ),
    (
        lambda: SyncBatchNorm(3, process_group=object()),  # pyright: ignore
        '`process_group` must be None, "world", "node", a number of neighbouring workers of at '
        "least 1, ",
    ),
    (
        lambda: SyncBatchNorm(3, process_group="nodes"),
        "one-dimensional DeviceMesh, got 'nodes'. None pools",
    ),
    (lambda: SyncBatchNorm(3, process_group=0), "one-dimensional DeviceMesh, got 0. None pools"),
    (
        lambda: SyncBatchNorm(3, process_group=True),
        "one-dimensional DeviceMesh, got True. None pools",
    ),
    (lambda: groups.for_samples(0, 4), "`samples` must be an integer of at least 1, got 0."),
    (
        lambda: groups.for_samples(8, 0),
        "`local_batch_size` must be an integer of at least 1, got 0.",
    ),
    (
        lambda: prepare_ddp(SyncBatchNorm(3), "node"),
        "`process_group` must be the group that DistributedDataParallel is given, got 'node'. With "
        "whom",
    ),
]


@pytest.mark.parametrize(("call", "message"), INPUT_ERRORS, ids=[m for _, m in INPUT_ERRORS])
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, SyncnormError)


def test_is_a_batch_norm_to_the_ecosystem():
    """Weight-decay filters, FSDP and swa_utils.update_bn look for torch's base class."""
    assert isinstance(SyncBatchNorm(3), _BatchNorm)
    assert "sync='batch'" in repr(SyncBatchNorm(3))


def test_one_warning_per_layer():
    layer = SyncBatchNorm(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(torch.randn(1, 3))
        layer(torch.randn(1, 3))
        SyncBatchNorm(3)(torch.randn(1, 3))
    assert len(caught) == 2


def test_public_names():
    public = {name for name in vars(syncnorm._public) if not name.startswith("__")}
    assert public == set(syncnorm.__all__)
    assert set(syncnorm.__all__) <= set(dir(syncnorm))
    assert not hasattr(syncnorm, "sync_batch_norm")
    assert syncnorm.__all__ == [
        "SAM",
        "ElasticBatchSampler",
        "Lagged",
        "Mix",
        "Prior",
        "RenormSchedule",
        "SyncBatchNorm",
        "SyncBatchRenorm",
        "accumulate",
        "adopt_state_dict",
        "conversion_table",
        "convert",
        "convert_sync_batchnorm",
        "debug",
        "evaluation_statistics",
        "explain",
        "frozen_statistics",
        "functional",
        "gather",
        "groups",
        "join",
        "monitor",
        "prepare_ddp",
        "recalibrate",
        "register_adapter",
        "revert",
        "scale_loss",
        "train_only_norms",
    ]
    assert functional.__all__ == ["sync_batch_norm", "sync_batch_renorm"]


def test_import_brings_torch_at_first_use_and_nothing_else_heavy():
    code = (
        "import sys, syncnorm; assert 'torch' not in sys.modules; del sys.modules['syncnorm']; "
        "import torch; before = set(sys.modules); from syncnorm import *; SyncBatchNorm(3); "
        "groups, functional; explain(SyncBatchNorm(3), torch.ones(2, 3)); "
        "assert not {'torch._dynamo', 'syncnorm.integrations'} & sys.modules.keys(); "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - "
        "set(sys.stdlib_module_names)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=900
    )
    assert out.stdout.strip() == "['syncnorm']"


@pytest.mark.parametrize("is_debug", [False, True])
def test_several_values_of_total_weight_one_are_no_single_value(is_debug):
    layer = SyncBatchNorm(2)
    mode = debug() if is_debug else contextlib.nullcontext()
    with warnings.catch_warnings(), mode:
        warnings.simplefilter("error")
        y = layer(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([0.5, 0.5]).view(2, 1))
    torch.testing.assert_close(y, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), rtol=1e-4, atol=0)
    assert torch.equal(layer.running_var, torch.ones(2))


WRONG_LENGTHS = [("weight", 2), ("weight", 1), ("bias", 5), ("running_mean", 4), ("running_var", 2)]


@pytest.mark.parametrize("kernels", [pytest.param("native", marks=needs_library), "composed"])
@pytest.mark.parametrize(("name", "length"), WRONG_LENGTHS)
@pytest.mark.parametrize("make", [SyncBatchNorm, SyncBatchRenorm])
def test_tensors_of_another_length_are_refused(make, name, length, kernels):
    """Kernels are given pointers: they would read, and write, beyond the end."""
    layer = make(3)
    if name in ("weight", "bias"):
        setattr(layer, name, nn.Parameter(torch.ones(length)))
    else:
        layer.register_buffer(name, torch.ones(length))
    course = as_device("composed") if kernels == "composed" else contextlib.nullcontext()
    with (
        course,
        pytest.raises(InputError, match=rf"`{name}` must have shape \(3,\), got \({length},\)"),
    ):
        layer(torch.randn(4, 3))


@pytest.mark.parametrize("make", [SyncBatchNorm, SyncBatchRenorm])
def test_the_default_device_is_not_that_of_the_layer(make):
    layer, x = make(3), torch.randn(8, 3, requires_grad=True)
    with torch.device("meta"):
        y = layer(x)
        y.sum().backward()
    assert y.device.type == layer.weight.grad.device.type == x.grad.device.type == "cpu"
    assert layer.running_mean.isfinite().all()
