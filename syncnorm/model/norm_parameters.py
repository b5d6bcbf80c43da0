"""The parameters of a model's normalisation layers, by themselves."""

from __future__ import annotations

from typing import TypeVar, cast

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from syncnorm.errors import InputError
from syncnorm.family.layer import Pooling
from syncnorm.model.sample import check_not_lazy

_Model = TypeVar("_Model", bound=nn.Module)

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, Pooling)


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all normalisation layers, by name.

    Layers are ours, torch's, and others whose class has "norm" in its name and parameters of at
    most one dimension (an RMSNorm of transformers').
    """
    return {
        f"{name}.{key}" if name else key: parameter
        for name, module in model.named_modules()
        if is_norm(module)
        for key, parameter in _own(module)
    }


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """A module's own parameters; in the place of a parametrized one its originals."""
    found = [*module.named_parameters(recurse=False)]
    if parametrize.is_parametrized(module):
        for name, each in cast(nn.ModuleDict, module.parametrizations).items():
            originals = each.named_parameters(recurse=False)
            found += [(f"parametrizations.{name}.{key}", p) for key, p in originals]
    return found


def is_norm(module: nn.Module) -> bool:
    """True if a module is a normalisation layer."""
    if isinstance(module, _NORMS):
        return True
    return "norm" in type(module).__name__.lower() and all(p.ndim <= 1 for _, p in _own(module))


def train_only_norms(model: _Model) -> _Model:
    """Freeze all parameters but those of normalisation layers.

    Modes stay as they are, so that batch norms go on taking statistics. With
    DistributedDataParallel, call it before it wraps the model, and give the optimizer the
    parameters that are left: `[p for p in model.parameters() if p.requires_grad]`.

    Args:
        model: changed in place.

    Returns:
        `model`.

    Raises:
        InputError: it has no parameter of a normalisation layer, or lazy ones.

    Example:
        >>> model = train_only_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['1.weight', '1.bias']

    References:
        Frankle, Schwab and Morcos, Training BatchNorm and Only BatchNorm, arXiv:2003.00152. There
        weights begin at random in [0, 1): `nn.init.uniform_(layer.weight)`, before
        DistributedDataParallel gives all workers the first one's.
    """
    check_not_lazy(model)
    trained = {id(p) for p in norm_parameters(model).values()}
    if not trained:
        raise InputError(
            "`model` must have a parameter of a normalisation layer, got none in "
            f"{type(model).__name__}. Build its layers with affine=True."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return model
