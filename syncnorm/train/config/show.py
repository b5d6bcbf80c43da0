"""Views of a configuration: resolved, with the origin of each value; and the table of all keys.

All of it is made from `syncnorm.train.config.schema`; no list of keys is kept by hand.
"""

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from syncnorm.train.config import strict_yaml
from syncnorm.train.config.file import check, read
from syncnorm.train.config.schema import Config
from syncnorm.train.config.section import Key, leaves

# Comments start at the same column, but for lines longer than this.
_LONGEST = 60
_WIDTH = 100

_INTRODUCTION = """\
# Keys of a configuration

<!-- Written by `syncnorm config schema --markdown > docs/config.md`. -->

A configuration is a YAML file. On the command line `train.lr=0.05` replaces a value and
`train.clip=null` sets none; an argument that the file has in `train.optimizer` or `train.schedule`
is taken out by `null`. `syncnorm config show CONFIG` prints what a file comes to, with the origin
of each value.
"""


def show(source: str, overrides: Sequence[str] = ()) -> str:
    """Write a resolved configuration as YAML, each value with its origin as a comment.

    Args:
        source: as in `load_config`.
        overrides: as in `load_config`.

    Returns:
        what `load_config` reads back as the same configuration.

    Raises:
        ConfigError: as in `load_config`.
    """
    lines: list[tuple[str, str]] = []
    above: Key = ()
    for key, value, origin in origins(source, overrides):
        common = next(
            (depth for depth, part in enumerate(key[:-1]) if above[depth : depth + 1] != (part,)),
            len(key) - 1,
        )
        lines += [
            ("  " * depth + strict_yaml.dump_line(key[depth]) + ":", "")
            for depth in range(common, len(key) - 1)
        ]
        name, written = strict_yaml.dump_line(key[-1]), strict_yaml.dump_line(value)
        lines.append((f"{'  ' * (len(key) - 1)}{name}: {written}", origin))
        above = key[:-1]
    column = max(len(line) for line, origin in lines if origin and len(line) <= _LONGEST)
    return "".join(
        f"{line:<{column}}  # {origin}\n" if origin else f"{line}\n" for line, origin in lines
    )


def schema(form: Literal["text", "markdown", "json"] = "text") -> str:
    """Describe every key: its type, which values it takes, its default and its meaning.

    Args:
        form: for a terminal, for `docs/config.md`, or JSON Schema.
    """
    if form == "json":
        return json.dumps(Config.model_json_schema(), indent=2) + "\n"
    tables = list(_tables())
    if form == "markdown":
        return "\n".join([_INTRODUCTION, *map(_markdown, tables)])
    return "\n".join(map(_text, tables))


def origins(source: str, overrides: Sequence[str] = ()) -> Iterator[tuple[Key, Any, str]]:
    """Yield the path of each key, its value, and "default", "FILE:line" or "command line"."""
    written = read(source, overrides)
    config = check(written)
    lines = strict_yaml.lines(written.text)
    file = strict_yaml.printable(str(written.path))
    for key, value in leaves(config.model_dump()):
        if key in written.overridden:
            yield key, value, "command line"
        elif key in lines:
            yield key, value, f"{file}:{lines[key]}"
        else:
            yield key, value, "default"


@dataclass(frozen=True)
class _Row:
    key: str
    type: str
    values: str
    default: str
    description: str


@dataclass(frozen=True)
class _Table:
    name: str
    description: str
    rows: list[_Row]


def _tables() -> Iterator[_Table]:
    """A table for each section and each section within, and one of the keys outside of sections."""
    root = Config.model_json_schema()
    yield from _section_tables("", root, root)


def _section_tables(
    prefix: str, section: Mapping[str, Any], root: Mapping[str, Any]
) -> Iterator[_Table]:
    rows, inner = [], []
    for name, field in section["properties"].items():
        if "$ref" in field:
            target = root["$defs"][field["$ref"].rpartition("/")[2]]
            inner += _section_tables(f"{prefix}{name}.", target, root)
        else:
            rows.append(_row(prefix + name, field, is_required=name in section.get("required", [])))
    if section["additionalProperties"] is True:
        rows.append(
            _Row(
                f"{prefix}ARGUMENT",
                "any",
                "",
                "torch's",
                f"an argument of what `{prefix}name` names",
            )
        )
    if prefix:
        yield _Table(prefix.removesuffix("."), section["description"], rows)
    yield from inner
    if not prefix:
        yield _Table("outside of sections", section["description"], rows)


def _row(key: str, field: Mapping[str, Any], *, is_required: bool) -> _Row:
    kinds = field.get("anyOf") or field.get("oneOf") or [field]
    nullable = {"type": "null"} in kinds
    # The alternatives of a text (names, or a pattern) have no type of their own.
    kind = next((each for each in kinds if each.get("type", "null") != "null"), field)
    types = {
        "integer": "integer",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "object": "mapping",
        "array": "list",
    }
    default = "required" if is_required else f"`{strict_yaml.dump_line(field['default'])}`"
    return _Row(
        key,
        types[kind["type"]]
        + (" or a pair" if "oneOf" in field else "")
        + (" or null" if nullable else ""),
        _values(kind),
        default,
        field["description"],
    )


def _values(kind: Mapping[str, Any]) -> str:
    """Describe the values that JSON Schema allows for a type."""
    if "anyOf" in kind:
        return " or ".join(_values(each) for each in kind["anyOf"])
    if "enum" in kind:
        return ", ".join(f"`{each}`" for each in kind["enum"])
    if "const" in kind:
        return f"`{kind['const']}`"
    if "pattern" in kind:
        return "`package.module:callable`"
    if isinstance(kind.get("additionalProperties"), dict):
        inner = _values(kind["additionalProperties"])
        return f"text to one of {inner}" if inner else ""
    if "minimum" in kind and "maximum" in kind:
        return f"{kind['minimum']} to {kind['maximum']}"
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    return ", ".join(f"{sign} {kind[bound]}" for bound, sign in signs.items() if bound in kind)


def _text(table: _Table) -> str:
    lines = [f"{table.name}: {table.description}", ""]
    width = max(len(row.key) for row in table.rows)
    for row in table.rows:
        facts = [
            row.type,
            row.default if row.default == "required" else f"default {row.default}",
            row.values,
        ]
        line = f"  {row.key:<{width}}  {'; '.join(filter(None, facts))}".replace("`", "")
        lines += textwrap.wrap(line, _WIDTH, subsequent_indent=" " * (width + 4))
        lines += textwrap.wrap(
            row.description, _WIDTH, initial_indent="      ", subsequent_indent="      "
        )
    return "\n".join(lines) + "\n"


def _markdown(table: _Table) -> str:
    rows = [["key", "type", "values", "default", "meaning"], ["---"] * 5]
    rows += [
        [f"`{row.key}`", row.type, row.values, row.default, row.description] for row in table.rows
    ]
    lines = "".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |\n" for row in rows
    )
    return f"## {table.name}\n\n{table.description}\n\n{lines}"
