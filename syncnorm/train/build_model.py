"""The network that `model.name` stands for: a built-in one, a package's, or a user's callable."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from syncnorm.errors import ConfigError, in_one_line
from syncnorm.train.config.callables import check_arguments, own_signature, resolve
from syncnorm.train.data.datasets import types_of
from syncnorm.train.models import MODELS, NormLayer
from syncnorm.train.packages import PACKAGED, Shape, make_packaged


def build_model(
    name: str,
    options: dict[str, Any],
    allowed: Sequence[str] = (),
    *,
    in_channels: int | None,
    num_classes: int | None,
    norm_layer: NormLayer,
) -> nn.Module:
    """Build the network `name`.

    Args:
        name: a built-in network, `torchvision:`, `timm:` or `transformers:` and a name, or
            `package.module:callable`.
        options: further arguments; they win over the ones below.
        allowed: packages whose callables may be called; one of the three known ones may also load
            weights from elsewhere if it is allowed.
        in_channels: of the data's inputs; None if it has no such number.
        num_classes: of the data; None if it has no such number.
        norm_layer: from a number of channels to a layer.

    Raises:
        ConfigError: there is no such network, it refuses its arguments, or is no module.
    """
    given = {"in_channels": in_channels, "num_classes": num_classes, "norm_layer": norm_layer}
    if name in MODELS:
        _check_shape(name, in_channels, num_classes)
        return MODELS[name](**given)
    if PACKAGED.fullmatch(name):
        may_load = name.partition(":")[0] in allowed
        shape = Shape(in_channels, num_classes)
        model = make_packaged(name, options, shape, may_load=may_load)
    else:
        function = resolve(name, allowed, "model.name")
        arguments = _arguments(name, function, given, options)
        try:
            model = function(**arguments)
        except TypeError as error:
            missing = [key for key, value in arguments.items() if value is None and key in given]
            if not missing or "NoneType" not in str(error):
                raise
            raise ConfigError(
                f"`model.options.{missing[0]}` may have to be given for {name!r}, since the data set does "
                f"not say it: {in_one_line(error)}"
            ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"`model.name` must return a torch.nn.Module, got {types_of(model)} of {name!r}."
        )
    return model


def _check_shape(name: str, in_channels: int | None, num_classes: int | None) -> None:
    for what, number in (("channels", in_channels), ("classes", num_classes)):
        if number is None:
            raise ConfigError(
                f"`model.name` must not be {name} where the data set does not say its number of "
                f"{what}: return it with the data"
            )


def _arguments(
    name: str, function: Callable[..., Any], given: Mapping[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """Choose those of the given arguments that the signature names; all, if it takes any."""
    signature = own_signature(function)
    if signature is None:
        return {**given, **options}
    parameters = signature.parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    chosen = {key: value for key, value in given.items() if takes_any or key in parameters}
    arguments = {**chosen, **options}
    check_arguments("model.options", name, function, **arguments)
    return arguments
