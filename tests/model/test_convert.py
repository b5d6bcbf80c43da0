"""Models that are converted, trained and reverted stay themselves."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm import SyncBatchNorm, SyncBatchRenorm, conversion_table, convert, revert
from syncnorm.module import SyncNorm
from tests.model.foreign import ARCHITECTURES

TARGETS = [SyncBatchNorm, SyncBatchRenorm]


def _images(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) + 0.5


def _make(name: str) -> nn.Module:
    """With running statistics that are not the initial ones."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]()
    model.train()
    if name != "lazy":
        _run(model)
    return model


def _run(model: nn.Module, seed: int = 0) -> Tensor:
    """Whatever torch's SyncBatchNorm does without a group runs on a CPU too."""
    return model(_images(seed))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    for step in range(3):
        optimizer.zero_grad()
        y = _run(model, step)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(step)))
        optimizer.step()


def _evaluate(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(_images(9))


HOOKS = [name for name in vars(nn.BatchNorm1d(1)) if "hooks" in name]


def _identity(model: nn.Module) -> dict[str, Any]:
    """What must be the same objects: modules and parameters under all their names, hooks, and what
    keys there are.
    """
    return {
        "modules": [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)],
        "parameters": [
            (name, id(p), p.requires_grad)
            for name, p in model.named_parameters(remove_duplicate=False)
        ],
        "buffers": [(name, id(b)) for name, b in model.named_buffers(remove_duplicate=False)],
        "state": list(model.state_dict()),
        "hooks": [(name, [*getattr(m, name).items()]) for m in model.modules() for name in HOOKS],
    }


def _attributes(model: nn.Module) -> list[Any]:
    return [
        (
            type(m).__name__,
            type(m).__mro__[1:],
            {k: v for k, v in vars(m).items() if not isinstance(v, dict)},
        )
        for m in model.modules()
    ]


@pytest.mark.parametrize("to", TARGETS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "lazy"])
def test_round_trip(name, to):
    model = _make(name)
    before, attributes, evaluated = _identity(model), _attributes(model), _evaluate(model)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    assert convert(model, to) is model
    assert all(isinstance(m, to) for m in norms)
    assert norms
    assert _identity(model) == before
    assert torch.equal(_evaluate(model), evaluated), "evaluation is bit-equal"
    model.train()
    counted = [None if m.num_batches_tracked is None else int(m.num_batches_tracked) for m in norms]
    _train(model, optimizer)
    assert not torch.equal(_evaluate(model), evaluated), "it has learnt"
    trained = _evaluate(model)
    assert len(conversion_table(model).splitlines()) == 1 + len(norms)
    assert revert(model) is model
    assert _identity(model) == before
    assert _attributes(model) == attributes
    assert not any(isinstance(m, SyncNorm) for m in model.modules())
    assert torch.equal(_evaluate(model), trained)
    uses = 2 if name == "tied" else 1
    start = 0 if to is SyncBatchNorm else uses
    for norm, count in zip(norms, counted, strict=True):
        if count is not None:
            assert int(norm.num_batches_tracked) == count + start + 3 * uses
    _train(model, optimizer)  # torch's own layers go on


def test_a_lazy_model_is_ours_from_its_first_forward_on():
    model = ARCHITECTURES["lazy"]()
    norm = model[1]
    convert(model, SyncBatchRenorm, momentum=0.3, running_average="var")
    assert "LazyBatchNorm2d" in conversion_table(model)
    assert "0.2 -> 0.3" in conversion_table(model)
    torch.manual_seed(0)
    plain = nn.Sequential(model[0], SyncBatchRenorm(4, momentum=0.3, running_average="var"))
    x = _images()
    expected = plain(x)
    got = []
    handle = norm.register_forward_hook(lambda layer, args, y: got.append(y.detach()))
    model(x)
    handle.remove()
    assert torch.equal(got[0], expected)
    assert type(norm) is SyncBatchRenorm
    assert (norm.momentum, norm.running_average, norm.num_features) == (0.3, "var", 4)
    assert torch.equal(norm.running_mean, plain[1].running_mean)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    _train(model, optimizer)
    before = _evaluate(model)
    revert(model)
    assert type(norm) is nn.BatchNorm2d
    assert norm.momentum == 0.2
    assert int(norm.num_batches_tracked) == 4
    assert torch.equal(_evaluate(model), before)
    assert vars(norm).keys() == vars(nn.BatchNorm2d(4)).keys()


def test_a_lazy_layer_goes_back_before_its_first_forward():
    layer = nn.LazyBatchNorm1d()
    before = vars(layer).copy()
    convert(layer, SyncBatchRenorm, momentum=0.3)
    convert(layer, process_group=None)  # asked once more: the option stays
    assert layer.pending.request.momentum(layer) == 0.3
    assert type(revert(layer)) is nn.LazyBatchNorm1d
    assert vars(layer) == before
    layer(torch.randn(3, 4))
    assert type(layer) is nn.BatchNorm1d


def test_a_lazy_layer_that_a_state_dict_has_filled():
    layer = convert(nn.LazyBatchNorm1d())
    layer.load_state_dict(nn.BatchNorm1d(4).state_dict())
    assert layer(torch.randn(3, 4)).shape == (3, 4)
    assert type(layer) is SyncBatchNorm
    assert layer.num_features == 4


def _pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled], ids=["deepcopy", "torch.save"])
@pytest.mark.parametrize(
    "name", ["digits_resnet", "tied", "with hooks", "a subclass", "torch's SyncBatchNorm"]
)
def test_copies_of_converted_models_train_and_go_back(name, copied):
    model = _make(name)
    attributes = _attributes(model)
    convert(model, SyncBatchRenorm)
    copied_model = copied(model)
    for each in (model, copied_model):
        _train(each, torch.optim.SGD(each.parameters(), lr=1e-3))
    assert torch.equal(_evaluate(model), _evaluate(copied_model))
    assert conversion_table(copied_model) == conversion_table(model)
    revert(copied_model)
    assert not any(isinstance(m, SyncNorm) for m in copied_model.modules())
    assert [a[:2] for a in _attributes(copied_model)] == [a[:2] for a in attributes]
    assert any(isinstance(m, SyncNorm) for m in model.modules()), "the original is left alone"
    assert torch.equal(_evaluate(model), _evaluate(copied_model))
    assert copied_model.state_dict().keys() == model.state_dict().keys()


def test_training_on_equals_training_what_was_built_so():
    """What conversion sets up is what the constructor does."""
    for to in TARGETS:
        built = nn.Sequential(nn.Conv2d(3, 4, 3), to(4), nn.Flatten(), nn.Linear(4 * 14 * 14, 5))
        converted = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 14 * 14, 5)
        )
        converted.load_state_dict(built.state_dict())
        convert(converted, to)
        assert vars(converted[1]).keys() - {"_original"} == vars(built[1]).keys()
        assert repr(converted) == repr(built)
        for model in (built, converted):
            _train(model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9))
        for (key, a), b in zip(
            built.state_dict().items(), converted.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), key
