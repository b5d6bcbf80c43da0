"""The options of a source: its keyword arguments, checked by their annotations."""

import functools
import importlib
import inspect
import os
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError, validate_call

from syncnorm.errors import ConfigError
from syncnorm.train.config.section import Finite, name_hint
from syncnorm.train.data.splits import Splits

Share = Annotated[Finite, Field(ge=0, lt=1)]
Size = Annotated[int, Field(ge=1, le=65_536)]
Classes = Annotated[int, Field(ge=1, le=1_000_000)]
Column = Annotated[str, Field(min_length=1)]


def source(load: Callable[..., Splits]) -> Callable[..., Splits]:
    """Make a source of a function of a folder and of keyword arguments.

    Wrong options, and a folder that is null or not there, become a `ConfigError`.
    """
    name = load.__name__
    checked = validate_call(config=ConfigDict(strict=True))(load)

    @functools.wraps(load)
    def call(root: Path | None, **options: Any) -> Splits:
        if root is None or not os.path.exists(root):  # noqa: PTH110 - it raises nothing
            got = "null" if root is None else f"{str(root)!r}, which does not exist"
            raise ConfigError(f"`data.root` must hold the data for data.name={name}, got {got}")
        try:
            check_names(load, name, options)
            return checked(root, **options)
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in detail["loc"])
            rule = detail["msg"][:1].lower() + detail["msg"][1:]
            raise ConfigError(
                f"`data.options.{key}`: {rule}, got {reprlib.repr(detail['input'])}"
            ) from None
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"`data.options`: {error}") from None

    return call


def check_names(load: Callable[..., Any], name: str, options: Mapping[str, Any]) -> None:
    """Check the names of options against the arguments of a source.

    Raises:
        ValueError: one is not known or missing.
    """
    parameters = dict(list(inspect.signature(load).parameters.items())[1:])
    for key in options:
        if key not in parameters:
            raise ValueError(
                f"options must be some of {', '.join(parameters)} with name {name}, got "
                f"{reprlib.repr(key)}.{name_hint(key, parameters)}"
            )
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in options:
            raise ValueError(f"options must hold {key} with name {name}, got none")


def load_module(name: str, install: str) -> Any:
    """Import a package that a source needs.

    Raises:
        ConfigError: it is not there; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"`data.name` needs the package {name.partition('.')[0]}, which cannot be imported "
            f"({error}). Install it: {install}"
        ) from None
