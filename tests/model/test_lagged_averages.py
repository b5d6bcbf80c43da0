"""What the averages of sync="lagged" are after somebody has written, loaded, cast or read them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.optim.swa_utils import AveragedModel

from syncnorm import (
    SyncBatchNorm,
    frozen_statistics,
    prepare_ddp,
)
from syncnorm.maths.lagged import snapshots
from syncnorm.statistics.lagged import LaggedMode
from tests.as_device import as_device


def test_a_batch_norms_state_loads_and_the_layer_starts_by_pooling():
    layer = SyncBatchNorm(3, sync="lagged")
    layer.lagged_waits.zero_()
    layer.load_state_dict(nn.BatchNorm1d(3).state_dict())
    assert bool(layer.lagged_waits)
    assert torch.equal(layer.lagged_updates, torch.zeros(2, dtype=torch.int64))


def test_other_layers_load_its_state_without_the_averages():
    lagged, pooled = SyncBatchNorm(3, sync="lagged"), SyncBatchNorm(3)
    lagged.running_mean.fill_(2.0)
    pooled.load_state_dict(lagged.state_dict())
    assert torch.equal(pooled.running_mean, lagged.running_mean)


def test_averages_stay_double_and_resets_are_whole():
    layer = SyncBatchNorm(3, sync="lagged").half()
    assert layer.lagged_gradient.dtype == torch.float64
    assert layer.running_mean.dtype == torch.float32
    assert layer.weight.dtype == torch.float16
    layer.lagged_waits.zero_()
    layer.reset_running_stats()
    assert bool(layer.lagged_waits)


def test_torchs_averages_of_models_take_its_buffers():
    model = prepare_ddp(nn.Sequential(nn.Linear(3, 3), SyncBatchNorm(3, sync="lagged")))
    average, seen = AveragedModel(model, use_buffers=True), []
    for _ in range(3):
        model(torch.randn(5, 3)).square().mean().backward()
        average.update_parameters(model)
        seen.append(model.state_dict()["1.lagged_mean"].clone())
    got = average.module.state_dict()["1.lagged_mean"]
    torch.testing.assert_close(got, torch.stack(seen).mean(0))


def test_loading_other_layers_leaves_the_averages():
    model = prepare_ddp(nn.Sequential(nn.Linear(3, 3), SyncBatchNorm(3, sync="lagged")))
    model(torch.randn(5, 3)).square().mean().backward()
    before = model.state_dict()["1.lagged_mean"].clone()
    model.load_state_dict(nn.Sequential(nn.Linear(3, 3)).state_dict(), strict=False)
    assert torch.equal(model.state_dict()["1.lagged_mean"], before)
    model.load_state_dict(model.state_dict())
    assert torch.equal(model.state_dict()["1.lagged_mean"], before)


def _spoil(model: nn.Module) -> None:
    """What to_empty may leave, made visible."""
    for buffer in model.buffers():
        buffer.fill_(float("nan") if buffer.is_floating_point() else 1)


def _materialised(state: dict[str, Tensor]) -> nn.Module:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4, sync="lagged"))
    return model.to_empty(device="cpu")


def _spoilt_and_set(strict: bool) -> Callable[[dict[str, Tensor]], nn.Module]:
    def load(state: dict[str, Tensor]) -> nn.Module:
        model = _materialised(state)
        _spoil(model)
        set_model_state_dict(
            model, dict(state), options=StateDictOptions(full_state_dict=True, strict=strict)
        )
        return model

    return load


def _assigned(state: dict[str, Tensor]) -> nn.Module:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4, sync="lagged"))
    model.load_state_dict({**model.state_dict(), **state}, assign=True)
    return model


def _from_pretrained(state: dict[str, Tensor]) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(
            self, config, norm=lambda channels: SyncBatchNorm(channels, sync="lagged")
        ) -> None:
            super().__init__(config)
            self.net = nn.Sequential(nn.Linear(3, 4), norm(4))
            self.post_init()

    norm = (
        nn.BatchNorm1d
        if len(state) == 7
        else lambda channels: SyncBatchNorm(channels, sync="lagged")
    )
    saved = Model(transformers.PretrainedConfig(), norm)
    saved.net.load_state_dict(state)
    with TemporaryDirectory() as folder:
        saved.save_pretrained(folder)
        return Model.from_pretrained(folder).net


LOADERS: dict[str, Callable[[dict[str, Tensor]], nn.Module]] = {
    "to_empty": _materialised,
    "set_model_state_dict": _spoilt_and_set(True),
    "set_model_state_dict, not strict": _spoilt_and_set(False),
    "assign": _assigned,
    "from_pretrained": _from_pretrained,
}


@pytest.mark.parametrize("loader", LOADERS)
def test_averages_begin_where_a_loader_fills_the_layer_from_a_batch_norm(loader):
    state = {
        k: v + 1 for k, v in nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict().items()
    }
    layer, new = LOADERS[loader](state)[1], SyncBatchNorm(4, sync="lagged")
    for name in LaggedMode().buffers(4, "meta"):
        assert torch.equal(layer.get_buffer(name), new.get_buffer(name)), name
    assert loader == "to_empty" or torch.equal(layer.running_mean, state["1.running_mean"])
    layer(torch.randn(5, 4))


@pytest.mark.parametrize("loader", [name for name in LOADERS if name != "to_empty"])
def test_averages_that_a_loader_brings_are_taken(loader):
    own = nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4, sync="lagged")).state_dict()
    state = {k: v + 1 for k, v in own.items()}
    got = LOADERS[loader](state).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in got.items())


def _cast(name: str, to: Callable[[Tensor], Tensor]) -> nn.Module:
    model = prepare_ddp(nn.Sequential(SyncBatchNorm(3, sync="lagged")))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state[f"0.{name}"] = to(state[f"0.{name}"])
    model.load_state_dict(state, assign=True)
    for seed in range(4):
        torch.manual_seed(seed)
        model(torch.randn(8, 3) + 3).square().sum().backward()
    return model


CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "lagged_mean": Tensor.float,
    "lagged_var": Tensor.float,
    "lagged_gradient": lambda t: t.t().contiguous().t(),
    "lagged_updates": Tensor.int,
}


@pytest.mark.parametrize("name", CASTS)
def test_averages_of_other_types_and_strides_are_read_as_what_they_are(name):
    """Kernels are given pointers to what a layer is made with."""
    got, expected = (_cast(name, to).state_dict() for to in (CASTS[name], lambda t: t))
    for key, value in expected.items():
        torch.testing.assert_close(got[key].to(value.dtype), value, rtol=1e-5, atol=1e-5, msg=key)


class _OneIsAsked(nn.Module):
    """Two layers of different sizes; the first is called in inference mode if told so."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = SyncBatchNorm(2, sync="lagged")
        self.trained = SyncBatchNorm(3, sync="lagged")

    def forward(self, x: Tensor, *, is_inference: bool) -> Tensor:
        with torch.inference_mode(is_inference), torch.no_grad():
            found = self.asked(x[:, :2])
        return self.trained(x + found.clone().sum(1, keepdim=True))


