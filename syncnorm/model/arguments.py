"""The arguments of a class's constructor, through its bases."""

from __future__ import annotations

import inspect

_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def constructor_arguments(cls: type) -> dict[str, type]:
    """Find the arguments that a class takes, also those that it passes on to its bases' as **options.

    Returns:
        For each name the class whose constructor has it.
    """
    found: dict[str, type] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            _, *parameters = inspect.signature(base.__init__).parameters.values()
            for each in parameters:
                if each.kind not in _REST:
                    found.setdefault(each.name, base)
            if all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in parameters):
                break
    return found
