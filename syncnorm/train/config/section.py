"""Building blocks of the schema: the base model of a section, and the types of values.

Also the nearest known name to one that is not known, for messages.
"""

import re
import reprlib
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.config import JsonDict

from syncnorm.errors import ConfigError

# The path of a key, such as ("train", "lr").
Key = tuple[str, ...]

Finite = Annotated[float, Field(allow_inf_nan=False)]
# More of anything is a slip of the pen; Python would take it, torch and float would not.
Whole = Annotated[int, Field(le=1_000_000_000)]

# `package.module:callable`, nothing of it private: not `__main__`, not `__builtins__`
REFERENCE = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)*:[A-Za-z]\w*", re.ASCII)

# As a path it would make a local folder: s3://bucket becomes s3:/bucket.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class Section(BaseModel):
    """A group of keys. Strict: "3" is no integer, and neither is true."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False
    )


def _keyword_arguments(options: Any) -> Any:
    if isinstance(options, dict):
        for name in options:
            if not name.isidentifier():
                raise ValueError(f"must have names of arguments as keys, got {reprlib.repr(name)}")
    return options


Options = Annotated[dict[str, Any], BeforeValidator(_keyword_arguments)]


def _local_path(text: str) -> str:
    if "\0" in text:
        raise ValueError(f"must be a path, got {reprlib.repr(text)}")
    if _URL.match(text):
        raise ValueError(
            f"must be a path on a file system of this machine, got {reprlib.repr(text)}. "
            "Mount what is elsewhere, and give the path of a mounted folder, without file://."
        )
    # No shell does it in a file.
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        raise ValueError(
            f"must begin with the name of a user after ~, got {reprlib.repr(text)}. Write ./~ for a "
            "name that begins so."
        ) from None


LocalPath = Annotated[str, Field(min_length=1), AfterValidator(_local_path)]


def is_url(text: str) -> bool:
    """Return True for an address such as `s3://bucket/runs`, False for a path."""
    return _URL.match(text) is not None


def check_path_or_url(text: str) -> str:
    """Return `text`; ValueError if it is neither a local path nor the address of a folder.

    A path's `~` is the home folder. The address is of a store such as `s3://bucket/runs`, without a
    password in it.
    """
    found = _URL.match(text)
    if found is None or found[1].lower() in ("file", "local"):
        return _local_path(text)
    rest = text[found.end() :]
    parts = rest.rstrip("/").split("/")
    if "@" in parts[0]:
        # Not shown: what stands before the @ may be a password.
        raise ValueError(
            f"must hold no name and no password, got {found[0]}...@... Give them as the store's "
            "own library reads them, from the environment or a file."
        )
    if {"", ".", ".."} & set(parts) or "::" in text or re.search(r"[\s\x00-\x1f?#*\[\]]", text):
        raise ValueError(
            f"must be a path or an address such as s3://bucket/runs, got {reprlib.repr(text)}"
        )
    return text


PathOrUrl = Annotated[str, Field(min_length=1), AfterValidator(check_path_or_url)]


def _run_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text, re.ASCII):
        raise ValueError(
            "must be at most 100 letters, digits, '.', '_' and '-' and begin with a letter or a "
            f"digit, got {reprlib.repr(text)}. It names the run's folder."
        )
    return text


RunName = Annotated[str, AfterValidator(_run_name)]


def _tag(text: str) -> str:
    if not (1 <= len(text) <= 64 and text.isprintable()):
        raise ValueError(
            f"must be a word or a few, at most 64 characters, got {reprlib.repr(text)}"
        )
    return text


RunTag = Annotated[str, AfterValidator(_tag)]

# Names that are less alike are no slips of the pen for each other.
_ALIKE = 0.6

_Patterns = TypeVar("_Patterns", bound=Collection[str])


def check_patterns(patterns: _Patterns) -> _Patterns:
    """Return `patterns`; ValueError if one of them is no regular expression."""
    for pattern in patterns:
        try:
            # "[[" is a FutureWarning: it may mean something else one day.
            with warnings.catch_warnings(action="error", category=FutureWarning):
                re.compile(pattern)
        except (re.error, FutureWarning, OverflowError, RecursionError) as error:
            place = " as keys" if isinstance(patterns, dict) else ""
            raise ValueError(
                f"must have regular expressions{place}, got {reprlib.repr(pattern)}: {error}"
            ) from None
    return patterns


def check_finds(key: str, patterns: Iterable[str], names: Collection[str], what: str) -> None:
    """Raise ConfigError unless each of a key's expressions finds a name of the model's.

    Args:
        key: that holds the expressions.
        patterns: the expressions, searched for in each name.
        names: those that there are.
        what: they are the names of.
    """
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            first = ", ".join(list(names)[:8]) + (", ..." if len(names) > 8 else "")
            raise ConfigError(
                f"`{key}` must each find {what}, got {pattern!r}.{name_hint(pattern, names)} "
                f"There are {first or 'none'}."
            )


def check_name_or_reference(name: str, known: Sequence[str]) -> str:
    """Return `name`; ValueError if it is neither a known name nor a reference to a callable."""
    if name in known or REFERENCE.fullmatch(name):
        return name
    raise ValueError(
        f"must be one of {', '.join(known)}, or package.module:callable, got "
        f"{reprlib.repr(name)}.{name_hint(name, known)}"
    )


def name_or_reference_schema(known: Iterable[str], other: str | None = None) -> JsonDict:
    """Describe in JSON Schema the values that `check_name_or_reference` accepts, and `other`."""
    pattern = REFERENCE.pattern if other is None else f"({REFERENCE.pattern}|{other})"
    return {"anyOf": [{"enum": list(known)}, {"pattern": f"^{pattern}$"}]}


def leaves(values: Mapping[str, Any], prefix: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Yield the path and the value of each key of nested mappings; an empty one is a value."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Name the entry of `known` that `name` most likely stands for; None if none is like it.

    Dotted names are compared as a whole and by their last part, so that `lrr` finds `train.lr`.
    """
    # Cut off: the comparison takes time that grows with the product of the lengths.
    start = name[:100].lower()
    likeness = {candidate: _likeness(start, candidate.lower()) for candidate in known}
    like = [candidate for candidate, (_, last) in likeness.items() if last >= _ALIKE]
    return max(like, key=lambda candidate: sum(likeness[candidate]), default=None)


def name_hint(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Write a sentence for the end of a message, with a blank before it, about the nearest name.

    Args:
        name: one that is not known.
        known: the names that are.
        prefix: stands before the name that is shown.
    """
    found = nearest(name, known)
    return "" if found is None else f" The nearest is {prefix + found!r}."


def _likeness(name: str, candidate: str) -> tuple[float, float]:
    whole = SequenceMatcher(None, name, candidate).ratio()
    last = SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
    return whole, last
