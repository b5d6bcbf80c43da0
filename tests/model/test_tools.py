"""Tools that look at a model rather than run it: they see what they would of torch's layer, or an
error that helps.
"""

from __future__ import annotations

import io
import warnings
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.utils.flop_counter
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
from torch.func import functional_call, grad
from torch.fx.experimental.optimization import fuse
from torch.fx.experimental.proxy_tensor import make_fx

from syncnorm import (
    SyncBatchNorm,
    SyncBatchRenorm,
    conversion_table,
    convert,
    debug,
    explain,
    functional,
    monitor,
    prepare_ddp,
    register_adapter,
    revert,
    tracing,
)
from syncnorm.comm import exchange
from syncnorm.errors import InputError
from syncnorm.family import L1BatchNorm
from syncnorm.maths import kernels
from syncnorm.testing import assert_close

CHANNELS = 3
SHAPE = (4, CHANNELS, 3)
NUMBER = 4 * CHANNELS * 3
SYNCS = pytest.mark.parametrize("sync", ["batch", "running", "lagged", "none"])
KINDS = pytest.mark.parametrize("kind", [SyncBatchNorm, SyncBatchRenorm])


def sample(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(y: Tensor) -> Tensor:
    return torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)


def _with_weight(layer: nn.Module) -> Any:
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2.0, CHANNELS))
    return layer.double()


def pair(**options: Any) -> tuple[nn.BatchNorm1d, SyncBatchNorm]:
    return _with_weight(nn.BatchNorm1d(CHANNELS, **options)), _with_weight(
        SyncBatchNorm(CHANNELS, **options)
    )


def _net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    )


IMAGES = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))


# torch.fx


@KINDS
@pytest.mark.parametrize("training", [False, True])
def test_fx_takes_a_layer_as_one_call_of_a_module(kind, training):
    model = convert(_net(), kind).train(training)
    graph = torch.fx.symbolic_trace(model)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == [
        "0",
        "1",
        "2",
        "3",
        "4",
    ]
    assert type(graph.get_submodule("1")) is kind
    assert torch.equal(graph(IMAGES), model(IMAGES))


