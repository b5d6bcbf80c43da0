"""Batched gradients, function transforms and forward-mode gradients: as of torch's layer without
running statistics.

With several workers they are exact where nothing is pooled, else refused before an exchange that
they would not see.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fw
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from syncnorm import RenormSchedule, SyncBatchNorm, SyncBatchRenorm
from syncnorm.comm import exchange
from syncnorm.errors import InputError
from syncnorm.testing import assert_close
from tests import ways
from tests.model.test_tools import CHANNELS, KINDS, SHAPE, pair, sample, weights

NUMBER = 4 * CHANNELS * 3


def _batched(m: nn.Module, create_graph: bool = False) -> Tensor:
    x = sample().requires_grad_()
    y = m(x).pow(2)
    cotangents = torch.eye(NUMBER, dtype=torch.float64).view(NUMBER, *SHAPE)[::5]
    (dx,) = torch.autograd.grad(y, x, cotangents, is_grads_batched=True, create_graph=create_graph)
    return torch.autograd.grad((dx.pow(2) * weights(dx)).sum(), x)[0] if create_graph else dx


def _vmapped_backward(m: nn.Module) -> Tensor:
    x = sample().requires_grad_()
    y = m(x).flatten()
    return vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(
        torch.eye(NUMBER).double()
    )


def _dual(m: nn.Module) -> Tensor:
    with fw.dual_level():
        return fw.unpack_dual(m(fw.make_dual(sample(), sample(1)))).tangent


def _dual_backward(m: nn.Module) -> Tensor:
    x = sample().requires_grad_()
    y = m(x)
    with fw.dual_level():
        (dx,) = torch.autograd.grad(y, x, fw.make_dual(sample(1), sample(2)))
        return fw.unpack_dual(dx).tangent


def _of_ensemble(m: nn.Module) -> Tensor:
    parameters, buffers = stack_module_state([m, m])
    return vmap(lambda p, b, x: functional_call(m, (p, b), (x,)), (0, 0, None))(
        parameters, buffers, sample()
    )


def _of_parameters(m: nn.Module) -> Tensor:
    parameters, buffers = dict(m.named_parameters()), {k: b.clone() for k, b in m.named_buffers()}

    def loss(parameters: Any, buffers: Any) -> tuple[Tensor, Any]:
        y = functional_call(m, (parameters, buffers), (sample(),))
        return (y.pow(2) * weights(y)).sum(), buffers

    grads, buffers = grad(loss, has_aux=True)(parameters, buffers)
    return torch.cat([*grads.values(), *(b.double().flatten() for b in buffers.values())])


def _loss(m: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: (m(x).pow(3) * weights(x)).sum()


def _product(x: Tensor, derivative: Tensor) -> Tensor:
    return (derivative.pow(2) * weights(x)).sum()


USES: dict[str, Callable[[nn.Module], Tensor]] = {
    "is_grads_batched": _batched,
    "is_grads_batched, create_graph": lambda m: _batched(m, create_graph=True),
    "vmap over autograd.grad": _vmapped_backward,
    "jacobian(vectorize)": lambda m: jacobian(m, sample(), vectorize=True),
    "jacobian(forward-mode)": lambda m: jacobian(
        m, sample(), vectorize=True, strategy="forward-mode"
    ),
    "hessian(vectorize)": lambda m: hessian(_loss(m), sample(), vectorize=True),
    "dual": _dual,
    "dual gradient": _dual_backward,
    "grad": lambda m: grad(_loss(m))(sample()),
    "grad of grad": lambda m: grad(lambda x: _product(x, grad(_loss(m))(x)))(sample()),
    "vjp": lambda m: vjp(m, sample())[1](sample(1))[0],
    "jvp": lambda m: jvp(m, (sample(),), (sample(1),))[1],
    "jacrev": lambda m: jacrev(m)(sample()),
    "jacfwd": lambda m: jacfwd(m)(sample()),
    "hessian": lambda m: jacfwd(jacrev(_loss(m)))(sample()),
    "vmap": lambda m: vmap(m)(torch.stack([sample(), 2 * sample(1)])),
    "vmap of grad": lambda m: vmap(grad(_loss(m)))(torch.stack([sample(), 2 * sample(1)])),
    "ensemble": _of_ensemble,
}
WITH_STATISTICS = [
    name
    for name in USES
    if "batched" in name or "(" in name or "dual" in name or "autograd" in name
]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("use", USES)
def test_transforms_of_a_layer_without_running_statistics(use, training):
    expected, got = (USES[use](layer.train(training)) for layer in pair(track_running_stats=False))
    assert_close(got, expected, torch.float64, use, factor=100)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("use", WITH_STATISTICS)
def test_transforms_of_a_layer_with_running_statistics_update_them(use):
    layers = pair()
    expected, got = (USES[use](layer) for layer in layers)
    assert_close(got, expected, torch.float64, use, factor=100)
    for a, b in zip(*(layer.buffers() for layer in layers), strict=True):
        assert_close(b.detach(), a.detach(), torch.float64, use)
        assert (
            not fw.unpack_dual(b).tangent.any() if fw.unpack_dual(b).tangent is not None else True
        )


COMPILED: dict[str, Callable[..., Any]] = {
    "grad": lambda f, x, v: grad(lambda x: (f(x) * v).sum())(x),
    "vjp": lambda f, x, v: vjp(f, x)[1](v)[0],
    "jvp": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "grad of grad": lambda f, x, v: grad(
        lambda x: (grad(lambda x: (f(x).pow(3) * v).sum())(x) * v).sum()
    )(x),
    "vmap of grad": lambda f, x, v: vmap(grad(lambda x: (f(x) * v).sum()))(torch.stack([x, v])),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("use", COMPILED)
def test_compiled_transforms_differentiate_what_they_do_uncompiled(use, training):
    torch._dynamo.reset()
    layers = [layer.train(training) for layer in pair(track_running_stats=False)]
    expected = COMPILED[use](layers[0], sample(), sample(1))
    run = torch.compile(functools.partial(COMPILED[use], layers[1]), backend="aot_eager")
    assert_close(run(sample(), sample(1)), expected, torch.float64, use, factor=10)


def test_buffers_that_are_arguments_are_updated_within_a_transform():
    expected, got = map(_of_parameters, pair())
    assert_close(got, expected, torch.float64, "gradients and buffers", factor=10)


@KINDS
def test_running_statistics_that_a_transform_cannot_update_are_an_error(kind):
    layer = kind(CHANNELS).double()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    for use in ("grad", "vmap"):
        with pytest.raises(
            InputError,
            match=r"`track_running_stats` must be False under a transform of torch\.func",
        ):
            USES[use](layer)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_forward_mode_holds_what_renormalisation_holds_constant():
    """r and d are constants of the tangent as of the gradient: v . (J u) = u . (J' v)."""
    layers = [
        SyncBatchRenorm(CHANNELS, schedule=RenormSchedule.constant(1.1, 0.1)).double()
        for _ in range(2)
    ]
    x = sample().requires_grad_()
    (pulled,) = torch.autograd.grad(layers[0](x), x, sample(2))
    pushed = _dual(layers[1])
    torch.testing.assert_close((pushed * sample(2)).sum(), (pulled * sample(1)).sum())
    assert_close(layers[1].running_var, layers[0].running_var, torch.float64, "running_var")


def test_torchs_own_checks_of_gradients_pass():
    layer = SyncBatchNorm(CHANNELS).double()
    x = sample()[:3, :, :2].clone().requires_grad_()
    assert gradcheck(layer, x, check_batched_grad=True, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(layer, x, check_batched_grad=True, fast_mode=True)


@pytest.mark.parametrize(
    "mask", [torch.rand(4, 1, 3), torch.tensor([1.0, 0, 0, 0]).view(4, 1, 1).expand(4, 1, 3)]
)
def test_a_mask_counts_under_a_transform_as_without(mask):
    layer = SyncBatchNorm(CHANNELS, track_running_stats=False).double()
    x = sample().requires_grad_()
    (expected,) = torch.autograd.grad(layer(x, mask), x, sample(1))
    assert_close(
        vjp(lambda x: layer(x, mask), sample())[1](sample(1))[0],
        expected,
        torch.float64,
        "dx",
        factor=10,
    )
    assert layer(sample(), mask).isfinite().all()
    assert vjp(lambda x: layer(x, -mask), sample())[0].isnan().all(), "weights that are none"


# Several workers: a tracer would not see the exchange.


def _refused(use: str, sync: str) -> tuple[str, list[str], list[float]]:
    layer = SyncBatchNorm(CHANNELS, track_running_stats=False, sync=sync).double()
    tools = {
        "jit": lambda m: torch.jit.trace(m, sample(), check_trace=False)(sample()),
        "make_fx": lambda m: make_fx(m)(sample())(sample()),
        "export": lambda m: torch.export.export(m, (sample(),)).module()(sample()),
        "compiled grad": lambda m: torch.compile(grad(_loss(m)), backend="aot_eager")(sample()),
    }
    said, kinds, result = "", [], []
    with exchange.record() as exchanges, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = (USES | tools)[use](layer).flatten().tolist()
        except InputError as error:
            said = str(error)
    kinds = [e.kind for e in exchanges]
    return said, kinds, result


@pytest.mark.parametrize(
    ("use", "who"),
    [
        ("grad", "a transform of torch.func"),
        ("vmap over autograd.grad", "a transform of torch.func"),
        ("is_grads_batched", "a batch of gradients"),
        ("dual", "forward-mode differentiation"),
        ("dual gradient", "forward-mode differentiation"),
        ("jit", "torch.jit.trace"),
        ("make_fx", "make_fx"),
        ("export", "torch.export"),
        ("compiled grad", "a transform of torch.func"),
    ],
)
def test_what_would_lose_an_exchange_is_refused_before_one_on_all_workers(pool, use, who):
    # The forward of what is only then differentiated is an ordinary one.
    allowed = (
        ["moments"]
        if use in ("vmap over autograd.grad", "is_grads_batched", "dual gradient")
        else []
    )
    for said, kinds, _ in pool(2).run(_refused, use, "batch"):
        assert (
            f"`sync` must leave the statistics to this worker alone under {who}, got an exchange in"
            in said
        )
        assert kinds == allowed
    alone = [
        result
        for said, kinds, result in pool(2).run(_refused, use, "none")
        if not said and not kinds
    ]
    assert len(alone) == 2
    assert alone[0] != []
    # Kernels of two kinds round in two ways.
    assert alone[0] == (pytest.approx(alone[1]) if ways.is_mixed() else alone[1])
