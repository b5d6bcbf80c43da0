"""From a file and overrides to a `Config`: find, read, override, check.

Whatever is wrong ends in one `ConfigError` that names the file or the key.
"""

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from syncnorm.errors import ConfigError
from syncnorm.train import strict_yaml
from syncnorm.train.config import Config
from syncnorm.train.nearest import nearest

# A configuration is a page; anything near this size is another kind of file.
_MAX_BYTES = 1_000_000


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        source: path of a YAML file, or the name of a packed one with or without `.yaml`.
        overrides: `section.key=value`, each value a YAML scalar; of two for one key the later one holds.

    Raises:
        ConfigError: naming the file or the key, and what would be right.
    """
    path = find_config(source)
    values = strict_yaml.parse(_read(path), str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, got {_show(values)}")
    keys = [_apply(values, override) for override in overrides]
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_describe(error, str(path), keys)) from None


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
    raise ConfigError(f"no configuration {source!r}. Packed ones, by name: {', '.join(sorted(packed)) or 'none'}.")


def _packed() -> Iterator[Path]:
    package = Path(__file__).resolve().parents[1]
    # In a wheel they lie inside the package, in a source tree beside it.
    for folder in (package / "configs", package.parent / "configs"):
        yield from folder.glob("*.yaml")


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_BYTES} bytes, so hardly a configuration")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _apply(values: dict[str, Any], override: str) -> str:
    """Set one key of the nested `values`. Whether the schema knows it is checked later, as for a file's."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r} must have the form section.key=value")
    value = strict_yaml.parse(text, f"override {override!r}")
    if isinstance(value, dict | list):
        raise ConfigError(f"override {override!r}: the value must be a single value, got {_show(value)}")
    for depth, part in enumerate(parts[:-1], start=1):
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parts[:depth])} is not a section")
    values[parts[-1]] = value
    return key


def _describe(error: ValidationError, source: str, overridden: Sequence[str]) -> str:
    problems = []
    for detail in error.errors(include_url=False):
        key = ".".join(str(part) for part in detail["loc"])
        origin = " (from the command line)" if key in overridden else ""
        problems.append(_problem(key, detail) + origin)
    if len(problems) == 1:
        return f"{source}: {problems[0]}"
    return "\n  ".join([f"{source}: {len(problems)} problems", *problems])


def _problem(key: str, detail: Mapping[str, Any]) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    match detail["type"]:
        case "extra_forbidden":
            return f"`{key}` is not a key. The nearest key is `{nearest(key, list(_all_keys(Config)))}`."
        case "missing":
            return f"`{key}` is missing"
        case "model_type":
            return f"`{key}` must be a section of `key: value` lines, got {_show(detail['input'])}"
        case "value_error" if isinstance(detail["input"], Mapping):  # a rule between keys of one section names them
            return f"`{key}`: {message}"
        case "value_error":
            return f"`{key}` {message}"
        case _:
            # pydantic begins with "Input should", "String should" and the like
            return f"`{key}` {re.sub('^[A-Z][a-z]+ should', 'must', message)}, got {_show(detail['input'])}"


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")


def _show(value: Any) -> str:
    return reprlib.repr(value)