class Doubled(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


register_adapter(Doubled, lambda layer, x, normalize: 2 * normalize(x))


class _Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = SyncBatchNorm(CHANNELS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(x.float(), mask)
        return functional.sync_batch_norm(y, weight=self.norm.weight, mask=mask)


def test_fx_takes_masks_and_the_functional_form():
    model = _Masked()
    graph = torch.fx.symbolic_trace(model)
    x, mask = sample(), torch.linspace(0, 1, 12).view(4, 1, 3)
    assert torch.equal(graph(x, mask), model(x, mask))
    assert "sync_batch_norm" in graph.code
    assert not torch.equal(graph(x, mask), graph(x, torch.ones_like(mask)))


@pytest.mark.parametrize("training", [False, True])
def test_fx_takes_what_an_adapter_adds_once(training):
    model = convert(nn.Sequential(nn.Conv2d(2, 4, 3), Doubled(4))).train(training)
    graph, x = torch.fx.symbolic_trace(model), torch.randn(3, 2, 5, 5)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["0", "1"]
    assert torch.equal(graph(x), model(x))


def test_fx_of_a_layer_alone_says_what_to_do():
    with pytest.raises(
        InputError, match="must be given a module that contains the layer, got SyncBatchNorm itself"
    ):
        torch.fx.symbolic_trace(SyncBatchNorm(3))


@pytest.mark.filterwarnings("ignore")
def test_fusion_and_quantisation_leave_a_layer_as_they_leave_torchs_synchronised_one():
    model = convert(_net()).eval()
    assert torch.equal(fuse(model)(IMAGES), model(IMAGES))
    for prepare, mapping in (
        (prepare_fx, get_default_qconfig_mapping("x86")),
        (prepare_qat_fx, get_default_qat_qconfig_mapping("x86")),
    ):
        model.train(prepare is prepare_qat_fx)
        prepared = prepare(model, mapping, (IMAGES,))
        prepared(IMAGES)
        assert type(prepared.get_submodule("1")) is SyncBatchNorm
        prepared.eval()
        quantised = convert_fx(prepared)
        assert (quantised(IMAGES) - prepared(IMAGES)).abs().max() < 0.2


def test_revert_lets_fusion_fuse():
    model = revert(convert(_net())).eval()
    assert not [m for m in fuse(model).modules() if isinstance(m, nn.BatchNorm2d)]


# torch.jit


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_trace_is_that_of_torchs_layer_for_any_batch_size(training, track):
    results = []
    for layer in pair(track_running_stats=track):
        traced = torch.jit.trace(
            layer.train(training), sample()
        )  # which compares a second run, too
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        x = torch.cat([sample(), 3 * sample(1)]).requires_grad_()
        y = loaded(x)
        y.backward(weights(y))
        results.append([y, x.grad, loaded.weight.grad, *dict(loaded.named_buffers()).values()])
    for expected, got in zip(*results, strict=True):
        assert_close(got, expected, torch.float64, "traced", factor=10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [SyncBatchNorm, L1BatchNorm])
def test_script_says_what_to_do(kind):
    with pytest.raises(InputError, match=rf"got {kind.__name__}. Script revert\(model\)"):
        torch.jit.script(convert(_net(), kind))


def test_torch_fx_is_told_to_take_a_layer_of_the_family_for_one_node():
    model = convert(_net(), L1BatchNorm)
    with pytest.raises(
        InputError, match=r"got a proxy of torch\.fx\. Have its tracer take the layer"
    ):
        torch.fx.symbolic_trace(model)

    class Whole(torch.fx.Tracer):
        def is_leaf_module(self, m, qualified_name):
            return isinstance(m, L1BatchNorm) or super().is_leaf_module(m, qualified_name)

    graph = Whole().trace(model)
    assert [node.target for node in graph.nodes if node.op == "call_module"] == [
        name for name, _ in model.named_children()
    ]


# Fake and meta tensors


def _looked_at(kind: type[nn.Module], sync: str) -> dict[str, Any]:
    model = prepare_ddp(convert(_net(), kind, sync=sync))
    watch = monitor(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        y = model(torch.randn(2, 3, 9, 9))
        y.square().mean().backward()
        optimizer.step()
    assert y.shape == (2, 8, 5, 5)
    assert model[1].weight.grad.shape == (8,)
    model.eval()(torch.randn(2, 3, 9, 9))
    rows = explain(model.train(), torch.randn(2, 3, 9, 9), world_size=4).rows
    assert [row.values for row in rows] == [98 * rows[0].workers, 50 * rows[0].workers]
    assert "?" in conversion_table(model)
    figures = watch.read()["layers"]["1"]
    assert type(revert(model)[1]) is nn.BatchNorm2d
    return figures


@KINDS
@SYNCS
@pytest.mark.parametrize(
    "how", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake", "meta"]
)
def test_a_model_without_numbers_trains_and_is_explained(how, sync, kind):
    with how(), exchange.record() as exchanges:
        figures = _looked_at(kind, sync)
    assert set(figures.values()) == {None}
    assert not exchanges


@KINDS
@pytest.mark.parametrize("name", ["triton", "composed"])
def test_a_meta_tensor_is_never_read(name, kind):
    """In debug mode, with a mask, at one value, without any, and differentiated twice."""
    if name == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    own = getattr(kernels, name)
    with (
        mock.patch.object(kernels, "_preferred", return_value=own),
        debug(),
        torch.device("meta"),
    ):
        layer = kind(3)
        for shape in ((4, 3, 5), (1, 3), (0, 3, 2, 2), (2, 3, 4, 4, 4)):
            x = torch.randn(shape, requires_grad=True)
            for mask in (None, torch.ones(shape[0], 1, *shape[2:])):
                y = layer(x, mask)
                (grad,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
                grad.square().sum().backward()
                assert y.is_meta
                assert x.grad.shape == y.shape == shape
        layer.half()(x.half()).sum().backward()


def test_a_fake_forward_in_half_precision_keeps_what_is_saved_small():
    """The Function saves its input as it is: a memory estimate under FakeTensorMode is that of a
    real step.
    """
    saved: list[Tensor] = []
    with FakeTensorMode():
        layer, x = (
            SyncBatchNorm(8),
            torch.randn(4, 8, 16, 16, dtype=torch.bfloat16, requires_grad=True),
        )
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = layer(x)
    assert y.dtype == torch.bfloat16
    assert sum(t.nbytes for t in saved if t.numel() > 100) == x.nbytes


def _functional_step(
    layer: nn.Module, parameters: Any, buffers: Any, x: Tensor
) -> tuple[Tensor, Any]:
    return functional_call(layer, (parameters, buffers), (x,)), buffers


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("training", [False, True])
def test_make_fx_traces_what_torchs_layer_computes(training, mode):
    results = []
    for layer in pair():
        parameters, buffers = (
            dict(layer.train(training).named_parameters()),
            {k: b.clone() for k, b in layer.named_buffers()},
        )
        graph = make_fx(partial(_functional_step, layer), tracing_mode=mode)(
            parameters, buffers, sample()
        )
        y, buffers = graph(
            parameters, {k: b.clone() for k, b in layer.named_buffers()}, 3 * sample(1)
        )
        results.append([y, *buffers.values()])
    for expected, got in zip(*results, strict=True):
        assert_close(got, expected, torch.float64, mode, factor=10)


def _alone_on_one_rank() -> tuple[list[str], list[str]]:
    """One rank's summary writer traces the model in evaluation mode, or has an error; the others do
    not take part.
    """
    model = convert(_net())
    heard = []
    with exchange.record() as exchanges, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if torch.distributed.get_rank() == 0:
            torch.jit.trace(model.eval(), IMAGES)
            with FakeTensorMode(allow_non_fake_inputs=True):
                model.train()(IMAGES)
            try:
                torch.jit.trace(model, IMAGES)
            except InputError as error:
                heard = [str(error)]
    return heard, [e.kind for e in exchanges]


def test_one_rank_may_look_alone(pool):
    first, second = pool(2).run(_alone_on_one_rank)
    assert "under torch.jit.trace, got an exchange in 1 that" in first[0][0]
    assert first[1] == second[1] == []


def test_a_tracer_is_known_by_name():
    """Undocumented functions of torch's tell: a release in which they do not is noticed here."""
    seen: list[str | None] = []

    def look(x: Tensor) -> Tensor:
        seen.append(tracing.tracer_of(x))
        return x * 1

    x = torch.ones(2)
    look(x)
    grad(lambda x: look(x).sum())(x)
    torch.jit.trace(look, x, check_trace=False)
    with fw.dual_level():
        look(x)
    y = x.clone().requires_grad_()
    z = y * 1
    z.register_hook(look)
    torch.autograd.grad(z, y, torch.eye(2), is_grads_batched=True)
    make_fx(look)(x)
    look(x.to("meta"))
    with FakeTensorMode() as mode:
        look(torch.ones(2))
    look(mode.from_tensor(x))
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        look(x)
    look(nn.Parameter(x))
    fake = tracing.FAKE
    expected = [
        None,
        "a transform of torch.func",
        "torch.jit.trace",
        "forward-mode differentiation",
    ]
    assert seen == [*expected, "a batch of gradients", "make_fx", fake, fake, fake, None, None]
