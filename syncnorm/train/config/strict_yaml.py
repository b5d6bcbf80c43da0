"""YAML for configuration files: the core schema of YAML 1.2, and nothing that surprises.

PyYAML reads YAML 1.1, where `1e-3` is a string, `norm: off` is False, `010` is 8, `1:30` is 90, and
of two equal keys the last one wins in silence. Here numbers, booleans and nulls are those of YAML
1.2, and equal keys are an error. So are tags and aliases: the first can build objects, the second
can make a small file enormous.
"""

import math
import re
import reprlib
from collections.abc import Hashable, Iterator
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from syncnorm.errors import ConfigError

_NULL = re.compile(r"(?:null|Null|NULL|~|)$")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


# A configuration has sections within sections, not more; without a limit the reader itself would
# run out of stack.
_MAX_DEPTH = 32
_MAX_KEY = 500


class _Loader(yaml.SafeLoader):
    # Both tables start empty: nothing of YAML 1.1 is inherited, neither types nor the merge key.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own name and kind)
    yaml_constructors: dict[str | None, Any] = {}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Refuse aliases and explicit tags where they stand, before anything is built from them."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(
                f"alias *{event.anchor} is not allowed{_location(event.start_mark)}"
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise yaml.YAMLError(f"tag {tag} is not allowed{_location(event.start_mark)}")
        if self.depth == _MAX_DEPTH:
            raise yaml.YAMLError(f"nested too deeply{_location(event.start_mark)}")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _construct_mapping(loader: _Loader, node: MappingNode) -> dict[Hashable, Any]:
    mapping: dict[Hashable, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.YAMLError(
                f"key {reprlib.repr(key)} must be a string{_location(key_node.start_mark)}"
            )
        if len(key) > _MAX_KEY:
            raise yaml.YAMLError(
                f"key of {len(key)} characters is too long{_location(key_node.start_mark)}"
            )
        if key in mapping:
            raise yaml.YAMLError(
                f"key {reprlib.repr(key)} is given twice{_location(key_node.start_mark)}"
            )
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


def _construct_sequence(loader: _Loader, node: SequenceNode) -> list[Any]:
    return [loader.construct_object(child, deep=True) for child in node.value]


def _construct_str(_: _Loader, node: ScalarNode) -> str:
    if re.search("[\ud800-\udfff]", node.value):
        raise yaml.YAMLError(
            f"half of a surrogate pair is no character{_location(node.start_mark)}"
        )
    return node.value


def _construct_int(_: _Loader, node: ScalarNode) -> int:
    text = node.value
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    try:
        return int(text, base)
    except ValueError:  # Python's own limit on digits
        raise yaml.YAMLError(
            f"integer of {len(text)} digits is too long{_location(node.start_mark)}"
        ) from None


def _construct_float(_: _Loader, node: ScalarNode) -> float:
    text = node.value.lower()
    # YAML writes .inf and .nan where Python writes inf and nan
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _location(mark: Any) -> str:
    return f" (line {mark.line + 1}, column {mark.column + 1})"


for _name, _pattern, _first in [
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
]:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)

_Loader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)
_Loader.add_constructor("tag:yaml.org,2002:bool", lambda loader, node: node.value.lower() == "true")
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Loader.add_constructor("tag:yaml.org,2002:str", _construct_str)
_Loader.add_constructor("tag:yaml.org,2002:seq", _construct_sequence)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def parse(text: str, source: str) -> Any:
    """Read one YAML document.

    Args:
        text: the document.
        source: the file or option, for the message.

    Returns:
        None, bool, int, float, str, list or dict with string keys.

    Raises:
        ConfigError: it is not one well-formed document, or uses what this module refuses.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader with fewer types)
    except yaml.MarkedYAMLError as error:
        location = _location(error.problem_mark) if error.problem_mark else ""
        raise ConfigError(f"{source}: {error.problem}{location}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{source}: not text that YAML allows: {error.reason} (line {line})"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {printable(str(error))}") from None


def printable(text: str) -> str:
    """Escape characters that would break the line or control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def lines(text: str) -> dict[tuple[str, ...], int]:
    """Find the line of each key of a document that `parse` has read without an error.

    Returns:
        A dict from the path of a key, such as ("train", "lr"), to its line, from 1.
    """
    node = _Loader(text).get_single_node()
    return dict(_lines(node, ())) if isinstance(node, MappingNode) else {}


def _lines(mapping: MappingNode, prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    for key_node, value_node in mapping.value:
        path = (*prefix, key_node.value)
        yield path, key_node.start_mark.line + 1
        if isinstance(value_node, MappingNode):
            yield from _lines(value_node, path)


class _Dumper(yaml.SafeDumper):
    # Quotes a string if either version of YAML would take it for something else.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])
        + _Loader.yaml_implicit_resolvers.get(first, [])
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal objects out again: `parse` refuses aliases."""
        return True


def dump(values: dict[str, Any]) -> str:
    """Write what `parse` reads back as equal, and YAML 1.1 as well."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


class _LineDumper(_Dumper):
    pass


# Only double quotes keep a line break within the line.
_LineDumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
    ),
)


def dump_line(value: Any) -> str:
    """Write one value, or one key, on one line, as it may stand in a document."""
    text = yaml.dump(
        value,
        Dumper=_LineDumper,
        default_flow_style=True,
        width=math.inf,
        sort_keys=False,
        allow_unicode=True,
    )
    return text.removesuffix("\n").removesuffix("\n...")
