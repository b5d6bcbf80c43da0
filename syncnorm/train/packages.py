"""Networks of torchvision, timm and transformers, as `torchvision:resnet18` names them.

These packages are known, so their names need no leave of the person at the command line. What loads
from the network or runs code of others does: it is refused unless the package is allowed.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from syncnorm.errors import ConfigError, in_one_line
from syncnorm.train.config.section import name_hint

# A tag of timm follows a dot; a path of transformers has a slash.
PACKAGED = re.compile(
    r"torchvision:[A-Za-z]\w*|timm:[A-Za-z]\w*(\.\w+)?"
    r"|transformers:([A-Za-z]\w*|[\w.~-]*(/[\w .~-]+)+/?)",
    re.ASCII,
)


class Shape(NamedTuple):
    """The data that a network is for; None is not known."""

    in_channels: int | None
    num_classes: int | None


def make_packaged(name: str, options: dict[str, Any], shape: Shape, *, may_load: bool) -> Any:
    """Build the network that a name of a known package stands for.

    Args:
        name: one that PACKAGED matches.
        options: further arguments of the package's own function or configuration.
        shape: of the data.
        may_load: True if weights may come from the network, or from files that can run code.

    Raises:
        ConfigError: the package is missing, or has no such network, or refuses the options; or the
            options ask for what is not allowed.
    """
    package, _, network = name.partition(":")
    makers: dict[str, Callable[..., Any]] = {
        "torchvision": _torchvision,
        "timm": _timm,
        "transformers": _transformers,
    }
    try:
        return makers[package](network, options, shape, may_load)
    except ConfigError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, OSError) as error:
        cause = in_one_line(error)
        raise ConfigError(f"`model.options` must fit {name!r}: {cause}") from None


def _torchvision(network: str, options: dict[str, Any], shape: Shape, may_load: bool) -> Any:
    models = _import("torchvision.models")
    _check_known("torchvision", network, models.list_models())
    if shape.in_channels not in (None, 3):
        raise ConfigError(
            f"`model.name` must name a network for inputs of {shape.in_channels} channel(s), got "
            f"'torchvision:{network}', which is for 3"
        )
    _check_loading("torchvision", options, ("weights", "weights_backbone"), may_load)
    builder = models.get_model_builder(network)
    # The default of weights_backbone is a download.
    backbone = {"weights_backbone"} & inspect.signature(builder).parameters.keys()
    given = dict.fromkeys(backbone) | _known(num_classes=shape.num_classes)
    return builder(**(given | options))


def _timm(network: str, options: dict[str, Any], shape: Shape, may_load: bool) -> Any:
    timm = _import("timm")
    if not timm.is_model(network):
        _check_known("timm", network, timm.list_models())
    _check_loading("timm", options, ("pretrained", "checkpoint_path"), may_load)
    given = _known(num_classes=shape.num_classes, in_chans=shape.in_channels)
    return timm.create_model(network, **(given | options))


def _transformers(network: str, options: dict[str, Any], shape: Shape, may_load: bool) -> Any:
    transformers = _import("transformers")
    given = _known(num_labels=shape.num_classes) | options
    if "/" not in network:
        cls = _transformers_class(transformers, network)
        config = cls.config_class(**given)
        # A text model has no channels, and would keep the number as an attribute without a use.
        if hasattr(config, "num_channels") and "num_channels" not in options:
            config.update(_known(num_channels=shape.in_channels))
        return cls(config)
    path = str(Path(network).expanduser())
    if network[0] in "/.~" and not Path(path).is_dir():
        raise ConfigError(
            "`model.name` must name the folder of a model that transformers has saved, got "
            f"'transformers:{network}', where there is none"
        )
    here = {"local_files_only": not may_load, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(path, **here)
    config.update(given)
    (name, *_) = config.architectures or ("",)
    return _transformers_class(transformers, name).from_pretrained(
        path, config=config, use_safetensors=True, ignore_mismatched_sizes=True, **here
    )


def _transformers_class(transformers: ModuleType, name: str) -> Any:
    cls = getattr(transformers, name, None)
    if not inspect.isclass(cls) or not issubclass(cls, transformers.PreTrainedModel):
        raise ConfigError(
            "`model.name` must name a model class of transformers, such as "
            "ResNetForImageClassification, or the folder of one that was saved, got "
            f"'transformers:{name}'"
        )
    return cls


def _known(**arguments: int | None) -> dict[str, int]:
    return {name: value for name, value in arguments.items() if value is not None}


def _import(module: str) -> ModuleType:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except Exception as error:  # a build for another torch raises a RuntimeError
        cause = in_one_line(error)
        raise ConfigError(
            f"`model.name` must name a network of an installed package, got one of {package!r}, "
            f"which cannot be imported: {cause}. Install {package}, in a build for this torch."
        ) from None


def _check_known(package: str, network: str, known: list[str]) -> None:
    if network not in known:
        raise ConfigError(
            f"`model.name` must name a network of {package}, got {network!r}."
            f"{name_hint(network, known, f'{package}:')}"
        )


def _check_loading(
    package: str, options: Mapping[str, Any], loading: tuple[str, ...], may_load: bool
) -> None:
    asked = [name for name in loading if options.get(name)]
    if asked and not may_load:
        raise ConfigError(
            f"`model.options.{asked[0]}` must be left out, got {options[asked[0]]!r}: it loads "
            f"weights from elsewhere. To let it, add --allow {package}."
        )