@pytest.mark.parametrize("kernels", [None, "composed"], ids=str)
def test_a_step_may_begin_in_inference_mode(kernels):
    """The averages of all layers are read when the first one is called."""
    with as_device(kernels) if kernels else nullcontext():
        _check_a_step_in_inference_mode()


def _check_a_step_in_inference_mode() -> None:
    results = []
    for is_inference in (False, True):
        torch.manual_seed(0)
        model = prepare_ddp(_OneIsAsked())
        for _ in range(4):
            x = torch.randn(8, 3, requires_grad=True)
            model(x, is_inference=is_inference).square().sum().backward()
        results.append([x.grad, *model.state_dict().values()])
    assert model.trained.lagged_updates.tolist() == [4, 3]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_copy_of_averages_is_each_layers_own():
    own = [(torch.randn(c), torch.rand(c).double(), torch.randn(c, 2).t()) for c in (1, 5, 2)]
    for (mean, var, gradient), copied in zip(own, snapshots(own), strict=True):
        expected = [*mean, *(2 * var), 2.0, *gradient[0], *gradient[1]]
        assert copied.tolist() == [float(t) for t in expected]


class _MayRaise(nn.Module):
    raises = False

    def forward(self, x: Tensor) -> Tensor:
        if self.raises:
            raise ArithmeticError("no output")
        return x


def test_averages_are_read_where_they_are_used():
    """Somebody may write them between two calls of a frozen model, and after a forward that failed."""
    torch.manual_seed(0)
    layer, last = SyncBatchNorm(3, sync="lagged"), _MayRaise()
    model, x = prepare_ddp(nn.Sequential(layer, last)), torch.randn(64, 3)
    for _ in range(5):
        model(x).square().sum().backward()
    assert not layer.lagged_waits
    teacher, outputs = copy.deepcopy(model), []
    for shift in (0.0, 5.0):
        with frozen_statistics(model):
            layer.lagged_mean.add_(shift)
            outputs.append(model(x))
        with frozen_statistics(teacher), torch.no_grad():
            for theirs, ours in zip(teacher.buffers(), model.buffers(), strict=True):
                theirs.copy_(ours)
            outputs.append(teacher(x))
            assert torch.equal(outputs[-1], outputs[-2])
    last.raises = True
    with pytest.raises(ArithmeticError):
        model(x)
    last.raises = False
    layer.lagged_mean.add_(5.0)
    outputs.append(model(x))
    for before, after in zip(outputs[1::2], outputs[2::2], strict=True):
        assert ((before - after) > 3).all()
