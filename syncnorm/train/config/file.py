"""From a file and overrides to a `Config`: find, read, override, check.

Every problem ends in one `ConfigError` that names the file or the key.
"""

import copy
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from syncnorm.errors import ConfigError
from syncnorm.train.config import strict_yaml
from syncnorm.train.config.messages import OPEN_SECTIONS, describe
from syncnorm.train.config.schema import Config
from syncnorm.train.config.section import Key, name_hint

# A configuration is a page; anything near this size is another kind of file.
_MAX_BYTES = 100_000


@dataclass(frozen=True)
class Written:
    """A configuration as it was written, not yet checked.

    Args:
        path: of the file.
        text: of the file.
        values: of the file, with the overrides applied.
        overridden: keys that the overrides set.
    """

    path: Path
    text: str
    values: dict[str, Any]
    overridden: frozenset[Key]


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        source: path of a YAML file, or the name of a packed one with or without `.yaml`.
        overrides: `section.key=value`, each value a YAML scalar; of two for one key the later one
            holds. `train.optimizer=NAME` is the optimizer with torch's defaults. An argument of an
            optimizer or a schedule that the file gives is taken out by
            `null`.

    Raises:
        ConfigError: names the file or the key, and the values that would be right.
    """
    return check(read(source, overrides))


def read(source: str, overrides: Sequence[str] = ()) -> Written:
    """Read a configuration without checking its keys and values; arguments as in `load_config`."""
    path = find_config(source)
    return parse(_read_text(path), path, overrides)


def parse(text: str, path: Path, overrides: Sequence[str] = ()) -> Written:
    """Parse the text of a configuration as `read` does; the path is for messages."""
    values = strict_yaml.parse(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, got {reprlib.repr(values)}")
    keys = [_apply(values, override) for override in overrides]
    return Written(path, text, values, frozenset(keys))


def from_values(values: Mapping[str, Any]) -> Written:
    """Take a configuration from a program; what is changed later does not change its values."""
    return Written(Path("config"), "", copy.deepcopy(dict(values)), frozenset())


def set_values(written: Written, overrides: Mapping[str, Any]) -> None:
    """Set values by their dotted keys, such as `{"train.lr": 0.1}`.

    Raises:
        ConfigError: a key leads through something that is no section.
    """
    for name, value in overrides.items():
        _set(written.values, _split(name), value, f"override {reprlib.repr(name)}")


def check(written: Written) -> Config:
    """Check the keys and values of a configuration that `read` has read."""
    try:
        return Config.model_validate(written.values)
    except ValidationError as error:
        raise ConfigError(
            f"{written.path}: {describe(error, written.values, written.overridden)}"
        ) from None


def find_config(source: str) -> Path:
    """Find a configuration by path, else by name among the packed ones."""
    path = Path(source)
    if "\0" in source:
        raise ConfigError(f"configuration {source!r} is not a path")
    if path.is_file():
        return path
    packed = {candidate.stem: candidate for candidate in _packed()}
    if path.parent == Path() and path.name.removesuffix(".yaml") in packed:
        return packed[path.name.removesuffix(".yaml")]
    if path.is_dir():
        raise ConfigError(f"configuration {source!r} is a directory")
    if path.exists():
        raise ConfigError(f"configuration {source!r} is not a regular file")
    hint = name_hint(path.name, packed) if path.parent == Path() else ""
    raise ConfigError(
        f"no configuration {source!r}. Packed ones, by name: "
        f"{', '.join(sorted(packed)) or 'none'}.{hint}"
    )


def _packed() -> Iterator[Path]:
    package = Path(__file__).resolve().parents[2]
    # In a wheel they lie inside the package, in a source tree beside it.
    for folder in (package / "configs", package.parent / "configs"):
        yield from folder.glob("*.yaml")


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_BYTES} bytes, so hardly a configuration")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _apply(values: dict[str, Any], override: str) -> Key:
    """Set one key of the nested `values`; the schema is checked later, as for a file's keys."""
    name, equals, text = override.partition("=")
    shown = f"override {reprlib.repr(override)}"
    key = _split(name)
    if not equals or not all(key):
        raise ConfigError(f"{shown} must have the form section.key=value")
    value = strict_yaml.parse(text, shown)
    if isinstance(value, dict) and value:  # none: what has no options, such as a logger
        raise ConfigError(
            f"{shown}: the value must be a value or a list of values, got {reprlib.repr(value)}. "
            f"Members of a mapping are given one by one: {name}.NAME=VALUE."
        )
    return _set(values, key, value, shown)


def _set(values: dict[str, Any], key: Key, value: Any, shown: str) -> Key:
    """Set a value, and return the key that it is under."""
    for depth, part in enumerate(key[:-1], start=1):
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{shown}: {'.'.join(key[:depth])} is not a section")
    if key in OPEN_SECTIONS and isinstance(value, str):
        # A bare name, such as train.optimizer=AdamW: the section anew, without what the file has.
        values[key[-1]] = {"name": value}
        return (*key, "name")
    if value is None and key[:-1] in OPEN_SECTIONS and key[-1] in values:
        del values[key[-1]]
    else:
        values[key[-1]] = value
    return key


def _split(name: str) -> Key:
    for section in (("norm", "rules"), ("train", "rates")):
        prefix = f"{'.'.join(section)}."
        if name.startswith(prefix):  # the rest is a regular expression, whose dots are its own
            return (*section, name.removeprefix(prefix))
    return tuple(name.split("."))
