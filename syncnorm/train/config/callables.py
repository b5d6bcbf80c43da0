"""Callables that a configuration names as `package.module:callable`.

To import a module is to run it, so only packages that the person at the command line has allowed
are imported: a configuration alone, found in a folder or sent by somebody, runs nothing.

A program may also hand over objects of its own (`syncnorm.fit`). Nothing is imported for those, and
they need no permission.
"""

import importlib
import inspect
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from syncnorm.errors import ConfigError, in_one_line
from syncnorm.train.config.schema import Config
from syncnorm.train.config.section import REFERENCE
from syncnorm.train.config.strict_yaml import printable
from syncnorm.train.packages import PACKAGED

GIVEN = "given"
"""The module in the name of an object that no import leads to, such as `given:model`."""

_given: dict[str, Callable[..., Any]] = {}

_PACKAGE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def give(callables: Mapping[str, Callable[..., Any]]) -> None:
    """Hand over callables to this process, by the names that a configuration has for them.

    Those of before are forgotten: they were another run's.
    """
    _given.clear()
    _given.update(callables)


def resolve(reference: str, allowed: Sequence[str], key: str) -> Callable[..., Any]:
    """Import the callable that a configuration names.

    Args:
        reference: `package.module:callable`.
        allowed: dotted names of packages; each allows itself and what is below it.
        key: of the configuration, for the message.

    Raises:
        ConfigError: it is not allowed, and nothing was imported; or it cannot be imported, or is
            not callable.
    """
    if reference in _given:
        return _given[reference]
    module_name, name = check_allowed(reference, allowed, key)
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (Exception, SystemExit) as error:  # a module may raise anything as it is run
        cause = printable(in_one_line(error))
        is_absent = isinstance(error, ModuleNotFoundError)
        remedy = "Install its package, put its folder on PYTHONPATH, or work in that folder."
        raise ConfigError(
            f"`{key}` must name what can be imported, got {reference!r}: {cause}"
            + (f". {remedy}" if is_absent else "")
        ) from None
    if not callable(found):
        raise ConfigError(
            f"`{key}` must name a callable, got {reference!r}, which is {reprlib.repr(found)}"
        )
    return found


def call(section: str, reference: str, allowed: Sequence[str], *args: Any, **options: Any) -> Any:
    """Import the callable that a section's `name` names, and call it with its `options`.

    Raises:
        ConfigError: see `resolve` and `check_arguments`.
    """
    function = resolve(reference, allowed, f"{section}.name")
    check_arguments(f"{section}.options", reference, function, *args, **options)
    return function(*args, **options)


def check_arguments(
    key: str, reference: str, function: Callable[..., Any], *args: Any, **options: Any
) -> None:
    """Check that a callable takes these arguments, as far as its signature says it.

    Raises:
        ConfigError: it does not; names `key`, which has the options.
    """
    signature = own_signature(function)
    if signature is None:
        return
    try:
        signature.bind(*args, **options)
    except TypeError as error:
        raise ConfigError(f"`{key}` must fit {reference!r}: {error}") from None


def own_signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """Find what a callable takes; None if it is not known, as of a class of C's.

    One that wraps another may take more or less than that does, unless it hands all of it on.
    """
    if not inspect.ismethod(function):  # what that wraps has no object
        function = inspect.unwrap(function, stop=lambda each: not _takes_anything(each))
    try:
        return inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        return None


def _takes_anything(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function, follow_wrapped=False).parameters
    except (TypeError, ValueError):  # such as what functools.lru_cache makes
        return True
    kinds = {each.kind for each in parameters.values()}
    return kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def check_allowed(reference: str, allowed: Sequence[str], key: str) -> tuple[str, str]:
    """Check that a reference may be imported, and split it into module and name; import nothing.

    Raises:
        ConfigError: it is no reference, or not allowed.
    """
    for package in allowed:
        if not _PACKAGE.fullmatch(package):
            raise ConfigError(
                f"`--allow` must be the dotted name of a package, got {reprlib.repr(package)}"
            )
    if not REFERENCE.fullmatch(reference):
        raise ConfigError(
            f"`{key}` must be package.module:callable, with no part that begins with _, got "
            f"{reprlib.repr(reference)}"
        )
    module_name, _, name = reference.partition(":")
    if module_name == GIVEN and reference not in _given:
        raise ConfigError(
            f"`{key}` is {reference!r}: a program gave an object of its own to syncnorm.fit. Give it "
            "again: only the program knows it."
        )
    if not any(f"{module_name}.".startswith(f"{package}.") for package in allowed):
        raise ConfigError(
            f"`{key}` must name a callable of a package that is allowed, got {reference!r}. "
            f"To run its code, add --allow {module_name.partition('.')[0]}."
        )
    return module_name, name


def check_callables(
    config: Config,
    allowed: Sequence[str],
    keys: Sequence[str] = ("model.name", "data.name", "task.name", "follow.loggers"),
) -> None:
    """Check that the callables of a configuration are allowed, before anything is started.

    Imports nothing.

    Args:
        config: that names them.
        allowed: dotted names of packages.
        keys: whose callables are going to be called.

    Raises:
        ConfigError: see `check_allowed`.
    """
    sections = {
        "model.name": [config.model.name],
        "data.name": [config.data.name],
        "task.name": [config.task.name],
        "follow.loggers": list(config.follow.loggers),
    }
    for key, name in [(each, name) for each in keys for name in sections[each]]:
        is_reference = REFERENCE.fullmatch(name) and not PACKAGED.fullmatch(name)
        if is_reference and name not in _given:
            check_allowed(name, allowed, key)
